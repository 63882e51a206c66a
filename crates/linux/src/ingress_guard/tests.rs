#![allow(clippy::unwrap_used, reason = "tests")]
use std::io::ErrorKind;
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::*;
use crate::link_layer::LinkLayer;
use crate::netlink::{NeighborState, Netlink, nftables};
use crate::netns::{Namespace, set_sysctl};
use crate::packet_ring::{PacketRing, PacketRingOptions};
use crate::packet_socket::PacketSocket;
use crate::testing::isolated;

const HERE: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// Of virtual routers (RFC 5798 §7.3).
const OF_ROUTER: [u8; 6] = [0, 0, 0x5e, 0, 1, 51];
const OTHER_OF_ROUTER: [u8; 6] = [0, 0, 0x5e, 0, 1, 0xf0];

/// Whether this test may make such a guard: an ordinary user's namespace cannot load programs.
fn allowed(kind: GuardKind) -> bool {
    let may = kind == GuardKind::Table || KernelShare::default().load_guard(LinkLayer::Ethernet).is_ok();
    assert!(may || std::env::var_os(crate::testing::INSIDE).is_some(), "root may load programs");
    may
}

fn attach(kind: GuardKind, interface: &str, share: &KernelShare) -> IngressGuard {
    let guard = match kind {
        GuardKind::Program => IngressGuard::attach_program(interface, share, None),
        GuardKind::Table => IngressGuard::attach_table(interface, share),
    };
    let guard = guard.unwrap();
    assert_eq!(guard.kind(), kind);
    guard
}

fn share() -> KernelShare {
    let ours = ["10.4.0.1", "fd04::1"].map(|text| text.parse().unwrap());
    KernelShare {
        udp_ports: vec![4600, 4601],
        addresses: Some(ours.to_vec()),
        link_local: true,
        dhcp_answers: true,
        macs: vec![OF_ROUTER, OTHER_OF_ROUTER],
    }
}

/// One frame of the table below.
struct Case {
    what: &'static str,
    frame: Vec<u8>,
    to_kernel: bool,
}

fn ethernet(to: [u8; 6], kind: u16, rest: &[u8]) -> Vec<u8> {
    let mut frame = [&to[..], &[2, 0, 0, 0, 0, 1]].concat();
    frame.extend(kind.to_be_bytes());
    frame.extend(rest);
    frame
}

fn v4(protocol: u8, options: usize, fragment: u16, to: [u8; 4], payload: &[u8]) -> Vec<u8> {
    let header = 20 + 4 * options;
    let mut packet = vec![0x40 | (header / 4) as u8, 0];
    packet.extend(((header + payload.len()) as u16).to_be_bytes());
    packet.extend([0, 1]);
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0, 10, 4, 0, 2]);
    packet.extend(to);
    packet.extend(vec![1; 4 * options]);
    packet.extend(payload);
    packet
}

fn v6(protocol: u8, hop_limit: u8, to: &str, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([protocol, hop_limit]);
    packet.extend("fd04::2".parse::<Ipv6Addr>().unwrap().octets());
    packet.extend(to.parse::<Ipv6Addr>().unwrap().octets());
    packet.extend(payload);
    packet
}

fn ports(source: u16, destination: u16) -> Vec<u8> {
    [&source.to_be_bytes()[..], &destination.to_be_bytes(), &[0, 12, 0, 0, 1, 2, 3, 4]].concat()
}

