//! The next table when units join, leave or change weight.
//!
//! * **Exact quotas.** Buckets are shared by weight with the largest-remainder method. Equal remainders go
//!   first to units that already hold more than the whole part of their share, then to lower ids.
//! * **Fewest moves.** A bucket leaves only a unit that holds more than its quota and goes only to a unit
//!   that holds less. So the number of moves is the optimum, and a third unit's buckets never change. Units of
//!   equal weight never exchange buckets when another joins or leaves; with unequal weights, rounding may raise the
//!   quota of an old unit by one, which then takes part like the one that joined.
//! * **Short histories.** The buckets that move are chosen in the order: back to a unit in the bucket's chain,
//!   shortest chain, fewest live flows, lowest number.
//! * **Deterministic.** Same table, units (in any order) and live counts: same result, on every machine.
//!
//! A unit with weight 0 is draining: it loses all buckets but stays in chains, since its flows live on. A
//! unit that is not listed is gone: its buckets move, and it leaves all chains.

use std::collections::VecDeque;

use crate::table::{BucketTable, Chain, TableError, Unit};

#[cfg(test)]
mod tests;

/// A bucket whose chain is full: before it can move, the flow records of `unit`, its oldest earlier owner,
/// must be pulled to a later one and the unit retired ([`BucketTable::retire`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pull {
    /// The bucket.
    pub bucket: usize,
    /// The oldest unit of its chain.
    pub unit: u16,
}

/// Why there is no next table.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PlanError {
    /// The units cannot share a table.
    #[error(transparent)]
    Units(#[from] TableError),
    /// `live` has neither no entry nor one for each bucket.
    #[error("live flow counts for {got} buckets, table has {want}")]
    LiveCounts {
        /// Entries given.
        got: usize,
        /// Buckets of the table.
        want: usize,
    },
    /// Some buckets that must move have full chains: pull these first, then plan again.
    #[error("{} buckets must first lose their oldest earlier owner", .0.len())]
    ChainFull(Vec<Pull>),
}

/// The table of the next era: `units` are all units that take part, `live` the number of live flows by bucket
/// (empty = unknown).
///
/// Where a bucket may return to several units of its chain, the newest that has room gets it.
pub fn plan(table: &BucketTable, units: &[Unit], live: &[u32]) -> Result<BucketTable, PlanError> {
    if !live.is_empty() && live.len() != table.buckets() {
        return Err(PlanError::LiveCounts { got: live.len(), want: table.buckets() });
    }
    let mut next = table.clone();
    forget_absent(&mut next, units);
    let mut balance = Balance::new(table, units)?;
    let mut candidates = candidates(&next, &balance, live);

    let mut owners = table.owners().to_vec();
    let mut chains: Vec<Chain> = (0..table.buckets()).map(|bucket| next.chain_of(bucket)).collect();
    let mut pulls = Vec::new();
    let mut moving = returns(&next, &mut candidates, &mut balance);
    moving.extend(others(&next, &candidates, &mut balance));
    for (bucket, to) in moving {
        let from = next.owner(bucket);
        // An absent owner takes no place in the chain: its flows are gone.
        let chain = match chains.get(bucket) {
            Some(chain) if balance.listed(from) => chain.moved(from, to),
            Some(chain) => Some(chain.without(to)),
            None => None,
        };
        match (chain, chains.get_mut(bucket), owners.get_mut(bucket)) {
            (Some(chain), Some(slot), Some(owner)) => {
                *slot = chain;
                *owner = to;
            }
            _ => pulls.extend(next.chain(bucket).last().map(|&unit| Pull { bucket, unit })),
        }
    }
    if pulls.is_empty() {
        Ok(BucketTable::from_parts(table.era().wrapping_add(1), owners, chains))
    } else {
        pulls.sort_by_key(|pull| pull.bucket);
        Err(PlanError::ChainFull(pulls))
    }
}

