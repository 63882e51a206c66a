//! Other machines of a cluster: packets that are dispatched, punted and answered over the bonds to them.
//!
//! ```text
//!   outside ── shared interface ── dispatcher ══ bond ══ data plane: services
//!                                     ▲                    │   ╲══ bond ══ its predecessor
//!                                     ╰════════ bond ══════╯
//! ```
//!
//! A packet to another unit is an Ethernet frame behind [`cluster::encapsulation`]'s headers, sent to the unit's bus address
//! through the bond to it. The bond classifies it by the *inner* flow, so that it arrives on the very core of the unit that
//! owns the flow. A dispatcher gives a frame of a shared interface to a unit (`Cluster::dispatch`) and sends out what comes
//! back; a data plane takes a frame as if it had come in by the interface itself (`Arrived`), and what its services decide for
//! the interface goes to a dispatcher (`Cluster::leave`).

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use cluster::encapsulation::outer::{OUTER_BYTES_MAX, Outer, OuterChecksum, entropy_port, parse_outer};
use cluster::encapsulation::{ENCAPSULATION_BYTES_MAX, Encapsulation, HUB_INTERFACE, Handoff, Hook};
use cluster::message::Member;
use cluster::snapshot::Snapshot;
use packet::attachment::{Arrival, BondId, Egress, Ingress, InterfaceId, UnitVisit};
use packet::segment::{Segmenter, complete_checksum};
use packet::vnet::{GSO_NONE, VirtioNetHeader};
use packet::{DropReason, FlowKey, IpHeader, PacketBuf, PacketPool};
use services::Services;
use services::pipeline::{ETHERNET_BYTES, Frame, Outcome};
use services::policy::Policy;
use services::steer;
use steering::owner_chain::TTL_START;
use steering::units::{Answer, Target};
use tunnel::forwarder::Forwarder as Tunnel;
use tunnel::node::Node;

use crate::hub::{Hub, NoSession, Way};
use crate::path_mtu::{PathMtu, TooBig};
use crate::trace::Traced;

/// The cluster as one core goes by it.
#[derive(Default)]
pub struct Cluster {
    pub(crate) snapshot: Option<Arc<Snapshot>>,
    /// Bond to each member, by its place in the snapshot.
    bonds: Vec<Option<BondId>>,
    /// The hub that the units are, if they are one.
    pub(crate) hub: Option<Hub>,
    path_mtu: PathMtu,
    /// Answers to questions for the way, until they are taken.
    pub(crate) traced: RefCell<Vec<Traced>>,
}

/// A frame from another unit.
pub(crate) struct Arrived {
    /// Why it was sent here.
    pub handoff: Handoff,
    /// The shared interface, or the peer of the hub that sent it.
    pub ingress: Ingress,
    /// Where its processing resumes.
    pub hook: Hook,
    /// Visit at this unit.
    pub visit: UnitVisit,
    /// Where the Ethernet frame is in the packet.
    pub frame: Range<usize>,
    /// Its offload header; offsets count from the IP header.
    pub offload: VirtioNetHeader,
}

/// An inner packet of a hub's peer.
pub(crate) enum Inner {
    /// This unit's own, with its visit if a peer of the hub sent it.
    Own(Option<UnitVisit>),
    /// Another unit gets it.
    Sent,
}

/// Words to a unit besides the frame.
struct Word {
    unit: u16,
    ifid: u8,
    /// `None`: as the visit says.
    handoff: Option<Handoff>,
    hook: Hook,
    visit: UnitVisit,
}

impl Cluster {
    /// Goes by another snapshot, or by other routes to the members.
    pub fn follow(&mut self, snapshot: Option<&Arc<Snapshot>>, policy: &Policy, node: &Arc<Node>) {
        let hub =
            snapshot.and_then(|snapshot| Some(Hub::of(snapshot, node)?.after(self.hub.as_ref(), snapshot)));
        self.hub = hub;
        self.snapshot = snapshot.cloned();
        let members = self.snapshot.iter().flat_map(|snapshot| &snapshot.members);
        let bond = |member: &Member| match policy.fib.lookup(0, member.address)?.egress {
            Egress::Bond(bond) => Some(bond),
            _ => None,
        };
        self.bonds = members.map(bond).collect();
        self.path_mtu.forget();
    }

