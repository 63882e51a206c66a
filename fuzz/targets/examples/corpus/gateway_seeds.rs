//! Seeds about a whole gateway, a peer of it, and what comes from backends, local sockets and the kernel.

use std::fs;
use std::path::Path;

use tunnel::frame::{self, NackRange, ReportEntry};

use super::{ipv4, ipv6, save, syn, tcp, udp};

/// A packet between these addresses, as the target `gateway` reads it: where it comes in, then length and bytes.
fn step(from: u8, packet: &[u8]) -> Vec<u8> {
    [&[from][..], &(packet.len() as u16).to_be_bytes(), packet].concat()
}

/// A packet of IPv4 with other addresses, ports and identification; its checksums are not right any more.
fn between(mut packet: Vec<u8>, src: [u8; 4], dst: [u8; 4], ports: [u16; 2]) -> Vec<u8> {
    packet[12..16].copy_from_slice(&src);
    packet[16..20].copy_from_slice(&dst);
    packet[20..22].copy_from_slice(&ports[0].to_be_bytes());
    packet[22..24].copy_from_slice(&ports[1].to_be_bytes());
    packet[10..12].fill(0);
    let sum = packet::checksum::finish(packet::checksum::sum(&packet[..20], 0));
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet
}

const CLIENT: [u8; 4] = [10, 0, 0, 5];
const GATEWAY: [u8; 4] = [203, 0, 113, 1];
const REMOTE: [u8; 4] = [198, 51, 100, 7];
const BEHIND: [u8; 4] = [10, 1, 0, 9];
/// Where packets come in.
const LAN: u8 = 0;
const WAN: u8 = 1;
const HOST: u8 = 2;
const BRANCH: u8 = 3;

/// Seeds of the target `gateway`.
pub fn gateways() {
    let udp4 = |src, dst, ports| between(ipv4(17, &udp(100)), src, dst, ports);
    let syn4 = |src, dst, ports| between(ipv4(6, &syn()), src, dst, ports);
    let tcp4 = |src, dst, ports| between(ipv4(6, &tcp(100)), src, dst, ports);
    let ways = [
        step(LAN, &udp4(CLIENT, REMOTE, [1_000, 53])),
        step(LAN, &udp4(CLIENT, [10, 0, 0, 1], [1_001, 53])),
        step(LAN, &udp4(CLIENT, BEHIND, [1_002, 53])),
        step(HOST, &udp4([10, 0, 0, 1], CLIENT, [1_003, 53])),
        step(HOST, &udp4([10, 0, 0, 1], BEHIND, [1_004, 53])),
        step(BRANCH, &udp4(BEHIND, CLIENT, [1_005, 53])),
        step(BRANCH, &udp4(BEHIND, [10, 0, 0, 1], [1_006, 53])),
        step(BRANCH, &udp4(BEHIND, REMOTE, [1_007, 53])),
    ];
    save("gateway", "all-ways", &ways.concat());
    let stranger = [
        step(WAN, &syn4(REMOTE, GATEWAY, [5_000, 80])),
        step(WAN, &syn4(REMOTE, GATEWAY, [5_000, 443])),
        step(WAN, &tcp4(REMOTE, GATEWAY, [5_000, 443])),
        step(WAN, &syn4(REMOTE, GATEWAY, [5_000, 22])),
        step(WAN, &udp4(REMOTE, CLIENT, [5_000, 53])),
    ];
    save("gateway", "a-stranger", &stranger.concat());
    let hairpin = [
        step(LAN, &syn4(CLIENT, GATEWAY, [6_000, 80])),
        step(LAN, &udp4(CLIENT, GATEWAY, [6_000, 53])),
        step(BRANCH, &syn4(BEHIND, GATEWAY, [6_000, 443])),
    ];
    save("gateway", "hairpins", &hairpin.concat());
    let mut first = udp4(CLIENT, REMOTE, [1_000, 53]);
    first[6] = 0x20;
    let mut last = first.clone();
    last[6..8].copy_from_slice(&[0, 13]);
    save("gateway", "fragments", &[step(LAN, &last), step(LAN, &first), step(WAN, &last)].concat());
    let whole = between(ipv4(17, &udp(4_000)), CLIENT, REMOTE, [1_000, 53]);
    let mut large = whole.clone();
    large[6] = 0;
    save("gateway", "too-big", &[step(LAN, &whole), step(LAN, &large), step(BRANCH, &large)].concat());
    let mut dying = udp4(CLIENT, REMOTE, [1_000, 53]);
    dying[8] = 1;
    save("gateway", "ttl-ends", &[step(LAN, &dying), step(BRANCH, &dying), step(HOST, &dying)].concat());
    let mut inward = ipv6(17, &udp(64));
    inward[8..24].copy_from_slice(&std::net::Ipv6Addr::new(0x2001, 0xdb8, 0xf, 0, 0, 0, 0, 1).octets());
    inward[24..40].copy_from_slice(&std::net::Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 5).octets());
    save("gateway", "a-stranger-by-ipv6", &step(WAN, &inward));
    save("gateway", "ipv6", &[step(LAN, &ipv6(17, &udp(64))), step(WAN, &ipv6(6, &syn()))].concat());
}

