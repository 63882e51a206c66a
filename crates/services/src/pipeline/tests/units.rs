//! Several machines behind the same interfaces: flows stay where they began, whatever the buckets do.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use packet::DropReason;
use packet::flow::FlowKey;
use proptest::prelude::*;
use steering::assign::plan;
use steering::era::Eras;
use steering::symmetric::FlowHasher;
use steering::table::{BucketTable, Unit};
use steering::units::{LEASE_PORTS, Lease, Leases, Units};

use super::balancing::farm;
use super::peers::{BRANCH, two_branches};
use super::world::*;
use crate::spec::{DeliveryMode, GatewaySpec, NatMode, TCP, UDP};
use crate::steer;

/// Buckets: few, so that each has flows.
const BUCKETS: usize = 64;
const OUTSIDE: &str = "203.0.113.1";
/// The gateway's address towards backends.
const INSIDE: &str = "10.0.0.1";
/// Node ids of the units that there are, and of the dispatcher.
const NODES: [u16; 5] = [3, 4, 5, 6, 7];
const DISPATCHER: u16 = 1;

/// Units and the dispatcher's view.
struct Cluster {
    units: BTreeMap<u16, World>,
    table: BucketTable,
    older: Option<BucketTable>,
    /// Whether dispatchers use the newer table already.
    committed: bool,
    leases: Vec<Lease>,
}

impl Cluster {
    fn new(spec: &GatewaySpec, first: &[u16]) -> Self {
        let units: Vec<Unit> = first.iter().map(|id| Unit { id: *id, weight: 1 }).collect();
        let leases: Vec<Lease> = (0u8..)
            .zip(NODES)
            .flat_map(|(place, node)| {
                // Of the inside those from which the host connects.
                let blocks = [(OUTSIDE, 1 + 2 * place), (OUTSIDE, 2 + 2 * place), (INSIDE, 40 + place)];
                blocks.map(|(address, block)| Lease { address: address.parse().unwrap(), block, node })
            })
            .collect();
        let world = |node: u16| {
            let mut spec = spec.clone();
            // All ports but those that the unit has by lease.
            let others = |address: &str| -> Vec<(u16, u16)> {
                let address: IpAddr = address.parse().unwrap();
                let held = leases.iter().filter(|lease| lease.node == node && lease.address == address);
                let own: Vec<u8> = held.map(|lease| lease.block).collect();
                let range = |block: u8| {
                    (u16::from(block) * LEASE_PORTS, u16::from(block) * LEASE_PORTS + (LEASE_PORTS - 1))
                };
                (0..64u8).filter(|block| !own.contains(block)).map(range).collect()
            };
            for nat in &mut spec.nats {
                nat.reserved = others(OUTSIDE);
            }
            spec.host.ports = (32_768, 60_999);
            spec.host.others_ports = [INSIDE, OUTSIDE].map(|at| (at.parse().unwrap(), others(at))).into();
            World::new(1, spec)
        };
        let mut cluster = Self {
            units: NODES.map(|node| (node, world(node))).into(),
            table: BucketTable::new(BUCKETS, &units).unwrap(),
            older: None,
            committed: true,
            leases: leases.clone(),
        };
        cluster.publish();
        cluster
    }

    fn snapshot(&self, node: u16) -> Units {
        let mut eras = Eras::new(self.older.clone().unwrap_or_else(|| self.table.clone()));
        eras.install(self.table.clone());
        let older = self.older.as_ref().map(BucketTable::era);
        Units {
            node,
            hasher: FlowHasher::new(std::array::from_fn(|at| mix(at as u64) as u8)),
            eras,
            in_force: older.filter(|_| !self.committed).unwrap_or_else(|| self.table.era()),
            leases: Leases::new(&self.leases),
        }
    }

    fn publish(&mut self) {
        for node in NODES {
            let snapshot = Arc::new(self.snapshot(node));
            for core in &mut self.units.get_mut(&node).unwrap().cores {
                core.follow_units(Some(&snapshot));
            }
        }
    }

    /// The next era is prepared, not committed.
    fn prepare(&mut self, active: &[u16]) {
        let units: Vec<Unit> =
            NODES.iter().map(|id| Unit { id: *id, weight: u32::from(active.contains(id)) }).collect();
        let next = plan(&self.table, &units, &[]).unwrap();
        self.older = Some(std::mem::replace(&mut self.table, next));
        self.committed = false;
        self.publish();
    }

