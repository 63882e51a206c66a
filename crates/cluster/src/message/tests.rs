#![allow(clippy::unwrap_used, reason = "tests")]

use proptest::prelude::*;
use steering::assign::plan;
use steering::table::{BucketTable, Unit};

use super::*;

fn table(era: u32) -> BucketTable {
    BucketTable::from_owners(era, vec![3, 3, 3, 4]).unwrap()
}

/// Era 1: unit 4 has taken a bucket from unit 3.
fn moved() -> BucketTable {
    let unit = |id| Unit { id, weight: 1 };
    let old = BucketTable::from_owners(0, vec![3, 3, 3, 4]).unwrap();
    plan(&old, &[unit(3), unit(4)], &[]).unwrap()
}

fn parts() -> Parts {
    let member =
        |node, role, weight, address: &str| Member { node, role, weight, address: address.parse().unwrap() };
    let interface = SharedInterface {
        id: 1,
        outside: true,
        mac: [2, 0, 0x5e, 0x10, 0, 1],
        name: "wan0".into(),
        addresses: vec![("192.0.2.1".parse().unwrap(), 24), ("2001:db8::1".parse().unwrap(), 64)],
    };
    Parts {
        members: vec![
            member(1, Role::Dispatcher, 0, "10.99.0.1"),
            member(3, Role::DataPlane, 100, "10.99.0.3"),
            member(4, Role::Both, 50, "fd99::4"),
        ],
        interfaces: vec![interface],
        leases: vec![Lease { address: "192.0.2.1".parse().unwrap(), block: 2, node: 3 }],
        resting: vec![Lease { address: "192.0.2.1".parse().unwrap(), block: 9, node: 4 }],
        copies: vec![Pair { unit: 3, heir: 4 }, Pair { unit: 4, heir: 3 }],
        heirs: vec![Pair { unit: 7, heir: 4 }],
    }
}

/// The examples of `docs/wire-cluster-messages.md`, by name.
fn examples() -> Vec<(&'static str, Message)> {
    let hello =
        Hello { node: 3, role: Role::DataPlane, weight: 100, instance: 0x0102_0304_0506_0708, held: None };
    let live = vec![LiveRun { first: 0, buckets: 1, flows: 300 }, LiveRun { first: 5, buckets: 4, flows: 1 }];
    let report = Report {
        in_force: 1,
        load_percent: 37,
        second_hops: 9,
        packets: 70_000,
        copied_to: Some(4),
        inherited: 3,
        whole: true,
        live,
    };
    let whole = Whole {
        fresh: false,
        key: std::array::from_fn(|place| place as u8),
        in_force: 0,
        older: Some(table(0)),
        newest: moved(),
        parts: parts(),
    };
    let retired =
        vec![Retired { first: 0, buckets: 1, unit: 3 }, Retired { first: 0x0102, buckets: 256, unit: 4 }];
    vec![
        ("hello", Message::Hello(hello)),
        ("hello-with-era", Message::Hello(Hello { held: Some(7), ..hello })),
        ("heartbeat", Message::Heartbeat { load_percent: 37 }),
        ("acknowledge", Message::Acknowledge { era: 1, phase: Phase::Prepared }),
        ("report", Message::Report(report)),
        ("drained", Message::Drained { era: 9 }),
        ("identify", Message::Identify { key: [0x11; 32] }),
        ("proof", Message::Proof(Box::new(Proof { signature: [0x22; 64], token: None }))),
        (
            "proof-with-token",
            Message::Proof(Box::new(Proof { signature: [0x22; 64], token: Some(Secret([0x33; 32])) })),
        ),
        ("welcome-free", Message::Welcome(Box::new(Welcome { node: 3, heartbeat_ms: 50, whole: None }))),
        ("welcome", Message::Welcome(Box::new(Welcome { node: 3, heartbeat_ms: 50, whole: Some(whole) }))),
        ("prepare", Message::Prepare(Box::new(Prepare { table: moved(), parts: parts() }))),
        ("commit", Message::Commit { era: 1 }),
        ("retire", Message::Retire { era: 1, entries: retired }),
        ("refused", Message::Refused(Refusal::Identity)),
        ("goodbye", Message::Goodbye),
        ("term", Message::Term { term: 0x0102 }),
        ("challenge", Message::Challenge { nonce: [0x44; 32] }),
        ("admitted", Message::Admitted),
    ]
}

