use super::harness::*;
use crate::manager::*;
use crate::message::Role;

#[test]
fn the_first_units_share_the_buckets() {
    let cluster = Cluster::with(3);
    assert_eq!(cluster.owned(), [22, 21, 21, 0]);
    for sim in cluster.units.values() {
        assert_eq!(sim.got, ["free", "welcome"]);
        let snapshot = sim.unit.snapshot().unwrap();
        assert_eq!(snapshot.members.len(), 4);
        assert_eq!(snapshot.units.table_in_force(), cluster.table());
    }
    let status = cluster.manager.status();
    assert_eq!((status.in_force, status.next, status.stage, status.waits), (Some(0), None, "idle", None));
    assert_eq!(status.chains, [64, 0, 0, 0, 0]);
}

#[test]
fn nothing_is_sent_before_it_is_written() {
    let mut cluster = Cluster::with(2);
    cluster.start(3, Role::DataPlane, 7);
    cluster.units.values_mut().for_each(|sim| sim.got.clear());
    let got = |cluster: &Cluster| cluster.units.values().any(|sim| !sim.got.is_empty());
    cluster.disk_slow = true;
    assert_eq!(
        cluster.command(Command::Change(vec![add(3, Role::DataPlane)])),
        None,
        "no answer before it is written"
    );
    cluster.disk_slow = false;
    // One write after the other: accepted, planned, committing, finished.
    let mut seen = Vec::new();
    for _ in 0..3 {
        cluster.disk_slow = false;
        cluster.run();
        cluster.disk_slow = true;
        seen.push((cluster.manager.stage(), got(&cluster), State::decode(&cluster.store).unwrap()));
        cluster.pass(20);
        if seen.len() > 6 {
            break;
        }
    }
    for (stage, sent, state) in &seen {
        if *sent {
            assert!(state.change.is_some(), "{stage:?}: units were told what is not stored");
        }
    }
    cluster.disk_slow = false;
    cluster.run();
    cluster.pass(1_100);
    assert_eq!(cluster.in_force(), [Some(1); 4]);
    assert!(cluster.answers.last().unwrap().is_ok());
}

#[test]
fn each_write_releases_what_follows_from_it_and_no_more() {
    let mut cluster = Cluster::with(2);
    cluster.start(3, Role::DataPlane, 7);
    let mut manager = std::mem::replace(&mut cluster.manager, Manager::new(settings(), KEY, 0));
    let now_ns = cluster.now_ns();
    let kinds = |outputs: &[Output]| -> Vec<&'static str> {
        let kind = |output: &Output| match output {
            Output::Persist { .. } => "persist",
            Output::Send { message, .. } => kind(message),
            Output::Answer { .. } => "answer",
            Output::Event(_) | Output::Close { .. } => "",
        };
        outputs.iter().map(kind).filter(|kind| !kind.is_empty()).collect()
    };
    let number = |outputs: &[Output]| {
        outputs
            .iter()
            .find_map(|output| if let Output::Persist { number, .. } = output { Some(*number) } else { None })
    };
    manager.command(now_ns, 9, Command::Change(vec![add(3, Role::DataPlane)]));
    let outputs = manager.outputs();
    assert_eq!(kinds(&outputs), ["persist"]);
    // Another command waits for the first to be written.
    manager.command(
        now_ns,
        10,
        Command::Change(vec![Step::Drain { node: 1, remove: false, migrate: false }]),
    );
    manager.tick(now_ns);
    assert_eq!(kinds(&manager.outputs()), [""; 0]);
    manager.persisted(now_ns, number(&outputs).unwrap() + 1);
    assert_eq!(kinds(&manager.outputs()), [""; 0], "another number");
    manager.persisted(now_ns, number(&outputs).unwrap());
    let outputs = manager.outputs();
    assert_eq!(kinds(&outputs), ["answer", "persist"]);
    manager.persisted(now_ns, number(&outputs).unwrap());
    let outputs = manager.outputs();
    assert_eq!(kinds(&outputs), ["answer", "persist"], "both in one plan");
    manager.persisted(now_ns, number(&outputs).unwrap());
    assert_eq!(kinds(&manager.outputs()), ["prepare", "prepare", "welcome", "prepare"]);
}

