//! Sleeping until something is ready or due.

use std::io;
use std::time::Duration;

use linux::clock::monotonic_ns;
use linux::event::{Epoll, READY_MAX, Ready};

use super::meter::Meter;

/// The flags that end a side are looked at this often at least, ns.
const LOOK_NS: u64 = 20_000_000;
/// After so many full batches deadlines are looked at although more is ready.
const BATCHES_MAX: u32 = 1_024;

/// Epoll of one side.
#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) epoll: Epoll,
    back_ns: u64,
    batches: u32,
}

impl Waiter {
    pub(super) fn new() -> io::Result<Waiter> {
        Ok(Waiter { epoll: Epoll::new()?, back_ns: monotonic_ns(), batches: 0 })
    }

    /// Waits until this moment at most. True if everything that was ready is in `ready`, so that what is missing may be called
    /// late: data that waits here while the thread had no CPU is no fault of the network.
    pub(super) fn wait(&mut self, ready: &mut Vec<Ready>, until_ns: u64, meter: &Meter) -> io::Result<bool> {
        let before = monotonic_ns();
        let until_ns = if self.batches > 0 { before } else { until_ns.clamp(before, before + LOOK_NS) };
        self.epoll.wait(ready, Some(Duration::from_nanos(until_ns - before)))?;
        let now = monotonic_ns();
        meter.late_ns.at_least((before - self.back_ns) + now.saturating_sub(until_ns));
        self.back_ns = now;
        let more = ready.len() == READY_MAX && self.batches < BATCHES_MAX;
        self.batches = if more { self.batches + 1 } else { 0 };
        Ok(!more)
    }
}
