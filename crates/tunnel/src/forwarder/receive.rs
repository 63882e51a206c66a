//! One core's receiving side of one bond: lane → open → frames → order → out.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use packet::attachment::Placement;
use packet::drop_reason::{DropCounters, DropReason};
use packet::ip::is_extension;
use packet::{IpHeader, array_at, martian};

use super::arrival::note_arrival;
use super::budget::Budget;
use super::due::Due;
use super::held::HeldMemory;
use super::lane::{Place, RxLane};
use super::placement::{labelled, placement_of};
use super::rx_session::{RxSession, lane_id_of, lane_of};
use super::transmit::Transmit;
use super::{Delivered, Output, asked};
use crate::aead::TAG_BYTES;
use crate::bond::{Bond, PATHS_MAX};
use crate::frame::extension::{
    CORE_WANTED, PATH_LIMITS, PATH_LIMITS_SEEN, PATH_TIMING, PROCESSOR_INFO_SEEN, REKEY, REPAIR, SEALED_CORE,
    SESSION_ID,
};
use crate::frame::{self, Frame, PacketHead};
use crate::header::{HEADER_BYTES, Header, Kind, NOT_TOLD};
use crate::keys::Encryption;
use crate::lifecycle::Action;
use crate::memory::Share;
use crate::mode::SteeringMode::ReceiverAssigned;
use crate::node::{Node, Source};
use crate::order::{Admit, Order, Orderer, PathTiming};
use crate::path::{Path, PathState};
use crate::reassemble::{Reassembler, Whole};
use crate::session::Session;
use crate::time::Time;

/// Sessions a core keeps lanes for.
const SESSIONS_KEPT: usize = 3;
/// Packets one (peer core → this core) may hold for order.
const HELD_MAX: usize = 4_096;
/// A peer that uses a path which is gone is told so again after this many datagrams.
const TOLD_EVERY: u64 = 32;

/// A packet held for order.
pub(super) struct HeldPacket {
    bytes: Vec<u8>,
    how: Delivered,
}

/// Order of what one core of the peer sends to this core.
struct Sequence {
    orderer: Orderer<HeldPacket>,
    lost_published: u64,
    held_published: i64,
}

/// One core's receiving side of one bond.
pub(super) struct Receive {
    core: u8,
    pub(super) bond: Arc<Bond>,
    pub(super) sessions: Vec<RxSession>,
    /// Sessions up to this number that are not in the list are not taken up again.
    forgotten: u32,
    /// By sending core × 2, and 1 more where the header names a receiving core.
    sequences: Vec<Option<Box<Sequence>>>,
    reassembler: Reassembler,
    /// Packets held for order.
    held: HeldMemory,
    restarts: u32,
    /// Inner source address that was found to belong to this peer last.
    source: Option<IpAddr>,
    /// Where a datagram came from last that came over its lane's own path.
    pub(super) own_source: Option<(Source, u8)>,
    reported_at: Time,
    gaps: bool,
    pub(super) scratch: Scratch,
    /// Lanes that timers and reports have looked at so far.
    steps: u64,
}

/// Memory for what is worked on.
#[derive(Default)]
pub(super) struct Scratch {
    /// A packet that was in pieces.
    whole: Vec<u8>,
    /// Sealed bytes of the datagram being opened, where the lane's repair needs them.
    pub(super) sealed: Vec<u8>,
    /// The datagram's lane has symbols that may tell something now.
    pub(super) waits_for_repair: bool,
}

/// An inner packet that has arrived, besides its bytes.
#[derive(Clone, Copy, Debug)]
struct Arrival {
    /// Its order's place in [`Receive::sequences`].
    sequence: usize,
    /// Path whose progress it shows; [`NOT_TOLD`] for none.
    over: u8,
    /// Its place in the order, if it has one.
    order: Option<Order>,
    /// Everything else.
    how: Delivered,
}

