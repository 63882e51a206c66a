//! Records of flows that another process or machine hands over, and what a gateway makes of them.

use std::sync::Arc;

use packet::attachment::{Egress, InterfaceId};
use services::Services;
use services::handover::{Entry, owner};
use services::pipeline::Neighbors;
use services::policy::Policy;
use services::random::Random;
use services::spec::{
    Affinity, BackendSpec, BalanceMethod, DeliveryMode, ForwardSpec, GatewaySpec, InterfaceSpec, LinkSpec,
    Mapping, NatMode, NatSpec, PortChoice, ResetOnDown, RouteSpec, RuleAction, ServerSpec, TCP,
};
use steering::ownership::Ownership;

const NOW_NS: u64 = 1_000_000_000_000;

/// Records one behind the other: what is accepted says the same when it is written again, and a gateway that takes it over or
/// refuses it stays whole.
pub fn flow_record(data: &[u8]) {
    let Some((policy, ownership)) = gateway() else { return };
    let (policy, ownership) = (Arc::new(policy), Arc::new(ownership));
    let neighbors = Arc::new(Neighbors::default());
    let mut services = Services::new(0, Random::of_number(7), &policy, &ownership, neighbors);
    let mut left = data;
    while let Ok(length) = Entry::length(left) {
        let Some((record, rest)) = left.split_at_checked(length) else { break };
        left = rest;
        let Ok(entry) = Entry::decode(record) else { continue };
        let mut bytes = Vec::new();
        assert!(entry.encode(&mut bytes).is_ok() && bytes == record, "it says something else");
        let _ = owner(&policy, &ownership, &entry);
        let before = (services.flows().len(), services.ports_held(), services.embryonic());
        if services.import(NOW_NS, 0, &entry).is_err() {
            let after = (services.flows().len(), services.ports_held(), services.embryonic());
            assert_eq!(before, after, "what is refused leaves nothing");
        }
    }
    let mut cursor = Some(0);
    while let Some(at) = cursor {
        cursor = services.export(NOW_NS, at, 64, &mut |entry| {
            assert!(entry.encode(&mut Vec::new()).is_ok());
        });
    }
    // All of it ends, and nothing was given back that was not held.
    services.forget_flows(NOW_NS);
    assert_eq!((services.flows().len(), services.ports_held(), services.nat().status().not_held), (0, 0, 0));
    assert_eq!(services.live().iter().map(|live| u64::from(*live)).sum::<u64>(), 0);
}

/// One core with a LAN, a WAN, a NAT of each mapping, a forward and a virtual server.
fn gateway() -> Option<(Policy, Ownership)> {
    let interface = |name: &str, addresses: &[&str], last: u8| InterfaceSpec {
        name: name.to_owned(),
        device: name.to_owned(),
        addresses: addresses.iter().filter_map(|address| address.parse().ok()).collect(),
        tenant: 0,
        mtu: 1500,
        ipv6_mtu: u16::MAX,
        link: LinkSpec::ethernet([2, 0, 0, 0, 0, last]),
        outside: false,
        through_action: None,
        loose_tcp: false,
    };
    let [lan, wan] = [0, 1].map(|id| Egress::Interface(InterfaceId(id)));
    let mut spec = GatewaySpec {
        interfaces: vec![
            interface("lan", &["10.0.0.1/24", "fd00::1/64"], 0),
            interface("wan", &["203.0.113.1/24", "2001:db8::1/64"], 1),
        ],
        tenants: vec![String::new()],
        default_action: RuleAction::Allow,
        ..GatewaySpec::default()
    };
    for (prefix, to) in [("10.0.0.0/24", lan), ("fd00::/64", lan), ("0.0.0.0/0", wan), ("::/0", wan)] {
        spec.routes.push(RouteSpec::new(0, prefix.parse().ok()?, to, None));
    }
    spec.nats.push(nat("203.0.113.1", Mapping::EndpointDependent));
    spec.nats.push(nat("203.0.113.2", Mapping::EndpointIndependent));
    spec.forwards.push(ForwardSpec {
        protocol: TCP,
        listen: "203.0.113.1:80".parse().ok()?,
        to: "10.0.0.5:8080".parse().ok()?,
        ports: 1,
        tenant: 0,
        proxy_protocol: false,
    });
    spec.servers.push(ServerSpec {
        name: "web".to_owned(),
        protocol: TCP,
        listen: "203.0.113.10:80".parse().ok()?,
        backends: vec![BackendSpec {
            address: "10.0.0.11:80".parse().ok()?,
            weight: 1,
            connections_max: 0,
            drain_s: 0,
        }],
        method: BalanceMethod::Maglev,
        delivery: DeliveryMode::Nat,
        source: NatMode::AddressAndPort,
        source_addresses: Vec::new(),
        connections_max: 0,
        slow_start_s: 0,
        proxy_protocol: true,
        reset_on_down: ResetOnDown::default(),
        affinity: Affinity::default(),
    });
    let (policy, _) = Policy::compile(spec, None, 0).ok()?;
    let keys = (1..=64u8).map(|seed| {
        let mut state = u64::from(seed);
        std::array::from_fn(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
    });
    Some((policy, Ownership::new(1, keys).ok()?))
}

fn nat(address: &str, mapping: Mapping) -> NatSpec {
    NatSpec {
        out: Some(InterfaceId(1)),
        mode: NatMode::AddressAndPort,
        addresses: address.parse().into_iter().collect(),
        from: Vec::new(),
        from_peers: Vec::new(),
        tenants: Vec::new(),
        of_interface: false,
        mapping,
        ports: (1024, 65_535),
        port_choice: PortChoice::Random,
        reserved: Vec::new(),
        tables: 256,
        flows_per_client_max: 0,
        ports_per_client: 0,
        assemble_fragments: false,
    }
}
