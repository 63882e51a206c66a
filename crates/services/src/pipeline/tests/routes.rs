//! Packets that no route takes on, that go back where they came from, and flows whose translation does not hold any more.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use packet::DropReason;
use packet::attachment::{Egress, Ingress};

use super::world::*;
use crate::held_ports::{HeldPort, HeldPorts};
use crate::pipeline::{Neighbors, Outcome};
use crate::spec::{
    ForwardSpec, GatewaySpec, NatMode, RouteAction, RouteSpec, RuleAction, RuleSpec, SideSpec, TCP, UDP,
};

/// Type and code of an ICMP message of either version.
fn kind(packet: &[u8]) -> (u8, u8) {
    let at = if packet[0] >> 4 == 4 { 20 } else { 40 };
    (packet[at], packet[at + 1])
}

fn route(prefix: &str, to: Ingress, via: Option<&str>) -> RouteSpec {
    RouteSpec::new(0, prefix.parse().unwrap(), to.into(), via.map(|via| via.parse().unwrap()))
}

/// RFC 1812 §5.2.7.1, RFC 4443 §3.1: whoever sends where no route leads is told at once, except by a black hole.
#[test]
fn what_no_route_takes_on_is_answered() {
    let mut spec = two_interfaces();
    spec.routes.retain(|route| route.prefix.prefix_len() > 0);
    let refusing = |prefix: &str, action| RouteSpec { action, ..route(prefix, HOST, None) };
    spec.routes.push(refusing("192.0.2.0/28", RouteAction::Blackhole));
    spec.routes.push(refusing("192.0.2.16/28", RouteAction::Unreachable));
    spec.routes.push(refusing("192.0.2.32/28", RouteAction::Prohibit));
    spec.routes.push(refusing("2001:db8:66::/48", RouteAction::Prohibit));
    let mut world = World::new(2, spec);
    let cases = [
        ("10.0.0.5:1000", "198.51.100.7:53", DropReason::NoRoute, Some((3, 0))),
        ("10.0.0.5:1000", "192.0.2.1:53", DropReason::RouteBlackhole, None),
        ("10.0.0.5:1000", "192.0.2.17:53", DropReason::RouteUnreachable, Some((3, 1))),
        ("10.0.0.5:1000", "192.0.2.33:53", DropReason::RouteProhibited, Some((3, 13))),
        ("[fd00::5]:1000", "[2001:db8:77::1]:53", DropReason::NoRoute, Some((1, 0))),
        ("[fd00::5]:1000", "[2001:db8:66::1]:53", DropReason::RouteProhibited, Some((1, 1))),
    ];
    for (src, dst, reason, answer) in cases {
        let left = world.dropped(LAN, &udp(src, dst, b"x"), reason);
        assert_eq!(left.first().map(|left| kind(&left.packet)), answer, "{dst}");
        assert_eq!(left.len(), usize::from(answer.is_some()));
    }
    // TCP as well: a connection fails at once.
    let left =
        world.dropped(LAN, &tcp("10.0.0.5:1000", "198.51.100.7:80", SYN, 1, 0, b""), DropReason::NoRoute);
    assert_eq!(kind(&left[0].packet), (3, 0));
    assert_eq!(left[0].by(), LAN);
}

