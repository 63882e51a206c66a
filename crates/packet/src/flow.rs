//! Flow keys: the five fields by which packets belong together (missions T2, C1).
//!
//! [`FlowKey::of`] is called for every packet or super-packet; it allocates nothing and reads one header. The
//! steering crate hashes keys symmetrically, so the key of a flow's reply is [`FlowKey::reversed`], and what
//! is about a flow must carry the flow's key:
//!
//! * ICMP echo and the other queries: the identifier stands in the port slot of the *lower* address, zero
//!   in the other, so that request and reply are each other's reversed key. Between equal addresses a
//!   request has it in the source slot, a reply in the destination slot.
//! * ICMP errors: the key of the quoted packet, reversed, because an error travels against the flow.
//! * Fragments (the first one too), protocols without ports, cut upper layers: ports are zero.

use crate::drop_reason::DropReason;
use crate::icmp::{self, Kind};
use crate::ip::{
    IPV4_HEADER_BYTES, IPV6_HEADER_BYTES, IpHeader, PROTOCOL_AH, PROTOCOL_ESP, PROTOCOL_GRE, PROTOCOL_ICMP,
    PROTOCOL_ICMPV6, PROTOCOL_IPV4, PROTOCOL_SCTP, PROTOCOL_TCP, PROTOCOL_UDP, PROTOCOL_UDP_LITE,
};
use crate::segment::TCP_SYN;
use crate::{array_at, u16_at};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU8;
use std::str::FromStr;

/// The key of a flow, in the direction of the packet it was read from. Fields in host byte order.
#[derive(Copy, Clone, Eq, PartialEq, Hash, Debug)]
pub struct FlowKey {
    /// Source address.
    pub src: IpAddr,
    /// Destination address, of the same version.
    pub dst: IpAddr,
    /// Source port, ICMP identifier or zero.
    pub src_port: u16,
    /// Destination port, ICMP identifier or zero.
    pub dst_port: u16,
    /// Protocol of the upper layer.
    pub protocol: u8,
}

/// Mark of the connection of TCP that a packet opens, or answers the opening of: a digest of its sequence number, the same when
/// the packet is repeated, most likely another for the next connection on the same ports. `None`: it does neither, or is a
/// fragment.
#[must_use]
pub fn connection_mark(header: &IpHeader, packet: &[u8]) -> Option<NonZeroU8> {
    if header.protocol != PROTOCOL_TCP || header.is_fragmented() {
        return None;
    }
    let upper = header.payload(packet);
    let [flags] = array_at(upper, 13)?;
    let sequence = u32::from_be_bytes(array_at(upper, 4)?);
    let mark = (sequence.wrapping_mul(0x9e37_79b1) >> 24) as u8;
    NonZeroU8::new(mark.max(1)).filter(|_| flags & TCP_SYN != 0)
}

impl FlowKey {
    /// The key of an IP packet.
    ///
    /// # Errors
    /// [`DropReason::IpMalformed`] when its IP header cannot be read. An upper layer that cannot be read is no error:
    /// the ports are zero then.
    #[inline]
    pub fn of(packet: &[u8]) -> Result<FlowKey, DropReason> {
        if let Some(key) = Self::of_plain(packet) {
            return Ok(key);
        }
        let header = IpHeader::parse(packet)?;
        Ok(Self::of_parsed(&header, packet))
    }

