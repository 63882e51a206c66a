//! Packets that no router passes on, whatever its rules say: addresses that mean nothing beyond a link or nowhere at all
//! (RFC 1812 §5.3.7, RFC 6890), and routes that their sender chose.

use std::net::IpAddr;

use crate::array_at;
use crate::drop_reason::DropReason;
use crate::ip::{
    EXTENSION_HEADERS_MAX, IPV4_HEADER_BYTES, IPV6_HEADER_BYTES, IpHeader, PROTOCOL_ROUTING, extension_bytes,
    is_extension,
};

/// IPv4 option: end of the list (RFC 791).
const OPTION_END: u8 = 0;
/// IPv4 option: one byte of padding.
const OPTION_NOP: u8 = 1;
/// IPv4 option: loose source and record route.
const OPTION_LSRR: u8 = 131;
/// IPv4 option: strict source and record route.
const OPTION_SSRR: u8 = 137;

/// Why a packet to or from this address does not go through a router, apart from multicast and 255.255.255.255: these are
/// no sources, but some destinations.
#[inline]
#[must_use]
pub fn of_address(address: IpAddr) -> Option<DropReason> {
    match address {
        IpAddr::V4(address) => match address.octets() {
            [0, ..] => Some(DropReason::MartianThisNetwork),
            [127, ..] => Some(DropReason::MartianLoopback),
            [169, 254, ..] => Some(DropReason::MartianLinkLocal),
            [255, 255, 255, 255] => None,
            [240..=255, ..] => Some(DropReason::MartianReserved),
            _ => None,
        },
        IpAddr::V6(address) => match address.to_bits() {
            0 => Some(DropReason::MartianThisNetwork),
            1 => Some(DropReason::MartianLoopback),
            bits if bits >> 118 == 0xfe80 >> 6 => Some(DropReason::MartianLinkLocal),
            bits if bits >> 32 == 0xffff => Some(DropReason::MartianMapped),
            _ => None,
        },
    }
}

/// Why a packet from this address does not go through a router.
#[inline]
#[must_use]
pub fn of_source(address: IpAddr) -> Option<DropReason> {
    match address {
        address if address.is_multicast() => Some(DropReason::MartianMulticast),
        IpAddr::V4(address) if address.is_broadcast() => Some(DropReason::MartianReserved),
        address => of_address(address),
    }
}

/// Checks a packet that goes through a router.
///
/// # Errors
/// Why it does not.
pub fn check(header: &IpHeader, packet: &[u8]) -> Result<(), DropReason> {
    let reason = of_source(header.src).or_else(|| of_address(header.dst));
    let routed = || is_source_routed(header, packet).then_some(DropReason::SourceRouted);
    reason.or_else(routed).map_or(Ok(()), Err)
}

/// Checks a packet at the end of a link whose both ends are routers or hosts, as [`check`], but that neighbors talk by
/// link-local addresses among themselves, and to groups of the link (OSPFv3, VRRP, neighbor discovery).
///
/// # Errors
/// Why it does not belong there.
pub fn check_link(header: &IpHeader, packet: &[u8]) -> Result<(), DropReason> {
    let is_local = |address| of_address(address) == Some(DropReason::MartianLinkLocal);
    let among_neighbors = (is_local(header.src) && (is_local(header.dst) || header.dst.is_multicast()))
        || (header.dst.is_multicast() && header.src.is_unspecified());
    if among_neighbors && !is_source_routed(header, packet) {
        return Ok(());
    }
    check(header, packet)
}

/// Whether the sender chose routers for the packet: an IPv4 option LSRR or SSRR, or an IPv6 routing header of type 0, used
/// up or not.
#[must_use]
pub fn is_source_routed(header: &IpHeader, packet: &[u8]) -> bool {
    if header.version == 4 {
        let options = packet.get(IPV4_HEADER_BYTES..header.header_bytes);
        return options.is_some_and(has_route_option);
    }
    let (Some(mut protocol), mut at) = (packet.get(6).copied(), IPV6_HEADER_BYTES) else { return false };
    for _ in 0..EXTENSION_HEADERS_MAX {
        if at >= header.header_bytes || !is_extension(protocol) {
            return false;
        }
        let Some([next, length, kind]) = array_at(packet, at) else { return false };
        if protocol == PROTOCOL_ROUTING && kind == 0 {
            return true;
        }
        at += extension_bytes(protocol, length);
        protocol = next;
    }
    false
}

