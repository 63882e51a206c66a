//! Load votes: which buckets should change cores so that all cores have about as much to do (row C9).
//!
//! Each core tells its load now and then; a [`Vote`] has an age and a priority. The [`Arbiter`] takes for each core
//! the mean of its last votes, each weighed by priority and by youth; it decides rarely and little:
//!
//! * nothing while the busiest and the idlest core are less than a *spread* apart, and nothing before they have been
//!   apart for a while;
//! * a few buckets at once, chosen so that three eighths of the difference move at most, or as much as leaves next to none: the
//!   idle core never becomes the busy one;
//! * a bucket that has a history (a chain) or has moved lately stays, and nothing moves while an earlier change is not
//!   settled or too many buckets have histories;
//! * a change that took less than half of what it promised from the busiest core makes the next one wait twice as long, up to a
//!   limit: its load has another reason than its buckets;
//! * votes from before the last change do not count after it.
//!
//! A core whose votes are too old is *suspect*: nothing is given to it or taken from it. Whether it is dead is the
//! question of [`watch`] (row C7); then [`replan`] gives its buckets to the others.
//!
//! No flow breaks: a moved bucket's flows stay with the core in its chain until they end (`table`). Same votes, same
//! table, same times: same decision, on every machine.

use std::collections::VecDeque;

use crate::assign::{self, PlanError};
use crate::cores::{CoreSet, CoreState};
use crate::table::{BucketTable, Chain, Unit};

#[cfg(test)]
mod tests;
pub mod watch;

/// Votes of one core that are kept.
pub const VOTES_MAX: usize = 8;

/// Loads are computed in these parts of a vote's unit.
const SCALE: u64 = 256;

/// One core's word on its load.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Vote {
    /// Which core, by its dense index.
    pub core: u8,
    /// Its load: 0 idle, 255 no time left.
    pub load: u8,
    /// How much the vote counts relative to the core's other votes; 0 counts as 1. A core raises it when waiting would
    /// cost packets, so that one such vote outweighs several calm ones.
    pub priority: u8,
    /// When it was given, nanoseconds of a monotonic clock.
    pub at_ns: u64,
}

/// How eager an arbiter is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Settings {
    /// A vote counts less the older it is, and from this age on nothing.
    pub age_max_ns: u64,
    /// Difference of loads, in the unit of [`Vote::load`], below which nothing moves.
    pub spread_min: u8,
    /// How long the difference must last before anything moves.
    pub persist_ns: u64,
    /// Time between two changes at least, as long as they help.
    pub pause_ns: u64,
    /// The same at most, after changes that did not help.
    pub pause_max_ns: u64,
    /// Time for which a bucket that has moved stays where it is.
    pub rest_ns: u64,
    /// Buckets that move at once, at most.
    pub moves_max: usize,
    /// No change while more buckets than this have a history. Not 0: one quiet flow that lasts for days would end all
    /// balancing.
    pub unsettled_max: usize,
}

impl Default for Settings {
    /// For votes every 100 ms: 20 % apart for a second, four buckets every two seconds, or every minute where that does not help.
    fn default() -> Self {
        Self {
            age_max_ns: 1_000_000_000,
            spread_min: 51,
            persist_ns: 1_000_000_000,
            pause_ns: 2_000_000_000,
            pause_max_ns: 64_000_000_000,
            rest_ns: 30_000_000_000,
            moves_max: 4,
            unsettled_max: 16,
        }
    }
}

/// A bucket that changes cores.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Move {
    /// The bucket.
    pub bucket: usize,
    /// Who owns it.
    pub from: u8,
    /// Who shall.
    pub to: u8,
}

/// Why nothing moves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reason {
    /// Fewer than two cores have votes that count.
    NoVotes,
    /// The loads are close enough together.
    Balanced,
    /// They have not been apart for long enough.
    Brief,
    /// The last change was too short a time ago.
    Pause,
    /// The last change is not settled, or too many buckets have a history.
    Unsettled,
    /// No bucket is small enough for the difference and free to move.
    NothingFits,
}

/// Decision of an arbiter.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Decision {
    /// The table stays.
    Keep(Reason),
    /// The table of the next era, and what it changes, in order of bucket.
    Change {
        /// To be rolled out ([`crate::era::Rollout`]).
        table: BucketTable,
        /// Never empty.
        moves: Vec<Move>,
    },
}

/// Load that a core should have after a change, at most; in 1/256 of a vote's unit.
#[derive(Clone, Copy, Debug)]
struct Promise {
    core: u8,
    load: u64,
}

