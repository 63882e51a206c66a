//! Results of a pick, by method, health, weight and limit (row C6).

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use packet::drop_reason::DropReason;
use packet::flow::FlowKey;
use proptest::prelude::*;

use super::{Balancer, Fate, Pick, ServerStatus};
use crate::spec::{
    Affinity, BackendSpec, BalanceMethod, DeliveryMode, NatMode, ResetOnDown, ServerSpec, TCP, UDP,
};

pub const SECOND_NS: u64 = 1_000_000_000;

pub fn backend(address: &str, weight: u16) -> BackendSpec {
    BackendSpec { address: address.parse().unwrap(), weight, connections_max: 0, drain_s: 0 }
}

/// A server "web" on 203.0.113.10:80 with backends 10.0.0.1:8080 … of these weights.
pub fn server(method: BalanceMethod, weights: &[u16]) -> ServerSpec {
    ServerSpec {
        name: "web".to_owned(),
        protocol: TCP,
        listen: "203.0.113.10:80".parse().unwrap(),
        backends: (1..)
            .zip(weights)
            .map(|(at, &weight)| backend(&format!("10.0.0.{at}:8080"), weight))
            .collect(),
        method,
        delivery: DeliveryMode::Nat,
        source: NatMode::AddressAndPort,
        source_addresses: Vec::new(),
        connections_max: 0,
        slow_start_s: 0,
        proxy_protocol: false,
        reset_on_down: ResetOnDown::default(),
        affinity: Affinity::default(),
    }
}

pub const METHODS: [BalanceMethod; 4] = [
    BalanceMethod::Maglev,
    BalanceMethod::LeastConnections,
    BalanceMethod::RoundRobin,
    BalanceMethod::SourceAddress,
];

/// The n-th client: addresses and ports differ.
pub fn client(number: u32) -> FlowKey {
    FlowKey {
        src: IpAddr::from((0xc633_6400 + number / 7).to_be_bytes()),
        dst: "203.0.113.10".parse().unwrap(),
        src_port: 1_024 + (number % 60_000) as u16,
        dst_port: 80,
        protocol: TCP,
    }
}

/// Picks and opens for clients `from..to`; connections by backend.
pub fn run(balancer: &Balancer, clients: std::ops::Range<u32>) -> BTreeMap<u16, u32> {
    let mut counts = BTreeMap::new();
    for number in clients {
        let pick = balancer.pick(0, &client(number), 0, number.wrapping_mul(0x9e37_79b9)).unwrap();
        balancer.opened(0, pick.backend).unwrap();
        *counts.entry(pick.backend).or_default() += 1;
    }
    counts
}

fn pick(balancer: &Balancer, number: u32) -> Result<Pick, DropReason> {
    balancer.pick(0, &client(number), 0, number.wrapping_mul(0x9e37_79b9))
}

pub fn status(balancer: &Balancer) -> ServerStatus {
    balancer.status().into_iter().next().unwrap()
}

