//! Seeds about the manager and the units of a cluster.

use cluster::manager::{Accepted, Block, Change, Command, Standing, State, Step, UnitRecord};
use cluster::message::{
    Hello, LiveRun, Member, Message, Pair, Parts, Phase, Prepare, Refusal, Report, Retired, Role,
    SharedInterface, Welcome, Whole,
};
use steering::table::{BucketTable, Unit};
use steering::units::Lease;

use super::save;

/// Tables of 16 buckets, one era after the other, as a cluster's manager makes them.
fn eras() -> Vec<BucketTable> {
    let unit = |id, weight| Unit { id, weight };
    let mut tables = vec![BucketTable::new(16, &[unit(2, 1), unit(3, 1)]).unwrap()];
    for units in [[unit(2, 1), unit(3, 3)], [unit(2, 1), unit(3, 0)], [unit(2, 1), unit(3, 1)]] {
        let next = steering::assign::plan(&tables[tables.len() - 1], &units, &[]).unwrap();
        tables.push(next);
    }
    tables
}

fn cluster_parts() -> Parts {
    let member =
        |node, role, address: &str| Member { node, role, weight: 1, address: address.parse().unwrap() };
    let interface = SharedInterface {
        id: 1,
        outside: true,
        mac: [2, 0, 0, 0, 0, 1],
        name: "wan0".into(),
        addresses: vec![("192.0.2.1".parse().unwrap(), 24), ("2001:db8::1".parse().unwrap(), 64)],
    };
    Parts {
        members: vec![member(2, Role::DataPlane, "10.99.0.2"), member(3, Role::Both, "fd99::3")],
        interfaces: vec![interface],
        leases: vec![Lease { address: "192.0.2.1".parse().unwrap(), block: 1, node: 3 }],
        resting: vec![Lease { address: "192.0.2.1".parse().unwrap(), block: 2, node: 3 }],
        copies: vec![Pair { unit: 2, heir: 3 }],
        heirs: vec![Pair { unit: 5, heir: 3 }],
    }
}

/// The whole state, as units get it: two eras of [`eras`], or one.
fn welcome(older: Option<usize>, newest: usize, in_force: usize, fresh: bool) -> Message {
    let eras = eras();
    let whole = Whole {
        fresh,
        key: [0x3c; 40],
        in_force: eras[in_force].era(),
        older: older.map(|place| eras[place].clone()),
        newest: eras[newest].clone(),
        parts: cluster_parts(),
    };
    Message::Welcome(Box::new(Welcome { node: 3, heartbeat_ms: 50, whole: Some(whole) }))
}

fn prepare(place: usize) -> Message {
    Message::Prepare(Box::new(Prepare { table: eras()[place].clone(), parts: cluster_parts() }))
}

fn free() -> Message {
    Message::Welcome(Box::new(Welcome { node: 3, heartbeat_ms: 50, whole: None }))
}

fn retire() -> Message {
    let last = Retired { first: 65_535, buckets: 1, unit: 4 };
    Message::Retire { era: 1, entries: vec![Retired { first: 0, buckets: 16, unit: 2 }, last] }
}

/// Version, kind and body.
fn frame(message: &Message) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.encode(&mut bytes).unwrap();
    bytes[4..].to_vec()
}

/// Seeds of the target `cluster_message`.
pub fn cluster_messages() {
    let hello = Hello { node: 3, role: Role::Both, weight: 1, instance: 7, held: Some(1) };
    let live = vec![LiveRun { first: 0, buckets: 3, flows: 300 }, LiveRun { first: 9, buckets: 1, flows: 1 }];
    let report = Report {
        in_force: 1,
        load_percent: 40,
        second_hops: 3,
        packets: 9_000,
        copied_to: Some(2),
        inherited: 5,
        whole: false,
        live,
    };
    let messages = [
        ("hello", Message::Hello(hello)),
        ("heartbeat", Message::Heartbeat { load_percent: 3 }),
        ("acknowledge", Message::Acknowledge { era: 1, phase: Phase::Committed }),
        ("report", Message::Report(report)),
        ("drained", Message::Drained { era: 2 }),
        ("welcome", welcome(Some(0), 1, 0, false)),
        ("welcome-free", free()),
        ("prepare", prepare(1)),
        ("commit", Message::Commit { era: 1 }),
        ("retire", retire()),
        ("refused", Message::Refused(Refusal::NewerEra)),
        ("goodbye", Message::Goodbye),
    ];
    for (name, message) in &messages {
        save("cluster_message", name, &frame(message));
    }
    save("cluster_message", "newer-version", &[2, 21]);
    save("cluster_message", "unknown-kind", &[1, 99]);
}

