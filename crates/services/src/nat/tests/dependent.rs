//! C2, C3 and C4: ports by the tables.

use super::*;

/// The ports of an address with which replies of one remote come to the core, found by trying all.
fn serving_ports(
    gateway: &Gateway,
    client: &FlowKey,
    address: IpAddr,
    ports: std::ops::RangeInclusive<u16>,
) -> BTreeSet<u16> {
    let comes_here = |port: &u16| {
        let reply = FlowKey { src: address, src_port: *port, ..*client }.reversed();
        gateway.table.owner_of_hash(gateway.hasher.hash(&reply, 5)) == u16::from(gateway.core)
    };
    ports.filter(comes_here).collect()
}

/// Of the ports that can serve a core and destination, every one is used before the first failure, and each once; a
/// port that comes back can be had again; and no search reads more than one class.
#[test]
fn every_port_that_can_serve_is_used() {
    let policy = Arc::new(NatPolicy::compile(&[nat(&["192.0.2.1"])], &[], &[], &[]));
    for (core, cores, remote) in
        [(0, 1, "198.51.100.1:80"), (1, 2, "1.0.0.1:80"), (2, 3, "198.51.100.1:80"), (15, 16, "1.0.0.1:9")]
    {
        let mut gateway = Gateway::new(core, cores, &policy);
        let expected = serving_ports(&gateway, &key(6, "10.0.0.1:1", remote), ip("192.0.2.1"), 1024..=65_535);
        let mut given = BTreeSet::new();
        for place in 0..expected.len() {
            let before = gateway.nat.status_words();
            let client = FlowKey { src_port: 1024 + place as u16, ..key(6, "10.0.0.1:1", remote) };
            let binding = gateway.bind(client).unwrap();
            assert!(!binding.replies_elsewhere);
            assert!(given.insert(binding.port));
            assert!(gateway.nat.status_words() - before <= 8);
        }
        assert_eq!(given, expected);
        let client = key(6, "10.0.0.2:2000", remote);
        assert_eq!(gateway.bind(client), Err(DropReason::NatPortsExhausted));
        let (request, binding) = *gateway.flows.values().next().unwrap();
        gateway.release(&request.client, &binding);
        assert_eq!(gateway.bind(client).unwrap().port, binding.port);
        // Another remote has them all; its table is another one, or it shares what there is.
        assert_eq!(gateway.nat.status().ports_held, expected.len() as u64);
        gateway.bind(key(17, "10.0.0.2:1", remote)).unwrap();
    }
}

/// The reply falls into the bucket of the request while it can: one bucket to move, not two.
#[test]
fn the_bucket_of_the_request_is_preferred() {
    let mut gateway = Gateway::of(&[nat(&["192.0.2.1"])]);
    for port in 1024..1500 {
        let client = FlowKey { src_port: port, ..key(17, "10.0.0.1:1", "198.51.100.1:53") };
        let binding = gateway.bind(client).unwrap();
        let bucket = |key: &FlowKey, tenant| core_bits(gateway.hasher.hash(key, tenant));
        assert_eq!(bucket(&reply_of(&client, &binding), 5), bucket(&client, 0));
    }
}

#[test]
fn reserved_ports_and_port_zero_are_never_given() {
    let spec = NatSpec { ports: (0, 300), reserved: vec![(10, 290)], ..nat(&["192.0.2.1"]) };
    let mut gateway = Gateway::of(&[spec]);
    let mut given = BTreeSet::new();
    for port in 1.. {
        match gateway.bind(FlowKey { src_port: port, ..key(17, "10.0.0.1:1", "198.51.100.1:53") }) {
            Ok(binding) => assert!(given.insert(binding.port)),
            Err(reason) => {
                assert_eq!(reason, DropReason::NatPortsExhausted);
                break;
            }
        };
    }
    assert_eq!(given, (1..=9).chain(291..=300).collect());
}

