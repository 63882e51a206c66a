//! A worker's part of the gateway: its interfaces, its core, and what it pushes.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed};

use linux::event::{Epoll, Interest};
use linux::packet_ring::PacketRing;
use linux::packet_sender::{PacketSender, SendFrame};
use linux::raw_ip::RawIpSender;
use linux::tun::TunQueue;
use packet::attachment::{Egress, Ingress, InterfaceId};
use packet::segment::{Segmenter, complete_checksum};
use packet::vnet::{GSO_NONE, VirtioNetHeader};
use packet::{DropCounters, DropReason};
use services::core::{BATCH_MAX, Core, ETHERNET_BYTES, Frame, Handed, Outcome, Output};
use services::policy::Policy;

use super::train::Trains;
use super::{CoreReport, FlowEntry, FlowQuery, Letter, PortCounters, Shared, Sinks, Source, lock, pump};
use crate::counters::Counters;
use crate::rings::{self, Rings};

/// Epoll tokens of interfaces.
pub(crate) const PORT_TOKENS: u64 = 1 << 32;
/// Batches pulled from one interface in a round.
const BATCHES: usize = 8;
/// A worker looks for more frames so long before it sleeps …
const HOT_NS: u64 = 50_000;
/// … if batches have been coming with less than so much between them …
const HOT_GAP_NS: u64 = 100_000;
/// … of frames that are small: super-packets of a TCP stream are worth being woken for, and whoever sends and receives
/// them has better use for the CPU.
const HOT_FRAME_BYTES: u64 = 2_000;
/// Bytes of a virtio header.
const VNET_BYTES: usize = packet::vnet::VNET_HEADER_BYTES;

/// One interface as one core has it.
pub(crate) struct Port {
    pub id: InterfaceId,
    /// `None` where another core reads the interface.
    pub ring: Option<PacketRing>,
    pub sender: PacketSender,
    pub raw: RawIpSender,
}

/// The sending half.
struct Out {
    sender: PacketSender,
    raw: RawIpSender,
    counters: PortCounters,
}

/// The receiving half.
struct In {
    id: InterfaceId,
    ring: PacketRing,
    packets: u64,
    bytes: u64,
}

/// Everything a worker has of the gateway.
pub(crate) struct Part {
    shared: Arc<Shared>,
    pub core: Core,
    inputs: Vec<In>,
    outputs: Vec<Option<Out>>,
    trains: Trains,
    drops: DropCounters,
    scratch: Vec<u8>,
    version: u64,
    /// Era of the policy that the core works by.
    era: u32,
    /// What shall go into the tunnel: offload header, packet.
    pub tunnel: Vec<(VirtioNetHeader, Vec<u8>)>,
    reported_ns: u64,
    /// When the last frame of an interface was read.
    pulled_ns: u64,
    /// Mean time between two batches, lately.
    gap_ns: u64,
    /// Mean bytes of a frame, lately.
    frame_bytes: u64,
    /// Whether epoll tells of frames.
    listens: bool,
}

/// What a round lends to the part.
pub(crate) struct PartContext<'a> {
    pub tun: &'a TunQueue,
    pub rings: &'a mut Rings,
}

impl Part {
    pub fn new(id: u8, seed: u64, shared: Arc<Shared>) -> Self {
        let core = Core::new(
            id,
            seed,
            shared.policy.load_full(),
            shared.ownership.load_full(),
            shared.neighbors.load_full(),
        );
        Self {
            shared,
            core,
            inputs: Vec::new(),
            outputs: Vec::new(),
            trains: Trains::default(),
            drops: DropCounters::default(),
            scratch: Vec::new(),
            version: 0,
            era: 0,
            tunnel: Vec::new(),
            reported_ns: 0,
            pulled_ns: 0,
            gap_ns: HOT_NS,
            frame_bytes: 0,
            listens: true,
        }
    }

    /// Takes over what changed; whether the policy is one to be followed.
    pub fn follow(&mut self, counters: &Counters) -> bool {
        let version = self.shared.version.load(Acquire);
        if version != self.version {
            self.version = version;
            let policy = self.shared.policy.load_full();
            let (began_ns, cpu_ns) = (linux::clock::monotonic_ns(), linux::clock::thread_cpu_ns());
            self.core.follow(&policy, &self.shared.ownership.load_full(), &self.shared.neighbors.load_full());
            if self.era != policy.era {
                self.era = policy.era;
                let took_ns = linux::clock::monotonic_ns().saturating_sub(began_ns);
                counters.note_reload(took_ns, linux::clock::thread_cpu_ns().saturating_sub(cpu_ns));
            }
            return self.shared.active.load(Relaxed);
        }
        false
    }