#[test]
fn servers_are_found_by_protocol_address_and_port() {
    let mut dns = server(BalanceMethod::Maglev, &[1]);
    dns.name = "dns".to_owned();
    dns.protocol = UDP;
    dns.listen = "[2001:db8::10]:53".parse().unwrap();
    dns.backends = vec![backend("[2001:db8:1::1]:53", 1), backend("10.0.0.1:53", 1)];
    let mut late = server(BalanceMethod::Maglev, &[1]);
    late.name = "late".to_owned();
    let balancer = Balancer::compile(&[server(BalanceMethod::Maglev, &[1, 1]), dns, late], None);
    let find = |protocol, text: &str| balancer.find(protocol, text.parse().unwrap());
    assert_eq!(find(TCP, "203.0.113.10:80"), Some(0), "the first of two with one endpoint");
    assert_eq!(find(UDP, "[2001:db8::10]:53"), Some(1));
    assert_eq!(find(UDP, "203.0.113.10:80"), None);
    assert_eq!(find(TCP, "203.0.113.10:81"), None);
    assert_eq!(find(TCP, "203.0.113.11:80"), None);
    assert_eq!(balancer.server_name(1), Some("dns"));
    assert_eq!(balancer.server_name(3), None);
    let v6 = FlowKey { src: "2001:db8::99".parse().unwrap(), ..client(1) };
    for random in 0..50 {
        let pick = balancer.pick(1, &v6, 0, random).unwrap();
        assert_eq!(pick.address, "[2001:db8:1::1]:53".parse().unwrap(), "never another IP version");
    }
    assert_eq!(balancer.pick(9, &v6, 0, 0), Err(DropReason::NoBackend));
    assert_eq!(balancer.opened(9, 0), Err(DropReason::NoBackend));
    assert_eq!(balancer.opened(0, 99), Err(DropReason::NoBackend));
    balancer.closed(99, false);
    assert!(!balancer.is_empty() && Balancer::compile(&[], None).is_empty());
}

#[test]
fn every_method_shares_by_weight() {
    for method in METHODS {
        let balancer = Balancer::compile(&[server(method, &[1, 2, 5])], None);
        let counts = run(&balancer, 0..40_000);
        for (id, weight) in [(0, 1.0), (1, 2.0), (2, 5.0)] {
            let share = f64::from(counts[&id]) / 40_000.0;
            let ideal = weight / 8.0;
            assert!(
                (share - ideal).abs() < 0.02,
                "{method:?}: backend {id} has {share}, should have {ideal}"
            );
        }
    }
}

#[test]
fn maglev_goes_by_endpoint_source_address_by_address() {
    let maglev = Balancer::compile(&[server(BalanceMethod::Maglev, &[1; 8])], None);
    let source = Balancer::compile(&[server(BalanceMethod::SourceAddress, &[1; 8])], None);
    let of = |balancer: &Balancer, port| {
        balancer.pick(0, &FlowKey { src_port: port, ..client(1) }, 0, u32::from(port)).unwrap().backend
    };
    let mut seen: Vec<u16> = (1..200).map(|port| of(&maglev, port)).collect();
    assert!((1..200).all(|port| of(&maglev, port) == seen[usize::from(port) - 1]), "the same again");
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), 8);
    assert!((1..200).all(|port| of(&source, port) == of(&source, 1)));
    let keyed = Balancer::compile_keyed(&[server(BalanceMethod::Maglev, &[1; 8])], None, 77);
    assert!((1..200).any(|port| of(&keyed, port) != of(&maglev, port)), "the key matters");
    let again = Balancer::compile(&[server(BalanceMethod::Maglev, &[1; 8])], Some(&keyed));
    assert!((1..200).all(|port| of(&again, port) == of(&keyed, port)), "and is kept");
}

#[test]
fn round_robin_is_smooth() {
    let balancer = Balancer::compile(&[server(BalanceMethod::RoundRobin, &[5, 1, 1])], None);
    let turns: Vec<u16> = (0..14).map(|number| pick(&balancer, number).unwrap().backend).collect();
    assert_eq!(turns[..7], turns[7..], "in turn");
    assert_eq!(turns[..7].iter().filter(|&&id| id == 0).count(), 5);
    assert_eq!(turns[..7], [0, 0, 2, 0, 0, 1, 0]);
    let equal = Balancer::compile(&[server(BalanceMethod::RoundRobin, &[7, 7, 7])], None);
    let turns: Vec<u16> = (0..6).map(|number| pick(&equal, number).unwrap().backend).collect();
    assert_eq!(turns, [0, 2, 1, 0, 2, 1]);
}

