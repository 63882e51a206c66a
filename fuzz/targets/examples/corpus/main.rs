//! Writes the seeds of every corpus, named by what they are: `cargo run -p fuzz-targets --example corpus`.
//!
//! Findings of the fuzzer are added by hand, under a name that says what it was. Handshake seeds hold fresh ephemeral
//! keys, so a seed that exists stays as it is.
#![allow(clippy::unwrap_used, reason = "a tool for developers")]

mod cluster_seeds;
mod flow_record_seeds;
mod gateway_seeds;
mod switch_seeds;

use std::fs;
use std::path::Path;

use cluster::encapsulation::outer::{Outer, OuterChecksum};
use cluster::encapsulation::{Encapsulation, Handoff, Hook, Route};
use fuzz_targets::fragment_steps::{BRIDGE, MORE, RAW, SIX, STEP_BYTES, TIGHT};
use fuzz_targets::translate::{HIDE, OTHER_VERSION, PARTIAL, crc32c};
use fuzz_targets::{reassembly_steps, seeds, track};
use packet::segment::complete_checksum;
use packet::vnet::{GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM};
use packet::{IpHeader, VirtioNetHeader, checksum};
use steering::table::{BucketTable, Unit};
use tunnel::frame::{self, CloseReason, Frame, NackRange, PacketHead, PeerPathState, PieceHead, ReportEntry};
use tunnel::handshake::{Initiator, open_initiation};
use tunnel::header::{Header, Kind, NOT_TOLD};
use tunnel::mac::{Guard, GuardLimits};
use tunnel::order::Order;
use tunnel::time::Time;

fn main() {
    headers();
    frames();
    tables();
    handshakes();
    tamperings();
    packets();
    configs();
    fragments();
    translations();
    conversations();
    encapsulations();
    reassemblies();
    cluster_seeds::cluster_messages();
    cluster_seeds::cluster_talks();
    cluster_seeds::cluster_states();
    flow_record_seeds::flow_records();
    switch_seeds::ethernet();
    gateway_seeds::gateways();
    gateway_seeds::peers();
    gateway_seeds::proxied();
    gateway_seeds::health();
    gateway_seeds::requests();
    gateway_seeds::leases();
    gateway_seeds::kernel();
}

fn save(target: &str, name: &str, bytes: &[u8]) {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../corpus")).join(target);
    fs::create_dir_all(&folder).unwrap();
    let file = folder.join(name);
    if !file.exists() {
        fs::write(file, bytes).unwrap();
    }
}

fn headers() {
    for number in 1..=6 {
        let kind = Kind::from_number(number).unwrap();
        let header = Header {
            kind,
            receiving_core: if kind.is_handshake() { NOT_TOLD } else { 1 },
            sending_core: 0,
            path: 2,
            receiver_index: seeds::LISTENER_INDEX,
            counter: 3,
        };
        save("header", &format!("{kind:?}").to_lowercase(), &header.to_bytes());
    }
    save("header", "empty", &[]);
    save("header", "one-byte-short", &[0x14; 15]);
    save("header", "foreign-version", &[0x24; 16]);
    save("header", "unknown-kind", &[0x1f; 16]);
}

