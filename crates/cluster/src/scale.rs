//! How many data planes there should be, and which of a pool of spare ones is started or stopped for it (row D12).
//!
//! No clock and no I/O: the caller hands in what it sees ([`Seen`]) and the time, runs the hooks that start and stop a machine, and
//! gives the commands. All that must survive a restart of the manager is in the cluster's state anyway, so a manager that begins to
//! lead goes on with what the one before began: a unit of the pool that was added and is not connected is started (again: hooks may
//! be run twice), one that is connected and takes no part is stopped.
//!
//! Hysteresis: the mean load has to be beyond a mark for a while without a break; after each change nothing is begun until it is
//! done and a pause is over; and nobody is stopped if the others would then be near the upper mark.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::manager::{Command, Standing, Step};
use crate::message::Role;

/// Distance of the load that is expected after a unit was stopped from the mark above which one is started, percent.
const MARGIN_PERCENT: u32 = 10;

/// Policy of an operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScaleSettings {
    /// Units that may be started and stopped, in the order in which they are started.
    pub pool: Vec<PoolUnit>,
    /// Mean load of the data planes above which one is started, percent.
    pub above_percent: u8,
    /// Mean load below which one is stopped, percent.
    pub below_percent: u8,
    /// The load has to be beyond a mark for so long.
    pub for_ns: u64,
    /// After a change nothing is begun for so long.
    pub pause_ns: u64,
    /// Data planes there are at least, those that are not of the pool included.
    pub least: usize,
    /// Data planes there are at most.
    pub most: usize,
    /// A unit that is not connected so long after its start is given up, and another one is tried.
    pub start_within_ns: u64,
}

/// A data plane that may be started and stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolUnit {
    /// Its node id.
    pub node: u16,
    /// Its bus address: so it needs not be enrolled before it is started. `None`: the manager has to know it already.
    pub address: Option<IpAddr>,
}

/// A data plane as the manager sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeenUnit {
    /// Node id.
    pub node: u16,
    /// Its bus address.
    pub address: IpAddr,
    /// Its standing.
    pub standing: Standing,
    /// It has a connection to the manager.
    pub connected: bool,
    /// Load of its busiest core, percent.
    pub load_percent: u8,
    /// Flows that it has.
    pub live: u64,
    /// A command that adds it was accepted and waits.
    pub is_awaited: bool,
}

/// The cluster as the manager sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Data planes.
    pub units: Vec<SeenUnit>,
    /// No change is under way.
    pub is_idle: bool,
}

/// Task for the caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Want {
    /// The hook that starts a machine.
    Start(u16),
    /// The hook that stops one.
    Stop(u16),
    /// A command for the cluster, and why.
    Command(Command, String),
}

/// The policy at work.
#[derive(Clone, Debug)]
pub struct Scaler {
    settings: ScaleSettings,
    /// Since when the mean load has been above, and below.
    above_since_ns: Option<u64>,
    below_since_ns: Option<u64>,
    rest_until_ns: u64,
    /// When the start hook of a unit was wanted.
    started: BTreeMap<u16, u64>,
    /// When the stop hook was wanted; it is wanted once for each time that a unit is connected and takes no part.
    stopped: BTreeMap<u16, u64>,
    /// When a unit that was started in vain may be tried again.
    failed_until_ns: BTreeMap<u16, u64>,
    /// Units whose start hook failed: they are given up at the next look.
    failed: BTreeSet<u16>,
    /// Addresses of the pool's units as they were last known: one that was given up is not enrolled any more.
    addresses: BTreeMap<u16, IpAddr>,
}

impl Scaler {
    /// A policy that has seen nothing yet.
    #[must_use]
    pub fn new(settings: ScaleSettings) -> Self {
        Self {
            settings,
            above_since_ns: None,
            below_since_ns: None,
            rest_until_ns: 0,
            started: BTreeMap::new(),
            stopped: BTreeMap::new(),
            failed_until_ns: BTreeMap::new(),
            failed: BTreeSet::new(),
            addresses: BTreeMap::new(),
        }
    }

    /// A hook failed: one that stops is run again, one that starts for another unit.
    pub fn hook_failed(&mut self, node: u16) {
        self.stopped.remove(&node);
        if self.started.contains_key(&node) {
            self.failed.insert(node);
        }
    }

    /// Tasks that are due now. To be asked about once a second.
    pub fn look(&mut self, now_ns: u64, seen: &Seen) -> Vec<Want> {
        let mut wants = self.tend_pool(now_ns, seen);
        self.watch_load(now_ns, seen);
        if wants.is_empty() && self.is_quiet(now_ns, seen) {
            wants.extend(self.change(now_ns, seen));
        }
        wants
    }

