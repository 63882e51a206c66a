//! Addresses of interfaces.

use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage, AddressScope, CacheInfo,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{Existing, Netlink};
use crate::Result;

/// An address of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// Interface index.
    pub index: u32,
    /// Our address, with the prefix length of its network.
    pub net: IpNet,
    /// Valid on this link only (fe80::/10, 169.254.0.0/16).
    pub link_local: bool,
    /// IPv6: duplicate detection has not ended (or has failed), it cannot be a source address yet.
    pub tentative: bool,
    /// IPv6: should not be used for anything new.
    pub deprecated: bool,
}

impl Address {
    pub(super) fn from_message(message: &AddressMessage) -> Option<Address> {
        let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
        let (mut local, mut address) = (None, None);
        for attribute in &message.attributes {
            match attribute {
                AddressAttribute::Local(ip) => local = Some(*ip),
                AddressAttribute::Address(ip) => address = Some(*ip),
                AddressAttribute::Flags(all) => flags = *all,
                _ => {}
            }
        }
        // On a point-to-point link `Address` is the other end.
        let net = IpNet::new(local.or(address)?, message.header.prefix_len).ok()?;
        Some(Address {
            index: message.header.index,
            net,
            link_local: packet::ip::is_link_local(net.addr()),
            tentative: flags.intersects(AddressFlags::Tentative | AddressFlags::Dadfailed)
                && !flags.contains(AddressFlags::Optimistic),
            deprecated: flags.contains(AddressFlags::Deprecated),
        })
    }
}

pub(super) fn family(ip: IpAddr) -> AddressFamily {
    match ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn message(index: u32, net: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.family = family(net.addr());
    message.header.prefix_len = net.prefix_len();
    message.header.scope = match net.addr() {
        IpAddr::V4(ip) if ip.is_loopback() => AddressScope::Host,
        IpAddr::V4(ip) if ip.is_link_local() => AddressScope::Link,
        _ => AddressScope::Universe,
    };
    message.attributes.push(AddressAttribute::Local(net.addr()));
    message.attributes.push(AddressAttribute::Address(net.addr()));
    message
}

impl Netlink {
    /// The addresses of one interface, IPv4 and IPv6.
    pub fn addresses(&self, index: u32) -> Result<Vec<Address>> {
        Ok(self.all_addresses()?.into_iter().filter(|address| address.index == index).collect())
    }

    /// The addresses of all interfaces.
    pub fn all_addresses(&self) -> Result<Vec<Address>> {
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        self.dump(&request, "list the addresses", |message| match message {
            RouteNetlinkMessage::NewAddress(message) => Address::from_message(&message),
            _ => None,
        })
    }

    /// Gives an interface an address. An IPv6 address gets no duplicate detection, which would take a second
    /// and has nobody to ask on a TUN or a test link: it is a source address at once, and the kernel accepts
    /// packets for it within some milliseconds after the interface is up. Fails with `AlreadyExists` if it is
    /// there already.
    pub fn add_address(&self, index: u32, net: IpNet) -> Result<()> {
        let mut message = message(index, net);
        if net.addr().is_ipv6() {
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        self.change(RouteNetlinkMessage::NewAddress(message), Existing::Refuse, || {
            format!("add the address {net} to interface {index}")
        })
    }

    /// Says how long an address of an interface stays, seconds; the kernel takes it away then. `None`: for good.
    pub fn set_address_lifetime(&self, index: u32, net: IpNet, seconds: Option<u32>) -> Result<()> {
        let mut message = message(index, net);
        if net.addr().is_ipv6() {
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        let mut lifetime = CacheInfo::default();
        lifetime.ifa_valid = seconds.unwrap_or(u32::MAX);
        lifetime.ifa_preferred = lifetime.ifa_valid;
        message.attributes.push(AddressAttribute::CacheInfo(lifetime));
        self.change(RouteNetlinkMessage::NewAddress(message), Existing::Replace, || {
            format!("set the lifetime of the address {net} of interface {index}")
        })
    }

    /// Takes an address from an interface.
    pub fn del_address(&self, index: u32, net: IpNet) -> Result<()> {
        self.change(RouteNetlinkMessage::DelAddress(message(index, net)), Existing::Needed, || {
            format!("take the address {net} from interface {index}")
        })
    }
}
