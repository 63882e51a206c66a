//! Monitor of changes in the network, as the kernel tells them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;

use super::{Address, Link, Messages, RECEIVE_BYTES, Route, RuleSpec, open_socket, receive, route};
use crate::Result;
use crate::error::Context;
use crate::netns::Namespace;
use crate::sys::set_option;

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// An interface came, or something of it changed: state, carrier, name, MTU. The kernel also repeats itself.
    Link(Link),
    /// An interface is gone (deleted, unplugged or moved to another namespace).
    LinkGone(Link),
    /// An address came, or its state changed.
    Address(Address),
    /// An address is gone.
    AddressGone(Address),
    /// A route came.
    Route(Route),
    /// A route is gone. The kernel does not tell about routes that vanish because an interface went down.
    RouteGone(Route),
    /// A rule came.
    Rule(RuleSpec),
    /// A rule is gone.
    RuleGone(RuleSpec),
    /// A rule that looks into no table came or is gone.
    OtherRule,
    /// A next hop object changed, and with it the routes that name it.
    NextHop,
    /// Changes were lost because there were too many at once: read everything again with [`super::Netlink`].
    Resync,
}

/// Tells what changes in the namespace where it was opened.
#[derive(Debug)]
pub struct Monitor {
    fd: OwnedFd,
    buffer: Vec<u8>,
}

/// From linux/rtnetlink.h: messages about next hop objects, and the bit of their group (32).
const RTM_NEWNEXTHOP: u16 = 104;
const RTM_DELNEXTHOP: u16 = 105;
const RTMGRP_NEXTHOP: u32 = 1 << 31;

/// Changes returned by one [`Monitor::read`] at most, roughly; the rest waits for the next.
const CHANGES_MAX: usize = 1024;

impl Monitor {
    /// Opens a monitor in the calling thread's namespace; needs no privilege. Open it *before* reading the
    /// present state.
    pub fn open() -> Result<Monitor> {
        let groups = libc::RTMGRP_LINK
            | libc::RTMGRP_IPV4_IFADDR
            | libc::RTMGRP_IPV6_IFADDR
            | libc::RTMGRP_IPV4_ROUTE
            | libc::RTMGRP_IPV6_ROUTE
            | RTMGRP_NEXTHOP.cast_signed()
            | (1 << (libc::RTNLGRP_IPV4_RULE - 1))
            | (1 << (libc::RTNLGRP_IPV6_RULE - 1));
        let fd = open_socket(groups.cast_unsigned()).context("open a netlink monitor")?;
        Ok(Monitor { fd, buffer: vec![0; RECEIVE_BYTES] })
    }

    /// Opens a monitor in another namespace.
    pub fn open_in(namespace: &Namespace) -> Result<Monitor> {
        namespace.run(Monitor::open)?
    }

    /// Asks for a kernel buffer of about this size for changes not yet read (the kernel doubles it and has a
    /// minimum of a few KiB).
    pub fn set_buffer(&self, bytes: usize) -> io::Result<()> {
        let value = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
        set_option(&self.fd, libc::SOL_SOCKET, libc::SO_RCVBUF, &value)
    }

    /// Changes since the last call; empty if there are none. Never blocks.
    pub fn read(&mut self) -> io::Result<Vec<Change>> {
        let mut changes = Vec::new();
        while changes.len() < CHANGES_MAX {
            match receive(&self.fd, &mut self.buffer, libc::MSG_DONTWAIT) {
                Ok(length) => read_datagram(self.buffer.get(..length).unwrap_or_default(), &mut changes),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error)
                    if error.raw_os_error() == Some(libc::ENOBUFS)
                        || error.kind() == io::ErrorKind::InvalidData =>
                {
                    add_resync(&mut changes);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(changes)
    }
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Adds what a datagram of the kernel says.
pub(super) fn read_datagram(datagram: &[u8], changes: &mut Vec<Change>) {
    for part in Messages(datagram) {
        if matches!(part.kind, RTM_NEWNEXTHOP | RTM_DELNEXTHOP) {
            changes.push(Change::NextHop);
            continue;
        }
        match NetlinkMessage::<RouteNetlinkMessage>::deserialize(part.bytes) {
            Ok(NetlinkMessage { payload: NetlinkPayload::InnerMessage(message), .. }) => {
                add_changes(&message, changes);
            }
            Ok(NetlinkMessage { payload: NetlinkPayload::Overrun(_), .. }) => add_resync(changes),
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "a netlink change was not understood"),
        }
    }
}

fn add_resync(changes: &mut Vec<Change>) {
    // What was told before the gap may be old by now; the caller reads everything again anyway.
    changes.clear();
    changes.push(Change::Resync);
}

fn add_changes(message: &RouteNetlinkMessage, changes: &mut Vec<Change>) {
    use RouteNetlinkMessage as Message;
    match message {
        Message::NewLink(message) => changes.push(Change::Link(Link::from_message(message))),
        Message::DelLink(message) => changes.push(Change::LinkGone(Link::from_message(message))),
        Message::NewAddress(message) => changes.extend(Address::from_message(message).map(Change::Address)),
        Message::DelAddress(message) => {
            changes.extend(Address::from_message(message).map(Change::AddressGone));
        }
        Message::NewRoute(message) => {
            changes.extend(route::from_message(message).into_iter().map(Change::Route));
        }
        Message::DelRoute(message) => {
            changes.extend(route::from_message(message).into_iter().map(Change::RouteGone));
        }
        Message::NewRule(message) => {
            changes.push(RuleSpec::from_message(message).map_or(Change::OtherRule, Change::Rule));
        }
        Message::DelRule(message) => {
            changes.push(RuleSpec::from_message(message).map_or(Change::OtherRule, Change::RuleGone));
        }
        _ => {}
    }
}
