//! A multi-queue TUN device whose reads and writes are super-packets.
//!
//! [`Tun::create`] makes the interface with one queue per core; [`Tun::take_queues`] hands the queues to
//! the workers. Every packet read or written has a 10-byte `virtio_net_hdr` in front (little endian):
//! the kernel gives TCP and UDP super-packets of up to 64 KiB (TSO, USO) with partial checksums, and
//! takes such packets back. Which queue the kernel puts a packet on is decided by
//! [`Tun::attach_steering`], or else by the kernel's own flow table (a reply comes back on the queue that
//! wrote the flow, 4,096 flows, forgotten after 3 s).

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

use crate::error::Context;
use crate::sys::{check, interface_index, interface_name};
use crate::{Error, Result};

/// Bytes of the virtio header in front of every packet.
pub const VNET_HEADER_BYTES: usize = 10;

/// More queues than the kernel allows for one device (`MAX_TAP_QUEUES`).
pub const QUEUES_MAX: usize = 256;

// From linux/if_tun.h; libc has only some of them.
const TUNSETSTEERINGEBPF: libc::Ioctl = 0x8004_54e0u32 as libc::Ioctl;
const TUN_F_CSUM: libc::c_uint = 0x01;
const TUN_F_TSO4: libc::c_uint = 0x02;
const TUN_F_TSO6: libc::c_uint = 0x04;
const TUN_F_TSO_ECN: libc::c_uint = 0x08;
const TUN_F_USO4: libc::c_uint = 0x20;
const TUN_F_USO6: libc::c_uint = 0x40;

/// Kinds of super-packets that the kernel may hand over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offload {
    /// TCP and UDP super-packets.
    TcpAndUdp,
    /// TCP super-packets only (Linux before 6.2).
    Tcp,
    /// Partial checksums at most.
    None,
}

/// A TUN interface, or a TAP device with queues; it disappears when this and all its queues are dropped.
#[derive(Debug)]
pub struct Tun {
    name: String,
    index: u32,
    offload: Offload,
    /// Another handle of the first queue, for what concerns the whole device.
    control: OwnedFd,
    queues: Vec<TunQueue>,
    count: usize,
}

impl Tun {
    /// Creates the interface with `queues` queues (1–256), down and without address. The name may contain
    /// `%d` for the next free number. Fails if an interface of this name exists: two gateways
    /// that share one TUN would each see a part of the traffic.
    pub fn create(name: &str, queues: usize) -> Result<Tun> {
        Self::create_as(name, queues, libc::IFF_TUN)
    }

    /// As [`Tun::create`], a TAP device: an interface of Ethernet frames and super-frames.
    pub fn create_ethernet(name: &str, queues: usize) -> Result<Tun> {
        Self::create_as(name, queues, libc::IFF_TAP)
    }

    fn create_as(name: &str, queues: usize, layer: libc::c_int) -> Result<Tun> {
        let kind = if layer == libc::IFF_TAP { "TAP" } else { "TUN" };
        let what = format!("create the {kind} interface {name:?} with {queues} queues");
        if !(1..=QUEUES_MAX).contains(&queues) {
            let error = io::Error::new(io::ErrorKind::InvalidInput, format!("1 to {QUEUES_MAX} queues"));
            return Err(Error::new(what, error));
        }
        let (first, name) =
            open_queue(name, queues, layer | libc::IFF_TUN_EXCL).map_err(|error| explain(&what, error))?;
        let offload = set_offload(&first).context(format_args!("{what}: switch on its offloads"))?;
        let control = first.fd.try_clone().context(&what)?;
        let mut all = vec![first];
        while all.len() < queues {
            let (queue, _) = open_queue(&name, queues, layer).context(&what)?;
            all.push(queue);
        }
        let index = interface_index(&name).context(&what)?;
        Ok(Tun { name, index, offload, control, queues: all, count: queues })
    }

    /// The interface name as the kernel gave it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The interface index in the namespace it was created in.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Kinds of super-packets that the kernel agreed to hand over.
    pub fn offload(&self) -> Offload {
        self.offload
    }

    /// Number of queues it was created with.
    pub fn queue_count(&self) -> usize {
        self.count
    }

    /// The queues, in the order of their kernel number (what a steering program returns). Empty the second time.
    pub fn take_queues(&mut self) -> Vec<TunQueue> {
        std::mem::take(&mut self.queues)
    }

    /// Splits into the device (keep it: it carries the steering) and its queues.
    pub fn into_parts(mut self) -> (Tun, Vec<TunQueue>) {
        let queues = self.take_queues();
        (self, queues)
    }

    /// Lets this program choose the queue of every packet, in place of the kernel's flow table.
    /// Needs CAP_BPF (or root) to have loaded the program.
    pub fn attach_steering(&self, program: &crate::bpf::SteeringProgram) -> Result<()> {
        let program = program.as_fd().as_raw_fd();
        // SAFETY: the kernel reads one int through the pointer, which lives for the call.
        check(unsafe { libc::ioctl(self.control.as_raw_fd(), TUNSETSTEERINGEBPF, &raw const program) })
            .map(drop)
            .context(format_args!("set the steering program of {:?}", self.name))
    }
}

