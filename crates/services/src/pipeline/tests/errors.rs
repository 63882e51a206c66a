//! Packets that must be answered, and bad input.

use packet::DropReason;
use packet::attachment::{Ingress, InterfaceId};
use packet::checksum;

use crate::fragment::Variant;
use crate::spec::{RouteSpec, UDP};

use super::world::*;

fn with_ttl(mut packet: Vec<u8>, ttl: u8) -> Vec<u8> {
    packet[8] = ttl;
    packet[10..12].copy_from_slice(&[0, 0]);
    let sum = checksum::finish(checksum::sum(&packet[..20], 0));
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet
}

#[test]
fn traceroute_sees_the_gateway() {
    let mut world = masquerade(2);
    let probe = with_ttl(udp("10.0.0.9:5000", "198.51.100.7:33434", b"probe"), 1);
    let left = world.dropped(LAN, &probe, DropReason::TtlExpired);
    assert_eq!(left.len(), 1);
    let answer = &left[0];
    assert_eq!((answer.by(), answer.packet[20], answer.packet[21]), (LAN, 11, 0));
    assert_eq!(answer.packet[12..16], [10, 0, 0, 1], "from the address on the client's side");
    assert_eq!(answer.packet[16..20], [10, 0, 0, 9]);
    assert_eq!(answer.packet[28 + 12..28 + 16], [10, 0, 0, 9], "quotes what the client sent");
    let left = world.one(LAN, &with_ttl(udp("10.0.0.9:5000", "198.51.100.7:33434", b"probe"), 9));
    assert_eq!(left.packet[8], 8);
}

/// A link-local source passes no router, and many a WAN has no other address: the error must come from an address that arrives
/// (RFC 4443 §2.2 d). Of several it is the one most like the packet's sender.
#[test]
fn errors_have_a_source_that_arrives() {
    for (wan, lan, wanted) in [
        (&["fe80::1/64"][..], &["fe80::1/64", "2001:db8:10::1/64"][..], "2001:db8:10::1"),
        (&["fe80::1/64", "fd00:9::1/64", "2001:db8:113::1/64"], &["2001:db8:10::1/64"], "2001:db8:113::1"),
        (&["fe80::1/64"], &["fe80::2/64"], "fe80::1"),
    ] {
        let mut spec = two_interfaces();
        spec.interfaces[WAN_ID.index()].addresses = wan.iter().map(|net| net.parse().unwrap()).collect();
        spec.interfaces[0].addresses = lan.iter().map(|net| net.parse().unwrap()).collect();
        spec.interfaces[0].mtu = 1_280;
        spec.routes.push(RouteSpec::new(0, "2001:db8:10::/64".parse().unwrap(), LAN.into(), None));
        let router = Some("fe80::fe".parse().unwrap());
        spec.routes.push(RouteSpec::new(0, "2001:db8:7::/64".parse().unwrap(), WAN.into(), router));
        let mut world = World::new(2, spec);
        let big = udp_of(&key(UDP, "[2001:db8:7::7]:53", "[2001:db8:10::5]:1000"), &[7; 1_400]);
        let left = world.dropped(WAN, &big, DropReason::TooBig);
        let source = std::net::Ipv6Addr::from(<[u8; 16]>::try_from(&left[0].packet[8..24]).unwrap());
        assert_eq!((left[0].packet[40], source.to_string().as_str()), (2, wanted));
    }
}

#[test]
fn too_big_is_told_or_cut() {
    let mut spec = two_interfaces();
    spec.interfaces[WAN_ID.index()].mtu = 1000;
    let mut world = World::new(2, spec);
    let packet = udp("10.0.0.9:5000", "198.51.100.7:53", &[1; 1200]);
    let left = world.dropped(LAN, &packet, DropReason::TooBig);
    assert_eq!((left[0].packet[20], left[0].packet[21]), (3, 4), "don't fragment is set");
    assert_eq!(left[0].packet[26..28], 1000u16.to_be_bytes());
    let mut packet = packet;
    packet[6] = 0;
    let left = world.packet(LAN, &with_ttl(packet, 64));
    assert_eq!(left.len(), 2);
    assert!(left.iter().all(|left| left.packet.len() <= 1000 && is_fragment(&left.packet)));
}