fn frames() {
    let order = Order { stamp: 0xffff_ffff, back: 3, same_path: true };
    let head = PacketHead { order: Some(order), bytes: Some(40), ..PacketHead::default() };
    let body = ipv4(17, &udp(32 - 20));
    let packet =
        Frame::Packet { head: PacketHead { bytes: Some(body.len() as u16), ..head }, start: 0, body: &body };
    let last = PacketHead { tenant: Some(7), partial: true, group: true, bytes: None, ..head };
    let last = Frame::Packet { head: last, start: 0, body: &body };
    let piece = |offset: u16, total: u16, bytes: Option<u16>| PieceHead {
        ethernet: false,
        partial: false,
        group: false,
        order,
        total,
        offset,
        tenant: None,
        bytes,
    };
    let half = body.len() as u16 / 2;
    let (first, second) = body.split_at(usize::from(half));
    let (all, rest) = (body.len() as u16, body.len() as u16 - half);
    let second = Frame::Piece { head: piece(half, all, Some(rest)), start: 0, body: second };
    let first = Frame::Piece { head: piece(0, all, Some(half)), start: 0, body: first };
    let overlap =
        Frame::Piece { head: piece(half - 1, all, Some(rest)), start: 0, body: &body[..usize::from(rest)] };
    let info = seeds::processor().encode().unwrap();
    let cases: &[(&str, &[Frame<'_>])] = &[
        ("packet-to-the-end", &[last]),
        ("packets-packed", &[packet, packet, last]),
        ("pieces-in-order", &[first, second]),
        ("pieces-reversed", &[second, first, packet]),
        ("pieces-overlapping", &[first, overlap, second]),
        (
            "challenge-and-response",
            &[Frame::Challenge { token: *b"unlikely", path: 2 }, Frame::Response { token: *b"unlikely" }],
        ),
        ("ping-and-pong", &[Frame::Ping { id: 9 }, Frame::Pong { id: 9 }]),
        ("probe-and-answer", &[Frame::Probe { id: 1, size: 1472 }, Frame::ProbeAck { id: 1, size: 1472 }]),
        ("marker", &[Frame::Marker { stamp: 8 }]),
        ("assignment", &[Frame::Assignment { hash: 0xdead_beef, core: 3 }]),
        ("processor-info", &[Frame::ProcessorInfo(&info)]),
        (
            "path-state-and-close",
            &[
                Frame::PathState { path: 1, state: PeerPathState::Up },
                Frame::Close { reason: CloseReason::from_byte(1) },
            ],
        ),
        ("extension", &[Frame::Extension { kind: frame::kind::EXTENSION + 1, body: b"later" }, packet]),
    ];
    for (name, frames) in cases {
        let mut out = vec![0; 4096];
        let end = frames.iter().try_fold(0, |at, frame| frame.write(&mut out, at)).unwrap();
        save("frames", name, &out[..end]);
    }
    let entry = ReportEntry {
        path: 1,
        highest: 1 << 40,
        arrival_us: 5,
        hold_us: 9,
        packets: 70,
        bytes: 90_000,
        lost: 1,
    };
    let mut out = vec![0; 4096];
    let at = frame::write_report(&mut out, 0, &[entry, ReportEntry { path: 2, ..entry }]).unwrap();
    let ranges = [NackRange { first: 4, count: 2 }, NackRange { first: 1 << 40, count: 600 }];
    let at = frame::write_nack(&mut out, at, 1, 0, &ranges).unwrap();
    frame::write_padding(&mut out, at).unwrap();
    save("frames", "report-nack-padding", &out[..at + 20]);
    save("frames", "length-beyond-the-end", &[1, 1, 0xff, 0xff, 0x45]);
    save("frames", "unknown-kind", &[100, 0, 1, 2, 3]);
}

fn tables() {
    let weights = |weights: &[u32]| -> Vec<Unit> {
        (0..).zip(weights).map(|(id, weight)| Unit { id, weight: *weight }).collect()
    };
    save("table", "one-core", &seeds::table(1).encode());
    save("table", "four-cores", &seeds::table(4).encode());
    save("table", "cores-128", &seeds::table(128).encode());
    save("table", "units-beyond-a-byte", &BucketTable::new(1024, &weights(&[1; 600])).unwrap().encode());
    save("table", "nodes-by-weight", &BucketTable::new(65_536, &weights(&[5, 1])).unwrap().encode());
    let mut table = seeds::table(2);
    for units in [&[1, 1, 1][..], &[1, 1, 1, 1], &[1, 0, 1, 1]] {
        let live = vec![0; table.buckets()];
        let units: Vec<Unit> = weights(units).into_iter().filter(|unit| unit.weight > 0).collect();
        table = steering::assign::plan(&table, &units, &live).unwrap();
    }
    save("table", "chains", &table.encode_with_chains());
    save("table", "processor-info", &seeds::processor().encode().unwrap());
    save("table", "claims-much", &[0, 0, 0, 1, 16, 0, 0xff, 0xff, 0, 0]);
}

fn handshakes() {
    let (dialer, listener) = (seeds::dialer(), seeds::listener());
    let hello = seeds::hello(Some(5));
    let (_, initiation) =
        Initiator::start(&dialer, &listener.public(), None, &hello, seeds::DIALER_INDEX, 2, None).unwrap();
    let opened = open_initiation(&listener, &initiation).unwrap();
    let (response, _) = opened.respond(None, &seeds::hello(None), seeds::LISTENER_INDEX, None).unwrap();
    let guard = Guard::new(&listener.public(), [7; 32], GuardLimits::default());
    let source = ([192, 0, 2, 1], 4600).into();
    let reply = guard.cookie_reply(Time::ZERO, source, &initiation).unwrap();
    save("handshake", "initiation", &initiation);
    save("handshake", "initiation-without-macs", &initiation[..initiation.len() - 32]);
    save("handshake", "response", &response);
    save("handshake", "response-of-another-attempt-without-macs", &response[..response.len() - 32]);
    save("handshake", "cookie-reply", &reply);
    save("handshake", "hello-with-timestamp", &hello.encode().unwrap());
    save("handshake", "hello", &seeds::hello(None).encode().unwrap());
    let mut newer = hello.encode().unwrap();
    newer.extend([200, 0, 3, 1, 2, 3]);
    save("handshake", "hello-of-a-newer-version", &newer);
    let header = Header::parse(&initiation).unwrap();
    save("handshake", "initiation-header-only-without-macs", &header.to_bytes());
    save("handshake", "empty", &[]);
    save("handshake", "data-datagram", &[0x14; 60]);
}

fn tamperings() {
    save("tampering", "nothing", &[]);
    save("tampering", "initiation-header", &[0, 4, 1]);
    save("tampering", "initiation-ephemeral", &[0, 20, 0x80]);
    save("tampering", "initiation-payload", &[0, 120, 0xff, 0, 121, 1]);
    save("tampering", "initiation-cut", &[0xff, 0xfe, 0x80]);
    save("tampering", "response-header", &[0xff, 0xff, 0, 0, 15, 1]);
    save("tampering", "response-ephemeral", &[0xff, 0xff, 0, 0, 17, 0x40]);
    save("tampering", "response-payload", &[0xff, 0xff, 0, 0, 90, 4]);
    save("tampering", "response-cut", &[0xff, 0xff, 0, 0xff, 0xfe, 0x20]);
    save("tampering", "both", &[0, 50, 1, 0xff, 0xff, 0, 0, 60, 1]);
}

/// TCP header, a timestamp option, and payload; checksum zero.
fn tcp(payload: usize) -> Vec<u8> {
    let mut bytes = vec![0; 32 + payload];
    bytes[..4].copy_from_slice(&[0x04, 0xd2, 0x01, 0xbb]);
    bytes[12..16].copy_from_slice(&[0x80, 0x18, 1, 0]);
    bytes[20..24].copy_from_slice(&[1, 1, 8, 10]);
    bytes
}

fn syn() -> Vec<u8> {
    let mut bytes = tcp(0);
    bytes[13] = 2;
    bytes[20..32].copy_from_slice(&[2, 4, 5, 180, 1, 1, 4, 2, 1, 3, 3, 7]);
    bytes
}

fn udp(payload: usize) -> Vec<u8> {
    let mut bytes = vec![0; 8 + payload];
    bytes[..4].copy_from_slice(&[0x04, 0xd2, 0x01, 0xbb]);
    let length = bytes.len() as u16;
    bytes[4..6].copy_from_slice(&length.to_be_bytes());
    bytes
}

fn ipv4(protocol: u8, upper: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x45, 2, 0, 0, 0, 9, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 5, 1, 2, 3, 4];
    let length = (bytes.len() + upper.len()) as u16;
    bytes[2..4].copy_from_slice(&length.to_be_bytes());
    bytes.extend(upper);
    bytes
}

fn ipv6(next: u8, upper: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 40];
    bytes[0] = 0x60;
    bytes[4..6].copy_from_slice(&(upper.len() as u16).to_be_bytes());
    bytes[6..8].copy_from_slice(&[next, 64]);
    bytes[8..12].copy_from_slice(&[0x20, 1, 0x0d, 0xb8]);
    bytes[24..28].copy_from_slice(&[0x20, 1, 0x0d, 0xb8]);
    bytes[39] = 4;
    bytes.extend(upper);
    bytes
}