fn bytes(message: &Message) -> Vec<u8> {
    let mut out = Vec::new();
    message.encode(&mut out).unwrap();
    out
}

/// Version, kind and body of a message of `kind`.
fn body(kind: u8, body: &[u8]) -> Vec<u8> {
    [&[VERSION, kind][..], body].concat()
}

#[test]
fn the_documentation_shows_these_bytes() {
    let page = include_str!("../../../../docs/wire-cluster-messages.md");
    let documented: Vec<(&str, String)> = page
        .lines()
        .filter_map(|line| line.strip_prefix("    "))
        .filter_map(|line| line.split_once(": "))
        .map(|(name, bytes)| (name.trim(), bytes.trim().to_owned()))
        .collect();
    let hex = |message: &Message| {
        bytes(message).iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")
    };
    let examples: Vec<(&str, String)> =
        examples().into_iter().map(|(name, message)| (name, hex(&message))).collect();
    assert_eq!(documented, examples);
}

#[test]
fn examples_are_read_back_and_every_cut_is_refused() {
    for (name, message) in examples() {
        let bytes = bytes(&message);
        assert_eq!(Message::decode(&bytes[4..]).as_ref(), Ok(&message), "{name}");
        for end in 4..bytes.len() {
            match (Message::decode(&bytes[4..end]), &message) {
                (Err(_), _) => {}
                // Their lists end where the frame does.
                (Ok(Message::Report(cut)), Message::Report(all)) => assert!(cut.live.len() < all.live.len()),
                (Ok(Message::Retire { entries: cut, .. }), Message::Retire { entries: all, .. }) => {
                    assert!(cut.len() < all.len());
                }
                (Ok(other), _) => panic!("{name} cut at {end} is {other:?}"),
            }
        }
        let longer = [&bytes[4..], &[0xff]].concat();
        assert!(Message::decode(&longer).is_err(), "{name} with a byte behind it");
    }
}

#[test]
fn values_that_cannot_be_are_refused() {
    let rows: [(&str, Vec<u8>); 19] = [
        ("no such kind", body(8, &[])),
        ("node id beyond 4,095", body(1, &[0x10, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0])),
        ("role 0", body(1, &[0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0])),
        ("held 2", body(1, &[0, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 2])),
        ("load of 101 %", body(2, &[101])),
        ("phase 3", body(3, &[0, 0, 0, 1, 3])),
        ("a run behind the last bucket", body(4, &report_with(&[0xff, 0xff, 3, 1, 1]))),
        ("a number with a zero byte behind it", body(4, &report_with(&[0x80, 0, 0, 1]))),
        ("a number of six bytes", body(4, &report_with(&[0x80, 0x80, 0x80, 0x80, 0x80, 1, 0, 1]))),
        ("heartbeats without a pause", body(16, &[0, 1, 0, 0, 0])),
        ("a retired run behind the last bucket", body(19, &[0, 0, 0, 1, 0xff, 0xff, 0, 1, 0, 1])),
        ("reason 0", body(20, &[0])),
        ("a goodbye with a body", body(21, &[0])),
        ("members that are not there", body(17, &prepare_with(&[0xff, 0xff]))),
        ("an address of family 5", body(17, &prepare_with(&[0, 1, 0, 1, 1, 0, 0, 0, 0, 5]))),
        (
            "a prefix of 33 bits",
            body(
                17,
                &prepare_with(
                    &[
                        &[0, 0, 0, 1, 1, 0, 2, 0, 0, 0, 0, 1, 1, b'a', 0, 1][..],
                        &[4, 10, 0, 0, 1, 33],
                        &[0, 0],
                    ]
                    .concat(),
                ),
            ),
        ),
        (
            "a name with a slash",
            body(17, &prepare_with(&[0, 0, 0, 1, 1, 0, 2, 0, 0, 0, 0, 1, 2, b'a', b'/', 0, 0, 0, 0])),
        ),
        ("its own heir", body(17, &prepare_with(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 3, 0, 3, 0, 0]))),
        ("block 64", body(17, &prepare_with(&[0, 0, 0, 0, 0, 1, 4, 10, 0, 0, 1, 64, 0, 1]))),
    ];
    for (what, bytes) in rows {
        assert!(Message::decode(&bytes).is_err(), "{what}");
    }
    assert_eq!(Message::decode(&[1, 21]), Err(FrameError::Version(1)));
    assert_eq!(Message::decode(&[1]), Err(FrameError::Length(1)));
    assert!(Message::decode(&body(17, &prepare_with(&[0; 12]))).is_ok(), "the rows' frame is right");
    assert!(Message::decode(&body(4, &report_with(&[0xfe, 0xff, 3, 1, 1]))).is_ok(), "the last two buckets");
}

