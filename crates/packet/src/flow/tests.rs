#![allow(clippy::unwrap_used, reason = "tests")]
use super::*;
use crate::testing::{Recipe, V4, V6, any_recipe, ip_packet, payload};
use proptest::prelude::*;

fn key(text: &str) -> FlowKey {
    text.parse().unwrap()
}

/// The packet a host would send back: addresses swapped, and ports with them.
fn swapped(recipe: &Recipe) -> Recipe {
    Recipe { src: recipe.dst, dst: recipe.src, ports: (recipe.ports.1, recipe.ports.0), ..recipe.clone() }
}

#[test]
fn ports() {
    for (protocol, name) in [(6, "tcp"), (17, "udp"), (132, "sctp"), (136, "udplite")] {
        let upper = [0x04, 0xd2, 0x01, 0xbb];
        let four = ip_packet(&Recipe::udp(V4, Vec::new()), protocol, &upper);
        assert_eq!(FlowKey::of(&four), Ok(key(&format!("{name} 10.0.0.5:1234 > 1.2.3.4:443"))));
        let six = ip_packet(&Recipe::udp(V6, Vec::new()), protocol, &upper);
        assert_eq!(FlowKey::of(&six), Ok(key(&format!("{name} [2001:db8::5]:1234 > [2001:db8:1::4]:443"))));
        let cut = ip_packet(&Recipe::udp(V4, Vec::new()), protocol, &upper[..3]);
        assert_eq!(FlowKey::of(&cut), Ok(key(&format!("{name} 10.0.0.5 > 1.2.3.4"))));
    }
    let esp = ip_packet(&Recipe::udp(V4, Vec::new()), 50, &payload(40));
    assert_eq!(FlowKey::of(&esp), Ok(key("esp 10.0.0.5 > 1.2.3.4")));
    assert_eq!(FlowKey::of(&[]), Err(DropReason::IpMalformed));
}

#[test]
fn fragments_have_no_ports_and_one_key() {
    let mut four = Recipe::udp(V4, payload(64)).build();
    for flags in [[0x20, 0], [0x20, 9], [0, 9]] {
        four[6..8].copy_from_slice(&flags);
        assert_eq!(FlowKey::of(&four), Ok(key("udp 10.0.0.5 > 1.2.3.4")));
    }
    let recipe = Recipe::udp(V6, payload(64));
    for flags in [[0, 1], [1, 1], [1, 0]] {
        let fragment = [17, 0, flags[0], flags[1], 0, 0, 0, 1];
        assert_eq!(
            FlowKey::of(&recipe.build_behind(44, &fragment)),
            Ok(key("udp 2001:db8::5 > 2001:db8:1::4"))
        );
    }
    let whole = recipe.build_behind(44, &[17, 0, 0, 0, 0, 0, 0, 1]);
    assert_eq!(FlowKey::of(&whole), FlowKey::of(&recipe.build()), "RFC 6946: a whole packet keeps its ports");
}

#[test]
fn behind_extension_headers() {
    let recipe = Recipe::tcp(V6, payload(64));
    let packet = recipe.build_behind(0, &[6, 0, 1, 4, 0, 0, 0, 0]);
    assert_eq!(FlowKey::of(&packet), FlowKey::of(&recipe.build()));
}

#[test]
fn connections_are_marked_by_their_first_packet() {
    let mark = |recipe: &Recipe| {
        let packet = recipe.build();
        connection_mark(&IpHeader::parse(&packet).unwrap(), &packet)
    };
    let syn = |sequence: u32, flags: u8| {
        let mut recipe = Recipe::tcp(V4, Vec::new());
        let tcp = recipe.tcp.as_mut().unwrap();
        (tcp.sequence, tcp.flags) = (sequence, flags);
        mark(&recipe)
    };
    let first = syn(1_000, 0x02);
    assert!(first.is_some() && first == syn(1_000, 0x12));
    let marks: std::collections::BTreeSet<_> =
        (0..1_000u32).map(|n| syn(n.wrapping_mul(77_777_777), 0x02)).collect();
    assert!(marks.len() > 240 && !marks.contains(&None), "{}", marks.len());
    assert_eq!((syn(1_000, 0x10), syn(1_000, 0x11)), (None, None));
    assert_eq!(mark(&Recipe::udp(V6, payload(40))), None);
    let mut fragment = Recipe::tcp(V4, payload(64)).build();
    fragment[6..8].copy_from_slice(&[0x20, 0]);
    assert_eq!(connection_mark(&IpHeader::parse(&fragment).unwrap(), &fragment), None);
}

