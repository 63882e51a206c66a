#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::table::Unit;
use proptest::prelude::*;

fn table(cores: u16) -> BucketTable {
    let units: Vec<Unit> = (0..cores).map(|id| Unit { id, weight: 1 }).collect();
    BucketTable::new(128, &units).unwrap()
}

fn cores(list: &[u8]) -> CoreSet {
    list.iter().copied().collect()
}

fn usable(list: &[u8]) -> RemoteCores {
    RemoteCores { usable: cores(list), ..RemoteCores::default() }
}

/// Spreads small numbers over all bits, as flow hashes are.
fn hash(flow: u32) -> u32 {
    flow.wrapping_mul(0x85eb_ca77) ^ (flow.wrapping_mul(0xc2b2_ae3d) >> 13)
}

#[test]
fn names_and_numbers() {
    for policy in Policy::ALL {
        assert_eq!(Policy::from_u8(policy.to_u8()), Some(policy));
        assert_eq!(policy.to_string().parse(), Ok(policy));
    }
    assert_eq!(Policy::from_u8(4), None);
    assert_eq!("fastest".parse::<Policy>(), Err(UnknownPolicy));
    assert_eq!(Policy::default(), Policy::Hash);
}

#[test]
fn a_class_has_its_own_cores_and_others_the_common_ones() {
    let remote = RemoteCores {
        usable: cores(&[0, 1, 2, 3]),
        reserved: vec![(5, cores(&[3]))],
        preferred: vec![(6, cores(&[1]))],
        ..RemoteCores::default()
    };
    let pools = Pools::new(&remote);
    assert_eq!(*pools.of_class(5), cores(&[3]));
    assert_eq!(*pools.of_class(6), cores(&[1]));
    assert_eq!(*pools.of_class(0), cores(&[0, 1, 2]));
}

#[test]
fn hash_policy_is_the_receivers_table_and_keeps_no_memory() {
    let table = table(4);
    let mut chooser = CoreChooser::new(Policy::Hash, &usable(&[0, 1, 2, 3]), 64, 30);
    for flow in 0..1000 {
        let hash = hash(flow);
        assert_eq!(chooser.choose(&table, hash, 0, 0, 0), Some(table.owner_of_hash(hash) as u8));
    }
    assert_eq!(chooser.flows(), 0);
}

#[test]
fn hash_policy_replaces_an_unusable_owner_by_the_flow_alone() {
    let table = table(4);
    let mut chooser = CoreChooser::new(Policy::Hash, &usable(&[0, 1, 3]), 64, 30);
    let mut seen = [0; 4];
    for flow in 0..4000 {
        let hash = hash(flow);
        let core = chooser.choose(&table, hash, 0, flow, flow).unwrap();
        if table.owner_of_hash(hash) == 2 {
            seen[usize::from(core)] += 1;
        } else {
            assert_eq!(u16::from(core), table.owner_of_hash(hash));
        }
        assert_eq!(chooser.choose(&table, hash, 0, 77, flow + 9), Some(core), "same flow, same core");
    }
    assert_eq!(seen[2], 0);
    assert!([seen[0], seen[1], seen[3]].iter().all(|&n| n > 200), "core 2's flows are spread: {seen:?}");
}

#[test]
fn owners_that_no_header_can_name_are_replaced() {
    let table = BucketTable::from_owners(0, vec![300; 128]).unwrap();
    let mut chooser = CoreChooser::new(Policy::Hash, &usable(&[2]), 4, 30);
    assert_eq!(chooser.choose(&table, 1, 0, 0, 0), Some(2));
}

#[test]
fn round_robin_gives_each_core_its_turn_and_flows_stay() {
    let table = table(3);
    let mut chooser = CoreChooser::new(Policy::RoundRobin, &usable(&[0, 1, 2]), 4096, 30);
    let first: Vec<_> = (0..9).map(|flow| chooser.choose(&table, hash(flow), 0, 0, 0).unwrap()).collect();
    assert_eq!(first, [0, 1, 2, 0, 1, 2, 0, 1, 2]);
    let again: Vec<_> = (0..9).map(|flow| chooser.choose(&table, hash(flow), 0, 0, 5).unwrap()).collect();
    assert_eq!(again, first);
}

/// Row T2: connection state.
#[test]
fn a_new_connection_on_old_ports_is_a_new_flow_but_for_the_hash() {
    let table = table(3);
    for policy in [Policy::RoundRobin, Policy::Hash] {
        let mut chooser = CoreChooser::new(policy, &usable(&[0, 1, 2]), 4096, 30);
        let mut connection = |mark: u8, packets: u32| -> Vec<u8> {
            chooser.begin_connection(7, 0, NonZeroU8::new(mark).unwrap(), 0);
            (0..packets).map(|_| chooser.choose(&table, 7, 0, 0, 0).unwrap()).collect()
        };
        let (first, repeated, second) = (connection(1, 3), connection(1, 2), connection(2, 2));
        let by_table = table.owner_of_hash(7) as u8;
        let expected = if policy == Policy::Hash { [by_table; 3] } else { [0, 0, 1] };
        for (cores, core) in [first, repeated, second].iter().zip(expected) {
            assert!(cores.iter().all(|chosen| *chosen == core), "{policy}: {cores:?}, not {core}");
        }
    }
}

