//! Splits a super-packet from the TUN device into the segments that go into datagrams.
//!
//! Nothing is copied ahead: [`Segmenter::new`] validates once, and [`Segmenter::write_segment`] writes the
//! rebuilt header and one slice of the payload straight to where the segment will be sealed.
//!
//! Transport checksums are left *partial*, the sum of the pseudo-header for the segment's own length
//! ([`Segmenter::checksum_partial`]). The receiver passes that on to its kernel, or calls
//! [`complete_checksum`].

use crate::checksum;
use crate::drop_reason::DropReason;
use crate::ip::{IPV6_HEADER_BYTES, IpHeader, PROTOCOL_TCP, PROTOCOL_UDP};
pub use crate::mss::mss_clamp;
use crate::vnet::{GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, VirtioNetHeader};
use crate::{put_u16, put_u32, u16_at, u32_at};

/// Offset of the checksum in a TCP header.
pub const TCP_CHECKSUM_OFFSET: usize = 16;
/// Offset of the checksum in a UDP header.
pub const UDP_CHECKSUM_OFFSET: usize = 6;
/// Bytes of a UDP header.
pub const UDP_HEADER_BYTES: usize = 8;
/// Bytes of a TCP header without options.
pub const TCP_HEADER_BYTES: usize = 20;

pub(crate) const TCP_FIN: u8 = 0x01;
pub(crate) const TCP_SYN: u8 = 0x02;
pub(crate) const TCP_RST: u8 = 0x04;
pub(crate) const TCP_PSH: u8 = 0x08;
pub(crate) const TCP_ACK: u8 = 0x10;
pub(crate) const TCP_URG: u8 = 0x20;
pub(crate) const TCP_ECE: u8 = 0x40;
pub(crate) const TCP_CWR: u8 = 0x80;

/// Kind of a packet from the TUN device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentKind {
    /// An ordinary packet: one segment, copied as it is.
    Single,
    /// A TCP super-packet.
    Tcp,
    /// Equal UDP datagrams in one super-packet.
    Udp,
}

/// One packet or super-packet from the TUN device, ready to be written segment by segment.
#[derive(Clone, Debug)]
pub struct Segmenter<'a> {
    /// Trimmed to the length in the IP header; a frame that is a `Single` is not.
    packet: &'a [u8],
    kind: SegmentKind,
    /// It is an Ethernet frame.
    frame: bool,
    /// Bytes in front of the IP header; zero without an Ethernet header.
    front: usize,
    /// IP header only; zero in `Single`.
    ip_bytes: usize,
    /// IP and transport header; zero in `Single`.
    header_bytes: usize,
    segment_payload: usize,
    version: u8,
    checksum_partial: bool,
    /// `Single` only: the checksum to complete on the way, (start, offset from there).
    complete: Option<(usize, usize)>,
    /// Sum of the IPv4 header without length, identification and checksum.
    ipv4_sum: u32,
    /// Sum of the pseudo-header without the length.
    pseudo_sum: u32,
}

