//! Backends of QUIC connections, by connection id: `affinity = "quic-connection-id"` (RFC 9000 §5.1).
//!
//! A client whose address changes because a NAT in front of it forgot it goes on with the connection id that the server chose, and
//! does not know that anything happened. The ids are learnt from the long headers of servers' answers, so that nobody but a
//! backend puts anything in here; what a short header begins with is looked up with the lengths that were learnt.
//!
//! All cores share a table of fixed size: an id has eight places, and takes that of the one that was used last the longest
//! ago. Kept is a keyed hash of 64 bits, in place of the id.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use packet::quic::{CONNECTION_ID_BYTES_MAX, Kind, Packet};

use super::maglev;

/// Locks, so that cores seldom wait for each other.
const SHARDS: usize = 64;
/// Sets of a shard.
const SETS: usize = 512;
/// Places of a set.
const WAYS: usize = 8;
/// An id that was not used for so long is forgotten, and so is a length that was not learnt again, s: three hours.
const AGE_S: u32 = 3 * 3_600;

/// An id; all zero where there is none.
#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    /// Keyed hash of the id.
    tag: u64,
    /// Last use, s + 1.
    seen: u32,
    backend: u16,
}

type Set = [Entry; WAYS];

/// The table of one server: 262,144 ids in 4 MB, once there is one.
#[derive(Debug)]
pub struct ConnectionIds {
    shards: OnceLock<Vec<Mutex<Vec<Set>>>>,
    /// When an id of this length was learnt last, s + 1; 0: never.
    lengths: [AtomicU32; CONNECTION_ID_BYTES_MAX + 1],
}

impl Default for ConnectionIds {
    fn default() -> Self {
        Self { shards: OnceLock::new(), lengths: [const { AtomicU32::new(0) }; CONNECTION_ID_BYTES_MAX + 1] }
    }
}

impl ConnectionIds {
    /// Learns from a datagram of a backend. Returns whether it may say more in later ones: its handshake goes on.
    pub fn learn(&self, key: u64, backend: u16, datagram: &[u8], now_ns: u64) -> bool {
        let header = match Packet::parse(datagram) {
            Some(Packet::Long(header)) => header,
            // No handshake any more. What is no QUIC at all looks the same.
            Some(Packet::Short(_)) => return false,
            None => return true,
        };
        // The ids of a version negotiation are the client's own: who begins a connection must not choose what is learnt.
        let id = header.source;
        if header.kind == Kind::VersionNegotiation || id.is_empty() || id.len() > CONNECTION_ID_BYTES_MAX {
            return true;
        }
        let now = seconds(now_ns);
        if let Some(length) = self.lengths.get(id.len()) {
            length.store(now, Relaxed);
        }
        let shards = self.shards.get_or_init(|| {
            std::iter::repeat_with(|| Mutex::new(vec![[Entry::default(); WAYS]; SETS])).take(SHARDS).collect()
        });
        let tag = tag(key, id);
        let (shard, set) = place(tag);
        let Some(mut sets) = shards.get(shard).map(lock) else { return true };
        let Some(set) = sets.get_mut(set) else { return true };
        let known = set.iter().position(|entry| entry.seen != 0 && entry.tag == tag);
        let oldest = || (0..WAYS).min_by_key(|way| set.get(*way).map(|entry| entry.seen));
        if let Some(entry) = known.or_else(oldest).and_then(|way| set.get_mut(way)) {
            *entry = Entry { tag, seen: now, backend };
        }
        true
    }

    /// The backend of the connection that a client's datagram belongs to, if it is known.
    pub fn backend_of(&self, key: u64, datagram: &[u8], now_ns: u64) -> Option<u16> {
        self.shards.get()?;
        let now = seconds(now_ns);
        match Packet::parse(datagram)? {
            Packet::Long(header) => self.find(key, header.destination, now),
            Packet::Short(rest) => self.lengths.iter().enumerate().skip(1).find_map(|(length, learnt)| {
                let is_usual = is_fresh(learnt.load(Relaxed), now);
                rest.get(..length).filter(|_| is_usual).and_then(|id| self.find(key, id, now))
            }),
        }
    }

    fn find(&self, key: u64, id: &[u8], now: u32) -> Option<u16> {
        let tag = tag(key, id);
        let (shard, set) = place(tag);
        let mut sets = lock(self.shards.get()?.get(shard)?);
        let entry =
            sets.get_mut(set)?.iter_mut().find(|entry| entry.tag == tag && is_fresh(entry.seen, now))?;
        entry.seen = now;
        Some(entry.backend)
    }
}

const fn seconds(now_ns: u64) -> u32 {
    (now_ns / 1_000_000_000) as u32 + 1
}

