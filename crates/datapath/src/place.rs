//! Which core processes a packet that came by a bond, where the peer named none (rows T5, T7–T9).
//!
//! The core that opened it hands it to the *meeting place* of its flow: the core that the bucket table names for the flow's
//! hash, or for its session-ID's. That one chooses, by table, in turn, at random or by load, and remembers whom it chose; so
//! two cores never choose for one flow. Its choice gets the packet. A fragment meets the others of its packet at the core of
//! their addresses first, until the ports are known.
//!
//! With services in force nothing is chosen here: they hand every packet to the owner of its flow anyway.

use std::num::NonZeroU8;
use std::sync::Arc;

use packet::attachment::{BondId, Ingress, Placement};
use packet::flow::connection_mark;
use packet::{DropReason, FlowKey, IpHeader, PacketBuf};
use services::fragment::Released;
use steering::ownership::Ownership;
use steering::policy::{CoreChooser, Policy, RemoteCores};
use steering::symmetric::MIX_MULTIPLIER;
use tunnel::bond::reduce;
use tunnel::forwarder::CoreWanted;
use tunnel::node::Node;

use crate::datapath::COPY_BYTES_MAX;
use crate::delivery::Decision;
use crate::handed::{Handed, PlaceStep};
use crate::ports::Output;

/// Flows that a core chooses for and remembers, for each policy.
const FLOWS: usize = 16_384;
/// A flow is forgotten after this long without a packet, s.
const IDLE_S: u32 = 60;
/// Assignments that wait to be told at most; more are told when their flows' next packets come.
const TOLD_MAX: usize = 1_024;
/// An assignment is told again after this long at the earliest, ms.
const TELL_AGAIN_MS: u32 = 10;
/// Flows whose last telling is remembered.
const TOLD_FLOWS: usize = 256;

/// A flow that was given a core, for the peer's core that sends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Told {
    pub bond: BondId,
    pub peer_core: u8,
    pub hash: u32,
    pub core: u8,
}

/// One core's choices.
pub(crate) struct Placer {
    choosers: Vec<CoreChooser>,
    /// The cores as the choosers know them.
    cores: RemoteCores,
    /// When, and as of which ownership.
    followed: Option<(u32, Arc<Ownership>)>,
    random: u64,
    told: Vec<Told>,
    /// Hash and time of tellings, by hash.
    told_at: Box<[(u32, u32)]>,
}

impl Placer {
    pub fn new(seed: u64) -> Self {
        Self {
            choosers: Vec::new(),
            cores: RemoteCores::default(),
            followed: None,
            random: seed,
            told: Vec::new(),
            told_at: Box::new([]),
        }
    }

    /// Follows the cores that may be used and, once a second, how busy they are.
    pub fn follow(&mut self, now_ns: u64, ownership: &Arc<Ownership>, node: &Node) {
        let now_s = seconds(now_ns);
        let known = self.followed.as_ref();
        let same = known.is_some_and(|(at_s, known)| *at_s == now_s && Arc::ptr_eq(known, ownership));
        if same || self.choosers.is_empty() {
            return;
        }
        self.followed = Some((now_s, Arc::clone(ownership)));
        self.cores = RemoteCores { load: node.loads(), ..ownership.told() };
        for chooser in &mut self.choosers {
            chooser.update(&self.cores);
            chooser.sweep(now_s);
        }
    }

    /// The core for a flow of a class, chosen with its first packet.
    fn choose(&mut self, now_ns: u64, ownership: &Ownership, policy: Policy, (hash, class): (u32, u8)) -> u8 {
        let owner = ownership.owner_of_class(hash, class);
        if policy == Policy::Hash {
            return owner;
        }
        if !self.choosers.iter().any(|chooser| chooser.policy() == policy) {
            self.cores = RemoteCores { load: std::mem::take(&mut self.cores.load), ..ownership.told() };
            self.choosers.push(CoreChooser::new(policy, &self.cores, FLOWS, IDLE_S));
        }
        let Some(chooser) = self.choosers.iter_mut().find(|chooser| chooser.policy() == policy) else {
            return owner;
        };
        // Any sequence does that does not repeat soon: who sends the flows learns nothing by it.
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let random = (self.random >> 32) as u32;
        let chosen = chooser.choose(&ownership.table, hash, class, random, seconds(now_ns));
        chosen.filter(|core| ownership.is_alive(*core)).unwrap_or(owner)
    }

