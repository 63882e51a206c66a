//! Local addresses and ports of the host's sockets, asked of the kernel by `sock_diag(7)`.

use std::io;
use std::mem::size_of;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};

use crate::Result;
use crate::error::Context;
use crate::sys::{check_size, owned};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// `NLM_F_REQUEST | NLM_F_DUMP`.
const DUMP: u16 = 0x301;
/// Bytes of `struct nlmsghdr`, `struct inet_diag_req_v2`, and of `struct inet_diag_msg` up to the addresses' end.
const HEADER_BYTES: usize = 16;
const REQUEST_BYTES: usize = HEADER_BYTES + 56;
const ENDPOINT_BYTES: usize = 40;
/// All of `struct inet_diag_msg`; attributes follow.
const DIAG_BYTES: usize = 72;
const INET_DIAG_SKV6ONLY: u16 = 11;
/// States of sockets (include/net/tcp_states.h) that hold their port for a program: all but TIME-WAIT, and half-open connections of a
/// listening one, which has that port itself. UDP sockets are "established" (1) or "closed" (7).
const STATES: u32 = !(1 << TIME_WAIT | 1 << SYN_RECEIVED | 1 << NEW_SYN_RECEIVED);
const SYN_RECEIVED: u32 = 3;
const TIME_WAIT: u32 = 6;
const NEW_SYN_RECEIVED: u32 = 12;
/// One datagram of the kernel.
const RECEIVE_BYTES: usize = 64 << 10;

/// Calls `each` with protocol, local address (unspecified: any of its version; of IPv4 also where the socket is an IPv6 one) and port of
/// every socket in the calling thread's namespace that has a port: TCP, UDP and UDP-Lite. An IPv6 socket that takes IPv4 as well is
/// two.
pub fn each_local_port(mut each: impl FnMut(u8, IpAddr, u16)) -> Result<()> {
    const WHAT: &str = "list the host's sockets";
    // SAFETY: no pointers are passed.
    let fd = owned(unsafe {
        libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_SOCK_DIAG)
    })
    .context(WHAT)?;
    let mut buffer = vec![0; RECEIVE_BYTES];
    for protocol in [libc::IPPROTO_TCP, libc::IPPROTO_UDP, libc::IPPROTO_UDPLITE] {
        for family in [libc::AF_INET, libc::AF_INET6] {
            match list(&fd, (family as u8, protocol as u8), &mut buffer, &mut each) {
                // UDP-Lite and IPv6 may be missing.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) && protocol != libc::IPPROTO_TCP => {
                }
                result => result.context(WHAT)?,
            }
        }
    }
    Ok(())
}

fn list(
    fd: &OwnedFd,
    (family, protocol): (u8, u8),
    buffer: &mut [u8],
    each: &mut impl FnMut(u8, IpAddr, u16),
) -> io::Result<()> {
    let mut request = [0; REQUEST_BYTES];
    request[..4].copy_from_slice(&(REQUEST_BYTES as u32).to_ne_bytes());
    request[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request[6..8].copy_from_slice(&DUMP.to_ne_bytes());
    request[HEADER_BYTES..HEADER_BYTES + 2].copy_from_slice(&[family, protocol]);
    request[HEADER_BYTES + 4..HEADER_BYTES + 8].copy_from_slice(&STATES.to_ne_bytes());
    // SAFETY: the kernel reads the request, whose length is true.
    check_size(unsafe { libc::send(fd.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) })?;
    loop {
        // SAFETY: the kernel writes into the buffer, whose length is true.
        let bytes =
            check_size(unsafe { libc::recv(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) })?;
        let mut rest = buffer.get(..bytes).unwrap_or_default();
        while let Some((kind, body, behind)) = message(rest) {
            match kind {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => {
                    let code = body.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                    return if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) };
                }
                _ => {
                    if let Some((address, port)) = local(body) {
                        each(protocol, address, port);
                        if address == IpAddr::V6(Ipv6Addr::UNSPECIFIED) && !is_ipv6_only(body) {
                            each(protocol, IpAddr::V4(Ipv4Addr::UNSPECIFIED), port);
                        }
                    }
                }
            }
            rest = behind;
        }
    }
}

