//! One flow, one core: whatever the paths, the policy and the number of cores at the other end.

use std::time::Duration;

use testbed::link::Shape;
use testbed::topology::LinkSpec;
use testbed::traffic::{Span, udp};

use crate::machine::{alone, isolated};
use crate::scene::*;

/// Cores of a gateway that wrote to TUN.
fn cores_used(gateway: &Gateway) -> usize {
    gateway.status().unwrap().status.cores.iter().filter(|core| core.tun_tx_packets > 50).count()
}

/// Rows T2, T4: datagrams of one flow travel over three unequal paths, one of which reorders; the receiver processes all
/// of them on one core and delivers them in order, once each.
#[test]
fn t2_t4_datagrams_of_one_flow_over_all_paths_reach_one_core() {
    let _alone = alone();
    isolated(|| {
        let mut wild = Shape::new(15.0, 8.0).jitter_ms(3.0);
        wild.reorder = true;
        let scene = Scene::new(&[link(30.0, 2.0), link(20.0, 5.0), LinkSpec::new(wild)]);
        let (a, b) = (scene.a(), scene.b());
        let (branch, hub) = scene.pair();
        let (branch, hub) = scene.join(&branch, &hub, 3);
        // More than any single link carries.
        let options = udp::Options { flows: 1, ..udp::Options::new(36.0, Span::seconds(5.0)) };
        let before: Vec<u64> =
            hub.status().unwrap().status.cores.iter().map(|core| core.tun_tx_packets).collect();
        let report = udp_seconds(a, b, HUB_IP, options);
        let wrote = settled(|| -> Vec<u64> {
            let cores = hub.status().unwrap().status.cores;
            cores.iter().zip(&before).map(|(core, old)| core.tun_tx_packets - old).collect()
        });
        let status = hub.status().unwrap().status;
        let most = wrote.iter().copied().max().unwrap();
        assert!(most >= report.received, "{report:?} {wrote:?}");
        assert!(wrote.iter().sum::<u64>() - most < 20, "one flow on several cores: {wrote:?}");
        assert_eq!(status.flows_split_over_cores, 0);
        wait_for("all three paths carried data", PATIENCE, || {
            peer(&branch).paths.iter().filter(|path| path.tx_bytes > 300_000).count() == 3
        });
        assert!(report.loss_percent < 20.0 && report.reordered * 20 < report.received, "{report:?}");
        if status.steering == "bpf" {
            for gateway in [&branch, &hub] {
                let status = gateway.status().unwrap().status;
                let share = status.cross_core_packets as f64 / status.packets_read.max(1) as f64;
                assert!(
                    share < 0.01,
                    "{} of {} packets changed core",
                    status.cross_core_packets,
                    status.packets_read
                );
            }
        }
    });
}

/// Rows T3, T4, T13: one core at the branch, two at the hub, and the other way round; every policy by which a sender chooses
/// the receiving core. Processor information is exchanged, many flows use all cores, no flow is split, data goes
/// both ways.
#[test]
fn t3_t4_t13_every_policy_between_different_numbers_of_cores() {
    let _alone = alone();
    isolated(|| {
        let scene = Scene::new(&[link(150.0, 1.0), link(150.0, 2.0)]);
        let (a, b) = (scene.a(), scene.b());
        let cases = [
            ("hash", 1, 2),
            ("round-robin", 1, 2),
            ("random", 2, 1),
            ("least-loaded", 2, 2),
            ("round-robin", 2, 2),
        ];
        for (policy, branch_cores, hub_cores) in cases {
            let (branch, hub) = scene.pair();
            let policy_line = format!("policy = \"{policy}\"\n");
            let branch = branch.node_line(&format!("cores = {branch_cores}")).section(&policy_line);
            let hub = hub.node_line(&format!("cores = {hub_cores}")).section(&policy_line);
            let (branch, hub) = scene.join(&branch, &hub, 2);
            assert_eq!(
                (peer(&branch).remote_cores, peer(&hub).remote_cores),
                (hub_cores, branch_cores),
                "{policy}"
            );
            let there = tcp_start(a, b, HUB_IP, 5203, 12, 2.0);
            let back = tcp_start(b, a, BRANCH_IP, 5204, 12, 2.0);
            tcp_finish(there);
            tcp_finish(back);
            for (gateway, cores) in [(&branch, branch_cores), (&hub, hub_cores)] {
                let status = gateway.status().unwrap().status;
                assert_eq!(status.cores.len(), usize::from(cores));
                assert_eq!(cores_used(gateway), usize::from(cores), "{policy}: {status:?}");
                assert_eq!(status.flows_split_over_cores, 0, "{policy}: {status:?}");
                let wrong = || drops(gateway, &["core-out-of-range", "auth-failed", "frame-malformed"]);
                assert_eq!(settled(wrong), 0, "{policy}");
            }
        }
    });
}

