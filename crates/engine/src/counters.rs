//! Per-core counters: one writer (the worker), read at scrape.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use packet::drop_reason::{DropCounters, DropReason};

/// Flows a core can tell apart for the operator.
const FLOW_SLOTS: usize = 8_192;
/// A flow not seen for this long is over, as far as the count goes.
const FLOW_IDLE_MS: u32 = 20_000;
/// A flow that was silent for so long may have been elsewhere in between.
const FLOW_PAUSE_MS: u32 = 2_000;
/// Packets of a flow that moves to another core may be under way to the old one for so long.
const FLOW_MOVE_MS: u32 = 50;

/// A number with one writer: a plain load and store, never a locked instruction.
#[derive(Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to it. Only the worker that owns it may.
    #[inline]
    pub fn add(&self, value: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(value), Relaxed);
    }

    /// Sets it. Only the worker that owns it may.
    pub fn set(&self, value: u64) {
        self.0.store(value, Relaxed);
    }

    /// Raises it to a value if that is higher. Only the worker that owns it may.
    #[inline]
    pub fn raise(&self, value: u64) {
        if value > self.get() {
            self.set(value);
        }
    }

    /// Reads it.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// How long a core has been processing a flow: milliseconds, low 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowStay {
    /// Hash of the flow, or of a packet in fragments.
    pub hash: u32,
    /// First packet since it came here.
    pub first_ms: u32,
    /// Last packet.
    pub last_ms: u32,
}

impl FlowStay {
    /// Whether two cores processed the flow by turns: a flow that moved was at one after the other.
    #[must_use]
    pub fn is_split_from(&self, other: &Self) -> bool {
        let within = |from: u32, to: u32| to.wrapping_sub(from).cast_signed() > FLOW_MOVE_MS.cast_signed();
        self.hash == other.hash
            && within(self.first_ms, other.last_ms)
            && within(other.first_ms, self.last_ms)
    }
}

/// Number of flows that more than one of the cores processed by turns.
#[must_use]
pub fn split_flows(cores: &[Vec<FlowStay>]) -> u64 {
    let mut all: Vec<FlowStay> = cores.iter().flatten().copied().collect();
    all.sort_unstable_by_key(|stay| stay.hash);
    let same = all.chunk_by(|a, b| a.hash == b.hash);
    let split = |stays: &&[FlowStay]| {
        let mut pairs =
            stays.iter().enumerate().flat_map(|(at, a)| stays.iter().skip(at + 1).map(move |b| (a, b)));
        pairs.any(|(a, b)| a.is_split_from(b))
    };
    same.filter(split).count() as u64
}

/// Frames of the TAP device.
#[derive(Default)]
pub struct TapCounters {
    /// Frames read; a super-frame counts as its segments.
    pub rx_frames: Counter,
    /// Bytes of them.
    pub rx_bytes: Counter,
    /// Frames written.
    pub tx_frames: Counter,
    /// Bytes of them.
    pub tx_bytes: Counter,
}

/// Counters of one worker.
pub struct Counters {
    /// Packets read from TUN; a super-packet counts as its segments.
    pub tun_rx_packets: Counter,
    /// Bytes of them.
    pub tun_rx_bytes: Counter,
    /// Packets written to TUN, as segments.
    pub tun_tx_packets: Counter,
    /// Bytes of them.
    pub tun_tx_bytes: Counter,
    /// Frames of the TAP device.
    pub tap: TapCounters,
    /// Datagrams received.
    pub udp_rx_datagrams: Counter,
    /// Bytes of them.
    pub udp_rx_bytes: Counter,
    /// Datagrams sent.
    pub udp_tx_datagrams: Counter,
    /// Bytes of them.
    pub udp_tx_bytes: Counter,
    /// Frames read from interfaces; a super-packet counts as one.
    pub interface_rx_packets: Counter,
    /// Items that came over a ring.
    pub ring_in: Counter,
    /// Items handed over a ring.
    pub ring_out: Counter,
    /// Nanoseconds not asleep.
    pub busy_ns: Counter,
    /// The longest round, ns: while it lasts, packets wait.
    pub round_ns_max: Counter,
    /// Rounds of more than a millisecond.
    pub rounds_over_1ms: Counter,
    /// Rounds of more than five.
    pub rounds_over_5ms: Counter,
    /// How long the last new policy held up its round, ns.
    pub reload_ns_last: Counter,
    /// The longest of all, ns.
    pub reload_ns_max: Counter,
    /// The most CPU time that one took, ns: without what others did meanwhile on this CPU.
    pub reload_cpu_ns_max: Counter,
    /// Drops by reason.
    drops: Vec<AtomicU64>,
    /// Flows that came by a bond: hash in the high half, when last seen in the low half, ms.
    flows: Box<[AtomicU64]>,
    /// Since when each has been here without a pause, ms.
    flow_begins: Box<[AtomicU32]>,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            tun_rx_packets: Counter::default(),
            tun_rx_bytes: Counter::default(),
            tun_tx_packets: Counter::default(),
            tun_tx_bytes: Counter::default(),
            tap: TapCounters::default(),
            udp_rx_datagrams: Counter::default(),
            udp_rx_bytes: Counter::default(),
            udp_tx_datagrams: Counter::default(),
            udp_tx_bytes: Counter::default(),
            interface_rx_packets: Counter::default(),
            ring_in: Counter::default(),
            ring_out: Counter::default(),
            busy_ns: Counter::default(),
            round_ns_max: Counter::default(),
            rounds_over_1ms: Counter::default(),
            rounds_over_5ms: Counter::default(),
            reload_ns_last: Counter::default(),
            reload_ns_max: Counter::default(),
            reload_cpu_ns_max: Counter::default(),
            drops: (0..DropReason::COUNT).map(|_| AtomicU64::new(0)).collect(),
            flows: (0..FLOW_SLOTS).map(|_| AtomicU64::new(0)).collect(),
            flow_begins: (0..FLOW_SLOTS).map(|_| AtomicU32::new(0)).collect(),
        }
    }
}

