//! Ethernet frames: header, VLAN tags, the flow that a frame belongs to, and neighbor resolution inside (row T14).
//!
//! [`EthernetHeader::parse`] reads a frame as it is on the wire without its check sequence: destination, source, up to two
//! VLAN tags (IEEE 802.1Q, 802.1ad), EtherType. [`EthernetFlow::of`] tells by what a frame is given a core:
//!
//! * an IP packet between two stations: its own flow key, so that both directions and all VLANs of a flow meet;
//! * what many hear or what resolves neighbors (group destinations, ARP, neighbor discovery): one key for all of it, so
//!   that one core of a node counts and answers it;
//! * everything else: its pair of stations and its VLAN.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::drop_reason::DropReason;
use crate::flow::FlowKey;
use crate::ip::{IPV6_HEADER_BYTES, IpHeader, PROTOCOL_ICMPV6};
use crate::{array_at, checksum, put_u16, u16_at};

/// Bytes of a header without tags.
pub const ETHERNET_HEADER_BYTES: usize = 14;
/// Bytes of a VLAN tag.
pub const VLAN_TAG_BYTES: usize = 4;
/// Tags that are read; those behind them are payload.
pub const VLAN_TAGS_MAX: usize = 2;
/// Bytes of the shortest frame on a cable, without check sequence.
pub const FRAME_BYTES_MIN: usize = 60;

const ETHER_TYPE_IPV4: u16 = 0x0800;
const ETHER_TYPE_ARP: u16 = 0x0806;
const ETHER_TYPE_IPV6: u16 = 0x86dd;
const ETHER_TYPE_VLAN: u16 = 0x8100;
const ETHER_TYPES_OUTER: [u16; 2] = [0x88a8, 0x9100];
/// Protocol number of Ethernet inside IP (RFC 8986): no packet that has a flow key of its own carries it here.
const PROTOCOL_ETHERNET: u8 = 143;
/// Message types of neighbor discovery (RFC 4861).
const ND_FIRST: u8 = 133;
const ND_SOLICITATION: u8 = 135;
const ND_ADVERTISEMENT: u8 = 136;
const ND_LAST: u8 = 137;
/// Bytes of a solicitation or advertisement without options.
const ND_BYTES: usize = 24;
/// Bytes of ARP for IPv4 over Ethernet.
const ARP_BYTES: usize = 28;

/// A hardware address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(
    /// In the order of transmission.
    pub [u8; 6],
);

impl Mac {
    /// Everybody.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Of many stations, or all.
    #[inline]
    #[must_use]
    pub const fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// Whether a station can have it.
    #[inline]
    #[must_use]
    pub fn is_station(self) -> bool {
        !self.is_group() && self.0 != [0; 6]
    }

    /// 01:80:c2:00:00:00 to 0f: spanning tree, link aggregation, pause. No bridge passes them on (IEEE 802.1D 7.12.6).
    #[inline]
    #[must_use]
    pub const fn is_link_local(self) -> bool {
        matches!(self.0, [0x01, 0x80, 0xc2, 0, 0, 0x00..=0x0f])
    }

    fn as_address(self) -> IpAddr {
        let [a, b, c, d, e, f] = self.0;
        Ipv6Addr::from(u128::from(u64::from_be_bytes([0, 0, a, b, c, d, e, f]))).into()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(out, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

/// VLAN ids of a frame, outer and inner; zero for none. A tag that carries a priority only (id 0) counts as none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vlan(
    /// Outer id × 4,096 + inner id.
    pub u32,
);

/// The header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EthernetHeader {
    /// Destination.
    pub dst: Mac,
    /// Source.
    pub src: Mac,
    /// VLAN ids.
    pub vlan: Vlan,
    /// EtherType behind the tags, or the length of an IEEE 802.3 frame.
    pub ether_type: u16,
    /// Where the payload begins.
    pub payload_at: usize,
}

impl EthernetHeader {
    /// Reads the header.
    ///
    /// # Errors
    /// `EthernetMalformed`: the frame ends before its payload begins.
    #[inline]
    pub fn parse(frame: &[u8]) -> Result<Self, DropReason> {
        const CUT: DropReason = DropReason::EthernetMalformed;
        let dst = Mac(array_at(frame, 0).ok_or(CUT)?);
        let src = Mac(array_at(frame, 6).ok_or(CUT)?);
        let (mut at, mut vlan) = (12, 0);
        let mut ether_type = u16_at(frame, at).ok_or(CUT)?;
        for _ in 0..VLAN_TAGS_MAX {
            if ether_type != ETHER_TYPE_VLAN && !ETHER_TYPES_OUTER.contains(&ether_type) {
                break;
            }
            vlan = vlan << 12 | u32::from(u16_at(frame, at + 2).ok_or(CUT)? & 0x0fff);
            at += VLAN_TAG_BYTES;
            ether_type = u16_at(frame, at).ok_or(CUT)?;
        }
        Ok(Self { dst, src, vlan: Vlan(vlan), ether_type, payload_at: at + 2 })
    }