/// Packets that the kernel passes on by a device of its own go to it as they are, without a flow: the other direction does not come by here. A
/// rule about addresses holds for what begins something, the default does not.
#[test]
fn what_the_kernel_passes_on_is_handed_to_it() {
    let kernel = RouteSpec { egress: Egress::Kernel, ..route("10.8.0.0/24", HOST, None) };
    let mut spec = native(two_interfaces());
    spec.default_action = RuleAction::Drop;
    spec.nats.push(nat(NatMode::AddressAndPort, &["203.0.113.1"]));
    spec.routes.push(kernel.clone());
    let closed = SideSpec { prefixes: vec!["10.8.0.9/32".parse().unwrap()], ..SideSpec::default() };
    spec.rules = vec![RuleSpec { action: RuleAction::Drop, to: closed, ..RuleSpec::default() }];
    let mut world = World::new(2, spec.clone());
    let answer = tcp("10.0.0.5:80", "10.8.0.2:1000", SYN | ACK, 1, 1, b"");
    let packets = [
        udp("10.0.0.5:1000", "10.8.0.2:53", b"x"),
        tcp("10.0.0.5:1000", "10.8.0.2:80", SYN, 1, 0, b""),
        answer.clone(),
        tcp("10.0.0.5:80", "10.8.0.9:1000", ACK, 1, 1, b"data"),
        echo("10.0.0.5", "10.8.0.2", 0, 7),
        icmp_error("10.0.0.5", "10.8.0.2".parse().unwrap(), 3, 3, &udp("10.8.0.2:1000", "10.0.0.5:9", b"x")),
    ];
    for packet in &packets {
        let left = world.one(LAN, packet);
        assert_eq!(left.outcome, Outcome::DeviceIngress(LAN_ID));
        assert_eq!(left.packet, *packet, "unchanged");
    }
    assert_eq!(world.flows(), 0);
    world.dropped(LAN, &tcp("10.0.0.5:1000", "10.8.0.9:80", SYN, 1, 0, b""), DropReason::RuleDrop);
    // Addressed to a mapping or forward it would come back untranslated.
    let mut forwarding = spec;
    forwarding.forwards.push(ForwardSpec {
        protocol: UDP,
        listen: "203.0.113.1:53".parse().unwrap(),
        to: "10.8.0.2:53".parse().unwrap(),
        ports: 1,
        tenant: 0,
        proxy_protocol: false,
    });
    forwarding.rules.clear();
    forwarding.default_action = RuleAction::Allow;
    world.reload(forwarding);
    world.dropped(WAN, &udp("198.51.100.7:1000", "203.0.113.1:53", b"x"), DropReason::NoRoute);
}

/// A flow whose route goes is told so, and goes on when the route comes again.
#[test]
fn a_live_flow_without_a_route_is_answered() {
    let spec = two_interfaces();
    let mut world = World::new(1, spec.clone());
    let packet = udp("10.0.0.5:1000", "198.51.100.7:53", b"x");
    assert_eq!(world.one(LAN, &packet).by(), WAN);
    let mut without = spec.clone();
    without.routes.retain(|route| route.prefix.prefix_len() > 0);
    world.reload(without);
    assert_eq!(kind(&world.dropped(LAN, &packet, DropReason::NoRoute)[0].packet), (3, 0));
    world.reload(spec);
    assert_eq!(world.one(LAN, &packet).by(), WAN);
}

/// Who asks from outside, where hosts hide behind a NAT, learns nothing about the inside.
#[test]
fn outside_nobody_is_told_of_missing_routes() {
    let mut spec = two_interfaces();
    spec.routes.retain(|route| route.prefix.prefix_len() > 0);
    spec.nats.push(nat(NatMode::AddressAndPort, &["203.0.113.1"]));
    let mut world = World::new(1, spec);
    let left = world.dropped(WAN, &udp("198.51.100.7:1000", "10.9.9.9:53", b"x"), DropReason::NoRoute);
    assert!(left.is_empty());
}

/// A neighbor that the kernel asked for in vain: the sender is told, behind a NAT too, and the kernel asks again.
#[test]
fn a_dead_neighbor_is_told() {
    let mut world = masquerade(1);
    let packet = udp("10.0.0.5:1000", "203.0.113.77:53", b"x");
    let next = (WAN_ID, "203.0.113.77".parse().unwrap());
    assert_eq!(world.one(LAN, &packet).outcome, Outcome::Resolve(next.0, next.1));
    world.set_neighbors(Neighbors { version: 1, failed: [next].into(), ..Neighbors::default() });
    let left = world.packet(LAN, &packet);
    assert_eq!(left.len(), 2, "{left:?}");
    assert_eq!(kind(&left[0].packet), (3, 1));
    assert_eq!(left[0].key().dst, "10.0.0.5".parse::<IpAddr>().unwrap());
    assert_eq!(left[1].outcome, Outcome::Resolve(next.0, next.1));
    world.set_neighbors(Neighbors { version: 2, known: [(next, [2; 6])].into(), ..Neighbors::default() });
    assert_eq!(world.one(LAN, &packet).by(), WAN);
}

