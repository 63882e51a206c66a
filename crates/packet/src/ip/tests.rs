#![allow(clippy::unwrap_used, reason = "tests")]
use super::*;
use crate::testing::{Recipe, V4, V6, fix_ipv4, payload};
use proptest::prelude::*;

const BAD: Result<IpHeader, DropReason> = Err(DropReason::IpMalformed);

#[test]
fn ipv4() {
    let recipe = Recipe { tos: 0xb9, ttl: 3, ..Recipe::udp(V4, payload(5)) };
    let mut packet = recipe.build();
    let expected = IpHeader {
        version: 4,
        header_bytes: 20,
        total_bytes: 33,
        src: recipe.src,
        dst: recipe.dst,
        protocol: 17,
        fragment: None,
        ecn: ECN_ECT1,
        dscp: 46,
        ttl: 3,
    };
    assert_eq!(IpHeader::parse(&packet), Ok(expected));
    packet.extend([9; 13]);
    assert_eq!(IpHeader::parse(&packet), Ok(expected), "padding is not part of the packet");
    assert_eq!(expected.payload(&packet).len(), 13);
    assert_eq!(expected.payload_bytes(), 13);
    assert!(expected.payload(&packet[..20]).is_empty());
}

#[test]
fn ipv4_options_and_bad_lengths() {
    let mut packet = Recipe::udp(V4, payload(20)).build();
    packet[0] = 0x46;
    assert_eq!(IpHeader::parse(&packet).unwrap().header_bytes, 24);
    packet[0] = 0x4f;
    assert_eq!(IpHeader::parse(&packet), BAD, "60 bytes of header in 48 bytes");
    packet[0] = 0x44;
    assert_eq!(IpHeader::parse(&packet), BAD, "16 bytes of header");
    packet[0] = 0x45;
    for (total, good) in [(0, false), (19, false), (20, true), (48, true), (49, false), (u16::MAX, false)] {
        put_u16(&mut packet, 2, total);
        assert_eq!(IpHeader::parse(&packet).is_ok(), good, "total length {total}");
    }
}

#[test]
fn ipv4_fragments() {
    let mut packet = Recipe::udp(V4, payload(5)).build();
    for (flags, fragment) in [
        (0x0000, None),
        (0x4000, None),
        (0x8000, None),
        (0x2000, Some((0, true))),
        (0x20b9, Some((1480, true))),
        (0x1fff, Some((65_528, false))),
    ] {
        put_u16(&mut packet, 6, flags);
        let header = IpHeader::parse(&packet).unwrap();
        assert_eq!(header.fragment, fragment.map(|(offset, more)| Fragment { offset, more, id: 0xfffe }));
        assert_eq!(header.is_fragmented(), fragment.is_some());
    }
}

#[test]
fn ipv6() {
    let recipe = Recipe { tos: 0xb9, ttl: 3, ..Recipe::tcp(V6, payload(5)) };
    let header = IpHeader::parse(&recipe.build()).unwrap();
    assert_eq!((header.src, header.dst), (recipe.src, recipe.dst));
    assert_eq!((header.version, header.protocol, header.ttl), (6, 6, 3));
    assert_eq!((header.dscp, header.ecn), (46, ECN_ECT1));
    assert_eq!((header.header_bytes, header.total_bytes), (40, 40 + 32 + 5));
    assert_eq!(header.fragment, None);
}

/// Padding options of 8 bytes.
fn options(next: u8) -> [u8; 8] {
    [next, 0, 1, 4, 0, 0, 0, 0]
}

#[test]
fn ipv6_extension_headers() {
    let recipe = Recipe::udp(V6, payload(5));
    let walk = |first: u8, extensions: &[&[u8]]| {
        let header = IpHeader::parse(&recipe.build_behind(first, &extensions.concat()));
        header.map(|header| (header.protocol, header.header_bytes))
    };
    let mut routing = [0; 24];
    routing[..4].copy_from_slice(&[60, 2, 4, 1]);
    let mut ah = [0; 16];
    ah[..2].copy_from_slice(&[17, 2]);
    assert_eq!(walk(0, &[&options(17)]), Ok((17, 48)));
    assert_eq!(walk(0, &[&options(43), &routing, &options(17)]), Ok((17, 80)));
    assert_eq!(walk(51, &[&ah]), Ok((17, 56)), "AH counts in 4 bytes");
    assert_eq!(walk(60, &[&options(59)]), Ok((59, 48)), "no next header");
    assert_eq!(walk(60, &[&options(50)]), Ok((50, 48)), "ESP ends the walk");
    let mut long = vec![0; 2048];
    long[..2].copy_from_slice(&[17, 255]);
    assert_eq!(walk(60, &[&long]), Ok((17, 40 + 2048)));
    assert_eq!(walk(60, &[&long[..2000]]), Err(DropReason::IpMalformed));
    assert_eq!(walk(0, &[&options(0), &options(0)]), Err(DropReason::IpMalformed), "runs into the payload");
    let many = |n: usize| [vec![options(60); n - 1].concat(), options(17).to_vec()].concat();
    assert_eq!(walk(60, &[&many(EXTENSION_HEADERS_MAX)]), Ok((17, 40 + 8 * EXTENSION_HEADERS_MAX)));
    assert_eq!(walk(60, &[&many(EXTENSION_HEADERS_MAX + 1)]), Err(DropReason::IpMalformed));
}

