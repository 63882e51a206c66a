//! One worker core's share of the tunnel: everything a core may touch without asking another.
//!
//! Order of calls in one round of the worker's loop, all with the same `now`:
//!
//! 1. [`Forwarder::begin`];
//! 2. any number of [`Forwarder::packet`] (from TUN) and [`Forwarder::datagrams`] (from UDP sockets);
//! 3. [`Forwarder::finish`], which sends what is due and says when to come back.
//!
//! Datagrams and packets leave through the caller's [`Output`]. Nothing here blocks, reads a clock or does I/O.

mod arrival;
mod asked;
mod assigned;
mod budget;
mod build;
mod class_path;
mod copies;
mod depart;
mod due;
pub mod ethernet;
mod feedback;
mod flows;
mod held;
mod lane;
mod media;
mod names;
mod placement;
mod receive;
mod receiving_core;
mod repair;
mod rx_session;
mod transmit;
mod tx_lane;
mod upkeep;

use std::sync::Arc;

use packet::attachment::{BondId, Placement};
use packet::drop_reason::{DropCounters, DropReason};
use packet::flow::{FlowKey, connection_mark};
use packet::ip::IpHeader;
use packet::segment::Segmenter;
use packet::vnet::VirtioNetHeader;
use steering::ownership::Ownership;

use crate::bond::{Bond, reduce};
use crate::class::Class;
use crate::frame::{self, of_lane_not_told, write_nack, write_report};
use crate::header::{Header, Kind, NOT_TOLD};
use crate::lifecycle::{Action, encode};
use crate::node::{Node, Source};
use crate::path::Route;
use crate::session::Session;
use crate::time::Time;
use depart::ControlDatagram;
use flows::Inner;
use receive::{Context, Receive};
use transmit::{Meta, OfferedPacket, Transmit};

/// Path timing goes out this often while packets are ordered.
const TIMING_NS: u64 = 100_000_000;
/// NAT mappings of idle sockets are kept open by a keepalive this often.
const KEEPALIVE_NS: u64 = 10_000_000_000;
/// A TCP SYN is not longer than this: two headers of 60 bytes, or IPv6 and TCP with all options.
const SYN_BYTES_MAX: usize = 120;
/// Most assignments in one datagram: 700 bytes.
const ASSIGNMENTS_MAX: usize = 100;
/// Slow work (suspects, counters) is done this often.
const SLOW_NS: u64 = 5_000_000;

/// Where a datagram shall go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Bond slot; `None` for answers to strangers (cookie replies).
    pub bond: Option<usize>,
    /// Path.
    pub path: u8,
    /// Version of the path's route: a dialer's sockets of an older version are stale.
    pub version: u32,
    /// Receiving core, to choose the socket.
    pub peer_core: u8,
    /// Addresses.
    pub route: Route,
    /// Send from a dialer's socket of this path, not from the listening one.
    pub dialer: bool,
}

/// Result of [`Forwarder::classify`]: an inner packet's headers, flow and owner.
#[derive(Clone, Copy, Debug)]
pub struct Classified {
    header: IpHeader,
    flow: FlowKey,
    hash: u32,
    /// The core of this node that owns the flow.
    pub owner: u8,
    /// Bond to which a route led; `None`: as the allowed-ips say.
    bond: Option<BondId>,
}

impl Classified {
    /// Header of the packet.
    #[must_use]
    pub fn header(&self) -> &IpHeader {
        &self.header
    }

    /// For this bond, whatever the allowed-ips say about the destination: a route led there.
    #[must_use]
    pub fn towards(mut self, bond: BondId) -> Self {
        self.bond = Some(bond);
        self
    }
}

/// Output of a core.
pub trait Output {
    /// Datagrams of `segment` bytes each, the last possibly shorter, all to one target.
    fn transmit(&mut self, target: &Target, segment: usize, datagrams: &[u8]);
    /// An inner packet for this host.
    fn deliver(&mut self, bond: usize, packet: &[u8], how: Delivered);
    /// The peer of a bond wants to know the core of a flow that it has sent nothing of yet. [`Forwarder::tell_assignments`] answers;
    /// where nobody does, the peer begins without.
    fn core_wanted(&mut self, _bond: usize, _wanted: CoreWanted) {}
}

