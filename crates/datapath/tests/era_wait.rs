//! Packets of another unit that were dispatched by a table which is not here yet wait for it; nothing is lost at a change.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::net::IpAddr;
use std::sync::Arc;

use cluster::encapsulation::Encapsulation;
use cluster::encapsulation::outer::{Outer, OuterChecksum};
use cluster::message::{Member, Role};
use cluster::snapshot::{Holding, SharedInterface, Snapshot};
use datapath::{Datapath, Handed, Output, Snapshots};
use packet::attachment::{Arrival, BondId, Egress, Ingress, InterfaceId, UnitVisit};
use packet::vnet::VirtioNetHeader;
use packet::{DropReason, PacketBuf, checksum};
use services::pipeline::{ETHERNET_BYTES, Frame, Neighbors};
use services::policy::Policy;
use services::random::Random;
use services::spec::{GatewaySpec, InterfaceSpec, LinkSpec, PeerSpec, RouteSpec};
use steering::era::Eras;
use steering::owner_chain::TTL_START;
use steering::symmetric::FlowHasher;
use steering::table::BucketTable;
use steering::units::{Leases, Units};
use tunnel::config::NodeConfig;
use tunnel::forwarder::Target;
use tunnel::node::Node;
use tunnel::time::Time;

const LAN: InterfaceId = InterfaceId(0);
const WAN: InterfaceId = InterfaceId(1);
const BOND: BondId = BondId(0);
const DISPATCHER: u16 = 2;
const PLANE: u16 = 5;

/// Counts what leaves by the interface.
#[derive(Default)]
struct Out {
    left: usize,
    dropped: Vec<DropReason>,
}

