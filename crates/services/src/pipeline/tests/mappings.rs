//! Endpoint-independent mappings beside everything else that a gateway does, on several cores.

use std::net::IpAddr;

use packet::attachment::Ingress;
use packet::{DropReason, FlowKey};
use steering::assign::plan;
use steering::cores::CoreSet;
use steering::table::Unit;

use super::balancing::farm;
use super::world::*;
use crate::spec::{DeliveryMode, ForwardSpec, GatewaySpec, Mapping, NatMode, RuleSpec, SideSpec, TCP, UDP};

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
        ports: 1,
        proxy_protocol: false,
    });
    let to = SideSpec { prefixes: vec!["10.0.0.6/32".parse().unwrap()], ..SideSpec::default() };
    spec.rules.push(RuleSpec { name: "routed".to_owned(), to, ..RuleSpec::default() });
    spec
}

/// A packet that some core reads, the one that the kernel chooses or any; exactly one leaves. The list of cores to visit
/// is sound: none twice, and the last is the only one that may begin a flow.
fn one_at(world: &mut World, reader: Option<u64>, ingress: Ingress, packet: &[u8]) -> Left {
    let key = FlowKey::of(packet).unwrap();
    let owners = crate::steer::owners(&world.ownership, &world.policy, &key, 0, ingress).chain;
    let mut cores = owners.cores().to_vec();
    assert_eq!(cores.last(), Some(&owners.creator), "{key}");
    cores.sort_unstable();
    cores.dedup();
    assert_eq!(cores.len(), owners.cores().len(), "{key}: a core twice");
    let before = world.drops();
    let mut left = match reader {
        None => world.packet(ingress, packet),
        Some(random) => world.packet_at((random % world.cores.len() as u64) as usize, ingress, packet),
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
                assert_eq!((inside.by(), inside.key().src_port), (LAN, request.src_port));
                let answer = tcp_of(&inside.key().reversed(), SYN | ACK, 7, 2, b"");
                let reply = one_at(&mut world, reader(kind + 3), LAN, &answer);
                assert_eq!((reply.by(), reply.key()), (WAN, request.reversed()), "{cores} cores");
                begun += 1;
                assert_eq!(world.flows(), begun);
            }
            let flow = key(UDP, &format!("10.0.0.9:{}", 3_000 + number), "198.51.100.7:53");
            let outside = one_at(&mut world, reader(6), LAN, &udp_of(&flow, b"x")).key();
            assert_eq!(outside.src, OUTSIDE.parse::<IpAddr>().unwrap());
            let reply = one_at(&mut world, reader(7), WAN, &udp_of(&outside.reversed(), b"y"));
            assert_eq!((reply.by(), reply.key()), (LAN, flow.reversed()));
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
    (route.prefix, route.egress) = ("10.9.0.0/24".parse().unwrap(), THIRD.into());
    spec.routes.push(route);
    for cores in 1..=4 {
        let mut world = World::new(cores, spec.clone());
        for number in 0..200u16 {
            let request = key(TCP, &format!("10.9.0.7:{}", 2_000 + number), "203.0.113.10:80");
            let inside = one_at(&mut world, None, THIRD, &tcp_of(&request, SYN, 1, 0, b"")).key();
            assert_eq!((inside.src, inside.src_port), (request.src, request.src_port));
            let reply = one_at(&mut world, None, LAN, &tcp_of(&inside.reversed(), SYN | ACK, 7, 2, b""));
            assert_eq!((reply.by(), reply.key()), (THIRD, request.reversed()), "{cores} cores");
        }
    }
}

/// Other shares of the buckets, as an operator or the load brings them; then, as the keeper does, an earlier owner leaves
/// the history of each bucket in which it has nothing alive.
fn share(world: &mut World, weights: &[u32]) {
    let units: Vec<Unit> = (0..).zip(weights).map(|(id, weight)| Unit { id, weight: *weight }).collect();
    let table = plan(&world.ownership.table, &units, &[]).unwrap();
    let next = world.ownership.with_table(table, world.ownership.alive);
    world.set_ownership(next);
    let mut table = world.ownership.table.clone();
    for bucket in 0..table.buckets() {
        for unit in world.ownership.table.chain(bucket) {
            if world.cores[usize::from(*unit)].live()[bucket] == 0 {
                assert!(table.retire(bucket, *unit));
            }
        }
    }
    let next = world.ownership.with_table(table, world.ownership.alive);
    world.set_ownership(next);
}

/// The outside endpoint by which a client's packet to `to` leaves.
fn outside(world: &mut World, client: &str, to: &str) -> (IpAddr, u16) {
    let left = world.one(LAN, &udp(client, to, b"x")).key();
    (left.src, left.src_port)
}

fn mappings(world: &World) -> Vec<u64> {
    world.cores.iter().map(|core| core.nat().status().mappings).collect()
}

fn alive(world: &World) -> u32 {
    world.cores.iter().flat_map(|core| core.live()).sum()
}

