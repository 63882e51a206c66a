//! ICMP redirects: a host whose packets leave by the interface that they came in by is told the shorter way
//! (RFC 1812 §5.2.7.2, RFC 4861 §8.2). Once per flow, within the limit of all answers; the packet goes on in any case.

use std::net::IpAddr;

use packet::vnet::VirtioNetHeader;

use super::context::PacketContext;
use super::{ETHERNET_BYTES, Frame, Output, Services};
use crate::icmp::{self, ANSWER_BYTES_MAX};
use crate::spec::LinkSpec;

impl Services {
    /// Tells the sender of a packet that `neighbor` is on its own network, if both are.
    pub(super) fn redirect(
        &mut self,
        packet: &PacketContext,
        frame: &Frame<'_>,
        neighbor: IpAddr,
        out: &mut impl Output,
    ) -> Option<()> {
        let header = &packet.header;
        let own = self.gateway_of(packet, neighbor)?;
        if !self.limiter.allow(packet.now_ns) {
            return None;
        }
        let mut buffer = [0; ETHERNET_BYTES + ANSWER_BYTES_MAX];
        let room = buffer.get_mut(ETHERNET_BYTES..)?;
        let length = icmp::redirect(room, frame.packet(), header, neighbor, own)?;
        let bytes = buffer.get_mut(..ETHERNET_BYTES + length)?;
        if let Some(outcome) = self.address_back(packet, frame, bytes) {
            self.counters.answers += 1;
            out.emit(outcome, None, &VirtioNetHeader::default(), bytes);
        }
        Some(())
    }

    /// Our address that the sender has as its router, if the sender and the next hop are on one network of ours.
    fn gateway_of(&self, packet: &PacketContext, neighbor: IpAddr) -> Option<IpAddr> {
        let src = packet.header.src;
        let interface = self.routing.policy.interface(packet.ingress.interface()?)?;
        // On a point-to-point link nobody reaches anybody but us.
        let LinkSpec::Ethernet { .. } = interface.link else { return None };
        let nets = || interface.addresses.iter();
        let shared = |net: &&ipnet::IpNet| net.contains(&src) && net.contains(&neighbor);
        match neighbor {
            IpAddr::V4(_) => nets().find(shared).map(ipnet::IpNet::addr),
            IpAddr::V6(next) => {
                // A router is named by its link-local address only, and is one itself by its own (RFC 4861 §4.5).
                let router = neighbor != packet.header.dst;
                let near = nets().any(|net| net.contains(&src));
                let fits = if router {
                    next.is_unicast_link_local() && near
                } else {
                    nets().any(|net| shared(&net))
                };
                let link_local =
                    |address: &IpAddr| matches!(address, IpAddr::V6(own) if own.is_unicast_link_local());
                nets().map(ipnet::IpNet::addr).find(link_local).filter(|_| fits)
            }
        }
    }
}
