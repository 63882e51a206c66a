//! The gateway under test and the packets for it.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::Arc;

use packet::PacketPool;
use packet::attachment::{Egress, Ingress, InterfaceId, UnitVisit};
use packet::checksum;
use packet::flow::FlowKey;
use packet::ip::PROTOCOL_FRAGMENT;
use packet::vnet::VirtioNetHeader;
use packet::{DropCounters, DropReason};

use crate::held_ports::HeldPorts;
use crate::nat::NatEvent;
use crate::pipeline::{Counters, ETHERNET_BYTES, Frame, Handed, Neighbors, Outcome, Output, Services};
use crate::policy::Policy;
use crate::random::Random;
use crate::spec::{
    Attachment, GatewaySpec, HostMode, HostSpec, InterfaceSpec, LinkSpec, Mapping, NatMode, NatSpec,
    RouteSpec, SideSpec, TCP, UDP,
};
use steering::ownership::Ownership;

pub const LAN_ID: InterfaceId = InterfaceId(0);
pub const WAN_ID: InterfaceId = InterfaceId(1);
pub const LAN: Ingress = Ingress::Interface(LAN_ID);
pub const WAN: Ingress = Ingress::Interface(WAN_ID);
/// A third interface, where a test has one.
pub const THIRD: Ingress = Ingress::Interface(InterfaceId(2));
pub const HOST: Ingress = Ingress::Host;
pub const SECOND_NS: u64 = 1_000_000_000;

pub const SYN: u8 = 0x02;
pub const ACK: u8 = 0x10;
pub const RST: u8 = 0x04;
pub const FIN: u8 = 0x01;

/// Several cores and the time.
pub struct World {
    pub cores: Vec<Services>,
    pub policy: Arc<Policy>,
    pub ownership: Arc<Ownership>,
    pub neighbors: Arc<Neighbors>,
    pub now_ns: u64,
    /// Most packets that may be handed over before a test fails: a packet must not go round in circles.
    pub events: Vec<NatEvent>,
}

/// A packet that left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    pub outcome: Outcome,
    pub packet: Vec<u8>,
}

impl Left {
    pub fn key(&self) -> FlowKey {
        FlowKey::of(&self.packet).unwrap()
    }

    /// By what it left, as something that comes in there would say.
    pub fn by(&self) -> Ingress {
        match self.outcome {
            Outcome::Forward(Egress::Interface(id)) | Outcome::Resolve(id, _) => Ingress::Interface(id),
            Outcome::Forward(Egress::Host) | Outcome::DeviceIngress(_) => Ingress::Host,
            Outcome::Forward(Egress::Bond(id)) => Ingress::Bond(id),
            other => panic!("did not leave: {other:?}"),
        }
    }
}

/// A packet that left for another unit of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToUnit {
    pub unit: u16,
    pub ingress: Ingress,
    pub visit: UnitVisit,
    pub ports: Option<(u16, u16)>,
    pub packet: Vec<u8>,
}

impl ToUnit {
    fn of(unit: u16, frame: &Frame<'_>) -> Self {
        let (ingress, ports) = (frame.ingress, frame.ports);
        Self { unit, ingress, visit: frame.visit.unwrap(), ports, packet: frame.packet().to_vec() }
    }
}

#[derive(Default)]
struct Out {
    left: Vec<Left>,
    units: Vec<ToUnit>,
    handed: VecDeque<(u8, Handed)>,
    pool: PacketPool,
}

impl Output for Out {
    fn emit(&mut self, outcome: Outcome, _: Option<&FlowKey>, offload: &VirtioNetHeader, bytes: &mut [u8]) {
        assert!(!offload.needs_csum(), "packets of these tests are complete");
        if let Outcome::DeviceIngress(id) = outcome {
            assert_eq!(bytes[..12], [2, 0, 0, 0, 0, id.0 as u8, 4, 0, 0, 0, 0, 9], "the header that it had");
        }
        self.left.push(Left { outcome, packet: bytes[ETHERNET_BYTES..].to_vec() });
    }

