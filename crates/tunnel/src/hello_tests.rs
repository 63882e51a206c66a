#![allow(clippy::unwrap_used, reason = "tests")]
use super::*;
use proptest::prelude::*;
use steering::table::Unit;

fn table(buckets: usize, cores: u8) -> BucketTable {
    let units: Vec<_> = (0..u16::from(cores)).map(|id| Unit { id, weight: 1 }).collect();
    BucketTable::new(buckets, &units).unwrap()
}

pub(crate) fn hello(cores: u8) -> Hello {
    Hello {
        version: PROTOCOL_VERSION,
        capabilities: Capabilities::RETRANSMIT.with(Capabilities::PARTIAL_CHECKSUM),
        aeads: crate::aead::Aead::offered(),
        timestamp_ns: None,
        freshness: None,
        boot_id: 0x0b00_0000_0000_0b1d,
        encryption: Encryption::On,
        steering: SteeringMode::CoreId,
        accepted: ModeSet::CORE_ID,
        processor: ProcessorInfo {
            cores,
            usable: CoreSet::first(u16::from(cores)),
            load: Vec::new(),
            reserved: Vec::new(),
            preferred: Vec::new(),
            policy: Policy::Hash,
            flow: FlowDefinition::FiveTuple,
            tenant: 0,
            tunnel_core: None,
            flow_hash_key: [0x6b; 40],
            table: table(128, cores),
        },
    }
}

fn core_set(cores: u8) -> impl Strategy<Value = CoreSet> {
    proptest::collection::btree_set(0..cores, 1..=usize::from(cores).min(20))
        .prop_map(|set| set.into_iter().collect())
}

fn any_hello() -> impl Strategy<Value = Hello> {
    (1..=CORES_MAX).prop_flat_map(|cores| {
        let classes = || proptest::collection::vec((any::<u8>(), core_set(cores)), 0..6);
        let owners = proptest::collection::vec(0..u16::from(cores), 128);
        let load = prop_oneof![Just(Vec::new()), proptest::collection::vec(any::<u8>(), usize::from(cores))];
        let lists = (core_set(cores), load, classes(), classes(), owners);
        let plain = (any::<[u32; 3]>(), any::<[u8; 4]>(), any::<Option<u64>>(), any::<[u8; 32]>());
        (lists, plain).prop_map(
            move |((usable, load, reserved, preferred, owners), (words, bytes, timestamp_ns, key))| {
                let mut flow_hash_key = [bytes[3]; 40];
                flow_hash_key[..32].copy_from_slice(&key);
                Hello {
                    version: words[0] as u16 | 1,
                    capabilities: Capabilities(words[1]),
                    aeads: bytes[0] | 1,
                    timestamp_ns,
                    freshness: timestamp_ns.map(|ns| u128::from(ns).to_be_bytes()),
                    boot_id: u64::from(words[0]) << 32 | u64::from(words[1]),
                    encryption: Encryption::from_number(bytes[1] % 3).unwrap(),
                    steering: SteeringMode::from_number(bytes[2] % 6).unwrap(),
                    accepted: ModeSet(bytes[2]),
                    processor: ProcessorInfo {
                        cores,
                        usable,
                        load,
                        reserved,
                        preferred,
                        policy: Policy::from_u8(bytes[3] % 4).unwrap(),
                        flow: FlowDefinition::from_number(bytes[0] % 4).unwrap(),
                        tenant: words[0] as u16,
                        tunnel_core: (bytes[2] < cores).then_some(bytes[2]),
                        flow_hash_key,
                        table: BucketTable::from_owners(words[2], owners).unwrap(),
                    },
                }
            },
        )
    })
}

