//! The memory that the kernel and a ring share (`PACKET_MMAP`, TPACKET_V2).

use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::sys::set_option;

/// A block is what the kernel allocates at once.
const BLOCK_BYTES: usize = 256 << 10;
/// A ring has at least so many blocks, and at most so much memory.
const BLOCKS_MIN: usize = 2;
const RING_BYTES_MAX: usize = 1 << 30;

/// How the memory is divided: blocks of slots, which do not cross block ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    /// Bytes of a slot, a multiple of 64.
    pub slot_bytes: usize,
    /// Slots of a block.
    pub per_block: usize,
    pub block_bytes: usize,
    pub blocks: usize,
    /// All slots.
    pub slots: usize,
}

impl Geometry {
    pub(super) fn of(ring_bytes: usize, slot_bytes: usize) -> Geometry {
        let block_bytes = BLOCK_BYTES.max(slot_bytes.next_multiple_of(BLOCK_BYTES));
        let blocks = (ring_bytes.min(RING_BYTES_MAX) / block_bytes).max(BLOCKS_MIN);
        let per_block = block_bytes / slot_bytes;
        Geometry { slot_bytes, per_block, block_bytes, blocks, slots: blocks * per_block }
    }

    fn offset(&self, slot: usize) -> usize {
        slot / self.per_block * self.block_bytes + slot % self.per_block * self.slot_bytes
    }
}

/// A slot that the kernel has filled.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arrived {
    /// Offset of the frame in the memory; at least as far from its slot's start as a virtio header is long, and
    /// [`super::HEADER_ROOM`].
    pub frame_at: usize,
    /// Bytes of the frame in the slot.
    pub kept_bytes: usize,
    /// Bytes of the frame.
    pub frame_bytes: usize,
    /// The whole frame is also in the socket's queue.
    pub copied: bool,
}

/// The mapping.
#[derive(Debug)]
pub(super) struct Memory {
    start: NonNull<u8>,
    bytes: usize,
    pub geometry: Geometry,
}

// SAFETY: the mapping belongs to this value alone and is reached only through it; no thread matters.
unsafe impl Send for Memory {}

impl Memory {
    pub(super) fn map(fd: &OwnedFd, geometry: Geometry) -> io::Result<Memory> {
        let wrong = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let request = libc::tpacket_req {
            tp_block_size: u32::try_from(geometry.block_bytes).map_err(wrong)?,
            tp_block_nr: u32::try_from(geometry.blocks).map_err(wrong)?,
            tp_frame_size: u32::try_from(geometry.slot_bytes).map_err(wrong)?,
            tp_frame_nr: u32::try_from(geometry.slots).map_err(wrong)?,
        };
        set_option(fd, libc::SOL_PACKET, libc::PACKET_RX_RING, &request)?;
        // SAFETY: a new mapping at an address that the kernel chooses.
        unsafe { Self::mapped(geometry, libc::MAP_SHARED, fd.as_raw_fd()) }
    }

    /// # Safety
    /// The descriptor's memory has the size of this geometry and is nobody else's.
    unsafe fn mapped(geometry: Geometry, flags: libc::c_int, fd: RawFd) -> io::Result<Memory> {
        let bytes = geometry.block_bytes * geometry.blocks;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, flags, fd, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(Memory { start, bytes, geometry })
    }

    /// Where the memory begins.
    pub(super) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    fn slot(&self, slot: usize) -> *mut u8 {
        debug_assert!(slot < self.geometry.slots, "slot {slot}");
        // SAFETY: all slots lie in the mapping; callers number them below `slots`.
        unsafe { self.start.as_ptr().add(self.geometry.offset(slot)) }
    }

    fn status(&self, slot: usize) -> &AtomicU32 {
        const { assert!(offset_of!(libc::tpacket2_hdr, tp_status) == 0) };
        // SAFETY: the status is the first word of a slot, which is aligned and shared with the kernel; it is
        // only ever used as an atomic.
        unsafe { AtomicU32::from_ptr(self.slot(slot).cast()) }
    }

    /// Packet that the kernel has put into this slot, if it has.
    pub(super) fn arrived(&self, slot: usize) -> Option<Arrived> {
        let status = self.status(slot).load(Ordering::Acquire);
        if status & libc::TP_STATUS_USER == 0 {
            return None;
        }
        let header = self.slot(slot).cast::<libc::tpacket2_hdr>();
        // SAFETY: the kernel has written the header and given us the slot.
        let (mac, kept, frame) = unsafe { ((*header).tp_mac, (*header).tp_snaplen, (*header).tp_len) };
        let (mac, kept) = (usize::from(mac), kept as usize);
        // The kernel keeps to its slot; a slice must not depend on it.
        let fits = mac >= size_of::<libc::tpacket2_hdr>() + super::VNET_BYTES + super::HEADER_ROOM
            && mac.saturating_add(kept) <= self.geometry.slot_bytes;
        Some(Arrived {
            frame_at: self.geometry.offset(slot) + mac,
            // What does not fit counts as cut.
            kept_bytes: if fits { kept } else { 0 },
            frame_bytes: if fits { frame as usize } else { u32::MAX as usize },
            copied: status & libc::TP_STATUS_COPY != 0,
        })
    }

    /// The kernel may fill this slot again.
    pub(super) fn give_back(&self, slot: usize) {
        self.status(slot).store(libc::TP_STATUS_KERNEL, Ordering::Release);
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made with this length, and nothing refers to it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

/// A ring without a socket, for the fuzzer.
pub(crate) mod testing {
    use super::*;

    /// Words of a slot as the kernel might write them.
    #[derive(Clone, Copy, Debug)]
    pub struct Slot {
        /// Bytes of the frame in the slot.
        pub kept_bytes: u32,
        /// Offset of the frame in the slot.
        pub mac: u16,
        /// Bytes of the frame.
        pub frame_bytes: u32,
        /// `TP_STATUS_…`.
        pub status: u32,
    }

    /// Writes these slots, one after the other, and reads them.
    ///
    /// # Panics
    /// When a frame that is found to be whole does not lie in its slot, with room for its headers in front.
    pub fn ring(slots: &[Slot]) {
        let geometry = Geometry::of(0, super::super::SLOT_BYTES_MIN);
        // SAFETY: anonymous memory is nobody else's.
        let memory = unsafe { Memory::mapped(geometry, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1) };
        let Ok(memory) = memory else { return };
        for (number, told) in slots.iter().enumerate() {
            // Every slot in turn, from the last one: behind it nothing is mapped.
            let number = geometry.slots - 1 - number % geometry.slots;
            let header = memory.slot(number).cast::<libc::tpacket2_hdr>();
            // SAFETY: the slot lies in the mapping, which is aligned and nobody else's.
            unsafe {
                ((*header).tp_mac, (*header).tp_snaplen, (*header).tp_len) =
                    (told.mac, told.kept_bytes, told.frame_bytes);
            }
            memory.status(number).store(told.status, Ordering::Release);
            let Some(arrived) = memory.arrived(number) else {
                assert!(told.status & libc::TP_STATUS_USER == 0, "a slot that is ours was left alone");
                continue;
            };
            let front = super::super::VNET_BYTES + super::super::HEADER_ROOM;
            let start = geometry.offset(number);
            let inside = arrived.frame_at >= start + front
                && arrived.frame_at + arrived.kept_bytes <= start + geometry.slot_bytes;
            assert!(inside || arrived.kept_bytes < arrived.frame_bytes, "{told:?}: {arrived:?}");
            memory.give_back(number);
        }
    }
}
