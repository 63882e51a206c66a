#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use packet::attachment::InterfaceId;
use proptest::prelude::*;

fn route(tenant: u16, prefix: &str, interface: u16) -> RouteSpec {
    let egress = Egress::Interface(InterfaceId(interface));
    RouteSpec::new(tenant, prefix.parse().unwrap(), egress, None)
}

fn interface(fib: &Fib, tenant: u16, dst: &str) -> Option<u16> {
    fib.lookup(tenant, dst.parse().unwrap())?.egress.interface().map(|id| id.0)
}

#[test]
fn longest_prefix_of_the_own_table_then_the_shared_one() {
    let fib = Fib::compile(
        &[
            route(0, "0.0.0.0/0", 1),
            route(0, "10.0.0.0/8", 2),
            route(0, "10.1.0.0/16", 3),
            route(0, "::/0", 4),
            route(7, "10.0.0.0/8", 5),
            route(8, "0.0.0.0/0", 6),
            route(8, "2001:db8::/32", 7),
        ],
        &[],
    );
    let cases = [
        (0, "10.1.2.3", Some(3)),
        (0, "10.2.2.3", Some(2)),
        (0, "11.2.2.3", Some(1)),
        (0, "2001:db8::1", Some(4)),
        // Its own /8 wins over the shared /16: overlapping addresses are its own.
        (7, "10.1.2.3", Some(5)),
        (7, "11.1.2.3", Some(1)),
        // Its default route hides the shared default route, nothing else.
        (8, "11.1.2.3", Some(6)),
        (8, "10.1.2.3", Some(3)),
        (8, "2001:db8::1", Some(7)),
        (8, "2001:db9::1", Some(4)),
        // No table of its own.
        (9, "10.2.2.3", Some(2)),
    ];
    for (tenant, dst, want) in cases {
        assert_eq!(interface(&fib, tenant, dst), want, "tenant {tenant} to {dst}");
    }
    assert_eq!(fib.len(), 7);
}

#[test]
fn nothing_matches_in_an_empty_table_or_the_other_family() {
    let empty = Fib::compile(&[], &[]);
    assert!(empty.is_empty());
    assert_eq!(interface(&empty, 0, "10.0.0.1"), None);
    let fib = Fib::compile(&[route(0, "0.0.0.0/0", 1)], &[]);
    assert_eq!(interface(&fib, 0, "::1"), None);
}

#[test]
fn the_last_of_equal_prefixes_counts_and_host_bits_do_not() {
    let fib = Fib::compile(&[route(0, "10.0.0.0/8", 1), route(0, "10.9.9.9/8", 2)], &[]);
    assert_eq!((interface(&fib, 0, "10.0.0.1"), fib.len()), (Some(2), 1));
    let found = fib.find(&RouteQuery::to(3, "10.0.0.1".parse().unwrap())).unwrap();
    assert_eq!((found.tenant, found.prefix.to_string()), (0, "10.0.0.0/8".to_owned()));
}

/// Addresses close together, so that prefixes overlap.
fn address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        (0u32..64).prop_map(|low| IpAddr::from((0x0a00_0000 | low << 26 | low).to_be_bytes())),
        (0u128..64).prop_map(|low| IpAddr::from((0x2001_0db8 << 96 | low << 90 | low).to_be_bytes())),
    ]
}

fn any_route() -> impl Strategy<Value = RouteSpec> {
    (0u16..3, address(), 0u8..=32, 0u16..9).prop_map(|(tenant, address, bits, interface)| {
        let bits = if address.is_ipv4() { bits } else { bits * 4 };
        let egress = Egress::Interface(InterfaceId(interface));
        RouteSpec::new(tenant, IpNet::new(address, bits).unwrap(), egress, Some(address))
    })
}

/// The module page, word by word.
fn naive(routes: &[RouteSpec], tenant: u16, dst: IpAddr) -> Option<Route> {
    let longest = |tenant: u16, default: bool| {
        routes
            .iter()
            .enumerate()
            .filter(|(_, route)| route.tenant == tenant && route.prefix.contains(&dst))
            .filter(|(_, route)| (route.prefix.prefix_len() == 0) == default)
            .max_by_key(|(place, route)| (route.prefix.prefix_len(), *place))
            .map(|(_, route)| Route { egress: route.egress, via: route.via, mtu: route.mtu })
    };
    longest(tenant, false)
        .or_else(|| longest(SHARED_TENANT, false))
        .or_else(|| longest(tenant, true))
        .or_else(|| longest(SHARED_TENANT, true))
}

