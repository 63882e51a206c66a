//! The frames of a plain interface that are the datapath's, one ring per (interface, core).
//!
//! The kernel copies each frame into a memory-mapped ring (`PACKET_RX_RING`, TPACKET_V2), behind the socket
//! filter of a [`KernelShare`]. Super-packets (GRO, TSO) stay whole: what does not fit a slot waits in the
//! socket's queue (`PACKET_COPY_THRESH`) and is fetched with one system call per batch. In front of each frame
//! stands what the kernel knows of it: [`VirtioNetHeader`], whose positions count from the Ethernet header.
//! Packets of a device without link-layer header get an Ethernet header that names nobody.
//! The rings of an interface form a fanout group in core order. Why so: `docs/decisions/0006-packet-io.md`.

mod memory;

pub(crate) use memory::testing;

use std::io;
use std::mem::{MaybeUninit, size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use packet::vnet::VirtioNetHeader;

use self::memory::{Geometry, Memory};
use crate::Result;
use crate::bpf::{Instruction, KernelShare, SteeringProgram};
use crate::error::Context;
use crate::link_layer::{self, LinkLayer};
use crate::sys::{check, check_size, interface_index, option, owned, set_option};

/// Frames of one batch at most.
pub const BATCH_MAX: usize = 256;
/// Super-packets among them at most: each has a buffer of 64 KiB.
const LARGE_MAX: usize = 64;

/// Errors of the socket that are read while super-packets are fetched; an interface that goes down leaves one.
const ERRORS_MAX: u32 = 16;

/// Bytes of the virtio header in front of a frame.
const VNET_BYTES: usize = packet::vnet::VNET_HEADER_BYTES;
/// Extra bytes in front, so that the IP header of a frame begins at a multiple of 16.
const RESERVE_BYTES: libc::c_int = 6;
/// Bytes of the slot in front of the Ethernet header, rounded up: kernel's header, address, virtio header.
const SLOT_HEAD_BYTES: usize = 96;
/// A slot has at least so many bytes: an ordinary Ethernet frame.
const SLOT_BYTES_MIN: usize = 2048;
/// A slot that holds the largest super-packet.
pub const SLOT_BYTES_SUPER: usize = (SLOT_HEAD_BYTES + LARGE_BYTES).next_multiple_of(64);
/// The largest frame with its virtio header: a super-packet of 64 KiB behind an Ethernet header.
const LARGE_BYTES: usize = (VNET_BYTES + ETHERNET_BYTES + (64 << 10)).next_multiple_of(64);
/// Bytes of an Ethernet header.
const ETHERNET_BYTES: usize = 14;
/// The made-up Ethernet header is so much longer than the virtio header that it overwrites.
const HEADER_ROOM: usize = ETHERNET_BYTES - VNET_BYTES;
/// Super-packets that may wait in the socket's queue, in bytes of kernel memory.
const QUEUE_BYTES: usize = 32 << 20;

/// With which rings a ring shares the frames of its interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Group {
    /// With none: it gets everything.
    #[default]
    Alone,
    /// It is the first of a group of which nobody knows the number before ([`PacketRing::group`]), so that no other program,
    /// and no ring of before, is in it.
    New,
    /// With the group of this number, behind those that are in it.
    Of(u16),
}

/// How a group divides the frames among its sockets.
#[derive(Clone, Copy, Debug, Default)]
pub enum Fanout<'a> {
    /// By our flow hash and table: the owner's socket. The sockets must join in core order. When one is closed
    /// the last one takes its place: so they come and go with their group. Who may not load programs takes
    /// [`Fanout::Hash`], where frames come to any core.
    Steering(&'a SteeringProgram),
    /// By the kernel's flow hash, which is symmetric, and no one's secret table.
    #[default]
    Hash,
    /// In turn.
    RoundRobin,
    /// By the CPU on which the frame arrived.
    Cpu,
    /// At random.
    Random,
}

impl Fanout<'_> {
    fn kind(&self) -> libc::c_uint {
        match self {
            Fanout::Steering(_) => libc::PACKET_FANOUT_EBPF,
            Fanout::Hash => libc::PACKET_FANOUT_HASH,
            Fanout::RoundRobin => libc::PACKET_FANOUT_LB,
            Fanout::Cpu => libc::PACKET_FANOUT_CPU,
            Fanout::Random => libc::PACKET_FANOUT_RND,
        }
    }
}

