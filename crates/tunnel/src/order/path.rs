//! Knowledge of the orderer about each path: how far it has come and how much it reorders.

use super::PathTiming;
use crate::time::Time;

/// Records kept per path: the most packets of reordering the packet rule can tolerate.
const RECORDS: usize = 16;
/// Reorder tolerance to start with and to decay to, packets.
const TOLERANCE_PACKETS_START: u8 = 3;
/// Tolerance that switches the packet rule off: the path reorders more than [`RECORDS`] packets.
const TOLERANCE_PACKETS_OFF: u8 = RECORDS as u8 + 1;
/// Reorder tolerance to start with and to decay to.
const TOLERANCE_US_START: u32 = 2_000;
/// The most time a path's reordering may cost.
const TOLERANCE_US_MAX: u32 = 50_000;
/// How often the tolerances shrink by one step.
const DECAY_MS: u64 = 1_000;
/// Snapshots of a trail. Every second one is at least a sixth of the span older than the one before, so they
/// reach back further than the span.
const SNAPSHOTS: usize = 16;
/// A trail's past is known to this part of the span asked for.
const SNAPSHOT_DIVISOR: u64 = 6;

/// A rising value with a little history: what was it `span` ago?
///
/// Constant memory: not every value gets a snapshot, so an answer may be the value of up to a sixth of the
/// span earlier. It is never too young.
#[derive(Clone, Debug)]
pub(super) struct Trail {
    latest: u64,
    latest_at: Time,
    snapshots: [(Time, u64); SNAPSHOTS],
    /// Index of the oldest snapshot, which the next one replaces.
    oldest: u8,
}

impl Trail {
    /// A trail that has had `value` for ever.
    pub(super) const fn new(value: u64) -> Self {
        Self { latest: value, latest_at: Time::ZERO, snapshots: [(Time::ZERO, value); SNAPSHOTS], oldest: 0 }
    }

    #[inline]
    pub(super) const fn latest(&self) -> u64 {
        self.latest
    }

    /// The value rises to `value`. True when a snapshot was taken: the moment for rare work.
    #[inline]
    pub(super) fn record(&mut self, now: Time, value: u64, span_us: u32) -> bool {
        let newest = self.snapshots[(usize::from(self.oldest) + SNAPSHOTS - 1) % SNAPSHOTS].0;
        let due = now.since(newest) >= u64::from(span_us) * 1_000 / SNAPSHOT_DIVISOR;
        if due {
            // The value that is replaced, with its own time: nothing that stood for long is forgotten.
            self.snapshots[usize::from(self.oldest)] = (self.latest_at, self.latest);
            self.oldest = (self.oldest + 1) % SNAPSHOTS as u8;
        }
        self.latest = value;
        self.latest_at = now;
        due
    }

    /// Snapshots from the oldest to the newest.
    fn snapshots(&self) -> impl DoubleEndedIterator<Item = (Time, u64)> + '_ {
        let (newer, older) = self.snapshots.split_at(usize::from(self.oldest));
        older.iter().chain(newer).copied()
    }

    /// The value `span_us` before `now`, or a little older.
    pub(super) fn at(&self, now: Time, span_us: u32) -> u64 {
        let span = u64::from(span_us);
        if self.latest_at.plus_us(span) <= now {
            return self.latest;
        }
        let old_enough = |(at, _): &(Time, u64)| at.plus_us(span) <= now;
        self.snapshots().rev().find(old_enough).map_or(0, |(_, value)| value)
    }

    /// When [`Trail::at`] will first answer with more than `stamp`; none while the value is not beyond it.
    pub(super) fn due(&self, stamp: u64, span_us: u32) -> Option<Time> {
        if self.latest <= stamp {
            return None;
        }
        let beyond = self.snapshots().find(|&(_, value)| value > stamp);
        let at = beyond.map_or(self.latest_at, |(at, _)| at);
        Some(at.plus_us(span_us.into()))
    }

    /// How long ago the value passed `stamp`, never less than the truth by more than a snapshot's
    /// distance; for a stamp passed before the oldest snapshot, that snapshot's age.
    fn age_us(&self, now: Time, stamp: u64) -> u64 {
        let passed = self.snapshots().find(|&(_, value)| value > stamp).map_or(self.latest_at, |(at, _)| at);
        now.since(passed) / 1_000
    }
}

