//! Flows and mappings of another process or machine, taken over as far as the present policy agrees: [`crate::handover`].
//!
//! A flow is taken over whole or not at all: its outside port, its place at its backend and its client's share are held
//! before it is in the table, and then it is decided like a flow of an earlier policy. It was no new flow, so that no
//! rule about new flows, and no limit on how many begin at once, holds it up; limits on how many there are do.

use std::net::SocketAddr;
use std::sync::Arc;

use packet::attachment::{Egress, Ingress};
use packet::flow::FlowKey;

use super::flows::{TICK_SHIFT, TenantKey, is_embryonic, tick_of};
use super::{Services, dead_backends, established, next_hops};
use crate::flow::{Direction, FlowCounters, FlowId, Record, flags};
use crate::handover::{
    Entry, FlowEntry, MappingEntry, Provider, Refusal, Source, TcpState, ingress_of, tenant_number,
};
use crate::nat::{BindRequest, Earlier, EarlierMapping, NatClient};
use crate::policy::{Policy, Service};
use crate::spec::{DeliveryMode, TCP};
use crate::{steer, tcp};

const MS_NS: u64 = 1_000_000;

/// A flow by the numbers of the present policy.
#[derive(Clone, Copy)]
struct Arrival {
    original: TenantKey,
    reply: TenantKey,
    /// The request as it leaves, before its source is translated.
    client: FlowKey,
    /// Server and backend.
    place: Option<(u16, u16)>,
    record: Record,
}

impl Services {
    /// Takes an entry over, on the core that [`crate::handover::owner`] names. `away_ms`: how long ago it was written.
    ///
    /// # Errors
    /// [`Refusal`]: nothing has changed then.
    pub fn import(&mut self, now_ns: u64, away_ms: u32, entry: &Entry) -> Result<(), Refusal> {
        match entry {
            Entry::Flow(flow) => {
                let arrival = arrival(&Arc::clone(&self.routing.policy), flow)?;
                let id = self.import_flow(now_ns, away_ms, flow, arrival)?;
                self.decide_taken_over(now_ns, id, &arrival, Services::misplaced)
            }
            Entry::Mapping(mapping) => self.import_mapping(now_ns, mapping),
        }
    }

    /// Takes over a flow that another machine had, on the core that [`crate::handover::owner`] names for an entry without a core.
    /// The keys of its directions that come in at another core.
    ///
    /// # Errors
    /// [`Refusal`]: nothing has changed then.
    pub fn inherit(&mut self, now_ns: u64, flow: &FlowEntry) -> Result<Vec<TenantKey>, Refusal> {
        let mut arrival = arrival(&Arc::clone(&self.routing.policy), flow)?;
        let record = &mut arrival.record;
        if record.protocol == TCP {
            tcp::forget_sequence(record);
        }
        record.flags |= flags::INHERITED;
        // What was silent for too long has ended there, and that was told.
        let alive = FlowEntry { idle_ms: 0, ..flow.clone() };
        let id = self.import_flow(now_ns, 0, &alive, arrival)?;
        let mut strays = Vec::new();
        self.decide_taken_over(now_ns, id, &arrival, |services, arrival, egress| {
            strays = services.strays(arrival, egress);
            services.of_another_tenant(arrival, egress)
        })?;
        Ok(strays)
    }

    fn import_mapping(&mut self, now_ns: u64, mapping: &MappingEntry) -> Result<(), Refusal> {
        let policy = Arc::clone(&self.routing.policy);
        let tenant = tenant_number(&policy, &mapping.tenant).ok_or(Refusal::Tenant)?;
        let out_tenant = tenant_number(&policy, &mapping.out_tenant).ok_or(Refusal::Tenant)?;
        let rule = rule_of(&policy, &mapping.source, mapping.outside.ip(), None)?;
        let key = FlowKey {
            src: mapping.inside.ip(),
            dst: mapping.outside.ip(),
            src_port: mapping.inside.port(),
            dst_port: mapping.inside.port(),
            protocol: mapping.protocol,
        };
        let home =
            mapping.is_home.then(|| steer::endpoint_bucket(&self.routing.ownership, &key, tenant) as u16);
        let earlier = EarlierMapping {
            rule,
            protocol: mapping.protocol,
            tenant,
            inside: mapping.inside,
            out_tenant,
            outside: mapping.outside,
            blocks: mapping.source.blocks,
            home,
        };
        self.nat.remap(now_ns, &earlier)
    }

