//! A cluster larger than any machine here: the product's manager, units and dispatch, with hundreds of units and millions
//! of flows, through a day of churn (rows D4–D7).
//!
//! Not a model of the decisions but the decisions: [`cluster::manager::Manager`], [`cluster::unit::Unit`] and
//! [`steering::units::Units`] as the program runs them. Around them everything that may go wrong between machines: messages
//! that come late, connections that break with what was under way, heartbeats that are lost, cores that take a snapshot over
//! late, processes that stand still or die, a manager that starts again from its store. In the order in which things happen:
//!
//! * `wires`: what is under way, and its delays;
//! * `machines`: units with their cores, and the way of a packet through them;
//! * `flows`: ten million flows, each with its own key, holder and end;
//! * `script`: what an operator and chance do;
//! * [`report`]: what came of it, as text and as a picture.
//!
//! While a change is under way time passes in ticks of the manager, and each flow that begins sends two packets whose hops
//! take time. Between changes only flows begin and end, at once. All packets of a bucket's flows that one unit has go one
//! way, so a check sends one packet for each (bucket, holder) and speaks for every flow.

use std::net::IpAddr;
use std::sync::Arc;

use cluster::manager::{Command, Manager, Output, Settings, Stage, State, Step};
use cluster::message::{Message, Role};
use cluster::unit::Action;
use packet::flow::FlowKey;
use steering::table::NODE_BUCKETS;
use steering::units::LEASE_PORTS;

mod check;
mod flows;
mod machines;
pub mod report;
mod script;
mod wires;

use flows::Flows;
use machines::{CORES, End, Machine};
pub use report::Report;
use script::Script;
use wires::{Happening, Wires};

/// Nobody.
const NOBODY: u16 = u16::MAX;

/// Nanoseconds of a millisecond, and of a second.
const MS: u64 = 1_000_000;
const SECOND: u64 = 1_000 * MS;

/// Time between two ticks of the manager, as in the program.
const TICK: u64 = 20 * MS;

/// A change is watched at least so long.
const WATCH: u64 = 2 * SECOND;

/// Outside addresses, from 198.18.0.1 on.
const OUTSIDE: u8 = 64;

/// Size of a run.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// Start of everything random.
    pub seed: u64,
    /// Data planes at most, 5 or more.
    pub planes: u16,
    /// Dispatchers, at least 1.
    pub dispatchers: u16,
    /// Flows at one time, at most 2^24.
    pub flows: u32,
    /// Buckets of the cluster's table, a power of two.
    pub buckets: usize,
    /// Virtual time in seconds.
    pub seconds: u32,
    /// Scale events in that time.
    pub events: u32,
    /// Chains are cut: earlier owners are not asked. Shows that the run can tell a broken flow.
    pub without_chains: bool,
}

impl Scenario {
    /// A day; `docs/scaling.md` has a sixth of it.
    pub const DAY: Self = Self {
        seed: 1,
        planes: 242,
        dispatchers: 8,
        flows: 10_000_000,
        buckets: NODE_BUCKETS,
        seconds: 86_400,
        events: 240,
        without_chains: false,
    };
}

/// The simulation at one moment.
struct World {
    scenario: Scenario,
    rng: fastrand::Rng,
    now_ns: u64,
    manager: Manager,
    settings: Settings,
    store: Vec<u8>,
    machines: Vec<Machine>,
    wires: Wires,
    flows: Flows,
    /// A flow's key of each bucket.
    keys: Vec<FlowKey>,
    script: Script,
    report: Report,
    /// A change is watched until then, and longer while it is under way.
    watch_until_ns: u64,
}

/// Runs a scenario. `progress` is called every ten virtual minutes.
#[must_use]
pub fn run(scenario: Scenario, progress: &mut dyn FnMut(&Report)) -> Report {
    let mut world = World::new(scenario);
    world.form();
    world.fill();
    let start_ns = world.now_ns;
    let end_ns = start_ns + u64::from(scenario.seconds) * SECOND;
    world.script = Script::new(&scenario, start_ns, &mut world.rng);
    world.report.start_ns = start_ns;
    let mut progress_ns = start_ns;
    while world.now_ns < end_ns {
        if world.is_watched() {
            world.tick();
        } else {
            world.pass(end_ns);
        }
        if world.now_ns >= progress_ns {
            progress_ns += 600 * SECOND;
            world.report.now_ns = world.now_ns;
            progress(&world.report);
        }
    }
    world.finish()
}

