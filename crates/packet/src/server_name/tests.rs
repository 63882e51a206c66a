#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::quic::initial::tests::sealed;
use crate::quic::tests::bytes;
use crate::testing::{self, ACK, Recipe, SYN, client_hello, records};

fn name(text: &str) -> ServerName {
    ServerName::new(text.as_bytes()).unwrap()
}

/// Looks at TCP segments by offset; the name, and after how many of them.
fn over_tcp(start: u32, segments: &[(usize, &[u8])]) -> (Option<ServerName>, bool) {
    let mut search = None;
    for (at, bytes) in segments {
        let sequence = start.wrapping_add(*at as u32);
        let found = look(&mut search, Payload::Tcp { sequence, is_syn: false, bytes });
        if found.is_some() {
            assert!(search.is_none());
            return (found, false);
        }
    }
    (None, search.is_some())
}

#[test]
fn a_hello_may_take_several_segments_in_any_order_after_the_first() {
    let stream = records(&client_hello(Some("example.org"), 2_000), 16_000);
    let (a, b, c) = (&stream[..700], &stream[700..1_400], &stream[1_400..]);
    let found = (Some(name("example.org")), false);
    // Across the end of the sequence numbers, repeated, and the other way round.
    for start in [7, u32::MAX - 1_000] {
        assert_eq!(over_tcp(start, &[(0, &stream)]), found);
        assert_eq!(over_tcp(start, &[(0, a), (700, b), (1_400, c)]), found);
        assert_eq!(over_tcp(start, &[(0, a), (1_400, c), (0, a), (700, b)]), found);
    }
    assert_eq!(over_tcp(7, &[(0, a), (1_400, c)]), (None, true), "a part is missing");
    // Of a flow whose beginning was not seen nothing is kept; neither is of anything else.
    assert_eq!(over_tcp(7, &[(700, b), (1_400, c)]), (None, false));
    assert_eq!(over_tcp(7, &[(0, b"GET / HTTP/1.1\r\n\r\n")]), (None, false));
    assert_eq!(over_tcp(7, &[(0, b"")]), (None, false));
}

#[test]
fn what_is_collected_has_a_limit() {
    // The name would stand behind it.
    let stream = records(&client_hello(Some("example.org"), 6_000), 16_000);
    let pieces: Vec<_> = stream.chunks(1_000).enumerate().map(|(n, bytes)| (n * 1_000, bytes)).collect();
    assert_eq!(over_tcp(7, &pieces), (None, false));
    let first = (0, &stream[..100]);
    assert_eq!(over_tcp(7, &[first; PIECES_MAX as usize - 1]), (None, true));
    assert_eq!(over_tcp(7, &[first; PIECES_MAX as usize]), (None, false), "it does not go on");
}

/// An Initial of 1,200 bytes of a version with CRYPTO frames.
fn initial(version: u32, number: u32, pieces: &[(usize, &[u8])]) -> Vec<u8> {
    let mut frames = vec![1];
    for (at, bytes) in pieces {
        frames.push(6);
        for number in [*at, bytes.len()] {
            frames.extend((number as u16 | 0x4000).to_be_bytes());
        }
        frames.extend(*bytes);
        frames.push(0);
    }
    frames.resize(1_162, 0);
    let first = if version == 1 { 0xc3 } else { 0xd3 };
    let clear =
        [&[first], &version.to_be_bytes()[..], &bytes("088394c8f03e5157080000449e"), &number.to_be_bytes()];
    sealed(&clear.concat(), &frames)
}

#[test]
fn a_hello_may_take_several_initials_with_their_frames_in_any_order() {
    let message = client_hello(Some("video.example"), 1_300);
    let part = |from: usize, to: usize| (from, &message[from..to]);
    let end = message.len();
    for version in [1, 0x6b33_43cf] {
        let first = initial(version, 0, &[part(900, 1_000), part(0, 300), part(301, 900)]);
        let second = initial(version, 1, &[part(1_000, end), part(300, 301)]);
        let mut search = None;
        fn udp(bytes: &[u8]) -> Payload<'_> {
            Payload::Udp { stride: 1_200, bytes }
        }
        // The second one overtakes the first.
        assert_eq!(look(&mut search, udp(&second)), None);
        assert_eq!(look(&mut search, udp(&second)), None);
        assert_eq!(look(&mut search, udp(&first)), Some(name("video.example")));
        assert!(search.is_none());
        // Both in one super-packet.
        assert_eq!(look(&mut search, udp(&[first, second].concat())), Some(name("video.example")));
    }
}

#[test]
fn datagrams_that_only_look_like_initials_are_left_alone() {
    let mut initial = initial(1, 0, &[(0, &client_hello(Some("video.example"), 0))]);
    initial[700] ^= 1;
    let mut search = None;
    assert_eq!(look(&mut search, Payload::Udp { stride: 1_200, bytes: &initial }), None);
    assert!(search.is_none(), "nothing is kept of what cannot be opened");
    assert_eq!(look(&mut search, Payload::Udp { stride: 0, bytes: &[0xc0; 1_300] }), None);
}

#[test]
fn payloads_of_packets() {
    let tcp = Recipe::tcp(testing::V4, b"hello".to_vec()).flags(SYN | ACK).options(&[]).build();
    let payload = |packet: &[u8]| {
        let header = IpHeader::parse(packet).unwrap();
        Payload::of_packet(&header, packet, 0).map(|payload| match payload {
            Payload::Tcp { sequence, is_syn, bytes } => (sequence, is_syn, bytes.to_vec()),
            Payload::Udp { stride, bytes } => (stride as u32, false, bytes.to_vec()),
        })
    };
    // A SYN has the number in front of its first byte (RFC 9293 §3.4).
    let sequence = u32_at(&tcp, 24).unwrap();
    assert_eq!(payload(&tcp), Some((sequence + 1, true, b"hello".to_vec())));
    let mut later = tcp.clone();
    later[33] = 0x10;
    assert_eq!(payload(&later), Some((sequence, false, b"hello".to_vec())));
    later[32] = 0xf0;
    assert_eq!(payload(&later), None, "a header longer than the packet");
    let mut fragment = tcp;
    fragment[6] = 0x20;
    assert_eq!(payload(&fragment), None);
}

#[test]
fn patterns_and_names() {
    let matches = |pattern: &str, text: &str| NamePattern::new(pattern).unwrap().matches(&name(text));
    assert!(matches("example.org", "Example.ORG."));
    assert!(!matches("example.org", "www.example.org"));
    assert!(matches("*.Zoom.us", "us02web.zoom.us") && matches("*.zoom.us", "a.b.zoom.us"));
    assert!(!matches("*.zoom.us", "zoom.us") && !matches("*.zoom.us", "notzoom.us"));
    for bad in ["*", "*.", "a.*.org", "https://a.org", "a.org:443", "10.0.0.1", "a..b", "ü.org"] {
        assert_eq!(NamePattern::new(bad), None, "{bad}");
    }
    assert_eq!(ServerName::new(&[b'a'; 254]), None);
}