fn echo(src: &str, dst: &str, kind: u8, id: u16) -> FlowKey {
    let recipe = Recipe::udp((src, dst), Vec::new());
    let [a, b] = id.to_be_bytes();
    let protocol = if recipe.src.is_ipv4() { 1 } else { 58 };
    FlowKey::of(&ip_packet(&recipe, protocol, &[kind, 0, 0, 0, a, b, 0, 1, 9, 9])).unwrap()
}

#[test]
fn icmp_queries() {
    let request = echo("10.0.0.5", "1.2.3.4", 8, 700);
    assert_eq!(request, key("icmp 10.0.0.5 > 1.2.3.4 id 700"));
    assert_eq!((request.src_port, request.dst_port), (0, 700), "1.2.3.4 is lower");
    assert_eq!(echo("1.2.3.4", "10.0.0.5", 0, 700), request.reversed());
    for (request, reply) in [(8, 0), (13, 14), (15, 16), (17, 18), (42, 43)] {
        let there = echo("1.1.1.1", "2.2.2.2", request, 5);
        assert_eq!(echo("2.2.2.2", "1.1.1.1", reply, 5), there.reversed());
        assert_eq!((there.src_port, there.dst_port), (5, 0));
        let oneself = echo("3.3.3.3", "3.3.3.3", request, 5);
        assert_eq!(echo("3.3.3.3", "3.3.3.3", reply, 5), oneself.reversed());
        assert_eq!((oneself.src_port, oneself.dst_port), (5, 0));
    }
    for (request, reply) in [(128, 129), (160, 161)] {
        let there = echo("2001:db8::1", "2001:db8::2", request, 5);
        assert_eq!(there, key("icmpv6 2001:db8::1 > 2001:db8::2 id 5"));
        assert_eq!(echo("2001:db8::2", "2001:db8::1", reply, 5), there.reversed());
    }
    assert_eq!(echo("fe80::1", "ff02::1", 135, 5), key("icmpv6 fe80::1 > ff02::1"), "neighbor solicitation");
    let short = ip_packet(&Recipe::udp(V4, Vec::new()), 1, &[8, 0, 0, 0, 1]);
    assert_eq!(FlowKey::of(&short), Ok(key("icmp 10.0.0.5 > 1.2.3.4")));
    let empty = ip_packet(&Recipe::udp(V4, Vec::new()), 1, &[]);
    assert_eq!(FlowKey::of(&empty), Ok(key("icmp 10.0.0.5 > 1.2.3.4")));
}

fn error(from: &str, to: &str, kind: u8, quote: &[u8]) -> Vec<u8> {
    let recipe = Recipe::udp((from, to), Vec::new());
    let protocol = if recipe.src.is_ipv4() { 1 } else { 58 };
    ip_packet(&recipe, protocol, &[&[kind, 0, 0, 0, 0, 0, 0, 0], quote].concat())
}

