//! Hashes of tables. Which one a table has depends on who chooses its keys.
//!
//! * Keys that packets bring: [`SecretState`], SipHash-1-3 under a random key. Whoever does not know the key cannot choose
//!   keys that meet in one place. A fast hash with a secret *seed* does not keep that promise: foldhash multiplies by
//!   constants that are the same everywhere, and 8 bytes of an IPv6 address that equal such a constant make the product 0,
//!   whatever the seed. `testing` has these addresses.
//! * Keys that only the configuration brings, looked up by packets: `ConfigState`. Who looks up cannot add anything, so
//!   the longest search is that of the configuration.
//! * The flow table, looked up for every packet: a hash of its own with a proof, in the `hash` module of [`crate::flow`].

use crate::random::Random;
use siphasher::sip::SipHasher13;
use std::hash::BuildHasher;

/// For keys that only the configuration chooses; the same in every process, so that a report is the same too.
pub(crate) type ConfigState = foldhash::fast::FixedState;

/// SipHash-1-3 under a secret key of 128 bits (Aumasson and Bernstein, "SipHash: a fast short-input PRF", 2012).
#[derive(Clone)]
pub struct SecretState {
    key: [u64; 2],
}

impl SecretState {
    /// With a key that is drawn now.
    #[must_use]
    pub fn draw(random: &mut Random) -> Self {
        Self { key: [random.word(), random.word()] }
    }

    /// With a key that anybody can work out, for what talks to no stranger: tests, captures, measurements.
    #[must_use]
    pub const fn of_number(number: u64) -> Self {
        Self { key: [number, !number] }
    }
}

impl std::fmt::Debug for SecretState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SecretState(secret)")
    }
}

impl BuildHasher for SecretState {
    type Hasher = SipHasher13;

    #[inline]
    fn build_hasher(&self) -> SipHasher13 {
        SipHasher13::new_with_keys(self.key[0], self.key[1])
    }
}

/// Keys that meet in one place of a table with a fast hash.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use std::collections::BTreeSet;
    use std::hash::Hash;
    use std::net::{IpAddr, Ipv6Addr};

    /// So many of them.
    pub(crate) const KEYS: u64 = 50_000;

    /// Constant that foldhash 0.2 adds to bytes 8 to 15 of an IPv6 address before it multiplies by them: when they are equal,
    /// nothing before them counts.
    const FOLDHASH_CONSTANT: u64 = 0xc0ac_29b7_c97c_50dd;

    /// One of [`KEYS`] addresses, each in a prefix of its own.
    pub(crate) fn hostile_address(number: u64) -> IpAddr {
        let mut octets = [0x20; 16];
        octets[..8].copy_from_slice(&(0x2001_0db8 << 32 | number).to_be_bytes());
        octets[8..].copy_from_slice(&FOLDHASH_CONSTANT.to_ne_bytes());
        IpAddr::V6(Ipv6Addr::from(octets))
    }

    /// Shows that keys made of these addresses all meet under foldhash with any seed, and hardly any two under `state`:
    /// neither in the bits that choose a group of a table nor in those that tell its members apart.
    #[track_caller]
    pub(crate) fn assert_spreads<K: Hash>(state: &impl BuildHasher, key: impl Fn(IpAddr) -> K) {
        for seed in [0, 1, 0xdead_beef] {
            let fold = foldhash::fast::FixedState::with_seed(seed);
            let met: BTreeSet<u64> = (0..100).map(|n| fold.hash_one(key(hostile_address(n)))).collect();
            assert_eq!(met.len(), 1, "these keys do not test anything");
        }
        let hashes: Vec<u64> = (0..KEYS).map(|n| state.hash_one(key(hostile_address(n)))).collect();
        let places = |bits: fn(u64) -> u64| hashes.iter().map(|hash| bits(*hash)).collect::<BTreeSet<u64>>();
        assert_eq!(places(|hash| hash).len() as u64, KEYS);
        // 50,000 balls in 65,536 places leave some 35,000 of them taken.
        assert!(places(|hash| hash & 0xffff).len() > 34_000);
        assert!(places(|hash| hash >> 57).len() == 128);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::hash::Hasher as _;

    #[test]
    fn the_hash_is_siphash_1_3_under_the_whole_key() {
        // `std`'s own SipHash-1-3 has the key 0.
        let one = SecretState::of_number(0).hash_one(7_u64);
        assert_ne!(one, SecretState { key: [0, 0] }.hash_one(7_u64));
        assert_ne!(one, SecretState { key: [1, !0] }.hash_one(7_u64));
        let mut default = std::hash::DefaultHasher::new();
        default.write_u64(7);
        assert_eq!(SecretState { key: [0, 0] }.hash_one(7_u64), default.finish());
    }
}
