#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

fn key(text: &str) -> FlowKey {
    text.parse().unwrap()
}

fn find(table: &FlowTable, key: &FlowKey, tenant: u16) -> Option<(FlowId, Direction)> {
    let hash = table.hash(key, tenant);
    table.prefetch(hash);
    let hint = table.prefetch_entry(hash);
    let found = table.find(hash, key, tenant);
    assert_eq!(table.find_hinted(hint, hash, key, tenant), found);
    let other = table.prefetch_entry(hash ^ 1 << 40);
    if other != Hint::default() {
        assert_eq!(table.find_hinted(other, hash, key, tenant), found);
    }
    if let Some((id, _)) = found {
        table.prefetch_counters(id);
    }
    found
}

/// One flow of a family: clients, servers, ports from small numbers, so that they often meet.
fn address(v6: bool, number: u32) -> IpAddr {
    if v6 {
        IpAddr::V6(std::net::Ipv6Addr::from_bits(0x2001_0db8 << 96 | u128::from(number)))
    } else {
        IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 | number))
    }
}

fn numbered(v6: bool, number: u32) -> FlowKey {
    FlowKey {
        src: address(v6, number),
        dst: address(v6, 0x8000 | (number % 7)),
        src_port: number as u16,
        dst_port: 443,
        protocol: 17,
    }
}

fn translated(original: FlowKey, number: u32) -> FlowKey {
    FlowKey {
        dst: address(original.src.is_ipv6(), 0x80_0000),
        dst_port: number as u16,
        ..original.reversed()
    }
}

#[test]
fn a_translated_flow_is_found_from_both_sides() {
    for [original, reply] in [
        ["tcp 10.0.0.5:1234 > 1.2.3.4:443", "tcp 1.2.3.4:443 > 203.0.113.7:40000"],
        ["tcp [2001:db8::5]:1234 > [2001:db8:1::4]:443", "tcp [2001:db8:1::4]:443 > [2001:db8:2::7]:40000"],
        ["icmp 10.0.0.5 > 11.2.3.4 id 7", "icmp 11.2.3.4 > 9.0.113.7 id 40000"],
    ] {
        let (original, reply) = (key(original), key(reply));
        let mut table = FlowTable::new(&mut Random::of_number(1), 10);
        let record = Record { seen: 77, nat: 3, ..Record::default() };
        let id = table.insert((&original, 1), (&reply, 2), record).unwrap();
        assert_eq!(find(&table, &original, 1), Some((id, Direction::Original)));
        assert_eq!(find(&table, &reply, 2), Some((id, Direction::Reply)));
        for (other, tenant) in [
            (original, 2),
            (reply, 1),
            (original.reversed(), 1),
            (reply.reversed(), 2),
            (FlowKey { protocol: 17, ..original }, 1),
            (FlowKey { src_port: 1, ..original }, 1),
        ] {
            assert_eq!(find(&table, &other, tenant), None, "{other} of {tenant}");
        }
        assert!(table.is_translated(id));
        assert_eq!(table.leaves_as(id, Direction::Original), reply.reversed());
        assert_eq!(table.leaves_as(id, Direction::Reply), original.reversed());
        assert_eq!(table.keys(id), ((original, 1), (reply, 2)));
        assert_eq!(*table.record(id), Record { protocol: original.protocol, ..record });

        table.account(id, Direction::Original, u32::MAX, 100);
        table.account(id, Direction::Original, 3, u32::MAX);
        table.account(id, Direction::Reply, 1, 1500);
        let counters = FlowCounters {
            created: 77,
            packets: [u64::from(u32::MAX) + 3, 1],
            bytes: [u64::from(u32::MAX) + 100, 1500],
        };
        assert_eq!(table.counters(id), Some(counters));
        table.record_mut(id).state = 9;
        let removed = table.remove(id).unwrap();
        assert_eq!((removed.original, removed.reply, removed.tenants), (original, reply, [1, 2]));
        assert_eq!((removed.record.state, removed.counters), (9, Some(counters)));
        assert!(table.is_empty());
        assert_eq!(find(&table, &original, 1).or(find(&table, &reply, 2)), None);
    }
}

