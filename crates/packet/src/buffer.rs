//! A packet with room around it: whatever is put in front of it or behind it on its way is written in place.
//!
//! [`PacketBuf`] is owned memory, [`PacketPool`] keeps what is not in use. Packets that stay in memory of the kernel or of
//! a receive batch are worked on there, as slices; a packet gets a buffer of its own where it has to outlive the batch:
//! merged super-packets, hand-overs to another core, packets from one bond to another.

use crate::attachment::{Ingress, Placement, UnitVisit};
use crate::vnet::{VNET_HEADER_BYTES, VirtioNetHeader};

/// Bytes free in front of the packet: Ethernet with VLAN tag (18), or Ethernet (14) behind the cluster's headers (34), UDP over
/// IPv6 (48), and the tunnel's data header with a frame head (16 + 16).
pub const HEADROOM_BYTES: usize = 144;

/// Bytes free behind it: an AEAD tag, a cleartext length, padding.
pub const TAILROOM_BYTES: usize = 64;

/// Most bytes of a packet: the longest IPv6 packet.
pub const PACKET_BYTES_MAX: usize = crate::ip::IPV6_HEADER_BYTES + 65_535;

/// Packet bytes of a buffer for packets of ordinary size; MTUs up to 9,000 are usual, most are 1,500.
const SMALL_BYTES: usize = 2_048 - HEADROOM_BYTES - TAILROOM_BYTES;

/// One packet or super-packet, its offload header, and where it came in.
#[derive(Debug)]
pub struct PacketBuf {
    bytes: Box<[u8]>,
    start: usize,
    len: usize,
    /// Segmentation and checksum that the packet still waits for; offsets count from the IP header.
    pub offload: VirtioNetHeader,
    /// By what it came in.
    pub ingress: Ingress,
    /// Which core processes it, if it came by a bond.
    pub placement: Placement,
    /// Visit of a packet that another unit of a cluster sent here.
    pub visit: Option<UnitVisit>,
}

impl PacketBuf {
    /// An empty buffer for packets of up to `packet_bytes`.
    #[must_use]
    pub fn with_capacity(packet_bytes: usize) -> Self {
        let bytes = vec![0; HEADROOM_BYTES + packet_bytes + TAILROOM_BYTES].into_boxed_slice();
        Self {
            bytes,
            start: HEADROOM_BYTES,
            len: 0,
            offload: VirtioNetHeader::default(),
            ingress: Ingress::Host,
            placement: Placement::Here,
            visit: None,
        }
    }

    /// Bytes of the longest packet that keeps all room in front and behind.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.bytes.len().saturating_sub(HEADROOM_BYTES + TAILROOM_BYTES)
    }

    /// Empties it; all headroom is free again.
    #[inline]
    pub fn clear(&mut self) {
        self.start = HEADROOM_BYTES;
        self.len = 0;
        self.offload = VirtioNetHeader::default();
        self.placement = Placement::Here;
        self.visit = None;
    }

    /// Makes the packet longer by `front` bytes before it and gives them to be written; at most the headroom that is left.
    #[inline]
    pub fn grow_front(&mut self, front: usize) -> &mut [u8] {
        let front = front.min(self.start);
        self.start -= front;
        self.len += front;
        self.bytes.get_mut(self.start..self.start + front).unwrap_or_default()
    }

    /// Bytes of the packet.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no packet.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Says how many bytes of [`PacketBuf::space`] are the packet; at most the capacity.
    #[inline]
    pub fn set_len(&mut self, len: usize) {
        self.len = len.min(self.capacity());
    }

    /// The packet, IP header first.
    #[inline]
    #[must_use]
    pub fn packet(&self) -> &[u8] {
        self.bytes.get(self.start..self.start + self.len).unwrap_or_default()
    }

    /// The packet, to change it.
    #[inline]
    #[must_use]
    pub fn packet_mut(&mut self) -> &mut [u8] {
        self.bytes.get_mut(self.start..self.start + self.len).unwrap_or_default()
    }

    /// Where a packet can be written: as long as the capacity.
    #[inline]
    #[must_use]
    pub fn space(&mut self) -> &mut [u8] {
        let end = HEADROOM_BYTES + self.capacity();
        self.bytes.get_mut(self.start..end).unwrap_or_default()
    }

    /// Where a packet can be written, with `front` bytes before it; `front` ≤ [`HEADROOM_BYTES`].
    #[inline]
    #[must_use]
    pub fn space_with_room(&mut self, front: usize) -> &mut [u8] {
        let end = HEADROOM_BYTES + self.capacity();
        let from = self.start.checked_sub(front);
        from.and_then(|from| self.bytes.get_mut(from..end)).unwrap_or_default()
    }

    /// The packet with `front` bytes before it; `front` ≤ [`HEADROOM_BYTES`].
    #[inline]
    #[must_use]
    pub fn with_room(&mut self, front: usize) -> &mut [u8] {
        let end = self.start + self.len;
        let from = self.start.checked_sub(front);
        from.and_then(|from| self.bytes.get_mut(from..end)).unwrap_or_default()
    }

    /// Replaces the packet by a copy of `packet`; `false` when that is longer than the capacity.
    #[inline]
    pub fn copy_from(&mut self, packet: &[u8]) -> bool {
        self.start = HEADROOM_BYTES;
        let Some(room) = self.space().get_mut(..packet.len()) else { return false };
        room.copy_from_slice(packet);
        self.len = packet.len();
        true
    }

    /// The packet behind its virtio header, as a TUN device takes them.
    #[inline]
    #[must_use]
    pub fn with_virtio_header(&mut self) -> &[u8] {
        let offload = self.offload;
        let bytes = self.with_room(VNET_HEADER_BYTES);
        offload.write(bytes);
        bytes
    }
}