/// Surroundings of a datagram that is processed.
pub(super) struct Context<'a, O: Output> {
    pub now: Time,
    pub node: &'a Node,
    pub source: &'a Source,
    pub tx: &'a mut Transmit,
    pub actions: &'a mut Vec<Action>,
    pub out: &'a mut O,
    pub drops: &'a mut DropCounters,
}

impl Receive {
    pub fn new(core: u8, bond: Arc<Bond>) -> Self {
        let share = || Share::new(Arc::clone(&bond.memory));
        Self {
            core,
            reassembler: Reassembler::within(share()),
            held: HeldMemory::new(share()),
            bond,
            sessions: Vec::new(),
            forgotten: 0,
            sequences: Vec::new(),
            restarts: 0,
            source: None,
            own_source: None,
            reported_at: Time::ZERO,
            gaps: false,
            scratch: Scratch::default(),
            steps: 0,
        }
    }

    /// Refuses a datagram before the work of opening it.
    fn check<O: Output>(
        &self,
        cx: &Context<'_, O>,
        session: &Arc<Session>,
        header: &Header,
        lane_id: usize,
    ) -> Result<(), DropReason> {
        let known = self.sessions.iter().find(|known| Arc::ptr_eq(&known.session, session));
        let lane = known.and_then(|known| known.lanes.get(lane_id)).and_then(Option::as_deref);
        if let Some(lane) = lane {
            lane.check(header.counter)?;
        }
        if header.kind == Kind::Clear {
            // Nobody vouches for these: they make no path and move no window far.
            let path_known = cx.tx.paths.iter().any(|tx| tx.path.id == header.path && tx.path.usable());
            if !path_known {
                return Err(DropReason::CleartextRefused);
            }
            lane.map_or_else(|| RxLane::check_first(header.counter), |lane| lane.check_jump(header.counter))?;
        }
        Ok(())
    }

    /// Authenticates one datagram of session `session` and acts on its frames; then on those that repair symbols bring back.
    pub fn datagram<O: Output>(
        &mut self,
        cx: &mut Context<'_, O>,
        session: &Arc<Session>,
        header: &Header,
        datagram: &mut [u8],
    ) -> Result<(), DropReason> {
        let result = self.receive(cx, session, header, datagram, false);
        if std::mem::take(&mut self.scratch.waits_for_repair) {
            self.restore(cx, session, header);
        }
        result
    }

    /// As [`Self::datagram`], for one datagram. `restored`: it was lost and is back from a symbol.
    pub(super) fn receive<O: Output>(
        &mut self,
        cx: &mut Context<'_, O>,
        session: &Arc<Session>,
        header: &Header,
        datagram: &mut [u8],
        restored: bool,
    ) -> Result<(), DropReason> {
        let lane_id = self.lane_id(session, header)?;
        let bytes = datagram.len();
        match self.check(cx, session, header, lane_id) {
            Err(DropReason::Replayed) if self.is_copy(cx, header) => return Ok(()),
            checked => checked?,
        }
        let covered = self.set_aside(session, lane_id, header.kind, datagram);
        let plaintext = open(session, header, datagram)?;
        // Only now: what is not authentic must not push a session and its replay windows out.
        let at = self.session_at(session).ok_or(DropReason::TooOld)?;
        if header.kind != Kind::Clear && session.confirm() {
            cx.node.confirmed(session);
            cx.tx.refresh(cx.now);
        }
        self.follow_restart();
        let path_at = self.path_at(cx, session, header.path)?;
        let foreign = restored || !self.came_by_itself(cx, path_at, header);
        let (place, copied) = self.commit(cx, (at, lane_id), header, bytes, (foreign, restored))?;
        if covered {
            self.keep_sealed((at, lane_id), header.counter);
        }
        let lane = self.sessions[at].lane(lane_id).ok_or(DropReason::PeerMemory)?;
        self.gaps |= lane.has_gaps();
        let (unlisted, packets) = (!std::mem::replace(&mut lane.told.listed, true), lane.packets);
        // Unauthenticated datagrams (row T11 "off") say nothing about where the peer is.
        if place == Place::Newest && header.kind != Kind::Clear && lane.heard != cx.now {
            lane.heard = cx.now;
            self.bond.note_core_heard(cx.now, header.sending_core);
            if let Some(path_at) = path_at {
                note_arrival(cx, &self.bond, path_at, header);
            }
        }
        if unlisted {
            self.sessions[at].listed.push(lane_id as u32);
        }
        if path_at.is_none() && packets % TOLD_EVERY == 1 {
            cx.node.tell_removed(&self.bond, header.path, cx.actions);
        }
        if matches!(place, Place::Recovered | Place::Copied) && !restored {
            self.note_repeat(cx, at, session.peer_cores, header, (place, bytes));
        }
        if copied {
            // What it holds was forwarded when its copy came.
            self.note_original(cx.now, (at, lane_id), header);
            return Ok(());
        }
        // A repeat came over another path than its own: it does not show how far that has come.
        let over =
            if foreign || place == Place::Recovered || path_at.is_none() { NOT_TOLD } else { header.path };
        let (data, result) = self.frames(cx, session, header, over, plaintext);
        if data
            && !foreign
            && place != Place::Recovered
            && let Some(lane) = self.sessions[at].lanes[lane_id].as_deref_mut()
        {
            lane.note_data(cx.now, header.counter);
        }
        result
    }

