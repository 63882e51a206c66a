//! Rules, tenants, limits (rows R5, R11).

use packet::DropReason;

use super::world::*;
use crate::pipeline::Outcome;
use crate::spec::{ForwardSpec, GatewaySpec, GroupSpec, NatMode, RuleAction, RuleSpec, SideSpec, TCP};

fn rule(action: RuleAction, to: &str) -> RuleSpec {
    RuleSpec {
        name: format!("{action:?} {to}"),
        action,
        to: SideSpec { prefixes: vec![to.parse().unwrap()], ..SideSpec::default() },
        ..RuleSpec::default()
    }
}

fn with_rules(rules: Vec<RuleSpec>, default_action: RuleAction) -> GatewaySpec {
    GatewaySpec { rules, default_action, ..two_interfaces() }
}

#[test]
fn the_first_rule_that_matches_decides_and_replies_pass() {
    let rules = vec![rule(RuleAction::Allow, "198.51.100.0/25"), rule(RuleAction::Drop, "198.51.100.0/24")];
    let mut world = World::new(2, with_rules(rules, RuleAction::Drop));
    let allowed = world.one(LAN, &udp("10.0.0.9:1", "198.51.100.1:53", b"x"));
    world.one(WAN, &udp_of(&allowed.key().reversed(), b"y"));
    world.dropped(LAN, &udp("10.0.0.9:1", "198.51.100.200:53", b"x"), DropReason::RuleDrop);
    world.dropped(LAN, &udp("10.0.0.9:1", "192.0.2.1:53", b"x"), DropReason::DefaultDrop);
    world.dropped(WAN, &udp("198.51.100.1:53", "10.0.0.9:2", b"x"), DropReason::DefaultDrop);
}

#[test]
fn reject_tells_the_sender() {
    let mut world =
        World::new(1, with_rules(vec![rule(RuleAction::Reject, "198.51.100.0/24")], RuleAction::Allow));
    let left =
        world.dropped(LAN, &tcp("10.0.0.9:7", "198.51.100.1:80", SYN, 5, 0, b""), DropReason::RuleReject);
    assert_eq!(left.len(), 1);
    assert_eq!((left[0].by(), left[0].key()), (LAN, key(TCP, "198.51.100.1:80", "10.0.0.9:7")));
    assert_eq!(left[0].packet[33] & RST, RST);
    let left = world.dropped(LAN, &udp("10.0.0.9:7", "198.51.100.1:80", b"x"), DropReason::RuleReject);
    assert_eq!((left[0].packet[9], left[0].packet[20], left[0].packet[21]), (1, 3, 13));
}

/// Done means: a reload loses no flow, and its new rules are in force for old flows too.
#[test]
fn a_reload_decides_every_flow_again() {
    let mut world = World::new(2, two_interfaces());
    let flows: Vec<_> =
        (1..=200u8).map(|last| key(17, "10.0.0.9:5", &format!("198.51.100.{last}:53"))).collect();
    for flow in &flows {
        world.one(LAN, &udp_of(flow, b"x"));
        world.one(WAN, &udp_of(&flow.reversed(), b"y"));
    }
    world.reload(with_rules(vec![rule(RuleAction::Drop, "198.51.100.128/25")], RuleAction::Allow));
    for (number, flow) in flows.iter().enumerate() {
        let reply = udp_of(&flow.reversed(), b"z");
        if number + 1 < 128 {
            assert_eq!(world.one(WAN, &reply).key(), flow.reversed());
        } else {
            world.dropped(WAN, &reply, DropReason::RuleDrop);
        }
    }
    assert_eq!(world.total(|counters| counters.flows_opened), 200);
    assert_eq!(world.total(|counters| counters.flows_refused), 73);
}

#[test]
fn address_groups_change_while_running() {
    let mut spec = with_rules(Vec::new(), RuleAction::Allow);
    spec.groups.push(GroupSpec { name: "bad".to_owned(), members: vec!["192.0.2.0/24".parse().unwrap()] });
    spec.rules.push(RuleSpec {
        action: RuleAction::Drop,
        from: SideSpec { groups: vec![0], ..SideSpec::default() },
        ..RuleSpec::default()
    });
    let mut world = World::new(2, spec.clone());
    world.dropped(WAN, &udp("192.0.2.9:1", "10.0.0.9:2", b"x"), DropReason::RuleDrop);
    world.one(WAN, &udp("198.51.100.9:1", "10.0.0.9:2", b"x"));
    spec.groups[0].members = vec!["198.51.100.9/32".parse().unwrap()];
    world.reload(spec);
    world.one(WAN, &udp("192.0.2.9:1", "10.0.0.9:2", b"x"));
    world.dropped(WAN, &udp("198.51.100.9:1", "10.0.0.9:2", b"x"), DropReason::RuleDrop);
}

