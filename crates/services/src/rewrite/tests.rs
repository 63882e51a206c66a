#![allow(clippy::unwrap_used, reason = "tests")]

use super::crc32c::change as crc_change;
use super::testing::{Sum, crc32c, ip, key, naive_sum, packet, summed, upper};
use super::*;
use proptest::prelude::*;

fn rewritten(packet: &[u8], to: &FlowKey, partial: bool) -> Result<Vec<u8>, DropReason> {
    let mut copy = packet.to_vec();
    let header = IpHeader::parse(packet).unwrap();
    rewrite(&mut copy, &header, partial, to).map(|()| copy)
}

const V4: &str = "10.0.0.5:1234 > 93.184.216.34:443";
const V4_TO: &str = "203.0.113.9:40001 > 93.184.216.34:8443";
const V6: &str = "[2001:db8::5]:1234 > [2001:db8:1::22]:443";
const V6_TO: &str = "[fd00:1234::9]:40001 > [2001:db8:2::1]:8443";
const HOP_BY_HOP: [u8; 8] = [0, 0, 1, 4, 0, 0, 0, 0];

#[test]
fn packets_become_what_would_have_been_built_of_the_other_key() {
    let record_route = [7, 7, 4, 0, 0, 0, 0, 0];
    for (from, to, options) in [
        (V4, V4_TO, vec![]),
        (V4, V4_TO, record_route.to_vec()),
        (V6, V6_TO, vec![]),
        (V6, V6_TO, HOP_BY_HOP.to_vec()),
    ] {
        for protocol in ["tcp", "udp", "udplite", "sctp", "gre", "33", "41"] {
            let bare = matches!(protocol, "gre" | "33" | "41");
            let build = |text: &str| {
                let mut key = key(&format!("{protocol} {text}"));
                if bare {
                    (key.src_port, key.dst_port) = (0, 0);
                }
                key
            };
            let (from, to) = (build(from), build(to));
            for how in [Sum::Full, Sum::Partial, Sum::Absent] {
                if how != Sum::Full && !matches!(protocol, "tcp" | "udp") {
                    continue;
                }
                if how == Sum::Absent && protocol != "udp" {
                    continue;
                }
                for payload in [&b""[..], b"odd", b"a longer payload of even length."] {
                    let mut options = options.clone();
                    if let (6, Some(next)) = (if from.src.is_ipv4() { 4 } else { 6 }, options.first_mut()) {
                        *next = from.protocol;
                    }
                    let before = packet(&from, (0, &options), payload, how);
                    let after = rewritten(&before, &to, how == Sum::Partial).unwrap();
                    assert_eq!(after, packet(&to, (0, &options), payload, how), "{from} to {to} {how:?}");
                }
            }
        }
    }
}

#[test]
fn queries_have_their_identifier_changed() {
    for (from, to) in [
        ("icmp 10.0.0.5 > 93.184.216.34 id 7", "icmp 203.0.113.9 > 93.184.216.34 id 4660"),
        ("icmp 93.184.216.34 > 203.0.113.9 id 4660", "icmp 93.184.216.34 > 10.0.0.5 id 7"),
        ("icmpv6 2001:db8::5 > 2001:db8:1::22 id 7", "icmpv6 fd00::9 > 2001:db8:1::22 id 4660"),
    ] {
        let (from, to) = (key(from), key(to));
        let after = rewritten(&packet(&from, (0, &[]), b"ping!", Sum::Full), &to, false).unwrap();
        assert_eq!(after, packet(&to, (0, &[]), b"ping!", Sum::Full), "{from}");
        assert_eq!(FlowKey::of(&after), Ok(to));
    }
}

#[test]
fn other_icmp_messages_have_their_addresses_changed() {
    let (from, to) = (key("icmpv6 2001:db8::5 > ff02::1"), key("icmpv6 fd00::9 > ff02::1"));
    let message = |key: &FlowKey| {
        let upper = summed(key.src, key.dst, 58, vec![133, 0, 0, 0, 0, 0, 0, 0], Sum::Full);
        ip(key, (0, &[]), &upper)
    };
    assert_eq!(rewritten(&message(&from), &to, false).unwrap(), message(&to));
}

#[test]
fn a_udp_checksum_that_becomes_zero_is_written_as_ones() {
    let from = key("udp 10.0.0.5:1234 > 10.9.9.9:53");
    for last in 0..=u16::MAX {
        let to = FlowKey { src_port: last, ..from };
        let expected = packet(&to, (0, &[]), b"", Sum::Full);
        if expected[26..28] == [0xff, 0xff] {
            let after = rewritten(&packet(&from, (0, &[]), b"", Sum::Full), &to, false).unwrap();
            assert_eq!(after, expected);
            return;
        }
    }
    panic!("no port gives a checksum of zero");
}

