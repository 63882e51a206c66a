#![allow(clippy::unwrap_used, reason = "tests")]
use super::*;
use crate::attachment::BondId;
use crate::segment::{Segmenter, complete_checksum};
use crate::testing::{
    ACK, CWR, ECE, FIN, PSH, RST, Recipe, SYN, URG, V4, V6, any_recipe, fix_ipv4, ip_packet, payload,
    reference_segments, super_header,
};
use crate::vnet::VNET_HEADER_BYTES;
use proptest::prelude::*;

struct Collector {
    coalescer: Coalescer,
    out: Vec<Vec<u8>>,
}

impl Collector {
    fn new() -> Collector {
        Collector { coalescer: Coalescer::new(), out: Vec::new() }
    }

    fn push(&mut self, packet: &[u8], partial: bool, may_merge: bool) {
        assert!(self.coalescer.push(Ingress::Host, packet, partial, may_merge, &mut |packet| {
            self.out.push(packet.with_virtio_header().to_vec());
        }));
    }

    fn finish(mut self) -> Vec<(VirtioNetHeader, Vec<u8>)> {
        self.coalescer.flush(&mut |packet| self.out.push(packet.with_virtio_header().to_vec()));
        assert!(self.coalescer.is_empty());
        let split =
            |bytes: &Vec<u8>| (VirtioNetHeader::parse(bytes).unwrap(), bytes[VNET_HEADER_BYTES..].to_vec());
        self.out.iter().map(split).collect()
    }
}

/// Pushes packets that may all merge.
fn merge(packets: &[Vec<u8>], partial: bool) -> Vec<(VirtioNetHeader, Vec<u8>)> {
    let mut collector = Collector::new();
    for packet in packets {
        collector.push(packet, partial, true);
    }
    collector.finish()
}

/// Bytes of each packet emitted.
fn lengths(packets: &[Vec<u8>]) -> Vec<usize> {
    merge(packets, true).iter().map(|(_, packet)| packet.len()).collect()
}

fn complete(segments: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut segments = segments.to_vec();
    for segment in &mut segments {
        complete_checksum(segment).unwrap();
    }
    segments
}

#[test]
fn segments_become_the_super_packet_they_came_from() {
    for addresses in [V4, V6] {
        let tcp = Recipe::tcp(addresses, payload(40_000)).flags(ACK | PSH | CWR | ECE);
        for recipe in [tcp, Recipe::udp(addresses, payload(40_000))] {
            let segments = reference_segments(&recipe, 1300);
            let expected = [(super_header(&recipe, 1300), recipe.build())];
            assert_eq!(merge(&segments, true), expected);
            assert_eq!(merge(&complete(&segments), false), expected);
        }
    }
}

#[test]
fn single_packets_pass_untouched() {
    for addresses in [V4, V6] {
        for recipe in [Recipe::tcp(addresses, payload(44)), Recipe::udp(addresses, payload(44))] {
            let packet = recipe.build();
            let header = VirtioNetHeader { gso_type: 0, hdr_len: 0, gso_size: 0, ..super_header(&recipe, 0) };
            assert_eq!(merge(std::slice::from_ref(&packet), true), [(header, packet)]);
            let packet = recipe.full().build();
            assert_eq!(merge(std::slice::from_ref(&packet), false), [(VirtioNetHeader::default(), packet)]);
        }
    }
    let behind = Recipe::udp(V6, payload(44)).build_behind(0, &[17, 0, 1, 4, 0, 0, 0, 0]);
    let header = VirtioNetHeader { flags: 1, csum_start: 48, csum_offset: 6, ..VirtioNetHeader::default() };
    assert_eq!(merge(std::slice::from_ref(&behind), true), [(header, behind.clone())]);
}