    /// Looks at how large packets to the other units may be, if this machine has to know.
    #[inline]
    pub fn follow_paths(&mut self, now_ns: u64, tunnel: &Tunnel) {
        let Some(snapshot) = &self.snapshot else { return };
        if snapshot.answers_too_big && snapshot.role.dispatches() {
            self.path_mtu.follow(now_ns, snapshot, &self.bonds, tunnel);
        }
    }

    /// Answer to a frame that [`Cluster::dispatch`] found too big for the bond to its data plane.
    pub(crate) fn too_big(&mut self, now_ns: u64, frame: &mut Frame<'_>) -> Option<TooBig> {
        let snapshot = self.snapshot.as_ref()?;
        let interface = frame.ingress.interface()?;
        let shared = snapshot.shared.iter().find(|shared| shared.interface == interface)?;
        let packet = frame.bytes.get_mut(ETHERNET_BYTES..)?;
        let mtu = self.path_mtu.exceeded(&frame.offload, packet)?;
        self.path_mtu.answer(now_ns, shared, mtu, frame.bytes)
    }

    /// Follows the tunnel's list of bonds.
    pub fn follow_bonds(&mut self, node: &Arc<Node>) {
        if let Some(snapshot) = &self.snapshot {
            self.hub = Hub::of(snapshot, node).map(|hub| hub.after(self.hub.as_ref(), snapshot));
        }
    }

    /// Whether frames of an interface are given to data planes.
    #[inline]
    #[must_use]
    pub fn dispatches(&self, interface: InterfaceId) -> bool {
        let dispatcher = self.snapshot.as_ref().filter(|snapshot| snapshot.role.dispatches());
        dispatcher.is_some_and(|snapshot| snapshot.ifid(interface).is_some())
    }

    /// Whether other units have a part in anything here.
    #[inline]
    #[must_use]
    pub fn is_member(&self) -> bool {
        self.snapshot.is_some()
    }

    /// Whether this machine owns flows.
    #[must_use]
    pub fn owns_flows(&self) -> bool {
        self.snapshot.as_ref().is_some_and(|snapshot| snapshot.role.owns_flows())
    }

    /// A dispatcher's whole work with a frame from outside: to a data plane by its key. `false`: it is this machine's own.
    ///
    /// # Errors
    /// Of packets that cannot be read, and of units that are not there.
    pub(crate) fn dispatch(
        &self,
        policy: &Policy,
        frame: &mut Frame<'_>,
        pool: &mut PacketPool,
        send: &mut impl FnMut(BondId, Option<&FlowKey>, PacketBuf) -> Option<PacketBuf>,
    ) -> Result<bool, DropReason> {
        let (Some(snapshot), Ingress::Interface(interface)) = (&self.snapshot, frame.ingress) else {
            return Ok(false);
        };
        let Some(shared) = snapshot.shared.iter().find(|shared| shared.interface == interface) else {
            return Ok(false);
        };
        let key = FlowKey::of(frame.packet())?;
        if policy.is_own(key.dst) && !shared.addresses.contains(&key.dst) {
            return Ok(false);
        }
        if !shared.holding.is_active() {
            return Err(DropReason::UnitStandby);
        }
        if let Some(hub) = self.hub.as_ref().filter(|hub| hub.is_datagram(&key, shared)) {
            self.dispatch_datagrams(snapshot, hub, (shared.ifid, &key), frame, pool, send)?;
            return Ok(true);
        }
        let key = steer::unit_key(policy, &key);
        let target = snapshot.units.dispatch(&key);
        if snapshot.answers_too_big {
            let packet = frame.bytes.get_mut(ETHERNET_BYTES..).ok_or(DropReason::TooShort)?;
            if self.path_mtu.exceeded(&frame.offload, packet).is_some() {
                return Err(DropReason::TooBig);
            }
        }
        let word = Word {
            unit: target.unit,
            ifid: shared.ifid,
            handoff: None,
            hook: Hook::BeforeServices,
            visit: target.visit,
        };
        self.send(snapshot, &word, (&frame.offload, frame.bytes), Some(&key), pool, send)?;
        Ok(true)
    }

