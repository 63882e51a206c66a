//! ICMP (RFC 792) and ICMPv6 (RFC 4443) messages by their types: queries with an identifier, errors with a quoted packet.
//!
//! ICMP is protocol 1 in IPv4 and ICMPv6 protocol 58 in IPv6. The one in a packet of the other version is an unknown
//! protocol to every host, and so it is here.

use crate::ip::{IpHeader, PROTOCOL_ICMP, PROTOCOL_ICMPV6};

/// Bytes of a message in front of a query's data, or of the packet that an error quotes.
pub const HEADER_BYTES: usize = 8;
/// Offset of a query's identifier.
pub const ID_OFFSET: usize = 4;

/// Type of an ICMP source quench.
const SOURCE_QUENCH: u8 = 4;
/// Type of an ICMP redirect.
const REDIRECT_V4: u8 = 5;
/// Type of an ICMPv6 redirect (RFC 4861 §4.5): no error, and yet never answered.
const REDIRECT_V6: u8 = 137;

/// Kind of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A query: echo, timestamp, information, address mask, extended echo (RFC 8335). It has an identifier.
    Request,
    /// The answer to a query, with its identifier.
    Reply,
    /// An error: unreachable, too big, source quench, redirect (IPv4), time exceeded, parameter problem. It quotes the
    /// packet that it is about.
    Error,
    /// Anything else: neighbor and router discovery, multicast listeners.
    Other,
}

impl Kind {
    /// The kind of a type; `version`: of IP.
    #[inline]
    #[must_use]
    pub const fn of_type(version: u8, message_type: u8) -> Kind {
        match (version, message_type) {
            (4, 8 | 13 | 15 | 17 | 42) | (6, 128 | 160) => Kind::Request,
            (4, 0 | 14 | 16 | 18 | 43) | (6, 129 | 161) => Kind::Reply,
            (4, 3..=5 | 11 | 12) | (6, 1..=4) => Kind::Error,
            _ => Kind::Other,
        }
    }

    /// The kind of a packet's message. `upper`: its upper layer, or the start of it. `None`: not ICMP of the packet's IP
    /// version, or nothing of the message is there.
    #[inline]
    #[must_use]
    pub fn of(header: &IpHeader, upper: &[u8]) -> Option<Kind> {
        if header.protocol != protocol_of(header.version) {
            return None;
        }
        upper.first().map(|message_type| Kind::of_type(header.version, *message_type))
    }

    /// Whether such messages have an identifier.
    #[inline]
    #[must_use]
    pub const fn has_id(self) -> bool {
        matches!(self, Kind::Request | Kind::Reply)
    }
}

/// Whether a protocol number is ICMP's or ICMPv6's.
#[inline]
#[must_use]
pub const fn is_icmp(protocol: u8) -> bool {
    matches!(protocol, PROTOCOL_ICMP | PROTOCOL_ICMPV6)
}

/// The protocol number of ICMP in this IP version.
#[inline]
#[must_use]
pub const fn protocol_of(version: u8) -> u8 {
    if version == 4 { PROTOCOL_ICMP } else { PROTOCOL_ICMPV6 }
}

/// Whether a packet is an echo request. `upper`: its upper layer.
#[must_use]
pub fn is_echo_request(header: &IpHeader, upper: &[u8]) -> bool {
    let echo_request = if header.version == 4 { 8 } else { 128 };
    header.protocol == protocol_of(header.version) && upper.first() == Some(&echo_request)
}

/// Whether a packet is a redirect or a source quench: the one is for neighbors only (RFC 1812 §5.2.7.2, RFC 4861 §8), the other
/// for nobody any more (RFC 6633 §4). `upper`: its upper layer.
#[must_use]
pub fn is_never_forwarded(header: &IpHeader, upper: &[u8]) -> bool {
    let kinds: &[u8] = if header.version == 4 { &[SOURCE_QUENCH, REDIRECT_V4] } else { &[REDIRECT_V6] };
    header.protocol == protocol_of(header.version) && upper.first().is_some_and(|kind| kinds.contains(kind))
}

