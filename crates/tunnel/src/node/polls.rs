//! Timers of the bonds: which bond's are due, so that whoever runs them does nothing for the others.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::time::Time;

/// The timers of one bond run at most this often, ms: control frames ask for it as fast as they come.
const PAUSE_MS: u64 = 1;

/// Due times of all bonds, by slot.
#[derive(Default)]
pub(super) struct Polls {
    /// The earliest, ns: all that a core looks at while nothing is due.
    at_ns: AtomicU64,
    polled: AtomicU64,
    queue: Mutex<Queue>,
}

#[derive(Default)]
struct Queue {
    /// Times with slots; one that is not its slot's any more is stepped over.
    heap: BinaryHeap<Reverse<(Time, usize)>>,
    slots: Vec<Slot>,
    /// The timers of all bonds are due.
    all: bool,
}

#[derive(Clone, Copy)]
struct Slot {
    at: Time,
    polled_at: Time,
}

impl Queue {
    fn set(&mut self, slot: usize, at: Time) {
        if self.slots.len() <= slot {
            self.slots.resize(slot + 1, Slot { at: Time::MAX, polled_at: Time::ZERO });
        }
        let known = &mut self.slots[slot];
        let at = at.max(known.polled_at.plus_ms(PAUSE_MS));
        if at >= known.at {
            return;
        }
        known.at = at;
        self.heap.push(Reverse((at, slot)));
        if self.heap.len() > 4 * self.slots.len() + 64 {
            let slots = &self.slots;
            self.heap.retain(|Reverse((at, slot))| slots[*slot].at == *at);
        }
    }

    fn next(&self) -> Time {
        if self.all { Time::ZERO } else { self.heap.peek().map_or(Time::MAX, |Reverse((at, _))| *at) }
    }
}

impl Polls {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When the next timers are due.
    pub fn next(&self) -> Time {
        Time::from_ns(self.at_ns.load(Relaxed))
    }

    /// Bonds whose timers ran so far, each time counted.
    pub fn polled(&self) -> u64 {
        self.polled.load(Relaxed)
    }

    /// The timers of all bonds are due now.
    pub fn all_soon(&self, now: Time) {
        self.queue().all = true;
        self.at_ns.fetch_min(now.ns(), Relaxed);
    }

    /// The timers of the bond in a slot are due at `at` at the latest.
    pub fn set(&self, slot: usize, at: Time) {
        let mut queue = self.queue();
        queue.set(slot, at);
        self.at_ns.store(queue.next().ns(), Relaxed);
    }

    /// Takes the slots, of `slots` in all, whose timers are due. None while another core looks for them.
    pub fn take_due(&self, now: Time, slots: usize) -> Vec<usize> {
        let mut due = Vec::new();
        if self.next() > now {
            return due;
        }
        let Ok(mut queue) = self.queue.try_lock() else { return due };
        if std::mem::take(&mut queue.all) {
            queue.heap.clear();
            queue.slots.clear();
            due.extend(0..slots);
        } else {
            while let Some(Reverse((at, slot))) = queue.heap.peek().copied().filter(|first| first.0.0 <= now)
            {
                queue.heap.pop();
                if queue.slots[slot].at == at {
                    due.push(slot);
                }
            }
        }
        for slot in &due {
            // Until it is told when to come back.
            queue.set(*slot, Time::MAX);
            if let Some(known) = queue.slots.get_mut(*slot) {
                *known = Slot { at: Time::MAX, polled_at: now };
            }
        }
        self.at_ns.store(queue.next().ns(), Relaxed);
        self.polled.fetch_add(due.len() as u64, Relaxed);
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bond_that_asks_all_the_time_is_polled_once_in_a_while_and_alone() {
        let polls = Polls::default();
        polls.all_soon(Time::from_ms(5));
        assert_eq!(polls.take_due(Time::from_ms(5), 1_000).len(), 1_000);
        for slot in 0..1_000 {
            polls.set(slot, Time::from_ms(900));
        }
        let mut taken = 0;
        for us in 5_000..25_000 {
            let now = Time::from_us(us);
            polls.set(7, now);
            let due = polls.take_due(now, 1_000);
            assert!(due.is_empty() || due == [7]);
            taken += due.len();
        }
        assert!((15..=20).contains(&taken), "{taken} times in 20 ms");
        assert!(polls.queue().heap.len() <= 4_064 + 1);
        assert_eq!(polls.take_due(Time::from_ms(900), 1_000).len(), 1_000);
        assert_eq!(polls.next(), Time::MAX);
    }
}