    /// Datagrams of a peer of the hub, each to the unit of its session.
    fn dispatch_datagrams(
        &self,
        snapshot: &Snapshot,
        hub: &Hub,
        (ifid, key): (u8, &FlowKey),
        frame: &Frame<'_>,
        pool: &mut PacketPool,
        send: &mut impl FnMut(BondId, Option<&FlowKey>, PacketBuf) -> Option<PacketBuf>,
    ) -> Result<(), DropReason> {
        let mut one = |bytes: &[u8], pool: &mut PacketPool| {
            let unit = hub.unit_of(snapshot, key, bytes)?;
            let word = Word { unit, ifid, handoff: None, hook: Hook::Host, visit: visit_of(snapshot) };
            self.send(snapshot, &word, (&VirtioNetHeader::default(), bytes), Some(key), pool, send)
        };
        if frame.offload.gso_type == GSO_NONE && !frame.offload.needs_csum() {
            return one(frame.bytes, pool);
        }
        // Of a peer's last and its next session together, perhaps.
        let mut datagrams = Vec::new();
        for_each_segment(&frame.offload, frame.bytes, pool, &mut |segment| {
            datagrams.push(segment);
            None
        })?;
        let mut result = Ok(());
        for datagram in datagrams {
            result = result.and(one(datagram.packet(), pool));
            pool.recycle(datagram);
        }
        result
    }

    /// Answer to a datagram that a dispatcher could not give to its unit, if it is of the hub's peers.
    pub(crate) fn no_session(&self, now_ns: u64, reason: DropReason, frame: &[u8]) -> Option<NoSession> {
        let (snapshot, hub) = (self.snapshot.as_ref()?, self.hub.as_ref()?);
        let key = FlowKey::of(frame.get(ETHERNET_BYTES..)?).ok()?;
        let ours = snapshot.shared.iter().any(|shared| hub.is_datagram(&key, shared));
        if reason == DropReason::UnitUnknown && ours { hub.no_session(now_ns, frame) } else { None }
    }

    /// Passes a datagram on to the unit that has to answer it; `false`: it is for this one.
    ///
    /// # Errors
    /// [`DropReason::UnitUnknown`].
    pub(crate) fn pass_datagram(
        &self,
        now_ns: u64,
        (ifid, visit): (u8, UnitVisit),
        frame: &[u8],
        pool: &mut PacketPool,
        send: &mut impl FnMut(BondId, Option<&FlowKey>, PacketBuf) -> Option<PacketBuf>,
    ) -> Result<bool, DropReason> {
        let (Some(snapshot), Some(hub)) = (&self.snapshot, &self.hub) else { return Ok(false) };
        let Some(unit) = hub.answerer(now_ns, snapshot, &visit, frame) else { return Ok(false) };
        let visit = UnitVisit { ttl: visit.ttl - 1, ..visit };
        let word = Word { unit, ifid, handoff: None, hook: Hook::Host, visit };
        self.send(snapshot, &word, (&VirtioNetHeader::default(), frame), None, pool, send)?;
        Ok(true)
    }