/// Whether a packet is a message that no error may answer (RFC 1122 §3.2.2, RFC 4443 §2.4 e): an error or a redirect.
/// One that is cut may be such.
#[must_use]
pub fn is_unanswerable(header: &IpHeader, upper: &[u8]) -> bool {
    if header.protocol != protocol_of(header.version) {
        return false;
    }
    match upper.first() {
        None => true,
        // RFC 4443 §2.1: every type below 128 is an error.
        Some(message_type) if header.version == 6 => *message_type < 128 || *message_type == REDIRECT_V6,
        Some(message_type) => Kind::of_type(4, *message_type) == Kind::Error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    fn header(version: u8, protocol: u8) -> IpHeader {
        let address =
            if version == 4 { IpAddr::V4(Ipv4Addr::LOCALHOST) } else { IpAddr::V6(Ipv6Addr::LOCALHOST) };
        IpHeader {
            version,
            header_bytes: 40,
            total_bytes: 48,
            src: address,
            dst: address,
            protocol,
            fragment: None,
            ecn: 0,
            dscp: 0,
            ttl: 64,
        }
    }

    #[test]
    fn each_request_has_its_reply() {
        for (version, pairs) in
            [(4, &[(8, 0), (13, 14), (15, 16), (17, 18), (42, 43)][..]), (6, &[(128, 129), (160, 161)])]
        {
            for (request, reply) in pairs {
                assert_eq!(Kind::of_type(version, *request), Kind::Request, "{version} {request}");
                assert_eq!(Kind::of_type(version, *reply), Kind::Reply, "{version} {reply}");
            }
            let with_id = (0..=255).filter(|kind| Kind::of_type(version, *kind).has_id());
            assert_eq!(with_id.count(), 2 * pairs.len());
        }
    }

    #[test]
    fn the_other_versions_protocol_is_no_icmp() {
        for (version, protocol, error, echo) in [(4, PROTOCOL_ICMP, 3, 8), (6, PROTOCOL_ICMPV6, 1, 128)] {
            let own = header(version, protocol);
            assert_eq!(Kind::of(&own, &[error]), Some(Kind::Error));
            assert_eq!(Kind::of(&own, &[echo]), Some(Kind::Request));
            assert_eq!(Kind::of(&own, &[]), None);
            assert!(is_echo_request(&own, &[echo]) && !is_echo_request(&own, &[error]));
            let other = header(version, PROTOCOL_ICMP + PROTOCOL_ICMPV6 - protocol);
            assert_eq!(Kind::of(&other, &[error]), None);
            assert!(!is_echo_request(&other, &[echo]) && !is_unanswerable(&other, &[]));
        }
    }

    #[test]
    fn redirects_and_quenches_stay_where_they_are() {
        let kept = |version, protocol| {
            let header = header(version, protocol);
            (0..=255u8).filter(|kind| is_never_forwarded(&header, &[*kind])).collect::<Vec<_>>()
        };
        assert_eq!(kept(4, PROTOCOL_ICMP), [4, 5]);
        assert_eq!(kept(6, PROTOCOL_ICMPV6), [137]);
        assert_eq!(kept(4, 17), []);
    }

    #[test]
    fn errors_redirects_and_cut_messages_are_not_answered() {
        let unanswerable = |version, protocol| {
            let header = header(version, protocol);
            (0..=255u8).filter(|kind| is_unanswerable(&header, &[*kind])).collect::<Vec<_>>()
        };
        assert_eq!(unanswerable(4, PROTOCOL_ICMP), [3, 4, 5, 11, 12]);
        assert_eq!(unanswerable(6, PROTOCOL_ICMPV6), (0..128).chain([137]).collect::<Vec<_>>());
        assert!(is_unanswerable(&header(4, PROTOCOL_ICMP), &[]));
        assert!(!is_unanswerable(&header(4, 17), &[]));
    }
}