#[test]
fn fragments_divide_the_change() {
    for (from, to) in [(V4, V4_TO), (V6, V6_TO)] {
        for protocol in ["tcp", "udp"] {
            let (from, to) = (key(&format!("{protocol} {from}")), key(&format!("{protocol} {to}")));
            let payload: Vec<u8> = (0..100).collect();
            let (before, after) = (upper(&from, &payload, Sum::Full), upper(&to, &payload, Sum::Full));
            for (at, end) in [(0, 40), (40, 80), (80, before.len())] {
                let piece = |key: &FlowKey, whole: &[u8]| {
                    let more = u8::from(end < whole.len());
                    if key.src.is_ipv4() {
                        let mut bytes = ip(key, (0, &[]), &whole[at..end]);
                        bytes[6..8].copy_from_slice(&[more << 5, (at / 8) as u8]);
                        bytes[10..12].fill(0);
                        let sum = !(naive_sum(&bytes[..20]) as u16);
                        bytes[10..12].copy_from_slice(&sum.to_be_bytes());
                        bytes
                    } else {
                        let fragment = [key.protocol, 0, 0, at as u8 | more, 1, 2, 3, 4];
                        ip(key, (44, &fragment), &whole[at..end])
                    }
                };
                assert_eq!(rewritten(&piece(&from, &before), &to, false).unwrap(), piece(&to, &after));
            }
        }
    }
}

#[test]
fn what_cannot_be_translated_is_refused_and_stays_as_it_is() {
    let tcp_v4 = key("tcp 10.0.0.5:1234 > 93.184.216.34:443");
    let to_v4 = key("tcp 10.0.0.5:1234 > 10.1.1.1:443");
    let tcp_v6 = key("tcp [2001:db8::5]:1234 > [2001:db8:1::22]:443");
    let to_v6 = key("tcp [2001:db8::5]:1234 > [fd00::1]:443");
    let whole = |key: &FlowKey, options: (u8, &[u8])| packet(key, options, b"x", Sum::Full);
    let routing = [[6, 2, 0, 1, 0, 0, 0, 0].to_vec(), vec![7; 16]].concat();
    let authentication = [[6, 4, 0, 0].to_vec(), vec![1; 20]].concat();
    let source_route = [131, 7, 4, 10, 0, 0, 9, 0];
    let sctp = key("sctp 10.0.0.5:1 > 10.0.0.6:2");
    let mut sctp_fragment = whole(&sctp, (0, &[]));
    sctp_fragment[6] = 0x20;
    let mut tiny = whole(&tcp_v4, (0, &[]))[..36].to_vec();
    (tiny[3], tiny[6]) = (36, 0x20);
    let mut cut = whole(&tcp_v4, (0, &[]))[..30].to_vec();
    cut[3] = 30;
    let cases = [
        ("other version", whole(&tcp_v4, (0, &[])), tcp_v6, DropReason::NatUnsupported),
        ("other version", whole(&tcp_v6, (0, &[])), tcp_v4, DropReason::NatUnsupported),
        ("routing header", whole(&tcp_v6, (43, &routing)), to_v6, DropReason::NatUnsupported),
        ("authentication header", whole(&tcp_v6, (51, &authentication)), to_v6, DropReason::NatUnsupported),
        (
            "authentication header",
            ip(&key("ah 10.0.0.5 > 10.0.0.6"), (0, &[]), &authentication),
            to_v4,
            DropReason::NatUnsupported,
        ),
        ("source route", whole(&tcp_v4, (0, &source_route)), to_v4, DropReason::NatUnsupported),
        ("sctp fragment", sctp_fragment, key("sctp 10.0.0.5:3 > 10.0.0.6:2"), DropReason::NatUnsupported),
        (
            "options in fragments",
            whole(&tcp_v6, (44, &[60, 0, 0, 1, 0, 0, 0, 9])),
            to_v6,
            DropReason::NatUnsupported,
        ),
        ("tiny fragment", tiny, to_v4, DropReason::FragmentInvalid),
        ("cut header", cut, to_v4, DropReason::IpMalformed),
    ];
    for (name, packet, to, reason) in cases {
        let header = IpHeader::parse(&packet).unwrap();
        let mut copy = packet.clone();
        assert_eq!(rewrite(&mut copy, &header, false, &to), Err(reason), "{name}");
        assert_eq!(copy, packet, "{name}");
    }
    // The source may change where only the destination stands elsewhere.
    let other = FlowKey { src: "fd00::7".parse().unwrap(), ..tcp_v6 };
    let after = rewritten(&whole(&tcp_v6, (43, &routing)), &other, false).unwrap();
    assert_eq!(after, whole(&other, (43, &routing)));
}

