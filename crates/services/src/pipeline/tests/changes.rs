//! Policies and routes change under live flows.

use std::net::IpAddr;

use packet::DropReason;
use packet::attachment::Ingress;

use super::balancing::farm;
use super::world::*;
use crate::pipeline::Outcome;
use crate::spec::{
    DeliveryMode, ForwardSpec, GatewaySpec, InterfaceSpec, LinkSpec, NatMode, RouteSpec, RuleAction,
    RuleSpec, TCP, UDP,
};

fn route(tenant: u16, prefix: &str, to: Ingress, via: Option<&str>) -> RouteSpec {
    let via = via.map(|via| via.parse().unwrap());
    RouteSpec::new(tenant, prefix.parse().unwrap(), to.into(), via)
}

fn interface(name: &str, address: &str, tenant: u16) -> InterfaceSpec {
    InterfaceSpec {
        name: name.to_owned(),
        device: name.to_owned(),
        addresses: vec![address.parse().unwrap()],
        tenant,
        mtu: 1500,
        ipv6_mtu: u16::MAX,
        link: LinkSpec::ethernet([2, 0, 0, 0, 0, 9]),
        outside: false,
        through_action: None,
        loose_tcp: false,
    }
}

fn forward(listen: &str, to: &str, tenant: u16) -> ForwardSpec {
    let (listen, to) = (listen.parse().unwrap(), to.parse().unwrap());
    ForwardSpec { protocol: TCP, listen, to, tenant, ports: 1, proxy_protocol: false }
}

/// The same configuration under another era: every flow is decided again.
fn changed(spec: &GatewaySpec) -> GatewaySpec {
    let mut spec = spec.clone();
    spec.routes.push(route(0, "192.0.2.0/24", WAN, Some("203.0.113.253")));
    spec
}

#[test]
fn direct_return_goes_on_to_its_backend_after_a_change() {
    let spec = farm(NatMode::None, DeliveryMode::DirectReturn);
    let mut world = World::new(2, spec.clone());
    let request = key(TCP, "198.51.100.7:2000", "203.0.113.10:80");
    let before = world.one(WAN, &tcp_of(&request, SYN, 1, 0, b"")).outcome;
    assert!(matches!(before, Outcome::Resolve(LAN_ID, _)));
    world.reload(changed(&spec));
    assert_eq!(world.one(WAN, &tcp_of(&request, ACK, 2, 9, b"")).outcome, before);
    // Its backend leaves the configuration: the connection ends where it began.
    let Outcome::Resolve(_, backend) = before else { unreachable!() };
    let mut without = spec;
    without.servers[0].backends.retain(|other| other.address.ip() != backend);
    world.reload(without);
    assert_eq!(world.one(WAN, &tcp_of(&request, ACK, 3, 9, b"")).outcome, before);
}

#[test]
fn a_forward_into_a_tenant_stays_there_after_a_change() {
    let mut spec = two_interfaces();
    spec.tenants.push("red".to_owned());
    spec.interfaces.push(interface("red", "10.7.0.1/24", 1));
    spec.routes.push(route(1, "10.7.0.0/24", THIRD, None));
    spec.forwards.push(forward("203.0.113.1:8080", "10.7.0.5:80", 1));
    let mut world = World::new(2, spec.clone());
    let request = key(TCP, "198.51.100.7:2000", "203.0.113.1:8080");
    let inside = world.one(WAN, &tcp_of(&request, SYN, 1, 0, b""));
    assert_eq!(inside.by(), THIRD);
    world.reload(changed(&spec));
    let again = world.one(WAN, &tcp_of(&request, SYN, 1, 0, b""));
    assert_eq!((again.by(), again.key()), (THIRD, inside.key()));
    let answer = world.one(THIRD, &tcp_of(&inside.key().reversed(), SYN | ACK, 7, 2, b""));
    assert_eq!((answer.by(), answer.key()), (WAN, request.reversed()));
}

