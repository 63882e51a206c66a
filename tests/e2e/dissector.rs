//! The Wireshark dissector in `etc/wireshark`, run by the real tshark over a capture of what our code writes.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::Command;

use cluster::encapsulation::fragment::Split;
use cluster::encapsulation::outer::{Outer, OuterChecksum, entropy_port};
use cluster::encapsulation::{Encapsulation, Handoff, Hook, Route};
use testbed::program::ScratchDir;
use tunnel::header::{Header, Kind};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../etc/wireshark/anabranch.lua");

/// A capture of raw IP packets (link type 101).
fn capture(directory: &ScratchDir, packets: &[Vec<u8>]) -> PathBuf {
    let mut bytes =
        vec![0xd4, 0xc3, 0xb2, 0xa1, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 101, 0, 0, 0];
    for packet in packets {
        let length = (packet.len() as u32).to_le_bytes();
        bytes.extend([[0; 4], [0; 4], length, length].concat());
        bytes.extend(packet);
    }
    let path = directory.path().join("units.pcap");
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Values of these fields with `|` between, a line for each packet that the filter lets through; several of one field stand with
/// `,` between.
fn fields(capture: &Path, filter: &str, names: &str) -> Vec<String> {
    let mut command = Command::new("tshark");
    command.args(["-n", "-X"]).arg(format!("lua_script:{SCRIPT}")).arg("-r").arg(capture);
    command.args(["-Y", filter, "-T", "fields", "-E", "separator=|"]);
    names.split_whitespace().for_each(|name| {
        command.args(["-e", name]);
    });
    let output = command.output().expect("tshark runs");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !errors.contains("Lua:"), "{errors}");
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(str::to_owned).collect()
}

fn with_prefix(prefix: &str, names: &str) -> String {
    names.split_whitespace().map(|name| format!("{prefix}.{name} ")).collect()
}

/// An Ethernet frame with a UDP packet from 10.0.0.1 to 10.0.0.2, port 53.
fn frame(payload: usize) -> Vec<u8> {
    let total = (28 + payload) as u16;
    let mut packet =
        vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 0x30, 0x39, 0, 53];
    packet.extend((total - 20).to_be_bytes());
    packet.resize(usize::from(total), 0);
    packet[2..4].copy_from_slice(&total.to_be_bytes());
    let sum = packet::checksum::finish(packet::checksum::sum(&packet[..20], 0));
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    [&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0][..], &packet].concat()
}

fn payload(encapsulation: &Encapsulation, frame: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; encapsulation.bytes()];
    encapsulation.write(&mut bytes);
    [bytes, frame.to_vec()].concat()
}

fn packet_of(address: &str, payload: &[u8], source_port: u16) -> Vec<u8> {
    let address: IpAddr = address.parse().unwrap();
    let outer = Outer { source: address, destination: address, source_port, traffic_class: 0 };
    let mut packet = [vec![0; outer.bytes()], payload.to_vec()].concat();
    outer.write(&mut packet, OuterChecksum::Usual);
    packet
}

fn plain() -> Encapsulation {
    Encapsulation { target: 2, dispatcher: 1, interface: 3, ttl: 8, ..Encapsulation::default() }
}

/// The code and Wireshark agree about every field.
#[test]
fn wireshark_reads_what_units_send_each_other() {
    let directory = ScratchDir::new("dissector").unwrap();
    let mut punt = Encapsulation {
        target: 0x1234,
        dispatcher: 0x0abc,
        handoff: Handoff::Punt,
        hook: Hook::AfterRendezvous { src_port: 1_111, dst_port: 2_222 },
        table: 9,
        odd_era: true,
        ttl: 7,
        vlan: Some(0x6064),
        route: Some(Route::default()),
        ..plain()
    };
    punt.record(11);
    punt.record(12);
    let resolve = |next_hop: &str| Handoff::Resolve { next_hop: next_hop.parse().unwrap() };
    let frame = frame(30);
    let payloads = [
        payload(&plain(), &frame),
        payload(&punt, &frame),
        payload(&Encapsulation { handoff: resolve("192.0.2.77"), ..plain() }, &frame),
        payload(&Encapsulation { handoff: resolve("2001:db8::77"), ..plain() }, &frame),
    ];
    let port = entropy_port(&frame);
    let packets: Vec<_> = payloads
        .iter()
        .enumerate()
        .map(|(place, payload)| packet_of(["192.0.2.1", "2001:db8::1"][place % 2], payload, port))
        .collect();
    let capture = capture(&directory, &packets);
    let names = "target dispatcher type hdr_size era snode ifid ttl handoff hook table recorded vlan.id vlan.priority \
                 src_port dst_port nid next_hop next_hop6";
    assert_eq!(
        fields(&capture, "anabranch_bus", &with_prefix("anabranch_bus", names)),
        [
            "2|1|0|1|0|1|3|8|0|0|0|0|||||||",
            "4660|2748|1|6|1|2748|3|7|1|1|9|2|100|3|1111|2222|11,12||",
            "2|1|1|2|0|1|3|8|5|0|0|0||||||192.0.2.77|",
            "2|1|1|5|0|1|3|8|5|0|0|0|||||||2001:db8::77",
        ]
    );
    let recorded = fields(&capture, "anabranch_bus.trr == 1 && anabranch_bus.tagged == 1", "frame.number");
    assert_eq!(recorded, ["2"]);
    // Around and inside it is what it should be, and nothing is complained of.
    let around = fields(&capture, "udp", "udp.srcport udp.dstport eth.src udp.length frame.protocols");
    for (line, ip) in around.iter().zip(["ip", "ipv6", "ip", "ipv6"]) {
        assert!(line.starts_with(&format!("{port},12345|4602,53|02:00:00:00:00:02|")), "{line}");
        assert!(line.contains(&format!("|raw:{ip}:udp:anabranch_bus:eth:ethertype:ip:udp:")), "{line}");
    }
    assert_eq!(around.len(), 4);
    assert_eq!(fields(&capture, "anabranch_bus.bad", "frame.number"), [""; 0]);
}

