//! Explanation of what would happen to a packet, and why; nothing changes by asking.

use std::net::{IpAddr, SocketAddr};

use packet::DropReason;
use packet::attachment::{Egress, Ingress};
use packet::flow::FlowKey;

use super::Services;
use super::flows::{TICK_SHIFT, tick_of};
use crate::flow::{Direction, FlowCounters, FlowId, Record};
use crate::nat::NatClient;
use crate::policy::{Policy, Service};
use crate::route::RouteQuery;
use crate::rules::{Question, Verdict};
use crate::spec::{DeliveryMode, NatMode, RuleAction};
use crate::tcp;
use steering::ownership::Ownership;

/// The decision for a new flow, as far as it is the same every time it is asked.
#[derive(Clone, Debug)]
pub struct Explanation {
    /// By what it comes in.
    pub ingress: Ingress,
    /// Tenant of what comes in there.
    pub tenant: u16,
    /// Cores that have to do with the flow.
    pub cores: FlowCores,
    /// Verdict of the firewall.
    pub verdict: Verdict,
    /// Port forward that takes it: listen address.
    pub forward: Option<SocketAddr>,
    /// Virtual server that takes it.
    pub server: Option<u16>,
    /// Backend it would get now.
    pub backend: Option<SocketAddr>,
    /// How its source is translated.
    pub source: SourceNat,
    /// Destination after translation.
    pub destination: SocketAddr,
    /// Where it leaves.
    pub egress: Option<Egress>,
    /// Next hop.
    pub next_hop: Option<IpAddr>,
    /// Why it is dropped.
    pub drop: Option<DropReason>,
}

/// Cores that have to do with a flow.
#[derive(Clone, Debug)]
pub struct FlowCores {
    /// Hash of the tuple.
    pub hash: u32,
    /// Its bucket.
    pub bucket: usize,
    /// The only one that may begin the flow.
    pub creator: u8,
    /// Those that are asked first.
    pub owners: Vec<u8>,
    /// The one whose socket gets the replies. `None`: it depends on the port that a mapping gets, or none come by here.
    pub of_replies: Option<u8>,
}

/// Translation of a flow's source.
#[derive(Clone, Debug)]
pub struct SourceNat {
    /// NAT rule that takes it; beyond the operator's list: one that serves a virtual server.
    pub rule: Option<u16>,
    /// Mode of that rule.
    pub mode: NatMode,
    /// Outside addresses of that rule, those that this flow may have.
    pub addresses: Vec<IpAddr>,
}

/// Explains what a packet of this tuple meets that comes in by `ingress`.
#[must_use]
pub fn explain(policy: &Policy, ownership: &Ownership, key: &FlowKey, ingress: Ingress) -> Explanation {
    let tenant = policy.tenant_of(ingress);
    let owners = crate::steer::owners(ownership, policy, key, tenant, ingress).chain;
    let mut explanation = Explanation {
        ingress,
        tenant,
        cores: FlowCores {
            hash: ownership.hasher.hash(key, tenant),
            bucket: ownership.bucket(key, tenant),
            creator: owners.creator,
            owners: owners.cores().to_vec(),
            of_replies: None,
        },
        verdict: Verdict { action: RuleAction::Allow, rule: None },
        forward: None,
        server: None,
        backend: None,
        source: SourceNat { rule: None, mode: NatMode::None, addresses: Vec::new() },
        destination: SocketAddr::new(key.dst, key.dst_port),
        egress: None,
        next_hop: None,
        drop: None,
    };
    let mut tenant_out = tenant;
    let mut service_source = None;
    let mut one_way = false;
    match policy.server_or_forward(key) {
        Some(Service::Server(server)) => {
            explanation.server = Some(server);
            match policy.balancer.would_pick(server, key, 0, explanation.cores.hash) {
                Ok(pick) => {
                    explanation.backend = Some(pick.address);
                    service_source = Some(pick.source);
                    if pick.delivery == DeliveryMode::Nat {
                        explanation.destination = pick.address;
                    } else {
                        explanation.next_hop = Some(pick.address.ip());
                        one_way = true;
                    }
                }
                Err(reason) => explanation.drop = Some(reason),
            }
        }
        Some(Service::Forward(forward)) => {
            explanation.forward = Some(SocketAddr::new(key.dst, key.dst_port));
            explanation.destination = forward.target(key.dst_port).unwrap_or(forward.to);
            tenant_out = forward.tenant;
        }
        None => {}
    }
    leave(policy, &mut explanation, key, tenant_out, service_source);
    explanation.cores.of_replies = reply_core(policy, ownership, key, &explanation, one_way);
    explanation
}

