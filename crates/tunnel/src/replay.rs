//! Replay window of one lane (RFC 6479).
//!
//! A ring of 64-bit words; moving forward clears whole words, so nothing is shifted. Order of use:
//! [`Window::check`] before the AEAD (cheap refusal of copies), [`Window::commit`] after it succeeded.
//! A window belongs to one core: no lock, no atomic.

use packet::drop_reason::DropReason;

/// Smallest window, bits.
pub const WINDOW_BITS_MIN: usize = 8_192;
/// Largest window, bits (8 KiB of memory).
pub const WINDOW_BITS_MAX: usize = 65_536;

/// First counter that is refused: an epoch never gets there (rekey comes at 2^27), so whoever sends it is broken.
pub const COUNTER_LIMIT: u64 = 1 << 48;

/// Which counters of a lane have been seen.
#[derive(Clone, Debug)]
pub struct Window {
    words: Box<[u64]>,
    /// Highest committed counter + 1; 0 while empty.
    next: u64,
}

impl Window {
    /// An empty window; the only place that allocates. `bits` is rounded up to a power of two between
    /// [`WINDOW_BITS_MIN`] and [`WINDOW_BITS_MAX`].
    #[must_use]
    pub fn new(bits: usize) -> Self {
        let bits = bits.clamp(WINDOW_BITS_MIN, WINDOW_BITS_MAX).next_power_of_two();
        Self { words: vec![0; bits / 64].into_boxed_slice(), next: 0 }
    }

    /// How far below the highest counter one is still accepted: the ring minus the word being filled.
    #[must_use]
    pub const fn span(&self) -> u64 {
        (self.words.len() as u64 - 1) * 64
    }

    /// Highest committed counter.
    #[must_use]
    pub const fn highest(&self) -> Option<u64> {
        self.next.checked_sub(1)
    }

    #[inline]
    fn slot(&self, counter: u64) -> (usize, u64) {
        let mask = self.words.len() as u64 - 1;
        (((counter >> 6) & mask) as usize, 1 << (counter & 63))
    }

    /// Whether this counter could still be accepted. Changes nothing.
    ///
    /// # Errors
    /// `Replayed` if it was committed before, `TooOld` below the window or from [`COUNTER_LIMIT`] on.
    #[inline]
    pub fn check(&self, counter: u64) -> Result<(), DropReason> {
        if counter >= self.next {
            return if counter < COUNTER_LIMIT { Ok(()) } else { Err(DropReason::TooOld) };
        }
        // An older counter: next is at least 1 here.
        if self.next - 1 - counter >= self.span() {
            return Err(DropReason::TooOld);
        }
        let (word, bit) = self.slot(counter);
        if self.words[word] & bit == 0 { Ok(()) } else { Err(DropReason::Replayed) }
    }

    /// Marks an authenticated counter as seen and moves the window up to it.
    ///
    /// # Errors
    /// As [`check`](Self::check); then nothing changes.
    #[inline]
    pub fn commit(&mut self, counter: u64) -> Result<(), DropReason> {
        self.check(counter)?;
        if counter >= self.next {
            let mask = self.words.len() as u64 - 1;
            let current = self.next.saturating_sub(1) >> 6;
            let moves = ((counter >> 6) - current).min(mask + 1);
            for step in 1..=moves {
                self.words[((current + step) & mask) as usize] = 0;
            }
            self.next = counter + 1;
        }
        let (word, bit) = self.slot(counter);
        self.words[word] |= bit;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// The same rules without a ring.
    struct Naive {
        seen: BTreeSet<u64>,
        span: u64,
    }

    impl Naive {
        fn commit(&mut self, counter: u64) -> Result<(), DropReason> {
            if counter >= COUNTER_LIMIT {
                return Err(DropReason::TooOld);
            }
            if let Some(highest) = self.seen.last()
                && counter < *highest
                && highest - counter >= self.span
            {
                return Err(DropReason::TooOld);
            }
            if self.seen.insert(counter) { Ok(()) } else { Err(DropReason::Replayed) }
        }
    }

    /// Counters that wander: small steps, repeats, jumps near the window's edges and far ahead.
    fn steps() -> impl Strategy<Value = Vec<i64>> {
        let step = prop_oneof![
            6 => -70i64..140,
            2 => -9_000i64..9_000,
            1 => prop_oneof![Just(8_127i64), Just(8_128), Just(8_129), Just(-8_127), Just(-8_128), Just(-8_129)],
            1 => 60_000i64..400_000,
        ];
        proptest::collection::vec(step, 1..400)
    }

    proptest! {
        #[test]
        fn agrees_with_the_naive_model(bits in 0usize..3, start in 0u64..200, steps in steps()) {
            let mut window = Window::new(WINDOW_BITS_MIN << bits);
            let mut naive = Naive { seen: BTreeSet::new(), span: window.span() };
            let mut counter = start;
            for step in steps {
                let expected = naive.commit(counter);
                prop_assert_eq!(window.check(counter), expected);
                prop_assert_eq!(window.commit(counter), expected);
                prop_assert_eq!(window.highest(), naive.seen.last().copied());
                counter = counter.saturating_add_signed(step);
            }
        }
    }

    #[test]
    fn sizes_are_clamped_to_powers_of_two() {
        for (asked, got) in [(0, 8_192), (8_193, 16_384), (65_536, 65_536), (usize::MAX, 65_536)] {
            assert_eq!(Window::new(asked).span(), got - 64, "asked for {asked}");
        }
    }

    #[test]
    fn check_changes_nothing() {
        let mut window = Window::new(WINDOW_BITS_MIN);
        assert_eq!(window.highest(), None);
        for _ in 0..3 {
            assert_eq!(window.check(5), Ok(()));
        }
        assert_eq!(window.commit(5), Ok(()));
        assert_eq!(window.commit(5), Err(DropReason::Replayed));
        assert_eq!(window.highest(), Some(5));
    }

    #[test]
    fn the_end_of_the_counter_is_refused() {
        let mut window = Window::new(WINDOW_BITS_MIN);
        assert_eq!(window.commit(COUNTER_LIMIT - 1), Ok(()));
        for counter in [COUNTER_LIMIT, u64::MAX - 1, u64::MAX] {
            assert_eq!(window.commit(counter), Err(DropReason::TooOld));
        }
        assert_eq!(window.highest(), Some(COUNTER_LIMIT - 1));
    }

    #[test]
    fn a_jump_over_the_whole_ring_forgets_everything() {
        let mut window = Window::new(WINDOW_BITS_MIN);
        for counter in 0..200 {
            assert_eq!(window.commit(counter), Ok(()));
        }
        let far = 1_000_000;
        assert_eq!(window.commit(far), Ok(()));
        for counter in far - window.span() + 1..far {
            assert_eq!(window.commit(counter), Ok(()));
        }
        assert_eq!(window.commit(far - window.span()), Err(DropReason::TooOld));
    }
}
