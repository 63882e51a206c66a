//! A running gateway gets another configuration, and many peers.

use std::fmt::Write as _;
use std::time::Duration;

use testbed::topology::Site;

use crate::machine::isolated;
use crate::scene::*;

/// Row T1: reload while TCP runs: peers come and go, allowed-ips and WANs change, nonsense is refused with file, line and
/// key; the stream does not notice.
#[test]
fn t1_reload_drops_no_flow() {
    isolated(|| {
        let scene = Scene::new(&[link(40.0, 2.0), link(30.0, 4.0)]);
        let (a, b) = (scene.a(), scene.b());
        let (branch, hub) = scene.pair();
        let (branch_text, hub_text) = (branch.text(&scene.directory), hub.text(&scene.directory));
        let branch_nets = branch.own_nets();
        let other = Config::new("other", "10.77.0.9");
        let (branch, hub) = scene.join(&branch, &hub, 2);
        let reload = |gateway: &Gateway, text: &str| {
            std::fs::write(&gateway.config, text).unwrap();
            gateway.command(&["reload"])
        };
        let before = (peer(&branch).handshakes, peer(&hub).handshakes);
        let flow = tcp_start(a, b, HUB_IP, 5203, 1, 7.0);
        let pause = || std::thread::sleep(Duration::from_millis(400));
        pause();
        // Another peer in front of the present one.
        let (head, tail) = hub_text.split_at(hub_text.find("[[peer]]").unwrap());
        let nobody = Config::new("x", "10.0.0.1").peer(&other, &[], &other.own_nets(), "");
        let nobody = nobody.text(&scene.directory);
        let section = &nobody[nobody.find("[[peer]]").unwrap()..];
        let (code, said) = reload(&hub, &format!("{head}{section}{tail}"));
        assert!(code == 0 && said.contains("peer other: added"), "{said}");
        assert_eq!(hub.status().unwrap().status.peers.len(), 2);
        pause();
        let wider = hub_text.replace(&branch_nets, &format!("{branch_nets}, \"10.50.0.0/16\""));
        let (code, said) = reload(&hub, &wider);
        assert!(code == 0 && said.contains("peer other: removed") && said.contains("allowed-ips"), "{said}");
        assert_eq!(hub.status().unwrap().status.peers.len(), 1);
        pause();
        assert_eq!(reload(&hub, &hub_text).0, 0);
        // One WAN less and back again at the other side.
        let (code, said) = reload(&branch, &branch_text.replace("[[wan]]\ninterface = \"wan0\"\n", ""));
        assert!(code == 0 && said.contains("wan wan0: removed"), "{said}");
        wait_for("one path", PATIENCE, || paths_up(&branch.status().unwrap()) == 1);
        assert_eq!(reload(&branch, &branch_text).0, 0);
        wait_for("two paths", PATIENCE, || paths_up(&branch.status().unwrap()) == 2);
        // Nonsense changes nothing.
        scene.expect_error("reload refused");
        let (code, _) = reload(&hub, &hub_text.replace("allowed-ips", "allowed-ipz"));
        assert_eq!(code, 1);
        assert_eq!(peer(&hub).state, "up");
        tcp_finish(flow);
        assert_eq!((peer(&branch).handshakes, peer(&hub).handshakes), before, "a new session was made");
        // Rights that were taken away are gone at once.
        let narrow = hub_text.replace(&branch_nets, "\"10.77.0.77/32\"");
        assert_eq!(reload(&hub, &narrow).0, 0);
        let socket = a.run(|| std::net::UdpSocket::bind("10.77.0.1:0")).unwrap().unwrap();
        wait_for("the source is refused", PATIENCE, || {
            socket.send_to(b"hello", "10.77.0.2:9").unwrap();
            drops(&hub, &["source-not-allowed"]) > 0
        });
    });
}

/// "It must reach": an idle hub with 100 peers, one of them joined, needs less than 100 MB.
#[test]
fn t1_an_idle_hub_with_100_peers_needs_less_than_100_mb() {
    isolated(|| {
        let scene = Scene::new(&[link(100.0, 1.0)]);
        let (branch, hub) = scene.pair();
        let mut text = hub.text(&scene.directory);
        for number in 0..99u8 {
            let keys = Keys::new();
            let _ = write!(
                text,
                "[[peer]]\nname = \"peer{number}\"\npublic-key = \"{}\"\nallowed-ips = [\"10.78.{number}.0/24\"]\n",
                keys.public
            );
        }
        let mut hub = Gateway::start(scene.b(), &scene.directory, "hub", &text);
        let mut branch = scene.start(scene.a(), &branch);
        branch.wait("one path", PATIENCE, |report| paths_up(report) == 1);
        let report = hub.wait("one of 100 is up", PATIENCE, |report| {
            report.status.peers.iter().filter(|peer| peer.state == "up").count() == 1
        });
        assert_eq!(report.status.peers.len(), 100);
        echo(scene.a(), scene.b(), HUB_IP);
        let resident = resident_kb(&hub);
        assert!(resident < 100_000, "{resident} kB");
        assert!(scene.endpoint(Site::B, 0).ends_with(":4600"));
    });
}
