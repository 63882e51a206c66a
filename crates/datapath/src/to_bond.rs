//! Packets that were decided for a bond: classified once more, as they leave, and given to the tunnel of this core.

use std::collections::BTreeMap;
use std::sync::Arc;

use packet::attachment::{BondId, Egress, Ingress};
use packet::vnet::VirtioNetHeader;
use packet::{DropCounters, FlowKey, PacketBuf, PacketPool};
use services::pipeline::{ETHERNET_BYTES, Frame, Outcome};
use steering::policy::Policy;
use tunnel::FlowDefinition;
use tunnel::class::Classes;
use tunnel::forwarder::{Delivered, Forwarder as Tunnel, Output as TunnelOutput, Target};
use tunnel::time::Time;

use crate::handed::Handed;
use crate::ports::{Output, leave};
use crate::units::Cluster;

/// Gives a packet to the tunnel of this core. `key`: its flow where the packet itself does not tell, as in a later
/// fragment.
pub(crate) fn send(
    tunnel: &mut Tunnel,
    now: Time,
    (bond, key): (BondId, Option<&FlowKey>),
    (offload, packet): (&VirtioNetHeader, &mut [u8]),
    drops: &mut DropCounters,
    out: &mut impl Output,
) {
    match tunnel.classify(packet, key) {
        Ok(classified) => {
            tunnel.packet(now, offload, packet, &classified.towards(bond), &mut Transmit(out));
        }
        Err(reason) => drops.add(reason),
    }
}

/// A way to send encapsulated packets to the bonds of other units: each goes to the tunnel of this core at once.
pub(crate) fn send_to<'a>(
    tunnel: &'a mut Tunnel,
    now: Time,
    out: &'a mut impl Output,
) -> impl FnMut(BondId, Option<&FlowKey>, PacketBuf) -> Option<PacketBuf> + 'a {
    move |bond, key, mut packet| {
        let offload = packet.offload;
        match tunnel.classify(packet.packet(), key) {
            Ok(classified) => {
                let classified = classified.towards(bond);
                tunnel.packet(now, &offload, packet.packet_mut(), &classified, &mut Transmit(out));
            }
            Err(reason) => out.dropped(reason),
        }
        Some(packet)
    }
}

/// The tunnel's output while it sends: nothing is delivered then.
pub(crate) struct Transmit<'a, O: Output>(pub &'a mut O);

impl<O: Output> TunnelOutput for Transmit<'_, O> {
    fn transmit(&mut self, target: &Target, segment: usize, datagrams: &[u8]) {
        self.0.transmit(target, segment, datagrams);
    }

    fn deliver(&mut self, _bond: usize, _packet: &[u8], _how: Delivered) {
        self.0.dropped(packet::DropReason::NoRoute);
    }
}

/// The services' output while the tunnel is free: what they make or held goes there at once.
pub(crate) struct Emit<'a, O: Output> {
    pub now: Time,
    pub tunnel: &'a mut Tunnel,
    pub drops: &'a mut DropCounters,
    pub pool: &'a mut PacketPool,
    pub cluster: &'a Cluster,
    pub out: &'a mut O,
}

impl<O: Output> Emit<'_, O> {
    /// Whether the frame was for another unit, or a shared interface of others.
    fn for_cluster(&mut self, frame: &Frame<'_>, key: Option<&FlowKey>) -> bool {
        let mut send = send_to(self.tunnel, self.now, self.out);
        match self.cluster.leave(frame, key, self.pool, &mut send) {
            Some(Ok(())) => true,
            Some(Err(reason)) => {
                self.drops.add(reason);
                true
            }
            None => false,
        }
    }
}

impl<O: Output> services::pipeline::Output for Emit<'_, O> {
    fn emit(&mut self, outcome: Outcome, key: Option<&FlowKey>, offload: &VirtioNetHeader, bytes: &mut [u8]) {
        match outcome {
            Outcome::Forward(Egress::Bond(bond)) if !self.cluster.is_hub_bond(bond) => {
                let packet = bytes.get_mut(ETHERNET_BYTES..).unwrap_or_default();
                send(self.tunnel, self.now, (bond, key), (offload, packet), self.drops, self.out);
            }
            Outcome::Forward(Egress::Interface(_) | Egress::Bond(_)) if self.cluster.is_member() => {
                let mut frame = Frame::new(Ingress::Host, *offload, bytes);
                frame.outcome = outcome;
                if self.for_cluster(&frame, key) {
                    return;
                }
                let Outcome::Forward(Egress::Bond(bond)) = outcome else {
                    return leave(self.out, outcome, offload, bytes);
                };
                let packet = bytes.get_mut(ETHERNET_BYTES..).unwrap_or_default();
                send(self.tunnel, self.now, (bond, key), (offload, packet), self.drops, self.out);
            }
            outcome => leave(self.out, outcome, offload, bytes),
        }
    }

    fn to_unit(&mut self, _: u16, frame: &Frame<'_>) {
        if !self.for_cluster(frame, None) {
            self.drops.add(packet::DropReason::UnitUnknown);
        }
    }

    fn hand_over(&mut self, core: u8, handed: services::pipeline::Handed) -> bool {
        self.out.hand_over(core, Handed::Service(handed))
    }

    fn buffers(&mut self) -> &mut PacketPool {
        self.pool
    }
}

/// Bonds as the tunnel numbers them, by slot, and as everybody else does.
#[derive(Debug, Default)]
pub struct BondIds {
    slots: Vec<BondId>,
    rules: BTreeMap<BondId, FlowRules>,
    /// Of what came by no bond.
    none: FlowRules,
}

/// By what the flows of a bond are told apart and given cores.
#[derive(Clone, Debug, Default)]
pub(crate) struct FlowRules {
    pub policy: Policy,
    pub flow: FlowDefinition,
    pub tenant: u16,
    /// Classes of what is sent there, and so of what comes from there.
    pub classes: Arc<Classes>,
}

impl BondIds {
    /// Follows the tunnel's list.
    pub fn follow(&mut self, tunnel: &Tunnel) {
        self.slots.clear();
        self.slots.extend(tunnel.bond_ids());
        self.rules.clear();
        for bond in tunnel.node().bonds.load().iter() {
            let peer = bond.peer.load();
            let classes = bond.classes();
            let rules = FlowRules { policy: peer.policy, flow: peer.flow, tenant: peer.tenant, classes };
            self.rules.insert(peer.id, rules);
        }
    }

    /// How flows that come in by a bond are told apart and given cores.
    pub(crate) fn rules(&self, ingress: Ingress) -> &FlowRules {
        let bond = if let Ingress::Bond(bond) = ingress { self.rules.get(&bond) } else { None };
        bond.unwrap_or(&self.none)
    }

    /// By what something came in that the bond in a slot delivered.
    #[must_use]
    pub fn ingress(&self, slot: usize) -> Ingress {
        Ingress::Bond(self.slots.get(slot).copied().unwrap_or(BondId(BondId::MAX)))
    }
}
