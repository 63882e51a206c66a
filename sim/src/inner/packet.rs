//! Real IPv4 packets with UDP, TCP or ICMP echo, as a host's kernel hands them to a device, and their parsing.

use std::net::Ipv4Addr;

use packet::DropReason;
use packet::checksum;
use packet::segment::{Segmenter, complete_checksum};
use packet::vnet::{GSO_TCPV4, NEEDS_CSUM, VirtioNetHeader};

const IP_BYTES: usize = 20;
const UDP_BYTES: usize = 8;
/// TCP flag: acknowledgement number is valid.
pub const ACK: u8 = 0x10;
/// TCP flag: push.
pub const PSH: u8 = 0x08;

/// TCP flag: synchronize sequence numbers.
pub const SYN: u8 = 0x02;
/// Window scale that both ends offer: their windows reach 8 MB.
const WINDOW_SCALE: u8 = 7;
const ICMP: u8 = 1;
const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST: u8 = 8;

/// An address and a port, or an ICMP identifier.
pub type Socket = (Ipv4Addr, u16);

fn ip(out: &mut Vec<u8>, from: Ipv4Addr, to: Ipv4Addr, protocol: u8, upper_bytes: usize) {
    let total = (IP_BYTES + upper_bytes) as u16;
    out.extend([0x45, 0]);
    out.extend(total.to_be_bytes());
    // Identification 0 and "do not fragment", as Linux sends it.
    out.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
    out.extend(from.octets());
    out.extend(to.octets());
    let sum = checksum::finish(checksum::sum(&out[..IP_BYTES], 0));
    out[10..12].copy_from_slice(&sum.to_be_bytes());
}

/// A UDP packet with its checksum complete.
pub fn udp(from: Socket, to: Socket, payload: &[u8]) -> (VirtioNetHeader, Vec<u8>) {
    let length = UDP_BYTES + payload.len();
    let mut out = Vec::with_capacity(IP_BYTES + length);
    ip(&mut out, from.0, to.0, 17, length);
    out.extend(from.1.to_be_bytes());
    out.extend(to.1.to_be_bytes());
    out.extend((length as u16).to_be_bytes());
    out.extend([0, 0]);
    out.extend(payload);
    let pseudo = checksum::pseudo_header_v4(from.0, to.0, 17, length as u16);
    let sum = checksum::nonzero(checksum::finish(checksum::sum(&out[IP_BYTES..], pseudo)));
    out[26..28].copy_from_slice(&sum.to_be_bytes());
    (VirtioNetHeader::default(), out)
}

/// Marks a packet with a class (RFC 2474).
pub fn set_dscp(packet: &mut [u8], dscp: u8) {
    let Some(header) = packet.first_chunk_mut::<IP_BYTES>() else { return };
    header[1] = dscp << 2;
    header[10..12].fill(0);
    let sum = checksum::finish(checksum::sum(header, 0));
    header[10..12].copy_from_slice(&sum.to_be_bytes());
}

/// Fields of a TCP packet besides its payload.
#[derive(Clone, Copy, Debug, Default)]
pub struct TcpHead<'a> {
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgement number.
    pub acknowledged: u32,
    /// SACK blocks, at most four. Not in a SYN.
    pub sacks: &'a [(u32, u32)],
    /// Begins the connection: with SYN and window scale; with ACK as well when it answers.
    pub syn: Option<Syn>,
}

/// A segment that begins a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Syn {
    /// The client's.
    Request,
    /// The server's.
    Answer,
}

