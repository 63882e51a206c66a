//! Delivery of a bond's packets: merged to super-packets, and decided while they are in the cache.
//!
//! The tunnel delivers while it works on a datagram, so that it cannot take anything for another bond in that moment:
//! such packets wait in [`ToBonds`] until it is done.

use cluster::encapsulation::{Handoff, Hook};
use packet::attachment::{BondId, Egress, Ingress, InterfaceId};
use packet::buffer::PACKET_BYTES_MAX;
use packet::vnet::VirtioNetHeader;
use packet::{Coalescer, DropReason, FlowKey, IpHeader, PacketBuf, PacketPool};
use services::Services;
use services::fragment::Rendezvous;
use services::pipeline::{ETHERNET_BYTES, Frame, Outcome};
use steering::ownership::Ownership;
use steering::symmetric::{FlowHasher, MIX_MULTIPLIER};
use tunnel::forwarder::{CoreWanted, Delivered, Output as TunnelOutput, Target};

use crate::era_wait::EraWait;
use crate::handed::Handed;
use crate::lan::CoreLan;
use crate::place::Placer;
use crate::ports::{Output, leave};
use crate::to_bond::BondIds;
use crate::units::{Arrived, Cluster, Inner};

/// Packets for bonds that wait until the tunnel is done with what it received; at most [`ToBonds::WAITING_MAX`].
#[derive(Debug, Default)]
pub struct ToBonds {
    pub(crate) waiting: Vec<(BondId, Option<FlowKey>, PacketBuf)>,
}

impl ToBonds {
    /// Most packets that wait: more than one receive batch delivers.
    pub const WAITING_MAX: usize = 1_024;

    fn push(&mut self, bond: BondId, key: Option<FlowKey>, packet: PacketBuf) -> bool {
        let room = self.waiting.len() < Self::WAITING_MAX;
        if room {
            self.waiting.push((bond, key, packet));
        }
        room
    }
}

/// The tunnel's output while it receives.
pub(crate) struct Delivery<'a, O: Output> {
    pub now_ns: u64,
    pub merge: &'a mut Coalescer,
    pub inner: Decision<'a, O>,
}

/// Parts that decide about a merged packet.
pub(crate) struct Decision<'a, O: Output> {
    pub out: &'a mut O,
    /// Without services the host gets everything.
    pub services: Option<&'a mut Services>,
    /// This core.
    pub id: u8,
    pub ownership: &'a Ownership,
    pub placer: &'a mut Placer,
    pub rendezvous: &'a mut Rendezvous,
    pub bonds: &'a BondIds,
    pub cluster: &'a Cluster,
    pub to_bonds: &'a mut ToBonds,
    pub pool: &'a mut PacketPool,
    pub lan: &'a mut CoreLan,
    pub era_wait: &'a mut EraWait,
}

impl<O: Output> TunnelOutput for Delivery<'_, O> {
    fn transmit(&mut self, target: &Target, segment: usize, datagrams: &[u8]) {
        self.inner.out.transmit(target, segment, datagrams);
    }

    fn deliver(&mut self, bond: usize, packet: &[u8], how: Delivered) {
        let Self { now_ns, merge, inner } = self;
        let Delivered { partial, may_merge, ethernet, placement } = how;
        let ingress = inner.bonds.ingress(bond);
        if ethernet {
            return inner.bond_frame(*now_ns, ingress, packet, how);
        }
        // Datagrams between units are taken apart one by one.
        let may_merge = may_merge && !inner.cluster.is_member();
        merge.set_placement(placement);
        // Partial checksums were vouched for by the peer's kernel and the AEAD: merging hides nothing.
        let fits = merge.push(ingress, packet, partial, may_merge || partial, &mut |packet| {
            inner.decide(*now_ns, packet);
        });
        if !fits {
            inner.out.dropped(DropReason::TooBig);
        }
    }

    fn core_wanted(&mut self, bond: usize, wanted: CoreWanted) {
        if let Ingress::Bond(bond) = self.inner.bonds.ingress(bond) {
            self.inner.core_wanted(self.now_ns, bond, wanted);
        }
    }
}

impl<O: Output> Delivery<'_, O> {
    /// Nothing more is delivered for now.
    pub fn flush(&mut self) {
        let Self { now_ns, merge, inner } = self;
        merge.flush(&mut |packet| inner.decide(*now_ns, packet));
    }
}