fn cases() -> Vec<Case> {
    const US: [u8; 4] = [10, 4, 0, 1];
    const OTHER: [u8; 4] = [203, 0, 113, 5];
    let case = |what, frame, to_kernel| Case { what, frame, to_kernel };
    let ip = |what, packet: Vec<u8>, to_kernel| case(what, ethernet(HERE, 0x0800, &packet), to_kernel);
    let ip6 = |what, packet: Vec<u8>, to_kernel| case(what, ethernet(HERE, 0x86dd, &packet), to_kernel);
    let solicit = |hop_limit, kind| v6(58, hop_limit, "fd04::1", &[kind, 0, 0, 0, 0, 0, 0, 0]);
    let tagged = [&[0, 5, 8, 0][..], &v4(6, 0, 0, US, &ports(1, 80))].concat();
    vec![
        case("ARP", ethernet(HERE, 0x0806, &[0; 28]), true),
        case("LLDP", ethernet(HERE, 0x88cc, &[0; 50]), true),
        case("VLAN", ethernet(HERE, 0x8100, &tagged), true),
        case("QinQ", ethernet(HERE, 0x88a8, &tagged), true),
        case("broadcast", ethernet([0xff; 6], 0x0800, &v4(17, 0, 0, [255; 4], &ports(1, 9))), true),
        case(
            "multicast",
            ethernet([1, 0, 0x5e, 0, 0, 1], 0x0800, &v4(17, 0, 0, [224, 0, 0, 1], &ports(1, 9))),
            true,
        ),
        case("to another host", ethernet([2, 9, 9, 9, 9, 9], 0x0800, &v4(6, 0, 0, US, &ports(1, 9))), true),
        case("virtual router", ethernet(OF_ROUTER, 0x0800, &v4(6, 0, 0, US, &ports(1, 9))), false),
        case("another one", ethernet(OTHER_OF_ROUTER, 0x0800, &v4(17, 0, 0, OTHER, &ports(1, 9))), false),
        case("its tunnel", ethernet(OF_ROUTER, 0x0800, &v4(17, 0, 0, US, &ports(1, 4600))), true),
        case("a third one", ethernet([0, 0, 0x5e, 0, 1, 52], 0x0800, &v4(6, 0, 0, US, &ports(1, 9))), true),
        case("ARP to a virtual router", ethernet(OF_ROUTER, 0x0806, &[0; 28]), true),
        ip("TCP", v4(6, 0, 0, US, &ports(1000, 80)), false),
        ip("TCP to the tunnel's port number", v4(6, 0, 0, US, &ports(1000, 4600)), false),
        ip("ping", v4(1, 0, 0, US, &[8, 0, 0, 0, 0, 1, 0, 1]), false),
        ip("transit", v4(17, 0, 0, OTHER, &ports(1000, 53)), false),
        ip("the tunnel", v4(17, 0, 0, US, &ports(1000, 4600)), true),
        ip("the tunnel, second port, IP options", v4(17, 3, 0, US, &ports(1000, 4601)), true),
        ip("beside the tunnel", v4(17, 0, 0, US, &ports(1000, 4602)), false),
        ip("someone else's tunnel", v4(17, 0, 0, OTHER, &ports(1000, 4600)), false),
        ip("the tunnel, first fragment", v4(17, 0, 0x2000, US, &ports(1000, 4600)), true),
        ip("the tunnel, don't fragment", v4(17, 0, 0x4000, US, &ports(1000, 4600)), true),
        ip("later fragment", v4(17, 0, 0x2003, US, &ports(1000, 4600)), false),
        ip("DHCP answer", v4(17, 0, 0, [10, 4, 0, 99], &ports(67, 68)), true),
        ip("not a DHCP answer", v4(17, 0, 0, [10, 4, 0, 99], &ports(53, 68)), false),
        ip6("TCP", v6(6, 64, "fd04::1", &ports(1000, 80)), false),
        ip6("neighbor solicitation", solicit(255, 135), true),
        ip6("router solicitation", solicit(255, 133), true),
        ip6("redirect", solicit(255, 137), true),
        ip6("neighbor solicitation from afar", solicit(254, 135), false),
        ip6("echo request", solicit(255, 128), false),
        ip6("type 138", solicit(255, 138), false),
        ip6("type 132", solicit(255, 132), false),
        ip6("link-local", v6(6, 64, "fe80::1", &ports(1000, 22)), true),
        ip6("the end of link-local", v6(6, 64, "febf::1", &ports(1000, 22)), true),
        ip6("behind link-local", v6(6, 64, "fec0::1", &ports(1000, 22)), false),
        ip6("the tunnel", v6(17, 64, "fd04::1", &ports(1000, 4600)), true),
        ip6("beside the tunnel", v6(17, 64, "fd04::1", &ports(1000, 4599)), false),
        ip6("someone else's tunnel", v6(17, 64, "fd04::11", &ports(1000, 4600)), false),
        ip6("fragment", v6(44, 64, "fd04::1", &[17, 0, 0, 1, 0, 0, 0, 1]), false),
    ]
}

