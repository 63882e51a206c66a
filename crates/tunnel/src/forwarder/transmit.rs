//! One core's sending side of one bond: queue → path → datagram → departure.
//!
//! 1. [`Transmit::offer`] takes an inner packet (or super-packet) whose receiving core is known.
//! 2. [`Transmit::dispatch`] asks the scheduler where the next run of segments goes, books the path and
//!    writes the run into that path's [`SendLog`] (`build.rs`).
//! 3. [`Transmit::depart`] (`depart.rs`) seals what is due and hands it out, a GSO run at a time.
//! 4. Reports and NACKs come back: [`super::feedback`].

use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::Arc;

use packet::drop_reason::{DropCounters, DropReason};
use packet::flow::FlowKey;
use packet::segment::{SegmentKind, Segmenter};
use packet::vnet::VirtioNetHeader;

use super::build::{log_capacity, stamper};
use super::class_path::ClassQueues;
use super::depart::Cover;
use super::flows::{Flows, Treatment};
use super::receiving_core::{Destination, FlowsWait, ReceivingCores};
use super::repair::PathRepair;
use super::tx_lane::TxLanes;
use super::{Output, Target};
use crate::aead::TAG_BYTES;
use crate::bond::Bond;
use crate::class::CLASSES;
use crate::frame::PacketHead;
use crate::header::HEADER_BYTES;
use crate::mode::Heading;
use crate::order::{Order, Stamper};
use crate::path::{Path, WIRE_OVERHEAD_BYTES};
use crate::queue::{CodelVerdict, FqCodel, Item};
use crate::schedule::{Choice, ClassPolicy, PathView, ahead_us, choose};
use crate::send_log::SendLog;
use crate::session::Session;
use crate::time::Time;

/// Segments and bytes of one scheduling decision at most.
const RUN_SEGMENTS: usize = 44;
const RUN_BYTES: usize = 66_000;
/// Bytes that a datagram adds to its packet: header, tag, and the head of the packet's frame.
const SEGMENT_OVERHEAD_BYTES: usize = 42;
/// Queue limits of one core and bond.
const QUEUE_BYTES: usize = 8 << 20;
const QUEUE_ITEMS: usize = 4_096;
/// The same of urgent classes: what had to wait long is worth nothing to them.
const URGENT_BYTES: usize = 512 << 10;

/// Datagrams sent again that are remembered, in case the path dies that they went over: what one path loses in the time that takes.
const REPEATED_KEPT: usize = 64;
/// Stamps are used so long after there was reason for them.
const ORDERED_MS: u64 = 1_000;

/// Properties of an inner packet besides its bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Meta {
    /// The flow, as this bond defines it.
    pub flow: FlowKey,
    /// Hash under the peer's key; `None` until the peer told about its cores.
    pub hash: Option<u32>,
    /// Session-ID of the flow, where the session has some (row T9).
    pub session_id: u64,
    /// Hash under our own key, by which [`Flows`] knows it.
    pub own_hash: u32,
    /// Its class, and whether it may overtake.
    pub treatment: Treatment,
    /// Congestion can be marked instead of dropped.
    pub ecn_capable: bool,
}

/// Flow of a packet, as far as its datagram depends on it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flow {
    /// Hash under the peer's key.
    pub hash: u32,
    /// Receiving core and label.
    pub heading: Heading,
    /// Hash under our own key.
    pub own_hash: u32,
    /// Its class, and whether it may overtake.
    pub treatment: Treatment,
}

impl Flow {
    /// Flow of a packet with this hash under the peer's key, which goes there.
    pub const fn new(hash: u32, heading: Heading, meta: &Meta) -> Self {
        Self { hash, heading, own_hash: meta.own_hash, treatment: meta.treatment }
    }
}

/// An inner packet or super-packet that is to be sent, and its segments.
pub(super) struct OfferedPacket<'a> {
    /// Its virtio header.
    pub offload: &'a VirtioNetHeader,
    /// Its bytes.
    pub bytes: &'a [u8],
    /// Both as segments.
    pub segmenter: Segmenter<'a>,
}

