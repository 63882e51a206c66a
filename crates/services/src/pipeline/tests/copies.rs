//! A machine dies, and another one, which has copies of its flows, goes on with them: two gateways with hash keys, cores and
//! ports of their own.

use std::collections::BTreeMap;
use std::sync::Arc;

use packet::DropReason;
use packet::attachment::Ingress;
use packet::flow::FlowKey;
use steering::ownership::Ownership;

use super::balancing::farm;
use super::world::*;
use crate::handover::wire::{Change, HEAD_BYTES};
use crate::handover::{Entry, InheritedFlows, Refusals, Strays, owner};
use crate::spec::{DeliveryMode, GatewaySpec, NatMode, TCP, UDP};

/// Ports below this are the first machine's, the others the second one's.
const BORDER: u16 = 30_720;

/// The first machine's configuration and the second one's: they differ in the ports that they may draw from.
fn two_of(spec: &GatewaySpec) -> [GatewaySpec; 2] {
    [(BORDER, u16::MAX), (1, BORDER - 1)].map(|others| {
        let mut spec = spec.clone();
        spec.nats.iter_mut().for_each(|nat| nat.reserved = vec![others]);
        spec.host.others_ports = [("10.0.0.1".parse().unwrap(), vec![others])].into();
        spec
    })
}

fn masqueraded() -> GatewaySpec {
    let mut spec = two_interfaces();
    spec.nats.push(nat(NatMode::AddressAndPort, &["203.0.113.1", "2001:db8::1"]));
    spec
}

/// Copies as another machine keeps them.
#[derive(Default)]
struct Kept {
    flows: BTreeMap<String, Vec<u8>>,
    records: usize,
}

impl Kept {
    /// Takes in all that the cores have to tell, until all have gone through their tables twice.
    fn take(&mut self, world: &mut World) {
        let mut passes = 0;
        while passes < 2 * world.cores.len() {
            world.now_ns += 20_000_000;
            for core in &mut world.cores {
                let mut bytes = Vec::new();
                let done = core.copies(world.now_ns, 16, &mut bytes);
                // A step of the table may be more than is left.
                assert!(!done.lost && done.records <= 16 + 128);
                passes += usize::from(done.pass_ended);
                self.records += done.records;
                self.note(&bytes);
            }
        }
    }

    fn note(&mut self, mut bytes: &[u8]) {
        while bytes.len() >= HEAD_BYTES {
            let (record, rest) = bytes.split_at(Entry::length(bytes).unwrap());
            bytes = rest;
            match Change::decode(record).unwrap() {
                Change::Now(Entry::Flow(flow)) => {
                    self.flows.insert(format!("{:?}", flow.original), record.to_owned());
                }
                Change::Now(Entry::Mapping(_)) => {}
                Change::Ended(side) => drop(self.flows.remove(&format!("{side:?}"))),
            }
        }
    }
}

/// A machine with so many cores and a hash key of its own.
fn machine(cores: u8, seed: u64, spec: GatewaySpec) -> World {
    let mut world = World::new(cores, spec);
    let keys = (0u64..64).map(|turn| std::array::from_fn(|at| mix((seed + turn) * 64 + at as u64) as u8));
    world.set_ownership(Ownership::new(cores, keys).unwrap());
    world.now_ns += 77 * SECOND_NS;
    world
}

fn inherit(heir: &mut World, kept: &Kept) -> (Refusals, Strays) {
    let (mut refusals, mut strays) = (Refusals::default(), Strays::new());
    for record in kept.flows.values() {
        let mut entry = Entry::decode(record).unwrap();
        entry.forget_core();
        let core = owner(&heir.policy, &heir.ownership, &entry).unwrap();
        let Entry::Flow(flow) = &entry else { panic!("only flows are kept") };
        match heir.cores[usize::from(core)].inherit(heir.now_ns, flow) {
            Ok(keys) => strays.extend(keys.into_iter().map(|(key, tenant)| (key, tenant, core))),
            Err(reason) => refusals.add(reason),
        }
    }
    let inherited = Arc::new(InheritedFlows::default().with(strays.clone()));
    heir.cores.iter_mut().for_each(|core| core.follow_inherited(&inherited));
    (refusals, strays)
}

/// A connection or exchange: key at the client, by what it comes in, key of the replies, and sequence numbers.
struct Talk {
    key: FlowKey,
    from: Ingress,
    reply: (FlowKey, Ingress),
    sent: [u32; 2],
}

impl Talk {
    fn segment(key: &FlowKey, [seq, ack]: [u32; 2], flags: u8, payload: &[u8]) -> Vec<u8> {
        if key.protocol == TCP { tcp_of(key, flags, seq, ack, payload) } else { udp_of(key, payload) }
    }

    fn open(world: &mut World, key: FlowKey, from: Ingress) -> Self {
        let left = world.one(from, &Self::segment(&key, [1_000, 0], SYN, b""));
        let reply = (left.key().reversed(), left.by());
        let mut talk = Self { key, from, reply, sent: [1_001, 5_000] };
        world.one(talk.reply.1, &Self::segment(&reply.0, [5_000, 1_001], SYN | ACK, b""));
        talk.sent[1] += 1;
        world.one(from, &Self::segment(&key, talk.sent, ACK, b""));
        talk
    }

