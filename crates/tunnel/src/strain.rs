//! Paths beyond the limits of their WAN: a round trip that takes too long, too much loss, too many routers (row T12).
//!
//! Such a path is of the last tier until it is better: it carries data only while there is no other. The round trip is
//! measured all the time, by pings where there is no data; the queue that our own data makes does not count. Loss shows only where
//! data goes: a path that was left for it is tried again after a pause, which doubles as long as that is no use.

use crate::path::Path;
use crate::time::Time;

/// Tier of a path beyond its limits, before that of WANs whose quota is used up.
pub const STRAINED_TIER: u8 = 254;
/// A limit must be passed for so long.
const PASSED_NS: u64 = 1_000_000_000;
/// A path comes back when it has been below 9/10 of the limit for so long.
const BETTER_NS: u64 = 3_000_000_000;
/// Pause before a path that lost too much is tried again, at first …
const PAUSE_NS: u64 = 20_000_000_000;
/// … and at most.
const PAUSE_NS_MAX: u64 = 600_000_000_000;

/// Limits of a WAN that only this end keeps to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bounds {
    /// Most that we send over it, bytes per second.
    pub rate_max: Option<u64>,
    /// We send no data over it.
    pub may_not_send: bool,
    /// Longest round trip, µs.
    pub latency_max_us: Option<u32>,
    /// Most lost datagrams of 10,000.
    pub loss_max: Option<u16>,
    /// Most routers on the peer's way here.
    pub hops_max: Option<u8>,
}

/// Measurements of a path.
#[derive(Clone, Copy, Debug, Default)]
struct Measured {
    rtt_us: u32,
    /// Lost datagrams of 10,000.
    loss: u16,
    hops: Option<u8>,
}

/// Whether a path is beyond its limits.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Strain {
    strained: bool,
    /// Since when the measurements contradict that.
    otherwise_since: Option<Time>,
    /// Strained by loss: not before this time can it be better, …
    until: Time,
    /// … and how long it was the last time.
    pause_ns: u64,
}

impl Strain {
    /// Tier of a path that would be of tier `tier`.
    pub fn tier(&self, tier: u8) -> u8 {
        if self.strained { tier.max(STRAINED_TIER) } else { tier }
    }

    /// Looks at a path's measurements. Whether something changed.
    pub fn look(&mut self, now: Time, path: &Path, bounds: &Bounds) -> bool {
        let rtt_us = path.rtt_us().saturating_sub(path.queue_us());
        let loss = (path.delivery().0 * 10_000.0) as u16;
        self.update(now, Measured { rtt_us, loss, hops: path.hops() }, bounds)
    }

    fn update(&mut self, now: Time, measured: Measured, bounds: &Bounds) -> bool {
        let Measured { rtt_us, loss, hops } = measured;
        if bounds.latency_max_us.is_none() && bounds.loss_max.is_none() && bounds.hops_max.is_none() {
            return std::mem::take(self).strained;
        }
        let far = bounds.hops_max.is_some_and(|max| hops.is_some_and(|hops| hops > max));
        let late = |share: u32| {
            bounds
                .latency_max_us
                .is_some_and(|max| u64::from(rtt_us) * 10 > u64::from(max) * u64::from(share))
        };
        let lossy = bounds.loss_max.is_some_and(|max| loss > max);
        let otherwise =
            if self.strained { !late(9) && !far && now >= self.until } else { late(10) || far || lossy };
        if !otherwise {
            self.otherwise_since = None;
            return false;
        }
        let since = *self.otherwise_since.get_or_insert(now);
        if now.since(since) < if self.strained { BETTER_NS } else { PASSED_NS } {
            return false;
        }
        self.strained = !self.strained;
        self.otherwise_since = None;
        if self.strained && lossy && !late(10) && !far {
            // Soon after the last attempt: it is no better.
            let again = now.since(self.until) < self.pause_ns && self.pause_ns > 0;
            self.pause_ns = if again { (self.pause_ns * 2).min(PAUSE_NS_MAX) } else { PAUSE_NS };
            self.until = now.plus_ns(self.pause_ns);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds {
        rate_max: None,
        may_not_send: false,
        latency_max_us: Some(50_000),
        loss_max: Some(100),
        hops_max: Some(5),
    };

    /// Looks ten times a second; the times in seconds at which something changed.
    fn changes(strain: &mut Strain, seconds: std::ops::Range<u64>, rtt_us: u32, loss: u16) -> Vec<u64> {
        let measured = Measured { rtt_us, loss, hops: Some(5) };
        let at = |tenth: &u64| strain.update(Time::from_ms(tenth * 100), measured, &BOUNDS);
        (seconds.start * 10..seconds.end * 10).filter(at).map(|tenth| tenth / 10).collect()
    }

    #[test]
    fn a_path_beyond_its_latency_is_left_until_it_is_better() {
        let mut strain = Strain::default();
        assert_eq!(changes(&mut strain, 0..10, 49_000, 0), []);
        assert_eq!(changes(&mut strain, 10..20, 51_000, 0), [11]);
        assert_eq!((strain.tier(0), strain.tier(255)), (STRAINED_TIER, 255));
        // A little below the limit is not enough.
        assert_eq!(changes(&mut strain, 20..30, 48_000, 0), []);
        assert_eq!(changes(&mut strain, 30..40, 44_000, 0), [33]);
        assert_eq!(strain.tier(3), 3);
        let free = Bounds::default();
        assert!(changes(&mut strain, 40..50, 60_000, 0) == [41]);
        let measured = Measured { rtt_us: 60_000, ..Measured::default() };
        assert!(strain.update(Time::from_ms(51_000), measured, &free), "limits that are taken away");
        assert_eq!(strain.tier(3), 3);
    }

    #[test]
    fn a_path_by_too_many_routers_is_left_until_there_are_fewer() {
        let mut strain = Strain::default();
        let mut at = |ms, hops| {
            strain.update(Time::from_ms(ms), Measured { hops, ..Measured::default() }, &BOUNDS);
            strain.tier(0)
        };
        assert_eq!([at(0, None), at(1_500, None), at(2_000, Some(5)), at(9_000, Some(5))], [0; 4]);
        assert_eq!([at(10_000, Some(6)), at(10_900, Some(6)), at(11_000, Some(6))], [0, 0, STRAINED_TIER]);
        assert_eq!(
            [at(20_000, Some(5)), at(22_900, Some(5)), at(23_000, Some(5))],
            [STRAINED_TIER, STRAINED_TIER, 0]
        );
    }

    #[test]
    fn a_path_that_loses_too_much_is_tried_again_ever_more_seldom() {
        let mut strain = Strain::default();
        assert_eq!(changes(&mut strain, 0..10, 1_000, 101), [1]);
        // Nothing goes over it, nothing is lost: it is tried after 20 s and proves as bad.
        assert_eq!(changes(&mut strain, 10..26, 1_000, 0), [24]);
        assert_eq!(changes(&mut strain, 26..30, 1_000, 500), [27]);
        assert_eq!(changes(&mut strain, 30..100, 1_000, 0), [70]);
    }
}
