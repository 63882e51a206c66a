#![allow(clippy::unwrap_used, reason = "tests")]
use super::*;
use crate::checksum::verify_packet;
use crate::testing::{
    ACK, CWR, FIN, PSH, RST, Recipe, SYN, Sum, URG, V4, V6, any_recipe, ip_packet, naive_sum, payload,
    reference_segments, super_header,
};
use crate::vnet::{DATA_VALID, GSO_UDP, NEEDS_CSUM};
use proptest::prelude::*;

const BAD: DropReason = DropReason::BadOffload;

fn write_all(segmenter: &Segmenter<'_>) -> Vec<Vec<u8>> {
    (0..segmenter.segments())
        .map(|index| {
            let mut out = vec![0xee; segmenter.segment_bytes(index) + 3];
            let bytes = segmenter.write_segment(index, &mut out);
            assert_eq!(bytes, segmenter.segment_bytes(index));
            assert_eq!(out.split_off(bytes), [0xee; 3], "wrote beyond the segment");
            out
        })
        .collect()
}

fn refused(header: &VirtioNetHeader, packet: &[u8]) -> DropReason {
    Segmenter::new(header, packet).unwrap_err()
}

#[test]
fn tcp_super_packets() {
    for addresses in [V4, V6] {
        for (bytes, gso, segments) in
            [(4000, 1400, 3), (4200, 1400, 3), (1400, 1400, 1), (10, 1400, 1), (5, 1, 5)]
        {
            let recipe = Recipe::tcp(addresses, payload(bytes)).flags(ACK | FIN | PSH | CWR);
            let packet = recipe.build();
            let segmenter = Segmenter::new(&super_header(&recipe, gso), &packet).unwrap();
            assert_eq!(segmenter.kind(), SegmentKind::Tcp);
            assert_eq!((segmenter.segments(), segmenter.is_super()), (segments, segments > 1));
            assert_eq!(segmenter.segment_payload(), usize::from(gso));
            assert_eq!((segmenter.header_bytes(), segmenter.payload_bytes()), (recipe.header_bytes(), bytes));
            assert!(segmenter.checksum_partial());
            assert_eq!(write_all(&segmenter), reference_segments(&recipe, usize::from(gso)));
        }
    }
}

#[test]
fn the_header_length_hint_is_ignored() {
    let recipe = Recipe::tcp(V4, payload(4000));
    let packet = recipe.build();
    for hdr_len in [0, 20, 1460, u16::MAX] {
        let header = VirtioNetHeader { hdr_len, ..super_header(&recipe, 1400) };
        assert_eq!(write_all(&Segmenter::new(&header, &packet).unwrap()), reference_segments(&recipe, 1400));
    }
}

#[test]
fn a_super_packet_without_needs_csum_is_summed_anew() {
    // Received with large receive offload: whatever stands in the field, the segments' sums are right.
    for addresses in [V4, V6] {
        let recipe = Recipe::tcp(addresses, payload(4000));
        let packet = recipe.clone().full().build();
        let header = VirtioNetHeader { flags: DATA_VALID, ..super_header(&recipe, 1400) };
        assert_eq!(write_all(&Segmenter::new(&header, &packet).unwrap()), reference_segments(&recipe, 1400));
    }
}

#[test]
fn resegmenting() {
    let recipe = Recipe::tcp(V4, payload(4000)).flags(ACK | PSH);
    let packet = recipe.build();
    let mut segmenter = Segmenter::new(&super_header(&recipe, 1448), &packet).unwrap();
    for (n, smaller) in
        [(0, false), (1448, false), (1449, false), (usize::MAX, false), (1300, true), (1400, false)]
    {
        assert_eq!(segmenter.set_segment_payload(n), smaller, "{n}");
    }
    assert_eq!(segmenter.segments(), 4);
    assert_eq!(write_all(&segmenter), reference_segments(&recipe, 1300));

    let recipe = Recipe::udp(V4, payload(4000));
    let packet = recipe.build();
    let mut segmenter = Segmenter::new(&super_header(&recipe, 1448), &packet).unwrap();
    assert!(!segmenter.set_segment_payload(1300), "a datagram has its size");
    let mut segmenter = Segmenter::new(&VirtioNetHeader::default(), &packet).unwrap();
    assert!(!segmenter.set_segment_payload(1300));
}

