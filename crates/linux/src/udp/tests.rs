#![allow(clippy::unwrap_used, reason = "tests")]
use std::time::{Duration, Instant};

use super::*;
use crate::netlink::Netlink;
use crate::netns::Namespace;
use crate::testing::isolated;

/// Everything that arrives within a moment.
fn drain(socket: &UdpSocket) -> Vec<(RecvMeta, Vec<u8>)> {
    let mut all = Vec::new();
    let mut storage = vec![vec![0u8; 65_535]; 8];
    loop {
        let mut buffers: Vec<_> = storage.iter_mut().map(|buffer| IoSliceMut::new(buffer)).collect();
        let mut metas = [RecvMeta::default(); 8];
        match socket.recv(&mut buffers, &mut metas) {
            Ok(count) => {
                for (meta, buffer) in metas.iter().zip(&storage).take(count) {
                    all.push((*meta, buffer[..meta.bytes].to_vec()));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return all,
            Err(error) => panic!("{error}"),
        }
    }
}

/// Waits until `bytes` bytes have arrived.
fn receive(socket: &UdpSocket, bytes: usize) -> Vec<(RecvMeta, Vec<u8>)> {
    let end = Instant::now() + Duration::from_secs(5);
    let mut all = drain(socket);
    while all.iter().map(|(meta, _)| meta.bytes).sum::<usize>() < bytes {
        assert!(Instant::now() < end, "only {all:?} arrived");
        std::thread::sleep(Duration::from_micros(200));
        all.extend(drain(socket));
    }
    all
}

fn bind(local: &str) -> UdpSocket {
    UdpSocket::bind(&UdpOptions::new(local.parse().unwrap())).unwrap()
}

/// A cable between this namespace (10.1.0.1, fd01::1) and a new one (10.1.0.2, fd01::2).
fn cable() -> (Netlink, Namespace) {
    let far = Namespace::create().unwrap();
    let netlink = Netlink::open().unwrap();
    netlink.add_veth("near", "far", Some(far.as_fd())).unwrap();
    let far_netlink = Netlink::open_in(&far).unwrap();
    for (netlink, name, addresses) in [
        (&netlink, "near", ["10.1.0.1/24", "10.1.0.9/24", "fd01::1/64"]),
        (&far_netlink, "far", ["10.1.0.2/24", "10.1.0.8/24", "fd01::2/64"]),
    ] {
        let index = netlink.link(name).unwrap().unwrap().index;
        for address in addresses {
            netlink.add_address(index, address.parse().unwrap()).unwrap();
        }
        netlink.set_up(index, true).unwrap();
    }
    (netlink, far)
}

#[test]
fn a_group_delivers_by_core_byte_for_every_core_and_loses_nothing() {
    isolated(|| {
        for cores in [1usize, 2, 3, 8, 100] {
            let mut options = UdpOptions::new("127.0.0.1:0".parse().unwrap());
            options.buffer_bytes = 1 << 20;
            let group = UdpSocket::bind_group(&options, cores).unwrap();
            assert_eq!(group.len(), cores);
            let to = group[0].local_addr();
            assert!(group.iter().all(|socket| socket.local_addr() == to));
            // Each from a socket of its own, as lanes are.
            for core in 0..cores {
                for kind in [0x14u8, 0x15, 0x16] {
                    let datagram = [kind, core as u8, 7, 0, 1, 2, 3, 4];
                    bind("127.0.0.1:0").send(to, None, None, &datagram).unwrap();
                    let got = receive(&group[core], 8);
                    assert_eq!(got.len(), 1);
                    assert_eq!(got[0].1, datagram, "of {cores}");
                }
                // Core not told: the sending core stands in.
                let sending = (core + 3 * cores) as u8;
                let datagram = [0x14, 255, sending, 9];
                bind("127.0.0.1:0").send(to, None, None, &datagram).unwrap();
                let got = receive(&group[usize::from(sending) % cores], 4);
                assert_eq!(got[0].1, datagram);
            }
            fall_back(&group);
        }
    });
}

/// Handshakes, garbage and cores that do not exist reach somebody.
fn fall_back(group: &[UdpSocket]) {
    let to = group[0].local_addr();
    let cores = group.len();
    let datagrams: [&[u8]; 9] = [
        &[0x11, 255, 0, 0],
        &[0x12, 0, 0, 0],
        &[0x13, 1, 1, 1],
        &[0x14, cores as u8, 0, 0],
        &[0x14, 254, 0, 0],
        &[0x14],
        &[0x14, 0],
        &[0x00, 0, 0],
        b"garbage",
    ];
    let mut used = vec![false; cores];
    for datagram in datagrams {
        for _ in 0..8 {
            bind("127.0.0.1:0").send(to, None, None, datagram).unwrap();
        }
        let end = Instant::now() + Duration::from_secs(5);
        let mut count = 0;
        while count < 8 {
            assert!(Instant::now() < end, "{count} of 8 × {datagram:02x?} arrived");
            for (socket, used) in group.iter().zip(&mut used) {
                let got = drain(socket);
                *used |= !got.is_empty();
                assert!(got.iter().all(|(_, bytes)| bytes == datagram));
                count += got.len();
            }
        }
        assert_eq!(count, 8);
    }
    // By hash, not all on one core.
    assert!(cores == 1 || used.iter().filter(|used| **used).count() > 1);
}

#[test]
fn a_second_instance_is_noticed() {
    isolated(|| {
        let group = UdpSocket::bind_group(&UdpOptions::new("[::]:4600".parse().unwrap()), 2).unwrap();
        for local in ["[::]:4600", "0.0.0.0:4600", "127.0.0.1:4600"] {
            let error = UdpSocket::bind_group(&UdpOptions::new(local.parse().unwrap()), 2).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
            assert!(error.to_string().contains("4600 is taken"), "{error}");
        }
        drop(group);
        probe_port_free("[::]:4600".parse().unwrap(), None).unwrap();
    });
}

#[test]
fn a_train_crosses_a_cable_whole() {
    isolated(|| {
        let (netlink, far) = cable();
        let interface = netlink.link("near").unwrap().unwrap().index;
        for (here, there, source) in
            [("10.1.0.1:500", "10.1.0.2:600", "10.1.0.9"), ("[fd01::1]:500", "[fd01::2]:600", "fd01::1")]
        {
            // The receiver listens everywhere and must learn which address was meant.
            let unspecified = if here.starts_with('[') { "[::]" } else { "0.0.0.0" };
            let receiver = bind(&format!("{unspecified}:500"));
            let sender = far.run(|| bind(&format!("{unspecified}:600"))).unwrap();
            let contents: Vec<u8> = (0..24_100u32).map(|index| (index / 3) as u8).collect();
            sender.send_marked(here.parse().unwrap(), None, 2, Some(1200), &contents).unwrap();
            let got = receive(&receiver, contents.len());
            assert_eq!(got.len(), 1, "not one train");
            let (meta, bytes) = &got[0];
            assert_eq!((meta.stride, meta.ecn, meta.truncated), (1200, 2, false));
            assert_eq!((meta.from, meta.interface), (there.parse().unwrap(), Some(interface)));
            assert_eq!(meta.local_ip, Some(here.parse::<SocketAddr>().unwrap().ip()));
            assert!(*bytes == contents);
            assert!(!sender.gso_off.load(Ordering::Relaxed));

            // Back, from another of our addresses.
            let source: IpAddr = source.parse().unwrap();
            receiver.send(meta.from, Some(source), None, b"answer").unwrap();
            let got = receive(&sender, 6);
            assert_eq!((got[0].0.from, got[0].0.stride), (SocketAddr::new(source, 500), 6));
        }
    });
}

#[test]
fn more_than_one_train_goes_out_as_several() {
    isolated(|| {
        let receiver = bind("127.0.0.1:0");
        let sender = bind("127.0.0.1:0");
        for (segment, bytes) in [(100usize, 20_010usize), (1400, 200_000), (40_000, 100_000), (1, 200)] {
            let contents: Vec<u8> = (0..bytes as u32).map(|index| (index / 5) as u8).collect();
            sender.send(receiver.local_addr(), None, Some(segment), &contents).unwrap();
            let got = receive(&receiver, bytes);
            assert!(
                got.iter()
                    .all(|(meta, _)| meta.bytes == segment || meta.stride == segment || meta.bytes < segment)
            );
            let all: Vec<u8> = got.into_iter().flat_map(|(_, bytes)| bytes).collect();
            assert!(all == contents, "{segment}");
        }
        assert!(!sender.gso_off.load(Ordering::Relaxed));
    });
}

#[test]
fn where_the_kernel_refuses_trains_single_datagrams_go_out() {
    isolated(|| {
        let (_netlink, far) = cable();
        let sender = far.run(|| bind("10.1.0.2:0")).unwrap();
        // Kernels since 6.12 refuse trains only without checksums (EINVAL) and under IPsec (EIO).
        const NO_CHECKSUM: libc::c_int = 1;
        set_option(&sender, libc::SOL_SOCKET, libc::SO_NO_CHECK, &NO_CHECKSUM).unwrap();
        let receiver = bind("10.1.0.1:0");
        for round in 0..2 {
            let contents: Vec<u8> = (0..5500u32).map(|index| (index / 9 + round) as u8).collect();
            assert_eq!(sender.send(receiver.local_addr(), None, Some(1000), &contents).unwrap(), 0);
            let got = receive(&receiver, contents.len());
            assert_eq!(got.iter().map(|(meta, _)| meta.bytes.div_ceil(meta.stride)).sum::<usize>(), 6);
            let all: Vec<u8> = got.into_iter().flat_map(|(_, bytes)| bytes).collect();
            assert!(all == contents);
            assert!(sender.gso_off.load(Ordering::Relaxed));
        }
    });
}

#[test]
fn a_full_buffer_is_would_block_or_counted() {
    isolated(|| {
        let (netlink, _far) = cable();
        let mut options = UdpOptions::new("10.1.0.1:0".parse().unwrap());
        options.buffer_bytes = 6000;
        let sender = UdpSocket::bind(&options).unwrap();
        // Nobody answers for this neighbor, so the datagrams wait for it in the socket's buffer.
        let to = "10.1.0.77:9".parse().unwrap();
        let error = (0..100).find_map(|_| sender.send(to, None, None, &[0; 1000]).err()).unwrap();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        // Two trains, and room for the beginning of the first: the second is lost, and the caller knows.
        let sender = UdpSocket::bind(&options).unwrap();
        assert_eq!(sender.send(to, None, Some(1000), &[0; 100_000]).unwrap(), 36);
        // Datagrams one by one: some fit.
        let sender = UdpSocket::bind(&options).unwrap();
        sender.gso_off.store(true, Ordering::Relaxed);
        let lost = sender.send(to, None, Some(1000), &[0; 100_000]).unwrap();
        assert!((50..100).contains(&lost), "{lost}");
        drop(netlink);
    });
}

#[test]
fn what_is_too_big_or_has_a_wrong_source_is_an_error_and_trains_stay_on() {
    isolated(|| {
        let (_netlink, _far) = cable();
        for (local, to) in [("10.1.0.1:0", "10.1.0.2:9"), ("[fd01::1]:0", "[fd01::2]:9")] {
            let socket = bind(local);
            let to = to.parse().unwrap();
            for (bytes, segment) in [(1473, None), (3000, Some(1473)), (9000, Some(1473))] {
                let error = socket.send(to, None, segment, &vec![0; bytes]).unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE), "{bytes} {segment:?}");
            }
            let foreign = if local.starts_with('[') { "fd99::1" } else { "192.0.2.1" };
            let foreign = Some(foreign.parse().unwrap());
            assert!(socket.send(to, foreign, Some(1000), &[0; 3000]).is_err());
            assert!(!socket.gso_off.load(Ordering::Relaxed));
            socket.send(to, None, Some(1000), &[0; 3000]).unwrap();
        }
    });
}

