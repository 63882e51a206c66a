use super::harness::*;
use crate::manager::*;
use crate::message::Role;

#[test]
fn a_stall_of_300_ms_is_survived_and_a_silence_of_400_is_not() {
    for phase in 0..3 {
        let mut cluster = Cluster::with(3);
        cluster.pass(phase * 20);
        cluster.units.get_mut(&2).unwrap().stalled = true;
        cluster.pass(300);
        cluster.units.get_mut(&2).unwrap().stalled = false;
        cluster.pass(1_000);
        assert_eq!(cluster.standing(2), Standing::Active, "phase {phase}");
        cluster.units.get_mut(&2).unwrap().stalled = true;
        cluster.pass(420);
        assert_eq!(cluster.standing(2), Standing::Lost, "phase {phase}");
    }
}

#[test]
fn buckets_of_a_lost_unit_move_at_once_and_no_others() {
    let mut cluster = Cluster::with(4);
    let before = cluster.table().clone();
    cluster.kill(2);
    cluster.pass(460);
    assert_eq!(cluster.in_force(), [Some(1); 4], "{:?}", cluster.events);
    assert_eq!(cluster.owned(), [22, 21, 21, 0]);
    assert!(before.moves(cluster.table()).all(|(_, from, _)| from == 2));
    assert_eq!(before.moves(cluster.table()).count(), 16);
    assert_eq!(cluster.manager.status().chains, [64, 0, 0, 0, 0], "its flows are gone: nobody asks it");
    let members = &cluster.units[&1].unit.snapshot().unwrap().members;
    assert!(members.iter().all(|member| member.node != 2), "fenced");
}

#[test]
fn who_is_lost_is_fenced_before_others_begin_flows_in_its_buckets() {
    let mut cluster = Cluster::with(3);
    for sim in cluster.units.values_mut() {
        sim.takes_over = false;
    }
    cluster.kill(2);
    cluster.pass(420);
    assert_eq!(cluster.manager.stage(), Stage::Preparing);
    for sim in cluster.units.values() {
        let snapshot = sim.unit.snapshot().unwrap();
        assert_eq!((snapshot.units.in_force, snapshot.members.len()), (0, 3));
        assert!(snapshot.units.leases.iter().all(|lease| lease.node != 2));
    }
    cluster.take_over(1);
    cluster.take_over(3);
    assert_eq!(cluster.in_force(), [Some(0); 3], "the dispatcher still sends to it");
    cluster.take_over(100);
    assert_eq!(cluster.in_force(), [Some(1), Some(1), Some(0)]);
}

#[test]
fn a_lost_unit_that_comes_back_forgets_and_joins_anew() {
    let mut cluster = Cluster::with(3);
    cluster.disconnect(2);
    cluster.pass(1_000);
    assert_eq!(cluster.standing(2), Standing::Lost);
    assert_eq!(cluster.units[&2].forgot, 0, "it does not know yet");
    cluster.connect(2);
    cluster.pass(3_000);
    assert_eq!(cluster.standing(2), Standing::Active);
    assert_eq!((cluster.units[&2].left, cluster.units[&2].forgot), (1, 1));
    assert_eq!(cluster.in_force(), [Some(2); 4]);
    assert_eq!(cluster.owned(), [22, 21, 21, 0]);
    // The ports that it had are nobody's for a while; it has others.
    assert_eq!(cluster.manager.status().quarantined, 4);
    assert_eq!(cluster.units[&2].unit.snapshot().unwrap().blocks.len(), 4);
    let sim = cluster.units.get_mut(&2).unwrap();
    sim.live[5] = 1;
    cluster.disconnect(2);
    cluster.connect(2);
    cluster.pass(1_000);
    assert_eq!(cluster.units[&2].forgot, 1, "a connection that comes back in time costs nothing");
}

