//! A cluster of this very program in namespaces: manager, dispatchers and data planes, and changes given to the manager over REST.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use manager::api::types::{
    Accepted, Change, ChangeStep, ClusterReport, Configuration, Duty, EventLine, Interface, NewUnit, Plan,
};
use testbed::cluster::{self as bed, ClusterBed, ClusterSpec, FIRST_DATA_PLANE, FIRST_DISPATCHER, MANAGER};
use testbed::program::Program;
use testbed::stop::Stop;

use super::churn::{Kind, Step};
use crate::cluster_commands::Client;

/// Where the manager's REST listens, on its machine.
const API: &str = "127.0.0.1:8470";
const TOKEN: &str = "0123456789abcdef0123456789abcdef";
/// How long the machines may take to join.
const JOIN_MAX: Duration = Duration::from_secs(60);
/// Pause between two looks at a change.
const LOOK: Duration = Duration::from_millis(10);

/// Cluster to build.
pub(crate) struct Spec<'a> {
    pub(crate) dispatchers: u16,
    pub(crate) data_planes: u16,
    /// Sections of all data planes.
    pub(crate) services: &'a str,
    /// Sections of all dispatchers.
    pub(crate) dispatcher_services: &'a str,
    /// More keys of `[manager]`.
    pub(crate) manager: &'a str,
}

/// The machines while they run.
pub(crate) struct Machines {
    // Dropped in this order.
    pub(crate) manager: Program,
    client: Client,
    pub(crate) bed: ClusterBed,
    dispatchers: u16,
}

impl Machines {
    /// Starts all of them; nobody takes part yet.
    pub(crate) fn start(spec: &Spec<'_>) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("find this program")?;
        let Spec { dispatchers, data_planes, services, dispatcher_services, manager } = *spec;
        let spec = ClusterSpec { program: &program, dispatchers, data_planes, services, dispatcher_services };
        let mut bed = ClusterBed::new(&spec)?;
        bed.start()?;
        std::fs::write(bed.directory().join("token"), TOKEN)?;
        let config = bed.directory().join("manager.toml");
        let text = format!(
            "[manager]\nbus = \"{}\"\napi = \"{API}\"\ntoken-file = \"token\"\nstore = \"cluster.redb\"\n{manager}\n",
            bed.manager_address()
        );
        std::fs::write(&config, text)?;
        let config = config.to_str().context("a strange directory for temporary files")?;
        let manager = bed.start_command(MANAGER, &["manager", config], "manager.log")?;
        let client = Client::new(&format!("http://{API}"), TOKEN);
        Ok(Self { manager, client, bed, dispatchers })
    }

    /// Has the dispatchers and these data planes take part.
    pub(crate) fn join(&mut self, planes: &[u16], stop: &Stop) -> anyhow::Result<()> {
        let deadline = Instant::now() + JOIN_MAX;
        while self.plan().is_err() {
            self.alive(stop)?;
            if Instant::now() > deadline {
                bail!("the manager does not answer; it said last:\n{}", self.manager.last_lines(20));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        self.call(|client| Ok(client.send::<Accepted>("PUT", "/v1/config", &configuration())?))?;
        let dispatchers = (0..self.dispatchers).map(|place| (FIRST_DISPATCHER + place, Duty::Dispatcher));
        let planes = planes.iter().map(|node| (*node, Duty::Dataplane));
        let steps = dispatchers.chain(planes).map(|(node, role)| ChangeStep::Add(unit(node, role))).collect();
        self.change(&Change { steps }, stop, deadline)?;
        Ok(())
    }

    /// Fails when one of them has ended, or when all shall.
    pub(crate) fn alive(&mut self, stop: &Stop) -> anyhow::Result<()> {
        if stop.is_raised() {
            bail!("stopped");
        }
        self.manager.check_alive()?;
        self.bed.check_alive()
    }

    /// Gives a change and waits until it is in force; how long that took.
    pub(crate) fn change(
        &mut self,
        change: &Change,
        stop: &Stop,
        deadline: Instant,
    ) -> anyhow::Result<Duration> {
        let began = Instant::now();
        let accepted: Accepted = self.call(|client| Ok(client.send("POST", "/v1/changes", change)?))?;
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
            std::thread::sleep(LOOK);
        }
    }

    /// The change under way.
    pub(crate) fn plan(&self) -> anyhow::Result<Plan> {
        self.call(|client| Ok(client.get("/v1/plan")?))
    }

    /// State of the cluster.
    pub(crate) fn cluster(&self) -> anyhow::Result<ClusterReport> {
        self.call(|client| Ok(client.get("/v1/cluster")?))
    }

    /// The manager's log.
    pub(crate) fn events(&self) -> anyhow::Result<Vec<EventLine>> {
        self.call(|client| Ok(client.get("/v1/events")?))
    }

    /// A call of the manager, on its machine.
    fn call<T: Send>(&self, call: impl FnOnce(&Client) -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
        self.bed.machine(MANAGER)?.node.run(|| call(&self.client))?
    }
}

/// Node ids of the data planes.
pub(crate) fn data_planes(count: u16) -> Vec<u16> {
    (FIRST_DATA_PLANE..FIRST_DATA_PLANE + count).collect()
}

/// The manager's word for a change.
pub(crate) fn change(steps: &[Step]) -> Change {
    let word = |step: &Step| match step.kind {
        Kind::Add => ChangeStep::Add(unit(step.node, Duty::Dataplane)),
        Kind::Drain => ChangeStep::Drain { node: step.node, remove: false, migrate: false },
        Kind::Remove => ChangeStep::Drain { node: step.node, remove: true, migrate: false },
        Kind::Weight(weight) => ChangeStep::Weight { node: step.node, weight },
    };
    Change { steps: steps.iter().map(word).collect() }
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