#[test]
fn what_is_no_tcp_or_udp_has_no_partial_checksum() {
    let mut fragment = Recipe::udp(V4, payload(44)).build();
    fragment[6] = 0x20;
    let ping = ip_packet(&Recipe::udp(V4, Vec::new()), 1, &payload(64));
    let short = ip_packet(&Recipe::udp(V4, Vec::new()), 17, &payload(7));
    for packet in [fragment, ping, short, vec![], vec![0x45], vec![0xff; 100]] {
        assert_eq!(
            merge(&[packet.clone(), packet.clone()], true),
            vec![(VirtioNetHeader::default(), packet); 2]
        );
    }
}

/// Two segments of 100 bytes each; `change` may spoil the second.
fn pair(recipe: &Recipe, change: impl Fn(&mut Recipe)) -> [Vec<u8>; 2] {
    let half = recipe.payload.len() / 2;
    let mut second = recipe.clone();
    second.payload = recipe.payload[half..].to_vec();
    second.id = recipe.id.wrapping_add(1);
    if let Some(tcp) = &mut second.tcp {
        tcp.sequence = tcp.sequence.wrapping_add(half as u32);
    }
    change(&mut second);
    let first = Recipe { payload: recipe.payload[..half].to_vec(), ..recipe.clone() };
    [first.build(), second.build()]
}

fn merges(recipe: &Recipe, change: impl Fn(&mut Recipe)) -> bool {
    let packets = pair(recipe, change);
    let out = merge(&packets, true);
    if out.len() == 2 {
        assert!(
            out.iter()
                .zip(&packets)
                .all(|((header, packet), pushed)| header.gso_type == 0 && packet == pushed)
        );
    }
    out.len() == 1
}

#[test]
fn every_header_field_counts() {
    for addresses in [V4, V6] {
        for recipe in [Recipe::tcp(addresses, payload(200)), Recipe::udp(addresses, payload(200))] {
            assert!(merges(&recipe, |_| ()));
            let other = if recipe.src.is_ipv4() { "10.0.0.6" } else { "2001:db8::6" };
            assert!(!merges(&recipe, |second| second.src = other.parse().unwrap()));
            assert!(!merges(&recipe, |second| second.dst = other.parse().unwrap()));
            assert!(!merges(&recipe, |second| second.ports.0 += 1));
            assert!(!merges(&recipe, |second| second.ports.1 += 1));
            assert!(!merges(&recipe, |second| second.tos = 3), "ECN");
            assert!(!merges(&recipe, |second| second.tos = 4), "DSCP");
            assert!(!merges(&recipe, |second| second.ttl -= 1));
            assert!(!merges(&recipe, |second| second.payload.push(0)), "longer than the first");
            assert!(merges(&recipe, |second| second.payload.truncate(1)), "shorter than the first");
            assert!(!merges(&recipe, |second| second.payload.clear()));
        }
    }
    assert!(!merges(&Recipe::udp(V6, payload(200)), |second| second.flow_label += 1));
    let tcp = Recipe::tcp(V6, payload(200));
    let udp_after_tcp = |second: &mut Recipe| second.tcp = None;
    assert!(!merges(&tcp, udp_after_tcp));
}

#[test]
fn every_tcp_field_counts() {
    let recipe = Recipe::tcp(V4, payload(200));
    let changed =
        |change: fn(&mut crate::testing::Tcp)| merges(&recipe, |second| change(second.tcp.as_mut().unwrap()));
    assert!(!changed(|tcp| tcp.sequence += 1));
    assert!(!changed(|tcp| tcp.sequence = tcp.sequence.wrapping_sub(100)), "the same data again");
    assert!(!changed(|tcp| tcp.acknowledgement += 1));
    assert!(!changed(|tcp| tcp.window += 1));
    assert!(!changed(|tcp| tcp.options[7] += 1), "timestamps");
    assert!(!changed(|tcp| tcp.options.truncate(8)));
    for flags in [ACK | PSH, ACK | FIN, ACK | FIN | PSH] {
        assert!(merges(&recipe, |second| second.tcp.as_mut().unwrap().flags = flags));
    }
    for flags in [0, ACK | SYN, ACK | RST, ACK | URG, ACK | ECE, ACK | CWR] {
        assert!(!merges(&recipe, |second| second.tcp.as_mut().unwrap().flags = flags));
    }
    for flags in [ACK | PSH, ACK | FIN, ACK | SYN, ACK | RST, ACK | URG, PSH, 0] {
        assert!(!merges(&recipe.clone().flags(flags), |_| ()), "{flags:#x} cannot be continued");
    }
    assert!(merges(&recipe.clone().flags(ACK | ECE), |_| ()));
    let congestion_reduced = recipe.clone().flags(ACK | CWR);
    assert!(!merges(&congestion_reduced, |_| ()), "CWR twice");
    assert!(merges(&congestion_reduced, |second| second.tcp.as_mut().unwrap().flags = ACK));
}