    /// The lane of a datagram within its session, if core and path make sense.
    fn lane_id(&self, session: &Session, header: &Header) -> Result<usize, DropReason> {
        // A lane has one reader, named or not, and that one alone has its replay window.
        let reads = match header.receiving_core {
            NOT_TOLD if session.receives.may_name_none() => {
                super::owner_core(header, session.own_cores()) == Some(self.core)
            }
            core => core == self.core,
        };
        if !reads || header.sending_core >= session.peer_cores || header.path == NOT_TOLD {
            return Err(DropReason::CoreOutOfRange);
        }
        Ok(lane_id_of(session.peer_cores, header.path, header))
    }

    /// Where the lanes of a session are. `None` for one that was pushed out by newer ones: its windows are gone, so
    /// nothing of it may be believed again.
    fn session_at(&mut self, session: &Arc<Session>) -> Option<usize> {
        if let Some(at) = self.sessions.iter().position(|known| Arc::ptr_eq(&known.session, session)) {
            return Some(at);
        }
        if session.number <= self.forgotten {
            return None;
        }
        if self.sessions.len() >= SESSIONS_KEPT {
            let oldest = (0..self.sessions.len()).min_by_key(|at| self.sessions[*at].session.number)?;
            self.forgotten = self.forgotten.max(self.sessions.swap_remove(oldest).session.number);
            if session.number <= self.forgotten {
                return None;
            }
        }
        let memory = Share::new(Arc::clone(&self.bond.memory));
        self.sessions.push(RxSession {
            session: Arc::clone(session),
            lanes: Vec::new(),
            listed: Vec::new(),
            repairing: Vec::new(),
            memory,
        });
        Some(self.sessions.len() - 1)
    }

    /// Where the datagram's path stands in the sending side's list; a listener learns new paths here.
    ///
    /// A dialer knows its paths: one it took away (`None`) while nobody could be told is told now, and what came over it is
    /// as good as any other datagram.
    fn path_at<O: Output>(
        &self,
        cx: &mut Context<'_, O>,
        session: &Session,
        id: u8,
    ) -> Result<Option<usize>, DropReason> {
        if let Some(at) = cx.tx.paths.iter().position(|tx| tx.path.id == id) {
            return Ok(Some(at));
        }
        let unknown = if self.bond.dialer { Ok(None) } else { Err(DropReason::NoPath) };
        // A late datagram of an older epoch must not bring its path ids back.
        if self.bond.current.load().as_ref().is_some_and(|current| current.number > session.number) {
            return unknown;
        }
        cx.node.on_new_path(cx.now, &self.bond, id, cx.source);
        cx.tx.refresh(cx.now);
        cx.tx.paths.iter().position(|tx| tx.path.id == id).map_or(unknown, |at| Ok(Some(at)))
    }