impl<O: Output> Decision<'_, O> {
    /// One packet or super-packet from a bond.
    pub(crate) fn decide(&mut self, now_ns: u64, packet: &mut PacketBuf) {
        if !self.stays(now_ns, packet) {
            return;
        }
        if self.cluster.is_member() {
            let policy = self.services.as_deref().map(Services::policy);
            let arrived =
                policy.and_then(|policy| self.cluster.arrived(policy, packet.ingress, packet.packet()));
            match arrived {
                Some(Ok(arrived)) => {
                    if !self.waits_for_era(now_ns, packet, &arrived) {
                        self.of_unit(now_ns, packet, &arrived);
                    }
                    return;
                }
                Some(Err(reason)) => return self.out.dropped(reason),
                None => {}
            }
        }
        note_flows(&self.ownership.hasher, packet.packet(), |flow| self.out.processed(flow));
        let (offload, ingress) = (packet.offload, packet.ingress);
        let Some(services) = self.services.as_deref_mut() else {
            self.out.host(&offload, packet.with_room(ETHERNET_BYTES));
            return;
        };
        let inner = {
            let bytes = packet.with_room(ETHERNET_BYTES);
            let mut send = wait(self.to_bonds, self.out);
            self.cluster.dispatch_inner(services.policy(), ingress, (&offload, bytes), self.pool, &mut send)
        };
        let visit = match inner {
            Ok(Inner::Own(visit)) => visit,
            Ok(Inner::Sent) => return,
            Err(reason) => return self.out.dropped(reason),
        };
        let mut frame = Frame::new(ingress, offload, packet.with_room(ETHERNET_BYTES));
        frame.visit = visit;
        let mut emit = Emit {
            out: &mut *self.out,
            to_bonds: &mut *self.to_bonds,
            pool: &mut *self.pool,
            cluster: self.cluster,
        };
        services.packet(now_ns, &mut frame, &mut emit);
        let (outcome, offload, flow) = (frame.outcome, frame.offload, frame.flow);
        let elsewhere = match outcome {
            Outcome::Forward(Egress::Interface(_) | Egress::Unit(_)) => true,
            Outcome::Forward(Egress::Bond(bond)) => emit.cluster.is_hub_bond(bond),
            _ => false,
        };
        if elsewhere && emit.for_cluster(&frame, None) {
            return;
        }
        if let Outcome::Forward(Egress::Bond(bond)) = outcome {
            // The buffer itself goes there: nothing is copied.
            let key = flow.map(|(id, direction)| services.flows().leaves_as(id, direction));
            let mut taken = std::mem::replace(packet, self.pool.take(PACKET_BYTES_MAX));
            taken.offload = offload;
            if !self.to_bonds.push(bond, key, taken) {
                self.out.dropped(DropReason::QueueFull);
            }
        } else {
            leave(self.out, outcome, &offload, packet.with_room(ETHERNET_BYTES));
        }
    }
}