/// Two ends of a cable, the right one with what passes its guard counted.
fn cable() -> Netlink {
    set_sysctl("net.ipv6.conf.default.disable_ipv6", "1").unwrap();
    let netlink = Netlink::open().unwrap();
    netlink.add_veth("left", "right", None).unwrap();
    // The end that sends last: one that is up before its carrier swallows frames for a while.
    for (name, mac) in [("right", HERE), ("left", [2, 0, 0, 0, 0, 1])] {
        let index = netlink.link(name).unwrap().unwrap().index;
        netlink.set_mac(index, mac).unwrap();
        netlink.set_up(index, true).unwrap();
    }
    nft::rules(
        "table netdev after {\n chain count {\n type filter hook ingress device \"right\" priority 0;\n \
         counter\n }\n}\n",
    )
    .unwrap();
    netlink
}

fn passed() -> u64 {
    let output =
        std::process::Command::new("nft").args(["list", "table", "netdev", "after"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let words: Vec<&str> = text.split_whitespace().collect();
    let at = words.iter().position(|word| *word == "packets").unwrap();
    words[at + 1].parse().unwrap()
}

/// The same, once the frame that was sent last has been dealt with: a busy kernel does that later.
fn passed_in_the_end(expected: u64) -> u64 {
    std::thread::sleep(Duration::from_millis(50));
    let end = Instant::now() + Duration::from_secs(2);
    while passed() != expected && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(5));
    }
    passed()
}

#[test]
fn each_frame_goes_either_to_the_datapath_or_to_the_kernel_by_program() {
    isolated(|| division(GuardKind::Program));
}

#[test]
fn each_frame_goes_either_to_the_datapath_or_to_the_kernel_by_table() {
    isolated(|| division(GuardKind::Table));
}

fn division(kind: GuardKind) {
    if !allowed(kind) {
        return;
    }
    cable();
    let left = PacketSocket::open("left", false, true).unwrap();
    let options = PacketRingOptions { kernel: share(), ..PacketRingOptions::default() };
    let mut ring = PacketRing::open("right", &options).unwrap();
    let _guard = attach(kind, "right", &share());
    for Case { what, frame, to_kernel } in cases() {
        let before = passed();
        left.send(&frame).unwrap();
        let end = Instant::now() + Duration::from_secs(2);
        let mut taken = 0;
        while taken == 0 && Instant::now() < end && !(to_kernel && passed() > before) {
            taken = ring.receive(64);
        }
        if taken > 0 {
            assert_eq!(ring.frame(0).unwrap().frame, frame, "{what}");
        }
        let kernel = passed() - before;
        let expected = if to_kernel { (0, 1) } else { (1, 0) };
        assert_eq!((taken as u64, kernel), expected, "{kind:?}: {what}: (ring, kernel)");
    }
}

#[test]
fn the_share_is_changed_while_it_is_in_force_by_program() {
    isolated(|| changing(GuardKind::Program));
}

#[test]
fn the_share_is_changed_while_it_is_in_force_by_table() {
    isolated(|| changing(GuardKind::Table));
}

