//! Heirs: data planes that have copies of others' flows, and take them over when those die, or leave at once.
//!
//! A data plane sends copies of all its flows to one other, its *backup* ([`crate::message::Parts::copies`]): to one, not to one for
//! each bucket, for a block of ports has one holder, and flows of all buckets use it. When the unit dies, or is drained with
//! `migrate` and its backup has all, the next era names the backup its *heir*. It stands wherever the unit stood, in owners, chains and
//! leases; it has taken the flows over when it acknowledges that era's preparation, and packets come to it with the commit. So who
//! migrates goes on with its flows until nobody sends it any packet. The era after that shares the buckets anew.
//!
//! The ports that come along *rest*: packets to them go to the heir, which gives them to no new flow. When the last inherited flow has
//! ended nobody has them, as after a death without heir, and later they are free.

use steering::table::BucketTable;

use super::state::{Inheritance, Standing, State, UnitRecord};
use super::{Manager, Stage, Then};
use crate::message::{Pair, Report};

/// Reports in a row that a backup has all flows before the unit hands them over: about two seconds, in which the whole flow table
/// was gone through several times since the last flow began.
const REPORTS_BEFORE_MIGRATION: u32 = 3;

/// Reports of a unit about the copies of its flows.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Copied {
    /// Who has all.
    to: Option<u16>,
    /// Era in force at the last of them.
    era: u32,
    /// How many in a row said the same.
    reports: u32,
}

/// Sets who gets copies of whose flows: those of all data planes (`all`), or of those alone that hand theirs over. Who has a backup
/// keeps it while that may own flows; else it is whoever has copies of fewest, and of those the next by number.
pub(super) fn assign_copies(state: &mut State, all: bool) {
    let may_keep = |unit: &UnitRecord| unit.standing == Standing::Active && unit.role.owns_flows();
    let backups: Vec<u16> =
        state.units.iter().filter(|(_, unit)| may_keep(unit)).map(|(node, _)| *node).collect();
    let sends = |node: u16, unit: &UnitRecord| {
        let member = unit.standing.takes_part() && unit.role.owns_flows();
        member && if unit.migrate { hands_over(state, node) } else { all }
    };
    let senders: Vec<u16> =
        state.units.iter().filter(|(node, unit)| sends(**node, unit)).map(|(node, _)| *node).collect();
    let kept = |pair: &&Pair| senders.contains(&pair.unit) && backups.contains(&pair.heir);
    let mut copies: Vec<Pair> = state.copies.iter().filter(kept).copied().collect();
    for unit in senders {
        if copies.iter().any(|pair| pair.unit == unit) {
            continue;
        }
        let copies_at = |backup: u16| copies.iter().filter(|pair| pair.heir == backup).count();
        let others = backups.iter().copied().filter(|backup| *backup != unit);
        if let Some(heir) = others.min_by_key(|backup| (copies_at(*backup), backup.wrapping_sub(unit))) {
            copies.push(Pair { unit, heir });
        }
    }
    copies.sort_unstable();
    state.copies = copies;
}

/// Whether a unit that migrates still has something to hand over: it stands in the table, or has ports.
fn hands_over(state: &State, node: u16) -> bool {
    let named = state.table.as_ref().is_some_and(|table| is_named(table, node));
    !is_handed(state, node) && (named || state.blocks.iter().any(|block| block.node == Some(node)))
}

/// Whether a table has a unit as owner or in a chain.
pub(super) fn is_named(table: &BucketTable, node: u16) -> bool {
    let names = |bucket| table.owner(bucket) == node || table.chain(bucket).contains(&node);
    (0..table.buckets()).any(names)
}

/// Whether a unit's flows are another's by the newest era, or by the next.
fn is_handed(state: &State, node: u16) -> bool {
    state.heirs.iter().any(|inheritance| inheritance.pair.unit == node)
}

/// The flows of a unit are its heir's with the next era (`planned`: with the one that is being planned). Its ports go along.
pub(super) fn inherit(state: &mut State, pair: Pair, planned: bool) {
    for block in state.blocks.iter_mut().filter(|block| block.node == Some(pair.unit)) {
        block.node = Some(pair.heir);
        block.resting = true;
    }
    state.heirs.push(Inheritance { pair, planned });
}

/// An era begins to be planned: what the one before said of heirs is done, and what waited is said now.
pub(super) fn plan_heirs(state: &mut State) {
    state.heirs.retain(|inheritance| !inheritance.planned);
    state.heirs.iter_mut().for_each(|inheritance| inheritance.planned = true);
}

/// The table in force, with heirs in the place of those whose flows they take over by the era that is being planned.
pub(super) fn handed(state: &State) -> Option<BucketTable> {
    let pairs =
        state.heirs.iter().filter(|inheritance| inheritance.planned).map(|inheritance| inheritance.pair);
    Some(pairs.fold(state.table.clone()?, |table, pair| table.handed(pair.unit, pair.heir)))
}

