#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::table::CHAIN_MAX;
use proptest::prelude::*;

fn units(weights: &[(u16, u32)]) -> Vec<Unit> {
    weights.iter().map(|&(id, weight)| Unit { id, weight }).collect()
}

fn equal(count: u16) -> Vec<Unit> {
    (0..count).map(|id| Unit { id, weight: 1 }).collect()
}

/// A table with a history, reached by moving buckets by hand.
fn table(buckets: &[(u16, &[u16])]) -> BucketTable {
    let chains = buckets.iter().map(|(_, earlier)| {
        let mut chain = Chain::default();
        for &unit in *earlier {
            assert!(chain.push_oldest(unit));
        }
        chain
    });
    BucketTable::from_parts(1, buckets.iter().map(|(owner, _)| *owner).collect(), chains.collect())
}

fn longest_chain(table: &BucketTable) -> usize {
    (0..table.buckets()).map(|bucket| table.chain(bucket).len()).max().unwrap_or(0)
}

#[test]
fn quotas_by_hand() {
    let shares = |buckets, list: &[(u16, u32)]| quotas(buckets, &units(list), |_| 0).unwrap();
    assert_eq!(shares(128, &[(1, 1), (0, 1), (2, 1)]), [(0, 43), (1, 43), (2, 42)]);
    assert_eq!(shares(16, &[(0, 1), (1, 2), (2, 4)]), [(0, 2), (1, 5), (2, 9)]);
    assert_eq!(shares(4, &[(0, 0), (1, 5)]), [(0, 0), (1, 4)]);
    assert_eq!(shares(65536, &[(3, u32::MAX), (4, u32::MAX)]), [(3, 32768), (4, 32768)]);
    assert_eq!(shares(2, &[(0, 1), (1, 1), (2, 1)]), [(0, 1), (1, 1), (2, 0)], "more units than buckets");
}

#[test]
fn a_join_takes_one_share_and_only_that() {
    let before = BucketTable::new(128, &equal(3)).unwrap();
    let after = plan(&before, &equal(4), &[]).unwrap();
    assert_eq!(after.era(), before.era() + 1);
    let moves: Vec<_> = before.moves(&after).collect();
    assert_eq!(moves.len(), 32);
    assert!(moves.iter().all(|&(_, _, to)| to == 3));
    for (bucket, from, _) in moves {
        assert_eq!(after.chain(bucket), [from]);
    }
}

#[test]
fn nothing_to_do_moves_nothing() {
    let before = BucketTable::new(128, &equal(3)).unwrap();
    let after = plan(&before, &equal(3), &[]).unwrap();
    assert_eq!(before.owners(), after.owners());
    assert_eq!(after.era(), 1);
}

#[test]
fn a_drained_unit_stays_in_chains_a_dead_one_does_not() {
    let before = BucketTable::new(8, &equal(2)).unwrap();
    let drained = plan(&before, &units(&[(0, 0), (1, 1)]), &[]).unwrap();
    assert_eq!((drained.count(0), drained.chain(0)), (0, &[0u16][..]));
    let dead = plan(&before, &units(&[(1, 1)]), &[]).unwrap();
    assert_eq!((dead.count(0), longest_chain(&dead)), (0, 0));
    // And one that dies later leaves the chains of buckets that stay where they are.
    let dead = plan(&drained, &units(&[(1, 1)]), &[]).unwrap();
    assert_eq!((dead.owners(), longest_chain(&dead)), (drained.owners(), 0));
}

