//! Path MTU over the network between units (row D11).
//!
//! A frame of a shared interface that does not fit one datagram of the bond to its data plane is not cut: a dispatcher answers
//! its sender with "too big" (RFC 1191, RFC 8201), from the shared address, as any router does. The datagrams themselves
//! always have Don't Fragment, and the bond finds out how large they may be. Where the sender cannot be told (IPv4 without
//! Don't Fragment; IPv6 of 1,280 bytes, which every network has to carry) the bond takes pieces, and so does everything that is on
//! its way between units already: nothing is lost for its size.

use std::net::IpAddr;

use cluster::encapsulation::{L1_BYTES, L2_BYTES};
use cluster::snapshot::{SharedInterface, Snapshot};
use packet::attachment::BondId;
use packet::ip::{IPV4_HEADER_BYTES, IPV6_HEADER_BYTES, PROTOCOL_TCP};
use packet::segment::{Segmenter, UDP_HEADER_BYTES, mss_clamp};
use packet::vnet::{GSO_NONE, VirtioNetHeader};
use packet::{IpHeader, put_u16};
use services::icmp::{self, ANSWER_BYTES_MAX, Limiter, Problem};
use services::pipeline::ETHERNET_BYTES;
use tunnel::forwarder::Forwarder as Tunnel;

/// Between two looks at what the bonds carry, ns.
const LOOK_NS: u64 = 100_000_000;
/// Bytes of an offload header, which a frame whose checksum is not computed has.
const OFFLOAD_BYTES: usize = 12;
/// Bytes in front of an inner IP packet and behind the outer IP header, at a dispatcher.
const FRONT_BYTES: usize = UDP_HEADER_BYTES + L1_BYTES + L2_BYTES + OFFLOAD_BYTES + ETHERNET_BYTES;
/// Least MTU of an IPv6 network (RFC 8200 §5).
const IPV6_MTU_MIN: u16 = 1_280;
/// Below that a path is broken, and nobody is told to send so little.
const IPV4_MTU_MIN: u16 = 576;
/// Answers of one core in a second.
const ANSWERS_PER_SECOND: u32 = 1_000;
/// Longest TCP packet that may be a SYN, bytes.
const SYN_BYTES_MAX: usize = 160;

/// Size of a packet that fits the bonds to all data planes: a flow may be given to any of them, and moves without its hosts.
pub(crate) struct PathMtu {
    /// Largest inner IP packet; `None`: not known.
    mtu: Option<u16>,
    looked_ns: Option<u64>,
    limiter: Limiter,
}

impl Default for PathMtu {
    fn default() -> Self {
        Self { mtu: None, looked_ns: None, limiter: Limiter::new(ANSWERS_PER_SECOND) }
    }
}

impl PathMtu {
    /// Looks at the bonds, now and then.
    pub fn follow(&mut self, now_ns: u64, snapshot: &Snapshot, bonds: &[Option<BondId>], tunnel: &Tunnel) {
        if self.looked_ns.is_some_and(|looked_ns| now_ns.saturating_sub(looked_ns) < LOOK_NS) {
            return;
        }
        let Some(own) = snapshot.own() else { return };
        self.looked_ns = Some(now_ns);
        let outer = if own.address.is_ipv4() { IPV4_HEADER_BYTES } else { IPV6_HEADER_BYTES };
        let front = u16::try_from(outer + FRONT_BYTES).unwrap_or(u16::MAX);
        let planes = snapshot.members.iter().zip(bonds).filter(|(member, _)| member.role.owns_flows());
        let mtu = |bond: Option<BondId>| tunnel.packet_capacity(bond?)?.checked_sub(front);
        self.mtu = planes.filter_map(|(_, bond)| mtu(*bond)).min();
    }

    /// Other members, or other bonds to them.
    pub fn forget(&mut self) {
        self.looked_ns = None;
    }

