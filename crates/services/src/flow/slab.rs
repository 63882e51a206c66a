//! Where flows lie: chunks that never move, with a bitmap of what is taken.

use packet::prefetch;

/// Entries in a chunk: large enough for some huge pages.
pub(super) const CHUNK: usize = 65_536;
const WORDS: usize = CHUNK / 64;

/// Two entries: what every packet needs, and what it needs less (`C`) behind that. So the former fill whole lines, and
/// the latter are not in another page.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Pair<T, C> {
    hot: [T; 2],
    cold: [C; 2],
}

struct Chunk<T, C> {
    pairs: Vec<Pair<T, C>>,
    /// A bit for each entry that is taken.
    taken: Box<[u64; WORDS]>,
    /// A bit for each word of `taken` with room.
    room: [u64; WORDS / 64],
    live: u32,
}

impl<T: Copy + Default, C: Copy + Default> Chunk<T, C> {
    fn new() -> Self {
        Self { pairs: Vec::new(), taken: Box::new([0; WORDS]), room: [u64::MAX; WORDS / 64], live: 0 }
    }

    /// Takes the lowest free place.
    fn insert(&mut self, hot: T, cold: C) -> Option<usize> {
        let word = lowest(&self.room)?;
        let bits = self.taken.get_mut(word)?;
        let at = word * 64 + bits.trailing_ones() as usize;
        *bits |= *bits + 1;
        if *bits == u64::MAX {
            set(&mut self.room, word, false);
        }
        self.live += 1;
        if self.pairs.capacity() == 0 {
            // Once for all: pages are touched when they are used.
            self.pairs.reserve_exact(CHUNK / 2);
        }
        // The lowest free place is taken, so it is at most the one behind the last.
        if at / 2 == self.pairs.len() {
            self.pairs.push(Pair::default());
        }
        *self.hot_mut(at)? = hot;
        *self.cold_mut(at)? = cold;
        Some(at)
    }

    #[inline]
    fn hot(&self, at: usize) -> Option<&T> {
        self.pairs.get(at / 2)?.hot.get(at % 2)
    }

    #[inline]
    fn hot_mut(&mut self, at: usize) -> Option<&mut T> {
        self.pairs.get_mut(at / 2)?.hot.get_mut(at % 2)
    }

    #[inline]
    fn cold(&self, at: usize) -> Option<&C> {
        self.pairs.get(at / 2)?.cold.get(at % 2)
    }

    #[inline]
    fn cold_mut(&mut self, at: usize) -> Option<&mut C> {
        self.pairs.get_mut(at / 2)?.cold.get_mut(at % 2)
    }

    fn contains(&self, at: usize) -> bool {
        self.taken.get(at / 64).is_some_and(|bits| bits >> (at % 64) & 1 != 0)
    }

    fn remove(&mut self, at: usize) -> Option<(T, C)> {
        if !self.contains(at) {
            return None;
        }
        let removed = (std::mem::take(self.hot_mut(at)?), std::mem::take(self.cold_mut(at)?));
        *self.taken.get_mut(at / 64)? &= !(1 << (at % 64));
        set(&mut self.room, at / 64, true);
        self.live -= 1;
        Some(removed)
    }
}

/// The number of the lowest bit that is set.
fn lowest(words: &[u64]) -> Option<usize> {
    let (at, bits) = words.iter().enumerate().find(|(_, bits)| **bits != 0)?;
    Some(at * 64 + bits.trailing_zeros() as usize)
}

fn set(words: &mut [u64], number: usize, value: bool) {
    if let Some(bits) = words.get_mut(number / 64) {
        let bit = 1 << (number % 64);
        *bits = if value { *bits | bit } else { *bits & !bit };
    }
}

/// Entries by number.
pub(super) struct Slab<T, C> {
    chunks: Vec<Chunk<T, C>>,
    /// A bit for each chunk with room.
    room: Vec<u64>,
}

impl<T: Copy + Default, C: Copy + Default> Slab<T, C> {
    /// An empty one; the list of chunks for `entries_max` is set aside, but not touched.
    pub(super) fn new(entries_max: usize) -> Self {
        let chunks_max = entries_max.div_ceil(CHUNK);
        Self { chunks: Vec::with_capacity(chunks_max), room: Vec::with_capacity(chunks_max.div_ceil(64)) }
    }