    fn commit(&mut self) {
        self.committed = true;
        self.publish();
    }

    /// Chain entries of units that have no flow in the bucket end.
    fn retire(&mut self) {
        for (node, world) in &self.units {
            let live = world.cores[0].live_by_unit_bucket();
            for bucket in (0..BUCKETS).filter(|bucket| live[*bucket] == 0) {
                self.table.retire(bucket, *node);
            }
        }
        self.publish();
    }

    fn change(&mut self, active: &[u16]) {
        self.prepare(active);
        self.commit();
        self.retire();
    }

    /// Packet at a dispatcher, and all its way; `newer`: by the table that is not in force everywhere yet.
    fn packet_by(
        &mut self,
        newer: bool,
        ingress: packet::attachment::Ingress,
        packet: &[u8],
    ) -> (u16, Vec<Left>) {
        let mut view = self.snapshot(DISPATCHER);
        if newer {
            view.in_force = self.table.era();
        }
        let policy = Arc::clone(&self.units[&NODES[0]].policy);
        let key = steer::unit_key(&policy, &FlowKey::of(packet).unwrap());
        let target = view.dispatch(&key);
        let mut way = vec![ToUnit {
            unit: target.unit,
            ingress,
            visit: target.visit,
            ports: None,
            packet: packet.to_vec(),
        }];
        let (mut left, mut last, mut hops) = (Vec::new(), target.unit, 0);
        while let Some(next) = way.pop() {
            hops += 1;
            assert!(hops < 30, "{next:?} goes round in circles");
            last = next.unit;
            let (more, on) = self.units.get_mut(&next.unit).unwrap().visited(&next);
            left.extend(more);
            way.extend(on);
        }
        (last, left)
    }

    fn packet(&mut self, ingress: packet::attachment::Ingress, packet: &[u8]) -> (u16, Vec<Left>) {
        self.packet_by(false, ingress, packet)
    }

    /// A packet of which exactly one leaves.
    fn one(&mut self, ingress: packet::attachment::Ingress, packet: &[u8]) -> (u16, Left) {
        let (unit, mut left) = self.packet(ingress, packet);
        let drops = || self.units.values().map(|world| format!("{:?}", world.drops())).collect::<Vec<_>>();
        assert_eq!(left.len(), 1, "{:?}: {:?}", FlowKey::of(packet), drops());
        (unit, left.remove(0))
    }
}

/// A connection and what it became.
struct Flow {
    request: FlowKey,
    inside: FlowKey,
    unit: u16,
    ingress: packet::attachment::Ingress,
    back: packet::attachment::Ingress,
}

impl Flow {
    fn begin(
        cluster: &mut Cluster,
        request: FlowKey,
        ingress: packet::attachment::Ingress,
        back: packet::attachment::Ingress,
    ) -> Self {
        let first =
            if request.protocol == TCP { tcp_of(&request, SYN, 1, 0, b"") } else { udp_of(&request, b"?") };
        let (unit, left) = cluster.one(ingress, &first);
        let flow = Self { request, inside: left.key(), unit, ingress, back };
        let reply = flow.inside.reversed();
        let answer =
            if request.protocol == TCP { tcp_of(&reply, SYN | ACK, 7, 2, b"") } else { udp_of(&reply, b"!") };
        let (by, left) = cluster.one(back, &answer);
        assert_eq!((by, left.key()), (unit, request.reversed()));
        flow
    }

    /// Data both ways arrives, translated as it always was, by the unit where the flow began.
    fn check(&self, cluster: &mut Cluster) {
        let data = |key: &FlowKey, seq, ack| match key.protocol {
            TCP => tcp_of(key, ACK, seq, ack, b"data"),
            _ => udp_of(key, b"data"),
        };
        let (unit, left) = cluster.one(self.ingress, &data(&self.request, 2, 8));
        assert_eq!((unit, left.key()), (self.unit, self.inside), "{:?}", self.request);
        let (unit, left) = cluster.one(self.back, &data(&self.inside.reversed(), 8, 2));
        assert_eq!((unit, left.key()), (self.unit, self.request.reversed()), "{:?}", self.request);
    }
}

