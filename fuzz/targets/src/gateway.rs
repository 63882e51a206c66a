//! A whole gateway of two cores with two interfaces, its host and a peer: the way of any packet from anywhere to anywhere.

use std::net::SocketAddr;
use std::sync::Arc;

use datapath::memory::{MemoryPorts, Sent};
use datapath::{Datapath, Snapshots, Worker};
use packet::IpHeader;
use packet::attachment::{BondId, Egress, InterfaceId};
use packet::vnet::VirtioNetHeader;
use services::pipeline::{ETHERNET_BYTES, Neighbors};
use services::policy::Policy;
use services::random::Random;
use services::spec::{
    Affinity, BackendSpec, BalanceMethod, DeliveryMode, ForwardSpec, GatewaySpec, InterfaceSpec, LinkSpec,
    Mapping, NatMode, NatSpec, PORTS_DEFAULT, PeerSpec, PortChoice, ResetOnDown, RouteSpec, RuleAction,
    ServerSpec, TCP, UDP,
};
use tunnel::config::{NodeConfig, Peer, PeerPaths, Snapshot, Wan};
use tunnel::node::{Node, Source};
use tunnel::time::Time;

const LAN: InterfaceId = InterfaceId(0);
const WAN: InterfaceId = InterfaceId(1);
const BRANCH: BondId = BondId(0);
/// Packets of an input at most.
const PACKETS_MAX: usize = 64;
/// Things that may leave for one packet: the pieces of one of 64 KiB, an error about each, and what the tunnel has to say.
const SENT_MAX: usize = 200;
/// Times that a packet may change cores.
const HANDED_MAX: usize = 4;

/// Where a packet comes in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum From {
    Lan,
    Wan,
    Host,
    Branch,
}

/// Packets `from:2, core:1, offload:1, wait:4 | length:16 | packet`, any bytes behind an Ethernet header that is right. None makes more
/// leave than it may, wanders between the cores, or gets in from outside before anybody inside has asked for something; what leaves as a
/// packet is one.
pub fn gateway(data: &[u8]) {
    let mut scene = Scene::joined();
    let mut rest = data;
    let mut asked = false;
    for _ in 0..PACKETS_MAX {
        let Some((step, tail)) = rest.split_first_chunk::<3>() else { break };
        let length = usize::from(u16::from_be_bytes([step[1], step[2]])) % 9_000;
        let (packet, tail) = tail.split_at(length.min(tail.len()));
        rest = tail;
        let from = [From::Lan, From::Wan, From::Host, From::Branch][usize::from(step[0] & 3)];
        scene.now = scene.now.plus_us(u64::from(step[0] >> 4) * 2_000);
        let core = usize::from(step[0] >> 2 & 1);
        let sent = scene.packet(from, core, packet);
        assert!(sent.len() <= SENT_MAX, "{} packets for one", sent.len());
        for sent in &sent {
            one(sent, from, asked);
        }
        asked |= from != From::Wan;
    }
    scene.now = scene.now.plus_us(2_000_000);
    scene.settle();
}

/// Checks something that leaves.
fn one(sent: &Sent, from: From, asked: bool) {
    let packet = match sent {
        Sent::Interface(_, _, frame) => frame.get(ETHERNET_BYTES..).unwrap_or_default(),
        Sent::Resolve(_, _, _, packet) | Sent::Host(_, packet) => packet,
        Sent::Datagrams(..) | Sent::Tap(..) | Sent::SharedDevice(..) => return,
    };
    let to_inside = match sent {
        Sent::Interface(id, ..) | Sent::Resolve(id, ..) => *id == LAN,
        _ => false,
    };
    if matches!(sent, Sent::Host(..)) {
        // The host reads what is its own by itself; it may be anything.
        return;
    }
    let Ok(header) = IpHeader::parse(packet) else { panic!("what leaves by an interface is no packet") };
    if from == From::Wan && to_inside && !asked {
        let forwarded = [8_080, 8_443].map(|port: u16| port.to_be_bytes());
        let port = header.payload(packet).get(2..4);
        let fragment = header.fragment.is_some_and(|fragment| fragment.offset != 0);
        assert!(
            fragment || forwarded.iter().any(|forwarded| port == Some(forwarded)),
            "a stranger's packet for {} got in",
            header.dst
        );
    }
}

struct Site {
    cores: Vec<Worker<MemoryPorts>>,
    node: Arc<Node>,
    address: SocketAddr,
}

struct Scene {
    now: Time,
    hub: Site,
    branch: Site,
}

