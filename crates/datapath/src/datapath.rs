//! One core's services and tunnel, joined by the single routing decision.
//!
//! With services in force they decide every packet, wherever it came in: one flow table, one set of rules, one order. A
//! node without services joins host and bonds directly. Either way the packet is worked on by the core that owns its
//! flow; what another core read is handed over, counted.

use std::sync::Arc;

use cluster::snapshot::Snapshot;
use packet::attachment::{Egress, Ingress, InterfaceId};
use packet::vnet::VirtioNetHeader;
use packet::{Coalescer, DropCounters, DropReason, FlowKey, PacketBuf, PacketPool};
use services::Services;
use services::fragment::{FragmentLimits, Released, Rendezvous};
use services::handover::InheritedFlows;
use services::hash::SecretState;
use services::held_ports::HeldPorts;
use services::pipeline::{ETHERNET_BYTES, Frame, Neighbors, Outcome};
use services::policy::Policy;
use services::random::Random;
use steering::ownership::Ownership;
use tunnel::forwarder::{Classified, Forwarder as Tunnel, owner_core};
use tunnel::lifecycle::Action;
use tunnel::node::{Node, Source};
use tunnel::time::Time;

use crate::delivery::{Decision, Delivery, ToBonds};
use crate::era_wait::EraWait;
use crate::handed::Handed;
use crate::lan::{CoreLan, Lan};
use crate::place::Placer;
use crate::ports::{Output, leave};
use crate::to_bond::{self, BondIds, Emit, Transmit, send_to};
use crate::trace::Traced;
use crate::units::Cluster;

/// A packet that another core gets is copied to a buffer of its size up to here; a longer one goes in the buffer that it
/// was read into.
pub(crate) const COPY_BYTES_MAX: usize = 1_856;

/// Snapshots that control has published: taken over between rounds.
#[derive(Clone)]
pub struct Snapshots {
    /// Rules, routes, NAT, virtual servers.
    pub policy: Arc<Policy>,
    /// Who owns a flow.
    pub ownership: Arc<Ownership>,
    /// Hardware addresses of neighbors.
    pub neighbors: Arc<Neighbors>,
    /// Ports that programs of the host have opened since the policy was made.
    pub opened_ports: Arc<HeldPorts>,
    /// Other machines that share the work.
    pub cluster: Option<Arc<Snapshot>>,
    /// Flows that were other machines', and the cores that have them.
    pub inherited: Arc<InheritedFlows>,
    /// The switch between the TAP device and bonds.
    pub lan: Option<Arc<Lan>>,
    /// Whether services decide about packets at all; they do from the first configuration of an interface on.
    pub serving: bool,
}

/// The datapath of one core.
pub struct Datapath {
    pub(crate) id: u8,
    /// The bonds.
    pub tunnel: Tunnel,
    /// Firewall, NAT, load balancing, routes.
    pub services: Services,
    serving: bool,
    pub(crate) ownership: Arc<Ownership>,
    merge: Coalescer,
    pub(crate) pool: PacketPool,
    to_bonds: ToBonds,
    era_wait: EraWait,
    bonds: BondIds,
    cluster: Cluster,
    /// Fragments, where no services are in force.
    rendezvous: Rendezvous,
    placer: Placer,
    pub(crate) lan: CoreLan,
    pub(crate) drops: DropCounters,
}

impl Datapath {
    /// Core `id` of `node`. `random`: a generator of this core's own.
    #[must_use]
    pub fn new(id: u8, node: Arc<Node>, mut random: Random, snapshots: Snapshots) -> Self {
        let Snapshots { policy, ownership, neighbors, cluster, inherited, lan, serving, opened_ports } =
            snapshots;
        let limits = FragmentLimits::of(policy.limits(), policy.timeouts());
        let mut datapath = Self {
            id,
            tunnel: Tunnel::new(id, node),
            rendezvous: Rendezvous::new(limits, SecretState::draw(&mut random)),
            placer: Placer::new(random.word()),
            services: Services::new(id, random, &policy, &ownership, neighbors),
            serving,
            ownership,
            merge: Coalescer::new(),
            pool: PacketPool::new(),
            to_bonds: ToBonds::default(),
            era_wait: EraWait::default(),
            bonds: BondIds::default(),
            cluster: Cluster::default(),
            lan: CoreLan::default(),
            drops: DropCounters::default(),
        };
        datapath.lan.follow(lan.as_ref());
        datapath.services.follow_opened(&opened_ports);
        datapath.services.follow_inherited(&inherited);
        datapath.follow_cluster(cluster.as_ref(), &policy);
        datapath
    }

