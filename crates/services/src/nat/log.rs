//! Log of NAT: who had which outside address and port, and when (RFC 6888 REQ-12, RFC 7422's purpose).
//!
//! A flow that has a port of its own makes two lines, opened and closed. A client that holds whole blocks makes two
//! lines for each block and none for its flows. An endpoint-independent mapping makes two lines and names no remote.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};

use super::port_set::BLOCK_PORTS;

/// Most events that wait to be fetched, per core.
pub const EVENTS_MAX: usize = 65_536;

/// Kind of an event: what happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum NatEventKind {
    /// A flow or mapping got an outside endpoint.
    Opened,
    /// It gave it back.
    Closed,
    /// A client or tenant got ports.
    BlockGranted,
    /// It gave them back.
    BlockReturned,
}

/// One line of the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub struct NatEvent {
    /// When, ns of the monotonic clock; who writes the log adds the date.
    pub at_ns: u64,
    /// Kind of the event.
    pub kind: NatEventKind,
    /// Tenant of the inside.
    pub tenant: u16,
    /// IP protocol; 0 for blocks, which are good for every protocol.
    pub protocol: u8,
    /// The client. For blocks port 0; for a block that a prefix holds the prefix's first address.
    pub inside: SocketAddr,
    /// Endpoint that others see: address and port (ICMP: the query's id). For blocks the first port.
    pub outside: SocketAddr,
    /// How many ports from there on: 1, or a block's.
    pub ports: u32,
    /// With whom; `None` for blocks and endpoint-independent mappings: with anybody.
    pub remote: Option<SocketAddr>,
}

impl NatEvent {
    /// An event about whole blocks from `first_port` on.
    #[must_use]
    pub fn of_blocks(
        at_ns: u64,
        kind: NatEventKind,
        (tenant, client): (u16, IpAddr),
        (address, first_port): (IpAddr, u16),
        blocks: u32,
    ) -> Self {
        let (inside, outside) = (SocketAddr::new(client, 0), SocketAddr::new(address, first_port));
        let ports = blocks * BLOCK_PORTS;
        Self { at_ns, kind, tenant, protocol: 0, inside, outside, ports, remote: None }
    }

    /// Whether the event is about this use of an outside endpoint.
    fn covers(&self, question: &Question) -> bool {
        let first = u32::from(self.outside.port());
        self.outside.ip() == question.outside.ip()
            && (first..first + self.ports).contains(&u32::from(question.outside.port()))
            && (self.protocol == 0 || self.protocol == question.protocol)
            && self.remote.is_none_or(|remote| question.remote.is_none_or(|asked| asked == remote))
    }
}

/// Question of the police.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Question {
    /// The address and port that was seen.
    pub outside: SocketAddr,
    /// IP protocol.
    pub protocol: u8,
    /// With whom, if known.
    pub remote: Option<SocketAddr>,
    /// When, ns of the monotonic clock.
    pub at_ns: u64,
}

/// Who had an outside endpoint at a time, by the lines of a log in order of time: tenant and inside endpoint (port 0:
/// all of the client's ports). Several if the question leaves the remote open; each once.
#[must_use]
pub fn who_had(log: &[NatEvent], question: &Question) -> Vec<(u16, SocketAddr)> {
    let mut holders: Vec<&NatEvent> = Vec::new();
    let past = log.iter().take_while(|event| event.at_ns <= question.at_ns);
    for event in past.filter(|event| event.covers(question)) {
        match event.kind {
            NatEventKind::Opened | NatEventKind::BlockGranted => holders.push(event),
            NatEventKind::Closed | NatEventKind::BlockReturned => {
                let same = |held: &NatEvent| {
                    (held.tenant, held.inside, held.outside, held.remote, held.protocol)
                        == (event.tenant, event.inside, event.outside, event.remote, event.protocol)
                };
                holders.retain(|held| !same(held));
            }
        }
    }
    let mut answer: Vec<_> = holders.iter().map(|event| (event.tenant, event.inside)).collect();
    answer.sort_unstable();
    answer.dedup();
    answer
}

/// Events that wait, bounded.
#[derive(Debug, Default)]
pub(crate) struct EventQueue {
    events: VecDeque<NatEvent>,
    lost: u64,
    /// Nobody wants them.
    muted: bool,
}

impl EventQueue {
    /// Adds an event, or counts it as lost.
    pub(crate) fn push(&mut self, event: NatEvent) {
        if self.muted {
            return;
        }
        if self.events.len() < EVENTS_MAX {
            self.events.push_back(event);
        } else {
            self.lost += 1;
        }
    }

    /// Whether anybody wants events.
    pub(crate) fn set_wanted(&mut self, wanted: bool) {
        self.muted = !wanted;
        if self.muted {
            self.events.clear();
        }
    }

    /// Takes all.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = NatEvent> + '_ {
        self.events.drain(..)
    }

    /// How many found no room since the beginning.
    pub(crate) fn lost(&self) -> u64 {
        self.lost
    }
}

#[cfg(test)]
mod tests;