#[test]
fn a_plain_flow_needs_one_entry_of_the_index_when_its_tenants_are_equal() {
    for text in [
        "udp 10.0.0.5:1234 > 1.2.3.4:53",
        "udp [2001:db8::5]:1234 > [2001:db8:1::4]:53",
        "icmp 10.0.0.5 > 1.2.3.4 id 7",
        "esp 1.2.3.4 > 10.0.0.5",
    ] {
        let original = key(text);
        for (reply_tenant, entries) in [(1, 1), (2, 2)] {
            let mut table = FlowTable::new(&mut Random::of_number(1), 10);
            assert_eq!(table.hash(&original, 1), table.hash(&original.reversed(), 1));
            assert_ne!(table.hash(&original, 1), table.hash(&original, 2));
            let reply = original.reversed();
            let id = table.insert((&original, 1), (&reply, reply_tenant), Record::default()).unwrap();
            assert_eq!(table.index.len(), entries);
            assert_eq!(find(&table, &original, 1), Some((id, Direction::Original)));
            assert_eq!(find(&table, &reply, reply_tenant), Some((id, Direction::Reply)));
            assert_eq!(find(&table, &original, 3), None);
            assert!(!table.is_translated(id));
            assert_eq!(table.leaves_as(id, Direction::Original), original);
            assert_eq!(table.leaves_as(id, Direction::Reply), reply);
            table.account(id, Direction::Original, 1, 1);
            assert_eq!(table.counters(id), None);
            assert_eq!(table.remove(id).unwrap().reply, reply);
            assert_eq!((table.index.len(), find(&table, &reply, reply_tenant)), (0, None));
        }
    }
}

#[test]
fn equal_addresses_work_and_a_key_that_is_its_own_reply_goes_the_original_way() {
    let mut table = FlowTable::new(&mut Random::of_number(1), 10);
    let request = FlowKey { dst_port: 0, ..key("icmp 10.0.0.5:9 > 10.0.0.5:0") };
    let id = table.insert((&request, 0), (&request.reversed(), 0), Record::default()).unwrap();
    assert_eq!(find(&table, &request, 0), Some((id, Direction::Original)));
    assert_eq!(find(&table, &request.reversed(), 0), Some((id, Direction::Reply)));
    let same = key("udp 10.0.0.5:500 > 10.0.0.5:500");
    let id = table.insert((&same, 0), (&same, 0), Record::default()).unwrap();
    assert_eq!(find(&table, &same, 0), Some((id, Direction::Original)));
    assert_eq!(table.insert((&same, 0), (&same, 0), Record::default()), Err(DropReason::NotNew));
    assert_eq!(table.remove(id).map(|removed| removed.original), Some(same));
    assert_eq!((find(&table, &same, 0), table.len()), (None, 1));
}

#[test]
fn what_cannot_be_a_flow_is_refused_and_changes_nothing() {
    let mut table = FlowTable::new(&mut Random::of_number(1), 2);
    let first = key("tcp 10.0.0.5:1234 > 1.2.3.4:443");
    let reply = key("tcp 1.2.3.4:443 > 203.0.113.7:40000");
    table.insert((&first, 0), (&reply, 0), Record::default()).unwrap();
    let other = key("tcp 10.0.0.6:1 > 1.2.3.4:443");
    let six = key("tcp [2001:db8::1]:443 > [2001:db8::2]:1");
    let mixed = FlowKey { dst: six.dst, ..first };
    let not_new = DropReason::NotNew;
    let unsupported = DropReason::NatUnsupported;
    for (original, answer, reason) in [
        (first, first.reversed(), not_new),
        (other, reply, not_new),
        (reply, other, not_new),
        (other, other, not_new),
        (other, six, unsupported),
        (mixed, mixed.reversed(), unsupported),
        (mixed, reply, unsupported),
        (mixed.reversed(), mixed, unsupported),
        (other, FlowKey { protocol: 17, ..other.reversed() }, unsupported),
    ] {
        assert_eq!(
            table.insert((&original, 0), (&answer, 0), Record::default()),
            Err(reason),
            "{original}, {answer}"
        );
        assert_eq!((table.len(), table.index.len()), (1, 2));
        assert_eq!(find(&table, &other, 0), None);
    }
    assert_eq!(find(&table, &mixed, 0).or(find(&table, &mixed.reversed(), 0)), None);
}

#[test]
fn a_full_table_says_so_until_a_flow_goes() {
    let mut table = FlowTable::new(&mut Random::of_number(1), 100);
    assert_eq!(table.capacity(), 100);
    let mut last = None;
    for number in 0..100 {
        let original = numbered(number % 2 == 0, number);
        last = table.insert((&original, 0), (&original.reversed(), 0), Record::default()).ok();
    }
    let late = numbered(false, 1000);
    let reply = translated(late, 1);
    assert_eq!(table.insert((&late, 0), (&reply, 0), Record::default()), Err(DropReason::FlowTableFull));
    assert_eq!(find(&table, &late, 0), None);
    table.remove(last.unwrap()).unwrap();
    assert!(table.insert((&late, 0), (&reply, 0), Record::default()).is_ok());
    assert_eq!(table.len(), 100);
    assert_eq!(FlowTable::new(&mut Random::of_number(1), u32::MAX).capacity(), FLOWS_MAX as usize);
}

