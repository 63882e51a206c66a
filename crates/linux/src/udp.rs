//! UDP sockets that move many datagrams per system call.
//!
//! A [`UdpSocket`] sends a train of equal datagrams in one call (GSO) and receives trains that the kernel has
//! merged (GRO, by 4-tuple). It is bound to a device if asked, says for every train on which local address it
//! came in, and sends from the local address it is told. It never lets the kernel fragment: DF is set, the
//! kernel's own path MTU guess is ignored, and what is too big for the interface is `EMSGSIZE`.
//! [`UdpSocket::bind_group`] makes the listener's sockets, one per core, with the BPF program that picks by
//! core byte.

mod message;

pub(crate) use message::testing;

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::error::Context;
use crate::sys::set_option;
use crate::{Result, bpf};

/// Datagrams in one GSO train at most (the kernel's `UDP_MAX_SEGMENTS` before 6.9).
pub const TRAIN_SEGMENTS_MAX: usize = 64;
/// Bytes in one GSO train at most: the IP length field, less the largest IP and UDP headers we send.
pub const TRAIN_BYTES_MAX: usize = 65_535 - 48;
/// Trains received by one [`UdpSocket::recv`] at most.
pub const RECEIVE_BATCH_MAX: usize = 32;
/// Default socket buffer in bytes each way: a burst of some milliseconds at 10 Gbit/s.
pub const BUFFER_BYTES: usize = 7 << 20;

/// How to open a socket.
#[derive(Clone, Debug)]
pub struct UdpOptions {
    /// Address and port; port 0 = any free one. `[::]` takes IPv4 too (dual stack).
    pub local: SocketAddr,
    /// Only this interface (SO_BINDTODEVICE); routes of other interfaces are then not used.
    pub device: Option<String>,
    /// Share the port with other sockets of the same user that ask for it.
    pub reuse_port: bool,
    /// Firewall mark of all that is sent; 0 = none. Others need CAP_NET_ADMIN.
    pub mark: u32,
    /// Kernel buffer in bytes, each way; the kernel gives less without CAP_NET_ADMIN.
    pub buffer_bytes: usize,
}

impl UdpOptions {
    /// A plain socket at this address: any device, port not shared, no mark, [`BUFFER_BYTES`].
    pub fn new(local: SocketAddr) -> UdpOptions {
        UdpOptions { local, device: None, reuse_port: false, mark: 0, buffer_bytes: BUFFER_BYTES }
    }
}

/// Description of one buffer by [`UdpSocket::recv`]: a datagram, or several of one 4-tuple that the kernel merged (GRO).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecvMeta {
    /// Sender. IPv4 senders are IPv4 addresses on dual-stack sockets too.
    pub from: SocketAddr,
    /// Our address it was sent to.
    pub local_ip: Option<IpAddr>,
    /// Index of the interface it came in on.
    pub interface: Option<u32>,
    /// Bytes in the buffer.
    pub bytes: usize,
    /// Bytes of each datagram of the train; only the last may be shorter. Equals `bytes` for a single datagram.
    pub stride: usize,
    /// ECN field of the outer IP header (0 not capable, 1 ECT(1), 2 ECT(0), 3 congestion experienced).
    pub ecn: u8,
    /// TTL or hop limit with which it arrived; `None`: not told.
    pub ttl: Option<u8>,
    /// The datagram was longer than the buffer and was cut.
    pub truncated: bool,
}

impl Default for RecvMeta {
    fn default() -> RecvMeta {
        RecvMeta {
            from: SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0),
            local_ip: None,
            interface: None,
            bytes: 0,
            stride: 0,
            ecn: 0,
            ttl: None,
            truncated: false,
        }
    }
}