impl<O: Output> Decision<'_, O> {
    /// Whether a packet would begin a flow by a table that is not held here: then it is kept until that comes, if there is room.
    #[inline]
    fn waits_for_era(&mut self, now_ns: u64, packet: &mut PacketBuf, arrived: &Arrived) -> bool {
        if self.cluster.holds_era_of(&arrived.visit) {
            return false;
        }
        let Some(services) = self.services.as_deref_mut() else { return false };
        if !self.cluster.lacks_era(services, packet.packet(), arrived) {
            return false;
        }
        let waits = self.era_wait.push(now_ns, packet, self.pool);
        if waits {
            services.note_era_wait();
        }
        waits
    }

    /// A packet that has waited for a table. `again`: it may go on to wait.
    pub(crate) fn waited(&mut self, now_ns: u64, (until_ns, mut packet): (u64, PacketBuf), again: bool) {
        let Some(services) = self.services.as_deref() else { return };
        let (cluster, ingress) = (self.cluster, packet.ingress);
        match cluster.arrived(services.policy(), ingress, packet.packet()) {
            Some(Ok(arrived)) if again && cluster.lacks_era(services, packet.packet(), &arrived) => {
                return self.era_wait.push_again(until_ns, packet);
            }
            Some(Ok(arrived)) => self.of_unit(now_ns, &mut packet, &arrived),
            Some(Err(reason)) => self.out.dropped(reason),
            // This machine, or the other one, has left the cluster meanwhile.
            None => self.out.dropped(DropReason::UnitUnknown),
        }
        self.pool.recycle(packet);
    }

    /// A frame that another unit sent here.
    fn of_unit(&mut self, now_ns: u64, packet: &mut PacketBuf, arrived: &Arrived) {
        if arrived.handoff == Handoff::Trace {
            let (services, pool) = (self.services.as_deref(), &mut *self.pool);
            let (who, ingress) = ((services, self.id), arrived.ingress);
            let mut send = wait(self.to_bonds, self.out);
            let passed = self.cluster.traced(who, ingress, packet.packet(), pool, &mut send);
            drop(send);
            return passed.unwrap_or_else(|reason| self.out.dropped(reason));
        }
        let Some(frame) = packet.packet_mut().get_mut(arrived.frame.clone()) else { return };
        let interface = arrived.ingress.interface();
        match (arrived.handoff, interface) {
            (Handoff::Reply, Some(interface)) if self.cluster.dispatches(interface) => {
                if !self.cluster.is_active(interface) {
                    let (frame, pool) = (&*frame, &mut *self.pool);
                    let passed =
                        self.cluster.pass_on(arrived, frame, pool, &mut wait(self.to_bonds, self.out));
                    return passed.unwrap_or_else(|reason| self.out.dropped(reason));
                }
                self.out.interface(interface, &arrived.offload, frame);
            }
            (Handoff::Broadcast, Some(interface)) if self.cluster.owns_flows() => {
                self.cluster.hear(arrived);
                self.out.shared_device(interface, frame);
                let came = (&*frame, Some(arrived.visit));
                let pool = &mut *self.pool;
                let passed =
                    self.cluster.broadcast(interface, came, pool, &mut wait(self.to_bonds, self.out));
                if let Err(reason) = passed {
                    self.out.dropped(reason);
                }
            }
            (Handoff::Dispatch | Handoff::Punt | Handoff::Unclaimed, interface)
                if self.cluster.owns_flows() =>
            {
                if arrived.handoff == Handoff::Dispatch {
                    self.cluster.hear(arrived);
                }
                match (arrived.hook, interface) {
                    (Hook::Host, Some(interface)) => self.deliver_to_host(now_ns, frame, interface, arrived),
                    (Hook::Host, None) => self.out.dropped(DropReason::BusUnknownHandoff),
                    (Hook::Bond, _) => self.deliver_to_hub_bond(frame, arrived),
                    (Hook::BeforeServices | Hook::AfterRendezvous { .. }, _) => {
                        self.serve(now_ns, frame, arrived);
                    }
                }
            }
            _ => self.out.dropped(DropReason::BusUnknownHandoff),
        }
    }

    /// A datagram for this unit's own sockets, or for those of the unit that has to answer it.
    fn deliver_to_host(&mut self, now_ns: u64, frame: &[u8], interface: InterfaceId, arrived: &Arrived) {
        let passed = match self.cluster.ifid_of(arrived.ingress) {
            Some(ifid) => {
                let mut send = wait(self.to_bonds, self.out);
                self.cluster.pass_datagram(now_ns, (ifid, arrived.visit), frame, self.pool, &mut send)
            }
            None => Err(DropReason::UnitUnknown),
        };
        match passed {
            Ok(true) => {}
            Ok(false) => self.out.shared_device(interface, frame),
            Err(reason) => self.out.dropped(reason),
        }
    }

    /// A packet for a peer of the hub, from the unit that has its flow.
    fn deliver_to_hub_bond(&mut self, frame: &[u8], arrived: &Arrived) {
        let Some(services) = self.services.as_deref() else { return self.out.dropped(DropReason::NoRoute) };
        let policy = services.policy();
        let way = {
            let mut send = wait(self.to_bonds, self.out);
            let what = (arrived.visit, &arrived.offload, frame);
            self.cluster.deliver_to_hub_bond(policy, what, self.pool, &mut send)
        };
        match way {
            Ok(Some(bond)) => {
                let packet = frame.get(ETHERNET_BYTES..).unwrap_or_default();
                let copy = self.pool.copy(packet, &arrived.offload, Ingress::Host);
                if !copy.is_some_and(|copy| self.to_bonds.push(bond, None, copy)) {
                    self.out.dropped(DropReason::QueueFull);
                }
            }
            Ok(None) => {}
            Err(reason) => self.out.dropped(reason),
        }
    }

    /// A frame that a dispatcher or another data plane gave this one: as if it had come in by the shared interface.
    fn serve(&mut self, now_ns: u64, bytes: &mut [u8], arrived: &Arrived) {
        let Some(services) = self.services.as_deref_mut() else {
            return self.out.dropped(DropReason::NoRoute);
        };
        let mut frame = Frame::new(arrived.ingress, arrived.offload, bytes);
        frame.visit = Some(arrived.visit);
        let mut emit = Emit {
            out: &mut *self.out,
            to_bonds: &mut *self.to_bonds,
            pool: &mut *self.pool,
            cluster: self.cluster,
        };
        match arrived.hook {
            Hook::BeforeServices => services.packet(now_ns, &mut frame, &mut emit),
            Hook::AfterRendezvous { src_port, dst_port } => {
                services.piece_of_unit(now_ns, &mut frame, (src_port, dst_port), &mut emit);
            }
            Hook::Host | Hook::Bond => {}
        }
        let key = frame.flow.map(|(id, direction)| services.flows().leaves_as(id, direction));
        let (key_of, pool) = (key.as_ref(), &mut *self.pool);
        let result = self.cluster.leave(&frame, key_of, pool, &mut wait(self.to_bonds, self.out));
        match result {
            Some(Ok(())) => return,
            Some(Err(reason)) => return self.out.dropped(reason),
            None => {}
        }
        let (outcome, offload) = (frame.outcome, frame.offload);
        if let Outcome::Forward(Egress::Bond(bond)) = outcome {
            let packet = frame.bytes.get(ETHERNET_BYTES..).unwrap_or_default();
            let copy = self.pool.copy(packet, &offload, Ingress::Host);
            if !copy.is_some_and(|copy| self.to_bonds.push(bond, key, copy)) {
                self.out.dropped(DropReason::QueueFull);
            }
        } else {
            leave(self.out, outcome, &offload, frame.bytes);
        }
    }
}

