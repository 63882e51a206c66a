//! The way of a flow's packets through the cluster, found by a packet that asks for it (`anabranch cluster trace`).
//!
//! A dispatcher sends a packet of the flow to where its packets go, as a question; each unit hands it on as it would hand on
//! such a packet, and notes itself in the route; the one that would process it answers. Nothing is processed and nothing
//! changes: no flow begins.

use cluster::encapsulation::outer::parse_outer;
use cluster::encapsulation::trace::{Trace, TraceStage, Verdict};
use cluster::encapsulation::{Encapsulation, Handoff, Route};
use packet::attachment::{BondId, Ingress, InterfaceId};
use packet::ip::{IPV4_HEADER_BYTES, IPV6_HEADER_BYTES};
use packet::vnet::VirtioNetHeader;
use packet::{DropReason, FlowKey, PacketBuf, PacketPool, checksum, icmp, put_u16};
use services::Services;
use services::pipeline::ETHERNET_BYTES;
use services::policy::Policy;
use services::steer;
use steering::units::{Answer, Target};

use crate::units::Cluster;

/// Answers that wait to be taken; the oldest is forgotten.
const ANSWERS_MAX: usize = 64;
/// Bytes of a question behind its IP header: ports, or an ICMP query's head.
const UPPER_BYTES: usize = 8;

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traced {
    /// Units in the order in which the question was there, the dispatcher first; the first ones only, when there were more
    /// than the route has room for.
    pub route: Vec<u16>,
    /// The answer of the last unit.
    pub trace: Trace,
}

impl Cluster {
    /// Asks for the way of a flow's packets that come in by a shared interface. An answer with this number comes to some core.
    ///
    /// # Errors
    /// [`DropReason::UnitStandby`]: this dispatcher does not have the interface. [`DropReason::UnitUnknown`]: it is not shared, or
    /// there is no data plane.
    pub(crate) fn ask_way(
        &self,
        (policy, key, id): (&Policy, &FlowKey, u32),
        interface: InterfaceId,
        pool: &mut PacketPool,
        send: &mut impl FnMut(BondId, Option<&FlowKey>, PacketBuf) -> Option<PacketBuf>,
    ) -> Result<(), DropReason> {
        let snapshot = self.snapshot.as_ref().filter(|snapshot| snapshot.role.dispatches());
        let snapshot = snapshot.ok_or(DropReason::UnitUnknown)?;
        let ifid = snapshot.ifid(interface).ok_or(DropReason::UnitUnknown)?;
        if !self.is_active(interface) {
            return Err(DropReason::UnitStandby);
        }
        let key = steer::unit_key(policy, key);
        let Target { unit, visit } = snapshot.units.dispatch(&key);
        let mut head = Encapsulation {
            handoff: Handoff::Trace,
            table: TraceStage::Asked(visit.arrival).number(),
            route: Some(Route::default()),
            ..Encapsulation::of_visit(unit, ifid, &visit)
        };
        head.record(snapshot.units.node);
        let mut frame = question(&key).ok_or(DropReason::IpMalformed)?;
        Trace { id, ..Trace::default() }.write(&mut frame);
        self.encapsulate(snapshot, head, (&VirtioNetHeader::default(), &frame), Some(&key), pool, send)
    }

