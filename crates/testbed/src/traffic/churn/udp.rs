//! Datagrams of an association, computed by the end that sends them and by the end that checks them.
//!
//! ```text
//! id:64 | seed:64 | number:64 | checksum of those:64 | data …      (big endian)
//! ```

use fastrand::Rng;

use super::wire::{Way, mix};
use crate::traffic::pattern::{body, checksum};

/// Length of the head.
const HEAD_BYTES: usize = 32;
/// Length of the data: a datagram has at most 1,200 bytes and fits in any tunnel.
const DATA_BYTES: (usize, usize) = (32, 1_168);
/// Longest datagram.
pub(super) const DATAGRAM_BYTES_MAX: usize = HEAD_BYTES + DATA_BYTES.1;

/// Identity of a datagram, from which all its bytes follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Datagram {
    pub(super) id: u64,
    pub(super) seed: u64,
    pub(super) number: u64,
}

impl Datagram {
    /// Writes its bytes into `room`, which is emptied first.
    pub(super) fn encode(&self, way: Way, room: &mut Vec<u8>) {
        room.clear();
        for part in [self.id, self.seed, self.number] {
            room.extend_from_slice(&part.to_be_bytes());
        }
        let sum = checksum(self.seed, room);
        room.extend_from_slice(&sum.to_be_bytes());
        let seed = mix(self.seed, self.number << 1 | u64::from(way == Way::ToClient));
        let bytes = Rng::with_seed(seed).usize(DATA_BYTES.0..=DATA_BYTES.1);
        room.extend_from_slice(body(seed, bytes));
    }

    /// The datagram that has these bytes; `None` if one of them is wrong. `room` is used to compare.
    pub(super) fn decode(bytes: &[u8], way: Way, room: &mut Vec<u8>) -> Option<Datagram> {
        let part = |index: usize| {
            let part = bytes.get(index * 8..index * 8 + 8)?;
            part.try_into().ok().map(u64::from_be_bytes)
        };
        let datagram = Datagram { id: part(0)?, seed: part(1)?, number: part(2)? };
        datagram.encode(way, room);
        (room[..] == *bytes).then_some(datagram)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_datagram_with_another_byte_or_length_is_refused() {
        let (mut bytes, mut room) = (Vec::new(), Vec::new());
        for number in [0, 1, 77] {
            let datagram = Datagram { id: 5, seed: 6, number };
            datagram.encode(Way::ToServer, &mut bytes);
            assert!(bytes.len() <= DATAGRAM_BYTES_MAX);
            assert_eq!(Datagram::decode(&bytes, Way::ToServer, &mut room), Some(datagram));
            assert_eq!(Datagram::decode(&bytes, Way::ToClient, &mut room), None);
            assert_eq!(Datagram::decode(&bytes[1..], Way::ToServer, &mut room), None);
            assert_eq!(Datagram::decode(&bytes[..bytes.len() - 1], Way::ToServer, &mut room), None);
            for at in 0..bytes.len() {
                bytes[at] ^= 1;
                assert_eq!(Datagram::decode(&bytes, Way::ToServer, &mut room), None, "byte {at}");
                bytes[at] ^= 1;
            }
        }
    }
}
