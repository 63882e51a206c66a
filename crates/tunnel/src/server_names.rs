//! Servers that clients asked for in flows of a bond, for all cores (row T12).
//!
//! A ClientHello passes in one direction only, and the class that its name gives counts in both: the core that sees it leaves the
//! name here, and the one that sends the flow's packets finds it, be it the same or another.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use packet::server_name::ServerName;

use crate::time::Time;

/// Sets, each behind a lock of its own, and places of a set: 4,096 flows.
const SETS: usize = 512;
const WAYS: usize = 8;

type Set = [Option<(u32, Time, ServerName)>; WAYS];

/// The names by the hash of their flows; the one that was seen first makes room.
#[derive(Default)]
pub(crate) struct ServerNames {
    sets: OnceLock<Box<[Mutex<Set>]>>,
    /// Flows that could not be looked into: too many at a time.
    pub missed: AtomicU64,
}

impl ServerNames {
    /// A flow with this hash asks for a server.
    pub fn put(&self, now: Time, hash: u32, name: &ServerName) {
        let sets = self.sets.get_or_init(|| (0..SETS).map(|_| Mutex::default()).collect());
        let Some(mut set) = sets.get(place(hash)).map(lock) else { return };
        let known = set.iter().position(|seen| seen.as_ref().is_some_and(|(of, ..)| *of == hash));
        let age = |way: &usize| set.get(*way).and_then(Option::as_ref).map(|(_, at, _)| *at);
        let way = known.or_else(|| (0..WAYS).min_by_key(age));
        if let Some(seen) = way.and_then(|way| set.get_mut(way)) {
            *seen = Some((hash, now, name.clone()));
        }
    }

    /// The server that it asks for.
    pub fn get(&self, hash: u32) -> Option<ServerName> {
        let set = self.sets.get()?.get(place(hash)).map(lock)?;
        set.iter().flatten().find(|(of, ..)| *of == hash).map(|(.., name)| name.clone())
    }

    /// A new flow has this hash.
    pub fn remove(&self, hash: u32) {
        let Some(mut set) = self.sets.get().and_then(|sets| sets.get(place(hash))).map(lock) else { return };
        for seen in set.iter_mut().filter(|seen| seen.as_ref().is_some_and(|(of, ..)| *of == hash)) {
            *seen = None;
        }
    }

    /// One more was missed.
    pub fn miss(&self) {
        self.missed.fetch_add(1, Relaxed);
    }
}

fn place(hash: u32) -> usize {
    // The low bits chose the core: multiplying mixes the others in.
    (hash.wrapping_mul(0x9e37_79b1) >> 12) as usize % SETS
}

/// A set is whole after each assignment.
fn lock(set: &Mutex<Set>) -> MutexGuard<'_, Set> {
    set.lock().unwrap_or_else(PoisonError::into_inner)
}

impl std::fmt::Debug for ServerNames {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerNames").field("missed", &self.missed).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn names_are_found_by_hash_and_the_oldest_make_room() {
        let names = ServerNames::default();
        let name = |number: u32| ServerName::new(format!("host-{number}.example").as_bytes()).unwrap();
        assert_eq!(names.get(7), None);
        names.put(Time::from_ms(1), 7, &name(0));
        names.put(Time::from_ms(2), 7, &name(1));
        assert_eq!(names.get(7), Some(name(1)), "the newest counts");
        names.remove(7);
        assert_eq!(names.get(7), None);
        let (hash, all) = (|number: u32| number.wrapping_mul(0x85eb_ca6b), 3 * (SETS * WAYS) as u32);
        for number in 0..all {
            names.put(Time::from_ms(u64::from(number)), hash(number), &name(number));
        }
        let known = (0..all).filter(|number| names.get(hash(*number)).is_some()).count();
        assert!(known <= SETS * WAYS && known > SETS * WAYS * 9 / 10, "{known}");
        assert!((all - 1_000..all).all(|number| names.get(hash(number)) == Some(name(number))));
    }
}
