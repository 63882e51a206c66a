//! A packet of a known flow, whatever is unusual about it.

use packet::attachment::{Egress, Ingress};
use packet::flow::FlowKey;
use packet::icmp::{self, Kind};
use packet::ip::IpHeader;
use packet::segment::mss_clamp;
use packet::{DropReason, martian, u32_at};

use super::answers::Answer;
use super::context::PacketContext;
use super::dead_backends::ingress_of;
use super::flows::{is_embryonic, tick_of};
use super::next_hops::{self, Hop, Target, Way};
use super::{Direction, Frame, Origin, Outcome, Output, Services};
use crate::flow::{FlowId, Record, flags};
use crate::icmp::Problem;
use crate::policy::{Policy, Service};
use crate::rewrite;
use crate::route::RouteQuery;
use crate::rules::Question;
use crate::spec::{RuleAction, TCP};
use crate::tcp::{self, SYN, State, Verdict};

impl Services {
    /// Follows the flow's state and sends the packet on.
    pub(super) fn established(
        &mut self,
        packet: &PacketContext,
        frame: &mut Frame<'_>,
        (id, direction): (FlowId, Direction),
        out: &mut impl Output,
    ) -> Result<(), DropReason> {
        if packet.icmp(frame) == Some(Kind::Error) {
            return self.established_error(packet, frame, (id, direction), out);
        }
        self.check_ingress(packet, (id, direction))?;
        let flow = self.flows.table.for_packet(id, direction);
        let mut flow = flow.ok_or(DropReason::NotNew)?;
        if flow.record.era != self.routing.era {
            if !self.decide_again(packet.now_ns, id)? {
                return self.translation_over(packet, frame, (id, direction), out);
            }
            let again = self.flows.table.for_packet(id, direction);
            flow = again.ok_or(DropReason::NotNew)?;
        }
        let was = is_embryonic(flow.record);
        if flow.record.flags & flags::PROXY_PROTOCOL != 0 {
            return self.established_proxied(packet, frame, (id, direction), out);
        }
        if packet.header.protocol == TCP {
            let segment = packet.segment(frame)?;
            let was_over = is_over(flow.record);
            let verdict = tcp::follow(flow.record, direction, &segment);
            note_end(&self.routing.policy, flow.record, was_over);
            self.flows.embryonic.changed(was, is_embryonic(flow.record));
            match verdict {
                Verdict::Accept => {}
                // What may be forged must not keep a connection alive.
                Verdict::Pass => return self.forward(packet, frame, (id, direction), out),
                Verdict::Invalid => return Err(DropReason::TcpInvalid),
                Verdict::Reopen => return self.reopen(packet, frame, (id, direction), out),
            }
        }
        if flow.record.flags & flags::LEARNS_IDS != 0 && direction == Direction::Reply {
            learn_id(&self.routing.policy, packet, frame, flow.record);
        }
        flow.count(packet.header.total_bytes as u32);
        flow.record.seen = tick_of(packet.now_ns);
        if direction == Direction::Reply || tcp::is_answered_unseen(flow.record) {
            let was = is_embryonic(flow.record);
            flow.record.flags |= flags::REPLIED;
            self.flows.embryonic.changed(was, is_embryonic(flow.record));
        }
        let (flags, number) = (flow.record.flags, flow.record.next_hop[direction as usize]);
        let to = flow.leaves_as.map(|ends| ends.key(packet.header.protocol));
        if was && !is_embryonic(flow.record) {
            self.note_client(packet.now_ns, id);
        }
        if packet.origin != Origin::Wire && direction == Direction::Reply {
            self.handed_reply(id, flags);
        }
        frame.flow = Some((id, direction));
        match self.routing.hops.get(number).copied() {
            Some(hop) => self.forward_to(packet, frame, to.as_ref(), &hop, out),
            None => self.forward(packet, frame, (id, direction), out),
        }
    }

