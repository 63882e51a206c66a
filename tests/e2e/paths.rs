//! Which paths there are, and several bonds of one node.

use std::collections::BTreeSet;
use std::time::Duration;

use control::status::Report;
use testbed::topology::{LinkNet, Site};

use crate::capture::Capture;
use crate::machine::{busy, isolated};
use crate::scene::*;

/// WAN and remote address of every path in one of these states.
fn pairs(report: &Report, states: &[&str]) -> BTreeSet<(String, String)> {
    let paths = report.status.peers[0].paths.iter().filter(|path| states.contains(&path.state.as_str()));
    paths.map(|path| (path.wan.clone(), path.remote.clone())).collect()
}

/// Row T1: two WANs at each side behind routers, so that every WAN reaches every address of the hub. All four permutations of
/// local and remote WAN join, each usable; with two paths per pair there are twice as many. WANs are added and
/// removed by reload while data flows.
#[test]
fn t1_every_useful_permutation_joins_and_wans_come_and_go_while_data_flows() {
    isolated(|| {
        let net = |text: &str| Some(LinkNet::Given(text.parse().unwrap()));
        let links = [60.0, 30.0].map(|mbps| {
            let mut link = link(mbps, 3.0);
            (link.ipv4, link.router) =
                (net(if mbps > 50.0 { "192.168.1.0/24" } else { "192.168.2.0/24" }), true);
            link
        });
        let scene = Scene::new(&links);
        let (a, b) = (scene.a(), scene.b());
        // The Internet between the routers: each forwards to the other's networks.
        interconnect(&scene);
        let (branch, hub) = scene.pair();
        let hub = hub.section("[[wan]]\ninterface = \"wan0\"\n[[wan]]\ninterface = \"wan1\"\n");
        let mut hub = scene.start(b, &hub);
        let text = branch.text(&scene.directory);
        let mut branch = scene.start(a, &branch);
        let joined = |report: &Report| pairs(report, &["up", "standby"]).len();
        let report = branch.wait("four permutations", PATIENCE, |report| joined(report) == 4);
        let both =
            |report: &Report| pairs(report, &["up"]).into_iter().map(|(wan, _)| wan).collect::<BTreeSet<_>>();
        assert_eq!(both(&report).len(), 2, "each WAN carries: {report:?}");
        hub.wait("four permutations", PATIENCE, |report| joined(report) == 4);

        let before = peer(&branch).handshakes;
        let flow = tcp_start(a, b, HUB_IP, 5203, 4, 8.0);
        let reload = |text: &str| {
            std::fs::write(&branch.config, text).unwrap();
            assert_eq!(branch.command(&["reload"]).0, 0, "{}", branch.log());
        };
        reload(&text.replace("[[wan]]\ninterface = \"wan1\"\n", ""));
        wait_for("wan1 is given up", PATIENCE, || {
            let report = branch.status().unwrap();
            joined(&report) == 2 && pairs(&report, &["up", "standby"]).iter().all(|(wan, _)| wan == "wan0")
        });
        reload(&text);
        wait_for("wan1 is back", PATIENCE, || joined(&branch.status().unwrap()) == 4);
        reload(&format!("{text}paths-per-wan-pair = 2\n"));
        wait_for("two paths for each pair", PATIENCE, || {
            let paths = &branch.status().unwrap().status.peers[0].paths;
            paths.iter().filter(|path| matches!(path.state.as_str(), "up" | "standby")).count() == 8
        });
        tcp_finish(flow);
        assert_eq!(peer(&branch).handshakes, before, "no flow and no session was dropped");
        assert_eq!(hub.status().unwrap().status.flows_split_over_cores, 0);
        let carried = |wan: &str| -> u64 {
            let paths = peer(&branch).paths;
            paths.iter().filter(|path| path.wan == wan).map(|path| path.tx_bytes).sum()
        };
        wait_for("both WANs carried data", PATIENCE, || {
            carried("wan0") > 1_000_000 && carried("wan1") > 100_000
        });
    });
}