#[test]
fn single_packets_are_copied() {
    for addresses in [V4, V6] {
        for recipe in [Recipe::tcp(addresses, payload(77)), Recipe::udp(addresses, payload(77))] {
            let partial = recipe.build();
            let header = VirtioNetHeader { gso_type: GSO_NONE, gso_size: 0, ..super_header(&recipe, 0) };
            let segmenter = Segmenter::new(&header, &partial).unwrap();
            assert!(segmenter.checksum_partial() && !segmenter.is_super());
            assert_eq!((segmenter.kind(), segmenter.header_bytes()), (SegmentKind::Single, 0));
            assert_eq!(
                (segmenter.segment_payload(), segmenter.payload_bytes()),
                (partial.len(), partial.len())
            );
            assert_eq!(write_all(&segmenter), std::slice::from_ref(&partial));

            let mut full = recipe.full().build();
            let expected = full.clone();
            full.extend([7; 9]);
            let segmenter = Segmenter::new(&VirtioNetHeader::default(), &full).unwrap();
            assert!(!segmenter.checksum_partial());
            assert_eq!(write_all(&segmenter), [expected], "padding goes");
        }
    }
    let empty = ip_packet(&Recipe::udp(V6, Vec::new()), 59, &[]);
    assert_eq!(write_all(&Segmenter::new(&VirtioNetHeader::default(), &empty).unwrap()), [&empty[..]]);
}

#[test]
fn inner_partial_checksums_are_completed() {
    // GRE over the TUN device: the kernel leaves the checksum of the inner UDP packet to us.
    let inner = Recipe::udp(V6, payload(99));
    let gre = [&[0, 0, 0x86, 0xdd][..], &inner.build()].concat();
    let outer = ip_packet(&Recipe::udp(V4, Vec::new()), 47, &gre);
    let header =
        VirtioNetHeader { flags: NEEDS_CSUM, csum_start: 64, csum_offset: 6, ..VirtioNetHeader::default() };
    let segmenter = Segmenter::new(&header, &outer).unwrap();
    assert!(!segmenter.checksum_partial());
    let written = write_all(&segmenter);
    assert_eq!(written[0][24..], inner.full().build());
}

#[test]
fn contradictions_are_refused() {
    let recipe = Recipe::tcp(V4, payload(4000));
    let packet = recipe.build();
    let good = super_header(&recipe, 1400);
    assert!(Segmenter::new(&good, &packet).is_ok());
    assert_eq!(refused(&good, &packet[..packet.len() - 1]), DropReason::IpMalformed);
    assert_eq!(refused(&VirtioNetHeader { gso_size: 0, ..good }, &packet), BAD);
    for gso_type in [2, GSO_UDP, GSO_TCPV6, GSO_UDP_L4, GSO_UDP_L4 | GSO_ECN, 6, 0x41, 0x7f] {
        assert_eq!(refused(&VirtioNetHeader { gso_type, ..good }, &packet), BAD, "type {gso_type}");
    }
    let over_the_header = VirtioNetHeader { csum_start: 0, csum_offset: 2, gso_type: GSO_NONE, ..good };
    assert_eq!(refused(&over_the_header, &packet), BAD);
    for (csum_start, csum_offset) in [(19, 16), (40, 16), (20, 6), (u16::MAX, u16::MAX)] {
        assert_eq!(refused(&VirtioNetHeader { csum_start, csum_offset, ..good }, &packet), BAD);
        let single = VirtioNetHeader { csum_start: u16::MAX, csum_offset, gso_type: GSO_NONE, ..good };
        assert_eq!(refused(&single, &packet), BAD);
    }
    for flags in [SYN, RST, URG] {
        let packet = recipe.clone().flags(ACK | flags).build();
        assert_eq!(refused(&good, &packet), BAD);
        let one = VirtioNetHeader { gso_size: 4000, ..good };
        assert!(Segmenter::new(&one, &packet).is_ok(), "one segment can be anything");
    }
    for data_offset in [0x00, 0x40] {
        let mut packet = packet.clone();
        packet[32] = data_offset;
        assert_eq!(refused(&good, &packet), BAD);
    }
    let mut fragment = packet.clone();
    fragment[6] = 0x20;
    assert_eq!(refused(&good, &fragment), BAD);
    let mut cut = Recipe::tcp(V4, Vec::new()).build();
    cut[32] = 0xf0;
    assert_eq!(refused(&good, &cut), BAD, "60 bytes of TCP header in 32");
    let udp = Recipe::udp(V4, payload(4000));
    assert_eq!(
        refused(&VirtioNetHeader { gso_type: GSO_TCPV4, ..super_header(&udp, 1400) }, &udp.build()),
        BAD
    );
    let ecn = VirtioNetHeader { gso_type: GSO_UDP_L4 | GSO_ECN, ..super_header(&udp, 1400) };
    assert_eq!(refused(&ecn, &udp.build()), BAD);
    let short = ip_packet(&udp, 17, &[0, 1, 0, 2, 0, 7, 0]);
    assert_eq!(refused(&super_header(&udp, 1400), &short), BAD);
    assert_eq!(refused(&good, &[]), DropReason::IpMalformed);
}

