//! Which entries of a send log belong to which lane, so that a counter that a peer names is found without a walk over
//! the log: one binary search, whatever the peer says.

use std::collections::VecDeque;

/// Entries of one lane: of one receiving core.
#[derive(Debug, Default)]
pub(super) struct Lane {
    core: u8,
    /// Their numbers, oldest first: those that left, in order of their counters, then those that wait.
    pub numbers: VecDeque<u64>,
    /// How many of them, from the oldest on, are settled.
    pub settled: usize,
}

/// Lanes of one log, in order of the receiving core.
#[derive(Debug, Default)]
pub(super) struct Lanes(Vec<Lane>);

impl Lanes {
    pub fn get(&self, core: u8) -> Option<&Lane> {
        self.0.binary_search_by_key(&core, |lane| lane.core).ok().map(|at| &self.0[at])
    }

    pub fn get_mut(&mut self, core: u8) -> Option<&mut Lane> {
        self.0.binary_search_by_key(&core, |lane| lane.core).ok().map(|at| &mut self.0[at])
    }

    /// A datagram for `core` was begun; numbers only grow.
    pub fn push(&mut self, core: u8, number: u64) {
        let at = self.0.binary_search_by_key(&core, |lane| lane.core).unwrap_or_else(|at| {
            self.0.insert(at, Lane { core, ..Lane::default() });
            at
        });
        self.0[at].numbers.push_back(number);
    }

    /// An entry is not the lane's any more: it never left, or it is forgotten.
    pub fn remove(&mut self, core: u8, number: u64) {
        let Some(lane) = self.get_mut(core) else { return };
        // What is forgotten for its age is the oldest.
        let at = match lane.numbers.front() {
            Some(first) if *first == number => Ok(0),
            _ => lane.numbers.binary_search(&number),
        };
        if let Ok(at) = at {
            lane.numbers.remove(at);
            lane.settled -= usize::from(at < lane.settled);
        }
    }

    /// Nothing that left, all numbers below `pending`, is known by its counter any more.
    pub fn forget_sent(&mut self, pending: u64) {
        self.0.retain_mut(|lane| {
            lane.settled = 0;
            let sent = lane.numbers.partition_point(|number| *number < pending);
            drop(lane.numbers.drain(..sent));
            !lane.numbers.is_empty()
        });
    }

    /// All that left, all numbers below `pending`, is settled.
    pub fn settle_all(&mut self, pending: u64) {
        for lane in &mut self.0 {
            lane.settled = lane.numbers.partition_point(|number| *number < pending);
        }
    }
}