    fn request(&mut self, world: &mut World, bytes: usize) {
        let left = world.one(self.from, &Self::segment(&self.key, self.sent, ACK, &vec![7; bytes]));
        assert_eq!(left.key().reversed(), self.reply.0, "the same source as before");
        self.sent[0] = self.sent[0].wrapping_add(bytes as u32);
    }

    fn answer(&mut self, world: &mut World, bytes: usize) {
        let [client, server] = self.sent;
        let answer = Self::segment(&self.reply.0, [server, client], ACK, &vec![9; bytes]);
        let left = world.one(self.reply.1, &answer);
        assert_eq!(left.key().reversed(), self.key);
        self.sent[1] = server.wrapping_add(bytes as u32);
    }
}

fn from_lan(number: u16) -> (FlowKey, Ingress) {
    let protocol = if number.is_multiple_of(3) { UDP } else { TCP };
    let src = format!("10.0.0.{}", 2 + number % 40).parse().unwrap();
    let dst = format!("198.51.100.{}", 1 + number % 9).parse().unwrap();
    (FlowKey { src, dst, src_port: 4_000 + number, dst_port: 443, protocol }, LAN)
}

fn to_server(number: u16) -> (FlowKey, Ingress) {
    let key = FlowKey {
        src: format!("198.51.100.{}", 1 + number % 200).parse().unwrap(),
        dst: "203.0.113.10".parse().unwrap(),
        src_port: 4_000 + number,
        dst_port: 80,
        protocol: TCP,
    };
    (key, WAN)
}

/// For every kind of service: what was going on goes on with the same addresses and ports, whatever cores both have.
#[test]
fn flows_go_on_at_a_machine_with_another_key_and_other_cores() {
    let plain = two_interfaces;
    type Comes = fn(u16) -> (FlowKey, Ingress);
    let kinds: [(&str, GatewaySpec, Comes); 4] = [
        ("masquerade", masqueraded(), from_lan),
        ("forwarding", plain(), from_lan),
        ("virtual server", farm(NatMode::AddressAndPort, DeliveryMode::Nat), to_server),
        ("virtual server, the client's own address", farm(NatMode::None, DeliveryMode::Nat), to_server),
    ];
    for (name, spec, comes) in kinds {
        for cores in [[1, 1], [2, 3], [4, 2]] {
            let [first, second] = two_of(&spec);
            let (mut dead, mut heir) = (machine(cores[0], 1, first), machine(cores[1], 500, second));
            dead.cores.iter_mut().for_each(|core| core.begin_copies(true));
            let mut talks: Vec<Talk> = (0..60)
                .map(|number| {
                    let (key, from) = comes(number);
                    Talk::open(&mut dead, key, from)
                })
                .collect();
            let mut kept = Kept::default();
            kept.take(&mut dead);
            assert_eq!(kept.flows.len(), 60, "{name} {cores:?}");
            // Much passes that no copy tells of.
            for talk in &mut talks {
                talk.request(&mut dead, 1_000);
                if talk.key.protocol == TCP {
                    talk.sent =
                        [talk.sent[0].wrapping_add(0x5000_0000), talk.sent[1].wrapping_add(0xa000_0000)];
                }
            }
            let (refusals, _) = inherit(&mut heir, &kept);
            assert_eq!(refusals, Refusals::default(), "{name} {cores:?}");
            assert_eq!(heir.cores.iter().map(|core| core.inherited()).sum::<u32>(), 60);
            for (number, talk) in talks.iter_mut().enumerate() {
                // Either end may be first.
                if number % 2 == 0 {
                    talk.answer(&mut heir, 400);
                }
                talk.request(&mut heir, 700);
                talk.answer(&mut heir, 900);
                talk.request(&mut heir, 60);
            }
            heir.wait(20_000);
            assert_eq!((heir.flows(), heir.cores[0].inherited()), (0, 0), "{name}: nothing stays");
            assert_eq!(heir.cores.iter().map(|core| core.ports_held()).sum::<u64>(), 0, "{name}");
        }
    }
}

/// Without word of where a flow lives its replies would find nobody: that is what the list of strays is for.
#[test]
fn a_reply_that_comes_to_another_core_is_led_to_its_flow() {
    let [first, second] = two_of(&masqueraded());
    let (mut dead, mut heir) = (machine(1, 1, first), machine(4, 500, second));
    dead.cores[0].begin_copies(true);
    let mut talks: Vec<Talk> = (1..3)
        .chain(4..6)
        .chain(7..9)
        .map(|number| {
            let (key, from) = from_lan(number);
            Talk::open(&mut dead, key, from)
        })
        .collect();
    let mut kept = Kept::default();
    kept.take(&mut dead);
    let (_, strays) = inherit(&mut heir, &kept);
    assert!(!strays.is_empty(), "six flows and four cores: some replies come elsewhere");
    let stray = talks.iter_mut().find(|talk| strays.iter().any(|(key, ..)| *key == talk.reply.0)).unwrap();
    stray.answer(&mut heir, 10);
    let nothing = Arc::default();
    heir.cores.iter_mut().for_each(|core| core.follow_inherited(&nothing));
    let answer = Talk::segment(&stray.reply.0, [stray.sent[1], stray.sent[0]], ACK, b"x");
    assert!(heir.packet(stray.reply.1, &answer).iter().all(|left| left.key().reversed() != stray.key));
}