#[test]
fn a_dual_stack_socket_speaks_ipv4_with_ipv4_names() {
    isolated(|| {
        let dual = bind("[::]:0");
        let port = dual.local_addr().port();
        let v4 = bind("127.0.0.1:0");
        v4.send_marked((Ipv4Addr::LOCALHOST, port).into(), None, 1, Some(100), &[3; 350]).unwrap();
        let got = receive(&dual, 350);
        let meta = got[0].0;
        assert_eq!(meta.from, v4.local_addr());
        assert_eq!(meta.local_ip, Some(Ipv4Addr::LOCALHOST.into()));
        assert_eq!((meta.ecn, meta.interface), (1, Some(1)));
        let source = Some(Ipv4Addr::new(127, 0, 0, 5).into());
        dual.send_marked(meta.from, source, 3, Some(100), &[4; 250]).unwrap();
        let got = receive(&v4, 250);
        assert_eq!(got[0].0.from, (Ipv4Addr::new(127, 0, 0, 5), port).into());
        assert_eq!(got[0].0.ecn, 3);
        // An address that is IPv6 leaves the other family alone.
        bind(&format!("127.0.0.1:{}", bind("[::1]:0").local_addr().port()));
    });
}

#[test]
fn a_socket_bound_to_a_device_uses_that_device_only() {
    isolated(|| {
        let netlink = Netlink::open().unwrap();
        // Two cables with the same network on both, as two providers may hand out.
        let mut far = Vec::new();
        for name in ["wan0", "wan1"] {
            let namespace = Namespace::create().unwrap();
            netlink.add_veth(name, "isp", Some(namespace.as_fd())).unwrap();
            let index = netlink.link(name).unwrap().unwrap().index;
            netlink.add_address(index, "192.168.1.10/24".parse().unwrap()).unwrap();
            netlink.set_up(index, true).unwrap();
            let there = Netlink::open_in(&namespace).unwrap();
            let index = there.link("isp").unwrap().unwrap().index;
            there.add_address(index, "192.168.1.1/24".parse().unwrap()).unwrap();
            there.set_up(index, true).unwrap();
            let socket = namespace.run(|| bind("192.168.1.1:99")).unwrap();
            far.push((namespace, socket));
        }
        for (name, (_, socket)) in ["wan0", "wan1"].iter().zip(&far) {
            let mut options = UdpOptions::new("192.168.1.10:0".parse().unwrap());
            options.device = Some((*name).to_owned());
            options.mark = 0x77;
            let here = UdpSocket::bind(&options).unwrap();
            here.send("192.168.1.1:99".parse().unwrap(), None, None, name.as_bytes()).unwrap();
            let got = receive(socket, 4);
            assert_eq!((got.len(), got[0].1.as_slice()), (1, name.as_bytes()));
            socket.send(got[0].0.from, None, None, b"back").unwrap();
            assert_eq!(receive(&here, 4)[0].1, b"back");
        }
        let mut options = UdpOptions::new("0.0.0.0:0".parse().unwrap());
        options.device = Some("missing".to_owned());
        assert_eq!(UdpSocket::bind(&options).unwrap_err().raw_os_error(), Some(libc::ENODEV));
    });
}

