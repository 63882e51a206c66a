//! The Internet side: addresses and interfaces that change, IPv6 alone, the whole host through the bond.

use std::time::Duration;

use testbed::topology::Site;

use crate::gateway_scene::{shell, try_shell};
use crate::machine::isolated;
use crate::scene::*;

/// Rows T1, T13: WANs that have IPv6 only, and the whole host, IPv4 and IPv6, through the bond: 0.0.0.0/0 and ::/0.
/// What leaves the tunnel does not enter it again.
#[test]
fn t1_t13_ipv6_only_wans_carry_the_whole_host_of_both_families() {
    isolated(|| {
        let mut scene = Scene::new(&[link(100.0, 2.0).ipv6_only(), link(50.0, 4.0).ipv6_only()]);
        let host = scene.testbed.add_host(Site::B).unwrap();
        let (branch, hub) = scene.pair();
        let own = hub.own_nets();
        let branch_text = branch.text(&scene.directory).replace(&own, "\"0.0.0.0/0\", \"::/0\"");
        let _hub = scene.start(scene.b(), &hub);
        let mut branch = Gateway::start(scene.a(), &scene.directory, "branch", &branch_text);
        branch.wait("two paths", PATIENCE, |report| paths_up(report) >= 2);
        let (ipv4, ipv6) =
            (host.addresses.ipv4.unwrap().to_string(), host.addresses.ipv6.unwrap().to_string());
        for address in [ipv4.as_str(), ipv6.as_str()] {
            echo(scene.a(), &host.node, address);
            tcp_seconds(scene.a(), &host.node, address, 2, 1.5);
        }
        let report = branch.wait("still two paths", PATIENCE, |report| paths_up(report) >= 2);
        assert!(
            report.status.peers[0].paths.iter().all(|path| path.remote.starts_with("[2001:db8:")),
            "{report:?}"
        );
        let (packets, datagrams) = report.status.cores.iter().fold((0, 0), |(packets, datagrams), core| {
            (packets + core.tun_rx_packets, datagrams + core.udp_tx_datagrams)
        });
        assert!(datagrams < 2 * packets + 1_000, "{datagrams} datagrams for {packets} packets: a loop");
        drop(branch);
        assert!(scene.a().netlink().unwrap().link("ana0").unwrap().is_none());
    });
}

/// Rows T1, T2: while data flows, the address of a WAN changes (roaming), another WAN vanishes and comes back.
#[test]
fn t1_t2_an_address_changes_and_an_interface_vanishes_while_data_flows() {
    isolated(|| {
        let scene = Scene::new(&[link(40.0, 3.0), link(40.0, 8.0)]);
        let (a, b) = (scene.a(), scene.b());
        let (branch, hub) = scene.pair();
        let (mut branch, mut hub) = scene.join(&branch, &hub, 2);
        let before = peer(&branch).handshakes;
        let flow = tcp_start(a, b, HUB_IP, 5203, 4, 9.0);
        std::thread::sleep(Duration::from_secs(1));

        let netlink = a.netlink().unwrap();
        let (wan0, wan1) = (a.interface("wan0").unwrap(), a.interface("wan1").unwrap());
        let old = scene.testbed.addresses(Site::A, 0).ipv4.unwrap();
        netlink.del_address(wan0, net(old.into(), 24)).unwrap();
        netlink.add_address(wan0, "198.18.0.77/24".parse().unwrap()).unwrap();
        hub.wait("the hub follows", PATIENCE, |report| {
            paths_up(report) >= 2
                && report.status.peers[0].paths.iter().any(|path| path.remote.starts_with("198.18.0.77:"))
        });

        netlink.set_up(wan1, false).unwrap();
        netlink.set_name(wan1, "pulled").unwrap();
        branch.wait("one path left", PATIENCE, |report| {
            report.wans[1].state == "missing" && paths_up(report) == 1
        });
        std::thread::sleep(Duration::from_secs(1));
        netlink.set_name(wan1, "wan1").unwrap();
        netlink.set_up(wan1, true).unwrap();
        branch.wait("two paths again", PATIENCE, |report| paths_up(report) >= 2);
        tcp_finish(flow);
        assert_eq!(peer(&branch).handshakes, before, "roaming needs no new session");
        assert_eq!(hub.status().unwrap().status.flows_split_over_cores, 0);
    });
}

