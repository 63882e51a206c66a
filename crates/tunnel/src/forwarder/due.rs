//! Reports and NACKs of a receiving core that are due.

use crate::frame::{self, NackRange, ReportEntry};

/// A lane's sending core, and whether its header names a receiving core.
pub(super) type LaneEnd = (u8, bool);

/// Reports and NACKs that are due.
pub(super) struct Due {
    pub reports: Vec<(LaneEnd, Vec<ReportEntry>)>,
    /// Path and end of the lane, and what it misses.
    pub nacks: Vec<(u8, LaneEnd, Vec<NackRange>)>,
}

impl Due {
    /// Adds an entry to the report for such lanes; false if that has no room.
    pub fn add(&mut self, end: LaneEnd, entry: impl FnOnce() -> ReportEntry) -> bool {
        match self.reports.iter_mut().find(|(to, _)| *to == end) {
            Some((_, entries)) if entries.len() < frame::ENTRIES_MAX.min(28) => entries.push(entry()),
            Some(_) => return false,
            None => self.reports.push((end, vec![entry()])),
        }
        true
    }
}
