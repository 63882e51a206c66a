//! One core's sending side of one bond: queue → path → datagram → departure.
//!
//! 1. [`Transmit::offer`] takes an inner packet (or super-packet) whose receiving core is known.
//! 2. [`Transmit::dispatch`] asks the scheduler where the next run of segments goes, books the path and
//!    writes the run into that path's [`SendLog`].
//! 3. [`Transmit::depart`] seals what is due and hands it out, a GSO run at a time.
//! 4. Reports and NACKs come back: [`super::feedback`].

use std::collections::VecDeque;
use std::sync::Arc;

use packet::drop_reason::{DropCounters, DropReason};
use packet::flow::FlowKey;
use packet::segment::{SegmentKind, Segmenter};
use packet::vnet::VirtioNetHeader;
use steering::policy::{CoreChooser, Policy};

use super::{Output, Target};
use crate::aead::TAG_BYTES;
use crate::bond::{Bond, PeerCores};
use crate::frame::{PacketHead, PieceHead};
use crate::header::{HEADER_BYTES, Header, Kind};
use crate::keys::Encryption;
use crate::order::{FLOW_BUCKETS, Order, Stamper};
use crate::path::{Path, PathState, WIRE_OVERHEAD_BYTES};
use crate::queue::{FqCodel, Item, Verdict};
use crate::schedule::{Choice, ClassPolicy, PathView, choose};
use crate::send_log::SendLog;
use crate::session::{REJECT_AFTER_PACKETS, REKEY_AFTER_PACKETS, Session};
use crate::time::Time;

/// A packet leaves this much before its booked departure: the worker's timer is no finer.
const DEPART_SLACK_NS: u64 = 500_000;
/// Packets at most this long are written so that others may follow in the same datagram.
const AGGREGATE_BYTES: usize = 640;
/// A remainder smaller than this is not worth a piece.
const PIECE_MIN_BYTES: usize = 160;
/// With partial encryption the front of a datagram stays readable for the networks between: frame head and inner
/// headers (row T11). It is authenticated all the same.
const PARTIAL_CLEAR_BYTES: usize = 64;
/// Without a report for this long (six of them), data outstanding, a path is suspect …
const SUSPECT_SILENT_US: u64 = 60_000;
/// … and twice as long if anything was heard on it within this time.
const SUSPECT_HEARD_NS: u64 = 40_000_000;
/// Flows a core remembers for the policies that are not a pure function of the hash.
const CHOOSER_FLOWS: usize = 16_384;
/// Queue limits of one core and bond.
const QUEUE_BYTES: usize = 8 << 20;
const QUEUE_ITEMS: usize = 4_096;
/// A flow is sparse while it sends less than this in a burst and 80 kB/s on average.
const SPARSE_BURST_BYTES: u32 = 8_192;
const SPARSE_BYTES_PER_MS: u32 = 80;

/// What is known of an inner packet besides its bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Meta {
    /// The flow, as this bond defines it.
    pub flow: FlowKey,
    /// Receiving core; `None` until the peer told about its cores.
    pub peer_core: Option<u8>,
    /// Hash under the peer's key, 0 until then.
    pub hash: u32,
    /// Sparse flows may overtake.
    pub sparse: bool,
    /// Congestion can be marked instead of dropped.
    pub ecn_capable: bool,
}

/// A packet waiting in the queue.
pub(super) struct Waiting {
    buffer: Vec<u8>,
    offload: VirtioNetHeader,
    meta: Meta,
    /// Next segment to send, and the segment payload the count refers to.
    next: usize,
    segment_payload: usize,
    left: usize,
    at: Time,
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
    /// Datagrams of sparse flows, which leave at once.
    pub express: SendLog,
    /// Last time a report confirmed anything.
    pub progress_at: Time,
    /// What the peer's cores reported so far, by receiving core.
    pub reported: Vec<super::feedback::Reported>,
    /// Marker bookkeeping: last ordered datagram.
    pub ordered_at: Time,
    /// Last keepalive of each of our tuples.
    pub announced: Option<(u32, Time)>,
    /// Whether it was usable when [`Transmit::leave_dead_paths`] last looked.
    pub in_use: bool,
    /// Tuples learned from the peer's datagrams (listener): where lanes to a receiving core go.
    pub tuples: Vec<Option<(u32, std::net::SocketAddr)>>,
}

impl PathTx {
    fn new(path: Arc<Path>, now: Time) -> Self {
        Self {
            path,
            log: SendLog::new(),
            express: SendLog::new(),
            progress_at: now,
            reported: Vec::new(),
            ordered_at: Time::ZERO,
            announced: None,
            in_use: false,
            tuples: Vec::new(),
        }
    }

