//! The PROXY protocol, version 2 (haproxy's `doc/proxy-protocol.txt` §2.2), for TCP flows that a gateway passes on
//! without ending them: the header is inserted in front of the client's first byte, and the sequence numbers behind it
//! are shifted for the rest of the connection.
//!
//! Nothing is held back or sent again by the gateway. The header goes in front of the segment that starts at the client's
//! first byte: mostly the ACK that ends the handshake, so that a server that speaks first has it too. Every copy of
//! such a segment gets the same header until the server has acknowledged it; if one is lost, the client or the server's
//! repeated SYN-ACK brings the next.
//!
//! For each segment of a flow with [`crate::flow::flags::PROXY_PROTOCOL`]:
//!
//! * original direction: [`crate::tcp::follow`], then, if [`Shift::needs_header`], [`header_segment`] and the segment
//!   itself [`Shift::behind_header`] ([`insert`] makes one of both, where there is room), else [`shift`];
//! * reply direction: [`shift`], then [`crate::tcp::follow`], which knows the client's numbers only.
//!
//! The MSS that the server tells is lowered by the header's length ([`lower_mss`]), so that header and segment fit
//! together wherever the server sends them on. Data in the SYN is refused.

mod options;

use std::net::IpAddr;

use packet::icmp;
use packet::ip::{PROTOCOL_TCP, PROTOCOL_UDP};
use packet::{DropReason, FlowKey, IpHeader, checksum};

use crate::flow::Direction;
use crate::rewrite::bytes::{
    changed, changed_partial, delta, delta16, put, put_u16, put_u32, u16_at, u32_at,
};
use crate::tcp::{ACK, FIN, PSH, RST, SYN, Segment, URG};

/// Longest header, bytes: of a flow over IPv6.
pub const HEADER_BYTES_MAX: usize = 52;
const HEADER_BYTES_V4: usize = 28;
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, command PROXY.
const VERSION_AND_COMMAND: u8 = 0x21;
/// Header of a connection that the gateway makes for itself, as a health check: command LOCAL, no addresses.
pub const LOCAL: [u8; 16] = *b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";
const TCP_CHECKSUM_AT: usize = 16;
const TCP_FLAGS_AT: usize = 13;
const TCP_HEADER_BYTES: usize = 20;

/// The header of one flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    bytes: [u8; HEADER_BYTES_MAX],
    length: u8,
}

impl Header {
    /// The header for a flow. `key`: as the client sent it, before translation. `None`: neither TCP nor UDP, or addresses
    /// of different versions.
    #[must_use]
    pub fn of(key: &FlowKey) -> Option<Header> {
        let transport = match key.protocol {
            PROTOCOL_TCP => 1,
            PROTOCOL_UDP => 2,
            _ => return None,
        };
        let mut bytes = [0; HEADER_BYTES_MAX];
        put(&mut bytes, 0, &SIGNATURE);
        let (family, ports_at) = match (key.src, key.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                put(&mut bytes, 16, &src.octets());
                put(&mut bytes, 20, &dst.octets());
                (0x10, 24)
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                put(&mut bytes, 16, &src.octets());
                put(&mut bytes, 32, &dst.octets());
                (0x20, 48)
            }
            _ => return None,
        };
        put(&mut bytes, 12, &[VERSION_AND_COMMAND, family | transport]);
        put_u16(&mut bytes, 14, (ports_at + 4 - 16) as u16);
        put_u16(&mut bytes, ports_at, key.src_port);
        put_u16(&mut bytes, ports_at + 2, key.dst_port);
        Some(Header { bytes, length: (ports_at + 4) as u8 })
    }

    /// The bytes on the wire: 28 or 52.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.length)).unwrap_or_default()
    }
}

/// State of a flow whose sequence numbers are shifted: 8 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shift {
    /// Sequence number of the client's first byte of data.
    first: u32,
    /// Bytes inserted in front of it.
    length: u8,
    /// The server has all of them.
    acknowledged: bool,
}