/// Who provokes other errors does not silence this one, without which connections stall (RFC 2923 §2.1).
#[test]
fn too_big_is_told_in_a_flood_of_other_errors() {
    let mut spec = two_interfaces();
    spec.interfaces[WAN_ID.index()].mtu = 1000;
    let mut world = World::new(1, spec);
    let probe = with_ttl(udp("10.0.0.66:5000", "198.51.100.7:33434", b"probe"), 1);
    let answers: usize = (0..200).map(|_| world.packet(LAN, &probe).len()).sum();
    assert_eq!(answers, 100, "the burst of a thousand in a second");
    let packet = udp("10.0.0.9:5000", "198.51.100.7:53", &[1; 1200]);
    let answers: usize = (0..200).map(|_| world.packet(LAN, &packet).len()).sum();
    assert_eq!(answers, 100, "with the same limit");
}

/// A sender that knows of a narrow link cuts its packets for it, and cannot be told again. So they leave no longer than they came.
#[test]
fn assembled_packets_are_cut_as_their_sender_did() {
    for (mtu, longest) in [(1_500, 1_280), (1_280, 1_280), (1_300, 1_280)] {
        let mut spec = two_interfaces();
        spec.limits.fragments = Variant::Assemble;
        spec.interfaces[WAN_ID.index()].mtu = mtu;
        let mut world = World::new(1, spec);
        let packet = udp_of(&key(UDP, "[fd00::9]:5000", "[2001:db8:7::7]:53"), &[7; 3_000]);
        let left: Vec<_> = in_pieces_v6(&packet, 1_232).iter().flat_map(|it| world.packet(LAN, it)).collect();
        let bytes: Vec<usize> = left.iter().map(|left| left.packet.len()).collect();
        assert_eq!(bytes, [longest, longest, 48 + 3_008 - 2 * 1_232], "{mtu}");
    }
    // What all links of IPv6 carry goes on whole, and so does an IPv4 packet, which may be cut on its way.
    let mut spec = two_interfaces();
    spec.limits.fragments = Variant::Assemble;
    let mut world = World::new(1, spec);
    let packet = udp_of(&key(UDP, "[fd00::9]:5000", "[2001:db8:7::7]:53"), &[7; 1_224]);
    let left: Vec<_> = in_pieces_v6(&packet, 1_000).iter().flat_map(|it| world.packet(LAN, it)).collect();
    assert_eq!(left.iter().map(|left| left.packet.len()).collect::<Vec<_>>(), [40 + 1_232]);
    let mut packet = udp("10.0.0.9:5000", "198.51.100.7:53", &[1; 1200]);
    packet[6] = 0;
    let left: Vec<_> = in_pieces(&packet, 400).iter().flat_map(|it| world.packet(LAN, it)).collect();
    assert_eq!(left.len(), 1);
}

/// The packet (IPv6) in fragments with so many bytes of payload each.
fn in_pieces_v6(packet: &[u8], bytes: usize) -> Vec<Vec<u8>> {
    let last = (packet.len() - 41) / bytes;
    let piece = |(place, chunk): (usize, &[u8])| {
        let mut piece = packet[..40].to_vec();
        piece[4..6].copy_from_slice(&(8 + chunk.len() as u16).to_be_bytes());
        piece[6] = 44;
        let word = (place * bytes) as u16 | u16::from(place < last);
        piece.extend([packet[6], 0]);
        piece.extend(word.to_be_bytes());
        piece.extend([0, 0, 0, 7]);
        piece.extend(chunk);
        piece
    };
    packet[40..].chunks(bytes).enumerate().map(piece).collect()
}

/// As its sender would cut it: "don't fragment" is not set.
fn pieces_with_ttl(packet: &[u8], ttl: u8) -> Vec<Vec<u8>> {
    in_pieces(packet, 1_000).into_iter().map(|piece| with_ttl(piece, ttl)).collect()
}