/// A TAP device with one queue and without offloads: an Ethernet interface whose frames this process reads and writes. It
/// disappears when this is dropped.
#[derive(Debug)]
pub struct Tap {
    name: String,
    index: u32,
    queue: TunQueue,
}

impl Tap {
    /// Creates the interface, down and without address. Fails if one of this name exists.
    pub fn create(name: &str) -> Result<Tap> {
        let what = format!("create the TAP interface {name:?}");
        let kind = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_TUN_EXCL;
        let (fd, name) = attach(name, kind).map_err(|error| explain(&what, error))?;
        let index = interface_index(&name).context(&what)?;
        Ok(Tap { name, index, queue: TunQueue { fd } })
    }

    /// The interface name as the kernel gave it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The interface index in the namespace it was created in.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Reads one frame that the kernel sends by this interface. `WouldBlock` when there is none; what does not fit the
    /// buffer is cut.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.queue.read(buffer)
    }

    /// Has the kernel receive one frame by this interface. `EIO` while it is down.
    pub fn write(&self, frame: &[u8]) -> io::Result<usize> {
        self.queue.write(frame)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.queue.as_fd()
    }
}

fn explain(what: &str, error: io::Error) -> Error {
    let hint = match error.raw_os_error() {
        Some(libc::EBUSY) => " (an interface of this name exists; is another instance running?)",
        Some(libc::EPERM | libc::EACCES) => " (needs root or CAP_NET_ADMIN)",
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => " (no /dev/net/tun: is the module tun loaded?)",
        _ => "",
    };
    Error::new(format!("{what}{hint}"), error)
}

/// `kind`: `IFF_TUN` or `IFF_TAP`, and `IFF_TUN_EXCL` for the first queue.
fn open_queue(name: &str, queues: usize, kind: libc::c_int) -> io::Result<(TunQueue, String)> {
    let mut kind = kind | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if queues > 1 {
        kind |= libc::IFF_MULTI_QUEUE;
    }
    let (fd, name) = attach(name, kind)?;
    set_int(&fd, libc::TUNSETVNETHDRSZ, VNET_HEADER_BYTES as libc::c_int)?;
    // Little endian on every machine, as `packet::vnet` writes it.
    set_int(&fd, libc::TUNSETVNETLE, 1)?;
    Ok((TunQueue { fd }, name))
}

/// Opens a device of a kind (`IFF_…`), making it if need be; its name as the kernel gave it.
fn attach(name: &str, kind: libc::c_int) -> io::Result<(OwnedFd, String)> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fd = rustix::fs::open("/dev/net/tun", flags, Mode::empty())?;
    let mut request = libc::ifreq {
        ifr_name: interface_name(name)?,
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: kind as libc::c_short },
    };
    // SAFETY: `request` is a complete ifreq that lives for the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    let name = request.ifr_name.iter().take_while(|byte| **byte != 0).map(|byte| *byte as u8).collect();
    let name = String::from_utf8(name).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    Ok((fd, name))
}

fn set_int(fd: &OwnedFd, request: libc::Ioctl, value: libc::c_int) -> io::Result<()> {
    // SAFETY: both requests read one int through the pointer, which lives for the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw const value) }).map(drop)
}

fn set_offload(queue: &TunQueue) -> io::Result<Offload> {
    let tcp = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
    let tries =
        [(tcp | TUN_F_USO4 | TUN_F_USO6, Offload::TcpAndUdp), (tcp, Offload::Tcp), (0, Offload::None)];
    let mut refused = io::Error::from_raw_os_error(libc::EINVAL);
    for (bits, offload) in tries {
        // SAFETY: this request takes its argument by value.
        match check(unsafe {
            libc::ioctl(queue.fd.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(bits))
        }) {
            Ok(_) => return Ok(offload),
            Err(error) => refused = error,
        }
    }
    Err(refused)
}

/// One queue of a TUN interface, non-blocking. One worker owns it.
#[derive(Debug)]
pub struct TunQueue {
    fd: OwnedFd,
}

impl TunQueue {
    /// Reads one packet or super-packet: a [`VNET_HEADER_BYTES`]-byte header, then the IP packet. Give room for
    /// 10 + 65,535 bytes: the kernel cuts what does not fit. `WouldBlock` when the queue is empty.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.fd, buffer)?)
    }

    /// Writes one packet or super-packet with its header in front. `EINVAL` for a header that does not fit
    /// the packet, `EIO` while the interface is down.
    pub fn write(&self, packet: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(&self.fd, packet)?)
    }

    /// As [`TunQueue::write`], gathering the packet from several pieces (at most 1,024).
    pub fn write_vectored(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        Ok(rustix::io::writev(&self.fd, pieces)?)
    }
}

impl AsFd for TunQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests;