    /// Drops keys and windows of sessions whose time is over: a core on which nothing arrives must not keep them.
    pub fn forget_expired(&mut self, now: Time) {
        let forgotten = &mut self.forgotten;
        self.sessions.retain(|known| {
            let expired = known.session.expired(now);
            if expired {
                *forgotten = (*forgotten).max(known.session.number);
            }
            !expired
        });
    }

    /// A peer that restarted numbers its stamps anew.
    fn follow_restart(&mut self) {
        let restarts = self.bond.restarts.load(Relaxed);
        if restarts != self.restarts {
            self.restarts = restarts;
            self.publish_totals();
            for sequence in self.sequences.iter().flatten() {
                self.bond.totals.held_packets.fetch_sub(sequence.held_published, Relaxed);
            }
            self.sequences.clear();
            self.held.clear();
            self.reassembler.clear();
        }
    }

    fn frames<O: Output>(
        &mut self,
        cx: &mut Context<'_, O>,
        session: &Session,
        header: &Header,
        over: u8,
        plaintext: &[u8],
    ) -> (bool, Result<(), DropReason>) {
        let (mut at, mut data, mut budget) = (0, false, Budget::default());
        let mut placement = placement_of(session, header);
        let result = loop {
            let frame = match frame::parse(plaintext, at) {
                Ok(Some((frame, next))) => {
                    at = next;
                    frame
                }
                Ok(None) => break Ok(()),
                Err(reason) => break Err(reason),
            };
            if let Frame::Extension { kind: SEALED_CORE | SESSION_ID, body } = frame {
                match labelled(session, header, &frame, body) {
                    Some(label) => placement = label,
                    None => cx.drops.add(DropReason::FrameUnknown),
                }
                continue;
            }
            let carries = matches!(frame, Frame::Packet { .. } | Frame::Piece { .. });
            data |= carries;
            if header.kind == Kind::Clear && !carries {
                break Err(DropReason::CleartextRefused);
            }
            if !budget.allows(&frame) {
                continue;
            }
            if let Err(reason) = self.frame(cx, session, header, (over, placement), frame, &mut budget) {
                break Err(reason);
            }
        };
        let answers = std::mem::take(&mut budget.answers);
        if !answers.is_empty()
            && !cx.node.answer(cx.now, &self.bond, header.path, cx.source, answers, cx.actions)
        {
            budget.refuse();
        }
        cx.drops.add_n(DropReason::FrameBudget, budget.refused());
        (data, result)
    }

    fn frame<O: Output>(
        &mut self,
        cx: &mut Context<'_, O>,
        session: &Session,
        header: &Header,
        (over, placement): (u8, Placement),
        frame: Frame<'_>,
        budget: &mut Budget,
    ) -> Result<(), DropReason> {
        match frame {
            Frame::Packet { head, body, .. } => {
                let PacketHead { order, partial, group, ethernet, .. } = head;
                let how = Delivered { partial, may_merge: group, ethernet, placement };
                self.packet(cx, Arrival { sequence: sequence_of(header), over, order, how }, body);
            }
            Frame::Piece { head, body, .. } => self.piece(cx, header, (over, placement), &head, body),
            Frame::Marker { stamp } => {
                if let Some(sequence) = sequence(&mut self.sequences, sequence_of(header), false) {
                    sequence.orderer.marker(cx.now, header.path, stamp);
                    release(sequence, cx, &self.bond, &mut self.held);
                }
            }
            Frame::Report(report) => {
                cx.tx.on_report(cx.now, session.number, header.sending_core, &report, budget);
            }
            Frame::Nack(nack) => cx.tx.on_nack(cx.now, session.number, header.sending_core, &nack, budget),
            Frame::Extension { kind: PATH_TIMING, body } => self.path_timing(cx, sequence_of(header), body),
            Frame::ProcessorInfo(bytes) => {
                cx.node.on_processor_info(cx.now, &self.bond, bytes, &mut budget.answers)?;
            }
            Frame::Extension { kind: REKEY, .. } => session.spend(),
            Frame::Extension { kind: PROCESSOR_INFO_SEEN, body } => {
                cx.node.on_processor_info_seen(&self.bond, body);
            }
            Frame::Extension { kind: PATH_LIMITS, body } => {
                cx.node.on_path_limits(cx.now, &self.bond, body, &mut budget.answers)?;
            }
            Frame::Extension { kind: PATH_LIMITS_SEEN, body } => {
                cx.node.on_path_limits_seen(&self.bond, body);
            }
            Frame::Extension { kind: REPAIR, body } => self.on_repair(cx, session, header, body, budget),
            Frame::Extension { kind: CORE_WANTED, body } if session.receives == ReceiverAssigned => {
                asked::pass_on(body, header.sending_core, self.bond.slot, cx.out);
            }
            Frame::Extension { .. } => cx.drops.add(DropReason::FrameUnknown),
            Frame::Assignment { hash, core } => cx.tx.on_assignment(cx.now, session.number, hash, core),
            Frame::Close { .. } => cx.node.closed(cx.now, &self.bond, session.number),
            frame => {
                cx.node.on_control(cx.now, &self.bond, header.path, cx.source, &frame, &mut budget.answers);
            }
        }
        Ok(())
    }