#[test]
fn names_of_flows_that_are_gone_do_no_harm() {
    let mut table = FlowTable::new(&mut Random::of_number(1), 10);
    let original = numbered(false, 1);
    let reply = translated(original, 1);
    let gone = table.insert((&original, 0), (&reply, 0), Record { state: 5, ..Record::default() }).unwrap();
    table.remove(gone).unwrap();
    let strange = [0, 1 << 29, u32::MAX, SLOT_MASK, 1 << 30, 3 << 30 | 1, 2 << 30 | 70_000];
    for id in strange.map(FlowId).into_iter().chain([gone]) {
        assert_eq!(table.remove(id), None);
        assert_eq!(*table.record(id), Record::default());
        assert_eq!(table.leaves_as(id, Direction::Reply).src_port, 0);
        table.account(id, Direction::Reply, 1, 1);
        let _ = (table.counters(id), table.keys(id), table.is_translated(id));
        table.record_mut(id).state = 1;
    }
    assert_eq!((table.len(), find(&table, &original, 0)), (0, None));
    let id = table.insert((&original, 0), (&reply, 0), Record::default()).unwrap();
    assert_eq!((table.record(id).state, table.counters(id)), (0, Some(FlowCounters::default())));
}

#[test]
fn flows_survive_growth_and_memory_stays_within_its_bounds_at_every_size() {
    // Bytes for a flow, with what the smallest table has anyway.
    for (v6, nat, bytes_max) in [(false, true, 128), (false, false, 64), (true, true, 192), (true, false, 96)]
    {
        let mut table = FlowTable::new(&mut Random::of_number(3), 50_000);
        let mut ids = Vec::new();
        for number in 0..50_000 {
            let original = numbered(v6, number);
            let reply = if nat { translated(original, number) } else { original.reversed() };
            ids.push((
                table.insert((&original, 4), (&reply, 4), Record::default()).unwrap(),
                original,
                reply,
            ));
            let entries = (number as usize + 1) * if nat { 2 } else { 1 };
            assert_eq!(table.index.len(), entries);
            if number > 10_000 {
                let entry_bytes = match (v6, nat) {
                    (false, true) => 96,
                    (false, false) => 52,
                    (true, true) => 160,
                    (true, false) => 80,
                };
                let bytes = (number as usize + 1) * entry_bytes + table.index.touched_bytes();
                assert!(bytes <= (number as usize + 1) * bytes_max, "{number}: {bytes}");
            }
        }
        for (id, original, reply) in &ids {
            assert_eq!(find(&table, original, 4), Some((*id, Direction::Original)));
            assert_eq!(find(&table, reply, 4), Some((*id, Direction::Reply)));
        }
        for (id, original, _) in &ids {
            assert_eq!(table.remove(*id).map(|removed| removed.original), Some(*original));
        }
        assert_eq!((table.len(), table.index.len()), (0, 0));
        assert!(
            ids.iter()
                .all(|(_, original, reply)| find(&table, original, 4).or(find(&table, reply, 4)).is_none())
        );
    }
}

#[test]
fn hashes_spread_over_all_bits() {
    let table = FlowTable::new(&mut Random::of_number(5), 1);
    let mut ones = [0u32; 64];
    let mut seen = BTreeSet::new();
    for number in 0..20_000 {
        let hash = table.hash(&numbered(number % 2 == 0, number), number as u16 % 3);
        assert!(seen.insert((hash >> 32) as u32) || number > 2000, "32 bits tell a few flows apart");
        for (bit, ones) in ones.iter_mut().enumerate() {
            *ones += (hash >> bit & 1) as u32;
        }
    }
    // The lower half repeats the upper one.
    assert!(ones.iter().all(|ones| (9_500..10_500).contains(ones)), "{ones:?}");
    let other = FlowTable::new(&mut Random::of_number(6), 1);
    assert_ne!(table.hash(&numbered(false, 1), 0), other.hash(&numbered(false, 1), 0));
}

