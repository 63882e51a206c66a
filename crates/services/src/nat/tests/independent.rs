//! Endpoint-independent mappings, RFC 4787.

use super::*;

fn independent(addresses: &[&str]) -> NatSpec {
    NatSpec { mapping: Mapping::EndpointIndependent, ..nat(addresses) }
}

#[test]
fn one_endpoint_for_all_remotes_open_to_all() {
    let mut gateway = Gateway::of(&[independent(&["192.0.2.1", "192.0.2.2"])]);
    let flow = |dst: &str| key(17, "10.0.0.1:4001", dst);
    let first = gateway.bind_as(flow("198.51.100.1:53"), 7).unwrap();
    let second = gateway.bind_as(flow("203.0.113.9:99"), 7).unwrap();
    assert!(first.mapped);
    assert_eq!((first.source, first.port), (second.source, second.port));
    assert_eq!(first.port & 1, 1, "odd stays odd");
    let other = gateway.bind_as(key(17, "10.0.0.1:4002", "198.51.100.1:53"), 7).unwrap();
    assert_ne!(other.port, first.port);
    assert_eq!(other.source, first.source, "one client, one address");
    let tenant = gateway.bind_as(flow("198.51.100.1:54"), 8).unwrap();
    assert_ne!((tenant.source, tenant.port), (first.source, first.port));

    let outside = SocketAddr::new(first.source, first.port).to_string();
    let inside = Inside { tenant: 7, address: ip("10.0.0.1"), port: 4001 };
    assert_eq!(gateway.nat.inbound(&key(17, "1.2.3.4:5", &outside), 5), Some(inside));
    assert_eq!(gateway.nat.inbound(&key(6, "1.2.3.4:5", &outside), 5), None);
    assert_eq!(gateway.nat.inbound(&key(17, "1.2.3.4:5", &outside), 0), None, "another tenant's interface");
    // A hairpin asks the same, of an inside client.
    assert_eq!(gateway.nat.inbound(&key(17, "10.0.0.2:9", &outside), 5), Some(inside));
    assert!(
        gateway
            .policy
            .rule_for_hairpin(first.source, &client(&key(17, "10.0.0.2:9", "10.0.0.1:4001"), 7))
            .is_some()
    );
    // The log has one line for the mapping, whoever the remote is.
    assert_eq!(gateway.log.len(), 3);
    assert_eq!(
        gateway.who(&first, 17, Some("9.9.9.9:9".parse().unwrap())),
        [(7, "10.0.0.1:4001".parse().unwrap())]
    );
}

#[test]
fn a_mapping_stays_while_it_has_flows_and_a_while_longer() {
    let mut gateway = Gateway::of(&[independent(&["192.0.2.1"])]);
    let (a, b) = (key(17, "10.0.0.1:4001", "198.51.100.1:53"), key(17, "10.0.0.1:4001", "198.51.100.2:53"));
    let (first, second) = (gateway.bind(a).unwrap(), gateway.bind(b).unwrap());
    let inbound = key(17, "1.2.3.4:5", &SocketAddr::new(first.source, first.port).to_string());
    gateway.nat.join(0, &inbound, 5, 0).unwrap();
    gateway.release(&a, &first);
    gateway.release(&b, &second);
    gateway.tick(10 * MAPPING_IDLE_NS);
    assert!(gateway.nat.inbound(&inbound, 5).is_some(), "the flow from outside keeps it");
    let record = Record { flags: flags::MAPPED | flags::DEST_NAT, ..Record::default() };
    gateway.nat.release(gateway.now_ns, &key(17, "10.0.0.1:4001", "1.2.3.4:5"), 0, &record, &inbound, 5);
    gateway.tick(11 * MAPPING_IDLE_NS - 1);
    assert!(gateway.nat.inbound(&inbound, 5).is_some());
    gateway.tick(11 * MAPPING_IDLE_NS);
    assert_eq!(gateway.nat.inbound(&inbound, 5), None);
    assert_eq!(gateway.nat.join(gateway.now_ns, &inbound, 5, 0), Err(DropReason::NatNoMapping));
    assert_eq!(
        gateway.log.iter().map(|event| event.kind).collect::<Vec<_>>(),
        [NatEventKind::Opened, NatEventKind::Closed]
    );
    gateway.tick(12 * MAPPING_IDLE_NS);
    let status = gateway.nat.status();
    assert_eq!((status.mappings, status.clients), (0, 0));
}