    fn begin_connection(&mut self, now_ns: u64, policy: Policy, (hash, class): (u32, u8), mark: NonZeroU8) {
        if let Some(chooser) = self.choosers.iter_mut().find(|chooser| chooser.policy() == policy) {
            chooser.begin_connection(hash, class, mark, seconds(now_ns));
        }
    }

    /// The peer's core shall know.
    pub(crate) fn tell(&mut self, now_ns: u64, told: Told) {
        if self.told_at.is_empty() {
            self.told_at = vec![(0, 0); TOLD_FLOWS].into_boxed_slice();
        }
        let now_ms = (now_ns / 1_000_000) as u32;
        let Some(last) = self.told_at.get_mut(told.hash as usize % TOLD_FLOWS) else { return };
        let lately = last.0 == told.hash && now_ms.wrapping_sub(last.1) < TELL_AGAIN_MS;
        if !lately && self.told.len() < TOLD_MAX {
            *last = (told.hash, now_ms);
            self.told.push(told);
        }
    }

    /// Assignments that are to be told, those of one bond and core of the peer one after the other.
    pub fn take_told(&mut self) -> Vec<Told> {
        let mut told = std::mem::take(&mut self.told);
        told.sort_unstable();
        told
    }
}

fn seconds(now_ns: u64) -> u32 {
    u32::try_from(now_ns / 1_000_000_000).unwrap_or(u32::MAX)
}

