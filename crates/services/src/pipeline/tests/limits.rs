//! Behaviour after the lists of VPP's NAT44 tests and the kernel's nft_nat and ipvs selftests, through whole cores.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use packet::DropReason;
use packet::flow::FlowKey;

use super::balancing::farm;
use super::world::*;
use crate::spec::{BalanceMethod, DeliveryMode, GatewaySpec, Mapping, NatMode, TCP, UDP};

fn with_nat(addresses: &[&str]) -> GatewaySpec {
    let mut spec = two_interfaces();
    spec.nats.push(nat(NatMode::AddressAndPort, addresses));
    spec
}

#[test]
fn a_client_has_so_many_flows_and_no_more() {
    let mut spec = with_nat(&["203.0.113.1"]);
    spec.nats[0].flows_per_client_max = 10;
    let mut world = World::new(1, spec);
    let flow = |last: u8, port: u16| udp(&format!("10.0.0.{last}:{port}"), "198.51.100.7:53", b"x");
    for port in 1000..1010 {
        world.one(LAN, &flow(9, port));
    }
    let left = world.dropped(LAN, &flow(9, 1010), DropReason::FlowsPerClient);
    assert_eq!((left[0].packet[20], left[0].packet[21]), (3, 13), "RFC 5508 REQ-8");
    world.one(LAN, &flow(9, 1005));
    world.one(LAN, &flow(8, 1010));
    world.wait(40);
    world.one(LAN, &flow(9, 1010));
}

/// One client stays on one outside address (RFC 4787 REQ-2) until that has no port left.
#[test]
fn clients_are_paired_with_addresses() {
    let mut world = World::new(2, with_nat(&["203.0.113.7", "203.0.113.8", "203.0.113.9"]));
    let mut used = BTreeSet::new();
    for last in 10..40u8 {
        let addresses: BTreeSet<IpAddr> = (1..30u8)
            .map(|remote| {
                let packet = udp(&format!("10.0.0.{last}:5000"), &format!("198.51.100.{remote}:53"), b"x");
                world.one(LAN, &packet).key().src
            })
            .collect();
        assert_eq!(addresses.len(), 1);
        used.extend(addresses);
    }
    assert_eq!(used.len(), 3, "all addresses are used");
}

/// A closed connection's ports may be used again at once, by both sides' choice (RFC 5382 REQ-5, kernel synack_reuse).
#[test]
fn tcp_ports_are_used_again_after_the_end() {
    let mut world = masquerade(2);
    let (inside, server) = ("10.0.0.9:5000", "198.51.100.7:80");
    for round in 0..20u32 {
        let first = round.wrapping_mul(100_000_007);
        let outside = world.one(LAN, &tcp(inside, server, SYN, first, 0, b"")).key();
        let back = outside.reversed();
        world.one(WAN, &tcp_of(&back, SYN | ACK, 900, first.wrapping_add(1), b""));
        world.one(LAN, &tcp(inside, server, ACK, first.wrapping_add(1), 901, b""));
        if round % 2 == 0 {
            world.one(WAN, &tcp_of(&back, FIN | ACK, 901, first.wrapping_add(1), b""));
            world.one(LAN, &tcp(inside, server, FIN | ACK, first.wrapping_add(1), 902, b""));
            world.one(WAN, &tcp_of(&back, ACK, 902, first.wrapping_add(2), b""));
        } else {
            world.one(WAN, &tcp_of(&back, RST, 901, 0, b""));
        }
        assert_eq!(world.flows(), 1, "the new connection takes the old one's place");
    }
    assert_eq!(world.total(|counters| counters.flows_opened), 20);
}