/// A packet waiting in the queue.
pub(super) struct Waiting {
    buffer: Vec<u8>,
    offload: VirtioNetHeader,
    meta: Meta,
    /// It is an Ethernet frame.
    frame: bool,
    /// Next segment to send, and the segment payload the count refers to.
    next: usize,
    segment_payload: usize,
    left: usize,
    at: Time,
}

/// The segments of a frame, or of an IP packet.
fn segments<'a>(
    frame: bool,
    offload: &VirtioNetHeader,
    buffer: &'a [u8],
) -> Result<Segmenter<'a>, DropReason> {
    if frame { super::ethernet::segmenter(offload, buffer) } else { Segmenter::new(offload, buffer) }
}

impl Item for Waiting {
    fn bytes(&self) -> usize {
        self.left
    }
    fn enqueued_at(&self) -> Time {
        self.at
    }
    fn ecn_capable(&self) -> bool {
        self.meta.ecn_capable
    }
}

/// A path as this core sends on it.
pub(super) struct PathTx {
    pub path: Arc<Path>,
    /// Paced datagrams.
    pub log: SendLog,
    /// Datagrams of sparse flows and urgent classes, which leave at once.
    pub express: SendLog,
    /// Packets and bytes of each class since the path's counters had them.
    pub classes: [(u64, u64); CLASSES],
    /// Last time a report confirmed anything.
    pub progress_at: Time,
    /// When flows began to move: the numbers that the next datagrams of both logs had.
    moved_from: [u64; 2],
    /// The same when flows that the peer gave cores began to wait.
    assigned_from: [u64; 2],
    /// Marker bookkeeping: last ordered datagram.
    pub ordered_at: Time,
    /// Last keepalive of each of our tuples.
    pub announced: Option<(u32, Time)>,
    /// Whether it was usable when [`Transmit::leave_dead_paths`] last looked.
    pub in_use: bool,
    /// Tuples learned from the peer's datagrams (listener): where lanes to a receiving core go.
    pub tuples: Vec<Option<(u32, std::net::SocketAddr)>>,
    /// The tuple learned last.
    pub newest_tuple: Option<(u32, std::net::SocketAddr)>,
    /// Repair symbols.
    pub repair: PathRepair,
}

impl PathTx {
    fn new(path: Arc<Path>, now: Time) -> Self {
        Self {
            path,
            log: SendLog::new(),
            express: SendLog::new(),
            classes: [(0, 0); CLASSES],
            progress_at: now,
            moved_from: [0; 2],
            assigned_from: [0; 2],
            ordered_at: Time::ZERO,
            announced: None,
            in_use: false,
            tuples: Vec::new(),
            newest_tuple: None,
            repair: PathRepair::default(),
        }
    }

    /// Flows begin to move: what both logs hold now goes before them.
    pub fn mark(&mut self) {
        self.moved_from = [self.log.next_number(), self.express.next_number()];
    }

    /// As [`Self::mark`], for flows that the peer gave cores.
    pub fn mark_assigned(&mut self) {
        self.assigned_from = [self.log.next_number(), self.express.next_number()];
    }

    /// Whether anything from before that waits or is outstanding for a core.
    fn holds_assigned(&self, core: u8) -> bool {
        let [log, express] = self.assigned_from;
        self.log.holds_for(core, log) || self.express.holds_for(core, express)
    }

    /// Whether anything from before that waits or is outstanding for a core.
    fn holds_for(&self, core: u8) -> bool {
        let [log, express] = self.moved_from;
        self.log.holds_for(core, log) || self.express.holds_for(core, express)
    }

    /// Sends what is for `core` to the socket of the peer that was heard last, whichever core's it is.
    pub fn use_newest_tuple(&mut self, core: u8) {
        if let Some(tuple) = self.tuples.get_mut(usize::from(core)) {
            *tuple = self.newest_tuple;
        }
    }

