#![allow(clippy::unwrap_used, reason = "tests")]

use proptest::prelude::*;

use super::wire::{Change, HEAD_BYTES, WireError};
use super::*;
use crate::flow::flags;

fn key(protocol: u8, src: &str, dst: &str) -> FlowKey {
    let (src, dst): (SocketAddr, SocketAddr) = (src.parse().unwrap(), dst.parse().unwrap());
    FlowKey { src: src.ip(), dst: dst.ip(), src_port: src.port(), dst_port: dst.port(), protocol }
}

fn side(key: FlowKey, tenant: &str) -> Side {
    Side { key, tenant: tenant.to_owned() }
}

/// The examples of `docs/wire-flow-records.md`, by name.
fn examples() -> Vec<(&'static str, Entry)> {
    let translated = FlowEntry {
        core: 1,
        original: side(key(6, "10.0.0.5:4000", "198.51.100.7:443"), ""),
        reply: side(key(6, "198.51.100.7:443", "203.0.113.1:50000"), ""),
        flags: flags::REPLIED | flags::SOURCE_NAT,
        ingress: Place::Interface("lan".to_owned()),
        idle_ms: 1_500,
        tcp: Some(TcpState { state: 4, scale: 0x77, end: [1_000, 2_000], window: [500, 501] }),
        counts: Some(Counts { age_ms: 60_000, packets: [10, 9], bytes: [5_000, 70_000] }),
        shift: None,
        source: Some(Source {
            mode: NatMode::AddressAndPort,
            by: Provider::Interface("wan".to_owned()),
            blocks: 0,
        }),
        backend: None,
    };
    let balanced = FlowEntry {
        core: 0,
        original: side(key(6, "[2001:db8::7]:4000", "[2001:db8::10]:80"), "red"),
        reply: side(key(6, "[fd00::11]:8080", "[fd00::1]:50001"), "red"),
        flags: flags::REPLIED | flags::SOURCE_NAT | flags::DEST_NAT | flags::PROXY_PROTOCOL,
        ingress: Place::Peer("branch".to_owned()),
        idle_ms: 0,
        tcp: Some(TcpState { state: 4, scale: 0x77, end: [7, 8], window: [9, 10] }),
        counts: Some(Counts::default()),
        shift: Shift::from_parts(100, 52, true),
        source: Some(Source {
            mode: NatMode::AddressAndPort,
            by: Provider::Server("web".to_owned()),
            blocks: 0,
        }),
        backend: Some(Backend { server: "web".to_owned(), address: "[fd00::11]:8080".parse().unwrap() }),
    };
    let plain = FlowEntry {
        core: NO_CORE,
        original: side(key(17, "10.0.0.5:4000", "10.1.0.9:53"), ""),
        reply: side(key(17, "10.1.0.9:53", "10.0.0.5:4000"), ""),
        flags: 0,
        ingress: Place::Host,
        idle_ms: 10,
        tcp: None,
        counts: None,
        shift: None,
        source: None,
        backend: None,
    };
    let mapping = MappingEntry {
        core: 1,
        protocol: 17,
        tenant: "red".to_owned(),
        inside: "10.0.0.5:4000".parse().unwrap(),
        out_tenant: String::new(),
        outside: "203.0.113.1:50008".parse().unwrap(),
        source: Source {
            mode: NatMode::AddressAndPort,
            by: Provider::Interface("wan".to_owned()),
            blocks: 1 << 48,
        },
        is_home: true,
    };
    vec![
        ("translated", Entry::Flow(Box::new(translated))),
        ("balanced", Entry::Flow(Box::new(balanced))),
        ("plain", Entry::Flow(Box::new(plain))),
        ("mapping", Entry::Mapping(mapping)),
    ]
}

fn encoded(entry: &Entry) -> Vec<u8> {
    let mut bytes = Vec::new();
    entry.encode(&mut bytes).unwrap();
    bytes
}

