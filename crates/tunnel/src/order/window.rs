//! A ring of bits over the last stamps: delivered, held, waited for.

/// Stamps per word.
const WORD: u64 = 64;
/// Words to begin with: 1,024 stamps in 384 bytes.
const WORDS_MIN: usize = 16;
/// Words of the largest window: 65,536 stamps in 24 KiB.
const WORDS_MAX: usize = 1024;

#[derive(Clone, Copy, Debug, Default)]
struct Word {
    delivered: u64,
    held: u64,
    waited: u64,
}

/// Which of the three sets of stamps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Set {
    /// Handed to the caller.
    Delivered,
    /// Arrived and had to be held; it still is unless it is in `Delivered`, too.
    Held,
    /// Somebody is held who waits for this stamp.
    Waited,
}

/// The window ends with the word of the highest stamp. It starts small and doubles when the caller needs a longer
/// past than it has, up to 65,536 stamps. Stamps are unwrapped to 64 bits.
#[derive(Clone, Debug)]
pub(super) struct Window {
    words: Vec<Word>,
    /// Highest stamp known.
    top: u64,
}

impl Window {
    pub(super) const fn new(top: u64) -> Self {
        Self { words: Vec::new(), top }
    }

    #[inline]
    pub(super) const fn top(&self) -> u64 {
        self.top
    }

    /// Lowest stamp the window has bits for.
    #[inline]
    pub(super) fn oldest(&self) -> u64 {
        ((self.top / WORD + 1) - self.words.len() as u64) * WORD
    }

    /// Lowest stamp the window would have bits for if it had to end with `top`.
    pub(super) fn oldest_at(&self, top: u64) -> u64 {
        ((top / WORD + 1) - self.words.len() as u64) * WORD
    }

    /// Whether the next stamps up to `top` fit without entering a new word: the common case.
    #[inline]
    pub(super) fn same_word(&self, top: u64) -> bool {
        top / WORD == self.top / WORD && !self.words.is_empty()
    }

    #[inline]
    fn index(&self, stamp: u64) -> usize {
        // The length is a power of two, and the cast keeps the bits that matter.
        (stamp / WORD) as usize & (self.words.len() - 1)
    }

    /// Moves the end to `top`, at least the present one, and empties the words that are entered.
    #[inline]
    pub(super) fn move_to(&mut self, top: u64) {
        let entered = (top / WORD - self.top / WORD).min(self.words.len() as u64);
        self.top = top;
        for back in 0..entered {
            let index = self.index(top - back * WORD);
            self.words[index] = Word::default();
        }
    }

    /// Makes the window long enough to end with `top` and still have bits for `floor`, as far as
    /// the limit allows.
    pub(super) fn grow(&mut self, floor: u64, top: u64) {
        let needed = (top / WORD).saturating_sub(floor / WORD) + 1;
        let words = needed.next_power_of_two().clamp(WORDS_MIN as u64, WORDS_MAX as u64) as usize;
        if words <= self.words.len() {
            return;
        }
        let old = core::mem::replace(&mut self.words, vec![Word::default(); words]);
        for back in 0..old.len() as u64 {
            let Some(word) = (self.top / WORD).checked_sub(back) else { break };
            let index = self.index(word * WORD);
            self.words[index] = old[word as usize & (old.len() - 1)];
        }
    }

    /// Memory of the window.
    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        self.words.capacity() * size_of::<Word>()
    }

    fn covers(&self, stamp: u64) -> bool {
        stamp <= self.top && stamp >= self.oldest()
    }

    /// Whether the stamp is in the set; never for stamps outside the window.
    #[inline]
    pub(super) fn has(&self, set: Set, stamp: u64) -> bool {
        if self.words.is_empty() || !self.covers(stamp) {
            return false;
        }
        let word = &self.words[self.index(stamp)];
        let bits = match set {
            Set::Delivered => word.delivered,
            Set::Held => word.held,
            Set::Waited => word.waited,
        };
        bits >> (stamp % WORD) & 1 != 0
    }

    /// Puts the stamp into the set or takes it out; nothing happens outside the window.
    #[inline]
    pub(super) fn put(&mut self, set: Set, stamp: u64, on: bool) {
        if self.words.is_empty() || !self.covers(stamp) {
            return;
        }
        let index = self.index(stamp);
        let word = &mut self.words[index];
        let bits = match set {
            Set::Delivered => &mut word.delivered,
            Set::Held => &mut word.held,
            Set::Waited => &mut word.waited,
        };
        let bit = 1 << (stamp % WORD);
        *bits = if on { *bits | bit } else { *bits & !bit };
    }

    /// The first stamp from `from` on that somebody waits for.
    pub(super) fn next_waited(&self, from: u64) -> Option<u64> {
        self.first_from(from, |word| word.waited)
    }

    /// The first stamp from `from` on that was not delivered, or the one behind the top.
    pub(super) fn next_undelivered(&self, from: u64) -> u64 {
        let behind = self.top + 1;
        self.first_from(from, |word| !word.delivered).map_or(behind.max(from), |stamp| stamp.min(behind))
    }

    fn first_from(&self, from: u64, bits: impl Fn(&Word) -> u64) -> Option<u64> {
        if self.words.is_empty() || from > self.top {
            return None;
        }
        let from = from.max(self.oldest());
        let mut mask = !0 << (from % WORD);
        for word in from / WORD..=self.top / WORD {
            let found = bits(&self.words[self.index(word * WORD)]) & mask;
            if found != 0 {
                return Some(word * WORD + u64::from(found.trailing_zeros()));
            }
            mask = !0;
        }
        None
    }
}
