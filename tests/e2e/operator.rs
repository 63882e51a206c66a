//! Real gateways in namespaces, from the operator's side: WANs, routes, names, reload, bad luck.
//! Rows T1 (paths over WANs, added and removed while data flows) and T11 (cleartext only when allowed twice).
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use control::protocol::Request;
use linux::netlink::Netlink;
use rustix::process::Signal;
use testbed::program::Program;
use testbed::topology::{LinkSpec, Node, Site};

use crate::machine::isolated;
use crate::names::NameServer;
use crate::program::up;
use crate::scene::*;

/// A link that is no bottleneck here.
fn plain() -> LinkSpec {
    link(100.0, 1.0)
}

/// Two configurations that know each other, as texts, with the tunnel addresses of [`Scene::pair`].
struct Pair<'a> {
    scene: &'a Scene,
    branch: Config,
    hub: Config,
}

impl<'a> Pair<'a> {
    fn new(scene: &'a Scene) -> Self {
        let hub = Config::new("hub", HUB_IP).node_line("listen = 4600");
        Self { scene, branch: Config::new("branch", BRANCH_IP), hub }
    }

    /// Configuration of the side that dials.
    fn branch(&self, wans: &[&str], endpoints: &[String], allowed: &str) -> String {
        let config = wans.iter().fold(self.branch.clone(), |config, wan| config.wan(wan));
        config.peer(&self.hub, endpoints, allowed, "").text(&self.scene.directory)
    }

    /// Configuration of the side that listens.
    fn hub(&self, more: &str) -> String {
        self.hub.clone().peer(&self.branch, &[], "\"10.77.0.1/32\"", more).text(&self.scene.directory)
    }

    fn start(&self, place: &Node, name: &str, config: &str) -> Gateway {
        Gateway::start(place, &self.scene.directory, name, config)
    }
}

/// Rules of ours, and routes of ours in tables other than `main`, in a node.
fn left_behind(place: &Node) -> usize {
    let netlink: Netlink = place.netlink().unwrap();
    let rules = netlink.rules(None).unwrap().into_iter().filter(|rule| rule.is_ours()).count();
    let routes = netlink.routes(None).unwrap();
    rules
        + routes
            .iter()
            .filter(|route| route.is_ours() && route.spec.table != linux::netlink::MAIN_TABLE)
            .count()
}

/// Row T1: two WANs whose routers are of the same make: same network, same gateway, even the same own address.
#[test]
fn two_wans_with_the_same_subnet_and_gateway() {
    isolated(|| {
        let same = "192.168.8.0/24".parse().unwrap();
        let links = [plain().behind_router(same), plain().behind_router(same)];
        let scene = Scene::new(&links);
        let pair = Pair::new(&scene);
        let (a, b) = (scene.a(), scene.b());
        let mut hub =
            pair.start(b, "hub", &pair.hub("[[wan]]\ninterface = \"wan0\"\n[[wan]]\ninterface = \"wan1\"\n"));
        let endpoints = [scene.endpoint(Site::B, 0), scene.endpoint(Site::B, 1)];
        let config = pair.branch(&["wan0", "wan1"], &endpoints, "\"10.77.0.2/32\"");
        let mut branch = pair.start(a, "branch", &config);
        // Each WAN reaches the hub's address behind its own router only: the other two pairs must stay down.
        branch.wait("two paths", PATIENCE, |report| paths_up(report) >= 2);
        hub.wait("two paths", PATIENCE, |report| paths_up(report) >= 2);
        echo(a, b, HUB_IP);
        let report = branch.status().unwrap();
        let wans: Vec<&str> = report.status.peers[0]
            .paths
            .iter()
            .filter(|path| path.state == "up")
            .map(|path| path.wan.as_str())
            .collect();
        assert!(wans.contains(&"wan0") && wans.contains(&"wan1"), "{wans:?}");
        assert!(branch.program.stop().unwrap().success());
        assert_eq!(left_behind(a), 0);
    });
}

