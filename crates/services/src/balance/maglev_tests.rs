//! The table of the paper, and the bounds that its users rely on.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use proptest::prelude::*;

use super::maglev::{NOBODY, Permutation, SIZES, Share, build, places_for};

fn share(number: u32, places: u32, configured: u32, effective: u32) -> Share {
    let address = SocketAddr::new(IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + number)), 80);
    Share { permutation: Permutation::of(address, places), configured, effective }
}

fn equal(count: u32, places: u32) -> Vec<Share> {
    (0..count).map(|number| share(number, places, 10, 10)).collect()
}

fn counts(table: &[u16]) -> BTreeMap<u16, usize> {
    let mut counts = BTreeMap::new();
    for &owner in table {
        *counts.entry(owner).or_default() += 1;
    }
    counts
}

/// Table 1 of the paper: seven places, permutations of B0 3 0 4 1 5 2 6, of B1 0 2 4 6 1 3 5, of B2 3 4 5 6 0 1 2.
fn paper() -> Vec<Share> {
    let of =
        |offset, skip| Share { permutation: Permutation { offset, skip }, configured: 10, effective: 10 };
    vec![of(3, 4), of(0, 2), of(3, 1)]
}

#[test]
fn example_of_the_paper() {
    let mut shares = paper();
    assert_eq!(build(7, &shares), [1, 0, 1, 0, 2, 2, 0]);
    shares.remove(1);
    assert_eq!(build(7, &shares), [0, 0, 0, 0, 1, 1, 1], "B1 is not configured");
}

#[test]
fn a_failure_moves_nothing_between_the_others() {
    let mut shares = paper();
    shares[1].effective = 0;
    // As before, but for the places 0 and 2 of B1: B0 wants 0 before 2, B2 takes what is left.
    assert_eq!(build(7, &shares), [0, 0, 2, 0, 2, 2, 0]);
    for (count, places) in [(3, 4_093), (40, 4_093), (100, 16_381), (400, 65_537)] {
        let mut shares = equal(count, places);
        let before = build(places, &shares);
        shares[1].effective = 0;
        let down = build(places, &shares);
        let moved = before.iter().zip(&down).filter(|(old, new)| **old != 1 && old != new).count();
        assert_eq!(moved, 0, "{count} backends");
        shares[1].effective = 10;
        assert_eq!(build(places, &shares), before, "back as it was");
    }
}

#[test]
fn a_slow_start_takes_from_all_and_returns_the_same() {
    let mut shares = equal(10, 4_093);
    let whole = build(4_093, &shares);
    let mut last = 0;
    for step in 1..=10 {
        shares[3].effective = step;
        let table = build(4_093, &shares);
        let held = table.iter().filter(|&&owner| owner == 3).count();
        assert!(held > last, "grows with each step");
        let kept = table.iter().zip(&whole).filter(|(now, whole)| **now == 3 && **whole == 3).count();
        assert_eq!(kept, held, "only what it will have in the end");
        let gave = table.iter().zip(&whole).filter(|(now, whole)| **whole != 3 && now != whole).count();
        assert_eq!(gave, 0, "nobody loses what it will have in the end");
        last = held;
    }
    assert_eq!(build(4_093, &shares), whole);
}

/// As Katran's test with 400 servers: no two differ by more than one place.
#[test]
fn equal_weights_differ_by_one_place() {
    for count in [1, 2, 3, 7, 10, 40, 100, 400] {
        let places = places_for(&vec![10; count as usize]);
        let table = build(places, &equal(count, places));
        let counts = counts(&table);
        assert_eq!(counts.len(), count as usize);
        let (least, most) = (counts.values().min().unwrap(), counts.values().max().unwrap());
        assert!(most - least <= 1, "{count} backends in {places} places: {least} to {most}");
    }
}

