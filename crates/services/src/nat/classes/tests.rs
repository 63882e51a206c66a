#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;

use proptest::prelude::*;
use steering::port_solver::Outgoing;

use super::super::tests::{draw, ip};
use super::*;

#[test]
fn a_place_tells_the_class_and_places_are_a_permutation() {
    let (hasher, solvers) = draw(7);
    let pairs = [
        ("192.0.2.1", "192.0.2.2"),
        ("192.0.2.2", "192.0.2.1"),
        ("2001:db8::1", "2001:db8::2"),
        ("2001:db8::2", "2001:db8::1"),
    ];
    for ((own, remote), slot) in pairs.into_iter().zip(PortSlot::ALL) {
        let map = ClassMap::new(&hasher, &solvers, slot).unwrap();
        let flow = Outgoing { own: ip(own), remote: ip(remote), remote_port: 443, protocol: 6, tenant: 9 };
        assert_eq!(flow.slot(), Ok(slot));
        let bucket = |port| u16::from(core_bits(hasher.hash(&flow.with_port(port).reversed(), 9)));
        let base = bucket(0);
        let mut seen = BTreeSet::new();
        for port in 0..=u16::MAX {
            let place = map.place(port);
            assert_eq!(map.port(place), port);
            assert_eq!(place >> 9, base ^ bucket(port), "the class of {port}");
            assert_eq!(place >> 3 & 63, port >> 10, "the block of {port}");
            seen.insert(place);
        }
        assert_eq!(seen.len(), 65_536);
    }
}

#[test]
fn other_solvers_are_refused() {
    let (hasher, _) = draw(7);
    let small = ReplyPorts::new(&hasher, 4, 10).unwrap();
    assert!(ClassMap::new(&hasher, &small, PortSlot::LowV4).is_none());
    let large = ReplyPorts::new(&hasher, 7, 16).unwrap();
    assert!(ClassMap::new(&hasher, &large, PortSlot::LowV4).is_none());
}

#[test]
fn a_mask_has_the_ports_of_its_set() {
    let (hasher, solvers) = draw(8);
    let map = ClassMap::new(&hasher, &solvers, PortSlot::HighV4).unwrap();
    let set = PortSet::new((1000, 5000), &[(2000, 2999)]);
    let mask = ClassMask::new(&map, &set);
    for port in 0..=u16::MAX {
        let place = map.place(port);
        assert_eq!(mask.word(usize::from(place >> 6)) >> (place & 63) & 1 == 1, set.contains(port));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn xor_all_moves_each_bit(bits: u128, by in 0u8..128) {
        let moved = (0..128u8).filter(|bit| bits >> bit & 1 == 1).fold(0u128, |all, bit| all | 1 << (bit ^ by));
        prop_assert_eq!(xor_all(bits, by), moved);
    }

    #[test]
    fn spread_makes_a_byte_of_each_bit(blocks: u8) {
        let wide = (0..8u32).filter(|bit| blocks >> bit & 1 == 1).fold(0u64, |all, bit| all | 0xff << (8 * bit));
        prop_assert_eq!(spread(blocks), wide);
    }
}
