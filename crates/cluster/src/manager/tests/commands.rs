use super::harness::*;
use crate::manager::*;
use crate::message::{Role, SharedInterface};

#[test]
fn commands_and_their_answers() {
    let enrol = |node, from, role| Step::Add { node, enrol: Some((address(from), role)), weight: None };
    let add = |node| Step::Add { node, enrol: None, weight: None };
    let drain = |node| Step::Drain { node, remove: false, migrate: false };
    let remove = |node, force| Step::Remove { node, force };
    let weight = |node, weight| Step::Weight { node, weight };
    let plane = Role::DataPlane;
    let rows: Vec<(&str, Vec<Step>, &str)> = vec![
        ("a new unit", vec![enrol(3, 3, plane)], ""),
        ("all at once", vec![enrol(3, 3, plane), drain(1), weight(2, 9)], ""),
        ("an unknown unit", vec![add(3)], "no unit 3 is enrolled"),
        ("a unit that takes part", vec![add(1)], "unit 1 takes part already"),
        ("another address", vec![enrol(1, 9, plane)], "enrolled with another address or role"),
        ("another's address", vec![enrol(3, 2, plane)], "is the bus address of unit 2"),
        ("an id that is none", vec![enrol(4_096, 3, plane)], "node id 4096"),
        ("no steps", vec![], "0 steps"),
        ("two steps for one", vec![drain(1), weight(1, 2)], "unit 1 has two steps"),
        ("no weight", vec![weight(1, 0)], "weight 0"),
        ("too much weight", vec![weight(1, 1_000_001)], "weight 1000001"),
        ("weight of a dispatcher", vec![weight(100, 2)], "only dispatches"),
        ("drains one", vec![drain(1)], ""),
        ("drains the last", vec![drain(1), drain(2)], "no data plane would be left"),
        ("drains an unknown one", vec![drain(9)], "no unit 9"),
        ("removes one that works", vec![remove(1, false)], "drain it first"),
        ("removes it all the same", vec![remove(1, true)], ""),
        ("removes all", vec![remove(1, true), remove(2, true)], "no data plane would be left"),
        ("removes a dispatcher", vec![remove(100, true)], ""),
    ];
    for (name, steps, wanted) in rows {
        let mut cluster = Cluster::with(2);
        let answer = cluster.command(Command::Change(steps)).unwrap();
        match answer {
            Ok(_) => assert_eq!(wanted, "", "{name}"),
            Err(error) => {
                assert!(!wanted.is_empty() && error.to_string().contains(wanted), "{name}: {error}");
                assert!(cluster.manager.state().accepted.is_empty(), "{name}");
            }
        }
    }
}

#[test]
fn what_waits_counts() {
    let mut cluster = Cluster::with(3);
    cluster.units.get_mut(&100).unwrap().takes_over = false;
    cluster.step(Step::Weight { node: 1, weight: 2 }).unwrap();
    cluster.step(Step::Drain { node: 1, remove: false, migrate: false }).unwrap();
    cluster.step(Step::Drain { node: 2, remove: false, migrate: false }).unwrap();
    let error = cluster.step(Step::Drain { node: 1, remove: false, migrate: false }).unwrap_err();
    assert_eq!(error.to_string(), "unit 1 drains already");
    let error = cluster.step(Step::Drain { node: 3, remove: false, migrate: false }).unwrap_err();
    assert_eq!(error.to_string(), "no data plane would be left to own flows");
    // One that drains may take part again.
    cluster.step(Step::Add { node: 1, enrol: None, weight: Some(5) }).unwrap();
    cluster.step(Step::Drain { node: 3, remove: false, migrate: false }).unwrap();
}

#[test]
fn only_so_many_commands_wait() {
    let mut cluster = Cluster::with(2);
    for node in 0..ACCEPTED_MAX as u16 {
        cluster.step(add(1_000 + node, Role::DataPlane)).unwrap();
    }
    assert_eq!(cluster.step(add(2_000, Role::DataPlane)), Err(CommandError::Busy));
}

