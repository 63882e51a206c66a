//! Flows and mappings of a core, written so that another process or machine can take them over: [`crate::handover`].

use std::net::SocketAddr;

use packet::attachment::Ingress;

use super::Services;
use super::flows::{TICK_SHIFT, TenantKey, tick_of};
use crate::flow::{FlowCounters, FlowId, Record, flags};
use crate::handover::{
    Backend, Counts, Entry, FlowEntry, MappingEntry, Place, Provider, Side, Source, TcpState,
};
use crate::nat::is_translated;
use crate::policy::Policy;
use crate::spec::{NatMode, TCP};

/// Cursors of flows have this bit, those of mappings do not.
const FLOWS: u64 = 1 << 63;
/// Bits of [`Record::state`] that are the connection's state.
const STATE: u8 = 0x0f;
const MS_NS: u64 = 1_000_000;

impl Services {
    /// Gives some `count` entries to `take`, from `cursor` on, 0 to begin; the cursor to go on with, or nothing at the end.
    /// Mappings come first, for flows need them. Nothing changes; what changes meanwhile may be seen or not.
    pub fn export(
        &mut self,
        now_ns: u64,
        cursor: u64,
        count: usize,
        take: &mut dyn FnMut(&Entry),
    ) -> Option<u64> {
        if cursor & FLOWS == 0 {
            let next = self.export_mappings(cursor as usize, count, take);
            return Some(next.map_or(FLOWS, |next| next as u64));
        }
        let (ids, next) = self.flows.table.scan(cursor & !FLOWS, count);
        for id in ids {
            if let Some(entry) = self.flow_entry(now_ns, id) {
                take(&Entry::Flow(Box::new(entry)));
            }
        }
        next.map(|next| next | FLOWS)
    }

    fn export_mappings(&mut self, from: usize, count: usize, take: &mut dyn FnMut(&Entry)) -> Option<usize> {
        let (found, next) = self.nat.mappings(from, count);
        let policy = &self.routing.policy;
        for mapping in found {
            let (tenant, protocol, client, client_port, _) = mapping.inside;
            let (out_tenant, _, address, port) = mapping.outside;
            let rule = policy.nat.rule_of_outside(address);
            let by = rule.and_then(|rule| provider(policy, rule));
            let (Some(by), Some(tenant_name), Some(out_tenant)) =
                (by, tenant_name(policy, tenant), tenant_name(policy, out_tenant))
            else {
                continue;
            };
            let blocks = self.nat.blocks_of(tenant, client, address);
            take(&Entry::Mapping(MappingEntry {
                core: self.routing.core,
                protocol,
                tenant: tenant_name,
                inside: SocketAddr::new(client, client_port),
                out_tenant,
                outside: SocketAddr::new(address, port),
                source: Source { mode: NatMode::AddressAndPort, by, blocks },
                is_home: mapping.home.is_some(),
            }));
        }
        next
    }

    pub(super) fn flow_entry(&self, now_ns: u64, id: FlowId) -> Option<FlowEntry> {
        let policy = &self.routing.policy;
        let (original, reply) = self.flows.table.keys(id);
        let record = self.flows.table.record(id);
        let side =
            |(key, tenant): &TenantKey| tenant_name(policy, *tenant).map(|tenant| Side { key: *key, tenant });
        let backend = record.backend.checked_sub(1).and_then(|id| policy.balancer.backend_ref(id));
        let shift = (record.flags & flags::PROXY_PROTOCOL != 0)
            .then(|| self.shifts.of(&original.0, original.1))
            .flatten();
        Some(FlowEntry {
            core: self.routing.core,
            original: side(&original)?,
            reply: side(&reply)?,
            // What was learnt is not handed over, so nothing more is.
            flags: record.flags & !(flags::LEARNS_IDS | flags::INHERITED | flags::COUNTED),
            ingress: place(policy, record.ingress())?,
            idle_ms: u32::try_from(since_ms(now_ns, record.seen)).unwrap_or(u32::MAX),
            tcp: (record.protocol == TCP).then_some(TcpState {
                state: record.state & STATE,
                scale: record.scale,
                end: record.tcp_end,
                window: record.tcp_window,
            }),
            counts: self.flows.table.counters(id).map(|counters| counts(now_ns, &counters)),
            shift,
            source: self.source(record, &original, &reply),
            backend: backend
                .map(|backend| Backend { server: backend.server.to_owned(), address: backend.address }),
        })
    }

    /// The rule that gave a flow its source. The record has the number that the rule had when the flow began.
    fn source(&self, record: &Record, original: &TenantKey, reply: &TenantKey) -> Option<Source> {
        let policy = &self.routing.policy;
        let noted = record.nat.checked_sub(1)?;
        let (outside, is) = (reply.0.dst, record.flags);
        let mode = match () {
            () if is & flags::SOURCE_NAT != 0 && outside == original.0.src => NatMode::PortOnly,
            () if is & flags::SOURCE_NAT != 0 => NatMode::AddressAndPort,
            // It came in to a mapping, which is no source.
            () if is & flags::MAPPED != 0 => return None,
            () => policy.nat.mode(noted)?,
        };
        let fits = |rule: &u16| {
            policy.nat.mode(*rule) == Some(mode)
                && (mode != NatMode::AddressAndPort || policy.nat.addresses(*rule).contains(&outside))
        };
        let rule = Some(noted).filter(fits).or_else(|| policy.nat.rule_of_outside(outside).filter(fits));
        let kept = mode == NatMode::None || mode == NatMode::PortOnly && !is_translated(record.protocol);
        if kept != (is & flags::SOURCE_NAT == 0) {
            return None;
        }
        let blocks = self.nat.blocks_of(original.1, original.0.src, outside);
        Some(Source { mode, by: provider(policy, rule?)?, blocks })
    }
}

pub(super) fn tenant_name(policy: &Policy, tenant: u16) -> Option<String> {
    if tenant == crate::route::SHARED_TENANT {
        return Some(String::new());
    }
    policy.spec.tenants.get(usize::from(tenant)).cloned()
}

fn place(policy: &Policy, ingress: Ingress) -> Option<Place> {
    match ingress {
        Ingress::Host => Some(Place::Host),
        Ingress::Interface(id) => Some(Place::Interface(policy.interface(id)?.name.clone())),
        Ingress::Bond(id) => Some(Place::Peer(policy.peer(id)?.name.clone())),
    }
}

fn provider(policy: &Policy, rule: u16) -> Option<Provider> {
    if let Some(server) = policy.server_of_nat(rule) {
        return policy.balancer.server_name(server).map(|name| Provider::Server(name.to_owned()));
    }
    let out = policy.spec.nats.get(usize::from(rule))?.out?;
    policy.interface(out).map(|interface| Provider::Interface(interface.name.clone()))
}

fn since_ms(now_ns: u64, ticks: u32) -> u64 {
    (u64::from(tick_of(now_ns).wrapping_sub(ticks)) << TICK_SHIFT) / MS_NS
}

fn counts(now_ns: u64, counters: &FlowCounters) -> Counts {
    let age_ms = since_ms(now_ns, counters.created);
    Counts { age_ms, packets: counters.packets, bytes: counters.bytes }
}
