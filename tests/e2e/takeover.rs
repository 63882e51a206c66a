//! A dispatcher dies and another one takes its place (rows R9, R10): with the real keepalived, with the real BIRD, and by the
//! commands of a hook while the manager is away. Connections go on, every byte checked at both ends.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use testbed::cluster::{self as bed, ClusterBed, ClusterSpec, FIRST_DATA_PLANE, MANAGER, Pair};
use testbed::program::Program;
use testbed::topology::Node;
use testbed::traffic::churn::{Churn, Report, client, server};

use crate::machine::busy;

const PROGRAM: &str = env!("CARGO_BIN_EXE_anabranch");
const FIRST: u16 = bed::FIRST_DISPATCHER;
const SECOND: u16 = FIRST + 1;
const PATIENCE: Duration = Duration::from_secs(30);
const PORT: u16 = 7_000;

/// Two dispatchers that have both interfaces, two data planes and a manager; all of them have joined.
struct Cluster {
    // Dropped in this order.
    manager: Option<Program>,
    bed: ClusterBed,
}

impl Cluster {
    fn start(pair: Pair) -> Self {
        let services = "[[nat]]\nout = \"wan\"";
        let spec = ClusterSpec {
            program: Path::new(PROGRAM),
            dispatchers: 2,
            data_planes: 2,
            services,
            dispatcher_services: "",
        };
        let mut bed = ClusterBed::with_pair(&spec, pair).unwrap();
        bed.start().unwrap();
        let file = |name: &str| bed.directory().join(name);
        std::fs::write(file("token"), "0123456789abcdef0123456789abcdef").unwrap();
        // All machines share this one's CPUs, and whatever else runs here.
        let text = format!(
            "[manager]\nbus = \"{}\"\ntoken-file = \"token\"\nstore = \"cluster.redb\"\ndrain-ms = 200\n\
             blocks-per-unit = 12\ndead-after-ms = 2000\n",
            bed.manager_address()
        );
        std::fs::write(file("manager.toml"), text).unwrap();
        std::fs::write(file("shared.json"), shared().to_string()).unwrap();
        let config = file("manager.toml");
        let manager =
            bed.start_command(MANAGER, &["manager", config.to_str().unwrap()], "manager.log").unwrap();
        let mut cluster = Self { manager: Some(manager), bed };
        cluster.join();
        cluster
    }

    fn join(&mut self) {
        let shared = self.bed.directory().join("shared.json");
        let began = Instant::now();
        while let Err(error) = self.manage(&["config", shared.to_str().unwrap()]) {
            assert!(began.elapsed() < PATIENCE, "{error}\n{}", self.manager_said());
            std::thread::sleep(Duration::from_millis(100));
        }
        let units = [(FIRST, "dispatcher"), (SECOND, "dispatcher"), (11, "dataplane"), (12, "dataplane")];
        for (place, (node, role)) in units.into_iter().enumerate() {
            let (id, address) = (node.to_string(), bed::bus_address(node).to_string());
            let mut words = vec!["add", &id, "--address", &address, "--role", role];
            if place < 2 {
                words.push("--no-wait");
            }
            self.manage(&words).unwrap();
        }
        for node in [FIRST, SECOND] {
            self.wait_for(node, "to be fit", |cluster| cluster.run(node, &["cluster", "health"]).is_ok());
        }
    }

    fn manager_said(&self) -> String {
        self.manager.as_ref().map_or_else(String::new, |manager| manager.last_lines(20))
    }

    /// A command about the cluster, at the manager's machine.
    fn manage(&self, words: &[&str]) -> Result<String, String> {
        let mut command = Command::new(PROGRAM);
        command.arg("cluster").args(words).arg("--token-file").arg(self.bed.directory().join("token"));
        let node = &self.bed.machine(MANAGER).unwrap().node;
        node.output(command).map_err(|error| format!("{error:#}"))
    }

    /// A command about one machine's gateway.
    fn run(&self, node: u16, words: &[&str]) -> Result<String, String> {
        let machine = self.bed.machine(node).unwrap();
        let mut command = Command::new(PROGRAM);
        command.args(words).arg("--socket").arg(machine.socket());
        machine.node.output(command).map_err(|error| format!("{error:#}"))
    }

    /// Whether a dispatcher has its interfaces; `None`: it does not answer.
    fn is_active(&self, node: u16) -> Option<bool> {
        let status: Value = serde_json::from_str(&self.run(node, &["status", "--json"]).ok()?).unwrap();
        let interfaces = status["cluster"]["interfaces"].as_array().unwrap();
        assert_eq!(interfaces.len(), 2, "{status:#}");
        Some(interfaces.iter().all(|interface| interface["active"] == true))
    }