/// Who reads the replies: the core itself, where it chooses the port accordingly, else the one that their tuple names.
fn reply_core(
    policy: &Policy,
    ownership: &Ownership,
    key: &FlowKey,
    explanation: &Explanation,
    one_way: bool,
) -> Option<u8> {
    let egress = explanation.egress.filter(|egress| egress.interface().is_some() && !one_way)?;
    let client = NatClient::of(key, explanation.tenant, explanation.ingress);
    if matches!(explanation.source.mode, NatMode::AddressAndPort | NatMode::PortOnly) {
        let mapped = policy.maps_endpoints_of(egress, &client);
        return (!mapped).then_some(explanation.cores.creator);
    }
    let reply = FlowKey {
        src: explanation.destination.ip(),
        src_port: explanation.destination.port(),
        dst: key.src,
        dst_port: key.src_port,
        protocol: key.protocol,
    };
    let bucket = ownership.bucket(&reply, policy.tenant_behind(egress));
    Some(ownership.owner_of_bucket(bucket))
}

fn leave(
    policy: &Policy,
    explanation: &mut Explanation,
    key: &FlowKey,
    tenant_out: u16,
    service_source: Option<NatMode>,
) {
    let serviced = explanation.server.is_some() || explanation.forward.is_some();
    let towards = explanation.next_hop.unwrap_or(explanation.destination.ip());
    if explanation.next_hop.is_none() && policy.is_own(towards) {
        explanation.egress = Some(Egress::Host);
    } else {
        let key = key.with_destination(towards, explanation.destination.port());
        let ingress = Some(explanation.ingress);
        match policy.route(&RouteQuery { tenant: tenant_out, ingress, key, before: None }) {
            Ok(route) => {
                explanation.egress = Some(route.egress);
                explanation.next_hop = Some(route.via.unwrap_or(towards));
            }
            Err(reason) => explanation.drop = explanation.drop.or(Some(reason)),
        }
    }
    let Some(egress) = explanation.egress else { return };
    let question = Question {
        key,
        tenant: explanation.tenant,
        ingress: explanation.ingress,
        egress,
        to_gateway: policy.is_addressed(key),
    };
    explanation.verdict = policy.verdict(&question);
    let refused = match (explanation.verdict.action, explanation.verdict.rule) {
        (RuleAction::Drop, Some(_)) => Some(DropReason::RuleDrop),
        (RuleAction::Drop, None) => Some(DropReason::DefaultDrop),
        (RuleAction::Reject, _) => Some(DropReason::RuleReject),
        (RuleAction::Allow, None)
            if policy.hides_inside(explanation.ingress.interface())
                && !serviced
                && egress.interface().is_some() =>
        {
            Some(DropReason::NatNoMapping)
        }
        (RuleAction::Allow, _) => None,
    };
    explanation.drop = explanation.drop.or(refused);
    let client = NatClient::of(key, explanation.tenant, explanation.ingress);
    let nat = match (explanation.server, service_source) {
        (Some(server), Some(NatMode::AddressAndPort | NatMode::PortOnly)) => {
            policy.nat_of_server(server, egress, explanation.ingress)
        }
        (Some(server), _) if matches!(egress, Egress::Host | Egress::Kernel) => {
            policy.nat_of_server(server, egress, explanation.ingress)
        }
        _ if egress.interface().is_none() => None,
        _ if serviced && egress == Egress::from(explanation.ingress) => match explanation.server {
            Some(server) => policy.nat_of_server(server, egress, explanation.ingress),
            None => policy.nat.rule_for_hairpin(key.dst, &NatClient { tenant: tenant_out, ..client }),
        },
        _ if egress == Egress::from(explanation.ingress) => None,
        _ => policy.nat.rule_for(egress, &client),
    };
    if let Some(rule) = nat {
        explanation.source = SourceNat {
            rule: Some(rule),
            mode: policy.nat.mode(rule).unwrap_or(NatMode::None),
            addresses: policy.nat.addresses_towards(rule, key.src, explanation.next_hop),
        };
    }
}

/// A flow as it is now.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Key and tenant of the original direction.
    pub original: (FlowKey, u16),
    /// Key and tenant of replies as they arrive.
    pub reply: (FlowKey, u16),
    /// State.
    pub record: Record,
    /// Counts, for translated flows.
    pub counters: Option<FlowCounters>,
    /// How long ago its last packet came, ns.
    pub idle_ns: u64,
    /// When it will be forgotten, ns from now.
    pub expires_ns: u64,
    /// Where packets of each direction leave as the routes are now, and the neighbor. Place by
    /// [`Direction`]; `None`: there is no route.
    pub ways: [Option<(Egress, IpAddr)>; 2],
}

impl Services {
    /// A flow for people to look at.
    #[must_use]
    pub fn entry(&self, id: FlowId, now_ns: u64) -> Option<Entry> {
        let (original, reply) = self.flows.table.keys(id);
        let record = *self.flows.table.record(id);
        let idle_ns = u64::from(tick_of(now_ns).wrapping_sub(record.seen)) << TICK_SHIFT;
        let timeout_ns = u64::from(tcp::timeout_s(&record, self.routing.policy.timeouts())) * 1_000_000_000;
        Some(Entry {
            original,
            reply,
            record,
            counters: self.flows.table.counters(id),
            idle_ns,
            expires_ns: timeout_ns.saturating_sub(idle_ns),
            ways: [Direction::Original, Direction::Reply].map(|direction| {
                self.target(id, direction).ok().map(|(egress, neighbor, _)| (egress, neighbor))
            }),
        })
    }
}
