//! Peers in rules, routes, NAT and tenants, and answers by the way the question came.

use packet::attachment::{BondId, Egress, Ingress};
use packet::{DropReason, FlowKey};

use super::world::*;
use crate::pipeline::{Outcome, explain};
use crate::spec::{
    Attachment, GatewaySpec, InterfaceSpec, LinkSpec, NatMode, PeerSpec, RouteSpec, RuleAction, RuleSpec,
    TCP, UDP,
};

const BRANCH_ID: BondId = BondId(4);
const OTHER_ID: BondId = BondId(9);
pub const BRANCH: Ingress = Ingress::Bond(BRANCH_ID);
const OTHER: Ingress = Ingress::Bond(OTHER_ID);

fn peer(id: BondId, name: &str, tenant: u16, prefix: &str) -> PeerSpec {
    PeerSpec { id, name: name.to_owned(), tenant, allowed_ips: vec![prefix.parse().unwrap()] }
}

/// As control does it: each peer has a route to what is behind it.
fn with_peers(mut spec: GatewaySpec, peers: Vec<PeerSpec>) -> GatewaySpec {
    for peer in &peers {
        spec.routes.extend(
            peer.allowed_ips
                .iter()
                .map(|prefix| RouteSpec::new(peer.tenant, *prefix, Egress::Bond(peer.id), None)),
        );
    }
    spec.peers = peers;
    spec
}

pub fn two_branches() -> GatewaySpec {
    let peers = vec![peer(BRANCH_ID, "branch", 0, "10.8.0.0/16"), peer(OTHER_ID, "other", 0, "10.9.0.0/16")];
    with_peers(two_interfaces(), peers)
}

fn rule(action: RuleAction, from: impl Into<Attachment>, to: impl Into<Attachment>) -> RuleSpec {
    RuleSpec { action, from: side(from), to: side(to), ..RuleSpec::default() }
}

#[test]
fn every_way_between_interface_host_and_bond() {
    for cores in [1, 3] {
        let mut world = World::new(cores, two_branches());
        let ends = [(LAN, "10.0.0.5"), (HOST, "203.0.113.1"), (BRANCH, "10.8.0.5"), (OTHER, "10.9.0.5")];
        for (place, (from, src)) in ends.into_iter().enumerate() {
            for (to, dst) in ends {
                // The host reaches its interfaces by itself.
                if from == to || matches!((from, to), (HOST, LAN) | (LAN, HOST)) {
                    continue;
                }
                let request = key(UDP, &format!("{src}:{}", 2_000 + place), &format!("{dst}:53"));
                let left = world.one(from, &udp_of(&request, b"question"));
                assert_eq!((left.by(), left.key()), (to, request), "{from:?} to {to:?}");
                let left = world.one(to, &udp_of(&request.reversed(), b"answer"));
                assert_eq!((left.by(), left.key()), (from, request.reversed()), "{to:?} back to {from:?}");
                let syn = tcp_of(&tcp_key(&request), SYN, 7, 0, b"");
                assert_eq!(world.one(from, &syn).by(), to);
            }
        }
        assert_eq!(world.total(|counters| counters.flows_opened), 20);
    }
}

