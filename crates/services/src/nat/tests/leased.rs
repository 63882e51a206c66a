//! Blocks of ports: by lease, and for each client automatically (row R1).

use super::*;

fn lease(from: &str, tenant: u16, first_port: u16) -> LeaseSpec {
    let from: IpNet = from.parse().unwrap();
    LeaseSpec { name: "pod".into(), tenant, from, address: ip("192.0.2.1"), first_port, ports: 1024 }
}

fn flow(client: &str, port: u16) -> FlowKey {
    FlowKey { src_port: port, ..key(6, client, "198.51.100.1:80") }
}

/// A holder has its block and nothing else; the others have everything else.
#[test]
fn a_block_is_for_its_holder() {
    let spec = NatSpec { ports: (1024, 4095), ..nat(&["192.0.2.1"]) };
    let policy = Arc::new(NatPolicy::compile(&[spec], &[], &[lease("10.1.0.0/16", 7, 2048)], &[]));
    policy.begin(0);
    let mut gateway = Gateway::new(0, 1, &policy);
    let all = |gateway: &mut Gateway, client: &str, tenant| {
        let mut ports = BTreeSet::new();
        for port in 1.. {
            match gateway.bind_as(flow(client, port), tenant) {
                Ok(binding) => assert!(ports.insert(binding.port)),
                Err(reason) => {
                    assert_eq!(reason, DropReason::NatPortsExhausted);
                    break;
                }
            };
        }
        ports
    };
    // The others first: what they leave is not by chance.
    let others = all(&mut gateway, "10.1.0.5:1", 0);
    assert_eq!(
        others,
        (1024..2048).chain(3072..4096).collect(),
        "the same address of another tenant holds nothing"
    );
    assert_eq!(gateway.log.len(), others.len());
    assert_eq!(all(&mut gateway, "10.1.0.5:1", 7), (2048..3072).collect());
    assert_eq!(gateway.log.len(), others.len(), "the block's line says it all");
}

/// Leases come and go while flows live; nothing is given twice, and what is held can be given back.
#[test]
fn leases_change_under_live_flows() {
    let mut gateway = Gateway::of(&[NatSpec { ports: (1024, 4095), ..nat(&["192.0.2.1"]) }]);
    let leases = Arc::clone(gateway.policy.leases());
    let mut held: Vec<_> = (0..1500)
        .map(|port| (flow("10.1.0.5:1", port), gateway.bind(flow("10.1.0.5:1", port)).unwrap()))
        .collect();
    let (id, _) = leases.take(0, lease("10.2.0.0/16", 0, 2048)).unwrap();
    for port in 0..200 {
        let client = flow("10.2.0.1:1", port);
        let binding = gateway.bind(client).unwrap();
        assert!((2048..3072).contains(&binding.port));
        held.push((client, binding));
    }
    leases.give_back(5, id).unwrap();
    let client = flow("10.2.0.1:1", 999);
    let binding = gateway.bind(client).unwrap();
    assert!(!(2048..3072).contains(&binding.port), "the block rests");
    held.push((client, binding));
    gateway.tick(5 + REST_NS);
    let again = (2000..2300).any(|port| {
        let client = flow("10.3.0.1:1", port);
        let binding = gateway.bind(client).unwrap();
        held.push((client, binding));
        (2048..3072).contains(&binding.port)
    });
    assert!(again);
    for (client, binding) in held {
        gateway.release(&client, &binding);
    }
    assert_eq!(gateway.nat.status().ports_held, 0);
}