/// Weighs votes and decides.
#[derive(Clone, Debug)]
pub struct Arbiter {
    settings: Settings,
    /// By core, oldest vote first.
    votes: Vec<VecDeque<Vote>>,
    /// Since when the loads have been apart.
    apart_since_ns: Option<u64>,
    changed_at_ns: Option<u64>,
    /// Time between two changes at present.
    pause_ns: u64,
    /// Promise of the last change, until it is known whether it helped.
    promise: Option<Promise>,
    /// By bucket: when it moved last. Empty until the first change.
    moved_at_ns: Vec<Option<u64>>,
}

impl Arbiter {
    /// An arbiter without votes.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            votes: Vec::new(),
            apart_since_ns: None,
            changed_at_ns: None,
            pause_ns: settings.pause_ns,
            promise: None,
            moved_at_ns: Vec::new(),
        }
    }

    /// Takes a vote. One that is not younger than the core's last, or from before the last change, is ignored.
    pub fn vote(&mut self, vote: Vote) {
        let core = usize::from(vote.core);
        if self.votes.len() <= core {
            self.votes.resize(core + 1, VecDeque::new());
        }
        let stale = self.changed_at_ns.is_some_and(|changed| vote.at_ns <= changed);
        let Some(votes) = self.votes.get_mut(core) else { return };
        if stale || votes.back().is_some_and(|last| last.at_ns >= vote.at_ns) {
            return;
        }
        if votes.len() == VOTES_MAX {
            votes.pop_front();
        }
        votes.push_back(vote);
    }

    /// A core's load as the arbiter sees it. `None`: it has no vote that is young enough.
    #[must_use]
    pub fn load(&self, core: u8, now_ns: u64) -> Option<u8> {
        self.scaled(core, now_ns).map(|load| (load / SCALE) as u8)
    }

    /// Cores of `expected` whose votes are all too old.
    #[must_use]
    pub fn suspects(&self, expected: &CoreSet, now_ns: u64) -> CoreSet {
        expected.iter().filter(|&core| self.scaled(core, now_ns).is_none()).collect()
    }

    /// Decides about `table`.
    ///
    /// `bucket_work` is what each bucket cost lately, in any unit (packets, for example); empty = unknown, then all
    /// buckets of a core count the same. `settled`: everybody holds this table and the next may start
    /// ([`crate::era::Rollout::may_start_next`]). A core that is not in `usable` gets nothing and loses nothing.
    pub fn decide(
        &mut self,
        table: &BucketTable,
        bucket_work: &[u32],
        usable: &CoreSet,
        settled: bool,
        now_ns: u64,
    ) -> Decision {
        let mut loads: Vec<(u8, u64)> =
            usable.iter().filter_map(|core| Some((core, self.scaled(core, now_ns)?))).collect();
        if let Err(reason) = self.may_move(table, &loads, settled, now_ns) {
            return Decision::Keep(reason);
        }
        let mut shares = shares(table, bucket_work, &loads);
        let before = loads.clone();
        let mut moves = Vec::new();
        while moves.len() < self.settings.moves_max {
            let Some(chosen) = self.choose(table, &shares, &loads, moves.is_empty(), now_ns) else { break };
            // What is chosen is booked: the next choice sees the loads as they will be.
            let share = shares.get_mut(chosen.bucket).map_or(0, std::mem::take);
            for (core, load) in &mut loads {
                if *core == chosen.from {
                    *load = load.saturating_sub(share);
                } else if *core == chosen.to {
                    *load += share;
                }
            }
            moves.push(chosen);
        }
        moves.sort_by_key(|chosen| chosen.bucket);
        let Some(next) = moved(table, &moves).filter(|_| !moves.is_empty()) else {
            return Decision::Keep(Reason::NothingFits);
        };
        self.note(table.buckets(), &moves, now_ns);
        self.promise = promise(&before, &loads);
        Decision::Change { table: next, moves }
    }

    /// A table came into force that this arbiter did not make: votes begin anew.
    pub fn changed_elsewhere(&mut self, now_ns: u64) {
        self.changed_at_ns = Some(now_ns);
        self.apart_since_ns = None;
        self.promise = None;
        self.votes.iter_mut().for_each(VecDeque::clear);
    }

    /// Whether anything should move at all.
    fn may_move(
        &mut self,
        table: &BucketTable,
        loads: &[(u8, u64)],
        settled: bool,
        now_ns: u64,
    ) -> Result<(), Reason> {
        let Some((busy, idle)) = extremes(loads) else { return Err(Reason::NoVotes) };
        if busy.1 - idle.1 < u64::from(self.settings.spread_min) * SCALE {
            self.apart_since_ns = None;
            self.rest(now_ns);
            return Err(Reason::Balanced);
        }
        let since = *self.apart_since_ns.get_or_insert(now_ns);
        let histories = (0..table.buckets()).filter(|&bucket| !table.chain(bucket).is_empty()).count();
        if !settled || histories > self.settings.unsettled_max {
            return Err(Reason::Unsettled);
        }
        if !self.has_waited(self.settings.pause_ns, now_ns) {
            return Err(Reason::Pause);
        }
        if now_ns.saturating_sub(since) < self.settings.persist_ns {
            return Err(Reason::Brief);
        }
        self.weigh_last_change(loads);
        if self.has_waited(self.pause_ns, now_ns) { Ok(()) } else { Err(Reason::Pause) }
    }

    /// Whether the last change was so long ago.
    fn has_waited(&self, pause_ns: u64, now_ns: u64) -> bool {
        self.changed_at_ns.is_none_or(|changed| now_ns.saturating_sub(changed) >= pause_ns)
    }

    /// The loads are close together: the last change helped, or what it could not help has ended.
    fn rest(&mut self, now_ns: u64) {
        let kept = self.promise.is_some() && self.has_waited(self.settings.pause_ns, now_ns);
        if kept || self.has_waited(self.pause_ns, now_ns) {
            self.promise = None;
            self.pause_ns = self.settings.pause_ns;
        }
    }

    /// Compares the loads with what the last change promised.
    fn weigh_last_change(&mut self, loads: &[(u8, u64)]) {
        let Some(promise) = self.promise.take() else { return };
        let helped = loads.iter().all(|(core, load)| *core != promise.core || *load <= promise.load);
        let longest_ns = self.settings.pause_max_ns.max(self.settings.pause_ns);
        self.pause_ns = if helped { self.settings.pause_ns } else { (self.pause_ns * 2).min(longest_ns) };
    }

    /// The next bucket to move: the largest of the busiest core that fits.
    fn choose(
        &self,
        table: &BucketTable,
        shares: &[u64],
        loads: &[(u8, u64)],
        first: bool,
        now_ns: u64,
    ) -> Option<Move> {
        let (busy, idle) = extremes(loads)?;
        let gap = busy.1 - idle.1;
        // Once moving, go on to half the spread, so that noise does not bring the next change about.
        let enough = u64::from(self.settings.spread_min) * SCALE / if first { 1 } else { 2 };
        if gap < enough {
            return None;
        }
        let resting = |bucket: usize| {
            let moved = self.moved_at_ns.get(bucket).copied().flatten();
            moved.is_some_and(|moved| now_ns.saturating_sub(moved) < self.settings.rest_ns)
        };
        let balances =
            |share: u64| gap.abs_diff(2 * share) * 2 <= u64::from(self.settings.spread_min) * SCALE;
        let fits = |&(bucket, &share): &(usize, &u64)| {
            share > 0
                && (share <= gap * 3 / 8 || balances(share))
                && table.owner(bucket) == u16::from(busy.0)
                && table.chain(bucket).is_empty()
                && !resting(bucket)
        };
        let largest = shares
            .iter()
            .enumerate()
            .filter(fits)
            .max_by_key(|&(bucket, &share)| (share, std::cmp::Reverse(bucket)))?;
        Some(Move { bucket: largest.0, from: busy.0, to: idle.0 })
    }

    fn note(&mut self, buckets: usize, moves: &[Move], now_ns: u64) {
        self.moved_at_ns.resize(buckets, None);
        for chosen in moves {
            if let Some(moved) = self.moved_at_ns.get_mut(chosen.bucket) {
                *moved = Some(now_ns);
            }
        }
        self.changed_elsewhere(now_ns);
    }

    /// The mean of a core's votes in 1/256 of their unit.
    fn scaled(&self, core: u8, now_ns: u64) -> Option<u64> {
        let age_max = self.settings.age_max_ns.max(1);
        let weigh = |vote: &Vote| {
            let left = age_max.saturating_sub(now_ns.saturating_sub(vote.at_ns));
            let youth = (u128::from(left) * 1_024).div_ceil(u128::from(age_max)) as u64;
            youth * u64::from(vote.priority.max(1))
        };
        let votes = self.votes.get(usize::from(core))?;
        let weight: u64 = votes.iter().map(weigh).sum();
        let sum: u64 = votes.iter().map(|vote| weigh(vote) * u64::from(vote.load) * SCALE).sum();
        sum.checked_div(weight)
    }
}