/// How to open a [`PacketRing`].
#[derive(Clone, Debug)]
pub struct PacketRingOptions<'a> {
    /// Its fanout group.
    pub group: Group,
    /// How the group divides the frames; the same for all its members.
    pub fanout: Fanout<'a>,
    /// Memory of the ring.
    pub ring_bytes: usize,
    /// Bytes of a slot at least: 2,048 hold an ordinary frame; a larger MTU makes slots larger by itself. With
    /// [`SLOT_BYTES_SUPER`] super-packets fit as well and save a copy, for 32 times the memory.
    pub slot_bytes: usize,
    /// Packets that the ring leaves to the kernel.
    pub kernel: KernelShare,
    /// Nothing comes in before [`RingFilter::set_kernel_share`]: for rings that take the place of others.
    pub closed: bool,
}

impl Default for PacketRingOptions<'_> {
    fn default() -> Self {
        PacketRingOptions {
            group: Group::Alone,
            fanout: Fanout::Hash,
            ring_bytes: 4 << 20,
            slot_bytes: SLOT_BYTES_MIN,
            kernel: KernelShare::default(),
            closed: false,
        }
    }
}

/// A frame of the batch.
#[derive(Debug)]
pub struct Received<'a> {
    /// Offload metadata of the kernel: segmentation, partial checksum. Positions count from the start of `frame`.
    pub vnet: VirtioNetHeader,
    /// The frame from its Ethernet header, which has zeros for addresses where the device knows none; writable in place.
    pub frame: &'a mut [u8],
}

/// Where a frame of the batch lies.
#[derive(Clone, Copy, Debug)]
enum Place {
    /// In the ring: offset of the virtio header, bytes with it. Before it there are at least [`HEADER_ROOM`] bytes.
    Slot(usize, usize),
    /// In a buffer for super-packets: its number, bytes with the virtio header, which is behind [`HEADER_ROOM`] bytes where that is needed.
    Large(usize, usize),
}

/// One socket of an interface with its ring.
#[derive(Debug)]
pub struct PacketRing {
    fd: OwnedFd,
    group: Group,
    index: u32,
    layer: LinkLayer,
    memory: Memory,
    /// The next slot to look at.
    head: usize,
    /// Slots before `head` that are ours until [`PacketRing::release`].
    held: usize,
    places: Vec<Place>,
    /// Buffers for super-packets, [`LARGE_BYTES`] each.
    large: Vec<u8>,
    drops: u64,
    cut: u64,
}

impl PacketRing {
    /// Opens a ring on this interface of the calling thread's namespace. Needs CAP_NET_RAW.
    pub fn open(interface: &str, options: &PacketRingOptions<'_>) -> Result<PacketRing> {
        let what = format!("open a packet ring on {interface}");
        let index = interface_index(interface).context(&what)?;
        let layer = LinkLayer::of(interface).context(&what)?;
        let mtu_bytes = link_layer::mtu(interface).context(&what)?;
        let fd = open_socket().context(&what)?;
        let filter = options.kernel.filter(layer)?;
        // Nothing comes in before the socket is where it belongs.
        attach_filter(&fd, &[NOTHING]).context(&what)?;
        prepare(&fd).context(&what)?;
        let wanted = options.slot_bytes.clamp(SLOT_BYTES_MIN, SLOT_BYTES_SUPER);
        let slot_bytes = (SLOT_HEAD_BYTES + 18 + mtu_bytes).max(wanted).next_multiple_of(64);
        let memory = Memory::map(&fd, Geometry::of(options.ring_bytes, slot_bytes))
            .context(format_args!("{what}: its memory"))?;
        bind(&fd, index, libc::ETH_P_ALL as u16).context(&what)?;
        let group = join(&fd, options).context(format_args!("{what}: join its group"))?;
        if !options.closed {
            attach_filter(&fd, &filter).context(&what)?;
        }
        Ok(PacketRing {
            fd,
            group,
            index,
            layer,
            memory,
            head: 0,
            held: 0,
            places: Vec::with_capacity(BATCH_MAX),
            large: vec![0; LARGE_MAX * LARGE_BYTES],
            drops: 0,
            cut: 0,
        })
    }

    /// Index of its interface.
    pub fn interface(&self) -> u32 {
        self.index
    }

