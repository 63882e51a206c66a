//! Changes a packet's addresses and ports in place and keeps every checksum right, without reading the payload.
//!
//! Checksums are updated incrementally (RFC 1624): one that was wrong stays wrong, so a damaged packet is never made
//! to look whole. A *partial* checksum (`checksum_partial`, virtio's `NEEDS_CSUM`) sums the pseudo-header only:
//! addresses change it, ports do not.
//!
//! 1. [`rewrite()`]: the packet becomes one of another flow key. Whole TCP and UDP without options take a short way.
//! 2. [`rewrite_error`]: an ICMP error, with the packet that it quotes (RFC 5508 §4).
//! 3. [`decrement_ttl`]: what every router does.

pub(crate) mod bytes;
mod crc32c;
mod error;
mod options;
#[cfg(test)]
pub(crate) mod testing;
mod upper;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bytes::{array_at, put_u16, u16_at, u32_at};
use packet::ip::{IPV4_HEADER_BYTES, IPV6_HEADER_BYTES, PROTOCOL_AH, PROTOCOL_TCP, PROTOCOL_UDP};
use packet::segment::UDP_CHECKSUM_OFFSET;
use packet::{DropReason, FlowKey, IpHeader, checksum};

pub use error::rewrite_error;
use upper::{Change, Extent};

/// Makes the addresses and ports (of ICMP queries: the identifier) of a packet those of `to`, which is meant in the
/// packet's own direction. `header` was parsed from this packet, and nothing changed it since.
///
/// * ICMP queries: the identifier is whichever port of `to` is not zero, as [`FlowKey`] has it.
/// * Fragments: the first one has ports and checksum and takes the whole change, later ones only the addresses.
/// * UDP without a checksum stays without. SCTP's CRC32c follows the ports; where `checksum_partial` says that somebody
///   completes it, it is left alone.
/// * Other protocols: the addresses only, and the checksum of DCCP, which covers them.
///
/// # Errors
/// The packet is unchanged then. [`DropReason::NatUnsupported`]: addresses of the other IP version; AH, which signs
/// addresses; source routes and routing headers whose real destination stands elsewhere; SCTP ports in a fragment;
/// extension headers behind an IPv6 fragment header. [`DropReason::FragmentInvalid`]: a first fragment that ends
/// before its checksum. [`DropReason::IpMalformed`]: an upper layer that is cut.
#[inline]
pub fn rewrite(
    packet: &mut [u8],
    header: &IpHeader,
    checksum_partial: bool,
    to: &FlowKey,
) -> Result<(), DropReason> {
    let new_ports = ports(to.src_port, to.dst_port);
    let done = match (to.src, to.dst) {
        _ if header.fragment.is_some() => false,
        (IpAddr::V4(src), IpAddr::V4(dst))
            if header.version == 4 && header.header_bytes == IPV4_HEADER_BYTES =>
        {
            let new = [src.to_bits(), dst.to_bits(), new_ports];
            match header.protocol {
                PROTOCOL_TCP => plain_v4::<16, 40>(packet, header.total_bytes, checksum_partial, new),
                PROTOCOL_UDP => plain_v4::<6, 28>(packet, header.total_bytes, checksum_partial, new),
                _ => false,
            }
        }
        (IpAddr::V6(src), IpAddr::V6(dst))
            if header.version == 6 && header.header_bytes == IPV6_HEADER_BYTES =>
        {
            let new = [src.to_bits(), dst.to_bits()];
            match header.protocol {
                PROTOCOL_TCP => {
                    plain_v6::<16, 60>(packet, header.total_bytes, checksum_partial, new, new_ports)
                }
                PROTOCOL_UDP => {
                    plain_v6::<6, 48>(packet, header.total_bytes, checksum_partial, new, new_ports)
                }
                _ => false,
            }
        }
        _ => false,
    };
    if done { Ok(()) } else { general(packet, header, checksum_partial, to) }
}

/// Addresses and ports that a plain packet gets, as words of the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ends {
    /// IPv4: source, destination, both ports.
    V4([u32; 3]),
    /// IPv6: source and destination, both ports.
    V6([u128; 2], u32),
}

