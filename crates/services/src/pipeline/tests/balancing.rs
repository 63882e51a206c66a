//! Virtual servers (row C6) and what their modes mean for cores.

use std::collections::BTreeMap;
use std::net::IpAddr;

use packet::attachment::Egress;
use packet::{DropReason, FlowKey};

use super::world::*;
use crate::pipeline::Outcome;
use crate::spec::{
    Affinity, BackendSpec, BalanceMethod, DeliveryMode, GatewaySpec, InnerSpec, NatMode, ResetOnDown,
    RouteSpec, RuleAction, RuleSpec, ServerSpec, SideSpec, TCP,
};

pub fn farm(source: NatMode, delivery: DeliveryMode) -> GatewaySpec {
    let mut spec = two_interfaces();
    let backend = |last: u8| BackendSpec {
        address: format!("10.0.0.{last}:80").parse().unwrap(),
        weight: 1,
        connections_max: 0,
        drain_s: 0,
    };
    spec.servers.push(ServerSpec {
        name: "web".to_owned(),
        protocol: TCP,
        listen: "203.0.113.10:80".parse().unwrap(),
        backends: (11..=13).map(backend).collect(),
        method: BalanceMethod::Maglev,
        delivery,
        source,
        source_addresses: Vec::new(),
        connections_max: 0,
        slow_start_s: 0,
        proxy_protocol: false,
        reset_on_down: ResetOnDown::default(),
        affinity: Affinity::default(),
    });
    spec
}

#[test]
fn connections_spread_over_backends_and_come_back() {
    for (source, translated) in
        [(NatMode::None, false), (NatMode::PortOnly, true), (NatMode::AddressAndPort, true)]
    {
        let mut world = World::new(4, farm(source, DeliveryMode::Nat));
        let mut shares: BTreeMap<IpAddr, u32> = BTreeMap::new();
        let mut demanded = 0;
        for port in 2_000..2_600u16 {
            let client = format!("198.51.100.7:{port}");
            let request = key(TCP, &client, "203.0.113.10:80");
            let inside = world.one(WAN, &tcp_of(&request, SYN, 1, 0, b"")).key();
            *shares.entry(inside.dst).or_default() += 1;
            let owner = |key, tenant| world.ownership.table.owner(world.ownership.bucket(key, tenant));
            demanded += u64::from(owner(&request, 0) != owner(&inside.reversed(), 0));
            match source {
                NatMode::None => assert_eq!((inside.src, inside.src_port), (request.src, port)),
                NatMode::PortOnly => assert_eq!(inside.src, request.src),
                NatMode::AddressAndPort => assert_eq!(inside.src, "10.0.0.1".parse::<IpAddr>().unwrap()),
            }
            let reply = world.one(LAN, &tcp_of(&inside.reversed(), SYN | ACK, 7, 2, b""));
            assert_eq!(reply.key(), request.reversed());
        }
        assert_eq!(shares.len(), 3);
        assert!(shares.values().all(|share| *share > 120), "{shares:?}");
        let handed = world.total(|counters| counters.handed_out);
        assert_eq!(handed, demanded, "{source:?}: exactly what the hash demands");
        assert_eq!(handed == 0, translated, "C2 and C3 choose the port so that nothing is handed over");
        assert_eq!(world.total(|counters| counters.replies_on_wrong_core), 0);
    }
}

#[test]
fn a_backend_that_is_down_gets_nothing_new() {
    let mut world = World::new(2, farm(NatMode::None, DeliveryMode::Nat));
    let id = world.policy.balancer.backends().next().unwrap().id;
    world.policy.balancer.set_health(id, false, world.now_ns);
    for port in 2_000..2_200u16 {
        let inside = world.one(WAN, &tcp(&format!("198.51.100.7:{port}"), "203.0.113.10:80", SYN, 1, 0, b""));
        assert_ne!(inside.key().dst, "10.0.0.11".parse::<IpAddr>().unwrap());
    }
    let ids: Vec<u16> = world.policy.balancer.backends().map(|backend| backend.id).collect();
    for id in ids {
        world.policy.balancer.set_health(id, false, world.now_ns);
    }
    let request = tcp("198.51.100.7:9", "203.0.113.10:80", SYN, 1, 0, b"");
    world.dropped(WAN, &request, DropReason::NoBackend);
}

