//! Refusals: which packets are refused, who is told, and what rules may say about it.

use packet::DropReason;
use packet::FlowKey;
use packet::attachment::{Egress, Ingress};

use super::balancing::farm;
use super::world::*;
use crate::fragment::Variant;
use crate::pipeline::{Outcome, explain};
use crate::spec::{DeliveryMode, ForwardSpec, GatewaySpec, NatMode, RuleAction, RuleSpec, TCP, UDP};
use crate::tcp::State;

fn allow(name: &str, from: Ingress, to: Ingress, port: u16) -> RuleSpec {
    RuleSpec {
        name: name.to_owned(),
        from: side(from),
        to: side(to),
        dst_ports: vec![(port, port)],
        ..RuleSpec::default()
    }
}

fn home() -> GatewaySpec {
    let mut spec = two_interfaces();
    spec.nats.push(nat(NatMode::AddressAndPort, &["203.0.113.1"]));
    spec.forwards.push(ForwardSpec {
        protocol: TCP,
        listen: "203.0.113.1:8080".parse().unwrap(),
        to: "10.0.0.5:80".parse().unwrap(),
        tenant: 0,
        ports: 1,
        proxy_protocol: false,
    });
    spec.default_action = RuleAction::Drop;
    spec
}

/// A connection whose flow is gone, by a restart or its time: whoever is inside is reset with a number that it accepts; a service's
/// server gets the segment and says itself; nobody outside hears a reset of ours.
#[test]
fn forgotten_connections_are_told_inside_and_go_on_to_services() {
    let mut spec = home();
    spec.default_action = RuleAction::Allow;
    let mut world = World::new(4, spec);
    for port in 1_000..1_020 {
        let ack = tcp(&format!("10.0.0.9:{port}"), "198.51.100.7:80", ACK, 77, 4_711, b"late");
        let answers = world.dropped(LAN, &ack, DropReason::NotNew);
        let [reset] = &answers[..] else { panic!("{answers:?}") };
        assert_eq!((reset.by(), reset.key()), (LAN, FlowKey::of(&ack).unwrap().reversed()));
        assert_eq!((reset.packet[33] & RST, &reset.packet[24..28]), (RST, &4_711u32.to_be_bytes()[..]));
        // A reset is not answered, and neither is anything from outside.
        let reset = tcp(&format!("10.0.0.9:{port}"), "198.51.100.7:80", RST, 77, 0, b"");
        assert!(world.dropped(LAN, &reset, DropReason::NotNew).is_empty());
        let outside = tcp("198.51.100.7:80", &format!("203.0.113.1:{port}"), ACK, 1, 2, b"late");
        assert!(world.packet(WAN, &outside).iter().all(|left| left.by() == HOST));
    }
    let late = tcp("198.51.100.7:5000", "203.0.113.1:8080", ACK, 77, 4_711, b"late");
    let inside = world.one(WAN, &late).key();
    assert_eq!(inside, key(TCP, "198.51.100.7:5000", "10.0.0.5:80"));
    let answer = world.one(LAN, &tcp_of(&inside.reversed(), ACK, 4_711, 81, b"known"));
    assert_eq!(answer.key(), FlowKey::of(&late).unwrap().reversed());
}

