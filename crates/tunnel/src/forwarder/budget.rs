//! Limits of the work that one datagram of a peer may cause. Nothing an honest peer sends comes near them; what is beyond is not done,
//! and counted.

use crate::frame::{ENTRIES_MAX, RANGES_MAX};

/// Most datagrams looked at for the NACKs of one datagram, to be sent again or not.
const LOOKED_UP_MAX: usize = 512;
/// Most datagrams repeated for one datagram: a burst beyond that is congestion, and repeats would feed it.
const REPEATS_MAX: usize = 128;

/// Work that is left for the rest of a datagram.
#[derive(Debug)]
pub(super) struct Budget {
    /// Entries of reports.
    entries: usize,
    /// Ranges of NACKs.
    ranges: usize,
    /// Datagrams looked at for NACKs.
    pub looked_up: usize,
    /// Datagrams to send again.
    pub repeats: usize,
    refused: u64,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            entries: ENTRIES_MAX,
            ranges: RANGES_MAX,
            looked_up: LOOKED_UP_MAX,
            repeats: REPEATS_MAX,
            refused: 0,
        }
    }
}

impl Budget {
    /// Whether one more entry of a report may be acted upon.
    pub fn take_entry(&mut self) -> bool {
        Self::take(&mut self.entries, &mut self.refused)
    }

    /// Whether one more range of a NACK may be acted upon.
    pub fn take_range(&mut self) -> bool {
        let left = &mut self.ranges;
        if self.looked_up == 0 {
            *left = 0;
        }
        Self::take(left, &mut self.refused)
    }

    fn take(left: &mut usize, refused: &mut u64) -> bool {
        let may = *left > 0;
        *left -= usize::from(may);
        *refused += u64::from(!may);
        may
    }

    /// Something that no honest peer asks for is not done.
    pub fn refuse(&mut self) {
        self.refused += 1;
    }

    /// Frames and parts of frames that were not acted upon so far.
    pub fn refused(&self) -> u64 {
        self.refused
    }
}