/// Packets of the host come out of the TUN device from the virtual server's own address; the answer goes back there, also where
/// the host gets everything else by its devices.
#[test]
fn the_host_itself_is_a_client() {
    for source in [NatMode::None, NatMode::PortOnly, NatMode::AddressAndPort] {
        let mut spec = native(farm(source, DeliveryMode::Nat));
        spec.nats.push(nat(NatMode::AddressAndPort, &["203.0.113.10"]));
        spec.nats[0].reserved = vec![(32_768, 60_999)];
        spec.routes.push(RouteSpec::new(0, "203.0.113.10/32".parse().unwrap(), HOST.into(), None));
        let mut world = World::new(4, spec);
        for port in 40_000..40_200 {
            let request = key(TCP, &format!("203.0.113.10:{port}"), "203.0.113.10:80");
            let asked = world.one(HOST, &tcp_of(&request, SYN, 1, 0, b""));
            assert_eq!((asked.by(), asked.key().dst_port), (LAN, 80));
            let reply = world.one(LAN, &tcp_of(&asked.key().reversed(), SYN | ACK, 7, 2, b""));
            assert_eq!(reply.outcome, Outcome::Forward(Egress::Host), "{source:?}");
            assert_eq!(reply.key(), request.reversed());
        }
        // What is of no such connection is the host's own, as its checks of backends.
        let check = tcp("10.0.0.11:80", "203.0.113.10:50000", ACK, 1, 1, b"");
        assert_eq!(world.one(LAN, &check).outcome, Outcome::DeviceIngress(LAN_ID), "{source:?}");
    }
}

/// Packets for a virtual server by another device of the host are translated by the kernel to an endpoint that leads here by the TUN device; rules are
/// about what was asked. Its answers go back there, whatever the source is: the client's own, or the host's, by the kernel's own translation.
#[test]
fn another_device_of_the_host_is_a_client() {
    for source in [NatMode::None, NatMode::PortOnly, NatMode::AddressAndPort] {
        let mut spec = native(farm(source, DeliveryMode::Nat));
        spec.nats.push(nat(NatMode::AddressAndPort, &["203.0.113.1"]));
        spec.nats[0].reserved = vec![(32_768, 60_999)];
        spec.servers[0].proxy_protocol = true;
        spec.host.inners = vec![InnerSpec {
            protocol: TCP,
            inner: "192.0.0.11:1024".parse().unwrap(),
            listen: spec.servers[0].listen,
        }];
        spec.routes.push(RouteSpec::new(0, "192.0.0.11/32".parse().unwrap(), HOST.into(), None));
        let kernel = RouteSpec {
            egress: Egress::Kernel,
            ..RouteSpec::new(0, "10.8.0.0/24".parse().unwrap(), HOST.into(), None)
        };
        spec.routes.push(kernel);
        let mut world = World::new(4, spec.clone());
        for (client, port) in
            (40_000u16..40_100).flat_map(|port| ["10.8.0.2", "203.0.113.1"].map(|at| (at, port)))
        {
            let request = key(TCP, &format!("{client}:{port}"), "192.0.0.11:1024");
            let asked = world.one(HOST, &tcp_of(&request, SYN, 1, 0, b""));
            assert_eq!((asked.by(), asked.key().dst_port), (LAN, 80));
            let reply = world.one(LAN, &tcp_of(&asked.key().reversed(), SYN | ACK, 7, 2, b""));
            assert_eq!(
                (reply.outcome, reply.key()),
                (Outcome::Forward(Egress::Host), request.reversed()),
                "{source:?}"
            );
            let header = world.one(HOST, &tcp_of(&request, ACK, 2, 8, b""));
            let told = [&[203, 0, 113, 10][..], &port.to_be_bytes(), &80u16.to_be_bytes()].concat();
            assert!(header.packet.windows(told.len()).any(|part| part == told), "{:?}", header.packet);
        }
        // Nobody else is led there, and there is nothing beside.
        world.dropped(WAN, &tcp("198.51.100.7:5", "192.0.0.11:1024", SYN, 1, 0, b""), DropReason::NoRoute);
        world.dropped(HOST, &tcp("10.8.0.2:5", "192.0.0.11:1025", SYN, 1, 0, b""), DropReason::NoRoute);
        let to = SideSpec { prefixes: vec!["203.0.113.10/32".parse().unwrap()], ..SideSpec::default() };
        spec.rules.push(RuleSpec {
            name: "closed".to_owned(),
            to,
            action: RuleAction::Drop,
            ..RuleSpec::default()
        });
        world.reload(spec);
        world.dropped(HOST, &tcp("10.8.0.2:6", "192.0.0.11:1024", SYN, 1, 0, b""), DropReason::RuleDrop);
    }
}

