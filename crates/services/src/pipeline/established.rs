//! The fast path: a packet of a known flow.

use super::{Services, Direction, Frame, Origin, Outcome, Output, is_partial, tick_of};
use crate::pipeline::next_hops::{self, Hop};
use crate::flow::{FlowId, Record, flags};
use crate::policy::{Policy, Service};
use crate::rewrite;
use crate::rules::Question;
use crate::spec::{RuleAction, TCP};
use crate::tcp::{self, Segment, State, Verdict};
use std::net::IpAddr;

use packet::DropReason;
use packet::attachment::{Egress, Ingress};
use packet::flow::FlowKey;
use packet::ip::{IpHeader, PROTOCOL_ICMP, PROTOCOL_ICMPV6};

impl Services {
    /// Follows the flow's state and sends the packet on.
    pub(super) fn established(
        &mut self,
        now_ns: u64,
        frame: &mut Frame<'_>,
        id: FlowId,
        direction: Direction,
        origin: Origin,
        out: &mut impl Output,
    ) -> Result<(), DropReason> {
        let header = IpHeader::parse(frame.packet())?;
        if matches!(header.protocol, PROTOCOL_ICMP | PROTOCOL_ICMPV6) && is_error(&header, frame.packet()) {
            return self.established_error(now_ns, frame, &header, id, direction, out);
        }
        let Some(mut flow) = self.flows.for_packet(id, direction) else { return Err(DropReason::NotNew) };
        if flow.record.era != self.era {
            self.decide_again(now_ns, id)?;
            let Some(again) = self.flows.for_packet(id, direction) else { return Err(DropReason::NotNew) };
            flow = again;
        }
        let was = is_embryonic(flow.record);
        if flow.record.flags & flags::PROXY_PROTOCOL != 0 {
            return self.established_proxied(now_ns, frame, &header, id, direction, origin, out);
        }
        if header.protocol == TCP {
            let segment = Segment::of(header.payload(frame.packet())).ok_or(DropReason::TcpInvalid)?;
            let was_over = is_over(flow.record);
            let verdict = tcp::follow(flow.record, direction, &segment);
            note_end(&self.policy, flow.record, was_over);
            self.embryonic = embryonic_after(self.embryonic, was, is_embryonic(flow.record));
            match verdict {
                Verdict::Accept => {}
                // What may be forged must not keep a connection alive.
                Verdict::Pass => return self.forward(now_ns, frame, &header, id, direction, out),
                Verdict::Invalid => return Err(DropReason::TcpInvalid),
                Verdict::Reopen => {
                    let ((key, tenant), _) = self.flows.keys(id);
                    self.end(now_ns, id);
                    self.new_flow(now_ns, frame, &key, tenant, origin, out);
                    return Ok(());
                }
            }
        }
        flow.count(header.total_bytes as u32);
        flow.record.seen = tick_of(now_ns);
        if direction == Direction::Reply || tcp::is_answered_unseen(flow.record) {
            let was = is_embryonic(flow.record);
            flow.record.flags |= flags::REPLIED;
            self.embryonic = embryonic_after(self.embryonic, was, is_embryonic(flow.record));
        }
        let (flags, number) = (flow.record.flags, flow.record.next_hop[direction as usize]);
        let to = flow.leaves_as.map(|ends| ends.key(header.protocol));
        if origin != Origin::Wire && direction == Direction::Reply {
            self.handed_reply(id, flags);
        }
        frame.flow = Some((id, direction));
        match self.hops.get(number).copied() {
            Some(hop) => self.forward_to(now_ns, frame, &header, to.as_ref(), &hop, out),
            None => self.forward(now_ns, frame, &header, id, direction, out),
        }
    }

    /// A reply that another core read. Right if the table names this core, now or before its bucket moved: then only the
    /// kernel did not know. Wrong if the port was chosen so that the hash names another.
    #[cold]
    fn handed_reply(&mut self, id: FlowId, flags: u16) {
        const OURS: u16 = flags::SOURCE_NAT;
        if flags & (OURS | flags::MAPPED) != OURS {
            return;
        }
        let (_, (reply, tenant)) = self.flows.keys(id);
        let bucket = self.ownership.bucket(&reply, tenant);
        let table = &self.ownership.table;
        let own = u16::from(self.id);
        if table.owner(bucket) != own && !table.chain(bucket).contains(&own) {
            self.counters.replies_on_wrong_core += 1;
        }
    }