#[test]
fn configurations_that_cannot_be() {
    let interface = |id, name: &str, mac: [u8; 6], prefix| SharedInterface {
        id,
        outside: true,
        mac,
        name: name.into(),
        addresses: vec![("192.0.2.1".parse().unwrap(), prefix)],
    };
    let good = interface(1, "wan0", [2, 0, 0, 0, 0, 1], 24);
    let rows: Vec<(&str, Vec<SharedInterface>, Vec<&str>, &str)> = vec![
        ("as it should be", vec![good.clone()], vec!["192.0.2.1", "2001:db8::1"], ""),
        ("nothing", vec![], vec![], ""),
        ("a name with a slash", vec![interface(1, "a/b", good.mac, 24)], vec![], "no name"),
        ("no name", vec![interface(1, "", good.mac, 24)], vec![], "no name"),
        ("a long name", vec![interface(1, "sixteen-letters-", good.mac, 24)], vec![], "no name"),
        ("a number twice", vec![good.clone(), interface(1, "lan0", good.mac, 24)], vec![], "stands twice"),
        ("a name twice", vec![good.clone(), interface(2, "wan0", good.mac, 24)], vec![], "stands twice"),
        ("a group's MAC", vec![interface(1, "wan0", [1, 0, 0, 0, 0, 1], 24)], vec![], "not one station's"),
        ("no MAC", vec![interface(1, "wan0", [0; 6], 24)], vec![], "not one station's"),
        ("a prefix of 33", vec![interface(1, "wan0", good.mac, 33)], vec![], "too long a prefix"),
        ("an address twice", vec![], vec!["192.0.2.1", "192.0.2.1"], "stands twice"),
        ("no address", vec![], vec!["0.0.0.0"], "cannot be an outside address"),
        ("a group", vec![], vec!["224.0.0.1"], "cannot be an outside address"),
    ];
    for (name, interfaces, outside, wanted) in rows {
        let mut cluster = Cluster::with(2);
        let outside = outside.into_iter().map(|address| address.parse().unwrap()).collect();
        let answer = cluster.command(Command::Configure { interfaces, outside }).unwrap();
        let said = answer.err().map(|error| error.to_string()).unwrap_or_default();
        assert_eq!(said.is_empty(), wanted.is_empty(), "{name}: {said}");
        assert!(said.contains(wanted), "{name}: {said}");
    }
}

#[test]
fn interfaces_reach_the_units() {
    let mut cluster = Cluster::with(2);
    let interface = SharedInterface {
        id: 3,
        outside: false,
        mac: [2, 0, 0, 0, 0, 9],
        name: "lan0".into(),
        addresses: vec![("10.0.0.1".parse().unwrap(), 24)],
    };
    let outside = cluster.manager.state().outside.clone();
    cluster.command(Command::Configure { interfaces: vec![interface.clone()], outside }).unwrap().unwrap();
    cluster.pass(100);
    for sim in cluster.units.values() {
        assert_eq!(&*sim.unit.snapshot().unwrap().interfaces, std::slice::from_ref(&interface));
    }
}

/// A change of several steps waits for a unit that never comes: whoever removes that unit takes the change back, and what was to
/// happen beside it can be asked for again.
#[test]
fn a_change_that_waits_for_a_unit_can_be_taken_back() {
    let mut cluster = Cluster::with(3);
    let steps = vec![add(13, Role::DataPlane), Step::Drain { node: 2, remove: false, migrate: false }];
    cluster.command(Command::Change(steps)).unwrap().unwrap();
    cluster.pass(2_000);
    assert_eq!(cluster.manager.status().accepted.len(), 1, "it waits");
    cluster.step(Step::Remove { node: 13, force: true }).unwrap();
    cluster.pass(500);
    assert!(cluster.manager.status().accepted.is_empty(), "{:?}", cluster.events);
    assert!(cluster.said("is taken back"), "{:?}", cluster.events);
    assert!(cluster.manager.state().units[&2].standing == Standing::Active);
    cluster.step(Step::Drain { node: 2, remove: false, migrate: false }).unwrap();
    cluster.pass(2_000);
    assert!(cluster.manager.state().units[&2].standing != Standing::Active, "{:?}", cluster.events);
}

#[test]
fn an_enrolled_unit_can_be_forgotten() {
    let mut cluster = Cluster::new(settings());
    cluster.step(add(1, Role::DataPlane)).unwrap();
    cluster.step(Step::Remove { node: 1, force: false }).unwrap_err();
    cluster.step(Step::Remove { node: 1, force: true }).unwrap();
    assert!(cluster.manager.state().units.is_empty());
    assert!(cluster.manager.status().accepted.is_empty());
}