#[test]
fn ipv6_fragments() {
    let recipe = Recipe::udp(V6, payload(16));
    let fragment = |next: u8, flags: u16| {
        let mut bytes = vec![next, 0xaa];
        bytes.extend(flags.to_be_bytes());
        bytes.extend(0xdead_beef_u32.to_be_bytes());
        bytes
    };
    let parse = |first: u8, extensions: &[u8]| IpHeader::parse(&recipe.build_behind(first, extensions));

    let later = parse(44, &fragment(17, 1480 | 1)).unwrap();
    assert_eq!(later.fragment, Some(Fragment { offset: 1480, more: true, id: 0xdead_beef }));
    assert_eq!((later.protocol, later.header_bytes), (17, 48));

    // The first fragment reports what the others report, though its next header could be walked.
    let first = parse(44, &[fragment(60, 1), options(17).to_vec()].concat()).unwrap();
    assert_eq!((first.protocol, first.header_bytes, first.is_fragmented()), (60, 48, true));

    // A whole packet with a fragment header is walked to the end.
    let whole = parse(44, &[fragment(60, 0), options(17).to_vec()].concat()).unwrap();
    assert_eq!((whole.protocol, whole.header_bytes, whole.is_fragmented()), (17, 56, false));
    assert!(whole.fragment.unwrap().is_whole());

    let twice = parse(44, &[fragment(44, 0), fragment(17, 8)].concat());
    assert_eq!(twice, BAD, "two fragment headers");
}

#[test]
fn every_truncation_is_refused() {
    let behind = Recipe::udp(V6, payload(9)).build_behind(0, &options(17));
    for packet in [Recipe::udp(V4, payload(9)).build(), Recipe::udp(V6, payload(9)).build(), behind] {
        assert!(IpHeader::parse(&packet).is_ok());
        for bytes in 0..packet.len() {
            assert_eq!(IpHeader::parse(&packet[..bytes]), BAD, "{bytes} of {}", packet.len());
        }
    }
}

#[test]
fn a_quote_may_be_cut_behind_its_headers() {
    for (packet, headers) in [
        (Recipe::udp(V4, payload(90)).build(), 20),
        (Recipe::udp(V6, payload(90)).build_behind(0, &options(17)), 48),
    ] {
        for bytes in 0..packet.len() {
            let header = IpHeader::parse_quoted(&packet[..bytes]);
            assert_eq!(header.is_ok(), bytes >= headers, "{bytes}");
            assert!(header.is_err() || header.unwrap().total_bytes == bytes);
        }
    }
}

#[test]
fn other_versions() {
    for version in (0..16u8).filter(|version| *version != 4 && *version != 6) {
        let mut packet = Recipe::udp(V4, payload(60)).build();
        packet[0] = version << 4 | 5;
        assert_eq!(IpHeader::parse(&packet), BAD);
        assert_eq!(packet_ecn(&packet), None);
        assert!(!set_ecn(&mut packet, ECN_CE));
    }
}

#[test]
fn congestion_experienced() {
    for addresses in [V4, V6] {
        for ecn in 0..4 {
            let recipe = Recipe { tos: 0xb8 | ecn, ..Recipe::tcp(addresses, payload(3)) };
            let mut packet = recipe.build();
            assert_eq!(packet_ecn(&packet), Some(ecn));
            assert_eq!(set_ecn_ce(&mut packet), ecn != ECN_NOT_ECT);
            let tos = if ecn == ECN_NOT_ECT { 0xb8 } else { 0xbb };
            assert_eq!(packet, Recipe { tos, ..recipe }.build());
        }
    }
    assert!(!set_ecn_ce(&mut []));
    assert!(!set_ecn_ce(&mut [0x45, 2, 0, 20]));
    assert!(!set_ecn_ce(&mut [0x60, 0x20, 0, 20]));
}

proptest! {
    #[test]
    fn any_ecn_keeps_the_checksum(tos: u8, ecn in 0u8..4, id: u16, ttl: u8) {
        let mut packet = Recipe { tos, id, ttl, ..Recipe::udp(V4, payload(3)) }.build();
        prop_assert!(set_ecn(&mut packet, ecn));
        let updated = packet.clone();
        fix_ipv4(&mut packet);
        prop_assert_eq!(&updated, &packet);
        prop_assert_eq!(packet_ecn(&packet), Some(ecn));
    }

    /// Lengths of a parsed header lie within the packet, whatever the bytes.
    #[test]
    fn any_bytes(
        mut bytes in prop::collection::vec(any::<u8>(), 0..200),
        version in prop::sample::select(vec![4u8, 6]),
        next in prop::sample::select(vec![0u8, 6, 43, 44, 51, 60]),
    ) {
        if bytes.len() > 6 {
            bytes[0] = version << 4 | 5;
            let room = bytes.len() - if version == 4 { 0 } else { 40.min(bytes.len()) };
            put_u16(&mut bytes, if version == 4 { 2 } else { 4 }, room as u16);
            if version == 6 {
                bytes[6] = next;
            }
        }
        for header in [IpHeader::parse(&bytes), IpHeader::parse_quoted(&bytes)].into_iter().flatten() {
            prop_assert!(header.header_bytes <= header.total_bytes);
            prop_assert!(header.total_bytes <= bytes.len());
            prop_assert_eq!(header.payload(&bytes).len(), header.payload_bytes());
        }
        set_ecn_ce(&mut bytes);
    }
}
