//! Links, addresses, routes, rules and neighbors of a network namespace, over rtnetlink.
//!
//! [`Netlink`] is a synchronous session: each call asks the kernel and waits for its answer (microseconds).
//! It stays in the namespace where it was opened. [`Monitor`] is the other direction: the kernel tells what
//! changed.

mod address;
mod ipsec;
mod link;
mod monitor;
mod neighbor;
pub mod nftables;
mod qdisc;
mod route;
mod rule;
mod tunnel;
mod vm_generation;

pub use address::Address;
pub use ipsec::{IpsecAction, IpsecMonitor, IpsecPolicy, ipsec_policies, ipsec_tunnels};
pub use link::Link;
pub use monitor::{Change, Monitor};
pub use neighbor::{Neighbor, NeighborChange, NeighborMonitor, NeighborState};
pub use route::{MAIN_TABLE, Route, RouteKind, RouteSpec};
pub use rule::{Family, PolicyAction, PolicyRule, RuleSpec};
pub use tunnel::Tunnel;
pub use vm_generation::VmGenerationMonitor;

use std::cell::Cell;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;

use crate::error::Context;
use crate::netns::Namespace;
use crate::sys::{check, check_size, owned, set_option};
use crate::{Error, Result};

/// The routing protocol number that marks routes and rules made by this program (RTA_PROTOCOL, FRA_PROTOCOL),
/// so that leftovers of a killed instance can be told from what others configured. A number that `rt_protos`
/// leaves free.
pub const OUR_PROTOCOL: u8 = 171;

/// A dump can be restarted when the tables change while it is read; so often at most.
const DUMP_ATTEMPTS: usize = 8;
/// One datagram of the kernel; it never sends longer ones unless the reader asks for it.
const RECEIVE_BYTES: usize = 64 << 10;

/// A session with the kernel's routing tables, in the namespace where it was opened.
#[derive(Debug)]
pub struct Netlink {
    fd: OwnedFd,
    sequence: Cell<u32>,
}

/// Whether a request may meet something that exists already.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Existing {
    /// It must: an existing thing is changed or deleted.
    Needed,
    /// It must not.
    Refuse,
    /// It is replaced.
    Replace,
}

impl Netlink {
    /// Opens a session in the calling thread's namespace. Reading needs no privilege, changing needs
    /// CAP_NET_ADMIN.
    pub fn open() -> Result<Netlink> {
        let fd = open_socket(0).context("open a netlink socket")?;
        Ok(Netlink { fd, sequence: Cell::new(0) })
    }

    /// Opens a session in another namespace.
    pub fn open_in(namespace: &Namespace) -> Result<Netlink> {
        namespace.run(Netlink::open)?
    }

    /// Asks for a change and waits until the kernel has made it.
    pub(crate) fn change(
        &self,
        message: RouteNetlinkMessage,
        existing: Existing,
        what: impl FnOnce() -> String,
    ) -> Result<()> {
        let flags = match existing {
            Existing::Needed => 0,
            Existing::Refuse => NLM_F_CREATE | NLM_F_EXCL,
            Existing::Replace => NLM_F_CREATE | NLM_F_REPLACE,
        };
        let result = self.exchange(message, NLM_F_REQUEST | NLM_F_ACK | flags, &mut |_| {});
        result.map_err(|error| Error::new(what(), error))
    }

    /// Asks for a list.
    pub(crate) fn dump<T>(
        &self,
        message: &RouteNetlinkMessage,
        what: &str,
        mut pick: impl FnMut(RouteNetlinkMessage) -> Option<T>,
    ) -> Result<Vec<T>> {
        let mut attempt = 0;
        loop {
            let mut list = Vec::new();
            let flags = NLM_F_REQUEST | NLM_F_DUMP;
            match self.exchange(message.clone(), flags, &mut |message| list.extend(pick(message))) {
                Ok(()) => return Ok(list),
                Err(error) if error.kind() == io::ErrorKind::Interrupted && attempt < DUMP_ATTEMPTS => {
                    attempt += 1;
                }
                Err(error) => return Err(Error::new(what, error)),
            }
        }
    }

    /// Asks for one thing by its key.
    pub(crate) fn get<T>(
        &self,
        message: RouteNetlinkMessage,
        what: impl FnOnce() -> String,
        pick: impl Fn(RouteNetlinkMessage) -> Option<T>,
    ) -> Result<Option<T>> {
        let mut found = None;
        let flags = NLM_F_REQUEST | NLM_F_ACK;
        match self.exchange(message, flags, &mut |message| found = pick(message).or(found.take())) {
            Ok(()) => Ok(found),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENOENT)) => Ok(None),
            Err(error) => Err(Error::new(what(), error)),
        }
    }

    /// Sends one request and reads its answers up to the acknowledgement or the end of the dump.
    fn exchange(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
        each: &mut dyn FnMut(RouteNetlinkMessage),
    ) -> io::Result<()> {
        let sequence = self.sequence.get().wrapping_add(1);
        self.sequence.set(sequence);
        let mut request = NetlinkMessage::from(message);
        request.header.flags = flags;
        request.header.sequence_number = sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        // SAFETY: the kernel reads `bytes.len()` bytes.
        check_size(unsafe { libc::send(self.fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) })?;

        let mut buffer = vec![0; RECEIVE_BYTES];
        let mut interrupted = false;
        loop {
            let length = receive(&self.fd, &mut buffer, 0)?;
            for part in Messages(&buffer[..length]) {
                if part.sequence != sequence {
                    // The tail of an earlier exchange that ended with an error.
                    continue;
                }
                interrupted |= part.flags & libc::NLM_F_DUMP_INTR as u16 != 0;
                match part.end()? {
                    End::Done if interrupted => return Err(io::ErrorKind::Interrupted.into()),
                    End::Done => return Ok(()),
                    End::More => each_decoded(part.bytes, each),
                }
            }
        }
    }
}