    fn wait_for(&self, node: u16, what: &str, mut is_there: impl FnMut(&Self) -> bool) -> Duration {
        let began = Instant::now();
        while !is_there(self) {
            let log = std::fs::read_to_string(self.bed.machine(node).unwrap().log()).unwrap_or_default();
            assert!(began.elapsed() < PATIENCE, "waited for {node} {what}\n{log}\n{}", self.manager_said());
            std::thread::sleep(Duration::from_millis(20));
        }
        began.elapsed()
    }

    /// Starts another program on a machine.
    fn start_at(&self, node: u16, program: &str, arguments: &[&str]) -> Program {
        let mut command = Command::new(program);
        command.args(arguments).env("PATH", path());
        let name = Path::new(program).file_name().unwrap().to_str().unwrap();
        let log = self.bed.directory().join(format!("{node}.{name}.log"));
        self.bed.machine(node).unwrap().node.start(command, Some(&log)).unwrap()
    }

    /// Long and short connections through address translation, and UDP.
    fn traffic(&self) -> Churn {
        let to = SocketAddr::new(bed::SERVERS[0].into(), PORT);
        let servers = vec![server::start(Some(&self.bed.server), to).unwrap()];
        let options =
            client::Options { short_per_second: 60, long: 200, udp: 20, ..client::Options::new(to, 3) };
        Churn { client: client::start(Some(&self.bed.client), options).unwrap(), servers }
    }
}

/// Administrators' programs are not in everybody's path.
fn path() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}

fn shared() -> Value {
    let mac = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
    serde_json::json!({
        "interfaces": [
            { "id": 0, "name": "lan", "mac": mac(bed::LAN_MAC), "addresses": [format!("{}/24", bed::LAN), "fd01::1/64"],
              "outside": false },
            { "id": 1, "name": "wan", "mac": mac(bed::WAN_MAC), "addresses": [format!("{}/24", bed::WAN), "fd02::1/64"],
              "outside": true },
        ],
        "outside": [bed::WAN],
    })
}

fn assert_whole(report: &Report) {
    assert_eq!((report.broken, report.udp_lost), (0, 0), "{report:#?}");
    assert!(report.connections > 400 && report.longest_gap_ms < 3_000.0, "{report:#?}");
}

/// Words of ARP and neighbor discovery that somebody hears, as text.
struct Listener {
    program: Program,
    log: std::path::PathBuf,
}

impl Listener {
    fn start(node: &Node, folder: &Path) -> Self {
        let log = folder.join(format!("{}.neighbors", node.name()));
        let mut command = Command::new("tcpdump");
        command.args(["-lneni", "eth0", "arp or (icmp6 and ip6[40] == 136)"]).env("PATH", path());
        let program = node.start(command, Some(&log)).unwrap();
        let began = Instant::now();
        while !std::fs::read_to_string(&log).unwrap().contains("listening") {
            assert!(began.elapsed() < PATIENCE);
            std::thread::sleep(Duration::from_millis(20));
        }
        Self { program, log }
    }

    fn finish(mut self) -> String {
        self.program.stop().unwrap();
        std::fs::read_to_string(&self.log).unwrap()
    }
}

/// Announcements of an address by the shared hardware address, and nobody else's.
fn assert_announced(heard: &str, mac: [u8; 6], address: IpAddr) {
    let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
    let own = |line: &&str| match address {
        IpAddr::V4(_) => {
            line.contains(&format!("Request who-has {address}")) && line.contains(&format!("tell {address}"))
        }
        IpAddr::V6(_) => line.contains(&format!("tgt is {address}")),
    };
    let said = heard.lines().filter(own).filter(|line| line.contains(&format!("{mac} > "))).count();
    assert!(said >= 3, "{said} announcements of {address} by {mac}\n{heard}");
}

/// keepalived at both dispatchers, with the example configuration.
fn start_keepalived(cluster: &Cluster, node: u16) -> Program {
    let machine = cluster.bed.machine(node).unwrap();
    let health = format!("{PROGRAM} cluster health --socket {}", machine.socket().display());
    let mut text =
        include_str!("../../etc/keepalived.conf").replace("/usr/bin/anabranch cluster health", &health);
    if node == SECOND {
        text = text
            .replace("unicast_src_ip 10.200.2.2", "unicast_src_ip FIRST")
            .replace("10.200.3.2", "10.200.2.2")
            .replace("unicast_src_ip FIRST", "unicast_src_ip 10.200.3.2")
            .replace("priority 150", "priority 100");
    }
    let file = |name: &str| cluster.bed.directory().join(format!("{node}.{name}")).display().to_string();
    let config = file("keepalived.conf");
    std::fs::write(&config, text).unwrap();
    let arguments =
        ["-n", "-l", "-D", "-P", "-R", "-f", &config, "-p", &file("pid"), "-r", &file("vrrp.pid")];
    cluster.start_at(node, "keepalived", &arguments)
}