/// The unspecified address at which sockets take both families, `[::]`; `0.0.0.0` where the kernel has no IPv6
/// (`ipv6.disable=1`) and knows no such sockets.
#[must_use]
pub fn any_address(port: u16) -> SocketAddr {
    let ipv6 = Socket::new(Domain::IPV6, Type::DGRAM.cloexec(), Some(Protocol::UDP));
    let none = ipv6.is_err_and(|error| error.raw_os_error() == Some(libc::EAFNOSUPPORT));
    let any = if none { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
    SocketAddr::new(any, port)
}

/// A non-blocking UDP socket. Sending and receiving take `&self`; one worker owns it.
#[derive(Debug)]
pub struct UdpSocket {
    socket: Socket,
    local: SocketAddr,
    ipv6: bool,
    /// The kernel refused a train once although single datagrams passed.
    gso_off: AtomicBool,
}

impl UdpSocket {
    /// Opens one socket.
    pub fn bind(options: &UdpOptions) -> io::Result<UdpSocket> {
        let ipv6 = options.local.is_ipv6();
        let domain = if ipv6 { Domain::IPV6 } else { Domain::IPV4 };
        let socket = Socket::new(domain, Type::DGRAM.nonblocking().cloexec(), Some(Protocol::UDP))?;
        if ipv6 {
            socket.set_only_v6(!options.local.ip().is_unspecified())?;
        }
        let ipv4 = !ipv6 || options.local.ip().is_unspecified();
        set_ip_options(&socket, ipv4, ipv6)?;
        set_buffers(&socket, options.buffer_bytes)?;
        if let Some(device) = &options.device {
            socket.bind_device(Some(device.as_bytes()))?;
        }
        if options.mark != 0 {
            socket.set_mark(options.mark)?;
        }
        socket.set_reuse_port(options.reuse_port)?;
        socket.bind(&SockAddr::from(options.local))?;
        let local = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::InvalidData)?;
        Ok(UdpSocket { socket, local, ipv6, gso_off: AtomicBool::new(false) })
    }

    /// Opens `count` sockets on one port in core order: datagrams go to the socket whose position is their
    /// receiving core byte ([`bpf::reuseport_program`]), handshakes and garbage by the kernel's hash.
    /// Fails if somebody else has the port, another instance of this program too.
    /// Drop the sockets together: the positions shift when one is closed alone.
    pub fn bind_group(options: &UdpOptions, count: usize) -> Result<Vec<UdpSocket>> {
        let mut options = UdpOptions { reuse_port: true, ..options.clone() };
        let what = format!("listen on UDP {}", options.local);
        probe_port_free(options.local, options.device.as_deref())?;
        let mut sockets = Vec::with_capacity(count);
        for _ in 0..count {
            let socket = UdpSocket::bind(&options).context(&what)?;
            options.local.set_port(socket.local.port());
            sockets.push(socket);
        }
        if let Some(first) = sockets.first()
            && count > 1
        {
            bpf::attach_reuseport(first, &bpf::reuseport_program(count))?;
        }
        Ok(sockets)
    }

    /// Address and port it is bound to.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Sends `contents` to `to`: one datagram, or with `segment_bytes` a train of datagrams of that size (the
    /// last may be shorter). `source` is the local address to send from. Returns how many datagrams were lost because the
    /// buffer filled up behind the first ones. `WouldBlock`: nothing was sent, the buffer is full. `EMSGSIZE`: a datagram
    /// is larger than the interface's MTU.
    pub fn send(
        &self,
        to: SocketAddr,
        source: Option<IpAddr>,
        segment_bytes: Option<usize>,
        contents: &[u8],
    ) -> io::Result<usize> {
        self.send_marked(to, source, 0, segment_bytes, contents)
    }

    /// As [`UdpSocket::send`], with the ECN field of the outer IP header (RFC 6040), 0–3.
    pub fn send_marked(
        &self,
        to: SocketAddr,
        source: Option<IpAddr>,
        ecn: u8,
        segment_bytes: Option<usize>,
        contents: &[u8],
    ) -> io::Result<usize> {
        let outgoing = message::Outgoing::new(self.ipv6, to, source, ecn & 3);
        let segment = segment_bytes.filter(|bytes| *bytes > 0 && *bytes < contents.len());
        let Some(segment) = segment else {
            return outgoing.send(self.socket.as_fd(), contents, None).map(|()| 0);
        };
        if self.gso_off.load(Ordering::Relaxed) {
            return self.send_singly(&outgoing, segment, contents);
        }
        let train = segment.saturating_mul((TRAIN_BYTES_MAX / segment).clamp(1, TRAIN_SEGMENTS_MAX));
        let mut lost = 0;
        for (number, part) in contents.chunks(train).enumerate() {
            let gso = (part.len() > segment).then_some(segment);
            match outgoing.send(self.socket.as_fd(), part, gso) {
                Ok(()) => {}
                // EIO: the route's device cannot checksum. EINVAL: old kernels, and trains over too small an MTU.
                Err(error)
                    if gso.is_some() && matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL)) =>
                {
                    lost += self.send_singly(&outgoing, segment, part)?;
                    // Single datagrams pass: it was the train that the kernel did not like.
                    self.gso_off.store(true, Ordering::Relaxed);
                }
                Err(error) if number > 0 && error.kind() == io::ErrorKind::WouldBlock => {
                    let sent = (number * train).min(contents.len());
                    return Ok(lost + (contents.len() - sent).div_ceil(segment));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(lost)
    }

    fn send_singly(
        &self,
        outgoing: &message::Outgoing,
        segment: usize,
        contents: &[u8],
    ) -> io::Result<usize> {
        let count = contents.len().div_ceil(segment);
        for (number, datagram) in contents.chunks(segment).enumerate() {
            match outgoing.send(self.socket.as_fd(), datagram, None) {
                Ok(()) => {}
                // To report it would make the caller send the first ones again and again.
                Err(error) if number > 0 && error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(count - number);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(0)
    }

    /// Receives up to [`RECEIVE_BATCH_MAX`] datagrams or trains, one per buffer, and returns how many.
    /// Buffers should have 65,535 bytes: a merged train that does not fit is cut. `WouldBlock` when there is
    /// nothing.
    pub fn recv(&self, buffers: &mut [IoSliceMut<'_>], metas: &mut [RecvMeta]) -> io::Result<usize> {
        message::receive(self.socket.as_fd(), buffers, metas)
    }

    /// Takes a pending ICMP error (connection refused, host unreachable…) off the socket, if there is one. Errors
    /// also come out of [`UdpSocket::send`] and [`UdpSocket::recv`]; none of them is about the datagram at hand.
    pub fn take_error(&self) -> io::Result<Option<io::Error>> {
        self.socket.take_error()
    }
}

impl AsFd for UdpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Checks that nobody has this UDP port, by binding it for a moment without SO_REUSEPORT: a second instance,
/// which shares ports happily, would otherwise take a part of the traffic. Port 0 is always free.
pub fn probe_port_free(local: SocketAddr, device: Option<&str>) -> Result<()> {
    if local.port() == 0 {
        return Ok(());
    }
    let options = UdpOptions { device: device.map(str::to_owned), buffer_bytes: 0, ..UdpOptions::new(local) };
    match UdpSocket::bind(&options) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(error)
            .context(format_args!("UDP port {} is taken; is another instance running?", local.port())),
        Err(error) => Err(error).context(format_args!("bind UDP {local}")),
    }
}

/// TTL and hop limit of what sockets send, whatever the host's default: receivers count routers by it.
pub const TTL: u8 = 64;

fn set_ip_options(socket: &Socket, ipv4: bool, ipv6: bool) -> io::Result<()> {
    const ON: libc::c_int = 1;
    // PROBE: DF is set, and an ICMP "too big" (which anybody can forge) changes nothing for us.
    if ipv4 {
        set_option(socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, &libc::IP_PMTUDISC_PROBE)?;
        set_option(socket, libc::IPPROTO_IP, libc::IP_PKTINFO, &ON)?;
        set_option(socket, libc::IPPROTO_IP, libc::IP_RECVTOS, &ON)?;
        set_option(socket, libc::IPPROTO_IP, libc::IP_RECVTTL, &ON)?;
        set_option(socket, libc::IPPROTO_IP, libc::IP_TTL, &libc::c_int::from(TTL))?;
    }
    if ipv6 {
        set_option(socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, &libc::IPV6_PMTUDISC_PROBE)?;
        set_option(socket, libc::IPPROTO_IPV6, libc::IPV6_DONTFRAG, &ON)?;
        set_option(socket, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, &ON)?;
        set_option(socket, libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, &ON)?;
        set_option(socket, libc::IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT, &ON)?;
        set_option(socket, libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, &libc::c_int::from(TTL))?;
    }
    // Linux 5.0; without it every datagram comes alone, which is slower but right.
    if let Err(error) = set_option(socket, libc::SOL_UDP, libc::UDP_GRO, &ON) {
        tracing::debug!(%error, "this kernel has no UDP GRO");
    }
    Ok(())
}

fn set_buffers(socket: &Socket, bytes: usize) -> io::Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    let value = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    // FORCE passes the administrator's limit but needs CAP_NET_ADMIN; the plain option is cut to the limit.
    for (force, plain) in [(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF), (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)] {
        if set_option(socket, libc::SOL_SOCKET, force, &value).is_err() {
            set_option(socket, libc::SOL_SOCKET, plain, &value)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