    /// Where an IP packet begins, by the EtherType.
    #[inline]
    #[must_use]
    pub fn ip_at(&self) -> Option<usize> {
        matches!(self.ether_type, ETHER_TYPE_IPV4 | ETHER_TYPE_IPV6).then_some(self.payload_at)
    }
}

/// By what a frame is given a core, and what its queue wants to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EthernetFlow {
    /// Flow key.
    pub key: FlowKey,
    /// DSCP of the packet inside, where the flow is that packet's; else zero.
    pub dscp: u8,
    /// Its congestion can be marked instead of a drop.
    pub ecn_capable: bool,
}

impl EthernetFlow {
    /// Key of all that many hear and that resolves neighbors.
    pub const SHARED: FlowKey = FlowKey {
        src: IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        dst: IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        src_port: 0,
        dst_port: 0,
        protocol: PROTOCOL_ETHERNET,
    };

    /// Of a frame with this header.
    #[must_use]
    pub fn of(header: &EthernetHeader, frame: &[u8]) -> Self {
        let shared = Self { key: Self::SHARED, dscp: 0, ecn_capable: false };
        let payload = frame.get(header.payload_at..).unwrap_or_default();
        if let Some(ip) = header.ip_at().and_then(|_| IpHeader::parse(payload).ok()) {
            let ecn_capable = ip.ecn != 0;
            if header.dst.is_group() || is_discovery(&ip, payload) {
                return Self { ecn_capable, ..shared };
            }
            return Self { key: FlowKey::of_parsed(&ip, payload), dscp: ip.dscp, ecn_capable };
        }
        if header.dst.is_group() || header.ether_type == ETHER_TYPE_ARP {
            return shared;
        }
        let vlan = header.vlan.0 as u16;
        let key = FlowKey {
            src: header.src.as_address(),
            dst: header.dst.as_address(),
            src_port: vlan,
            dst_port: vlan,
            protocol: PROTOCOL_ETHERNET,
        };
        Self { key, ..shared }
    }
}

/// Neighbor discovery, which never passes a router: its hop limit is 255.
fn is_discovery(ip: &IpHeader, packet: &[u8]) -> bool {
    ip.version == 6
        && ip.protocol == PROTOCOL_ICMPV6
        && !ip.is_fragmented()
        && ip.ttl == 255
        && ip.payload(packet).first().is_some_and(|kind| (ND_FIRST..=ND_LAST).contains(kind))
}

/// ARP (RFC 826) or neighbor discovery (RFC 4861), as far as it tells or asks who has an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resolution {
    /// `address` is at `mac`, as the frame says of its sender; the flag tells whether that is a router, if that is known.
    pub tells: Option<(IpAddr, Mac, Option<bool>)>,
    /// Somebody asks for this address, and may be answered: no probe for duplicates, no announcement, not sent to one
    /// station to see whether that is still there.
    pub asks: Option<IpAddr>,
    /// IPv6 address to which an answer goes.
    answer_to: Option<Ipv6Addr>,
}

impl Resolution {
    /// Reads what a frame tells and asks; `None` for all that is neither, or that contradicts itself.
    #[must_use]
    pub fn of(header: &EthernetHeader, frame: &[u8]) -> Option<Self> {
        let payload = frame.get(header.payload_at..)?;
        match header.ether_type {
            ETHER_TYPE_ARP => Self::of_arp(header, payload),
            ETHER_TYPE_IPV6 => Self::of_discovery(header, payload),
            _ => None,
        }
    }

    fn of_arp(header: &EthernetHeader, arp: &[u8]) -> Option<Self> {
        // Hardware Ethernet, protocol IPv4, lengths 6 and 4; then who says it.
        let sender = Mac(array_at(arp, 8)?);
        if array_at(arp, 0)? != [0, 1, 8, 0, 6, 4] || arp.len() < ARP_BYTES || sender != header.src {
            return None;
        }
        let operation = u16_at(arp, 6)?;
        let (from, to) = (Ipv4Addr::from(array_at::<4>(arp, 14)?), Ipv4Addr::from(array_at::<4>(arp, 24)?));
        let tells = (!from.is_unspecified() && sender.is_station()).then_some((from.into(), sender, None));
        let asks = operation == 1 && tells.is_some() && from != to && header.dst == Mac::BROADCAST;
        matches!(operation, 1 | 2).then_some(Self { tells, asks: asks.then_some(to.into()), answer_to: None })
    }

