//! A bucket of the index: eight entries in one cache line.

/// Entries in a bucket.
pub(super) const BUCKET: usize = 8;

/// Reference of an entry: what it refers to. Never 0: that is an empty entry.
pub(super) type Reference = u32;

/// Hashes and references apart, so that a processor compares eight of them at once.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Bucket {
    hashes: [u32; BUCKET],
    references: [Reference; BUCKET],
}

const _: () = assert!(size_of::<Bucket>() == 64);

impl Bucket {
    pub(super) const EMPTY: Self = Self { hashes: [0; BUCKET], references: [0; BUCKET] };

    /// Places of entries with this hash, empty ones perhaps among them.
    #[inline]
    pub(super) fn hits(&self, hash: u32) -> Places {
        Places::of(&self.hashes, hash)
    }

    /// Empty places.
    #[inline]
    pub(super) fn empties(&self) -> Places {
        Places::of(&self.references, 0)
    }

    /// Reference at a place; 0 for nothing.
    #[inline]
    pub(super) fn reference(&self, place: usize) -> Reference {
        self.references.get(place).copied().unwrap_or(0)
    }

    /// Where this reference is.
    pub(super) fn position(&self, reference: Reference) -> Option<usize> {
        Places::of(&self.references, reference).next()
    }

    /// All places with hash and reference, empty ones too.
    #[inline]
    pub(super) fn places(&self) -> impl Iterator<Item = (u32, Reference)> + use<> {
        self.hashes.into_iter().zip(self.references)
    }

    /// Writes a place.
    #[inline]
    pub(super) fn set(&mut self, place: usize, hash: u32, reference: Reference) {
        if let (Some(here), Some(slot)) = (self.hashes.get_mut(place), self.references.get_mut(place)) {
            *here = hash;
            *slot = reference;
        }
    }
}

/// A set of places in a bucket, from the lowest on: one bit each.
#[derive(Clone, Copy)]
pub(super) struct Places(u32);

impl Places {
    #[inline]
    fn of(words: &[u32; BUCKET], wanted: u32) -> Self {
        Self(equal(words, wanted))
    }

    #[inline]
    pub(super) fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// A bit for each word that is the wanted one, without a branch.
#[inline]
fn equal(words: &[u32; BUCKET], wanted: u32) -> u32 {
    words.iter().enumerate().fold(0, |bits, (at, word)| bits | u32::from(*word == wanted) << at)
}

impl Iterator for Places {
    type Item = usize;

    #[inline]
    fn next(&mut self) -> Option<usize> {
        if self.0 == 0 {
            return None;
        }
        let place = self.0.trailing_zeros() as usize;
        self.0 &= self.0 - 1;
        Some(place)
    }
}
