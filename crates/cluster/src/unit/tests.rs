#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use steering::assign::plan;
use steering::table::Unit as Share;

use super::*;
use crate::message::Welcome;

const NODE: u16 = 3;
const KEY: [u8; 40] = [0x3c; 40];

fn identity() -> Identity {
    Identity { node: NODE, role: Role::DataPlane, weight: 1, instance: 77 }
}

fn shares(weights: &[(u16, u32)]) -> Vec<Share> {
    weights.iter().map(|(id, weight)| Share { id: *id, weight: *weight }).collect()
}

fn first() -> BucketTable {
    BucketTable::new(8, &shares(&[(2, 1), (NODE, 1)])).unwrap()
}

fn next(table: &BucketTable, weights: &[(u16, u32)]) -> BucketTable {
    plan(table, &shares(weights), &[]).unwrap()
}

fn lease(block: u8, node: u16) -> Lease {
    Lease { address: "192.0.2.1".parse().unwrap(), block, node }
}

fn parts(leases: &[Lease]) -> Parts {
    let member = |node| Member { node, role: Role::Both, weight: 1, address: "10.99.0.1".parse().unwrap() };
    Parts { members: vec![member(2), member(NODE)], leases: leases.to_vec(), ..Parts::default() }
}

fn whole(older: Option<BucketTable>, newest: BucketTable, in_force: u32) -> Whole {
    Whole { fresh: false, key: KEY, in_force, older, newest, parts: parts(&[lease(1, NODE), lease(2, 2)]) }
}

fn welcome(whole: Option<Whole>) -> Message {
    Message::Welcome(Box::new(Welcome { node: NODE, heartbeat_ms: 100, whole }))
}

fn prepare(table: BucketTable, leases: &[Lease]) -> Message {
    Message::Prepare(Box::new(Prepare { table, parts: parts(leases) }))
}

/// Actions as short words: a table is readable then.
fn words(actions: &[Action]) -> Vec<String> {
    let word = |action: &Action| match action {
        Action::Publish(snapshot) => {
            format!("publish {} of {}", snapshot.units.in_force, snapshot.units.eras.newest().era())
        }
        Action::ForgetFlows => "forget".into(),
        Action::Inherit(units) => format!("inherit {units:?}"),
        Action::Leave => "leave".into(),
        Action::Refused(reason) => format!("refused {reason:?}"),
        Action::Prove { .. } => "prove".to_owned(),
        Action::Send(Message::Hello(hello)) => format!("hello {:?}", hello.held),
        Action::Send(Message::Acknowledge { era, phase }) => format!("{phase:?} {era}"),
        Action::Send(Message::Heartbeat { load_percent }) => format!("heartbeat {load_percent}"),
        Action::Send(Message::Drained { era }) => format!("drained {era}"),
        Action::Send(Message::Report(report)) => {
            let live: Vec<_> = report.live.iter().map(|run| (run.first, run.buckets, run.flows)).collect();
            format!("report {} whole {} {live:?}", report.in_force, report.whole)
        }
        Action::Send(other) => panic!("{other:?}"),
    };
    actions.iter().map(word).collect()
}

/// A unit that works by era 0.
fn member() -> Unit {
    let mut unit = Unit::new(identity());
    assert_eq!(words(&unit.connected()), ["hello None"]);
    let got = unit.receive(0, welcome(Some(whole(None, first(), 0))));
    assert_eq!(words(&got), ["publish 0 of 0"]);
    assert_eq!(words(&unit.took_over(1)), ["Committed 0"]);
    unit
}

fn number(actions: &[Action]) -> u64 {
    let published = actions.iter().rev().find_map(|action| match action {
        Action::Publish(snapshot) => Some(snapshot.number),
        _ => None,
    });
    published.expect("a snapshot")
}