#[test]
fn r9_r10_keepalived_gives_a_dead_dispatchers_addresses_to_the_other_and_no_connection_breaks() {
    let _busy = busy();
    let mut cluster = Cluster::start(Pair::Takeover);
    assert_eq!((cluster.is_active(FIRST), cluster.is_active(SECOND)), (Some(false), Some(false)));
    let _first = start_keepalived(&cluster, FIRST);
    cluster.wait_for(FIRST, "to have the interfaces", |cluster| cluster.is_active(FIRST) == Some(true));
    let _second = start_keepalived(&cluster, SECOND);
    let folder = cluster.bed.directory().to_owned();
    let listeners =
        [Listener::start(&cluster.bed.client, &folder), Listener::start(&cluster.bed.server, &folder)];
    let traffic = cluster.traffic();
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!((cluster.is_active(FIRST), cluster.is_active(SECOND)), (Some(true), Some(false)));
    cluster.bed.stop(FIRST, true).unwrap();
    let took = cluster.wait_for(SECOND, "to take over", |cluster| cluster.is_active(SECOND) == Some(true));
    std::thread::sleep(Duration::from_secs(4));
    // Who is back stands by: keepalived leaves the addresses where they are.
    cluster.bed.start_one(FIRST).unwrap();
    cluster.wait_for(FIRST, "to be fit again", |cluster| cluster.run(FIRST, &["cluster", "health"]).is_ok());
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!((cluster.is_active(FIRST), cluster.is_active(SECOND)), (Some(false), Some(true)));
    let report = traffic.finish().unwrap();
    eprintln!("taken over after {} ms, longest gap {:.0} ms", took.as_millis(), report.longest_gap_ms);
    assert_whole(&report);
    let [client, server] = listeners.map(Listener::finish);
    assert_announced(&client, bed::LAN_MAC, bed::LAN.into());
    assert_announced(&client, bed::LAN_MAC, "fd01::1".parse().unwrap());
    assert_announced(&server, bed::WAN_MAC, bed::WAN.into());
    assert_announced(&server, bed::WAN_MAC, "fd02::1".parse().unwrap());
}

#[test]
fn r9_d10_a_hook_takes_a_dispatcher_over_while_the_manager_is_away() {
    let _busy = busy();
    let mut cluster = Cluster::start(Pair::Takeover);
    cluster.run(FIRST, &["cluster", "takeover"]).unwrap();
    assert_eq!((cluster.is_active(FIRST), cluster.is_active(SECOND)), (Some(true), Some(false)));
    let traffic = cluster.traffic();
    std::thread::sleep(Duration::from_secs(2));
    cluster.manager.take().unwrap().stop().unwrap();
    // In order …
    cluster.run(FIRST, &["cluster", "release"]).unwrap();
    cluster.run(SECOND, &["cluster", "takeover"]).unwrap();
    assert_eq!((cluster.is_active(FIRST), cluster.is_active(SECOND)), (Some(false), Some(true)));
    std::thread::sleep(Duration::from_secs(2));
    // … and not.
    cluster.bed.stop(SECOND, true).unwrap();
    let node = &cluster.bed.machine(SECOND).unwrap().node;
    node.run(|| linux_addresses_gone("lan", "wan")).unwrap();
    cluster.run(FIRST, &["cluster", "takeover"]).unwrap();
    cluster.run(FIRST, &["cluster", "health"]).unwrap();
    std::thread::sleep(Duration::from_secs(3));
    assert_whole(&traffic.finish().unwrap());
    // A gateway that is started anew stands by, and the addresses of the one before are gone.
    cluster.bed.start_one(SECOND).unwrap();
    cluster.wait_for(SECOND, "to answer", |cluster| cluster.is_active(SECOND) == Some(false));
    let health = cluster.run(SECOND, &["cluster", "health"]).unwrap_err();
    assert!(health.contains("does not take part in the cluster"), "{health}");
    let other = cluster.run(FIRST_DATA_PLANE, &["cluster", "takeover"]).unwrap_err();
    assert!(other.contains("no [[interface]] has takeover = true"), "{other}");
}

