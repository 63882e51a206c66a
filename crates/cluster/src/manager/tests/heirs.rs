use std::net::IpAddr;

use super::harness::*;
use crate::manager::*;
use crate::message::{Pair, Role};

fn outside() -> IpAddr {
    "192.0.2.1".parse().unwrap()
}

/// Data planes 1 to 3 that keep copies of each other's flows, and dispatcher 100.
fn replicating() -> Cluster {
    let mut cluster = Cluster::with_settings(3, Settings { replicate: true, ..settings() });
    cluster.pass(1_000);
    cluster
}

fn backup(cluster: &Cluster, unit: u16) -> u16 {
    let copies = &cluster.manager.state().copies;
    copies.iter().find(|pair| pair.unit == unit).unwrap_or_else(|| panic!("{copies:?}")).heir
}

/// Blocks that a unit may draw from.
fn drawn(cluster: &Cluster, unit: u16) -> Vec<u8> {
    cluster.units[&unit].unit.snapshot().unwrap().blocks.iter().map(|lease| lease.block).collect()
}

/// Who gets packets to a block, as the dispatcher has it.
fn holder(cluster: &Cluster, block: u8) -> Option<u16> {
    let leases = &cluster.units[&100].unit.snapshot().unwrap().units.leases;
    leases.unit(outside(), u16::from(block) * 1_024)
}

fn named(cluster: &Cluster, unit: u16) -> bool {
    (0..64)
        .any(|bucket| cluster.table().owner(bucket) == unit || cluster.table().chain(bucket).contains(&unit))
}

#[test]
fn each_has_copies_of_one_other_and_keeps_them_when_others_come() {
    let mut cluster = replicating();
    let pairs = |cluster: &Cluster| cluster.manager.state().copies.clone();
    assert_eq!(pairs(&cluster), [(1, 2), (2, 3), (3, 1)].map(|(unit, heir)| Pair { unit, heir }));
    cluster.start(4, Role::DataPlane, 7);
    cluster.step(add(4, Role::DataPlane)).unwrap();
    cluster.pass(3_000);
    assert_eq!(pairs(&cluster)[..3], [(1, 2), (2, 3), (3, 1)].map(|(unit, heir)| Pair { unit, heir }));
    assert_eq!(pairs(&cluster).len(), 4);
    // Who drains goes on to send its own, and keeps nobody's.
    cluster.step(Step::Drain { node: 2, remove: false, migrate: false }).unwrap();
    cluster.pass(3_000);
    assert!(pairs(&cluster).iter().all(|pair| pair.heir != 2) && backup(&cluster, 2) == 3);
    // It is an option.
    cluster.settings.replicate = false;
    cluster.restart();
    cluster.pass(3_000);
    assert_eq!(pairs(&cluster), []);
}

#[test]
fn the_flows_of_a_dead_unit_are_its_backups_with_their_ports() {
    let mut cluster = replicating();
    let (lost, heir) = (drawn(&cluster, 2), backup(&cluster, 2));
    let own = drawn(&cluster, heir);
    let both = cluster.table().count(2) + cluster.table().count(heir);
    cluster.units.get_mut(&heir).unwrap().inherited = 9;
    cluster.kill(2);
    cluster.pass(440);
    assert!(cluster.said(&format!("lost: silent; unit {heir} has its flows")), "{:?}", cluster.events);
    assert_eq!(cluster.units[&heir].heir_of, [2]);
    assert!(!named(&cluster, 2));
    assert!(lost.iter().all(|block| holder(&cluster, *block) == Some(heir)));
    // All at once is the heir's, then it is shared.
    assert_eq!(cluster.table().count(heir), both);
    cluster.pass(2_000);
    assert_eq!(cluster.table().count(heir), 32, "{:?}", cluster.events);
    assert_eq!(cluster.units[&heir].heir_of, [2], "once");
    assert_eq!(drawn(&cluster, heir), own, "no new flow gets one of the ports");
    // When the last of the flows has ended nobody has the ports, and later they are free.
    cluster.pass(5_000);
    assert_eq!(cluster.manager.status().quarantined, 0);
    cluster.units.get_mut(&heir).unwrap().inherited = 0;
    cluster.pass(1_000);
    assert_eq!(cluster.manager.status().quarantined, 4);
    cluster.pass(245_000);
    assert_eq!(cluster.manager.status().quarantined, 0);
    assert_eq!(cluster.manager.state().blocks.len(), 8);
}

#[test]
fn who_has_not_all_copies_is_no_heir() {
    let mut cluster = replicating();
    cluster.units.get_mut(&2).unwrap().copies = false;
    cluster.pass(1_000);
    cluster.kill(2);
    cluster.pass(2_000);
    assert!(cluster.units.values().all(|sim| sim.heir_of.is_empty()));
    assert_eq!(cluster.manager.status().quarantined, 4);
}