impl Shift {
    /// `syn`: sequence number of the client's SYN; a SYN with another number makes a new `Shift`. `v6`: the flow is one of
    /// IPv6, so the header is the long one.
    #[must_use]
    pub const fn new(syn: u32, v6: bool) -> Shift {
        let length = if v6 { HEADER_BYTES_MAX } else { HEADER_BYTES_V4 } as u8;
        Shift { first: syn.wrapping_add(1), length, acknowledged: false }
    }

    /// Sequence number of the client's first byte of data, bytes inserted in front of it, whether the server has them all.
    #[must_use]
    pub const fn parts(&self) -> (u32, u8, bool) {
        (self.first, self.length, self.acknowledged)
    }

    /// The inverse of [`Shift::parts`]; `None`: no header is so long.
    #[must_use]
    pub const fn from_parts(first: u32, length: u8, acknowledged: bool) -> Option<Shift> {
        match length as usize {
            HEADER_BYTES_V4 | HEADER_BYTES_MAX => Some(Shift { first, length, acknowledged }),
            _ => None,
        }
    }

    /// This segment of the original direction must carry the header: [`insert`] it.
    #[inline]
    #[must_use]
    pub const fn needs_header(&self, segment: &Segment) -> bool {
        !self.acknowledged && segment.seq == self.first && !segment.has(SYN | RST)
    }

    /// For a segment that goes right behind the header, whatever was acknowledged: its numbers are all shifted.
    #[must_use]
    pub const fn behind_header(self) -> Shift {
        Shift { acknowledged: true, ..self }
    }

    /// The server has acknowledged the whole header.
    #[inline]
    #[must_use]
    pub const fn is_acknowledged(&self) -> bool {
        self.acknowledged
    }

    /// A client's sequence number as the server knows it.
    const fn for_server(&self, seq: u32) -> u32 {
        let behind = seq.wrapping_sub(self.first) as i32 > 0;
        if self.acknowledged || behind { seq.wrapping_add(self.length as u32) } else { seq }
    }

    /// A server's acknowledgment (or edge of a SACK block) as the client knows it. Of the header's own bytes the client
    /// knows nothing: they count as not acknowledged.
    const fn for_client(&self, ack: u32) -> u32 {
        let length = self.length as u32;
        let ahead = ack.wrapping_sub(self.first) as i32;
        if self.acknowledged || ahead > length as i32 {
            // After that the numbers wrap around: an acknowledgment older than the header becomes an older one.
            ack.wrapping_sub(length)
        } else if ahead > 0 {
            self.first
        } else {
            ack
        }
    }
}

/// Shifts the sequence number of a client's segment, or acknowledgment and SACK blocks of a server's, and notes when the
/// server has the header. `header` was parsed from this packet.
///
/// # Errors
/// The packet is unchanged then. [`DropReason::TcpInvalid`]: no whole TCP segment.
#[inline]
pub fn shift(
    packet: &mut [u8],
    header: &IpHeader,
    checksum_partial: bool,
    direction: Direction,
    shift: &mut Shift,
) -> Result<(), DropReason> {
    let upper = packet.get_mut(header.header_bytes..header.total_bytes).ok_or(DropReason::TcpInvalid)?;
    if header.protocol != PROTOCOL_TCP || header.is_fragmented() {
        return Err(DropReason::TcpInvalid);
    }
    let segment = Segment::of(upper).ok_or(DropReason::TcpInvalid)?;
    let change = match direction {
        Direction::Original if segment.has(SYN) => 0,
        Direction::Original => {
            let seq = shift.for_server(segment.seq);
            put_u32(upper, 4, seq);
            delta(segment.seq, seq)
        }
        Direction::Reply if !segment.has(ACK) || segment.has(SYN) => 0,
        Direction::Reply => {
            let ahead = segment.ack.wrapping_sub(shift.first) as i32;
            shift.acknowledged |= ahead >= i32::from(shift.length);
            let ack = shift.for_client(segment.ack);
            put_u32(upper, 8, ack);
            let header_bytes = upper.len() - segment.payload_bytes as usize;
            let blocks = upper.get_mut(TCP_HEADER_BYTES..header_bytes).unwrap_or_default();
            delta(segment.ack, ack) + options::shift_sack(blocks, |edge| shift.for_client(edge))
        }
    };
    if change != 0 && !checksum_partial {
        put_u16(upper, TCP_CHECKSUM_AT, changed(u16_at(upper, TCP_CHECKSUM_AT).unwrap_or(0), change));
    }
    Ok(())
}

