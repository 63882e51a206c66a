//! The `msghdr` side of a UDP socket: addresses and control messages, out and in.

use std::io::{self, IoSliceMut};
use std::mem::{MaybeUninit, size_of, zeroed};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};

use super::{RECEIVE_BATCH_MAX, RecvMeta};
use crate::sys::check_size;

/// Room for control messages: packet info (IPv6's is the larger), traffic class, hop limit, GRO size; twice for dual stack.
const CONTROL_BYTES: usize = 256;

#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control([u8; CONTROL_BYTES]);

/// Destination, source and ECN in the kernel's form: made once per train, used for each part of it.
pub(super) struct Outgoing {
    address: Address,
    address_bytes: libc::socklen_t,
    control: Control,
    control_bytes: usize,
}

#[repr(C)]
#[derive(Clone, Copy)]
union Address {
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

impl Outgoing {
    /// `ipv6`: the socket is an IPv6 one, which wants IPv4 addresses in mapped form.
    pub(super) fn new(ipv6: bool, to: SocketAddr, source: Option<IpAddr>, ecn: u8) -> Outgoing {
        let (address, address_bytes) = address(ipv6, to);
        let mut out =
            Outgoing { address, address_bytes, control: Control([0; CONTROL_BYTES]), control_bytes: 0 };
        // A mapped destination is handled by the kernel's IPv4 side, which reads IPv4 control messages.
        match (to.ip().to_canonical(), source.map(|source| source.to_canonical())) {
            (IpAddr::V4(_), Some(IpAddr::V4(source))) => {
                let info = libc::in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: libc::in_addr { s_addr: u32::from_ne_bytes(source.octets()) },
                    ipi_addr: libc::in_addr { s_addr: 0 },
                };
                out.push(libc::IPPROTO_IP, libc::IP_PKTINFO, info);
            }
            (IpAddr::V6(_), Some(IpAddr::V6(source))) => {
                let info = libc::in6_pktinfo {
                    ipi6_addr: libc::in6_addr { s6_addr: source.octets() },
                    ipi6_ifindex: 0,
                };
                out.push(libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, info);
            }
            // No source, or one of the other family, which could never be used: the kernel chooses.
            _ => {}
        }
        if ecn != 0 {
            let class = libc::c_int::from(ecn);
            match to.ip().to_canonical() {
                IpAddr::V4(_) => out.push(libc::IPPROTO_IP, libc::IP_TOS, class),
                IpAddr::V6(_) => out.push(libc::IPPROTO_IPV6, libc::IPV6_TCLASS, class),
            }
        }
        out
    }

    fn push<T: Copy>(&mut self, level: libc::c_int, kind: libc::c_int, value: T) {
        self.control_bytes = append(&mut self.control, self.control_bytes, level, kind, value);
    }