#[test]
fn turns_of_odd_weights() {
    use super::turns::turns;
    assert!(turns(&[]).is_empty());
    assert!(turns(&[0, 0]).is_empty());
    assert_eq!(turns(&[0, 30]), [1]);
    let fine = turns(&[10_000, 9_999, 1]);
    assert_eq!(fine.len(), 4_097, "rounded, and nobody is left out");
    assert_eq!(fine.iter().filter(|&&id| id == 2).count(), 1);
    let many = turns(&vec![10; 5_000]);
    assert_eq!(many.len(), 5_000);
}

#[test]
fn least_connections_follows_what_ends() {
    let balancer = Balancer::compile(&[server(BalanceMethod::LeastConnections, &[1, 1, 2])], None);
    let counts = run(&balancer, 0..400);
    assert_eq!(counts, BTreeMap::from([(0, 100), (1, 100), (2, 200)]), "exact");
    for _ in 0..50 {
        balancer.closed(1, false);
    }
    assert_eq!(run(&balancer, 400..440), BTreeMap::from([(1, 40)]), "the emptiest until it has caught up");
    let idle = Balancer::compile(&[server(BalanceMethod::LeastConnections, &[1; 4])], None);
    let mut first: Vec<u16> = (0..100).map(|number| pick(&idle, number).unwrap().backend).collect();
    first.sort_unstable();
    first.dedup();
    assert_eq!(first.len(), 4, "chance decides among equals");
}

#[test]
fn least_connections_of_many_backends() {
    let mut spec = server(BalanceMethod::LeastConnections, &[]);
    spec.backends = (0..1_000).map(|at| backend(&format!("10.1.{}.{}:80", at / 250, at % 250), 1)).collect();
    let balancer = Balancer::compile(&[spec], None);
    let counts = run(&balancer, 0..20_000);
    let most = counts.values().max().unwrap();
    assert!(*most <= 26, "the fullest of 1,000 has {most} where 20 is the mean");
}

#[test]
fn a_backend_that_is_down_gets_nothing_and_the_others_keep_their_clients() {
    for method in METHODS {
        let balancer = Balancer::compile(&[server(method, &[1; 4])], None);
        let before: Vec<u16> = (0..2_000).map(|number| pick(&balancer, number).unwrap().backend).collect();
        assert!(balancer.set_health(2, false, 1));
        assert!(!balancer.set_health(2, false, 2), "no news");
        let counts = run(&balancer, 0..4_000);
        assert!(!counts.contains_key(&2) && counts.len() == 3, "{method:?}: {counts:?}");
        if matches!(method, BalanceMethod::Maglev | BalanceMethod::SourceAddress) {
            let stay = |(number, &id): (u32, &u16)| id == 2 || pick(&balancer, number).unwrap().backend == id;
            assert!((0..).zip(&before).all(stay), "{method:?}");
        }
        assert_eq!(status(&balancer).backends[2].failures, 1);
        assert!(!status(&balancer).backends[2].up);
        assert!(balancer.set_health(2, true, 3));
        assert!(run(&balancer, 4_000..8_000)[&2] > 0, "{method:?}");
    }
}

#[test]
fn nobody_is_up() {
    for method in METHODS {
        let balancer = Balancer::compile(&[server(method, &[1, 1])], None);
        balancer.set_health(0, false, 1);
        balancer.drain(1, true);
        assert_eq!(pick(&balancer, 1), Err(DropReason::NoBackend), "{method:?}");
        balancer.drain(1, false);
        assert_eq!(pick(&balancer, 1).unwrap().backend, 1);
        assert_eq!(status(&balancer).refused, 1);
        let empty = Balancer::compile(&[server(method, &[])], None);
        assert_eq!(pick(&empty, 1), Err(DropReason::NoBackend));
        let drained = Balancer::compile(&[server(method, &[0, 0])], None);
        assert_eq!(pick(&drained, 1), Err(DropReason::NoBackend));
    }
}

