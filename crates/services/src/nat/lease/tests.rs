#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;

const SECOND: u64 = 1_000_000_000;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn spec(tenant: u16, from: &str, first_port: u16, ports: u32) -> LeaseSpec {
    LeaseSpec {
        name: format!("{tenant} {from}"),
        tenant,
        from: from.parse().unwrap(),
        address: ip("192.0.2.1"),
        first_port,
        ports,
    }
}

#[test]
fn blocks_are_whole() {
    assert_eq!(blocks_of(1024, 1024), Some(2));
    assert_eq!(blocks_of(0, 65_536), Some(u64::MAX));
    assert_eq!(blocks_of(64_512, 1024), Some(1 << 63));
    for (first, ports) in [(1000, 1024), (1024, 1000), (1024, 0), (64_512, 2048), (0, u32::MAX - 1023)] {
        assert_eq!(blocks_of(first, ports), None, "{first}+{ports}");
    }
}

#[test]
fn leases_come_and_go() {
    let leases = Leases::default();
    let address = ip("192.0.2.1");
    let (id, event) = leases.take(5, spec(1, "10.1.0.0/16", 2048, 2048)).unwrap();
    assert_eq!(
        (event.kind, event.outside.port(), event.ports, event.tenant),
        (NatEventKind::BlockGranted, 2048, 2048, 1)
    );
    let snapshot = leases.snapshot();
    assert_eq!(snapshot.held_by(1, ip("10.1.2.3")), Some(&[(address, 0b1100)][..]));
    assert_eq!(snapshot.held_by(2, ip("10.1.2.3")), None, "another tenant");
    assert_eq!(snapshot.held_by(1, ip("10.2.2.3")), None);
    assert_eq!(snapshot.closed(address), 0b1100);
    let taken = leases.take(6, spec(2, "10.2.0.0/16", 3072, 1024));
    assert_eq!(taken, Err(LeaseError::Taken(address, 3072, 1024)));
    // A longer prefix has its own, of one holder several.
    leases.take(6, spec(1, "10.1.2.0/24", 4096, 1024)).unwrap();
    leases.take(6, spec(1, "10.1.2.0/24", 6144, 1024)).unwrap();
    let snapshot = leases.snapshot();
    assert_eq!(snapshot.held_by(1, ip("10.1.2.3")), Some(&[(address, 1 << 4), (address, 1 << 6)][..]));
    assert_eq!(snapshot.held_by(1, ip("10.1.3.3")), Some(&[(address, 0b1100)][..]));

    let event = leases.give_back(10, id).unwrap();
    assert_eq!((event.kind, event.outside.port()), (NatEventKind::BlockReturned, 2048));
    assert_eq!(leases.give_back(10, id), None);
    let snapshot = leases.snapshot();
    assert_eq!(snapshot.held_by(1, ip("10.1.3.3")), None);
    assert_eq!(snapshot.closed(address), 0b101_1100, "returned blocks rest");
    assert!(leases.take(11, spec(2, "10.2.0.0/16", 2048, 1024)).is_err());
    leases.tick(10 + REST_NS - 1);
    assert_eq!(leases.snapshot().closed(address), 0b101_1100);
    leases.tick(10 + REST_NS);
    assert_eq!(leases.snapshot().closed(address), 0b101_0000);
    assert!(leases.take(10 + REST_NS, spec(2, "10.2.0.0/16", 2048, 1024)).is_ok());
    assert_eq!(leases.list().len(), 3);
}

#[test]
fn errors_are_told() {
    let leases = Leases::default();
    let error = |spec| leases.take(0, spec).unwrap_err();
    assert_eq!(error(spec(0, "10.0.0.0/8", 1000, 1024)), LeaseError::NotAligned(1000, 1024));
    assert_eq!(error(spec(0, "2001:db8::/32", 1024, 1024)), LeaseError::MixedFamilies);
}

