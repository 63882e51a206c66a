//! Fate of a packet whose flow is known: rules are not asked again.

use std::net::SocketAddr;

use packet::attachment::Egress;
use packet::flow::FlowKey;
use services::pipeline::Neighbors;
use services::route::RouteQuery;

use engine::gateway::FlowEntry;

use super::{Names, ends};
use crate::status::{Explanation, FlowReport};

/// Source and destination of a flow, and both as they are translated.
pub(super) fn all_ends(entry: &FlowEntry) -> (u8, [SocketAddr; 4]) {
    let (source, destination) = ends(&entry.original.0);
    let (translated_source, translated_destination) = ends(&entry.reply.0.reversed());
    (entry.record.protocol, [source, destination, translated_source, translated_destination])
}

/// Puts what the flow decides in place of what a new one would meet.
pub(super) fn decides(
    explanation: &mut Explanation,
    key: &FlowKey,
    entry: &FlowEntry,
    report: FlowReport,
    names: &Names,
    neighbors: &Neighbors,
) {
    let (original, reply, record) = (&entry.original, &entry.reply, &entry.record);
    let is_reply = reply.0 == *key && original.0 != *key;
    let leaving = if is_reply { original.0.reversed() } else { reply.0.reversed() };
    let way = entry.ways.get(usize::from(is_reply)).copied().flatten();
    let backend = record.backend.checked_sub(1).and_then(|id| names.policy.balancer.backend_ref(id));
    let own_nats = names.policy.spec.nats.len();
    explanation.core = usize::from(entry.core);
    explanation.interface = if is_reply { report.out.clone() } else { report.interface.clone() };
    explanation.rule.clone_from(&report.rule);
    "allow".clone_into(&mut explanation.rule_action);
    explanation.virtual_server = backend.map(|backend| backend.server.to_owned());
    explanation.backend = backend.map(|backend| backend.address);
    explanation.nat = usize::from(record.nat);
    if explanation.nat > own_nats {
        explanation.nat = 0;
    }
    let mode = if report.nat.is_empty() { "none" } else { &report.nat };
    mode.clone_into(&mut explanation.nat_mode);
    let [(src, dst), (new_src, new_dst)] = [ends(key), ends(&leaving)];
    explanation.translated_source = (src != new_src).then_some(new_src);
    explanation.translated_destination = (dst != new_dst).then_some(new_dst);
    let (verdict, reason) = match way.map(|(egress, _)| egress) {
        None => ("drop", "no-route"),
        Some(Egress::Host) => ("to the gateway", ""),
        Some(Egress::Kernel) => ("to the kernel, which passes it on", ""),
        Some(Egress::Bond(_)) => ("into the tunnel", ""),
        Some(_) => ("forward", ""),
    };
    verdict.clone_into(&mut explanation.verdict);
    reason.clone_into(&mut explanation.drop_reason);
    explanation.out = way.map(|(egress, _)| names.egress(egress)).unwrap_or_default();
    let hop = way.and_then(|(egress, neighbor)| Some((egress.interface()?, neighbor)));
    let egress = way.map(|(egress, _)| egress);
    explanation.next_hop = hop.map(|(_, neighbor)| neighbor).filter(|_| !names.is_point_to_point(egress));
    let mac = hop.and_then(|hop| neighbors.known.get(&hop));
    explanation.next_hop_mac = mac.map(|mac| mac.map(|byte| format!("{byte:02x}")).join(":"));
    let routes = [original.1, reply.1].map(|tenant| {
        let before = way.map(|way| way.0);
        names.policy.fib.find(&RouteQuery {
            tenant,
            ingress: Some(entry.record.ingress()),
            key: leaving,
            before,
        })
    });
    let route = routes.into_iter().flatten().find(|found| way.is_some_and(|way| way.0 == found.route.egress));
    explanation.route = route.map(|found| super::route_text(&found)).unwrap_or_default();
    if is_reply {
        explanation.forward = None;
        explanation.reply_core = None;
        explanation.notes.clear();
        explanation.notes.push(format!("it is a reply of the flow {}", original.0));
    }
    explanation.flow = Some(report);
}