/// One path of the set.
#[derive(Clone, Debug)]
pub(super) struct PathTrack {
    pub(super) path: u8,
    /// How long a packet that came over this path waits at most.
    pub(super) wait_us: u64,
    /// How far the path has come: everything sent over it with a stamp below has been passed.
    trail: Trail,
    /// The last values of the trail, one per packet that raised it.
    records: [u64; RECORDS],
    newest: u8,
    /// Stamps below this were not expected over the path when it joined: they tell nothing about its reordering.
    joined_at: u64,
    tolerance_packets: u8,
    tolerance_us: u32,
    decay_at: Time,
}

impl PathTrack {
    /// A path that starts at `passed`: whatever was stamped below did not take it.
    pub(super) fn new(timing: &PathTiming, passed: u64) -> Self {
        Self {
            path: timing.path,
            wait_us: 0,
            trail: Trail::new(passed),
            records: [passed; RECORDS],
            newest: 0,
            joined_at: passed,
            tolerance_packets: TOLERANCE_PACKETS_START,
            tolerance_us: TOLERANCE_US_START,
            decay_at: Time::ZERO,
        }
    }

    /// A packet arrived over the path: it has come as far as its stamp, or it reorders.
    #[inline]
    pub(super) fn packet(&mut self, now: Time, stamp: u64) {
        if stamp < self.trail.latest() {
            self.learn(now, stamp);
        } else {
            self.advance(now, stamp);
        }
    }

    /// Something arrived over the path that passes every stamp below `passed`.
    #[inline]
    pub(super) fn advance(&mut self, now: Time, passed: u64) {
        if passed <= self.trail.latest() {
            return;
        }
        self.newest = (self.newest + 1) % RECORDS as u8;
        self.records[usize::from(self.newest)] = passed;
        if self.trail.record(now, passed, self.tolerance_us) {
            self.decay(now);
        }
    }

    /// A packet arrived behind the path's own highest: the path reorders by at least this much.
    #[cold]
    fn learn(&mut self, now: Time, stamp: u64) {
        if stamp < self.joined_at {
            return;
        }
        let beyond = self.records.iter().filter(|&&record| record > stamp).count();
        // One more than the packets that overtook it would have kept it from being given up.
        let packets = u8::try_from(beyond + 1).unwrap_or(TOLERANCE_PACKETS_OFF);
        self.tolerance_packets = self.tolerance_packets.max(packets.min(TOLERANCE_PACKETS_OFF));
        let age_us = u32::try_from(self.trail.age_us(now, stamp)).unwrap_or(u32::MAX);
        if age_us > self.tolerance_us {
            self.tolerance_us = age_us.saturating_add(age_us / 4).min(TOLERANCE_US_MAX);
        }
        self.decay_at = now.plus_ms(DECAY_MS);
    }

    fn decay(&mut self, now: Time) {
        if now < self.decay_at {
            return;
        }
        self.decay_at = now.plus_ms(DECAY_MS);
        self.tolerance_packets = (self.tolerance_packets - 1).max(TOLERANCE_PACKETS_START);
        self.tolerance_us = (self.tolerance_us - self.tolerance_us / 8).max(TOLERANCE_US_START);
    }

    /// Everything below this which has not arrived over the path will not arrive any more.
    pub(super) fn passed(&self, now: Time) -> u64 {
        self.passed_by_packets().max(self.trail.at(now, self.tolerance_us))
    }

    fn passed_by_packets(&self) -> u64 {
        if self.tolerance_packets >= TOLERANCE_PACKETS_OFF {
            return 0;
        }
        let back = usize::from(self.tolerance_packets) - 1;
        self.records[(usize::from(self.newest) + RECORDS - back) % RECORDS]
    }

    /// When the path will have passed `stamp` for good if nothing more arrives over it; none while it has
    /// not come beyond it.
    pub(super) fn due(&self, stamp: u64) -> Option<Time> {
        if self.passed_by_packets() > stamp {
            return Some(Time::ZERO);
        }
        self.trail.due(stamp, self.tolerance_us)
    }

