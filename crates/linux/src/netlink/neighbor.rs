//! Neighbors: who is on the link, and with which hardware address.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState as State,
};

use super::address::family;
use super::{Existing, Messages, Netlink, RECEIVE_BYTES, open_socket, receive};
use crate::Result;
use crate::error::Context;
use crate::netns::Namespace;
use crate::sys::set_option;

/// How far the kernel trusts a neighbor's hardware address (the states of `ip neigh`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NeighborState {
    /// Being asked for, not known yet.
    Incomplete,
    /// Confirmed a moment ago.
    Reachable,
    /// Known, not confirmed for some time; in use until it fails.
    Stale,
    /// Known and being confirmed.
    Probing,
    /// Nobody answers.
    Failed,
    /// Fixed by the administrator, or needs no question.
    Fixed,
    /// Made, and nothing is known.
    Unknown,
}

impl NeighborState {
    /// Packets may go to the hardware address.
    pub fn is_usable(self) -> bool {
        use NeighborState as N;
        matches!(self, N::Reachable | N::Stale | N::Probing | N::Fixed)
    }
}

/// A neighbor of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbor {
    /// Interface index.
    pub index: u32,
    /// Its address.
    pub ip: IpAddr,
    /// Its hardware address, if known (an old one too, when it has failed).
    pub mac: Option<[u8; 6]>,
    /// How far that can be trusted.
    pub state: NeighborState,
}

impl Neighbor {
    pub(super) fn from_message(message: &NeighbourMessage) -> Option<Neighbor> {
        let (mut ip, mut mac) = (None, None);
        for attribute in &message.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => ip = Some((*v4).into()),
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => ip = Some((*v6).into()),
                NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok(),
                _ => {}
            }
        }
        let state = match message.header.state {
            State::Incomplete => NeighborState::Incomplete,
            State::Reachable => NeighborState::Reachable,
            State::Stale => NeighborState::Stale,
            State::Delay | State::Probe => NeighborState::Probing,
            State::Failed => NeighborState::Failed,
            State::Noarp | State::Permanent => NeighborState::Fixed,
            _ => NeighborState::Unknown,
        };
        Some(Neighbor { index: message.header.ifindex, ip: ip?, mac, state })
    }
}

fn message(index: u32, ip: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(ip);
    message.header.ifindex = index;
    let destination = match ip {
        IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
        IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
    };
    message.attributes.push(NeighbourAttribute::Destination(destination));
    message
}

impl Netlink {
    /// Fixes the hardware address of a neighbor, so that it need not be asked for. Replaces an entry there is.
    pub fn add_neighbor(&self, index: u32, ip: IpAddr, mac: [u8; 6]) -> Result<()> {
        let mut message = message(index, ip);
        message.header.state = State::Permanent;
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
        self.change(RouteNetlinkMessage::NewNeighbour(message), Existing::Replace, || {
            format!("fix the neighbor {ip} of interface {index}")
        })
    }

    /// Forgets a neighbor.
    pub fn del_neighbor(&self, index: u32, ip: IpAddr) -> Result<()> {
        self.change(RouteNetlinkMessage::DelNeighbour(message(index, ip)), Existing::Needed, || {
            format!("forget the neighbor {ip} of interface {index}")
        })
    }

    /// Has the kernel find or confirm a neighbor, as if a packet were sent to it (`NTF_USE`); the answer comes
    /// through a [`NeighborMonitor`]. Needs CAP_NET_ADMIN.
    pub fn probe_neighbor(&self, index: u32, ip: IpAddr) -> Result<()> {
        let mut message = message(index, ip);
        message.header.flags = NeighbourFlags::Use;
        self.change(RouteNetlinkMessage::NewNeighbour(message), Existing::Replace, || {
            format!("look for the neighbor {ip} of interface {index}")
        })
    }

    /// All neighbors of all interfaces, IPv4 and IPv6, those without a hardware address included.
    pub fn all_neighbors(&self) -> Result<Vec<Neighbor>> {
        let request = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
        self.dump(&request, "list the neighbors", |message| match message {
            RouteNetlinkMessage::NewNeighbour(message) => Neighbor::from_message(&message),
            _ => None,
        })
    }

    /// Neighbors of an interface whose hardware address is known.
    pub fn neighbors(&self, index: u32) -> Result<Vec<(IpAddr, [u8; 6])>> {
        let all = self.all_neighbors()?.into_iter().filter(|neighbor| neighbor.index == index);
        Ok(all.filter_map(|neighbor| Some((neighbor.ip, neighbor.mac?))).collect())
    }
}

/// One change of a neighbor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NeighborChange {
    /// It came, or its state or hardware address changed.
    Changed(Neighbor),
    /// The kernel has forgotten it.
    Gone(Neighbor),
    /// Changes were lost because there were too many at once: read [`Netlink::all_neighbors`] again.
    Resync,
}

/// Tells which neighbors change in the namespace where it was opened. Apart from [`super::Monitor`], because a
/// busy link has many of them.
#[derive(Debug)]
pub struct NeighborMonitor {
    fd: OwnedFd,
    buffer: Vec<u8>,
}

/// Kernel memory for changes not yet read.
const BUFFER_BYTES: libc::c_int = 1 << 20;
/// Changes returned by one [`NeighborMonitor::read`] at most, roughly; the rest waits for the next.
const CHANGES_MAX: usize = 1024;

impl NeighborMonitor {
    /// Opens a monitor in the calling thread's namespace; needs no privilege. Open it *before* reading the
    /// present state.
    pub fn open() -> Result<NeighborMonitor> {
        const WHAT: &str = "open a netlink monitor for neighbors";
        let fd = open_socket(libc::RTMGRP_NEIGH.cast_unsigned()).context(WHAT)?;
        set_option(&fd, libc::SOL_SOCKET, libc::SO_RCVBUF, &BUFFER_BYTES).context(WHAT)?;
        Ok(NeighborMonitor { fd, buffer: vec![0; RECEIVE_BYTES] })
    }

    /// Opens a monitor in another namespace.
    pub fn open_in(namespace: &Namespace) -> Result<NeighborMonitor> {
        namespace.run(NeighborMonitor::open)?
    }

    /// Changes since the last call; empty if there are none. Never blocks.
    pub fn read(&mut self) -> io::Result<Vec<NeighborChange>> {
        let mut changes = Vec::new();
        while changes.len() < CHANGES_MAX {
            match receive(&self.fd, &mut self.buffer, libc::MSG_DONTWAIT) {
                Ok(length) => {
                    for part in Messages(self.buffer.get(..length).unwrap_or_default()) {
                        changes.extend(change(part.bytes));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error)
                    if error.raw_os_error() == Some(libc::ENOBUFS)
                        || error.kind() == io::ErrorKind::InvalidData =>
                {
                    // What was told before the gap may be old by now.
                    changes.clear();
                    changes.push(NeighborChange::Resync);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(changes)
    }
}

pub(super) fn change(bytes: &[u8]) -> Option<NeighborChange> {
    let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes).ok()?;
    match message.payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbour(message)) => {
            Neighbor::from_message(&message).map(NeighborChange::Changed)
        }
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelNeighbour(message)) => {
            Neighbor::from_message(&message).map(NeighborChange::Gone)
        }
        NetlinkPayload::Overrun(_) => Some(NeighborChange::Resync),
        _ => None,
    }
}

impl AsFd for NeighborMonitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