/// They have a limit of their own, half of the client's, and cost it none of its own flows.
#[test]
fn flows_from_outside_have_their_own_limit() {
    let mut gateway = Gateway::of(&[NatSpec { flows_per_client_max: 2, ..independent(&["192.0.2.1"]) }]);
    let binding = gateway.bind(key(17, "10.0.0.1:4001", "198.51.100.1:53")).unwrap();
    let outside = SocketAddr::new(binding.source, binding.port).to_string();
    let (first, second) = (key(17, "1.2.3.4:5", &outside), key(17, "1.2.3.4:6", &outside));
    assert!(gateway.nat.join(0, &first, 5, 0).is_ok());
    assert_eq!(gateway.nat.join(0, &second, 5, 0), Err(DropReason::FlowsPerClient));
    assert!(gateway.bind(key(17, "10.0.0.1:4001", "198.51.100.2:53")).is_ok());
    let third = gateway.bind(key(17, "10.0.0.1:4001", "198.51.100.3:53"));
    assert_eq!(third, Err(DropReason::FlowsPerClient));
    let record = Record { flags: flags::MAPPED | flags::DEST_NAT, ..Record::default() };
    gateway.nat.release(0, &key(17, "10.0.0.1:4001", "1.2.3.4:5"), 0, &record, &first, 5);
    assert!(gateway.nat.join(0, &second, 5, 0).is_ok());
}

/// Ports belong to cores: all cores agree, and together they use every port.
#[test]
fn cores_have_disjoint_ports() {
    let policy = Arc::new(NatPolicy::compile(
        &[NatSpec { ports: (5000, 5999), ..independent(&["192.0.2.1"]) }],
        &[],
        &[],
        &[],
    ));
    let mut all = BTreeSet::new();
    for core in 0..3 {
        let mut gateway = Gateway::new(core, 3, &policy);
        for port in 1.. {
            match gateway.bind(FlowKey { src_port: port, ..key(6, "10.0.0.1:1", "198.51.100.1:53") }) {
                Ok(binding) => {
                    assert_eq!(mapping_core(binding.source, binding.port, 3), core);
                    assert!(all.insert(binding.port));
                }
                Err(reason) => {
                    assert_eq!(reason, DropReason::NatPortsExhausted);
                    break;
                }
            }
        }
    }
    assert_eq!(all, (5000..=5999).collect());
}

#[test]
fn query_ids_are_mapped_too() {
    let mut gateway = Gateway::of(&[independent(&["192.0.2.1"])]);
    let echo = |dst: &str, low: bool| FlowKey {
        src_port: if low { 77 } else { 0 },
        dst_port: if low { 0 } else { 77 },
        ..key(1, "10.0.0.1:0", dst)
    };
    let first = gateway.bind(echo("198.51.100.1:0", true)).unwrap();
    let second = gateway.bind(echo("1.1.1.1:0", false)).unwrap();
    assert_eq!((first.source, first.port), (second.source, second.port));
    let reply = reply_of(&echo("1.1.1.1:0", false), &second);
    assert_eq!(gateway.nat.inbound(&reply, 5).unwrap().port, 77);
}

#[test]
fn a_reload_keeps_mappings_while_their_address_is_there() {
    let mut gateway = Gateway::of(&[independent(&["192.0.2.1"])]);
    let flow = |dst: &str| key(17, "10.0.0.1:4001", dst);
    let first = gateway.bind(flow("198.51.100.1:53")).unwrap();
    gateway.reload(&[independent(&["192.0.2.1", "192.0.2.2"])]);
    let second = gateway.bind(flow("198.51.100.2:53")).unwrap();
    assert_eq!((first.source, first.port), (second.source, second.port));
    gateway.reload(&[independent(&["192.0.2.2"])]);
    let third = gateway.bind(flow("198.51.100.3:53")).unwrap();
    assert_eq!(third.source, ip("192.0.2.2"));
    gateway.release(&flow("198.51.100.1:53"), &first);
    gateway.release(&flow("198.51.100.2:53"), &second);
    gateway.tick(MAPPING_IDLE_NS);
    assert_eq!(gateway.nat.status().mappings, 1);
    assert!(gateway.bind(flow("198.51.100.4:53")).unwrap().port == third.port);
}
