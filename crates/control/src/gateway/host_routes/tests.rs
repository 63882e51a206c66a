#![allow(clippy::unwrap_used, reason = "tests")]

use linux::netlink::RuleSpec;

use super::*;
use crate::config::tests::config;
use crate::gateway::overrides::Overrides;
use crate::gateway::policy::gateway_spec;
use crate::gateway::policy::tests::facts;
use crate::host_facts::KernelRoute;

const BASE: &str = "[[interface]]\nname = \"wan\"\ndevice = \"eth0\"\n[[interface]]\nname = \"lan\"\ndevice = \"eth1\"\n\
                    address = \"10.0.0.254/24\"\n";

fn route(table: u32, prefix: &str, via: Option<&str>, device: u32) -> KernelRoute {
    let mut route = facts().routes[0].clone();
    route.table = table;
    route.prefix = prefix.parse().unwrap();
    route.via = via.map(|via| via.parse().unwrap());
    route.device = device;
    route
}

fn rule(priority: u32, action: PolicyAction) -> PolicyRule {
    let table = if let PolicyAction::Table(table) = action { table } else { 0 };
    PolicyRule {
        spec: RuleSpec { protocol: 2, ..RuleSpec::new(Family::V4, priority, table) },
        action,
        protocol: None,
        src_ports: None,
        dst_ports: None,
        special: false,
    }
}

fn usual() -> Vec<PolicyRule> {
    [(0, 255), (32_766, 254), (32_767, 253)].map(|(at, table)| rule(at, PolicyAction::Table(table))).to_vec()
}

fn lines(rules: &[RouteRuleSpec]) -> Vec<String> {
    let line = |rule: &RouteRuleSpec| {
        let mut text = format!("{:?}", rule.action);
        for (name, net) in [("from", rule.from), ("to", rule.to)] {
            net.iter().for_each(|net| text.push_str(&format!(" {name} {net}")));
        }
        rule.ingresses.iter().for_each(|list| text.push_str(&format!(" in {list:?}")));
        text + if rule.invert { " not" } else { "" }
    };
    rules.iter().filter(|rule| rule.ipv4).map(line).collect()
}

#[test]
fn the_kernels_own_rules_are_none_for_us() {
    let mut facts = facts();
    facts.rules = usual();
    let spec = gateway_spec(&config("", BASE), &facts, &Overrides::default());
    assert!(spec.route_rules.is_empty());
    assert!(spec.routes.iter().all(|route| route.table == MAIN_TABLE));
}

/// A tunnel of the host's IPsec without a device of its own, with an exception and a ban before it.
#[test]
fn what_is_under_ipsec_is_the_kernels() {
    let policy = |outward, to: &str, action| IpsecPolicy {
        outward,
        priority: 0,
        index: 0,
        from: "10.0.0.0/24".parse().unwrap(),
        to: to.parse().unwrap(),
        protocol: None,
        src_ports: None,
        dst_ports: None,
        action,
    };
    let mut facts = facts();
    facts.rules = usual();
    facts.ipsec = vec![
        policy(true, "10.9.7.0/24", IpsecAction::Pass),
        policy(true, "10.9.8.0/24", IpsecAction::Block),
        policy(true, "10.9.0.0/16", IpsecAction::Protect),
        policy(false, "10.8.0.0/16", IpsecAction::Protect),
    ];
    let spec = gateway_spec(&config("", BASE), &facts, &Overrides::default());
    let ipsec = format!("Table {{ table: {}, longer_than: None }} from 10.0.0.0/24 to ", u32::MAX);
    let refused = "Refuse(Blackhole) from 10.0.0.0/24 to 10.9.8.0/24";
    let told = lines(&spec.route_rules);
    assert_eq!(
        told[..5],
        [
            "Table { table: 0, longer_than: None }".to_owned(),
            "Goto(4) from 10.0.0.0/24 to 10.9.7.0/24".to_owned(),
            refused.to_owned(),
            ipsec.clone() + "10.9.0.0/16",
            ipsec + "10.8.0.0/16",
        ]
    );
    assert!(told[5].contains("table: 254"), "{told:?}");
    let of_ipsec: Vec<_> = spec.routes.iter().filter(|route| route.table == u32::MAX).collect();
    assert!(
        of_ipsec.iter().all(|route| route.egress == Egress::Kernel && route.action == RouteAction::Forward)
    );
    assert_eq!(of_ipsec.len(), 1, "of IPv6 there is no policy");
}