/// Fragments at the UDP layer, and fields that contradict each other.
#[test]
fn wireshark_reads_fragments_and_says_what_is_wrong() {
    let directory = ScratchDir::new("dissector").unwrap();
    let whole = payload(&plain(), &frame(1_000));
    let split = Split::new(&whole, 0xcafe, 800).unwrap();
    let mut packets: Vec<_> = (0..split.fragments())
        .map(|index| {
            let mut room = vec![0; 800];
            let bytes = split.write(index, &mut room);
            packet_of("192.0.2.1", &room[..bytes], 50_000)
        })
        .collect();
    let mut wrong = payload(&plain(), &frame(10));
    wrong[1] = 9;
    wrong[10] = 0;
    packets.push(packet_of("192.0.2.1", &wrong, 50_000));
    packets.push(packet_of("192.0.2.1", &payload(&plain(), &[0; 13]), 50_000));
    let capture = capture(&directory, &packets);
    let total = whole.len() - 6;
    assert_eq!(
        fields(
            &capture,
            "anabranch_bus.fragment == 1",
            &with_prefix("anabranch_bus", "fragment.id fragment.offset fragment.total handoff")
        ),
        [format!("0x0000cafe|0|{total}|0"), format!("0x0000cafe|786|{total}|")]
    );
    let wrong = fields(&capture, "anabranch_bus.bad", "frame.number _ws.expert.message");
    assert_eq!(wrong.len(), 2, "{wrong:?}");
    assert!(wrong[0].starts_with("3|") && wrong[1].starts_with("4|"), "{wrong:?}");
    assert!(wrong[0].contains("SNODE is not the dispatcher") && wrong[0].contains("TTL is 0"), "{wrong:?}");
    assert!(wrong[1].contains("ends before its Ethernet header"), "{wrong:?}");
}

/// The tunnel's clear header, and what stands behind it unsealed.
#[test]
fn wireshark_reads_the_header_of_tunnel_datagrams() {
    let directory = ScratchDir::new("dissector").unwrap();
    let datagram = |kind, body: &[u8]| {
        let header = Header {
            kind,
            receiving_core: 1,
            sending_core: 2,
            path: 3,
            receiver_index: 0x0102_0304,
            counter: 0x0001_0000_0000_0005,
        };
        let udp = [&header.to_bytes()[..], body].concat();
        let source = Ipv4Addr::new(192, 0, 2, 1).to_string();
        let mut packet = packet_of(&source, &udp, 50_000);
        packet[22..24].copy_from_slice(&4_600u16.to_be_bytes());
        packet
    };
    let capture = capture(
        &directory,
        &[
            datagram(Kind::Data, &[7; 40]),
            datagram(Kind::Clear, &[&[8, 0][..], &[0; 16]].concat()),
            datagram(Kind::Partial, &[&[0, 2, 8, 0][..], &[7; 20]].concat()),
            datagram(Kind::SealedHeader, &[7; 40]),
            datagram(Kind::Response, &[7; 40]),
        ],
    );
    let names = "kind receiving_core sending_core path index counter frames listener_index";
    let lane = "1|2|3|0x01020304";
    let counter = 0x0001_0000_0000_0005u64;
    assert_eq!(
        fields(&capture, "anabranch", &with_prefix("anabranch", names)),
        [
            format!("4|{lane}|{counter}||"),
            format!("5|{lane}|{counter}|0800|"),
            format!("6|{lane}|{counter}|0800|"),
            "7||2|3|0x01020304|||".to_owned(),
            format!("2|{lane}|||0x00000005"),
        ]
    );
}
