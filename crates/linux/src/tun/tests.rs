#![allow(clippy::unwrap_used, reason = "tests")]
use std::io::{ErrorKind, IoSliceMut, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use packet::flow::FlowKey;
use steering::symmetric::{FlowHasher, core_bucket};

use super::*;
use crate::bpf::SteeringProgram;
use crate::netlink::Netlink;
use crate::testing::isolated;
use crate::udp::{RecvMeta, UdpOptions, UdpSocket};

const NEEDS_CHECKSUM: u8 = 1;
const GSO_TCPV4: u8 = 1;
const GSO_UDP_L4: u8 = 5;

/// A TUN that is up and owns 10.9.0.1/24 and fd09::1/64.
fn tun(queues: usize) -> (Tun, Vec<TunQueue>) {
    let tun = Tun::create("test%d", queues).unwrap();
    let netlink = Netlink::open().unwrap();
    // Quiet: no router solicitations among the test's packets.
    crate::netns::set_sysctl("net.ipv6.conf.all.disable_ipv6", "0").unwrap();
    crate::netns::set_sysctl(&format!("net.ipv6.conf.{}.addr_gen_mode", tun.name()), "1").unwrap();
    for address in ["10.9.0.1/24", "fd09::1/64"] {
        netlink.add_address(tun.index(), address.parse().unwrap()).unwrap();
    }
    netlink.set_up(tun.index(), true).unwrap();
    wait("the kernel to accept packets for the IPv6 address", || {
        let routes = netlink.routes(Some(crate::netlink::Family::V6))?;
        let ready = routes.iter().any(|route| route.spec.dst == "fd09::1/128".parse().unwrap());
        if ready { Ok(()) } else { Err(ErrorKind::WouldBlock.into()) }
    });
    tun.into_parts()
}

/// The next packet of a queue that is not the kernel's own chatter (IGMP, MLD, neighbor discovery, router
/// solicitation).
fn read(queue: &TunQueue, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        let bytes = queue.read(buffer)?;
        let packet = &buffer[VNET_HEADER_BYTES..bytes];
        let protocol = if packet[0] >> 4 == 4 { packet[9] } else { packet[6] };
        if matches!(protocol, 6 | 17) {
            return Ok(bytes);
        }
    }
}

fn wait<T>(what: &str, mut attempt: impl FnMut() -> io::Result<T>) -> T {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        match attempt() {
            Ok(value) => return value,
            Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < end => {
                std::thread::sleep(Duration::from_micros(200));
            }
            Err(error) => panic!("{what}: {error}"),
        }
    }
}

#[test]
fn a_tun_has_its_name_index_and_queues_and_goes_with_its_handles() {
    isolated(|| {
        let mut tun = Tun::create("ana%d", 4).unwrap();
        assert_eq!((tun.name(), tun.queue_count(), tun.offload()), ("ana0", 4, Offload::TcpAndUdp));
        let netlink = Netlink::open().unwrap();
        let link = netlink.link("ana0").unwrap().unwrap();
        assert_eq!((link.index, link.kind.as_deref()), (tun.index(), Some("tun")));
        let queues = tun.take_queues();
        assert_eq!((queues.len(), tun.take_queues().len()), (4, 0));
        assert_eq!(queues[0].read(&mut [0; 100]).unwrap_err().kind(), ErrorKind::WouldBlock);

        let error = Tun::create("ana0", 4).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBUSY));
        assert!(error.to_string().contains("another instance"), "{error}");
        assert!(Tun::create("ana1", 0).is_err());
        assert!(Tun::create("a name", 1).is_err());

        drop(queues);
        assert!(netlink.link("ana0").unwrap().is_some());
        drop(tun);
        assert!(netlink.link("ana0").unwrap().is_none());
    });
}