#[test]
fn crc_follows_at_any_length() {
    for bytes in [4, 5, 12, 13, 100, 1_480, 65_515] {
        let mut message: Vec<u8> = (0..bytes).map(|index| (index * 7 + index / 256) as u8).collect();
        let before = crc32c(&message);
        let difference = [0x12, 0xff, 0x00, 0x81];
        for (byte, change) in message.iter_mut().zip(difference) {
            *byte ^= change;
        }
        assert_eq!(before ^ crc_change(difference, bytes).unwrap(), crc32c(&message), "{bytes}");
    }
    assert_eq!(crc_change([1; 4], 3), None);
    assert_eq!(crc_change([1; 4], 70_000), None);
}

/// `from`: who sends the error; the quote is of `quoted`, cut to `quote_bytes`.
fn icmp_error(src: &str, dst: IpAddr, quoted: &FlowKey, quote_bytes: usize, rest: (u8, u8)) -> Vec<u8> {
    let mut quote = packet(quoted, (0, &[]), b"payload of the quote", Sum::Full);
    quote.truncate(quote_bytes);
    let src: IpAddr = src.parse().unwrap();
    let protocol = if dst.is_ipv4() { 1 } else { 58 };
    let message = [&[rest.0, rest.1, 0, 0, 0, 0, 5, 0][..], &quote].concat();
    let outer = FlowKey { src, dst, src_port: 0, dst_port: 0, protocol };
    ip(&outer, (0, &[]), &summed(src, dst, protocol, message, Sum::Full))
}

#[test]
fn errors_are_translated_with_what_they_quote() {
    let v4 = ("10.0.0.5", "203.0.113.9", "93.184.216.34", "192.0.2.77", "10.0.0.1");
    let v6 = ("fd00::5", "2001:db8::9", "2001:db8:1::22", "2001:db8:9::77", "fd00::1");
    for (inside, outside, server, router, gateway) in [v4, v6] {
        let brackets = if inside.contains(':') { ("[", "]") } else { ("", "") };
        let (a, b) = brackets;
        let icmp = if a.is_empty() { "icmp" } else { "icmpv6" };
        for (before, after) in [
            (
                format!("tcp {a}{inside}{b}:1234 > {a}{server}{b}:443"),
                format!("tcp {a}{outside}{b}:40001 > {a}{server}{b}:443"),
            ),
            (
                format!("udp {a}{inside}{b}:1234 > {a}{server}{b}:443"),
                format!("udp {a}{outside}{b}:40001 > {a}{server}{b}:443"),
            ),
            (format!("{icmp} {inside} > {server} id 9"), format!("{icmp} {outside} > {server} id 4000")),
        ] {
            let (before, after) = (key(&before), key(&after));
            let kind = if a.is_empty() { (3, 4) } else { (2, 0) };
            for quote_bytes in [if after.src.is_ipv4() { 28 } else { 48 }, 59, 62, 200] {
                let change = |error: &[u8], to: &FlowKey, hide: Option<&str>| {
                    let mut copy = error.to_vec();
                    let header = IpHeader::parse(error).unwrap();
                    let hide = hide.map(|address| address.parse().unwrap());
                    rewrite_error(&mut copy, &header, false, to, hide).unwrap();
                    copy
                };
                // Inbound, about a packet that left as `after`: of a router on the way, then of the server itself.
                let to = before.reversed();
                let came = icmp_error(router, after.src, &after, quote_bytes, kind);
                let expected = icmp_error(router, before.src, &before, quote_bytes, kind);
                assert_eq!(change(&came, &to, None), expected, "{after} {quote_bytes}");
                assert_eq!(FlowKey::of(&expected), Ok(to));
                let came = icmp_error(server, after.src, &after, quote_bytes, kind);
                let expected = icmp_error(server, before.src, &before, quote_bytes, kind);
                assert_eq!(change(&came, &to, Some(gateway)), expected);
                // Outbound, about a packet that the server sent: of the inside host, then of a router before it.
                let (quoted, outer) = (before.reversed(), after.reversed());
                let came = icmp_error(inside, before.dst, &quoted, quote_bytes, kind);
                let expected = icmp_error(outside, before.dst, &outer, quote_bytes, kind);
                assert_eq!(change(&came, &after, None), expected);
                let came = icmp_error(gateway, before.dst, &quoted, quote_bytes, kind);
                let expected = icmp_error(outside, before.dst, &outer, quote_bytes, kind);
                assert_eq!(change(&came, &after, Some(outside)), expected);
            }
        }
    }
}