#[test]
fn a_change_goes_by_prepare_and_commit() {
    let mut unit = member();
    let table = next(&first(), &[(2, 1), (NODE, 3)]);
    let got = unit.receive(5, prepare(table, &[lease(1, NODE), lease(2, 2), lease(4, NODE)]));
    assert_eq!(words(&got), ["publish 0 of 1"]);
    let snapshot = unit.snapshot().unwrap();
    assert_eq!(snapshot.units.leases.unit("192.0.2.1".parse().unwrap(), 4 * 1_024), Some(NODE));
    assert_eq!(&*snapshot.blocks, [lease(1, NODE)], "no port that a dispatcher may not know yet");
    assert_eq!(words(&unit.took_over(number(&got))), ["Prepared 1"]);
    let got = unit.receive(6, Message::Commit { era: 1 });
    assert_eq!(words(&got), ["publish 1 of 1"]);
    assert_eq!(&*unit.snapshot().unwrap().blocks, [lease(1, NODE), lease(4, NODE)]);
    assert!(unit.took_over(number(&got) - 1).is_empty(), "not all cores yet");
    assert_eq!(words(&unit.took_over(number(&got))), ["Committed 1"]);
    assert!(unit.took_over(number(&got)).is_empty(), "said once");
    assert_eq!(unit.ignored(), 0);
}

#[test]
fn every_message_in_every_state() {
    let prepared = || {
        let mut unit = member();
        let got = unit.receive(1, prepare(next(&first(), &[(2, 1), (NODE, 3)]), &[]));
        unit.took_over(number(&got));
        unit
    };
    let committed = || {
        let mut unit = prepared();
        unit.receive(1, Message::Commit { era: 1 });
        unit
    };
    let greeted = || {
        let mut unit = Unit::new(identity());
        unit.connected();
        unit
    };
    let away = || {
        let mut unit = member();
        unit.disconnected();
        unit
    };
    let era = |era| BucketTable::from_owners(era, vec![2; 8]).unwrap();
    type Make<'a> = &'a dyn Fn() -> Unit;
    let rows: Vec<(&str, Make<'_>, Message, &[&str], u64)> = vec![
        ("no connection", &away, Message::Commit { era: 0 }, &[], 1),
        ("no connection, welcome", &away, welcome(None), &[], 1),
        ("before the welcome", &greeted, Message::Commit { era: 0 }, &[], 1),
        ("before the welcome", &greeted, prepare(era(1), &[]), &[], 1),
        (
            "another's welcome",
            &greeted,
            Message::Welcome(Box::new(Welcome { node: 9, heartbeat_ms: 1, whole: None })),
            &[],
            1,
        ),
        ("free", &greeted, welcome(None), &[], 0),
        ("refused", &greeted, Message::Refused(Refusal::Unknown), &["refused Unknown"], 0),
        ("a term", &greeted, Message::Term { term: 0 }, &[], 0),
        ("the era again", &member, prepare(first(), &[]), &["Committed 0"], 1),
        ("a later era", &member, prepare(era(2), &[]), &["hello Some(0)"], 0),
        (
            "another number of buckets",
            &member,
            prepare(BucketTable::from_owners(1, vec![2; 4]).unwrap(), &[]),
            &["hello Some(0)"],
            0,
        ),
        ("an older era", &prepared, prepare(first(), &[]), &["hello Some(1)"], 0),
        ("the one after, without a commit between", &prepared, prepare(era(2), &[]), &["hello Some(1)"], 0),
        ("prepared again", &prepared, prepare(era(1), &[]), &["Prepared 1"], 1),
        ("a commit of the era before", &prepared, Message::Commit { era: 0 }, &[], 1),
        ("a commit of the era after", &prepared, Message::Commit { era: 2 }, &[], 1),
        ("a commit again, not taken over", &committed, Message::Commit { era: 1 }, &[], 1),
        ("a commit again", &member, Message::Commit { era: 0 }, &["Committed 0"], 1),
        ("goodbye", &member, Message::Goodbye, &["leave"], 0),
        ("goodbye to a stranger", &greeted, Message::Goodbye, &[], 1),
        ("free now", &member, welcome(None), &["leave"], 0),
        ("a unit's message", &member, Message::Drained { era: 0 }, &[], 1),
        ("retired of another era", &member, Message::Retire { era: 4, entries: Vec::new() }, &[], 1),
    ];
    for (name, make, message, wanted, ignored) in rows {
        let mut unit = make();
        let before = unit.ignored();
        assert_eq!(words(&unit.receive(9, message)), wanted, "{name}");
        assert_eq!(unit.ignored() - before, ignored, "{name}");
    }
}

