//! A manager and real units with connections that deliver at once, a store, and a clock that is turned by hand.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use steering::table::BucketTable;

use crate::manager::*;
use crate::message::{Message, Role};
use crate::unit::{Action, Figures, Identity, Unit};

pub const KEY: [u8; 40] = [0x3c; 40];

/// Digest of a token, and when it is used.
pub type TokenUse = ([u8; 32], u64);

/// A unit and what its cores would have.
pub struct Sim {
    pub unit: Unit,
    pub connection: Option<u64>,
    pub live: Vec<u32>,
    pub in_use: u64,
    /// Its cores take snapshots over at once.
    pub takes_over: bool,
    /// It tells no figures.
    pub mute: bool,
    /// It sends nothing.
    pub stalled: bool,
    /// Its backup has copies of all flows as soon as one is named.
    pub copies: bool,
    /// Flows that were others'.
    pub inherited: u32,
    /// Units whose flows it took over.
    pub heir_of: Vec<u16>,
    pub forgot: usize,
    pub left: usize,
    pub refused: Vec<crate::message::Refusal>,
    /// Key that it proves, with the digest of its token and the time at which it uses that.
    pub key: Option<([u8; 32], Option<TokenUse>)>,
    /// Messages that came, by kind.
    pub got: Vec<&'static str>,
}

pub struct Cluster {
    pub manager: Manager,
    pub settings: Settings,
    pub store: Vec<u8>,
    pub disk_full: bool,
    /// Nothing is written or refused until this is false again.
    pub disk_slow: bool,
    slow: Option<(u64, Vec<u8>)>,
    pub units: BTreeMap<u16, Sim>,
    pub now_ms: u64,
    pub answers: Vec<Result<u64, CommandError>>,
    pub events: Vec<String>,
    connections: u64,
}

pub fn address(node: u16) -> IpAddr {
    Ipv4Addr::from(0x0a63_0000 + u32::from(node)).into()
}

pub fn settings() -> Settings {
    let pool = vec![(address(0), 16)];
    Settings { buckets: 64, start_grace_ns: 1_000 * MS, pool, ..Settings::default() }
}

pub fn add(node: u16, role: Role) -> Step {
    Step::Add { node, enrol: Some((address(node), role)), weight: None }
}

pub fn kind(message: &Message) -> &'static str {
    match message {
        Message::Welcome(welcome) if welcome.whole.is_some() => "welcome",
        Message::Welcome(_) => "free",
        Message::Prepare(_) => "prepare",
        Message::Commit { .. } => "commit",
        Message::Retire { .. } => "retire",
        Message::Refused(_) => "refused",
        Message::Goodbye => "goodbye",
        _ => "a unit's",
    }
}

impl Cluster {
    pub fn new(settings: Settings) -> Self {
        Self {
            manager: Manager::new(settings.clone(), KEY, 0),
            settings,
            store: Vec::new(),
            disk_full: false,
            disk_slow: false,
            slow: None,
            units: BTreeMap::new(),
            now_ms: 0,
            answers: Vec::new(),
            events: Vec::new(),
            connections: 0,
        }
    }

    /// Data planes 1 to `planes` and dispatcher 100, in one command, in force.
    pub fn with(planes: u16) -> Self {
        Self::with_settings(planes, settings())
    }

    /// The same with other settings.
    pub fn with_settings(planes: u16, settings: Settings) -> Self {
        let mut cluster = Self::new(settings);
        cluster.command(Command::Configure {
            interfaces: Vec::new(),
            outside: vec!["192.0.2.1".parse().unwrap()],
        });
        let mut steps: Vec<Step> = (1..=planes).map(|node| add(node, Role::DataPlane)).collect();
        steps.push(add(100, Role::Dispatcher));
        cluster.command(Command::Change(steps));
        for node in 1..=planes {
            cluster.start(node, Role::DataPlane, 7);
        }
        cluster.start(100, Role::Dispatcher, 7);
        cluster.pass(1_100);
        assert_eq!(cluster.manager.stage(), Stage::Idle, "{:?}", cluster.events);
        assert_eq!(cluster.in_force(), vec![Some(0); usize::from(planes) + 1]);
        // They forgot what they did not have when they joined.
        cluster.units.values_mut().for_each(|sim| sim.forgot = 0);
        cluster
    }