    /// The policy in force.
    pub fn policy(&self) -> Arc<Policy> {
        self.shared.policy.load_full()
    }

    /// Reads the letter box.
    pub fn read_letters(&mut self, now_ns: u64, epoll: &Epoll) {
        for letter in self.shared.take_letters(usize::from(self.core.id())) {
            match letter {
                Letter::Open(port) => self.open(*port, epoll),
                Letter::Close(id) => self.close(id, epoll),
                Letter::Flows(query) => self.answer(now_ns, &query),
            }
        }
    }

    fn open(&mut self, port: Port, epoll: &Epoll) {
        let Port { id, ring, sender, raw } = port;
        let place = id.index();
        // New sockets for an interface that stays count on from the old ones.
        let counters = self.outputs.get(place).and_then(Option::as_ref).map(|out| out.counters);
        let read = self.inputs.iter().find(|input| input.id == id).map(|input| (input.packets, input.bytes));
        let (packets, bytes) = read.unwrap_or_default();
        self.close(id, epoll);
        if self.outputs.len() <= place {
            self.outputs.resize_with(place + 1, || None);
        }
        if let Some(out) = self.outputs.get_mut(place) {
            *out = Some(Out { sender, raw, counters: counters.unwrap_or_default() });
        }
        let Some(ring) = ring else { return };
        self.listen(epoll, true);
        match epoll.add(&ring, PORT_TOKENS + u64::from(id.0), Interest::Read) {
            Ok(()) => {
                self.inputs.push(In { id, ring, packets, bytes });
                self.prefer(false);
            }
            Err(error) => {
                tracing::error!(core = self.core.id(), interface = id.0, %error, "cannot wait for an interface");
            }
        }
    }

    fn close(&mut self, id: InterfaceId, epoll: &Epoll) {
        self.listen(epoll, true);
        self.inputs.retain(|input| {
            if input.id == id {
                let _ = epoll.remove(&input.ring);
            }
            input.id != id
        });
        if let Some(out) = self.outputs.get_mut(id.index()) {
            *out = None;
        }
        if self.inputs.is_empty() {
            self.prefer(true);
        }
    }

    /// Whether this thread has its own CPU and runs before ordinary programs. With interfaces it does not: it would be
    /// put in front of the very program or kernel thread that sends the frames, for each of them; in turn with it, or on
    /// a CPU that is idle, it moves a batch. It stays within the CPUs of all workers.
    fn prefer(&self, prefer: bool) {
        use linux::affinity::{allow_current_thread, prefer_current_thread, share_current_thread};
        let cpus = &self.shared.cpus;
        let (placed, ranked) = if prefer {
            let own = cpus.get(usize::from(self.core.id())).map_or(&[][..], std::slice::from_ref);
            (allow_current_thread(own), prefer_current_thread())
        } else {
            (allow_current_thread(cpus), share_current_thread())
        };
        for error in [placed.err(), ranked.err()].into_iter().flatten() {
            tracing::debug!(core = self.core.id(), prefer, %error, "CPU or priority stay");
        }
    }

    /// Whether a frame came a moment ago, so that it is worth looking for the next.
    pub fn is_hot(&self, now_ns: u64) -> bool {
        self.gap_ns < HOT_GAP_NS
            && self.frame_bytes < HOT_FRAME_BYTES
            && now_ns.saturating_sub(self.pulled_ns) < HOT_NS
    }

    /// Whether epoll tells of frames. If not, each round looks into all rings ([`Part::pull_all`]).
    pub fn listens(&self) -> bool {
        self.listens
    }

    /// Has epoll tell of frames, or not. While it does, the kernel calls it for each frame, in the time of whoever sends
    /// that frame: for a worker that is awake anyway. What came in between is told of as soon as it does again.
    pub fn listen(&mut self, epoll: &Epoll, wanted: bool) {
        if self.listens == wanted {
            return;
        }
        self.listens = wanted;
        for input in &self.inputs {
            let result = if wanted {
                epoll.add(&input.ring, PORT_TOKENS + u64::from(input.id.0), Interest::Read)
            } else {
                epoll.remove(&input.ring)
            };
            if let Err(error) = result {
                let core = self.core.id();
                tracing::error!(core, interface = input.id.0, wanted, %error, "cannot wait for an interface");
            }
        }
    }

