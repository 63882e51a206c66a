#![allow(clippy::unwrap_used, reason = "tests")]
//! The program against the Rust code it mirrors, packet by packet, in the kernel.

use packet::flow::FlowKey;
use steering::symmetric::{FlowHasher, core_bucket};

use super::*;

mod machine;

/// A small generator, so that each failure can be repeated.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    fn byte(&mut self) -> u8 {
        self.next() as u8
    }
    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.byte()).collect()
    }
    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

const PROTOCOLS: [u8; 13] = [6, 17, 132, 136, 1, 58, 47, 50, 51, 59, 0, 60, 255];

fn upper(random: &mut Random, protocol: u8, quote: Option<Vec<u8>>) -> Vec<u8> {
    match (protocol, quote) {
        (1, Some(quote)) => {
            let kind = random.pick(&[3u8, 4, 5, 11, 12, 99]);
            [vec![kind, 0, 0, 0, 0, 0, 0, 0], quote].concat()
        }
        (58, Some(quote)) => {
            let kind = random.pick(&[1u8, 2, 3, 4, 99]);
            [vec![kind, 0, 0, 0, 0, 0, 0, 0], quote].concat()
        }
        (1, None) => {
            [vec![random.pick(&[0u8, 8, 13, 14, 15, 17, 18, 42, 43, 3, 9])], random.bytes(11)].concat()
        }
        (58, None) => [vec![random.pick(&[128u8, 129, 160, 161, 1, 4, 135])], random.bytes(11)].concat(),
        _ => {
            let bytes = random.below(40);
            random.bytes(bytes)
        }
    }
}

fn ipv4(random: &mut Random, depth: usize) -> Vec<u8> {
    let protocol = random.pick(&PROTOCOLS);
    let quote = (depth > 0 && random.below(2) == 0).then(|| quote(random, 4, depth - 1));
    let body = upper(random, protocol, quote);
    let options = if random.below(4) == 0 { random.below(11) * 4 } else { 0 };
    let fragment: u16 = if random.below(5) == 0 { random.next() as u16 } else { random.pick(&[0, 0x4000]) };
    let total = 20 + options + body.len();
    let mut packet = vec![0x40 | ((20 + options) / 4) as u8, random.byte()];
    packet.extend((total as u16).to_be_bytes());
    packet.extend(random.bytes(2));
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0]);
    let source = address(random, 4);
    packet.extend(&source);
    let same = random.below(10) == 0;
    packet.extend(if same { source } else { address(random, 4) });
    packet.extend(random.bytes(options));
    packet.extend(body);
    packet
}

/// Addresses that share a prefix often, so that the comparison has to go to the end.
fn address(random: &mut Random, bytes: usize) -> Vec<u8> {
    let mut address = vec![0xfd; bytes];
    let from = random.below(bytes);
    let tail = random.bytes(bytes - from);
    address[from..].copy_from_slice(&tail);
    address
}

fn extensions(random: &mut Random) -> Vec<(u8, Vec<u8>)> {
    let count = if random.below(2) == 0 { 0 } else { random.below(10) };
    (0..count)
        .map(|_| match random.pick(&[0u8, 43, 44, 51, 60, 135, 139, 140]) {
            44 => {
                let flags: u16 =
                    if random.below(2) == 0 { random.next() as u16 } else { random.pick(&[0, 6]) };
                (44, [vec![random.byte()], flags.to_be_bytes().to_vec(), random.bytes(4)].concat())
            }
            51 => {
                let words = random.below(4);
                (51, [vec![words as u8], random.bytes((words + 2) * 4 - 2)].concat())
            }
            other => {
                let units = random.below(3);
                (other, [vec![units as u8], random.bytes((units + 1) * 8 - 2)].concat())
            }
        })
        .collect()
}

