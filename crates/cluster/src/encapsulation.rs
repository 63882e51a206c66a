//! Headers between the units of a cluster (rows D3, D5, D11).
//!
//! A dispatcher puts an Ethernet frame behind two headers and sends it over UDP to the unit that shall have it; that unit may
//! send it on to another one, or have the dispatcher send out a frame. Byte by byte, with examples: `docs/wire-cluster.md`.
//!
//! ```text
//!  IP, UDP        L1               L2                                          inner frame
//!  20|40, 8       6                8        0–20                               14 …
//!  to BUS_PORT    who to, who      why,     ports, next hop, recorded route    Ethernet, IP …
//!                 from, VLAN tag   where    as far as they are there
//! ```
//!
//! 1. [`Encapsulation`]: both headers, decoded. [`Encapsulation::write`] and [`Encapsulation::parse`] cost the same whatever
//!    is in the packet, and the headers fit into the room in front of every packet ([`packet::buffer::HEADROOM_BYTES`]).
//! 2. [`outer`]: the IP and UDP headers in front of them, and the source port that spreads flows over paths.
//! 3. [`fragment`]: one frame in several datagrams, where a network between units is too small for it.
//!
//! The header is six bytes more than a whole number of 32-bit words, the VLAN tag's word being always there, so that the IP
//! header inside stands at a multiple of four bytes from the outer one.

pub mod fragment;
pub mod outer;
#[cfg(test)]
mod tests;
pub mod trace;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use packet::attachment::{Arrival, UnitVisit};
use packet::buffer::HEADROOM_BYTES;
use packet::vnet::VirtioNetHeader;
use packet::{DropReason, array_at, put_u16, put_u32, u16_at};

/// UDP port that units listen on for each other; 4600 is the tunnel's.
pub const BUS_PORT: u16 = 4_602;

/// Number in place of a shared interface's (IFID) of what peers of a hub send and get.
pub const HUB_INTERFACE: u8 = 255;

/// Version in the two highest bits of L1. Everything else is dropped.
pub const BUS_VERSION: u8 = 1;

/// Length of L1, bytes.
pub const L1_BYTES: usize = 6;

/// Length of L2 without option words, bytes.
pub const L2_BYTES: usize = 8;

/// Shortest pair of headers, bytes.
pub const ENCAPSULATION_BYTES_MIN: usize = L1_BYTES + L2_BYTES;

/// Longest pair of headers that is written, bytes. HDR SIZE could name more; such a header is read, and what is unknown in it
/// skipped.
pub const ENCAPSULATION_BYTES_MAX: usize = ENCAPSULATION_BYTES_MIN + 4 * (OPTION_WORDS_MAX + OFFLOAD_WORDS);

/// Length of an Ethernet header without a tag, bytes: the shortest inner frame.
pub const ETHERNET_BYTES: usize = 14;

/// Most node ids of a recorded route.
pub const ROUTE_IDS_MAX: usize = 2 * ROUTE_WORDS_MAX;

/// Option words behind the two fixed words of L2, besides those of an offload header.
const OPTION_WORDS_MAX: usize = 5;

/// Option words of an offload header.
const OFFLOAD_WORDS: usize = 3;

/// Of them, words that a recorded route takes if nothing else needs them.
const ROUTE_WORDS_MAX: usize = 4;

/// Node ids of dispatchers have 12 bits.
const DISPATCHER_MASK: u16 = 0x0fff;

/// Bits of L1's first byte, below the version.
const FRAGMENT_BIT: u8 = 0x20;
const VLAN_BIT: u8 = 0x10;

/// Bit of L2's last byte: the next hop has an IPv6 address.
const NEXT_HOP_V6: u32 = 1;

/// Bit of L2's last byte: there is an offload header.
const OFFLOADED: u32 = 2;

/// Bits of L2's last byte that have no meaning yet.
const RESERVED: u32 = 0xfc;

/// Headers of the tunnel, when datagrams between units go through one: data header and head of a frame.
const TUNNEL_BYTES: usize = 16 + 16;

/// Ethernet header with a tag around the datagram.
const OUTER_ETHERNET_BYTES: usize = 18;

// All that stands in front of an inner IP packet is written into the room that every buffer has: through a tunnel, and as a
// frame (the first part of one that is fragmented) of a shared interface's network.
const _: () = assert!(
    ETHERNET_BYTES + ENCAPSULATION_BYTES_MAX + outer::OUTER_BYTES_MAX + TUNNEL_BYTES <= HEADROOM_BYTES
);
const _: () = assert!(
    ETHERNET_BYTES
        + ENCAPSULATION_BYTES_MAX
        + fragment::FRAGMENT_HEAD_BYTES
        + outer::OUTER_BYTES_MAX
        + OUTER_ETHERNET_BYTES
        <= HEADROOM_BYTES
);
// The inner IP header is aligned.
const _: () = assert!((ENCAPSULATION_BYTES_MIN + ETHERNET_BYTES).is_multiple_of(4));