    /// Pulls from all interfaces, if epoll does not tell which have something; whether something may be left.
    pub fn pull_all(&mut self, now_ns: u64, context: &mut PartContext<'_>) -> bool {
        if self.listens {
            return false;
        }
        let mut more = false;
        for place in 0..self.inputs.len() {
            more |= self.pull_at(now_ns, place, context);
        }
        more
    }

    /// Pulls from an interface; whether something may be left.
    pub fn pull(&mut self, now_ns: u64, token: u64, context: &mut PartContext<'_>) -> bool {
        let Ok(id) = u16::try_from(token - PORT_TOKENS).map(InterfaceId) else { return false };
        let place = self.inputs.iter().position(|input| input.id == id);
        place.is_some_and(|place| self.pull_at(now_ns, place, context))
    }

    fn pull_at(&mut self, now_ns: u64, place: usize, context: &mut PartContext<'_>) -> bool {
        for _ in 0..BATCHES {
            let Self { core, inputs, outputs, trains, drops, scratch, tunnel, .. } = self;
            let Some(input) = inputs.get_mut(place) else { return false };
            let bytes_before = input.bytes;
            let mut sinks = LinuxSinks {
                outputs,
                trains,
                drops,
                scratch,
                tunnel,
                tun: context.tun,
                rings: context.rings,
            };
            match pump(core, now_ns, input, &mut sinks) {
                Ok(0) => return false,
                Ok(count) => {
                    let gap_ns = now_ns.saturating_sub(self.pulled_ns).min(20 * HOT_NS);
                    self.gap_ns = (self.gap_ns * 15 + gap_ns) / 16;
                    let bytes = self.inputs.get(place).map_or(0, |input| input.bytes - bytes_before);
                    self.frame_bytes = (self.frame_bytes * 15 + bytes / count as u64) / 16;
                    self.pulled_ns = now_ns;
                    if count < BATCH_MAX {
                        return false;
                    }
                }
                Err(error) => {
                    tracing::debug!(place, %error, "interface read");
                    return false;
                }
            }
        }
        true
    }

    /// Acts on packets that the host or the tunnel gave. Each has [`ETHERNET_BYTES`] of room in front.
    pub fn take(
        &mut self,
        now_ns: u64,
        ingress: Ingress,
        packets: &mut [(VirtioNetHeader, Vec<u8>)],
        context: &mut PartContext<'_>,
    ) {
        for packets in packets.chunks_mut(BATCH_MAX) {
            let mut frames: Vec<Frame<'_>> =
                packets.iter_mut().map(|(offload, bytes)| Frame::new(ingress, *offload, bytes)).collect();
            let Self { core, outputs, trains, drops, scratch, tunnel, .. } = self;
            let mut sinks = LinuxSinks {
                outputs,
                trains,
                drops,
                scratch,
                tunnel,
                tun: context.tun,
                rings: context.rings,
            };
            core.batch(now_ns, &mut frames, &mut sinks);
            sinks.push(&mut frames);
        }
    }

    /// Acts on what another core handed over.
    pub fn handed(&mut self, now_ns: u64, handed: Handed, context: &mut PartContext<'_>) {
        let Self { core, outputs, trains, drops, scratch, tunnel, .. } = self;
        let mut sinks =
            LinuxSinks { outputs, trains, drops, scratch, tunnel, tun: context.tun, rings: context.rings };
        core.handed(now_ns, handed, &mut sinks);
    }

    /// End of a round; when the next is due.
    pub fn tick(&mut self, now_ns: u64) -> u64 {
        if let Some(rounds) = self.shared.rounds.get(usize::from(self.core.id())) {
            rounds.fetch_add(1, Relaxed);
        }
        let next = self.core.tick(now_ns);
        if now_ns.saturating_sub(self.reported_ns) >= 50_000_000 {
            self.reported_ns = now_ns;
            self.report();
        }
        next
    }

    fn report(&mut self) {
        self.core.set_nat_events_wanted(self.shared.events_wanted());
        self.shared.keep_events(|| self.core.nat_events());
        let mut drops = self.core.drops.clone();
        drops.merge(&self.drops);
        drops.merge(&self.core.late_drops());
        let mut interfaces: Vec<PortCounters> = self
            .outputs
            .iter()
            .map(|out| out.as_ref().map_or_else(PortCounters::default, |out| out.counters))
            .collect();
        for input in &mut self.inputs {
            let lost = input.ring.drops().unwrap_or(0) + input.ring.cut();
            if let Some(counters) = interfaces.get_mut(input.id.index()) {
                counters.rx_packets = input.packets;
                counters.rx_bytes = input.bytes;
                counters.lost_packets = lost;
                counters.reads = true;
            }
        }
        let report = CoreReport {
            counters: self.core.counters,
            drops,
            live_flows: self.core.flows().len() as u64,
            embryonic_flows: u64::from(self.core.embryonic()),
            flow_memory_bytes: self.core.flows().memory_bytes() as u64,
            rule_hits: self.core.rule_hits.clone(),
            nat_flows: self.core.nat_flows.clone(),
            nat_refusals: self.core.nat_refusals.clone(),
            forward_flows: self.core.forward_flows.clone(),
            live_by_bucket: self.core.live(),
            table_era: self.core.table_era(),
            ports_held: self.core.ports_held(),
            lost_nat_events: self.core.nat().events_lost(),
            interfaces,
        };
        if let Some(shared) = self.shared.reports.get(usize::from(self.core.id())) {
            *lock(shared) = report;
        }
    }

