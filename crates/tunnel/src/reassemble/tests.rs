#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use proptest::collection::vec;
use proptest::prelude::*;

/// As much memory as a peer of a node with four cores has.
fn share() -> Share {
    use crate::memory::{BondMemory, NodeMemory};
    Share::new(std::sync::Arc::new(BondMemory::new(std::sync::Arc::<NodeMemory>::default(), 4)))
}

const T: Time = Time::from_ms(10_000);

fn head(stamp: u32, total: u16, offset: u16) -> PieceHead {
    PieceHead { order: Order { stamp, back: 1, same_path: false }, total, offset, ..PieceHead::default() }
}

/// Pushes `offset..to` of a packet whose byte n is n (mod 251).
fn push(
    reassembler: &mut Reassembler,
    now: Time,
    stamp: u32,
    total: u16,
    piece: core::ops::Range<u16>,
) -> bool {
    let body: Vec<u8> = piece.clone().map(|n| (n % 251) as u8).collect();
    let whole = reassembler.push(now, 0, &head(stamp, total, piece.start), &body).unwrap();
    whole.is_some_and(|whole| {
        assert_eq!(whole.order.stamp, stamp);
        assert_eq!(whole.bytes.len(), usize::from(total));
        assert!(whole.bytes.iter().enumerate().all(|(n, &byte)| byte == (n % 251) as u8));
        true
    })
}

#[test]
fn pieces_in_any_order_make_the_packet() {
    let mut reassembler = Reassembler::within(share());
    assert!(!push(&mut reassembler, T, 1, 1_500, 1_400..1_500));
    assert!(!push(&mut reassembler, T, 2, 1_000, 0..600));
    assert!(!push(&mut reassembler, T, 1, 1_500, 0..700));
    assert_eq!(reassembler.len(), 2);
    assert!(push(&mut reassembler, T, 1, 1_500, 700..1_400));
    assert!(push(&mut reassembler, T, 2, 1_000, 600..1_000));
    assert!(push(&mut reassembler, T, 3, 40, 0..40), "a packet in one piece");
    assert!(reassembler.is_empty());
    assert_eq!(reassembler.next_deadline(), None);
    assert_eq!(reassembler.stats(), ReassemblyStats { completed: 3, ..ReassemblyStats::default() });
}

#[test]
fn the_head_tells_what_the_packet_is() {
    let mut reassembler = Reassembler::within(share());
    let order = Order { stamp: 7, back: 3, same_path: true };
    let head = PieceHead {
        ethernet: true,
        partial: true,
        group: true,
        order,
        total: 4,
        offset: 0,
        tenant: Some(9),
        bytes: None,
    };
    // The piece's own length and place may differ, all else must not.
    assert_eq!(reassembler.push(T, 0, &PieceHead { bytes: Some(3), ..head }, &[1, 2, 3]), Ok(None));
    let whole = reassembler.push(T, 0, &PieceHead { offset: 3, ..head }, &[4]).unwrap().unwrap();
    let bytes: &mut [u8] = &mut [1, 2, 3, 4];
    assert_eq!(whole, Whole { bytes, ethernet: true, partial: true, group: true, order, tenant: Some(9) });
    whole.bytes.fill(0);
}

#[test]
fn what_was_seen_before_is_no_error() {
    let mut reassembler = Reassembler::within(share());
    assert!(!push(&mut reassembler, T, 1, 100, 0..40));
    assert!(!push(&mut reassembler, T, 1, 100, 0..40));
    assert!(!push(&mut reassembler, T, 1, 100, 10..20));
    assert!(!push(&mut reassembler, T, 1, 100, 60..100));
    assert!(push(&mut reassembler, T, 1, 100, 40..60));
    // A copy that comes after the packet begins a new one, which will time out.
    assert!(!push(&mut reassembler, T, 1, 100, 0..40));
    assert_eq!(reassembler.expire(T.plus_ms(999)), 0);
    assert_eq!(reassembler.next_deadline(), Some(T.plus_ms(1_000)));
    assert_eq!(reassembler.expire(T.plus_ms(1_000)), 1);
    assert_eq!(reassembler.stats().timed_out, 1);
}