    /// Where datagrams that `peer_core` reads go: the learned tuple of the current route, else the route.
    pub fn target(&self, bond: &Bond, peer_core: u8) -> Target {
        let mut route = self.path.route();
        if let Some(Some((version, remote))) = self.tuples.get(usize::from(peer_core))
            && *version == self.path.route_version()
        {
            route.remote = *remote;
        }
        Target {
            bond: Some(bond.slot),
            path: self.path.id,
            version: self.path.route_version(),
            peer_core,
            route,
            dialer: bond.dialer,
        }
    }
}

/// A datagram to send again over another path: path id, which log, entry number.
#[derive(Clone, Copy, Debug)]
pub(super) struct Repeat {
    pub path: u8,
    pub express: bool,
    pub number: u64,
}

/// One core's sending side of one bond.
pub(super) struct Transmit {
    pub core: u8,
    pub bond: Arc<Bond>,
    pub session: Option<Arc<Session>>,
    /// Number of the newest session taken up.
    newest: u32,
    pub(super) lanes: TxLanes,
    pub(super) receiving: ReceivingCores,
    /// Packets sealed in this epoch.
    pub(super) sealed: u64,
    pub paths: Vec<PathTx>,
    pub queue: Option<Box<FqCodel<Waiting>>>,
    pub(super) stampers: Vec<Option<Box<Stamper>>>,
    /// Memory of each flow.
    pub(super) flows: Flows,
    /// Packets of urgent classes, and copies of datagrams that are due.
    pub(super) classes: ClassQueues,
    /// Stamps are used while more than one path is up, and a while longer.
    pub(super) ordered_until: Time,
    pub repeats: VecDeque<Repeat>,
    /// The last ones that left, each with the path it went over.
    pub repeated: VecDeque<(u8, Repeat)>,
    pub(super) views: Vec<PathView>,
    pub(super) last_path: Option<u8>,
    /// When to dispatch again.
    pub wake: Time,
    pool: Vec<Vec<u8>>,
    pub(super) scratch: Vec<u8>,
    pub(super) queued_published: i64,
    /// When silent cores of the peer were last asked for a sign of life.
    pub(super) asked_at: Time,
}

/// Bytes that so many segments from `next` on cost on the wire: the last one of a packet may be short.
fn run_bytes(segmenter: &Segmenter<'_>, next: usize, segments: usize) -> u64 {
    let payload = segmenter.segment_payload();
    let left = segmenter.payload_bytes().saturating_sub(next * payload);
    let heads = segments * (segmenter.header_bytes() + SEGMENT_OVERHEAD_BYTES);
    wire_bytes(segments, heads + left.min(segments * payload))
}

/// Bytes a run of packets costs on the wire.
pub(super) fn wire_bytes(datagrams: usize, bytes: usize) -> u64 {
    (bytes + datagrams * WIRE_OVERHEAD_BYTES as usize) as u64
}

impl Transmit {
    pub fn new(core: u8, bond: Arc<Bond>) -> Self {
        let receiving = ReceivingCores::new(core, bond.seed);
        Self {
            core,
            bond,
            session: None,
            newest: 0,
            lanes: TxLanes::default(),
            receiving,
            sealed: 0,
            paths: Vec::new(),
            queue: None,
            stampers: Vec::new(),
            flows: Flows::default(),
            classes: ClassQueues::default(),
            ordered_until: Time::ZERO,
            repeats: VecDeque::new(),
            repeated: VecDeque::new(),
            views: Vec::new(),
            last_path: None,
            wake: Time::MAX,
            pool: Vec::new(),
            scratch: Vec::new(),
            queued_published: 0,
            asked_at: Time::ZERO,
        }
    }

