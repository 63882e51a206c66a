//! No way of a packet between interface, host and bond allocates or copies it: counted by an allocator of its own, which is
//! why this is a test binary with a single test. A packet that leaves must lie where it was put; what a bond delivered lies
//! in the buffer that it was merged into.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use datapath::{Datapath, Handed, Output, Snapshots};
use packet::attachment::{BondId, Egress, Ingress, InterfaceId};
use packet::buffer::PACKET_BYTES_MAX;
use packet::vnet::VirtioNetHeader;
use packet::{DropReason, PacketBuf, checksum};
use services::pipeline::{ETHERNET_BYTES, Frame, Neighbors, Outcome};
use services::policy::Policy;
use services::random::Random;
use services::spec::{GatewaySpec, InterfaceSpec, LinkSpec, PeerSpec, RouteSpec};
use tunnel::config::{NodeConfig, Peer, Snapshot, Wan};
use tunnel::forwarder::Target;
use tunnel::node::{Node, Source};
use tunnel::time::Time;

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator unchanged; counting touches a constant-initialised
// thread local, which neither allocates nor has a destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise about the layout is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the pointer came from `alloc` above, hence from the system's allocator.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const LAN: InterfaceId = InterfaceId(0);
const WAN: InterfaceId = InterfaceId(1);
const LEFT: BondId = BondId(0);
const RIGHT: BondId = BondId(1);
/// Packets of one measured batch.
const PACKETS: usize = 8;

/// Output that keeps datagrams and says where everything else lay. Its memory is made before anything is counted.
struct Out {
    datagrams: Vec<(Target, usize, std::ops::Range<usize>)>,
    bytes: Vec<u8>,
    host: Vec<usize>,
    interfaces: Vec<(InterfaceId, usize)>,
    drops: Vec<DropReason>,
}

impl Out {
    fn new() -> Self {
        Self {
            datagrams: Vec::with_capacity(4_096),
            bytes: Vec::with_capacity(8 << 20),
            host: Vec::with_capacity(4_096),
            interfaces: Vec::with_capacity(4_096),
            drops: Vec::with_capacity(64),
        }
    }

    fn clear(&mut self) {
        self.datagrams.clear();
        self.bytes.clear();
        self.host.clear();
        self.interfaces.clear();
        self.drops.clear();
    }

    /// Packets that left by bond, host, interface.
    fn left(&self) -> (usize, usize, usize) {
        let datagrams = self.datagrams.iter().map(|(_, segment, range)| range.len().div_ceil(*segment)).sum();
        (datagrams, self.host.len(), self.interfaces.len())
    }
}

impl Output for Out {
    fn transmit(&mut self, target: &Target, segment: usize, datagrams: &[u8]) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(datagrams);
        self.datagrams.push((*target, segment, start..self.bytes.len()));
    }

    fn host(&mut self, _: &VirtioNetHeader, bytes: &mut [u8]) {
        self.host.push(bytes.as_ptr() as usize + ETHERNET_BYTES);
    }

    fn tap(&mut self, _: &VirtioNetHeader, _: &[u8]) {}

    fn device_ingress(&mut self, _: InterfaceId, offload: &VirtioNetHeader, bytes: &mut [u8]) {
        self.host(offload, bytes);
    }

    fn shared_device(&mut self, _: InterfaceId, _: &[u8]) {}

    fn interface(&mut self, interface: InterfaceId, _: &VirtioNetHeader, bytes: &mut [u8]) {
        self.interfaces.push((interface, bytes.as_ptr() as usize + ETHERNET_BYTES));
    }

    fn interfaces(&mut self, frames: &mut [Frame<'_>]) {
        for frame in frames {
            if let Outcome::Forward(Egress::Interface(id)) = frame.outcome {
                self.interfaces.push((id, frame.packet().as_ptr() as usize));
            }
        }
    }

    fn resolve(&mut self, _: InterfaceId, _: IpAddr, _: &VirtioNetHeader, _: &mut [u8]) {
        self.drops.push(DropReason::NoNeighbor);
    }

    fn hand_over(&mut self, _: u8, _: Handed) -> bool {
        false
    }

    fn processed(&mut self, _: u32) {}

    fn dropped(&mut self, reason: DropReason) {
        self.drops.push(reason);
    }
}