/// Kind and body of the first message, and what is behind it.
fn message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes([*bytes.get(4)?, *bytes.get(5)?]);
    let body = bytes.get(HEADER_BYTES..length)?;
    Some((kind, body, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

/// The local end in a `struct inet_diag_msg`; `None`: no port, or no such message.
fn local(body: &[u8]) -> Option<(IpAddr, u16)> {
    let body = body.first_chunk::<ENDPOINT_BYTES>()?;
    let port = u16::from_be_bytes([body[4], body[5]]);
    let address = match i32::from(body[0]) {
        libc::AF_INET => IpAddr::V4(Ipv4Addr::from(*body[8..].first_chunk::<4>()?)),
        libc::AF_INET6 => IpAddr::V6(Ipv6Addr::from(*body[8..].first_chunk::<16>()?)).to_canonical(),
        _ => return None,
    };
    (port != 0).then_some((address, port))
}

/// Whether the socket of a `struct inet_diag_msg` takes IPv6 alone: by an attribute of those that listen or are not connected.
fn is_ipv6_only(body: &[u8]) -> bool {
    let mut rest = body.get(DIAG_BYTES..).unwrap_or_default();
    while let [a, b, c, d, behind @ ..] = rest {
        let length = usize::from(u16::from_ne_bytes([*a, *b]));
        if u16::from_ne_bytes([*c, *d]) == INET_DIAG_SKV6ONLY {
            return behind.first().is_some_and(|value| *value != 0);
        }
        let Some(next) = rest.get(length.max(4).next_multiple_of(4)..) else { return false };
        rest = next;
    }
    false
}

const _: () = assert!(size_of::<libc::nlmsghdr>() == HEADER_BYTES);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};

    fn listed() -> Vec<(IpAddr, u16)> {
        let mut list = Vec::new();
        each_local_port(|_, address, port| list.push((address, port))).unwrap();
        list
    }

    /// An IPv6 socket may take IPv4, or leave it to another one.
    #[test]
    fn a_socket_of_both_versions_is_listed_for_both() {
        let both = UdpSocket::bind("[::]:0").unwrap();
        let only = rustix::net::socket(
            rustix::net::AddressFamily::INET6,
            rustix::net::SocketType::DGRAM,
            Some(rustix::net::ipproto::UDP),
        )
        .unwrap();
        rustix::net::sockopt::set_ipv6_v6only(&only, true).unwrap();
        let any: SocketAddr = "[::]:0".parse().unwrap();
        rustix::net::bind(&only, &any).unwrap();
        let only = UdpSocket::from(only);
        let found = |socket: &UdpSocket, address: &str| {
            let port = socket.local_addr().unwrap().port();
            let mut found = false;
            let wanted = (libc::IPPROTO_UDP as u8, address.parse::<IpAddr>().unwrap(), port);
            each_local_port(|protocol, address, port| found |= (protocol, address, port) == wanted).unwrap();
            found
        };
        assert!(found(&both, "::") && found(&both, "0.0.0.0"));
        assert!(found(&only, "::") && !found(&only, "0.0.0.0"));
    }

    #[test]
    fn sockets_of_every_kind_are_listed_while_they_are_there() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let connected = TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
        let any = UdpSocket::bind("0.0.0.0:0").unwrap();
        let six = UdpSocket::bind("[::]:0").unwrap();
        let ends = [
            tcp.local_addr().unwrap(),
            connected.local_addr().unwrap(),
            any.local_addr().unwrap(),
            six.local_addr().unwrap(),
        ];
        let list = listed();
        for end in ends {
            assert!(list.contains(&(end.ip(), end.port())), "{end}");
        }
        drop((any, six));
        let list = listed();
        assert!(!list.contains(&(ends[2].ip(), ends[2].port())));
        assert!(list.contains(&(ends[1].ip(), ends[1].port())));
    }

    #[test]
    fn what_is_cut_short_is_no_message() {
        assert_eq!(message(&[0; 3]), None);
        assert_eq!(message(&[40, 0, 0, 0, 20, 0, 0, 0]), None);
        assert_eq!(message(&[0; 20]), None, "shorter than its own header");
        assert_eq!(local(&[2; 39]), None);
        let mut body = [0; 72];
        (body[0], body[5], body[8]) = (libc::AF_INET as u8, 53, 10);
        assert_eq!(local(&body), Some(("10.0.0.0".parse().unwrap(), 53)));
        body[5] = 0;
        assert_eq!(local(&body), None);
        for cut in [&[][..], &[5, 0], &[0, 0, 0, 0], &[9, 0, 11, 0], &[200, 0, 1, 0, 1]] {
            assert!(!is_ipv6_only(&[&body[..], cut].concat()), "{cut:?}");
        }
    }
}