/// A thousand subscribers with a block each: the log has a line for each of them and none for flows.
#[test]
fn a_thousand_subscribers_are_a_thousand_lines() {
    let pool: Vec<String> = (1..=17).map(|last| format!("192.0.2.{last}")).collect();
    let pool: Vec<&str> = pool.iter().map(String::as_str).collect();
    let policy =
        Arc::new(NatPolicy::compile(&[NatSpec { ports_per_client: 1024, ..nat(&pool) }], &[], &[], &[]));
    let mut cores = [Gateway::new(0, 2, &policy), Gateway::new(1, 2, &policy)];
    let mut blocks = BTreeSet::new();
    for subscriber in 0..1000u16 {
        let [high, low] = subscriber.to_be_bytes();
        let mut own = BTreeSet::new();
        for remote in 0..6u8 {
            let client = FlowKey {
                src: IpAddr::from([10, 0, high, low]),
                dst: IpAddr::from([198, 51, 100, remote]),
                ..flow("10.0.0.1:1", 1)
            };
            let binding = cores[usize::from(remote % 2)].bind(client).unwrap();
            assert!(!binding.replies_elsewhere);
            own.insert((binding.source, binding.port >> 10));
        }
        assert_eq!(own.len(), 1, "one block on both cores");
        assert!(blocks.append_all(own));
    }
    let lines: usize = cores.iter().map(|core| core.log.len()).sum();
    assert_eq!(lines, 1000);
    assert!(cores.iter().flat_map(|core| &core.log).all(|event| event.kind == NatEventKind::BlockGranted));
    let (request, binding) = *cores[0].flows.values().next().unwrap();
    assert_eq!(cores[0].who(&binding, 6, None).len(), 1);
    assert_eq!(cores[0].who(&binding, 6, None)[0].1.ip(), request.client.src);

    // All go; the blocks come back when both cores have seen it.
    for core in &mut cores {
        core.log.clear();
        let flows: Vec<_> = core.flows.values().copied().collect();
        for (request, binding) in flows {
            core.release(&request.client, &binding);
        }
        for _ in 0..20 {
            core.tick(CLIENT_IDLE_NS);
        }
    }
    assert_eq!(policy.leases().automatic(), []);
    let returned =
        |core: &Gateway| core.log.iter().filter(|event| event.kind == NatEventKind::BlockReturned).count();
    assert_eq!((returned(&cores[0]), returned(&cores[1])), (0, 1000));
    assert_eq!(cores[0].nat.status().clients, 0);
}

trait AppendAll {
    fn append_all(&mut self, other: Self) -> bool;
}

impl<T: Ord> AppendAll for BTreeSet<T> {
    /// False if one was there before.
    fn append_all(&mut self, other: Self) -> bool {
        other.into_iter().all(|item| self.insert(item))
    }
}

/// No client can use more than its blocks; when all are granted the next client has none.
#[test]
fn blocks_are_bounded() {
    let spec = NatSpec { ports: (1024, 4095), ports_per_client: 1500, ..nat(&["192.0.2.1"]) };
    let mut gateway = Gateway::of(&[spec]);
    let count = (1..).take_while(|port| gateway.bind(flow("10.0.0.1:1", *port)).is_ok()).count();
    assert_eq!(count, 2048, "whole blocks");
    assert_eq!(gateway.bind(flow("10.0.0.2:1", 1)), Err(DropReason::NatPortsExhausted));
    assert_eq!(gateway.log.len(), 2);
}

/// A block for a client and endpoint-independent mappings go together: each core has its granules of the block.
#[test]
fn mappings_stay_in_the_clients_block() {
    let spec =
        NatSpec { mapping: Mapping::EndpointIndependent, ports_per_client: 1024, ..nat(&["192.0.2.1"]) };
    let policy = Arc::new(NatPolicy::compile(&[spec], &[], &[], &[]));
    let mut ports = BTreeSet::new();
    for core in 0..4 {
        let mut gateway = Gateway::new(core, 4, &policy);
        let count = (1..).take_while(|port| match gateway.bind(flow("10.0.0.1:1", *port)) {
            Ok(binding) => ports.insert(binding.port),
            Err(_) => false,
        });
        assert_eq!(count.count(), 256);
        assert!(gateway.log.iter().all(|event| event.kind == NatEventKind::BlockGranted));
    }
    let blocks: BTreeSet<u16> = ports.iter().map(|port| port >> 10).collect();
    assert_eq!((ports.len(), blocks.len()), (1024, 1));
}

/// The address of a client's block leaves the pool: the client gets another.
#[test]
fn a_block_of_an_address_that_is_gone_is_replaced() {
    let spec = |address| NatSpec { ports_per_client: 1024, ..nat(&[address]) };
    let mut gateway = Gateway::of(&[spec("192.0.2.1")]);
    let first = gateway.bind(flow("10.0.0.1:1", 1)).unwrap();
    gateway.reload(&[spec("192.0.2.2")]);
    let second = gateway.bind(flow("10.0.0.1:1", 2)).unwrap();
    assert_eq!((first.source, second.source), (ip("192.0.2.1"), ip("192.0.2.2")));
    gateway.release(&flow("10.0.0.1:1", 1), &first);
    gateway.release(&flow("10.0.0.1:1", 2), &second);
    gateway.tick(CLIENT_IDLE_NS);
    assert_eq!(gateway.policy.leases().automatic(), []);
}