/// "To the gateway" is where a packet is addressed to; the interface behind the translation matches too.
#[test]
fn rules_to_the_gateway_cover_forwards_servers_and_mappings() {
    let syn = tcp("198.51.100.7:5000", "203.0.113.1:8080", SYN, 1, 0, b"");
    for (to, passes) in [(HOST, true), (LAN, true), (WAN, false)] {
        let mut spec = home();
        spec.rules.push(allow("in", WAN, to, 8080));
        let mut world = World::new(2, spec.clone());
        if !passes {
            world.dropped(WAN, &syn, DropReason::DefaultDrop);
            continue;
        }
        let inside = world.one(WAN, &syn).key();
        assert_eq!(inside, key(TCP, "198.51.100.7:5000", "10.0.0.5:80"));
        // Decided again after a reload, even without the forward: by what it was addressed to.
        spec.forwards.clear();
        world.reload(spec);
        world.one(LAN, &tcp_of(&inside.reversed(), SYN | ACK, 7, 2, b""));
        assert_eq!(world.total(|counters| counters.flows_refused), 0);
    }
    let mut spec = farm(NatMode::None, DeliveryMode::Nat);
    spec.default_action = RuleAction::Drop;
    spec.rules.push(allow("web", WAN, HOST, 80));
    let mut world = World::new(2, spec);
    world.one(WAN, &tcp("198.51.100.7:5000", "203.0.113.10:80", SYN, 1, 0, b""));
    // Straight to a backend is not to the gateway.
    world.dropped(WAN, &tcp("198.51.100.7:5000", "10.0.0.11:80", SYN, 1, 0, b""), DropReason::DefaultDrop);
}

#[test]
fn a_server_without_backends_says_so() {
    let mut spec = farm(NatMode::None, DeliveryMode::Nat);
    let mut dns = spec.servers[0].clone();
    dns.name = "dns".to_owned();
    dns.protocol = UDP;
    spec.servers.push(dns);
    spec.limits.errors_per_s_max = 20;
    let mut world = World::new(1, spec.clone());
    let ids: Vec<u16> = world.policy.balancer.backends().map(|backend| backend.id).collect();
    for id in ids {
        world.policy.balancer.set_health(id, false, world.now_ns);
    }
    let syn = tcp("198.51.100.7:5000", "203.0.113.10:80", SYN, 77, 0, b"");
    let left = world.dropped(WAN, &syn, DropReason::NoBackend);
    assert_eq!((left.len(), left[0].by()), (1, WAN));
    assert_eq!(left[0].key(), key(TCP, "203.0.113.10:80", "198.51.100.7:5000"));
    assert_eq!(left[0].packet[28..34], [0, 0, 0, 78, 0x50, RST | ACK], "acknowledges the SYN");
    let query = udp("198.51.100.7:5000", "203.0.113.10:80", b"?");
    let left = world.dropped(WAN, &query, DropReason::NoBackend);
    assert_eq!((left[0].packet[9], left[0].packet[20], left[0].packet[21]), (1, 3, 3));
    assert_eq!(left[0].packet[12..16], [203, 0, 113, 10], "from the address that was asked");
    // Not without end.
    let told: usize = (0..200).map(|_| world.packet(WAN, &syn).len()).sum();
    assert!(told < 50, "{told}");
    assert_eq!(world.drops().get(DropReason::NoBackend), 202);
    // Whom a rule keeps away learns nothing.
    spec.rules.push(RuleSpec { action: RuleAction::Drop, ..allow("no", WAN, HOST, 80) });
    world.reload(spec);
    world.wait(5);
    assert!(world.dropped(WAN, &syn, DropReason::RuleDrop).is_empty());
}

#[test]
fn a_full_server_says_so_and_takes_the_next_when_one_ends() {
    let mut spec = farm(NatMode::None, DeliveryMode::Nat);
    spec.servers[0].connections_max = 2;
    let mut world = World::new(2, spec);
    let syn = |port: u16| tcp(&format!("198.51.100.7:{port}"), "203.0.113.10:80", SYN, 1, 0, b"");
    let first = world.one(WAN, &syn(1001)).key();
    world.one(WAN, &syn(1002));
    let left = world.dropped(WAN, &syn(1003), DropReason::ServerFull);
    assert_eq!(left[0].packet[33] & RST, RST);
    world.one(LAN, &tcp_of(&first.reversed(), RST | ACK, 0, 2, b""));
    world.one(WAN, &syn(1003));
    world.dropped(WAN, &syn(1004), DropReason::ServerFull);
}

