//! The slow path, once per flow: whose packet it is, whether it may pass, how it is translated, where it leaves.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use packet::DropReason;
use packet::attachment::{Egress, Ingress, InterfaceId};
use packet::flow::FlowKey;
use packet::ip::{IpHeader, PROTOCOL_ICMP, PROTOCOL_ICMPV6};
use steering::ownership::OwnerChain;

use super::hairpin::Hairpin;
use super::{
    Services, Direction, EMERGENCY_ENTRIES, EMERGENCY_S, Frame, Handed, Origin, Outcome, Output, established,
    next_hops, reply_of, tick_of,
};
use crate::flow::{FlowId, Record, flags};
use crate::nat::{BindRequest, Binding, NatClient};
use crate::policy::{Policy, Service};
use crate::rules::{Question, Verdict};
use crate::spec::{DeliveryMode, NatMode, RuleAction, TCP, UDP};
use crate::steer;
use crate::tcp::{self, Segment};

/// Where a new flow goes, before source translation.
struct Resolution {
    /// The key with its destination translated.
    to: FlowKey,
    egress: Egress,
    neighbor: IpAddr,
    /// It comes around instead of leaving.
    around: bool,
    server: Option<u16>,
    backend: Option<u16>,
    source: Option<NatMode>,
    flags: u16,
}

impl Services {
    /// A packet of no flow of this core: to the next stop, or a new flow here.
    pub(super) fn new_flow(
        &mut self,
        now_ns: u64,
        frame: &mut Frame<'_>,
        key: &FlowKey,
        tenant: u16,
        origin: Origin,
        out: &mut impl Output,
    ) {
        let next = match origin {
            Origin::MappingConfirmed | Origin::Hairpin => Ok(None),
            Origin::Wire | Origin::Handed { .. } => self.next_stop(frame.ingress, key, tenant, origin),
        };
        match next {
            Ok(Some((core, visit))) => self.pass_on(frame, core, Origin::Handed { visit }, None, out),
            Ok(None) => {
                let begun = self
                    .begin(now_ns, frame, key, tenant, origin, out)
                    .and_then(|id| id.map_or(Ok(()), |id| self.first_packet(now_ns, frame, id, out)));
                if let Err(reason) = begun {
                    self.dropped(frame, reason);
                }
            }
            Err(reason) => self.dropped(frame, reason),
        }
    }

    /// The core that has to look next and which visit that is, or `None`: this one begins the flow.
    pub(super) fn next_stop(
        &self,
        ingress: Ingress,
        key: &FlowKey,
        tenant: u16,
        origin: Origin,
    ) -> Result<Option<(u8, u8)>, DropReason> {
        let owners = steer::owners(&self.ownership, &self.policy, key, tenant, ingress);
        let chain = &owners.chain;
        let keeps = owners.mapping.is_some_and(|rule| self.nat.has_mapping(key, tenant, rule));
        if keeps && origin != Origin::Wire && chain.cores().contains(&self.id) {
            return Ok(None);
        }
        let mut visit = match origin {
            Origin::Handed { visit } => visit.saturating_add(1),
            Origin::Wire | Origin::MappingConfirmed | Origin::Hairpin => 0,
        };
        loop {
            match chain.cores().get(usize::from(visit)) {
                Some(core) if *core == self.id && keeps => return Ok(None),
                Some(core) if *core == self.id => visit += 1,
                Some(core) => return Ok(Some((*core, visit))),
                None if chain.creator == self.id => return Ok(None),
                // Two tables were in force on the way: the creator has not been asked as such.
                None if usize::from(visit) < OwnerChain::LEN_MAX
                    && self.ownership.is_alive(chain.creator) =>
                {
                    return Ok(Some((chain.creator, visit)));
                }
                None => return Err(DropReason::PuntLimit),
            }
        }
    }

    /// Hands a packet to another core.
    pub(super) fn pass_on(
        &mut self,
        frame: &mut Frame<'_>,
        core: u8,
        origin: Origin,
        piece: Option<super::Piece>,
        out: &mut impl Output,
    ) {
        self.counters.handed_out += 1;
        let (ingress, offload) = (frame.ingress, frame.offload);
        let Some(packet) = out.buffers().copy(frame.packet(), &offload, ingress) else {
            return self.dropped(frame, DropReason::TooBig);
        };
        if out.hand_over(core, Handed { packet, origin, piece }) {
            frame.outcome = Outcome::Consumed;
        } else {
            self.dropped(frame, DropReason::RingFull);
        }
    }