    fn answer(&self, now_ns: u64, query: &FlowQuery) {
        let mut found = Vec::new();
        let mut cursor = 0;
        let id = self.core.id();
        // The whole table is looked at: this is for people, and a core without packets waits for it.
        while found.len() < query.limit {
            let (flows, next) = self.core.flows().scan(cursor, 4_096);
            for flow in flows {
                let Some(entry) = self.core.entry(flow, now_ns) else { continue };
                let entry = FlowEntry {
                    core: id,
                    original: entry.original,
                    reply: entry.reply,
                    record: entry.record,
                    counters: entry.counters,
                    idle_ns: entry.idle_ns,
                    expires_ns: entry.expires_ns,
                    ways: entry.ways,
                };
                if found.len() < query.limit && (query.matches)(&entry) {
                    found.push(entry);
                }
            }
            match next {
                Some(next) => cursor = next,
                None => break,
            }
        }
        let _ = query.answer.try_send(found);
    }
}

impl Source for In {
    fn pull(&mut self, act: &mut dyn FnMut(&mut [Frame<'_>])) -> io::Result<usize> {
        let count = self.ring.receive(BATCH_MAX)?;
        if count == 0 {
            return Ok(0);
        }
        let id = self.id;
        let (mut packets, mut bytes) = (0, 0);
        {
            let mut frames: Vec<Frame<'_>> = self
                .ring
                .frames()
                .map(|received| {
                    packets += 1;
                    bytes += received.frame.len().saturating_sub(ETHERNET_BYTES) as u64;
                    Frame::new(Ingress::Interface(id), from_ethernet(received.vnet), received.frame)
                })
                .collect();
            act(&mut frames);
        }
        self.ring.release();
        self.packets += packets;
        self.bytes += bytes;
        Ok(count)
    }
}

/// Offsets that count from the Ethernet header, as counted from the IP header.
fn from_ethernet(vnet: VirtioNetHeader) -> VirtioNetHeader {
    const BYTES: u16 = ETHERNET_BYTES as u16;
    VirtioNetHeader {
        hdr_len: vnet.hdr_len.saturating_sub(BYTES),
        csum_start: vnet.csum_start.saturating_sub(BYTES),
        ..vnet
    }
}

/// The other way.
fn to_ethernet(vnet: &VirtioNetHeader) -> VirtioNetHeader {
    const BYTES: u16 = ETHERNET_BYTES as u16;
    VirtioNetHeader {
        hdr_len: if vnet.gso_type == GSO_NONE { 0 } else { vnet.hdr_len.saturating_add(BYTES) },
        csum_start: if vnet.needs_csum() { vnet.csum_start.saturating_add(BYTES) } else { 0 },
        ..*vnet
    }
}

struct LinuxSinks<'a> {
    outputs: &'a mut [Option<Out>],
    trains: &'a mut Trains,
    drops: &'a mut DropCounters,
    scratch: &'a mut Vec<u8>,
    tunnel: &'a mut Vec<(VirtioNetHeader, Vec<u8>)>,
    tun: &'a TunQueue,
    rings: &'a mut Rings,
}

impl LinuxSinks<'_> {
    fn give_host(&mut self, offload: &VirtioNetHeader, bytes: &mut [u8]) {
        // The virtio header takes the place of the Ethernet header's end.
        const START: usize = ETHERNET_BYTES - VNET_BYTES;
        let Some(bytes) = bytes.get_mut(START..) else { return };
        if !offload.write(bytes) || self.tun.write(bytes).is_err() {
            self.drops.add(DropReason::TunWrite);
        }
    }