impl<O: Output> Decision<'_, O> {
    /// Whether this core goes on with a packet that was opened here; else it is on its way to another.
    pub(crate) fn stays(&mut self, now_ns: u64, packet: &mut PacketBuf) -> bool {
        let placement = packet.placement;
        if placement == Placement::Here {
            return true;
        }
        if self.services.is_some() || self.cluster.is_member() {
            if let (Placement::ByFlow { tell: Some(_) }, Ok(PlaceStep::Choose(hash, _))) =
                (placement, self.flow_of(packet, None))
            {
                let owner = self.ownership.owner_of_hash(hash);
                self.tell(now_ns, packet, hash, owner);
            }
            packet.placement = Placement::Here;
            return true;
        }
        let step = match placement {
            Placement::Core(core) if self.ownership.is_alive(core) => return self.goes_to(core, packet),
            // A class does not matter where a session's fragments would be of another one.
            Placement::BySession(id) => PlaceStep::Choose(hash_of_session(id), 0),
            _ => match self.flow_of(packet, None) {
                Ok(step) => step,
                Err(reason) => {
                    self.out.dropped(reason);
                    return false;
                }
            },
        };
        let (PlaceStep::Meet(hash) | PlaceStep::Choose(hash, _)) = step;
        let place = self.ownership.owner_of_hash(hash);
        if place == self.id {
            return self.stays_at_place(now_ns, packet, step);
        }
        let taken = self.take(packet);
        self.hand_over(place, Handed::Place(taken, step));
        false
    }

    /// A peer asks for the core of a flow that it has sent nothing of yet: it is told what a packet's would have been.
    pub(crate) fn core_wanted(&mut self, now_ns: u64, bond: BondId, wanted: CoreWanted) {
        let place = self.ownership.owner_of_hash(wanted.hash);
        if place == self.id || self.services.is_some() || self.cluster.is_member() {
            self.choose_wanted(now_ns, bond, wanted);
        } else {
            self.hand_over(place, Handed::CoreWanted(bond, wanted));
        }
    }

    /// As [`Self::core_wanted`], at the meeting place.
    pub(crate) fn choose_wanted(&mut self, now_ns: u64, bond: BondId, wanted: CoreWanted) {
        let CoreWanted { peer_core, hash, class } = wanted;
        let core = if self.services.is_some() || self.cluster.is_member() {
            self.ownership.owner_of_hash(hash)
        } else {
            let policy = self.bonds.rules(Ingress::Bond(bond)).policy;
            self.placer.choose(now_ns, self.ownership, policy, (hash, class))
        };
        self.placer.tell(now_ns, Told { bond, peer_core, hash, core });
    }

    /// As [`Self::stays`], at the meeting place.
    pub(crate) fn stays_at_place(&mut self, now_ns: u64, packet: &mut PacketBuf, step: PlaceStep) -> bool {
        match step {
            PlaceStep::Choose(hash, class) => {
                self.begin_connection(now_ns, packet, (hash, class));
                let policy = self.bonds.rules(packet.ingress).policy;
                let core = self.placer.choose(now_ns, self.ownership, policy, (hash, class));
                self.tell(now_ns, packet, hash, core);
                self.goes_to(core, packet)
            }
            PlaceStep::Meet(_) => {
                self.meet(now_ns, packet);
                false
            }
        }
    }

    /// A connection of TCP on the ports of an older one is a flow of its own (row T2).
    fn begin_connection(&mut self, now_ns: u64, packet: &PacketBuf, (hash, class): (u32, u8)) {
        let rules = self.bonds.rules(packet.ingress);
        if rules.policy == Policy::Hash || !rules.flow.has_connections() {
            return;
        }
        let bytes = packet.packet();
        if let Ok(header) = IpHeader::parse(bytes)
            && let Some(mark) = connection_mark(&header, bytes)
        {
            self.placer.begin_connection(now_ns, rules.policy, (hash, class), mark);
        }
    }

    /// A fragment at the core of its addresses: goes on when the ports are known.
    fn meet(&mut self, now_ns: u64, packet: &PacketBuf) {
        let Ok(header) = IpHeader::parse(packet.packet()) else {
            return self.out.dropped(DropReason::IpMalformed);
        };
        let (placement, ingress) = (packet.placement, packet.ingress);
        let tenant = self.bonds.rules(ingress).tenant;
        let mut released = Vec::new();
        let pool = &mut *self.pool;
        let mut release = |piece: Released<'_>| {
            released
                .extend(pool.copy(piece.packet, &Default::default(), ingress).map(|copy| (copy, piece.key)));
        };
        let bytes = packet.packet();
        if let Err(reason) = self.rendezvous.push(now_ns, bytes, &header, tenant, ingress, &mut release) {
            self.out.dropped(reason);
        }
        for (mut piece, key) in released {
            piece.placement = placement;
            let Ok(step @ PlaceStep::Choose(hash, _)) = self.flow_of(&piece, Some(key)) else { continue };
            let place = self.ownership.owner_of_hash(hash);
            if place != self.id {
                self.hand_over(place, Handed::Place(piece, step));
            } else if self.stays_at_place(now_ns, &mut piece, step) {
                self.decide(now_ns, &mut piece);
                self.pool.recycle(piece);
            }
        }
    }

    /// Step of a packet's flow at its meeting place, by the hash as the peer computes it: the core is chosen, or its ports are
    /// waited for if it is a fragment. `key`: its flow, where that is known.
    fn flow_of(&self, packet: &PacketBuf, key: Option<FlowKey>) -> Result<PlaceStep, DropReason> {
        let bytes = packet.packet();
        let header = IpHeader::parse(bytes)?;
        let rules = self.bonds.rules(packet.ingress);
        let meets = key.is_none() && header.is_fragmented();
        let key = key.unwrap_or_else(|| FlowKey::of_parsed(&header, bytes));
        let hash = self.ownership.hash(&reduce(&key, rules.flow, header.dscp), rules.tenant);
        if meets {
            return Ok(PlaceStep::Meet(hash));
        }
        let has_class_cores = self.ownership.has_class_cores();
        let class = if has_class_cores { rules.classes.decide(&key, header.dscp, None).0 as u8 } else { 0 };
        Ok(PlaceStep::Choose(hash, class))
    }

    fn tell(&mut self, now_ns: u64, packet: &PacketBuf, hash: u32, core: u8) {
        if let (Placement::ByFlow { tell: Some(peer_core) }, Ingress::Bond(bond)) =
            (packet.placement, packet.ingress)
        {
            self.placer.tell(now_ns, Told { bond, peer_core, hash, core });
        }
    }

    /// The packet is this core's, or goes there.
    fn goes_to(&mut self, core: u8, packet: &mut PacketBuf) -> bool {
        packet.placement = Placement::Here;
        if core == self.id {
            return true;
        }
        let taken = self.take(packet);
        self.hand_over(core, Handed::Bond(taken));
        false
    }

    /// The packet in a buffer of its own: a small one is copied, a large one leaves another buffer in its place.
    fn take(&mut self, packet: &mut PacketBuf) -> PacketBuf {
        if packet.len() <= COPY_BYTES_MAX
            && let Some(mut copy) = self.pool.copy(packet.packet(), &packet.offload, packet.ingress)
        {
            copy.placement = packet.placement;
            return copy;
        }
        let spare = self.pool.take(packet.capacity());
        std::mem::replace(packet, spare)
    }

    fn hand_over(&mut self, core: u8, handed: Handed) {
        if !self.out.hand_over(core, handed) {
            self.out.dropped(DropReason::RingFull);
        }
    }
}

/// Session-IDs are random already; the table's bits are mixed all the same.
fn hash_of_session(id: u64) -> u32 {
    ((id ^ (id >> 32)) as u32).wrapping_mul(MIX_MULTIPLIER)
}