    /// The short way for nearly all packets: whole TCP or UDP without IPv6 extension headers. A third of
    /// the time of the long way, whose answer it has to equal wherever it gives one; it gives none for
    /// anything doubtful.
    #[inline]
    fn of_plain(packet: &[u8]) -> Option<FlowKey> {
        let fixed = packet.first_chunk::<IPV4_HEADER_BYTES>()?;
        let (src, dst, protocol, ports_at, total_bytes) = match fixed[0] >> 4 {
            4 => {
                let fragmented = u16::from_be_bytes([fixed[6], fixed[7]]) & 0x3fff != 0;
                let header_bytes = usize::from(fixed[0] & 0x0f) * 4;
                if fragmented || header_bytes < IPV4_HEADER_BYTES {
                    return None;
                }
                let src = IpAddr::V4(Ipv4Addr::new(fixed[12], fixed[13], fixed[14], fixed[15]));
                let dst = IpAddr::V4(Ipv4Addr::new(fixed[16], fixed[17], fixed[18], fixed[19]));
                (src, dst, fixed[9], header_bytes, usize::from(u16::from_be_bytes([fixed[2], fixed[3]])))
            }
            6 => {
                let src = IpAddr::V6(Ipv6Addr::from(array_at::<16>(packet, 8)?));
                let dst = IpAddr::V6(Ipv6Addr::from(array_at::<16>(packet, 24)?));
                let payload_bytes = usize::from(u16::from_be_bytes([fixed[4], fixed[5]]));
                (src, dst, fixed[6], IPV6_HEADER_BYTES, IPV6_HEADER_BYTES + payload_bytes)
            }
            _ => return None,
        };
        if !matches!(protocol, PROTOCOL_TCP | PROTOCOL_UDP)
            || ports_at + 4 > total_bytes
            || total_bytes > packet.len()
        {
            return None;
        }
        let [a, b, c, d] = array_at(packet, ports_at)?;
        let (src_port, dst_port) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
        Some(FlowKey { src, dst, src_port, dst_port, protocol })
    }

    /// The key of a packet whose header has been parsed already.
    #[inline]
    #[must_use]
    pub fn of_parsed(header: &IpHeader, packet: &[u8]) -> FlowKey {
        let upper = header.payload(packet);
        match header.protocol {
            _ if header.is_fragmented() => Self::without_ports(header),
            PROTOCOL_TCP | PROTOCOL_UDP | PROTOCOL_SCTP | PROTOCOL_UDP_LITE => {
                let [a, b, c, d] = array_at(upper, 0).unwrap_or_default();
                FlowKey {
                    src_port: u16::from_be_bytes([a, b]),
                    dst_port: u16::from_be_bytes([c, d]),
                    ..Self::without_ports(header)
                }
            }
            PROTOCOL_ICMP | PROTOCOL_ICMPV6 => Self::of_icmp(header, upper, true),
            _ => Self::without_ports(header),
        }
    }

    /// The key of the other direction.
    #[inline]
    #[must_use]
    pub const fn reversed(self) -> FlowKey {
        FlowKey {
            src: self.dst,
            dst: self.src,
            src_port: self.dst_port,
            dst_port: self.src_port,
            protocol: self.protocol,
        }
    }

    /// The sender's port, or the identifier of an ICMP query, in whichever slot that stands.
    #[inline]
    #[must_use]
    pub const fn sender_port(&self) -> u16 {
        if icmp::is_icmp(self.protocol) { self.src_port | self.dst_port } else { self.src_port }
    }

    /// The key with another source. Of ICMP the port is the query's identifier.
    #[must_use]
    pub fn with_source(&self, src: IpAddr, port: u16) -> FlowKey {
        FlowKey { src, src_port: port, ..*self }.with_id(port)
    }

    /// The key with another destination. Of ICMP the port is the query's identifier.
    #[must_use]
    pub fn with_destination(&self, dst: IpAddr, port: u16) -> FlowKey {
        FlowKey { dst, dst_port: port, ..*self }.with_id(port)
    }

    /// Of ICMP: the key with the identifier in the slot of the lower address.
    fn with_id(self, id: u16) -> FlowKey {
        if !icmp::is_icmp(self.protocol) {
            return self;
        }
        let (src_port, dst_port) = if self.src < self.dst { (id, 0) } else { (0, id) };
        FlowKey { src_port, dst_port, ..self }
    }

    #[inline]
    const fn without_ports(header: &IpHeader) -> FlowKey {
        FlowKey { src: header.src, dst: header.dst, src_port: 0, dst_port: 0, protocol: header.protocol }
    }

