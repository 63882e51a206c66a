//! The Toeplitz hash of receive-side scaling (RSS).
//!
//! Bit `i` of the input (most significant bit of byte 0 is bit 0) selects the 32-bit window of the key
//! that starts at key bit `i`; the hash is the XOR of the selected windows. It follows that the hash is
//! linear: `hash(a ^ b) == hash(a) ^ hash(b)`. [`crate::port_solver`] lives on that.
//!
//! [`rss_hash`] is the definition, bit by bit. [`ToeplitzTable`] is the fast form: one look-up for each
//! input byte. The `rss_input_*` functions lay out a tuple as network cards do:
//! `source address | destination address [| source port | destination port]`, network byte order.
//! The official vectors (five IPv4 and three IPv6 tuples, with and without ports) are in the tests.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

/// Bytes of a Toeplitz key: enough for the longest input, [`INPUT_BYTES_MAX`], plus one 32-bit window.
pub const KEY_BYTES: usize = 40;

/// The longest input of a 40-byte key: two IPv6 addresses and two ports.
pub const INPUT_BYTES_MAX: usize = 36;

/// The key of the official RSS verification suite, which is also most cards' default.
///
/// Public, therefore only for predicting a card; never for our own tables.
pub const RSS_KEY: [u8; KEY_BYTES] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0, 0xd0,
    0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c, 0x6a, 0x42,
    0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];

/// The Toeplitz hash of `input` under `key`, bit by bit: the reference that the fast forms are tested against.
///
/// Key bits past the key's end count as zero, so any lengths are defined.
#[must_use]
pub fn rss_hash(key: &[u8], input: &[u8]) -> u32 {
    let mut hash = 0;
    for (index, byte) in input.iter().enumerate() {
        for bit in 0..8 {
            if byte & (0x80 >> bit) != 0 {
                hash ^= key_window(key, index * 8 + bit);
            }
        }
    }
    hash
}

/// The 32 key bits that start at key bit `first`, most significant bit first.
#[must_use]
pub fn key_window(key: &[u8], first: usize) -> u32 {
    let mut wide: u64 = 0;
    for offset in 0..5 {
        wide = (wide << 8) | u64::from(key.get(first / 8 + offset).copied().unwrap_or(0));
    }
    // 40 bits were gathered from the byte boundary before `first`; keep the 32 that start at `first`.
    ((wide >> (8 - first % 8)) & 0xffff_ffff) as u32
}

/// One 256-entry table for each of 36 input bytes: 36 KiB, of which IPv4 touches the first 12 (with ports).
#[derive(Clone)]
pub struct ToeplitzTable {
    tables: Box<[[u32; 256]; INPUT_BYTES_MAX]>,
}

impl ToeplitzTable {
    /// Builds the tables of a key.
    #[must_use]
    pub fn new(key: &[u8; KEY_BYTES]) -> Self {
        let mut tables = Box::new([[0u32; 256]; INPUT_BYTES_MAX]);
        for (position, table) in tables.iter_mut().enumerate() {
            for value in 1..256usize {
                // Linear: the entry is a known entry with the lowest set bit taken out, plus that bit's window.
                let lowest = value.trailing_zeros() as usize;
                let rest = value & (value - 1);
                table[value] = table[rest] ^ key_window(key, position * 8 + 7 - lowest);
            }
        }
        Self { tables }
    }

    /// The hash of up to [`INPUT_BYTES_MAX`] bytes; bytes after that have no key and do not count.
    #[must_use]
    pub fn hash(&self, input: &[u8]) -> u32 {
        self.tables.iter().zip(input).fold(0, |hash, (table, &byte)| hash ^ table[usize::from(byte)])
    }

    /// `tables()[position][byte]` is what `byte` at input byte `position` adds (by XOR) to the hash.
    #[must_use]
    pub fn tables(&self) -> &[[u32; 256]; INPUT_BYTES_MAX] {
        &self.tables
    }
}

impl fmt::Debug for ToeplitzTable {
    /// The tables spell out the key, which may be secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ToeplitzTable(..)")
    }
}

/// RSS input of an IPv4 packet hashed by addresses alone.
#[must_use]
pub fn rss_input_v4(src: Ipv4Addr, dst: Ipv4Addr) -> [u8; 8] {
    let mut input = [0; 8];
    input[..4].copy_from_slice(&src.octets());
    input[4..].copy_from_slice(&dst.octets());
    input
}

/// RSS input of an IPv4 packet hashed by addresses and ports.
#[must_use]
pub fn rss_input_v4_ports(src: Ipv4Addr, dst: Ipv4Addr, src_port: u16, dst_port: u16) -> [u8; 12] {
    let mut input = [0; 12];
    input[..8].copy_from_slice(&rss_input_v4(src, dst));
    input[8..10].copy_from_slice(&src_port.to_be_bytes());
    input[10..].copy_from_slice(&dst_port.to_be_bytes());
    input
}

/// RSS input of an IPv6 packet hashed by addresses alone.
#[must_use]
pub fn rss_input_v6(src: Ipv6Addr, dst: Ipv6Addr) -> [u8; 32] {
    let mut input = [0; 32];
    input[..16].copy_from_slice(&src.octets());
    input[16..].copy_from_slice(&dst.octets());
    input
}