/// A branch on a host that was changed like this joins over a WAN with `gateway` and carries data; both gateways have ended then.
fn joins_by_its_gateway(change: &str) -> Scene {
    let network = "192.168.1.0/24".parse().unwrap();
    let scene = Scene::new(&[link(100.0, 1.0).behind_router(network)]);
    shell(scene.a(), change);
    let (branch, hub) = scene.pair();
    let text = branch.text(&scene.directory);
    let text = text.replace("\"wan0\"\n", "\"wan0\"\ngateway = [\"192.168.1.1\"]\n");
    let _hub = scene.start(scene.b(), &hub);
    let mut branch = Gateway::start(scene.a(), &scene.directory, "branch", &text);
    branch.wait("a path", PATIENCE, |report| paths_up(report) == 1);
    echo(scene.a(), scene.b(), HUB_IP);
    scene
}

/// Row T1: a WAN goes by the gateway that is configured and not by the one of the host's default route, which here leads nowhere.
#[test]
fn t1_a_wan_has_the_gateway_that_is_configured() {
    isolated(|| {
        drop(joins_by_its_gateway("ip route change default via 192.168.1.9 dev wan0 metric 100"));
    });
}

/// Row T1: a host whose main table has no default route joins over a WAN with a gateway of its own, also where the kernel looks at
/// where packets come from (reverse-path filter `loose`, as systemd sets it).
#[test]
fn t1_a_wan_needs_no_default_route() {
    isolated(|| {
        let scene =
            joins_by_its_gateway("ip route del default; echo 2 >/proc/sys/net/ipv4/conf/all/rp_filter");
        let rules = try_shell(scene.a(), "ip rule").unwrap();
        assert_eq!(rules.lines().count(), 3, "{rules}");
    });
}

/// Row T1: routes of allowed-ips are in the main table, in one that is named, or nowhere; live.
#[test]
fn t1_routes_go_where_they_are_wanted() {
    isolated(|| {
        let scene = Scene::new(&[link(100.0, 1.0)]);
        let (branch, hub) = scene.pair();
        let nets = hub.own_nets();
        let text = branch.text(&scene.directory).replace(&nets, &format!("{nets}, \"192.0.2.0/24\""));
        let with = |line: &str| text.replace("[tun]\n", &format!("[tun]\n{line}\n"));
        let mut branch = Gateway::start(scene.a(), &scene.directory, "branch", &with("route = \"auto\""));
        branch.wait("it runs", PATIENCE, |report| !report.status.peers.is_empty());
        // A table without routes is none to the kernel.
        let has = |table: &str| {
            try_shell(scene.a(), &format!("ip route show table {table}"))
                .is_ok_and(|routes| routes.contains("192.0.2.0/24 dev ana0"))
        };
        for (line, tables) in [
            ("route = \"auto\"", [true, false]),
            ("table = 77", [false, true]),
            ("route = \"off\"", [false, false]),
            ("", [true, false]),
        ] {
            std::fs::write(&branch.config, with(line)).unwrap();
            assert_eq!(branch.command(&["reload"]).0, 0, "{}", branch.log());
            wait_for(line, PATIENCE, || [has("main"), has("77")] == tables);
        }
    });
}

