//! A process hands its flows to the next one: two gateways see the same packets, of which one is restarted in between.

use proptest::prelude::*;

use packet::attachment::Ingress;
use packet::flow::FlowKey;
use steering::assign::plan;
use steering::ownership::Ownership;
use steering::table::{BucketTable, Unit};

use super::balancing::farm;
use super::peers::{BRANCH, two_branches};
use super::world::*;
use crate::balance::ServerStatus;
use crate::handover::{Entry, Refusal, Refusals, owner};
use crate::pipeline::Services;
use crate::random::Random;
use crate::spec::{
    Affinity, BalanceMethod, DeliveryMode, ForwardSpec, GatewaySpec, Mapping, NatMode, NatSpec, PortChoice,
    RouteSpec, RuleAction, RuleSpec, TCP, UDP,
};

impl World {
    /// All that the cores know, as bytes.
    pub fn exported(&mut self) -> Vec<Vec<u8>> {
        let now_ns = self.now_ns;
        let mut records = Vec::new();
        for core in &mut self.cores {
            let mut cursor = Some(0);
            while let Some(at) = cursor {
                cursor = core.export(now_ns, at, 7, &mut |entry| {
                    let mut bytes = Vec::new();
                    entry.encode(&mut bytes).unwrap();
                    records.push(bytes);
                });
            }
        }
        records
    }

    /// A new process with the same hash key and this bucket table and configuration, whose tables are drawn anew, takes over
    /// what it can. Reasons for the rest.
    pub fn restarted(&mut self, spec: GatewaySpec, cores: u8, table: Option<BucketTable>) -> Refusals {
        let records = self.exported();
        let mut next = World::new(cores, spec);
        let ownership = Ownership::new(cores, [*self.ownership.hasher.key()]).unwrap();
        let table = table.unwrap_or_else(|| ownership.table.clone());
        next.ownership = ownership.with_table(table, ownership.alive).into();
        next.now_ns = self.now_ns + SECOND_NS;
        let core = |id: u8| {
            let random = Random::of_number(1_000 + self.now_ns + u64::from(id));
            Services::new(id, random, &next.policy, &next.ownership, next.neighbors.clone())
        };
        next.cores = (0..cores).map(core).collect();
        let mut refusals = Refusals::default();
        for bytes in records {
            let entry = Entry::decode(&bytes).unwrap();
            let taken = owner(&next.policy, &next.ownership, &entry)
                .and_then(|core| next.cores[usize::from(core)].import(next.now_ns, 1_000, &entry));
            if let Err(reason) = taken {
                refusals.add(reason);
            }
        }
        *self = next;
        refusals
    }

    fn restart(&mut self) -> Refusals {
        let (spec, table) = (self.policy.spec.clone(), self.ownership.table.clone());
        self.restarted(spec, self.ownership.cores, Some(table))
    }
}

/// Two gateways that see the same; the second one is restarted.
struct Pair(World, World);

impl Pair {
    fn new(cores: u8, spec: &GatewaySpec) -> Self {
        Self(World::new(cores, spec.clone()), World::new(cores, spec.clone()))
    }

    /// Packets that leave the one leave the other.
    #[track_caller]
    fn packet(&mut self, ingress: Ingress, packet: &[u8]) -> Vec<Left> {
        let before = self.1.drops();
        let left = self.0.packet(ingress, packet);
        let same = self.1.packet(ingress, packet);
        assert_eq!(left, same, "restarted: {:?}", self.1.new_drops(&before));
        left
    }

    #[track_caller]
    fn one(&mut self, ingress: Ingress, packet: &[u8]) -> Left {
        let mut left = self.packet(ingress, packet);
        assert_eq!(left.len(), 1);
        left.remove(0)
    }

    /// The second one is restarted; everything is taken over and held as before.
    #[track_caller]
    fn restart(&mut self) {
        self.0.now_ns += SECOND_NS;
        let refusals = self.1.restart();
        assert_eq!(refusals, Refusals::default());
        self.compare();
    }