#[test]
fn draining_and_weights_while_running() {
    for method in METHODS {
        let balancer = Balancer::compile(&[server(method, &[1, 1])], None);
        run(&balancer, 0..100);
        let live = status(&balancer).backends[0].live;
        assert!(balancer.drain(0, true));
        assert_eq!(run(&balancer, 100..200), BTreeMap::from([(1, 100)]), "{method:?}");
        assert_eq!(status(&balancer).backends[0].live, live, "live ones stay");
        assert!(status(&balancer).backends[0].draining);
        assert!(balancer.drain(0, false) && balancer.set_weight(1, 0));
        assert_eq!(run(&balancer, 200..300), BTreeMap::from([(0, 100)]), "{method:?}: weight 0 drains too");
        assert!(balancer.set_weight(1, 3) && !balancer.set_weight(1, 3));
        assert_eq!(status(&balancer).backends[1].weight, 3);
        assert!(run(&balancer, 300..700)[&1] > 0);
        assert!(
            !balancer.set_weight(77, 1) && !balancer.drain(77, true) && !balancer.set_health(77, true, 0)
        );
    }
}

/// The time begins with draining, by command or by weight 0, is over once, and begins anew when draining does.
#[test]
fn draining_has_its_time() {
    let mut spec = server(BalanceMethod::RoundRobin, &[1, 1]);
    spec.backends[0].drain_s = 5;
    let balancer = Balancer::compile(std::slice::from_ref(&spec), None);
    let left = |balancer: &Balancer| status(balancer).backends[0].drain_left_s;
    let fates = |balancer: &Balancer| [balancer.fate(0), balancer.fate(1)];
    balancer.tick(SECOND_NS);
    assert_eq!((left(&balancer), balancer.deaths()), (None, 0));
    for (id, draining) in [(0, true), (1, true), (1, false)] {
        balancer.drain(id, draining);
    }
    balancer.tick(10 * SECOND_NS);
    balancer.tick(13 * SECOND_NS);
    assert_eq!((left(&balancer), fates(&balancer)), (Some(2), [Fate::Stay; 2]));
    // A reload does not begin it anew.
    let reloaded = Balancer::compile(std::slice::from_ref(&spec), Some(&balancer));
    reloaded.tick(14 * SECOND_NS);
    assert_eq!((left(&reloaded), reloaded.deaths()), (Some(1), 0));
    reloaded.tick(15 * SECOND_NS);
    reloaded.tick(16 * SECOND_NS);
    assert_eq!((left(&reloaded), reloaded.deaths()), (Some(0), 1), "told once");
    assert_eq!(fates(&reloaded), [Fate::Reset, Fate::Stay]);
    reloaded.drain(0, false);
    reloaded.tick(17 * SECOND_NS);
    assert_eq!((left(&reloaded), fates(&reloaded)), (None, [Fate::Stay; 2]));
    spec.backends[0].weight = 0;
    let weightless = Balancer::compile(&[spec], Some(&reloaded));
    weightless.tick(20 * SECOND_NS);
    weightless.tick(24 * SECOND_NS);
    assert_eq!((left(&weightless), weightless.fate(0)), (Some(1), Fate::Stay));
    weightless.tick(25 * SECOND_NS);
    assert_eq!((weightless.fate(0), weightless.deaths()), (Fate::Reset, 2));
}

#[test]
fn full_backends_divert_to_others() {
    for method in METHODS {
        let mut spec = server(method, &[1, 1, 1]);
        spec.backends[1].connections_max = 10;
        let balancer = Balancer::compile(&[spec], None);
        let counts = run(&balancer, 0..600);
        assert_eq!(counts[&1], 10, "{method:?}");
        assert!(counts[&0] > 200 && counts[&2] > 200, "{method:?}: both take what it cannot: {counts:?}");
        let next = (0..600).find(|&number| {
            balancer.closed(1, false);
            let pick = pick(&balancer, number).unwrap();
            let took = balancer.opened(0, pick.backend).is_ok();
            took && pick.backend == 1
        });
        assert!(next.is_some(), "{method:?}: a place that is free again is used");
    }
}