#[test]
fn data_planes_commit_before_dispatchers_and_nobody_before_all_are_prepared() {
    let mut cluster = Cluster::with(2);
    for sim in cluster.units.values_mut() {
        sim.takes_over = false;
    }
    cluster.start(3, Role::DataPlane, 7);
    cluster.units.get_mut(&3).unwrap().takes_over = false;
    cluster.step(add(3, Role::DataPlane)).unwrap();
    let nodes = [1, 2, 3, 100];
    for node in nodes {
        assert_eq!(cluster.manager.stage(), Stage::Preparing);
        assert_eq!(cluster.in_force(), [Some(0); 4]);
        assert!(cluster.manager.status().missing.contains(&node));
        cluster.take_over(node);
    }
    for node in [1, 2, 3] {
        assert_eq!(cluster.manager.stage(), Stage::CommittingDataPlanes);
        assert_eq!(cluster.in_force(), [Some(1), Some(1), Some(1), Some(0)]);
        cluster.take_over(node);
    }
    assert_eq!(cluster.manager.stage(), Stage::CommittingDispatchers);
    assert_eq!(cluster.in_force(), [Some(1); 4]);
    cluster.pass(100);
    cluster.take_over(100);
    assert!(matches!(cluster.manager.stage(), Stage::Draining { .. }));
    cluster.pass(900);
    assert!(matches!(cluster.manager.stage(), Stage::Draining { .. }));
    cluster.pass(200);
    assert_eq!(cluster.manager.stage(), Stage::Idle);
}

#[test]
fn the_next_era_waits_for_the_one_before() {
    let mut cluster = Cluster::with(2);
    cluster.start(3, Role::DataPlane, 7);
    cluster.step(add(3, Role::DataPlane)).unwrap();
    cluster.step(Step::Drain { node: 1, remove: false, migrate: false }).unwrap();
    assert_eq!(cluster.manager.status().accepted.len(), 1);
    cluster.pass(900);
    assert_eq!(cluster.in_force(), [Some(1); 4]);
    cluster.pass(200);
    assert_eq!(cluster.in_force(), [Some(2); 4]);
    assert_eq!(cluster.owned(), [0, 32, 32, 0]);
}

#[test]
fn several_steps_are_one_era_with_the_fewest_moves() {
    let mut cluster = Cluster::with(4);
    let before = cluster.table().clone();
    for node in 5..=8 {
        cluster.start(node, Role::DataPlane, 7);
    }
    let mut steps: Vec<Step> = (5..=8).map(|node| add(node, Role::DataPlane)).collect();
    steps.push(Step::Drain { node: 1, remove: false, migrate: false });
    steps.push(Step::Weight { node: 2, weight: 2 });
    cluster.command(Command::Change(steps)).unwrap().unwrap();
    cluster.pass(40);
    // 8 shares of 8 buckets: unit 2 keeps its 16, units 3 and 4 give 8 each away, unit 1 all.
    assert_eq!(cluster.owned(), [0, 16, 8, 8, 8, 8, 8, 8, 0]);
    assert_eq!(before.moves(cluster.table()).count(), 32);
    assert_eq!(cluster.in_force(), [Some(1); 9]);
}

#[test]
fn a_unit_that_drains_leaves_when_its_flows_have_ended() {
    let mut cluster = Cluster::with(3);
    let sim = cluster.units.get_mut(&1).unwrap();
    (sim.live[3], sim.live[9], sim.in_use) = (1, 2, 3);
    cluster.step(Step::Drain { node: 1, remove: true, migrate: false }).unwrap();
    cluster.pass(3_000);
    assert_eq!(cluster.manager.status().chains, [62, 2, 0, 0, 0], "entries without flows are gone");
    assert_eq!(cluster.standing(1), Standing::Draining { remove: true });
    let chained = |cluster: &Cluster, bucket| cluster.table().chain(bucket).to_vec();
    assert_eq!((chained(&cluster, 3), chained(&cluster, 9)), (vec![1], vec![1]));
    for sim in cluster.units.values().skip(1) {
        let held = sim.unit.snapshot().unwrap().units.eras.newest();
        assert_eq!((held.chain(3), held.chain(4)), (&[1][..], &[][..]), "units were told");
    }
    let sim = cluster.units.get_mut(&1).unwrap();
    (sim.live[3], sim.in_use) = (0, 2);
    cluster.pass(60_000);
    assert_eq!((chained(&cluster, 3), chained(&cluster, 9)), (vec![], vec![1]), "a minute is no reason");
    let sim = cluster.units.get_mut(&1).unwrap();
    (sim.live[9], sim.in_use) = (0, 1);
    cluster.pass(3_000);
    assert!(chained(&cluster, 9).is_empty());
    assert_eq!(cluster.standing(1), Standing::Draining { remove: true }, "a bond is left");
    cluster.units.get_mut(&1).unwrap().in_use = 0;
    cluster.pass(3_000);
    assert_eq!(cluster.standing(1), Standing::Free);
    assert_eq!(cluster.units[&1].left, 1);
    assert!(cluster.manager.state().blocks.iter().all(|block| block.node != Some(1)), "its ports are free");
    assert_eq!(cluster.units[&2].unit.snapshot().unwrap().members.len(), 3);
}