#[test]
fn sweeps_go_on_where_they_stopped_and_give_back_memory() {
    let mut table = FlowTable::new(&mut Random::of_number(1), 400_000);
    for number in 0..300_000 {
        let original = numbered(number % 4 == 0, number);
        let reply = if number % 2 == 0 { translated(original, number) } else { original.reversed() };
        table.insert((&original, 0), (&reply, 0), Record { seen: number, ..Record::default() }).unwrap();
    }
    let full = table.memory_bytes();
    for step in [1, 7, 64, 1000, usize::MAX] {
        let mut seen = BTreeSet::new();
        let mut calls = 0;
        loop {
            let swept = table.sweep(step, |record| !seen.insert(record.seen), |_| ());
            assert!(swept.examined <= step && swept.removed == 0);
            calls += 1;
            if swept.pass_ended {
                break;
            }
        }
        assert_eq!(seen.len(), 300_000, "every flow once");
        assert!(calls >= 300_000 / step);
    }
    let mut gone = BTreeSet::new();
    while !table
        .sweep(100, |record| record.seen % 3 == 0, |removed| assert!(gone.insert(removed.record.seen)))
        .pass_ended
    {}
    assert_eq!((gone.len(), table.len()), (100_000, 200_000));
    assert!(gone.iter().all(|seen| seen % 3 == 0));
    for number in 0..300_000 {
        assert_eq!(find(&table, &numbered(number % 4 == 0, number), 0).is_some(), number % 3 != 0);
    }
    while !table.sweep(100, |_| true, |_| ()).pass_ended {}
    assert!(table.is_empty());
    assert!(table.memory_bytes() < full, "empty chunks are given back");
    let original = numbered(false, 1);
    assert!(table.insert((&original, 0), (&original.reversed(), 0), Record::default()).is_ok());
}

#[test]
fn a_scan_lists_every_flow_once() {
    let mut table = FlowTable::new(&mut Random::of_number(1), 10_000);
    let mut wanted = BTreeSet::new();
    for number in 0..5_000 {
        let original = numbered(number % 4 == 0, number);
        let reply = if number % 2 == 0 { translated(original, number) } else { original.reversed() };
        wanted.insert(table.insert((&original, 0), (&reply, 0), Record::default()).unwrap());
    }
    for count in [0, 1, 100, 100_000] {
        let mut found = Vec::new();
        let mut cursor = 0;
        loop {
            let (ids, next) = table.scan(cursor, count);
            found.extend(ids);
            match next {
                Some(next) => cursor = next,
                None => break,
            }
        }
        assert_eq!(found.len(), 5_000);
        assert_eq!(found.into_iter().collect::<BTreeSet<_>>(), wanted);
    }
    assert_eq!(table.scan(u64::MAX, 10).1, None);
    assert_eq!(FlowTable::new(&mut Random::of_number(1), 10).scan(0, 10).0.count(), 0);
}

/// Model of what the table is to do, in the plainest way.
#[derive(Default)]
struct Model {
    flows: BTreeMap<FlowId, [(FlowKey, u16); 2]>,
    keys: BTreeMap<(String, u16), (FlowId, Direction)>,
}

fn name((key, tenant): (FlowKey, u16)) -> (String, u16) {
    (format!("{key:?}"), tenant)
}

impl Model {
    fn insert(&mut self, id: FlowId, keys: [(FlowKey, u16); 2]) {
        self.flows.insert(id, keys);
        self.keys.insert(name(keys[1]), (id, Direction::Reply));
        self.keys.insert(name(keys[0]), (id, Direction::Original));
    }

    fn remove(&mut self, id: FlowId) -> Option<[(FlowKey, u16); 2]> {
        let keys = self.flows.remove(&id)?;
        for key in keys {
            self.keys.remove(&name(key));
        }
        Some(keys)
    }
}

#[derive(Clone, Debug)]
enum Operation {
    Insert([(FlowKey, u16); 2]),
    Find((FlowKey, u16)),
    Remove(usize),
    Sweep(usize, u32),
}

fn small_key() -> impl Strategy<Value = (FlowKey, u16)> {
    (any::<bool>(), 0..6u32, 0..6u32, 0..4u16, 0..4u16, 0..2u16, any::<bool>()).prop_map(
        |(v6, src, dst, src_port, dst_port, tenant, tcp)| {
            let protocol = if tcp { 6 } else { 17 };
            (FlowKey { src: address(v6, src), dst: address(v6, dst), src_port, dst_port, protocol }, tenant)
        },
    )
}

