#![allow(clippy::unwrap_used, reason = "tests")]
use proptest::prelude::*;

use super::*;
use crate::encapsulation::fragment::Split;
use crate::encapsulation::outer::{Outer, OuterChecksum};

/// The shortest frame.
const FRAME: [u8; ETHERNET_BYTES] = [0x02, 0, 0, 0, 0, 0x01, 0x02, 0, 0, 0, 0, 0x02, 0x88, 0xb5];

/// Every field another number.
fn full() -> Encapsulation {
    let mut encapsulation = Encapsulation {
        target: 0x1234,
        dispatcher: 0x0abc,
        interface: 0x56,
        handoff: Handoff::Punt,
        hook: Hook::AfterRendezvous { src_port: 0x1122, dst_port: 0x3344 },
        table: 9,
        odd_era: true,
        ttl: 7,
        vlan: Some(0x6064),
        route: Some(Route::default()),
        offload: None,
    };
    encapsulation.record(0x1001);
    encapsulation.record(0x1002);
    encapsulation
}

fn plain() -> Encapsulation {
    Encapsulation { target: 2, dispatcher: 1, interface: 3, ttl: 8, ..Encapsulation::default() }
}

fn datagram(encapsulation: &Encapsulation, frame: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; encapsulation.bytes()];
    assert_eq!(encapsulation.write(&mut bytes), bytes.len());
    bytes.extend(frame);
    bytes
}

fn parse_error(datagram: &[u8]) -> Option<DropReason> {
    Encapsulation::parse(datagram).err()
}

#[test]
fn every_field_has_its_place() {
    let expected = [
        0x5a, 0xbc, 0x12, 0x34, 0x60, 0x64, // version 1, tag, dispatcher; target; tag
        0x11, 0xba, 0xbc, 0x56, // TYPE 1, HDR SIZE 6, TRR, ERA, SNODE, IFID
        0x07, 0x11, 0x92, 0x00, // TTL, HANDOFF TYPE 1, HOOK 1, TABLE 9, 2 recorded
        0x11, 0x22, 0x33, 0x44, // ports
        0x10, 0x01, 0x10, 0x02, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // route
    ];
    let bytes = datagram(&full(), &FRAME);
    assert_eq!(bytes[..expected.len()], expected);
    assert_eq!(Encapsulation::parse(&bytes), Ok((full(), &FRAME[..])));
}

#[test]
fn a_visit_is_told_and_read() {
    for (arrival, handoff) in [
        (Arrival::Outside, Handoff::Dispatch),
        (Arrival::Punted, Handoff::Punt),
        (Arrival::Unclaimed, Handoff::Unclaimed),
    ] {
        let visit = UnitVisit { arrival, ttl: 5, odd_era: true, dispatcher: 4_095 };
        let encapsulation = Encapsulation::of_visit(17, 2, &visit);
        assert_eq!((encapsulation.handoff, encapsulation.target, encapsulation.interface), (handoff, 17, 2));
        let bytes = datagram(&encapsulation, &FRAME);
        assert_eq!(Encapsulation::parse(&bytes).unwrap().0.visit(), Some(visit));
    }
    let next_hop = Ipv4Addr::LOCALHOST.into();
    for handoff in [Handoff::Broadcast, Handoff::Reply, Handoff::Resolve { next_hop }, Handoff::Trace] {
        assert_eq!(Encapsulation { handoff, ..plain() }.visit(), None);
    }
}

#[test]
fn the_route_is_recorded_until_it_is_full() {
    let v6 = Handoff::Resolve { next_hop: Ipv6Addr::LOCALHOST.into() };
    let ports = Hook::AfterRendezvous { src_port: 1, dst_port: 2 };
    for (handoff, hook, ids_max) in [
        (Handoff::Punt, Hook::BeforeServices, 8),
        (Handoff::Punt, ports, 8),
        (v6, Hook::BeforeServices, 2),
        (v6, ports, 0),
    ] {
        let route = Some(Route::default());
        let mut encapsulation = Encapsulation { handoff, hook, route, ..plain() };
        assert_eq!(encapsulation.route_ids_max(), ids_max);
        let bytes = encapsulation.bytes();
        (100..120).for_each(|node| encapsulation.record(node));
        assert_eq!(encapsulation.bytes(), bytes, "a packet does not grow on its way");
        let sent = datagram(&encapsulation, &FRAME);
        let route = Encapsulation::parse(&sent).unwrap().0.route.unwrap();
        assert_eq!(route.ids(), (100..100 + ids_max as u16).collect::<Vec<_>>());
    }
    let mut unrecorded = plain();
    unrecorded.record(9);
    assert_eq!(unrecorded, plain());
}

