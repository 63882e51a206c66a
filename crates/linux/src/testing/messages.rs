//! Readers of the kernel's messages on bytes of the caller's, for the fuzzer: none may panic or read outside of them.

use std::mem::size_of;

pub use crate::packet_ring::testing::{Slot, ring};
pub use crate::udp::testing::reception;

/// Bytes of the address of a received datagram: `sockaddr_in6`.
pub const ADDRESS_BYTES: usize = size_of::<libc::sockaddr_in6>();

/// Changes that a routing monitor finds in a datagram.
#[must_use]
pub fn routing(datagram: &[u8]) -> usize {
    crate::netlink::testing::routing(datagram)
}

/// Changes that a neighbor monitor finds in a datagram.
#[must_use]
pub fn neighbors(datagram: &[u8]) -> usize {
    crate::netlink::testing::neighbors(datagram)
}

/// Messages of an answer, up to its end, or to the error that it ends with.
#[must_use]
pub fn exchange(datagram: &[u8]) -> usize {
    crate::netlink::testing::exchange(datagram)
}

/// Chains and rules that are found in a list of nftables, and what the chains do.
#[must_use]
pub fn base_chains(datagram: &[u8]) -> usize {
    crate::netlink::nftables::testing::base_chains(datagram)
}