fn packets() {
    let plain = VirtioNetHeader { gso_type: GSO_NONE, ..VirtioNetHeader::default() };
    let partial = |start, offset| VirtioNetHeader {
        flags: NEEDS_CSUM,
        csum_start: start,
        csum_offset: offset,
        ..plain
    };
    let gso =
        |kind, size, header: VirtioNetHeader| VirtioNetHeader { gso_type: kind, gso_size: size, ..header };
    let hop_by_hop = [[6, 0, 1, 4, 0, 0, 0, 0].to_vec(), tcp(3)].concat();
    let first_fragment = [[17, 0, 0, 1, 0, 0, 0, 7].to_vec(), udp(8)].concat();
    let quoted = [vec![3, 4, 0, 0, 0, 0, 5, 0], ipv4(6, &tcp(0))].concat();
    let echo = [8, 0, 0, 0, 0x12, 0x34, 0, 1];
    let cases = [
        ("tcp-ipv4", plain, ipv4(6, &tcp(100))),
        ("tcp-ipv4-partial", partial(20, 16), ipv4(6, &tcp(100))),
        ("tcp-ipv4-super", gso(GSO_TCPV4, 100, partial(20, 16)), ipv4(6, &tcp(950))),
        ("tcp-ipv6-super", gso(GSO_TCPV6, 100, partial(40, 16)), ipv6(6, &tcp(950))),
        ("udp-ipv4-super", gso(GSO_UDP_L4, 100, partial(20, 6)), ipv4(17, &udp(950))),
        ("udp-ipv6-super", gso(GSO_UDP_L4, 100, partial(40, 6)), ipv6(17, &udp(950))),
        ("super-of-single-bytes", gso(GSO_TCPV4, 1, partial(20, 16)), ipv4(6, &tcp(60))),
        ("super-without-size", gso(GSO_TCPV4, 0, partial(20, 16)), ipv4(6, &tcp(60))),
        ("checksum-behind-the-end", partial(0xffff, 0xffff), ipv4(6, &tcp(60))),
        ("syn-with-mss-ipv4", plain, ipv4(6, &syn())),
        ("syn-with-mss-ipv6", plain, ipv6(6, &syn())),
        ("icmp-echo", plain, ipv4(1, &echo)),
        ("icmp-too-big", plain, ipv4(1, &quoted)),
        ("hop-by-hop", plain, ipv6(0, &hop_by_hop)),
        ("ipv6-first-fragment", plain, ipv6(44, &first_fragment)),
        ("headers-without-end", plain, ipv6(0, &[0u8; 128])),
        ("length-beyond-the-end", plain, ipv4(17, &udp(60))[..40].to_vec()),
        ("version-5", plain, vec![0x55; 40]),
    ];
    for (name, header, packet) in cases {
        save("packet", name, &[&header.to_bytes()[..], &packet].concat());
    }
}