#[test]
fn ipv4_rules() {
    for df in [true, false] {
        let recipe = Recipe { dont_fragment: df, ..Recipe::tcp(V4, payload(200)) };
        assert!(merges(&recipe, |_| ()));
        assert_eq!(merges(&recipe, |second| second.id = 7), df, "an identification counts without DF only");
        assert!(!merges(&recipe, |second| second.dont_fragment = !df));
    }
    let recipe = Recipe::tcp(V4, payload(200));
    let spoilt = |change: fn(&mut Vec<u8>)| {
        let [first, mut second] = pair(&recipe, |_| ());
        change(&mut second);
        lengths(&[first, second]).len()
    };
    assert_eq!(spoilt(|_| ()), 1);
    assert_eq!(spoilt(|packet| packet[10] ^= 1), 2, "wrong header checksum");
    assert_eq!(spoilt(|packet| packet.push(0)), 2, "padding");
    for flags in [0x60, 0xc0] {
        let [first, mut second] = pair(&recipe, |_| ());
        second[6] = flags;
        fix_ipv4(&mut second);
        assert_eq!(lengths(&[first, second]).len(), 2, "more fragments, reserved bit");
    }
}

#[test]
fn full_checksums_are_verified_before_they_vanish() {
    for recipe in [Recipe::tcp(V4, payload(200)), Recipe::udp(V6, payload(200))] {
        let good = pair(&recipe.full(), |_| ());
        assert_eq!(merge(&good, false).len(), 1);
        for bad in 0..2 {
            let mut packets = good.clone();
            *packets[bad].last_mut().unwrap() ^= 1;
            let expected: Vec<_> =
                packets.iter().map(|packet| (VirtioNetHeader::default(), packet.clone())).collect();
            assert_eq!(merge(&packets, false), expected, "both pass, as they are");
        }
    }
    let mut without = pair(&Recipe::udp(V4, payload(200)).full(), |_| ());
    without.iter_mut().for_each(|packet| packet[26..28].fill(0));
    assert_eq!(merge(&without, false).len(), 2, "no checksum at all");
}

#[test]
fn partial_and_full_mix() {
    let recipe = Recipe::tcp(V4, payload(200));
    let [first, second] = pair(&recipe, |_| ());
    for (first_full, second_full) in [(true, false), (false, true)] {
        let mut collector = Collector::new();
        for (packet, full) in [(&first, first_full), (&second, second_full)] {
            let packet = if full { complete(std::slice::from_ref(packet)).remove(0) } else { packet.clone() };
            collector.push(&packet, !full, true);
        }
        assert_eq!(collector.finish(), [(super_header(&recipe, 100), recipe.build())]);
    }
}

#[test]
fn merging_only_where_the_sender_said_so() {
    let recipe = Recipe::udp(V4, payload(600));
    let segments = reference_segments(&recipe, 100);
    let mut collector = Collector::new();
    for (segment, may_merge) in segments.iter().zip([false, true, true, false, true, false]) {
        collector.push(segment, true, may_merge);
    }
    let lengths: Vec<_> = collector.finish().iter().map(|(_, packet)| packet.len()).collect();
    assert_eq!(lengths, [328, 228, 128]);
}

