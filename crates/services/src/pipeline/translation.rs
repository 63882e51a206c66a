//! Translation of live flows after a change: whether it still holds, and the end of those whose does not.
//!
//! Addresses, routes and NAT rules change while flows live. A flow whose packets would leave with a source that is not one of
//! where they leave, or untranslated where a new flow would be translated, gets no answers any more; its own packets
//! would keep it alive for ever. So does one whose port a program of the host has opened. So it ends with its next packet, and both ends learn it: TCP by a RST to the client,
//! everything else by beginning anew with the right source.

use std::net::IpAddr;

use packet::attachment::Egress;
use packet::ip::{IPV4_HEADER_BYTES, IPV6_HEADER_BYTES};
use packet::vnet::VirtioNetHeader;
use packet::{DropReason, IpHeader, checksum};

use super::answers::Answer;
use super::context::PacketContext;
use super::flows::TenantKey;
use super::{Direction, ETHERNET_BYTES, Frame, Output, Services};
use crate::flow::{FlowId, Record, flags};
use crate::nat::NatClient;
use crate::policy::Policy;
use crate::rewrite;
use crate::rewrite::bytes::{put, put_u16};
use crate::spec::{InterfaceSpec, NatMode, TCP, UDP};
use crate::tcp::{ACK, RST, SYN};

/// Longest IP header that is repeated in a RST, bytes.
const IP_HEADER_BYTES_MAX: usize = 60;
/// TCP header without options.
const TCP_HEADER_BYTES: usize = 20;

/// Whether the translation of a flow still is one that its packets can be answered with. By what its packets leave now, and their
/// next hop there.
pub(super) fn holds(
    policy: &Policy,
    record: &Record,
    (original, tenant): &TenantKey,
    (reply, _): &TenantKey,
    (egress, next): (Egress, IpAddr),
) -> bool {
    let is_ours = |address| policy.is_own(address) || policy.nat.is_outside(address);
    let has_source = record.flags & flags::SOURCE_NAT != 0;
    if record.flags & flags::DEST_NAT != 0 {
        // So may the port be to which a mapping of an endpoint led.
        let is_host = !has_source
            && record.flags & flags::MAPPED != 0
            && original.protocol == UDP
            && policy.is_held(UDP, original.dst, original.dst_port);
        let listens = !is_host && is_ours(original.dst) || policy.server_or_forward(original).is_some();
        // A port alone may be the gateway's, the address the client's own.
        return listens && (!has_source || reply.dst == original.src || is_ours(reply.dst));
    }
    // A program of the host has opened the port since, and the answers to it would come here; with a new port both get theirs.
    if has_source && original.protocol == UDP && policy.is_held(UDP, reply.dst, reply.dst_port) {
        return false;
    }
    // So would those to a tunnel of the host, and what it seals must not leave in the clear.
    if has_source
        && (policy.nat.is_hosts_tunnel(original.protocol, reply.dst, reply.src)
            || policy.spec.host.seals(&reply.reversed()))
    {
        return false;
    }
    // A reload breaks no flow: whatever became of its rule, answers to an address of the interface still arrive, and an
    // address that was taken from the configuration stays for the flows that have it.
    let is_kept = || {
        let of_nat = policy.nat.is_outside(reply.dst);
        let has = |interface: &InterfaceSpec| interface.addresses.iter().any(|net| net.addr() == reply.dst);
        let out = egress.interface().and_then(|id| policy.interface(id));
        out.is_some_and(has)
            || (policy.is_own(reply.dst) && !of_nat && !policy.spec.interfaces.iter().any(has))
    };
    let ingress = record.ingress();
    let rule = egress.interface().and_then(|_| {
        let client = NatClient::of(original, *tenant, ingress);
        policy.nat.rule_for(egress, &client).filter(|_| egress != Egress::from(ingress))
    });
    let known = rule.and_then(|rule| Some((rule, policy.spec.nats.get(usize::from(rule))?)));
    let Some((number, rule)) = known else {
        return !has_source || is_kept();
    };
    match rule.mode {
        // The router of another network does not send answers to this one's addresses.
        NatMode::AddressAndPort if !policy.nat.may_meet(number, reply.dst, next) => false,
        NatMode::AddressAndPort => has_source && (rule.addresses.contains(&reply.dst) || is_kept()),
        NatMode::PortOnly | NatMode::None => reply.dst == original.src || (has_source && is_kept()),
    }
}