    /// Checks that a packet of a known flow came in where its direction does, or by another way that a route to its sender leads
    /// by: an answer may take another link than the question ("feasible path", RFC 3704 §2.3).
    pub(super) fn check_ingress(
        &self,
        packet: &PacketContext,
        (id, direction): (FlowId, Direction),
    ) -> Result<(), DropReason> {
        // What a bond brings is from an address that its peer may use; the host's kernel knows its own.
        let Ingress::Interface(interface) = packet.ingress else { return Ok(()) };
        let record = self.flows.table.record(id);
        let expected = match direction {
            Direction::Original => Some(record.ingress()),
            Direction::Reply => {
                self.target(id, Direction::Original).ok().and_then(|(egress, ..)| ingress_of(egress))
            }
        };
        let source = packet.header.src;
        let policy = &self.routing.policy;
        if expected == Some(packet.ingress) || packet.origin == Origin::Hairpin {
            return Ok(());
        }
        let is_loose = || policy.interface(interface).is_some_and(|interface| interface.loose_tcp);
        let leads = || policy.fib.leads_by(packet.tenant, source, Egress::Interface(interface));
        if !policy.is_own(source) && (leads() || is_loose()) { Ok(()) } else { Err(DropReason::WrongIngress) }
    }

    /// Checks an ICMP error about a known flow that travels in this direction.
    fn check_error(
        &self,
        packet: &PacketContext,
        frame: &Frame<'_>,
        flow: (FlowId, Direction),
    ) -> Result<(), DropReason> {
        let message = packet.header.payload(frame.packet());
        if icmp::is_never_forwarded(&packet.header, message) {
            return Err(DropReason::IcmpNotForwarded);
        }
        self.check_ingress(packet, flow)?;
        let policy = &self.routing.policy;
        let source = packet.header.src;
        let from_us = policy.is_own(source) || policy.nat.is_outside(source);
        if packet.ingress == Ingress::Host || packet.origin == Origin::Hairpin {
            return Ok(());
        }
        if from_us { Err(DropReason::BadSource) } else { martian::of_source(source).map_or(Ok(()), Err) }
    }

    /// A SYN of a new connection between the ports of one that is over: decided anew, as the flow of who sent it. To who is
    /// translated nobody else begins one.
    pub(super) fn reopen(
        &mut self,
        packet: &PacketContext,
        frame: &mut Frame<'_>,
        (id, direction): (FlowId, Direction),
        out: &mut impl Output,
    ) -> Result<(), DropReason> {
        let (original, reply) = self.flows.table.keys(id);
        let (key, tenant) = match direction {
            Direction::Original => original,
            Direction::Reply if self.flows.table.is_translated(id) => return Err(DropReason::TcpInvalid),
            Direction::Reply => reply,
        };
        self.end(packet.now_ns, id);
        self.new_flow(&PacketContext { key, tenant, ..*packet }, frame, out);
        Ok(())
    }

    /// A reply that another core read. Right if the table names this core, now or before its bucket moved: then only the
    /// kernel did not know. Wrong if the port was chosen so that the hash names another.
    #[cold]
    fn handed_reply(&mut self, id: FlowId, flags: u16) {
        const OURS: u16 = flags::SOURCE_NAT;
        if flags & (OURS | flags::MAPPED) != OURS {
            return;
        }
        let (_, (reply, tenant)) = self.flows.table.keys(id);
        let bucket = self.routing.ownership.bucket(&reply, tenant);
        let table = &self.routing.ownership.table;
        let own = u16::from(self.routing.core);
        if table.owner(bucket) != own && !table.chain(bucket).contains(&own) {
            self.counters.replies_on_wrong_core += 1;
        }
    }

    /// Time, first reply, counters of a packet whose state is not followed here.
    pub(super) fn seen(&mut self, packet: &PacketContext, (id, direction): (FlowId, Direction)) {
        self.flows.table.account(id, direction, 1, packet.header.total_bytes as u32);
        let record = self.flows.table.record_mut(id);
        record.seen = tick_of(packet.now_ns);
        if record.flags & flags::REPLIED == 0
            && (direction == Direction::Reply || tcp::is_answered_unseen(record))
        {
            let was = is_embryonic(record);
            record.flags |= flags::REPLIED;
            let is = is_embryonic(record);
            self.flows.embryonic.changed(was, is);
            if was && !is {
                self.note_client(packet.now_ns, id);
            }
        }
    }

