#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::rewrite::testing::{Sum, ip, key, packet, summed};
use proptest::prelude::*;

const V4: &str = "tcp 10.0.0.5:1234 > 203.0.113.80:443";
const V6: &str = "tcp [2001:db8::5]:1234 > [2001:db8:80::1]:443";

fn tcp(key: &FlowKey, flags: u8, seq: u32, ack: u32, options: &[u8], payload: &[u8], how: Sum) -> Vec<u8> {
    let mut tcp = vec![0; 20];
    put_u16(&mut tcp, 0, key.src_port);
    put_u16(&mut tcp, 2, key.dst_port);
    put_u32(&mut tcp, 4, seq);
    put_u32(&mut tcp, 8, ack);
    tcp[12] = (5 + options.len() as u8 / 4) << 4;
    tcp[13] = flags;
    tcp.extend(options);
    tcp.extend(payload);
    ip(key, (0, &[]), &summed(key.src, key.dst, 6, tcp, how))
}

#[test]
fn headers_have_the_bytes_of_the_specification() {
    let header = Header::of(&key(V4)).unwrap();
    let signature = [0x0d, 0x0a, 0x0d, 0x0a, 0x00, 0x0d, 0x0a, 0x51, 0x55, 0x49, 0x54, 0x0a];
    let expected =
        [&signature[..], &[0x21, 0x11, 0, 12], &[10, 0, 0, 5, 203, 0, 113, 80, 0x04, 0xd2, 0x01, 0xbb]]
            .concat();
    assert_eq!(header.bytes(), expected);
    let header = Header::of(&key(V6)).unwrap();
    assert_eq!(header.bytes()[..16], [&signature[..], &[0x21, 0x21, 0, 36]].concat());
    assert_eq!(header.bytes().len(), HEADER_BYTES_MAX);
    assert_eq!(header.bytes()[16..20], [0x20, 1, 0x0d, 0xb8]);
    assert_eq!(header.bytes()[47..], [1, 0x04, 0xd2, 0x01, 0xbb]);
    assert_eq!(Header::of(&key("udp 10.0.0.5:1 > 10.0.0.6:2")).unwrap().bytes()[13], 0x12);
    assert_eq!(Header::of(&key("icmp 10.0.0.5 > 10.0.0.6 id 3")), None);
}

#[test]
fn the_header_stands_in_front_of_the_payload() {
    for text in [V4, V6] {
        let key = key(text);
        let proxy = Header::of(&key).unwrap();
        for how in [Sum::Full, Sum::Partial] {
            for payload in [&b""[..], b"odd", b"GET / HTTP/1.1\r\n"] {
                let options = [1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2];
                let before = tcp(&key, PSH_ACK, 101, 501, &options, payload, how);
                let header = IpHeader::parse(&before).unwrap();
                let mut out = [0; 200];
                let bytes = insert(&before, &header, how == Sum::Partial, &proxy, &mut out).unwrap();
                let whole = [proxy.bytes(), payload].concat();
                assert_eq!(out[..bytes], tcp(&key, PSH_ACK, 101, 501, &options, &whole, how));
                let mut short = vec![0; bytes - 1];
                assert_eq!(insert(&before, &header, false, &proxy, &mut short), Err(DropReason::TooBig));
            }
        }
        let mut out = vec![0; 70_000];
        let long = tcp(&key, PSH_ACK, 101, 501, &[], &vec![7; 65_480], Sum::Full);
        let header = IpHeader::parse(&long).unwrap();
        let fits = key.src.is_ipv6() && 65_480 + 20 + 52 <= 65_535;
        assert_eq!(
            insert(&long, &header, false, &proxy, &mut out).is_ok(),
            fits || 65_480 + 40 + 28 <= 65_535
        );
        for (flags, reason) in [(0x02, DropReason::NatUnsupported), (0x03, DropReason::TcpInvalid)] {
            let segment = tcp(&key, flags, 100, 0, &[], b"fast open", Sum::Full);
            let header = IpHeader::parse(&segment).unwrap();
            assert_eq!(insert(&segment, &header, false, &proxy, &mut out), Err(reason));
        }
    }
    let udp = packet(&key("udp 10.0.0.5:1 > 10.0.0.6:2"), (0, &[]), b"x", Sum::Full);
    let header = IpHeader::parse(&udp).unwrap();
    let proxy = Header::of(&key(V4)).unwrap();
    assert_eq!(insert(&udp, &header, false, &proxy, &mut [0; 200]), Err(DropReason::TcpInvalid));
}