/// An IPv4 packet to an IPv6 next hop (RFC 8950) is an IPv4 frame.
#[test]
fn ipv4_by_an_ipv6_router_stays_ipv4() {
    let mut spec = two_interfaces();
    spec.routes.push(route("192.0.2.0/24", WAN, Some("fe80::9")));
    let mut world = World::new(1, spec);
    let next = (WAN_ID, IpAddr::V6("fe80::9".parse().unwrap()));
    world.set_neighbors(Neighbors { version: 1, known: [(next, [6; 6])].into(), ..Neighbors::default() });
    let left = world.frame(LAN, &udp("10.0.0.5:1000", "192.0.2.1:53", b"x"));
    assert_eq!(left[..14], [6, 6, 6, 6, 6, 6, 2, 0, 0, 0, 0, 1, 8, 0]);
}

fn lan_with_a_second_router() -> GatewaySpec {
    let mut spec = two_interfaces();
    spec.interfaces[0].addresses.push("fe80::1/64".parse().unwrap());
    spec.routes.push(route("10.1.0.0/24", LAN, Some("10.0.0.254")));
    spec.routes.push(route("fd01::/64", LAN, Some("fe80::254")));
    spec
}

/// RFC 1812 §5.2.7.2, RFC 4861 §8.2: the packet goes on, and its sender is told the shorter way, if it is on that network.
#[test]
fn what_leaves_where_it_came_from_is_redirected() {
    let mut world = World::new(1, lan_with_a_second_router());
    let packet = udp("10.0.0.5:1000", "10.1.0.5:53", b"x");
    let left = world.bytes(LAN, &[&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 5, 8, 0][..], &packet].concat());
    assert_eq!(left.len(), 2, "{left:?}");
    assert_eq!(kind(&left[0].packet), (5, 1));
    assert_eq!(left[0].packet[12..20], [10, 0, 0, 1, 10, 0, 0, 5]);
    assert_eq!(left[0].packet[24..28], [10, 0, 0, 254]);
    assert_eq!(left[0].packet[28..48], packet[..20]);
    assert_eq!(left[1].key().dst, "10.1.0.5".parse::<IpAddr>().unwrap());
    assert_eq!(left[1].by(), LAN);
    // Once per flow.
    assert_eq!(world.packet(LAN, &packet).len(), 1);
    // A sender from further away cannot take the other router.
    assert_eq!(world.packet(LAN, &udp("172.16.0.5:1000", "10.1.0.5:53", b"x")).len(), 1);

    let packet = udp("[fd00::5]:1000", "[fd01::5]:53", b"x");
    let left = world.bytes(LAN, &[&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 5, 0x86, 0xdd][..], &packet].concat());
    assert_eq!(left.len(), 2, "{left:?}");
    let redirect = &left[0].packet;
    assert_eq!((kind(redirect), redirect[7]), ((137, 0), 255));
    let address =
        |at: usize| Ipv6Addr::from(<[u8; 16]>::try_from(&redirect[at..at + 16]).unwrap()).to_string();
    assert_eq!([8, 24, 48, 64].map(address), ["fe80::1", "fd00::5", "fe80::254", "fd01::5"]);
    assert_eq!(redirect[80..82], [4, ((redirect.len() - 80) / 8) as u8]);
}