    pub(super) fn first_packet(
        &mut self,
        now_ns: u64,
        frame: &mut Frame<'_>,
        id: FlowId,
        out: &mut impl Output,
    ) -> Result<(), DropReason> {
        let header = IpHeader::parse(frame.packet())?;
        self.flows.account(id, Direction::Original, 1, header.total_bytes as u32);
        self.forward(now_ns, frame, &header, id, Direction::Original, out)
    }

    /// Decides a new flow. `None`: the packet is dealt with, without one.
    pub(super) fn begin(
        &mut self,
        now_ns: u64,
        frame: &mut Frame<'_>,
        key: &FlowKey,
        tenant: u16,
        origin: Origin,
        out: &mut impl Output,
    ) -> Result<Option<FlowId>, DropReason> {
        let policy = Arc::clone(&self.policy);
        let header = IpHeader::parse(frame.packet())?;
        if established::is_error(&header, frame.packet()) {
            self.unknown_error(&policy, frame, &header, tenant)?;
            return Ok(None);
        }
        check_source(&policy, key, frame.ingress, origin)?;
        let around = match self.hairpin(frame, key, tenant, origin, out) {
            Hairpin::No => None,
            Hairpin::HandedOver => return Ok(None),
            Hairpin::Begin(interface) => Some(interface),
        };
        let mut record = Record {
            protocol: key.protocol,
            era: self.era,
            in_port: frame.ingress.compact(),
            seen: tick_of(now_ns),
            ..Record::default()
        };
        let resolution = match self.resolve(&policy, now_ns, key, tenant, frame.ingress, around) {
            Ok(resolution) => resolution,
            Err(reason @ (DropReason::NoBackend | DropReason::ServerFull)) => {
                let egress = egress_behind(&policy, key, tenant);
                self.filter(now_ns, &policy, frame, key, tenant, egress, out)?;
                self.answer_failure(now_ns, frame, reason, out);
                return Err(reason);
            }
            Err(reason) => return Err(reason),
        };
        let verdict = self.filter(now_ns, &policy, frame, key, tenant, resolution.egress, out)?;
        let unasked =
            policy.hides_inside(frame.ingress.interface()) && resolution.flags & flags::DEST_NAT == 0;
        if unasked && verdict.rule.is_none() && resolution.egress.interface().is_some() {
            return Err(DropReason::NatNoMapping);
        }
        if passes_without_flow(&policy, frame, key, &header, &resolution) {
            self.give_to_host(frame, &header);
            return Ok(None);
        }
        record.flags = resolution.flags;
        record.rule = verdict.rule.map_or(0, |rule| rule + 1);
        if !self.make_room(now_ns) {
            return Err(DropReason::EmbryonicFull);
        }
        self.begin_state(&mut record, frame, &header, &resolution)?;
        let opened = self.open(now_ns, &policy, key, tenant, frame.ingress, &resolution, record);
        match opened {
            Ok(_) if record.flags & flags::PROXY_PROTOCOL != 0 => {
                self.begin_shift(key, tenant, &header, frame.packet());
            }
            Ok(_) => {}
            Err(reason) => self.answer_failure(now_ns, frame, reason, out),
        }
        opened.map(Some)
    }

    /// Asks the firewall about a new flow; what it refuses is answered as the rule says.
    fn filter(
        &mut self,
        now_ns: u64,
        policy: &Policy,
        frame: &Frame<'_>,
        key: &FlowKey,
        tenant: u16,
        egress: Egress,
        out: &mut impl Output,
    ) -> Result<Verdict, DropReason> {
        let to_gateway = !policy.rules.is_empty() && policy.is_addressed(key);
        let question = Question { key, tenant, ingress: frame.ingress, egress, to_gateway };
        let verdict = policy.verdict(&question);
        // What answers the host passes whatever the default is: nothing was decided.
        if verdict.rule.is_none() && answers_host(policy, key, egress, frame)? {
            return Ok(verdict);
        }
        self.count_rule(verdict.rule);
        match verdict.action {
            RuleAction::Allow => Ok(verdict),
            RuleAction::Drop if verdict.rule.is_some() => Err(DropReason::RuleDrop),
            RuleAction::Drop => Err(DropReason::DefaultDrop),
            RuleAction::Reject => {
                self.answer_reject(now_ns, frame, out);
                Err(DropReason::RuleReject)
            }
        }
    }