    /// Where datagrams for `peer_core` go: the learned tuple of the current route, else the route.
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
    /// Next counter of each lane, by path and receiving core.
    counters: Vec<Option<Box<[u64]>>>,
    /// Packets sealed in this epoch.
    sealed: u64,
    pub paths: Vec<PathTx>,
    pub queue: Option<Box<FqCodel<Waiting>>>,
    stampers: Vec<Option<Box<Stamper>>>,
    sparse: Option<Box<[(u32, u32)]>>,
    /// Stamps are used while more than one path is up, and a while longer.
    ordered_until: Time,
    pub repeats: VecDeque<Repeat>,
    views: Vec<PathView>,
    last_path: Option<u8>,
    /// When to dispatch again.
    pub wake: Time,
    pool: Vec<Vec<u8>>,
    scratch: Vec<u8>,
    queued_published: i64,
    /// For the policies that are not a pure function of the hash, and what it was made from.
    chooser: Option<Box<CoreChooser>>,
    chooser_of: Option<Arc<PeerCores>>,
    random: u32,
}

/// Bytes a run of packets costs on the wire.
fn wire_bytes(datagrams: usize, bytes: usize) -> u64 {
    (bytes + datagrams * WIRE_OVERHEAD_BYTES as usize) as u64
}

impl Transmit {
    pub fn new(core: u8, bond: Arc<Bond>) -> Self {
        Self {
            core,
            bond,
            session: None,
            counters: Vec::new(),
            sealed: 0,
            paths: Vec::new(),
            queue: None,
            stampers: Vec::new(),
            sparse: None,
            ordered_until: Time::ZERO,
            repeats: VecDeque::new(),
            views: Vec::new(),
            last_path: None,
            wake: Time::MAX,
            pool: Vec::new(),
            scratch: Vec::new(),
            queued_published: 0,
            chooser: None,
            chooser_of: None,
            random: 0x9e37_79b9 ^ u32::from(core),
        }
    }

    /// Follows the bond's session and path list; cheap when nothing changed.
    pub fn refresh(&mut self, now: Time) {
        let current = self.bond.current.load();
        let number = current.as_ref().map_or(0, |session| session.number);
        if number != self.session.as_ref().map_or(0, |session| session.number) {
            self.session = current.as_ref().map(Arc::clone);
            self.counters.clear();
            self.sealed = 0;
            self.repeats.clear();
            for path in &mut self.paths {
                // Reports speak of lanes of the session they come in: nothing of the old one is outstanding.
                path.log.settle_all();
                path.express.settle_all();
                path.reported.clear();
                path.progress_at = now;
                path.announced = None;
            }
        }
        drop(current);
        let paths = self.bond.paths.load();
        let same = paths.len() == self.paths.len()
            && paths.iter().zip(&self.paths).all(|(a, b)| Arc::ptr_eq(a, &b.path));
        if !same {
            let mut old = std::mem::take(&mut self.paths);
            for path in paths.iter() {
                let kept =
                    old.iter().position(|tx| Arc::ptr_eq(&tx.path, path)).map(|at| old.swap_remove(at));
                self.paths.push(kept.unwrap_or_else(|| PathTx::new(Arc::clone(path), now)));
            }
        }
    }