#[test]
fn contradictions_cost_the_packet() {
    let overlapping: [(u16, &[u8]); 4] = [(0, &[9; 40]), (30, &[0; 20]), (10, &[0; 90]), (50, &[0; 20])];
    for (offset, body) in overlapping {
        let mut reassembler = Reassembler::within(share());
        push(&mut reassembler, T, 1, 100, 0..40);
        push(&mut reassembler, T, 1, 100, 60..100);
        assert_eq!(
            reassembler.push(T, 0, &head(1, 100, offset), body),
            Err(DropReason::PieceOverlap),
            "at {offset}"
        );
        assert!(reassembler.is_empty());
        assert_eq!(reassembler.stats().contradicted, 1);
        // Once gone, it can begin anew.
        assert!(push(&mut reassembler, T, 1, 100, 0..100));
    }
    let mut reassembler = Reassembler::within(share());
    let first = head(1, 100, 0);
    let others = [
        PieceHead { total: 101, ..first },
        PieceHead { ethernet: true, ..first },
        PieceHead { partial: true, ..first },
        PieceHead { group: true, ..first },
        PieceHead { tenant: Some(1), ..first },
        PieceHead { order: Order { back: 2, ..first.order }, ..first },
        PieceHead { order: Order { same_path: true, ..first.order }, ..first },
    ];
    for other in others {
        assert_eq!(reassembler.push(T, 0, &first, &[1; 10]), Ok(None));
        let other = PieceHead { offset: 50, ..other };
        assert_eq!(reassembler.push(T, 0, &other, &[1; 10]), Err(DropReason::FrameMalformed), "{other:?}");
        assert!(reassembler.is_empty());
    }
    for (offset, bytes) in [(0, 0), (0, 101), (100, 1), (u16::MAX, 100)] {
        let piece = head(1, 100, offset);
        assert_eq!(reassembler.push(T, 0, &piece, &vec![1; bytes]), Err(DropReason::FrameMalformed));
    }
    assert_eq!(reassembler.stats().contradicted, 7);
}

#[test]
fn the_limits_hold_and_the_oldest_goes() {
    let mut reassembler = Reassembler::new(3, 10_000, 1_000, share());
    for stamp in 1..=4 {
        assert!(!push(&mut reassembler, T.plus_ms(stamp.into()), stamp, 1_000, 0..500));
    }
    assert_eq!((reassembler.len(), reassembler.stats().evicted), (3, 1));
    assert!(push(&mut reassembler, T.plus_ms(5), 3, 1_000, 500..1_000), "the middle one");
    assert!(push(&mut reassembler, T.plus_ms(5), 2, 1_000, 500..1_000));
    assert!(!push(&mut reassembler, T.plus_ms(5), 1, 1_000, 500..1_000), "its first half went");
    // Bytes: 4 and 1 are there, 8,900 more are too many with both.
    assert!(!push(&mut reassembler, T.plus_ms(6), 5, 9_500, 0..8_900));
    assert_eq!((reassembler.len(), reassembler.stats().evicted), (2, 2));
    assert!(reassembler.bytes <= 10_000);
    // A packet larger than the limit has no chance and costs the others nothing.
    assert_eq!(reassembler.push(T, 0, &head(9, 10_001, 0), &[1]), Err(DropReason::ReassemblyFull));
    assert_eq!(reassembler.len(), 2);
    assert_eq!(reassembler.expire(T.plus_ms(1_005)), 1);
    assert_eq!(reassembler.expire(T.plus_ms(1_006)), 1);
    assert_eq!(reassembler.bytes, 0);
    assert_eq!(
        Reassembler::new(0, 10_000, 1, share()).push(T, 0, &head(9, 10, 0), &[1]),
        Err(DropReason::ReassemblyFull)
    );
}

#[test]
fn too_many_fragments_cost_the_packet() {
    let mut reassembler = Reassembler::within(share());
    for n in 0..RUNS_MAX as u16 {
        assert!(!push(&mut reassembler, T, 1, 1_000, 2 * n..2 * n + 1));
    }
    assert_eq!(reassembler.push(T, 0, &head(1, 1_000, 500), &[1]), Err(DropReason::ReassemblyFull));
    assert!(reassembler.is_empty());
}

#[test]
fn stamps_of_one_chain_do_not_disturb_each_other() {
    let mut reassembler = Reassembler::within(share());
    let stamps = [5, 5 + 256, 5 + 512, u32::MAX - 250];
    for stamp in stamps {
        assert!(!push(&mut reassembler, T, stamp, 100, 0..50));
    }
    for stamp in [stamps[1], stamps[0], stamps[3], stamps[2]] {
        assert!(push(&mut reassembler, T, stamp, 100, 50..100));
    }
    assert!(reassembler.is_empty());
}

#[test]
fn memory_follows_what_arrived() {
    let memory = std::sync::Arc::new(crate::memory::BondMemory::new(Default::default(), 4));
    let mut reassembler = Reassembler::within(Share::new(std::sync::Arc::clone(&memory)));
    for stamp in 0..PACKETS_MAX as u32 {
        assert!(!push(&mut reassembler, T, stamp, u16::MAX, 60_000..60_010));
    }
    assert_eq!((reassembler.len(), reassembler.bytes), (PACKETS_MAX, 10 * PACKETS_MAX));
    assert!(memory.bytes() < 256 << 10, "{} bytes for 2,560", memory.bytes());
    reassembler.expire(T.plus_ms(TIMEOUT_MS));
    assert_eq!(memory.bytes(), 0);
}