fn from_inside(protocol: u8, port: u16) -> FlowKey {
    key(protocol, &format!("10.0.0.{}:{port}", 2 + port % 50), "198.51.100.9:443")
}

/// A firewall, an address translation, a virtual server whose backends see their clients, and one whose backends see the gateway.
fn services() -> Vec<(GatewaySpec, packet::attachment::Ingress)> {
    let mut translated = two_interfaces();
    translated.nats.push(nat(NatMode::AddressAndPort, &[]));
    translated.nats[0].addresses = vec![OUTSIDE.parse().unwrap()];
    let seen = farm(NatMode::None, DeliveryMode::Nat);
    let hidden = farm(NatMode::AddressAndPort, DeliveryMode::Nat);
    vec![(two_interfaces(), LAN), (translated, LAN), (seen, WAN), (hidden, WAN)]
}

fn request(ingress: packet::attachment::Ingress, protocol: u8, port: u16) -> FlowKey {
    if ingress == LAN {
        return from_inside(protocol, port);
    }
    key(TCP, &format!("198.51.100.{}:{port}", 1 + port % 200), "203.0.113.10:80")
}

#[test]
fn flows_stay_where_they_began_over_many_changes() {
    for (spec, ingress) in services() {
        let mut cluster = Cluster::new(&spec, &[3]);
        let back = if ingress == LAN { WAN } else { LAN };
        let mut flows = Vec::new();
        let sets: [&[u16]; 8] =
            [&[3, 4], &[3, 4, 5], &[4, 5], &[4, 5, 6], &[5, 6, 7], &[3, 5, 6, 7], &[7], &[3, 4]];
        for (round, active) in (0u16..).zip(sets) {
            for port in 0..20 {
                let protocol = if port % 2 == 0 { TCP } else { UDP };
                let request = request(ingress, protocol, 2_000 + 100 * round + port);
                flows.push(Flow::begin(&mut cluster, request, ingress, back));
            }
            flows.iter().for_each(|flow| flow.check(&mut cluster));
            // The oldest end, so that no chain grows too long: what a plan would wait for.
            if round >= 2 {
                let over: Vec<Flow> = flows.drain(..20).collect();
                end(&mut cluster, &over);
            }
            cluster.change(active);
            flows.iter().for_each(|flow| flow.check(&mut cluster));
        }
        let units: Vec<u16> = flows.iter().map(|flow| flow.unit).collect();
        assert!(units.iter().any(|unit| *unit != units[0]), "several units had flows");
    }
}

/// Flows end by a reset, or are forgotten in time.
fn end(cluster: &mut Cluster, flows: &[Flow]) {
    for flow in flows.iter().filter(|flow| flow.request.protocol == TCP) {
        cluster.one(flow.ingress, &tcp_of(&flow.request, RST, 2, 0, b""));
    }
    for world in cluster.units.values_mut() {
        let now_ns = world.now_ns;
        world.wait(15);
        // UDP is kept longer than this: only what was reset is gone.
        assert!(world.now_ns > now_ns);
    }
}

#[test]
fn a_flow_that_begins_while_two_tables_are_in_force_begins_once() {
    let (spec, ingress) = services().swap_remove(1);
    for first_by_newer in [false, true] {
        let mut cluster = Cluster::new(&spec, &[3]);
        cluster.prepare(&[3, 4]);
        for port in 3_000..3_200 {
            let request = request(ingress, TCP, port);
            let syn = tcp_of(&request, SYN, 1, 0, b"");
            let (first, one) = cluster.packet_by(first_by_newer, ingress, &syn);
            let (second, other) = cluster.packet_by(!first_by_newer, ingress, &syn);
            assert_eq!((first, one[0].key()), (second, other[0].key()), "{request:?}");
        }
    }
}

