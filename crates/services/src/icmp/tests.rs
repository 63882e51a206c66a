#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::rewrite::testing::{Sum, ip, key, packet, pseudo, summed};
use packet::FlowKey;
use proptest::prelude::*;

const FROM_V4: &str = "192.0.2.1";
const FROM_V6: &str = "2001:db8:f::1";

fn answer(packet: &[u8], problem: Problem) -> Option<Vec<u8>> {
    let header = IpHeader::parse(packet).unwrap();
    let from = if header.version == 4 { FROM_V4 } else { FROM_V6 }.parse().unwrap();
    let mut out = [0xaa; ANSWER_BYTES_MAX];
    let bytes = error(&mut out, packet, &header, problem, from)?;
    assert!(out[bytes..].iter().all(|byte| *byte == 0xaa), "written behind the end");
    Some(out[..bytes].to_vec())
}

/// An ICMP error is right in itself, and is about this flow.
fn check(answer: &[u8], about: &FlowKey) {
    let header = IpHeader::parse(answer).unwrap();
    assert_eq!((header.total_bytes, header.dst), (answer.len(), about.src));
    assert_eq!(FlowKey::of(answer), Ok(about.reversed()));
    if header.version == 4 {
        assert!(checksum::verify_ipv4_header(&answer[..20]));
        assert_eq!(checksum::fold(checksum::sum(&answer[20..], 0)), 0xffff);
    } else {
        assert!(checksum::verify_packet(answer));
    }
}

#[test]
fn errors_have_their_types_and_quote_the_packet() {
    let v4 = key("udp 10.0.0.5:1234 > 93.184.216.34:443");
    let v6 = key("tcp [2001:db8::5]:1234 > [2001:db8:1::22]:443");
    for (problem, expected_v4, expected_v6) in [
        (Problem::TtlExpired, [11, 0, 0], [3, 0, 0]),
        (Problem::NoRoute, [3, 0, 0], [1, 0, 0]),
        (Problem::HostUnreachable, [3, 1, 0], [1, 3, 0]),
        (Problem::PortUnreachable, [3, 3, 0], [1, 4, 0]),
        (Problem::Prohibited, [3, 13, 0], [1, 1, 0]),
        (Problem::TooBig(1_420), [3, 4, 1_420], [2, 0, 1_420]),
        (Problem::TooBig(1), [3, 4, 68], [2, 0, 1_280]),
    ] {
        for (about, expected, quote_at) in [(&v4, expected_v4, 28), (&v6, expected_v6, 48)] {
            for payload in [0, 7, 8, 500, 3_000] {
                let packet = packet(about, (0, &[]), &vec![7; payload], Sum::Full);
                let answer = answer(&packet, problem).unwrap();
                check(&answer, about);
                let message = &answer[quote_at - 8..];
                let rest = u32::from_be_bytes(message[4..8].try_into().unwrap());
                assert_eq!([u32::from(message[0]), u32::from(message[1]), rest], expected);
                let room = if quote_at == 28 { 576 - 28 } else { 1_280 - 48 };
                assert_eq!(answer[quote_at..], packet[..packet.len().min(room)]);
            }
        }
    }
}