#[test]
fn what_is_no_error_is_refused() {
    let to = key("udp 10.0.0.5:1 > 10.0.0.6:2");
    let echo = packet(&key("icmp 10.0.0.1 > 10.0.0.2 id 5"), (0, &[]), b"", Sum::Full);
    let udp = packet(&to, (0, &[]), b"x", Sum::Full);
    let short = icmp_error("10.0.0.1", "10.0.0.5".parse().unwrap(), &to, 19, (3, 1));
    let none = icmp_error("10.0.0.1", "10.0.0.5".parse().unwrap(), &to, 0, (3, 1));
    let elsewhere = icmp_error("10.0.0.1", "10.0.0.2".parse().unwrap(), &to, 200, (3, 1));
    for packet in [echo, udp, short, none, elsewhere] {
        let header = IpHeader::parse(&packet).unwrap();
        let mut copy = packet.clone();
        assert_eq!(rewrite_error(&mut copy, &header, false, &to, None), Err(DropReason::IcmpInvalid));
        assert_eq!(copy, packet);
    }
}

#[test]
fn time_to_live_counts_down() {
    for text in [V4, V6] {
        let mut bytes = packet(&key(&format!("udp {text}")), (0, &[]), b"x", Sum::Full);
        let at = if bytes[0] >> 4 == 4 { 8 } else { 7 };
        for left in (1..64).rev() {
            assert_eq!(decrement_ttl(&mut bytes), Ok(()));
            assert_eq!(bytes[at], left);
            assert!(bytes[0] >> 4 == 6 || checksum::verify_ipv4_header(&bytes[..20]));
        }
        assert_eq!(decrement_ttl(&mut bytes), Err(DropReason::TtlExpired));
        assert_eq!(bytes[at], 1);
    }
    assert_eq!(decrement_ttl(&mut []), Err(DropReason::IpMalformed));
    assert_eq!(decrement_ttl(&mut [0x45; 19]), Err(DropReason::IpMalformed));
}

fn any_key(v6: bool, protocol: u8) -> impl Strategy<Value = FlowKey> {
    let address = any::<u128>()
        .prop_map(move |bits| if v6 { IpAddr::V6(bits.into()) } else { IpAddr::V4((bits as u32).into()) });
    (address.clone(), address, any::<u16>(), any::<u16>())
        .prop_map(move |(src, dst, src_port, dst_port)| FlowKey { src, dst, src_port, dst_port, protocol })
}

fn any_pair() -> impl Strategy<Value = (FlowKey, FlowKey)> {
    let protocol = prop_oneof![Just(6u8), Just(17), Just(136), Just(132), Just(47)];
    (any::<bool>(), protocol).prop_flat_map(|(v6, protocol)| (any_key(v6, protocol), any_key(v6, protocol)))
}

proptest! {
    #[test]
    fn there_and_back_is_the_same(
        (from, to) in any_pair(),
        payload in prop::collection::vec(any::<u8>(), 0..64),
        partial: bool,
    ) {
        let partial = partial && matches!(from.protocol, 6 | 17);
        let how = if partial { Sum::Partial } else { Sum::Full };
        let before = packet(&from, (0, &[]), &payload, how);
        let there = rewritten(&before, &to, partial).unwrap();
        prop_assert_eq!(&there, &packet(&to, (0, &[]), &payload, how));
        prop_assert_eq!(rewritten(&there, &from, partial).unwrap(), before);
    }

    #[test]
    fn the_short_way_equals_the_long_one((from, to) in any_pair(), partial: bool) {
        let before = packet(&from, (0, &[]), b"1234567", Sum::Full);
        let header = IpHeader::parse(&before).unwrap();
        let (mut short, mut long) = (before.clone(), before);
        prop_assert_eq!(rewrite(&mut short, &header, partial, &to), Ok(()));
        prop_assert_eq!(general(&mut long, &header, partial, &to), Ok(()));
        prop_assert_eq!(short, long);
    }
}
