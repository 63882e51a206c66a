//! Maglev hashing (Eisenbud and others, "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016,
//! §3.4), weighted, and with nothing moved between healthy backends when another one fails.
//!
//! A table has a prime number of places. Each backend has its own order of all places ([`Permutation`]); they take
//! turns to take the next free place in their order. In the paper this is done again for the backends that are left
//! when one fails, and about half a percent of the places move between others. Here the table is built in two steps:
//!
//! 1. for all configured backends by their configured weights, as in the paper: this depends on the
//!    configuration alone;
//! 2. a backend whose weight is less now (down, draining, slow start) gives up the places it took last, and those who
//!    should have more take turns on them, again each in its own order.
//!
//! Numbers of places are exact: the largest-remainder quotas of the weights.

use std::net::{IpAddr, SocketAddr};

use steering::assign::quotas;
use steering::table::Unit;

/// A place that nobody has.
pub const NOBODY: u16 = u16::MAX;

/// Sizes of tables, primes about four times apart: another number of backends seldom means another size, which would
/// move everything.
pub const SIZES: [u32; 6] = [4_093, 16_381, 65_537, 262_147, 1_048_583, 4_194_319];

/// Places per backend, as far as [`PLACES_WANTED_MAX`] allows. A backend that leaves the configuration then moves less
/// than 1 % of the places between others; with 100 per backend it would be 1 to 3 %.
const PLACES_PER_BACKEND: u64 = 600;

/// A table of this size is built in some tens of milliseconds; it gets larger only for shares.
const PLACES_WANTED_MAX: u64 = 262_147;

/// Places per backend in any case, so that shares are exact to a percent (paper §3.4: "M > 100 N").
const PLACES_PER_BACKEND_MIN: u64 = 100;

/// The smallest weight has so many places …
const PLACES_PER_WEIGHT: u64 = 100;

/// … if the table need not be larger than this.
const WEIGHTED_PLACES_MAX: u64 = 65_537;

/// The order in which a backend wants the places: `offset`, `offset + skip`, … modulo the size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permutation {
    /// The first, below the size.
    pub offset: u32,
    /// The step, from 1 to the size − 1.
    pub skip: u32,
}

impl Permutation {
    /// The order of a backend, from its endpoint alone: all gateways and cores agree.
    #[must_use]
    pub fn of(address: SocketAddr, places: u32) -> Self {
        let first = hash_endpoint(OFFSET_KEY, address.ip(), address.port());
        let second = hash_endpoint(SKIP_KEY, address.ip(), address.port());
        let places = u64::from(places.max(2));
        Self { offset: (first % places) as u32, skip: (second % (places - 1)) as u32 + 1 }
    }
}

const OFFSET_KEY: u64 = 0x6f66_6673_6574_0001;
const SKIP_KEY: u64 = 0x736b_6970_0000_0002;

/// A backend of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Its order.
    pub permutation: Permutation,
    /// Weight by the configuration.
    pub configured: u32,
    /// Weight now.
    pub effective: u32,
}

/// How many places a table needs for backends of these configured weights. It must not depend on health.
#[must_use]
pub fn places_for(weights: &[u32]) -> u32 {
    let positive = || weights.iter().copied().filter(|&weight| weight > 0).map(u64::from);
    let smallest = positive().min().unwrap_or(1);
    let by_weight = (PLACES_PER_WEIGHT * positive().sum::<u64>() / smallest).min(WEIGHTED_PLACES_MAX - 1);
    let count = weights.len() as u64;
    let wanted = (PLACES_PER_BACKEND * count).min(PLACES_WANTED_MAX - 1);
    let needed = by_weight.max(wanted).max(PLACES_PER_BACKEND_MIN * count);
    let [.., largest] = SIZES;
    SIZES.into_iter().find(|&size| u64::from(size) > needed).unwrap_or(largest)
}