#[test]
fn order_is_kept() {
    let tcp = reference_segments(&Recipe::tcp(V4, payload(300)), 100);
    let other = reference_segments(&Recipe::udp(V4, payload(30)), 30);
    let ping = ip_packet(&Recipe::udp(V4, Vec::new()), 1, &payload(64));
    let lengths = lengths(&[&tcp[..2], &other[..], &tcp[2..], &[ping]].concat());
    assert_eq!(lengths, [252, 58, 152, 84]);
}

#[test]
fn a_shorter_segment_ends_it() {
    let one = reference_segments(&Recipe::udp(V4, payload(250)), 100);
    assert_eq!(lengths(&[one.clone(), one].concat()), [278, 278]);
}

#[test]
fn udp_can_be_left_alone() {
    let mut collector = Collector::new();
    collector.coalescer.set_merge_udp(false);
    let udp = reference_segments(&Recipe::udp(V4, payload(300)), 100);
    let tcp = reference_segments(&Recipe::tcp(V4, payload(300)), 100);
    for packet in udp.iter().chain(&tcp) {
        collector.push(packet, true, true);
    }
    let out = collector.finish();
    assert_eq!(out.len(), 4);
    assert!(
        out[..3]
            .iter()
            .all(|(header, _)| header.flags == 1 && header.csum_start == 20 && header.gso_type == 0)
    );
}

#[test]
fn limits() {
    for addresses in [V4, V6] {
        let header = if addresses == V4 { 28 } else { 48 };
        let udp = reference_segments(&Recipe::udp(addresses, payload(100 * 10)), 10);
        assert_eq!(lengths(&udp), [header + 640, header + 360], "64 datagrams");

        let mut tcp = Recipe::tcp(addresses, Vec::new());
        let room = SUPER_PACKET_BYTES_MAX - tcp.header_bytes();
        tcp.payload = payload(room);
        assert_eq!(lengths(&reference_segments(&tcp, 1400)), [65_535], "exactly full");
        // One byte more: the super-packet ends a segment earlier. Built by hand, as IPv4 has no such packet.
        let mut segments = reference_segments(&tcp, 1400);
        let mut last = Recipe { payload: payload(room % 1400 + 1), ..tcp.clone() };
        last.id = last.id.wrapping_add((room / 1400) as u16);
        let numbers = last.tcp.as_mut().unwrap();
        numbers.sequence = numbers.sequence.wrapping_add((room / 1400 * 1400) as u32);
        *segments.last_mut().unwrap() = last.build();
        assert_eq!(lengths(&segments), [65_535 - room % 1400, tcp.header_bytes() + room % 1400 + 1]);
    }
    let longest = ip_packet(&Recipe::udp(V6, Vec::new()), 59, &payload(65_535));
    assert_eq!(lengths(std::slice::from_ref(&longest)), [65_575]);
    let mut coalescer = Coalescer::new();
    assert!(!coalescer.push(Ingress::Host, &[0; 65_576], false, true, &mut |_| panic!("emitted")));
}

#[test]
fn packets_of_different_origin_are_not_merged() {
    let segments = reference_segments(&Recipe::tcp(V4, payload(4_000)).flags(ACK), 1_000);
    let mut emitted = Vec::new();
    let mut coalescer = Coalescer::new();
    for (segment, bond) in segments.iter().zip([1, 1, 2, 2]) {
        let ingress = Ingress::Bond(BondId(bond));
        coalescer
            .push(ingress, segment, true, true, &mut |packet| emitted.push((packet.ingress, packet.len())));
    }
    coalescer.flush(&mut |packet| emitted.push((packet.ingress, packet.len())));
    let of = |bond| (Ingress::Bond(BondId(bond)), segments[0].len() + 1_000);
    assert_eq!(emitted, [of(1), of(2)]);
}