#[test]
fn random_follows_the_random_word_once() {
    let table = table(4);
    let mut chooser = CoreChooser::new(Policy::Random, &usable(&[0, 1, 2, 3]), 4096, 30);
    assert_eq!(chooser.choose(&table, 1, 0, 0, 0), Some(0));
    assert_eq!(chooser.choose(&table, 2, 0, u32::MAX, 0), Some(3));
    assert_eq!(chooser.choose(&table, 1, 0, u32::MAX, 0), Some(0), "a flow stays");
    assert_eq!(chooser.choose(&table, 1, 0, u32::MAX, 31), Some(3), "silent for 31 s: a new flow");
}

#[test]
fn least_loaded_follows_told_load_and_own_flows() {
    let table = table(3);
    let mut told = usable(&[0, 1, 2]);
    told.load = vec![200, 10, 200];
    let mut chooser = CoreChooser::new(Policy::LeastLoaded, &told, 4096, 30);
    assert_eq!(chooser.choose(&table, hash(0), 0, 0, 0), Some(1));
    let mut counts = [0u32; 3];
    for flow in 0..900 {
        counts[usize::from(chooser.choose(&table, hash(flow), 0, 0, 0).unwrap())] += 1;
    }
    assert!(counts[1] > counts[0] + counts[2], "the idle core gets most: {counts:?}");
    assert!(counts[0] > 20 && counts[2] > 20, "but not all run to it: {counts:?}");

    let mut even = CoreChooser::new(Policy::LeastLoaded, &usable(&[0, 1, 2]), 4096, 30);
    let mut counts = [0u32; 3];
    for flow in 0..900 {
        counts[usize::from(even.choose(&table, hash(flow), 0, 0, 0).unwrap())] += 1;
    }
    assert!(counts.iter().all(|&n| (298..=302).contains(&n)), "{counts:?}");
}

#[test]
fn reserved_cores_carry_their_class_only() {
    let table = table(4);
    let told = RemoteCores { reserved: vec![(7, cores(&[3]))], ..usable(&[0, 1, 2, 3]) };
    for policy in Policy::ALL {
        let mut chooser = CoreChooser::new(policy, &told, 4096, 30);
        for flow in 0..500 {
            assert_eq!(chooser.choose(&table, hash(flow), 7, hash(!flow), 0), Some(3));
            assert_ne!(chooser.choose(&table, hash(flow), 0, hash(!flow), 0), Some(3));
        }
    }
}

#[test]
fn a_flow_of_another_class_moves_only_where_a_class_has_cores_of_its_own() {
    let table = table(4);
    for policy in Policy::ALL {
        let mut told = usable(&[0, 1, 2, 3]);
        told.reserved = vec![(2, cores(&[3]))];
        let mut chooser = CoreChooser::new(policy, &told, 256, 30);
        let mut choose = |flow: u32, class: u8| {
            chooser.choose(&table, hash(flow), class, flow.wrapping_mul(0x9e37_79b9), 0).unwrap()
        };
        for flow in 0..100 {
            let bulk = choose(flow, 0);
            assert_eq!(choose(flow, 1), bulk, "{policy}: shape or marks told another class");
            assert_eq!((choose(flow, 2), choose(flow, 4)), (3, bulk), "{policy}");
        }
    }
}

#[test]
fn preferred_cores_are_used_while_usable_and_shared() {
    let table = table(4);
    let mut told = RemoteCores { preferred: vec![(5, cores(&[2]))], ..usable(&[0, 1, 2, 3]) };
    let mut chooser = CoreChooser::new(Policy::RoundRobin, &told, 4096, 30);
    assert_eq!(chooser.choose(&table, hash(1), 5, 0, 0), Some(2));
    let common: Vec<_> = (10..14).map(|flow| chooser.choose(&table, hash(flow), 0, 0, 0).unwrap()).collect();
    assert_eq!(common, [0, 1, 2, 3], "others may use it too");
    told.usable.remove(2);
    chooser.update(&told);
    let core = chooser.choose(&table, hash(1), 5, 0, 1).unwrap();
    assert!(told.usable.contains(core));
}

#[test]
fn a_class_without_cores_of_its_own_gets_any_usable_one() {
    let table = table(2);
    let told = RemoteCores { reserved: vec![(7, cores(&[0, 1]))], ..usable(&[0, 1]) };
    let mut chooser = CoreChooser::new(Policy::Hash, &told, 64, 30);
    assert!(chooser.choose(&table, hash(1), 0, 0, 0).is_some());
    // Class 7's own cores are unusable: it is served by the rest.
    let told = RemoteCores { reserved: vec![(7, cores(&[9]))], ..usable(&[0, 1]) };
    chooser.update(&told);
    assert!(chooser.choose(&table, hash(1), 7, 0, 0).is_some_and(|core| core < 2));
    chooser.update(&RemoteCores::default());
    assert_eq!(chooser.choose(&table, hash(1), 7, 0, 0), None, "no usable core at all");
}

