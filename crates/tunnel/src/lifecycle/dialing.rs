//! When a bond wants new keys, and over which paths it asks for them.

use std::sync::Arc;

use super::{DOWN_AFTER_MS, Lifecycle};
use crate::bond::Bond;
use crate::path::Path;
use crate::time::Time;

impl Lifecycle {
    /// Whether a dialer should try a handshake now: no session, an old one, or a peer that answers on no path.
    pub fn wants_handshake(&self, now: Time, bond: &Bond) -> bool {
        if !bond.dialer || now < self.next_attempt || !self.paths.iter().any(|life| life.wan.up) {
            return false;
        }
        match &*bond.current.load() {
            Some(session) => self.is_silent(now) || self.ids.exhausted || session.wants_rekey(now),
            None => true,
        }
    }

    /// For how long no path has been up, ns.
    pub fn silent_ns(&self, now: Time) -> u64 {
        self.all_down_since.map_or(0, |since| now.since(since))
    }

    fn is_silent(&self, now: Time) -> bool {
        self.silent_ns(now) >= DOWN_AFTER_MS * 1_000_000
    }

    /// Whether there is no session, or one that nothing comes through.
    pub fn is_cut_off(&self, now: Time, bond: &Bond) -> bool {
        bond.current.load().is_none() || self.is_silent(now)
    }

    /// Paths the next Initiation goes out on: all of them on even tries, one after the other on odd ones,
    /// so that a path whose way back is broken cannot win every time.
    pub fn handshake_paths(&self) -> Vec<Arc<Path>> {
        let usable: Vec<_> =
            self.paths.iter().filter(|life| life.wan.up).map(|life| Arc::clone(&life.path)).collect();
        if self.tries.is_multiple_of(2) || usable.is_empty() {
            return usable;
        }
        let one = (self.tries / 2) as usize % usable.len();
        usable.into_iter().skip(one).take(1).collect()
    }
}