proptest! {
    #[test]
    fn as_a_list_read_from_end_to_end(
        routes in proptest::collection::vec(any_route(), 0..60),
        questions in proptest::collection::vec((0u16..4, address()), 1..40),
    ) {
        let fib = Fib::compile(&routes, &[]);
        for (tenant, dst) in questions {
            prop_assert_eq!(fib.lookup(tenant, dst), naive(&routes, tenant, dst));
        }
    }
}

fn query(src: &str, dst: &str, port: u16, ingress: u16) -> RouteQuery {
    let (src, dst) = (src.parse().unwrap(), dst.parse().unwrap());
    let key = FlowKey { src, dst, src_port: port, dst_port: 53, protocol: 17 };
    RouteQuery { tenant: 0, ingress: Some(Ingress::Interface(InterfaceId(ingress))), key, before: None }
}

fn out(fib: &Fib, query: &RouteQuery) -> Result<u16, DropReason> {
    fib.find(query).map(|found| found.route.egress.interface().unwrap().0)
}

#[test]
fn routes_that_refuse_say_how() {
    let refusing = |prefix: &str, action| RouteSpec { action, ..route(0, prefix, 0) };
    let fib = Fib::compile(
        &[
            route(0, "0.0.0.0/0", 1),
            refusing("10.0.0.0/8", RouteAction::Blackhole),
            refusing("10.1.0.0/16", RouteAction::Unreachable),
            refusing("10.2.0.0/16", RouteAction::Prohibit),
            refusing("10.3.0.0/16", RouteAction::Throw),
            route(0, "10.1.2.0/24", 2),
        ],
        &[],
    );
    let cases = [
        ("192.0.2.1", Ok(1)),
        ("10.9.9.9", Err(DropReason::RouteBlackhole)),
        ("10.1.9.9", Err(DropReason::RouteUnreachable)),
        ("10.2.9.9", Err(DropReason::RouteProhibited)),
        // It leaves the table, and there is no other one.
        ("10.3.9.9", Err(DropReason::NoRoute)),
        ("10.1.2.9", Ok(2)),
        ("2001:db8::1", Err(DropReason::NoRoute)),
    ];
    for (dst, wanted) in cases {
        let src = if dst.contains(':') { "::5" } else { "192.168.0.5" };
        assert_eq!(out(&fib, &query(src, dst, 1000, 0)), wanted, "{dst}");
    }
}

/// A flow keeps to its way, and flows are spread by the weights.
#[test]
fn several_ways_share_flows_by_weight() {
    let way = |interface, weight, joins| RouteSpec { weight, joins, ..route(0, "0.0.0.0/0", interface) };
    let fib = Fib::compile(&[way(1, 1, false), way(2, 3, true)], &[]);
    let mut flows = [0u32; 3];
    for port in 0..4_000 {
        let query = query("10.0.0.5", "192.0.2.1", port, 0);
        let first = out(&fib, &query).unwrap();
        assert_eq!(out(&fib, &query), Ok(first));
        flows[usize::from(first)] += 1;
        let before = RouteQuery { before: Some(Egress::Interface(InterfaceId(1))), ..query };
        assert_eq!(out(&fib, &before), Ok(1), "a flow that has a way keeps it");
    }
    assert!((2_800..3_200).contains(&flows[2]), "{flows:?}");
    let by =
        |interface| fib.lookup_by(0, "192.0.2.1".parse().unwrap(), Egress::Interface(InterfaceId(interface)));
    assert!(by(1).is_some() && by(2).is_some() && by(3).is_none());
    // The next prefix is a route of its own.
    let fib = Fib::compile(&[way(1, 1, false), route(0, "10.0.0.0/8", 3)], &[]);
    assert_eq!(out(&fib, &query("10.0.0.5", "10.1.1.1", 1, 0)), Ok(3));
}

