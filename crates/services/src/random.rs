//! Random numbers that nobody can foretell: seeds of hash tables, ports of NAT, choices among backends.
//!
//! Who sees some of them, as the remote end of a flow sees its port, learns nothing about the others. The same seed gives
//! the same numbers, for tests and simulations; a gateway's comes from the system.

use chacha20::ChaCha12Rng;
use chacha20::rand_core::{Rng as _, SeedableRng as _};

/// Bytes of a seed.
pub const SEED_BYTES: usize = 32;

/// Generator of one core's random numbers: ChaCha with 12 rounds.
#[derive(Debug)]
pub struct Random(ChaCha12Rng);

impl Random {
    /// A generator with a secret seed of the system's.
    #[must_use]
    pub fn new(seed: [u8; SEED_BYTES]) -> Self {
        Self(ChaCha12Rng::from_seed(seed))
    }

    /// A generator whose numbers anybody can work out, for what talks to no stranger: tests, captures, measurements.
    #[must_use]
    pub fn of_number(number: u64) -> Self {
        let mut seed = [0; SEED_BYTES];
        if let Some(first) = seed.first_chunk_mut() {
            *first = number.to_le_bytes();
        }
        Self::new(seed)
    }

    /// The next 64 random bits.
    #[inline]
    pub fn word(&mut self) -> u64 {
        self.0.next_u64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_its_numbers_and_another_does_not() {
        let words = |number| {
            let mut random = Random::of_number(number);
            [(); 100].map(|()| random.word())
        };
        assert_eq!(words(7), words(7));
        let mut all: Vec<u64> = words(7).into_iter().chain(words(8)).collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 200);
    }

    /// ChaCha with 12 rounds and a key of zeros, block 0: the first words of its key stream (draft-strombergson-chacha-test-vectors,
    /// TC1, 256 bits).
    #[test]
    fn the_numbers_are_chachas() {
        let mut random = Random::new([0; SEED_BYTES]);
        let stream =
            [0x9b, 0xf4, 0x9a, 0x6a, 0x07, 0x55, 0xf9, 0x53, 0x81, 0x1f, 0xce, 0x12, 0x5f, 0x26, 0x83, 0xd5];
        let (first, second) = (random.word().to_le_bytes(), random.word().to_le_bytes());
        assert_eq!([first, second].concat(), stream);
    }
}