/// Row T1: wan1 is a metered backup, of which only the branch knows. It carries keepalives alone, whichever side sends, takes over
/// when wan0 falls silent, and is left when wan0 is back. `rate-max` holds for what the branch sends, `receive-rate-max` for what the hub sends.
#[test]
fn t1_a_backup_that_one_side_knows_of_is_left_alone_by_both() {
    let _busy = busy();
    isolated(|| {
        let scene = Scene::new(&[link(30.0, 5.0), link(30.0, 15.0)]);
        let (a, b) = (scene.a(), scene.b());
        let (branch, hub) = scene.pair();
        let text = branch.text(&scene.directory);
        let backup = text.replace("interface = \"wan1\"", "interface = \"wan1\"\ntier = 1");
        let mut hub = scene.start(b, &hub);
        let mut branch = Gateway::start(a, &scene.directory, "branch", &backup);
        branch.wait("two paths", PATIENCE, |report| paths_up(report) == 2);
        hub.wait("two paths", PATIENCE, |report| paths_up(report) == 2);
        let carried = |gateway: &Gateway, second: &str| -> u64 {
            let paths = peer(gateway).paths;
            paths
                .iter()
                .filter(|path| path.wan == second || path.remote.contains(second))
                .map(|path| path.tx_bytes)
                .sum()
        };
        let second = scene.testbed.addresses(Site::A, 1).ipv4.unwrap().to_string();
        let both = || (carried(&branch, "wan1"), carried(&hub, &second));
        let before = both();
        tcp_seconds(b, a, BRANCH_IP, 2, 2.0);
        tcp_seconds(a, b, HUB_IP, 2, 2.0);
        let after = both();
        // 4 s, a few small datagrams a second and a search for the MTU.
        assert!(after.0 - before.0 < 60_000 && after.1 - before.1 < 60_000, "{before:?} {after:?}");

        let flow = tcp_start(b, a, BRANCH_IP, 5203, 2, 9.0);
        std::thread::sleep(Duration::from_secs(1));
        scene.testbed.black_hole(0, true).unwrap();
        let at = both().1;
        wait_for("the backup takes over", 1.0, || both().1 > at + 200_000);
        scene.testbed.black_hole(0, false).unwrap();
        std::thread::sleep(Duration::from_secs(4));
        let at = both();
        std::thread::sleep(Duration::from_secs(2));
        let end = both();
        assert!(
            end.1 - at.1 < 30_000 && end.0 - at.0 < 30_000,
            "left when the main line is back: {at:?} {end:?}"
        );
        tcp_finish(flow);

        let limits = "interface = \"wan1\"\nrate-max = \"3 Mbit/s\"\nreceive-rate-max = \"2 Mbit/s\"";
        std::fs::write(&branch.config, text.replace("interface = \"wan1\"", limits)).unwrap();
        assert_eq!(branch.command(&["reload"]).0, 0, "{}", branch.log());
        wait_for("the hub knows", PATIENCE, || {
            let paths = peer(&hub).paths;
            paths.iter().any(|path| path.remote.contains(&second) && path.rate_mbps <= 2.1)
        });
        let at = both();
        let flows = [tcp_start(b, a, BRANCH_IP, 5203, 2, 3.0), tcp_start(a, b, HUB_IP, 5204, 2, 3.0)];
        for flow in flows {
            tcp_finish(flow);
        }
        let sent = (both().0 - at.0, both().1 - at.1);
        assert!(sent.0 < 1_600_000, "{sent:?} bytes in 3 s, by the branch at 3 Mbit/s");
        assert!(sent.1 < 1_200_000, "{sent:?} bytes in 3 s, by the hub at 2 Mbit/s");
    });
}