fn configs() {
    let key = "3p7bfXt9wbTTW2HC7OQ1Nz+DQ8hbeGdNrfx+FG+IK08=";
    let node = "[node]\nname = \"branch\"\nprivate-key-file = \"node.key\"\nlisten = 4600\n";
    let tun = "[tun]\nname = \"ana0\"\naddress = [\"10.77.0.1/24\", \"fd77::1/64\"]\nmtu = 1420\n";
    let wans = "[[wan]]\ninterface = \"wan0\"\nrate-max = \"20 Mbit/s\"\n[[wan]]\nmatch = \"wwan*\"\ntier = 1\n\
                address-family = \"ipv6\"\ngateway = \"2001:db8::1\"\n";
    let peer = format!(
        "[[peer]]\nname = \"hub\"\npublic-key = \"{key}\"\nendpoints = [\"198.18.0.2:4600\", \"hub.example.net:4600\", \
         \"[2001:db8::2]:4600\"]\nallowed-ips = [\"10.77.0.2/32\", \"0.0.0.0/0\", \"::/0\"]\n"
    );
    let whole = format!("{node}{tun}{wans}{peer}");
    save("config", "whole", whole.as_bytes());
    save("config", "smallest", format!("[node]\nprivate-key-file = \"node.key\"\n{peer}").as_bytes());
    save("config", "empty", b"");
    save("config", "not-utf8", b"[node]\nname = \"\xff\xfe\"\n");
    save("config", "not-toml", b"[node\nname = = \"x\"\n[[peer]\n");
    save("config", "unknown-keys", b"[node]\nnmae = \"x\"\n[nood]\n[[wann]]\n");
    save("config", "wrong-types", b"node = 1\ntun = []\npeer = \"hub\"\n[wan]\ninterface = 5\n");
    save("config", "twins", format!("{node}{tun}{peer}{peer}").as_bytes());
    save(
        "config",
        "bad-values",
        whole.replace("4600", "460000").replace("/24", "/240").replace("fg", "-").as_bytes(),
    );
    save("config", "bad-key-file", whole.replace("node.key", "bad.key").as_bytes());
    save("config", "missing-key-file", whole.replace("node.key", "gone.key").as_bytes());
    save("config", "deep", ["a = ", &"[".repeat(500)].concat().as_bytes());
}