impl<'a> Segmenter<'a> {
    /// Validates a packet with the virtio header that came with it. `hdr_len` is not trusted: lengths are
    /// taken from the packet's own headers.
    ///
    /// # Errors
    /// [`DropReason::IpMalformed`] for a bad IP header, [`DropReason::BadOffload`] when the virtio header
    /// contradicts the packet: another protocol, a fragment, a missing segment size, a checksum outside the packet,
    /// a transport header that is cut, or SYN, RST or URG in what would be several segments.
    pub fn new(header: &VirtioNetHeader, packet: &'a [u8]) -> Result<Segmenter<'a>, DropReason> {
        let ip = IpHeader::parse(packet)?;
        let packet = packet.get(..ip.total_bytes).ok_or(DropReason::IpMalformed)?;
        match header.gso_type & !GSO_ECN {
            GSO_NONE => Self::single(header, &ip, packet),
            GSO_TCPV4 if ip.version == 4 => Self::tcp(header, &ip, packet),
            GSO_TCPV6 if ip.version == 6 => Self::tcp(header, &ip, packet),
            GSO_UDP_L4 => Self::udp(header, &ip, packet),
            _ => Err(DropReason::BadOffload),
        }
    }

    /// As [`Segmenter::new`], of an Ethernet frame or super-frame. `ip_at`: where its IP packet begins, if it has one. Each
    /// segment has all that stands in front of that.
    ///
    /// # Errors
    /// [`DropReason::BadOffload`] as above. A frame whose packet cannot be read is one segment, as it is.
    pub fn of_frame(
        header: &VirtioNetHeader,
        frame: &'a [u8],
        ip_at: Option<usize>,
    ) -> Result<Segmenter<'a>, DropReason> {
        let front = ip_at.unwrap_or(0);
        let packet = frame.get(front..).filter(|packet| ip_at.is_some() && IpHeader::parse(packet).is_ok());
        let Some(packet) = packet else {
            let plain = header.gso_type == GSO_NONE && !header.needs_csum();
            let single = Segmenter { frame: true, front: 0, ..Self::whole(frame) };
            return if plain { Ok(single) } else { Err(DropReason::BadOffload) };
        };
        let inner = Self::new(&header.without_front(front as u16), packet)?;
        // What stands behind the packet pads a short frame; beyond that it would change the checksum.
        let padded = inner.kind == SegmentKind::Single && !header.needs_csum();
        let end = if padded { frame.len() } else { front + inner.packet.len() };
        let single = inner.kind == SegmentKind::Single;
        let whole = frame.get(..end).ok_or(DropReason::BadOffload)?;
        Ok(Segmenter {
            packet: whole,
            frame: true,
            front,
            header_bytes: if single { 0 } else { front + inner.header_bytes },
            segment_payload: if single { whole.len() } else { inner.segment_payload },
            complete: inner.complete.map(|(start, offset)| (front + start, offset)),
            ..inner
        })
    }

    /// One segment, as it is.
    fn whole(packet: &'a [u8]) -> Segmenter<'a> {
        Segmenter {
            packet,
            kind: SegmentKind::Single,
            frame: false,
            front: 0,
            ip_bytes: 0,
            header_bytes: 0,
            segment_payload: packet.len(),
            version: 0,
            checksum_partial: false,
            complete: None,
            ipv4_sum: 0,
            pseudo_sum: 0,
        }
    }

    fn single(
        header: &VirtioNetHeader,
        ip: &IpHeader,
        packet: &'a [u8],
    ) -> Result<Segmenter<'a>, DropReason> {
        let mut segmenter = Segmenter { version: ip.version, ..Self::whole(packet) };
        if header.needs_csum() {
            let (start, offset) = checksum_in(header, ip, packet.len())?;
            // A partial checksum of an inner packet (GRE, VXLAN over this TUN) cannot be described by one
            // flag: such a checksum is completed while the packet is copied.
            if start == ip.header_bytes && !ip.is_fragmented() && Some(offset) == checksum_offset(ip.protocol)
            {
                segmenter.checksum_partial = true;
            } else {
                segmenter.complete = Some((start, offset));
            }
        }
        Ok(segmenter)
    }

