//! Networks that block UDP: the bond goes over TCP and TLS by itself, and comes back.

use std::process::Command;

use testbed::topology::{Node, Site};

use crate::machine::{alone, isolated};
use crate::scene::*;

const UDP_BLOCKED: &str = "add table inet middlebox; add chain inet middlebox in { type filter hook input priority -300; }; \
                           add rule inet middlebox in iifname != \"lo\" udp dport 4600 drop";

fn nft(place: &Node, rules: &str) {
    let mut command = Command::new("nft");
    command.arg(rules);
    place.output(command).unwrap();
}

/// Paths over TCP, and over UDP, that carry.
fn carrying(gateway: &Gateway) -> (usize, usize) {
    let peer = peer(gateway);
    let up = peer.paths.iter().filter(|path| path.state == "up");
    let (tls, udp): (Vec<_>, Vec<_>) = up.partition(|path| path.wan.ends_with("(TLS)"));
    (tls.len(), udp.len())
}

fn helpers(gateway: &Gateway) -> Vec<i32> {
    let children = |id: u32| {
        let text = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
        text.split_whitespace().map(|id| id.parse::<u32>().unwrap()).collect::<Vec<_>>()
    };
    // They are children of the process that starts programs.
    let ids = children(gateway.program.id()).into_iter().flat_map(children);
    ids.filter(|id| {
        let words = std::fs::read_to_string(format!("/proc/{id}/cmdline")).unwrap_or_default();
        words.contains("tls-path")
    })
    .map(|id| id as i32)
    .collect()
}

/// Branch and hub where nothing of UDP gets through, joined over the hub's TCP port.
fn over_tls(scene: &Scene) -> (Gateway, Gateway) {
    nft(scene.b(), UDP_BLOCKED);
    let (branch, hub) = scene.pair();
    let hub = hub.node_line("listen-tls = 443").section("[[wan]]\ninterface = \"wan0\"\n");
    let hub = scene.start(scene.b(), &hub);
    let mut branch = scene.start(scene.a(), &branch);
    branch.wait("a path over TLS", PATIENCE, |report| paths_up(report) >= 1);
    assert_eq!(carrying(&branch), (1, 0), "{}", branch.log());
    (branch, hub)
}

/// Rows T1, T12: where nothing of UDP arrives, the bond joins over the hub's TCP port and carries data both ways.
#[test]
fn t1_t12_where_udp_is_blocked_the_bond_goes_over_tls() {
    let _alone = alone();
    isolated(|| {
        let scene = Scene::new(&[link(50.0, 5.0)]);
        let (a, b) = (scene.a(), scene.b());
        let _gateways = over_tls(&scene);
        let down = tcp_seconds(b, a, BRANCH_IP, 1, 4.0);
        let up = tcp_seconds(a, b, HUB_IP, 1, 4.0);
        let hub_address = scene.endpoint(Site::B, 0);
        let bare = tcp_seconds(a, b, hub_address.rsplit_once(':').unwrap().0, 1, 4.0);
        eprintln!("over TLS: {up:.1} Mbit/s up, {down:.1} down; bare TCP {bare:.1}");
        assert!(up.min(down) > 0.6 * bare, "{up} up, {down} down, of {bare}");
    });
}

/// Rows T1, T12: the bond survives the end of the process that carries it over TLS, and goes back to UDP without a broken
/// connection as soon as that gets through.
#[test]
fn t1_t12_a_bond_over_tls_survives_its_process_and_goes_back_to_udp() {
    isolated(|| {
        let scene = Scene::new(&[link(50.0, 5.0)]);
        let (a, b) = (scene.a(), scene.b());
        let (branch, _hub) = over_tls(&scene);
        let before = helpers(&branch);
        assert_eq!(before.len(), 1);
        let id = rustix::process::Pid::from_raw(before[0]).unwrap();
        rustix::process::kill_process(id, rustix::process::Signal::KILL).unwrap();
        wait_for("another process carries", PATIENCE, || {
            helpers(&branch).iter().any(|id| !before.contains(id)) && carrying(&branch) == (1, 0)
        });
        wait_for("it answers", PATIENCE, || try_echo(a, b, HUB_IP).is_ok());

        let flow = tcp_start(a, b, HUB_IP, 5203, 1, 25.0);
        nft(b, "delete table inet middlebox");
        wait_for("UDP carries alone", PATIENCE, || carrying(&branch) == (0, 1));
        tcp_finish(flow);
        nft(b, UDP_BLOCKED);
        wait_for("TLS again", PATIENCE, || {
            // An idle bond looks at its paths but seldom.
            let mut ping = Command::new("ping");
            ping.args(["-n", "-c", "1", "-W", "1", HUB_IP]);
            let _ = a.output(ping);
            carrying(&branch).0 == 1
        });
        wait_for("it answers", PATIENCE, || try_echo(a, b, HUB_IP).is_ok());
    });
}

