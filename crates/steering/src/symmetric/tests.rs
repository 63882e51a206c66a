#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::toeplitz::{RSS_KEY, rss_hash};
use proptest::prelude::*;

fn flow(src: &str, src_port: u16, dst: &str, dst_port: u16, protocol: u8) -> FlowKey {
    FlowKey { src: src.parse().unwrap(), dst: dst.parse().unwrap(), src_port, dst_port, protocol }
}

/// Key byte `i` is `37 * (7 * i + 1)`, modulo 256.
fn test_key() -> [u8; KEY_BYTES] {
    std::array::from_fn(|i| ((7 * i + 1) * 37) as u8)
}

/// Calculated from the module page's definition by a program apart from this one. A change here is a change
/// of the protocol: peers and BPF programs calculate these numbers too.
#[test]
fn published_vectors() {
    let rows = [
        (flow("10.0.0.5", 1234, "1.2.3.4", 443, 6), 0, 0x0d34_94f0, 0x1476_78f1),
        (flow("10.0.0.5", 1234, "1.2.3.4", 443, 17), 0, 0xc3d3_5a17, 0xda91_b616),
        (flow("10.0.0.5", 1234, "1.2.3.4", 443, 6), 7, 0xfab8_30ab, 0xe3fa_dcaa),
        (flow("192.0.2.1", 9, "192.0.2.1", 7, 17), 65535, 0xb60f_e9ea, 0xd6a3_22c6),
        (flow("198.51.100.7", 0, "203.0.113.9", 0, 47), 0, 0x585c_501e, 0x1eb3_43cc),
        (flow("2001:db8::1", 51820, "2001:db8:ffff::2", 53, 17), 0, 0xa9b3_4e6f, 0xfff3_25b4),
        (flow("fe80::2", 0, "fe80::1", 4660, 58), 3, 0x69dc_9a2f, 0xd617_3728),
    ];
    let (ours, rss) = (FlowHasher::new(test_key()), FlowHasher::new(RSS_KEY));
    for (flow, tenant, with_test_key, with_rss_key) in rows {
        assert_eq!(ours.hash(&flow, tenant), with_test_key, "{flow:?}");
        assert_eq!(rss.hash(&flow, tenant), with_rss_key, "{flow:?}");
        assert_eq!(ours.hash(&flow.reversed(), tenant), with_test_key, "{flow:?} reversed");
    }
}

#[test]
fn mix_vectors() {
    assert_eq!(mix(0, 0), 0);
    assert_eq!(mix(6, 0), 0xda26_da26);
    assert_eq!(mix(17, 0), 0x14c1_14c1);
    assert_eq!(mix(6, 1), 0x785d_01ec);
    assert_eq!(mix(255, 65535), 0x12c8_9487);
}

/// Tenants of equal address plans must not meet in the same buckets, on either level.
#[test]
fn mix_spreads_tenants_and_protocols_over_both_levels() {
    for protocol in [1, 6, 17, 47, 50, 58, 132] {
        let mut cores = [0u32; 128];
        let mut nodes = vec![0u8; 65536];
        for tenant in 0..=u16::MAX {
            let hash = mix(protocol, tenant);
            cores[usize::from(core_bits(hash))] += 1;
            nodes[usize::from(node_bits(hash))] |= 1;
        }
        // 512 tenants a core bucket on average.
        assert!(cores.iter().all(|n| (480..=544).contains(n)), "protocol {protocol}: {cores:?}");
        let used = nodes.iter().filter(|n| **n == 1).count();
        assert!(used > 40_000, "protocol {protocol}: {used} node buckets (a random map reaches 41,400)");
    }
    let distinct: std::collections::BTreeSet<u8> = (0..=255).map(|p| core_bits(mix(p, 0))).collect();
    assert!(distinct.len() > 100, "{}", distinct.len());
}

#[test]
fn bits_of_the_two_levels() {
    let hash = 0xffb5_1234;
    assert_eq!((node_bits(hash), core_bits(hash)), (0x1234, 0x35));
    assert_eq!((node_bucket(hash, 65536), node_bucket(hash, 4096)), (0x1234, 0x234));
    assert_eq!((core_bucket(hash, 128), core_bucket(hash, 2), core_bucket(hash, 65536)), (0x35, 1, 0xffb5));
    assert_eq!((core_bucket(hash, 1), node_bucket(hash, 1)), (0, 0));
}

#[test]
fn debug_shows_no_key() {
    let shown = format!("{:?}", FlowHasher::new([0xab; KEY_BYTES]));
    assert_eq!(shown, "FlowHasher(..)");
}