/// Question for the core of a flow (row T5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CoreWanted {
    /// The peer's core that asks, and has to be told.
    pub peer_core: u8,
    /// Hash of the flow under our key.
    pub hash: u32,
    /// Number of its class, by the peer's classes.
    pub class: u8,
}

/// Facts about an inner packet that is delivered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delivered {
    /// Its layer 4 checksum is the pseudo-header sum only.
    pub partial: bool,
    /// The sender says that it continues the super-packet of its predecessor.
    pub may_merge: bool,
    /// It is an Ethernet frame behind its hops ([`ethernet`]).
    pub ethernet: bool,
    /// Which core processes it.
    pub placement: Placement,
}

/// One core's share of one bond.
struct CoreBond {
    tx: Transmit,
    rx: Receive,
    slow_at: Time,
    timing_at: Time,
    /// Cores of the peer that were told the timing of the paths.
    timed_cores: usize,
    /// Earliest time something is to be done.
    next: Time,
    touched: bool,
}

/// The tunnel on one core: sends and receives the packets of all bonds that the core owns.
pub struct Forwarder {
    id: u8,
    node: Arc<Node>,
    /// As of the beginning of the round.
    ownership: Arc<Ownership>,
    bonds: Vec<Option<CoreBond>>,
    /// Bond list the slots were made from.
    list: Arc<crate::bond::Bonds>,
    session: Option<Arc<Session>>,
    /// Slot of the bond whose sending side followed what is shared since these datagrams began: once for all that came together.
    refreshed: Option<usize>,
    /// Everything dropped here, by reason.
    pub drops: DropCounters,
    actions: Vec<Action>,
    wake_up: Time,
}

/// The core that must open a datagram: the receiving core it names, or, where none is named, or none can be read yet, the one
/// that its sending core maps to. `None` for handshakes, which any core takes.
pub fn owner_core(header: &Header, cores: u8) -> Option<u8> {
    if header.kind.is_handshake() {
        None
    } else if header.receiving_core == NOT_TOLD || header.kind == Kind::SealedHeader {
        Some(header.sending_core % cores.max(1))
    } else if header.receiving_core < cores {
        Some(header.receiving_core)
    } else {
        None
    }
}

impl Forwarder {
    /// The forwarder of core `id` of `node`.
    pub fn new(id: u8, node: Arc<Node>) -> Self {
        let list = node.bonds.load_full();
        let ownership = node.ownership.load_full();
        Self {
            id,
            node,
            ownership,
            bonds: Vec::new(),
            list,
            session: None,
            drops: DropCounters::default(),
            actions: Vec::new(),
            refreshed: None,
            wake_up: Time::ZERO,
        }
    }

