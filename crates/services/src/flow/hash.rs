//! The flow table's own hash: under secret keys, and equal for both directions of an untranslated flow.
//!
//! Not the Toeplitz hash that names the owner core: whoever knows that one's key, or sends what one core owns, must not
//! be able to fill one place of the table.

use crate::random::Random;
use packet::FlowKey;
use std::net::IpAddr;

/// Hashes flow keys under secret keys.
#[derive(Clone, Debug)]
pub(super) struct Hasher {
    keys: [u64; 4],
}

impl Hasher {
    /// Draws the keys.
    pub(super) fn new(random: &mut Random) -> Self {
        Self { keys: std::array::from_fn(|_| random.word()) }
    }

    /// The hash of a key of one tenant. `hash(key, t) == hash(key.reversed(), t)`.
    #[inline]
    pub(super) fn hash(&self, key: &FlowKey, tenant: u16) -> u64 {
        let [k0, k1, k2, k3] = self.keys;
        let protocol = u64::from(key.protocol) << 48;
        let (src_port, dst_port) = (u64::from(key.src_port), u64::from(key.dst_port));
        match (key.src, key.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let src = u64::from(src.to_bits()) << 16 | src_port;
                let dst = u64::from(dst.to_bits()) << 16 | dst_port;
                let (low, high) = (src.min(dst) | protocol, src.max(dst) | u64::from(tenant) << 48);
                fold(fold(low ^ k0, high ^ k1) ^ k2, k3)
            }
            (src, dst) => {
                let (src, dst) = (bits(src), bits(dst));
                let ((low, low_port), (high, high_port)) = if (src, src_port) <= (dst, dst_port) {
                    ((src, src_port), (dst, dst_port))
                } else {
                    ((dst, dst_port), (src, src_port))
                };
                let [low, high] = [low, high].map(|address| ((address >> 64) as u64, address as u64));
                let addresses = fold(low.0 ^ k0, low.1 ^ k1) ^ fold(high.0 ^ k2, high.1 ^ k3).rotate_left(23);
                let rest = low_port << 16 | high_port | u64::from(tenant) << 32 | protocol;
                fold(fold(addresses ^ k1, rest ^ k2) ^ k0, k3)
            }
        }
    }
}

#[inline]
fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

/// Both halves of the product: every bit of either side reaches every bit of the result.
#[inline]
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product as u64 ^ (product >> 64) as u64
}
