//! Receiving side of one lane: replay window, statistics, gaps.

use std::collections::VecDeque;

use packet::drop_reason::DropReason;

use super::repair::LaneRepair;
use crate::frame::{NackRange, RANGES_MAX, ReportEntry};
use crate::replay::Window;
use crate::time::Time;

/// Counters this far behind the newest are missing, not just reordered (until that proves wrong) …
const REORDER_PACKETS: u64 = 3;
/// … and so are those that stayed away this long, at first; a lane learns what its path does …
const REORDER_NS: u64 = 2_000_000;
/// … up to this.
const REORDER_NS_MAX: u64 = 100_000_000;
/// An asked-for datagram that has not come after this long will not come.
const GIVE_UP_NS: u64 = 1_000_000_000;
/// Most counters asked for in one range; a longer gap is an outage, not a loss.
const RANGE_MAX: u64 = 256;

/// Counters that have not arrived.
#[derive(Clone, Copy, Debug)]
struct Gap {
    first: u64,
    count: u64,
    since: Time,
    asked: Option<Time>,
}

/// Newest datagram of a lane with inner packets, and how many there were.
#[derive(Default)]
struct NewestData {
    highest: u64,
    at: Time,
    packets: u64,
}

/// One lane as its receiving core sees it. Made by the lane's first authenticated datagram.
pub(super) struct RxLane {
    window: Window,
    /// Counters that came over the lane's own path, as soon as copies came over another: its statistics are those of that path.
    own: Option<Box<Window>>,
    highest: u64,
    /// Newest datagram with inner packets, and when it came: what reports speak of. Reports about datagrams that
    /// hold only reports would answer each other for ever.
    data: NewestData,
    /// Datagrams and bytes received, without recovered ones.
    pub packets: u64,
    pub bytes: u64,
    lost: u32,
    /// Datagrams counted as lost that came after all: the next ones lost are not counted.
    forgiven: u64,
    /// How long a counter may stay away; learned.
    reorder_ns: u64,
    /// Counters were asked for that were only late: a count of newer ones proves nothing here.
    reorders: bool,
    gaps: VecDeque<Gap>,
    pub told: Told,
    /// Part that was added to the path's shared counters so far.
    published: (u64, u64),
    /// Last `now` stored in the path.
    pub heard: Time,
    /// Repair, since the first symbol came.
    pub repair: Option<Box<LaneRepair>>,
}

/// Reports that were sent, and whether there will be more.
pub(super) struct Told {
    packets: u64,
    /// The lane is among those of its session that have something to tell, or miss something.
    pub listed: bool,
    /// The last one was sent a second time: a lost one must not look like a dead path.
    echoed: bool,
}

/// How a datagram stands in its lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// The newest so far.
    Newest,
    /// Older, overtaken on its way.
    Late,
    /// It came because it was asked for.
    Recovered,
    /// It came over another path before the original.
    Copied,
}

impl RxLane {
    pub fn new(window_bits: usize) -> Self {
        Self {
            window: Window::new(window_bits),
            own: None,
            highest: 0,
            data: NewestData::default(),
            packets: 0,
            bytes: 0,
            lost: 0,
            forgiven: 0,
            reorder_ns: REORDER_NS,
            reorders: false,
            gaps: VecDeque::new(),
            told: Told { packets: 0, listed: false, echoed: true },
            published: (0, 0),
            heard: Time::ZERO,
            repair: None,
        }
    }

    /// Before decryption: is the counter worth the work?
    pub fn check(&self, counter: u64) -> Result<(), DropReason> {
        match (self.window.check(counter), &self.own) {
            (Err(DropReason::Replayed), Some(own)) => own.check(counter),
            (checked, _) => checked,
        }
    }

    /// Whether [`Self::commit_copy`] may be called for a copy that nobody asked for.
    pub fn tells_copies(&self) -> bool {
        self.own.is_some()
    }

    /// From now on what comes over another path is told from what comes over the lane's own; takes another window's memory.
    pub fn tell_copies(&mut self) {
        self.own.get_or_insert_with(|| Box::new(self.window.clone()));
    }

    /// As [`Self::commit`], for a datagram that came over another path than the lane's: as a repeat, or as a copy. It says nothing
    /// about the lane's path.
    pub fn commit_copy(&mut self, counter: u64) -> Result<Place, DropReason> {
        self.window.commit(counter)?;
        let asked = |gap: &Gap| gap.asked.is_some() && (gap.first..gap.first + gap.count).contains(&counter);
        if !self.gaps.iter().any(asked) {
            return Ok(Place::Copied);
        }
        self.close_gap(counter);
        self.note_repeat();
        Ok(Place::Recovered)
    }

