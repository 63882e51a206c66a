//! TCP segments in front of which the PROXY protocol's header goes, and those that follow.

use packet::ip::PROTOCOL_TCP;
use packet::{FlowKey, IpHeader, checksum};
use services::flow::Direction;
use services::proxy_protocol::{
    HEADER_BYTES_MAX, Header, Shift, header_segment, insert, lower_mss, shift, shift_quote, syn_of,
};
use services::tcp::Segment;

/// Longest segment of an input: what is longer says nothing new.
const SEGMENT_BYTES_MAX: usize = 600;

/// One connection: `flags:8 | first:32`, then segments `direction:8 | length:16 | TCP header and payload`. Flags: 1 IPv6, 2 partial
/// checksums. Lengths and everything but numbers, SACK blocks and MSS stay, checksums stay right, and what a client is told to have
/// sent it has sent.
pub fn proxy_protocol(data: &[u8]) {
    let Some((head, mut rest)) = data.split_first_chunk::<5>() else { return };
    let (six, partial) = (head[0] & 1 != 0, head[0] & 2 != 0);
    let syn = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
    let mut state = Shift::new(syn, six);
    let proxy = Header::of(&key(six)).expect("a flow of TCP");
    while let Some((step, tail)) = rest.split_first_chunk::<3>() {
        let length = usize::from(u16::from_be_bytes([step[1], step[2]])) % SEGMENT_BYTES_MAX;
        let (segment, tail) = tail.split_at(length.min(tail.len()));
        rest = tail;
        let direction = if step[0] & 1 == 0 { Direction::Original } else { Direction::Reply };
        let mut packet = packet_of(six, direction, segment, partial);
        let Ok(header) = IpHeader::parse(&packet) else { continue };
        if step[0] & 2 != 0 {
            quote(six, &packet, &state);
        }
        if let Some(syn) = Segment::of(segment).as_ref().and_then(syn_of) {
            state = Shift::new(syn, six);
        }
        if direction == Direction::Original {
            inserted(&packet, &header, partial, &proxy);
        } else {
            lower_mss(&mut packet, &header, partial, &state);
            checked(&packet, &header, partial);
        }
        let before = (packet.clone(), state);
        match shift(&mut packet, &header, partial, direction, &mut state) {
            Ok(()) => same_but_numbers(&before.0, &packet, &header, direction),
            Err(_) => assert!(before.1 == state, "a refused segment changed the state"),
        }
        checked(&packet, &header, partial);
    }
    round_trip(syn, six);
}

fn key(six: bool) -> FlowKey {
    let (src, dst) = match six {
        true => ("2001:db8::1".parse(), "2001:db8:f::2".parse()),
        false => ("192.0.2.1".parse(), "198.51.100.2".parse()),
    };
    FlowKey {
        src: src.expect("an address"),
        dst: dst.expect("an address"),
        src_port: 40_000,
        dst_port: 80,
        protocol: PROTOCOL_TCP,
    }
}

/// A packet of the connection with this segment; its checksum is right, or the pseudo-header's alone.
fn packet_of(six: bool, direction: Direction, segment: &[u8], partial: bool) -> Vec<u8> {
    let key = key(six);
    let (src, dst) = match direction {
        Direction::Original => (key.src, key.dst),
        Direction::Reply => (key.dst, key.src),
    };
    let mut packet = ip_header(src, dst, PROTOCOL_TCP, segment.len());
    let start = packet.len();
    packet.extend_from_slice(segment);
    if let Some(field) = packet.get_mut(start + 16..start + 18) {
        field.fill(0);
        let pseudo = checksum::pseudo_header(src, dst, PROTOCOL_TCP, segment.len());
        let sum = match partial {
            true => !checksum::finish(pseudo),
            false => checksum::finish(checksum::sum(&packet[start..], pseudo)),
        };
        packet[start + 16..start + 18].copy_from_slice(&sum.to_be_bytes());
    }
    packet
}

fn ip_header(src: std::net::IpAddr, dst: std::net::IpAddr, protocol: u8, payload: usize) -> Vec<u8> {
    use std::net::IpAddr;
    let mut packet = Vec::new();
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let [high, low] = ((20 + payload) as u16).to_be_bytes();
            packet.extend([0x45, 0, high, low, 0, 1, 0x40, 0, 64, protocol, 0, 0]);
            packet.extend(src.octets());
            packet.extend(dst.octets());
            let sum = checksum::finish(checksum::sum(&packet, 0));
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let [high, low] = (payload as u16).to_be_bytes();
            packet.extend([0x60, 0, 0, 0, high, low, protocol, 64]);
            packet.extend(src.octets());
            packet.extend(dst.octets());
        }
        _ => unreachable!("both addresses are of one family"),
    }
    packet
}