/// RFC 5508 REQ-8: no session for lack of resources is told as "administratively prohibited".
#[test]
fn exhausted_ports_are_told_and_recover() {
    let mut spec = two_interfaces();
    let mut rule = nat(NatMode::AddressAndPort, &["203.0.113.7", "203.0.113.8"]);
    rule.ports = (5000, 5003);
    rule.tables = 1;
    spec.nats.push(rule);
    let mut world = World::new(1, spec);
    let packet = |number: u16| udp(&format!("10.0.0.{}:4000", 10 + number), "198.51.100.7:53", b"x");
    let mut outside = std::collections::BTreeSet::new();
    let mut refused = 0;
    for number in 0..12 {
        let before = world.drops();
        let left = world.packet(LAN, &packet(number));
        if world.new_drops(&before).is_empty() {
            outside.insert(format!("{}", left[0].key()));
            continue;
        }
        refused += 1;
        assert_eq!(world.new_drops(&before), [DropReason::NatPortsExhausted]);
        assert_eq!((left[0].by(), left[0].packet[20], left[0].packet[21]), (LAN, 3, 13));
    }
    assert_eq!((outside.len(), refused), (8, 4), "all ports of both addresses");
    // TCP is told the same way: a reset would speak for a server that was not asked.
    let before = world.drops();
    for number in 0..9u16 {
        let left = world
            .packet(LAN, &tcp(&format!("10.0.0.30:{}", 2000 + number), "198.51.100.7:80", SYN, 1, 0, b""));
        if number == 8 {
            assert_eq!(world.new_drops(&before), [DropReason::NatPortsExhausted]);
            assert_eq!((left[0].packet[9], left[0].packet[21]), (1, 13));
        }
    }
    world.wait(400);
    assert_eq!(world.flows(), 0);
    for number in 0..8 {
        world.one(LAN, &packet(number));
    }
}

#[test]
fn fragments_by_load_and_by_the_nats_flag() {
    let packet = udp("10.0.0.9:5000", "198.51.100.7:53", &[7; 1200]);
    let pass = |world: &mut World| -> usize {
        in_pieces(&packet, 400).iter().map(|piece| world.packet(LAN, piece).len()).sum()
    };
    let mut spec = two_interfaces();
    spec.nats.push(nat(NatMode::AddressAndPort, &["203.0.113.1"]));
    spec.limits.fragments = Variant::LoadBelow(50);
    for (load_percent, packets) in [(49, 1), (50, 4), (100, 4)] {
        let mut world = World::new(2, spec.clone());
        world.cores.iter_mut().for_each(|core| core.set_load_percent(load_percent));
        assert_eq!(pass(&mut world), packets, "{load_percent} %");
    }
    spec.limits.fragments = Variant::Rules;
    for (flag, packets) in [(false, 4), (true, 1)] {
        spec.nats[0].assemble_fragments = flag;
        let mut world = World::new(2, spec.clone());
        assert_eq!(pass(&mut world), packets, "the first packet of a flow");
        assert_eq!(pass(&mut world), packets, "and later ones");
    }
}

#[test]
fn rules_keep_their_counts_over_reloads() {
    let mut spec = two_interfaces();
    spec.rules = vec![allow("dns", LAN, WAN, 53), allow("web", LAN, WAN, 80)];
    let mut world = World::new(1, spec.clone());
    for number in 0..5u16 {
        world.one(LAN, &udp(&format!("10.0.0.9:{}", 1000 + number), "198.51.100.7:53", b"x"));
        world.one(LAN, &udp(&format!("10.0.0.9:{}", 1000 + number), "198.51.100.7:99", b"x"));
    }
    world.one(LAN, &udp("10.0.0.9:1000", "198.51.100.7:80", b"x"));
    assert_eq!(world.cores[0].rule_counters.hits, [5, 1, 5]);
    spec.rules.swap(0, 1);
    spec.rules.insert(1, allow("mail", LAN, WAN, 25));
    world.reload(spec);
    assert_eq!(world.cores[0].rule_counters.hits, [1, 0, 5, 5]);
}

