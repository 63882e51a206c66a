//! Search for the largest datagram of one path (DPLPMTUD, RFC 8899): probes that cost nothing if lost.

use crate::path::{BASE_DATAGRAM_BYTES, LEAST_DATAGRAM_BYTES};
use crate::time::Time;

/// A probe is given up after so many tries.
const TRIES: u8 = 3;
/// An answer is waited for twice the round trip, and at least this long, µs: to the first probes, to those that confirm, to others.
const FIRST_WAIT_US: u64 = 100_000;
const CONFIRM_WAIT_US: u64 = 60_000;
const WAIT_US: u64 = 200_000;
/// The search ends when the gap is below this, bytes.
const STEP_BYTES: u16 = 8;
/// After losses of large datagrams the size is confirmed, this often at most.
const CONFIRM_EVERY_MS: u64 = 2_000;
/// A finished search looks again for a larger size after this long.
const RAISE_AFTER_MS: u64 = 600_000;

/// Search for the largest datagram that passes: first the interface's limit, the usual base and the least size at once, so that
/// a clean path is known after one round trip and a small one is never taken for a large one; then a binary search
/// between what passed and what did not.
#[derive(Debug)]
pub struct MtuSearch {
    stage: Stage,
    began: Time,
    /// Largest size that passed; 0 = none yet.
    passes: u16,
    limit: u16,
    fails: u16,
    probe: u16,
    tries: u8,
    /// Sizes of the first stage that have left in this try.
    sent: u8,
    id: u32,
    next: Time,
    confirmed_at: Time,
}

/// Purpose of the probes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Nothing is known yet.
    First,
    /// Nothing passes, not even the least size.
    Nothing,
    /// Between what passes and what does not.
    Search,
    /// Whether the size that was found passes still.
    Confirm,
    /// Found, but for the raise timer.
    Found,
}

impl MtuSearch {
    /// A search up to `limit` bytes of UDP payload.
    pub fn new(limit: u16, now: Time) -> Self {
        let limit = limit.max(LEAST_DATAGRAM_BYTES);
        Self {
            stage: Stage::First,
            began: now,
            passes: 0,
            limit,
            fails: limit + 1,
            probe: limit,
            tries: 0,
            sent: 0,
            id: 0,
            next: now,
            confirmed_at: now,
        }
    }

    /// Large datagrams were lost: is their size still right (RFC 8899 §4.3)? Three lost probes start the search anew.
    pub fn confirm(&mut self, now: Time) {
        if self.stage != Stage::Found || now.since(self.confirmed_at) < CONFIRM_EVERY_MS * 1_000_000 {
            return;
        }
        (self.stage, self.confirmed_at) = (Stage::Confirm, now);
        (self.probe, self.tries, self.next) = (self.passes, 0, now);
    }

    /// Largest size known to pass; the least one before anything is known.
    pub fn passes(&self) -> u16 {
        self.passes.max(LEAST_DATAGRAM_BYTES)
    }

    /// Whether not even datagrams of the least size pass.
    pub fn nothing_passes(&self) -> bool {
        self.stage == Stage::Nothing
    }

    /// When it began: who was not heard since is silent, whatever the size.
    pub fn began(&self) -> Time {
        self.began
    }

    /// Begins anew, for a path that came back or whose interface changed.
    pub fn restart(&mut self, limit: u16, now: Time) {
        *self = Self { id: self.id, confirmed_at: self.confirmed_at, ..Self::new(limit, now) };
    }

    /// The probe to send now: id and datagram size. To be called until it gives none, when [`Self::next`] has come.
    pub fn poll(&mut self, now: Time, rtt_us: u32) -> Option<(u32, u16)> {
        if now < self.next {
            return None;
        }
        match self.stage {
            Stage::First | Stage::Nothing => return self.poll_first(now, rtt_us),
            Stage::Confirm if self.tries >= TRIES => {
                self.restart(self.limit, now);
                return self.poll_first(now, rtt_us);
            }
            Stage::Found => {
                if self.passes >= self.limit {
                    self.next = Time::MAX;
                    return None;
                }
                // The raise timer: the whole range above what passes is open again.
                self.stage = Stage::Search;
                (self.fails, self.probe, self.tries) = (self.limit + 1, self.limit, 0);
            }
            Stage::Search if self.tries >= TRIES => {
                self.fails = self.probe;
                self.narrow(now);
                if self.stage == Stage::Found {
                    return None;
                }
            }
            Stage::Search | Stage::Confirm => {}
        }
        self.tries += 1;
        let least_us = if self.stage == Stage::Confirm { CONFIRM_WAIT_US } else { WAIT_US };
        self.next = now.plus_us(least_us.max(u64::from(rtt_us) * 2));
        Some(self.numbered(self.probe))
    }

    /// The first sizes leave together, three times at most.
    fn poll_first(&mut self, now: Time, rtt_us: u32) -> Option<(u32, u16)> {
        if self.tries >= TRIES {
            self.conclude(now);
            return if self.stage == Stage::Search { self.poll(now, rtt_us) } else { None };
        }
        let sizes = self.first_sizes();
        while let Some(&size) = sizes.get(usize::from(self.sent)) {
            self.sent += 1;
            let repeated = sizes.iter().take(usize::from(self.sent) - 1).any(|before| *before == size);
            if size > self.passes && !repeated {
                return Some(self.numbered(size));
            }
        }
        self.sent = 0;
        self.tries += 1;
        self.next = now.plus_us(FIRST_WAIT_US.max(u64::from(rtt_us) * 2));
        None
    }

