//! Data that cannot be mistaken for other data, and the check that it arrived as it was sent.

use std::sync::OnceLock;

use fastrand::Rng;
use ring::digest::{Context, SHA256};

/// Bytes of one block. Every block of every stream differs from every other.
pub const BLOCK_BYTES: usize = 64 * 1024;

/// An endless stream of blocks, the same for the same seed.
#[derive(Debug)]
pub struct Pattern {
    block: Vec<u8>,
    seed: u64,
    number: u64,
}

impl Pattern {
    /// A stream of its own for each seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut block = vec![0; BLOCK_BYTES];
        Rng::with_seed(seed).fill(&mut block);
        Self { block, seed, number: 0 }
    }

    /// The next block. Each 4 KiB of it carry its number, so that a missing, doubled or exchanged piece changes the hash.
    pub fn next_block(&mut self) -> &[u8] {
        let stamp = (self.number ^ self.seed.rotate_left(32)).to_be_bytes();
        for page in self.block.chunks_mut(4096) {
            page[..8].copy_from_slice(&stamp);
        }
        self.number += 1;
        &self.block
    }
}

/// Longest [`body`].
pub const BODY_BYTES_MAX: usize = 1 << 20;

/// `bytes` bytes that do not repeat, others for each seed; at most [`BODY_BYTES_MAX`].
#[must_use]
pub fn body(seed: u64, bytes: usize) -> &'static [u8] {
    static BLOCK: OnceLock<Vec<u8>> = OnceLock::new();
    let block = BLOCK.get_or_init(|| {
        let mut block = vec![0; 2 * BODY_BYTES_MAX];
        Rng::with_seed(0x0062_6f64_7900).fill(&mut block);
        block
    });
    let bytes = bytes.min(BODY_BYTES_MAX);
    let from = Rng::with_seed(seed).usize(..block.len() - bytes);
    &block[from..from + bytes]
}

/// SHA-256 and length of everything that passed one end of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest {
    /// Number of bytes.
    pub bytes: u64,
    /// Their hash.
    pub sha256: [u8; 32],
}

/// Computes a [`Digest`] piece by piece.
pub struct Digester {
    context: Context,
    bytes: u64,
}

impl std::fmt::Debug for Digester {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Digester").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl Default for Digester {
    fn default() -> Self {
        Self { context: Context::new(&SHA256), bytes: 0 }
    }
}

impl Digester {
    /// The next bytes of the stream.
    pub fn update(&mut self, bytes: &[u8]) {
        self.context.update(bytes);
        self.bytes += bytes.len() as u64;
    }

    /// The result.
    #[must_use]
    pub fn finish(self) -> Digest {
        let mut sha256 = [0; 32];
        sha256.copy_from_slice(self.context.finish().as_ref());
        Digest { bytes: self.bytes, sha256 }
    }
}

/// A fast keyed 64-bit checksum of one datagram: every bit of the input changes about half of the output's.
/// It finds accidents, which is what it is for; it is no defence against somebody.
#[must_use]
pub fn checksum(key: u64, bytes: &[u8]) -> u64 {
    const ODD: u64 = 0x9fb2_1c65_1e98_df25;
    let mut sum = key ^ (bytes.len() as u64).wrapping_mul(ODD);
    let mut chunks = bytes.chunks_exact(8);
    for chunk in &mut chunks {
        let mut word = [0; 8];
        word.copy_from_slice(chunk);
        sum = (sum ^ u64::from_le_bytes(word)).wrapping_mul(ODD).rotate_left(29);
    }
    let mut last = [0; 8];
    last[..chunks.remainder().len()].copy_from_slice(chunks.remainder());
    sum = (sum ^ u64::from_le_bytes(last)).wrapping_mul(ODD);
    sum ^= sum >> 32;
    sum = sum.wrapping_mul(ODD);
    sum ^ (sum >> 29)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_changes_the_checksum() {
        let mut bytes: Vec<u8> = (0..131u32).map(|i| (i * 7) as u8).collect();
        let good = checksum(1, &bytes);
        assert_ne!(good, checksum(2, &bytes));
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(good, checksum(1, &bytes), "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        assert_ne!(good, checksum(1, &bytes[..130]));
    }

    #[test]
    fn blocks_differ_and_the_digest_sees_their_order() {
        let (mut a, mut b) = (Pattern::new(1), Pattern::new(2));
        let (one, two) = (a.next_block().to_vec(), a.next_block().to_vec());
        assert_ne!(one, two);
        assert_ne!(one, b.next_block());
        let digest = |blocks: [&[u8]; 2]| {
            let mut d = Digester::default();
            blocks.iter().for_each(|b| d.update(b));
            d.finish()
        };
        assert_eq!(digest([&one, &two]), digest([&one, &two]));
        assert_ne!(digest([&one, &two]), digest([&two, &one]));
        assert_eq!(digest([&one, &two]).bytes, 2 * BLOCK_BYTES as u64);
    }
}
