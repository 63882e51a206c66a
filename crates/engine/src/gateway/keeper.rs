//! The control core (rows C7, C9): a thread that keeps what all workers share in order. It learns neighbours from the
//! kernel, counts votes and moves buckets, takes buckets from a core that hangs, and lets slow starts go on.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use linux::netlink::{Neighbour, NeighbourChange, NeighbourMonitor, NeighbourState, Netlink};
use packet::attachment::InterfaceId;
use services::core::Neighbors;
use steering::cores::CoreSet;
use steering::table::BucketTable;
use steering::vote::watch::{Finding, Limits, Watch};
use steering::vote::{Arbiter, Decision, Settings, Vote, replan};

use super::lock;

/// The control core looks around this often.
const ROUND: Duration = Duration::from_millis(50);
/// Cores vote this often, in rounds.
const VOTE_ROUNDS: u64 = 2;
/// Neighbours that went stale are asked again this often, in rounds …
const PROBE_ROUNDS: u64 = 200;
/// … so many at once.
const PROBES_MAX: usize = 256;
/// A core whose count stands still for so many looks is woken: one that only sleeps then moves, one that hangs does not.
const STILL_LOOKS: u32 = 4;

/// What a core is allowed to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CoreState {
    /// Owns buckets.
    #[default]
    Active,
    /// The operator took its buckets; its flows end on it.
    Draining,
    /// It hangs: its buckets are elsewhere, its flows are lost until it moves again.
    Stuck,
}

/// What the control core shares with control.
pub(super) struct Shared {
    pub cores: usize,
    /// The operator wants no new flows on these.
    pub drained: CoreSet,
    /// These hang.
    pub stuck: CoreSet,
    pub rebalance: bool,
}

impl Shared {
    pub fn new(cores: usize) -> Self {
        Self { cores, drained: CoreSet::default(), stuck: CoreSet::default(), rebalance: true }
    }

    /// What each core may do.
    pub fn states(&self) -> Vec<CoreState> {
        let state = |core: u8| match (self.stuck.contains(core), self.drained.contains(core)) {
            (true, _) => CoreState::Stuck,
            (false, true) => CoreState::Draining,
            (false, false) => CoreState::Active,
        };
        (0..self.cores as u8).map(state).collect()
    }
}

/// The control core's own memory.
pub(crate) struct Keeper {
    engine: Arc<crate::Shared>,
    netlink: Option<Netlink>,
    monitor: Option<NeighbourMonitor>,
    neighbors: BTreeMap<(u32, IpAddr), Neighbour>,
    ports: Vec<(u32, InterfaceId)>,
    arbiter: Arbiter,
    watch: Watch,
    /// By core: its count of rounds, and for how many looks it has been that.
    still: Vec<(u64, u32)>,
    busy_ns: Vec<u64>,
    voted_ns: u64,
    round: u64,
}

impl Keeper {
    pub fn new(engine: Arc<crate::Shared>) -> Self {
        let cores = engine.counters.len();
        let now_ns = linux::clock::monotonic_ns();
        Self {
            engine,
            netlink: None,
            monitor: None,
            neighbors: BTreeMap::new(),
            ports: Vec::new(),
            arbiter: Arbiter::new(Settings::default()),
            watch: Watch::new(cores as u8, Limits::default(), now_ns),
            still: vec![(0, 0); cores],
            busy_ns: vec![0; cores],
            voted_ns: now_ns,
            round: 0,
        }
    }

    /// Runs until the engine stops.
    pub fn run(mut self) {
        while !self.engine.stop.load(Relaxed) {
            if self.engine.gateway.active.load(Relaxed) {
                self.round += 1;
                self.learn_neighbors();
                self.watch_cores();
                self.engine.gateway.free_retired();
                if self.round.is_multiple_of(VOTE_ROUNDS) {
                    self.balance();
                }
                if self.round.is_multiple_of(20) {
                    let now_ns = linux::clock::monotonic_ns();
                    let policy = self.engine.gateway.policy.load();
                    policy.balancer.tick(now_ns);
                    policy.nat.leases().tick(now_ns);
                }
            }
            // A neighbour that was just asked for answers within a millisecond: packets wait for it in the kernel.
            let pause = if self.engine.gateway.active.load(Relaxed) { ROUND / 10 } else { ROUND };
            for _ in 0..if pause < ROUND { 10 } else { 1 } {
                std::thread::sleep(pause);
                if self.engine.gateway.active.load(Relaxed) {
                    self.learn_neighbors();
                }
            }
        }
    }

