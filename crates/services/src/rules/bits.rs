//! Sets of rule numbers, in two levels: which words of 64 rules are not empty, and those words only.
//!
//! A set of a few rules among 10,000 takes some 50 bytes, and an AND of several sets skips 4,096 rules at a time
//! where one of them has none.

/// Rules of one word.
const WORD: usize = 64;

/// A set of numbers below a fixed bound.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Bits {
    /// Bit w of word w / 64: word w of the set is not empty.
    summary: Box<[u64]>,
    /// Non-empty words before each word of the summary.
    before: Box<[u16]>,
    /// The words that are not empty.
    words: Box<[u64]>,
}

impl Bits {
    /// The set whose bits stand in `dense`, number 0 in the lowest bit of the first word.
    pub(super) fn compress(dense: &[u64]) -> Self {
        let mut summary = vec![0u64; dense.len().div_ceil(WORD)];
        let mut before = Vec::with_capacity(summary.len());
        let mut words = Vec::new();
        for (slot, part) in summary.iter_mut().zip(dense.chunks(WORD)) {
            before.push(words.len() as u16);
            for (place, &word) in part.iter().enumerate() {
                if word != 0 {
                    *slot |= 1 << place;
                    words.push(word);
                }
            }
        }
        Self { summary: summary.into(), before: before.into(), words: words.into() }
    }

    /// Which of the words 64 × `group` to 64 × `group` + 63 are not empty.
    #[inline]
    pub(super) fn summary(&self, group: usize) -> u64 {
        self.summary.get(group).copied().unwrap_or(0)
    }

    /// The bits of numbers 64 × `word` to 64 × `word` + 63.
    #[inline]
    pub(super) fn word(&self, word: usize) -> u64 {
        let group = word / WORD;
        let bit = 1u64 << (word % WORD);
        let present = self.summary(group);
        if present & bit == 0 {
            return 0;
        }
        let skipped = usize::from(self.before.get(group).copied().unwrap_or(0));
        let place = skipped + (present & (bit - 1)).count_ones() as usize;
        self.words.get(place).copied().unwrap_or(0)
    }
}

/// A set in one level, for building.
#[derive(Clone, Debug)]
pub(super) struct Dense(Vec<u64>);

impl Dense {
    /// The empty set of numbers below `bound`.
    pub(super) fn new(bound: usize) -> Self {
        Self(vec![0; bound.div_ceil(WORD)])
    }

    /// Adds a number; one that is too large is ignored.
    pub(super) fn insert(&mut self, number: u16) {
        if let Some(word) = self.0.get_mut(usize::from(number) / WORD) {
            *word |= 1 << (usize::from(number) % WORD);
        }
    }

    /// Takes a number out.
    pub(super) fn remove(&mut self, number: u16) {
        if let Some(word) = self.0.get_mut(usize::from(number) / WORD) {
            *word &= !(1 << (usize::from(number) % WORD));
        }
    }

    /// The finished set.
    pub(super) fn compress(&self) -> Bits {
        Bits::compress(&self.0)
    }
}

/// One condition of a question: the rules that a packet satisfies are those of both sets.
#[derive(Clone, Copy)]
pub(super) struct Pair<'a> {
    /// Rules without this condition, or all.
    pub(super) any: &'a Bits,
    /// More rules whose condition is met.
    pub(super) met: Option<&'a Bits>,
}

impl Pair<'_> {
    #[inline]
    fn summary(&self, group: usize) -> u64 {
        self.any.summary(group) | self.met.map_or(0, |met| met.summary(group))
    }

    #[inline]
    fn word(&self, word: usize) -> u64 {
        self.any.word(word) | self.met.map_or(0, |met| met.word(word))
    }
}

/// The lowest number below `bound` that every pair has and that `accept` takes.
pub(super) fn first_common(
    pairs: &[Pair<'_>],
    bound: usize,
    mut accept: impl FnMut(u16) -> bool,
) -> Option<u16> {
    for group in 0..bound.div_ceil(WORD * WORD) {
        let mut present = pairs.iter().fold(u64::MAX, |all, pair| all & pair.summary(group));
        while present != 0 {
            let word = group * WORD + present.trailing_zeros() as usize;
            present &= present - 1;
            let mut common = u64::MAX;
            for pair in pairs {
                common &= pair.word(word);
                if common == 0 {
                    break;
                }
            }
            while common != 0 {
                let number = word * WORD + common.trailing_zeros() as usize;
                common &= common - 1;
                if number < bound && accept(number as u16) {
                    return Some(number as u16);
                }
            }
        }
    }
    None
}