#[test]
fn without_a_manager_the_last_snapshot_stays() {
    let mut unit = member();
    unit.disconnected();
    assert!(unit.tick(u64::MAX).is_empty());
    assert_eq!(unit.snapshot().unwrap().units.in_force, 0);
    let figures = Figures {
        live: &[1; 8],
        in_use: 8,
        load_percent: 0,
        second_hops: 0,
        packets: 0,
        copied_to: None,
        inherited: 0,
    };
    assert!(unit.report(&figures).is_empty());
}

#[test]
fn a_connection_that_comes_back_resumes() {
    let mut unit = member();
    let newest = next(&first(), &[(2, 1), (NODE, 3)]);
    let got = unit.receive(1, prepare(newest.clone(), &[lease(1, NODE)]));
    unit.took_over(number(&got));
    let got = unit.receive(1, Message::Commit { era: 1 });
    unit.disconnected();
    assert!(unit.took_over(number(&got)).is_empty(), "nobody to tell");
    assert_eq!(words(&unit.connected()), ["hello Some(1)"]);
    // The manager does not know yet that this unit has the era in force; it is not taken back.
    let got = unit.receive(2, welcome(Some(whole(Some(first()), newest, 0))));
    assert_eq!(words(&got), ["publish 1 of 1"]);
    assert_eq!(words(&unit.took_over(number(&got))), ["Committed 1"]);
}

#[test]
fn a_gap_is_filled_by_the_whole_state() {
    let mut unit = member();
    let tables: Vec<BucketTable> = [1u32, 2, 3]
        .iter()
        .scan(first(), |table, weight| {
            *table = next(table, &[(2, 1), (NODE, *weight)]);
            Some(table.clone())
        })
        .collect();
    assert_eq!(words(&unit.receive(1, prepare(tables[2].clone(), &[]))), ["hello Some(0)"]);
    assert!(unit.receive(1, Message::Commit { era: 3 }).is_empty(), "the welcome comes first");
    let got = unit.receive(2, welcome(Some(whole(Some(tables[1].clone()), tables[2].clone(), 2))));
    assert_eq!(words(&got), ["publish 2 of 3"]);
    assert_eq!(words(&unit.took_over(number(&got))), ["Prepared 3"]);
}

#[test]
fn who_was_removed_forgets_its_flows() {
    let mut unit = member();
    let fresh = Whole { fresh: true, ..whole(None, next(&first(), &[(2, 1), (NODE, 1)]), 1) };
    let got = unit.receive(1, welcome(Some(fresh)));
    assert_eq!(words(&got), ["forget", "publish 1 of 1"]);
}

#[test]
fn ports_of_an_era_that_is_not_in_force_are_not_drawn_from() {
    let mut unit = Unit::new(identity());
    unit.connected();
    let newest = next(&first(), &[(2, 1), (NODE, 3)]);
    unit.receive(1, welcome(Some(whole(Some(first()), newest, 0))));
    assert!(unit.snapshot().unwrap().blocks.is_empty());
    unit.receive(1, Message::Commit { era: 1 });
    assert_eq!(&*unit.snapshot().unwrap().blocks, [lease(1, NODE)]);
}

#[test]
fn retired_entries_leave_the_chains_of_the_others() {
    let mut unit = member();
    // Unit 2 and this one give their buckets to unit 4.
    let newest = next(&first(), &[(2, 0), (NODE, 0), (4, 1)]);
    unit.receive(1, prepare(newest.clone(), &[]));
    let got = unit.receive(1, Message::Commit { era: 1 });
    unit.took_over(number(&got));
    let all = |unit| Retired { first: 0, buckets: u32::MAX, unit };
    let got = unit.receive(2, Message::Retire { era: 1, entries: vec![all(2), all(NODE)] });
    assert_eq!(words(&got), ["publish 1 of 1"]);
    let chains = |unit: &Unit| -> Vec<Vec<u16>> {
        let units = &unit.snapshot().unwrap().units;
        (0..8).map(|bucket| units.eras.newest().chain(bucket).to_vec()).collect()
    };
    let wanted: Vec<Vec<u16>> = (0..8).map(|bucket| if bucket < 4 { vec![] } else { vec![NODE] }).collect();
    assert_eq!(chains(&unit), wanted);
    // A manager that told others meanwhile: what it lacks goes, this unit's own entries stay.
    let mut told = newest;
    told.forget(NODE);
    unit.disconnected();
    unit.connected();
    unit.receive(3, welcome(Some(whole(None, told, 1))));
    assert_eq!(chains(&unit), wanted);
}

