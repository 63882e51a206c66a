#![allow(clippy::unwrap_used, reason = "tests")]
use std::net::Ipv4Addr;

use proptest::prelude::*;

use super::*;
use crate::encapsulation::{Encapsulation, Handoff};

const HEAD: usize = L1_BYTES + FRAGMENT_HEAD_BYTES;

fn sender(number: u8) -> IpAddr {
    Ipv4Addr::new(192, 0, 2, number).into()
}

/// A datagram whose frame has `bytes` bytes that are told apart by their places.
fn whole(bytes: usize) -> Vec<u8> {
    let encapsulation = Encapsulation {
        target: 7,
        handoff: Handoff::Punt,
        ttl: 4,
        vlan: Some(5),
        ..Encapsulation::default()
    };
    let mut datagram = vec![0; encapsulation.bytes()];
    encapsulation.write(&mut datagram);
    datagram.extend((0..bytes).map(|place| (place as u8).wrapping_mul(29) ^ (place >> 8) as u8));
    datagram
}

fn split(datagram: &[u8], id: u32, payload_bytes_max: usize) -> Vec<Vec<u8>> {
    let split = Split::new(datagram, id, payload_bytes_max).unwrap();
    let write = |index| {
        let mut room = vec![0; payload_bytes_max];
        let bytes = split.write(index, &mut room);
        assert!(bytes > HEAD && split.write(index, &mut room[..bytes - 1]) == 0);
        room.truncate(bytes);
        room
    };
    assert_eq!(split.write(split.fragments(), &mut vec![0; 2_000]), 0);
    (0..split.fragments()).map(write).collect()
}

/// A fragment with any place.
fn piece(id: u32, from: u16, bytes: u16, total: u16) -> Vec<u8> {
    let mut datagram = vec![0; HEAD + usize::from(bytes)];
    L1 { target: 7, dispatcher: 1, vlan: None, fragment: true }.write(&mut datagram);
    put_u32(&mut datagram, 6, id);
    put_u16(&mut datagram, 10, from);
    put_u16(&mut datagram, 12, total);
    datagram
}

fn reassembler() -> Reassembler {
    let limits = ReassemblyLimits {
        frames_max: 4,
        bytes_max: 10_000,
        frames_per_sender_max: 2,
        bytes_per_sender_max: 4_000,
        timeout_ns: 100,
    };
    Reassembler::new(limits)
}

#[test]
fn two_datagrams_have_what_the_text_says() {
    let datagram = whole(1_500);
    let fragments = split(&datagram, 9, 1_472);
    assert_eq!(fragments.len(), 2);
    for fragment in &fragments {
        assert!(is_fragment(fragment) && !is_fragment(&datagram));
        assert_eq!((fragment[0], &fragment[1..6]), (datagram[0] | 0x20, &datagram[1..6]), "L1 is in both");
        assert_eq!(Encapsulation::parse(fragment).err(), Some(DropReason::BusMalformed));
    }
    assert_eq!(fragments[0].len(), 1_472);
    assert_eq!(fragments[0][HEAD..], datagram[L1_BYTES..L1_BYTES + 1_458], "L2 and the first part");
    assert_eq!(fragments[1][HEAD..], datagram[L1_BYTES + 1_458..], "the rest");
    for order in [[0, 1], [1, 0]] {
        let mut reassembler = reassembler();
        let mut push = |index: usize| {
            reassembler.push(0, sender(1), &fragments[order[index]]).unwrap().map(<[u8]>::to_vec)
        };
        assert_eq!(push(0), None);
        assert_eq!(push(1), Some(datagram.clone()));
        assert_eq!((reassembler.frames(), reassembler.bytes(), reassembler.stats().completed), (0, 0, 1));
    }
}

#[test]
fn what_is_not_worth_splitting_is_refused() {
    let datagram = whole(9_000);
    assert!(Split::new(&datagram, 1, HEAD + FRAGMENT_BYTES_MIN - 1).is_none(), "too small");
    assert!(Split::new(&datagram, 1, 500).is_none(), "too many");
    assert!(Split::new(&datagram, 1, 600).is_some());
    let longest = usize::from(TOTAL_BYTES_MAX) - L2_BYTES;
    assert!(Split::new(&whole(longest), 1, 9_000).is_some());
    assert!(Split::new(&whole(longest + 1), 1, 9_000).is_none(), "too long");
    assert!(Split::new(&whole(70_000), 1, 9_000).is_none(), "too long for its fields");
    assert!(Split::new(&datagram[..20], 1, 600).is_none(), "no Ethernet header");
    assert!(Split::new(&split(&datagram, 1, 600)[0], 1, 300).is_none(), "a fragment");
    assert!(Split::new(&[0; 1_000], 1, 600).is_none(), "no L1");
}

