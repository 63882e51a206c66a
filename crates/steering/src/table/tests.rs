#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use proptest::prelude::*;

fn units(weights: &[u32]) -> Vec<Unit> {
    weights.iter().enumerate().map(|(id, &weight)| Unit { id: id as u16, weight }).collect()
}

/// A table with histories: `chains` by bucket, newest first.
fn with_chains(era: u32, owners: &[u16], chains: &[&[u16]]) -> BucketTable {
    let chains = chains.iter().map(|units| {
        let mut chain = Chain::default();
        for &unit in *units {
            assert!(chain.push_oldest(unit));
        }
        chain
    });
    BucketTable::from_parts(era, owners.to_vec(), chains.collect())
}

#[test]
fn first_table_has_exact_quotas_in_order_of_ids() {
    let table = BucketTable::new(8, &[Unit { id: 9, weight: 1 }, Unit { id: 2, weight: 3 }]).unwrap();
    assert_eq!(table.owners(), [2, 2, 2, 2, 2, 2, 9, 9]);
    assert_eq!(
        (table.era(), table.buckets(), table.count(2), table.count(9), table.count(5)),
        (0, 8, 6, 2, 0)
    );
    let table = BucketTable::new(128, &units(&[1, 1, 1])).unwrap();
    assert_eq!([table.count(0), table.count(1), table.count(2)], [43, 43, 42]);
    assert!(table.chain(5).is_empty());
}

#[test]
fn tables_are_equal_when_era_owners_and_chains_are() {
    let table = with_chains(3, &[0, 1], &[&[1], &[]]);
    assert_eq!(table, with_chains(3, &[0, 1], &[&[1], &[]]));
    assert_eq!(with_chains(3, &[0, 1], &[&[], &[]]), with_chains(3, &[0, 1], &[]));
    assert_ne!(table, with_chains(4, &[0, 1], &[&[1], &[]]));
    assert_ne!(table, with_chains(3, &[1, 1], &[&[1], &[]]));
    assert_ne!(table, with_chains(3, &[0, 1], &[&[], &[1]]));
    assert_ne!(table, with_chains(3, &[0, 1], &[]));
}

#[test]
fn impossible_tables_are_refused() {
    for buckets in [0, 3, 127, 1 << 17] {
        assert_eq!(BucketTable::new(buckets, &units(&[1])), Err(TableError::BucketCount(buckets)));
    }
    assert_eq!(BucketTable::new(4, &[]), Err(TableError::NoUnits));
    assert_eq!(BucketTable::new(4, &units(&[0, 0])), Err(TableError::NoUnits));
    assert_eq!(BucketTable::new(4, &[Unit { id: 7, weight: 1 }; 2]), Err(TableError::DuplicateUnit(7)));
    assert_eq!(BucketTable::from_owners(0, vec![1; 3]), Err(TableError::BucketCount(3)));
}

#[test]
fn hash_bits_select_the_bucket() {
    let table = BucketTable::from_owners(0, (0..128).collect()).unwrap();
    assert_eq!(table.owner_of_hash(0xff85_1234), 5);
    assert_eq!(table.owner_of_node_hash(0xff85_1234), 0x34);
    assert_eq!(table.owner(128 + 7), 7, "only the table's bits count");
    assert_eq!(table.owner(usize::MAX), 127);
    assert!(table.chain(usize::MAX).is_empty());
}

#[test]
fn the_line_of_a_bucket() {
    let table = with_chains(3, &[5, 6], &[&[4, 9, 2], &[]]);
    assert_eq!(table.before(0, 5), Some(4));
    assert_eq!(table.before(0, 4), Some(9));
    assert_eq!(table.before(0, 9), Some(2));
    assert_eq!(table.before(0, 2), None);
    assert_eq!(table.before(0, 77), None);
    assert_eq!(table.before(1, 6), None);
}

#[test]
fn retire_and_forget() {
    let mut table = with_chains(3, &[5, 6], &[&[4, 9, 2], &[9]]);
    assert!(table.retire(0, 9));
    assert!(!table.retire(0, 9));
    assert!(!table.retire(0, 5), "the owner is not history");
    assert_eq!((table.chain(0), table.chain(1)), (&[4u16, 2][..], &[9u16][..]));
    table.forget(9);
    table.forget(4);
    assert_eq!((table.chain(0), table.chain(1)), (&[2u16][..], &[][..]));
    assert!(table.retire(0, 2));
    assert_eq!(table, BucketTable::from_owners(3, vec![5, 6]).unwrap());
    assert_eq!(BucketTable::decode(&table.encode_with_chains()), Ok(table));
}

