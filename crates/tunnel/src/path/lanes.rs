//! The lanes of one path as their reports tell of them: a sample of the path is of all its lanes, up to one moment.
//!
//! The cores of the peer report by one clockwork, each about its own lanes. Were samples to end with any one report, what other
//! lanes did not tell yet would be missing in one and too much in the next: the path would seem to carry half and double in turn.

use super::{Feedbacked, Times};
use crate::time::Time;

/// Lanes of a path that are kept apart, sixteen cores on both sides; of more, those that reported last.
const LANES_MAX: usize = 256;
/// Nobody waits for a lane that has not reported for so long.
const SILENT_NS: u64 = 30_000_000;
/// Reports of one moment are made within this time of each other, µs: a core may be late.
const TOGETHER_US: i32 = 5_000;
/// For a report that is late or lost the others wait until they tell of this much later, µs.
const PATIENCE_US: i32 = 15_000;
/// A sample is gathered no longer than this by our own clock: the path may fall silent over it, for longer than the receiver's wraps.
const GATHER_NS: u64 = 100_000_000;
/// No report is longer under way.
const LATE_NS: u64 = 10_000_000_000;
/// Guesses of a lane's bytes reach so far behind its newest report, µs.
const GUESSED_US: i32 = 20_000;
/// Share of a report's weight that remains with the next.
const FADE: f64 = 0.75;
/// Reports further apart than this tell no rate, µs.
const PAUSE_US: i32 = 50_000;

/// One lane, as its reports have told.
#[derive(Clone, Copy, Debug)]
struct Told {
    lane: (u8, u8),
    /// When it reported last, by our clock, …
    at: Time,
    /// … and by the receiver's, µs.
    told_us: u32,
    /// Bytes of the last reports and the time between them, µs, the older the less.
    bytes: f64,
    span_us: f64,
    /// It carried nothing between its last two reports: no more come until it does.
    rests: bool,
}

impl Told {
    fn new(lane: (u8, u8)) -> Self {
        let (at, told_us) = (Time::ZERO, 0);
        Self { lane, at, told_us, bytes: 0.0, span_us: 0.0, rests: true }
    }

    /// Takes in that it carried so many bytes until `told_us`.
    fn add(&mut self, now: Time, told_us: u32, bytes: u64) {
        let since_us = told_us.wrapping_sub(self.told_us).cast_signed();
        if self.rests || since_us >= PAUSE_US {
            (self.bytes, self.span_us) = (0.0, 0.0);
        } else {
            self.bytes = self.bytes * FADE + bytes as f64;
            self.span_us = self.span_us * FADE + f64::from(since_us.max(0));
        }
        (self.at, self.told_us, self.rests) = (now, told_us, false);
    }

    /// Whether its report of that moment is still to come.
    fn is_awaited(&self, now: Time, moment_us: u32) -> bool {
        !self.rests
            && moment_us.wrapping_sub(self.told_us).cast_signed() > TOGETHER_US
            && now.since(self.at) <= SILENT_NS
    }

    /// Bytes that it carried from its last report until `arrival_us`, as it went on.
    fn ahead(&self, arrival_us: u32) -> f64 {
        let since_us = arrival_us.wrapping_sub(self.told_us).cast_signed();
        if self.span_us <= 0.0 {
            return 0.0;
        }
        self.bytes / self.span_us * f64::from(since_us.clamp(0, GUESSED_US))
    }
}

/// Sum of all lanes since the sample before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Carried {
    /// When the report of its newest datagram came.
    pub at: Time,
    /// Bytes on the wire.
    pub bytes: u64,
    /// Datagrams.
    pub received: u32,
    /// Datagrams that are missing.
    pub lost: u32,
    /// Receiver's clock when the newest datagram arrived, µs.
    pub arrival_us: u32,
    /// Times of that datagram.
    pub times: Times,
}

/// Gathers the lanes' reports.
#[derive(Debug, Default)]
pub(super) struct Lanes {
    told: Vec<Told>,
    /// When the first and the newest report of the sample that is being gathered were made, by the receiver's clock, µs.
    made_us: Option<(u32, u32)>,
    /// When the first of them came.
    since: Time,
    bytes: u64,
    received: u32,
    lost: u32,
    /// Newest datagram of the sample: when its report came, when it arrived, its times.
    newest: Option<(Time, u32, Times)>,
    /// Newest datagram of the last sample: when its report came, and when it arrived.
    ended: Option<(Time, u32)>,
    /// Bytes that the last sample had although no report had told of them yet.
    ahead: i64,
}