/// Row T3: the hub starts anew with fewer cores, then with more, while the branch goes on: each time the branch is told.
#[test]
fn t3_a_peer_that_comes_back_with_other_cores_tells_so() {
    isolated(|| {
        let scene = Scene::new(&[link(100.0, 1.0)]);
        let (a, b) = (scene.a(), scene.b());
        let (branch, hub) = scene.pair();
        let text = hub.text(&scene.directory);
        let with_cores = |cores: u8| {
            let text = text.replace("listen = 4600", &format!("listen = 4600\ncores = {cores}"));
            Gateway::start(b, &scene.directory, "hub", &text)
        };
        let mut at_hub = with_cores(2);
        let mut at_branch = scene.start(a, &branch);
        for cores in [2, 1, 2] {
            at_branch.wait("the hub's cores", PATIENCE, |report| {
                paths_up(report) == 1 && report.status.peers[0].remote_cores == cores
            });
            // Chance may give all flows of one second to one core.
            wait_for("every core of the hub works", PATIENCE, || {
                tcp_seconds(a, b, HUB_IP, 8, 1.0);
                cores_used(&at_hub) == usize::from(cores)
            });
            drop(at_hub);
            at_hub = with_cores(3 - cores);
        }
    });
}

/// Row T2: what makes a flow is selectable. Twelve TCP connections of the same two hosts use both cores as 5-tuples, and
/// one core only as 2-tuples.
#[test]
fn t2_what_makes_a_flow_is_selectable() {
    isolated(|| {
        let scene = Scene::new(&[link(100.0, 1.0)]);
        for (flow, cores) in [("5-tuple", 2), ("2-tuple", 1)] {
            let (branch, hub) = scene.pair();
            let line = format!("flow = \"{flow}\"\n");
            let (branch, hub) = (branch.section(&line), hub.section(&line).node_line("cores = 2"));
            let (_branch, hub) = scene.join(&branch, &hub, 1);
            tcp_seconds(scene.a(), scene.b(), HUB_IP, 12, 2.0);
            assert_eq!(cores_used(&hub), cores, "{flow}: {:?}", hub.status());
            assert_eq!(hub.status().unwrap().status.flows_split_over_cores, 0);
        }
    });
}

/// Row T13: the side that listens starts the flows, and both directions are full at once: TCP and UDP, IPv4 and IPv6.
#[test]
fn t13_both_directions_at_once_and_started_by_the_hub() {
    isolated(|| {
        let scene = Scene::new(&[link(50.0, 3.0), link(25.0, 6.0)]);
        let (a, b) = (scene.a(), scene.b());
        let (branch, hub) = scene.pair();
        let (branch, hub) = scene.join(&branch, &hub, 2);
        echo(b, a, BRANCH_IP);
        let from_hub = tcp_start(b, a, "fd77::1", 5203, 1, 5.0);
        let from_branch = tcp_start(a, b, HUB_IP, 5204, 1, 5.0);
        std::thread::sleep(Duration::from_millis(200));
        udp_seconds(b, a, BRANCH_IP, udp::Options::new(5.0, Span::seconds(3.0)));
        tcp_finish(from_hub);
        tcp_finish(from_branch);
        for gateway in [&branch, &hub] {
            wait_for("both paths carried data", PATIENCE, || {
                peer(gateway).paths.iter().filter(|path| path.tx_bytes > 1_000_000).count() == 2
            });
            assert_eq!(gateway.status().unwrap().status.flows_split_over_cores, 0);
        }
    });
}