    /// Follows the bond's session and path list; cheap when nothing changed.
    pub fn refresh(&mut self, now: Time) {
        let current = self.bond.current.load();
        let number = current.as_ref().map_or(0, |session| session.number);
        if number != self.session.as_ref().map_or(0, |session| session.number)
            && (number == 0 || number > self.newest)
        {
            // A session is taken up once and never again: its counters would begin anew, and nonces repeat.
            self.newest = self.newest.max(number);
            self.session = current.as_ref().map(Arc::clone);
            self.lanes.clear();
            self.sealed = 0;
            self.repeats.clear();
            self.repeated.clear();
            for path in &mut self.paths {
                // Reports speak of lanes of the session they come in: nothing of the old one is outstanding.
                path.log.end_session();
                path.express.end_session();
                path.progress_at = now;
                path.announced = None;
                path.repair = PathRepair::default();
            }
        }
        drop(current);
        self.flows.follow(&self.bond);
        self.refresh_paths(now);
        match self.receiving.follow(now, &self.bond, self.session.as_deref()) {
            FlowsWait::Unchanged => {}
            FlowsWait::Begins => {
                self.paths.iter_mut().for_each(PathTx::mark);
                // The new cores learn the timing of the paths while the flows wait.
                for core in self.receiving.next_cores().iter() {
                    stamper(&mut self.stampers, core);
                }
            }
            FlowsWait::Ends => self.unpark_all(now),
        }
    }

    fn refresh_paths(&mut self, now: Time) {
        let paths = self.bond.paths.load();
        let same = paths.len() == self.paths.len()
            && paths.iter().zip(&self.paths).all(|(a, b)| Arc::ptr_eq(a, &b.path));
        if !same {
            let mut old = std::mem::take(&mut self.paths);
            for path in paths.iter() {
                let kept =
                    old.iter().position(|tx| Arc::ptr_eq(&tx.path, path)).map(|at| old.swap_remove(at));
                self.paths.push(kept.unwrap_or_else(|| {
                    self.lanes.end_repair(path.id);
                    PathTx::new(Arc::clone(path), now)
                }));
            }
        }
    }

    /// Takes one inner packet. It leaves at once when nothing waits and a path is free, else it is queued.
    pub fn offer(
        &mut self,
        now: Time,
        packet: OfferedPacket<'_>,
        meta: Meta,
        out: &mut impl Output,
        drops: &mut DropCounters,
    ) {
        let OfferedPacket { offload, bytes, mut segmenter } = packet;
        let mut next = 0;
        let capacity = self.segment_capacity(segmenter.header_bytes());
        if segmenter.kind() == SegmentKind::Tcp && segmenter.segment_payload() > capacity {
            segmenter.set_segment_payload(capacity);
        }
        let session_id = self.receiving.session_id(&self.bond, &meta.flow);
        let meta = Meta { hash: self.receiving.hash(&meta.flow), session_id, ..meta };
        let urgent = meta.treatment.class.is_urgent();
        if self.may_leave_at_once(now, urgent) {
            self.refresh_views(now);
            if let (Some(hash), Some(Destination::To(heading))) = (meta.hash, self.destination(now, meta))
                && self.place(now, &segmenter, &mut next, Flow::new(hash, heading, &meta), out)
            {
                return;
            }
        }
        let mut buffer = self.pool.pop().unwrap_or_default();
        buffer.clear();
        buffer.extend_from_slice(bytes);
        let segment_payload = segmenter.segment_payload();
        let left =
            segmenter.payload_bytes().saturating_sub(next * segment_payload) + segmenter.header_bytes();
        let frame = segmenter.is_frame();
        let waiting =
            Waiting { buffer, offload: *offload, meta, frame, next, segment_payload, left, at: now };
        let (queue, most) =
            if urgent { (&mut self.classes.urgent, URGENT_BYTES) } else { (&mut self.queue, QUEUE_BYTES) };
        let queue = queue.get_or_insert_with(|| Box::new(FqCodel::new(most, QUEUE_ITEMS, 3_000)));
        let pool = &mut self.pool;
        queue.enqueue(now, meta.hash.unwrap_or(0), waiting, &mut |dropped: Waiting| {
            drops.add(DropReason::QueueFull);
            recycle(pool, dropped.buffer);
        });
    }