    /// Puts a flow into the table with all that it holds.
    fn import_flow(
        &mut self,
        now_ns: u64,
        away_ms: u32,
        flow: &FlowEntry,
        mut arrival: Arrival,
    ) -> Result<FlowId, Refusal> {
        let policy = Arc::clone(&self.routing.policy);
        let idle_ms = flow.idle_ms.saturating_add(away_ms);
        arrival.record.seen = ticks_ago(now_ns, idle_ms.into());
        // Never the present one: it is decided as a flow of an earlier policy.
        arrival.record.era = self.routing.era.wrapping_sub(1);
        if u64::from(idle_ms) >= u64::from(tcp::timeout_s(&arrival.record, policy.timeouts())) * 1_000 {
            return Err(Refusal::Expired);
        }
        let known = |(key, tenant): &TenantKey| self.flows.find(key, *tenant).is_some();
        if known(&arrival.original) || known(&arrival.reply) {
            return Err(Refusal::Known);
        }
        if is_embryonic(&arrival.record) && !self.make_room(now_ns) {
            return Err(Refusal::Limit);
        }
        self.take_source(&policy, now_ns, flow, &mut arrival)?;
        if let Some((server, backend)) = arrival.place {
            if policy.balancer.opened(server, backend).is_err() {
                self.give_source_back(now_ns, &arrival);
                return Err(Refusal::Limit);
            }
            let answered = !is_embryonic(&arrival.record);
            policy.balancer.remember(backend, arrival.original.0.src, answered, now_ns);
        }
        let id = self.enter(now_ns, &policy, &arrival)?;
        self.restore(now_ns, away_ms, flow, id, &arrival);
        Ok(id)
    }

    /// Takes the source again that the flow had, and notes it in the record.
    fn take_source(
        &mut self,
        policy: &Policy,
        now_ns: u64,
        flow: &FlowEntry,
        arrival: &mut Arrival,
    ) -> Result<(), Refusal> {
        let Arrival { original, reply, client, record, .. } = arrival;
        let Some(source) = &flow.source else {
            if record.flags & flags::MAPPED != 0 {
                // Somebody outside came to a client's mapping.
                let rule = policy.nat.rule_of_outside(original.0.dst).ok_or(Refusal::Address)?;
                let inside = self.nat.inbound(&original.0, original.1).ok_or(Refusal::Port)?;
                if (inside.address, inside.port) != (client.dst, client.reversed().sender_port()) {
                    return Err(Refusal::Port);
                }
                self.nat.join(now_ns, &original.0, original.1, rule).map_err(|_| Refusal::Limit)?;
                record.nat = rule + 1;
            }
            return Ok(());
        };
        let to = reply.0.reversed();
        let asks = NatClient::of(client, original.1, record.ingress());
        let rule = rule_of(policy, source, to.src, Some(&asks))?;
        let by_endpoint = policy.owners.maps_endpoints && record.flags & flags::DEST_NAT == 0;
        let ownership = &self.routing.ownership;
        let request = BindRequest {
            rule,
            client: *client,
            tenant: original.1,
            out_tenant: reply.1,
            random: 0,
            home: by_endpoint.then(|| steer::endpoint_bucket(ownership, &original.0, original.1) as u16),
            next: None,
        };
        let earlier = Earlier {
            source: to.src,
            port: to.sender_port(),
            kept: record.flags & flags::SOURCE_NAT == 0,
            blocks: source.blocks,
            by_lease: record.flags & flags::INHERITED != 0,
        };
        let (flows, tenant) = (&self.flows, reply.1);
        let binding =
            self.nat.rebind(now_ns, &request, &earlier, &|reply| flows.find(reply, tenant).is_some())?;
        // The source's mapping is what counts from here on.
        record.flags &= !flags::MAPPED;
        record.flags |= if binding.mapped { flags::MAPPED } else { 0 };
        record.flags |= if binding.own_port { flags::OWN_PORT } else { 0 };
        record.flags |= if binding.counted { flags::COUNTED } else { 0 };
        record.flags |= if policy.assembles(rule) { flags::ASSEMBLE } else { 0 };
        record.nat = rule + 1;
        record.port_table = binding.table;
        Ok(())
    }

    fn give_source_back(&mut self, now_ns: u64, arrival: &Arrival) {
        let Arrival { original, reply, client, record, .. } = arrival;
        if record.nat != 0 {
            let first = if record.flags & flags::SOURCE_NAT != 0 { client } else { &original.0 };
            self.nat.release(now_ns, &reply.0, reply.1, record, first, original.1);
        }
    }

