//! Inner traffic: what hosts send through sites and tunnels, and what they check at the other end.
//!
//! Every application owns both of its ends. It says what to send as [`Emit`]s, gets every packet that comes to one of
//! its ends, and wants to be polled at a time of its choosing. Who answers answers to the source that it sees, so that
//! any translation on the way is followed.

pub mod packet;
pub mod pattern;
pub mod ping;
pub mod request;
pub mod tcp;
pub mod udp;

use ::packet::vnet::VirtioNetHeader;
use packet::{Parsed, Socket};
use tunnel::time::Time;

/// Place of an end: what is behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// A site's TUN device: its own stack, and hosts that are routed through it.
    Site(usize),
    /// A host beside a site's interface, by its number in the world.
    Host(usize),
}

/// A packet or super-packet that a place sends.
pub struct Emit {
    /// Who sends it.
    pub from: Place,
    /// Its virtio header.
    pub offload: VirtioNetHeader,
    /// The packet.
    pub bytes: Vec<u8>,
}

/// The first server port; application `n` listens at this + n.
pub const FIRST_PORT: u16 = 20_000;

/// End of an application that a packet came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The client or sender.
    Client,
    /// The server or receiver.
    Server,
}

/// Ends of an application.
#[derive(Clone, Copy, Debug)]
pub struct Ends {
    /// Number of the application.
    pub id: usize,
    /// Place of the client or sender.
    pub client: Place,
    /// Its address and port.
    pub source: Socket,
    /// Address and port that the client uses: of the server, or of a virtual server.
    pub target: Socket,
}

/// A packet at one of the ends.
pub struct Arrived<'a> {
    /// Which end.
    pub side: Side,
    /// Where that end is: one of the backends of a virtual server.
    pub place: Place,
    /// The packet.
    pub packet: Parsed<'a>,
}

/// An application.
pub enum App {
    /// Paced datagrams one way, perhaps sent back.
    Udp(Box<udp::UdpFlow>),
    /// Bulk data one way.
    Tcp(Box<tcp::TcpFlow>),
    /// Request and response.
    Request(request::RequestFlow),
    /// ICMP echo.
    Ping(ping::PingFlow),
}

impl App {
    /// A packet for this application came.
    pub fn packet(&mut self, now: Time, arrived: &Arrived<'_>, out: &mut Vec<Emit>) {
        match self {
            Self::Udp(flow) => flow.packet(now, arrived, out),
            Self::Tcp(flow) => flow.packet(now, arrived, out),
            Self::Request(flow) => flow.packet(now, arrived, out),
            Self::Ping(flow) => flow.packet(arrived),
        }
    }

    /// Sends what is due; returns when to come back.
    pub fn poll(&mut self, now: Time, out: &mut Vec<Emit>) -> Time {
        match self {
            Self::Udp(flow) => flow.poll(now, out),
            Self::Tcp(flow) => flow.poll(now, out),
            Self::Request(flow) => flow.poll(now, out),
            Self::Ping(flow) => flow.poll(now, out),
        }
    }

    /// Packets with wrong content, and packets that came more than once where that can be seen.
    #[must_use]
    pub fn faults(&self) -> (u64, u64) {
        match self {
            Self::Udp(flow) => flow.sinks().fold((0, 0), |(corrupt, repeated), stats| {
                (corrupt + stats.corrupt, repeated + stats.repeated)
            }),
            Self::Tcp(flow) => (flow.received().corrupt, 0),
            Self::Request(flow) => (flow.stats().corrupt, 0),
            Self::Ping(flow) => (0, flow.stats().repeated),
        }
    }
}
