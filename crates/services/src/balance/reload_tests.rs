//! State that a reload keeps: ids, counts, health, drain state, weights, and where replies belong.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::net::SocketAddr;

use super::tests::{SECOND_NS, backend, client, run, server, status};
use super::{BackendStatus, Balancer};
use crate::spec::{BalanceMethod, NatMode, ServerSpec, TCP};

fn web(addresses: &[&str]) -> ServerSpec {
    let mut spec = server(BalanceMethod::Maglev, &[]);
    spec.backends = addresses.iter().map(|address| backend(address, 1)).collect();
    spec
}

fn ids(balancer: &Balancer) -> Vec<(u16, String)> {
    balancer.backends().map(|backend| (backend.id, backend.address.to_string())).collect()
}

fn of(balancer: &Balancer, address: &str) -> BackendStatus {
    let address: SocketAddr = address.parse().unwrap();
    status(balancer).backends.into_iter().find(|backend| backend.address == address).unwrap()
}

#[test]
fn ids_stay_with_name_and_address() {
    let first = Balancer::compile(&[web(&["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"])], None);
    let mut other = web(&["10.0.0.1:80"]);
    other.name = "other".to_owned();
    other.listen = "203.0.113.10:81".parse().unwrap();
    let second =
        Balancer::compile(&[other, web(&["10.0.0.3:80", "10.0.0.9:80", "10.0.0.1:80"])], Some(&first));
    let expected = [(3, "10.0.0.1:80"), (2, "10.0.0.3:80"), (4, "10.0.0.9:80"), (0, "10.0.0.1:80")];
    assert_eq!(ids(&second), expected.map(|(id, address)| (id, address.to_owned())));
    assert_eq!(second.find(TCP, "203.0.113.10:81".parse().unwrap()), Some(0));
}

#[test]
fn counts_health_and_wishes_carry_over() {
    let spec = || web(&["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"]);
    let first = Balancer::compile(&[spec()], None);
    run(&first, 0..90);
    first.set_health(0, false, 5 * SECOND_NS);
    first.drain(1, true);
    first.set_weight(2, 7);
    let second = Balancer::compile(&[spec()], Some(&first));
    assert_eq!(status(&first), status(&second));
    assert_eq!(run(&second, 0..10).into_keys().collect::<Vec<_>>(), [2], "the only one left");
    first.closed(2, false);
    assert_eq!(status(&second).live, 99, "a core that still has the old one counts for both");
    first.set_health(0, true, 6 * SECOND_NS);
    second.tick(6 * SECOND_NS);
    assert_eq!(of(&second, "10.0.0.1:80").effective_weight, 1.0);
    assert!(run(&second, 0..100).contains_key(&0), "news that came to the old one are not lost");
    let mut changed = spec();
    changed.backends[2].weight = 3;
    let third = Balancer::compile(&[changed], Some(&second));
    assert_eq!(of(&third, "10.0.0.3:80").weight, 3, "a new configured weight replaces one set while running");
}

#[test]
fn a_removed_backend_keeps_its_number_while_it_has_flows() {
    let first = Balancer::compile(&[web(&["10.0.0.1:80", "10.0.0.2:80"])], None);
    assert_eq!(first.opened(0, 0), Ok(()));
    let second = Balancer::compile(&[web(&["10.0.0.2:80"])], Some(&first));
    assert_eq!(ids(&second).len(), 1);
    assert_eq!(second.backend_ref(0).unwrap().address, "10.0.0.1:80".parse().unwrap());
    let third = Balancer::compile(&[web(&["10.0.0.2:80", "10.0.0.3:80"])], Some(&second));
    assert_eq!(ids(&third)[1], (2, "10.0.0.3:80".to_owned()), "0 is not given away");
    assert_eq!(status(&third).live, 1);
    third.closed(0, false);
    assert_eq!(status(&third).live, 0);
    let fourth = Balancer::compile(&[web(&["10.0.0.4:80"])], Some(&third));
    assert_eq!(ids(&fourth), [(0, "10.0.0.4:80".to_owned())], "now it is");
}