    /// Whether a flow sends little enough to overtake others: a leaky bucket per flow bucket.
    pub fn is_sparse(&mut self, now: Time, hash: u32, bytes: usize, pure_ack: bool) -> bool {
        let levels = self.sparse.get_or_insert_with(|| vec![(0, 0); FLOW_BUCKETS].into_boxed_slice());
        let (level, at_ms) = &mut levels[hash as usize % FLOW_BUCKETS];
        let now_ms = now.ms() as u32;
        let drained = now_ms.wrapping_sub(*at_ms).saturating_mul(SPARSE_BYTES_PER_MS);
        *level = level.saturating_sub(drained);
        *at_ms = now_ms;
        if !pure_ack {
            *level =
                level.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX)).min(4 * SPARSE_BURST_BYTES);
        }
        *level <= SPARSE_BURST_BYTES
    }

    /// Takes one inner packet. It leaves at once when nothing waits and a path is free, else it is queued.
    pub fn offer(
        &mut self,
        now: Time,
        offload: &VirtioNetHeader,
        bytes: &[u8],
        mut segmenter: Segmenter<'_>,
        meta: Meta,
        out: &mut impl Output,
        drops: &mut DropCounters,
    ) {
        let mut next = 0;
        let capacity = self.segment_capacity(segmenter.header_bytes());
        if segmenter.kind() == SegmentKind::Tcp && segmenter.segment_payload() > capacity {
            segmenter.set_segment_payload(capacity);
        }
        let meta = self.steer(now, meta);
        if self.repeats.is_empty() && self.queue.as_ref().is_none_or(|queue| queue.is_empty()) {
            self.refresh_views(now);
            if self.place(now, &segmenter, &mut next, meta, out) {
                return;
            }
        }
        let mut buffer = self.pool.pop().unwrap_or_default();
        buffer.clear();
        buffer.extend_from_slice(bytes);
        let segment_payload = segmenter.segment_payload();
        let left =
            segmenter.payload_bytes().saturating_sub(next * segment_payload) + segmenter.header_bytes();
        let waiting = Waiting { buffer, offload: *offload, meta, next, segment_payload, left, at: now };
        let queue = self.queue.get_or_insert_with(|| Box::new(FqCodel::new(QUEUE_BYTES, QUEUE_ITEMS, 3_000)));
        let pool = &mut self.pool;
        queue.enqueue(now, meta.hash, waiting, &mut |dropped: Waiting| {
            drops.add(DropReason::QueueFull);
            recycle(pool, dropped.buffer);
        });
    }

    /// Chooses the receiving core of a flow by what the peer told (rows T3, T4).
    fn steer(&mut self, now: Time, meta: Meta) -> Meta {
        let cores = self.bond.cores.load();
        let Some(cores) = &*cores else { return meta };
        let (hash, by_table) = cores.core_of(&meta.flow, 0);
        let policy = cores.info.policy;
        if policy == Policy::Hash {
            return Meta { hash, peer_core: Some(by_table), ..meta };
        }
        if self.chooser_of.as_ref().is_none_or(|known| !Arc::ptr_eq(known, cores)) {
            self.chooser_of = Some(Arc::clone(cores));
            let remote = cores.info.remote_cores();
            match &mut self.chooser {
                Some(chooser) if chooser.policy() == policy => chooser.update(&remote),
                chooser => *chooser = Some(Box::new(CoreChooser::new(policy, &remote, CHOOSER_FLOWS, 60))),
            }
        }
        self.random = self.random.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
        let now_s = u32::try_from(now.ms() / 1_000).unwrap_or(u32::MAX);
        let random = self.random >> 8;
        let chosen = self
            .chooser
            .as_mut()
            .and_then(|chooser| chooser.choose(&cores.info.table, hash, 0, random, now_s));
        Meta { hash, peer_core: Some(chosen.unwrap_or(by_table)), ..meta }
    }

    /// Payload bytes of one segment so that a whole datagram fits the largest usable path.
    fn segment_capacity(&self, inner_header: usize) -> usize {
        let usable = self.paths.iter().filter(|tx| tx.path.carries()).map(|tx| tx.path.datagram_bytes());
        let datagram = usable.max().unwrap_or(usize::from(crate::path::BASE_DATAGRAM_BYTES));
        let head = PacketHead { order: Some(Order::default()), ..PacketHead::default() }.encoded_len();
        datagram
            .saturating_sub(HEADER_BYTES + TAG_BYTES + head + inner_header + self.clear_overhead())
            .max(256)
    }

    fn encryption(&self) -> Encryption {
        self.session.as_ref().map_or(Encryption::On, |session| session.encryption)
    }

    fn clear_overhead(&self) -> usize {
        if self.encryption() == Encryption::Partial { crate::aead::CLEAR_LENGTH_BYTES } else { 0 }
    }

    fn refresh_views(&mut self, now: Time) {
        self.views.clear();
        if self.session.is_none() || self.bond.cores.load().is_none() {
            return;
        }
        self.views.extend(self.paths.iter().map(|tx| tx.path.view()).filter(|view| view.usable));
        if self.views.len() > 1 {
            self.ordered_until = now.plus_ms(1_000);
        }
    }

    /// Sends what waits, as far as the paths allow: repeats first, then the queue.
    pub fn dispatch(&mut self, now: Time, out: &mut impl Output, drops: &mut DropCounters) {
        self.wake = Time::MAX;
        self.refresh_views(now);
        if !self.send_repeats(now, out) {
            return;
        }
        let Some(mut queue) = self.queue.take() else { return };
        while let Some(head) = queue.head(now) {
            let verdict = head.codel;
            let Ok(mut segmenter) = Segmenter::new(&head.item.offload, &head.item.buffer) else {
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
            let meta = if head.item.meta.peer_core.is_some() {
                head.item.meta
            } else {
                self.steer(now, head.item.meta)
            };
            head.item.meta = meta;
            let done = match verdict {
                Verdict::Drop => {
                    drops.add(DropReason::CoDel);
                    next += 1;
                    next >= segmenter.segments()
                }
                Verdict::Mark | Verdict::Pass => self.place(now, &segmenter, &mut next, meta, out),
            };
            if next == before && !done {
                break;
            }
            let used = (next - before) * segmenter.segment_payload() + segmenter.header_bytes();
            if verdict == Verdict::Mark {
                packet::ip::set_ecn_ce(&mut head.item.buffer);
            }
            head.item.next = next;
            head.item.left = head.item.left.saturating_sub(used).max(1);
            if let Some(item) = queue.consume(now, used, done) {
                recycle(&mut self.pool, item.buffer);
            }
        }
        self.queue = Some(queue);
    }

    /// Places segments from `next` on, run after run, until all are placed (true) or the paths are booked out.
    fn place(
        &mut self,
        now: Time,
        segmenter: &Segmenter<'_>,
        next: &mut usize,
        meta: Meta,
        out: &mut impl Output,
    ) -> bool {
        let segments = segmenter.segments();
        let per_segment =
            segmenter.header_bytes() + segmenter.segment_payload().min(segmenter.payload_bytes()) + 42;
        while *next < segments {
            let run = self.run_length(per_segment).min(segments - *next);
            let bytes = wire_bytes(run, run * per_segment);
            let policy = if meta.sparse { ClassPolicy::SPARSE } else { ClassPolicy::BULK };
            let choice =
                choose(now, &self.views, u32::try_from(bytes).unwrap_or(u32::MAX), &policy, self.last_path);
            let id = match choice {
                Choice::Send { path, .. } => path,
                Choice::Wait { until } => {
                    self.wake = self.wake.min(until);
                    self.note_limited(now);
                    return false;
                }
                Choice::None => return false,
            };
            let (Some(at), Some(view)) = (
                self.paths.iter().position(|tx| tx.path.id == id),
                self.views.iter_mut().find(|view| view.id == id),
            ) else {
                return false;
            };
            let depart = self.paths[at].path.book(now, bytes);
            view.tx_free = depart.plus_ns(bytes.saturating_mul(1_000_000_000) / view.rate.max(1));
            if depart > now.plus_us(1_000) {
                self.paths[at].path.note_limited();
            }
            self.last_path = Some(id);
            for index in *next..*next + run {
                if !self.append(now, at, depart, segmenter, index, meta) {
                    self.flush_path(now, at, out);
                    if !self.append(now, at, depart, segmenter, index, meta) {
                        // The ring is full of datagrams that wait for departure: come back when some have left.
                        self.wake = self.wake.min(depart.max(now.plus_us(200)));
                        *next = index;
                        return false;
                    }
                }
            }
            *next += run;
        }
        true
    }

    fn note_limited(&self, now: Time) {
        for view in self.views.iter().filter(|view| view.tx_free > now) {
            if let Some(tx) = self.paths.iter().find(|tx| tx.path.id == view.id) {
                tx.path.note_limited();
            }
        }
    }

    /// Segments of one scheduling decision: a quarter of a millisecond of the fastest path, 2 to 44.
    fn run_length(&self, per_segment: usize) -> usize {
        let fastest = self.views.iter().map(|view| view.rate).max().unwrap_or(0);
        if self.views.len() <= 1 {
            return 44;
        }
        usize::try_from(fastest / 4_000).unwrap_or(usize::MAX).div_euclid(per_segment.max(1)).clamp(2, 44)
    }

    /// Writes one segment into the log of path `at`. False when the log has no room.
    fn append(
        &mut self,
        now: Time,
        at: usize,
        depart: Time,
        segmenter: &Segmenter<'_>,
        index: usize,
        meta: Meta,
    ) -> bool {
        let multi = now < self.ordered_until;
        // A path was chosen, so the peer is known, and with it the core.
        let peer_core = meta.peer_core.unwrap_or(0);
        let payload = segmenter.segment_payload();
        let length =
            segmenter.header_bytes() + payload.min(segmenter.payload_bytes().saturating_sub(index * payload));
        let front = HEADER_BYTES + self.clear_overhead();
        let tx = &mut self.paths[at];
        let datagram_bytes = tx.path.datagram_bytes();
        let ordered = multi && !meta.sparse;
        let (log, depart) = if meta.sparse && multi { (&mut tx.express, now) } else { (&mut tx.log, depart) };
        log.ensure(log_capacity(&tx.path, meta.sparse && multi), front);
        let mut head = PacketHead {
            order: ordered.then(Order::default),
            partial: segmenter.checksum_partial(),
            group: segmenter.is_super() && index > 0,
            ..PacketHead::default()
        };
        let small = length <= AGGREGATE_BYTES;
        if small {
            head.bytes = Some(length as u16);
        }
        let fits_alone = front + head.encoded_len() + length + TAG_BYTES <= datagram_bytes;
        if fits_alone {
            let need = head.encoded_len() + length;
            if (!small || log.open_room(peer_core) < need) && !log.open(peer_core, depart, datagram_bytes) {
                return false;
            }
            if ordered {
                head.order = Some(stamp(&mut self.stampers, peer_core, meta.hash, tx.path.id));
                tx.ordered_at = now;
            }
            let out = log.open_slice();
            let Some(used) = head.write(out, 0) else { return false };
            let written = segmenter.write_segment(index, &mut out[used..]);
            log.advance(used + written);
            if !small {
                log.close();
            }
            return true;
        }
        self.scratch.resize(length, 0);
        let written = segmenter.write_segment(index, &mut self.scratch);
        let order = stamp(&mut self.stampers, peer_core, meta.hash, tx.path.id);
        let piece = PieceHead { order, partial: head.partial, total: written as u16, ..PieceHead::default() };
        append_pieces(log, piece, &self.scratch[..written], peer_core, depart, datagram_bytes)
    }

    /// Seals and hands out everything that is due on every path.
    pub fn depart(&mut self, now: Time, out: &mut impl Output) -> Time {
        let mut next = self.wake;
        for at in 0..self.paths.len() {
            if self.paths[at].log.has_pending() || self.paths[at].express.has_pending() {
                self.flush_path(now, at, out);
            }
            if let Some(departure) = self.paths[at].log.next_departure() {
                next = next.min(Time::from_ns(departure.ns().saturating_sub(DEPART_SLACK_NS / 2)));
            }
        }
        let queued = self.queue.as_ref().map_or(0, |queue| queue.bytes()) as i64;
        if queued != self.queued_published {
            self.bond
                .totals
                .queue_bytes
                .fetch_add(queued - self.queued_published, std::sync::atomic::Ordering::Relaxed);
            self.queued_published = queued;
        }
        next
    }

    fn flush_path(&mut self, now: Time, at: usize, out: &mut impl Output) {
        let Some(session) = self.session.clone() else { return };
        let Some(key) = session.seal_key(self.core) else { return };
        let encryption = self.encryption();
        if self.counters.len() <= usize::from(self.paths[at].path.id) {
            self.counters.resize_with(usize::from(self.paths[at].path.id) + 1, || None);
        }
        let tx = &mut self.paths[at];
        let counters = self.counters[usize::from(tx.path.id)]
            .get_or_insert_with(|| vec![0; usize::from(session.peer_cores)].into_boxed_slice());
        let (mut datagrams, mut bytes) = (0, 0);
        for express in [true, false] {
            loop {
                let log = if express { &mut tx.express } else { &mut tx.log };
                let Some(run) = log.due(now.plus_ns(DEPART_SLACK_NS)) else { break };
                let Some(counter) = counters.get_mut(usize::from(run.peer_core)) else { continue };
                for number in run.first..run.first + run.count as u64 {
                    let header = Header {
                        kind: data_kind(encryption),
                        receiving_core: run.peer_core,
                        sending_core: self.core,
                        path: tx.path.id,
                        receiver_index: session.remote_index,
                        counter: *counter,
                    };
                    *counter += 1;
                    seal(key, &header, log.datagram_mut(number), encryption);
                    log.mark_sent(number, now, header.counter, session.number);
                }
                self.sealed += run.count as u64;
                let sent = log.run_bytes(&run).len();
                datagrams += run.count as u64;
                bytes += sent as u64;
                let target = tx.target(&self.bond, run.peer_core);
                let log = if express { &tx.express } else { &tx.log };
                out.transmit(&target, run.segment, log.run_bytes(&run));
            }
        }
        if datagrams > 0 {
            use std::sync::atomic::Ordering::Relaxed;
            tx.path.note_sent(now);
            tx.path.traffic.tx_datagrams.fetch_add(datagrams, Relaxed);
            tx.path.traffic.tx_bytes.fetch_add(bytes, Relaxed);
            self.watch_limits(&session);
        }
    }

    fn watch_limits(&mut self, session: &Session) {
        if self.sealed >= REKEY_AFTER_PACKETS {
            session.spend();
        }
        if self.sealed >= REJECT_AFTER_PACKETS {
            self.session = None;
        }
    }

    /// Seals frames in a datagram of their own and sends it at once: control frames, reports.
    pub fn send_control(
        &mut self,
        now: Time,
        id: u8,
        peer_core: u8,
        route: Option<crate::path::Route>,
        frames: &[u8],
        pad_to: usize,
        out: &mut impl Output,
    ) {
        let Some(session) = self.session.clone() else { return };
        let (Some(key), Some(at)) =
            (session.seal_key(self.core), self.paths.iter().position(|tx| tx.path.id == id))
        else {
            return;
        };
        let peer_core = if peer_core < session.peer_cores { peer_core } else { 0 };
        if self.counters.len() <= usize::from(id) {
            self.counters.resize_with(usize::from(id) + 1, || None);
        }
        let counters = self.counters[usize::from(id)]
            .get_or_insert_with(|| vec![0; usize::from(session.peer_cores)].into_boxed_slice());
        let counter = counters[usize::from(peer_core)];
        counters[usize::from(peer_core)] += 1;
        self.sealed += 1;
        let length = (HEADER_BYTES + frames.len() + TAG_BYTES).max(pad_to);
        self.scratch.clear();
        self.scratch.resize(length, 0);
        self.scratch[HEADER_BYTES..HEADER_BYTES + frames.len()].copy_from_slice(frames);
        let header = Header {
            kind: Kind::Data,
            receiving_core: peer_core,
            sending_core: self.core,
            path: id,
            receiver_index: session.remote_index,
            counter,
        };
        header.write(&mut self.scratch);
        key.seal(&header, &mut self.scratch);
        let tx = &mut self.paths[at];
        let mut target = tx.target(&self.bond, peer_core);
        if let Some(route) = route {
            target.route = route;
        }
        tx.path.note_sent(now);
        tx.path.traffic.tx_datagrams.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        tx.path.traffic.tx_bytes.fetch_add(length as u64, std::sync::atomic::Ordering::Relaxed);
        out.transmit(&target, length, &self.scratch);
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
            let bytes = wire_bytes(1, entry.bytes);
            let id = match choose(now, &self.views, bytes as u32, &ClassPolicy::SPARSE, None) {
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
                *view = self.paths[to].path.view();
            }
            let target = self.paths[to].target(&self.bond, entry.peer_core);
            let log = if repeat.express { &mut self.paths[from].express } else { &mut self.paths[from].log };
            out.transmit(&target, entry.bytes, log.repeat(repeat.number));
            self.paths[to].path.traffic.retransmitted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            self.repeats.pop_front();
        }
        true
    }

    /// A path stopped being usable: what waits for it departs elsewhere, what it did not deliver is repeated.
    pub fn abandon(&mut self, now: Time, at: usize) {
        let id = self.paths[at].path.id;
        let Some(to) = self
            .paths
            .iter()
            .enumerate()
            .filter(|(_, tx)| tx.path.id != id && tx.path.carries())
            .min_by_key(|(_, tx)| tx.path.delay_us())
            .map(|(to, _)| to)
        else {
            return;
        };
        let front = HEADER_BYTES + self.clear_overhead();
        let mut frames = std::mem::take(&mut self.scratch);
        while let Some(peer_core) = self.paths[at].log.withdraw(&mut frames) {
            let bytes = wire_bytes(1, frames.len() + HEADER_BYTES + TAG_BYTES);
            let depart = self.paths[to].path.book(now, bytes);
            let tx = &mut self.paths[to];
            tx.log.ensure(log_capacity(&tx.path, false), front);
            let size = frames.len() + front + TAG_BYTES;
            // A datagram built for a larger path cannot leave here; its flow's own recovery replaces it.
            if size <= tx.path.datagram_bytes() && tx.log.open(peer_core, depart, size) {
                tx.log.open_slice()[..frames.len()].copy_from_slice(&frames);
                tx.log.advance(frames.len());
                tx.log.close();
            }
        }
        self.scratch = frames;
        for express in [true, false] {
            let log = if express { &self.paths[at].express } else { &self.paths[at].log };
            for number in log.outstanding() {
                self.repeats.push_back(Repeat { path: id, express, number });
            }
        }
        self.wake = now;
    }

    /// Paths of this core on which data is outstanding while reports stopped (design §4 "Paths"), each with whether
    /// anything else still comes over it.
    pub fn find_suspects(&self, now: Time) -> Vec<(u8, bool)> {
        let mut suspects = Vec::new();
        for tx in self.paths.iter().filter(|tx| tx.path.state() == PathState::Up) {
            let Some(oldest) = tx.log.oldest_outstanding().or(tx.express.oldest_outstanding()) else {
                continue;
            };
            let rtt_us = u64::from(tx.path.rtt_us())
                + 4 * u64::from(tx.path.rttvar_us())
                + u64::from(tx.path.queue_us());
            let silent_us = now.since(tx.progress_at.max(oldest)) / 1_000;
            let age_us = now.since(oldest) / 1_000;
            let heard = now.since(tx.path.heard_at()) < SUSPECT_HEARD_NS;
            let patience_us = if heard { 2 * SUSPECT_SILENT_US } else { SUSPECT_SILENT_US };
            if silent_us > patience_us && age_us > rtt_us + SUSPECT_SILENT_US {
                suspects.push((tx.path.id, heard));
            }
        }
        suspects
    }

    /// Moves everything away from paths that stopped being usable since the last call.
    pub fn leave_dead_paths(&mut self, now: Time) {
        for at in 0..self.paths.len() {
            let usable = self.paths[at].path.usable();
            if !usable && self.paths[at].in_use {
                self.abandon(now, at);
            }
            self.paths[at].in_use = usable;
        }
    }

    /// The usable path with the lowest delay.
    pub fn fastest_path(&self) -> Option<u8> {
        let usable = self.paths.iter().filter(|tx| tx.path.carries());
        usable.min_by_key(|tx| (tx.path.delay_us(), tx.path.id)).map(|tx| tx.path.id)
    }

    /// Whether packets carry stamps now.
    pub fn ordering(&self, now: Time) -> bool {
        self.paths.iter().any(|tx| now.since(tx.ordered_at) < 200_000_000)
    }

    /// Cores of the peer this core sends ordered packets to.
    pub fn receiving_cores(&self) -> Vec<u8> {
        (0..self.stampers.len())
            .filter(|core| self.stampers[*core].is_some())
            .map(|core| core as u8)
            .collect()
    }

    /// Whether anything is under way that slow timers must watch.
    pub fn busy(&self) -> bool {
        !self.repeats.is_empty()
            || self
                .paths
                .iter()
                .any(|tx| tx.in_use != tx.path.usable() || tx.log.oldest_outstanding().is_some())
            || self.paths.iter().any(|tx| tx.express.oldest_outstanding().is_some())
    }

    /// Whether a path waits for its first keepalives.
    pub fn unannounced(&self) -> bool {
        self.session.is_some()
            && self.bond.dialer
            && self.paths.iter().any(|tx| {
                tx.path.usable() && tx.announced.is_none_or(|(version, _)| version != tx.path.route_version())
            })
    }

    /// A dialer keeps every socket of every path known to the peer and its NAT mapping open.
    pub fn keep_alive(&mut self, now: Time, every_ns: u64, out: &mut impl Output) {
        let Some(peer_cores) = self.session.as_ref().map(|session| session.peer_cores) else { return };
        if !self.bond.dialer {
            return;
        }
        for at in 0..self.paths.len() {
            let tx = &mut self.paths[at];
            let version = tx.path.route_version();
            let due =
                tx.announced.is_none_or(|(known, when)| known != version || now.since(when) >= every_ns);
            if !tx.path.usable() || !due {
                continue;
            }
            tx.announced = Some((version, now));
            let id = tx.path.id;
            for core in 0..peer_cores {
                self.send_control(now, id, core, None, &[crate::frame::kind::PADDING], 0, out);
            }
        }
    }

    /// Tells the stampers the time; after a settling time a flow that stays on one path needs no order any more.
    pub fn tick_stampers(&mut self, now: Time) {
        let delays = self
            .paths
            .iter()
            .filter(|tx| tx.path.carries())
            .map(|tx| (tx.path.delay_us(), tx.path.jitter_us(), tx.path.rtt_us()));
        let (mut least, mut most, mut extra) = (i64::MAX, i64::MIN, 0);
        for (delay_us, jitter_us, rtt_us) in delays {
            (least, most) = (least.min(delay_us), most.max(delay_us));
            extra = extra.max(4 * jitter_us + rtt_us * 2);
        }
        let spread_us = u32::try_from(most.saturating_sub(least).max(0)).unwrap_or(u32::MAX);
        for stamper in self.stampers.iter_mut().flatten() {
            stamper.tick(now, spread_us.saturating_add(extra).saturating_add(20_000));
        }
    }

    /// One marker on every path that lags behind the newest stamp, so that the receiver need not wait for it.
    pub fn markers(&mut self, now: Time, out: &mut impl Output) {
        let newest = self.paths.iter().map(|tx| tx.ordered_at).max().unwrap_or(Time::ZERO);
        if newest == Time::ZERO || now.since(newest) > 20_000_000 {
            return;
        }
        for at in 0..self.paths.len() {
            let tx = &self.paths[at];
            let lag_ns = newest.since(tx.ordered_at);
            if !tx.path.carries() || tx.ordered_at == Time::ZERO || lag_ns < 4_000_000 || tx.log.has_pending()
            {
                continue;
            }
            let id = tx.path.id;
            self.paths[at].ordered_at = newest;
            for core in 0..self.stampers.len() {
                if let Some(last) = self.stampers[core].as_ref().and_then(|stamper| stamper.marker()) {
                    let frames = crate::lifecycle::encode(&crate::frame::Frame::Marker { stamp: last });
                    self.send_control(now, id, core as u8, None, &frames, 0, out);
                }
            }
        }
    }
}

