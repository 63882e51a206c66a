//! IPv4 and IPv6 headers (RFC 791, RFC 8200), read with every length checked.
//!
//! [`IpHeader::parse`] answers for both versions where the upper layer starts, what it is and where the
//! packet ends. IPv6 extension headers are walked up to the upper layer, at most [`EXTENSION_HEADERS_MAX`]
//! of them. At a real fragment the walk stops behind the fragment header, for the first fragment too, so
//! that all fragments of a packet report the same protocol.

use crate::drop_reason::DropReason;
use crate::{array_at, checksum, put_u16, u16_at, u32_at};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Protocol number of IPv6 hop-by-hop options.
pub const PROTOCOL_HOP_BY_HOP: u8 = 0;
/// Protocol number of ICMP for IPv4.
pub const PROTOCOL_ICMP: u8 = 1;
/// Protocol number of TCP.
pub const PROTOCOL_TCP: u8 = 6;
/// Protocol number of UDP.
pub const PROTOCOL_UDP: u8 = 17;
/// Protocol number of IPv4 in IP (RFC 2003).
pub const PROTOCOL_IPV4: u8 = 4;
/// Protocol number of IPv6 in IP (RFC 4213).
pub const PROTOCOL_IPV6: u8 = 41;
/// Protocol number of GRE (RFC 2784).
pub const PROTOCOL_GRE: u8 = 47;
/// Protocol number of the IPv6 routing header.
pub const PROTOCOL_ROUTING: u8 = 43;
/// Protocol number of the IPv6 fragment header.
pub const PROTOCOL_FRAGMENT: u8 = 44;
/// Protocol number of ESP.
pub const PROTOCOL_ESP: u8 = 50;
/// Protocol number of the authentication header.
pub const PROTOCOL_AH: u8 = 51;
/// Protocol number of ICMPv6.
pub const PROTOCOL_ICMPV6: u8 = 58;
/// "No next header" of IPv6.
pub const PROTOCOL_NONE: u8 = 59;
/// Protocol number of IPv6 destination options.
pub const PROTOCOL_DESTINATION_OPTIONS: u8 = 60;
/// Protocol number of SCTP.
pub const PROTOCOL_SCTP: u8 = 132;
/// Protocol number of the IPv6 mobility header.
pub const PROTOCOL_MOBILITY: u8 = 135;
/// Protocol number of UDP-Lite.
pub const PROTOCOL_UDP_LITE: u8 = 136;
/// Protocol number of the host identity protocol.
pub const PROTOCOL_HIP: u8 = 139;
/// Protocol number of Shim6.
pub const PROTOCOL_SHIM6: u8 = 140;

/// ECN field: the transport does not support ECN (RFC 3168).
pub const ECN_NOT_ECT: u8 = 0;
/// ECN field: ECT(1), used by L4S (RFC 9331).
pub const ECN_ECT1: u8 = 1;
/// ECN field: ECT(0).
pub const ECN_ECT0: u8 = 2;
/// ECN field: congestion experienced.
pub const ECN_CE: u8 = 3;

/// Bytes of an IPv4 header without options.
pub const IPV4_HEADER_BYTES: usize = 20;
/// Bytes of the fixed IPv6 header.
pub const IPV6_HEADER_BYTES: usize = 40;
/// Bytes of the IPv6 fragment header.
pub const FRAGMENT_HEADER_BYTES: usize = 8;
/// How many IPv6 extension headers are walked before the packet counts as malformed. RFC 8200 §4.1 knows
/// eight in the recommended order.
pub const EXTENSION_HEADERS_MAX: usize = 8;
/// "Don't fragment" in the word of an IPv4 header that has flags and fragment offset, bytes 6 and 7.
pub const IPV4_DONT_FRAGMENT: u16 = 0x4000;

/// Whether an address means something on one link only: 169.254.0.0/16 (RFC 3927), fe80::/10 (RFC 4291 §2.5.6).
#[must_use]
pub const fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

/// Where a fragment belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fragment {
    /// Offset of this fragment's payload in the whole packet's, in bytes (a multiple of 8, at most 65,528).
    pub offset: u16,
    /// More fragments follow.
    pub more: bool,
    /// Identification: 16 bits in IPv4, 32 in IPv6.
    pub id: u32,
}

impl Fragment {
    /// An IPv6 "fragment" that is a whole packet (RFC 6946); it has its ports and needs no reassembly.
    #[must_use]
    pub const fn is_whole(&self) -> bool {
        self.offset == 0 && !self.more
    }
}

/// Fields of an IP header. All of them in host byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IpHeader {
    /// 4 or 6.
    pub version: u8,
    /// Offset of the upper layer in bytes: the header with IPv4 options or IPv6 extension headers. Never
    /// beyond `total_bytes`.
    pub header_bytes: usize,
    /// Length of the whole packet as its header says. Never more than the bytes parsed; what follows is
    /// padding.
    pub total_bytes: usize,
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// Protocol of the upper layer, IPv6 extension headers skipped.
    pub protocol: u8,
    /// Present in fragments; IPv6 packets with a fragment header may be whole nevertheless.
    pub fragment: Option<Fragment>,
    /// ECN field, 0–3: see [`ECN_CE`] and its neighbors.
    pub ecn: u8,
    /// Differentiated services code point, 0–63.
    pub dscp: u8,
    /// Time to live or hop limit.
    pub ttl: u8,
}

