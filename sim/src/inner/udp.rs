//! A greedy paced flow of UDP packets with numbers, and a sink that knows what it should get.

use tunnel::time::Time;

use super::packet::{Parsed, set_dscp, u64_at, udp};
use super::{Arrived, Emit, Ends, Side, pattern};

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
    /// When each packet that was received had been sent, and how long it took, ns; in the order of their arrival.
    pub delays_ns: Vec<(Time, u64)>,
    /// When the last one came.
    pub last: Time,
}

impl UdpStats {
    /// The delay that this share of the packets sent from `start` on had at most, ms; 0 without any.
    pub fn delay_ms(&self, share: f64, start: Time) -> f64 {
        let since = self.delays_ns.iter().filter(|(sent, _)| *sent >= start);
        let mut delays: Vec<u64> = since.map(|(_, ns)| *ns).collect();
        delays.sort_unstable();
        let at = (delays.len() as f64 * share) as usize;
        delays.get(at.min(delays.len().saturating_sub(1))).map_or(0.0, |ns| *ns as f64 / 1e6)
    }
}

/// One direction's sink.
#[derive(Default)]
struct Sink {
    seen: Vec<bool>,
    highest: Option<u64>,
    stats: UdpStats,
}

/// The flow with both ends.
pub struct UdpFlow {
    ends: Ends,
    spec: UdpSpec,
    next: Time,
    there: Sink,
    /// The client's, of a flow that the server sends back.
    back: Option<Sink>,
    /// DSCP of the packets: in turn.
    dscps: Vec<u8>,
    /// Gaps count from here on; a test sets it before it cuts a link.
    gap_from: Time,
}

impl UdpFlow {
    /// A flow between `ends`. `echo`: the server sends every packet back.
    pub fn new(ends: Ends, spec: UdpSpec, echo: bool) -> Self {
        Self {
            ends,
            spec,
            next: spec.start,
            there: Sink::default(),
            back: echo.then(Sink::default),
            dscps: vec![0],
            gap_from: Time::ZERO,
        }
    }

    /// Gives the client's packets these DSCPs in turn; they belong to one flow all the same.
    pub fn mark(&mut self, dscps: Vec<u8>) {
        self.dscps = if dscps.is_empty() { vec![0] } else { dscps };
    }

    /// Statistics of the server's sink so far.
    pub fn stats(&self) -> &UdpStats {
        &self.there.stats
    }

    /// Statistics of both sinks so far: the server's, the client's.
    pub fn sinks(&self) -> impl Iterator<Item = &UdpStats> {
        std::iter::once(&self.there).chain(&self.back).map(|sink| &sink.stats)
    }

    /// Numbers of the packets that are missing so far, at the end of their way.
    pub fn missing(&self) -> Vec<u64> {
        let seen = &self.back.as_ref().unwrap_or(&self.there).seen;
        (0..self.there.stats.sent).filter(|n| !seen.get(*n as usize).copied().unwrap_or(false)).collect()
    }

    /// Measures gaps from `now` on.
    pub fn reset_gap(&mut self, now: Time) {
        self.gap_from = now;
        self.there.stats.gap_ns_max = 0;
        self.there.stats.delay_ns_max = 0;
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
        let number = self.there.stats.sent;
        let mut payload = vec![0; self.spec.packet_bytes.clamp(44, 1_500) - 28];
        payload[..8].copy_from_slice(&number.to_be_bytes());
        payload[8..16].copy_from_slice(&now.ns().to_be_bytes());
        pattern::fill(self.ends.id as u64, number * 2_048, &mut payload[HEAD_BYTES..]);
        let (offload, mut bytes) = udp(self.ends.source, self.ends.target, &payload);
        set_dscp(&mut bytes, self.dscps[number as usize % self.dscps.len()]);
        self.there.stats.sent += 1;
        self.there.seen.push(false);
        if let Some(back) = &mut self.back {
            back.seen.push(false);
        }
        out.push(Emit { from: self.ends.client, offload, bytes });
    }

    pub(super) fn packet(&mut self, now: Time, arrived: &Arrived<'_>, out: &mut Vec<Emit>) {
        let packet = &arrived.packet;
        let (id, gap_from) = (self.ends.id, self.gap_from);
        match (arrived.side, &mut self.back) {
            (Side::Server, None) => self.there.packet(now, id, packet, gap_from),
            (Side::Server, Some(back)) => {
                self.there.packet(now, id, packet, gap_from);
                back.stats.sent += 1;
                let (offload, bytes) = udp(packet.to, packet.from, packet.payload);
                out.push(Emit { from: arrived.place, offload, bytes });
            }
            (Side::Client, Some(back)) => back.packet(now, id, packet, gap_from),
            (Side::Client, None) => self.there.stats.corrupt += 1,
        }
    }
}

impl Sink {
    fn packet(&mut self, now: Time, id: usize, packet: &Parsed<'_>, gap_from: Time) {
        let (Some(number), Some(sent_ns)) = (u64_at(packet.payload, 0), u64_at(packet.payload, 8)) else {
            self.stats.corrupt += 1;
            return;
        };
        let good = pattern::matches(id as u64, number * 2_048, &packet.payload[HEAD_BYTES..]);
        let Some(seen) = self.seen.get_mut(number as usize).filter(|_| good) else {
            self.stats.corrupt += 1;
            return;
        };
        if std::mem::replace(seen, true) {
            self.stats.repeated += 1;
            return;
        }
        if self.highest.is_some() {
            self.stats.gap_ns_max = self.stats.gap_ns_max.max(now.since(self.stats.last.max(gap_from)));
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
        self.stats.delays_ns.push((Time::from_ns(sent_ns), delay_ns));
    }
}