#[test]
fn an_update_moves_only_flows_whose_core_went() {
    let table = table(4);
    let mut told = usable(&[0, 1, 2, 3]);
    let mut chooser = CoreChooser::new(Policy::RoundRobin, &told, 4096, 30);
    let before: Vec<_> = (0..400).map(|flow| chooser.choose(&table, hash(flow), 0, 0, 0).unwrap()).collect();
    let registered = chooser.flows();
    assert!(registered > 390, "few sets are crowded: {registered}");
    told.usable.remove(1);
    chooser.update(&told);
    for (flow, &core) in (0..400).zip(&before) {
        let after = chooser.choose(&table, hash(flow), 0, 0, 1).unwrap();
        assert!(if core == 1 { after != 1 } else { after == core });
    }
    assert_eq!(chooser.flows(), registered, "moved, not added");
}

#[test]
fn the_receiver_may_assign() {
    let table = table(4);
    let mut chooser = CoreChooser::new(Policy::Hash, &usable(&[0, 1, 2, 3]), 64, 30);
    let flow = hash(5);
    let wanted = (table.owner_of_hash(flow) as u8 + 1) % 4;
    assert!(!chooser.assign(flow, 0, 200, 0), "no such core");
    assert!(chooser.assign(flow, 0, wanted, 0));
    assert_eq!(chooser.choose(&table, flow, 0, 0, 10), Some(wanted));
    assert_eq!(chooser.choose(&table, hash(6), 0, 0, 10), Some(table.owner_of_hash(hash(6)) as u8));
    for _ in 0..10 {
        chooser.sweep(60);
    }
    assert_eq!(chooser.flows(), 0);
    assert_eq!(chooser.choose(&table, flow, 0, 0, 60), Some(table.owner_of_hash(flow) as u8));
}

/// More live flows than the register has room: memory stays, and still no flow changes its core.
#[test]
fn an_overfull_register_splits_no_flow() {
    let table = table(4);
    for policy in [Policy::RoundRobin, Policy::Random, Policy::LeastLoaded] {
        let mut chooser = CoreChooser::new(policy, &usable(&[0, 1, 2, 3]), 64, 30);
        let mut first: Vec<Option<u8>> = vec![None; 1000];
        for round in 0..20u32 {
            for flow in 0..1000u32 {
                // Some of the flows end half way, so that slots become free while others go on.
                if flow % 3 == 0 && round > 8 {
                    continue;
                }
                let core = chooser.choose(&table, hash(flow), 0, hash(flow ^ round << 16), round * 7);
                assert!(core.is_some());
                let known = first[flow as usize].get_or_insert(core.unwrap());
                assert_eq!(Some(*known), core, "{policy}: flow {flow} in round {round}");
            }
            assert!(chooser.flows() <= chooser.capacity());
        }
        assert_eq!(chooser.capacity(), 64);
    }
}

fn any_set() -> impl Strategy<Value = CoreSet> {
    proptest::collection::vec(0u8..12, 0..6).prop_map(|list| list.into_iter().collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Any information from a peer: a usable core whenever there is one, a reserved one only for its class.
    #[test]
    fn choices_are_always_allowed(
        usable in any_set(),
        reserved in proptest::collection::vec((0u8..4, any_set()), 0..20),
        preferred in proptest::collection::vec((0u8..40, any_set()), 0..20),
        load in proptest::collection::vec(any::<u8>(), 0..300),
        flows in proptest::collection::vec((any::<u32>(), 0u8..40, any::<u32>(), any::<u32>()), 1..60),
        policy in 0u8..4,
    ) {
        let table = table(8);
        let told = RemoteCores { usable, reserved, preferred, load };
        let mut chooser = CoreChooser::new(Policy::from_u8(policy).unwrap(), &told, 16, 5);
        for (hash, class, random, now_s) in flows {
            let core = chooser.choose(&table, hash, class, random, now_s);
            prop_assert_eq!(core.is_none(), usable.is_empty());
            let Some(core) = core else { continue };
            prop_assert!(usable.contains(core));
            let owns = |other: u8| told.reserved.iter().filter(move |(class, _)| *class == other);
            let mine = owns(class).any(|(_, set)| set.contains(core));
            let foreign = told.reserved.iter().any(|(other, set)| *other != class && set.contains(core));
            if foreign && !mine {
                // Only when nothing else was left.
                let open = told.reserved.iter().filter(|(other, _)| *other != class).fold(usable, |left, (_, set)| left.without(set));
                prop_assert!(open.is_empty());
            }
        }
    }
}
