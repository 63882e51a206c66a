//! LANs of several sites that are one (row T14): bridges of the kernel, TAP devices of the program, and what hosts do in a LAN.

use std::process::Command;
use std::time::{Duration, Instant};

use linux::tun::Tap;
use testbed::program::Program;
use testbed::topology::Node;

use crate::gateway_scene::{shell, try_shell};
use crate::machine::{alone, isolated};
use crate::scene::*;

/// Frames of hosts that no program sends, in the bridge of a site.
struct RawHost(Tap);

impl RawHost {
    fn new(place: &Node, name: &str, mtu: u32) -> Self {
        let tap = place.run(|| Tap::create(name)).unwrap().unwrap();
        shell(
            place,
            &format!(
                "echo 1 >/proc/sys/net/ipv6/conf/{name}/disable_ipv6; \
                 ip link set {name} mtu {mtu} master br0 up"
            ),
        );
        Self(tap)
    }

    fn send(&self, frame: &[u8]) {
        self.0.write(frame).unwrap();
    }

    /// Waits for this frame, as it is.
    #[track_caller]
    fn expect(&self, frame: &[u8]) {
        let mut buffer = vec![0; 10_000];
        wait_for(&format!("a frame of {} bytes", frame.len()), PATIENCE, || {
            while let Ok(bytes) = self.0.read(&mut buffer) {
                if buffer[..bytes] == *frame {
                    return true;
                }
            }
            false
        });
    }

