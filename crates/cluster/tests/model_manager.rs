//! The product's manager and units, under every order of messages, steps of cores, and faults.
//!
//! A connection delivers in order, until it is cut: then what was under way is lost. Processes die and start anew, the manager starts
//! anew with what it had stored, and writing fails. What `model_packets.rs` relies on must hold of the units' cores all the while.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, Ipv4Addr};

use cluster::manager::{Command, Manager, Output, Settings, Stage, State, Step};
use cluster::message::{Message, Role};
use cluster::unit::{Action as UnitAction, Figures, Identity, Snapshot, Unit};
use stateright::{Checker, Model, Property, UniformChooser};

const MS: u64 = 1_000_000;
const BUCKETS: usize = 4;

/// A unit's process.
#[derive(Clone, Debug)]
struct Process {
    unit: Unit,
    instance: u64,
    /// It is not the first of its unit.
    restarted: bool,
    /// Snapshot that all its cores work by.
    cores: Option<Snapshot>,
    /// The one that they have not taken over.
    published: Option<Snapshot>,
    connection: Option<u64>,
    to_manager: VecDeque<Message>,
    from_manager: VecDeque<Message>,
    /// Flows by bucket, 0 or 1.
    live: [u32; BUCKETS],
}

#[derive(Clone, Debug)]
struct World {
    manager: Manager,
    stored: Vec<u8>,
    writing: Option<(u64, Vec<u8>)>,
    now_ms: u64,
    processes: Vec<Option<Process>>,
    connections: u64,
    /// Commands that were given.
    given: usize,
    /// Faults that may still happen, and how often time passes.
    faults: u8,
    pauses: u8,
    begins: u8,
    /// A core went back to an older era.
    went_back: bool,
}

/// Text of a value, straight into a hash.
struct Print<'a, H>(&'a mut H);

impl<H: Hasher> std::fmt::Write for Print<'_, H> {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.0.write(text.as_bytes());
        Ok(())
    }
}

impl Hash for World {
    /// By what is printed, and by the tables, which are not.
    fn hash<H: Hasher>(&self, state: &mut H) {
        let World { manager, stored, writing, now_ms, processes, connections, .. } = self;
        (stored, writing, now_ms, connections, manager.state().encode()).hash(state);
        (self.given, self.faults, self.pauses, self.begins, self.went_back).hash(state);
        for process in processes.iter().flatten() {
            for snapshot in [&process.cores, &process.published].into_iter().flatten() {
                snapshot.units.eras.newest().encode_with_chains().hash(state);
            }
        }
        let mut print = Print(state);
        write!(print, "{manager:?} {processes:?}").unwrap();
    }
}

