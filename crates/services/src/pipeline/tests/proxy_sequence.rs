//! PROXY protocol on flows that are only passed on: the server's stream begins with the header, and both ends' numbers
//! stay their own.

use packet::checksum;
use packet::flow::FlowKey;
use packet::ip::IpHeader;
use packet::segment::complete_checksum;
use packet::vnet::{GSO_TCPV4, NEEDS_CSUM, VirtioNetHeader};
use packet::{DropReason, segment::Segmenter};

use super::balancing::farm;
use super::world::*;
use crate::fragment::Variant;
use crate::proxy_protocol::Header;
use crate::spec::{DeliveryMode, ForwardSpec, GatewaySpec, NatMode, TCP};
use crate::tcp::Segment;

const MSS_1460: [u8; 8] = [1, 2, 4, 5, 180, 1, 1, 1];

fn forward(v6: bool) -> GatewaySpec {
    let mut spec = two_interfaces();
    let (listen, to) =
        if v6 { ("[2001:db8::1]:80", "[fd00::5]:8080") } else { ("203.0.113.1:80", "10.0.0.5:8080") };
    spec.forwards.push(ForwardSpec {
        protocol: TCP,
        listen: listen.parse().unwrap(),
        to: to.parse().unwrap(),
        tenant: 0,
        ports: 1,
        proxy_protocol: true,
    });
    spec
}

fn servers(source: NatMode) -> GatewaySpec {
    let mut spec = farm(source, DeliveryMode::Nat);
    spec.servers[0].proxy_protocol = true;
    spec
}

fn segment_of(packet: &[u8]) -> (Segment, Vec<u8>) {
    let header = IpHeader::parse(packet).unwrap();
    let upper = header.payload(packet);
    let segment = Segment::of(upper).unwrap();
    (segment, upper[upper.len() - segment.payload_bytes as usize..].to_vec())
}

/// Both ends of one connection, with their own numbers.
struct Ends {
    /// As the client and the server see the client's packets.
    client: FlowKey,
    inside: FlowKey,
    first: [u32; 2],
}

/// The handshake up to the server's SYN-ACK.
fn handshake(world: &mut World, client: FlowKey, numbers: [u32; 2]) -> Ends {
    let syn = world.one(WAN, &tcp_with(&client, SYN, numbers[0], 0, &MSS_1460, b""));
    assert_eq!(segment_of(&syn.packet).0.seq, numbers[0]);
    let inside = syn.key();
    let answer =
        tcp_with(&inside.reversed(), SYN | ACK, numbers[1], numbers[0].wrapping_add(1), &MSS_1460, b"");
    let answer = world.one(LAN, &answer);
    assert_eq!(answer.key(), client.reversed());
    let header = Header::of(&client).unwrap();
    let upper = IpHeader::parse(&answer.packet).unwrap().header_bytes;
    let mss = u16::from_be_bytes([answer.packet[upper + 23], answer.packet[upper + 24]]);
    assert_eq!(usize::from(mss), 1460 - header.bytes().len(), "room for the header");
    Ends { client, inside, first: numbers.map(|number| number.wrapping_add(1)) }
}

impl Ends {
    fn of_client(&self, flags: u8, at: usize, acked: usize, payload: &[u8]) -> Vec<u8> {
        let [first, other] = self.first;
        let (seq, ack) = (first.wrapping_add(at as u32), other.wrapping_add(acked as u32));
        tcp_of(&self.client, flags, seq, ack, payload)
    }

    fn of_server(&self, flags: u8, at: usize, acked: usize, payload: &[u8]) -> Vec<u8> {
        let [other, first] = self.first;
        let (seq, ack) = (first.wrapping_add(at as u32), other.wrapping_add(acked as u32));
        tcp_of(&self.inside.reversed(), flags, seq, ack, payload)
    }