/// "Next IP": and a client keeps its address while it has ports.
#[test]
fn an_exhausted_address_is_followed_by_the_next() {
    let spec = NatSpec { ports: (5000, 5003), tables: 1, ..nat(&["192.0.2.1", "192.0.2.2", "192.0.2.3"]) };
    let mut gateway = Gateway::of(&[spec]);
    let client = |port| FlowKey { src_port: port, ..key(17, "10.0.0.1:1", "198.51.100.1:53") };
    let addresses: Vec<IpAddr> = (1..=12).map(|port| gateway.bind(client(port)).unwrap().source).collect();
    assert_eq!(
        addresses.chunks(4).map(|four| four.iter().collect::<BTreeSet<_>>().len()).collect::<Vec<_>>(),
        [1, 1, 1]
    );
    assert_eq!(addresses.iter().collect::<BTreeSet<_>>().len(), 3);
    assert_eq!(gateway.bind(client(13)), Err(DropReason::NatPortsExhausted));
}

#[test]
fn clients_are_paired_with_addresses_alike_on_all_cores() {
    let pool = ["192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4"];
    let policy = Arc::new(NatPolicy::compile(&[nat(&pool)], &[], &[], &[]));
    let mut cores: Vec<_> = (0..4).map(|core| Gateway::new(core, 4, &policy)).collect();
    let mut used = BTreeSet::new();
    for client in 0..40u8 {
        let mut of_client = BTreeSet::new();
        for (core, gateway) in cores.iter_mut().enumerate() {
            for remote in 0..5u8 {
                let flow = FlowKey {
                    src: IpAddr::from([10, 0, 0, client]),
                    dst: IpAddr::from([198, 51, 100, remote]),
                    src_port: core as u16,
                    dst_port: 80,
                    protocol: 6,
                };
                of_client.insert(gateway.bind(flow).unwrap().source);
            }
        }
        assert_eq!(of_client.len(), 1);
        used.append(&mut of_client);
    }
    assert_eq!(used.len(), 4, "clients are spread");
    // A new pool takes nobody's address away.
    let gateway = &mut cores[0];
    let flow = |port| FlowKey { src_port: port, ..key(6, "10.0.0.1:1", "198.51.100.9:80") };
    let before = gateway.bind(flow(1)).unwrap().source;
    gateway.reload(&[nat(&["192.0.2.9", "192.0.2.8", "192.0.2.4", "192.0.2.3", "192.0.2.2", "192.0.2.1"])]);
    assert_eq!(gateway.bind(flow(2)).unwrap().source, before);
}

/// C3: the address is kept; two clients with equal ports, and ports that are unique only within a table.
#[test]
fn a_kept_address_gets_another_port() {
    let spec = NatSpec { mode: NatMode::PortOnly, ..nat(&[]) };
    let policy = Arc::new(NatPolicy::compile(&[spec], &[], &[], &[]));
    let mut gateway = Gateway::new(1, 4, &policy);
    let mut given = Vec::new();
    for client in ["10.0.0.1:40000", "10.0.0.2:40000"] {
        for remote in 0..200u8 {
            let flow =
                FlowKey { dst: IpAddr::from([198, 51, 100, remote]), ..key(6, client, "198.51.100.1:80") };
            let binding = gateway.bind(flow).unwrap();
            assert_eq!(binding.source, flow.src);
            assert!(!binding.replies_elsewhere && !binding.kept);
            given.push((binding.table, binding.port));
        }
    }
    let tables: BTreeSet<u8> = given.iter().map(|(table, _)| *table).collect();
    assert!(tables.len() > 40 && tables.iter().all(|table| *table < 64), "{} tables", tables.len());
    assert_eq!(given.iter().collect::<BTreeSet<_>>().len(), given.len(), "once in its table");
    assert!(gateway.nat.status().tables.iter().all(|table| table.address.is_none() && table.held < 40));
    let flows: Vec<_> = gateway.flows.values().copied().collect();
    for (request, binding) in flows {
        gateway.release(&request.client, &binding);
    }
    assert_eq!(gateway.nat.status().tables, []);
    assert_eq!(gateway.nat.status().ports_held, 0);
}