#[test]
fn rules_keep_their_order_and_lose_what_never_matches_here() {
    let mut facts = facts();
    facts.rules = usual();
    let with = |priority, action, change: &dyn Fn(&mut PolicyRule)| {
        let mut rule = rule(priority, action);
        change(&mut rule);
        rule
    };
    let table = PolicyAction::Table;
    facts.rules.extend([
        with(100, table(100), &|rule| rule.spec.from = Some("10.0.7.0/24".parse().unwrap())),
        with(101, table(101), &|rule| rule.spec.iif = Some("eth1".to_owned())),
        with(102, table(102), &|rule| rule.spec.iif = Some("eth7".to_owned())),
        // Marks, sockets, users: nothing of what is passed on.
        with(103, table(103), &|rule| rule.spec.mark = Some((1, 0xff))),
        with(104, table(104), &|rule| rule.spec.oif = Some("eth0".to_owned())),
        with(105, table(105), &|rule| rule.special = true),
        // As wg-quick writes it: everything without the mark.
        with(106, table(106), &|rule| {
            rule.spec.mark = Some((51_820, u32::MAX));
            rule.spec.invert = true;
        }),
        with(107, table(254), &|rule| rule.spec.suppress_prefix_length = Some(0)),
        with(108, PolicyAction::Goto(110), &|_| {}),
        with(109, PolicyAction::Refuse(RouteKind::Blackhole), &|_| {}),
        with(110, PolicyAction::Nop, &|_| {}),
        // A DHCP client's table for the link's own address.
        with(111, table(111), &|rule| rule.spec.from = Some("203.0.113.1/32".parse().unwrap())),
    ]);
    let spec = gateway_spec(&config("", BASE), &facts, &Overrides::default());
    let plain = |table| format!("Table {{ table: {table}, longer_than: None }}");
    assert_eq!(
        lines(&spec.route_rules),
        [
            plain(0),
            plain(100) + " from 10.0.7.0/24",
            plain(101) + " in [Interface(InterfaceId(1))]",
            plain(102) + " in []",
            plain(106),
            "Table { table: 254, longer_than: Some(0) }".to_owned(),
            "Goto(8)".to_owned(),
            "Refuse(Blackhole)".to_owned(),
            plain(111) + " from 203.0.113.1/32",
            plain(254),
            plain(253),
            plain(111),
        ]
    );
}

#[test]
fn a_vrf_is_a_table_for_what_comes_in_by_its_devices() {
    let mut facts = facts();
    facts.devices[2].vrf = Some(("red".to_owned(), 10));
    facts.rules = usual();
    facts.rules.push(rule(1_000, PolicyAction::Vrf));
    facts.routes.push(route(10, "10.0.0.0/24", None, 3));
    let spec = gateway_spec(&config("", BASE), &facts, &Overrides::default());
    assert_eq!(
        lines(&spec.route_rules)[1],
        "Table { table: 10, longer_than: None } in [Interface(InterfaceId(1))]"
    );
    // The main table has its network only if the kernel's has it.
    let connected = |table| {
        spec.routes
            .iter()
            .filter(|route| route.table == table && route.prefix.to_string() == "10.0.0.0/24")
            .count()
    };
    assert_eq!((connected(10), connected(MAIN_TABLE)), (1, 1));
    facts.routes.retain(|route| route.table == 10);
    let spec = gateway_spec(&config("", BASE), &facts, &Overrides::default());
    assert!(
        !spec
            .routes
            .iter()
            .any(|route| route.table == MAIN_TABLE && route.prefix.to_string() == "10.0.0.0/24")
    );
}

