//! The ways in which a side is told the core that processes a packet, as two gateways agree on them.

use std::net::UdpSocket;
use std::time::Duration;

use testbed::traffic::{Span, udp};

use crate::capture::{Capture, payload};
use crate::machine::{busy, isolated};
use crate::scene::*;

/// Packets that each core of a gateway gave to the host so far.
fn delivered(gateway: &Gateway) -> Vec<u64> {
    settled(|| gateway.status().unwrap().status.cores.iter().map(|core| core.tun_tx_packets).collect())
}

/// Packets since then, by core.
fn since(gateway: &Gateway, before: &[u64]) -> Vec<u64> {
    delivered(gateway).iter().zip(before).map(|(now, before)| now - before).collect()
}

/// As [`since`], while traffic goes on.
fn since_now(gateway: &Gateway, before: &[u64]) -> Vec<u64> {
    delivered_now(gateway).iter().zip(before).map(|(now, before)| now - before).collect()
}

/// Reasons that the peer sent something for the wrong core, lane, or with wrong contents.
const REFUSED: [&str; 4] = ["core-out-of-range", "auth-failed", "frame-malformed", "frame-unknown"];

/// Nothing that the peer sent was refused for its core, its lane or its contents.
#[track_caller]
fn nothing_refused(gateway: &Gateway) {
    assert_eq!(settled(|| drops(gateway, &REFUSED)), 0, "{:?}", gateway.status());
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
/// Many flows, one core; the core is taken away while data flows: the other side is told, and the flows go on.
#[test]
fn t6_one_core_for_the_whole_tunnel_told_configured_and_taken_away() {
    let _busy = busy();
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
            (tcp_start(a, b, HUB_IP, 5203, 12, 1.0), tcp_start(b, a, BRANCH_IP, 5204, 12, 1.0));
        tcp_finish(there);
        tcp_finish(back);
        for (gateway, before) in [&branch, &hub].into_iter().zip(&before) {
            let cores = since(gateway, before);
            assert!(cores[0] < 20 && cores[1] > 500, "one core for the tunnel: {cores:?}");
            nothing_refused(gateway);
        }
        let options =
            udp::Options { flows: 40, payload_bytes: 300, ..udp::Options::new(4.0, Span::seconds(4.0)) };
        let stop = testbed::stop::Stop::new();
        let transfer = udp::start(a, b, socket(HUB_IP, 5300), options, &stop).unwrap();
        std::thread::sleep(Duration::from_millis(1_500));
        assert_eq!(hub.command(&["core", "drain", "1"]).0, 0);
        wait_for("the branch is told another core", PATIENCE, || {
            peer(&branch).steering.remote_core == Some(0)
        });
        std::thread::sleep(Duration::from_millis(500));
        let before = delivered_now(&hub);
        let report = transfer.finish(|_| ()).unwrap();
        assert_eq!((report.corrupt, report.duplicates), (0, 0), "{report:?}");
        assert!(report.loss_percent_from_start < 10.0, "{report:?}");
        let cores = since(&hub, &before);
        assert!(cores[0] > 500 && cores[1] < 20, "all of it moved: {cores:?}");
        nothing_refused(&hub);
    });
}

/// As [`delivered`], while traffic goes on.
fn delivered_now(gateway: &Gateway) -> Vec<u64> {
    gateway.status().unwrap().status.cores.iter().map(|core| core.tun_tx_packets).collect()
}

/// The datagrams with inner packets of this size or more that a capture saw, without Ethernet, IP and UDP.
fn large(frames: &[Vec<u8>]) -> Vec<&[u8]> {
    frames
        .iter()
        .map(|frame| payload(frame))
        .filter(|bytes| bytes.len() > 700 && bytes[0] & 15 >= 4)
        .collect()
}

/// Datagrams that arrive at the hub over the first link from now on, when the search for the paths' MTU with its large probes is over.
fn capture(scene: &Scene, limit: usize) -> Capture {
    std::thread::sleep(Duration::from_secs(1));
    Capture::start(scene.b(), "wan0", limit)
}

/// Joins two gateways with two cores each, both of which want `lines`.
fn join(scene: &Scene, lines: &str) -> (Gateway, Gateway) {
    let (branch, hub) = scene.pair();
    let with = |config: Config| config.node_line("cores = 2").section(lines);
    scene.join(&with(branch), &with(hub), scene.links())
}

