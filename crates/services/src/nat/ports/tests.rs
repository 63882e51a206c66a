#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;

use proptest::prelude::*;
use steering::port_solver::PortSlot;

use super::super::port_set::ALL_BLOCKS;
use super::super::tests::{Random, draw};
use super::*;

fn mask(map: &ClassMap, range: (u16, u16)) -> Arc<ClassMask> {
    Arc::new(ClassMask::new(map, &PortSet::new(range, &[])))
}

fn map(seed: u64) -> ClassMap {
    let (hasher, solvers) = draw(seed);
    ClassMap::new(&hasher, &solvers, PortSlot::LowV4).unwrap()
}

fn wish(mask: &Arc<ClassMask>, classes: u128, random: u64) -> Wish<'_> {
    Wish { classes, first: None, blocks: ALL_BLOCKS, mask, random }
}

fn take_any(table: &mut PortTable, wish: &Wish<'_>, words: &mut u64) -> Option<u16> {
    let found = table.find(wish, words, &mut |_| Verdict::Take)?;
    table.take(found, wish.mask, false);
    Some(found)
}

/// However full, a search reads the words of one class: the others that have nothing are known by one word.
#[test]
fn a_nearly_full_table_costs_no_more_than_an_empty_one() {
    let map = map(1);
    let mask = mask(&map, (1024, 65_535));
    let mut random = Random(5);
    let mut table = PortTable::default();
    let (mut held, mut words) = (Vec::new(), 0);
    while let Some(place) = take_any(&mut table, &wish(&mask, u128::MAX, random.next()), &mut words) {
        held.push(place);
    }
    assert_eq!(held.len(), 64_512);
    assert!(words <= 64_512 * 8);
    // 0.1 % free, and again and again another one.
    for _ in 0..64 {
        table.give(held.swap_remove(random.below(held.len())), None).unwrap();
    }
    let mut most = 0;
    for _ in 0..20_000 {
        let place = held.swap_remove(random.below(held.len()));
        table.give(place, None).unwrap();
        let mut words = 0;
        held.push(take_any(&mut table, &wish(&mask, u128::MAX, random.next()), &mut words).unwrap());
        most = most.max(words);
    }
    assert!(most <= CLASS_WORDS as u64, "{most} words");
    while take_any(&mut table, &wish(&mask, u128::MAX, random.next()), &mut words).is_some() {}
    let mut words = 0;
    assert_eq!(take_any(&mut table, &wish(&mask, u128::MAX, 1), &mut words), None);
    assert_eq!(words, 0, "that all is full is known without looking");
}

#[test]
fn the_worst_case_is_bounded() {
    let map = map(2);
    let mask = mask(&map, (1, 65_535));
    let mut table = PortTable::default();
    let mut words = 0;
    // Everything is free but refused.
    let found = table.find(&wish(&mask, u128::MAX, 77), &mut words, &mut |_| Verdict::Skip);
    assert_eq!((found, words), (None, 1024));
    let mut asked = 0;
    let found = table.find(&wish(&mask, u128::MAX, 77), &mut words, &mut |_| {
        asked += 1;
        if asked == 10 { Verdict::Stop } else { Verdict::Skip }
    });
    assert_eq!((found, asked), (None, 10));
}

#[test]
fn the_wanted_class_comes_first_and_blocks_are_kept() {
    let map = map(3);
    let mask = mask(&map, (1024, 65_535));
    let mut random = Random(1);
    for class in 0..128u8 {
        let mut table = PortTable::default();
        let first = Wish {
            first: Some(class),
            blocks: 0x8001_0000_0000_0002,
            ..wish(&mask, u128::MAX, random.next())
        };
        let place = take_any(&mut table, &first, &mut 0).unwrap();
        assert_eq!(place >> 9, u16::from(class));
        assert!([1, 48, 63].contains(&(map.port(place) >> 10)));
        // A class that does not serve is never used.
        let other = Wish { classes: 1 << 5, ..first };
        assert_eq!(take_any(&mut table, &other, &mut 0).unwrap() >> 9, 5);
    }
}