fn changing(kind: GuardKind) {
    if !allowed(kind) {
        return;
    }
    cable();
    let left = PacketSocket::open("left", false, true).unwrap();
    let guard = attach(kind, "right", &KernelShare::default());
    let frame = ethernet(HERE, 0x0800, &v4(17, 0, 0, [10, 4, 0, 1], &ports(1000, 4600)));
    left.send(&frame).unwrap();
    assert_eq!(passed_in_the_end(0), 0, "{kind:?}");
    let any = KernelShare { addresses: None, ..share() };
    // A host without addresses for now, or with those of one family alone.
    let of = |list: &[&str]| {
        let list = list.iter().map(|address| address.parse().unwrap()).collect();
        KernelShare { addresses: Some(list), ..share() }
    };
    let (none, v4_alone, v6_alone) = (of(&[]), of(&["10.4.0.1"]), of(&["fd04::1"]));
    for (share, expected) in
        [(share(), 1), (any, 2), (KernelShare::default(), 2), (none, 2), (v4_alone, 3), (v6_alone, 3)]
    {
        guard.set_kernel_share(&share).unwrap();
        left.send(&frame).unwrap();
        assert_eq!(passed_in_the_end(expected), expected, "{kind:?} {share:?}");
    }
    // Answers of DHCP servers: a program leaves them to the datapath if it is told to, a table never does.
    let answer = ethernet(HERE, 0x0800, &v4(17, 0, 0, [10, 4, 0, 99], &ports(67, 68)));
    let told_apart = KernelShare { dhcp_answers: false, ..share() };
    for (share, kept) in [(told_apart, kind == GuardKind::Table), (share(), true)] {
        let before = passed();
        guard.set_kernel_share(&share).unwrap();
        left.send(&answer).unwrap();
        let expected = before + u64::from(kept);
        assert_eq!(passed_in_the_end(expected), expected, "{kind:?} {share:?}");
    }
    let many = KernelShare { udp_ports: (0..65).collect(), ..share() };
    assert!(guard.set_kernel_share(&many).unwrap_err().to_string().contains("64 UDP ports"));
    let many = KernelShare { macs: vec![HERE; 65], ..share() };
    assert!(guard.set_kernel_share(&many).unwrap_err().to_string().contains("64 hardware addresses"));
    // As many as there may be.
    let addresses = (0..128u32)
        .flat_map(|number| {
            let v6 = Ipv6Addr::from_bits(u128::from(number) | 0xfd04 << 112);
            [std::net::Ipv4Addr::from_bits(number).into(), v6.into()]
        })
        .collect();
    let largest = KernelShare {
        udp_ports: (4537..4601).collect(),
        addresses: Some(addresses),
        link_local: true,
        dhcp_answers: true,
        macs: (0..64).map(|last| [2, 0, 0, 0, 1, last]).collect(),
    };
    guard.set_kernel_share(&largest).unwrap();
    let before = passed();
    left.send(&frame).unwrap();
    assert_eq!(passed_in_the_end(before), before, "the address is not among them");
    let ring = PacketRing::open("right", &PacketRingOptions::default()).unwrap();
    ring.filter().unwrap().set_kernel_share(&largest).unwrap();
    drop(guard);
    left.send(&frame).unwrap();
    assert_eq!(passed_in_the_end(before + 1), before + 1);
}

/// `gw` in this namespace with 10.4.0.1/24, its other end with .2 in another.
fn host() -> (Netlink, Namespace) {
    let other = Namespace::create().unwrap();
    // Without it neighbors are asked for only when the link-local address has been proved: in two seconds.
    let hurry = || set_sysctl("net.ipv6.conf.default.dad_transmits", "0").unwrap();
    hurry();
    other.run(hurry).unwrap();
    let netlink = Netlink::open().unwrap();
    netlink.add_veth("gw", "peer", Some(other.as_fd())).unwrap();
    let there = Netlink::open_in(&other).unwrap();
    for (netlink, name, last) in [(&netlink, "gw", 1), (&there, "peer", 2)] {
        let index = netlink.link(name).unwrap().unwrap().index;
        netlink.add_address(index, format!("10.4.0.{last}/24").parse().unwrap()).unwrap();
        netlink.add_address(index, format!("fd04::{last}/64").parse().unwrap()).unwrap();
        netlink.set_up(index, true).unwrap();
    }
    (netlink, other)
}

/// Tries until the link is there.
fn wait_for(other: &Namespace, to: SocketAddr) {
    let end = Instant::now() + Duration::from_secs(5);
    while connect(other, to) != Err(ErrorKind::ConnectionRefused) {
        assert!(Instant::now() < end, "the link does not come");
    }
}