/// A client keeps its outside port for old remotes and new ones, and is found there by anybody, while its bucket moves to
/// and fro: until its mapping ends, and no longer.
#[test]
fn a_mapping_stays_when_its_bucket_moves() {
    for cores in 2..=4usize {
        let mut world = World::new(cores as u8, independent());
        let clients: Vec<String> =
            (0..20).map(|number| format!("10.0.0.9:{}", 31_000 + 7 * number)).collect();
        let first: Vec<_> =
            clients.iter().map(|client| outside(&mut world, client, "198.51.100.1:1")).collect();
        let at_first = mappings(&world);
        assert!(at_first[1] > 0, "{at_first:?}");
        let without_1: Vec<u32> = (0..cores).map(|core| u32::from(core != 1)).collect();
        let without_0: Vec<u32> = (0..cores).map(|core| u32::from(core != 0)).collect();
        let all = vec![1; cores];
        for (round, weights) in [&without_1, &all, &without_0, &without_1, &all].into_iter().enumerate() {
            share(&mut world, weights);
            for (client, first) in clients.iter().zip(&first) {
                assert_eq!(outside(&mut world, client, "198.51.100.1:1"), *first, "a live flow");
                let new = format!("192.0.2.{}:9", 1 + round);
                assert_eq!(outside(&mut world, client, &new), *first, "RFC 4787 REQ-1");
                let stranger = format!("192.0.2.{}:7", 100 + round);
                let inside = world.one(WAN, &udp(&stranger, &format!("{}:{}", first.0, first.1), b"y")).key();
                assert_eq!(inside, key(UDP, &stranger, client));
                assert_eq!(outside(&mut world, client, &stranger), *first);
            }
            assert_eq!(mappings(&world), at_first, "each client on one core only");
            assert_eq!(world.flows(), clients.len() * (1 + 2 * (round + 1)));
        }
        // Between its flows a client keeps its port too, on a core that owns nothing any more.
        share(&mut world, &without_1);
        while world.flows() > 0 {
            world.wait(5);
        }
        share(&mut world, &without_1);
        for (client, first) in clients.iter().zip(&first) {
            assert_eq!(outside(&mut world, client, "198.51.100.2:2"), *first);
        }
        while world.flows() > 0 {
            world.wait(5);
        }
        world.wait(65);
        assert_eq!((mappings(&world).iter().sum::<u64>(), alive(&world)), (0, 0));
        share(&mut world, &without_1);
        assert!((0..128).all(|bucket| world.ownership.table.chain(bucket).is_empty()));
        let opened = world.cores[1].counters.flows_opened;
        for client in &clients {
            outside(&mut world, client, "198.51.100.1:1");
        }
        assert_eq!((world.cores[1].counters.flows_opened, mappings(&world)[1]), (opened, 0));
    }
}

/// Counts of a mapping are taken back, whatever the configuration was when it began and when it ended.
#[test]
fn mappings_are_counted_exactly_over_reloads_and_moves() {
    let mut plainly = two_interfaces();
    plainly.nats.push(nat(NatMode::AddressAndPort, &[OUTSIDE]));
    let mut elsewhere = independent();
    elsewhere.nats[0].addresses = vec!["203.0.113.7".parse().unwrap()];
    let specs = [independent(), plainly, elsewhere, two_interfaces(), with_services()];
    let mut world = World::new(3, independent());
    for round in 0..40u64 {
        for number in 0..30 {
            let bits = mix(round << 8 | number);
            let client = format!("10.0.0.{}:{}", 2 + bits % 3, 5_000 + (bits >> 8) % 20);
            world.packet(LAN, &udp(&client, &format!("192.0.2.{}:9", 1 + (bits >> 16) % 200), b"x"));
            world.packet(LAN, &echo("10.0.0.9", &format!("192.0.2.{}", 1 + (bits >> 24) % 200), 8, 7));
        }
        world.wait(mix(round) % 30);
        match mix(round + 1_000) % 3 {
            0 => world.reload(specs[(mix(round + 2_000) % 5) as usize].clone()),
            1 => share(&mut world, &[1, u32::from(round % 2 == 0), u32::from(round % 3 == 0)]),
            _ => {}
        }
    }
    while world.flows() > 0 {
        world.wait(5);
    }
    world.wait(120);
    assert_eq!((mappings(&world).iter().sum::<u64>(), alive(&world)), (0, 0));
}

/// Two clients that know each other's outside endpoint meet there, also after their buckets moved, and by no other.
#[test]
fn clients_meet_at_their_old_endpoints_after_a_move() {
    let mut world = World::new(3, independent());
    for number in 0..40 {
        let (one, two) = (format!("10.0.0.8:{}", 4_000 + number), format!("10.0.0.9:{}", 5_000 + number));
        let at = [&one, &two].map(|client| outside(&mut world, client, "198.51.100.1:1"));
        let at = at.map(|(address, port)| format!("{address}:{port}"));
        share(&mut world, &[1, u32::from(number % 2 == 0), 1]);
        assert_eq!(world.one(LAN, &udp(&one, &at[1], b"hello")).key(), key(UDP, &at[0], &two));
        assert_eq!(world.one(LAN, &udp(&two, &at[0], b"hello")).key(), key(UDP, &at[1], &one));
    }
    assert_eq!(mappings(&world).iter().sum::<u64>(), 80);
}

