//! Signs that this machine was copied, or set back to an earlier state: its copy holds the same keys and counters. The sessions end
//! at once, before both have sealed much under the same counters.
//!
//! A hypervisor that tells (`VMGENID`) is believed; where none does, the copy's wall clock shows it: it stands still while the machine is a file, and is put right
//! after it goes on. A clock that is put right for another reason costs a new handshake and nothing else.

use linux::netlink::VmGenerationMonitor;

/// The wall clock may be put forward or back by so much without more.
const STEP_NS: u64 = 10_000_000_000;

/// Clocks and announcements as they were seen last.
#[derive(Debug, Default)]
pub(crate) struct CopyWatch {
    generation: Option<VmGenerationMonitor>,
    /// Wall clock less the time since the start, ns.
    offset_ns: Option<i128>,
}

impl CopyWatch {
    pub fn new() -> Self {
        Self { generation: VmGenerationMonitor::open().ok(), offset_ns: None }
    }

    /// Looks again: the reason if this may be a copy.
    pub fn look(&mut self) -> Option<&'static str> {
        let told = self.generation.as_mut().is_some_and(VmGenerationMonitor::is_new);
        let jumped = self.note_clocks(linux::clock::realtime_ns(), linux::clock::boottime_ns());
        match (told, jumped) {
            (true, _) => Some("the hypervisor says that this machine goes on from a snapshot"),
            (false, true) => Some("the wall clock jumped, as that of a copied machine does"),
            (false, false) => None,
        }
    }

    /// Whether the wall clock jumped against the time since the start, which no one sets. The time in which the machine slept counts in both.
    fn note_clocks(&mut self, realtime_ns: u64, boottime_ns: u64) -> bool {
        let offset_ns = i128::from(realtime_ns) - i128::from(boottime_ns);
        let before = self.offset_ns.replace(offset_ns);
        before.is_some_and(|before| before.abs_diff(offset_ns) > u128::from(STEP_NS))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_jumps_is_told_from_one_that_runs_a_little_wrong() {
        const SECOND: u64 = 1_000_000_000;
        let mut watch = CopyWatch::default();
        let (mut realtime, mut boottime) = (1_800_000_000 * SECOND, 500 * SECOND);
        assert!(!watch.note_clocks(realtime, boottime));
        // Sleep, slewing, and steps of a few seconds.
        for (real, boot) in [(3_600, 3_600), (100, 99), (5, 0), (0, 6)] {
            realtime += real * SECOND;
            boottime += boot * SECOND;
            assert!(!watch.note_clocks(realtime, boottime), "{real} {boot}");
        }
        // A snapshot of an hour ago, put right by a time server; a clock from 1970; one that goes back.
        assert!(watch.note_clocks(realtime + 3_600 * SECOND, boottime));
        assert!(!watch.note_clocks(realtime + 3_601 * SECOND, boottime + SECOND));
        assert!(watch.note_clocks(realtime, boottime + 2 * SECOND));
        assert!(watch.note_clocks(0, boottime + 2 * SECOND));
    }
}