/// A client beside a backend would get the answer past us, with the backend's address: its source is always the gateway's.
#[test]
fn a_client_beside_a_backend_hides_its_address() {
    for source in [NatMode::None, NatMode::PortOnly, NatMode::AddressAndPort] {
        let mut world = World::new(3, farm(source, DeliveryMode::Nat));
        for port in 2_000..2_100 {
            let request = key(TCP, &format!("10.0.0.11:{port}"), "203.0.113.10:80");
            let asked = world.one(LAN, &tcp_of(&request, SYN, 1, 0, b""));
            assert_eq!((asked.by(), asked.key().src.to_string()), (LAN, "10.0.0.1".to_owned()), "{source:?}");
            let reply = world.one(LAN, &tcp_of(&asked.key().reversed(), SYN | ACK, 7, 2, b""));
            assert_eq!((reply.by(), reply.key()), (LAN, request.reversed()));
        }
    }
}

/// A backend may be the host itself, or behind a device of it that is no interface. What goes there has a source that leads back here,
/// by the TUN device, whatever the server's `source` says: the host would answer the client itself, past the translation.
#[test]
fn a_backend_is_the_host_or_behind_its_other_devices() {
    for source in [NatMode::None, NatMode::PortOnly, NatMode::AddressAndPort] {
        for backend in ["10.0.0.1:80", "203.0.113.1:80", "172.17.0.2:80"] {
            let mut spec = native(farm(source, DeliveryMode::Nat));
            spec.default_action = RuleAction::Drop;
            spec.nats.push(nat(NatMode::AddressAndPort, &["203.0.113.1"]));
            spec.servers[0].backends.truncate(1);
            spec.servers[0].backends[0].address = backend.parse().unwrap();
            spec.host.client_addresses = vec!["100::b".parse().unwrap(), "192.0.0.11".parse().unwrap()];
            spec.routes.push(RouteSpec {
                egress: Egress::Kernel,
                ..RouteSpec::new(0, "172.17.0.0/16".parse().unwrap(), HOST.into(), None)
            });
            let mut closed = World::new(4, spec.clone());
            let stranger = tcp("198.51.100.7:2000", "203.0.113.10:80", SYN, 1, 0, b"");
            closed.dropped(WAN, &stranger, DropReason::DefaultDrop);
            let to = SideSpec { prefixes: vec!["203.0.113.10/32".parse().unwrap()], ..SideSpec::default() };
            spec.rules.push(RuleSpec { name: "web".to_owned(), to, ..RuleSpec::default() });
            let mut world = World::new(4, spec.clone());
            for (port, at) in (40_000..40_100).flat_map(|port| [(port, WAN), (port, LAN), (port, HOST)]) {
                let client = match at {
                    WAN => "198.51.100.7",
                    LAN => "10.0.0.5",
                    _ => "203.0.113.10",
                };
                let request = key(TCP, &format!("{client}:{port}"), "203.0.113.10:80");
                let asked = world.one(at, &tcp_of(&request, SYN, 1, 0, b""));
                assert_eq!(asked.outcome, Outcome::Forward(Egress::Host), "{source:?} {backend}");
                let inside = asked.key();
                assert_eq!(
                    (inside.src.to_string(), inside.dst),
                    ("192.0.0.11".to_owned(), spec.servers[0].backends[0].address.ip())
                );
                let reply = world.one(HOST, &tcp_of(&inside.reversed(), SYN | ACK, 7, 2, b""));
                assert_eq!((reply.by(), reply.key()), (at, request.reversed()), "{source:?} {backend}");
                world.reload(spec.clone());
                let more = world.one(at, &tcp_of(&request, ACK, 2, 8, b"hello"));
                assert_eq!((more.outcome, more.key()), (asked.outcome, inside));
            }
            assert_eq!(world.total(|counters| counters.replies_on_wrong_core), 0);
        }
    }
}