/// Cause for which a frame is handed to another unit: HANDOFF TYPE.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Handoff {
    /// 0: a dispatcher took it in from outside. The only one of TYPE 0.
    #[default]
    Dispatch,
    /// 1: the unit before it in the bucket's chain does not have the flow.
    Punt,
    /// 2: nobody in the chain has the flow; back to the bucket's owner.
    Unclaimed,
    /// 3: for every unit of the interface, in the table's order; who is done sends it to the next.
    Broadcast,
    /// 4: from a data plane to a dispatcher, which sends the frame out by the shared interface as it is.
    Reply,
    /// 5: as a reply, but the dispatcher finds out the hardware address first.
    Resolve {
        /// Address of the neighbor that gets it.
        next_hop: IpAddr,
    },
    /// 6: asks for the way of a flow's packets: handed on like a dispatched one, but not processed; the unit that would do so
    /// sends it back with the route.
    Trace,
}

impl Handoff {
    /// The number on the wire (4 bits).
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Dispatch => 0,
            Self::Punt => 1,
            Self::Unclaimed => 2,
            Self::Broadcast => 3,
            Self::Reply => 4,
            Self::Resolve { .. } => 5,
            Self::Trace => 6,
        }
    }

    const fn option_words(self) -> usize {
        match self {
            Self::Resolve { next_hop: IpAddr::V4(_) } => 1,
            Self::Resolve { next_hop: IpAddr::V6(_) } => 4,
            _ => 0,
        }
    }
}

/// Place where the receiver takes the packet's processing up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Hook {
    /// 0: before all services.
    #[default]
    BeforeServices,
    /// 1: after the fragments' rendezvous, which learned the ports that this fragment does not have.
    AfterRendezvous {
        /// Source port of the flow, as in the packet's direction.
        src_port: u16,
        /// Destination port.
        dst_port: u16,
    },
    /// 2: at the unit's own sockets: a datagram of a bond that ends there.
    Host,
    /// 3: after all services: the packet goes into the bond of its destination.
    Bond,
}

impl Hook {
    /// The number on the wire (4 bits).
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::BeforeServices => 0,
            Self::AfterRendezvous { .. } => 1,
            Self::Host => 2,
            Self::Bond => 3,
        }
    }

    const fn option_words(self) -> usize {
        match self {
            Self::BeforeServices | Self::Host | Self::Bond => 0,
            Self::AfterRendezvous { .. } => 1,
        }
    }
}

/// Node ids of the units that a packet was at, in that order; the first ones, when there were more than it has room for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Route {
    ids: [u16; ROUTE_IDS_MAX],
    count: u8,
}

impl Route {
    /// The units so far.
    #[must_use]
    pub fn ids(&self) -> &[u16] {
        self.ids.get(..usize::from(self.count)).unwrap_or_default()
    }

    /// Appends a unit; `false` when there is no room.
    pub fn push(&mut self, node: u16) -> bool {
        let Some(slot) = self.ids.get_mut(usize::from(self.count)) else { return false };
        *slot = node;
        self.count += 1;
        true
    }
}

/// L1 and L2 of one datagram between units.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Encapsulation {
    /// Node id of the unit that gets the datagram (L1).
    pub target: u16,
    /// Node id of the dispatcher that took the frame in or shall send it out, below 4,096 (L1, and SNODE of L2).
    pub dispatcher: u16,
    /// Number of the shared interface, unique in the cluster (IFID).
    pub interface: u8,
    /// Why it is handed over (TYPE, HANDOFF TYPE).
    pub handoff: Handoff,
    /// Where its processing resumes (HOOK).
    pub hook: Hook,
    /// Table within the hook, below 16; 0 where the hook has only one (TABLE).
    pub table: u8,
    /// Parity of the era of the table by which it was sent (ERA).
    pub odd_era: bool,
    /// Times that it may still be sent on to another unit. 0 is written, but never read: such a packet is dropped (TTL).
    pub ttl: u8,
    /// Tag control information of the VLAN tag that the frame had outside (L1).
    pub vlan: Option<u16>,
    /// Route so far, if it is recorded (TRR).
    pub route: Option<Route>,
    /// Offload header of a super-packet, or of one whose checksum is partial; offsets count from the inner IP header. `None`:
    /// the packet is one, and complete.
    pub offload: Option<VirtioNetHeader>,
}