    #[track_caller]
    fn compare(&self) {
        for (one, other) in self.0.cores.iter().zip(&self.1.cores) {
            assert_eq!(one.flows().len(), other.flows().len());
            assert_eq!(one.live(), other.live());
            assert_eq!(one.ports_held(), other.ports_held());
            assert_eq!(one.embryonic(), other.embryonic());
            assert_eq!(one.shifts.len(), other.shifts.len());
            assert_eq!(one.rule_counters.nat_flows, other.rule_counters.nat_flows);
            let (one, other) = (one.nat().status(), other.nat().status());
            assert_eq!((one.mappings, other.not_held), (other.mappings, 0));
        }
        let counts = |world: &World| -> Vec<_> {
            let servers = world.policy.balancer.status();
            let lives = |server: &ServerStatus| -> Vec<u32> {
                server.backends.iter().map(|backend| backend.live).collect()
            };
            servers.iter().map(|server| (server.live, lives(server))).collect()
        };
        assert_eq!(counts(&self.0), counts(&self.1));
    }

    /// All flows end; nothing stays held.
    fn expire(mut self) {
        for world in [&mut self.0, &mut self.1] {
            world.now_ns += 20_000 * SECOND_NS;
            world.wait(70);
            assert_eq!(world.flows(), 0);
            for core in &world.cores {
                assert_eq!((core.ports_held(), core.nat().status().not_held), (0, 0));
                assert_eq!((core.embryonic(), core.live().iter().sum::<u32>()), (0, 0));
                assert_eq!(core.nat().status().mappings, 0);
            }
        }
    }
}

/// Conversation of two ends: who asks, where that comes in, and where answers do.
#[derive(Clone, Debug)]
struct Talk {
    key: FlowKey,
    from: Ingress,
    /// As the other end knows it.
    outside: Option<(FlowKey, Ingress)>,
    sent: [u32; 2],
}

impl Talk {
    fn new(key: FlowKey, from: Ingress) -> Self {
        Self { key, from, outside: None, sent: [1_000, 5_000] }
    }

    fn packet(key: &FlowKey, kind: u8, [seq, ack]: [u32; 2], flags: u8, payload: &[u8]) -> Vec<u8> {
        match key.protocol {
            TCP => tcp_of(key, flags, seq, ack, payload),
            UDP => udp_of(key, payload),
            1 => echo(&key.src.to_string(), &key.dst.to_string(), kind, key.sender_port()),
            protocol => ip(key.src, key.dst, protocol, payload),
        }
    }

    fn open(&mut self, pair: &mut Pair) {
        let left =
            pair.one(self.from, &Self::packet(&self.key, 8, [self.sent[0], 0], SYN, b"x"[..0].as_ref()));
        self.outside = Some((left.key().reversed(), left.by()));
        self.sent[0] += 1;
    }

    fn answer(&mut self, pair: &mut Pair) {
        let (key, by) = self.outside.unwrap();
        pair.one(by, &Self::packet(&key, 0, [self.sent[1], self.sent[0]], SYN | ACK, b""));
        self.sent[1] += 1;
        let ack = Self::packet(&self.key, 8, self.sent, ACK, b"");
        pair.packet(self.from, &ack);
    }

    /// Data there and back.
    fn goes_on(&mut self, pair: &mut Pair) {
        let (key, by) = self.outside.unwrap();
        pair.one(self.from, &Self::packet(&self.key, 8, self.sent, ACK, b"question"));
        self.sent[0] += 8;
        let [client, server] = self.sent;
        pair.one(by, &Self::packet(&key, 0, [server, client], ACK, b"answer"));
        self.sent[1] += 6;
    }

    fn finish(&mut self, pair: &mut Pair) {
        let (key, by) = self.outside.unwrap();
        let [client, server] = self.sent;
        pair.one(self.from, &Self::packet(&self.key, 8, [client, server], FIN | ACK, b""));
        pair.one(by, &Self::packet(&key, 0, [server, client + 1], FIN | ACK, b""));
        self.sent = [client + 1, server + 1];
    }
}

fn masqueraded(mapping: Mapping, choice: PortChoice) -> GatewaySpec {
    let mut spec = two_interfaces();
    let mut rule = nat(NatMode::AddressAndPort, &["203.0.113.1", "203.0.113.2", "2001:db8::1"]);
    (rule.mapping, rule.port_choice) = (mapping, choice);
    spec.nats.push(rule);
    spec
}