/// As a machine that is off: it answers nothing.
fn linux_addresses_gone(lan: &str, wan: &str) {
    for device in [lan, wan] {
        let status = Command::new("ip").args(["link", "set", device, "down"]).env("PATH", path()).status();
        assert!(status.unwrap().success());
    }
}

/// BIRD at a machine, with this configuration.
fn start_bird(cluster: &Cluster, node: &Node, name: &str, text: &str) -> (Program, std::path::PathBuf) {
    let file = |ending: &str| cluster.bed.directory().join(format!("{name}.{ending}"));
    std::fs::write(file("conf"), text).unwrap();
    let mut command = Command::new("bird");
    command.env("PATH", path()).arg("-f").arg("-c").arg(file("conf")).arg("-s").arg(file("ctl"));
    command.arg("-P").arg(file("pid"));
    (node.start(command, Some(&file("bird.log"))).unwrap(), file("ctl"))
}

/// A router that is told by both dispatchers what they have.
fn router(id: &str, number: u32, neighbors: [std::net::Ipv4Addr; 2]) -> String {
    let mut text = format!(
        "router id {id};\nprotocol device {{ scan time 1; }}\nprotocol direct {{ ipv4; }}\n\
         protocol kernel {{ ipv4 {{ export all; }}; }}\n"
    );
    for neighbor in neighbors {
        text += &format!(
            "protocol bgp {{ local as {number}; neighbor {neighbor} as 65010; hold time 3; connect retry time 1;\n\
             connect delay time 1; error wait time 1, 2; ipv4 {{ import all; export none; }}; }}\n"
        );
    }
    text
}

/// The example configuration of a dispatcher.
fn dispatcher_bird(node: u16) -> String {
    let text = include_str!("../../etc/bird.conf");
    if node == FIRST {
        return text.to_owned();
    }
    text.replace("10.200.2.2", "10.200.3.2")
        .replace(".0.252", ".0.253")
        .replace("bgp_med = 10", "bgp_med = 20")
}

#[test]
fn r10_bird_withdraws_what_a_dead_dispatcher_announced_and_no_connection_breaks() {
    let _busy = busy();
    let mut cluster = Cluster::start(Pair::Routed);
    let mut programs = Vec::new();
    let neighbors = |shared| [FIRST, SECOND].map(|node| bed::own_address(shared, node));
    let client = router("1.1.1.1", 65_001, neighbors(bed::LAN));
    programs.push(start_bird(&cluster, &cluster.bed.client, "client", &client).0);
    let server = router("2.2.2.2", 65_002, neighbors(bed::WAN));
    programs.push(start_bird(&cluster, &cluster.bed.server, "server", &server).0);
    for node in [FIRST, SECOND] {
        let machine = cluster.bed.machine(node).unwrap();
        let (bird, control) = start_bird(&cluster, &machine.node, &format!("{node}"), &dispatcher_bird(node));
        programs.push(bird);
        let hook = |what: &str| format!("birdc -s {} {what} shared", control.display());
        let (up, down) = (hook("enable"), hook("disable"));
        let socket = machine.socket().to_str().unwrap();
        let words = ["cluster", "health", "--socket", socket, "--watch", "--up", &up, "--down", &down];
        programs.push(cluster.start_at(node, PROGRAM, &words));
    }
    let way = |node: &Node, to: &str| {
        let mut command = Command::new("ip");
        command.args(["route", "get", to]).env("PATH", path());
        node.output(command).unwrap_or_default()
    };
    let ways_by = |cluster: &Cluster, node: u16| {
        let (lan, wan) = (bed::own_address(bed::LAN, node), bed::own_address(bed::WAN, node));
        way(&cluster.bed.client, "10.2.0.2").contains(&format!("via {lan} "))
            && way(&cluster.bed.server, "10.2.0.1").contains(&format!("via {wan} "))
    };
    cluster.wait_for(FIRST, "to be preferred", |cluster| ways_by(cluster, FIRST));
    let traffic = cluster.traffic();
    std::thread::sleep(Duration::from_secs(3));
    cluster.bed.stop(FIRST, true).unwrap();
    let took = cluster.wait_for(SECOND, "to be the way", |cluster| ways_by(cluster, SECOND));
    std::thread::sleep(Duration::from_secs(4));
    let report = traffic.finish().unwrap();
    eprintln!("the other way after {} ms, longest gap {:.0} ms", took.as_millis(), report.longest_gap_ms);
    assert_whole(&report);
}
