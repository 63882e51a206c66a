//! One worker: pull from TUN, sockets and rings; act; push; tick; sleep. One pinned thread per core.

use std::io::{ErrorKind, IoSliceMut};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use linux::event::{Epoll, Interest, Ready};
use linux::tun::TunQueue;
use linux::udp::{RecvMeta, UdpSocket};
use packet::attachment::{BondId, Ingress};
use packet::coalesce::Coalescer;
use packet::drop_reason::{DropCounters, DropReason};
use packet::flow::FlowKey;
use packet::vnet::VirtioNetHeader;
use services::core::ETHERNET_BYTES;
use services::policy::Policy;
use tunnel::core::{Core, Output, Target, owner_core};
use tunnel::header::Header;
use tunnel::node::{Node, Source};
use tunnel::time::Time;

use crate::Shared;
use crate::counters::Counters;
use crate::gateway::{PORT_TOKENS, Part, PartContext};
use crate::rings::{Handed, Rings};
use crate::sockets::{Sockets, WanDevices};

/// All peers, whichever sent a packet.
const PEERS: Ingress = Ingress::Bond(BondId(0));

const TUN_TOKEN: u64 = 0;
const BELL_TOKEN: u64 = 1;
/// Bytes of a virtio header as TUN puts it before each packet.
const VNET_BYTES: usize = linux::tun::VNET_HEADER_BYTES;
/// Largest read: header and a 64 KiB super-packet.
const READ_BYTES: usize = VNET_BYTES + 65_536;
/// A round pulls at most so many packets from TUN …
const TUN_READS: usize = 64;
/// … or so many bytes, so that what is pulled is still in the cache when it leaves.
const TUN_BYTES: usize = 192 << 10;
/// Receive calls per socket and round.
const UDP_CALLS: usize = 4;
/// Buffers of one receive call.
const UDP_BUFFERS: usize = 8;
/// Items taken from rings in a round.
const RING_ITEMS: usize = 256;
/// A worker that looks for frames of interfaces again and again asks epoll for the rest this often.
const LOOK_NS: u64 = 20_000;
/// A core's load is measured over this long.
const LOAD_NS: u64 = 1_000_000_000;
/// Counters are published this often.
const PUBLISH_NS: u64 = 50_000_000;

/// What the tunnel's output needs: everything of the worker but the tunnel core itself.
struct Io {
    tun: TunQueue,
    sockets: Sockets,
    epoll: Epoll,
    coalescer: Coalescer,
    counters: Arc<Counters>,
    drops: DropCounters,
    node: Arc<Node>,
    now_ns: u64,
    /// What the tunnel delivered and the gateway, not the host, sends on.
    forwarded: Vec<(VirtioNetHeader, Vec<u8>)>,
    /// Whether the gateway has a way for a destination; `None` while there is no gateway.
    ways: Option<Arc<Policy>>,
}

/// A worker before and while it runs.
pub struct Worker {
    id: u8,
    shared: Arc<Shared>,
    core: Core,
    io: Io,
    rings: Rings,
    version: u64,
    gateway: Part,
    /// What the host sent for plain interfaces.
    from_tun: Vec<(VirtioNetHeader, Vec<u8>)>,
    read: Box<[u8]>,
    receive: Vec<Box<[u8]>>,
    published_ns: u64,
    /// Since when the load is measured, and the busy time then.
    load_since: (u64, u64),
}

impl Output for Io {
    fn transmit(&mut self, target: &Target, segment: usize, datagrams: &[u8]) {
        self.sockets.transmit(
            &self.epoll,
            self.now_ns,
            target,
            segment,
            datagrams,
            &self.counters,
            &mut self.drops,
        );
    }

    fn deliver(&mut self, bond: usize, packet: &[u8], partial: bool, may_merge: bool) {
        self.counters.tun_tx_packets.add(1);
        self.counters.tun_tx_bytes.add(packet.len() as u64);
        let Self { coalescer, tun, counters, drops, node, now_ns, ways, forwarded, .. } = self;
        // Partial checksums were vouched for by the peer's kernel and the AEAD: merging hides nothing.
        let ingress = Ingress::Bond(BondId(bond as u16));
        let fits = coalescer.push(ingress, packet, partial, may_merge || partial, &mut |packet| {
            let bytes = packet.with_virtio_header();
            if !divert(ways.as_deref(), bytes, forwarded) {
                write_tun(tun, counters, drops, node, *now_ns, bytes);
            }
        });
        if !fits {
            drops.add(DropReason::TooBig);
        }
    }
}

