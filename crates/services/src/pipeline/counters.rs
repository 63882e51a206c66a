//! Counters of one core.

use packet::DropReason;

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
    /// Packets that another core handed to this one.
    pub handed_in: u64,
    /// Replies of flows with a source port of ours that another core had to hand over: 0 unless buckets moved.
    pub replies_on_wrong_core: u64,
    /// Flows decided again after a reload.
    pub decided_again: u64,
    /// Flows that a reload's new rules ended.
    pub flows_refused: u64,
    /// ICMP errors and resets made here.
    pub answers: u64,
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
    pub(super) fn count(&mut self, reason: DropReason) {
        match reason {
            DropReason::NatPortsExhausted => self.exhausted_flows += 1,
            DropReason::FlowsPerClient => self.over_limit_flows += 1,
            _ => {}
        }
    }
}

/// Counts stay with their rule when others come and go: its outer interface, sources and mode say which it is.
pub(super) fn carry_refusals(old: &[NatSpec], counts: &[NatRefusals], new: &[NatSpec]) -> Vec<NatRefusals> {
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
