//! The one queue of a core: FQ-CoDel (RFC 8290) over super-packets, with a cursor.
//!
//! The inner TCP or QUIC is the only congestion controller, so it must meet its
//! queue *here*, before the paths, where it is short and where drops and ECN marks say something.
//! Data flows like this:
//!
//! 1. [`FqCodel::enqueue`] puts an item (a packet, or a super-packet of up to 64 KB) into one of 1,024
//!    flow queues by hash. Over the limit, the fattest flow loses its oldest items.
//! 2. [`FqCodel::head`] shows what deficit round robin would send next, CoDel's verdict on it and how
//!    much of it the flow may send in this turn. Looking costs nothing and commits to nothing: when
//!    every path is full the caller simply looks again later.
//! 3. The caller sends some segments, advances the item's own cursor and calls [`FqCodel::consume`]. An
//!    item that is only partly sent stays at its place, so that another flow's packet can get in
//!    between the segments of a super-packet (64 KB are 26 ms on a 20 Mbit/s link).
//! 4. A flow that must not be sent now is set aside by [`FqCodel::park`]: it keeps its packets and takes more, and
//!    takes part again after [`FqCodel::unpark_all`]; one that only this round cannot serve by [`FqCodel::skip`], until
//!    [`FqCodel::resume`].
//!
//! All operations are O(1) except dropping over the limit, which looks at the flows that have a queue
//! and makes room for a 64th of the limit at once. Nothing is allocated per packet: items live in a
//! slab that grows up to `limit_items`.

use crate::time::Time;

#[cfg(test)]
mod tests;

/// Properties of the things a queue holds.
pub trait Item {
    /// Bytes of it that have not been sent yet.
    fn bytes(&self) -> usize;
    /// When it was handed to [`FqCodel::enqueue`].
    fn enqueued_at(&self) -> Time;
    /// Whether its sender understands ECN (ECT(0), ECT(1) or CE in the inner IP header).
    fn ecn_capable(&self) -> bool;
}

/// CodelVerdict of CoDel (RFC 8289) on the next segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodelVerdict {
    /// Send it as it is.
    Pass,
    /// Set Congestion Experienced in the inner header, then send it.
    Mark,
    /// Drop one segment (reason `CoDel`) and call [`FqCodel::consume`] for it.
    Drop,
}

/// The next thing to send, as [`FqCodel::head`] sees it.
#[derive(Debug)]
pub struct Head<'a, T> {
    /// The item; the caller may advance the cursor inside it.
    pub item: &'a mut T,
    /// The flow builds no queue and is slow (≤ 5 Mbit/s): schedule it for the lowest delay.
    pub sparse: bool,
    /// CoDel's verdict; becomes effective with [`FqCodel::consume`].
    pub codel: CodelVerdict,
    /// The flow queue, 0..1024.
    pub flow: u16,
    /// Bytes the flow may still send in this turn, at least 1. The last segment may exceed it.
    pub budget_bytes: usize,
}

/// Flow queues of one [`FqCodel`]. RFC 8290 §4.1.2 uses the same number.
pub const FLOWS: usize = 1024;
/// CoDel's target at the start: the sojourn time that is allowed to stand.
///
/// Five times RFC 8289's: the flow queues keep the flows out of each other's way, so a longer queue delays
/// only the flow that builds
/// it, and an inner CUBIC needs it. In virtual time, one CUBIC flow over 170 Mbit/s and 54 ms of round trip
/// uses 87 % with
/// 10 ms, 97 % with 20 ms and 99.9 % with 25 ms.
pub const TARGET_US: u64 = 25_000;
/// CoDel's interval at the start: about a worst-case round trip.
pub const INTERVAL_US: u64 = 100_000;

/// A sparse flow's leaky bucket drains at 5 Mbit/s …
const SPARSE_BYTES_PER_S: u64 = 625_000;
/// … and holds this much.
const SPARSE_BURST_BYTES: u64 = 16 * 1024;
/// End of a list of slots.
const NO_SLOT: u32 = u32::MAX;
/// End of a list of flows.
const NO_FLOW: u16 = u16::MAX;

/// The list a flow is in: one of the two of the round robin (RFC 8290 §4.2), or the one of those set aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Idle,
    New,
    Old,
    Parked,
    Skipped,
}