#[test]
fn nothing_is_written_beyond_the_last_segment_or_into_too_little_room() {
    let recipe = Recipe::tcp(V4, payload(3000));
    let packet = recipe.build();
    let segmenter = Segmenter::new(&super_header(&recipe, 1400), &packet).unwrap();
    let mut out = [0; 2000];
    for index in [3, 4, usize::MAX / 1400, usize::MAX] {
        assert_eq!((segmenter.segment_bytes(index), segmenter.write_segment(index, &mut out)), (0, 0));
    }
    let bytes = segmenter.segment_bytes(0);
    assert_eq!(segmenter.write_segment(0, &mut out[..bytes - 1]), 0);
    assert_eq!(out, [0; 2000]);
    assert_eq!(segmenter.write_segment(0, &mut out[..bytes]), bytes);
}

#[test]
fn the_largest_packets() {
    for (addresses, most) in [(V4, 65_535), (V6, 65_575)] {
        for mut recipe in [Recipe::tcp(addresses, Vec::new()), Recipe::udp(addresses, Vec::new())] {
            recipe.payload = payload(most - recipe.header_bytes());
            let packet = recipe.build();
            assert_eq!(packet.len(), most);
            let segmenter = Segmenter::new(&super_header(&recipe, 1448), &packet).unwrap();
            assert_eq!(write_all(&segmenter), reference_segments(&recipe, 1448));
        }
    }
}

#[test]
fn behind_extension_headers_the_kernels_sum_is_kept() {
    // A routing header: the checksum is over the final destination, which is not in the IP header.
    let recipe = Recipe::tcp(V6, payload(3000));
    let mut routing = vec![6, 2, 0, 1, 0, 0, 0, 0];
    routing.extend([0x20; 16]);
    let through = "2001:db8:ffff::1".parse().unwrap();
    let reroute = |mut packet: Vec<u8>| {
        let std::net::IpAddr::V6(address) = through else { panic!() };
        packet[24..40].copy_from_slice(&address.octets());
        packet
    };
    let packet = reroute(recipe.build_behind(43, &routing));
    let header = VirtioNetHeader { csum_start: 64, ..super_header(&recipe, 1400) };
    let segments = write_all(&Segmenter::new(&header, &packet).unwrap());
    for (index, segment) in segments.iter().enumerate() {
        let plain = &reference_segments(&recipe, 1400)[index];
        // 0 and 0xffff are one number in ones' complement; everything else is equal.
        assert_eq!(segment[64..80], plain[40..56]);
        let sums = [naive_sum(&segment[80..82]), naive_sum(&plain[56..58])];
        assert_eq!(sums[0] % 0xffff, sums[1] % 0xffff);
        assert_eq!(segment[82..], plain[58..]);
        assert_eq!(usize::from(u16_at(segment, 4).unwrap()), segment.len() - 40);
        assert_eq!(segment[6..64], packet[6..64]);
    }
}

#[test]
fn completing() {
    for addresses in [V4, V6] {
        for recipe in [Recipe::tcp(addresses, payload(33)), Recipe::udp(addresses, payload(33))] {
            let mut packet = recipe.build();
            complete_checksum(&mut packet).unwrap();
            assert_eq!(packet, recipe.full().build());
        }
    }
    let mut fragment = Recipe::udp(V4, payload(33)).build();
    fragment[6] = 0x20;
    assert_eq!(complete_checksum(&mut fragment), Err(BAD));
    assert_eq!(complete_checksum(&mut ip_packet(&Recipe::udp(V4, Vec::new()), 1, &payload(40))), Err(BAD));
    assert_eq!(complete_checksum(&mut ip_packet(&Recipe::udp(V4, Vec::new()), 17, &payload(7))), Err(BAD));
    assert_eq!(complete_checksum(&mut []), Err(DropReason::IpMalformed));
}