    /// Way of a packet that another unit sent here for the bond of its destination.
    ///
    /// # Errors
    /// As [`Hub::way`].
    pub(crate) fn deliver_to_hub_bond(
        &self,
        policy: &Policy,
        (visit, offload, frame): (UnitVisit, &VirtioNetHeader, &[u8]),
        pool: &mut PacketPool,
        send: &mut impl FnMut(BondId, Option<&FlowKey>, PacketBuf) -> Option<PacketBuf>,
    ) -> Result<Option<BondId>, DropReason> {
        let (Some(snapshot), Some(hub)) = (&self.snapshot, &self.hub) else {
            return Err(DropReason::NoRoute);
        };
        let key = FlowKey::of(frame.get(ETHERNET_BYTES..).unwrap_or_default())?;
        let bond = hub.bond_of(policy, key.dst).ok_or(DropReason::NoRoute)?;
        match hub.way(snapshot, bond, Some(visit))? {
            Way::Here(bond) => Ok(Some(bond)),
            Way::Unit(target) => {
                let Target { unit, visit } = target;
                let word = Word { unit, ifid: HUB_INTERFACE, handoff: None, hook: Hook::Bond, visit };
                self.send(snapshot, &word, (offload, frame), Some(&key), pool, send)?;
                Ok(None)
            }
        }
    }

    /// Gives an inner packet of a hub's peer to the unit of its flow; the visit of one that is this unit's own, if it came from
    /// such a peer.
    ///
    /// # Errors
    /// Of packets that cannot be read, and of units that are not there.
    pub(crate) fn dispatch_inner(
        &self,
        policy: &Policy,
        ingress: Ingress,
        (offload, frame): (&VirtioNetHeader, &mut [u8]),
        pool: &mut PacketPool,
        send: &mut impl FnMut(BondId, Option<&FlowKey>, PacketBuf) -> Option<PacketBuf>,
    ) -> Result<Inner, DropReason> {
        let (Some(snapshot), Some(hub)) = (&self.snapshot, &self.hub) else { return Ok(Inner::Own(None)) };
        let packet = frame.get(ETHERNET_BYTES..).unwrap_or_default();
        let Some(target) = hub.dispatch(snapshot, policy, ingress, packet)? else {
            return Ok(Inner::Own(None));
        };
        let Target { unit, visit } = target;
        if unit == snapshot.units.node {
            return Ok(Inner::Own(Some(visit)));
        }
        let key = FlowKey::of(packet)?;
        frame.iter_mut().take(ETHERNET_BYTES).for_each(|byte| *byte = 0);
        let word = Word { unit, ifid: HUB_INTERFACE, handoff: None, hook: Hook::BeforeServices, visit };
        self.send(snapshot, &word, (offload, frame), Some(&key), pool, send)?;
        Ok(Inner::Sent)
    }

    /// Sends a frame of this unit to where its outcome says, if that is another unit or a shared interface of others. `key`:
    /// its flow as it leaves. `None`: neither.
    pub(crate) fn leave(
        &self,
        frame: &Frame<'_>,
        key: Option<&FlowKey>,
        pool: &mut PacketPool,
        send: &mut impl FnMut(BondId, Option<&FlowKey>, PacketBuf) -> Option<PacketBuf>,
    ) -> Option<Result<(), DropReason>> {
        let snapshot = self.snapshot.as_ref().filter(|snapshot| snapshot.role.owns_flows())?;
        let word = match (frame.outcome, frame.visit, frame.ingress) {
            (Outcome::Forward(Egress::Unit(unit)), Some(visit), ingress) => {
                let ifid = self.ifid(snapshot, ingress)?;
                let hook = frame.ports.map_or(Hook::BeforeServices, |(src_port, dst_port)| {
                    Hook::AfterRendezvous { src_port, dst_port }
                });
                Word { unit, ifid, handoff: None, hook, visit }
            }
            (Outcome::Forward(Egress::Interface(interface)), visit, _) => {
                let ifid = snapshot.ifid(interface)?;
                match answer(snapshot, ifid, visit, key) {
                    Some(word) => word,
                    None => return Some(Err(DropReason::UnitUnknown)),
                }
            }
            (Outcome::Forward(Egress::Bond(bond)), ..) => {
                let hub = self.hub.as_ref().filter(|hub| hub.has(bond))?;
                match hub.way(snapshot, bond, None) {
                    Ok(Way::Here(_)) => return None,
                    Ok(Way::Unit(Target { unit, visit })) => {
                        Word { unit, ifid: HUB_INTERFACE, handoff: None, hook: Hook::Bond, visit }
                    }
                    Err(reason) => return Some(Err(reason)),
                }
            }
            _ => return None,
        };
        Some(self.send(snapshot, &word, (&frame.offload, frame.bytes), key, pool, send))
    }

