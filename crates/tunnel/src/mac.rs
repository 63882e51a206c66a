//! The two MACs at the end of handshake messages, and the guard in front of the handshake.
//!
//! In the order a listener uses them:
//!
//! 1. **mac1**, keyed by the receiver's public key: who does not know whom it talks to costs one BLAKE2s.
//! 2. While handshakes come slower than [`GuardLimits::free_per_second`], that is all.
//! 3. Under load, **mac2** must show that the sender receives at its source address: it is keyed by a
//!    *cookie*, which the listener makes from a secret that rotates every two minutes and the source
//!    address and port, so that it keeps nothing per sender. Without a valid mac2 the answer is one
//!    [cookie reply](COOKIE_REPLY_BYTES), smaller than any Initiation.
//! 4. With a valid mac2, each source (IPv4 address, IPv6 /64) has a rate of its own, in a table of fixed
//!    size, and all together stay below [`GuardLimits::total_per_second`].
//!
//! ```text
//! mac1 key     = BLAKE2s-256("anabranch mac1"   | receiver's static public key)
//! cookie key   = BLAKE2s-256("anabranch cookie" | receiver's static public key)
//! mac1         = keyed BLAKE2s-128(mac1 key, message up to mac1)
//! mac2         = keyed BLAKE2s-128(cookie,   message up to mac2), or zero
//! cookie       = keyed BLAKE2s-128(secret of the period, source address:128 | source port:16)
//! cookie reply = header | nonce:24 | ChaCha20-Poly1305(key = keyed BLAKE2s-256(cookie key, nonce),
//!                nonce 0, associated data = header | mac1 of the answered message, cookie)
//! ```
//! The scheme is WireGuard's; the one-time key from a 24-byte nonce stands where it has XChaCha20.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use blake2::digest::consts::{U16, U32};
use blake2::digest::{FixedOutput, KeyInit, Update};
use blake2::{Blake2s256, Blake2sMac, Digest};
use packet::drop_reason::DropReason;
use ring::aead;
use subtle::ConstantTimeEq;
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::aead::TAG_BYTES;
use crate::header::{HEADER_BYTES, Header, Kind, NOT_TOLD};
use crate::time::Time;

/// Length of one MAC, bytes.
pub const MAC_BYTES: usize = 16;
/// Length of mac1 and mac2 at the end of each Initiation and Response.
pub const MACS_BYTES: usize = 2 * MAC_BYTES;
/// Length of a cookie reply: header, nonce, sealed cookie, tag.
pub const COOKIE_REPLY_BYTES: usize = HEADER_BYTES + COOKIE_NONCE_BYTES + MAC_BYTES + TAG_BYTES;
/// How long a listener keeps one cookie secret; the one before is still accepted.
pub const COOKIE_SECRET_MS: u64 = 120_000;
/// How long a dialer uses a cookie.
pub const COOKIE_USE_MS: u64 = 115_000;

const COOKIE_NONCE_BYTES: usize = 24;
const COOKIE_AT: usize = HEADER_BYTES + COOKIE_NONCE_BYTES;

fn keyed_128(key: &[u8], parts: &[&[u8]]) -> [u8; MAC_BYTES] {
    let mut mac = Blake2sMac::<U16>::new_from_slice(key).expect("BLAKE2s takes keys up to 32 bytes");
    for part in parts {
        Update::update(&mut mac, part);
    }
    mac.finalize_fixed().into()
}

fn keyed_256(key: &[u8], parts: &[&[u8]]) -> [u8; 32] {
    let mut mac = Blake2sMac::<U32>::new_from_slice(key).expect("BLAKE2s takes keys up to 32 bytes");
    for part in parts {
        Update::update(&mut mac, part);
    }
    mac.finalize_fixed().into()
}

fn labelled(label: &[u8], public: &[u8; 32]) -> [u8; 32] {
    Blake2s256::new().chain_update(label).chain_update(public).finalize().into()
}

/// The two public MAC keys of one receiver of handshake messages.
#[derive(Clone, Debug)]
pub struct MacKeys {
    mac1: [u8; 32],
    cookie: [u8; 32],
}

impl MacKeys {
    /// Keys for messages *to* the holder of this static public key.
    #[must_use]
    pub fn new(receiver_public: &[u8; 32]) -> Self {
        Self {
            mac1: labelled(b"anabranch mac1", receiver_public),
            cookie: labelled(b"anabranch cookie", receiver_public),
        }
    }