impl Encapsulation {
    /// Headers for a packet that goes to a unit for a visit, to be processed from the beginning.
    #[must_use]
    pub const fn of_visit(target: u16, interface: u8, visit: &UnitVisit) -> Self {
        let handoff = match visit.arrival {
            Arrival::Outside => Handoff::Dispatch,
            Arrival::Punted => Handoff::Punt,
            Arrival::Unclaimed => Handoff::Unclaimed,
        };
        Self {
            target,
            dispatcher: visit.dispatcher,
            interface,
            handoff,
            hook: Hook::BeforeServices,
            table: 0,
            odd_era: visit.odd_era,
            ttl: visit.ttl,
            vlan: None,
            route: None,
            offload: None,
        }
    }

    /// The visit of a packet that is here to be processed. `None`: it is here for something else.
    #[must_use]
    pub const fn visit(&self) -> Option<UnitVisit> {
        let arrival = match self.handoff {
            Handoff::Dispatch => Arrival::Outside,
            Handoff::Punt => Arrival::Punted,
            Handoff::Unclaimed => Arrival::Unclaimed,
            Handoff::Broadcast | Handoff::Reply | Handoff::Resolve { .. } | Handoff::Trace => return None,
        };
        let Self { ttl, odd_era, dispatcher, .. } = *self;
        Some(UnitVisit { arrival, ttl, odd_era, dispatcher })
    }

    /// Length of both headers, bytes: up to the inner frame.
    #[inline]
    #[must_use]
    pub const fn bytes(&self) -> usize {
        L1_BYTES + 4 + 4 * self.words()
    }

    /// Node ids that a recorded route has room for, beside the other options. The room is there from the start, so that the
    /// packet does not grow on its way.
    #[inline]
    #[must_use]
    pub const fn route_ids_max(&self) -> usize {
        let left = OPTION_WORDS_MAX - self.handoff.option_words() - self.hook.option_words();
        2 * if left < ROUTE_WORDS_MAX { left } else { ROUTE_WORDS_MAX }
    }

    /// Records that the packet was at a unit, if the route is recorded and not full.
    pub fn record(&mut self, node: u16) {
        let ids_max = self.route_ids_max();
        if let Some(route) = self.route.as_mut().filter(|route| route.ids().len() < ids_max) {
            route.push(node);
        }
    }

    /// Writes both headers to the start of `room` and returns their length. 0, and nothing is written: `room` is shorter.
    #[inline]
    pub fn write(&self, room: &mut [u8]) -> usize {
        let bytes = self.bytes();
        let Some(room) = room.get_mut(..bytes) else { return 0 };
        room.fill(0);
        let recorded = self.route.map_or(0, |route| route.ids().len().min(self.route_ids_max()));
        self.l1().write(room);
        let (first, second) = self.fixed_words(recorded);
        put_u32(room, L1_BYTES, first);
        put_u32(room, L1_BYTES + 4, second);
        let mut at = ENCAPSULATION_BYTES_MIN;
        if let Hook::AfterRendezvous { src_port, dst_port } = self.hook {
            put_u16(room, at, src_port);
            put_u16(room, at + 2, dst_port);
            at += 4;
        }
        if let Handoff::Resolve { next_hop } = self.handoff {
            at += match next_hop {
                IpAddr::V4(address) => put(room, at, &address.octets()),
                IpAddr::V6(address) => put(room, at, &address.octets()),
            };
        }
        if let Some(offload) = &self.offload {
            at += put(room, at, &offload_words(offload));
        }
        let route = self.route.unwrap_or_default();
        for (place, id) in route.ids().iter().take(recorded).enumerate() {
            put_u16(room, at + 2 * place, *id);
        }
        bytes
    }

