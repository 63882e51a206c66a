//! Inner packets: from the TUN device in super-packets, or from a peer.

use packet::segment::complete_checksum;
use packet::vnet::VNET_HEADER_BYTES;
use packet::{
    Coalescer, FlowKey, Ingress, IpHeader, PacketBuf, SegmentKind, Segmenter, VirtioNetHeader, checksum, ip,
    segment,
};

/// Longest packet of IP.
const PACKET_BYTES_MAX: usize = 65_575;

/// A virtio header and a packet: lengths stay inside the packet, flows reverse, a super-packet's segments carry all of
/// its payload, and merging them again loses nothing.
pub fn packet(data: &[u8]) {
    parsed(data);
    let Some((header, packet)) = data.split_at_checked(VNET_HEADER_BYTES) else { return };
    parsed(packet);
    edited(packet);
    let Ok(header) = VirtioNetHeader::parse(header) else { return };
    assert_eq!(VirtioNetHeader::parse(&header.to_bytes()), Ok(header));
    if let Ok(segmenter) = Segmenter::new(&header, packet) {
        through(segmenter, packet);
    }
}

fn parsed(packet: &[u8]) {
    let header = IpHeader::parse(packet);
    let flow = FlowKey::of(packet);
    assert_eq!(flow.err(), header.err(), "the two readers disagree");
    let (Ok(header), Ok(flow)) = (header, flow) else { return };
    assert!(header.header_bytes <= header.total_bytes && header.total_bytes <= packet.len());
    assert_eq!(header.payload(packet).len(), header.payload_bytes());
    assert_eq!(flow.reversed().reversed(), flow);
    assert_eq!(flow, FlowKey::of_parsed(&header, packet));
    let text = flow.to_string();
    assert_eq!(text.parse(), Ok(flow), "{text} is read back as something else");
}

/// Every function that changes a packet in place keeps its length and what it does not mean to change.
fn edited(packet: &[u8]) {
    let mut copy = packet.to_vec();
    if ip::set_ecn_ce(&mut copy) {
        assert_eq!(ip::packet_ecn(&copy), Some(ip::ECN_CE));
        assert_eq!(FlowKey::of(&copy), FlowKey::of(packet));
    }
    for partial in [false, true] {
        let mut copy = packet.to_vec();
        if !segment::mss_clamp(&mut copy, 1280, partial) {
            continue;
        }
        assert_eq!(FlowKey::of(&copy), FlowKey::of(packet));
        if partial {
            let changed = copy.iter().zip(packet).filter(|(after, before)| after != before);
            assert!(changed.count() <= 2, "more than the option");
        } else {
            assert_eq!(
                checksum::verify_packet(&copy),
                checksum::verify_packet(packet),
                "the checksum did not follow"
            );
        }
        assert!(!segment::mss_clamp(&mut copy, 1280, partial), "clamping twice changes twice");
    }
}

fn through(mut segmenter: Segmenter<'_>, packet: &[u8]) {
    // A segment of one byte each is allowed, and slow.
    if segmenter.segments() > 2_000 {
        segmenter.set_segment_payload(segmenter.payload_bytes().div_ceil(2_000));
    }
    if segmenter.segments() > 2_000 {
        return;
    }
    let header_bytes = segmenter.header_bytes();
    let mut merger = Coalescer::new();
    let (mut merged, mut emitted) = (0, 0);
    let mut emit = |merged_packet: &mut PacketBuf| {
        let bytes = merged_packet.with_virtio_header();
        let (header, packet) = bytes.split_at(VNET_HEADER_BYTES);
        let header = VirtioNetHeader::parse(header).expect("our own header");
        assert!(packet.len() <= PACKET_BYTES_MAX);
        let again = Segmenter::new(&header, packet).expect("our own super-packet");
        // A packet that stayed alone counts its headers as payload.
        let headers = if again.kind() == SegmentKind::Single { header_bytes } else { 0 };
        merged += again.payload_bytes() - headers;
        emitted += 1;
    };
    let (mut out, mut payload) = (vec![0; packet.len()], 0);
    for index in 0..segmenter.segments() {
        let bytes = segmenter.write_segment(index, &mut out);
        assert_eq!(bytes, segmenter.segment_bytes(index));
        assert!(bytes > 0 && bytes <= packet.len());
        let one = &mut out[..bytes];
        payload += bytes - header_bytes;
        assert!(merger.push(Ingress::Host, one, segmenter.checksum_partial(), index > 0, &mut emit));
        // A single packet keeps the partial sum it came with, right or wrong; a super-packet's is made per segment.
        if segmenter.is_super() && segmenter.checksum_partial() && complete_checksum(one).is_ok() {
            assert!(checksum::verify_packet(one), "a completed checksum is wrong");
        }
    }
    merger.flush(&mut emit);
    assert_eq!(payload, segmenter.payload_bytes(), "segments lost payload");
    assert_eq!(segmenter.write_segment(segmenter.segments(), &mut out), 0);
    assert!(emitted > 0 && emitted <= segmenter.segments());
    if segmenter.is_super() {
        assert_eq!(merged, payload, "merging lost payload");
    }
}
