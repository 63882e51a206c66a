//! Reports and NACKs of a receiving core that are due.

use crate::frame::{self, NackRange, ReportEntry};

/// Reports and NACKs that are due.
pub(super) struct Due {
    pub reports: Vec<(u8, Vec<ReportEntry>)>,
    /// Path and sending core of the lane, and what it misses.
    pub nacks: Vec<(u8, u8, Vec<NackRange>)>,
}

impl Due {
    /// Adds an entry to the report for a core of the peer; false if that has no room.
    pub fn add(&mut self, core: u8, entry: impl FnOnce() -> ReportEntry) -> bool {
        match self.reports.iter_mut().find(|(to, _)| *to == core) {
            Some((_, entries)) if entries.len() < frame::ENTRIES_MAX.min(28) => entries.push(entry()),
            Some(_) => return false,
            None => self.reports.push((core, vec![entry()])),
        }
        true
    }
}
