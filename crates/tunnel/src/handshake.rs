//! The handshake: Noise IKpsk2 in two datagrams, with processor information both ways (row T3).
//!
//! ```text
//! dialer                                              listener
//! Initiator::start ── Initiation ──────────────────▶  Guard::admit, open_initiation,
//!                                                     peer known? PeerGate::accept, Opened::respond
//! Initiator::finish ◀───────────────── Response ────  install receive keys before sending it
//! install keys, send ── first data datagram ───────▶  confirmed: send with the new keys
//! ```
//!
//! ```text
//! Initiation = header:16 | ephemeral:32 | sealed static:48 | sealed payload:16+n+16 | mac1:16 | mac2:16
//! Response   = header:16 | ephemeral:32 |                    sealed payload:16+n+16 | mac1:16 | mac2:16
//! payload    = the 16 header bytes again | hello
//! header     : receiving core 255, sending core 0, path as sent,
//!              Initiation: receiver index = the dialer's index, counter = part:8 | parts − 1:8 | 0:48
//!              Response:   receiver index = the dialer's index, counter = part:8 | parts − 1:8 | 0:16 | listener's index:32
//! ```
//!
//! The header is repeated inside the sealed payload, so that nobody in between can change an index or path: a
//! listener refuses an Initiation whose headers differ, a dialer believes the sealed header of a Response.
//! Part and parts − 1 are 0 now; they leave room for messages of several datagrams (post-quantum keys).
//! Each message is at most [`HANDSHAKE_BYTES_MAX`] long. Without a preshared key the protocol uses 32 zero
//! bytes, as WireGuard does.

use packet::drop_reason::DropReason;
use snow::HandshakeState;
use zeroize::{Zeroize, Zeroizing};

use crate::aead::Aead;
use crate::header::{HEADER_BYTES, Header, Kind, NOT_TOLD};
use crate::hello::{FRESHNESS_BYTES, HELLO_BYTES_MAX, Hello, TooLarge};
use crate::keys::{PrivateKey, public_key_is_sound};
use crate::mac::{Cookie, MACS_BYTES, MacKeys};
use crate::noise::Primitives;
use crate::time::Time;

/// Longest handshake message, bytes: what IPv6's minimum MTU of 1,280 leaves behind IP and UDP headers.
pub const HANDSHAKE_BYTES_MAX: usize = 1_232;

/// Shortest Initiation, bytes (with an empty hello).
pub const INITIATION_BYTES_MIN: usize = HEADER_BYTES + 32 + 48 + HEADER_BYTES + 16 + MACS_BYTES;

/// Shortest Response, bytes (with an empty hello).
pub const RESPONSE_BYTES_MIN: usize = HEADER_BYTES + 32 + HEADER_BYTES + 16 + MACS_BYTES;

const _: () = assert!(INITIATION_BYTES_MIN + HELLO_BYTES_MAX <= HANDSHAKE_BYTES_MAX);

/// Full name of the Noise protocol.
pub const NOISE_PROTOCOL: &str = "Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";

/// Mixed into every handshake: a peer of another protocol or version computes other keys.
pub const PROLOGUE: &[u8] = b"anabranch/1";

/// Where `psk2` stands in the pattern.
const PSK_POSITION: u8 = 2;

/// Two Initiations of one peer closer together than this are not answered both, ms (as in WireGuard).
pub const INITIATION_INTERVAL_MS: u64 = 20;
/// A freshness challenge can be answered for so long.
const CHALLENGE_LIFE_MS: u64 = 10_000;
/// After an answered freshness challenge there is no other for so long.
const CHALLENGE_PAUSE_MS: u64 = 1_000;

/// Why an Initiation or Response could not be made. Never caused by a datagram.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The hello does not fit.
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
    /// The peer's public key is a point of small order: no secret can be shared with it.
    #[error("the peer's public key is not usable")]
    UnsoundKey,
    /// The system gave no random bytes, or the Noise state refused.
    #[error("Noise: {0}")]
    Noise(#[from] snow::Error),
}