#[test]
fn the_longest_headers_are_as_long_as_is_said() {
    let next_hop = Ipv6Addr::LOCALHOST.into();
    let longest = Encapsulation {
        handoff: Handoff::Resolve { next_hop },
        route: Some(Route::default()),
        offload: Some(VirtioNetHeader::default()),
        ..full()
    };
    assert_eq!(longest.bytes(), ENCAPSULATION_BYTES_MAX);
    assert_eq!(plain().bytes(), ENCAPSULATION_BYTES_MIN);
    assert_eq!(longest.write(&mut [0; ENCAPSULATION_BYTES_MAX - 1]), 0);
}

#[test]
fn what_contradicts_itself_is_refused() {
    let good = datagram(&full(), &FRAME);
    let changed = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        parse_error(&bytes)
    };
    let too_short = Some(DropReason::BusTooShort);
    let malformed = Some(DropReason::BusMalformed);
    let version = Some(DropReason::BusVersion);
    let unknown = Some(DropReason::BusUnknownHandoff);
    assert_eq!(changed(&|_| ()), None);
    assert_eq!(changed(&|bytes| bytes[0] = 0x1a), version, "version 0");
    assert_eq!(changed(&|bytes| bytes[0] = 0x9a), version, "version 2");
    assert_eq!(changed(&|bytes| bytes[0] = 0x7a), malformed, "a fragment");
    assert_eq!(changed(&|bytes| bytes[0] = 0x4a), malformed, "a tag that is not there");
    assert_eq!(changed(&|bytes| bytes[0] = 0x5b), malformed, "another dispatcher than SNODE");
    assert_eq!(changed(&|bytes| bytes[6] += 0x10), version, "TYPE 2");
    assert_eq!(changed(&|bytes| bytes[6] -= 0x10), malformed, "TYPE 0 with a handoff");
    assert_eq!(changed(&|bytes| bytes[11] = 0x01), malformed, "TYPE 1 without a handoff");
    assert_eq!(changed(&|bytes| bytes[7] -= 0x40), malformed, "HDR SIZE before the route's end");
    assert_eq!(changed(&|bytes| bytes[7] += 0x40), too_short, "HDR SIZE within the Ethernet header");
    assert_eq!(changed(&|bytes| bytes[6] = 0x1f), too_short, "HDR SIZE behind the end");
    assert_eq!(changed(&|bytes| bytes[7] &= 0xdf), malformed, "recorded, and not");
    assert_eq!(changed(&|bytes| bytes[12] = 0x99), malformed, "more recorded than there is room for");
    assert_eq!(changed(&|bytes| bytes[10] = 0), Some(DropReason::BusTtlExpired));
    assert_eq!(changed(&|bytes| bytes[11] = 0x71), unknown, "HANDOFF TYPE 7");
    assert_eq!(changed(&|bytes| bytes[11] = 0x14), unknown, "HOOK 4");
    assert_eq!(changed(&|bytes| bytes[13] = 0x01), malformed, "IPv6, but no next hop");
    assert_eq!(changed(&|bytes| bytes[13] = 0x80), malformed, "a reserved bit");
    assert_eq!(changed(&|bytes| bytes.truncate(bytes.len() - 1)), too_short, "no Ethernet header");
}

#[test]
fn options_that_the_header_has_no_words_for_are_refused() {
    let next_hop = Ipv6Addr::LOCALHOST.into();
    for encapsulation in [
        Encapsulation { handoff: Handoff::Resolve { next_hop }, ..plain() },
        Encapsulation { hook: Hook::AfterRendezvous { src_port: 1, dst_port: 2 }, ..plain() },
        Encapsulation { route: Some(Route::default()), ..plain() },
    ] {
        let mut bytes = datagram(&encapsulation, &[0x5a; 100]);
        let word = u16::from_be_bytes([bytes[6], bytes[7]]) - (1 << 6);
        bytes[6..8].copy_from_slice(&word.to_be_bytes());
        assert_eq!(parse_error(&bytes), Some(DropReason::BusMalformed), "{encapsulation:?}");
    }
    let mut bytes = datagram(&plain(), &[0; 100]);
    bytes[6..8].copy_from_slice(&[0x00, 0x00]);
    assert_eq!(parse_error(&bytes), Some(DropReason::BusMalformed), "HDR SIZE 0 leaves out the second word");
}