    /// `quotes`: an error's quote is followed. Not so inside a quote: errors about errors do not exist (RFC
    /// 1122 §3.2.2).
    fn of_icmp(header: &IpHeader, upper: &[u8], quotes: bool) -> FlowKey {
        let plain = Self::without_ports(header);
        let Some(kind) = Kind::of(header, upper) else { return plain };
        match kind {
            Kind::Request | Kind::Reply => {
                let id = u16_at(upper, icmp::ID_OFFSET).unwrap_or(0);
                let request = kind == Kind::Request;
                let id_in_src = if plain.src == plain.dst { request } else { plain.src < plain.dst };
                if id_in_src { FlowKey { src_port: id, ..plain } } else { FlowKey { dst_port: id, ..plain } }
            }
            Kind::Error if quotes => {
                let quote = upper.get(icmp::HEADER_BYTES..).unwrap_or_default();
                match IpHeader::parse_quoted(quote) {
                    Ok(inner) if inner.version == header.version => Self::of_quoted(&inner, quote).reversed(),
                    _ => plain,
                }
            }
            Kind::Error | Kind::Other => plain,
        }
    }

    /// The key of the packet that a quoted first fragment begins, in its own direction. [`FlowKey::of`] leaves the ports
    /// of fragments out, as the kernel's steering does; an error's quote is all that there is of them. `None`: a later
    /// fragment, or one whose upper layer is not quoted.
    #[must_use]
    pub fn of_quoted_first(inner: &IpHeader, quote: &[u8]) -> Option<FlowKey> {
        Some(Self::of_quoted(&inner.of_first_fragment(quote)?, quote))
    }

    fn of_quoted(inner: &IpHeader, quote: &[u8]) -> FlowKey {
        match inner.protocol {
            protocol if icmp::is_icmp(protocol) && !inner.is_fragmented() => {
                Self::of_icmp(inner, inner.payload(quote), false)
            }
            _ => Self::of_parsed(inner, quote),
        }
    }
}

/// Names for protocols, as an operator writes them.
const PROTOCOL_NAMES: [(u8, &str); 11] = [
    (PROTOCOL_ICMP, "icmp"),
    (2, "igmp"),
    (PROTOCOL_IPV4, "ipip"),
    (PROTOCOL_TCP, "tcp"),
    (PROTOCOL_UDP, "udp"),
    (PROTOCOL_GRE, "gre"),
    (PROTOCOL_ESP, "esp"),
    (PROTOCOL_AH, "ah"),
    (PROTOCOL_ICMPV6, "icmpv6"),
    (PROTOCOL_SCTP, "sctp"),
    (PROTOCOL_UDP_LITE, "udplite"),
];

/// The name of a protocol number, where it has one here.
#[must_use]
pub fn protocol_name(protocol: u8) -> Option<&'static str> {
    PROTOCOL_NAMES.iter().find(|(number, _)| *number == protocol).map(|(_, name)| *name)
}

/// The number of a protocol given by name or by number.
#[must_use]
pub fn protocol_number(text: &str) -> Option<u8> {
    let named =
        PROTOCOL_NAMES.iter().find(|(_, name)| name.eq_ignore_ascii_case(text)).map(|(number, _)| *number);
    named.or_else(|| text.parse().ok())
}

/// `tcp 10.0.0.5:1234 > 1.2.3.4:443`, `icmp 10.0.0.5 > 1.2.3.4 id 7`, `esp 10.0.0.5 > 1.2.3.4`. IPv6 addresses with a
/// port stand in brackets; a protocol without a name is its number. [`FlowKey::from_str`] reads all of it.
impl fmt::Display for FlowKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match protocol_name(self.protocol) {
            Some(name) => formatter.write_str(name)?,
            None => write!(formatter, "{}", self.protocol)?,
        }
        match self.icmp_id() {
            Some(id) => write!(formatter, " {} > {} id {id}", self.src, self.dst),
            None if self.src_port == 0 && self.dst_port == 0 => {
                write!(formatter, " {} > {}", self.src, self.dst)
            }
            None => write!(
                formatter,
                " {} > {}",
                SocketAddr::new(self.src, self.src_port),
                SocketAddr::new(self.dst, self.dst_port)
            ),
        }
    }
}