/// A query's id is mapped the same for remotes above and below the client's own address.
#[test]
fn pings_keep_their_id_for_every_remote() {
    let mut world = World::new(4, independent());
    for id in 100..140 {
        let mut ids = ["8.8.8.8", "198.51.100.7", "1.1.1.1"].map(|remote| {
            let left = world.one(LAN, &echo("10.0.0.9", remote, 8, id));
            u16::from_be_bytes([left.packet[24], left.packet[25]])
        });
        ids.sort_unstable();
        assert_eq!(ids[0], ids[2], "one mapping");
    }
}

/// A core that hung has lost its clients: others have mapped them anew, and go on.
#[test]
fn a_core_that_comes_back_does_not_take_its_clients_back() {
    let mut world = World::new(2, independent());
    let clients: Vec<String> = (0..40).map(|number| format!("10.0.0.9:{}", 31_000 + 7 * number)).collect();
    for client in &clients {
        outside(&mut world, client, "198.51.100.1:1");
    }
    let mut table = plan(&world.ownership.table, &[Unit { id: 0, weight: 1 }], &[]).unwrap();
    table.forget(1);
    let next = world.ownership.with_table(table, CoreSet::first(1));
    world.set_ownership(next);
    let now: Vec<_> = clients.iter().map(|client| outside(&mut world, client, "198.51.100.1:1")).collect();
    world.now_ns += SECOND_NS / 10;
    world.cores[1].tick(world.now_ns);
    let next = world.ownership.with_table(world.ownership.table.clone(), CoreSet::first(2));
    world.set_ownership(next);
    for weights in [[1, 1], [1, 0], [0, 1]] {
        share(&mut world, &weights);
        for (client, now) in clients.iter().zip(&now) {
            assert_eq!(outside(&mut world, client, "198.51.100.1:1"), *now);
            assert_eq!(outside(&mut world, client, "192.0.2.7:9"), *now);
        }
    }
}

/// A rule that shares its address with such a NAT maps like it: one outside port for a client, whoever the remote is.
#[test]
fn a_rule_that_shares_an_address_maps_for_every_remote_too() {
    let mut spec = independent();
    let mut shares = nat(NatMode::AddressAndPort, &[OUTSIDE]);
    shares.from = vec!["10.0.0.64/26".parse().unwrap()];
    spec.nats.insert(0, shares);
    let mut world = World::new(4, spec);
    for (one, two) in [("10.0.0.70:4000", "10.0.0.9:4000"), ("10.0.0.71:4001", "10.0.0.72:4002")] {
        let at = [one, two].map(|client| {
            let first = outside(&mut world, client, "192.0.2.1:9");
            for last in 2..30 {
                assert_eq!(
                    outside(&mut world, client, &format!("192.0.2.{last}:9")),
                    first,
                    "RFC 4787 REQ-1"
                );
            }
            format!("{}:{}", first.0, first.1)
        });
        assert_eq!(world.one(LAN, &udp(one, &at[1], b"hello")).key(), key(UDP, &at[0], two));
        assert_eq!(world.one(LAN, &udp(two, &at[0], b"hello")).key(), key(UDP, &at[1], one));
    }
}

/// Strangers' datagrams to a client's mapping, which it never answers, cost it none of its own connections.
#[test]
fn strangers_at_a_mapping_do_not_use_up_the_clients_flows() {
    let mut spec = independent();
    spec.nats[0].flows_per_client_max = 10;
    let mut world = World::new(1, spec);
    let ask = |number: u16| udp("10.0.0.9:3000", &format!("198.51.100.7:{}", 100 + number), b"x");
    let outside = world.one(LAN, &ask(0)).key().reversed();
    for stranger in 1..=11 {
        let key = FlowKey { src: format!("192.0.2.{stranger}").parse().unwrap(), ..outside };
        if stranger <= 5 {
            assert_eq!(world.one(WAN, &udp_of(&key, b"knock")).by(), LAN, "half of what the client may have");
        } else {
            world.dropped(WAN, &udp_of(&key, b"knock"), DropReason::FlowsPerClient);
        }
    }
    for number in 1..10 {
        assert_eq!(world.one(LAN, &ask(number)).by(), WAN, "{number}");
    }
    assert_eq!(world.flows(), 15);
    world.dropped(LAN, &ask(10), DropReason::FlowsPerClient);
    // When those are over, there is room for others.
    world.wait(200);
    assert_eq!(world.flows(), 0);
    let outside = world.one(LAN, &ask(0)).key().reversed();
    let friend = FlowKey { src: "192.0.2.99".parse().unwrap(), ..outside };
    assert_eq!(world.one(WAN, &udp_of(&friend, b"knock")).by(), LAN);
}
