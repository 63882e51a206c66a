//! The whole of one core's NAT, and several cores beside each other.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use proptest::prelude::*;
use steering::symmetric::core_bits;
use steering::table::Unit;

use super::lease::REST_NS;
use super::limits::CLIENT_IDLE_NS;
use super::log::{Question, who_had};
use super::mapping::MAPPING_IDLE_NS;
use packet::attachment::{Egress, Ingress, InterfaceId};

use super::*;
use crate::spec::{LeaseSpec, Mapping, NatSpec, PortChoice};

mod dependent;
mod independent;
mod leased;

/// splitmix64.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }
}

pub(super) fn draw(seed: u64) -> (FlowHasher, ReplyPorts) {
    let mut random = Random(seed);
    ReplyPorts::draw(7, 10, (0..64).map(|_| std::array::from_fn(|_| random.next() as u8))).unwrap()
}

pub(super) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(super) fn key(protocol: u8, src: &str, dst: &str) -> FlowKey {
    let (src, dst): (SocketAddr, SocketAddr) = (src.parse().unwrap(), dst.parse().unwrap());
    FlowKey { src: src.ip(), dst: dst.ip(), src_port: src.port(), dst_port: dst.port(), protocol }
}

/// Inside, at interface 0.
pub(super) fn client(key: &FlowKey, tenant: u16) -> NatClient {
    NatClient::of(key, tenant, Ingress::Interface(InterfaceId(0)))
}

/// A rule of interface 1 with ports from 1,024 on.
pub(super) fn nat(addresses: &[&str]) -> NatSpec {
    NatSpec {
        out: Some(InterfaceId(1)),
        mode: NatMode::AddressAndPort,
        addresses: addresses.iter().map(|address| ip(address)).collect(),
        from: vec![],
        from_peers: vec![],
        tenants: vec![],
        of_interface: false,
        mapping: Mapping::EndpointDependent,
        ports: (1024, 65_535),
        port_choice: PortChoice::Random,
        reserved: vec![],
        tables: 64,
        flows_per_client_max: 0,
        ports_per_client: 0,
        assemble_fragments: false,
    }
}

/// A flow key that can be ordered.
type Place = (IpAddr, u16, IpAddr, u16, u8);

fn place(key: &FlowKey) -> Place {
    (key.src, key.src_port, key.dst, key.dst_port, key.protocol)
}

/// One core with a flow table that is a plain map: reply key → what was asked and given.
struct Gateway {
    core: u8,
    nat: Nat,
    policy: Arc<NatPolicy>,
    hasher: Arc<FlowHasher>,
    solvers: Arc<ReplyPorts>,
    table: BucketTable,
    flows: BTreeMap<Place, (BindRequest, Binding)>,
    log: Vec<NatEvent>,
    random: Random,
    now_ns: u64,
    /// Flows that end were answered.
    replied: bool,
}

impl Gateway {
    fn new(core: u8, cores: u8, policy: &Arc<NatPolicy>) -> Self {
        let units: Vec<_> = (0..u16::from(cores)).map(|id| Unit { id, weight: 1 }).collect();
        let (hasher, solvers) = draw(11);
        let mut gateway = Self {
            core,
            nat: Nat::new(core, cores, &mut crate::random::Random::of_number(u64::from(core))),
            policy: Arc::clone(policy),
            hasher: Arc::new(hasher),
            solvers: Arc::new(solvers),
            table: BucketTable::new(128, &units).unwrap(),
            flows: BTreeMap::new(),
            log: Vec::new(),
            random: Random(u64::from(core)),
            now_ns: 0,
            replied: false,
        };
        gateway.follow();
        gateway
    }

    fn of(nats: &[NatSpec]) -> Self {
        Self::new(0, 1, &Arc::new(NatPolicy::compile(nats, &[], &[], &[])))
    }

    fn follow(&mut self) {
        self.nat.follow(&self.policy, &self.table, &self.hasher, &self.solvers);
    }

