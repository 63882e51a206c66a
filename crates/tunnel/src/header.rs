//! The 16 clear bytes in front of every datagram (rows T5–T8, T13).
//!
//! ```text
//!  0        1               2             3      4               8            16
//!  version: | receiving     | sending     | path | receiver      | counter
//!  kind     | core          | core        |      | index         |
//!  4 | 4    | 8             | 8           | 8    | 32            | 64            big endian
//! ```
//!
//! All of it is authenticated in data datagrams (it is the AEAD's associated data). It stays clear
//! because a classic BPF program and the receiving core must read it before any key is chosen.

use packet::drop_reason::DropReason;

/// Length of [`Header`] on the wire, bytes.
pub const HEADER_BYTES: usize = 16;

/// Version in the high four bits of the first byte. Everything else is dropped.
pub const WIRE_VERSION: u8 = 1;

/// "Receiving core not told" (rows T5 at first, T7, T8). Also used by handshake datagrams.
pub const NOT_TOLD: u8 = 255;

/// Counter of a Cookie reply that says that nobody has the session.
pub const NO_SESSION: u64 = 2;

/// Kind of a datagram: the low four bits of the first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// First handshake message, dialer to listener.
    Initiation = 1,
    /// Second handshake message.
    Response = 2,
    /// Answer of a side under load: prove your address, then try again.
    Cookie = 3,
    /// Frames, all sealed (row T11 "on").
    Data = 4,
    /// Frames, nothing sealed (row T11 "off").
    Clear = 5,
    /// Frames, the first part clear, the rest sealed, all authenticated (row T11 "partial").
    Partial = 6,
    /// As [`Self::Data`], receiving core and counter sealed as well ([`crate::header_seal`]); its first reader opens that.
    SealedHeader = 7,
}

impl Kind {
    /// The kind with this number (1–7).
    pub const fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Initiation,
            2 => Self::Response,
            3 => Self::Cookie,
            4 => Self::Data,
            5 => Self::Clear,
            6 => Self::Partial,
            7 => Self::SealedHeader,
            _ => return None,
        })
    }

    /// The number on the wire.
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// Whether this datagram belongs to the handshake (kinds 1–3) and not to a lane.
    pub const fn is_handshake(self) -> bool {
        (self as u8) < Self::Data as u8
    }
}

/// The header, decoded. In data datagrams (kinds 4–7) path, sending core and receiving core name the lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Header {
    /// Kind of the rest.
    pub kind: Kind,
    /// Core that shall process the datagram at the receiver, or [`NOT_TOLD`].
    pub receiving_core: u8,
    /// Core that sealed it at the sender.
    pub sending_core: u8,
    /// Path it was sealed for. A retransmit keeps this number even if it travels over another path.
    pub path: u8,
    /// The receiver's name for the session ([`crate::index`]). In an Initiation: the sender's own index.
    pub receiver_index: u32,
    /// Number of this datagram in its lane, from 0. In handshake datagrams see [`crate::handshake`].
    pub counter: u64,
}

impl Header {
    /// Answer to a datagram of a session that nobody has: a Cookie reply with nothing but a header, counter
    /// [`NO_SESSION`] and the index as it came.
    #[must_use]
    pub const fn no_session(&self) -> Self {
        let Self { path, receiver_index, .. } = *self;
        Self {
            kind: Kind::Cookie,
            receiving_core: NOT_TOLD,
            sending_core: 0,
            path,
            receiver_index,
            counter: NO_SESSION,
        }
    }

    /// Reads the header at the start of `datagram`. What stands behind it is not looked at.
    ///
    /// # Errors
    /// `TooShort` below 16 bytes, `BadVersion`, `UnknownType`.
    #[inline]
    pub fn parse(datagram: &[u8]) -> Result<Self, DropReason> {
        let Some(bytes) = datagram.first_chunk::<HEADER_BYTES>() else {
            return Err(DropReason::TooShort);
        };
        // One 16-byte load, then shifts.
        let all = u128::from_be_bytes(*bytes);
        let first = (all >> 120) as u8;
        if first >> 4 != WIRE_VERSION {
            return Err(DropReason::BadVersion);
        }
        let Some(kind) = Kind::from_number(first & 15) else {
            return Err(DropReason::UnknownType);
        };
        Ok(Self {
            kind,
            receiving_core: (all >> 112) as u8,
            sending_core: (all >> 104) as u8,
            path: (all >> 96) as u8,
            receiver_index: (all >> 64) as u32,
            counter: all as u64,
        })
    }

    /// The 16 bytes of the wire.
    #[inline]
    pub const fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let first = (WIRE_VERSION << 4) | self.kind as u8;
        ((first as u128) << 120
            | (self.receiving_core as u128) << 112
            | (self.sending_core as u128) << 104
            | (self.path as u128) << 96
            | (self.receiver_index as u128) << 64
            | self.counter as u128)
            .to_be_bytes()
    }

    /// Writes the header to the first 16 bytes of `datagram`.
    ///
    /// # Panics
    /// If `datagram` is shorter than [`HEADER_BYTES`]; the buffer is always our own.
    #[inline]
    pub fn write(&self, datagram: &mut [u8]) {
        datagram[..HEADER_BYTES].copy_from_slice(&self.to_bytes());
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_field_has_its_place() {
        let header = Header {
            kind: Kind::Data,
            receiving_core: 0x11,
            sending_core: 0x22,
            path: 0x33,
            receiver_index: 0x4455_6677,
            counter: 0x8899_aabb_ccdd_eeff,
        };
        let wire =
            [0x14, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff];
        assert_eq!(header.to_bytes(), wire);
        assert_eq!(Header::parse(&wire), Ok(header));
    }

    #[test]
    fn foreign_versions_and_kinds_are_refused() {
        let mut wire = [0u8; HEADER_BYTES];
        for first in 0..=255u8 {
            wire[0] = first;
            let expected = match (first >> 4, first & 15) {
                (1, 1..=7) => None,
                (1, _) => Some(DropReason::UnknownType),
                _ => Some(DropReason::BadVersion),
            };
            assert_eq!(Header::parse(&wire).err(), expected, "first byte {first:#x}");
        }
    }

    #[test]
    fn short_datagrams_are_refused() {
        let wire = Header {
            kind: Kind::Clear,
            receiving_core: NOT_TOLD,
            sending_core: 0,
            path: 0,
            receiver_index: 0,
            counter: 0,
        }
        .to_bytes();
        for length in 0..HEADER_BYTES {
            assert_eq!(Header::parse(&wire[..length]), Err(DropReason::TooShort));
        }
        assert!(Header::parse(&wire).is_ok());
    }

    proptest! {
        #[test]
        fn round_trip(number in 1u8..=7, cores: [u8; 3], index: u32, counter: u64, tail in 0usize..40) {
            let header = Header {
                kind: Kind::from_number(number).unwrap(),
                receiving_core: cores[0],
                sending_core: cores[1],
                path: cores[2],
                receiver_index: index,
                counter,
            };
            let mut datagram = vec![0xa5; HEADER_BYTES + tail];
            header.write(&mut datagram);
            prop_assert_eq!(Header::parse(&datagram), Ok(header));
            prop_assert!(datagram[HEADER_BYTES..].iter().all(|byte| *byte == 0xa5));
        }

        #[test]
        fn garbage_never_panics(garbage in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(header) = Header::parse(&garbage) {
                prop_assert_eq!(&header.to_bytes()[..], &garbage[..HEADER_BYTES]);
            }
        }
    }
}