#[test]
fn icmp_errors_belong_to_the_flow_they_are_about() {
    for (addresses, router, kinds, headers) in
        [(V4, "9.9.9.9", vec![3u8, 4, 5, 11, 12], 20), (V6, "2001:db8:9::9", vec![1, 2, 3, 4], 40)]
    {
        for recipe in [Recipe::tcp(addresses, payload(99)), Recipe::udp(addresses, payload(99))] {
            let quote = recipe.build();
            let reply = FlowKey::of(&swapped(&recipe).build()).unwrap();
            for kind in &kinds {
                for bytes in [headers + 8, headers + 20, quote.len()] {
                    let packet = error(router, addresses.0, *kind, &quote[..bytes]);
                    assert_eq!(FlowKey::of(&packet), Ok(reply), "type {kind}, quote of {bytes}");
                }
            }
        }
        let quote = Recipe::udp(addresses, payload(9)).build();
        let unreadable = FlowKey::of(&error(router, addresses.0, kinds[0], &quote[..headers - 1])).unwrap();
        assert_eq!((unreadable.src.to_string(), unreadable.src_port), (router.to_string(), 0));
    }
}

#[test]
fn icmp_errors_about_pings_and_fragments_and_errors() {
    let ping = |id: u8| ip_packet(&Recipe::udp(V4, Vec::new()), 1, &[8, 0, 0, 0, 0, id, 0, 1, 9, 9]);
    let there = echo("10.0.0.5", "1.2.3.4", 8, 7);
    assert_eq!(FlowKey::of(&error("9.9.9.9", "10.0.0.5", 11, &ping(7))), Ok(there.reversed()));

    let mut fragment = Recipe::udp(V4, payload(64)).build();
    fragment[6] = 0x20;
    assert_eq!(FlowKey::of(&error("9.9.9.9", "10.0.0.5", 11, &fragment)), Ok(key("udp 1.2.3.4 > 10.0.0.5")));

    // Nested errors do not recurse, however deep.
    let mut nested = ping(7);
    for _ in 0..20 {
        nested = error("9.9.9.9", "8.8.8.8", 3, &nested);
    }
    assert_eq!(FlowKey::of(&nested), Ok(key("icmp 8.8.8.8 > 9.9.9.9")));

    let six_in_four = error("9.9.9.9", "10.0.0.5", 3, &Recipe::udp(V6, payload(9)).build());
    assert_eq!(
        FlowKey::of(&six_in_four),
        Ok(key("icmp 9.9.9.9 > 10.0.0.5")),
        "an error quotes its own version"
    );
}

#[test]
fn texts() {
    for (text, shown) in [
        ("tcp 10.0.0.5:1234 > 1.2.3.4:443", None),
        ("udp [2001:db8::1]:53 > [::1]:9", None),
        ("icmp 1.2.3.4 > 10.0.0.5 id 7", None),
        ("icmp 10.0.0.5 > 1.2.3.4 id 7", None),
        ("icmp 1.2.3.4:7 > 1.2.3.4:0", None),
        ("icmpv6 2001:db8::1 > 2001:db8::2", None),
        ("esp 2001:db8::1 > 2001:db8::2", None),
        ("253 10.0.0.5 > 1.2.3.4", None),
        ("  TCP   10.0.0.5:1>1.2.3.4:2  ", Some("tcp 10.0.0.5:1 > 1.2.3.4:2")),
        ("6 [2001:db8::1] > 2001:db8::2", Some("tcp 2001:db8::1 > 2001:db8::2")),
        ("udp 10.0.0.5 > 1.2.3.4:53", Some("udp 10.0.0.5:0 > 1.2.3.4:53")),
        ("icmp 1.2.3.4 > 10.0.0.5 id 0", Some("icmp 1.2.3.4 > 10.0.0.5")),
    ] {
        assert_eq!(key(text).to_string(), shown.unwrap_or(text));
    }
    use FlowKeyError::{Address, Form, Id, MixedVersions, Protocol};
    for (text, error) in [
        ("", Form),
        (">", Form),
        ("tcp 10.0.0.5:1234", Form),
        ("tcp > 1.2.3.4:443", Form),
        ("10.0.0.5:1234 > 1.2.3.4:443", Form),
        ("tcp 10.0.0.5:1234 > ", Form),
        ("tcp a b > c", Form),
        ("tcp 10.0.0.5:1 > 1.2.3.4:4 x", Form),
        ("icmp 10.0.0.5 > 1.2.3.4 id 7 8", Form),
        ("tcpx 10.0.0.5:1 > 1.2.3.4:4", Protocol),
        ("256 10.0.0.5:1 > 1.2.3.4:4", Protocol),
        ("tcp 10.0.0.256:1 > 1.2.3.4:4", Address),
        ("tcp 10.0.0.5:65536 > 1.2.3.4:4", Address),
        ("tcp [10.0.0.5] > 1.2.3.4:4", Address),
        ("tcp 10.0.0.5:1 > host:4", Address),
        ("tcp 10.0.0.5:1 > [::1]:4", MixedVersions),
        ("icmp 10.0.0.5 > 1.2.3.4 id 65536", Id),
        ("icmp 10.0.0.5:1 > 1.2.3.4 id 5", Id),
        ("icmp 1.2.3.4 > 1.2.3.4 id 5", Id),
        ("tcp 10.0.0.5 > 1.2.3.4 id 5", Id),
    ] {
        assert_eq!(text.parse::<FlowKey>(), Err(error), "{text:?}");
        assert!(!error.to_string().is_empty());
    }
}

