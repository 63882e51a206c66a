//! Sending side of lanes: the next counter, and what the peer has confirmed.

use super::feedback::Reported;
use crate::time::Time;

/// One lane as its sending core sees it.
#[derive(Clone, Debug, Default)]
pub(super) struct TxLane {
    /// Counter of the next datagram.
    next: u64,
    /// Cumulative numbers of the last report.
    pub reported: Reported,
    /// When the oldest datagram with inner packets left that no report has confirmed; `None` = nothing is outstanding.
    pub outstanding_since: Option<Time>,
}

impl TxLane {
    /// Whether a datagram with this counter left.
    pub fn has_sent(&self, counter: u64) -> bool {
        counter < self.next
    }

    /// The counter for the next datagram.
    pub fn take_counter(&mut self) -> u64 {
        let counter = self.next;
        self.next += 1;
        counter
    }
}

/// All lanes that one core sends on within one session. They outlive their path's entry in the list of paths: a path
/// that comes back under its id goes on counting where it was, or nonces would repeat.
#[derive(Debug, Default)]
pub(super) struct TxLanes {
    /// By path id, then by the peer's core.
    paths: Vec<Option<Box<[TxLane]>>>,
}

impl TxLanes {
    /// The lanes of a path to each of the peer's `cores` cores.
    pub fn of_path(&mut self, path: u8, cores: u8) -> &mut [TxLane] {
        let path = usize::from(path);
        if self.paths.len() <= path {
            self.paths.resize_with(path + 1, || None);
        }
        self.paths[path].get_or_insert_with(|| vec![TxLane::default(); usize::from(cores)].into_boxed_slice())
    }

    /// The lane, if anything was ever sent on its path.
    pub fn get_mut(&mut self, path: u8, core: u8) -> Option<&mut TxLane> {
        self.paths.get_mut(usize::from(path))?.as_mut()?.get_mut(usize::from(core))
    }

    /// The lane, if anything was ever sent on its path.
    pub fn get(&self, path: u8, core: u8) -> Option<&TxLane> {
        self.paths.get(usize::from(path))?.as_ref()?.get(usize::from(core))
    }

    /// When the oldest unconfirmed datagram of a lane left.
    pub fn outstanding_since(&self, path: u8, core: u8) -> Option<Time> {
        self.get(path, core)?.outstanding_since
    }

    /// The peer's cores with unconfirmed datagrams on a path, each with when the oldest left.
    pub fn outstanding(&self, path: u8) -> impl Iterator<Item = (u8, Time)> + '_ {
        let lanes = self.paths.get(usize::from(path)).and_then(Option::as_deref).unwrap_or_default();
        lanes.iter().enumerate().filter_map(|(core, lane)| Some((core as u8, lane.outstanding_since?)))
    }

    /// Nothing that left over this path will be confirmed any more.
    pub fn settle_path(&mut self, path: u8) {
        for lane in self.paths.get_mut(usize::from(path)).and_then(Option::as_deref_mut).unwrap_or_default() {
            lane.outstanding_since = None;
        }
    }

    /// A new session: all counters begin anew.
    pub fn clear(&mut self) {
        self.paths.clear();
    }
}