    /// As [`Self::commit_copy`], for one that came back from a repair symbol: the original was lost all the same, or is late.
    pub fn commit_restored(&mut self, counter: u64) -> Result<Place, DropReason> {
        self.window.commit(counter).map(|()| Place::Copied)
    }

    fn note_repeat(&mut self) {
        self.reorder_ns = (self.reorder_ns - self.reorder_ns / 64).max(REORDER_NS);
        self.reorders &= self.reorder_ns > REORDER_NS;
    }

    /// A committed datagram held inner packets.
    pub fn note_data(&mut self, now: Time, counter: u64) {
        self.data.packets += 1;
        if counter >= self.data.highest {
            self.data.highest = counter;
            self.data.at = now;
        }
    }

    /// Unauthenticated datagrams may not move the window far: a forged counter would shut the real ones out.
    pub fn check_jump(&self, counter: u64) -> Result<(), DropReason> {
        if counter > self.highest + 8_192 { Err(DropReason::TooOld) } else { Ok(()) }
    }

    /// As [`Self::check_jump`], for the first datagram of a lane.
    pub fn check_first(counter: u64) -> Result<(), DropReason> {
        if counter > 8_192 { Err(DropReason::TooOld) } else { Ok(()) }
    }

    /// After authentication: takes the counter in. `rtt_us`: round trip of the quickest path, asked for only if needed. Returns also
    /// whether a copy of it came before.
    pub fn commit(
        &mut self,
        now: Time,
        counter: u64,
        bytes: usize,
        rtt_us: impl FnOnce() -> u32,
    ) -> Result<(Place, bool), DropReason> {
        let committed = self.window.commit(counter);
        let copied = committed == Err(DropReason::Replayed) && self.own.is_some();
        if !copied {
            committed?;
        }
        if let Some(own) = &mut self.own {
            own.commit(counter)?;
        }
        let place = if self.packets == 0 || counter > self.highest {
            if self.packets > 0 && counter > self.highest + 1 {
                self.open_gap(now, self.highest + 1, counter - self.highest - 1);
            }
            self.highest = counter;
            Place::Newest
        } else {
            match self.close_gap(counter) {
                Some(gap) => self.judge(now, &gap, rtt_us()),
                None => Place::Late,
            }
        };
        if place != Place::Recovered {
            self.packets += 1;
            self.bytes += bytes as u64;
        }
        Ok((place, copied))
    }

    fn open_gap(&mut self, now: Time, first: u64, count: u64) {
        if self.gaps.len() >= RANGES_MAX {
            // Too many at once to ask for: the oldest is lost.
            if let Some(gap) = self.gaps.pop_front()
                && gap.asked.is_none()
            {
                self.count_lost(gap.count);
            }
        }
        self.gaps.push_back(Gap { first, count, since: now, asked: None });
    }

    /// A counter of `gap` came: as a repeat, or, when that is too soon for a repeat, late by itself.
    fn judge(&mut self, now: Time, gap: &Gap, rtt_us: u32) -> Place {
        let asked = gap.asked.map(|asked| now.since(asked));
        if asked.is_some_and(|since_ns| since_ns >= u64::from(rtt_us) * 500) {
            self.note_repeat();
            return Place::Recovered;
        }
        let late_ns = now.since(gap.since);
        self.reorder_ns = self.reorder_ns.max(late_ns + late_ns / 4).min(REORDER_NS_MAX);
        if asked.is_some() {
            self.forgiven += 1;
            self.reorders = true;
            self.reorder_ns = self.reorder_ns.max(REORDER_NS + REORDER_NS / 4);
        }
        Place::Late
    }

    /// Takes a late counter out of its gap, which is returned as it was.
    fn close_gap(&mut self, counter: u64) -> Option<Gap> {
        let at = self.gaps.iter().position(|gap| counter >= gap.first && counter < gap.first + gap.count)?;
        let gap = self.gaps[at];
        let (before, after) = (counter - gap.first, gap.first + gap.count - counter - 1);
        match (before, after) {
            (0, 0) => drop(self.gaps.remove(at)),
            (0, _) => self.gaps[at] = Gap { first: counter + 1, count: after, ..gap },
            (_, 0) => self.gaps[at].count = before,
            _ => {
                self.gaps[at].count = before;
                if self.gaps.len() < 2 * RANGES_MAX {
                    self.gaps.insert(at + 1, Gap { first: counter + 1, count: after, ..gap });
                }
            }
        }
        Some(gap)
    }