    /// The peer gave the flow with this hash to a core (row T5).
    pub fn on_assignment(&mut self, now: Time, session: u32, hash: u32, core: u8) {
        if self.session.as_ref().is_some_and(|current| current.number == session) {
            let goes = self.receiving.assignments.note(now, hash, core);
            if goes {
                self.unpark_all(now);
            }
        }
    }

    fn destination(&mut self, now: Time, meta: Meta) -> Option<Destination> {
        let class = meta.treatment.core_class as u8;
        meta.hash.map(|hash| self.receiving.of_flow(now, hash, class, meta.session_id))
    }

    /// The peer's core that the next control frame on a path goes to: one after the other, so that one which hangs does
    /// not make the path look dead.
    pub fn control_core(&self, path: u8) -> u8 {
        let Some(tx) = self.paths.iter().find(|tx| tx.path.id == path) else { return self.core };
        let (Some(told), Some(session)) = (self.receiving.told(), &self.session) else { return self.core };
        let usable = || told.info.usable.iter().filter(|core| *core < session.peer_cores);
        let turn = tx.path.next_turn() as usize % usable().count().max(1);
        usable().nth(turn).unwrap_or(self.core)
    }

    /// Lets flows move to other receiving cores whose old ones have had all that was sent to them.
    fn move_flows(&mut self, now: Time) {
        self.settle_assignments(now);
        if !self.receiving.is_changing() {
            return;
        }
        let waiting: Vec<u8> = self.receiving.old_cores().collect();
        let done = |core: &u8| !self.paths.iter().any(|tx| tx.holds_for(*core));
        let (confirmed, silent): (Vec<u8>, Vec<u8>) = (
            waiting.iter().copied().filter(done).collect(),
            waiting.iter().copied().filter(|core| self.is_silent(now, *core)).collect(),
        );
        let moved = self.receiving.advance(now, &self.bond, &confirmed, &silent);
        if moved {
            self.unpark_all(now);
        }
        self.wake = self.wake.min(self.receiving.next());
    }

    /// Lets flows that the peer gave a core go there, once everything that named none is confirmed (row T5).
    fn settle_assignments(&mut self, now: Time) {
        if let Some(waiting) = self.receiving.assignments.waiting() {
            let held = waiting.iter().any(|core| self.paths.iter().any(|tx| tx.holds_assigned(core)));
            if self.receiving.end_assigned(now, !held) {
                self.unpark_all(now);
            }
        }
        if self.receiving.assignments.asked.give_up(now) {
            self.unpark_all(now);
        }
        if self.receiving.begin_assigned(now) {
            self.paths.iter_mut().for_each(PathTx::mark_assigned);
        }
        self.wake = self.wake.min(self.receiving.assignments.next());
    }

    /// Largest inner packet that fits a datagram of the smallest path in use; `None` while that is not measured.
    /// Segments of that size fill their datagrams; larger ones would each leave a remainder. A path that is much smaller
    /// than another takes pieces: it must not make all packets small.
    pub fn packet_capacity(&self) -> Option<u16> {
        let datagrams =
            || self.paths.iter().filter(|tx| tx.path.carries()).map(|tx| tx.path.datagram_bytes());
        let most = datagrams().max()?;
        let datagram = datagrams().filter(|bytes| bytes * 4 >= most * 3).min()?;
        if datagram <= usize::from(crate::path::LEAST_DATAGRAM_BYTES) {
            return None;
        }
        let head = PacketHead { order: Some(Order::default()), ..PacketHead::default() }.encoded_len();
        u16::try_from(datagram.saturating_sub(self.overhead() + head)).ok()
    }