/// The busiest and the idlest core; of equal ones the lowest.
fn extremes(loads: &[(u8, u64)]) -> Option<((u8, u64), (u8, u64))> {
    let busy = *loads.iter().max_by_key(|(core, load)| (*load, std::cmp::Reverse(*core)))?;
    let idle = *loads.iter().min_by_key(|(core, load)| (*load, *core))?;
    (busy.0 != idle.0).then_some((busy, idle))
}

/// Load to which a change takes the busiest core, if it takes at least half of what was chosen from it.
fn promise(before: &[(u8, u64)], after: &[(u8, u64)]) -> Option<Promise> {
    let (core, load) = extremes(before)?.0;
    let left = after.iter().find(|(other, _)| *other == core)?.1;
    Some(Promise { core, load: load.midpoint(left) })
}

/// Each bucket's part of its owner's load; 0 for owners without a load.
fn shares(table: &BucketTable, bucket_work: &[u32], loads: &[(u8, u64)]) -> Vec<u64> {
    let work_of = |bucket: usize| match bucket_work.get(bucket) {
        Some(&work) => u64::from(work),
        None => u64::from(bucket_work.is_empty()),
    };
    let mut shares = vec![0; table.buckets()];
    for &(core, load) in loads {
        let owned = || table.owners().iter().enumerate().filter(|(_, owner)| **owner == u16::from(core));
        let total: u64 = owned().map(|(bucket, _)| work_of(bucket)).sum();
        for (bucket, _) in owned() {
            if let Some(share) = shares.get_mut(bucket) {
                *share = (load * work_of(bucket)).checked_div(total).unwrap_or(0);
            }
        }
    }
    shares
}

