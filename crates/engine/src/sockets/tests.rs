#![allow(clippy::unwrap_used, reason = "tests")]

use std::net::UdpSocket as StdSocket;
use std::os::fd::AsFd as _;
use std::time::Duration;

use linux::netlink::Netlink;
use linux::netns::Namespace;
use linux::testing::isolated;
use tunnel::path::Route;

use super::*;

const WAN: u16 = 7;
const REMOTE: &str = "10.9.0.2:4600";
const MS: u64 = 1_000_000;

/// A worker's sockets in one namespace, and a peer behind the cable "wan" in another.
struct Scene {
    netlink: Netlink,
    there: Namespace,
    epoll: Epoll,
    sockets: Sockets,
    counters: Counters,
    drops: DropCounters,
}

impl Scene {
    /// One worker of `cores`; paths of bond 0 have `per_path` sockets.
    fn new(cores: u8, per_path: u8) -> Self {
        let mut scene = Self {
            netlink: Netlink::open().unwrap(),
            there: Namespace::create().unwrap(),
            epoll: Epoll::new().unwrap(),
            sockets: Sockets::new(0, cores),
            counters: Counters::default(),
            drops: DropCounters::default(),
        };
        scene.plug();
        scene.configure(Vec::new(), per_path);
        scene
    }

    /// The cable, with addresses at both ends.
    fn plug(&self) {
        self.netlink.add_veth("wan", "far", Some(self.there.as_fd())).unwrap();
        let there = Netlink::open_in(&self.there).unwrap();
        for (netlink, name, address) in
            [(&self.netlink, "wan", "10.9.0.1/24"), (&there, "far", "10.9.0.2/24")]
        {
            let index = netlink.link(name).unwrap().unwrap().index;
            netlink.add_address(index, address.parse().unwrap()).unwrap();
            netlink.set_up(index, true).unwrap();
        }
    }

    fn wan(&self) -> u32 {
        self.netlink.link("wan").unwrap().unwrap().index
    }

    fn configure(&mut self, listeners: Vec<(u16, Arc<UdpSocket>)>, per_path: u8) {
        let devices = WanDevices(HashMap::from([(WAN, "wan".to_owned())]));
        self.sockets.configure(&self.epoll, listeners, devices, HashMap::from([(0, per_path)])).unwrap();
    }

    /// The peer's socket.
    fn peer(&self) -> StdSocket {
        let socket = self.there.run(|| StdSocket::bind(REMOTE).unwrap()).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket
    }

    /// Sends one datagram at `now_ns`; whether it left.
    fn send(&mut self, now_ns: u64, target: &Target, bytes: usize) -> bool {
        let before = self.drops.get(DropReason::SendError);
        let Self { epoll, counters, drops, .. } = self;
        let mut link = Link { epoll, now_ns, counters, drops };
        self.sockets.transmit(&mut link, target, bytes, &vec![0x5a; bytes]);
        self.drops.get(DropReason::SendError) == before
    }

    fn open_sockets(&self) -> usize {
        self.sockets.entries.iter().flatten().count()
    }

    /// Tokens that are readable within two seconds.
    fn ready(&self) -> Vec<u64> {
        let mut ready = Vec::new();
        self.epoll.wait(&mut ready, Some(Duration::from_secs(2))).unwrap();
        ready.iter().map(|ready| ready.token).collect()
    }
}

fn target(path: u8, peer_core: u8, version: u32) -> Target {
    let route = Route { wan: WAN, local: None, remote: REMOTE.parse().unwrap() };
    Target { bond: Some(0), path, version, peer_core, route, dialer: true }
}

/// Port from which the next datagram came.
fn source_port(peer: &StdSocket) -> u16 {
    peer.recv_from(&mut [0; 2_048]).unwrap().1.port()
}

/// Row T10: a dialer has a 4-tuple for each receiving core, up to the cap, which is shared among its cores.
#[test]
fn a_dialer_opens_a_socket_per_receiving_core_up_to_the_cap() {
    isolated(|| {
        let mut scene = Scene::new(2, 4);
        let peer = scene.peer();
        let mut ports = Vec::new();
        for peer_core in [0, 1, 2, 3, 0, 1] {
            assert!(scene.send(0, &target(1, peer_core, 1), 100));
            ports.push(source_port(&peer));
        }
        assert_ne!(ports[0], ports[1]);
        assert_eq!(ports[2..], [ports[0], ports[1], ports[0], ports[1]], "two of four for each of two cores");
        assert!(scene.send(0, &target(2, 0, 1), 100));
        assert!(!ports.contains(&source_port(&peer)), "another path has its own");
        assert_eq!(scene.open_sockets(), 3);
        assert_eq!((scene.counters.udp_tx_datagrams.get(), scene.counters.udp_tx_bytes.get()), (7, 700));
        // What comes back is read from the same socket and known by its path.
        peer.send_to(b"answer", ("10.9.0.1", ports[1])).unwrap();
        let [token] = scene.ready()[..] else { panic!("one socket is readable") };
        let (socket, source) = scene.sockets.by_token(token).unwrap();
        assert_eq!((socket.local_addr().port(), source.wan, source.socket), (ports[1], WAN, Some((0, 1))));
        assert!(scene.sockets.by_token(SOCKET_TOKENS - 1).is_none());
        assert!(scene.sockets.by_token(SOCKET_TOKENS + 99).is_none());
    });
}