#[test]
fn explain_tells_the_servers_own_translation_and_who_gets_the_reply() {
    for source in [NatMode::None, NatMode::PortOnly, NatMode::AddressAndPort] {
        let mut world = World::new(4, farm(source, DeliveryMode::Nat));
        for port in 2_000..2_040 {
            let request = key(TCP, &format!("198.51.100.7:{port}"), "203.0.113.10:80");
            let told = explain(&world.policy, &world.ownership, &request, WAN);
            assert_eq!(told.source.mode, source);
            assert_eq!(!told.source.addresses.is_empty(), source == NatMode::AddressAndPort);
            let inside = world.one(WAN, &tcp_of(&request, SYN, 1, 0, b"")).key();
            assert_eq!(told.destination.ip(), inside.dst);
            let reply = tcp_of(&inside.reversed(), SYN | ACK, 7, 2, b"");
            assert_eq!(told.cores.of_replies.map(usize::from), Some(world.reader(LAN, &reply)), "{source:?}");
        }
    }
    let world = World::new(4, farm(NatMode::None, DeliveryMode::DirectReturn));
    let request = key(TCP, "198.51.100.7:2000", "203.0.113.10:80");
    assert_eq!(explain(&world.policy, &world.ownership, &request, WAN).cores.of_replies, None);
}

/// Anybody can send a SYN and an ACK in somebody's name. Only who acknowledges more has heard something.
#[test]
fn forged_direct_return_connections_do_not_last() {
    let mut world = World::new(1, farm(NatMode::None, DeliveryMode::DirectReturn));
    let request = |port: u16| key(TCP, &format!("198.51.100.7:{port}"), "203.0.113.10:80");
    for port in 1_000..1_100 {
        world.one(WAN, &tcp_of(&request(port), SYN, 1, 0, b""));
        world.one(WAN, &tcp_of(&request(port), ACK, 2, 77, b""));
        world.one(WAN, &tcp_of(&request(port), ACK, 2, 77, b"GET / HTTP/1.1"));
    }
    assert_eq!(world.cores[0].embryonic(), 100, "still unanswered");
    world.one(WAN, &tcp_of(&request(1_000), ACK, 16, 1_077, b""));
    assert_eq!(world.cores[0].embryonic(), 99);
    world.wait(260);
    assert_eq!(world.flows(), 1);
    let (mut flows, _) = world.cores[0].flows().scan(0, 10);
    let record = *world.cores[0].flows().record(flows.next().unwrap());
    assert_eq!(State::of(&record), State::Established);
    world.wait(7_440);
    assert_eq!((world.flows(), world.cores[0].embryonic()), (0, 0));
}

/// A backend of one server that keeps sources and of one that does not, and the gateway's own checks of it.
#[test]
fn replies_to_the_gateways_addresses_visit_no_other_core() {
    let mut spec = farm(NatMode::None, DeliveryMode::Nat);
    let mut second = farm(NatMode::AddressAndPort, DeliveryMode::Nat).servers.remove(0);
    second.name = "second".to_owned();
    second.listen = "203.0.113.11:80".parse().unwrap();
    spec.servers.push(second);
    let mut world = World::new(4, spec);
    for port in 2_000..2_200u16 {
        let request = key(TCP, &format!("198.51.100.7:{port}"), "203.0.113.11:80");
        let inside = world.one(WAN, &tcp_of(&request, SYN, 1, 0, b"")).key();
        world.one(LAN, &tcp_of(&inside.reversed(), SYN | ACK, 7, 2, b""));
        // An answer to a health check, whose question left by the host's own stack.
        let check = tcp("10.0.0.11:80", &format!("10.0.0.1:{}", 40_000 + port), SYN | ACK, 5, 6, b"");
        assert_eq!(world.one(LAN, &check).by(), HOST);
    }
    assert_eq!(world.total(|counters| counters.handed_out), 0);
}