    /// The server takes what arrives.
    fn take(&self, stream: &mut [Option<u8>], packet: &[u8]) {
        let (segment, payload) = segment_of(packet);
        let at = segment.seq.wrapping_sub(self.first[0]) as usize;
        for (place, byte) in (at..).zip(payload) {
            let known = stream[place].replace(byte);
            assert!(known.is_none_or(|known| known == byte), "byte {place} changed");
        }
    }
}

/// A connection over a bad line: everything may be lost, come twice or late, in both directions.
fn transfer(world: &mut World, client: FlowKey, seed: u64) {
    let mut dice = seed;
    let mut chance = |percent: u64| {
        dice = mix(dice);
        dice % 100 < percent
    };
    let data: Vec<u8> = (0..6_000u64).map(|at| mix(at ^ seed) as u8).collect();
    let ends = handshake(world, client, [0xffff_f000 ^ mix(seed) as u32 & 0xfff, mix(seed + 1) as u32]);
    let header = Header::of(&client).unwrap();
    let length = header.bytes().len();
    let mut stream: Vec<Option<u8>> = vec![None; length + data.len()];
    let mut acked = 0;
    let mut rounds = 0;
    while stream.contains(&None) {
        rounds += 1;
        assert!(rounds < 3_000, "the connection stalls");
        // The client sends an acknowledgment or some of the next 3,000 bytes, perhaps once more.
        let at = if chance(50) { acked } else { acked + mix(seed ^ rounds) as usize % 3_000 };
        let at = at.min(data.len());
        let bytes = 1 + mix(rounds) as usize % 1400;
        let (at, end) = if chance(15) { (acked, acked) } else { (at, (at + bytes).min(data.len())) };
        let packet = ends.of_client(ACK, at, 0, &data[at..end]);
        if chance(20) {
            continue;
        }
        for left in world.packet(WAN, &packet) {
            assert_eq!((left.by(), left.key()), (LAN, ends.inside));
            if !chance(20) {
                ends.take(&mut stream, &left.packet);
            }
        }
        // The server acknowledges what it has in order.
        let have = stream.iter().position(Option::is_none).unwrap_or(stream.len());
        if !chance(20) {
            let left = world.one(LAN, &ends.of_server(ACK, 0, have, b""));
            assert_eq!(left.key(), client.reversed());
            let told = segment_of(&left.packet).0.ack.wrapping_sub(ends.first[0]) as usize;
            assert_eq!(told, have.saturating_sub(length), "the client's own numbers");
            acked = acked.max(told);
        }
    }
    let stream: Vec<u8> = stream.into_iter().flatten().collect();
    assert_eq!(stream[..length], *header.bytes());
    assert_eq!(stream[length..], data);
    let all = data.len();
    world.one(LAN, &ends.of_server(ACK, 0, stream.len(), b""));
    world.one(WAN, &ends.of_client(FIN | ACK, all, 0, b""));
    world.one(LAN, &ends.of_server(FIN | ACK, 0, stream.len() + 1, b""));
    let last = world.one(WAN, &ends.of_client(ACK, all + 1, 1, b""));
    assert_eq!(segment_of(&last.packet).0.seq, ends.first[0].wrapping_add((stream.len() + 1) as u32));
}

#[test]
fn streams_arrive_behind_the_header_whatever_the_line_does() {
    let specs = [
        ("198.51.100.7", "203.0.113.1:80", forward(false)),
        ("[2001:db8:9::7]", "[2001:db8::1]:80", forward(true)),
        ("198.51.100.7", "203.0.113.10:80", servers(NatMode::None)),
        ("198.51.100.7", "203.0.113.10:80", servers(NatMode::PortOnly)),
        ("198.51.100.7", "203.0.113.10:80", servers(NatMode::AddressAndPort)),
    ];
    for (client, listen, spec) in specs {
        let mut world = World::new(3, spec);
        for number in 0..6u64 {
            let client = key(TCP, &format!("{client}:{}", 4000 + number), listen);
            transfer(&mut world, client, mix(number));
        }
        assert_eq!(world.flows(), 6);
        world.wait(15);
        assert_eq!(world.flows(), 0);
        assert!(world.cores.iter().all(|core| core.shifts.len() == 0), "nothing is left behind");
    }
}