#[test]
fn full_servers() {
    for method in METHODS {
        let mut spec = server(method, &[1, 1]);
        for backend in &mut spec.backends {
            backend.connections_max = 3;
        }
        let balancer = Balancer::compile(&[spec.clone()], None);
        assert_eq!(run(&balancer, 0..6), BTreeMap::from([(0, 3), (1, 3)]), "{method:?}: every place is used");
        assert_eq!(pick(&balancer, 6), Err(DropReason::ServerFull));
        balancer.set_health(0, false, 1);
        assert_eq!(pick(&balancer, 6), Err(DropReason::ServerFull), "the other one is up, and full");
        spec.connections_max = 4;
        let balancer = Balancer::compile(&[spec], None);
        run(&balancer, 0..4);
        assert_eq!(pick(&balancer, 5), Err(DropReason::ServerFull));
        assert_eq!(balancer.opened(0, 0), Err(DropReason::ServerFull));
        let status = status(&balancer);
        assert_eq!((status.live, status.total), (4, 4), "a refused one is not counted");
        assert_eq!(status.backends.iter().map(|backend| backend.total).sum::<u64>(), 4);
        balancer.closed(0, false);
        assert!(pick(&balancer, 6).is_ok());
        assert_eq!(status.refused, 2);
    }
}

#[test]
fn a_full_backend_takes_no_place_of_its_server() {
    let mut spec = server(BalanceMethod::Maglev, &[1, 1]);
    spec.backends[0].connections_max = 1;
    spec.connections_max = 10;
    let balancer = Balancer::compile(&[spec], None);
    assert_eq!(balancer.opened(0, 0), Ok(()));
    assert_eq!(balancer.opened(0, 0), Err(DropReason::ServerFull), "another core was faster");
    let status = status(&balancer);
    assert_eq!((status.live, status.total, status.backends[0].live, status.backends[0].total), (1, 1, 1, 1));
}

/// Large tables wait for the tick, health does not.
#[test]
fn many_backends_fail_together() {
    let mut spec = server(BalanceMethod::Maglev, &[]);
    spec.backends = (0..200).map(|at| backend(&format!("10.1.0.{at}:80"), 1)).collect();
    let balancer = Balancer::compile(&[spec], None);
    let before: Vec<u16> = (0..2_000).map(|number| pick(&balancer, number).unwrap().backend).collect();
    for id in 0..150 {
        balancer.set_health(id, false, 1);
    }
    let check = || {
        for (number, &old) in (0..).zip(&before) {
            let now = pick(&balancer, number).unwrap().backend;
            assert!(now >= 150 && (old < 150 || now == old), "client {number} goes from {old} to {now}");
        }
    };
    check();
    balancer.tick(2);
    check();
    for id in 150..200 {
        balancer.set_health(id, false, 3);
    }
    assert_eq!(pick(&balancer, 1), Err(DropReason::NoBackend));
    balancer.tick(4);
    assert_eq!(pick(&balancer, 1), Err(DropReason::NoBackend));
    balancer.set_health(77, true, 5);
    assert_eq!(pick(&balancer, 1).unwrap().backend, 77, "the first to come back need not wait");
    balancer.set_health(3, true, 6);
    balancer.tick(7);
    let now: Vec<u16> = (0..100).map(|number| pick(&balancer, number).unwrap().backend).collect();
    assert!(now.contains(&3) && now.contains(&77));
}