fn ipv6(random: &mut Random, depth: usize) -> Vec<u8> {
    let protocol = random.pick(&PROTOCOLS);
    let quote = (depth > 0 && random.below(2) == 0).then(|| quote(random, 6, depth - 1));
    let body = upper(random, protocol, quote);
    let headers = extensions(random);
    let mut chain = Vec::new();
    for (index, (_, rest)) in headers.iter().enumerate() {
        chain.push(headers.get(index + 1).map_or(protocol, |(next, _)| *next));
        chain.extend(rest);
    }
    let first = headers.first().map_or(protocol, |(kind, _)| *kind);
    let mut packet = vec![0x60 | (random.byte() >> 4), random.byte(), 0, 0];
    packet.extend(((chain.len() + body.len()) as u16).to_be_bytes());
    packet.extend([first, 64]);
    let source = address(random, 16);
    packet.extend(&source);
    let same = random.below(10) == 0;
    packet.extend(if same { source } else { address(random, 16) });
    packet.extend(chain);
    packet.extend(body);
    packet
}

fn quote(random: &mut Random, version: u8, depth: usize) -> Vec<u8> {
    // Sometimes of the other version, which cannot be.
    let version = if random.below(20) == 0 { 10 - version } else { version };
    let mut packet = if version == 4 { ipv4(random, depth) } else { ipv6(random, depth) };
    if random.below(2) == 0 {
        let keep = random.below(packet.len() + 1);
        packet.truncate(keep);
    }
    packet
}

fn packet(random: &mut Random) -> Vec<u8> {
    let mut packet = if random.below(2) == 0 { ipv4(random, 2) } else { ipv6(random, 2) };
    match random.below(12) {
        // Padding behind the packet.
        0 => packet.extend(vec![0; 5]),
        // Cut.
        1 => {
            let keep = random.below(packet.len() + 1);
            packet.truncate(keep);
        }
        // A wrong byte anywhere.
        2 => {
            let at = random.below(packet.len());
            packet[at] = random.byte();
        }
        _ => {}
    }
    packet
}

/// The program in the kernel, and in the interpreter of these tests. Who may not load programs still tests
/// the program.
struct Subject {
    machine: machine::Machine,
    buckets: usize,
    kernel: Option<SteeringProgram>,
}

impl Subject {
    fn new(hasher: &FlowHasher, tenant: u16, owners: &[u16]) -> Subject {
        let kernel = match SteeringProgram::load(hasher, tenant, owners) {
            Ok(program) => Some(program),
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
                assert!(!rustix::process::getuid().is_root(), "root may load programs");
                None
            }
        };
        let buckets = owners.len().clamp(BUCKETS_MIN, TABLE_BUCKETS_MAX);
        let code = generate::program(0, 1, buckets).unwrap();
        let maps = [table_bytes(hasher, tenant), owner_bytes(owners, buckets)];
        Subject { machine: machine::Machine { code, maps }, buckets, kernel }
    }

    fn update_table(&mut self, owners: &[u16]) {
        self.machine.maps[1] = owner_bytes(owners, self.buckets);
        if let Some(kernel) = &self.kernel {
            kernel.update_table(owners).unwrap();
        }
    }

    /// Runs the program on an IP packet.
    fn run(&self, packet: &[u8]) -> u32 {
        let result = self.machine.run(packet);
        if let Some(kernel) = &self.kernel {
            // The kernel wants an Ethernet header, which the program does not see. An experimental type: it
            // would refuse IP packets that are cut.
            let frame = [&[0u8; 12][..], &[0x88, 0xb5], packet].concat();
            assert_eq!(kernel::testing::run(kernel, &frame, 1).unwrap().0, result, "kernel, interpreter");
        }
        result
    }
}

/// With every bucket its own owner the result is the upper half of the hash.
fn identity() -> Vec<u16> {
    (0..=u16::MAX).collect()
}

