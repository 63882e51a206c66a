//! Request and response: one datagram there, some back, with the time it took.

use tunnel::time::Time;

use super::packet::{u32_at, u64_at, udp};
use super::{Arrived, Emit, Ends, Side, pattern};

/// How the client asks.
#[derive(Clone, Copy, Debug)]
pub struct RequestSpec {
    /// Time between two requests, ns.
    pub every_ns: u64,
    /// Packets of each answer, of 1,000 payload bytes.
    pub answer_packets: u32,
    /// First request.
    pub start: Time,
    /// Last request.
    pub stop: Time,
}

/// Statistics of the client.
#[derive(Clone, Debug, Default)]
pub struct RequestStats {
    /// Requests sent.
    pub asked: u64,
    /// Requests whose answer came in full.
    pub answered: u64,
    /// Answers with wrong content.
    pub corrupt: u64,
    /// Times to the last packet of each answer, ns.
    pub took_ns: Vec<u64>,
}

/// Client and server.
pub struct RequestFlow {
    ends: Ends,
    spec: RequestSpec,
    next: Time,
    stats: RequestStats,
    /// Answer packets that came, by request.
    came: Vec<u32>,
}

impl RequestFlow {
    /// A client and a server at `ends`.
    pub fn new(ends: Ends, spec: RequestSpec) -> Self {
        Self { ends, spec, next: spec.start, stats: RequestStats::default(), came: Vec::new() }
    }

    /// Statistics of the client so far.
    pub fn stats(&self) -> &RequestStats {
        &self.stats
    }

    pub(super) fn poll(&mut self, now: Time, out: &mut Vec<Emit>) -> Time {
        while self.next <= now && self.next <= self.spec.stop {
            let mut payload = [0; 64];
            payload[..8].copy_from_slice(&self.stats.asked.to_be_bytes());
            payload[8..16].copy_from_slice(&now.ns().to_be_bytes());
            let (offload, bytes) = udp(self.ends.source, self.ends.target, &payload);
            out.push(Emit { from: self.ends.client, offload, bytes });
            self.stats.asked += 1;
            self.came.push(0);
            self.next = self.next.plus_ns(self.spec.every_ns.max(1));
        }
        if self.next <= self.spec.stop { self.next } else { Time::MAX }
    }

    pub(super) fn packet(&mut self, now: Time, arrived: &Arrived<'_>, out: &mut Vec<Emit>) {
        let (id, packet) = (self.ends.id, &arrived.packet);
        let (Some(number), Some(sent_ns)) = (u64_at(packet.payload, 0), u64_at(packet.payload, 8)) else {
            self.stats.corrupt += 1;
            return;
        };
        if arrived.side == Side::Server {
            for part in 0..self.spec.answer_packets {
                let mut payload = [0; 1_000];
                payload[..16].copy_from_slice(&packet.payload[..16]);
                payload[16..20].copy_from_slice(&part.to_be_bytes());
                pattern::fill(id as u64, number * 4_096, &mut payload[20..]);
                let (offload, bytes) = udp(packet.to, packet.from, &payload);
                out.push(Emit { from: arrived.place, offload, bytes });
            }
            return;
        }
        let good = u32_at(packet.payload, 16).is_some_and(|part| part < self.spec.answer_packets)
            && pattern::matches(id as u64, number * 4_096, &packet.payload[20..]);
        match self.came.get_mut(number as usize) {
            Some(came) if good => {
                *came += 1;
                if *came == self.spec.answer_packets {
                    self.stats.answered += 1;
                    self.stats.took_ns.push(now.ns().saturating_sub(sent_ns));
                }
            }
            _ => self.stats.corrupt += 1,
        }
    }
}