    /// Number of what a packet came in by, in the encapsulation.
    pub(crate) fn ifid(&self, snapshot: &Snapshot, ingress: Ingress) -> Option<u8> {
        match ingress {
            Ingress::Interface(interface) => snapshot.ifid(interface),
            Ingress::Bond(bond) => self.hub.as_ref()?.has(bond).then_some(HUB_INTERFACE),
            Ingress::Host => None,
        }
    }

    /// The same of a frame that came from another unit.
    pub(crate) fn ifid_of(&self, ingress: Ingress) -> Option<u8> {
        self.ifid(self.snapshot.as_ref()?, ingress)
    }

    /// Whether a bond is one of the hub's peers, whose session may be at another unit.
    #[inline]
    pub(crate) fn is_hub_bond(&self, bond: BondId) -> bool {
        self.hub.as_ref().is_some_and(|hub| hub.has(bond))
    }

    /// Sends a frame of the host by a shared interface that other machines have.
    ///
    /// # Errors
    /// [`DropReason::UnitUnknown`]: no dispatcher has it.
    pub(crate) fn of_host(
        &self,
        interface: InterfaceId,
        frame: &[u8],
        pool: &mut PacketPool,
        send: &mut impl FnMut(BondId, Option<&FlowKey>, PacketBuf) -> Option<PacketBuf>,
    ) -> Result<(), DropReason> {
        let snapshot = self.snapshot.as_ref().ok_or(DropReason::UnitUnknown)?;
        let ifid = snapshot.ifid(interface).ok_or(DropReason::UnitUnknown)?;
        let word = answer(snapshot, ifid, None, None).ok_or(DropReason::UnitUnknown)?;
        self.send(snapshot, &word, (&VirtioNetHeader::default(), frame), None, pool, send)
    }

    /// Passes a broadcast on to the next data plane (row D8); none after the last.
    ///
    /// # Errors
    /// [`DropReason::UnitUnknown`], and [`DropReason::BusTtlExpired`] when it was passed on too often.
    pub(crate) fn broadcast(
        &self,
        interface: InterfaceId,
        (frame, came): (&[u8], Option<UnitVisit>),
        pool: &mut PacketPool,
        send: &mut impl FnMut(BondId, Option<&FlowKey>, PacketBuf) -> Option<PacketBuf>,
    ) -> Result<(), DropReason> {
        let snapshot = self.snapshot.as_ref().ok_or(DropReason::UnitUnknown)?;
        let ifid = snapshot.ifid(interface).ok_or(DropReason::UnitUnknown)?;
        if came.is_none() && !snapshot.is_active(ifid) {
            // Whoever has the interface heard it too.
            return Ok(());
        }
        let Some(unit) = snapshot.next_in_chain() else { return Ok(()) };
        let visit = match came {
            Some(came) => {
                UnitVisit { ttl: came.ttl.checked_sub(1).ok_or(DropReason::BusTtlExpired)?, ..came }
            }
            None => UnitVisit { ttl: u8::MAX, ..visit_of(snapshot) },
        };
        let word = Word { unit, ifid, handoff: Some(Handoff::Broadcast), hook: Hook::BeforeServices, visit };
        self.send(snapshot, &word, (&VirtioNetHeader::default(), frame), None, pool, send)
    }

