use super::*;
use packet::FlowKey;
use packet::ip::{PROTOCOL_DESTINATION_OPTIONS, PROTOCOL_ICMP, PROTOCOL_TCP};

fn fresh() -> Rendezvous {
    Rendezvous::new(ROOMY, SecretState::of_number(7))
}

/// Row C5: in every order of arrival the fragments go on in that order, all with the key of the whole packet.
#[test]
fn every_order_of_arrival() {
    let orders: [[usize; 4]; 6] =
        [[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2], [2, 3, 0, 1], [3, 0, 1, 2], [1, 2, 3, 0]];
    for recipe in [V4, V6] {
        let fragments = recipe.cut(&udp(90), 24);
        let key = FlowKey::of(&recipe.whole(&udp(90))).unwrap();
        assert_eq!((key.src_port, key.dst_port), (1000, 2000));
        for order in orders {
            let mut rendezvous = fresh();
            let mut outs = Vec::new();
            let mut known = false;
            for at in order {
                let now = meet(&mut rendezvous, 0, &fragments[at]).unwrap();
                known |= at == 0;
                assert_eq!(now.is_empty(), !known, "held until the header is there, and not longer");
                outs.extend(now);
            }
            let packets: Vec<_> = outs.iter().map(|out| out.packet.clone()).collect();
            assert_eq!(packets, order.map(|at| fragments[at].clone()));
            for (at, out) in outs.iter().enumerate() {
                assert_eq!((out.key, out.id), (key, Some(id_of(&fragments[0]))));
                assert_eq!((out.first, out.last), (at == 0, at == 3), "{order:?} {at}");
            }
            assert_eq!((rendezvous.bytes(), rendezvous.packets()), (0, 0));
            assert_eq!(rendezvous.stats(), FragmentStats { completed: 1, ..FragmentStats::default() });
        }
    }
}

#[test]
fn measures() {
    let fragments = V4.cut(&udp(90), 24);
    let (mut rendezvous, whole) = (fresh(), Measure { bytes: Some(110), fragments: Some(4) });
    assert_eq!(meet(&mut rendezvous, 0, &fragments[0]).unwrap()[0].measure, whole, "by the UDP header");
    let tcp = Recipe { protocol: PROTOCOL_TCP, ..V4 };
    let upper: Vec<u8> = [0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0x50].iter().chain(&[0; 77]).copied().collect();
    let fragments = tcp.cut(&upper, 24);
    let mut rendezvous = fresh();
    assert_eq!(meet(&mut rendezvous, 0, &fragments[0]).unwrap()[0].measure, Measure::default());
    let mut rendezvous = fresh();
    assert_eq!(meet(&mut rendezvous, 0, &fragments[3]).unwrap(), []);
    assert_eq!(meet(&mut rendezvous, 0, &fragments[0]).unwrap()[0].measure, whole, "by the last fragment");
    let fragments = V6.cut(&udp(90), 48);
    let whole = Measure { bytes: Some(130), fragments: Some(2) };
    assert_eq!(meet(&mut fresh(), 0, &fragments[0]).unwrap()[0].measure, whole);
}

#[test]
fn what_cannot_be_a_fragment() {
    let tcp = |recipe| Recipe { protocol: PROTOCOL_TCP, ..recipe };
    for recipe in [V4, V6] {
        let cases = [
            ("empty", recipe.fragment(0, true, &[])),
            ("empty last", recipe.fragment(8, false, &[])),
            ("length not a multiple of 8", recipe.fragment(8, true, &[0; 9])),
            ("beyond the longest packet", recipe.fragment(65_528, false, &[0; 8])),
            ("beyond it with the header", recipe.fragment(65_520, false, &[0; 24])),
            ("no whole TCP header", tcp(recipe.clone()).fragment(0, true, &[0x50; 16])),
            ("no TCP options", tcp(recipe.clone()).fragment(0, true, &[0x60; 16])),
        ];
        for (name, packet) in cases {
            let mut rendezvous = fresh();
            assert_eq!(meet(&mut rendezvous, 0, &packet), Err(DropReason::FragmentInvalid), "{name}");
            assert_eq!(rendezvous.packets(), 0, "{name}: nothing is kept of it");
        }
    }
    // The longest that can be: the header counts in IPv4.
    assert_eq!(meet(&mut fresh(), 0, &V4.fragment(65_512, false, &[0; 3])), Ok(vec![]));
    assert_eq!(meet(&mut fresh(), 0, &V4.fragment(65_512, false, &[0; 4])), Err(DropReason::FragmentInvalid));
    assert_eq!(meet(&mut fresh(), 0, &V6.fragment(65_528, false, &[0; 7])), Ok(vec![]));
}