#[test]
fn a_process_that_was_started_anew_has_an_heir_too() {
    let mut cluster = replicating();
    cluster.kill(2);
    cluster.start(2, Role::DataPlane, 8);
    cluster.pass(100);
    assert_eq!(cluster.units[&3].heir_of, [2]);
    cluster.pass(5_000);
    assert_eq!(cluster.standing(2), Standing::Active);
    assert_eq!(cluster.units[&2].forgot, 1);
    assert_eq!(cluster.units[&3].heir_of, [2], "its new flows are its own");
}

#[test]
fn an_heir_that_dies_too_inherits_nothing() {
    let mut cluster = replicating();
    cluster.kill(2);
    cluster.kill(3);
    cluster.pass(3_000);
    assert!(cluster.units[&1].heir_of.contains(&3), "{:?}", cluster.events);
    assert!(!cluster.units[&1].heir_of.contains(&2));
    assert!(!named(&cluster, 2) && !named(&cluster, 3));
    assert_eq!(cluster.owned(), [64, 0]);
}

/// The manager ends at any moment of it, and another one goes on.
#[test]
fn a_restart_of_the_manager_changes_nothing() {
    for acknowledged in 0..4 {
        let mut cluster = replicating();
        cluster.units.values_mut().for_each(|sim| sim.takes_over = false);
        cluster.kill(2);
        cluster.pass(440);
        for node in [1, 3, 100].into_iter().take(acknowledged) {
            cluster.take_over(node);
        }
        cluster.restart();
        cluster.units.values_mut().for_each(|sim| sim.takes_over = true);
        [1, 3, 100, 1, 3, 100].into_iter().for_each(|node| cluster.take_over(node));
        cluster.pass(6_000);
        assert_eq!(cluster.units[&3].heir_of, [2], "after {acknowledged}: {:?}", cluster.events);
        assert_eq!(cluster.owned(), [32, 32, 0]);
        assert_eq!(cluster.manager.stage(), Stage::Idle);
    }
}

#[test]
fn a_unit_hands_its_flows_over_and_leaves() {
    let mut cluster = Cluster::with(3);
    let blocks = drawn(&cluster, 1);
    // Flows everywhere, and they never end.
    let sim = cluster.units.get_mut(&1).unwrap();
    (sim.live, sim.in_use) = (vec![2; 64], 128);
    cluster.step(Step::Drain { node: 1, remove: true, migrate: true }).unwrap();
    cluster.pass(800);
    let heir = backup(&cluster, 1);
    assert_eq!(cluster.standing(1), Standing::Draining { remove: true });
    assert!(cluster.units[&heir].heir_of.is_empty() && named(&cluster, 1), "copies are not complete yet");
    // The dispatcher hesitates: ports stay where they are until the heir has taken over and that is in force.
    cluster.units.get_mut(&100).unwrap().takes_over = false;
    cluster.pass(1_000);
    assert_eq!(cluster.units[&heir].heir_of, [1], "{:?}", cluster.events);
    assert!(blocks.iter().all(|block| holder(&cluster, *block) == Some(1)));
    cluster.units.get_mut(&heir).unwrap().inherited = 128;
    cluster.take_over(100);
    assert!(blocks.iter().all(|block| holder(&cluster, *block) == Some(heir)));
    assert!(cluster.units[&1].left == 0, "packets that are under way find it");
    cluster.take_over(100);
    cluster.units.get_mut(&100).unwrap().takes_over = true;
    cluster.pass(4_000);
    assert_eq!(cluster.standing(1), Standing::Free, "{:?}", cluster.events);
    assert_eq!((cluster.units[&1].left, cluster.units[&heir].heir_of.len()), (1, 1));
    assert!(!named(&cluster, 1));
    assert_eq!(cluster.owned()[1..3], [32, 32]);
    // It takes part again like any other.
    cluster.step(Step::Add { node: 1, enrol: None, weight: None }).unwrap();
    cluster.pass(3_000);
    assert_eq!(cluster.standing(1), Standing::Active);
    assert_eq!(cluster.manager.state().copies, []);
}

#[test]
fn a_unit_that_stays_hands_over_once() {
    let mut cluster = Cluster::with(3);
    cluster.units.get_mut(&1).unwrap().in_use = 1;
    cluster.step(Step::Drain { node: 1, remove: false, migrate: true }).unwrap();
    cluster.pass(10_000);
    let eras = cluster.manager.status().in_force;
    cluster.pass(10_000);
    assert_eq!(cluster.manager.status().in_force, eras, "nothing more happens: {:?}", cluster.events);
    assert_eq!(cluster.standing(1), Standing::Draining { remove: false });
    assert!(cluster.manager.status().units[0].drained);
}
