//! The packets that wait: a slab, found by the stamp they wait for, with a list of those which may go.

use crate::time::Time;
use core::cmp::Reverse;
use std::collections::BinaryHeap;

/// No slot.
const NONE: u32 = u32::MAX;
/// Heads of the hash to begin with.
const HEADS_MIN: usize = 16;

#[derive(Debug)]
struct Slot<P> {
    packet: Option<P>,
    stamp: u64,
    waits_on: u64,
    since: Time,
    /// Tells a timer whether the slot still holds the packet it was set for.
    serial: u32,
    waiting: bool,
    /// The packet said `same_path`.
    same_path: bool,
    /// Next slot of the hash chain, of the ready list or of the free list.
    next: u32,
}

/// A held packet's own place in the order.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) stamp: u64,
    pub(super) same_path: bool,
}

/// A packet that leaves.
#[derive(Debug)]
pub(super) struct Released<P> {
    pub(super) packet: P,
    pub(super) stamp: u64,
    pub(super) since: Time,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Timer {
    at: Time,
    slot: u32,
    serial: u32,
}

/// Held packets. Memory follows the number held, not the stamps: slots are reused, and the hash is as
/// long as there are slots. Neighbouring stamps fall into neighbouring heads, so chains are short.
#[derive(Debug)]
pub(super) struct Held<P> {
    slots: Vec<Slot<P>>,
    free: u32,
    /// Heads of the chains, a power of two, indexed by the low bits of the stamp waited for.
    heads: Vec<u32>,
    ready_first: u32,
    ready_last: u32,
    waiting: usize,
    ready: usize,
    /// Packets that said `same_path`.
    same_path: usize,
    serial: u32,
    timers: BinaryHeap<Reverse<Timer>>,
}

impl<P> Held<P> {
    pub(super) const fn new() -> Self {
        Self {
            slots: Vec::new(),
            free: NONE,
            heads: Vec::new(),
            ready_first: NONE,
            ready_last: NONE,
            waiting: 0,
            ready: 0,
            same_path: 0,
            serial: 0,
            timers: BinaryHeap::new(),
        }
    }

    /// All packets held.
    #[inline]
    pub(super) const fn len(&self) -> usize {
        self.waiting + self.ready
    }

    /// Those which wait for a stamp.
    #[inline]
    pub(super) const fn waiting(&self) -> usize {
        self.waiting
    }

    /// Those which may leave.
    #[inline]
    pub(super) const fn ready(&self) -> usize {
        self.ready
    }

    fn head(&self, stamp: u64) -> usize {
        stamp as usize & (self.heads.len() - 1)
    }

    /// Those which said `same_path`.
    #[inline]
    pub(super) const fn same_path(&self) -> usize {
        self.same_path
    }

    /// Stores a packet that waits for `waits_on` until `deadline`.
    pub(super) fn wait(&mut self, place: Place, waits_on: u64, now: Time, deadline: Time, packet: P) {
        let slot = self.store(place, waits_on, now, packet);
        if self.waiting >= self.heads.len() {
            self.grow_heads();
        }
        self.waiting += 1;
        let serial = self.slots[slot as usize].serial;
        self.slots[slot as usize].waiting = true;
        self.link(slot);
        if self.timers.len() > 2 * self.waiting + 64 {
            let slots = &self.slots;
            self.timers.retain(|Reverse(timer)| live(slots, timer));
        }
        self.timers.push(Reverse(Timer { at: deadline, slot, serial }));
    }

    /// Stores a packet that may leave behind those which may leave already.
    pub(super) fn push_ready(&mut self, place: Place, now: Time, packet: P) {
        let slot = self.store(place, 0, now, packet);
        self.append_ready(slot);
    }

    fn store(&mut self, place: Place, waits_on: u64, since: Time, packet: P) -> u32 {
        self.serial = self.serial.wrapping_add(1);
        self.same_path += usize::from(place.same_path);
        let new = Slot {
            packet: Some(packet),
            stamp: place.stamp,
            waits_on,
            since,
            serial: self.serial,
            waiting: false,
            same_path: place.same_path,
            next: NONE,
        };
        if let Some(slot) = self.slots.get_mut(self.free as usize) {
            let index = self.free;
            self.free = slot.next;
            *slot = new;
            index
        } else {
            // The caller's limit keeps the slab far below 2^32 slots.
            let index = self.slots.len() as u32;
            self.slots.push(new);
            index
        }
    }

    /// Puts a waiting slot at the head of its chain.
    fn link(&mut self, slot: u32) {
        let head = self.head(self.slots[slot as usize].waits_on);
        self.slots[slot as usize].next = self.heads[head];
        self.heads[head] = slot;
    }

    fn grow_heads(&mut self) {
        let heads = (self.heads.len() * 2).max(HEADS_MIN);
        self.heads.clear();
        self.heads.resize(heads, NONE);
        for slot in 0..self.slots.len() as u32 {
            if self.slots[slot as usize].waiting {
                self.link(slot);
            }
        }
    }

    /// Moves everybody who waits for `stamp` to the end of the ready list.
    ///
    /// First come, first served keeps each flow in order: whoever waits for an older stamp of the flow is moved
    /// earlier, because a stamp is delivered only after all before it in the flow, and given up only
    /// together with all before it.
    pub(super) fn make_ready(&mut self, stamp: u64) {
        if self.heads.is_empty() {
            return;
        }
        let head = self.head(stamp);
        let mut previous = NONE;
        let mut slot = self.heads[head];
        while slot != NONE {
            let next = self.slots[slot as usize].next;
            if self.slots[slot as usize].waits_on == stamp {
                match self.slots.get_mut(previous as usize) {
                    Some(previous) => previous.next = next,
                    None => self.heads[head] = next,
                }
                self.slots[slot as usize].waiting = false;
                self.waiting -= 1;
                self.append_ready(slot);
            } else {
                previous = slot;
            }
            slot = next;
        }
    }

    fn append_ready(&mut self, slot: u32) {
        self.slots[slot as usize].next = NONE;
        match self.slots.get_mut(self.ready_last as usize) {
            Some(last) => last.next = slot,
            None => self.ready_first = slot,
        }
        self.ready_last = slot;
        self.ready += 1;
    }

    /// Takes the first packet that may leave.
    pub(super) fn pop_ready(&mut self) -> Option<Released<P>> {
        let index = self.ready_first;
        let slot = self.slots.get_mut(index as usize)?;
        let released = Released { packet: slot.packet.take()?, stamp: slot.stamp, since: slot.since };
        self.ready_first = slot.next;
        if self.ready_first == NONE {
            self.ready_last = NONE;
        }
        slot.next = self.free;
        self.free = index;
        self.ready -= 1;
        self.same_path -= usize::from(slot.same_path);
        Some(released)
    }

    /// The stamp waited for by a packet whose deadline has come; its timer is used up.
    pub(super) fn pop_expired(&mut self, now: Time) -> Option<u64> {
        while let Some(&Reverse(timer)) = self.timers.peek() {
            let live = live(&self.slots, &timer);
            if live && timer.at > now {
                return None;
            }
            self.timers.pop();
            if live {
                return Some(self.slots[timer.slot as usize].waits_on);
            }
        }
        None
    }

    /// The earliest deadline. Exact after [`Held::pop_expired`] has answered with none; never too late.
    pub(super) fn next_deadline(&self) -> Option<Time> {
        self.timers.peek().map(|Reverse(timer)| timer.at)
    }
}

fn live<P>(slots: &[Slot<P>], timer: &Timer) -> bool {
    slots.get(timer.slot as usize).is_some_and(|slot| slot.waiting && slot.serial == timer.serial)
}
