#![allow(clippy::unwrap_used, reason = "tests")]
use std::net::UdpSocket;
use std::process::Command;
use std::time::{Duration, Instant};

use packet::vnet::{GSO_NONE, GSO_UDP_L4, NEEDS_CSUM, VirtioNetHeader};

use super::*;
use crate::bpf::KernelShare;
use crate::ingress_guard::{GuardKind, IngressGuard};
use crate::netlink::Netlink;
use crate::packet_ring::{PacketRing, PacketRingOptions};
use crate::packet_sender::{PacketSender, SendFrame};
use crate::testing::isolated;
use crate::tun::{Tun, TunQueue};

#[test]
fn each_type_of_device_has_a_header_none_or_is_refused() {
    for (kind, point_to_point, expected) in [
        (1, false, Some(LinkLayer::Ethernet)),
        (512, true, Some(LinkLayer::None)),
        (0xfffe, false, Some(LinkLayer::None)),
        (519, false, Some(LinkLayer::None)),
        (768, true, Some(LinkLayer::None)),
        (776, false, Some(LinkLayer::None)),
        (778, true, Some(LinkLayer::None)),
        (778, false, None),
        (823, false, None),
        (772, false, None),
        (32, false, None),
    ] {
        assert_eq!(LinkLayer::of_type(kind, point_to_point), expected, "{kind}");
    }
}

#[test]
fn devices_are_asked() {
    isolated(|| {
        Netlink::open().unwrap().add_veth("left", "right", None).unwrap();
        let tun = Tun::create("tun7", 1).unwrap();
        assert_eq!(LinkLayer::of("left").unwrap(), LinkLayer::Ethernet);
        assert_eq!(LinkLayer::of(tun.name()).unwrap(), LinkLayer::None);
        assert_eq!(LinkLayer::of("lo").unwrap_err().kind(), io::ErrorKind::Unsupported);
        assert_eq!(mtu("left").unwrap(), 1500);
        assert!(LinkLayer::of("nowhere").is_err());
        let links = Netlink::open().unwrap().links().unwrap();
        let layer = |name: &str| links.iter().find(|link| link.name == name).unwrap().layer;
        let layers = [layer("left"), layer("tun7"), layer("lo")];
        assert_eq!(layers, [Some(LinkLayer::Ethernet), Some(LinkLayer::None), None]);
    });
}

/// A TUN device with 10.4.0.1/24, switched on, and its other end.
fn device() -> (Tun, TunQueue) {
    // Router solicitations would come between.
    crate::netns::set_sysctl("net.ipv6.conf.default.disable_ipv6", "1").unwrap();
    let mut tun = Tun::create("tun7", 1).unwrap();
    let queue = tun.take_queues().remove(0);
    let netlink = Netlink::open().unwrap();
    netlink.add_address(tun.index(), "10.4.0.1/24".parse().unwrap()).unwrap();
    netlink.set_up(tun.index(), true).unwrap();
    (tun, queue)
}

/// UDP over IPv4 without checksum.
fn udp(to: [u8; 4], ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0];
    packet.extend((28 + payload.len() as u16).to_be_bytes());
    packet.extend([0, 0, 0x40, 0, 64, 17, 0, 0, 10, 4, 0, 2]);
    packet.extend(to);
    let sum: u32 = packet.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(ports.0.to_be_bytes());
    packet.extend(ports.1.to_be_bytes());
    packet.extend((8 + payload.len() as u16).to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(payload);
    packet
}

fn udp6(to: &str, hop_limit: u8, next_header: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([next_header, hop_limit]);
    packet.extend("fd04::2".parse::<std::net::Ipv6Addr>().unwrap().octets());
    packet.extend(to.parse::<std::net::Ipv6Addr>().unwrap().octets());
    packet.extend(payload);
    packet
}

fn put(queue: &TunQueue, vnet: VirtioNetHeader, packet: &[u8]) {
    queue.write(&[&vnet.to_bytes()[..], packet].concat()).unwrap();
}

fn receive(ring: &mut PacketRing) -> usize {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        match ring.receive(64) {
            0 if Instant::now() < end => std::thread::sleep(Duration::from_micros(100)),
            count => return count,
        }
    }
}