/// A TCP packet, a super-packet when `fill` is asked for more than `mss` bytes; checksum partial as from a kernel.
pub fn tcp(
    from: Socket,
    to: Socket,
    head: &TcpHead<'_>,
    mss: usize,
    payload_bytes: usize,
    fill: impl FnOnce(&mut [u8]),
) -> (VirtioNetHeader, Vec<u8>) {
    let sacks = &head.sacks[..head.sacks.len().min(4)];
    let options = match head.syn {
        Some(_) => 4,
        None if sacks.is_empty() => 0,
        None => 4 + 8 * sacks.len(),
    };
    let tcp_bytes = 20 + options;
    let mut out = Vec::with_capacity(IP_BYTES + tcp_bytes + payload_bytes);
    ip(&mut out, from.0, to.0, 6, tcp_bytes + payload_bytes);
    out.extend(from.1.to_be_bytes());
    out.extend(to.1.to_be_bytes());
    out.extend(head.sequence.to_be_bytes());
    out.extend(head.acknowledged.to_be_bytes());
    out.push((tcp_bytes as u8 / 4) << 4);
    out.push(match head.syn {
        Some(Syn::Request) => SYN,
        Some(Syn::Answer) => SYN | ACK,
        None if payload_bytes > 0 => ACK | PSH,
        None => ACK,
    });
    out.extend([0xff, 0xff, 0, 0, 0, 0]);
    if head.syn.is_some() {
        out.extend([1, 3, 3, WINDOW_SCALE]);
    } else if !sacks.is_empty() {
        out.extend([1, 1, 5, 2 + 8 * sacks.len() as u8]);
        for (left, right) in sacks {
            out.extend(left.to_be_bytes());
            out.extend(right.to_be_bytes());
        }
    }
    let header = out.len();
    out.resize(header + payload_bytes, 0);
    fill(&mut out[header..]);
    // The field holds the pseudo-header's sum: the "device" completes it.
    let pseudo = checksum::pseudo_header_v4(from.0, to.0, 6, (tcp_bytes + payload_bytes) as u16);
    out[36..38].copy_from_slice(&checksum::fold(pseudo).to_be_bytes());
    let mut offload = VirtioNetHeader {
        flags: NEEDS_CSUM,
        csum_start: IP_BYTES as u16,
        csum_offset: 16,
        hdr_len: header as u16,
        ..VirtioNetHeader::default()
    };
    if payload_bytes > mss {
        offload.gso_type = GSO_TCPV4;
        offload.gso_size = mss as u16;
    }
    (offload, out)
}

/// An ICMP echo request.
pub fn echo_request(from: Ipv4Addr, to: Ipv4Addr, id: u16, number: u16) -> (VirtioNetHeader, Vec<u8>) {
    echo(from, to, ECHO_REQUEST, id, number)
}

/// Answer of a host to an ICMP echo request.
pub fn echo_reply(request: &Parsed<'_>) -> (VirtioNetHeader, Vec<u8>) {
    echo(request.to.0, request.from.0, ECHO_REPLY, request.from.1, request.sequence as u16)
}

fn echo(from: Ipv4Addr, to: Ipv4Addr, kind: u8, id: u16, number: u16) -> (VirtioNetHeader, Vec<u8>) {
    let mut out = Vec::with_capacity(IP_BYTES + 8);
    ip(&mut out, from, to, ICMP, 8);
    out.extend([kind, 0, 0, 0]);
    out.extend(id.to_be_bytes());
    out.extend(number.to_be_bytes());
    let sum = checksum::finish(checksum::sum(&out[IP_BYTES..], 0));
    out[22..24].copy_from_slice(&sum.to_be_bytes());
    (VirtioNetHeader::default(), out)
}

/// Packets that a super-packet stands for, each with whether its checksum is partial: as a host's kernel takes it.
///
/// # Errors
/// The offload header contradicts the packet.
pub fn segments(offload: &VirtioNetHeader, packet: &[u8]) -> Result<Vec<(Vec<u8>, bool)>, DropReason> {
    let segmenter = Segmenter::new(offload, packet)?;
    let segment = |index| {
        let mut out = vec![0; segmenter.segment_bytes(index)];
        segmenter.write_segment(index, &mut out);
        (out, segmenter.checksum_partial())
    };
    Ok((0..segmenter.segments()).map(segment).collect())
}

/// A packet that came to a host, checked.
#[derive(Clone, Debug)]
pub struct Parsed<'a> {
    /// Source.
    pub from: Socket,
    /// Destination.
    pub to: Socket,
    /// 1, 6 or 17.
    pub protocol: u8,
    /// TCP sequence number, or number of an ICMP echo.
    pub sequence: u32,
    /// TCP acknowledgement number.
    pub acknowledged: u32,
    /// TCP SACK blocks.
    pub sacks: Vec<(u32, u32)>,
    /// It begins a TCP connection.
    pub syn: Option<Syn>,
    /// It is an ICMP echo request.
    pub is_echo_request: bool,
    /// Payload.
    pub payload: &'a [u8],
}

