//! Address translation: a packet, and the flow key that it shall have.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use packet::{FlowKey, IpHeader, checksum, ip};
use services::rewrite::{decrement_ttl, rewrite, rewrite_error};

/// Bytes in front of the packet: what to do, and the new key.
pub const ORDER_BYTES: usize = 37;
/// In the first byte: the checksum is partial.
pub const PARTIAL: u8 = 1;
/// In the first byte: the new addresses are of the other IP version.
pub const OTHER_VERSION: u8 = 2;
/// In the first byte: a router that sent an ICMP error is hidden.
pub const HIDE: u8 = 4;

/// Every translated packet stays as valid as it was, becomes what was asked for, and can be translated back. What is
/// refused stays as it is.
pub fn nat_rewrite(data: &[u8]) {
    let Some((order, packet)) = data.split_at_checked(ORDER_BYTES) else { return };
    let Ok(header) = IpHeader::parse(packet) else { return };
    count_down(packet, &header);
    let v6 = (header.version == 6) != (order[0] & OTHER_VERSION != 0);
    let to = FlowKey {
        src: address(&order[1..17], v6),
        dst: address(&order[17..33], v6),
        src_port: u16::from_be_bytes([order[33], order[34]]),
        dst_port: u16::from_be_bytes([order[35], order[36]]),
        protocol: header.protocol,
    };
    let partial = order[0] & PARTIAL != 0;
    plain(packet, &header, partial, &to);
    error(packet, &header, partial, &to, order[0] & HIDE != 0);
}

fn address(bytes: &[u8], v6: bool) -> IpAddr {
    let bits = u128::from_be_bytes(bytes.try_into().expect("16 bytes"));
    if v6 { IpAddr::V6(Ipv6Addr::from(bits)) } else { IpAddr::V4(Ipv4Addr::from(bits as u32)) }
}

fn plain(packet: &[u8], header: &IpHeader, partial: bool, to: &FlowKey) {
    let mut there = packet.to_vec();
    if rewrite(&mut there, header, partial, to).is_err() {
        assert_eq!(there, packet, "a refused packet changed");
        return;
    }
    let after = IpHeader::parse(&there).expect("a translated packet");
    assert_eq!((after.src, after.dst), (to.src, to.dst));
    assert_eq!(IpHeader { src: header.src, dst: header.dst, ..after }, *header);
    let upper = header.payload(packet);
    let has_head = header.fragment.is_none_or(|fragment| fragment.offset == 0);
    if has_head && let Some(ports) = ports(header, upper) {
        let expected = match ports {
            Ports::Two(..) => Ports::Two(to.src_port, to.dst_port),
            Ports::Id(_) => Ports::Id(if to.src_port != 0 { to.src_port } else { to.dst_port }),
        };
        assert_eq!(self::ports(&after, after.payload(&there)), Some(expected));
    }
    assert!(!ip_valid(packet, header) || ip_valid(&there, &after), "the header checksum did not follow");
    if !partial && valid(packet, header) {
        assert!(valid(&there, &after), "the checksum did not follow");
    }
    if has_head && header.protocol == ip::PROTOCOL_UDP && !partial {
        let field =
            |packet: &[u8]| packet.get(header.header_bytes + 6..header.header_bytes + 8) == Some(&[0, 0]);
        assert_eq!(field(packet), field(&there), "a UDP checksum came or went");
    }
    let from = key(header, ports(header, upper).filter(|_| has_head));
    assert_eq!(rewrite(&mut there, &after, partial, &from), Ok(()), "there, but not back");
    let places = places(header, 0, header.header_bytes + checksum_offset(header).unwrap_or(0));
    assert_eq!(without_ones(&there, &places), without_ones(packet, &places), "there and back differs");
}

