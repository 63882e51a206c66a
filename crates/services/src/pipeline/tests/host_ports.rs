//! Programs of the host that send from ports which translated flows have.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::world::*;
use crate::pipeline::{Outcome, PortCounts};
use crate::spec::{GatewaySpec, Mapping, NatMode, RuleAction, RuleSpec, SideSpec, TCP, UDP};

const HERE: &str = "203.0.113.1";

fn router() -> GatewaySpec {
    let mut spec = native(two_interfaces());
    spec.default_action = RuleAction::Drop;
    spec.nats.push(nat(NatMode::AddressAndPort, &[HERE]));
    spec.rules.push(RuleSpec {
        action: RuleAction::Allow,
        from: SideSpec { attachments: vec![LAN.into()], ..SideSpec::default() },
        ..RuleSpec::default()
    });
    spec
}

/// A world of two cores that counts.
fn counting(spec: GatewaySpec) -> (World, Arc<Vec<AtomicU32>>) {
    let counts: Arc<Vec<AtomicU32>> = Arc::new((0..1 << 16).map(|_| AtomicU32::new(0)).collect());
    let mut world = World::new(2, spec);
    for core in &mut world.cores {
        core.set_port_counts(PortCounts::new(Arc::clone(&counts) as _));
    }
    (world, counts)
}

fn count(counts: &[AtomicU32], port: u16) -> u32 {
    counts[usize::from(port)].load(Ordering::Relaxed)
}

/// A packet of the host from a flow's port to the flow's server gets another port, and the answers come to the program by the device; the
/// flow's client gets its own. To anybody else the host's packets leave as they are.
#[test]
fn the_host_gets_another_port_where_a_flow_has_its_own() {
    for protocol in [UDP, TCP] {
        let (mut world, counts) = counting(router());
        let packet = |key: &packet::FlowKey, flags, seq, ack| match protocol {
            UDP => udp_of(key, b"x"),
            _ => tcp_of(key, flags, seq, ack, b""),
        };
        let asks = key(protocol, "10.0.0.5:5000", "198.51.100.7:53");
        let outside = world.one(LAN, &packet(&asks, SYN, 100, 0)).key();
        assert_eq!(count(&counts, outside.src_port), 1);
        let own = outside.with_destination("198.51.100.8".parse().unwrap(), 53);
        let left = world.one(HOST, &packet(&own, SYN, 700, 0));
        assert_eq!((left.key(), left.by()), (own, WAN), "to another server");
        assert_eq!(world.one(WAN, &packet(&own.reversed(), SYN | ACK, 1, 701)).by(), HOST);
        assert_eq!(world.flows(), 1);

        let left = world.one(HOST, &packet(&outside, SYN, 700, 0)).key();
        assert_eq!((left.src, left.dst, left.dst_port), (outside.src, outside.dst, outside.dst_port));
        assert_ne!(left.src_port, outside.src_port);
        assert_eq!((count(&counts, outside.src_port), count(&counts, left.src_port)), (2, 1));
        let answer = world.one(WAN, &packet(&left.reversed(), SYN | ACK, 900, 701));
        assert_eq!((answer.key(), answer.outcome), (outside.reversed(), Outcome::DeviceIngress(WAN_ID)));
        assert_eq!(world.one(HOST, &packet(&outside, ACK, 701, 901)).key(), left);
        let answer = world.one(WAN, &packet(&outside.reversed(), SYN | ACK, 300, 101));
        assert_eq!((answer.key(), answer.by()), (asks.reversed(), LAN));

        let waits = if protocol == TCP { 7_500 } else { 200 };
        world.wait(waits);
        assert_eq!(world.flows(), 0);
        assert_eq!((count(&counts, outside.src_port), count(&counts, left.src_port)), (0, 0));
    }
}

/// A connection of the host that is there already keeps its port.
#[test]
fn a_connection_of_the_host_keeps_its_port() {
    let (mut world, _) = counting(router());
    let asks = key(TCP, "10.0.0.5:5000", "198.51.100.7:80");
    let outside = world.one(LAN, &tcp_of(&asks, SYN, 100, 0, b"")).key();
    let left = world.one(HOST, &tcp_of(&outside, ACK, 700, 30, b"x"));
    assert_eq!((left.key(), left.by(), world.flows()), (outside, WAN, 1));
}

/// To a mapping of an endpoint anybody may send: a datagram of the host from its port gets another one, whoever it is for.
#[test]
fn the_host_is_no_mapping() {
    let mut spec = router();
    spec.nats[0].mapping = Mapping::EndpointIndependent;
    let (mut world, _) = counting(spec);
    let outside = world.one(LAN, &udp_of(&key(UDP, "10.0.0.5:5000", "198.51.100.7:53"), b"x")).key();
    let own = outside.with_destination("198.51.100.8".parse().unwrap(), 53);
    let left = world.one(HOST, &udp_of(&own, b"x")).key();
    assert_ne!(left.src_port, own.src_port);
    assert_eq!(world.one(WAN, &udp_of(&left.reversed(), b"y")).key(), own.reversed());
}