/// A second router answers past us: what we see of the connection is not all there is.
#[test]
fn tcp_of_which_one_direction_comes_by_goes_on() {
    let mut world = World::new(2, lan_with_a_second_router());
    let ask = key(TCP, "10.0.0.5:2000", "10.1.0.5:80");
    world.packet(LAN, &tcp_of(&ask, SYN, 1_000, 0, b""));
    for (seq, ack) in [(1_001, 1), (1_001, 3_000_000), (1_101, 9_000_000)] {
        let left = world.packet(LAN, &tcp_of(&ask, ACK, seq, ack, &[0; 100]));
        assert_eq!(left.len(), 1);
    }
    assert_eq!(world.packet(LAN, &tcp_of(&ask, FIN | ACK, 1_201, 9_000_000, b"")).len(), 1);
    // The other way round: only the server's answers come by.
    let answer = key(TCP, "10.0.0.6:80", "10.1.0.5:3000");
    world.packet(LAN, &tcp_of(&answer, SYN | ACK, 70, 5, b""));
    assert_eq!(world.packet(LAN, &tcp_of(&answer, ACK, 71, 900, b"x")).len(), 1);
    assert!(world.drops().iter().all(|(_, count)| count == 0), "{:?}", world.drops());
    // Between two interfaces it is strict, unless one of them says that it is not.
    let ask = key(TCP, "198.51.100.7:2000", "10.0.0.5:80");
    world.dropped(WAN, &tcp_of(&ask, SYN | ACK, 1, 1, b""), DropReason::NotNew);
    let mut spec = lan_with_a_second_router();
    spec.interfaces[WAN_ID.index()].loose_tcp = true;
    world.reload(spec);
    assert_eq!(world.packet(WAN, &tcp_of(&ask, SYN | ACK, 1, 1, b"")).len(), 1);
}

/// RFC 6691: full segments fit both links, in either direction, translated or not.
#[test]
fn the_mss_fits_the_way_out_and_the_way_back() {
    let mut spec = two_interfaces();
    spec.interfaces[1].mtu = 1492;
    spec.nats.push(nat(NatMode::AddressAndPort, &["203.0.113.1"]));
    let mut world = World::new(1, spec);
    let mss = |packet: &[u8]| {
        let at = if packet[0] >> 4 == 4 { 20 } else { 40 } + 22;
        u16::from_be_bytes([packet[at], packet[at + 1]])
    };
    let option = |mss: u16| [&[2, 4][..], &mss.to_be_bytes()].concat();
    for (src, dst, sent, wanted) in [
        ("10.0.0.5:1000", "198.51.100.7:80", 1460, 1452),
        ("10.0.0.5:1001", "198.51.100.7:80", 1400, 1400),
        ("[fd00::5]:1000", "[2001:db8:7::7]:80", 1440, 1432),
    ] {
        let ask = key(TCP, src, dst);
        let syn = world.one(LAN, &tcp_with(&ask, SYN, 1, 0, &option(sent), b""));
        assert_eq!(mss(&syn.packet), wanted);
        let reply = syn.key().reversed();
        let answer = world.one(WAN, &tcp_with(&reply, SYN | ACK, 9, 2, &option(sent), b""));
        assert_eq!((answer.by(), mss(&answer.packet)), (LAN, wanted));
    }
}

/// Its own address is another now: TCP is reset, with the number that its client expects; UDP begins anew.
#[test]
fn a_flow_ends_when_its_address_is_gone() {
    let mut spec = two_interfaces();
    spec.nats.push(nat(NatMode::AddressAndPort, &["203.0.113.1"]));
    let mut world = World::new(2, spec.clone());
    let (tcp_key, udp_key) =
        (key(TCP, "10.0.0.5:1000", "198.51.100.7:80"), key(UDP, "10.0.0.5:1000", "198.51.100.7:53"));
    let second = key(TCP, "10.0.0.5:1001", "198.51.100.7:80");
    let outside = [tcp_key, second].map(|ask| {
        let outside = world.one(LAN, &tcp_of(&ask, SYN, 100, 0, b"")).key().reversed();
        world.one(WAN, &tcp_of(&outside, SYN | ACK, 500, 101, b""));
        world.one(LAN, &tcp_of(&ask, ACK, 101, 501, b""));
        outside
    });
    world.one(LAN, &udp_of(&udp_key, b"x"));
    let moved = |text: String| text.replace("203.0.113.1/", "203.0.113.77/");
    spec.interfaces[1].addresses[0] = moved(spec.interfaces[1].addresses[0].to_string()).parse().unwrap();
    for route in &mut spec.routes {
        route.prefix = moved(route.prefix.to_string()).parse().unwrap();
    }
    spec.nats[0] = nat(NatMode::AddressAndPort, &["203.0.113.77"]);
    world.reload(spec);
    let new: IpAddr = "203.0.113.77".parse().unwrap();
    assert_eq!(world.one(LAN, &udp_of(&udp_key, b"x")).key().src, new);
    // To the client's segment.
    let left = world.dropped(LAN, &tcp_of(&tcp_key, ACK, 101, 501, b"hello"), DropReason::NatGone);
    assert_eq!((left.len(), left[0].by(), left[0].key()), (1, LAN, tcp_key.reversed()));
    assert_eq!((left[0].packet[33], &left[0].packet[24..28]), (RST, &501u32.to_be_bytes()[..]));
    // To the server's.
    let left = world.dropped(WAN, &tcp_of(&outside[1], ACK, 501, 101, b"hello"), DropReason::NatGone);
    assert_eq!((left.len(), left[0].by(), left[0].key()), (1, LAN, second.reversed()));
    assert_eq!((left[0].packet[33] & RST, &left[0].packet[24..28]), (RST, &501u32.to_be_bytes()[..]));
    assert_eq!(world.flows(), 1, "neither lives on");
    // New ones work.
    assert_eq!(world.one(LAN, &tcp_of(&tcp_key, SYN, 900, 0, b"")).key().src, new);
}