/// Many flows in both directions at once, whole and unchanged: both cores of both sides work, no flow is split, nothing is
/// refused.
#[track_caller]
fn both_cores_of_both_sides(scene: &Scene, branch: &Gateway, hub: &Gateway) {
    let before = [delivered(branch), delivered(hub)];
    let (a, b) = (scene.a(), scene.b());
    let (there, back) = (tcp_start(a, b, HUB_IP, 5203, 12, 1.0), tcp_start(b, a, BRANCH_IP, 5204, 12, 1.0));
    tcp_finish(there);
    tcp_finish(back);
    for (gateway, before) in [branch, hub].into_iter().zip(&before) {
        let cores = since(gateway, before);
        assert!(cores.iter().all(|packets| *packets > 100), "every core has flows: {cores:?}");
        nothing_refused(gateway);
    }
}

/// One flow over all paths, more than one of them carries: one core of the hub processes it, in order.
#[track_caller]
fn one_flow_one_core(scene: &Scene, hub: &Gateway) {
    let before = delivered(hub);
    let options = udp::Options { flows: 1, ..udp::Options::new(36.0, Span::seconds(3.0)) };
    let report = udp_seconds(scene.a(), scene.b(), HUB_IP, options);
    let cores = since(hub, &before);
    let most = cores.iter().copied().max().unwrap();
    assert!(
        most >= report.received && cores.iter().sum::<u64>() - most < 20,
        "one flow on several cores: {cores:?}"
    );
    assert!(report.loss_percent < 20.0 && report.reordered * 20 < report.received, "{report:?}");
    nothing_refused(hub);
}

/// Forty flows while the hub's operator takes a core away: they go on, none is split, all of it moves.
#[track_caller]
fn a_core_is_taken_away(scene: &Scene, hub: &Gateway) {
    let options =
        udp::Options { flows: 40, payload_bytes: 300, ..udp::Options::new(4.0, Span::seconds(2.5)) };
    let stop = testbed::stop::Stop::new();
    let transfer = udp::start(scene.a(), scene.b(), socket(HUB_IP, 5300), options, &stop).unwrap();
    std::thread::sleep(Duration::from_millis(800));
    assert_eq!(hub.command(&["core", "drain", "1"]).0, 0);
    std::thread::sleep(Duration::from_millis(800));
    let before = delivered_now(hub);
    let report = transfer.finish(|_| ()).unwrap();
    assert_eq!((report.corrupt, report.duplicates), (0, 0), "{report:?}");
    // The simulator shows that none is lost; a machine that is busy with something else may let a path fall silent meanwhile.
    assert!(report.loss_percent_from_start < 10.0, "{report:?}");
    let cores = since(hub, &before);
    assert!(cores[0] > 300 && cores[1] < 20, "all of it moved: {cores:?}");
    assert_eq!(hub.command(&["core", "enable", "1"]).0, 0);
    nothing_refused(hub);
}

/// Small and fragmented datagrams of each of several flows take one core.
#[track_caller]
fn fragments_follow_their_flow(scene: &Scene, hub: &Gateway) {
    let server = udp_socket(scene.b(), format!("{HUB_IP}:5500"));
    server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut buffer = vec![0; 65_536];
    for _ in 0..8 {
        let client = scene.a().run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
        client.connect(format!("{HUB_IP}:5500")).unwrap();
        for bytes in [100, 4_000, 100, 4_000] {
            client.send(&vec![7; bytes]).unwrap();
            assert_eq!(server.recv(&mut buffer).unwrap(), bytes);
        }
    }
    nothing_refused(hub);
}

