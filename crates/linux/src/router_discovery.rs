//! Router advertisements (RFC 4861 §4.2) as they come in, beside the kernel, which takes them as before or ignores them.

use std::io;
use std::mem::{size_of, zeroed};
use std::net::Ipv6Addr;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::Result;
use crate::error::Context;
use crate::sys::{check_size, owned, set_option};

/// Bytes of an advertisement that are read; what does not fit is no advertisement.
pub const ADVERTISEMENT_BYTES_MAX: usize = 1_500;

/// From linux/icmpv6.h.
const ICMP6_FILTER: libc::c_int = 1;
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u32 = 134;
/// `ff02::2`, all routers of a link.
const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
/// Hop limit of neighbor discovery: nobody beyond the link can send that (RFC 4861 §3.1).
const HOP_LIMIT: libc::c_int = 255;
/// Room for two control messages.
const CONTROL_BYTES: usize = 128;

/// A raw ICMPv6 socket that receives router advertisements on all interfaces, whatever `accept_ra` is.
#[derive(Debug)]
pub struct RouterDiscovery {
    fd: OwnedFd,
}

/// Advertisement with a right checksum, from a neighbor (hop limit 255).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Advertisement {
    /// Index of the interface by which it came.
    pub interface: u32,
    /// Its sender.
    pub router: Ipv6Addr,
    /// Bytes of the ICMPv6 message.
    pub bytes: usize,
}

/// Aligned as control messages are.
#[repr(C, align(8))]
struct Control([u8; CONTROL_BYTES]);

impl RouterDiscovery {
    /// Opens it in the calling thread's namespace. Needs CAP_NET_RAW.
    ///
    /// # Errors
    /// As the kernel refuses it: no right, no IPv6.
    pub fn open() -> Result<RouterDiscovery> {
        let what = "listen to router advertisements";
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: no pointers are passed.
        let fd = owned(unsafe { libc::socket(libc::AF_INET6, kind, libc::IPPROTO_ICMPV6) }).context(what)?;
        // A set bit keeps a type out.
        let mut filter = [u32::MAX; 8];
        filter[ROUTER_ADVERTISEMENT as usize / 32] &= !(1 << (ROUTER_ADVERTISEMENT % 32));
        set_option(&fd, libc::IPPROTO_ICMPV6, ICMP6_FILTER, &filter).context(what)?;
        const ON: libc::c_int = 1;
        for (option, value) in [
            (libc::IPV6_RECVPKTINFO, ON),
            (libc::IPV6_RECVHOPLIMIT, ON),
            (libc::IPV6_MULTICAST_HOPS, HOP_LIMIT),
        ] {
            set_option(&fd, libc::IPPROTO_IPV6, option, &value).context(what)?;
        }
        Ok(RouterDiscovery { fd })
    }

    /// Asks the routers of a link to advertise themselves now (RFC 4861 §4.1).
    ///
    /// # Errors
    /// As the kernel refuses it: an interface without a link-local address.
    pub fn solicit(&self, interface: u32) -> io::Result<()> {
        // SAFETY: an all-zero sockaddr_in6 is valid.
        let mut to: libc::sockaddr_in6 = unsafe { zeroed() };
        to.sin6_family = libc::AF_INET6 as libc::sa_family_t;
        to.sin6_addr.s6_addr = ALL_ROUTERS.octets();
        to.sin6_scope_id = interface;
        // The kernel writes the checksum.
        let message = [ROUTER_SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the kernel reads message and address, whose lengths are true.
        check_size(unsafe {
            libc::sendto(
                self.fd.as_raw_fd(),
                message.as_ptr().cast(),
                message.len(),
                flags,
                (&raw const to).cast(),
                size_of::<libc::sockaddr_in6>() as libc::socklen_t,
            )
        })
        .map(drop)
    }

    /// Reads one advertisement. `Ok(None)`: what came was none, as it came from further away; there may be more.
    ///
    /// # Errors
    /// `WouldBlock` when there is nothing.
    pub fn receive(&self, buffer: &mut [u8; ADVERTISEMENT_BYTES_MAX]) -> io::Result<Option<Advertisement>> {
        let mut control = Control([0; CONTROL_BYTES]);
        // SAFETY: all-zero structures of these kinds are valid.
        let (mut from, mut header): (libc::sockaddr_in6, libc::msghdr) = unsafe { (zeroed(), zeroed()) };
        let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        header.msg_name = (&raw mut from).cast();
        header.msg_namelen = size_of::<libc::sockaddr_in6>() as libc::socklen_t;
        header.msg_iov = &raw mut part;
        header.msg_iovlen = 1;
        header.msg_control = control.0.as_mut_ptr().cast();
        header.msg_controllen = CONTROL_BYTES as _;
        // SAFETY: the header points at live buffers with their true lengths.
        let bytes =
            check_size(unsafe { libc::recvmsg(self.fd.as_raw_fd(), &raw mut header, libc::MSG_DONTWAIT) })?;
        let whole = header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) == 0;
        // SAFETY: the kernel has filled the header; its pointers are still valid.
        let (interface, hop_limit) = unsafe { read_control(&header) };
        let router = Ipv6Addr::from(from.sin6_addr.s6_addr);
        let near = whole && hop_limit == Some(HOP_LIMIT);
        Ok(interface.filter(|_| near).map(|interface| Advertisement { interface, router, bytes }))
    }
}

