//! A small cluster through an hour of churn, by the product's own decisions; the large one is `examples/scale.rs`.
#![allow(clippy::unwrap_used, reason = "tests")]

use sim::scale::{Scenario, run};

fn small(seed: u64) -> Scenario {
    Scenario {
        seed,
        planes: 24,
        dispatchers: 3,
        flows: 30_000,
        buckets: 1_024,
        seconds: 3_600,
        events: 40,
        without_chains: false,
    }
}

/// Rows D4 to D7: units come, drain, change their share and die, messages come late and connections break, the manager starts
/// anew: no flow breaks but those of units that died, chains grow and end, and packets find their flows over several units.
#[test]
fn no_flow_breaks_but_by_crashes() {
    let report = run(small(sim::seed(2)), &mut |_| {});
    let flows = &report.flows;
    assert!(report.is_clean(), "{flows:?}\n{}", report.lines.join("\n"));
    assert!(report.events >= 40 && report.rollouts_ns.len() > 30, "{}", report.markdown());
    assert!(report.faults.crashes > 0 && flows.lost_by_crash > 0, "{:?}", report.faults);
    assert!(
        report.faults.manager_restarts > 0 && report.faults.broken_connections > 0,
        "{:?}",
        report.faults
    );
    let longest = report.samples.iter().map(|sample| sample.chains[3] + sample.chains[4]).max();
    assert!(longest > Some(0), "chains of three were never there");
    assert!(report.samples.iter().any(|sample| sample.by_units[2] > 0), "no packet took a third unit");
    assert!(flows.checked > 1_000_000 && flows.begun > 60_000, "{flows:?}");
}

/// The same without chains: the run can tell a broken flow.
#[test]
fn without_chains_flows_break() {
    let scenario = Scenario { seconds: 600, events: 8, without_chains: true, ..small(5) };
    let report = run(scenario, &mut |_| {});
    assert!(report.flows.broken > 100, "{:?}", report.flows);
}

/// The same seed is the same run.
#[test]
fn a_run_repeats() {
    let scenario = Scenario { seconds: 300, events: 6, flows: 5_000, ..small(11) };
    let [one, two] = [0, 1].map(|_| run(scenario, &mut |_| {}).markdown());
    assert_eq!(one, two);
}
