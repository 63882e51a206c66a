//! Log of a run: a number that is equal for equal runs, and the last lines for whoever reads a failure.

use std::collections::VecDeque;

use tunnel::time::Time;

/// Lines kept for a failure.
const TRAIL: usize = 64;

/// Log of a run.
#[derive(Clone, Debug)]
pub(crate) struct Log {
    hash: u64,
    trail: VecDeque<(Time, &'static str, [u64; 4])>,
}

impl Log {
    pub fn new() -> Self {
        Self { hash: 0xcbf2_9ce4_8422_2325, trail: VecDeque::new() }
    }

    pub fn add(&mut self, now: Time, what: &'static str, numbers: [u64; 4]) {
        let first = u64::from(what.as_bytes().first().copied().unwrap_or(0));
        for number in [now.ns(), first].into_iter().chain(numbers) {
            self.hash = fastrand::Rng::with_seed(self.hash ^ number).u64(..);
        }
        if self.trail.len() == TRAIL {
            self.trail.pop_front();
        }
        self.trail.push_back((now, what, numbers));
    }

    /// Number that changes with every line.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// The last lines.
    pub fn trail(&self) -> impl Iterator<Item = &(Time, &'static str, [u64; 4])> {
        self.trail.iter()
    }
}