/// A step of the target `fragments`: identification and source 0, from byte `units` * 8 on.
fn step(flags: u8, units: u8, bytes: u8) -> [u8; STEP_BYTES] {
    [flags, units, 0, bytes, 0, 0]
}

fn fragments() {
    let whole = |flags, six: u8| -> Vec<u8> {
        let steps = [step(six | MORE, 0, 16), step(six | MORE, 2, 24), step(six, 5, 1)];
        [&[flags][..], &steps.concat()].concat()
    };
    let mix = |flags: u8, steps: &[[u8; STEP_BYTES]]| -> Vec<u8> { [&[flags][..], &steps.concat()].concat() };
    save("fragments", "in-order-ipv4", &whole(0, 0));
    save("fragments", "in-order-ipv6", &whole(0, SIX));
    save("fragments", "in-order-bridged", &whole(BRIDGE, 0));
    let (first, second, last) = (step(MORE, 0, 16), step(MORE, 2, 24), step(0, 5, 1));
    save("fragments", "first-comes-last", &mix(0, &[last, second, first]));
    save("fragments", "first-comes-last-bridged", &mix(BRIDGE, &[last, second, first]));
    save("fragments", "copies", &mix(0, &[first, first, second, second, last, last]));
    save("fragments", "overlap", &mix(0, &[first, second, step(MORE, 4, 16), last]));
    save("fragments", "overlap-bridged", &mix(BRIDGE, &[first, step(MORE, 1, 16), second, last]));
    save("fragments", "two-ends", &mix(0, &[last, step(0, 6, 8), first]));
    save("fragments", "other-contents", &mix(0, &[second, [MORE, 2, 0, 24, 1, 0], first, last]));
    let late = [MORE, 2, 0, 24, 0, 255];
    save("fragments", "timeout", &mix(0, &[first, late, last, first, second]));
    save(
        "fragments",
        "invalid",
        &mix(0, &[step(MORE, 0, 7), step(MORE, 1, 0), step(0, 1, 9), step(MORE, 1, 9)]),
    );
    save(
        "fragments",
        "far-end",
        &mix(0, &[[0, 255, 255, 7, 0, 0], [SIX, 255, 255, 7, 0, 0], [0, 254, 255, 8, 0, 0]]),
    );
    save("fragments", "atomic", &mix(0, &[step(SIX | MORE, 0, 16), step(SIX, 0, 24), step(SIX, 2, 8)]));
    let flood: Vec<_> = (0..=u8::MAX).map(|n| step((n & 15) | MORE, n % 7 * 31, 248)).collect();
    save("fragments", "flood", &[mix(TIGHT, &flood), [first, second, last].concat()].concat());
    let raw = ipv6(44, &[&[17, 0, 0, 1, 0, 0, 0, 7][..], &udp(8)].concat());
    let head = [RAW, raw.len() as u8, 0, 0, 0, 0];
    save("fragments", "raw-ipv6-first", &[&[0][..], &head, &raw].concat());
}

