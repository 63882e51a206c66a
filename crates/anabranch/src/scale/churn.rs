//! Which units come, go and change their share, by a seed alone: the same for whatever the connections go through.

use std::fmt;

use fastrand::Rng;

/// Most steps of one event.
const STEPS_MAX: usize = 3;
/// Largest weight.
const WEIGHT_MAX: u32 = 4;

/// Change of one unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    /// The unit.
    pub(crate) node: u16,
    /// The change.
    pub(crate) kind: Kind,
}

/// Kinds of changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It takes part, with weight 1.
    Add,
    /// It gets no new flows.
    Drain,
    /// The same, and it is removed when it has none left.
    Remove,
    /// It has another share.
    Weight(u32),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { node, kind } = self;
        match kind {
            Kind::Add => write!(f, "{node} comes"),
            Kind::Drain => write!(f, "{node} drains"),
            Kind::Remove => write!(f, "{node} goes"),
            Kind::Weight(weight) => write!(f, "{node} gets weight {weight}"),
        }
    }
}

/// Steps in words.
pub(crate) fn text(steps: &[Step]) -> String {
    let words: Vec<String> = steps.iter().map(ToString::to_string).collect();
    words.join(", ")
}

/// Series of random events.
#[derive(Clone, Debug)]
pub(crate) struct Churn {
    /// Units with their weights; none: it takes no part, or drains.
    units: Vec<(u16, Option<u32>)>,
    /// So many take part at least.
    least: usize,
    random: Rng,
}

impl Churn {
    /// Events of `nodes`, of which the first `present` take part.
    pub(crate) fn new(seed: u64, nodes: &[u16], present: usize) -> Self {
        let unit = |(place, node): (usize, &u16)| (*node, (place < present).then_some(1));
        let units: Vec<_> = nodes.iter().enumerate().map(unit).collect();
        let least = 2.min(present);
        Self { units, least, random: Rng::with_seed(seed) }
    }

    /// The next event: one to three steps, each of another unit.
    pub(crate) fn event(&mut self) -> Vec<Step> {
        let wanted = 1 + self.random.usize(..STEPS_MAX * 2).saturating_sub(STEPS_MAX);
        let mut steps: Vec<Step> = Vec::new();
        // A unit that had its turn is drawn again now and then: a few more draws than steps.
        for _ in 0..wanted * 4 {
            let place = self.random.usize(..self.units.len());
            let (node, weight) = self.units[place];
            if steps.len() == wanted || steps.iter().any(|step| step.node == node) {
                continue;
            }
            let active = self.units.iter().filter(|(_, weight)| weight.is_some()).count();
            let kind = match weight {
                None => Kind::Add,
                Some(_) if active > self.least && self.random.u8(..5) < 3 => {
                    if self.random.bool() {
                        Kind::Drain
                    } else {
                        Kind::Remove
                    }
                }
                // Always another one.
                Some(weight) => Kind::Weight(1 + (weight - 1 + self.random.u32(1..WEIGHT_MAX)) % WEIGHT_MAX),
            };
            self.units[place].1 = match kind {
                Kind::Add => Some(1),
                Kind::Drain | Kind::Remove => None,
                Kind::Weight(weight) => Some(weight),
            };
            steps.push(Step { node, kind });
        }
        steps
    }

    /// Units that take part with their weights, after the events so far.
    pub(crate) fn shares(&self) -> Vec<(u16, u32)> {
        self.units.iter().filter_map(|(node, weight)| Some((*node, (*weight)?))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_possible_of_all_kinds_and_the_seed_s_alone() {
        let nodes: Vec<u16> = (11..19).collect();
        let series = |seed| {
            let mut churn = Churn::new(seed, &nodes, 4);
            (0..300).map(|_| (churn.event(), churn.shares())).collect::<Vec<_>>()
        };
        assert_eq!(series(7), series(7));
        assert_ne!(series(7), series(8));
        let (mut kinds, mut sizes) = ([0; 4], [0; STEPS_MAX + 1]);
        let mut before: Vec<(u16, u32)> = nodes[..4].iter().map(|node| (*node, 1)).collect();
        for (steps, shares) in series(7) {
            sizes[steps.len()] += 1;
            for step in &steps {
                let weight = before.iter().find(|(node, _)| *node == step.node).map(|(_, weight)| *weight);
                match step.kind {
                    Kind::Add => kinds[0] += usize::from(weight.is_none()),
                    Kind::Drain => kinds[1] += usize::from(weight.is_some()),
                    Kind::Remove => kinds[2] += usize::from(weight.is_some()),
                    Kind::Weight(new) => kinds[3] += usize::from(weight.is_some_and(|weight| weight != new)),
                }
            }
            assert!((2..=8).contains(&shares.len()), "{shares:?}");
            before = shares;
        }
        let steps: usize = sizes.iter().enumerate().map(|(size, count)| size * count).sum();
        assert_eq!(kinds.iter().sum::<usize>(), steps, "every step is possible where it stands");
        assert!(kinds.iter().all(|count| *count > 40), "{kinds:?}");
        assert!(sizes[0] == 0 && sizes[1..].iter().all(|count| *count > 20), "{sizes:?}");
    }

    #[test]
    fn two_units_never_leave_each_other_alone() {
        let mut churn = Churn::new(1, &[11, 12], 2);
        for _ in 0..50 {
            let steps = churn.event();
            assert!(!steps.is_empty() && churn.shares().len() == 2, "{steps:?}");
        }
    }
}
