//! The 10-byte virtio-net header in front of every packet on a TUN device opened with `IFF_VNET_HDR`
//! (virtio 1.2 §5.1.6, `TUNSETVNETHDRSZ` 10). Fields are little endian: on a big-endian machine the device
//! must be told so (`TUNSETVNETLE`).

use crate::array_at;
use crate::drop_reason::DropReason;

/// Bytes of the header.
pub const VNET_HEADER_BYTES: usize = 10;

/// Flag: the checksum at `csum_start + csum_offset` is partial.
pub const NEEDS_CSUM: u8 = 1;
/// Flag: the checksum has been validated (only from the device to us).
pub const DATA_VALID: u8 = 2;

/// Offload type: an ordinary packet.
pub const GSO_NONE: u8 = 0;
/// Offload type: TCP over IPv4.
pub const GSO_TCPV4: u8 = 1;
/// Offload type: IPv4 fragmentation of UDP; never asked for, refused.
pub const GSO_UDP: u8 = 3;
/// Offload type: TCP over IPv6.
pub const GSO_TCPV6: u8 = 4;
/// Offload type: equal UDP datagrams (`TUN_F_USO4`, `TUN_F_USO6`; Linux 6.2).
pub const GSO_UDP_L4: u8 = 5;
/// Bit in the offload type: the TCP super-packet has CWR set, for its first segment only.
pub const GSO_ECN: u8 = 0x80;

/// The header, in host byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct VirtioNetHeader {
    /// [`NEEDS_CSUM`], [`DATA_VALID`].
    pub flags: u8,
    /// [`GSO_NONE`], [`GSO_TCPV4`], [`GSO_TCPV6`] or [`GSO_UDP_L4`], perhaps with [`GSO_ECN`].
    pub gso_type: u8,
    /// Length of all headers; from the kernel only a hint, as in a forwarded packet it may be the length of
    /// the whole first segment.
    pub hdr_len: u16,
    /// Payload bytes of a segment.
    pub gso_size: u16,
    /// Where the checksummed part starts, in bytes from the start of the packet.
    pub csum_start: u16,
    /// Where the checksum is, in bytes from `csum_start`.
    pub csum_offset: u16,
}

impl VirtioNetHeader {
    /// Reads the header in front of a packet.
    ///
    /// # Errors
    /// [`DropReason::BadOffload`] when there are less than 10 bytes. The fields are judged by
    /// [`crate::segment::Segmenter::new`], together with the packet.
    #[inline]
    pub fn parse(bytes: &[u8]) -> Result<VirtioNetHeader, DropReason> {
        let [flags, gso_type, a, b, c, d, e, f, g, h] =
            array_at::<VNET_HEADER_BYTES>(bytes, 0).ok_or(DropReason::BadOffload)?;
        Ok(VirtioNetHeader {
            flags,
            gso_type,
            hdr_len: u16::from_le_bytes([a, b]),
            gso_size: u16::from_le_bytes([c, d]),
            csum_start: u16::from_le_bytes([e, f]),
            csum_offset: u16::from_le_bytes([g, h]),
        })
    }

    /// The bytes to put in front of a packet.
    #[inline]
    #[must_use]
    pub const fn to_bytes(self) -> [u8; VNET_HEADER_BYTES] {
        let [a, b] = self.hdr_len.to_le_bytes();
        let [c, d] = self.gso_size.to_le_bytes();
        let [e, f] = self.csum_start.to_le_bytes();
        let [g, h] = self.csum_offset.to_le_bytes();
        [self.flags, self.gso_type, a, b, c, d, e, f, g, h]
    }

    /// Writes the header at the start of `out`; `false` when there is no room.
    #[inline]
    pub fn write(self, out: &mut [u8]) -> bool {
        match out.first_chunk_mut::<VNET_HEADER_BYTES>() {
            Some(room) => {
                *room = self.to_bytes();
                true
            }
            None => false,
        }
    }

    /// The same header with its positions counted from `bytes` earlier: from a link-layer header in front of the packet.
    #[inline]
    #[must_use]
    pub const fn with_front(self, bytes: u16) -> Self {
        let hdr_len = if self.gso_type == GSO_NONE { 0 } else { self.hdr_len.saturating_add(bytes) };
        let csum_start = if self.needs_csum() { self.csum_start.saturating_add(bytes) } else { 0 };
        Self { hdr_len, csum_start, ..self }
    }

    /// The same header with its positions counted from `bytes` later: from the IP header behind a link-layer header.
    #[inline]
    #[must_use]
    pub const fn without_front(self, bytes: u16) -> Self {
        Self {
            hdr_len: self.hdr_len.saturating_sub(bytes),
            csum_start: self.csum_start.saturating_sub(bytes),
            ..self
        }
    }

    /// A checksum is partial: the packet's own, or that of a packet inside it.
    #[inline]
    #[must_use]
    pub const fn needs_csum(self) -> bool {
        self.flags & NEEDS_CSUM != 0
    }

    /// The checksum of the transport header at `start` is partial; one further inside is another packet's.
    #[inline]
    #[must_use]
    pub const fn needs_csum_at(self, start: usize) -> bool {
        self.needs_csum() && self.csum_start as usize == start
    }
}

#[cfg(test)]
mod tests;