/// 65,536 flows of one client to one server, only the source port differs: every core bucket gets some share
/// under every one of these keys that has the rank (here: none of them lacks it).
#[test]
fn ports_alone_spread_over_all_core_buckets() {
    for salt in 0..8u8 {
        let hasher = FlowHasher::new(test_key().map(|byte| byte.wrapping_mul(31) ^ salt.wrapping_mul(89)));
        let mut counts = [0u32; 128];
        for port in 0..=u16::MAX {
            let hash = hasher.hash(&flow("192.0.2.7", port, "198.51.100.1", 443, 6), 0);
            counts[usize::from(core_bits(hash))] += 1;
        }
        assert!(counts.iter().all(|n| *n > 0), "salt {salt}: {counts:?}");
    }
}

/// The definition once more, written as it stands on the module page, over the bitwise reference.
fn by_definition(key: &[u8; KEY_BYTES], flow: &FlowKey, tenant: u16) -> u32 {
    let octets = |address: IpAddr| match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    };
    let mut ends = [(octets(flow.src), flow.src_port), (octets(flow.dst), flow.dst_port)];
    ends.sort();
    let [(low, low_port), (high, high_port)] = ends;
    let input = [low, high, low_port.to_be_bytes().to_vec(), high_port.to_be_bytes().to_vec()].concat();
    rss_hash(key, &input) ^ mix(flow.protocol, tenant)
}

fn any_key() -> impl Strategy<Value = [u8; KEY_BYTES]> {
    proptest::array::uniform::<_, KEY_BYTES>(any::<u8>())
}

fn any_flow() -> impl Strategy<Value = FlowKey> {
    // Narrow ranges make equal addresses and ports frequent.
    let v4 = prop_oneof![any::<u32>(), 0u32..3].prop_map(|a| IpAddr::from(a.to_be_bytes()));
    let v6 = prop_oneof![any::<u128>(), 0u128..3].prop_map(|a| IpAddr::from(a.to_be_bytes()));
    let ends = prop_oneof![(v4.clone(), v4), (v6.clone(), v6)];
    let port = || prop_oneof![any::<u16>(), 0u16..3];
    (ends, port(), port(), any::<u8>()).prop_map(|((src, dst), src_port, dst_port, protocol)| FlowKey {
        src,
        dst,
        src_port,
        dst_port,
        protocol,
    })
}

proptest! {
    #[test]
    fn equals_the_definition(key in any_key(), flow in any_flow(), tenant: u16) {
        prop_assert_eq!(FlowHasher::new(key).hash(&flow, tenant), by_definition(&key, &flow, tenant));
    }

    #[test]
    fn forward_and_reverse_are_equal(key in any_key(), flow in any_flow(), tenant: u16) {
        let hasher = FlowHasher::new(key);
        let reverse = FlowKey {
            src: flow.dst, dst: flow.src, src_port: flow.dst_port, dst_port: flow.src_port, protocol: flow.protocol,
        };
        prop_assert_eq!(hasher.hash(&flow, tenant), hasher.hash(&reverse, tenant));
    }

    /// Linear (affine) in the ports as long as the order of the endpoints stays.
    #[test]
    fn port_changes_add_up(key in any_key(), flow in any_flow(), a: u16, b: u16, tenant: u16) {
        prop_assume!(flow.src != flow.dst);
        let hasher = FlowHasher::new(key);
        let with = |port: u16| hasher.hash(&FlowKey { src_port: flow.src_port ^ port, ..flow }, tenant);
        prop_assert_eq!(with(a ^ b), with(a) ^ with(b) ^ with(0));
    }

    #[test]
    fn tenant_and_protocol_act_apart_from_the_key(key in any_key(), flow in any_flow(), t1: u16, t2: u16, other: u8) {
        let hasher = FlowHasher::new(key);
        let changed = FlowKey { protocol: other, ..flow };
        prop_assert_eq!(
            hasher.hash(&flow, t1) ^ hasher.hash(&changed, t2),
            mix(flow.protocol, t1) ^ mix(other, t2)
        );
        prop_assert_eq!(mix(flow.protocol, t1) == mix(other, t2), (flow.protocol, t1) == (other, t2));
    }

    /// No packet mixes families, but a flow key typed by a person may: defined, symmetric, no panic.
    #[test]
    fn mixed_families_are_hashed_as_ipv6(key in any_key(), a: u32, b: u128, p: u16, q: u16) {
        let hasher = FlowHasher::new(key);
        let mixed = FlowKey { src: Ipv4Addr::from(a).into(), dst: Ipv6Addr::from(b).into(), src_port: p, dst_port: q, protocol: 6 };
        let mapped = FlowKey { src: Ipv4Addr::from(a).to_ipv6_mapped().into(), ..mixed };
        prop_assert_eq!(hasher.hash(&mixed, 0), hasher.hash(&mapped, 0));
    }
}