    fn count_rule(&mut self, rule: Option<u16>) {
        let place = rule.map_or(self.rule_hits.len().saturating_sub(1), usize::from);
        if let Some(hits) = self.rule_hits.get_mut(place) {
            *hits += 1;
        }
    }

    /// An ICMP error about no flow of ours: the host may know what it is about, or has sent it.
    fn unknown_error(
        &mut self,
        policy: &Policy,
        frame: &mut Frame<'_>,
        header: &IpHeader,
        tenant: u16,
    ) -> Result<(), DropReason> {
        if policy.is_own(header.dst) {
            self.give_to_host(frame, header);
            return Ok(());
        }
        if frame.ingress != Ingress::Host {
            return Err(DropReason::IcmpInvalid);
        }
        let route = policy.route(frame.ingress, tenant, header.dst).ok_or(DropReason::NoRoute)?;
        let neighbor = route.via.unwrap_or(header.dst);
        let hop = next_hops::Hops::unnumbered(route.egress, neighbor, policy, &self.neighbors);
        established::address(frame, &hop);
        self.went_on(header);
        Ok(())
    }

    pub(super) fn give_to_host(&mut self, frame: &mut Frame<'_>, header: &IpHeader) {
        self.counters.to_host += 1;
        self.went_on(header);
        frame.outcome = Outcome::Forward(Egress::Host);
    }

    /// Destination: service, mapping, route.
    fn resolve(
        &mut self,
        policy: &Policy,
        now_ns: u64,
        key: &FlowKey,
        tenant: u16,
        ingress: Ingress,
        around: Option<InterfaceId>,
    ) -> Result<Resolution, DropReason> {
        let mut resolution = Resolution {
            to: *key,
            egress: around.map_or(Egress::Host, Egress::Interface),
            neighbor: key.dst,
            around: around.is_some(),
            server: None,
            backend: None,
            source: None,
            flags: 0,
        };
        if around.is_some() {
            return Ok(resolution);
        }
        let mut tenant_out = tenant;
        match policy.server_or_forward(key) {
            Some(Service::Server(server)) => {
                let random = (self.random() >> 32) as u32;
                let pick = policy.balancer.pick(server, key, now_ns, random)?;
                resolution.server = Some(server);
                resolution.backend = Some(pick.backend);
                if pick.delivery == DeliveryMode::DirectReturn {
                    resolution.flags |= flags::ONE_WAY | flags::DEST_NAT;
                    let route = policy.fib.lookup(tenant, pick.address.ip()).ok_or(DropReason::NoRoute)?;
                    resolution.egress = route.egress;
                    resolution.neighbor = pick.address.ip();
                    return Ok(resolution);
                }
                resolution.source = Some(pick.source);
                resolution.flags |= if pick.proxy_protocol { flags::PROXY_PROTOCOL } else { 0 };
                self.set_destination(&mut resolution, pick.address);
            }
            Some(Service::Forward(forward)) => {
                tenant_out = forward.tenant;
                let proxied = forward.proxy_protocol && forward.protocol == TCP;
                resolution.flags |= if proxied { flags::PROXY_PROTOCOL } else { 0 };
                self.set_destination(&mut resolution, forward.to);
            }
            None => {
                if policy.maps_endpoints
                    && let Some(inside) = self.nat.inbound(key, tenant)
                {
                    resolution.to = with_destination(key, inside.address, inside.port);
                    resolution.flags |= flags::DEST_NAT | flags::MAPPED;
                    tenant_out = inside.tenant;
                }
            }
        }
        leave_by(policy, key, ingress, tenant_out, &mut resolution)?;
        Ok(resolution)
    }
    fn set_destination(&self, resolution: &mut Resolution, target: SocketAddr) {
        resolution.to.dst = target.ip();
        resolution.to.dst_port = target.port();
        resolution.flags |= flags::DEST_NAT;
    }

