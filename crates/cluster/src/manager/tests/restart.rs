use super::harness::*;
use crate::manager::*;
use crate::message::Role;

/// A cluster whose change to era 1 stands after `acknowledged` acknowledgements.
fn halfway(acknowledged: usize) -> Cluster {
    let mut cluster = Cluster::with(2);
    cluster.start(3, Role::DataPlane, 7);
    for sim in cluster.units.values_mut() {
        sim.takes_over = false;
    }
    cluster.step(add(3, Role::DataPlane)).unwrap();
    for node in [1, 2, 3, 100, 1, 2, 3, 100].into_iter().take(acknowledged) {
        cluster.take_over(node);
    }
    cluster
}

fn all_take_over(cluster: &mut Cluster) {
    for _ in 0..3 {
        for node in [1, 2, 3, 100] {
            cluster.units.get_mut(&node).unwrap().takes_over = true;
            cluster.take_over(node);
        }
    }
}

#[test]
fn a_manager_that_starts_anew_goes_on_at_every_step() {
    for acknowledged in 0..=8 {
        let mut cluster = halfway(acknowledged);
        let stage = cluster.manager.stage();
        let before = cluster.in_force();
        cluster.units.values_mut().for_each(|sim| sim.live.fill(1));
        cluster.restart();
        for (before, now) in before.iter().zip(cluster.in_force()) {
            assert!(now >= *before, "{stage:?}: an era that was in force is not taken back");
        }
        all_take_over(&mut cluster);
        cluster.pass(1_500);
        assert_eq!(cluster.in_force(), [Some(1); 4], "{stage:?} after {acknowledged}: {:?}", cluster.events);
        assert_eq!(cluster.manager.stage(), Stage::Idle);
        assert_eq!(cluster.owned(), [22, 21, 21, 0]);
        let forgot: usize = cluster.units.values().map(|sim| sim.forgot).sum();
        // The unit that joins forgets, perhaps twice, before it has a flow. Nobody else does.
        assert!((1..=2).contains(&forgot), "{stage:?}: {forgot}");
        assert!(cluster.units.values().all(|sim| sim.unit.ignored() < 10));
    }
}

#[test]
fn a_unit_that_ends_while_there_is_no_manager_is_lost_after_the_grace() {
    for acknowledged in 0..=8 {
        let mut cluster = halfway(acknowledged);
        cluster.kill(2);
        cluster.restart();
        cluster.pass(900);
        assert_eq!(cluster.standing(2), Standing::Active, "the grace");
        for _ in 0..4 {
            for node in [1, 3, 100] {
                cluster.units.get_mut(&node).unwrap().takes_over = true;
                cluster.take_over(node);
            }
        }
        cluster.pass(2_000);
        assert_eq!(cluster.standing(2), Standing::Lost);
        assert_eq!(cluster.in_force(), [Some(2); 3], "after {acknowledged}: {:?}", cluster.events);
        assert_eq!(cluster.table().count(2), 0);
    }
}

#[test]
fn a_process_that_was_restarted_while_there_was_no_manager_has_no_flows() {
    let mut cluster = Cluster::with(3);
    cluster.kill(2);
    cluster.start(2, Role::DataPlane, 9);
    let mut cluster = {
        cluster.store = cluster.store.clone();
        cluster.restart();
        cluster
    };
    cluster.pass(3_000);
    assert!(cluster.said("was started anew"));
    assert_eq!(cluster.standing(2), Standing::Active);
}

#[test]
fn commands_that_wait_are_not_forgotten() {
    let mut cluster = Cluster::with(2);
    cluster.step(add(3, Role::DataPlane)).unwrap();
    cluster.step(Step::Weight { node: 1, weight: 2 }).unwrap();
    cluster.restart();
    cluster.start(3, Role::DataPlane, 7);
    cluster.pass(4_000);
    assert_eq!(cluster.owned(), [32, 16, 16, 0]);
    assert!(cluster.manager.status().accepted.is_empty());
}

#[test]
fn a_full_disk_refuses_changes_and_loses_nothing() {
    let mut cluster = Cluster::with(2);
    cluster.start(3, Role::DataPlane, 7);
    let state = cluster.manager.state().clone();
    cluster.disk_full = true;
    let answer = cluster.step(add(3, Role::DataPlane));
    assert_eq!(cluster.step(add(4, Role::DataPlane)), answer);
    assert_eq!(answer, Err(CommandError::Store("no space left".into())));
    let units: Vec<u16> = cluster.manager.state().units.keys().copied().collect();
    assert_eq!((units, &cluster.manager.state().accepted), (vec![1, 2, 3, 100], &state.accepted));
    cluster.pass(3_000);
    assert_eq!(cluster.in_force(), [Some(0), Some(0), None, Some(0)]);
    cluster.disk_full = false;
    cluster.step(add(3, Role::DataPlane)).unwrap();
    // Full again: units have prepared, and it comes into force when that can be written.
    let mut cluster = halfway(3);
    cluster.disk_full = true;
    cluster.take_over(100);
    cluster.pass(5_000);
    assert_eq!(cluster.manager.stage(), Stage::Preparing);
    assert_eq!(cluster.in_force(), [Some(0); 4]);
    assert!(!State::decode(&cluster.store).unwrap().change.unwrap().committing);
    cluster.disk_full = false;
    all_take_over(&mut cluster);
    cluster.pass(2_000);
    all_take_over(&mut cluster);
    cluster.pass(2_000);
    assert_eq!(cluster.in_force(), [Some(1); 4]);
}

#[test]
fn a_unit_lost_while_the_disk_is_full_is_left_out_later() {
    let mut cluster = Cluster::with(3);
    cluster.disk_full = true;
    cluster.kill(2);
    cluster.pass(3_000);
    assert_eq!(cluster.in_force(), [Some(0); 3]);
    cluster.disk_full = false;
    cluster.pass(1_500);
    assert_eq!(cluster.in_force(), [Some(1); 3]);
    assert_eq!(cluster.table().count(2), 0);
}

#[test]
fn an_old_copy_of_the_store_is_noticed() {
    let mut cluster = Cluster::with(2);
    let old = cluster.store.clone();
    cluster.step(Step::Weight { node: 1, weight: 3 }).unwrap();
    cluster.pass(1_500);
    assert_eq!(cluster.in_force(), [Some(1); 3]);
    cluster.store = old;
    cluster.restart();
    assert_eq!(cluster.units[&1].refused, [crate::message::Refusal::NewerEra]);
    cluster.pass(3_000);
    assert_eq!(cluster.in_force(), [Some(1); 3], "traffic goes on by the last snapshot");
}

/// The manager's machine was cut off, or its process stopped: those who come back do so one after the other.
#[test]
fn a_manager_that_heard_nobody_waits_for_all_when_the_first_is_back() {
    let mut cluster = Cluster::with(3);
    for node in [1, 2, 3, 100] {
        cluster.disconnect(node);
    }
    cluster.pass(20_000);
    cluster.connect(1);
    cluster.pass(600);
    cluster.connect(2);
    cluster.connect(100);
    cluster.pass(200);
    let standing = |cluster: &Cluster| [1, 2, 3, 100].map(|node| cluster.standing(node));
    assert_eq!(standing(&cluster), [Standing::Active; 4], "{:?}", cluster.events);
    assert_eq!([1, 2, 100].map(|node| cluster.units[&node].forgot), [0; 3]);
    // Who does not come in the time that there is after a start, a second here, is lost.
    cluster.pass(600);
    assert_eq!(standing(&cluster), [Standing::Active, Standing::Active, Standing::Lost, Standing::Active]);
}