impl AsFd for Netlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Hands a message on if it can be understood. One message of a newer kernel that cannot must not hide the
/// others.
fn each_decoded(bytes: &[u8], each: &mut dyn FnMut(RouteNetlinkMessage)) {
    match NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes) {
        Ok(NetlinkMessage { payload: NetlinkPayload::InnerMessage(message), .. }) => each(message),
        Ok(_) => {}
        Err(error) => tracing::warn!(%error, "a netlink message was not understood"),
    }
}

/// Opens and binds a socket to the routing tables that listens to these groups (a bit mask of the first 32).
fn open_socket(groups: u32) -> io::Result<OwnedFd> {
    const ON: libc::c_int = 1;
    let fd = open_protocol(libc::NETLINK_ROUTE, groups)?;
    // Error texts of the kernel, and errors without a copy of the request.
    set_option(&fd, libc::SOL_NETLINK, libc::NETLINK_EXT_ACK, &ON)?;
    set_option(&fd, libc::SOL_NETLINK, libc::NETLINK_CAP_ACK, &ON)?;
    Ok(fd)
}

/// As [`open_socket`], for any protocol of netlink.
fn open_protocol(protocol: libc::c_int, groups: u32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers are passed.
    let fd = owned(unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) })?;
    // SAFETY: an all-zero sockaddr_nl is valid.
    let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
    address.nl_groups = groups;
    let bytes = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
    // SAFETY: the address lives for the call and has this length.
    check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), bytes) })?;
    Ok(fd)
}

/// Reads one datagram from the kernel; datagrams of other processes are refused.
fn receive(fd: &OwnedFd, buffer: &mut [u8], flags: libc::c_int) -> io::Result<usize> {
    loop {
        // SAFETY: an all-zero sockaddr_nl is valid.
        let mut from: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        let mut from_bytes = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
        // SAFETY: buffer and address are live and announced with their true lengths.
        let result = check_size(unsafe {
            libc::recvfrom(
                fd.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                flags | libc::MSG_TRUNC,
                (&raw mut from).cast(),
                &raw mut from_bytes,
            )
        });
        match result {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(_) if from.nl_pid != 0 => {}
            Ok(length) if length > buffer.len() => {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a netlink message was too long"));
            }
            result => return result,
        }
    }
}

/// One message of a datagram.
struct Part<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    /// With its header.
    bytes: &'a [u8],
}

enum End {
    More,
    Done,
}

impl Part<'_> {
    /// Whether this message ends the exchange, and with which error.
    fn end(&self) -> io::Result<End> {
        const DONE: u16 = libc::NLMSG_DONE as u16;
        const ERROR: u16 = libc::NLMSG_ERROR as u16;
        if self.kind != DONE && self.kind != ERROR {
            return Ok(End::More);
        }
        let code = self.bytes.get(16..20).map_or(0, |code| read_u32(code).cast_signed());
        if code == 0 {
            return Ok(End::Done);
        }
        let error = io::Error::from_raw_os_error(code.saturating_neg());
        match self.text() {
            // The number must stay readable from outside, so the text goes to the log.
            Some(text) => {
                tracing::debug!(%error, text, "the kernel explains a netlink error");
                Err(error)
            }
            None => Err(error),
        }
    }

    /// The kernel's explanation: attribute 1 behind the error code and the header of the request.
    fn text(&self) -> Option<&str> {
        const ACK_TLVS: u16 = 0x200;
        if self.kind != libc::NLMSG_ERROR as u16 || self.flags & ACK_TLVS == 0 {
            return None;
        }
        let mut rest = self.bytes.get(36..)?;
        while rest.len() >= 4 {
            let length = usize::from(u16::from_ne_bytes([rest[0], rest[1]]));
            let value = rest.get(4..length)?;
            if u16::from_ne_bytes([rest[2], rest[3]]) == 1 {
                return std::str::from_utf8(value).ok().map(|text| text.trim_end_matches('\0'));
            }
            rest = rest.get(length.next_multiple_of(4)..)?;
        }
        None
    }
}

/// The messages of a datagram, one after another.
struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Part<'a>;

    fn next(&mut self) -> Option<Part<'a>> {
        let head = self.0.get(..16)?;
        let length = read_u32(head) as usize;
        if length < 16 {
            return None;
        }
        let bytes = self.0.get(..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Part {
            kind: u16::from_ne_bytes([head[4], head[5]]),
            flags: u16::from_ne_bytes([head[6], head[7]]),
            sequence: read_u32(&head[8..]),
            bytes,
        })
    }
}

/// The first four bytes in this machine's order; the callers have checked that they exist.
fn read_u32(bytes: &[u8]) -> u32 {
    bytes.first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes))
}

/// Readers of datagrams, for the fuzzer.
pub(crate) mod testing {
    use super::*;

    pub(crate) fn routing(datagram: &[u8]) -> usize {
        let mut changes = Vec::new();
        monitor::read_datagram(datagram, &mut changes);
        changes.len()
    }

    pub(crate) fn neighbors(datagram: &[u8]) -> usize {
        Messages(datagram).filter_map(|part| neighbor::change(part.bytes)).count()
    }

    pub(crate) fn exchange(datagram: &[u8]) -> usize {
        let mut count = 0;
        for part in Messages(datagram) {
            match part.end() {
                Ok(End::More) => each_decoded(part.bytes, &mut |_| count += 1),
                Ok(End::Done) | Err(_) => break,
            }
        }
        count
    }
}

#[cfg(test)]
mod tests;