#[test]
fn a_peer_that_has_used_up_its_memory_loses_its_oldest_pieces() {
    let memory = std::sync::Arc::new(crate::memory::BondMemory::new(Default::default(), 1));
    let mut other = Share::new(std::sync::Arc::clone(&memory));
    let mut reassembler = Reassembler::within(Share::new(std::sync::Arc::clone(&memory)));
    while other.take(32 << 10) {}
    assert_eq!(reassembler.push(T, 0, &head(1, 100, 0), &[1]), Err(DropReason::ReassemblyFull));
    other.give_back(96 << 10);
    for stamp in 0..100 {
        assert!(!push(&mut reassembler, T, stamp, 3_000, 0..1_400));
    }
    assert!(reassembler.stats().evicted > 50 && reassembler.len() > 10, "{:?}", reassembler.stats());
    assert!(push(&mut reassembler, T, 99, 3_000, 1_400..3_000), "the newest is there");
    assert!(memory.bytes() <= memory.bytes_max());
}

#[test]
fn cores_of_the_peer_number_their_packets_each_for_itself() {
    let mut reassembler = Reassembler::within(share());
    for core in 0..2 {
        assert_eq!(reassembler.push(T, core, &head(1, 10, 0), &[core; 5]), Ok(None));
    }
    for core in 0..2 {
        let whole = reassembler.push(T, core, &head(1, 10, 5), &[core; 5]).unwrap().unwrap();
        assert_eq!(whole.bytes, [core; 10]);
    }
}

proptest! {
    /// Packets cut at random and shuffled come back whole; memory stays within the limits throughout.
    #[test]
    fn cut_and_shuffled_packets_come_back(
        packets in vec((1..3_000_u16, vec(any::<u16>(), 0..6)), 1..20),
        swaps in vec(any::<(u16, u16)>(), 0..200),
        again in vec(any::<u16>(), 0..10),
    ) {
        let mut pieces = Vec::new();
        for (stamp, (total, cuts)) in packets.iter().enumerate() {
            let mut cuts: Vec<u16> = cuts.iter().map(|cut| cut % total).chain([0, *total]).collect();
            cuts.sort_unstable();
            cuts.dedup();
            pieces.extend(cuts.windows(2).map(|cut| (stamp as u32, *total, cut[0]..cut[1])));
        }
        let count = pieces.len();
        for (a, b) in swaps {
            pieces.swap(usize::from(a) % count, usize::from(b) % count);
        }
        let mut reassembler = Reassembler::within(share());
        let mut done = vec![0; packets.len()];
        for (n, (stamp, total, piece)) in pieces.iter().enumerate() {
            done[*stamp as usize] += u32::from(push(&mut reassembler, T, *stamp, *total, piece.clone()));
            // A copy of a piece whose packet is still open changes nothing.
            if again.contains(&(n as u16)) && done[*stamp as usize] == 0 {
                prop_assert!(!push(&mut reassembler, T, *stamp, *total, piece.clone()));
            }
        }
        prop_assert!(done.iter().all(|&times| times == 1));
        prop_assert!(reassembler.is_empty());
        prop_assert_eq!(reassembler.bytes, 0);
    }

    #[test]
    fn nonsense_is_survived(
        pieces in vec((0..12_u32, 0..300_u16, 0..300_u16, 0..300_usize, any::<u8>(), 0..400_u64), 0..300),
    ) {
        let mut reassembler = Reassembler::new(5, 800, 1_000, share());
        let mut now = T;
        for (stamp, total, offset, bytes, fill, step_ms) in pieces {
            now = now.plus_ms(step_ms);
            match reassembler.push(now, 0, &head(stamp, total, offset), &vec![fill; bytes]) {
                Ok(Some(whole)) => prop_assert_eq!(whole.bytes.len(), usize::from(total)),
                Ok(None) => {}
                Err(reason) => prop_assert!(matches!(
                    reason,
                    DropReason::PieceOverlap | DropReason::FrameMalformed | DropReason::ReassemblyFull
                )),
            }
            prop_assert!(reassembler.len() <= 5 && reassembler.bytes <= 800);
            prop_assert!(reassembler.next_deadline().is_none_or(|due| due > now));
            let slots: usize = reassembler.slots.iter().map(|slot| slot.buffer.capacity()).sum();
            prop_assert_eq!(slots, reassembler.bytes);
        }
        reassembler.expire(now.plus_ms(1_000));
        prop_assert!(reassembler.is_empty());
        prop_assert_eq!((reassembler.oldest, reassembler.youngest), (NONE, NONE));
    }
}