/// The table of the next era with these moves; `None` if a chain would become too long.
fn moved(table: &BucketTable, moves: &[Move]) -> Option<BucketTable> {
    let mut owners = table.owners().to_vec();
    let mut chains: Vec<Chain> = (0..table.buckets()).map(|bucket| table.chain_of(bucket)).collect();
    for chosen in moves {
        let chain = chains.get_mut(chosen.bucket)?;
        *chain = chain.moved(chosen.from.into(), chosen.to.into())?;
        *owners.get_mut(chosen.bucket)? = chosen.to.into();
    }
    Some(BucketTable::from_parts(table.era().wrapping_add(1), owners, chains))
}

/// The next table when cores change their states: those that are active own all buckets, new ones an average share, the others the
/// shares that votes have given them, in proportion; those that drain or are reserved stay in the chains, since their flows live on;
/// those that are stuck leave the chains too. Where none is active, those that work own buckets after all.
///
/// `states`: by core. `live`: live flows by bucket, empty = unknown.
///
/// # Errors
/// As [`assign::plan`]; without any core that works there is no table.
pub fn replan(table: &BucketTable, states: &[CoreState], live: &[u32]) -> Result<BucketTable, PlanError> {
    let none_active = !states.contains(&CoreState::Active);
    let owns = |state: CoreState| state == CoreState::Active || none_active && state != CoreState::Stuck;
    let owners = states.iter().filter(|state| owns(**state)).count();
    let average = (table.buckets() / owners.max(1)).max(1);
    let unit = |(id, state): (u16, &CoreState)| {
        let weight = match table.count(id) {
            _ if !owns(*state) => 0,
            0 => average,
            count => count,
        };
        (*state != CoreState::Stuck).then_some(Unit { id, weight: weight as u32 })
    };
    let units: Vec<Unit> = (0u16..).zip(states).filter_map(unit).collect();
    assign::plan(table, &units, live)
}

/// The table without those earlier owners that have nothing left in a bucket, or `None`: each has something. `live`: of a core and a
/// bucket, the era of the table that the core works by and its live flows there, as it reported them.
pub fn retire_owners(
    table: &BucketTable,
    live: impl Fn(u16, usize) -> Option<(u32, u32)>,
) -> Option<BucketTable> {
    let mut next = table.clone();
    let mut changed = false;
    for bucket in 0..table.buckets() {
        for unit in table.chain(bucket) {
            if live(*unit, bucket) == Some((table.era(), 0)) {
                changed |= next.retire(bucket, *unit);
            }
        }
    }
    changed.then_some(next)
}
