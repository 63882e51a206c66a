//! Seeds about records of flows.

use std::net::SocketAddr;

use packet::FlowKey;
use services::flow::flags::{DEST_NAT, MAPPED, PROXY_PROTOCOL, REPLIED, SOURCE_NAT};
use services::handover::{
    Backend, Counts, Entry, FlowEntry, MappingEntry, Place, Provider, Side, Source, TcpState,
};
use services::proxy_protocol::Shift;
use services::spec::NatMode;

use super::save;

/// Flows of the gateway that the target has, by their names.
pub fn flow_records() {
    let mut all = Vec::new();
    let flows = flows_of_records().into_iter().map(|(name, flow)| (name, Entry::Flow(Box::new(flow))));
    let mapping = Entry::Mapping(MappingEntry {
        core: 0,
        protocol: 17,
        tenant: String::new(),
        inside: "10.0.0.6:4000".parse().unwrap(),
        out_tenant: String::new(),
        outside: "203.0.113.2:50008".parse().unwrap(),
        source: Source {
            mode: NatMode::AddressAndPort,
            by: Provider::Interface("wan".to_owned()),
            blocks: 0,
        },
        is_home: true,
    });
    for (name, entry) in [("mapping", mapping)].into_iter().chain(flows) {
        let mut bytes = Vec::new();
        entry.encode(&mut bytes).unwrap();
        save("flow_record", name, &bytes);
        all.extend(bytes);
    }
    // A finding: it says that a mapping has its port, which a table has.
    let Some((_, mut flow)) = flows_of_records().into_iter().next() else { return };
    flow.flags |= MAPPED;
    let mut bytes = Vec::new();
    Entry::Flow(Box::new(flow)).encode(&mut bytes).unwrap();
    save("flow_record", "mapped-without-a-mapping", &bytes);
    save("flow_record", "one-after-the-other", &[all.clone(), all].concat());
}

fn flows_of_records() -> [(&'static str, FlowEntry); 5] {
    let key = |protocol: u8, src: &str, dst: &str| {
        let (src, dst): (SocketAddr, SocketAddr) = (src.parse().unwrap(), dst.parse().unwrap());
        FlowKey { src: src.ip(), dst: dst.ip(), src_port: src.port(), dst_port: dst.port(), protocol }
    };
    let side = |key: FlowKey| Side { key, tenant: String::new() };
    let flow = |place: &str, original: FlowKey, reply: FlowKey, flags: u16, by: Option<Provider>| FlowEntry {
        core: 0,
        original: side(original),
        reply: side(reply),
        flags,
        ingress: Place::Interface(place.to_owned()),
        idle_ms: 10,
        tcp: (original.protocol == 6).then(|| TcpState { state: 4, ..TcpState::default() }),
        counts: Some(Counts::default()),
        shift: None,
        source: by.map(|by| Source { mode: NatMode::AddressAndPort, by, blocks: 0 }),
        backend: None,
    };
    let wan = || Some(Provider::Interface("wan".to_owned()));
    let (client, remote) = ("10.0.0.5:4000", "198.51.100.7:443");
    let translated =
        flow("lan", key(6, client, remote), key(6, remote, "203.0.113.1:50000"), REPLIED | SOURCE_NAT, wan());
    let mapped = flow(
        "lan",
        key(17, "10.0.0.6:4000", remote),
        key(17, remote, "203.0.113.2:50008"),
        REPLIED | SOURCE_NAT | MAPPED,
        wan(),
    );
    let forwarded = flow(
        "wan",
        key(6, "198.51.100.7:9", "203.0.113.1:80"),
        key(6, "10.0.0.5:8080", "198.51.100.7:9"),
        REPLIED | DEST_NAT,
        None,
    );
    let plain = flow(
        "lan",
        key(17, "[fd00::5]:4000", "[2001:db8::7]:53"),
        key(17, "[2001:db8::7]:53", "[fd00::5]:4000"),
        0,
        None,
    );
    let mut balanced = flow(
        "wan",
        key(6, "198.51.100.7:9", "203.0.113.10:80"),
        key(6, "10.0.0.11:80", "10.0.0.1:50001"),
        REPLIED | SOURCE_NAT | DEST_NAT | PROXY_PROTOCOL,
        Some(Provider::Server("web".to_owned())),
    );
    balanced.shift = Shift::from_parts(1, 28, true);
    balanced.backend = Some(Backend { server: "web".to_owned(), address: "10.0.0.11:80".parse().unwrap() });
    [
        ("translated", translated),
        ("mapped", mapped),
        ("forwarded", forwarded),
        ("plain", plain),
        ("balanced", balanced),
    ]
}