/// One node with one core.
struct Site {
    datapath: Datapath,
    out: Out,
    address: SocketAddr,
}

impl Site {
    fn new(number: u8, spec: Option<GatewaySpec>) -> Self {
        let config = NodeConfig::of_number(number, 1);
        let ownership = config.ownership.load_full();
        let node = Arc::new(Node::new(config));
        let serving = spec.is_some();
        let mut neighbors = Neighbors { version: 1, ..Neighbors::default() };
        neighbors.known.insert((LAN, "10.0.0.5".parse().unwrap()), [2, 0, 0, 0, 1, 5]);
        neighbors.known.insert((WAN, "203.0.113.254".parse().unwrap()), [2, 0, 0, 0, 2, 254]);
        let (policy, _) = Policy::compile(spec.unwrap_or_default(), None, 0).unwrap();
        let snapshots = Snapshots {
            policy: Arc::new(policy),
            ownership,
            neighbors: Arc::new(neighbors),
            cluster: None,
            inherited: Arc::default(),
            opened_ports: Arc::default(),
            lan: None,
            serving,
        };
        Self {
            datapath: Datapath::new(0, node, Random::of_number(u64::from(number)), snapshots),
            out: Out::new(),
            address: format!("192.0.2.{number}:4600").parse().unwrap(),
        }
    }

    fn public_key(&self) -> [u8; 32] {
        self.datapath.node().public_key()
    }
}

/// A hub with two interfaces and two branches.
struct World {
    now: Time,
    hub: Site,
    branches: [Site; 2],
}

fn peer(id: BondId, site: &Site, dial: bool, allowed: &[&str]) -> Peer {
    Peer {
        endpoints: if dial { vec![site.address] } else { Vec::new() },
        allowed_ips: allowed.iter().map(|net| net.parse().unwrap()).collect(),
        paths: tunnel::config::PeerPaths { sockets: 1, ..Default::default() },
        ..Peer::new(id, format!("peer-{id}"), site.public_key())
    }
}