#[test]
fn packets_get_an_empty_ethernet_header_and_lose_it_again() {
    isolated(|| {
        let (_tun, queue) = device();
        let mut ring = PacketRing::open("tun7", &PacketRingOptions::default()).unwrap();
        let sender = PacketSender::open("tun7", false).unwrap();
        // Not the host's address: it would answer.
        let v4 = udp([10, 4, 0, 77], (7, 9), b"hello");
        let v6 = udp6("fd04::1", 64, 17, &udp([0; 4], (7, 9), b"six")[20..]);
        // The ring goes round more than once.
        for _ in 0..3_000 {
            for (packet, kind) in [(&v4, [8, 0]), (&v6, [0x86, 0xdd])] {
                put(&queue, VirtioNetHeader::default(), packet);
                assert_eq!(receive(&mut ring), 1);
                let received = ring.frame(0).unwrap();
                assert_eq!(received.vnet.gso_type, GSO_NONE);
                assert_eq!(received.frame, [&[0; 12][..], &kind, packet].concat());
                let (vnet, frame) = (received.vnet.to_bytes(), received.frame.to_vec());
                let sent = sender.send_many(&[SendFrame { vnet, parts: [&frame, &[], &[]] }]);
                assert_eq!((sent.sent, sent.full, sent.refused), (1, 0, 0), "{:?}", sent.error);
                let mut buffer = [0; 2_000];
                let bytes = queue.read(&mut buffer).unwrap();
                assert_eq!(&buffer[10..bytes], &packet[..]);
            }
        }
        assert_eq!((ring.drops().unwrap(), ring.cut()), (0, 0));
    });
}

#[test]
fn super_packets_stay_whole_both_ways() {
    isolated(|| {
        let (_tun, queue) = device();
        let mut ring = PacketRing::open("tun7", &PacketRingOptions::default()).unwrap();
        let sender = PacketSender::open("tun7", false).unwrap();
        let batch = VirtioNetHeader {
            flags: NEEDS_CSUM,
            gso_type: GSO_UDP_L4,
            hdr_len: 28,
            gso_size: 1_000,
            csum_start: 20,
            csum_offset: 6,
        };
        for bytes in [3_000, 20_000, 60_000] {
            let payload: Vec<u8> = (0..bytes).map(|number| (number % 251) as u8).collect();
            let packet = udp([10, 4, 0, 9], (7, 9), &payload);
            put(&queue, batch, &packet);
            assert_eq!(receive(&mut ring), 1);
            let received = ring.frame(0).unwrap();
            // Positions count from the Ethernet header that is not there.
            assert_eq!((received.vnet.csum_start, received.vnet.gso_size), (34, 1_000));
            assert_eq!(received.frame[14..], packet[..]);
            let (vnet, frame) = (received.vnet.to_bytes(), received.frame.to_vec());
            let sent = sender.send_many(&[SendFrame { vnet, parts: [&frame, &[], &[]] }]);
            assert_eq!(sent.sent, 1, "{:?}", sent.error);
            let mut buffer = vec![0; 70_000];
            let read = queue.read(&mut buffer).unwrap();
            let vnet = VirtioNetHeader::parse(&buffer).unwrap();
            assert_eq!((vnet.gso_type, vnet.gso_size, vnet.csum_start), (GSO_UDP_L4, 1_000, 20));
            assert_eq!(buffer[10..read], packet[..]);
        }
        assert_eq!(ring.cut(), 0);
    });
}

fn cases() -> Vec<(&'static str, Vec<u8>, bool)> {
    let ports = |from, to| udp([0; 4], (from, to), b"x")[20..].to_vec();
    vec![
        ("to us", udp([10, 4, 0, 1], (7, 9), b"x"), false),
        ("through us", udp([203, 0, 113, 5], (7, 9), b"x"), false),
        ("the tunnel", udp([10, 4, 0, 1], (7, 4600), b"x"), true),
        ("someone else's tunnel", udp([10, 4, 0, 9], (7, 4600), b"x"), false),
        ("multicast", udp([224, 0, 0, 5], (7, 9), b"x"), true),
        ("below multicast", udp([223, 255, 255, 255], (7, 9), b"x"), false),
        ("broadcast", udp([255; 4], (68, 67), b"x"), true),
        ("an answer of DHCP", udp([10, 4, 0, 1], (67, 68), b"x"), true),
        ("IPv6", udp6("fd04::1", 64, 17, &ports(7, 9)), false),
        ("IPv6 multicast", udp6("ff02::5", 1, 89, &[0; 24]), true),
        ("link-local", udp6("fe80::1", 64, 17, &ports(7, 9)), true),
        ("the tunnel, IPv6", udp6("fd04::1", 64, 17, &ports(7, 4600)), true),
        ("neighbor solicitation", udp6("fd04::1", 255, 58, &[135, 0, 0, 0, 0, 0, 0, 0]), true),
        ("ping", udp6("fd04::1", 255, 58, &[128, 0, 0, 0, 0, 0, 0, 0]), false),
    ]
}