impl FlowKey {
    /// The identifier of an ICMP query, if this is one and its direction can be told from the addresses.
    fn icmp_id(&self) -> Option<u16> {
        let (lower, higher) = match self.src.cmp(&self.dst) {
            std::cmp::Ordering::Less => (self.src_port, self.dst_port),
            std::cmp::Ordering::Greater => (self.dst_port, self.src_port),
            std::cmp::Ordering::Equal => return None,
        };
        (icmp::is_icmp(self.protocol) && lower != 0 && higher == 0).then_some(lower)
    }
}

/// Why a text is not a flow key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowKeyError {
    /// The form is not `protocol source > destination`.
    Form,
    /// No protocol of that name or number.
    Protocol,
    /// An address or a port cannot be read.
    Address,
    /// One address is IPv4, the other IPv6.
    MixedVersions,
    /// `id` is not a number up to 65535, or stands behind another protocol than ICMP or behind ports, or
    /// between equal addresses, where its direction would be unknown.
    Id,
}

impl fmt::Display for FlowKeyError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            FlowKeyError::Form => "not of the form 'tcp 10.0.0.5:1234 > 1.2.3.4:443'",
            FlowKeyError::Protocol => "unknown protocol: write tcp, udp, icmp, icmpv6, sctp, … or its number",
            FlowKeyError::Address => "not an address or address:port (IPv6 with a port: [2001:db8::1]:443)",
            FlowKeyError::MixedVersions => "one address is IPv4, the other IPv6",
            FlowKeyError::Id => {
                "'id' takes a number from 0 to 65535, for icmp between two addresses without ports"
            }
        })
    }
}

impl std::error::Error for FlowKeyError {}

impl FromStr for FlowKey {
    type Err = FlowKeyError;

    fn from_str(text: &str) -> Result<FlowKey, FlowKeyError> {
        let (left, right) = text.split_once('>').ok_or(FlowKeyError::Form)?;
        let mut left = left.split_whitespace();
        let (Some(protocol), Some(src), None) = (left.next(), left.next(), left.next()) else {
            return Err(FlowKeyError::Form);
        };
        let mut right = right.split_whitespace();
        let dst = right.next().ok_or(FlowKeyError::Form)?;
        let id = match (right.next(), right.next(), right.next()) {
            (None, ..) => None,
            (Some("id"), Some(id), None) => Some(id.parse::<u16>().map_err(|_| FlowKeyError::Id)?),
            _ => return Err(FlowKeyError::Form),
        };
        let protocol = protocol_number(protocol).ok_or(FlowKeyError::Protocol)?;
        let (src, src_port) = endpoint(src).ok_or(FlowKeyError::Address)?;
        let (dst, dst_port) = endpoint(dst).ok_or(FlowKeyError::Address)?;
        if src.is_ipv4() != dst.is_ipv4() {
            return Err(FlowKeyError::MixedVersions);
        }
        let mut key = FlowKey { src, dst, src_port, dst_port, protocol };
        if let Some(id) = id {
            if !icmp::is_icmp(protocol) || src == dst || src_port != 0 || dst_port != 0 {
                return Err(FlowKeyError::Id);
            }
            if src < dst { key.src_port = id } else { key.dst_port = id }
        }
        Ok(key)
    }
}

/// An address with or without a port; an IPv6 address may stand in brackets in both cases.
fn endpoint(text: &str) -> Option<(IpAddr, u16)> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Some((address, 0));
    }
    if let Ok(socket) = text.parse::<SocketAddr>() {
        return Some((socket.ip(), socket.port()));
    }
    let inner = text.strip_prefix('[')?.strip_suffix(']')?;
    inner.parse::<Ipv6Addr>().ok().map(|address| (IpAddr::V6(address), 0))
}

#[cfg(test)]
mod tests;