fn error(packet: &[u8], header: &IpHeader, partial: bool, to: &FlowKey, hide: bool) {
    let hide = hide.then_some(to.src);
    let mut there = packet.to_vec();
    if rewrite_error(&mut there, header, partial, to, hide).is_err() {
        assert_eq!(there, packet, "a refused error changed");
        return;
    }
    let quote_at = header.header_bytes + 8;
    let quote = |packet| header.payload(packet).get(8..).and_then(|quote| IpHeader::parse_quoted(quote).ok());
    let (inner, inner_after) = (quote(packet).expect("a quote"), quote(&there).expect("the quote"));
    let after = IpHeader::parse(&there).expect("a translated error");
    assert_eq!((after.dst, inner_after.src, inner_after.dst), (to.dst, to.dst, to.src));
    assert!([header.src, to.src].contains(&after.src));
    assert!(!ip_valid(packet, header) || ip_valid(&there, &after), "the header checksum did not follow");
    let quoted = |packet: &[u8]| {
        inner.version == 6 || checksum::verify_ipv4_header(&packet[quote_at..][..inner.header_bytes])
    };
    assert!(!quoted(packet) || quoted(&there), "the quoted header checksum did not follow");
    if !partial && valid(packet, header) {
        assert!(valid(&there, &after), "the ICMP checksum did not follow");
    }
    let has_head = inner.fragment.is_none_or(|fragment| fragment.offset == 0);
    let quoted_ports = ports(&inner, inner.payload(&packet[quote_at..])).filter(|_| has_head);
    let from = key(&inner, quoted_ports).reversed();
    let back = rewrite_error(&mut there, &after, partial, &from, Some(header.src));
    assert_eq!(back, Ok(()), "there, but not back");
    // The hidden router may now have the address of the flow's end: then nobody can tell.
    if header.src == inner.dst || after.src != to.src {
        let mut places = places(header, 0, header.header_bytes + 2);
        places.extend(self::places(
            &inner,
            quote_at,
            quote_at + inner.header_bytes + checksum_offset(&inner).unwrap_or(0),
        ));
        assert_eq!(without_ones(&there, &places), without_ones(packet, &places), "there and back differs");
    }
}

fn count_down(packet: &[u8], header: &IpHeader) {
    let mut copy = packet.to_vec();
    match decrement_ttl(&mut copy) {
        Ok(()) => {
            let after = IpHeader::parse(&copy).expect("only the time to live changed");
            assert_eq!(IpHeader { ttl: after.ttl + 1, ..after }, *header);
            assert!(!ip_valid(packet, header) || ip_valid(&copy, &after));
        }
        Err(_) => assert!(header.ttl <= 1 && copy == packet),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ports {
    Two(u16, u16),
    Id(u16),
}

fn ports(header: &IpHeader, upper: &[u8]) -> Option<Ports> {
    let word = |at: usize| Some(u16::from_be_bytes([*upper.get(at)?, *upper.get(at + 1)?]));
    match (header.version, header.protocol, upper.first()?) {
        (_, 6 | 17 | 132 | 136, _) => Some(Ports::Two(word(0)?, word(2)?)),
        (4, 1, 0 | 8 | 13..=18 | 42 | 43) | (6, 58, 128 | 129 | 160 | 161) => Some(Ports::Id(word(4)?)),
        _ => None,
    }
}

fn key(header: &IpHeader, ports: Option<Ports>) -> FlowKey {
    let (src_port, dst_port) = match ports {
        Some(Ports::Two(src, dst)) => (src, dst),
        Some(Ports::Id(id)) => (id, 0),
        None => (0, 0),
    };
    FlowKey { src: header.src, dst: header.dst, src_port, dst_port, protocol: header.protocol }
}

fn checksum_offset(header: &IpHeader) -> Option<usize> {
    match (header.version, header.protocol) {
        (_, 6) => Some(16),
        (_, 17 | 33 | 136) => Some(6),
        (4, 1) | (6, 58) => Some(2),
        _ => None,
    }
}

fn ip_valid(packet: &[u8], header: &IpHeader) -> bool {
    header.version == 6 || checksum::verify_ipv4_header(&packet[..header.header_bytes])
}

/// The upper layer's checksum is right, by the simplest code.
fn valid(packet: &[u8], header: &IpHeader) -> bool {
    let upper = header.payload(packet);
    if header.is_fragmented() {
        return false;
    }
    match (header.version, header.protocol) {
        (4, 1) => checksum::fold(checksum::sum(upper, 0)) == 0xffff,
        (_, 6 | 17 | 33 | 136) | (6, 58) => checksum::verify_packet(packet),
        (_, 132) if upper.len() >= 12 => {
            let sum = u32::from_le_bytes(upper[8..12].try_into().expect("four bytes"));
            crc32c(&[&upper[..8], &[0; 4], &upper[12..]].concat()) == sum
        }
        _ => false,
    }
}

/// The CRC of SCTP, bit by bit.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
        }
    }
    !crc
}

/// Where checksums stand: of the IPv4 header that starts at `at`, and the upper one.
fn places(header: &IpHeader, at: usize, upper: usize) -> Vec<usize> {
    let mut places = vec![];
    if header.version == 4 {
        places.push(at + 10);
    }
    if checksum_offset(header).is_some() && header.fragment.is_none_or(|fragment| fragment.offset == 0) {
        places.push(upper);
    }
    places
}

/// A checksum of 0xffff means the same as zero, and arithmetic may turn one into the other.
fn without_ones(packet: &[u8], places: &[usize]) -> Vec<u8> {
    let mut copy = packet.to_vec();
    for at in places {
        if let Some(field) = copy.get_mut(*at..*at + 2).filter(|field| **field == [0xff; 2]) {
            field.fill(0);
        }
    }
    copy
}