/// Ring size: what the path carries in two round trips and a report, so that anything still recoverable is kept.
fn log_capacity(path: &Path, express: bool) -> usize {
    if express {
        return 64 << 10;
    }
    let kept_us = u64::from(path.rtt_us()) * 2 + 60_000;
    let bytes = path.rate().saturating_mul(kept_us) / 1_000_000;
    let limit = if path.rtt_us() < 2_000 { 512 << 10 } else { 8 << 20 };
    usize::try_from(bytes).unwrap_or(usize::MAX).clamp(256 << 10, limit)
}

/// Next stamp of the flow's lane pair.
fn stamp(stampers: &mut Vec<Option<Box<Stamper>>>, peer_core: u8, hash: u32, path: u8) -> Order {
    let core = usize::from(peer_core);
    if stampers.len() <= core {
        stampers.resize_with(core + 1, || None);
    }
    stampers[core].get_or_insert_default().next(hash as usize % FLOW_BUCKETS, path)
}

/// Cuts a packet into pieces: the first fills what is left of the open datagram, the others follow.
fn append_pieces(
    log: &mut SendLog,
    mut head: PieceHead,
    packet: &[u8],
    peer_core: u8,
    depart: Time,
    datagram_bytes: usize,
) -> bool {
    head.bytes = Some(0);
    let head_bytes = head.encoded_len();
    let mut offset = 0;
    while offset < packet.len() {
        let room = log.open_room(peer_core);
        if room < head_bytes + PIECE_MIN_BYTES.min(packet.len() - offset)
            && !log.open(peer_core, depart, datagram_bytes)
        {
            return false;
        }
        let take = (log.open_room(peer_core) - head_bytes).min(packet.len() - offset);
        head.offset = offset as u16;
        head.bytes = Some(take as u16);
        let out = log.open_slice();
        let Some(used) = head.write(out, 0) else { return false };
        out[used..used + take].copy_from_slice(&packet[offset..offset + take]);
        log.advance(used + take);
        offset += take;
    }
    true
}

/// Seals one datagram in place, header included.
fn seal(key: &crate::aead::LaneKey, header: &Header, datagram: &mut [u8], encryption: Encryption) {
    header.write(datagram);
    match encryption {
        Encryption::On => key.seal(header, datagram),
        Encryption::Partial => {
            let plaintext = datagram.len() - HEADER_BYTES - TAG_BYTES - crate::aead::CLEAR_LENGTH_BYTES;
            key.seal_partial(header, plaintext.min(PARTIAL_CLEAR_BYTES) as u16, datagram);
        }
        Encryption::Off => {
            // The tag's room stays, zeroed: datagram sizes do not depend on the mode.
            let at = datagram.len() - TAG_BYTES;
            datagram[at..].fill(0);
        }
    }
}

/// Kind of a datagram of inner packets.
const fn data_kind(encryption: Encryption) -> Kind {
    match encryption {
        Encryption::On => Kind::Data,
        Encryption::Partial => Kind::Partial,
        Encryption::Off => Kind::Clear,
    }
}

/// Keeps a buffer for the next packet, a few of them.
fn recycle(pool: &mut Vec<Vec<u8>>, buffer: Vec<u8>) {
    if pool.len() < 64 {
        pool.push(buffer);
    }
}