impl Ends {
    /// The flow key that a packet of this protocol has then.
    #[must_use]
    pub fn key(&self, protocol: u8) -> FlowKey {
        let (src, dst, ports) = match *self {
            Self::V4([src, dst, ports]) => {
                (IpAddr::V4(Ipv4Addr::from_bits(src)), IpAddr::V4(Ipv4Addr::from_bits(dst)), ports)
            }
            Self::V6([src, dst], ports) => {
                (IpAddr::V6(Ipv6Addr::from_bits(src)), IpAddr::V6(Ipv6Addr::from_bits(dst)), ports)
            }
        };
        FlowKey { src, dst, src_port: (ports >> 16) as u16, dst_port: ports as u16, protocol }
    }
}

/// Sends a packet on as a router does. It is known that the packet is whole TCP or UDP directly behind the fixed IP
/// header, of `total_bytes` that are there, that its upper header is not cut, that its time to live is above 1, and
/// that `to`, if it is translated, is of its IP version. Takes one from the time to live and writes the new ends, as
/// [`decrement_ttl`] and [`rewrite()`] do.
#[inline]
pub fn send_on(
    packet: &mut [u8],
    total_bytes: usize,
    protocol: u8,
    checksum_partial: bool,
    to: Option<&Ends>,
) {
    let expired = decrement_ttl(packet);
    debug_assert!(expired.is_ok());
    let partial = checksum_partial;
    let done = match (to, protocol) {
        (None, _) => true,
        (Some(Ends::V4(to)), PROTOCOL_TCP) => plain_v4::<16, 40>(packet, total_bytes, partial, *to),
        (Some(Ends::V4(to)), _) => plain_v4::<6, 28>(packet, total_bytes, partial, *to),
        (Some(Ends::V6(to, ports)), PROTOCOL_TCP) => {
            plain_v6::<16, 60>(packet, total_bytes, partial, *to, *ports)
        }
        (Some(Ends::V6(to, ports)), _) => plain_v6::<6, 48>(packet, total_bytes, partial, *to, *ports),
    };
    debug_assert!(done);
}

#[inline]
pub(crate) const fn ports(src: u16, dst: u16) -> u32 {
    (src as u32) << 16 | dst as u32
}

/// TCP or UDP behind an IPv4 header without options, not in fragments. `AT`: the checksum's place in the upper layer;
/// `BYTES`: both headers; `new`: addresses and ports. `false`: too short, nothing changed.
#[inline]
fn plain_v4<const AT: usize, const BYTES: usize>(
    packet: &mut [u8],
    total_bytes: usize,
    partial: bool,
    new: [u32; 3],
) -> bool {
    let Some(bytes) = packet.first_chunk_mut::<BYTES>() else { return false };
    if total_bytes < BYTES {
        return false;
    }
    let addresses = bytes::delta(word(bytes, 12), new[0]) + bytes::delta(word(bytes, 16), new[1]);
    let ports = bytes::delta(word(bytes, IPV4_HEADER_BYTES), new[2]);
    let sum = u16::from_be_bytes([bytes[10], bytes[11]]);
    bytes[10..12].copy_from_slice(&bytes::changed(sum, addresses).to_be_bytes());
    bytes[12..16].copy_from_slice(&new[0].to_be_bytes());
    bytes[16..20].copy_from_slice(&new[1].to_be_bytes());
    bytes[20..24].copy_from_slice(&new[2].to_be_bytes());
    let at = IPV4_HEADER_BYTES + AT;
    let sum = u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    let sum = plain_checksum::<AT>(sum, partial, addresses, ports);
    bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    true
}

/// The same behind an IPv6 header without extension headers.
#[inline]
fn plain_v6<const AT: usize, const BYTES: usize>(
    packet: &mut [u8],
    total_bytes: usize,
    partial: bool,
    new: [u128; 2],
    new_ports: u32,
) -> bool {
    let Some(bytes) = packet.first_chunk_mut::<BYTES>() else { return false };
    if total_bytes < BYTES {
        return false;
    }
    let old = [
        array_at(bytes, 8).map_or(0, u128::from_be_bytes),
        array_at(bytes, 24).map_or(0, u128::from_be_bytes),
    ];
    let addresses = bytes::delta128(old[0], new[0]) + bytes::delta128(old[1], new[1]);
    let ports = bytes::delta(word(bytes, IPV6_HEADER_BYTES), new_ports);
    bytes[8..24].copy_from_slice(&new[0].to_be_bytes());
    bytes[24..40].copy_from_slice(&new[1].to_be_bytes());
    bytes[40..44].copy_from_slice(&new_ports.to_be_bytes());
    let at = IPV6_HEADER_BYTES + AT;
    let sum = u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    let sum = plain_checksum::<AT>(sum, partial, addresses, ports);
    bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    true
}