/// The checksum of a TCP segment is right, if it has one.
fn checked(packet: &[u8], header: &IpHeader, partial: bool) {
    let upper = header.payload(packet);
    if partial || upper.len() < 20 {
        return;
    }
    let pseudo = checksum::pseudo_header(header.src, header.dst, PROTOCOL_TCP, upper.len());
    assert_eq!(checksum::finish(checksum::sum(upper, pseudo)), 0, "a wrong checksum");
}

/// Both ways to put the header in front.
fn inserted(packet: &[u8], header: &IpHeader, partial: bool, proxy: &Header) {
    let mut out = [0; SEGMENT_BYTES_MAX + HEADER_BYTES_MAX + 40];
    if let Ok(bytes) = insert(packet, header, partial, proxy, &mut out) {
        let longer = IpHeader::parse(&out[..bytes]).expect("a packet with a header is one");
        assert_eq!(bytes, packet.len() + proxy.bytes().len());
        checked(&out[..bytes], &longer, partial);
        let segment = Segment::of(longer.payload(&out)).expect("a segment with a header is one");
        let payload = &out[bytes - segment.payload_bytes as usize..bytes];
        assert!(payload.starts_with(proxy.bytes()), "the header is not in front");
        assert!(packet.ends_with(&payload[proxy.bytes().len()..]), "another payload");
    }
    let mut alone = Vec::new();
    if header_segment(packet, header, proxy, &mut alone).is_ok() {
        let bare = IpHeader::parse(&alone).expect("a header alone is a packet");
        checked(&alone, &bare, false);
        assert!(alone.ends_with(proxy.bytes()));
    }
}

/// Nothing changed but sequence or acknowledgment number, checksum and the edges of SACK blocks.
fn same_but_numbers(before: &[u8], after: &[u8], header: &IpHeader, direction: Direction) {
    assert_eq!(before.len(), after.len());
    let upper = header.header_bytes;
    let options = upper + 20..upper + (usize::from(before[upper + 12] >> 4) * 4).max(20);
    let number = match direction {
        Direction::Original => upper + 4..upper + 8,
        Direction::Reply => upper + 8..upper + 12,
    };
    let may = |at: &usize| {
        number.contains(at)
            || (upper + 16..upper + 18).contains(at)
            || (direction == Direction::Reply && options.contains(at))
    };
    let other = (0..before.len()).find(|at| before[*at] != after[*at] && !may(at));
    assert!(other.is_none(), "byte {other:?} changed");
}

/// An ICMP error about a segment.
fn quote(six: bool, packet: &[u8], state: &Shift) {
    let key = key(six);
    let (protocol, kind) = if six { (58, [1, 4]) } else { (1, [3, 3]) };
    let mut error = ip_header(key.dst, key.src, protocol, 8 + packet.len());
    error.extend(kind);
    error.extend([0; 6]);
    error.extend_from_slice(packet);
    let Ok(header) = IpHeader::parse(&error) else { return };
    let length = error.len();
    let front = error[..header.header_bytes + 8].to_vec();
    shift_quote(&mut error, &header, state);
    assert_eq!(error.len(), length);
    assert_eq!(error[..header.header_bytes + 2], front[..header.header_bytes + 2]);
}

/// Once the server has the header, what a client sends and what is acknowledged of it fit, wherever the numbers wrap.
fn round_trip(syn: u32, six: bool) {
    let mut state = Shift::new(syn, six);
    let (first, length, _) = state.parts();
    let segment = |seq: u32, ack: u32, payload: usize| {
        let mut bytes = vec![0; 20 + payload];
        bytes[..4].copy_from_slice(&[0x9c, 0x40, 0, 80]);
        bytes[4..8].copy_from_slice(&seq.to_be_bytes());
        bytes[8..12].copy_from_slice(&ack.to_be_bytes());
        bytes[12..14].copy_from_slice(&[0x50, 0x10]);
        bytes
    };
    let mut send = |direction, seq: u32, ack: u32, payload| {
        let mut packet = packet_of(six, direction, &segment(seq, ack, payload), false);
        let header = IpHeader::parse(&packet).expect("a packet");
        shift(&mut packet, &header, false, direction, &mut state).expect("a segment");
        let segment = Segment::of(header.payload(&packet)).expect("a segment");
        (segment.seq, segment.ack)
    };
    let whole = first.wrapping_add(u32::from(length));
    assert_eq!(send(Direction::Reply, 9, whole, 0).1, first, "of the header a client knows nothing");
    for sent in [0u32, 1, 1_400, 1 << 30] {
        let seq = first.wrapping_add(sent);
        let at_server = send(Direction::Original, seq, 9, 100).0;
        assert_eq!(at_server, seq.wrapping_add(u32::from(length)));
        let (_, ack) = send(Direction::Reply, 9, at_server.wrapping_add(100), 0);
        assert_eq!(ack, seq.wrapping_add(100));
    }
}
