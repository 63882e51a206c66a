//! Two nodes and a network between them that delivers at once; what a hostile peer says, it says under its session.
#![allow(dead_code, reason = "each test file uses a part")]

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;

use packet::attachment::BondId;
use packet::vnet::VirtioNetHeader;
use tunnel::config::{NodeConfig, Peer, Snapshot, Wan};
use tunnel::forwarder::{Delivered, Forwarder, Output, Target, owner_core};
use tunnel::header::Header;
use tunnel::lifecycle::Action;
use tunnel::node::{Node, Source};
use tunnel::time::Time;

/// One datagram on its way.
#[derive(Clone, Debug)]
pub struct Sent {
    pub target: Target,
    pub bytes: Vec<u8>,
}

/// Datagrams and packets that the cores put out.
#[derive(Default)]
pub struct Collected {
    pub sent: VecDeque<Sent>,
    pub delivered: Vec<Vec<u8>>,
    /// How each of them was.
    pub how: Vec<Delivered>,
}

impl Output for Collected {
    fn transmit(&mut self, target: &Target, segment: usize, datagrams: &[u8]) {
        let sent = |bytes: &[u8]| Sent { target: *target, bytes: bytes.to_vec() };
        self.sent.extend(datagrams.chunks(segment).map(sent));
    }

    fn deliver(&mut self, _: usize, packet: &[u8], how: Delivered) {
        self.delivered.push(packet.to_vec());
        self.how.push(how);
    }
}

/// A node with its cores.
pub struct Side {
    pub node: Arc<Node>,
    pub cores: Vec<Forwarder>,
    pub out: Collected,
    pub number: u8,
    /// The address that its listening socket has.
    pub address: SocketAddr,
}

pub fn peer(of: &Side, endpoints: &[SocketAddr]) -> Peer {
    Peer {
        endpoints: endpoints.to_vec(),
        allowed_ips: vec![format!("10.77.{}.0/24", of.number).parse().unwrap()],
        paths: tunnel::config::PeerPaths { sockets: 1, ..Default::default() },
        ..Peer::new(BondId(u16::from(of.number)), format!("peer-{}", of.number), of.node.public_key())
    }
}

pub fn wan(id: u16, address: SocketAddr) -> Wan {
    Wan::new(id, vec![address.ip()])
}

impl Side {
    pub fn new(number: u8, cores: u8) -> Self {
        Self::with(number, NodeConfig::of_number(number, cores))
    }

    pub fn with(number: u8, config: NodeConfig) -> Self {
        let cores = config.ownership.load().cores;
        let node = Arc::new(Node::new(config));
        Self {
            cores: (0..cores).map(|core| Forwarder::new(core, Arc::clone(&node))).collect(),
            node,
            out: Collected::default(),
            number,
            address: SocketAddr::from(([192, 0, 2, number], 4_600)),
        }
    }

    /// Takes over these peers, on one WAN.
    pub fn apply(&mut self, now: Time, peers: Vec<Peer>) {
        let mut actions = Vec::new();
        self.node.apply(
            now,
            &Snapshot { wans: vec![wan(0, self.address)], peers, ..Snapshot::default() },
            &mut actions,
        );
        self.cores[0].run(now, actions, &mut self.out);
    }

    /// One round of every core; the earliest time that one of them wants another.
    pub fn round(&mut self, now: Time) -> Time {
        let mut next = Time::MAX;
        for core in &mut self.cores {
            core.begin(now);
            next = next.min(core.finish(now, &mut self.out));
        }
        next
    }

    /// Takes a datagram that came from `remote`.
    pub fn receive(&mut self, now: Time, remote: SocketAddr, socket: Option<(usize, u8)>, bytes: &mut [u8]) {
        let owner = Header::parse(bytes).ok().and_then(|header| owner_core(&header, self.cores.len() as u8));
        let source = Source { wan: 0, local: None, remote, socket, hops: None };
        let stride = bytes.len();
        let core = &mut self.cores[usize::from(owner.unwrap_or(0))];
        core.begin(now);
        core.datagrams(now, &source, bytes, stride, &mut self.out);
    }

