//! The slow path, once per flow: whose packet it is, whether it may pass, how it is translated, where it leaves.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use packet::attachment::{Egress, Ingress, InterfaceId};
use packet::flow::FlowKey;
use packet::icmp::{self, Kind};
use packet::{DropReason, martian};
use steering::ownership::OwnerChain;

use super::answers::Answer;
use super::context::PacketContext;
use super::flows::{TenantKey, tick_of};
use super::hairpin::Hairpin;
use super::{
    Direction, EMERGENCY_ENTRIES, EMERGENCY_S, ETHERNET_BYTES, Frame, Handed, Origin, Outcome, Output, Piece,
    Services, established, next_hops,
};
use crate::flow::{FlowId, Record, flags};
use crate::nat::{BindRequest, Binding, NatClient, uses_low_port};
use crate::policy::{Policy, Service};
use crate::route::RouteQuery;
use crate::rules::{Question, Verdict};
use crate::spec::{DeliveryMode, HostMode, NatMode, RuleAction, TCP, UDP};
use crate::steer;
use crate::tcp;

/// UDP ports of DHCP (RFC 2131 §4.1).
const DHCP_SERVER: u16 = 67;
const DHCP_CLIENT: u16 = 68;
/// Visit at a core that may have the flow since another machine had it: before all of the owner chain.
const INHERITED_VISIT: u8 = u8::MAX;

/// Where a new flow goes, before source translation.
struct Resolution {
    /// The key with its destination translated.
    to: FlowKey,
    egress: Egress,
    neighbor: IpAddr,
    /// Largest packet that the route takes, bytes.
    mtu: u16,
    /// It comes around instead of leaving.
    around: bool,
    server: Option<u16>,
    backend: Option<u16>,
    source: Option<NatMode>,
    flags: u16,
}

impl Resolution {
    fn set_destination(&mut self, target: SocketAddr) {
        self.to.dst = target.ip();
        self.to.dst_port = target.port();
        self.flags |= flags::DEST_NAT;
    }
}

impl Services {
    /// A packet of no flow of this core: to the next stop, or a new flow here.
    pub(super) fn new_flow(&mut self, packet: &PacketContext, frame: &mut Frame<'_>, out: &mut impl Output) {
        let next = match packet.origin {
            Origin::MappingConfirmed | Origin::Hairpin => Ok(None),
            Origin::Wire | Origin::Handed { .. } => self.next_stop(packet),
        };
        match next {
            Ok(Some((core, visit))) => self.pass_on(frame, core, Origin::Handed { visit }, None, out),
            Ok(None) => {
                let begun = self.goes_to_unit(&packet.key, frame).and_then(|goes| {
                    let id = if goes { None } else { self.begin(packet, frame, out)? };
                    id.map_or(Ok(()), |id| self.first_packet(packet, frame, id, out))
                });
                if let Err(reason) = begun {
                    self.dropped(frame, reason);
                }
            }
            Err(reason) => self.dropped(frame, reason),
        }
    }