impl PartialEq for World {
    fn eq(&self, other: &Self) -> bool {
        format!("{self:?}") == format!("{other:?}")
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Action {
    Command,
    /// The manager reads a unit's next message.
    ToManager(usize),
    FromManager(usize),
    /// All cores of a unit work by what it published.
    TakeOver(usize),
    Write(bool),
    Report(usize),
    Begin(usize, usize),
    End(usize),
    Cut(usize),
    Connect(usize),
    Kill(usize),
    Start(usize),
    RestartManager,
    /// 500 ms, in which all who have a connection send heartbeats.
    Pause,
}

struct Cluster {
    roles: Vec<Role>,
    /// The first is carried out before the model begins.
    commands: Vec<Command>,
    faults: u8,
    pauses: u8,
    begins: u8,
}

fn address(node: usize) -> IpAddr {
    Ipv4Addr::from(0x0a63_0001 + node as u32).into()
}

fn settings() -> Settings {
    Settings {
        buckets: BUCKETS,
        drain_ns: 300 * MS,
        start_grace_ns: 500 * MS,
        acknowledge_within_ns: 800 * MS,
        blocks_per_unit: 1,
        pool: vec![(address(0), 24)],
        ..Settings::default()
    }
}

fn add(node: usize, role: Role) -> Step {
    Step::Add { node: node as u16, enrol: Some((address(node), role)), weight: None }
}

impl Cluster {
    fn start(&self, world: &mut World, at: usize) {
        let instance = world.connections + 1;
        let identity = Identity { node: at as u16, role: self.roles[at], weight: 1, instance };
        world.processes[at] = Some(Process {
            unit: Unit::new(identity),
            instance,
            restarted: world.given > 0,
            cores: None,
            published: None,
            connection: None,
            to_manager: VecDeque::new(),
            from_manager: VecDeque::new(),
            live: [0; BUCKETS],
        });
        self.connect(world, at);
    }

    fn connect(&self, world: &mut World, at: usize) {
        world.connections += 1;
        let connection = world.connections;
        world.manager.connected(connection, address(at));
        let process = world.processes[at].as_mut().unwrap();
        process.connection = Some(connection);
        let actions = process.unit.connected();
        act(process, actions);
    }

    fn now_ns(world: &World) -> u64 {
        world.now_ms * MS
    }

    fn cut(&self, world: &mut World, at: usize) {
        let Some(process) = &mut world.processes[at] else { return };
        process.unit.disconnected();
        process.to_manager.clear();
        process.from_manager.clear();
        if let Some(connection) = process.connection.take() {
            world.manager.disconnected(connection);
        }
    }

    /// Sorts what the manager wants done into the queues.
    fn collect(&self, world: &mut World) {
        for output in world.manager.outputs() {
            let of = |world: &World, connection| {
                let here = |process: &Option<Process>| {
                    process.as_ref().is_some_and(|process| process.connection == Some(connection))
                };
                world.processes.iter().position(here)
            };
            match output {
                Output::Persist { number, state } => world.writing = Some((number, state)),
                Output::Send { connection, message } => {
                    if let Some(process) = of(world, connection).and_then(|at| world.processes[at].as_mut()) {
                        process.from_manager.push_back(message);
                    }
                }
                Output::Close { connection } => {
                    if let Some(at) = of(world, connection) {
                        self.cut(world, at);
                    }
                }
                Output::Answer { .. } | Output::Event(_) => {}
            }
        }
    }

    fn pause(&self, world: &mut World) {
        for _ in 0..5 {
            world.now_ms += 100;
            let now_ns = Self::now_ns(world);
            for process in world.processes.iter().flatten() {
                // Only those whose hello was read: before, a heartbeat has no place.
                let greeted = process.unit.is_connected();
                if let Some(connection) = process.connection.filter(|_| greeted) {
                    world.manager.receive(now_ns, connection, Message::Heartbeat { load_percent: 1 });
                }
            }
            world.manager.tick(now_ns);
            self.collect(world);
        }
    }

    fn step(&self, world: &mut World, action: Action) {
        let now_ns = Self::now_ns(world);
        match action {
            Action::Command => {
                let command = self.commands[world.given].clone();
                world.given += 1;
                world.manager.command(now_ns, 0, command);
            }
            Action::ToManager(at) => {
                let process = world.processes[at].as_mut().unwrap();
                let (message, connection) =
                    (process.to_manager.pop_front().unwrap(), process.connection.unwrap());
                world.manager.receive(now_ns, connection, message);
            }
            Action::FromManager(at) => {
                let process = world.processes[at].as_mut().unwrap();
                let message = process.from_manager.pop_front().unwrap();
                let actions = process.unit.receive(now_ns, message);
                act(process, actions);
            }
            Action::TakeOver(at) => {
                let process = world.processes[at].as_mut().unwrap();
                let snapshot = process.published.take().unwrap();
                let back = |cores: &Snapshot| snapshot.units.in_force < cores.units.in_force;
                world.went_back |= process.cores.as_ref().is_some_and(back);
                let number = snapshot.number;
                process.cores = Some(snapshot);
                let actions = process.unit.took_over(number);
                act(process, actions);
            }
            Action::Write(works) => {
                let (number, state) = world.writing.take().unwrap();
                if works {
                    world.stored = state;
                    world.manager.persisted(now_ns, number);
                } else {
                    world.faults -= 1;
                    world.manager.persist_failed(now_ns, number, "full");
                }
            }
            Action::Report(at) => {
                let process = world.processes[at].as_mut().unwrap();
                let (live, in_use) = (process.live, u64::from(process.live.iter().sum::<u32>()));
                let figures = Figures {
                    live: &live,
                    in_use,
                    load_percent: 1,
                    second_hops: 0,
                    packets: 0,
                    copied_to: None,
                    inherited: 0,
                };
                let actions = process.unit.report(&figures);
                act(process, actions);
            }
            _ => self.fault(world, action),
        }
        self.collect(world);
    }

    /// Faults, flows and time.
    fn fault(&self, world: &mut World, action: Action) {
        let now_ns = Self::now_ns(world);
        match action {
            Action::Begin(at, bucket) => {
                world.begins -= 1;
                world.processes[at].as_mut().unwrap().live[bucket] = 1;
            }
            Action::End(at) => world.processes[at].as_mut().unwrap().live = [0; BUCKETS],
            Action::Cut(at) => {
                world.faults -= 1;
                self.cut(world, at);
            }
            Action::Connect(at) => self.connect(world, at),
            Action::Kill(at) => {
                world.faults -= 1;
                self.cut(world, at);
                world.processes[at] = None;
            }
            Action::Start(at) => self.start(world, at),
            Action::RestartManager => {
                world.faults -= 1;
                for at in 0..world.processes.len() {
                    self.cut(world, at);
                }
                world.writing = None;
                let state = State::decode(&world.stored).unwrap();
                world.manager = Manager::resume(settings(), state, now_ns);
            }
            Action::Pause => {
                world.pauses -= 1;
                self.pause(world);
            }
            _ => {}
        }
    }

    fn faults(&self, world: &World, actions: &mut Vec<Action>) {
        for (at, process) in world.processes.iter().enumerate() {
            match process {
                Some(process) if process.connection.is_some() => {
                    actions.extend([Action::Cut(at), Action::Kill(at)]);
                }
                Some(_) | None => {}
            }
        }
        actions.push(Action::RestartManager);
        if world.writing.is_some() {
            actions.push(Action::Write(false));
        }
    }

    /// Processes that take part: by the manager's word, as the process that joined, without flows that it has to forget.
    fn members<'a>(&self, world: &'a World) -> Vec<(usize, &'a Process)> {
        let units = &world.manager.state().units;
        let here = |(at, process): (usize, &'a Option<Process>)| {
            let unit = units.get(&(at as u16))?;
            let process = process.as_ref().filter(|process| process.instance == unit.instance)?;
            (unit.standing.takes_part() && !unit.forget).then_some((at, process))
        };
        world.processes.iter().enumerate().filter_map(here).collect()
    }
}

/// Carries out what a unit wants.
fn act(process: &mut Process, actions: Vec<UnitAction>) {
    for action in actions {
        match action {
            UnitAction::Publish(snapshot) => process.published = Some(snapshot),
            UnitAction::ForgetFlows => process.live = [0; BUCKETS],
            UnitAction::Leave => {
                process.cores = None;
                process.published = None;
            }
            UnitAction::Send(message) if process.connection.is_some() => {
                process.to_manager.push_back(message);
            }
            UnitAction::Send(_)
            | UnitAction::Prove { .. }
            | UnitAction::Refused(_)
            | UnitAction::Inherit(_) => {}
        }
    }
}

impl Model for Cluster {
    type State = World;
    type Action = Action;

