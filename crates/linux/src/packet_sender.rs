//! Frames out of a plain interface: super-packets and partial checksums included, a batch per system call.

use std::io;
use std::mem::{MaybeUninit, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use packet::vnet::VNET_HEADER_BYTES;

use crate::Result;
use crate::bpf::INGRESS_MARK;
use crate::error::Context;
use crate::packet_ring::{bind, open_socket, set_buffer};
use crate::sys::{check_size, interface_index, set_option};

/// Frames of one system call.
const BATCH: usize = 64;
/// The virtio header and the parts.
const PIECES: usize = 1 + PARTS;
/// Parts of a [`SendFrame`].
pub const PARTS: usize = 3;
/// Bytes on their way for which the kernel answers, before it says "full".
const BUFFER_BYTES: usize = 16 << 20;

/// A frame to send: what of it the kernel or the device has to finish, and its bytes in up to [`PARTS`] parts
/// (empty ones count for nothing), the Ethernet header first.
#[derive(Clone, Copy, Debug, Default)]
pub struct SendFrame<'a> {
    /// [`packet::vnet::VirtioNetHeader::to_bytes`]. Positions count from the Ethernet header.
    pub vnet: [u8; VNET_HEADER_BYTES],
    /// The frame.
    pub parts: [&'a [u8]; PARTS],
}

/// Outcome of a batch.
#[derive(Debug, Default)]
pub struct Sent {
    /// Frames the kernel took.
    pub sent: usize,
    /// Frames for which there was no room, in the socket or in the interface's queue (`EAGAIN`, `ENOBUFS`).
    pub full: usize,
    /// Frames the kernel refused: too long, a wrong virtio header, the interface is down.
    pub refused: usize,
    /// Why it refused the last one.
    pub error: Option<io::Error>,
}

/// A socket that sends out of one interface and receives nothing. One worker owns it.
#[derive(Debug)]
pub struct PacketSender {
    fd: OwnedFd,
    index: u32,
}

impl PacketSender {
    /// Opens it on this interface of the calling thread's namespace. `bypass_queue`: frames go to the driver
    /// without the interface's queueing discipline (`PACKET_QDISC_BYPASS`); then there is no queue, and frames
    /// that the driver has no room for are lost. Needs CAP_NET_RAW.
    pub fn open(interface: &str, bypass_queue: bool) -> Result<PacketSender> {
        let what = format!("open a packet sender on {interface}");
        let index = interface_index(interface).context(&what)?;
        let fd = open_socket().context(&what)?;
        let bypass = libc::c_int::from(bypass_queue);
        set_option(&fd, libc::SOL_PACKET, libc::PACKET_QDISC_BYPASS, &bypass).context(&what)?;
        set_buffer(&fd, libc::SO_SNDBUFFORCE, libc::SO_SNDBUF, BUFFER_BYTES).context(&what)?;
        bind(&fd, index, 0).context(&what)?;
        Ok(PacketSender { fd, index })
    }

    /// Opens one whose frames come in by the interface in place of leaving by it: for the host, as if they had just been received.
    /// Only where an [`IngressGuard`](crate::ingress_guard::IngressGuard) of kind `Program` is attached; otherwise they leave.
    /// Needs CAP_NET_RAW and CAP_NET_ADMIN.
    pub fn open_to_ingress(interface: &str) -> Result<PacketSender> {
        let sender = PacketSender::open(interface, false)?;
        set_option(&sender.fd, libc::SOL_SOCKET, libc::SO_MARK, &INGRESS_MARK)
            .context(format_args!("mark what comes in again by {interface}"))?;
        Ok(sender)
    }

    /// Index of its interface.
    pub fn interface(&self) -> u32 {
        self.index
    }

    /// Sends the frames in their order. Goes on behind a frame that the kernel refuses; when there is no room
    /// the rest counts as `full`.
    pub fn send_many(&self, frames: &[SendFrame<'_>]) -> Sent {
        let mut result = Sent::default();
        let mut rest = frames;
        while !rest.is_empty() {
            match self.send_some(rest) {
                Ok(count) => {
                    result.sent += count;
                    rest = rest.get(count..).unwrap_or_default();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    result.full += rest.len();
                    break;
                }
                Err(error) => {
                    if error.raw_os_error() == Some(libc::ENOBUFS) {
                        result.full += 1;
                    } else {
                        result.refused += 1;
                        result.error = Some(error);
                    }
                    rest = rest.get(1..).unwrap_or_default();
                }
            }
        }
        result
    }

    /// One `sendmmsg`; the error is that of the first frame.
    fn send_some(&self, frames: &[SendFrame<'_>]) -> io::Result<usize> {
        let mut pieces = [const { MaybeUninit::<[libc::iovec; PIECES]>::uninit() }; BATCH];
        let mut messages = [const { MaybeUninit::<libc::mmsghdr>::uninit() }; BATCH];
        let count = frames.len().min(BATCH);
        for ((frame, pieces), message) in frames.iter().zip(&mut pieces).zip(&mut messages) {
            let piece = |bytes: &[u8]| libc::iovec {
                iov_base: bytes.as_ptr().cast_mut().cast(),
                iov_len: bytes.len(),
            };
            let mut used = 1;
            let mut all = [piece(&frame.vnet); PIECES];
            for part in frame.parts.iter().filter(|part| !part.is_empty()) {
                if let Some(place) = all.get_mut(used) {
                    *place = piece(part);
                    used += 1;
                }
            }
            // SAFETY: an all-zero mmsghdr is valid.
            let mut one: libc::mmsghdr = unsafe { zeroed() };
            one.msg_hdr.msg_iov = pieces.write(all).as_mut_ptr();
            one.msg_hdr.msg_iovlen = used as _;
            message.write(one);
        }
        // SAFETY: the first `count` messages are initialised and lead to live bytes, which the kernel reads.
        let result = unsafe {
            libc::sendmmsg(
                self.fd.as_raw_fd(),
                messages.as_mut_ptr().cast(),
                count as _,
                (libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) as _,
            )
        };
        check_size(result as isize)
    }
}

impl AsFd for PacketSender {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests;