impl World {
    fn new(scenario: Scenario) -> Self {
        let mut rng = fastrand::Rng::with_seed(scenario.seed);
        let settings =
            Settings { buckets: scenario.buckets, pool: vec![(bus_address(0), 16)], ..Settings::default() };
        let key = std::array::from_fn(|_| rng.u8(..));
        let count = scenario.planes + scenario.dispatchers;
        let role = |node| if node > scenario.planes { Role::Dispatcher } else { Role::DataPlane };
        // Node ids from 1.
        let machines = (0..=count).map(|node| Machine::new(node, role(node), scenario.buckets)).collect();
        Self {
            keys: flows::key_of_each_bucket(key, scenario.buckets),
            manager: Manager::new(settings.clone(), key, 0),
            settings,
            store: Vec::new(),
            machines,
            wires: Wires::default(),
            flows: Flows::new(&scenario, key),
            script: Script::default(),
            report: Report::new(scenario),
            watch_until_ns: 0,
            now_ns: 0,
            rng,
            scenario,
        }
    }

    /// The cluster comes up with most of its data planes.
    fn form(&mut self) {
        let outside = (1..=OUTSIDE).map(|last| IpAddr::from([198, 18, 0, last])).collect();
        self.manager.command(0, 0, Command::Configure { interfaces: Vec::new(), outside });
        let first = self.scenario.planes * 7 / 8;
        let nodes =
            (1..=first).chain(self.scenario.planes + 1..=self.scenario.planes + self.scenario.dispatchers);
        let nodes: Vec<u16> = nodes.collect();
        let steps = nodes.iter().map(|node| self.enrol(*node)).collect();
        self.manager.command(0, 0, Command::Change(steps));
        for node in nodes {
            self.start(node);
        }
        self.watch();
        while self.is_watched() || self.manager.state().table.is_none() {
            self.tick();
        }
    }

    fn enrol(&self, node: u16) -> Step {
        let role = self.machines[usize::from(node)].role;
        Step::Add { node, enrol: Some((bus_address(node), role)), weight: Some(1_000) }
    }

    /// All flows begin, spread over what they would be at any time of a day.
    fn fill(&mut self) {
        for slot in 0..self.scenario.flows {
            self.begin(slot, false);
            let left = self.flows.lifetime(slot, &mut self.rng);
            let left = self.rng.u32(0..=left);
            self.flows.end_after(slot, self.second(), left);
        }
    }

    fn second(&self) -> u32 {
        (self.now_ns / SECOND) as u32
    }

    fn watch(&mut self) {
        self.watch_until_ns = self.watch_until_ns.max(self.now_ns + WATCH);
    }

    /// Whether something is under way that takes time.
    fn is_watched(&self) -> bool {
        let status = self.manager.state();
        let waiting = !status.accepted.is_empty() && self.manager.waits().is_none();
        self.now_ns < self.watch_until_ns
            || self.manager.stage() != Stage::Idle
            || waiting
            || self.wires.has_messages()
    }

    /// 20 ms of a change.
    fn tick(&mut self) {
        let end_ns = self.now_ns + TICK;
        let stage = self.manager.stage();
        self.script_until(end_ns);
        while let Some((at_ns, happening)) = self.wires.pop(end_ns) {
            self.now_ns = at_ns;
            self.happens(happening);
        }
        self.now_ns = end_ns;
        if end_ns.is_multiple_of(SECOND) {
            self.end_flows(true);
            self.report_figures();
        }
        for node in 1..self.machines.len() as u16 {
            let machine = &mut self.machines[usize::from(node)];
            if machine.running && machine.stalled_until_ns <= end_ns {
                let actions = machine.unit.tick(end_ns);
                self.act(node, actions);
            }
        }
        self.manager.tick(end_ns);
        self.carry_out();
        self.report.note_stage(self.now_ns, stage, self.manager.stage());
        if self.now_ns.is_multiple_of(500 * MS) {
            self.check(false);
        }
        if !self.is_watched() {
            self.check(true);
        }
    }

