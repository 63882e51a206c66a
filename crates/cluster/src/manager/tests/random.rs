//! Whatever happens, in whatever order: the rules hold at every moment, and in the end everybody works by one table.

use std::collections::BTreeMap;

use proptest::prelude::*;

use steering::table::BucketTable;

use super::harness::*;
use crate::manager::*;
use crate::message::Role;

#[derive(Clone, Copy, Debug)]
enum Happens {
    Add(u16),
    Drain(u16, bool),
    Remove(u16, bool),
    Weight(u16, u32),
    Kill(u16),
    Start(u16),
    Cut(u16),
    Hesitate(u16, bool),
    Flows(u16, u32),
    Restart,
    DiskFull(bool),
    Pass(u64),
}

fn happens() -> impl Strategy<Value = Happens> {
    let node = 1..6u16;
    prop_oneof![
        3 => node.clone().prop_map(Happens::Add),
        2 => (node.clone(), any::<bool>()).prop_map(|(node, remove)| Happens::Drain(node, remove)),
        1 => (node.clone(), any::<bool>()).prop_map(|(node, force)| Happens::Remove(node, force)),
        1 => (node.clone(), 1..4u32).prop_map(|(node, weight)| Happens::Weight(node, weight)),
        1 => node.clone().prop_map(Happens::Kill),
        2 => node.clone().prop_map(Happens::Start),
        1 => node.clone().prop_map(Happens::Cut),
        2 => (node.clone(), any::<bool>()).prop_map(|(node, wait)| Happens::Hesitate(node, wait)),
        2 => (node, 0..2u32).prop_map(|(node, flows)| Happens::Flows(node, flows)),
        1 => Just(Happens::Restart),
        1 => any::<bool>().prop_map(Happens::DiskFull),
        6 => (1..1_500u64).prop_map(Happens::Pass),
    ]
}

/// Rules at every moment.
fn check(cluster: &Cluster, oldest: &mut BTreeMap<u16, u32>) {
    let state = cluster.manager.state();
    let Some(newest) = state.newest() else { return };
    for bucket in 0..newest.buckets() {
        let chain = newest.chain(bucket);
        assert!(!chain.contains(&newest.owner(bucket)) && chain.len() <= 4);
    }
    let before = state.table.as_ref().map_or(newest.era(), BucketTable::era);
    for (node, sim) in &cluster.units {
        let Some(snapshot) = sim.unit.snapshot() else { continue };
        let in_force = snapshot.units.in_force;
        if state.units.get(node).is_some_and(|unit| unit.standing.takes_part() && !unit.forget) {
            let near = in_force == before || in_force == newest.era() || in_force.wrapping_add(1) == before;
            assert!(
                near,
                "unit {node} works by era {in_force}, the manager is at {before} and {}",
                newest.era()
            );
        }
        let oldest = oldest.entry(*node).or_insert(in_force);
        assert!(in_force >= *oldest, "unit {node} went back");
        *oldest = in_force;
    }
    // Nobody draws from ports that another one has.
    let mut ports: Vec<_> = cluster
        .units
        .iter()
        .filter(|(node, _)| state.units.get(*node).is_some_and(|unit| unit.standing.takes_part()))
        .filter_map(|(_, sim)| sim.unit.snapshot())
        .flat_map(|snapshot| snapshot.blocks.iter().map(|lease| (lease.address, lease.block)))
        .collect();
    ports.sort_unstable();
    assert!(ports.windows(2).all(|pair| pair[0] != pair[1]), "{ports:?}");
}

fn happen(cluster: &mut Cluster, what: Happens, instance: &mut u64) {
    let with = |cluster: &mut Cluster, node: u16, change: &dyn Fn(&mut Sim)| {
        if let Some(sim) = cluster.units.get_mut(&node) {
            change(sim);
        }
    };
    match what {
        Happens::Add(node) => drop(cluster.step(add(node, Role::Both))),
        Happens::Drain(node, remove) => drop(cluster.step(Step::Drain { node, remove, migrate: false })),
        Happens::Remove(node, force) => drop(cluster.step(Step::Remove { node, force })),
        Happens::Weight(node, weight) => drop(cluster.step(Step::Weight { node, weight })),
        Happens::Kill(node) if cluster.units.contains_key(&node) => cluster.kill(node),
        Happens::Start(node) if !cluster.units.contains_key(&node) => {
            *instance += 1;
            cluster.start(node, Role::Both, *instance);
        }
        Happens::Start(node) => cluster.connect(node),
        Happens::Cut(node) if cluster.units.contains_key(&node) => cluster.disconnect(node),
        Happens::Kill(_) | Happens::Cut(_) => {}
        Happens::Hesitate(node, wait) => {
            with(cluster, node, &|sim| sim.takes_over = !wait);
            if !wait && cluster.units.get(&node).is_some_and(|sim| sim.unit.snapshot().is_some()) {
                cluster.take_over(node);
            }
        }
        Happens::Flows(node, flows) => with(cluster, node, &|sim| {
            sim.live.fill(flows);
            sim.in_use = flows.into();
        }),
        Happens::Restart => cluster.restart(),
        Happens::DiskFull(full) => cluster.disk_full = full,
        Happens::Pass(ms) => cluster.pass(ms),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn the_rules_hold_and_all_come_to_rest(history in proptest::collection::vec(happens(), 1..40)) {
        let mut cluster = Cluster::new(Settings { buckets: 16, ..settings() });
        cluster.command(Command::Configure { interfaces: Vec::new(), outside: vec!["192.0.2.1".parse().unwrap()] });
        let (mut instance, mut oldest) = (100, BTreeMap::new());
        for what in history {
            if let Happens::Kill(node) = &what {
                oldest.remove(node);
            }
            happen(&mut cluster, what, &mut instance);
            // A new process knows nothing of the one before.
            oldest.retain(|node, _| cluster.units.get(node).is_some_and(|sim| sim.unit.snapshot().is_some()));
            check(&cluster, &mut oldest);
        }
        // Everything works again: all is carried out.
        cluster.disk_full = false;
        for node in 1..6 {
            if cluster.units.contains_key(&node) {
                happen(&mut cluster, Happens::Hesitate(node, false), &mut instance);
                happen(&mut cluster, Happens::Flows(node, 0), &mut instance);
            }
            happen(&mut cluster, Happens::Start(node), &mut instance);
        }
        cluster.pass(90_000);
        check(&cluster, &mut oldest);
        let status = cluster.manager.status();
        prop_assert_eq!(status.stage, "idle", "{:?}", cluster.events);
// Units that were added and drained again before anybody else owned flows: that waits for one who does.
        let nobody = status.waits.as_ref().is_some_and(|waits| waits == "no data plane takes part");
        prop_assert!(nobody || status.waits.is_none(), "{:?} {:?}", status.waits, cluster.events);
        for (node, sim) in &cluster.units {
            let takes_part = cluster.manager.state().units.get(node).is_some_and(|unit| unit.standing.takes_part());
            // Its own entries in chains it keeps until the next era.
            let of_others = |table: &BucketTable| {
                let mut table = table.clone();
                table.forget(*node);
                table
            };
            let held = sim.unit.snapshot().map(|snapshot| of_others(snapshot.units.table_in_force()));
            let wanted = cluster.manager.state().table.as_ref().filter(|_| takes_part).map(of_others);
            prop_assert_eq!(held, wanted, "unit {}", node);
        }
    }
}