    fn piece<O: Output>(
        &mut self,
        cx: &mut Context<'_, O>,
        header: &Header,
        (over, placement): (u8, Placement),
        head: &frame::PieceHead,
        body: &[u8],
    ) {
        let Some(sequence) = sequence(&mut self.sequences, sequence_of(header), true) else { return };
        // All stamps of this path below the piece's have left before it.
        sequence.orderer.marker(cx.now, over, head.order.stamp.wrapping_sub(1));
        let mut whole = std::mem::take(&mut self.scratch.whole);
        match self.reassembler.push(cx.now, header.sending_core, head, body) {
            Ok(Some(Whole { bytes, .. })) => {
                whole.clear();
                whole.extend_from_slice(bytes);
                // Its pieces may have taken several paths: it says nothing about how far one has come.
                let arrival = Arrival {
                    sequence: sequence_of(header),
                    over: NOT_TOLD,
                    order: Some(head.order),
                    how: Delivered {
                        partial: head.partial,
                        may_merge: head.group,
                        ethernet: head.ethernet,
                        placement,
                    },
                };
                self.packet(cx, arrival, &whole);
            }
            Ok(None) => {}
            Err(reason) => cx.drops.add(reason),
        }
        self.scratch.whole = whole;
    }

    fn packet<O: Output>(&mut self, cx: &mut Context<'_, O>, arrival: Arrival, body: &[u8]) {
        let Arrival { sequence: place, over, order, how } = arrival;
        let checked = if how.ethernet {
            super::ethernet::check(&self.bond, body)
        } else {
            self.check_source(cx.node, body)
        };
        let refused = checked.err();
        if let Some(reason) = refused {
            cx.drops.add(reason);
        } else if !how.ethernet && cx.tx.flows.classes().look_at_names() {
            cx.tx.flows.received(cx.now, &cx.node.ownership.load(), body);
        }
        let Some(order) = order else {
            if refused.is_none() {
                cx.out.deliver(self.bond.slot, body, how);
            }
            return;
        };
        let Some(sequence) = sequence(&mut self.sequences, place, true) else { return };
        match sequence.orderer.admit(cx.now, over, order) {
            // Its successors must not wait for a packet that came and was refused.
            _ if refused.is_some() => {}
            Admit::Deliver | Admit::Late => cx.out.deliver(self.bond.slot, body, how),
            Admit::Hold => match self.held.keep(body) {
                Some(bytes) => {
                    let held = HeldPacket { bytes, how };
                    if let Err(held) = sequence.orderer.hold(cx.now, over, order, held) {
                        cx.drops.add(DropReason::ReorderFull);
                        let how = Delivered { may_merge: false, ..held.how };
                        cx.out.deliver(self.bond.slot, &held.bytes, how);
                        self.held.recycle(held.bytes);
                    }
                }
                None => {
                    sequence.orderer.pass(order);
                    cx.drops.add(DropReason::ReorderFull);
                    cx.out.deliver(self.bond.slot, body, Delivered { may_merge: false, ..how });
                }
            },
        }
        release(sequence, cx, &self.bond, &mut self.held);
    }