    /// Payload bytes of one segment so that a whole datagram fits the largest usable path.
    fn segment_capacity(&self, inner_header: usize) -> usize {
        let usable = self.paths.iter().filter(|tx| tx.path.carries()).map(|tx| tx.path.datagram_bytes());
        let datagram = usable.max().unwrap_or(usize::from(crate::path::BASE_DATAGRAM_BYTES));
        let head = PacketHead { order: Some(Order::default()), ..PacketHead::default() }.encoded_len();
        datagram.saturating_sub(self.overhead() + head + inner_header).max(256)
    }

    /// How much of a datagram of inner packets is sealed.
    pub(super) fn cover(&self) -> Cover {
        self.session.as_ref().map_or(Cover::Whole, |session| Cover::of(session))
    }

    pub(super) fn clear_overhead(&self) -> usize {
        self.cover().overhead()
    }

    /// Bytes of a datagram with one packet besides the packet and its frame's head.
    fn overhead(&self) -> usize {
        let label = self.session.as_ref().map_or(0, |session| session.sends.label_bytes());
        HEADER_BYTES + TAG_BYTES + self.clear_overhead() + label
    }

    fn refresh_views(&mut self, now: Time) {
        self.views.clear();
        if self.session.is_none() || self.receiving.told().is_none() {
            return;
        }
        self.views.extend(self.paths.iter().map(|tx| tx.path.view(now)).filter(|view| view.usable));
        // On one path, what is repeated comes late: TCP takes it for lost and slows down.
        let loses = |view: &PathView| self.paths.iter().any(|tx| tx.path.id == view.id && tx.repair.loses);
        if self.views.len() > 1 || self.views.first().is_some_and(loses) {
            self.ordered_until = now.plus_ms(ORDERED_MS);
        }
    }

    /// Sends what waits, as far as the paths allow: urgent classes up to their share, then repeats, then the rest.
    pub fn dispatch(&mut self, now: Time, out: &mut impl Output, drops: &mut DropCounters) {
        self.wake = Time::MAX;
        self.move_flows(now);
        self.refresh_views(now);
        if let Some(mut queue) = self.classes.urgent.take() {
            self.serve(now, &mut queue, true, out, drops);
            self.classes.urgent = Some(queue);
        }
        if !self.send_repeats(now, out) {
            return;
        }
        if let Some(mut queue) = self.queue.take() {
            self.serve(now, &mut queue, false, out, drops);
            self.queue = Some(queue);
        }
    }

    /// Sends what waits in one of the queues.
    fn serve(
        &mut self,
        now: Time,
        queue: &mut FqCodel<Waiting>,
        urgent: bool,
        out: &mut impl Output,
        drops: &mut DropCounters,
    ) {
        while let Some(head) = queue.head(now) {
            if urgent && !self.share_allows(now) {
                break;
            }
            let verdict = head.codel;
            let Ok(mut segmenter) = segments(head.item.frame, &head.item.offload, &head.item.buffer) else {
                // It parsed when it came in, so this cannot happen; still, never loop on it.
                drops.add(DropReason::BadOffload);
                if let Some(item) = queue.consume(now, 1, true) {
                    recycle(&mut self.pool, item.buffer);
                }
                continue;
            };
            if segmenter.kind() == SegmentKind::Tcp {
                segmenter.set_segment_payload(head.item.segment_payload);
            }
            let mut next = head.item.next;
            let before = next;
            let meta = &mut head.item.meta;
            meta.hash = meta.hash.or_else(|| self.receiving.hash(&meta.flow));
            let class = meta.treatment.core_class as u8;
            let destination =
                meta.hash.map(|hash| (hash, self.receiving.of_flow(now, hash, class, meta.session_id)));
            let flow = match destination {
                Some((hash, Destination::To(heading))) => Flow::new(hash, heading, meta),
                Some((_, Destination::Waits)) => {
                    queue.park();
                    continue;
                }
                Some((_, Destination::Unknown)) | None => break,
            };
            let done = match verdict {
                CodelVerdict::Drop => {
                    drops.add(DropReason::CoDel);
                    next += 1;
                    next >= segmenter.segments()
                }
                CodelVerdict::Mark | CodelVerdict::Pass => self.place(now, &segmenter, &mut next, flow, out),
            };
            if next == before && !done {
                if flow.treatment.class.is_choosy() || flow.treatment.stays {
                    // Its path is booked out, or it waits for its turn on another; others have more of them.
                    queue.skip();
                    continue;
                }
                break;
            }
            let used = (next - before) * segmenter.segment_payload() + segmenter.header_bytes();
            let ip_at = segmenter.ip_at();
            if verdict == CodelVerdict::Mark {
                packet::ip::set_ecn_ce(head.item.buffer.get_mut(ip_at..).unwrap_or_default());
            }
            head.item.next = next;
            head.item.left = head.item.left.saturating_sub(used).max(1);
            if let Some(item) = queue.consume(now, used, done) {
                recycle(&mut self.pool, item.buffer);
            }
        }
        queue.resume();
    }