    fn to_unit(&mut self, unit: u16, frame: &Frame<'_>) {
        self.units.push(ToUnit::of(unit, frame));
    }

    fn hand_over(&mut self, core: u8, handed: Handed) -> bool {
        self.handed.push_back((core, handed));
        true
    }

    fn buffers(&mut self) -> &mut PacketPool {
        &mut self.pool
    }
}

impl World {
    pub fn new(cores: u8, spec: GatewaySpec) -> Self {
        let policy = Arc::new(Policy::compile(spec, None, 0).unwrap().0);
        let keys = (0u64..64).map(|seed| std::array::from_fn(|at| mix(seed * 64 + at as u64) as u8));
        let ownership = Arc::new(Ownership::new(cores, keys).unwrap());
        let neighbors = Arc::new(Neighbors::default());
        let core = |id| {
            let random = Random::of_number(u64::from(id));
            Services::new(id, random, &policy, &ownership, Arc::clone(&neighbors))
        };
        let cores = (0..cores).map(core).collect();
        Self { cores, policy, ownership, neighbors, now_ns: 1_000 * SECOND_NS, events: Vec::new() }
    }

    /// A new configuration, as `reload` brings it.
    pub fn reload(&mut self, spec: GatewaySpec) {
        self.policy = Arc::new(Policy::compile(spec, Some(&self.policy), self.now_ns).unwrap().0);
        self.follow();
    }

    pub fn set_ownership(&mut self, ownership: Ownership) {
        self.ownership = Arc::new(ownership);
        self.follow();
    }

    /// Neighbors as they were learned.
    pub fn set_neighbors(&mut self, neighbors: Neighbors) {
        self.neighbors = Arc::new(neighbors);
        self.follow();
    }

    /// Programs of the host have these ports now.
    pub fn open_ports(&mut self, opened: HeldPorts) {
        let opened = Arc::new(opened);
        for core in &mut self.cores {
            core.follow_opened(&opened);
        }
    }

    fn follow(&mut self) {
        for core in &mut self.cores {
            core.follow(&self.policy, &self.ownership, &self.neighbors);
        }
    }

    /// The core whose socket the kernel's steering chooses.
    pub fn reader(&self, ingress: Ingress, packet: &[u8]) -> usize {
        let key = FlowKey::of(packet).unwrap();
        let bucket = self.ownership.bucket(&key, self.policy.tenant_of(ingress));
        usize::from(self.ownership.table.owner(bucket))
    }

    /// A packet comes in; everything that leaves because of it.
    pub fn packet(&mut self, ingress: Ingress, packet: &[u8]) -> Vec<Left> {
        let reader = self.reader(ingress, packet);
        self.packet_at(reader, ingress, packet)
    }

    /// A packet is read by this core.
    pub fn packet_at(&mut self, core: usize, ingress: Ingress, packet: &[u8]) -> Vec<Left> {
        let mut out = Out::default();
        let mut bytes = vec![2, 0, 0, 0, 0, ingress.compact() as u8, 4, 0, 0, 0, 0, 9];
        bytes.extend(if packet[0] >> 4 == 4 { [8, 0] } else { [0x86, 0xdd] });
        bytes.extend_from_slice(packet);
        let mut frames = [Frame::new(ingress, VirtioNetHeader::default(), &mut bytes)];
        self.cores[core].batch(self.now_ns, &mut frames, &mut out);
        let [Frame { outcome, bytes, .. }] = frames;
        let goes = matches!(outcome, Outcome::Forward(_) | Outcome::DeviceIngress(_) | Outcome::Resolve(..));
        let own = goes.then(|| Left { outcome, packet: bytes[ETHERNET_BYTES..].to_vec() });
        let mut hops = 0;
        while let Some((core, mut handed)) = out.handed.pop_front() {
            hops += 1;
            assert!(hops < 200, "a packet goes round in circles");
            self.cores[usize::from(core)].handed(self.now_ns, &mut handed, &mut out);
        }
        out.left.extend(own);
        for core in &mut self.cores {
            self.events.extend(core.nat_events());
        }
        for left in &out.left {
            assert!(is_whole(&left.packet), "{left:?}");
        }
        out.left
    }

