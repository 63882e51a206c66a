//! Per-core counters: one writer (the worker), read at scrape.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use packet::drop_reason::{DropCounters, DropReason};

/// Flows a core can tell apart for the operator.
const FLOW_SLOTS: usize = 8_192;
/// A flow not seen for this long is over, as far as the count goes.
const FLOW_IDLE_SECONDS: u32 = 20;

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

/// What one worker counts.
pub struct Counters {
    /// Packets read from TUN; a super-packet counts as its segments.
    pub tun_rx_packets: Counter,
    /// Bytes of them.
    pub tun_rx_bytes: Counter,
    /// Packets written to TUN, as segments.
    pub tun_tx_packets: Counter,
    /// Bytes of them.
    pub tun_tx_bytes: Counter,
    /// Datagrams received.
    pub udp_rx_datagrams: Counter,
    /// Bytes of them.
    pub udp_rx_bytes: Counter,
    /// Datagrams sent.
    pub udp_tx_datagrams: Counter,
    /// Bytes of them.
    pub udp_tx_bytes: Counter,
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
    /// Inner flows processed after decryption: hash in the high half, last second seen in the low half.
    flows: Box<[AtomicU64]>,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            tun_rx_packets: Counter::default(),
            tun_rx_bytes: Counter::default(),
            tun_tx_packets: Counter::default(),
            tun_tx_bytes: Counter::default(),
            udp_rx_datagrams: Counter::default(),
            udp_rx_bytes: Counter::default(),
            udp_tx_datagrams: Counter::default(),
            udp_tx_bytes: Counter::default(),
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

    /// Notes that this core processed a flow after decryption.
    #[inline]
    pub fn note_flow(&self, hash: u32, now_s: u32) {
        let slot = &self.flows[hash.wrapping_mul(0x9e37_79b1) as usize >> 16 & (FLOW_SLOTS - 1)];
        slot.store(u64::from(hash) << 32 | u64::from(now_s), Relaxed);
    }

    /// Hashes of the flows of the last 20 s.
    pub fn flows(&self, now_s: u32) -> Vec<u32> {
        let recent = |entry: &u64| *entry != 0 && now_s.wrapping_sub(*entry as u32) <= FLOW_IDLE_SECONDS;
        self.flows
            .iter()
            .map(|slot| slot.load(Relaxed))
            .filter(recent)
            .map(|entry| (entry >> 32) as u32)
            .collect()
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
            counters.note_flow(7, 100);
            counters.note_flow(1 << 20, 101);
        }
        let mut flows = counters.flows(105);
        flows.sort_unstable();
        assert_eq!(flows, [7, 1 << 20]);
        assert!(counters.flows(130).is_empty());
    }
}