    /// Whether this dispatcher has a shared interface now.
    #[inline]
    pub(crate) fn is_active(&self, interface: InterfaceId) -> bool {
        let shared = self.shared(interface);
        shared.is_some_and(|shared| shared.holding.is_active())
    }

    /// A frame of a shared interface came from a dispatcher: it has it now.
    #[inline]
    pub(crate) fn hear(&self, arrived: &Arrived) {
        if let Some(shared) = arrived.ingress.interface().and_then(|interface| self.shared(interface)) {
            shared.holding.hear(arrived.visit.dispatcher);
        }
    }

    fn shared(&self, interface: InterfaceId) -> Option<&cluster::snapshot::SharedInterface> {
        self.snapshot.as_ref()?.shared.iter().find(|shared| shared.interface == interface)
    }

    /// Sends a frame that was to leave by a shared interface, which this dispatcher does not have now, to the next one that may.
    ///
    /// # Errors
    /// [`DropReason::UnitStandby`] when there is none, or it has gone round.
    pub(crate) fn pass_on(
        &self,
        arrived: &Arrived,
        frame: &[u8],
        pool: &mut PacketPool,
        send: &mut impl FnMut(BondId, Option<&FlowKey>, PacketBuf) -> Option<PacketBuf>,
    ) -> Result<(), DropReason> {
        let snapshot = self.snapshot.as_ref().ok_or(DropReason::UnitUnknown)?;
        let ifid = arrived.ingress.interface().and_then(|interface| snapshot.ifid(interface));
        let ifid = ifid.ok_or(DropReason::UnitUnknown)?;
        let unit = snapshot.other_dispatcher(ifid).ok_or(DropReason::UnitStandby)?;
        let ttl = arrived.visit.ttl.checked_sub(1).filter(|ttl| *ttl > 0).ok_or(DropReason::UnitStandby)?;
        let visit = UnitVisit { ttl, ..arrived.visit };
        let word = Word { unit, ifid, handoff: Some(Handoff::Reply), hook: Hook::BeforeServices, visit };
        self.send(snapshot, &word, (&arrived.offload, frame), None, pool, send)
    }

    /// A packet that a bond delivered, if another unit encapsulated it; the reason why it is of no use.
    #[inline]
    pub(crate) fn arrived(
        &self,
        policy: &Policy,
        ingress: Ingress,
        packet: &[u8],
    ) -> Option<Result<Arrived, DropReason>> {
        let snapshot = self.snapshot.as_ref()?;
        let Ingress::Bond(bond) = ingress else { return None };
        let (outer, payload) = match parse_outer(packet).transpose()? {
            Ok(found) => found,
            Err(reason) => return Some(Err(reason)),
        };
        if snapshot.own()?.address != outer.destination || !self.bonds.contains(&Some(bond)) {
            return None;
        }
        let read = || {
            let (head, frame) = Encapsulation::parse(payload)?;
            if head.target != snapshot.units.node {
                return Err(DropReason::UnitUnknown);
            }
            let ingress = self.ingress_of(snapshot, policy, &head, frame).ok_or(DropReason::UnitUnknown)?;
            let visit = head.visit().unwrap_or(UnitVisit {
                arrival: Arrival::Outside,
                ttl: head.ttl,
                odd_era: head.odd_era,
                dispatcher: head.dispatcher,
            });
            // Units write no IPv4 options.
            let start = outer.bytes() + payload.len() - frame.len();
            let frame = start..start + frame.len();
            if packet.first().is_some_and(|first| first & 0x0f != 5 && first >> 4 == 4) {
                return Err(DropReason::BusMalformed);
            }
            let offload = head.offload.unwrap_or_default();
            Ok(Arrived { handoff: head.handoff, hook: head.hook, ingress, visit, frame, offload })
        };
        Some(read())
    }

