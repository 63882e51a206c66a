//! Two nodes and a path between them on which everything arrives at once.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use datapath::Snapshots;
use packet::attachment::BondId;
use packet::flow::FlowKey;
use services::pipeline::Neighbors;
use services::policy::Policy;
use services::spec::GatewaySpec;
use steering::ownership::Ownership;
use tunnel::PrivateKey;
use tunnel::config::{NodeConfig, Peer, PeerPaths, Snapshot, Wan};
use tunnel::forwarder::owner_core;
use tunnel::header::Header;
use tunnel::lifecycle::Action;
use tunnel::mode::{Steering, SteeringMode};
use tunnel::node::{Node, Source};
use tunnel::time::Time;

use super::memory_core::{Arrived, Core, Sent, UDP_HEADERS_BYTES};

/// Port that the listener has.
const LISTEN_PORT: u16 = 4_600;
/// Port of the dialer's socket.
const DIAL_PORT: u16 = 40_000;
/// Wall clock of both, ns since 1970.
const WALL_CLOCK_NS: u64 = 1_800_000_000_000_000_000;

/// Ends of a pair: the dialer sends, the listener receives.
pub const SENDER: u8 = 1;
/// See [`SENDER`].
pub const RECEIVER: u8 = 2;

/// Datagrams that wait for the cores of a node.
pub struct Inboxes(Vec<Mutex<Vec<Arrived>>>);

impl Inboxes {
    fn new(cores: u8) -> Self {
        Self((0..cores).map(|_| Mutex::default()).collect())
    }

    /// Gives datagrams that a core of the other node sent to the cores that they name, as the kernel's steering does.
    pub fn route(&self, sent: impl Iterator<Item = Sent>, source: impl Fn(&Sent) -> Source) {
        for sent in sent {
            let header = Header::parse(&sent.bytes).ok();
            let owner = header.and_then(|header| owner_core(&header, self.0.len() as u8)).unwrap_or(0);
            let Some(inbox) = self.0.get(usize::from(owner)) else { continue };
            let source = source(&sent);
            let arrived = Arrived { source, stride: sent.stride, bytes: sent.bytes };
            inbox.lock().unwrap_or_else(PoisonError::into_inner).push(arrived);
        }
    }

    /// Takes what waits for a core.
    pub fn take(&self, core: usize) -> Vec<Arrived> {
        let inbox = self.0.get(core).map(|inbox| inbox.lock().unwrap_or_else(PoisonError::into_inner));
        inbox.map(|mut inbox| std::mem::take(&mut *inbox)).unwrap_or_default()
    }
}

/// One node with its cores.
pub struct End {
    pub node: Arc<Node>,
    pub cores: Vec<Core>,
    pub inboxes: Inboxes,
    number: u8,
}

impl End {
    fn new(number: u8, cores: u8) -> anyhow::Result<Self> {
        let mut random = fastrand::Rng::with_seed(u64::from(number));
        let keys = std::iter::repeat_with(|| std::array::from_fn(|_| random.u8(..)));
        let ownership = Arc::new(Ownership::new(cores, keys)?);
        let node = Arc::new(Node::new(NodeConfig {
            private_key: PrivateKey::new([number; 32]),
            node_id: 0,
            hub_key: None,
            ownership: Arc::new(ArcSwap::new(Arc::clone(&ownership))),
            index_key: [number; 16],
            boot_id: u64::from(number),
            seed: [number; 32],
            wall_clock_ns: WALL_CLOCK_NS,
            timestamp_floor_ns: 0,
            rekey_after_ms: tunnel::session::REKEY_AFTER_MS,
        }));
        let (policy, _) = Policy::compile(GatewaySpec::default(), None, 0)
            .map_err(|error| anyhow::anyhow!("a policy without rules: {error}"))?;
        let snapshots = Snapshots {
            policy: Arc::new(policy),
            ownership,
            neighbors: Arc::new(Neighbors::default()),
            cluster: None,
            inherited: Arc::default(),
            lan: None,
            serving: false,
            opened_ports: Arc::default(),
        };
        let cores_of_node = Core::all(&node, cores, &snapshots);
        Ok(Self { node, cores: cores_of_node, inboxes: Inboxes::new(cores), number })
    }

