//! Packet headers, checksums, flow keys, segmentation and coalescing: what every other crate needs to know
//! about the bytes of an IP packet. No I/O, no clock, no allocation per packet, and no panic on any input.
//!
//! A tour in the order data flows:
//!
//! 1. A TUN read yields a [`vnet`] header and one packet, perhaps a *super-packet* of up to 64 KB whose
//!    segmentation and checksum the kernel left to us.
//! 2. [`ip`] reads the IPv4 or IPv6 header (all lengths checked, extension headers walked), [`icmp`] tells kinds of
//!    ICMP messages, [`martian`] what no router passes on, [`quic`] QUIC's clear headers and Initials, [`tls`] and [`server_name`] the server that a client asks for, and [`flow`] makes the [`FlowKey`] that the steering crate hashes to an owner.
//!    [`ethernet`] does the same for frames of a TAP device.
//! 3. [`segment`] writes one segment after the other of the super-packet straight into the datagrams that
//!    carry them. Transport checksums stay partial: the tunnel's AEAD vouches for the bytes.
//!    [`encapsulated`] does so for super-packets inside other packets, which no kernel would take back.
//! 4. At the far end [`coalesce`] merges the segments again into one super-packet, ready for a TUN write.
//! 5. [`attachment`] names where a packet came in and where it goes; [`buffer`] is memory for one, with room around it.
//! 6. [`checksum`] holds the arithmetic of all of that, and [`drop_reason`] names every way for a packet to
//!    end early: one list for the whole product.
//!
//! The only cryptography here is that of QUIC's Initials, whose keys are public: it stands beside TLS's parser, so that tunnel and
//! services share both.
//!
//! Byte order: packets are in network byte order as on the wire; every field of a parsed header is in host
//! order. Lengths are in bytes.

pub mod announce;
pub mod attachment;
pub mod buffer;
pub mod checksum;
pub mod coalesce;
pub mod drop_reason;
pub mod encapsulated;
pub mod ethernet;
pub mod flow;
pub mod icmp;
pub mod ip;
pub mod martian;
mod mss;
pub mod prefetch;
pub mod quic;
pub mod segment;
pub mod server_name;
#[cfg(test)]
mod testing;
pub mod tls;
pub mod vnet;

pub use attachment::{BondId, Egress, Ingress, InterfaceId};
pub use buffer::{PacketBuf, PacketPool};
pub use coalesce::Coalescer;
pub use drop_reason::{DropCounters, DropReason};
pub use flow::FlowKey;
pub use ip::{Fragment, IpHeader};
pub use segment::{SegmentKind, Segmenter};
pub use vnet::VirtioNetHeader;

/// Bytes at `at..at + N`, or nothing when the slice is too short. The one way this crate reads fields: it
/// cannot panic, and the compiler folds the checks of neighboring reads.
#[inline]
#[must_use]
pub fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk::<N>().copied()
}

/// Big-endian 16 bits at `at`.
#[inline]
#[must_use]
pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    array_at(bytes, at).map(u16::from_be_bytes)
}

/// Big-endian 32 bits at `at`.
#[inline]
#[must_use]
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    array_at(bytes, at).map(u32::from_be_bytes)
}

/// Stores 16 bits big endian at `at`; nothing happens when they do not fit (callers have checked lengths).
#[inline]
pub fn put_u16(bytes: &mut [u8], at: usize, value: u16) {
    if let Some(field) = bytes.get_mut(at..).and_then(|rest| rest.first_chunk_mut::<2>()) {
        *field = value.to_be_bytes();
    }
}

/// Stores 32 bits big endian at `at`; nothing happens when they do not fit (callers have checked lengths).
#[inline]
pub fn put_u32(bytes: &mut [u8], at: usize, value: u32) {
    if let Some(field) = bytes.get_mut(at..).and_then(|rest| rest.first_chunk_mut::<4>()) {
        *field = value.to_be_bytes();
    }
}