/// Row R11 and R4: two tenants with the same addresses never meet.
#[test]
fn tenants_may_use_the_same_addresses() {
    use crate::spec::{InterfaceSpec, NatMode, RouteSpec};
    let mut spec = two_interfaces();
    spec.nats.push(nat(NatMode::AddressAndPort, &["203.0.113.1"]));
    spec.tenants.push("red".to_owned());
    let lan = spec.interfaces[0].clone();
    spec.interfaces.push(InterfaceSpec {
        name: "red".to_owned(),
        device: "red".to_owned(),
        tenant: 1,
        ..lan
    });
    spec.routes.push(RouteSpec::new(1, "10.0.0.0/24".parse().unwrap(), THIRD.into(), None));
    let mut world = World::new(3, spec);
    for last in 2..100u8 {
        let question = udp(&format!("10.0.0.{last}:5000"), "198.51.100.7:53", b"same");
        let blue = world.one(LAN, &question);
        let red = world.one(THIRD, &question);
        assert_ne!(blue.key(), red.key(), "two flows");
        assert_eq!(world.one(WAN, &udp_of(&red.key().reversed(), b"r")).by(), THIRD);
        assert_eq!(world.one(WAN, &udp_of(&blue.key().reversed(), b"b")).by(), LAN);
    }
    assert_eq!(world.total(|counters| counters.replies_on_wrong_core), 0);
}

#[test]
fn floods_leave_established_flows_alive() {
    let mut spec = two_interfaces();
    spec.limits.embryonic_max = 500;
    spec.limits.flows_max = 1_000;
    let mut world = World::new(1, spec);
    let flow = key(17, "10.0.0.9:5", "198.51.100.1:53");
    world.one(LAN, &udp_of(&flow, b"x"));
    world.one(WAN, &udp_of(&flow.reversed(), b"y"));
    for number in 0..5_000u64 {
        let bits = mix(number);
        let from = format!("192.0.{}.{}:{}", bits % 200, 1 + (bits >> 8) % 250, 1 + (bits >> 16) % 60_000);
        world.packet(WAN, &tcp(&from, "10.0.0.77:80", SYN, 1, 0, b""));
        world.packet(WAN, &udp(&from, "10.0.0.78:80", b"flood"));
    }
    assert!(world.flows() <= 501, "{}", world.flows());
    assert!(world.drops().get(DropReason::EmbryonicFull) > 4_000);
    assert_eq!(world.one(WAN, &udp_of(&flow.reversed(), b"still here")).key(), flow.reversed());
    // Under pressure what nobody answers goes after seconds, and there is room again.
    world.wait(10);
    world.one(WAN, &udp("192.0.2.1:1", "10.0.0.79:80", b"new"));
}

/// The host's own firewall decides: neither our default nor what NAT hides refuses anything, whatever port an answer goes to.
#[test]
fn a_native_host_gets_everything_by_the_device_it_came_by() {
    let rules = vec![rule(RuleAction::Allow, "198.51.100.0/24")];
    let mut spec = native(with_rules(rules, RuleAction::Drop));
    spec.nats = vec![nat(NatMode::AddressAndPort, &["203.0.113.1"])];
    for cores in [1, 4] {
        let mut world = World::new(cores, spec.clone());
        for (ingress, packet) in [
            (LAN, tcp("10.0.0.9:7", "10.0.0.1:22", SYN, 1, 0, b"")),
            (WAN, tcp("198.51.100.7:80", "203.0.113.1:40000", SYN | ACK, 1, 2, b"")),
            (WAN, tcp("198.51.100.7:80", "203.0.113.1:22", SYN, 1, 0, b"")),
            (WAN, udp("198.51.100.7:53", "203.0.113.1:1024", b"answer")),
            (WAN, udp("198.51.100.7:123", "203.0.113.1:123", b"answer")),
            (
                WAN,
                ip("198.51.100.7".parse().unwrap(), "203.0.113.1".parse().unwrap(), 50, b"ESP of the host"),
            ),
            (WAN, echo("198.51.100.7", "203.0.113.1", 0, 3)),
        ] {
            let left = world.one(ingress, &packet);
            assert_eq!(left.outcome, Outcome::DeviceIngress(ingress.interface().unwrap()));
            assert_eq!(left.packet, packet, "unchanged");
        }
        assert_eq!(world.flows(), 0);
        // What is of a translated flow is not the host's.
        let out = world.one(LAN, &udp("10.0.0.9:1", "198.51.100.7:53", b"x"));
        let back = world.one(WAN, &udp_of(&out.key().reversed(), b"y"));
        assert_eq!((back.by(), back.key().dst), (LAN, "10.0.0.9".parse().unwrap()));
    }
}