/// A range on request: the first that is free, allowed and side by side.
#[test]
fn any_range_is_found() {
    let leases = Leases::default();
    leases.set_rest(SECOND);
    let addresses = [ip("2001:db8::1"), ip("192.0.2.1"), ip("192.0.2.2")];
    let allowed = |address| if address == ip("192.0.2.1") { 0b1011_0110 } else { 0b1110 };
    let wanted = |ports| leases.take_any(0, spec(1, "10.0.0.0/8", 0, ports), &addresses, allowed);
    let (first, _) = wanted(2048).unwrap();
    assert_eq!((first.spec.address, first.spec.first_port), (ip("192.0.2.1"), 1024));
    let (second, event) = wanted(2048).unwrap();
    assert_eq!((second.spec.first_port, event.outside.port()), (4096, 4096));
    assert_eq!(wanted(3072).unwrap().0.spec.address, ip("192.0.2.2"));
    assert_eq!(wanted(1024).unwrap().0.spec.first_port, 7168);
    assert_eq!(wanted(1024).unwrap_err(), LeaseError::NoneFree(1024));
    leases.give_back(0, first.id).unwrap();
    assert!(wanted(1024).is_err());
    let (again, _) = leases.take_any(SECOND, spec(1, "10.0.0.0/8", 0, 1024), &addresses, allowed).unwrap();
    assert_eq!(again.spec.first_port, 1024);
}

#[test]
fn a_new_configuration_changes_what_it_must() {
    let leases = Leases::default();
    let (a, b, c) = (
        spec(1, "10.1.0.0/16", 1024, 1024),
        spec(2, "10.2.0.0/16", 2048, 1024),
        spec(3, "10.3.0.0/16", 3072, 1024),
    );
    let clash = [a.clone(), b.clone(), spec(4, "10.4.0.0/16", 1024, 2048)];
    let refused = vec![LeaseError::Taken(ip("192.0.2.1"), 1024, 2048)];
    assert_eq!(leases.refused(0, &clash), refused);
    assert_eq!(leases.configure(0, &clash), (Vec::new(), refused));
    assert_eq!((leases.list().len(), leases.closed(0, ip("192.0.2.1"))), (0, 0), "all or nothing");
    let (events, errors) = leases.configure(0, &[a.clone(), b.clone()]);
    assert_eq!((events.len(), errors.len()), (2, 0));
    leases.take(0, c.clone()).unwrap();
    let (events, errors) = leases.configure(1, std::slice::from_ref(&b));
    assert_eq!(events.iter().map(|event| event.kind).collect::<Vec<_>>(), [NatEventKind::BlockReturned]);
    assert!(errors.is_empty());
    assert_eq!(leases.list().into_iter().map(|lease| lease.spec).collect::<Vec<_>>(), [b.clone(), c]);
    // What was returned rests: not in a new configuration either; another name for the same is no return.
    assert_eq!(leases.closed(2, ip("192.0.2.1")), 0b1110);
    assert_eq!(leases.refused(2, &[b.clone(), a.clone()]).len(), 1);
    assert_eq!(leases.refused(1 + REST_NS, &[b.clone(), a]).len(), 0);
    let renamed = LeaseSpec { name: "new".to_owned(), ..b };
    assert_eq!(leases.configure(2, std::slice::from_ref(&renamed)), (Vec::new(), Vec::new()));
    assert_eq!(leases.list()[0].spec, renamed);
}

/// A client has the same blocks on every core; they rest when the last core has no flow of it.
#[test]
fn automatic_blocks_are_shared_by_cores() {
    let leases = Leases::default();
    let pool = [ip("192.0.2.1"), ip("192.0.2.2")];
    let wish = |client: &str, start| AutomaticWish {
        tenant: 0,
        client: ip(client),
        addresses: &pool,
        start,
        whole: 0b110,
        count: 1,
        random: 17,
    };
    let (first, events) = leases.join(0, &wish("10.0.0.1", 1)).unwrap();
    assert_eq!((first.address, events.len()), (pool[1], 1));
    let (same, events) = leases.join(0, &wish("10.0.0.1", 0)).unwrap();
    assert_eq!((same, events.len()), (first, 0));
    let others: Vec<_> =
        (2..5).map(|n| leases.join(0, &wish(&format!("10.0.0.{n}"), 1)).unwrap().0).collect();
    assert_eq!(others.iter().filter(|held| held.address == pool[1]).count(), 1);
    assert!(leases.join(0, &wish("10.0.0.9", 0)).is_none(), "all four are granted");
    assert_eq!(leases.automatic().len(), 4);
    let client = (0, ip("10.0.0.1"));
    assert!(leases.leave(5, client, &first).is_empty(), "another core still has it");
    let events = leases.leave(5, client, &first);
    assert_eq!((events.len(), events[0].kind), (1, NatEventKind::BlockReturned));
    assert!(leases.leave(5, client, &first).is_empty());
    assert!(leases.join(5 + REST_NS - 1, &wish("10.0.0.9", 0)).is_none());
    let (next, _) = leases.join(5 + REST_NS, &wish("10.0.0.9", 0)).unwrap();
    assert_eq!((next.address, next.blocks), (first.address, first.blocks));
}