/// SYNs that nobody answers, from one client: they neither stop its own replied flows nor hold ports for long.
#[test]
fn a_syn_flood_from_inside_passes() {
    let mut spec = with_nat(&["203.0.113.1"]);
    spec.limits.embryonic_max = 300;
    let mut world = World::new(1, spec);
    let held = world.one(LAN, &udp("10.0.0.9:5000", "198.51.100.7:53", b"x")).key();
    world.one(WAN, &udp_of(&held.reversed(), b"y"));
    for number in 0..2_000u32 {
        let remote = format!("198.51.{}.{}:80", 100 + number / 250, 1 + number % 250);
        world.packet(LAN, &tcp(&format!("10.0.0.66:{}", 1024 + number), &remote, SYN, 1, 0, b""));
        world.now_ns += SECOND_NS / 1_000;
    }
    assert!(world.flows() <= 301, "{}", world.flows());
    assert_eq!(world.one(WAN, &udp_of(&held.reversed(), b"z")).key().dst, held_inside());
    world.wait(10);
    world.one(LAN, &tcp("10.0.0.9:6000", "198.51.100.7:80", SYN, 1, 0, b""));
    world.wait(300);
    assert_eq!(world.flows(), 0);
    assert_eq!(world.cores[0].ports_held(), 0, "no port is lost");
}

fn held_inside() -> IpAddr {
    "10.0.0.9".parse().unwrap()
}

/// conntrack_icmp_related: errors in both directions, about TCP and UDP, find the end that sent what they quote.
#[test]
fn errors_about_flows_in_both_directions() {
    for protocol in [TCP, UDP] {
        let mut world = masquerade(3);
        let inside = key(protocol, "10.0.0.9:5000", "198.51.100.7:80");
        let (out, back): (Vec<u8>, _) = match protocol {
            TCP => (tcp_of(&inside, SYN, 100, 0, b""), SYN | ACK),
            _ => (udp_of(&inside, b"question"), 0),
        };
        let left = world.one(LAN, &out);
        let outside = left.key();
        let error = icmp_error("192.0.2.33", outside.src, 3, 1, &left.packet);
        let error = world.one(WAN, &error);
        assert_eq!((error.by(), error.key()), (LAN, inside.reversed()), "{protocol}");
        assert_eq!(error.packet[12..16], [192, 0, 2, 33]);
        // The client refuses the reply: the server hears it from the gateway's address.
        let reply = match protocol {
            TCP => tcp_of(&outside.reversed(), back, 900, 101, b""),
            _ => udp_of(&outside.reversed(), b"answer"),
        };
        let reply = world.one(WAN, &reply);
        let error = world.one(LAN, &icmp_error("10.0.0.9", inside.dst, 3, 3, &reply.packet));
        assert_eq!((error.by(), error.key()), (WAN, outside));
        assert_eq!(error.packet[12..16], [203, 0, 113, 1], "RFC 5508 REQ-5: nothing inside is told");
        let quoted = FlowKey::of(&error.packet[28..]).unwrap_or(outside.reversed());
        assert_eq!(quoted, outside.reversed());
        // A forged one about nothing.
        let stranger = key(protocol, "203.0.113.1:1", "198.51.100.7:80");
        let quote = if protocol == TCP { tcp_of(&stranger, ACK, 1, 1, b"") } else { udp_of(&stranger, b"") };
        world.packet(WAN, &icmp_error("192.0.2.33", outside.src, 3, 1, &quote));
        assert_eq!(world.flows(), 1);
    }
}

/// NAT66, with ports and with addresses of 128 bits, over several cores.
#[test]
fn ipv6_is_translated_the_same_way() {
    let mut world = World::new(4, with_nat(&["2001:db8::7"]));
    for number in 0..300u16 {
        let inside = key(UDP, &format!("[fd00::{number:x}:9]:5000"), "[2001:db8:7::53]:53");
        let outside = world.one(LAN, &udp_of(&inside, b"x")).key();
        assert_eq!(outside.src, "2001:db8::7".parse::<IpAddr>().unwrap());
        assert_eq!(world.one(WAN, &udp_of(&outside.reversed(), b"y")).key(), inside.reversed());
    }
    assert_eq!(world.total(|counters| counters.handed_out), 0, "row C2 for IPv6");
    let (inside, server) = (key(TCP, "[fd00::9]:5000", "[2001:db8:7::80]:80"), 100);
    let outside = world.one(LAN, &tcp_of(&inside, SYN, server, 0, b"")).key();
    world.one(WAN, &tcp_of(&outside.reversed(), SYN | ACK, 900, 101, b""));
    assert_eq!(world.one(LAN, &tcp_of(&inside, ACK, 101, 901, b"GET")).key(), outside);
}

