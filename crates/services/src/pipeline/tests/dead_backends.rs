//! Flows whose backend goes down: UDP and openings move, live connections are reset with numbers that both ends accept.

use std::net::IpAddr;

use packet::flow::FlowKey;
use packet::ip::IpHeader;

use super::balancing::farm;
use super::world::*;
use crate::spec::{DeliveryMode, NatMode, ResetOnDown, TCP, UDP};
use crate::tcp::Segment;

fn kill(world: &World, address: IpAddr, silent: bool) {
    let id = world.policy.balancer.backends().find(|it| it.address.ip() == address).unwrap().id;
    world.policy.balancer.set_silent(id, silent);
    world.policy.balancer.set_health(id, false, world.now_ns);
}

fn segment(left: &Left) -> (FlowKey, u8, u32) {
    let header = IpHeader::parse(&left.packet).unwrap();
    let segment = Segment::of(header.payload(&left.packet)).unwrap();
    (left.key(), segment.flags, segment.seq)
}

/// The handshake of a connection and 5 bytes from the client, 3 from the backend: `inside` is how the backend sees it.
fn connect(world: &mut World, client: &FlowKey) -> FlowKey {
    let inside = world.one(WAN, &tcp_of(client, SYN, 1_000, 0, b"")).key();
    world.one(LAN, &tcp_of(&inside.reversed(), SYN | ACK, 7_000, 1_001, b""));
    world.packet(WAN, &tcp_of(client, ACK, 1_001, 7_001, b""));
    world.packet(WAN, &tcp_of(client, ACK, 1_001, 7_001, b"hello"));
    inside
}

#[test]
fn udp_moves_with_its_next_datagram() {
    for source in [NatMode::None, NatMode::PortOnly, NatMode::AddressAndPort] {
        let mut spec = farm(source, DeliveryMode::Nat);
        spec.servers[0].protocol = UDP;
        // However it died, and whatever happens to TCP.
        spec.servers[0].reset_on_down = ResetOnDown::Never;
        let mut world = World::new(2, spec);
        let client = key(UDP, "198.51.100.7:5000", "203.0.113.10:80");
        let inside = world.one(WAN, &udp_of(&client, b"1")).key();
        world.one(LAN, &udp_of(&inside.reversed(), b"2"));
        assert!(world.end_dead().is_empty());
        assert_eq!(world.one(WAN, &udp_of(&client, b"3")).key().dst, inside.dst, "it lives");
        kill(&world, inside.dst, false);
        assert!(world.end_dead().is_empty(), "nobody is told");
        assert_eq!(world.flows(), 0);
        let moved = world.one(WAN, &udp_of(&client, b"4")).key();
        assert_ne!(moved.dst, inside.dst, "{source:?}");
        assert_eq!(world.one(LAN, &udp_of(&moved.reversed(), b"5")).key(), client.reversed());
    }
}

#[test]
fn live_connections_are_reset_at_both_ends_with_the_next_numbers() {
    for source in [NatMode::None, NatMode::PortOnly, NatMode::AddressAndPort] {
        let mut world = World::new(2, farm(source, DeliveryMode::Nat));
        let client = key(TCP, "198.51.100.7:5000", "203.0.113.10:80");
        let inside = connect(&mut world, &client);
        world.one(LAN, &tcp_of(&inside.reversed(), ACK, 7_001, 1_006, b"abc"));
        kill(&world, inside.dst, true);
        let told: Vec<_> = world.end_dead().iter().map(segment).collect();
        assert_eq!(told, [(client.reversed(), RST, 7_004), (inside, RST, 1_006)], "{source:?}");
        assert_eq!(world.flows(), 0);
        let live: u32 = world.policy.balancer.status()[0].backends.iter().map(|it| it.live).sum();
        assert_eq!(live, 0);
        // Of a client that lacks the three bytes the reset is a question: it answers with what it waits for.
        let answer = world.one(WAN, &tcp_of(&client, ACK, 1_006, 7_001, b""));
        assert_eq!(segment(&answer), (client.reversed(), RST, 7_001));
        // A new connection between the same ports goes to a live one.
        let next = world.one(WAN, &tcp_of(&client, SYN, 50_000, 0, b"")).key();
        assert_ne!(next.dst, inside.dst);
    }
}