    /// Says these frames to a peer, sealed, in one datagram over a path.
    pub fn say(&mut self, now: Time, core: usize, path: u8, frames: Vec<u8>) {
        let action = Action::Frames { bond: 0, path, route: None, frames, pad_to: 0 };
        self.cores[core].run(now, vec![action], &mut self.out);
    }

    /// Sends an inner packet of `bytes` bytes to 10.77.`to`.1.
    pub fn send(&mut self, now: Time, to: u8, bytes: usize, port: u16) {
        let mut packet = udp(self.number, to, bytes, port);
        let classified = self.cores[0].classify(&packet, None).unwrap();
        let core = &mut self.cores[usize::from(classified.owner)];
        core.packet(now, &VirtioNetHeader::default(), &mut packet, &classified, &mut self.out);
    }

    pub fn drops(&self, reason: packet::DropReason) -> u64 {
        self.cores.iter().map(|core| core.drops.get(reason)).sum()
    }
}

/// An inner UDP packet over IPv4.
pub fn udp(from: u8, to: u8, bytes: usize, port: u16) -> Vec<u8> {
    let mut packet = vec![0; bytes.max(28)];
    let (length, payload) = ((packet.len() as u16).to_be_bytes(), (packet.len() as u16 - 20).to_be_bytes());
    packet[..12].copy_from_slice(&[0x45, 0, length[0], length[1], 0, 0, 0x40, 0, 64, 17, 0, 0]);
    packet[12..20].copy_from_slice(&[10, 77, from, 1, 10, 77, to, 1]);
    packet[20..22].copy_from_slice(&port.to_be_bytes());
    packet[22..24].copy_from_slice(&5_000u16.to_be_bytes());
    packet[24..26].copy_from_slice(&payload);
    packet
}

/// A dialer and the listener that it dials, with a clock.
pub struct Pair {
    pub dialer: Side,
    pub listener: Side,
    pub now: Time,
}

impl Pair {
    /// Two nodes with so many cores, joined.
    pub fn joined(dialer_cores: u8, listener_cores: u8) -> Self {
        let pair = Self::told([dialer_cores, listener_cores], [false; 2]);
        assert!(pair.is_joined());
        pair
    }

    /// Two nodes that were told of each other a second ago; each wants Ethernet frames or not.
    pub fn told([dialer_cores, listener_cores]: [u8; 2], ethernet: [bool; 2]) -> Self {
        let (dialer, listener) = (Side::new(1, dialer_cores), Side::new(2, listener_cores));
        let mut pair = Self { dialer, listener, now: Time::from_ms(1_000) };
        let listens = Peer { ethernet: ethernet[1], ..peer(&pair.dialer, &[]) };
        let dials = Peer { ethernet: ethernet[0], ..peer(&pair.listener, &[pair.listener.address]) };
        pair.listener.apply(pair.now, vec![listens]);
        pair.dialer.apply(pair.now, vec![dials]);
        pair.run_ms(1_000);
        pair
    }

    /// Whether both have a session.
    pub fn is_joined(&self) -> bool {
        self.dialer.node.in_session(BondId(2)) && self.listener.node.in_session(BondId(1))
    }

    /// Delivers what both put out. Datagrams of the dialer come from one socket.
    pub fn deliver(&mut self) {
        let from_dialer = SocketAddr::from(([192, 0, 2, 1], 40_000));
        for _ in 0..8 {
            for sent in std::mem::take(&mut self.dialer.out.sent) {
                self.listener.receive(self.now, from_dialer, None, &mut sent.bytes.clone());
            }
            for sent in std::mem::take(&mut self.listener.out.sent) {
                let socket = Some((0, sent.target.path));
                self.dialer.receive(self.now, self.listener.address, socket, &mut sent.bytes.clone());
            }
        }
    }

    /// Runs both for so many milliseconds.
    pub fn run_ms(&mut self, ms: u64) {
        for _ in 0..ms {
            self.now = self.now.plus_ms(1);
            self.dialer.round(self.now);
            self.listener.round(self.now);
            self.deliver();
        }
    }
}
