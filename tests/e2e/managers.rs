//! Several managers on a real etcd, of which one leads: killed in the middle of changes, cut off from etcd, stopped for a while,
//! all of them away. Connections go on, and every change that was accepted is carried out.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use testbed::cluster::{self as bed, ClusterBed, ClusterSpec, MANAGER};
use testbed::program::Program;
use testbed::traffic::churn::{Churn, client, server};

use crate::machine::busy;

const PROGRAM: &str = env!("CARGO_BIN_EXE_anabranch");
const PATIENCE: Duration = Duration::from_secs(40);
const PORT: u16 = 7_000;
/// etcd's address for each manager: one of them can be cut off alone.
const ETCD: [u16; 2] = [2_379, 2_479];
/// A proxy that is not there: whoever asked it would have no answer.
const PROXY: [(&str, &str); 2] = [("http_proxy", "http://127.0.0.1:9"), ("ALL_PROXY", "http://127.0.0.1:9")];
const BUS: [u16; 2] = [4_601, 4_602];
const API: [u16; 2] = [8_470, 8_471];

struct Managers {
    // Dropped in this order.
    managers: [Option<Program>; 2],
    _etcd: Program,
    bed: ClusterBed,
}

impl Managers {
    fn start() -> Self {
        let spec = ClusterSpec {
            program: Path::new(PROGRAM),
            dispatchers: 2,
            data_planes: 3,
            services: "[[nat]]\nout = \"wan\"",
            dispatcher_services: "",
        };
        let mut bed = ClusterBed::new(&spec).unwrap();
        let file = |name: &str| bed.directory().join(name);
        for machine in bed.machines().iter().filter(|machine| machine.id != MANAGER) {
            let path = file(&format!("{}.toml", machine.id));
            let text = std::fs::read_to_string(&path).unwrap();
            let both = format!("manager = [\"10.9.0.1:{}\", \"10.9.0.1:{}\"]", BUS[0], BUS[1]);
            let text = text.replace("manager = \"10.9.0.1\"", &both);
            assert!(text.contains(&both), "{text}");
            std::fs::write(path, text).unwrap();
        }
        std::fs::write(file("token"), "0123456789abcdef0123456789abcdef").unwrap();
        for place in 0..2 {
            let text = format!(
                "[manager]\nbus = \"10.9.0.1:{}\"\napi = \"127.0.0.1:{}\"\ntoken-file = \"token\"\n\
                 drain-ms = 200\nblocks-per-unit = 12\ndead-after-ms = 3000\n[etcd]\n\
                 endpoints = [\"http://127.0.0.1:{}\"]\nlease-seconds = 3\nname = \"manager{place}\"\n",
                BUS[place], API[place], ETCD[place]
            );
            std::fs::write(file(&format!("manager{place}.toml")), text).unwrap();
        }
        let urls = ETCD.map(|port| format!("http://127.0.0.1:{port}")).join(",");
        let mut command = Command::new("etcd");
        command.arg("--data-dir").arg(file("etcd")).args(["--listen-client-urls", &urls]);
        command.args(["--advertise-client-urls", &urls, "--auto-compaction-mode", "revision"]);
        command.args(["--auto-compaction-retention", "100", "--unsafe-no-fsync"]);
        let etcd = bed.machine(MANAGER).unwrap().node.start(command, Some(&file("etcd.log"))).unwrap();
        bed.start().unwrap();
        let mut managers = Self { managers: [None, None], _etcd: etcd, bed };
        managers.start_manager(0);
        managers.start_manager(1);
        managers
    }

    fn start_manager(&mut self, place: usize) {
        let config = self.bed.directory().join(format!("manager{place}.toml"));
        let log = format!("manager{place}.log");
        let mut command = Command::new(PROGRAM);
        command.arg("manager").arg(config).envs(PROXY);
        let node = &self.bed.machine(MANAGER).unwrap().node;
        self.managers[place] = Some(node.start(command, Some(&self.bed.directory().join(log))).unwrap());
    }

    /// A command for one manager; its words or its error.
    fn ask(&self, place: usize, words: &[&str]) -> Result<String, String> {
        let mut command = Command::new(PROGRAM);
        command.arg("cluster").args(words).arg("--token-file").arg(self.bed.directory().join("token"));
        command.args(["--api", &format!("http://127.0.0.1:{}", API[place])]).envs(PROXY);
        let node = &self.bed.machine(MANAGER).unwrap().node;
        node.output(command).map_err(|error| format!("{error:#}"))
    }

    fn said(&self) -> String {
        let last =
            |program: &Option<Program>| program.as_ref().map_or_else(String::new, |one| one.last_lines(25));
        format!("manager 0: {}\nmanager 1: {}", last(&self.managers[0]), last(&self.managers[1]))
    }