    /// All units are connected, and the first command is in force.
    fn init_states(&self) -> Vec<World> {
        let mut world = World {
            manager: Manager::new(settings(), [0x3c; 40], 0),
            stored: State::new([0x3c; 40]).encode(),
            writing: None,
            now_ms: 0,
            processes: vec![None; self.roles.len()],
            connections: 0,
            given: 0,
            faults: self.faults,
            pauses: self.pauses,
            begins: self.begins,
            went_back: false,
        };
        for at in 0..self.roles.len() {
            self.start(&mut world, at);
        }
        self.step(&mut world, Action::Command);
        loop {
            let mut actions = Vec::new();
            self.messages(&world, &mut actions);
            match actions.first() {
                Some(action) => self.step(&mut world, *action),
                None if world.manager.stage() != Stage::Idle => self.pause(&mut world),
                None => break,
            }
        }
        // Everyone has told that it has no flow, which a later era must not believe.
        for at in 0..self.roles.len() {
            self.step(&mut world, Action::Report(at));
            while world.processes[at].as_ref().is_some_and(|process| !process.to_manager.is_empty()) {
                self.step(&mut world, Action::ToManager(at));
            }
        }
        vec![world]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        self.messages(world, actions);
        if world.given < self.commands.len() && world.writing.is_none() {
            actions.push(Action::Command);
        }
        for (at, process) in world.processes.iter().enumerate() {
            match process {
                None => actions.push(Action::Start(at)),
                Some(process) if process.connection.is_none() => actions.push(Action::Connect(at)),
                Some(_) => {}
            }
            let Some(process) = process else { continue };
            let Some(cores) = &process.cores else { continue };
            let quiet = process.to_manager.is_empty();
            let chained =
                (0..BUCKETS).any(|bucket| cores.units.eras.newest().chain(bucket).contains(&(at as u16)));
            if quiet && chained && cores.units.in_force == cores.units.eras.newest().era() {
                actions.push(Action::Report(at));
            }
            if world.begins > 0 {
                let owns = |bucket: &usize| {
                    cores.units.table_in_force().owner(*bucket) == at as u16 && process.live[*bucket] == 0
                };
                actions.extend((0..BUCKETS).find(owns).map(|bucket| Action::Begin(at, bucket)));
            }
            if process.live.contains(&1) {
                actions.push(Action::End(at));
            }
        }
        if world.pauses > 0 {
            actions.push(Action::Pause);
        }
        if world.faults > 0 {
            self.faults(world, actions);
        }
    }