    /// A flow proved just now that it is wanted: its client stays with its backend, where that is asked for.
    #[cold]
    pub(super) fn note_client(&self, now_ns: u64, id: FlowId) {
        let ((key, _), _) = self.flows.table.keys(id);
        if let Some(backend) = self.flows.table.record(id).backend.checked_sub(1) {
            self.routing.policy.balancer.remember(backend, key.src, true, now_ns);
        }
    }

    /// Translates and addresses a packet of a flow.
    pub(super) fn forward(
        &mut self,
        packet: &PacketContext,
        frame: &mut Frame<'_>,
        (id, direction): (FlowId, Direction),
        out: &mut impl Output,
    ) -> Result<(), DropReason> {
        let way = self.way(id, direction)?;
        frame.flow = Some((id, direction));
        let to = self.translation(id, direction);
        if let Way::Hop(hop) = way {
            return self.forward_to(packet, frame, to.as_ref(), &hop, out);
        }
        if matches!(way, Way::Hairpin) {
            self.may_hairpin(packet, frame, out)?;
        }
        if let Some(to) = &to {
            if self.is_backend_here(id, direction) {
                // The host's answers are as long as this says, whatever links the client is behind.
                let mtu = self.routing.mtu_of(packet.ingress, packet.header.version == 4);
                clamp_mss(frame.packet_mut(), packet, mtu);
            }
            rewrite::rewrite(frame.packet_mut(), &packet.header, packet.partial, to)?;
            if matches!(way, Way::Hairpin) {
                return self.enter_again(packet.now_ns, frame, to, out);
            }
        }
        self.give_to_host(frame, &packet.header);
        self.give_back(frame, (id, direction));
        Ok(())
    }

    /// Answers to packets that the host sent into the TUN device go back there: the device that brought it does not
    /// expect anything from one of the host's own addresses, as that of a virtual server is. So does what is for a backend on the host
    /// or behind its other devices: its source is an address that is behind the TUN device.
    fn give_back(&self, frame: &mut Frame<'_>, (id, direction): (FlowId, Direction)) {
        let of_host = self.flows.table.record(id).ingress() == Ingress::Host;
        if direction == Direction::Reply && of_host && !self.is_hosts_by_device(id)
            || self.is_backend_here(id, direction)
        {
            frame.outcome = Outcome::Forward(Egress::Host);
        }
    }

    /// Whether packets of a direction, which goes to the host, are for a backend there, with a source of ours.
    fn is_backend_here(&self, id: FlowId, direction: Direction) -> bool {
        let record = self.flows.table.record(id);
        direction == Direction::Original && record.backend != 0 && record.flags & flags::SOURCE_NAT != 0
    }

    fn forward_to(
        &mut self,
        packet: &PacketContext,
        frame: &mut Frame<'_>,
        to: Option<&FlowKey>,
        hop: &Hop,
        out: &mut impl Output,
    ) -> Result<(), DropReason> {
        let header = &packet.header;
        // The host's kernel is the hop that its packets have behind them.
        let routed = frame.ingress != Ingress::Host;
        if routed && header.ttl <= 1 {
            self.answer(packet, frame, Answer::Error(Problem::TtlExpired), out);
            return Err(DropReason::TtlExpired);
        }
        let mtu = self.fragments.mtu(usize::from(hop.mtu), header.version);
        let fits = segment_bytes(frame, header) <= mtu;
        let may_split = frame.offload.gso_size == 0
            && (self.fragments.assembled.is_some()
                || (header.version == 4 && !dont_fragment(frame.packet())));
        if !fits && !may_split {
            self.answer(packet, frame, Answer::too_big(mtu), out);
            return Err(DropReason::TooBig);
        }
        if hop.failed {
            // The kernel is asked to look again all the same (RFC 1812 §5.2.7.1, RFC 4443 §3.1).
            self.answer(packet, frame, Answer::Error(Problem::HostUnreachable), out);
        }
        let way_back = self.routing.mtu_of(packet.ingress, packet.header.version == 4);
        let bytes = frame.packet_mut();
        if routed {
            rewrite::decrement_ttl(bytes)?;
        }
        // What is sent in answer to a SYN goes over both links (RFC 6691), and "packet too big" may never arrive
        // where it has to (RFC 2923 §2.1).
        clamp_mss(bytes, packet, hop.mtu.min(way_back));
        if let Some(to) = to {
            rewrite::rewrite(bytes, header, packet.partial, to)?;
        }
        self.went_on(header);
        if fits {
            if header.is_fragmented() {
                self.fragments.note_sent(packet, frame.packet());
            }
            address(frame, hop);
            return Ok(());
        }
        self.split(packet, frame, hop, mtu, out)
    }