fn forwarded() -> GatewaySpec {
    let mut spec = masqueraded(Mapping::EndpointDependent, PortChoice::Random);
    for protocol in [TCP, UDP] {
        spec.forwards.push(ForwardSpec {
            protocol,
            listen: "203.0.113.1:80".parse().unwrap(),
            to: "10.0.0.5:8080".parse().unwrap(),
            tenant: 0,
            ports: 1,
            proxy_protocol: false,
        });
    }
    spec
}

fn proxied() -> GatewaySpec {
    let mut spec = farm(NatMode::AddressAndPort, DeliveryMode::Nat);
    spec.servers[0].proxy_protocol = true;
    spec
}

fn port_only() -> GatewaySpec {
    let mut spec = two_interfaces();
    spec.nats.push(nat(NatMode::PortOnly, &[]));
    spec
}

fn firewall() -> GatewaySpec {
    let mut spec = two_interfaces();
    spec.default_action = RuleAction::Drop;
    spec.rules.push(RuleSpec { from: side(LAN), ..RuleSpec::default() });
    spec
}

fn limited() -> GatewaySpec {
    let mut spec = masqueraded(Mapping::EndpointDependent, PortChoice::Random);
    spec.nats[0].ports_per_client = 2_048;
    spec.nats[0].flows_per_client_max = 10_000;
    spec
}

/// Every kind of gateway, with what comes in to it: number of the talk → key and ingress.
type Comes = fn(u16) -> (FlowKey, Ingress);

fn from_lan(number: u16) -> (FlowKey, Ingress) {
    let protocol = [TCP, UDP, 1, 47][usize::from(number % 4)];
    let (src, dst) = (format!("10.0.0.{}", 2 + number % 50), format!("198.51.100.{}", 1 + number / 50));
    let port = 3_000 + number;
    let key = match protocol {
        1 => FlowKey::of(&echo(&src, &dst, 8, port)).unwrap(),
        47 => key(protocol, &format!("{src}:0"), &format!("{dst}:0")),
        _ => key(protocol, &format!("{src}:{port}"), &format!("{dst}:53")),
    };
    (key, LAN)
}

fn from_lan_v6(number: u16) -> (FlowKey, Ingress) {
    let protocol = [TCP, UDP][usize::from(number % 2)];
    (key(protocol, &format!("[fd00::5]:{}", 3_000 + number), "[2001:db8:7::9]:53"), LAN)
}

fn from_wan(number: u16) -> (FlowKey, Ingress) {
    let protocol = [TCP, UDP][usize::from(number % 2)];
    (key(protocol, &format!("198.51.100.7:{}", 3_000 + number), "203.0.113.1:80"), WAN)
}

fn to_server(number: u16) -> (FlowKey, Ingress) {
    (key(TCP, &format!("198.51.100.7:{}", 3_000 + number), "203.0.113.10:80"), WAN)
}

/// The branch reaches the Internet by this gateway's NAT, or another branch as it is.
fn branches() -> GatewaySpec {
    let mut spec = two_branches();
    spec.nats.push(nat(NatMode::AddressAndPort, &["203.0.113.1"]));
    spec
}

fn from_branch(number: u16) -> (FlowKey, Ingress) {
    let to = ["198.51.100.7", "10.9.0.5"][usize::from(number % 2)];
    let protocol = [TCP, UDP][usize::from(number / 2 % 2)];
    (key(protocol, &format!("10.8.0.5:{}", 3_000 + number), &format!("{to}:53")), BRANCH)
}

/// The LAN is a tenant's.
fn tenanted() -> GatewaySpec {
    let mut spec = masqueraded(Mapping::EndpointDependent, PortChoice::Random);
    spec.tenants.push("red".to_owned());
    spec.interfaces[0].tenant = 1;
    let red: Vec<_> = spec.routes.iter().filter(|route| route.egress == LAN.into()).cloned().collect();
    spec.routes.extend(red.into_iter().map(|route| RouteSpec { tenant: 1, ..route }));
    spec
}

