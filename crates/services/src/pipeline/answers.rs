//! Answers to senders: ICMP errors and resets, to where the packet came from, never more than the limit.

use std::net::IpAddr;

use packet::attachment::{Egress, Ingress};
use packet::vnet::VirtioNetHeader;
use packet::{DropReason, IpHeader};

use super::context::PacketContext;
use super::{ETHERNET_BYTES, Frame, Outcome, Output, Services};
use crate::icmp::{self, ANSWER_BYTES_MAX, Problem};
use crate::spec::TCP;

/// Answer to the sender of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// An ICMP error of the gateway.
    Error(Problem),
    /// An ICMP error as the destination would send it.
    ErrorOfDestination(Problem),
    /// A TCP reset as the destination would send it.
    Reset,
}

impl Answer {
    /// For a packet that does not fit the MTU where it has to leave.
    pub fn too_big(mtu: usize) -> Self {
        Self::Error(Problem::TooBig(u16::try_from(mtu).unwrap_or(u16::MAX)))
    }

    /// For a packet that a rule rejects: TCP gets a reset, everything else "administratively prohibited". So does TCP in
    /// fragments: how long the segment is, which a reset acknowledges, is not known.
    pub fn to_rejected(header: &IpHeader) -> Self {
        let resets = header.protocol == TCP && !header.is_fragmented();
        if resets { Self::Reset } else { Self::Error(Problem::Prohibited) }
    }

    /// For a packet whose flow could not be made: its sender is told what will not change by trying again at once.
    ///
    /// * A virtual server without a backend, or full: as a host would say that nobody listens, TCP by a reset and
    ///   everything else by "port unreachable" from the address that was asked. Clients go elsewhere at once.
    /// * No port or flow left for a client: "administratively prohibited" (RFC 5508 REQ-8), never a reset, which would
    ///   speak for a server that was not asked.
    /// * Full tables of this core: nothing. That happens in floods, whose senders did not send.
    pub fn to_failed(reason: DropReason, header: &IpHeader) -> Option<Self> {
        let resets = header.protocol == TCP && !header.is_fragmented();
        match reason {
            DropReason::NoBackend | DropReason::ServerFull if resets => Some(Self::Reset),
            DropReason::NoBackend | DropReason::ServerFull => {
                Some(Self::ErrorOfDestination(Problem::PortUnreachable))
            }
            DropReason::NatPortsExhausted | DropReason::FlowsPerClient => {
                Some(Self::Error(Problem::Prohibited))
            }
            _ => None,
        }
    }

    /// For a packet that no route takes on (RFC 1812 §5.2.7.1, RFC 4443 §3.1).
    fn to_unrouted(reason: DropReason) -> Option<Self> {
        match reason {
            DropReason::NoRoute => Some(Self::Error(Problem::NoRoute)),
            DropReason::RouteUnreachable => Some(Self::Error(Problem::HostUnreachable)),
            DropReason::RouteProhibited => Some(Self::Error(Problem::Prohibited)),
            _ => None,
        }
    }

    /// Writes it; how long it is. `own`: this gateway's address on the sender's side.
    fn write(
        self,
        packet: &PacketContext,
        bytes: &[u8],
        own: Option<IpAddr>,
        out: &mut [u8],
    ) -> Option<usize> {
        let header = &packet.header;
        match self {
            Self::Reset => icmp::reset(out, bytes, header, packet.partial),
            Self::Error(problem) => icmp::error(out, bytes, header, problem, own?),
            Self::ErrorOfDestination(problem) => icmp::error(out, bytes, header, problem, header.dst),
        }
    }
}

impl Services {
    /// Tells the sender of a packet that was dropped for this reason, if no route took it on. Who comes in where hosts
    /// hide behind a NAT learns nothing about the inside.
    pub(super) fn tell_of_route(
        &mut self,
        packet: &PacketContext,
        frame: &Frame<'_>,
        reason: DropReason,
        out: &mut impl Output,
    ) {
        let from_outside = self.routing.policy.hides_inside(packet.ingress.interface());
        if let Some(answer) = Answer::to_unrouted(reason).filter(|_| !from_outside) {
            self.answer(packet, frame, answer, out);
        }
    }

    /// Answers a packet that goes no further, if the limit allows it.
    pub(super) fn answer(
        &mut self,
        packet: &PacketContext,
        frame: &Frame<'_>,
        answer: Answer,
        out: &mut impl Output,
    ) {
        let own = self.routing.policy.address_of(packet.ingress, packet.header.src);
        let from_nowhere = matches!(answer, Answer::Error(_)) && own.is_none();
        let too_big = matches!(answer, Answer::Error(Problem::TooBig(_)));
        let may = icmp::may_answer(frame.packet(), &packet.header, too_big);
        let limiter = if too_big { &mut self.too_big_limiter } else { &mut self.limiter };
        if from_nowhere || !may || !limiter.allow(packet.now_ns) {
            return;
        }
        let mut bytes = [0; ETHERNET_BYTES + ANSWER_BYTES_MAX];
        let room = bytes.get_mut(ETHERNET_BYTES..).unwrap_or_default();
        let Some(length) = answer.write(packet, frame.packet(), own, room) else { return };
        let Some(bytes) = bytes.get_mut(..ETHERNET_BYTES + length) else { return };
        let Some(outcome) = self.address_back(packet, frame, bytes) else { return };
        self.counters.answers += 1;
        out.emit(outcome, None, &VirtioNetHeader::default(), bytes);
    }

    /// Writes the Ethernet header of an answer, to the hardware address that the packet came from; where it leaves. A packet
    /// that was held or handed over has no such address any more: its answer goes the way to its sender. `None`: nobody
    /// is answered, since it came to a group of hosts (RFC 1812 §4.3.2.7) or leads nowhere but to ourselves.
    pub(super) fn address_back(
        &self,
        packet: &PacketContext,
        frame: &Frame<'_>,
        answer: &mut [u8],
    ) -> Option<Outcome> {
        let egress = Egress::from(packet.ingress);
        if !matches!(packet.ingress, Ingress::Interface(_)) {
            return Some(Outcome::Forward(egress));
        }
        let asked = frame.bytes.first_chunk::<ETHERNET_BYTES>()?;
        let ethernet = answer.first_chunk_mut::<ETHERNET_BYTES>()?;
        if asked.iter().any(|byte| *byte != 0) {
            let (to, rest) = ethernet.split_at_mut(6);
            to.copy_from_slice(&asked[6..12]);
            let (from, kind) = rest.split_at_mut(6);
            from.copy_from_slice(&asked[..6]);
            kind.copy_from_slice(&asked[12..]);
            return (asked[0] & 1 == 0).then_some(Outcome::Forward(egress));
        }
        let (routing, sender) = (&self.routing, packet.header.src);
        if routing.policy.is_own(sender) || routing.policy.nat.is_outside(sender) {
            return None;
        }
        let target = routing.back(packet.ingress, &packet.key.reversed(), packet.tenant).ok()?;
        let hop = routing.unnumbered((target, packet.key.src.is_ipv4()));
        *ethernet = hop.ethernet;
        matches!(egress, Egress::Interface(_) | Egress::Bond(_)).then_some(hop.outcome)
    }
}