/// The same packet with its checksums right.
fn summed(mut packet: Vec<u8>) -> Vec<u8> {
    if packet[0] >> 4 == 4 {
        packet[10..12].fill(0);
        let bytes = usize::from(packet[0] & 15) * 4;
        let sum = checksum::finish(checksum::sum(&packet[..bytes], 0));
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    let header = IpHeader::parse(&packet).unwrap();
    let (at, upper) = (header.header_bytes, header.payload(&packet).to_vec());
    let pseudo = checksum::pseudo_header(header.src, header.dst, header.protocol, upper.len());
    match header.protocol {
        6 | 17 if !header.is_fragmented() => {
            let field = at + if header.protocol == 6 { 16 } else { 6 };
            packet[field..field + 2].copy_from_slice(&checksum::fold(pseudo).to_be_bytes());
            complete_checksum(&mut packet).unwrap();
        }
        1 | 58 => {
            let pseudo = if header.protocol == 1 { 0 } else { pseudo };
            let sum = checksum::finish(checksum::sum(&upper, pseudo));
            packet[at + 2..at + 4].copy_from_slice(&sum.to_be_bytes());
        }
        132 => packet[at + 8..at + 12].copy_from_slice(&crc32c(&upper).to_le_bytes()),
        _ => {}
    }
    packet
}

fn translations() {
    let mut to: Vec<u8> = (0x20..0x40).collect();
    to.extend([0x9c, 0x41, 0x01, 0xbb]);
    let save = |name: &str, bits: u8, packet: &[u8]| {
        save("nat_rewrite", name, &[&[bits][..], &to, packet].concat());
    };
    let echo = [8, 0, 0, 0, 0x12, 0x34, 0, 1, 7];
    let sctp = [0x04, 0xd2, 0x01, 0xbb, 0, 0, 0, 1, 0, 0, 0, 0, 1, 2, 3, 4];
    let tcp_v4 = summed(ipv4(6, &tcp(33)));
    let tcp_v6 = summed(ipv6(6, &tcp(33)));
    save("tcp-ipv4", 0, &tcp_v4);
    save("tcp-ipv6", 0, &tcp_v6);
    save("tcp-ipv4-partial", PARTIAL, &tcp_v4);
    save("other-version", OTHER_VERSION, &tcp_v4);
    save("udp-ipv4", 0, &summed(ipv4(17, &udp(9))));
    save("udp-ipv4-without-checksum", 0, &ipv4(17, &udp(9)));
    save("udp-ipv6", 0, &summed(ipv6(17, &udp(9))));
    save("sctp-ipv4", 0, &summed(ipv4(132, &sctp)));
    save("echo-ipv4", 0, &summed(ipv4(1, &echo)));
    save("echo-ipv6", 0, &summed(ipv6(58, &[&[128], &echo[1..]].concat())));
    save("gre-ipv4", 0, &summed(ipv4(47, &[0, 0, 8, 0, 0x45])));
    let mut first = summed(ipv4(17, &udp(9)));
    first[6] = 0x20;
    save("first-fragment", 0, &first);
    first[7] = 3;
    save("later-fragment", 0, &first);
    save("ipv6-first-fragment", 0, &ipv6(44, &[&[6, 0, 0, 1, 0, 0, 0, 7][..], &tcp(9)].concat()));
    let routing = [vec![6, 2, 0, 1, 0, 0, 0, 0], vec![7; 16], tcp(3)].concat();
    save("routing-header", 0, &ipv6(43, &routing));
    // An error goes to whom it quotes.
    let turned = |mut packet: Vec<u8>| {
        let (from, bytes) = if packet[0] >> 4 == 4 { (12, 4) } else { (8, 16) };
        packet[from..from + 2 * bytes].rotate_left(bytes);
        packet
    };
    let (quote_v4, quote_v6) = (turned(tcp_v4), turned(tcp_v6));
    for (name, bits) in [("error-ipv4", 0), ("error-ipv4-of-a-hidden-router", HIDE)] {
        save(name, bits, &summed(ipv4(1, &[&[3, 4, 0, 0, 0, 0, 5, 0][..], &quote_v4[..48]].concat())));
    }
    save(
        "error-ipv4-to-somebody-else",
        0,
        &summed(ipv4(1, &[&[3, 4, 0, 0, 0, 0, 5, 0][..], &first].concat())),
    );
    save("error-ipv6", 0, &summed(ipv6(58, &[&[2, 0, 0, 0, 0, 0, 5, 0][..], &quote_v6].concat())));
    let quoted_echo = turned(summed(ipv4(1, &echo)));
    save(
        "error-about-an-echo",
        HIDE,
        &summed(ipv4(1, &[&[11, 0, 0, 0, 0, 0, 0, 0][..], &quoted_echo].concat())),
    );
}

/// A step of the target `tcp_track`: numbers count from what was sent last, and no option is there but a scale of 7.
fn speak(reply: u8, flags: u8, seq: i16, ack: i16, bytes: u16) -> [u8; track::STEP_BYTES] {
    let ([s0, s1], [a0, a1], [p0, p1]) = (seq.to_be_bytes(), ack.to_be_bytes(), bytes.to_be_bytes());
    [reply | track::NEAR_SEQ | track::NEAR_ACK, flags, s0, s1, a0, a1, 0x40, 0, p0, p1, 3, 7]
}

fn conversations() {
    let (fin, syn, rst, psh, ack) = (1, 2, 4, 8, 16);
    let open = [speak(0, syn, 100, 0, 0), speak(1, syn | ack, 500, 0, 0), speak(0, ack, 0, 0, 0)];
    let talk = [speak(0, psh | ack, 0, 0, 100), speak(1, ack, 0, 0, 0), speak(1, ack, 0, 0, 65_000)];
    let close = [speak(0, fin | ack, 0, 0, 0), speak(1, fin | ack, 0, 0, 0), speak(0, ack, 0, 0, 0)];
    let again = [speak(0, syn, 9_000, 0, 0), speak(0, syn, 9_000, 0, 0)];
    let save = |name: &str, bits: u8, parts: &[&[[u8; track::STEP_BYTES]]]| {
        save("tcp_track", name, &[&[bits][..], &parts.concat().concat()].concat());
    };
    save("opened-and-closed", 0, &[&open, &talk, &close, &again, &open]);
    save("opened-by-both", 0, &[&[open[0], speak(1, syn, 9, 0, 0), speak(1, syn | ack, -1, 0, 0)], &talk]);
    save(
        "closed-by-both",
        0,
        &[&open, &[close[0], speak(1, fin | ack, 0, -1, 0)], &[close[2], speak(1, ack, 0, 0, 0)]],
    );
    save("reset", 0, &[&open, &talk, &[speak(1, rst, 0, 0, 0)], &talk, &again]);
    save("reset-in-the-window", 0, &[&open, &[speak(1, rst, 9, 0, 0), speak(0, rst | ack, -9, 0, 0)], &talk]);
    save("refused", 0, &[&open[..1], &[speak(1, rst | ack, 0, 9, 0), speak(1, rst | ack, 0, 0, 0)], &again]);
    save("syn-and-challenge", 0, &[&open, &[again[0], speak(1, ack, 0, 0, 0)], &talk]);
    let forgotten = [again[0], speak(1, syn | ack, 32_000, -32_000, 0), speak(0, ack, 32_000, 32_000, 5)];
    save("forgotten-by-both", 0, &[&open, &forgotten, &talk, &close]);
    save("mid-stream", track::MID_STREAM, &[&talk, &close]);
    save("one-way", track::ONE_WAY, &[&open[..1], &open[2..], &talk[..1], &close[..1], &again]);
    save(
        "old-and-new-data",
        0,
        &[&open, &[speak(0, ack, -30_000, 0, 9), speak(0, ack, 30_000, 0, 9)], &talk],
    );
    save("zero-length", 0, &[&open, &[speak(0, ack, -1, 0, 0), speak(1, ack, -1, 0, 1)], &talk]);
}

fn encapsulations() {
    let plain = Encapsulation { target: 2, dispatcher: 1, interface: 3, ttl: 8, ..Encapsulation::default() };
    let route = Some(Route::default());
    let hook = Hook::AfterRendezvous { src_port: 49_200, dst_port: 443 };
    let resolve = |next_hop: &str| Handoff::Resolve { next_hop: next_hop.parse().unwrap() };
    let datagram = |encapsulation: &Encapsulation, packet: &[u8]| {
        let mut bytes = vec![0; encapsulation.bytes()];
        encapsulation.write(&mut bytes);
        bytes.extend([2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0]);
        bytes.extend(packet);
        bytes
    };
    let inner = ipv4(17, &udp(8));
    let mut recorded = Encapsulation { handoff: Handoff::Punt, route, ..plain };
    (10..20).for_each(|node| recorded.record(node));
    for (name, encapsulation) in [
        ("dispatch", plain),
        ("dispatch-tagged", Encapsulation { vlan: Some(100), odd_era: true, ..plain }),
        ("dispatch-ports", Encapsulation { hook, table: 3, ..plain }),
        ("punt-full-route", recorded),
        ("unclaimed", Encapsulation { handoff: Handoff::Unclaimed, ..plain }),
        ("broadcast", Encapsulation { handoff: Handoff::Broadcast, ttl: 255, ..plain }),
        ("reply", Encapsulation { handoff: Handoff::Reply, ..plain }),
        ("resolve-ipv4", Encapsulation { handoff: resolve("192.0.2.1"), route, ..plain }),
        ("resolve-ipv6", Encapsulation { handoff: resolve("2001:db8::1"), hook, route, ..plain }),
        ("trace", Encapsulation { handoff: Handoff::Trace, route, ..plain }),
        ("ttl-0", Encapsulation { ttl: 0, ..plain }),
    ] {
        save("encapsulation", name, &datagram(&encapsulation, &inner));
    }
    save("encapsulation", "to-be-split", &datagram(&plain, &ipv4(17, &udp(700))));
    save("encapsulation", "no-ethernet-header", &datagram(&plain, &[])[..27]);
    let mut unknown = datagram(&plain, &inner);
    unknown[7] += 0x80;
    save("encapsulation", "unknown-words", &unknown);
    unknown[6..8].copy_from_slice(&[0x0f, 0xc0]);
    save("encapsulation", "header-beyond-the-end", &unknown);
    for (name, address) in [("outer-ipv4", "192.0.2.1"), ("outer-ipv6", "2001:db8::1")] {
        let address = address.parse().unwrap();
        let outer = Outer { source: address, destination: address, source_port: 50_000, traffic_class: 2 };
        let mut packet = [vec![0; outer.bytes()], datagram(&plain, &inner)].concat();
        outer.write(&mut packet, OuterChecksum::Usual);
        save("encapsulation", name, &packet);
    }
}

/// A step of the target `reassembly`: identification and sender 0, from byte `from` * 64 on, `bytes` * 32 of them.
fn part(from: u8, bytes: u8, total: u8) -> [u8; reassembly_steps::STEP_BYTES] {
    [0, from, bytes, total, 0, 0]
}

fn reassemblies() {
    use reassembly_steps::{OTHER_CONTENTS, OTHER_TARGET, RAW, STEP_BYTES, TIGHT};
    let save = |name: &str, flags: u8, steps: &[[u8; STEP_BYTES]]| {
        save("reassembly", name, &[&[flags][..], &steps.concat()].concat());
    };
    let (first, last) = (part(0, 44, 25), part(22, 6, 25));
    let variant = |[a, b, c, d, _, wait]: [u8; STEP_BYTES], variant| [a, b, c, d, variant, wait];
    save("in-order", 0, &[first, last]);
    save("reversed", 0, &[last, first]);
    save("copies", 0, &[first, first, last, last, last]);
    save("overlap", 0, &[first, part(21, 8, 25), last]);
    save("other-contents", 0, &[first, variant(first, OTHER_CONTENTS), last]);
    save("other-target", 0, &[first, variant(last, OTHER_TARGET), first, last]);
    save("other-total", 0, &[first, part(22, 8, 26), last]);
    save("timeout", 0, &[first, [0, 22, 6, 25, 0, 255], first]);
    save("invalid", 0, &[part(0, 0, 25), part(0, 7, 25), part(24, 8, 25), part(0, 0, 0)]);
    let many: Vec<_> = (0..18).map(|place| part(place * 5, 8, 255)).collect();
    save("too-many-fragments", 0, &many);
    let flood: Vec<_> = (0..=u8::MAX).map(|n| [n & 15, n % 9 * 22, 44, 200 - n % 3, 0, n]).collect();
    save("flood", TIGHT, &[&flood[..], &[first, last]].concat());
    let raw = [0x60, 1, 0, 2, 0, 0, 0, 0, 0, 1, 0, 0, 0, 32];
    let whole = [&raw[..], &[7; 32]].concat();
    let head = [RAW, whole.len() as u8, 0, 0, 0, 0];
    self::save("reassembly", "raw-single", &[&[0][..], &head, &whole].concat());
}
