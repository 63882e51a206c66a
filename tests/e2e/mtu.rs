//! Full packets over paths that are too small for them.

use std::net::UdpSocket;
use std::process::Command;
use std::time::Duration;

use testbed::topology::Node;
use testbed::traffic::{Span, udp};

use crate::machine::isolated;
use crate::scene::*;

/// Sends UDP payloads of exactly these sizes, which must not be fragmented, and gets each back.
fn ping_udp(from: &Node, to: &Node, address: &str, sizes: &[usize]) {
    let far = udp_socket(to, (address, 5300));
    far.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    // Linux sets the don't-fragment bit on what fits the route, here on all of it.
    let near = from.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
    near.connect((address, 5300)).unwrap();
    near.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    let mut buffer = vec![0; 2_000];
    for &size in sizes {
        let sent: Vec<u8> = (0..size).map(|at| (at * 7 + size) as u8).collect();
        // One of them may meet with bad luck; three do not.
        let back = (0..3).any(|_| {
            near.send(&sent).unwrap();
            let Ok((length, source)) = far.recv_from(&mut buffer) else { return false };
            assert!(buffer[..length] == sent, "{size} bytes arrived damaged");
            far.send_to(&buffer[..length], source).unwrap();
            near.recv(&mut buffer).is_ok_and(|length| buffer[..length] == sent)
        });
        assert!(back, "{size} bytes did not come back");
    }
}

/// Row T10: packets of 1,500 bytes over paths of 1,500, 1,400 and 1,280 bytes. A packet that is too large for one datagram
/// goes in several; each path's real limit is found, also where the interface does not know it; nothing asks the
/// applications to send less.
#[test]
fn t10_full_packets_cross_paths_of_every_size() {
    isolated(|| {
        // The third link says 1,500 and swallows what is larger than 1,380: a black hole as PPPoE and tunnels make them.
        let mut liar = link(20.0, 6.0);
        (liar.a_to_b.mtu, liar.b_to_a.mtu) = (1_380, 1_380);
        let scene = Scene::new(&[link(40.0, 2.0), link(30.0, 4.0).with_mtu(1_280), liar]);
        let (a, b) = (scene.a(), scene.b());
        let (branch, hub) = scene.pair();
        let (mut branch, mut hub) = scene.join(&branch, &hub, 3);
        for gateway in [&mut branch, &mut hub] {
            gateway.wait("the limits are found", PATIENCE, |report| {
                let paths = &report.status.peers[0].paths;
                let mtu = |remote: &str| {
                    let path =
                        paths.iter().find(|path| path.remote.starts_with(remote) && path.state == "up");
                    path.map_or(0, |path| i32::from(path.mtu) + 28)
                };
                let near = |found: i32, limit: i32| (limit - 16..=limit).contains(&found);
                near(mtu("198.18.0."), 1_500)
                    && near(mtu("198.18.1."), 1_280)
                    && near(mtu("198.18.2."), 1_380)
            });
        }
        ping_udp(a, b, HUB_IP, &[1, 1_200, 1_252, 1_253, 1_400, 1_471, 1_472]);
        ping_udp(b, a, BRANCH_IP, &[1_472, 1_300]);
        let mut ping = Command::new("ping");
        ping.args(["-M", "do", "-s", "1472", "-c", "3", "-i", "0.3", "-W", "10", HUB_IP]);
        let said = a.output(ping).unwrap();
        assert!(said.contains(" 0% packet loss"), "{said}");
        tcp_seconds(a, b, HUB_IP, 1, 3.0);
        let full = udp::Options { payload_bytes: 1_472, ..udp::Options::new(20.0, Span::seconds(3.0)) };
        let report = udp_seconds(b, a, BRANCH_IP, full);
        assert!(report.loss_percent < 10.0, "{report:?}");
        assert_eq!(settled(|| drops(&hub, &["piece-overlap", "frame-malformed", "ip-malformed"])), 0);
        wait_for("all three paths carried data", PATIENCE, || {
            peer(&branch).paths.iter().filter(|path| path.tx_bytes > 50_000).count() == 3
        });
    });
}

/// Row T10: only small paths. Every full packet has to be cut in two, and all of them arrive.
#[test]
fn t10_full_packets_over_small_paths_only() {
    isolated(|| {
        let scene = Scene::new(&[link(40.0, 2.0).with_mtu(1_280), link(40.0, 3.0).with_mtu(1_400)]);
        let (branch, hub) = scene.pair();
        let (_branch, hub) = scene.join(&branch, &hub, 2);
        ping_udp(scene.a(), scene.b(), HUB_IP, &[1_472, 1_300, 40]);
        assert!(tcp_seconds(scene.a(), scene.b(), HUB_IP, 1, 3.0) > 5.0);
        assert_eq!(settled(|| drops(&hub, &["piece-overlap", "frame-malformed", "ip-malformed"])), 0);
    });
}