    /// Appends mac1 and mac2 (zero without a cookie) to a message.
    pub fn append(&self, message: &mut Vec<u8>, cookie: Option<&Cookie>) {
        let mac1 = keyed_128(&self.mac1, &[message]);
        message.extend_from_slice(&mac1);
        let mac2 = cookie.map_or([0; MAC_BYTES], |cookie| keyed_128(&cookie.0, &[message]));
        message.extend_from_slice(&mac2);
    }

    /// Checks mac1 of a whole message in constant time.
    ///
    /// # Errors
    /// `TooShort` without room for header and MACs, `HandshakeMac`.
    pub fn verify_mac1(&self, message: &[u8]) -> Result<(), DropReason> {
        let (body, mac1, _) = split(message)?;
        if bool::from(keyed_128(&self.mac1, &[body]).ct_eq(mac1)) {
            Ok(())
        } else {
            Err(DropReason::HandshakeMac)
        }
    }
}

/// Everything before mac1, mac1, mac2 of a handshake message.
type Split<'a> = (&'a [u8], &'a [u8; MAC_BYTES], &'a [u8; MAC_BYTES]);

fn split(message: &[u8]) -> Result<Split<'_>, DropReason> {
    let (rest, mac2) = message.split_last_chunk::<MAC_BYTES>().ok_or(DropReason::TooShort)?;
    let (body, mac1) = rest.split_last_chunk::<MAC_BYTES>().ok_or(DropReason::TooShort)?;
    if body.len() < HEADER_BYTES { Err(DropReason::TooShort) } else { Ok((body, mac1, mac2)) }
}

/// Sets mac2 of a whole message.
pub fn put_mac2(message: &mut [u8], cookie: &Cookie) {
    if let Some((body, mac2)) = message.split_last_chunk_mut::<MAC_BYTES>() {
        *mac2 = keyed_128(&cookie.0, &[body]);
    }
}

/// Proof that its holder receives at one address and port; good for about two minutes.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct Cookie([u8; MAC_BYTES]);

impl std::fmt::Debug for Cookie {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Cookie(secret)")
    }
}

/// How many handshake messages a [`Guard`] lets through.
#[derive(Clone, Copy, Debug)]
pub struct GuardLimits {
    /// Per second, before mac2 is asked for.
    pub free_per_second: u32,
    /// At once, before mac2 is asked for.
    pub free_burst: u32,
    /// Per second and source, under load.
    pub source_per_second: u32,
    /// At once per source, under load.
    pub source_burst: u32,
    /// Per second of all sources with a valid mac2 together, so that handshakes leave time for traffic.
    pub total_per_second: u32,
}

impl Default for GuardLimits {
    /// 100 free per second (burst 200), 20 per source and second (burst 5), 2,000 in all: at some 200 µs
    /// each, at most 40 % of one core.
    fn default() -> Self {
        Self {
            free_per_second: 100,
            free_burst: 200,
            source_per_second: 20,
            source_burst: 5,
            total_per_second: 2_000,
        }
    }
}

/// A token bucket in eight bytes: the moment when it will be full again.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Bucket {
    full_at: Time,
}

impl Bucket {
    /// Takes one of `burst` tokens that come back at `per_second`, if there is one.
    pub(crate) fn take(&mut self, now: Time, per_second: u32, burst: u32) -> bool {
        let interval_ns = 1_000_000_000 / u64::from(per_second.max(1));
        let missing_ns = self.full_at.since(now);
        if missing_ns.saturating_add(interval_ns) > interval_ns.saturating_mul(u64::from(burst.max(1))) {
            return false;
        }
        self.full_at = self.full_at.max(now).plus_ns(interval_ns);
        true
    }
}

/// One place of the source table.
#[derive(Clone, Copy, Debug, Default)]
struct Source {
    fingerprint: u64,
    bucket: Bucket,
}

const SOURCE_SETS: usize = 256;
const SOURCE_WAYS: usize = 4;

/// The guard's decision on a handshake message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Go on: open it.
    Process,
    /// Under load and without a valid mac2: send these bytes back to the source, count `HandshakeCookie`.
    Reply([u8; COOKIE_REPLY_BYTES]),
    /// Drop and count.
    Drop(DropReason),
}