#[test]
fn each_device_has_a_group_of_its_own_on_the_same_port() {
    isolated(|| {
        let netlink = Netlink::open().unwrap();
        let mut wans = Vec::new();
        for (name, number) in [("wan0", 10), ("wan1", 20)] {
            let namespace = Namespace::create().unwrap();
            netlink.add_veth(name, "isp", Some(namespace.as_fd())).unwrap();
            let index = netlink.link(name).unwrap().unwrap().index;
            netlink.add_address(index, format!("10.{number}.0.1/24").parse().unwrap()).unwrap();
            netlink.set_up(index, true).unwrap();
            let there = Netlink::open_in(&namespace).unwrap();
            let index = there.link("isp").unwrap().unwrap().index;
            there.add_address(index, format!("10.{number}.0.2/24").parse().unwrap()).unwrap();
            there.set_up(index, true).unwrap();
            // Dual stack, as a listener is.
            let mut options = UdpOptions::new("[::]:4600".parse().unwrap());
            options.device = Some(name.to_owned());
            wans.push((number, namespace, UdpSocket::bind_group(&options, 3).unwrap()));
        }
        for (number, namespace, group) in &wans {
            let to: SocketAddr = format!("10.{number}.0.1:4600").parse().unwrap();
            for core in 0..3u8 {
                let sender = namespace.run(|| bind("0.0.0.0:0")).unwrap();
                sender.send(to, None, None, &[0x14, core, *number]).unwrap();
                let got = receive(&group[usize::from(core)], 3);
                assert_eq!(got[0].1, [0x14, core, *number]);
                assert_eq!(got[0].0.local_ip, Some(to.ip()));
            }
        }
        assert!(wans.iter().flat_map(|(_, _, group)| group).all(|socket| drain(socket).is_empty()));
    });
}