#[test]
fn direct_return_changes_only_where_the_frame_goes() {
    let mut world = World::new(2, farm(NatMode::None, DeliveryMode::DirectReturn));
    let request = tcp("198.51.100.7:2000", "203.0.113.10:80", SYN, 1, 0, b"");
    let left = world.one(WAN, &request);
    assert_eq!(left.key(), key(TCP, "198.51.100.7:2000", "203.0.113.10:80"));
    let Outcome::Resolve(LAN_ID, next_hop) = left.outcome else { panic!("{:?}", left.outcome) };
    assert!(
        ["10.0.0.11", "10.0.0.12", "10.0.0.13"].map(|ip| ip.parse::<IpAddr>().unwrap()).contains(&next_hop)
    );
    // The same backend for all of the connection, whose replies do not come by.
    for seq in 2..20 {
        let left = world.one(WAN, &tcp("198.51.100.7:2000", "203.0.113.10:80", ACK, seq, 9, b""));
        assert_eq!(left.outcome, Outcome::Resolve(LAN_ID, next_hop));
    }
}

#[test]
fn a_reload_keeps_connections_of_a_backend_that_is_gone() {
    let mut world = World::new(2, farm(NatMode::None, DeliveryMode::Nat));
    let mut flows = Vec::new();
    for port in 2_000..2_100u16 {
        let request = key(TCP, &format!("198.51.100.7:{port}"), "203.0.113.10:80");
        let inside = world.one(WAN, &tcp_of(&request, SYN, 1, 0, b"")).key();
        world.one(LAN, &tcp_of(&inside.reversed(), SYN | ACK, 7, 2, b""));
        flows.push((request, inside));
    }
    let mut spec = farm(NatMode::None, DeliveryMode::Nat);
    spec.servers[0].backends.remove(0);
    world.reload(spec);
    for (request, inside) in flows {
        assert_eq!(world.one(WAN, &tcp_of(&request, ACK, 2, 8, b"")).key(), inside);
        assert_eq!(world.one(LAN, &tcp_of(&inside.reversed(), ACK, 8, 2, b"")).key(), request.reversed());
    }
    assert_eq!(world.total(|counters| counters.flows_refused), 0);
}

/// A connection that is over counts no more, however long its flow stays for what comes late: the backend that closes is
/// the next to get something. One that begins anew between the same ports counts once.
#[test]
fn connections_that_are_over_are_not_live() {
    for delivery in [DeliveryMode::Nat, DeliveryMode::DirectReturn] {
        let mut spec = farm(NatMode::None, delivery);
        spec.servers[0].method = BalanceMethod::LeastConnections;
        let mut world = World::new(2, spec);
        let request = |port: u16| key(TCP, &format!("198.51.100.7:{port}"), "203.0.113.10:80");
        for port in 2_000..2_030u16 {
            let inside = world.one(WAN, &tcp_of(&request(port), SYN, 1, 0, b"")).key();
            if delivery == DeliveryMode::Nat {
                world.one(LAN, &tcp_of(&inside.reversed(), SYN | ACK, 7, 2, b""));
            }
            world.one(WAN, &tcp_of(&request(port), ACK, 2, 8, b""));
        }
        let counts = |world: &World| -> Vec<(u32, u32, u64)> {
            let server = &world.policy.balancer.status()[0];
            assert_eq!(server.live, server.backends.iter().map(|backend| backend.live).sum::<u32>());
            server.backends.iter().map(|backend| (backend.live, backend.over, backend.total)).collect()
        };
        assert_eq!(counts(&world), [(10, 0, 10); 3], "{delivery:?}");
        // With direct return the client's FIN is the last that the gateway can know.
        let last = if delivery == DeliveryMode::Nat { RST } else { FIN };
        for port in 2_000..2_015u16 {
            world.one(WAN, &tcp_of(&request(port), last | ACK, 2, 8, b""));
        }
        let live: u32 = counts(&world).iter().map(|count| count.0).sum();
        let over: u32 = counts(&world).iter().map(|count| count.1).sum();
        assert_eq!((live, over, world.flows()), (15, 15, 30), "{delivery:?}");
        // Those between the same ports again, and new ones: level again.
        let (again, left) = if delivery == DeliveryMode::Nat { (2_000, 5) } else { (4_000, 15) };
        for port in (again..again + 10).chain(3_000..3_005u16) {
            world.one(WAN, &tcp_of(&request(port), SYN, 900_000, 0, b""));
        }
        let after = counts(&world);
        assert!(after.iter().all(|count| count.0 == 10), "{delivery:?}: {after:?}");
        assert_eq!(after.iter().map(|count| count.1).sum::<u32>(), left);
        // Forgotten in the end, and nothing is counted twice.
        world.wait(9_000);
        assert_eq!(world.flows(), 0);
        assert!(counts(&world).iter().all(|count| (count.0, count.1) == (0, 0)), "{delivery:?}");
    }
}

