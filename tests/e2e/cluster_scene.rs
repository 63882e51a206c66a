//! A cluster of real programs for a test: a manager, dispatchers and data planes of one network, some of which may join later.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use testbed::cluster::{self as bed, ClusterBed, ClusterSpec, FIRST_DISPATCHER, MANAGER};
use testbed::program::Program;
use testbed::traffic::churn::{Churn, client, server};

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_anabranch");
/// Machines of a test share this one's CPUs, and whatever else runs here.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Port of the traffic's server.
pub const PORT: u16 = 7_000;

/// Machines and what they do.
#[derive(Clone, Copy)]
pub struct Plan<'a> {
    pub dispatchers: u16,
    pub data_planes: u16,
    /// Sections of the data planes.
    pub services: &'a str,
    /// More keys of `[manager]`, and more sections.
    pub manager: &'a str,
}

/// Does nothing before the machines start.
pub fn nothing(_: &ClusterBed) {}

/// The machines while they run.
pub struct Cluster {
    // Dropped in this order.
    pub manager: Program,
    pub bed: ClusterBed,
    dispatchers: u16,
}

impl Cluster {
    /// Builds them; starts the manager, the dispatchers and `running` data planes. `edit` may change the text of a machine's
    /// configuration, `prepare` may do more before anything runs.
    pub fn start<T>(
        plan: &Plan<'_>,
        running: &[u16],
        edit: impl Fn(u16, String) -> String,
        prepare: impl FnOnce(&ClusterBed) -> T,
    ) -> (Self, T) {
        let spec = ClusterSpec {
            program: Path::new(PROGRAM),
            dispatchers: plan.dispatchers,
            data_planes: plan.data_planes,
            services: plan.services,
            dispatcher_services: "",
        };
        let mut bed = ClusterBed::new(&spec).unwrap();
        let ids: Vec<u16> = bed.machines().iter().map(|machine| machine.id).collect();
        let file = |name: &str| bed.directory().join(name);
        for id in &ids {
            let path = file(&format!("{id}.toml"));
            let text = std::fs::read_to_string(&path).unwrap();
            std::fs::write(path, edit(*id, text)).unwrap();
        }
        std::fs::write(file("token"), "0123456789abcdef0123456789abcdef").unwrap();
        // Machines of a test share the CPUs: unless it says otherwise nobody is dead because it got none.
        let patient = if plan.manager.contains("dead-after-ms") { "" } else { "dead-after-ms = 3000\n" };
        let text = format!(
            "[manager]\nbus = \"{}\"\ntoken-file = \"token\"\nstore = \"cluster.redb\"\ndrain-ms = 200\n{patient}{}\n",
            bed.manager_address(),
            plan.manager
        );
        std::fs::write(file("manager.toml"), text).unwrap();
        std::fs::write(file("shared.json"), shared().to_string()).unwrap();
        let config = file("manager.toml");
        let prepared = prepare(&bed);
        for id in ids.into_iter().filter(|id| *id < bed::FIRST_DATA_PLANE || running.contains(id)) {
            bed.start_one(id).unwrap();
        }
        let manager =
            bed.start_command(MANAGER, &["manager", config.to_str().unwrap()], "manager.log").unwrap();
        (Self { manager, bed, dispatchers: plan.dispatchers }, prepared)
    }

    /// Tells the manager interfaces, dispatchers and these data planes, and waits until they take part.
    pub fn join(&self, planes: &[u16]) {
        let shared = self.bed.directory().join("shared.json");
        self.until("the manager answers", |all| all.manage(&["config", shared.to_str().unwrap()]).ok());
        let dispatchers = (0..self.dispatchers).map(|place| (FIRST_DISPATCHER + place, "dispatcher"));
        for (node, role) in dispatchers.chain(planes.iter().map(|node| (*node, "dataplane"))) {
            let (id, address) = (node.to_string(), bed::bus_address(node).to_string());
            self.manage(&["add", &id, "--address", &address, "--role", role, "--no-wait"]).unwrap();
        }
        self.settled();
    }

    /// A command about the cluster, at the manager's machine.
    pub fn manage(&self, words: &[&str]) -> Result<String, String> {
        let mut command = Command::new(PROGRAM);
        command.arg("cluster").args(words).arg("--token-file").arg(self.bed.directory().join("token"));
        let node = &self.bed.machine(MANAGER).unwrap().node;
        node.output(command).map_err(|error| format!("{error:#}"))
    }

    /// A command about one machine's gateway.
    pub fn run(&self, node: u16, words: &[&str]) -> Result<String, String> {
        let machine = self.bed.machine(node).unwrap();
        let mut command = Command::new(PROGRAM);
        command.args(words).arg("--socket").arg(machine.socket());
        machine.node.output(command).map_err(|error| format!("{error:#}"))
    }

    /// State of the cluster as the manager knows it.
    pub fn status(&self) -> Value {
        let said = self.manage(&["status", "--json"]).unwrap();
        serde_json::from_str(&said).unwrap()
    }

    /// State of a machine's gateway.
    pub fn status_of(&self, node: u16) -> Value {
        serde_json::from_str(&self.run(node, &["status", "--json"]).unwrap()).unwrap()
    }

    /// A number of a unit, as the manager knows it.
    pub fn unit(&self, node: u16, key: &str) -> u64 {
        let status = self.status();
        let unit = unit(&status, node).unwrap_or_else(|| panic!("no unit {node}: {status:#}"));
        unit[key].as_u64().unwrap_or_else(|| panic!("no {key}: {unit:#}"))
    }

    /// The words of the manager's log.
    pub fn events(&self) -> String {
        std::fs::read_to_string(self.bed.directory().join("manager.log")).unwrap()
    }

    pub fn until<T>(&self, what: &str, mut get: impl FnMut(&Self) -> Option<T>) -> T {
        let began = Instant::now();
        loop {
            if let Some(value) = get(self) {
                return value;
            }
            if began.elapsed() > PATIENCE {
                panic!("{what}\n{}\n{:#}", self.manager.last_lines(40), self.status());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Until nothing is under way; the era in force.
    pub fn settled(&self) -> u64 {
        self.until("all is done", |all| {
            let plan = &all.status()["plan"];
            let done = plan["stage"] == "idle" && plan["accepted"].as_array().unwrap().is_empty();
            done.then(|| plan["era"].as_u64()).flatten()
        })
    }

    /// Connections of the client to the server, of this kind.
    pub fn traffic(&self, options: impl FnOnce(client::Options) -> client::Options) -> Churn {
        self.traffic_to(PORT, options)
    }

    /// The same to a server at another port.
    pub fn traffic_to(&self, port: u16, options: impl FnOnce(client::Options) -> client::Options) -> Churn {
        let to = SocketAddr::new(bed::SERVERS[0].into(), port);
        let servers = vec![server::start(Some(&self.bed.server), to).unwrap()];
        let options = options(client::Options::new(to, 5));
        Churn { client: client::start(Some(&self.bed.client), options).unwrap(), servers }
    }
}

/// A unit of the manager's status.
pub fn unit(status: &Value, node: u16) -> Option<&Value> {
    status["units"].as_array()?.iter().find(|unit| unit["node"] == node)
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
