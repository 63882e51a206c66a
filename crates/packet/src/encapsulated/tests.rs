#![allow(clippy::unwrap_used, reason = "tests")]

use proptest::prelude::*;

use super::*;
use crate::vnet::NEEDS_CSUM;

const PAYLOAD: usize = 4_000;
const SIZE: usize = 1_300;

fn ipv4(protocol: u8, flags: u8, upper: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 0, 0x12, 0xff, flags, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
    put_u16(&mut packet, 2, (20 + upper.len()) as u16);
    let sum = checksum::finish(checksum::sum(&packet, 0));
    put_u16(&mut packet, 10, sum);
    packet.extend(upper);
    packet
}

fn ipv6(protocol: u8, upper: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0, 0, 0, protocol, 64];
    put_u16(&mut packet, 4, upper.len() as u16);
    packet.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    packet.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
    packet.extend(upper);
    packet
}

fn ip(version: u8, protocol: u8, upper: &[u8]) -> Vec<u8> {
    if version == 4 { ipv4(protocol, 0x40, upper) } else { ipv6(protocol, upper) }
}

fn payload() -> Vec<u8> {
    (0..PAYLOAD).map(|at| (at * 7 + at / 251) as u8).collect()
}

/// TCP, the last of whose segments ends the connection.
fn tcp() -> Vec<u8> {
    let mut header = vec![0x10, 0, 0, 80, 0xff, 0xff, 0xfe, 0, 0, 0, 0, 9, 0x80, 0x19, 1, 0, 0, 0, 0, 0];
    header.extend([1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
    header.extend(payload());
    header
}

fn udp(ports: [u8; 4], payload: &[u8], checksum: u16) -> Vec<u8> {
    let mut datagram = ports.to_vec();
    datagram.extend((8 + payload.len() as u16).to_be_bytes());
    datagram.extend(checksum.to_be_bytes());
    datagram.extend(payload);
    datagram
}

/// Header of a super-packet whose transport header is `inside` bytes behind the packet's beginning.
fn header(gso_type: u8, inside: usize) -> VirtioNetHeader {
    VirtioNetHeader {
        flags: NEEDS_CSUM,
        gso_type,
        hdr_len: 0,
        gso_size: SIZE as u16,
        csum_start: inside as u16,
        csum_offset: if gso_type == GSO_UDP_L4 { 6 } else { 16 },
    }
}

/// Segments of a packet, all of them whole on their own.
fn cut(header: &VirtioNetHeader, packet: &[u8]) -> Vec<Vec<u8>> {
    assert!(is_encapsulated(header, packet));
    let segmenter = EncapsulatedSegmenter::new(header, packet).unwrap();
    let segments: Vec<_> = (0..segmenter.segments())
        .map(|index| {
            let mut out = vec![0xee; segmenter.segment_bytes(index)];
            assert_eq!(segmenter.write_segment(index, &mut out), out.len());
            out
        })
        .collect();
    assert_eq!(segments.len(), PAYLOAD.div_ceil(SIZE));
    assert_eq!(segmenter.segment_bytes(segments.len()), 0);
    assert_eq!(segmenter.write_segment(segments.len(), &mut [0; 2_000]), 0);
    assert_eq!(segmenter.write_segment(0, &mut [0; 100]), 0);
    segments
}

/// Looks at the segments: lengths and checksums outside, and inside from `at` on. Their payload.
fn inside(segments: &[Vec<u8>], at: usize) -> Vec<u8> {
    let mut all = Vec::new();
    for (index, segment) in segments.iter().enumerate() {
        let outer = IpHeader::parse(segment).unwrap();
        assert_eq!(outer.total_bytes, segment.len());
        if outer.version == 4 {
            assert!(checksum::verify_ipv4_header(&segment[..20]));
            assert_eq!(u16_at(segment, 4), Some(0x12ff + index as u16));
        }
        let packet = &segment[at..];
        assert!(checksum::verify_packet(packet), "segment {index}");
        let inner = IpHeader::parse(packet).unwrap();
        assert_eq!(inner.total_bytes, packet.len());
        let transport = inner.payload(packet);
        if inner.protocol == PROTOCOL_TCP {
            let sequence = u32::from_be_bytes(transport[4..8].try_into().unwrap());
            assert_eq!(sequence, 0xffff_fe00u32.wrapping_add((index * SIZE) as u32));
            let last = index + 1 == segments.len();
            assert_eq!(transport[13], if last { 0x19 } else { 0x10 });
            all.extend(&transport[32..]);
        } else {
            all.extend(&transport[8..]);
        }
    }
    all
}

#[test]
fn tcp_in_an_ip_packet_becomes_packets_of_its_own() {
    for (outer, inner) in [(4, 4), (4, 6), (6, 4), (6, 6)] {
        let inner_packet = ip(inner, PROTOCOL_TCP, &tcp());
        let packet = ip(outer, if inner == 4 { PROTOCOL_IPV4 } else { PROTOCOL_IPV6 }, &inner_packet);
        let at = packet.len() - inner_packet.len();
        let gso = if inner == 4 { GSO_TCPV4 } else { GSO_TCPV6 };
        let header = header(gso, at + inner_packet.len() - tcp().len());
        assert_eq!(inside(&cut(&header, &packet), at), payload(), "{inner} in {outer}");
    }
}

#[test]
fn gre_gets_a_checksum_of_its_own_or_none() {
    let inner = ipv4(PROTOCOL_TCP, 0, &tcp());
    for (flags, shim) in [
        (0u16, vec![0, 0, 8, 0]),
        (0x2000, vec![0x20, 0, 8, 0, 0, 0, 0, 7]),
        (GRE_CHECKSUM, vec![0x80, 0, 8, 0, 0, 0, 0, 0]),
    ] {
        let packet = ipv4(PROTOCOL_GRE, 0, &[&shim[..], &inner].concat());
        let at = 20 + shim.len();
        let segments = cut(&header(GSO_TCPV4, at + 20), &packet);
        assert_eq!(inside(&segments, at), payload());
        for segment in segments {
            let sum = checksum::finish(checksum::sum(&segment[20..], 0));
            assert!(flags != GRE_CHECKSUM || sum == 0, "its checksum");
            assert!(flags == GRE_CHECKSUM || segment[20..at] == shim);
        }
    }
    // Numbered packets cannot become more of them.
    let numbered = ipv4(PROTOCOL_GRE, 0, &[&[0x10, 0, 8, 0, 0, 0, 0, 7][..], &inner].concat());
    let refused = EncapsulatedSegmenter::new(&header(GSO_TCPV4, 48), &numbered).unwrap_err();
    assert_eq!(refused, DropReason::BadOffload);
}

#[test]
fn udp_around_it_keeps_its_checksum_or_has_none() {
    let shim = [8, 0, 0, 0, 0, 0, 42, 0, 2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
    for outer in [4, 6] {
        for checksum in [0, 0x1234] {
            let inner = ipv4(PROTOCOL_TCP, 0, &tcp());
            let datagram = udp([0x9c, 0x40, 0x12, 0xb5], &[&shim[..], &inner].concat(), checksum);
            let packet = ip(outer, PROTOCOL_UDP, &datagram);
            let at = packet.len() - inner.len();
            let segments = cut(&header(GSO_TCPV4, at + 20), &packet);
            assert_eq!(inside(&segments, at), payload());
            for segment in segments {
                let ip = IpHeader::parse(&segment).unwrap();
                let datagram = ip.payload(&segment);
                assert_eq!(u16_at(datagram, 4), Some(datagram.len() as u16));
                match checksum {
                    0 => assert_eq!(u16_at(datagram, 6), Some(0)),
                    _ => assert!(checksum::verify_upper(ip.src, ip.dst, PROTOCOL_UDP, datagram)),
                }
                assert_eq!(datagram[8..8 + shim.len()], shim);
            }
        }
    }
}

#[test]
fn datagrams_in_an_ip_packet_become_packets_of_their_own() {
    for inner in [4, 6] {
        let inner_packet = ip(inner, PROTOCOL_UDP, &udp([0, 9, 0, 9], &payload(), 0));
        let packet = ipv4(if inner == 4 { PROTOCOL_IPV4 } else { PROTOCOL_IPV6 }, 0, &inner_packet);
        let header = header(GSO_UDP_L4, packet.len() - PAYLOAD - 8);
        assert_eq!(inside(&cut(&header, &packet), 20), payload());
    }
}

#[test]
fn what_is_no_such_packet_is_left_alone_or_refused() {
    let inner = ipv4(PROTOCOL_TCP, 0, &tcp());
    let plain = header(GSO_TCPV4, 20);
    assert!(!is_encapsulated(&plain, &inner), "an ordinary super-packet");
    assert!(!is_encapsulated(&VirtioNetHeader { gso_type: GSO_NONE, ..header(GSO_NONE, 40) }, &inner));
    let packet = ipv4(PROTOCOL_IPV4, 0, &inner);
    let right = header(GSO_TCPV4, 40);
    let refused = [
        // Of another version, somewhere else, of no size, a fragment, of a protocol that nobody knows, with something behind.
        (header(GSO_TCPV6, 40), packet.clone()),
        (header(GSO_TCPV4, 44), packet.clone()),
        (VirtioNetHeader { gso_size: 0, ..right }, packet.clone()),
        (VirtioNetHeader { csum_offset: 6, ..right }, packet.clone()),
        (right, ipv4(PROTOCOL_IPV4, 0x20, &inner)),
        (right, ipv4(99, 0, &inner)),
        (right, ipv4(PROTOCOL_IPV4, 0, &[&inner[..], &[0; 4]].concat())),
    ];
    for (number, (header, packet)) in refused.iter().enumerate() {
        let refused = EncapsulatedSegmenter::new(header, packet).map(drop);
        assert_eq!(refused, Err(DropReason::BadOffload), "{number}");
    }
}

proptest! {
    /// Whatever a packet and its header say, nothing panics, and segments are no longer than they say.
    #[test]
    fn any_packet_is_cut_or_refused(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        gso_type in prop_oneof![Just(GSO_TCPV4), Just(GSO_TCPV6), Just(GSO_UDP_L4), any::<u8>()],
        gso_size in 0u16..100,
        start in 0u16..220,
        protocol in prop_oneof![Just(PROTOCOL_IPV4), Just(PROTOCOL_GRE), Just(PROTOCOL_UDP), any::<u8>()],
    ) {
        let packets = [bytes.clone(), ipv4(protocol, 0, &bytes), ipv4(protocol, 0, &ipv4(PROTOCOL_TCP, 0, &bytes))];
        for packet in packets {
            let header = VirtioNetHeader { gso_size, ..header(gso_type, usize::from(start)) };
            let _ = is_encapsulated(&header, &packet);
            if let Ok(segmenter) = EncapsulatedSegmenter::new(&header, &packet) {
                for index in 0..segmenter.segments() {
                    let mut out = vec![0; segmenter.segment_bytes(index)];
                    prop_assert_eq!(segmenter.write_segment(index, &mut out), out.len());
                    prop_assert!(IpHeader::parse(&out).is_ok());
                }
            }
        }
    }
}