    fn learn_neighbors(&mut self) {
        let ports = lock(&self.engine.gateway.opened).indices();
        let mut changed = ports != self.ports;
        if self.monitor.is_none() {
            self.monitor = NeighbourMonitor::open().ok();
            self.netlink = Netlink::open().ok();
            changed |= self.read_all();
        }
        let changes = self.monitor.as_mut().and_then(|monitor| monitor.read().ok()).unwrap_or_default();
        for change in changes {
            changed = true;
            match change {
                NeighbourChange::Changed(neighbour) => {
                    self.neighbors.insert((neighbour.index, neighbour.ip), neighbour);
                }
                NeighbourChange::Gone(neighbour) => {
                    self.neighbors.remove(&(neighbour.index, neighbour.ip));
                }
                NeighbourChange::Resync => {
                    self.read_all();
                }
            }
        }
        if self.round.is_multiple_of(PROBE_ROUNDS) {
            self.probe(&ports);
        }
        if changed {
            self.ports = ports;
            self.publish();
        }
    }

    fn read_all(&mut self) -> bool {
        let Some(all) = self.netlink.as_ref().and_then(|netlink| netlink.all_neighbours().ok()) else {
            return false;
        };
        self.neighbors =
            all.into_iter().map(|neighbour| ((neighbour.index, neighbour.ip), neighbour)).collect();
        true
    }

    /// The kernel does not see our packets: without a question now and then it would keep an address for ever.
    fn probe(&self, ports: &[(u32, InterfaceId)]) {
        let Some(netlink) = &self.netlink else { return };
        let ours = |neighbour: &&Neighbour| ports.iter().any(|(index, _)| *index == neighbour.index);
        let stale = self.neighbors.values().filter(|neighbour| neighbour.state == NeighbourState::Stale);
        for neighbour in stale.filter(ours).take(PROBES_MAX) {
            let _ = netlink.probe_neighbour(neighbour.index, neighbour.ip);
        }
    }

    fn publish(&self) {
        let place =
            |index: u32| self.ports.iter().find(|(known, _)| *known == index).map(|(_, place)| *place);
        let known: BTreeMap<_, _> = self
            .neighbors
            .values()
            .filter(|neighbour| neighbour.state.is_usable())
            .filter_map(|neighbour| Some(((place(neighbour.index)?, neighbour.ip), neighbour.mac?)))
            .collect();
        let gateway = &self.engine.gateway;
        let old = gateway.neighbors.load();
        if old.known == known {
            return;
        }
        gateway.put_neighbors(Neighbors { version: old.version + 1, known });
        self.engine.wake_all();
    }

    /// A core that hangs loses its buckets; one that came back may have some again.
    fn watch_cores(&mut self) {
        let now_ns = linux::clock::monotonic_ns();
        let mut changed = false;
        for core in 0..self.engine.counters.len() {
            let gateway = &self.engine.gateway;
            let rounds = gateway.rounds.get(core).map_or(0, |rounds| rounds.load(Relaxed));
            let bell = self.engine.doorbells.get(core);
            if let (Some(still), Some(bell)) = (self.still.get_mut(core), bell) {
                let looks = if still.0 == rounds { still.1 + 1 } else { 0 };
                *still = (rounds, looks % STILL_LOOKS);
                // From now on it counts as awake: a core that hangs in its sleep is found, too.
                if looks == STILL_LOOKS {
                    bell.ring();
                }
            }
            let has_work = !bell.is_some_and(crate::doorbell::Doorbell::is_asleep);
            match self.watch.look(core as u8, rounds, has_work, now_ns) {
                Finding::Unchanged => continue,
                Finding::Stuck => {
                    tracing::error!(core, "a core hangs; its buckets go to the others, its flows are lost");
                    lock(&gateway.keeper).stuck.insert(core as u8);
                }
                Finding::Back => {
                    tracing::warn!(core, "a core that hung works again");
                    lock(&gateway.keeper).stuck.remove(core as u8);
                }
            }
            changed = true;
        }
        if changed {
            let states = lock(&self.engine.gateway.keeper).states();
            self.engine.gateway.replan(&states, &self.engine);
            self.arbiter.changed_elsewhere(now_ns);
        }
    }

    /// Votes, and what follows from them; buckets whose earlier owners have no flow left lose their history.
    fn balance(&mut self) {
        let now_ns = linux::clock::monotonic_ns();
        let elapsed_ns = now_ns.saturating_sub(self.voted_ns).max(1);
        self.voted_ns = now_ns;
        for (core, counters) in self.engine.counters.iter().enumerate() {
            let busy_ns = counters.busy_ns.get();
            let last = self.busy_ns.get_mut(core).map_or(0, |last| std::mem::replace(last, busy_ns));
            let load = (busy_ns.saturating_sub(last) * 255 / elapsed_ns).min(255) as u8;
            self.arbiter.vote(Vote { core: core as u8, load, priority: 1, at_ns: now_ns });
        }
        self.retire_chains();
        let gateway = &self.engine.gateway;
        let (rebalance, usable) = {
            let shared = lock(&gateway.keeper);
            let states = shared.states();
            let active = (0u8..).zip(states).filter(|(_, state)| *state == CoreState::Active);
            (shared.rebalance, active.map(|(core, _)| core).collect::<CoreSet>())
        };
        if !rebalance || usable.len() < 2 {
            return;
        }
        let ownership = gateway.ownership.load_full();
        let era = ownership.table.era();
        let works = (0u8..).zip(&gateway.reports).filter(|(core, _)| ownership.is_alive(*core));
        let settled = works.into_iter().all(|(_, report)| lock(report).table_era == era);
        let work = gateway.live_by_bucket();
        if let Decision::Change { table, moves } =
            self.arbiter.decide(&ownership.table, &work, &usable, settled, now_ns)
        {
            tracing::info!(era = table.era(), moves = moves.len(), "buckets move to idle cores");
            gateway.put_table(table, ownership.alive, &self.engine);
        }
    }