/// State of a TCP port here, as a client of the other namespace sees it.
fn connect(other: &Namespace, to: SocketAddr) -> std::result::Result<(), ErrorKind> {
    let attempt = || TcpStream::connect_timeout(&to, Duration::from_millis(300)).map(drop);
    other.run(attempt).unwrap().map_err(|error| error.kind())
}

#[test]
fn the_kernel_is_silent_behind_the_guard_and_answers_again_without_it_by_program() {
    isolated(|| silence(GuardKind::Program));
}

#[test]
fn the_kernel_is_silent_behind_the_guard_and_answers_again_without_it_by_table() {
    isolated(|| silence(GuardKind::Table));
}

fn silence(kind: GuardKind) {
    if !allowed(kind) {
        return;
    }
    let (netlink, other) = host();
    let listener = TcpListener::bind("10.4.0.1:0").unwrap();
    let open = listener.local_addr().unwrap();
    let closed = SocketAddr::new(open.ip(), open.port() ^ 1);
    wait_for(&other, closed);
    assert_eq!(connect(&other, open), Ok(()));

    let options = PacketRingOptions { kernel: share(), ..PacketRingOptions::default() };
    let mut ring = PacketRing::open("gw", &options).unwrap();
    let guard = attach(kind, "gw", &share());
    // The neighbors forget us, and ask again: ARP and neighbor discovery are answered.
    let there = Netlink::open_in(&other).unwrap();
    let peer = there.link("peer").unwrap().unwrap().index;
    for address in ["10.4.0.1", "fd04::1"].map(|text| text.parse().unwrap()) {
        let _ = there.del_neighbor(peer, address);
        there.probe_neighbor(peer, address).unwrap();
        let end = Instant::now() + Duration::from_secs(5);
        let known = |there: &Netlink| {
            let all = there.all_neighbors().unwrap();
            all.iter().any(|one| one.ip == address && one.state == NeighborState::Reachable)
        };
        while !known(&there) {
            assert!(Instant::now() < end, "{kind:?}: {address} is not found");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    // Neither an answer nor a reset nor an ICMP error; but the ring has seen it.
    for to in [open, closed] {
        everything(&mut ring);
        assert_eq!(connect(&other, to), Err(ErrorKind::TimedOut), "{kind:?} {to}");
        assert!(everything(&mut ring) > 0, "{kind:?}: the ring saw nothing");
    }
    let client = other.run(|| UdpSocket::bind("10.4.0.2:0").unwrap()).unwrap();
    client.connect(closed).unwrap();
    client.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    client.send(b"x").unwrap();
    assert_eq!(client.recv(&mut [0; 9]).unwrap_err().kind(), ErrorKind::WouldBlock, "{kind:?}");
    // The tunnel's port is the kernel's.
    let tunnel = UdpSocket::bind("10.4.0.1:4600").unwrap();
    tunnel.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    client.connect("10.4.0.1:4600").unwrap();
    client.send(b"tunnel").unwrap();
    assert_eq!(tunnel.recv(&mut [0; 9]).unwrap(), 6, "{kind:?}");

    drop(guard);
    // The kernel lets go of a program a moment after its last owner.
    let answers = (0..20).any(|_| connect(&other, open) == Ok(()));
    assert!(answers, "{kind:?}");
    assert_eq!(connect(&other, closed), Err(ErrorKind::ConnectionRefused), "{kind:?}");
    drop(netlink);
}

fn everything(ring: &mut PacketRing) -> usize {
    let mut all = 0;
    loop {
        match ring.receive(64) {
            0 => return all,
            count => all += count,
        }
    }
}

#[test]
fn what_a_killed_process_left_behind_is_replaced() {
    isolated(|| {
        let (_netlink, other) = host();
        wait_for(&other, "10.4.0.1:1".parse().unwrap());
        let listener = TcpListener::bind("10.4.0.1:0").unwrap();
        std::mem::forget(IngressGuard::attach_table("gw", &KernelShare::default()).unwrap());
        assert_eq!(connect(&other, listener.local_addr().unwrap()), Err(ErrorKind::TimedOut));
        for attach in [
            |name: &str, share: &KernelShare| IngressGuard::attach(name, share, None),
            |name: &str, share: &KernelShare| IngressGuard::attach_table(name, share),
        ] {
            drop(attach("gw", &KernelShare::default()).unwrap());
            assert_eq!(connect(&other, listener.local_addr().unwrap()), Ok(()));
        }
        let error = IngressGuard::attach("nowhere", &KernelShare::default(), None).unwrap_err();
        assert!(error.to_string().contains("nowhere"), "{error}");
        assert_eq!(table_name("eth0.5@if2"), "anabranch-eth0.5_if2");
    });
}

/// A restart of the host's firewall clears all tables away, ours as well.
#[test]
fn a_table_that_others_cleared_away_is_made_again() {
    isolated(|| {
        let (_netlink, other) = host();
        wait_for(&other, "10.4.0.1:1".parse().unwrap());
        let listener = TcpListener::bind("10.4.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let guard = IngressGuard::attach_table("gw", &KernelShare::default()).unwrap();
        let keep = || guard.keep(&KernelShare::default(), &nftables::netdev_tables().unwrap()).unwrap();
        assert!(!keep());
        nft::rules("flush ruleset").unwrap();
        assert_eq!(connect(&other, to), Ok(()), "unguarded");
        assert!(keep());
        assert_eq!(connect(&other, to), Err(ErrorKind::TimedOut));
        assert!(!keep());
        drop(guard);
        assert_eq!(nftables::netdev_tables().unwrap(), Vec::<String>::new());
    });
}

/// Between two processes: ports of flows are silent, everything else of the host goes on, what is for others is dropped; behind the time,
/// and behind the next guard, all is as without it.
#[test]
fn an_interface_is_held_for_a_while_and_the_rest_of_the_host_goes_on() {
    isolated(|| {
        let (netlink, other) = host();
        let address = |port: u16| SocketAddr::new("10.4.0.1".parse().unwrap(), port);
        wait_for(&other, address(1));
        let listener = TcpListener::bind(address(0)).unwrap();
        let held = HeldPorts {
            own: share().addresses.unwrap(),
            ports: vec![(address(0).ip(), (5_000, 5_009)), (address(0).ip(), (6_000, 6_000))],
        };
        let port_of = |listener: &TcpListener| listener.local_addr().unwrap().port();
        assert!(!(5_000..=6_000).contains(&port_of(&listener)));
        // One that only flows use.
        let index = netlink.link("gw").unwrap().unwrap().index;
        netlink.add_address(index, "10.4.0.7/32".parse().unwrap()).unwrap();
        let outside = SocketAddr::new("10.4.0.7".parse().unwrap(), 9);
        let began = Instant::now();
        let hold = |seconds| hold_interfaces(&["gw".to_owned()], &share(), &held, seconds).unwrap();
        hold(3);
        for to in [address(5_000), address(5_009), address(6_000), outside] {
            assert_eq!(connect(&other, to), Err(ErrorKind::TimedOut), "{to}");
        }
        assert_eq!(connect(&other, address(5_010)), Err(ErrorKind::ConnectionRefused));
        assert_eq!(connect(&other, address(port_of(&listener))), Ok(()));
        let v6 = SocketAddr::new("fd04::1".parse().unwrap(), 5_000);
        assert_eq!(connect(&other, v6), Err(ErrorKind::ConnectionRefused), "held for IPv4 only");
        while connect(&other, outside) != Err(ErrorKind::ConnectionRefused) {
            assert!(began.elapsed() < Duration::from_secs(20), "it does not end");
        }
        assert!(began.elapsed() >= Duration::from_secs(3));
        assert_eq!(connect(&other, address(5_000)), Err(ErrorKind::ConnectionRefused));
        for attach in [
            |name: &str, share: &KernelShare| IngressGuard::attach(name, share, None),
            |name: &str, share: &KernelShare| IngressGuard::attach_table(name, share),
        ] {
            hold(60);
            drop(attach("gw", &share()).unwrap());
            let answers =
                (0..20).any(|_| connect(&other, address(5_000)) == Err(ErrorKind::ConnectionRefused));
            assert!(answers, "the next guard takes it away");
        }
    });
}
