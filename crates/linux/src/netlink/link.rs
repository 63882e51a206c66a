//! Interfaces.

use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoPortKind, InfoVeth, InfoVrf, LinkAttribute,
    LinkFlags, LinkInfo, LinkMessage,
};

use super::{Existing, Netlink};
use crate::Result;
use crate::error::Context;
use crate::link_layer::LinkLayer;
use crate::sys::interface_name;

/// An interface as it is right now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Number of the interface in its namespace.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Kind of device (`veth`, `tun`, `wireguard`…); `None` for hardware.
    pub kind: Option<String>,
    /// Switched on by the administrator.
    pub up: bool,
    /// A cable, an association or a peer is there.
    pub carrier: bool,
    /// Largest IP packet in bytes.
    pub mtu: u32,
    /// Hardware address of Ethernet-like interfaces.
    pub mac: Option<[u8; 6]>,
    /// Header of its packets; `None`: loopback, and what else cannot carry packets of others.
    pub layer: Option<LinkLayer>,
    /// Number of the interface that it lies on (macvlan, VLAN), or that is its other end (veth), if that is in this namespace.
    pub lower: Option<u32>,
    /// The loopback interface.
    pub loopback: bool,
    /// Has one peer and no neighbors to resolve (TUN, PPP).
    pub point_to_point: bool,
    /// Packets its transmit queue holds.
    pub tx_queue_len: u32,
    /// Bytes of the largest super-packet it accepts.
    pub gso_max_bytes: u32,
    /// Index of the bridge, bond or VRF that it belongs to.
    pub controller: Option<u32>,
    /// A VRF device: its routing table.
    pub vrf_table: Option<u32>,
}

impl Link {
    pub(super) fn from_message(message: &LinkMessage) -> Link {
        let flags = message.header.flags;
        let point_to_point = flags.contains(LinkFlags::Pointopoint);
        let mut link = Link {
            index: message.header.index,
            name: String::new(),
            kind: None,
            up: flags.contains(LinkFlags::Up),
            carrier: flags.contains(LinkFlags::LowerUp),
            mtu: 0,
            mac: None,
            layer: LinkLayer::of_type(message.header.link_layer_type.into(), point_to_point),
            lower: None,
            loopback: flags.contains(LinkFlags::Loopback),
            point_to_point,
            tx_queue_len: 0,
            gso_max_bytes: 0,
            controller: None,
            vrf_table: None,
        };
        let mut elsewhere = false;
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::LinkNetNsId(_) => elsewhere = true,
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::Address(bytes) => link.mac = bytes.as_slice().try_into().ok(),
                LinkAttribute::Link(index) => link.lower = (*index > 0).then_some(*index),
                LinkAttribute::TxQueueLen(packets) => link.tx_queue_len = *packets,
                LinkAttribute::GsoMaxSize(bytes) => link.gso_max_bytes = *bytes,
                LinkAttribute::Controller(index) => link.controller = (*index > 0).then_some(*index),
                LinkAttribute::LinkInfo(infos) => {
                    link.vrf_table = infos.iter().find_map(vrf_table);
                    link.kind = infos.iter().find_map(|info| match info {
                        LinkInfo::Kind(kind) => Some(kind.to_string()),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        link.lower = link.lower.filter(|_| !elsewhere);
        link
    }
}

/// The table of a VRF device.
fn vrf_table(info: &LinkInfo) -> Option<u32> {
    let LinkInfo::Data(InfoData::Vrf(list)) = info else { return None };
    list.iter().find_map(|info| match info {
        InfoVrf::TableId(table) => Some(*table),
        _ => None,
    })
}

fn pick(message: RouteNetlinkMessage) -> Option<Link> {
    match message {
        RouteNetlinkMessage::NewLink(message) => Some(Link::from_message(&message)),
        _ => None,
    }
}

impl Netlink {
    /// All interfaces of the namespace.
    pub fn links(&self) -> Result<Vec<Link>> {
        self.dump(&RouteNetlinkMessage::GetLink(LinkMessage::default()), "list the interfaces", pick)
    }

    /// The interface of this name, if there is one.
    pub fn link(&self, name: &str) -> Result<Option<Link>> {
        interface_name(name).context("look up an interface")?;
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        self.get(RouteNetlinkMessage::GetLink(message), || format!("look up the interface {name}"), pick)
    }

    /// The interface of this index, if there is one.
    pub fn link_by_index(&self, index: u32) -> Result<Option<Link>> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        self.get(RouteNetlinkMessage::GetLink(message), || format!("look up interface {index}"), pick)
    }

    /// Switches an interface on or off.
    pub fn set_up(&self, index: u32, up: bool) -> Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
        message.header.change_mask = LinkFlags::Up;
        let state = if up { "on" } else { "off" };
        self.change(RouteNetlinkMessage::SetLink(message), Existing::Needed, || {
            format!("switch interface {index} {state}")
        })
    }

    /// Sets the largest IP packet in bytes.
    pub fn set_mtu(&self, index: u32, mtu_bytes: u32) -> Result<()> {
        self.set(index, LinkAttribute::Mtu(mtu_bytes), || format!("MTU {mtu_bytes}"))
    }

    /// Sets how many packets the transmit queue holds.
    pub fn set_tx_queue_len(&self, index: u32, packets: u32) -> Result<()> {
        self.set(index, LinkAttribute::TxQueueLen(packets), || format!("transmit queue {packets}"))
    }

    /// Sets the bytes of the largest super-packet the interface is given.
    pub fn set_gso_max(&self, index: u32, bytes: u32) -> Result<()> {
        self.set(index, LinkAttribute::GsoMaxSize(bytes), || format!("largest super-packet {bytes}"))
    }

    /// Puts an interface into a bridge, bond or VRF; 0: takes it out.
    pub fn set_controller(&self, index: u32, controller: u32) -> Result<()> {
        self.set(index, LinkAttribute::Controller(controller), || format!("controller {controller}"))
    }

    /// Has a bridge forget the stations that it learnt by this port of it.
    pub fn forget_stations(&self, port: u32) -> Result<()> {
        let data = InfoPortData::BridgePort(vec![InfoBridgePort::Flush]);
        let infos = vec![LinkInfo::PortKind(InfoPortKind::Bridge), LinkInfo::PortData(data)];
        let mut message = LinkMessage::default();
        message.header.index = port;
        message.attributes.push(LinkAttribute::LinkInfo(infos));
        // Only this message has the kernel look at the data of a port.
        self.change(RouteNetlinkMessage::NewLink(message), Existing::Needed, || {
            format!("have the bridge forget the stations of port {port}")
        })
    }

    /// Renames an interface (before Linux 6.2 it must be off).
    pub fn set_name(&self, index: u32, name: &str) -> Result<()> {
        interface_name(name).context("rename an interface")?;
        self.set(index, LinkAttribute::IfName(name.to_owned()), || format!("name {name}"))
    }

    /// Sets the hardware address.
    pub fn set_mac(&self, index: u32, mac: [u8; 6]) -> Result<()> {
        self.set(index, LinkAttribute::Address(mac.to_vec()), || format!("hardware address {mac:02x?}"))
    }

    /// Moves an interface to another namespace, where it is off and without addresses; its index may change.
    pub fn move_to_netns(&self, index: u32, namespace: BorrowedFd<'_>) -> Result<()> {
        self.set(index, LinkAttribute::NetNsFd(namespace.as_raw_fd()), || "another namespace".to_owned())
    }

    fn set(&self, index: u32, attribute: LinkAttribute, value: impl Fn() -> String) -> Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes.push(attribute);
        self.change(RouteNetlinkMessage::SetLink(message), Existing::Needed, || {
            format!("set interface {index}: {}", value())
        })
    }