fn gateways() -> Vec<(GatewaySpec, Comes)> {
    let random = PortChoice::Random;
    vec![
        (masqueraded(Mapping::EndpointDependent, random), from_lan),
        (masqueraded(Mapping::EndpointDependent, random), from_lan_v6),
        (masqueraded(Mapping::EndpointIndependent, random), from_lan),
        (masqueraded(Mapping::EndpointDependent, PortChoice::Preserve), from_lan),
        (limited(), from_lan),
        (port_only(), from_lan),
        (branches(), from_branch),
        (tenanted(), from_lan),
        (firewall(), from_lan),
        (firewall(), from_lan_v6),
        (forwarded(), from_wan),
        (farm(NatMode::None, DeliveryMode::Nat), to_server),
        (farm(NatMode::PortOnly, DeliveryMode::Nat), to_server),
        (farm(NatMode::AddressAndPort, DeliveryMode::Nat), to_server),
    ]
}

fn talks(pair: &mut Pair, comes: Comes, numbers: std::ops::Range<u16>) -> Vec<Talk> {
    let begin = |number| {
        let (key, from) = comes(number);
        Talk::new(key, from)
    };
    let mut talks: Vec<Talk> = numbers.map(begin).collect();
    // Those without ports to one remote are one after the other's.
    talks.retain(|talk| talk.key.protocol != 47 || talk.key.src.to_string() == "10.0.0.5");
    talks.iter_mut().for_each(|talk| talk.open(pair));
    talks
}

#[test]
fn every_packet_of_every_flow_goes_on_over_two_restarts() {
    for (spec, comes) in gateways() {
        let mut pair = Pair::new(3, &spec);
        let mut all = talks(&mut pair, comes, 0..120);
        // Some had no answer yet.
        pair.restart();
        all.iter_mut().for_each(|talk| talk.answer(&mut pair));
        pair.restart();
        all.iter_mut().for_each(|talk| talk.goes_on(&mut pair));
        all.iter_mut().rev().for_each(|talk| talk.goes_on(&mut pair));
        pair.restart();
        all.iter_mut().take(40).for_each(|talk| talk.finish(&mut pair));
        pair.restart();
        all.iter_mut().skip(40).for_each(|talk| talk.goes_on(&mut pair));
        pair.compare();
        assert_eq!(pair.1.total(|counters| counters.replies_on_wrong_core), 0);
        pair.expire();
    }
}

/// The header in front of the client's first byte is sent once more or not, as before.
#[test]
fn shifted_sequence_numbers_stay_shifted() {
    let mut pair = Pair::new(2, &proxied());
    let mut all = talks(&mut pair, to_server, 0..20);
    for talk in &mut all {
        let (key, by) = talk.outside.unwrap();
        pair.one(by, &tcp_of(&key, SYN | ACK, talk.sent[1], talk.sent[0], b""));
        talk.sent[1] += 1;
    }
    pair.restart();
    for talk in &mut all {
        let ack = tcp_of(&talk.key, ACK, talk.sent[0], talk.sent[1], b"");
        assert_eq!(pair.packet(talk.from, &ack).len(), 1, "the header");
        let (key, by) = talk.outside.unwrap();
        // The server has the header's 28 bytes.
        pair.one(by, &tcp_of(&key, ACK, talk.sent[1], talk.sent[0] + 28, b""));
    }
    pair.restart();
    for talk in &mut all {
        pair.one(talk.from, &tcp_of(&talk.key, ACK, talk.sent[0], talk.sent[1], b"question"));
        let (key, by) = talk.outside.unwrap();
        let answer = tcp_of(&key, ACK, talk.sent[1], talk.sent[0] + 28 + 8, b"answer");
        pair.one(by, &answer);
    }
    pair.expire();
}

#[test]
fn behind_direct_return_the_backend_stays() {
    let mut pair = Pair::new(2, &farm(NatMode::None, DeliveryMode::DirectReturn));
    let mut all = talks(&mut pair, to_server, 0..60);
    pair.restart();
    for talk in &mut all {
        pair.one(talk.from, &tcp_of(&talk.key, ACK, talk.sent[0], 1, b"question"));
    }
    pair.expire();
}

