//! Header of the link layer that the packets of a device have: an Ethernet header, or none (PPP, TUN, WireGuard, IP tunnels,
//! modems in raw IP mode).

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use crate::sys::{check, interface_name};

/// Types of devices (linux/if_arp.h).
const ETHERNET: u16 = libc::ARPHRD_ETHER;
/// PPP, raw IP, IP in IP, SIT, and "no link layer" (TUN, WireGuard): packet sockets see IP packets.
const HEADERLESS: [u16; 6] =
    [libc::ARPHRD_PPP, RAWIP, libc::ARPHRD_TUNNEL, libc::ARPHRD_TUNNEL6, libc::ARPHRD_SIT, libc::ARPHRD_NONE];
/// GRE: without a header as long as the device has one remote end; else the outer addresses are one.
const GRE: [u16; 2] = [libc::ARPHRD_IPGRE, IP6GRE];
/// Not in libc.
const IP6GRE: u16 = 823;
const RAWIP: u16 = 519;

/// Whether a device writes a header of its own in front of what it is given without one, and wants to know the protocol (PPP).
pub(crate) fn writes_header(device: &str) -> io::Result<bool> {
    let mut request = request(device)?;
    ioctl(socket()?, libc::SIOCGIFHWADDR as _, &mut request)?;
    // SAFETY: the kernel has filled in this member.
    Ok(unsafe { request.ifr_ifru.ifru_hwaddr }.sa_family == libc::ARPHRD_PPP)
}

/// Header that the packets of a device have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LinkLayer {
    /// An Ethernet header (IEEE 802.3, 14 bytes).
    #[default]
    Ethernet,
    /// None: there is one other end, and no neighbors to find.
    None,
}

impl LinkLayer {
    /// Link layer by the type of a device (`ARPHRD_*`, as in `/sys/class/net/DEVICE/type`) and whether it is said to be
    /// point to point. `None`: one that packets cannot be sent by here.
    #[must_use]
    pub fn of_type(kind: u16, point_to_point: bool) -> Option<Self> {
        match kind {
            ETHERNET => Some(Self::Ethernet),
            kind if HEADERLESS.contains(&kind) => Some(Self::None),
            kind if GRE.contains(&kind) && point_to_point => Some(Self::None),
            _ => None,
        }
    }

    /// Link layer of a device of the calling thread's namespace. `Unsupported` for loopback and what else carries no
    /// packets of others.
    pub(crate) fn of(device: &str) -> io::Result<Self> {
        let mut request = request(device)?;
        let socket = socket()?;
        ioctl(&socket, libc::SIOCGIFHWADDR as _, &mut request)?;
        // SAFETY: the kernel has filled in this member.
        let kind = unsafe { request.ifr_ifru.ifru_hwaddr }.sa_family;
        ioctl(&socket, libc::SIOCGIFFLAGS as _, &mut request)?;
        // SAFETY: the kernel has filled in this member.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        let point_to_point = i32::from(flags) & libc::IFF_POINTOPOINT != 0;
        Self::of_type(kind, point_to_point).ok_or_else(|| {
            let text = format!("its link layer is neither Ethernet nor none (type {kind})");
            io::Error::new(io::ErrorKind::Unsupported, text)
        })
    }
}

/// MTU of a device of the calling thread's namespace, at most 64 KiB.
pub(crate) fn mtu(device: &str) -> io::Result<usize> {
    let mut request = request(device)?;
    ioctl(socket()?, libc::SIOCGIFMTU as _, &mut request)?;
    // SAFETY: the kernel has filled in this member.
    Ok(usize::try_from(unsafe { request.ifr_ifru.ifru_mtu }).unwrap_or(1500).min(64 << 10))
}

/// Any socket is good for questions about devices.
fn socket() -> io::Result<std::os::fd::OwnedFd> {
    // SAFETY: no pointers are passed.
    crate::sys::owned(unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) })
}

fn request(device: &str) -> io::Result<libc::ifreq> {
    let ifr_ifru = libc::__c_anonymous_ifr_ifru { ifru_mtu: 0 };
    Ok(libc::ifreq { ifr_name: interface_name(device)?, ifr_ifru })
}

fn ioctl(socket: impl AsFd, what: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: a complete ifreq that lives for the call; these requests write nothing else.
    check(unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), what as _, std::ptr::from_mut(request)) })
        .map(drop)
}

#[cfg(test)]
mod tests;
