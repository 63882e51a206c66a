//! Merges what the tunnel delivers into super-packets for TUN writes: consecutive TCP segments, or equal UDP
//! datagrams, of one flow. One write then carries up to 64 KB through the kernel's stack.
//!
//! Per packet call [`Coalescer::push`]; when there is nothing more to deliver, [`Coalescer::flush`].
//! Packets are emitted in the order they were pushed. Only what [`crate::segment::Segmenter`] would split
//! into the very same segments is merged; the IPv4 identification of packets with "don't fragment" is the
//! exception, it has no meaning (RFC 6864).
//!
//! Merge only packets that were authenticated: the kernel is told that the checksums are right.

use crate::attachment::{Ingress, Placement};
use crate::buffer::{PACKET_BYTES_MAX, PacketBuf};
use crate::checksum;
use crate::ip::{IPV4_HEADER_BYTES, IPV6_HEADER_BYTES, IpHeader, PROTOCOL_TCP, PROTOCOL_UDP};
use crate::segment::{
    TCP_ACK, TCP_CHECKSUM_OFFSET, TCP_CWR, TCP_ECE, TCP_FIN, TCP_HEADER_BYTES, TCP_PSH, UDP_CHECKSUM_OFFSET,
    UDP_HEADER_BYTES, checksum_place,
};
use crate::vnet::{GSO_ECN, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM, VirtioNetHeader};
use crate::{array_at, put_u16, u16_at, u32_at};

/// Most bytes of a merged packet, IP header included.
pub const SUPER_PACKET_BYTES_MAX: usize = 65_535;
/// Most datagrams in one UDP super-packet: older kernels split no more than that.
pub const UDP_SEGMENTS_MAX: usize = 64;

/// Merges packets into one open super-packet. Owns its buffer of 64 KB; allocates only when it is made.
pub struct Coalescer {
    /// The packet so far. Its IP and transport headers stay those of the first segment until it is emitted.
    buffer: PacketBuf,
    held: Option<Held>,
    /// Of the packets that are pushed.
    placement: Placement,
    merge_udp: bool,
}

/// Properties of a packet that decide whether it can be merged.
#[derive(Clone, Copy, Debug)]
struct Shape {
    tcp: bool,
    /// Bytes of the IP header: 20 or 40, which also tells the version.
    ip_bytes: usize,
    /// Bytes of all headers.
    header_bytes: usize,
    payload_bytes: usize,
    /// TCP flags; zero for UDP.
    flags: u8,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    shape: Shape,
    /// Bytes of the packet so far.
    bytes: usize,
    segments: usize,
    /// The first segment's checksum is partial.
    partial: bool,
    /// The first segment's checksum is partial or was found right.
    trusted: bool,
    /// FIN and PSH seen on the last segment.
    last_flags: u8,
}

impl Default for Coalescer {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Coalescer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Coalescer").field("held", &self.held).finish_non_exhaustive()
    }
}

impl Coalescer {
    /// Holds nothing, merges TCP and UDP.
    #[must_use]
    pub fn new() -> Coalescer {
        Coalescer {
            buffer: PacketBuf::with_capacity(PACKET_BYTES_MAX),
            held: None,
            placement: Placement::Here,
            merge_udp: true,
        }
    }

    /// Whether UDP is merged. Switch it off where the TUN device does not know `VIRTIO_NET_HDR_GSO_UDP_L4`
    /// (before Linux 6.2).
    pub fn set_merge_udp(&mut self, merge: bool) {
        self.merge_udp = merge;
    }

    /// Which core processes the packets that are pushed from now on; those of different cores are not merged.
    #[inline]
    pub fn set_placement(&mut self, placement: Placement) {
        self.placement = placement;
    }

