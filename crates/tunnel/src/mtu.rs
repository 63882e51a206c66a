//! Search for the largest datagram of one path (DPLPMTUD, RFC 8899): probes that cost nothing if lost.

use crate::path::BASE_DATAGRAM_BYTES;
use crate::time::Time;

/// A probe is given up after so many tries.
const TRIES: u8 = 3;
/// The search ends when the gap is below this, bytes.
const STEP_BYTES: u16 = 8;
/// After losses of large datagrams the size is confirmed, this often at most.
const CONFIRM_EVERY_MS: u64 = 2_000;
/// A finished search looks again for a larger size after this long.
const RAISE_AFTER_MS: u64 = 600_000;

/// Binary search between a size known to pass and the interface's limit; the limit is tried first,
/// because it nearly always passes.
#[derive(Debug)]
pub struct MtuSearch {
    passes: u16,
    limit: u16,
    fails: u16,
    probe: u16,
    tries: u8,
    id: u32,
    next: Time,
    /// The probe confirms the size that passed before; and when that was done last.
    confirming: bool,
    confirmed_at: Time,
}

impl MtuSearch {
    /// A search up to `limit` bytes of UDP payload.
    pub fn new(limit: u16, now: Time) -> Self {
        let limit = limit.max(BASE_DATAGRAM_BYTES);
        Self {
            passes: BASE_DATAGRAM_BYTES,
            limit,
            fails: limit + 1,
            probe: limit,
            tries: 0,
            id: 0,
            next: now,
            confirming: false,
            confirmed_at: now,
        }
    }

    /// Large datagrams were lost: is their size still right (RFC 8899 §4.3)? Three lost probes start the search anew.
    pub fn confirm(&mut self, now: Time) {
        let searching = !self.done() || self.confirming;
        if searching
            || self.passes <= BASE_DATAGRAM_BYTES
            || now.since(self.confirmed_at) < CONFIRM_EVERY_MS * 1_000_000
        {
            return;
        }
        (self.confirming, self.confirmed_at) = (true, now);
        (self.probe, self.tries, self.next) = (self.passes, 0, now);
    }

    /// Largest size known to pass.
    pub fn passes(&self) -> u16 {
        self.passes
    }

    /// Begins anew, for a path that came back or whose interface changed.
    pub fn restart(&mut self, limit: u16, now: Time) {
        *self = Self { id: self.id, ..Self::new(limit, now) };
    }

    fn done(&self) -> bool {
        self.passes + STEP_BYTES >= self.fails || self.passes >= self.limit
    }

    /// The probe to send now: id and datagram size. Call when [`Self::next`] has come.
    pub fn poll(&mut self, now: Time, rtt_us: u32) -> Option<(u32, u16)> {
        if now < self.next {
            return None;
        }
        if self.confirming && self.tries >= TRIES {
            self.restart(self.limit, now);
        }
        if self.done() && !self.confirming {
            if self.passes >= self.limit {
                self.next = Time::MAX;
                return None;
            }
            // The raise timer: the whole range above what passes is open again.
            self.fails = self.limit + 1;
            self.probe = self.limit;
            self.tries = 0;
        }
        if self.tries >= TRIES {
            self.fails = self.probe;
            self.tries = 0;
            if self.done() {
                self.next = now.plus_ms(RAISE_AFTER_MS);
                return None;
            }
            self.probe = self.passes.midpoint(self.fails);
        }
        self.tries += 1;
        self.id = self.id.wrapping_add(1);
        self.next = now.plus_us(200_000.max(u64::from(rtt_us) * 2));
        Some((self.id, self.probe))
    }

    /// A probe of `size` bytes arrived; returns the size that is now known to pass.
    pub fn acknowledged(&mut self, now: Time, size: u16) -> u16 {
        if self.confirming && size == self.passes {
            self.confirming = false;
            self.next = if self.passes >= self.limit { Time::MAX } else { now.plus_ms(RAISE_AFTER_MS) };
        }
        if size > self.passes && size <= self.limit {
            self.passes = size;
            self.tries = 0;
            if self.done() {
                self.next = if self.passes >= self.limit { Time::MAX } else { now.plus_ms(RAISE_AFTER_MS) };
            } else {
                self.probe = self.passes.midpoint(self.fails);
                self.next = now;
            }
        }
        self.passes
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
        let (mut passes, mut probes) = (BASE_DATAGRAM_BYTES, 0);
        while search.next() < Time::from_ms(60_000) {
            now = now.max(search.next());
            if let Some((_, size)) = search.poll(now, 10_000) {
                probes += 1;
                if size <= carries {
                    passes = search.acknowledged(now, size);
                }
            }
        }
        (passes, probes)
    }

    #[test]
    fn a_clean_path_takes_one_probe() {
        assert_eq!(search(1472, 1472), (1472, 1));
    }

    #[test]
    fn a_size_that_no_longer_passes_is_given_up() {
        let mut now = Time::from_ms(10);
        let mut search = MtuSearch::new(1472, now);
        assert_eq!(search.poll(now, 10_000), Some((1, 1472)));
        search.acknowledged(now, 1472);
        now = now.plus_ms(3_000);
        search.confirm(now);
        assert_eq!(search.poll(now, 10_000), Some((2, 1472)));
        search.acknowledged(now, 1472);
        assert_eq!((search.passes(), search.next()), (1472, Time::MAX));
        now = now.plus_ms(3_000);
        search.confirm(now);
        for _ in 0..4 {
            search.poll(now, 10_000);
            now = now.plus_ms(300);
        }
        assert_eq!(search.passes(), BASE_DATAGRAM_BYTES);
    }

    #[test]
    fn smaller_paths_are_found_within_eight_bytes() {
        for carries in [1232, 1300, 1392, 1412, 1464, 8000] {
            let (passes, probes) = search(8972, carries);
            assert!(
                passes <= carries.max(BASE_DATAGRAM_BYTES) && passes + 8 >= carries,
                "{carries}: {passes}"
            );
            assert!(probes < 45, "{probes}");
        }
    }
}