proptest! {
    #[test]
    fn round_trip(hello in any_hello()) {
        match hello.encode() {
            Ok(bytes) => {
                prop_assert!(bytes.len() <= HELLO_BYTES_MAX);
                prop_assert_eq!(Hello::decode(&bytes), Ok(hello));
            }
            // Only with many cores *and* many classes.
            Err(error) => {
                prop_assert!(error.needed > error.limit);
                prop_assert!(hello.processor.cores > 100 && hello.processor.reserved.len() + hello.processor.preferred.len() > 4);
            }
        }
    }

    #[test]
    fn unknown_fields_are_skipped(hello in any_hello(), kind in 11u8..=255, value in proptest::collection::vec(any::<u8>(), 0..20), first: bool) {
        let Ok(bytes) = hello.encode() else { return Ok(()) };
        let mut field = Vec::new();
        put(&mut field, kind, &value);
        let longer = if first { [field, bytes].concat() } else { [bytes, field].concat() };
        let expected = if longer.len() <= HELLO_BYTES_MAX { Ok(hello) } else { Err(MALFORMED) };
        prop_assert_eq!(Hello::decode(&longer), expected);
    }

    #[test]
    fn garbage_never_panics(garbage in proptest::collection::vec(any::<u8>(), 0..1100)) {
        prop_assert_eq!(Hello::decode(&garbage), Err(MALFORMED));
        prop_assert_eq!(ProcessorInfo::decode(&garbage), Err(MALFORMED));
    }

    /// Damaged bytes that still decode are sound all the same.
    #[test]
    fn damage_never_panics(hello in any_hello(), at in any::<prop::sample::Index>(), xor: u8) {
        let Ok(mut bytes) = hello.encode() else { return Ok(()) };
        let at = at.index(bytes.len());
        bytes[at] ^= xor;
        if let Ok(read) = Hello::decode(&bytes) {
            let info = &read.processor;
            prop_assert!(info.cores >= 1 && info.cores <= CORES_MAX && !info.usable.is_empty());
            prop_assert!(info.table.owners().iter().all(|owner| *owner < u16::from(info.cores)));
            prop_assert!(info.load.is_empty() || info.load.len() == usize::from(info.cores));
        }
    }
}

#[test]
fn every_truncation_is_refused() {
    let hello = Hello { timestamp_ns: Some(1), ..hello(6) };
    let bytes = hello.encode().unwrap();
    for length in 0..bytes.len() {
        assert_eq!(Hello::decode(&bytes[..length]), Err(MALFORMED), "{length} of {} bytes", bytes.len());
    }
}

#[test]
fn layout_is_as_documented() {
    let bytes = Hello { timestamp_ns: Some(0x0102), ..hello(2) }.encode().unwrap();
    let fields: [&[u8]; 12] = [
        &[1, 0, 2, 0, 1],       // version
        &[2, 0, 4, 0, 0, 0, 6], // capabilities
        &[3, 0, 1, crate::aead::Aead::offered()],
        &[4, 0, 8, 0, 0, 0, 0, 0, 0, 1, 2], // timestamp
        &[5, 0, 1, 2],                      // encryption
        &[6, 0, 1, 0],                      // steering
        &[10, 0, 1, 1],                     // accepted modes
        &[7, 0, 73],                        // processor info
        &[1, 0, 1, 2],                      // cores
        &[2, 0, 1, 0b11],                   // usable
        &[6, 0, 1, 0],                      // policy
        &[7, 0, 40],                        // flow hash key
    ];
    let expected = fields.concat();
    assert_eq!(bytes[..expected.len()], expected);
    let behind_key = &bytes[expected.len() + 40..];
    // Bucket table: format 1, run-length coded, era 0, 2^7 buckets, 64 of core 0, 64 of core 1. Flow definition.
    assert_eq!(
        behind_key,
        [
            8, 0, 11, 1, 2, 0, 0, 0, 0, 7, 63, 0, 63, 1, 9, 0, 1, 0, /* boot id */ 8, 0, 8, 11, 0, 0, 0,
            0, 0, 11, 29
        ]
    );
}

#[test]
fn the_largest_usual_hello_fits() {
    // 128 cores, all loads, the table in its longest form, two classes.
    let mut hello = Hello { timestamp_ns: Some(u64::MAX), ..hello(128) };
    hello.processor.load = vec![200; 128];
    let owners = (0..128u16).map(|bucket| bucket * 37 % 128).collect();
    hello.processor.table = BucketTable::from_owners(u32::MAX, owners).unwrap();
    hello.processor.reserved = vec![(1, CoreSet::first(4)), (2, CoreSet::first(8))];
    let bytes = hello.encode().unwrap();
    assert!(bytes.len() < 500, "{} bytes", bytes.len());
    assert_eq!(Hello::decode(&bytes), Ok(hello));
}

#[test]
fn too_much_is_an_error_of_the_sender() {
    let mut hello = hello(128);
    let owners = (0..1024u16).map(|bucket| bucket * 37 % 128).collect();
    hello.processor.table = BucketTable::from_owners(1, owners).unwrap();
    let error = hello.encode().unwrap_err();
    assert!(error.needed > error.limit && error.limit == PROCESSOR_INFO_BYTES_MAX);
    let mut classes = self::hello(128);
    classes.processor.load = vec![0; 128];
    let owners = (0..512u16).map(|bucket| bucket * 37 % 128).collect();
    classes.processor.table = BucketTable::from_owners(1, owners).unwrap();
    assert!(classes.encode().is_ok());
    classes.processor.reserved = vec![(0, CoreSet::first(128)); 16];
    classes.processor.preferred = vec![(0, CoreSet::first(128)); 16];
    assert!(classes.encode().is_err());
}