/// Seeds of the target `peer_frames`: those of `frames`, one after the other, at several cores and paths.
pub fn peers() {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../corpus/frames"));
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    for (number, file) in files.into_iter().enumerate() {
        let frames = fs::read(&file).unwrap();
        let one = |place: u8| [&[4, place][..], &(frames.len() as u16).to_be_bytes(), &frames].concat();
        let name = file.file_name().unwrap().to_str().unwrap().to_owned();
        save("peer_frames", &name, &[one(0), one(0x10), one(number as u8 & 7)].concat());
    }
    // About what was really sent, over and over.
    let ranges = [NackRange { first: 0, count: 140 }; 64];
    let entry = |place: u64| ReportEntry {
        highest: 10 + place % 20,
        packets: place,
        bytes: 1 << 40,
        ..ReportEntry::default()
    };
    let said = |write: &dyn Fn(&mut [u8]) -> usize| {
        let mut frames = vec![0; 1_300];
        let length = write(&mut frames);
        frames.truncate(length);
        [&[4, 0][..], &(frames.len() as u16).to_be_bytes(), &frames].concat()
    };
    let nack = said(&|frames| frame::write_nack(frames, 0, 0, 0, &ranges).unwrap());
    save("peer_frames", "nacks-of-everything", &nack.repeat(4));
    let reports = said(&|frames| {
        (0..20).fold(0, |at, place| frame::write_report(frames, at, &[entry(place)]).unwrap())
    });
    save("peer_frames", "many-reports", &reports.repeat(3));
}

/// Seeds of the target `proxy_protocol`.
pub fn proxied() {
    let segment =
        |direction: u8, bytes: &[u8]| [&[direction][..], &(bytes.len() as u16).to_be_bytes(), bytes].concat();
    let with = |flags: u8, seq: u32, ack: u32, options: &[u8], payload: usize| {
        let mut bytes = tcp(0);
        bytes.truncate(20);
        bytes[4..8].copy_from_slice(&seq.to_be_bytes());
        bytes[8..12].copy_from_slice(&ack.to_be_bytes());
        bytes[12] = ((20 + options.len()) as u8 / 4) << 4;
        bytes[13] = flags;
        bytes.extend_from_slice(options);
        bytes.resize(bytes.len() + payload, 7);
        bytes
    };
    let mss = [2, 4, 5, 0xb4];
    let sack = [1, 1, 5, 10, 0, 0, 3, 0xe9, 0, 0, 4, 0x4d];
    for (name, flags, first) in
        [("v4", 0, 1_000u32), ("v6", 1, 1_000), ("wraps", 0, u32::MAX - 3), ("partial", 2, 9)]
    {
        let seq = first.wrapping_add(1);
        let talk = [
            segment(0, &with(2, first, 0, &mss, 0)),
            segment(1, &with(0x12, 500, seq, &mss, 0)),
            segment(0, &with(0x10, seq, 501, &[], 0)),
            segment(0, &with(0x18, seq, 501, &[], 100)),
            segment(3, &with(0x10, 501, seq, &sack, 0)),
            segment(1, &with(0x10, 501, seq.wrapping_add(128), &sack, 50)),
            segment(0, &with(0x11, seq.wrapping_add(100), 551, &[], 0)),
        ];
        save("proxy_protocol", name, &[&[flags][..], &first.to_be_bytes(), &talk.concat()].concat());
    }
    save(
        "proxy_protocol",
        "rubbish",
        &[&[0; 5][..], &segment(0, &[0xff; 40]), &segment(1, &[0x50; 30])].concat(),
    );
}