#[test]
fn a_packet_of_an_unknown_era_begins_nothing() {
    let (spec, ingress) = services().swap_remove(0);
    let mut cluster = Cluster::new(&spec, &[3]);
    let packet = tcp_of(&request(ingress, TCP, 2_000), SYN, 1, 0, b"");
    let mut visit = cluster.snapshot(DISPATCHER).dispatch(&FlowKey::of(&packet).unwrap()).visit;
    visit.odd_era = !visit.odd_era;
    let to = ToUnit { unit: 3, ingress, visit, ports: None, packet };
    let world = cluster.units.get_mut(&3).unwrap();
    assert_eq!(world.visited(&to), (Vec::new(), Vec::new()));
    assert_eq!(world.drops().get(DropReason::EraUnknown), 1);
}

#[test]
fn fragments_find_the_flow_at_another_unit() {
    let (spec, ingress) = services().swap_remove(1);
    let mut cluster = Cluster::new(&spec, &[3, 4, 5]);
    let mut units = std::collections::BTreeSet::new();
    for port in 3_000..3_040 {
        let request = request(ingress, UDP, port);
        let flow = Flow::begin(&mut cluster, request, ingress, WAN);
        let pieces = in_pieces(&udp_of(&request, &[7; 2_500]), 1_200);
        let left: usize = pieces.iter().map(|piece| cluster.packet(ingress, piece).1.len()).sum();
        assert_eq!(left, pieces.len());
        units.insert(flow.unit);
        // Answers come to the port of the lease.
        let answer = in_pieces(&udp_of(&flow.inside.reversed(), &[8; 2_500]), 1_200);
        let left: usize = answer.iter().map(|piece| cluster.packet(WAN, piece).1.len()).sum();
        assert_eq!(left, answer.len());
    }
    assert!(units.len() > 1);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn random_changes_break_nothing(seed in any::<u64>()) {
        let mut random = seed;
        let mut next = |below: u64| {
            random = mix(random);
            random % below
        };
        let (spec, ingress) = services().swap_remove(next(3) as usize);
        let back = if ingress == LAN { WAN } else { LAN };
        let mut cluster = Cluster::new(&spec, &[3]);
        let mut flows: Vec<Flow> = Vec::new();
        let mut port = 2_000;
        for _ in 0..60 {
            match next(10) {
                0..=4 => {
                    port += 1;
                    let protocol = if next(2) == 0 { TCP } else { UDP };
                    flows.push(Flow::begin(&mut cluster, request(ingress, protocol, port), ingress, back));
                }
                5..=6 if !flows.is_empty() => {
                    let flow = &flows[next(flows.len() as u64) as usize];
                    flow.check(&mut cluster);
                }
                7 if cluster.committed => {
                    let active: Vec<u16> = NODES.into_iter().filter(|_| next(2) == 0).collect();
                    // Only as long as no chain is full: a plan would have to wait.
                    let longest = (0..BUCKETS).map(|bucket| cluster.table.chain(bucket).len()).max();
                    if !active.is_empty() && longest < Some(4) {
                        cluster.prepare(&active);
                    }
                }
                8 => cluster.commit(),
                _ if cluster.committed => cluster.retire(),
                _ => {}
            }
        }
        flows.iter().for_each(|flow| flow.check(&mut cluster));
    }
}

/// Rows D6, R9: a unit leaves while it talks to its manager through a bond of its own, whichever direction of that
/// connection the services saw first; a peer's connection to what is behind it is waited for.
#[test]
fn connections_of_the_host_itself_do_not_keep_a_unit() {
    let bus = BRANCH;
    for (src, dst, live) in [("10.8.0.1:4601", "203.0.113.1:40000", 0), ("10.8.0.5:4000", "10.0.0.7:80", 1)] {
        let mut cluster = Cluster::new(&two_branches(), &[3]);
        let world = cluster.units.get_mut(&3).unwrap();
        let said = key(TCP, src, dst);
        let (word, answer) = (tcp_of(&said, ACK, 7, 8, b"hello"), tcp_of(&said.reversed(), ACK, 8, 12, b""));
        assert_ne!(world.one(bus, &word).by(), bus);
        let back = if live == 0 { HOST } else { LAN };
        assert_eq!(world.one(back, &answer).by(), bus);
        assert_eq!(world.flows(), 1);
        assert_eq!(world.cores[0].live_by_unit_bucket().iter().sum::<u32>(), live);
        world.wait(20_000);
        assert_eq!(world.flows(), 0);
        assert_eq!(world.cores[0].live_by_unit_bucket().iter().sum::<u32>(), 0);
    }
}