impl Counters {
    /// Notes how long a round took.
    #[inline]
    pub fn note_round(&self, took_ns: u64) {
        self.busy_ns.add(took_ns);
        self.round_ns_max.raise(took_ns);
        if took_ns > 1_000_000 {
            self.rounds_over_1ms.add(1);
            self.rounds_over_5ms.add(u64::from(took_ns > 5_000_000));
        }
    }

    /// Notes how long the worker took over a new policy, by the clock and in CPU time.
    pub fn note_reload(&self, took_ns: u64, cpu_ns: u64) {
        self.reload_ns_last.set(took_ns);
        self.reload_ns_max.raise(took_ns);
        self.reload_cpu_ns_max.raise(cpu_ns);
    }

    /// Notes that this core processed a packet of a flow that came by a bond. `now_ms`: the low 32 bits of a clock in
    /// milliseconds.
    #[inline]
    pub fn note_flow(&self, hash: u32, now_ms: u32) {
        let place = hash.wrapping_mul(0x9e37_79b1) as usize >> 16 & (FLOW_SLOTS - 1);
        let (Some(slot), Some(begin)) = (self.flows.get(place), self.flow_begins.get(place)) else { return };
        let before = slot.load(Relaxed);
        let stays = (before >> 32) as u32 == hash && now_ms.wrapping_sub(before as u32) <= FLOW_PAUSE_MS;
        if !stays {
            begin.store(now_ms, Relaxed);
        }
        slot.store(u64::from(hash) << 32 | u64::from(now_ms), Relaxed);
    }

    /// Flows of the last 20 s.
    pub fn flows(&self, now_ms: u32) -> Vec<FlowStay> {
        let stay = |(slot, begin): (&AtomicU64, &AtomicU32)| {
            let (entry, first_ms) = (slot.load(Relaxed), begin.load(Relaxed));
            FlowStay { hash: (entry >> 32) as u32, first_ms, last_ms: entry as u32 }
        };
        let recent = |stay: &FlowStay| {
            (stay.hash, stay.last_ms) != (0, 0) && now_ms.wrapping_sub(stay.last_ms) <= FLOW_IDLE_MS
        };
        self.flows.iter().zip(&self.flow_begins).map(stay).filter(recent).collect()
    }

    /// Publishes the worker's drops.
    pub fn set_drops(&self, drops: &DropCounters) {
        for (reason, count) in drops.iter() {
            self.drops[reason as usize].store(count, Relaxed);
        }
    }

    /// Drops by reason, all of them.
    pub fn drops(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL.iter().map(|reason| (*reason, self.drops[*reason as usize].load(Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_rounds_are_remembered() {
        let counters = Counters::default();
        for took_ns in [900_000, 1_000_001, 7_000_000, 4_000_000] {
            counters.note_round(took_ns);
        }
        let rounds =
            (counters.round_ns_max.get(), counters.rounds_over_1ms.get(), counters.rounds_over_5ms.get());
        assert_eq!((rounds, counters.busy_ns.get()), ((7_000_000, 3, 1), 12_900_001));
        counters.note_reload(50, 40);
        counters.note_reload(30, 45);
        let reloads =
            (counters.reload_ns_last.get(), counters.reload_ns_max.get(), counters.reload_cpu_ns_max.get());
        assert_eq!(reloads, (30, 50, 45));
    }

    #[test]
    fn flows_are_counted_once_and_forgotten() {
        let counters = Counters::default();
        for _ in 0..3 {
            counters.note_flow(7, 100_000);
            counters.note_flow(1 << 20, 101_000);
        }
        let mut flows: Vec<u32> = counters.flows(105_000).iter().map(|stay| stay.hash).collect();
        flows.sort_unstable();
        assert_eq!(flows, [7, 1 << 20]);
        assert!(counters.flows(130_000).is_empty());
    }

    #[test]
    fn a_flow_that_moves_is_not_split_and_one_that_alternates_is() {
        let cores = [Counters::default(), Counters::default()];
        let flows = |now_ms| split_flows(&cores.each_ref().map(|core| core.flows(now_ms)));
        for now_ms in (1_000..2_000).step_by(10) {
            cores[0].note_flow(7, now_ms);
        }
        for now_ms in (1_980..3_000).step_by(10) {
            cores[1].note_flow(7, now_ms);
        }
        assert_eq!(flows(3_000), 0, "it moved");
        for now_ms in (3_000..4_000).step_by(10) {
            cores[(now_ms / 10 % 2) as usize].note_flow(9, now_ms);
            cores[0].note_flow(11, now_ms);
        }
        assert_eq!(flows(4_000), 1, "flow 9 is at both by turns");
    }
}
