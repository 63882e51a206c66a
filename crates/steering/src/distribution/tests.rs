#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::table::Unit;
use proptest::prelude::*;

fn table(cores: u16) -> BucketTable {
    let units: Vec<Unit> = (0..cores).map(|id| Unit { id, weight: 1 }).collect();
    BucketTable::new(128, &units).unwrap()
}

fn distributor(scheme: Scheme) -> Distributor {
    Distributor::new(scheme, &[0, 1, 2, 3], table(4))
}

fn facts(hash: u32) -> Facts {
    Facts { hash, port: 0, service: NO_SERVICE, bytes: 100, now_ns: 0 }
}

/// The readers of packets with these facts, in a row.
fn readers(scheme: Scheme, packets: impl IntoIterator<Item = Facts>) -> Vec<u8> {
    let mut distributor = distributor(scheme);
    packets.into_iter().map(|facts| distributor.reader(&facts)).collect()
}

const ALL: [Scheme; 10] = [
    Scheme::Flow,
    Scheme::Interface,
    Scheme::Service,
    Scheme::RoundRobin,
    Scheme::LeastLoaded,
    Scheme::EveryPackets(100),
    Scheme::TimeSlice(5_000),
    Scheme::Transaction(200),
    Scheme::InterfaceFlow(2),
    Scheme::ServiceFlow(3),
];

#[test]
fn names_are_read_back() {
    for scheme in ALL {
        assert_eq!(scheme.to_string().parse(), Ok(scheme));
    }
    for wrong in [
        "",
        "flows",
        "every-0-packets",
        "every--packets",
        "slice-5",
        "interface-flow-300",
        "slice-0-us",
        "transaction-0-us",
    ] {
        assert_eq!(wrong.parse::<Scheme>(), Err(UnknownScheme), "{wrong}");
    }
}

#[test]
fn by_interface_and_by_service() {
    let port = |port| Facts { port, ..facts(9) };
    let service = |service| Facts { service, ..facts(9 << 24) };
    assert_eq!(readers(Scheme::Interface, [0, 1, 5, 0].map(port)), [0, 1, 1, 0]);
    assert_eq!(readers(Scheme::Service, [0, 2, 7].map(service)), [0, 2, 3]);
    let owner = table(4).owner_of_hash(9 << 24) as u8;
    assert_eq!(readers(Scheme::Service, [service(NO_SERVICE)]), [owner]);
    assert_eq!(readers(Scheme::ServiceFlow(2), [service(NO_SERVICE)]), [owner]);
}

#[test]
fn in_turn_by_packets_and_by_time() {
    assert_eq!(readers(Scheme::RoundRobin, [facts(1); 6]), [0, 1, 2, 3, 0, 1]);
    let at = |now_ns| Facts { now_ns, ..facts(1) };
    let times = [7_000, 8_000, 1_006_999, 1_007_000, 2_006_999, 9_000_000].map(at);
    assert_eq!(readers(Scheme::TimeSlice(1_000), times), [0, 0, 0, 1, 1, 2]);
}

#[test]
fn the_least_loaded_core_gets_the_packet() {
    let mut distributor = distributor(Scheme::LeastLoaded);
    distributor.tell_loads(&[200, 10, 250, 10]);
    let first: Vec<u8> = (0..6).map(|_| distributor.reader(&facts(1))).collect();
    assert_eq!(first, [1, 3, 1, 3, 1, 3]);
    // A large packet weighs like several small ones.
    distributor.tell_loads(&[]);
    let sizes = [5_000, 0, 0, 0, 0, 0, 0, 0];
    let second: Vec<u8> =
        sizes.iter().map(|&bytes| distributor.reader(&Facts { bytes, ..facts(1) })).collect();
    assert_eq!(second, [0, 1, 2, 3, 1, 2, 3, 1]);
    let runs = readers(Scheme::EveryPackets(3), [facts(1); 9]);
    assert_eq!(runs, [0, 0, 0, 1, 1, 1, 2, 2, 2]);
}

/// A question and its answer stay on one core however the loads change; the next question goes where least is to do.
#[test]
fn a_transaction_stays_where_it_began() {
    let mut distributor = distributor(Scheme::Transaction(1_000));
    let packet = |flow: u32, us: u64| Facts { hash: flow << 16, now_ns: us * 1_000, ..facts(0) };
    distributor.tell_loads(&[200, 10, 250, 100]);
    assert_eq!(distributor.reader(&packet(1, 0)), 1);
    distributor.tell_loads(&[200, 250, 10, 100]);
    let long: Vec<u8> = (1..50).map(|number| distributor.reader(&packet(1, number * 900))).collect();
    assert_eq!(long, [1; 49], "never silent for a millisecond");
    assert_eq!(distributor.reader(&packet(2, 44_200)), 2, "another flow");
    distributor.tell_loads(&[0, 250, 200, 100]);
    assert_eq!(distributor.reader(&packet(1, 45_100)), 0, "the next of the same flow");
    assert_eq!(distributor.reader(&packet(2, 45_190)), 2);
    // Many small ones: as even as the hash is not.
    let mut distributor = self::distributor(Scheme::Transaction(1_000));
    let mut counts = [0u32; 4];
    for flow in 0..4_000u32 {
        counts[usize::from(distributor.reader(&packet(flow % 3_000, u64::from(flow))))] += 1;
    }
    assert_eq!(counts, [1_000; 4]);
}

#[test]
fn hybrids_choose_within_the_group() {
    let of = |port, hash| Facts { port, ..facts(hash) };
    let packets = [of(0, 0), of(0, u32::MAX), of(1, 0), of(1, u32::MAX), of(2, 0)];
    assert_eq!(readers(Scheme::InterfaceFlow(2), packets), [0, 1, 2, 3, 0]);
    // More groups than cores: one core each.
    assert_eq!(readers(Scheme::InterfaceFlow(200), packets), [0, 0, 1, 1, 2]);
}

proptest! {
    #[test]
    fn only_by_flow_the_reader_is_always_the_owner_and_no_scheme_leaves_the_cores(
        packets in proptest::collection::vec((any::<u32>(), any::<u16>(), any::<u16>(), 0u32..70_000, 0u64..1 << 40), 1..80),
        cores in proptest::collection::btree_set(any::<u8>(), 0..9),
    ) {
        let cores: Vec<u8> = cores.into_iter().collect();
        let units: Vec<Unit> = cores.iter().map(|&core| Unit { id: core.into(), weight: 1 }).collect();
        let table = BucketTable::new(128, &units).unwrap_or_else(|_| table(1));
        for scheme in ALL {
            let mut distributor = Distributor::new(scheme, &cores, table.clone());
            for &(hash, port, service, bytes, now_ns) in &packets {
                let core = distributor.reader(&Facts { hash, port, service, bytes, now_ns });
                prop_assert!(cores.contains(&core) || cores.is_empty() && core == 0);
                if scheme == Scheme::Flow {
                    prop_assert_eq!(u16::from(core), table.owner_of_hash(hash));
                }
            }
        }
    }
}
