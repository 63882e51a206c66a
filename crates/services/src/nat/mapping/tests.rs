#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;

use super::super::port_set::ALL_BLOCKS;
use super::super::tests::Random;
use super::*;
use crate::hash::testing::assert_spreads;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn every_core_has_a_share_of_every_block() {
    for cores in [1u8, 2, 3, 7, 16, 100, 128] {
        for address in [ip("192.0.2.1"), ip("192.0.2.77"), ip("2001:db8::ffff")] {
            for block in [0u16, 1, 40, 63] {
                let mut counts = vec![0u32; usize::from(cores)];
                for port in block << 10..=block << 10 | 1023 {
                    counts[usize::from(mapping_core(address, port, cores))] += 1;
                }
                let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
                assert!(*least >= 8 && most - least <= 8, "{cores} cores: {least}..{most}");
            }
        }
    }
}

#[test]
fn own_words_agree_with_the_function_for_all() {
    for (core, cores) in [(0u8, 1u8), (1, 3), (6, 7), (77, 128)] {
        let address = ip("192.0.2.9");
        let own = own_words(core, cores);
        for word in 0..WORDS {
            let first = (8 * word + first_core(address) as usize) % own.len();
            for bit in 0..64 {
                let port = (word * 64 + bit) as u16;
                assert_eq!(own[first] >> bit & 1 == 1, mapping_core(address, port, cores) == core, "{port}");
            }
        }
    }
}

/// Exactly the allowed ports of this core, each once, even to even while there are such; and full costs little.
#[test]
fn all_own_ports_are_given() {
    let (address, core, cores) = (ip("192.0.2.1"), 2, 4);
    let mut mappings = Mappings::new(core, cores, SecretState::of_number(9), 1 << 20);
    let allowed = PortSet::new((1024, 9000), &[(5000, 5100)]);
    let mut random = Random(3);
    let mut given = BTreeSet::new();
    let mut words = 0;
    let mut wrong_parity = 0;
    for client in 0u16.. {
        let wish = MappingWish {
            opened: None,
            allowed: &allowed,
            allowed_id: 1,
            blocks: ALL_BLOCKS,
            like: Some(client),
            random: random.next(),
        };
        let Some(port) = mappings.free_port((0, 17, address), &wish, &mut words) else { break };
        assert!(given.insert(port));
        wrong_parity += u32::from(port & 1 != client & 1 && client < 500);
        mappings.insert((0, 17, ip("10.0.0.1"), client, address), (0, 17, address, port), false);
    }
    let expected: BTreeSet<u16> =
        allowed.iter().filter(|port| mapping_core(address, *port, cores) == core).collect();
    assert_eq!(given, expected);
    assert_eq!(wrong_parity, 0);
    let mut words = 0;
    let wish = MappingWish {
        allowed: &allowed,
        opened: None,
        allowed_id: 1,
        blocks: ALL_BLOCKS,
        like: None,
        random: 5,
    };
    assert_eq!(mappings.free_port((0, 17, address), &wish, &mut words), None);
    assert_eq!(words, 0);
    // Another protocol, tenant or address has all of them; more allowed ports are seen at once.
    assert!(mappings.free_port((0, 6, address), &wish, &mut words).is_some());
    assert!(mappings.free_port((1, 17, address), &wish, &mut words).is_some());
    let more = PortSet::new((1024, 9999), &[]);
    let wish = MappingWish { allowed: &more, allowed_id: 2, ..wish };
    let port = mappings.free_port((0, 17, address), &wish, &mut words).unwrap();
    assert!(!given.contains(&port));
}

#[test]
fn a_mapping_outlives_its_last_flow_by_its_time() {
    let mut mappings = Mappings::new(0, 1, SecretState::of_number(9), 2);
    let inside = (7, 17, ip("10.0.0.1"), 1000, ip("192.0.2.1"));
    let outside = (0, 17, ip("192.0.2.1"), 5000);
    mappings.insert(inside, outside, false);
    assert_eq!(mappings.join(&outside).unwrap().flows, 2);
    mappings.leave(10, &outside).unwrap();
    mappings.leave(20, &outside).unwrap();
    let mut gone = Vec::new();
    mappings.expire(20 + MAPPING_IDLE_NS - 1, |entry| gone.push(entry.outside));
    assert_eq!(gone, []);
    // Used again: it counts from then.
    mappings.join(&outside).unwrap();
    mappings.expire(20 + MAPPING_IDLE_NS, |entry| gone.push(entry.outside));
    assert_eq!(gone, []);
    mappings.leave(30 + MAPPING_IDLE_NS, &outside).unwrap();
    assert_eq!(mappings.of_outside(&outside).unwrap().inside, inside);
    mappings.expire(30 + 2 * MAPPING_IDLE_NS, |entry| gone.push(entry.outside));
    assert_eq!(gone, [outside]);
    assert!(mappings.of_outside(&outside).is_none() && mappings.of_inside(&inside).is_none());
    assert_eq!(mappings.leave(0, &outside), None);
    // The number is used again, and there is a bound.
    mappings.insert(inside, outside, false);
    mappings.insert((7, 17, ip("10.0.0.1"), 1001, ip("192.0.2.1")), (0, 17, ip("192.0.2.1"), 5001), false);
    let allowed = PortSet::new((1, 65_535), &[]);
    let wish = MappingWish {
        allowed: &allowed,
        opened: None,
        allowed_id: 1,
        blocks: ALL_BLOCKS,
        like: None,
        random: 5,
    };
    assert_eq!(mappings.free_port((0, 17, ip("192.0.2.1")), &wish, &mut 0), None);
}

#[test]
fn mappings_that_a_stranger_chooses_do_not_meet() {
    let mappings = Mappings::new(0, 1, SecretState::of_number(9), 2);
    let inside = |address| -> InsideKey { (0, 17, address, 1, IpAddr::from([203, 0, 113, 1])) };
    assert_spreads(mappings.by_inside.hasher(), inside);
    assert_spreads(mappings.by_outside.hasher(), |address| -> OutsideKey { (0, 17, address, 1) });
    assert_spreads(mappings.used.hasher(), |address| (0_u16, 17_u8, address));
}
