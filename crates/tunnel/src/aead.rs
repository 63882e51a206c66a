//! Sealing and opening data datagrams in place (row T11).
//!
//! One [`LaneKey`] per direction and *sending core*: two cores can never meet under one key, whatever
//! else goes wrong. Within a key the nonce separates paths, receiving cores and counters:
//!
//! ```text
//! key:32 | IV:12 = HKDF-SHA256(salt "", directional key, info "anabranch lane" | sending core:8)
//! nonce:12       = IV xor (path:16 | receiving core:16 | counter:64)               big endian
//! ```
//!
//! So the counter of a lane (path, sending core, receiving core) must never repeat within an epoch,
//! over the kinds Data *and* Partial together: they share key and nonce space.
//! Nothing here allocates; ring picks the fastest code for the CPU when the key is made.

use packet::drop_reason::DropReason;
use ring::{aead, hkdf};
use zeroize::Zeroize;

use crate::header::{HEADER_BYTES, Header};

/// Length of the authentication tag at the end of a sealed datagram, bytes.
pub const TAG_BYTES: usize = 16;

/// Length of the field in front of the clear bytes of a partial datagram.
pub const CLEAR_LENGTH_BYTES: usize = 2;

/// Bytes that full sealing adds to a plaintext.
pub const SEALED_OVERHEAD_BYTES: usize = HEADER_BYTES + TAG_BYTES;

/// Nonce and IV length of both ciphers, bytes.
const NONCE_BYTES: usize = 12;

/// A cipher for data datagrams. The discriminant is its bit in the handshake's bitmask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Aead {
    /// AES-256-GCM (RFC 5116): preferred where both ends have AES instructions.
    Aes256Gcm = 1,
    /// ChaCha20-Poly1305 (RFC 8439): everybody has it.
    ChaCha20Poly1305 = 2,
}

impl Aead {
    /// The faster cipher of this CPU: AES where it has AES and carry-less multiply instructions.
    pub fn best() -> Self {
        if cpu_has_aes() { Self::Aes256Gcm } else { Self::ChaCha20Poly1305 }
    }

    /// This cipher's bit in a bitmask of ciphers.
    pub const fn bit(self) -> u8 {
        self as u8
    }

    /// Bitmask of the ciphers this machine offers: ChaCha20-Poly1305 always, AES-256-GCM if it is fast here.
    pub fn offered() -> u8 {
        Self::best().bit() | Self::ChaCha20Poly1305.bit()
    }

    /// The cipher two sides with these bitmasks use; the same answer at both. `None`: nothing in common.
    pub const fn agree(ours: u8, theirs: u8) -> Option<Self> {
        let common = ours & theirs;
        if common & Self::Aes256Gcm.bit() != 0 {
            Some(Self::Aes256Gcm)
        } else if common & Self::ChaCha20Poly1305.bit() != 0 {
            Some(Self::ChaCha20Poly1305)
        } else {
            None
        }
    }

    /// Name for status and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Aes256Gcm => "aes-256-gcm",
            Self::ChaCha20Poly1305 => "chacha20-poly1305",
        }
    }

    fn algorithm(self) -> &'static aead::Algorithm {
        match self {
            Self::Aes256Gcm => &aead::AES_256_GCM,
            Self::ChaCha20Poly1305 => &aead::CHACHA20_POLY1305,
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn cpu_has_aes() -> bool {
    std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq")
}

#[cfg(target_arch = "aarch64")]
fn cpu_has_aes() -> bool {
    std::arch::is_aarch64_feature_detected!("aes") && std::arch::is_aarch64_feature_detected!("pmull")
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn cpu_has_aes() -> bool {
    false
}

/// Key and IV of one sending core in one direction of one epoch. `Sync`: all cores of a receiver may share it.
pub struct LaneKey {
    key: aead::LessSafeKey,
    iv: u128,
}

impl std::fmt::Debug for LaneKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LaneKey(secret)")
    }
}

impl Drop for LaneKey {
    fn drop(&mut self) {
        // ring offers no way to wipe its expanded key; the IV at least is ours.
        self.iv.zeroize();
    }
}

/// Output length for ring's HKDF: key and IV in one expansion.
struct KeyAndIv;

impl hkdf::KeyType for KeyAndIv {
    fn len(&self) -> usize {
        32 + NONCE_BYTES
    }
}

impl LaneKey {
    /// The key of `sending_core` under the directional key of the handshake.
    #[must_use]
    pub fn derive(direction_key: &[u8; 32], sending_core: u8, aead: Aead) -> Self {
        let info: [&[u8]; 2] = [b"anabranch lane", &[sending_core]];
        let mut material = [0u8; 32 + NONCE_BYTES];
        hkdf::Salt::new(hkdf::HKDF_SHA256, &[])
            .extract(direction_key)
            .expand(&info, KeyAndIv)
            .and_then(|output| output.fill(&mut material))
            .expect("44 bytes are far below HKDF's limit of 8160");
        let lane = Self::from_parts(&material, aead);
        material.zeroize();
        lane
    }