    /// Frames of an EtherType that are there or come in so long.
    fn count(&self, ether_type: u16, time: Duration) -> usize {
        let (start, mut buffer, mut count) = (Instant::now(), vec![0; 10_000], 0);
        loop {
            while let Ok(bytes) = self.0.read(&mut buffer) {
                count += usize::from(bytes > 14 && buffer[12..14] == ether_type.to_be_bytes());
            }
            if start.elapsed() >= time {
                return count;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A frame of a local experiment, with these tags.
fn frame(dst: [u8; 6], src: [u8; 6], tags: &[[u8; 4]], bytes: usize) -> Vec<u8> {
    let mut frame = [dst, src].concat();
    tags.iter().for_each(|tag| frame.extend(tag));
    frame.extend([0x88, 0xb6]);
    frame.extend((frame.len()..bytes).map(|at| (at * 7) as u8));
    frame
}

/// A bridge at a site.
fn bridge(place: &Node, mtu: u32) {
    // It must not learn what may be in its network by listening: that takes longer than a test.
    shell(
        place,
        &format!(
            "ip link add br0 type bridge forward_delay 0 mcast_snooping 0; \
             echo 1 >/proc/sys/net/ipv6/conf/br0/disable_ipv6; ip link set br0 mtu {mtu} up"
        ),
    );
}

/// A host in the bridge of a site.
fn host(place: &Node, port: &str, address: &str, mtu: u32) -> Node {
    let host = Node::create(format!("host at {port}")).unwrap();
    let addresses: Vec<ipnet::IpNet> =
        if address.is_empty() { Vec::new() } else { vec![address.parse().unwrap()] };
    place.connect(port, &[], &host, "eth0", &addresses).unwrap();
    shell(
        place,
        &format!(
            "echo 1 >/proc/sys/net/ipv6/conf/{port}/disable_ipv6; ip link set {port} mtu {mtu} master br0"
        ),
    );
    shell(&host, &format!("ip link set eth0 mtu {mtu}"));
    host
}

/// Whether pings come back.
fn pings(from: &Node, address: &str, more: &str) -> bool {
    try_shell(from, &format!("ping -c 3 -i 0.2 -W 5 {more} {address}"))
        .is_ok_and(|said| said.contains(" 0% packet loss"))
}

#[track_caller]
fn ping(from: &Node, address: &str, more: &str) {
    wait_for(&format!("pings of {address} {more}"), PATIENCE, || pings(from, address, more));
}

/// `[tap]` in the bridge.
fn tap(more: &str) -> String {
    format!("[tap]\nname = \"tap0\"\nbridge = \"br0\"\n{more}\n")
}

/// Branch at A and hub at B, with TAP devices in their bridges.
fn pair(scene: &Scene, branch_more: &str, hub_more: &str) -> (Config, Config) {
    let mut branch = Config::new("branch", BRANCH_IP).section(&tap(branch_more));
    let mut hub = Config::new("hub", HUB_IP).node_line("listen = 4600").section(&tap(hub_more));
    for number in 0..scene.links() {
        branch = branch.wan(&format!("wan{number}"));
    }
    let endpoints: Vec<String> =
        (0..scene.links()).map(|number| scene.endpoint(testbed::topology::Site::B, number)).collect();
    branch = branch.peer(&hub, &endpoints, &hub.own_nets(), "ethernet = true");
    hub = hub.peer(&branch, &[], &branch.own_nets(), "ethernet = true");
    (branch, hub)
}

/// DHCP server at a host.
fn dhcp_server(scene: &Scene, place: &Node) -> Program {
    let directory = scene.directory.path().display().to_string();
    let text = format!(
        "interface=eth0\nbind-dynamic\nport=0\nno-hosts\nno-resolv\ndhcp-authoritative\n\
         dhcp-range=192.168.7.100,192.168.7.100,255.255.255.0,120\ndhcp-leasefile={directory}/leases\n"
    );
    let config = scene.directory.write("dnsmasq.conf", &text).unwrap();
    let mut command = Command::new("dnsmasq");
    command.arg("-k").arg("-C").arg(config).args(["--user=root", "--pid-file="]);
    place.start(command, Some(&scene.directory.path().join("dnsmasq.out"))).unwrap()
}

/// The address that a host gets.
fn dhcp_client(scene: &Scene, place: &Node) -> Program {
    let directory = scene.directory.path().display().to_string();
    let script = "#!/bin/sh\ncase $reason in BOUND|RENEW|REBIND|REBOOT) ip addr replace $new_ip_address/24 dev $interface;; esac\n";
    let script = scene.directory.write("dhclient.sh", script).unwrap();
    let config = scene
        .directory
        .write("dhclient.conf", "initial-interval 1;\nbackoff-cutoff 2;\nretry 2;\ntimeout 20;\n")
        .unwrap();
    shell(place, &format!("chmod +x {}", script.display()));
    let mut command = Command::new("dhclient");
    command.args(["-d", "-4", "-cf"]).arg(config).arg("-sf").arg(script);
    command.args([
        "-lf",
        &format!("{directory}/client.lease"),
        "-pf",
        &format!("{directory}/client.pid"),
        "eth0",
    ]);
    place.start(command, Some(&scene.directory.path().join("dhclient.out"))).unwrap()
}

/// Frames with tags, of every length, as they are.
fn tagged_frames_pass_as_they_are(a: &Node, b: &Node) {
    let (left, right) = (RawHost::new(a, "raw0", 1500), RawHost::new(b, "raw0", 1500));
    let (one, two) = ([2, 9, 9, 9, 9, 1], [2, 9, 9, 9, 9, 2]);
    let tags: [&[[u8; 4]]; 4] =
        [&[], &[[0x81, 0, 0, 5]], &[[0x81, 0, 0xe0, 0]], &[[0x88, 0xa8, 0, 7], [0x81, 0, 0, 9]]];
    for (number, tags) in tags.into_iter().enumerate() {
        for bytes in [60 + number, 600, 1_500, 1_514 + tags.len() * 4] {
            let there = frame(two, one, tags, bytes);
            left.send(&there);
            right.expect(&there);
            let back = frame(one, two, tags, bytes);
            right.send(&back);
            left.expect(&back);
        }
    }
}

/// Questions about who is on the other side are not answered here any more when that is not wanted.
fn stations_are_asked_themselves(branch: &Gateway, near: &Node) {
    let text = std::fs::read_to_string(&branch.config).unwrap();
    let silent = text.replace("[tap]\n", "[tap]\nanswer-neighbors = false\n");
    std::fs::write(&branch.config, silent).unwrap();
    assert_eq!(branch.command(&["reload"]).0, 0, "{}", branch.log());
    let answered = || branch.status().unwrap().lan.unwrap().frames.answered;
    let before = settled(answered);
    shell(near, "ip neigh flush dev eth0");
    ping(near, "192.168.7.2", "");
    assert_eq!(settled(answered), before);
}

/// Row T14: two sites' LANs are one over two links: ARP, DHCP, neighbor discovery, TCP, tags; packets of the tunnel's own addresses
/// go their way beside.
#[test]
fn t14_two_lans_are_one_with_dhcp_arp_nd_and_tags() {
    let _alone = alone();
    isolated(|| {
        let scene = Scene::new(&[link(60.0, 5.0), link(40.0, 8.0)]);
        let (a, b) = (scene.a(), scene.b());
        bridge(a, 1500);
        bridge(b, 1500);
        let near = host(a, "port1", "192.168.7.1/24", 1500);
        let far = host(b, "port1", "192.168.7.2/24", 1500);
        let (branch, hub) = pair(&scene, "", "");
        let (mut branch, hub) = scene.join(&branch, &hub, 2);
        ping(&near, "192.168.7.2", "");
        ping(&far, "192.168.7.1", "-s 1472 -M do");
        // Neighbor discovery, and IPv6 itself.
        let of = |node: &Node| {
            shell(node, "ip -6 -o addr show dev eth0 scope link | sed 's/.*inet6 //; s/\\/.*//'")
        };
        ping(&near, of(&far).trim(), "-I eth0");
        // An address from the other site.
        let client = host(a, "port2", "", 1500);
        let (_server, _client) = (dhcp_server(&scene, &far), dhcp_client(&scene, &client));
        wait_for("an address", PATIENCE, || {
            shell(&client, "ip addr show dev eth0").contains("192.168.7.100/24")
        });
        ping(&client, "192.168.7.2", "");
        // TCP in both directions, over both links.
        let rates = [
            tcp_seconds(&near, &far, "192.168.7.2", 2, 4.0),
            tcp_seconds(&far, &near, "192.168.7.1", 1, 3.0),
        ];
        branch.wait("both links carried frames", PATIENCE, |report| {
            let carries =
                |path: &&control::status::PathStatus| path.tx_bytes > 100_000 && path.rx_bytes > 100_000;
            report.status.peers[0].paths.iter().filter(carries).count() == 2
        });
        assert!(rates.iter().all(|rate| *rate > 2.0), "{rates:?} Mbit/s over 60 and 40");
        tagged_frames_pass_as_they_are(a, b);
        // The tunnel's own addresses work beside.
        echo(a, b, HUB_IP);
        let report = branch.wait("stations of both", PATIENCE, |report| {
            report.lan.as_ref().is_some_and(|lan| lan.lan_stations >= 3 && lan.peers[0].stations >= 2)
        });
        assert_eq!(report.status.flows_split_over_cores, 0);
        assert!(!report.lan.unwrap().standby);
        assert_eq!(
            settled(|| drops(
                &hub,
                &["ethernet-not-allowed", "ethernet-malformed", "ethernet-moves", "ethernet-no-relay"]
            )),
            0
        );
        // Questions about who is on the other side are answered on this one.
        shell(&near, "ip neigh flush dev eth0");
        ping(&near, "192.168.7.2", "");
        branch.wait("an answer", PATIENCE, |report| {
            report.lan.as_ref().is_some_and(|lan| lan.frames.answered > 0)
        });
        let (code, text) = branch.command(&["status"]);
        assert!(code == 0 && text.contains("LAN tap0 in br0, MTU 1500"), "{text}");
        stations_are_asked_themselves(&branch, &near);
        the_device_leaves_its_bridge(&branch, a);
    });
}

/// A reload that takes the bridge away takes the device out of it.
fn the_device_leaves_its_bridge(branch: &Gateway, place: &Node) {
    let port = || {
        let silent = shell(place, "cat /proc/sys/net/ipv6/conf/tap0/disable_ipv6");
        (shell(place, "ip link show tap0").contains("master br0"), silent.trim() == "1")
    };
    let text = std::fs::read_to_string(&branch.config).unwrap();
    assert_eq!(port(), (true, true));
    std::fs::write(&branch.config, text.replace("bridge = \"br0\"\n", "")).unwrap();
    assert_eq!(branch.command(&["reload"]).0, 0, "{}", branch.log());
    wait_for("it is in no bridge", PATIENCE, || port() == (false, false));
    std::fs::write(&branch.config, text).unwrap();
    assert_eq!(branch.command(&["reload"]).0, 0, "{}", branch.log());
    wait_for("it is in the bridge again", PATIENCE, || port() == (true, true));
}

/// Row T14: frames of 9,000 bytes cross paths of 1,500 in pieces.
#[test]
fn t14_jumbo_frames_go_in_pieces() {
    isolated(|| {
        let scene = Scene::new(&[link(60.0, 3.0), link(40.0, 5.0)]);
        let (a, b) = (scene.a(), scene.b());
        bridge(a, 9000);
        bridge(b, 9000);
        let near = host(a, "port1", "192.168.7.1/24", 9000);
        let far = host(b, "port1", "192.168.7.2/24", 9000);
        let (branch, hub) = pair(&scene, "mtu = 9000", "mtu = 9000");
        let (_branch, hub) = scene.join(&branch, &hub, 2);
        for bytes in [8_972, 5_000, 1_473] {
            ping(&near, "192.168.7.2", &format!("-s {bytes} -M do"));
        }
        assert!(tcp_seconds(&near, &far, "192.168.7.2", 1, 3.0) > 0.5);
        let (left, right) = (RawHost::new(a, "raw0", 9000), RawHost::new(b, "raw0", 9000));
        for tags in [&[][..], &[[0x81, 0, 0, 5]]] {
            let there = frame([2, 9, 9, 9, 9, 2], [2, 9, 9, 9, 9, 1], tags, 9_014 + tags.len() * 4);
            left.send(&there);
            right.expect(&there);
        }
        assert_eq!(settled(|| drops(&hub, &["piece-overlap", "frame-malformed", "ethernet-malformed"])), 0);
    });
}

/// Row T14: sites that have a hub only reach each other through it, where the hub passes frames on; a reload takes that back.
#[test]
fn t14_branches_reach_each_other_through_a_hub_that_relays() {
    isolated(|| {
        let scene = Scene::new(&[link(60.0, 3.0)]);
        let (a, b) = (scene.a(), scene.b());
        let third = Node::create("third site").unwrap();
        let net = |address: &str| address.parse().unwrap();
        b.connect("direct", &[net("203.0.113.1/24")], &third, "wan0", &[net("203.0.113.2/24")]).unwrap();
        for place in [a, b, &third] {
            bridge(place, 1500);
        }
        let near = host(a, "port1", "192.168.7.1/24", 1500);
        let middle = host(b, "port1", "192.168.7.2/24", 1500);
        let far = host(&third, "port1", "192.168.7.3/24", 1500);
        let (branch, hub) = pair(&scene, "", "relay = true");
        let other = Config::new("other", "10.77.0.3").section(&tap("")).wan("wan0");
        let other = other.peer(&hub, &["203.0.113.1:4600".to_owned()], &hub.own_nets(), "ethernet = true");
        let hub = hub.peer(&other, &[], &other.own_nets(), "ethernet = true");
        let _other = scene.start(&third, &other);
        let (_branch, mut hub_gateway) = scene.join(&branch, &hub, 1);
        for (from, address) in
            [(&near, "192.168.7.3"), (&far, "192.168.7.1"), (&near, "192.168.7.2"), (&middle, "192.168.7.3")]
        {
            ping(from, address, "");
        }
        assert!(tcp_seconds(&near, &far, "192.168.7.3", 1, 3.0) > 0.5);
        let report = hub_gateway.wait("frames that were passed on", PATIENCE, |report| {
            report.lan.as_ref().is_some_and(|lan| lan.frames.relayed > 500)
        });
        assert_eq!(report.status.flows_split_over_cores, 0);
        let text = hub.text(&scene.directory).replace("relay = true", "relay = false");
        std::fs::write(&hub_gateway.config, text).unwrap();
        let (code, said) = hub_gateway.command(&["reload"]);
        assert!(code == 0 && said.contains("tap.relay: true → false"), "{said}");
        wait_for("no way through the hub", PATIENCE, || !pings(&near, "192.168.7.3", ""));
        assert!(drops(&hub_gateway, &["ethernet-no-relay"]) > 0);
        ping(&near, "192.168.7.2", "");
    });
}

/// Row T14: a host that makes up stations and floods takes the share of its site, not more, and the others work on.
#[test]
fn t14_made_up_stations_and_floods_are_limited() {
    isolated(|| {
        let scene = Scene::new(&[link(60.0, 3.0)]);
        let (a, b) = (scene.a(), scene.b());
        bridge(a, 1500);
        bridge(b, 1500);
        let near = host(a, "port1", "192.168.7.1/24", 1500);
        let _far = host(b, "port1", "192.168.7.2/24", 1500);
        let limits = "stations-max = 256\nstations-per-peer-max = 32\nflood-per-second-max = 300\n\
                      station-age-seconds = 10";
        let (branch, hub) = pair(&scene, limits, limits);
        let (mut branch, mut hub) = scene.join(&branch, &hub, 1);
        ping(&near, "192.168.7.2", "");
        let (left, right) = (RawHost::new(a, "raw0", 1500), RawHost::new(b, "raw0", 1500));
        let flood = Background::start(move |end| {
            let mut sent = 0u32;
            while !end.load(std::sync::atomic::Ordering::Relaxed) {
                let [_, _, high, low] = sent.to_be_bytes();
                left.send(&frame([0xff; 6], [2, 7, 7, 7, high, low], &[], 60));
                sent += 1;
                if sent.is_multiple_of(20) {
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
            sent
        });
        std::thread::sleep(Duration::from_secs(1));
        let arrived = right.count(0x88b6, Duration::from_secs(4));
        assert!((100..2_500).contains(&arrived), "{arrived} frames in 4 s");
        ping(&near, "192.168.7.2", "");
        let sent = flood.finish();
        assert!(sent > 5_000, "{sent} frames sent");
        let report = branch.wait("drops", PATIENCE, |report| {
            report.lan.as_ref().is_some_and(|lan| lan.drops.get("flood").is_some_and(|drops| *drops > 1_000))
        });
        let lan = report.lan.unwrap();
        assert!(lan.lan_stations <= 128 && lan.frames.not_learned > 500, "{lan:?}");
        let report = hub.wait("stations", PATIENCE, |report| {
            report.lan.as_ref().is_some_and(|lan| lan.peers[0].stations > 0)
        });
        let lan = report.lan.unwrap();
        assert!(lan.peers[0].stations <= 32 && lan.frames.not_learned > 100, "{lan:?}");
        // They never said anything again.
        hub.wait("silent stations are forgotten", PATIENCE, |report| {
            report.lan.as_ref().is_some_and(|lan| lan.peers[0].stations <= 2)
        });
    });
}

/// Row T14: a second way between both LANs makes a loop; one node stands by before that is a storm, and works again when it is gone.
#[test]
fn t14_a_loop_ends_with_one_node_standing_by() {
    isolated(|| {
        let scene = Scene::new(&[link(60.0, 3.0)]);
        let (a, b) = (scene.a(), scene.b());
        bridge(a, 1500);
        bridge(b, 1500);
        let near = host(a, "port1", "192.168.7.1/24", 1500);
        let _far = host(b, "port1", "192.168.7.2/24", 1500);
        let (branch, hub) = pair(&scene, "", "");
        let (mut branch, mut hub) = scene.join(&branch, &hub, 1);
        ping(&near, "192.168.7.2", "");
        a.connect("second", &[], b, "second", &[]).unwrap();
        for place in [a, b] {
            shell(
                place,
                "echo 1 >/proc/sys/net/ipv6/conf/second/disable_ipv6; ip link set second master br0",
            );
        }
        let raw = RawHost::new(a, "raw0", 1500);
        for _ in 0..5 {
            raw.send(&frame([0xff; 6], [2, 9, 9, 9, 9, 1], &[], 60));
        }
        let standby = |report: &control::status::Report| report.lan.as_ref().is_some_and(|lan| lan.standby);
        let both = || [&branch, &hub].map(|gateway| gateway.status().is_some_and(|report| standby(&report)));
        wait_for("one of both stands by", PATIENCE, || both().iter().any(|standby| *standby));
        // What went round has ended, and new broadcasts come once.
        std::thread::sleep(Duration::from_secs(2));
        raw.count(0x88b6, Duration::ZERO);
        assert_eq!(raw.count(0x88b6, Duration::from_secs(2)), 0, "frames still go round");
        let (one, other) = (both(), both());
        assert_eq!(
            (one, one.iter().filter(|standby| **standby).count()),
            (other, 1),
            "one works, the same one"
        );
        ping(&near, "192.168.7.2", "");
        shell(a, "ip link del second");
        for gateway in [&mut branch, &mut hub] {
            gateway.wait("works again", PATIENCE, |report| !standby(report));
        }
        ping(&near, "192.168.7.2", "");
    });
}

/// Row T14: only one side wants Ethernet frames: no session, and each side says why.
#[test]
fn t14_a_peer_that_carries_no_frames_is_refused_with_the_reason() {
    isolated(|| {
        let scene = Scene::new(&[link(60.0, 3.0)]);
        bridge(scene.a(), 1500);
        let hub = Config::new("hub", HUB_IP).node_line("listen = 4600");
        let branch = Config::new("branch", BRANCH_IP).section(&tap("")).wan("wan0");
        let endpoints = [scene.endpoint(testbed::topology::Site::B, 0)];
        let branch = branch.peer(&hub, &endpoints, &hub.own_nets(), "ethernet = true");
        let hub = hub.peer(&branch, &[], &branch.own_nets(), "");
        let mut hub = scene.start(scene.b(), &hub);
        let mut branch = scene.start(scene.a(), &branch);
        branch.wait("the reason", PATIENCE, |report| {
            report.status.peers[0].reason.contains("it carries no Ethernet frames with this node")
        });
        hub.wait("the reason", PATIENCE, |report| {
            report.status.peers[0]
                .reason
                .contains("it carries Ethernet frames, which needs [tap] and ethernet = true")
        });
        wait_for("the count", PATIENCE, || drops(&hub, &["handshake-ethernet"]) > 0);
    });
}