    fn next_state(&self, last: &World, action: Action) -> Option<World> {
        let mut world = last.clone();
        self.step(&mut world, action);
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always(
                "nobody works by a table that another member does not hold",
                |model: &Self, world: &World| {
                    let members = model.members(world);
                    let newest = members.iter().filter_map(|(_, process)| process.cores.as_ref());
                    let Some(newest) = newest.map(|cores| cores.units.in_force).max() else { return true };
                    // A process that was started in place of another one works by nothing until it holds the newest table.
                    let holds = |process: &Process| match &process.cores {
                        Some(cores) => cores.units.eras.newest().era() >= newest,
                        None => process.restarted,
                    };
                    members.iter().all(|(_, process)| holds(process))
                },
            ),
            Property::always(
                "nobody works by an era that a unit which joins does not hold",
                |_, world: &World| {
                    let Some(change) = &world.manager.state().change else { return true };
                    let era = change.table.era();
                    let works = |process: &Process| {
                        process.cores.as_ref().is_some_and(|cores| cores.units.in_force == era)
                    };
                    let lacks = |at: usize, process: &Process| {
                        let unit = world.manager.state().units.get(&(at as u16));
                        let joins = unit.is_some_and(|unit| unit.forget && unit.standing.takes_part());
                        let held = process.cores.as_ref().map(|cores| cores.units.eras.newest().era());
                        joins && !process.restarted && held < Some(era)
                    };
                    let before = world.manager.state().table.is_some();
                    let all = || {
                        world
                            .processes
                            .iter()
                            .enumerate()
                            .filter_map(|(at, process)| Some((at, process.as_ref()?)))
                    };
                    !before
                        || !all().any(|(_, process)| works(process))
                        || !all().any(|(at, process)| lacks(at, process))
                },
            ),
            Property::always("there are never three eras", |model: &Self, world: &World| {
                let members = model.members(world);
                let cores = || members.iter().filter_map(|(_, process)| process.cores.as_ref());
                let newest = cores().map(|cores| cores.units.eras.newest().era()).max();
                let oldest = cores().map(|cores| cores.units.in_force).min();
                newest <= oldest.map(|oldest| oldest + 1)
            }),
            Property::always(
                "data planes work by an era before dispatchers",
                |model: &Self, world: &World| {
                    let members = model.members(world);
                    let by = |dispatches: bool| {
                        let of =
                            members.iter().filter(move |(at, _)| model.roles[*at].dispatches() == dispatches);
                        of.filter_map(|(_, process)| process.cores.as_ref()).map(|cores| cores.units.in_force)
                    };
                    by(true).max() <= by(false).min() || by(false).next().is_none()
                },
            ),
        ];
        properties.extend(Self::of_tables());
        properties
    }
}