    /// Acts on a question or an answer that another unit sent here. `core`: this one.
    ///
    /// # Errors
    /// Of packets that are neither.
    pub(crate) fn traced(
        &self,
        (services, core): (Option<&Services>, u8),
        ingress: Ingress,
        packet: &[u8],
        pool: &mut PacketPool,
        send: &mut impl FnMut(BondId, Option<&FlowKey>, PacketBuf) -> Option<PacketBuf>,
    ) -> Result<(), DropReason> {
        let snapshot = self.snapshot.as_ref().ok_or(DropReason::UnitUnknown)?;
        let (_, payload) = parse_outer(packet)?.ok_or(DropReason::BusMalformed)?;
        let (head, frame) = Encapsulation::parse(payload)?;
        let trace = Trace::parse(frame).ok_or(DropReason::BusMalformed)?;
        let route = head.route.ok_or(DropReason::BusMalformed)?;
        let arrival = match TraceStage::of(head.table).ok_or(DropReason::BusMalformed)? {
            TraceStage::Asked(arrival) if snapshot.role.owns_flows() => arrival,
            TraceStage::Answered if head.dispatcher == snapshot.units.node => {
                let mut answers = self.traced.borrow_mut();
                if answers.len() == ANSWERS_MAX {
                    answers.remove(0);
                }
                answers.push(Traced { route: route.ids().to_vec(), trace });
                return Ok(());
            }
            _ => return Err(DropReason::BusUnknownHandoff),
        };
        let services = services.ok_or(DropReason::NoRoute)?;
        let key = FlowKey::of(frame.get(ETHERNET_BYTES..).unwrap_or_default())?;
        let mut next = head;
        next.record(snapshot.units.node);
        let mut frame = frame.to_vec();
        let verdict = match services.would(&key, ingress, &head.visit_as(arrival)) {
            None => Verdict::HasFlow,
            Some(Answer::Begin) => Verdict::Begins,
            Some(Answer::TooOften) => Verdict::TooOften,
            Some(Answer::EraUnknown) => Verdict::EraUnknown,
            Some(Answer::Send(Target { unit, visit })) => {
                let stage = TraceStage::Asked(visit.arrival).number();
                let next = Encapsulation {
                    target: unit,
                    table: stage,
                    ttl: visit.ttl,
                    odd_era: visit.odd_era,
                    ..next
                };
                let what = (&VirtioNetHeader::default(), &frame[..]);
                return self.encapsulate(snapshot, next, what, Some(&key), pool, send);
            }
        };
        let bucket = snapshot.units.bucket(&steer::unit_key(services.policy(), &key));
        let answer = Trace {
            verdict,
            core,
            bucket: u16::try_from(bucket).unwrap_or(u16::MAX),
            era: snapshot.units.in_force,
            ..trace
        };
        answer.write(&mut frame);
        let next = Encapsulation { target: head.dispatcher, table: TraceStage::Answered.number(), ..next };
        self.encapsulate(snapshot, next, (&VirtioNetHeader::default(), &frame), Some(&key), pool, send)
    }
}

/// A frame with a packet of a flow, without payload; `None`: its addresses are of two families.
fn question(key: &FlowKey) -> Option<Vec<u8>> {
    use std::net::IpAddr::{V4, V6};
    let mut packet;
    let upper;
    match (key.src, key.dst) {
        (V4(src), V4(dst)) => {
            upper = IPV4_HEADER_BYTES;
            packet = vec![0; upper + UPPER_BYTES];
            packet.get_mut(..10)?.copy_from_slice(&[0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, key.protocol]);
            let length = u16::try_from(packet.len()).ok()?;
            put_u16(&mut packet, 2, length);
            packet.get_mut(12..16)?.copy_from_slice(&src.octets());
            packet.get_mut(16..20)?.copy_from_slice(&dst.octets());
            let sum = checksum::finish(checksum::sum(packet.get(..upper)?, 0));
            put_u16(&mut packet, 10, sum);
        }
        (V6(src), V6(dst)) => {
            upper = IPV6_HEADER_BYTES;
            packet = vec![0; upper + UPPER_BYTES];
            packet.get_mut(..8)?.copy_from_slice(&[0x60, 0, 0, 0, 0, UPPER_BYTES as u8, key.protocol, 64]);
            packet.get_mut(8..24)?.copy_from_slice(&src.octets());
            packet.get_mut(24..40)?.copy_from_slice(&dst.octets());
        }
        _ => return None,
    }
    if icmp::is_icmp(key.protocol) {
        // An echo request.
        *packet.get_mut(upper)? = if key.src.is_ipv4() { 8 } else { 128 };
        put_u16(&mut packet, upper + icmp::ID_OFFSET, key.sender_port());
    } else {
        put_u16(&mut packet, upper, key.src_port);
        put_u16(&mut packet, upper + 2, key.dst_port);
    }
    let mut frame = vec![0; ETHERNET_BYTES];
    put_u16(&mut frame, 12, if key.src.is_ipv4() { 0x0800 } else { 0x86dd });
    frame.extend(packet);
    Some(frame)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn a_question_is_a_packet_of_the_flow() {
        for text in [
            "tcp 10.0.0.5:1234 > 1.2.3.4:443",
            "udp [fd00::5]:1234 > [fd00::6]:53",
            "icmp 10.0.0.5 > 1.2.3.4 id 7",
            "icmpv6 fd00::5 > fd00::6 id 7",
        ] {
            let key: FlowKey = text.parse().unwrap();
            let frame = question(&key).unwrap();
            assert_eq!(FlowKey::of(&frame[ETHERNET_BYTES..]), Ok(key), "{text}");
        }
    }
}