    /// Nothing is held.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.held.is_none()
    }

    /// Takes one IP packet that came in by `ingress`. `checksum_partial`: its transport checksum is the
    /// pseudo-header's sum only. `may_merge`: it may continue the packet before it. `emit` gets whatever is complete; the
    /// packet itself may stay held until later calls. It may keep the buffer by leaving another of the same capacity.
    ///
    /// Returns `false` for a packet longer than IP allows, which is not emitted.
    #[inline]
    pub fn push(
        &mut self,
        ingress: Ingress,
        packet: &[u8],
        checksum_partial: bool,
        may_merge: bool,
        emit: &mut impl FnMut(&mut PacketBuf),
    ) -> bool {
        if packet.len() > PACKET_BYTES_MAX {
            return false;
        }
        let Some(shape) = self.shape(packet) else {
            self.flush(emit);
            self.mark(ingress);
            self.emit_alone(packet, checksum_partial, emit);
            return true;
        };
        let mut trusted = checksum_partial;
        let same = self.buffer.ingress == ingress && self.buffer.placement == self.placement;
        if may_merge && same && self.fits(packet, &shape) && self.trust_held() {
            trusted = trusted || verify(packet, &shape);
            if trusted {
                self.append(packet, &shape, emit);
                return true;
            }
        }
        self.flush(emit);
        self.mark(ingress);
        self.hold(packet, shape, checksum_partial, trusted);
        if shape.flags & (TCP_FIN | TCP_PSH) != 0 {
            self.flush(emit);
        }
        true
    }

    #[inline]
    fn mark(&mut self, ingress: Ingress) {
        self.buffer.ingress = ingress;
        self.buffer.placement = self.placement;
    }

    /// Emits what is held.
    #[inline]
    pub fn flush(&mut self, emit: &mut impl FnMut(&mut PacketBuf)) {
        let Some(held) = self.held.take() else { return };
        let header = if held.segments == 1 { single_header(&held) } else { self.finish_super(&held) };
        self.buffer.offload = header;
        self.buffer.set_len(held.bytes);
        emit(&mut self.buffer);
    }

    /// The shape of a packet that could be part of a super-packet.
    #[inline]
    fn shape(&self, packet: &[u8]) -> Option<Shape> {
        let (ip_bytes, protocol) = match packet.first()? {
            // No options, so the version byte is exactly this.
            0x45 => (IPV4_HEADER_BYTES, plain_ipv4(packet)?),
            first if first >> 4 == 6 => (IPV6_HEADER_BYTES, plain_ipv6(packet)?),
            _ => return None,
        };
        match protocol {
            PROTOCOL_TCP => tcp_shape(packet, ip_bytes),
            PROTOCOL_UDP if self.merge_udp => udp_shape(packet, ip_bytes),
            _ => None,
        }
    }

    /// The packet continues the held one.
    #[inline]
    fn fits(&self, packet: &[u8], shape: &Shape) -> bool {
        let Some(held) = &self.held else { return false };
        let first = self.buffer.packet();
        shape.tcp == held.shape.tcp
            && shape.header_bytes == held.shape.header_bytes
            && shape.ip_bytes == held.shape.ip_bytes
            && shape.payload_bytes <= held.shape.payload_bytes
            && held.bytes + shape.payload_bytes <= SUPER_PACKET_BYTES_MAX
            && (shape.tcp || held.segments < UDP_SEGMENTS_MAX)
            && continues(first, packet, held, shape).unwrap_or(false)
    }

    /// The held packet's checksum is right; looked at only once, when something could be appended.
    #[inline]
    fn trust_held(&mut self) -> bool {
        let Some(held) = &mut self.held else { return false };
        if !held.trusted {
            held.trusted = verify(self.buffer.packet(), &held.shape);
        }
        held.trusted
    }

    #[inline]
    fn append(&mut self, packet: &[u8], shape: &Shape, emit: &mut impl FnMut(&mut PacketBuf)) {
        let Some(held) = &mut self.held else { return };
        let room = self.buffer.space().get_mut(held.bytes..held.bytes + shape.payload_bytes);
        let (Some(room), Some(payload)) = (room, packet.get(shape.header_bytes..)) else { return };
        room.copy_from_slice(payload);
        held.bytes += shape.payload_bytes;
        self.buffer.set_len(held.bytes);
        held.segments += 1;
        held.last_flags = shape.flags & (TCP_FIN | TCP_PSH);
        let complete = held.last_flags != 0
            || shape.payload_bytes < held.shape.payload_bytes
            || held.bytes == SUPER_PACKET_BYTES_MAX
            || (!shape.tcp && held.segments == UDP_SEGMENTS_MAX);
        if complete {
            self.flush(emit);
        }
    }

    #[inline]
    fn hold(&mut self, packet: &[u8], shape: Shape, partial: bool, trusted: bool) {
        if self.buffer.copy_from(packet) {
            self.held =
                Some(Held { shape, bytes: packet.len(), segments: 1, partial, trusted, last_flags: 0 });
        }
    }

    /// Emits a packet that cannot be merged; nothing is held.
    fn emit_alone(&mut self, packet: &[u8], checksum_partial: bool, emit: &mut impl FnMut(&mut PacketBuf)) {
        let mut header = VirtioNetHeader::default();
        if checksum_partial
            && let Some((start, place)) = IpHeader::parse(packet).ok().as_ref().and_then(checksum_place)
        {
            header.flags = NEEDS_CSUM;
            header.csum_start = start as u16;
            header.csum_offset = (place - start) as u16;
        }
        if self.buffer.copy_from(packet) {
            self.buffer.offload = header;
            emit(&mut self.buffer);
        }
    }

    /// Makes the first segment's headers those of the super-packet.
    #[inline]
    fn finish_super(&mut self, held: &Held) -> VirtioNetHeader {
        let Shape { tcp, ip_bytes, header_bytes, payload_bytes, flags } = held.shape;
        let packet = self.buffer.packet_mut();
        let upper_bytes = held.bytes - ip_bytes;
        let protocol = if tcp { PROTOCOL_TCP } else { PROTOCOL_UDP };
        let pseudo = if ip_bytes == IPV4_HEADER_BYTES {
            let old = u16_at(packet, 2).unwrap_or(0);
            let old_checksum = u16_at(packet, 10).unwrap_or(0);
            put_u16(packet, 2, held.bytes as u16);
            put_u16(packet, 10, checksum::update16(old_checksum, old, held.bytes as u16));
            checksum::sum(packet.get(12..20).unwrap_or_default(), 0)
        } else {
            put_u16(packet, 4, upper_bytes as u16);
            checksum::sum(packet.get(8..40).unwrap_or_default(), 0)
        };
        let partial = checksum::fold(pseudo + u32::from(protocol) + upper_bytes as u32);
        let (gso_type, csum_offset) = if tcp {
            if let Some(byte) = packet.get_mut(ip_bytes + 13) {
                *byte |= held.last_flags;
            }
            let version = if ip_bytes == IPV4_HEADER_BYTES { GSO_TCPV4 } else { GSO_TCPV6 };
            (if flags & TCP_CWR != 0 { version | GSO_ECN } else { version }, TCP_CHECKSUM_OFFSET)
        } else {
            put_u16(packet, ip_bytes + 4, upper_bytes as u16);
            (GSO_UDP_L4, UDP_CHECKSUM_OFFSET)
        };
        put_u16(packet, ip_bytes + csum_offset, partial);
        VirtioNetHeader {
            flags: NEEDS_CSUM,
            gso_type,
            hdr_len: header_bytes as u16,
            gso_size: payload_bytes as u16,
            csum_start: ip_bytes as u16,
            csum_offset: csum_offset as u16,
        }
    }
}