#[test]
fn copies_are_dropped_and_contradictions_end_the_frame() {
    let datagram = whole(1_000);
    let fragments = split(&datagram, 1, 600);
    let mut reassembler = reassembler();
    assert_eq!(reassembler.push(0, sender(1), &fragments[0]), Ok(None));
    assert_eq!(reassembler.push(0, sender(1), &fragments[0]), Ok(None));
    assert_eq!((reassembler.stats().copies, reassembler.frames()), (1, 1));
    let mut other = fragments[0].clone();
    *other.last_mut().unwrap() ^= 1;
    assert_eq!(reassembler.push(0, sender(1), &other), Err(DropReason::PieceOverlap));
    assert_eq!((reassembler.frames(), reassembler.bytes()), (0, 0));
    assert_eq!(reassembler.late_drops().get(DropReason::PieceOverlap), 1);
    for (second, reason) in [
        (piece(2, 299, 301, 600), DropReason::PieceOverlap),
        (piece(2, 0, 400, 600), DropReason::PieceOverlap),
        (piece(2, 300, 301, 601), DropReason::BusMalformed),
    ] {
        assert_eq!(reassembler.push(0, sender(1), &piece(2, 0, 300, 600)), Ok(None));
        assert_eq!(reassembler.push(0, sender(1), &second), Err(reason));
        assert_eq!(reassembler.frames(), 0);
    }
    // The later one first, and all of them around one that is there.
    for (first, second) in
        [(piece(2, 300, 300, 600), piece(2, 0, 301, 600)), (piece(2, 300, 256, 900), piece(2, 0, 900, 900))]
    {
        assert_eq!(reassembler.push(0, sender(1), &first), Ok(None));
        assert_eq!(reassembler.push(0, sender(1), &second), Err(DropReason::PieceOverlap));
    }
    let mut retargeted = piece(2, 300, 300, 600);
    retargeted[2] = 1;
    assert_eq!(reassembler.push(0, sender(1), &piece(2, 0, 300, 600)), Ok(None));
    assert_eq!(reassembler.push(0, sender(1), &retargeted), Err(DropReason::BusMalformed));
}

#[test]
fn fragments_that_cannot_be_are_refused() {
    let mut reassembler = reassembler();
    let mut error = |datagram: &[u8]| reassembler.push(0, sender(1), datagram).err();
    let malformed = Some(DropReason::BusMalformed);
    assert_eq!(error(&piece(1, 0, 255, 600)), malformed, "too small");
    assert_eq!(error(&piece(1, 400, 201, 600)), malformed, "behind the end");
    assert_eq!(error(&piece(1, 600, 0, 600)), malformed, "empty");
    assert_eq!(error(&piece(1, u16::MAX, 300, u16::MAX)), malformed, "far behind the end");
    assert_eq!(error(&piece(1, 0, 21, 21)), malformed, "no Ethernet header");
    assert_eq!(error(&piece(1, 0, 300, TOTAL_BYTES_MAX + 1)), malformed, "too long");
    assert_eq!(error(&whole(100)), malformed, "no fragment");
    assert_eq!(error(&piece(1, 0, 300, 600)[..13]), Some(DropReason::BusTooShort));
    assert_eq!(error(&piece(1, 0, 300, 600)[..5]), Some(DropReason::BusTooShort));
    assert_eq!(error(&[0xff; 300]), Some(DropReason::BusVersion));
    assert_eq!(error(&piece(1, 0, 300, 4_000)), Some(DropReason::ReassemblyFull), "more than a sender may");
    assert_eq!((reassembler.frames(), reassembler.bytes()), (0, 0));
    // So many that there is no place to note one more: the last is allowed to be small.
    let mut reassembler = Reassembler::new(ReassemblyLimits::default());
    let mut push = |from: u16| reassembler.push(0, sender(1), &piece(1, from, 256, 16_000)).err();
    assert!((0..16).all(|place| push(place * 300).is_none()));
    assert_eq!(push(16 * 300), Some(DropReason::ReassemblyFull));
    assert_eq!(reassembler.late_drops().get(DropReason::ReassemblyFull), 16);
}