    /// Whether the table is here by which a packet was dispatched.
    #[inline]
    pub(crate) fn holds_era_of(&self, visit: &UnitVisit) -> bool {
        let held = |snapshot: &Arc<Snapshot>| snapshot.units.eras.of_parity(visit.odd_era).is_some();
        self.snapshot.as_ref().is_none_or(held)
    }

    /// Whether a packet cannot be decided about without a table that is not here.
    #[cold]
    pub(crate) fn lacks_era(&self, services: &Services, packet: &[u8], arrived: &Arrived) -> bool {
        let asks = matches!(arrived.handoff, Handoff::Dispatch | Handoff::Punt | Handoff::Unclaimed);
        if !asks || !self.owns_flows() || self.holds_era_of(&arrived.visit) {
            return false;
        }
        let inner = packet.get(arrived.frame.clone()).and_then(|frame| frame.get(ETHERNET_BYTES..));
        let Some(key) = inner.and_then(|inner| FlowKey::of(inner).ok()) else { return false };
        let key = match arrived.hook {
            Hook::Host => return false,
            Hook::Bond => return self.lacks_era_of_bond(services, &key, arrived),
            Hook::AfterRendezvous { src_port, dst_port } => FlowKey { src_port, dst_port, ..key },
            Hook::BeforeServices => key,
        };
        services.would(&key, arrived.ingress, &arrived.visit) == Some(Answer::EraUnknown)
    }

    fn lacks_era_of_bond(&self, services: &Services, key: &FlowKey, arrived: &Arrived) -> bool {
        let (Some(snapshot), Some(hub)) = (&self.snapshot, &self.hub) else { return false };
        let bond = hub.bond_of(services.policy(), key.dst);
        let way = bond.map(|bond| hub.way(snapshot, bond, Some(arrived.visit)));
        matches!(way, Some(Err(DropReason::EraUnknown)))
    }

    /// By what a frame from another unit had come in there.
    fn ingress_of(
        &self,
        snapshot: &Snapshot,
        policy: &Policy,
        head: &Encapsulation,
        frame: &[u8],
    ) -> Option<Ingress> {
        if head.interface != HUB_INTERFACE {
            return snapshot.interface(head.interface).map(Ingress::Interface);
        }
        let hub = self.hub.as_ref()?;
        if head.hook == Hook::Bond {
            return Some(Ingress::Host);
        }
        // The unit that opened it saw that its source is the peer's.
        let header = IpHeader::parse(frame.get(ETHERNET_BYTES..)?).ok()?;
        hub.bond_of(policy, header.src).map(Ingress::Bond)
    }

    /// Encapsulates a frame for the bond to a unit, whole with its offload header; only where that would be longer than an IP
    /// packet can be it is cut.
    fn send(
        &self,
        snapshot: &Snapshot,
        word: &Word,
        (offload, bytes): (&VirtioNetHeader, &[u8]),
        key: Option<&FlowKey>,
        pool: &mut PacketPool,
        send: &mut impl FnMut(BondId, Option<&FlowKey>, PacketBuf) -> Option<PacketBuf>,
    ) -> Result<(), DropReason> {
        let mut head =
            Encapsulation { hook: word.hook, ..Encapsulation::of_visit(word.unit, word.ifid, &word.visit) };
        head.handoff = word.handoff.unwrap_or(head.handoff);
        self.encapsulate(snapshot, head, (offload, bytes), key, pool, send)
    }

