//! Deadlines of many connections: one each, which mostly moves later and is then looked at again only when it was due.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Deadlines are rounded up to this, so that one wake-up serves many, ns.
pub(super) const TICK_NS: u64 = 4_000_000;
/// Nothing is queued.
const NONE: u64 = u64::MAX;

/// Moment at which a connection will be looked at; part of the connection.
#[derive(Debug)]
pub(super) struct Queued(u64);

impl Default for Queued {
    fn default() -> Self {
        Self(NONE)
    }
}

/// Queue of deadlines.
#[derive(Debug, Default)]
pub(super) struct Timers {
    heap: BinaryHeap<Reverse<(u64, u64)>>,
}

impl Timers {
    /// Looks at `token` at this moment, or earlier if that is queued already.
    pub(super) fn arm(&mut self, token: u64, at_ns: u64, queued: &mut Queued) {
        let at_ns = at_ns.next_multiple_of(TICK_NS);
        if at_ns < queued.0 {
            queued.0 = at_ns;
            self.heap.push(Reverse((at_ns, token)));
        }
    }

    /// The next entry that is due; [`is_current`](Self::is_current) tells whether it still counts.
    pub(super) fn pop(&mut self, now_ns: u64) -> Option<(u64, u64)> {
        let Reverse((at_ns, _)) = *self.heap.peek()?;
        if at_ns > now_ns {
            return None;
        }
        self.heap.pop().map(|Reverse(entry)| entry)
    }

    /// Whether the entry of this moment is the one queued last; if so nothing is queued any more.
    pub(super) fn is_current(queued: &mut Queued, at_ns: u64) -> bool {
        let current = queued.0 == at_ns;
        if current {
            queued.0 = NONE;
        }
        current
    }

    /// Moment of the next entry.
    pub(super) fn next_ns(&self) -> Option<u64> {
        self.heap.peek().map(|Reverse((at_ns, _))| *at_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_earlier_deadline_replaces_a_later_one_and_a_later_one_waits() {
        let (mut timers, mut queued) = (Timers::default(), Queued::default());
        timers.arm(7, 100 * TICK_NS, &mut queued);
        timers.arm(7, 200 * TICK_NS, &mut queued);
        assert_eq!(timers.pop(99 * TICK_NS), None);
        timers.arm(7, 10 * TICK_NS - 1, &mut queued);
        assert_eq!(timers.next_ns(), Some(10 * TICK_NS));
        assert_eq!(timers.pop(10 * TICK_NS), Some((10 * TICK_NS, 7)));
        assert!(Timers::is_current(&mut queued, 10 * TICK_NS));
        // The first entry is still there and counts no more.
        assert_eq!(timers.pop(100 * TICK_NS), Some((100 * TICK_NS, 7)));
        assert!(!Timers::is_current(&mut queued, 100 * TICK_NS));
        assert_eq!(timers.pop(u64::MAX), None);
    }
}
