//! Ethernet frames between two nodes (row T14).
#![allow(clippy::unwrap_used, reason = "tests")]

mod pair;

use packet::DropReason;
use packet::attachment::BondId;
use packet::vnet::{GSO_TCPV4, NEEDS_CSUM, VirtioNetHeader};
use pair::{Pair, Side};
use tunnel::frame::PacketHead;

/// A frame behind its hops: from and to a station, with a tag, an EtherType without meaning, and so many bytes in all.
fn body(bytes: usize) -> Vec<u8> {
    let mut body = vec![8];
    body.extend([2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x81, 0, 0, 5, 0x88, 0xb6]);
    body.extend((body.len()..bytes).map(|at| at as u8));
    body
}

fn send(side: &mut Side, pair_now: tunnel::time::Time, to: u16, offload: VirtioNetHeader, body: &[u8]) {
    side.cores[0].begin(pair_now);
    side.cores[0].frame(pair_now, BondId(to), &offload, body, &mut side.out);
}

#[test]
fn t14_frames_arrive_as_they_were_small_and_jumbo() {
    let mut pair = Pair::told([1, 1], [true; 2]);
    assert!(pair.is_joined());
    let sizes = [61, 700, 1_519, 3_000, 9_023];
    for bytes in sizes {
        send(&mut pair.dialer, pair.now, 2, VirtioNetHeader::default(), &body(bytes));
        pair.run_ms(20);
    }
    let arrived: Vec<Vec<u8>> = std::mem::take(&mut pair.listener.out.delivered);
    assert_eq!(arrived, sizes.map(body));
    assert!(pair.listener.out.how.iter().all(|how| how.ethernet && !how.partial));
    // Packets of the same peer are what they were.
    pair.dialer.send(pair.now, 2, 500, 7);
    pair.run_ms(20);
    assert_eq!(pair.listener.out.delivered.len(), 1);
    assert!(!pair.listener.out.how[sizes.len()].ethernet);
}

#[test]
fn t14_a_super_frame_becomes_frames() {
    let mut pair = Pair::told([1, 1], [true; 2]);
    let mut frame = vec![8, 2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
    let ip_bytes = 40 + 3_000_usize;
    frame.extend([
        0x45,
        0,
        (ip_bytes >> 8) as u8,
        ip_bytes as u8,
        0,
        0,
        0,
        0,
        64,
        6,
        0,
        0,
        10,
        0,
        0,
        1,
        10,
        0,
        0,
        2,
    ]);
    frame.extend([0, 80, 0, 81, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    frame.resize(15 + ip_bytes, 0xab);
    let offload = VirtioNetHeader {
        flags: NEEDS_CSUM,
        gso_type: GSO_TCPV4,
        gso_size: 1_000,
        hdr_len: 55,
        csum_start: 35,
        csum_offset: 16,
    };
    send(&mut pair.dialer, pair.now, 2, offload, &frame);
    pair.run_ms(20);
    let arrived = &pair.listener.out.delivered;
    assert_eq!(arrived.iter().map(Vec::len).collect::<Vec<_>>(), [1_055; 3]);
    assert!(pair.listener.out.how.iter().all(|how| how.ethernet && how.partial));
    for (at, segment) in arrived.iter().enumerate() {
        assert_eq!(segment[..15], frame[..15]);
        assert_eq!(u32::from_be_bytes(segment[39..43].try_into().unwrap()), at as u32 * 1_000);
    }
}

/// A peer that was not told to, and still sends them: counted, and packets behind them in the datagram stand.
#[test]
fn t14_frames_of_a_peer_that_may_not_send_them_are_dropped() {
    let mut pair = Pair::told([1, 1], [false; 2]);
    assert!(pair.is_joined());
    let frame = body(80);
    let mut frames = vec![0; 8 + frame.len()];
    let head = PacketHead { ethernet: true, bytes: Some(frame.len() as u16), ..PacketHead::default() };
    let at = head.write(&mut frames, 0).unwrap();
    frames[at..at + frame.len()].copy_from_slice(&frame);
    frames.truncate(at + frame.len());
    let packet = pair::udp(1, 2, 60, 7);
    let head = PacketHead { bytes: Some(60), ..PacketHead::default() };
    let mut plain = vec![0; 4];
    assert_eq!(head.write(&mut plain, 0), Some(4));
    pair.dialer.say(pair.now, 0, 0, [frames, plain, packet.clone()].concat());
    pair.deliver();
    assert_eq!(pair.listener.drops(DropReason::EthernetNotAllowed), 1);
    assert_eq!(pair.listener.out.delivered, [packet]);
    send(&mut pair.dialer, pair.now, 2, VirtioNetHeader::default(), &frame);
    assert_eq!(pair.dialer.drops(DropReason::EthernetNotAllowed), 1);
}

/// Row T14: only one side wants them: no session, and both say why.
#[test]
fn t14_a_side_that_carries_none_is_refused_on_both_sides() {
    for (ethernet, here, there) in [
        ([true, false], "it carries no", "it carries Ethernet"),
        ([false, true], "it carries Ethernet", "it carries no"),
    ] {
        let pair = Pair::told([1, 1], ethernet);
        assert!(!pair.is_joined());
        for (side, text) in [(&pair.dialer, here), (&pair.listener, there)] {
            let bonds = side.node.bonds.load_full();
            let refused = bonds.get(0).unwrap().refused.load_full().unwrap();
            assert!(refused.to_string().starts_with(text), "{refused}");
            assert!(side.drops(DropReason::HandshakeEthernet) > 0);
        }
    }
}