    /// Time, first reply, counters of a fragment that goes on by itself.
    pub(super) fn seen(&mut self, now_ns: u64, id: FlowId, direction: Direction, bytes: usize) {
        self.flows.account(id, direction, 1, bytes as u32);
        let record = self.flows.record_mut(id);
        record.seen = tick_of(now_ns);
        if record.flags & flags::REPLIED == 0
            && (direction == Direction::Reply || tcp::is_answered_unseen(record))
        {
            let was = is_embryonic(record);
            record.flags |= flags::REPLIED;
            self.embryonic = embryonic_after(self.embryonic, was, is_embryonic(record));
        }
    }

    /// Translates and addresses a packet of a flow.
    pub(super) fn forward(
        &mut self,
        now_ns: u64,
        frame: &mut Frame<'_>,
        header: &IpHeader,
        id: FlowId,
        direction: Direction,
        out: &mut impl Output,
    ) -> Result<(), DropReason> {
        let way = self.way(id, direction)?;
        frame.flow = Some((id, direction));
        let to = self.flows.is_translated(id).then(|| self.flows.leaves_as(id, direction));
        if let Way::Hop(hop) = way {
            return self.forward_to(now_ns, frame, header, to.as_ref(), &hop, out);
        }
        if matches!(way, Way::Hairpin) {
            self.may_hairpin(now_ns, frame, header, out)?;
        }
        let partial = is_partial(&frame.offload);
        let packet = frame.bytes.get_mut(super::ETHERNET_BYTES..).unwrap_or_default();
        if let Some(to) = &to {
            rewrite::rewrite(packet, header, partial, to)?;
            if matches!(way, Way::Hairpin) {
                return self.enter_again(now_ns, frame, to, out);
            }
        }
        self.counters.to_host += 1;
        frame.outcome = Outcome::Forward(Egress::Host);
        self.went_on(header);
        Ok(())
    }

    fn forward_to(
        &mut self,
        now_ns: u64,
        frame: &mut Frame<'_>,
        header: &IpHeader,
        to: Option<&FlowKey>,
        hop: &Hop,
        out: &mut impl Output,
    ) -> Result<(), DropReason> {
        // The host's kernel is the hop that its packets have behind them.
        let routed = frame.ingress != Ingress::Host;
        if routed && header.ttl <= 1 {
            self.answer_time_exceeded(now_ns, frame, out);
            return Err(DropReason::TtlExpired);
        }
        let mtu = usize::from(hop.mtu);
        let fits = segment_bytes(frame, header) <= mtu;
        let may_split = frame.offload.gso_size == 0
            && (self.assembled_id.is_some() || (header.version == 4 && !dont_fragment(frame.packet())));
        if !fits && !may_split {
            self.answer_too_big(now_ns, frame, mtu, out);
            return Err(DropReason::TooBig);
        }
        let partial = is_partial(&frame.offload);
        let packet = frame.bytes.get_mut(super::ETHERNET_BYTES..).unwrap_or_default();
        if routed {
            rewrite::decrement_ttl(packet)?;
        }
        if let Some(to) = to {
            rewrite::rewrite(packet, header, partial, to)?;
        }
        self.went_on(header);
        if fits {
            address(frame, hop);
            return Ok(());
        }
        self.split(frame, hop, mtu, out)
    }

    pub(super) fn went_on(&mut self, header: &IpHeader) {
        self.counters.tx_packets += 1;
        self.counters.tx_bytes += header.total_bytes as u64;
    }