    /// Whether UDP datagrams that a bond delivered are merged; off where the host's device cannot take them.
    pub fn set_merge_udp(&mut self, merge: bool) {
        self.merge.set_merge_udp(merge);
    }

    /// The node that all cores share.
    #[must_use]
    pub fn node(&self) -> &Arc<Node> {
        self.tunnel.node()
    }

    /// Number of this core.
    #[must_use]
    pub fn id(&self) -> u8 {
        self.id
    }

    /// Everything that the tunnel dropped here or could not take, by reason.
    #[must_use]
    pub fn tunnel_drops(&self) -> DropCounters {
        let mut drops = self.tunnel.drops.clone();
        drops.merge(&self.drops);
        drops.merge(self.rendezvous.late_drops());
        drops
    }

    /// Everything that services dropped here, by reason.
    #[must_use]
    pub fn service_drops(&self) -> DropCounters {
        let mut drops = self.services.drops.clone();
        drops.merge(&self.services.late_drops());
        drops
    }

    /// Takes over what control has published since the last round.
    pub fn follow(&mut self, snapshots: &Snapshots) {
        self.services.follow(&snapshots.policy, &snapshots.ownership, &snapshots.neighbors);
        self.services.follow_opened(&snapshots.opened_ports);
        self.services.follow_inherited(&snapshots.inherited);
        self.ownership = Arc::clone(&snapshots.ownership);
        self.serving = snapshots.serving;
        self.lan.follow(snapshots.lan.as_ref());
        self.follow_cluster(snapshots.cluster.as_ref(), &snapshots.policy);
    }

    fn follow_cluster(&mut self, snapshot: Option<&Arc<Snapshot>>, policy: &Policy) {
        self.services.follow_units(snapshot.map(|snapshot| &snapshot.units));
        self.cluster.follow(snapshot, policy, self.tunnel.node());
        self.era_wait.tables_came();
    }

    /// Starts a round.
    pub fn begin(&mut self, now: Time) {
        if self.tunnel.begin(now) {
            self.bonds.follow(&self.tunnel);
            self.cluster.follow_bonds(self.tunnel.node());
        }
        self.cluster.follow_paths(now.ns(), &self.tunnel);
    }

    /// A packet or super-packet of the host. The buffer may be another one afterwards.
    pub fn host(&mut self, now: Time, packet: &mut PacketBuf, out: &mut impl Output) {
        packet.ingress = Ingress::Host;
        if !self.serving {
            self.host_to_bond(now, packet, out);
            return;
        }
        let offload = packet.offload;
        let mut frame = Frame::new(Ingress::Host, offload, packet.with_room(ETHERNET_BYTES));
        self.serve(now, &mut frame, out);
    }

    /// Without services, packets that the host sends into the tunnel device are for a bond.
    fn host_to_bond(&mut self, now: Time, packet: &mut PacketBuf, out: &mut impl Output) {
        match self.tunnel.classify(packet.packet(), None) {
            Ok(classified) if classified.owner == self.id => self.own_host(now, packet, &classified, out),
            Ok(classified) => {
                let handed = if packet.len() <= COPY_BYTES_MAX {
                    self.pool.copy(packet.packet(), &packet.offload, Ingress::Host)
                } else {
                    let spare = self.pool.take(packet.capacity());
                    Some(std::mem::replace(packet, spare))
                };
                if let Some(handed) = handed {
                    self.hand_over(classified.owner, Handed::Host(handed, None), out);
                }
            }
            Err(reason) => self.drops.add(reason),
        }
    }