/// A route may take less than its interface: the packets that it takes are told so, and SYNs are lowered to it; others are not.
#[test]
fn a_route_has_an_mtu_of_its_own() {
    let mut spec = two_interfaces();
    spec.routes.push(RouteSpec { mtu: 1300, ..route("192.0.2.0/24", WAN, Some("203.0.113.254")) });
    let mut world = World::new(2, spec);
    let big = |to: &str| {
        let mut packet = udp_of(&key(UDP, "10.0.0.5:1000", to), &[7; 1_300]);
        packet[6] |= 0x40;
        packet[10..12].fill(0);
        let sum = packet::checksum::finish(packet::checksum::sum(&packet[..20], 0));
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        packet
    };
    let left = world.dropped(LAN, &big("192.0.2.9:53"), DropReason::TooBig);
    assert_eq!((kind(&left[0].packet), &left[0].packet[26..28]), ((3, 4), &1300u16.to_be_bytes()[..]));
    assert_eq!(world.one(LAN, &big("198.51.100.9:53")).by(), WAN);
    let left = world.one(LAN, &udp_of(&key(UDP, "10.0.0.5:1000", "192.0.2.9:53"), &[7; 1_200]));
    assert_eq!(left.by(), WAN);
}

/// IPv6 may have a lesser MTU on a device, as a router's advertisement says.
#[test]
fn ipv6_has_an_mtu_of_its_own() {
    let mut spec = two_interfaces();
    spec.interfaces[1].ipv6_mtu = 1_300;
    let net = "2001:db8:7::/64".parse().unwrap();
    spec.routes.push(RouteSpec::new(0, net, WAN.into(), Some("2001:db8::fe".parse().unwrap())));
    spec.routes.push(RouteSpec::new(0, "2001:db8:10::/64".parse().unwrap(), LAN.into(), None));
    let mut world = World::new(2, spec);
    let big = udp_of(&key(UDP, "[2001:db8:10::5]:1000", "[2001:db8:7::7]:53"), &[7; 1_300]);
    let left = world.dropped(LAN, &big, DropReason::TooBig);
    assert_eq!((left[0].packet[40], &left[0].packet[46..48]), (2, &1300u16.to_be_bytes()[..]));
    let same = udp_of(&key(UDP, "10.0.0.5:1000", "198.51.100.9:53"), &[7; 1_300]);
    assert_eq!(world.one(LAN, &same).by(), WAN);
}