#[test]
fn first_choices_are_spread() {
    let map = map(4);
    let mask = mask(&map, (1024, 65_535));
    let mut random = Random(9);
    let mut table = PortTable::default();
    let ports: BTreeSet<u16> = (0..1000)
        .map(|_| table.find(&wish(&mask, u128::MAX, random.next()), &mut 0, &mut |_| Verdict::Take).unwrap())
        .collect();
    assert!(ports.len() > 950, "{} different ports of 1000 draws", ports.len());
}

#[test]
fn foreign_places_are_remembered_and_a_new_hash_keeps_the_ports() {
    let (old, new) = (map(5), map(6));
    let mask = mask(&old, (1, 65_535));
    let mut table = PortTable::default();
    for port in 1000..2000 {
        table.take(old.place(port), &mask, port % 3 == 0);
    }
    table.take(old.place(1500), &mask, false);
    assert_eq!(table.held(), 1000, "taken twice is taken once");
    table.rearrange(&old, &new);
    assert_eq!(table.held(), 1000);
    for port in 1000..2000 {
        assert_eq!(table.give(new.place(port), None), Some(Given { foreign: port % 3 == 0 }));
        assert_eq!(table.give(new.place(port), None), None);
    }
    assert_eq!(table.held(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Against a plain set, with masks that change: what is given is free, allowed and wanted, and nothing that could
    /// be given is missed.
    #[test]
    fn a_table_is_a_set(seed: u64, steps in proptest::collection::vec((any::<u64>(), any::<u128>(), any::<u64>(), 0u8..8), 1..600)) {
        let map = map(7);
        let masks = [mask(&map, (1024, 1400)), mask(&map, (1, 3000))];
        let mut random = Random(seed);
        let mut table = PortTable::default();
        let mut model = BTreeSet::new();
        for (word, classes, blocks, kind) in steps {
            let mask = &masks[usize::from(kind & 1)];
            if kind < 5 {
                let wish = Wish { classes, first: Some(kind), blocks: blocks | 1, mask, random: word };
                let fits = |place: u16| classes >> (place >> 9) & 1 == 1
                    && (blocks | 1) >> (place >> 3 & 63) & 1 == 1
                    && mask.word(usize::from(place >> 6)) >> (place & 63) & 1 == 1;
                match take_any(&mut table, &wish, &mut 0) {
                    Some(place) => {
                        prop_assert!(fits(place));
                        prop_assert!(model.insert(place), "given twice: {}", place);
                    }
                    None => prop_assert!((0..=u16::MAX).all(|place| !fits(place) || model.contains(&place))),
                }
            } else if let Some(&place) = model.iter().nth(random.below(model.len().max(1))) {
                model.remove(&place);
                prop_assert!(table.give(place, None).is_some());
            }
            prop_assert_eq!(table.held() as usize, model.len());
        }
        prop_assert_eq!(table.places().into_iter().collect::<BTreeSet<_>>(), model);
    }
}

/// A resting port is given again after its time, or when no other is left: then the one that rests longest.
#[test]
fn ports_rest_while_others_are_free() {
    let map = map(3);
    let mask = mask(&map, (1024, 1223));
    let mut random = Random(9);
    let mut table = PortTable::default();
    let mut words = 0;
    let mut last = Vec::new();
    for now_s in 0..200 {
        let place = take_any(&mut table, &wish(&mask, u128::MAX, random.next()), &mut words).unwrap();
        assert!(!last.contains(&place), "given {now_s} times, and again");
        last.push(place);
        table.give(place, Some(now_s / 10)).unwrap();
        assert_eq!(table.state(place), PlaceState::Resting);
    }
    assert_eq!((table.held(), table.is_idle()), (0, false));
    let any = wish(&mask, u128::MAX, 7);
    assert_eq!(table.find(&any, &mut words, &mut |_| Verdict::Take), None);
    for expected in &last[..3] {
        assert_eq!(table.find_rested(&any, &mut |_| Verdict::Take), Some(*expected));
        table.take(*expected, &mask, false);
    }
    assert_eq!(table.find_rested(&wish(&mask, 0, 7), &mut |_| Verdict::Take), None, "another core's");
    table.wake(REST_S + 9);
    assert_eq!(table.state(last[3]), PlaceState::Free);
    assert_eq!(table.state(last[199]), PlaceState::Resting);
    table.wake(REST_S + 20);
    for place in &last[..3] {
        table.give(*place, None).unwrap();
    }
    assert!(table.is_idle());
    assert_eq!(table.give(last[0], None), None);
}