/// RFC 6946: a packet with a fragment header that is whole goes on, whatever else is under its identification.
#[test]
fn atomic_fragments_are_packets() {
    let mut rendezvous = fresh();
    assert_eq!(meet(&mut rendezvous, 0, &V6.fragment(8, true, &[0; 8])), Ok(vec![]));
    let atomic = V6.fragment(0, false, &udp(30));
    let outs = meet(&mut rendezvous, 0, &atomic).unwrap();
    assert_eq!((outs.len(), outs[0].id, outs[0].key.dst_port), (1, None, 2000));
    assert_eq!((&outs[0].packet, outs[0].first, outs[0].last), (&atomic, true, true));
    assert_eq!(meet(&mut rendezvous, 0, &V6.fragment(0, true, &udp(8))).unwrap().len(), 2);
    let plain = V4.whole(&udp(30));
    assert_eq!(meet(&mut rendezvous, 0, &plain).unwrap()[0].id, None);
}

/// RFC 7112: the first fragment has all headers up to the ports.
#[test]
fn headers_behind_the_fragment_header() {
    let recipe = Recipe { protocol: PROTOCOL_DESTINATION_OPTIONS, ..V6 };
    let mut payload = vec![17, 0, 1, 4, 0, 0, 0, 0];
    payload.extend(udp(40));
    let key = FlowKey::of(&recipe.whole(&payload)).unwrap();
    assert_eq!((key.protocol, key.src_port), (17, 1000));
    let outs = meet(&mut fresh(), 0, &recipe.fragment(0, true, &payload[..16])).unwrap();
    assert_eq!(outs[0].key, key);
    assert_eq!(outs[0].measure, Measure { bytes: Some(88), fragments: Some(3) });
    for chain in [&payload[..8], &[60, 1, 0, 0, 0, 0, 0, 0], &[44, 0, 0, 0, 0, 0, 0, 0]] {
        let tiny = recipe.fragment(0, true, chain);
        assert_eq!(meet(&mut fresh(), 0, &tiny), Err(DropReason::FragmentInvalid));
    }
}

#[test]
fn icmp_and_protocols_without_ports() {
    let ping = Recipe { protocol: PROTOCOL_ICMP, ..V4 };
    let mut echo = vec![8, 0, 0, 0, 0x12, 0x34, 0, 1];
    echo.extend([7; 100]);
    let key = meet(&mut fresh(), 0, &ping.fragment(0, true, &echo[..64])).unwrap()[0].key;
    assert_eq!(key, FlowKey::of(&ping.whole(&echo)).unwrap());
    assert_eq!(key.src_port, 0x1234);
    let esp = Recipe { protocol: 50, ..V4 };
    let key = meet(&mut fresh(), 0, &esp.fragment(0, true, &[9; 8])).unwrap()[0].key;
    assert_eq!((key.protocol, key.src_port, key.dst_port), (50, 0, 0));
}

/// RFC 5722: what overlaps is dropped as a whole, and so is what follows until the timeout.
#[test]
fn overlaps() {
    let base = [(0, true, 24), (48, true, 24)];
    let others = [
        ("inside", 8, true, 8),
        ("over the end", 16, true, 16),
        ("over the beginning", 40, true, 16),
        ("around", 40, true, 40),
        ("over both", 0, true, 72),
        ("same place, other length", 48, true, 16),
        ("same place, other end", 48, false, 24),
        ("last before the highest", 24, false, 8),
    ];
    for recipe in [V4, V6] {
        for (name, offset, more, bytes) in others {
            let mut rendezvous = fresh();
            for (offset, more, bytes) in base {
                meet(&mut rendezvous, 5, &recipe.fragment(offset, more, &udp(bytes))).unwrap();
            }
            let bad = recipe.fragment(offset, more, &udp(bytes));
            assert_eq!(meet(&mut rendezvous, 6, &bad), Err(DropReason::FragmentOverlap), "{name}");
            // Refused for the whole timeout from then on.
            let rest = recipe.fragment(24, true, &[0; 24]);
            assert_eq!(meet(&mut rendezvous, 6 + TIMEOUT - 1, &rest), Err(DropReason::FragmentOverlap));
            assert_eq!(meet(&mut rendezvous, 6 + TIMEOUT, &rest), Ok(vec![]), "{name}");
            assert_eq!((rendezvous.stats().poisoned, rendezvous.stats().timed_out), (1, 0));
        }
    }
}

#[test]
fn a_contradiction_drops_what_is_held() {
    let mut rendezvous = fresh();
    for offset in [24, 48, 72] {
        meet(&mut rendezvous, 0, &V4.fragment(offset, true, &[1; 24])).unwrap();
    }
    let full = rendezvous.bytes();
    let other = V4.fragment(48, true, &[2; 24]);
    assert_eq!(meet(&mut rendezvous, 0, &other), Err(DropReason::FragmentOverlap), "same place, other bytes");
    assert_eq!(rendezvous.late_drops().get(DropReason::FragmentOverlap), 3);
    assert!(rendezvous.bytes() < full, "only that it is refused is remembered");
    assert_eq!(meet(&mut rendezvous, 0, &V4.fragment(0, true, &udp(24))), Err(DropReason::FragmentOverlap));
}

