//! The fast path ([`Services::established_fast`](super::super::Services)) has to be the slow path in all that it does: two gateways
//! of the same seeds are given the same random packets in the same batches, one of them without the fast path.

use std::net::IpAddr;
use std::sync::Arc;

use packet::PacketPool;
use packet::attachment::{Egress, Ingress};
use packet::checksum;
use packet::flow::FlowKey;
use packet::vnet::{NEEDS_CSUM, VirtioNetHeader};

use super::world::*;
use crate::pipeline::{ETHERNET_BYTES, Frame, Handed, Neighbors, Outcome, Output};
use crate::spec::{NatMode, TCP, UDP};

/// Output of a core besides its frames.
#[derive(Default, Debug)]
struct Emitted(Vec<(Outcome, Vec<u8>)>, PacketPool);

impl PartialEq for Emitted {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl Output for Emitted {
    fn emit(&mut self, outcome: Outcome, _: Option<&FlowKey>, _: &VirtioNetHeader, bytes: &mut [u8]) {
        self.0.push((outcome, bytes.to_vec()));
    }

    fn to_unit(&mut self, _: u16, _: &Frame<'_>) {}

    fn hand_over(&mut self, _: u8, _: Handed) -> bool {
        false
    }

    fn buffers(&mut self) -> &mut PacketPool {
        &mut self.1
    }
}

/// A conversation as its client sees it.
#[derive(Clone)]
struct Talk {
    request: FlowKey,
    /// As the server sees it, once a packet has left.
    leaving: Option<FlowKey>,
    /// Next numbers of client and server.
    seq: [u32; 2],
}

struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 += 1;
        mix(self.0) % end
    }

    fn one_in(&mut self, of: u64) -> bool {
        self.below(of) == 0
    }
}

fn talks() -> Vec<Talk> {
    let mut talks = Vec::new();
    for number in 0..24u16 {
        let protocol = if number % 3 == 0 { UDP } else { TCP };
        let (src, dst) = if number % 4 == 3 {
            (format!("[fd00::{}]:{}", 5 + number % 5, 2000 + number), "[2001:db8:7::1]:443".to_owned())
        } else {
            (format!("10.0.0.{}:{}", 5 + number % 5, 2000 + number), "198.51.100.7:443".to_owned())
        };
        let seq = [u32::from(number) << 20, u32::MAX - 3_000];
        talks.push(Talk { request: key(protocol, &src, &dst), leaving: None, seq });
    }
    talks
}

/// A packet of a conversation: mostly what a sound end would send next, now and then nonsense.
fn packet(random: &mut Random, talk: &mut Talk) -> (Ingress, Vec<u8>) {
    let reply = talk.leaving.is_some() && random.one_in(2);
    let key = if reply { talk.leaving.unwrap_or(talk.request).reversed() } else { talk.request };
    let payload = vec![7; [0, 1, 5, 400, 1_452, 1_460, 1_480][random.below(7) as usize]];
    let mut packet = if key.protocol == UDP {
        udp_of(&key, &payload)
    } else {
        let (own, other) = if reply { (1, 0) } else { (0, 1) };
        let flags = match random.below(24) {
            0 => SYN,
            1 if reply => SYN | ACK,
            2 => FIN | ACK,
            3 if random.one_in(4) => RST,
            4..=8 => ACK | 0x08,
            _ => ACK,
        };
        let off = match random.below(16) {
            0 => random.below(u64::from(u32::MAX)) as u32,
            1 => random.below(200_000) as u32,
            2 => (random.below(2_000) as u32).wrapping_neg(),
            _ => 0,
        };
        let seq = talk.seq[own].wrapping_add(off);
        let packet = tcp_of(&key, flags, seq, talk.seq[other], &payload);
        if off == 0 {
            let numbers = payload.len() as u32 + u32::from(flags & (SYN | FIN) != 0);
            talk.seq[own] = talk.seq[own].wrapping_add(numbers);
        }
        packet
    };
    if random.one_in(6) {
        damage(random, &mut packet);
    }
    (if reply { WAN } else { LAN }, packet)
}

/// A field of the IP header is another; IPv4 header checksums are right again.
fn damage(random: &mut Random, packet: &mut Vec<u8>) {
    let v4 = packet[0] >> 4 == 4;
    match random.below(6) {
        0 => packet[if v4 { 8 } else { 7 }] = random.below(3) as u8,
        1 => packet.truncate(random.below(packet.len() as u64 + 1) as usize),
        2 => packet.extend([0; 9]),
        3 if v4 => packet[6] = random.below(256) as u8,
        4 if v4 => packet[0] = 0x46,
        _ => {
            let at = random.below(packet.len().min(60) as u64) as usize;
            packet[at] ^= 1 << random.below(8);
        }
    }
    if packet.len() >= 20 && packet[0] >> 4 == 4 {
        packet[10..12].fill(0);
        let sum = checksum::finish(checksum::sum(&packet[..20], 0));
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }
}