    /// The transport protocol's state after the first packet.
    fn begin_state(
        &mut self,
        record: &mut Record,
        frame: &Frame<'_>,
        header: &IpHeader,
        resolution: &Resolution,
    ) -> Result<(), DropReason> {
        let packet = frame.packet();
        if resolution.egress == Egress::Host && matches!(frame.ingress, Ingress::Bond(_)) {
            record.flags |= flags::LOCAL;
        }
        match header.protocol {
            TCP => {
                let segment = Segment::of(header.payload(packet)).ok_or(DropReason::TcpInvalid)?;
                if super::proxy_sequence::has_early_data(record.flags, &segment) {
                    return Err(DropReason::NatUnsupported);
                }
                if resolution.egress == Egress::Host && frame.ingress.interface().is_some() {
                    // The host answers by the device itself.
                    record.flags |= flags::LOCAL | flags::ONE_WAY;
                }
                // A connection that was there before us may go on where nothing has to be translated.
                let untouched = resolution.flags & flags::DEST_NAT == 0
                    && !self.policy.hides_inside(resolution.egress.interface());
                if !tcp::begin(record, &segment, untouched) {
                    return Err(DropReason::NotNew);
                }
            }
            PROTOCOL_ICMP | PROTOCOL_ICMPV6 if !is_query(header, packet) => {
                return Err(DropReason::NotNew);
            }
            _ => {}
        }
        Ok(())
    }

    fn bind(&mut self, now_ns: u64, request: &BindRequest) -> Result<Binding, DropReason> {
        let (flows, tenant) = (&self.flows, request.out_tenant);
        let in_use = |reply: &FlowKey| flows.find(flows.hash(reply, tenant), reply, tenant).is_some();
        self.nat.bind(now_ns, request, in_use)
    }

    /// Source translation, next hops, the entry.
    fn open(
        &mut self,
        now_ns: u64,
        policy: &Policy,
        key: &FlowKey,
        tenant: u16,
        ingress: Ingress,
        resolution: &Resolution,
        mut record: Record,
    ) -> Result<FlowId, DropReason> {
        let out_tenant = policy.tenant_behind(resolution.egress);
        let mut to = resolution.to;
        let rule = source_rule(policy, key, tenant, ingress, resolution);
        let mut bound = false;
        if let Some(rule) = rule {
            let random = self.random();
            let by_endpoint = policy.maps_endpoints && resolution.flags & flags::DEST_NAT == 0;
            let home = by_endpoint.then(|| steer::endpoint_bucket(&self.ownership, key, tenant) as u16);
            let request = BindRequest { rule, client: to, tenant, out_tenant, random, home };
            let mut binding = self.bind(now_ns, &request);
            if binding == Err(DropReason::NatPortsExhausted) {
                // Ports that a flood holds, whose connections were never completed, are given up first.
                self.sweep(now_ns, EMERGENCY_ENTRIES, EMERGENCY_S);
                binding = self.bind(now_ns, &request);
            }
            let binding = binding.inspect_err(|reason| self.count_refusal(rule, *reason))?;
            if !binding.kept {
                to = with_source(&to, binding.source, binding.port);
            }
            // The source's mapping is what counts from here on, not the one it was sent to.
            record.flags &= !flags::MAPPED;
            record.flags |= if binding.kept { 0 } else { flags::SOURCE_NAT };
            record.flags |= if binding.mapped { flags::MAPPED } else { 0 };
            record.nat = rule + 1;
            record.port_table = binding.table;
            bound = true;
        } else if resolution.flags & flags::MAPPED != 0 {
            let rule = policy.nat.rule_of_outside(key.dst).ok_or(DropReason::NatNoMapping)?;
            let joined = self.nat.join(now_ns, key, tenant, rule);
            joined.inspect_err(|reason| self.count_refusal(rule, *reason))?;
            record.nat = rule + 1;
            bound = true;
        }
        if record.nat != 0 && policy.assembles(record.nat - 1) {
            record.flags |= flags::ASSEMBLE;
        }
        record.backend = resolution.backend.map_or(0, |backend| backend + 1);
        let place = match (resolution.server, resolution.backend) {
            (Some(server), Some(backend)) => policy.balancer.opened(server, backend),
            _ => Ok(()),
        };
        let (original, reply) = ((*key, tenant), reply_of(&to, out_tenant));
        let result = place.and_then(|()| self.insert(policy, &original, &reply, resolution, record));
        if result.is_err() {
            if let (Ok(()), Some(backend)) = (place, resolution.backend) {
                policy.balancer.closed(backend, false);
            }
            if bound {
                let client = if record.flags & flags::SOURCE_NAT != 0 { &resolution.to } else { key };
                self.nat.release(now_ns, &reply.0, reply.1, &record, client, tenant);
            }
            return result;
        }
        self.counters.flows_opened += 1;
        self.count_services(&record, key, true);
        self.embryonic += 1;
        result
    }