#[test]
fn a_backend_that_returns_is_the_same() {
    let both = || web(&["10.0.0.1:80", "10.0.0.2:80"]);
    let first = Balancer::compile(&[both()], None);
    assert_eq!(first.opened(0, 0), Ok(()));
    let second = Balancer::compile(&[], Some(&first));
    let third = Balancer::compile(&[], Some(&second));
    let fourth = Balancer::compile(&[both()], Some(&third));
    assert_eq!(of(&fourth, "10.0.0.1:80").live, 1);
    assert_eq!(status(&fourth).live, 1, "and its server counts it");
    fourth.closed(0, false);
    assert_eq!(status(&fourth).live, 0);
}

#[test]
fn an_added_backend_starts_slowly() {
    let spec = |addresses: &[&str]| ServerSpec { slow_start_s: 10, ..web(addresses) };
    let first = Balancer::compile(&[spec(&["10.0.0.1:80"])], None);
    first.tick(100 * SECOND_NS);
    let second = Balancer::compile(&[spec(&["10.0.0.1:80", "10.0.0.2:80"])], Some(&first));
    assert_eq!(of(&second, "10.0.0.1:80").effective_weight, 1.0);
    assert_eq!(of(&second, "10.0.0.2:80").effective_weight, 0.1);
    second.tick(101 * SECOND_NS);
    second.tick(106 * SECOND_NS);
    assert_eq!(of(&second, "10.0.0.2:80").effective_weight, 0.5);
    second.tick(111 * SECOND_NS);
    assert_eq!(of(&second, "10.0.0.2:80").effective_weight, 1.0);
    let longer = ServerSpec { slow_start_s: 1_000, ..spec(&["10.0.0.1:80", "10.0.0.2:80"]) };
    let third = Balancer::compile(&[longer], Some(&second));
    assert_eq!(of(&third, "10.0.0.2:80").effective_weight, 1.0, "what has ended does not begin again");
}

/// All of them would begin with a tenth, so that one that comes back later would have as much as they.
#[test]
fn the_backends_of_a_new_server_start_at_full_weight() {
    let spec = ServerSpec { slow_start_s: 10, ..web(&["10.0.0.1:80", "10.0.0.2:80"]) };
    let first = Balancer::compile(&[], None);
    let second = Balancer::compile(std::slice::from_ref(&spec), Some(&first));
    assert_eq!(of(&second, "10.0.0.1:80").effective_weight, 1.0);
    assert_eq!(of(&second, "10.0.0.2:80").effective_weight, 1.0);
}

#[test]
fn earlier_listen_endpoints_are_known_while_flows_may_use_them() {
    let spec = |listen: &str| {
        let mut spec = web(&["10.0.0.1:80"]);
        (spec.listen, spec.source) = (listen.parse().unwrap(), NatMode::None);
        spec
    };
    let listens = |balancer: &Balancer| -> Vec<String> {
        let list = balancer.listen_of(TCP, "10.0.0.1:80".parse().unwrap());
        list.iter().map(ToString::to_string).collect()
    };
    let first = Balancer::compile(&[spec("203.0.113.1:80")], None);
    assert_eq!(first.opened(0, 0), Ok(()));
    let second = Balancer::compile(&[spec("203.0.113.2:80")], Some(&first));
    assert_eq!(listens(&second), ["203.0.113.2:80", "203.0.113.1:80"]);
    let third = Balancer::compile(&[], Some(&second));
    assert_eq!(listens(&third), ["203.0.113.2:80", "203.0.113.1:80"], "removed, with a flow");
    third.closed(0, false);
    let fourth = Balancer::compile(&[spec("203.0.113.2:80")], Some(&third));
    assert_eq!(listens(&fourth), ["203.0.113.2:80"]);
    let fifth = Balancer::compile(&[], Some(&fourth));
    assert_eq!(listens(&fifth), ["203.0.113.2:80"], "a core may be about to open a flow");
    assert!(listens(&Balancer::compile(&[], Some(&fifth))).is_empty());
}

#[test]
fn one_backend_once() {
    let balancer = Balancer::compile(&[web(&["10.0.0.1:80", "10.0.0.1:80"])], None);
    assert_eq!(ids(&balancer).len(), 1);
    let again =
        Balancer::compile(&[web(&["10.0.0.1:80", "10.0.0.1:80"]), web(&["10.0.0.1:80"])], Some(&balancer));
    assert_eq!(ids(&again).len(), 1, "neither in a second server of the same name");
    assert!(again.pick(0, &client(1), 0, 0).is_ok());
}