/// Joins the routers of both links by a cable, and lets each know what is behind the other.
fn interconnect(scene: &Scene) {
    use linux::netlink::RouteSpec;
    let [one, two] = scene.testbed.routers() else { panic!("two routers") };
    let other = std::os::fd::AsFd::as_fd(two.namespace());
    one.netlink().unwrap().add_veth("core", "core", Some(other)).unwrap();
    let ends = [(one, "203.0.113.1", 1u8), (two, "203.0.113.2", 0)];
    for (router, address, _) in &ends {
        let (netlink, index) = (router.netlink().unwrap(), router.interface("core").unwrap());
        netlink.add_address(index, net(address.parse().unwrap(), 30)).unwrap();
        netlink.set_up(index, true).unwrap();
    }
    for (router, _, far) in &ends {
        let (netlink, index) = (router.netlink().unwrap(), router.interface("core").unwrap());
        let gateway = if *far == 1 { "203.0.113.2" } else { "203.0.113.1" };
        for dst in [format!("198.18.10{far}.0/24"), format!("192.168.{}.0/24", far + 1)] {
            let spec = RouteSpec::new(dst.parse().unwrap());
            let gateway = Some(gateway.parse().unwrap());
            netlink.add_route(&RouteSpec { gateway, interface: Some(index), ..spec }).unwrap();
        }
    }
}

/// Row T1: three sites. The hub has two bonds, each with its own WANs; each branch reaches the hub and, through it, the
/// other branch. A bond never uses a WAN of the other one, and one that goes leaves the other alone.
#[test]
fn t1_several_bonds_of_one_node_each_with_its_own_wans() {
    isolated(|| {
        let mut scene = Scene::new(&[link(80.0, 2.0), link(40.0, 4.0)]);
        // The third site hangs on another interface of the hub.
        let host = scene.testbed.add_host(Site::B).unwrap();
        let (a, b, c) = (scene.a(), scene.b(), &host.node);
        let second_ip = "10.77.0.3";
        let mut hub = Config::new("hub", HUB_IP).node_line("listen = 4600");
        for wan in ["wan0", "wan1", "lan1"] {
            hub = hub.wan(wan);
        }
        let first = Config::new("first", BRANCH_IP).wan("wan0").wan("wan1");
        let second = Config::new("second", second_ip).wan("eth0");
        let everyone = "\"10.77.0.0/24\", \"fd77::/64\"";
        let endpoints = [scene.endpoint(Site::B, 0), scene.endpoint(Site::B, 1)];
        let first = first.peer(&hub, &endpoints, everyone, "");
        let second = second.peer(&hub, &["10.2.1.1:4600".to_owned()], everyone, "");
        let hub = hub.peer(&first, &[], &first.own_nets(), "wans = [\"wan0\", \"wan1\"]").peer(
            &second,
            &[],
            &second.own_nets(),
            "wans = [\"lan1\"]",
        );
        let mut hub = scene.start(b, &hub);
        let mut first = scene.start(a, &first);
        let mut second = scene.start(c, &second);
        first.wait("two paths", PATIENCE, |report| paths_up(report) >= 2);
        second.wait("one path", PATIENCE, |report| paths_up(report) == 1);
        let report = hub.wait("both bonds", PATIENCE, |report| {
            report.status.peers.iter().all(|peer| peer.state == "up") && paths_up(report) >= 2
        });
        let wans = |number: usize| -> BTreeSet<&str> {
            report.status.peers[number].paths.iter().map(|path| path.wan.as_str()).collect()
        };
        assert_eq!(wans(0), BTreeSet::from(["wan0", "wan1"]), "{report:?}");
        assert_eq!(wans(1), BTreeSet::from(["lan1"]), "{report:?}");
        echo(a, b, HUB_IP);
        echo(c, b, HUB_IP);
        // Branch to branch, both ways at once, while one link of the first bond is cut.
        let there = tcp_start(a, c, second_ip, 5203, 2, 5.0);
        let back = tcp_start(c, a, BRANCH_IP, 5204, 2, 5.0);
        std::thread::sleep(Duration::from_secs(1));
        scene.testbed.set_carrier(0, Site::A, false).unwrap();
        first.wait("one path left", PATIENCE, |report| paths_up(report) == 1);
        tcp_finish(there);
        tcp_finish(back);
        assert_eq!(second.status().unwrap().status.peers[0].state, "up");
        // The second bond goes; the first one goes on.
        assert!(second.program.stop().unwrap().success());
        hub.wait("the second is gone", PATIENCE, |report| report.status.peers[1].state != "up");
        echo(a, b, HUB_IP);
    });
}