    fn until<T>(&self, what: &str, mut get: impl FnMut(&Self) -> Option<T>) -> T {
        let began = Instant::now();
        loop {
            if let Some(value) = get(self) {
                return value;
            }
            assert!(began.elapsed() < PATIENCE, "{what}\n{}", self.said());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The manager that leads, of those given.
    fn leader(&self, of: &[usize]) -> usize {
        self.until("somebody leads", |managers| {
            of.iter().copied().find(|place| managers.ask(*place, &["plan"]).is_ok())
        })
    }

    /// Until nothing is under way and every unit is connected; the era.
    fn settled(&self, place: usize) -> u64 {
        self.until("all is done", |managers| {
            let said = managers.ask(place, &["status", "--json"]).ok()?;
            let status: Value = serde_json::from_str(&said).unwrap();
            let plan = &status["plan"];
            let done = plan["stage"] == "idle" && plan["accepted"].as_array().unwrap().is_empty();
            let units = status["units"].as_array().unwrap();
            let there = units.iter().all(|unit| unit["connected"] == true && unit["standing"] == "active");
            (done && there).then(|| plan["era"].as_u64().unwrap())
        })
    }

    /// Gives the cluster its interfaces and units.
    fn join(&self, leader: usize, config: &str) {
        self.ask(leader, &["config", config, "--no-wait"]).unwrap();
        let units = [2, 3].map(|node| (node, "dispatcher")).into_iter();
        for (node, role) in units.chain([11, 12, 13].map(|node| (node, "dataplane"))) {
            let (id, address) = (node.to_string(), bed::bus_address(node).to_string());
            self.ask(leader, &["add", &id, "--address", &address, "--role", role, "--no-wait"]).unwrap();
        }
    }

    fn signal(&self, place: usize, signal: rustix::process::Signal) {
        self.managers[place].as_ref().unwrap().signal(signal).unwrap();
    }

    /// Lets nothing through to etcd's address of a manager, or all again.
    fn cut_off(&self, place: usize, cut: bool) {
        let script = if cut {
            format!(
                "add table inet cut\nadd chain inet cut out {{ type filter hook output priority 0; }}\nadd rule inet cut out tcp dport {} drop\n",
                ETCD[place]
            )
        } else {
            "delete table inet cut\n".to_owned()
        };
        let file = self.bed.directory().join("cut.nft");
        std::fs::write(&file, script).unwrap();
        let mut command = Command::new("nft");
        command.arg("-f").arg(&file).env("PATH", format!("{}:/usr/sbin", std::env::var("PATH").unwrap()));
        self.bed.machine(MANAGER).unwrap().node.output(command).unwrap();
    }
}

fn shared() -> Value {
    let mac = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
    serde_json::json!({
        "interfaces": [
            { "id": 0, "name": "lan", "mac": mac(bed::LAN_MAC), "addresses": [format!("{}/24", bed::LAN)], "outside": false },
            { "id": 1, "name": "wan", "mac": mac(bed::WAN_MAC), "addresses": [format!("{}/24", bed::WAN)], "outside": true },
        ],
        "outside": [bed::WAN],
    })
}

#[test]
fn d1_d10_of_several_managers_one_leads_and_whatever_happens_to_it_changes_are_done_and_no_connection_breaks()
{
    let _busy = busy();
    let mut all = Managers::start();
    let leader = all.leader(&[0, 1]);
    let refused = all.ask(1 - leader, &["plan"]).unwrap_err();
    assert!(refused.contains(&format!("another manager leads: manager{leader}")), "{refused}");
    let config = all.bed.directory().join("shared.json");
    std::fs::write(&config, shared().to_string()).unwrap();
    all.join(leader, config.to_str().unwrap());
    let mut era = all.settled(leader);
    let to = SocketAddr::new(bed::SERVERS[0].into(), PORT);
    let servers = vec![server::start(Some(&all.bed.server), to).unwrap()];
    let options = client::Options { short_per_second: 60, long: 200, udp: 20, ..client::Options::new(to, 5) };
    let traffic = Churn { client: client::start(Some(&all.bed.client), options).unwrap(), servers };

    // Killed at some moment of a change: the other one goes on with it.
    let mut leader = leader;
    for (round, pause_ms) in [0, 60, 150].into_iter().enumerate() {
        let weight = (round + 2).to_string();
        all.ask(leader, &["weight", "11", &weight, "--no-wait"]).unwrap();
        std::thread::sleep(Duration::from_millis(pause_ms));
        all.signal(leader, rustix::process::Signal::KILL);
        all.managers[leader] = None;
        leader = all.leader(&[1 - leader]);
        let next = all.settled(leader);
        assert!(next > era, "the change was accepted: {next}, {era}\n{}", all.said());
        era = next;
        all.start_manager(1 - leader);
    }

    // Cut off from etcd, while units still hear it: it stops by itself.
    all.cut_off(leader, true);
    let (old, new) = (leader, all.leader(&[1 - leader]));
    let refused = all.ask(old, &["weight", "11", "9", "--no-wait"]).unwrap_err();
    assert!(refused.contains("another manager leads"), "{refused}");
    all.settled(new);
    all.cut_off(old, false);
    assert!(all.ask(new, &["weight", "12", "5"]).is_ok(), "{}", all.said());

    // Stopped for longer than its lease, it wakes and finds that another one leads.
    all.signal(new, rustix::process::Signal::STOP);
    leader = all.leader(&[old]);
    all.signal(new, rustix::process::Signal::CONT);
    all.settled(leader);
    all.until("it has stepped down", |all| {
        let said = all.ask(new, &["plan"]).err()?;
        said.contains(&format!("another manager leads: manager{leader}")).then_some(())
    });

    // A command finds the one that leads.
    let other = format!("http://127.0.0.1:{}", API[1 - leader]);
    all.ask(leader, &["--api", &other, "weight", "12", "4"]).unwrap();

    // None of them: traffic does not mind, and the first that is back goes on.
    era = all.settled(leader);
    all.managers = [None, None];
    std::thread::sleep(Duration::from_secs(3));
    all.start_manager(0);
    all.leader(&[0]);
    assert_eq!(all.settled(0), era);
    let report = traffic.finish().unwrap();
    assert_eq!((report.broken, report.udp_lost), (0, 0), "{report:#?}\n{}", all.said());
    assert!(report.connections > 600, "{report:#?}");
}
