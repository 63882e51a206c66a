//! IP and UDP around a datagram between units (row D3), where the kernel does not write them, and the UDP source port by which
//! routers spread flows over paths.
//!
//! Don't Fragment is always set: a packet that is too long is answered with "too big" (row D11) and is never cut by a
//! router. IPv4 identification is zero then (RFC 6864 §4). The flow label of IPv6 is the source port, for routers that look
//! no further (RFC 6438).
//!
//! UDP checksum: left out over IPv4. Over IPv6 it is computed unless both ends are told that it is not
//! ([`OuterChecksum::Zero`], RFC 6935); the inner packet has its own, and what stands in L1 and L2 twice has to agree.

#[cfg(test)]
mod tests;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use packet::ip::{IPV4_DONT_FRAGMENT, IPV4_HEADER_BYTES, IPV6_HEADER_BYTES, PROTOCOL_UDP};
use packet::{DropReason, FlowKey, array_at, checksum, put_u16, u16_at};

use super::{BUS_PORT, ETHERNET_BYTES};

/// Length of a UDP header, bytes.
pub const UDP_BYTES: usize = 8;

/// Longest outer headers, bytes: UDP over IPv6.
pub const OUTER_BYTES_MAX: usize = IPV6_HEADER_BYTES + UDP_BYTES;

/// Lowest source port; from here on to 65,535 ports are free for anybody (RFC 6335 §6).
pub const ENTROPY_PORT_MIN: u16 = 49_152;

/// Routers between two units that a datagram may pass.
const HOP_LIMIT: u8 = 64;

/// EtherTypes of the inner frame.
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_SERVICE_VLAN: u16 = 0x88a8;

/// Handling of the UDP checksum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OuterChecksum {
    /// Left out over IPv4, computed over IPv6.
    #[default]
    Usual,
    /// Left out over both (RFC 6935): the receiver must have been told.
    Zero,
    /// Sum of the pseudo-header only; the kernel or the card computes the rest (`VirtioNetHeader::flags`).
    Partial,
}

/// Fields of the outer headers that are not always the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outer {
    /// Address of the sending unit.
    pub source: IpAddr,
    /// Address of the receiving unit, of the same version.
    pub destination: IpAddr,
    /// Source port: [`entropy_port`].
    pub source_port: u16,
    /// DSCP and ECN, as in the IP header's byte.
    pub traffic_class: u8,
}

impl Outer {
    /// Length of the headers, bytes.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        match self.source {
            IpAddr::V4(_) => IPV4_HEADER_BYTES + UDP_BYTES,
            IpAddr::V6(_) => OUTER_BYTES_MAX,
        }
    }

    /// Writes the headers to the first bytes of `packet`, whose rest is the UDP payload already; returns their length. 0, and
    /// nothing is written: addresses of different versions, no room, or more than IP can carry.
    #[inline]
    pub fn write(&self, packet: &mut [u8], checksum: OuterChecksum) -> usize {
        let bytes = self.bytes();
        let total = packet.len();
        let Some(udp_bytes) =
            total.checked_sub(bytes - UDP_BYTES).and_then(|bytes| u16::try_from(bytes).ok())
        else {
            return 0;
        };
        if total < bytes {
            return 0;
        }
        let udp_at = bytes - UDP_BYTES;
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let Ok(total) = u16::try_from(total) else { return 0 };
                self.write_v4(packet, total, source, destination);
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                self.write_v6(packet, udp_bytes, source, destination);
            }
            _ => return 0,
        }
        put_u16(packet, udp_at, self.source_port);
        put_u16(packet, udp_at + 2, BUS_PORT);
        put_u16(packet, udp_at + 4, udp_bytes);
        put_u16(packet, udp_at + 6, 0);
        let pseudo =
            || checksum::pseudo_header(self.source, self.destination, PROTOCOL_UDP, usize::from(udp_bytes));
        let sum = match checksum {
            OuterChecksum::Partial => checksum::fold(pseudo()),
            OuterChecksum::Usual if self.source.is_ipv6() => {
                let udp = packet.get(udp_at..).unwrap_or_default();
                checksum::nonzero(checksum::finish(checksum::sum(udp, pseudo())))
            }
            OuterChecksum::Usual | OuterChecksum::Zero => 0,
        };
        put_u16(packet, udp_at + 6, sum);
        bytes
    }

    #[inline]
    fn write_v4(&self, packet: &mut [u8], total: u16, source: Ipv4Addr, destination: Ipv4Addr) {
        let Some(header) = packet.first_chunk_mut::<IPV4_HEADER_BYTES>() else { return };
        let [total_high, total_low] = total.to_be_bytes();
        let [flags, offset] = IPV4_DONT_FRAGMENT.to_be_bytes();
        let fixed = [
            0x45,
            self.traffic_class,
            total_high,
            total_low,
            0,
            0,
            flags,
            offset,
            HOP_LIMIT,
            PROTOCOL_UDP,
            0,
            0,
        ];
        let ([s0, s1, s2, s3], [d0, d1, d2, d3]) = (source.octets(), destination.octets());
        let (front, addresses) = header.split_at_mut(fixed.len());
        front.copy_from_slice(&fixed);
        addresses.copy_from_slice(&[s0, s1, s2, s3, d0, d1, d2, d3]);
        let sum = checksum::finish(checksum::sum(header, 0));
        put_u16(header, 10, sum);
    }

    #[inline]
    fn write_v6(&self, packet: &mut [u8], udp_bytes: u16, source: Ipv6Addr, destination: Ipv6Addr) {
        let word = 6 << 28 | u32::from(self.traffic_class) << 20 | u32::from(self.source_port);
        packet::put_u32(packet, 0, word);
        put_u16(packet, 4, udp_bytes);
        put_u16(packet, 6, u16::from_be_bytes([PROTOCOL_UDP, HOP_LIMIT]));
        super::put(packet, 8, &source.octets());
        super::put(packet, 24, &destination.octets());
    }
}