    /// MTU that the sender of a packet has to be told; `None`: it fits, or goes in pieces. A TCP connection that begins is told
    /// at once (RFC 6691).
    #[inline]
    pub fn exceeded(&self, offload: &VirtioNetHeader, packet: &mut [u8]) -> Option<u16> {
        let mtu = self.mtu?;
        let version = packet.first()? >> 4;
        if packet.len() <= SYN_BYTES_MAX {
            let protocol = packet.get(if version == 4 { 9 } else { 6 });
            if protocol == Some(&PROTOCOL_TCP) {
                mss_clamp(packet, mtu.max(least(version)), offload.needs_csum());
            }
            return None;
        }
        if packet.len() <= usize::from(mtu) {
            return None;
        }
        let longest = if offload.gso_type == GSO_NONE {
            packet.len()
        } else {
            Segmenter::new(offload, packet).ok()?.segment_bytes(0)
        };
        // Don't Fragment of IPv4; IPv6 routers never cut.
        let whole = version == 6 || packet.get(6).is_some_and(|flags| flags & 0x40 != 0);
        let mtu = mtu.max(least(version));
        (whole && longest > usize::from(mtu)).then_some(mtu)
    }

    /// The answer "too big" to a frame of a shared interface, as a frame.
    pub fn answer(
        &mut self,
        now_ns: u64,
        shared: &SharedInterface,
        mtu: u16,
        frame: &[u8],
    ) -> Option<TooBig> {
        let packet = frame.get(ETHERNET_BYTES..)?;
        let header = IpHeader::parse(packet).ok()?;
        let from = shared.addresses.iter().find(|address| address.is_ipv4() == header.src.is_ipv4());
        let own = |address: &IpAddr| shared.addresses.contains(address);
        // Hardware addresses of groups are nobody's question.
        if own(&header.src) || frame.first()? & 1 == 1 || !self.limiter.allow(now_ns) {
            return None;
        }
        let mut bytes = [0; ETHERNET_BYTES + ANSWER_BYTES_MAX];
        let (ethernet, room) = bytes.split_at_mut(ETHERNET_BYTES);
        let length = icmp::error(room, packet, &header, Problem::TooBig(mtu), *from?)?;
        let [to, own] = [frame.get(..6)?, frame.get(6..12)?];
        ethernet.get_mut(..6)?.copy_from_slice(own);
        ethernet.get_mut(6..12)?.copy_from_slice(to);
        put_u16(ethernet, 12, if header.version == 4 { 0x0800 } else { 0x86dd });
        Some(TooBig { bytes, length: ETHERNET_BYTES + length })
    }
}

/// Least MTU that anybody is told.
const fn least(version: u8) -> u16 {
    if version == 6 { IPV6_MTU_MIN } else { IPV4_MTU_MIN }
}

/// An answer, ready to be sent.
pub(crate) struct TooBig {
    bytes: [u8; ETHERNET_BYTES + ANSWER_BYTES_MAX],
    length: usize,
}

impl TooBig {
    /// The frame.
    pub fn frame(&mut self) -> &mut [u8] {
        self.bytes.get_mut(..self.length).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::sync::Arc;

    use cluster::snapshot::Holding;
    use packet::attachment::InterfaceId;
    use packet::{FlowKey, u16_at, u32_at};

    use super::*;

    /// UDP with so many bytes of IP packet, behind an Ethernet header.
    fn frame(from: &str, to: &str, bytes: usize) -> Vec<u8> {
        let mut packet = vec![0; bytes];
        if from.contains(':') {
            packet[..8].copy_from_slice(&[0x60, 0, 0, 0, 0, 0, 17, 64]);
            put_u16(&mut packet, 4, bytes as u16 - 40);
            packet[8..24].copy_from_slice(&from.parse::<std::net::Ipv6Addr>().unwrap().octets());
            packet[24..40].copy_from_slice(&to.parse::<std::net::Ipv6Addr>().unwrap().octets());
        } else {
            packet[..10].copy_from_slice(&[0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 17]);
            put_u16(&mut packet, 2, bytes as u16);
            packet[12..16].copy_from_slice(&from.parse::<std::net::Ipv4Addr>().unwrap().octets());
            packet[16..20].copy_from_slice(&to.parse::<std::net::Ipv4Addr>().unwrap().octets());
        }
        [&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0, 0][..], &packet].concat()
    }

