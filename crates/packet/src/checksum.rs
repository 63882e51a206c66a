//! The Internet checksum (RFC 1071), its incremental update (RFC 1624) and pseudo-headers.
//!
//! A *partial sum* is a `u32` of big-endian 16-bit words, not complemented. Functions here return partial
//! sums of at most 17 bits, so that tens of thousands of them can be added with plain `+` before
//! [`finish`]. A *partial checksum* is what the kernel calls `CHECKSUM_PARTIAL`: the checksum field holds
//! the folded, not complemented sum of the pseudo-header, and somebody later adds the rest
//! ([`crate::segment::complete_checksum`]).

use crate::ip::IpHeader;
use crate::u16_at;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Adds the bytes to a partial sum. An odd number of bytes is padded with a zero: only the last part of a
/// message may be odd.
#[inline]
#[must_use]
pub fn sum(bytes: &[u8], initial: u32) -> u32 {
    // Word sums do not depend on the byte order (RFC 1071 §2 B), so words are loaded in the machine's order
    // and the result is swapped once. Adding 32-bit halves into 64-bit lanes needs no carry handling below
    // 2^32 words, and the lanes become vector registers.
    let mut lanes = [0u64; 8];
    let (chunks, tail) = bytes.as_chunks::<32>();
    for chunk in chunks {
        let (words, _) = chunk.as_chunks::<4>();
        for (lane, word) in lanes.iter_mut().zip(words) {
            *lane += u64::from(u32::from_ne_bytes(*word));
        }
    }
    let mut total: u64 = lanes.iter().sum();
    let (words, rest) = tail.as_chunks::<4>();
    for word in words {
        total += u64::from(u32::from_ne_bytes(*word));
    }
    let mut last = [0u8; 4];
    for (to, from) in last.iter_mut().zip(rest) {
        *to = *from;
    }
    total += u64::from(u32::from_ne_bytes(last));
    // 64 → 33 → 17 → 16 bits.
    total = (total & 0xffff_ffff) + (total >> 32);
    total = (total & 0xffff_ffff) + (total >> 32);
    let folded = fold(total as u32);
    u32::from(u16::from_be_bytes(folded.to_ne_bytes())) + u32::from(fold(initial))
}

/// A partial sum folded to 16 bits, not complemented: what a partial checksum's field holds.
#[inline]
#[must_use]
pub const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// The checksum of a partial sum: folded and complemented. For UDP see [`nonzero`].
#[inline]
#[must_use]
pub const fn finish(sum: u32) -> u16 {
    !fold(sum)
}

/// A checksum as UDP sends it: zero means "none" there, and 0xffff is its equal (RFC 768).
#[inline]
#[must_use]
pub const fn nonzero(checksum: u16) -> u16 {
    if checksum == 0 { 0xffff } else { checksum }
}

/// Partial sum of the IPv4 pseudo-header (RFC 9293 §3.1). `upper_bytes`: length of the upper layer with its
/// header.
#[inline]
#[must_use]
pub fn pseudo_header_v4(src: Ipv4Addr, dst: Ipv4Addr, protocol: u8, upper_bytes: u16) -> u32 {
    let (src, dst) = (src.to_bits(), dst.to_bits());
    (src >> 16) + (src & 0xffff) + (dst >> 16) + (dst & 0xffff) + u32::from(protocol) + u32::from(upper_bytes)
}

/// Partial sum of the IPv6 pseudo-header (RFC 8200 §8.1). `upper_bytes`: length of the upper layer with its
/// header.
#[inline]
#[must_use]
pub fn pseudo_header_v6(src: &Ipv6Addr, dst: &Ipv6Addr, protocol: u8, upper_bytes: u32) -> u32 {
    sum(&src.octets(), 0)
        + sum(&dst.octets(), 0)
        + u32::from(protocol)
        + (upper_bytes >> 16)
        + (upper_bytes & 0xffff)
}

/// Partial sum of the pseudo-header of either version. Addresses of different versions give zero for the
/// addresses: there is no such packet.
#[inline]
#[must_use]
pub fn pseudo_header(src: IpAddr, dst: IpAddr, protocol: u8, upper_bytes: usize) -> u32 {
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => pseudo_header_v4(src, dst, protocol, upper_bytes as u16),
        (IpAddr::V6(src), IpAddr::V6(dst)) => pseudo_header_v6(&src, &dst, protocol, upper_bytes as u32),
        _ => u32::from(protocol) + upper_bytes as u32,
    }
}

/// A checksum after one 16-bit word under it changed (RFC 1624, equation 3). For UDP pass the result through
/// [`nonzero`], and leave a checksum of zero alone.
#[inline]
#[must_use]
pub const fn update16(checksum: u16, old: u16, new: u16) -> u16 {
    finish(!checksum as u32 + !old as u32 + new as u32)
}

/// A checksum after two words under it changed, such as an IPv4 address.
#[inline]
#[must_use]
pub const fn update32(checksum: u16, old: u32, new: u32) -> u16 {
    let old = !old;
    finish(!checksum as u32 + (old >> 16) + (old & 0xffff) + (new >> 16) + (new & 0xffff))
}

/// A checksum after some bytes under it changed. They start at an even offset and have equal lengths; without
/// that the result means nothing.
#[inline]
#[must_use]
pub fn update_bytes(checksum: u16, old: &[u8], new: &[u8]) -> u16 {
    finish(u32::from(!checksum) + u32::from(!fold(sum(old, 0))) + sum(new, 0))
}

/// A *partial* checksum (not complemented) after one word of the pseudo-header changed. Words outside of the
/// pseudo-header, such as ports, are not in a partial checksum: do nothing for them.
#[inline]
#[must_use]
pub const fn update16_partial(partial: u16, old: u16, new: u16) -> u16 {
    fold(partial as u32 + !old as u32 + new as u32)
}

/// A *partial* checksum after some bytes of the pseudo-header changed, such as an address.
#[inline]
#[must_use]
pub fn update_bytes_partial(partial: u16, old: &[u8], new: &[u8]) -> u16 {
    fold(u32::from(partial) + u32::from(!fold(sum(old, 0))) + sum(new, 0))
}

/// The header checksum of an IPv4 packet is right. `header`: exactly the header, options included.
#[inline]
#[must_use]
pub fn verify_ipv4_header(header: &[u8]) -> bool {
    fold(sum(header, 0)) == 0xffff
}

/// The upper layer's checksum under the pseudo-header is right: TCP, UDP (where zero, "none", is not),
/// ICMPv6. `upper`: exactly the upper layer, its header included.
#[inline]
#[must_use]
pub fn verify_upper(src: IpAddr, dst: IpAddr, protocol: u8, upper: &[u8]) -> bool {
    if protocol == crate::ip::PROTOCOL_UDP && u16_at(upper, 6) == Some(0) {
        return false;
    }
    fold(sum(upper, pseudo_header(src, dst, protocol, upper.len()))) == 0xffff
}

/// [`verify_upper`] for a whole packet. Fragments are not verifiable: `false`.
#[must_use]
pub fn verify_packet(packet: &[u8]) -> bool {
    match IpHeader::parse(packet) {
        Ok(header) if !header.is_fragmented() => {
            verify_upper(header.src, header.dst, header.protocol, header.payload(packet))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests;