    /// One `sendmsg`.
    pub(super) fn send(
        &self,
        fd: BorrowedFd<'_>,
        contents: &[u8],
        segment_bytes: Option<usize>,
    ) -> io::Result<()> {
        let mut control = self.control;
        let mut control_bytes = self.control_bytes;
        if let Some(segment) = segment_bytes {
            let segment = u16::try_from(segment).map_err(|_| io::Error::from_raw_os_error(libc::EMSGSIZE))?;
            control_bytes = append(&mut control, control_bytes, libc::SOL_UDP, libc::UDP_SEGMENT, segment);
        }
        let mut piece =
            libc::iovec { iov_base: contents.as_ptr().cast_mut().cast(), iov_len: contents.len() };
        // SAFETY: an all-zero msghdr is valid (null pointers, zero lengths).
        let mut message: libc::msghdr = unsafe { zeroed() };
        message.msg_name = std::ptr::from_ref(&self.address).cast_mut().cast();
        message.msg_namelen = self.address_bytes;
        message.msg_iov = &raw mut piece;
        message.msg_iovlen = 1;
        if control_bytes > 0 {
            message.msg_control = control.0.as_mut_ptr().cast();
            message.msg_controllen = control_bytes as _;
        }
        loop {
            // SAFETY: all pointers in `message` lead to locals or to `self` and `contents`, which the kernel
            // only reads.
            let result = check_size(unsafe { libc::sendmsg(fd.as_raw_fd(), &message, libc::MSG_NOSIGNAL) });
            match result {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

const fn align(bytes: usize) -> usize {
    (bytes + size_of::<usize>() - 1) & !(size_of::<usize>() - 1)
}

/// Appends one control message at `at`; returns the new length. `CONTROL_BYTES` holds the three that we ever
/// append.
fn append<T: Copy>(
    control: &mut Control,
    at: usize,
    level: libc::c_int,
    kind: libc::c_int,
    value: T,
) -> usize {
    let header = align(size_of::<libc::cmsghdr>());
    let end = at + header + align(size_of::<T>());
    assert!(end <= CONTROL_BYTES, "control messages are counted at compile time");
    // SAFETY: an all-zero cmsghdr is valid.
    let mut head: libc::cmsghdr = unsafe { zeroed() };
    head.cmsg_len = (header + size_of::<T>()) as _;
    head.cmsg_level = level;
    head.cmsg_type = kind;
    // SAFETY: `at..end` lies inside the array (asserted); unaligned writes need no alignment.
    unsafe {
        let place = control.0.as_mut_ptr().add(at);
        place.cast::<libc::cmsghdr>().write_unaligned(head);
        place.add(header).cast::<T>().write_unaligned(value);
    }
    end
}

fn address(ipv6: bool, to: SocketAddr) -> (Address, libc::socklen_t) {
    let (ip, flow, scope) = match to {
        SocketAddr::V4(to) if !ipv6 => {
            // SAFETY: an all-zero sockaddr_in is valid.
            let mut v4: libc::sockaddr_in = unsafe { zeroed() };
            v4.sin_family = libc::AF_INET as libc::sa_family_t;
            v4.sin_port = to.port().to_be();
            v4.sin_addr.s_addr = u32::from_ne_bytes(to.ip().octets());
            return (Address { v4 }, size_of::<libc::sockaddr_in>() as libc::socklen_t);
        }
        SocketAddr::V4(to) => (to.ip().to_ipv6_mapped(), 0, 0),
        SocketAddr::V6(to) => (*to.ip(), to.flowinfo(), to.scope_id()),
    };
    // SAFETY: an all-zero sockaddr_in6 is valid.
    let mut v6: libc::sockaddr_in6 = unsafe { zeroed() };
    v6.sin6_family = libc::AF_INET6 as libc::sa_family_t;
    v6.sin6_port = to.port().to_be();
    v6.sin6_addr.s6_addr = ip.octets();
    v6.sin6_flowinfo = flow;
    v6.sin6_scope_id = scope;
    (Address { v6 }, size_of::<libc::sockaddr_in6>() as libc::socklen_t)
}

/// One `recvmmsg`.
pub(super) fn receive(
    fd: BorrowedFd<'_>,
    buffers: &mut [IoSliceMut<'_>],
    metas: &mut [RecvMeta],
) -> io::Result<usize> {
    let count = buffers.len().min(metas.len()).min(RECEIVE_BATCH_MAX);
    let mut addresses = [MaybeUninit::<Address>::uninit(); RECEIVE_BATCH_MAX];
    let mut controls = [MaybeUninit::<Control>::uninit(); RECEIVE_BATCH_MAX];
    let mut messages = [const { MaybeUninit::<libc::mmsghdr>::uninit() }; RECEIVE_BATCH_MAX];
    for (index, buffer) in buffers.iter_mut().take(count).enumerate() {
        // SAFETY: an all-zero mmsghdr is valid.
        let mut message: libc::mmsghdr = unsafe { zeroed() };
        message.msg_hdr.msg_name = addresses[index].as_mut_ptr().cast();
        message.msg_hdr.msg_namelen = size_of::<Address>() as libc::socklen_t;
        // `IoSliceMut` is guaranteed to have the layout of an iovec.
        message.msg_hdr.msg_iov = std::ptr::from_mut(buffer).cast();
        message.msg_hdr.msg_iovlen = 1;
        message.msg_hdr.msg_control = controls[index].as_mut_ptr().cast();
        message.msg_hdr.msg_controllen = CONTROL_BYTES as _;
        messages[index].write(message);
    }
    let received = loop {
        // SAFETY: the first `count` messages are initialised and point at live buffers with their true lengths.
        let result = unsafe {
            libc::recvmmsg(
                fd.as_raw_fd(),
                messages.as_mut_ptr().cast(),
                count as _,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        };
        match check_size(result as isize) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => break result?,
        }
    };
    for (message, meta) in messages.iter().zip(metas).take(received) {
        // SAFETY: this message was initialised above and filled by the kernel, with its address and control
        // bytes.
        *meta = unsafe { read_meta(message.assume_init_ref()) };
    }
    Ok(received)
}

/// # Safety
/// The kernel has filled this message; its name and control pointers are still valid.
unsafe fn read_meta(message: &libc::mmsghdr) -> RecvMeta {
    let header = &message.msg_hdr;
    let bytes = message.msg_len as usize;
    let mut meta = RecvMeta {
        bytes,
        stride: bytes,
        truncated: header.msg_flags & libc::MSG_TRUNC != 0,
        ..RecvMeta::default()
    };
    // SAFETY: the kernel wrote `msg_namelen` bytes there; both families' structures fit into `Address`.
    if let Some(from) = unsafe { read_address(header.msg_name.cast(), header.msg_namelen) } {
        meta.from = from;
    }
    // SAFETY: the kernel wrote `msg_controllen` bytes of well-formed control messages.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(header) };
    #[allow(clippy::unnecessary_cast, reason = "the field has 32 bits with musl")]
    let end = header.msg_control as usize + header.msg_controllen as usize;
    while !next.is_null() {
        // SAFETY: `next` lies inside the control buffer, with a whole header, and its length was checked against what is left.
        unsafe {
            #[allow(clippy::unnecessary_cast, reason = "the field has 32 bits with musl")]
            let length = (*next).cmsg_len as usize;
            if length < size_of::<libc::cmsghdr>() || length > end.saturating_sub(next as usize) {
                break;
            }
            read_control(&*next, libc::CMSG_DATA(next), &mut meta);
            next = libc::CMSG_NXTHDR(header, next);
        }
    }
    meta
}

/// # Safety
/// `data` leads to the payload of this control message, all of which lies in its buffer.
unsafe fn read_control(head: &libc::cmsghdr, data: *const u8, meta: &mut RecvMeta) {
    #[allow(clippy::unnecessary_cast, reason = "the field has 32 bits with musl")]
    let payload = (head.cmsg_len as usize).saturating_sub(align(size_of::<libc::cmsghdr>()));
    match (head.cmsg_level, head.cmsg_type) {
        (libc::IPPROTO_IP, libc::IP_PKTINFO) if payload >= size_of::<libc::in_pktinfo>() => {
            // SAFETY: length checked.
            let info = unsafe { data.cast::<libc::in_pktinfo>().read_unaligned() };
            meta.local_ip = Some(Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes()).into());
            meta.interface = u32::try_from(info.ipi_ifindex).ok().filter(|index| *index != 0);
        }
        (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) if payload >= size_of::<libc::in6_pktinfo>() => {
            // SAFETY: length checked.
            let info = unsafe { data.cast::<libc::in6_pktinfo>().read_unaligned() };
            let ip = IpAddr::V6(Ipv6Addr::from(info.ipi6_addr.s6_addr)).to_canonical();
            // A dual-stack socket reports an IPv4 datagram both ways; the IPv4 form names the true local address.
            if meta.local_ip.is_none() || ip.is_ipv6() {
                meta.local_ip = Some(ip);
            }
            meta.interface = Some(info.ipi6_ifindex).filter(|index| *index != 0);
        }
        // The kernel gives one byte for IPv4, an int for IPv6.
        (libc::IPPROTO_IP, libc::IP_TOS) if payload >= 1 => {
            // SAFETY: length checked.
            meta.ecn = unsafe { data.read() } & 3;
        }
        (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) if payload >= 4 => {
            // SAFETY: length checked.
            meta.ecn = (unsafe { data.cast::<u32>().read_unaligned() } & 3) as u8;
        }
        (libc::IPPROTO_IP, libc::IP_TTL) | (libc::IPPROTO_IPV6, libc::IPV6_HOPLIMIT) if payload >= 4 => {
            // SAFETY: length checked.
            let ttl = unsafe { data.cast::<libc::c_int>().read_unaligned() };
            meta.ttl = u8::try_from(ttl).ok();
        }
        (libc::SOL_UDP, libc::UDP_GRO) if payload >= 4 => {
            // SAFETY: length checked.
            let size = unsafe { data.cast::<libc::c_int>().read_unaligned() };
            if let Ok(stride) = usize::try_from(size)
                && stride > 0
            {
                meta.stride = stride.min(meta.bytes);
            }
        }
        _ => {}
    }
}

/// # Safety
/// `bytes` bytes at `address` are initialised.
unsafe fn read_address(address: *const Address, bytes: libc::socklen_t) -> Option<SocketAddr> {
    let bytes = bytes as usize;
    if bytes < size_of::<libc::sockaddr_in>() {
        return None;
    }
    // SAFETY: the family is the first field of both.
    let family = unsafe { (*address).v4.sin_family };
    match i32::from(family) {
        libc::AF_INET => {
            // SAFETY: length and family checked.
            let v4 = unsafe { (*address).v4 };
            let ip = Ipv4Addr::from(v4.sin_addr.s_addr.to_ne_bytes());
            Some(SocketAddrV4::new(ip, u16::from_be(v4.sin_port)).into())
        }
        libc::AF_INET6 if bytes >= size_of::<libc::sockaddr_in6>() => {
            // SAFETY: length and family checked.
            let v6 = unsafe { (*address).v6 };
            let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
            let port = u16::from_be(v6.sin6_port);
            Some(match ip.to_ipv4_mapped() {
                Some(ip) => SocketAddrV4::new(ip, port).into(),
                None => SocketAddrV6::new(ip, port, 0, v6.sin6_scope_id).into(),
            })
        }
        _ => None,
    }
}

/// Reading what a reception brought beside the datagram, for the fuzzer.
pub(crate) mod testing {
    use super::*;

    /// Size of each datagram but the last, in so many bytes that came with this address and these control messages.
    #[must_use]
    pub fn reception(address: &[u8], control: &[u8], bytes: u32) -> usize {
        // SAFETY: all-zero structures are valid.
        let (mut message, mut name): (libc::mmsghdr, Address) = unsafe { (zeroed(), zeroed()) };
        let mut buffer = Control([0; CONTROL_BYTES]);
        let (name_bytes, control_bytes) =
            (address.len().min(size_of::<Address>()), control.len().min(CONTROL_BYTES));
        if let (Some(to), Some(from)) = (buffer.0.get_mut(..control_bytes), control.get(..control_bytes)) {
            to.copy_from_slice(from);
        }
        // SAFETY: source and destination have so many bytes, and any bytes are an address.
        unsafe { std::ptr::copy_nonoverlapping(address.as_ptr(), (&raw mut name).cast(), name_bytes) };
        message.msg_len = bytes;
        message.msg_hdr.msg_name = (&raw mut name).cast();
        message.msg_hdr.msg_namelen = name_bytes as libc::socklen_t;
        message.msg_hdr.msg_control = buffer.0.as_mut_ptr().cast();
        message.msg_hdr.msg_controllen = control_bytes as _;
        // SAFETY: name and control lead to live bytes of these lengths.
        unsafe { read_meta(&message) }.stride
    }
}