#[test]
fn a_restarted_process_is_lost_at_once() {
    let mut cluster = Cluster::with(3);
    cluster.kill(2);
    cluster.start(2, Role::DataPlane, 8);
    assert!(cluster.said("Some(2): lost: was started anew"));
    cluster.pass(40);
    assert_eq!(cluster.table().count(2), 0);
    cluster.pass(3_000);
    assert_eq!(cluster.table().count(2), 21);
    assert_eq!(cluster.in_force(), [Some(2); 4]);
}

#[test]
fn the_only_data_plane_goes_on_after_a_restart() {
    let mut cluster = Cluster::with(1);
    cluster.kill(1);
    cluster.pass(5_000);
    assert_eq!(cluster.standing(1), Standing::Active);
    cluster.start(1, Role::DataPlane, 8);
    cluster.pass(100);
    assert_eq!(cluster.in_force(), [Some(0); 2]);
    assert_eq!(cluster.owned(), [64, 0]);
}

#[test]
fn when_all_are_silent_the_last_table_stays() {
    let mut cluster = Cluster::with(3);
    for sim in cluster.units.values_mut() {
        sim.stalled = true;
    }
    cluster.pass(60_000);
    assert!(cluster.units.keys().all(|node| cluster.standing(*node) == Standing::Active));
    assert_eq!(cluster.events.iter().filter(|event| event.contains("the last table stays")).count(), 1);
    for sim in cluster.units.values_mut() {
        sim.stalled = false;
    }
    cluster.pass(2_000);
    assert_eq!(cluster.in_force(), [Some(0); 4]);
    assert!(cluster.units.values().all(|sim| sim.forgot == 0));
}

#[test]
fn a_manager_that_stood_still_does_not_call_others_silent() {
    let mut cluster = Cluster::with(3);
    cluster.now_ms += 2_000;
    let now_ns = cluster.now_ns();
    cluster.manager.tick(now_ns);
    cluster.run();
    cluster.pass(1_000);
    assert!(cluster.units.keys().all(|node| cluster.standing(*node) == Standing::Active));
    // Nor one whose clock goes back.
    cluster.manager.tick(0);
    cluster.pass(1_000);
    assert!(cluster.units.keys().all(|node| cluster.standing(*node) == Standing::Active));
}

#[test]
fn who_does_not_acknowledge_is_left_out_and_the_change_goes_on() {
    for stage in [Stage::Preparing, Stage::CommittingDataPlanes, Stage::CommittingDispatchers] {
        let mut cluster = Cluster::with(3);
        let slow = if stage == Stage::CommittingDispatchers { 100 } else { 2 };
        cluster.start(4, Role::DataPlane, 7);
        cluster.units.get_mut(&slow).unwrap().takes_over = false;
        cluster.step(add(4, Role::DataPlane)).unwrap();
        if stage != Stage::Preparing {
            cluster.take_over(slow);
        }
        cluster.pass(100);
        assert_eq!(cluster.manager.stage(), stage);
        cluster.pass(9_800);
        assert_eq!(cluster.standing(slow), Standing::Active, "{stage:?}");
        cluster.pass(200);
        assert_eq!(cluster.standing(slow), Standing::Lost, "{stage:?} {:?}", cluster.events);
        cluster.pass(400);
        assert!(cluster.manager.state().participants().all(|node| node != slow));
        let others: Vec<_> =
            cluster.units.iter().filter(|(node, _)| **node != slow).map(|(_, sim)| sim).collect();
        assert!(others.iter().all(|sim| sim.unit.snapshot().unwrap().units.in_force == 2), "{stage:?}");
        // It is back, and its cores work again.
        cluster.units.get_mut(&slow).unwrap().takes_over = true;
        cluster.connect(slow);
        cluster.pass(4_000);
        assert_eq!(cluster.standing(slow), Standing::Active);
        assert_eq!(cluster.units[&slow].forgot, 1);
        assert_eq!(cluster.in_force(), [Some(3); 5], "{stage:?}");
    }
}