impl Io {
    fn flush(&mut self) {
        let Self { coalescer, tun, counters, drops, node, now_ns, ways, forwarded, .. } = self;
        coalescer.flush(&mut |packet| {
            let bytes = packet.with_virtio_header();
            if !divert(ways.as_deref(), bytes, forwarded) {
                write_tun(tun, counters, drops, node, *now_ns, bytes);
            }
        });
    }
}

/// What the tunnel delivers for somebody behind a plain interface is the gateway's, not the host's.
fn divert(ways: Option<&Policy>, bytes: &[u8], forwarded: &mut Vec<(VirtioNetHeader, Vec<u8>)>) -> bool {
    let Some(policy) = ways else { return false };
    let Some((header, packet)) = bytes.split_at_checked(VNET_BYTES) else { return false };
    let (Ok(offload), Ok(key)) = (VirtioNetHeader::parse(header), FlowKey::of(packet)) else { return false };
    let serves = policy.server_or_forward(&key).is_some() || policy.nat.is_outside(key.dst);
    if !serves && (policy.is_own(key.dst) || !leads_out(policy, &key)) {
        return false;
    }
    forwarded.push((offload, with_room(packet)));
    true
}

/// Whether the route to a packet's destination is by a plain interface.
fn leads_out(policy: &Policy, key: &FlowKey) -> bool {
    policy.fib.lookup(0, key.dst).is_some_and(|route| route.egress.interface().is_some())
}

/// A packet with room for an Ethernet header in front.
fn with_room(packet: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(ETHERNET_BYTES + packet.len());
    bytes.resize(ETHERNET_BYTES, 0);
    bytes.extend_from_slice(packet);
    bytes
}

fn write_tun(
    tun: &TunQueue,
    counters: &Counters,
    drops: &mut DropCounters,
    node: &Node,
    now_ns: u64,
    bytes: &[u8],
) {
    if let Some(packet) = bytes.get(VNET_BYTES..)
        && let Ok(flow) = FlowKey::of(packet)
    {
        counters.note_flow(node.ownership.load().hash(&flow, 0), (now_ns / 1_000_000_000) as u32);
    }
    if tun.write(bytes).is_err() {
        drops.add(DropReason::TunWrite);
    }
}

impl Worker {
    /// A worker for core `id`.
    ///
    /// # Errors
    /// When epoll cannot be set up.
    pub fn new(
        id: u8,
        shared: Arc<Shared>,
        tun: TunQueue,
        rings: Rings,
        merge_udp: bool,
    ) -> std::io::Result<Self> {
        let epoll = Epoll::new()?;
        epoll.add(&tun, TUN_TOKEN, Interest::Read)?;
        epoll.add(shared.doorbells[usize::from(id)].event(), BELL_TOKEN, Interest::Read)?;
        let node = Arc::clone(&shared.node);
        let mut coalescer = Coalescer::new();
        coalescer.set_merge_udp(merge_udp);
        Ok(Self {
            id,
            core: Core::new(id, Arc::clone(&node)),
            io: Io {
                tun,
                sockets: Sockets::new(shared.mark, node.cores),
                epoll,
                coalescer,
                counters: Arc::clone(&shared.counters[usize::from(id)]),
                drops: DropCounters::default(),
                node,
                now_ns: 0,
                forwarded: Vec::new(),
                ways: None,
            },
            gateway: Part::new(id, random_word()?, Arc::clone(&shared.gateway)),
            from_tun: Vec::new(),
            rings,
            version: 0,
            read: vec![0; READ_BYTES].into_boxed_slice(),
            receive: (0..UDP_BUFFERS).map(|_| vec![0; 65_536].into_boxed_slice()).collect(),
            published_ns: 0,
            load_since: (linux::clock::monotonic_ns(), 0),
            shared,
        })
    }