/// One field replaced (or left out), everything else in order.
fn with_processor_field(kind: u8, value: Option<&[u8]>) -> Result<ProcessorInfo, DropReason> {
    let bytes = hello(4).processor.encode().unwrap();
    let fields = Fields::read(&bytes, PROCESSOR_INFO_BYTES_MAX).unwrap();
    let mut out = Vec::new();
    for other in (1..=9).filter(|other| *other != kind) {
        if let Some(value) = fields.get(usize::from(other)) {
            put(&mut out, other, value);
        }
    }
    if let Some(value) = value {
        put(&mut out, kind, value);
    }
    ProcessorInfo::decode(&out)
}

#[test]
fn impossible_processor_infos_are_refused() {
    let big = table(2048, 4).encode();
    let foreign_owner = table(128, 5).encode();
    let bad: [(u8, Option<&[u8]>); 22] = [
        (1, None),
        (1, Some(&[0])),
        (1, Some(&[255])),
        (1, Some(&[4, 0])),
        (2, Some(&[0])),
        (2, Some(&[0x10])),
        (2, Some(&[1, 0])),
        (2, Some(&[])),
        (3, Some(&[1, 2, 3])),
        (4, Some(&[1])),
        (4, Some(&[1, 0x10])),
        (4, Some(&[1; 34])),
        (5, Some(&[1, 1, 2])),
        (6, Some(&[0, 0])),
        (7, None),
        (7, Some(&[0; 39])),
        (8, None),
        (8, Some(&big)),
        (8, Some(&foreign_owner)),
        (9, Some(&[4])),
        (11, Some(&[4])),
        (11, Some(&[1, 1])),
    ];
    for (kind, value) in bad {
        assert_eq!(with_processor_field(kind, value), Err(MALFORMED), "field {kind} = {value:?}");
    }
}

#[test]
fn optional_processor_fields_have_defaults() {
    for kind in [2, 3, 4, 5, 6, 9] {
        assert_eq!(with_processor_field(kind, None), Ok(hello(4).processor), "without field {kind}");
    }
    assert_eq!(with_processor_field(11, Some(&[3])).map(|info| info.tunnel_core), Ok(Some(3)));
    assert_eq!(with_processor_field(200, Some(&[1, 2, 3])), Ok(hello(4).processor), "an unknown field");
    // A policy of a newer version.
    assert_eq!(with_processor_field(6, Some(&[77])).map(|info| info.policy), Ok(Policy::Hash));
}

#[test]
fn duties_and_defaults_of_the_hello() {
    let full = Hello { timestamp_ns: Some(9), ..hello(4) };
    let bytes = full.encode().unwrap();
    let fields = Fields::read(&bytes, HELLO_BYTES_MAX).unwrap();
    let without = |kind: u8| {
        let mut out = Vec::new();
        for other in (1..=8).filter(|other| *other != kind) {
            put(&mut out, other, fields.get(usize::from(other)).unwrap());
        }
        Hello::decode(&out)
    };
    for duty in [1, 3, 7, 8] {
        assert_eq!(without(duty), Err(MALFORMED), "field {duty}");
    }
    assert_eq!(without(2), Ok(Hello { capabilities: Capabilities(0), ..full.clone() }));
    assert_eq!(without(4), Ok(Hello { timestamp_ns: None, ..full.clone() }));
    assert_eq!(without(5), Ok(full.clone()));
    let fresh = Hello { freshness: Some([7; 16]), ..full.clone() };
    let bytes = fresh.encode().unwrap();
    assert_eq!(Hello::decode(&bytes), Ok(fresh));
    // Field 9 stands at the end: a shorter one is refused.
    let at = bytes.len() - 18;
    assert_eq!(Hello::decode(&[&bytes[..at], &[0, 15], &[7; 15]].concat()), Err(MALFORMED));
    assert_eq!(without(6), Ok(full));
}

#[test]
fn repeated_fields_are_refused() {
    let bytes = hello(4).encode().unwrap();
    let mut twice = bytes;
    put(&mut twice, 5, &[0]);
    assert_eq!(Hello::decode(&twice), Err(MALFORMED));
}

#[test]
fn remote_cores_are_ready_for_the_choice() {
    let mut info = hello(4).processor;
    info.usable.remove(2);
    info.load = vec![1, 2, 3, 4];
    info.preferred = vec![(7, CoreSet::first(1))];
    let cores = info.remote_cores();
    assert_eq!(cores.usable.iter().collect::<Vec<_>>(), [0, 1, 3]);
    assert_eq!((cores.load, cores.preferred), (info.load.clone(), info.preferred.clone()));
    assert!(!format!("{info:?}").contains("107"), "the flow hash key is not printed");
}