#[test]
fn what_takes_too_long_goes() {
    let mut reassembler = reassembler();
    assert_eq!(reassembler.next_deadline_ns(), None);
    assert_eq!(reassembler.push(50, sender(1), &piece(1, 0, 300, 600)), Ok(None));
    assert_eq!(reassembler.push(60, sender(2), &piece(1, 0, 300, 600)), Ok(None));
    assert_eq!(reassembler.next_deadline_ns(), Some(150));
    reassembler.tick(149);
    assert_eq!(reassembler.frames(), 2);
    reassembler.tick(150);
    assert_eq!((reassembler.frames(), reassembler.next_deadline_ns()), (1, Some(160)));
    let last = piece(1, 300, 300, 600);
    assert_eq!(reassembler.push(160, sender(2), &last), Ok(None), "its first fragment has gone");
    assert_eq!(reassembler.late_drops().get(DropReason::ReassemblyTimeout), 2);
    assert_eq!(reassembler.next_deadline_ns(), Some(260));
}

#[test]
fn buffers_are_used_again() {
    let datagram = whole(1_500);
    let mut reassembler = reassembler();
    let mut places = std::collections::BTreeSet::new();
    for id in 0..100 {
        for fragment in split(&datagram, id, 1_472) {
            if let Some(whole) = reassembler.push(0, sender(1), &fragment).unwrap() {
                places.insert(whole.as_ptr());
            }
        }
    }
    assert_eq!((places.len(), reassembler.stats().completed), (2, 100));
}

#[test]
fn each_sender_has_its_part_and_the_oldest_goes() {
    let mut reassembler = reassembler();
    let mut push = |now_ns, number, id, from, total| {
        let bytes = if from == 0 { 300 } else { total - from };
        let result = reassembler.push(now_ns, sender(number), &piece(id, from, bytes, total));
        let is_whole = result.unwrap().is_some();
        (is_whole, reassembler.frames())
    };
    assert_eq!(push(0, 1, 1, 0, 600), (false, 1));
    assert_eq!(push(1, 2, 1, 0, 600), (false, 2));
    assert_eq!(push(2, 2, 2, 0, 600), (false, 3));
    // A third of one sender: its own oldest goes, not the other's older one.
    assert_eq!(push(3, 2, 3, 0, 600), (false, 3));
    assert_eq!(push(4, 1, 1, 300, 600), (true, 2), "the other's");
    assert_eq!(push(5, 2, 2, 300, 600), (true, 1));
    assert_eq!(push(6, 2, 1, 300, 600), (false, 2), "its first fragment has gone");
    // By bytes: 3,906 and 206 are more than 4,000.
    assert_eq!(push(7, 3, 1, 0, 3_500), (false, 3));
    assert_eq!(push(8, 3, 2, 0, 600), (false, 3));
    // All together: a fifth frame pushes out the oldest of all.
    assert_eq!(push(9, 4, 1, 0, 600), (false, 4));
    assert_eq!(push(10, 5, 1, 0, 600), (false, 4));
    assert_eq!(push(11, 2, 3, 300, 600), (false, 4), "it has gone, and pushes out the next");
    assert_eq!(reassembler.late_drops().get(DropReason::ReassemblyFull), 4);
}

proptest! {
    #[test]
    fn what_is_split_is_put_together_in_any_order(
        bytes in 14..9_000usize,
        max in 620..2_000usize,
        order in proptest::collection::vec(any::<prop::sample::Index>(), 0..30),
        repeat in any::<prop::sample::Index>(),
    ) {
        let datagram = whole(bytes);
        let mut fragments = split(&datagram, 1, max);
        prop_assert_eq!(fragments.len(), (datagram.len() - L1_BYTES).div_ceil(max - HEAD));
        for (place, other) in order.iter().enumerate() {
            let place = place % fragments.len();
            let other = other.index(fragments.len());
            fragments.swap(place, other);
        }
        // A copy before the last one is no harm.
        let count = fragments.len();
        let copy = fragments[repeat.index(count)].clone();
        fragments.insert(count - 1, copy);
        let mut reassembler = Reassembler::new(ReassemblyLimits::default());
        let mut out = None;
        for (place, fragment) in fragments.iter().enumerate() {
            prop_assert!(out.is_none(), "whole before the last came");
            out = reassembler.push(place as u64, sender(1), fragment).unwrap().map(<[u8]>::to_vec);
            if place == count - 1 && out.is_some() {
                // The copy was of the last one.
                prop_assert_eq!(repeat.index(count), count - 1);
                break;
            }
        }
        prop_assert_eq!(out, Some(datagram));
    }

    #[test]
    fn garbage_never_panics(garbage in proptest::collection::vec(any::<u8>(), 0..600), first: u8) {
        let mut datagram = garbage;
        if let Some(byte) = datagram.first_mut() {
            *byte = 0x60 | first & 0x1f;
        }
        let mut reassembler = reassembler();
        let _ = reassembler.push(0, sender(1), &datagram);
        prop_assert!(reassembler.bytes() <= 4_000);
    }
}