#[test]
fn errors_about_fragments_are_made_about_the_first_one() {
    for cores in [1, 2, 3] {
        let mut world = masquerade(cores);
        for number in 0..8 {
            let probe = udp(&format!("10.0.0.9:{}", 5_000 + number), "198.51.100.7:33434", &[7; 2_500]);
            let mut pieces = pieces_with_ttl(&probe, 1);
            pieces.iter_mut().for_each(|piece| {
                piece[5] = number as u8;
                piece[10..12].fill(0);
                let sum = checksum::finish(checksum::sum(&piece[..20], 0));
                piece[10..12].copy_from_slice(&sum.to_be_bytes());
            });
            // The first one last: it is held like the others.
            let left: Vec<Left> = pieces.iter().rev().flat_map(|piece| world.packet(LAN, piece)).collect();
            assert_eq!(left.len(), 1, "{cores} cores: {left:?}");
            let answer = &left[0];
            assert_eq!((answer.by(), answer.packet[20], answer.packet[21]), (LAN, 11, 0));
            assert_eq!(answer.packet[16..20], [10, 0, 0, 9]);
            assert_eq!(answer.packet[28..28 + 100], pieces[0][..100], "as the client sent it");
        }
    }
}

#[test]
fn fragments_that_are_refused_are_answered_once_and_without_a_reset() {
    let mut spec = two_interfaces();
    spec.rules.push(crate::spec::RuleSpec {
        action: crate::spec::RuleAction::Reject,
        from: side(LAN),
        ..Default::default()
    });
    let mut world = World::new(2, spec);
    for packet in [
        udp("10.0.0.9:5000", "198.51.100.7:53", &[1; 1_900]),
        tcp("10.0.0.9:5000", "198.51.100.7:80", SYN, 1, 0, &[1; 1_900]),
    ] {
        let pieces = pieces_with_ttl(&packet, 64);
        let left: Vec<Left> = pieces.iter().flat_map(|piece| world.packet(LAN, piece)).collect();
        assert_eq!(left.len(), 1, "{left:?}");
        assert_eq!((left[0].by(), left[0].packet[20], left[0].packet[21]), (LAN, 3, 13));
    }
}

#[test]
fn errors_that_quote_fragments_come_to_the_client() {
    for cores in [1, 2, 3, 5] {
        let mut world = masquerade(cores);
        for id in 1..20 {
            let ping = [echo("10.0.0.9", "198.51.100.7", 8, id), vec![0; 2_500]].concat();
            let datagram = udp(&format!("10.0.0.9:{id}"), "198.51.100.7:53", &[7; 2_500]);
            for mut packet in [ping, datagram] {
                let bytes = packet.len() as u16;
                packet[2..4].copy_from_slice(&bytes.to_be_bytes());
                let number = 1_000 * u16::from(packet[9]) + id;
                packet[4..6].copy_from_slice(&number.to_be_bytes());
                let pieces = pieces_with_ttl(&packet, 64);
                let left: Vec<Left> = pieces.iter().flat_map(|piece| world.packet(LAN, piece)).collect();
                assert_eq!(left.len(), 3);
                for (sent, left) in pieces.iter().zip(&left) {
                    assert_eq!(left.packet[12..16], [203, 0, 113, 1]);
                    let outside = "203.0.113.1".parse().unwrap();
                    let error = icmp_error("192.0.2.1", outside, 11, 0, &left.packet);
                    let told = world.one(WAN, &error);
                    let (by, quote) = (told.by(), &told.packet[28..]);
                    assert_eq!((by, &told.packet[12..20]), (LAN, &[192, 0, 2, 1, 10, 0, 0, 9][..]));
                    // All but time to live, header checksum and upper checksum.
                    assert_eq!((&quote[..8], &quote[12..22]), (&sent[..8], &sent[12..22]), "{cores} cores");
                }
            }
        }
        assert!(world.total(|counters| counters.handed_out) < 20 * 2 * 3 * 2 * u64::from(cores));
    }
}

#[test]
fn forged_errors_about_later_fragments_do_not_travel_for_ever() {
    let mut world = masquerade(4);
    let mut stranger = udp("203.0.113.1:4000", "198.51.100.7:53", &[0; 100]);
    stranger[6..8].copy_from_slice(&[0, 9]);
    let error = icmp_error("192.0.2.1", "10.0.0.9".parse().unwrap(), 3, 1, &stranger);
    world.dropped(WAN, &error, DropReason::IcmpInvalid);
    assert_eq!(world.total(|counters| counters.handed_out), 3);
    let left = world.one(WAN, &icmp_error("192.0.2.1", "203.0.113.1".parse().unwrap(), 3, 1, &stranger));
    assert_eq!(left.by(), HOST, "the host may have sent it");
}