/// ipvs.sh, with weights: by connections for the least-connections method, by turns for round robin.
#[test]
fn weights_and_methods_through_the_core() {
    for method in [BalanceMethod::LeastConnections, BalanceMethod::RoundRobin, BalanceMethod::Maglev] {
        let mut spec = farm(NatMode::None, DeliveryMode::Nat);
        spec.servers[0].method = method;
        spec.servers[0].backends[0].weight = 3;
        spec.servers[0].backends[2].weight = 0;
        let mut world = World::new(3, spec);
        let mut shares: BTreeMap<IpAddr, u32> = BTreeMap::new();
        for port in 1_000..1_400u16 {
            let syn = tcp(&format!("198.51.100.7:{port}"), "203.0.113.10:80", SYN, 1, 0, b"");
            *shares.entry(world.one(WAN, &syn).key().dst).or_default() += 1;
        }
        let shares: Vec<u32> = shares.into_values().collect();
        let slack = if method == BalanceMethod::Maglev { 45 } else { 4 };
        assert_eq!(shares.len(), 2, "weight 0 gets nothing");
        assert!(shares[0].abs_diff(300) <= slack, "{method:?} {shares:?}");
    }
}

/// Least connections counts what lives: a backend whose connections ended gets the next ones.
#[test]
fn least_connections_follow_ends() {
    let mut spec = farm(NatMode::AddressAndPort, DeliveryMode::Nat);
    spec.servers[0].method = BalanceMethod::LeastConnections;
    let mut world = World::new(2, spec);
    let syn = |port: u16| tcp(&format!("198.51.100.7:{port}"), "203.0.113.10:80", SYN, 1, 0, b"");
    let flows: Vec<FlowKey> = (1_000..1_030).map(|port| world.one(WAN, &syn(port)).key()).collect();
    let freed = flows[0].dst;
    for flow in flows.iter().filter(|flow| flow.dst == freed) {
        world.one(LAN, &tcp_of(&flow.reversed(), RST | ACK, 0, 2, b""));
    }
    world.wait(12);
    for port in 2_000..2_010 {
        assert_eq!(world.one(WAN, &syn(port)).key().dst, freed);
    }
}

/// One client address with one backend by source address, whatever the port (ipvs "sh").
#[test]
fn a_client_address_stays_with_its_backend() {
    let mut spec = farm(NatMode::None, DeliveryMode::Nat);
    spec.servers[0].method = BalanceMethod::SourceAddress;
    let mut world = World::new(4, spec);
    for last in 1..20u8 {
        let backends: BTreeSet<IpAddr> = (1_000..1_020)
            .map(|port| {
                let syn = tcp(&format!("198.51.100.{last}:{port}"), "203.0.113.10:80", SYN, 1, 0, b"");
                world.one(WAN, &syn).key().dst
            })
            .collect();
        assert_eq!(backends.len(), 1);
    }
}

