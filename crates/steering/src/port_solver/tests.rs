#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::symmetric::core_bits;
use crate::table::Unit;
use crate::toeplitz::{KEY_BYTES, RSS_KEY, rss_hash, rss_input_v4_ports};
use proptest::prelude::*;
use std::net::Ipv4Addr;

/// Bit offsets of source and destination port in RSS input.
const V4_SOURCE: usize = 64;
const V4_DESTINATION: usize = 80;
const V6_SOURCE: usize = 256;
const V6_DESTINATION: usize = 272;

fn rss(port_at: usize, bits: u32, free_bits: u32) -> Option<PortSolver> {
    PortSolver::new(&RSS_KEY, port_at, 0, bits, free_bits)
}

/// Published in the research on RSS port choice: IPv4 destination port under the official key.
#[test]
fn published_solutions() {
    let seven = rss(V4_DESTINATION, 7, 16).unwrap();
    assert_eq!(seven.units(), [0x37, 0x69, 0x71, 0x4a, 0x25, 0x57, 0x6e]);
    assert_eq!(seven.nullspace(), [0xe5, 0x141, 0x267, 0x42b, 0x838, 0x101e, 0x2052, 0x4041, 0x8009]);
    let three = rss(V4_DESTINATION, 3, 16).unwrap();
    assert_eq!(three.units(), [0x0e, 0x06, 0x02]);
    assert_eq!(three.nullspace().len(), 13);
}

/// A source-translated flow whose reply must hash like the original.
#[test]
fn published_example() {
    let own: Ipv4Addr = "198.51.100.7".parse().unwrap();
    let remote: Ipv4Addr = "161.142.100.80".parse().unwrap();
    let forward =
        rss_hash(&RSS_KEY, &rss_input_v4_ports("66.9.149.187".parse().unwrap(), remote, 2794, 1766));
    assert_eq!(forward, 0x51cc_c178);
    let reply = |port| rss_hash(&RSS_KEY, &rss_input_v4_ports(remote, own, 1766, port));
    assert_eq!(reply(0x8000), 0x3165_ea4a);
    for (bits, port, hash) in [(7, 32795, 0xfe7b_eaf8), (3, 32774, reply(32774)), (9, 33215, 0x00e3_6778)] {
        let solver = rss(V4_DESTINATION, bits, 16).unwrap();
        let mask = (1 << bits) - 1;
        assert_eq!(solver.port(0x8000, reply(0x8000), forward & mask), port);
        assert_eq!(reply(port), hash);
        assert_eq!(hash & mask, forward & mask);
        assert_eq!(solver.ports(0x8000, reply(0x8000), forward & mask, 0).len(), 1 << (16 - bits));
    }
}

#[test]
fn published_ranks() {
    for at in [V4_SOURCE, V4_DESTINATION, V6_SOURCE, V6_DESTINATION] {
        assert!((0..=12).all(|bits| rss(at, bits, 16).is_some()), "offset {at}");
    }
    let full = [V4_SOURCE, V4_DESTINATION, V6_SOURCE, V6_DESTINATION].map(|at| rss(at, 16, 16).is_some());
    assert_eq!(full, [false, true, true, false]);
    assert!(rss(V4_SOURCE, 13, 16).is_some() && rss(V4_SOURCE, 14, 16).is_none());
    // The last bits of the port alone do not always do.
    assert!(rss(V6_SOURCE, 7, 7).is_none() || rss(V6_DESTINATION, 7, 7).is_none());
    let periodic = [[0x6d, 0x5a]; 20].concat();
    assert!(PortSolver::new(&periodic, V4_SOURCE, 0, 7, 7).is_none());
    assert!(PortSolver::new(&periodic, V4_SOURCE, 0, 7, 16).is_some());
}

#[test]
fn impossible_sizes_are_refused() {
    assert!(rss(V4_SOURCE, 7, 6).is_none());
    assert!(rss(V4_SOURCE, 7, 17).is_none());
    assert!(PortSolver::new(&RSS_KEY, V4_SOURCE, 26, 7, 16).is_none());
    assert!(PortSolver::new(&RSS_KEY, V4_SOURCE, 25, 7, 16).is_some());
    assert!(PortSolver::new(&RSS_KEY, V4_SOURCE, u32::MAX, 1, 16).is_none());
    assert!(PortSolver::new(&RSS_KEY, 999, 0, 1, 16).is_none(), "past the key there is no rank");
    assert!(PortSolver::new(&[], 0, 0, 0, 16).is_some(), "no bit to choose: every port is a solution");
}

