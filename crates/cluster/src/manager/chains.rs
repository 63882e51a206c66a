//! How long a bucket remembers its earlier owners.
//!
//! [`Chains::Counted`] is what a cluster works by. The others are what is done elsewhere; connections break under them, and they are
//! there so that this can be measured in the same churn (`bench/scale-events.sh`).

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use steering::table::{BucketTable, CHAIN_MAX, Unit};

/// End of an earlier owner's place in a bucket's chain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Chains {
    /// When it has no live flow in the bucket.
    #[default]
    Counted,
    /// The same, and only so many of the newest are kept; 0: none, nothing is punted.
    Newest(usize),
    /// The same, and at the latest so long after the bucket moved.
    Clock {
        /// That long.
        ns: u64,
    },
    /// There are no chains, and owners are found by weighted rendezvous hashing.
    Rendezvous,
}

impl Chains {
    /// The table of an era as this wants it, from the one that was planned.
    pub(super) fn shape(self, table: BucketTable, shares: &[Unit]) -> BucketTable {
        match self {
            Self::Counted | Self::Clock { .. } => table,
            Self::Newest(most) => newest(table, most),
            Self::Rendezvous => rendezvous(table, shares),
        }
    }

    /// Whether connections go on whatever happens.
    #[must_use]
    pub fn keeps_flows(self) -> bool {
        self == Self::Counted
    }
}

impl FromStr for Chains {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!("\"{text}\" is none of \"counted\", \"newest:N\", \"clock:MILLISECONDS\", \"rendezvous\"")
        };
        match text.split_once(':') {
            None if text == "counted" => Ok(Self::Counted),
            None if text == "rendezvous" => Ok(Self::Rendezvous),
            Some(("newest", most)) => {
                let most = most.parse().ok().filter(|most| *most < CHAIN_MAX);
                most.map(Self::Newest).ok_or_else(wrong)
            }
            Some(("clock", ms)) => {
                let ms = ms.parse::<u32>().map_err(|_| wrong())?;
                Ok(Self::Clock { ns: u64::from(ms) * super::MS })
            }
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for Chains {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Counted => f.write_str("counted"),
            Self::Newest(most) => write!(f, "newest:{most}"),
            Self::Clock { ns } => write!(f, "clock:{}", ns / super::MS),
            Self::Rendezvous => f.write_str("rendezvous"),
        }
    }
}

/// Moments at which earlier owners came into chains; kept only where a clock ends them.
#[derive(Clone, Debug, Default)]
pub(super) struct Entered(BTreeMap<(u32, u16), u64>);

impl Entered {
    /// Notes the chains of an era that came into force.
    pub(super) fn note(&mut self, table: &BucketTable, now_ns: u64) {
        let mut entered = BTreeMap::new();
        for bucket in 0..table.buckets() {
            for unit in table.chain(bucket) {
                let entry = (bucket as u32, *unit);
                entered.insert(entry, self.0.get(&entry).copied().unwrap_or(now_ns));
            }
        }
        self.0 = entered;
    }

    /// Whether an entry is as old as that.
    pub(super) fn is_over(&self, bucket: usize, unit: u16, now_ns: u64, most_ns: u64) -> bool {
        let since = self.0.get(&(bucket as u32, unit));
        since.is_some_and(|since| now_ns.saturating_sub(*since) >= most_ns)
    }
}

fn newest(mut table: BucketTable, most: usize) -> BucketTable {
    for bucket in 0..table.buckets() {
        for unit in table.chain(bucket).to_vec().into_iter().skip(most) {
            table.retire(bucket, unit);
        }
    }
    table
}

fn rendezvous(table: BucketTable, shares: &[Unit]) -> BucketTable {
    let owners = (0..table.buckets()).map(|bucket| best(bucket as u64, shares).unwrap_or_default()).collect();
    // As many buckets as before: that is a power of two.
    BucketTable::from_owners(table.era(), owners).unwrap_or(table)
}

/// The unit with the highest score in a bucket: −weight ÷ ln u, u random in (0, 1) by bucket and unit.
fn best(bucket: u64, shares: &[Unit]) -> Option<u16> {
    let score = |unit: &Unit| {
        let random = mix(bucket << 16 | u64::from(unit.id));
        let uniform = ((random >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        -f64::from(unit.weight) / uniform.ln()
    };
    let sharing = shares.iter().filter(|unit| unit.weight > 0);
    sharing.max_by(|a, b| score(a).total_cmp(&score(b))).map(|unit| unit.id)
}

/// SplitMix64's finalizer.
fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use steering::assign::plan;

    use super::*;

    fn units(weights: [u32; 4]) -> Vec<Unit> {
        (1..).zip(weights).map(|(id, weight)| Unit { id, weight }).collect()
    }

    #[test]
    fn names_are_read_back_and_others_refused() {
        for name in ["counted", "newest:0", "newest:3", "clock:8000", "rendezvous"] {
            assert_eq!(name.parse::<Chains>().unwrap().to_string(), name);
        }
        for name in ["newest", "newest:4", "newest:x", "clock:-1", "Counted", ""] {
            assert!(name.parse::<Chains>().unwrap_err().contains("is none of"), "{name}");
        }
    }

    #[test]
    fn only_so_many_of_the_newest_are_kept() {
        let mut table = BucketTable::new(64, &units([1, 0, 0, 0])).unwrap();
        for weights in [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]] {
            table = plan(&table, &units(weights), &[]).unwrap();
        }
        let shares = units([0, 0, 0, 1]);
        assert_eq!(Chains::Counted.shape(table.clone(), &shares).chain(5), [3, 2, 1]);
        assert_eq!(Chains::Newest(1).shape(table.clone(), &shares).chain(5), [3]);
        assert_eq!(Chains::Newest(0).shape(table, &shares).chain(5), []);
    }

    #[test]
    fn rendezvous_shares_by_weight_and_moves_only_what_a_newcomer_gets() {
        let table = BucketTable::new(65_536, &units([1, 1, 2, 0])).unwrap();
        let before = Chains::Rendezvous.shape(table.clone(), &units([1, 1, 2, 0]));
        let counts: Vec<usize> = (1..=4).map(|unit| before.count(unit)).collect();
        for (count, wanted) in counts.iter().zip([16_384, 16_384, 32_768, 0]) {
            assert!(count.abs_diff(wanted) < 1_000, "{counts:?}");
        }
        let after = Chains::Rendezvous.shape(table, &units([1, 1, 2, 4]));
        assert!(before.moves(&after).all(|(_, _, to)| to == 4));
        assert!(after.count(4).abs_diff(32_768) < 1_000, "{}", after.count(4));
    }

    #[test]
    fn an_entry_is_as_old_as_its_first_era() {
        let table = BucketTable::new(4, &units([1, 0, 0, 0])).unwrap();
        let moved = plan(&table, &units([0, 1, 0, 0]), &[]).unwrap();
        let mut entered = Entered::default();
        entered.note(&moved, 100);
        entered.note(&moved, 200);
        assert!(entered.is_over(0, 1, 150, 50) && !entered.is_over(0, 1, 149, 50));
        assert!(!entered.is_over(0, 2, 1_000, 1));
    }
}