#[test]
fn rules_name_the_table_in_their_order() {
    let in_table = |table, prefix: &str, interface| RouteSpec { table, ..route(0, prefix, interface) };
    let all = |table| RouteRuleSpec {
        ipv4: true,
        from: None,
        to: None,
        ingresses: None,
        protocol: None,
        src_ports: None,
        dst_ports: None,
        invert: false,
        action: RouteRuleAction::Table { table, longer_than: None },
    };
    let refuse = RouteRuleAction::Refuse(RouteAction::Prohibit);
    let rules = [
        RouteRuleSpec { to: Some("192.0.2.66/32".parse().unwrap()), action: refuse, ..all(0) },
        RouteRuleSpec { action: RouteRuleAction::Table { table: 254, longer_than: Some(0) }, ..all(0) },
        RouteRuleSpec { from: Some("10.0.7.0/24".parse().unwrap()), ..all(100) },
        RouteRuleSpec { ingresses: Some(vec![Ingress::Interface(InterfaceId(9))]), ..all(101) },
        RouteRuleSpec {
            src_ports: Some((5_000, 5_010)),
            protocol: Some(17),
            action: RouteRuleAction::Goto(6),
            ..all(0)
        },
        RouteRuleSpec { from: Some("10.0.0.0/8".parse().unwrap()), invert: true, ..all(102) },
        all(254),
    ];
    let throw = RouteSpec { action: RouteAction::Throw, ..in_table(101, "198.51.100.0/24", 0) };
    let fib = Fib::compile(
        &[
            route(0, "0.0.0.0/0", 1),
            route(0, "10.0.0.0/24", 2),
            in_table(100, "0.0.0.0/0", 3),
            in_table(101, "0.0.0.0/0", 4),
            throw,
            in_table(102, "0.0.0.0/0", 5),
        ],
        &rules,
    );
    let cases = [
        (query("10.0.1.5", "192.0.2.1", 1, 0), Ok(1)),
        (query("10.0.1.5", "192.0.2.66", 1, 0), Err(DropReason::RouteProhibited)),
        (query("10.0.7.5", "192.0.2.1", 1, 0), Ok(3)),
        // Near networks of the main table come first, its default routes do not.
        (query("10.0.7.5", "10.0.0.9", 1, 0), Ok(2)),
        (query("10.0.1.5", "192.0.2.1", 1, 9), Ok(4)),
        // Thrown out of table 101.
        (query("10.0.1.5", "198.51.100.1", 1, 9), Ok(1)),
        (query("172.16.0.5", "192.0.2.1", 1, 0), Ok(5)),
        (query("172.16.0.5", "192.0.2.1", 5_005, 0), Ok(1)),
        // No rule of this family.
        (query("2001:db8::5", "2001:db8::1", 1, 0), Err(DropReason::NoRoute)),
    ];
    for (query, wanted) in cases {
        assert_eq!(out(&fib, &query), wanted, "{:?}", query.key);
    }
}

/// As the kernel does for `ip -6 route add … from …`: the longest destination counts, of equal ones the longest source.
#[test]
fn routes_for_some_sources() {
    let from = |prefix: &str, from: &str, interface| RouteSpec {
        from: Some(from.parse().unwrap()),
        ..route(0, prefix, interface)
    };
    let fib = Fib::compile(
        &[
            from("::/0", "2001:db8:1::/48", 1),
            from("::/0", "2001:db8:1:7::/64", 2),
            from("::/0", "2001:db8:2::/48", 3),
            from("2001:db8:ffff::/48", "2001:db8:2::/48", 4),
            route(0, "2001:db8:eeee::/48", 5),
        ],
        &[],
    );
    let cases = [
        ("2001:db8:1::5", "2001:db8:7::7", Ok(1)),
        ("2001:db8:1:7::5", "2001:db8:7::7", Ok(2)),
        ("2001:db8:2::5", "2001:db8:7::7", Ok(3)),
        ("2001:db8:2::5", "2001:db8:ffff::7", Ok(4)),
        ("2001:db8:1::5", "2001:db8:ffff::7", Ok(1)),
        ("2001:db8:2::5", "2001:db8:eeee::7", Ok(5)),
        ("2001:db8:3::5", "2001:db8:eeee::7", Ok(5)),
        ("2001:db8:3::5", "2001:db8:7::7", Err(DropReason::NoRoute)),
    ];
    for (src, dst, wanted) in cases {
        assert_eq!(out(&fib, &query(src, dst, 1, 0)), wanted, "{src} > {dst}");
    }
    let (far, interface) = ("2001:db8:7::7".parse().unwrap(), |id| Egress::Interface(InterfaceId(id)));
    assert!(fib.leads_by(0, far, interface(3)) && !fib.leads_by(0, far, interface(5)));
}