    /// Takes an interface off the system; a veth takes its other end along.
    pub fn delete_link(&self, index: u32) -> Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        self.change(RouteNetlinkMessage::DelLink(message), Existing::Needed, || {
            format!("delete interface {index}")
        })
    }

    /// Makes a virtual cable: `name` in this session's namespace, `peer_name` in the given one (or here as well).
    pub fn add_veth(&self, name: &str, peer_name: &str, peer_netns: Option<BorrowedFd<'_>>) -> Result<()> {
        self.add_veth_between(name, None, peer_name, peer_netns)
    }

    /// As [`Netlink::add_veth`] with both ends anywhere.
    pub fn add_veth_between(
        &self,
        name: &str,
        netns: Option<BorrowedFd<'_>>,
        peer_name: &str,
        peer_netns: Option<BorrowedFd<'_>>,
    ) -> Result<()> {
        let end = |name: &str, netns: Option<BorrowedFd<'_>>| {
            interface_name(name).context("make a veth pair")?;
            let mut message = LinkMessage::default();
            message.attributes.push(LinkAttribute::IfName(name.to_owned()));
            message.attributes.extend(netns.map(|netns| LinkAttribute::NetNsFd(netns.as_raw_fd())));
            Ok(message)
        };
        let peer = InfoData::Veth(InfoVeth::Peer(end(peer_name, peer_netns)?));
        let mut message = end(name, netns)?;
        let info = vec![LinkInfo::Kind(InfoKind::Veth), LinkInfo::Data(peer)];
        message.attributes.push(LinkAttribute::LinkInfo(info));
        self.change(RouteNetlinkMessage::NewLink(message), Existing::Refuse, || {
            format!("make the veth pair {name} and {peer_name}")
        })
    }
}