#[test]
fn refusals_and_several_ways_reach_the_datapath() {
    let mut facts = facts();
    let refusing = |prefix: &str, kind| KernelRoute { kind, ..route(254, prefix, None, 0) };
    facts.routes = vec![
        refusing("192.0.2.0/28", RouteKind::Blackhole),
        refusing("192.0.2.16/28", RouteKind::Prohibit),
        KernelRoute { metric: 1, ..refusing("192.0.2.32/28", RouteKind::Unreachable) },
        KernelRoute { metric: 0, ..route(254, "192.0.2.32/28", Some("203.0.113.254"), 2) },
        KernelRoute { weight: 3, ..route(254, "0.0.0.0/0", Some("203.0.113.254"), 2) },
        KernelRoute { weight: 2, place: 1, ..route(254, "0.0.0.0/0", Some("fe80::9"), 3) },
        // Not a device of the gateway's.
        KernelRoute { place: 2, ..route(254, "0.0.0.0/0", Some("192.0.2.1"), 7) },
        route(254, "198.51.100.0/24", Some("10.0.0.9"), 3),
        // The second way of a route whose first one does not work.
        KernelRoute { place: 1, ..route(254, "198.51.101.0/24", Some("10.0.0.9"), 3) },
    ];
    let spec = gateway_spec(&config("", BASE), &facts, &Overrides::default());
    let of = |prefix: &str| {
        let list = spec.routes.iter().filter(|route| route.prefix.to_string() == prefix);
        list.map(|route| (route.action, route.weight, route.joins)).collect::<Vec<_>>()
    };
    assert_eq!(of("192.0.2.0/28"), [(RouteAction::Blackhole, 1, false)]);
    assert_eq!(of("192.0.2.16/28"), [(RouteAction::Prohibit, 1, false)]);
    assert_eq!(of("192.0.2.32/28"), [(RouteAction::Forward, 1, false)], "the lower metric");
    assert_eq!(of("0.0.0.0/0"), [(RouteAction::Forward, 3, false), (RouteAction::Forward, 2, true)]);
    assert_eq!(of("198.51.100.0/24"), [(RouteAction::Forward, 1, false)]);
    assert_eq!(of("198.51.101.0/24"), [(RouteAction::Forward, 1, false)]);
}

/// RFC 4861 §6.2.7: a host inside that claims to be a router does not become ours.
#[test]
fn a_default_route_that_a_host_inside_claims_does_not_count() {
    let mut facts = facts();
    let learned =
        |protocol, device| KernelRoute { protocol, ..route(254, "0.0.0.0/0", Some("10.0.0.66"), device) };
    let out = |facts: &HostFacts, rest: &str| {
        let spec = gateway_spec(&config("", &format!("{BASE}{rest}")), facts, &Overrides::default());
        let default = spec.routes.iter().rfind(|route| route.prefix.prefix_len() == 0);
        default.and_then(|route| route.egress.interface()).map(|id| id.0)
    };
    let nat = "[[nat]]\nout = \"wan\"\n";
    for protocol in [9, 16] {
        facts.routes = vec![learned(protocol, 3), KernelRoute { metric: 2_000, ..learned(protocol, 2) }];
        assert_eq!(out(&facts, nat), Some(0));
        facts.routes.truncate(1);
        assert_eq!(out(&facts, nat), None);
        // Where nothing says which interface leads out, any may.
        assert_eq!(out(&facts, ""), Some(1));
    }
    // The operator's own is the operator's own.
    facts.routes = vec![learned(4, 3)];
    assert_eq!(out(&facts, nat), Some(1));
}