#[test]
fn the_page_shows_what_the_code_writes() {
    let page = include_str!("../../../../docs/wire-flow-records.md");
    for (name, entry) in examples() {
        let bytes = encoded(&entry);
        assert_eq!(Entry::decode(&bytes).unwrap(), entry);
        let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let line = format!("    {name}: {}\n", hex.join(" "));
        assert!(page.contains(&line), "the page lacks this:\n{line}");
    }
}

#[test]
fn the_end_of_a_flow_is_a_record_between_machines_only() {
    let ended = side(key(6, "10.0.0.5:4000", "198.51.100.7:443"), "");
    let mut bytes = Vec::new();
    Change::encode_end(&ended, &mut bytes).unwrap();
    let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let page = include_str!("../../../../docs/wire-flow-records.md");
    assert!(page.contains(&format!("    ended: {}\n", hex.join(" "))), "{}", hex.join(" "));
    assert_eq!(Change::decode(&bytes), Ok(Change::Ended(ended)));
    assert_eq!(Entry::decode(&bytes), Err(WireError::Value("kind", 3)), "a file has none");
    for at in 0..bytes.len() {
        assert!(Change::decode(&bytes[..at]).is_err(), "cut at {at}");
    }
    for (_, entry) in examples() {
        assert_eq!(Change::decode(&encoded(&entry)), Ok(Change::Now(entry)));
    }
}