/// C3: when a pair's table is exhausted another one serves, and no reply is given twice.
#[test]
fn another_table_when_one_is_exhausted() {
    let spec = NatSpec { mode: NatMode::PortOnly, ports: (2000, 2009), ..nat(&[]) };
    let mut gateway = Gateway::of(&[spec]);
    let flow =
        |port, dst_port| FlowKey { src_port: port, dst_port, ..key(6, "10.0.0.1:1", "198.51.100.1:80") };
    let home: Vec<_> = (0..10).map(|port| gateway.bind(flow(port, 80)).unwrap()).collect();
    assert_eq!(home.iter().map(|binding| binding.table).collect::<BTreeSet<_>>().len(), 1);
    assert_eq!(gateway.bind(flow(99, 80)), Err(DropReason::NatPortsExhausted), "every reply key is in use");
    // The same pair, another service: the ports of other tables.
    let others: Vec<_> = (0..10).map(|port| gateway.bind(flow(port, 443)).unwrap()).collect();
    assert!(others.iter().all(|binding| binding.table != home[0].table));
    // The home table has room again, but port by port the flow table is asked while foreign ports are held.
    let checks = gateway.nat.status().flow_checks;
    for (port, binding) in home.iter().enumerate() {
        gateway.release(&flow(port as u16, 80), binding);
    }
    assert_eq!(gateway.bind(flow(50, 443)), Err(DropReason::NatPortsExhausted));
    assert!(gateway.nat.status().flow_checks > checks);
    for (port, binding) in others.iter().enumerate() {
        gateway.release(&flow(port as u16, 443), binding);
    }
    let checks = gateway.nat.status().flow_checks;
    gateway.bind(flow(50, 443)).unwrap();
    assert_eq!(gateway.nat.status().flow_checks, checks, "no foreign port, no question");
}

/// Reloads with another number of tables must not give a reply twice.
#[test]
fn the_number_of_tables_may_change() {
    let spec = |tables| NatSpec { ports: (2000, 2099), tables, ..nat(&["192.0.2.1"]) };
    let mut gateway = Gateway::of(&[spec(256)]);
    let flow = |port| FlowKey { src_port: port, ..key(6, "10.0.0.1:1", "198.51.100.1:80") };
    for port in 0..50 {
        gateway.bind(flow(port)).unwrap();
    }
    gateway.reload(&[spec(1)]);
    for port in 50..100 {
        gateway.bind(flow(port)).unwrap();
    }
    assert_eq!(gateway.bind(flow(100)), Err(DropReason::NatPortsExhausted));
    let flows: Vec<_> = gateway.flows.values().copied().collect();
    for (request, binding) in flows {
        gateway.release(&request.client, &binding);
    }
    assert_eq!(gateway.nat.status().ports_held, 0);
}

/// A bucket that another core may have flows in gives no ports, until it is settled.
#[test]
fn buckets_with_a_history_are_left_alone() {
    let policy = Arc::new(NatPolicy::compile(&[nat(&["192.0.2.1"])], &[], &[], &[]));
    let mut gateway = Gateway::new(0, 2, &policy);
    let units = [Unit { id: 0, weight: 3 }, Unit { id: 1, weight: 1 }];
    let next = steering::assign::plan(&gateway.table, &units, &[]).unwrap();
    gateway.table = next;
    gateway.follow();
    let history: BTreeSet<usize> =
        (0..128).filter(|bucket| !gateway.table.chain(*bucket).is_empty()).collect();
    assert_eq!(history.len(), 32);
    let bucket_of = |gateway: &Gateway, client: &FlowKey, binding: &Binding| {
        usize::from(core_bits(gateway.hasher.hash(&reply_of(client, binding), 5)))
    };
    for port in 0..2000 {
        let client = FlowKey { src_port: port, ..key(6, "10.0.0.1:1", "198.51.100.1:80") };
        let binding = gateway.bind(client).unwrap();
        assert!(!binding.replies_elsewhere && !history.contains(&bucket_of(&gateway, &client, &binding)));
    }
    for bucket in &history {
        gateway.table.retire(*bucket, 1);
    }
    gateway.follow();
    let later = (0..2000).filter(|port| {
        let client = FlowKey { src_port: *port, ..key(6, "10.0.0.1:1", "198.51.100.2:80") };
        let binding = gateway.bind(client).unwrap();
        history.contains(&bucket_of(&gateway, &client, &binding))
    });
    assert!(later.count() > 300);
}