/// A way to send encapsulated packets while the tunnel is at work: they wait until it is done.
fn wait<'a, O: Output>(
    to_bonds: &'a mut ToBonds,
    out: &'a mut O,
) -> impl FnMut(BondId, Option<&FlowKey>, PacketBuf) -> Option<PacketBuf> + 'a {
    |bond, key, packet| {
        if !to_bonds.push(bond, key.copied(), packet) {
            out.dropped(DropReason::QueueFull);
        }
        None
    }
}

/// The services' output while the tunnel is at work.
struct Emit<'a, O: Output> {
    out: &'a mut O,
    cluster: &'a Cluster,
    to_bonds: &'a mut ToBonds,
    pool: &'a mut PacketPool,
}

impl<O: Output> Emit<'_, O> {
    fn push(&mut self, bond: BondId, key: Option<&FlowKey>, offload: &VirtioNetHeader, bytes: &[u8]) {
        let packet = bytes.get(ETHERNET_BYTES..).unwrap_or_default();
        let copy = self.pool.copy(packet, offload, Ingress::Host);
        if !copy.is_some_and(|copy| self.to_bonds.push(bond, key.copied(), copy)) {
            self.out.dropped(DropReason::QueueFull);
        }
    }

    /// Whether the frame was for another unit, or a shared interface of others.
    fn for_cluster(&mut self, frame: &Frame<'_>, key: Option<&FlowKey>) -> bool {
        let result = self.cluster.leave(frame, key, self.pool, &mut wait(self.to_bonds, self.out));
        match result {
            Some(Ok(())) => true,
            Some(Err(reason)) => {
                self.out.dropped(reason);
                true
            }
            None => false,
        }
    }
}

impl<O: Output> services::pipeline::Output for Emit<'_, O> {
    fn emit(&mut self, outcome: Outcome, key: Option<&FlowKey>, offload: &VirtioNetHeader, bytes: &mut [u8]) {
        let local = match outcome {
            Outcome::Forward(Egress::Bond(bond)) if !self.cluster.is_hub_bond(bond) => Some(bond),
            _ => None,
        };
        let Some(bond) = local else {
            let mut frame = Frame::new(Ingress::Host, *offload, bytes);
            frame.outcome = outcome;
            if self.for_cluster(&frame, key) {
                return;
            }
            match outcome {
                Outcome::Forward(Egress::Bond(bond)) => self.push(bond, key, offload, bytes),
                _ => leave(self.out, outcome, offload, bytes),
            }
            return;
        };
        self.push(bond, key, offload, bytes);
    }

    fn to_unit(&mut self, _: u16, frame: &Frame<'_>) {
        if !self.for_cluster(frame, None) {
            self.out.dropped(DropReason::UnitUnknown);
        }
    }

    fn hand_over(&mut self, core: u8, handed: services::pipeline::Handed) -> bool {
        self.out.hand_over(core, Handed::Service(handed))
    }

    fn buffers(&mut self) -> &mut PacketPool {
        self.pool
    }
}

/// Hashes by which the operator's count knows what a core processed: that of the flow, and of fragments that of their
/// packet, because only the first of them has the flow's ports. So a flow whose fragments go to another core shows.
fn note_flows(hasher: &FlowHasher, packet: &[u8], mut note: impl FnMut(u32)) {
    let Ok(header) = IpHeader::parse(packet) else { return };
    let key = FlowKey::of_parsed(&header, packet);
    let Some(fragment) = header.fragment.filter(|_| header.is_fragmented()) else {
        note(hasher.hash(&key, 0));
        return;
    };
    note(hasher.hash(&key, 0) ^ fragment.id.wrapping_mul(MIX_MULTIPLIER));
    if fragment.offset == 0
        && let Ok((key, _)) = services::fragment::flow_of_first(&header, packet)
    {
        note(hasher.hash(&key, 0));
    }
}