/// A server that speaks first (mail, ssh) has the header from the handshake's last ACK.
#[test]
fn the_last_ack_of_the_handshake_brings_the_header() {
    let mut world = World::new(1, forward(false));
    let client = key(TCP, "198.51.100.7:4000", "203.0.113.1:80");
    let ends = handshake(&mut world, client, [99, 499]);
    for _ in 0..2 {
        let left = world.one(WAN, &ends.of_client(ACK, 0, 0, b""));
        let (segment, payload) = segment_of(&left.packet);
        assert_eq!((segment.seq, segment.ack), (100, 500));
        assert_eq!(payload, Header::of(&client).unwrap().bytes());
    }
    // Part of it is acknowledged: of its bytes the client knows nothing.
    let left = world.one(LAN, &ends.of_server(ACK, 0, 10, b"220 hello"));
    assert_eq!(segment_of(&left.packet).0.ack, 100);
    let left = world.one(LAN, &ends.of_server(ACK, 9, 28, b""));
    assert_eq!(segment_of(&left.packet).0.ack, 100);
    let left = world.one(WAN, &ends.of_client(ACK, 0, 9, b"HELO"));
    let (segment, payload) = segment_of(&left.packet);
    assert_eq!((segment.seq, payload.as_slice()), (128, &b"HELO"[..]), "only once");
}

/// Super-packets with partial checksums, as every veth and most cards deliver them, before the server has the header.
#[test]
fn super_packets_stay_whole_behind_the_header() {
    let mut world = World::new(1, forward(false));
    let client = key(TCP, "198.51.100.7:4000", "203.0.113.1:80");
    let ends = handshake(&mut world, client, [99, 499]);
    let data: Vec<u8> = (0..64_000u32).map(|at| at as u8).collect();
    let mut packet = ends.of_client(ACK, 0, 0, &data);
    let upper = packet.len() - 20;
    let pseudo = checksum::fold(checksum::pseudo_header(client.src, client.dst, TCP, upper));
    packet[36..38].copy_from_slice(&pseudo.to_be_bytes());
    let offload = VirtioNetHeader {
        flags: NEEDS_CSUM,
        gso_type: GSO_TCPV4,
        gso_size: 1432,
        csum_start: 20,
        csum_offset: 16,
        hdr_len: 40,
    };
    let left = world.offloaded(WAN, &packet, offload);
    assert_eq!(left.len(), 2);
    assert!(checksum::verify_packet(&left[0].1.packet));
    let (segment, payload) = segment_of(&left[0].1.packet);
    assert_eq!((segment.seq, payload.as_slice()), (100, Header::of(&client).unwrap().bytes()));
    let (offload, whole) = &left[1];
    assert_eq!((offload.gso_size, offload.needs_csum()), (1432, true));
    let segmenter = Segmenter::new(offload, &whole.packet).unwrap();
    let mut stream = Vec::new();
    for index in 0..segmenter.segments() {
        let mut bytes = vec![0; segmenter.segment_bytes(index)];
        segmenter.write_segment(index, &mut bytes);
        complete_checksum(&mut bytes).unwrap();
        assert!(checksum::verify_packet(&bytes) && bytes.len() <= 1500);
        let (segment, payload) = segment_of(&bytes);
        assert_eq!(segment.seq as usize, 128 + stream.len());
        stream.extend(payload);
    }
    assert_eq!(stream, data);
    // One packet with a partial checksum, and the server's answer with one.
    let mut packet = ends.of_client(ACK, data.len(), 0, b"more");
    let pseudo = checksum::fold(checksum::pseudo_header(client.src, client.dst, TCP, 24));
    packet[36..38].copy_from_slice(&pseudo.to_be_bytes());
    let partial =
        VirtioNetHeader { flags: NEEDS_CSUM, csum_start: 20, csum_offset: 16, ..VirtioNetHeader::default() };
    let mut left = world.offloaded(WAN, &packet, partial).remove(0).1.packet;
    complete_checksum(&mut left).unwrap();
    assert!(checksum::verify_packet(&left));
    assert_eq!(segment_of(&left).0.seq as usize, 128 + data.len());
}

