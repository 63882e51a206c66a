//! How flows are laid out. IPv4 with translation: one cache line with both tuples, tenants and the record.

use super::record::{Direction, Record};
use super::slab::Slab;
use super::{FlowCounters, ForPacket};
use crate::rewrite::{Ends, ports};
use packet::FlowKey;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An address of one IP version, as compact as it goes.
pub(super) trait Address: Copy + Default + Eq {
    fn of(address: IpAddr) -> Option<Self>;
    fn to_ip(self) -> IpAddr;
    /// Source, destination and both ports as a packet has them.
    fn ends(src: Self, dst: Self, ports: u32) -> Ends;
}

impl Address for u32 {
    #[inline]
    fn of(address: IpAddr) -> Option<Self> {
        match address {
            IpAddr::V4(v4) => Some(v4.to_bits()),
            IpAddr::V6(_) => None,
        }
    }

    #[inline]
    fn to_ip(self) -> IpAddr {
        IpAddr::V4(Ipv4Addr::from_bits(self))
    }

    #[inline]
    fn ends(src: Self, dst: Self, ports: u32) -> Ends {
        Ends::V4([src, dst, ports])
    }
}

impl Address for [u64; 2] {
    #[inline]
    fn of(address: IpAddr) -> Option<Self> {
        match address {
            IpAddr::V4(_) => None,
            IpAddr::V6(v6) => Some([(v6.to_bits() >> 64) as u64, v6.to_bits() as u64]),
        }
    }

    #[inline]
    fn to_ip(self) -> IpAddr {
        IpAddr::V6(Ipv6Addr::from_bits(joined(self)))
    }

    #[inline]
    fn ends(src: Self, dst: Self, ports: u32) -> Ends {
        Ends::V6([joined(src), joined(dst)], ports)
    }
}

#[inline]
fn joined([high, low]: [u64; 2]) -> u128 {
    u128::from(high) << 64 | u128::from(low)
}

/// A flow key without its protocol, which is in the record.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Tuple<A> {
    src: A,
    dst: A,
    src_port: u16,
    dst_port: u16,
}

impl<A: Address> Tuple<A> {
    #[inline]
    pub(super) fn of(key: &FlowKey) -> Option<Self> {
        Some(Self {
            src: A::of(key.src)?,
            dst: A::of(key.dst)?,
            src_port: key.src_port,
            dst_port: key.dst_port,
        })
    }

    #[inline]
    fn reversed(self) -> Self {
        Self { src: self.dst, dst: self.src, src_port: self.dst_port, dst_port: self.src_port }
    }

    #[inline]
    fn key(self, protocol: u8) -> FlowKey {
        FlowKey {
            src: self.src.to_ip(),
            dst: self.dst.to_ip(),
            src_port: self.src_port,
            dst_port: self.dst_port,
            protocol,
        }
    }
}

/// A flow whose reply does not simply have its key reversed. Tuples and tenants by [`Direction`].
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
pub(super) struct Translated<A> {
    pub(super) tuples: [Tuple<A>; 2],
    pub(super) tenants: [u16; 2],
    pub(super) record: Record,
}

/// A flow whose addresses and ports stay as they are.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Plain<A> {
    pub(super) tuple: Tuple<A>,
    pub(super) tenants: [u16; 2],
    pub(super) record: Record,
}

/// Counts of a translated flow; places by [`Direction`].
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Counts {
    pub(super) bytes: [u64; 2],
    /// Low 32 bits, and 16 more.
    packets_low: [u32; 2],
    packets_high: [u16; 2],
    /// `seen` of the record it began with.
    pub(super) created: u32,
}

impl Counts {
    pub(super) fn begin(created: u32) -> Self {
        Self { created, ..Self::default() }
    }

    pub(super) fn packets(&self) -> [u64; 2] {
        let [low, high] = [self.packets_low.map(u64::from), self.packets_high.map(u64::from)];
        [high[0] << 32 | low[0], high[1] << 32 | low[1]]
    }

    #[inline]
    pub(super) fn add(&mut self, direction: Direction, packets: u32, bytes: u32) {
        let at = direction as usize;
        if let Some(sum) = self.bytes.get_mut(at) {
            *sum = sum.wrapping_add(u64::from(bytes));
        }
        if let (Some(low), Some(high)) = (self.packets_low.get_mut(at), self.packets_high.get_mut(at)) {
            let (sum, carry) = low.overflowing_add(packets);
            *low = sum;
            *high = high.wrapping_add(u16::from(carry));
        }
    }
}