/// The whole host through the bond, without the tunnel in itself; afterwards everything is as before.
#[test]
fn a_default_route_through_the_bond() {
    isolated(|| {
        let net = |text: &str| text.parse().unwrap();
        let links =
            [plain().behind_router(net("192.168.1.0/24")), plain().behind_router(net("192.168.2.0/24"))];
        let mut scene = Scene::new(&links);
        let host = scene.testbed.add_host(Site::B).unwrap();
        let target = IpAddr::from(host.addresses.ipv4.unwrap());
        let pair = Pair::new(&scene);
        let (a, b) = (scene.a(), scene.b());
        let wans = "[[wan]]\ninterface = \"wan0\"\n[[wan]]\ninterface = \"wan1\"\n";
        let mut hub = pair.start(b, "hub", &pair.hub(wans));
        let config = pair.branch(
            &["wan0", "wan1"],
            &[scene.endpoint(Site::B, 0), scene.endpoint(Site::B, 1)],
            "\"0.0.0.0/0\", \"::/0\"",
        );
        let mut branch = pair.start(a, "branch", &config);
        branch.wait("two paths", PATIENCE, |report| paths_up(report) >= 2);
        hub.wait("the branch", PATIENCE, |report| paths_up(report) >= 2);
        echo(a, &host.node, &target.to_string());
        // Still joined, nothing loops: what the tunnel sends does not come out of it again.
        let report = branch.wait("two paths", PATIENCE, |report| paths_up(report) >= 2);
        let sent: u64 = report.status.cores.iter().map(|core| core.udp_tx_datagrams).sum();
        assert!(sent < 5_000, "{sent} datagrams for 200 kB");
        // A visitor of a WAN's own address is answered there.
        let router = &scene.testbed.routers()[0];
        echo(router, a, "192.168.1.100");
        // Killed without a chance to clean up, and started again: it works as before.
        branch.program.signal(Signal::KILL).unwrap();
        branch.program.wait(Duration::from_secs(5)).unwrap();
        assert!(left_behind(a) > 0);
        drop(branch);
        let mut branch = pair.start(a, "branch", &config);
        branch.wait("two paths again", PATIENCE, |report| paths_up(report) >= 2);
        echo(a, &host.node, &target.to_string());
        // When `stop` returns, everything is taken back.
        assert_eq!(branch.command(&["stop"]), (0, String::new()));
        assert_eq!(left_behind(a), 0);
        assert!(branch.program.wait(Duration::from_secs(5)).unwrap().unwrap().success());
        assert!(a.netlink().unwrap().link("ana0").unwrap().is_none());
    });
}

#[test]
fn wans_that_are_ipv6_only() {
    isolated(|| {
        let scene = Scene::new(&[plain().ipv6_only(), plain().ipv6_only()]);
        let pair = Pair::new(&scene);
        let (a, b) = (scene.a(), scene.b());
        let _hub = pair.start(b, "hub", &pair.hub("[[wan]]\nmatch = \"wan*\"\naddress-family = \"ipv6\"\n"));
        let config = pair.branch(
            &["wan0", "wan1"],
            &[scene.endpoint(Site::B, 0), scene.endpoint(Site::B, 1)],
            "\"10.77.0.2/32\"",
        );
        let mut branch = pair.start(a, "branch", &config);
        branch.wait("two paths", PATIENCE, |report| paths_up(report) >= 2);
        echo(a, b, HUB_IP);

        let (code, text) = branch.command(&["status"]);
        assert_eq!(code, 0);
        assert!(text.starts_with("branch: anabranch ") && text.contains("\npeer hub: up for "), "{text}");
        let (code, json) = branch.command(&["status", "--json"]);
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!((code, &json["peers"][0]["paths"][0]["state"]), (0, &"up".into()));
        assert_eq!((&json["wans"][1]["interface"], &json["tun"]), (&"wan1".into(), &"ana0".into()));
        assert_eq!(branch.command(&["reload"]), (0, "nothing changed\n".to_owned()));
    });
}