/// WANs over which a peer's paths that are up or on standby lead.
fn wans_of(gateway: &Gateway, peer: usize) -> Vec<String> {
    let Some(report) = gateway.status() else { return Vec::new() };
    let paths = report.status.peers[peer].paths.iter();
    paths
        .filter(|path| matches!(path.state.as_str(), "up" | "standby"))
        .map(|path| path.wan.clone())
        .collect()
}

/// Row T1: a listener's bond takes paths only over its own `wans` and answers by them, whatever the dialer tries; the set
/// changes by reload while data flows. The dialer's own set holds as well.
#[test]
fn t1_wans_hold_on_both_sides() {
    isolated(|| {
        let scene = Scene::new(&[link(60.0, 2.0), link(60.0, 4.0)]);
        let (branch, hub) = scene.pair();
        let hub = hub.wan("wan0").wan("wan1");
        // The peer's keys come before the WANs: a section of its own follows for each.
        let with = |config: &Config, wans: &str| {
            let text = config.text(&scene.directory);
            text.replace("allowed-ips", &format!("wans = {wans}\nallowed-ips"))
        };
        let reload = |gateway: &Gateway, text: &str| {
            std::fs::write(&gateway.config, text).unwrap();
            assert_eq!(gateway.command(&["reload"]).0, 0, "{}", gateway.log());
        };
        let at_hub = Gateway::start(scene.b(), &scene.directory, "hub", &with(&hub, "[\"wan0\"]"));
        let mut at_branch = scene.start(scene.a(), &branch);
        at_branch.wait("a path", PATIENCE, |report| paths_up(report) == 1);
        let flow = tcp_start(scene.a(), scene.b(), HUB_IP, 5203, 2, 12.0);
        std::thread::sleep(Duration::from_secs(2));
        assert_eq!(
            (wans_of(&at_branch, 0), wans_of(&at_hub, 0)),
            (vec!["wan0".to_owned()], vec!["wan0".to_owned()])
        );
        let carried = |gateway: &Gateway, wan: &str| -> u64 {
            let paths = peer(gateway).paths;
            paths.iter().filter(|path| path.wan == wan).map(|path| path.rx_bytes).sum()
        };
        assert!(carried(&at_branch, "wan0") > 10_000, "the hub answers by its WAN");
        assert_eq!(carried(&at_branch, "wan1"), 0, "the hub answered by a WAN that is not the bond's");
        let handshakes = peer(&at_branch).handshakes;

        reload(&at_hub, &with(&hub, "[\"wan1\"]"));
        wait_for("only wan1 at both ends", PATIENCE, || {
            wans_of(&at_branch, 0) == ["wan1"] && wans_of(&at_hub, 0) == ["wan1"]
        });
        tcp_finish(flow);
        assert_eq!(peer(&at_branch).handshakes, handshakes, "no session was dropped");

        reload(&at_hub, &hub.text(&scene.directory));
        wait_for("both", PATIENCE, || wans_of(&at_branch, 0).len() == 2 && wans_of(&at_hub, 0).len() == 2);
        reload(&at_branch, &with(&branch, "[\"wan0\"]"));
        wait_for("only wan0 at both ends", PATIENCE, || {
            wans_of(&at_branch, 0) == ["wan0"] && wans_of(&at_hub, 0) == ["wan0"]
        });
        echo(scene.a(), scene.b(), HUB_IP);
    });
}