#[test]
fn a_flow_waits_for_its_route_to_come_back() {
    let mut spec = two_interfaces();
    spec.nats.push(nat(NatMode::AddressAndPort, &["203.0.113.1"]));
    spec.default_action = RuleAction::Drop;
    spec.rules.push(RuleSpec { name: "out".to_owned(), to: side(WAN), ..RuleSpec::default() });
    let mut world = World::new(2, spec.clone());
    let request = key(UDP, "10.0.0.5:2000", "198.51.100.7:53");
    let outside = world.one(LAN, &udp_of(&request, b"a")).key();
    world.one(WAN, &udp_of(&outside.reversed(), b"b"));
    let mut away = spec.clone();
    away.routes.retain(|route| route.prefix.prefix_len() > 0);
    world.reload(away);
    world.dropped(LAN, &udp_of(&request, b"a"), DropReason::NoRoute);
    world.reload(spec);
    assert_eq!(world.one(LAN, &udp_of(&request, b"a")).key(), outside);
    assert_eq!(world.one(WAN, &udp_of(&outside.reversed(), b"b")).key(), request.reversed());
}

/// Packets that came in by an uplink that is not the way back are still judged as having come by it.
#[test]
fn a_flow_is_judged_by_the_interface_that_it_came_by() {
    let mut spec = two_interfaces();
    spec.interfaces.push(interface("wan2", "198.18.0.1/24", 0));
    spec.routes.push(route(0, "198.18.0.0/24", THIRD, None));
    spec.forwards.push(forward("198.18.0.1:8080", "10.0.0.5:80", 0));
    spec.default_action = RuleAction::Drop;
    spec.rules.push(RuleSpec { name: "by wan2".to_owned(), from: side(THIRD), ..RuleSpec::default() });
    let mut world = World::new(2, spec.clone());
    let request = key(TCP, "198.51.100.7:2000", "198.18.0.1:8080");
    let inside = world.one(THIRD, &tcp_of(&request, SYN, 1, 0, b"")).key();
    world.one(LAN, &tcp_of(&inside.reversed(), SYN | ACK, 7, 2, b""));
    world.reload(changed(&spec));
    assert_eq!(world.one(THIRD, &tcp_of(&request, ACK, 2, 8, b"")).key(), inside);
    assert_eq!(world.total(|counters| counters.flows_refused), 0);
}

/// Addresses at which nobody is cost nothing that others need.
#[test]
fn a_sweep_over_empty_addresses_leaves_next_hops_for_others() {
    let mut spec = two_interfaces();
    spec.limits.embryonic_max = 10_000;
    let mut world = World::new(1, spec);
    for number in 0..70_000u32 {
        let to = std::net::Ipv6Addr::from_bits((0x2001_0db8 << 96) | (0x1_0000 + u128::from(number)));
        let packet = udp("[fd00::5]:2000", &format!("[{to}]:53"), b"x");
        assert_eq!(world.one(LAN, &packet).outcome, Outcome::Resolve(WAN_ID, IpAddr::V6(to)));
        if number % 5_000 == 0 {
            world.wait(35);
        }
    }
    assert_eq!(world.cores[0].next_hops(), 0);
    let left = world.one(LAN, &udp("10.0.0.5:2000", "198.51.100.7:53", b"x"));
    assert_eq!(left.outcome, Outcome::Resolve(WAN_ID, "203.0.113.254".parse().unwrap()));
}

/// A neighbour of one interface does not send by another.
#[test]
fn a_source_that_lives_elsewhere_is_refused() {
    let mut world = World::new(2, two_interfaces());
    world.dropped(WAN, &udp("10.0.0.77:2000", "10.0.0.5:53", b"x"), DropReason::BadSource);
    world.dropped(WAN, &udp("[fd00::77]:2000", "[fd00::5]:53", b"x"), DropReason::BadSource);
    world.dropped(LAN, &udp("203.0.113.9:2000", "198.51.100.7:53", b"x"), DropReason::BadSource);
    world.one(WAN, &udp("198.51.100.7:2000", "10.0.0.5:53", b"x"));
    world.one(LAN, &udp("172.16.0.9:2000", "198.51.100.7:53", b"x"));
}

