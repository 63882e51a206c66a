//! Raw Ethernet frames of one interface, for the link emulator: what arrives there is read, what is written
//! leaves there.

use std::io;
use std::mem::{MaybeUninit, size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use crate::Result;
use crate::error::Context;
use crate::sys::{check, check_size, interface_index, owned, set_option};

/// Bytes of the virtio header in front of each frame of a [`PacketSocket`] opened with it.
pub const VNET_HEADER_BYTES: usize = 10;

/// The filter for ARP and neighbor discovery, on Ethernet frames without VLAN tag: type at 12; of IPv6 the next header at 20
/// and the ICMPv6 type at 54.
const DISCOVERY: [libc::sock_filter; 10] = {
    const LOAD_HALF: u16 = (libc::BPF_LD | libc::BPF_H | libc::BPF_ABS) as u16;
    const LOAD_BYTE: u16 = (libc::BPF_LD | libc::BPF_B | libc::BPF_ABS) as u16;
    const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const AT_LEAST: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
    const GREATER: u16 = (libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    const fn code(code: u16, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
        libc::sock_filter { code, jt, jf, k }
    }
    [
        code(LOAD_HALF, 12, 0, 0),
        code(EQUAL, 0x0806, 7, 0),
        code(EQUAL, 0x86dd, 0, 5),
        code(LOAD_BYTE, 20, 0, 0),
        code(EQUAL, 58, 0, 3),
        code(LOAD_BYTE, 54, 0, 0),
        code(AT_LEAST, 133, 0, 1),
        code(GREATER, 137, 0, 1),
        code(RETURN, 0, 0, 0),
        code(RETURN, u32::MAX, 0, 0),
    ]
};

/// A non-blocking AF_PACKET socket on one interface. It sees the frames that arrive, not those it or others send.
#[derive(Debug)]
pub struct PacketSocket {
    fd: OwnedFd,
    index: u32,
}

impl PacketSocket {
    /// Opens the interface of this name in the calling thread's namespace. `vnet_header`: a 10-byte virtio
    /// header stands in front of each frame, and super-frames pass whole with their partial checksums.
    /// Without it, frames that the kernel has not finished (a partial checksum, a super-frame) are finished
    /// or cut by the kernel. `promiscuous`: also frames to other hardware addresses. Needs CAP_NET_RAW.
    pub fn open(interface: &str, vnet_header: bool, promiscuous: bool) -> Result<PacketSocket> {
        let what = format!("open a packet socket on {interface}");
        let index = interface_index(interface).context(&what)?;
        // Protocol 0: nothing arrives before the socket is bound to its interface.
        // SAFETY: no pointers are passed.
        let fd = owned(unsafe {
            libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0)
        })
        .context(&what)?;
        const ON: libc::c_int = 1;
        set_option(&fd, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, &ON).context(&what)?;
        if vnet_header {
            set_option(&fd, libc::SOL_PACKET, libc::PACKET_VNET_HDR, &ON).context(&what)?;
        }
        // SAFETY: an all-zero sockaddr_ll is valid.
        let mut address: libc::sockaddr_ll = unsafe { zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = index.cast_signed();
        let bytes = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: the address lives for the call and has this length.
        check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), bytes) }).context(&what)?;
        if promiscuous {
            // SAFETY: an all-zero packet_mreq is valid.
            let mut membership: libc::packet_mreq = unsafe { zeroed() };
            membership.mr_ifindex = index.cast_signed();
            membership.mr_type = libc::PACKET_MR_PROMISC as u16;
            set_option(&fd, libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &membership).context(&what)?;
        }
        Ok(PacketSocket { fd, index })
    }

    /// Opens the interface for what neighbors say to each other: ARP and IPv6 neighbor discovery (ICMPv6 133–137), to this
    /// host, to all, or to another hardware address: answers to what was sent with a shared one. The kernel's own stack gets
    /// what is for it too. Needs CAP_NET_RAW.
    pub fn open_neighbor_discovery(interface: &str) -> Result<PacketSocket> {
        let socket = Self::open(interface, false, true)?;
        set_option(
            &socket.fd,
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            &libc::sock_fprog { len: DISCOVERY.len() as u16, filter: DISCOVERY.as_ptr().cast_mut() },
        )
        .context(format_args!("listen to the neighbors of {interface}"))?;
        // What came in before the filter was there.
        let mut other = [0; 1];
        while socket.receive(&mut other).is_ok() {}
        Ok(socket)
    }

    /// Index of its interface.
    pub fn interface(&self) -> u32 {
        self.index
    }

    /// Asks for kernel buffers of this size, each way; the kernel gives less without CAP_NET_ADMIN.
    pub fn set_buffers(&self, bytes: usize) -> io::Result<()> {
        let value = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
        for (force, plain) in
            [(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF), (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)]
        {
            if set_option(&self.fd, libc::SOL_SOCKET, force, &value).is_err() {
                set_option(&self.fd, libc::SOL_SOCKET, plain, &value)?;
            }
        }
        Ok(())
    }

    /// Reads one frame (the virtio header first, if opened with it). `WouldBlock` when there is none,
    /// `NetworkDown` once when the interface goes down. What does not fit the buffer is cut.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        // SAFETY: the kernel writes at most `buffer.len()` bytes.
        check_size(unsafe { libc::recv(self.fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) })
    }

    /// Reads up to 32 frames, one per buffer, with one system call; `lengths` tells their bytes. Returns how
    /// many.
    pub fn receive_many(
        &self,
        buffers: &mut [io::IoSliceMut<'_>],
        lengths: &mut [usize],
    ) -> io::Result<usize> {
        const BATCH: usize = 32;
        let count = buffers.len().min(lengths.len()).min(BATCH);
        let mut messages = [const { MaybeUninit::<libc::mmsghdr>::uninit() }; BATCH];
        for (message, buffer) in messages.iter_mut().zip(buffers.iter_mut()).take(count) {
            // SAFETY: an all-zero mmsghdr is valid.
            let mut empty: libc::mmsghdr = unsafe { zeroed() };
            empty.msg_hdr.msg_iov = std::ptr::from_mut(buffer).cast();
            empty.msg_hdr.msg_iovlen = 1;
            message.write(empty);
        }
        // SAFETY: the first `count` messages are initialised; each points at one live buffer with its true
        // length.
        let result = unsafe {
            libc::recvmmsg(
                self.fd.as_raw_fd(),
                messages.as_mut_ptr().cast(),
                count as _,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        };
        let received = check_size(result as isize)?;
        for (message, length) in messages.iter().zip(lengths.iter_mut()).take(received) {
            // SAFETY: this message was initialised above.
            *length = unsafe { message.assume_init_ref() }.msg_len as usize;
        }
        Ok(received)
    }

    /// Sends one frame out of the interface (the virtio header first, if opened with it).
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        // SAFETY: the kernel reads `frame.len()` bytes.
        check_size(unsafe { libc::send(self.fd.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) })
            .map(drop)
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests;