const PSH_ACK: u8 = 0x18;
const ACK_ONLY: u8 = 0x10;

/// One flow, both ends' numbers.
struct Talk {
    key: FlowKey,
    shift: Shift,
}

impl Talk {
    fn new(syn: u32) -> Talk {
        Talk { key: key(V4), shift: Shift::new(syn, false) }
    }

    /// Sequence number and length of payload that the server gets.
    fn client(&mut self, flags: u8, seq: u32, payload: &[u8]) -> (u32, Vec<u8>) {
        let mut bytes = tcp(&self.key, flags, seq, 501, &[], payload, Sum::Full);
        let header = IpHeader::parse(&bytes).unwrap();
        if self.shift.needs_header(&Segment::of(&bytes[20..]).unwrap()) {
            let mut out = [0; 2_000];
            let proxy = Header::of(&self.key).unwrap();
            let length = insert(&bytes, &header, false, &proxy, &mut out).unwrap();
            bytes = out[..length].to_vec();
        } else {
            shift(&mut bytes, &header, false, Direction::Original, &mut self.shift).unwrap();
        }
        assert!(checksum::verify_packet(&bytes) && checksum::verify_ipv4_header(&bytes[..20]));
        let segment = Segment::of(&bytes[20..]).unwrap();
        (segment.seq, bytes[bytes.len() - segment.payload_bytes as usize..].to_vec())
    }

    /// Acknowledgment and SACK blocks that the client gets for those of a server; `pad` bytes in front of the option.
    fn server(&mut self, flags: u8, ack: u32, blocks: &[u32], pad: usize) -> (u32, Vec<u32>) {
        let mut options = vec![1; pad];
        if !blocks.is_empty() {
            options.extend([5, 2 + 4 * blocks.len() as u8]);
            options.extend(blocks.iter().flat_map(|edge| edge.to_be_bytes()));
        }
        options.resize(options.len().next_multiple_of(4), 0);
        for how in [Sum::Partial, Sum::Full] {
            let reply = self.key.reversed();
            let mut bytes = tcp(&reply, flags, 501, ack, &options, b"abc", how);
            let header = IpHeader::parse(&bytes).unwrap();
            let sum = bytes[36..38].to_vec();
            let mut copy = self.shift;
            shift(&mut bytes, &header, how == Sum::Partial, Direction::Reply, &mut copy).unwrap();
            if how == Sum::Partial {
                assert_eq!(bytes[36..38], sum);
                continue;
            }
            self.shift = copy;
            assert!(checksum::verify_packet(&bytes));
            let words = bytes[40 + pad..].get(2..2 + 4 * blocks.len()).unwrap_or_default();
            let edges = words.chunks(4).map(|word| u32::from_be_bytes(word.try_into().unwrap())).collect();
            return (Segment::of(&bytes[20..]).unwrap().ack, edges);
        }
        unreachable!("the loop returns")
    }
}

fn with_header(payload: &[u8]) -> Vec<u8> {
    [Header::of(&key(V4)).unwrap().bytes(), payload].concat()
}