#[test]
fn a_loss_at_every_stage_of_a_change() {
    for acknowledged in 0..9 {
        let mut cluster = Cluster::with(3);
        for sim in cluster.units.values_mut() {
            sim.takes_over = false;
        }
        cluster.start(4, Role::DataPlane, 7);
        cluster.units.get_mut(&4).unwrap().takes_over = false;
        cluster.step(add(4, Role::DataPlane)).unwrap();
        for node in [1, 2, 3, 4, 100, 1, 2, 3, 4].into_iter().take(acknowledged) {
            cluster.take_over(node);
        }
        cluster.kill(2);
        for node in [1, 3, 4, 100] {
            cluster.units.get_mut(&node).unwrap().takes_over = true;
        }
        for _ in 0..2 {
            for node in [1, 3, 4, 100] {
                cluster.take_over(node);
            }
        }
        cluster.pass(700);
        assert_eq!(cluster.in_force(), [Some(2); 4], "after {acknowledged}: {:?}", cluster.events);
        assert_eq!(cluster.table().count(2), 0);
        assert!((0..64).all(|bucket| !cluster.table().chain(bucket).contains(&2)));
    }
}

#[test]
fn strangers_are_refused() {
    use crate::message::{Hello, Message, Phase, Refusal};
    let hello = |node, role, held| Message::Hello(Hello { node, role, weight: 1, instance: 7, held });
    let plane = Role::DataPlane;
    let rows: [(&str, u16, Message, Option<Refusal>); 11] = [
        ("itself again", 2, hello(2, plane, Some(0)), None),
        ("nobody knows it", 9, hello(9, plane, None), Some(Refusal::Unknown)),
        ("from the pool", 20, hello(20, plane, None), None),
        ("another's node id", 9, hello(2, plane, None), Some(Refusal::Identity)),
        ("another id at its address", 2, hello(9, plane, None), Some(Refusal::Identity)),
        ("another role", 2, hello(2, Role::Both, None), Some(Refusal::Role)),
        ("an era of the future", 2, hello(2, plane, Some(1)), Some(Refusal::NewerEra)),
        ("an old era", 2, hello(2, plane, Some(u32::MAX)), None),
        ("no hello", 2, Message::Heartbeat { load_percent: 1 }, Some(Refusal::Protocol)),
        ("no hello", 2, Message::Acknowledge { era: 0, phase: Phase::Prepared }, Some(Refusal::Protocol)),
        ("a manager's message", 2, Message::Goodbye, Some(Refusal::Protocol)),
    ];
    for (name, from, message, wanted) in rows {
        let mut cluster = Cluster::with(3);
        let pool = "10.99.0.16".parse().unwrap();
        let pool = Settings { pool: vec![(pool, 28)], ..settings() };
        cluster.manager = Manager::resume(pool, cluster.manager.state().clone(), cluster.now_ns());
        cluster.manager.connected(999, address(from));
        cluster.manager.receive(cluster.now_ns(), 999, message);
        let outputs = cluster.manager.outputs();
        let refused = outputs.iter().find_map(|output| match output {
            Output::Send { connection: 999, message: Message::Refused(reason) } => Some(*reason),
            _ => None,
        });
        assert_eq!(refused, wanted, "{name}");
        let closed = outputs.iter().any(|output| matches!(output, Output::Close { connection: 999 }));
        assert_eq!(closed, wanted.is_some(), "{name}");
        if wanted.is_some() {
            cluster.manager.receive(cluster.now_ns(), 999, Message::Heartbeat { load_percent: 1 });
            assert!(cluster.manager.outputs().is_empty(), "{name}: after the end");
        }
    }
}

#[test]
fn a_second_hello_under_another_id_is_refused() {
    use crate::message::{Hello, Message, Refusal};
    let mut cluster = Cluster::with(2);
    let connection = cluster.units[&1].connection.unwrap();
    let other = Hello { node: 2, role: Role::DataPlane, weight: 1, instance: 7, held: None };
    cluster.manager.receive(cluster.now_ns(), connection, Message::Hello(other));
    cluster.run();
    assert_eq!(cluster.units[&1].refused, [Refusal::Identity]);
}

