//! The model of one direction of a link, without a clock and without I/O.
//!
//! A packet passes, in this order, what it passes on a real access link:
//!
//! 1. the **queue** in front of the modem, which drops at its tail when it is full;
//! 2. the **line**, which takes `wire bytes / rate` for each packet, one after another;
//! 3. the **ether**: loss, corruption and duplicates, which have used up line time by then;
//! 4. the **way**: delay, jitter, packets that are held back.
//!
//! The simulator runs it in virtual time, the test bed's emulator in real time between interfaces.
//!
//! [`Direction::offer`] takes a packet, [`Direction::pop`] gives back those that arrive. Times are
//! nanoseconds of any clock of the caller's that does not run backwards. The line's times are computed from the end of the packet
//! before, never from the moment of the call, and what a division leaves over is carried on: a late
//! caller does not slow the line, and the rate does not drift.
//! Everything may be changed while packets are under way: what waits in the queue leaves at the new rate.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use fastrand::Rng;

/// Bytes an Ethernet frame costs on the wire beyond the IP packet: header 14, checksum 4, preamble and
/// start 8, gap 12.
pub const WIRE_OVERHEAD_BYTES: u32 = 38;

/// Payload is padded to so many bytes, which is what makes 64 the shortest frame.
const SHORTEST_PAYLOAD_BYTES: u32 = 46;

/// Nanoseconds in a second.
const SECOND_NS: u64 = 1_000_000_000;

/// Bytes on an Ethernet wire for an IP packet of this size.
#[must_use]
pub fn wire_bytes(ip_bytes: u32) -> u32 {
    ip_bytes.max(SHORTEST_PAYLOAD_BYTES).saturating_add(WIRE_OVERHEAD_BYTES)
}

/// How much may wait in front of the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueLimit {
    /// As many wire bytes as the line sends in this time, in milliseconds, but at least two full packets.
    Ms(u32),
    /// So many wire bytes.
    Bytes(u64),
}

/// The properties of one direction of a link.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// Line rate in bits per second, counted on the wire ([`wire_bytes`]); 0 = as fast as the machine goes.
    pub rate_bps: u64,
    /// One-way delay, microseconds.
    pub delay_us: u32,
    /// Jitter: every packet's delay is changed by −`jitter_us`..+`jitter_us`, small changes more often
    /// than large ones (triangular), never below zero.
    pub jitter_us: u32,
    /// Whether jitter may bring packets out of order; otherwise a packet waits for the one before it.
    pub reorder: bool,
    /// Probability that a packet is lost, 0.0..=1.0.
    pub loss: f64,
    /// Mean number of packets lost in a row; 1.0 or less = independent losses. The share lost stays [`loss`](Self::loss).
    pub loss_burst: f64,
    /// Probability that one bit of a packet is flipped, 0.0..=1.0.
    pub corrupt: f64,
    /// Probability that a packet arrives twice, 0.0..=1.0.
    pub duplicate: f64,
    /// Probability that a packet is held back, so that others overtake it, 0.0..=1.0 …
    pub late: f64,
    /// … for so long, microseconds.
    pub late_us: u32,
    /// Limit of the queue.
    pub queue: QueueLimit,
    /// Longest IP packet that passes, in bytes; longer ones vanish. Lets a path MTU below the interface's be tested.
    pub mtu: u32,
    /// Silent black hole: whatever would arrive vanishes, and nobody is told.
    pub black_hole: bool,
}

impl Default for Shape {
    /// A perfect link: no limit, no delay, no loss.
    fn default() -> Self {
        Self {
            rate_bps: 0,
            delay_us: 0,
            jitter_us: 0,
            reorder: false,
            loss: 0.0,
            loss_burst: 1.0,
            corrupt: 0.0,
            duplicate: 0.0,
            late: 0.0,
            late_us: 0,
            queue: QueueLimit::Ms(120),
            mtu: u32::MAX,
            black_hole: false,
        }
    }
}

impl Shape {
    /// A link of `mbps` Mbit/s and `delay_ms` milliseconds one way, with a queue of 120 ms.
    #[must_use]
    pub fn new(mbps: f64, delay_ms: f64) -> Self {
        Self { rate_bps: (mbps * 1e6) as u64, delay_us: (delay_ms * 1e3) as u32, ..Self::default() }
    }

    /// The same with a share of packets lost at random, in percent.
    #[must_use]
    pub fn loss_percent(mut self, percent: f64) -> Self {
        self.loss = percent / 100.0;
        self
    }