    /// Number of the bond in a slot.
    pub fn bond_ids(&self) -> impl Iterator<Item = BondId> + '_ {
        let id = |bond: &Option<Arc<Bond>>| bond.as_ref().map(|bond| bond.peer.load().id);
        self.list.list.iter().map(move |bond| id(bond).unwrap_or(BondId(BondId::MAX)))
    }

    /// The node that all cores share.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Entries of send logs that the peers' feedback has made this core look at so far: what it cost.
    #[must_use]
    pub fn feedback_steps(&self) -> u64 {
        let paths = self.bonds.iter().flatten().flat_map(|bond| &bond.tx.paths);
        paths.map(|tx| tx.log.steps() + tx.express.steps()).sum()
    }

    /// Lanes that timers and reports have looked at so far: idle ones are left alone.
    #[must_use]
    pub fn lane_steps(&self) -> u64 {
        self.bonds.iter().flatten().map(|bond| bond.rx.steps()).sum()
    }

    /// Starts a round: follows configuration changes. Whether there are other bonds than before.
    pub fn begin(&mut self, now: Time) -> bool {
        let ownership = self.node.ownership.load();
        if !Arc::ptr_eq(&ownership, &self.ownership) {
            self.ownership = Arc::clone(&ownership);
            // The peers must hear of it.
            self.node.poll_soon(now);
        }
        drop(ownership);
        let list = self.node.bonds.load();
        if Arc::ptr_eq(&list, &self.list) && self.bonds.len() == list.list.len() {
            return false;
        }
        self.list = Arc::clone(&list);
        self.session = None;
        self.bonds.resize_with(self.list.list.len(), || None);
        for (slot, bond) in self.list.list.iter().enumerate() {
            let current = &mut self.bonds[slot];
            match bond {
                Some(bond) if current.as_ref().is_some_and(|c| Arc::ptr_eq(&c.tx.bond, bond)) => {
                    if let Some(current) = current {
                        current.rx.forget_source();
                    }
                }
                Some(bond) => *current = Some(CoreBond::new(self.id, bond)),
                None => *current = None,
            }
        }
        true
    }

    /// Looks at an inner packet once: its headers, its flow, and which core of this node owns it by our own hash and
    /// table. `flow`: where the caller knows it better than the packet tells, as of a later fragment.
    ///
    /// # Errors
    /// `IpMalformed`.
    pub fn classify(&self, packet: &[u8], flow: Option<&FlowKey>) -> Result<Classified, DropReason> {
        let header = IpHeader::parse(packet)?;
        let flow = flow.map_or_else(|| FlowKey::of_parsed(&header, packet), |flow| *flow);
        let hash = self.ownership.hash(&flow, 0);
        let owner = self.owner(&flow, hash, header.dscp);
        Ok(Classified { header, flow, hash, owner, bond: None })
    }

    /// The core of this node that owns a flow of the host with this hash, by its class if some class has cores of its own.
    #[must_use]
    pub fn owner(&self, flow: &FlowKey, hash: u32, dscp: u8) -> u8 {
        let class = || {
            let bond = self.list.allowed_ips.owner(flow.dst).and_then(|slot| self.list.get(slot));
            bond.map_or(Class::Bulk, |bond| bond.classes.of_flow(flow, dscp))
        };
        let has_class_cores = self.ownership.has_class_cores();
        self.ownership.owner_of_class(hash, if has_class_cores { class() as u8 } else { 0 })
    }

    /// Largest inner packet that fits one datagram to a bond's peer, by what this core knows; `None` while that is not measured.
    #[must_use]
    pub fn packet_capacity(&self, bond: BondId) -> Option<u16> {
        self.bonds.get(self.list.slot(bond)?)?.as_ref()?.tx.packet_capacity()
    }

    /// An inner packet or super-packet read from TUN, which this core owns.
    pub fn packet(
        &mut self,
        now: Time,
        offload: &VirtioNetHeader,
        bytes: &mut [u8],
        classified: &Classified,
        out: &mut impl Output,
    ) {
        if let Err(reason) = self.send(now, offload, bytes, classified, out) {
            self.drops.add(reason);
        }
    }

    fn send(
        &mut self,
        now: Time,
        offload: &VirtioNetHeader,
        bytes: &mut [u8],
        classified: &Classified,
        out: &mut impl Output,
    ) -> Result<(), DropReason> {
        let Classified { header, flow, hash, bond, .. } = classified;
        let slot = match bond {
            Some(id) => self.list.slot(*id),
            None => self.list.allowed_ips.owner(header.dst),
        };
        let slot = slot.ok_or(DropReason::NoPeer)?;
        let current = self.bonds.get_mut(slot).and_then(Option::as_mut).ok_or(DropReason::NoPeer)?;
        current.tx.refresh(now);
        if flow.protocol == packet::ip::PROTOCOL_TCP
            && bytes.len() <= SYN_BYTES_MAX
            && let Some(mtu) = current.tx.packet_capacity()
        {
            packet::segment::mss_clamp(bytes, mtu, offload.needs_csum());
        }
        let segmenter = Segmenter::new(offload, bytes)?;
        let reduced = reduce(flow, current.tx.receiving.flow_definition(), header.dscp);
        let pure_ack = flow.protocol == 6 && segmenter.payload_bytes() == 0;
        let counted = if pure_ack { 0 } else { bytes.len() };
        let inner = Inner { header, bytes, segment_bytes: offload.gso_size };
        let treatment = current.tx.flows.packet(now, *hash, (flow, header.dscp), counted, Some(inner));
        if bytes.len() <= SYN_BYTES_MAX
            && let Some(mark) = connection_mark(header, bytes)
        {
            current.tx.receiving.begin_connection(now, &reduced, treatment.core_class as u8, mark);
        }
        let meta = Meta {
            flow: reduced,
            hash: None,
            session_id: 0,
            own_hash: *hash,
            treatment,
            ecn_capable: header.ecn != 0,
        };
        current.touched = true;
        let packet = OfferedPacket { offload, bytes, segmenter };
        current.tx.offer(now, packet, meta, out, &mut self.drops);
        Ok(())
    }

    /// The header of a datagram. One that is sealed is opened in place, whichever core it belongs to (row T7); where that cannot be
    /// done the datagram stays as it is, to be dropped by [`Self::datagrams`]. `None`: no datagram of ours.
    pub fn read_header(&mut self, datagram: &mut [u8]) -> Option<Header> {
        let header = Header::parse(datagram).ok()?;
        if header.kind != Kind::SealedHeader {
            return Some(header);
        }
        self.find_session(header.receiver_index);
        let key = self.session.as_ref().and_then(|session| session.header_open_key(header.sending_core));
        if key.is_some_and(|key| key.open(datagram)) { Header::parse(datagram).ok() } else { Some(header) }
    }

    /// Looks a session up, unless it is the last one again; none if there is no such session.
    fn find_session(&mut self, index: u32) {
        if self.session.as_ref().is_none_or(|session| session.local_index != index) {
            self.session = self.node.session(index);
        }
    }

    /// Datagrams received from one source: `stride` bytes each, the last possibly shorter (UDP GRO).
    /// Every one of them must be for this core or a handshake: see [`owner_core`].
    pub fn datagrams(
        &mut self,
        now: Time,
        source: &Source,
        buffer: &mut [u8],
        stride: usize,
        out: &mut impl Output,
    ) {
        if buffer.is_empty() && stride == 0 {
            self.drops.add(DropReason::TooShort);
        }
        self.refreshed = None;
        for datagram in buffer.chunks_mut(stride.max(1)) {
            if let Err(reason) = self.datagram(now, source, datagram, out) {
                self.drops.add(reason);
            }
        }
    }

    fn datagram(
        &mut self,
        now: Time,
        source: &Source,
        datagram: &mut [u8],
        out: &mut impl Output,
    ) -> Result<(), DropReason> {
        let header = Header::parse(datagram)?;
        if header.kind.is_handshake() {
            let result = self.node.on_handshake(now, source, &header, datagram, &mut self.actions);
            self.run_actions(now, None, out);
            self.refreshed = None;
            return result;
        }
        self.find_session(header.receiver_index);
        let Some(session) = self.session.take() else { return Err(DropReason::UnknownIndex) };
        let result = self
            .bonds
            .get_mut(session.bond)
            .and_then(Option::as_mut)
            .ok_or(DropReason::UnknownIndex)
            .and_then(|current| {
                current.touched = true;
                if self.refreshed.replace(session.bond) != Some(session.bond) {
                    current.tx.refresh(now);
                }
                let mut cx = Context {
                    now,
                    node: &self.node,
                    source,
                    tx: &mut current.tx,
                    actions: &mut self.actions,
                    out: &mut *out,
                    drops: &mut self.drops,
                };
                current.rx.datagram(&mut cx, &session, &header, datagram)
            });
        self.session = Some(session);
        if !self.actions.is_empty() {
            self.run_actions(now, Some(header.sending_core), out);
            self.refreshed = None;
        }
        result
    }

    /// Ends a round: departures, reports, deadlines, timers. Returns when the next one is due at the latest.
    pub fn finish(&mut self, now: Time, out: &mut impl Output) -> Time {
        if self.node.poll_if_due(now, &mut self.actions) {
            self.run_actions(now, None, out);
        }
        let mut next = self.node.next_poll();
        // The cached session must not keep a retired one alive for ever.
        if now >= self.wake_up {
            self.wake_up = now.plus_ms(1_000);
            self.session = None;
        }
        for slot in 0..self.bonds.len() {
            let Some(current) = self.bonds[slot].as_mut() else { continue };
            if current.touched || now >= current.next {
                current.touched = false;
                current.finish(now, &self.node, &mut self.actions, out, &mut self.drops);
            }
            next = next.min(current.next);
            if !self.actions.is_empty() {
                self.run_actions(now, None, out);
            }
        }
        next.max(now.plus_us(50))
    }

    /// Seals and sends what the shared state machines asked for: answers to the peer's core that asked, the rest to
    /// one of its cores after the other.
    fn run_actions(&mut self, now: Time, answer_to: Option<u8>, out: &mut impl Output) {
        for action in std::mem::take(&mut self.actions) {
            match action {
                Action::Datagram { bond, path, route, bytes } => {
                    let dialer = bond.is_some_and(|slot| self.list.get(slot).is_some_and(|bond| bond.dialer));
                    let version = bond
                        .and_then(|slot| self.list.get(slot))
                        .and_then(|bond| bond.path(path))
                        .map_or(0, |path| path.route_version());
                    let target = Target { bond, path, version, peer_core: 0, route, dialer };
                    out.transmit(&target, bytes.len(), &bytes);
                }
                Action::Frames { bond, path, route, frames, pad_to } => {
                    if let Some(current) = self.bonds.get_mut(bond).and_then(Option::as_mut) {
                        current.tx.refresh(now);
                        let core = answer_to.unwrap_or_else(|| current.tx.control_core(path));
                        let datagram =
                            ControlDatagram { path, peer_core: core, route, frames: &frames, pad_to };
                        current.tx.send_control(now, &datagram, out);
                    }
                }
            }
        }
    }

    /// Tells a peer's core which of our cores its flows were given (row T5): hash under our key and core.
    pub fn tell_assignments(
        &mut self,
        now: Time,
        bond: BondId,
        peer_core: u8,
        assigned: &[(u32, u8)],
        out: &mut impl Output,
    ) {
        let slot = self.list.slot(bond);
        let Some(current) = slot.and_then(|slot| self.bonds.get_mut(slot)?.as_mut()) else { return };
        let Some(path) = current.tx.fastest_path() else { return };
        for part in assigned.chunks(ASSIGNMENTS_MAX) {
            let frames: Vec<u8> = part
                .iter()
                .flat_map(|(hash, core)| encode(&frame::Frame::Assignment { hash: *hash, core: *core }))
                .collect();
            current.touched = true;
            current.tx.send_control(now, &ControlDatagram::new(path, peer_core, &frames), out);
        }
    }

    /// Tells all peers that this node stops. For the first core, as its last act.
    pub fn close(&mut self, now: Time, out: &mut impl Output) {
        self.node.close_all(&mut self.actions);
        self.run_actions(now, None, out);
    }

    /// Takes over a new configuration; sends what it asks for.
    pub fn run(&mut self, now: Time, actions: Vec<Action>, out: &mut impl Output) {
        self.begin(now);
        self.actions.extend(actions);
        self.run_actions(now, None, out);
    }
}