    /// An ICMP error about a flow goes to the flow's end, translated inside and outside.
    fn established_error(
        &mut self,
        now_ns: u64,
        frame: &mut Frame<'_>,
        header: &IpHeader,
        id: FlowId,
        direction: Direction,
        out: &mut impl Output,
    ) -> Result<(), DropReason> {
        if self.flows.record(id).era != self.era {
            self.decide_again(now_ns, id)?;
        }
        let way = self.way(id, direction)?;
        let routed = frame.ingress != Ingress::Host && matches!(way, Way::Hop(_));
        if routed && header.ttl <= 1 {
            return Err(DropReason::TtlExpired);
        }
        let translated = self.flows.is_translated(id).then(|| self.flows.leaves_as(id, direction));
        self.unshift_quote(frame, header, id, direction);
        let partial = is_partial(&frame.offload);
        let packet = frame.bytes.get_mut(super::ETHERNET_BYTES..).unwrap_or_default();
        if routed {
            rewrite::decrement_ttl(packet)?;
        }
        if let Some(to) = translated {
            // The sender is a router on the way, or the flow's own end. What hides behind a source NAT stays hidden.
            let ((original, _), (reply, _)) = self.flows.keys(id);
            let hides = direction == Direction::Original && original.src != reply.dst;
            let end = if direction == Direction::Original { original.src } else { reply.src };
            let source = (hides || header.src == end).then_some(to.src);
            rewrite::rewrite_error(packet, header, partial, &to, source)?;
            if matches!(way, Way::Hairpin) {
                return self.enter_again(now_ns, frame, &to, out);
            }
        }
        match way {
            Way::Host => frame.outcome = Outcome::Forward(Egress::Host),
            Way::Hop(hop) => address(frame, &hop),
            // Only what is translated comes around.
            Way::Hairpin => return Err(DropReason::NoRoute),
        }
        self.went_on(header);
        Ok(())
    }

    /// After a reload: the firewall decides again, translation stays, routes are looked up anew. A flow that has no
    /// route now waits for one.
    fn decide_again(&mut self, now_ns: u64, id: FlowId) -> Result<(), DropReason> {
        self.counters.decided_again += 1;
        let ((key, tenant), _) = self.flows.keys(id);
        let policy = std::sync::Arc::clone(&self.policy);
        let (egress, _) = self.target(id, Direction::Original).ok_or(DropReason::NoRoute)?;
        let record = self.flows.record(id);
        let translated = record.flags & flags::DEST_NAT != 0;
        let to_gateway = translated || policy.is_addressed(&key);
        let question = Question { key: &key, tenant, ingress: record.ingress(), egress, to_gateway };
        let verdict = policy.verdict(&question);
        if verdict.action != RuleAction::Allow {
            self.counters.flows_refused += 1;
            self.end(now_ns, id);
            return Err(if verdict.rule.is_some() { DropReason::RuleDrop } else { DropReason::DefaultDrop });
        }
        let era = self.era;
        let record = self.flows.record_mut(id);
        record.era = era;
        record.rule = verdict.rule.map_or(0, |rule| rule + 1);
        record.next_hop = [next_hops::UNSET; 2];
        Ok(())
    }

    /// Where packets of a direction go, looked up and remembered.
    pub(super) fn way(&mut self, id: FlowId, direction: Direction) -> Result<Way, DropReason> {
        let number = self.flows.record(id).next_hop[direction as usize];
        if let Some(way) = self.numbered(number) {
            return Ok(way);
        }
        let number = if self.around(&self.flows.leaves_as(id, direction)).is_some() {
            next_hops::HAIRPIN
        } else {
            let (egress, neighbor) = self.target(id, direction).ok_or(DropReason::NoRoute)?;
            match self.hops.number(egress, neighbor, &self.policy, &self.neighbors) {
                next_hops::UNSET => {
                    let hop = next_hops::Hops::unnumbered(egress, neighbor, &self.policy, &self.neighbors);
                    return Ok(Way::Hop(hop));
                }
                number => number,
            }
        };
        self.flows.record_mut(id).next_hop[direction as usize] = number;
        self.numbered(number).ok_or(DropReason::NoRoute)
    }

    fn numbered(&self, number: u16) -> Option<Way> {
        match number {
            next_hops::UNSET => None,
            next_hops::HOST => Some(Way::Host),
            next_hops::HAIRPIN => Some(Way::Hairpin),
            number => self.hops.get(number).copied().map(Way::Hop),
        }
    }