    /// Slots of the ring.
    pub fn slots(&self) -> usize {
        self.memory.geometry.slots
    }

    /// Group to which it belongs, for the next ring of it.
    pub fn group(&self) -> Group {
        self.group
    }

    /// Fetches up to `frames_max` (at most [`BATCH_MAX`]) frames that have arrived, in their order, and returns
    /// how many; 0 if there are none. The frames of the batch before are released. They stay where they are
    /// until [`PacketRing::release`] or the next call: give the slots back soon, the kernel drops frames while
    /// the ring is full.
    pub fn receive(&mut self, frames_max: usize) -> usize {
        self.release();
        let mut large = 0;
        let limit = frames_max.min(BATCH_MAX).min(self.slots());
        while self.held < limit && large < LARGE_MAX {
            let Some(slot) = self.memory.arrived(self.head) else { break };
            self.head = if self.head + 1 == self.slots() { 0 } else { self.head + 1 };
            self.held += 1;
            if slot.copied {
                self.places.push(Place::Large(large, VNET_BYTES + slot.frame_bytes));
                large += 1;
            } else if slot.kept_bytes < slot.frame_bytes {
                // The queue for super-packets was full.
                self.cut += 1;
            } else if let Some(room) = slot.frame_at.checked_sub(VNET_BYTES + HEADER_ROOM) {
                self.places.push(Place::Slot(room + HEADER_ROOM, VNET_BYTES + slot.kept_bytes));
            }
        }
        if large > 0 {
            self.fetch_large(large);
        }
        self.places.len()
    }

    /// Frames of the batch.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// No batch is held.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// The frames of the batch, all at once.
    pub fn frames(&mut self) -> impl ExactSizeIterator<Item = Received<'_>> {
        let ring = self.memory.start();
        let large = self.large.as_mut_ptr();
        let room = header_room(self.layer);
        self.places.iter().map(move |place| {
            let (start, bytes) = match *place {
                // SAFETY: `Memory::arrived` has checked that the frame lies in its slot with room before it, which is
                // ours while the batch is held.
                Place::Slot(at, bytes) => (unsafe { ring.add(at - room) }, bytes),
                // SAFETY: the buffer of this number exists, and the length was checked against it.
                Place::Large(number, bytes) => (unsafe { large.add(number * LARGE_BYTES) }, bytes),
            };
            // SAFETY: slots and buffers of a batch are distinct, each is handed out once, and nobody else
            // writes there while `self` is borrowed.
            let whole = unsafe { std::slice::from_raw_parts_mut(start, room + bytes) };
            if room == 0 {
                let (head, frame) = whole.split_at_mut(VNET_BYTES);
                return Received { vnet: VirtioNetHeader::parse(head).unwrap_or_default(), frame };
            }
            make_up_header(whole)
        })
    }

    /// One frame of the batch.
    pub fn frame(&mut self, number: usize) -> Option<Received<'_>> {
        self.frames().nth(number)
    }

    /// Gives the slots of the batch back to the kernel.
    pub fn release(&mut self) {
        self.places.clear();
        let slots = self.slots();
        for back in (1..=self.held).rev() {
            self.memory.give_back((self.head + slots - back) % slots);
        }
        self.held = 0;
    }

    /// Another handle of the ring's filter, for who does not have the ring.
    pub fn filter(&self) -> Result<RingFilter> {
        let fd = self.fd.try_clone().context("share the filter of a packet ring")?;
        Ok(RingFilter { fd, layer: self.layer })
    }

    /// Frames the kernel dropped because the ring was full, since it was opened (`PACKET_STATISTICS`).
    pub fn drops(&mut self) -> io::Result<u64> {
        // SAFETY: an all-zero tpacket_stats is valid.
        let mut stats: libc::tpacket_stats = unsafe { zeroed() };
        let mut bytes = size_of::<libc::tpacket_stats>() as libc::socklen_t;
        // SAFETY: both pointers lead to locals, and the length is that of the structure.
        check(unsafe {
            libc::getsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut stats).cast(),
                &raw mut bytes,
            )
        })?;
        // Reading sets it to zero.
        self.drops += u64::from(stats.tp_drops);
        Ok(self.drops)
    }

    /// Super-packets lost because too many waited in the socket's queue.
    pub fn cut(&self) -> u64 {
        self.cut
    }

    /// Takes the error that waits at the ring, if one does, so that it wakes nobody again: a link that was down for a moment
    /// leaves one behind ([`crate::event::Ready::failed`]). Frames are not lost by it.
    pub fn take_error(&self) -> Option<io::Error> {
        match rustix::net::sockopt::socket_error(&self.fd) {
            Ok(Ok(())) => None,
            Ok(Err(error)) | Err(error) => Some(error.into()),
        }
    }

    /// Reads the super-packets of the batch from the socket's queue, where they wait in the order of their
    /// slots.
    fn fetch_large(&mut self, count: usize) {
        let mut iovecs = [const { MaybeUninit::<libc::iovec>::uninit() }; BATCH_MAX];
        let mut messages = [const { MaybeUninit::<libc::mmsghdr>::uninit() }; BATCH_MAX];
        let room = header_room(self.layer);
        let buffers = self.large.chunks_exact_mut(LARGE_BYTES);
        for ((message, iovec), buffer) in messages.iter_mut().zip(&mut iovecs).zip(buffers).take(count) {
            let buffer = buffer.get_mut(room..).unwrap_or_default();
            let iovec =
                iovec.write(libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() });
            // SAFETY: an all-zero mmsghdr is valid.
            let mut empty: libc::mmsghdr = unsafe { zeroed() };
            empty.msg_hdr.msg_iov = iovec;
            empty.msg_hdr.msg_iovlen = 1;
            message.write(empty);
        }
        let (mut received, mut errors) = (0, 0);
        while received < count && errors < ERRORS_MAX {
            // SAFETY: the first `count` messages are initialised; each points at one live buffer with its true
            // length.
            let result = check_size(unsafe {
                libc::recvmmsg(
                    self.fd.as_raw_fd(),
                    messages.as_mut_ptr().add(received).cast(),
                    (count - received) as _,
                    libc::MSG_DONTWAIT as _,
                    std::ptr::null_mut(),
                )
            } as isize);
            match result {
                Ok(more) if more > 0 => received += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Not there: what the slot promised is lost.
                Ok(_) => break,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // What happened to the link, told once; what waits behind it belongs to these slots and to no later ones.
                Err(_) => errors += 1,
            }
        }
        let before = self.places.len();
        self.places.retain(|place| match *place {
            Place::Slot(..) => true,
            Place::Large(number, bytes) => messages.get(number).is_some_and(|message| {
                // SAFETY: the first `count` messages were initialised, and numbers are below `count`.
                let length = unsafe { message.assume_init_ref() }.msg_len as usize;
                number < received && length == bytes && room + bytes <= LARGE_BYTES
            }),
        });
        self.cut += (before - self.places.len()) as u64;
    }
}