    /// The same with independent loss of this share.
    #[must_use]
    pub fn loss(mut self, share: f64) -> Self {
        self.loss = share;
        self
    }

    /// The same with loss of this share in bursts of so many packets on average.
    #[must_use]
    pub fn burst_loss(mut self, share: f64, burst: f64) -> Self {
        (self.loss, self.loss_burst) = (share, burst);
        self
    }

    /// The same with up to `us` microseconds more delay, with or without reordering.
    #[must_use]
    pub fn jitter(mut self, us: u32, reorder: bool) -> Self {
        self.delay_us += us / 2;
        (self.jitter_us, self.reorder) = (us / 2, reorder);
        self
    }

    /// The same with a share of packets that come `us` microseconds later than the others.
    #[must_use]
    pub fn late(mut self, share: f64, us: u32) -> Self {
        (self.late, self.late_us) = (share, us);
        self
    }

    /// The same with a flipped bit in a share of the packets.
    #[must_use]
    pub fn corrupt(mut self, share: f64) -> Self {
        self.corrupt = share;
        self
    }

    /// The same with a share of packets that arrive twice.
    #[must_use]
    pub fn duplicate(mut self, share: f64) -> Self {
        self.duplicate = share;
        self
    }

    /// The same with another queue limit.
    #[must_use]
    pub fn queue(mut self, queue: QueueLimit) -> Self {
        self.queue = queue;
        self
    }

    /// The same with jitter, in milliseconds.
    #[must_use]
    pub fn jitter_ms(mut self, jitter_ms: f64) -> Self {
        self.jitter_us = (jitter_ms * 1e3) as u32;
        self
    }

    /// The same with a longest IP packet, in bytes.
    #[must_use]
    pub fn mtu(mut self, mtu: u32) -> Self {
        self.mtu = mtu;
        self
    }

    fn queue_bytes_max(&self) -> u64 {
        match self.queue {
            QueueLimit::Bytes(bytes) => bytes,
            QueueLimit::Ms(ms) => {
                let bytes = u128::from(self.rate_bps) * u128::from(ms) / 8_000;
                u64::try_from(bytes).unwrap_or(u64::MAX).max(2 * u64::from(wire_bytes(1500)))
            }
        }
    }
}

/// Why a packet did not arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dropped {
    /// The queue was full.
    Queue,
    /// Longer than [`Shape::mtu`].
    TooBig,
}

/// Counters of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Packets offered.
    pub offered: u64,
    /// Packets that arrived.
    pub delivered: u64,
    /// Wire bytes of the packets that arrived.
    pub delivered_bytes: u64,
    /// Dropped because the queue was full.
    pub queue_full: u64,
    /// Dropped because they were longer than [`Shape::mtu`].
    pub too_big: u64,
    /// Lost at random.
    pub lost: u64,
    /// Swallowed by the black hole.
    pub swallowed: u64,
    /// Arrived with a flipped bit.
    pub corrupted: u64,
}

/// A packet that arrives.
#[derive(Debug, PartialEq, Eq)]
pub struct Arrival<P> {
    /// Packet as it was offered.
    pub packet: P,
    /// When it arrives, ns.
    pub at_ns: u64,
    /// Flip this bit (modulo the packet's length in bits).
    pub flip_bit: Option<u64>,
    /// It arrives twice.
    pub duplicate: bool,
}

/// A packet on its way, behind the line. Ordered by arrival, then by order of sending.
#[derive(Clone, Debug)]
struct Flight<P> {
    at_ns: u64,
    number: u64,
    wire_bytes: u32,
    flip_bit: Option<u64>,
    duplicate: bool,
    packet: P,
}

impl<P> PartialEq for Flight<P> {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}
impl<P> Eq for Flight<P> {}
impl<P> PartialOrd for Flight<P> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl<P> Ord for Flight<P> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at_ns, self.number).cmp(&(other.at_ns, other.number))
    }
}

/// The packet that the line is sending.
#[derive(Clone, Debug)]
struct Sending<P> {
    packet: P,
    wire_bytes: u32,
    /// Since when the line sends it at the present rate, ns.
    since_ns: u64,
    /// Bits left at `since_ns`, in units of 1/`SECOND_NS` bit, so that no division loses anything.
    left: u128,
    /// When its last bit is out, ns.
    end_ns: u64,
}