    /// Numbers of entries are below this.
    pub(super) fn end(&self) -> usize {
        self.chunks.len() * CHUNK
    }

    /// Takes the free entry of the lowest chunk with room, so that the last chunks run empty when flows get fewer.
    pub(super) fn insert(&mut self, hot: T, cold: C) -> Option<usize> {
        let number = match lowest(&self.room) {
            Some(number) => number,
            None => {
                let number = self.chunks.len();
                self.chunks.push(Chunk::new());
                if number == self.room.len() * 64 {
                    self.room.push(0);
                }
                set(&mut self.room, number, true);
                number
            }
        };
        let chunk = self.chunks.get_mut(number)?;
        let at = chunk.insert(hot, cold)?;
        if chunk.live as usize == CHUNK {
            set(&mut self.room, number, false);
        }
        Some(number * CHUNK + at)
    }

    /// Frees an entry; nothing when it is free.
    pub(super) fn remove(&mut self, at: usize) -> Option<(T, C)> {
        let removed = self.chunks.get_mut(at / CHUNK)?.remove(at % CHUNK)?;
        set(&mut self.room, at / CHUNK, true);
        Some(removed)
    }

    /// Whether the entry is taken.
    pub(super) fn contains(&self, at: usize) -> bool {
        self.chunks.get(at / CHUNK).is_some_and(|chunk| chunk.contains(at % CHUNK))
    }

    /// The entry; a free one is all default.
    #[inline]
    pub(super) fn get(&self, at: usize) -> Option<&T> {
        self.chunks.get(at / CHUNK)?.hot(at % CHUNK)
    }

    /// The same, to change.
    #[inline]
    pub(super) fn get_mut(&mut self, at: usize) -> Option<&mut T> {
        self.chunks.get_mut(at / CHUNK)?.hot_mut(at % CHUNK)
    }

    /// Cold data beside an entry.
    #[inline]
    pub(super) fn cold(&self, at: usize) -> Option<&C> {
        self.chunks.get(at / CHUNK)?.cold(at % CHUNK)
    }

    /// Asks for the lines of an entry. Nothing when there is no such entry.
    #[inline]
    pub(super) fn prefetch(&self, at: usize) {
        if let Some(hot) = self.get(at) {
            prefetch::read_whole(hot);
        }
    }

    /// Asks for the line of what lies beside an entry.
    #[inline]
    pub(super) fn prefetch_cold(&self, at: usize) {
        if let Some(cold) = self.cold(at) {
            prefetch::read(cold);
        }
    }

    /// The same, to change.
    #[inline]
    pub(super) fn cold_mut(&mut self, at: usize) -> Option<&mut C> {
        self.chunks.get_mut(at / CHUNK)?.cold_mut(at % CHUNK)
    }

    /// An entry and what lies beside it, to change.
    #[inline]
    pub(super) fn both_mut(&mut self, at: usize) -> Option<(&mut T, &mut C)> {
        let pair = self.chunks.get_mut(at / CHUNK)?.pairs.get_mut(at % CHUNK / 2)?;
        Some((pair.hot.get_mut(at % 2)?, pair.cold.get_mut(at % 2)?))
    }

    /// The 64 entries from `at`, a multiple of 64: which are taken.
    pub(super) fn taken(&self, at: usize) -> u64 {
        let chunk = self.chunks.get(at / CHUNK);
        chunk.and_then(|chunk| chunk.taken.get(at % CHUNK / 64)).copied().unwrap_or(0)
    }

    /// Gives back the memory of the chunk of this entry, if the chunk is empty and not the first.
    pub(super) fn release(&mut self, at: usize) {
        if at >= CHUNK
            && let Some(chunk) = self.chunks.get_mut(at / CHUNK)
            && chunk.live == 0
        {
            chunk.pairs = Vec::new();
        }
    }

    /// Bytes allocated.
    pub(super) fn memory_bytes(&self) -> usize {
        let pairs: usize = self.chunks.iter().map(|chunk| chunk.pairs.capacity()).sum();
        pairs * size_of::<Pair<T, C>>()
            + self.chunks.len() * WORDS * 8
            + self.chunks.capacity() * size_of::<Chunk<T, C>>()
            + self.room.capacity() * 8
    }
}