/// Fills a table of `places` (a prime) with places in `shares`; [`NOBODY`] everywhere if no weight is above zero. At
/// most 65,535 shares; order matters for ties only.
#[must_use]
pub fn build(places: u32, shares: &[Share]) -> Vec<u16> {
    let mut table = vec![NOBODY; places as usize];
    let configured: Vec<u32> = shares.iter().map(|share| share.configured).collect();
    let effective: Vec<u32> = shares.iter().map(|share| share.effective).collect();
    if effective.iter().all(|&weight| weight == 0) {
        return table;
    }
    let first = exact(places, &configured);
    let claims = fill(&mut table, shares, &configured, &first);
    if effective == configured {
        return table;
    }
    let wanted = exact(places, &effective);
    let mut held = vec![0u32; shares.len()];
    for (place, owner) in claims {
        let (Some(held), Some(&wanted)) = (held.get_mut(usize::from(owner)), wanted.get(usize::from(owner)))
        else {
            continue;
        };
        if *held < wanted {
            *held += 1;
        } else if let Some(slot) = table.get_mut(place as usize) {
            *slot = NOBODY;
        }
    }
    let missing: Vec<u32> = wanted.iter().zip(&held).map(|(wanted, held)| wanted - held).collect();
    fill(&mut table, shares, &missing, &missing);
    table
}

/// Exact numbers of places by weight; all zero if no weight is above zero.
fn exact(places: u32, weights: &[u32]) -> Vec<u32> {
    let units: Vec<Unit> = weights.iter().zip(0u16..).map(|(&weight, id)| Unit { id, weight }).collect();
    match quotas(places as usize, &units, |_| 0) {
        Ok(list) => list.into_iter().map(|(_, quota)| quota as u32).collect(),
        Err(_) => vec![0; weights.len()],
    }
}

/// Gives each share its quota of free places, in turns by weight. Returns who took what, in the order of taking.
fn fill(table: &mut [u16], shares: &[Share], weights: &[u32], quotas: &[u32]) -> Vec<(u32, u16)> {
    let places = table.len() as u64;
    let heaviest = u64::from(weights.iter().copied().max().unwrap_or(0));
    // The k-th turn of a backend comes in round k · heaviest / weight, as if it saved up its weight in each round
    // until it has as much as the heaviest. Equal weights: one turn in each round, as in the paper.
    let mut turns: Vec<(u64, u16)> = Vec::new();
    for ((&quota, &weight), id) in quotas.iter().zip(weights).zip(0u16..) {
        let round = |turn: u32| (u64::from(turn) * heaviest).div_ceil(u64::from(weight.max(1)));
        turns.extend((1..=quota).map(|turn| (round(turn), id)));
    }
    turns.sort_unstable();
    let mut next: Vec<u64> = shares.iter().map(|share| u64::from(share.permutation.offset)).collect();
    let mut claims = Vec::with_capacity(turns.len());
    for (_, id) in turns {
        let (Some(next), Some(share)) = (next.get_mut(usize::from(id)), shares.get(usize::from(id))) else {
            continue;
        };
        // A free place is found within one round of the permutation: quotas never exceed what is free.
        for _ in 0..places {
            let place = *next;
            *next = (place + u64::from(share.permutation.skip)) % places;
            if let Some(slot) = table.get_mut(place as usize)
                && *slot == NOBODY
            {
                *slot = id;
                claims.push((place as u32, id));
                break;
            }
        }
    }
    claims
}

/// A hash of an endpoint that stays the same in all versions and on all machines. The finaliser of MurmurHash3, chained.
#[must_use]
pub fn hash_endpoint(key: u64, address: IpAddr, port: u16) -> u64 {
    let (high, low) = match address {
        IpAddr::V4(v4) => (4, u64::from(v4.to_bits())),
        IpAddr::V6(v6) => ((v6.to_bits() >> 64) as u64, v6.to_bits() as u64),
    };
    [high, low, u64::from(port)].into_iter().fold(mix(key ^ 0x9e37_79b9_7f4a_7c15), |hash, word| {
        mix(hash.rotate_left(23) ^ word.wrapping_mul(0x9fb2_1c65_1e98_df25))
    })
}

/// Each bit of the input changes half of the output's.
#[must_use]
pub const fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let value = (value ^ (value >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    value ^ (value >> 33)
}
