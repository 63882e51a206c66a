#![allow(clippy::unwrap_used, reason = "tests")]

use super::super::tests::{client, ip, key, nat};
use super::*;
use crate::spec::LinkSpec;

fn forward(protocol: u8, listen: &str, to: &str) -> ForwardSpec {
    ForwardSpec {
        protocol,
        listen: listen.parse().unwrap(),
        to: to.parse().unwrap(),
        tenant: 0,
        ports: 1,
        proxy_protocol: false,
    }
}

fn interface(addresses: &[&str]) -> InterfaceSpec {
    InterfaceSpec {
        name: "wan".into(),
        device: "eth0".into(),
        addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        tenant: 0,
        mtu: 1500,
        ipv6_mtu: u16::MAX,
        link: LinkSpec::ethernet([2, 0, 0, 0, 0, 1]),
        outside: false,
        through_action: None,
        loose_tcp: false,
    }
}

fn by(interface: u16) -> Egress {
    Egress::Interface(InterfaceId(interface))
}

#[test]
fn the_first_rule_that_serves_wins() {
    let exempt = NatSpec {
        mode: NatMode::None,
        from: vec!["10.9.0.0/16".parse().unwrap()],
        addresses: vec![],
        ..nat(&[])
    };
    let tenants = NatSpec { tenants: vec![3], ..nat(&["192.0.2.3"]) };
    let policy = NatPolicy::compile(&[exempt, tenants, nat(&["192.0.2.1"])], &[], &[], &[]);
    let rule = |out, src, dst, tenant| policy.rule_for(by(out), &client(&key(6, src, dst), tenant));
    assert_eq!(rule(1, "10.9.1.1:1", "198.51.100.1:80", 3), Some(0));
    assert_eq!(rule(1, "10.1.1.1:1", "198.51.100.1:80", 3), Some(1));
    assert_eq!(rule(1, "10.1.1.1:1", "198.51.100.1:80", 0), Some(2));
    assert_eq!(rule(0, "10.1.1.1:1", "198.51.100.1:80", 0), None, "another interface");
    assert_eq!(rule(1, "[fd00::1]:1", "[2001:db8::1]:80", 0), None, "no address of the family");
    assert_eq!(policy.mode(0), Some(NatMode::None));
    assert_eq!(policy.mode(9), None);
    assert!(policy.is_outside(ip("192.0.2.3")) && !policy.is_outside(ip("10.1.1.1")));
    assert_eq!(
        policy.rule_for_hairpin(ip("192.0.2.3"), &client(&key(6, "10.1.1.1:1", "10.1.1.2:80"), 0)),
        Some(2)
    );
    assert_eq!(
        policy.rule_for_hairpin(ip("192.0.2.9"), &client(&key(6, "10.1.1.1:1", "10.1.1.2:80"), 0)),
        None
    );
}

#[test]
fn a_rule_without_addresses_has_its_interfaces() {
    let wan = interface(&["169.254.7.7/16", "192.0.2.7/24", "2001:db8::7/64", "fe80::7/64"]);
    let policy = NatPolicy::compile(&[nat(&[])], &[], &[], &[interface(&[]), wan]);
    assert_eq!(policy.addresses(0), [ip("192.0.2.7")], "IPv4 only, and no link-local one");
    assert_eq!(
        policy.rule_for(by(1), &client(&key(6, "[fd00::1]:1", "[2001:db8:1::1]:80"), 0)),
        None,
        "is routed"
    );
}

#[test]
fn the_next_hop_decides_between_the_networks_of_an_interface() {
    let wan = interface(&["192.0.2.7/24", "192.168.100.2/24"]);
    let policy = NatPolicy::compile(&[nat(&[])], &[], &[], &[interface(&[]), wan]);
    let towards = |next: &str| policy.addresses_towards(0, ip("10.1.1.1"), Some(ip(next)));
    assert_eq!(towards("192.0.2.254"), [ip("192.0.2.7")]);
    assert_eq!(towards("192.168.100.1"), [ip("192.168.100.2")]);
    assert_eq!(policy.addresses(0).len(), 2);
    let named = NatPolicy::compile(&[nat(&["192.0.2.7", "192.168.100.2"])], &[], &[], &[]);
    assert_eq!(
        named.addresses_towards(0, ip("10.1.1.1"), Some(ip("192.0.2.254"))).len(),
        2,
        "as they are named"
    );
}

/// To an address of the host itself: the kernel translates, and the port is given to nobody.
#[test]
fn a_forward_to_the_host_itself_is_not_ours() {
    let interfaces = [interface(&["10.0.0.1/24"]), interface(&["192.0.2.7/24"])];
    let forwards = [forward(6, "192.0.2.7:2222", "10.0.0.1:22"), forward(6, "192.0.2.7:2223", "10.0.0.2:22")];
    let policy = NatPolicy::compile(&[nat(&[])], &forwards, &[], &interfaces);
    assert!(policy.forward(6, "192.0.2.7:2222".parse().unwrap()).is_none());
    assert!(policy.forward(6, "192.0.2.7:2223".parse().unwrap()).is_some());
    assert!(!policy.gives(ip("192.0.2.7"), 2222) && policy.gives(ip("192.0.2.7"), 2224));
}