#[test]
fn the_end_of_draining_is_a_slow_start_too() {
    let spec = ServerSpec { slow_start_s: 9, ..server(BalanceMethod::LeastConnections, &[1, 1]) };
    type Wish = fn(&Balancer) -> bool;
    let wishes: [(Wish, Wish); 2] = [
        (|it| it.drain(0, true), |it| it.drain(0, false)),
        (|it| it.set_weight(0, 0), |it| it.set_weight(0, 1)),
    ];
    for (begin, end) in wishes {
        let balancer = Balancer::compile(std::slice::from_ref(&spec), None);
        let effective = || status(&balancer).backends[0].effective_weight;
        balancer.tick(SECOND_NS);
        assert!(begin(&balancer));
        assert_eq!(effective(), 0.0);
        assert!(end(&balancer));
        assert_eq!(effective(), 0.1);
        balancer.tick(100 * SECOND_NS);
        assert_eq!(effective(), 0.1, "begins with the first tick");
        balancer.tick(109 * SECOND_NS);
        assert_eq!(effective(), 1.0);
    }
}

/// Eight threads that open and close never hold more than the limit together.
#[test]
fn limits_hold_between_cores() {
    let mut spec = server(BalanceMethod::RoundRobin, &[1, 1]);
    spec.connections_max = 5;
    spec.backends[0].connections_max = 3;
    let balancer = Balancer::compile(&[spec], None);
    std::thread::scope(|scope| {
        for core in 0..8u32 {
            let balancer = &balancer;
            scope.spawn(move || {
                for number in 0..2_000 {
                    let Ok(pick) = pick(balancer, core * 2_000 + number) else { continue };
                    if balancer.opened(0, pick.backend).is_ok() {
                        let status = status(balancer);
                        assert!(status.live <= 5 && status.backends[0].live <= 3);
                        balancer.closed(pick.backend, false);
                    }
                }
            });
        }
    });
    let status = status(&balancer);
    assert_eq!((status.live, status.backends[0].live, status.backends[1].live), (0, 0, 0));
    balancer.closed(0, false);
    assert_eq!(balancer.status()[0].live, 0, "never below zero");
}

#[test]
fn slow_start_grows_by_tenths() {
    for method in METHODS {
        let mut spec = server(method, &[10, 10]);
        spec.slow_start_s = 90;
        let balancer = Balancer::compile(&[spec], None);
        assert_eq!(status(&balancer).backends[1].effective_weight, 10.0, "not at the start of the gateway");
        balancer.set_health(1, false, 1_000 * SECOND_NS);
        assert_eq!(status(&balancer).backends[1].effective_weight, 0.0);
        balancer.set_health(1, true, 1_000 * SECOND_NS);
        let mut shares = Vec::new();
        for (after_s, weight) in
            [(0, 1.0), (9, 1.0), (10, 2.0), (45, 5.0), (89, 9.0), (90, 10.0), (900, 10.0)]
        {
            let now_ns = (1_000 + after_s) * SECOND_NS;
            balancer.tick(now_ns);
            assert_eq!(
                status(&balancer).backends[1].effective_weight,
                weight,
                "{method:?} after {after_s} s"
            );
            let mut count = 0;
            for number in 0..2_000 {
                let pick = balancer.pick(0, &client(number), now_ns, number).unwrap();
                balancer.opened(0, pick.backend).unwrap();
                count += u32::from(pick.backend == 1);
            }
            for _ in 0..2_000 {
                balancer.closed(0, false);
                balancer.closed(1, false);
            }
            shares.push(f64::from(count) / 2_000.0);
        }
        assert!((shares[0] - 1.0 / 11.0).abs() < 0.04, "{method:?}: {shares:?}");
        assert!((shares[3] - 5.0 / 15.0).abs() < 0.04, "{method:?}: {shares:?}");
        assert!((shares[6] - 0.5).abs() < 0.04, "{method:?}: {shares:?}");
    }
}