#[test]
fn sockets_of_old_routes_and_of_paths_that_are_gone_are_closed() {
    isolated(|| {
        let mut scene = Scene::new(1, 1);
        let peer = scene.peer();
        assert!(scene.send(0, &target(1, 0, 1), 100) && scene.send(0, &target(2, 0, 1), 100));
        let (old, other) = (source_port(&peer), source_port(&peer));
        assert!(scene.send(0, &target(1, 0, 2), 100));
        assert_ne!(source_port(&peer), old, "the route has a newer version");
        assert_eq!(scene.open_sockets(), 2);
        let Scene { sockets, epoll, .. } = &mut scene;
        sockets.retain_paths(epoll, |bond, path| (bond, path) == (0, 2));
        assert_eq!(scene.open_sockets(), 1);
        assert!(scene.send(0, &target(2, 0, 1), 100));
        assert_eq!(source_port(&peer), other, "the path that stays keeps its socket");
    });
}

#[test]
fn a_listener_answers_from_its_group_and_from_nowhere_else() {
    isolated(|| {
        let mut scene = Scene::new(2, 4);
        let peer = scene.peer();
        let options = UdpOptions {
            device: Some("wan".to_owned()),
            ..UdpOptions::new(SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 4_601))
        };
        let group: Vec<_> = UdpSocket::bind_group(&options, 2).unwrap().into_iter().map(Arc::new).collect();
        let own = || vec![(WAN, Arc::clone(&group[1]))];
        scene.configure(own(), 4);
        let answer = Target { dialer: false, ..target(1, 0, 1) };
        let to_stranger = Target { bond: None, ..target(1, 0, 1) };
        for target in [&answer, &to_stranger] {
            assert!(scene.send(0, target, 100));
            assert_eq!(source_port(&peer), 4_601);
        }
        let elsewhere = Target { route: Route { wan: WAN + 1, ..answer.route }, ..answer };
        assert!(!scene.send(0, &elsewhere, 100), "no group on that WAN: counted");
        // Configured again, it stays; not configured, it is closed.
        scene.configure(own(), 4);
        assert_eq!((scene.open_sockets(), scene.sockets.listening.len()), (1, 1));
        scene.configure(Vec::new(), 4);
        assert_eq!(scene.open_sockets(), 0);
        assert!(!scene.send(0, &answer, 100));
    });
}

#[test]
fn a_datagram_too_big_for_the_interface_is_told_with_its_path() {
    isolated(|| {
        let mut scene = Scene::new(1, 1);
        let peer = scene.peer();
        scene.netlink.set_mtu(scene.wan(), 1_280).unwrap();
        assert!(scene.send(0, &target(3, 0, 1), 1_280 - 28));
        source_port(&peer);
        assert!(!scene.send(0, &target(3, 0, 1), 1_280 - 27), "DF is set");
        assert_eq!(scene.sockets.take_too_big(), [(0, 3, 1_280 - 27)]);
        assert!(scene.sockets.take_too_big().is_empty());
        assert!(scene.send(0, &target(3, 0, 1), 100), "the socket stays");
        assert_eq!(scene.open_sockets(), 1);
    });
}

#[test]
fn an_interface_that_goes_and_comes_back_is_dialed_again() {
    isolated(|| {
        let mut scene = Scene::new(1, 1);
        let peer = scene.peer();
        assert!(scene.send(0, &target(1, 0, 1), 100));
        source_port(&peer);
        scene.netlink.delete_link(scene.wan()).unwrap();
        assert!(!scene.send(0, &target(1, 0, 1), 100));
        assert_eq!(scene.open_sockets(), 0, "its socket is bound to a device that does not exist");
        assert!(!scene.send(0, &target(1, 0, 1), 100), "there is nothing to bind to");
        scene.plug();
        let peer = {
            drop(peer);
            scene.peer()
        };
        assert!(
            !scene.send(49 * MS, &target(1, 0, 1), 100),
            "a missing interface is not tried for each datagram"
        );
        assert!(scene.send(51 * MS, &target(1, 0, 1), 100));
        source_port(&peer);
        assert_eq!(scene.open_sockets(), 1);
    });
}