#[test]
fn the_program_computes_the_rust_hash_for_random_packets() {
    let mut random = Random(0x1234_5678_9abc_def1);
    let (mut keys, mut with_ports, mut v6, mut malformed) = (0, 0, 0, 0);
    for tenant in [0, 0xbeef] {
        let hasher = FlowHasher::new(random.bytes(40).try_into().unwrap());
        let program = Subject::new(&hasher, tenant, &identity());
        for _ in 0..10_000 {
            let packet = packet(&mut random);
            let queue = program.run(&packet);
            match FlowKey::of(&packet) {
                Ok(key) => {
                    let hash = hasher.hash(&key, tenant);
                    assert_eq!(queue, hash >> 16, "{key:?} of {packet:02x?}");
                    assert_eq!(queue as usize, core_bucket(hash, TABLE_BUCKETS_MAX));
                    keys += 1;
                    with_ports += u32::from(key.src_port != 0 || key.dst_port != 0);
                    v6 += u32::from(key.src.is_ipv6());
                }
                Err(_) => {
                    assert_eq!(queue, 0, "malformed {packet:02x?}");
                    malformed += 1;
                }
            }
        }
    }
    // The generator has really been everywhere.
    assert!(
        keys > 12_000 && with_ports > 4_000 && v6 > 4_000 && malformed > 500,
        "{keys} {with_ports} {v6} {malformed}"
    );
}

#[test]
fn both_directions_and_the_icmp_error_about_them_go_to_one_queue() {
    // Not a periodic key: with one, the order of the endpoints would not matter.
    let hasher = FlowHasher::new(std::array::from_fn(|index| (index * index * 7 + 3) as u8));
    let program = Subject::new(&hasher, 0, &identity());
    let header = |protocol: u8, payload: usize, source: [u8; 4], destination: [u8; 4]| {
        let mut packet = vec![0x45, 0, 0, (20 + payload) as u8, 0, 1, 0, 0, 64, protocol, 0, 0];
        packet.extend(source);
        packet.extend(destination);
        packet
    };
    let (a, b, router) = ([10, 1, 2, 3], [192, 0, 2, 77], [203, 0, 113, 1]);
    let there = [header(6, 20, a, b), vec![0x30, 0x39, 0x01, 0xbb], vec![0; 16]].concat();
    let back = [header(6, 20, b, a), vec![0x01, 0xbb, 0x30, 0x39], vec![0; 16]].concat();
    let error = [header(1, 8 + 28, router, a), vec![3, 4, 0, 0, 0, 0, 5, 0], there[..28].to_vec()].concat();
    let queue = program.run(&there);
    assert_eq!(queue, program.run(&back));
    assert_eq!(queue, program.run(&error));
    let ping = [header(1, 8, a, b), vec![8, 0, 0, 0, 0x12, 0x34, 0, 1]].concat();
    let pong = [header(1, 8, b, a), vec![0, 0, 0, 0, 0x12, 0x34, 0, 9]].concat();
    assert_eq!(program.run(&ping), program.run(&pong));
    assert_ne!(program.run(&ping), queue);
}

#[test]
fn the_table_is_replaced_live_and_repeated_when_small() {
    let hasher = FlowHasher::new([0x21; 40]);
    let mut program = Subject::new(&hasher, 0, &[3; 128]);
    let mut random = Random(77);
    let packets: Vec<_> = std::iter::repeat_with(|| packet(&mut random))
        .filter(|packet| FlowKey::of(packet).is_ok())
        .take(300)
        .collect();
    assert!(packets.iter().all(|packet| program.run(packet) == 3));
    for buckets in [1usize, 2, 128, 1024] {
        let owners: Vec<u16> = (0..buckets).map(|bucket| bucket as u16 ^ 5).collect();
        program.update_table(&owners);
        for packet in &packets {
            let bucket = core_bucket(hasher.hash(&FlowKey::of(packet).unwrap(), 0), buckets);
            assert_eq!(program.run(packet), u32::from(owners[bucket]));
        }
    }
    let Some(program) = program.kernel else { return };
    for wrong in [0, 3, 2048] {
        assert_eq!(program.update_table(&vec![0; wrong]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
    assert!(SteeringProgram::load(&hasher, 0, &[0; 100]).is_err());
}