    fn count_lost(&mut self, count: u64) {
        let forgiven = count.min(self.forgiven);
        self.forgiven -= forgiven;
        let count = count - forgiven;
        self.lost = self.lost.wrapping_add(u32::try_from(count).unwrap_or(u32::MAX));
    }

    /// Whether any gap waits for a decision.
    pub fn has_gaps(&self) -> bool {
        !self.gaps.is_empty()
    }

    /// Ranges to ask for now: behind by three datagrams or 2 ms, each asked for once.
    pub fn missing(&mut self, now: Time) -> Vec<NackRange> {
        let mut ranges = Vec::new();
        let mut lost = 0;
        let (span, patience_ns) = self.repair.as_ref().map_or((0, 0), |repair| repair.patience());
        let (highest, reorders) = (self.highest, self.reorders);
        let reorder_ns = self.reorder_ns.max(patience_ns);
        let came = |window: &Window, counter| window.check(counter) == Err(DropReason::Replayed);
        self.gaps.retain_mut(|gap| {
            if let Some(asked) = gap.asked {
                return now.since(asked) < GIVE_UP_NS;
            }
            let behind = !reorders && highest >= gap.first + gap.count - 1 + REORDER_PACKETS + span;
            if !behind && now.since(gap.since) < reorder_ns {
                return true;
            }
            lost += gap.count;
            gap.asked = Some(now);
            // Of a long gap the newest part is still worth having.
            let count = gap.count.min(RANGE_MAX);
            let newest = gap.first + gap.count - count..gap.first + gap.count;
            if self.own.is_none() {
                ranges.push(NackRange { first: newest.start, count: count as u16 });
                return true;
            }
            // What came as a copy, or out of a symbol, is not asked for.
            let mut missing = newest.filter(|counter| !came(&self.window, *counter));
            if let Some(first) = missing.next() {
                let last = missing.next_back().unwrap_or(first);
                ranges.push(NackRange { first, count: (last + 1 - first) as u16 });
            }
            true
        });
        if lost > 0 {
            self.count_lost(lost);
        }
        ranges.truncate(RANGES_MAX);
        ranges
    }

    /// Whether something arrived since the last report, or that report has not been repeated yet.
    pub fn unreported(&self) -> bool {
        self.data.packets != self.told.packets || !self.told.echoed
    }

    /// The lane's line in a report that leaves now.
    pub fn report(&mut self, now: Time, path: u8) -> ReportEntry {
        self.told.echoed = self.told.packets == self.data.packets;
        self.told.packets = self.data.packets;
        ReportEntry {
            path,
            highest: self.data.highest,
            arrival_us: self.data.at.us() as u32,
            hold_us: u32::try_from(now.since(self.data.at) / 1_000).unwrap_or(u32::MAX),
            packets: self.packets,
            bytes: self.bytes,
            lost: self.lost,
        }
    }