/// One direction of a link. `P` is whatever stands for a packet.
#[derive(Clone, Debug)]
pub struct Direction<P> {
    shape: Shape,
    random: Rng,
    /// The last packet lost was lost (for bursts).
    in_burst: bool,
    waiting: VecDeque<(P, u32, u64)>,
    waiting_bytes: u64,
    sending: Option<Sending<P>>,
    /// Fraction of a nanosecond the last packet ended later than its `end_ns` says, as remainder of the division by the rate.
    remainder: u128,
    flying: BinaryHeap<Reverse<Flight<P>>>,
    number: u64,
    last_arrival_ns: u64,
    counters: Counters,
}

impl<P> Direction<P> {
    /// An idle link; the same seed and the same calls give the same result.
    #[must_use]
    pub fn new(shape: Shape, seed: u64) -> Self {
        Self {
            shape,
            random: Rng::with_seed(seed),
            in_burst: false,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            sending: None,
            remainder: 0,
            flying: BinaryHeap::new(),
            number: 0,
            last_arrival_ns: 0,
            counters: Counters::default(),
        }
    }

    /// The properties as they are now.
    #[must_use]
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Counters so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Wire bytes that wait for the line, with those of the packet it is sending.
    #[must_use]
    pub fn backlog_bytes(&self) -> u64 {
        self.waiting_bytes + self.sending.as_ref().map_or(0, |s| u64::from(s.wire_bytes))
    }

    /// Changes the properties. A packet half sent is finished at the new rate, what flies keeps its arrival.
    pub fn set_shape(&mut self, now_ns: u64, shape: Shape) {
        self.advance(now_ns);
        let old_rate = self.shape.rate_bps;
        self.shape = shape;
        let rate = self.shape.rate_bps;
        if rate != old_rate
            && let Some(sending) = &mut self.sending
        {
            let since = now_ns.max(sending.since_ns);
            let sent = u128::from(since - sending.since_ns) * u128::from(old_rate);
            sending.left = sending.left.saturating_sub(sent);
            sending.since_ns = since;
            self.remainder = 0;
            (sending.end_ns, self.remainder) = end_of(since, sending.left, rate);
        }
        self.advance(now_ns);
    }

    /// Offers a packet of `ip_bytes` (without Ethernet header) that came at `now_ns`.
    /// Gives it back with the reason when the link does not take it.
    pub fn offer(&mut self, now_ns: u64, ip_bytes: u32, packet: P) -> Result<(), (P, Dropped)> {
        self.advance(now_ns);
        self.counters.offered += 1;
        if ip_bytes > self.shape.mtu {
            self.counters.too_big += 1;
            return Err((packet, Dropped::TooBig));
        }
        let bytes = wire_bytes(ip_bytes);
        if self.sending.is_none() {
            self.start(now_ns, packet, bytes, false);
            self.advance(now_ns);
            return Ok(());
        }
        if self.backlog_bytes() + u64::from(bytes) > self.shape.queue_bytes_max() {
            self.counters.queue_full += 1;
            return Err((packet, Dropped::Queue));
        }
        self.waiting_bytes += u64::from(bytes);
        self.waiting.push_back((packet, bytes, now_ns));
        Ok(())
    }

    /// When the next thing happens inside, ns; `None` when the link is empty. Never later than the next arrival.
    #[must_use]
    pub fn next_event_ns(&self) -> Option<u64> {
        // The packet on the line cannot arrive before its end plus the shortest delay: sleep until then.
        let line = self.sending.as_ref().map(|s| s.end_ns.saturating_add(self.shortest_delay_ns()));
        let way = self.flying.peek().map(|f| f.0.at_ns);
        match (line, way) {
            (Some(line), Some(way)) => Some(line.min(way)),
            (line, way) => line.or(way),
        }
    }

    /// The next packet that has arrived by `now_ns`, or `None`. Call it until it says `None`.
    pub fn pop(&mut self, now_ns: u64) -> Option<Arrival<P>> {
        self.pop_until(now_ns, now_ns)
    }

    /// The same with those that will arrive by `until_ns`, for a caller that cannot come at the exact moment and
    /// prefers to be a little early half of the time over being late always.
    pub fn pop_until(&mut self, now_ns: u64, until_ns: u64) -> Option<Arrival<P>> {
        self.advance(now_ns);
        loop {
            if self.flying.peek()?.0.at_ns > until_ns {
                return None;
            }
            let Reverse(flight) = self.flying.pop()?;
            if self.shape.black_hole {
                self.counters.swallowed += 1;
                continue;
            }
            self.counters.delivered += 1;
            self.counters.delivered_bytes += u64::from(flight.wire_bytes);
            self.counters.corrupted += u64::from(flight.flip_bit.is_some());
            let Flight { packet, at_ns, flip_bit, duplicate, .. } = flight;
            return Some(Arrival { packet, at_ns, flip_bit, duplicate });
        }
    }