/// Seeds of the target `cluster_unit`.
pub fn cluster_talks() {
    let commit = |era| Message::Commit { era };
    let first = || welcome(None, 0, 0, false);
    let changes = [prepare(1), commit(1), retire(), prepare(2), commit(2), prepare(3), commit(3)];
    let disorder = [commit(1), prepare(1), prepare(1), commit(1), commit(1), prepare(0), commit(0)];
    let talks: [(&str, Vec<Message>); 6] = [
        ("changes", [&[first()][..], &changes].concat()),
        ("gap", vec![first(), prepare(2), prepare(1), welcome(Some(1), 2, 1, false), commit(2)]),
        ("out-of-order", [&[first()][..], &disorder].concat()),
        (
            "removed-and-back",
            vec![first(), Message::Goodbye, commit(1), welcome(Some(1), 2, 1, true), commit(2)],
        ),
        ("free-and-taken-in", vec![free(), welcome(Some(0), 1, 0, true), commit(1), retire()]),
        ("refused", vec![first(), Message::Refused(Refusal::Unknown), welcome(None, 3, 3, false)]),
    ];
    for (name, talk) in &talks {
        let mut bytes = Vec::new();
        for frame in talk.iter().map(frame) {
            bytes.extend((frame.len() as u16).to_be_bytes());
            bytes.extend(frame);
        }
        save("cluster_unit", name, &bytes);
    }
}

/// Seeds of the target `cluster_state`.
pub fn cluster_states() {
    let eras = eras();
    let mut state = State::new([0x3c; 40]);
    save("cluster_state", "new", &state.encode());
    for member in cluster_parts().members {
        let record = UnitRecord {
            address: member.address,
            role: member.role,
            weight: 1,
            share_permille: 1_000,
            standing: Standing::Active,
            joined: u64::from(member.node),
            instance: 7,
            forget: false,
            migrate: false,
        };
        state.units.insert(member.node, record);
    }
    state.interfaces = cluster_parts().interfaces;
    state.outside = vec!["192.0.2.1".parse().unwrap()];
    let block = |block, node| Block { address: state.outside[0], block, node, resting: false };
    state.blocks = vec![block(1, Some(3)), block(2, None)];
    state.table = Some(eras[0].clone());
    save("cluster_state", "idle", &state.encode());
    let mut lost = state.clone();
    lost.fence = true;
    lost.units.get_mut(&2).unwrap().standing = Standing::Lost;
    save("cluster_state", "a-unit-lost", &lost.encode());
    let steps = vec![
        Step::Add { node: 4, enrol: Some(("10.99.0.4".parse().unwrap(), Role::DataPlane)), weight: Some(3) },
        Step::Drain { node: 2, remove: true, migrate: false },
        Step::Remove { node: 3, force: true },
        Step::Weight { node: 3, weight: 9 },
    ];
    state.accepted.push(Accepted { number: 1, command: Command::Change(steps) });
    let (interfaces, outside) = (state.interfaces.clone(), state.outside.clone());
    state.accepted.push(Accepted { number: 2, command: Command::Configure { interfaces, outside } });
    for (name, committing) in [("preparing", false), ("committing", true)] {
        state.change = Some(Change { table: eras[1].clone(), committing });
        save("cluster_state", name, &state.encode());
    }
}