/// A stream of key bytes from a seed (splitmix64).
fn keys(mut seed: u64) -> impl Iterator<Item = [u8; KEY_BYTES]> {
    std::iter::from_fn(move || {
        Some(std::array::from_fn(|_| {
            seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = seed;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (z ^ (z >> 31)) as u8
        }))
    })
}

#[test]
fn most_random_keys_will_do_and_bad_ones_are_drawn_again() {
    let good = |block_bits| {
        let solved =
            keys(1).take(300).filter(|key| ReplyPorts::new(&FlowHasher::new(*key), 7, block_bits).is_some());
        solved.count()
    };
    let (small, large) = (good(10), good(16));
    assert!(small > 150, "blocks of 1,024: {small} of 300");
    assert!(large > 285, "all ports: {large} of 300");

    let bad = std::iter::repeat_n([0u8; KEY_BYTES], 3);
    let (hasher, _) = ReplyPorts::draw(7, 10, bad.clone().chain(keys(2)).take(64)).unwrap();
    assert_ne!(hasher.key(), &[0; KEY_BYTES]);
    assert!(ReplyPorts::draw(7, 10, bad).is_none());
}

#[test]
fn what_cannot_be_solved_is_named() {
    let (hasher, ports) = ReplyPorts::draw(7, 10, keys(3)).unwrap();
    let flow = |own: &str, remote: &str| Outgoing {
        own: own.parse().unwrap(),
        remote: remote.parse().unwrap(),
        remote_port: 80,
        protocol: 6,
        tenant: 0,
    };
    let error = |own, remote| ports.ports(&hasher, &flow(own, remote), 1024, 5, 0).err();
    assert_eq!(error("192.0.2.1", "192.0.2.1"), Some(NoSolution::EqualAddresses));
    assert_eq!(error("192.0.2.1", "2001:db8::1"), Some(NoSolution::MixedFamilies));
    assert_eq!(error("192.0.2.1", "192.0.2.2"), None);
}

/// The byte of a slot is where the port is: flipping a port bit changes the hash by that byte's table.
#[test]
fn slots_name_the_place_of_the_port() {
    let (hasher, _) = ReplyPorts::draw(7, 10, keys(4)).unwrap();
    let cases = [
        ("192.0.2.1", "192.0.2.2", 6, PortSlot::LowV4),
        ("192.0.2.2", "192.0.2.1", 6, PortSlot::HighV4),
        ("192.0.2.2", "192.0.2.1", 1, PortSlot::LowV4),
        ("2001:db8::1", "2001:db8::2", 17, PortSlot::LowV6),
        ("2001:db8::2", "2001:db8::1", 17, PortSlot::HighV6),
        ("2001:db8::2", "2001:db8::1", 58, PortSlot::LowV6),
    ];
    for (own, remote, protocol, slot) in cases {
        let (own, remote) = (own.parse().unwrap(), remote.parse().unwrap());
        let flow = Outgoing { own, remote, remote_port: 53, protocol, tenant: 3 };
        assert_eq!(flow.slot(), Ok(slot));
        let hash = |port| hasher.hash(&flow.with_port(port), 3);
        let (upper, lower) = (hasher.tables()[slot.byte()], hasher.tables()[slot.byte() + 1]);
        assert_eq!(hash(0) ^ hash(0x1234), upper[0x12] ^ lower[0x34]);
    }
    let equal: IpAddr = "192.0.2.1".parse().unwrap();
    let echo = Outgoing { own: equal, remote: equal, remote_port: 0, protocol: 1, tenant: 0 };
    assert_eq!((echo.with_port(7).src_port, echo.with_port(7).dst_port), (7, 0));
    assert!(PortSlot::ALL.iter().enumerate().all(|(place, slot)| place == *slot as usize));
}

#[test]
fn owned_buckets_are_picked_evenly() {
    let units = [Unit { id: 4, weight: 1 }, Unit { id: 5, weight: 3 }];
    let table = BucketTable::new(16, &units).unwrap();
    let owned = OwnedBuckets::new(&table, 4);
    let picks: Vec<_> = (0..4u32).map(|quarter| owned.pick(quarter << 30).unwrap()).collect();
    assert_eq!(picks, [0, 1, 2, 3]);
    assert_eq!(owned.pick(u32::MAX), Some(3));
    assert_eq!(OwnedBuckets::new(&table, 9).pick(7), None);
}

