//! Frames out of a plain interface: super-packets and partial checksums included, a batch per system call. Of a device without
//! link-layer header the IP packets behind their Ethernet headers leave.

use std::io;
use std::mem::{MaybeUninit, size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use packet::segment::{Segmenter, complete_checksum, complete_offloaded};
use packet::vnet::{GSO_NONE, VNET_HEADER_BYTES, VirtioNetHeader};

use crate::Result;
use crate::bpf::{INGRESS_MARK, OWN_MARK};
use crate::error::Context;
use crate::link_layer::{self, LinkLayer};
use crate::packet_ring::{bind, open_plain_socket, open_socket, set_buffer};
use crate::sys::{check_size, interface_index, set_option};

/// Frames of one system call.
const BATCH: usize = 64;
/// The virtio header and the parts.
const PIECES: usize = 1 + PARTS;
/// Bytes of an Ethernet header.
const ETHERNET_BYTES: usize = 14;
/// Parts of a [`SendFrame`].
pub const PARTS: usize = 3;
/// Bytes on their way for which the kernel answers, before it says "full".
const BUFFER_BYTES: usize = 16 << 20;

/// A frame to send: what of it the kernel or the device has to finish, and its bytes in up to [`PARTS`] parts
/// (empty ones count for nothing), the Ethernet header first, whole in the first part.
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

/// Form of what the kernel is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// Frames with their Ethernet header.
    Frames,
    /// IP packets, super-packets included.
    Packets,
    /// IP packets that need nothing more: in front of super-packets the kernel leaves no room for a header that the device writes.
    WholePackets,
}

/// A socket that sends out of one interface and receives nothing. One worker owns it.
#[derive(Debug)]
pub struct PacketSender {
    fd: OwnedFd,
    index: u32,
    form: Form,
}

impl PacketSender {
    /// Opens it on this interface of the calling thread's namespace. `bypass_queue`: frames go to the driver
    /// without the interface's queueing discipline (`PACKET_QDISC_BYPASS`); then there is no queue, and frames
    /// that the driver has no room for are lost. Needs CAP_NET_RAW.
    pub fn open(interface: &str, bypass_queue: bool) -> Result<PacketSender> {
        let what = format!("open a packet sender on {interface}");
        let form = match LinkLayer::of(interface).context(&what)? {
            LinkLayer::Ethernet => Form::Frames,
            LinkLayer::None if link_layer::writes_header(interface).context(&what)? => Form::WholePackets,
            LinkLayer::None => Form::Packets,
        };
        PacketSender::open_as(interface, form, bypass_queue)
    }

    fn open_as(interface: &str, form: Form, bypass_queue: bool) -> Result<PacketSender> {
        let what = format!("open a packet sender on {interface}");
        let index = interface_index(interface).context(&what)?;
        let fd = match form {
            Form::Frames | Form::Packets => open_socket(),
            Form::WholePackets => open_plain_socket(libc::SOCK_DGRAM),
        };
        let fd = fd.context(&what)?;
        let bypass = libc::c_int::from(bypass_queue);
        set_option(&fd, libc::SOL_PACKET, libc::PACKET_QDISC_BYPASS, &bypass).context(&what)?;
        set_buffer(&fd, libc::SO_SNDBUFFORCE, libc::SO_SNDBUF, BUFFER_BYTES).context(&what)?;
        bind(&fd, index, 0).context(&what)?;
        Ok(PacketSender { fd, index, form })
    }