fn report_with(runs: &[u8]) -> Vec<u8> {
    [&[0, 0, 0, 1, 0][..], &[0; 21], &[1], runs].concat()
}

fn prepare_with(parts: &[u8]) -> Vec<u8> {
    let table = table(1).encode_with_chains();
    [&(table.len() as u32).to_be_bytes()[..], &table, parts].concat()
}

#[test]
fn a_state_that_contradicts_itself_is_refused() {
    let whole = |older: Option<BucketTable>, newest: BucketTable, in_force| {
        let whole = Whole { fresh: true, key: [7; 40], in_force, older, newest, parts: parts() };
        bytes(&Message::Welcome(Box::new(Welcome { node: 1, heartbeat_ms: 1, whole: Some(whole) })))
    };
    let wider = BucketTable::from_owners(1, vec![1; 8]).unwrap();
    let rows = [
        ("both", whole(Some(table(0)), table(1), 0), true),
        ("the newer in force", whole(Some(table(0)), table(1), 1), true),
        ("one", whole(None, table(1), 1), true),
        ("eras wrap", whole(Some(table(u32::MAX)), table(0), 0), true),
        ("in force what is not held", whole(Some(table(0)), table(1), 2), false),
        ("in force the one before", whole(None, table(1), 0), false),
        ("a gap", whole(Some(table(0)), table(2), 0), false),
        ("another number of buckets", whole(Some(table(0)), wider, 0), false),
    ];
    for (name, bytes, ok) in rows {
        assert_eq!(Message::decode(&bytes[4..]).is_ok(), ok, "{name}");
    }
}

#[test]
fn a_stream_is_cut_into_messages_wherever_it_is_read() {
    let messages: Vec<Message> = examples().into_iter().map(|(_, message)| message).collect();
    let mut stream = Vec::new();
    for message in &messages {
        message.encode(&mut stream).unwrap();
    }
    for step in [1, 2, 3, 7, 64, stream.len()] {
        let mut frames = Frames::default();
        let mut read = Vec::new();
        for piece in stream.chunks(step) {
            frames.push(piece);
            while let Some(message) = frames.take().unwrap() {
                read.push(message);
            }
        }
        assert_eq!(read, messages, "in pieces of {step}");
    }
}

#[test]
fn a_length_that_cannot_be_ends_the_stream() {
    for length in [0u32, 1, FRAME_BYTES_MAX as u32 + 1, u32::MAX] {
        let mut frames = Frames::default();
        frames.push(&length.to_be_bytes());
        assert!(frames.take().is_err(), "{length}");
    }
    let mut frames = Frames::default();
    frames.push(&(FRAME_BYTES_MAX as u32).to_be_bytes());
    assert_eq!(frames.take(), Ok(None));
}

