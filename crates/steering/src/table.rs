//! Bucket tables: hash → bucket → owner, with an era and each bucket's history.
//!
//! A table cuts hash space into a power of two of *buckets*; each has one *owner*, a unit (core or node)
//! by number. Tables are values: a change makes the next table ([`crate::assign::plan`]), whose *era* is
//! one higher. A bucket's *chain* lists its earlier owners that may still have live flows in it, newest
//! first, at most [`CHAIN_MAX`]; it never repeats a unit and never holds the owner.
//!
//! # Wire form
//!
//! Big endian, everything that follows bounded by the bucket count:
//!
//! ```text
//! format:8 = 1 | flags:8 | era:32 | log2 buckets:8 | owners | [chains]
//! flags: 0x01 units are 16 bits (else 8)   0x02 owners are run-length coded   0x04 chains follow
//! owners, plain: unit per bucket.  run-length coded: (run length − 1):8, unit; runs until all buckets are told.
//! chains: (run length − 1):8, length:8 (0–4), that many units, newest first; runs until all buckets are told.
//! ```
//!
//! 128 cores' buckets with 8-bit units take at most 135 bytes without chains ([`BucketTable::encode`]),
//! which is what a peer is told; units of a cluster tell each other the chains as well
//! ([`BucketTable::encode_with_chains`]).

use crate::assign;
use crate::symmetric::{core_bucket, node_bucket};

mod codec;
#[cfg(test)]
mod tests;

pub use codec::DecodeError;

/// Most buckets of a table: owners are found by at most 16 hash bits.
pub const BUCKETS_MAX: usize = 1 << 16;

/// The default number of buckets for cores (7 bits).
pub const CORE_BUCKETS: usize = 128;

/// The number of buckets for nodes (16 bits).
pub const NODE_BUCKETS: usize = 1 << 16;

/// Longest chain of earlier owners.
pub const CHAIN_MAX: usize = 4;

/// A unit (core or node) that may own buckets, and its share.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unit {
    /// Its number: dense core index or node id.
    pub id: u16,
    /// Its capacity relative to the others'. 0 = draining: owns nothing, stays in chains.
    pub weight: u32,
}

/// Why a table cannot be made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TableError {
    /// The bucket count is not a power of two from 1 to [`BUCKETS_MAX`].
    #[error("{0} buckets: must be a power of two from 1 to 65536")]
    BucketCount(usize),
    /// No unit has a weight above zero.
    #[error("no unit with a weight above zero")]
    NoUnits,
    /// A unit is listed twice.
    #[error("unit {0} is listed twice")]
    DuplicateUnit(u16),
}

/// Earlier owners of one bucket, newest first.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Chain {
    len: u8,
    units: [u16; CHAIN_MAX],
}

impl Chain {
    pub(crate) fn units(&self) -> &[u16] {
        self.units.get(..usize::from(self.len)).unwrap_or(&[])
    }

    /// Adds an older unit at the end. False when full or already there.
    pub(crate) fn push_oldest(&mut self, unit: u16) -> bool {
        let known = self.units().contains(&unit);
        match self.units.get_mut(usize::from(self.len)) {
            Some(slot) if !known => {
                *slot = unit;
                self.len += 1;
                true
            }
            _ => false,
        }
    }

    /// The chain without `unit`.
    pub(crate) fn without(&self, unit: u16) -> Self {
        let mut next = *self;
        next.retain(|earlier| earlier != unit);
        next
    }

    /// Keeps the units for which `keep` says so, in order.
    fn retain(&mut self, keep: impl Fn(u16) -> bool) {
        let mut kept = Self::default();
        for &unit in self.units() {
            if keep(unit) {
                kept.push_oldest(unit);
            }
        }
        *self = kept;
    }

    /// The chain after the bucket moves `from` one unit `to` another; `None` when it would be too long.
    pub(crate) fn moved(&self, from: u16, to: u16) -> Option<Self> {
        let mut next = Self::default();
        next.push_oldest(from);
        for &unit in self.units() {
            if unit != to && unit != from && !next.push_oldest(unit) {
                return None;
            }
        }
        Some(next)
    }
}

/// One era's buckets, owners and chains.
#[derive(Clone, Debug)]
pub struct BucketTable {
    era: u32,
    owners: Vec<u16>,
    /// Empty (no bucket has a history) or one for each bucket.
    chains: Vec<Chain>,
}

impl PartialEq for BucketTable {
    /// Same era, owners and chains; that no chain is stored and that all are empty is the same.
    fn eq(&self, other: &Self) -> bool {
        self.era == other.era
            && self.owners == other.owners
            && (0..self.owners.len()).all(|bucket| self.chain(bucket) == other.chain(bucket))
    }
}

impl Eq for BucketTable {}

impl BucketTable {
    /// The first table, era 0: exact quotas by weight, each unit's buckets side by side in the order of unit ids,
    /// no history.
    pub fn new(buckets: usize, units: &[Unit]) -> Result<Self, TableError> {
        check_count(buckets)?;
        let shares = assign::quotas(buckets, units, |_| 0)?;
        let mut owners = Vec::with_capacity(buckets);
        for (id, quota) in shares {
            owners.resize(owners.len() + quota, id);
        }
        Ok(Self { era: 0, owners, chains: Vec::new() })
    }

