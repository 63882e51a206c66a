//! The sentence of the first milestone: a large file survives everything that happens to links.

use linux::ethtool::{Offloads, set_offloads};
use linux::netlink::RouteSpec;
use testbed::topology::{Node, Site};

use crate::machine::{busy, isolated};
use crate::scene::*;
use crate::web::*;

/// Pulls `wan1` out of a node and plugs a new interface of that name in, with the same address and the same router.
fn unplug(place: &Node) {
    let index = place.interface("wan1").unwrap();
    place.netlink().unwrap().delete_link(index).unwrap();
}

fn plug_in(scene: &Scene, place: &Node, site: Site) {
    let router = &scene.testbed.routers()[0];
    let other = std::os::fd::AsFd::as_fd(place.namespace());
    let netlink = router.netlink().unwrap();
    netlink.add_veth("down", "wan1", Some(other)).unwrap();
    for (node, interface) in [(router, "down"), (place, "wan1")] {
        node.run(|| set_offloads(interface, &Offloads::OFF)).unwrap().unwrap();
    }
    let down = router.interface("down").unwrap();
    let gateway = "198.18.101.1".parse().unwrap();
    netlink.add_address(down, net(gateway, 24)).unwrap();
    netlink.set_up(down, true).unwrap();
    let index = place.interface("wan1").unwrap();
    let netlink = place.netlink().unwrap();
    let address = scene.testbed.addresses(site, 1).ipv4.unwrap();
    netlink.add_address(index, net(address.into(), 24)).unwrap();
    netlink.set_up(index, true).unwrap();
    let default = "0.0.0.0/0".parse().unwrap();
    let route =
        RouteSpec { gateway: Some(gateway), interface: Some(index), metric: 101, ..RouteSpec::new(default) };
    netlink.add_route(&route).unwrap();
}

/// Rows T1, T3, T13: `curl` fetches 200 MB through two `anabranch up` processes. Meanwhile the keys change every five
/// seconds, a link is cut, an interface goes down and up again and another one is deleted and made anew. The file is
/// whole, its hash is right.
#[test]
fn t1_t13_a_200_mb_file_survives_rekeys_a_cut_link_and_restarts_of_interfaces() {
    let _busy = busy();
    isolated(|| {
        let scene =
            Scene::new(&[link(60.0, 5.0), link(40.0, 12.0).behind_router("192.168.1.0/24".parse().unwrap())]);
        let (a, b) = (scene.a(), scene.b());
        // The branch is at B this time: the interfaces that suffer are those of the side that dials.
        let mut hub = Config::new("hub", HUB_IP).node_line("listen = 4600").wan("wan0").wan("wan1");
        let mut branch =
            Config::new("branch", BRANCH_IP).node_line("rekey-after-seconds = 5").wan("wan0").wan("wan1");
        let endpoints = [scene.endpoint(Site::A, 0), scene.endpoint(Site::A, 1)];
        branch = branch.peer(&hub, &endpoints, &hub.own_nets(), "");
        hub = hub.peer(&branch, &[], &branch.own_nets(), "");
        let hub = scene.start(a, &hub);
        let mut branch = scene.start(b, &branch);
        branch.wait("two paths", PATIENCE, |report| paths_up(report) >= 2);

        let server = WebServer::start(a, HUB_IP, 200_000_000);
        let download = server.fetch(b);
        download.wait_megabytes(10);
        scene.testbed.black_hole(0, true).unwrap();
        branch.wait("the cut is noticed", PATIENCE, |report| paths_up(report) == 1);
        download.wait_megabytes(20);
        scene.testbed.black_hole(0, false).unwrap();
        branch.wait("the link is back", PATIENCE, |report| paths_up(report) >= 2);

        download.wait_megabytes(40);
        let netlink = b.netlink().unwrap();
        let wan0 = b.interface("wan0").unwrap();
        netlink.set_up(wan0, false).unwrap();
        branch.wait("wan0 is down", PATIENCE, |report| paths_up(report) == 1);
        download.wait_megabytes(50);
        netlink.set_up(wan0, true).unwrap();
        branch.wait("wan0 is back", PATIENCE, |report| paths_up(report) >= 2);

        download.wait_megabytes(70);
        unplug(b);
        branch.wait("wan1 is gone", PATIENCE, |report| {
            report.wans[1].state == "missing" && paths_up(report) == 1
        });
        download.wait_megabytes(80);
        plug_in(&scene, b, Site::B);
        branch.wait("wan1 is new", PATIENCE, |report| paths_up(report) >= 2);

        // An outage of everything: TCP has to wait, the tunnel comes back by itself.
        download.wait_megabytes(100);
        scene.testbed.black_hole(0, true).unwrap();
        scene.testbed.black_hole(1, true).unwrap();
        std::thread::sleep(std::time::Duration::from_secs(2));
        scene.testbed.black_hole(0, false).unwrap();
        scene.testbed.black_hole(1, false).unwrap();
        download.finish();

        let (near, far) = (peer(&branch), peer(&hub));
        assert!(near.handshakes >= 4, "no rekey: {near:?}");
        assert!(near.session_age_seconds < 15.0 && far.remote_cores > 0, "{near:?}");
        for gateway in [&branch, &hub] {
            assert_eq!(gateway.status().unwrap().status.flows_split_over_cores, 0);
            assert_eq!(settled(|| drops(gateway, &["auth-failed", "frame-malformed", "ip-malformed"])), 0);
        }
    });
}