    /// Reads both headers at the start of a UDP payload, and finds the inner frame behind them.
    ///
    /// # Errors
    /// [`DropReason::BusTooShort`]: it ends in a header, before HDR SIZE says, or within the inner Ethernet header.
    /// [`DropReason::BusVersion`]: another version or TYPE. [`DropReason::BusUnknownHandoff`]: HANDOFF TYPE or HOOK.
    /// [`DropReason::BusMalformed`]: fields contradict each other, or it is a fragment ([`fragment::is_fragment`]).
    /// [`DropReason::BusTtlExpired`]: TTL is 0.
    #[inline]
    pub fn parse(datagram: &[u8]) -> Result<(Self, &[u8]), DropReason> {
        let l1 = L1::parse(datagram)?;
        let (Some(first), Some(second)) = (word_at(datagram, 0), word_at(datagram, 1)) else {
            return Err(DropReason::BusTooShort);
        };
        let kind = field(first, 28, 4);
        if kind > 1 {
            return Err(DropReason::BusVersion);
        }
        let words = field(first, 22, 6) as usize;
        let end = L1_BYTES + 4 + 4 * words;
        let frame = datagram.get(end..).filter(|frame| frame.len() >= ETHERNET_BYTES);
        let frame = frame.ok_or(DropReason::BusTooShort)?;
        let header = datagram.get(..end).unwrap_or_default();
        // Whatever is here twice has to agree: the checksum around it may be left out.
        let dispatcher = field(first, 8, 12) as u16;
        let number = field(second, 20, 4);
        if l1.fragment
            || dispatcher != l1.dispatcher
            || (number != 0) != (kind == 1)
            || second & RESERVED != 0
        {
            return Err(DropReason::BusMalformed);
        }
        let ttl = field(second, 24, 8) as u8;
        if ttl == 0 {
            return Err(DropReason::BusTtlExpired);
        }
        let mut encapsulation = Self {
            target: l1.target,
            dispatcher,
            interface: field(first, 0, 8) as u8,
            handoff: Handoff::Dispatch,
            hook: Hook::BeforeServices,
            table: field(second, 12, 4) as u8,
            odd_era: field(first, 20, 1) == 1,
            ttl,
            vlan: l1.vlan,
            route: None,
            offload: None,
        };
        let mut options = encapsulation.read_options(second, header)?;
        if second & OFFLOADED != 0 {
            let words = array_at(header, options).ok_or(DropReason::BusMalformed)?;
            encapsulation.offload = Some(read_offload(&words)?);
            options += 4 * OFFLOAD_WORDS;
        }
        let recorded = field(second, 8, 4) as usize;
        let is_recorded = field(first, 21, 1) == 1;
        let needed = if is_recorded { 2 * encapsulation.route_ids_max() } else { 0 };
        if recorded * 2 > needed || header.len() < options + needed {
            return Err(DropReason::BusMalformed);
        }
        if is_recorded {
            encapsulation.route = Some(read_route(header, options, recorded));
        }
        Ok((encapsulation, frame))
    }

    /// Reads HANDOFF TYPE and HOOK with what they have in option words; returns where the next option would stand.
    #[inline]
    fn read_options(&mut self, second: u32, header: &[u8]) -> Result<usize, DropReason> {
        let mut at = ENCAPSULATION_BYTES_MIN;
        self.hook = match field(second, 16, 4) {
            0 => Hook::BeforeServices,
            1 => {
                let [a, b, c, d] = array_at(header, at).ok_or(DropReason::BusMalformed)?;
                at += 4;
                let (src_port, dst_port) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
                Hook::AfterRendezvous { src_port, dst_port }
            }
            2 => Hook::Host,
            3 => Hook::Bond,
            _ => return Err(DropReason::BusUnknownHandoff),
        };
        let is_v6 = second & NEXT_HOP_V6 != 0;
        self.handoff = match field(second, 20, 4) {
            0 => Handoff::Dispatch,
            1 => Handoff::Punt,
            2 => Handoff::Unclaimed,
            3 => Handoff::Broadcast,
            4 => Handoff::Reply,
            5 => {
                let next_hop = if is_v6 {
                    array_at(header, at).map(|octets: [u8; 16]| Ipv6Addr::from(octets).into())
                } else {
                    array_at(header, at).map(|octets: [u8; 4]| Ipv4Addr::from(octets).into())
                };
                Handoff::Resolve { next_hop: next_hop.ok_or(DropReason::BusMalformed)? }
            }
            6 => Handoff::Trace,
            _ => return Err(DropReason::BusUnknownHandoff),
        };
        if is_v6 && !matches!(self.handoff, Handoff::Resolve { .. }) {
            return Err(DropReason::BusMalformed);
        }
        Ok(at + 4 * self.handoff.option_words())
    }

    #[inline]
    const fn l1(&self) -> L1 {
        let Self { target, dispatcher, vlan, .. } = *self;
        L1 { target, dispatcher, vlan, fragment: false }
    }

    /// Words of L2 behind its first: HDR SIZE.
    #[inline]
    const fn words(&self) -> usize {
        let route = if self.route.is_some() { self.route_ids_max() / 2 } else { 0 };
        let offload = if self.offload.is_some() { OFFLOAD_WORDS } else { 0 };
        1 + self.handoff.option_words() + self.hook.option_words() + offload + route
    }

