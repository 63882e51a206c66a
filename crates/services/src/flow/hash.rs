//! The flow table's own hash: under secret keys, and equal for both directions of an untranslated flow.
//!
//! Not the Toeplitz hash that names the owner core: whoever knows that one's key, or sends what one core owns, must not
//! be able to fill one place of the table. Not SipHash either: it would cost every packet 70 (IPv4) to 90 (IPv6)
//! instructions. A multilinear hash is proven for what the table needs:
//!
//! ```text
//! h = (k[0] + k[1]·c[1] + … + k[n]·c[n]  mod 2^64) >> 32       c: 32-bit characters of the flow key, k: secret 64-bit keys
//! ```
//!
//! For any two different flow keys the pair of their hashes takes each of the 2^64 values with the same probability over
//! the keys (Lemire and Kaser, "Strongly universal string hashing is fast", 2014, theorem 1): let them differ in character
//! i, by d with 0 < |d| < 2^32 = 2^t·odd, t < 32. Whatever the other keys are, `k[i]`·d takes every multiple of 2^t equally
//! often, so its upper 64 - t ≥ 33 bits are uniform; `k[0]` makes one of the hashes uniform besides. So n flow keys chosen
//! by whoever does not know the keys have n²/2^33 pairs with the same hash on average, and meet in a bucket no more often
//! than random ones. What is computed from the 32 bits is a permutation of them, so that keys in an arithmetic progression
//! do not stand in one either.

use crate::random::Random;
use packet::FlowKey;
use std::net::IpAddr;

/// Characters of the longest flow key, IPv6: two addresses, ports, protocol and tenant.
const CHARACTERS: usize = 10;

/// Hashes flow keys under secret keys.
#[derive(Clone)]
pub(super) struct Hasher {
    keys: [u64; CHARACTERS],
    /// `k[0]` of IPv4 and of IPv6.
    starts: [u64; 2],
}

impl std::fmt::Debug for Hasher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hasher(secret)")
    }
}

impl Hasher {
    /// Draws the keys.
    pub(super) fn new(random: &mut Random) -> Self {
        Self { keys: std::array::from_fn(|_| random.word()), starts: [random.word(), random.word()] }
    }

    /// The hash of a key of one tenant: 32 bits, in both halves. `hash(key, t) == hash(key.reversed(), t)`.
    #[inline]
    pub(super) fn hash(&self, key: &FlowKey, tenant: u16) -> u64 {
        let (src_port, dst_port) = (u64::from(key.src_port), u64::from(key.dst_port));
        let sum = match (key.src, key.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let src = u64::from(src.to_bits()) << 16 | src_port;
                let dst = u64::from(dst.to_bits()) << 16 | dst_port;
                let low = src.min(dst) | u64::from(key.protocol) << 48;
                let high = src.max(dst) | u64::from(tenant) << 48;
                let halves = [low as u32, (low >> 32) as u32, high as u32, (high >> 32) as u32];
                self.sum(self.starts[0], halves)
            }
            (src, dst) => {
                let (src, dst) = (bits(src), bits(dst));
                let ((low, low_port), (high, high_port)) = if (src, src_port) <= (dst, dst_port) {
                    ((src, src_port), (dst, dst_port))
                } else {
                    ((dst, dst_port), (src, src_port))
                };
                let [a, b, c, d] = quarters(low);
                let [e, f, g, h] = quarters(high);
                let ports = (low_port as u32) << 16 | high_port as u32;
                let rest = u32::from(key.protocol) << 16 | u32::from(tenant);
                self.sum(self.starts[1], [a, b, c, d, e, f, g, h, ports, rest])
            }
        };
        permuted((sum >> 32) as u32)
    }

    #[inline]
    fn sum<const N: usize>(&self, start: u64, characters: [u32; N]) -> u64 {
        let products =
            self.keys.iter().zip(characters).map(|(key, character)| key.wrapping_mul(u64::from(character)));
        products.fold(start, u64::wrapping_add)
    }
}

/// A permutation of 32 bits: each step can be undone.
#[inline]
fn permuted(hash: u32) -> u64 {
    let hash = (hash ^ hash >> 16).wrapping_mul(0x45d9_f3b3);
    u64::from(hash ^ hash >> 16) * 0x1_0000_0001
}

#[inline]
fn quarters(address: u128) -> [u32; 4] {
    [(address >> 96) as u32, (address >> 64) as u32, (address >> 32) as u32, address as u32]
}

#[inline]
fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::testing::{KEYS, hostile_address};
    use std::collections::BTreeSet;

    /// Each in an order that both sides agree on, the hostile address now the lower and now the higher one.
    fn hostile(number: u64) -> FlowKey {
        let peer = IpAddr::V6(std::net::Ipv6Addr::from_bits(0x2001_0db8_8000 << 80 | 1));
        FlowKey { src: hostile_address(number * 2), dst: peer, src_port: 1, dst_port: 443, protocol: 6 }
    }

    /// Distinct hashes, and the fullest of 2^13 places, by the lower and by the upper bits of the half that counts.
    fn spread(keys: impl Iterator<Item = FlowKey>, hasher: &Hasher) -> (usize, usize) {
        let hashes: Vec<u64> = keys.map(|key| hasher.hash(&key, 0)).collect();
        let mut counts = [vec![0_usize; 1 << 13], vec![0; 1 << 13]];
        for hash in &hashes {
            counts[0][(hash >> 32) as usize & 0x1fff] += 1;
            counts[1][(hash >> 51) as usize] += 1;
        }
        let fullest = counts.iter().flatten().max().copied().unwrap_or(0);
        (hashes.into_iter().collect::<BTreeSet<u64>>().len(), fullest)
    }

    /// Row C2: what strangers choose does not meet in one place, nor do ports and addresses one after the other.
    #[test]
    fn fifty_thousand_chosen_keys_do_not_meet() {
        let plain = |number: u64| FlowKey {
            src: IpAddr::V4(std::net::Ipv4Addr::from_bits(0x0a00_0000 | number as u32 & 0xff)),
            dst: IpAddr::V4(std::net::Ipv4Addr::new(203, 0, 113, 1)),
            src_port: (number >> 8) as u16,
            dst_port: 443,
            protocol: 17,
        };
        for seed in 0..8 {
            let hasher = Hasher::new(&mut Random::of_number(seed));
            for (distinct, fullest) in
                [spread((0..KEYS).map(hostile), &hasher), spread((0..KEYS).map(plain), &hasher)]
            {
                assert!(distinct as u64 >= KEYS - 10, "{distinct} of {KEYS}");
                // Six a place on average; random ones have some 20 in the fullest.
                assert!(fullest <= 32, "{fullest} in a place");
            }
        }
    }

    /// Of two fixed keys, over the secrets: the same hash in 1 of 2^32 cases, the same 8 bits of it in 1 of 256.
    #[test]
    fn two_keys_meet_as_seldom_as_random_ones() {
        let mut random = Random::of_number(3);
        let (one, other) = (hostile(1), hostile(2));
        let (mut low, mut high) = (0, 0);
        for _ in 0..100_000 {
            let hasher = Hasher::new(&mut random);
            let [one, other] = [&one, &other].map(|key| hasher.hash(key, 0) >> 32);
            low += u32::from(one & 0xff == other & 0xff);
            high += u32::from(one >> 24 == other >> 24);
        }
        // 391 ± 20 (one standard deviation).
        assert!((291..=491).contains(&low) && (291..=491).contains(&high), "{low} {high}");
    }
}