#[test]
fn a_udp_super_packet_is_read_whole_and_written_back_whole() {
    isolated(|| {
        let (_tun, queues) = tun(1);
        for (local, remote) in [("10.9.0.1:5000", "10.9.0.2:6000"), ("[fd09::1]:5000", "[fd09::2]:6000")] {
            let (local, remote): (SocketAddr, SocketAddr) = (local.parse().unwrap(), remote.parse().unwrap());
            let header = if local.is_ipv4() { 28 } else { 48 };
            let socket = UdpSocket::bind(&UdpOptions::new(local)).unwrap();
            let contents: Vec<u8> = (0..10_500u32).map(|index| (index / 7) as u8).collect();
            socket.send(remote, None, Some(1000), &contents).unwrap();

            let mut buffer = vec![0; 70_000];
            let bytes = wait("read the super-packet", || read(&queues[0], &mut buffer));
            assert_eq!(bytes, VNET_HEADER_BYTES + header + contents.len(), "not one super-packet");
            let packet = &mut buffer[..bytes];
            assert_eq!(packet[0] & NEEDS_CHECKSUM, NEEDS_CHECKSUM);
            assert_eq!(packet[1], GSO_UDP_L4);
            assert_eq!(u16::from_le_bytes([packet[4], packet[5]]), 1000);

            // Back to the sender: swapping addresses and ports changes no checksum.
            let (address, at) = if local.is_ipv4() { (4, 12) } else { (16, 8) };
            swap(&mut packet[VNET_HEADER_BYTES + at..], address);
            swap(&mut packet[VNET_HEADER_BYTES + header - 8..], 2);
            if local.is_ipv4() {
                assert_eq!(queues[0].write(packet).unwrap(), bytes);
            } else {
                let (head, rest) = packet.split_at(33);
                assert_eq!(
                    queues[0].write_vectored(&[IoSlice::new(head), IoSlice::new(rest)]).unwrap(),
                    bytes
                );
            }
            // The answer comes from port 6000 to port 5000.
            let mut received = vec![0; 70_000];
            let mut metas = [RecvMeta::default()];
            let count = wait(&format!("receive the train from {remote}"), || {
                socket.recv(&mut [IoSliceMut::new(&mut received)], &mut metas)
            });
            assert_eq!(count, 1);
            assert_eq!((metas[0].from, metas[0].bytes, metas[0].stride), (remote, contents.len(), 1000));
            assert!(received[..contents.len()] == contents);
        }
    });
}

fn swap(bytes: &mut [u8], size: usize) {
    let (left, right) = bytes.split_at_mut(size);
    left.swap_with_slice(&mut right[..size]);
}

#[test]
fn a_tcp_stream_passes_four_queues_as_super_packets() {
    const BYTES: usize = 8 << 20;
    isolated(|| {
        let (_tun, queues) = tun(4);
        let (stop, largest) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            // Whoever is called 10.9.0.2 is ourselves under another name: both ends of the stream are here.
            scope.spawn(|| reflect(&queues, &stop, &largest));
            let listener = TcpListener::bind("10.9.0.1:7000").unwrap();
            let mut sender = TcpStream::connect("10.9.0.2:7000").unwrap();
            let (mut receiver, from) = listener.accept().unwrap();
            assert_eq!(from.ip().to_string(), "10.9.0.2");
            let contents: Vec<u8> = (0..BYTES).map(|index| (index % 251) as u8).collect();
            let sent = contents.clone();
            scope.spawn(move || sender.write_all(&sent).unwrap());
            let mut received = vec![0; BYTES];
            receiver.read_exact(&mut received).unwrap();
            stop.store(true, Ordering::Relaxed);
            assert!(received == contents, "the stream was changed");
        });
        let largest = largest.into_inner();
        assert!(largest > 20_000, "no super-packets: the largest packet had {largest} bytes");
    });
}

