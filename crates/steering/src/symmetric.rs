//! The flow hash: symmetric, keyed, linear.
//!
//! # Definition
//!
//! ```text
//! hash(flow, tenant) = toeplitz(key, input(flow)) ^ mix(flow.protocol, tenant)
//! ```
//!
//! *Endpoints.* An endpoint is (address, port). The *low* endpoint is the smaller one, compared by
//! address as an unsigned big-endian number and, only if the addresses are equal, by port. The other is
//! the *high* endpoint. A flow and its reverse therefore have the same two.
//!
//! *Input.* All numbers in network byte order:
//!
//! | family | bytes | low address | high address | low port | high port |
//! |---|---|---|---|---|---|
//! | IPv4 | 12 | 0–3 | 4–7 | 8–9 | 10–11 |
//! | IPv6 | 36 | 0–15 | 16–31 | 32–33 | 34–35 |
//!
//! The key is 40 bytes; input bit `i` (bit 0 = most significant bit of byte 0) selects key bits
//! `i..i+32` ([`crate::toeplitz`]). IPv4 uses the first 16 bytes of the key only. Flows without ports
//! carry zeros; ICMP echo carries its id in the low address's port slot ([`packet::flow`] does that).
//! IPv4-mapped IPv6 addresses in a packet are IPv6. A key that mixes families (no packet does) is hashed
//! as IPv6 with the IPv4 address mapped.
//!
//! *Mix.* With wrapping 32-bit arithmetic
//!
//! ```text
//! x = (protocol << 16 | tenant) * 0x9e3779b1
//! mix = x ^ (x >> 16)
//! ```
//!
//! Both steps are bijections, so no two (tenant, protocol) pairs share a mix, and the fold brings the well
//! mixed upper half down to the bits that choose a node. It is XORed in after the Toeplitz
//! hash, so that the hash stays linear (affine) in addresses and ports.
//!
//! *Bits.* 0–15 choose the node's bucket, 16–22 (and up to 31 in tables of more than 128 buckets) the
//! core's: [`node_bucket`], [`core_bucket`]. The levels share no bits, so they do not polarise.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use packet::flow::FlowKey;

use crate::toeplitz::{INPUT_BYTES_MAX, KEY_BYTES, ToeplitzTable};

/// Multiplier of [`mix`].
pub const MIX_MULTIPLIER: u32 = 0x9e37_79b1;

/// Right shift of [`mix`], in bits.
pub const MIX_SHIFT: u32 = 16;

/// Share of protocol and tenant (by XOR) to the hash; the module page has the definition.
#[must_use]
pub const fn mix(protocol: u8, tenant: u16) -> u32 {
    let x = (((protocol as u32) << 16) | tenant as u32).wrapping_mul(MIX_MULTIPLIER);
    x ^ (x >> MIX_SHIFT)
}

/// Bits 0–15: the node's bucket in a table of 65,536.
#[must_use]
pub const fn node_bits(hash: u32) -> u16 {
    hash as u16
}

/// Bits 16–22: the core's bucket in the default table of 128.
#[must_use]
pub const fn core_bits(hash: u32) -> u8 {
    ((hash >> 16) & 0x7f) as u8
}

/// The node's bucket in a table of `buckets`, a power of two up to 65,536.
#[must_use]
pub const fn node_bucket(hash: u32, buckets: usize) -> usize {
    (hash & 0xffff) as usize & buckets.wrapping_sub(1)
}

/// The core's bucket in a table of `buckets`, a power of two up to 65,536.
#[must_use]
pub const fn core_bucket(hash: u32, buckets: usize) -> usize {
    (hash >> 16) as usize & buckets.wrapping_sub(1)
}

/// The keyed flow hash with its look-up tables. Built once for a key, shared by all cores, never changed.
#[derive(Clone)]
pub struct FlowHasher {
    key: [u8; KEY_BYTES],
    table: ToeplitzTable,
}

impl FlowHasher {
    /// A hasher for `key`: 40 bytes from the system's random source. The node's key is told to peers; the
    /// cluster's, which chooses the unit, is another one and never leaves the units (decision 0008).
    #[must_use]
    pub fn new(key: [u8; KEY_BYTES]) -> Self {
        let table = ToeplitzTable::new(&key);
        Self { key, table }
    }

    /// The flow's hash: equal for both directions. Allocates nothing: 12 look-ups for IPv4, 36 for IPv6.
    #[inline]
    #[must_use]
    pub fn hash(&self, flow: &FlowKey, tenant: u16) -> u32 {
        let toeplitz = match (flow.src, flow.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => self.toeplitz_v4(src, flow.src_port, dst, flow.dst_port),
            (src, dst) => self.toeplitz_v6(widen(src), flow.src_port, widen(dst), flow.dst_port),
        };
        toeplitz ^ mix(flow.protocol, tenant)
    }

    /// The key. Secret: tell it to authenticated peers only, and never print it.
    #[must_use]
    pub fn key(&self) -> &[u8; KEY_BYTES] {
        &self.key
    }

    /// The look-up tables, for the BPF generator: `tables()[position][byte]`, XORed over the input's bytes.
    #[must_use]
    pub fn tables(&self) -> &[[u32; 256]; INPUT_BYTES_MAX] {
        self.table.tables()
    }

    #[inline]
    fn toeplitz_v4(&self, src: Ipv4Addr, src_port: u16, dst: Ipv4Addr, dst_port: u16) -> u32 {
        // Address above port in one number: comparing it is the canonical order.
        let src = (u64::from(u32::from(src)) << 16) | u64::from(src_port);
        let dst = (u64::from(u32::from(dst)) << 16) | u64::from(dst_port);
        let (low, high) = if src <= dst { (src, dst) } else { (dst, src) };
        let t = self.tables();
        let mut hash = 0;
        for byte in 0..4 {
            let shift = 40 - 8 * byte;
            hash ^=
                t[byte][usize::from((low >> shift) as u8)] ^ t[4 + byte][usize::from((high >> shift) as u8)];
        }
        hash ^ ports(t, 8, low as u16, high as u16)
    }

    #[inline]
    fn toeplitz_v6(&self, src: Ipv6Addr, src_port: u16, dst: Ipv6Addr, dst_port: u16) -> u32 {
        let src = (u128::from(src), src_port);
        let dst = (u128::from(dst), dst_port);
        let (low, high) = if src <= dst { (src, dst) } else { (dst, src) };
        let t = self.tables();
        let mut hash = 0;
        for (byte, (&l, &h)) in low.0.to_be_bytes().iter().zip(&high.0.to_be_bytes()).enumerate() {
            hash ^= t[byte][usize::from(l)] ^ t[16 + byte][usize::from(h)];
        }
        hash ^ ports(t, 32, low.1, high.1)
    }
}

/// The part of two ports that stand at input bytes `at..at + 4`.
#[inline]
fn ports(t: &[[u32; 256]; INPUT_BYTES_MAX], at: usize, low: u16, high: u16) -> u32 {
    t[at][usize::from(low >> 8)]
        ^ t[at + 1][usize::from(low & 0xff)]
        ^ t[at + 2][usize::from(high >> 8)]
        ^ t[at + 3][usize::from(high & 0xff)]
}

fn widen(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
}

impl fmt::Debug for FlowHasher {
    /// The key is secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FlowHasher(..)")
    }
}

#[cfg(test)]
mod tests;