/// A client's mapping stays its own: for other remotes, inside out and outside in, and when it has no flow.
#[test]
fn mappings_stay_over_a_restart() {
    let mut pair = Pair::new(3, &masqueraded(Mapping::EndpointIndependent, PortChoice::Random));
    let mut outside = Vec::new();
    for number in 0..60u16 {
        let client = format!("10.0.0.7:{}", 4_000 + number);
        let left = pair.one(LAN, &udp(&client, "198.51.100.7:53", b"x"));
        outside.push((client, left.key()));
    }
    // Strangers come to some of them.
    for (_, mapped) in outside.iter().take(20) {
        let to = format!("{}:{}", mapped.src, mapped.src_port);
        pair.one(WAN, &udp("198.51.100.99:7", &to, b"stranger"));
    }
    pair.restart();
    for (client, mapped) in &outside {
        let left = pair.one(LAN, &udp(client, "198.51.100.8:53", b"another remote"));
        assert_eq!((left.key().src, left.key().src_port), (mapped.src, mapped.src_port));
        let to = format!("{}:{}", mapped.src, mapped.src_port);
        pair.one(WAN, &udp("198.51.100.99:7", &to, b"stranger"));
        pair.one(WAN, &udp("198.51.100.98:7", &to, b"a new one"));
    }
    // The flows end; the mappings are younger than that.
    pair.0.wait(45);
    pair.1.wait(45);
    assert_eq!(pair.1.flows(), 0);
    pair.restart();
    for (client, mapped) in &outside {
        let left = pair.one(LAN, &udp(client, "198.51.100.8:53", b"again"));
        assert_eq!((left.key().src, left.key().src_port), (mapped.src, mapped.src_port));
    }
    pair.expire();
}

/// Buckets that had moved keep their earlier owners, and the flows those.
#[test]
fn flows_of_buckets_that_moved_are_found_by_the_chain() {
    let mut world = masquerade(3);
    let mut pairs = Vec::new();
    for port in 3_000..3_200u16 {
        let inside = key(UDP, &format!("10.0.0.9:{port}"), "198.51.100.7:53");
        pairs.push((inside, world.one(LAN, &udp_of(&inside, b"x")).key()));
    }
    let weights: Vec<Unit> = (0..).zip([1, 0, 1]).map(|(id, weight)| Unit { id, weight }).collect();
    let table = plan(&world.ownership.table, &weights, &[]).unwrap();
    let next = world.ownership.with_table(table, world.ownership.alive);
    world.set_ownership(next);
    let on_core_1 = world.cores[1].flows().len();
    assert!(on_core_1 > 30);
    assert_eq!(world.restart(), Refusals::default());
    assert_eq!(world.cores[1].flows().len(), on_core_1);
    for (inside, outside) in &pairs {
        assert_eq!(world.one(WAN, &udp_of(&outside.reversed(), b"y")).key(), inside.reversed());
        assert_eq!(world.one(LAN, &udp_of(inside, b"x")).key(), *outside);
    }
}

/// Nobody else gets a port that an old flow has.
#[test]
fn ports_of_old_flows_are_not_given_again() {
    let mut spec = two_interfaces();
    spec.nats.push(NatSpec { ports: (2_048, 2_559), ..nat(NatMode::AddressAndPort, &["203.0.113.1"]) });
    let mut world = World::new(2, spec);
    let mut used = std::collections::BTreeSet::new();
    let mut ask = |world: &mut World, host: u8, ports: std::ops::Range<u16>| {
        for port in ports {
            let packet = udp(&format!("10.0.0.{host}:{port}"), "198.51.100.7:53", b"x");
            for left in world.packet(LAN, &packet).iter().filter(|left| left.by() == WAN) {
                assert!(used.insert(left.key().src_port), "port {} twice", left.key().src_port);
            }
        }
    };
    ask(&mut world, 5, 3_000..3_200);
    assert_eq!(world.restart(), Refusals::default());
    ask(&mut world, 6, 3_000..3_400);
    assert!(used.len() > 400, "{}", used.len());
}

