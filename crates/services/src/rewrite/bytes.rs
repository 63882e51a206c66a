//! Fields of packets, and sums of differences.
//!
//! A *delta* is the sum of `!old + new` of 32-bit words. Both 2^16 and 2^32 are 1 modulo 0xffff, so 32-bit words add up
//! to the same checksum as 16-bit ones, and billions of them fit without a carry.

use std::net::IpAddr;

pub(crate) use packet::{array_at, put_u16, put_u32, u16_at, u32_at};

/// Copies `value` to `at`; nothing happens when it does not fit: callers have checked lengths.
#[inline]
pub(crate) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(field) = bytes.get_mut(at..).and_then(|rest| rest.get_mut(..value.len())) {
        field.copy_from_slice(value);
    }
}

/// The delta of one word.
#[inline]
pub(crate) const fn delta(old: u32, new: u32) -> u64 {
    !old as u64 + new as u64
}

/// The delta of 16 bits that stand alone.
#[inline]
pub(crate) const fn delta16(old: u16, new: u16) -> u64 {
    !old as u64 + new as u64
}

/// The delta of an IPv6 address.
#[inline]
pub(crate) const fn delta128(old: u128, new: u128) -> u64 {
    words(!old) + words(new)
}

#[inline]
const fn words(bits: u128) -> u64 {
    let (low, high) = (bits as u64, (bits >> 64) as u64);
    (low & 0xffff_ffff) + (low >> 32) + (high & 0xffff_ffff) + (high >> 32)
}

/// The delta of an address. Of different versions it means nothing.
pub(crate) fn delta_of(old: IpAddr, new: IpAddr) -> u64 {
    match (old, new) {
        (IpAddr::V4(old), IpAddr::V4(new)) => delta(old.to_bits(), new.to_bits()),
        (IpAddr::V6(old), IpAddr::V6(new)) => delta128(old.to_bits(), new.to_bits()),
        _ => 0,
    }
}

/// A sum folded to 16 bits. Adding a number to itself with its halves exchanged adds the halves, in the upper one with
/// the carry that must come around.
#[inline]
const fn fold(sum: u64) -> u16 {
    let sum = (sum.wrapping_add(sum.rotate_left(32)) >> 32) as u32;
    (sum.wrapping_add(sum.rotate_left(16)) >> 16) as u16
}

/// A checksum after a delta (RFC 1624, equation 3).
#[inline]
pub(crate) const fn changed(checksum: u16, delta: u64) -> u16 {
    !fold(!checksum as u64 + delta)
}

/// A partial checksum, which is not complemented, after a delta of its pseudo-header.
#[inline]
pub(crate) const fn changed_partial(partial: u16, delta: u64) -> u16 {
    fold(partial as u64 + delta)
}