/// A singly linked list of flows; the links are in [`Flow::next`].
#[derive(Clone, Copy, Debug)]
struct FlowList {
    head: u16,
    tail: u16,
}

impl FlowList {
    const EMPTY: Self = Self { head: NO_FLOW, tail: NO_FLOW };

    fn push(&mut self, flows: &mut [Flow], index: u16) {
        flows[usize::from(index)].next = NO_FLOW;
        if self.tail == NO_FLOW {
            self.head = index;
        } else {
            flows[usize::from(self.tail)].next = index;
        }
        self.tail = index;
    }

    /// Puts the whole of another list in front.
    fn prepend(&mut self, flows: &mut [Flow], other: Self) {
        if other.tail == NO_FLOW {
            return;
        }
        flows[usize::from(other.tail)].next = self.head;
        if self.tail == NO_FLOW {
            self.tail = other.tail;
        }
        self.head = other.head;
    }

    fn pop(&mut self, flows: &[Flow]) {
        if self.head != NO_FLOW {
            self.head = flows[usize::from(self.head)].next;
            if self.head == NO_FLOW {
                self.tail = NO_FLOW;
            }
        }
    }
}

/// CoDel's state of one flow, split into looking ([`Codel::wants_drop`]) and acting ([`Codel::acted`]).
#[derive(Clone, Copy, Debug, Default)]
struct Codel {
    /// When the sojourn time will have been above the target for an interval.
    first_above: Option<Time>,
    drop_next: Time,
    count: u32,
    last_count: u32,
    dropping: bool,
}

impl Codel {
    fn wants_drop(&mut self, now: Time, above: bool, interval_us: u64) -> bool {
        let lasting = match (above, self.first_above) {
            (false, _) => {
                self.first_above = None;
                false
            }
            (true, None) => {
                self.first_above = Some(now.plus_us(interval_us));
                false
            }
            (true, Some(end)) => now >= end,
        };
        if self.dropping && lasting {
            return now >= self.drop_next;
        }
        self.dropping = false;
        lasting
    }

    fn acted(&mut self, now: Time, interval_us: u64) {
        let from = if self.dropping {
            self.count = self.count.saturating_add(1);
            self.drop_next
        } else {
            self.dropping = true;
            // A flow that misbehaved a moment ago goes on where it was (RFC 8289 §5.5).
            let before = self.count.saturating_sub(self.last_count);
            let recent = now.since(self.drop_next) < 16_000 * interval_us;
            self.count = if before > 1 && recent { before } else { 1 };
            self.last_count = self.count;
            now
        };
        let step_us = interval_us as f64 / f64::from(self.count).sqrt();
        self.drop_next = from.plus_us(step_us as u64);
    }

    fn emptied(&mut self) {
        self.first_above = None;
        self.dropping = false;
    }
}

#[derive(Debug)]
struct Flow {
    head: u32,
    tail: u32,
    bytes: usize,
    deficit: i64,
    place: Place,
    next: u16,
    /// When it last took part again after it was set aside.
    unparked_at: Time,
    codel: Codel,
    /// Leaky bucket behind [`Head::sparse`]: level in bytes and when it was right.
    level_bytes: u64,
    level_at: Time,
}

impl Flow {
    const IDLE: Self = Self {
        head: NO_SLOT,
        tail: NO_SLOT,
        bytes: 0,
        deficit: 0,
        place: Place::Idle,
        next: NO_FLOW,
        unparked_at: Time::ZERO,
        codel: Codel { first_above: None, drop_next: Time::ZERO, count: 0, last_count: 0, dropping: false },
        level_bytes: 0,
        level_at: Time::ZERO,
    };

    fn meter(&mut self, now: Time, bytes: usize) {
        let leaked = now.since(self.level_at) / 1_000 * SPARSE_BYTES_PER_S / 1_000_000;
        // Capped, so that a fast flow that turns slow is sparse again after some 100 ms.
        let level = self.level_bytes.saturating_sub(leaked).saturating_add(bytes as u64);
        self.level_bytes = level.min(4 * SPARSE_BURST_BYTES);
        self.level_at = now;
    }
}