    /// A packet that another unit of the cluster sent; what leaves, and what goes to other units.
    pub fn visited(&mut self, to: &ToUnit) -> (Vec<Left>, Vec<ToUnit>) {
        let mut out = Out::default();
        let mut bytes = vec![2, 0, 0, 0, 0, to.ingress.compact() as u8, 4, 0, 0, 0, 0, 9, 8, 0];
        bytes.extend_from_slice(&to.packet);
        let mut frame = Frame::new(to.ingress, VirtioNetHeader::default(), &mut bytes);
        frame.visit = Some(to.visit);
        let core = &mut self.cores[0];
        match to.ports {
            None => core.packet(self.now_ns, &mut frame, &mut out),
            Some(ports) => core.piece_of_unit(self.now_ns, &mut frame, ports, &mut out),
        }
        assert!(out.handed.is_empty(), "units of these tests have one core");
        if let Outcome::Forward(Egress::Unit(unit)) = frame.outcome {
            out.units.push(ToUnit::of(unit, &frame));
        } else if matches!(
            frame.outcome,
            Outcome::Forward(_) | Outcome::DeviceIngress(_) | Outcome::Resolve(..)
        ) {
            out.left.push(Left { outcome: frame.outcome, packet: frame.bytes[ETHERNET_BYTES..].to_vec() });
        }
        (out.left, out.units)
    }

    /// As the only core reads it from a device with offloads: what leaves, with its own offload header.
    pub fn offloaded(
        &mut self,
        ingress: Ingress,
        packet: &[u8],
        offload: VirtioNetHeader,
    ) -> Vec<(VirtioNetHeader, Left)> {
        let mut out = Out::default();
        let mut bytes = vec![0; ETHERNET_BYTES];
        bytes.extend_from_slice(packet);
        let mut frames = [Frame::new(ingress, offload, &mut bytes)];
        self.cores[0].batch(self.now_ns, &mut frames, &mut out);
        let [Frame { outcome, bytes, offload, .. }] = frames;
        let complete = |left| (VirtioNetHeader::default(), left);
        let mut left: Vec<_> = out.left.into_iter().map(complete).collect();
        if matches!(outcome, Outcome::Forward(_) | Outcome::Resolve(..)) {
            left.push((offload, Left { outcome, packet: bytes[ETHERNET_BYTES..].to_vec() }));
        }
        left
    }

    /// A packet comes in and exactly one leaves.
    pub fn one(&mut self, ingress: Ingress, packet: &[u8]) -> Left {
        let before = self.drops();
        let mut left = self.packet(ingress, packet);
        assert_eq!(left.len(), 1, "dropped for {:?}", self.new_drops(&before));
        left.remove(0)
    }

    /// A packet comes in and is dropped for this reason; what leaves because of it.
    pub fn dropped(&mut self, ingress: Ingress, packet: &[u8], reason: DropReason) -> Vec<Left> {
        let before = self.drops();
        let left = self.packet(ingress, packet);
        assert_eq!(self.new_drops(&before), [reason], "left: {left:?}");
        left
    }

    pub fn drops(&self) -> DropCounters {
        let mut all = DropCounters::default();
        self.cores.iter().for_each(|core| all.merge(&core.drops));
        all
    }

    pub fn new_drops(&self, before: &DropCounters) -> Vec<DropReason> {
        let now = self.drops();
        now.iter().filter(|(reason, count)| *count > before.get(*reason)).map(|(reason, _)| reason).collect()
    }

