//! How long a receiver went without anything new.

/// Pauses shorter than this are not kept one by one, ns.
const KEPT_NS: u64 = 1_000_000;
/// At most so many pauses are kept; of more, the longest.
const KEPT_MAX: usize = 4_096;

/// One pause: nothing arrived between these two moments, ns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// When the last thing before it arrived.
    pub from_ns: u64,
    /// When the first thing after it arrived.
    pub to_ns: u64,
}

impl Gap {
    /// Its length, ns.
    #[must_use]
    pub fn ns(&self) -> u64 {
        self.to_ns.saturating_sub(self.from_ns)
    }

    /// Its length, ms.
    #[must_use]
    pub fn ms(&self) -> f64 {
        self.ns() as f64 / 1e6
    }
}

/// Collects the pauses of one receiver; resolution 1 ms.
#[derive(Clone, Debug, Default)]
pub struct Gaps {
    last_ns: Option<u64>,
    kept: Vec<Gap>,
}

impl Gaps {
    /// Something arrived. Times must not run backwards.
    pub fn arrived(&mut self, now_ns: u64) {
        if let Some(last) = self.last_ns {
            let gap = Gap { from_ns: last, to_ns: now_ns };
            if gap.ns() >= KEPT_NS {
                self.keep(gap);
            }
        }
        self.last_ns = Some(now_ns);
    }

    fn keep(&mut self, gap: Gap) {
        if self.kept.len() >= KEPT_MAX {
            // Half of the room is given to the longest so far; this happens rarely enough to sort.
            self.kept.sort_unstable_by_key(|g| std::cmp::Reverse(g.ns()));
            self.kept.truncate(KEPT_MAX / 2);
        }
        self.kept.push(gap);
    }

    /// Adds the pauses of another receiver.
    pub fn merge(&mut self, other: &Gaps) {
        for gap in &other.kept {
            self.keep(*gap);
        }
    }

    /// The longest pause that touches the time between the two moments; `None` if there was none of 1 ms.
    #[must_use]
    pub fn longest_between(&self, from_ns: u64, to_ns: u64) -> Option<Gap> {
        self.kept.iter().filter(|g| g.to_ns >= from_ns && g.from_ns <= to_ns).copied().max_by_key(Gap::ns)
    }

    /// The longest pause of all.
    #[must_use]
    pub fn longest(&self) -> Option<Gap> {
        self.longest_between(0, u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn finds_the_longest_in_a_window() {
        let mut gaps = Gaps::default();
        assert_eq!(gaps.longest(), None);
        for ms in [0, 1, 5, 6, 206, 207, 300] {
            gaps.arrived(ms * 1_000_000);
        }
        assert_eq!(gaps.longest().unwrap().ms(), 200.0);
        assert_eq!(gaps.longest_between(207_000_000, u64::MAX).unwrap().ms(), 93.0);
        assert_eq!(gaps.longest_between(0, 5_000_000).unwrap().ms(), 4.0);
    }

    #[test]
    fn forgets_only_short_ones() {
        let mut gaps = Gaps::default();
        let mut now = 0;
        for i in 0..20_000u64 {
            now += if i == 77 { 500_000_000 } else { 2_000_000 };
            gaps.arrived(now);
        }
        assert!(gaps.kept.len() <= KEPT_MAX);
        assert_eq!(gaps.longest().unwrap().ms(), 500.0);
    }
}