    fn first_sizes(&self) -> [u16; 3] {
        [self.limit, BASE_DATAGRAM_BYTES.min(self.limit), LEAST_DATAGRAM_BYTES]
    }

    /// The first probes had their time.
    fn conclude(&mut self, now: Time) {
        if self.passes == 0 {
            (self.stage, self.tries, self.next) = (Stage::Nothing, 0, now.plus_ms(1_000));
            return;
        }
        let lost = self.first_sizes().into_iter().filter(|size| *size > self.passes).min();
        self.fails = lost.unwrap_or(self.limit + 1);
        self.stage = Stage::Search;
        self.narrow(now);
    }

    /// Sets the next probe between what passes and what does not, or ends the search.
    fn narrow(&mut self, now: Time) {
        self.tries = 0;
        if self.passes + STEP_BYTES >= self.fails || self.passes >= self.limit {
            self.stage = Stage::Found;
            self.next = if self.passes >= self.limit { Time::MAX } else { now.plus_ms(RAISE_AFTER_MS) };
        } else {
            self.probe = self.passes.midpoint(self.fails);
            self.next = now;
        }
    }

    fn numbered(&mut self, size: u16) -> (u32, u16) {
        self.id = self.id.wrapping_add(1);
        (self.id, size)
    }

    /// A probe of `size` bytes arrived; returns the size that is now known to pass.
    pub fn acknowledged(&mut self, now: Time, size: u16) -> u16 {
        if size > self.limit {
            return self.passes();
        }
        if self.stage == Stage::Confirm && size == self.passes {
            self.narrow_found(now);
        } else if size > self.passes {
            self.passes = size;
            match self.stage {
                Stage::First | Stage::Nothing if size >= self.limit => self.narrow_found(now),
                Stage::Nothing => self.stage = Stage::First,
                Stage::First => {}
                _ => {
                    self.stage = Stage::Search;
                    self.narrow(now);
                }
            }
        }
        self.passes()
    }

    /// Ends the search with what passes.
    fn narrow_found(&mut self, now: Time) {
        self.fails = self.passes + 1;
        self.narrow(now);
    }

    /// When to call [`Self::poll`] next.
    pub fn next(&self) -> Time {
        self.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a search over a path that carries up to `carries` bytes; returns the result and the probes used.
    fn search(limit: u16, carries: u16) -> (u16, u32) {
        let mut now = Time::from_ms(1);
        let mut search = MtuSearch::new(limit, now);
        let mut probes = 0;
        while search.next() < Time::from_ms(60_000) && !search.nothing_passes() {
            now = now.max(search.next());
            let sizes: Vec<u16> =
                std::iter::from_fn(|| search.poll(now, 10_000)).map(|(_, size)| size).collect();
            probes += sizes.len() as u32;
            for size in sizes.into_iter().filter(|size| *size <= carries) {
                search.acknowledged(now, size);
            }
        }
        (search.passes(), probes)
    }

    #[test]
    fn a_clean_path_takes_one_round_trip() {
        assert_eq!(search(1472, 1472), (1472, 3));
        assert_eq!(search(1172, 1172), (1172, 2), "an interface that is smaller than the usual base");
        assert_eq!(search(300, 548), (548, 1));
    }

    #[test]
    fn a_size_that_no_longer_passes_is_given_up() {
        let mut now = Time::from_ms(10);
        let mut search = MtuSearch::new(1472, now);
        assert_eq!(search.poll(now, 10_000), Some((1, 1472)));
        search.acknowledged(now, 1472);
        assert_eq!((search.passes(), search.next()), (1472, Time::MAX));
        now = now.plus_ms(3_000);
        search.confirm(now);
        assert_eq!(search.poll(now, 10_000), Some((2, 1472)));
        search.acknowledged(now, 1472);
        assert_eq!((search.passes(), search.next()), (1472, Time::MAX));
        now = now.plus_ms(3_000);
        search.confirm(now);
        let before = now;
        while search.passes() == 1472 {
            search.poll(now, 10_000);
            now = now.plus_ms(1);
        }
        assert!(now.since(before) < 200_000_000, "a fifth of a second");
        assert_eq!(search.passes(), LEAST_DATAGRAM_BYTES);
    }

    #[test]
    fn nothing_but_small_datagrams() {
        let mut now = Time::from_ms(10);
        let mut search = MtuSearch::new(1472, now);
        while !search.nothing_passes() {
            search.poll(now, 10_000);
            now = now.plus_ms(1);
        }
        assert!(now < Time::from_ms(350), "{}", now.ms());
        // An answer that comes late shows that something passes.
        assert_eq!(search.acknowledged(now, LEAST_DATAGRAM_BYTES), LEAST_DATAGRAM_BYTES);
        assert!(!search.nothing_passes());
    }

    #[test]
    fn smaller_paths_are_found_within_eight_bytes() {
        for carries in [548, 600, 900, 1172, 1231, 1232, 1300, 1392, 1412, 1464, 8000] {
            let (passes, probes) = search(8972, carries);
            assert!(passes <= carries && passes + 8 >= carries, "{carries}: {passes}");
            assert!(probes < 60, "{probes}");
        }
    }
}
