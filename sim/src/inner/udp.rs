//! A greedy paced flow of UDP packets with numbers, and a sink that knows what it should get.

use tunnel::time::Time;

use super::packet::{Parsed, u64_at, udp};
use super::{Emit, Ends, pattern};

/// Bytes in front of the pattern: number of the packet, time it was sent (ns).
const HEAD_BYTES: usize = 16;

/// How a flow sends.
#[derive(Clone, Copy, Debug)]
pub struct UdpSpec {
    /// Whole IP packets of this size, bytes (44–1,500).
    pub packet_bytes: usize,
    /// Time between two packets, ns.
    pub every_ns: u64,
    /// Packets that leave together.
    pub burst: u32,
    /// First packet.
    pub start: Time,
    /// No packet leaves at or after this.
    pub stop: Time,
}

impl UdpSpec {
    /// Packets of `packet_bytes` at `mbps` Mbit/s of IP bytes between `start` and `stop`.
    pub fn mbps(packet_bytes: usize, mbps: f64, start: Time, stop: Time) -> Self {
        let every_ns = (packet_bytes as f64 * 8e3 / mbps) as u64;
        Self { packet_bytes, every_ns, burst: 1, start, stop }
    }
}

/// Statistics of the sink.
#[derive(Clone, Debug, Default)]
pub struct UdpStats {
    /// Packets sent.
    pub sent: u64,
    /// Different packets received.
    pub received: u64,
    /// Packets received more than once.
    pub repeated: u64,
    /// Packets that came after a later one.
    pub disordered: u64,
    /// Packets whose content was wrong.
    pub corrupt: u64,
    /// Longest time without a packet, from the first to the last one received, ns.
    pub gap_ns_max: u64,
    /// Longest time in the tunnel, ns.
    pub delay_ns_max: u64,
    /// Sum of the times in the tunnel, ns.
    pub delay_ns_sum: u64,
    /// When the last one came.
    pub last: Time,
}

/// The flow with both ends.
pub struct UdpFlow {
    ends: Ends,
    spec: UdpSpec,
    next: Time,
    seen: Vec<bool>,
    highest: Option<u64>,
    stats: UdpStats,
    /// Gaps count from here on; a test sets it before it cuts a link.
    gap_from: Time,
}

impl UdpFlow {
    /// A flow between `ends`.
    pub fn new(ends: Ends, spec: UdpSpec) -> Self {
        Self {
            ends,
            spec,
            next: spec.start,
            seen: Vec::new(),
            highest: None,
            stats: UdpStats::default(),
            gap_from: Time::ZERO,
        }
    }

    /// Statistics of the sink so far.
    pub fn stats(&self) -> &UdpStats {
        &self.stats
    }

    /// Numbers of the packets that are missing so far.
    pub fn missing(&self) -> Vec<u64> {
        (0..self.stats.sent).filter(|n| !self.seen.get(*n as usize).copied().unwrap_or(false)).collect()
    }

    /// Measures gaps from `now` on.
    pub fn reset_gap(&mut self, now: Time) {
        self.gap_from = now;
        self.stats.gap_ns_max = 0;
        self.stats.delay_ns_max = 0;
    }

    pub(super) fn poll(&mut self, now: Time, out: &mut Vec<Emit>) -> Time {
        while self.next <= now && self.next < self.spec.stop {
            for _ in 0..self.spec.burst.max(1) {
                self.send(now, out);
            }
            self.next = self.next.plus_ns(self.spec.every_ns.max(1) * u64::from(self.spec.burst.max(1)));
        }
        if self.next < self.spec.stop { self.next } else { Time::MAX }
    }

    fn send(&mut self, now: Time, out: &mut Vec<Emit>) {
        let number = self.stats.sent;
        let mut payload = vec![0; self.spec.packet_bytes.clamp(44, 1_500) - 28];
        payload[..8].copy_from_slice(&number.to_be_bytes());
        payload[8..16].copy_from_slice(&now.ns().to_be_bytes());
        pattern::fill(self.ends.id as u64, number * 2_048, &mut payload[HEAD_BYTES..]);
        let Ends { client, server, .. } = self.ends;
        let (offload, bytes) = udp((client.1, client.2), (server.1, server.2), &payload);
        self.stats.sent += 1;
        self.seen.push(false);
        out.push(Emit { site: client.0, offload, bytes });
    }

    pub(super) fn packet(&mut self, now: Time, packet: &Parsed<'_>) {
        let (Some(number), Some(sent_ns)) = (u64_at(packet.payload, 0), u64_at(packet.payload, 8)) else {
            self.stats.corrupt += 1;
            return;
        };
        let good = pattern::matches(self.ends.id as u64, number * 2_048, &packet.payload[HEAD_BYTES..]);
        let Some(seen) = self.seen.get_mut(number as usize).filter(|_| good) else {
            self.stats.corrupt += 1;
            return;
        };
        if std::mem::replace(seen, true) {
            self.stats.repeated += 1;
            return;
        }
        if self.highest.is_some() {
            self.stats.gap_ns_max = self.stats.gap_ns_max.max(now.since(self.stats.last.max(self.gap_from)));
        }
        if self.highest.is_some_and(|highest| number < highest) {
            self.stats.disordered += 1;
        }
        self.highest = self.highest.max(Some(number));
        self.stats.received += 1;
        self.stats.last = now;
        let delay_ns = now.ns().saturating_sub(sent_ns);
        self.stats.delay_ns_max = self.stats.delay_ns_max.max(delay_ns);
        self.stats.delay_ns_sum += delay_ns;
    }
}
