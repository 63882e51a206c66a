//! Packets that no ordinary program sends: made byte by byte, put on the wire as they are.

use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use linux::packet_socket::PacketSocket;
use packet::checksum::{finish, pseudo_header, sum};

use crate::gateway_scene::*;
use crate::scene::Background;

/// Protocol numbers.
pub const ICMP: u8 = 1;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;

/// Puts IPv4 packets on the wire of a host, to the gateway.
pub struct Raw {
    socket: PacketSocket,
    ethernet: Vec<u8>,
}

impl Raw {
    /// From the host of this network.
    pub fn new(lans: &Lans, number: usize) -> Self {
        let mac = |node: &testbed::topology::Node, device: &str| {
            node.netlink().unwrap().link(device).unwrap().unwrap().mac.unwrap()
        };
        let host = lans.host(number);
        let socket = host.run(|| PacketSocket::open("eth0", false, false)).unwrap().unwrap();
        let mut ethernet = mac(lans.gateway(), &format!("lan{number}")).to_vec();
        ethernet.extend(mac(host, "eth0"));
        ethernet.extend([8, 0]);
        Self { socket, ethernet }
    }

    /// Sends a packet; one that finds the queue full is lost, as on any wire.
    pub fn send(&self, packet: &[u8]) {
        let _ = self.socket.send(&[&self.ethernet, packet].concat());
    }
}

/// The fields of an IPv4 header that matter here.
#[derive(Clone, Copy)]
pub struct Header {
    pub source: Ipv4Addr,
    pub destination: Ipv4Addr,
    pub protocol: u8,
    pub id: u16,
    /// Bytes in front of this piece, a multiple of 8.
    pub offset: u16,
    pub more: bool,
}

impl Header {
    pub fn new(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8) -> Self {
        Self { source, destination, protocol, id: 1, offset: 0, more: false }
    }

    /// The packet with this content.
    pub fn packet(&self, content: &[u8]) -> Vec<u8> {
        let mut header = vec![0x45, 0];
        header.extend((20 + content.len() as u16).to_be_bytes());
        header.extend(self.id.to_be_bytes());
        header.extend(((self.offset / 8) | if self.more { 0x2000 } else { 0 }).to_be_bytes());
        header.extend([64, self.protocol, 0, 0]);
        header.extend(self.source.octets());
        header.extend(self.destination.octets());
        let checksum = finish(sum(&header, 0));
        header[10..12].copy_from_slice(&checksum.to_be_bytes());
        header.extend_from_slice(content);
        header
    }
}

fn with_checksum(
    source: Ipv4Addr,
    destination: Ipv4Addr,
    protocol: u8,
    mut upper: Vec<u8>,
    at: usize,
) -> Vec<u8> {
    let pseudo = pseudo_header(IpAddr::V4(source), IpAddr::V4(destination), protocol, upper.len());
    let checksum = finish(sum(&upper, pseudo));
    upper[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
    upper
}

/// A UDP datagram without its IP header.
pub fn udp(source: SocketAddrV4, destination: SocketAddrV4, payload: &[u8]) -> Vec<u8> {
    let mut upper = [source.port().to_be_bytes(), destination.port().to_be_bytes()].concat();
    upper.extend((8 + payload.len() as u16).to_be_bytes());
    upper.extend([0, 0]);
    upper.extend_from_slice(payload);
    with_checksum(*source.ip(), *destination.ip(), UDP, upper, 6)
}

/// A TCP segment with these flags, without its IP header.
pub fn tcp(source: SocketAddrV4, destination: SocketAddrV4, sequence: u32, flags: u8) -> Vec<u8> {
    let mut upper = [source.port().to_be_bytes(), destination.port().to_be_bytes()].concat();
    upper.extend(sequence.to_be_bytes());
    upper.extend([0, 0, 0, 0, 0x50, flags, 0x20, 0, 0, 0, 0, 0]);
    with_checksum(*source.ip(), *destination.ip(), TCP, upper, 16)
}

/// An ICMP message without its IP header.
pub fn icmp(kind: u8, code: u8, rest: u32, payload: &[u8]) -> Vec<u8> {
    let mut message = vec![kind, code, 0, 0];
    message.extend(rest.to_be_bytes());
    message.extend_from_slice(payload);
    let checksum = finish(sum(&message, 0));
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
    message
}

/// Sends without a pause until it is dropped.
pub struct Flood {
    pub sent: Arc<AtomicU64>,
    _thread: Background<()>,
}

impl Flood {
    /// `make` gives the packet of each number.
    pub fn start(raw: Raw, make: impl Fn(u64) -> Vec<u8> + Send + 'static) -> Self {
        let sent = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&sent);
        let thread = Background::start(move |end| {
            while !end.load(Ordering::Relaxed) {
                raw.send(&make(counter.fetch_add(1, Ordering::Relaxed)));
            }
        });
        Self { sent, _thread: thread }
    }
}