/// Seeds of the target `health_answer`.
pub fn health() {
    let answers: [(&str, &[u8]); 9] = [
        ("length", b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nokay"),
        ("until-close", b"HTTP/1.0 200 OK\r\n\r\nok"),
        (
            "chunks",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n ok\r\n1;x=y\r\n.\r\n0\r\n\r\n",
        ),
        ("trailers", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nA: b\r\n\r\n"),
        ("interim", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n"),
        ("two-lengths", b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nokay"),
        ("bare-line-ends", b"HTTP/1.1 503 Busy\nContent-Length: 0\n\n"),
        ("ssh", b"SSH-2.0-OpenSSH_9.2\r\n"),
        ("dns", &[0, 0x5a, 0x81, 0x80, 0, 1, 0, 0, 0, 0, 0, 0]),
    ];
    for (name, answer) in answers {
        save("health_answer", name, &[&[if name == "dns" { 0 } else { 1 }][..], answer].concat());
    }
    let tiny = b"1\r\nx\r\n".repeat(400);
    let head = &b"\x07HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"[..];
    save("health_answer", "tiny-chunks", &[head, &tiny].concat());
    save("health_answer", "long-line", &[head, &b"0".repeat(1_500)].concat());
}

/// Seeds of the target `control_request`.
pub fn requests() {
    let requests = [
        ("status", r#"{"command":"status"}"#),
        ("flows", r#"{"command":"flows","filter":{},"limit":20}"#),
        ("explain", r#"{"command":"explain","packet":"tcp 10.0.0.5:1234 > 192.0.2.4:443"}"#),
        (
            "class",
            r#"{"command":"class","packet":"udp 10.0.0.5:1 > 192.0.2.4:443","dscp":46,"server-name":"a.example"}"#,
        ),
        (
            "group",
            r#"{"command":"group-change","name":"office","prefixes":["10.0.0.0/8","2001:db8::/32"],"add":true}"#,
        ),
        ("lease", r#"{"command":"lease-return","name":"pod-7"}"#),
        ("unknown", r#"{"command":"status","more":1}"#),
        ("deep", "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["),
        ("filter", "tcp port 443 from 10.0.0.0/8"),
        ("apply", "\"Apply\"\n\"Apply\"\n"),
        ("alive", "{\"Alive\":{\"kept\":\"\"}}\n"),
        ("two-lines", "{\"command\":\"stop\"}\n{\"command\":\"reload\"}\n"),
    ];
    for (name, text) in requests {
        save("control_request", name, &[&[5][..], text.as_bytes()].concat());
    }
}

/// Seeds of the target `port_lease`.
pub fn leases() {
    let step = |what: u8, who: u8, first: u8, count: u8, wait: u16| {
        let [high, low] = wait.to_be_bytes();
        [what, who, first, count, high, low]
    };
    let (take, any, back, configure, tick) = (0, 1, 2, 3, 4);
    let cases: [(&str, Vec<[u8; 6]>); 5] = [
        ("taken-and-back", vec![step(take, 0, 1, 1, 0), step(back, 0, 0, 0, 9), step(take, 4, 1, 1, 9)]),
        (
            "rested",
            vec![
                step(any, 0, 0, 2, 0),
                step(back, 0, 0, 0, 9),
                step(tick, 0, 0, 0, 200),
                step(any, 8, 0, 3, 1),
            ],
        ),
        (
            "configured",
            vec![step(configure, 0, 3, 1, 0), step(configure, 4, 3, 1, 5), step(take, 0, 3, 1, 0)],
        ),
        ("not-aligned", vec![step(take, 0, 128, 1, 0), step(take, 0, 1, 129, 0), step(take, 0, 63, 7, 0)]),
        ("all-of-an-address", vec![step(any, 0, 0, 7, 0); 20]),
    ];
    for (name, steps) in cases {
        save("port_lease", name, &steps.concat());
    }
}

/// Seeds of the targets `netlink`, `control_message` and `packet_ring`.
pub fn kernel() {
    let message = |kind: u16, flags: u16, body: &[u8]| {
        let mut bytes = ((16 + body.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend_from_slice(body);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    };
    let attribute = |kind: u16, value: &[u8]| {
        let mut bytes = ((4 + value.len()) as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    };
    // RTM_NEWLINK, RTM_NEWADDR, RTM_NEWROUTE, RTM_NEWNEIGH, RTM_NEWRULE, NLMSG_ERROR, NLMSG_DONE.
    let link = [
        &[0, 0, 1, 0][..],
        &[2, 0, 0, 0],
        &[0; 8],
        &attribute(3, b"eth0\0"),
        &attribute(4, &1_500u32.to_ne_bytes()),
    ];
    let address =
        [&[2, 24, 0, 0, 2, 0, 0, 0][..], &attribute(1, &[192, 0, 2, 1]), &attribute(2, &[192, 0, 2, 1])];
    let route = [
        &[2, 24, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0][..],
        &attribute(1, &[10, 0, 0, 0]),
        &attribute(5, &[192, 0, 2, 254]),
    ];
    let way = [&[16, 0, 0, 0, 2, 0, 0, 0][..], &attribute(5, &[192, 0, 2, 9])].concat();
    let multipath = [&[2, 0, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0][..], &attribute(9, &[&way[..], &way].concat())];
    let neighbor = [
        &[2, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 1][..],
        &attribute(1, &[192, 0, 2, 9]),
        &attribute(2, &[2, 0, 0, 0, 0, 9]),
    ];
    let rule = [
        &[2, 0, 24, 0, 254, 0, 0, 1, 0, 0, 0, 0][..],
        &attribute(2, &[10, 0, 0, 0]),
        &attribute(6, &100u32.to_ne_bytes()),
    ];
    let changes: [(&str, Vec<u8>); 7] = [
        ("link", message(16, 0, &link.concat())),
        ("address", message(20, 0, &address.concat())),
        ("route", message(24, 0, &route.concat())),
        ("multipath", message(24, 0, &multipath.concat())),
        ("neighbor", message(28, 0, &neighbor.concat())),
        ("rule", message(32, 0, &rule.concat())),
        ("error", message(2, 0x200, &[&[0xff; 4][..], &[0; 16], &attribute(1, b"no\0")].concat())),
    ];
    for (name, bytes) in &changes {
        save("netlink", name, &[&[0][..], bytes].concat());
    }
    let all: Vec<u8> = changes.iter().flat_map(|(_, bytes)| bytes.clone()).collect();
    save("netlink", "monitor-of-neighbors", &[&[1][..], &all].concat());
    save("netlink", "answer", &[&[3][..], &all, &message(3, 0, &[0; 4])].concat());
    let hook = [attribute(1, &1u32.to_be_bytes()), attribute(3, b"eth0\0")].concat();
    let chain = [
        &[2, 0, 0, 0][..],
        &attribute(1, b"filter\0"),
        &attribute(3, b"in\0"),
        &attribute(4, &hook),
        &attribute(5, &0u32.to_be_bytes()),
        &attribute(7, b"filter\0"),
    ]
    .concat();
    let expression =
        [attribute(1, b"immediate\0"), attribute(2, &attribute(2, &attribute(2, &[0; 8])))].concat();
    let rules = [
        &[2, 0, 0, 0][..],
        &attribute(1, b"filter\0"),
        &attribute(2, b"in\0"),
        &attribute(4, &attribute(1, &expression)),
    ]
    .concat();
    save(
        "netlink",
        "chains-and-rules",
        &[&[2][..], &message(0x0a03, 0, &chain), &message(0x0a06, 0, &rules)].concat(),
    );

    let control = |level: i32, kind: i32, value: &[u8]| {
        let mut bytes = ((16 + value.len()) as u64).to_ne_bytes().to_vec();
        bytes.extend(level.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    };
    let v4 = [&[2, 0, 0x12, 0x34, 192, 0, 2, 1][..], &[0; 20]].concat();
    let v6 = [&[10, 0, 0x12, 0x34, 0, 0, 0, 0][..], &[0x20, 1], &[0; 18]].concat();
    let (info, gro) =
        (control(0, 8, &[2, 0, 0, 0, 0, 0, 0, 0, 192, 0, 2, 9]), control(17, 104, &1_200i32.to_ne_bytes()));
    save("control_message", "v4", &[&v4[..], &info, &gro, &control(0, 1, &[3])].concat());
    save(
        "control_message",
        "v6",
        &[&v6[..], &control(41, 50, &[7; 20]), &control(41, 67, &[1, 0, 0, 0])].concat(),
    );
    save("control_message", "gro-of-nothing", &[&v4[..], &control(17, 104, &0i32.to_ne_bytes())].concat());
    save("control_message", "no-address", &[0; 28]);
    let mut long = control(0, 8, &[0; 4]);
    long[..8].copy_from_slice(&u64::MAX.to_ne_bytes());
    save("control_message", "longer-than-its-buffer", &[&v4[..], &long].concat());

    let slot = |kept: u16, mac: u16, bytes: u32, status: u8| {
        [&kept.to_be_bytes()[..], &mac.to_be_bytes(), &bytes.to_be_bytes(), &[status]].concat()
    };
    save("packet_ring", "whole", &[slot(60, 96, 60, 1), slot(1_514, 96, 1_514, 1)].concat());
    save("packet_ring", "nothing-came", &slot(60, 96, 60, 0));
    save("packet_ring", "copied", &slot(1_900, 96, 60_000, 3));
    save("packet_ring", "outside", &[slot(2_000, 96, 2_000, 1), slot(0, 65_535, 0, 1)].concat());
    save("packet_ring", "no-room-in-front", &slot(60, 0, 60, 1));
}