#[test]
fn moves_between_tables() {
    let a = BucketTable::from_owners(0, vec![1, 2, 3, 4]).unwrap();
    let b = BucketTable::from_owners(1, vec![1, 3, 3, 1]).unwrap();
    assert_eq!(a.moves(&b).collect::<Vec<_>>(), [(1, 2, 3), (3, 4, 1)]);
}

/// The bytes of the module page, by hand.
#[test]
fn wire_form_by_hand() {
    let plain = BucketTable::from_owners(0x0102_0304, vec![0, 1, 0, 1]).unwrap();
    assert_eq!(plain.encode(), [1, 0, 1, 2, 3, 4, 2, 0, 1, 0, 1]);
    let runs = BucketTable::from_owners(5, vec![7, 7, 7, 9]).unwrap();
    assert_eq!(runs.encode_with_chains(), [1, 0, 0, 0, 0, 5, 2, 7, 7, 7, 9], "two runs would save nothing");
}

#[test]
fn wire_form_with_runs_wide_units_and_chains_by_hand() {
    let runs = BucketTable::from_owners(5, vec![7; 8]).unwrap();
    assert_eq!(runs.encode(), [1, 2, 0, 0, 0, 5, 3, 7, 7]);
    let wide = BucketTable::from_owners(5, vec![0x0123, 4]).unwrap();
    assert_eq!(wide.encode(), [1, 1, 0, 0, 0, 5, 1, 0x01, 0x23, 0, 4]);
    let chains = with_chains(5, &[1, 2], &[&[2, 3], &[]]);
    assert_eq!(chains.encode_with_chains(), [1, 4, 0, 0, 0, 5, 1, 1, 2, 0, 2, 2, 3, 0, 0]);
    assert_eq!(BucketTable::decode(&chains.encode_with_chains()), Ok(chains));
}

#[test]
fn a_peer_gets_128_buckets_in_135_bytes() {
    let worst: Vec<u16> = (0..128).map(|bucket| bucket * 7 % 64).collect();
    assert_eq!(BucketTable::from_owners(9, worst).unwrap().encode().len(), 135);
    assert_eq!(BucketTable::new(128, &units(&[1; 4])).unwrap().encode().len(), 7 + 4 * 2);
}

#[test]
fn malformed_bytes_are_named() {
    use DecodeError as E;
    let chain = |bytes: &[u8]| [&[1, 4, 0, 0, 0, 5, 1, 1, 2][..], bytes].concat();
    let cases: Vec<(Vec<u8>, E)> = vec![
        (vec![], E::Truncated),
        (vec![2, 0, 0, 0, 0, 0, 0, 1], E::Format(2)),
        (vec![1, 0x88, 0, 0, 0, 0, 0, 1], E::Flags(0x88)),
        (vec![1, 0, 0, 0, 0, 0, 17], E::TooLarge(17)),
        (vec![1, 0, 0, 0, 0, 0, 64], E::TooLarge(64)),
        (vec![1, 0, 0, 0, 0, 0, 255], E::TooLarge(255)),
        (vec![1, 0, 0, 0, 0, 0, 1, 1], E::Truncated),
        (vec![1, 0, 0, 0, 0, 0, 1, 1, 2, 3], E::Trailing),
        (vec![1, 2, 0, 0, 0, 0, 1, 2, 0], E::Run),
        (chain(&[0, 1, 1, 0, 0]), E::Chain),
        (chain(&[0, 2, 2, 2, 0, 0]), E::Chain),
        (chain(&[0, 5, 2, 3, 4, 5, 6, 0, 0]), E::Chain),
        (chain(&[2, 0]), E::Run),
        (chain(&[1, 1, 2]), E::Chain),
        (chain(&[0, 0]), E::Truncated),
    ];
    for (bytes, error) in cases {
        assert_eq!(BucketTable::decode(&bytes), Err(error), "{bytes:?}");
    }
    let large = BucketTable::new(256, &units(&[1])).unwrap().encode();
    assert_eq!(BucketTable::decode_at_most(&large, 128), Err(E::TooLarge(8)));
    assert!(BucketTable::decode_at_most(&large, 256).is_ok());
}