/// The interface whose NAT gave a flow its source.
pub(super) fn way_of_source(policy: &Policy, record: &Record, reply: &packet::FlowKey) -> Option<Egress> {
    if record.flags & flags::SOURCE_NAT == 0 {
        return None;
    }
    let rule = policy.nat.rule_of_outside(reply.dst)?;
    policy.spec.nats.get(usize::from(rule))?.out.map(Egress::Interface)
}

impl Services {
    /// Ends a flow whose translation does not hold any more, with this packet of it.
    pub(super) fn translation_over(
        &mut self,
        packet: &PacketContext,
        frame: &mut Frame<'_>,
        (id, direction): (FlowId, Direction),
        out: &mut impl Output,
    ) -> Result<(), DropReason> {
        let from_client = direction == Direction::Original;
        if packet.header.protocol == TCP {
            let segment = packet.segment(frame)?;
            let opens = segment.flags & (SYN | ACK | RST) == SYN;
            if !(opens && from_client) {
                if from_client {
                    self.answer(packet, frame, Answer::Reset, out);
                } else if !segment.has(RST) {
                    self.reset_client(packet, frame, id, out);
                }
                self.end(packet.now_ns, id);
                return Err(DropReason::NatGone);
            }
        }
        if from_client {
            return self.reopen(packet, frame, (id, direction), out);
        }
        self.end(packet.now_ns, id);
        Err(DropReason::NatGone)
    }

    /// Sends the client a RST with the number that it expects next: that of this packet from its server.
    fn reset_client(
        &mut self,
        packet: &PacketContext,
        frame: &Frame<'_>,
        id: FlowId,
        out: &mut impl Output,
    ) -> Option<()> {
        let header = &packet.header;
        let target = self.target(id, Direction::Reply).ok()?;
        let to = self.flows.table.leaves_as(id, Direction::Reply);
        if !self.limiter.allow(packet.now_ns) {
            return None;
        }
        let mut buffer = [0; ETHERNET_BYTES + IP_HEADER_BYTES_MAX + TCP_HEADER_BYTES];
        let bytes = buffer.get_mut(..ETHERNET_BYTES + header.header_bytes + TCP_HEADER_BYTES)?;
        let reset = bytes.get_mut(ETHERNET_BYTES..)?;
        reset.copy_from_slice(frame.packet().get(..reset.len())?);
        into_reset(reset, header)?;
        rewrite::rewrite(reset, &IpHeader::parse(reset).ok()?, false, &to).ok()?;
        let (ethernet, outcome) = match self.routing.unnumbered((target, to.dst.is_ipv4())) {
            hop if matches!(target.0, Egress::Interface(_)) => (Some(hop.ethernet), hop.outcome),
            hop => (None, hop.outcome),
        };
        put(bytes, 0, ethernet.as_ref().map_or(&[], |ethernet| ethernet.as_slice()));
        self.counters.answers += 1;
        out.emit(outcome, Some(&to), &VirtioNetHeader::default(), bytes);
        Some(())
    }
}

/// Turns the beginning of a TCP segment into a RST with the same numbers: `bytes` is its IP header and the TCP header without
/// options.
fn into_reset(bytes: &mut [u8], header: &IpHeader) -> Option<()> {
    let length = bytes.len();
    if header.version == 4 {
        put_u16(bytes, 2, u16::try_from(length).ok()?);
        put_u16(bytes, 10, 0);
        let sum =
            checksum::finish(checksum::sum(bytes.get(..header.header_bytes.max(IPV4_HEADER_BYTES))?, 0));
        put_u16(bytes, 10, sum);
    } else {
        put_u16(bytes, 4, u16::try_from(length.checked_sub(IPV6_HEADER_BYTES)?).ok()?);
    }
    let tcp = bytes.get_mut(header.header_bytes..)?;
    // Offset and flags, no window, checksum, no urgent data.
    put(tcp, 12, &[5 << 4, RST | ACK, 0, 0, 0, 0, 0, 0]);
    let pseudo = checksum::pseudo_header(header.src, header.dst, TCP, tcp.len());
    let sum = checksum::finish(checksum::sum(tcp, pseudo));
    put_u16(tcp, 16, sum);
    Some(())
}