/// Our static key pair with what is derived from it.
pub struct Identity {
    private: PrivateKey,
    public: [u8; 32],
    mac_keys: MacKeys,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").finish_non_exhaustive()
    }
}

impl Identity {
    /// An identity from the private key.
    #[must_use]
    pub fn new(private: PrivateKey) -> Self {
        let public = private.public();
        Self { private, public, mac_keys: MacKeys::new(&public) }
    }

    /// An identity from the 32 bytes of an X25519 private key.
    #[must_use]
    pub fn from_private(private: [u8; 32]) -> Self {
        Self::new(PrivateKey::new(private))
    }

    /// Our static public key.
    #[must_use]
    pub const fn public(&self) -> [u8; 32] {
        self.public
    }

    fn builder<'a>(&'a self, psk: &'a [u8; 32]) -> Result<snow::Builder<'a>, snow::Error> {
        snow::Builder::with_resolver(NOISE_PROTOCOL.parse()?, Box::new(Primitives))
            .local_private_key(self.private.bytes())?
            .prologue(PROLOGUE)?
            .psk(PSK_POSITION, psk)
    }
}

/// Outcome of a handshake, the same at both sides. Keys are wiped when it is dropped.
pub struct Established {
    /// Directional key for what we send ([`crate::aead::LaneKey::derive`]).
    pub send_key: Zeroizing<[u8; 32]>,
    /// Directional key for what we receive.
    pub receive_key: Zeroizing<[u8; 32]>,
    /// The peer's name for the session: the receiver index of all we send.
    pub remote_index: u32,
    /// The cipher both chose.
    pub aead: Aead,
    /// The peer's hello.
    pub remote_hello: Hello,
}

impl std::fmt::Debug for Established {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Established")
            .field("remote_index", &self.remote_index)
            .field("aead", &self.aead)
            .field("remote_hello", &self.remote_hello)
            .finish_non_exhaustive()
    }
}

/// An attempt of the dialer, from Initiation to Response.
pub struct Initiator {
    /// `None` once established.
    noise: Option<HandshakeState>,
    /// To check mac1 of the Response: we are its receiver.
    mac_keys: MacKeys,
    sender_index: u32,
    aeads: u8,
}

impl std::fmt::Debug for Initiator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Initiator").field("sender_index", &self.sender_index).finish_non_exhaustive()
    }
}

impl Initiator {
    /// A new attempt and the Initiation to send. Each attempt has a new ephemeral key from the system's random
    /// numbers, a new `sender_index` and a new `hello.timestamp_ns`; nothing is ever sent twice.
    ///
    /// # Errors
    /// [`HandshakeError`]; none comes from the network.
    pub fn start(
        identity: &Identity,
        remote: &[u8; 32],
        psk: Option<&[u8; 32]>,
        hello: &Hello,
        sender_index: u32,
        path: u8,
        cookie: Option<&Cookie>,
    ) -> Result<(Self, Vec<u8>), HandshakeError> {
        if !public_key_is_sound(remote) {
            return Err(HandshakeError::UnsoundKey);
        }
        let mut noise =
            identity.builder(psk.unwrap_or(&[0; 32]))?.remote_public_key(remote)?.build_initiator()?;
        let header = handshake_header(Kind::Initiation, path, sender_index, 0);
        let message = seal_message(&mut noise, header, hello, &MacKeys::new(remote), cookie)?;
        let initiator = Self {
            noise: Some(noise),
            mac_keys: identity.mac_keys.clone(),
            sender_index,
            aeads: hello.aeads,
        };
        Ok((initiator, message))
    }

    /// Our index of this attempt: a Response or cookie reply belongs to it if its receiver index is this.
    #[must_use]
    pub const fn sender_index(&self) -> u32 {
        self.sender_index
    }