#[test]
fn connections_that_are_being_opened_move() {
    // Whatever happens to live ones.
    for reset in [ResetOnDown::Silent, ResetOnDown::Never] {
        let mut spec = farm(NatMode::AddressAndPort, DeliveryMode::Nat);
        spec.servers[0].reset_on_down = reset;
        let mut world = World::new(2, spec);
        let client = key(TCP, "198.51.100.7:5000", "203.0.113.10:80");
        let syn = tcp_of(&client, SYN, 1_000, 0, b"");
        let inside = world.one(WAN, &syn).key();
        assert_eq!(world.one(WAN, &syn).key(), inside, "sent again");
        kill(&world, inside.dst, false);
        let told: Vec<_> = world.end_dead().iter().map(segment).collect();
        assert_eq!(told, [(inside, RST, 1_001)], "the client waits for an answer still");
        assert_ne!(world.one(WAN, &syn).key().dst, inside.dst);
    }
}

/// A client may or may not have the SYN-ACK: the RST has no ACK, so that one that has it not ignores it and tries again.
#[test]
fn a_handshake_without_its_end_is_reset_without_refusing_the_client() {
    let mut world = World::new(2, farm(NatMode::None, DeliveryMode::Nat));
    let client = key(TCP, "198.51.100.7:5000", "203.0.113.10:80");
    let inside = world.one(WAN, &tcp_of(&client, SYN, 1_000, 0, b"")).key();
    world.one(LAN, &tcp_of(&inside.reversed(), SYN | ACK, 7_000, 1_001, b""));
    kill(&world, inside.dst, false);
    let told: Vec<_> = world.end_dead().iter().map(segment).collect();
    assert_eq!(told, [(client.reversed(), RST, 7_001), (inside, RST, 1_001)]);
}

#[test]
fn what_becomes_of_live_connections_is_an_option() {
    let cases = [
        (ResetOnDown::Silent, false, false),
        (ResetOnDown::Silent, true, true),
        (ResetOnDown::Always, false, true),
        (ResetOnDown::Never, true, false),
    ];
    for (option, silent, reset) in cases {
        let mut spec = farm(NatMode::None, DeliveryMode::Nat);
        spec.servers[0].reset_on_down = option;
        let mut world = World::new(2, spec);
        let client = key(TCP, "198.51.100.7:5000", "203.0.113.10:80");
        let inside = connect(&mut world, &client);
        kill(&world, inside.dst, silent);
        assert_eq!(world.end_dead().len(), if reset { 2 } else { 0 }, "{option:?} {silent}");
        let goes_on = world.packet(WAN, &tcp_of(&client, ACK, 1_006, 7_001, b"x"));
        assert_eq!(goes_on[0].key(), if reset { client.reversed() } else { inside });
    }
    // One that was refused first and is silent later.
    let mut world = World::new(2, farm(NatMode::None, DeliveryMode::Nat));
    let client = key(TCP, "198.51.100.7:5000", "203.0.113.10:80");
    let inside = connect(&mut world, &client);
    kill(&world, inside.dst, false);
    assert!(world.end_dead().is_empty());
    kill(&world, inside.dst, true);
    assert_eq!(world.end_dead().len(), 2);
}

