//! The receiving core sealed in the header (row T7, mode sealed-header): one block cipher call in place of an open byte.
//!
//! A datagram is sealed as in mode core-id, with the receiving core in its header; then this changes the header so that nobody
//! without the key learns the core, nor which datagrams share a lane, which their counters would show:
//!
//! ```text
//! key:32   = HKDF-SHA256(salt "", directional key, info "anabranch header" | sending core:8)
//! mask     = AES-256-ECB(key; tag)                          with AES-256-GCM (RFC 9001 §5.4.3)
//!          = ChaCha20(key; counter:32, nonce:96 from tag)   with ChaCha20-Poly1305 (RFC 9001 §5.4.4)
//! byte 0       kind 7 in place of 4
//! byte 1       receiving core xor mask byte 0
//! bytes 12–15  low half of the counter xor mask bytes 1–4
//! ```
//!
//! The tag is the sample: it differs for every datagram. Whoever reads a datagram first takes the mask off, and has an ordinary
//! sealed datagram, which goes to the core that it names and is opened there. A mask proves nothing: the tag does, for the header
//! without it.

use ring::aead::quic::{AES_256, CHACHA20, HeaderProtectionKey};
use ring::hkdf;
use zeroize::Zeroize;

use crate::aead::{Aead, TAG_BYTES};
use crate::header::{HEADER_BYTES, Kind, WIRE_VERSION};

/// Where the receiving core stands.
const CORE_AT: usize = 1;
/// Where the low half of the counter stands.
const COUNTER_AT: usize = 12;
/// First byte of a datagram that is sealed as usual, and of one whose core is sealed.
const FIRST: [u8; 2] = [WIRE_VERSION << 4 | Kind::Data as u8, WIRE_VERSION << 4 | Kind::SealedHeader as u8];

/// Key for the headers of one sending core in one direction of one epoch.
pub struct HeaderKey(HeaderProtectionKey);

impl std::fmt::Debug for HeaderKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HeaderKey(secret)")
    }
}

/// Output length for ring's HKDF.
struct Bytes32;

impl hkdf::KeyType for Bytes32 {
    fn len(&self) -> usize {
        32
    }
}

impl HeaderKey {
    /// The key of `sending_core` under the directional key of the handshake.
    #[must_use]
    pub fn derive(direction_key: &[u8; 32], sending_core: u8, aead: Aead) -> Self {
        let info: [&[u8]; 2] = [b"anabranch header", &[sending_core]];
        let mut key = [0u8; 32];
        hkdf::Salt::new(hkdf::HKDF_SHA256, &[])
            .extract(direction_key)
            .expand(&info, Bytes32)
            .and_then(|output| output.fill(&mut key))
            .expect("32 bytes are far below HKDF's limit of 8160");
        let algorithm = match aead {
            Aead::Aes256Gcm => &AES_256,
            Aead::ChaCha20Poly1305 => &CHACHA20,
        };
        let header_key =
            HeaderProtectionKey::new(algorithm, &key).expect("both ciphers take keys of 32 bytes");
        key.zeroize();
        Self(header_key)
    }

    /// Seals core and counter in the header of a sealed datagram of kind [`Kind::Data`]; others stay as they are.
    #[inline]
    pub fn seal(&self, datagram: &mut [u8]) {
        self.turn(datagram, FIRST[0], FIRST[1]);
    }

    /// Opens what [`Self::seal`] sealed: the datagram is of kind [`Kind::Data`] then. False for another kind, or without room for
    /// a tag: nothing is changed.
    #[inline]
    pub fn open(&self, datagram: &mut [u8]) -> bool {
        self.turn(datagram, FIRST[1], FIRST[0])
    }

    fn turn(&self, datagram: &mut [u8], from: u8, to: u8) -> bool {
        let Some((front, tag)) = datagram.split_last_chunk_mut::<TAG_BYTES>() else { return false };
        let Some(header) = front.first_chunk_mut::<HEADER_BYTES>().filter(|header| header[0] == from) else {
            return false;
        };
        let Ok([core, counter @ ..]) = self.0.new_mask(tag) else { return false };
        header[0] = to;
        header[CORE_AT] ^= core;
        for (byte, mask) in header[COUNTER_AT..].iter_mut().zip(counter) {
            *byte ^= mask;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aead::LaneKey;
    use crate::header::Header;

    const CIPHERS: [Aead; 2] = [Aead::Aes256Gcm, Aead::ChaCha20Poly1305];

    fn header(core: u8, counter: u64) -> Header {
        Header {
            kind: Kind::Data,
            receiving_core: core,
            sending_core: 2,
            path: 3,
            receiver_index: 0x4455_6677,
            counter,
        }
    }

    fn sealed(aead: Aead, header: &Header) -> Vec<u8> {
        let mut datagram = vec![0x5a; HEADER_BYTES + 40 + TAG_BYTES];
        LaneKey::derive(&[7; 32], 2, aead).seal(header, &mut datagram);
        datagram
    }

    #[test]
    fn what_is_sealed_comes_back_and_tells_nothing() {
        for aead in CIPHERS {
            let key = HeaderKey::derive(&[7; 32], 2, aead);
            let (mut cores, mut counters) = ([0u32; 256], std::collections::BTreeSet::new());
            for counter in 0..2_000 {
                let plain = sealed(aead, &header(1, counter));
                let mut wire = plain.clone();
                key.seal(&mut wire);
                let read = Header::parse(&wire).expect("a header");
                assert_eq!((read.kind, read.sending_core, read.path), (Kind::SealedHeader, 2, 3));
                assert_eq!((read.receiver_index, read.counter >> 32), (0x4455_6677, 0));
                cores[usize::from(read.receiving_core)] += 1;
                counters.insert(read.counter >> 16);
                assert_eq!(wire[HEADER_BYTES..], plain[HEADER_BYTES..]);
                assert!(key.open(&mut wire));
                assert_eq!(wire, plain);
            }
            assert!(cores.iter().all(|seen| *seen < 40), "{aead:?}: one core looks like all: {cores:?}");
            assert!(counters.len() > 1_900, "{aead:?}: no sequence to see");
        }
    }

    #[test]
    fn others_are_left_alone() {
        let key = HeaderKey::derive(&[7; 32], 2, Aead::Aes256Gcm);
        let plain = sealed(Aead::Aes256Gcm, &header(1, 9));
        let mut datagram = plain.clone();
        assert!(!key.open(&mut datagram), "not sealed");
        datagram[0] = WIRE_VERSION << 4 | Kind::Partial as u8;
        key.seal(&mut datagram);
        assert_eq!(datagram[1..], plain[1..]);
        for length in 0..HEADER_BYTES + TAG_BYTES {
            let mut short = vec![FIRST[1]; length];
            assert!(!key.open(&mut short));
            assert!(short.iter().all(|byte| *byte == FIRST[1]));
        }
    }

    /// The example of docs/wire.md.
    #[test]
    fn example_of_the_wire() {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let mut datagram = header(3, 54_321).to_bytes().to_vec();
        datagram.extend(0..16);
        for (aead, wire) in
            CIPHERS.into_iter().zip(["17d9020344556677000000004ebc9836", "17da02034455667700000000e0af17bb"])
        {
            let mut datagram = datagram.clone();
            HeaderKey::derive(&[7; 32], 2, aead).seal(&mut datagram);
            assert_eq!(hex(&datagram[..HEADER_BYTES]), wire, "{aead:?}");
        }
    }
}
