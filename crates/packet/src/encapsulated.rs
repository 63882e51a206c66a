//! Splits a super-packet inside another packet: TCP or UDP in IPIP, 6in4, GRE, VXLAN and their like, which hosts and
//! containers send and receive offload merges on its way through.
//!
//! The virtio header names the inner segments only, so that the kernel refuses to send such a packet: it takes them for
//! those of the outer header. Each segment gets outer headers of its own instead, and whole checksums, inside and outside.

use crate::checksum;
use crate::drop_reason::DropReason;
use crate::ip::{
    IPV6_HEADER_BYTES, IpHeader, PROTOCOL_GRE, PROTOCOL_IPV4, PROTOCOL_IPV6, PROTOCOL_TCP, PROTOCOL_UDP,
};
use crate::segment::{Segmenter, UDP_CHECKSUM_OFFSET, UDP_HEADER_BYTES, complete_checksum};
use crate::vnet::{GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, VirtioNetHeader};
use crate::{put_u16, u16_at};

const GRE_HEADER_BYTES: usize = 4;
/// Flags of a GRE header (RFC 2784, RFC 2890): a checksum follows; a number follows that differs in each packet.
const GRE_CHECKSUM: u16 = 0x8000;
const GRE_SEQUENCE: u16 = 0x1000;
const GRE_VERSION: u16 = 7;
/// Where GRE has its checksum.
const GRE_CHECKSUM_OFFSET: usize = 4;

/// Header between the outer IP header and the inner one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shim {
    /// Nothing that depends on what follows.
    Plain,
    /// GRE with a checksum.
    Gre,
    /// UDP, with a checksum or without.
    Udp { checksum: bool },
}

/// A super-packet inside another packet, ready to be written segment by segment.
#[derive(Clone, Debug)]
pub struct EncapsulatedSegmenter<'a> {
    /// All in front of the inner packet.
    front: &'a [u8],
    outer: IpHeader,
    shim: Shim,
    inner: Segmenter<'a>,
}

/// Whether segments and checksum of which the virtio header tells are those of a packet inside this one.
#[inline]
#[must_use]
pub fn is_encapsulated(header: &VirtioNetHeader, packet: &[u8]) -> bool {
    header.gso_type != GSO_NONE
        && header.needs_csum()
        && IpHeader::parse(packet).is_ok_and(|ip| usize::from(header.csum_start) > ip.header_bytes)
}

impl<'a> EncapsulatedSegmenter<'a> {
    /// Validates a packet with the virtio header that came with it.
    ///
    /// # Errors
    /// [`DropReason::IpMalformed`] for a bad outer IP header; [`DropReason::BadOffload`] for what cannot be cut: a fragment, an
    /// outer protocol that is not known, GRE with numbers, an inner header that is not where it must be, and all that
    /// [`Segmenter::new`] refuses.
    pub fn new(header: &VirtioNetHeader, packet: &'a [u8]) -> Result<Self, DropReason> {
        let outer = IpHeader::parse(packet)?;
        let packet = packet.get(..outer.total_bytes).ok_or(DropReason::IpMalformed)?;
        let inner_at = inner_at(header, packet).ok_or(DropReason::BadOffload)?;
        let (front, inside) = packet.split_at_checked(inner_at).ok_or(DropReason::BadOffload)?;
        let shim = front.get(outer.header_bytes..).ok_or(DropReason::BadOffload)?;
        let shim = Shim::of(&outer, shim).ok_or(DropReason::BadOffload)?;
        let inner = Segmenter::new(&header.without_front(inner_at as u16), inside)?;
        if outer.fragment.is_some() || inner_at + inner.header_bytes() + inner.payload_bytes() < packet.len()
        {
            return Err(DropReason::BadOffload);
        }
        Ok(Self { front, outer, shim, inner })
    }

    /// How many segments there are, at least 1.
    #[must_use]
    pub fn segments(&self) -> usize {
        self.inner.segments()
    }

    /// Bytes of segment `index` with all its headers; zero beyond the last.
    #[must_use]
    pub fn segment_bytes(&self, index: usize) -> usize {
        match self.inner.segment_bytes(index) {
            0 => 0,
            bytes => self.front.len() + bytes,
        }
    }