/// RFC 4787 REQ-9 a: two clients behind endpoint-independent mappings meet at their outside endpoints, each as the other
/// knows it, whichever cores these belong to. The pool may be the interface's own address.
#[test]
fn clients_meet_at_their_outside_endpoints() {
    for pool in ["203.0.113.1", "203.0.113.7"] {
        let mut spec = with_nat(&[pool]);
        spec.nats[0].mapping = Mapping::EndpointIndependent;
        let mut world = World::new(4, spec);
        let stun = "198.51.100.1:3478";
        for number in 0..60u16 {
            let (a, b) = (format!("10.0.0.9:{}", 5000 + number), format!("10.0.0.20:{}", 6000 + number));
            let outside = |key: FlowKey| format!("{}:{}", key.src, key.src_port);
            let a_out = outside(world.one(LAN, &udp(&a, stun, b"?")).key());
            let b_out = outside(world.one(LAN, &udp(&b, stun, b"?")).key());
            for _ in 0..2 {
                let left = world.one(LAN, &udp(&a, &b_out, b"hello"));
                assert_eq!((left.by(), left.key()), (LAN, key(UDP, &a_out, &b)), "{pool} {number}");
                assert_eq!(left.packet[8], 63, "one router, one hop");
                let left = world.one(LAN, &udp(&b, &a_out, b"hello"));
                assert_eq!((left.by(), left.key()), (LAN, key(UDP, &b_out, &a)));
            }
            // The client refuses: the other one hears it from the outside endpoint.
            let left = world.one(LAN, &udp(&a, &b_out, b"hello"));
            let error = world.one(LAN, &icmp_error("10.0.0.20", left.key().src, 3, 3, &left.packet));
            assert_eq!((error.by(), error.key()), (LAN, key(UDP, &b_out, &a)));
        }
        assert_eq!(world.flows(), 60 * 4);
        // Where nobody is mapped it is the gateway's stack that is meant, by the address it was called.
        if pool == "203.0.113.1" {
            let left = world.one(LAN, &tcp("10.0.0.9:5000", "203.0.113.1:2222", SYN, 1, 0, b""));
            assert_eq!((left.by(), left.key()), (HOST, key(TCP, "10.0.0.9:5000", "203.0.113.1:2222")));
        }
        world.wait(400);
        assert_eq!(world.flows(), 0);
    }
}

/// Strangers who come to a virtual server are no clients: they take no places of the table of these.
#[test]
fn strangers_at_a_server_are_not_remembered() {
    let mut spec = farm(NatMode::AddressAndPort, DeliveryMode::Nat);
    spec.servers[0].source_addresses = vec!["10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap()];
    let mut world = World::new(1, spec);
    for last in 1..=200 {
        let request = key(TCP, &format!("198.51.100.{last}:2000"), "203.0.113.10:80");
        let inside = world.one(WAN, &tcp_of(&request, SYN, 1, 0, b"")).key();
        world.one(LAN, &tcp_of(&inside.reversed(), SYN | ACK, 7, 2, b""));
    }
    assert_eq!(world.cores[0].nat().status().clients, 0);
}

/// A flow that was not counted as its client's does not count when it ends.
#[test]
fn what_is_not_counted_does_not_end_in_the_count() {
    let mut spec = farm(NatMode::AddressAndPort, DeliveryMode::Nat);
    spec.nats.push(nat(NatMode::AddressAndPort, &["203.0.113.1"]));
    spec.nats[0].flows_per_client_max = 2;
    let mut world = World::new(1, spec);
    let flow = |port: u16| udp(&format!("10.0.0.9:{port}"), "198.51.100.7:53", b"x");
    world.one(LAN, &flow(1));
    world.one(LAN, &flow(2));
    let request = key(TCP, "10.0.0.9:2000", "203.0.113.10:80");
    let inside = world.one(LAN, &tcp_of(&request, SYN, 1, 0, b"")).key();
    world.one(LAN, &tcp_of(&inside.reversed(), RST | ACK, 0, 2, b""));
    for _ in 0..3 {
        world.wait(9);
        world.one(LAN, &flow(1));
        world.one(LAN, &flow(2));
    }
    assert_eq!(world.flows(), 2, "that to the server has ended");
    world.dropped(LAN, &flow(3), DropReason::FlowsPerClient);
}
