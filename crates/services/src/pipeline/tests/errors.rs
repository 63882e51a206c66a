//! Packets that must be answered, and bad input.

use packet::DropReason;
use packet::attachment::{Ingress, InterfaceId};
use packet::checksum;

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
    for source in ["127.0.0.1:5", "224.0.0.1:5", "0.0.0.0:5", "10.0.0.1:5", "203.0.113.1:5"] {
        world.dropped(LAN, &udp(source, "198.51.100.7:53", b"x"), DropReason::BadSource);
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