/// The guard of one receiving key. Memory is fixed (16 KiB) whoever sends. All cores share it: MACs and cookies are computed
/// without a lock, which is held to take a token only.
pub struct Guard {
    keys: MacKeys,
    seed: [u8; 32],
    replies: AtomicU64,
    limits: GuardLimits,
    buckets: Mutex<Buckets>,
}

struct Buckets {
    free: Bucket,
    total: Bucket,
    sources: Box<[[Source; SOURCE_WAYS]; SOURCE_SETS]>,
}

impl std::fmt::Debug for Guard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guard")
            .field("limits", &self.limits)
            .field("replies", &self.replies)
            .finish_non_exhaustive()
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.seed.zeroize();
    }
}

impl Guard {
    /// A guard for messages to `own_public`. `seed`: 32 random bytes, fresh for each process start and each guard
    /// (cookie secrets and nonces come from it). Guards of several cores that must accept each other's cookies
    /// cannot share a seed, or nonces would repeat: keep one guard per key.
    #[must_use]
    pub fn new(own_public: &[u8; 32], seed: [u8; 32], limits: GuardLimits) -> Self {
        Self {
            keys: MacKeys::new(own_public),
            seed,
            replies: AtomicU64::new(0),
            limits,
            buckets: Mutex::new(Buckets {
                free: Bucket::default(),
                total: Bucket::default(),
                sources: Box::new([[Source::default(); SOURCE_WAYS]; SOURCE_SETS]),
            }),
        }
    }

    fn buckets(&self) -> MutexGuard<'_, Buckets> {
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Judges an Initiation or Response from `source` before anything expensive happens.
    pub fn admit(&self, now: Time, source: SocketAddr, message: &[u8]) -> Admission {
        if let Err(reason) = self.keys.verify_mac1(message) {
            return Admission::Drop(reason);
        }
        if self.buckets().free.take(now, self.limits.free_per_second, self.limits.free_burst) {
            return Admission::Process;
        }
        if !self.verify_mac2(now, source, message) {
            return match self.cookie_reply(now, source, message) {
                Ok(reply) => Admission::Reply(reply),
                Err(reason) => Admission::Drop(reason),
            };
        }
        let hash = self.hash_of(source.ip());
        let mut buckets = self.buckets();
        // The source's share first, so that one source cannot use up the total.
        if buckets.take_source(now, &hash, &self.limits)
            && buckets.total.take(now, self.limits.total_per_second, 50)
        {
            Admission::Process
        } else {
            Admission::Drop(DropReason::HandshakeRate)
        }
    }

    /// Whether the next message would need a valid mac2.
    #[must_use]
    pub fn under_load(&self, now: Time) -> bool {
        let mut free = self.buckets().free;
        !free.take(now, self.limits.free_per_second, self.limits.free_burst)
    }

    /// Whether mac2 of `message` was made with a cookie of this or the previous period for this very source.
    #[must_use]
    pub fn verify_mac2(&self, now: Time, source: SocketAddr, message: &[u8]) -> bool {
        let Ok((_, _, mac2)) = split(message) else { return false };
        if mac2 == &[0; MAC_BYTES] {
            return false;
        }
        let body = &message[..message.len() - MAC_BYTES];
        let period = period(now);
        let mut good = subtle::Choice::from(0);
        for period in [Some(period), period.checked_sub(1)].into_iter().flatten() {
            let cookie = self.cookie(period, source);
            good |= keyed_128(&cookie.0, &[body]).ct_eq(mac2);
        }
        good.into()
    }

    fn cookie(&self, period: u64, source: SocketAddr) -> Cookie {
        let mut secret = keyed_256(&self.seed, &[b"cookie secret", &period.to_be_bytes()]);
        let cookie = keyed_128(&secret, &[&address_bytes(source.ip()), &source.port().to_be_bytes()]);
        secret.zeroize();
        Cookie(cookie)
    }

    /// The reply that gives `source` its cookie, bound to this message by its mac1.
    ///
    /// # Errors
    /// As [`Header::parse`]; `HandshakeMalformed` for kinds that are no handshake message.
    pub fn cookie_reply(
        &self,
        now: Time,
        source: SocketAddr,
        message: &[u8],
    ) -> Result<[u8; COOKIE_REPLY_BYTES], DropReason> {
        let cookie = self.cookie(period(now), source);
        self.reply(message, &cookie.0, COUNTER_COOKIE)
    }