/// A program of the host opens the port that a flow has, as its IKE opens 500 after a client's: UDP goes on from another port with the
/// client's next packet, or makes way with the answer that may be the host's. Others stay.
#[test]
fn a_flow_leaves_a_port_that_the_host_opens() {
    let mut spec = native(two_interfaces());
    spec.nats.push(nat(NatMode::AddressAndPort, &["203.0.113.1"]));
    let mut world = World::new(2, spec.clone());
    let asks = ["198.51.100.7:500", "198.51.100.8:500"].map(|far| key(UDP, "10.0.0.5:500", far));
    let outside = asks.map(|ask| world.one(LAN, &udp_of(&ask, b"x")).key());
    let tcp_key = key(TCP, "10.0.0.5:1000", "198.51.100.7:80");
    let connection = world.one(LAN, &tcp_of(&tcp_key, SYN, 100, 0, b"")).key();
    let ports = outside.iter().chain([&connection]).map(|key| key.src_port);
    let address = std::net::Ipv4Addr::UNSPECIFIED.into();
    let held = ports.flat_map(|port| [TCP, UDP].map(|protocol| HeldPort { protocol, port, address }));
    spec.host.held_ports = Arc::new(HeldPorts::new(held));
    spec.nats[0].reserved = spec.host.held_ports.iter().map(|held| (held.port, held.port)).collect();
    world.reload(spec);
    let moved = world.one(LAN, &udp_of(&asks[0], b"y")).key();
    assert_eq!((moved.src, moved.dst), (outside[0].src, outside[0].dst));
    assert_ne!(moved.src_port, outside[0].src_port);
    assert_eq!(world.one(WAN, &udp_of(&moved.reversed(), b"z")).key(), asks[0].reversed());
    let answer = udp_of(&outside[1].reversed(), b"z");
    world.dropped(WAN, &answer, DropReason::NatGone);
    assert_eq!(world.one(WAN, &answer).outcome, Outcome::DeviceIngress(WAN_ID));
    assert_eq!(world.one(LAN, &tcp_of(&tcp_key, SYN, 100, 0, b"")).key(), connection);
}

/// An endpoint-independent mapping goes with its address.
#[test]
fn a_mapping_ends_when_its_address_is_gone() {
    let mut spec = two_interfaces();
    let mut own = nat(NatMode::AddressAndPort, &["203.0.113.1"]);
    own.mapping = crate::spec::Mapping::EndpointIndependent;
    spec.nats.push(own);
    let mut world = World::new(2, spec.clone());
    let ask = key(UDP, "10.0.0.5:1000", "198.51.100.7:53");
    world.one(LAN, &udp_of(&ask, b"x"));
    spec.interfaces[1].addresses[0] = "203.0.113.77/24".parse().unwrap();
    spec.routes.retain(|route| route.prefix.to_string() != "203.0.113.1/32");
    spec.routes.push(route("203.0.113.77/32", HOST, None));
    spec.nats[0].addresses = vec!["203.0.113.77".parse().unwrap()];
    world.reload(spec);
    for dst in ["198.51.100.7:53", "198.51.100.8:53"] {
        let left = world.one(LAN, &udp("10.0.0.5:1000", dst, b"x"));
        assert_eq!(left.key().src, "203.0.113.77".parse::<IpAddr>().unwrap(), "{dst}");
    }
}

/// A reload that takes the rule away breaks nothing: the address is still where the flow leaves.
#[test]
fn a_flow_outlives_the_rule_that_translated_it() {
    let mut spec = two_interfaces();
    let without = spec.clone();
    spec.nats.push(nat(NatMode::AddressAndPort, &["203.0.113.1"]));
    let mut port_only = spec.clone();
    port_only.nats[0].mode = NatMode::PortOnly;
    let mut world = World::new(1, spec.clone());
    let packet = udp("10.0.0.5:1000", "198.51.100.7:53", b"x");
    let before = world.one(LAN, &packet).key();
    for spec in [without, port_only, spec] {
        world.reload(spec);
        assert_eq!(world.one(LAN, &packet).key(), before);
    }
}

/// A route that refuses one address does not make it ours.
#[test]
fn a_refused_address_is_not_an_own_one() {
    let mut spec = two_interfaces();
    let blackhole = RouteSpec { action: RouteAction::Blackhole, ..route("10.0.0.66/32", HOST, None) };
    spec.routes.push(blackhole);
    let mut world = World::new(1, spec);
    world.dropped(LAN, &udp("10.0.0.5:1000", "10.0.0.66:53", b"x"), DropReason::RouteBlackhole);
    // Nor may it send by another interface, as nobody may.
    assert_eq!(world.one(LAN, &udp("10.0.0.66:1000", "198.51.100.7:53", b"x")).by(), WAN);
}