#[test]
fn order_of_preference_return_then_chain_then_live_then_number() {
    // Unit 0 owns three of four buckets, so exactly one moves to unit 1.
    let join = |buckets: &[(u16, &[u16])], live: &[u32]| {
        let before = table(buckets);
        let after = plan(&before, &units(&[(0, 1), (1, 1)]), live).unwrap();
        before.moves(&after).map(|(bucket, _, _)| bucket).collect::<Vec<_>>()
    };
    // A return wins over shorter chains and idle buckets.
    let line: [(u16, &[u16]); 4] = [(0, &[]), (0, &[7, 1]), (0, &[]), (1, &[])];
    let with_7 = |live: &[u32]| {
        let before = table(&line);
        let after = plan(&before, &units(&[(0, 1), (1, 1), (7, 0)]), live).unwrap();
        before.moves(&after).map(|(bucket, _, _)| bucket).collect::<Vec<_>>()
    };
    assert_eq!(with_7(&[0, 9, 0, 0]), [1]);
    // Then the shortest chain, whatever lives there.
    assert_eq!(join(&[(0, &[1]), (0, &[1]), (0, &[1]), (1, &[0])], &[]), [0], "all may return: the number");
    let chains: [(u16, &[u16]); 4] = [(0, &[7, 8]), (0, &[7]), (0, &[8, 7]), (1, &[])];
    let known = units(&[(0, 1), (1, 1), (7, 0), (8, 0)]);
    let after = plan(&table(&chains), &known, &[0, 50, 0, 0]).unwrap();
    assert_eq!((after.owner(1), after.chain(1)), (1, &[0u16, 7][..]));
    // Then the fewest live flows, then the number.
    assert_eq!(join(&[(0, &[]), (0, &[]), (0, &[]), (1, &[])], &[5, 4, 4, 0]), [1]);
    assert_eq!(join(&[(0, &[]), (0, &[]), (0, &[]), (1, &[])], &[]), [0]);
}

#[test]
fn a_return_shortens_the_history() {
    let line: [(u16, &[u16]); 4] = [(0, &[7, 1, 8, 9]), (0, &[]), (0, &[]), (1, &[])];
    let after = plan(&table(&line), &units(&[(0, 1), (1, 1), (7, 0), (8, 0), (9, 0)]), &[]).unwrap();
    assert_eq!((after.owner(0), after.chain(0)), (1, &[0u16, 7, 8, 9][..]));
}

#[test]
fn a_full_chain_asks_for_a_pull_first() {
    let line: [(u16, &[u16]); 2] = [(0, &[7, 8, 9, 6]), (0, &[9, 8, 7, 6])];
    let all = units(&[(0, 1), (1, 1), (6, 0), (7, 0), (8, 0), (9, 0)]);
    let mut before = table(&line);
    assert_eq!(plan(&before, &all, &[]), Err(PlanError::ChainFull(vec![Pull { bucket: 0, unit: 6 }])));
    // The records of unit 6 are pulled, it retires, the plan goes through.
    assert!(before.retire(0, 6));
    let after = plan(&before, &all, &[]).unwrap();
    assert_eq!((after.owner(0), after.chain(0)), (1, &[0u16, 7, 8, 9][..]));
    // A dead owner takes no place, so a full chain is no obstacle.
    let dead = plan(&table(&line), &units(&[(1, 1), (6, 0), (7, 0), (8, 0), (9, 0)]), &[]).unwrap();
    assert_eq!((dead.owner(0), dead.chain(0)), (1, &[7u16, 8, 9, 6][..]));
}

#[test]
fn impossible_plans_are_refused() {
    let before = BucketTable::new(8, &equal(2)).unwrap();
    assert_eq!(plan(&before, &[], &[]), Err(PlanError::Units(TableError::NoUnits)));
    let twice = [Unit { id: 3, weight: 1 }; 2];
    assert_eq!(plan(&before, &twice, &[]), Err(PlanError::Units(TableError::DuplicateUnit(3))));
    assert_eq!(plan(&before, &equal(2), &[1; 7]), Err(PlanError::LiveCounts { got: 7, want: 8 }));
}

#[test]
fn the_era_wraps() {
    let before = BucketTable::from_owners(u32::MAX, vec![0; 4]).unwrap();
    assert_eq!(plan(&before, &equal(2), &[]).unwrap().era(), 0);
}