    fn of_discovery(header: &EthernetHeader, packet: &[u8]) -> Option<Self> {
        let ip = IpHeader::parse(packet).ok()?;
        let message = ip.payload(packet);
        if !is_discovery(&ip, packet)
            || message.len() < ND_BYTES
            || !checksum::verify_upper(ip.src, ip.dst, ip.protocol, message)
        {
            return None;
        }
        let IpAddr::V6(from) = ip.src else { return None };
        let target = Ipv6Addr::from(array_at::<16>(message, 8)?);
        match message[0] {
            ND_SOLICITATION => {
                let told = option_of(message, 1).filter(|mac| *mac == header.src);
                let tells = told.filter(|_| !from.is_unspecified()).map(|mac| (from.into(), mac, None));
                let asks = tells.is_some() && from != target && header.dst.is_group();
                Some(Self { tells, asks: asks.then_some(target.into()), answer_to: Some(from) })
            }
            ND_ADVERTISEMENT => {
                let told = option_of(message, 2).filter(|mac| *mac == header.src);
                let router = message[4] & 0x80 != 0;
                let tells = told.map(|mac| (target.into(), mac, Some(router)));
                Some(Self { tells, asks: None, answer_to: None })
            }
            _ => None,
        }
    }

    /// The frame by which the owner of the address would answer the question in `asked`; `None` where nothing was asked,
    /// or where an advertisement would have to say whether that is a router and nobody knows.
    #[must_use]
    pub fn answer(
        &self,
        header: &EthernetHeader,
        asked: &[u8],
        mac: Mac,
        router: Option<bool>,
    ) -> Option<Vec<u8>> {
        let mut frame = Vec::with_capacity(FRAME_BYTES_MIN + 64);
        frame.extend(header.src.0);
        frame.extend(mac.0);
        // Tags and EtherType as they came.
        frame.extend(asked.get(12..header.payload_at)?);
        match self.asks? {
            IpAddr::V4(address) => {
                let (sender, from) = (
                    array_at::<6>(asked, header.payload_at + 8)?,
                    array_at::<4>(asked, header.payload_at + 14)?,
                );
                frame.extend([0, 1, 8, 0, 6, 4, 0, 2]);
                frame.extend(mac.0);
                frame.extend(address.octets());
                frame.extend(sender);
                frame.extend(from);
            }
            IpAddr::V6(address) => advertisement(&mut frame, address, self.answer_to?, mac, router?),
        }
        frame.resize(frame.len().max(FRAME_BYTES_MIN), 0);
        Some(frame)
    }
}

/// Hardware address in an option of a discovery message.
fn option_of(message: &[u8], wanted: u8) -> Option<Mac> {
    let mut rest = message.get(ND_BYTES..)?;
    while let [kind, units, ..] = *rest {
        if kind == wanted && units == 1 {
            return array_at(rest, 2).map(Mac);
        }
        // An option without a length ends the search.
        rest = rest.get(usize::from(units) * 8..).filter(|_| units > 0)?;
    }
    None
}

/// A solicited advertisement without the override flag: who knows better keeps that.
fn advertisement(frame: &mut Vec<u8>, address: Ipv6Addr, to: Ipv6Addr, mac: Mac, router: bool) {
    let mut message = vec![ND_ADVERTISEMENT, 0, 0, 0, if router { 0xc0 } else { 0x40 }, 0, 0, 0];
    message.extend(address.octets());
    message.extend([2, 1]);
    message.extend(mac.0);
    let pseudo = checksum::pseudo_header_v6(&address, &to, PROTOCOL_ICMPV6, message.len() as u32);
    let sum = checksum::finish(checksum::sum(&message, pseudo));
    put_u16(&mut message, 2, sum);
    let mut header = [0; IPV6_HEADER_BYTES];
    header[0] = 0x60;
    put_u16(&mut header, 4, message.len() as u16);
    header[6] = PROTOCOL_ICMPV6;
    header[7] = 255;
    frame.extend(header.get(..8).unwrap_or_default());
    frame.extend(address.octets());
    frame.extend(to.octets());
    frame.extend(message);
}

#[cfg(test)]
mod tests;