/// Each unit's exact number of buckets, by unit id: whole part of its share, then one more for the largest
/// remainders. `held(unit)` breaks ties in favour of units that would otherwise have to give one up.
pub fn quotas(
    buckets: usize,
    units: &[Unit],
    held: impl Fn(u16) -> usize,
) -> Result<Vec<(u16, usize)>, TableError> {
    let mut units = units.to_vec();
    units.sort_by_key(|unit| unit.id);
    if let Some(pair) = units.windows(2).find(|pair| pair[0].id == pair[1].id) {
        return Err(TableError::DuplicateUnit(pair[0].id));
    }
    // At most 2^16 units of 2^32: no overflow, also not times 2^16 buckets.
    let total: u64 = units.iter().map(|unit| u64::from(unit.weight)).sum();
    if total == 0 {
        return Err(TableError::NoUnits);
    }
    let share = |unit: &Unit| {
        let scaled = buckets as u64 * u64::from(unit.weight);
        ((scaled / total) as usize, scaled % total)
    };
    let mut shares: Vec<(u16, usize)> = units.iter().map(|unit| (unit.id, share(unit).0)).collect();
    let given: usize = shares.iter().map(|&(_, quota)| quota).sum();
    let mut order: Vec<usize> = (0..units.len()).collect();
    order.sort_by_key(|&place| {
        let (whole, remainder) = share(&units[place]);
        (std::cmp::Reverse(remainder), held(units[place].id) <= whole, units[place].id)
    });
    for &place in order.iter().take(buckets - given) {
        shares[place].1 += 1;
    }
    Ok(shares)
}

/// Who has too many buckets, who too few; unlisted units have too many by all they own.
struct Balance {
    /// By unit id: the unit takes part.
    listed: Vec<bool>,
    /// By unit id: buckets to give away (positive) or to receive (negative).
    excess: Vec<i64>,
    /// The units that receive, by id.
    receivers: Vec<u16>,
}

impl Balance {
    fn new(table: &BucketTable, units: &[Unit]) -> Result<Self, TableError> {
        let ids = table.owners().iter().chain(units.iter().map(|unit| &unit.id)).copied();
        let size = usize::from(ids.max().unwrap_or(0)) + 1;
        let mut excess = vec![0i64; size];
        for &owner in table.owners() {
            excess[usize::from(owner)] += 1;
        }
        let shares = quotas(table.buckets(), units, |unit| excess[usize::from(unit)] as usize)?;
        let mut listed = vec![false; size];
        let mut receivers = Vec::new();
        for (id, quota) in shares {
            let place = usize::from(id);
            listed[place] = true;
            excess[place] -= quota as i64;
            if excess[place] < 0 {
                receivers.push(id);
            }
        }
        Ok(Self { listed, excess, receivers })
    }

    fn listed(&self, unit: u16) -> bool {
        self.listed.get(usize::from(unit)).copied().unwrap_or(false)
    }

    fn excess(&self, unit: u16) -> i64 {
        self.excess.get(usize::from(unit)).copied().unwrap_or(0)
    }

    /// Books one bucket's move if `from` still has too many and `to` too few.
    fn book(&mut self, from: u16, to: u16) -> bool {
        if self.excess(from) <= 0 || self.excess(to) >= 0 {
            return false;
        }
        self.excess[usize::from(from)] -= 1;
        self.excess[usize::from(to)] += 1;
        true
    }
}

/// Units that are not listed leave all chains.
fn forget_absent(table: &mut BucketTable, units: &[Unit]) {
    let mut listed: Vec<u16> = units.iter().map(|unit| unit.id).collect();
    listed.sort_unstable();
    table.retain_in_chains(|unit| listed.binary_search(&unit).is_ok());
}

/// The buckets of units that give some away, in order of preference.
fn candidates(table: &BucketTable, balance: &Balance, live: &[u32]) -> Vec<usize> {
    let mut candidates: Vec<usize> =
        (0..table.buckets()).filter(|&bucket| balance.excess(table.owner(bucket)) > 0).collect();
    candidates
        .sort_by_key(|&bucket| (table.chain(bucket).len(), live.get(bucket).copied().unwrap_or(0), bucket));
    candidates
}

/// Moves back to a unit of the bucket's chain; those buckets leave the candidates.
fn returns(table: &BucketTable, candidates: &mut Vec<usize>, balance: &mut Balance) -> Vec<(usize, u16)> {
    let mut moving = Vec::new();
    candidates.retain(|&bucket| {
        let from = table.owner(bucket);
        let to = table.chain(bucket).iter().find(|&&earlier| balance.book(from, earlier));
        moving.extend(to.map(|&to| (bucket, to)));
        to.is_none()
    });
    moving
}

/// The other moves. Receivers take turns, so that each gets its part of the quiet and of the busy buckets.
fn others(table: &BucketTable, candidates: &[usize], balance: &mut Balance) -> Vec<(usize, u16)> {
    let mut turns: VecDeque<u16> =
        balance.receivers.iter().copied().filter(|&unit| balance.excess(unit) < 0).collect();
    let mut moving = Vec::new();
    for &bucket in candidates {
        let Some(&to) = turns.front() else { break };
        if balance.book(table.owner(bucket), to) {
            moving.push((bucket, to));
            if balance.excess(to) < 0 {
                turns.rotate_left(1);
            } else {
                turns.pop_front();
            }
        }
    }
    moving
}