    /// Time until something happens, a minute at most.
    fn pass(&mut self, end_ns: u64) {
        // Figures and packets that are still under way.
        loop {
            let rest = self.wires.take_rest();
            if rest.is_empty() {
                break;
            }
            rest.into_iter().for_each(|happening| self.happens(happening));
        }
        if self.is_watched() {
            return;
        }
        let next_ns = self.script.next_ns().min(self.wires.next_ns()).min(end_ns);
        let target_ns = next_ns.min(self.now_ns + 60 * SECOND);
        // To a tick.
        let target_ns = target_ns.next_multiple_of(TICK).max(self.now_ns + TICK);
        while self.now_ns / SECOND < target_ns / SECOND {
            self.now_ns = (self.now_ns / SECOND + 1) * SECOND;
            self.end_flows(false);
        }
        self.now_ns = target_ns;
        if target_ns < next_ns {
            self.sample();
        }
        if next_ns <= target_ns || self.report.samples.len().is_multiple_of(5) {
            // A change begins, or reports are due.
            self.watch_until_ns = self.watch_until_ns.max(self.now_ns + 600 * MS);
            self.report_figures();
        }
    }

    /// Flows that end in this second are followed by others; who got no answer tries again.
    fn end_flows(&mut self, slowly: bool) {
        let second = self.second();
        let mut next = self.flows.take_ending(second);
        while let Some(slot) = next {
            next = self.flows.following(slot);
            let holder = self.flows.end(slot);
            if let Some(machine) = self.machines.get_mut(usize::from(holder)) {
                machine.note_flow(self.flows.bucket(slot), self.flows.block(slot), -1);
            }
            self.flows.renew(slot);
            let life = self.flows.lifetime(slot, &mut self.rng);
            self.flows.end_after(slot, second, life);
            self.begin(slot, slowly);
        }
        for slot in self.flows.take_lost() {
            self.flows.renew(slot);
            self.begin(slot, slowly);
        }
        for (slot, generation) in self.flows.take_waiting(second) {
            if self.flows.generation(slot) == generation && self.flows.holder(slot) == NOBODY {
                self.report.flows.tried_again += 1;
                self.begin(slot, slowly);
            }
        }
    }

    /// A client begins a flow. Slowly: two packets of it come to dispatchers and go on from there.
    fn begin(&mut self, slot: u32, slowly: bool) {
        self.report.flows.begun += 1;
        if !slowly {
            if !self.begin_at_once(slot) {
                self.flows.wait(slot, self.second() + 1);
            }
            return;
        }
        let at_ns = self.now_ns + self.rng.u64(0..SECOND);
        let generation = self.flows.generation(slot);
        for at_ns in [at_ns, at_ns + self.rng.u64(0..300 * MS)] {
            self.wires.push(at_ns, Happening::First { slot, generation });
        }
        self.flows.wait(slot, self.second() + 3);
    }

    fn begin_at_once(&mut self, slot: u32) -> bool {
        let key = self.flows.key(slot);
        let dispatcher = self.any_dispatcher();
        let core = slot as usize % CORES;
        match self.walk(&key, dispatcher, core, NOBODY) {
            End::Begins { unit, .. } => {
                self.hold(slot, unit, core);
                true
            }
            _ => false,
        }
    }

    /// A unit begins a flow: with a port of its own, one in five.
    fn hold(&mut self, slot: u32, unit: u16, core: usize) {
        let machine = &mut self.machines[usize::from(unit)];
        let blocks = &machine.cores[core].blocks;
        let translated = slot.is_multiple_of(5) && !blocks.is_empty();
        let block = translated.then(|| {
            let lease = &blocks[self.rng.usize(..blocks.len())];
            lease_number(lease.address, lease.block)
        });
        self.flows.hold(slot, unit, block);
        machine.note_flow(self.flows.bucket(slot), block, 1);
    }

    fn any_dispatcher(&mut self) -> u16 {
        self.scenario.planes + 1 + self.rng.u16(..self.scenario.dispatchers)
    }

    /// A process starts.
    fn start(&mut self, node: u16) {
        let instance = self.rng.u64(..);
        self.machines[usize::from(node)].start(node, instance);
        self.connect(node);
    }