    /// Time passes, with ticks.
    pub fn wait(&mut self, seconds: u64) {
        for _ in 0..seconds * 10 {
            self.now_ns += SECOND_NS / 10;
            for core in &mut self.cores {
                core.tick(self.now_ns);
            }
        }
        for core in &mut self.cores {
            self.events.extend(core.nat_events());
        }
    }

    /// All cores end what belongs to dead backends; what leaves because of it.
    pub fn end_dead(&mut self) -> Vec<Left> {
        let mut out = Out::default();
        for core in &mut self.cores {
            while core.end_dead(self.now_ns, &mut out) {}
        }
        for left in &out.left {
            assert!(is_whole(&left.packet), "{left:?}");
        }
        out.left
    }

    pub fn total(&self, of: impl Fn(&Counters) -> u64) -> u64 {
        self.cores.iter().map(|core| of(&core.counters)).sum()
    }

    pub fn flows(&self) -> usize {
        self.cores.iter().map(|core| core.flows().len()).sum()
    }
}

/// The same, where the host gets what is its own by its devices.
pub fn native(mut spec: GatewaySpec) -> GatewaySpec {
    spec.host.mode = HostMode::Native;
    spec
}

/// LAN 10.0.0.1/24, WAN 203.0.113.1/24 with a default route, both families.
pub fn two_interfaces() -> GatewaySpec {
    let interface = |name: &str, addresses: &[&str], last: u8| {
        let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
        InterfaceSpec::new(name, addresses, LinkSpec::ethernet([2, 0, 0, 0, 0, last]))
    };
    let route = |prefix: &str, to: Ingress, via: Option<&str>| {
        RouteSpec::new(0, prefix.parse().unwrap(), to.into(), via.map(|via| via.parse().unwrap()))
    };
    GatewaySpec {
        interfaces: vec![
            interface("lan", &["10.0.0.1/24", "fd00::1/64"], 0),
            interface("wan", &["203.0.113.1/24", "2001:db8::1/64"], 1),
        ],
        tenants: vec![String::new()],
        routes: vec![
            route("10.0.0.0/24", LAN, None),
            route("fd00::/64", LAN, None),
            route("203.0.113.0/24", WAN, None),
            route("2001:db8::/64", WAN, None),
            route("0.0.0.0/0", WAN, Some("203.0.113.254")),
            route("::/0", WAN, Some("2001:db8::fe")),
            route("10.0.0.1/32", HOST, None),
            route("203.0.113.1/32", HOST, None),
            route("fd00::1/128", HOST, None),
            route("2001:db8::1/128", HOST, None),
        ],
        // Rules, default and tenants are the same for the host as for anybody else.
        host: HostSpec { mode: HostMode::Datapath, ..HostSpec::default() },
        ..GatewaySpec::default()
    }
}

/// A NAT on the WAN.
pub fn nat(mode: NatMode, addresses: &[&str]) -> NatSpec {
    NatSpec {
        out: Some(WAN_ID),
        mode,
        addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        from: Vec::new(),
        from_peers: Vec::new(),
        tenants: Vec::new(),
        of_interface: false,
        mapping: Mapping::EndpointDependent,
        ports: (1024, 65_535),
        port_choice: crate::spec::PortChoice::Random,
        reserved: Vec::new(),
        tables: 256,
        flows_per_client_max: 0,
        ports_per_client: 0,
        assemble_fragments: false,
    }
}

/// A side of a rule: by what packets come in, or leave.
pub fn side(attachment: impl Into<Attachment>) -> SideSpec {
    SideSpec { attachments: vec![attachment.into()], ..SideSpec::default() }
}

/// The usual home router.
pub fn masquerade(cores: u8) -> World {
    let mut spec = two_interfaces();
    spec.nats.push(nat(NatMode::AddressAndPort, &["203.0.113.1"]));
    World::new(cores, spec)
}