    /// Puts the flow into the table; what it holds is given back if there is no room.
    fn enter(&mut self, now_ns: u64, policy: &Policy, arrival: &Arrival) -> Result<FlowId, Refusal> {
        let Arrival { original, reply, place, mut record, .. } = *arrival;
        record.backend = place.map_or(0, |(_, backend)| backend + 1);
        let hashes = self.flows.hashes(&original, &reply);
        let buckets = self.routing.live_buckets(&original, &reply);
        let entered = self.flows.insert(hashes, buckets, &original, &reply, record);
        let Ok(id) = entered else {
            if let Some((_, backend)) = place {
                policy.balancer.closed(backend, false);
            }
            self.give_source_back(now_ns, arrival);
            return Err(Refusal::Limit);
        };
        self.flows.note_unit_bucket(self.routing.units.as_ref(), (&original, &record), 1);
        self.flows.inherited += u32::from(record.flags & flags::INHERITED != 0);
        // A flow that begins has no answer yet; this one may have.
        self.flows.embryonic.changed(true, is_embryonic(&record));
        self.rule_counters.count_flow(policy, &record, &original.0, true);
        if let Some((_, backend)) = place
            && established::is_over(&record)
        {
            policy.balancer.set_over(backend, true);
        }
        Ok(id)
    }

    /// Counts and shift of a flow that is in the table.
    fn restore(&mut self, now_ns: u64, away_ms: u32, flow: &FlowEntry, id: FlowId, arrival: &Arrival) {
        if let Some(counts) = &flow.counts {
            let created = ticks_ago(now_ns, counts.age_ms.saturating_add(away_ms.into()));
            let counters = FlowCounters { created, packets: counts.packets, bytes: counts.bytes };
            self.flows.table.set_counters(id, &counters);
        }
        if let Some(shift) = flow.shift {
            self.shifts.put(&arrival.original.0, arrival.original.1, shift);
        }
    }

    /// Asks rules, routes and NAT about it. Without a route it waits for one, as after a reload.
    fn decide_taken_over(
        &mut self,
        now_ns: u64,
        id: FlowId,
        arrival: &Arrival,
        mut misplaced: impl FnMut(&Self, &Arrival, Egress) -> Option<Refusal>,
    ) -> Result<(), Refusal> {
        let refused = match self.decide_again(now_ns, id) {
            Ok(true) => match self.target(id, Direction::Original) {
                Ok((egress, ..)) => misplaced(self, arrival, egress),
                Err(_) => None,
            },
            Ok(false) => Some(Refusal::Translation),
            Err(_) if self.flows.find(&arrival.original.0, arrival.original.1).is_none() => {
                return Err(Refusal::Firewall);
            }
            Err(_) => None,
        };
        match refused {
            Some(reason) => {
                self.end(now_ns, id);
                Err(reason)
            }
            None => Ok(()),
        }
    }

    /// Why packets of one of its directions would not find the flow here.
    fn misplaced(&self, arrival: &Arrival, egress: Egress) -> Option<Refusal> {
        let strays = self.strays(arrival, egress);
        self.of_another_tenant(arrival, egress).or_else(|| (!strays.is_empty()).then_some(Refusal::Core))
    }

    fn of_another_tenant(&self, arrival: &Arrival, egress: Egress) -> Option<Refusal> {
        (self.routing.policy.tenant_behind(egress) != arrival.reply.1).then_some(Refusal::Tenant)
    }

    /// The keys of a flow whose packets come in at another core.
    fn strays(&self, arrival: &Arrival, egress: Egress) -> Vec<TenantKey> {
        let (policy, ownership) = (&self.routing.policy, &self.routing.ownership);
        let comes_here = |(key, tenant): &TenantKey, ingress: Ingress| {
            let owners = steer::owners(ownership, policy, key, *tenant, ingress);
            owners.chain.cores().contains(&self.routing.core)
        };
        // Behind direct return no reply comes by here; one that comes around is brought by hand.
        let unseen = arrival.record.flags & flags::ONE_WAY != 0
            || self.routing.around(&arrival.reply.0.reversed()).is_some();
        let back = dead_backends::ingress_of(egress).filter(|_| !unseen);
        let original = (!comes_here(&arrival.original, arrival.record.ingress())).then_some(arrival.original);
        let reply = back.filter(|ingress| !comes_here(&arrival.reply, *ingress)).map(|_| arrival.reply);
        original.into_iter().chain(reply).collect()
    }
}