    /// The inner source must belong to this peer (WireGuard's cryptokey routing), for every packet, whatever else is allowed; and
    /// neither address may be one that no router passes on.
    fn check_source(&mut self, node: &Node, packet: &[u8]) -> Result<(), DropReason> {
        let (source, destination) = addresses(packet).ok_or(DropReason::IpMalformed)?;
        if self.source == Some(source) && !has_options(packet) && martian::of_address(destination).is_none() {
            return Ok(());
        }
        let header = IpHeader::parse_quoted(packet)?;
        martian::check_link(&header, packet)?;
        let tenant = self.bond.peer.load().tenant;
        if node.bonds.load().allowed_ips.owner_in(tenant, source) != Some(self.bond.slot) {
            return Err(DropReason::SourceNotAllowed);
        }
        // A link-local source may send to neighbors only: each packet is looked at.
        self.source = martian::of_source(source).is_none().then_some(source);
        Ok(())
    }

    /// Forgets what [`Self::check_source`] remembers: the configuration changed.
    pub fn forget_source(&mut self) {
        self.source = None;
    }

    /// The sender told the relative delays of its paths.
    fn path_timing<O: Output>(&mut self, cx: &mut Context<'_, O>, place: usize, body: &[u8]) {
        let timing: Vec<PathTiming> = body
            .chunks_exact(9)
            .take(PATHS_MAX)
            .map(|entry| PathTiming {
                path: entry[0],
                delay_us: i64::from(i32::from_be_bytes([entry[1], entry[2], entry[3], entry[4]])),
                jitter_us: u32::from_be_bytes([entry[5], entry[6], entry[7], entry[8]]),
            })
            .collect();
        // A repeat takes a NACK over the fastest way and the datagram back.
        let rtt_us = cx
            .tx
            .paths
            .iter()
            .filter(|tx| tx.path.carries())
            .map(|tx| tx.path.rtt_us())
            .filter(|rtt| *rtt > 0)
            .min();
        let recovery_us = rtt_us.map(|rtt| rtt + rtt / 2 + 20_000);
        if let Some(sequence) = sequence(&mut self.sequences, place, true) {
            sequence.orderer.set_paths(&timing, recovery_us);
        }
    }

    /// Deadlines of held packets; returns the next one.
    pub fn tick<O: Output>(&mut self, cx: &mut Context<'_, O>) -> Time {
        let mut next = Time::MAX;
        cx.drops.add_n(DropReason::ReassemblyTimeout, self.reassembler.expire(cx.now) as u64);
        next = next.min(self.reassembler.next_deadline().unwrap_or(next));
        for sequence in self.sequences.iter_mut().flatten() {
            release(sequence, cx, &self.bond, &mut self.held);
            if let Some(deadline) = sequence.orderer.next_deadline() {
                next = next.min(deadline);
            }
        }
        if self.gaps { next.min(cx.now.plus_ms(2)) } else { next }
    }

    /// Reports and NACKs that are due now, for lanes of the session we send with.
    pub fn due(&mut self, now: Time, current: u32) -> Due {
        let mut due = Due { reports: Vec::new(), nacks: Vec::new() };
        let report = now >= self.bond.next_report(self.reported_at);
        if !report && !self.gaps {
            return due;
        }
        let asked = std::mem::take(&mut self.gaps);
        let Self { sessions, bond, steps, gaps, .. } = self;
        for known in sessions.iter_mut().filter(|known| known.session.number == current) {
            let cores = usize::from(known.session.peer_cores).max(1);
            let (lanes, mut full) = (&mut known.lanes, 0);
            known.listed.retain(|&id| {
                let Some(Some(lane)) = lanes.get_mut(id as usize) else { return false };
                *steps += 1;
                let (path, end) = lane_of(id as usize, cores);
                if asked && lane.has_gaps() {
                    let missing = lane.missing(now);
                    if !missing.is_empty() {
                        due.nacks.push((path, end, missing));
                    }
                }
                *gaps |= lane.has_gaps();
                if report && lane.unreported() && !due.add(end, || lane.report(now, path)) {
                    full += 1;
                }
                lane.told.listed = lane.has_gaps() || lane.unreported();
                if !lane.told.listed {
                    publish_lane(bond, lane, path);
                }
                lane.told.listed
            });
            // Whoever found no room in this report is in the next.
            let first = known.listed.len().saturating_sub(full);
            known.listed.rotate_left(first);
        }
        if report {
            self.reported_at = now;
        }
        due
    }