impl CoreBond {
    fn new(core: u8, bond: &Arc<Bond>) -> Self {
        Self {
            tx: Transmit::new(core, Arc::clone(bond)),
            rx: Receive::new(core, Arc::clone(bond)),
            slow_at: Time::ZERO,
            timing_at: Time::ZERO,
            timed_cores: 0,
            next: Time::ZERO,
            touched: true,
        }
    }

    fn finish(
        &mut self,
        now: Time,
        node: &Node,
        actions: &mut Vec<Action>,
        out: &mut impl Output,
        drops: &mut DropCounters,
    ) {
        self.tx.refresh(now);
        if now >= self.slow_at {
            self.slow_at = now.plus_ns(SLOW_NS);
            self.slow(now, node, actions, out);
        }
        self.tx.dispatch(now, out, drops);
        self.tx.ask_for_cores(now, out);
        if self.tx.receiving_cores().count() != self.timed_cores {
            // A core that does not know the paths yet cannot put the packets in order which leave now.
            let fastest = self.tx.fastest_path();
            self.send_timing(now, fastest, out);
        }
        let mut next = self.tx.depart(now, out);
        let source = Source {
            wan: 0,
            local: None,
            remote: std::net::SocketAddr::from(([0, 0, 0, 0], 0)),
            socket: None,
            hops: None,
        };
        let mut cx = Context { now, node, source: &source, tx: &mut self.tx, actions, out: &mut *out, drops };
        next = next.min(self.rx.tick(&mut cx));
        self.answer(now, out);
        next = next.min(self.rx.next_report());
        if self.tx.busy() {
            next = next.min(self.slow_at);
        }
        self.next = next.min(now.plus_ns(KEEPALIVE_NS / 4)).min(if self.tx.unannounced() {
            self.slow_at
        } else {
            Time::MAX
        });
    }