#[test]
fn no_directed_broadcast_is_passed_on_or_answered() {
    let mut world = World::new(2, two_interfaces());
    for (from, source, target) in [
        (WAN, "198.51.100.7", "10.0.0.255"),
        (LAN, "10.0.0.9", "203.0.113.255"),
        (LAN, "10.0.0.9", "10.0.0.255"),
    ] {
        for packet in [echo(source, target, 8, 3), with_ttl(echo(source, target, 8, 4), 1)] {
            assert_eq!(world.dropped(from, &packet, DropReason::DirectedBroadcast), []);
        }
    }
    world.dropped(LAN, &echo("10.0.0.255", "198.51.100.7", 8, 3), DropReason::BadSource);
    assert_eq!(world.one(LAN, &echo("10.0.0.9", "198.51.100.255", 8, 3)).by(), WAN, "who knows what that is");
    assert_eq!(world.flows(), 1);
}

/// Row C2: whoever chooses the routers of a packet is not served, nor is what the choice would be about.
#[test]
fn source_routed_packets_go_nowhere() {
    let mut world = masquerade(1);
    let mut packet = udp("10.0.0.9:5000", "198.51.100.7:53", b"x");
    packet.splice(20..20, [131, 7, 4, 203, 0, 113, 99, 0]);
    packet[0] = 0x47;
    let bytes = packet.len() as u16;
    packet[2..4].copy_from_slice(&bytes.to_be_bytes());
    world.dropped(LAN, &packet, DropReason::SourceRouted);
    assert_eq!(world.flows(), 0);
}

/// A neighbor talks to the host by link-local addresses; nothing of that is passed on.
#[test]
fn link_local_sources_reach_the_host_only() {
    let mut world = masquerade(1);
    let left = world.one(LAN, &udp("169.254.7.7:5000", "10.0.0.1:9999", b"x"));
    assert_eq!(left.by(), HOST);
    world.dropped(LAN, &udp("169.254.7.7:5000", "198.51.100.7:53", b"x"), DropReason::MartianLinkLocal);
}

/// A flow that is known already takes nothing from where its ends are not.
#[test]
fn a_known_flow_comes_in_by_its_interfaces() {
    for is_tcp in [false, true] {
        let mut world = masquerade(1);
        let question = match is_tcp {
            false => udp("10.0.0.9:5000", "198.51.100.7:53", b"x"),
            true => tcp("10.0.0.9:5000", "198.51.100.7:80", SYN, 1, 0, b""),
        };
        let to = format!("203.0.113.1:{}", world.one(LAN, &question).key().src_port);
        let answer = match is_tcp {
            false => udp("198.51.100.7:53", &to, b"y"),
            true => tcp("198.51.100.7:80", &to, SYN | ACK, 100, 2, b""),
        };
        // From inside, as if the server were there; and from outside, as if the client were.
        world.dropped(LAN, &answer, DropReason::WrongIngress);
        assert_eq!(world.one(WAN, &answer).by(), LAN);
        world.dropped(WAN, &question, DropReason::WrongIngress);
        world.dropped(LAN, &answer, DropReason::WrongIngress);
        assert_eq!(world.one(LAN, &question).by(), WAN);
    }
}

/// The answer may come by another link than the question left by, if a route leads there too (RFC 3704 §2.3).
#[test]
fn an_answer_may_come_by_another_link_that_has_a_route() {
    let mut spec = two_interfaces();
    let mut third = spec.interfaces[WAN_ID.index()].clone();
    third.addresses = vec!["192.0.2.1/24".parse().unwrap()];
    spec.interfaces.push(third);
    let question = udp("10.0.0.9:5000", "198.51.100.7:53", b"x");
    let answer = udp("198.51.100.7:53", "10.0.0.9:5000", b"y");
    let mut world = World::new(1, spec.clone());
    assert_eq!(world.one(LAN, &question).by(), WAN);
    world.dropped(THIRD, &answer, DropReason::WrongIngress);
    // A worse one of the same prefix stands before the one that is used.
    spec.routes.insert(0, RouteSpec::new(0, "0.0.0.0/0".parse().unwrap(), THIRD.into(), None));
    let mut world = World::new(1, spec);
    assert_eq!(world.one(LAN, &question).by(), WAN);
    assert_eq!(world.one(THIRD, &answer).by(), LAN);
}