impl From<&FlowCounters> for Counts {
    fn from(counters: &FlowCounters) -> Self {
        let [first, second] = counters.packets;
        Self {
            bytes: counters.bytes,
            packets_low: [first as u32, second as u32],
            packets_high: [(first >> 32) as u16, (second >> 32) as u16],
            created: counters.created,
        }
    }
}

const _: () = assert!(size_of::<Translated<u32>>() == 64 && size_of::<Translated<[u64; 2]>>() == 128);
const _: () = assert!(size_of::<Plain<u32>>() == 52 && size_of::<Plain<[u64; 2]>>() == 80);
const _: () = assert!(size_of::<Counts>() == 32);

/// Record and keys, which all flows have.
pub(super) trait Flow {
    fn record(&self) -> &Record;
    fn record_mut(&mut self) -> &mut Record;
    /// Keys and tenants of both directions.
    fn keys(&self) -> [(FlowKey, u16); 2];
}

/// Key that a packet looks for.
pub(super) struct Wanted<A> {
    pub(super) tuple: Tuple<A>,
    pub(super) protocol: u8,
    pub(super) tenant: u16,
}

impl<A: Address> Wanted<A> {
    #[inline]
    pub(super) fn of(key: &FlowKey, tenant: u16) -> Option<Self> {
        Some(Self { tuple: Tuple::of(key)?, protocol: key.protocol, tenant })
    }
}

impl<A: Address> Translated<A> {
    /// Which way the packet goes, if it is of this flow; `stored` as in the index.
    #[inline]
    pub(super) fn direction(&self, packet: &Wanted<A>, stored: Direction) -> Option<Direction> {
        let at = stored as usize;
        let same = self.tuples.get(at) == Some(&packet.tuple)
            && self.tenants.get(at) == Some(&packet.tenant)
            && self.record.protocol == packet.protocol;
        same.then_some(stored)
    }
}

impl<A: Address> Translated<A> {
    /// Data that a packet that goes this way needs.
    #[inline]
    pub(super) fn for_packet<'a>(
        &'a mut self,
        counts: &'a mut Counts,
        direction: Direction,
    ) -> ForPacket<'a> {
        let other = direction.flipped() as usize;
        let leaves_as = self
            .tuples
            .get(other)
            .map(|tuple| A::ends(tuple.dst, tuple.src, ports(tuple.dst_port, tuple.src_port)));
        ForPacket { record: &mut self.record, leaves_as, counts: Some((counts, direction)) }
    }
}

impl<A: Address> Plain<A> {
    /// Which way the packet goes, if it is of this flow. One entry of the index may stand for both directions, so both
    /// are compared.
    #[inline]
    pub(super) fn direction(&self, packet: &Wanted<A>, _: Direction) -> Option<Direction> {
        if self.record.protocol != packet.protocol {
            return None;
        }
        let [original, reply] = self.tenants;
        if self.tuple == packet.tuple && original == packet.tenant {
            Some(Direction::Original)
        } else if self.tuple.reversed() == packet.tuple && reply == packet.tenant {
            Some(Direction::Reply)
        } else {
            None
        }
    }
}

impl<A: Address> Flow for Translated<A> {
    #[inline]
    fn record(&self) -> &Record {
        &self.record
    }

    #[inline]
    fn record_mut(&mut self) -> &mut Record {
        &mut self.record
    }

    #[inline]
    fn keys(&self) -> [(FlowKey, u16); 2] {
        let [original, reply] = self.tuples.map(|tuple| tuple.key(self.record.protocol));
        [(original, self.tenants[0]), (reply, self.tenants[1])]
    }
}

impl<A: Address> Flow for Plain<A> {
    #[inline]
    fn record(&self) -> &Record {
        &self.record
    }

    #[inline]
    fn record_mut(&mut self) -> &mut Record {
        &mut self.record
    }

    #[inline]
    fn keys(&self) -> [(FlowKey, u16); 2] {
        let key = self.tuple.key(self.record.protocol);
        [(key, self.tenants[0]), (key.reversed(), self.tenants[1])]
    }
}

/// The flows of one IP version.
pub(super) struct Family<A> {
    pub(super) translated: Slab<Translated<A>, Counts>,
    pub(super) plain: Slab<Plain<A>, ()>,
}

impl<A: Address> Family<A> {
    pub(super) fn new(flows_max: usize) -> Self {
        Self { translated: Slab::new(flows_max), plain: Slab::new(flows_max) }
    }
}