#[test]
fn heartbeats_keep_their_interval_whatever_the_clock_does() {
    let mut unit = member();
    let ms = |ms: u64| ms * 1_000_000;
    assert_eq!(words(&unit.tick(ms(0))), ["heartbeat 0"]);
    assert_eq!(unit.deadline_ns(), Some(ms(100)));
    assert!(unit.tick(ms(99)).is_empty());
    assert_eq!(words(&unit.tick(ms(100))), ["heartbeat 0"]);
    // After a stall one is sent, not those that were missed.
    assert_eq!(words(&unit.tick(ms(450))), ["heartbeat 0"]);
    assert!(unit.tick(ms(451)).is_empty());
    assert!(unit.tick(ms(10)).is_empty(), "a clock that goes back");
}

#[test]
fn reports_tell_changes_and_all_of_them_after_a_reconnect() {
    let mut unit = member();
    let mut live = [0, 2, 2, 2, 0, 0, 0, 9];
    let report = |unit: &mut Unit, live: &[u32], in_use| {
        words(&unit.report(&Figures {
            live,
            in_use,
            load_percent: 250,
            second_hops: 1,
            packets: 2,
            copied_to: None,
            inherited: 0,
        }))
    };
    assert_eq!(report(&mut unit, &live, 15), ["report 0 whole true [(1, 3, 2), (7, 1, 9)]"]);
    live[2] = 0;
    live[3] = 5;
    assert_eq!(report(&mut unit, &live, 15), ["report 0 whole false [(2, 1, 0), (3, 1, 5)]"]);
    assert_eq!(report(&mut unit, &live, 15), ["report 0 whole false []"]);
    assert!(report(&mut unit, &live[..4], 15).is_empty(), "counts of another table");
    unit.disconnected();
    unit.connected();
    unit.receive(1, welcome(Some(whole(None, first(), 0))));
    assert_eq!(report(&mut unit, &live, 15), ["report 0 whole true [(1, 1, 2), (3, 1, 5), (7, 1, 9)]"]);
    assert_eq!(words(&unit.tick(u64::MAX)), ["heartbeat 100"]);
}

#[test]
fn a_unit_is_drained_when_it_owns_nothing_and_nothing_is_left() {
    let mut unit = member();
    let report = |unit: &mut Unit, live: &[u32; 8], in_use| {
        words(&unit.report(&Figures {
            live,
            in_use,
            load_percent: 0,
            second_hops: 0,
            packets: 0,
            copied_to: None,
            inherited: 0,
        }))
        .pop()
    };
    assert!(report(&mut unit, &[0; 8], 0).unwrap().starts_with("report"), "it owns buckets");
    let got = unit.receive(1, prepare(next(&first(), &[(2, 1), (NODE, 0)]), &[]));
    unit.took_over(number(&got));
    let got = unit.receive(1, Message::Commit { era: 1 });
    assert!(report(&mut unit, &[0; 8], 0).unwrap().starts_with("report 0"), "not all cores work by it");
    unit.took_over(number(&got));
    assert!(report(&mut unit, &[0, 0, 1, 0, 0, 0, 0, 0], 1).unwrap().starts_with("report"), "a flow");
    assert!(report(&mut unit, &[0; 8], 2).unwrap().starts_with("report"), "a bond");
    assert_eq!(report(&mut unit, &[0; 8], 0).unwrap(), "drained 1");
}

/// A manager that was cut off while another one led says nothing to a unit that has heard that one.
#[test]
fn managers_of_an_older_term_are_turned_away() {
    let mut unit = Unit::new(Identity { node: NODE, role: Role::Both, weight: 1, instance: 1 });
    let mut talk = |term| {
        unit.connected();
        let actions = unit.receive(0, Message::Term { term });
        let refused = matches!(actions[..], [Action::Refused(Refusal::NotLeading)]);
        let heard = unit.receive(0, Message::Goodbye);
        assert!(heard.is_empty());
        unit.disconnected();
        refused
    };
    assert_eq!([5, 5, 7, 5, 6, 7, 8].map(&mut talk), [false, false, false, true, true, false, false]);
}