fn any_key() -> impl Strategy<Value = [u8; KEY_BYTES]> {
    proptest::array::uniform::<_, KEY_BYTES>(any::<u8>())
}

fn any_outgoing() -> impl Strategy<Value = Outgoing> {
    let v4 = any::<u32>().prop_map(|a| IpAddr::from(a.to_be_bytes()));
    let v6 = any::<u128>().prop_map(|a| IpAddr::from(a.to_be_bytes()));
    let ends = prop_oneof![(v4.clone(), v4), (v6.clone(), v6)].prop_filter("distinct", |(a, b)| a != b);
    let protocol = prop_oneof![Just(6u8), Just(17), Just(1), Just(58), any::<u8>()];
    (ends, any::<u16>(), protocol, any::<u16>()).prop_map(|((own, remote), remote_port, protocol, tenant)| {
        Outgoing { own, remote, remote_port, protocol, tenant }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The solver against the definition: every solution is one, each comes once, none is missing.
    #[test]
    fn solutions_are_complete_and_right(key in any_key(), at in 0usize..18, shift in 0u32..=25, bits in 0u32..=7,
                                        free_bits in 7u32..=16, start: u16, wanted: u32, random: u32) {
        let Some(solver) = PortSolver::new(&key, at * 16, shift, bits, free_bits) else { return Ok(()) };
        let hash = |port: u16| {
            let mut input = [0; 36];
            input[at * 2..at * 2 + 2].copy_from_slice(&port.to_be_bytes());
            rss_hash(&key, &input)
        };
        let mask = (1u32 << bits) - 1;
        let wanted = wanted & mask;
        let block = |port: u16| u32::from(port) >> free_bits;
        let mut seen = std::collections::BTreeSet::new();
        for port in solver.ports(start, hash(start), wanted, random) {
            prop_assert_eq!(hash(port) >> shift & mask, wanted);
            prop_assert_eq!(block(port), block(start));
            prop_assert!(seen.insert(port), "twice: {}", port);
        }
        prop_assert_eq!(seen.len(), 1 << (free_bits - bits), "as many as there are");
    }

    /// Elimination fails exactly when the rank lacks, counted another way (by the span of the columns).
    #[test]
    fn rank_is_found_exactly(key in any_key(), at in 0usize..18, bits in 1u32..=8, free_bits in 8u32..=12) {
        let mut span = std::collections::BTreeSet::from([0u32]);
        for bit in 0..free_bits as usize {
            let column = key_window(&key, at * 16 + 15 - bit) >> 16 & ((1 << bits) - 1);
            let more: Vec<u32> = span.iter().map(|value| value ^ column).collect();
            span.extend(more);
        }
        let full = span.len() == 1 << bits;
        prop_assert_eq!(PortSolver::new(&key, at * 16, 16, bits, free_bits).is_some(), full);
    }

    /// End to end: a reply to the translated flow is steered to the wanted bucket, in both families, whichever
    /// end is the low one, ICMP echo included.
    #[test]
    fn replies_come_to_the_wanted_bucket(seed: u64, flow in any_outgoing(), block: u16, bucket in 0u16..128, random: u32) {
        let (hasher, ports) = ReplyPorts::draw(7, 10, keys(seed).take(64)).unwrap();
        let mut count = 0;
        for port in ports.ports(&hasher, &flow, block, bucket, random).unwrap() {
            let reply = flow.with_port(port).reversed();
            prop_assert_eq!(u16::from(core_bits(hasher.hash(&reply, flow.tenant))), bucket);
            prop_assert_eq!(port >> 10, block >> 10);
            count += 1;
        }
        prop_assert_eq!(count, 8);
    }

    /// The random word reaches every solution as the first.
    #[test]
    fn random_chooses_the_first_port(seed: u64, flow in any_outgoing(), block: u16, bucket in 0u16..128) {
        let (hasher, ports) = ReplyPorts::draw(7, 10, keys(seed).take(64)).unwrap();
        let first: std::collections::BTreeSet<u16> = (0..8)
            .map(|random| ports.ports(&hasher, &flow, block, bucket, random).unwrap().next().unwrap())
            .collect();
        prop_assert_eq!(first.len(), 8);
    }
}
