//! Inner traffic: what the sites' hosts send through the tunnel, and what they check at the other end.
//!
//! Every application owns both of its ends. It says what to send as [`Emit`]s, gets every packet that comes out of
//! the tunnel for it, and wants to be polled at a time of its choosing.

pub mod packet;
pub mod pattern;
pub mod request;
pub mod tcp;
pub mod udp;

use std::net::Ipv4Addr;

use ::packet::vnet::VirtioNetHeader;
use packet::Parsed;
use tunnel::time::Time;

/// A packet or super-packet that a site's TUN device gives out.
pub struct Emit {
    /// Site.
    pub site: usize,
    /// Its virtio header.
    pub offload: VirtioNetHeader,
    /// The packet.
    pub bytes: Vec<u8>,
}

/// The first server port; application `n` listens at this + n.
pub const FIRST_PORT: u16 = 20_000;

/// Where an application's two ends are.
#[derive(Clone, Copy, Debug)]
pub struct Ends {
    /// Number of the application.
    pub id: usize,
    /// Site of the client or sender, its address and port.
    pub client: (usize, Ipv4Addr, u16),
    /// Site of the server or receiver, its address and port.
    pub server: (usize, Ipv4Addr, u16),
}

/// An application.
pub enum App {
    /// Paced datagrams one way.
    Udp(udp::UdpFlow),
    /// Bulk data one way.
    Tcp(Box<tcp::TcpFlow>),
    /// Request and response.
    Request(request::RequestFlow),
}

impl App {
    /// A packet for this application came out of the tunnel at `site`.
    pub fn packet(&mut self, now: Time, site: usize, packet: &Parsed<'_>, out: &mut Vec<Emit>) {
        match self {
            Self::Udp(flow) => flow.packet(now, packet),
            Self::Tcp(flow) => flow.packet(now, site, packet, out),
            Self::Request(flow) => flow.packet(now, site, packet, out),
        }
    }

    /// Sends what is due; returns when to come back.
    pub fn poll(&mut self, now: Time, out: &mut Vec<Emit>) -> Time {
        match self {
            Self::Udp(flow) => flow.poll(now, out),
            Self::Tcp(flow) => flow.poll(now, out),
            Self::Request(flow) => flow.poll(now, out),
        }
    }
}