    /// Places segments from `next` on, run after run, until all are placed (true) or the paths are booked out.
    fn place(
        &mut self,
        now: Time,
        segmenter: &Segmenter<'_>,
        next: &mut usize,
        flow: Flow,
        out: &mut impl Output,
    ) -> bool {
        let segments = segmenter.segments();
        let length = segmenter.header_bytes() + segmenter.segment_payload().min(segmenter.payload_bytes());
        let per_segment = length + SEGMENT_OVERHEAD_BYTES;
        while *next < segments {
            let run = self.run_length(per_segment).min(segments - *next);
            let bytes = run_bytes(segmenter, *next, run);
            let id = match self.choose_for(now, u32::try_from(bytes).unwrap_or(u32::MAX), flow) {
                Choice::Send { path, .. } => path,
                Choice::Wait { until } => {
                    self.wake = self.wake.min(until);
                    self.note_limited(now);
                    return false;
                }
                Choice::None => return false,
            };
            let Some(at) = self.paths.iter().position(|tx| tx.path.id == id) else { return false };
            if !self.has_room(now, at, flow.treatment.express, bytes as usize, out) {
                // What waits there leaves first; booking now would only push the path's time ahead for nothing.
                return false;
            }
            let joining = if run == 1 { self.joining_bytes(now, at, length, &flow) } else { None };
            let bytes = joining.unwrap_or(bytes);
            let depart = self.paths[at].path.book(now, bytes);
            if let Some(view) = self.views.iter_mut().find(|view| view.id == id) {
                view.tx_free = depart.plus_ns(bytes.saturating_mul(1_000_000_000) / view.rate.max(1));
            }
            if depart > now.plus_us(1_000) {
                self.paths[at].path.note_limited();
            }
            self.last_path = Some(id);
            self.note_class(at, flow, run, bytes);
            for index in *next..*next + run {
                if !self.append(now, at, depart, segmenter, index, &flow) {
                    // Pieces take more room than was asked for: come back when some have left.
                    self.wake = self.wake.min(now.plus_us(200));
                    *next = index;
                    return false;
                }
            }
            *next += run;
        }
        true
    }

    /// Whether the log of path `at` takes `bytes` more, if need be after what is due has left.
    fn has_room(&mut self, now: Time, at: usize, sparse: bool, bytes: usize, out: &mut impl Output) -> bool {
        let front = HEADER_BYTES + self.clear_overhead();
        let express = sparse && now < self.ordered_until;
        let ahead_us = ahead_us(&self.views, self.paths[at].path.id);
        let tx = &mut self.paths[at];
        let capacity = log_capacity(&tx.path, ahead_us, express);
        let log = if express { &mut tx.express } else { &mut tx.log };
        log.ensure(capacity, front);
        if log.can_take(bytes) {
            return true;
        }
        self.flush_path(now, at, out);
        let tx = &mut self.paths[at];
        if express { tx.express.can_take(bytes) } else { tx.log.can_take(bytes) }
    }

