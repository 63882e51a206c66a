//! Initials of QUIC's clients, opened (RFC 9001 §5, RFC 9369 §3.3): their keys follow from a connection id in the clear, so
//! that everybody on the way can read the ClientHello.
//!
//! Cost: some microseconds for the keys of a connection and for each Initial, so callers look at the first few packets of flows only.

use ring::aead::quic::{AES_128, HeaderProtectionKey};
use ring::aead::{AES_128_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, KeyType, Prk, Salt};

use super::{CONNECTION_ID_BYTES_MAX, Kind, Packet, VERSION_1, VERSION_2};

#[cfg(test)]
pub(crate) mod tests;

/// Longest Initial that is opened, bytes.
pub const INITIAL_BYTES_MAX: usize = 4_096;
/// Every Initial of a client is in a datagram of this many bytes at least (RFC 9000 §14.1).
const DATAGRAM_BYTES_MIN: usize = 1_200;
/// A client's first id has this many bytes at least (RFC 9000 §7.2).
const FIRST_ID_BYTES_MIN: usize = 8;
/// Bytes behind the packet number that protect the header, and where they begin, from the packet number on.
const SAMPLE_BYTES: usize = 16;
const SAMPLE_OFFSET: usize = 4;
/// Bits of the first byte that are protected: reserved ones and the length of the packet number.
const PROTECTED_BITS: u8 = 0x0f;
/// Key bytes of AES-128.
const KEY_BYTES: usize = 16;
const SECRET_BYTES: usize = 32;

/// Salts of the versions (RFC 9001 §5.2, RFC 9369 §3.3.1).
const SALT_1: [u8; 20] = [
    0x38, 0x76, 0x2c, 0xf7, 0xf5, 0x59, 0x34, 0xb3, 0x4d, 0x17, 0x9a, 0xe6, 0xa4, 0xc8, 0x0c, 0xad, 0xcc,
    0xbb, 0x7f, 0x0a,
];
const SALT_2: [u8; 20] = [
    0x0d, 0xed, 0xe3, 0xde, 0xf7, 0x00, 0xa6, 0xdb, 0x81, 0x93, 0x81, 0xbe, 0x6e, 0x26, 0x9d, 0xcb, 0xf9,
    0xbd, 0x2e, 0xd9,
];

/// Whether a datagram may begin with a client's Initial: a cheap look.
#[inline]
#[must_use]
pub fn may_be(datagram: &[u8]) -> bool {
    datagram.len() >= DATAGRAM_BYTES_MIN
        && matches!(
            Packet::parse(datagram),
            Some(Packet::Long(header)) if header.kind == Kind::Initial && !header.destination.is_empty()
        )
}

/// An Initial as it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initial<'a> {
    version: u32,
    destination: &'a [u8],
    /// All of its bytes.
    packet: &'a [u8],
    /// Where the packet number begins in it.
    number_at: usize,
}

impl<'a> Initial<'a> {
    /// The packet at the beginning of `datagram`, and the bytes behind it. `None`: it is none, is cut, or longer than
    /// [`INITIAL_BYTES_MAX`].
    #[must_use]
    pub fn first(datagram: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let Packet::Long(header) = Packet::parse(datagram)? else { return None };
        if header.kind != Kind::Initial {
            return None;
        }
        let (token_bytes, rest) = number(header.rest)?;
        let (length, rest) = number(rest.get(usize::try_from(token_bytes).ok()?..)?)?;
        let number_at = datagram.len() - rest.len();
        let end = number_at.checked_add(usize::try_from(length).ok()?)?;
        let (packet, behind) = datagram.split_at_checked(end).filter(|_| end <= INITIAL_BYTES_MAX)?;
        let version = header.version;
        Some((Self { version, destination: header.destination, packet, number_at }, behind))
    }
}

/// Keys of what a client sends in Initials of one connection.
pub struct InitialKeys {
    sealing: LessSafeKey,
    iv: [u8; NONCE_LEN],
    header: HeaderProtectionKey,
}

impl std::fmt::Debug for InitialKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InitialKeys").finish_non_exhaustive()
    }
}

/// Length of what is expanded.
struct Bytes(usize);

impl KeyType for Bytes {
    fn len(&self) -> usize {
        self.0
    }
}

/// HKDF-Expand-Label without a context (RFC 8446 §7.1).
fn expand<const N: usize>(secret: &Prk, label: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    let length = u16::try_from(N).ok()?.to_be_bytes();
    let label_bytes = [u8::try_from(label.len()).ok()?];
    let info = [&length[..], &label_bytes, label.as_bytes(), &[0]];
    secret.expand(&info, Bytes(N)).and_then(|expanded| expanded.fill(&mut bytes)).ok()?;
    Some(bytes)
}

