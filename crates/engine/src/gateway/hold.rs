//! The time between two processes: what the kernel's stack must not see while nobody forwards.
//!
//! Without us it would answer segments of translated connections with resets, datagrams with "port unreachable", and with
//! `ip_forward = 1` send packets on untranslated, which ends connections as well. So packets that pass through are dropped,
//! and those to one of the host's own addresses if their port is one that flows get there. What is the host's own comes in as ever.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use linux::ingress_guard::{HeldPorts, hold_interfaces};
use linux::netlink::Netlink;
use services::policy::Policy;
use services::spec::{GatewaySpec, HostSpec, NatMode};

use super::{Shared, lock, open};

/// First port that flows get and programs of the host do not listen on.
const FIRST_PORT: u16 = 1_024;

/// Holds all open interfaces for so many seconds.
pub(crate) fn hold(shared: &Shared, listen_port: Option<u16>, seconds: u16) -> Result<(), linux::Error> {
    let policy = shared.policy.load();
    let share = open::kernel_share(&policy.spec, listen_port);
    let ports = held_ports(&policy, &addresses_of_host());
    let devices = lock(&shared.opened).devices();
    if devices.is_empty() { Ok(()) } else { hold_interfaces(&devices, &share, &ports, seconds) }
}

/// All addresses of the host, those of other devices too: their traffic comes in by ours.
fn addresses_of_host() -> Vec<IpAddr> {
    let read = Netlink::open().and_then(|netlink| netlink.all_addresses());
    match read {
        Ok(addresses) => addresses.into_iter().map(|address| address.net.addr()).collect(),
        Err(error) => {
            tracing::debug!(%error, "addresses of other devices");
            Vec::new()
        }
    }
}

/// Ports of the host's own addresses that are the flows'. Addresses that only flows use are no own ones: all that goes there waits.
fn held_ports(policy: &Policy, of_host: &[IpAddr]) -> HeldPorts {
    let spec = &policy.spec;
    let of_interfaces = spec.interfaces.iter().flat_map(|interface| &interface.addresses);
    let mut own: Vec<IpAddr> = of_interfaces.map(|net| net.addr()).collect();
    let of_flows = |address: &IpAddr| {
        policy.nat.is_outside(*address) || spec.servers.iter().any(|server| server.listen.ip() == *address)
    };
    own.extend(of_host.iter().filter(|address| !of_flows(address)));
    own.sort_unstable();
    own.dedup();
    let mut ports = Vec::new();
    for address in &own {
        for (first, last) in given_out(policy, *address) {
            for range in without_host(&spec.host, *address, first.max(FIRST_PORT), last) {
                ports.push((*address, range));
            }
        }
        let here = |listen: &SocketAddr| listen.ip() == *address;
        let servers = spec.servers.iter().map(|server| (server.listen, server.listen.port()));
        let forwards = spec.forwards.iter().filter(|forward| !forward.leads_here(&spec.interfaces));
        let forwards = forwards.map(|forward| (forward.listen, forward.last_port()));
        for (listen, last) in servers.chain(forwards).filter(|(listen, _)| here(listen)) {
            ports.push((*address, (listen.port(), last)));
        }
    }
    HeldPorts { own, ports }
}

/// Ranges that NAT gives out at an own address.
fn given_out(policy: &Policy, address: IpAddr) -> Vec<(u16, u16)> {
    let spec: &GatewaySpec = &policy.spec;
    let rules = (0u16..).zip(&spec.nats).filter(|(rule, _)| policy.nat.addresses(*rule).contains(&address));
    let mut ranges: Vec<(u16, u16)> = rules.map(|(_, nat)| nat.ports).collect();
    let by_server = spec.servers.iter().any(|server| {
        server.source == NatMode::AddressAndPort
            && (server.source_addresses.is_empty() || server.source_addresses.contains(&address))
    });
    if by_server {
        ranges.push((FIRST_PORT, u16::MAX));
    }
    ranges.sort_unstable();
    ranges.dedup();
    ranges
}

/// A range without the ports of the host's own connections and programs.
fn without_host(host: &HostSpec, address: IpAddr, first: u16, last: u16) -> Vec<(u16, u16)> {
    let held: BTreeSet<u16> = host.held_ports.of(&[address]).collect();
    let of_host = |port: u16| host.is_port(port) || held.contains(&port);
    let mut ranges: Vec<(u16, u16)> = Vec::new();
    for port in (first..=last).filter(|port| !of_host(*port)) {
        match ranges.last_mut() {
            Some((_, end)) if *end == port - 1 => *end = port,
            _ => ranges.push((port, port)),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use services::held_ports::{HeldPort, HeldPorts};
    use std::sync::Arc;

    #[test]
    fn the_hosts_own_ports_are_left_alone() {
        let hold = |address: &str, port| HeldPort { protocol: 6, port, address: address.parse().unwrap() };
        let host = HostSpec {
            ports: (32_768, 60_999),
            held_ports: Arc::new(HeldPorts::new([hold("0.0.0.0", 8080), hold("10.0.0.1", 9000)])),
            ..HostSpec::default()
        };
        let ranges = |address: &str| without_host(&host, address.parse().unwrap(), 1_024, 65_535);
        assert_eq!(ranges("203.0.113.1"), [(1_024, 8_079), (8_081, 32_767), (61_000, 65_535)]);
        assert_eq!(ranges("10.0.0.1").len(), 4);
    }
}