    /// The learned reorder tolerance: packets (17 = the packet rule is off) and microseconds.
    pub(super) const fn tolerance(&self) -> (u8, u32) {
        (self.tolerance_packets, self.tolerance_us)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn track() -> PathTrack {
        PathTrack::new(&PathTiming { path: 0, delay_us: 0, jitter_us: 0 }, 0)
    }

    #[test]
    fn a_trail_answers_with_values_old_enough_and_not_much_older() {
        let mut trail = Trail::new(0);
        // One value every 100 µs for 50 ms: value n at n × 100 µs.
        for n in 1..=500_u64 {
            trail.record(Time::from_us(n * 100), n, 2_000);
            let got = trail.at(Time::from_us(n * 100), 2_000);
            let exact = n.saturating_sub(20);
            assert!(got <= exact, "at {n}: {got} is too young");
            assert!(n < 40 || got + 5 >= exact, "at {n}: {got} is too old");
        }
        // Nothing more comes: the last value gets old enough too.
        assert_eq!(trail.due(499, 2_000), Some(Time::from_us(52_000)));
        assert_eq!(trail.at(Time::from_us(52_000), 2_000), 500);
        assert_eq!(trail.due(500, 2_000), None);
    }

    #[test]
    fn values_far_apart_keep_their_own_time() {
        let mut trail = Trail::new(0);
        trail.record(Time::from_us(10_000), 1, 2_000);
        trail.record(Time::from_us(10_000), 2, 2_000);
        trail.record(Time::from_us(11_900), 3, 2_000);
        assert_eq!(trail.due(1, 2_000), Some(Time::from_us(12_000)));
        assert_eq!(trail.at(Time::from_us(11_999), 2_000), 0);
        assert_eq!(trail.at(Time::from_us(12_000), 2_000), 2);
        // Pairs of values, the worst case for the number of snapshots.
        for pair in 1..=200_u64 {
            let now = Time::from_us(20_000 + pair * 334);
            trail.record(now, 10 * pair, 2_000);
            trail.record(now.plus_us(1), 10 * pair + 1, 2_000);
            assert!(pair < 20 || trail.at(now, 2_000) >= 10 * (pair - 7), "{pair}: {}", trail.at(now, 2_000));
        }
    }

    #[test]
    fn due_is_the_first_moment_at_which_at_agrees() {
        let mut trail = Trail::new(0);
        for n in 1..=37_u64 {
            trail.record(Time::from_us(n * 130), n * 3, 2_000);
        }
        let now = 37 * 130;
        for stamp in 60..111 {
            let due = trail.due(stamp, 2_000).map_or(0, Time::us);
            assert!(due > 0);
            if due > now {
                assert!(trail.at(Time::from_us(due), 2_000) > stamp, "stamp {stamp}");
                assert!(trail.at(Time::from_ns(due * 1_000 - 1), 2_000) <= stamp, "stamp {stamp}");
            }
        }
    }

    #[test]
    fn three_packets_pass_or_two_milliseconds() {
        let mut track = track();
        for stamp in [10, 20, 30] {
            track.advance(Time::from_ms(1), stamp);
        }
        assert_eq!(track.passed(Time::from_ms(1)), 10);
        assert_eq!(track.due(9), Some(Time::ZERO));
        assert_eq!(track.due(15), Some(Time::from_ms(3)));
        assert_eq!(track.passed(Time::from_ms(3)), 30);
        assert_eq!(track.due(30), None);
    }

    #[test]
    fn tolerance_grows_with_reordering_and_decays() {
        let mut track = track();
        let mut now = Time::from_ms(1);
        for stamp in 1..=100 {
            now = now.plus_us(10);
            if stamp != 92 {
                track.advance(now, stamp);
            }
        }
        track.learn(now, 92);
        assert_eq!(track.tolerance(), (9, TOLERANCE_US_START));
        assert_eq!(track.passed(now), 91, "eight packets overtook, and that is tolerated now");
        track.learn(now.plus_ms(4), 92);
        assert!(track.tolerance().1 >= 4_000);
        for second in 1..=60 {
            track.advance(now.plus_ms(1_000 * second), 100 + second);
        }
        assert_eq!(track.tolerance(), (TOLERANCE_PACKETS_START, TOLERANCE_US_START));
    }

    #[test]
    fn deep_reordering_leaves_only_the_clock() {
        let mut track = track();
        for stamp in 1..=100 {
            track.advance(Time::from_us(1_000 + stamp), stamp);
        }
        track.learn(Time::from_us(1_100), 10);
        assert_eq!(track.tolerance().0, TOLERANCE_PACKETS_OFF);
        assert_eq!(track.passed(Time::from_us(1_100)), 0);
        assert_eq!(track.passed(Time::from_us(3_101)), 100);
    }
}