/// Log lines and counts of the flows go on.
#[test]
fn counts_and_the_log_know_old_flows() {
    let mut world = masquerade(1);
    let inside = key(UDP, "10.0.0.9:3000", "198.51.100.7:53");
    for _ in 0..5 {
        world.one(LAN, &udp_of(&inside, b"12345"));
    }
    assert_eq!(world.restart(), Refusals::default());
    let left = world.one(LAN, &udp_of(&inside, b"12345")).key();
    let (flow, _) = world.cores[0].flows.find(&inside, 0).unwrap();
    assert_eq!(world.cores[0].flows().counters(flow).unwrap().packets, [6, 0]);
    let opened = &world.events[0];
    assert_eq!((opened.inside.port(), opened.outside.port()), (3_000, left.src_port));
}

/// A gateway with one flow, restarted with another configuration.
fn refused(spec: GatewaySpec, comes: Comes, change: impl Fn(&mut GatewaySpec, &FlowKey)) -> Refusals {
    let mut world = World::new(1, spec);
    let (key, from) = comes(0);
    let left = world.one(from, &Talk::packet(&key, 8, [1_000, 0], SYN, b"")).key();
    let mut spec = world.policy.spec.clone();
    change(&mut spec, &left);
    let refusals = world.restarted(spec, 1, None);
    assert_eq!(world.flows(), usize::from(refusals.total() == 0), "{refusals:?}");
    for core in &world.cores {
        assert_eq!(core.ports_held(), core.flows().len() as u64, "what is refused holds nothing");
        assert_eq!(core.nat().status().not_held, 0);
    }
    let live: u32 = world.policy.balancer.status().iter().map(|server| server.live).sum();
    assert!(live as usize <= world.flows());
    refusals
}

#[track_caller]
fn only(refusals: &Refusals) -> Refusal {
    let all: Vec<_> = refusals.iter().collect();
    assert_eq!(all.len(), 1, "{refusals:?}");
    all[0].0
}

#[test]
fn what_does_not_hold_any_more_is_refused() {
    let masquerade = || masqueraded(Mapping::EndpointDependent, PortChoice::Random);
    let mut reasons = Vec::new();
    let mut case = |spec: GatewaySpec, comes: Comes, change: &dyn Fn(&mut GatewaySpec, &FlowKey)| {
        reasons.push(only(&refused(spec, comes, change)));
    };
    case(masquerade(), from_lan, &|spec, _| spec.interfaces[0].name = "other".to_owned());
    case(masquerade(), from_lan, &|spec, _| spec.nats.clear());
    case(masquerade(), from_lan, &|spec, _| spec.nats[0].addresses = vec!["203.0.113.9".parse().unwrap()]);
    case(masquerade(), from_lan, &|spec, left| {
        spec.nats[0].reserved.push((left.src_port, left.src_port));
    });
    case(masquerade(), from_lan, &|spec, left| {
        spec.nats[0].ports = if left.src_port < 20_000 { (20_000, 65_535) } else { (1_024, 2_047) };
    });
    case(masquerade(), from_lan, &|spec, left| {
        spec.leases.push(crate::spec::LeaseSpec {
            name: "other".to_owned(),
            tenant: 0,
            from: "10.0.0.200/32".parse().unwrap(),
            address: left.src,
            first_port: left.src_port & !1_023,
            ports: 1_024,
        });
    });
    case(masquerade(), from_lan, &|spec, _| spec.default_action = RuleAction::Drop);
    case(firewall(), from_lan, &|spec, _| {
        spec.nats.push(nat(NatMode::AddressAndPort, &["203.0.113.1"]));
    });
    case(forwarded(), from_wan, &|spec, _| spec.forwards.clear());
    case(forwarded(), from_wan, &|spec, _| spec.forwards[0].to = "10.0.0.6:8080".parse().unwrap());
    let server = || farm(NatMode::AddressAndPort, DeliveryMode::Nat);
    case(server(), to_server, &|spec, _| spec.servers.clear());
    case(server(), to_server, &|spec, left| {
        spec.servers[0].backends.retain(|backend| backend.address.ip() != left.dst);
    });
    case(server(), to_server, &|spec, _| {
        spec.servers[0].source_addresses = vec!["10.0.0.3".parse().unwrap()];
    });
    case(server(), to_server, &|spec, _| {
        spec.tenants.push("red".to_owned());
        spec.interfaces[1].tenant = 1;
    });
    use Refusal::{Firewall, Interface, Port, Rule, Service, Tenant, Translation};
    assert_eq!(
        reasons,
        [
            Interface,
            Rule,
            Rule,
            Port,
            Port,
            Port,
            Firewall,
            Translation,
            Service,
            Service,
            Service,
            Service,
            Rule,
            Tenant
        ]
    );
}

