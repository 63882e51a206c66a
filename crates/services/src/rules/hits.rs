//! Counts of rules live on when rules change.

use std::collections::BTreeMap;

use crate::spec::RuleSpec;

/// What is known of a rule that may be the same one in the next list: its name, or all of it if it has none.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Identity {
    Name(String),
    /// A rule has no order of its own; its text has.
    Whole(String),
}

impl Identity {
    fn of(rule: &RuleSpec) -> Self {
        if rule.name.is_empty() { Self::Whole(format!("{rule:?}")) } else { Self::Name(rule.name.clone()) }
    }
}

/// The hit counts for the rules `new` that follow `old`, whose counts are `hits`; in both the last count is that of the
/// default action. A rule keeps its count when one of the same name was there before, and one without a name when an
/// equal one was. Of several alike the first takes the count of the first.
pub(crate) fn carry_hits(old: &[RuleSpec], hits: &[u64], new: &[RuleSpec]) -> Vec<u64> {
    let mut known: BTreeMap<Identity, Vec<u64>> = BTreeMap::new();
    // Backwards: the first is the one that `pop` gives first.
    for (rule, count) in old.iter().zip(hits).rev() {
        known.entry(Identity::of(rule)).or_default().push(*count);
    }
    let kept = |rule: &RuleSpec| known.get_mut(&Identity::of(rule)).and_then(Vec::pop).unwrap_or(0);
    let mut carried: Vec<u64> = new.iter().map(kept).collect();
    carried.push(hits.get(old.len()).copied().unwrap_or(0));
    carried
}