    pub fn now_ns(&self) -> u64 {
        self.now_ms * MS
    }

    /// A process starts and connects.
    pub fn start(&mut self, node: u16, role: Role, instance: u64) {
        self.start_with(node, role, instance, None, None);
    }

    /// The same with a key that it proves, and a token.
    pub fn start_with(
        &mut self,
        node: u16,
        role: Role,
        instance: u64,
        key: Option<[u8; 32]>,
        token: Option<TokenUse>,
    ) {
        let sim = Sim {
            unit: Unit::new(Identity { node, role, weight: 1, instance }).with_key(key),
            key: key.map(|key| (key, token)),
            connection: None,
            live: vec![0; self.settings.buckets],
            in_use: 0,
            takes_over: true,
            mute: false,
            stalled: false,
            copies: true,
            inherited: 0,
            heir_of: Vec::new(),
            forgot: 0,
            left: 0,
            refused: Vec::new(),
            got: Vec::new(),
        };
        self.units.insert(node, sim);
        self.connect(node);
    }

    pub fn connect(&mut self, node: u16) {
        self.disconnect(node);
        self.connections += 1;
        let connection = self.connections;
        self.manager.connected(connection, address(node));
        let sim = self.units.get_mut(&node).unwrap();
        sim.connection = Some(connection);
        let actions = sim.unit.connected();
        self.act(node, actions);
        self.run();
    }

    pub fn disconnect(&mut self, node: u16) {
        let sim = self.units.get_mut(&node).unwrap();
        sim.unit.disconnected();
        if let Some(connection) = sim.connection.take() {
            self.manager.disconnected(connection);
        }
        self.run();
    }

    /// The process is gone, and its connection with it.
    pub fn kill(&mut self, node: u16) {
        self.disconnect(node);
        self.units.remove(&node);
    }

    pub fn command(&mut self, command: Command) -> Option<Result<u64, CommandError>> {
        let before = self.answers.len();
        self.manager.command(self.now_ns(), 1, command);
        self.run();
        self.answers.get(before).cloned()
    }

    pub fn step(&mut self, step: Step) -> Result<u64, CommandError> {
        self.command(Command::Change(vec![step])).expect("an answer")
    }

    /// The manager ends, and another one starts with what was stored; units connect again.
    pub fn restart(&mut self) {
        let state = if self.store.is_empty() { State::new(KEY) } else { State::decode(&self.store).unwrap() };
        self.slow = None;
        self.manager = Manager::resume(self.settings.clone(), state, self.now_ns());
        let nodes: Vec<u16> = self.units.keys().copied().collect();
        for node in &nodes {
            let sim = self.units.get_mut(node).unwrap();
            sim.connection = None;
            sim.unit.disconnected();
        }
        for node in nodes {
            self.connect(node);
        }
    }

    /// Time passes in steps of a tick, with heartbeats, and reports every 200 ms.
    pub fn pass(&mut self, ms: u64) {
        let end = self.now_ms + ms;
        while self.now_ms < end {
            self.now_ms += 20;
            let nodes: Vec<u16> = self.units.keys().copied().collect();
            for node in nodes {
                let now_ns = self.now_ns();
                let report = self.now_ms.is_multiple_of(200);
                let Some(sim) = self.units.get_mut(&node) else { continue };
                if sim.stalled {
                    continue;
                }
                let mut actions = sim.unit.tick(now_ns);
                if report && !sim.mute {
                    let (live, in_use) = (sim.live.clone(), sim.in_use);
                    let copies = sim.unit.snapshot().filter(|_| sim.copies).map(|told| &told.copies);
                    let backup = copies.and_then(|copies| copies.iter().find(|pair| pair.unit == node));
                    let figures = Figures {
                        live: &live,
                        in_use,
                        load_percent: 10,
                        second_hops: 1,
                        packets: 2,
                        copied_to: backup.map(|pair| pair.heir),
                        inherited: sim.inherited,
                    };
                    actions.extend(sim.unit.report(&figures));
                }
                self.act(node, actions);
                self.run();
            }
            let now_ns = self.now_ns();
            self.manager.tick(now_ns);
            self.run();
        }
    }

