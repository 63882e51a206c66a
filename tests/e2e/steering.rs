//! The ways in which a side is told the core that processes a packet, as two gateways agree on them.

use linux::testing::isolated;
use testbed::traffic::{Span, udp};

use crate::scene::*;

/// Packets that each core of a gateway gave to the host so far.
fn delivered(gateway: &Gateway) -> Vec<u64> {
    settled(|| gateway.status().unwrap().status.cores.iter().map(|core| core.tun_tx_packets).collect())
}

/// Packets since then, by core.
fn since(gateway: &Gateway, before: &[u64]) -> Vec<u64> {
    delivered(gateway).iter().zip(before).map(|(now, before)| now - before).collect()
}

/// Nothing that the peer sent was refused for its core, its lane or its contents.
#[track_caller]
fn nothing_refused(gateway: &Gateway) {
    let reasons = ["core-out-of-range", "auth-failed", "frame-malformed", "frame-unknown", "replayed"];
    assert_eq!(settled(|| drops(gateway, &reasons)), 0, "{:?}", gateway.status());
    assert_eq!(gateway.status().unwrap().status.flows_split_over_cores, 0);
}

/// Rows T4, T6: a side refuses to address the other in a way that it is not allowed to; both say so, in status and log, and
/// no session comes to be, whichever side it is that wants. Once it is allowed, they join.
#[test]
fn t4_t6_a_mode_that_the_other_side_lacks_is_refused_by_both() {
    isolated(|| {
        let scene = Scene::new(&[link(100.0, 1.0)]);
        let (wants, lacks) = ("steering = \"per-tunnel\"\n", "accept-steering = [\"core-id\"]\n");
        let here = "it wants steering per-tunnel, which accept-steering does not allow here";
        let there = "it does not accept steering per-tunnel, which is wanted here";
        for hub_wants in [true, false] {
            let (branch, hub) = scene.pair();
            let (asking, refusing) = if hub_wants { (hub, branch) } else { (branch, hub) };
            let text = refusing.text(&scene.directory);
            let (asking, refusing) = (asking.section(wants), refusing.section(lacks));
            let (at_asking, at_refusing) =
                if hub_wants { (scene.b(), scene.a()) } else { (scene.a(), scene.b()) };
            let mut asking = scene.start(at_asking, &asking);
            let mut refusing = scene.start(at_refusing, &refusing);
            for (gateway, reason) in [(&mut asking, there), (&mut refusing, here)] {
                gateway.wait(reason, PATIENCE, |report| report.status.peers[0].reason == reason);
                assert_eq!(peer(gateway).state, "connecting");
                let said = gateway.log().lines().filter(|line| line.contains(reason)).count();
                assert_eq!(said, 1, "said once, not with every attempt: {}", gateway.log());
            }
            assert!(try_echo(scene.a(), scene.b(), HUB_IP).is_err());
            std::fs::write(&refusing.config, text).unwrap();
            assert_eq!(refusing.command(&["reload"]).0, 0);
            refusing.wait("allowed now", PATIENCE, |report| paths_up(report) == 1);
            asking.wait("allowed now", PATIENCE, |report| paths_up(report) == 1);
            echo(scene.a(), scene.b(), HUB_IP);
            let (asking, refusing) = (peer(&asking), peer(&refusing));
            assert_eq!(
                (asking.steering.received.as_str(), asking.steering.sent.as_str()),
                ("per-tunnel", "core-id")
            );
            assert_eq!(
                (refusing.steering.received.as_str(), refusing.steering.sent.as_str()),
                ("core-id", "per-tunnel")
            );
        }
    });
}

/// Row T6: one core for the whole tunnel, in both directions: told at establishment by the hub, and at the branch configured.
/// Many flows, one core; the core is taken away while data flows: the other side is told, nothing is lost.
#[test]
fn t6_one_core_for_the_whole_tunnel_told_configured_and_taken_away() {
    let _alone = alone();
    isolated(|| {
        let scene = Scene::new(&[link(100.0, 2.0), link(60.0, 4.0)]);
        let (a, b) = (scene.a(), scene.b());
        let (branch, hub) = scene.pair();
        // The hub tells core 1; the branch tells core 0, but the hub's operator has set that it is core 1.
        let hub = hub
            .node_line("cores = 2")
            .section("steering = \"per-tunnel\"\ntunnel-core = 1\npeer-tunnel-core = 1\n");
        let branch = branch.node_line("cores = 2").section("steering = \"per-tunnel\"\ntunnel-core = 0\n");
        let (branch, hub) = scene.join(&branch, &hub, 2);
        for gateway in [&branch, &hub] {
            let peer = peer(gateway);
            assert_eq!((peer.steering.sent.as_str(), peer.steering.remote_core), ("per-tunnel", Some(1)));
            let (_, shown) = gateway.command(&["status"]);
            assert!(shown.contains("sends per-tunnel 1, receives per-tunnel"), "{shown}");
        }
        let before = [delivered(&branch), delivered(&hub)];
        let (there, back) =
            (tcp_start(a, b, HUB_IP, 5203, 12, 2.0), tcp_start(b, a, BRANCH_IP, 5204, 12, 2.0));
        tcp_finish(there);
        tcp_finish(back);
        for (gateway, before) in [&branch, &hub].into_iter().zip(&before) {
            let cores = since(gateway, before);
            assert!(cores[0] < 20 && cores[1] > 1_000, "one core for the tunnel: {cores:?}");
            nothing_refused(gateway);
        }
        let options =
            udp::Options { flows: 40, payload_bytes: 300, ..udp::Options::new(4.0, Span::seconds(4.0)) };
        let stop = testbed::stop::Stop::new();
        let transfer = udp::start(a, b, socket(HUB_IP, 5300), options, &stop).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(1_500));
        assert_eq!(hub.command(&["core", "drain", "1"]).0, 0);
        wait_for("the branch is told another core", PATIENCE, || {
            peer(&branch).steering.remote_core == Some(0)
        });
        std::thread::sleep(std::time::Duration::from_millis(500));
        let before = delivered_now(&hub);
        let report = transfer.finish(|_| ()).unwrap();
        assert_eq!(
            (report.sent - report.received, report.corrupt, report.duplicates),
            (0, 0, 0),
            "{report:?}"
        );
        let cores = since(&hub, &before);
        assert!(cores[0] > 500 && cores[1] < 20, "all of it moved: {cores:?}");
        nothing_refused(&hub);
    });
}

/// As [`delivered`], while traffic goes on.
fn delivered_now(gateway: &Gateway) -> Vec<u64> {
    gateway.status().unwrap().status.cores.iter().map(|core| core.tun_tx_packets).collect()
}