/// Sends every TCP packet back with its addresses swapped.
fn reflect(queues: &[TunQueue], stop: &AtomicBool, largest: &AtomicUsize) {
    let mut buffer = vec![0; 70_000];
    while !stop.load(Ordering::Relaxed) {
        let mut idle = true;
        for queue in queues {
            let Ok(bytes) = read(queue, &mut buffer) else { continue };
            idle = false;
            if buffer[VNET_HEADER_BYTES] >> 4 != 4 {
                continue;
            }
            let packet = &mut buffer[..bytes];
            if packet[1] & 0x7f == GSO_TCPV4 {
                largest.fetch_max(bytes, Ordering::Relaxed);
            }
            swap(&mut packet[VNET_HEADER_BYTES + 12..], 4);
            queue.write(packet).unwrap();
        }
        if idle {
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

#[test]
fn the_steering_program_puts_live_packets_on_the_queue_of_their_owner() {
    isolated(|| {
        let (tun, queues) = tun(4);
        let hasher = FlowHasher::new(std::array::from_fn(|index| (index * 37 + 11) as u8));
        let owners: Vec<u16> = (0..128).map(|bucket| bucket % 4).collect();
        let program = match SteeringProgram::load(&hasher, 0, &owners) {
            Ok(program) => program,
            Err(error) => {
                // An ordinary user must be told so, and goes on with the kernel's own steering.
                assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
                assert!(std::env::var_os(crate::testing::INSIDE).is_some(), "root may load programs");
                return;
            }
        };
        tun.attach_steering(&program).unwrap();
        let seen = send_and_check(&queues, &hasher, &owners);
        assert!(seen.iter().all(|count| *count >= 20), "{seen:?}");

        let owners = [2, 3];
        program.update_table(&owners).unwrap();
        let seen = send_and_check(&queues, &hasher, &owners);
        assert!(seen[0] == 0 && seen[1] == 0 && seen[2] > 50 && seen[3] > 50, "{seen:?}");
    });
}

/// Sends datagrams, trains and TCP connection attempts to many places; returns how many came out of each queue.
fn send_and_check(queues: &[TunQueue], hasher: &FlowHasher, owners: &[u16]) -> [usize; 4] {
    let v4 = UdpSocket::bind(&UdpOptions::new("10.9.0.1:0".parse().unwrap())).unwrap();
    let v6 = UdpSocket::bind(&UdpOptions::new("[fd09::1]:0".parse().unwrap())).unwrap();
    for number in 0..60u16 {
        let host = number % 200 + 2;
        v4.send(format!("10.9.0.{host}:{}", 1000 + number).parse().unwrap(), None, None, b"one").unwrap();
        v6.send(format!("[fd09::{host}]:{}", 1000 + number).parse().unwrap(), None, None, b"two").unwrap();
        v4.send(format!("10.9.0.{host}:{}", 2000 + number).parse().unwrap(), None, Some(500), &[7; 5000])
            .unwrap();
        let tcp =
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM.nonblocking(), None).unwrap();
        let to: SocketAddr = format!("10.9.0.{host}:{}", 3000 + number).parse().unwrap();
        assert!(tcp.connect(&to.into()).is_err(), "nobody answers");
    }
    let mut seen = [0; 4];
    let mut buffer = vec![0; 70_000];
    for (number, queue) in queues.iter().enumerate() {
        while let Ok(bytes) = read(queue, &mut buffer) {
            let key = FlowKey::of(&buffer[VNET_HEADER_BYTES..bytes]).unwrap();
            let owner = owners[core_bucket(hasher.hash(&key, 0), owners.len())];
            assert_eq!(number, usize::from(owner), "{key}");
            seen[number] += 1;
        }
    }
    assert_eq!(seen.iter().sum::<usize>(), 240);
    seen
}

#[test]
fn without_a_program_the_answer_comes_back_on_the_queue_that_wrote_the_flow() {
    isolated(|| {
        let (_tun, queues) = tun(4);
        let socket = UdpSocket::bind(&UdpOptions::new("10.9.0.1:5000".parse().unwrap())).unwrap();
        let mut buffer = vec![0; 2000];
        for port in 1000..1040u16 {
            let wanted = usize::from(port % 4);
            let mut packet = vec![0; VNET_HEADER_BYTES];
            packet.extend([0x45, 0, 0, 31, 0, 1, 0, 0, 64, 17, 0, 0, 10, 9, 0, 2, 10, 9, 0, 1]);
            packet.extend(port.to_be_bytes());
            packet.extend([0x13, 0x88, 0, 11, 0, 0, 1, 2, 3]);
            let sum = packet::checksum::sum(&packet[VNET_HEADER_BYTES..VNET_HEADER_BYTES + 20], 0);
            let sum = packet::checksum::finish(sum);
            packet[VNET_HEADER_BYTES + 10..VNET_HEADER_BYTES + 12].copy_from_slice(&sum.to_be_bytes());
            queues[wanted].write(&packet).unwrap();
            socket.send(SocketAddr::new("10.9.0.2".parse().unwrap(), port), None, None, b"answer").unwrap();
            wait("read the answer", || read(&queues[wanted], &mut buffer));
        }
    });
}