/// Connections of TCP to the hub, one after the other from the same port to the same port; each sends a little and is reset, so that
/// the next one may have the port.
fn connections_on_one_port(scene: &Scene, count: usize) {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
    use std::io::{Read, Write};
    let server = tcp_listener(scene.b(), format!("{HUB_IP}:5600"));
    let serving = std::thread::spawn(move || {
        for _ in 0..count {
            let (mut connection, _) = server.accept().unwrap();
            let mut all = [0; 2_000];
            connection.read_exact(&mut all).unwrap();
            connection.write_all(b"x").unwrap();
            // Until it is reset.
            let _ = connection.read(&mut all);
        }
    });
    scene
        .a()
        .run(|| {
            for _ in 0..count {
                let (family, kind) = (AddressFamily::INET, SocketType::STREAM);
                let fd = rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, None).unwrap();
                sockopt::set_socket_reuseaddr(&fd, true).unwrap();
                sockopt::set_socket_linger(&fd, Some(Duration::ZERO)).unwrap();
                rustix::net::bind(&fd, &socket(BRANCH_IP, 4_444)).unwrap();
                // A program that another test just starts has the last connection until it is executed.
                let connects = || rustix::net::connect(&fd, &socket(HUB_IP, 5_600)).is_ok();
                wait_for("the port once more", PATIENCE, connects);
                let mut connection = std::net::TcpStream::from(fd);
                connection.set_nodelay(true).unwrap();
                for _ in 0..20 {
                    connection.write_all(&[7; 100]).unwrap();
                    std::thread::sleep(Duration::from_millis(1));
                }
                connection.read_exact(&mut [0]).unwrap();
            }
        })
        .unwrap();
    serving.join().unwrap();
}

/// Row T2: a connection on the ports of an older one is a flow of its own for policies that remember the cores of flows, whichever
/// side chooses: connections from one port to one port take turns of the hub's cores. By hash all are of one core.
#[test]
fn t2_a_new_connection_on_old_ports_is_a_flow_of_its_own() {
    isolated(|| {
        let scene = Scene::new(&[link(100.0, 1.0)]);
        for (mode, policy, turns) in [
            ("core-id", "hash", false),
            ("core-id", "round-robin", true),
            ("receiver-decides", "round-robin", true),
            ("receiver-assigned", "round-robin", true),
        ] {
            let (branch, hub) = join(&scene, &format!("steering = \"{mode}\"\npolicy = \"{policy}\"\n"));
            let before = delivered(&hub);
            connections_on_one_port(&scene, 8);
            let mut cores = since(&hub, &before);
            cores.sort_unstable();
            let wanted = if turns { cores[0] > 40 } else { cores[0] < 20 && cores[1] > 80 };
            assert!(wanted, "{mode}, {policy}: {cores:?}");
            // The count of flows that are split knows them by their ports alone.
            assert_eq!(settled(|| drops(&hub, &REFUSED)), 0, "{:?}", hub.status());
            drop((branch, hub));
        }
    });
}

fn two_links() -> [testbed::topology::LinkSpec; 2] {
    [link(30.0, 2.0), link(20.0, 5.0)]
}

/// Row T8: no datagram with packets names a core; the receiver decrypts, finds the flow and chooses by table, in turn, at
/// random or by load.
#[test]
fn t8_the_receiver_decides_by_every_policy() {
    let _busy = busy();
    isolated(|| {
        let scene = Scene::new(&two_links());
        for policy in ["hash", "round-robin", "random", "least-loaded"] {
            let lines = format!("steering = \"receiver-decides\"\npolicy = \"{policy}\"\n");
            let (branch, hub) = join(&scene, &lines);
            let capture = capture(&scene, 20_000);
            both_cores_of_both_sides(&scene, &branch, &hub);
            one_flow_one_core(&scene, &hub);
            fragments_follow_their_flow(&scene, &hub);
            if policy == "hash" || policy == "least-loaded" {
                a_core_is_taken_away(&scene, &hub);
            }
            drop((branch, hub));
            let frames = capture.finish();
            let frames = large(&frames);
            let told = frames.iter().filter(|bytes| bytes[1] != 255).count();
            assert!(
                frames.len() > 500 && told * 100 < frames.len(),
                "{policy}: {told} of {} name a core",
                frames.len()
            );
        }
    });
}

/// Row T5: a flow's first datagrams name no core; the receiver gives it one and tells, and later datagrams name that. A core that
/// is taken away is replaced while data flows.
#[test]
fn t5_first_datagrams_name_none_later_ones_the_core_that_was_assigned() {
    let _busy = busy();
    isolated(|| {
        let scene = Scene::new(&two_links());
        for policy in ["hash", "round-robin"] {
            let lines = format!("steering = \"receiver-assigned\"\npolicy = \"{policy}\"\n");
            let (branch, hub) = join(&scene, &lines);
            let capture = capture(&scene, 40_000);
            one_flow_one_core(&scene, &hub);
            both_cores_of_both_sides(&scene, &branch, &hub);
            fragments_follow_their_flow(&scene, &hub);
            a_core_is_taken_away(&scene, &hub);
            drop((branch, hub));
            let frames = capture.finish();
            let frames = large(&frames);
            let first: Vec<u8> = frames.iter().take(3).map(|bytes| bytes[1]).collect();
            let named = frames.iter().skip(200).take(1_000).filter(|bytes| bytes[1] != 255).count();
            assert!(first.iter().all(|core| *core == 255), "{policy}: the first ones name {first:?}");
            assert!(named > 950, "{policy}: only {named} of 1000 later ones name a core");
        }
    });
}