    /// Takes a Response. Bad ones change nothing: the attempt goes on waiting for the right one.
    ///
    /// # Errors
    /// A reason to count: `TooShort`, `BadVersion`, `UnknownType`, `HandshakeMalformed`, `UnknownIndex` (of another
    /// attempt), `HandshakeMac`, `HandshakeFailed` (does not decrypt, or no common cipher, or already established).
    pub fn finish(&mut self, datagram: &[u8]) -> Result<Established, DropReason> {
        let header = parse_message(datagram, Kind::Response, RESPONSE_BYTES_MIN)?;
        if header.receiver_index != self.sender_index {
            return Err(DropReason::UnknownIndex);
        }
        self.mac_keys.verify_mac1(datagram)?;
        // snow restores its state when a message does not decrypt, so a forged Response costs the attempt nothing.
        let noise = self.noise.as_mut().ok_or(DropReason::HandshakeFailed)?;
        let (sealed_header, remote_hello) = open_payload(noise, datagram)?;
        // From here on the peer itself speaks: a bad hello ends the attempt, it would not get better. The sealed copy
        // of the header counts, not the clear one, so that a message changed on its way costs nothing either.
        if sealed_header.kind != Kind::Response
            || sealed_header.receiver_index != self.sender_index
            || sealed_header.counter >> 32 != 0
        {
            return Err(DropReason::HandshakeMalformed);
        }
        let aead = Aead::agree(self.aeads, remote_hello.aeads).ok_or(DropReason::HandshakeFailed)?;
        let (send_key, receive_key) = noise.dangerously_get_raw_split();
        self.noise = None;
        Ok(Established {
            send_key: Zeroizing::new(send_key),
            receive_key: Zeroizing::new(receive_key),
            remote_index: sealed_header.counter as u32,
            aead,
            remote_hello,
        })
    }
}

/// An Initiation that decrypted: somebody with `remote_static` made it at some time. Whether we know that key, and
/// whether the message is a replay ([`PeerGate`]), is the caller's next question.
pub struct Opened {
    /// The dialer's static public key.
    pub remote_static: [u8; 32],
    /// The peer's hello.
    pub hello: Hello,
    /// Its timestamp, ns.
    pub timestamp_ns: u64,
    /// Its index: the receiver index of the Response.
    pub sender_index: u32,
    /// The path it sent on.
    pub path: u8,
    noise: HandshakeState,
}

impl std::fmt::Debug for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Opened")
            .field("sender_index", &self.sender_index)
            .field("path", &self.path)
            .field("hello", &self.hello)
            .finish_non_exhaustive()
    }
}

/// Opens an Initiation with our static key. Costs two Diffie-Hellman operations: ask [`crate::mac::Guard`] first.
///
/// # Errors
/// `TooShort`, `BadVersion`, `UnknownType`, `HandshakeMalformed`, `HandshakeMac`, `HandshakeFailed`.
pub fn open_initiation(identity: &Identity, datagram: &[u8]) -> Result<Opened, DropReason> {
    let header = parse_message(datagram, Kind::Initiation, INITIATION_BYTES_MIN)?;
    if header.counter != 0 {
        return Err(DropReason::HandshakeMalformed);
    }
    identity.mac_keys.verify_mac1(datagram)?;
    // The preshared key enters in the Response only, when we know whose it is.
    let mut noise = identity
        .builder(&[0; 32])
        .and_then(snow::Builder::build_responder)
        .map_err(|_| DropReason::HandshakeFailed)?;
    let (sealed_header, hello) = open_payload(&mut noise, datagram)?;
    // Nothing is remembered yet, so a message changed on its way can simply be refused.
    if sealed_header != header {
        return Err(DropReason::HandshakeMalformed);
    }
    let timestamp_ns = hello.timestamp_ns.ok_or(DropReason::HandshakeMalformed)?;
    let remote_static = noise
        .get_remote_static()
        .and_then(|key| <[u8; 32]>::try_from(key).ok())
        .filter(public_key_is_sound)
        .ok_or(DropReason::HandshakeFailed)?;
    Ok(Opened {
        remote_static,
        hello,
        timestamp_ns,
        sender_index: header.receiver_index,
        path: header.path,
        noise,
    })
}

