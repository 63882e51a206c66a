//! IP packets out of one device by way of the kernel, which finds the neighbor: for a next hop whose hardware
//! address is not known yet.

use std::io;
use std::mem::{size_of, zeroed};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::net::sockopt;
use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType};

use crate::Result;
use crate::bpf::OWN_MARK;
use crate::error::Context;
use crate::sys::{check_size, interface_index, set_option};

/// A pair of raw sockets (IPv4, IPv6) bound to one device. They send whole IP packets and receive nothing.
///
/// The kernel asks for the neighbor, keeps the packet while it waits, sends it, and tells
/// [`crate::netlink::NeighborMonitor`]. It changes of a packet no more than this: the checksum of the IPv4
/// header is written anew, an IPv4 identification of 0 without "don't fragment" becomes another, a source
/// address 0.0.0.0 becomes its own. Output rules of the host's firewall see these packets.
#[derive(Debug)]
pub struct RawIpSender {
    v4: OwnedFd,
    v6: Option<OwnedFd>,
    index: u32,
}

impl RawIpSender {
    /// Opens it for a device of the calling thread's namespace. Needs CAP_NET_RAW.
    pub fn open(device: &str) -> Result<RawIpSender> {
        let what = format!("open a raw IP socket on {device}");
        let index = interface_index(device).context(&what)?;
        let open = |family| -> io::Result<OwnedFd> {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let raw = Protocol::from_raw(
                rustix::net::RawProtocol::new(libc::IPPROTO_RAW as u32)
                    .ok_or(io::Error::from(io::ErrorKind::InvalidInput))?,
            );
            let fd = rustix::net::socket_with(family, SocketType::RAW, flags, Some(raw))?;
            sockopt::set_socket_broadcast(&fd, true)?;
            let mut name = device.as_bytes().to_vec();
            name.push(0);
            bind_to_device(&fd, &name)?;
            Ok(fd)
        };
        // IPPROTO_RAW means that packets come with their header.
        let v4 = open(AddressFamily::INET).context(&what)?;
        // A host may be without IPv6.
        let v6 = open(AddressFamily::INET6).ok();
        if let Some(v6) = &v6 {
            const ON: libc::c_int = 1;
            set_option(v6, libc::IPPROTO_IPV6, IPV6_HDRINCL, &ON).context(&what)?;
        }
        Ok(RawIpSender { v4, v6, index })
    }

    /// Marks its packets as the datapath's own, as [`crate::packet_sender::PacketSender::set_own`].
    pub fn set_own(&self) -> Result<()> {
        let sockets = [Some(&self.v4), self.v6.as_ref()];
        sockets.into_iter().flatten().try_for_each(|fd| {
            set_option(fd, libc::SOL_SOCKET, libc::SO_MARK, &OWN_MARK).context("mark own packets")
        })
    }

    /// Sends an IP packet to this neighbor: a router, or the destination itself. The packet is complete (its
    /// checksums, too) and not longer than the MTU. `WouldBlock` and `ENOBUFS` when there is no room,
    /// `EMSGSIZE` when it is too long, `InvalidInput` when packet and neighbor are not of one family, `HostUnreachable`
    /// for IPv4 to an IPv6 neighbor, which is looked for.
    pub fn send(&self, packet: &[u8], next_hop: IpAddr) -> io::Result<()> {
        let version = packet.first().map_or(0, |byte| byte >> 4);
        let wrong = || io::Error::from(io::ErrorKind::InvalidInput);
        match (version, next_hop) {
            (4, IpAddr::V4(next_hop)) => send(&self.v4, packet, &address_v4(next_hop)),
            (6, IpAddr::V6(next_hop)) => {
                let unsupported = || io::Error::from(io::ErrorKind::Unsupported);
                let socket = self.v6.as_ref().ok_or_else(unsupported)?;
                send(socket, packet, &address_v6(next_hop, self.index))
            }
            (4, IpAddr::V6(next_hop)) => {
                // The kernel sends no IPv4 packet to an IPv6 neighbor of our choice: an empty one has it look for the
                // neighbor (RFC 8200 §4.7), and this packet is lost.
                let socket = self.v6.as_ref().ok_or(io::ErrorKind::Unsupported)?;
                let _ = send(socket, &nothing_to(next_hop), &address_v6(next_hop, self.index));
                Err(io::ErrorKind::HostUnreachable.into())
            }
            _ => Err(wrong()),
        }
    }
}

/// An IPv6 packet that is only a header, "no next header", from nobody.
fn nothing_to(next_hop: Ipv6Addr) -> [u8; 40] {
    let mut packet = [0; 40];
    packet[0] = 0x60;
    packet[6] = 59;
    packet[7] = 1;
    packet[24..].copy_from_slice(&next_hop.octets());
    packet
}

/// From linux/in6.h.
const IPV6_HDRINCL: libc::c_int = 36;

fn bind_to_device(fd: &OwnedFd, name: &[u8]) -> io::Result<()> {
    // SAFETY: the pointer and the length describe `name`.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_BINDTODEVICE,
            name.as_ptr().cast(),
            name.len() as libc::socklen_t,
        )
    };
    crate::sys::check(result).map(drop)
}

fn address_v4(ip: Ipv4Addr) -> libc::sockaddr_in {
    // SAFETY: an all-zero sockaddr_in is valid.
    let mut address: libc::sockaddr_in = unsafe { zeroed() };
    address.sin_family = libc::AF_INET as libc::sa_family_t;
    address.sin_addr.s_addr = u32::from_ne_bytes(ip.octets());
    address
}

fn address_v6(ip: Ipv6Addr, interface: u32) -> libc::sockaddr_in6 {
    // SAFETY: an all-zero sockaddr_in6 is valid.
    let mut address: libc::sockaddr_in6 = unsafe { zeroed() };
    address.sin6_family = libc::AF_INET6 as libc::sa_family_t;
    address.sin6_addr.s6_addr = ip.octets();
    if ip.is_unicast_link_local() {
        address.sin6_scope_id = interface;
    }
    address
}

fn send<T>(fd: &OwnedFd, packet: &[u8], to: &T) -> io::Result<()> {
    // The neighbor is on the link, whatever the routes say.
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL | libc::MSG_DONTROUTE;
    // SAFETY: the kernel reads the packet and the address, whose lengths are true.
    check_size(unsafe {
        libc::sendto(
            fd.as_raw_fd(),
            packet.as_ptr().cast(),
            packet.len(),
            flags,
            std::ptr::from_ref(to).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    })
    .map(drop)
}

#[cfg(test)]
mod tests;