/// Backends behind a peer see an address of the tunnel, which the peer knows the way to, unless `source` says otherwise.
#[test]
fn backends_behind_a_peer_see_the_gateway() {
    for (source, seen) in [
        (NatMode::AddressAndPort, "10.77.0.2"),
        (NatMode::PortOnly, "198.51.100.7"),
        (NatMode::None, "198.51.100.7"),
    ] {
        let mut spec = native(with_peers(
            super::balancing::farm(source, crate::spec::DeliveryMode::Nat),
            vec![peer(BRANCH_ID, "branch", 0, "10.8.0.0/16")],
        ));
        spec.servers[0].backends.truncate(1);
        spec.servers[0].backends[0].address = "10.8.0.5:80".parse().unwrap();
        spec.host.peer_sources.push("10.77.0.2".parse().unwrap());
        spec.routes.push(RouteSpec::new(0, "10.77.0.2/32".parse().unwrap(), HOST.into(), None));
        let mut world = World::new(3, spec);
        for port in 2_000..2_050 {
            let request = key(TCP, &format!("198.51.100.7:{port}"), "203.0.113.10:80");
            let asked = world.one(WAN, &tcp_of(&request, SYN, 1, 0, b""));
            assert_eq!((asked.by(), asked.key().src.to_string().as_str()), (BRANCH, seen));
            let reply = world.one(BRANCH, &tcp_of(&asked.key().reversed(), SYN | ACK, 7, 2, b""));
            assert_eq!((reply.by(), reply.key()), (WAN, request.reversed()));
        }
        // What the host itself sends there has its address and port.
        let own = key(TCP, "10.77.0.2:40000", "10.8.0.5:80");
        let left = world.one(HOST, &tcp_of(&own, SYN, 1, 0, b""));
        assert_eq!((left.by(), left.key()), (BRANCH, own));
        let left = world.one(BRANCH, &tcp_of(&own.reversed(), SYN | ACK, 7, 2, b""));
        assert_eq!((left.by(), left.key()), (HOST, own.reversed()));
    }
}

fn tcp_key(key: &FlowKey) -> FlowKey {
    FlowKey { protocol: TCP, ..*key }
}

#[test]
fn only_routers_count_down_and_the_host_is_not_one_for_its_own_packets() {
    let mut world = World::new(1, two_branches());
    let mut ask = |ingress, src: &str, dst: &str, ttl: u8| {
        let mut packet = udp(&format!("{src}:2000"), &format!("{dst}:53"), b"x");
        packet[8] = ttl;
        let sum =
            packet::checksum::finish(packet::checksum::sum(&[&packet[..10], &packet[12..20]].concat(), 0));
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        world.packet(ingress, &packet)
    };
    assert_eq!(ask(HOST, "203.0.113.1", "10.8.0.5", 1)[0].packet[8], 1, "as for a neighbor of the host");
    assert_eq!(ask(BRANCH, "10.8.0.5", "203.0.113.1", 1)[0].packet[8], 1, "it has arrived");
    assert_eq!(ask(LAN, "10.0.0.5", "10.8.0.5", 9)[0].packet[8], 8);
    assert_eq!(ask(BRANCH, "10.8.0.5", "10.9.0.5", 9)[0].packet[8], 8);
    let told = ask(LAN, "10.0.0.5", "10.8.0.5", 1);
    assert_eq!((told[0].by(), told[0].packet[9], told[0].packet[20]), (LAN, 1, 11), "time exceeded");
}

#[test]
fn a_packet_does_not_go_back_to_the_peer_it_came_from() {
    let mut world = World::new(1, two_branches());
    world.dropped(BRANCH, &udp("10.8.0.5:1", "10.8.7.7:53", b"x"), DropReason::NoRoute);
    world.dropped(HOST, &udp("203.0.113.1:1", "224.0.0.9:520", b"x"), DropReason::NoRoute);
    assert_eq!(world.flows(), 0);
}

#[test]
fn rules_name_one_peer_or_any() {
    let mut spec = two_branches();
    spec.default_action = RuleAction::Drop;
    spec.rules = vec![
        rule(RuleAction::Drop, BRANCH, WAN),
        rule(RuleAction::Allow, Attachment::AnyBond, WAN),
        rule(RuleAction::Allow, BRANCH, OTHER),
        rule(RuleAction::Allow, LAN, Attachment::Bond(OTHER_ID)),
    ];
    let mut world = World::new(2, spec);
    world.dropped(BRANCH, &udp("10.8.0.5:1", "198.51.100.7:53", b"x"), DropReason::RuleDrop);
    assert_eq!(world.one(OTHER, &udp("10.9.0.5:1", "198.51.100.7:53", b"x")).by(), WAN);
    assert_eq!(world.one(BRANCH, &udp("10.8.0.5:1", "10.9.0.5:53", b"x")).by(), OTHER);
    world.dropped(OTHER, &udp("10.9.0.5:2", "10.8.0.5:53", b"x"), DropReason::DefaultDrop);
    assert_eq!(world.one(LAN, &udp("10.0.0.5:1", "10.9.0.5:53", b"x")).by(), OTHER);
    world.dropped(LAN, &udp("10.0.0.5:1", "10.8.0.5:53", b"x"), DropReason::DefaultDrop);
}