    /// `material` = key:32 | IV:12.
    fn from_parts(material: &[u8; 32 + NONCE_BYTES], aead: Aead) -> Self {
        let unbound = aead::UnboundKey::new(aead.algorithm(), &material[..32])
            .expect("both ciphers take keys of 32 bytes");
        let mut iv = [0u8; 16];
        iv[4..].copy_from_slice(&material[32..]);
        Self { key: aead::LessSafeKey::new(unbound), iv: u128::from_be_bytes(iv) }
    }

    /// IV xor (path:16 | receiving core:16 | counter:64).
    #[inline]
    fn nonce_bytes(&self, header: &Header) -> [u8; NONCE_BYTES] {
        let lane = u128::from(header.path) << 80
            | u128::from(header.receiving_core) << 64
            | u128::from(header.counter);
        let [_, _, _, _, nonce @ ..] = (self.iv ^ lane).to_be_bytes();
        nonce
    }

    #[inline]
    fn nonce(&self, header: &Header) -> aead::Nonce {
        aead::Nonce::assume_unique_for_key(self.nonce_bytes(header))
    }

    /// Seals `datagram` = header:16 | plaintext | room for the tag:16, in place. The whole slice is the datagram.
    ///
    /// Writes the header itself (again), so that nonce and header cannot disagree. The caller gives each
    /// counter of a lane out once. A datagram that failed to be sent must be sent again as the same bytes.
    ///
    /// A slice below [`SEALED_OVERHEAD_BYTES`] is a bug of the caller: it is zeroed, which no receiver accepts,
    /// rather than left in the clear.
    #[inline]
    pub fn seal(&self, header: &Header, datagram: &mut [u8]) {
        self.seal_behind(header, HEADER_BYTES, datagram);
    }

    /// Seals a partial datagram = header:16 | length of clear part:16 bits | clear part | rest | room for the tag:16.
    ///
    /// The first `clear_bytes` of the plaintext stay readable; everything is authenticated. The two length bytes
    /// are written here.
    #[inline]
    pub fn seal_partial(&self, header: &Header, clear_bytes: u16, datagram: &mut [u8]) {
        let front = HEADER_BYTES + CLEAR_LENGTH_BYTES;
        if let Some(field) = datagram.get_mut(HEADER_BYTES..front) {
            field.copy_from_slice(&clear_bytes.to_be_bytes());
        }
        self.seal_behind(header, front + usize::from(clear_bytes), datagram);
    }

    #[inline]
    fn seal_behind(&self, header: &Header, front_bytes: usize, datagram: &mut [u8]) {
        let Some(tag_at) = datagram.len().checked_sub(TAG_BYTES).filter(|at| *at >= front_bytes) else {
            datagram.fill(0);
            return;
        };
        header.write(datagram);
        let (rest, tag_room) = datagram.split_at_mut(tag_at);
        let (front, plaintext) = rest.split_at_mut(front_bytes);
        let sealed =
            self.key.seal_in_place_separate_tag(self.nonce(header), aead::Aad::from(&*front), plaintext);
        match sealed {
            Ok(tag) => tag_room.copy_from_slice(tag.as_ref()),
            // Only for gigabytes at once.
            Err(_) => datagram.fill(0),
        }
    }

    /// Opens a sealed datagram in place and returns its plaintext. `header` is what [`Header::parse`] read from it.
    ///
    /// # Errors
    /// `TooShort`, or `AuthFailed`: then the bytes behind the header are not to be used.
    #[inline]
    pub fn open<'a>(&self, header: &Header, datagram: &'a mut [u8]) -> Result<&'a mut [u8], DropReason> {
        self.open_behind(header, HEADER_BYTES, datagram)
    }

    /// Opens a partial datagram in place: the plaintext is the clear part and behind it the opened part.
    ///
    /// # Errors
    /// `TooShort` (also when the clear part does not fit), `AuthFailed`.
    #[inline]
    pub fn open_partial<'a>(
        &self,
        header: &Header,
        datagram: &'a mut [u8],
    ) -> Result<&'a mut [u8], DropReason> {
        let front = HEADER_BYTES + CLEAR_LENGTH_BYTES;
        let Some(&[high, low]) = datagram.get(HEADER_BYTES..front) else {
            return Err(DropReason::TooShort);
        };
        let clear_bytes = usize::from(u16::from_be_bytes([high, low]));
        let end = datagram.len().checked_sub(TAG_BYTES).ok_or(DropReason::TooShort)?;
        self.open_behind(header, front + clear_bytes, datagram)?;
        // Both parts lie side by side; an authentic datagram has at least the front, so the range holds.
        datagram.get_mut(front..end).ok_or(DropReason::TooShort)
    }

    #[inline]
    fn open_behind<'a>(
        &self,
        header: &Header,
        front_bytes: usize,
        datagram: &'a mut [u8],
    ) -> Result<&'a mut [u8], DropReason> {
        if datagram.len() < front_bytes + TAG_BYTES {
            return Err(DropReason::TooShort);
        }
        let (front, sealed) = datagram.split_at_mut(front_bytes);
        self.key
            .open_in_place(self.nonce(header), aead::Aad::from(&*front), sealed)
            .map_err(|_| DropReason::AuthFailed)
    }
}

#[cfg(test)]
#[path = "aead_tests.rs"]
mod tests;