fn hub_spec() -> GatewaySpec {
    let interface = |name: &str, address: &str, last: u8| {
        InterfaceSpec::new(name, vec![address.parse().unwrap()], LinkSpec::ethernet([2, 0, 0, 0, 0, last]))
    };
    let route = |prefix: &str, egress: Egress, via: Option<&str>| {
        RouteSpec::new(0, prefix.parse().unwrap(), egress, via.map(|via| via.parse().unwrap()))
    };
    let branch = |id: BondId, net: &str| PeerSpec {
        id,
        name: format!("peer-{id}"),
        tenant: 0,
        allowed_ips: vec![net.parse().unwrap()],
    };
    GatewaySpec {
        interfaces: vec![interface("lan", "10.0.0.1/24", 0), interface("wan", "203.0.113.1/24", 1)],
        peers: vec![branch(LEFT, "10.1.0.0/16"), branch(RIGHT, "10.2.0.0/16")],
        tenants: vec![String::new()],
        routes: vec![
            route("10.0.0.0/24", Egress::Interface(LAN), None),
            route("0.0.0.0/0", Egress::Interface(WAN), Some("203.0.113.254")),
            route("10.0.0.1/32", Egress::Host, None),
            route("203.0.113.1/32", Egress::Host, None),
            route("10.1.0.0/16", Egress::Bond(LEFT), None),
            route("10.2.0.0/16", Egress::Bond(RIGHT), None),
        ],
        ..GatewaySpec::default()
    }
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            now: Time::from_ns(1_000_000_000_000),
            hub: Site::new(1, Some(hub_spec())),
            branches: [Site::new(11, None), Site::new(12, None)],
        };
        let peers = vec![
            peer(LEFT, &world.branches[0], false, &["10.1.0.0/16"]),
            peer(RIGHT, &world.branches[1], false, &["10.2.0.0/16"]),
        ];
        let (now, hub) = (world.now, &mut world.hub);
        let mut actions = Vec::new();
        let snapshot = Snapshot { wans: vec![wan(hub)], peers, ..Snapshot::default() };
        hub.datapath.node().apply(now, &snapshot, &mut actions);
        hub.datapath.run(now, actions, &mut hub.out);
        for branch in &mut world.branches {
            let mut actions = Vec::new();
            let peers = vec![peer(BondId(0), hub, true, &["0.0.0.0/0"])];
            branch.datapath.node().apply(
                now,
                &Snapshot { wans: vec![wan(branch)], peers, ..Snapshot::default() },
                &mut actions,
            );
            branch.datapath.run(now, actions, &mut branch.out);
        }
        for _ in 0..4_000 {
            world.step();
        }
        for site in world.branches.iter().chain([&world.hub]) {
            assert!(site.datapath.node().sessions_held() > 0, "no session");
        }
        world
    }

    /// A millisecond of everybody's life.
    fn step(&mut self) {
        self.now = self.now.plus_us(1_000);
        let now = self.now;
        for site in self.branches.iter_mut().chain([&mut self.hub]) {
            site.datapath.begin(now);
            site.datapath.finish(now, &mut site.out);
        }
        self.carry();
    }

    /// What the sites sent arrives.
    fn carry(&mut self) {
        let now = self.now;
        for branch in &mut self.branches {
            let (datagrams, mut bytes) =
                (std::mem::take(&mut branch.out.datagrams), branch.out.bytes.clone());
            branch.out.clear();
            for (_, segment, range) in datagrams {
                let source = from_branch(branch.address);
                self.hub.datapath.datagrams(now, &source, &mut bytes[range], segment, &mut self.hub.out);
            }
        }
        let hub = &mut self.hub;
        let (datagrams, mut bytes) = (std::mem::take(&mut hub.out.datagrams), hub.out.bytes.clone());
        hub.out.clear();
        for (target, segment, range) in datagrams {
            let to = self.branches.iter_mut().find(|branch| branch.address == target.route.remote).unwrap();
            let source = Source {
                wan: 0,
                local: None,
                remote: hub.address,
                socket: Some((0, target.path)),
                hops: None,
            };
            to.datapath.datagrams(now, &source, &mut bytes[range], segment, &mut to.out);
        }
    }

    /// Datagrams of the left branch with these packets, to be received by the hub.
    fn sent_by_left(&mut self, packets: &[Vec<u8>]) -> Vec<(usize, Vec<u8>)> {
        let left = &mut self.branches[0];
        left.out.clear();
        let mut buffer = PacketBuf::with_capacity(PACKET_BYTES_MAX);
        left.datapath.begin(self.now);
        for packet in packets {
            buffer.clear();
            assert!(buffer.copy_from(packet));
            left.datapath.host(self.now, &mut buffer, &mut left.out);
        }
        // Paced packets leave within the next milliseconds.
        for _ in 0..20 {
            self.now = self.now.plus_us(1_000);
            left.datapath.begin(self.now);
            left.datapath.finish(self.now, &mut left.out);
        }
        let out = &left.out;
        out.datagrams
            .iter()
            .map(|(_, segment, range)| (*segment, out.bytes[range.clone()].to_vec()))
            .collect()
    }
}

/// The link of a site.
fn wan(site: &Site) -> Wan {
    Wan::new(0, vec![site.address.ip()])
}

fn from_branch(remote: SocketAddr) -> Source {
    Source { wan: 0, local: Some("192.0.2.1".parse().unwrap()), remote, socket: None, hops: None }
}