    /// A packet of the host at the core of its tuple. For a fragment that is the core of its addresses: the ports are only
    /// in the first one, so that the others wait here for it and then go to the core of their flow.
    fn own_host(
        &mut self,
        now: Time,
        packet: &mut PacketBuf,
        classified: &Classified,
        out: &mut impl Output,
    ) {
        let header = *classified.header();
        if !header.is_fragmented() {
            let offload = packet.offload;
            self.tunnel.packet(now, &offload, packet.packet_mut(), classified, &mut Transmit(out));
            return;
        }
        let Self { rendezvous, pool, .. } = self;
        let mut released = Vec::new();
        let mut release = |piece: Released<'_>| {
            released.extend(
                pool.copy(piece.packet, &Default::default(), Ingress::Host).map(|copy| (copy, piece.key)),
            );
        };
        let (bytes, tenant) = (packet.packet(), 0);
        if let Err(reason) = rendezvous.push(now.ns(), bytes, &header, tenant, Ingress::Host, &mut release) {
            self.drops.add(reason);
        }
        for (mut piece, key) in released {
            let hash = self.ownership.hash(&key, tenant);
            let owner = self.tunnel.owner(&key, hash, header.dscp);
            if owner == self.id {
                self.send_piece(now, &mut piece, &key, out);
                self.pool.recycle(piece);
            } else {
                self.hand_over(owner, Handed::Host(piece, Some(key)), out);
            }
        }
    }

    /// A fragment at the core of its flow.
    fn send_piece(&mut self, now: Time, piece: &mut PacketBuf, key: &FlowKey, out: &mut impl Output) {
        match self.tunnel.classify(piece.packet(), Some(key)) {
            Ok(classified) => {
                let offload = piece.offload;
                self.tunnel.packet(now, &offload, piece.packet_mut(), &classified, &mut Transmit(out));
            }
            Err(reason) => self.drops.add(reason),
        }
    }

    /// A batch of frames of one interface; their bytes are changed in place.
    pub fn interface(&mut self, now: Time, frames: &mut [Frame<'_>], out: &mut impl Output) {
        let ingress = frames.first().and_then(|frame| frame.ingress.interface());
        if ingress.is_some_and(|interface| self.cluster.dispatches(interface)) {
            frames.iter_mut().for_each(|frame| self.dispatch(now, frame, out));
            return;
        }
        let Self { tunnel, services, drops, pool, cluster, .. } = self;
        services.batch(now.ns(), frames, &mut Emit { now, tunnel, drops, pool, cluster, out });
        if cluster.is_member() {
            frames.iter_mut().for_each(|frame| self.leave(now, frame, out));
            return;
        }
        out.interfaces(frames);
        for frame in frames {
            match frame.outcome {
                Outcome::Forward(Egress::Interface(_)) => {}
                _ => self.leave(now, frame, out),
            }
        }
    }

    /// A frame of a shared interface at a dispatcher: to a data plane, or to this host.
    fn dispatch(&mut self, now: Time, frame: &mut Frame<'_>, out: &mut impl Output) {
        let Self { tunnel, services, drops, pool, cluster, .. } = self;
        let policy = services.policy();
        let result = cluster.dispatch(policy, frame, pool, &mut send_to(tunnel, now, out));
        match result {
            Ok(true) => frame.outcome = Outcome::Consumed,
            Ok(false) => {
                if let Some(interface) = frame.ingress.interface() {
                    out.device_ingress(interface, &frame.offload, frame.bytes);
                }
            }
            Err(DropReason::TooBig) => {
                drops.add(DropReason::TooBig);
                let answer = cluster.too_big(now.ns(), frame);
                if let (Some(mut answer), Some(interface)) = (answer, frame.ingress.interface()) {
                    out.interface(interface, &VirtioNetHeader::default(), answer.frame());
                }
            }
            Err(reason) => {
                drops.add(reason);
                let answer = cluster.no_session(now.ns(), reason, frame.bytes);
                if let (Some(mut answer), Some(interface)) = (answer, frame.ingress.interface()) {
                    out.interface(interface, &VirtioNetHeader::default(), answer.frame());
                }
            }
        }
    }

    /// Asks for the way of a flow's packets that come in by an interface which this dispatcher has;
    /// [`Datapath::take_traced`] of some core has the answer.
    pub fn ask_way(
        &mut self,
        now: Time,
        (key, id): (&FlowKey, u32),
        interface: InterfaceId,
        out: &mut impl Output,
    ) {
        let Self { tunnel, services, drops, pool, cluster, .. } = self;
        let mut send = send_to(tunnel, now, out);
        if let Err(reason) = cluster.ask_way((services.policy(), key, id), interface, pool, &mut send) {
            drops.add(reason);
        }
    }

    /// Takes the answers that came.
    #[must_use]
    pub fn take_traced(&self) -> Vec<Traced> {
        std::mem::take(&mut *self.cluster.traced.borrow_mut())
    }

    /// Frame of neighbors at a shared interface: from a dispatcher to every data plane in turn (row D8); or a
    /// frame that the host sends by one that other machines have.
    pub fn shared_device(&mut self, now: Time, interface: InterfaceId, frame: &[u8], out: &mut impl Output) {
        let Self { tunnel, drops, pool, cluster, .. } = self;
        let mut send = send_to(tunnel, now, out);
        let result = if cluster.dispatches(interface) {
            cluster.broadcast(interface, (frame, None), pool, &mut send)
        } else {
            cluster.of_host(interface, frame, pool, &mut send)
        };
        if let Err(reason) = result {
            drops.add(reason);
        }
    }

    /// One packet through the services, and on.
    fn serve(&mut self, now: Time, frame: &mut Frame<'_>, out: &mut impl Output) {
        let Self { tunnel, services, drops, pool, cluster, .. } = self;
        services.packet(now.ns(), frame, &mut Emit { now, tunnel, drops, pool, cluster, out });
        self.leave(now, frame, out);
    }

    /// A frame that services have decided goes where they say.
    fn leave(&mut self, now: Time, frame: &mut Frame<'_>, out: &mut impl Output) {
        let bond = match frame.outcome {
            Outcome::Forward(Egress::Bond(bond)) => Some(bond),
            _ => None,
        };
        let is_member = self.cluster.is_member();
        // Only another unit and a bond ask for the 5-tuple; a frame for an interface goes without the look.
        let flow = frame.flow.filter(|_| is_member || bond.is_some());
        let key = flow.map(|(id, direction)| self.services.flows().leaves_as(id, direction));
        if is_member {
            let Self { tunnel, drops, pool, cluster, .. } = self;
            let result = cluster.leave(frame, key.as_ref(), pool, &mut send_to(tunnel, now, out));
            match result {
                Some(Ok(())) => return,
                Some(Err(reason)) => return drops.add(reason),
                None => {}
            }
        }
        let Some(bond) = bond else {
            leave(out, frame.outcome, &frame.offload, frame.bytes);
            return;
        };
        let packet = frame.bytes.get_mut(ETHERNET_BYTES..).unwrap_or_default();
        let (tunnel, drops) = (&mut self.tunnel, &mut self.drops);
        to_bond::send(tunnel, now, (bond, key.as_ref()), (&frame.offload, packet), drops, out);
    }

    /// Datagrams that a socket received from one source: `stride` bytes each, the last possibly shorter. Where several lanes
    /// share a socket they may be for different cores; each goes to the one that it names.
    pub fn datagrams(
        &mut self,
        now: Time,
        source: &Source,
        buffer: &mut [u8],
        stride: usize,
        out: &mut impl Output,
    ) {
        if buffer.is_empty() {
            self.drops.add(DropReason::TooShort);
        }
        let cores = self.ownership.cores;
        let stride = stride.max(1);
        let mut start = 0;
        let mut end = 0;
        while let Some(datagram) =
            buffer.get_mut(end..buffer.len().min(end + stride)).filter(|rest| !rest.is_empty())
        {
            let header = self.tunnel.read_header(datagram);
            let owner = header.and_then(|header| owner_core(&header, cores));
            let next = end + datagram.len();
            match owner.filter(|owner| *owner != self.id) {
                None => end = next,
                Some(owner) => {
                    let copy = self.pool.copy(datagram, &Default::default(), Ingress::Host);
                    self.own_datagrams(now, source, buffer.get_mut(start..end), stride, out);
                    if let Some(copy) = copy {
                        self.hand_over(owner, Handed::Datagram(*source, copy), out);
                    }
                    (start, end) = (next, next);
                }
            }
        }
        self.own_datagrams(now, source, buffer.get_mut(start..end), stride, out);
    }

    fn own_datagrams(
        &mut self,
        now: Time,
        source: &Source,
        datagrams: Option<&mut [u8]>,
        stride: usize,
        out: &mut impl Output,
    ) {
        let Some(datagrams) = datagrams.filter(|datagrams| !datagrams.is_empty()) else { return };
        let (tunnel, mut delivery) = self.delivery(now, out);
        tunnel.datagrams(now, source, datagrams, stride, &mut delivery);
    }

    /// The tunnel, and what it delivers to.
    fn delivery<'a, O: Output>(&'a mut self, now: Time, out: &'a mut O) -> (&'a mut Tunnel, Delivery<'a, O>) {
        let inner = Decision {
            out,
            services: self.serving.then_some(&mut self.services),
            id: self.id,
            ownership: &self.ownership,
            placer: &mut self.placer,
            rendezvous: &mut self.rendezvous,
            bonds: &self.bonds,
            cluster: &self.cluster,
            to_bonds: &mut self.to_bonds,
            pool: &mut self.pool,
            lan: &mut self.lan,
            era_wait: &mut self.era_wait,
        };
        (&mut self.tunnel, Delivery { now_ns: now.ns(), merge: &mut self.merge, inner })
    }

    /// Acts on what another core handed over.
    pub fn handed(&mut self, now: Time, handed: Handed, out: &mut impl Output) {
        let packet = match handed {
            Handed::Host(mut packet, Some(key)) => {
                self.send_piece(now, &mut packet, &key, out);
                packet
            }
            Handed::Host(mut packet, None) => {
                match self.tunnel.classify(packet.packet(), None) {
                    Ok(classified) => self.own_host(now, &mut packet, &classified, out),
                    Err(reason) => self.drops.add(reason),
                }
                packet
            }
            Handed::Datagram(source, mut packet) => {
                let stride = packet.len();
                self.own_datagrams(now, &source, Some(packet.packet_mut()), stride, out);
                packet
            }
            Handed::Bond(mut packet) => {
                self.delivery(now, out).1.inner.decide(now.ns(), &mut packet);
                packet
            }
            Handed::Place(mut packet, step) => {
                let mut inner = self.delivery(now, out).1.inner;
                if inner.stays_at_place(now.ns(), &mut packet, step) {
                    inner.decide(now.ns(), &mut packet);
                }
                packet
            }
            Handed::Frame(mut packet) => {
                match packet.ingress {
                    Ingress::Bond(_) => self.delivery(now, out).1.inner.decide_frame(now.ns(), &mut packet),
                    _ => self.own_tap(now, &mut packet, out),
                }
                packet
            }
            Handed::CoreWanted(bond, wanted) => {
                return self.delivery(now, out).1.inner.choose_wanted(now.ns(), bond, wanted);
            }
            Handed::LanNews(news) => return self.lan_news(&news),
            Handed::Service(mut handed) => {
                let Self { tunnel, services, drops, pool, cluster, .. } = self;
                let mut emit = Emit { now, tunnel, drops, pool, cluster, out };
                services.handed(now.ns(), &mut handed, &mut emit);
                handed.packet
            }
        };
        self.pool.recycle(packet);
    }

    pub(crate) fn hand_over(&mut self, core: u8, handed: Handed, out: &mut impl Output) {
        if !out.hand_over(core, handed) {
            self.drops.add(DropReason::RingFull);
        }
    }

    /// Decides what bonds have delivered and what was held back to be merged.
    pub fn flush(&mut self, now: Time, out: &mut impl Output) {
        self.delivery(now, out).1.flush();
        self.send_waiting(now, out);
    }

    /// Ends a round: timers, departures, reports. Returns when the next round is due at the latest.
    pub fn finish(&mut self, now: Time, out: &mut impl Output) -> Time {
        let services_due = Time::from_ns(self.services.tick(now.ns()));
        let Self { tunnel, services, drops, pool, cluster, .. } = self;
        let mut emit = Emit { now, tunnel, drops, pool, cluster, out };
        let unfinished = services.end_dead(now.ns(), &mut emit);
        let services_due = if unfinished { now } else { services_due };
        self.rendezvous.tick(now.ns());
        let era_due = self.look_again(now, out);
        let lan_due = self.tick_lan(now, out);
        self.flush(now, out);
        self.placer.follow(now.ns(), &self.ownership, self.tunnel.node());
        self.tell_assignments(now, out);
        let (tunnel, mut delivery) = self.delivery(now, out);
        let next = tunnel.finish(now, &mut delivery).min(services_due).min(lan_due).min(era_due);
        delivery.flush();
        // What the tunnel's timers delivered for a bond may have had to queue there.
        if self.send_waiting(now, out) { now } else { next }
    }

    /// Looks again at packets that wait for a table which has come, or does not come any more. When the next is due.
    fn look_again(&mut self, now: Time, out: &mut impl Output) -> Time {
        let (packets, again) = self.era_wait.take(now.ns());
        for packet in packets {
            self.delivery(now, out).1.inner.waited(now.ns(), packet, again);
        }
        self.era_wait.due_ns().map_or(Time::MAX, Time::from_ns)
    }

    /// Tells the peers which cores their flows were given (row T5).
    fn tell_assignments(&mut self, now: Time, out: &mut impl Output) {
        let told = self.placer.take_told();
        for same in told.chunk_by(|a, b| (a.bond, a.peer_core) == (b.bond, b.peer_core)) {
            let Some(first) = same.first() else { continue };
            let assigned: Vec<(u32, u8)> = same.iter().map(|told| (told.hash, told.core)).collect();
            let tunnel = &mut self.tunnel;
            tunnel.tell_assignments(now, first.bond, first.peer_core, &assigned, &mut Transmit(out));
        }
    }

    /// Sends packets that were delivered for other bonds; whether there was anything.
    fn send_waiting(&mut self, now: Time, out: &mut impl Output) -> bool {
        let sent = self.send_frames(now, out);
        if self.to_bonds.waiting.is_empty() {
            return sent;
        }
        let mut waiting = std::mem::take(&mut self.to_bonds.waiting);
        for (bond, key, mut packet) in waiting.drain(..) {
            let offload = packet.offload;
            let (tunnel, drops) = (&mut self.tunnel, &mut self.drops);
            to_bond::send(tunnel, now, (bond, key.as_ref()), (&offload, packet.packet_mut()), drops, out);
            self.pool.recycle(packet);
        }
        self.to_bonds.waiting = waiting;
        true
    }

    /// Takes over a new configuration of the tunnel; sends what it asks for.
    pub fn run(&mut self, now: Time, actions: Vec<Action>, out: &mut impl Output) {
        self.begin(now);
        self.tunnel.run(now, actions, &mut Transmit(out));
    }

    /// Tells all peers that this node stops. For the first core, as its last act.
    pub fn close(&mut self, now: Time, out: &mut impl Output) {
        self.tunnel.begin(now);
        self.tunnel.close(now, &mut Transmit(out));
    }
}
