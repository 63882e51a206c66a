//! Endpoint-independent mappings beside everything else that a gateway does, on several cores.

use std::net::IpAddr;

use super::balancing::farm;
use super::world::*;
use crate::spec::{
    DeliveryMode, ForwardSpec, GatewaySpec, Mapping, NatMode, PortId, RuleSpec, SideSpec, TCP, UDP,
};

/// Outside address of all mappings: the gateway's own, as of a home router.
const OUTSIDE: &str = "203.0.113.1";

/// The home router with endpoint-independent mappings.
fn independent() -> GatewaySpec {
    let mut spec = two_interfaces();
    let mut rule = nat(NatMode::AddressAndPort, &[OUTSIDE]);
    rule.mapping = Mapping::EndpointIndependent;
    spec.nats.push(rule);
    spec
}

/// … with a forward, a virtual server that keeps its clients' source, and a host that is reached at its inside address.
fn with_services() -> GatewaySpec {
    let mut spec = independent();
    spec.servers = farm(NatMode::None, DeliveryMode::Nat).servers;
    spec.forwards.push(ForwardSpec {
        protocol: TCP,
        listen: "203.0.113.1:8080".parse().unwrap(),
        to: "10.0.0.11:80".parse().unwrap(),
        tenant: 0,
        proxy_protocol: false,
    });
    let to = SideSpec { prefixes: vec!["10.0.0.6/32".parse().unwrap()], ..SideSpec::default() };
    spec.rules.push(RuleSpec { name: "routed".to_owned(), to, ..RuleSpec::default() });
    spec
}

/// A packet that some core reads, the one that the kernel chooses or any; exactly one leaves. The list of cores to visit
/// is sound: none twice, and the last is the only one that may begin a flow.
fn one_at(world: &mut World, reader: Option<u64>, port: PortId, packet: &[u8]) -> Left {
    let key = packet::FlowKey::of(packet).unwrap();
    let stops = world.steering.stops(&world.policy, &key, 0, port);
    let mut cores = stops.cores().to_vec();
    assert_eq!(cores.last(), Some(&stops.creator), "{key}");
    cores.sort_unstable();
    cores.dedup();
    assert_eq!(cores.len(), stops.cores().len(), "{key}: a core twice");
    let before = world.drops();
    let mut left = match reader {
        None => world.packet(port, packet),
        Some(random) => world.packet_at((random % world.cores.len() as u64) as usize, port, packet),
    };
    assert_eq!(left.len(), 1, "{key} dropped for {:?}", world.new_drops(&before));
    left.remove(0)
}

/// Of many clients of services, of routed hosts and of mapped ones every reply arrives, whoever reads it, and no flow is
/// there twice.
#[test]
fn services_work_beside_mappings_on_any_number_of_cores() {
    for (cores, by_hash) in [(1, true), (2, true), (3, true), (4, true), (2, false), (4, false)] {
        let mut world = World::new(cores, with_services());
        let mut begun = 0;
        for number in 0..250u16 {
            let reader = |packet: u64| (!by_hash).then(|| mix(u64::from(number) << 3 | packet));
            for (target, kind) in [("203.0.113.1:8080", 0), ("203.0.113.10:80", 1), ("10.0.0.6:443", 2)] {
                // Two services may share a backend: their clients then have to differ.
                let request = key(TCP, &format!("198.51.100.{}:{}", 7 + kind, 2_000 + number), target);
                let inside = one_at(&mut world, reader(kind), WAN, &tcp_of(&request, SYN, 1, 0, b""));
                assert_eq!((inside.port(), inside.key().src_port), (LAN, request.src_port));
                let answer = tcp_of(&inside.key().reversed(), SYN | ACK, 7, 2, b"");
                let reply = one_at(&mut world, reader(kind + 3), LAN, &answer);
                assert_eq!((reply.port(), reply.key()), (WAN, request.reversed()), "{cores} cores");
                begun += 1;
                assert_eq!(world.flows(), begun);
            }
            let flow = key(UDP, &format!("10.0.0.9:{}", 3_000 + number), "198.51.100.7:53");
            let outside = one_at(&mut world, reader(6), LAN, &udp_of(&flow, b"x")).key();
            assert_eq!(outside.src, OUTSIDE.parse::<IpAddr>().unwrap());
            let reply = one_at(&mut world, reader(7), WAN, &udp_of(&outside.reversed(), b"y"));
            assert_eq!((reply.port(), reply.key()), (LAN, flow.reversed()));
            begun += 1;
            assert_eq!(world.flows(), begun, "{cores} cores");
        }
        // What a backend begins itself is mapped like anybody's.
        let own = one_at(&mut world, None, LAN, &tcp("10.0.0.11:80", "198.51.100.99:443", SYN, 1, 0, b""));
        assert_eq!(own.key().src, OUTSIDE.parse::<IpAddr>().unwrap());
    }
}

/// An inside client in a network of its own dials a virtual server's address, which lies in the outside network.
#[test]
fn a_server_with_its_source_kept_is_reached_from_inside() {
    let mut spec = with_services();
    let mut guests = spec.interfaces[0].clone();
    guests.name = "guests".to_owned();
    guests.addresses = vec!["10.9.0.1/24".parse().unwrap()];
    spec.interfaces.push(guests);
    let mut route = spec.routes[0].clone();
    (route.prefix, route.port) = ("10.9.0.0/24".parse().unwrap(), 2);
    spec.routes.push(route);
    for cores in 1..=4 {
        let mut world = World::new(cores, spec.clone());
        for number in 0..200u16 {
            let request = key(TCP, &format!("10.9.0.7:{}", 2_000 + number), "203.0.113.10:80");
            let inside = one_at(&mut world, None, 2, &tcp_of(&request, SYN, 1, 0, b"")).key();
            assert_eq!((inside.src, inside.src_port), (request.src, request.src_port));
            let reply = one_at(&mut world, None, LAN, &tcp_of(&inside.reversed(), SYN | ACK, 7, 2, b""));
            assert_eq!((reply.port(), reply.key()), (2, request.reversed()), "{cores} cores");
        }
    }
}
