//! A Bloom filter of one hash function: which flows may have begun since a batch was looked up.

const WORDS: usize = 16;

/// Set of hashes that forgets nothing until it is cleared and may have more than was put in.
#[derive(Default)]
pub(super) struct BloomFilter {
    bits: [u64; WORDS],
    any: bool,
}

impl BloomFilter {
    pub(super) fn clear(&mut self) {
        if self.any {
            *self = Self::default();
        }
    }

    pub(super) fn add(&mut self, hash: u64) {
        let (word, bit) = place(hash);
        self.bits[word] |= bit;
        self.any = true;
    }

    #[inline]
    pub(super) fn may_have(&self, hash: u64) -> bool {
        let (word, bit) = place(hash);
        self.bits[word] & bit != 0
    }
}

#[inline]
fn place(hash: u64) -> (usize, u64) {
    (hash as usize / 64 % WORDS, 1 << (hash % 64))
}