#[test]
fn a_udp_checksum_of_zero_is_sent_as_ffff() {
    let mut recipe = Recipe::udp(V4, vec![0, 0]);
    recipe.sum = Sum::Full;
    // Make the one's complement sum of everything 0xffff, so that the checksum would be 0.
    let packet = recipe.build();
    let checksum = u16_at(&packet, 26).unwrap();
    recipe.payload = checksum.to_be_bytes().to_vec();
    recipe.sum = Sum::Partial;
    let mut packet = recipe.build();
    complete_checksum(&mut packet).unwrap();
    assert_eq!(u16_at(&packet, 26), Some(0xffff));
    assert!(verify_packet(&packet));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn as_without_offload(recipe in any_recipe(5000), gso in 40u16..2000) {
        let packet = recipe.build();
        let mut segmenter = Segmenter::new(&super_header(&recipe, gso), &packet).unwrap();
        prop_assert_eq!(write_all(&segmenter), reference_segments(&recipe, usize::from(gso)));
        if segmenter.set_segment_payload(usize::from(gso) / 2) {
            prop_assert_eq!(write_all(&segmenter), reference_segments(&recipe, usize::from(gso) / 2));
        }
        for mut segment in write_all(&segmenter) {
            complete_checksum(&mut segment).unwrap();
            prop_assert!(verify_packet(&segment));
        }
    }

    /// For all values of the two headers: what is accepted can be written, and lengths add up.
    #[test]
    fn any_offload(
        mut recipe in any_recipe(300),
        vnet: [u8; 10],
        kind in 0usize..7,
        noise in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
    ) {
        recipe.sum = Sum::Full;
        let mut packet = recipe.build();
        for (at, value) in noise {
            let at = at.index(packet.len());
            packet[at] = value;
        }
        let mut header = VirtioNetHeader::parse(&vnet).unwrap();
        header.gso_type = [0, 1, 4, 5, 0x81, 0x84, header.gso_type][kind];
        if vnet[0] & 2 != 0 {
            header.csum_start = recipe.ip_bytes() as u16;
            header.csum_offset = if recipe.tcp.is_some() { 16 } else { 6 };
        }
        let Ok(segmenter) = Segmenter::new(&header, &packet) else { return Ok(()) };
        let total: usize = write_all(&segmenter).iter().map(|segment| segment.len() - segmenter.header_bytes()).sum();
        prop_assert_eq!(total, segmenter.payload_bytes());
    }

    #[test]
    fn completing_any_bytes(mut bytes in prop::collection::vec(any::<u8>(), 0..120)) {
        let before = bytes.clone();
        if complete_checksum(&mut bytes).is_err() {
            prop_assert_eq!(bytes, before);
        }
    }
}

#[test]
fn t14_frames_keep_their_front_in_every_segment() {
    let fronts: [&[u8]; 2] = [&[7; 14], &[9; 19]];
    for (addresses, front) in [V4, V6].into_iter().zip(fronts) {
        let recipe = Recipe::tcp(addresses, payload(4000)).flags(ACK | PSH);
        let frame = [front, &recipe.build()].concat();
        let header = super_header(&recipe, 1400).with_front(front.len() as u16);
        let segmenter = Segmenter::of_frame(&header, &frame, Some(front.len())).unwrap();
        assert!(segmenter.is_frame() && segmenter.is_super() && segmenter.checksum_partial());
        assert_eq!(segmenter.header_bytes(), front.len() + recipe.header_bytes());
        let wanted: Vec<Vec<u8>> =
            reference_segments(&recipe, 1400).iter().map(|segment| [front, segment].concat()).collect();
        assert_eq!(write_all(&segmenter), wanted);
    }
}

#[test]
fn t14_single_frames_stay_as_they_are() {
    let recipe = Recipe::udp(V4, payload(5));
    let mut frame = [&[7; 14][..], &recipe.build()].concat();
    frame.resize(60, 0xaa);
    let plain = VirtioNetHeader::default();
    let single = Segmenter::of_frame(&plain, &frame, Some(14)).unwrap();
    assert_eq!(
        (write_all(&single), single.ip_at(), single.checksum_partial()),
        (vec![frame.clone()], 14, false)
    );
    // A checksum that is to be completed does not cover what pads the frame.
    let partial = VirtioNetHeader { flags: NEEDS_CSUM, csum_start: 34, csum_offset: 6, ..plain };
    let single = Segmenter::of_frame(&partial, &frame, Some(14)).unwrap();
    assert!(single.checksum_partial());
    assert_eq!(write_all(&single), [frame[..47].to_vec()]);
    // No packet: as it is, and without any offload.
    for ip_at in [None, Some(50)] {
        let other = Segmenter::of_frame(&plain, &frame, ip_at).unwrap();
        assert_eq!((write_all(&other), other.ip_at()), (vec![frame.clone()], 0));
        assert_eq!(Segmenter::of_frame(&partial, &frame, ip_at).unwrap_err(), BAD);
    }
}
