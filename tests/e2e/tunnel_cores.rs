//! Cores of a node that has a tunnel and nothing else: one is drained, one hangs, under flows of the tunnel.

use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use linux::testing::Halted;
use testbed::stop::Stop;
use testbed::topology::Node;
use testbed::traffic::{Span, udp};

use crate::machine::{alone, isolated};
use crate::scene::*;

/// Packets that the hub's cores gave to the host so far.
fn delivered(hub: &Gateway) -> Vec<u64> {
    hub.status().unwrap().status.cores.iter().map(|core| core.tun_tx_packets).collect()
}

/// Rows T3, C7: the operator takes a core from a hub under 1,000 flows of its tunnel. The peer is told while data flows and
/// sends to the other core: no packet is lost, no flow is split; then the core comes back.
#[test]
fn t3_c7_a_core_is_drained_under_a_thousand_tunnel_flows() {
    let _alone = alone();
    isolated(|| {
        let scene = Scene::new(&[link(100.0, 2.0)]);
        let (branch, hub) = scene.pair();
        let (_branch, hub) = scene.join(&branch.node_line("cores = 2"), &hub.node_line("cores = 2"), 1);
        let stop = Stop::new();
        let transfers: Vec<udp::Transfer> = (0..4u16)
            .map(|number| {
                let to: SocketAddr = format!("{HUB_IP}:{}", 5_300 + number).parse().unwrap();
                let options = udp::Options {
                    flows: 250,
                    payload_bytes: 100,
                    ..udp::Options::new(0.8, Span::seconds(6.0))
                };
                udp::start(scene.a(), scene.b(), to, options, &stop).unwrap()
            })
            .collect();
        std::thread::sleep(Duration::from_millis(2_500));
        let before = delivered(&hub);
        assert!(before.iter().all(|packets| *packets > 500), "both cores are at work: {before:?}");
        let (code, said) = hub.command(&["core", "drain", "1"]);
        assert_eq!(code, 0, "{said}");
        std::thread::sleep(Duration::from_millis(1_000));
        let moved = delivered(&hub);
        std::thread::sleep(Duration::from_millis(1_000));
        let after = delivered(&hub);
        assert!(after[1] - moved[1] < 20, "the drained core still works: {before:?} {moved:?} {after:?}");
        assert!(after[0] - moved[0] > 1_000, "{moved:?} {after:?}");
        for transfer in transfers {
            let report = transfer.finish(|_| ()).unwrap();
            let lost = report.sent - report.received;
            assert_eq!((lost, report.corrupt, report.duplicates), (0, 0, 0), "{} sent", report.sent);
        }
        assert_eq!(hub.status().unwrap().status.flows_split_over_cores, 0);
        assert_eq!(hub.command(&["core", "enable", "1"]).0, 0);
        wait_for("the core works again", PATIENCE, || {
            udp_seconds(scene.a(), scene.b(), HUB_IP, udp::Options::new(2.0, Span::seconds(0.5)));
            delivered(&hub)[1] > after[1] + 20
        });
    });
}

/// When the datagrams of each source port arrived.
type Arrivals = Arc<Mutex<BTreeMap<u16, Vec<Instant>>>>;

/// Collects what arrives at `to` until `end`.
fn collect(server: &Node, to: &str, end: &Arc<AtomicBool>) -> (Arrivals, std::thread::JoinHandle<()>) {
    let to: SocketAddr = to.parse().unwrap();
    let socket = udp_socket(server, to);
    socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let arrivals = Arrivals::default();
    let (shared, end) = (Arc::clone(&arrivals), Arc::clone(end));
    let thread = std::thread::spawn(move || {
        let mut bytes = [0; 64];
        while !end.load(Ordering::Relaxed) {
            if let Ok((_, from)) = socket.recv_from(&mut bytes) {
                shared.lock().unwrap().entry(from.port()).or_default().push(Instant::now());
            }
        }
    });
    (arrivals, thread)
}

/// The longest silence of each flow from its first datagram to `end`, ms.
fn silences(arrivals: &BTreeMap<u16, Vec<Instant>>, end: Instant) -> Vec<u64> {
    let longest = |times: &Vec<Instant>| {
        let gaps = times.windows(2).map(|pair| pair[1] - pair[0]);
        let last = times.last().map(|last| end.saturating_duration_since(*last));
        gaps.chain(last).max().map_or(0, |gap| gap.as_millis() as u64)
    };
    arrivals.values().map(longest).collect()
}