/// Without a rule, strangers reach only the gateway, its services and what they were asked by.
#[test]
fn nothing_passes_through_from_outside_unasked() {
    let mut spec = native(two_interfaces());
    spec.interfaces[1].through_action = Some(RuleAction::Drop);
    spec.forwards = vec![ForwardSpec {
        protocol: TCP,
        listen: "203.0.113.1:80".parse().unwrap(),
        to: "10.0.0.9:80".parse().unwrap(),
        tenant: 0,
        ports: 1,
        proxy_protocol: false,
    }];
    let mut world = World::new(2, spec);
    world.dropped(WAN, &tcp("198.51.100.7:5", "10.0.0.9:80", SYN, 1, 0, b""), DropReason::DefaultDrop);
    world.dropped(WAN, &udp("[2001:db8:7::7]:5", "[fd00::9]:80", b"x"), DropReason::DefaultDrop);
    let forwarded = world.one(WAN, &tcp("198.51.100.7:5", "203.0.113.1:80", SYN, 1, 0, b""));
    assert_eq!(forwarded.by(), LAN);
    assert_eq!(world.one(WAN, &tcp("198.51.100.7:5", "203.0.113.1:22", SYN, 1, 0, b"")).by(), HOST);
    // Who lives outside as well may use it as a router to where it came from.
    let left = world.packet(WAN, &udp("203.0.113.9:5", "198.51.100.7:53", b"x"));
    assert_eq!(left.iter().map(Left::by).collect::<Vec<_>>(), [WAN, WAN], "with a redirect to the router");
    let asked = world.one(LAN, &udp("[fd00::9]:80", "[2001:db8:7::7]:5", b"x"));
    assert_eq!(world.one(WAN, &udp_of(&asked.key().reversed(), b"y")).by(), LAN);
}

/// Rules about the gateway hold; what answers the host was never asked about.
#[test]
fn rules_about_a_native_host_hold() {
    let mut world =
        World::new(2, native(with_rules(vec![rule(RuleAction::Drop, "203.0.113.1/32")], RuleAction::Allow)));
    world.dropped(WAN, &tcp("198.51.100.7:80", "203.0.113.1:22", SYN, 1, 0, b""), DropReason::RuleDrop);
    world.dropped(WAN, &udp("198.51.100.7:5", "203.0.113.1:53", b"x"), DropReason::RuleDrop);
    world.dropped(WAN, &echo("198.51.100.7", "203.0.113.1", 8, 3), DropReason::RuleDrop);
    world.one(WAN, &tcp("198.51.100.7:80", "203.0.113.1:40000", SYN | ACK, 1, 2, b""));
    world.one(WAN, &udp("198.51.100.7:53", "203.0.113.1:40000", b"answer"));
    world.one(WAN, &echo("198.51.100.7", "203.0.113.1", 0, 3));
}

#[test]
fn what_is_for_the_gateway_goes_to_its_stack() {
    let mut world = World::new(2, two_interfaces());
    for packet in [
        tcp("10.0.0.9:7", "10.0.0.1:22", SYN, 1, 0, b""),
        udp("10.0.0.9:7", "10.0.0.1:53", b"x"),
        echo("10.0.0.9", "10.0.0.1", 8, 3),
    ] {
        let left = world.one(LAN, &packet);
        assert_eq!((left.by(), &left.packet), (HOST, &packet), "unchanged");
    }
}

/// Answers of a DHCP server to an address that the host does not have yet are the host's, whatever rules say; those to a client behind
/// us, which asked through us, are the client's.
#[test]
fn answers_of_dhcp_servers_are_the_hosts_or_a_clients() {
    let mut spec = native(two_interfaces());
    spec.default_action = RuleAction::Allow;
    spec.rules.push(RuleSpec { action: RuleAction::Drop, from: side(WAN), ..RuleSpec::default() });
    let mut world = World::new(2, spec);
    let answer = |to: &str| udp("203.0.113.254:67", to, b"answer");
    let own = world.one(WAN, &answer("203.0.113.60:68"));
    assert_eq!(own.outcome, Outcome::DeviceIngress(WAN_ID));
    assert_eq!(
        world.one(WAN, &answer("10.0.0.9:68")).outcome,
        Outcome::DeviceIngress(WAN_ID),
        "nobody asked"
    );
    assert_eq!(world.one(LAN, &udp("10.0.0.9:68", "203.0.113.254:67", b"renew")).by(), WAN);
    assert_eq!(world.one(WAN, &answer("10.0.0.9:68")).by(), LAN);
    let relayed = udp("203.0.113.254:67", "203.0.113.60:67", b"relayed");
    world.dropped(WAN, &relayed, DropReason::RuleDrop);
}

/// Rules are asked about packets that the kernel passes on to its other devices, whatever port it is for; only the host itself asks from ports that the
/// kernel gives.
#[test]
fn rules_hold_for_datagrams_that_the_kernel_passes_on() {
    let kernel = packet::attachment::Egress::Kernel;
    let mut spec = native(with_rules(vec![rule(RuleAction::Drop, "0.0.0.0/0")], RuleAction::Allow));
    spec.routes.push(crate::spec::RouteSpec::new(0, "10.8.0.0/24".parse().unwrap(), kernel, None));
    let mut world = World::new(2, spec);
    for port in [53, 40_000] {
        let packet = udp("198.51.100.7:5", &format!("10.8.0.2:{port}"), b"x");
        world.dropped(WAN, &packet, DropReason::RuleDrop);
    }
    world.one(WAN, &udp("198.51.100.7:53", "203.0.113.1:40000", b"answer"));
}