/// A new core has only buckets with a history: it works, and asks the flow table.
#[test]
fn a_core_without_settled_buckets_asks() {
    let policy = Arc::new(NatPolicy::compile(&[nat(&["192.0.2.1"])], &[], &[], &[]));
    let mut gateway = Gateway::new(1, 2, &policy);
    let alone = BucketTable::new(128, &[Unit { id: 0, weight: 1 }]).unwrap();
    let units = [Unit { id: 0, weight: 1 }, Unit { id: 1, weight: 1 }];
    gateway.table = steering::assign::plan(&alone, &units, &[]).unwrap();
    gateway.follow();
    let binding = gateway.bind(key(6, "10.0.0.1:1", "198.51.100.1:80")).unwrap();
    assert!(!binding.replies_elsewhere);
    assert_eq!(gateway.nat.status().flow_checks, 1);
    // And one that owns nothing has no port to give.
    gateway.table = alone;
    gateway.follow();
    assert_eq!(gateway.bind(key(6, "10.0.0.1:2", "198.51.100.1:80")), Err(DropReason::NatPortsExhausted));
}

/// The outside address talks to itself: the hash cannot be turned, the ring carries the replies; two cores still never
/// take the same port.
#[test]
fn equal_addresses_take_ports_of_the_cores_own() {
    let spec = NatSpec { ports: (2000, 3000), ..nat(&["192.0.2.1"]) };
    let policy = Arc::new(NatPolicy::compile(&[spec], &[], &[], &[]));
    let mut all = BTreeSet::new();
    let mut elsewhere = 0;
    for core in 0..3 {
        let mut gateway = Gateway::new(core, 3, &policy);
        let mut flows = Vec::new();
        for port in 1.. {
            let client = FlowKey { src_port: port, ..key(6, "10.0.0.1:1", "192.0.2.1:80") };
            let Ok(binding) = gateway.bind(client) else { break };
            assert!(all.insert(binding.port), "{} was given on two cores", binding.port);
            elsewhere += u32::from(binding.replies_elsewhere);
            flows.push((client, binding));
        }
        for (client, binding) in flows {
            gateway.release(&client, &binding);
        }
        assert_eq!(gateway.nat.status().ports_held, 0);
    }
    assert_eq!(all.len(), 1001);
    assert!(elsewhere > 500);
}