/// Writes `packet` with the header in front of its payload to the start of `out` and returns its length. Its sequence
/// number stays: the header's bytes come first. A super-packet stays one; its `gso_size` does not change.
///
/// # Errors
/// [`DropReason::TcpInvalid`]: no whole TCP segment. [`DropReason::NatUnsupported`]: data in a SYN (RFC 7413); the client
/// sends it again without. [`DropReason::TooBig`]: longer than IP allows or than `out`.
pub fn insert(
    packet: &[u8],
    header: &IpHeader,
    checksum_partial: bool,
    proxy: &Header,
    out: &mut [u8],
) -> Result<usize, DropReason> {
    let upper = header.payload(packet);
    if header.protocol != PROTOCOL_TCP || header.is_fragmented() {
        return Err(DropReason::TcpInvalid);
    }
    let segment = Segment::of(upper).ok_or(DropReason::TcpInvalid)?;
    if segment.has(SYN) {
        return Err(DropReason::NatUnsupported);
    }
    let inserted = proxy.bytes();
    let headers = header.total_bytes - segment.payload_bytes as usize;
    let bytes = header.total_bytes + inserted.len();
    let length = if header.version == 4 { bytes } else { bytes - packet::ip::IPV6_HEADER_BYTES };
    let out = out.get_mut(..bytes).filter(|_| length <= usize::from(u16::MAX)).ok_or(DropReason::TooBig)?;
    let (head, payload) = packet
        .get(..header.total_bytes)
        .and_then(|packet| packet.split_at_checked(headers))
        .ok_or(DropReason::TcpInvalid)?;
    put(out, 0, head);
    put(out, headers, inserted);
    put(out, headers + inserted.len(), payload);
    if header.version == 4 {
        let change = delta16(u16_at(packet, 2).unwrap_or(0), length as u16);
        put_u16(out, 10, changed(u16_at(packet, 10).unwrap_or(0), change));
        put_u16(out, 2, length as u16);
    } else {
        put_u16(out, 4, length as u16);
    }
    // The header has an even number of bytes and starts at an even offset: the payload's words stay whole.
    let at = header.header_bytes + TCP_CHECKSUM_AT;
    let old = u16_at(packet, at).unwrap_or(0);
    let change = delta16(upper.len() as u16, (upper.len() + inserted.len()) as u16);
    let new = if checksum_partial {
        changed_partial(old, change)
    } else {
        changed(old, change + u64::from(checksum::sum(inserted, 0)))
    };
    put_u16(out, at, new);
    Ok(bytes)
}