    /// The same with these headers.
    pub(crate) fn encapsulate(
        &self,
        snapshot: &Snapshot,
        head: Encapsulation,
        (offload, bytes): (&VirtioNetHeader, &[u8]),
        key: Option<&FlowKey>,
        pool: &mut PacketPool,
        send: &mut impl FnMut(BondId, Option<&FlowKey>, PacketBuf) -> Option<PacketBuf>,
    ) -> Result<(), DropReason> {
        let place = snapshot.members.binary_search_by_key(&head.target, |member| member.node);
        let place = place.map_err(|_| DropReason::UnitUnknown)?;
        let bond = self.bonds.get(place).copied().flatten().ok_or(DropReason::UnitUnknown)?;
        let to = snapshot.members.get(place).ok_or(DropReason::UnitUnknown)?.address;
        let from = snapshot.own().ok_or(DropReason::UnitUnknown)?.address;
        let mut each = |mut frame: PacketBuf, offload: Option<VirtioNetHeader>| {
            let head = Encapsulation { offload, ..head };
            let source_port = entropy_port(frame.packet());
            head.write(frame.grow_front(head.bytes()));
            let outer = Outer { source: from, destination: to, source_port, traffic_class: 0 };
            frame.grow_front(outer.bytes());
            // The bond's seal vouches for every byte.
            if outer.write(frame.packet_mut(), OuterChecksum::Zero) > 0 {
                send(bond, key, frame)
            } else {
                Some(frame)
            }
        };
        if bytes.len() + ENCAPSULATION_BYTES_MAX + OUTER_BYTES_MAX <= usize::from(u16::MAX) {
            let offload =
                Some(*offload).filter(|offload| offload.gso_type != GSO_NONE || offload.needs_csum());
            let copy = pool.copy(bytes, &VirtioNetHeader::default(), Ingress::Host);
            each(copy.ok_or(DropReason::TooBig)?, offload).into_iter().for_each(|copy| pool.recycle(copy));
            return Ok(());
        }
        for_each_segment(offload, bytes, pool, &mut |segment| each(segment, None))
    }
}

/// The word of an answer: by the dispatcher that took the flow in, or another one.
fn answer(snapshot: &Snapshot, ifid: u8, came: Option<UnitVisit>, key: Option<&FlowKey>) -> Option<Word> {
    let unit = match (came, key) {
        (None, None) => snapshot.dispatcher_now(ifid),
        _ => {
            let hash = key.map_or(0, |key| snapshot.units.hasher.hash(key, 0));
            snapshot.dispatcher(ifid, came.map(|visit| visit.dispatcher), hash)
        }
    }?;
    let visit = UnitVisit { ttl: TTL_START, ..came.unwrap_or_else(|| visit_of(snapshot)) };
    let visit = UnitVisit { dispatcher: unit, ..visit };
    Some(Word { unit, ifid, handoff: Some(Handoff::Reply), hook: Hook::BeforeServices, visit })
}

/// The visit that something of this unit itself makes.
fn visit_of(snapshot: &Snapshot) -> UnitVisit {
    UnitVisit {
        arrival: Arrival::Outside,
        ttl: TTL_START,
        odd_era: snapshot.units.in_force & 1 == 1,
        dispatcher: snapshot.units.node,
    }
}

/// Copies each segment of a super-packet, with whole checksums.
fn for_each_segment(
    offload: &VirtioNetHeader,
    bytes: &[u8],
    pool: &mut PacketPool,
    each: &mut impl FnMut(PacketBuf) -> Option<PacketBuf>,
) -> Result<(), DropReason> {
    let (header, packet) = bytes.split_at_checked(ETHERNET_BYTES).ok_or(DropReason::TooShort)?;
    let segmenter = Segmenter::new(offload, packet)?;
    for index in 0..segmenter.segments() {
        let segment_bytes = segmenter.segment_bytes(index);
        let mut copy = pool.take(ETHERNET_BYTES + segment_bytes);
        copy.set_len(ETHERNET_BYTES + segment_bytes);
        let (head, body) =
            copy.packet_mut().split_at_mut_checked(ETHERNET_BYTES).ok_or(DropReason::TooShort)?;
        head.copy_from_slice(header);
        segmenter.write_segment(index, body);
        if segmenter.checksum_partial() {
            complete_checksum(body)?;
        }
        each(copy).into_iter().for_each(|copy| pool.recycle(copy));
    }
    Ok(())
}