impl Output for Out {
    fn transmit(&mut self, _: &Target, _: usize, _: &[u8]) {}
    fn host(&mut self, _: &VirtioNetHeader, _: &mut [u8]) {}
    fn tap(&mut self, _: &VirtioNetHeader, _: &[u8]) {}
    fn device_ingress(&mut self, _: InterfaceId, _: &VirtioNetHeader, _: &mut [u8]) {}
    fn shared_device(&mut self, _: InterfaceId, _: &[u8]) {}
    fn interface(&mut self, interface: InterfaceId, _: &VirtioNetHeader, _: &mut [u8]) {
        assert_eq!(interface, WAN);
        self.left += 1;
    }
    fn interfaces(&mut self, _: &mut [Frame<'_>]) {}
    fn resolve(&mut self, _: InterfaceId, _: IpAddr, _: &VirtioNetHeader, _: &mut [u8]) {
        self.dropped.push(DropReason::NoNeighbor);
    }
    fn hand_over(&mut self, _: u8, _: Handed) -> bool {
        false
    }
    fn processed(&mut self, _: u32) {}
    fn dropped(&mut self, reason: DropReason) {
        self.dropped.push(reason);
    }
}

fn spec() -> GatewaySpec {
    let interface = |name: &str, address: &str, last: u8| {
        InterfaceSpec::new(name, vec![address.parse().unwrap()], LinkSpec::ethernet([2, 0, 0, 0, 0, last]))
    };
    let route = |prefix: &str, egress: Egress, via: Option<&str>| {
        RouteSpec::new(0, prefix.parse().unwrap(), egress, via.map(|via| via.parse().unwrap()))
    };
    GatewaySpec {
        interfaces: vec![interface("lan", "10.0.0.1/24", 0), interface("wan", "203.0.113.1/24", 1)],
        peers: vec![PeerSpec {
            id: BOND,
            name: "dispatcher".to_owned(),
            tenant: 0,
            allowed_ips: vec!["10.9.0.2/32".parse().unwrap()],
        }],
        tenants: vec![String::new()],
        routes: vec![
            route("10.0.0.0/24", Egress::Interface(LAN), None),
            route("0.0.0.0/0", Egress::Interface(WAN), Some("203.0.113.254")),
            route("10.9.0.2/32", Egress::Bond(BOND), None),
        ],
        ..GatewaySpec::default()
    }
}

fn table(era: u32) -> BucketTable {
    BucketTable::from_owners(era, vec![PLANE; 2]).unwrap()
}

/// The cluster as the data plane knows it: era 4, and 5 if it has come.
fn cluster(newer: bool) -> Arc<Snapshot> {
    let member =
        |node, role| Member { node, role, weight: 1, address: format!("10.9.0.{node}").parse().unwrap() };
    let mut eras = Eras::new(table(4));
    if newer {
        eras.install(table(5));
    }
    let hasher = FlowHasher::new([7; 40]);
    Arc::new(Snapshot {
        number: 1 + u64::from(newer),
        role: Role::DataPlane,
        units: Arc::new(Units { node: PLANE, hasher, eras, in_force: 4, leases: Leases::default() }),
        members: vec![member(DISPATCHER, Role::Dispatcher), member(PLANE, Role::DataPlane)],
        order: vec![PLANE],
        shared: vec![SharedInterface {
            ifid: 0,
            interface: LAN,
            addresses: vec!["10.0.0.1".parse().unwrap()],
            dispatchers: Vec::new(),
            holding: Arc::new(Holding::new(true)),
        }],
        hub_port: None,
        answers_too_big: true,
    })
}

struct World {
    datapath: Datapath,
    snapshots: Snapshots,
    out: Out,
    now: Time,
}

impl World {
    fn new() -> Self {
        let config = NodeConfig::of_number(1, 1);
        let ownership = config.ownership.load_full();
        let node = Arc::new(Node::new(config));
        let mut neighbors = Neighbors { version: 1, ..Neighbors::default() };
        neighbors.known.insert((WAN, "203.0.113.254".parse().unwrap()), [2, 0, 0, 0, 2, 254]);
        let (policy, _) = Policy::compile(spec(), None, 0).unwrap();
        let snapshots = Snapshots {
            policy: Arc::new(policy),
            ownership,
            neighbors: Arc::new(neighbors),
            cluster: Some(cluster(false)),
            inherited: Arc::default(),
            lan: None,
            serving: true,
            opened_ports: Arc::default(),
        };
        let now = Time::from_ns(1_000_000_000_000);
        let datapath = Datapath::new(0, node, Random::of_number(1), snapshots.clone());
        Self { datapath, snapshots, out: Out::default(), now }
    }

    /// A first packet of a flow, dispatched by era 4 or 5.
    fn arrives(&mut self, src_port: u16, era: u32) {
        let mut frame =
            vec![2, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 9, 8, 0, 0x45, 0, 0, 32, 0, 0, 0x40, 0, 64, 17, 0, 0];
        frame.extend([10, 0, 0, 5, 203, 0, 113, 9]);
        let sum = checksum::finish(checksum::sum(&frame[ETHERNET_BYTES..], 0));
        frame[ETHERNET_BYTES + 10..ETHERNET_BYTES + 12].copy_from_slice(&sum.to_be_bytes());
        for field in [src_port, 7, 12, 0] {
            frame.extend(field.to_be_bytes());
        }
        frame.extend(b"data");
        let visit = UnitVisit {
            arrival: Arrival::Outside,
            ttl: TTL_START,
            odd_era: era & 1 == 1,
            dispatcher: DISPATCHER,
        };
        let mut packet = PacketBuf::with_capacity(2_048);
        assert!(packet.copy_from(&frame));
        let head = Encapsulation::of_visit(PLANE, 0, &visit);
        head.write(packet.grow_front(head.bytes()));
        let outer = Outer {
            source: "10.9.0.2".parse().unwrap(),
            destination: "10.9.0.5".parse().unwrap(),
            source_port: 50_000,
            traffic_class: 0,
        };
        packet.grow_front(outer.bytes());
        assert!(outer.write(packet.packet_mut(), OuterChecksum::Zero) > 0);
        packet.ingress = Ingress::Bond(BOND);
        self.datapath.begin(self.now);
        self.datapath.handed(self.now, Handed::Bond(packet), &mut self.out);
        self.datapath.finish(self.now, &mut self.out);
    }

    /// A round after so long; when the next is due.
    fn pass(&mut self, ms: u64) -> Time {
        self.now = self.now.plus_us(ms * 1_000);
        self.datapath.begin(self.now);
        self.datapath.finish(self.now, &mut self.out)
    }

    fn table_comes(&mut self) {
        self.snapshots.cluster = Some(cluster(true));
        self.datapath.follow(&self.snapshots);
    }

    fn era_unknown(&self) -> u64 {
        self.datapath.service_drops().get(DropReason::EraUnknown)
    }
}

#[test]
fn a_packet_of_an_era_that_is_not_held_waits_for_it() {
    let mut world = World::new();
    world.arrives(1_000, 4);
    assert_eq!((world.out.left, world.out.dropped.as_slice()), (1, &[][..]));
    for src_port in 2_000..2_010 {
        world.arrives(src_port, 5);
    }
    // One of a flow that is here needs no table.
    world.arrives(1_000, 5);
    assert_eq!((world.out.left, world.era_unknown()), (2, 0));
    let due = world.pass(50);
    assert!(due <= world.now.plus_us(150_000), "somebody looks again in time");
    world.table_comes();
    world.pass(1);
    assert_eq!((world.out.left, world.era_unknown()), (12, 0));
    assert_eq!(world.datapath.services.counters.units.waited_for_era, 10);
}

#[test]
fn a_table_that_does_not_come_is_waited_for_briefly() {
    let mut world = World::new();
    for src_port in 2_000..2_010 {
        world.arrives(src_port, 5);
    }
    world.pass(190);
    assert_eq!(world.era_unknown(), 0);
    // Another snapshot without it, late: nobody waits longer because of that.
    world.datapath.follow(&world.snapshots.clone());
    world.pass(5);
    assert_eq!(world.era_unknown(), 0);
    world.pass(10);
    assert_eq!((world.out.left, world.era_unknown()), (0, 10));
    world.table_comes();
    world.pass(1);
    assert_eq!(world.out.left, 0, "once");
}

#[test]
fn only_so_many_wait() {
    let mut world = World::new();
    for src_port in 2_000..3_000 {
        world.arrives(src_port, 5);
    }
    assert_eq!(world.era_unknown(), 1_000 - 256);
    world.table_comes();
    world.pass(1);
    assert_eq!(world.out.left, 256);
}