    /// Which path carries the next report: the quickest, and in turn with it another that is about as quick, so that a path
    /// that dies takes only every other report with it. One that is slower would make the sender believe that datagrams
    /// are lost, or the path of the report dead.
    ///
    /// Where no path carries anything, reports still go over one that is suspect: without them the peer would suspect it too,
    /// send no reports either, and neither side would believe the other again.
    pub fn report_path(&self, now: Time, tx: &Transmit) -> Option<u8> {
        let carrying = || tx.paths.iter().map(|tx| &tx.path).filter(|path| path.carries());
        let Some((quickest_us, quickest)) = carrying().map(|path| (path.delay_us(), path.id)).min() else {
            let suspect =
                tx.paths.iter().map(|tx| &tx.path).filter(|path| path.state() == PathState::Suspect);
            return suspect.map(|path| (path.delay_us(), path.id)).min().map(|(_, id)| id);
        };
        let rtt_us = carrying().find(|path| path.id == quickest).map_or(0, |path| path.rtt_us());
        let able = |path: &&Arc<Path>| {
            path.id != quickest
                && path.delay_us() <= quickest_us + REPORT_SPREAD_US
                && i64::from(path.rtt_us()) <= i64::from(rtt_us) + 2 * REPORT_SPREAD_US
                && path.rate() >= REPORT_RATE_MIN
        };
        let second = carrying().filter(able).map(|path| (path.delay_us(), path.id)).min();
        Some(second.filter(|_| self.bond.report_turn(now) % 2 == 1).map_or(quickest, |(_, id)| id))
    }

    /// Whether a report may be due, and when.
    pub fn next_report(&self) -> Time {
        let unreported = |known: &RxSession| {
            known
                .listed
                .iter()
                .any(|id| known.lanes[*id as usize].as_ref().is_some_and(|lane| lane.unreported()))
        };
        let any = self.sessions.iter().any(unreported);
        if any { self.bond.next_report(self.reported_at) } else { Time::MAX }
    }

    /// Lanes that timers and reports have looked at so far.
    pub const fn steps(&self) -> u64 {
        self.steps
    }

    /// Adds this core's numbers to the shared ones. `current`: the session we send with.
    pub fn publish(&mut self, current: u32) {
        let Self { sessions, bond, steps, .. } = self;
        for known in sessions.iter_mut() {
            let cores = usize::from(known.session.peer_cores).max(1);
            let (lanes, of_current) = (&mut known.lanes, known.session.number == current);
            known.listed.retain(|&id| {
                let Some(Some(lane)) = lanes.get_mut(id as usize) else { return false };
                *steps += 1;
                publish_lane(bond, lane, lane_of(id as usize, cores).0);
                // Nobody is told about lanes of another session.
                lane.told.listed = of_current;
                of_current
            });
        }
        self.publish_totals();
    }

    fn publish_totals(&mut self) {
        for sequence in self.sequences.iter_mut().flatten() {
            let stats = sequence.orderer.stats();
            let (lost, held) = (stats.declared_lost, stats.held_now as i64);
            self.bond.totals.declared_lost.fetch_add(lost - sequence.lost_published, Relaxed);
            self.bond.totals.held_packets.fetch_add(held - sequence.held_published, Relaxed);
            sequence.lost_published = lost;
            sequence.held_published = held;
        }
    }
}

