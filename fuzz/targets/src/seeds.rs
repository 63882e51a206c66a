//! Keys and messages that targets and corpora agree on. Nothing here is secret.

use steering::cores::CoreSet;
use steering::table::{BucketTable, Unit};
use tunnel::handshake::Identity;
use tunnel::hello::{Capabilities, Hello, ProcessorInfo};
use tunnel::mode::ModeSet;

/// A private key as a key file has it.
pub const PRIVATE_KEY: &str = "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=\n";
/// The dialer's index in every handshake.
pub const DIALER_INDEX: u32 = 0x1122_3344;
/// The listener's index in every handshake.
pub const LISTENER_INDEX: u32 = 0x5566_7788;

/// The side that speaks first.
#[must_use]
pub fn dialer() -> Identity {
    Identity::from_private([0x11; 32])
}

/// The side that answers.
#[must_use]
pub fn listener() -> Identity {
    Identity::from_private([0x22; 32])
}

/// A table of 128 buckets over `cores` cores.
#[must_use]
pub fn table(cores: u16) -> BucketTable {
    let units: Vec<Unit> = (0..cores).map(|id| Unit { id, weight: 1 }).collect();
    BucketTable::new(128, &units).expect("128 buckets and a few cores make a table")
}

/// Four cores, one of them reserved.
#[must_use]
pub fn processor() -> ProcessorInfo {
    let mut last = CoreSet::default();
    last.insert(3);
    ProcessorInfo {
        cores: 4,
        usable: CoreSet::first(4),
        load: vec![0, 64, 128, 255],
        reserved: vec![(2, last)],
        preferred: vec![(1, CoreSet::first(2))],
        policy: Default::default(),
        flow: Default::default(),
        tenant: 0,
        flow_hash_key: [0x5a; 40],
        table: table(4),
        tunnel_core: Some(2),
    }
}

/// Payload of one side; with a timestamp in an Initiation.
#[must_use]
pub fn hello(timestamp_ns: Option<u64>) -> Hello {
    Hello {
        version: 1,
        capabilities: Capabilities::RETRANSMIT.with(Capabilities::PARTIAL_CHECKSUM),
        aeads: 3,
        timestamp_ns,
        freshness: None,
        boot_id: 0xb007,
        encryption: Default::default(),
        steering: Default::default(),
        accepted: ModeSet::built(),
        processor: processor(),
    }
}
