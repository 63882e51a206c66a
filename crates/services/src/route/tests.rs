#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use packet::attachment::InterfaceId;
use proptest::prelude::*;

fn route(tenant: u16, prefix: &str, interface: u16) -> RouteSpec {
    let egress = Egress::Interface(InterfaceId(interface));
    RouteSpec { tenant, prefix: prefix.parse().unwrap(), egress, via: None }
}

fn interface(fib: &Fib, tenant: u16, dst: &str) -> Option<u16> {
    fib.lookup(tenant, dst.parse().unwrap())?.egress.interface().map(|id| id.0)
}

#[test]
fn longest_prefix_of_the_own_table_then_the_shared_one() {
    let fib = Fib::compile(&[
        route(0, "0.0.0.0/0", 1),
        route(0, "10.0.0.0/8", 2),
        route(0, "10.1.0.0/16", 3),
        route(0, "::/0", 4),
        route(7, "10.0.0.0/8", 5),
        route(8, "0.0.0.0/0", 6),
        route(8, "2001:db8::/32", 7),
    ]);
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
    let empty = Fib::compile(&[]);
    assert!(empty.is_empty());
    assert_eq!(interface(&empty, 0, "10.0.0.1"), None);
    let fib = Fib::compile(&[route(0, "0.0.0.0/0", 1)]);
    assert_eq!(interface(&fib, 0, "::1"), None);
}

#[test]
fn the_last_of_equal_prefixes_counts_and_host_bits_do_not() {
    let fib = Fib::compile(&[route(0, "10.0.0.0/8", 1), route(0, "10.9.9.9/8", 2)]);
    assert_eq!((interface(&fib, 0, "10.0.0.1"), fib.len()), (Some(2), 1));
    let found = fib.find(3, "10.0.0.1".parse().unwrap()).unwrap();
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
        RouteSpec { tenant, prefix: IpNet::new(address, bits).unwrap(), egress, via: Some(address) }
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
            .map(|(_, route)| Route { egress: route.egress, via: route.via })
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
        let fib = Fib::compile(&routes);
        for (tenant, dst) in questions {
            prop_assert_eq!(fib.lookup(tenant, dst), naive(&routes, tenant, dst));
        }
    }
}