#[test]
fn limits_hold_for_old_flows() {
    let mut world = World::new(1, masqueraded(Mapping::EndpointDependent, PortChoice::Random));
    for port in 0..10 {
        world.one(LAN, &udp(&format!("10.0.0.5:{}", 3_000 + port), "198.51.100.7:53", b"x"));
    }
    let mut spec = world.policy.spec.clone();
    spec.nats[0].flows_per_client_max = 4;
    let mut few = spec.clone();
    let refusals = world.restarted(spec, 1, None);
    assert_eq!((refusals.iter().collect::<Vec<_>>(), world.flows()), (vec![(Refusal::Limit, 6)], 4));
    few.limits.flows_max = 3;
    assert_eq!((world.restarted(few, 1, None).total(), world.flows()), (1, 3));
    assert_eq!(world.cores[0].ports_held(), 3);
}

#[test]
fn silent_flows_and_doubles_are_refused() {
    let mut world = masquerade(1);
    world.one(LAN, &udp("10.0.0.5:3000", "198.51.100.7:53", b"x"));
    let records = world.exported();
    let entry = Entry::decode(&records[0]).unwrap();
    let now_ns = world.now_ns;
    assert_eq!(world.cores[0].import(now_ns, 0, &entry), Err(Refusal::Known));
    // A UDP flow without an answer lives for 30 s.
    let mut next = masquerade(1);
    assert_eq!(next.cores[0].import(now_ns, 31_000, &entry), Err(Refusal::Expired));
    assert_eq!(next.cores[0].import(now_ns, 20_000, &entry), Ok(()));
    next.wait(15);
    assert_eq!(next.flows(), 0, "its age went along");
}

/// A client stays with its backend.
#[test]
fn affinity_outlives_a_restart() {
    let mut spec = farm(NatMode::None, DeliveryMode::Nat);
    (spec.servers[0].affinity, spec.servers[0].method) = (Affinity::SourceAddress, BalanceMethod::RoundRobin);
    let mut world = World::new(1, spec);
    let ask = |world: &mut World, client: u8, port: u16| {
        let client = format!("198.51.100.{client}:{port}");
        world.one(WAN, &tcp(&client, "203.0.113.10:80", SYN, 1, 0, b"")).key().dst
    };
    let had: Vec<_> = (1..20).map(|client| ask(&mut world, client, 3_000)).collect();
    assert_eq!(world.restart(), Refusals::default());
    for (client, had) in (1..20).zip(had).rev() {
        assert_eq!(ask(&mut world, client, 4_000), had);
    }
}

/// A record that names one backend and leads to another is a lie.
#[test]
fn a_flow_has_the_backend_that_it_names() {
    let mut world = World::new(1, farm(NatMode::None, DeliveryMode::Nat));
    world.one(WAN, &tcp("198.51.100.7:9", "203.0.113.10:80", SYN, 1, 0, b""));
    let records = world.exported();
    let Entry::Flow(mut flow) = Entry::decode(&records[0]).unwrap() else { panic!() };
    let backend = flow.backend.as_mut().unwrap();
    let other = ["10.0.0.11:80", "10.0.0.12:80"].map(|address| address.parse().unwrap());
    backend.address = if backend.address == other[0] { other[1] } else { other[0] };
    let mut next = World::new(1, farm(NatMode::None, DeliveryMode::Nat));
    let now_ns = next.now_ns;
    assert_eq!(next.cores[0].import(now_ns, 0, &Entry::Flow(flow)), Err(Refusal::Service));
    assert_eq!(next.policy.balancer.status()[0].live, 0);
}