/// Appends a segment with the header as its payload to `out`: addresses, options, acknowledgment and window of `packet`,
/// which starts at the client's first byte, but neither its payload nor its FIN. Its checksum is complete.
///
/// # Errors
/// As [`insert`].
pub fn header_segment(
    packet: &[u8],
    header: &IpHeader,
    proxy: &Header,
    out: &mut Vec<u8>,
) -> Result<(), DropReason> {
    let segment = Segment::of(header.payload(packet)).ok_or(DropReason::TcpInvalid)?;
    let headers = header.total_bytes.saturating_sub(segment.payload_bytes as usize);
    let mut bare = packet.get(..headers).ok_or(DropReason::TcpInvalid)?.to_vec();
    if header.version == 4 {
        let change = delta16(u16_at(&bare, 2).unwrap_or(0), headers as u16);
        let sum = changed(u16_at(&bare, 10).unwrap_or(0), change);
        put_u16(&mut bare, 10, sum);
        put_u16(&mut bare, 2, headers as u16);
    } else {
        put_u16(&mut bare, 4, headers.saturating_sub(packet::ip::IPV6_HEADER_BYTES) as u16);
    }
    let at = header.header_bytes;
    if let Some(flags) = bare.get_mut(at + TCP_FLAGS_AT) {
        *flags &= !(FIN | PSH | URG);
    }
    put_u16(&mut bare, at + TCP_CHECKSUM_AT, 0);
    let upper = bare.get(at..).unwrap_or_default();
    let pseudo = checksum::pseudo_header(header.src, header.dst, PROTOCOL_TCP, upper.len());
    let sum = checksum::finish(checksum::sum(upper, pseudo));
    put_u16(&mut bare, at + TCP_CHECKSUM_AT, sum);
    let bare_header = IpHeader::parse(&bare)?;
    let start = out.len();
    out.resize(start + headers + proxy.bytes().len(), 0);
    let room = out.get_mut(start..).unwrap_or_default();
    insert(&bare, &bare_header, false, proxy, room)?;
    Ok(())
}

/// Lowers the MSS that a server tells in its SYN-ACK, so that what its client sends has room for the header. Anything else
/// stays as it is, and so does a SYN-ACK without the option: 536 bytes (RFC 9293 §3.7.1) fit with any header.
pub fn lower_mss(packet: &mut [u8], header: &IpHeader, checksum_partial: bool, shift: &Shift) {
    let Some(upper) = packet.get_mut(header.header_bytes..header.total_bytes) else { return };
    let Some(segment) = Segment::of(upper).filter(|segment| segment.flags & (SYN | ACK) == SYN | ACK) else {
        return;
    };
    let header_bytes = upper.len() - segment.payload_bytes as usize;
    let options = upper.get_mut(TCP_HEADER_BYTES..header_bytes).unwrap_or_default();
    let change = options::lower_mss(options, u16::from(shift.length));
    if change != 0 && !checksum_partial {
        put_u16(upper, TCP_CHECKSUM_AT, changed(u16_at(upper, TCP_CHECKSUM_AT).unwrap_or(0), change));
    }
}

/// Gives an ICMP error about a client's segment, on its way back to the client, the sequence number that the client knows.
/// The error's checksum follows. `header` was parsed from this packet; an error that quotes too little stays.
pub fn shift_quote(packet: &mut [u8], header: &IpHeader, shift: &Shift) {
    let Some(message) = packet.get_mut(header.header_bytes..header.total_bytes) else { return };
    let Some(inner) = message.get(icmp::HEADER_BYTES..).and_then(|quote| IpHeader::parse_quoted(quote).ok())
    else {
        return;
    };
    let at = icmp::HEADER_BYTES + inner.header_bytes + 4;
    let first = inner.fragment.is_none_or(|fragment| fragment.offset == 0);
    let Some(old) = u32_at(message, at).filter(|_| first && inner.protocol == PROTOCOL_TCP) else { return };
    let new = shift.for_client(old);
    put_u32(message, at, new);
    put_u16(message, 2, changed(u16_at(message, 2).unwrap_or(0), delta(old, new)));
}

/// The sequence number of a client's SYN, for [`Shift::new`]. `None`: no SYN, or one that is also a SYN-ACK.
#[must_use]
pub fn syn_of(segment: &Segment) -> Option<u32> {
    (segment.flags & (SYN | ACK) == SYN).then_some(segment.seq)
}

#[cfg(test)]
mod tests;