/// The virtio header of a held packet that stayed alone.
#[inline]
fn single_header(held: &Held) -> VirtioNetHeader {
    if !held.partial {
        return VirtioNetHeader::default();
    }
    let csum_offset = if held.shape.tcp { TCP_CHECKSUM_OFFSET } else { UDP_CHECKSUM_OFFSET };
    VirtioNetHeader {
        flags: NEEDS_CSUM,
        csum_start: held.shape.ip_bytes as u16,
        csum_offset: csum_offset as u16,
        ..VirtioNetHeader::default()
    }
}

/// Protocol of an IPv4 packet without options, padding or fragmentation and with a right header checksum.
#[inline]
fn plain_ipv4(packet: &[u8]) -> Option<u8> {
    let header: &[u8; IPV4_HEADER_BYTES] = packet.first_chunk()?;
    let plain = usize::from(u16::from_be_bytes([header[2], header[3]])) == packet.len()
        // the reserved bit, "more fragments" and the offset
        && header[6] & 0xbf == 0
        && header[7] == 0
        && checksum::verify_ipv4_header(header);
    plain.then_some(header[9])
}

/// Protocol of an IPv6 packet without padding. Extension headers are not looked through: their protocol is
/// not merged.
#[inline]
fn plain_ipv6(packet: &[u8]) -> Option<u8> {
    let header: &[u8; IPV6_HEADER_BYTES] = packet.first_chunk()?;
    let payload_bytes = usize::from(u16::from_be_bytes([header[4], header[5]]));
    (IPV6_HEADER_BYTES + payload_bytes == packet.len()).then_some(header[6])
}