/// R4: what comes from a peer to the gateway itself is judged, whatever port it goes to; the host's own connections and
/// their answers pass as those by interfaces do.
#[test]
fn rules_judge_what_peers_send_to_the_gateway() {
    let mut spec = two_branches();
    spec.default_action = RuleAction::Drop;
    let ssh = RuleSpec { dst_ports: vec![(22, 22)], ..rule(RuleAction::Allow, BRANCH, Attachment::Gateway) };
    spec.rules = vec![ssh];
    let mut world = World::new(2, spec.clone());
    let request = key(TCP, "10.8.0.5:2000", "203.0.113.1:22");
    assert_eq!(world.one(BRANCH, &tcp_of(&request, SYN, 7, 0, b"")).by(), HOST);
    assert_eq!(world.one(HOST, &tcp_of(&request.reversed(), SYN | ACK, 70, 8, b"")).by(), BRANCH);
    assert_eq!(world.one(BRANCH, &tcp_of(&request, ACK, 8, 71, b"hello")).by(), HOST);
    for port in [23, 40_000] {
        let other = key(TCP, "10.8.0.5:2001", &format!("203.0.113.1:{port}"));
        world.dropped(BRANCH, &tcp_of(&other, SYN, 7, 0, b""), DropReason::DefaultDrop);
        world.dropped(BRANCH, &udp_of(&FlowKey { protocol: UDP, ..other }, b"x"), DropReason::DefaultDrop);
    }
    world.dropped(BRANCH, &echo("10.8.0.5", "203.0.113.1", 8, 1), DropReason::DefaultDrop);
    world.dropped(OTHER, &tcp("10.9.0.5:1", "203.0.113.1:22", SYN, 1, 0, b""), DropReason::DefaultDrop);
    // The host asks, and is answered, also after a reload that decides its flows again.
    let own = key(UDP, "203.0.113.1:40000", "10.8.0.5:53");
    assert_eq!(world.one(HOST, &udp_of(&own, b"question")).by(), BRANCH);
    spec.rules.push(rule(RuleAction::Allow, LAN, WAN));
    world.reload(spec.clone());
    assert_eq!(world.one(BRANCH, &udp_of(&own.reversed(), b"answer")).by(), HOST);
    assert_eq!(world.one(BRANCH, &tcp_of(&request, ACK, 13, 71, b"more")).by(), HOST);
    // A rule about the host's own packets counts.
    spec.rules.insert(0, rule(RuleAction::Drop, Attachment::Gateway, OTHER));
    world.reload(spec);
    world.dropped(HOST, &udp("203.0.113.1:40001", "10.9.0.5:53", b"x"), DropReason::RuleDrop);
}

#[test]
fn pings_between_a_peer_and_the_gateway_and_errors_of_the_host() {
    let mut world = World::new(2, two_branches());
    assert_eq!(world.one(BRANCH, &echo("10.8.0.5", "203.0.113.1", 8, 1)).by(), HOST);
    assert_eq!(world.one(HOST, &echo("203.0.113.1", "10.8.0.5", 0, 1)).by(), BRANCH);
    let asked = udp("10.8.0.5:2000", "203.0.113.1:33434", b"traceroute");
    assert_eq!(world.one(BRANCH, &asked).by(), HOST);
    let error = icmp_error("203.0.113.1", "10.8.0.5".parse().unwrap(), 3, 3, &asked);
    assert_eq!(world.one(HOST, &error).by(), BRANCH);
    // About something that no core knows: the host has its reasons.
    let error = icmp_error(
        "203.0.113.1",
        "10.9.0.5".parse().unwrap(),
        3,
        3,
        &udp("10.9.0.5:7", "203.0.113.1:8", b"x"),
    );
    assert_eq!(world.one(HOST, &error).by(), OTHER);
    let strange =
        icmp_error("10.9.0.5", "10.8.0.5".parse().unwrap(), 3, 3, &udp("10.8.0.5:7", "10.9.0.5:8", b"x"));
    world.dropped(OTHER, &strange, DropReason::IcmpInvalid);
}

