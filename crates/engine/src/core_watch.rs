//! Which cores take part (rows C7, C9): those that hang lose their buckets, busy ones give some to idle ones, and the operator
//! takes them away and gives them back. Whatever changes, tunnel, interfaces and the kernel's programs follow together.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use steering::cores::{CoreSet, CoreState};
use steering::ownership::{ClassCores, Ownership};
use steering::vote::watch::{Finding, Limits, Look, Watch};
use steering::vote::{Arbiter, Decision, Settings, Vote, replan, retire_owners};

use crate::Shared as Engine;
use crate::gateway::{Shared, lock, open};

/// A core whose count stands still for so many looks is woken: one that only sleeps then moves, one that hangs does not.
const STILL_LOOKS: u32 = 4;

/// A core that works on one round for so long, while it could run, hangs. Its flows must be elsewhere 400 ms after it
/// stopped, looks and the peers' notice included.
const STUCK_NS: u64 = 200_000_000;

/// Cores that may own no buckets, as operator and control thread want it.
pub(crate) struct Permissions {
    pub cores: usize,
    /// The operator wants no new flows on these.
    pub drained: CoreSet,
    /// These hang.
    pub stuck: CoreSet,
    /// Buckets move from busy cores to idle ones.
    pub rebalance: bool,
    /// Cores for classes, as configured.
    pub classes: ClassCores,
}

impl Permissions {
    pub fn new(cores: usize) -> Self {
        Self {
            cores,
            drained: CoreSet::default(),
            stuck: CoreSet::default(),
            rebalance: true,
            classes: ClassCores::default(),
        }
    }

    /// Every core's, by number.
    pub fn states(&self) -> Vec<CoreState> {
        let reserved = self.classes.all_reserved();
        let state = |core: u8| match (self.stuck.contains(core), self.drained.contains(core)) {
            (true, _) => CoreState::Stuck,
            (false, true) => CoreState::Draining,
            (false, false) if reserved.contains(core) => CoreState::Reserved,
            (false, false) => CoreState::Active,
        };
        (0..self.cores as u8).map(state).collect()
    }
}

/// The control thread's view of the cores.
pub(crate) struct CoreWatch {
    arbiter: Arbiter,
    watch: Watch,
    /// By core: its count of rounds, and for how many looks it has been that.
    still: Vec<(u64, u32)>,
    /// By core: CPU time that its thread had had at the last look at it, ns.
    ran_ns: Vec<u64>,
    looked_ns: u64,
    busy_ns: Vec<u64>,
    voted_ns: u64,
}

impl CoreWatch {
    pub fn new(cores: usize, now_ns: u64) -> Self {
        let limits = Limits { stuck_ns: STUCK_NS, ..Limits::default() };
        Self {
            arbiter: Arbiter::new(Settings::default()),
            watch: Watch::new(cores as u8, limits, now_ns),
            still: vec![(0, 0); cores],
            ran_ns: vec![0; cores],
            looked_ns: now_ns,
            busy_ns: vec![0; cores],
            voted_ns: now_ns,
        }
    }

    /// How long the scheduler let a core wait for a CPU in the last `elapsed_ns`: all of it, if its thread could run and did
    /// not. Asked only about a core whose count stands still.
    fn waited(&mut self, engine: &Engine, core: usize, elapsed_ns: u64) -> u64 {
        let thread = engine.threads.get(core).map_or(0, |thread| thread.load(Relaxed));
        let (Some(view), Some(ran_ns)) = (linux::affinity::thread_view(thread), self.ran_ns.get_mut(core))
        else {
            return 0;
        };
        let ran = view.ran_ns != std::mem::replace(ran_ns, view.ran_ns);
        if view.runnable && !ran { elapsed_ns } else { 0 }
    }

    /// Looks at every core. One that hangs loses its buckets; one that came back may have some again.
    pub fn look(&mut self, engine: &Engine) {
        let now_ns = linux::clock::monotonic_ns();
        let elapsed_ns = now_ns.saturating_sub(std::mem::replace(&mut self.looked_ns, now_ns));
        let mut changed = false;
        for core in 0..engine.counters.len() {
            let gateway = &engine.gateway;
            let rounds = gateway.rounds.get(core).map_or(0, |rounds| rounds.load(Relaxed));
            let bell = engine.doorbells.get(core);
            if let (Some(still), Some(bell)) = (self.still.get_mut(core), bell) {
                let looks = if still.0 == rounds { still.1 + 1 } else { 0 };
                *still = (rounds, looks);
                // From now on it counts as awake: a core that hangs in its sleep is found, too.
                if looks > 0 && looks.is_multiple_of(STILL_LOOKS) {
                    bell.ring();
                }
            }
            let has_work = !bell.is_some_and(crate::doorbell::Doorbell::is_asleep);
            let stands_still = has_work && self.still.get(core).is_some_and(|(_, looks)| *looks > 0);
            let waited_ns = if stands_still { self.waited(engine, core, elapsed_ns) } else { 0 };
            let look = Look { rounds, has_work, waited_ns };
            match self.watch.look(core as u8, look, now_ns) {
                Finding::Unchanged => continue,
                Finding::Stuck => {
                    tracing::error!(core, "a core hangs; its buckets go to the others, its flows are lost");
                    lock(&gateway.cores).stuck.insert(core as u8);
                }
                Finding::Back => {
                    tracing::warn!(core, "a core that hung works again");
                    lock(&gateway.cores).stuck.remove(core as u8);
                }
            }
            changed = true;
        }
        if changed {
            engine.gateway.replan(engine);
            self.arbiter.changed_elsewhere(now_ns);
        }
    }