#[test]
fn what_is_cut_or_longer_is_refused() {
    for (name, entry) in examples() {
        let bytes = encoded(&entry);
        for at in 0..bytes.len() {
            assert!(Entry::decode(&bytes[..at]).is_err(), "{name} cut at {at}");
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert_eq!(Entry::decode(&longer), Err(WireError::Trailing(1)));
        // The head says that it belongs to it: nothing reads it.
        let length = (longer.len() as u16).to_be_bytes();
        longer[2..HEAD_BYTES].copy_from_slice(&length);
        assert_eq!(Entry::decode(&longer), Err(WireError::Trailing(1)));
        let mut newer = bytes.clone();
        newer[0] = 2;
        assert_eq!(Entry::decode(&newer), Err(WireError::Version(2)));
    }
}

#[test]
fn values_that_cannot_be_are_refused() {
    let (_, Entry::Flow(flow)) = examples().swap_remove(0) else { panic!() };
    let refused = |change: &dyn Fn(&mut FlowEntry)| {
        let mut flow = flow.clone();
        change(&mut flow);
        Entry::decode(&encoded(&Entry::Flow(flow))).unwrap_err()
    };
    assert!(matches!(refused(&|flow| flow.flags |= 1 << 9), WireError::Value("flags", _)));
    assert!(matches!(refused(&|flow| flow.source = None), WireError::Value("flags", _)));
    assert!(matches!(refused(&|flow| flow.flags |= flags::PROXY_PROTOCOL), WireError::Value("flags", _)));
    assert_eq!(refused(&|flow| flow.tcp.as_mut().unwrap().state = 10), WireError::Value("state", 10));
    let mut long = flow.clone();
    long.original.tenant = "x".repeat(256);
    let mut bytes = vec![1, 2, 3];
    assert_eq!(Entry::Flow(long).encode(&mut bytes), Err(WireError::Name("tenant")));
    assert_eq!(bytes, [1, 2, 3], "nothing is left of it");
}

fn address(v4: bool) -> impl Strategy<Value = IpAddr> {
    any::<[u8; 16]>().prop_map(move |bytes| {
        if v4 { <[u8; 4]>::try_from(&bytes[..4]).unwrap().into() } else { bytes.into() }
    })
}

fn endpoint(v4: bool) -> impl Strategy<Value = SocketAddr> {
    (address(v4), any::<u16>()).prop_map(SocketAddr::from)
}

fn source() -> impl Strategy<Value = Source> {
    let mode = prop_oneof![Just(NatMode::AddressAndPort), Just(NatMode::PortOnly), Just(NatMode::None)];
    let by = prop_oneof![".{0,8}".prop_map(Provider::Interface), ".{0,8}".prop_map(Provider::Server)];
    (mode, by, any::<u64>()).prop_map(|(mode, by, blocks)| Source { mode, by, blocks })
}

prop_compose! {
    fn flow()(v4 in any::<bool>(), protocol in prop_oneof![Just(6u8), any::<u8>()])(
        ends in [endpoint(v4), endpoint(v4), endpoint(v4), endpoint(v4)],
        protocol in Just(protocol),
        tenants in [".{0,20}", ".{0,20}"],
        numbers in (any::<u8>(), 0u16..8, any::<u32>()),
        place in prop_oneof![
            Just(Place::Host), ".{0,40}".prop_map(Place::Interface), ".{0,40}".prop_map(Place::Peer)
        ],
        tcp in (0u8..10, any::<u8>(), any::<[u32; 2]>(), any::<[u16; 2]>()),
        counts in proptest::option::of(any::<(u64, [u64; 2], [u64; 2])>()),
        shift in proptest::option::of((any::<u32>(), any::<bool>(), any::<bool>())),
        source in proptest::option::of(source()),
        backend in proptest::option::of((".{0,20}", endpoint(v4))),
    ) -> FlowEntry {
        let [a, b, c, d] = ends;
        let key = |src: SocketAddr, dst: SocketAddr| FlowKey {
            src: src.ip(), dst: dst.ip(), src_port: src.port(), dst_port: dst.port(), protocol,
        };
        let [original, reply] = tenants;
        let (core, some, idle_ms) = numbers;
        let shift = shift.filter(|_| protocol == 6);
        let mut bits = some & (flags::REPLIED | flags::ASSEMBLE | flags::SOURCE_NAT);
        bits |= if shift.is_some() { flags::PROXY_PROTOCOL } else { 0 };
        bits &= if source.is_some() { u16::MAX } else { !flags::SOURCE_NAT };
        let (state, scale, end, window) = tcp;
        FlowEntry {
            core,
            original: Side { key: key(a, b), tenant: original },
            reply: Side { key: key(c, d), tenant: reply },
            flags: bits,
            ingress: place,
            idle_ms,
            tcp: (protocol == 6).then_some(TcpState { state, scale, end, window }),
            counts: counts.map(|(age_ms, packets, bytes)| Counts { age_ms, packets, bytes }),
            shift: shift.and_then(|(first, v6, done)| Shift::from_parts(first, if v6 { 52 } else { 28 }, done)),
            source,
            backend: backend.map(|(server, address)| Backend { server, address }),
        }
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read(flow in flow()) {
        let entry = Entry::Flow(Box::new(flow));
        let bytes = encoded(&entry);
        prop_assert_eq!(Entry::length(&bytes), Ok(bytes.len()));
        prop_assert_eq!(Entry::decode(&bytes), Ok(entry));
    }

    #[test]
    fn mappings_too(
        v4 in any::<bool>(), ends in [any::<[u8; 16]>(); 2], ports in any::<[u16; 2]>(), source in source(),
        tenants in [".{0,20}", ".{0,20}"], core in any::<u8>(), protocol in any::<u8>(), is_home in any::<bool>(),
    ) {
        let at = |place: usize| {
            let bytes = ends[place];
            let address: IpAddr =
                if v4 { <[u8; 4]>::try_from(&bytes[..4]).unwrap().into() } else { bytes.into() };
            SocketAddr::new(address, ports[place])
        };
        let [tenant, out_tenant] = tenants;
        let mapping =
            MappingEntry { core, protocol, tenant, inside: at(0), out_tenant, outside: at(1), source, is_home };
        let entry = Entry::Mapping(mapping);
        prop_assert_eq!(Entry::decode(&encoded(&entry)), Ok(entry));
    }

    /// Damaged bytes are refused or are another whole entry.
    #[test]
    fn what_is_accepted_says_the_same_again(which in 0usize..4, at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let mut bytes = encoded(&examples()[which].1);
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        if let Ok(entry) = Entry::decode(&bytes) {
            prop_assert_eq!(encoded(&entry), bytes);
        }
    }
}
