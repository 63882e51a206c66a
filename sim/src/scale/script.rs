//! Events of the day: units come, go, change their share, die and stand still, and the manager starts anew.

use cluster::manager::{Command, Standing, Step};

use super::{MS, SECOND, Scenario, World};

/// Events to come.
#[derive(Default)]
pub(super) struct Script {
    /// Times of scale events, latest first.
    times: Vec<u64>,
    /// Events that follow a scale event soon: a crash, a restart of the manager, a unit that stands still.
    soon: Vec<(u64, Soon)>,
}

#[derive(Clone, Copy)]
enum Soon {
    Event,
    Crash,
    RestartManager,
    Stall,
}

impl Script {
    pub fn new(scenario: &Scenario, start_ns: u64, rng: &mut fastrand::Rng) -> Self {
        let span = u64::from(scenario.seconds) * SECOND;
        let mut times: Vec<u64> = (0..scenario.events).map(|_| start_ns + rng.u64(0..span)).collect();
        times.sort_unstable_by(|one, other| other.cmp(one));
        Self { times, soon: Vec::new() }
    }

    pub fn next_ns(&self) -> u64 {
        let soon = self.soon.iter().map(|(at_ns, _)| *at_ns);
        soon.chain(self.times.last().copied()).min().unwrap_or(u64::MAX)
    }
}

impl World {
    /// Carries out what is due.
    pub(super) fn script_until(&mut self, end_ns: u64) {
        while self.script.times.last().is_some_and(|at_ns| *at_ns <= end_ns) {
            self.script.times.pop();
            self.scale_event();
        }
        let due: Vec<Soon> =
            self.script.soon.extract_if(.., |(at_ns, _)| *at_ns <= end_ns).map(|soon| soon.1).collect();
        for soon in due {
            match soon {
                Soon::Event => self.scale_event(),
                Soon::Crash => self.crash_one(),
                Soon::RestartManager => self.restart_manager(),
                Soon::Stall => self.stall_one(),
            }
        }
    }

    fn scale_event(&mut self) {
        self.report.events += 1;
        self.watch();
        let steps = match self.rng.u8(..100) {
            0..65 => self.step().into_iter().collect(),
            65..80 => {
                let node = self.any_standing(|standing| standing == Standing::Active);
                let weight = self.rng.u32(500..2_000);
                node.map(|node| Step::Weight { node, weight }).into_iter().collect()
            }
            80..90 => {
                self.crash_one();
                Vec::new()
            }
            _ => {
                let mut steps: Vec<Step> = (0..self.rng.usize(2..=5)).filter_map(|_| self.step()).collect();
                steps.sort_by_key(Step::node);
                steps.dedup_by_key(|step| step.node());
                steps
            }
        };
        if !steps.is_empty() {
            let events = self.report.events;
            self.manager.command(self.now_ns, events, Command::Change(steps));
            self.carry_out();
        }
        for (soon, percent) in
            [(Soon::Event, 10), (Soon::Crash, 8), (Soon::RestartManager, 10), (Soon::Stall, 30)]
        {
            if self.rng.u8(..100) < percent {
                let at_ns = self.now_ns + self.rng.u64(0..3_000 * MS);
                self.script.soon.push((at_ns, soon));
            }
        }
    }

    /// A unit is added, or one is drained; more of those of which more is left.
    fn step(&mut self) -> Option<Step> {
        let count =
            |standing| self.manager.state().units.values().filter(|unit| unit.standing == standing).count();
        let active = count(Standing::Active) - usize::from(self.scenario.dispatchers);
        let share = active * 100 / usize::from(self.scenario.planes);
        let adds = match share {
            0..75 => 90,
            75..90 => 55,
            _ => 10,
        };
        if self.rng.u8(..100) >= adds {
            let node = self.any_standing(|standing| standing == Standing::Active)?;
            return Some(Step::Drain { node, remove: true, migrate: false });
        }
        let free = |node: &u16| {
            let unit = self.manager.state().units.get(node);
            unit.is_none_or(|unit| unit.standing == Standing::Free)
        };
        let free: Vec<u16> = (1..=self.scenario.planes).filter(free).collect();
        let node = *self.rng.choice(&free)?;
        if !self.machines[usize::from(node)].running {
            self.start(node);
        }
        Some(self.enrol(node))
    }

    fn any_standing(&mut self, wanted: impl Fn(Standing) -> bool) -> Option<u16> {
        let units = &self.manager.state().units;
        let planes =
            units.iter().filter(|(node, unit)| **node <= self.scenario.planes && wanted(unit.standing));
        let nodes: Vec<u16> = planes.map(|(node, _)| *node).collect();
        self.rng.choice(&nodes).copied()
    }

    fn crash_one(&mut self) {
        let node =
            self.any_standing(|standing| matches!(standing, Standing::Active | Standing::Draining { .. }));
        if let Some(node) = node.filter(|node| self.machines[usize::from(*node)].running) {
            self.crash(node);
        }
    }

    /// A unit gets no CPU for 300 ms.
    fn stall_one(&mut self) {
        if let Some(node) = self.any_standing(Standing::takes_part) {
            self.report.faults.stalls += 1;
            self.machines[usize::from(node)].stalled_until_ns = self.now_ns + 300 * MS;
        }
    }
}