#[derive(Debug)]
struct Slot<T> {
    item: Option<T>,
    /// Bytes of it that the counters still contain.
    bytes: usize,
    next: u32,
}

/// Item that [`FqCodel::head`] showed last.
#[derive(Clone, Copy, Debug)]
struct Shown {
    flow: u16,
    slot: u32,
    codel: CodelVerdict,
}

/// FQ-CoDel over items with a cursor; see the module documentation for the order of calls.
#[derive(Debug)]
pub struct FqCodel<T> {
    flows: Box<[Flow]>,
    slots: Vec<Slot<T>>,
    free: u32,
    new: FlowList,
    old: FlowList,
    parked: FlowList,
    skipped: FlowList,
    shown: Option<Shown>,
    bytes: usize,
    items: usize,
    limit_bytes: usize,
    limit_items: usize,
    quantum_bytes: usize,
    target_us: u64,
    interval_us: u64,
}

impl<T: Item> FqCodel<T> {
    /// A queue that holds at most `limit_bytes` and `limit_items` and lets each flow send about
    /// `quantum_bytes` (one or two MTU) before it is the next flow's turn.
    pub fn new(limit_bytes: usize, limit_items: usize, quantum_bytes: usize) -> Self {
        let mut flows = Vec::with_capacity(FLOWS);
        flows.resize_with(FLOWS, || Flow::IDLE);
        Self {
            flows: flows.into_boxed_slice(),
            slots: Vec::new(),
            free: NO_SLOT,
            new: FlowList::EMPTY,
            old: FlowList::EMPTY,
            parked: FlowList::EMPTY,
            skipped: FlowList::EMPTY,
            shown: None,
            bytes: 0,
            items: 0,
            limit_bytes,
            limit_items: limit_items.min(NO_SLOT as usize),
            quantum_bytes: quantum_bytes.max(1),
            target_us: TARGET_US,
            interval_us: INTERVAL_US,
        }
    }

    /// Sets CoDel's target and interval in microseconds (at least 1 each).
    pub fn set_codel(&mut self, target_us: u64, interval_us: u64) {
        self.target_us = target_us.max(1);
        self.interval_us = interval_us.max(1);
    }

    /// Bytes waiting.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Items waiting; a partly sent one counts.
    pub fn items(&self) -> usize {
        self.items
    }

    /// Nothing is waiting.
    pub fn is_empty(&self) -> bool {
        self.items == 0
    }

    /// Appends `item` to the flow of `hash` (any 32 bits that are equal for one flow). Items that have to
    /// go for it, oldest of the fattest flow first, are handed to `dropped` (reason `QueueFull`); so is
    /// an item larger than the whole queue.
    pub fn enqueue(&mut self, now: Time, hash: u32, item: T, dropped: &mut impl FnMut(T)) {
        let bytes = item.bytes();
        if bytes > self.limit_bytes || self.limit_items == 0 {
            dropped(item);
            return;
        }
        if self.bytes + bytes > self.limit_bytes || self.items >= self.limit_items {
            self.make_room(bytes, dropped);
        }
        let slot = self.take_slot(item, bytes);
        let index = flow_of(hash);
        let flow = &mut self.flows[usize::from(index)];
        if flow.tail == NO_SLOT {
            flow.head = slot;
        } else {
            self.slots[flow.tail as usize].next = slot;
        }
        flow.tail = slot;
        flow.bytes += bytes;
        flow.meter(now, bytes);
        self.bytes += bytes;
        self.items += 1;
        if flow.place == Place::Idle {
            flow.place = Place::New;
            flow.deficit = self.quantum_bytes as i64;
            self.new.push(&mut self.flows, index);
        }
    }