/// Buffers that are not in use, in two sizes. Takes back at most [`PacketPool::KEPT_MAX`] of each.
#[derive(Debug, Default)]
pub struct PacketPool {
    small: Vec<PacketBuf>,
    large: Vec<PacketBuf>,
}

impl PacketPool {
    /// Buffers of one size that are kept: more than a ring between two cores holds.
    pub const KEPT_MAX: usize = 1_536;

    /// Large buffers that are kept: each has 64 KiB.
    pub const LARGE_KEPT_MAX: usize = 64;

    /// An empty pool.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty buffer for a packet of `bytes`; made anew when the pool has none.
    #[must_use]
    pub fn take(&mut self, bytes: usize) -> PacketBuf {
        let (list, capacity) = if bytes <= SMALL_BYTES {
            (&mut self.small, SMALL_BYTES)
        } else {
            (&mut self.large, PACKET_BYTES_MAX)
        };
        let mut buffer = list.pop().unwrap_or_else(|| PacketBuf::with_capacity(capacity));
        buffer.clear();
        buffer
    }

    /// A buffer with a copy of `packet`. `None`: it is longer than a packet can be.
    #[must_use]
    pub fn copy(&mut self, packet: &[u8], offload: &VirtioNetHeader, ingress: Ingress) -> Option<PacketBuf> {
        let mut buffer = self.take(packet.len());
        buffer.offload = *offload;
        buffer.ingress = ingress;
        buffer.copy_from(packet).then_some(buffer)
    }

    /// Takes a buffer back.
    pub fn recycle(&mut self, buffer: PacketBuf) {
        let (list, kept) = match buffer.capacity() {
            SMALL_BYTES => (&mut self.small, Self::KEPT_MAX),
            PACKET_BYTES_MAX => (&mut self.large, Self::LARGE_KEPT_MAX),
            _ => return,
        };
        if list.len() < kept {
            list.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_go_in_front_without_moving_the_packet() {
        let mut buffer = PacketBuf::with_capacity(100);
        assert!(buffer.copy_from(&[7; 40]));
        let at = buffer.packet().as_ptr();
        buffer.with_room(14)[..14].fill(1);
        assert_eq!((buffer.packet().as_ptr(), buffer.packet()), (at, &[7; 40][..]));
        assert_eq!(buffer.with_room(14).len(), 54);
        buffer.offload.flags = crate::vnet::NEEDS_CSUM;
        let bytes = buffer.with_virtio_header();
        assert_eq!(VirtioNetHeader::parse(bytes).map(|header| header.flags), Ok(crate::vnet::NEEDS_CSUM));
        assert_eq!(bytes.len(), VNET_HEADER_BYTES + 40);
    }

    #[test]
    fn lengths_beyond_the_capacity_are_refused() {
        let mut buffer = PacketBuf::with_capacity(100);
        assert!(!buffer.copy_from(&[0; 101]));
        buffer.set_len(5_000);
        assert_eq!(buffer.len(), 100);
        assert_eq!(
            buffer.with_room(5_000).len(),
            0,
            "more than the headroom is nothing, not somebody else's bytes"
        );
    }

    #[test]
    fn a_pool_gives_the_same_memory_again_and_keeps_no_more_than_its_limit() {
        let mut pool = PacketPool::new();
        for bytes in [60, SMALL_BYTES, SMALL_BYTES + 1, PACKET_BYTES_MAX] {
            let buffer = pool.take(bytes);
            assert!(buffer.capacity() >= bytes);
            let at = buffer.packet().as_ptr();
            pool.recycle(buffer);
            assert_eq!(pool.take(bytes).packet().as_ptr(), at);
        }
        for buffer in (0..2 * PacketPool::LARGE_KEPT_MAX)
            .map(|_| PacketBuf::with_capacity(PACKET_BYTES_MAX))
            .collect::<Vec<_>>()
        {
            pool.recycle(buffer);
        }
        assert_eq!(pool.large.len(), PacketPool::LARGE_KEPT_MAX);
        assert!(pool.copy(&[0; PACKET_BYTES_MAX + 1], &VirtioNetHeader::default(), Ingress::Host).is_none());
    }
}