impl<'a> Parsed<'a> {
    /// Completes a partial checksum, verifies every checksum and length, and parses. `None`: the packet is damaged.
    pub fn of(packet: &'a mut [u8], partial: bool) -> Option<Self> {
        if partial {
            complete_checksum(packet).ok()?;
        }
        let packet: &'a [u8] = packet;
        let total = usize::from(u16_at(packet, 2)?);
        let is_icmp = *packet.get(9)? == ICMP;
        let is_sound = if is_icmp { echo_is_sound(packet) } else { checksum::verify_packet(packet) };
        if *packet.first()? != 0x45 || total != packet.len() || !is_sound {
            return None;
        }
        let address = |at: usize| packet.get(at..at + 4)?.first_chunk::<4>().map(|b| Ipv4Addr::from(*b));
        let from = (address(12)?, u16_at(packet, 20)?);
        let to = (address(16)?, u16_at(packet, 22)?);
        let mut parsed = Self {
            from,
            to,
            protocol: packet[9],
            sequence: 0,
            acknowledged: 0,
            sacks: Vec::new(),
            syn: None,
            is_echo_request: false,
            payload: &[],
        };
        match parsed.protocol {
            ICMP => {
                let id = u16_at(packet, 24)?;
                (parsed.from.1, parsed.to.1) = (id, id);
                parsed.sequence = u32::from(u16_at(packet, 26)?);
                parsed.is_echo_request = packet.get(20) == Some(&ECHO_REQUEST);
            }
            17 => parsed.payload = packet.get(28..)?,
            6 => {
                parsed.sequence = u32_at(packet, 24)?;
                parsed.acknowledged = u32_at(packet, 28)?;
                let header = usize::from(*packet.get(32)? >> 4) * 4;
                let options = packet.get(40..20 + header)?;
                parsed.syn = match packet.get(33)? & (SYN | ACK) {
                    SYN => Some(Syn::Request),
                    flags if flags & SYN != 0 => Some(Syn::Answer),
                    _ => None,
                };
                if options.len() > 4 && options[2] == 5 {
                    let blocks = options[4..].chunks_exact(8);
                    parsed.sacks = blocks.filter_map(|b| Some((u32_at(b, 0)?, u32_at(b, 4)?))).collect();
                }
                parsed.payload = packet.get(20 + header..)?;
            }
            _ => return None,
        }
        Some(parsed)
    }
}

fn echo_is_sound(packet: &[u8]) -> bool {
    let (Some(ip), Some(icmp)) = (packet.get(..IP_BYTES), packet.get(IP_BYTES..)) else { return false };
    let is_echo = matches!(icmp.first(), Some(&ECHO_REQUEST | &ECHO_REPLY));
    is_echo && checksum::verify_ipv4_header(ip) && checksum::finish(checksum::sum(icmp, 0)) == 0
}

/// Big-endian number at `at`.
pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.first_chunk().map(|b| u16::from_be_bytes(*b))
}

/// Big-endian number at `at`.
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.first_chunk().map(|b| u32::from_be_bytes(*b))
}

/// Big-endian number at `at`.
pub fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 8)?.first_chunk().map(|b| u64::from_be_bytes(*b))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const A: Socket = (Ipv4Addr::new(10, 0, 0, 1), 1_000);
    const B: Socket = (Ipv4Addr::new(10, 1, 0, 1), 2_000);

    #[test]
    fn udp_round_trip_and_damage() {
        let (_, mut bytes) = udp(A, B, b"hello");
        let parsed = Parsed::of(&mut bytes, false).unwrap();
        assert_eq!((parsed.from, parsed.to, parsed.payload), (A, B, &b"hello"[..]));
        bytes[30] ^= 1;
        assert!(Parsed::of(&mut bytes, false).is_none());
    }

    #[test]
    fn echo_round_trip_and_damage() {
        let (_, mut bytes) = echo_request(A.0, B.0, 77, 5);
        let request = Parsed::of(&mut bytes, false).unwrap();
        assert_eq!((request.from, request.to), ((A.0, 77), (B.0, 77)));
        let (_, mut reply) = echo_reply(&request);
        let parsed = Parsed::of(&mut reply, false).unwrap();
        assert_eq!((parsed.to, parsed.sequence, parsed.is_echo_request), ((A.0, 77), 5, false));
        reply[27] ^= 1;
        assert!(Parsed::of(&mut reply, false).is_none());
    }

    #[test]
    fn tcp_super_packet_segments_are_sound() {
        let head = TcpHead { sequence: 100, acknowledged: 7, sacks: &[(1, 2), (5, 9)], syn: None };
        let (offload, bytes) = tcp(A, B, &head, 1_000, 2_500, |payload| payload.fill(7));
        let segmenter = Segmenter::new(&offload, &bytes).unwrap();
        assert_eq!(segmenter.segments(), 3);
        let mut out = [0; 1_500];
        let length = segmenter.write_segment(2, &mut out);
        let parsed = Parsed::of(&mut out[..length], segmenter.checksum_partial()).unwrap();
        assert_eq!((parsed.sequence, parsed.acknowledged, parsed.payload.len()), (2_100, 7, 500));
        assert_eq!(parsed.sacks, [(1, 2), (5, 9)]);
    }
}