/// A UDP packet of 300 bytes.
fn udp(src: &str, dst: &str) -> Vec<u8> {
    let (src, dst): (SocketAddr, SocketAddr) = (src.parse().unwrap(), dst.parse().unwrap());
    let (IpAddr::V4(from), IpAddr::V4(to)) = (src.ip(), dst.ip()) else { panic!("IPv4") };
    let mut packet = vec![0; 300];
    packet[..4].copy_from_slice(&[0x45, 0, 1, 44]);
    packet[8..10].copy_from_slice(&[64, 17]);
    packet[12..16].copy_from_slice(&from.octets());
    packet[16..20].copy_from_slice(&to.octets());
    let sum = checksum::finish(checksum::sum(&packet[..20], 0));
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet[20..22].copy_from_slice(&src.port().to_be_bytes());
    packet[22..24].copy_from_slice(&dst.port().to_be_bytes());
    packet[24..26].copy_from_slice(&280u16.to_be_bytes());
    packet
}

/// By what packets come in, and by what they leave: source, destination.
const WAYS: [(Ingress, Egress, &str, &str); 8] = [
    (Ingress::Interface(LAN), Egress::Interface(WAN), "10.0.0.5:1000", "198.51.100.7:53"),
    (Ingress::Interface(LAN), Egress::Host, "10.0.0.5:1001", "10.0.0.1:53"),
    (Ingress::Interface(LAN), Egress::Bond(LEFT), "10.0.0.5:1002", "10.1.0.9:53"),
    (Ingress::Host, Egress::Interface(LAN), "10.0.0.1:1003", "10.0.0.5:53"),
    (Ingress::Host, Egress::Bond(LEFT), "10.0.0.1:1004", "10.1.0.9:53"),
    (Ingress::Bond(LEFT), Egress::Interface(LAN), "10.1.0.9:1005", "10.0.0.5:53"),
    (Ingress::Bond(LEFT), Egress::Host, "10.1.0.9:1006", "10.0.0.1:53"),
    (Ingress::Bond(LEFT), Egress::Bond(RIGHT), "10.1.0.9:1007", "10.2.0.9:53"),
];

#[test]
fn no_way_of_a_packet_allocates_or_copies_it() {
    let mut world = World::new();
    for (ingress, egress, src, dst) in WAYS {
        let packet = udp(src, dst);
        let mut least = usize::MAX;
        // Some allocate their buffers once; what happens for every packet happens in every batch.
        for _ in 0..12 {
            let allocations = batch(&mut world, ingress, egress, &packet);
            least = least.min(allocations);
            for _ in 0..30 {
                world.step();
            }
        }
        assert_eq!(least, 0, "{ingress:?} → {egress:?}: allocations for {PACKETS} packets");
    }
    host_to_host_leaves_no_trace(&mut world);
}

/// The ninth way: the host's own packets to itself do not come by the tunnel device; one that does is not lost in a loop.
fn host_to_host_leaves_no_trace(world: &mut World) {
    let packet = udp("10.0.0.1:1008", "203.0.113.1:53");
    let allocations = batch(world, Ingress::Host, Egress::Host, &packet);
    assert!(allocations < PACKETS, "{allocations} allocations for {PACKETS} packets");
}