    fn insert(
        &mut self,
        policy: &Policy,
        original: &(FlowKey, u16),
        reply: &(FlowKey, u16),
        resolution: &Resolution,
        mut record: Record,
    ) -> Result<FlowId, DropReason> {
        let hashes = [original, reply].map(|(key, tenant)| self.flows.hash(key, *tenant));
        // The index has just been asked for the original key; the reply's line is on its way meanwhile.
        self.flows.prefetch(hashes[1]);
        let buckets = self.live_buckets(original, reply);
        record.next_hop[Direction::Original as usize] = if resolution.around {
            next_hops::HAIRPIN
        } else {
            self.hops.number(resolution.egress, resolution.neighbor, policy, &self.neighbors)
        };
        let id = self.flows.insert_unknown(hashes, (&original.0, original.1), (&reply.0, reply.1), record)?;
        hashes.into_iter().for_each(|hash| self.begun.add(hash));
        self.count_live(buckets, u32::wrapping_add);
        Ok(id)
    }
}

/// The egress of a new flow whose destination is final.
fn leave_by(
    policy: &Policy,
    key: &FlowKey,
    ingress: Ingress,
    tenant: u16,
    resolution: &mut Resolution,
) -> Result<(), DropReason> {
    let to_many = is_to_many(key.dst);
    if policy.is_own(resolution.to.dst) || to_many && matches!(ingress, Ingress::Bond(_)) {
        return Ok(());
    }
    if policy.nat.is_outside(resolution.to.dst) {
        return Err(DropReason::NatNoMapping);
    }
    let route = policy.route(ingress, tenant, resolution.to.dst).ok_or(DropReason::NoRoute)?;
    // Back to where it came from, or from the host to the host: it would go round in circles.
    let circles = resolution.flags & flags::DEST_NAT == 0
        && !matches!(ingress, Ingress::Interface(_))
        && route.egress == Egress::from(ingress);
    if circles || to_many && !matches!(route.egress, Egress::Bond(_)) {
        return Err(DropReason::NoRoute);
    }
    resolution.egress = route.egress;
    resolution.neighbor = route.via.unwrap_or(resolution.to.dst);
    Ok(())
}

/// Where the backends of a virtual server are, whether or not they are up: what the firewall is asked about.
fn egress_behind(policy: &Policy, key: &FlowKey, tenant: u16) -> Egress {
    let server = match policy.server_or_forward(key) {
        Some(Service::Server(server)) => policy.spec.servers.get(usize::from(server)),
        _ => None,
    };
    let backend = server.and_then(|server| server.backends.first());
    let route = backend.and_then(|backend| policy.fib.lookup(tenant, backend.address.ip()));
    route.map_or(Egress::Host, |route| route.egress)
}

/// The NAT rule for a flow, if its source is translated.
fn source_rule(
    policy: &Policy,
    key: &FlowKey,
    tenant: u16,
    ingress: Ingress,
    resolution: &Resolution,
) -> Option<u16> {
    if resolution.flags & flags::ONE_WAY != 0 || resolution.egress.interface().is_none() {
        return None;
    }
    let client = NatClient::of(&resolution.to, tenant, ingress);
    if resolution.flags & flags::MAPPED != 0 {
        // From outside the client's source stays. A client inside that meets another at its mapping must not show its
        // inside address (RFC 4787 REQ-9).
        let rule = policy.nat.rule_of_outside(key.dst)?;
        let from_inside =
            policy.spec.nats.get(usize::from(rule)).is_some_and(|nat| nat.out != ingress.interface());
        return if from_inside { policy.nat.rule_for_hairpin(key.dst, &client) } else { None };
    }
    if let (Some(server), Some(NatMode::AddressAndPort | NatMode::PortOnly)) =
        (resolution.server, resolution.source)
    {
        return policy.nat_of_server(server, resolution.egress);
    }
    if resolution.flags & flags::DEST_NAT != 0 && resolution.egress == Egress::from(ingress) {
        // Hairpin: the two are neighbours and would talk past us. RFC 4787 REQ-9: the source is our outside address.
        let by_server = resolution.server.and_then(|server| policy.nat_of_server(server, resolution.egress));
        return by_server.or_else(|| policy.nat.rule_for_hairpin(key.dst, &client));
    }
    let rule = policy.nat.rule_for(resolution.egress, &client)?;
    (resolution.egress != Egress::from(ingress)).then_some(rule)
}