/// Interface and hop limit of a message.
///
/// # Safety
/// The kernel has filled this message; its control pointer is still valid.
unsafe fn read_control(header: &libc::msghdr) -> (Option<u32>, Option<libc::c_int>) {
    let (mut interface, mut hop_limit) = (None, None);
    // SAFETY: the kernel wrote `msg_controllen` bytes of well-formed control messages.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !next.is_null() {
        // SAFETY: `next` lies inside the control buffer; each kind has a payload of its structure.
        unsafe {
            let data = libc::CMSG_DATA(next);
            match ((*next).cmsg_level, (*next).cmsg_type) {
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                    interface = Some(data.cast::<libc::in6_pktinfo>().read_unaligned().ipi6_ifindex);
                }
                (libc::IPPROTO_IPV6, libc::IPV6_HOPLIMIT) => {
                    hop_limit = Some(data.cast::<libc::c_int>().read_unaligned());
                }
                _ => {}
            }
            next = libc::CMSG_NXTHDR(header, next);
        }
    }
    (interface, hop_limit)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::time::{Duration, Instant};

    use super::*;
    use crate::testing::isolated;

    /// Another socket of the same kind sends advertisements over loopback: one as a router does, one from further away.
    #[test]
    fn advertisements_of_neighbors_are_read_others_are_not() {
        isolated(|| {
            let ours = RouterDiscovery::open().unwrap();
            let router = RouterDiscovery::open().unwrap();
            let advertise = |hops: libc::c_int| {
                set_option(&router.fd, libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, &hops).unwrap();
                let mut message = [0; 16];
                message[0] = ROUTER_ADVERTISEMENT as u8;
                message[15] = hops as u8;
                // SAFETY: an all-zero sockaddr_in6 is valid; the kernel reads message and address, whose lengths are true.
                let sent = unsafe {
                    let mut to: libc::sockaddr_in6 = zeroed();
                    to.sin6_family = libc::AF_INET6 as libc::sa_family_t;
                    to.sin6_addr.s6_addr = Ipv6Addr::LOCALHOST.octets();
                    libc::sendto(
                        router.fd.as_raw_fd(),
                        message.as_ptr().cast(),
                        message.len(),
                        0,
                        (&raw const to).cast(),
                        size_of::<libc::sockaddr_in6>() as libc::socklen_t,
                    )
                };
                assert_eq!(sent, 16, "{}", io::Error::last_os_error());
            };
            advertise(64);
            advertise(255);
            let mut buffer = [0; ADVERTISEMENT_BYTES_MAX];
            let end = Instant::now() + Duration::from_secs(5);
            let mut read = Vec::new();
            while read.len() < 2 && Instant::now() < end {
                match ours.receive(&mut buffer) {
                    Ok(advertisement) => read.push((advertisement, buffer[15])),
                    Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
                }
            }
            let expected = Advertisement { interface: 1, router: Ipv6Addr::LOCALHOST, bytes: 16 };
            assert_eq!(read, [(None, 64), (Some(expected), 255)]);
        });
    }
}