    /// Next item to send. Stable: without an `enqueue` or `consume` in between it shows the same
    /// item again, and CoDel's clockwork advances only with [`Self::consume`].
    pub fn head(&mut self, now: Time) -> Option<Head<'_, T>> {
        let index = self.select()?;
        let flow = &mut self.flows[usize::from(index)];
        let slot = flow.head;
        let item = self.slots[slot as usize].item.as_mut()?;
        let sojourn_us = now.since(item.enqueued_at().max(flow.unparked_at)) / 1_000;
        let above = sojourn_us >= self.target_us && flow.bytes > self.quantum_bytes;
        let codel = if !flow.codel.wants_drop(now, above, self.interval_us) {
            CodelVerdict::Pass
        } else if item.ecn_capable() {
            CodelVerdict::Mark
        } else {
            CodelVerdict::Drop
        };
        self.shown = Some(Shown { flow: index, slot, codel });
        let sparse = flow.place == Place::New
            && flow.bytes <= self.quantum_bytes
            && flow.level_bytes <= SPARSE_BURST_BYTES;
        Some(Head { item, sparse, codel, flow: index, budget_bytes: flow.deficit.max(1) as usize })
    }

    /// Microseconds the item that [`Self::head`] would show has waited; 0 when nothing waits.
    pub fn head_sojourn_us(&mut self, now: Time) -> u64 {
        let Some(index) = self.select() else { return 0 };
        let slot = self.flows[usize::from(index)].head as usize;
        self.slots[slot].item.as_ref().map_or(0, |item| now.since(item.enqueued_at()) / 1_000)
    }

    /// Books `bytes` of the item that [`Self::head`] showed last as sent (or, after [`CodelVerdict::Drop`], as
    /// dropped, which does not count against the flow's turn). With `finished` the item leaves the
    /// queue and is returned, so that its buffer can be used again. Returns `None`, and does nothing,
    /// when that item is gone because `enqueue` needed its room.
    pub fn consume(&mut self, now: Time, bytes: usize, finished: bool) -> Option<T> {
        let shown = self.shown.take()?;
        let flow = &mut self.flows[usize::from(shown.flow)];
        if shown.codel != CodelVerdict::Pass {
            flow.codel.acted(now, self.interval_us);
        }
        if shown.codel != CodelVerdict::Drop {
            flow.deficit -= i64::try_from(bytes).unwrap_or(i64::MAX / 2);
        }
        let slot = &mut self.slots[shown.slot as usize];
        let counted = if finished { slot.bytes } else { bytes.min(slot.bytes) };
        slot.bytes -= counted;
        flow.bytes -= counted;
        self.bytes -= counted;
        let item = if finished { self.pop(shown.flow) } else { None };
        if self.items == 0 {
            // Nobody is left to share with: all flows are new again.
            self.select();
        }
        item
    }

    /// Sets the flow that [`Self::head`] showed last aside: its packets wait, in order, for [`Self::unpark_all`].
    pub fn park(&mut self) {
        if let Some(index) = self.take_shown(Place::Parked) {
            self.parked.push(&mut self.flows, index);
        }
    }

    /// Passes over the flow that [`Self::head`] showed last until [`Self::resume`]: what it needs is not free at the moment.
    pub fn skip(&mut self) {
        if let Some(index) = self.take_shown(Place::Skipped) {
            self.skipped.push(&mut self.flows, index);
        }
    }

    /// Lets flows that were passed over take part again, with the deficit they had and before all others, or those would always have
    /// taken what such a flow waits for. Unlike those set aside they waited for the queue's own reasons: it counts for CoDel.
    pub fn resume(&mut self) {
        let mut index = self.skipped.head;
        while index != NO_FLOW {
            let flow = &mut self.flows[usize::from(index)];
            flow.place = Place::Old;
            index = flow.next;
        }
        let skipped = std::mem::replace(&mut self.skipped, FlowList::EMPTY);
        self.old.prepend(&mut self.flows, skipped);
    }

    /// Takes the flow that was shown out of its list.
    fn take_shown(&mut self, to: Place) -> Option<u16> {
        let shown = self.shown.take()?;
        let flow = &mut self.flows[usize::from(shown.flow)];
        let list = match flow.place {
            Place::New => &mut self.new,
            Place::Old => &mut self.old,
            Place::Idle | Place::Parked | Place::Skipped => return None,
        };
        // Only the head of a list is ever shown.
        if list.head != shown.flow {
            return None;
        }
        flow.place = to;
        list.pop(&self.flows);
        Some(shown.flow)
    }

    /// Lets all flows that were set aside take part again. Their wait was not the queue's doing and does not count for CoDel.
    pub fn unpark_all(&mut self, now: Time) {
        while self.parked.head != NO_FLOW {
            let index = self.parked.head;
            self.parked.pop(&self.flows);
            let flow = &mut self.flows[usize::from(index)];
            flow.place = Place::Old;
            flow.deficit = self.quantum_bytes as i64;
            flow.unparked_at = now;
            flow.codel.emptied();
            self.old.push(&mut self.flows, index);
        }
    }

    /// The flow whose turn it is (RFC 8290 §4.2): new flows first, each as long as it has a deficit.
    fn select(&mut self) -> Option<u16> {
        loop {
            let place = if self.new.head != NO_FLOW { Place::New } else { Place::Old };
            let list = if place == Place::New { &mut self.new } else { &mut self.old };
            let index = list.head;
            if index == NO_FLOW {
                return None;
            }
            let (alone, quantum) = (list.head == list.tail, self.quantum_bytes as i64);
            let flow = &mut self.flows[usize::from(index)];
            if flow.head == NO_SLOT {
                flow.codel.emptied();
                list.pop(&self.flows);
                // An emptied new flow goes through the old list once, or it could starve the others by
                // coming back as new all the time.
                if place == Place::New && self.old.head != NO_FLOW {
                    self.flows[usize::from(index)].place = Place::Old;
                    self.old.push(&mut self.flows, index);
                } else {
                    self.flows[usize::from(index)].place = Place::Idle;
                }
            } else if flow.deficit > 0 {
                return Some(index);
            } else if place == Place::Old && alone {
                // Nobody to share with: spare the rounds that a 64 KB debt would take.
                flow.deficit = quantum;
            } else {
                flow.deficit = flow.deficit.saturating_add(quantum);
                flow.place = Place::Old;
                list.pop(&self.flows);
                self.old.push(&mut self.flows, index);
            }
        }
    }

    /// Drops from the head of the fattest flows until `bytes` and one item fit, and then a 64th of the
    /// limit more from the same flow, so that a flood does not search on every packet.
    #[cold]
    fn make_room(&mut self, bytes: usize, dropped: &mut impl FnMut(T)) {
        let slack_bytes = self.limit_bytes / 64;
        let slack_items = self.limit_items / 64;
        while self.bytes + bytes > self.limit_bytes || self.items >= self.limit_items {
            let Some(index) = self.fattest() else { return };
            while (self.bytes + bytes + slack_bytes > self.limit_bytes
                || self.items + slack_items >= self.limit_items)
                && let Some(item) = self.pop(index)
            {
                dropped(item);
            }
        }
    }

    fn fattest(&self) -> Option<u16> {
        let mut best = None;
        let mut most = 0;
        for start in [self.new.head, self.old.head, self.parked.head, self.skipped.head] {
            let mut index = start;
            while index != NO_FLOW {
                let flow = &self.flows[usize::from(index)];
                // +1: items without bytes are dropped, too, when their number is the problem.
                if flow.head != NO_SLOT && flow.bytes + 1 > most {
                    most = flow.bytes + 1;
                    best = Some(index);
                }
                index = flow.next;
            }
        }
        best
    }

    fn take_slot(&mut self, item: T, bytes: usize) -> u32 {
        let slot = Slot { item: Some(item), bytes, next: NO_SLOT };
        if self.free == NO_SLOT {
            self.slots.push(slot);
            return (self.slots.len() - 1) as u32;
        }
        let index = self.free;
        self.free = self.slots[index as usize].next;
        self.slots[index as usize] = slot;
        index
    }

    /// Removes the oldest item of a flow, with all its counters.
    fn pop(&mut self, index: u16) -> Option<T> {
        let flow = &mut self.flows[usize::from(index)];
        let slot = self.slots.get_mut(flow.head as usize)?;
        let number = flow.head;
        if self.shown.is_some_and(|shown| shown.slot == number) {
            self.shown = None;
        }
        flow.head = slot.next;
        if flow.head == NO_SLOT {
            flow.tail = NO_SLOT;
        }
        flow.bytes -= slot.bytes;
        self.bytes -= slot.bytes;
        self.items -= 1;
        slot.bytes = 0;
        slot.next = self.free;
        self.free = number;
        slot.item.take()
    }
}

/// The hash's bits have chosen a node and a core already; multiplying mixes the rest of them in.
fn flow_of(hash: u32) -> u16 {
    (hash.wrapping_mul(0x9e37_79b1) >> 22) as u16
}