#[test]
fn only_news_is_told_and_ends_are() {
    let mut world = World::new(2, masqueraded());
    world.cores.iter_mut().for_each(|core| core.begin_copies(true));
    let mut talks: Vec<Talk> = (0..40)
        .map(|number| {
            let (key, from) = from_lan(number);
            Talk::open(&mut world, key, from)
        })
        .collect();
    // A flow without an answer is nobody's business yet.
    let (key, from) = from_lan(41);
    world.one(from, &Talk::segment(&key, [1, 0], SYN, b""));
    let mut kept = Kept::default();
    kept.take(&mut world);
    assert_eq!((kept.flows.len(), kept.records), (40, 40));
    talks.iter_mut().for_each(|talk| talk.request(&mut world, 100));
    kept.take(&mut world);
    assert_eq!(kept.records, 40, "packets alone are no news");
    // One ends in order, one is reset; both are over before they are forgotten.
    let reset = Talk::segment(&talks[1].key, talks[1].sent, RST, b"");
    world.one(talks[1].from, &reset);
    kept.take(&mut world);
    assert_eq!((kept.flows.len(), kept.records), (39, 41));
    world.wait(400);
    kept.take(&mut world);
    let udp = talks.iter().filter(|talk| talk.key.protocol == UDP).count();
    assert_eq!(kept.flows.len(), 39 - udp, "they expired");
    // Whoever begins anew hears all again.
    world.cores.iter_mut().for_each(|core| core.begin_copies(true));
    let mut again = Kept::default();
    again.take(&mut world);
    assert_eq!(again.flows.len(), kept.flows.len());
    world.cores.iter_mut().for_each(|core| core.begin_copies(false));
    let mut nothing = Vec::new();
    assert_eq!(world.cores[0].copies(world.now_ns + SECOND_NS, 9, &mut nothing), Default::default());
}

/// The sequence numbers of a copy are old: the first segment tells the present ones, and only one with ACK.
#[test]
fn a_reset_cannot_end_a_connection_whose_numbers_are_not_known() {
    let [first, second] = two_of(&masqueraded());
    let (mut dead, mut heir) = (machine(1, 1, first), machine(1, 500, second));
    dead.cores[0].begin_copies(true);
    let (key, from) = from_lan(1);
    let mut talk = Talk::open(&mut dead, key, from);
    let mut kept = Kept::default();
    kept.take(&mut dead);
    inherit(&mut heir, &kept);
    talk.sent = [0x9000_0000, 0x1000];
    heir.one(talk.from, &Talk::segment(&talk.key, [77, 0], RST, b""));
    talk.request(&mut heir, 10);
    // From here on they are known.
    let wrong = Talk::segment(&talk.reply.0, [0x7000_0000, talk.sent[0]], ACK, b"x");
    heir.dropped(talk.reply.1, &wrong, DropReason::TcpInvalid);
    talk.answer(&mut heir, 10);
    heir.one(talk.from, &Talk::segment(&talk.key, talk.sent, RST, b""));
    heir.wait(300);
    assert_eq!(heir.flows(), 0, "it was ended, and is forgotten soon");
}

/// The heir is restarted before a connection says where it is: that this is not known is not forgotten.
#[test]
fn a_restart_of_the_heir_breaks_no_silent_connection() {
    let (mut world, mut heir) = (machine(2, 1, masqueraded()), machine(1, 9, masqueraded()));
    world.cores.iter_mut().for_each(|core| core.begin_copies(true));
    let ask = key(TCP, "10.0.0.9:5000", "198.51.100.7:80");
    let reply = world.one(LAN, &tcp_of(&ask, SYN, 1_000, 0, b"")).key().reversed();
    world.one(WAN, &tcp_of(&reply, SYN | ACK, 5_000, 1_001, b""));
    world.one(LAN, &tcp_of(&ask, ACK, 1_001, 5_001, b""));
    let mut kept = Kept::default();
    kept.take(&mut world);
    let (refusals, _) = inherit(&mut heir, &kept);
    assert_eq!(refusals, Refusals::default());
    // Far on meanwhile, and only now silent.
    let spec = heir.policy.spec.clone();
    let refusals = heir.restarted(spec, 1, Some(heir.ownership.table.clone()));
    assert_eq!(refusals, Refusals::default());
    let (sent, got) = (900_001_000, 700_005_000);
    assert_eq!(heir.one(LAN, &tcp_of(&ask, ACK, sent, got, b"x")).key(), reply.reversed());
    assert_eq!(heir.one(WAN, &tcp_of(&reply, ACK, got, sent + 1, b"y")).key(), ask.reversed());
}
