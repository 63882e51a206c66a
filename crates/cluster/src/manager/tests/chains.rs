use super::harness::*;
use crate::manager::*;

/// Unit 1 has a flow in every bucket and drains.
fn drained(chains: Chains) -> Cluster {
    let mut cluster = Cluster::with(2);
    cluster.settings.chains = chains;
    cluster.restart();
    cluster.units.get_mut(&1).unwrap().live.fill(1);
    cluster.pass(1_400);
    cluster.step(Step::Drain { node: 1, remove: false, migrate: false }).unwrap();
    cluster.pass(1_400);
    assert_eq!((cluster.manager.stage(), cluster.table().count(2)), (Stage::Idle, 64));
    cluster
}

#[test]
fn an_earlier_owner_with_flows_stays_in_the_chain_and_status_counts_them() {
    let mut cluster = drained(Chains::Counted);
    cluster.pass(60_000);
    let status = cluster.manager.status();
    assert_eq!(status.chains, [32, 32, 0, 0, 0]);
    assert_eq!((status.flows_by_chain, status.flows_by_place), ([0, 32, 0, 0, 0], [0, 32, 0, 0, 0]));
}

#[test]
fn without_chains_nobody_finds_the_flows() {
    for chains in [Chains::Newest(0), Chains::Rendezvous] {
        let status = drained(chains).manager.status();
        assert_eq!((status.chains, status.flows_by_place), ([64, 0, 0, 0, 0], [0; 5]), "{chains}");
    }
}

#[test]
fn a_clock_ends_chains_whose_flows_live() {
    let mut cluster = drained(Chains::Clock { ns: 2_000 * MS });
    assert_eq!(cluster.manager.status().chains, [32, 32, 0, 0, 0], "not yet");
    cluster.pass(2_000);
    assert_eq!(cluster.manager.status().chains, [64, 0, 0, 0, 0]);
    let held = cluster.units[&2].unit.snapshot().unwrap().units.table_in_force().chain(3).to_vec();
    assert!(held.is_empty(), "units were told: {held:?}");
}