fn passed() -> u64 {
    let output = Command::new("nft").args(["list", "table", "netdev", "after"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let words: Vec<&str> = text.split_whitespace().collect();
    let at = words.iter().position(|word| *word == "packets").unwrap();
    words[at + 1].parse().unwrap()
}

fn division(kind: GuardKind) {
    crate::netns::set_sysctl("net.ipv6.conf.default.disable_ipv6", "1").unwrap();
    let (_tun, queue) = device();
    let after = "table netdev after { chain count { type filter hook ingress device \"tun7\" priority 0; counter; }; }";
    assert!(Command::new("nft").arg(after).status().unwrap().success());
    let share = KernelShare {
        udp_ports: vec![4600],
        addresses: Some(["10.4.0.1", "fd04::1"].map(|text| text.parse().unwrap()).to_vec()),
        link_local: true,
        dhcp_answers: true,
        macs: Vec::new(),
    };
    let options = PacketRingOptions { kernel: share.clone(), ..PacketRingOptions::default() };
    let mut ring = PacketRing::open("tun7", &options).unwrap();
    let guard = match kind {
        GuardKind::Program => IngressGuard::attach_program("tun7", &share, None),
        GuardKind::Table => IngressGuard::attach_table("tun7", &share),
    };
    if kind == GuardKind::Program && guard.is_err() {
        assert!(std::env::var_os(crate::testing::INSIDE).is_some(), "root may load programs");
        return;
    }
    let _guard = guard.unwrap();
    for (what, packet, to_kernel) in cases() {
        let before = passed();
        put(&queue, VirtioNetHeader::default(), &packet);
        let end = Instant::now() + Duration::from_secs(2);
        let mut taken = 0;
        while taken == 0 && Instant::now() < end && !(to_kernel && passed() > before) {
            taken = ring.receive(64);
        }
        let kernel = passed() - before;
        let expected = if to_kernel { (0, 1) } else { (1, 0) };
        assert_eq!((taken as u64, kernel), expected, "{kind:?}: {what}: (ring, kernel)");
    }
}

#[test]
fn each_packet_goes_either_to_the_datapath_or_to_the_kernel_by_program() {
    isolated(|| division(GuardKind::Program));
}

#[test]
fn each_packet_goes_either_to_the_datapath_or_to_the_kernel_by_table() {
    isolated(|| division(GuardKind::Table));
}

#[test]
fn a_packet_for_the_host_comes_in_again_by_the_device() {
    isolated(|| {
        let (_tun, queue) = device();
        let share = KernelShare::default();
        if IngressGuard::attach_program("tun7", &share, None).is_err() {
            assert!(std::env::var_os(crate::testing::INSIDE).is_some(), "root may load programs");
            return;
        }
        let _guard = IngressGuard::attach_program("tun7", &share, None).unwrap();
        let back = PacketSender::open_to_ingress("tun7").unwrap();
        let own = UdpSocket::bind("10.4.0.1:9").unwrap();
        own.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let device = |socket: &UdpSocket| {
            let name = b"tun7\0";
            // SAFETY: the name lives for the call and has this length.
            let result = unsafe {
                libc::setsockopt(
                    socket.as_raw_fd(),
                    libc::SOL_SOCKET,
                    libc::SO_BINDTODEVICE,
                    name.as_ptr().cast(),
                    name.len() as u32,
                )
            };
            check(result).unwrap();
        };
        device(&own);
        let packet = udp([10, 4, 0, 1], (7, 9), b"hello");
        let frame = [&[0; 12][..], &[8, 0], &packet].concat();
        let sent = back.send_many(&[SendFrame { vnet: [0; 10], parts: [&frame, &[], &[]] }]);
        assert_eq!(sent.sent, 1, "{:?}", sent.error);
        let mut buffer = [0; 16];
        assert_eq!(own.recv(&mut buffer).unwrap(), 5);
        // Not out of the device.
        assert!(queue.read(&mut [0; 100]).is_err());
    });
}
