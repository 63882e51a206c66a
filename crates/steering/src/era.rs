//! Which table serves a packet while two are in force, and when the next change may start.
//!
//! A unit holds the table of era e and, during and after a change, that of e + 1 ([`Eras`]). The wire tells
//! only the era's parity. That is enough because e + 2 starts only after every unit has acknowledged e + 1 and
//! the packets of e have drained ([`Rollout`]): there are never three eras under way.

use crate::table::BucketTable;

/// Outcome for a table that was offered to a unit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Install {
    /// It is the next era: held from now on, as the newer of two.
    Installed,
    /// That era is held already.
    Known,
    /// Not the era after the newest: the unit has missed one and must take the whole state anew.
    Gap,
}

/// The one or two tables that a unit holds.
#[derive(Clone, Debug)]
pub struct Eras {
    older: Option<BucketTable>,
    newer: BucketTable,
}

impl Eras {
    /// Starts with one table, at first start or after a resync.
    #[must_use]
    pub fn new(table: BucketTable) -> Self {
        Self { older: None, newer: table }
    }

    /// Takes the table of the next era; the older of two is given up for it.
    pub fn install(&mut self, table: BucketTable) -> Install {
        let held =
            |era| self.newer.era() == era || self.older.as_ref().is_some_and(|older| older.era() == era);
        if held(table.era()) {
            return Install::Known;
        }
        if table.era() != self.newer.era().wrapping_add(1) || table.buckets() != self.newer.buckets() {
            return Install::Gap;
        }
        self.older = Some(std::mem::replace(&mut self.newer, table));
        Install::Installed
    }

    /// Gives up the older table: its packets have drained.
    pub fn retire_older(&mut self) {
        self.older = None;
    }

    /// The newest table.
    #[must_use]
    pub fn newest(&self) -> &BucketTable {
        &self.newer
    }

    /// The newest table, to retire chain entries.
    pub fn newest_mut(&mut self) -> &mut BucketTable {
        &mut self.newer
    }

    /// The table for a packet with this era parity. `None`: the era is not held yet, the packet may wait
    /// briefly, within a bound.
    #[must_use]
    pub fn of_parity(&self, odd: bool) -> Option<&BucketTable> {
        let fits = |table: &&BucketTable| (table.era() & 1 == 1) == odd;
        Some(&self.newer).filter(fits).or_else(|| self.older.as_ref().filter(fits))
    }
}

/// The progress of one change, as its manager sees it.
#[derive(Clone, Debug)]
pub struct Rollout {
    era: u32,
    /// Units that have not acknowledged yet, by id.
    missing: Vec<u16>,
    /// When the last acknowledgement came, in nanoseconds of the caller's clock.
    complete_at_ns: Option<u64>,
}

impl Rollout {
    /// Starts the change to `era`, which all `units` have to acknowledge.
    #[must_use]
    pub fn new(era: u32, units: &[u16], now_ns: u64) -> Self {
        let mut missing = units.to_vec();
        missing.sort_unstable();
        missing.dedup();
        let complete_at_ns = missing.is_empty().then_some(now_ns);
        Self { era, missing, complete_at_ns }
    }

    /// The era that is being rolled out.
    #[must_use]
    pub fn era(&self) -> u32 {
        self.era
    }

    /// Units that have not acknowledged, by id.
    #[must_use]
    pub fn missing(&self) -> &[u16] {
        &self.missing
    }

    /// A unit says that it holds `era`. True when this was the last one missing.
    pub fn acknowledge(&mut self, unit: u16, era: u32, now_ns: u64) -> bool {
        if era != self.era {
            return false;
        }
        self.drop_missing(unit, now_ns)
    }

    /// A unit did not acknowledge and was removed; it resyncs whole. True when this was the last one missing.
    pub fn remove(&mut self, unit: u16, now_ns: u64) -> bool {
        self.drop_missing(unit, now_ns)
    }

    /// Whether the next era may start: everyone has this one, and for `drain_ns` since.
    #[must_use]
    pub fn may_start_next(&self, now_ns: u64, drain_ns: u64) -> bool {
        self.complete_at_ns.is_some_and(|complete| now_ns.saturating_sub(complete) >= drain_ns)
    }

    fn drop_missing(&mut self, unit: u16, now_ns: u64) -> bool {
        let Ok(place) = self.missing.binary_search(&unit) else { return false };
        self.missing.remove(place);
        if !self.missing.is_empty() {
            return false;
        }
        self.complete_at_ns = Some(now_ns);
        true
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn table(era: u32) -> BucketTable {
        BucketTable::from_owners(era, vec![0, 1]).unwrap()
    }

    fn served(eras: &Eras, odd: bool) -> Option<u32> {
        eras.of_parity(odd).map(BucketTable::era)
    }

    #[test]
    fn parity_selects_between_the_two_held_eras() {
        let mut eras = Eras::new(table(6));
        assert_eq!((served(&eras, false), served(&eras, true)), (Some(6), None));
        assert_eq!(eras.install(table(7)), Install::Installed);
        assert_eq!((served(&eras, false), served(&eras, true)), (Some(6), Some(7)));
        assert_eq!(eras.install(table(8)), Install::Installed);
        assert_eq!((served(&eras, false), served(&eras, true)), (Some(8), Some(7)));
        eras.retire_older();
        assert_eq!((served(&eras, false), served(&eras, true)), (Some(8), None));
    }

    #[test]
    fn eras_wrap() {
        let mut eras = Eras::new(table(u32::MAX));
        assert_eq!(eras.install(table(0)), Install::Installed);
        assert_eq!((served(&eras, true), served(&eras, false)), (Some(u32::MAX), Some(0)));
    }

    #[test]
    fn repeated_missed_and_misfit_tables_change_nothing() {
        let mut eras = Eras::new(table(4));
        eras.install(table(5));
        assert_eq!(eras.install(table(5)), Install::Known);
        assert_eq!(eras.install(table(4)), Install::Known);
        assert_eq!(eras.install(table(3)), Install::Gap);
        assert_eq!(eras.install(table(7)), Install::Gap);
        assert_eq!(eras.install(BucketTable::from_owners(6, vec![0; 4]).unwrap()), Install::Gap);
        assert_eq!((served(&eras, false), served(&eras, true)), (Some(4), Some(5)));
    }

    #[test]
    fn next_era_waits_for_everyone_and_for_the_drain() {
        let mut rollout = Rollout::new(9, &[3, 1, 3, 2], 0);
        assert_eq!(rollout.missing(), [1, 2, 3]);
        assert!(!rollout.acknowledge(1, 9, 10));
        assert!(!rollout.acknowledge(1, 9, 11), "twice");
        assert!(!rollout.acknowledge(2, 8, 12), "an older era");
        assert!(!rollout.acknowledge(7, 9, 13), "a stranger");
        assert!(!rollout.remove(3, 20), "one still missing");
        assert!(!rollout.may_start_next(1_000_000, 5));
        assert!(rollout.acknowledge(2, 9, 100));
        assert!(!rollout.may_start_next(104, 5));
        assert!(rollout.may_start_next(105, 5));
        assert!(!rollout.may_start_next(50, 5), "a clock that went back");
    }

    #[test]
    fn a_change_that_concerns_nobody_is_complete_at_once() {
        let rollout = Rollout::new(1, &[], 50);
        assert!(rollout.may_start_next(55, 5));
        assert!(!rollout.may_start_next(54, 5));
    }
}