/// Growing one unit at a time, without any history ever ending: depth 4 is enough with margin.
#[test]
fn growth_one_by_one_keeps_chains_short() {
    for (from, to, depth) in [(4u16, 8u16, 2usize), (8, 16, 2), (2, 16, 3)] {
        let mut table = BucketTable::new(4096, &equal(from)).unwrap();
        for count in from + 1..=to {
            table = plan(&table, &equal(count), &[]).unwrap();
        }
        assert!(longest_chain(&table) <= depth, "{from} to {to}: {}", longest_chain(&table));
    }
}

/// The size of a cluster's table.
#[test]
fn nodes_65536_buckets_250_units() {
    let before = BucketTable::new(65536, &equal(250)).unwrap();
    let after = plan(&before, &equal(251), &[]).unwrap();
    assert_eq!(before.moves(&after).count(), 65536 / 251);
    assert_eq!(after.count(250), 65536 / 251);
}

/// Every way to give one more bucket to some of the units whose remainders tie, by brute force.
fn fewest_moves_of_any_tie(table: &BucketTable, units: &[Unit]) -> usize {
    let total: u64 = units.iter().map(|unit| u64::from(unit.weight)).sum();
    let buckets = table.buckets() as u64;
    let whole = |unit: &Unit| buckets * u64::from(unit.weight) / total;
    let remainder = |unit: &Unit| buckets * u64::from(unit.weight) % total;
    let over = (buckets - units.iter().map(whole).sum::<u64>()) as u32;
    let sets = (0u32..1 << units.len()).filter(|set| set.count_ones() == over);
    let fair = sets.filter(|set| {
        let (got, not): (Vec<_>, Vec<_>) = (0..units.len()).partition(|&i| set >> i & 1 == 1);
        let least = got.iter().map(|&i| remainder(&units[i])).min().unwrap_or(u64::MAX);
        not.iter().all(|&i| remainder(&units[i]) <= least)
    });
    let moves = fair.map(|set| {
        let gains = units.iter().enumerate().map(|(i, unit)| {
            (whole(unit) as usize + (set >> i & 1) as usize).saturating_sub(table.count(unit.id))
        });
        gains.sum()
    });
    moves.min().unwrap()
}

fn any_units() -> impl Strategy<Value = Vec<Unit>> {
    let weight = prop_oneof![Just(1u32), Just(2), 0u32..4, any::<u32>()];
    proptest::collection::btree_map(0u16..9, weight, 1..8)
        .prop_filter("someone must serve", |units| units.values().any(|&weight| weight > 0))
        .prop_map(|units| units.into_iter().map(|(id, weight)| Unit { id, weight }).collect())
}

