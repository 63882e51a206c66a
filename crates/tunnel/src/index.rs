//! Receiver indices: which machine and which session a datagram is for, unreadable to others.
//!
//! index = P(node:12 | local:20) under a secret key, where P is a keyed permutation of 32 bits: a clustered
//! hub brings all datagrams of a bond to one machine by undoing P, and an observer can neither count nodes
//! and sessions nor tell which indices belong together. The local number names peer and key epoch.
//!
//! P is a Feistel network of eight rounds over 16-bit halves with SipHash-2-4 as round function. It hides
//! structure; it does not authenticate anything (the AEAD does).

use std::hash::{BuildHasher, Hasher};

/// Nodes that fit: 0..4096.
pub const NODES_MAX: u16 = 1 << 12;
/// Local numbers that fit: 0..2^20.
pub const LOCALS_MAX: u32 = 1 << 20;

const ROUNDS: u64 = 8;

/// The keyed permutation. One key per cluster (or per process, for a node on its own); never told to peers.
#[derive(Clone)]
pub struct IndexCipher {
    key: [u64; 2],
}

impl std::fmt::Debug for IndexCipher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("IndexCipher(secret)")
    }
}

impl IndexCipher {
    /// A permutation from a random key.
    #[must_use]
    pub fn new(key: [u8; 16]) -> Self {
        let all = u128::from_le_bytes(key);
        Self { key: [all as u64, (all >> 64) as u64] }
    }

    /// The permutation of a cluster, from the key by which its units are chosen: all units have it, and no peer.
    #[must_use]
    pub fn of_cluster(key: &[u8]) -> Self {
        let mut context = ring::digest::Context::new(&ring::digest::SHA256);
        context.update(b"anabranch receiver index");
        context.update(key);
        let digest = context.finish();
        Self::new(digest.as_ref().first_chunk().copied().unwrap_or_default())
    }

    /// The index of a local number at a node. Higher bits than [`NODES_MAX`] and [`LOCALS_MAX`] allow are cut off.
    #[must_use]
    pub fn index(&self, node: u16, local: u32) -> u32 {
        let plain = u32::from(node & (NODES_MAX - 1)) << 20 | (local & (LOCALS_MAX - 1));
        let (mut left, mut right) = ((plain >> 16) as u16, plain as u16);
        for round in 0..ROUNDS {
            (left, right) = (right, left ^ self.round(round, right));
        }
        u32::from(left) << 16 | u32::from(right)
    }

    /// Node and local number of an index. Every index has exactly one pair.
    #[must_use]
    pub fn parts(&self, index: u32) -> (u16, u32) {
        let (mut left, mut right) = ((index >> 16) as u16, index as u16);
        for round in (0..ROUNDS).rev() {
            (left, right) = (right ^ self.round(round, left), left);
        }
        let plain = u32::from(left) << 16 | u32::from(right);
        ((plain >> 20) as u16, plain & (LOCALS_MAX - 1))
    }

    fn round(&self, round: u64, half: u16) -> u16 {
        siphash_2_4(self.key, round << 16 | u64::from(half)) as u16
    }
}

/// Hash of a table whose keys are indices that [`IndexCipher::index`] made: they are as good as random already, and nobody
/// else can choose any. Datagrams only look up.
#[derive(Clone, Copy, Debug, Default)]
pub struct IndexState;

impl BuildHasher for IndexState {
    type Hasher = IndexHasher;

    #[inline]
    fn build_hasher(&self) -> IndexHasher {
        IndexHasher(0)
    }
}

/// Repeats the index in both halves: tables take the place from the lower bits and a tag from the upper ones.
#[derive(Clone, Copy, Debug)]
pub struct IndexHasher(u64);

impl Hasher for IndexHasher {
    #[inline]
    fn write_u32(&mut self, index: u32) {
        self.0 = u64::from(index) << 32 | u64::from(index.rotate_left(16));
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    #[inline]
    fn finish(&self) -> u64 {
        self.0
    }
}

/// SipHash-2-4 of the eight little-endian bytes of `message`.
pub(crate) fn siphash_2_4(key: [u64; 2], message: u64) -> u64 {
    let mut v = [
        key[0] ^ 0x736f_6d65_7073_6575,
        key[1] ^ 0x646f_7261_6e64_6f6d,
        key[0] ^ 0x6c79_6765_6e65_7261,
        key[1] ^ 0x7465_6462_7974_6573,
    ];
    // The second word carries the length of the message in its top byte.
    for word in [message, 8 << 56] {
        v[3] ^= word;
        sip_round(&mut v);
        sip_round(&mut v);
        v[0] ^= word;
    }
    v[2] ^= 0xff;
    for _ in 0..4 {
        sip_round(&mut v);
    }
    v[0] ^ v[1] ^ v[2] ^ v[3]
}

fn sip_round(v: &mut [u64; 4]) {
    v[0] = v[0].wrapping_add(v[1]);
    v[1] = v[1].rotate_left(13) ^ v[0];
    v[0] = v[0].rotate_left(32);
    v[2] = v[2].wrapping_add(v[3]);
    v[3] = v[3].rotate_left(16) ^ v[2];
    v[0] = v[0].wrapping_add(v[3]);
    v[3] = v[3].rotate_left(21) ^ v[0];
    v[2] = v[2].wrapping_add(v[1]);
    v[1] = v[1].rotate_left(17) ^ v[2];
    v[2] = v[2].rotate_left(32);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::hash::Hasher;

    proptest! {
        // A function with an inverse on both sides is a bijection.
        #[test]
        fn parts_undo_index(key: [u8; 16], node in 0..NODES_MAX, local in 0..LOCALS_MAX) {
            let cipher = IndexCipher::new(key);
            prop_assert_eq!(cipher.parts(cipher.index(node, local)), (node, local));
        }

        #[test]
        fn index_undoes_parts(key: [u8; 16], index: u32) {
            let cipher = IndexCipher::new(key);
            let (node, local) = cipher.parts(index);
            prop_assert!(node < NODES_MAX && local < LOCALS_MAX);
            prop_assert_eq!(cipher.index(node, local), index);
        }

        #[test]
        #[allow(deprecated, reason = "the standard library's SipHash-2-4 is only reachable this way")]
        fn round_function_is_siphash(key: [u64; 2], message: u64) {
            let mut reference = std::hash::SipHasher::new_with_keys(key[0], key[1]);
            reference.write(&message.to_le_bytes());
            prop_assert_eq!(siphash_2_4(key, message), reference.finish());
        }
    }

    #[test]
    fn no_two_locals_share_an_index() {
        let cipher = IndexCipher::new([7; 16]);
        let mut seen = std::collections::BTreeSet::new();
        for local in 0..20_000 {
            assert!(seen.insert(cipher.index(3, local)));
        }
    }

    #[test]
    fn neighbours_look_unrelated() {
        // Each flipped input bit should flip about half of the 32 output bits.
        let cipher = IndexCipher::new([9; 16]);
        for bit in 0..20 {
            let flips: u32 = (0..256)
                .map(|local| (cipher.index(1, local) ^ cipher.index(1, local ^ 1 << bit)).count_ones())
                .sum();
            let mean = f64::from(flips) / 256.0;
            assert!((14.0..18.0).contains(&mean), "bit {bit}: {mean} flips");
        }
    }

    #[test]
    fn another_key_is_another_permutation() {
        let (one, two) = (IndexCipher::new([1; 16]), IndexCipher::new([2; 16]));
        let same = (0..1000).filter(|local| one.index(0, *local) == two.index(0, *local)).count();
        assert!(same < 3, "{same} of 1000 indices equal under two keys");
    }
}