    /// The core that has to look next and which visit that is, or `None`: this one begins the flow.
    pub(super) fn next_stop(&self, packet: &PacketContext) -> Result<Option<(u8, u8)>, DropReason> {
        let PacketContext { key, tenant, .. } = packet;
        let (ownership, own) = (&self.routing.ownership, self.routing.core);
        let inherited = &self.routing.inherited;
        if packet.origin == Origin::Wire
            && !inherited.is_empty()
            && let Some(core) = inherited.core_of(key, *tenant)
            && core != own
            && ownership.is_alive(core)
        {
            return Ok(Some((core, INHERITED_VISIT)));
        }
        let owners = steer::owners(ownership, &self.routing.policy, key, *tenant, packet.ingress);
        let chain = &owners.chain;
        let keeps = owners.mapping.is_some_and(|rule| self.nat.has_mapping(key, *tenant, rule));
        if keeps && packet.origin != Origin::Wire && chain.cores().contains(&own) {
            return Ok(None);
        }
        let mut visit = match packet.origin {
            // The flow has ended: the packet goes the way that it would have gone without it.
            Origin::Handed { visit: INHERITED_VISIT } => 0,
            Origin::Handed { visit } => visit.saturating_add(1),
            Origin::Wire | Origin::MappingConfirmed | Origin::Hairpin => 0,
        };
        loop {
            match chain.cores().get(usize::from(visit)) {
                Some(core) if *core == own && keeps => return Ok(None),
                Some(core) if *core == own => visit += 1,
                Some(core) => return Ok(Some((*core, visit))),
                None if chain.creator == own => return Ok(None),
                // Two tables were in force on the way: the creator has not been asked as such.
                None if usize::from(visit) < OwnerChain::LEN_MAX && ownership.is_alive(chain.creator) => {
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
        piece: Option<Piece>,
        out: &mut impl Output,
    ) {
        self.counters.handed_out += 1;
        let (ingress, offload) = (frame.ingress, frame.offload);
        let Some(mut packet) = out.buffers().copy(frame.packet(), &offload, ingress) else {
            return self.dropped(frame, DropReason::TooBig);
        };
        packet.visit = frame.visit;
        // The host may get it by its device, with the header that it had.
        if let (Some(room), Some(header)) = (
            packet.with_room(ETHERNET_BYTES).first_chunk_mut::<ETHERNET_BYTES>(),
            frame.bytes.first_chunk::<ETHERNET_BYTES>(),
        ) {
            *room = *header;
        }
        if out.hand_over(core, Handed { packet, origin, piece }) {
            frame.outcome = Outcome::Consumed;
        } else {
            self.dropped(frame, DropReason::RingFull);
        }
    }

    pub(super) fn first_packet(
        &mut self,
        packet: &PacketContext,
        frame: &mut Frame<'_>,
        id: FlowId,
        out: &mut impl Output,
    ) -> Result<(), DropReason> {
        self.flows.table.account(id, Direction::Original, 1, packet.header.total_bytes as u32);
        self.forward(packet, frame, (id, Direction::Original), out)
    }

    /// Decides a new flow. `None`: the packet is dealt with, without one.
    pub(super) fn begin(
        &mut self,
        packet: &PacketContext,
        frame: &mut Frame<'_>,
        out: &mut impl Output,
    ) -> Result<Option<FlowId>, DropReason> {
        let policy = Arc::clone(&self.routing.policy);
        if self.is_without_flow(&policy, packet, frame)? {
            return Ok(None);
        }
        check_addresses(&policy, packet, frame)?;
        let around = match self.hairpin(packet, frame, out) {
            Hairpin::No => None,
            Hairpin::HandedOver => return Ok(None),
            Hairpin::Begin(interface) => Some(interface),
        };
        let resolution = match self.resolve(&policy, packet, frame, around) {
            Ok(resolution) => resolution,
            Err(reason) => {
                self.not_resolved(&policy, packet, frame, reason, out)?;
                return Err(reason);
            }
        };
        let verdict = self.filter(&policy, packet, frame, resolution.egress, out)?;
        let unasked =
            policy.hides_inside(packet.ingress.interface()) && resolution.flags & flags::DEST_NAT == 0;
        if unasked && verdict.rule.is_none() && resolution.egress.interface().is_some() {
            return Err(DropReason::NatNoMapping);
        }
        if passes_without_flow(&policy, packet, frame, &resolution) {
            self.give_to_host(frame, &packet.header);
            return Ok(None);
        }
        if !self.make_room(packet.now_ns) {
            return Err(DropReason::EmbryonicFull);
        }
        let record = Record {
            protocol: packet.key.protocol,
            era: self.routing.era,
            in_port: packet.ingress.compact(),
            seen: tick_of(packet.now_ns),
            flags: resolution.flags,
            rule: verdict.rule.map_or(0, |rule| rule + 1),
            ..Record::default()
        };
        let begun = begin_state(&policy, record, packet, frame, &resolution);
        if begun == Err(DropReason::NotNew) && is_forgotten(&policy, packet, &resolution) {
            self.answer(packet, frame, Answer::Reset, out);
        }
        let record = begun?;
        let opened = self.open(&policy, packet, &resolution, record);
        match opened {
            Ok(_) if record.flags & flags::PROXY_PROTOCOL != 0 => self.begin_shift(packet, frame),
            Ok(_) if goes_back(packet, &resolution) => {
                self.redirect(packet, frame, resolution.neighbor, out);
            }
            Ok(_) => {}
            // In a moment this unit has its ports: the sender tries again, and should not give up.
            Err(DropReason::NatPortsExhausted) if self.routing.awaits_era() => {}
            Err(reason) => {
                if let Some(answer) = Answer::to_failed(reason, &packet.header) {
                    self.answer(packet, frame, answer, out);
                }
            }
        }
        opened.map(Some)
    }

    /// Whether no flow begins with a packet, which is dealt with: an ICMP error, one of the host's own that leaves as it is, an
    /// answer to the host's DHCP client.
    fn is_without_flow(
        &mut self,
        policy: &Policy,
        packet: &PacketContext,
        frame: &mut Frame<'_>,
    ) -> Result<bool, DropReason> {
        if packet.icmp(frame) == Some(Kind::Error) {
            self.unknown_error(policy, packet, frame)?;
            return Ok(true);
        }
        if answers_dhcp(&packet.key) && is_native(policy, packet.ingress) {
            self.give_to_host(frame, &packet.header);
            return Ok(true);
        }
        Ok(self.goes_untranslated(policy, packet, frame))
    }

    /// Answers a packet of a flow that goes nowhere, if the rules do not forbid it.
    fn not_resolved(
        &mut self,
        policy: &Policy,
        packet: &PacketContext,
        frame: &Frame<'_>,
        reason: DropReason,
        out: &mut impl Output,
    ) -> Result<(), DropReason> {
        if let Some(answer) = Answer::to_failed(reason, &packet.header) {
            let egress = egress_behind(policy, packet);
            self.filter(policy, packet, frame, egress, out)?;
            self.answer(packet, frame, answer, out);
            return Ok(());
        }
        // By what it would leave is not known, so that only a rule that names it can forbid it.
        let PacketContext { key, tenant, ingress, .. } = packet;
        let question =
            Question { key, tenant: *tenant, ingress: *ingress, egress: Egress::Host, to_gateway: false };
        let verdict = policy.verdict(&question);
        if verdict.rule.is_some() && verdict.action != RuleAction::Allow {
            self.filter(policy, packet, frame, Egress::Host, out)?;
        }
        self.tell_of_route(packet, frame, reason, out);
        Ok(())
    }

    /// Asks the firewall about a new flow; what it refuses is answered as the rule says.
    fn filter(
        &mut self,
        policy: &Policy,
        packet: &PacketContext,
        frame: &Frame<'_>,
        egress: Egress,
        out: &mut impl Output,
    ) -> Result<Verdict, DropReason> {
        let PacketContext { key, tenant, ingress, .. } = packet;
        let to_gateway = !policy.rules.is_empty() && policy.is_addressed(key);
        let question = Question { key, tenant: *tenant, ingress: *ingress, egress, to_gateway };
        let verdict = policy.verdict(&question);
        // The host's own firewall decides what the host gets or passes on; our rules only about what begins something.
        let native = policy.is_kernels(&question);
        // What answers the host passes whatever the default is: nothing was decided.
        if native && (verdict.rule.is_none() || !opens(policy, packet, frame))
            || verdict.rule.is_none() && answers_host(policy, packet, frame, egress)
        {
            return Ok(Verdict { action: RuleAction::Allow, rule: None });
        }
        self.rule_counters.count_verdict(verdict.rule);
        match verdict.action {
            RuleAction::Allow => Ok(verdict),
            RuleAction::Drop if verdict.rule.is_some() => Err(DropReason::RuleDrop),
            RuleAction::Drop => Err(DropReason::DefaultDrop),
            RuleAction::Reject => {
                self.answer(packet, frame, Answer::to_rejected(&packet.header), out);
                Err(DropReason::RuleReject)
            }
        }
    }

    /// An ICMP error about no flow of ours: the host may know what it is about, or has sent it.
    pub(super) fn unknown_error(
        &mut self,
        policy: &Policy,
        packet: &PacketContext,
        frame: &mut Frame<'_>,
    ) -> Result<(), DropReason> {
        let header = &packet.header;
        if policy.is_own(header.dst) {
            self.give_to_host(frame, header);
            return Ok(());
        }
        if icmp::is_never_forwarded(header, header.payload(frame.packet())) {
            return Err(DropReason::IcmpNotForwarded);
        }
        check_addresses(policy, packet, frame)?;
        let query = RouteQuery {
            tenant: packet.tenant,
            ingress: Some(packet.ingress),
            key: packet.key.with_destination(header.dst, packet.key.dst_port),
            before: None,
        };
        let route = policy.route(&query);
        if packet.ingress != Ingress::Host {
            let by_kernel = route.is_ok_and(|route| route.egress == Egress::Kernel);
            if by_kernel {
                self.give_to_host(frame, header);
                return Ok(());
            }
            return Err(DropReason::IcmpInvalid);
        }
        let route = route?;
        let hop = ((route.egress, route.via.unwrap_or(header.dst), route.mtu), header.dst.is_ipv4());
        established::address(frame, &self.routing.unnumbered(hop));
        self.went_on(header);
        Ok(())
    }

    /// Destination: service, mapping, route.
    fn resolve(
        &mut self,
        policy: &Policy,
        packet: &PacketContext,
        frame: &Frame<'_>,
        around: Option<InterfaceId>,
    ) -> Result<Resolution, DropReason> {
        let PacketContext { key, tenant, .. } = packet;
        let mut resolution = Resolution {
            to: *key,
            egress: around.map_or(Egress::Host, Egress::Interface),
            neighbor: key.dst,
            mtu: u16::MAX,
            around: around.is_some(),
            server: None,
            backend: None,
            source: None,
            flags: 0,
        };
        if around.is_some() {
            return Ok(resolution);
        }
        let mut tenant_out = *tenant;
        match policy.server_or_forward(key) {
            Some(Service::Server(server)) => {
                let known = policy.balancer.quic_backend(server, packet.datagram(frame), packet.now_ns);
                let pick = match known {
                    Some(pick) => pick,
                    None => {
                        let random = (self.random.word() >> 32) as u32;
                        policy.balancer.pick(server, key, packet.now_ns, random)?
                    }
                };
                resolution.server = Some(server);
                resolution.backend = Some(pick.backend);
                if pick.delivery == DeliveryMode::DirectReturn {
                    resolution.flags |= flags::ONE_WAY | flags::DEST_NAT;
                    let key = key.with_destination(pick.address.ip(), pick.address.port());
                    let query =
                        RouteQuery { tenant: *tenant, ingress: Some(packet.ingress), key, before: None };
                    resolution.egress = policy.route(&query)?.egress;
                    resolution.neighbor = pick.address.ip();
                    return Ok(resolution);
                }
                resolution.flags |=
                    if policy.balancer.learns_connection_ids(server) { flags::LEARNS_IDS } else { 0 };
                resolution.source = Some(pick.source);
                resolution.flags |= if pick.proxy_protocol { flags::PROXY_PROTOCOL } else { 0 };
                resolution.set_destination(pick.address);
            }
            Some(Service::Forward(forward)) => {
                tenant_out = forward.tenant;
                let proxied = forward.proxy_protocol && forward.protocol == TCP;
                resolution.flags |= if proxied { flags::PROXY_PROTOCOL } else { 0 };
                resolution.set_destination(forward.target(key.dst_port).unwrap_or(forward.to));
            }
            None => {
                if policy.owners.maps_endpoints
                    && let Some(inside) = self.nat.inbound(key, *tenant)
                {
                    resolution.to = key.with_destination(inside.address, inside.port);
                    resolution.flags |= flags::DEST_NAT | flags::MAPPED;
                    tenant_out = inside.tenant;
                }
            }
        }
        leave_by(policy, packet, tenant_out, &mut resolution)?;
        Ok(resolution)
    }

    /// Source translation, next hops, the entry.
    fn open(
        &mut self,
        policy: &Policy,
        packet: &PacketContext,
        resolution: &Resolution,
        mut record: Record,
    ) -> Result<FlowId, DropReason> {
        let PacketContext { key, tenant, .. } = packet;
        let out_tenant = policy.tenant_behind(resolution.egress);
        let to = self.translate_source(policy, packet, resolution, &mut record)?;
        let bound = record.nat != 0;
        if bound && policy.assembles(record.nat - 1) {
            record.flags |= flags::ASSEMBLE;
        }
        record.backend = resolution.backend.map_or(0, |backend| backend + 1);
        let place = match (resolution.server, resolution.backend) {
            (Some(server), Some(backend)) => policy.balancer.opened(server, backend),
            _ => Ok(()),
        };
        let (original, reply) = ((*key, *tenant), (to.reversed(), out_tenant));
        let result = place.and_then(|()| self.insert(&original, &reply, resolution, record));
        if result.is_err() {
            if let (Ok(()), Some(backend)) = (place, resolution.backend) {
                policy.balancer.closed(backend, false);
            }
            if bound {
                let client = if record.flags & flags::SOURCE_NAT != 0 { &resolution.to } else { key };
                self.nat.release(packet.now_ns, &reply.0, reply.1, &record, client, *tenant);
            }
            return result;
        }
        if let Some(backend) = resolution.backend {
            policy.balancer.remember(backend, key.src, false, packet.now_ns);
        }
        self.counters.flows_opened += 1;
        self.rule_counters.count_flow(policy, &record, key, true);
        result
    }

    /// Gives a new flow its source, if a NAT rule takes it, and notes that in the record; the key as it leaves.
    fn translate_source(
        &mut self,
        policy: &Policy,
        packet: &PacketContext,
        resolution: &Resolution,
        record: &mut Record,
    ) -> Result<FlowKey, DropReason> {
        let PacketContext { now_ns, key, tenant, .. } = packet;
        if let Some(rule) = source_rule(policy, packet, resolution) {
            let by_endpoint = policy.owners.maps_endpoints && resolution.flags & flags::DEST_NAT == 0;
            let ownership = &self.routing.ownership;
            let request = BindRequest {
                rule,
                client: resolution.to,
                tenant: *tenant,
                out_tenant: policy.tenant_behind(resolution.egress),
                random: self.random.word(),
                home: by_endpoint.then(|| steer::endpoint_bucket(ownership, key, *tenant) as u16),
                next: Some(resolution.neighbor),
            };
            let mut binding = self.bind(*now_ns, &request);
            if binding == Err(DropReason::NatPortsExhausted) {
                // Ports that a flood holds, whose connections were never completed, are given up first.
                self.sweep(*now_ns, EMERGENCY_ENTRIES, EMERGENCY_S);
                binding = self.bind(*now_ns, &request);
            }
            let refused = |reason: &DropReason| self.rule_counters.count_refusal(rule, *reason);
            let binding = binding.inspect_err(refused)?;
            // The source's mapping is what counts from here on, not the one it was sent to.
            record.flags &= !flags::MAPPED;
            record.flags |= if binding.kept { 0 } else { flags::SOURCE_NAT };
            record.flags |= if binding.mapped { flags::MAPPED } else { 0 };
            record.flags |= if binding.own_port { flags::OWN_PORT } else { 0 };
            record.flags |= if binding.counted { flags::COUNTED } else { 0 };
            let low_lost = uses_low_port(&resolution.to) && !binding.kept && binding.port >= 1024;
            self.counters.low_ports_lost += u64::from(low_lost);
            record.nat = rule + 1;
            record.port_table = binding.table;
            if !binding.kept {
                let to = resolution.to.with_source(binding.source, binding.port);
                if policy.spec.host.seals(&to) {
                    // The kernel would find it there, and does not get it.
                    let reply = to.reversed();
                    self.nat.release(*now_ns, &reply, request.out_tenant, record, &request.client, *tenant);
                    self.rule_counters.count_refusal(rule, DropReason::NatUnsupported);
                    return Err(DropReason::NatUnsupported);
                }
                return Ok(to);
            }
        } else if resolution.flags & flags::MAPPED != 0 {
            let rule = policy.nat.rule_of_outside(key.dst).ok_or(DropReason::NatNoMapping)?;
            let joined = self.nat.join(*now_ns, key, *tenant, rule);
            joined.inspect_err(|reason| self.rule_counters.count_refusal(rule, *reason))?;
            record.nat = rule + 1;
        }
        Ok(resolution.to)
    }

    fn bind(&mut self, now_ns: u64, request: &BindRequest) -> Result<Binding, DropReason> {
        let (flows, tenant) = (&self.flows, request.out_tenant);
        self.nat.bind(now_ns, request, |reply| flows.find(reply, tenant).is_some())
    }

    fn insert(
        &mut self,
        original: &TenantKey,
        reply: &TenantKey,
        resolution: &Resolution,
        mut record: Record,
    ) -> Result<FlowId, DropReason> {
        let hashes = self.flows.hashes(original, reply);
        let buckets = self.routing.live_buckets(original, reply);
        record.next_hop[Direction::Original as usize] = if resolution.around {
            next_hops::HAIRPIN
        } else {
            let ipv4 = resolution.to.dst.is_ipv4();
            self.routing.number(((resolution.egress, resolution.neighbor, resolution.mtu), ipv4))
        };
        let id = self.flows.insert(hashes, buckets, original, reply, record)?;
        self.flows.note_unit_bucket(self.routing.units.as_ref(), (original, &record), 1);
        Ok(id)
    }
}

/// The transport protocol's state after the first packet.
fn begin_state(
    policy: &Policy,
    mut record: Record,
    packet: &PacketContext,
    frame: &Frame<'_>,
    resolution: &Resolution,
) -> Result<Record, DropReason> {
    if resolution.egress == Egress::Host && matches!(packet.ingress, Ingress::Bond(_)) {
        record.flags |= flags::LOCAL;
    }
    let protocol = packet.header.protocol;
    let goes_anywhere = policy.is_loose(packet.ingress, resolution.egress)
        && resolution.flags & flags::DEST_NAT == 0
        && !matches!(resolution.egress, Egress::Host);
    let is_loose = || goes_anywhere && source_rule(policy, packet, resolution).is_none();
    match protocol {
        TCP => {
            let segment = packet.segment(frame)?;
            if super::proxy_sequence::has_early_data(record.flags, &segment) {
                return Err(DropReason::NatUnsupported);
            }
            let is_backend = resolution.server.is_some() && resolution.flags & flags::ONE_WAY == 0;
            if resolution.egress == Egress::Host && packet.ingress.interface().is_some() && !is_backend {
                // The host answers by the device itself.
                record.flags |= flags::LOCAL | flags::ONE_WAY;
            }
            // A connection that was there before us may go on where nothing has to be translated, or nothing that this core would
            // have chosen: by a port forward. Its host knows the connection, or resets it (RFC 9293 §3.5.2).
            let goes_on = resolution.server.is_none()
                && (resolution.flags & flags::DEST_NAT != 0
                    || !policy.hides_inside(resolution.egress.interface())
                    || is_let_out(policy, packet, resolution));
            let whole = resolution.flags & flags::PROXY_PROTOCOL == 0;
            if is_loose() {
                record.flags |= flags::ONE_WAY;
                tcp::begin_loose(&mut record, &segment);
            } else if !tcp::begin(&mut record, &segment, goes_on && whole) {
                return Err(DropReason::NotNew);
            }
        }
        // The question may have gone past us.
        _ if icmp::is_icmp(protocol) && packet.icmp(frame) != Some(Kind::Request) && !is_loose() => {
            return Err(DropReason::NotNew);
        }
        _ => {}
    }
    Ok(record)
}

/// Whether the sender of a TCP segment that begins nothing is told by a reset, which it accepts since the sequence number is the one
/// that it acknowledged. A virtual server resets as a host without such a connection (RFC 9293 §3.10.7.1): it may be one to a backend
/// that went down. A client inside is told that its translated connection is forgotten, over its time or before a restart; nobody
/// outside is.
fn is_forgotten(policy: &Policy, packet: &PacketContext, resolution: &Resolution) -> bool {
    let from_inside = policy.hides_inside(resolution.egress.interface())
        && !policy.hides_inside(packet.ingress.interface())
        && !is_let_out(policy, packet, resolution);
    packet.header.protocol == TCP && (resolution.server.is_some() || from_inside)
}

/// Whether a packet from inside leaves as it is, though others hide there: by their family or address no rule translates them.
fn is_let_out(policy: &Policy, packet: &PacketContext, resolution: &Resolution) -> bool {
    let translates = |rule: u16| policy.nat.mode(rule) != Some(NatMode::None);
    !policy.hides_inside(packet.ingress.interface())
        && !source_rule(policy, packet, resolution).is_some_and(translates)
}

/// Whether a packet leaves, untranslated, by the interface that it came in by.
fn goes_back(packet: &PacketContext, resolution: &Resolution) -> bool {
    packet.ingress.interface().is_some()
        && resolution.egress == Egress::from(packet.ingress)
        && resolution.flags & flags::DEST_NAT == 0
        && !resolution.around
}

/// The egress of a new flow whose destination is final.
fn leave_by(
    policy: &Policy,
    packet: &PacketContext,
    tenant: u16,
    resolution: &mut Resolution,
) -> Result<(), DropReason> {
    let PacketContext { key, ingress, .. } = *packet;
    let to_many = is_to_many(key.dst);
    if policy.is_inner(resolution.to.dst) {
        return Err(DropReason::NoRoute);
    }
    if policy.is_own(resolution.to.dst) || to_many && matches!(ingress, Ingress::Bond(_)) {
        return Ok(());
    }
    if policy.nat.is_outside(resolution.to.dst) {
        return Err(DropReason::NatNoMapping);
    }
    let query = RouteQuery { tenant, ingress: Some(ingress), key: resolution.to, before: None };
    let route = policy.route(&query)?;
    // Back to where it came from, or from the host to the host: it would go round in circles.
    let translated = resolution.flags & flags::DEST_NAT != 0;
    let circles = !translated
        && !matches!(ingress, Ingress::Interface(_))
        && (route.egress == Egress::from(ingress)
            || (ingress, route.egress) == (Ingress::Host, Egress::Kernel));
    // The answers to what the kernel passes on do not come by here: nothing would translate them back. Those of a virtual server's
    // backend have an address to which the way is here.
    let returns = |server| policy.nat_of_server(server, Egress::Kernel, ingress).is_some();
    let lost = translated && route.egress == Egress::Kernel && !resolution.server.is_some_and(returns);
    if circles || lost || to_many && !matches!(route.egress, Egress::Bond(_)) {
        return Err(DropReason::NoRoute);
    }
    let beside = route.egress.interface().filter(|_| route.via.is_none());
    if beside.is_some_and(|interface| policy.is_broadcast(interface, resolution.to.dst)) {
        return Err(DropReason::DirectedBroadcast);
    }
    resolution.egress = route.egress;
    resolution.neighbor = route.via.unwrap_or(resolution.to.dst);
    resolution.mtu = route.mtu;
    Ok(())
}

/// Where the backends of a virtual server are, whether or not they are up: what the firewall is asked about.
fn egress_behind(policy: &Policy, packet: &PacketContext) -> Egress {
    let server = match policy.server_or_forward(&packet.key) {
        Some(Service::Server(server)) => policy.spec.servers.get(usize::from(server)),
        _ => None,
    };
    let backend = server.and_then(|server| server.backends.first());
    let route = backend.and_then(|backend| policy.fib.lookup(packet.tenant, backend.address.ip()));
    route.map_or(Egress::Host, |route| route.egress)
}

/// The NAT rule for a flow, if its source is translated.
fn source_rule(policy: &Policy, packet: &PacketContext, resolution: &Resolution) -> Option<u16> {
    let PacketContext { key, tenant, ingress, .. } = *packet;
    if resolution.flags & flags::ONE_WAY != 0 {
        return None;
    }
    if resolution.egress.interface().is_none() {
        // The host would answer any other source past us.
        let here = matches!(resolution.egress, Egress::Host | Egress::Kernel);
        let hides = here || resolution.source != Some(NatMode::None);
        let server = resolution.server.filter(|_| hides);
        return server.and_then(|server| policy.nat_of_server(server, resolution.egress, ingress));
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
        return policy.nat_of_server(server, resolution.egress, ingress);
    }
    if resolution.flags & flags::DEST_NAT != 0 && resolution.egress == Egress::from(ingress) {
        // Hairpin: the two are neighbours and would talk past us. RFC 4787 REQ-9: the source is our outside address.
        let by_server =
            resolution.server.and_then(|server| policy.nat_of_server(server, resolution.egress, ingress));
        return by_server.or_else(|| policy.nat.rule_for_hairpin(key.dst, &client));
    }
    let rule = policy.nat.rule_for(resolution.egress, &client)?;
    (resolution.egress != Egress::from(ingress)).then_some(rule)
}

/// Addresses that nobody may use here, and sources that cannot come in there. Of an ICMP error its own addresses count, not
/// those of its key.
fn check_addresses(policy: &Policy, packet: &PacketContext, frame: &Frame<'_>) -> Result<(), DropReason> {
    let PacketContext { key, ingress, origin, header, .. } = packet;
    if *ingress != Ingress::Host && policy.is_inner(header.dst) {
        return Err(DropReason::NoRoute);
    }
    let Some(interface) = ingress.interface() else {
        return martian::check_link(header, frame.packet());
    };
    // What a neighbor says to the host by a link-local address is between the two.
    let to_host = policy.is_own(header.dst) && policy.server_or_forward(key).is_none();
    match martian::check(header, frame.packet()) {
        Err(DropReason::MartianLinkLocal) if to_host => {}
        checked => checked?,
    }
    let strange = || policy.is_own(header.src) || policy.is_elsewhere(interface, header.src);
    let bad = is_to_many(header.dst)
        || policy.is_broadcast(interface, header.src)
        || *origin != Origin::Hairpin && strange();
    if bad { Err(DropReason::BadSource) } else { Ok(()) }
}

fn is_to_many(dst: IpAddr) -> bool {
    dst.is_multicast() || dst == IpAddr::V4(std::net::Ipv4Addr::BROADCAST)
}

/// Whether the kernel's stack has to filter a packet by itself: what it passes on, and what is for the host. Of what interfaces
/// bring only TCP connections to the host get a flow, since the kernel's answers do not come by here; of what bonds bring everything
/// that may be answered.
fn passes_without_flow(
    policy: &Policy,
    packet: &PacketContext,
    frame: &Frame<'_>,
    resolution: &Resolution,
) -> bool {
    if resolution.egress == Egress::Kernel && resolution.server.is_none() {
        // Its answers to interfaces do not come by here; those to peers do.
        return packet.ingress.interface().is_some();
    }
    if resolution.egress != Egress::Host || resolution.flags & flags::DEST_NAT != 0 {
        return false;
    }
    let key = &packet.key;
    match packet.ingress {
        Ingress::Bond(_) if icmp::is_icmp(key.protocol) => packet.icmp(frame) != Some(Kind::Request),
        Ingress::Bond(_) => is_to_many(key.dst),
        // Other units have to find the connection where it began.
        Ingress::Interface(_) if frame.visit.is_some() && key.protocol == TCP => {
            !opens(policy, packet, frame)
        }
        ingress if is_native(policy, ingress) => true,
        Ingress::Interface(_) | Ingress::Host => key.protocol != TCP || !opens(policy, packet, frame),
    }
}

/// Whether the host gets what came in here by its device, unchanged.
fn is_native(policy: &Policy, ingress: Ingress) -> bool {
    policy.spec.host.mode == HostMode::Native && ingress.interface().is_some()
}

/// Whether a packet may be an answer to the host, whose own questions never come by here. Those to peers do: their
/// answers are of known flows.
fn answers_host(policy: &Policy, packet: &PacketContext, frame: &Frame<'_>, egress: Egress) -> bool {
    matches!(egress, Egress::Host | Egress::Kernel)
        && !matches!(packet.ingress, Ingress::Bond(_))
        && policy.server_or_forward(&packet.key).is_none()
        && !opens(policy, packet, frame)
}

/// Whether a datagram is a DHCP server's answer to a client. Those to clients behind us are of known flows; the host's own come to an
/// address that it does not have yet.
fn answers_dhcp(key: &FlowKey) -> bool {
    key.protocol == UDP && key.src.is_ipv4() && (key.src_port, key.dst_port) == (DHCP_SERVER, DHCP_CLIENT)
}

/// Whether a packet asks for something new, as opposed to answering the host.
fn opens(policy: &Policy, packet: &PacketContext, frame: &Frame<'_>) -> bool {
    let upper = packet.header.payload(frame.packet());
    match packet.header.protocol {
        TCP => upper.get(13).is_none_or(|flags| flags & 0x12 == 0x02),
        // Answers to the host's own questions come to a port that the kernel gave it, as do those to what it masquerades.
        UDP => !(policy.is_own(packet.key.dst) && policy.spec.host.is_port(packet.key.dst_port)),
        protocol if icmp::is_icmp(protocol) => icmp::is_echo_request(&packet.header, upper),
        _ => true,
    }
}