    /// Units of the pool that are on their way up or down.
    fn tend_pool(&mut self, now_ns: u64, seen: &Seen) -> Vec<Want> {
        let mut wants = Vec::new();
        for PoolUnit { node, .. } in self.settings.pool.clone() {
            let unit = seen.units.iter().find(|unit| unit.node == node);
            self.addresses.extend(unit.map(|unit| (node, unit.address)));
            let failed = self.failed.remove(&node);
            let connected = unit.is_some_and(|unit| unit.connected);
            let awaited = unit.is_some_and(|unit| unit.is_awaited);
            if awaited && !connected {
                match self.started.get(&node) {
                    None => {
                        self.started.insert(node, now_ns);
                        wants.push(Want::Start(node));
                    }
                    Some(since_ns)
                        if failed || now_ns.saturating_sub(*since_ns) >= self.settings.start_within_ns =>
                    {
                        self.started.remove(&node);
                        self.failed_until_ns.insert(node, now_ns.saturating_add(self.settings.pause_ns));
                        let remove = Command::Change(vec![Step::Remove { node, force: true }]);
                        wants
                            .push(Want::Command(remove, format!("unit {node} was started and did not come")));
                        wants.push(Want::Stop(node));
                    }
                    Some(_) => {}
                }
                continue;
            }
            self.started.remove(&node);
            let spare = unit.is_some_and(|unit| unit.standing == Standing::Free) && connected && !awaited;
            if !spare {
                self.stopped.remove(&node);
            } else if let Entry::Vacant(place) = self.stopped.entry(node) {
                place.insert(now_ns);
                wants.push(Want::Stop(node));
            }
        }
        wants
    }

    fn watch_load(&mut self, now_ns: u64, seen: &Seen) {
        let since = |before: Option<u64>, beyond: bool| beyond.then(|| before.unwrap_or(now_ns));
        let load = mean_load(seen);
        let above = load.is_some_and(|load| load > u32::from(self.settings.above_percent));
        let below = load.is_some_and(|load| load < u32::from(self.settings.below_percent));
        self.above_since_ns = since(self.above_since_ns, above);
        self.below_since_ns = since(self.below_since_ns, below);
    }

    /// Nothing is under way, and the pause is over.
    fn is_quiet(&self, now_ns: u64, seen: &Seen) -> bool {
        let on_its_way =
            |unit: &SeenUnit| unit.is_awaited || matches!(unit.standing, Standing::Draining { .. });
        seen.is_idle && now_ns >= self.rest_until_ns && !seen.units.iter().any(on_its_way)
    }

    fn change(&mut self, now_ns: u64, seen: &Seen) -> Option<Want> {
        let long = |since: Option<u64>| {
            since.is_some_and(|since_ns| now_ns.saturating_sub(since_ns) >= self.settings.for_ns)
        };
        let active = seen.units.iter().filter(|unit| unit.standing == Standing::Active).count();
        let load = mean_load(seen).unwrap_or(0);
        let (step, why) = if active < self.settings.least {
            (
                self.next_to_start(now_ns, seen)?,
                format!("{active} data planes are less than {}", self.settings.least),
            )
        } else if long(self.above_since_ns) && active < self.settings.most {
            let mark = self.settings.above_percent;
            (self.next_to_start(now_ns, seen)?, format!("the mean load, {load} %, is above {mark} %"))
        } else if long(self.below_since_ns) && active > self.settings.least.max(1) {
            let then = load * active as u32 / (active as u32 - 1);
            if then + MARGIN_PERCENT > u32::from(self.settings.above_percent).max(MARGIN_PERCENT + 1) {
                return None;
            }
            let mark = self.settings.below_percent;
            (self.next_to_stop(seen)?, format!("the mean load, {load} %, is below {mark} %"))
        } else {
            return None;
        };
        self.rest_until_ns = now_ns.saturating_add(self.settings.pause_ns);
        self.above_since_ns = None;
        self.below_since_ns = None;
        Some(Want::Command(Command::Change(vec![step]), why))
    }

    /// The first of the pool that takes no part, and whose address is known.
    fn next_to_start(&self, now_ns: u64, seen: &Seen) -> Option<Step> {
        let may = |node| self.failed_until_ns.get(&node).is_none_or(|until_ns| now_ns >= *until_ns);
        self.settings.pool.iter().filter(|unit| may(unit.node)).find_map(|pool| {
            let enrol = match seen.units.iter().find(|unit| unit.node == pool.node) {
                Some(unit) if unit.standing == Standing::Free => None,
                Some(_) => return None,
                None => {
                    let known = self.addresses.get(&pool.node).copied();
                    Some((pool.address.or(known)?, Role::DataPlane))
                }
            };
            Some(Step::Add { node: pool.node, enrol, weight: None })
        })
    }

    /// Of the pool the one with the fewest flows: they take the least time to end.
    fn next_to_stop(&self, seen: &Seen) -> Option<Step> {
        let of_pool = |unit: &&SeenUnit| {
            let pool = self.settings.pool.iter().any(|pool| pool.node == unit.node);
            unit.standing == Standing::Active && pool
        };
        let unit =
            seen.units.iter().filter(of_pool).min_by_key(|unit| (unit.live, std::cmp::Reverse(unit.node)))?;
        Some(Step::Drain { node: unit.node, remove: true, migrate: false })
    }
}

/// Mean load of those that take part and are connected, percent; `None`: nobody is.
fn mean_load(seen: &Seen) -> Option<u32> {
    let there = |unit: &&SeenUnit| unit.standing == Standing::Active && unit.connected;
    let loads: Vec<u32> = seen.units.iter().filter(there).map(|unit| unit.load_percent.into()).collect();
    let count = u32::try_from(loads.len()).ok().filter(|count| *count > 0)?;
    Some(loads.iter().sum::<u32>() / count)
}

#[cfg(test)]
mod tests;