#[test]
fn some_packets_get_no_error() {
    let icmp = |text: &str, kind: u8| {
        let key = key(text);
        let upper = summed(key.src, key.dst, key.protocol, vec![kind, 0, 0, 0, 0, 0, 0, 0], Sum::Full);
        ip(&key, (0, &[]), &upper)
    };
    let udp = |text: &str| packet(&key(text), (0, &[]), b"payload", Sum::Full);
    let mut refused = vec![
        udp("udp 10.0.0.5:1 > 224.0.0.5:2"),
        udp("udp 10.0.0.5:1 > 255.255.255.255:2"),
        udp("udp 0.0.0.0:68 > 10.0.0.1:67"),
        udp("udp 127.0.0.1:1 > 10.0.0.1:2"),
        udp("udp 224.0.0.1:1 > 10.0.0.1:2"),
        udp("udp 255.255.255.255:1 > 10.0.0.1:2"),
        udp("udp 240.0.0.1:1 > 10.0.0.1:2"),
        udp("udp [::]:1 > [2001:db8::1]:2"),
        udp("udp [::1]:1 > [2001:db8::1]:2"),
        udp("udp [ff02::1]:1 > [2001:db8::1]:2"),
        udp("udp [2001:db8::1]:1 > [ff0e::1]:2"),
        ip(&key("icmp 10.0.0.5 > 10.0.0.6"), (0, &[]), &[]),
        ip(&key("icmpv6 fd00::5 > fd00::6"), (0, &[]), &[]),
    ];
    refused.extend([3, 4, 5, 11, 12].map(|kind| icmp("icmp 10.0.0.5 > 10.0.0.6", kind)));
    refused.extend([1, 2, 3, 4, 100, 127, 137].map(|kind| icmp("icmpv6 fd00::5 > fd00::6", kind)));
    let mut later = udp("udp 10.0.0.5:1 > 10.0.0.6:2");
    later[7] = 1;
    refused.push(later);
    for packet in &refused {
        assert_eq!(answer(packet, Problem::TtlExpired), None, "{packet:?}");
    }
    let mut first = udp("udp 10.0.0.5:1 > 10.0.0.6:2");
    first[6] = 0x20;
    for packet in [first, icmp("icmp 10.0.0.5 > 10.0.0.6", 8), icmp("icmpv6 fd00::5 > fd00::6", 128)] {
        assert!(answer(&packet, Problem::TtlExpired).is_some());
    }
    // Senders of multicast must learn the path's MTU.
    assert!(answer(&udp("udp [2001:db8::1]:1 > [ff0e::1]:2"), Problem::TooBig(1_400)).is_some());
    assert_eq!(answer(&udp("udp 10.0.0.5:1 > 224.0.0.5:2"), Problem::TooBig(1_400)), None);
}

#[test]
fn short_buffers_and_other_versions_give_nothing() {
    let about = key("udp 10.0.0.5:1234 > 93.184.216.34:443");
    let packet = packet(&about, (0, &[]), &[7; 100], Sum::Full);
    let header = IpHeader::parse(&packet).unwrap();
    for room in 0..300 {
        let mut out = vec![0; room];
        match error(&mut out, &packet, &header, Problem::NoRoute, FROM_V4.parse().unwrap()) {
            Some(bytes) => {
                assert!(room >= 56 && bytes <= room);
                check(&out[..bytes], &about);
            }
            None => assert!(room < 56, "{room}"),
        }
    }
    let from = FROM_V6.parse().unwrap();
    assert_eq!(error(&mut [0; 1_280], &packet, &header, Problem::NoRoute, from), None);
    assert_eq!(error(&mut [0; 1_280], &packet[..50], &header, Problem::NoRoute, from), None);
}

fn segment(about: &FlowKey, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut tcp = vec![0, 0, 0, 0, 0, 0, 0x30, 0x39, 0, 0, 0xd4, 0x31, 0x50, flags, 1, 0, 0, 0, 0, 0];
    tcp[..2].copy_from_slice(&about.src_port.to_be_bytes());
    tcp[2..4].copy_from_slice(&about.dst_port.to_be_bytes());
    tcp.extend(payload);
    ip(about, (0, &[]), &summed(about.src, about.dst, 6, tcp, Sum::Full))
}

fn refusal(packet: &[u8], partial: bool) -> Option<Vec<u8>> {
    let mut out = [0xaa; 60];
    let bytes = reset(&mut out, packet, &IpHeader::parse(packet).unwrap(), partial)?;
    Some(out[..bytes].to_vec())
}