/// Row T5, the variant: the receiver says the core before the first datagram of a flow, and that names it.
#[test]
fn t5_the_core_is_asked_for_before_the_first_datagram() {
    let _busy = busy();
    isolated(|| {
        let scene = Scene::new(&two_links());
        for policy in ["hash", "round-robin"] {
            let lines =
                format!("steering = \"receiver-assigned\"\npolicy = \"{policy}\"\nask-core-first = true\n");
            let (branch, hub) = join(&scene, &lines);
            let capture = capture(&scene, 20_000);
            one_flow_one_core(&scene, &hub);
            both_cores_of_both_sides(&scene, &branch, &hub);
            drop((branch, hub));
            let frames = capture.finish();
            let frames = large(&frames);
            let unnamed = frames.iter().filter(|bytes| bytes[1] == 255).count();
            assert!(frames.len() > 500 && unnamed == 0, "{policy}: {unnamed} of {} name none", frames.len());
        }
    });
}

/// Everything that a way to name cores is tried with, and what of it arrived over the first link.
#[track_caller]
fn every_scene(scene: &Scene, lines: &str) -> Vec<Vec<u8>> {
    let (branch, hub) = join(scene, lines);
    let capture = capture(scene, 20_000);
    both_cores_of_both_sides(scene, &branch, &hub);
    one_flow_one_core(scene, &hub);
    fragments_follow_their_flow(scene, &hub);
    a_core_is_taken_away(scene, &hub);
    drop((branch, hub));
    capture.finish()
}

/// Row T7: the header names no core; the core that the sender chose stands in the sealed part and is read after decryption.
#[test]
fn t7_the_core_stands_in_the_sealed_part() {
    let _busy = busy();
    isolated(|| {
        let scene = Scene::new(&two_links());
        for policy in ["hash", "round-robin"] {
            let frames =
                every_scene(&scene, &format!("steering = \"sealed-core-id\"\npolicy = \"{policy}\"\n"));
            let frames = large(&frames);
            let told = frames.iter().filter(|bytes| bytes[..2] != [0x14, 255]).count();
            assert!(frames.len() > 500 && told * 100 < frames.len(), "{policy}: {told} of {}", frames.len());
        }
    });
}

/// Row T7, the variant: the core that the sender chose stands in the header, sealed there with the counter by one block; the first core
/// that reads it opens that, the core that it names the datagram.
#[test]
fn t7_the_core_stands_sealed_in_the_header() {
    let _busy = busy();
    isolated(|| {
        let scene = Scene::new(&two_links());
        let frames = every_scene(&scene, "steering = \"sealed-header\"\npolicy = \"round-robin\"\n");
        let frames = large(&frames);
        let sealed: Vec<&[u8]> = frames.iter().copied().filter(|bytes| bytes[0] == 0x17).collect();
        assert!(
            sealed.len() > 500 && sealed.len() * 100 > frames.len() * 98,
            "{} of {}",
            sealed.len(),
            frames.len()
        );
        // Two cores, and every value of the byte; counters, and no sequence.
        let of_one: Vec<&&[u8]> = sealed.iter().filter(|bytes| bytes[2] == sealed[0][2]).collect();
        let cores: std::collections::BTreeSet<u8> = of_one.iter().map(|bytes| bytes[1]).collect();
        let counter = |bytes: &[u8]| u32::from_be_bytes(bytes[12..16].try_into().unwrap());
        let next =
            of_one.windows(2).filter(|two| counter(two[1]).wrapping_sub(counter(two[0])) < 1_000).count();
        assert!(cores.len() > 60 && next < 5, "{} values, {next} in sequence", cores.len());
    });
}