/// A FIN with any number, from somebody who does not see the connection, opens its flow to no other one.
#[test]
fn a_blind_fin_does_not_move_a_connection_with_direct_return() {
    let mut spec = farm(NatMode::None, DeliveryMode::DirectReturn);
    spec.servers[0].method = BalanceMethod::LeastConnections;
    let mut world = World::new(2, spec);
    for port in 2_000..2_020 {
        let request = key(TCP, &format!("198.51.100.7:{port}"), "203.0.113.10:80");
        let hop = world.one(WAN, &tcp_of(&request, SYN, 1_000, 0, b"")).outcome;
        world.one(WAN, &tcp_of(&request, ACK, 1_001, 70, b""));
        world.one(WAN, &tcp_of(&request, ACK, 1_001, 90, b"more"));
        for seq in [3_000_000_000, 900_000_000] {
            assert_eq!(world.one(WAN, &tcp_of(&request, FIN | ACK, seq, 1, b"")).outcome, hop);
            assert_eq!(world.one(WAN, &tcp_of(&request, SYN, seq, 0, b"")).outcome, hop);
        }
        assert_eq!(world.one(WAN, &tcp_of(&request, ACK, 1_005, 90, b"more")).outcome, hop);
    }
    assert_eq!(world.policy.balancer.status()[0].live, 20);
}

/// Strangers do not push a known client out of the table of who has which backend: not by what is refused, nor by what is never
/// answered.
#[test]
fn affinity_learns_nothing_from_strangers() {
    let mut spec = farm(NatMode::None, DeliveryMode::Nat);
    (spec.servers[0].affinity, spec.servers[0].method) = (Affinity::SourceAddress, BalanceMethod::RoundRobin);
    let from = SideSpec { prefixes: vec!["100.64.0.0/12".parse().unwrap()], ..SideSpec::default() };
    let action = RuleAction::Drop;
    spec.rules.push(RuleSpec { name: "strangers".to_owned(), from, action, ..RuleSpec::default() });
    let mut world = World::new(1, spec);
    let connect = |world: &mut World, client: u8, port: u16| {
        let request = key(TCP, &format!("198.51.100.{client}:{port}"), "203.0.113.10:80");
        let inside = world.one(WAN, &tcp_of(&request, SYN, 1, 0, b"")).key();
        world.one(LAN, &tcp_of(&inside.reversed(), SYN | ACK, 7, 2, b""));
        world.one(WAN, &tcp_of(&request, ACK, 2, 8, b""));
        inside.dst
    };
    let had: Vec<IpAddr> = (1..=20).map(|client| connect(&mut world, client, 2_000)).collect();
    world.now_ns += 1_000_000_000;
    for number in 0..150_000u32 {
        // Denied, in the middle of no connection, and one that is let in and says no more.
        let (net, flags) = [(0x6440_0000, SYN), (0x0101_0000, ACK), (0x0201_0000, SYN)][number as usize % 3];
        let src = IpAddr::V4((net + number).into());
        let stranger = FlowKey { src, ..key(TCP, "1.2.3.4:5", "203.0.113.10:80") };
        world.packet(WAN, &tcp_of(&stranger, flags, 1, 1, b""));
    }
    world.now_ns += 1_000_000_000;
    let again: Vec<IpAddr> = (1..=20).map(|client| connect(&mut world, client, 3_000)).collect();
    assert_eq!(again, had);
}

/// Connections that a client opens at once, before any is answered, go to one backend.
#[test]
fn affinity_holds_for_connections_that_begin_together() {
    for delivery in [DeliveryMode::Nat, DeliveryMode::DirectReturn] {
        let mut spec = farm(NatMode::None, delivery);
        let server = &mut spec.servers[0];
        (server.affinity, server.method) = (Affinity::SourceAddress, BalanceMethod::RoundRobin);
        let mut world = World::new(2, spec);
        let request =
            |client: u8, port: u16| key(TCP, &format!("198.51.100.{client}:{port}"), "203.0.113.10:80");
        for client in 1..50 {
            let first = world.one(WAN, &tcp_of(&request(client, 2_000), SYN, 1, 0, b"")).outcome;
            for port in 2_001..2_006 {
                assert_eq!(world.one(WAN, &tcp_of(&request(client, port), SYN, 1, 0, b"")).outcome, first);
            }
        }
    }
}