#[test]
fn what_a_flow_needs() {
    let spec = |protocol, delivery| {
        let mut spec = server(BalanceMethod::Maglev, &[1]);
        (spec.protocol, spec.delivery, spec.proxy_protocol) = (protocol, delivery, true);
        spec.source = NatMode::PortOnly;
        let pick = pick(&Balancer::compile(&[spec], None), 1).unwrap();
        (pick.delivery, pick.source, pick.proxy_protocol)
    };
    let (nat, direct) = (DeliveryMode::Nat, DeliveryMode::DirectReturn);
    assert_eq!(spec(TCP, nat), (nat, NatMode::PortOnly, true));
    assert_eq!(spec(UDP, nat), (nat, NatMode::PortOnly, false));
    assert_eq!(spec(TCP, direct), (direct, NatMode::None, false));
}

#[test]
fn listen_of_names_servers_that_keep_the_source() {
    let make = |name: &str, listen: &str, source, delivery| {
        let mut spec = server(BalanceMethod::Maglev, &[1, 1]);
        (spec.name, spec.listen) = (name.to_owned(), listen.parse().unwrap());
        (spec.source, spec.delivery) = (source, delivery);
        spec
    };
    let balancer = Balancer::compile(
        &[
            make("a", "203.0.113.1:80", NatMode::None, DeliveryMode::Nat),
            make("b", "203.0.113.2:80", NatMode::None, DeliveryMode::Nat),
            make("c", "203.0.113.3:80", NatMode::PortOnly, DeliveryMode::Nat),
            make("d", "203.0.113.4:80", NatMode::None, DeliveryMode::DirectReturn),
        ],
        None,
    );
    let backend: SocketAddr = "10.0.0.2:8080".parse().unwrap();
    let expected: Vec<SocketAddr> =
        vec!["203.0.113.1:80".parse().unwrap(), "203.0.113.2:80".parse().unwrap()];
    assert_eq!(balancer.listen_of(TCP, backend), expected);
    assert!(balancer.listen_of(UDP, backend).is_empty());
    assert!(balancer.listen_of(TCP, "10.0.0.2:8081".parse().unwrap()).is_empty());
    let servers: Vec<&str> = balancer.backends().map(|backend| backend.server).collect();
    assert_eq!(servers, ["a", "a", "b", "b", "c", "c", "d", "d"]);
}

#[derive(Clone, Debug)]
enum Op {
    Open(u32),
    Close(u16),
    Health(u16, bool),
    Drain(u16, bool),
    Weight(u16, u16),
    Tick,
}

fn operations() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        6 => any::<u32>().prop_map(Op::Open),
        2 => (0u16..5).prop_map(Op::Close),
        1 => (0u16..5, any::<bool>()).prop_map(|(id, up)| Op::Health(id, up)),
        1 => (0u16..5, any::<bool>()).prop_map(|(id, on)| Op::Drain(id, on)),
        1 => (0u16..5, 0u16..20).prop_map(|(id, weight)| Op::Weight(id, weight)),
        1 => Just(Op::Tick),
    ];
    prop::collection::vec(op, 1..120)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Whatever happens: a pick takes connections, and there is one exactly when somebody does.
    #[test]
    fn picks_are_right_whatever_happens(method in 0usize..4, operations in operations()) {
        let mut spec = server(METHODS[method], &[3, 1, 0, 2, 1]);
        (spec.slow_start_s, spec.connections_max) = (20, 12);
        for backend in &mut spec.backends {
            backend.connections_max = 4;
        }
        let balancer = Balancer::compile(&[spec], None);
        let mut now_ns = 0;
        for operation in operations {
            now_ns += SECOND_NS / 2;
            match operation {
                Op::Open(number) => {
                    let before = status(&balancer);
                    let available = |id: usize| before.backends[id].up && !before.backends[id].draining;
                    let takes = |id: usize| available(id) && before.backends[id].live < 4;
                    match balancer.pick(0, &client(number), now_ns, number) {
                        Ok(pick) => {
                            prop_assert!(takes(usize::from(pick.backend)) && before.live < 12);
                            prop_assert_eq!(balancer.opened(0, pick.backend), Ok(()));
                        }
                        Err(DropReason::NoBackend) => prop_assert!(!(0..5).any(available)),
                        Err(reason) => {
                            prop_assert_eq!(reason, DropReason::ServerFull);
                            prop_assert!(before.live == 12 || !(0..5).any(takes));
                        }
                    }
                }
                Op::Close(id) if status(&balancer).backends[usize::from(id)].live > 0 => balancer.closed(id, false),
                Op::Close(_) => {}
                Op::Health(id, up) => drop(balancer.set_health(id, up, now_ns)),
                Op::Drain(id, draining) => drop(balancer.drain(id, draining)),
                Op::Weight(id, weight) => drop(balancer.set_weight(id, weight)),
                Op::Tick => balancer.tick(now_ns),
            }
            let status = status(&balancer);
            prop_assert_eq!(status.live, status.backends.iter().map(|backend| backend.live).sum::<u32>());
        }
    }
}