impl IpHeader {
    /// Reads the header of an IP packet.
    ///
    /// # Errors
    /// [`DropReason::IpMalformed`] when the packet is neither IPv4 nor IPv6, is shorter than its header says, or
    /// has extension headers that are too many or too long.
    #[inline]
    pub fn parse(packet: &[u8]) -> Result<IpHeader, DropReason> {
        Self::parse_prefix(packet, true).ok_or(DropReason::IpMalformed)
    }

    /// Reads the header of a packet whose end may be missing, as the quote in an ICMP error is. `total_bytes`
    /// is then what is there.
    ///
    /// # Errors
    /// [`DropReason::IpMalformed`] as in [`IpHeader::parse`], but not when just the payload is cut.
    pub fn parse_quoted(quote: &[u8]) -> Result<IpHeader, DropReason> {
        Self::parse_prefix(quote, false).ok_or(DropReason::IpMalformed)
    }

    /// A fragment of a larger packet: not all of the upper layer is here.
    #[inline]
    #[must_use]
    pub fn is_fragmented(&self) -> bool {
        self.fragment.is_some_and(|fragment| !fragment.is_whole())
    }

    /// The header of a first fragment read on to the upper layer, whose start is there: the extension headers behind an
    /// IPv6 fragment header are skipped. A packet that is no fragment has none. `None`: a later fragment, or extension
    /// headers that are cut, too many, or hold a second fragment header.
    #[must_use]
    pub fn of_first_fragment(&self, packet: &[u8]) -> Option<IpHeader> {
        if self.fragment.is_some_and(|fragment| fragment.offset > 0) {
            return None;
        }
        let mut whole = IpHeader { fragment: None, ..*self };
        if self.version != 6 || !self.is_fragmented() {
            return Some(whole);
        }
        let mut walked = 0;
        while is_extension(whole.protocol) {
            let [next, length] = array_at(packet, whole.header_bytes)?;
            let end = whole.header_bytes + extension_bytes(whole.protocol, length);
            walked += 1;
            let nested = whole.protocol == PROTOCOL_FRAGMENT;
            if nested || end > whole.total_bytes || walked > EXTENSION_HEADERS_MAX {
                return None;
            }
            whole.protocol = next;
            whole.header_bytes = end;
        }
        Some(whole)
    }

    /// The upper layer of the packet this header was parsed from; empty for any shorter slice.
    #[inline]
    #[must_use]
    pub fn payload<'a>(&self, packet: &'a [u8]) -> &'a [u8] {
        packet.get(self.header_bytes..self.total_bytes).unwrap_or_default()
    }

    /// Length of the upper layer.
    #[inline]
    #[must_use]
    pub const fn payload_bytes(&self) -> usize {
        self.total_bytes - self.header_bytes
    }

    #[inline]
    fn parse_prefix(packet: &[u8], whole: bool) -> Option<IpHeader> {
        match packet.first()? >> 4 {
            4 => parse_v4(packet, whole),
            6 => parse_v6(packet, whole),
            _ => None,
        }
    }
}

/// The claimed length, or what is there of it when a cut packet is all right.
#[inline]
fn limit(claimed: usize, packet: &[u8], whole: bool) -> Option<usize> {
    if claimed <= packet.len() {
        Some(claimed)
    } else if whole {
        None
    } else {
        Some(packet.len())
    }
}

#[inline]
fn parse_v4(packet: &[u8], whole: bool) -> Option<IpHeader> {
    let fixed: &[u8; IPV4_HEADER_BYTES] = packet.first_chunk()?;
    let header_bytes = usize::from(fixed[0] & 0x0f) * 4;
    let total_bytes = limit(usize::from(u16::from_be_bytes([fixed[2], fixed[3]])), packet, whole)?;
    if header_bytes < IPV4_HEADER_BYTES || total_bytes < header_bytes {
        return None;
    }
    let flags = u16::from_be_bytes([fixed[6], fixed[7]]);
    let fragment = (flags & 0x3fff != 0).then(|| Fragment {
        offset: (flags & 0x1fff) << 3,
        more: flags & 0x2000 != 0,
        id: u32::from(u16::from_be_bytes([fixed[4], fixed[5]])),
    });
    Some(IpHeader {
        version: 4,
        header_bytes,
        total_bytes,
        src: IpAddr::V4(Ipv4Addr::new(fixed[12], fixed[13], fixed[14], fixed[15])),
        dst: IpAddr::V4(Ipv4Addr::new(fixed[16], fixed[17], fixed[18], fixed[19])),
        protocol: fixed[9],
        fragment,
        ecn: fixed[1] & 3,
        dscp: fixed[1] >> 2,
        ttl: fixed[8],
    })
}