    /// The kernel shall find the neighbour: it takes whole packets of ordinary size only.
    fn resolve(
        &mut self,
        interface: InterfaceId,
        next_hop: IpAddr,
        offload: &VirtioNetHeader,
        packet: &mut [u8],
    ) {
        let Some(Some(out)) = self.outputs.get(interface.index()) else {
            self.drops.add(DropReason::NoRoute);
            return;
        };
        if offload.gso_type == GSO_NONE {
            if offload.needs_csum() && complete_checksum(packet).is_err() {
                self.drops.add(DropReason::BadOffload);
            } else if out.raw.send(packet, next_hop).is_err() {
                self.drops.add(DropReason::NoNeighbor);
            }
            return;
        }
        let Ok(segmenter) = Segmenter::new(offload, packet) else {
            self.drops.add(DropReason::BadOffload);
            return;
        };
        for index in 0..segmenter.segments() {
            self.scratch.resize(segmenter.segment_bytes(index), 0);
            segmenter.write_segment(index, self.scratch);
            let whole = !segmenter.checksum_partial() || complete_checksum(self.scratch).is_ok();
            if !whole || out.raw.send(self.scratch, next_hop).is_err() {
                self.drops.add(DropReason::NoNeighbor);
            }
        }
    }

    fn send(&mut self, interface: InterfaceId, list: &[SendFrame<'_>]) {
        let Some(Some(out)) = self.outputs.get_mut(interface.index()) else {
            self.drops.add_n(DropReason::NoRoute, list.len() as u64);
            return;
        };
        let sent = out.sender.send_many(list);
        out.counters.tx_packets += sent.sent as u64;
        out.counters.tx_bytes +=
            list.iter().flat_map(|frame| frame.parts).map(|part| part.len() as u64).sum::<u64>();
        self.drops.add_n(DropReason::QueueFull, sent.full as u64);
        self.drops.add_n(DropReason::SendError, sent.refused as u64);
        if let Some(error) = sent.error {
            tracing::debug!(interface = interface.0, %error, "interface write");
        }
    }
}

impl Output for LinuxSinks<'_> {
    fn emit(&mut self, outcome: Outcome, offload: &VirtioNetHeader, bytes: &mut [u8]) {
        match outcome {
            Outcome::Forward(Egress::Interface(interface)) => {
                let vnet = to_ethernet(offload).to_bytes();
                self.send(interface, &[SendFrame { vnet, parts: [bytes, &[], &[]] }]);
            }
            Outcome::Forward(Egress::Host) => self.give_host(offload, bytes),
            Outcome::Forward(Egress::Bond(_)) => {
                self.tunnel.push((*offload, bytes.get(ETHERNET_BYTES..).unwrap_or_default().to_vec()));
            }
            Outcome::Resolve(interface, next_hop) => {
                self.resolve(
                    interface,
                    next_hop,
                    offload,
                    bytes.get_mut(ETHERNET_BYTES..).unwrap_or_default(),
                );
            }
            Outcome::Forward(Egress::Core(_) | Egress::Unit(_))
            | Outcome::Pending
            | Outcome::Consumed
            | Outcome::Dropped(_) => {}
        }
    }

    fn hand_over(&mut self, core: u8, handed: Handed) -> bool {
        self.rings.push(usize::from(core), rings::Handed::Service(Box::new(handed)))
    }
}

impl Sinks for LinuxSinks<'_> {
    fn push(&mut self, frames: &mut [Frame<'_>]) {
        let mut trains = std::mem::take(self.trains);
        trains.couple(frames);
        let mut list: Vec<SendFrame<'_>> = Vec::with_capacity(frames.len());
        // Frames leave in their order; the list goes out when the interface changes.
        let mut to = None;
        for (place, frame) in frames.iter().enumerate() {
            let Outcome::Forward(Egress::Interface(interface)) = frame.outcome else { continue };
            if let Some(to) = to.filter(|to| *to != interface) {
                self.send(to, &list);
                list.clear();
            }
            to = Some(interface);
            let coupled = if trains.is_empty() { None } else { trains.at(place) };
            let (offload, bytes) = coupled.unwrap_or((&frame.offload, &*frame.bytes));
            list.push(SendFrame { vnet: to_ethernet(offload).to_bytes(), parts: [bytes, &[], &[]] });
        }
        if let Some(interface) = to {
            self.send(interface, &list);
        }
        drop(list);
        *self.trains = trains;
        for frame in frames.iter_mut() {
            match frame.outcome {
                Outcome::Forward(Egress::Host | Egress::Bond(_)) | Outcome::Resolve(..) => {
                    let (outcome, offload) = (frame.outcome, frame.offload);
                    self.emit(outcome, &offload, frame.bytes);
                }
                _ => {}
            }
        }
    }
}