/// Of backends with equally few connections each gets as much, wherever busy ones stand between them.
#[test]
fn equals_have_equal_chances() {
    let balancer = Balancer::compile(&[server(BalanceMethod::LeastConnections, &[1; 7])], None);
    for busy in [1, 3, 5] {
        balancer.opened(0, busy).unwrap();
    }
    let mut counts = BTreeMap::<u16, u32>::new();
    for number in 0..4_000 {
        *counts.entry(pick(&balancer, number).unwrap().backend).or_default() += 1;
    }
    assert_eq!(counts.keys().copied().collect::<Vec<_>>(), [0, 2, 4, 6]);
    assert!(counts.values().all(|count| (850..=1_150).contains(count)), "{counts:?}");
}

/// With any method a client keeps its backend over ports, new backends and other weights; what takes nothing new loses it.
#[test]
fn clients_stay_with_their_backend() {
    use BalanceMethod::{LeastConnections, Maglev, RoundRobin, SourceAddress};
    for method in [Maglev, SourceAddress, LeastConnections, RoundRobin] {
        let with =
            |weights: &[u16]| ServerSpec { affinity: Affinity::SourceAddress, ..server(method, weights) };
        let balancer = Balancer::compile(&[with(&[1, 1, 1])], None);
        let pick = |balancer: &Balancer, client: u32, port: u16, now_ns: u64| {
            let src = IpAddr::V4((0xc633_6400 + client).into());
            let key = FlowKey { src, dst: src, src_port: port, dst_port: 80, protocol: TCP };
            let pick = balancer.pick(0, &key, now_ns, port.into()).unwrap();
            balancer.opened(0, pick.backend).unwrap();
            balancer.remember(pick.backend, src, true, now_ns);
            pick.backend
        };
        let first: Vec<u16> = (0..60).map(|client| pick(&balancer, client, 1_000, 1)).collect();
        assert!((0..3).all(|id| first.contains(&id)), "{method:?}: all are used");
        for port in 1_001..1_040 {
            let again: Vec<u16> = (0..60).map(|client| pick(&balancer, client, port, 2)).collect();
            assert_eq!(again, first, "{method:?}");
        }
        let grown = Balancer::compile(&[with(&[1, 1, 50, 50])], Some(&balancer));
        let again: Vec<u16> = (0..60).map(|client| pick(&grown, client, 7, 3)).collect();
        assert_eq!(again, first, "{method:?}");
        grown.set_health(0, false, 4);
        grown.drain(1, true);
        let moved: Vec<u16> = (0..60).map(|client| pick(&grown, client, 8, 5)).collect();
        for (before, now) in first.iter().zip(&moved) {
            assert!(*now >= 2 && (*before != 2 || *now == 2), "{method:?}: {before} {now}");
        }
        // They stay where they are now.
        grown.set_health(0, true, 6);
        grown.drain(1, false);
        let settled: Vec<u16> = (0..60).map(|client| pick(&grown, client, 9, 7)).collect();
        assert_eq!(settled, moved, "{method:?}");
    }
}
