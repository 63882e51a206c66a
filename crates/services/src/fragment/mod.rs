//! Packets in pieces (row C5; RFC 791, 815, 1858, 5722, 6946, 8200).
//!
//! Only the first fragment of a packet has its ports, so the core that owns its flow is not known from the others.
//! The work is shared like this:
//!
//! 1. Every fragment is read by the core of its *addresses* (hash of protocol and addresses, ports zero). That
//!    core's [`Rendezvous`] holds what comes before the header. With the header it tells the flow's key and gives
//!    out all fragments in the order in which they came, at once from then on.
//! 2. The caller finds the owner of that flow, what is to be done ([`action`], [`Variant`]), and tells the owner:
//!    [`FragmentTable::tell`]. The owner keeps it in its fragmentation table.
//! 3. The owner's [`FragmentTable`] either puts the packet together ([`Action::Assemble`]) or lets every fragment go
//!    through by itself ([`Action::Bridge`]), where the flow translates it.
//! 4. What is longer than the next link carries is cut again: [`fragment_out`].
//!
//! Both halves drop what a receiver might read in two ways: a packet whose fragments overlap or contradict each other
//! is dropped as a whole, and its identification stays refused until the timeout (RFC 5722, for IPv4 too). An exact
//! copy is ignored. Fragments are strict about lengths and about the first one: it holds the whole transport header
//! (RFC 1858, RFC 7112).
//!
//! Memory has a limit per core, per source and per packet. A source that reaches its share loses its own oldest
//! packet, never another's.

mod out;
mod pieces;
mod rendezvous;
mod rules;
mod sent;
mod store;
mod table;

#[cfg(test)]
mod tests;

use std::net::IpAddr;

use packet::attachment::Ingress;
use packet::{IpHeader, put_u16, u16_at};

pub use out::fragment_out;
pub use pieces::{FRAGMENTS_PER_PACKET_MAX, flow_of_first};
pub use rendezvous::{Released, Rendezvous};
pub use rules::{Action, Facts, Measure, Variant, action};
pub use sent::{SentFragments, SentId};
pub use store::FragmentStats;
pub use table::{FragmentTable, Outcome, Told, Whole};

use crate::spec;

/// Identity that all fragments of one packet share (RFC 791 §3.2), and where they come in: tenants may use the same
/// addresses.
///
/// RFC 8200 leaves the protocol out for IPv6. Here it belongs to it: the flow hash has it too, so fragments that
/// differ in it would not even meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PacketId {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// Identification: 16 bits in IPv4, 32 in IPv6.
    pub id: u32,
    /// Tenant of the interface.
    pub tenant: u16,
    /// By what it comes in.
    pub ingress: Ingress,
    /// Protocol as every fragment has it: in IPv6 what the fragment header names.
    pub protocol: u8,
}

impl PacketId {
    /// The packet that this fragment belongs to. `None`: it is no fragment. An IPv6 packet whose fragment header says
    /// that it is whole is none either (RFC 6946).
    #[must_use]
    pub fn of(header: &IpHeader, tenant: u16, ingress: Ingress) -> Option<PacketId> {
        let fragment = header.fragment.filter(|fragment| !fragment.is_whole())?;
        let (src, dst, protocol) = (header.src, header.dst, header.protocol);
        Some(PacketId { src, dst, id: fragment.id, tenant, ingress, protocol })
    }
}

/// Bounds of one half on one core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FragmentLimits {
    /// Bytes of packets in pieces, bookkeeping included.
    pub bytes_max: usize,
    /// Packets in pieces of one source: an IPv4 address, or the /64 of an IPv6 address.
    pub packets_per_source_max: u16,
    /// How long the fragments of a packet may take from the first that came, ns.
    pub timeout_ns: u64,
}

impl FragmentLimits {
    /// The operator's limits for one half of one core: each half has half of the bytes.
    #[must_use]
    pub fn of(limits: &spec::Limits, timeouts: &spec::Timeouts) -> FragmentLimits {
        FragmentLimits {
            bytes_max: limits.fragment_bytes_max / 2,
            packets_per_source_max: limits.fragments_per_source_max,
            timeout_ns: u64::from(timeouts.fragments_s) * 1_000_000_000,
        }
    }
}