    /// Marks its frames as the datapath's own, for the program at a guarded interface ([`crate::bpf::OwnPorts`]), which takes the
    /// mark away. Needs CAP_NET_ADMIN.
    pub fn set_own(&self) -> Result<()> {
        set_option(&self.fd, libc::SOL_SOCKET, libc::SO_MARK, &OWN_MARK).context("mark own frames")
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
        if self.form == Form::WholePackets {
            return self.send_whole(frames);
        }
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
                    if is_full(&error) {
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

    /// Sends packet by packet what the kernel must not have to finish. A frame of several packets counts once.
    fn send_whole(&self, frames: &[SendFrame<'_>]) -> Sent {
        let mut result = Sent::default();
        let mut whole = Vec::new();
        for frame in frames {
            let bare = Bare::of(frame, self.index);
            let sent = finish(&bare.frame, &mut whole, |packet| self.send_one(packet, &bare.address));
            match sent {
                Ok(()) => result.sent += 1,
                Err(error) if is_full(&error) => result.full += 1,
                Err(error) => {
                    result.refused += 1;
                    result.error = Some(error);
                }
            }
        }
        result
    }

    fn send_one(&self, packet: &[u8], address: &libc::sockaddr_ll) -> io::Result<()> {
        // SAFETY: the kernel reads the packet and the address, whose lengths are true.
        check_size(unsafe {
            libc::sendto(
                self.fd.as_raw_fd(),
                packet.as_ptr().cast(),
                packet.len(),
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
                std::ptr::from_ref(address).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        })
        .map(drop)
    }

    /// One `sendmmsg`; the error is that of the first frame.
    fn send_some(&self, frames: &[SendFrame<'_>]) -> io::Result<usize> {
        let mut pieces = [const { MaybeUninit::<[libc::iovec; PIECES]>::uninit() }; BATCH];
        let mut messages = [const { MaybeUninit::<libc::mmsghdr>::uninit() }; BATCH];
        let mut bare = [const { MaybeUninit::<Bare<'_>>::uninit() }; BATCH];
        let count = frames.len().min(BATCH);
        let places = pieces.iter_mut().zip(&mut messages).zip(&mut bare);
        for (frame, ((pieces, message), bare)) in frames.iter().zip(places) {
            let (frame, address) = match self.form {
                Form::Frames => (frame, None),
                Form::Packets | Form::WholePackets => {
                    let bare = bare.write(Bare::of(frame, self.index));
                    (&bare.frame, Some(&raw mut bare.address))
                }
            };
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
            if let Some(address) = address {
                one.msg_hdr.msg_name = address.cast();
                one.msg_hdr.msg_namelen = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            }
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

/// Whether there was no room: in the socket, or in the interface's queue.
fn is_full(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock || error.raw_os_error() == Some(libc::ENOBUFS)
}

/// Cuts a super-packet, completes checksums, and hands each packet on. The first error ends it.
fn finish(
    frame: &SendFrame<'_>,
    buffer: &mut Vec<u8>,
    mut each: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let wrong = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let vnet = VirtioNetHeader::parse(&frame.vnet).unwrap_or_default();
    let packet = frame.parts.concat();
    if vnet.gso_type == GSO_NONE {
        let mut packet = packet;
        complete_offloaded(&vnet, &mut packet).map_err(wrong)?;
        return each(&packet);
    }
    let segmenter = Segmenter::new(&vnet, &packet).map_err(wrong)?;
    for index in 0..segmenter.segments() {
        buffer.resize(segmenter.segment_bytes(index), 0);
        segmenter.write_segment(index, buffer);
        if segmenter.checksum_partial() {
            complete_checksum(buffer).map_err(wrong)?;
        }
        each(buffer)?;
    }
    Ok(())
}

/// An IP packet without link-layer header, and what the kernel wants to know of it.
struct Bare<'a> {
    frame: SendFrame<'a>,
    address: libc::sockaddr_ll,
}

impl<'a> Bare<'a> {
    /// The packet behind the Ethernet header of a frame.
    fn of(frame: &SendFrame<'a>, index: u32) -> Self {
        let [first, rest @ ..] = frame.parts;
        let (header, first) = first.split_at_checked(ETHERNET_BYTES).unwrap_or_default();
        let vnet = VirtioNetHeader::parse(&frame.vnet).unwrap_or_default();
        // SAFETY: an all-zero sockaddr_ll is valid.
        let mut address: libc::sockaddr_ll = unsafe { zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = index.cast_signed();
        if let [.., high, low] = header {
            address.sll_protocol = u16::from_ne_bytes([*high, *low]);
        }
        let [second, third] = rest;
        let vnet = vnet.without_front(ETHERNET_BYTES as u16).to_bytes();
        Self { frame: SendFrame { vnet, parts: [first, second, third] }, address }
    }
}

impl AsFd for PacketSender {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests;