    /// Votes, and what follows from them; buckets whose earlier owners have no flow left lose their history.
    pub fn balance(&mut self, engine: &Engine) {
        let now_ns = linux::clock::monotonic_ns();
        let elapsed_ns = now_ns.saturating_sub(self.voted_ns).max(1);
        self.voted_ns = now_ns;
        for (core, counters) in engine.counters.iter().enumerate() {
            let busy_ns = counters.busy_ns.get();
            let last = self.busy_ns.get_mut(core).map_or(0, |last| std::mem::replace(last, busy_ns));
            let load = (busy_ns.saturating_sub(last) * 255 / elapsed_ns).min(255) as u8;
            self.arbiter.vote(Vote { core: core as u8, load, priority: 1, at_ns: now_ns });
        }
        if engine.gateway.progress.are_flows_counted(now_ns) {
            retire_chains(engine);
        }
        let gateway = &engine.gateway;
        let (rebalance, usable) = {
            let shared = lock(&gateway.cores);
            let states = shared.states();
            let active = (0u8..).zip(states).filter(|(_, state)| *state == CoreState::Active);
            (shared.rebalance, active.map(|(core, _)| core).collect::<CoreSet>())
        };
        // Services keep live flows on their cores when a bucket moves; peers follow the table at once, so that each of their
        // packets would take a ring for as long as such a flow lives. What load alone makes worth moving stays there.
        let has_peers = engine.node.bonds.load().iter().next().is_some();
        if !rebalance || usable.len() < 2 || has_peers {
            return;
        }
        gateway.change_table(engine, |ownership| {
            let era = ownership.table.era();
            let works = (0u8..).zip(&gateway.reports).filter(|(core, _)| ownership.is_alive(*core));
            let settled = works.into_iter().all(|(_, report)| lock(report).table_era == era);
            let work = gateway.live_by_bucket();
            let decision = self.arbiter.decide(&ownership.table, &work, &usable, settled, now_ns);
            let Decision::Change { table, moves } = decision else { return None };
            tracing::info!(era = table.era(), moves = moves.len(), "buckets move to idle cores");
            Some(ownership.with_table(table, ownership.alive))
        });
    }
}

/// An earlier owner leaves a chain when it works by this table and has no flow in the bucket.
fn retire_chains(engine: &Engine) {
    let gateway = &engine.gateway;
    let live = |core: u16, bucket: usize| {
        let report = lock(gateway.reports.get(usize::from(core))?);
        Some((report.table_era, report.live_by_bucket.get(bucket).copied().unwrap_or(0)))
    };
    gateway.change_table(engine, |ownership| {
        let table = retire_owners(&ownership.table, live)?;
        Some(ownership.with_table(table, ownership.alive))
    });
}

impl Shared {
    /// Live flows of each bucket over all cores.
    pub(crate) fn live_by_bucket(&self) -> Vec<u32> {
        let mut all = vec![0u32; self.ownership.load().table.buckets()];
        for report in &self.reports {
            for (sum, live) in all.iter_mut().zip(&lock(report).live_by_bucket) {
                *sum = sum.saturating_add(*live);
            }
        }
        all
    }

    /// Puts the ownership in force that follows from that of now, if any does: workers first, then the kernel's steering. One at a
    /// time, or what another thread has decided meanwhile would be undone.
    fn change_table(&self, engine: &Engine, next: impl FnOnce(&Ownership) -> Option<Ownership>) {
        let _one = lock(&self.table_changes);
        let before = self.ownership.load_full();
        if let Some(next) = next(&before) {
            self.put(next, &before, engine);
        }
    }

    fn put(&self, next: Ownership, before: &Ownership, engine: &Engine) {
        let (next, alive) = (Arc::new(next), before.alive);
        self.ownership.store(Arc::clone(&next));
        self.changed();
        engine.wake_all();
        lock(&self.opened).follow_table(&next);
        if let Some(program) = &*lock(&self.tun_program)
            && let Err(error) = program.update_table(next.table.owners())
        {
            tracing::warn!(%error, "the kernel fills TUN queues by the old table; rings mend it");
        }
        if next.alive != alive {
            open::follow_cores(self);
            engine.wake_all();
        }
    }

    /// A new table after cores changed their state.
    pub(crate) fn replan(&self, engine: &Engine) {
        self.change_table(engine, |ownership| {
            let (states, classes) = {
                let cores = lock(&self.cores);
                (cores.states(), cores.classes.clone())
            };
            let of_state = |wanted: fn(CoreState) -> bool| -> CoreSet {
                (0u8..).zip(&states).filter(|(_, state)| wanted(**state)).map(|(core, _)| core).collect()
            };
            let alive = of_state(|state| state != CoreState::Stuck);
            let drained = of_state(|state| state == CoreState::Draining);
            match replan(&ownership.table, &states, &self.live_by_bucket()) {
                Ok(table) => {
                    let classes = classes.within(&alive.without(&drained));
                    Some(ownership.with_table(table, alive).with_classes(&classes))
                }
                Err(error) => {
                    tracing::error!(%error, "no bucket table without this core; it keeps its buckets");
                    None
                }
            }
        });
    }
}