    pub(super) fn went_on(&mut self, header: &IpHeader) {
        self.counters.tx_packets += 1;
        self.counters.tx_bytes += header.total_bytes as u64;
    }

    pub(super) fn give_to_host(&mut self, frame: &mut Frame<'_>, header: &IpHeader) {
        self.counters.to_host += 1;
        self.went_on(header);
        frame.outcome = self.routing.host(frame.ingress);
    }

    /// An ICMP error about a flow goes to the flow's end, translated inside and outside.
    pub(super) fn established_error(
        &mut self,
        packet: &PacketContext,
        frame: &mut Frame<'_>,
        (id, direction): (FlowId, Direction),
        out: &mut impl Output,
    ) -> Result<(), DropReason> {
        self.check_error(packet, frame, (id, direction))?;
        if self.flows.table.record(id).era != self.routing.era && !self.decide_again(packet.now_ns, id)? {
            return Err(DropReason::NatGone);
        }
        let header = &packet.header;
        let way = self.way(id, direction)?;
        let routed = frame.ingress != Ingress::Host && matches!(way, Way::Hop(_));
        if routed && header.ttl <= 1 {
            return Err(DropReason::TtlExpired);
        }
        let translated = self.translation(id, direction);
        self.unshift_quote(packet, frame, (id, direction));
        let record = self.flows.table.record(id);
        // An error travels against the packet that it is about.
        if record.protocol == TCP
            && let Some(seq) = quoted_sequence(header.payload(frame.packet()))?
            && !tcp::may_be_under_way(record, direction.flipped(), seq)
        {
            return Err(DropReason::IcmpInvalid);
        }
        let bytes = frame.packet_mut();
        if routed {
            rewrite::decrement_ttl(bytes)?;
        }
        if let Some(to) = translated {
            // The sender is a router on the way, or the flow's own end. What hides behind a source NAT stays hidden.
            let ((original, _), (reply, _)) = self.flows.table.keys(id);
            let hides = direction == Direction::Original && original.src != reply.dst;
            let end = if direction == Direction::Original { original.src } else { reply.src };
            let source = (hides || header.src == end).then_some(to.src);
            rewrite::rewrite_error(bytes, header, packet.partial, &to, source)?;
            if matches!(way, Way::Hairpin) {
                return self.enter_again(packet.now_ns, frame, &to, out);
            }
        }
        match way {
            Way::Host => {
                frame.outcome = self.routing.host(frame.ingress);
                self.give_back(frame, (id, direction));
            }
            Way::Hop(hop) => address(frame, &hop),
            // Only what is translated comes around.
            Way::Hairpin => return Err(DropReason::NoRoute),
        }
        self.went_on(header);
        Ok(())
    }

    /// The key that packets of a direction leave with, if they are translated.
    fn translation(&self, id: FlowId, direction: Direction) -> Option<FlowKey> {
        let table = &self.flows.table;
        table.is_translated(id).then(|| table.leaves_as(id, direction))
    }