/// Place of a datagram's order among the sequences.
fn sequence_of(header: &Header) -> usize {
    2 * usize::from(header.sending_core) + usize::from(header.receiving_core != NOT_TOLD)
}

/// Order state of one lane over all paths, made when it is first needed.
fn sequence(sequences: &mut Vec<Option<Box<Sequence>>>, core: usize, make: bool) -> Option<&mut Sequence> {
    if sequences.len() <= core {
        if !make {
            return None;
        }
        sequences.resize_with(core + 1, || None);
    }
    if make && sequences[core].is_none() {
        sequences[core] = Some(Box::new(Sequence {
            orderer: Orderer::new(HELD_MAX),
            lost_published: 0,
            held_published: 0,
        }));
    }
    sequences[core].as_deref_mut()
}

/// Hands out every held packet whose turn has come.
fn release<O: Output>(
    sequence: &mut Sequence,
    cx: &mut Context<'_, O>,
    bond: &Bond,
    memory: &mut HeldMemory,
) {
    while let Some(held) = sequence.orderer.pop_ready(cx.now) {
        cx.out.deliver(bond.slot, &held.bytes, held.how);
        memory.recycle(held.bytes);
    }
}

/// Adds a lane's traffic to that of its path.
fn publish_lane(bond: &Bond, lane: &mut RxLane, path: u8) {
    let (datagrams, bytes) = lane.take_traffic();
    if datagrams > 0
        && let Some(path) = bond.paths.load().iter().find(|known| known.id == path)
    {
        path.traffic.rx_datagrams.fetch_add(datagrams, Relaxed);
        path.traffic.rx_bytes.fetch_add(bytes, Relaxed);
    }
}

/// A path takes a part of the reports that is at most this much slower than the quickest, µs, …
const REPORT_SPREAD_US: i64 = 15_000;
/// … and has at least this rate, bytes per second (1 Mbit/s): reports are some 50 kbit/s.
const REPORT_RATE_MIN: u64 = 125_000;

/// Decrypts in place, by the kind of the datagram and what the session allows.
fn open<'a>(session: &Session, header: &Header, datagram: &'a mut [u8]) -> Result<&'a [u8], DropReason> {
    let key = session.open_key(header.sending_core).ok_or(DropReason::CoreOutOfRange)?;
    match header.kind {
        Kind::Data => key.open(header, datagram).map(|plaintext| &*plaintext),
        Kind::Partial if session.may_be_partial() && !session.is_raised() => {
            key.open_partial(header, datagram).map(|plaintext| &*plaintext)
        }
        Kind::Clear if session.encryption == Encryption::Off && !session.is_raised() => {
            let end = datagram
                .len()
                .checked_sub(TAG_BYTES)
                .filter(|end| *end >= HEADER_BYTES)
                .ok_or(DropReason::TooShort)?;
            Ok(&datagram[HEADER_BYTES..end])
        }
        Kind::Partial | Kind::Clear => Err(DropReason::CleartextRefused),
        // Its first reader could not open it: no such mode was agreed on.
        Kind::SealedHeader => Err(DropReason::UnknownType),
        Kind::Initiation | Kind::Response | Kind::Cookie => Err(DropReason::UnknownType),
    }
}

/// Source and destination of an IP packet; `None` when it is too short to have them.
fn addresses(packet: &[u8]) -> Option<(IpAddr, IpAddr)> {
    match packet.first()? >> 4 {
        4 => Some((IpAddr::from(array_at::<4>(packet, 12)?), IpAddr::from(array_at::<4>(packet, 16)?))),
        6 => Some((IpAddr::from(array_at::<16>(packet, 8)?), IpAddr::from(array_at::<16>(packet, 24)?))),
        _ => None,
    }
}

/// Whether there is more in front of the upper layer than the fixed header of its version: where a sender may choose routers.
fn has_options(packet: &[u8]) -> bool {
    match packet.first() {
        Some(first) if first >> 4 == 6 => packet.get(6).is_none_or(|next| is_extension(*next)),
        first => first != Some(&0x45),
    }
}