    fn note_limited(&self, now: Time) {
        for view in self.views.iter().filter(|view| view.tx_free > now) {
            if let Some(tx) = self.paths.iter().find(|tx| tx.path.id == view.id) {
                tx.path.note_limited();
            }
        }
    }

    /// Segments of one scheduling decision: a quarter of a millisecond of the fastest path, or one of the only path; 2 to 44.
    fn run_length(&self, per_segment: usize) -> usize {
        let fastest = self.views.iter().map(|view| view.rate).max().unwrap_or(0);
        // One GSO send at most, whatever the size of the segments.
        let most = (RUN_BYTES / per_segment.max(1)).clamp(1, RUN_SEGMENTS);
        // On one path nothing is shared out, and what is urgent waits behind no more than a millisecond of the rest.
        let runs_a_second = if self.views.len() <= 1 { 1_000 } else { 4_000 };
        usize::try_from(fastest / runs_a_second)
            .unwrap_or(usize::MAX)
            .div_euclid(per_segment.max(1))
            .clamp(2.min(most), most)
    }

    /// Paths whose datagrams may be so large.
    fn views_that_take(&self, datagram_bytes: usize) -> Cow<'_, [PathView]> {
        let takes = |view: &&PathView| {
            let mut paths = self.paths.iter();
            paths.any(|tx| tx.path.id == view.id && tx.path.datagram_bytes() >= datagram_bytes)
        };
        if self.views.iter().all(|view| takes(&view)) {
            return Cow::Borrowed(&self.views);
        }
        Cow::Owned(self.views.iter().filter(takes).cloned().collect())
    }

    /// Sends datagrams again over the path that delivers them first. False when the paths are booked out.
    fn send_repeats(&mut self, now: Time, out: &mut impl Output) -> bool {
        while let Some(repeat) = self.repeats.front().copied() {
            let Some(from) = self.paths.iter().position(|tx| tx.path.id == repeat.path) else {
                self.repeats.pop_front();
                continue;
            };
            let log = if repeat.express { &mut self.paths[from].express } else { &mut self.paths[from].log };
            let Some(entry) = log.entry(repeat.number).copied().filter(|entry| entry.sent) else {
                self.repeats.pop_front();
                continue;
            };
            let views = self.views_that_take(entry.bytes);
            if views.is_empty() {
                // The only path that took datagrams so large is gone.
                self.repeats.pop_front();
                continue;
            }
            let bytes = wire_bytes(1, entry.bytes);
            let id = match choose(now, &views, bytes as u32, &ClassPolicy::SPARSE, None) {
                Choice::Send { path, depart } if depart <= now.plus_us(4_000) => path,
                Choice::Send { depart, .. } => {
                    self.wake = self.wake.min(depart);
                    return false;
                }
                Choice::Wait { until } => {
                    self.wake = self.wake.min(until);
                    return false;
                }
                Choice::None => return false,
            };
            let Some(to) = self.paths.iter().position(|tx| tx.path.id == id) else { return false };
            self.paths[to].path.book(now, bytes);
            if let Some(view) = self.views.iter_mut().find(|view| view.id == id) {
                *view = self.paths[to].path.view(now);
            }
            let reader = self
                .session
                .as_ref()
                .map_or(0, |session| session.reader_of_packets(self.core, entry.peer_core));
            let target = self.paths[to].target(&self.bond, reader);
            let log = if repeat.express { &mut self.paths[from].express } else { &mut self.paths[from].log };
            out.transmit(&target, entry.bytes, log.datagram_mut(repeat.number));
            self.paths[to].path.traffic.retransmitted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            self.repeats.pop_front();
            self.repeated.truncate(REPEATED_KEPT - 1);
            self.repeated.push_front((id, repeat));
        }
        true
    }
}

/// Keeps a buffer for the next packet, a few of them.
fn recycle(pool: &mut Vec<Vec<u8>>, buffer: Vec<u8>) {
    if pool.len() < 64 {
        pool.push(buffer);
    }
}