impl Lanes {
    /// Takes a report of `bytes` on the wire in. Returns what the path carried when that completes a sample: all lanes have told of one
    /// moment, or have waited long enough for one that did not.
    pub fn add(&mut self, now: Time, entry: &Feedbacked, bytes: u64) -> Option<Carried> {
        let after = |us: u32| entry.told_us.wrapping_sub(us).cast_signed();
        let ended = match self.made_us {
            Some((first_us, _)) if after(first_us) > PATIENCE_US || now.since(self.since) > GATHER_NS => {
                self.end(now)
            }
            _ => None,
        };
        let at = self.place(entry.lane);
        self.told[at].add(now, entry.told_us, bytes);
        if self.made_us.is_none() {
            self.since = now;
        }
        let (first_us, newest_us) = self.made_us.unwrap_or((entry.told_us, entry.told_us));
        self.made_us = Some((first_us, if after(newest_us) > 0 { entry.told_us } else { newest_us }));
        // The peer says how much: no more than what leaves the arithmetic without an overflow.
        self.bytes = self.bytes.saturating_add(bytes).min(1 << 40);
        self.received = self.received.saturating_add(entry.received);
        self.lost = self.lost.saturating_add(entry.lost);
        if let Some(times) = entry.times {
            let is_after = |us: u32| entry.arrival_us.wrapping_sub(us).cast_signed() > 0;
            // A report that was long under way tells of earlier ones: they count with the next sample.
            let ended = self.ended.filter(|(at, _)| now.since(*at) < LATE_NS);
            let newest_us = self.newest.map(|(_, us, _)| us).or(ended.map(|(_, us)| us));
            if newest_us.is_none_or(is_after) {
                self.newest = Some((now, entry.arrival_us, times));
            }
        }
        if ended.is_some() || self.waits(now) { ended } else { self.end(now) }
    }

    /// A lane told again what it had told: it carries nothing at the moment.
    pub fn rest(&mut self, now: Time, lane: (u8, u8)) -> Option<Carried> {
        let told = self.told.iter_mut().find(|told| told.lane == lane)?;
        told.rests = true;
        if self.waits(now) { None } else { self.end(now) }
    }