impl Manager {
    /// Notes what a unit says of copies of its flows, and of flows that it inherited.
    pub(super) fn note_copies(&mut self, node: u16, report: &Report) {
        let Some(peer) = self.peers.get_mut(&node) else { return };
        let copied = &mut peer.copied;
        let same = copied.to == report.copied_to && copied.era == report.in_force;
        let reports = if same { (copied.reports + 1).min(REPORTS_BEFORE_MIGRATION) } else { 1 };
        *copied = match report.copied_to {
            to @ Some(_) => Copied { to, era: report.in_force, reports },
            None => Copied::default(),
        };
        let migrates = self.state.units.get(&node).is_some_and(|unit| unit.migrate);
        self.due.plan |= migrates && self.may_migrate(node).is_some();
        self.end_rest(node, report);
    }

    /// The ports of a unit that came with flows are nobody's when all those have ended.
    fn end_rest(&mut self, node: u16, report: &Report) {
        let in_force = self.state.table.as_ref().map(BucketTable::era);
        let over = report.inherited == 0
            && in_force == Some(report.in_force)
            && self.stage == Stage::Idle
            && self.saving.is_none()
            && !self.state.heirs.iter().any(|inheritance| inheritance.pair.heir == node);
        if !over || !self.state.blocks.iter().any(|block| block.resting && block.node == Some(node)) {
            return;
        }
        let before = self.state.clone();
        for block in self.state.blocks.iter_mut().filter(|block| block.resting && block.node == Some(node)) {
            block.node = None;
            block.resting = false;
        }
        self.save(Then::Nothing, before);
    }

    /// Who takes over the flows of a unit that died: its backup, if that has them and lives.
    pub(super) fn heir_of(&self, now_ns: u64, node: u16) -> Option<Pair> {
        let pair = self.state.copies.iter().find(|pair| pair.unit == node)?;
        let has_all = self.peers.get(&node)?.copied.to == Some(pair.heir);
        let backup = self.state.units.get(&pair.heir)?;
        let peer = self.peers.get(&pair.heir)?;
        let lives = backup.standing == Standing::Active
            && peer.connection.is_some()
            && peer.instance == backup.instance
            && !self.is_silent(pair.heir, now_ns);
        (has_all && lives && !is_handed(&self.state, node)).then_some(*pair)
    }

    /// A unit died: what it was to inherit is lost with it.
    pub(super) fn forget_heir(&mut self, node: u16) {
        self.state.heirs.retain(|inheritance| inheritance.planned || inheritance.pair.heir != node);
        if let Some(peer) = self.peers.get_mut(&node) {
            peer.copied = Copied::default();
        }
    }

    /// Who takes over the flows of a unit that drains with `migrate`, once that has all of them.
    fn may_migrate(&self, node: u16) -> Option<Pair> {
        let unit = self.state.units.get(&node)?;
        let drains = unit.migrate && matches!(unit.standing, Standing::Draining { .. });
        let pair = self.state.copies.iter().find(|pair| pair.unit == node).filter(|_| drains)?;
        let copied = self.peers.get(&node)?.copied;
        let era = self.state.table.as_ref().map(BucketTable::era);
        let has_all = copied.to == Some(pair.heir)
            && Some(copied.era) == era
            && copied.reports >= REPORTS_BEFORE_MIGRATION;
        (has_all && hands_over(&self.state, node)).then_some(*pair)
    }

    /// Plans who inherits from whom and who sends copies to whom, for the next era. Which units hand their flows over with it.
    pub(super) fn plan_copies(&self, state: &mut State) -> Vec<Pair> {
        plan_heirs(state);
        let migrating: Vec<Pair> =
            self.state.units.keys().filter_map(|node| self.may_migrate(*node)).collect();
        for pair in &migrating {
            // A command of the same era may have had it take part again.
            if state.units.get(&pair.unit).is_some_and(|unit| unit.migrate) {
                inherit(state, *pair, true);
            }
        }
        assign_copies(state, self.settings.replicate);
        migrating
    }

    /// Reason for an era that nobody asked for: flows go to an heir, the buckets of one are to be shared, or others are to have copies.
    pub(super) fn reason_of_copies(&self) -> Option<String> {
        self.state.table.as_ref()?;
        let mut state = self.state.clone();
        let migrating = self.plan_copies(&mut state);
        if let Some(Pair { unit, heir }) = migrating.first() {
            return Some(format!("flows of unit {unit} go to unit {heir}"));
        }
        if self.state.heirs.iter().any(|inheritance| inheritance.planned) {
            return Some("buckets that were inherited are shared".into());
        }
        (state.copies != self.state.copies).then(|| "other units have copies of flows".into())
    }
}