/// The default route moves from a private line to a WAN with NAT, and to another one.
#[test]
fn a_flow_begins_anew_when_its_way_out_is_another() {
    let mut spec = two_interfaces();
    let mut second = spec.interfaces[1].clone();
    second.name = "wan2".to_owned();
    second.addresses = vec!["100.64.9.1/24".parse().unwrap()];
    spec.interfaces.push(second);
    spec.routes.push(route("100.64.9.0/24", THIRD, None));
    spec.routes.push(route("100.64.9.1/32", HOST, None));
    let without = spec.clone();
    spec.nats.push(nat(NatMode::AddressAndPort, &["203.0.113.1"]));
    let mut of_second = nat(NatMode::AddressAndPort, &["100.64.9.1"]);
    of_second.out = THIRD.interface();
    spec.nats.push(of_second);
    let ask = key(UDP, "10.0.0.5:1000", "198.51.100.7:53");
    let src = |world: &mut World| {
        let left = world.one(LAN, &udp_of(&ask, b"x"));
        (left.by(), left.key().src.to_string())
    };
    let mut world = World::new(2, without);
    assert_eq!(src(&mut world), (WAN, "10.0.0.5".to_owned()));
    world.reload(spec.clone());
    assert_eq!(src(&mut world), (WAN, "203.0.113.1".to_owned()), "it was not translated, and has to be now");
    let place = spec.routes.iter().position(|route| route.prefix.to_string() == "0.0.0.0/0").unwrap();
    spec.routes[place] = route("0.0.0.0/0", THIRD, Some("100.64.9.254"));
    world.reload(spec.clone());
    assert_eq!(src(&mut world), (THIRD, "100.64.9.1".to_owned()));
    // Any other change leaves it as it is.
    let before = world.one(LAN, &udp_of(&ask, b"x")).key();
    spec.routes.push(route("192.0.2.0/24", WAN, Some("203.0.113.253")));
    world.reload(spec);
    assert_eq!(world.one(LAN, &udp_of(&ask, b"x")).key(), before);
    assert_eq!(world.flows(), 1);
}

/// The next hop moves to another network of the same interface: so does the address.
#[test]
fn a_flow_begins_anew_when_its_next_hop_is_in_another_network() {
    let mut spec = super::translation::beside_a_modem(nat(NatMode::AddressAndPort, &[]));
    let (ask, connection) =
        (key(UDP, "10.0.0.5:1000", "198.51.100.7:53"), key(TCP, "10.0.0.5:1000", "198.51.100.7:80"));
    let mut world = World::new(2, spec.clone());
    let src = |world: &mut World| world.one(LAN, &udp_of(&ask, b"x")).key().src.to_string();
    assert_eq!(src(&mut world), "203.0.113.1");
    let outside = world.one(LAN, &tcp_of(&connection, SYN, 100, 0, b"")).key().reversed();
    world.one(WAN, &tcp_of(&outside, SYN | ACK, 500, 101, b""));
    // Another router of the same network.
    let place = spec.routes.iter().position(|route| route.prefix.to_string() == "0.0.0.0/0").unwrap();
    spec.routes[place] = route("0.0.0.0/0", WAN, Some("203.0.113.253"));
    world.reload(spec.clone());
    assert_eq!(src(&mut world), "203.0.113.1");
    world.one(LAN, &tcp_of(&connection, ACK, 101, 501, b""));
    assert_eq!(world.flows(), 2);
    spec.routes[place] = route("0.0.0.0/0", WAN, Some("192.168.100.1"));
    world.reload(spec);
    assert_eq!(src(&mut world), "192.168.100.2");
    let left = world.dropped(LAN, &tcp_of(&connection, ACK, 101, 501, b"x"), DropReason::NatGone);
    assert_eq!((left.len(), left[0].by(), left[0].key()), (1, LAN, connection.reversed()));
}