#[test]
fn a_buffer_that_is_too_small_is_reported_and_nothing_to_receive_is_would_block() {
    isolated(|| {
        let (receiver, sender) = (bind("127.0.0.1:0"), bind("127.0.0.1:0"));
        let mut small = [0; 10];
        let mut metas = [RecvMeta::default()];
        let error = receiver.recv(&mut [IoSliceMut::new(&mut small)], &mut metas).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        sender.send(receiver.local_addr(), None, None, &[1; 20]).unwrap();
        while receiver.recv(&mut [IoSliceMut::new(&mut small)], &mut metas).is_err() {
            std::thread::yield_now();
        }
        assert_eq!((metas[0].bytes, metas[0].truncated), (10, true));
        assert!(receiver.take_error().unwrap().is_none());
    });
}

/// Rows T1, R7: with `ipv6.disable=1` the kernel knows no sockets of IPv6.
#[test]
fn a_host_without_ipv6_listens_all_the_same() {
    isolated(|| {
        assert_eq!(any_address(7).to_string(), "[::]:7");
        let without = std::thread::spawn(|| {
            crate::sandbox::testing::refuse_ipv6().unwrap();
            let refused = UdpSocket::bind(&UdpOptions::new("[::]:0".parse().unwrap())).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EAFNOSUPPORT));
            assert_eq!(any_address(4600).to_string(), "0.0.0.0:4600");
            let group = UdpSocket::bind_group(&UdpOptions::new(any_address(4600)), 2).unwrap();
            let taken = probe_port_free(any_address(4600), None).unwrap_err();
            let sender = UdpSocket::bind(&UdpOptions::new("127.0.0.1:0".parse().unwrap())).unwrap();
            let to = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 4600);
            sender.send(to, None, None, b"hello").unwrap();
            let came = receive(&group[0], 0).len() + receive(&group[1], 0).len();
            let tcp = crate::tcp::listen(any_address(443), 0).unwrap();
            (taken.kind(), came, tcp.local_addr().unwrap().to_string())
        });
        let without = without.join().unwrap();
        assert_eq!(without, (io::ErrorKind::AddrInUse, 1, "0.0.0.0:443".to_owned()));
    });
}