/// Routes of the host's own lead into the tunnel where nobody configured ours: the peer is known by its allowed-ips.
#[test]
fn the_hosts_packets_reach_peers_without_a_route() {
    let mut spec = two_branches();
    spec.routes.retain(|route| !matches!(route.egress, Egress::Bond(_)));
    spec.routes.retain(|route| route.prefix.prefix_len() > 0);
    let mut world = World::new(2, spec);
    assert_eq!(world.one(HOST, &udp("203.0.113.1:1", "10.9.0.5:53", b"x")).by(), OTHER);
    world.dropped(LAN, &udp("10.0.0.5:1", "10.9.0.5:53", b"x"), DropReason::NoRoute);
}

/// R11: two peers with the same addresses, each a tenant of its own, both behind one NAT, both answered, on any core.
#[test]
fn r11_tenants_behind_peers_may_have_equal_addresses() {
    let mut spec = with_peers(
        two_interfaces(),
        vec![peer(BRANCH_ID, "red", 1, "10.8.0.0/16"), peer(OTHER_ID, "blue", 2, "10.8.0.0/16")],
    );
    spec.tenants.extend(["red".to_owned(), "blue".to_owned()]);
    spec.nats.push(nat(NatMode::AddressAndPort, &["203.0.113.7"]));
    spec.rules = vec![RuleSpec {
        action: RuleAction::Drop,
        tenants: vec![2],
        dst_ports: vec![(25, 25)],
        ..RuleSpec::default()
    }];
    let mut world = World::new(4, spec);
    for number in 0..50u16 {
        let request = key(UDP, &format!("10.8.0.5:{}", 2_000 + number), "198.51.100.7:53");
        let outside = [BRANCH, OTHER].map(|peer| world.one(peer, &udp_of(&request, b"x")).key());
        assert_ne!(outside[0], outside[1]);
        for (peer, outside) in [BRANCH, OTHER].into_iter().zip(outside) {
            let left = world.one(WAN, &udp_of(&outside.reversed(), b"y"));
            assert_eq!((left.by(), left.key()), (peer, request.reversed()));
        }
        // To the gateway itself and back: the host knows no tenants, so only one of them at a time.
        let local = key(UDP, &format!("10.8.1.5:{}", 2_000 + number), "203.0.113.1:53");
        let peer = [BRANCH, OTHER][usize::from(number) % 2];
        assert_eq!(world.one(peer, &udp_of(&local, b"x")).by(), HOST);
        assert_eq!(world.one(HOST, &udp_of(&local.reversed(), b"y")).by(), peer);
    }
    world.one(BRANCH, &udp("10.8.0.5:1", "198.51.100.7:25", b"x"));
    world.dropped(OTHER, &udp("10.8.0.5:1", "198.51.100.7:25", b"x"), DropReason::RuleDrop);
}

/// R11: a tenant's own addresses go out as they are; answers come in as the shared tenant's packets, at any core.
#[test]
fn r11_answers_to_a_tenants_own_addresses_find_its_flow() {
    let mut spec = with_peers(two_interfaces(), vec![peer(BRANCH_ID, "red", 1, "10.8.0.0/16")]);
    spec.tenants.push("red".to_owned());
    let mut world = World::new(4, spec);
    for number in 0..100u16 {
        let request = key(UDP, &format!("10.8.0.5:{}", 2_000 + number), "198.51.100.7:53");
        assert_eq!(world.one(BRANCH, &udp_of(&request, b"x")).key(), request);
        assert_eq!(world.one(WAN, &udp_of(&request.reversed(), b"y")).by(), BRANCH);
    }
    // Nobody else reaches the tenant by it: the shared routes do not have it.
    assert_eq!(world.one(WAN, &udp("198.51.100.7:53", "10.8.0.5:1", b"z")).by(), WAN);
}

