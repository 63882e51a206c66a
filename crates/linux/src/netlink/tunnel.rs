//! Tunnels of the host itself by protocols that have no ports (GRE, IPIP, 6in4, ESP): who translates addresses must not give theirs to
//! others towards the same remote end.

use std::net::IpAddr;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoData, InfoGre, InfoGre6, InfoIpTunnel, InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};

use packet::ip::{PROTOCOL_GRE, PROTOCOL_IPV4, PROTOCOL_IPV6};

use super::Netlink;
use crate::Result;

/// Of more devices the rest is not looked at.
const TUNNELS_MAX: usize = 4096;

/// A tunnel of the host, as its packets outside look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tunnel {
    /// IP protocol.
    pub protocol: u8,
    /// Address of the host; `None`: any.
    pub local: Option<IpAddr>,
    /// Address of the other end; `None`: any.
    pub remote: Option<IpAddr>,
}

impl Tunnel {
    /// One with addresses as the kernel has them, of which zeros stand for any.
    pub(super) fn of(protocol: u8, local: Option<IpAddr>, remote: Option<IpAddr>) -> Self {
        let known = |address: &IpAddr| !address.is_unspecified();
        Self { protocol, local: local.filter(known), remote: remote.filter(known) }
    }
}

impl Netlink {
    /// Tunnel devices that are switched on and have at least one end.
    ///
    /// # Errors
    /// As the kernel refuses the question.
    pub fn tunnels(&self) -> Result<Vec<Tunnel>> {
        let pick = |message| match message {
            RouteNetlinkMessage::NewLink(message) => Some(tunnels_of(&message)),
            _ => None,
        };
        let question = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let found = self.dump(&question, "list the tunnel devices", pick)?;
        Ok(found.into_iter().flatten().take(TUNNELS_MAX).collect())
    }
}

fn tunnels_of(message: &LinkMessage) -> Vec<Tunnel> {
    if !message.header.flags.contains(LinkFlags::Up) {
        return Vec::new();
    }
    let infos = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    });
    let data = infos.into_iter().flatten().find_map(|info| match info {
        LinkInfo::Data(data) => Some(data),
        _ => None,
    });
    let kind = infos.into_iter().flatten().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind),
        _ => None,
    });
    let (Some(data), Some(kind)) = (data, kind) else { return Vec::new() };
    let mut ends: [Option<IpAddr>; 2] = [None; 2];
    let protocols: &[u8] = match data {
        InfoData::GreTun(list) | InfoData::GreTap(list) | InfoData::ErSpan(list) => {
            for info in list {
                match info {
                    InfoGre::Local(address) => ends[0] = Some((*address).into()),
                    InfoGre::Remote(address) => ends[1] = Some((*address).into()),
                    _ => {}
                }
            }
            &[PROTOCOL_GRE]
        }
        InfoData::GreTun6(list) | InfoData::GreTap6(list) | InfoData::Ip6ErSpan(list) => {
            for info in list {
                match info {
                    InfoGre6::Local(address) => ends[0] = Some((*address).into()),
                    InfoGre6::Remote(address) => ends[1] = Some((*address).into()),
                    _ => {}
                }
            }
            &[PROTOCOL_GRE]
        }
        InfoData::IpTunnel(list) => {
            for info in list {
                match info {
                    InfoIpTunnel::Local(address) => ends[0] = Some(*address),
                    InfoIpTunnel::Remote(address) => ends[1] = Some(*address),
                    _ => {}
                }
            }
            // Which of both a device takes is a mode of it.
            if *kind == InfoKind::IpIp { &[PROTOCOL_IPV4] } else { &[PROTOCOL_IPV4, PROTOCOL_IPV6] }
        }
        // What has its own protocol by IPsec is among the states of that.
        _ => &[],
    };
    let [local, remote] = ends;
    let all = protocols.iter().map(|protocol| Tunnel::of(*protocol, local, remote));
    // The kernel makes a device for everything that no other one takes.
    all.filter(|tunnel| tunnel.local.is_some() || tunnel.remote.is_some()).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn device(up: bool, kind: InfoKind, data: InfoData) -> Vec<Tunnel> {
        let mut message = LinkMessage::default();
        message.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
        let infos = vec![LinkInfo::Kind(kind), LinkInfo::Data(data)];
        message.attributes.push(LinkAttribute::LinkInfo(infos));
        tunnels_of(&message)
    }

    #[test]
    fn devices_that_are_on_and_have_an_end_are_tunnels() {
        let gre = |local: &str, remote: &str| {
            let ends = [InfoGre::Local(local.parse().unwrap()), InfoGre::Remote(remote.parse().unwrap())];
            InfoData::GreTun(ends.to_vec())
        };
        let [local, remote] = ["203.0.113.1", "198.51.100.7"].map(|text| Some(text.parse().unwrap()));
        let plain = gre("203.0.113.1", "198.51.100.7");
        assert_eq!(
            device(true, InfoKind::GreTun, plain.clone()),
            [Tunnel { protocol: PROTOCOL_GRE, local, remote }]
        );
        assert_eq!(device(false, InfoKind::GreTun, plain), [], "it is off");
        let many = gre("203.0.113.1", "0.0.0.0");
        assert_eq!(
            device(true, InfoKind::GreTun, many),
            [Tunnel { protocol: PROTOCOL_GRE, local, remote: None }]
        );
        assert_eq!(device(true, InfoKind::GreTun, gre("0.0.0.0", "0.0.0.0")), [], "the kernel's own");
        let to = InfoData::IpTunnel(vec![InfoIpTunnel::Remote("198.51.100.7".parse().unwrap())]);
        assert_eq!(
            device(true, InfoKind::SitTun, to.clone()),
            [PROTOCOL_IPV4, PROTOCOL_IPV6].map(|protocol| Tunnel { protocol, local: None, remote })
        );
        assert_eq!(
            device(true, InfoKind::IpIp, to),
            [Tunnel { protocol: PROTOCOL_IPV4, local: None, remote }]
        );
        assert_eq!(device(true, InfoKind::Dummy, InfoData::Other(vec![7])), []);
    }
}