/// Row T9: a clear session-ID of 64 bits for each flow stands behind the header; the receiver keeps which core it stands for.
/// Flows have one each, all different, and what is behind stays sealed.
#[test]
fn t9_a_clear_session_id_for_each_flow() {
    let _busy = busy();
    isolated(|| {
        let scene = Scene::new(&two_links());
        for policy in ["hash", "round-robin"] {
            let (branch, hub) = join(&scene, &format!("steering = \"session-id\"\npolicy = \"{policy}\"\n"));
            let capture = capture(&scene, 2_000);
            let options = udp::Options {
                flows: 32,
                payload_bytes: 1_000,
                ..udp::Options::new(8.0, Span::seconds(1.5))
            };
            udp_seconds(scene.a(), scene.b(), HUB_IP, options);
            let frames = capture.finish();
            let mut ids = std::collections::BTreeMap::<u64, usize>::new();
            for bytes in large(&frames).into_iter().filter(|bytes| bytes[1] == 255) {
                // Kind 6, no core; 12 clear bytes: the frame with the id.
                assert_eq!((&bytes[..2], &bytes[16..22]), (&[0x16, 255][..], &[0, 12, 134, 0, 0, 8][..]));
                *ids.entry(u64::from_be_bytes(bytes[22..30].try_into().unwrap())).or_default() += 1;
            }
            assert_eq!(ids.len(), 32, "one for each flow: {ids:?}");
            assert!(ids.values().all(|datagrams| *datagrams > 3), "{ids:?}");
            both_cores_of_both_sides(&scene, &branch, &hub);
            one_flow_one_core(&scene, &hub);
            fragments_follow_their_flow(&scene, &hub);
            a_core_is_taken_away(&scene, &hub);
        }
    });
}

/// Row T3: a file says which cores of the hub the branch addresses, whatever the hub tells; it is followed while data flows. A file that
/// is wrong, or about another machine, changes nothing or does not hold.
#[test]
fn t3_a_file_says_which_cores_of_the_peer_are_addressed() {
    let _busy = busy();
    isolated(|| {
        let scene = Scene::new(&[link(100.0, 1.0)]);
        let write = |text: &str| scene.directory.write("hub-cores.toml", text).unwrap();
        write("cores = 2\nusable = [1]\n");
        let (branch, hub) = scene.pair();
        let branch = branch.section("processor-info-file = \"hub-cores.toml\"\n");
        let (mut branch, hub) = scene.join(&branch, &hub.node_line("cores = 2"), 1);
        let options =
            udp::Options { flows: 40, payload_bytes: 300, ..udp::Options::new(4.0, Span::seconds(4.0)) };
        let before = delivered(&hub);
        let transfer =
            udp::start(scene.a(), scene.b(), socket(HUB_IP, 5300), options, &testbed::stop::Stop::new())
                .unwrap();
        std::thread::sleep(Duration::from_secs(1));
        let cores = since_now(&hub, &before);
        assert!(cores[0] < 20 && cores[1] > 500, "core 1 alone, as the file says: {cores:?}");
        let asked = |gateway: &Gateway| {
            (4000..4040)
                .map(|port| {
                    let flow = format!("udp {BRANCH_IP}:{port} > {HUB_IP}:5300");
                    gateway.command(&["class", &flow]).1.contains("its core 0")
                })
                .filter(|is| *is)
                .count()
        };
        write("usable = [0]\n");
        wait_for("the file is followed", PATIENCE, || asked(&branch) == 40);
        std::thread::sleep(Duration::from_millis(300));
        let before = delivered_now(&hub);
        write("usable = [0, 9999]\n");
        let report = transfer.finish(|_| ()).unwrap();
        let cores = since_now(&hub, &before);
        assert!(cores[0] > 500 && cores[1] < 20, "all of it moved: {cores:?}");
        assert_eq!((report.corrupt, report.duplicates), (0, 0), "{report:?}");
        assert!(report.loss_percent_from_start < 10.0, "{report:?}");
        assert!(branch.log().contains("hub-cores.toml:1:14: error: usable: 9999 found"), "{}", branch.log());
        assert_eq!((asked(&branch), peer(&branch).steering.processor_info.as_str()), (40, "file"));
        // Of another machine.
        write("cores = 3\nusable = [0]\n");
        branch.wait("it does not hold", PATIENCE, |report| {
            report.status.peers[0].steering.processor_info.starts_with("peer: the file")
        });
        assert!((5..35).contains(&asked(&branch)), "as the hub tells");
        nothing_refused(&hub);
    });
}