/// Sources that nobody may use.
fn check_source(policy: &Policy, key: &FlowKey, ingress: Ingress, origin: Origin) -> Result<(), DropReason> {
    let bad = match key.src {
        IpAddr::V4(src) => {
            src.is_loopback() || src.is_multicast() || src.is_broadcast() || src.is_unspecified()
        }
        IpAddr::V6(src) => src.is_loopback() || src.is_multicast() || src.is_unspecified(),
    };
    let to_many = ingress.interface().is_some() && is_to_many(key.dst);
    let strange = origin != Origin::Hairpin
        && ingress
            .interface()
            .is_some_and(|interface| policy.is_own(key.src) || policy.is_elsewhere(interface, key.src));
    if bad || to_many || strange { Err(DropReason::BadSource) } else { Ok(()) }
}

fn is_to_many(dst: IpAddr) -> bool {
    dst.is_multicast() || dst == IpAddr::V4(std::net::Ipv4Addr::BROADCAST)
}

/// Whether the kernel's stack has to filter a packet by itself. Of what interfaces bring only TCP connections get a flow,
/// since the host's answers do not come by here; of what bonds bring everything that may be answered.
fn passes_without_flow(
    policy: &Policy,
    frame: &Frame<'_>,
    key: &FlowKey,
    header: &IpHeader,
    resolution: &Resolution,
) -> bool {
    if resolution.egress != Egress::Host || resolution.flags & flags::DEST_NAT != 0 {
        return false;
    }
    match frame.ingress {
        Ingress::Bond(_) if matches!(key.protocol, PROTOCOL_ICMP | PROTOCOL_ICMPV6) => {
            !is_query(header, frame.packet())
        }
        Ingress::Bond(_) => is_to_many(key.dst),
        Ingress::Interface(_) | Ingress::Host => {
            key.protocol != TCP || !opens(policy, key, header, frame.packet())
        }
    }
}

/// Whether a packet may be an answer to the host, whose own questions never come by here. Those to peers do: their
/// answers are of known flows.
fn answers_host(
    policy: &Policy,
    key: &FlowKey,
    egress: Egress,
    frame: &Frame<'_>,
) -> Result<bool, DropReason> {
    if egress != Egress::Host || matches!(frame.ingress, Ingress::Bond(_)) {
        return Ok(false);
    }
    let header = IpHeader::parse(frame.packet())?;
    Ok(policy.server_or_forward(key).is_none() && !opens(policy, key, &header, frame.packet()))
}

/// An ICMP query, which begins a flow (RFC 5508 §3.1).
fn is_query(header: &IpHeader, packet: &[u8]) -> bool {
    let kind = header.payload(packet).first().copied().unwrap_or(0);
    if header.version == 4 { matches!(kind, 8 | 13 | 15 | 17 | 42) } else { matches!(kind, 128 | 160) }
}

/// Whether a packet asks for something new, as opposed to answering the host.
fn opens(policy: &Policy, key: &FlowKey, header: &IpHeader, packet: &[u8]) -> bool {
    let upper = header.payload(packet);
    match header.protocol {
        TCP => upper.get(13).is_none_or(|flags| flags & 0x12 == 0x02),
        // Answers to the host's own questions come to a port that the kernel gave it.
        UDP => !policy.spec.is_host_port(key.dst_port),
        PROTOCOL_ICMP => upper.first().is_some_and(|kind| *kind == 8),
        PROTOCOL_ICMPV6 => upper.first().is_some_and(|kind| *kind == 128),
        _ => true,
    }
}

/// The key with another source; for ICMP the port is the query's id, in the slot that [`FlowKey`] has it in.
pub(super) fn with_source(key: &FlowKey, src: IpAddr, port: u16) -> FlowKey {
    with_id(FlowKey { src, src_port: port, ..*key }, port)
}

/// The key with another destination.
fn with_destination(key: &FlowKey, dst: IpAddr, port: u16) -> FlowKey {
    with_id(FlowKey { dst, dst_port: port, ..*key }, port)
}

fn with_id(key: FlowKey, id: u16) -> FlowKey {
    if !matches!(key.protocol, PROTOCOL_ICMP | PROTOCOL_ICMPV6) {
        return key;
    }
    let (src_port, dst_port) = if key.src < key.dst { (id, 0) } else { (0, id) };
    FlowKey { src_port, dst_port, ..key }
}