    /// The reply that asks the sender of a message to prove that it is not an old recording: its next Initiation shall
    /// have this token in the sealed hello.
    ///
    /// # Errors
    /// As [`Self::cookie_reply`].
    pub fn freshness_challenge(
        &self,
        message: &[u8],
        token: &[u8; MAC_BYTES],
    ) -> Result<[u8; COOKIE_REPLY_BYTES], DropReason> {
        self.reply(message, token, COUNTER_FRESHNESS)
    }

    fn reply(
        &self,
        message: &[u8],
        value: &[u8; MAC_BYTES],
        counter: u64,
    ) -> Result<[u8; COOKIE_REPLY_BYTES], DropReason> {
        if message.len() < COOKIE_REPLY_BYTES {
            // An answer longer than the question would make us a tool for floods at forged sources.
            return Err(DropReason::TooShort);
        }
        let asked = Header::parse(message)?;
        let (_, mac1, _) = split(message)?;
        let receiver_index = match asked.kind {
            Kind::Initiation => asked.receiver_index,
            Kind::Response => asked.counter as u32,
            _ => return Err(DropReason::HandshakeMalformed),
        };
        let header = Header {
            kind: Kind::Cookie,
            receiving_core: NOT_TOLD,
            sending_core: 0,
            path: asked.path,
            receiver_index,
            counter,
        };
        let mut reply = [0; COOKIE_REPLY_BYTES];
        header.write(&mut reply);
        // Never repeats under one seed, and tells nothing about the count.
        let number = self.replies.fetch_add(1, Relaxed);
        let nonce = keyed_256(&self.seed, &[b"cookie nonce", &number.to_be_bytes()]);
        reply[HEADER_BYTES..COOKIE_AT].copy_from_slice(&nonce[..COOKIE_NONCE_BYTES]);
        reply[COOKIE_AT..COOKIE_AT + MAC_BYTES].copy_from_slice(value);
        let (front, sealed) = reply.split_at_mut(COOKIE_AT);
        let (plain, tag_room) = sealed.split_at_mut(MAC_BYTES);
        let tag = cookie_cipher(&self.keys.cookie, &front[HEADER_BYTES..])
            .seal_in_place_separate_tag(zero_nonce(), cookie_associated_data(front, mac1), plain)
            .map_err(|_| DropReason::HandshakeFailed)?;
        tag_room.copy_from_slice(tag.as_ref());
        Ok(reply)
    }

    /// Names a source in the table: IPv4 address or IPv6 /64.
    fn hash_of(&self, ip: IpAddr) -> [u8; MAC_BYTES] {
        let mut prefix = address_bytes(ip);
        if let IpAddr::V6(v6) = ip
            && v6.to_ipv4_mapped().is_none()
        {
            prefix[8..].fill(0);
        }
        keyed_128(&self.seed, &[b"source", &prefix])
    }
}

impl Buckets {
    /// One token of the source with this hash. A source not in its set takes the place that has been quiet for longest.
    fn take_source(&mut self, now: Time, hash: &[u8; MAC_BYTES], limits: &GuardLimits) -> bool {
        let fingerprint = u64::from_be_bytes(std::array::from_fn(|at| hash[at])) | 1;
        let set = &mut self.sources[usize::from(hash[15]) % SOURCE_SETS];
        let at = set.iter().position(|place| place.fingerprint == fingerprint).unwrap_or_else(|| {
            let oldest = (0..SOURCE_WAYS).min_by_key(|at| set[*at].bucket.full_at).unwrap_or(0);
            set[oldest] = Source { fingerprint, bucket: Bucket::default() };
            oldest
        });
        set[at].bucket.take(now, limits.source_per_second, limits.source_burst)
    }
}

fn period(now: Time) -> u64 {
    now.ms() / COOKIE_SECRET_MS
}

