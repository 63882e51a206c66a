//! Programs of the host that send from ports which translated flows have.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use packet::DropReason;

use super::world::*;
use crate::held_ports::{HeldPort, HeldPorts};
use crate::pipeline::{Outcome, PortCounts};
use crate::spec::{
    GatewaySpec, HostTunnel, Mapping, NatMode, RuleAction, RuleSpec, SealedSpec, SideSpec, TCP, UDP,
};

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

/// Endpoints of one test: version, protocol, and whether a program's socket is on the address or on all.
struct Case {
    protocol: u8,
    here: &'static str,
    client: &'static str,
    remote: &'static str,
    local: &'static str,
}

const CASES: [Case; 6] = [
    Case { protocol: UDP, here: HERE, client: "10.0.0.5", remote: "198.51.100.7", local: "0.0.0.0" },
    Case { protocol: UDP, here: HERE, client: "10.0.0.5", remote: "198.51.100.7", local: HERE },
    Case { protocol: TCP, here: HERE, client: "10.0.0.5", remote: "198.51.100.7", local: "0.0.0.0" },
    Case { protocol: UDP, here: "2001:db8::1", client: "[fd00::5]", remote: "[2001:db8:7::7]", local: "::" },
    Case { protocol: TCP, here: "2001:db8::1", client: "[fd00::5]", remote: "[2001:db8:7::7]", local: "::" },
    Case {
        protocol: TCP,
        here: "2001:db8::1",
        client: "[fd00::5]",
        remote: "[2001:db8:7::7]",
        local: "2001:db8::1",
    },
];

impl Case {
    /// A router with endpoint-independent mappings of 64 ports, which anybody may send to.
    fn spec(&self) -> GatewaySpec {
        let mut spec = router();
        spec.nats[0] = nat(NatMode::AddressAndPort, &[self.here]);
        spec.nats[0].mapping = Mapping::EndpointIndependent;
        spec.nats[0].ports = (20_480, 20_543);
        spec.rules.push(RuleSpec { action: RuleAction::Allow, ..RuleSpec::default() });
        spec
    }

    /// A packet that begins something.
    fn begins(&self, key: &packet::FlowKey) -> Vec<u8> {
        if self.protocol == UDP { udp_of(key, b"x") } else { tcp_of(key, SYN, 100, 0, b"") }
    }

    fn answers(&self, key: &packet::FlowKey) -> Vec<u8> {
        if self.protocol == UDP { udp_of(key, b"y") } else { tcp_of(key, SYN | ACK, 300, 101, b"") }
    }

    fn asks(&self, port: u16) -> packet::FlowKey {
        key(self.protocol, &format!("{}:{port}", self.client), &format!("{}:53", self.remote))
    }

    fn held(&self, port: u16) -> HeldPorts {
        HeldPorts::new([HeldPort { protocol: self.protocol, port, address: self.local.parse().unwrap() }])
    }

    /// As the policy has it, once the port was held for a while.
    fn spec_with(&self, port: u16) -> GatewaySpec {
        let mut spec = self.spec();
        spec.host.held_ports = Arc::new(self.held(port));
        spec.nats[0].reserved = vec![(port, port)];
        spec
    }
}

/// From the moment that a program opens a port no client gets it.
#[test]
fn a_port_that_was_just_opened_is_not_given_out() {
    for case in CASES {
        for mapping in [Mapping::EndpointIndependent, Mapping::EndpointDependent] {
            let mut spec = case.spec();
            spec.nats[0].mapping = mapping;
            let (mut world, _) = counting(spec);
            world.open_ports(case.held(20_500));
            let mut ports: Vec<u16> = Vec::new();
            for port in 5_000..5_200 {
                let left = world.packet(LAN, &case.begins(&case.asks(port)));
                ports.extend(
                    left.iter().map(Left::key).filter(|key| key.src_port > 20_000).map(|key| key.src_port),
                );
            }
            ports.sort_unstable();
            ports.dedup();
            assert!(ports.len() > 40 && !ports.contains(&20_500), "{mapping:?} {ports:?}");
        }
    }
}

/// A program opens the port of a mapping: strangers reach the program at once, and its answers keep the port. The client keeps what it
/// has for a moment, as the program may be a resolver; then its datagrams leave from another port, and what comes to the old one is
/// the host's.
#[test]
fn a_mapping_leaves_a_port_that_the_host_opens() {
    for case in CASES {
        let (mut world, _) = counting(case.spec());
        let asks = case.asks(5_000);
        let outside = world.one(LAN, &case.begins(&asks)).key();
        let answer = case.answers(&outside.reversed());
        assert_eq!(world.one(WAN, &answer).key(), asks.reversed());
        let stranger = key(case.protocol, &format!("{}:7001", case.remote), "10.9.9.9:1");
        let stranger = packet::FlowKey { dst: outside.src, dst_port: outside.src_port, ..stranger };
        let known = packet::FlowKey { src_port: 7_000, ..stranger };
        assert_eq!(world.one(WAN, &case.begins(&known)).by(), LAN, "nobody else has the port");

        world.open_ports(case.held(outside.src_port));
        let came = world.one(WAN, &case.begins(&stranger));
        assert_eq!((came.key(), came.outcome), (stranger, Outcome::DeviceIngress(WAN_ID)));
        let left = world.one(HOST, &case.answers(&stranger.reversed()));
        assert_eq!((left.key(), left.by()), (stranger.reversed(), WAN));
        assert_eq!(world.one(WAN, &answer).key(), asks.reversed(), "the client goes on");

        world.reload(case.spec_with(outside.src_port));
        world.open_ports(HeldPorts::default());
        let came = world.one(WAN, &case.begins(&stranger));
        assert_eq!(came.outcome, Outcome::DeviceIngress(WAN_ID));
        let anew = packet::FlowKey { dst_port: 54, ..asks };
        let moved = world.one(LAN, &case.begins(&anew)).key();
        assert_ne!(moved.src_port, outside.src_port, "a new flow of the same endpoint");
        if case.protocol == TCP {
            let goes_on = tcp_of(&asks, ACK, 101, 301, b"z");
            assert_eq!(world.one(LAN, &goes_on).key(), outside, "a connection keeps its port");
            continue;
        }
        assert_eq!(world.one(LAN, &case.begins(&asks)).key().src_port, moved.src_port, "one port for all");
        assert_eq!(world.one(WAN, &case.begins(&known)).outcome, Outcome::DeviceIngress(WAN_ID));
        let to_new = stranger.with_destination(moved.src, moved.src_port);
        assert_eq!(world.one(WAN, &case.begins(&to_new)).key().dst_port, asks.src_port);
    }
}