    fn address(&self) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, self.number], LISTEN_PORT))
    }

    fn as_peer(&self, endpoints: Vec<SocketAddr>, mode: SteeringMode) -> anyhow::Result<Peer> {
        let steering = Steering {
            receive: mode,
            accept: SteeringMode::ALL.into_iter().collect(),
            ..Steering::default()
        };
        Ok(Peer {
            steering,
            endpoints,
            allowed_ips: vec![format!("10.77.{}.0/24", self.number).parse()?],
            paths: PeerPaths { sockets: 1, ..PeerPaths::default() },
            ..Peer::new(
                BondId(u16::from(self.number)),
                format!("end-{}", self.number),
                self.node.public_key(),
            )
        })
    }

    fn apply(&mut self, now: Time, peer: Peer) {
        let wan = Wan::new(0, vec![self.address().ip()]);
        let mut actions: Vec<Action> = Vec::new();
        let snapshot = Snapshot { wans: vec![wan], peers: vec![peer], ..Snapshot::default() };
        self.node.apply(now, &snapshot, &mut actions);
        if let Some(core) = self.cores.first_mut() {
            core.datapath.run(now, actions, &mut core.out);
        }
    }

    /// Core of this node that owns a flow.
    fn owner(&self, flow: &FlowKey) -> u8 {
        let hash = self.node.ownership.load().hash(flow, 0);
        self.cores.first().map_or(0, |core| core.datapath.tunnel.owner(flow, hash, 0))
    }
}

/// A dialer that sends and a listener that receives.
pub struct Pair {
    pub sender: End,
    pub receiver: End,
}

impl Pair {
    /// Two nodes with so many cores each, told of each other. `mode`: how the cores of both are named.
    pub fn new(now: Time, cores: u8, mode: SteeringMode) -> anyhow::Result<Self> {
        let (mut sender, mut receiver) = (End::new(SENDER, cores)?, End::new(RECEIVER, cores)?);
        let (dialed, dialer) =
            (receiver.as_peer(vec![receiver.address()], mode)?, sender.as_peer(Vec::new(), mode)?);
        receiver.apply(now, dialer);
        sender.apply(now, dialed);
        Ok(Self { sender, receiver })
    }

    /// Packets of `flows` UDP flows by the sender's core that owns them, the same number for each pair of a sending and a
    /// receiving owner.
    pub fn packets(&self, flows: usize, bytes: usize) -> Vec<Vec<Vec<u8>>> {
        let cores = self.sender.cores.len();
        let each = flows / (cores * cores);
        let mut counts = vec![0; cores * cores];
        let mut packets = vec![Vec::new(); cores];
        for port in 10_000..60_000 {
            let packet = udp(bytes, port);
            let Ok(flow) = FlowKey::of(&packet) else { continue };
            let (from, to) = (usize::from(self.sender.owner(&flow)), usize::from(self.receiver.owner(&flow)));
            if counts[from * cores + to] < each {
                counts[from * cores + to] += 1;
                packets[from].push(packet);
            }
        }
        packets
    }
}

/// Source of the sender's datagrams at the receiver.
pub fn source_of_sender(_: &Sent) -> Source {
    Source {
        wan: 0,
        local: None,
        remote: SocketAddr::from(([192, 0, 2, SENDER], DIAL_PORT)),
        socket: None,
        hops: None,
    }
}

/// Source of the receiver's at the sender.
pub fn source_of_receiver(sent: &Sent) -> Source {
    let remote = SocketAddr::from(([192, 0, 2, RECEIVER], LISTEN_PORT));
    Source { wan: 0, local: None, remote, socket: Some((0, sent.target.path)), hops: None }
}

/// A UDP packet over IPv4, without a checksum.
fn udp(bytes: usize, port: u16) -> Vec<u8> {
    let mut packet = vec![0; bytes.max(UDP_HEADERS_BYTES)];
    let (total, length) = ((packet.len() as u16).to_be_bytes(), (packet.len() as u16 - 20).to_be_bytes());
    packet[..12].copy_from_slice(&[0x45, 0, total[0], total[1], 0, 0, 0x40, 0, 64, 17, 0, 0]);
    packet[12..20].copy_from_slice(&[10, 77, SENDER, 1, 10, 77, RECEIVER, 1]);
    packet[20..22].copy_from_slice(&port.to_be_bytes());
    packet[22..24].copy_from_slice(&5_000u16.to_be_bytes());
    packet[24..26].copy_from_slice(&length);
    packet
}