    fn reload(&mut self, nats: &[NatSpec]) {
        let next = NatPolicy::compile(nats, &[], &[], &[]);
        self.policy = Arc::new(next.keeping(&self.policy, self.now_ns).0);
        self.follow();
    }

    /// Binds a flow; the reply must be new and, unless said otherwise, come to this core.
    fn bind(&mut self, client: FlowKey) -> Result<Binding, DropReason> {
        self.bind_as(client, 0)
    }

    fn bind_as(&mut self, client: FlowKey, tenant: u16) -> Result<Binding, DropReason> {
        let rule =
            self.policy.rule_for(Egress::Interface(InterfaceId(1)), &self::client(&client, tenant)).unwrap();
        let request = BindRequest {
            rule,
            client,
            tenant,
            out_tenant: 5,
            random: self.random.next(),
            home: None,
            next: None,
        };
        let flows = &self.flows;
        let binding = self.nat.bind(self.now_ns, &request, |reply| flows.contains_key(&place(reply)))?;
        self.log.extend(self.nat.events());
        let reply = reply_of(&client, &binding);
        let here = self.table.owner_of_hash(self.hasher.hash(&reply, 5)) == u16::from(self.core);
        assert_eq!(binding.replies_elsewhere, !here);
        if is_translated(client.protocol) && !binding.kept {
            assert_ne!(binding.port, 0);
        }
        let earlier = self.flows.insert(place(&reply), (request, binding));
        assert!(earlier.is_none(), "{reply:?} was given twice: {earlier:?}");
        Ok(binding)
    }

    fn release(&mut self, client: &FlowKey, binding: &Binding) {
        let reply = reply_of(client, binding);
        let (request, binding) = self.flows.remove(&place(&reply)).unwrap();
        let mut record = Record { port_table: binding.table, nat: 1, ..Record::default() };
        record.flags = if binding.kept { 0 } else { flags::SOURCE_NAT };
        record.flags |= if binding.counted { flags::COUNTED } else { 0 };
        record.flags |= if binding.mapped { flags::MAPPED } else { 0 };
        record.flags |= if binding.own_port { flags::OWN_PORT } else { 0 };
        record.flags |= if self.replied { flags::REPLIED } else { 0 };
        self.nat.release(self.now_ns, &reply, 5, &record, &request.client, request.tenant);
        self.log.extend(self.nat.events());
        assert_eq!(self.nat.status().not_held, 0);
    }

    fn tick(&mut self, now_ns: u64) {
        self.now_ns = now_ns;
        for _ in 0..10 {
            self.nat.tick(now_ns);
        }
        self.log.extend(self.nat.events());
    }

    fn who(&self, binding: &Binding, protocol: u8, remote: Option<SocketAddr>) -> Vec<(u16, SocketAddr)> {
        let outside = SocketAddr::new(binding.source, binding.port);
        who_had(&self.log, &Question { outside, protocol, remote, at_ns: self.now_ns })
    }
}

/// The reply as it arrives.
fn reply_of(client: &FlowKey, binding: &Binding) -> FlowKey {
    let mut out = FlowKey { src: binding.source, ..*client };
    if is_icmp(client.protocol) {
        let id_first = out.src <= out.dst;
        (out.src_port, out.dst_port) = if id_first { (binding.port, 0) } else { (0, binding.port) };
    } else {
        out.src_port = binding.port;
    }
    out.reversed()
}

fn any_client(random: &mut Random) -> FlowKey {
    let remotes = ["198.51.100.1", "198.51.100.2", "8.8.8.8", "192.0.2.200"];
    let protocol = [6, 17, 1, 132][random.below(4)];
    let mut flow = FlowKey {
        src: IpAddr::from([10, 0, 0, random.below(4) as u8]),
        dst: ip(remotes[random.below(4)]),
        src_port: random.next() as u16,
        dst_port: [53, 80, 443][random.below(3)],
        protocol,
    };
    if protocol == 1 {
        (flow.src_port, flow.dst_port) =
            if flow.src < flow.dst { (flow.src_port, 0) } else { (0, flow.src_port) };
    }
    flow
}