#[test]
fn words_that_are_not_known_are_skipped() {
    let encapsulation = full();
    let mut bytes = vec![0; encapsulation.bytes()];
    encapsulation.write(&mut bytes);
    bytes.extend([0xee; 8]);
    bytes.extend(FRAME);
    let word = u16::from_be_bytes([bytes[6], bytes[7]]) + (2 << 6);
    bytes[6..8].copy_from_slice(&word.to_be_bytes());
    assert_eq!(Encapsulation::parse(&bytes), Ok((encapsulation, &FRAME[..])));
}

fn any_encapsulation() -> impl Strategy<Value = Encapsulation> {
    let handoff = prop_oneof![
        Just(Handoff::Dispatch),
        Just(Handoff::Punt),
        Just(Handoff::Unclaimed),
        Just(Handoff::Broadcast),
        Just(Handoff::Reply),
        any::<IpAddr>().prop_map(|next_hop| Handoff::Resolve { next_hop }),
        Just(Handoff::Trace),
    ];
    let hook = prop_oneof![
        Just(Hook::BeforeServices),
        Just(Hook::Host),
        Just(Hook::Bond),
        any::<(u16, u16)>().prop_map(|(src_port, dst_port)| Hook::AfterRendezvous { src_port, dst_port }),
    ];
    let route = proptest::option::of(proptest::collection::vec(any::<u16>(), 0..=ROUTE_IDS_MAX));
    let numbers = (any::<u16>(), 0..4_096u16, any::<u8>(), 0..16u8, any::<bool>(), 1..=255u8);
    let offload = proptest::option::of(any::<[u16; 5]>().prop_map(
        |[kind, hdr_len, gso_size, csum_start, csum_offset]| {
            let [flags, gso_type] = kind.to_be_bytes();
            VirtioNetHeader { flags, gso_type, hdr_len, gso_size, csum_start, csum_offset }
        },
    ));
    let parts = (numbers, handoff, hook, any::<Option<u16>>(), route, offload);
    parts.prop_map(|(numbers, handoff, hook, vlan, ids, offload)| {
        let (target, dispatcher, interface, table, odd_era, ttl) = numbers;
        let route = ids.as_ref().map(|_| Route::default());
        let mut encapsulation = Encapsulation {
            target,
            dispatcher,
            interface,
            handoff,
            hook,
            table,
            odd_era,
            ttl,
            vlan,
            route,
            offload,
        };
        ids.unwrap_or_default().into_iter().for_each(|id| encapsulation.record(id));
        encapsulation
    })
}