/// A start before any link and any name service; joined within 5 s of the first link, although the default route leads
/// into a tunnel that is not there yet.
#[test]
fn a_hub_by_name_and_a_start_before_everything() {
    isolated(|| {
        let scene = Scene::new(&[plain().behind_router("192.168.1.0/24".parse().unwrap())]);
        let pair = Pair::new(&scene);
        let (a, b, router) = (scene.a(), scene.b(), &scene.testbed.routers()[0]);
        // The name server this system uses, played by the router.
        let conf = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        let address = control::peer_names::name_servers(&conf).first().copied();
        let (place, address) = match address {
            Some(address) => (router, address),
            None => (a, Ipv4Addr::LOCALHOST.into()),
        };
        let netlink = place.netlink().unwrap();
        netlink.set_up(1, true).unwrap();
        if !address.is_loopback() {
            netlink.add_address(1, address.into()).unwrap();
        }
        let target = scene.testbed.addresses(Site::B, 0).ipv4.unwrap();
        let names = NameServer::start(place, address);
        scene.testbed.set_carrier(0, Site::A, false).unwrap();
        let _hub = pair.start(b, "hub", &pair.hub(""));
        let config = pair.branch(&["wan0"], &["hub.anabranch.test:4600".to_owned()], "\"0.0.0.0/0\"");
        let mut branch = pair.start(a, "branch", &config);
        branch.wait("waiting without a link", PATIENCE, |report| {
            report.wans[0].state == "no carrier" && report.names[0].addresses.is_empty()
        });
        std::thread::sleep(Duration::from_millis(500));
        names.tell(target);
        scene.testbed.set_carrier(0, Site::A, true).unwrap();
        let start = Instant::now();
        branch.wait("joined", 5.0, |report| paths_up(report) == 1);
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
        echo(a, b, HUB_IP);
    });
}

/// Row T1: interfaces lose their carrier, change their address and vanish while the tunnel runs.
#[test]
fn interfaces_come_and_go() {
    isolated(|| {
        let scene = Scene::new(&[plain(), plain()]);
        let pair = Pair::new(&scene);
        let (a, b) = (scene.a(), scene.b());
        let _hub = pair.start(b, "hub", &pair.hub(""));
        let config = pair.branch(
            &["wan0", "wan1"],
            &[scene.endpoint(Site::B, 0), scene.endpoint(Site::B, 1)],
            "\"10.77.0.2/32\"",
        );
        let mut branch = pair.start(a, "branch", &config);
        branch.wait("two paths", PATIENCE, |report| paths_up(report) >= 2);

        scene.testbed.set_carrier(0, Site::A, false).unwrap();
        let report = branch.wait("carrier loss", PATIENCE, |report| {
            report.wans[0].state == "no carrier" && paths_up(report) == 1
        });
        // It was the kernel's message that did it, not the silence.
        let paths = &report.status.peers[0].paths;
        let of_wan0: Vec<&str> =
            paths.iter().filter(|path| path.wan == "wan0").map(|path| path.reason.as_str()).collect();
        assert_eq!(of_wan0, ["WAN down", "WAN down"]);
        echo(a, b, HUB_IP);
        scene.testbed.set_carrier(0, Site::A, true).unwrap();
        branch.wait("carrier again", PATIENCE, |report| paths_up(report) >= 2);

        let netlink = a.netlink().unwrap();
        let wan1 = a.interface("wan1").unwrap();
        let old = scene.testbed.addresses(Site::A, 1).ipv4.unwrap();
        netlink.del_address(wan1, format!("{old}/24").parse().unwrap()).unwrap();
        netlink.add_address(wan1, "198.18.1.77/24".parse().unwrap()).unwrap();
        branch.wait("another address", PATIENCE, |report| {
            report.wans[1].addresses == ["198.18.1.77"] && paths_up(report) >= 2
        });
        echo(a, b, HUB_IP);

        // Renamed away, as if it were unplugged, and plugged in again.
        netlink.set_up(wan1, false).unwrap();
        netlink.set_name(wan1, "other").unwrap();
        branch.wait("gone", PATIENCE, |report| report.wans[1].state == "missing" && paths_up(report) == 1);
        netlink.set_name(wan1, "wan1").unwrap();
        netlink.set_up(wan1, true).unwrap();
        branch.wait("back", PATIENCE, |report| paths_up(report) >= 2);
        echo(a, b, HUB_IP);
    });
}