/// A key from "10.0.0.5:1234", "1.2.3.4:80".
pub fn key(protocol: u8, src: &str, dst: &str) -> FlowKey {
    let src: std::net::SocketAddr = src.parse().unwrap();
    let dst: std::net::SocketAddr = dst.parse().unwrap();
    FlowKey { src: src.ip(), dst: dst.ip(), src_port: src.port(), dst_port: dst.port(), protocol }
}

pub fn udp(src: &str, dst: &str, payload: &[u8]) -> Vec<u8> {
    udp_of(&key(UDP, src, dst), payload)
}

pub fn udp_of(key: &FlowKey, payload: &[u8]) -> Vec<u8> {
    let mut upper = Vec::new();
    upper.extend(key.src_port.to_be_bytes());
    upper.extend(key.dst_port.to_be_bytes());
    upper.extend((8 + payload.len() as u16).to_be_bytes());
    upper.extend([0, 0]);
    upper.extend(payload);
    let sum = checksum::pseudo_header(key.src, key.dst, UDP, upper.len());
    let sum = checksum::nonzero(checksum::finish(checksum::sum(&upper, sum)));
    upper[6..8].copy_from_slice(&sum.to_be_bytes());
    ip(key.src, key.dst, UDP, &upper)
}

pub fn tcp(src: &str, dst: &str, flags: u8, seq: u32, ack: u32, payload: &[u8]) -> Vec<u8> {
    tcp_of(&key(TCP, src, dst), flags, seq, ack, payload)
}

pub fn tcp_of(key: &FlowKey, flags: u8, seq: u32, ack: u32, payload: &[u8]) -> Vec<u8> {
    tcp_with(key, flags, seq, ack, &[], payload)
}

/// With options, which must be a multiple of four bytes.
pub fn tcp_with(key: &FlowKey, flags: u8, seq: u32, ack: u32, options: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut upper = Vec::new();
    upper.extend(key.src_port.to_be_bytes());
    upper.extend(key.dst_port.to_be_bytes());
    upper.extend(seq.to_be_bytes());
    upper.extend(ack.to_be_bytes());
    upper.extend([(5 + options.len() as u8 / 4) << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
    upper.extend(options);
    upper.extend(payload);
    let sum = checksum::pseudo_header(key.src, key.dst, TCP, upper.len());
    let sum = checksum::finish(checksum::sum(&upper, sum));
    upper[16..18].copy_from_slice(&sum.to_be_bytes());
    ip(key.src, key.dst, TCP, &upper)
}

/// ICMP echo (IPv4): `kind` 8 or 0.
pub fn echo(src: &str, dst: &str, kind: u8, id: u16) -> Vec<u8> {
    let mut upper = vec![kind, 0, 0, 0];
    upper.extend(id.to_be_bytes());
    upper.extend([0, 1, b'h', b'i']);
    let sum = checksum::finish(checksum::sum(&upper, 0));
    upper[2..4].copy_from_slice(&sum.to_be_bytes());
    ip(src.parse().unwrap(), dst.parse().unwrap(), 1, &upper)
}

/// An ICMP error (IPv4) of this type and code about a packet.
pub fn icmp_error(src: &str, dst: IpAddr, kind: u8, code: u8, about: &[u8]) -> Vec<u8> {
    let mut upper = vec![kind, code, 0, 0, 0, 0, 0, 0];
    upper.extend(&about[..about.len().min(28)]);
    let sum = checksum::finish(checksum::sum(&upper, 0));
    upper[2..4].copy_from_slice(&sum.to_be_bytes());
    ip(src.parse().unwrap(), dst, 1, &upper)
}

pub fn ip(src: IpAddr, dst: IpAddr, protocol: u8, upper: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            packet.extend([0x45, 0]);
            packet.extend((20 + upper.len() as u16).to_be_bytes());
            packet.extend([0, 7, 0x40, 0, 64, protocol, 0, 0]);
            packet.extend(src.octets());
            packet.extend(dst.octets());
            let sum = checksum::finish(checksum::sum(&packet, 0));
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            packet.extend([0x60, 0, 0, 0]);
            packet.extend((upper.len() as u16).to_be_bytes());
            packet.extend([protocol, 64]);
            packet.extend(src.octets());
            packet.extend(dst.octets());
        }
        _ => panic!("families differ"),
    }
    packet.extend(upper);
    packet
}

