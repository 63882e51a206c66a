//! A hub that several machines make: its peer's bond moves between them, and the flows inside stay.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use testbed::cluster::{
    self as bed, ClusterBed, ClusterSpec, EDGE, Edge, FIRST_DATA_PLANE, FIRST_DISPATCHER, MANAGER,
};
use testbed::program::Program;
use testbed::traffic::churn::{Churn, client, server};

use crate::machine::isolated;

const PROGRAM: &str = env!("CARGO_BIN_EXE_anabranch");
const DATA_PLANES: u16 = 3;
const TOKEN: &str = "0123456789abcdef0123456789abcdef";

struct Hub {
    // Dropped in this order.
    edge: Edge,
    manager: Program,
    bed: ClusterBed,
}

impl Hub {
    /// Manager, dispatcher, data planes and a peer of the hub, joined.
    fn start(dead_after_ms: u16) -> Self {
        // A drained unit is empty soon after its last connection.
        let services = "[gateway.timeouts]\ntcp-closed-seconds = 1\ntcp-transitory-seconds = 5\nudp-seconds = 5\n\
                        udp-unreplied-seconds = 5\nicmp-seconds = 5\n[[nat]]\nout = \"wan\"";
        let spec = ClusterSpec {
            program: Path::new(PROGRAM),
            dispatchers: 1,
            data_planes: DATA_PLANES,
            services,
            dispatcher_services: "",
        };
        let mut bed = ClusterBed::new(&spec).unwrap();
        bed.make_hub().unwrap();
        bed.start().unwrap();
        let file = |name: &str| bed.directory().join(name);
        std::fs::write(file("token"), TOKEN).unwrap();
        let text = format!(
            "[manager]\nbus = \"{}\"\napi = \"127.0.0.1:8470\"\ntoken-file = \"token\"\nstore = \"cluster.redb\"\n\
             drain-ms = 300\ndead-after-ms = {dead_after_ms}\n",
            bed.manager_address()
        );
        std::fs::write(file("manager.toml"), text).unwrap();
        let shared = serde_json::json!({
            "interfaces": [interface(0, "lan", bed::LAN_MAC, bed::LAN, false), interface(1, "wan", bed::WAN_MAC, bed::WAN, true)],
            "outside": [bed::WAN.to_string()],
        });
        std::fs::write(file("shared.json"), shared.to_string()).unwrap();
        let config = file("manager.toml");
        let manager =
            bed.start_command(MANAGER, &["manager", config.to_str().unwrap()], "manager.log").unwrap();
        let edge = bed.start_edge().unwrap();
        let hub = Self { edge, manager, bed };
        let shared = file_text(&hub.bed, "shared.json");
        hub.until(20, "the manager answers", || hub.cluster(&["config", &shared]).map(drop));
        let dispatcher = (FIRST_DISPATCHER, "dispatcher");
        let planes = (FIRST_DATA_PLANE..FIRST_DATA_PLANE + DATA_PLANES).map(|node| (node, "dataplane"));
        for (node, role) in std::iter::once(dispatcher).chain(planes) {
            let (node, address) = (node.to_string(), bed::bus_address(node).to_string());
            hub.cluster(&["add", &node, "--address", &address, "--role", role, "--no-wait"]).unwrap();
        }
        hub.until(30, "all take part", || {
            let status = hub.status()?;
            let units = status["units"].as_array().unwrap();
            let active = units.iter().filter(|unit| unit["standing"] == "active").count();
            (active == usize::from(DATA_PLANES) + 1 && status["plan"]["stage"] == "idle").then_some(())
        });
        hub
    }

    /// A command of the cluster, if it worked.
    fn cluster(&self, arguments: &[&str]) -> Option<String> {
        let mut command = Command::new(PROGRAM);
        command.arg("cluster").args(arguments).env("ANABRANCH_TOKEN_FILE", file_text(&self.bed, "token"));
        self.bed.machine(MANAGER).unwrap().node.output(command).ok()
    }

    fn status(&self) -> Option<Value> {
        serde_json::from_str(&self.cluster(&["status", "--json"])?).ok()
    }

    /// State of a gateway's peer `peer`, as it says.
    fn peer(socket: &Path, peer: &str) -> Option<Value> {
        let output =
            Command::new(PROGRAM).args(["status", "--json", "--socket"]).arg(socket).output().unwrap();
        let status: Value = serde_json::from_slice(&output.stdout).ok()?;
        status["peers"].as_array()?.iter().find(|known| known["name"] == peer).cloned()
    }

    /// Data planes that have a session with the hub's peer.
    fn in_session(&self) -> Vec<u16> {
        let planes = self.bed.machines().iter().filter(|machine| machine.id >= FIRST_DATA_PLANE);
        let up = planes
            .filter(|machine| Self::peer(machine.socket(), "edge").is_some_and(|peer| peer["state"] == "up"));
        up.map(|machine| machine.id).collect()
    }

    /// The one data plane that has a session with the hub's peer, when that has been so for a while.
    fn settled(&self) -> u16 {
        let mut since = (0, Instant::now());
        self.until(30, "the peer has a session with one unit", || match self.in_session()[..] {
            [one] if one == since.0 => (since.1.elapsed() > Duration::from_secs(2)).then_some(one),
            [one] => {
                since = (one, Instant::now());
                None
            }
            _ => {
                since = (0, Instant::now());
                None
            }
        })
    }

