//! Links that lose packets at random: TCP through the bond notices nothing.

use linux::testing::isolated;
use testbed::topology::LinkSpec;

use crate::scene::*;

/// Share of a line's rate that inner TCP payload can have: 1,392 bytes in a datagram of 1,538 bytes on the wire.
const PAYLOAD_SHARE: f64 = 1_392.0 / 1_538.0;

fn lossy(mbps: f64, delay_ms: f64) -> LinkSpec {
    LinkSpec::new(testbed::link::Shape::new(mbps, delay_ms).loss(0.01))
}

/// Row R3: one CUBIC stream each way over `links`, as shares of the ideal, and what came back from repair symbols.
fn streams(links: &[LinkSpec], mbps: f64) -> (f64, f64) {
    let scene = Scene::new(links);
    let (a, b) = (scene.a(), scene.b());
    let (branch, hub) = scene.pair();
    let hub = scene.start(b, &hub);
    let mut branch = scene.start(a, &branch);
    branch.wait("all paths", PATIENCE, |report| paths_up(report) == links.len());
    let up = tcp_seconds(a, b, HUB_IP, 1, 8.0);
    let down = tcp_seconds(b, a, BRANCH_IP, 1, 8.0);
    for end in [&hub, &branch] {
        let peer = peer(end);
        eprintln!(
            "{} restored, {} repeats, {} given up",
            peer.traffic.restored, peer.recovered, peer.declared_lost
        );
        assert!(peer.traffic.restored > 100, "nothing came back from repair symbols");
    }
    let ideal = mbps * PAYLOAD_SHARE;
    eprintln!("up {up:.1}, down {down:.1} of {ideal:.1} Mbit/s");
    (up / ideal, down / ideal)
}

/// Row R3: a link that loses 1 % is nearly as good as one that loses nothing; bare TCP gets a tenth of it.
#[test]
fn r3_one_lossy_link() {
    let _alone = alone();
    isolated(|| {
        let (up, down) = streams(&[lossy(50.0, 10.0)], 50.0);
        assert!(up.min(down) > 0.7, "{up:.2} up, {down:.2} down");
    });
}

/// Row R3: two such links.
#[test]
fn r3_two_lossy_links() {
    let _alone = alone();
    isolated(|| {
        let (up, down) = streams(&[lossy(30.0, 10.0), lossy(30.0, 15.0)], 60.0);
        assert!(up.min(down) > 0.6, "{up:.2} up, {down:.2} down");
    });
}