impl Site {
    fn new(number: u8, cores: u8, spec: Option<GatewaySpec>) -> Self {
        let config = NodeConfig::of_number(number, cores);
        let ownership = config.ownership.load_full();
        let node = Arc::new(Node::new(config));
        let serving = spec.is_some();
        let mut neighbors = Neighbors { version: 1, ..Neighbors::default() };
        for (interface, address, last) in
            [(LAN, "10.0.0.5", 5), (WAN, "203.0.113.254", 254), (LAN, "2001:db8:1::5", 5)]
        {
            neighbors.known.insert((interface, address.parse().expect("an address")), [2, 0, 0, 0, 1, last]);
        }
        let (policy, _) =
            Policy::compile(spec.unwrap_or_default(), None, 0).expect("the specification is right");
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
        let worker = |core| Worker {
            datapath: Datapath::new(
                core,
                Arc::clone(&node),
                Random::of_number(u64::from(number) + u64::from(core)),
                snapshots.clone(),
            ),
            ports: MemoryPorts::new(),
        };
        let address = SocketAddr::from(([192, 0, 2, number], 4_600));
        Self { cores: (0..cores).map(worker).collect(), node: Arc::clone(&node), address }
    }

    fn apply(&mut self, now: Time, peer: Peer) {
        let mut actions = Vec::new();
        let wans = vec![Wan::new(0, vec![self.address.ip()])];
        self.node.apply(now, &Snapshot { wans, peers: vec![peer], ..Snapshot::default() }, &mut actions);
        let Worker { datapath, ports } = &mut self.cores[0];
        datapath.run(now, actions, &mut ports.out);
    }

    /// Rounds of all cores, until none has anything for another; what left.
    fn rounds(&mut self, now: Time) -> Vec<Sent> {
        let mut all = Vec::new();
        let mut rounds = 0;
        loop {
            let mut handed = Vec::new();
            for worker in &mut self.cores {
                let ready: Vec<_> = worker.ports.ready().collect();
                worker.round(now, &ready);
                handed.append(&mut worker.ports.out.handed);
                all.append(&mut worker.ports.out.sent);
            }
            if handed.is_empty() {
                return all;
            }
            rounds += 1;
            assert!(rounds <= HANDED_MAX, "a packet wanders between the cores");
            for (core, handed) in handed {
                self.cores[usize::from(core)].ports.put_handed(handed);
            }
        }
    }
}

impl Scene {
    fn joined() -> Self {
        let mut scene = Self {
            now: Time::from_ms(1_000_000),
            hub: Site::new(1, 2, Some(spec())),
            branch: Site::new(11, 1, None),
        };
        let paths = PeerPaths { sockets: 1, ..PeerPaths::default() };
        let nets = |net: &str| vec![net.parse().expect("a network")];
        let of_hub = Peer {
            allowed_ips: nets("10.1.0.0/16"),
            paths,
            ..Peer::new(BRANCH, "branch", scene.branch.node.public_key())
        };
        let of_branch = Peer {
            allowed_ips: nets("0.0.0.0/0"),
            endpoints: vec![scene.hub.address],
            paths,
            ..Peer::new(BRANCH, "hub", scene.hub.node.public_key())
        };
        scene.hub.apply(scene.now, of_hub);
        scene.branch.apply(scene.now, of_branch);
        // A little longer than the handshake takes, so that paths are up.
        for _ in 0..30 {
            scene.now = scene.now.plus_us(1_000);
            scene.settle();
        }
        assert!(scene.hub.node.in_session(BRANCH), "no session");
        scene
    }

    /// Rounds of both until the network is silent; what the hub sent, datagrams excepted.
    fn settle(&mut self) -> Vec<Sent> {
        let mut left = Vec::new();
        for _ in 0..4 {
            let mut quiet = true;
            for sent in self.branch.rounds(self.now) {
                let Sent::Datagrams(_, stride, bytes) = sent else { continue };
                let source = Source {
                    wan: 0,
                    local: Some(self.hub.address.ip()),
                    remote: self.branch.address,
                    socket: None,
                    hops: None,
                };
                // The kernel's program aims by the core byte; here the first core reads all, and hands over.
                self.hub.cores[0].ports.put_datagrams(source, stride, bytes);
                quiet = false;
            }
            for sent in self.hub.rounds(self.now) {
                let Sent::Datagrams(target, stride, bytes) = sent else {
                    left.push(sent);
                    continue;
                };
                let source = Source {
                    wan: 0,
                    local: None,
                    remote: self.hub.address,
                    socket: Some((0, target.path)),
                    hops: None,
                };
                self.branch.cores[0].ports.put_datagrams(source, stride, bytes);
                quiet = false;
            }
            if quiet {
                break;
            }
        }
        left
    }

