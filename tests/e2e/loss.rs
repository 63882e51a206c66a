//! Links that lose packets at random: TCP through the bond notices nothing.

use testbed::topology::LinkSpec;

use crate::machine::{alone, isolated};
use crate::scene::*;

/// Share of a line's rate that inner TCP payload can have: 1,392 bytes in a datagram of 1,538 bytes on the wire.
const PAYLOAD_SHARE: f64 = 1_392.0 / 1_538.0;

fn lossy(mbps: f64, delay_ms: f64) -> LinkSpec {
    LinkSpec::new(testbed::link::Shape::new(mbps, delay_ms).loss(0.01))
}

/// Row R3: one CUBIC stream over `links`, to the branch or from it, as share of the ideal. Its receiver got datagrams back from repair symbols.
fn stream(links: &[LinkSpec], mbps: f64, down: bool) -> f64 {
    let scene = Scene::new(links);
    let (a, b) = (scene.a(), scene.b());
    let (branch, hub) = scene.pair();
    let hub = scene.start(b, &hub);
    let mut branch = scene.start(a, &branch);
    branch.wait("all paths", PATIENCE, |report| paths_up(report) == links.len());
    let goodput_mbps =
        if down { tcp_seconds(b, a, BRANCH_IP, 1, 8.0) } else { tcp_seconds(a, b, HUB_IP, 1, 8.0) };
    let peer = peer(if down { &branch } else { &hub });
    eprintln!(
        "{} restored, {} repeats, {} given up",
        peer.traffic.restored, peer.recovered, peer.declared_lost
    );
    assert!(peer.traffic.restored > 100, "nothing came back from repair symbols");
    let ideal = mbps * PAYLOAD_SHARE;
    eprintln!("{} {goodput_mbps:.1} of {ideal:.1} Mbit/s", if down { "down" } else { "up" });
    goodput_mbps / ideal
}

/// Row R3: a link that loses 1 % is nearly as good as one that loses nothing; bare TCP gets a tenth of it.
#[test]
fn r3_one_lossy_link() {
    let _alone = alone();
    isolated(|| {
        let share = stream(&[lossy(50.0, 10.0)], 50.0, true);
        assert!(share > 0.7, "{share:.2}");
    });
}

/// Row R3: two such links.
#[test]
fn r3_two_lossy_links() {
    let _alone = alone();
    isolated(|| {
        let share = stream(&[lossy(30.0, 10.0), lossy(30.0, 15.0)], 60.0, false);
        assert!(share > 0.6, "{share:.2}");
    });
}