/// The packet (IPv4) in fragments with so many bytes of payload each.
pub fn in_pieces(packet: &[u8], bytes: usize) -> Vec<Vec<u8>> {
    let chunks: Vec<&[u8]> = packet[20..].chunks(bytes).collect();
    let last = chunks.len() - 1;
    let piece = |(place, chunk): (usize, &&[u8])| {
        let mut piece = packet[..20].to_vec();
        piece[2..4].copy_from_slice(&(20 + chunk.len() as u16).to_be_bytes());
        let more = if place == last { 0 } else { 0x2000 };
        piece[6..8].copy_from_slice(&(more | (place * bytes / 8) as u16).to_be_bytes());
        piece[10..12].copy_from_slice(&[0, 0]);
        let sum = checksum::finish(checksum::sum(&piece, 0));
        piece[10..12].copy_from_slice(&sum.to_be_bytes());
        piece.extend(*chunk);
        piece
    };
    chunks.iter().enumerate().map(piece).collect()
}

/// Whether all checksums are right.
fn is_whole(packet: &[u8]) -> bool {
    if packet[0] >> 4 == 4 && packet[9] == 1 && !is_fragment(packet) {
        return checksum::verify_ipv4_header(&packet[..20])
            && checksum::finish(checksum::sum(&packet[20..], 0)) == 0;
    }
    if packet[0] >> 4 == 4 && matches!(packet[9], 47 | 50) {
        return checksum::verify_ipv4_header(&packet[..20]);
    }
    is_fragment(packet) || checksum::verify_packet(packet)
}

pub fn is_fragment(packet: &[u8]) -> bool {
    match packet[0] >> 4 {
        4 => (packet[6] & 0x3f, packet[7]) != (0, 0),
        _ => packet[6] == PROTOCOL_FRAGMENT,
    }
}

/// splitmix64: seeds for everything that must differ.
pub fn mix(seed: u64) -> u64 {
    let z = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl World {
    /// Raw bytes of a frame, read by core 0.
    pub fn bytes(&mut self, ingress: Ingress, frame: &[u8]) -> Vec<Left> {
        let mut out = Out::default();
        let mut bytes = frame.to_vec();
        let mut frames = [Frame::new(ingress, VirtioNetHeader::default(), &mut bytes)];
        self.cores[0].batch(self.now_ns, &mut frames, &mut out);
        let [Frame { outcome, bytes, .. }] = frames;
        assert_ne!(outcome, Outcome::Pending);
        let goes = matches!(outcome, Outcome::Forward(_) | Outcome::Resolve(..));
        if goes {
            out.left.push(Left { outcome, packet: bytes[ETHERNET_BYTES..].to_vec() });
        }
        while let Some((core, mut handed)) = out.handed.pop_front() {
            self.cores[usize::from(core)].handed(self.now_ns, &mut handed, &mut out);
        }
        out.left
    }

    /// The frame that a packet becomes, read by core 0.
    pub fn frame(&mut self, ingress: Ingress, packet: &[u8]) -> Vec<u8> {
        let mut bytes = [&[0; ETHERNET_BYTES][..], packet].concat();
        let mut frames = [Frame::new(ingress, VirtioNetHeader::default(), &mut bytes)];
        self.cores[0].batch(self.now_ns, &mut frames, &mut Out::default());
        let [Frame { bytes, .. }] = frames;
        bytes.to_vec()
    }

    /// Whether a fragment waits somewhere.
    pub fn held(&self) -> bool {
        self.cores.iter().any(|core| core.fragments.rendezvous.packets() + core.fragments.table.packets() > 0)
    }
}
