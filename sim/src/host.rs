//! A host beside a site's interface: a neighbor on an Ethernet that loses nothing.

use std::net::Ipv4Addr;

use packet::attachment::InterfaceId;

/// A frame is under way this long, ns.
pub(crate) const LAN_NS: u64 = 20_000;

/// A neighbor of a site.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// Site.
    pub site: usize,
    /// The site's interface towards it.
    pub interface: InterfaceId,
    /// Its address.
    pub address: Ipv4Addr,
    /// Its hardware address.
    pub mac: [u8; 6],
}

impl Host {
    /// Ethernet frame with an IPv4 packet for the site's interface, whose hardware address is `to`.
    pub(crate) fn frame(&self, to: [u8; 6], packet: &[u8]) -> Vec<u8> {
        [&to[..], &self.mac, &[8, 0], packet].concat()
    }
}