#[test]
fn resets_are_what_the_destination_would_send() {
    for text in ["tcp 10.0.0.5:1234 > 93.184.216.34:443", "tcp [2001:db8::5]:1234 > [2001:db8:1::22]:443"] {
        let about = key(text);
        // (flags, payload) and the answer's (sequence number, acknowledgment, flags)
        for (flags, payload, expected) in [
            (0x02, &b""[..], (0, 12_346, 0x14)),
            (0x02, b"fast open", (0, 12_355, 0x14)),
            (0x12, b"", (54_321, 0, 0x04)),
            (0x10, b"data", (54_321, 0, 0x04)),
            (0x11, b"", (54_321, 0, 0x04)),
        ] {
            let answer = refusal(&segment(&about, flags, payload), false).unwrap();
            assert!(checksum::verify_packet(&answer));
            assert_eq!(FlowKey::of(&answer), Ok(about.reversed()));
            let header = IpHeader::parse(&answer).unwrap();
            let segment = Segment::of(header.payload(&answer)).unwrap();
            assert_eq!((segment.seq, segment.ack, segment.flags), expected);
            assert!(header.version == 6 || checksum::verify_ipv4_header(&answer[..20]));
        }
        assert_eq!(refusal(&segment(&about, 0x04, b""), false), None, "a RST is answered");
        assert_eq!(refusal(&segment(&about, 0x14, b""), false), None, "a RST is answered");
        let mut damaged = segment(&about, 0x02, b"xy");
        *damaged.last_mut().unwrap() ^= 1;
        assert_eq!(refusal(&damaged, false), None, "a damaged segment is answered");
        assert!(refusal(&damaged, true).is_some());
    }
    let multicast = segment(&key("tcp 10.0.0.5:1 > 224.0.0.9:2"), 0x02, b"");
    let udp = packet(&key("udp 10.0.0.5:1 > 10.0.0.6:2"), (0, &[]), b"", Sum::Full);
    let mut fragment = segment(&key("tcp 10.0.0.5:1 > 10.0.0.6:2"), 0x02, b"");
    fragment[6] = 0x20;
    for packet in [multicast, udp, fragment] {
        assert_eq!(refusal(&packet, true), None);
    }
    assert_eq!(pseudo(FROM_V4.parse().unwrap(), FROM_V4.parse().unwrap(), 6, 20).len(), 16);
}

#[test]
fn the_limiter_keeps_its_rate() {
    for per_s in [1, 7, 10, 1_000, 1_000_000] {
        let mut limiter = Limiter::new(per_s);
        let mut allowed = 0u32;
        for step in 0..200_000u64 {
            allowed += u32::from(limiter.allow(5_000_000_000 + step * 10_000));
        }
        // Two seconds, and the burst.
        let most = 2 * per_s + (per_s / 10).max(1);
        assert!(allowed <= most && allowed >= (2 * per_s).min(200_000), "{per_s}: {allowed}");
    }
    let mut limiter = Limiter::new(1_000);
    let burst = (0..500).filter(|_| limiter.allow(77)).count();
    assert_eq!(burst, 100);
    assert!(!limiter.allow(77) && limiter.allow(77 + 1_000_000) && !limiter.allow(77 + 1_000_001));
    assert!(!Limiter::new(0).allow(0) && !Limiter::new(0).allow(u64::MAX));
    assert!(Limiter::new(u32::MAX).allow(u64::MAX));
}

proptest! {
    #[test]
    fn nothing_makes_it_panic(
        bytes in prop::collection::vec(any::<u8>(), 20..200),
        version in prop_oneof![Just(0x45u8), Just(0x47), Just(0x60)],
        protocol in prop_oneof![Just(1u8), Just(6), Just(17), Just(58), Just(44)],
    ) {
        let mut bytes = bytes;
        bytes[0] = version;
        bytes[if version == 0x60 { 6 } else { 9 }] = protocol;
        bytes[2..4].copy_from_slice(&[0, 20]);
        if let Ok(header) = IpHeader::parse(&bytes) {
            let from = if header.version == 4 { FROM_V4 } else { FROM_V6 }.parse().unwrap();
            let mut out = [0; ANSWER_BYTES_MAX];
            if let Some(length) = error(&mut out, &bytes, &header, Problem::TooBig(1_400), from) {
                prop_assert!(IpHeader::parse(&out[..length]).is_ok());
            }
            let _ = reset(&mut out, &bytes, &header, true);
        }
    }
}