/// A modem that is unplugged and plugged in again is another interface under the same name: sockets bound to the old
/// one are dead, and it may all happen between two looks.
#[test]
fn an_interface_is_made_anew_under_its_old_name() {
    isolated(|| {
        let scene = Scene::new(&[plain()]);
        let pair = Pair::new(&scene);
        let (a, b) = (scene.a(), scene.b());
        let plug = || {
            let far = std::os::fd::AsFd::as_fd(b.namespace());
            a.netlink().unwrap().add_veth("modem0", "far0", Some(far)).unwrap();
            for (place, name, address) in [(a, "modem0", "198.51.100.1/24"), (b, "far0", "198.51.100.2/24")] {
                let (netlink, index) = (place.netlink().unwrap(), place.interface(name).unwrap());
                netlink.add_address(index, address.parse().unwrap()).unwrap();
                netlink.set_up(index, true).unwrap();
            }
        };
        plug();
        let hub = pair.start(b, "hub", &pair.hub(""));
        let endpoint = ["198.51.100.2:4600".to_owned()];
        let config = pair
            .branch(&["modem0"], &endpoint, "\"10.77.0.2/32\"")
            .replace("interface = \"modem0\"", "match = \"modem*\"");
        let mut branch = pair.start(a, "branch", &config);
        branch.wait("one path", PATIENCE, |report| paths_up(report) == 1);
        for _ in 0..3 {
            let index = a.interface("modem0").unwrap();
            a.netlink().unwrap().delete_link(index).unwrap();
            plug();
            assert_ne!(a.interface("modem0").unwrap(), index);
            if let Err(error) = try_echo(a, b, HUB_IP) {
                let state = branch.status().map(|report| control::status::text(&report));
                panic!(
                    "{error}\n{}\nbranch:\n{}\nhub:\n{}",
                    state.unwrap_or_default(),
                    branch.log(),
                    hub.log()
                );
            }
        }
        let report = branch.wait("one path", PATIENCE, |report| paths_up(report) == 1);
        assert_eq!(report.status.peers[0].paths.len(), 1);
    });
}

#[test]
fn reload_applies_refuses_and_says_what_needs_a_restart() {
    isolated(|| {
        let scene = Scene::new(&[plain(), plain()]);
        let pair = Pair::new(&scene);
        let (a, b) = (scene.a(), scene.b());
        let mut hub = pair.start(b, "hub", &pair.hub(""));
        let endpoints = [scene.endpoint(Site::B, 0), scene.endpoint(Site::B, 1)];
        let config = pair.branch(&["wan0"], &endpoints, "\"10.77.0.2/32\"");
        let mut branch = pair.start(a, "branch", &config);
        branch.wait("one path", PATIENCE, |report| paths_up(report) == 1);
        hub.wait("one path", PATIENCE, |report| paths_up(report) == 1);
        let reload = |text: &str| {
            std::fs::write(&branch.config, text).unwrap();
            branch.call(Request::Reload).unwrap()
        };
        assert_eq!(reload(&config).reload.unwrap().applied, Vec::<String>::new());

        scene.expect_error("reload refused");
        let refused = reload(&config.replace("allowed-ips", "allowed-ipz"));
        assert!(!refused.ok);
        let error = refused.error.unwrap();
        assert!(error.contains("unknown key; did you mean \"allowed-ips\"?"), "{error}");

        // Row T11: nobody loses encryption by a slip.
        let slip = reload(&format!("{config}encryption = \"off\"\n"));
        assert!(slip.error.unwrap().contains("add allow-cleartext = true"));

        let more = pair
            .branch(&["wan0", "wan1"], &endpoints, "\"10.77.0.2/32\", \"10.99.0.0/16\"")
            .replace("10.77.0.1/24\"", "10.77.0.1/24\", \"10.78.0.1/24\"")
            .replace("[tun]", "listen = 4700\n[tun]");
        let report = reload(&more).reload.unwrap();
        assert_eq!(report.needs_restart, ["node.listen: None → Some(4700)"]);
        assert_eq!(
            report.applied,
            [
                "tun.address: 10.77.0.1/24, fd77::1/64 → 10.77.0.1/24, 10.78.0.1/24, fd77::1/64",
                "wan wan1: added",
                "peer hub: allowed-ips: 10.77.0.2/32 → 10.77.0.2/32, 10.99.0.0/16",
            ]
        );
        let before = branch.status().unwrap().status.peers[0].handshakes;
        branch.wait("two paths", PATIENCE, |report| paths_up(report) == 2);
        let netlink = a.netlink().unwrap();
        let tun = a.interface("ana0").unwrap();
        let has_route = |netlink: &Netlink| {
            let net = "10.99.0.0/16".parse().unwrap();
            netlink.routes(None).unwrap().iter().any(|r| r.spec.dst == net && r.spec.interface == Some(tun))
        };
        assert!(has_route(&netlink));
        assert_eq!(netlink.addresses(tun).unwrap().iter().filter(|address| !address.link_local).count(), 3);
        // Taken back by SIGHUP this time.
        std::fs::write(&branch.config, &config).unwrap();
        branch.program.signal(Signal::HUP).unwrap();
        let report =
            branch.wait("one path", PATIENCE, |report| paths_up(report) == 1 && report.wans.len() == 1);
        assert!(!has_route(&netlink));
        assert_eq!(report.status.peers[0].handshakes, before, "no new handshake: no flow was dropped");
        echo(a, b, HUB_IP);
    });
}

