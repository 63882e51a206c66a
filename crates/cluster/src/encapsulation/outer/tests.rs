#![allow(clippy::unwrap_used, reason = "tests")]
use packet::IpHeader;
use proptest::prelude::*;

use super::*;

fn outer(source: &str, destination: &str) -> Outer {
    let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
    Outer { source, destination, source_port: 50_000, traffic_class: 0xb9 }
}

fn packet(outer: &Outer, payload: &[u8], checksum: OuterChecksum) -> Vec<u8> {
    let mut packet = [vec![0xa5; outer.bytes()], payload.to_vec()].concat();
    assert_eq!(outer.write(&mut packet, checksum), outer.bytes());
    packet
}

#[test]
fn the_headers_are_what_ip_says() {
    for (source, destination) in [("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")] {
        let outer = outer(source, destination);
        let packet = packet(&outer, &[7; 101], OuterChecksum::Usual);
        let header = IpHeader::parse(&packet).unwrap();
        assert_eq!((header.src, header.dst), (outer.source, outer.destination));
        assert_eq!((header.protocol, header.total_bytes, header.ttl), (17, packet.len(), 64));
        assert_eq!((header.dscp, header.ecn, header.is_fragmented()), (0xb9 >> 2, 1, false));
        let udp = header.payload(&packet);
        assert_eq!(udp[..6], [0xc3, 0x50, 0x11, 0xfa, 0, 109]);
        if header.version == 4 {
            assert!(checksum::verify_ipv4_header(&packet[..20]));
            assert_eq!((packet[6] & 0x40, &udp[6..8]), (0x40, &[0, 0][..]));
        } else {
            assert!(checksum::verify_packet(&packet));
            assert_eq!(packet[1] & 0x0f, 0);
            assert_eq!(packet[2..4], [0xc3, 0x50], "the flow label");
        }
        assert_eq!(parse_outer(&packet), Ok(Some((outer, &[7; 101][..]))));
    }
}

#[test]
fn checksums_are_left_out_or_left_to_others_where_told() {
    for (source, destination) in [("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")] {
        let outer = outer(source, destination);
        let zero = packet(&outer, &[7; 50], OuterChecksum::Zero);
        assert_eq!(u16_at(&zero, outer.bytes() - 2), Some(0));
        let mut partial = packet(&outer, &[7; 50], OuterChecksum::Partial);
        let at = outer.bytes() - UDP_BYTES;
        let sum = checksum::finish(checksum::sum(&partial[at..], 0));
        put_u16(&mut partial, at + 6, sum);
        assert!(checksum::verify_packet(&partial), "what a card makes of it");
    }
}

#[test]
fn a_checksum_of_zero_is_not_taken_for_none() {
    let outer = outer("2001:db8::1", "2001:db8::2");
    let without = packet(&outer, &[0; 40], OuterChecksum::Usual);
    // With its own checksum in the payload the sum over all is zero, which is sent as its equal.
    let mut payload = [0; 40];
    payload[..2].copy_from_slice(&without[46..48]);
    let with = packet(&outer, &payload, OuterChecksum::Usual);
    assert_eq!(with[46..48], [0xff, 0xff]);
    assert!(checksum::verify_packet(&with));
}

#[test]
fn what_cannot_be_a_packet_is_not_written() {
    let mixed = outer("192.0.2.1", "2001:db8::2");
    assert_eq!(mixed.write(&mut [0; 100], OuterChecksum::Usual), 0);
    let v4 = outer("192.0.2.1", "192.0.2.2");
    let mut longest = vec![0; 65_536];
    assert_eq!(v4.write(&mut longest, OuterChecksum::Usual), 0);
    assert_eq!(v4.write(&mut longest[..65_535], OuterChecksum::Usual), 28);
    let v6 = outer("2001:db8::1", "2001:db8::2");
    assert_eq!(v6.write(&mut longest, OuterChecksum::Usual), 48);
    longest.resize(65_576, 0);
    assert_eq!(v6.write(&mut longest, OuterChecksum::Usual), 0);
    for length in 0..48 {
        let mut room = vec![1; length];
        assert_eq!(v6.write(&mut room, OuterChecksum::Usual), 0);
        assert_eq!(room, vec![1; length]);
    }
}