fn any_table() -> impl Strategy<Value = BucketTable> {
    let bucket = |ids: u16| (0..ids, proptest::collection::vec(0..ids, 0..=CHAIN_MAX), 1usize..400);
    let filled = move |log2: u32, ids: u16| {
        proptest::collection::vec(bucket(ids), 1..40).prop_map(move |parts| {
            let size = 1usize << log2;
            let (mut owners, mut chains) = (Vec::new(), Vec::new());
            for (owner, earlier, run) in parts.iter().cycle() {
                let mut chain = Chain::default();
                for &unit in earlier.iter().filter(|unit| *unit != owner) {
                    chain.push_oldest(unit);
                }
                owners.resize((owners.len() + run).min(size), *owner);
                chains.resize(owners.len(), chain);
                if owners.len() == size {
                    break;
                }
            }
            (owners, chains)
        })
    };
    (any::<u32>(), (0u32..=12, prop_oneof![Just(4u16), Just(256), Just(u16::MAX)]))
        .prop_flat_map(move |(era, (log2, ids))| (Just(era), filled(log2, ids)))
        .prop_map(|(era, (owners, chains))| BucketTable::from_parts(era, owners, chains))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn encode_decode_round_trip(table in any_table()) {
        prop_assert_eq!(BucketTable::decode(&table.encode_with_chains()), Ok(table.clone()));
        let bare = BucketTable::from_owners(table.era(), table.owners().to_vec()).unwrap();
        prop_assert_eq!(BucketTable::decode(&table.encode()), Ok(bare));
    }

    #[test]
    fn truncated_tables_are_refused_at_every_byte(table in any_table()) {
        let bytes = table.encode_with_chains();
        for len in (0..bytes.len()).take(300) {
            prop_assert_eq!(BucketTable::decode(&bytes[..len]), Err(DecodeError::Truncated));
        }
    }

    /// Damaged tables: refused, or a table that keeps all rules; never a panic.
    #[test]
    fn damaged_tables_never_break_a_rule(table in any_table(), at: proptest::sample::Index, to: u8) {
        let mut bytes = table.encode_with_chains();
        let at = at.index(bytes.len());
        bytes[at] = to;
        if let Ok(table) = BucketTable::decode(&bytes) {
            check_rules(&table);
        }
    }

    #[test]
    fn garbage_never_panics(mut bytes in proptest::collection::vec(any::<u8>(), 0..600), plausible: bool) {
        if plausible && bytes.len() > 7 {
            bytes[0] = 1;
            bytes[1] &= 7;
            bytes[6] %= 10;
        }
        if let Ok(table) = BucketTable::decode(&bytes) {
            check_rules(&table);
        }
    }
}

fn check_rules(table: &BucketTable) {
    assert!(table.buckets().is_power_of_two() && table.buckets() <= BUCKETS_MAX);
    for bucket in 0..table.buckets() {
        let chain = table.chain(bucket);
        let mut distinct = chain.to_vec();
        distinct.push(table.owner(bucket));
        distinct.sort_unstable();
        distinct.dedup();
        assert!(chain.len() <= CHAIN_MAX && distinct.len() == chain.len() + 1);
    }
    assert_eq!(BucketTable::decode(&table.encode_with_chains()).as_ref(), Ok(table));
}

#[test]
fn an_heir_stands_where_the_unit_stood_and_nobody_twice() {
    let moved = |owners: &[u16]| {
        let mut owners = owners.iter();
        let only =
            |id: u16| (0..6).map(|unit| Unit { id: unit, weight: u32::from(unit == id) }).collect::<Vec<_>>();
        let mut table = BucketTable::new(1, &only(*owners.next().unwrap())).unwrap();
        for owner in owners {
            table = assign::plan(&table, &only(*owner), &[]).unwrap();
        }
        let handed = table.handed(2, 5);
        assert_eq!(handed.era(), table.era());
        (handed.owner(0), handed.chain(0).to_vec())
    };
    assert_eq!(moved(&[2]), (5, vec![]));
    assert_eq!(moved(&[2, 1]), (1, vec![5]));
    assert_eq!(moved(&[1, 2]), (5, vec![1]));
    assert_eq!(moved(&[5, 2]), (5, vec![]), "the heir is not its own predecessor");
    assert_eq!(moved(&[2, 5]), (5, vec![]));
    assert_eq!(moved(&[2, 3, 5, 1]), (1, vec![5, 3]), "the newer place counts");
    assert_eq!(moved(&[4, 3]), (3, vec![4]), "who has nothing to do with it");
}