    /// Carries out what the manager wants, until it wants nothing more.
    pub fn run(&mut self) {
        loop {
            if !self.disk_slow
                && let Some((number, state)) = self.slow.take()
            {
                self.write(number, state);
            }
            let outputs = self.manager.outputs();
            if outputs.is_empty() {
                break;
            }
            for output in outputs {
                match output {
                    Output::Persist { number, state } if self.disk_slow => self.slow = Some((number, state)),
                    Output::Persist { number, state } => self.write(number, state),
                    Output::Send { connection, message } => self.deliver(connection, &message),
                    Output::Close { connection } => {
                        if let Some(node) = self.node_of(connection) {
                            self.disconnect(node);
                        }
                    }
                    Output::Answer { result, .. } => self.answers.push(result),
                    Output::Event(event) => self.events.push(format!("{:?}: {}", event.node, event.text)),
                }
            }
        }
    }

    fn write(&mut self, number: u64, state: Vec<u8>) {
        let now_ns = self.now_ns();
        if self.disk_full {
            self.manager.persist_failed(now_ns, number, "no space left");
        } else {
            self.store = state;
            self.manager.persisted(now_ns, number);
        }
    }

    fn node_of(&self, connection: u64) -> Option<u16> {
        self.units.iter().find(|(_, sim)| sim.connection == Some(connection)).map(|(node, _)| *node)
    }

    fn deliver(&mut self, connection: u64, message: &Message) {
        let Some(node) = self.node_of(connection) else { return };
        let mut bytes = Vec::new();
        message.encode(&mut bytes).unwrap();
        let message = Message::decode(&bytes[4..]).unwrap();
        let now_ns = self.now_ns();
        let sim = self.units.get_mut(&node).unwrap();
        sim.got.push(kind(&message));
        let actions = sim.unit.receive(now_ns, message);
        self.act(node, actions);
    }

    pub fn act(&mut self, node: u16, actions: Vec<Action>) {
        for action in actions {
            let now_ns = self.now_ns();
            let Some(sim) = self.units.get_mut(&node) else { return };
            match action {
                Action::Publish(snapshot) if sim.takes_over => {
                    let actions = sim.unit.took_over(snapshot.number);
                    self.act(node, actions);
                }
                Action::Publish(_) => {}
                Action::ForgetFlows => {
                    sim.forgot += 1;
                    sim.live.fill(0);
                    sim.in_use = 0;
                }
                Action::Inherit(units) => sim.heir_of.extend(units),
                Action::Leave => sim.left += 1,
                Action::Refused(reason) => sim.refused.push(reason),
                Action::Prove { .. } => {
                    if let (Some(connection), Some((key, token))) = (sim.connection, sim.key) {
                        self.manager.proved(now_ns, connection, key, token);
                    }
                }
                Action::Send(Message::Identify { .. }) => {
                    // Who checks proofs asks for one.
                    let actions = sim.unit.receive(now_ns, Message::Challenge { nonce: [7; 32] });
                    self.act(node, actions);
                }
                Action::Send(message) => {
                    if let Some(connection) = sim.connection {
                        self.manager.receive(now_ns, connection, message);
                    }
                }
            }
        }
    }

    /// The cores of a unit that hesitates take over what it published last.
    pub fn take_over(&mut self, node: u16) {
        let sim = self.units.get_mut(&node).unwrap();
        let Some(snapshot) = sim.unit.snapshot() else { return };
        let number = snapshot.number;
        let actions = sim.unit.took_over(number);
        self.act(node, actions);
        self.run();
    }

    /// Era in force of every unit that runs, by node.
    pub fn in_force(&self) -> Vec<Option<u32>> {
        self.units.values().map(|sim| sim.unit.snapshot().map(|snapshot| snapshot.units.in_force)).collect()
    }

    pub fn table(&self) -> &BucketTable {
        self.manager.state().newest().unwrap()
    }

    pub fn owned(&self) -> Vec<usize> {
        self.units.keys().map(|node| self.table().count(*node)).collect()
    }

    pub fn standing(&self, node: u16) -> Standing {
        self.manager.state().units[&node].standing
    }

    pub fn said(&self, text: &str) -> bool {
        self.events.iter().any(|event| event.contains(text))
    }
}