#[test]
fn the_largest_state_fits_a_frame() {
    // No two neighbors alike, every chain full: the longest tables that there are.
    let longest = |era: u32| {
        let mut bytes = vec![1, 0x05];
        bytes.extend(era.to_be_bytes());
        bytes.push(16);
        let buckets = 0..1u32 << 16;
        for bucket in buckets.clone() {
            bytes.extend((4_000 + (bucket & 1) as u16).to_be_bytes());
        }
        for bucket in buckets {
            bytes.extend([0, 4]);
            for place in 0..4 {
                bytes.extend((1_000 * (place + 1) + (bucket & 1) as u16 - 900).to_be_bytes());
            }
        }
        BucketTable::decode(&bytes).unwrap()
    };
    let address = |n: u32| IpAddr::from(std::net::Ipv6Addr::from(u128::from(n)));
    let member = |node| Member { node, role: Role::Both, weight: 1, address: address(node.into()) };
    let interface = |id| SharedInterface {
        id,
        outside: true,
        mac: [2; 6],
        name: "a-name-of-fift".into(),
        addresses: (0..INTERFACE_ADDRESSES_MAX as u32).map(|n| (address(n), 128)).collect(),
    };
    let leases =
        (0..64).flat_map(|n| (1..64).map(move |block| Lease { address: address(n), block, node: 4_095 }));
    let parts = Parts {
        members: (0..4_096).map(member).collect(),
        interfaces: (0..INTERFACES_MAX as u8).map(interface).collect(),
        leases: leases.collect(),
        ..Parts::default()
    };
    let (older, newest) = (Some(longest(1)), longest(2));
    let whole = Whole { fresh: false, key: [1; 40], in_force: 2, older, newest, parts };
    let message = Message::Welcome(Box::new(Welcome { node: 1, heartbeat_ms: 50, whole: Some(whole) }));
    let mut out = Vec::new();
    assert_eq!(message.encode(&mut out), Ok(()));
    assert!(out.len() > 1_800_000, "{} bytes are not the longest", out.len());
    // More than fits is not sent in part.
    let many = vec![Retired { first: 0, buckets: 1, unit: 1 }; FRAME_BYTES_MAX / 6 + 1];
    let bytes = out.len();
    assert!(Message::Retire { era: 1, entries: many }.encode(&mut out).is_err());
    assert_eq!(out.len(), bytes);
}

#[test]
fn the_key_is_not_printed() {
    let (_, welcome) = examples().into_iter().find(|(name, _)| *name == "welcome").unwrap();
    assert!(!format!("{welcome:?}").contains("39"), "{welcome:?}");
}

fn address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![any::<[u8; 4]>().prop_map(IpAddr::from), any::<[u8; 16]>().prop_map(IpAddr::from)]
}

fn node() -> impl Strategy<Value = u16> {
    0..steering::units::NODES_MAX
}

fn role() -> impl Strategy<Value = Role> {
    prop_oneof![Just(Role::Dispatcher), Just(Role::DataPlane), Just(Role::Both)]
}

fn tables() -> impl Strategy<Value = (BucketTable, BucketTable)> {
    (any::<u32>(), proptest::collection::vec(node(), 8), proptest::collection::vec(1..9u32, 1..6)).prop_map(
        |(era, owners, weights)| {
            let old = BucketTable::from_owners(era, owners).unwrap();
            let units: Vec<Unit> = (0u16..).zip(weights).map(|(id, weight)| Unit { id, weight }).collect();
            let new = plan(&old, &units, &[]).unwrap();
            (old, new)
        },
    )
}

