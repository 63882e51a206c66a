//! The next era: which units take part, who owns which bucket, who has which ports. Pure.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::net::IpAddr;

use steering::assign::{self, PlanError};
use steering::table::{BucketTable, TableError, Unit};

use super::command::{BLOCKS_USABLE, Command, Step};
use super::heirs;
use super::state::{BLOCKS, Block, SHARE_NORMAL, Standing, State};
use crate::message::Role;

/// Why the next era cannot be planned yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Waits {
    /// A unit that is to take part has no connection.
    NotConnected(u16),
    /// A unit that is to be removed still has flows.
    InUse(u16),
    /// Nobody may own buckets.
    NoDataPlane,
    /// Buckets that would move have four earlier owners with live flows.
    ChainFull {
        /// How many.
        buckets: usize,
        /// The first of them.
        bucket: usize,
        /// Its oldest earlier owner.
        unit: u16,
    },
    /// No block of ports is left for a unit.
    NoPorts {
        /// The unit.
        node: u16,
        /// An outside address; there is none either at the others.
        address: IpAddr,
        /// Blocks that nobody has and that are not free yet.
        quarantined: usize,
    },
}

impl fmt::Display for Waits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotConnected(node) => write!(f, "unit {node} is not connected"),
            Self::InUse(node) => write!(f, "unit {node} still has flows"),
            Self::NoDataPlane => write!(f, "no data plane takes part"),
            Self::ChainFull { buckets, bucket, unit } => write!(
                f,
                "{buckets} buckets have four earlier owners with live flows, first bucket {bucket}, whose oldest is unit {unit}"
            ),
            Self::NoPorts { node, address, quarantined } => write!(
                f,
                "no block of ports of {address} is left for unit {node}; {quarantined} of a dead unit are not free yet"
            ),
        }
    }
}

/// State that the planner knows of a unit's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Present {
    /// The process.
    pub instance: u64,
    /// The capacity that it says it has.
    pub weight: u32,
    /// Nothing is left on it.
    pub drained: bool,
}

/// Whether all steps of a command can be taken now.
pub(super) fn ready(state: &State, command: &Command, present: &BTreeMap<u16, Present>) -> Result<(), Waits> {
    let Command::Change(steps) = command else { return Ok(()) };
    for step in steps {
        match step {
            Step::Add { node, .. } if !present.contains_key(node) => return Err(Waits::NotConnected(*node)),
            Step::Remove { node, force: false } => {
                let drains = state.units.get(node).is_some_and(|unit| unit.standing.takes_part());
                if drains && !present.get(node).is_some_and(|present| present.drained) {
                    return Err(Waits::InUse(*node));
                }
            }
            Step::Add { .. } | Step::Remove { .. } | Step::Drain { .. } | Step::Weight { .. } => {}
        }
    }
    Ok(())
}

/// Applies a command to the units, without a table. Steps that have become impossible are left out.
pub(super) fn apply(state: &mut State, command: &Command, present: &BTreeMap<u16, Present>) {
    match command {
        Command::Configure { interfaces, outside } => {
            state.interfaces.clone_from(interfaces);
            state.outside.clone_from(outside);
            state.blocks.retain(|block| outside.contains(&block.address));
        }
        Command::Change(steps) => {
            for step in steps {
                apply_step(state, step, present);
            }
        }
    }
}

fn apply_step(state: &mut State, step: &Step, present: &BTreeMap<u16, Present>) {
    let node = step.node();
    let joined = state.next_number;
    let Some(unit) = state.units.get_mut(&node) else { return };
    match (step, unit.standing) {
        (Step::Add { .. }, Standing::Active) => {}
        (Step::Add { weight, .. }, standing) => {
            let Some(here) = present.get(&node) else { return };
            if unit.role == Role::Dispatcher {
                unit.weight = 0;
            } else {
                let told = if unit.weight == 0 { here.weight } else { unit.weight };
                unit.weight = weight.unwrap_or(told).max(1);
            }
            unit.standing = Standing::Active;
            unit.migrate = false;
            unit.share_permille = SHARE_NORMAL;
            if !standing.takes_part() {
                unit.joined = joined;
                unit.instance = here.instance;
                unit.forget = true;
                state.next_number += 1;
            }
        }
        (Step::Drain { remove, migrate, .. }, Standing::Active) => {
            unit.standing = Standing::Draining { remove: *remove };
            unit.migrate = *migrate;
        }
        (Step::Drain { .. }, _) => {}
        (Step::Weight { weight, .. }, _) => {
            unit.weight = *weight;
            unit.share_permille = SHARE_NORMAL;
        }
        (Step::Remove { .. }, Standing::Free | Standing::Lost) => {
            state.units.remove(&node);
            state.keys.remove(&node);
        }
        (Step::Remove { .. }, _) => {
            let clean = present.get(&node).is_some_and(|present| present.drained);
            unit.standing = Standing::Free;
            end_blocks(state, node, clean);
        }
    }
}

/// A unit takes no part any more: its blocks are free if nothing is left on it, else nobody gets them for a while.
pub(super) fn end_blocks(state: &mut State, node: u16, clean: bool) {
    if clean {
        state.blocks.retain(|block| block.node != Some(node));
    }
    for block in state.blocks.iter_mut().filter(|block| block.node == Some(node)) {
        block.node = None;
        block.resting = false;
    }
}

/// Blocks of each outside address that only a unit gets that has none of any: units to come find ports.
const BLOCKS_KEPT: usize = BLOCKS_USABLE / 4;