    /// Runs until the engine stops.
    pub fn run(mut self) {
        let mut ready = Vec::new();
        let mut wait = Duration::ZERO;
        let (mut asked_ns, mut end_ns) = (0, 0);
        loop {
            if !self.gateway.listens() && end_ns - asked_ns < LOOK_NS {
                ready.clear();
            } else {
                if let Err(error) = self.io.epoll.wait(&mut ready, Some(wait)) {
                    tracing::error!(core = self.id, %error, "epoll");
                    return;
                }
                asked_ns = end_ns;
            }
            let woke_ns = linux::clock::monotonic_ns();
            let bell = &self.shared.doorbells[usize::from(self.id)];
            bell.get_up();
            if self.shared.stop.load(Relaxed) {
                self.stop();
                return;
            }
            let (next, more) = self.round(woke_ns, &ready);
            end_ns = linux::clock::monotonic_ns();
            self.io.counters.note_round(end_ns.saturating_sub(woke_ns));
            self.publish(end_ns);
            if self.gateway.is_hot(end_ns) && !self.shared.stop.load(Relaxed) {
                // Packets of an interface come one by one: being woken for each costs more than looking again, and
                // whoever else wants this CPU gets it.
                self.gateway.listen(&self.io.epoll, false);
                std::thread::yield_now();
                wait = Duration::ZERO;
                continue;
            }
            self.gateway.listen(&self.io.epoll, true);
            let bell = &self.shared.doorbells[usize::from(self.id)];
            bell.lie_down();
            let idle = !more && self.rings.is_empty();
            wait = if idle {
                Duration::from_nanos(next.ns().saturating_sub(end_ns).min(1_000_000_000))
            } else {
                Duration::ZERO
            };
        }
    }

    /// One round; returns when the next is due and whether something was left unread.
    fn round(&mut self, now_ns: u64, ready: &[Ready]) -> (Time, bool) {
        let now = Time::from_ns(now_ns);
        self.io.now_ns = now_ns;
        self.follow_config();
        self.core.begin(now);
        let mut more = false;
        for event in ready {
            match event.token {
                token if token >= PORT_TOKENS => {
                    let (gateway, mut context) = self.gateway();
                    more |= gateway.pull(now_ns, token, &mut context);
                }
                TUN_TOKEN => more |= self.pull_tun(now),
                BELL_TOKEN => self.answer_bell(now),
                token => more |= self.pull_socket(now, token),
            }
        }
        let (gateway, mut context) = self.gateway();
        more |= gateway.pull_all(now_ns, &mut context);
        more |= self.pull_rings(now);
        let due_ns = self.serve(now_ns);
        self.enter_tunnel(now);
        let next = self.core.finish(now, &mut self.io).min(Time::from_ns(due_ns));
        self.io.flush();
        more |= self.leave_tunnel(now_ns);
        for (bond, id, bytes) in self.io.sockets.take_too_big() {
            let bonds = self.io.node.bonds.load();
            // An MTU probe that is too big says only what it was sent to find out.
            if let Some(bond) = bonds.get(bond)
                && bond.path(id).is_some_and(|path| bytes <= path.datagram_bytes())
            {
                self.io.node.black_hole(now, bond, id);
            }
        }
        (next, more)
    }

    /// The gateway and what it needs of the worker.
    fn gateway(&mut self) -> (&mut Part, PartContext<'_>) {
        let context = PartContext { tun: &self.io.tun, rings: &mut self.rings };
        (&mut self.gateway, context)
    }

    /// What the host sent for plain interfaces, and the gateway's own business.
    fn serve(&mut self, now_ns: u64) -> u64 {
        let mut packets = std::mem::take(&mut self.from_tun);
        if !packets.is_empty() {
            let (gateway, mut context) = self.gateway();
            gateway.take(now_ns, Ingress::Host, &mut packets, &mut context);
            packets.clear();
        }
        self.from_tun = packets;
        self.gateway.tick(now_ns)
    }

    /// What the gateway has for the tunnel.
    fn enter_tunnel(&mut self, now: Time) {
        for (offload, mut packet) in std::mem::take(&mut self.gateway.tunnel) {
            match self.core.classify(&packet) {
                Ok(classified) if classified.owner == self.id => {
                    self.core.packet(now, &offload, &mut packet, &classified, &mut self.io);
                }
                Ok(classified) => {
                    let item = Handed::Packet(offload, packet);
                    hand_over(&mut self.rings, usize::from(classified.owner), item, &mut self.io);
                }
                Err(reason) => self.io.drops.add(reason),
            }
        }
    }

    /// What the tunnel delivered for the gateway; whether that made something for the tunnel again.
    fn leave_tunnel(&mut self, now_ns: u64) -> bool {
        let mut packets = std::mem::take(&mut self.io.forwarded);
        if !packets.is_empty() {
            let (gateway, mut context) = self.gateway();
            gateway.take(now_ns, PEERS, &mut packets, &mut context);
            packets.clear();
        }
        self.io.forwarded = packets;
        !self.gateway.tunnel.is_empty()
    }