    /// Lets a packet come in, read by this core; what left for it.
    fn packet(&mut self, from: From, core: usize, packet: &[u8]) -> Vec<Sent> {
        let kind = if packet.first().is_some_and(|byte| byte >> 4 == 6) { [0x86, 0xdd] } else { [8, 0] };
        let frame = |last: u8| [&[2, 0, 0, 0, 0, last, 2, 0, 0, 0, 1, 5][..], &kind, packet].concat();
        let offload = VirtioNetHeader::default();
        let worker = &mut self.hub.cores[core];
        match from {
            From::Lan => worker.ports.put_frame(LAN, offload, frame(0)),
            From::Wan => worker.ports.put_frame(WAN, offload, frame(1)),
            From::Host => worker.ports.put_host(offload, packet),
            From::Branch => self.branch.cores[0].ports.put_host(offload, packet),
        }
        let mut left = self.settle();
        // What is paced leaves a little later.
        for _ in 0..3 {
            self.now = self.now.plus_us(1_000);
            left.append(&mut self.settle());
        }
        left
    }
}

/// A gateway with a NAT, port forwards, a virtual server and a peer.
fn spec() -> GatewaySpec {
    let net = |text: &str| text.parse().expect("a network");
    let interface = |name: &str, addresses: &[&str], last: u8| InterfaceSpec {
        outside: last == 1,
        through_action: (last == 1).then_some(RuleAction::Drop),
        ..InterfaceSpec::new(
            name,
            addresses.iter().map(|address| net(address)).collect(),
            LinkSpec::ethernet([2, 0, 0, 0, 0, last]),
        )
    };
    let route = |prefix: &str, egress: Egress, via: Option<&str>| {
        RouteSpec::new(0, net(prefix), egress, via.map(|via| via.parse().expect("an address")))
    };
    let forward = |protocol, port: u16| ForwardSpec {
        protocol,
        listen: SocketAddr::from(([203, 0, 113, 1], port)),
        to: SocketAddr::from(([10, 0, 0, 5], 8_080)),
        ports: 1,
        tenant: 0,
        proxy_protocol: false,
    };
    GatewaySpec {
        interfaces: vec![
            interface("lan", &["10.0.0.1/24", "2001:db8:1::1/64"], 0),
            interface("wan", &["203.0.113.1/24", "2001:db8:2::1/64"], 1),
        ],
        peers: vec![PeerSpec {
            id: BRANCH,
            name: "branch".to_owned(),
            tenant: 0,
            allowed_ips: vec![net("10.1.0.0/16")],
        }],
        tenants: vec![String::new()],
        routes: vec![
            route("10.0.0.0/24", Egress::Interface(LAN), None),
            route("2001:db8:1::/64", Egress::Interface(LAN), None),
            route("0.0.0.0/0", Egress::Interface(WAN), Some("203.0.113.254")),
            route("::/0", Egress::Interface(WAN), Some("2001:db8:2::fe")),
            route("10.0.0.1/32", Egress::Host, None),
            route("203.0.113.1/32", Egress::Host, None),
            route("2001:db8:1::1/128", Egress::Host, None),
            route("2001:db8:2::1/128", Egress::Host, None),
            route("10.1.0.0/16", Egress::Bond(BRANCH), None),
        ],
        nats: vec![nat()],
        forwards: vec![forward(TCP, 80), forward(UDP, 53)],
        servers: vec![server()],
        ..GatewaySpec::default()
    }
}

/// Translation of what leaves by the WAN.
fn nat() -> NatSpec {
    NatSpec {
        out: Some(WAN),
        mode: NatMode::AddressAndPort,
        addresses: vec!["203.0.113.1".parse().expect("an address")],
        of_interface: false,
        from: Vec::new(),
        from_peers: Vec::new(),
        tenants: Vec::new(),
        mapping: Mapping::EndpointDependent,
        ports: PORTS_DEFAULT,
        port_choice: PortChoice::Random,
        reserved: Vec::new(),
        tables: 64,
        flows_per_client_max: 1_000,
        ports_per_client: 0,
        assemble_fragments: false,
    }
}

/// A virtual server whose backend speaks the PROXY protocol.
fn server() -> ServerSpec {
    ServerSpec {
        name: "web".to_owned(),
        protocol: TCP,
        listen: SocketAddr::from(([203, 0, 113, 1], 443)),
        backends: vec![BackendSpec {
            address: SocketAddr::from(([10, 0, 0, 5], 8_443)),
            weight: 1,
            connections_max: 0,
            drain_s: 0,
        }],
        method: BalanceMethod::Maglev,
        delivery: DeliveryMode::Nat,
        source: NatMode::None,
        source_addresses: Vec::new(),
        connections_max: 0,
        slow_start_s: 0,
        proxy_protocol: true,
        reset_on_down: ResetOnDown::Silent,
        affinity: Affinity::SourceAddress,
    }
}