#[test]
fn a_nat_names_peers() {
    let mut spec = two_branches();
    let mut rule = nat(NatMode::AddressAndPort, &["203.0.113.7"]);
    (rule.from, rule.from_peers) = (vec!["10.0.0.0/28".parse().unwrap()], vec![OTHER_ID]);
    spec.nats.push(rule);
    let mut world = World::new(2, spec);
    let source = |world: &mut World, ingress, src: &str| {
        world.one(ingress, &udp(&format!("{src}:1"), "198.51.100.7:53", b"x")).key().src.to_string()
    };
    assert_eq!(source(&mut world, OTHER, "10.9.0.5"), "203.0.113.7");
    assert_eq!(source(&mut world, BRANCH, "10.8.0.5"), "10.8.0.5");
    assert_eq!(source(&mut world, LAN, "10.0.0.5"), "203.0.113.7");
    assert_eq!(source(&mut world, LAN, "10.0.0.77"), "10.0.0.77");
    for (ingress, src, nat) in [(OTHER, "10.9.0.5", Some(0)), (BRANCH, "10.8.0.5", None)] {
        let asked = key(UDP, &format!("{src}:1"), "198.51.100.7:53");
        let told = explain(&world.policy, &world.ownership, &asked, ingress);
        assert_eq!((told.source.rule, told.egress, told.ingress), (nat, Some(WAN.into()), ingress));
    }
}

/// Replies leave by the way the question came, though the routes say otherwise by now.
#[test]
fn replies_go_back_into_the_bond_that_asked() {
    let mut spec = two_branches();
    let mut world = World::new(2, spec.clone());
    let request = key(UDP, "10.8.0.5:2000", "198.51.100.7:53");
    world.one(BRANCH, &udp_of(&request, b"x"));
    for route in &mut spec.routes {
        if route.egress == Egress::Bond(BRANCH_ID) {
            route.egress = Egress::Bond(OTHER_ID);
        }
    }
    world.reload(spec.clone());
    assert_eq!(world.one(WAN, &udp_of(&request.reversed(), b"y")).by(), BRANCH);
    // Without that peer the routes are all there is.
    spec.peers.remove(0);
    world.reload(spec);
    assert_eq!(world.one(WAN, &udp_of(&request.reversed(), b"y")).by(), OTHER);
}

/// Two uplinks: what came in by the second leaves by it, if there is a way back.
#[test]
fn replies_leave_by_the_uplink_that_the_question_came_by() {
    let mut spec = two_interfaces();
    spec.interfaces.push(InterfaceSpec {
        name: "wan2".to_owned(),
        device: "wan2".to_owned(),
        addresses: vec!["198.18.0.1/24".parse().unwrap()],
        tenant: 0,
        mtu: 1500,
        ipv6_mtu: u16::MAX,
        link: LinkSpec::ethernet([2, 0, 0, 0, 0, 9]),
        outside: false,
        through_action: None,
        loose_tcp: false,
    });
    let default = |via: &str, to: Ingress| {
        RouteSpec::new(0, "0.0.0.0/0".parse().unwrap(), to.into(), Some(via.parse().unwrap()))
    };
    let best = spec.routes.iter().position(|route| route.prefix.to_string() == "0.0.0.0/0").unwrap();
    // The best of a prefix comes last.
    spec.routes.insert(best, default("198.18.0.254", THIRD));
    let mut world = World::new(2, spec.clone());
    let request = key(UDP, "198.51.100.7:2000", "10.0.0.5:53");
    world.one(THIRD, &udp_of(&request, b"x"));
    let left = world.one(LAN, &udp_of(&request.reversed(), b"y"));
    assert_eq!(left.outcome, Outcome::Resolve(THIRD.interface().unwrap(), "198.18.0.254".parse().unwrap()));
    // What begins inside takes the best.
    assert_eq!(world.one(LAN, &udp("10.0.0.5:1", "198.51.100.8:53", b"x")).by(), WAN);
    // Without a way back there, the best is better than none.
    spec.routes.remove(best);
    world.reload(spec);
    assert_eq!(world.one(LAN, &udp_of(&request.reversed(), b"y")).by(), WAN);
}