    fn follow_config(&mut self) {
        if self.gateway.follow(&self.io.counters) {
            self.io.ways = Some(self.gateway.policy());
        }
        let config = self.shared.config.load();
        if config.version == self.version {
            return;
        }
        self.version = config.version;
        let own = config
            .listeners
            .iter()
            .map(|group| (group.wan, Arc::clone(&group.sockets[usize::from(self.id)])))
            .collect();
        if let Err(error) = self.io.sockets.configure(
            &self.io.epoll,
            own,
            WanDevices(config.devices.clone()),
            config.per_path.clone(),
        ) {
            tracing::error!(core = self.id, %error, "listening socket");
        }
        let bonds = self.io.node.bonds.load();
        self.io.sockets.retain_paths(&self.io.epoll, |bond, path| {
            bonds.get(bond).is_some_and(|bond| bond.path(path).is_some())
        });
    }

    fn answer_bell(&mut self, now: Time) {
        // Whatever rang, the round looks everywhere.
        let _ = self.shared.doorbells[usize::from(self.id)].event().drain();
        self.gateway.read_letters(now.ns(), &self.io.epoll);
        if self.id == 0 {
            let actions = self.shared.take_actions();
            if !actions.is_empty() {
                self.core.run(now, actions, &mut self.io);
            }
        }
    }

    fn pull_tun(&mut self, now: Time) -> bool {
        let mut bytes = 0;
        for _ in 0..TUN_READS {
            let length = match self.io.tun.read(&mut self.read) {
                Ok(length) => length,
                Err(error) => {
                    if error.kind() != ErrorKind::WouldBlock && error.kind() != ErrorKind::Interrupted {
                        tracing::debug!(core = self.id, %error, "TUN read");
                    }
                    return false;
                }
            };
            let Some((header, packet)) =
                self.read.get_mut(..length).and_then(|all| all.split_at_mut_checked(VNET_BYTES))
            else {
                self.io.drops.add(DropReason::TooShort);
                continue;
            };
            let Ok(offload) = VirtioNetHeader::parse(header) else {
                self.io.drops.add(DropReason::BadOffload);
                continue;
            };
            bytes += length;
            let segments = match usize::from(offload.gso_size) {
                0 => 1,
                size => packet.len().saturating_sub(usize::from(offload.hdr_len)).div_ceil(size).max(1),
            };
            self.io.counters.tun_rx_packets.add(segments as u64);
            self.io.counters.tun_rx_bytes.add(packet.len() as u64);
            // What the host routed here for somebody behind a plain interface is the gateway's (row R8).
            if let Some(policy) = self.io.ways.as_deref()
                && FlowKey::of(packet).is_ok_and(|key| leads_out(policy, &key))
            {
                self.from_tun.push((offload, with_room(packet)));
                continue;
            }
            match self.core.classify(packet) {
                Ok(classified) if classified.owner == self.id => {
                    self.core.packet(now, &offload, packet, &classified, &mut self.io);
                }
                Ok(classified) => {
                    let item = Handed::Packet(offload, packet.to_vec());
                    hand_over(&mut self.rings, usize::from(classified.owner), item, &mut self.io);
                }
                Err(reason) => self.io.drops.add(reason),
            }
            if bytes >= TUN_BYTES {
                return true;
            }
        }
        true
    }

    fn pull_socket(&mut self, now: Time, token: u64) -> bool {
        let Some((socket, source)) = self.io.sockets.by_token(token) else { return false };
        for _ in 0..UDP_CALLS {
            let mut metas: [RecvMeta; UDP_BUFFERS] = std::array::from_fn(|_| RecvMeta::default());
            match self.receive(now, &socket, source, &mut metas) {
                Ok(count) if count < UDP_BUFFERS => return false,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
                Err(_) => {
                    // An ICMP error about something sent earlier; reading it has cleared it.
                    let _ = socket.take_error();
                    return false;
                }
            }
        }
        true
    }