    /// Some hundred times a second at most: dead paths, markers, timing, keepalives, counters.
    fn slow(&mut self, now: Time, node: &Node, actions: &mut Vec<Action>, out: &mut impl Output) {
        for (id, heard) in self.tx.find_suspects(now) {
            node.suspect(now, &self.tx.bond, id, actions);
            if heard {
                node.black_hole(now, &self.tx.bond, id);
            }
        }
        if self.tx.doubts_size() {
            node.poll_bond_soon(now, &self.tx.bond);
        }
        self.tx.leave_dead_paths(now);
        self.tx.note_rest();
        self.tx.follow_loss(now);
        self.tx.tick_stampers(now);
        self.tx.markers(now, out);
        if now.since(self.timing_at) >= TIMING_NS && self.tx.ordering(now) {
            self.timing_at = now;
            let over = self.rx.report_path(now, &self.tx);
            self.send_timing(now, over, out);
        }
        self.tx.ask_silent_cores(now, out);
        self.tx.keep_alive(now, KEEPALIVE_NS, out);
        let current = self.tx.session.as_ref().map_or(0, |session| session.number);
        self.rx.publish(current);
        self.rx.end_repair(now, current);
        self.rx.forget_expired(now);
    }

    fn send_timing(&mut self, now: Time, over: Option<u8>, out: &mut impl Output) {
        let mut body = Vec::new();
        for (path, delay_us, jitter_us) in self.tx.timing() {
            body.push(path);
            body.extend((delay_us.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32).to_be_bytes());
            body.extend(jitter_us.to_be_bytes());
        }
        let frames = encode(&frame::Frame::Extension { kind: frame::extension::PATH_TIMING, body: &body });
        let Some(path) = over else { return };
        let cores: Vec<u8> = self.tx.receiving_cores().collect();
        self.timed_cores = cores.len();
        for core in cores {
            self.tx.send_control(now, &ControlDatagram::new(path, core, &frames), out);
        }
    }

