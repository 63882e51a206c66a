//! Shares that follow the load, with hysteresis (row D7), and the quarantine of ports.
//!
//! Shares that follow every report oscillate. So a unit gives something away only if it was the most loaded, and by far, in
//! several samples one after the other; and it gets something back only if it was no more loaded than the others in as many.
//! Between both marks nothing happens. At most one bucket in a hundred moves at once, of those without earlier owners, and
//! nothing more for a while.

use steering::table::BucketTable;

use super::plan;
use super::state::{SHARE_NORMAL, Standing, State};
use super::{Manager, Stage};

/// Samples in which the same has to be wished.
const SAMPLES: u32 = 3;

/// Least difference of load between the most and the least loaded unit, in percent.
const SPREAD_PERCENT: u8 = 20;

/// Buckets of a hundred that may move at once.
const MOVED_PERCENT: usize = 1;

/// Factors for a share, in thousandths: the first that moves little enough is taken. A share that grows is divided by it.
const FACTORS: [u32; 5] = [950, 975, 988, 994, 997];

/// Least share.
const SHARE_MIN: u16 = 250;

/// A change of one unit's share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// It is loaded far more than others.
    Less(u16),
    /// It had given something away, and is loaded no more than the others.
    More(u16),
}

impl Manager {
    /// Takes a sample, and moves a few buckets away from a unit that has had too much to do for long, or back to one that had.
    pub(super) fn follow_load(&mut self, now_ns: u64) {
        if now_ns < self.timers.load_due_ns {
            return;
        }
        self.timers.load_due_ns = now_ns.saturating_add(self.settings.load_sample_ns);
        let Some(wish) = self.wish() else {
            self.wished = None;
            return;
        };
        let samples = self.wished.filter(|(before, _)| *before == wish).map_or(1, |(_, samples)| samples + 1);
        self.wished = Some((wish, samples));
        let rested = self.timers.load_moved_ns == 0
            || now_ns.saturating_sub(self.timers.load_moved_ns) >= self.settings.load_pause_ns;
        let quiet = self.stage == Stage::Idle && self.saving.is_none() && self.state.accepted.is_empty();
        if samples < SAMPLES || !rested || !quiet || self.state.fence {
            return;
        }
        let Some((state, table)) = self.fulfilled(wish) else { return };
        self.timers.load_moved_ns = now_ns.max(1);
        self.wished = None;
        let why = match wish {
            Wish::Less(node) => format!("unit {node} is loaded more than others"),
            Wish::More(node) => format!("unit {node} is not loaded more than others any more"),
        };
        self.start_for_load(why, state, table);
    }

    /// Change of a share that the loads speak for.
    fn wish(&self) -> Option<Wish> {
        let loads = self
            .state
            .units
            .iter()
            .filter(|(_, unit)| unit.standing == Standing::Active && unit.role.owns_flows());
        let loads: Vec<(u8, u16, u16)> = loads
            .filter_map(|(node, unit)| {
                let peer = self.peers.get(node).filter(|peer| peer.figures.in_force.is_some())?;
                Some((peer.figures.load_percent, *node, unit.share_permille))
            })
            .collect();
        let (most, node, _) = *loads.iter().max()?;
        let (least, ..) = *loads.iter().min()?;
        if most - least >= SPREAD_PERCENT {
            return Some(Wish::Less(node));
        }
        let sum: u32 = loads.iter().map(|(load, ..)| u32::from(*load)).sum();
        let others = u32::try_from(loads.len()).ok()?.checked_sub(1).filter(|others| *others > 0)?;
        let no_more = |(load, ..): &&(u8, u16, u16)| u32::from(*load) * others <= sum - u32::from(*load);
        let lessened = loads.iter().filter(|(_, _, share)| *share < SHARE_NORMAL).filter(no_more);
        lessened.min_by_key(|(_, node, share)| (*share, *node)).map(|(_, node, _)| Wish::More(*node))
    }

    /// The state and table in which a unit has a little less, or more.
    fn fulfilled(&self, wish: Wish) -> Option<(State, BucketTable)> {
        let old = self.state.table.as_ref()?;
        let live = self.live_by_owner();
        FACTORS.into_iter().find_map(|factor| {
            let mut state = self.state.clone();
            let (Wish::Less(node) | Wish::More(node)) = wish;
            let unit = state.units.get_mut(&node)?;
            let share = u32::from(unit.share_permille);
            unit.share_permille = match wish {
                Wish::Less(_) => {
                    u16::try_from(share * factor / 1_000).ok().filter(|share| *share >= SHARE_MIN)?
                }
                // Rounded up, so that it comes to the end.
                Wish::More(_) => u16::try_from((share * 1_000).div_ceil(factor)).ok()?.min(SHARE_NORMAL),
            };
            let table = plan::table(&state, self.settings.buckets, &live).ok()?;
            let moves: Vec<(usize, u16, u16)> = old.moves(&table).collect();
            let few = !moves.is_empty() && moves.len() * 100 <= old.buckets() * MOVED_PERCENT;
            let plain = moves
                .iter()
                .all(|(bucket, _, to)| old.chain(*bucket).is_empty() || old.chain(*bucket).contains(to));
            (few && plain).then_some((state, table))
        })
    }

    /// Blocks of lost units are free again when their time is over.
    pub(super) fn watch_quarantine(&mut self, now_ns: u64) {
        let until_ns = now_ns.saturating_add(self.settings.quarantine_ns);
        for block in self.state.blocks.iter().filter(|block| block.node.is_none()) {
            self.quarantine.entry((block.address, block.block)).or_insert(until_ns);
        }
        let over = |until: &u64| *until <= now_ns;
        if self.saving.is_some() || !self.quarantine.values().any(over) {
            return;
        }
        let quarantine = &self.quarantine;
        self.state.blocks.retain(|block| {
            block.node.is_some() || !quarantine.get(&(block.address, block.block)).is_some_and(over)
        });
        self.quarantine.retain(|_, until| !over(until));
        self.due.plan = true;
    }
}