impl Opened {
    /// Answers: the Response to send and the session. `cookie` is only needed when the dialer asked for one.
    ///
    /// # Errors
    /// `HandshakeFailed`: no common cipher, or our hello does not fit, or no random numbers.
    pub fn respond(
        mut self,
        psk: Option<&[u8; 32]>,
        hello: &Hello,
        own_index: u32,
        cookie: Option<&Cookie>,
    ) -> Result<(Vec<u8>, Established), DropReason> {
        let aead = Aead::agree(hello.aeads, self.hello.aeads).ok_or(DropReason::HandshakeFailed)?;
        self.noise
            .set_psk(usize::from(PSK_POSITION), psk.unwrap_or(&[0; 32]))
            .map_err(|_| DropReason::HandshakeFailed)?;
        let header = handshake_header(Kind::Response, self.path, self.sender_index, u64::from(own_index));
        let mac_keys = MacKeys::new(&self.remote_static);
        let message = seal_message(&mut self.noise, header, hello, &mac_keys, cookie)
            .map_err(|_| DropReason::HandshakeFailed)?;
        // The first key is the initiator's for sending.
        let (receive_key, send_key) = self.noise.dangerously_get_raw_split();
        let established = Established {
            send_key: Zeroizing::new(send_key),
            receive_key: Zeroizing::new(receive_key),
            remote_index: self.sender_index,
            aead,
            remote_hello: self.hello,
        };
        Ok((message, established))
    }
}

fn handshake_header(kind: Kind, path: u8, receiver_index: u32, counter: u64) -> Header {
    Header { kind, receiving_core: NOT_TOLD, sending_core: 0, path, receiver_index, counter }
}

/// header | noise message over (header | hello) | mac1 | mac2.
fn seal_message(
    noise: &mut HandshakeState,
    header: Header,
    hello: &Hello,
    mac_keys: &MacKeys,
    cookie: Option<&Cookie>,
) -> Result<Vec<u8>, HandshakeError> {
    let header = header.to_bytes();
    let mut payload = header.to_vec();
    payload.extend_from_slice(&hello.encode()?);
    let mut message = vec![0; HANDSHAKE_BYTES_MAX];
    message[..HEADER_BYTES].copy_from_slice(&header);
    let written = noise.write_message(&payload, &mut message[HEADER_BYTES..])?;
    payload.zeroize();
    message.truncate(HEADER_BYTES + written);
    mac_keys.append(&mut message, cookie);
    Ok(message)
}

/// Length, version, kind and the fixed header fields.
fn parse_message(datagram: &[u8], kind: Kind, bytes_min: usize) -> Result<Header, DropReason> {
    let header = Header::parse(datagram)?;
    if datagram.len() < bytes_min {
        return Err(DropReason::TooShort);
    }
    let fixed = header.kind == kind && header.receiving_core == NOT_TOLD && header.sending_core == 0;
    if fixed && datagram.len() <= HANDSHAKE_BYTES_MAX {
        Ok(header)
    } else {
        Err(DropReason::HandshakeMalformed)
    }
}

/// Decrypts the Noise message between header and MACs: the sealed copy of the header, and the hello.
fn open_payload(noise: &mut HandshakeState, datagram: &[u8]) -> Result<(Header, Hello), DropReason> {
    let sealed = datagram
        .len()
        .checked_sub(MACS_BYTES)
        .and_then(|end| datagram.get(HEADER_BYTES..end))
        .ok_or(DropReason::TooShort)?;
    let mut payload = Zeroizing::new([0u8; HANDSHAKE_BYTES_MAX]);
    let length =
        noise.read_message(sealed, payload.as_mut_slice()).map_err(|_| DropReason::HandshakeFailed)?;
    let (header, hello) = payload
        .get(..length)
        .and_then(|payload| payload.split_at_checked(HEADER_BYTES))
        .ok_or(DropReason::HandshakeMalformed)?;
    Ok((Header::parse(header)?, Hello::decode(hello)?))
}