#[test]
fn query_ids_are_ports_and_other_protocols_have_the_address_only() {
    let mut gateway = Gateway::of(&[nat(&["192.0.2.1", "192.0.2.2"])]);
    for remote in ["198.51.100.1", "1.1.1.1"] {
        let mut echo = key(1, "10.0.0.1:0", "0.0.0.0:0");
        echo.dst = ip(remote);
        (echo.src_port, echo.dst_port) = if echo.src < echo.dst { (77, 0) } else { (0, 77) };
        let binding = gateway.bind(echo).unwrap();
        assert!(!binding.replies_elsewhere && binding.port >= 1024);
        let event = *gateway.log.last().unwrap();
        assert_eq!((event.inside.port(), event.outside.port()), (77, binding.port));
        assert_eq!(event.remote, Some(SocketAddr::new(ip(remote), 0)));
        gateway.release(&echo, &binding);
    }
    assert_eq!(gateway.nat.status().ports_held, 0);
    let gre = |client| key(47, client, "198.51.100.1:0");
    let first = gateway.bind(gre("10.0.0.1:0")).unwrap();
    let second = gateway.bind(gre("10.0.0.2:0")).unwrap();
    assert_ne!(first.source, second.source, "each reply has one receiver");
    assert_eq!(gateway.bind(gre("10.0.0.3:0")), Err(DropReason::NatUnsupported));
    gateway.release(&gre("10.0.0.1:0"), &first);
    assert_eq!(gateway.bind(gre("10.0.0.3:0")).unwrap().source, first.source);
    let signed = key(51, "10.0.0.7:0", "198.51.100.1:0");
    assert_eq!(gateway.bind(signed), Err(DropReason::NatUnsupported), "AH");
    let mixed = FlowKey { dst: ip("2001:db8::1"), ..key(6, "10.0.0.1:1", "198.51.100.1:80") };
    let rule = gateway.policy.rule_for(Egress::Interface(InterfaceId(1)), &client(&mixed, 0)).unwrap();
    let request =
        BindRequest { rule, client: mixed, tenant: 0, out_tenant: 5, random: 1, home: None, next: None };
    assert_eq!(gateway.nat.bind(0, &request, |_| false), Err(DropReason::NatUnsupported));
}

#[test]
fn mode_none_keeps_everything_and_says_where_replies_go() {
    let policy = Arc::new(NatPolicy::compile(&[NatSpec { mode: NatMode::None, ..nat(&[]) }], &[], &[], &[]));
    let mut gateway = Gateway::new(0, 4, &policy);
    let mut elsewhere = 0;
    for port in 1..200 {
        let client = FlowKey { src_port: port, ..key(6, "10.0.0.1:1", "198.51.100.1:80") };
        let binding = gateway.bind(client).unwrap();
        assert_eq!((binding.source, binding.port, binding.kept), (client.src, port, true));
        elsewhere += u32::from(binding.replies_elsewhere);
        gateway.release(&client, &binding);
    }
    assert!((1..199).contains(&elsewhere), "the tenant of the way out is another: {elsewhere}");
    assert!(gateway.log.is_empty());
}

#[test]
fn a_client_has_a_limit() {
    let mut gateway = Gateway::of(&[NatSpec { flows_per_client_max: 3, ..nat(&["192.0.2.1"]) }]);
    let flow = |client: &str, dst_port| FlowKey { dst_port, ..key(6, client, "198.51.100.1:80") };
    let first: Vec<_> = (1..=3).map(|port| gateway.bind(flow("10.0.0.1:1", port)).unwrap()).collect();
    assert_eq!(gateway.bind(flow("10.0.0.1:1", 4)), Err(DropReason::FlowsPerClient));
    assert!(gateway.bind(flow("10.0.0.2:1", 4)).is_ok(), "others are not concerned");
    assert!(gateway.bind_as(flow("10.0.0.1:1", 5), 7).is_ok(), "nor the same address of another tenant");
    gateway.release(&flow("10.0.0.1:1", 2), &first[1]);
    assert!(gateway.bind(flow("10.0.0.1:1", 6)).is_ok());
}

#[test]
fn each_flow_is_logged() {
    let mut gateway = Gateway::of(&[nat(&["192.0.2.1"])]);
    let client = key(6, "10.0.0.1:4000", "198.51.100.1:80");
    let binding = gateway.bind_as(client, 7).unwrap();
    let remote = Some("198.51.100.1:80".parse().unwrap());
    assert_eq!(gateway.who(&binding, 6, remote), [(7, "10.0.0.1:4000".parse().unwrap())]);
    gateway.now_ns = 5;
    gateway.release(&client, &binding);
    assert_eq!(gateway.who(&binding, 6, remote), []);
    assert_eq!(gateway.log.iter().map(|event| event.at_ns).collect::<Vec<_>>(), [0, 5]);
}