/// Plans one step; pulls what must be pulled, as the manager would.
fn step(table: &BucketTable, units: &[Unit], live: &[u32]) -> (BucketTable, BucketTable) {
    let mut table = table.clone();
    for _ in 0..=CHAIN_MAX {
        match plan(&table, units, live) {
            Ok(next) => return (table, next),
            Err(PlanError::ChainFull(pulls)) => {
                assert!(!pulls.is_empty());
                for pull in pulls {
                    assert_eq!(table.chain(pull.bucket).last(), Some(&pull.unit));
                    assert!(table.retire(pull.bucket, pull.unit));
                }
            }
            Err(error) => panic!("{error}"),
        }
    }
    panic!("pulling did not make room");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Any sequence of joins, leaves, drains and weights keeps every promise at every step.
    #[test]
    fn plans_keep_every_promise(
        log2 in 0u32..=8,
        steps in proptest::collection::vec((any_units(), any::<u64>()), 1..9),
    ) {
        let mut now: Option<BucketTable> = None;
        for (units, seed) in steps {
            let Some(before) = now.take() else {
                now = Some(BucketTable::new(1 << log2, &units).unwrap());
                continue;
            };
            let live: Vec<u32> = (0..before.buckets() as u64).map(|b| (seed.wrapping_mul(b | 1) >> 60) as u32).collect();
            let (before, after) = step(&before, &units, &live);

            let shares = quotas(before.buckets(), &units, |unit| before.count(unit)).unwrap();
            let total: u64 = units.iter().map(|unit| u64::from(unit.weight)).sum();
            for &(id, quota) in &shares {
                prop_assert_eq!(after.count(id), quota, "exact quotas");
                let weight = units.iter().find(|unit| unit.id == id).unwrap().weight;
                let exact = before.buckets() as f64 * f64::from(weight) / total as f64;
                prop_assert!((quota as f64 - exact).abs() < 1.0, "within one of the share");
            }
            prop_assert_eq!(before.moves(&after).count(), fewest_moves_of_any_tie(&before, &units), "fewest moves");

            let quota = |unit: u16| shares.iter().find(|(id, _)| *id == unit).map_or(0, |(_, quota)| *quota);
            for (_, from, to) in before.moves(&after) {
                prop_assert!(before.count(from) > quota(from), "who has its share or less gives nothing");
                prop_assert!(before.count(to) < quota(to), "who has its share or more gets nothing");
            }
            for bucket in 0..after.buckets() {
                let (owner, chain) = (after.owner(bucket), after.chain(bucket));
                prop_assert!(chain.len() <= CHAIN_MAX && !chain.contains(&owner));
                prop_assert!(chain.iter().all(|unit| units.iter().any(|listed| listed.id == *unit)));
                let listed = |unit: &u16| units.iter().any(|listed| listed.id == *unit);
                let mut expected: Vec<u16> = before.chain(bucket).to_vec();
                if before.owner(bucket) != owner {
                    expected.insert(0, before.owner(bucket));
                }
                expected.retain(|unit| listed(unit) && *unit != owner);
                prop_assert_eq!(chain, &expected[..], "nobody with flows is forgotten");
            }

            let mut shuffled = units.clone();
            shuffled.reverse();
            prop_assert_eq!(plan(&before, &shuffled, &live).unwrap(), after.clone(), "the same, whatever the order");
            now = Some(after);
        }
    }

    /// With equal weights a join touches nobody but the giver and the newcomer, a leave nobody but the
    /// leaver and the takers.
    #[test]
    fn equal_units_never_exchange_among_themselves(log2 in 0u32..=10, count in 1u16..20, leaver in 0u16..20) {
        let before = BucketTable::new(1 << log2, &equal(count)).unwrap();
        let joined = plan(&before, &equal(count + 1), &[]).unwrap();
        prop_assert!(before.moves(&joined).all(|(_, _, to)| to == count));
        let leaver = leaver % (count + 1);
        let rest: Vec<Unit> = equal(count + 1).into_iter().filter(|unit| unit.id != leaver).collect();
        let left = plan(&joined, &rest, &[]).unwrap();
        prop_assert!(joined.moves(&left).all(|(_, from, _)| from == leaver));
    }

    /// Preference within one giver: no bucket that stayed is preferred to one that went.
    #[test]
    fn the_preferred_buckets_move(seeds in proptest::collection::vec((0usize..3, 0u32..4), 32)) {
        let earlier: [&[u16]; 3] = [&[], &[8], &[8, 9]];
        let buckets: Vec<(u16, &[u16])> = seeds.iter().map(|(depth, _)| (0, earlier[*depth])).collect();
        let live: Vec<u32> = seeds.iter().map(|(_, live)| *live).collect();
        let before = table(&buckets);
        let after = plan(&before, &units(&[(0, 3), (1, 1), (8, 0), (9, 0)]), &live).unwrap();
        let key = |bucket: usize| (before.chain(bucket).len(), live[bucket], bucket);
        let worst_moved = before.moves(&after).map(|(bucket, _, _)| key(bucket)).max();
        let best_kept = (0..32).filter(|&b| after.owner(b) == 0).map(key).min();
        prop_assert!(worst_moved < best_kept);
    }
}