#[test]
fn whoever_gets_a_packet_may_keep_its_buffer() {
    let segments = reference_segments(&Recipe::tcp(V4, payload(3_000)).flags(ACK), 1_000);
    let mut kept = Vec::new();
    let mut coalescer = Coalescer::new();
    let mut keep = |packet: &mut PacketBuf| {
        kept.push(std::mem::replace(packet, PacketBuf::with_capacity(PACKET_BYTES_MAX)));
    };
    for segment in &segments {
        coalescer.push(Ingress::Host, segment, true, false, &mut keep);
    }
    coalescer.flush(&mut keep);
    let packets: Vec<&[u8]> = kept.iter().map(PacketBuf::packet).collect();
    assert_eq!(packets, segments.iter().map(Vec::as_slice).collect::<Vec<_>>());
}

/// A kernel's work on the emitted packets: split, and complete the checksums.
fn delivered(out: &[(VirtioNetHeader, Vec<u8>)]) -> Vec<Vec<u8>> {
    let mut packets = Vec::new();
    for (header, packet) in out {
        let segmenter = Segmenter::new(header, packet).unwrap();
        for index in 0..segmenter.segments() {
            let mut segment = vec![0; segmenter.segment_bytes(index)];
            segmenter.write_segment(index, &mut segment);
            if segmenter.checksum_partial() {
                complete_checksum(&mut segment).unwrap();
            }
            packets.push(segment);
        }
    }
    packets
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Split and merged again, the same bytes come out, virtio header included.
    #[test]
    fn round_trip(recipe in any_recipe(20_000), gso in 350u16..3000, full: bool) {
        let packet = recipe.build();
        let header = super_header(&recipe, gso);
        let segmenter = Segmenter::new(&header, &packet).unwrap();
        prop_assume!(segmenter.is_super());
        let mut segments = Vec::new();
        for index in 0..segmenter.segments() {
            let mut segment = vec![0; segmenter.segment_bytes(index)];
            segmenter.write_segment(index, &mut segment);
            segments.push(segment);
        }
        if full {
            segments = complete(&segments);
        }
        prop_assert_eq!(merge(&segments, !full), [(header, packet)]);
    }

    /// For all packets in all orders: after the far kernel's segmentation exactly the pushed packets
    /// come out, in order.
    #[test]
    fn merging_is_invisible(
        recipes in prop::collection::vec((any_recipe(600), 50usize..300), 1..4),
        order in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>(), any::<bool>()), 0..30),
    ) {
        let mut queues: Vec<_> =
            recipes.iter().map(|(recipe, gso)| reference_segments(recipe, *gso).into_iter()).collect();
        let (mut collector, mut expected) = (Collector::new(), Vec::new());
        for (queue, partial, may_merge) in order {
            let at = queue.index(queues.len());
            let Some(packet) = queues[at].next() else { continue };
            let full = complete(std::slice::from_ref(&packet)).remove(0);
            collector.push(if partial { &packet } else { &full }, partial, may_merge);
            expected.push(full);
        }
        // Identifications of packets that must not be fragmented may change.
        let blind = |packets: Vec<Vec<u8>>| -> Vec<Vec<u8>> {
            packets.into_iter().map(|mut packet| {
                if packet[0] >> 4 == 4 && packet[6] & 0x40 != 0 {
                    packet[4..6].fill(0);
                    fix_ipv4(&mut packet);
                }
                packet
            }).collect()
        };
        prop_assert_eq!(blind(delivered(&collector.finish())), blind(expected));
    }

    #[test]
    fn any_bytes(
        packets in
            prop::collection::vec((prop::collection::vec(any::<u8>(), 0..90), any::<bool>(), any::<bool>()), 0..8),
    ) {
        let mut collector = Collector::new();
        for (packet, partial, may_merge) in &packets {
            collector.push(packet, *partial, *may_merge);
        }
        let out = collector.finish();
        prop_assert_eq!(out.len(), packets.len());
        prop_assert!(out.iter().zip(&packets).all(|((_, out), (pushed, ..))| out == pushed));
    }
}