/// A backend that drains keeps its connections for its time; then they end as those of a dead one, whatever
/// `reset_on_down` says.
#[test]
fn what_drained_long_enough_is_reset_at_both_ends() {
    let mut spec = farm(NatMode::AddressAndPort, DeliveryMode::Nat);
    spec.servers[0].reset_on_down = ResetOnDown::Never;
    spec.servers[0].backends.iter_mut().for_each(|backend| backend.drain_s = 30);
    let mut world = World::new(2, spec);
    let client = key(TCP, "198.51.100.7:5000", "203.0.113.10:80");
    let inside = connect(&mut world, &client);
    let id = world.policy.balancer.backends().find(|it| it.address.ip() == inside.dst).unwrap().id;
    world.policy.balancer.drain(id, true);
    let begun = world.now_ns;
    world.policy.balancer.tick(begun);
    world.policy.balancer.tick(begun + 29_999_999_999);
    assert!(world.end_dead().is_empty());
    assert_eq!(world.one(WAN, &tcp_of(&client, ACK, 1_006, 7_001, b"x")).key(), inside);
    world.policy.balancer.tick(begun + 30_000_000_000);
    let told: Vec<_> = world.end_dead().iter().map(segment).collect();
    assert_eq!(told, [(client.reversed(), RST, 7_001), (inside, RST, 1_007)]);
    assert_eq!(world.flows(), 0);
}

#[test]
fn others_are_not_touched_and_many_are_found() {
    let mut world = World::new(4, farm(NatMode::AddressAndPort, DeliveryMode::Nat));
    let clients: Vec<FlowKey> =
        (2_000..6_000u16).map(|port| key(TCP, &format!("198.51.100.7:{port}"), "203.0.113.10:80")).collect();
    let flows: Vec<(FlowKey, FlowKey)> =
        clients.iter().map(|client| (*client, connect(&mut world, client))).collect();
    let dead = flows[0].1.dst;
    kill(&world, dead, true);
    let told = world.end_dead();
    let hit = flows.iter().filter(|(_, inside)| inside.dst == dead).count();
    assert_eq!(told.len(), 2 * hit);
    assert_eq!(world.flows(), flows.len() - hit);
    assert!(world.end_dead().is_empty(), "once");
    for (client, inside) in flows.iter().filter(|(_, inside)| inside.dst != dead) {
        assert_eq!(world.one(WAN, &tcp_of(client, ACK, 1_006, 7_001, b"x")).key(), *inside);
    }
}

/// The number that the server knows is the client's and the header.
#[test]
fn behind_a_proxy_header_the_server_gets_its_own_number() {
    let mut spec = farm(NatMode::None, DeliveryMode::Nat);
    spec.servers[0].proxy_protocol = true;
    let mut world = World::new(1, spec);
    let client = key(TCP, "198.51.100.7:5000", "203.0.113.10:80");
    let inside = connect(&mut world, &client);
    world.one(LAN, &tcp_of(&inside.reversed(), ACK, 7_001, 1_006 + 28, b"abc"));
    kill(&world, inside.dst, true);
    let told: Vec<_> = world.end_dead().iter().map(segment).collect();
    assert_eq!(told, [(client.reversed(), RST, 7_004), (inside, RST, 1_006 + 28)]);
}

/// With direct return only the client's packets come by: its last acknowledgment tells what the backend has sent.
#[test]
fn with_direct_return_the_client_is_reset_by_what_it_acknowledged() {
    let mut world = World::new(1, farm(NatMode::None, DeliveryMode::DirectReturn));
    let client = key(TCP, "198.51.100.7:5000", "203.0.113.10:80");
    let to = |left: &Left| match left.outcome {
        crate::pipeline::Outcome::Resolve(LAN_ID, next_hop) => next_hop,
        other => panic!("{other:?}"),
    };
    let backend = to(&world.one(WAN, &tcp_of(&client, SYN, 1_000, 0, b"")));
    world.one(WAN, &tcp_of(&client, ACK, 1_001, 7_001, b"hello"));
    world.one(WAN, &tcp_of(&client, ACK, 1_006, 7_301, b""));
    kill(&world, backend, true);
    let told = world.end_dead();
    assert_eq!(
        told.iter().map(segment).collect::<Vec<_>>(),
        [(client.reversed(), RST, 7_301), (client, RST, 1_006)]
    );
    assert_eq!(to(&told[1]), backend);
}