/// Gives every data plane its blocks of each outside address, the lowest that are free, and first to those that have fewest.
/// Where units are more than an address has blocks, some have blocks of other addresses only; none at all is an error.
pub(super) fn lease(state: &mut State, blocks_per_unit: usize) -> Result<(), Waits> {
    let owns = state.units.iter().filter(|(_, unit)| unit.standing == Standing::Active);
    let units = owns.filter(|(_, unit)| unit.role.owns_flows()).map(|(node, _)| *node);
    let mut totals: BTreeMap<u16, usize> = units.map(|node| (node, 0)).collect();
    count_blocks(&mut totals, state.blocks.iter());
    for address in state.outside.clone() {
        let here = || state.blocks.iter().filter(|block| block.address == address);
        let taken: BTreeSet<u8> = here().map(|block| block.block).collect();
        let mut held: BTreeMap<u16, usize> = totals.keys().map(|node| (*node, 0)).collect();
        count_blocks(&mut held, here());
        let mut free: VecDeque<u8> = (1..BLOCKS).filter(|block| !taken.contains(block)).collect();
        let mut order: Vec<u16> = totals.keys().copied().collect();
        order.sort_by_key(|node| totals.get(node).copied());
        let mut given = Vec::new();
        // In turns, so that what is left when blocks are few is shared.
        for turn in 1..=blocks_per_unit.min(BLOCKS_USABLE) {
            for node in &order {
                let (Some(count), Some(total)) = (held.get_mut(node), totals.get_mut(node)) else { continue };
                if *count >= turn || (*total > 0 && free.len() <= BLOCKS_KEPT) {
                    continue;
                }
                if let Some(block) = free.pop_front() {
                    given.push(Block { address, block, node: Some(*node), resting: false });
                    *count += 1;
                    *total += 1;
                }
            }
        }
        state.blocks.extend(given);
    }
    state.blocks.sort_unstable();
    let without = totals.iter().find(|(_, total)| **total == 0).map(|(node, _)| *node);
    match (without, state.outside.first()) {
        (Some(node), Some(&address)) => {
            let quarantined = state.blocks.iter().filter(|block| block.node.is_none()).count();
            Err(Waits::NoPorts { node, address, quarantined })
        }
        _ => Ok(()),
    }
}

/// Adds the blocks that units may draw from.
fn count_blocks<'a>(counts: &mut BTreeMap<u16, usize>, blocks: impl Iterator<Item = &'a Block>) {
    for node in blocks.filter(|block| !block.resting).filter_map(|block| block.node) {
        if let Some(count) = counts.get_mut(&node) {
            *count += 1;
        }
    }
}

/// Shares of those who may be in a table.
pub(super) fn shares(state: &State) -> Vec<Unit> {
    let planes = state.units.iter().filter(|(_, unit)| unit.standing.takes_part() && unit.role.owns_flows());
    let share = |(node, unit): (&u16, &super::state::UnitRecord)| {
        let weight = if unit.standing == Standing::Active { unit.weight } else { 0 };
        // At most 10⁶ × 10³ each: the planner's sums fit.
        Unit { id: *node, weight: weight.saturating_mul(u32::from(unit.share_permille)) }
    };
    planes.map(share).collect()
}

/// The next table for the units as they stand now.
pub(super) fn table(state: &State, buckets: usize, live: &[u32]) -> Result<BucketTable, Waits> {
    let shares = shares(state);
    let Some(table) = &heirs::handed(state) else {
        return BucketTable::new(buckets, &shares).map_err(|_| Waits::NoDataPlane);
    };
    assign::plan(table, &shares, live).map_err(|error| match error {
        PlanError::ChainFull(pulls) => {
            let (bucket, unit) = pulls.first().map_or((0, 0), |pull| (pull.bucket, pull.unit));
            Waits::ChainFull { buckets: pulls.len(), bucket, unit }
        }
        PlanError::Units(_) | PlanError::LiveCounts { .. } => Waits::NoDataPlane,
    })
}

/// The next table after units died: their buckets go to the others, by what those lack of their quotas, and no bucket
/// of a unit that lives moves. It never waits for a chain, since who died takes no place in one.
pub(super) fn table_without_dead(state: &State, live: &[u32]) -> Result<BucketTable, Waits> {
    let table = &heirs::handed(state).ok_or(Waits::NoDataPlane)?;
    let shares = shares(state);
    let quotas = assign::quotas(table.buckets(), &shares, |unit| table.count(unit))
        .map_err(|_: TableError| Waits::NoDataPlane)?;
    // Lack of buckets, what is held, and whether it may take any.
    let mut wanted: Vec<(u16, i64, u32)> = Vec::with_capacity(shares.len());
    let mut left = table.buckets();
    for ((node, quota), share) in quotas.into_iter().zip(&shares) {
        let held = table.count(node);
        left -= held;
        let lack = if share.weight == 0 { i64::MIN } else { quota as i64 - held as i64 };
        wanted.push((node, lack, held as u32));
    }
    for _ in 0..left {
        let most = wanted.iter_mut().max_by_key(|(node, lack, _)| (*lack, std::cmp::Reverse(*node)));
        if let Some((_, lack, count)) = most {
            *lack -= 1;
            *count += 1;
        }
    }
    // Shares that are the wanted numbers of buckets: the quotas are exactly these.
    let exact: Vec<Unit> = wanted.into_iter().map(|(id, _, weight)| Unit { id, weight }).collect();
    assign::plan(table, &exact, live).map_err(|_| Waits::NoDataPlane)
}
