//! Two hosts with several interfaces on one subnet (row R16).

use testbed::topology::Node;
use testbed::traffic::udp::Report;
use testbed::traffic::{Span, udp};

use crate::gateway_scene::shell;
use crate::machine::{alone, isolated};
use crate::scene::*;

/// Interfaces of each host.
const INTERFACES: usize = 3;

/// A switch with interfaces of both sites on one subnet; the last one of site B is behind a port of 20 Mbit/s, the others of 60.
fn subnet(scene: &Scene) -> Node {
    let switch = Node::create("switch").unwrap();
    shell(&switch, "ip link add br0 type bridge forward_delay 0; ip link set br0 up");
    for (place, letter, first) in [(scene.a(), "s", 11), (scene.b(), "t", 21)] {
        shell(place, "sysctl -q net.ipv4.conf.all.arp_ignore=1 net.ipv4.conf.all.arp_announce=2");
        for number in 0..INTERFACES {
            let (port, name) = (format!("{letter}p{number}"), format!("{letter}{number}"));
            let address = format!("10.66.0.{}/24", first + number).parse().unwrap();
            switch.connect(&port, &[], place, &name, &[address]).unwrap();
            shell(&switch, &format!("ip link set {port} master br0"));
            let rate = if number + 1 == INTERFACES { 20 } else { 60 };
            shell(
                &switch,
                &format!("tc qdisc add dev {port} root tbf rate {rate}mbit burst 15k latency 60ms"),
            );
        }
    }
    switch
}

/// Bytes that each interface received.
fn received(place: &Node, letter: &str) -> Vec<u64> {
    let devices = shell(place, "cat /proc/net/dev");
    let bytes = |number: usize| {
        let name = format!("{letter}{number}:");
        let counters = devices.lines().find_map(|line| line.trim().strip_prefix(name.as_str())).unwrap();
        counters.split_whitespace().next().unwrap().parse::<u64>().unwrap()
    };
    (0..INTERFACES).map(bytes).collect()
}

/// Report of a transfer, and the share of each interface of the receiver, percent.
fn shares(scene: &Scene, mbps: f64) -> (Report, Vec<u64>) {
    let before = received(scene.b(), "t");
    let options = udp::Options { flows: 1, ..udp::Options::new(mbps, Span::seconds(3.0)) };
    let report = udp_seconds(scene.a(), scene.b(), HUB_IP, options);
    let bytes: Vec<u64> =
        received(scene.b(), "t").iter().zip(before).map(|(after, before)| after - before).collect();
    let all: u64 = bytes.iter().sum();
    (report, bytes.iter().map(|bytes| bytes * 100 / all.max(1)).collect())
}

/// Row R16: a source spreads its packets evenly over the receiver's interfaces on one subnet, in order; without the setting as much as each
/// can carry, which `reload` changes under way.
#[test]
fn r16_every_interface_of_both_hosts_carries_the_same() {
    let _alone = alone();
    isolated(|| {
        let scene = Scene::new(&[link(100.0, 1.0)]);
        let _switch = subnet(&scene);
        let mut branch = Config::new("branch", BRANCH_IP);
        let hub = Config::new("hub", HUB_IP).node_line("listen = 4600");
        for number in 0..INTERFACES {
            branch = branch.wan(&format!("s{number}"));
        }
        let endpoints: Vec<String> =
            (0..INTERFACES).map(|number| format!("10.66.0.{}:4600", 21 + number)).collect();
        let peerless = branch.clone();
        let branch = branch.peer(&hub, &endpoints, &hub.own_nets(), "spread = \"uniform\"\n");
        let hub = hub.peer(&branch, &[], &branch.own_nets(), "");
        // Each interface has one of the other side that it carries data to; the other pairs are there for the day one fails.
        let (branch, _hub) = scene.join(&branch, &hub, INTERFACES);

        let (report, even) = shares(&scene, 30.0);
        assert!(even.iter().all(|share| (30..=37).contains(share)), "{even:?} {report:?}");
        assert_eq!((report.corrupt, report.duplicates), (0, 0), "{report:?}");
        assert!(report.loss_percent < 1.0 && report.reordered * 100 < report.received, "{report:?}");

        let by_rate = peerless.peer(&hub, &endpoints, &hub.own_nets(), "");
        std::fs::write(&branch.config, by_rate.text(&scene.directory)).unwrap();
        let (code, said) = branch.command(&["reload"]);
        assert!(code == 0 && said.contains("peer hub: spread: uniform → earliest"), "{said}");
        let (report, by_rate) = shares(&scene, 60.0);
        assert!(by_rate[2] < 25, "the slow interface has what it can carry: {by_rate:?} {report:?}");
    });
}