fn operation() -> impl Strategy<Value = Operation> {
    let plain = (small_key(), 0..3u16).prop_map(|(original, other)| {
        let tenant = if other == 0 { 1 - original.1 } else { original.1 };
        Operation::Insert([original, (original.0.reversed(), tenant)])
    });
    let nat = (small_key(), small_key()).prop_map(|(original, reply)| {
        let like = translated(original.0, u32::from(reply.0.src_port));
        Operation::Insert([original, if reply.1 == 0 { (like, reply.1) } else { reply }])
    });
    prop_oneof![
        3 => plain,
        3 => nat,
        4 => small_key().prop_map(Operation::Find),
        2 => any::<usize>().prop_map(Operation::Remove),
        1 => (0..40usize, 0..4u32).prop_map(|(entries, rest)| Operation::Sweep(entries, rest)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn it_does_what_the_model_does(seed: u64, operations in prop::collection::vec(operation(), 1..400)) {
        let mut table = FlowTable::new(&mut Random::of_number(seed), 60);
        let mut model = Model::default();
        for (number, operation) in operations.into_iter().enumerate() {
            match operation {
                Operation::Insert([original, reply]) => {
                    let taken = [original, reply].iter().any(|key| model.keys.contains_key(&name(*key)));
                    let own = original == reply && original.0.reversed() != reply.0;
                    let unlike = original.0.protocol != reply.0.protocol
                        || original.0.src.is_ipv4() != reply.0.src.is_ipv4();
                    let record = Record { seen: number as u32 % 4, ..Record::default() };
                    match table.insert((&original.0, original.1), (&reply.0, reply.1), record) {
                        Ok(id) => {
                            prop_assert!(!taken && !own && !unlike && model.flows.len() < 60);
                            model.insert(id, [original, reply]);
                        }
                        Err(DropReason::NotNew) => prop_assert!(taken || own),
                        Err(DropReason::FlowTableFull) => prop_assert_eq!(model.flows.len(), 60),
                        Err(DropReason::NatUnsupported) => prop_assert!(unlike),
                        Err(reason) => prop_assert!(false, "{}", reason),
                    }
                }
                Operation::Find((key, tenant)) => {
                    prop_assert_eq!(find(&table, &key, tenant), model.keys.get(&name((key, tenant))).copied());
                }
                Operation::Remove(which) => {
                    let id = model.flows.keys().nth(which % model.flows.len().max(1)).copied();
                    let Some(id) = id else { continue };
                    let removed = table.remove(id).map(|removed| {
                        [(removed.original, removed.tenants[0]), (removed.reply, removed.tenants[1])]
                    });
                    prop_assert_eq!(removed, model.remove(id));
                    prop_assert_eq!(table.remove(id), None);
                }
                Operation::Sweep(entries, rest) => {
                    let mut gone = Vec::new();
                    table.sweep(entries, |record| record.seen == rest, |removed| gone.push(removed));
                    for removed in gone {
                        prop_assert_eq!(removed.record.seen, rest);
                        let found = model.keys.get(&name((removed.original, removed.tenants[0]))).copied();
                        prop_assert!(found.is_some());
                        found.map(|(id, _)| model.remove(id));
                    }
                }
            }
            prop_assert_eq!(table.len(), model.flows.len());
        }
        for (id, [original, reply]) in &model.flows {
            prop_assert_eq!(table.keys(*id), (*original, *reply));
            prop_assert_eq!(find(&table, &original.0, original.1), Some((*id, Direction::Original)));
            prop_assert_eq!(find(&table, &reply.0, reply.1).map(|(found, _)| found), Some(*id));
        }
        let scanned: BTreeSet<FlowId> = table.scan(0, 1_000_000).0.collect();
        prop_assert_eq!(scanned, model.flows.into_keys().collect::<BTreeSet<_>>());
    }

    /// The index alone, full buckets, holes, equal hashes and splits included: few distinct hashes, many entries.
    #[test]
    fn the_index_finds_what_is_in_it(
        operations in prop::collection::vec((any::<bool>(), 0..2500u32), 1..6000),
        shift in 14..30u32,
    ) {
        let mut index = Index::new(1000);
        let mut model = BTreeSet::new();
        let hash_of = |reference: u32| u64::from((reference / 3).wrapping_mul(0x9e37_79b1) >> (32 - shift)) << 32 << (32 - shift);
        for (remove, number) in operations {
            let reference = number + 1;
            if remove {
                prop_assert_eq!(index.remove(hash_of(reference), reference), model.remove(&reference));
            } else if model.insert(reference) {
                prop_assert!(index.insert(hash_of(reference), reference));
            }
        }
        prop_assert_eq!(index.len(), model.len());
        for reference in 1..=2500 {
            let found = index.find(hash_of(reference), |other| (other == reference).then_some(()));
            prop_assert_eq!(found.is_some(), model.contains(&reference));
        }
    }
}
