//! ICMP echo: requests at a pace, and the answers that came.

use tunnel::time::Time;

use super::packet::echo_request;
use super::{Arrived, Emit, Ends};

/// How a client asks.
#[derive(Clone, Copy, Debug)]
pub struct PingSpec {
    /// Time between two requests, ns.
    pub every_ns: u64,
    /// First request.
    pub start: Time,
    /// No request leaves at or after this.
    pub stop: Time,
}

/// Statistics of the client.
#[derive(Clone, Debug, Default)]
pub struct PingStats {
    /// Requests sent.
    pub asked: u64,
    /// Requests answered.
    pub answered: u64,
    /// Answers that came again.
    pub repeated: u64,
}

/// The client; hosts and sites answer by themselves.
pub struct PingFlow {
    ends: Ends,
    spec: PingSpec,
    next: Time,
    seen: Vec<bool>,
    stats: PingStats,
}

impl PingFlow {
    /// A client at `ends`; its port is the identifier.
    pub fn new(ends: Ends, spec: PingSpec) -> Self {
        Self { ends, spec, next: spec.start, seen: Vec::new(), stats: PingStats::default() }
    }

    /// Statistics so far.
    pub fn stats(&self) -> &PingStats {
        &self.stats
    }

    pub(super) fn poll(&mut self, now: Time, out: &mut Vec<Emit>) -> Time {
        while self.next <= now && self.next < self.spec.stop {
            let (source, target) = (self.ends.source, self.ends.target);
            let (offload, bytes) = echo_request(source.0, target.0, source.1, self.stats.asked as u16);
            out.push(Emit { from: self.ends.client, offload, bytes });
            self.stats.asked += 1;
            self.seen.push(false);
            self.next = self.next.plus_ns(self.spec.every_ns.max(1));
        }
        if self.next < self.spec.stop { self.next } else { Time::MAX }
    }

    pub(super) fn packet(&mut self, arrived: &Arrived<'_>) {
        let seen = self.seen.get_mut(arrived.packet.sequence as usize);
        let is_first = seen.is_some_and(|seen| !std::mem::replace(seen, true));
        *(if is_first { &mut self.stats.answered } else { &mut self.stats.repeated }) += 1;
    }
}