/// While the manager stands still words of units wait; they are looked at before time passes.
#[test]
fn a_unit_that_dies_after_the_manager_stood_still_is_missed_as_soon_as_ever() {
    let mut cluster = Cluster::with(2);
    cluster.now_ms += 60_000;
    for node in [1, 2, 100] {
        let now_ns = cluster.now_ns();
        let actions = cluster.units.get_mut(&node).unwrap().unit.tick(now_ns);
        assert!(!actions.is_empty());
        cluster.act(node, actions);
    }
    cluster.pass(100);
    assert!(!cluster.said("lost"), "{:?}", cluster.events);
    cluster.units.get_mut(&2).unwrap().stalled = true;
    cluster.pass(500);
    assert_eq!(cluster.standing(2), Standing::Lost, "{:?}", cluster.events);
}

/// It has a connection, but gets no CPU yet: it would be lost again at once, and each time its buckets had no owner.
#[test]
fn a_lost_unit_does_not_take_part_again_while_it_is_silent() {
    let mut cluster = Cluster::with(3);
    cluster.disconnect(2);
    cluster.pass(420);
    cluster.connect(2);
    cluster.units.get_mut(&2).unwrap().stalled = true;
    cluster.pass(100);
    assert_eq!(cluster.standing(2), Standing::Lost);
    // Whoever is connected may be added by a command as well.
    cluster.start(4, Role::DataPlane, 7);
    cluster.units.get_mut(&4).unwrap().stalled = true;
    cluster.pass(500);
    cluster.step(add(4, Role::DataPlane)).unwrap();
    cluster.pass(5_000);
    assert!(!cluster.said("unit 2 is back"), "{:?}", cluster.events);
    assert_eq!(cluster.standing(4), Standing::Free);
    for node in [2, 4] {
        cluster.units.get_mut(&node).unwrap().stalled = false;
    }
    cluster.pass(3_000);
    assert_eq!([2, 4].map(|node| cluster.standing(node)), [Standing::Active; 2], "{:?}", cluster.events);
    assert_eq!(
        cluster.events.iter().filter(|event| event.contains(": lost")).count(),
        1,
        "{:?}",
        cluster.events
    );
}

/// The gateway that carries the words of the units to the manager may get no CPU: then they are all silent, and none of them is dead.
#[test]
fn time_in_which_the_manager_hears_nobody_is_nobodys_silence() {
    let mut cluster = Cluster::with(3);
    let stall = |cluster: &mut Cluster, nodes: &[u16], stalled| {
        nodes.iter().for_each(|node| cluster.units.get_mut(node).unwrap().stalled = stalled);
    };
    for _ in 0..3 {
        stall(&mut cluster, &[1, 2, 3, 100], true);
        cluster.pass(300);
        stall(&mut cluster, &[1, 3, 100], false);
        cluster.pass(200);
        stall(&mut cluster, &[2], false);
        cluster.pass(100);
    }
    assert_eq!(cluster.standing(2), Standing::Active, "{:?}", cluster.events);
    stall(&mut cluster, &[2], true);
    cluster.pass(420);
    assert_eq!(cluster.standing(2), Standing::Lost, "{:?}", cluster.events);
}

#[test]
fn who_died_while_the_manager_was_deaf_for_a_moment_is_missed_soon_after() {
    let mut cluster = Cluster::with(3);
    for sim in cluster.units.values_mut() {
        sim.stalled = true;
    }
    cluster.pass(700);
    for node in [1, 3, 100] {
        cluster.units.get_mut(&node).unwrap().stalled = false;
    }
    cluster.pass(300);
    assert!(!cluster.said("lost"), "{:?}", cluster.events);
    cluster.pass(200);
    assert_eq!(cluster.standing(2), Standing::Lost, "{:?}", cluster.events);
    assert_eq!([1, 3, 100].map(|node| cluster.standing(node)), [Standing::Active; 3]);
}