/// Sockets of another protocol, of another address and of the loopback interface take nothing from anybody.
#[test]
fn a_socket_elsewhere_does_not_take_a_mapping() {
    let case = &CASES[0];
    let (mut world, _) = counting(case.spec());
    let asks = case.asks(5_000);
    let outside = world.one(LAN, &case.begins(&asks)).key();
    let port = outside.src_port;
    let held = |protocol, address: &str| HeldPort { protocol, port, address: address.parse().unwrap() };
    world.open_ports(HeldPorts::new([held(TCP, "0.0.0.0"), held(UDP, "10.0.0.1"), held(UDP, "::")]));
    let stranger = key(UDP, "198.51.100.9:7001", &format!("{HERE}:{port}"));
    assert_eq!(world.one(WAN, &case.begins(&stranger)).by(), LAN);
}

fn esp(src: &str, dst: &str) -> Vec<u8> {
    ip(src.parse().unwrap(), dst.parse().unwrap(), 50, b"sealed by who knows")
}

/// A tunnel of the host by a protocol without ports keeps its answers, whoever inside speaks to its other end.
#[test]
fn a_tunnel_of_the_host_is_nobodys_flow() {
    let other = "198.51.100.7";
    let (from_lan, answer) = (esp("10.0.0.5", other), esp(other, HERE));
    let mut spec = router();
    let mut world = World::new(2, spec.clone());
    assert_eq!(world.one(LAN, &from_lan).key().src.to_string(), HERE);
    assert_eq!(world.one(WAN, &answer).by(), LAN);
    // It comes when a flow is there already.
    let tunnel = |local: Option<&str>, remote: Option<&str>| HostTunnel {
        protocol: 50,
        local: local.map(|text| text.parse().unwrap()),
        remote: remote.map(|text| text.parse().unwrap()),
    };
    spec.host.tunnels = vec![tunnel(Some(HERE), Some(other))];
    world.reload(spec.clone());
    world.dropped(WAN, &answer, DropReason::NatGone);
    assert_eq!(world.one(WAN, &answer).outcome, Outcome::DeviceIngress(WAN_ID));
    for ends in [(Some(HERE), Some(other)), (None, Some(other)), (Some(HERE), None)] {
        spec.host.tunnels = vec![tunnel(ends.0, ends.1)];
        let mut world = World::new(2, spec.clone());
        world.dropped(LAN, &from_lan, DropReason::NatUnsupported);
        assert_eq!(world.one(WAN, &answer).outcome, Outcome::DeviceIngress(WAN_ID));
        let gre = ip("10.0.0.5".parse().unwrap(), other.parse().unwrap(), 47, b"another protocol");
        assert_eq!(world.one(LAN, &gre).by(), WAN);
    }
    spec.host.tunnels =
        vec![tunnel(Some("203.0.113.9"), Some(other)), tunnel(Some(HERE), Some("198.51.100.8"))];
    let mut world = World::new(2, spec);
    assert_eq!(world.one(LAN, &from_lan).by(), WAN, "neither from here nor to there");
}

/// A packet that the kernel would seal, with the source that it is given, does not leave in the clear.
#[test]
fn what_is_sealed_by_its_outside_address_does_not_leave() {
    let mut spec = router();
    let policy = |to: &str, seals: bool| SealedSpec {
        from: "203.0.113.0/28".parse().unwrap(),
        to: to.parse().unwrap(),
        protocol: None,
        src_ports: None,
        dst_ports: None,
        seals,
    };
    let (asks, other, sealed) = (
        udp("10.0.0.5:5000", "192.0.2.9:53", b"x"),
        udp("10.0.0.5:5000", "192.0.2.77:53", b"x"),
        udp("10.0.0.5:5000", "192.0.2.200:53", b"x"),
    );
    let mut world = World::new(2, spec.clone());
    assert_eq!(world.one(LAN, &sealed).by(), WAN);
    spec.host.sealed = vec![policy("192.0.2.64/26", false), policy("192.0.2.0/24", true)];
    world.reload(spec.clone());
    world.dropped(LAN, &sealed, DropReason::NatUnsupported);
    world.dropped(LAN, &asks, DropReason::NatUnsupported);
    assert_eq!(world.one(LAN, &other).by(), WAN);
    assert_eq!(world.flows(), 1);
    assert_eq!(
        world.cores.iter().map(|core| core.ports_held()).sum::<u64>(),
        1,
        "their ports are free again"
    );
}