/// Errors too come by a way of the flow, from nobody who cannot be, and quote what is under way (RFC 5927).
#[test]
fn errors_about_a_known_flow_are_looked_at() {
    let mut world = masquerade(1);
    let left = world.one(LAN, &tcp("10.0.0.9:5000", "198.51.100.7:80", SYN, 1_000, 0, b""));
    let outside = format!("203.0.113.1:{}", left.key().src_port);
    let to = "203.0.113.1".parse().unwrap();
    let quote = |seq| tcp(&outside, "198.51.100.7:80", ACK, seq, 0, b"data");
    let about = |from: &str, kind, seq| icmp_error(from, to, kind, 4, &quote(seq));
    assert_eq!(world.one(WAN, &about("192.0.2.9", 3, 1_000)).by(), LAN);
    for seq in [0x4000_0000, 1_002, 0_u32.wrapping_sub(90_000)] {
        world.dropped(WAN, &about("192.0.2.9", 3, seq), DropReason::IcmpInvalid);
    }
    let mut short = about("192.0.2.9", 3, 1_000);
    short.truncate(20 + 8 + 20 + 4);
    short[2..4].copy_from_slice(&52_u16.to_be_bytes());
    world.dropped(WAN, &short, DropReason::IcmpInvalid);
    world.dropped(LAN, &about("192.0.2.9", 3, 1_000), DropReason::WrongIngress);
    world.dropped(WAN, &about("203.0.113.1", 3, 1_000), DropReason::BadSource);
    world.dropped(WAN, &about("127.0.0.1", 3, 1_000), DropReason::MartianLoopback);
    for kind in [4, 5] {
        world.dropped(WAN, &about("192.0.2.9", kind, 1_000), DropReason::IcmpNotForwarded);
    }
}

#[test]
fn errors_about_nothing_known_are_dropped() {
    let mut world = masquerade(2);
    let stranger = udp("203.0.113.1:4000", "198.51.100.7:53", b"x");
    let error = icmp_error("192.0.2.1", "10.0.0.9".parse().unwrap(), 3, 1, &stranger);
    world.dropped(WAN, &error, DropReason::IcmpInvalid);
}

#[test]
fn sources_that_cannot_be() {
    let mut world = masquerade(1);
    for (source, reason) in [
        ("127.0.0.1:5", DropReason::MartianLoopback),
        ("224.0.0.1:5", DropReason::MartianMulticast),
        ("0.0.0.0:5", DropReason::MartianThisNetwork),
        ("169.254.3.4:5", DropReason::MartianLinkLocal),
        ("250.0.0.1:5", DropReason::MartianReserved),
        ("10.0.0.1:5", DropReason::BadSource),
        ("203.0.113.1:5", DropReason::BadSource),
    ] {
        world.dropped(LAN, &udp(source, "198.51.100.7:53", b"x"), reason);
        if reason != DropReason::BadSource && reason != DropReason::MartianMulticast {
            world.dropped(LAN, &udp("10.0.0.9:5", source, b"x"), reason);
        }
    }
    world.dropped(LAN, &udp("10.0.0.9:5", "224.0.0.5:53", b"x"), DropReason::BadSource);
    assert_eq!(world.flows(), 0);
}

proptest::proptest! {
    /// No bytes whatever make a core panic, and what is not understood is counted.
    #[test]
    fn any_bytes(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200), port in 0u16..3) {
        let mut world = masquerade(2);
        let before = world.drops();
        let mut frame = vec![0; 14];
        frame.extend_from_slice(&bytes);
        let left = world.bytes(Ingress::Interface(InterfaceId(port)), &frame);
        proptest::prop_assert!(!left.is_empty() || !world.new_drops(&before).is_empty() || world.held());
    }

    /// Valid packets with a few bytes changed.
    #[test]
    fn damaged_packets(at in 0usize..60, value in proptest::num::u8::ANY, which in 0usize..4) {
        let mut packet = [
            udp("10.0.0.9:5000", "198.51.100.7:53", b"question about something"),
            tcp("10.0.0.9:5000", "198.51.100.7:80", SYN, 1, 0, b""),
            echo("10.0.0.9", "198.51.100.7", 8, 77),
            icmp_error("10.0.0.9", "198.51.100.7".parse().unwrap(), 3, 3, &udp("198.51.100.7:53", "10.0.0.9:5000", b"x")),
        ][which].clone();
        if let Some(byte) = packet.get_mut(at) {
            *byte = value;
        }
        let mut world = masquerade(2);
        let mut frame = vec![0; 14];
        frame.extend_from_slice(&packet);
        world.bytes(LAN, &frame);
    }
}