/// As Cilium's test: a backend that leaves the configuration moves less than 1 % of all places between others.
#[test]
fn a_removal_moves_less_than_one_percent() {
    for count in [2u16, 3, 6, 7, 27, 28, 109] {
        let places = places_for(&vec![10; usize::from(count)]);
        let shares = equal(u32::from(count), places);
        let before = build(places, &shares);
        for gone in [0, count / 2, count - 1] {
            let mut left = shares.clone();
            left.remove(usize::from(gone));
            let after = build(places, &left);
            let moved = before
                .iter()
                .zip(&after)
                .map(|(&old, &new)| (old, if new >= gone { new + 1 } else { new }))
                .filter(|(old, new)| *old != gone && old != new)
                .count();
            let share = moved as f64 / f64::from(places);
            assert!(share < 0.01, "{count} backends, {gone} gone: {:.3} % moved", share * 100.0);
        }
    }
}

#[test]
fn weights_are_exact_to_a_place() {
    // Weights of Cilium's weighted test: 2, 13, 111, 10 of 136; and the widest range there is.
    for weights in [vec![20, 130, 1_110, 100], vec![10, 10_000], vec![10, 20, 30], vec![10; 17]] {
        let places = places_for(&weights);
        let total: u32 = weights.iter().sum();
        let shares: Vec<Share> =
            (0..).zip(&weights).map(|(at, &weight)| share(at, places, weight, weight)).collect();
        let counts = counts(&build(places, &shares));
        for (id, &weight) in (0..).zip(&weights) {
            let ideal = f64::from(places) * f64::from(weight) / f64::from(total);
            let got = counts.get(&id).copied().unwrap_or(0) as f64;
            assert!((got - ideal).abs() < 1.0, "{weights:?}: {id} has {got}, should have {ideal}");
        }
    }
}

#[test]
fn sizes() {
    let is_prime = |number: u32| {
        (2..).take_while(|divisor| divisor * divisor <= number).all(|divisor| !number.is_multiple_of(divisor))
    };
    assert!(SIZES.into_iter().all(is_prime));
    assert_eq!(places_for(&[10; 6]), 4_093);
    assert_eq!(places_for(&[10; 7]), 16_381);
    assert_eq!(places_for(&[10; 109]), 65_537);
    assert_eq!(places_for(&[10; 110]), 262_147);
    assert_eq!(places_for(&[10; 2_621]), 262_147);
    assert_eq!(places_for(&[10; 2_622]), 1_048_583);
    assert_eq!(places_for(&[10, 10, 10, 500]), 16_381, "the light ones have 100 places");
    assert_eq!(places_for(&[10, 10_000]), 65_537, "the light one has 65 places");
    assert_eq!(places_for(&[0, 0]), 4_093);
    assert_eq!(places_for(&[]), 4_093);
}

#[test]
fn nobody() {
    assert!(build(7, &[]).iter().all(|&owner| owner == NOBODY));
    let shares = [share(1, 7, 10, 0), share(2, 7, 10, 0)];
    assert!(build(7, &shares).iter().all(|&owner| owner == NOBODY));
    let undrained = [share(1, 7, 0, 10), share(2, 7, 0, 0)];
    assert!(
        build(7, &undrained).iter().all(|&owner| owner == 0),
        "configured with weight 0, set while running"
    );
}

#[test]
fn equal_permutations_are_served_too() {
    let one = share(1, 4_093, 10, 10);
    let counts = counts(&build(4_093, &[one, one, one]));
    assert!(counts.values().all(|&count| count == 1_364 || count == 1_365));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn every_place_has_an_owner_in_exact_shares(
        weights in prop::collection::vec((0u32..=1_000, 0u32..=10), 1..30),
    ) {
        let places = 4_093;
        let shares: Vec<Share> = (0..)
            .zip(&weights)
            .map(|(at, &(weight, step))| share(at, places, weight * 10, weight * step))
            .collect();
        let table = build(places, &shares);
        prop_assert_eq!(&table, &build(places, &shares));
        let total: u32 = shares.iter().map(|share| share.effective).sum();
        let counts = counts(&table);
        for (id, share) in (0u16..).zip(&shares) {
            let got = counts.get(&id).copied().unwrap_or(0) as f64;
            let ideal = f64::from(places) * f64::from(share.effective) / f64::from(total.max(1));
            prop_assert!((got - ideal).abs() < 1.0, "{id}: {got} instead of {ideal}");
        }
        prop_assert_eq!(counts.contains_key(&NOBODY), total == 0);
    }
}