proptest! {
    #[test]
    fn round_trip(encapsulation in any_encapsulation(), frame in proptest::collection::vec(any::<u8>(), 14..80)) {
        let mut bytes = vec![0xa5; encapsulation.bytes() + frame.len()];
        let header = encapsulation.write(&mut bytes);
        prop_assert_eq!(header, encapsulation.bytes());
        prop_assert!(header <= ENCAPSULATION_BYTES_MAX && (header + ETHERNET_BYTES).is_multiple_of(4));
        prop_assert!(bytes[header..].iter().all(|byte| *byte == 0xa5));
        bytes[header..].copy_from_slice(&frame);
        prop_assert_eq!(Encapsulation::parse(&bytes), Ok((encapsulation, &frame[..])));
        // A cut is an error or a shorter frame.
        for length in 0..bytes.len() {
            match Encapsulation::parse(&bytes[..length]) {
                Ok((cut, rest)) => {
                    prop_assert_eq!((cut, rest), (encapsulation, &frame[..length - header]));
                    prop_assert!(rest.len() >= ETHERNET_BYTES);
                }
                Err(reason) => {
                    prop_assert_eq!(reason, DropReason::BusTooShort);
                    prop_assert!(length < header + ETHERNET_BYTES);
                }
            }
        }
    }

    #[test]
    fn garbage_never_panics(first: [u8; 2], garbage in proptest::collection::vec(any::<u8>(), 0..120)) {
        let mut bytes = garbage;
        // Most garbage has the right version and type.
        for (byte, at) in first.into_iter().zip([0, 6]) {
            if let Some(place) = bytes.get_mut(at).filter(|_| byte > 16) {
                *place = if at == 0 { 0x40 | *place & 0x1f } else { *place & 0x1f };
            }
        }
        if let Ok((encapsulation, frame)) = Encapsulation::parse(&bytes) {
            let again = datagram(&encapsulation, frame);
            prop_assert_eq!(Encapsulation::parse(&again), Ok((encapsulation, frame)));
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")
}

/// The examples of `docs/wire-cluster.md`, by name.
fn examples() -> Vec<(&'static str, Vec<u8>)> {
    let route = Some(Route::default());
    let mut examples = Vec::new();
    let mut add = |name, mut encapsulation: Encapsulation, at: &[u16]| {
        at.iter().for_each(|node| encapsulation.record(*node));
        examples.push((name, datagram(&encapsulation, &FRAME)));
    };
    let ports = Hook::AfterRendezvous { src_port: 49_200, dst_port: 443 };
    let (v4, v6) =
        (Ipv4Addr::new(192, 0, 2, 1).into(), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into());
    let resolve =
        |next_hop| Encapsulation { target: 1, handoff: Handoff::Resolve { next_hop }, ttl: 1, ..plain() };
    add("dispatch", plain(), &[]);
    add("dispatch-tagged", Encapsulation { vlan: Some(100), odd_era: true, ..plain() }, &[]);
    add("dispatch-ports", Encapsulation { hook: ports, ..plain() }, &[]);
    add("dispatch-route", Encapsulation { route, ..plain() }, &[]);
    add("dispatch-host", Encapsulation { hook: Hook::Host, ..plain() }, &[]);
    add("dispatch-bond", Encapsulation { hook: Hook::Bond, interface: 255, ..plain() }, &[]);
    add("punt", Encapsulation { target: 7, handoff: Handoff::Punt, ttl: 7, ..plain() }, &[]);
    add("punt-route", Encapsulation { target: 7, handoff: Handoff::Punt, ttl: 7, route, ..plain() }, &[2]);
    add("unclaimed", Encapsulation { handoff: Handoff::Unclaimed, ttl: 6, ..plain() }, &[]);
    add("broadcast", Encapsulation { handoff: Handoff::Broadcast, ttl: 255, ..plain() }, &[]);
    add("reply", Encapsulation { target: 1, handoff: Handoff::Reply, ttl: 1, ..plain() }, &[]);
    add("resolve-ipv4", resolve(v4), &[]);
    add("resolve-ipv6", resolve(v6), &[]);
    add("trace", Encapsulation { target: 7, handoff: Handoff::Trace, ttl: 7, route, ..plain() }, &[2]);
    let segments = VirtioNetHeader {
        flags: 1,
        gso_type: 1,
        hdr_len: 66,
        gso_size: 1_448,
        csum_start: 20,
        csum_offset: 16,
    };
    let reply = Encapsulation { target: 1, handoff: Handoff::Reply, ttl: 1, ..plain() };
    add("reply-super", Encapsulation { offload: Some(segments), ..reply }, &[]);
    add("everything", full(), &[]);
    examples
}

#[test]
fn the_documentation_shows_these_bytes() {
    let documentation = include_str!("../../../../docs/wire-cluster.md");
    let documented: Vec<(&str, &str)> = documentation
        .lines()
        .filter_map(|line| line.strip_prefix("    "))
        .filter_map(|line| line.split_once(": "))
        .map(|(name, bytes)| (name.trim(), bytes.trim()))
        .collect();
    let mut examples = examples();
    let whole = datagram(&plain(), &[FRAME.as_slice(), &[0x77; 256]].concat());
    let split = Split::new(&whole, 0x0102_0304, 14 + 256).unwrap();
    for (index, name) in ["fragment-first", "fragment-last"].into_iter().enumerate() {
        let mut bytes = vec![0; 400];
        let length = split.write(index, &mut bytes);
        // Of the payload's many equal bytes the documentation shows none.
        bytes.truncate(length);
        let shown = bytes.iter().rposition(|byte| *byte != 0x77).unwrap();
        examples.push((name, bytes[..=shown].to_vec()));
    }
    for (name, source, destination) in
        [("outer-ipv4", "192.0.2.11", "192.0.2.12"), ("outer-ipv6", "2001:db8::11", "2001:db8::12")]
    {
        let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
        let outer = Outer { source, destination, source_port: 0xc123, traffic_class: 0 };
        let mut packet = [vec![0; outer.bytes()], datagram(&plain(), &FRAME)].concat();
        assert_eq!(outer.write(&mut packet, OuterChecksum::Usual), outer.bytes());
        examples.push((name, packet));
    }
    assert_eq!(documented.len(), examples.len());
    for (name, bytes) in &examples {
        let documented = documented.iter().find(|(documented, _)| documented == name);
        assert_eq!(documented.map(|(_, bytes)| *bytes), Some(hex(bytes).as_str()), "{name}");
    }
}