    /// The two words that every L2 has.
    #[inline]
    const fn fixed_words(&self, recorded: usize) -> (u32, u32) {
        let number = self.handoff.number() as u32;
        let kind = (number != 0) as u32;
        let is_v6 = matches!(self.handoff, Handoff::Resolve { next_hop: IpAddr::V6(_) });
        let first = kind << 28
            | (self.words() as u32) << 22
            | (self.route.is_some() as u32) << 21
            | (self.odd_era as u32) << 20
            | ((self.dispatcher & DISPATCHER_MASK) as u32) << 8
            | self.interface as u32;
        let second = (self.ttl as u32) << 24
            | number << 20
            | (self.hook.number() as u32) << 16
            | ((self.table & 0x0f) as u32) << 12
            | (recorded as u32) << 8
            | if self.offload.is_some() { OFFLOADED } else { 0 }
            | if is_v6 { NEXT_HOP_V6 } else { 0 };
        (first, second)
    }
}

/// The header that each datagram begins with, fragments too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct L1 {
    target: u16,
    dispatcher: u16,
    vlan: Option<u16>,
    fragment: bool,
}

impl L1 {
    #[inline]
    fn parse(datagram: &[u8]) -> Result<Self, DropReason> {
        let Some([first, low, t0, t1, v0, v1]) = array_at::<L1_BYTES>(datagram, 0) else {
            return Err(DropReason::BusTooShort);
        };
        if first >> 6 != BUS_VERSION {
            return Err(DropReason::BusVersion);
        }
        let tag = u16::from_be_bytes([v0, v1]);
        let is_tagged = first & VLAN_BIT != 0;
        if !is_tagged && tag != 0 {
            return Err(DropReason::BusMalformed);
        }
        Ok(Self {
            target: u16::from_be_bytes([t0, t1]),
            dispatcher: u16::from_be_bytes([first, low]) & DISPATCHER_MASK,
            vlan: is_tagged.then_some(tag),
            fragment: first & FRAGMENT_BIT != 0,
        })
    }

    #[inline]
    fn write(&self, room: &mut [u8]) {
        let fragment = if self.fragment { FRAGMENT_BIT } else { 0 };
        let vlan = if self.vlan.is_some() { VLAN_BIT } else { 0 };
        let flags = BUS_VERSION << 6 | fragment | vlan;
        put_u16(room, 0, u16::from(flags) << 8 | self.dispatcher & DISPATCHER_MASK);
        put_u16(room, 2, self.target);
        put_u16(room, 4, self.vlan.unwrap_or(0));
    }
}

/// A word of L2.
#[inline]
fn word_at(datagram: &[u8], word: usize) -> Option<u32> {
    packet::u32_at(datagram, L1_BYTES + 4 * word)
}

/// `bits` bits of a word, the lowest of them at `from` above the word's lowest.
#[inline]
const fn field(word: u32, from: u32, bits: u32) -> u32 {
    word >> from & ((1 << bits) - 1)
}

/// Copies some bytes to their place; returns how many.
#[inline]
fn put(room: &mut [u8], at: usize, bytes: &[u8]) -> usize {
    if let Some(room) = room.get_mut(at..at + bytes.len()) {
        room.copy_from_slice(bytes);
    }
    bytes.len()
}

/// An offload header as the option words have it: virtio's fields, big endian, and two bytes of zero.
fn offload_words(offload: &VirtioNetHeader) -> [u8; 4 * OFFLOAD_WORDS] {
    let mut words = [0; 4 * OFFLOAD_WORDS];
    words[..2].copy_from_slice(&[offload.flags, offload.gso_type]);
    let fields = [offload.hdr_len, offload.gso_size, offload.csum_start, offload.csum_offset];
    for (place, field) in fields.into_iter().enumerate() {
        put_u16(&mut words, 2 + 2 * place, field);
    }
    words
}

fn read_offload(words: &[u8; 4 * OFFLOAD_WORDS]) -> Result<VirtioNetHeader, DropReason> {
    let [flags, gso_type, fields @ .., 0, 0] = *words else { return Err(DropReason::BusMalformed) };
    let field = |place: usize| u16_at(&fields, 2 * place).unwrap_or(0);
    let [hdr_len, gso_size, csum_start, csum_offset] = [0, 1, 2, 3].map(field);
    Ok(VirtioNetHeader { flags, gso_type, hdr_len, gso_size, csum_start, csum_offset })
}

fn read_route(header: &[u8], at: usize, count: usize) -> Route {
    let mut route = Route::default();
    for place in 0..count.min(ROUTE_IDS_MAX) {
        route.push(u16_at(header, at + 2 * place).unwrap_or(0));
    }
    route
}