#[test]
fn a_damaged_first_segment_is_not_made_whole() {
    let mut world = World::new(1, forward(false));
    let client = key(TCP, "198.51.100.7:4000", "203.0.113.1:80");
    let ends = handshake(&mut world, client, [99, 499]);
    let mut packet = ends.of_client(ACK, 0, 0, b"data");
    packet[41] ^= 1;
    assert!(world.dropped(WAN, &packet, DropReason::TcpInvalid).is_empty());
}

/// RFC 7413: there is no room for the header in front of data in a SYN; the client sends it again without.
#[test]
fn data_in_the_syn_is_refused_and_a_new_syn_begins_anew() {
    let mut world = World::new(1, forward(false));
    let client = key(TCP, "198.51.100.7:4000", "203.0.113.1:80");
    world.dropped(WAN, &tcp_of(&client, SYN, 99, 0, b"early"), DropReason::NatUnsupported);
    world.one(WAN, &tcp_of(&client, SYN, 99, 0, b""));
    world.dropped(WAN, &tcp_of(&client, SYN, 99, 0, b"early"), DropReason::NatUnsupported);
    // Given up and begun anew with another number before anybody answered.
    let ends = handshake(&mut world, client, [7_000_099, 499]);
    let left = world.one(WAN, &ends.of_client(ACK, 0, 0, b""));
    assert_eq!(segment_of(&left.packet).0.seq, 7_000_100);
    // Closed, and the same ports again: a new header.
    world.one(LAN, &ends.of_server(RST, 0, 0, b""));
    let ends = handshake(&mut world, client, [5, 6]);
    let left = world.one(WAN, &ends.of_client(ACK, 0, 0, b""));
    assert_eq!(segment_of(&left.packet).1, Header::of(&client).unwrap().bytes());
    assert_eq!((world.flows(), world.cores[0].shifts.len()), (1, 1));
}

/// A router behind us tells the client that its packet is too long: the quote has the client's number again.
#[test]
fn errors_quote_the_clients_numbers() {
    let mut world = World::new(1, forward(false));
    let client = key(TCP, "198.51.100.7:4000", "203.0.113.1:80");
    let ends = handshake(&mut world, client, [99, 499]);
    world.one(WAN, &ends.of_client(ACK, 0, 0, b""));
    world.one(LAN, &ends.of_server(ACK, 0, 28, b""));
    let sent = world.one(WAN, &ends.of_client(ACK, 0, 0, &[7; 1000])).packet;
    assert_eq!(segment_of(&sent).0.seq, 128);
    let error = icmp_error("10.0.0.77", client.src, 3, 4, &sent);
    let left = world.one(LAN, &error).packet;
    assert_eq!(left[48..56], ends.of_client(ACK, 0, 0, &[7; 1000])[20..28], "ports and sequence number");
}

/// Numbers cannot be shifted in fragments, whatever the operator wants for them.
#[test]
fn fragments_of_shifted_flows_are_assembled() {
    let mut spec = forward(false);
    spec.limits.fragments = Variant::Bridge;
    let mut world = World::new(3, spec);
    let client = key(TCP, "198.51.100.7:4000", "203.0.113.1:80");
    let ends = handshake(&mut world, client, [99, 499]);
    world.one(WAN, &ends.of_client(ACK, 0, 0, b""));
    world.one(LAN, &ends.of_server(ACK, 0, 28, b""));
    let packet = ends.of_client(ACK, 0, 0, &[9; 1200]);
    let left: Vec<Left> = in_pieces(&packet, 400).iter().flat_map(|piece| world.packet(WAN, piece)).collect();
    assert_eq!(left.len(), 1);
    let (segment, payload) = segment_of(&left[0].packet);
    assert_eq!((segment.seq, payload), (128, vec![9; 1200]));
}