#[inline]
fn tcp_shape(packet: &[u8], ip_bytes: usize) -> Option<Shape> {
    let [offset, flags] = array_at(packet, ip_bytes + 12)?;
    let tcp_bytes = usize::from(offset >> 4) * 4;
    let header_bytes = ip_bytes + tcp_bytes;
    let payload_bytes = packet.len().checked_sub(header_bytes)?;
    let allowed = TCP_ACK | TCP_PSH | TCP_FIN | TCP_ECE | TCP_CWR;
    let mergeable =
        tcp_bytes >= TCP_HEADER_BYTES && payload_bytes > 0 && flags & TCP_ACK != 0 && flags & !allowed == 0;
    mergeable.then_some(Shape { tcp: true, ip_bytes, header_bytes, payload_bytes, flags })
}

#[inline]
fn udp_shape(packet: &[u8], ip_bytes: usize) -> Option<Shape> {
    let header_bytes = ip_bytes + UDP_HEADER_BYTES;
    let payload_bytes = packet.len().checked_sub(header_bytes)?;
    let length = usize::from(u16_at(packet, ip_bytes + 4)?);
    let checksum = u16_at(packet, ip_bytes + UDP_CHECKSUM_OFFSET)?;
    // A datagram without a checksum would gain one by being merged.
    let mergeable = length == payload_bytes + UDP_HEADER_BYTES && payload_bytes > 0 && checksum != 0;
    mergeable.then_some(Shape { tcp: false, ip_bytes, header_bytes, payload_bytes, flags: 0 })
}

/// All header fields are what the next segment of the held packet has. Lengths have been compared.
#[inline]
fn continues(first: &[u8], packet: &[u8], held: &Held, shape: &Shape) -> Option<bool> {
    let same = |from: usize, to: usize| Some(first.get(from..to)? == packet.get(from..to)?);
    let ip = shape.ip_bytes;
    let network = if ip == IPV4_HEADER_BYTES {
        // version, TOS | flags, TTL, protocol | addresses
        same(0, 2)? && same(6, 10)? && same(12, 20)? && {
            let dont_fragment = packet.get(6)? & 0x40 != 0;
            dont_fragment || u16_at(packet, 4)? == u16_at(first, 4)?.wrapping_add(held.segments as u16)
        }
    } else {
        // version, class, flow label | next header, hop limit, addresses
        same(0, 4)? && same(6, 40)?
    };
    if !network || !same(ip, ip + 4)? {
        return Some(false);
    }
    if !shape.tcp {
        return Some(true);
    }
    let done = (held.bytes - held.shape.header_bytes) as u32;
    let may_differ = TCP_FIN | TCP_PSH | TCP_CWR;
    Some(
        u32_at(packet, ip + 4)? == u32_at(first, ip + 4)?.wrapping_add(done)
            // acknowledgement and data offset | flags | window | urgent pointer and options
            && same(ip + 8, ip + 13)?
            && (shape.flags ^ held.shape.flags) & !may_differ == 0
            && shape.flags & TCP_CWR == 0
            && same(ip + 14, ip + 16)?
            && same(ip + 18, shape.header_bytes)?,
    )
}

/// The full transport checksum of a packet of this shape is right.
#[inline]
fn verify(packet: &[u8], shape: &Shape) -> bool {
    let addresses = if shape.ip_bytes == IPV4_HEADER_BYTES { packet.get(12..20) } else { packet.get(8..40) };
    let upper = packet.get(shape.ip_bytes..).unwrap_or_default();
    let protocol = if shape.tcp { PROTOCOL_TCP } else { PROTOCOL_UDP };
    let pseudo = checksum::sum(addresses.unwrap_or_default(), 0) + u32::from(protocol) + upper.len() as u32;
    checksum::fold(checksum::sum(upper, pseudo)) == 0xffff
}

#[cfg(test)]
mod tests;