    /// Forgets every packet under way, as a link that loses its carrier does.
    pub fn clear(&mut self) {
        let swallowed = self.waiting.len() + usize::from(self.sending.is_some()) + self.flying.len();
        self.counters.swallowed += swallowed as u64;
        self.waiting.clear();
        self.waiting_bytes = 0;
        self.sending = None;
        self.flying.clear();
    }

    fn shortest_delay_ns(&self) -> u64 {
        u64::from(self.shape.delay_us.saturating_sub(self.shape.jitter_us)) * 1_000
    }

    /// Lets the line work until `now_ns`.
    fn advance(&mut self, now_ns: u64) {
        while self.sending.as_ref().is_some_and(|s| s.end_ns <= now_ns) {
            let Some(done) = self.sending.take() else { return };
            self.take_off(done.end_ns, done.packet, done.wire_bytes);
            if let Some((packet, bytes, came_ns)) = self.waiting.pop_front() {
                self.waiting_bytes -= u64::from(bytes);
                let back_to_back = came_ns <= done.end_ns;
                self.start(done.end_ns.max(came_ns), packet, bytes, back_to_back);
            }
        }
    }

    /// The line begins to send a packet.
    fn start(&mut self, since_ns: u64, packet: P, wire_bytes: u32, back_to_back: bool) {
        let carried = if back_to_back { self.remainder } else { 0 };
        let left = u128::from(wire_bytes) * 8 * u128::from(SECOND_NS) + carried;
        let (end_ns, remainder) = end_of(since_ns, left, self.shape.rate_bps);
        self.remainder = remainder;
        self.sending = Some(Sending { packet, wire_bytes, since_ns, left, end_ns });
    }

    /// A packet has left the line at `at_ns`: lost, or on its way.
    fn take_off(&mut self, at_ns: u64, packet: P, wire_bytes: u32) {
        if self.is_lost() {
            self.counters.lost += 1;
            return;
        }
        let flip_bit = self.happens(self.shape.corrupt).then(|| self.random.u64(..));
        let mut arrival = at_ns.saturating_add(self.delay_ns());
        if !self.shape.reorder {
            arrival = arrival.max(self.last_arrival_ns);
        }
        self.last_arrival_ns = self.last_arrival_ns.max(arrival);
        if self.happens(self.shape.late) {
            arrival += u64::from(self.shape.late_us) * 1_000;
        }
        let duplicate = self.happens(self.shape.duplicate);
        self.number += 1;
        self.flying.push(Reverse(Flight {
            at_ns: arrival,
            number: self.number,
            wire_bytes,
            flip_bit,
            duplicate,
            packet,
        }));
    }

    fn happens(&mut self, share: f64) -> bool {
        share > 0.0 && self.random.f64() < share
    }

    fn delay_ns(&mut self) -> u64 {
        let delay = u64::from(self.shape.delay_us) * 1_000;
        let jitter = u64::from(self.shape.jitter_us) * 1_000;
        if jitter == 0 {
            return delay;
        }
        // The sum of two even draws is triangular around `jitter`.
        let change = self.random.u64(..jitter) + self.random.u64(..jitter);
        (delay + change).saturating_sub(jitter)
    }

    /// Two-state loss (Gilbert): in a burst everything is lost, and a burst ends with probability 1 / mean length.
    fn is_lost(&mut self) -> bool {
        let loss = self.shape.loss;
        if loss <= 0.0 {
            self.in_burst = false;
            return false;
        }
        if self.shape.loss_burst <= 1.0 || loss >= 1.0 {
            return self.random.f64() < loss;
        }
        let end = 1.0 / self.shape.loss_burst;
        // The share of time in the burst state is begin / (begin + end) = loss.
        let begin = end * loss / (1.0 - loss);
        let change = self.random.f64();
        self.in_burst = if self.in_burst { change >= end } else { change < begin };
        self.in_burst
    }
}

/// When `left` (bits × 10⁹) are out at `rate` from `since_ns` on, and the remainder of that division.
fn end_of(since_ns: u64, left: u128, rate_bps: u64) -> (u64, u128) {
    if rate_bps == 0 {
        return (since_ns, 0);
    }
    let rate = u128::from(rate_bps);
    let ns = u64::try_from(left / rate).unwrap_or(u64::MAX);
    (since_ns.saturating_add(ns), left % rate)
}

#[cfg(test)]
mod tests;
