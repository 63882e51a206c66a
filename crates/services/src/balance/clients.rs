//! Backends that clients have, by address: `affinity = "source-address"`.
//!
//! All cores ask it once per new flow. It has a fixed number of places: a client has eight where it may be, and takes that of
//! the one that was seen last the longest ago. Who is forgotten, because others came or after [`AGE_NS`], is placed anew; the
//! hashing methods go by the address alone then, and mostly come to the same backend.
//!
//! Anybody can write an address that is not his. Whose flow was not answered takes the place of nobody whose was, so that
//! strangers push out each other only; and he is remembered, so that connections that begin together stay together.

use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use super::maglev;

/// Locks, so that cores seldom wait for each other.
const SHARDS: usize = 64;
/// Sets of a shard.
const SETS: usize = 128;
/// Places of a set.
const WAYS: usize = 8;
/// A client without a new flow for so long is forgotten, ns: three hours.
const AGE_NS: u64 = 3 * 3_600 * 1_000_000_000;

/// A client.
#[derive(Clone, Copy, Debug)]
struct Client {
    address: IpAddr,
    backend: u16,
    /// A flow of it was answered.
    answered: bool,
    seen_ns: u64,
}

impl Client {
    fn is_fresh(&self, now_ns: u64) -> bool {
        now_ns.saturating_sub(self.seen_ns) < AGE_NS
    }
}

type Set = [Option<Client>; WAYS];

/// The table of one server: about 2 MB once it is used.
#[derive(Debug, Default)]
pub struct Clients {
    shards: OnceLock<Vec<Mutex<Vec<Set>>>>,
}

impl Clients {
    /// The backend of a client.
    pub fn backend_of(&self, key: u64, address: IpAddr, now_ns: u64) -> Option<u16> {
        let shards = self.shards.get()?;
        let (shard, set) = place(key, address);
        let sets = lock(shards.get(shard)?);
        let client = sets.get(set)?.iter().flatten().find(|client| client.address == address)?;
        client.is_fresh(now_ns).then_some(client.backend)
    }

    /// Remembers the backend of a client whose flow was made, or `answered`.
    pub fn remember(&self, key: u64, address: IpAddr, backend: u16, answered: bool, now_ns: u64) {
        let shards = self.shards.get_or_init(|| {
            std::iter::repeat_with(|| Mutex::new(vec![[None; WAYS]; SETS])).take(SHARDS).collect()
        });
        let (shard, set) = place(key, address);
        let Some(mut sets) = shards.get(shard).map(lock) else { return };
        let Some(set) = sets.get_mut(set) else { return };
        let known = set.iter().flatten().find(|client| client.address == address);
        let answered = answered || known.is_some_and(|client| client.answered);
        // Whose place it is: its own, a free one, that of who may be nobody, of another one.
        let rank = |place: &Option<Client>| match place {
            Some(client) if client.address == address => (0, 0),
            None => (1, 0),
            Some(client) if !(client.answered && client.is_fresh(now_ns)) => (2, client.seen_ns),
            Some(client) => (3, client.seen_ns),
        };
        let place = set.iter_mut().min_by_key(|place| rank(place));
        if let Some(place) = place.filter(|place| answered || rank(place).0 < 3) {
            *place = Some(Client { address, backend, answered, seen_ns: now_ns });
        }
    }
}

/// Shard and set of a client. Who does not know the key cannot choose addresses that push a client out.
fn place(key: u64, address: IpAddr) -> (usize, usize) {
    let hash = maglev::hash_endpoint(key ^ PLACE_KEY, address, 0);
    ((hash >> 32) as usize % SHARDS, hash as u32 as usize % SETS)
}

const PLACE_KEY: u64 = 0x636c_6965_6e74_0007;

/// The sets behind the lock are whole after each assignment.
fn lock(sets: &Mutex<Vec<Set>>) -> MutexGuard<'_, Vec<Set>> {
    sets.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_are_known_for_a_while_and_their_number_is_limited() {
        let clients = Clients::default();
        let address = |number: u32| IpAddr::V4(number.into());
        assert_eq!(clients.backend_of(5, address(1), 0), None);
        clients.remember(5, address(1), 7, true, 10);
        clients.remember(5, address(2), 8, false, 10);
        assert_eq!(clients.backend_of(5, address(1), 10), Some(7));
        clients.remember(5, address(1), 9, false, 20);
        assert_eq!(clients.backend_of(5, address(1), 20), Some(9));
        assert_eq!(clients.backend_of(5, address(2), 10 + AGE_NS - 1), Some(8));
        assert_eq!(clients.backend_of(5, address(2), 10 + AGE_NS), None);
        // Many more than there are places: the newest are there, and no more than fit.
        let all = SHARDS * SETS * WAYS;
        for number in 0..4 * all as u32 {
            clients.remember(5, address(number), 1, true, 100 + u64::from(number));
        }
        let known = (0..4 * all as u32).filter(|number| clients.backend_of(5, address(*number), 0).is_some());
        let known: Vec<u32> = known.collect();
        assert!(known.len() <= all && known.len() > all * 9 / 10, "{}", known.len());
        assert!((4 * all as u32 - 1_000..4 * all as u32).all(|number| known.contains(&number)));
    }

    #[test]
    fn unanswered_clients_push_out_only_each_other() {
        let clients = Clients::default();
        let address = |number: u32| IpAddr::V4(number.into());
        let all = (SHARDS * SETS * WAYS) as u32;
        let knows = |number: u32, now_ns: u64| clients.backend_of(5, address(number), now_ns).is_some();
        // A quarter of the places is of such as were answered; the others are left to strangers.
        (0..all / 4).for_each(|number| clients.remember(5, address(number), 1, true, 10));
        let kept = (0..all / 4).filter(|number| knows(*number, 10)).collect::<Vec<_>>();
        let strangers = |numbers: std::ops::Range<u32>, now_ns: u64| {
            numbers.for_each(|it| clients.remember(5, address(it), 1, false, now_ns + u64::from(it)));
        };
        strangers(all..4 * all, 20);
        assert!(kept.iter().all(|number| knows(*number, 20)));
        assert!((4 * all - 1_000..4 * all).filter(|number| knows(*number, 20)).count() > 990);
        // Who is answered takes a stranger's place, and that of the oldest where there is none.
        let late = 1_000_000_000;
        (4 * all..4 * all + all / 4).for_each(|number| clients.remember(5, address(number), 1, true, late));
        assert!(kept.iter().filter(|number| knows(**number, late)).count() > kept.len() * 98 / 100);
        assert!(
            (4 * all..4 * all + all / 4).filter(|number| knows(*number, late)).count() > all as usize / 5
        );
        // After its time it holds no place against anybody.
        strangers(5 * all..8 * all, late + AGE_NS);
        assert!((8 * all - 1_000..8 * all).all(|number| knows(number, late + AGE_NS)));
    }
}
