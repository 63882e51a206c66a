use std::collections::BTreeMap;
use std::net::IpAddr;

use proptest::prelude::*;

use super::harness::*;
use crate::manager::*;
use crate::message::Role;

fn outside(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn every_data_plane_has_blocks_and_never_the_first() {
    let cluster = Cluster::with(3);
    let blocks = |node: u16| -> Vec<u8> {
        cluster.units[&node].unit.snapshot().unwrap().blocks.iter().map(|lease| lease.block).collect()
    };
    assert_eq!((blocks(1), blocks(2), blocks(3)), (vec![1, 4, 7, 10], vec![2, 5, 8, 11], vec![3, 6, 9, 12]));
    assert!(blocks(100).is_empty());
    let leases = &cluster.units[&100].unit.snapshot().unwrap().units.leases;
    assert_eq!(leases.unit(outside("192.0.2.1"), 5 * 1_024), Some(2));
}

#[test]
fn a_unit_draws_from_new_ports_when_the_dispatchers_know_them() {
    let mut cluster = Cluster::with(2);
    cluster.units.get_mut(&100).unwrap().takes_over = false;
    let both = vec![outside("192.0.2.1"), outside("2001:db8::1")];
    cluster.command(Command::Configure { interfaces: Vec::new(), outside: both }).unwrap().unwrap();
    let count = |cluster: &Cluster| cluster.units[&1].unit.snapshot().unwrap().blocks.len();
    assert_eq!(count(&cluster), 4);
    cluster.take_over(100);
    assert_eq!(count(&cluster), 8);
    cluster.take_over(100);
    cluster.pass(1_200);
    // An address that is left out takes its leases with it.
    cluster
        .command(Command::Configure { interfaces: Vec::new(), outside: vec![outside("2001:db8::1")] })
        .unwrap()
        .unwrap();
    assert_eq!(count(&cluster), 4);
}

#[test]
fn ports_of_a_lost_unit_are_nobodys_for_a_while() {
    let mut cluster = Cluster::with(2);
    let taken: Vec<u8> =
        cluster.units[&2].unit.snapshot().unwrap().blocks.iter().map(|lease| lease.block).collect();
    cluster.kill(2);
    cluster.pass(1_000);
    cluster.start(3, Role::DataPlane, 7);
    cluster.step(add(3, Role::DataPlane)).unwrap();
    cluster.pass(2_000);
    let blocks = |cluster: &Cluster, node: u16| -> Vec<u8> {
        cluster.units[&node].unit.snapshot().unwrap().blocks.iter().map(|lease| lease.block).collect()
    };
    assert!(blocks(&cluster, 3).iter().all(|block| !taken.contains(block)));
    assert_eq!(cluster.manager.status().quarantined, 4);
    // A restart of the manager does not shorten it.
    cluster.pass(200_000);
    cluster.restart();
    cluster.pass(100_000);
    assert_eq!(cluster.manager.status().quarantined, 4);
    cluster.pass(145_000);
    assert_eq!(cluster.manager.status().quarantined, 0);
    cluster.start(4, Role::DataPlane, 7);
    cluster.step(add(4, Role::DataPlane)).unwrap();
    cluster.pass(2_000);
    assert_eq!(blocks(&cluster, 4), taken);
}

#[test]
fn a_unit_for_which_no_ports_are_left_waits() {
    let mut cluster = Cluster::with(2);
    cluster.settings.blocks_per_unit = 40;
    cluster.restart();
    cluster.step(Step::Weight { node: 1, weight: 2 }).unwrap();
    cluster.pass(2_000);
    assert_eq!(cluster.manager.state().blocks.len(), 48, "a quarter is for units to come");
    let come = 3..=17;
    come.clone().for_each(|node| cluster.start(node, Role::DataPlane, 7));
    cluster.command(Command::Change(come.map(|node| add(node, Role::DataPlane)).collect())).unwrap().unwrap();
    cluster.pass(2_000);
    assert_eq!(cluster.manager.state().blocks.len(), 63, "all but the first");
    cluster.start(18, Role::DataPlane, 7);
    cluster.step(add(18, Role::DataPlane)).unwrap();
    cluster.pass(500);
    let waits = cluster.manager.status().waits.unwrap();
    assert_eq!(
        waits,
        "no block of ports of 192.0.2.1 is left for unit 18; 0 of a dead unit are not free yet"
    );
    cluster.step(Step::Drain { node: 2, remove: true, migrate: false }).unwrap();
    cluster.pass(6_000);
    assert_eq!(cluster.standing(2), Standing::Free);
    assert_eq!(cluster.standing(18), Standing::Active);
}

#[test]
fn more_units_than_an_address_has_blocks_share_several_addresses() {
    let mut state = State::new(KEY);
    state.outside = (1..=16u8).map(|last| IpAddr::from([192, 0, 2, last])).collect();
    for node in 1..=250 {
        let unit = UnitRecord {
            address: address(node),
            role: Role::DataPlane,
            weight: 1,
            share_permille: 1_000,
            standing: Standing::Active,
            joined: 0,
            instance: 0,
            forget: false,
            migrate: false,
        };
        state.units.insert(node, unit);
        plan::lease(&mut state, 4).unwrap();
    }
    let count = |node| state.blocks.iter().filter(|block| block.node == Some(node)).count();
    assert!((1..=250).all(|node| count(node) > 0));
}

proptest! {
    /// Whatever comes and goes: no block twice, none is the first, and what one unit had until it died is nobody's.
    #[test]
    fn no_block_is_leased_twice(turns in proptest::collection::vec((1..12u16, 0..3u8), 1..40), per_unit in 1..20usize) {
        let mut state = State::new(KEY);
        state.outside = vec![outside("192.0.2.1"), outside("192.0.2.2")];
        let mut quarantined: BTreeMap<(IpAddr, u8), ()> = BTreeMap::new();
        for (node, what) in turns {
            let unit = UnitRecord {
                address: address(node),
                role: Role::Both,
                weight: 1,
                share_permille: 1_000,
                standing: Standing::Active,
                joined: 0,
                instance: 0,
                forget: false,
                migrate: false,
            };
            if what == 0 {
                state.units.insert(node, unit);
            } else if state.units.remove(&node).is_some() {
                let clean = what == 1;
                if !clean {
                    let lost = state.blocks.iter().filter(|block| block.node == Some(node));
                    quarantined.extend(lost.map(|block| ((block.address, block.block), ())));
                }
                plan::end_blocks(&mut state, node, clean);
            }
            let _ = plan::lease(&mut state, per_unit);
            let mut places: Vec<_> = state.blocks.iter().map(|block| (block.address, block.block)).collect();
            prop_assert!(places.iter().all(|(_, block)| (1..64).contains(block)));
            places.sort_unstable();
            let all = places.len();
            places.dedup();
            prop_assert_eq!(places.len(), all);
            for block in &state.blocks {
                prop_assert_eq!(block.node.is_none(), quarantined.contains_key(&(block.address, block.block)));
                prop_assert!(block.node.is_none_or(|node| state.units.contains_key(&node)));
            }
        }
    }
}