#[test]
fn before_the_interface_has_an_ipv4_address_ipv4_is_refused_and_ipv6_routed() {
    let bare = interface(&["2001:db8::7/64", "fe80::7/64"]);
    let nats = [nat(&[]), NatSpec { mode: NatMode::None, ..nat(&[]) }];
    let policy = NatPolicy::compile(&nats, &[], &[], &[interface(&[]), bare]);
    assert_eq!(policy.addresses(0), [] as [IpAddr; 0]);
    let rule = |src, dst| policy.rule_for(by(1), &client(&key(6, src, dst), 0));
    assert_eq!(rule("10.0.0.5:1", "198.51.100.1:80"), Some(0), "no private source leaves by the next rule");
    assert_eq!(rule("[fd00::1]:1", "[2001:db8:1::1]:80"), Some(1));
}

#[test]
fn forwards_are_found_both_ways_and_keep_their_ports() {
    let forwards = [
        forward(6, "192.0.2.1:8080", "10.0.0.5:80"),
        forward(6, "192.0.2.2:8443", "10.0.0.5:80"),
        forward(17, "203.0.113.1:5300", "10.0.0.6:53"),
    ];
    let policy = NatPolicy::compile(&[nat(&["192.0.2.1"])], &forwards, &[], &[]);
    assert_eq!(policy.forward(6, "192.0.2.1:8080".parse().unwrap()), Some(&forwards[0]));
    assert_eq!(policy.forward(17, "192.0.2.1:8080".parse().unwrap()), None);
    assert!(policy.is_outside(ip("203.0.113.1")) && !policy.is_pool(ip("203.0.113.1")));
    let ports = policy.ports(policy.rule(0).unwrap()).unwrap();
    assert!(!ports.contains(8080) && ports.contains(8443) && ports.contains(5300));
    assert_eq!(policy.forwards().len(), 3);
}

#[test]
fn independence_is_of_addresses() {
    let independent = NatSpec {
        mapping: Mapping::EndpointIndependent,
        from: vec!["10.5.0.0/16".parse().unwrap()],
        ..nat(&["192.0.2.1", "192.0.2.2"])
    };
    let kept = NatSpec { mode: NatMode::PortOnly, mapping: Mapping::EndpointIndependent, ..nat(&[]) };
    let nats =
        [independent, nat(&["192.0.2.2", "192.0.2.3"]), nat(&["192.0.2.3"]), nat(&["192.0.2.4"]), kept];
    let policy = NatPolicy::compile(&nats, &[forward(6, "192.0.2.1:80", "10.0.0.5:80")], &[], &[]);
    assert_eq!(
        [0, 1, 2, 3, 4].map(|rule| policy.rule(rule).unwrap().independent),
        [true, true, true, false, false]
    );
    assert!(policy.endpoint_independent(ip("192.0.2.3"), 5000, 17));
    assert!(!policy.endpoint_independent(ip("192.0.2.4"), 5000, 17));
    assert!(!policy.endpoint_independent(ip("192.0.2.3"), 0, 47), "no ports, no mapping");
    assert!(
        policy.endpoint_independent(ip("192.0.2.1"), 80, 17)
            && !policy.endpoint_independent(ip("192.0.2.1"), 80, 6)
    );
    let rule = policy.rule_for(by(1), &client(&key(6, "10.9.0.1:1", "1.0.0.1:80"), 0)).unwrap();
    assert!(policy.is_independent(rule));
    let echo = FlowKey { src_port: 77, dst_port: 0, ..key(1, "1.0.0.1:0", "192.0.2.3:0") };
    assert_eq!(policy.mapping_core_of(&echo, 4), Some(super::super::mapping_core(ip("192.0.2.3"), 77, 4)));
    assert_eq!(policy.mapping_core_of(&key(6, "1.0.0.1:9", "192.0.2.4:900"), 4), None);
}

#[test]
fn leases_live_on_in_the_next_policy() {
    let lease = |first_port| LeaseSpec {
        name: "pod".into(),
        tenant: 0,
        from: "10.7.0.0/16".parse().unwrap(),
        address: ip("192.0.2.1"),
        first_port,
        ports: 1024,
    };
    let first = NatPolicy::compile(&[nat(&["192.0.2.1"])], &[], &[lease(2048)], &[]);
    assert_eq!(first.begin(0).0.len(), 1);
    first.leases().take(0, lease(4096)).unwrap();
    let next = NatPolicy::compile(&[nat(&["192.0.2.1"])], &[], &[lease(8192)], &[]);
    let (next, events, errors) = next.keeping(&first, 1);
    assert_eq!((events.len(), errors.len()), (2, 0));
    let ports: Vec<u16> = next.leases().list().iter().map(|lease| lease.spec.first_port).collect();
    assert_eq!(ports, [4096, 8192]);
    assert!(Arc::ptr_eq(next.leases(), first.leases()));
    assert_eq!(next.leasable(ip("192.0.2.1")), u64::MAX << 1, "ports from 1024 on");
    assert_eq!(next.leasable(ip("192.0.2.9")), 0);
}