    fn connect(&mut self, node: u16) {
        self.report.faults.connections += 1;
        let connection = self.report.faults.connections;
        let machine = &mut self.machines[usize::from(node)];
        if !machine.running {
            return;
        }
        machine.connection = Some(connection);
        machine.last_ns = [self.now_ns; 2];
        self.manager.connected(connection, bus_address(node));
        let actions = machine.unit.connected();
        self.act(node, actions);
        self.carry_out();
    }

    /// A connection ends; a unit connects again at once, and so often until it can.
    fn disconnect(&mut self, node: u16) {
        let machine = &mut self.machines[usize::from(node)];
        let Some(connection) = machine.connection.take() else { return };
        machine.unit.disconnected();
        self.manager.disconnected(connection);
        self.carry_out();
        let again_ns = self.now_ns + self.rng.u64(MS..20 * MS);
        self.wires.push(again_ns, Happening::Connect { node });
    }

    /// A process dies with its flows.
    fn crash(&mut self, node: u16) {
        let machine = &mut self.machines[usize::from(node)];
        machine.running = false;
        machine.connection = None;
        machine.unit.disconnected();
        self.report.note(self.now_ns, &format!("{node:5} dies"));
        self.report.faults.crashes += 1;
        self.report.flows.lost_by_crash += self.drop_flows(node);
        let again_ns = self.now_ns + SECOND * self.rng.u64(30..300);
        self.wires.push(again_ns, Happening::Start { node });
        self.watch();
    }

    /// All flows of a unit are gone; their clients begin anew.
    fn drop_flows(&mut self, node: u16) -> u64 {
        self.machines[usize::from(node)].clear();
        self.flows.drop_of(node)
    }

    /// Everything that units report once a second.
    fn report_figures(&mut self) {
        for node in 1..self.machines.len() as u16 {
            let machine = &mut self.machines[usize::from(node)];
            if machine.running && machine.connection.is_some() {
                let actions = machine.report();
                self.act(node, actions);
            }
        }
        self.carry_out();
    }

    fn happens(&mut self, happening: Happening) {
        match happening {
            Happening::ToManager { connection, message } => {
                self.manager.receive(self.now_ns, connection, *message);
            }
            Happening::ToUnit { node, connection, message } => {
                let machine = &mut self.machines[usize::from(node)];
                if machine.connection == Some(connection) {
                    let actions = machine.unit.receive(self.now_ns, *message);
                    self.act(node, actions);
                }
            }
            Happening::TakeOver { node, instance, core, snapshot } => {
                let machine = &mut self.machines[usize::from(node)];
                if machine.running && machine.instance == instance {
                    let without_chains = self.scenario.without_chains;
                    let actions = machine.take_over(core, &snapshot, without_chains);
                    self.act(node, actions);
                }
            }
            Happening::Written { number, state, restarts } => {
                if restarts == self.report.faults.manager_restarts {
                    self.store = state;
                    self.manager.persisted(self.now_ns, number);
                }
            }
            Happening::Connect { node } if self.machines[usize::from(node)].connection.is_none() => {
                self.connect(node);
            }
            Happening::Connect { .. } => {}
            Happening::Start { node } => {
                // It may have been started to take part again.
                if !self.machines[usize::from(node)].running {
                    self.watch();
                    self.start(node);
                }
            }
            Happening::First { slot, generation } => self.first_packet(slot, generation),
            Happening::Packet(flight) => self.packet(flight),
        }
        self.carry_out();
    }

    /// Does what the manager wants.
    fn carry_out(&mut self) {
        loop {
            let outputs = self.manager.outputs();
            if outputs.is_empty() {
                return;
            }
            for output in outputs {
                self.output(output);
            }
        }
    }

    fn output(&mut self, output: Output) {
        match output {
            Output::Persist { number, state } => {
                let at_ns = self.now_ns + self.rng.u64(MS..30 * MS);
                let restarts = self.report.faults.manager_restarts;
                self.wires.push(at_ns, Happening::Written { number, state, restarts });
            }
            Output::Send { connection, message } => {
                let place = self.machines.iter().position(|machine| machine.connection == Some(connection));
                if let Some(node) = place {
                    self.send(node as u16, 1, connection, message);
                }
            }
            Output::Close { connection } => {
                let place = self.machines.iter().position(|machine| machine.connection == Some(connection));
                if let Some(node) = place {
                    self.disconnect(node as u16);
                }
            }
            Output::Answer { result, .. } => self.report.faults.refused += u64::from(result.is_err()),
            Output::Event(event) => self.report.note_event(self.now_ns, &event),
        }
    }