/// Row T12: what a WAN carries over TLS is of its quota too.
#[test]
fn t12_a_quota_counts_what_goes_over_tls() {
    isolated(|| {
        let scene = Scene::new(&[link(20.0, 5.0)]);
        let (a, b) = (scene.a(), scene.b());
        nft(b, UDP_BLOCKED);
        let (branch, hub) = scene.pair();
        let hub = hub.node_line("listen-tls = 443").section("[[wan]]\ninterface = \"wan0\"\n");
        let _hub = scene.start(b, &hub);
        let text = branch.text(&scene.directory);
        let wan = "[[wan]]\ninterface = \"wan0\"\n";
        assert!(text.contains(wan), "{text}");
        let text = text.replace(wan, &format!("{wan}quota = \"3 MB\"\n"));
        let mut branch = Gateway::start(a, &scene.directory, "branch", &text);
        branch.wait("a path over TLS", PATIENCE, |report| paths_up(report) >= 1);
        let used = |report: &control::status::Report| {
            report.wans.iter().find(|wan| wan.interface == "wan0").map_or(0, |wan| wan.quota_used)
        };
        let before = branch.status().map_or(0, |report| used(&report));
        tcp_seconds(a, b, HUB_IP, 2, 4.0);
        assert_eq!(carrying(&branch), (1, 0), "{}", branch.log());
        branch.wait("the quota is used up", PATIENCE, |report| {
            used(report) > before + 3_000_000
                && report.wans.iter().any(|wan| wan.state == "quota used up" && wan.tier == 255)
        });
    });
}

/// Row T1: a process that falls silent is given up for good: it ends when it wakes, and the next one goes on.
#[test]
fn t1_a_process_that_was_given_up_ends_nothing_of_the_next() {
    isolated(|| {
        let scene = Scene::new(&[link(50.0, 5.0)]);
        let (a, b) = (scene.a(), scene.b());
        let (branch, _hub) = over_tls(&scene);
        let before = helpers(&branch);
        let signal = |signal| {
            let id = rustix::process::Pid::from_raw(before[0]).unwrap();
            rustix::process::kill_process(id, signal)
        };
        signal(rustix::process::Signal::STOP).unwrap();
        let next = || helpers(&branch).into_iter().find(|id| !before.contains(id));
        wait_for("another process carries", PATIENCE, || next().is_some() && carrying(&branch) == (1, 0));
        let second = next();
        // It may have been killed by now, if that was allowed.
        let _ = signal(rustix::process::Signal::CONT);
        wait_for("the first one ends", PATIENCE, || !helpers(&branch).contains(&before[0]));
        std::thread::sleep(std::time::Duration::from_secs(2));
        assert_eq!((next(), carrying(&branch)), (second, (1, 0)), "{}", branch.log());
        wait_for("it answers", PATIENCE, || try_echo(a, b, HUB_IP).is_ok());
    });
}

/// Row T1: the TCP port that is dialled where UDP is blocked is the peer's `tls-port`; 0 forbids it.
#[test]
fn t1_the_tcp_port_is_chosen_for_each_peer() {
    isolated(|| {
        let scene = Scene::new(&[link(50.0, 5.0)]);
        let (a, b) = (scene.a(), scene.b());
        nft(b, UDP_BLOCKED);
        let (branch, hub) = scene.pair();
        let hub = hub.node_line("listen-tls = 8443").section("[[wan]]\ninterface = \"wan0\"\n");
        let text = branch.text(&scene.directory);
        let _hub = scene.start(b, &hub);
        let branch = scene.start(a, &branch.section("tls-port = 8443\n"));
        wait_for("a path over TLS", PATIENCE, || branch.status().is_some() && carrying(&branch) == (1, 0));
        echo(a, b, HUB_IP);
        std::fs::write(&branch.config, format!("{text}tls-port = 0\n")).unwrap();
        assert_eq!(branch.command(&["reload"]).0, 0, "{}", branch.log());
        wait_for("none is left", PATIENCE, || carrying(&branch) == (0, 0));
    });
}