    /// Writes segment `index` to the start of `out` and returns its length. Zero beyond the last segment or when `out` is
    /// shorter than [`EncapsulatedSegmenter::segment_bytes`].
    ///
    /// Rebuilt per segment: what [`Segmenter::write_segment`] does inside, with a whole checksum; outside IPv4 identification
    /// (+ index), lengths and checksums.
    pub fn write_segment(&self, index: usize, out: &mut [u8]) -> usize {
        let Some(out) = out.get_mut(..self.segment_bytes(index)).filter(|out| !out.is_empty()) else {
            return 0;
        };
        let bytes = out.len();
        let (front, inside) = out.split_at_mut(self.front.len());
        front.copy_from_slice(self.front);
        self.inner.write_segment(index, inside);
        if complete_checksum(inside).is_err() {
            return 0;
        }
        self.rebuild(index, out);
        bytes
    }

    fn rebuild(&self, index: usize, segment: &mut [u8]) {
        let (outer, bytes) = (&self.outer, segment.len());
        if outer.version == 4 {
            let id = u16_at(segment, 4).unwrap_or(0).wrapping_add(index as u16);
            put_u16(segment, 2, bytes as u16);
            put_u16(segment, 4, id);
            put_u16(segment, 10, 0);
            let sum = checksum::sum(segment.get(..outer.header_bytes).unwrap_or_default(), 0);
            put_u16(segment, 10, checksum::finish(sum));
        } else {
            put_u16(segment, 4, (bytes - IPV6_HEADER_BYTES) as u16);
        }
        let shim = segment.get_mut(outer.header_bytes..).unwrap_or_default();
        match self.shim {
            Shim::Plain => {}
            Shim::Gre => {
                put_u16(shim, GRE_CHECKSUM_OFFSET, 0);
                let sum = checksum::finish(checksum::sum(shim, 0));
                put_u16(shim, GRE_CHECKSUM_OFFSET, sum);
            }
            Shim::Udp { checksum } => {
                put_u16(shim, 4, shim.len() as u16);
                if checksum {
                    put_u16(shim, UDP_CHECKSUM_OFFSET, 0);
                    let sum = checksum::pseudo_header(outer.src, outer.dst, PROTOCOL_UDP, shim.len());
                    let sum = checksum::nonzero(checksum::finish(checksum::sum(shim, sum)));
                    put_u16(shim, UDP_CHECKSUM_OFFSET, sum);
                }
            }
        }
    }
}

impl Shim {
    /// Of these bytes behind an IP header; `None`: not known, or each packet's has something of its own.
    fn of(outer: &IpHeader, shim: &[u8]) -> Option<Self> {
        match outer.protocol {
            PROTOCOL_IPV4 | PROTOCOL_IPV6 if shim.is_empty() => Some(Self::Plain),
            PROTOCOL_GRE if shim.len() >= GRE_HEADER_BYTES => {
                let flags = u16_at(shim, 0)?;
                let checksum = flags & GRE_CHECKSUM != 0;
                let known = flags & (GRE_SEQUENCE | GRE_VERSION) == 0;
                let fits = !checksum || shim.len() >= GRE_CHECKSUM_OFFSET + 4;
                (known && fits).then_some(if checksum { Self::Gre } else { Self::Plain })
            }
            PROTOCOL_UDP if shim.len() >= UDP_HEADER_BYTES => {
                let checksum = u16_at(shim, UDP_CHECKSUM_OFFSET)? != 0;
                Some(Self::Udp { checksum })
            }
            _ => None,
        }
    }
}

/// Where the inner IP header begins: the one that ends where the virtio header says that the transport header begins, and of
/// which the packet has all bytes and no more.
fn inner_at(header: &VirtioNetHeader, packet: &[u8]) -> Option<usize> {
    let (version4, version6, protocol) = match header.gso_type & !GSO_ECN {
        GSO_TCPV4 => (true, false, PROTOCOL_TCP),
        GSO_TCPV6 => (false, true, PROTOCOL_TCP),
        GSO_UDP_L4 => (true, true, PROTOCOL_UDP),
        _ => return None,
    };
    let start = usize::from(header.csum_start);
    let fits = |at: usize, version: u8| {
        packet.get(at..).and_then(|inside| IpHeader::parse(inside).ok()).is_some_and(|ip| {
            (ip.version, ip.protocol) == (version, protocol)
                && (at + ip.header_bytes, at + ip.total_bytes) == (start, packet.len())
        })
    };
    let at6 = start.checked_sub(IPV6_HEADER_BYTES).filter(|at| version6 && fits(*at, 6));
    let at4 = || (5..16).filter_map(|words| start.checked_sub(words * 4)).find(|at| fits(*at, 4));
    at6.or_else(|| if version4 { at4() } else { None })
}

#[cfg(test)]
mod tests;