#[test]
fn other_packets_are_left_alone() {
    for (source, destination) in [("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")] {
        let good = packet(&outer(source, destination), &[7; 50], OuterChecksum::Usual);
        let at = good.len() - 58;
        let changed = |place: usize, value: u8| {
            let mut packet = good.clone();
            packet[place] = value;
            parse_outer(&packet).map(|found| found.is_some())
        };
        assert_eq!(changed(at, 1), Ok(true), "the source port is anything");
        assert_eq!(changed(at + 3, 0), Ok(false), "another port");
        assert_eq!(changed(0, 0x55), Ok(false), "IP version 5");
        if at == 20 {
            assert_eq!(changed(9, 6), Ok(false), "TCP");
            assert_eq!(changed(6, 0x20), Ok(false), "the first fragment");
            assert_eq!(changed(7, 3), Ok(false), "a later fragment");
            assert_eq!(changed(0, 0x44), Ok(false), "no header");
            assert_eq!(changed(3, 77), Err(DropReason::BusTooShort), "UDP beyond IP's end");
        } else {
            assert_eq!(changed(6, 44), Ok(false), "a fragment header");
            assert_eq!(changed(5, 57), Err(DropReason::BusTooShort), "UDP beyond IP's end");
        }
        assert_eq!(changed(at + 5, 59), Err(DropReason::BusTooShort), "UDP beyond the end");
        assert_eq!(changed(at + 5, 7), Err(DropReason::BusTooShort), "UDP shorter than its header");
        for length in 0..good.len() {
            let found = parse_outer(&good[..length]).unwrap_or_default();
            assert_eq!(found, None, "cut at {length}");
        }
        let padded = [good.as_slice(), &[0; 9]].concat();
        assert_eq!(parse_outer(&padded).unwrap().unwrap().1, [7; 50]);
    }
}

/// An Ethernet frame with a UDP packet in it.
fn frame(source: u16, tag: &[u8], offset: u8) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0, offset, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
    packet.extend(source.to_be_bytes());
    packet.extend([1, 187, 0, 20, 0, 0]);
    packet.resize(40, source as u8);
    let sum = checksum::finish(checksum::sum(&packet[..20], 0));
    put_u16(&mut packet, 10, sum);
    [&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2][..], tag, &[8, 0], &packet].concat()
}

#[test]
fn a_flow_keeps_its_port_and_flows_are_spread() {
    let port = entropy_port(&frame(1_000, &[], 0));
    let mut other_payload = frame(1_000, &[], 0);
    *other_payload.last_mut().unwrap() = 0xff;
    assert_eq!(entropy_port(&other_payload), port);
    let tagged = frame(1_000, &[0x81, 0, 0, 7], 0);
    assert_eq!(entropy_port(&tagged), port, "with its tag inside as well");
    let (first, later) = (frame(1_000, &[], 1), frame(2_000, &[], 1));
    assert_eq!(entropy_port(&first), entropy_port(&later), "fragments have no ports to be told apart by");
    // 64 links chosen by the port's low or high bits get their share of 6,400 flows.
    let mut counts = [[0u32; 64]; 2];
    for source in 0..6_400 {
        let port = entropy_port(&frame(source, &[], 0));
        assert!(port >= ENTROPY_PORT_MIN);
        counts[0][usize::from(port & 63)] += 1;
        counts[1][usize::from(port >> 8 & 63)] += 1;
    }
    assert!(counts.iter().flatten().all(|count| (60..=140).contains(count)), "{counts:?}");
}

#[test]
fn frames_that_are_no_ip_packets_have_ports_too() {
    let arp = |sender: u8| [&[0xff; 6][..], &[2, 0, 0, 0, 0, sender], &[8, 6], &[0; 28]].concat();
    let ports: std::collections::BTreeSet<u16> = (0..=255).map(|sender| entropy_port(&arp(sender))).collect();
    assert!(ports.len() > 240, "{}", ports.len());
    for length in 0..42 {
        assert!(entropy_port(&arp(1)[..length]) >= ENTROPY_PORT_MIN);
    }
}

proptest! {
    #[test]
    fn round_trip(
        v4: (u32, u32), v6: (u128, u128), is_v6: bool, source_port: u16, traffic_class: u8,
        payload in proptest::collection::vec(any::<u8>(), 0..100), which in 0..3usize,
    ) {
        let checksum = [OuterChecksum::Usual, OuterChecksum::Zero, OuterChecksum::Partial][which];
        let (source, destination) = if is_v6 {
            (Ipv6Addr::from(v6.0).into(), Ipv6Addr::from(v6.1).into())
        } else {
            (Ipv4Addr::from(v4.0).into(), Ipv4Addr::from(v4.1).into())
        };
        let outer = Outer { source, destination, source_port, traffic_class };
        let packet = packet(&outer, &payload, checksum);
        prop_assert_eq!(parse_outer(&packet), Ok(Some((outer, &payload[..]))));
        if checksum == OuterChecksum::Usual && is_v6 {
            prop_assert!(checksum::verify_packet(&packet));
        }
    }

    #[test]
    fn garbage_never_panics(first: u8, garbage in proptest::collection::vec(any::<u8>(), 0..100)) {
        let mut packet = garbage;
        if let Some(byte) = packet.first_mut() {
            *byte = if first & 1 == 0 { 0x45 } else { 0x60 };
        }
        if let Ok(Some((_, payload))) = parse_outer(&packet) {
            prop_assert!(payload.len() + 28 <= packet.len());
        }
        prop_assert!(entropy_port(&packet) >= ENTROPY_PORT_MIN);
    }
}