/// Source of Initiation timestamps: now, but always higher than everything used before. A router whose clock says
/// 1970 after a restart continues from the persisted value.
#[derive(Clone, Copy, Debug)]
pub struct Timestamps {
    last_ns: u64,
}

impl Timestamps {
    /// `floor_ns`: the last timestamp an earlier run persisted, 0 if none.
    #[must_use]
    pub const fn new(floor_ns: u64) -> Self {
        Self { last_ns: floor_ns }
    }

    /// The timestamp of the next Initiation. `wall_ns`: wall clock, ns since 1970, however wrong.
    pub fn next(&mut self, wall_ns: u64) -> u64 {
        self.last_ns = wall_ns.max(self.last_ns.saturating_add(1));
        self.last_ns
    }

    /// The last one given out: persist it.
    #[must_use]
    pub const fn last_ns(&self) -> u64 {
        self.last_ns
    }
}

/// Memory of a listener per known peer against replayed and too frequent Initiations.
#[derive(Clone, Copy, Debug, Default)]
pub struct PeerGate {
    highest_ns: Option<u64>,
    next_at: Time,
    /// Token of the challenge that waits for its answer, and when it was made.
    challenge: Option<([u8; FRESHNESS_BYTES], Time)>,
    /// No challenge before this: copies of an accepted message come over other paths.
    challenge_at: Time,
}

impl PeerGate {
    /// Judges the timestamp of an opened Initiation, and remembers it if it is good.
    ///
    /// # Errors
    /// `HandshakeReplayed` if it is not higher than every earlier one, `HandshakeRate` within
    /// [`INITIATION_INTERVAL_MS`] of the last good one.
    pub fn accept(&mut self, now: Time, timestamp_ns: u64) -> Result<(), DropReason> {
        if self.highest_ns.is_some_and(|highest| timestamp_ns <= highest) {
            return Err(DropReason::HandshakeReplayed);
        }
        if now < self.next_at {
            return Err(DropReason::HandshakeRate);
        }
        self.highest_ns = Some(timestamp_ns);
        self.next_at = now.plus_ms(INITIATION_INTERVAL_MS);
        Ok(())
    }

    /// Whether an Initiation with an old timestamp is new all the same: it carries the token of our challenge in its
    /// sealed part. A token counts once. The highest timestamp stays: recordings from below it stay refused.
    pub fn accept_fresh(&mut self, now: Time, token: Option<&[u8; FRESHNESS_BYTES]>) -> bool {
        let Some((asked, since)) = &self.challenge else { return false };
        let good = token == Some(asked) && now.since(*since) < CHALLENGE_LIFE_MS * 1_000_000;
        if good {
            self.challenge = None;
            self.challenge_at = now.plus_ms(CHALLENGE_PAUSE_MS);
            self.next_at = now.plus_ms(INITIATION_INTERVAL_MS);
        }
        good
    }

    /// Token to challenge the sender of an old timestamp with: the same while it may be under way, so that a recording
    /// that is repeated all the time does not spoil the real peer's answer. `None` when it is not time for one.
    pub fn challenge(
        &mut self,
        now: Time,
        random: impl FnOnce() -> [u8; FRESHNESS_BYTES],
    ) -> Option<[u8; FRESHNESS_BYTES]> {
        if now < self.challenge_at {
            return None;
        }
        let valid = self.challenge.filter(|(_, since)| now.since(*since) < CHALLENGE_LIFE_MS * 1_000_000);
        let (token, _) = *self.challenge.insert(valid.unwrap_or_else(|| (random(), now)));
        Some(token)
    }
}

#[cfg(test)]
#[path = "handshake_tests.rs"]
mod tests;