    /// An earlier owner leaves a chain when it works by this table and has no flow in the bucket.
    fn retire_chains(&self) {
        let gateway = &self.engine.gateway;
        let ownership = gateway.ownership.load_full();
        let mut table = ownership.table.clone();
        let mut changed = false;
        for bucket in 0..table.buckets() {
            for unit in ownership.table.chain(bucket) {
                let report = gateway.reports.get(usize::from(*unit)).map(|report| {
                    let report = lock(report);
                    (report.table_era, report.live_by_bucket.get(bucket).copied().unwrap_or(0))
                });
                if report == Some((ownership.table.era(), 0)) {
                    changed |= table.retire(bucket, *unit);
                }
            }
        }
        if changed {
            gateway.put_table(table, ownership.alive, &self.engine);
        }
    }
}

impl super::Shared {
    /// Live flows of each bucket over all cores.
    pub(super) fn live_by_bucket(&self) -> Vec<u32> {
        let mut all = vec![0u32; self.ownership.load().table.buckets()];
        for report in &self.reports {
            for (sum, live) in all.iter_mut().zip(&lock(report).live_by_bucket) {
                *sum = sum.saturating_add(*live);
            }
        }
        all
    }

    /// Puts a bucket table in force: workers first, then the kernel's steering.
    pub(super) fn put_table(&self, table: BucketTable, alive: CoreSet, engine: &crate::Shared) {
        let before = self.ownership.load_full();
        let next = Arc::new(before.with_table(table, alive));
        self.ownership.store(Arc::clone(&next));
        self.changed();
        engine.wake_all();
        lock(&self.opened).follow_table(&next);
        if let Some(program) = &*lock(&self.tun_program)
            && let Err(error) = program.update_table(next.table.owners())
        {
            tracing::warn!(%error, "the kernel fills TUN queues by the old table; rings mend it");
        }
        if before.alive != alive {
            super::open::follow_cores(self);
            engine.wake_all();
        }
    }

    /// A new table after cores changed their state.
    pub(super) fn replan(&self, states: &[CoreState], engine: &crate::Shared) {
        let mut states = states.to_vec();
        if !states.contains(&CoreState::Active) {
            // Better a core that should rest than none.
            for state in states.iter_mut().filter(|state| **state == CoreState::Draining) {
                *state = CoreState::Active;
            }
        }
        let states = &states[..];
        let usable: CoreSet = (0u8..)
            .zip(states)
            .filter(|(_, state)| **state == CoreState::Active)
            .map(|(core, _)| core)
            .collect();
        let alive: CoreSet = (0u8..)
            .zip(states)
            .filter(|(_, state)| **state != CoreState::Stuck)
            .map(|(core, _)| core)
            .collect();
        let ownership = self.ownership.load_full();
        let live = self.live_by_bucket();
        match replan_keeping(&ownership.table, &usable, states, &live) {
            Ok(table) => self.put_table(table, alive, engine),
            Err(error) => tracing::error!(%error, "no bucket table without this core; it keeps its buckets"),
        }
    }
}

/// As [`replan`], but a core that drains stays in the chains: its flows live on.
fn replan_keeping(
    table: &BucketTable,
    usable: &CoreSet,
    states: &[CoreState],
    live: &[u32],
) -> Result<BucketTable, steering::assign::PlanError> {
    let draining = states.contains(&CoreState::Draining);
    if !draining {
        return replan(table, usable, live);
    }
    let average = (table.buckets() / usable.len().max(1)).max(1) as u32;
    let units: Vec<steering::table::Unit> = (0u16..)
        .zip(states)
        .filter(|(_, state)| **state != CoreState::Stuck)
        .map(|(id, state)| {
            let weight = match (*state, table.count(id)) {
                (CoreState::Draining, _) => 0,
                (_, 0) => average,
                (_, count) => count as u32,
            };
            steering::table::Unit { id, weight }
        })
        .collect();
    steering::assign::plan(table, &units, live)
}