/// Each rule tells what it had no port for and whom it found to have enough, and goes on counting over a reload.
#[test]
fn refusals_are_counted_by_rule() {
    let mut spec = two_interfaces();
    for (from, ports, flows_max) in [("10.0.0.0/28", 5003, 100), ("10.0.0.16/28", 60_000, 2)] {
        let mut rule = nat(NatMode::AddressAndPort, &["203.0.113.7"]);
        (rule.ports, rule.tables, rule.flows_per_client_max) = ((5000, ports), 1, flows_max);
        rule.from = vec![from.parse().unwrap()];
        spec.nats.push(rule);
    }
    let mut world = World::new(1, spec.clone());
    let ask = |world: &mut World, client: &str, flows: std::ops::Range<u16>| {
        for port in flows {
            let dst = "198.51.100.7:53";
            world.packet(LAN, &udp(&format!("{client}:{}", 2000 + port), dst, b"x"));
        }
    };
    ask(&mut world, "10.0.0.20", 0..5);
    ask(&mut world, "10.0.0.9", 0..11);
    let counts = |world: &World| -> Vec<_> {
        let all = world.cores[0].rule_counters.nat_refusals.iter();
        all.map(|rule| (rule.exhausted_flows, rule.over_limit_flows)).collect()
    };
    assert_eq!(counts(&world), [(7, 0), (0, 3)]);
    spec.nats.swap(0, 1);
    spec.nats.insert(0, nat(NatMode::AddressAndPort, &["203.0.113.8"]));
    spec.nats[0].from = vec!["10.0.0.200/32".parse().unwrap()];
    world.reload(spec);
    ask(&mut world, "10.0.0.20", 5..6);
    assert_eq!(counts(&world), [(0, 0), (0, 4), (7, 0)]);
}

/// Answers to the host pass whatever the default is, so the default decides nothing; questions to it are decided.
#[test]
fn the_default_counts_what_it_decided() {
    for action in [RuleAction::Drop, RuleAction::Reject, RuleAction::Allow] {
        let mut spec = two_interfaces();
        spec.default_action = action;
        let mut world = World::new(1, spec);
        for _ in 0..5 {
            let left = world.one(WAN, &udp("198.51.100.7:53", "203.0.113.1:40000", b"answer"));
            assert_eq!(left.outcome, Outcome::Forward(Egress::Host));
            let answer = tcp("198.51.100.7:80", "203.0.113.1:40000", SYN | ACK, 1, 2, b"");
            assert_eq!(world.one(WAN, &answer).outcome, Outcome::Forward(Egress::Host));
        }
        assert_eq!(world.cores[0].rule_counters.hits, [0], "{action:?}");
        world.packet(WAN, &udp("198.51.100.7:53", "203.0.113.1:53", b"question"));
        world.packet(WAN, &tcp("198.51.100.7:80", "203.0.113.1:22", SYN, 1, 0, b""));
        world.packet(LAN, &udp("10.0.0.9:1", "198.51.100.7:53", b"x"));
        assert_eq!(world.cores[0].rule_counters.hits, [3], "{action:?}");
    }
}

/// A NAT of one family, or of some clients: what it leaves alone may go on without its beginning, as where there is none.
#[test]
fn connections_beside_a_nat_go_on() {
    let mut spec = two_interfaces();
    spec.nats.push(nat(NatMode::AddressAndPort, &["203.0.113.1"]));
    spec.nats[0].from = vec!["10.0.0.0/25".parse().unwrap()];
    let mut world = World::new(4, spec);
    for (src, dst) in [("[fd00::9]:5000", "[2001:db8:7::7]:80"), ("10.0.0.200:5000", "198.51.100.7:80")] {
        let late = tcp(src, dst, ACK, 77, 4_711, b"late");
        let left = world.one(LAN, &late);
        assert_eq!((left.by(), left.key()), (WAN, FlowKey::of(&late).unwrap()));
        let answer = tcp(dst, src, ACK, 4_711, 81, b"known");
        assert_eq!(world.one(WAN, &answer).by(), LAN);
    }
    let late = tcp("10.0.0.9:5000", "198.51.100.7:80", ACK, 77, 4_711, b"late");
    assert_eq!(world.dropped(LAN, &late, DropReason::NotNew).len(), 1, "a reset");
}