    /// A table of given owners without history.
    pub fn from_owners(era: u32, owners: Vec<u16>) -> Result<Self, TableError> {
        check_count(owners.len())?;
        Ok(Self { era, owners, chains: Vec::new() })
    }

    /// Parts already checked by the crate.
    pub(crate) fn from_parts(era: u32, owners: Vec<u16>, mut chains: Vec<Chain>) -> Self {
        if chains.iter().all(|chain| chain.len == 0) {
            chains = Vec::new();
        }
        Self { era, owners, chains }
    }

    /// The version of the table. Wraps; its low bit is on the wire.
    #[must_use]
    pub fn era(&self) -> u32 {
        self.era
    }

    /// The number of buckets, a power of two.
    #[must_use]
    pub fn buckets(&self) -> usize {
        self.owners.len()
    }

    /// Each bucket's owner.
    #[must_use]
    pub fn owners(&self) -> &[u16] {
        &self.owners
    }

    /// The owner of a bucket; only as many low bits of `bucket` count as the table has.
    #[inline]
    #[must_use]
    pub fn owner(&self, bucket: usize) -> u16 {
        // The mask keeps the index in range; a table is never empty.
        self.owners.get(bucket & (self.owners.len() - 1)).copied().unwrap_or(0)
    }

    /// The owner of a flow hash in a table of cores: by the hash's upper 16 bits.
    #[inline]
    #[must_use]
    pub fn owner_of_hash(&self, hash: u32) -> u16 {
        self.owner(core_bucket(hash, self.owners.len()))
    }

    /// The owner of a flow hash in a table of nodes: by the hash's lower 16 bits.
    #[inline]
    #[must_use]
    pub fn owner_of_node_hash(&self, hash: u32) -> u16 {
        self.owner(node_bucket(hash, self.owners.len()))
    }

    /// A bucket's earlier owners, newest first.
    #[must_use]
    pub fn chain(&self, bucket: usize) -> &[u16] {
        self.chains.get(bucket & (self.owners.len() - 1)).map_or(&[], Chain::units)
    }

    /// The unit before `unit` in a bucket's line (owner, then chain): to whom `unit` punts a packet it does
    /// not know. `None` at the end of the line or for a unit that is not in it.
    #[must_use]
    pub fn before(&self, bucket: usize, unit: u16) -> Option<u16> {
        let chain = self.chain(bucket);
        if self.owner(bucket) == unit {
            return chain.first().copied();
        }
        let place = chain.iter().position(|&earlier| earlier == unit)?;
        chain.get(place + 1).copied()
    }

    /// How many buckets a unit owns.
    #[must_use]
    pub fn count(&self, unit: u16) -> usize {
        self.owners.iter().filter(|&&owner| owner == unit).count()
    }

    /// The buckets that have another owner in `next`: (bucket, owner here, owner there), by bucket.
    pub fn moves<'a>(&'a self, next: &'a Self) -> impl Iterator<Item = (usize, u16, u16)> + 'a {
        let pairs = self.owners.iter().zip(&next.owners).enumerate();
        pairs.filter(|(_, (from, to))| from != to).map(|(bucket, (&from, &to))| (bucket, from, to))
    }

    /// Takes `unit` out of a bucket's chain; false if it was not in it.
    ///
    /// Allowed only when the unit reports no live flow in the bucket and everyone holds this era or a newer
    /// one. Time alone is never a reason: a long, quiet flow would lose its way.
    pub fn retire(&mut self, bucket: usize, unit: u16) -> bool {
        let bucket = bucket & (self.owners.len() - 1);
        let Some(chain) = self.chains.get_mut(bucket) else { return false };
        let before = chain.len;
        chain.retain(|earlier| earlier != unit);
        chain.len != before
    }

    /// Takes `unit` out of all chains: it is dead, so its flows are gone and it must be skipped, not punted to.
    pub fn forget(&mut self, unit: u16) {
        self.retain_in_chains(|earlier| earlier != unit);
    }

    /// The same era with `heir` in the place of `unit`, which has handed all its flows to it: what `unit` owned belongs to `heir`, and
    /// who asked `unit` asks `heir`. A bucket names nobody twice.
    #[must_use]
    pub fn handed(&self, unit: u16, heir: u16) -> Self {
        let owners: Vec<u16> =
            self.owners.iter().map(|owner| if *owner == unit { heir } else { *owner }).collect();
        let mut chains = self.chains.clone();
        for (chain, owner) in chains.iter_mut().zip(&owners) {
            let mut next = Chain::default();
            for earlier in chain.units() {
                let earlier = if *earlier == unit { heir } else { *earlier };
                if earlier != *owner {
                    next.push_oldest(earlier);
                }
            }
            *chain = next;
        }
        Self::from_parts(self.era, owners, chains)
    }

    pub(crate) fn retain_in_chains(&mut self, keep: impl Fn(u16) -> bool) {
        for chain in &mut self.chains {
            chain.retain(&keep);
        }
    }

    pub(crate) fn chain_of(&self, bucket: usize) -> Chain {
        self.chains.get(bucket).copied().unwrap_or_default()
    }
}

fn check_count(buckets: usize) -> Result<(), TableError> {
    if buckets.is_power_of_two() && buckets <= BUCKETS_MAX {
        Ok(())
    } else {
        Err(TableError::BucketCount(buckets))
    }
}
