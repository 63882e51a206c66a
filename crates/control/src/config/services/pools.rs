//! Addresses of pools that cannot be used.
//!
//! The addresses of a pool are put on a device. If one of them is the next router's, the kernel takes packets to the router
//! for its own and nothing gets out; the network and broadcast addresses of a network belong to no host.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::Services;
use crate::host_facts::HostFacts;

/// Why an address of a pool cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unusable {
    /// It stands for a network as a whole.
    Network(IpNet),
    /// It is that of everybody in a network.
    Broadcast(IpNet),
    /// The next router towards this prefix has it.
    NextRouter(IpNet),
    /// It is one of `virtual-address`, and another machine has it now.
    Elsewhere,
}

impl std::fmt::Display for Unusable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Network(net) => write!(f, "is the network address of {net}"),
            Self::Broadcast(net) => write!(f, "is the broadcast address of {net}"),
            Self::NextRouter(net) => write!(f, "belongs to the next router towards {net}"),
            Self::Elsewhere => write!(f, "is not on this machine now"),
        }
    }
}

/// Whether an address is the network or broadcast address of a network: those of two addresses and fewer have none
/// (RFC 3021, RFC 6164), and IPv6 has no broadcast.
#[must_use]
pub fn of_nobody(net: IpNet, address: IpAddr) -> Option<Unusable> {
    if net.max_prefix_len() - net.prefix_len() < 2 {
        return None;
    }
    let net = net.trunc();
    if address == net.network() {
        Some(Unusable::Network(net))
    } else if address.is_ipv4() && address == net.broadcast() {
        Some(Unusable::Broadcast(net))
    } else {
        None
    }
}

/// The addresses of pools that cannot be used, as far as the configuration tells, and the host if it is asked.
#[must_use]
pub fn unusable(services: &Services, facts: Option<&HostFacts>) -> BTreeMap<IpAddr, Unusable> {
    let nats = services.nats.iter().flat_map(|nat| &nat.addresses);
    let pools: BTreeSet<IpAddr> =
        nats.chain(services.servers.iter().flat_map(|server| &server.source_addresses)).copied().collect();
    let mut found = BTreeMap::new();
    if pools.is_empty() {
        return found;
    }
    let of_devices = services
        .interfaces
        .iter()
        .filter_map(|interface| facts?.device(&interface.device))
        .flat_map(|device| &device.addresses);
    let configured = services.interfaces.iter().flat_map(|interface| &interface.addresses);
    for net in configured.chain(of_devices) {
        for edge in [net.network(), net.broadcast()] {
            if let Some(why) = of_nobody(*net, edge).filter(|_| pools.contains(&edge)) {
                found.insert(edge, why);
            }
        }
    }
    let is_here = |address: &IpAddr| {
        let mut devices = facts.into_iter().flat_map(|facts| &facts.devices);
        devices.any(|device| device.addresses.iter().any(|net| net.addr() == *address))
    };
    let moving = services.interfaces.iter().flat_map(|interface| &interface.virtual_addresses);
    for address in moving.filter(|address| facts.is_some() && pools.contains(address) && !is_here(address)) {
        found.insert(*address, Unusable::Elsewhere);
    }
    let configured = services.routes.iter().filter_map(|route| Some((route.to, route.via?)));
    let of_kernel = facts.into_iter().flat_map(|facts| &facts.routes);
    for (to, via) in configured.chain(of_kernel.filter_map(|route| Some((route.prefix, route.via?)))) {
        if pools.contains(&via) {
            found.entry(via).or_insert(Unusable::NextRouter(to));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn small_networks_have_no_edges() {
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        assert_eq!(of_nobody(net("192.0.2.1/31"), ip("192.0.2.0")), None);
        assert_eq!(of_nobody(net("192.0.2.1/32"), ip("192.0.2.1")), None);
        assert_eq!(of_nobody(net("192.0.2.1/30"), ip("192.0.2.1")), None);
        assert_eq!(
            of_nobody(net("192.0.2.1/30"), ip("192.0.2.3")),
            Some(Unusable::Broadcast(net("192.0.2.0/30")))
        );
        assert_eq!(
            of_nobody(net("2001:db8::1/64"), ip("2001:db8::")),
            Some(Unusable::Network(net("2001:db8::/64")))
        );
        assert_eq!(of_nobody(net("fe80::1/126"), ip("fe80::3")), None);
    }
}