#[test]
fn a_reload_puts_limits_in_force() {
    let mut spec = two_interfaces();
    spec.rules = vec![RuleSpec { action: RuleAction::Reject, ..RuleSpec::default() }];
    let mut world = World::new(1, spec.clone());
    let packet = udp("10.0.0.5:1000", "198.51.100.7:2000", &[7; 64]);
    assert_eq!(world.dropped(LAN, &packet, DropReason::RuleReject).len(), 1);
    assert!(world.packet(LAN, &in_pieces(&packet, 32)[1]).is_empty());
    assert!(world.held());
    spec.limits.errors_per_s_max = 0;
    spec.limits.fragment_bytes_max = 0;
    world.reload(spec.clone());
    assert!(!world.held(), "there is no room for it any more");
    assert!(world.dropped(LAN, &packet, DropReason::RuleReject).is_empty());
    spec.limits.errors_per_s_max = 10;
    world.reload(spec);
    world.wait(1);
    assert_eq!(world.dropped(LAN, &packet, DropReason::RuleReject).len(), 1);
}

/// A router with two lines, on which next hops have numbers.
fn with_two_lines() -> GatewaySpec {
    let mut spec = two_interfaces();
    spec.interfaces.push(interface("third", "192.0.2.1/24", 0));
    for line in &mut spec.interfaces[1..] {
        line.link = LinkSpec::PointToPoint;
    }
    spec.routes.push(route(0, "192.0.2.0/24", THIRD, None));
    spec
}

fn pieces(src: &str, dst: &str) -> Vec<Vec<u8>> {
    in_pieces(&udp(src, dst, &[7; 1_900]), 1_000)
}

/// After a change next hops get other numbers, and fragments that go on one by one go by the new ones.
#[test]
fn fragments_follow_their_flow_over_a_change() {
    let spec = with_two_lines();
    let mut world = World::new(1, spec.clone());
    let asks = ["198.51.100.7:53", "192.0.2.9:53"].map(|remote| key(UDP, "10.0.0.9:5000", remote));
    let ways = [WAN, THIRD];
    for (ask, way) in asks.iter().zip(ways) {
        assert_eq!(world.one(LAN, &udp_of(ask, b"x")).by(), way);
    }
    let mut other = spec;
    other.routes.push(route(0, "198.18.0.0/15", WAN, None));
    world.reload(other);
    assert_eq!(world.one(LAN, &udp_of(&asks[1], b"x")).by(), THIRD);
    for piece in pieces("10.0.0.9:5000", "198.51.100.7:53") {
        assert_eq!(world.one(LAN, &piece).by(), WAN);
    }
}

/// A flow that a new rule forbids ends, whether its next packet is whole or in pieces.
#[test]
fn fragments_meet_a_new_rule() {
    let spec = with_two_lines();
    let mut world = World::new(2, spec.clone());
    world.one(LAN, &udp("10.0.0.9:5000", "198.51.100.7:53", b"x"));
    let mut closed = spec;
    closed.rules.push(RuleSpec { action: RuleAction::Drop, from: side(LAN), ..RuleSpec::default() });
    world.reload(closed);
    for piece in pieces("10.0.0.9:5000", "198.51.100.7:53") {
        world.dropped(LAN, &piece, DropReason::RuleDrop);
    }
    assert_eq!(world.flows(), 0);
}

/// A flow whose address is gone ends with a fragment, and the next packet in pieces begins anew.
#[test]
fn fragments_leave_by_an_address_that_is_there() {
    let mut spec = with_two_lines();
    spec.nats.push(nat(NatMode::AddressAndPort, &["203.0.113.7"]));
    let mut world = World::new(2, spec.clone());
    let src = |packet: &[u8]| packet[12..16].to_vec();
    assert_eq!(src(&world.one(LAN, &udp("10.0.0.9:5000", "198.51.100.7:53", b"x")).packet), [203, 0, 113, 7]);
    spec.nats[0] = nat(NatMode::AddressAndPort, &["203.0.113.8"]);
    world.reload(spec);
    let sent = pieces("10.0.0.9:5000", "198.51.100.7:53");
    world.dropped(LAN, &sent[0], DropReason::NatGone);
    world.packet(LAN, &sent[1]);
    for mut piece in pieces("10.0.0.9:5000", "198.51.100.7:53") {
        // Another packet.
        piece[5] = 9;
        piece[10..12].copy_from_slice(&[0, 0]);
        let sum = packet::checksum::finish(packet::checksum::sum(&piece[..20], 0));
        piece[10..12].copy_from_slice(&sum.to_be_bytes());
        assert_eq!(src(&world.one(LAN, &piece).packet), [203, 0, 113, 8]);
    }
}