/// NAT takes a port whose replies fall into the request's own bucket while there is one, which has one owner whatever the table
/// is. A flow whose directions have different buckets is refused where they come to different cores.
#[test]
fn with_other_cores_flows_are_taken_over_where_both_directions_come() {
    for (ports, hosts) in [((1_024, 65_535), 100), ((2_048, 2_559), 400)] {
        let mut spec = two_interfaces();
        spec.nats.push(NatSpec { ports, ..nat(NatMode::AddressAndPort, &["203.0.113.1"]) });
        let mut world = World::new(2, spec);
        let mut pairs = Vec::new();
        for port in 0..hosts {
            // Numbers in a row would be spread evenly: the hash is linear.
            let port = 3_000 + mix(port) % 50_000;
            let inside = key(UDP, &format!("10.0.0.5:{port}"), "198.51.100.7:53");
            let left = world.packet(LAN, &udp_of(&inside, b"x"));
            let left = left.iter().find(|left| left.by() == WAN);
            let pair = left.map(|left| (inside, left.key()));
            pairs.extend(pair.filter(|pair| !pairs.contains(pair)));
        }
        let spec = world.policy.spec.clone();
        let refusals = world.restarted(spec.clone(), 3, None);
        assert!(refusals.iter().all(|(reason, _)| reason == Refusal::Core), "{refusals:?}");
        assert_eq!(refusals.total() > 0, hosts == 400, "{refusals:?}");
        assert_eq!(world.flows() + refusals.total() as usize, pairs.len());
        let mut answered = 0;
        for (inside, outside) in &pairs {
            let answer = world.packet(WAN, &udp_of(&outside.reversed(), b"y"));
            answered += answer.iter().filter(|left| left.key() == inside.reversed()).count();
        }
        assert_eq!(answered, world.flows(), "whoever is taken over is found");
        let left = world.flows();
        assert_eq!(world.restarted(spec, 1, None), Refusals::default(), "one core has all");
        assert_eq!(world.flows(), left);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Any gateway, any number of cores, restarts anywhere in between.
    #[test]
    fn restarts_at_any_moment_change_nothing(
        kind in 0..gateways().len(),
        cores in 1u8..6,
        steps in proptest::collection::vec((0u16..40, 0u8..8), 1..80),
    ) {
        let (spec, comes) = gateways().swap_remove(kind);
        let mut world = World::new(cores, spec);
        let mut open: Vec<(FlowKey, Ingress, Left)> = Vec::new();
        for (number, action) in steps {
            let (key, from) = comes(number);
            let known = open.iter().find(|(known, ..)| *known == key);
            match (action, known) {
                (0, _) => assert_eq!(world.restart(), Refusals::default()),
                (_, Some((_, _, left))) => {
                    let again = world.one(from, &Talk::packet(&key, 8, [1_001, 5_001], ACK, b""));
                    assert_eq!((again.key(), again.outcome), (left.key(), left.outcome));
                }
                (_, None) if key.protocol != 47 => {
                    let left = world.one(from, &Talk::packet(&key, 8, [1_000, 0], SYN, b""));
                    let answer = Talk::packet(&left.key().reversed(), 0, [5_000, 1_001], SYN | ACK, b"");
                    assert_eq!(world.one(left.by(), &answer).key(), key.reversed());
                    open.push((key, from, left));
                }
                _ => {}
            }
        }
        assert_eq!(world.restart(), Refusals::default());
        for (key, from, left) in &open {
            let answer = Talk::packet(&left.key().reversed(), 0, [5_001, 1_001], ACK, b"answer");
            assert_eq!(world.one(left.by(), &answer).key(), key.reversed());
            let again = world.one(*from, &Talk::packet(key, 8, [1_001, 5_001], ACK, b"question"));
            assert_eq!(again.key(), left.key());
        }
        let keys: std::collections::HashSet<_> = open.iter().map(|(_, _, left)| left.key().reversed()).collect();
        assert_eq!(keys.len(), open.len(), "no reply is two flows'");
        assert_eq!(world.total(|counters| counters.replies_on_wrong_core), 0);
    }
}