#[inline]
fn parse_v6(packet: &[u8], whole: bool) -> Option<IpHeader> {
    let fixed: &[u8; IPV6_HEADER_BYTES] = packet.first_chunk()?;
    let payload_bytes = usize::from(u16::from_be_bytes([fixed[4], fixed[5]]));
    let total_bytes = limit(IPV6_HEADER_BYTES + payload_bytes, packet, whole)?;
    let class = (fixed[0] << 4) | (fixed[1] >> 4);
    let mut header = IpHeader {
        version: 6,
        header_bytes: IPV6_HEADER_BYTES,
        total_bytes,
        src: IpAddr::V6(Ipv6Addr::from(array_at::<16>(fixed, 8)?)),
        dst: IpAddr::V6(Ipv6Addr::from(array_at::<16>(fixed, 24)?)),
        protocol: fixed[6],
        fragment: None,
        ecn: class & 3,
        dscp: class >> 2,
        ttl: fixed[7],
    };
    if is_extension(header.protocol) {
        walk_extensions(packet.get(..total_bytes)?, &mut header)?;
    }
    Some(header)
}

/// Protocol numbers that are IPv6 extension headers of the common layout or the fragment header. ESP is not
/// one: nothing behind it can be read.
#[inline]
#[must_use]
pub const fn is_extension(protocol: u8) -> bool {
    matches!(
        protocol,
        PROTOCOL_HOP_BY_HOP
            | PROTOCOL_ROUTING
            | PROTOCOL_FRAGMENT
            | PROTOCOL_AH
            | PROTOCOL_DESTINATION_OPTIONS
            | PROTOCOL_MOBILITY
            | PROTOCOL_HIP
            | PROTOCOL_SHIM6
    )
}

/// Bytes of the extension header that [`is_extension`] of this protocol number and whose second byte is `length`.
#[inline]
#[must_use]
pub const fn extension_bytes(protocol: u8, length: u8) -> usize {
    match protocol {
        PROTOCOL_FRAGMENT => FRAGMENT_HEADER_BYTES,
        // RFC 4302 §2.2: in 32-bit words, minus 2.
        PROTOCOL_AH => (length as usize + 2) * 4,
        _ => (length as usize + 1) * 8,
    }
}

/// Moves `header_bytes` and `protocol` to the upper layer.
#[cold]
fn walk_extensions(packet: &[u8], header: &mut IpHeader) -> Option<()> {
    for _ in 0..EXTENSION_HEADERS_MAX {
        let at = header.header_bytes;
        let [next, length] = array_at(packet, at)?;
        let bytes = extension_bytes(header.protocol, length);
        if at + bytes > packet.len() {
            return None;
        }
        if header.protocol == PROTOCOL_FRAGMENT {
            if header.fragment.is_some() {
                return None;
            }
            let flags = u16_at(packet, at + 2)?;
            let fragment =
                Fragment { offset: flags & 0xfff8, more: flags & 1 != 0, id: u32_at(packet, at + 4)? };
            header.fragment = Some(fragment);
            if !fragment.is_whole() {
                header.protocol = next;
                header.header_bytes = at + bytes;
                return Some(());
            }
        }
        header.protocol = next;
        header.header_bytes = at + bytes;
        if !is_extension(next) {
            return Some(());
        }
    }
    None
}

/// Marks a packet "congestion experienced" (RFC 3168) and keeps the IPv4 header checksum right.
/// `false`: its transport does not support ECN, or it is not an IP packet; the caller has to drop instead.
#[inline]
pub fn set_ecn_ce(packet: &mut [u8]) -> bool {
    match packet_ecn(packet) {
        Some(ECN_NOT_ECT) | None => false,
        Some(_) => set_ecn(packet, ECN_CE),
    }
}

/// The ECN field of a packet, read without parsing the rest.
#[inline]
#[must_use]
pub fn packet_ecn(packet: &[u8]) -> Option<u8> {
    let [first, second] = array_at(packet, 0)?;
    match first >> 4 {
        4 => Some(second & 3),
        6 => Some((second >> 4) & 3),
        _ => None,
    }
}

/// Replaces the ECN field (its low two bits are used) and keeps the IPv4 header checksum right, as RFC 6040
/// needs at the end of a tunnel. `false` when the packet is not IP or shorter than its fixed header.
#[inline]
pub fn set_ecn(packet: &mut [u8], ecn: u8) -> bool {
    let Some([first, second]) = array_at(packet, 0) else { return false };
    match first >> 4 {
        4 if packet.len() >= IPV4_HEADER_BYTES => {
            let new = (second & !3) | (ecn & 3);
            let old_checksum = u16_at(packet, 10).unwrap_or(0);
            let word = |second: u8| u16::from_be_bytes([first, second]);
            put_u16(packet, 10, checksum::update16(old_checksum, word(second), word(new)));
            packet[1] = new;
            true
        }
        6 if packet.len() >= IPV6_HEADER_BYTES => {
            packet[1] = (second & !0x30) | ((ecn & 3) << 4);
            true
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests;