    /// A message over a connection, in order; sometimes it breaks.
    fn send(&mut self, node: u16, direction: usize, connection: u64, message: Message) {
        let delay = wires::delay(&mut self.rng);
        let machine = &mut self.machines[usize::from(node)];
        let at_ns = (self.now_ns + delay).max(machine.stalled_until_ns).max(machine.last_ns[direction]);
        machine.last_ns[direction] = at_ns;
        let message = Box::new(message);
        let happening = if direction == 1 {
            Happening::ToUnit { node, connection, message }
        } else {
            Happening::ToManager { connection, message }
        };
        // During formation everything is whole.
        if self.report.start_ns > 0 && self.rng.u32(..2_000) == 0 {
            self.report.faults.broken_connections += 1;
            self.disconnect(node);
        } else {
            self.wires.push(at_ns, happening);
        }
    }

    /// Does what a unit wants.
    fn act(&mut self, node: u16, actions: Vec<Action>) {
        for action in actions {
            let place = usize::from(node);
            match action {
                Action::Publish(snapshot) => {
                    let snapshot = Arc::new(snapshot);
                    for core in 0..CORES {
                        let machine = &self.machines[place];
                        let late = wires::core_delay(&mut self.rng);
                        let at_ns = (self.now_ns + late).max(machine.stalled_until_ns);
                        let (instance, snapshot) = (machine.instance, Arc::clone(&snapshot));
                        self.wires.push(at_ns, Happening::TakeOver { node, instance, core, snapshot });
                    }
                }
                // Machines of the simulation send no copies.
                Action::Inherit(_) => {}
                Action::ForgetFlows => {
                    let forgotten = self.drop_flows(node);
                    self.report.flows.forgotten += forgotten;
                }
                Action::Leave => {
                    let forgotten = self.drop_flows(node);
                    self.report.flows.forgotten += forgotten;
                    self.machines[place].leave();
                }
                Action::Send(message @ Message::Heartbeat { .. }) => {
                    let lost = self.rng.u32(..1_000) == 0;
                    if let Some(connection) = self.machines[place].connection.filter(|_| !lost) {
                        let at_ns = self.now_ns + self.rng.u64(MS / 10..20 * MS);
                        let message = Box::new(message);
                        self.wires.push(at_ns, Happening::ToManager { connection, message });
                    }
                }
                Action::Send(message) => {
                    if let Some(connection) = self.machines[place].connection {
                        self.send(node, 0, connection, message);
                    }
                }
                // Its units have no keys.
                Action::Prove { .. } => {}
                Action::Refused(reason) => self.report.lines.push(format!("{node}: {}", reason.text())),
            }
        }
    }

    /// The manager's process ends, and another goes on with what was stored.
    fn restart_manager(&mut self) {
        self.report.faults.manager_restarts += 1;
        if let Ok(state) = State::decode(&self.store) {
            self.manager = Manager::resume(self.settings.clone(), state, self.now_ns);
        }
        for node in 1..self.machines.len() as u16 {
            self.disconnect(node);
        }
        self.watch_until_ns = self.watch_until_ns.max(self.now_ns + 8 * SECOND);
    }

    fn finish(mut self) -> Report {
        self.check(true);
        self.report.now_ns = self.now_ns;
        self.report.waits = self.manager.waits().map(ToString::to_string);
        self.report
    }
}

/// Address of a unit in the bonds: 10.99.0.0 and its node id.
fn bus_address(node: u16) -> IpAddr {
    let [high, low] = node.to_be_bytes();
    IpAddr::from([10, 99, high, low])
}

/// A number of a block of ports, below 4,096.
fn lease_number(address: IpAddr, block: u8) -> u16 {
    let last = match address {
        IpAddr::V4(address) => address.octets()[3],
        IpAddr::V6(_) => 0,
    };
    (u16::from(last) - 1) << 6 | u16::from(block)
}

/// Address and first port of a block.
fn lease_place(number: u16) -> (IpAddr, u16) {
    (IpAddr::from([198, 18, 0, (number >> 6) as u8 + 1]), (number & 63) * LEASE_PORTS)
}
