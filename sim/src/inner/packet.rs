//! Real IPv4 packets with UDP or TCP, as a host's kernel hands them to a TUN device, and their parsing.

use std::net::Ipv4Addr;

use packet::checksum;
use packet::segment::complete_checksum;
use packet::vnet::{GSO_TCPV4, NEEDS_CSUM, VirtioNetHeader};

const IP_BYTES: usize = 20;
const UDP_BYTES: usize = 8;
/// TCP flag: acknowledgement number is valid.
pub const ACK: u8 = 0x10;
/// TCP flag: push.
pub const PSH: u8 = 0x08;

/// An address and a port.
pub type End = (Ipv4Addr, u16);

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
pub fn udp(from: End, to: End, payload: &[u8]) -> (VirtioNetHeader, Vec<u8>) {
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

/// Fields of a TCP packet besides its payload.
#[derive(Clone, Copy, Debug, Default)]
pub struct TcpHead<'a> {
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgement number.
    pub acknowledged: u32,
    /// SACK blocks, at most four.
    pub sacks: &'a [(u32, u32)],
}

/// A TCP packet, a super-packet when `fill` is asked for more than `mss` bytes; checksum partial as from a kernel.
pub fn tcp(
    from: End,
    to: End,
    head: &TcpHead<'_>,
    mss: usize,
    payload_bytes: usize,
    fill: impl FnOnce(&mut [u8]),
) -> (VirtioNetHeader, Vec<u8>) {
    let sacks = &head.sacks[..head.sacks.len().min(4)];
    let options = if sacks.is_empty() { 0 } else { 4 + 8 * sacks.len() };
    let tcp_bytes = 20 + options;
    let mut out = Vec::with_capacity(IP_BYTES + tcp_bytes + payload_bytes);
    ip(&mut out, from.0, to.0, 6, tcp_bytes + payload_bytes);
    out.extend(from.1.to_be_bytes());
    out.extend(to.1.to_be_bytes());
    out.extend(head.sequence.to_be_bytes());
    out.extend(head.acknowledged.to_be_bytes());
    out.push((tcp_bytes as u8 / 4) << 4);
    out.push(if payload_bytes > 0 { ACK | PSH } else { ACK });
    out.extend([0xff, 0xff, 0, 0, 0, 0]);
    if !sacks.is_empty() {
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

/// A packet that came out of the tunnel, checked.
#[derive(Clone, Debug)]
pub struct Parsed<'a> {
    /// Source.
    pub from: End,
    /// Destination.
    pub to: End,
    /// 6 or 17.
    pub protocol: u8,
    /// TCP sequence number.
    pub sequence: u32,
    /// TCP acknowledgement number.
    pub acknowledged: u32,
    /// TCP SACK blocks.
    pub sacks: Vec<(u32, u32)>,
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
        if *packet.first()? != 0x45 || total != packet.len() || !checksum::verify_packet(packet) {
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
            payload: &[],
        };
        match parsed.protocol {
            17 => parsed.payload = packet.get(28..)?,
            6 => {
                parsed.sequence = u32_at(packet, 24)?;
                parsed.acknowledged = u32_at(packet, 28)?;
                let header = usize::from(*packet.get(32)? >> 4) * 4;
                let options = packet.get(40..20 + header)?;
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
    use packet::segment::Segmenter;

    const A: End = (Ipv4Addr::new(10, 0, 0, 1), 1_000);
    const B: End = (Ipv4Addr::new(10, 1, 0, 1), 2_000);

    #[test]
    fn udp_round_trip_and_damage() {
        let (_, mut bytes) = udp(A, B, b"hello");
        let parsed = Parsed::of(&mut bytes, false).unwrap();
        assert_eq!((parsed.from, parsed.to, parsed.payload), (A, B, &b"hello"[..]));
        bytes[30] ^= 1;
        assert!(Parsed::of(&mut bytes, false).is_none());
    }

    #[test]
    fn tcp_super_packet_segments_are_sound() {
        let head = TcpHead { sequence: 100, acknowledged: 7, sacks: &[(1, 2), (5, 9)] };
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