/// Keys with addresses that are often equal or neighbors, so that every case of ordering occurs.
fn any_key() -> impl Strategy<Value = FlowKey> {
    let port = prop_oneof![Just(0), any::<u16>()];
    let protocol = prop_oneof![Just(1), Just(6), Just(17), Just(58), any::<u8>()];
    (any::<bool>(), 0u8..3, 0u8..3, port.clone(), port, protocol).prop_map(
        |(six, src, dst, src_port, dst_port, protocol)| {
            let address = |last: u8| {
                if six {
                    IpAddr::from([0x20, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last])
                } else {
                    IpAddr::from([10, 0, 0, last])
                }
            };
            FlowKey { src: address(src), dst: address(dst), src_port, dst_port, protocol }
        },
    )
}

proptest! {
    #[test]
    fn display_reads_back(key in any_key()) {
        prop_assert_eq!(key.to_string().parse(), Ok(key));
        prop_assert_eq!(key.reversed().reversed(), key);
    }

    #[test]
    fn any_text(text: String) {
        let _ = text.parse::<FlowKey>();
    }

    #[test]
    fn the_reply_has_the_reversed_key(key in any_key(), tcp: bool, six: bool) {
        let addresses = if six { V6 } else { V4 };
        let base = if tcp { Recipe::tcp(addresses, payload(8)) } else { Recipe::udp(addresses, payload(8)) };
        let recipe = Recipe { src: key.src, dst: key.dst, ports: (key.src_port, key.dst_port), ..base };
        let there = FlowKey::of(&recipe.build()).unwrap();
        prop_assert_eq!(there, FlowKey { protocol: recipe.protocol(), ..key });
        prop_assert_eq!(FlowKey::of(&swapped(&recipe).build()), Ok(there.reversed()));
    }

    /// The short way says what the long way says, or nothing, whatever a few bytes of a packet are changed
    /// to.
    #[test]
    fn both_ways_agree(
        recipe in any_recipe(30),
        noise in prop::collection::vec((0usize..60, any::<u8>()), 0..4),
        cut in 0usize..200,
    ) {
        let mut packet = recipe.build();
        for (at, value) in noise {
            if let Some(byte) = packet.get_mut(at) {
                *byte = value;
            }
        }
        packet.truncate(cut);
        let long = IpHeader::parse(&packet).map(|header| FlowKey::of_parsed(&header, &packet));
        prop_assert_eq!(FlowKey::of(&packet), long);
    }

    #[test]
    fn any_icmp(upper in prop::collection::vec(any::<u8>(), 0..120), six: bool) {
        let recipe = Recipe::udp(if six { V6 } else { V4 }, Vec::new());
        let packet = ip_packet(&recipe, if six { 58 } else { 1 }, &upper);
        prop_assert!(FlowKey::of(&packet).is_ok());
    }

    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
        prop_assert_eq!(FlowKey::of(&bytes).is_ok(), IpHeader::parse(&bytes).is_ok());
    }
}