/// A second instance on the same socket, on the same port and with the same TUN interface.
#[test]
fn a_second_instance_is_noticed() {
    isolated(|| {
        let scene = Scene::new(&[plain()]);
        let pair = Pair::new(&scene);
        for refusal in ["another instance is running", "node.listen: UDP port 4600 is taken", "ana0"] {
            scene.expect_error(refusal);
        }
        let b = scene.b();
        let config = pair.hub("");
        let mut hub = pair.start(b, "hub", &config);
        hub.wait("running", PATIENCE, |_| true);
        let second = |name: &str, text: &str| {
            let file = scene.directory.write(&format!("{name}.toml"), text).unwrap();
            let log = scene.directory.path().join(format!("{name}.log"));
            let mut program: Program = b.start(up(&file), Some(&log)).unwrap();
            let status = program.wait(Duration::from_secs(10)).unwrap().expect("it ends");
            (status.code(), std::fs::read_to_string(&log).unwrap())
        };
        let (code, said) = second("same", &config);
        assert_eq!(code, Some(4), "{said}");
        assert!(
            said.contains(&format!("another instance is running (process {})", hub.program.id())),
            "{said}"
        );
        let elsewhere = config.replace("hub.sock", "other.sock");
        let (code, said) = second("port", &elsewhere.replace("ana0", "ana1"));
        assert_eq!(code, Some(4), "{said}");
        assert!(said.contains("node.listen: UDP port 4600 is taken"), "{said}");
        let (code, said) = second("tun", &elsewhere.replace("listen = 4600", "listen = 4601"));
        assert_eq!(code, Some(4), "{said}");
        assert!(said.contains("ana0"), "{said}");
        // The first one is none the worse for it.
        hub.wait("still running", PATIENCE, |_| true);
        assert!(hub.program.stop().unwrap().success());
    });
}

/// The log's disk is full, the state cannot be written: the gateway works and says so once.
#[test]
fn a_full_disk_stops_nothing() {
    isolated(|| {
        let scene = Scene::new(&[plain()]);
        let pair = Pair::new(&scene);
        let (a, b) = (scene.a(), scene.b());
        let _hub = pair.start(b, "hub", &pair.hub(""));
        let config = pair
            .branch(&["wan0"], &[scene.endpoint(Site::B, 0)], "\"10.77.0.2/32\"")
            .replace("name = \"branch\"", "name = \"branch\"\nlog-file = \"/dev/full\"")
            .replace("/branch\"\ncontrol", "/branch.toml/not-a-directory\"\ncontrol");
        assert!(config.contains("not-a-directory"));
        let mut branch = pair.start(a, "branch", &config);
        branch.wait("one path", PATIENCE, |report| paths_up(report) == 1);
        echo(a, b, HUB_IP);
        let said = branch.log();
        assert_eq!(said.matches("cannot write the log file /dev/full").count(), 1, "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(branch.program.stop().unwrap().success());
    });
}