#[test]
fn two_first_fragments_and_two_ends() {
    let mut rendezvous = fresh();
    meet(&mut rendezvous, 0, &V4.fragment(0, true, &udp(24))).unwrap();
    let mut other = udp(24);
    other[3] = 99;
    let other = V4.fragment(0, true, &other);
    assert_eq!(meet(&mut rendezvous, 0, &other), Err(DropReason::FragmentOverlap), "another first fragment");
    for (end, again) in [(64, 72), (64, 80), (64, 32)] {
        let mut rendezvous = fresh();
        meet(&mut rendezvous, 0, &V4.fragment(end - 8, false, &[0; 8])).unwrap();
        let again = V4.fragment(again - 8, false, &[0; 8]);
        assert_eq!(meet(&mut rendezvous, 0, &again), Err(DropReason::FragmentOverlap), "another end");
    }
    let mut rendezvous = fresh();
    meet(&mut rendezvous, 0, &V4.fragment(56, false, &[0; 8])).unwrap();
    let behind = V4.fragment(64, true, &[0; 8]);
    assert_eq!(meet(&mut rendezvous, 0, &behind), Err(DropReason::FragmentOverlap), "behind the end");
}

/// Copies are ignored, but not without end.
#[test]
fn copies() {
    let mut rendezvous = fresh();
    let fragments = V4.cut(&udp(72), 24);
    assert_eq!(meet(&mut rendezvous, 0, &fragments[1]), Ok(vec![]));
    assert_eq!(meet(&mut rendezvous, 0, &fragments[1]), Ok(vec![]));
    assert_eq!(meet(&mut rendezvous, 0, &fragments[0]).unwrap().len(), 2);
    assert_eq!(meet(&mut rendezvous, 0, &fragments[0]), Ok(vec![]), "a copy of the first");
    assert_eq!(meet(&mut rendezvous, 0, &fragments[1]), Ok(vec![]), "a copy of one that went out");
    assert_eq!(rendezvous.stats().copies, 3);
    let bytes = rendezvous.bytes();
    for _ in 5..FRAGMENTS_PER_PACKET_MAX {
        assert_eq!(meet(&mut rendezvous, 0, &fragments[1]), Ok(vec![]));
    }
    assert_eq!(rendezvous.bytes(), bytes, "copies take no memory");
    assert_eq!(meet(&mut rendezvous, 0, &fragments[1]), Err(DropReason::FragmentsFull), "the limit");
    assert_eq!(
        meet(&mut rendezvous, 0, &fragments[2]),
        Err(DropReason::FragmentsFull),
        "refused from then on"
    );
}

#[test]
fn timeouts() {
    let mut rendezvous = fresh();
    let fragments = V4.cut(&udp(96), 24);
    meet(&mut rendezvous, 7, &fragments[1]).unwrap();
    meet(&mut rendezvous, 7 + SECOND, &fragments[2]).unwrap();
    // By the first that came.
    rendezvous.tick(6 + TIMEOUT);
    assert_eq!(rendezvous.packets(), 1);
    rendezvous.tick(7 + TIMEOUT);
    assert_eq!((rendezvous.packets(), rendezvous.bytes()), (0, 0));
    assert_eq!(rendezvous.late_drops().get(DropReason::FragmentTimeout), 2);
    assert_eq!(rendezvous.stats().timed_out, 1);
    // What comes later begins anew and misses the rest.
    assert_eq!(meet(&mut rendezvous, 8 + TIMEOUT, &fragments[0]).unwrap().len(), 1);
    // What went out is not dropped here.
    rendezvous.tick(100 * TIMEOUT);
    assert_eq!((rendezvous.stats().timed_out, rendezvous.late_drops().total()), (2, 2));
}

#[test]
fn what_makes_packets_different() {
    let rest = V4.fragment(24, false, &[0; 8]);
    let first = V4.fragment(0, true, &udp(24));
    for (name, other, tenant, interface) in [
        ("id", Recipe { id: 0xbee0, ..V4 }.fragment(24, false, &[0; 8]), 0, 3),
        ("source", Recipe { from: 6, ..V4 }.fragment(24, false, &[0; 8]), 0, 3),
        ("protocol", Recipe { protocol: 136, ..V4 }.fragment(24, false, &[0; 8]), 0, 3),
        ("tenant", rest.clone(), 1, 3),
        ("interface", rest.clone(), 0, 4),
    ] {
        let mut rendezvous = fresh();
        let mut none = |_: Released<'_>| panic!("{name} was mixed up");
        rendezvous.push(0, &other, &header(&other), tenant, by(interface), &mut none).unwrap();
        assert_eq!(meet(&mut rendezvous, 0, &first).unwrap().len(), 1, "{name}");
        assert_eq!(meet(&mut rendezvous, 0, &rest).unwrap().len(), 1, "{name}");
        assert_eq!(rendezvous.packets(), 1);
    }
}

/// Frames are padded; padding is no part of a fragment.
#[test]
fn padding_is_cut() {
    let fragment = V4.fragment(0, true, &udp(8));
    let mut padded = fragment.clone();
    padded.resize(60, 0xee);
    assert_eq!(meet(&mut fresh(), 0, &padded).unwrap()[0].packet, fragment);
}
