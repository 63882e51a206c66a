//! `anabranch demo --cluster`: a manager, two dispatchers and four data planes in namespaces; thousands of real connections
//! through address translation while units come, drain and go; and a report.
//!
//! The machines are this very program: `anabranch up` and `anabranch manager`. Changes are given to the manager over REST.

mod report;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use manager::api::types::{Change, ChangeStep, ClusterReport, Configuration, Duty, Interface, NewUnit, Plan};
use testbed::cluster::{self as bed, ClusterBed, ClusterSpec, FIRST_DATA_PLANE, FIRST_DISPATCHER, MANAGER};
use testbed::program::Program;
use testbed::stop::Stop;
use testbed::traffic::churn::{Churn, client, server};

use super::progress::Progress;
use crate::cluster_commands::Client;
use report::{EventReport, Report};

/// Seconds of traffic unless told otherwise.
pub(super) const SECONDS: u64 = 40;
const DISPATCHERS: u16 = 2;
const DATA_PLANES: u16 = 4;
/// All machines share the CPUs of this one, and whatever else runs here: who is late is not dead.
const DEAD_AFTER_MS: u16 = 3_000;
/// Blocks of 1,024 ports of the outside address for each: all connections have the same destination.
const BLOCKS: u16 = 12;
/// Where the manager's REST listens, on its machine.
const API: &str = "127.0.0.1:8470";
/// How long the machines may take to join.
const JOIN_MAX: Duration = Duration::from_secs(30);
/// Between two changes at least.
const PAUSE: Duration = Duration::from_millis(2_500);
/// TCP and UDP port of the server.
const PORT: u16 = 7_000;
/// A chain that is as long as this is waited for: old flows have to end first.
const CHANGE_MAX: Duration = Duration::from_secs(20);

/// The report as text or JSON, and whether nothing broke.
pub(super) fn perform(
    seconds: u64,
    json: bool,
    stop: &Stop,
    progress: &mut Progress,
) -> anyhow::Result<(String, bool)> {
    progress.step("Building a manager, two dispatchers and four data planes");
    let mut demo = Demo::start()?;
    progress.step("Waiting until they have joined");
    demo.join(stop)?;
    let result = demo.run(seconds, stop, progress);
    let report =
        result.with_context(|| format!("the manager said last:\n{}", demo.manager.last_lines(20)))?;
    if !report.is_clean() {
        progress.note(format!("The manager said:\n{}", demo.manager.last_lines(60)));
    }
    progress.step("Ending the machines");
    drop(demo);
    Ok((if json { report.json()? } else { report.text() }, report.is_clean()))
}

struct Demo {
    // Dropped in this order.
    manager: Program,
    client: Client,
    bed: ClusterBed,
    random: fastrand::Rng,
}