#[test]
fn an_entry_ends_only_by_a_report_of_the_era_in_force() {
    let mut cluster = Cluster::with(2);
    cluster.pass(400);
    cluster.units.get_mut(&1).unwrap().takes_over = false;
    cluster.start(3, Role::DataPlane, 7);
    cluster.step(add(3, Role::DataPlane)).unwrap();
    cluster.take_over(1);
    cluster.pass(1_000);
    assert_eq!(cluster.manager.stage(), Stage::CommittingDataPlanes, "unit 1 works by the era before");
    assert!(cluster.manager.status().chains[1] > 0);
    cluster.take_over(1);
    // Its reports of the era before said zero; the one that counts comes after the change.
    cluster.units.get_mut(&1).unwrap().live.fill(1);
    cluster.pass(4_000);
    let of_unit_1 =
        |cluster: &Cluster| (0..64).filter(|bucket| cluster.table().chain(*bucket) == [1]).count();
    assert_eq!(of_unit_1(&cluster), 10);
    cluster.units.get_mut(&1).unwrap().live.fill(0);
    cluster.pass(1_000);
    assert_eq!(of_unit_1(&cluster), 0);
}

#[test]
fn figures_of_the_era_before_end_no_entry() {
    let mut cluster = Cluster::with(2);
    cluster.pass(400);
    // It told that it had nothing; then a flow began, by the era before.
    let sim = cluster.units.get_mut(&1).unwrap();
    sim.mute = true;
    sim.live.fill(1);
    cluster.start(3, Role::DataPlane, 7);
    cluster.step(add(3, Role::DataPlane)).unwrap();
    cluster.pass(3_000);
    let of_unit_1 =
        |cluster: &Cluster| (0..64).filter(|bucket| cluster.table().chain(*bucket) == [1]).count();
    assert_eq!((cluster.manager.stage(), of_unit_1(&cluster)), (Stage::Idle, 10));
    cluster.units.get_mut(&1).unwrap().mute = false;
    cluster.pass(1_000);
    assert_eq!(of_unit_1(&cluster), 10, "the flows live");
}

#[test]
fn a_plan_that_would_make_a_chain_too_long_waits_and_says_why() {
    let mut cluster = Cluster::with(1);
    // Every bucket moves from unit to unit, and each keeps a flow in each.
    for node in 2..=5 {
        cluster.start(node, Role::DataPlane, 7);
        cluster.units.get_mut(&(node - 1)).unwrap().live.fill(1);
        let steps =
            vec![add(node, Role::DataPlane), Step::Drain { node: node - 1, remove: false, migrate: false }];
        cluster.command(Command::Change(steps)).unwrap().unwrap();
        cluster.pass(1_500);
    }
    assert_eq!(cluster.manager.status().chains, [0, 0, 0, 0, 64]);
    cluster.start(6, Role::DataPlane, 7);
    cluster.units.get_mut(&5).unwrap().live.fill(1);
    let steps = vec![add(6, Role::DataPlane), Step::Drain { node: 5, remove: false, migrate: false }];
    cluster.command(Command::Change(steps)).unwrap().unwrap();
    cluster.pass(10_000);
    let waits = cluster.manager.status().waits.unwrap();
    assert!(waits.contains("64 buckets have four earlier owners"), "{waits}");
    assert!(waits.contains("unit 1"), "{waits}");
    assert_eq!(cluster.manager.status().in_force, Some(4));
    let said: Vec<_> = cluster.events.iter().filter(|event| event.contains("four earlier")).collect();
    assert_eq!(said.len(), 1, "said once: {said:?}");
    // Flows of the oldest end: the plan goes on.
    cluster.units.get_mut(&1).unwrap().live.fill(0);
    cluster.pass(2_500);
    assert_eq!(cluster.manager.status().in_force, Some(5));
    assert_eq!((cluster.manager.status().waits, cluster.table().count(6)), (None, 64));
}