    /// Where packets of a direction leave and to which neighbor, as the routes are now.
    pub(super) fn target(&self, id: FlowId, direction: Direction) -> Option<(Egress, IpAddr)> {
        let ((original, tenant), (_, reply_tenant)) = self.flows.keys(id);
        let leaving = self.flows.leaves_as(id, direction);
        let record = self.flows.record(id);
        if direction == Direction::Reply {
            return self.back(record.ingress(), &leaving, tenant);
        }
        let translated = record.flags & flags::DEST_NAT != 0;
        match record.backend.checked_sub(1) {
            // Direct return: the packet keeps the address of the virtual server.
            Some(backend) if translated && record.flags & flags::ONE_WAY != 0 => {
                let address = self.policy.balancer.backend_ref(backend)?.address.ip();
                let route = self.policy.fib.lookup(tenant, address)?;
                Some((route.egress, address))
            }
            Some(_) => self.egress(&leaving, tenant),
            // A forward, or an inside endpoint that is mapped, may be of another tenant than who asks for it.
            None if translated => {
                let tenant = match self.policy.server_or_forward(&original) {
                    Some(Service::Forward(forward)) => forward.tenant,
                    _ => reply_tenant,
                };
                self.egress(&leaving, tenant)
            }
            None => self.egress(&leaving, tenant),
        }
    }

    /// Where a reply goes: by what the question came, if that is still there and leads to its sender.
    fn back(&self, ingress: Ingress, leaving: &FlowKey, tenant: u16) -> Option<(Egress, IpAddr)> {
        match ingress {
            _ if self.around(leaving).is_some() => {}
            Ingress::Host => return Some((Egress::Host, leaving.dst)),
            Ingress::Bond(id) if self.policy.peer(id).is_some() => {
                return Some((Egress::Bond(id), leaving.dst));
            }
            Ingress::Interface(_) => {
                let by_route = self.egress(leaving, tenant)?;
                let came = Egress::from(ingress);
                if by_route.0 == came || by_route.0 == Egress::Host {
                    return Some(by_route);
                }
                let back = self.policy.fib.lookup_by(tenant, leaving.dst, came);
                return Some(back.map_or(by_route, |route| (came, route.via.unwrap_or(leaving.dst))));
            }
            Ingress::Bond(_) => {}
        }
        self.egress(leaving, tenant)
    }

    /// Where a leaving packet goes, and to which neighbor.
    fn egress(&self, leaving: &FlowKey, tenant: u16) -> Option<(Egress, IpAddr)> {
        if let Some(interface) = self.around(leaving) {
            return Some((Egress::Interface(interface), leaving.dst));
        }
        if self.policy.is_own(leaving.dst) {
            return Some((Egress::Host, leaving.dst));
        }
        let route = self.policy.fib.lookup(tenant, leaving.dst)?;
        Some((route.egress, route.via.unwrap_or(leaving.dst)))
    }
}

/// Where a packet of a flow goes.
#[derive(Clone, Copy)]
pub(super) enum Way {
    /// To a neighbor, or into a bond.
    Hop(Hop),
    /// To the host's own stack.
    Host,
    /// In again, from outside.
    Hairpin,
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

/// Whether nobody has proved yet that the flow is wanted: no reply, or a TCP handshake that is not complete. Such flows
/// have their own limit and go first when there is no room.
#[inline]
pub(super) fn is_embryonic(record: &Record) -> bool {
    let opening = || matches!(State::of(record), State::SynSent | State::SynSentBoth | State::SynReceived);
    record.flags & flags::REPLIED == 0 || (record.protocol == TCP && opening())
}

/// The count of such flows after one of them changed. A connection that its ends begin anew is one again.
#[inline]
pub(super) const fn embryonic_after(count: u32, was: bool, is: bool) -> u32 {
    match (was, is) {
        (true, false) => count.saturating_sub(1),
        (false, true) => count.saturating_add(1),
        _ => count,
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

/// An ICMP error, whose flow key is the quoted packet's.
pub(super) fn is_error(header: &IpHeader, packet: &[u8]) -> bool {
    let kind = header.payload(packet).first().copied();
    match header.protocol {
        PROTOCOL_ICMP if header.version == 4 => matches!(kind, Some(3 | 4 | 5 | 11 | 12)),
        PROTOCOL_ICMPV6 if header.version == 6 => matches!(kind, Some(1..=4)),
        _ => false,
    }
}
