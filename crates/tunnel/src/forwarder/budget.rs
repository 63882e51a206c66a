//! Limits of the work that one datagram of a peer may cause. Nothing an honest peer sends comes near them; what is beyond is not done,
//! and counted.

use crate::frame::extension::{CORE_WANTED, PATH_LIMITS, PATH_TIMING};
use crate::frame::{ENTRIES_MAX, Frame, RANGES_MAX};

/// Most datagrams looked at for the NACKs of one datagram, to be sent again or not.
const LOOKED_UP_MAX: usize = 512;
/// Most datagrams repeated for one datagram: a burst beyond that is congestion, and repeats would feed it.
const REPEATS_MAX: usize = 128;

/// Most control frames acted upon, and most pieces: a packet in pieces is longer than a datagram, so that it holds few of them.
const CONTROL_MAX: usize = 64;
const PIECES_MAX: usize = 16;

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
    control: usize,
    pieces: usize,
    /// Kinds of frames that count once, a bit each.
    seen: u8,
    /// Frames that answer the datagram.
    pub answers: Vec<u8>,
    refused: u64,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            entries: ENTRIES_MAX,
            ranges: RANGES_MAX,
            looked_up: LOOKED_UP_MAX,
            repeats: REPEATS_MAX,
            control: CONTROL_MAX,
            pieces: PIECES_MAX,
            seen: 0,
            answers: Vec::new(),
            refused: 0,
        }
    }
}

impl Budget {
    /// Whether a frame may be acted upon: questions and news once of each kind.
    pub fn allows(&mut self, frame: &Frame<'_>) -> bool {
        let once = match frame {
            Frame::Packet { .. } | Frame::Report(_) | Frame::Nack(_) => return true,
            Frame::Piece { .. } => return Self::take(&mut self.pieces, &mut self.refused),
            Frame::Challenge { .. } => 1,
            Frame::Ping { .. } => 1 << 1,
            Frame::Probe { .. } => 1 << 2,
            Frame::ProcessorInfo(_) => 1 << 3,
            Frame::Extension { kind: PATH_LIMITS, .. } => 1 << 4,
            Frame::Extension { kind: PATH_TIMING, .. } => 1 << 5,
            Frame::Extension { kind: CORE_WANTED, .. } => 1 << 6,
            _ => 0,
        };
        if self.seen & once != 0 {
            self.refused += 1;
            return false;
        }
        self.seen |= once;
        Self::take(&mut self.control, &mut self.refused)
    }

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
