#![allow(clippy::unwrap_used, reason = "tests")]
use std::time::{Duration, Instant};

use ::packet::flow::FlowKey;
use steering::symmetric::{FlowHasher, core_bucket};

use super::*;
use crate::netlink::Netlink;
use crate::netns::set_sysctl;
use crate::packet_sender::{PacketSender, SendFrame};
use crate::packet_socket::PacketSocket;
use crate::testing::isolated;
use crate::udp::{UdpOptions, UdpSocket};

const RIGHT: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// Two ends of a cable, silent.
fn cable() -> Netlink {
    set_sysctl("net.ipv6.conf.default.disable_ipv6", "1").unwrap();
    let netlink = Netlink::open().unwrap();
    netlink.add_veth("left", "right", None).unwrap();
    // The end that sends last: one that is up before its carrier swallows frames for a while.
    for (name, mac) in [("right", RIGHT), ("left", [2, 0, 0, 0, 0, 1])] {
        let index = netlink.link(name).unwrap().unwrap().index;
        netlink.set_mac(index, mac).unwrap();
        netlink.set_up(index, true).unwrap();
    }
    netlink
}

/// UDP over IPv4 to the right end.
fn udp(source_port: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = [&RIGHT[..], &[2, 0, 0, 0, 0, 1, 8, 0]].concat();
    let bytes = payload.len() as u16;
    frame.extend([0x45, 0]);
    frame.extend((28 + bytes).to_be_bytes());
    frame.extend([0, 0, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend(source_port.to_be_bytes());
    frame.extend(9000u16.to_be_bytes());
    frame.extend((8 + bytes).to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(payload);
    frame
}

/// Waits for frames; the caller's mistake is a timeout.
fn receive(ring: &mut PacketRing, max: usize) -> usize {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        match ring.receive(max) {
            0 if Instant::now() < end => std::thread::sleep(Duration::from_micros(100)),
            count => return count,
        }
    }
}

fn everything(ring: &mut PacketRing) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    while ring.receive(BATCH_MAX) > 0 {
        all.extend(ring.frames().map(|received| received.frame.to_vec()));
    }
    all
}

#[test]
fn frames_come_in_order_many_times_around_the_ring_and_may_be_written() {
    isolated(|| {
        cable();
        let left = PacketSocket::open("left", false, true).unwrap();
        let options = PacketRingOptions { ring_bytes: 1 << 19, ..PacketRingOptions::default() };
        let mut ring = PacketRing::open("right", &options).unwrap();
        assert_eq!(ring.slots(), 256);
        assert_eq!(ring.receive(64), 0);
        assert!(ring.is_empty());
        for round in 0..20u16 {
            for number in 0..100u16 {
                left.send(&udp(round * 100 + number, &[number as u8; 30])).unwrap();
            }
            let mut next = 0;
            while next < 100 {
                let count = receive(&mut ring, 33);
                assert!(count <= 33 && count == ring.len());
                for received in ring.frames() {
                    assert_eq!(received.frame, udp(round * 100 + next, &[next as u8; 30]));
                    assert_eq!(received.vnet.gso_type, ::packet::vnet::GSO_NONE);
                    received.frame.fill(0xee);
                    next += 1;
                }
                assert_eq!(ring.frame(0).unwrap().frame[0], 0xee);
                assert!(ring.frame(count).is_none());
                if round % 2 == 0 {
                    ring.release();
                    assert!(ring.is_empty());
                }
            }
        }
        assert_eq!((ring.drops().unwrap(), ring.cut()), (0, 0));
    });
}

#[test]
fn a_full_ring_drops_counts_and_goes_on() {
    isolated(|| {
        cable();
        let left = PacketSocket::open("left", false, true).unwrap();
        let options = PacketRingOptions { ring_bytes: 1 << 19, ..PacketRingOptions::default() };
        let mut ring = PacketRing::open("right", &options).unwrap();
        for number in 0..300 {
            left.send(&udp(number, b"x")).unwrap();
        }
        // What the batch holds is not overwritten.
        assert_eq!(receive(&mut ring, 10), 10);
        left.send(&udp(999, b"lost")).unwrap();
        assert_eq!(ring.frame(9).unwrap().frame, udp(9, b"x"));
        let rest = everything(&mut ring);
        assert_eq!(rest.len(), 246);
        assert_eq!(rest[245], udp(255, b"x"));
        assert_eq!((ring.drops().unwrap(), ring.drops().unwrap()), (45, 45));
        left.send(&udp(1, b"again")).unwrap();
        receive(&mut ring, 64);
        assert_eq!(ring.frame(0).unwrap().frame, udp(1, b"again"));
    });
}

/// Sends GSO batches of UDP among single datagrams, and wants them back whole and in order; after `before` has happened to the
/// cable and the ring.
fn gso_batches(slot_bytes: usize, before: impl FnOnce(&Netlink, &mut PacketRing)) {
    let netlink = cable();
    let index = netlink.link("left").unwrap().unwrap().index;
    netlink.add_address(index, "10.2.0.1/24".parse().unwrap()).unwrap();
    netlink.add_neighbor(index, "10.2.0.2".parse().unwrap(), RIGHT).unwrap();
    let options = PacketRingOptions { slot_bytes, ring_bytes: 16 << 20, ..PacketRingOptions::default() };
    let mut ring = PacketRing::open("right", &options).unwrap();
    let sender = UdpSocket::bind(&UdpOptions::new("10.2.0.1:0".parse().unwrap())).unwrap();
    let to = "10.2.0.2:9".parse().unwrap();
    before(&netlink, &mut ring);
    let sizes = [100, 60_000, 7, 1472, 10_000, 64_000, 1, 30_000];
    for (number, bytes) in sizes.into_iter().enumerate() {
        let segment = (bytes > 1472).then_some(1000);
        sender.send(to, None, segment, &vec![number as u8 + 1; bytes]).unwrap();
    }
    let mut seen = 0;
    while seen < sizes.len() {
        assert!(receive(&mut ring, BATCH_MAX) > 0, "{seen} came, cut {}", ring.cut());
        for Received { vnet, frame } in ring.frames() {
            let bytes = sizes[seen];
            assert_eq!(frame.len(), 42 + bytes);
            assert!(frame[42..].iter().all(|byte| usize::from(*byte) == seen + 1), "frame {seen}");
            let (kind, size) =
                if bytes > 1472 { (::packet::vnet::GSO_UDP_L4, 1000) } else { (::packet::vnet::GSO_NONE, 0) };
            assert_eq!((vnet.gso_type, vnet.gso_size), (kind, size));
            // Positions count from the Ethernet header.
            assert!(!vnet.needs_csum() || (vnet.csum_start, vnet.csum_offset) == (34, 6), "{vnet:?}");
            seen += 1;
        }
    }
    assert_eq!((ring.cut(), ring.drops().unwrap()), (0, 0));
}

/// The interface goes down and comes back; returns when frames arrive again.
fn bounce(netlink: &Netlink, ring: &mut PacketRing) {
    for up in [false, true] {
        netlink.set_up(ring.interface(), up).unwrap();
    }
    let left = PacketSocket::open("left", false, true).unwrap();
    let end = Instant::now() + Duration::from_secs(5);
    while ring.receive(BATCH_MAX) == 0 {
        assert!(Instant::now() < end, "the cable stays silent");
        let _ = left.send(&udp(1, b"there?"));
        std::thread::sleep(Duration::from_millis(1));
    }
    while ring.receive(BATCH_MAX) > 0 {}
}

#[test]
fn super_packets_come_whole_and_in_order_beside_the_slots() {
    isolated(|| gso_batches(0, |_, _| ()));
}

#[test]
fn super_packets_come_whole_and_in_order_in_large_slots() {
    isolated(|| gso_batches(SLOT_BYTES_SUPER, |_, _| ()));
}

#[test]
fn super_packets_stay_with_their_slots_when_the_interface_was_down_for_a_moment() {
    isolated(|| gso_batches(0, bounce));
}

#[test]
fn who_waits_for_a_ring_is_not_woken_for_ever_by_an_interface_that_was_down() {
    isolated(|| {
        let netlink = cable();
        let mut ring = PacketRing::open("right", &PacketRingOptions::default()).unwrap();
        let epoll = crate::event::Epoll::new().unwrap();
        epoll.add(&ring, 5, crate::event::Interest::Read).unwrap();
        bounce(&netlink, &mut ring);
        ring.release();
        let mut ready = Vec::new();
        epoll.wait(&mut ready, Some(Duration::ZERO)).unwrap();
        assert!(matches!(ready[..], [one] if one.token == 5 && one.failed), "{ready:?}");
        assert_eq!(ring.take_error().unwrap().raw_os_error(), Some(libc::ENETDOWN));
        assert!(ring.take_error().is_none());
        epoll.wait(&mut ready, Some(Duration::ZERO)).unwrap();
        assert!(ready.is_empty(), "{ready:?}");
    });
}

#[test]
fn a_larger_mtu_makes_larger_slots() {
    isolated(|| {
        let netlink = cable();
        for name in ["left", "right"] {
            netlink.set_mtu(netlink.link(name).unwrap().unwrap().index, 9000).unwrap();
        }
        let left = PacketSocket::open("left", false, true).unwrap();
        let mut ring = PacketRing::open("right", &PacketRingOptions::default()).unwrap();
        let frame = udp(1, &[5; 8972]);
        left.send(&frame).unwrap();
        receive(&mut ring, 1);
        assert!(ring.places.iter().all(|place| matches!(place, Place::Slot(..))));
        assert_eq!(ring.frame(0).unwrap().frame, frame);
    });
}

#[test]
fn what_one_ring_receives_another_interface_sends() {
    isolated(|| {
        let netlink = cable();
        netlink.add_veth("out", "far", None).unwrap();
        for name in ["far", "out"] {
            netlink.set_up(netlink.link(name).unwrap().unwrap().index, true).unwrap();
        }
        let index = netlink.link("left").unwrap().unwrap().index;
        netlink.add_address(index, "10.2.0.1/24".parse().unwrap()).unwrap();
        netlink.add_neighbor(index, "10.2.0.2".parse().unwrap(), RIGHT).unwrap();
        let mut ring = PacketRing::open("right", &PacketRingOptions::default()).unwrap();
        let sender = PacketSender::open("out", false).unwrap();
        let far = PacketSocket::open("far", true, true).unwrap();
        let source = UdpSocket::bind(&UdpOptions::new("10.2.0.1:0".parse().unwrap())).unwrap();
        source.send("10.2.0.2:9".parse().unwrap(), None, Some(1000), &[7; 50_000]).unwrap();
        source.send("10.2.0.2:9".parse().unwrap(), None, None, &[8; 500]).unwrap();
        let mut sent = 0;
        while sent < 2 {
            let count = receive(&mut ring, BATCH_MAX);
            let mut out = [SendFrame::default(); BATCH_MAX];
            for (Received { vnet, frame }, out) in ring.frames().zip(&mut out) {
                let (ethernet, packet) = frame.split_at(14);
                *out = SendFrame { vnet: vnet.to_bytes(), parts: [ethernet, packet, &[]] };
            }
            let result = sender.send_many(&out[..count]);
            assert_eq!((result.sent, result.full, result.refused), (count, 0, 0), "{result:?}");
            sent += count;
        }
        let mut buffer = vec![0; 70_000];
        for (bytes, fill, kind) in [(50_000, 7, 5), (500, 8, 0)] {
            let end = Instant::now() + Duration::from_secs(5);
            let length = loop {
                match far.receive(&mut buffer) {
                    Ok(length) => break length,
                    Err(error) => assert!(Instant::now() < end, "{error}"),
                }
            };
            assert_eq!((length, buffer[1]), (10 + 42 + bytes, kind));
            assert!(buffer[52..length].iter().all(|byte| *byte == fill));
        }
    });
}

fn group(cores: usize, options: &PacketRingOptions<'_>) -> Vec<PacketRing> {
    let mut options = PacketRingOptions { group: Group::New, ..options.clone() };
    let open = |_| {
        let ring = PacketRing::open("right", &options).unwrap();
        options.group = ring.group();
        ring
    };
    (0..cores).map(open).collect()
}

#[test]
fn the_steering_program_gives_each_frame_to_the_ring_of_its_owner() {
    isolated(|| {
        cable();
        let hasher = FlowHasher::new(std::array::from_fn(|index| (index * index * 11 + 5) as u8));
        let owners: Vec<u16> = (0..128).map(|bucket| bucket % 3).collect();
        let program = match SteeringProgram::load(&hasher, 0, &owners) {
            Ok(program) => program,
            Err(error) => {
                assert!(
                    std::env::var_os(crate::testing::INSIDE).is_some(),
                    "root may load programs: {error}"
                );
                return;
            }
        };
        let left = PacketSocket::open("left", false, true).unwrap();
        let fanout = Fanout::Steering(&program);
        let mut rings = group(3, &PacketRingOptions { fanout, ..PacketRingOptions::default() });
        let check = |rings: &mut [PacketRing], owners: &[u16]| {
            for port in 0..300 {
                left.send(&udp(port, b"steered")).unwrap();
            }
            let mut all = 0;
            for (core, ring) in rings.iter_mut().enumerate() {
                let frames = everything(ring);
                assert!(frames.len() > 50, "core {core} got {}", frames.len());
                for frame in &frames {
                    let hash = hasher.hash(&FlowKey::of(&frame[14..]).unwrap(), 0);
                    assert_eq!(usize::from(owners[core_bucket(hash, owners.len())]), core);
                }
                all += frames.len();
            }
            assert_eq!(all, 300);
        };
        check(&mut rings, &owners);
        // The table changes while the group stands.
        let owners: Vec<u16> = (0..128).map(|bucket| (bucket + 1) % 3).collect();
        program.update_table(&owners).unwrap();
        check(&mut rings, &owners);
        // Their successors come while they are there: nothing arrives twice, nobody's place changes when they go, and none
        // that a core still holds takes anything.
        let mut next = group(3, &PacketRingOptions { fanout, closed: true, ..PacketRingOptions::default() });
        check(&mut rings, &owners);
        for (old, new) in rings.iter().zip(&next) {
            assert_ne!(old.group(), new.group());
            old.filter().unwrap().close().unwrap();
            new.filter().unwrap().set_kernel_share(&KernelShare::default()).unwrap();
        }
        check(&mut next, &owners);
        let last = rings.split_off(2);
        drop(rings);
        check(&mut next, &owners);
        drop(last);
        check(&mut next, &owners);
    });
}

#[test]
fn every_other_way_to_divide_delivers_each_frame_once() {
    isolated(|| {
        cable();
        let left = PacketSocket::open("left", false, true).unwrap();
        let ways = [(Fanout::Hash, 2), (Fanout::RoundRobin, 2), (Fanout::Random, 2), (Fanout::Cpu, 1)];
        for (way, used_min) in ways {
            let mut rings = group(2, &PacketRingOptions { fanout: way, ..PacketRingOptions::default() });
            for port in 0..200 {
                left.send(&udp(port, b"once")).unwrap();
            }
            let counts: Vec<usize> = rings.iter_mut().map(|ring| everything(ring).len()).collect();
            assert_eq!(counts.iter().sum::<usize>(), 200, "{way:?} {counts:?}");
            assert!(counts.iter().filter(|count| **count > 20).count() >= used_min, "{way:?} {counts:?}");
        }
    });
}

#[test]
fn the_kernel_wakes_a_sleeper_and_what_goes_wrong_is_said() {
    isolated(|| {
        let netlink = cable();
        let error = PacketRing::open("nowhere", &PacketRingOptions::default()).unwrap_err();
        assert!(error.to_string().contains("nowhere"), "{error}");
        let error = PacketRing::open("lo", &PacketRingOptions::default()).unwrap_err();
        assert!(error.to_string().contains("neither Ethernet nor none"), "{error}");

        let mut ring = PacketRing::open("right", &PacketRingOptions::default()).unwrap();
        let epoll = crate::event::Epoll::new().unwrap();
        epoll.add(&ring, 5, crate::event::Interest::Read).unwrap();
        let mut ready = Vec::new();
        epoll.wait(&mut ready, Some(Duration::ZERO)).unwrap();
        assert!(ready.is_empty());
        let left = PacketSocket::open("left", false, true).unwrap();
        for number in 0..100 {
            left.send(&udp(number, b"wake")).unwrap();
        }
        let mut seen = 0;
        while seen < 100 {
            epoll.wait(&mut ready, Some(Duration::from_secs(5))).unwrap();
            assert!(ready.iter().any(|one| one.token == 5 && one.readable), "{seen}");
            seen += ring.receive(16);
        }
        ring.release();
        epoll.wait(&mut ready, Some(Duration::ZERO)).unwrap();
        assert!(ready.is_empty());
        netlink.delete_link(ring.interface()).unwrap();
        assert_eq!(ring.receive(64), 0);
    });
}

#[test]
fn slots_do_not_cross_blocks() {
    for (ring_bytes, slot_bytes) in
        [(4 << 20, 2048), (0, 2112), (64 << 20, SLOT_BYTES_SUPER), (1 << 20, 9280)]
    {
        let geometry = Geometry::of(ring_bytes, slot_bytes);
        assert!(geometry.per_block * slot_bytes <= geometry.block_bytes, "{geometry:?}");
        assert!(geometry.blocks >= 2 && geometry.block_bytes.is_multiple_of(4096), "{geometry:?}");
        assert_eq!(geometry.slots, geometry.blocks * geometry.per_block);
    }
}