fn has_route_option(mut options: &[u8]) -> bool {
    while let [kind, rest @ ..] = options {
        let bytes = match (*kind, rest.first()) {
            (OPTION_LSRR | OPTION_SSRR, _) => return true,
            (OPTION_END, _) => return false,
            (OPTION_NOP, _) => 1,
            (_, Some(bytes)) => usize::from(*bytes).max(2),
            (_, None) => return false,
        };
        options = options.get(bytes..).unwrap_or_default();
    }
    false
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn v4(src: [u8; 4], dst: [u8; 4], options: &[u8]) -> Vec<u8> {
        let words = 5 + options.len() / 4;
        let mut packet = vec![0x40 | words as u8, 0, 0, (words * 4 + 8) as u8, 0, 0, 0, 0, 64, 17, 0, 0];
        packet.extend_from_slice(&[src, dst].concat());
        packet.extend_from_slice(options);
        packet.extend_from_slice(&[0, 9, 0, 9, 0, 8, 0, 0]);
        packet
    }

    fn v6(src: &str, dst: &str, routing: Option<u8>) -> Vec<u8> {
        let next = if routing.is_some() { PROTOCOL_ROUTING } else { 17 };
        let mut packet = vec![0x60, 0, 0, 0, 0, if routing.is_some() { 16 } else { 8 }, next, 64];
        for address in [src, dst] {
            packet.extend_from_slice(&address.parse::<std::net::Ipv6Addr>().unwrap().octets());
        }
        packet.extend(routing.into_iter().flat_map(|kind| [17, 0, kind, 0, 0, 0, 0, 0]));
        packet.extend_from_slice(&[0, 9, 0, 9, 0, 8, 0, 0]);
        packet
    }

    fn checked(packet: &[u8]) -> Result<(), DropReason> {
        check(&IpHeader::parse(packet).unwrap(), packet)
    }

    /// Each kind of address, as source and as destination, at both ends of its range.
    #[test]
    fn each_kind_has_its_reason() {
        const PEER: [u8; 4] = [198, 51, 100, 7];
        for (first, last, reason) in [
            ([0, 0, 0, 0], [0, 255, 255, 255], DropReason::MartianThisNetwork),
            ([127, 0, 0, 0], [127, 255, 255, 255], DropReason::MartianLoopback),
            ([169, 254, 0, 0], [169, 254, 255, 255], DropReason::MartianLinkLocal),
            ([240, 0, 0, 0], [255, 255, 255, 254], DropReason::MartianReserved),
        ] {
            for address in [first, last] {
                assert_eq!(checked(&v4(address, PEER, &[])), Err(reason), "from {address:?}");
                assert_eq!(checked(&v4(PEER, address, &[])), Err(reason), "to {address:?}");
            }
        }
        for good in
            [[1, 0, 0, 0], [126, 9, 9, 9], [128, 0, 0, 0], [169, 253, 0, 1], [169, 255, 0, 1], [223, 1, 1, 1]]
        {
            assert_eq!(checked(&v4(good, PEER, &[])), Ok(()));
        }
        assert_eq!(checked(&v4([255; 4], PEER, &[])), Err(DropReason::MartianReserved));
        assert_eq!(checked(&v4([224, 0, 0, 1], PEER, &[])), Err(DropReason::MartianMulticast));
        assert_eq!(checked(&v4(PEER, [224, 0, 0, 1], &[])), Ok(()), "for rules about groups to judge");
        const PEER6: &str = "2001:db8::7";
        for (address, reason) in [
            ("::", DropReason::MartianThisNetwork),
            ("::1", DropReason::MartianLoopback),
            ("fe80::", DropReason::MartianLinkLocal),
            ("febf:ffff::1", DropReason::MartianLinkLocal),
            ("::ffff:10.0.0.1", DropReason::MartianMapped),
        ] {
            assert_eq!(checked(&v6(address, PEER6, None)), Err(reason), "from {address}");
            assert_eq!(checked(&v6(PEER6, address, None)), Err(reason), "to {address}");
        }
        assert_eq!(checked(&v6("ff02::1", PEER6, None)), Err(DropReason::MartianMulticast));
        for good in ["::2", "fec0::1", "fe7f::1", "64:ff9b::1", "fd00::1"] {
            assert_eq!(checked(&v6(good, PEER6, None)), Ok(()), "{good}");
        }
    }

    #[test]
    fn neighbors_talk_by_link_local_addresses() {
        let at_link = |packet: &[u8]| check_link(&IpHeader::parse(packet).unwrap(), packet);
        for (src, dst) in [("fe80::1", "ff02::5"), ("fe80::1", "fe80::2"), ("::", "ff02::1:ff00:1")] {
            assert_eq!(at_link(&v6(src, dst, None)), Ok(()), "{src} {dst}");
        }
        assert_eq!(at_link(&v6("fe80::1", "2001:db8::7", None)), Err(DropReason::MartianLinkLocal));
        assert_eq!(at_link(&v6("2001:db8::7", "fe80::1", None)), Err(DropReason::MartianLinkLocal));
        assert_eq!(at_link(&v6("::1", "ff02::5", None)), Err(DropReason::MartianLoopback));
        assert_eq!(at_link(&v6("fe80::1", "ff02::5", Some(0))), Err(DropReason::MartianLinkLocal));
    }

    #[test]
    fn who_chooses_the_routers_is_not_served() {
        const A: [u8; 4] = [198, 51, 100, 7];
        const B: [u8; 4] = [203, 0, 113, 9];
        let routed = Err(DropReason::SourceRouted);
        assert_eq!(checked(&v4(A, B, &[131, 7, 4, 1, 2, 3, 4, 0])), routed);
        assert_eq!(checked(&v4(A, B, &[1, 137, 7, 4, 1, 2, 3, 4])), routed);
        // Behind a timestamp.
        assert_eq!(checked(&v4(A, B, &[68, 4, 5, 0, 131, 3, 4, 0])), routed);
        // Record route, and what looks like the option but is another's data or behind the end.
        assert_eq!(checked(&v4(A, B, &[7, 8, 4, 131, 131, 131, 131, 131])), Ok(()));
        assert_eq!(checked(&v4(A, B, &[0, 131, 3, 4])), Ok(()));
        // An option of no length.
        assert_eq!(checked(&v4(A, B, &[68, 0, 131, 3])), routed);
        assert_eq!(checked(&v6("2001:db8::7", "2001:db8::9", Some(0))), routed);
        assert_eq!(checked(&v6("2001:db8::7", "2001:db8::9", Some(4))), Ok(()), "segment routing");
    }
}