impl Demo {
    fn start() -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("find this program")?;
        let services = "[[nat]]\nout = \"wan\"";
        let spec =
            ClusterSpec { program: &program, dispatchers: DISPATCHERS, data_planes: DATA_PLANES, services };
        let mut bed = ClusterBed::new(&spec)?;
        bed.start()?;
        let token = "0123456789abcdef0123456789abcdef";
        std::fs::write(bed.directory().join("token"), token)?;
        let config = bed.directory().join("manager.toml");
        let text = format!(
            "[manager]\nbus = \"{}\"\napi = \"{API}\"\ntoken-file = \"token\"\nstore = \"cluster.redb\"\ndrain-ms = 500\n\
             blocks-per-unit = {BLOCKS}\ndead-after-ms = {DEAD_AFTER_MS}\n",
            bed.manager_address()
        );
        std::fs::write(&config, text)?;
        let config = config.to_str().context("a strange directory for temporary files")?;
        let manager = bed.start_command(MANAGER, &["manager", config], "manager.log")?;
        let client = Client::new(&format!("http://{API}"), token);
        Ok(Self { manager, client, bed, random: fastrand::Rng::with_seed(7) })
    }

    /// A call of the manager, on its machine.
    fn call<T: Send>(&self, call: impl FnOnce(&Client) -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
        self.bed.machine(MANAGER)?.node.run(|| call(&self.client))?
    }

    fn plan(&self) -> anyhow::Result<Plan> {
        self.call(|client| Ok(client.get("/v1/plan")?))
    }

    fn cluster(&self) -> anyhow::Result<ClusterReport> {
        self.call(|client| Ok(client.get("/v1/cluster")?))
    }

    /// All machines take part, but one data plane that comes later.
    fn join(&mut self, stop: &Stop) -> anyhow::Result<()> {
        let deadline = Instant::now() + JOIN_MAX;
        while self.plan().is_err() {
            self.alive(stop)?;
            if Instant::now() > deadline {
                bail!("the manager does not answer; it said last:\n{}", self.manager.last_lines(20));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        self.call(|client| Ok(client.send("PUT", "/v1/config", &configuration())?))?;
        let dispatchers = (0..DISPATCHERS).map(|place| (FIRST_DISPATCHER + place, Duty::Dispatcher));
        let planes = (0..DATA_PLANES - 1).map(|place| (FIRST_DATA_PLANE + place, Duty::Dataplane));
        let steps = dispatchers.chain(planes).map(|(node, role)| ChangeStep::Add(unit(node, role))).collect();
        self.change(&Change { steps }, stop, deadline)?;
        Ok(())
    }

    fn alive(&mut self, stop: &Stop) -> anyhow::Result<()> {
        if stop.is_raised() {
            bail!("stopped");
        }
        self.manager.check_alive()?;
        self.bed.check_alive()
    }

    /// Gives a change and waits until it is in force; how long that took.
    fn change(&mut self, change: &Change, stop: &Stop, deadline: Instant) -> anyhow::Result<Duration> {
        let began = Instant::now();
        let accepted = self.call(|client| Ok(client.send("POST", "/v1/changes", change)?))?;
        loop {
            self.alive(stop)?;
            let plan = self.plan()?;
            let waits = plan.accepted.contains(&accepted.accepted);
            if !waits && matches!(plan.stage.as_str(), "idle" | "draining") {
                return Ok(began.elapsed());
            }
            if Instant::now() > deadline {
                bail!("the change is not in force: {plan:?}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Traffic, and changes under it.
    fn run(&mut self, seconds: u64, stop: &Stop, progress: &mut Progress) -> anyhow::Result<Report> {
        let to = SocketAddr::new(bed::SERVER.into(), PORT);
        let servers = vec![server::start(Some(&self.bed.server), to)?];
        let options = client::Options {
            short_per_second: 150,
            long: 1_000,
            long_life: Some(Duration::from_secs(20)),
            udp: 50,
            ..client::Options::new(to, 7)
        };
        let side = client::start(Some(&self.bed.client), options)?;
        let mut traffic = Churn { client: side, servers };
        progress.phase("Connections, while units come, drain and go", seconds as f64);
        let (began, end) = (Instant::now(), Duration::from_secs(seconds));
        let (mut events, mut next) = (Vec::new(), Duration::from_secs(4));
        while began.elapsed() < end && !stop.sleep(Duration::from_millis(100)) {
            let figures = traffic.client.figures();
            progress.tick(
                began.elapsed(),
                format!(
                    "{} connections, {} open, {} broken",
                    figures.connections, figures.open, figures.broken
                ),
            );
            if began.elapsed() >= next && began.elapsed() + PAUSE < end {
                let event = self.event(&mut traffic, stop)?;
                progress.message(&event.text);
                events.push(event);
                next = began.elapsed() + PAUSE;
            }
        }
        self.alive(stop)?;
        let status = self.cluster()?;
        progress.step("Bringing all connections to their end");
        Ok(Report::new(&traffic.finish()?, &events, &status))
    }

    /// One change, several units at once now and then.
    fn event(&mut self, traffic: &mut Churn, stop: &Stop) -> anyhow::Result<EventReport> {
        let units = self.cluster()?.units;
        let planes: Vec<(u16, bool)> = (FIRST_DATA_PLANE..FIRST_DATA_PLANE + DATA_PLANES)
            .map(|node| (node, units.iter().any(|unit| unit.node == node && unit.standing == "active")))
            .collect();
        let mut steps = Vec::new();
        let mut active = planes.iter().filter(|(_, active)| *active).count();
        for _ in 0..1 + self.random.usize(..3) / 2 {
            let (node, is_active) = planes[self.random.usize(..planes.len())];
            if steps.iter().any(|(known, _, _)| *known == node) {
                continue;
            }
            if !is_active {
                active += 1;
                steps.push((node, ChangeStep::Add(unit(node, Duty::Dataplane)), format!("{node} comes")));
            } else if active > 1 && self.random.bool() {
                active -= 1;
                steps.push((node, ChangeStep::Drain { node, remove: false }, format!("{node} drains")));
            } else {
                let weight = self.random.u32(1..=3);
                steps.push((
                    node,
                    ChangeStep::Weight { node, weight },
                    format!("{node} gets weight {weight}"),
                ));
            }
        }
        let texts: Vec<String> = steps.iter().map(|(_, _, text)| text.clone()).collect();
        let change = Change { steps: steps.into_iter().map(|(_, step, _)| step).collect() };
        let open = traffic.client.mark().open;
        traffic.servers.iter().for_each(|side| {
            side.mark();
        });
        let took = self.change(&change, stop, Instant::now() + CHANGE_MAX)?;
        let in_force_ms = took.as_secs_f64() * 1e3;
        let text = format!(
            "data plane {}: in force after {in_force_ms:.0} ms, {open} connections open",
            texts.join(", ")
        );
        Ok(EventReport { text, open, in_force_ms })
    }
}

fn unit(node: u16, role: Duty) -> NewUnit {
    NewUnit { node, address: Some(bed::bus_address(node).into()), role: Some(role), weight: Some(1) }
}

fn configuration() -> Configuration {
    let interface = |id, name: &str, mac: [u8; 6], address, outside| Interface {
        id,
        name: name.to_owned(),
        mac: mac.map(|byte| format!("{byte:02x}")).join(":"),
        addresses: vec![format!("{address}/24")],
        outside,
    };
    Configuration {
        interfaces: vec![
            interface(0, "lan", bed::LAN_MAC, bed::LAN, false),
            interface(1, "wan", bed::WAN_MAC, bed::WAN, true),
        ],
        outside: vec![bed::WAN.into()],
    }
}