#[test]
fn a_connection_is_shifted_from_beginning_to_end() {
    for syn in [100, u32::MAX, u32::MAX - 20, 0x7fff_fff0] {
        let mut talk = Talk::new(syn);
        let at = |offset: u32| syn.wrapping_add(1).wrapping_add(offset);
        assert_eq!(talk.client(0x02, syn, b""), (syn, vec![]));
        assert_eq!(talk.server(0x12, at(0), &[], 0).0, at(0));
        // The handshake's last ACK carries the header; both are lost, and the client repeats itself.
        assert_eq!(talk.client(ACK_ONLY, at(0), b""), (at(0), with_header(b"")));
        assert_eq!(talk.client(PSH_ACK, at(0), b"hello"), (at(0), with_header(b"hello")));
        assert_eq!(talk.client(PSH_ACK, at(5), b"world"), (at(33), b"world".to_vec()));
        // The second segment came, the first did not.
        assert_eq!(talk.server(ACK_ONLY, at(0), &[at(33), at(38)], 2), (at(0), vec![at(5), at(10)]));
        assert_eq!(talk.client(PSH_ACK, at(0), b"hello"), (at(0), with_header(b"hello")));
        // A part of the header, then all of it, then everything.
        assert_eq!(talk.server(ACK_ONLY, at(20), &[], 0).0, at(0));
        assert!(!talk.shift.is_acknowledged());
        assert_eq!(talk.client(PSH_ACK, at(0), b"hello"), (at(0), with_header(b"hello")));
        assert_eq!(talk.server(ACK_ONLY, at(28), &[], 0).0, at(0));
        assert!(talk.shift.is_acknowledged());
        assert_eq!(talk.client(PSH_ACK, at(0), b"hello"), (at(28), b"hello".to_vec()));
        assert_eq!(
            talk.server(ACK_ONLY, at(38), &[at(0), at(28)], 1),
            (at(10), vec![at(0).wrapping_sub(28), at(0)])
        );
        // Keepalive, data, FIN, RST.
        assert_eq!(talk.client(ACK_ONLY, at(9), b"").0, at(37));
        assert_eq!(talk.client(0x11, at(10), b"").0, at(38));
        assert_eq!(talk.server(0x11, at(39), &[], 0).0, at(11));
        assert_eq!(talk.client(0x04, at(11), b"").0, at(39));
    }
}

#[test]
fn numbers_go_around_many_times() {
    let mut talk = Talk::new(100);
    talk.client(ACK_ONLY, 101, b"");
    assert_eq!(talk.server(ACK_ONLY, 129, &[], 0).0, 101);
    let mut seq = 101u32;
    for _ in 0..400 {
        assert_eq!(talk.client(PSH_ACK, seq, b"x"), (seq.wrapping_add(28), b"x".to_vec()));
        seq = seq.wrapping_add(33_333_333);
        assert_eq!(talk.server(ACK_ONLY, seq.wrapping_add(28), &[], 0).0, seq);
    }
    // Right where the header once was, 4 GB later.
    for offset in 0..60 {
        assert_eq!(talk.server(ACK_ONLY, 101 + offset, &[], 0).0, 73 + offset);
    }
}

#[test]
fn only_a_syn_starts_it() {
    let segment = |flags| Segment::of(&tcp(&key(V4), flags, 100, 0, &[], b"", Sum::Full)[20..]).unwrap();
    assert_eq!(syn_of(&segment(0x02)), Some(100));
    assert_eq!(syn_of(&segment(0x12)), None);
    assert_eq!(syn_of(&segment(0x10)), None);
    assert!(!Shift::new(99, false).needs_header(&segment(0x04)));
    assert!(Shift::new(99, true).needs_header(&segment(0x11)));
}

proptest! {
    /// Every edge of every block moves by the same, whatever stands in front of the option.
    #[test]
    fn checksums_follow_blocks_anywhere(
        blocks in prop::collection::vec(any::<u32>(), 1..4).prop_map(|edges| {
            edges.iter().flat_map(|edge| [*edge, edge.wrapping_add(1_000)]).collect::<Vec<u32>>()
        }),
        pad in 0usize..5,
        ack: u32,
    ) {
        let mut talk = Talk::new(100);
        talk.shift.acknowledged = true;
        let (moved, edges) = talk.server(ACK_ONLY, ack, &blocks, pad);
        prop_assert_eq!(moved, ack.wrapping_sub(28));
        prop_assert_eq!(edges, blocks.iter().map(|edge| edge.wrapping_sub(28)).collect::<Vec<_>>());
    }

    #[test]
    fn nothing_makes_it_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..60),
        original: bool,
    ) {
        let mut bytes = ip(&key(V4), (0, &[]), &bytes);
        let header = IpHeader::parse(&bytes).unwrap();
        let mut state = Shift::new(7, false);
        let direction = if original { Direction::Original } else { Direction::Reply };
        let _ = insert(&bytes, &header, false, &Header::of(&key(V4)).unwrap(), &mut [0; 200]);
        let _ = shift(&mut bytes, &header, false, direction, &mut state);
    }
}
