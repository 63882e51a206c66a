//! Counters of one core.

use std::net::SocketAddr;

use packet::{DropReason, FlowKey};

use crate::flow::{Record, flags};
use crate::policy::Policy;
use crate::spec::NatSpec;

/// Counts of one core since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Counters {
    /// Packets read (each segment of a super-packet counts as one frame here).
    pub rx_packets: u64,
    /// Bytes of IP packets read.
    pub rx_bytes: u64,
    /// Packets that went on.
    pub tx_packets: u64,
    /// Bytes of IP packets that went on.
    pub tx_bytes: u64,
    /// Packets to the host's own stack.
    pub to_host: u64,
    /// Flows begun.
    pub flows_opened: u64,
    /// Flows ended.
    pub flows_closed: u64,
    /// Packets handed to another core.
    pub handed_out: u64,
    /// Packets from and for other units of the cluster.
    pub units: UnitCounters,
    /// Packets that another core handed to this one.
    pub handed_in: u64,
    /// Replies of flows with a source port of ours that another core had to hand over: 0 unless buckets moved.
    pub replies_on_wrong_core: u64,
    /// Flows decided again after a reload.
    pub decided_again: u64,
    /// Flows that a reload's new rules ended.
    pub flows_refused: u64,
    /// Flows from a port below 1,024 that got one above, since none was free.
    pub low_ports_lost: u64,
    /// ICMP errors and resets made here.
    pub answers: u64,
}

/// Packets from and for other units of the cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct UnitCounters {
    /// Packets of no flow of this unit that went to another one.
    pub sent: u64,
    /// Packets of other units that waited for a table which was not here yet.
    pub waited_for_era: u64,
}

/// New flows that a NAT rule could not translate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NatRefusals {
    /// No port was left.
    pub exhausted_flows: u64,
    /// Their client had its share.
    pub over_limit_flows: u64,
}

impl NatRefusals {
    fn count(&mut self, reason: DropReason) {
        match reason {
            DropReason::NatPortsExhausted => self.exhausted_flows += 1,
            DropReason::FlowsPerClient => self.over_limit_flows += 1,
            _ => {}
        }
    }
}

/// Counts by rule of the present policy.
#[derive(Clone, Debug, Default)]
pub struct RuleCounters {
    /// Packets allowed by firewall rule, first packets of flows only; the last place: by no rule.
    pub hits: Vec<u64>,
    /// Live flows by NAT rule: the operator's, then those of virtual servers.
    pub nat_flows: Vec<u64>,
    /// New flows that the operator's NAT rules could not translate.
    pub nat_refusals: Vec<NatRefusals>,
    /// Live and begun flows by port forward.
    pub forward_flows: Vec<(u64, u64)>,
}

impl RuleCounters {
    /// Takes the counts over to the rules of the next policy.
    pub(super) fn follow(&mut self, before: &Policy, policy: &Policy) {
        self.hits = policy.carry_hits(before, &self.hits);
        self.nat_refusals = carry_refusals(&before.spec.nats, &self.nat_refusals, &policy.spec.nats);
        self.nat_flows.resize(policy.nat_rules, 0);
        self.forward_flows.resize(policy.spec.forwards.len(), (0, 0));
    }

    /// The firewall decided about a first packet by this rule.
    pub(super) fn count_verdict(&mut self, rule: Option<u16>) {
        let place = rule.map_or(self.hits.len().saturating_sub(1), usize::from);
        if let Some(hits) = self.hits.get_mut(place) {
            *hits += 1;
        }
    }

    /// A NAT rule could not translate a new flow.
    pub(super) fn count_refusal(&mut self, rule: u16, reason: DropReason) {
        if let Some(refusals) = self.nat_refusals.get_mut(usize::from(rule)) {
            refusals.count(reason);
        }
    }

    /// A flow begins or ends: it counts at its NAT rule and port forward, by their present numbers.
    pub(super) fn count_flow(&mut self, policy: &Policy, record: &Record, original: &FlowKey, begins: bool) {
        let change = |flows: u64| if begins { flows + 1 } else { flows.saturating_sub(1) };
        let rule = record.nat.checked_sub(1);
        if let Some(flows) = rule.and_then(|rule| self.nat_flows.get_mut(usize::from(rule))) {
            *flows = change(*flows);
        }
        if record.flags & flags::DEST_NAT != 0 && record.backend == 0 {
            let listen = SocketAddr::new(original.dst, original.dst_port);
            let place = policy.nat.forward_place(original.protocol, listen).map(usize::from);
            if let Some((live, total)) = place.and_then(|place| self.forward_flows.get_mut(place)) {
                *live = change(*live);
                *total += u64::from(begins);
            }
        }
    }
}

/// Counts stay with their rule when others come and go: its outer interface, sources and mode say which it is.
fn carry_refusals(old: &[NatSpec], counts: &[NatRefusals], new: &[NatSpec]) -> Vec<NatRefusals> {
    let same = |a: &NatSpec, b: &NatSpec| {
        let of = |rule: &NatSpec| (rule.out, rule.mode);
        of(a) == of(b) && (&a.from, &a.from_peers, &a.tenants) == (&b.from, &b.from_peers, &b.tenants)
    };
    let mut left: Vec<_> = old.iter().zip(counts).collect();
    let carry = |rule: &NatSpec| {
        let place = left.iter().position(|(before, _)| same(before, rule));
        place.map_or_else(NatRefusals::default, |place| *left.remove(place).1)
    };
    new.iter().map(carry).collect()
}