/// The flow by present numbers, if interface, tenants and service are still there.
fn arrival(policy: &Policy, flow: &FlowEntry) -> Result<Arrival, Refusal> {
    let ingress = ingress_of(policy, &flow.ingress).ok_or(Refusal::Interface)?;
    let number = |name: &str| tenant_number(policy, name).ok_or(Refusal::Tenant);
    let original = (flow.original.key, number(&flow.original.tenant)?);
    let reply = (flow.reply.key, number(&flow.reply.tenant)?);
    if policy.tenant_of(ingress) != original.1 {
        return Err(Refusal::Tenant);
    }
    let to = reply.0.reversed();
    let client = to.with_source(original.0.src, original.0.sender_port());
    let is = |bit: u16| flow.flags & bit != 0;
    // Each end differs exactly where the flags say so.
    let source_kept = client == to;
    let moved = is(flags::DEST_NAT) && !is(flags::ONE_WAY);
    let whole = flow.is_of_one_family()
        && original.0.protocol == reply.0.protocol
        && (is(flags::SOURCE_NAT) || source_kept)
        && (moved || client == original.0)
        && (original.0.protocol == TCP) == flow.tcp.is_some()
        && is(flags::PROXY_PROTOCOL) == flow.shift.is_some()
        && (!is(flags::MAPPED) || flow.source.is_some() || moved);
    if !whole {
        return Err(Refusal::Malformed);
    }
    let tcp = flow.tcp.unwrap_or(TcpState { scale: 0, ..TcpState::default() });
    // Where its port stands is found anew.
    let found_anew = flags::OWN_PORT | flags::ASSEMBLE;
    let record = Record {
        protocol: original.0.protocol,
        state: tcp.state,
        flags: flow.flags & !found_anew,
        in_port: ingress.compact(),
        next_hop: [next_hops::UNSET; 2],
        scale: tcp.scale,
        tcp_end: tcp.end,
        tcp_window: tcp.window,
        ..Record::default()
    };
    let place = destination(policy, flow, &original.0, &client)?;
    Ok(Arrival { original, reply, client, place, record })
}

/// Server and backend of a flow, if it has some and they are still there; the same for a port forward.
fn destination(
    policy: &Policy,
    flow: &FlowEntry,
    original: &FlowKey,
    client: &FlowKey,
) -> Result<Option<(u16, u16)>, Refusal> {
    if flow.flags & flags::DEST_NAT == 0 {
        return if flow.backend.is_none() { Ok(None) } else { Err(Refusal::Malformed) };
    }
    let proxied = flow.flags & flags::PROXY_PROTOCOL != 0;
    let target = SocketAddr::new(client.dst, client.dst_port);
    let Some(backend) = &flow.backend else {
        let same = match policy.server_or_forward(original) {
            Some(Service::Forward(forward)) => {
                forward.target(original.dst_port) == Some(target)
                    && (forward.proxy_protocol && forward.protocol == TCP) == proxied
            }
            Some(Service::Server(_)) => false,
            // A mapping: whether it is still there is asked where its port is taken.
            None => policy.nat.mapping_core_of(original, 1).is_some(),
        };
        return if same { Ok(None) } else { Err(Refusal::Service) };
    };
    let listen = SocketAddr::new(original.dst, original.dst_port);
    let server = policy.balancer.find(original.protocol, listen).ok_or(Refusal::Service)?;
    let spec = policy.spec.servers.get(usize::from(server)).ok_or(Refusal::Service)?;
    let through = spec.delivery == DeliveryMode::Nat;
    let same = spec.name == backend.server
        && through == (flow.flags & flags::ONE_WAY == 0)
        && (!through || target == backend.address)
        && (spec.proxy_protocol && through && spec.protocol == TCP) == proxied;
    let mut backends = policy.balancer.backends().filter(|_| same);
    let found = backends.find(|known| known.server == backend.server && known.address == backend.address);
    found.map(|known| Some((server, known.id))).ok_or(Refusal::Service)
}

/// The present number of a NAT rule.
fn rule_of(
    policy: &Policy,
    source: &Source,
    outside: std::net::IpAddr,
    client: Option<&NatClient>,
) -> Result<u16, Refusal> {
    match &source.by {
        Provider::Interface(name) => {
            let place = policy.spec.interfaces.iter().position(|interface| interface.name == *name);
            let place = place.and_then(|place| u16::try_from(place).ok()).ok_or(Refusal::Rule)?;
            let out = packet::attachment::InterfaceId(place);
            policy.nat.rule_named(out, source.mode, outside, client).ok_or(Refusal::Rule)
        }
        Provider::Server(name) => {
            let place = policy.spec.servers.iter().position(|server| server.name == *name);
            let server = place.and_then(|place| u16::try_from(place).ok()).ok_or(Refusal::Service)?;
            policy.nat_of_server_named(server, source.mode, outside).ok_or(Refusal::Rule)
        }
    }
}

/// The tick so long ago.
fn ticks_ago(now_ns: u64, ms: u64) -> u32 {
    tick_of(now_ns).wrapping_sub((ms.saturating_mul(MS_NS) >> TICK_SHIFT) as u32)
}