/// Puts a batch through the hub; allocations meanwhile.
fn batch(world: &mut World, ingress: Ingress, egress: Egress, packet: &[u8]) -> usize {
    let packets = vec![packet.to_vec(); PACKETS];
    let incoming = if ingress == Ingress::Bond(LEFT) { world.sent_by_left(&packets) } else { Vec::new() };
    let mut incoming = incoming;
    let left = from_branch(world.branches[0].address);
    let now = world.now;
    let Site { datapath, out, .. } = &mut world.hub;
    out.clear();
    let mut rings: Vec<Vec<u8>> =
        packets.iter().map(|packet| [vec![0; ETHERNET_BYTES], packet.clone()].concat()).collect();
    let places: Vec<usize> = rings.iter().map(|frame| frame.as_ptr() as usize + ETHERNET_BYTES).collect();
    let mut frames: Vec<Frame<'_>> =
        rings.iter_mut().map(|frame| Frame::new(ingress, VirtioNetHeader::default(), frame)).collect();
    let mut buffer = PacketBuf::with_capacity(PACKET_BYTES_MAX);
    let mut host_place = 0;
    datapath.begin(now);

    let before = ALLOCATIONS.get();
    match ingress {
        Ingress::Interface(_) => datapath.interface(now, &mut frames, out),
        Ingress::Host => {
            for packet in &packets {
                buffer.clear();
                buffer.copy_from(packet);
                host_place = buffer.packet().as_ptr() as usize;
                datapath.host(now, &mut buffer, out);
            }
        }
        Ingress::Bond(_) => {
            for (segment, bytes) in &mut incoming {
                datapath.datagrams(now, &left, bytes, *segment, out);
            }
            datapath.flush(now, out);
        }
    }
    let allocations = ALLOCATIONS.get() - before;

    let went = out.left();
    match egress {
        Egress::Bond(_) => assert!(went.1 + went.2 == 0, "{ingress:?} → {egress:?}: {went:?}"),
        Egress::Host => assert!(went.1 > 0 && went.2 == 0, "{ingress:?} → {egress:?}: {went:?}"),
        _ => assert!(went.1 == 0 && went.2 > 0, "{ingress:?} → {egress:?}: {went:?} {:?}", out.drops),
    }
    for place in out.host.iter().chain(out.interfaces.iter().map(|(_, place)| place)) {
        let lies_where_it_was = match ingress {
            Ingress::Interface(_) => places.contains(place),
            Ingress::Host => *place == host_place,
            Ingress::Bond(_) => true,
        };
        assert!(lies_where_it_was, "{ingress:?} → {egress:?}: copied");
    }
    assert!(out.drops.is_empty(), "{:?}", out.drops);
    allocations
}

/// Whatever a peer may use as a source, what no router passes on is not taken out of its bond.
#[test]
fn martians_do_not_come_out_of_a_bond() {
    let mut world = World::new();
    let [left, right] = &world.branches;
    let allowed = ["0.0.0.0/0", "10.2.0.0/16"];
    let peers = vec![peer(LEFT, left, false, &allowed[..1]), peer(RIGHT, right, false, &allowed[1..])];
    let snapshot = Snapshot { wans: vec![wan(&world.hub)], peers, ..Snapshot::default() };
    let mut actions = Vec::new();
    world.hub.datapath.node().apply(world.now, &snapshot, &mut actions);
    let Site { datapath, out, .. } = &mut world.hub;
    datapath.run(world.now, actions, out);
    for (src, dst, refused) in [
        ("172.16.0.9:1", "10.0.0.5:53", None),
        ("127.0.0.1:1", "10.0.0.5:53", Some(DropReason::MartianLoopback)),
        ("0.0.0.9:1", "10.0.0.5:53", Some(DropReason::MartianThisNetwork)),
        ("240.0.0.9:1", "10.0.0.5:53", Some(DropReason::MartianReserved)),
        ("169.254.0.9:1", "10.0.0.5:53", Some(DropReason::MartianLinkLocal)),
        ("224.0.0.9:1", "10.0.0.5:53", Some(DropReason::MartianMulticast)),
        ("172.16.0.9:1", "127.0.0.1:53", Some(DropReason::MartianLoopback)),
        ("172.16.0.9:1", "169.254.169.254:53", Some(DropReason::MartianLinkLocal)),
        ("172.16.0.9:1", "10.0.0.5:54", None),
    ] {
        let incoming = world.sent_by_left(&[udp(src, dst)]);
        assert!(!incoming.is_empty(), "{src} {dst}: its branch does not send it");
        let source = from_branch(world.branches[0].address);
        let Site { datapath, out, .. } = &mut world.hub;
        out.clear();
        // Already where the tunnel ends: a node may have no services.
        let count = |datapath: &Datapath| refused.map(|reason| datapath.tunnel_drops().get(reason));
        let before = count(datapath);
        datapath.begin(world.now);
        for (segment, mut bytes) in incoming {
            datapath.datagrams(world.now, &source, &mut bytes, segment, out);
        }
        datapath.flush(world.now, out);
        let (_, host, interfaces) = out.left();
        assert_eq!(host + interfaces > 0, refused.is_none(), "{src} → {dst}");
        assert_eq!(count(datapath), before.map(|before| before + 1), "{src} → {dst}");
        for _ in 0..30 {
            world.step();
        }
    }
}