    fn until<T>(&self, seconds: u64, what: &str, mut found: impl FnMut() -> Option<T>) -> T {
        let deadline = Instant::now() + Duration::from_secs(seconds);
        loop {
            if let Some(found) = found() {
                return found;
            }
            if Instant::now() > deadline {
                let logs = self.bed.machines().iter().map(|machine| machine.log().to_owned());
                for log in logs.chain([self.edge.log.clone()]) {
                    let text = std::fs::read_to_string(&log).unwrap_or_default();
                    let lines: Vec<&str> = text.lines().rev().take(25).collect();
                    eprintln!("{}:", log.display());
                    lines.iter().rev().for_each(|line| eprintln!("  {line}"));
                }
                panic!("not after {seconds} s: {what}; the manager said:\n{}", self.manager.last_lines(20));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

fn file_text(bed: &ClusterBed, name: &str) -> String {
    bed.directory().join(name).to_str().unwrap().to_owned()
}

fn interface(id: u8, name: &str, mac: [u8; 6], address: std::net::Ipv4Addr, outside: bool) -> Value {
    let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
    serde_json::json!({ "id": id, "name": name, "mac": mac, "addresses": [format!("{address}/24")], "outside": outside })
}

fn traffic(hub: &Hub, port: u16, long: usize) -> Churn {
    let to = SocketAddr::new(bed::SERVERS[0].into(), port);
    let servers = vec![server::start(Some(&hub.bed.server), to).unwrap()];
    let options = client::Options { short_per_second: 20, long, udp: 10, ..client::Options::new(to, 7) };
    Churn { client: client::start(Some(&hub.bed.client), options).unwrap(), servers }
}

/// Row R6: the machine that has a peer's session drains. The peer gets a session with another one before the old one ends; of
/// hundreds of connections through the peer's bond and the cluster's address translation none breaks, and the drained machine
/// becomes empty and leaves.
#[test]
fn r6_a_bond_moves_to_another_unit_and_its_flows_stay() {
    isolated(|| {
        let hub = Hub::start(3_000);
        let from = hub.settled();
        let traffic = traffic(&hub, 7_000, 100);
        std::thread::sleep(Duration::from_secs(3));
        let before = traffic.client.figures();
        assert!(before.open_long >= 90 && before.broken == 0, "{before:?}");
        hub.cluster(&["drain", &from.to_string(), "--remove", "--no-wait"]).unwrap();
        let to = hub.until(20, "the bond is at another unit alone", || match hub.in_session()[..] {
            [one] if one != from => Some(one),
            _ => None,
        });
        std::thread::sleep(Duration::from_secs(3));
        let after = traffic.client.figures();
        let report = traffic.finish().unwrap();
        let client = &report.client;
        assert_eq!((client.figures.broken, client.undecided), (0, 0), "{from} to {to}: {client:?}");
        assert!(after.completed > before.completed + 30, "{before:?} {after:?}");
        // Its flows have ended with the connections.
        hub.until(60, "the drained unit leaves", || {
            let status = hub.status()?;
            let units = status["units"].as_array().unwrap();
            let unit = units.iter().find(|unit| unit["node"] == from);
            unit.is_none_or(|unit| unit["standing"] == "free").then_some(())
        });
    });
}

/// Row R6: the machine that has a peer's session dies. The peer is told by a dispatcher that the session is gone and has another
/// one with another machine within a second of the moment at which the dead one was left out.
#[test]
fn r6_a_dead_unit_costs_the_peer_one_handshake() {
    isolated(|| {
        let mut hub = Hub::start(400);
        let from = hub.settled();
        let ping = |hub: &Hub| {
            let mut command = Command::new("ping");
            command.args(["-n", "-c", "1", "-W", "1", "-I", &EDGE.to_string(), &bed::SERVERS[0].to_string()]);
            hub.bed.client.output(command).is_ok()
        };
        hub.until(10, "a packet passes", || ping(&hub).then_some(()));
        let handshakes = |hub: &Hub| {
            Hub::peer(&hub.edge.socket, "hub").and_then(|peer| peer["handshakes"].as_u64()).unwrap_or(0)
        };
        let known = handshakes(&hub);
        hub.bed.stop(from, true).unwrap();
        let died = Instant::now();
        let to = loop {
            ping(&hub);
            match hub.in_session()[..] {
                [one] if one != from => break one,
                _ => assert!(
                    died.elapsed() < Duration::from_secs(15),
                    "no session; {}",
                    hub.manager.last_lines(20)
                ),
            }
        };
        let rejoined = died.elapsed();
        hub.until(10, "a packet passes", || ping(&hub).then_some(()));
        assert_eq!(handshakes(&hub), known + 1, "one handshake, with {to}");
        // 400 ms until it is left out, then at most a second; the looks take their time here, and other tests the CPU.
        assert!(rejoined < Duration::from_secs(3), "{rejoined:?}");
        let said = std::fs::read_to_string(&hub.edge.log).unwrap();
        assert!(said.contains("the peer has no session any more"), "it found out by itself");
        eprintln!("unit {from} died, its peer was at unit {to} after {} ms", rejoined.as_millis());
    });
}