    /// Reports and NACKs that are due.
    fn answer(&mut self, now: Time, out: &mut impl Output) {
        let Some(current) = self.tx.session.as_ref().map(|session| session.number) else { return };
        let due = self.rx.due(now, current);
        for (path, (core, told), ranges) in due.nacks {
            let mut frames = vec![0; frame::nack_bytes(ranges.len())];
            if write_nack(&mut frames, 0, path, core, &ranges).is_some() {
                let over = self.tx.fastest_path();
                self.tell(now, over, (core, told), &mut frames, out);
            }
        }
        for ((core, told), entries) in due.reports {
            let mut frames = vec![0; frame::report_bytes(entries.len())];
            if write_report(&mut frames, 0, &entries).is_some() {
                let over = self.rx.report_path(now, &self.tx);
                self.tell(now, over, (core, told), &mut frames, out);
            }
        }
    }

    /// Tells the sending core of a lane about it, also over a second path if the first may have died.
    fn tell(
        &mut self,
        now: Time,
        over: Option<u8>,
        (core, told): (u8, bool),
        frames: &mut [u8],
        out: &mut impl Output,
    ) {
        if !told {
            of_lane_not_told(frames);
        }
        let second = over.and_then(|over| self.tx.second_of(now, over));
        for path in [over, second].into_iter().flatten() {
            self.tx.send_control(now, &ControlDatagram::new(path, core, frames), out);
        }
    }
}