/// Finds a datagram between units in an IP packet: UDP to [`BUS_PORT`], whole, without IPv6 extension headers, because a unit
/// sends no others. Returns the outer headers' fields and the UDP payload; `None` for all other packets. Neither addresses
/// nor checksums are looked at.
///
/// # Errors
/// [`DropReason::BusTooShort`]: it is one, and its lengths are beyond the packet's end.
#[inline]
pub fn parse_outer(packet: &[u8]) -> Result<Option<(Outer, &[u8])>, DropReason> {
    let Some((udp_at, total)) = udp_of(packet) else { return Ok(None) };
    if u16_at(packet, udp_at + 2) != Some(BUS_PORT) {
        return Ok(None);
    }
    let udp_bytes = u16_at(packet, udp_at + 4).map_or(0, usize::from);
    let payload = packet.get(udp_at + UDP_BYTES..udp_at + udp_bytes.max(UDP_BYTES));
    let (Some(payload), Some(outer)) = (payload, Outer::read(packet, udp_at)) else {
        return Err(DropReason::BusTooShort);
    };
    if udp_bytes < UDP_BYTES || udp_at + udp_bytes > total {
        return Err(DropReason::BusTooShort);
    }
    Ok(Some((outer, payload)))
}

/// Offset of the UDP header of a packet that has one and is no fragment, and the packet's length by its IP header.
#[inline]
fn udp_of(packet: &[u8]) -> Option<(usize, usize)> {
    let fixed = packet.first_chunk::<IPV4_HEADER_BYTES>()?;
    let length = |high: usize| usize::from(u16::from_be_bytes([fixed[high], fixed[high + 1]]));
    let header_bytes = usize::from(fixed[0] & 0x0f) * 4;
    let is_fragment = length(6) & 0x3fff != 0;
    match fixed[0] >> 4 {
        4 if fixed[9] == PROTOCOL_UDP && header_bytes >= IPV4_HEADER_BYTES && !is_fragment => {
            Some((header_bytes, length(2)))
        }
        6 if fixed[6] == PROTOCOL_UDP => Some((IPV6_HEADER_BYTES, IPV6_HEADER_BYTES + length(4))),
        _ => None,
    }
}

impl Outer {
    #[inline]
    fn read(packet: &[u8], udp_at: usize) -> Option<Self> {
        let source_port = u16_at(packet, udp_at)?;
        let first = u16_at(packet, 0)?;
        let (source, destination, traffic_class) = if first >> 12 == 4 {
            let address = |at| array_at(packet, at).map(|octets: [u8; 4]| IpAddr::from(octets));
            (address(12)?, address(16)?, first as u8)
        } else {
            let address = |at| array_at(packet, at).map(|octets: [u8; 16]| IpAddr::from(octets));
            (address(8)?, address(24)?, (first >> 4) as u8)
        };
        Some(Self { source, destination, source_port, traffic_class })
    }
}

/// UDP source port for an inner frame, [`ENTROPY_PORT_MIN`] to 65,535: the same for all packets of a flow and, fragments
/// aside, seldom the same for two flows. Frames that are no IP packets are told apart by their Ethernet headers.
#[inline]
#[must_use]
pub fn entropy_port(frame: &[u8]) -> u16 {
    let is_tagged = matches!(u16_at(frame, 12), Some(ETHERTYPE_VLAN | ETHERTYPE_SERVICE_VLAN));
    let at = if is_tagged { ETHERNET_BYTES + 4 } else { ETHERNET_BYTES };
    let is_ip = matches!(u16_at(frame, at - 2), Some(ETHERTYPE_IPV4 | ETHERTYPE_IPV6));
    let key = frame.get(at..).filter(|_| is_ip).and_then(|packet| FlowKey::of(packet).ok());
    let hash = match key {
        Some(key) => {
            let ports =
                u64::from(key.protocol) << 32 | u64::from(key.src_port) << 16 | u64::from(key.dst_port);
            mix(mix(mix(0, bits(key.src)), bits(key.dst)), u128::from(ports))
        }
        None => mix(0, u128::from_be_bytes(padded(frame))),
    };
    ENTROPY_PORT_MIN | (hash >> 50) as u16
}

/// One step of the hash: both halves of a 128-bit product (the constants are digits of π). It need not be unpredictable: who
/// chooses flows of his own can only fill one path with them, which one flow could do as well.
#[inline]
const fn mix(state: u64, value: u128) -> u64 {
    let (high, low) = ((value >> 64) as u64, value as u64);
    let product = (state ^ high ^ 0x243f_6a88_85a3_08d3) as u128 * (low ^ 0x1319_8a2e_0370_7344) as u128;
    ((product >> 64) as u64 ^ product as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

const fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_bits() as u128,
        IpAddr::V6(address) => address.to_bits(),
    }
}

/// The Ethernet header, or as much as is there.
fn padded(frame: &[u8]) -> [u8; 16] {
    let mut bytes = [0; 16];
    for (to, from) in bytes.iter_mut().zip(frame.iter().take(ETHERNET_BYTES)) {
        *to = *from;
    }
    bytes
}