/// The filter of a [`PacketRing`], which may be in another thread. The socket stays open as long as this is there.
#[derive(Debug)]
pub struct RingFilter {
    fd: OwnedFd,
    layer: LinkLayer,
}

impl RingFilter {
    /// Lets nothing in any more: the ring's place in its group, if somebody still holds it, is an empty one.
    pub fn close(&self) -> Result<()> {
        attach_filter(&self.fd, &[NOTHING]).context("close a packet ring")
    }

    /// Says anew what is left to the kernel, from the next frame on.
    pub fn set_kernel_share(&self, kernel: &KernelShare) -> Result<()> {
        attach_filter(&self.fd, &kernel.filter(self.layer)?).context("change the filter of a packet ring")
    }
}

impl AsFd for PacketRing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Bytes before the virtio header that the made-up Ethernet header of a device's packets needs.
fn header_room(layer: LinkLayer) -> usize {
    match layer {
        LinkLayer::Ethernet => 0,
        LinkLayer::None => HEADER_ROOM,
    }
}

/// Writes an Ethernet header without addresses in front of an IP packet, where room and virtio header are.
fn make_up_header(whole: &mut [u8]) -> Received<'_> {
    let vnet = whole.get(HEADER_ROOM..).unwrap_or_default();
    let vnet = VirtioNetHeader::parse(vnet).unwrap_or_default();
    let is_ipv6 = whole.get(ETHERNET_BYTES).is_some_and(|byte| byte >> 4 == 6);
    if let Some(header) = whole.first_chunk_mut::<ETHERNET_BYTES>() {
        *header = [0; ETHERNET_BYTES];
        let [.., high, low] = header;
        let kind = if is_ipv6 { libc::ETH_P_IPV6 } else { libc::ETH_P_IP };
        [*high, *low] = (kind as u16).to_be_bytes();
    }
    Received { vnet: vnet.with_front(ETHERNET_BYTES as u16), frame: whole }
}

