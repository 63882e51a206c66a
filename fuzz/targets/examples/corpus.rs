//! Writes the seeds of every corpus, named by what they are: `cargo run -p fuzz-targets --example corpus`.
//!
//! What the fuzzer finds is added by hand, under a name that says what it was. Handshake seeds hold fresh ephemeral
//! keys, so a seed that exists stays as it is.
#![allow(clippy::unwrap_used, reason = "a tool for developers")]

use std::fs;
use std::path::Path;

use fuzz_targets::seeds;
use packet::VirtioNetHeader;
use packet::vnet::{GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM};
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
        ("marker-and-barrier", &[Frame::Marker { stamp: 8 }, Frame::Barrier { bucket: 1023, stamp: 8 }]),
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
    let mut guard = Guard::new(&listener.public(), [7; 32], GuardLimits::default());
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
