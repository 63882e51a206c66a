//! Limits hold, and who is honest gets through.

use super::*;

/// A core with little room.
const SMALL: FragmentLimits =
    FragmentLimits { bytes_max: 1 << 20, packets_per_source_max: 16, timeout_ns: TIMEOUT };

/// An honest packet in four fragments, the first one last; `between` runs after each.
fn honest(rendezvous: &mut Rendezvous, recipe: &Recipe, mut between: impl FnMut(&mut Rendezvous)) -> usize {
    let mut fragments = recipe.cut(&udp(4_000), 1_000);
    fragments.reverse();
    let mut out = 0;
    for fragment in fragments {
        out += meet_unchecked(rendezvous, &fragment);
        between(rendezvous);
        assert!(rendezvous.bytes() <= SMALL.bytes_max);
    }
    rendezvous.audit();
    out
}

fn meet_unchecked(rendezvous: &mut Rendezvous, packet: &[u8]) -> usize {
    let mut out = 0;
    let _ = rendezvous.push(0, packet, &header(packet), 0, by(3), &mut |_: Released<'_>| out += 1);
    out
}

#[test]
fn one_source_takes_nothing_from_others() {
    for recipe in [V4, V6] {
        let mut rendezvous = Rendezvous::new(SMALL, SecretState::of_number(3));
        let mut id = 0;
        for _ in 0..5 {
            let out = honest(&mut rendezvous, &recipe, |rendezvous| {
                for _ in 0..200 {
                    id += 1;
                    let evil = Recipe { from: 66, id, ..recipe.clone() };
                    meet_unchecked(rendezvous, &evil.fragment(1_400, true, &[0; 1_400]));
                }
            });
            assert_eq!(out, 4);
        }
        assert!(rendezvous.packets() <= 16);
        assert_eq!(rendezvous.stats().evicted, u64::from(id) - 16, "only its own");
    }
}

/// A /64 is one source: its addresses cost nothing.
#[test]
fn addresses_of_one_prefix_are_one_source() {
    let mut rendezvous = Rendezvous::new(SMALL, SecretState::of_number(3));
    for host in 0..200u8 {
        let mut fragment = V6.fragment(8, true, &[0; 8]);
        fragment[20] = host;
        assert_eq!(meet(&mut rendezvous, 0, &fragment), Ok(vec![]));
    }
    assert_eq!(rendezvous.packets(), 16);
}

/// One source may not fill the memory with few large packets either.
#[test]
fn bytes_of_one_source() {
    let mut rendezvous = Rendezvous::new(SMALL, SecretState::of_number(3));
    for id in 0..16 {
        let evil = Recipe { id, ..V4 };
        for at in 1..40 {
            meet_unchecked(&mut rendezvous, &evil.fragment(at * 1_400, true, &[0; 1_400]));
        }
        assert!(rendezvous.bytes() <= SMALL.bytes_max / 4);
        rendezvous.audit();
    }
    assert!(rendezvous.bytes() > SMALL.bytes_max / 8, "but a fair part");
}

/// Very many sources: the oldest goes, so what is complete soon gets through.
#[test]
fn many_sources() {
    let mut rendezvous = Rendezvous::new(SMALL, SecretState::of_number(3));
    let mut from = 1_000;
    for _ in 0..5 {
        let out = honest(&mut rendezvous, &V4, |rendezvous| {
            for _ in 0..100 {
                from += 1;
                let evil = Recipe { from, ..V4 };
                meet_unchecked(rendezvous, &evil.fragment(8, true, &[0; 800]));
            }
        });
        assert_eq!(out, 4);
    }
    assert!(rendezvous.stats().evicted > 0, "the memory was full");
    assert_eq!(rendezvous.late_drops().get(DropReason::FragmentsFull), rendezvous.stats().evicted);
}

/// Some sources that together fill everything: each keeps to an equal share, and a small one is not the victim.
#[test]
fn some_greedy_sources() {
    let mut rendezvous = Rendezvous::new(SMALL, SecretState::of_number(3));
    let mut id = 0;
    for _ in 0..5 {
        let out = honest(&mut rendezvous, &V4, |rendezvous| {
            for from in 100..106 {
                for _ in 0..16 {
                    id += 1;
                    let evil = Recipe { from, id, ..V4 };
                    meet_unchecked(rendezvous, &evil.fragment(16_000, true, &[0; 16_000]));
                }
            }
        });
        assert_eq!(out, 4);
    }
    assert!(rendezvous.bytes() > SMALL.bytes_max * 3 / 4, "the memory was full");
}

/// Memory full of many small sources: a greedy one gets an equal share of it and then pushes out its own.
#[test]
fn one_greedy_source_among_small_ones() {
    let limits = FragmentLimits { packets_per_source_max: 1_000, ..SMALL };
    let mut rendezvous = Rendezvous::new(limits, SecretState::of_number(3));
    let held = |from, id| Recipe { from, id, ..V4 }.fragment(8, true, &[0; 2_000]);
    let mut small = 1_000;
    while rendezvous.stats().evicted == 0 {
        small += 1;
        meet_unchecked(&mut rendezvous, &held(small, 1));
    }
    let before = rendezvous.packets();
    for id in 0..1_000 {
        meet_unchecked(&mut rendezvous, &held(66, id));
    }
    rendezvous.audit();
    let first = |from| Recipe { from, id: 1, ..V4 }.fragment(0, true, &udp(8));
    // From the newest on: what was pushed out begins anew and takes room.
    let left =
        (1_001..=small).rev().filter(|from| meet_unchecked(&mut rendezvous, &first(*from)) == 2).count();
    // 160 KiB of the 1 MiB are its share.
    assert!(left >= before * 5 / 6 - 2, "{left} of {before}");
    assert_eq!(rendezvous.late_drops().total(), rendezvous.stats().evicted);
}

/// The same limits at the owner, with packets that are assembled.
#[test]
fn at_the_owner() {
    let mut table = FragmentTable::new(SMALL, SecretState::of_number(3));
    let mine = V4.cut(&udp(4_000), 1_000);
    table.tell(0, &tell(Action::Assemble, &mine[0])).unwrap();
    let mut did = Ok(Did::Held);
    for fragment in &mine {
        did = take(&mut table, 0, fragment);
        for id in 0..100 {
            let evil = Recipe { from: 66, id, ..V4 }.fragment(1_400, true, &[0; 1_400]);
            let _ = table.tell(0, &tell(Action::Assemble, &evil));
            let _ = table.push(0, &id_of(&evil), &evil, &header(&evil));
            assert!(table.bytes() <= SMALL.bytes_max);
        }
    }
    assert_eq!(did, Ok(Did::Whole(V4.whole(&udp(4_000)))));
}

#[test]
fn no_room_at_all() {
    for limits in [
        FragmentLimits { bytes_max: 0, ..SMALL },
        FragmentLimits { bytes_max: 1_000, ..SMALL },
        FragmentLimits { packets_per_source_max: 0, ..SMALL },
    ] {
        let mut rendezvous = Rendezvous::new(limits, SecretState::of_number(3));
        assert_eq!(meet(&mut rendezvous, 0, &V4.fragment(8, true, &[0; 8])), Err(DropReason::FragmentsFull));
        assert_eq!((rendezvous.bytes(), rendezvous.packets()), (0, 0));
    }
    // Room for a packet, not for all of it: the rest of it is refused.
    let mut rendezvous =
        Rendezvous::new(FragmentLimits { bytes_max: 8_000, ..SMALL }, SecretState::of_number(3));
    let large = V4.fragment(8, true, &[0; 1_600]);
    assert_eq!(meet(&mut rendezvous, 0, &large), Err(DropReason::FragmentsFull));
    assert_eq!(meet(&mut rendezvous, 0, &V4.fragment(0, true, &udp(8))), Err(DropReason::FragmentsFull));
}

#[test]
fn smaller_limits_at_once() {
    let mut rendezvous = Rendezvous::new(SMALL, SecretState::of_number(3));
    for from in 0..100 {
        meet_unchecked(&mut rendezvous, &Recipe { from, ..V4 }.fragment(8, true, &[0; 80]));
    }
    assert_eq!(rendezvous.packets(), 100);
    rendezvous.set_limits(FragmentLimits { bytes_max: 40_000, ..SMALL });
    assert!(rendezvous.bytes() <= 40_000 && rendezvous.packets() > 0);
    let newest = Recipe { from: 99, ..V4 };
    assert_eq!(meet_unchecked(&mut rendezvous, &newest.fragment(0, true, &udp(8))), 2, "the newest stayed");
}

#[test]
fn operators_limits() {
    let limits = FragmentLimits::of(&spec::Limits::default(), &spec::Timeouts::default());
    assert_eq!(
        limits,
        FragmentLimits { bytes_max: 4 << 20, packets_per_source_max: 64, timeout_ns: TIMEOUT }
    );
}