    fn tcp(header: &VirtioNetHeader, ip: &IpHeader, packet: &'a [u8]) -> Result<Segmenter<'a>, DropReason> {
        let data_offset = packet.get(ip.header_bytes + 12).map_or(0, |byte| usize::from(byte >> 4) * 4);
        if ip.protocol != PROTOCOL_TCP || data_offset < TCP_HEADER_BYTES {
            return Err(DropReason::BadOffload);
        }
        let segmenter = Self::split(header, ip, packet, SegmentKind::Tcp, data_offset)?;
        let flags = packet.get(ip.header_bytes + 13).copied().unwrap_or(0);
        if segmenter.segments() > 1 && flags & (TCP_SYN | TCP_RST | TCP_URG) != 0 {
            return Err(DropReason::BadOffload);
        }
        Ok(segmenter)
    }

    fn udp(header: &VirtioNetHeader, ip: &IpHeader, packet: &'a [u8]) -> Result<Segmenter<'a>, DropReason> {
        if ip.protocol != PROTOCOL_UDP || header.gso_type & GSO_ECN != 0 {
            return Err(DropReason::BadOffload);
        }
        Self::split(header, ip, packet, SegmentKind::Udp, UDP_HEADER_BYTES)
    }

    fn split(
        header: &VirtioNetHeader,
        ip: &IpHeader,
        packet: &'a [u8],
        kind: SegmentKind,
        transport_bytes: usize,
    ) -> Result<Segmenter<'a>, DropReason> {
        let header_bytes = ip.header_bytes + transport_bytes;
        let offset = checksum_offset(ip.protocol).ok_or(DropReason::BadOffload)?;
        let csum_agrees = !header.needs_csum()
            || (usize::from(header.csum_start), usize::from(header.csum_offset)) == (ip.header_bytes, offset);
        if header.gso_size == 0 || ip.fragment.is_some() || header_bytes > packet.len() || !csum_agrees {
            return Err(DropReason::BadOffload);
        }
        let ipv4_sum = if ip.version == 4 {
            // Without words 1 (length), 2 (identification) and 5 (checksum), which differ per segment.
            [2, 4, 10]
                .iter()
                .fold(checksum::sum(packet.get(..ip.header_bytes).unwrap_or_default(), 0), |sum, at| {
                    sum + u32::from(!u16_at(packet, *at).unwrap_or(0))
                })
        } else {
            0
        };
        // A routing header puts another address into the pseudo-header than the IP header shows, so behind
        // extension headers the kernel's own partial sum is the base, its length taken out.
        let pseudo_sum = if ip.version == 6 && ip.header_bytes > IPV6_HEADER_BYTES && header.needs_csum() {
            let field = u16_at(packet, ip.header_bytes + offset).unwrap_or(0);
            u32::from(field) + u32::from(!(ip.payload_bytes() as u16))
        } else {
            checksum::pseudo_header(ip.src, ip.dst, ip.protocol, 0)
        };
        Ok(Segmenter {
            packet,
            kind,
            frame: false,
            front: 0,
            ip_bytes: ip.header_bytes,
            header_bytes,
            segment_payload: usize::from(header.gso_size),
            version: ip.version,
            checksum_partial: true,
            complete: None,
            ipv4_sum,
            pseudo_sum,
        })
    }

    /// An Ethernet frame.
    #[inline]
    #[must_use]
    pub const fn is_frame(&self) -> bool {
        self.frame
    }

    /// Where the IP packet of a frame begins.
    #[inline]
    #[must_use]
    pub const fn ip_at(&self) -> usize {
        self.front
    }

    /// More than one segment.
    #[inline]
    #[must_use]
    pub fn is_super(&self) -> bool {
        self.segments() > 1
    }

    /// Kind of the packet.
    #[inline]
    #[must_use]
    pub const fn kind(&self) -> SegmentKind {
        self.kind
    }

    /// Payload bytes of every segment but perhaps the last; of a `Single` all of its bytes, header included.
    #[inline]
    #[must_use]
    pub const fn segment_payload(&self) -> usize {
        self.segment_payload
    }

    /// Bytes of IP and TCP or UDP header, and of what a frame has in front of them, repeated in every segment; zero for a `Single`, where nothing is
    /// repeated.
    #[inline]
    #[must_use]
    pub const fn header_bytes(&self) -> usize {
        self.header_bytes
    }

    /// Payload bytes of all segments together; of a `Single` all of its bytes.
    #[inline]
    #[must_use]
    pub const fn payload_bytes(&self) -> usize {
        self.packet.len() - self.header_bytes
    }

    /// The L4 checksum of what [`Segmenter::write_segment`] writes is partial.
    #[inline]
    #[must_use]
    pub const fn checksum_partial(&self) -> bool {
        self.checksum_partial
    }

    /// Makes the segments of a TCP super-packet smaller, so that one fits one datagram. Only ever smaller:
    /// the size the kernel chose is the peer's MSS. `false`, and nothing changes, for zero, for anything
    /// but TCP, and when `n` is not smaller.
    pub fn set_segment_payload(&mut self, n: usize) -> bool {
        let smaller = self.kind == SegmentKind::Tcp && n > 0 && n < self.segment_payload;
        if smaller {
            self.segment_payload = n;
        }
        smaller
    }

    /// How many segments there are, at least 1.
    #[inline]
    #[must_use]
    pub fn segments(&self) -> usize {
        self.payload_bytes().div_ceil(self.segment_payload.max(1)).max(1)
    }

    /// Bytes of segment `index` with its headers; zero beyond the last.
    #[inline]
    #[must_use]
    pub fn segment_bytes(&self, index: usize) -> usize {
        match self.payload_range(index) {
            Some((start, end)) => self.header_bytes + (end - start),
            None => 0,
        }
    }

    #[inline]
    fn payload_range(&self, index: usize) -> Option<(usize, usize)> {
        let start = self.header_bytes.checked_add(index.checked_mul(self.segment_payload)?)?;
        let end = self.packet.len().min(start.saturating_add(self.segment_payload));
        (start < end || (index == 0 && start == end)).then_some((start, end))
    }

    /// Writes segment `index` to the start of `out` and returns its length. Zero, and nothing written,
    /// beyond the last segment or when `out` is shorter than [`Segmenter::segment_bytes`].
    ///
    /// Rebuilt per segment: IPv4 identification (+ index), lengths, IPv4 header checksum, TCP sequence
    /// number, FIN and PSH (last segment only), CWR (first only), and the partial transport checksum.
    #[inline]
    pub fn write_segment(&self, index: usize, out: &mut [u8]) -> usize {
        let Some((start, end)) = self.payload_range(index) else { return 0 };
        let header_bytes = self.header_bytes;
        let bytes = header_bytes + (end - start);
        let (Some(out), Some(header), Some(payload)) =
            (out.get_mut(..bytes), self.packet.get(..header_bytes), self.packet.get(start..end))
        else {
            return 0;
        };
        let (out_header, out_payload) = out.split_at_mut(header_bytes);
        out_header.copy_from_slice(header);
        out_payload.copy_from_slice(payload);
        match self.kind {
            SegmentKind::Single => {
                if let Some((start, offset)) = self.complete {
                    complete_at(out, start, offset);
                }
            }
            SegmentKind::Tcp | SegmentKind::Udp => {
                let (front, header) = (self.front, out_header.get_mut(self.front..).unwrap_or_default());
                self.rebuild(index, bytes - front, start, end, header);
            }
        }
        bytes
    }

    /// `bytes`: of the whole segment; `start..end`: its payload's place in the packet.
    #[inline]
    fn rebuild(&self, index: usize, bytes: usize, start: usize, end: usize, header: &mut [u8]) {
        let ip = self.ip_bytes;
        if self.version == 4 {
            let id = u16_at(header, 4).unwrap_or(0).wrapping_add(index as u16);
            put_u16(header, 2, bytes as u16);
            put_u16(header, 4, id);
            put_u16(header, 10, checksum::finish(self.ipv4_sum + bytes as u32 + u32::from(id)));
        } else {
            put_u16(header, 4, (bytes - IPV6_HEADER_BYTES) as u16);
        }
        let transport_bytes = bytes - ip;
        let partial = checksum::fold(self.pseudo_sum + transport_bytes as u32);
        if self.kind == SegmentKind::Udp {
            put_u16(header, ip + 4, transport_bytes as u16);
            put_u16(header, ip + UDP_CHECKSUM_OFFSET, partial);
            return;
        }
        let sequence = u32_at(header, ip + 4).unwrap_or(0);
        put_u32(header, ip + 4, sequence.wrapping_add((start - self.header_bytes) as u32));
        if let Some(flags) = header.get_mut(ip + 13) {
            if end < self.packet.len() {
                *flags &= !(TCP_FIN | TCP_PSH);
            }
            if index > 0 {
                *flags &= !TCP_CWR;
            }
        }
        put_u16(header, ip + TCP_CHECKSUM_OFFSET, partial);
    }
}

/// Where the checksum stands in the header of a protocol whose checksum may be partial.
#[inline]
pub(crate) const fn checksum_offset(protocol: u8) -> Option<usize> {
    match protocol {
        PROTOCOL_TCP => Some(TCP_CHECKSUM_OFFSET),
        PROTOCOL_UDP => Some(UDP_CHECKSUM_OFFSET),
        _ => None,
    }
}

/// Where the TCP or UDP header starts and where its checksum stands, both from the start of the packet,
/// when the whole checksum can be computed: not in a fragment, not in a cut header.
#[inline]
#[must_use]
pub fn checksum_place(ip: &IpHeader) -> Option<(usize, usize)> {
    let offset = checksum_offset(ip.protocol)?;
    let minimum = if ip.protocol == PROTOCOL_TCP { TCP_HEADER_BYTES } else { UDP_HEADER_BYTES };
    (!ip.is_fragmented() && ip.payload_bytes() >= minimum)
        .then_some((ip.header_bytes, ip.header_bytes + offset))
}

/// Turns the partial checksum of a TCP or UDP packet (pseudo-header sum in the field) into a full one.
///
/// # Errors
/// [`DropReason::IpMalformed`] for a bad IP header; [`DropReason::BadOffload`] for fragments, cut headers and other
/// protocols, which have no partial checksum.
pub fn complete_checksum(packet: &mut [u8]) -> Result<(), DropReason> {
    let ip = IpHeader::parse(packet)?;
    let (start, place) = checksum_place(&ip).ok_or(DropReason::BadOffload)?;
    let packet = packet.get_mut(..ip.total_bytes).ok_or(DropReason::IpMalformed)?;
    complete_at(packet, start, place - start);
    Ok(())
}

/// Turns the checksum that the virtio header calls partial into a full one: the packet's own, or that of a packet inside it.
///
/// # Errors
/// [`DropReason::IpMalformed`] for a bad IP header; [`DropReason::BadOffload`] when the checksum is not behind it, or not
/// in the packet.
pub fn complete_offloaded(header: &VirtioNetHeader, packet: &mut [u8]) -> Result<(), DropReason> {
    if !header.needs_csum() {
        return Ok(());
    }
    let ip = IpHeader::parse(packet)?;
    let packet = packet.get_mut(..ip.total_bytes).ok_or(DropReason::IpMalformed)?;
    let (start, offset) = checksum_in(header, &ip, packet.len())?;
    complete_at(packet, start, offset);
    Ok(())
}

/// Where the virtio header says that a checksum is partial, in a packet of so many bytes: start of what it covers, and offset
/// from there.
fn checksum_in(header: &VirtioNetHeader, ip: &IpHeader, bytes: usize) -> Result<(usize, usize), DropReason> {
    let (start, offset) = (usize::from(header.csum_start), usize::from(header.csum_offset));
    // A sum that starts in the IP header would let the checksum be written over its fields.
    if start < ip.header_bytes || start + offset + 2 > bytes {
        return Err(DropReason::BadOffload);
    }
    Ok((start, offset))
}

/// Sums everything from `start` on, the partial checksum in it included, and stores the result. Where UDP
/// has its checksum a zero would mean "none" and becomes 0xffff, which is as right for any other protocol.
fn complete_at(packet: &mut [u8], start: usize, offset: usize) {
    let full = checksum::finish(checksum::sum(packet.get(start..).unwrap_or_default(), 0));
    let full = if offset == UDP_CHECKSUM_OFFSET { checksum::nonzero(full) } else { full };
    put_u16(packet, start + offset, full);
}

#[cfg(test)]
mod tests;