impl InitialKeys {
    /// Those that follow from the id to which a client sends this one. `None`: that is too short for the first one.
    #[must_use]
    pub fn of_client(packet: &Initial<'_>) -> Option<Self> {
        if !(FIRST_ID_BYTES_MIN..=CONNECTION_ID_BYTES_MAX).contains(&packet.destination.len()) {
            return None;
        }
        let (salt, key, iv, header) = match packet.version {
            VERSION_1 => (&SALT_1, "tls13 quic key", "tls13 quic iv", "tls13 quic hp"),
            VERSION_2 => (&SALT_2, "tls13 quicv2 key", "tls13 quicv2 iv", "tls13 quicv2 hp"),
            _ => return None,
        };
        let initial = Salt::new(HKDF_SHA256, salt).extract(packet.destination);
        let client = expand::<SECRET_BYTES>(&initial, "tls13 client in")?;
        let client = Prk::new_less_safe(HKDF_SHA256, &client);
        let key = expand::<KEY_BYTES>(&client, key)?;
        let header = expand::<KEY_BYTES>(&client, header)?;
        Some(Self {
            sealing: LessSafeKey::new(UnboundKey::new(&AES_128_GCM, &key).ok()?),
            iv: expand(&client, iv)?,
            header: HeaderProtectionKey::new(&AES_128, &header).ok()?,
        })
    }

    /// The frames in an Initial. `None`: it was not sealed with these keys.
    #[must_use]
    pub fn open(&self, packet: &Initial<'_>) -> Option<Vec<u8>> {
        let sample = packet.packet.get(packet.number_at + SAMPLE_OFFSET..)?.get(..SAMPLE_BYTES)?;
        let [of_first, of_number @ ..] = self.header.new_mask(sample).ok()?;
        let mut bytes = packet.packet.to_vec();
        let first = bytes.first_mut()?;
        *first ^= of_first & PROTECTED_BITS;
        let number_bytes = usize::from(*first & 3) + 1;
        let (header, body) = bytes.split_at_mut_checked(packet.number_at + number_bytes)?;
        let mut number = 0;
        for (byte, mask) in header.get_mut(packet.number_at..)?.iter_mut().zip(of_number) {
            *byte ^= mask;
            // The first few of a connection: no more of the number than this.
            number = number << 8 | u64::from(*byte);
        }
        let opened = self.sealing.open_in_place(self.nonce(number), Aad::from(&*header), body).ok()?;
        let length = opened.len();
        let start = packet.number_at + number_bytes;
        bytes.truncate(start + length);
        bytes.drain(..start);
        Some(bytes)
    }

    fn nonce(&self, number: u64) -> Nonce {
        let mut nonce = self.iv;
        for (byte, of_number) in nonce.iter_mut().rev().zip(number.to_be_bytes().iter().rev()) {
            *byte ^= of_number;
        }
        Nonce::assume_unique_for_key(nonce)
    }

    /// Seals frames, as a client does, behind a header that ends with a packet number of four bytes.
    #[cfg(test)]
    pub(crate) fn seal(&self, clear: &[u8], frames: &[u8]) -> Option<Vec<u8>> {
        let number_at = clear.len().checked_sub(4)?;
        let number = crate::u32_at(clear, number_at)?;
        let mut sealed = frames.to_vec();
        self.sealing
            .seal_in_place_append_tag(self.nonce(u64::from(number)), Aad::from(clear), &mut sealed)
            .ok()?;
        let mut packet = [clear, &sealed].concat();
        let sample = packet.get(number_at + SAMPLE_OFFSET..)?.get(..SAMPLE_BYTES)?;
        let [of_first, of_number @ ..] = self.header.new_mask(sample).ok()?;
        *packet.first_mut()? ^= of_first & PROTECTED_BITS;
        for (byte, mask) in packet.get_mut(number_at..)?.iter_mut().zip(of_number) {
            *byte ^= mask;
        }
        Some(packet)
    }
}

/// Offset and bytes of the CRYPTO frames among an Initial's frames (RFC 9000 §17.2.2), up to one that is malformed or does not belong
/// there.
pub fn crypto_frames(mut frames: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    std::iter::from_fn(move || {
        loop {
            let (kind, rest) = frames.split_first()?;
            frames = match kind {
                // PADDING, PING.
                0 | 1 => rest,
                // ACK, without and with counts of ECN (RFC 9000 §19.3).
                2 | 3 => behind_ack(rest, *kind == 3)?,
                // CRYPTO.
                6 => {
                    let (at, rest) = number(rest)?;
                    let (length, rest) = number(rest)?;
                    let (bytes, rest) = rest.split_at_checked(usize::try_from(length).ok()?)?;
                    frames = rest;
                    return Some((usize::try_from(at).ok()?, bytes));
                }
                _ => return None,
            };
        }
    })
}

/// Bytes behind an ACK frame.
fn behind_ack(bytes: &[u8], counts: bool) -> Option<&[u8]> {
    let skip = |bytes, numbers: u64| {
        // Each takes a byte at least, so that a large count ends soon.
        (0..numbers).try_fold(bytes, |bytes, _| number(bytes).map(|(_, rest)| rest))
    };
    let (ranges, rest) = number(skip(bytes, 2)?)?;
    skip(rest, ranges.checked_mul(2)?.checked_add(1 + 3 * u64::from(counts))?)
}

/// A variable-length integer (RFC 9000 §16), and what stands behind it.
fn number(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let first = bytes.first()?;
    let (number, rest) = bytes.split_at_checked(1 << (first >> 6))?;
    let (first, others) = number.split_first()?;
    let number = others.iter().fold(u64::from(first & 0x3f), |number, byte| number << 8 | u64::from(*byte));
    Some((number, rest))
}
