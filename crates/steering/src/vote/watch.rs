//! Which cores do their work: finds those that hang, and trusts them again after a while (row C7).
//!
//! Each worker counts its rounds. A core is *stuck* when its count stands still while work waits for it, for
//! [`Limits::stuck_ns`] of watched time. An idle core may sleep as long as it likes. A stuck core whose count moves
//! again is on probation for [`Limits::probation_ns`], twice as long each time it falls back, and takes part again
//! when it passes.
//!
//! The watcher itself may be late (a busy machine, a suspended one): time that nobody watched is not held
//! against a core.

use crate::cores::CoreSet;

/// Probation is doubled at most this many times.
const DOUBLINGS_MAX: u32 = 6;

/// A core that has worked for this many probations is as good as new.
const FORGIVEN_AFTER: u64 = 16;

/// How patient a watch is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// How long a count may stand still while work waits.
    pub stuck_ns: u64,
    /// How long a stuck core must work before it takes part again.
    pub probation_ns: u64,
}

impl Default for Limits {
    /// Half a second; two seconds.
    fn default() -> Self {
        Self { stuck_ns: 500_000_000, probation_ns: 2_000_000_000 }
    }
}

/// One look at a core.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Look {
    /// Its count of rounds.
    pub rounds: u64,
    /// Something waits for it.
    pub has_work: bool,
    /// Time since the last look for which the scheduler let it wait for a CPU, ns: not held against it.
    pub waited_ns: u64,
}

/// Result of one look at a core.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Finding {
    /// As before.
    Unchanged,
    /// It hangs: take its buckets ([`super::replan`]).
    Stuck,
    /// It has worked for long enough: it may have buckets again.
    Back,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Working { since_ns: u64 },
    Stuck,
    Probation { since_ns: u64 },
}

#[derive(Clone, Copy, Debug)]
struct Core {
    state: State,
    rounds: u64,
    seen_ns: u64,
    /// Watched time for which the count has stood still.
    still_ns: u64,
    relapses: u32,
}

/// Watches cores 0 to n − 1.
#[derive(Clone, Debug)]
pub struct Watch {
    limits: Limits,
    cores: Vec<Core>,
}

impl Watch {
    /// Watches `cores` cores, all of them trusted.
    #[must_use]
    pub fn new(cores: u8, limits: Limits, now_ns: u64) -> Self {
        let core = Core {
            state: State::Working { since_ns: now_ns },
            rounds: 0,
            seen_ns: now_ns,
            still_ns: 0,
            relapses: 0,
        };
        Self { limits, cores: vec![core; usize::from(cores)] }
    }

    /// Cores that may own buckets.
    #[must_use]
    pub fn usable(&self) -> CoreSet {
        let working = |(_, core): &(u8, &Core)| matches!(core.state, State::Working { .. });
        (0u8..).zip(&self.cores).filter(working).map(|(number, _)| number).collect()
    }