const fn is_fresh(seen: u32, now: u32) -> bool {
    seen != 0 && now.saturating_sub(seen) < AGE_S
}

/// Who does not know the key cannot choose ids that push others out, nor two that are taken for each other.
fn tag(key: u64, id: &[u8]) -> u64 {
    id.chunks(8).fold(maglev::mix(key ^ TAG_KEY ^ id.len() as u64), |hash, chunk| {
        let mut word = [0; 8];
        for (to, from) in word.iter_mut().zip(chunk) {
            *to = *from;
        }
        maglev::mix(hash.rotate_left(23) ^ u64::from_le_bytes(word).wrapping_mul(0x9fb2_1c65_1e98_df25))
    })
}

const TAG_KEY: u64 = 0x636c_6965_6e74_0011;

const fn place(tag: u64) -> (usize, usize) {
    ((tag >> 32) as usize % SHARDS, tag as u32 as usize % SETS)
}

/// The sets behind the lock are whole after each assignment.
fn lock(sets: &Mutex<Vec<Set>>) -> MutexGuard<'_, Vec<Set>> {
    sets.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn long(destination: &[u8], source: &[u8]) -> Vec<u8> {
        let ids = [&[destination.len() as u8], destination, &[source.len() as u8], source].concat();
        [&[0xe0, 0, 0, 0, 1], &ids[..], b"sealed"].concat()
    }

    fn short(destination: &[u8]) -> Vec<u8> {
        [&[0x40], destination, b"sealed"].concat()
    }

    #[test]
    fn ids_are_learnt_from_backends_and_found_in_both_headers() {
        let ids = ConnectionIds::default();
        let (own, other) = (b"12345678".as_slice(), b"abcdefghi".as_slice());
        assert_eq!(ids.backend_of(5, &short(own), 0), None);
        assert!(ids.learn(5, 7, &long(b"client", own), 0));
        assert_eq!(ids.backend_of(5, &short(own), 0), Some(7));
        assert_eq!(ids.backend_of(5, &long(own, b"client"), 0), Some(7));
        assert_eq!(ids.backend_of(5, &short(other), 0), None, "its length is not known");
        assert_eq!(ids.backend_of(5, &long(b"client", own), 0), None, "a sender's id is not the receiver's");
        // Backends with ids of another length beside it.
        assert!(ids.learn(5, 8, &long(b"client", other), 0));
        assert_eq!(
            (ids.backend_of(5, &short(own), 0), ids.backend_of(5, &short(other), 0)),
            (Some(7), Some(8))
        );
        assert_eq!(ids.backend_of(5, &short(b"12345679"), 0), None);
        assert_eq!(ids.backend_of(5, &[0x40], 0), None);
        assert_eq!(ids.backend_of(6, &short(own), 0), None, "keyed");
        // The end of the handshake, and what teaches nothing.
        assert!(!ids.learn(5, 9, &short(own), 0));
        assert!(ids.learn(5, 9, &long(b"client", b""), 0));
        let negotiation = [&[0x80, 0, 0, 0, 0, 0, 8][..], own, &[0, 0, 0, 1]].concat();
        assert!(ids.learn(5, 9, &negotiation, 0));
        assert_eq!(ids.backend_of(5, &short(own), 0), Some(7));
    }

    #[test]
    fn ids_are_known_for_a_while_and_their_number_is_limited() {
        let ids = ConnectionIds::default();
        let age = u64::from(AGE_S) * SECOND;
        assert!(ids.learn(5, 1, &long(b"", b"12345678"), SECOND));
        assert_eq!(ids.backend_of(5, &short(b"12345678"), age), Some(1), "and so is used again");
        assert!(ids.learn(5, 1, &long(b"", b"87654321"), age));
        assert_eq!(ids.backend_of(5, &short(b"12345678"), 2 * age - SECOND), Some(1));
        assert_eq!(ids.backend_of(5, &short(b"87654321"), 2 * age), None);
        let all = (SHARDS * SETS * WAYS) as u64;
        for number in 0..2 * all {
            ids.learn(5, 1, &long(b"", &number.to_be_bytes()), 3 * age + number / 8 * SECOND / 100);
        }
        let now = 3 * age;
        let known =
            (0..2 * all).filter(|number| ids.backend_of(5, &short(&number.to_be_bytes()), now).is_some());
        let known: Vec<u64> = known.collect();
        assert!(known.len() as u64 <= all && known.len() as u64 > all * 9 / 10, "{}", known.len());
        assert!((2 * all - 1_000..2 * all).all(|number| known.binary_search(&number).is_ok()));
    }
}