/// So do its fragments.
#[test]
fn fragments_of_a_known_flow_come_in_by_its_interfaces() {
    let mut world = masquerade(1);
    let question = udp("10.0.0.9:5000", "198.51.100.7:53", b"x");
    let to = format!("203.0.113.1:{}", world.one(LAN, &question).key().src_port);
    let answer = in_pieces(&udp("198.51.100.7:53", &to, &[7; 1_900]), 1_000);
    for piece in &answer {
        world.dropped(LAN, piece, DropReason::WrongIngress);
    }
    for piece in &answer {
        assert_eq!(world.one(WAN, piece).by(), LAN);
    }
}

/// Of an error in pieces nothing could be looked at: nobody sends such a one.
#[test]
fn errors_in_fragments_are_dropped() {
    let mut world = masquerade(1);
    let left = world.one(LAN, &udp("10.0.0.9:5000", "198.51.100.7:53", b"x"));
    let error = icmp_error("192.0.2.9", left.key().src, 3, 4, &left.packet);
    assert_eq!(world.one(WAN, &error).by(), LAN);
    let pieces = in_pieces(&error, 32);
    world.dropped(WAN, &pieces[0], DropReason::IcmpInvalid);
    assert!(world.packet(WAN, &pieces[1]).is_empty());
}

/// Where the answer to a packet without any hops left comes from.
fn told_by(spec: &crate::spec::GatewaySpec, ingress: Ingress, src: &str, dst: &str) -> std::net::IpAddr {
    let mut probe = udp(&format!("{src}:5000"), &format!("{dst}:33434"), b"probe");
    if probe[0] >> 4 == 4 {
        probe = with_ttl(probe, 1);
    } else {
        probe[7] = 1;
    }
    let left = World::new(1, spec.clone()).dropped(ingress, &probe, DropReason::TtlExpired);
    assert_eq!((left.len(), left[0].by()), (1, ingress));
    packet::IpHeader::parse(&left[0].packet).unwrap().src
}

/// An error comes from an address that its receiver can know: none of a link to who is far away, and that of the receiver's own network or
/// its router's.
#[test]
fn errors_come_from_an_address_on_the_way_to_their_receiver() {
    let mut spec = two_interfaces();
    let set = |spec: &mut crate::spec::GatewaySpec, place: usize, addresses: &[&str]| {
        let addresses = addresses.iter().map(|address| address.parse().unwrap());
        spec.interfaces[place].addresses = addresses.collect();
    };
    set(&mut spec, 0, &["192.168.7.1/24", "10.0.0.1/24", "fe80::7/64", "fd00::1/64"]);
    set(&mut spec, 1, &["192.168.100.2/24", "203.0.113.1/24", "fe80::1/64"]);
    let ip = |text: &str| text.parse::<std::net::IpAddr>().unwrap();
    assert_eq!(told_by(&spec, LAN, "10.0.0.9", "198.51.100.7"), ip("10.0.0.1"));
    assert_eq!(told_by(&spec, WAN, "203.0.113.254", "10.0.0.9"), ip("203.0.113.1"));
    assert_eq!(told_by(&spec, WAN, "198.51.100.7", "10.0.0.9"), ip("203.0.113.1"), "by its router");
    assert_eq!(told_by(&spec, LAN, "[fd00::9]", "[2001:db8:7::7]"), ip("fd00::1"));
    assert_eq!(told_by(&spec, WAN, "[2001:db8:7::7]", "[fd00::9]"), ip("fd00::1"), "of another interface");
}

/// To a peer they come from the address by which it knows the gateway.
#[test]
fn errors_to_peers_come_from_the_tunnels_address() {
    let mut spec = super::peers::two_branches();
    spec.host.tunnel_addresses = vec!["10.64.0.1/24".parse().unwrap(), "fd64::1/64".parse().unwrap()];
    let from = told_by(&spec, super::peers::BRANCH, "10.8.0.5", "10.0.0.9");
    assert_eq!(from, "10.64.0.1".parse::<std::net::IpAddr>().unwrap());
}
