//! How loaded this machine is as a unit of a cluster (row D7).
//!
//! What counts is the time in which a worker could have worked: it worked, or it waited for a CPU that another program had, or
//! that the limit of its control group withheld. So a unit whose machine does something else looks as loaded as it is. A
//! CPU that the hypervisor took counts as work, since the clock went on.

use std::sync::Mutex;

/// The last look counts this much of a reading, in quarters: a moment is no load.
const WEIGHT: u64 = 1;
/// Looks closer together are one, ns.
const WINDOW_NS: u64 = 500_000_000;

/// Times of one worker since it started, ns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CoreTimes {
    /// Not asleep, by the clock.
    pub busy_ns: u64,
    /// On a CPU, or waiting for one, as the scheduler counts it; 0 where it does not tell.
    pub runnable_ns: u64,
}

/// Load of the busiest worker over the last few seconds.
#[derive(Debug, Default)]
pub(crate) struct LoadMeter(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    since_ns: u64,
    last: Vec<CoreTimes>,
    /// Load of each core, in thousandths.
    permille: Vec<u64>,
}

impl LoadMeter {
    /// Percent at `now_ns`; `times`: of each worker, by core.
    pub fn percent(&self, now_ns: u64, times: &[CoreTimes]) -> u8 {
        let mut state = super::lock(&self.0);
        let elapsed_ns = now_ns.saturating_sub(state.since_ns);
        if elapsed_ns >= WINDOW_NS {
            state.look(elapsed_ns, times);
            state.since_ns = now_ns;
        }
        let busiest = state.permille.iter().max().copied().unwrap_or(0);
        u8::try_from(busiest / 10).unwrap_or(100)
    }
}

impl State {
    fn look(&mut self, elapsed_ns: u64, times: &[CoreTimes]) {
        let first = self.last.len() != times.len();
        let before = std::mem::replace(&mut self.last, times.to_vec());
        if first {
            // What was before is not known.
            self.permille = vec![0; times.len()];
            return;
        }
        for ((load, now), before) in self.permille.iter_mut().zip(times).zip(before) {
            let busy_ns = now.busy_ns.saturating_sub(before.busy_ns);
            let runnable_ns = now.runnable_ns.saturating_sub(before.runnable_ns);
            let permille = (busy_ns.max(runnable_ns).saturating_mul(1_000) / elapsed_ns).min(1_000);
            *load = (*load * (4 - WEIGHT) + permille * WEIGHT) / 4;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    #[test]
    fn waiting_for_a_cpu_is_load_and_a_moment_is_not() {
        let meter = LoadMeter::default();
        let mut now = CoreTimes::default();
        let mut seconds = |from: u64, count: u64, busy_percent: u64, runnable_percent: u64| {
            let mut last = 0;
            for second in from..from + count {
                now.busy_ns += S / 100 * busy_percent;
                now.runnable_ns += S / 100 * runnable_percent;
                last = meter.percent(second * S, &[CoreTimes::default(), now]);
            }
            last
        };
        assert_eq!(seconds(1, 1, 90, 90), 0, "nothing is known of the time before");
        assert_eq!(seconds(2, 1, 80, 0), 20);
        assert!((75..=80).contains(&seconds(3, 12, 80, 10)));
        assert!((88..=90).contains(&seconds(15, 12, 10, 90)), "it waits for its CPU");
        assert!((1..=3).contains(&seconds(27, 20, 2, 1)));
        // What is asked for again at once is not counted anew.
        let last = meter.percent(46 * S, &[]);
        assert_eq!(meter.percent(46 * S + 1, &[CoreTimes { busy_ns: u64::MAX, runnable_ns: 0 }; 2]), last);
    }
}