    /// Looks at one core. Look several times within [`Limits::stuck_ns`]: one look proves at most a quarter of it.
    pub fn look(&mut self, core: u8, look: Look, now_ns: u64) -> Finding {
        let Look { rounds, has_work, waited_ns } = look;
        let limits = self.limits;
        let Some(core) = self.cores.get_mut(usize::from(core)) else { return Finding::Unchanged };
        let moved = rounds != core.rounds;
        let could_run_ns = now_ns.saturating_sub(core.seen_ns).saturating_sub(waited_ns);
        let watched = could_run_ns.min(limits.stuck_ns.div_ceil(4));
        core.rounds = rounds;
        core.seen_ns = now_ns;
        core.still_ns = if moved || !has_work { 0 } else { core.still_ns + watched };
        let stuck = core.still_ns >= limits.stuck_ns;
        let probation_ns = limits.probation_ns.saturating_mul(1 << core.relapses.min(DOUBLINGS_MAX));
        match core.state {
            State::Working { .. } if stuck => {
                core.state = State::Stuck;
                return Finding::Stuck;
            }
            State::Working { since_ns } => {
                let forgiven_ns = limits.probation_ns.saturating_mul(FORGIVEN_AFTER);
                if now_ns.saturating_sub(since_ns) >= forgiven_ns {
                    core.relapses = 0;
                }
            }
            State::Stuck if moved => core.state = State::Probation { since_ns: now_ns },
            State::Stuck => {}
            State::Probation { .. } if stuck => {
                core.state = State::Stuck;
                core.relapses += 1;
            }
            State::Probation { since_ns } if now_ns.saturating_sub(since_ns) >= probation_ns => {
                core.state = State::Working { since_ns: now_ns };
                core.relapses += 1;
                return Finding::Back;
            }
            State::Probation { .. } => {}
        }
        Finding::Unchanged
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    const LIMITS: Limits = Limits { stuck_ns: 100 * MS, probation_ns: 400 * MS };

    fn at(rounds: u64, has_work: bool) -> Look {
        Look { rounds, has_work, waited_ns: 0 }
    }

    /// Looks every 10 ms from `from_ms` to `to_ms`; the findings that changed something, with their time.
    fn looks(
        watch: &mut Watch,
        times_ms: std::ops::Range<u64>,
        work: bool,
        rounds: impl Fn(u64) -> u64,
    ) -> Vec<(u64, Finding)> {
        times_ms
            .step_by(10)
            .map(|ms| (ms, watch.look(0, at(rounds(ms), work), ms * MS)))
            .filter(|(_, finding)| *finding != Finding::Unchanged)
            .collect()
    }

    #[test]
    fn a_core_that_stands_still_with_work_is_stuck_and_comes_back_after_probation() {
        let mut watch = Watch::new(2, LIMITS, 0);
        assert_eq!(looks(&mut watch, 0..1_000, true, |ms| ms + 1), []);
        assert_eq!(looks(&mut watch, 1_000..2_000, true, |_| 991), [(1_090, Finding::Stuck)]);
        assert_eq!(watch.usable(), [1].into_iter().collect());
        assert_eq!(looks(&mut watch, 2_000..2_400, true, |ms| ms), []);
        assert_eq!(looks(&mut watch, 2_400..3_000, true, |ms| ms), [(2_400, Finding::Back)]);
        assert_eq!(watch.usable(), CoreSet::first(2));
    }

    #[test]
    fn an_idle_core_may_stand_still() {
        let mut watch = Watch::new(1, LIMITS, 0);
        assert_eq!(looks(&mut watch, 0..60_000, false, |_| 7), []);
        assert_eq!(watch.usable().len(), 1);
    }

    #[test]
    fn each_relapse_doubles_the_probation() {
        let mut watch = Watch::new(1, LIMITS, 0);
        let mut start = 0;
        for want in [400, 800, 1_600] {
            let stuck = looks(&mut watch, start..start + 200, true, |_| 0);
            assert_eq!(stuck.len(), 1, "{want}: {stuck:?}");
            start += 200;
            let back = looks(&mut watch, start..start + want + 10, true, |ms| ms);
            assert_eq!(back, [(start + want, Finding::Back)]);
            start += want + 10;
        }
        // 16 × 400 ms of work: forgotten.
        looks(&mut watch, start..start + 7_000, true, |ms| ms);
        start += 7_000;
        looks(&mut watch, start..start + 200, true, |_| 0);
        start += 200;
        let back = looks(&mut watch, start..start + 1_000, true, |ms| ms);
        assert_eq!(back, [(start + 400, Finding::Back)]);
    }

    #[test]
    fn a_core_on_probation_that_hangs_again_waits_anew() {
        let mut watch = Watch::new(1, LIMITS, 0);
        looks(&mut watch, 0..200, true, |_| 0);
        assert_eq!(looks(&mut watch, 200..400, true, |ms| ms), []);
        assert_eq!(looks(&mut watch, 400..900, true, |_| 390), []);
        assert!(watch.usable().is_empty());
        assert_eq!(looks(&mut watch, 900..2_000, true, |ms| ms), [(1_700, Finding::Back)]);
    }

    #[test]
    fn time_for_which_it_got_no_cpu_does_not_count() {
        let mut watch = Watch::new(1, LIMITS, 0);
        let starved = Look { waited_ns: 10 * MS, ..at(1, true) };
        for ms in (0..5_000).step_by(10) {
            assert_eq!(watch.look(0, starved, ms * MS), Finding::Unchanged);
        }
        assert_eq!(looks(&mut watch, 5_000..5_200, true, |_| 1).len(), 1, "now it could run and does not");
    }

    #[test]
    fn time_that_nobody_watched_does_not_count() {
        let mut watch = Watch::new(1, LIMITS, 0);
        watch.look(0, at(1, true), 10 * MS);
        // The machine slept for an hour: three looks later the core has had its chance to move.
        let hour = 3_600_000 * MS;
        assert_eq!(watch.look(0, at(1, true), hour), Finding::Unchanged);
        assert_eq!(watch.look(0, at(1, true), hour + 25 * MS), Finding::Unchanged);
        assert_eq!(watch.look(0, at(1, true), hour + 50 * MS), Finding::Unchanged);
        assert_eq!(watch.look(0, at(1, true), hour + 75 * MS), Finding::Stuck);
    }

    #[test]
    fn a_core_that_is_not_there_is_nothing() {
        let mut watch = Watch::new(1, LIMITS, 0);
        assert_eq!(watch.look(9, at(1, true), MS), Finding::Unchanged);
        assert_eq!(watch.usable(), CoreSet::first(1));
    }
}
