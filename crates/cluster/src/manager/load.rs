//! Shares that follow the load, with hysteresis (row D7), and the quarantine of ports.
//!
//! Shares that follow every report oscillate. So a unit gives something away only if it was the most loaded, and by far, in
//! several samples one after the other; then at most one bucket in a hundred moves, of those without earlier owners, and
//! nothing more for a minute.

use steering::table::BucketTable;

use super::plan;
use super::state::{Standing, State};
use super::{MS, Manager, Stage};

/// Time between two changes for the load.
const PAUSE_NS: u64 = 60_000 * MS;

/// Samples in which the same unit has to be the most loaded.
const SAMPLES: u32 = 3;

/// Least difference of load between the most and the least loaded unit, in percent.
const SPREAD_PERCENT: u8 = 20;

/// Buckets of a hundred that may move at once.
const MOVED_PERCENT: usize = 1;

/// Factors for the share of the most loaded unit, in thousandths: the first that moves little enough is taken.
const FACTORS: [u32; 5] = [950, 975, 988, 994, 997];

/// Least share.
const SHARE_MIN: u16 = 250;

impl Manager {
    /// Takes a sample, and moves a few buckets away from a unit that has had too much to do for long.
    pub(super) fn follow_load(&mut self, now_ns: u64) {
        if now_ns < self.timers.load_due_ns {
            return;
        }
        self.timers.load_due_ns = now_ns.saturating_add(self.settings.load_sample_ns);
        let Some((node, spread)) = self.most_loaded() else { return };
        if spread < SPREAD_PERCENT {
            self.hottest = (node, 0);
            return;
        }
        let (hottest, samples) = self.hottest;
        self.hottest = (node, if hottest == node { samples + 1 } else { 1 });
        let rested =
            self.timers.load_moved_ns == 0 || now_ns.saturating_sub(self.timers.load_moved_ns) >= PAUSE_NS;
        let quiet = self.stage == Stage::Idle && self.saving.is_none() && self.state.accepted.is_empty();
        if self.hottest.1 < SAMPLES || !rested || !quiet || self.state.fence {
            return;
        }
        let Some((state, table)) = self.lighter(node) else { return };
        self.timers.load_moved_ns = now_ns.max(1);
        self.hottest = (node, 0);
        self.start_for_load(node, state, table);
    }

    /// The unit with the highest load, and how much more that is than the lowest.
    fn most_loaded(&self) -> Option<(u16, u8)> {
        let loads = self
            .state
            .units
            .iter()
            .filter(|(_, unit)| unit.standing == Standing::Active && unit.role.owns_flows());
        let loads: Vec<(u8, u16)> = loads
            .filter_map(|(node, _)| {
                let peer = self.peers.get(node).filter(|peer| peer.figures.in_force.is_some())?;
                Some((peer.figures.load_percent, *node))
            })
            .collect();
        let (most, node) = loads.iter().max()?;
        let (least, _) = loads.iter().min()?;
        Some((*node, most - least))
    }

    /// The state and table in which `node` has a little less.
    fn lighter(&self, node: u16) -> Option<(State, BucketTable)> {
        let old = self.state.table.as_ref()?;
        let live = self.live_by_owner();
        FACTORS.into_iter().find_map(|factor| {
            let mut state = self.state.clone();
            let unit = state.units.get_mut(&node)?;
            let share = u32::from(unit.share_permille) * factor / 1_000;
            unit.share_permille = u16::try_from(share).ok().filter(|share| *share >= SHARE_MIN)?;
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
