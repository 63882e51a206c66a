//! Events to come, in order of time and, at one time, in the order in which they were made.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use datapath::Handed;
use packet::attachment::InterfaceId;
use packet::vnet::VirtioNetHeader;
use tunnel::time::Time;

/// Something that happens.
pub(crate) enum Event {
    /// Datagrams may come out of a link: cable, direction.
    Link(usize, usize),
    /// A core of a site wakes up.
    Wake(usize, u8),
    /// A packet that a core handed over reaches another one: site, its count of starts, core.
    Handed(usize, u32, u8, Handed),
    /// A frame reaches a site's interface.
    Frame(usize, InterfaceId, VirtioNetHeader, Vec<u8>),
    /// A packet reaches a host, after a site's core sent it.
    Host(usize, u8, VirtioNetHeader, Vec<u8>),
    /// The control thread of a site works: site, its count of starts.
    Control(usize, u32),
    /// An application wants to be polled.
    App(usize),
}

struct Scheduled {
    at: Time,
    order: u64,
    event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Scheduled {}
impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> Ordering {
        // The heap gives the largest first: turn it round.
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}

/// Queue of events.
#[derive(Default)]
pub(crate) struct Events {
    heap: BinaryHeap<Scheduled>,
    order: u64,
}

impl Events {
    pub fn push(&mut self, at: Time, event: Event) {
        self.order += 1;
        self.heap.push(Scheduled { at, order: self.order, event });
    }

    /// When the next event is.
    pub fn next_at(&self) -> Option<Time> {
        self.heap.peek().map(|next| next.at)
    }

    pub fn pop(&mut self) -> Option<(Time, Event)> {
        self.heap.pop().map(|next| (next.at, next.event))
    }
}