/// Row T1: the clock says 1970 after a restart. The state file keeps the handshake timestamps rising, so that the
/// hub, which has seen later ones, lets the branch in; garbage in that file costs a warning only.
#[test]
fn t1_a_clock_behind_its_own_past_still_joins() {
    isolated(|| {
        let scene = Scene::new(&[link(100.0, 1.0)]);
        let (branch, hub) = scene.pair();
        // A past in the year 2100: to this file, today is as long ago as 1970 is to us.
        let directory = scene.directory.path().join("branch");
        std::fs::create_dir(&directory).unwrap();
        let public = control::key::decode_public(&branch.keys.public).unwrap();
        let name: String = public.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        let file = directory.join(format!("{name}.json"));
        let future_ns = 4_102_444_800_000_000_000u64;
        std::fs::write(&file, format!("{{\"timestamp-floor-ns\":{future_ns}}}\n")).unwrap();
        let mut at_hub = scene.start(scene.b(), &hub);
        for round in 1..=3 {
            let mut at_branch = scene.start(scene.a(), &branch);
            at_branch.wait("joined", 15.0, |report| paths_up(report) == 1);
            at_hub.wait("joined", 15.0, |report| report.status.peers[0].handshakes >= round);
            echo(scene.a(), scene.b(), HUB_IP);
            // An orderly end and a power failure.
            let kind = if round == 1 { rustix::process::Signal::TERM } else { rustix::process::Signal::KILL };
            at_branch.program.signal(kind).unwrap();
            at_branch.program.wait(Duration::from_secs(20)).unwrap().unwrap();
            let kept = std::fs::read_to_string(&file).unwrap();
            let digits: String = kept.chars().filter(char::is_ascii_digit).collect();
            assert!(digits.parse::<u64>().unwrap() > future_ns, "{kept}");
        }
        assert_eq!(settled(|| drops(&at_hub, &["handshake-replayed"])), 0);
        // Without the file the hub takes the present for a recording, asks for a proof that it is not, and gets it.
        std::fs::write(&file, "no JSON").unwrap();
        let mut at_branch = scene.start(scene.a(), &branch);
        wait_for("challenged", PATIENCE, || drops(&at_hub, &["handshake-replayed"]) >= 1);
        at_branch.wait("joined", 5.0, |report| paths_up(report) == 1);
        echo(scene.a(), scene.b(), HUB_IP);
        assert!(at_hub.log().contains("it proved to be fresh"), "{}", at_hub.log());
        assert_eq!(at_branch.log().matches("the state file").count(), 1, "{}", at_branch.log());
        // A hub that starts anew has no past to insist on.
        drop(at_hub);
        at_hub = scene.start(scene.b(), &hub);
        at_hub.wait("joined", 15.0, |report| paths_up(report) == 1);
    });
}

/// Row T1: a gateway is killed while TCP flows, and started again: it cleans up after its predecessor, the other side notices,
/// and the stream goes on where it was.
#[test]
fn t1_a_killed_gateway_comes_back_and_tcp_goes_on() {
    isolated(|| {
        let scene = Scene::new(&[link(40.0, 3.0), link(30.0, 5.0)]);
        let (a, b) = (scene.a(), scene.b());
        let (branch_config, hub_config) = scene.pair();
        let (mut branch, mut hub) = scene.join(&branch_config, &hub_config, 2);
        let flow = tcp_start(a, b, HUB_IP, 5203, 2, 9.0);
        for round in 0..2 {
            std::thread::sleep(Duration::from_millis(1_500));
            let killed = if round == 0 { &mut hub } else { &mut branch };
            killed.program.signal(rustix::process::Signal::KILL).unwrap();
            killed.program.wait(Duration::from_secs(20)).unwrap().unwrap();
            if round == 0 {
                hub = scene.start(b, &hub_config);
            } else {
                branch = scene.start(a, &branch_config);
            }
            branch.wait("two paths again", PATIENCE, |report| paths_up(report) >= 2);
            hub.wait("two paths again", PATIENCE, |report| paths_up(report) >= 2);
        }
        tcp_finish(flow);
        assert_eq!(peer(&branch).state, "up");
    });
}