/// Longest silences of 48 flows while a worker of the hub is halted: of those that it had, and of the others.
fn silences_when_a_core_hangs(worker: usize) -> (Vec<u64>, Vec<u64>) {
    let scene = Scene::new(&[link(100.0, 2.0)]);
    scene.expect_error("a core hangs");
    let (branch, hub) = scene.pair();
    let (_branch, hub) = scene.join(&branch.node_line("cores = 2"), &hub.node_line("cores = 2"), 1);
    let end = Arc::new(AtomicBool::new(false));
    let (arrivals, thread) = collect(scene.b(), &format!("{HUB_IP}:5400"), &end);
    let sockets: Vec<UdpSocket> = (0..48)
        .map(|_| {
            let socket = scene.a().run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
            socket.connect(format!("{HUB_IP}:5400")).unwrap();
            socket
        })
        .collect();
    let send = |seconds: f64| {
        let start = Instant::now();
        while start.elapsed().as_secs_f64() < seconds {
            for socket in &sockets {
                let _ = socket.send(&[7; 32]);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    send(1.0);
    // Halted for good only while everybody sends: which flows fall silent at once are those of this core.
    let halted = Halted::thread(hub.program.id(), &format!("worker-{worker}")).unwrap();
    send(2.0);
    let sent = Instant::now();
    std::thread::sleep(Duration::from_millis(100));
    drop(halted);
    end.store(true, Ordering::Relaxed);
    thread.join().unwrap();
    let all = silences(&arrivals.lock().unwrap(), sent);
    assert_eq!(all.len(), 48, "every flow arrived before the core hung");
    all.into_iter().partition(|silence| *silence > 150)
}

/// Rows C7, T3: a worker of a hub that has nothing but a tunnel hangs, whichever it is. The flows that it had arrive by the other
/// core within 400 ms, the others do not notice.
#[test]
fn c7_t3_a_hung_core_of_a_tunnel_loses_its_flows_to_the_others() {
    let _alone = alone();
    isolated(|| {
        for worker in [1, 0] {
            // A machine that is busy with something else can be late; being late each time is a fault.
            let mut tries = Vec::new();
            let good = (0..3).any(|_| {
                let (stalled, others) = silences_when_a_core_hangs(worker);
                let good =
                    !stalled.is_empty() && others.len() > 8 && stalled.iter().all(|silence| *silence <= 400);
                tries.push((stalled, others));
                good
            });
            assert!(good, "longest silences in ms, flows of worker {worker} and others: {tries:?}");
        }
    });
}

/// Row T2: datagrams that the host cuts into fragments take the core of their flow, not that of their addresses. Small and large
/// ones of a socket are processed by one core of the hub.
#[test]
fn t2_fragments_take_the_core_of_their_flow() {
    let _alone = alone();
    isolated(|| {
        let scene = Scene::new(&[link(100.0, 2.0)]);
        let (branch, hub) = scene.pair();
        let (_branch, hub) = scene.join(&branch.node_line("cores = 2"), &hub.node_line("cores = 2"), 1);
        let server = udp_socket(scene.b(), format!("{HUB_IP}:5500"));
        server.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        let reader = std::thread::spawn(move || {
            let mut buffer = vec![0; 65_536];
            let (mut small, mut large) = (0, 0);
            while let Ok(bytes) = server.recv(&mut buffer) {
                match bytes {
                    100 => small += 1,
                    4_000 if buffer[..4_000] == [2; 4_000] => large += 1,
                    other => panic!("{other} bytes"),
                }
            }
            (small, large)
        });
        let sockets: Vec<UdpSocket> = (0..16)
            .map(|_| {
                let socket = scene.a().run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
                socket.connect(format!("{HUB_IP}:5500")).unwrap();
                socket
            })
            .collect();
        let mut sent = 0;
        for _ in 0..20 {
            for socket in &sockets {
                sent += usize::from(socket.send(&[1; 100]).is_ok())
                    + usize::from(socket.send(&[2; 4_000]).is_ok());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let (small, large) = reader.join().unwrap();
        assert_eq!((small, large, sent), (320, 320, 640));
        let status = hub.status().unwrap().status;
        assert!(status.cores.iter().all(|core| core.tun_tx_packets > 50), "both cores are at work");
        assert_eq!(status.flows_split_over_cores, 0);
    });
}