    fn shared() -> SharedInterface {
        SharedInterface {
            ifid: 0,
            interface: InterfaceId(0),
            addresses: vec!["10.1.0.1".parse().unwrap(), "fd01::1".parse().unwrap()],
            dispatchers: Vec::new(),
            holding: Arc::new(Holding::new(true)),
        }
    }

    fn of(mtu: u16) -> PathMtu {
        PathMtu { mtu: Some(mtu), ..PathMtu::default() }
    }

    #[test]
    fn senders_that_forbid_to_cut_are_told_what_fits() {
        let whole = VirtioNetHeader::default();
        let exceeded = |mtu, mut frame: Vec<u8>| of(mtu).exceeded(&whole, &mut frame[ETHERNET_BYTES..]);
        let (v4, v6) = (("10.1.0.2", "10.2.0.2"), ("fd01::2", "fd02::2"));
        assert_eq!(exceeded(1_364, frame(v4.0, v4.1, 1_364)), None);
        assert_eq!(exceeded(1_364, frame(v4.0, v4.1, 1_365)), Some(1_364));
        assert_eq!(exceeded(1_364, frame(v6.0, v6.1, 1_364)), None);
        assert_eq!(exceeded(1_364, frame(v6.0, v6.1, 1_365)), Some(1_364));
        // Every IPv6 network carries this much.
        assert_eq!(exceeded(1_200, frame(v6.0, v6.1, 1_280)), None);
        assert_eq!(exceeded(1_200, frame(v6.0, v6.1, 1_281)), Some(1_280));
        let mut may_be_cut = frame(v4.0, v4.1, 1_500);
        may_be_cut[ETHERNET_BYTES + 6] = 0;
        assert_eq!(exceeded(1_364, may_be_cut), None);
        assert_eq!(
            PathMtu::default().exceeded(&whole, &mut frame(v4.0, v4.1, 1_500)[ETHERNET_BYTES..]),
            None
        );
    }

    #[test]
    fn answers_come_from_the_shared_address_with_the_mtu_and_not_too_often() {
        for (from, to, own, kind) in
            [("10.1.0.2", "10.2.0.2", "10.1.0.1", [3, 4]), ("fd01::2", "fd02::2", "fd01::1", [2, 0])]
        {
            let frame = frame(from, to, 1_500);
            let mut answer = of(1_364).answer(0, &shared(), 1_364, &frame).unwrap();
            let answer = answer.frame();
            assert_eq!((&answer[..6], &answer[6..12]), (&frame[6..12], &frame[..6]));
            let packet = &answer[ETHERNET_BYTES..];
            let key = FlowKey::of(packet).unwrap();
            let header = IpHeader::parse(packet).unwrap();
            assert_eq!((header.src, header.dst), (own.parse().unwrap(), from.parse().unwrap()), "{key:?}");
            let icmp = &packet[header.header_bytes..];
            assert_eq!(icmp[..2], kind);
            let told = if header.version == 4 { u16_at(icmp, 6).map(u32::from) } else { u32_at(icmp, 4) };
            assert_eq!(told, Some(1_364));
            let mut paths = of(1_364);
            let answers = (0..1_000).filter(|_| paths.answer(0, &shared(), 1_364, &frame).is_some()).count();
            assert!((50..200).contains(&answers), "{answers}");
        }
        // Nobody answers itself.
        assert!(of(1_364).answer(0, &shared(), 1_364, &frame("10.1.0.1", "10.2.0.2", 1_500)).is_none());
    }
}