    /// After a change: the firewall decides again, routes are looked up anew. A flow that has no route now waits for one.
    /// `false`: its translation does not hold any more ([`super::translation`]).
    pub(super) fn decide_again(&mut self, now_ns: u64, id: FlowId) -> Result<bool, DropReason> {
        self.counters.decided_again += 1;
        let (original, reply) = self.flows.table.keys(id);
        let (key, tenant) = original;
        let (egress, next, _) = self.route_of(id, Direction::Original)?;
        if self.is_lost(id, egress) {
            return Ok(false);
        }
        let policy = &self.routing.policy;
        let record = self.flows.table.record_mut(id);
        if !super::translation::holds(policy, record, &original, &reply, (egress, next)) {
            return Ok(false);
        }
        let translated = record.flags & flags::DEST_NAT != 0;
        let to_gateway = translated || policy.is_addressed(&key);
        let question = Question { key: &key, tenant, ingress: record.ingress(), egress, to_gateway };
        let verdict = policy.verdict(&question);
        if verdict.action != RuleAction::Allow {
            self.counters.flows_refused += 1;
            self.end(now_ns, id);
            return Err(if verdict.rule.is_some() { DropReason::RuleDrop } else { DropReason::DefaultDrop });
        }
        record.era = self.routing.era;
        record.rule = verdict.rule.map_or(0, |rule| rule + 1);
        record.next_hop = [next_hops::UNSET; 2];
        Ok(true)
    }

    /// Where packets of a direction go, looked up and remembered.
    fn way(&mut self, id: FlowId, direction: Direction) -> Result<Way, DropReason> {
        let number = self.flows.table.record(id).next_hop[direction as usize];
        if let Some(way) = self.routing.way(number) {
            return Ok(way);
        }
        let number = if self.routing.around(&self.flows.table.leaves_as(id, direction)).is_some() {
            next_hops::HAIRPIN
        } else {
            let target = self.target(id, direction)?;
            let hop = (target, self.flows.table.leaves_as(id, direction).dst.is_ipv4());
            match self.routing.number(hop) {
                next_hops::UNSET => return Ok(Way::Hop(self.routing.unnumbered(hop))),
                number => number,
            }
        };
        self.flows.table.record_mut(id).next_hop[direction as usize] = number;
        self.routing.way(number).ok_or(DropReason::NoRoute)
    }

    /// Where packets of a direction leave, as the routes are now.
    pub(super) fn target(&self, id: FlowId, direction: Direction) -> Result<Target, DropReason> {
        let target = self.route_of(id, direction)?;
        let lost = direction == Direction::Original && self.is_lost(id, target.0);
        if lost { Err(DropReason::NoRoute) } else { Ok(target) }
    }

    /// Whether nothing would translate the answers back: those to what the kernel passes on do not come by here.
    fn is_lost(&self, id: FlowId, egress: Egress) -> bool {
        egress == Egress::Kernel
            && self.flows.table.is_translated(id)
            && !self.is_backend_here(id, Direction::Original)
    }

    /// Where the routes lead packets of a direction.
    fn route_of(&self, id: FlowId, direction: Direction) -> Result<Target, DropReason> {
        let (routing, table) = (&self.routing, &self.flows.table);
        let ((original, tenant), (reply, reply_tenant)) = table.keys(id);
        let leaving = table.leaves_as(id, direction);
        let record = table.record(id);
        if direction == Direction::Reply {
            return routing.back(record.ingress(), &leaving, tenant);
        }
        let policy = &routing.policy;
        let mut query = RouteQuery {
            tenant,
            ingress: Some(record.ingress()),
            // Routes go by the source before it is translated.
            key: original.with_destination(leaving.dst, leaving.dst_port),
            before: super::translation::way_of_source(policy, record, &reply),
        };
        let translated = record.flags & flags::DEST_NAT != 0;
        match record.backend.checked_sub(1) {
            // Direct return: the packet keeps the address of the virtual server.
            Some(backend) if translated && record.flags & flags::ONE_WAY != 0 => {
                let backend = policy.balancer.backend_ref(backend).ok_or(DropReason::NoRoute)?;
                query.key.dst = backend.address.ip();
                return Ok((policy.route(&query)?.egress, query.key.dst, u16::MAX));
            }
            // A forward, or an inside endpoint that is mapped, may be of another tenant than who asks for it.
            None if translated => {
                query.tenant = match policy.server_or_forward(&original) {
                    Some(Service::Forward(forward)) => forward.tenant,
                    _ => reply_tenant,
                };
            }
            Some(_) | None => {}
        }
        routing.egress(&leaving, &query)
    }
}