fn any_parts() -> impl Strategy<Value = Parts> {
    let member = (node(), role(), any::<u32>(), address()).prop_map(|(node, role, weight, address)| Member {
        node,
        role,
        weight,
        address,
    });
    let addresses = proptest::collection::vec((address(), 0..=32u8), 0..4);
    let interface =
        (any::<u8>(), any::<bool>(), any::<[u8; 6]>(), "[a-zA-Z0-9._-]{1,15}", addresses).prop_map(
            |(id, outside, mac, name, addresses)| SharedInterface { id, outside, mac, name, addresses },
        );
    let lease =
        (address(), 0..64u8, node()).prop_map(|(address, block, node)| Lease { address, block, node });
    let pair = (node(), 1..4_096u16).prop_map(|(unit, apart)| Pair { unit, heir: (unit + apart) % 4_096 });
    (
        proptest::collection::vec(member, 0..5),
        proptest::collection::vec(interface, 0..3),
        proptest::collection::vec(lease, 0..5),
        proptest::collection::vec(pair, 0..5),
    )
        .prop_map(|(members, interfaces, leases, copies)| {
            let (resting, heirs) =
                (leases.iter().rev().copied().collect(), copies.iter().rev().copied().collect());
            Parts { members, interfaces, leases, resting, copies, heirs }
        })
}

fn report() -> impl Strategy<Value = Message> {
    let runs = proptest::collection::vec((0..9_000u32, 1..900u32, any::<u32>()), 0..6).prop_map(|runs| {
        let mut at = 0;
        let run = |(skip, buckets, flows)| {
            let first = at + skip;
            at = first + buckets;
            LiveRun { first, buckets, flows }
        };
        runs.into_iter().map(run).collect::<Vec<_>>()
    });
    let copies = (proptest::option::of(node()), any::<u32>());
    (any::<u32>(), 0..=100u8, any::<(u64, u64, bool)>(), copies, runs).prop_map(
        |(in_force, load_percent, (second_hops, packets, whole), (copied_to, inherited), live)| {
            Message::Report(Report {
                in_force,
                load_percent,
                second_hops,
                packets,
                copied_to,
                inherited,
                whole,
                live,
            })
        },
    )
}

fn message() -> impl Strategy<Value = Message> {
    let hello = (node(), role(), any::<(u32, u64, Option<u32>)>()).prop_map(|(node, role, rest)| {
        Message::Hello(Hello { node, role, weight: rest.0, instance: rest.1, held: rest.2 })
    });
    let welcome = (node(), 1..=u16::MAX, any::<(bool, bool, bool)>(), tables(), any_parts()).prop_map(
        |(node, heartbeat_ms, (member, fresh, committed), (old, newest), parts)| {
            let in_force = if committed { newest.era() } else { old.era() };
            let whole = Whole { fresh, key: [9; 40], in_force, older: Some(old), newest, parts };
            Message::Welcome(Box::new(Welcome { node, heartbeat_ms, whole: member.then_some(whole) }))
        },
    );
    let retired = (0..60_000u32, 1..5_000u32, node()).prop_map(|(first, buckets, unit)| Retired {
        first,
        buckets,
        unit,
    });
    prop_oneof![
        hello,
        report(),
        welcome,
        (0..=100u8).prop_map(|load_percent| Message::Heartbeat { load_percent }),
        (any::<u32>(), any::<bool>()).prop_map(|(era, done)| Message::Acknowledge {
            era,
            phase: if done { Phase::Committed } else { Phase::Prepared }
        }),
        (tables(), any_parts())
            .prop_map(|((_, table), parts)| Message::Prepare(Box::new(Prepare { table, parts }))),
        (any::<u32>(), proptest::collection::vec(retired, 0..5))
            .prop_map(|(era, entries)| Message::Retire { era, entries }),
    ]
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(message in message()) {
        let bytes = bytes(&message);
        prop_assert_eq!(Message::decode(&bytes[4..]), Ok(message));
    }

    #[test]
    fn any_bytes_are_read_or_refused_and_written_back_as_they_were(frame in proptest::collection::vec(any::<u8>(), 0..200), kind in 1..23u8) {
        let frame = [&[VERSION, kind][..], &frame].concat();
        if let Ok(message) = Message::decode(&frame) {
            let bytes = bytes(&message);
            prop_assert_eq!(Message::decode(&bytes[4..]), Ok(message));
        }
    }
}