#[test]
fn a_command_that_can_be_done_does_not_wait_for_one_that_cannot() {
    let mut cluster = Cluster::with(2);
    cluster.step(add(9, Role::DataPlane)).unwrap();
    cluster.step(Step::Weight { node: 1, weight: 3 }).unwrap();
    cluster.pass(100);
    assert_eq!(cluster.owned(), [48, 16, 0]);
    assert_eq!(cluster.manager.status().waits.unwrap(), "unit 9 is not connected");
    assert_eq!(cluster.manager.status().accepted.len(), 1);
    cluster.pass(1_000);
    cluster.start(9, Role::DataPlane, 7);
    cluster.pass(100);
    assert_eq!(cluster.owned(), [38, 13, 13, 0]);
}

#[test]
fn a_command_that_changes_nothing_makes_no_era() {
    let mut cluster = Cluster::with(2);
    cluster.step(Step::Weight { node: 1, weight: 1 }).unwrap();
    cluster.pass(100);
    assert_eq!(cluster.in_force(), [Some(0); 3]);
    assert!(State::decode(&cluster.store).unwrap().accepted.is_empty());
}

#[test]
fn shares_follow_the_load_slowly() {
    let mut cluster = Cluster::with(4);
    cluster.settings = Settings { buckets: 4_096, follow_load: true, ..settings() };
    let mut manager = Manager::new(cluster.settings.clone(), KEY, 0);
    std::mem::swap(&mut cluster.manager, &mut manager);
    let mut cluster = {
        let mut fresh = Cluster::new(cluster.settings.clone());
        for node in 1..=4 {
            fresh.command(Command::Change(vec![add(node, Role::DataPlane)]));
            fresh.start(node, Role::DataPlane, 7);
        }
        fresh
    };
    cluster.pass(3_000);
    let before = cluster.table().clone();
    let load = |cluster: &mut Cluster, hot: u8, ms: u64| {
        for _ in 0..ms / 1_000 {
            cluster.pass(1_000);
            for node in 1..=4u16 {
                let sim = cluster.units.get_mut(&node).unwrap();
                let live = sim.live.clone();
                let load_percent = if node == 2 { hot } else { 30 };
                let figures = crate::unit::Figures {
                    live: &live,
                    in_use: 0,
                    load_percent,
                    second_hops: 0,
                    packets: 0,
                    copied_to: None,
                    inherited: 0,
                };
                let actions = sim.unit.report(&figures);
                cluster.act(node, actions);
            }
            // The sample is taken with these loads, not with those of the harness's own reports.
            let now_ns = cluster.now_ns();
            cluster.manager.tick(now_ns);
            cluster.run();
        }
    };
    load(&mut cluster, 45, 100_000);
    assert_eq!(before.moves(cluster.table()).count(), 0, "not far enough apart");
    load(&mut cluster, 90, 25_000);
    assert_eq!(before.moves(cluster.table()).count(), 0, "not long enough");
    load(&mut cluster, 90, 20_000);
    let moved: Vec<_> = before.moves(cluster.table()).collect();
    assert!(!moved.is_empty() && moved.len() <= 40, "{}", moved.len());
    assert!(moved.iter().all(|(_, from, _)| *from == 2));
    let first = cluster.table().clone();
    load(&mut cluster, 90, 30_000);
    assert_eq!(first.moves(cluster.table()).count(), 0, "once a minute");
    load(&mut cluster, 90, 60_000);
    let less = cluster.table().count(2);
    assert!(less < first.count(2));
    // Between both marks it keeps what it has.
    load(&mut cluster, 40, 200_000);
    assert_eq!(cluster.table().count(2), less);
    // It has no more to do than the others: little by little it gets everything back.
    load(&mut cluster, 30, 50_000);
    let more = cluster.table().count(2);
    assert!(less < more && more - less <= 40, "{less} {more}");
    load(&mut cluster, 30, 300_000);
    assert_eq!(cluster.table().count(2), before.count(2));
    let settled = cluster.table().clone();
    load(&mut cluster, 30, 200_000);
    assert_eq!(settled.moves(cluster.table()).count(), 0);
}