/// Sequence number of the TCP segment that an ICMP error quotes.
///
/// # Errors
/// [`DropReason::IcmpInvalid`]: less than 8 bytes of the segment are there (RFC 792).
fn quoted_sequence(message: &[u8]) -> Result<Option<u32>, DropReason> {
    let quote = message.get(icmp::HEADER_BYTES..).unwrap_or_default();
    let inner = IpHeader::parse_quoted(quote).map_err(|_| DropReason::IcmpInvalid)?;
    if inner.fragment.is_some_and(|fragment| fragment.offset > 0) {
        // There is no number; that the fragment was sent is known.
        return Ok(None);
    }
    let inner = inner.of_first_fragment(quote).ok_or(DropReason::IcmpInvalid)?;
    u32_at(quote, inner.header_bytes + 4).map(Some).ok_or(DropReason::IcmpInvalid)
}

/// A backend's answer may have the id that clients will use.
#[cold]
fn learn_id(policy: &Policy, packet: &PacketContext, frame: &Frame<'_>, record: &mut Record) {
    let Some(backend) = record.backend.checked_sub(1) else { return };
    let datagram = packet.datagram(frame);
    if !policy.balancer.learn_connection_id(backend, datagram, packet.now_ns) {
        record.flags &= !flags::LEARNS_IDS;
    }
}

/// Whether nothing but late packets is expected. Of one that is seen in one direction only the client's FIN is the last that
/// can be known.
#[inline]
pub(super) fn is_over(record: &Record) -> bool {
    let state = State::of(record);
    state.is_over() || (state == State::FinOriginal && record.flags & flags::ONE_WAY != 0)
}

/// A connection to a backend that is over is not a live one any more, long before its flow is forgotten.
#[inline]
pub(super) fn note_end(policy: &Policy, record: &Record, was_over: bool) {
    let over = is_over(record);
    if over != was_over
        && let Some(backend) = record.backend.checked_sub(1)
    {
        policy.balancer.set_over(backend, over);
    }
}

/// Lowers the MSS of a SYN to what fits an MTU.
#[inline]
fn clamp_mss(bytes: &mut [u8], packet: &PacketContext, mtu: u16) {
    let header = &packet.header;
    if header.protocol == TCP && header.payload(bytes).get(13).is_some_and(|flags| flags & SYN != 0) {
        mss_clamp(bytes, mtu, packet.partial);
    }
}

/// Writes the Ethernet header and says where the frame goes.
#[inline]
pub(super) fn address(frame: &mut Frame<'_>, hop: &Hop) {
    if let Some(ethernet) = frame.bytes.first_chunk_mut::<{ super::ETHERNET_BYTES }>() {
        *ethernet = hop.ethernet;
    }
    frame.outcome = hop.outcome;
}

/// Bytes of the largest IP packet that the frame becomes on the wire.
fn segment_bytes(frame: &Frame<'_>, header: &IpHeader) -> usize {
    match usize::from(frame.offload.gso_size) {
        0 => header.total_bytes,
        size => {
            let upper = header.payload(frame.packet());
            let transport = if header.protocol == TCP {
                upper.get(12).map_or(20, |at| usize::from(at >> 4) * 4)
            } else {
                8
            };
            header.header_bytes + transport + size
        }
    }
}

fn dont_fragment(packet: &[u8]) -> bool {
    packet.get(6).is_some_and(|flags| flags & 0x40 != 0)
}