fn world(mode: NatMode) -> World {
    let mut spec = two_interfaces();
    spec.interfaces[1].mtu = 1_480;
    match mode {
        NatMode::None => {}
        mode => spec.nats.push(nat(mode, &["203.0.113.1", "2001:db8::1"])),
    }
    let mut world = World::new(1, spec);
    let mut neighbors = Neighbors { version: 1, ..Neighbors::default() };
    for (interface, known) in [
        (WAN, "203.0.113.254"),
        (WAN, "2001:db8::fe"),
        (LAN, "10.0.0.5"),
        (LAN, "10.0.0.6"),
        (LAN, "10.0.0.7"),
        (LAN, "fd00::8"),
    ] {
        let id = interface.interface().unwrap();
        neighbors.known.insert((id, known.parse::<IpAddr>().unwrap()), [2, 0, 0, 0, 1, id.0 as u8]);
    }
    world.neighbors = Arc::new(neighbors);
    let (policy, ownership) = (Arc::clone(&world.policy), Arc::clone(&world.ownership));
    world.cores[0].follow(&policy, &ownership, &world.neighbors);
    world
}

fn flows_of(world: &World) -> Vec<String> {
    let core = &world.cores[0];
    let (flows, _) = core.flows().scan(0, 10_000);
    flows.map(|id| format!("{:?} {:?}", core.entry(id, world.now_ns), core.flows().counters(id))).collect()
}

#[test]
fn the_fast_path_does_what_the_other_does() {
    let mut short = 0;
    for seed in 0..60u64 {
        let mode = [NatMode::AddressAndPort, NatMode::PortOnly, NatMode::None][seed as usize % 3];
        let mut worlds = [world(mode), world(mode)];
        worlds[1].cores[0].fast_path.off = true;
        let (mut random, mut talks) = (Random(seed << 32), talks());
        for round in 0..60 {
            let count = 1 + random.below(40) as usize;
            let sent: Vec<_> = (0..count)
                .map(|_| {
                    let talk = random.below(24) as usize;
                    let (port, packet) = packet(&mut random, &mut talks[talk]);
                    let flags = if random.one_in(5) { NEEDS_CSUM } else { 0 };
                    let offload =
                        VirtioNetHeader { flags, csum_start: 20, csum_offset: 6, ..Default::default() };
                    (talk, port, offload, packet)
                })
                .collect();
            let [first, second] = worlds.each_mut().map(|world| {
                let mut bytes: Vec<Vec<u8>> = sent
                    .iter()
                    .map(|(_, _, _, packet)| [&[0; ETHERNET_BYTES], &packet[..]].concat())
                    .collect();
                let mut frames: Vec<_> = bytes
                    .iter_mut()
                    .zip(&sent)
                    .map(|(bytes, (_, port, offload, _))| Frame::new(*port, *offload, bytes))
                    .collect();
                let mut emitted = Emitted::default();
                world.cores[0].batch(world.now_ns, &mut frames, &mut emitted);
                let outcomes: Vec<_> = frames.iter().map(|frame| (frame.outcome, frame.flow)).collect();
                world.now_ns += 40_000_000;
                world.cores[0].tick(world.now_ns);
                let core = &world.cores[0];
                let state = format!("{:?} {:?} {}", core.counters, core.drops, core.embryonic());
                (outcomes, bytes, emitted, state)
            });
            assert_eq!(first, second, "seed {seed}, round {round}");
            for ((talk, port, _, _), (bytes, (outcome, _))) in sent.iter().zip(first.1.iter().zip(&first.0)) {
                if *port == LAN
                    && matches!(
                        outcome,
                        Outcome::Forward(Egress::Interface(WAN_ID)) | Outcome::Resolve(WAN_ID, _)
                    )
                {
                    talks[*talk].leaving = FlowKey::of(&bytes[ETHERNET_BYTES..]).ok();
                }
            }
            if round % 20 == 19 {
                for world in &mut worlds {
                    let spec = world.policy.spec.clone();
                    world.reload(spec);
                }
            }
        }
        assert_eq!(flows_of(&worlds[0]), flows_of(&worlds[1]), "seed {seed}");
        assert!(!worlds[0].cores[0].flows().is_empty());
        short += worlds[0].cores[0].fast_path.taken;
        assert_eq!(worlds[1].cores[0].fast_path.taken, 0);
    }
    assert!(short > 10_000, "the fast path was hardly taken: {short}");
}