/// Row T1: two bonds of one node with WAN sets of their own, the first with two tunnels for its WAN pair. A peer that comes
/// over the other bond's WAN is not answered, though its key is right; sets are exchanged by reload.
#[test]
fn t1_two_bonds_keep_to_their_wan_sets_with_several_tunnels_for_a_pair() {
    isolated(|| {
        let mut scene = Scene::new(&[link(80.0, 2.0), link(40.0, 4.0)]);
        let host = scene.testbed.add_host(Site::B).unwrap();
        let (a, b, c) = (scene.a(), scene.b(), &host.node);
        let second_ip = "10.77.0.3";
        let mut hub = Config::new("hub", HUB_IP).node_line("listen = 4600");
        for wan in ["wan0", "wan1", "lan1"] {
            hub = hub.wan(wan);
        }
        let first = Config::new("first", BRANCH_IP).wan("wan0").wan("wan1");
        let second = Config::new("second", second_ip).wan("eth0");
        let endpoints = [scene.endpoint(Site::B, 0), scene.endpoint(Site::B, 1)];
        let first = first.peer(&hub, &endpoints, &hub.own_nets(), "paths-per-wan-pair = 2");
        let second = second.peer(&hub, &["10.2.1.1:4600".to_owned()], &hub.own_nets(), "");
        let hub_text = |of_first: &str, of_second: &str| {
            let bonds = [(&first, of_first), (&second, of_second)];
            let mut text = hub.text(&scene.directory);
            for (other, wans) in bonds {
                text.push_str(&format!(
                    "[[peer]]\nname = \"{}\"\npublic-key = \"{}\"\nallowed-ips = [{}]\nwans = [\"{wans}\"]\n",
                    other.name,
                    other.keys.public,
                    other.own_nets()
                ));
            }
            text
        };
        let at_hub = Gateway::start(b, &scene.directory, "hub", &hub_text("wan0", "wan1"));
        let at_first = scene.start(a, &first);
        let at_second = scene.start(c, &second);
        wait_for("two tunnels over wan0", PATIENCE, || {
            wans_of(&at_first, 0) == ["wan0", "wan0"] && wans_of(&at_hub, 0) == ["wan0", "wan0"]
        });
        echo(a, b, HUB_IP);
        // It has asked several times by now; nobody has answered.
        std::thread::sleep(Duration::from_secs(3));
        assert_eq!((wans_of(&at_second, 0).len(), peer(&at_second).handshakes), (0, 0));
        assert!(wans_of(&at_hub, 1).is_empty());
        assert!(drops(&at_hub, &["no-path"]) > 0);

        std::fs::write(&at_hub.config, hub_text("wan1", "lan1")).unwrap();
        assert_eq!(at_hub.command(&["reload"]).0, 0, "{}", at_hub.log());
        wait_for("each by its new set", PATIENCE, || {
            wans_of(&at_first, 0) == ["wan1", "wan1"]
                && wans_of(&at_hub, 0) == ["wan1", "wan1"]
                && wans_of(&at_second, 0) == ["eth0"]
                && wans_of(&at_hub, 1) == ["lan1"]
        });
        echo(a, b, HUB_IP);
        echo(c, b, HUB_IP);
    });
}

/// Row T1: how many sockets, by their source ports, one path has: the cores of the hub share them.
#[test]
fn t1_a_path_has_as_many_sockets_as_configured() {
    isolated(|| {
        let scene = Scene::new(&[link(100.0, 1.0)]);
        let (a, b) = (scene.a(), scene.b());
        let (branch, hub) = scene.pair();
        let branch = branch.node_line("cores = [0]").section("sockets-per-path = 1\n");
        let text = branch.text(&scene.directory);
        let (branch, _hub) = scene.join(&branch, &hub.node_line("cores = [0, 1]"), 1);
        let source_ports = || -> BTreeSet<[u8; 2]> {
            let capture = Capture::start(b, "wan0", 50_000);
            // Of as many flows as this some are of each core.
            tcp_seconds(a, b, HUB_IP, 16, 1.0);
            capture.finish().iter().map(|frame| [frame[34], frame[35]]).collect()
        };
        assert_eq!(source_ports().len(), 1);
        std::fs::write(&branch.config, text.replace("sockets-per-path = 1", "sockets-per-path = 2")).unwrap();
        assert_eq!(branch.command(&["reload"]).0, 0, "{}", branch.log());
        assert_eq!(source_ports().len(), 2);
    });
}
