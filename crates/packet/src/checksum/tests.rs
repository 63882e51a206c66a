#![allow(clippy::unwrap_used, reason = "tests")]
use super::*;
use crate::testing::{Recipe, V4, V6, naive_sum, payload, pseudo_bytes};
use proptest::prelude::*;

#[test]
fn rfc_1071_example() {
    let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
    assert_eq!(fold(sum(&bytes, 0)), 0xddf2);
    assert_eq!(finish(sum(&bytes, 0)), 0x220d);
}

#[test]
fn rfc_1624_example() {
    // §4: the case in which RFC 1141's equation yields 0xffff.
    assert_eq!(update16(0xdd2f, 0x5555, 0x3285), 0x0000);
}

#[test]
fn long_and_extreme_inputs() {
    for bytes in [0, 1, 2, 3, 31, 32, 33, 63, 64, 65, 1499, 65_535, 1 << 20] {
        for value in [0x00, 0x01, 0x80, 0xff] {
            let input = vec![value; bytes];
            assert_eq!(fold(sum(&input, 0)), naive_sum(&input), "{bytes} bytes of {value:#x}");
        }
    }
    assert_eq!(fold(sum(&[0xff; 64], u32::MAX)), 0xffff);
    assert_eq!(fold(u32::MAX), 0xffff);
    assert!(sum(&[0xff; 64], u32::MAX) < 1 << 17);
}

#[test]
fn udp_zero_becomes_ffff() {
    assert_eq!(nonzero(0), 0xffff);
    assert_eq!(nonzero(0xffff), 0xffff);
    assert_eq!(nonzero(1), 1);
}

#[test]
fn verifying_packets() {
    for addresses in [V4, V6] {
        for recipe in [Recipe::tcp(addresses, payload(33)), Recipe::udp(addresses, payload(33))] {
            assert!(!verify_packet(&recipe.build()), "a partial checksum is not a full one");
            let mut packet = recipe.full().build();
            assert!(verify_packet(&packet));
            let last = packet.len() - 1;
            packet[last] ^= 4;
            assert!(!verify_packet(&packet));
        }
    }
    assert!(!verify_packet(&[]));
    let mut fragment = Recipe::udp(V4, payload(33)).full().build();
    fragment[6] |= 0x20;
    assert!(!verify_packet(&fragment));
    let mut without = Recipe::udp(V4, payload(33)).full().build();
    without[26..28].fill(0);
    assert!(!verify_packet(&without), "no checksum is not a right one");
}

#[test]
fn ipv4_header() {
    let mut packet = Recipe::udp(V4, Vec::new()).build();
    assert!(verify_ipv4_header(&packet[..20]));
    packet[8] -= 1;
    assert!(!verify_ipv4_header(&packet[..20]));
}

proptest! {
    #[test]
    fn as_the_naive_sum(bytes in prop::collection::vec(any::<u8>(), 0..300), skip in 0usize..9, initial: u32) {
        let bytes = &bytes[skip.min(bytes.len())..];
        let expected = {
            let mut with_initial = initial.to_be_bytes().to_vec();
            with_initial.extend(bytes);
            naive_sum(&with_initial)
        };
        prop_assert_eq!(fold(sum(bytes, initial)), expected);
    }

    #[test]
    fn parts_add_up(bytes in prop::collection::vec(any::<u8>(), 0..300), at in 0usize..150) {
        let (head, tail) = bytes.split_at((at * 2).min(bytes.len()));
        prop_assert_eq!(fold(sum(tail, sum(head, 0))), naive_sum(&bytes));
        prop_assert_eq!(fold(sum(tail, 0) + sum(head, 0)), naive_sum(&bytes));
    }

    #[test]
    fn pseudo_headers(src: [u8; 16], dst: [u8; 16], protocol: u8, bytes in 0usize..65_536) {
        let four = |octets: [u8; 16]| IpAddr::from([octets[0], octets[1], octets[2], octets[3]]);
        for (src, dst) in [(four(src), four(dst)), (IpAddr::from(src), IpAddr::from(dst))] {
            let expected = naive_sum(&pseudo_bytes(src, dst, protocol, bytes));
            prop_assert_eq!(fold(pseudo_header(src, dst, protocol, bytes)), expected);
        }
    }

    /// Updating gives what computing anew gives; 0 and 0xffff are the same number here.
    #[test]
    fn updates(mut bytes in prop::collection::vec(any::<u8>(), 64), at in 0usize..28, new: [u8; 8]) {
        let at = at * 2;
        let before = finish(sum(&bytes, 0));
        let old: [u8; 8] = bytes[at..at + 8].try_into().unwrap();
        bytes[at..at + 8].copy_from_slice(&new);
        let after = finish(sum(&bytes, 0));
        let word = |bytes: &[u8; 8], at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let double = |bytes: &[u8; 8], at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
        let by_words = (0..4).fold(before, |sum, i| update16(sum, word(&old, i * 2), word(&new, i * 2)));
        let by_doubles = (0..2).fold(before, |sum, i| update32(sum, double(&old, i * 4), double(&new, i * 4)));
        let by_bytes = update_bytes(before, &old, &new);
        let partial = update_bytes_partial(!before, &old, &new);
        let partial_words = (0..4).fold(!before, |sum, i| update16_partial(sum, word(&old, i * 2), word(&new, i * 2)));
        for updated in [by_words, by_doubles, by_bytes, !partial, !partial_words] {
            prop_assert_eq!(nonzero(updated), nonzero(after));
        }
    }
}