impl Cluster {
    fn of_tables() -> Vec<Property<Self>> {
        vec![
            Property::always("no core goes back", |_, world: &World| !world.went_back),
            Property::always("a live flow's unit is asked", |model: &Self, world: &World| {
                let members = model.members(world);
                members.iter().all(|(at, process)| {
                    let live = (0..BUCKETS).filter(|bucket| process.live[*bucket] > 0);
                    live.clone().all(|bucket| {
                        members.iter().filter_map(|(_, other)| other.cores.as_ref()).all(|cores| {
                            let table = cores.units.eras.newest();
                            table.owner(bucket) == *at as u16 || table.chain(bucket).contains(&(*at as u16))
                        })
                    })
                })
            }),
            Property::always("no two units draw from one block of ports", |model: &Self, world: &World| {
                let members = model.members(world);
                let cores = members.iter().filter_map(|(_, process)| process.cores.as_ref());
                let mut ports: Vec<_> =
                    cores.flat_map(|cores| cores.blocks.iter().map(|lease| lease.block)).collect();
                ports.sort_unstable();
                ports.windows(2).all(|pair| pair[0] != pair[1])
            }),
            Property::always("chains have no repeats and not the owner", |_, world: &World| {
                let Some(table) = world.manager.state().newest() else { return true };
                (0..BUCKETS).all(|bucket| {
                    let chain = table.chain(bucket);
                    let twice = (1..chain.len()).any(|place| chain[..place].contains(&chain[place]));
                    chain.len() <= 4 && !twice && !chain.contains(&table.owner(bucket))
                })
            }),
            Property::sometimes("all that was wanted is in force", |model: &Self, world: &World| {
                let state = world.manager.state();
                let done = state.accepted.is_empty() && world.given == model.commands.len();
                done && state.change.is_none() && world.writing.is_none() && !state.fence
            }),
            Property::sometimes("an earlier owner with a flow stays in the chain", |_, world: &World| {
                let Some(table) = world.manager.state().table.as_ref() else { return false };
                (0..BUCKETS).any(|bucket| !table.chain(bucket).is_empty())
                    && world.manager.state().change.is_none()
            }),
        ]
    }
}

impl Cluster {
    /// Events that are no fault and no wish.
    fn messages(&self, world: &World, actions: &mut Vec<Action>) {
        if world.writing.is_some() {
            actions.push(Action::Write(true));
        }
        for (at, process) in world.processes.iter().enumerate() {
            let Some(process) = process else { continue };
            if !process.to_manager.is_empty() {
                actions.push(Action::ToManager(at));
            }
            if !process.from_manager.is_empty() {
                actions.push(Action::FromManager(at));
            }
            if process.published.is_some() {
                actions.push(Action::TakeOver(at));
            }
        }
    }
}

fn check(model: Cluster) {
    let checker = model.checker().threads(2).spawn_bfs().join();
    checker.assert_properties();
}

#[test]
fn a_unit_joins_with_one_fault() {
    let roles = vec![Role::Both, Role::DataPlane];
    let first = Command::Change(vec![add(0, Role::Both)]);
    let commands = vec![first, Command::Change(vec![add(1, Role::DataPlane)])];
    check(Cluster { roles, commands, faults: 1, pauses: 1, begins: 1 });
}

#[test]
fn a_data_plane_drains_while_another_joins_with_one_fault() {
    let roles = vec![Role::Both, Role::DataPlane];
    let first = Command::Change(vec![add(0, Role::Both)]);
    let drain = Step::Drain { node: 0, remove: true, migrate: false };
    let commands = vec![first, Command::Change(vec![add(1, Role::DataPlane), drain])];
    check(Cluster { roles, commands, faults: 1, pauses: 1, begins: 0 });
}

/// More units than every order could be tried of: many orders, drawn at random.
#[test]
fn three_data_planes_and_two_dispatchers_with_several_faults() {
    let roles = vec![Role::DataPlane, Role::DataPlane, Role::DataPlane, Role::Dispatcher, Role::Dispatcher];
    let steps = vec![
        add(0, Role::DataPlane),
        add(1, Role::DataPlane),
        add(3, Role::Dispatcher),
        add(4, Role::Dispatcher),
    ];
    let commands = vec![
        Command::Change(steps),
        Command::Change(vec![add(2, Role::DataPlane)]),
        Command::Change(vec![Step::Drain { node: 0, remove: true, migrate: false }]),
    ];
    let model = Cluster { roles, commands, faults: 3, pauses: 12, begins: 3 };
    let checker = model
        .checker()
        .threads(2)
        .target_state_count(120_000)
        .timeout(std::time::Duration::from_secs(30))
        .spawn_simulation(7, UniformChooser)
        .join();
    checker.assert_properties();
}