    /// Datagrams and bytes since the last call, for the path's shared counters.
    pub fn take_traffic(&mut self) -> (u64, u64) {
        let new = (self.packets - self.published.0, self.bytes - self.published.1);
        self.published = (self.packets, self.bytes);
        new
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn lane(counters: &[u64]) -> RxLane {
        let mut lane = RxLane::new(8_192);
        for counter in counters {
            lane.commit(Time::ZERO, *counter, 100, || 0).unwrap();
        }
        lane
    }

    #[test]
    fn a_gap_is_asked_for_once_after_three_packets() {
        let mut lane = lane(&[0, 1, 4, 5]);
        assert!(lane.missing(Time::ZERO).is_empty());
        lane.commit(Time::ZERO, 6, 100, || 0).unwrap();
        let asked = lane.missing(Time::ZERO);
        assert_eq!((asked.len(), asked[0].first, asked[0].count), (1, 2, 2));
        assert!(lane.missing(Time::from_ms(5)).is_empty());
        assert_eq!(lane.report(Time::ZERO, 0).lost, 2);
        assert_eq!(lane.commit(Time::ZERO, 3, 100, || 0).unwrap().0, Place::Recovered);
        assert_eq!(lane.commit(Time::ZERO, 2, 100, || 0).unwrap().0, Place::Recovered);
        assert!(!lane.has_gaps());
        assert_eq!(lane.packets, 5, "recovered datagrams are not delivered by the path");
    }

    #[test]
    fn a_gap_is_asked_for_after_two_milliseconds_and_reordering_is_not_loss() {
        let mut lane = lane(&[0, 2]);
        assert!(lane.missing(Time::from_us(1_900)).is_empty());
        assert_eq!(lane.missing(Time::from_ms(2)).len(), 1);
        let mut lane = self::lane(&[0, 2, 1, 3]);
        assert!(lane.missing(Time::from_ms(9)).is_empty());
        assert_eq!(lane.report(Time::ZERO, 0).lost, 0);
    }

    #[test]
    fn replays_are_refused_and_gaps_are_bounded() {
        let mut lane = lane(&[5]);
        assert_eq!(lane.commit(Time::ZERO, 5, 1, || 0), Err(DropReason::Replayed));
        for counter in 3..3_000 {
            lane.commit(Time::ZERO, counter * 2, 1, || 0).unwrap();
        }
        assert!(lane.gaps.len() <= 2 * RANGES_MAX);
    }

    #[test]
    fn copies_over_another_path_are_taken_once_and_say_nothing_about_the_lane() {
        let mut lane = lane(&[0, 1]);
        lane.tell_copies();
        assert_eq!(lane.commit_copy(2), Ok(Place::Copied));
        assert_eq!((lane.packets, lane.report(Time::ZERO, 0).highest), (2, 0));
        // The original counts for its path, but is not forwarded again; a third one is refused.
        assert_eq!(lane.check(2), Ok(()));
        assert_eq!(lane.commit(Time::ZERO, 2, 100, || 0), Ok((Place::Newest, true)));
        assert_eq!(lane.packets, 3);
        assert_eq!(lane.check(2), Err(DropReason::Replayed));
        assert_eq!(lane.commit(Time::ZERO, 2, 100, || 0), Err(DropReason::Replayed));
        assert_eq!(lane.commit_copy(2), Err(DropReason::Replayed));
        // Where the original is lost, its path has lost it, and nobody asks for it.
        assert_eq!(lane.commit_copy(3), Ok(Place::Copied));
        for counter in 4..8 {
            assert_eq!(lane.commit(Time::ZERO, counter, 100, || 0), Ok((Place::Newest, false)));
        }
        assert!(lane.missing(Time::ZERO).is_empty());
        assert_eq!(lane.report(Time::ZERO, 0).lost, 1);
        // One that was asked for is recovered.
        lane.commit(Time::ZERO, 12, 100, || 0).unwrap();
        assert_eq!(lane.missing(Time::from_ms(9)).len(), 1);
        assert_eq!(lane.commit_copy(9), Ok(Place::Recovered));
    }

    #[test]
    fn a_restored_datagram_is_lost_all_the_same_and_not_asked_for() {
        let rtt = || 40_000;
        let mut lane = lane(&[0, 1]);
        lane.tell_copies();
        for counter in [3, 4, 6, 7] {
            lane.commit(Time::ZERO, counter, 100, rtt).unwrap();
        }
        assert_eq!(lane.commit_restored(2), Ok(Place::Copied));
        assert_eq!(lane.commit_restored(2), Err(DropReason::Replayed));
        for counter in 8..12 {
            lane.commit(Time::ZERO, counter, 100, rtt).unwrap();
        }
        let asked = lane.missing(Time::ZERO);
        assert_eq!((asked.len(), asked[0].first, asked[0].count), (1, 5, 1));
        assert_eq!((lane.report(Time::ZERO, 0).lost, lane.packets), (2, 10));
        // It was late, not lost: that counts in the other direction.
        assert_eq!(lane.commit(Time::from_ms(4), 2, 100, rtt), Ok((Place::Late, true)));
        assert_eq!((lane.forgiven, lane.packets, lane.reorders), (1, 11, true));
    }

    #[test]
    fn a_path_that_reorders_teaches_patience() {
        let rtt = || 40_000;
        let mut lane = lane(&[0, 2, 3, 4, 5]);
        assert_eq!(lane.missing(Time::ZERO).len(), 1);
        // 5 ms later, far too soon for a repeat over a round trip of 40 ms.
        assert_eq!(lane.commit(Time::from_ms(5), 1, 100, rtt).unwrap().0, Place::Late);
        for counter in 7..20 {
            lane.commit(Time::from_ms(6), counter, 100, rtt).unwrap();
        }
        assert!(
            lane.missing(Time::from_ms(11)).is_empty(),
            "neither three packets nor 2 ms prove anything here"
        );
        assert_eq!(lane.missing(Time::from_ms(13)).len(), 1);
        assert_eq!(lane.commit(Time::from_ms(60), 6, 100, rtt).unwrap().0, Place::Recovered);
        assert_eq!(lane.report(Time::from_ms(60), 0).lost, 1, "one of two was only late");
    }
}