/// A filter that lets nothing in.
const NOTHING: Instruction = Instruction { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: 0 };

/// A packet socket that is bound to nothing yet (protocol 0), without virtio headers. `SOCK_RAW`: link-layer headers are the
/// caller's; `SOCK_DGRAM`: the kernel's.
pub(crate) fn open_plain_socket(kind: libc::c_int) -> io::Result<OwnedFd> {
    let kind = kind | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no pointers are passed.
    owned(unsafe { libc::socket(libc::AF_PACKET, kind, 0) })
}

/// A packet socket that is bound to nothing yet, with a virtio header in front of each frame.
pub(crate) fn open_socket() -> io::Result<OwnedFd> {
    let fd = open_plain_socket(libc::SOCK_RAW)?;
    const ON: libc::c_int = 1;
    set_option(&fd, libc::SOL_PACKET, libc::PACKET_VNET_HDR, &ON)?;
    Ok(fd)
}

/// Binds a packet socket to an interface; protocol 0 receives nothing.
pub(crate) fn bind(fd: &OwnedFd, index: u32, protocol: u16) -> io::Result<()> {
    // SAFETY: an all-zero sockaddr_ll is valid.
    let mut address: libc::sockaddr_ll = unsafe { zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = index.cast_signed();
    let bytes = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the address lives for the call and has this length.
    check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), bytes) }).map(drop)
}

/// A kernel buffer of this size; the limit of the system counts only without CAP_NET_ADMIN.
pub(crate) fn set_buffer(
    fd: &OwnedFd,
    force: libc::c_int,
    plain: libc::c_int,
    bytes: usize,
) -> io::Result<()> {
    let value = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    set_option(fd, libc::SOL_SOCKET, force, &value)
        .or_else(|_| set_option(fd, libc::SOL_SOCKET, plain, &value))
}

/// All that must be said before the ring is made.
fn prepare(fd: &OwnedFd) -> io::Result<()> {
    const ON: libc::c_int = 1;
    const VERSION: libc::c_int = libc::tpacket_versions::TPACKET_V2 as libc::c_int;
    set_option(fd, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, &ON)?;
    set_option(fd, libc::SOL_PACKET, libc::PACKET_VERSION, &VERSION)?;
    set_option(fd, libc::SOL_PACKET, libc::PACKET_RESERVE, &RESERVE_BYTES)?;
    // Frames that do not fit a slot are also queued whole.
    set_option(fd, libc::SOL_PACKET, libc::PACKET_COPY_THRESH, &ON)?;
    set_buffer(fd, libc::SO_RCVBUFFORCE, libc::SO_RCVBUF, QUEUE_BYTES)
}

fn join(fd: &OwnedFd, options: &PacketRingOptions<'_>) -> io::Result<Group> {
    let (number, unique) = match options.group {
        Group::Alone => return Ok(Group::Alone),
        Group::New => (0, libc::PACKET_FANOUT_FLAG_UNIQUEID),
        Group::Of(number) => (number, 0),
    };
    let kind = options.fanout.kind() | libc::PACKET_FANOUT_FLAG_IGNORE_OUTGOING | unique;
    let argument = libc::c_uint::from(number) | (kind << 16);
    set_option(fd, libc::SOL_PACKET, libc::PACKET_FANOUT, &argument)?;
    if let Fanout::Steering(program) = options.fanout {
        let program = program.as_fd().as_raw_fd();
        set_option(fd, libc::SOL_PACKET, libc::PACKET_FANOUT_DATA, &program)?;
    }
    let joined = option(fd, libc::SOL_PACKET, libc::PACKET_FANOUT)?;
    // The number is the low half.
    Ok(Group::Of(joined as u16))
}

fn program_of(code: &[Instruction]) -> libc::sock_fprog {
    libc::sock_fprog { len: u16::try_from(code.len()).unwrap_or(u16::MAX), filter: code.as_ptr().cast_mut() }
}

fn attach_filter(fd: &OwnedFd, code: &[Instruction]) -> io::Result<()> {
    set_option(fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program_of(code))
}

#[cfg(test)]
mod tests;