/// 16 bytes; IPv4 as IPv4-mapped IPv6, so that a dual-stack socket's view makes no difference.
fn address_bytes(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

fn zero_nonce() -> aead::Nonce {
    // The key is used once.
    aead::Nonce::assume_unique_for_key([0; 12])
}

fn cookie_cipher(cookie_key: &[u8; 32], nonce: &[u8]) -> aead::LessSafeKey {
    let key = keyed_256(cookie_key, &[nonce]);
    let unbound =
        aead::UnboundKey::new(&aead::CHACHA20_POLY1305, &key).expect("ChaCha20-Poly1305 takes 32 bytes");
    aead::LessSafeKey::new(unbound)
}

/// header | mac1. `front` begins with the header of the reply.
fn cookie_associated_data(front: &[u8], mac1: &[u8; MAC_BYTES]) -> aead::Aad<[u8; HEADER_BYTES + MAC_BYTES]> {
    let mut data = [0; HEADER_BYTES + MAC_BYTES];
    data[..HEADER_BYTES].copy_from_slice(&front[..HEADER_BYTES]);
    data[HEADER_BYTES..].copy_from_slice(mac1);
    aead::Aad::from(data)
}

/// How many of its last messages a dialer remembers, to recognise a late cookie reply.
const SENT_REMEMBERED: usize = 4;

/// Counter of a cookie reply with a cookie …
const COUNTER_COOKIE: u64 = 0;
/// … and of one with the token of a freshness challenge.
const COUNTER_FRESHNESS: u64 = 1;

/// The dialer's side: the last cookie that a peer gave for one local address. Keep one per path.
#[derive(Clone, Debug)]
pub struct CookieStore {
    keys: MacKeys,
    sent: [Option<[u8; MAC_BYTES]>; SENT_REMEMBERED],
    next: usize,
    cookie: Option<(Cookie, Time)>,
    challenge: Option<[u8; MAC_BYTES]>,
}

impl CookieStore {
    /// An empty store for the peer with this static public key.
    #[must_use]
    pub fn new(remote_public: &[u8; 32]) -> Self {
        Self {
            keys: MacKeys::new(remote_public),
            sent: [None; SENT_REMEMBERED],
            next: 0,
            cookie: None,
            challenge: None,
        }
    }

    /// Remembers a message just sent (its mac1), so that a cookie reply to it is recognised.
    pub fn sent(&mut self, message: &[u8]) {
        if let Ok((_, mac1, _)) = split(message) {
            self.sent[self.next] = Some(*mac1);
            self.next = (self.next + 1) % SENT_REMEMBERED;
        }
    }

    /// Takes a cookie reply. Send the next message with [`cookie`](Self::cookie).
    ///
    /// # Errors
    /// `HandshakeMalformed` if it is none, `HandshakeCookie` if it answers nothing that was sent. Nothing changes then.
    pub fn accept(&mut self, now: Time, reply: &[u8]) -> Result<(), DropReason> {
        let header = Header::parse(reply)?;
        let Ok(reply) = <&[u8; COOKIE_REPLY_BYTES]>::try_from(reply) else {
            return Err(DropReason::HandshakeMalformed);
        };
        if header.kind != Kind::Cookie {
            return Err(DropReason::HandshakeMalformed);
        }
        let (front, sealed) = reply.split_at(COOKIE_AT);
        let cipher = cookie_cipher(&self.keys.cookie, &front[HEADER_BYTES..]);
        for slot in &mut self.sent {
            let Some(mac1) = slot else { continue };
            let mut copy = [0; MAC_BYTES + TAG_BYTES];
            copy.copy_from_slice(sealed);
            let opened = cipher.open_in_place(zero_nonce(), cookie_associated_data(front, mac1), &mut copy);
            if let Ok(plain) = opened
                && let Ok(cookie) = <[u8; MAC_BYTES]>::try_from(&*plain)
            {
                // Each message gets one answer.
                *slot = None;
                if header.counter == COUNTER_FRESHNESS {
                    self.challenge = Some(cookie);
                } else {
                    self.cookie = Some((Cookie(cookie), now));
                }
                return Ok(());
            }
        }
        Err(DropReason::HandshakeCookie)
    }

    /// Whether the next Initiation has a freshness challenge to answer.
    #[must_use]
    pub fn is_challenged(&self) -> bool {
        self.challenge.is_some()
    }

    /// Token that the next Initiation answers a freshness challenge with; each is good for one.
    pub fn take_challenge(&mut self) -> Option<[u8; MAC_BYTES]> {
        self.challenge.take()
    }

    /// The cookie to use now, if there is a fresh one.
    #[must_use]
    pub fn cookie(&self, now: Time) -> Option<&Cookie> {
        let (cookie, since) = self.cookie.as_ref()?;
        (now.since(*since) < COOKIE_USE_MS * 1_000_000).then_some(cookie)
    }
}

#[cfg(test)]
#[path = "mac_tests.rs"]
mod tests;