/// A TCP or UDP checksum after the deltas of addresses and ports.
#[inline]
fn plain_checksum<const AT: usize>(sum: u16, partial: bool, addresses: u64, ports: u64) -> u16 {
    if partial {
        return bytes::changed_partial(sum, addresses);
    }
    let changed = bytes::changed(sum, addresses + ports);
    match AT {
        UDP_CHECKSUM_OFFSET if sum == 0 => 0,
        UDP_CHECKSUM_OFFSET => checksum::nonzero(changed),
        _ => changed,
    }
}

/// The bytes at `at..at + 4`, which are there.
#[inline]
fn word<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Everything that is not plain.
fn general(
    packet: &mut [u8],
    header: &IpHeader,
    checksum_partial: bool,
    to: &FlowKey,
) -> Result<(), DropReason> {
    let same_version = if header.version == 4 {
        to.src.is_ipv4() && to.dst.is_ipv4()
    } else {
        to.src.is_ipv6() && to.dst.is_ipv6()
    };
    if !same_version || header.protocol == PROTOCOL_AH {
        return Err(DropReason::NatUnsupported);
    }
    options::allow(packet, header, to.dst != header.dst)?;
    let extent = match header.fragment {
        Some(fragment) if fragment.offset > 0 => Extent::Later,
        Some(fragment) if !fragment.is_whole() => Extent::First,
        _ => Extent::Whole,
    };
    let change = Change {
        addresses: bytes::delta_of(header.src, to.src) + bytes::delta_of(header.dst, to.dst),
        version: header.version,
        src_port: to.src_port,
        dst_port: to.dst_port,
        partial: checksum_partial,
        extent,
    };
    let upper = packet.get_mut(header.header_bytes..header.total_bytes).ok_or(DropReason::IpMalformed)?;
    change.apply(upper, header.protocol)?;
    put_addresses(packet, to.src, to.dst);
    Ok(())
}

/// Writes both addresses into an IP header, of whose version they are, and updates the IPv4 header checksum.
fn put_addresses(packet: &mut [u8], src: IpAddr, dst: IpAddr) {
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let old = [u32_at(packet, 12).unwrap_or(0), u32_at(packet, 16).unwrap_or(0)];
            let delta = bytes::delta(old[0], src.to_bits()) + bytes::delta(old[1], dst.to_bits());
            put_u16(packet, 10, bytes::changed(u16_at(packet, 10).unwrap_or(0), delta));
            bytes::put(packet, 12, &src.octets());
            bytes::put(packet, 16, &dst.octets());
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            bytes::put(packet, 8, &src.octets());
            bytes::put(packet, 24, &dst.octets());
        }
        _ => {}
    }
}

/// Takes one from the time to live or hop limit and updates the IPv4 header checksum (RFC 1812 §5.3.1).
///
/// # Errors
/// [`DropReason::TtlExpired`] when it is 0 or 1 already, [`DropReason::IpMalformed`] when there is no IP header. The
/// packet is unchanged then.
#[inline]
pub fn decrement_ttl(packet: &mut [u8]) -> Result<(), DropReason> {
    match packet.first().map(|first| first >> 4) {
        Some(4) if packet.len() >= IPV4_HEADER_BYTES => {
            let bytes = packet.first_chunk_mut::<IPV4_HEADER_BYTES>().ok_or(DropReason::IpMalformed)?;
            if bytes[8] <= 1 {
                return Err(DropReason::TtlExpired);
            }
            // The high half of its word becomes one less.
            bytes[8] -= 1;
            let sum = u16::from_be_bytes([bytes[10], bytes[11]]);
            bytes[10..12].copy_from_slice(&checksum::update16(sum, 0x100, 0).to_be_bytes());
            Ok(())
        }
        Some(6) if packet.len() >= IPV6_HEADER_BYTES => {
            let limit = packet.get_mut(7).ok_or(DropReason::IpMalformed)?;
            if *limit <= 1 {
                return Err(DropReason::TtlExpired);
            }
            *limit -= 1;
            Ok(())
        }
        _ => Err(DropReason::IpMalformed),
    }
}

#[cfg(test)]
mod tests;