/// RSS input of an IPv6 packet hashed by addresses and ports.
#[must_use]
pub fn rss_input_v6_ports(src: Ipv6Addr, dst: Ipv6Addr, src_port: u16, dst_port: u16) -> [u8; 36] {
    let mut input = [0; 36];
    input[..32].copy_from_slice(&rss_input_v6(src, dst));
    input[32..34].copy_from_slice(&src_port.to_be_bytes());
    input[34..].copy_from_slice(&dst_port.to_be_bytes());
    input
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use proptest::prelude::*;

    /// Destination, its port, source, its port, hash of the addresses, hash with ports.
    type Row = (&'static str, u16, &'static str, u16, u32, u32);

    const OFFICIAL_V4: [Row; 5] = [
        ("161.142.100.80", 1766, "66.9.149.187", 2794, 0x323e_8fc2, 0x51cc_c178),
        ("65.69.140.83", 4739, "199.92.111.2", 14230, 0xd718_262a, 0xc626_b0ea),
        ("12.22.207.184", 38024, "24.19.198.95", 12898, 0xd2d0_a5de, 0x5c2b_394a),
        ("209.142.163.6", 2217, "38.27.205.30", 48228, 0x8298_9176, 0xafc7_327f),
        ("202.188.127.2", 1303, "153.39.163.191", 44251, 0x5d18_09c5, 0x10e8_28a2),
    ];

    const OFFICIAL_V6: [Row; 3] = [
        ("3ffe:2501:200:3::1", 1766, "3ffe:2501:200:1fff::7", 2794, 0x2cc1_8cd5, 0x4020_7d3d),
        ("ff02::1", 4739, "3ffe:501:8::260:97ff:fe40:efab", 14230, 0x0f0c_461c, 0xdde5_1bbf),
        (
            "fe80::200:f8ff:fe21:67cf",
            38024,
            "3ffe:1900:4545:3:200:f8ff:fe21:67cf",
            44251,
            0x4b61_e985,
            0x02d1_feef,
        ),
    ];

    fn check(input: &[u8], expected: u32) {
        assert_eq!(rss_hash(&RSS_KEY, input), expected, "{input:02x?}");
        assert_eq!(ToeplitzTable::new(&RSS_KEY).hash(input), expected, "{input:02x?}");
    }

    #[test]
    fn official_vectors_ipv4() {
        for (dst, dst_port, src, src_port, addresses, ports) in OFFICIAL_V4 {
            let (dst, src) = (dst.parse().unwrap(), src.parse().unwrap());
            check(&rss_input_v4(src, dst), addresses);
            check(&rss_input_v4_ports(src, dst, src_port, dst_port), ports);
        }
    }

    #[test]
    fn official_vectors_ipv6() {
        for (dst, dst_port, src, src_port, addresses, ports) in OFFICIAL_V6 {
            let (dst, src) = (dst.parse().unwrap(), src.parse().unwrap());
            check(&rss_input_v6(src, dst), addresses);
            check(&rss_input_v6_ports(src, dst, src_port, dst_port), ports);
        }
    }

    /// The well-known symmetric key (16-bit period) gives both directions one hash.
    #[test]
    fn periodic_key_is_symmetric() {
        let key = [[0x6d, 0x5a]; 20].concat();
        let expected = [0x9fcc_9fcc, 0x60d7_60d7, 0x3a3e_3a3e, 0xd26e_d26e, 0xf23e_f23e];
        for ((dst, dst_port, src, src_port, ..), expected) in OFFICIAL_V4.into_iter().zip(expected) {
            let (dst, src) = (dst.parse().unwrap(), src.parse().unwrap());
            assert_eq!(rss_hash(&key, &rss_input_v4_ports(src, dst, src_port, dst_port)), expected);
            assert_eq!(rss_hash(&key, &rss_input_v4_ports(dst, src, dst_port, src_port)), expected);
        }
    }

    #[test]
    fn short_keys_and_long_inputs_are_defined() {
        assert_eq!(rss_hash(&[], &[0xff; 64]), 0);
        assert_eq!(rss_hash(&[0x80], &[0x80]), 0x8000_0000);
        let table = ToeplitzTable::new(&RSS_KEY);
        assert_eq!(table.hash(&[0xff; 64]), table.hash(&[0xff; INPUT_BYTES_MAX]));
        assert_eq!(table.hash(&[]), 0);
    }

    fn key() -> impl Strategy<Value = [u8; KEY_BYTES]> {
        proptest::array::uniform::<_, KEY_BYTES>(any::<u8>())
    }

    fn input() -> impl Strategy<Value = [u8; INPUT_BYTES_MAX]> {
        proptest::array::uniform::<_, INPUT_BYTES_MAX>(any::<u8>())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn table_equals_reference(key in key(), input in input(), len in 0..=INPUT_BYTES_MAX) {
            let input = &input[..len];
            prop_assert_eq!(ToeplitzTable::new(&key).hash(input), rss_hash(&key, input));
        }

        #[test]
        fn hash_is_linear(key in key(), a in input(), b in input()) {
            let table = ToeplitzTable::new(&key);
            let sum: Vec<u8> = a.iter().zip(&b).map(|(a, b)| a ^ b).collect();
            prop_assert_eq!(table.hash(&sum), table.hash(&a) ^ table.hash(&b));
        }
    }
}
