//! What only shows when the host's state is known, or all of it together: pool addresses that cannot be used, services that
//! come to coincide, leases that nobody has.
//!
//! The addresses of a pool are put on a device. If one of them is the next router's, the kernel takes packets to the router
//! for its own and nothing gets out; the network and broadcast addresses of a network belong to no host.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use services::spec::{GatewaySpec, NatMode};

use crate::config::services::Services;
use crate::config::services::values::listen_text;
use crate::spec::HostFacts;

/// Why an address of a pool cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unusable {
    /// It stands for a network as a whole.
    Network(IpNet),
    /// It is that of everybody in a network.
    Broadcast(IpNet),
    /// The next router towards this prefix has it.
    NextRouter(IpNet),
}

impl std::fmt::Display for Unusable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Network(net) => write!(f, "is the network address of {net}"),
            Self::Broadcast(net) => write!(f, "is the broadcast address of {net}"),
            Self::NextRouter(net) => write!(f, "belongs to the next router towards {net}"),
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
    let configured = services.routes.iter().filter_map(|route| Some((route.to, route.via?)));
    let of_kernel = facts.into_iter().flat_map(|facts| &facts.routes);
    for (to, via) in configured.chain(of_kernel.filter_map(|route| Some((route.prefix, route.via?)))) {
        if pools.contains(&via) {
            found.entry(via).or_insert(Unusable::NextRouter(to));
        }
    }
    found
}

/// Pool addresses that the host's state makes impossible, for the operator to read.
#[must_use]
pub fn left_out(services: &Services, facts: &HostFacts) -> Vec<String> {
    let known = unusable(services, None);
    let found = unusable(services, Some(facts));
    let new = found.iter().filter(|(address, _)| !known.contains_key(address));
    new.map(|(address, why)| format!("{address} of a pool {why}: it is left out; remove it from the pool"))
        .collect()
}

/// Services that have come to listen on the same endpoint, and leases whose address no NAT has.
#[must_use]
pub fn contradictions(spec: &GatewaySpec) -> Vec<String> {
    let mut said = Vec::new();
    let mut taken: BTreeMap<(u8, SocketAddr), String> = BTreeMap::new();
    let servers =
        spec.servers.iter().map(|server| (server.protocol, server.listen, format!("\"{}\"", server.name)));
    let forwards = spec
        .forwards
        .iter()
        .map(|forward| (forward.protocol, forward.listen, format!("the forward to {}", forward.to)));
    for (protocol, listen, name) in servers.chain(forwards) {
        match taken.get(&(protocol, listen)) {
            Some(first) => said.push(format!(
                "{} is where {first} and {name} listen; {first} gets everything, give them different ports",
                listen_text(protocol, listen)
            )),
            None => {
                taken.insert((protocol, listen), name);
            }
        }
    }
    let pools: BTreeSet<IpAddr> = spec
        .nats
        .iter()
        .filter(|nat| nat.mode == NatMode::AddressAndPort)
        .flat_map(|nat| nat.addresses.iter().copied())
        .collect();
    for lease in spec.leases.iter().filter(|lease| !pools.contains(&lease.address)) {
        said.push(format!(
            "lease \"{}\": no [[nat]] has the address {} now, so that its holder gets other ports",
            lease.name, lease.address
        ));
    }
    said
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::addresses::AddressPlan;
    use crate::config::tests::config;
    use crate::live::Live;
    use crate::spec::gateway_spec;
    use crate::spec::tests::facts;

    const WAN: &str = "[[interface]]\nname = \"wan\"\ndevice = \"eth0\"\n";

    /// `eth0` has 203.0.113.1/24 from DHCP, and the kernel's routes lead to .253 and .254.
    #[test]
    fn a_pool_around_the_routers_leaves_them_to_the_network() {
        let pool = "[[nat]]\nout = \"wan\"\naddresses = \"203.0.113.0/24\"\n";
        let config = config("", &format!("{WAN}{pool}"));
        let said = left_out(&config.services, &facts());
        assert_eq!(said.len(), 4, "{said:?}");
        assert_eq!(
            said[2],
            "203.0.113.254 of a pool belongs to the next router towards 0.0.0.0/0: it is left out; remove it from the pool"
        );
        let left = |address: IpAddr| {
            ["203.0.113.0", "203.0.113.253", "203.0.113.254", "203.0.113.255"]
                .contains(&address.to_string().as_str())
        };
        let spec = gateway_spec(&config, &facts(), &Live::default());
        assert_eq!(spec.nats[0].addresses.len(), 252);
        assert!(!spec.nats[0].addresses.iter().any(|address| left(*address)));
        assert!(
            !spec.routes.iter().any(|route| route.prefix.prefix_len() == 32 && left(route.prefix.addr()))
        );
        let plan = AddressPlan::new(&config.services, &facts());
        assert_eq!(plan.addresses.len(), 252);
        assert!(
            !plan.addresses.iter().any(|entry| left(entry.net.addr())),
            "the kernel would take them for its own"
        );
    }

    #[test]
    fn ipv4_is_translated_when_nothing_is_left_of_its_pool() {
        let pool =
            "[[nat]]\nout = \"wan\"\naddresses = [\"203.0.113.254\", \"203.0.113.253\", \"2001:db8::9\"]\n";
        let config = config("", &format!("{WAN}{pool}"));
        let spec = gateway_spec(&config, &facts(), &Live::default());
        let addresses: Vec<String> = spec.nats[0].addresses.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["2001:db8::9", "203.0.113.1", "203.0.113.10"], "the interface's own");
    }

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

    #[test]
    fn services_that_come_to_coincide_and_leases_without_address() {
        let text = format!(
            "{WAN}[[nat]]\nout = \"wan\"\n[[forward]]\nlisten = \"tcp wan:8080\"\nto = \"10.0.0.5:80\"\n[[forward]]\n\
             listen = \"tcp 203.0.113.1:8081\"\nto = \"10.0.0.6:80\"\n[[virtual-server]]\nname = \"web\"\n\
             listen = \"tcp 203.0.113.1:8080\"\nbackends = [\"10.0.0.7:80\"]\n[[lease]]\nname = \"pod\"\n\
             from = \"10.0.0.0/24\"\naddress = \"203.0.113.9\"\nfirst-port = 2048\nports = 1024\n"
        );
        let config = config("", &text);
        let said = contradictions(&gateway_spec(&config, &facts(), &Live::default()));
        assert_eq!(
            said,
            [
                "tcp 203.0.113.1:8080 is where \"web\" and the forward to 10.0.0.5:80 listen; \"web\" gets everything, give \
                 them different ports",
                "lease \"pod\": no [[nat]] has the address 203.0.113.9 now, so that its holder gets other ports"
            ]
        );
        let mut elsewhere = facts();
        elsewhere.devices[1].addresses = vec!["203.0.113.9/24".parse().unwrap()];
        assert_eq!(contradictions(&gateway_spec(&config, &elsewhere, &Live::default())), [] as [String; 0]);
    }
}