#[test]
fn ipv6_is_translated_alike() {
    let policy = Arc::new(NatPolicy::compile(&[nat(&["2001:db8::1", "192.0.2.1"])], &[], &[], &[]));
    let mut gateway = Gateway::new(3, 5, &policy);
    for remote in ["[2001:db8:9::1]:443", "[2000::1]:443"] {
        for port in 1..100 {
            let client = FlowKey { src_port: port, ..key(6, "[fd00::1]:1", remote) };
            let binding = gateway.bind(client).unwrap();
            assert_eq!(binding.source, ip("2001:db8::1"));
            assert!(!binding.replies_elsewhere);
        }
        let binding =
            gateway.bind(FlowKey { src_port: 0, dst_port: 0, ..key(58, "[fd00::1]:1", remote) }).unwrap();
        assert!(!binding.replies_elsewhere);
    }
}

/// The key of the hash changes under the ports: they can all be given back.
#[test]
fn a_new_hash_key_keeps_what_is_held() {
    let mut gateway = Gateway::of(&[nat(&["192.0.2.1"]), nat(&["2001:db8::1"])]);
    let flow = |port, v6| {
        let (client, remote) =
            if v6 { ("[fd00::1]:1", "[2000::1]:443") } else { ("10.0.0.1:1", "1.0.0.1:443") };
        FlowKey { src_port: port, ..key(6, client, remote) }
    };
    let all: Vec<_> = (0..600).map(|n| flow(n, n % 2 == 0)).collect();
    let held: Vec<_> = all.iter().map(|client| (*client, gateway.bind(*client).unwrap())).collect();
    let (hasher, solvers) = draw(12);
    (gateway.hasher, gateway.solvers) = (Arc::new(hasher), Arc::new(solvers));
    gateway.follow();
    assert_eq!(gateway.nat.status().ports_held, 600);
    for (client, binding) in held {
        gateway.release(&client, &binding);
    }
    assert_eq!(gateway.nat.status().ports_held, 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Flows come and go, tables change, policies change, a few ports only: no reply is ever given twice, and what was
    /// given can be given back. [`Gateway::bind`] and [`Gateway::release`] check it.
    #[test]
    fn no_reply_is_given_twice(seed: u64, kept: bool) {
        let mut random = Random(seed);
        let specs: Vec<NatSpec> = [1u16, 64, 256, 64].into_iter().zip([2040, 2020, 2060, 2040]).map(|(tables, last)| NatSpec {
            mode: if kept { NatMode::PortOnly } else { NatMode::AddressAndPort },
            ports: (2000, last),
            tables,
            ..nat(if kept { &[] } else { &["192.0.2.1", "203.0.113.7"] })
        }).collect();
        let mut gateway = Gateway::of(&specs[..1]);
        let mut live: Vec<(FlowKey, Binding)> = Vec::new();
        for step in 0..3000 {
            gateway.now_ns += 1_000_000;
            if step % 700 == 699 {
                gateway.reload(&specs[random.below(4)..][..1]);
            }
            if live.is_empty() || random.below(100) < 60 {
                let client = any_client(&mut random);
                match gateway.bind(client) {
                    Ok(binding) => {
                        prop_assert!(!binding.replies_elsewhere);
                        live.push((client, binding));
                    }
                    Err(reason) => prop_assert_eq!(reason, DropReason::NatPortsExhausted),
                }
            } else {
                let (client, binding) = live.swap_remove(random.below(live.len()));
                gateway.release(&client, &binding);
            }
            prop_assert_eq!(gateway.nat.status().ports_held, live.len() as u64);
        }
        for (client, binding) in live {
            gateway.release(&client, &binding);
        }
        prop_assert_eq!(gateway.nat.status().tables, vec![]);
    }

    /// Two cores with one pool never give the same reply.
    #[test]
    fn cores_do_not_collide(seed: u64) {
        let policy = Arc::new(NatPolicy::compile(&[NatSpec { ports: (2000, 2100), ..nat(&["192.0.2.1"]) }], &[], &[], &[]));
        let mut cores = [Gateway::new(0, 2, &policy), Gateway::new(1, 2, &policy)];
        let mut random = Random(seed);
        for _ in 0..600 {
            let client = any_client(&mut random);
            let core = random.below(2);
            if cores[core].bind(client).is_ok() {
                let [a, b] = &cores;
                prop_assert!(!a.flows.keys().any(|reply| b.flows.contains_key(reply)));
            }
        }
    }
}

#[test]
fn without_an_address_of_the_interface_ipv4_is_refused() {
    let mut gateway = Gateway::of(&[nat(&[])]);
    let client = key(6, "10.0.0.5:1000", "198.51.100.1:80");
    assert_eq!(gateway.bind(client), Err(DropReason::NatNoAddress));
    gateway.reload(&[nat(&["192.0.2.1"])]);
    assert_eq!(gateway.bind(client).map(|binding| binding.source), Ok(ip("192.0.2.1")), "DHCP has answered");
}

/// A client's port below 1,024 stays below: the same where it is free and its replies come here, else another one; when none
/// is left, any (RFC 4787 REQ-3 a).
#[test]
fn low_ports_stay_low() {
    let mut gateway = Gateway::of(&[nat(&["192.0.2.1"])]);
    let mut seen = BTreeSet::new();
    let client = |host: u8, port: u16| key(6, &format!("10.0.0.{host}:{port}"), "198.51.100.1:2049");
    for (host, port) in [(5, 500), (6, 500), (5, 22), (5, 700), (5, 1023)] {
        let binding = gateway.bind(client(host, port)).unwrap();
        assert!(binding.port < 1024 && seen.insert(binding.port), "{port} became {}", binding.port);
        assert!(host != 5 || binding.port == port, "the only core has all ports");
        assert!(host == 5 || binding.port >= 512, "the others below are known as those of services");
    }
    assert!(gateway.bind(client(5, 1024)).unwrap().port >= 1024);
    let mut low = seen.len();
    while gateway.bind(client((low % 200) as u8, 1 + (low % 500) as u16)).unwrap().port < 1024 {
        low += 1;
    }
    assert!((512..1024).contains(&low), "{low}");
}

/// A range that the operator wrote is kept to.
#[test]
fn ports_that_were_chosen_by_the_operator() {
    let client = |port: u16| key(17, &format!("10.0.0.5:{port}"), "198.51.100.1:2049");
    let mut gateway = Gateway::of(&[NatSpec { ports: (512, 1023), ..nat(&["192.0.2.1"]) }]);
    for port in [700, 40_000, 22] {
        assert!((512..1024).contains(&gateway.bind(client(port)).unwrap().port));
    }
    let mut gateway = Gateway::of(&[NatSpec { ports: (4096, 8191), ..nat(&["192.0.2.1"]) }]);
    for port in [700, 40_000, 22] {
        assert!((4096..8192).contains(&gateway.bind(client(port)).unwrap().port));
    }
    let reserved = vec![(500, 500), (600, 700)];
    let mut gateway = Gateway::of(&[NatSpec { reserved, ..nat(&["192.0.2.1"]) }]);
    for port in [500, 600, 650, 700] {
        let bound = gateway.bind(client(port)).unwrap().port;
        assert!(bound < 1024 && bound != 500 && !(600..=700).contains(&bound), "{bound}");
    }
}

/// Even stays even and odd stays odd on every core while there are such ports; any other is better than none (RFC 4787 REQ-4).
#[test]
fn parity_is_kept_while_it_can_be() {
    let spec = || NatSpec { port_choice: PortChoice::Parity, ..nat(&["192.0.2.1"]) };
    for mapping in [Mapping::EndpointDependent, Mapping::EndpointIndependent] {
        let policy = Arc::new(NatPolicy::compile(&[NatSpec { mapping, ..spec() }], &[], &[], &[]));
        for core in 0..3 {
            let mut gateway = Gateway::new(core, 3, &policy);
            for port in 20_000..20_400 {
                let client = key(17, &format!("10.0.0.5:{port}"), "198.51.100.1:5004");
                let binding = gateway.bind(client).unwrap();
                assert_eq!(
                    binding.port % 2,
                    port % 2,
                    "{mapping:?} core {core}: {port} became {}",
                    binding.port
                );
                assert!(!binding.replies_elsewhere || mapping == Mapping::EndpointIndependent);
            }
        }
    }
    let mut gateway = Gateway::of(&[NatSpec { ports: (5_000, 5_009), tables: 1, ..spec() }]);
    let even = |place: u16| key(17, &format!("10.0.0.5:{}", 20_000 + 2 * place), "198.51.100.1:5004");
    let given: Vec<u16> = (0..10).map(|place| gateway.bind(even(place)).unwrap().port).collect();
    assert!(
        given[..5].iter().all(|port| port % 2 == 0) && given[5..].iter().all(|port| port % 2 == 1),
        "{given:?}"
    );
    assert_eq!(gateway.bind(even(10)), Err(DropReason::NatPortsExhausted));
    // A query of ICMP has no parity to keep, a port below 1,024 its own rule.
    let mut gateway = Gateway::of(&[spec()]);
    assert!(gateway.bind(key(17, "10.0.0.5:501", "198.51.100.1:53")).unwrap().port < 1_024);
}

/// A client keeps its port for every remote, also where the tables have that place for another one; a second client gets
/// another port, and two flows never have the same replies.
#[test]
fn ports_are_preserved() {
    let spec =
        NatSpec { port_choice: PortChoice::Preserve, ports: (5000, 9000), tables: 1, ..nat(&["192.0.2.1"]) };
    let mut gateway = Gateway::of(&[spec]);
    let client =
        |host: u8, remote: u16| key(17, &format!("10.0.0.{host}:5060"), &format!("198.51.100.1:{remote}"));
    for remote in 1..50 {
        let first = gateway.bind(client(5, remote)).unwrap();
        assert_eq!((first.port, first.own_port), (5060, remote > 1));
        assert_ne!(gateway.bind(client(6, remote)).unwrap().port, 5060);
        if remote % 3 == 0 {
            gateway.release(&client(5, remote), &first);
            assert_eq!(gateway.bind(client(7, remote)).unwrap().port, 5060, "free again");
        }
    }
    assert_ne!(
        gateway.bind(key(17, "10.0.0.5:4999", "198.51.100.1:9")).unwrap().port,
        4999,
        "not in the range"
    );
}

/// After a connection its port is not given to the same remote again for a minute, while there are others (RFC 9293 §3.6.1).
#[test]
fn ports_of_ended_connections_rest() {
    let spec = NatSpec { ports: (1024, 2047), ..nat(&["192.0.2.1"]) };
    let mut gateway = Gateway::of(&[spec]);
    gateway.replied = true;
    let client = |port: u16| key(6, &format!("10.0.0.5:{port}"), "198.51.100.1:80");
    let mut last: Vec<u16> = Vec::new();
    for number in 0..4_000 {
        gateway.tick(1_000_000_000 * number / 20);
        let client = client(2_000 + number as u16);
        let binding = gateway.bind(client).unwrap();
        let again = last.iter().rev().take(1_000).any(|port| *port == binding.port);
        assert!(!again, "port {} of the last {} s", binding.port, 1_000 / 20);
        last.push(binding.port);
        gateway.release(&client, &binding);
    }
    // 1,024 at once: nothing is kept back.
    for number in 0..1_024 {
        gateway.bind(client(10_000 + number)).unwrap();
    }
    assert_eq!(gateway.bind(client(9_000)), Err(DropReason::NatPortsExhausted));
    gateway.tick(1_000_000_000_000);
}