    fn receive(
        &mut self,
        now: Time,
        socket: &UdpSocket,
        source: Source,
        metas: &mut [RecvMeta],
    ) -> std::io::Result<usize> {
        let count = {
            let mut slices: [IoSliceMut<'_>; UDP_BUFFERS] = {
                let mut buffers = self.receive.iter_mut();
                std::array::from_fn(|_| {
                    IoSliceMut::new(buffers.next().map_or(&mut [], |buffer| &mut buffer[..]))
                })
            };
            socket.recv(&mut slices, metas)?
        };
        for (index, meta) in metas.iter().take(count).enumerate() {
            let stride = meta.stride.max(1);
            self.io.counters.udp_rx_datagrams.add(meta.bytes.div_ceil(stride) as u64);
            self.io.counters.udp_rx_bytes.add(meta.bytes as u64);
            let local = if source.socket.is_some() { None } else { meta.local_ip };
            let source = Source { remote: canonical(meta.from), local, ..source };
            self.sort_train(now, &source, index, meta.bytes, stride);
        }
        Ok(count)
    }

    /// A train of datagrams may mix lanes where a 4-tuple is shared: each segment goes to its owner.
    fn sort_train(&mut self, now: Time, source: &Source, index: usize, bytes: usize, stride: usize) {
        let Some(buffer) = self.receive.get_mut(index) else { return };
        let cores = self.io.node.cores;
        let train = &mut buffer[..bytes.min(65_536)];
        let mut start = 0;
        let mut run = 0;
        // Runs of datagrams for this core are processed together; others are handed over one by one.
        while start + run < train.len() {
            let end = (start + run + stride).min(train.len());
            let datagram = &train[start + run..end];
            let owner = Header::parse(datagram).ok().and_then(|header| owner_core(&header, cores));
            match owner {
                Some(owner) if owner != self.id => {
                    let item = Handed::Datagram(*source, datagram.to_vec());
                    hand_over(&mut self.rings, usize::from(owner), item, &mut self.io);
                    self.core.datagrams(now, source, &mut train[start..start + run], stride, &mut self.io);
                    start = end;
                    run = 0;
                }
                _ => run = end - start,
            }
        }
        self.core.datagrams(now, source, &mut train[start..start + run], stride, &mut self.io);
    }

    fn pull_rings(&mut self, now: Time) -> bool {
        for _ in 0..RING_ITEMS {
            let Some(item) = self.rings.pop() else { return false };
            self.io.counters.ring_in.add(1);
            match item {
                Handed::Service(handed) => {
                    let (gateway, mut context) = self.gateway();
                    gateway.handed(now.ns(), *handed, &mut context);
                }
                Handed::Packet(offload, mut packet) => match self.core.classify(&packet) {
                    Ok(classified) => self.core.packet(now, &offload, &mut packet, &classified, &mut self.io),
                    Err(reason) => self.io.drops.add(reason),
                },
                Handed::Datagram(source, mut datagram) => {
                    let stride = datagram.len();
                    self.core.datagrams(now, &source, &mut datagram, stride, &mut self.io);
                }
            }
        }
        true
    }

    fn publish(&mut self, now_ns: u64) {
        if now_ns.saturating_sub(self.published_ns) < PUBLISH_NS {
            return;
        }
        let elapsed_ns = now_ns.saturating_sub(self.load_since.0);
        if elapsed_ns >= LOAD_NS {
            let busy_ns = self.io.counters.busy_ns.get();
            let share = (busy_ns - self.load_since.1).saturating_mul(255) / elapsed_ns;
            let share = u8::try_from(share).unwrap_or(u8::MAX);
            self.io.node.set_load(self.id, share);
            self.gateway.core.load_percent = (u16::from(share) * 100 / 255) as u8;
            self.load_since = (now_ns, busy_ns);
        }
        self.published_ns = now_ns;
        let mut drops = self.core.drops.clone();
        for (reason, count) in self.io.drops.iter() {
            drops.add_n(reason, count);
        }
        self.io.counters.set_drops(&drops);
    }

    fn stop(&mut self) {
        let now = Time::from_ns(linux::clock::monotonic_ns());
        if self.id == 0 {
            self.core.begin(now);
            self.core.close(now, &mut self.io);
        }
        self.published_ns = 0;
        self.publish(now.ns());
    }
}

/// A seed for the hash tables of one core.
fn random_word() -> std::io::Result<u64> {
    getrandom::u64().map_err(std::io::Error::other)
}

fn hand_over(rings: &mut Rings, owner: usize, item: Handed, io: &mut Io) {
    io.counters.ring_out.add(1);
    if !rings.push(owner, item) {
        io.drops.add(DropReason::RingFull);
    }
}

/// An IPv4 address seen through a dual-stack socket is that IPv4 address.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