    /// The path rested: what was under way is not any more.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    fn waits(&self, now: Time) -> bool {
        let Some((_, moment_us)) = self.made_us else { return true };
        self.told.iter().any(|told| told.is_awaited(now, moment_us))
    }

    fn place(&mut self, lane: (u8, u8)) -> usize {
        if let Some(at) = self.told.iter().position(|told| told.lane == lane) {
            return at;
        }
        if self.told.len() >= LANES_MAX
            && let Some(oldest) = (0..self.told.len()).min_by_key(|at| self.told[*at].at)
        {
            self.told.swap_remove(oldest);
        }
        self.told.push(Told::new(lane));
        self.told.len() - 1
    }

    fn end(&mut self, now: Time) -> Option<Carried> {
        // Reports of what came before the last sample ended count with those that come.
        self.made_us = None;
        let (at, arrival_us, times) = self.newest.take()?;
        self.ended = Some((at, arrival_us));
        let alive = self.told.iter().filter(|told| !told.rests && now.since(told.at) <= SILENT_NS);
        let ahead = alive.map(|told| told.ahead(arrival_us)).sum::<f64>() as i64;
        let arrived = (self.bytes as i64).saturating_add(ahead - self.ahead);
        // What was thought to have arrived and did not is missing in the next samples.
        self.ahead = ahead + (-arrived).max(0);
        self.bytes = 0;
        let (received, lost) = (std::mem::take(&mut self.received), std::mem::take(&mut self.lost));
        Some(Carried { at, bytes: arrived.max(0).cast_unsigned(), received, lost, arrival_us, times })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn entry(lane: u8, arrival_us: u64, told_us: u64, bytes: u64) -> Feedbacked {
        Feedbacked {
            lane: (0, lane),
            bytes,
            received: 1,
            lost: 0,
            arrival_us: arrival_us as u32,
            told_us: told_us as u32,
            times: Some(Times { owd_us: 0, rtt_us: 1_000 }),
        }
    }

    /// Rates of the samples, bytes per µs.
    fn rates(samples: &[Carried]) -> Vec<f64> {
        let interval = |pair: &[Carried]| f64::from(pair[1].arrival_us.wrapping_sub(pair[0].arrival_us));
        samples.windows(2).map(|pair| pair[1].bytes as f64 / interval(pair)).collect()
    }

    /// Three lanes carry 10 bytes a µs in turn, in bursts of 4 ms, and report every 10 ms within half a millisecond. Every other report
    /// is under way for 10 ms longer and arrives together with the next.
    #[test]
    fn a_sample_has_what_all_lanes_carried_up_to_one_moment() {
        let mut lanes = Lanes::default();
        let mut told = [0u64; 3];
        let mut reports = Vec::new();
        for turn in 1..400u64 {
            for lane in 0..3u64 {
                let made_us = turn * 10_000 + lane * 200;
                // Of each 12 ms it carries 4.
                let carried = |us: u64| {
                    (us / 12_000 * 4_000 + (us % 12_000).saturating_sub(lane * 4_000).min(4_000)) * 10
                };
                let newest = (0..made_us).rev().step_by(50).find(|us| us % 12_000 / 4_000 == lane).unwrap();
                let reaches_us = made_us + if turn % 2 == 0 { 20_000 } else { 10_000 };
                reports.push((reaches_us, lane, newest, made_us, carried(made_us)));
            }
        }
        // Of two reports of a lane that come together either may be first.
        reports.sort_by_key(|report| (report.0 / 1_000, report.3 % 3, report.1));
        let mut samples = Vec::new();
        for (reaches_us, lane, newest, made_us, carried) in reports {
            let told = &mut told[lane as usize];
            if carried <= *told {
                continue;
            }
            let entry = entry(lane as u8, newest, made_us, carried - *told);
            *told = carried;
            samples.extend(lanes.add(Time::from_us(reaches_us), &entry, entry.bytes));
        }
        let rates = rates(&samples);
        assert!(rates.len() > 150, "{}", rates.len());
        for rate in &rates[10..] {
            assert!((9.0..11.0).contains(rate), "{rate} of 10: {rates:?}");
        }
    }

    #[test]
    fn nobody_waits_for_a_lane_that_rests_or_is_silent_for_long() {
        let mut lanes = Lanes::default();
        let mut ends = |ms: u64, lane: u8| {
            let us = ms * 1_000 + u64::from(lane);
            let carried = lanes.add(Time::from_us(us), &entry(lane, us, us, 10_000), 10_000);
            // A microsecond's worth may be guessed.
            carried.map(|carried| (carried.bytes + 50) / 100)
        };
        assert_eq!(ends(10, 0), Some(100));
        assert_eq!((ends(20, 0), ends(20, 1)), (Some(100), Some(100)));
        // Lane 1 is missing: its part is guessed, and counted when it does not come.
        assert_eq!((ends(30, 0), ends(40, 0)), (None, None));
        assert!(ends(50, 0).is_some());
        assert!(ends(60, 0).is_some());
        assert_eq!(ends(70, 0), Some(100));
        assert_eq!(ends(80, 1), None);
        assert_eq!(ends(80, 0), Some(200));
        assert_eq!(ends(90, 0), None);
        let rested = lanes.rest(Time::from_ms(91), (0, 1)).unwrap();
        assert_eq!((rested.bytes + 50) / 100, 100);
    }

    #[test]
    fn memory_has_a_limit_and_a_report_that_is_late_does_not_turn_time_back() {
        let mut lanes = Lanes::default();
        for number in 0..400u16 {
            let [high, low] = number.to_be_bytes();
            let entry = Feedbacked { lane: (high, low), ..entry(0, 9_000, 10_000, 1) };
            lanes.add(Time::from_ms(10), &entry, 1);
        }
        assert_eq!(lanes.told.len(), LANES_MAX);
        let mut lanes = Lanes::default();
        let mut add = |ms: u64, lane: u8, us: u64| {
            lanes.add(Time::from_ms(ms), &entry(lane, us, us, 1_000), 1_000).map(|carried| carried.arrival_us)
        };
        assert_eq!(add(30, 0, 20_000), Some(20_000));
        assert_eq!(add(31, 1, 10_000), None);
        assert_eq!(add(40, 1, 30_000), None);
        assert_eq!(add(40, 0, 30_500), Some(30_500));
        // The receiver's clock wraps, and nothing came for more than half of that.
        let later_us = (1 << 31) + 100_000;
        assert_eq!(add(3_000_000, 0, later_us), Some(later_us as u32));
    }

    /// A lane's last report is lost, and the path carries nothing for three quarters of an hour.
    #[test]
    fn a_sample_does_not_stay_open_over_a_pause() {
        let mut lanes = Lanes::default();
        let mut add = |us: u64, lane: u8| lanes.add(Time::from_us(us), &entry(lane, us, us, 1_000), 1_000);
        for us in [10_000, 20_000] {
            add(us, 0);
            assert!(add(us + 100, 1).is_some());
        }
        assert_eq!(add(30_000, 0), None, "lane 1 is awaited");
        let later_us = 45 * 60 * 1_000_000;
        let ended = add(later_us, 0).unwrap();
        assert_eq!((ended.at, ended.arrival_us, ended.received), (Time::from_us(30_000), 30_000, 1));
        let next = add(later_us + 10_000, 0).unwrap();
        assert_eq!((next.received, next.arrival_us), (2, (later_us + 10_000) as u32));
    }
}
