//! Two clients behind endpoint-independent mappings meet at their outside endpoints (RFC 4787 REQ-9 a).
//!
//! Each of them has to see the other's outside endpoint, and each endpoint belongs to a core of its own. So the packet is
//! translated twice, as if it left and came back: by a flow of its sender's core from the inside key to both outside
//! endpoints (`next_hops::HAIRPIN`), and by one of the other's core from there to the inside. Only the core of the destination
//! knows whether somebody is mapped there; it is asked first, and what nobody has is for the gateway itself. The
//! firewall judges both times.

use packet::DropReason;
use packet::attachment::{Ingress, InterfaceId};
use packet::flow::FlowKey;

use super::answers::Answer;
use super::context::PacketContext;
use super::{ETHERNET_BYTES, Frame, Origin, Outcome, Output, Services};
use crate::icmp::Problem;
use crate::nat::NatClient;
use crate::steer;

/// Relation of a new flow to a hairpin.
pub(super) enum Hairpin {
    /// Nothing.
    No,
    /// The sender's core has the packet now.
    HandedOver,
    /// The flow begins here and leads around by this interface.
    Begin(InterfaceId),
}

impl Services {
    /// At the core of the destination, or with its word for it.
    pub(super) fn hairpin(
        &mut self,
        packet: &PacketContext,
        frame: &mut Frame<'_>,
        out: &mut impl Output,
    ) -> Hairpin {
        let PacketContext { key, tenant, ingress, origin, .. } = packet;
        let (policy, own) = (&self.routing.policy, self.routing.core);
        let Some(interface) = policy.hairpin_out(key, *tenant, *ingress) else { return Hairpin::No };
        let owners = steer::endpoint_owners(&self.routing.ownership, key, *tenant);
        let cores = owners.cores();
        let mut asked = 0;
        if *origin == Origin::MappingConfirmed {
            // Those before this one have no mapping of the sender. By another table than theirs it may be none of them.
            asked = cores.iter().position(|core| *core == own).unwrap_or(cores.len());
        } else if self.nat.inbound(key, policy.tenant_of(Ingress::Interface(interface))).is_none() {
            return Hairpin::No;
        }
        let rule = policy.nat.rule_for_hairpin(key.dst, &NatClient::of(key, *tenant, *ingress));
        for core in cores.iter().skip(asked) {
            if *core != own {
                self.pass_on(frame, *core, Origin::MappingConfirmed, None, out);
                return Hairpin::HandedOver;
            }
            if rule.is_some_and(|rule| self.nat.has_mapping(key, *tenant, rule)) {
                break;
            }
        }
        Hairpin::Begin(interface)
    }

    /// A packet that was translated to `to`, between two outside endpoints, comes in again at the core of its destination.
    pub(super) fn enter_again(
        &mut self,
        now_ns: u64,
        frame: &mut Frame<'_>,
        to: &FlowKey,
        out: &mut impl Output,
    ) -> Result<(), DropReason> {
        let routing = &self.routing;
        let ingress = Ingress::Interface(routing.around(to).ok_or(DropReason::NatNoMapping)?);
        let core = routing.policy.nat.mapping_core_of(to, routing.ownership.cores);
        let core = core.ok_or(DropReason::NatNoMapping)?;
        // From here on nobody is answered by the frame that it came in.
        if let Some(ethernet) = frame.bytes.get_mut(..ETHERNET_BYTES) {
            ethernet.fill(0);
        }
        if core != routing.core {
            frame.ingress = ingress;
            self.pass_on(frame, core, Origin::Hairpin, None, out);
            return Ok(());
        }
        let mut bytes = frame.bytes.to_vec();
        let mut again = Frame::new(ingress, frame.offload, &mut bytes);
        frame.outcome = Outcome::Consumed;
        if let Some(mut look) = self.look(&mut again) {
            look.found = self.flows.table.find(look.hash, &look.key, look.tenant);
            self.act(now_ns, &mut again, &look, Origin::Hairpin, out);
        }
        self.settle(again, out);
        Ok(())
    }

    /// The time to live of what goes around is judged before, while its sender can be answered.
    pub(super) fn may_hairpin(
        &mut self,
        packet: &PacketContext,
        frame: &Frame<'_>,
        out: &mut impl Output,
    ) -> Result<(), DropReason> {
        if packet.header.ttl > 1 {
            return Ok(());
        }
        self.answer(packet, frame, Answer::Error(Problem::TtlExpired), out);
        Err(DropReason::TtlExpired)
    }
}
