//! QUIC connections whose client gets another address or port from the NAT in front of it.

use std::collections::BTreeSet;

use packet::flow::FlowKey;

use super::balancing::farm;
use super::world::*;
use crate::spec::{Affinity, DeliveryMode, NatMode, UDP};

const NOT_QUIC: &[u8] = b"";

/// A packet with a long header of version 1.
fn long(destination: &[u8], source: &[u8]) -> Vec<u8> {
    let ids = [&[destination.len() as u8], destination, &[source.len() as u8], source].concat();
    [&[0xc0, 0, 0, 0, 1], &ids[..], b"sealed"].concat()
}

fn short(destination: &[u8]) -> Vec<u8> {
    [&[0x40], destination, b"sealed"].concat()
}

fn quic_farm(source: NatMode) -> crate::spec::GatewaySpec {
    let mut spec = farm(source, DeliveryMode::Nat);
    spec.servers[0].protocol = UDP;
    spec.servers[0].affinity = Affinity::QuicConnectionId;
    spec
}

/// A connection with this id: how its backend sees it.
fn handshake(world: &mut World, client: &FlowKey, id: &[u8]) -> FlowKey {
    let inside = world.one(WAN, &udp_of(client, &long(b"original", b"c"))).key();
    world.one(LAN, &udp_of(&inside.reversed(), &long(b"c", id)));
    world.one(WAN, &udp_of(client, &long(id, b"c")));
    world.one(LAN, &udp_of(&inside.reversed(), &short(b"c")));
    inside
}

/// Row C6: whatever cores the two addresses belong to, and whatever backends see of the client.
#[test]
fn a_connection_keeps_its_backend_over_another_address() {
    for source in [NatMode::None, NatMode::PortOnly, NatMode::AddressAndPort] {
        let mut world = World::new(4, quic_farm(source));
        let mut backends = BTreeSet::new();
        for number in 0..64u16 {
            let id = [b"server".as_slice(), &number.to_be_bytes()].concat();
            let client = key(UDP, &format!("198.51.100.7:{}", 5_000 + number), "203.0.113.10:80");
            let inside = handshake(&mut world, &client, &id);
            backends.insert(inside.dst);
            let moved = key(UDP, &format!("198.51.100.9:{}", 15_000 + 3 * number), "203.0.113.10:80");
            let again = world.one(WAN, &udp_of(&moved, &short(&id))).key();
            assert_eq!(again.dst, inside.dst, "{source:?}");
            assert_eq!(world.one(LAN, &udp_of(&again.reversed(), &short(b"c"))).key(), moved.reversed());
            // The old way works as long as somebody uses it.
            assert_eq!(world.one(WAN, &udp_of(&client, &short(&id))).key(), inside);
        }
        assert!(backends.len() > 1);
        // Without a known id, and with datagrams that are none of QUIC's, the hash decides.
        let strangers = (0..64u16).map(|number| {
            let client = key(UDP, &format!("198.51.100.7:{}", 30_000 + number), "203.0.113.10:80");
            let payload = if number % 2 == 0 { short(b"unknown!") } else { NOT_QUIC.to_vec() };
            world.one(WAN, &udp_of(&client, &payload)).key().dst
        });
        assert!(strangers.collect::<BTreeSet<_>>().len() > 1);
    }
}

/// A client's word teaches nothing: only a backend's answer does, and not one that repeats the client's choice.
#[test]
fn clients_cannot_teach() {
    let mut world = World::new(1, quic_farm(NatMode::AddressAndPort));
    let id = b"victim01".as_slice();
    let client = key(UDP, "198.51.100.7:5000", "203.0.113.10:80");
    let inside = world.one(WAN, &udp_of(&client, &long(id, id))).key();
    let mut negotiation = long(id, id);
    negotiation[1..5].fill(0);
    world.one(LAN, &udp_of(&inside.reversed(), &negotiation));
    let others = (0..32u16).map(|number| {
        let other = key(UDP, &format!("198.51.100.7:{}", 6_000 + number), "203.0.113.10:80");
        world.one(WAN, &udp_of(&other, &short(id))).key().dst
    });
    assert!(others.collect::<BTreeSet<_>>().len() > 1);
}

#[test]
fn a_draining_backend_keeps_its_connections_and_a_dead_one_does_not() {
    let mut world = World::new(1, quic_farm(NatMode::AddressAndPort));
    let id = b"serverid".as_slice();
    let client = key(UDP, "198.51.100.7:5000", "203.0.113.10:80");
    let inside = handshake(&mut world, &client, id);
    let backend = world.policy.balancer.backends().find(|it| it.address.ip() == inside.dst).unwrap().id;
    world.policy.balancer.drain(backend, true);
    let moved = key(UDP, "198.51.100.7:5001", "203.0.113.10:80");
    assert_eq!(world.one(WAN, &udp_of(&moved, &short(id))).key().dst, inside.dst);
    world.policy.balancer.set_health(backend, false, world.now_ns);
    let moved = key(UDP, "198.51.100.7:5002", "203.0.113.10:80");
    assert_ne!(world.one(WAN, &udp_of(&moved, &short(id))).key().dst, inside.dst);
}
