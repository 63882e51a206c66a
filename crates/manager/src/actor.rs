//! The thread that owns the state machine: everything that happens comes to it as an [`Event`], in order.
//!
//! A plain thread, because writing the store blocks. Events carry the time at which they came, so that a slow disk makes
//! no unit look silent: what waits is looked at before time passes.
//!
//! While another manager leads this one has no state machine: it turns units and operators away, and asks the store again and
//! again. When it does not lead any more it lets go of everything at once, and begins anew.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use cluster::manager::{Command, CommandError, Manager, Output, Settings, State, Status, Token};
use cluster::message::{Message, Refusal};
use cluster::scale::{Scaler, Want};
use tokio::sync::{mpsc, oneshot};

use crate::api::types::EventLine;
use crate::config::{Config, Scaling};
use crate::hooks;
use crate::proofs::{Proofs, unix_s};
use crate::store::{SaveError, Store};

/// Time between two ticks.
const TICK: Duration = Duration::from_millis(10);
/// Time between two signs of life to the units.
const SIGN_EVERY: Duration = Duration::from_secs(1);
/// Time between two looks at how many data planes there are.
const SCALE_EVERY: Duration = Duration::from_secs(1);
/// Time between two campaigns.
const CAMPAIGN_PAUSE: Duration = Duration::from_millis(250);
/// Lines of the log that are kept.
const LINES_MAX: usize = 1_000;
/// Events that wait at most.
pub const EVENTS_MAX: usize = 4_096;

/// Something that happened.
pub enum Event {
    /// A unit connected.
    Connected {
        /// A number of its own.
        connection: u64,
        /// The unit's bus address.
        address: IpAddr,
        /// Where messages to it go; dropped, the connection ends.
        to: mpsc::Sender<Message>,
    },
    /// A connection ended.
    Disconnected(u64),
    /// A heartbeat came by itself.
    Beat {
        /// Whose.
        address: IpAddr,
        /// When.
        at_ns: u64,
        /// The message.
        message: Message,
    },
    /// A message came.
    Received {
        /// The connection.
        connection: u64,
        /// When, ns since the start of the manager.
        at_ns: u64,
        /// The message.
        message: Message,
    },
    /// Somebody wants something.
    Command(Command, oneshot::Sender<Result<u64, CommandError>>),
    /// A token was made.
    Token(Token, oneshot::Sender<Result<u64, CommandError>>),
    /// Somebody wants to know the state; the error says who leads.
    Status(oneshot::Sender<Result<Box<View>, String>>),
    /// A hook that starts or stops a machine has ended.
    Hook {
        /// The unit.
        node: u16,
        /// Why it did not do its work.
        result: Result<(), String>,
    },
    /// The process ends.
    Stop,
}

/// Everything that is shown.
#[derive(Clone, Debug)]
pub struct View {
    /// The cluster.
    pub status: Status,
    /// Shared interfaces and outside addresses.
    pub state: State,
    /// Lines of the log, oldest first.
    pub events: Vec<EventLine>,
}

/// Clock that all parts of the manager share.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Clock {
    /// Starts now.
    #[must_use]
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// Nanoseconds since the start.
    #[must_use]
    pub fn now_ns(self) -> u64 {
        u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// The owner of the state machine.
pub struct Actor {
    settings: Settings,
    scaling: Option<Scaling>,
    /// Hooks report here.
    events: SyncSender<Event>,
    /// While this manager leads.
    leading: Option<Leading>,
    store: Box<dyn Store>,
    clock: Clock,
    units: BTreeMap<u64, mpsc::Sender<Message>>,
    proofs: Proofs,
    requests: BTreeMap<u64, oneshot::Sender<Result<u64, CommandError>>>,
    next_request: u64,
    lines: VecDeque<EventLine>,
}

/// A manager that acts.
struct Leading {
    manager: Manager,
    term: u64,
    /// How many data planes there should be, if that is this program's to decide.
    scaler: Option<Scaler>,
    scale_due: Instant,
}

impl Actor {
    /// One that does not lead yet.
    #[must_use]
    pub fn new(config: &Config, store: Box<dyn Store>, clock: Clock, events: SyncSender<Event>) -> Self {
        Self {
            settings: config.settings.clone(),
            scaling: config.scaling.clone(),
            events,
            leading: None,
            store,
            clock,
            units: BTreeMap::new(),
            proofs: Proofs::default(),
            requests: BTreeMap::new(),
            next_request: 0,
            lines: VecDeque::new(),
        }
    }

    /// Works until it is told to stop.
    pub fn run(mut self, events: &Receiver<Event>) {
        let mut due = Instant::now();
        let mut campaign_due = Instant::now();
        let mut sign_due = Instant::now();
        let mut complained = false;
        loop {
            if self.leading.is_none() && Instant::now() >= campaign_due {
                let result = self.campaign();
                match &result {
                    Err(error) if !complained => tracing::warn!("cannot lead: {error:#}; trying again"),
                    _ => {}
                }
                complained = result.is_err();
                campaign_due = Instant::now() + CAMPAIGN_PAUSE;
            }
            if self.leading.is_some() && !self.store.leads() {
                self.step_down("its lease has ended");
            }
            let wait = due.saturating_duration_since(Instant::now());
            match events.recv_timeout(wait) {
                Ok(Event::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                Ok(event) => self.event(event),
                Err(RecvTimeoutError::Timeout) => {}
            }
            // Nobody is silent whose words wait here.
            while let Ok(event) = events.try_recv() {
                match event {
                    Event::Stop => return,
                    event => self.event(event),
                }
            }
            if Instant::now() >= due {
                due = Instant::now() + TICK;
                if let Some(leading) = &mut self.leading {
                    leading.manager.tick(self.clock.now_ns());
                }
                self.carry_out();
                self.scale();
                if Instant::now() >= sign_due {
                    sign_due = Instant::now() + SIGN_EVERY;
                    self.give_sign();
                }
            }
        }
    }

    /// Tries to lead: the state is read after the term is had, so that nobody else writes it meanwhile.
    fn campaign(&mut self) -> anyhow::Result<()> {
        let before = self.store.leader().map(str::to_owned);
        let Some(term) = self.store.campaign()? else {
            if let Some(leader) = self.store.leader().filter(|leader| before.as_deref() != Some(*leader)) {
                tracing::info!(leader, "another manager leads");
            }
            return Ok(());
        };
        let now_ns = self.clock.now_ns();
        let manager = match self.store.load()? {
            Some(bytes) => {
                let state = State::decode(&bytes).context("the store holds no state of a cluster")?;
                Manager::resume(self.settings.clone(), state, now_ns)
            }
            None => {
                let mut key = [0; steering::toeplitz::KEY_BYTES];
                getrandom::fill(&mut key).map_err(|error| anyhow::anyhow!("no random numbers: {error}"))?;
                Manager::new(self.settings.clone(), key, now_ns)
            }
        };
        let scaler = self.scaling.as_ref().map(|scaling| Scaler::new(scaling.policy.clone()));
        self.leading = Some(Leading { manager, term, scaler, scale_due: Instant::now() });
        self.line(None, format!("this manager leads, term {term}"));
        Ok(())
    }

    /// Tells all units that this manager leads: those that hear nothing look for another one.
    fn give_sign(&self) {
        let Some(leading) = &self.leading else { return };
        for to in self.units.values() {
            // One that does not read is found out by what it has to read.
            let _ = to.try_send(Message::Term { term: leading.term });
        }
    }

    /// Looks at whether there are enough data planes, and too many.
    fn scale(&mut self) {
        let (Some(Leading { manager, scaler: Some(scaler), scale_due, .. }), Some(scaling)) =
            (&mut self.leading, &self.scaling)
        else {
            return;
        };
        let now = Instant::now();
        if now < *scale_due {
            return;
        }
        *scale_due = now + SCALE_EVERY;
        let now_ns = self.clock.now_ns();
        let wants = scaler.look(now_ns, &manager.seen());
        let mut lines = Vec::new();
        for want in wants {
            match want {
                Want::Start(node) => {
                    lines.push((node, "is started by the hook".to_owned()));
                    hooks::run(&scaling.start, &scaling.folder, "start", node, &self.events);
                }
                Want::Stop(node) => {
                    lines.push((node, "is stopped by the hook".to_owned()));
                    hooks::run(&scaling.stop, &scaling.folder, "stop", node, &self.events);
                }
                Want::Command(command, why) => {
                    if let Command::Change(steps) = &command {
                        lines.extend(steps.iter().map(|step| (step.node(), format!("by policy: {why}"))));
                    }
                    let request = self.next_request;
                    self.next_request += 1;
                    manager.command(now_ns, request, command);
                }
            }
        }
        for (node, text) in lines {
            self.line(Some(node), text);
        }
        self.carry_out();
    }

    /// Lets go of everything: units connect to the next leader, and who waits for an answer is told.
    fn step_down(&mut self, why: &str) {
        if self.leading.take().is_none() {
            return;
        }
        self.line(None, format!("this manager does not lead any more: {why}"));
        self.units.clear();
        self.proofs.clear();
        for answer in std::mem::take(&mut self.requests).into_values() {
            let _ = answer.send(Err(CommandError::NotLeading(self.store.leader().map(str::to_owned))));
        }
    }

    fn event(&mut self, event: Event) {
        if !self.store.leads() {
            self.step_down("its lease has ended");
        }
        let Some(Leading { manager, term, scaler, .. }) = &mut self.leading else {
            return self.turn_away(event);
        };
        match event {
            Event::Connected { connection, address, to } => {
                // The first word of a connection finds room.
                let _ = to.try_send(Message::Term { term: *term });
                self.units.insert(connection, to);
                manager.connected(connection, address);
            }
            Event::Disconnected(connection) => {
                self.units.remove(&connection);
                self.proofs.forget(connection);
                manager.disconnected(connection);
            }
            Event::Beat { address, at_ns, message } => manager.beat(at_ns, address, message),
            Event::Received { connection, message: Message::Identify { key }, .. } => {
                if let Some(to) = self.units.get(&connection) {
                    self.proofs.ask(connection, key, to);
                }
            }
            Event::Received { connection, at_ns, message: Message::Proof(proof) } => {
                match self.proofs.check(connection, &proof) {
                    Some((key, token)) => manager.proved(at_ns, connection, key, token),
                    None => manager.unproved(connection),
                }
            }
            Event::Received { connection, at_ns, message } => {
                manager.receive(at_ns, connection, message);
            }
            Event::Token(token, answer) => {
                let request = self.next_request;
                self.next_request += 1;
                self.requests.insert(request, answer);
                manager.issue(self.clock.now_ns(), request, token, unix_s());
            }
            Event::Command(command, answer) => {
                let request = self.next_request;
                self.next_request += 1;
                self.requests.insert(request, answer);
                manager.command(self.clock.now_ns(), request, command);
            }
            Event::Status(answer) => {
                let (status, state) = (manager.status(), manager.state().clone());
                let events = self.lines.iter().cloned().collect();
                // Nobody waits any more: nothing is lost.
                let _ = answer.send(Ok(Box::new(View { status, state, events })));
            }
            Event::Hook { node, result } => {
                if let (Err(_), Some(scaler)) = (&result, scaler) {
                    scaler.hook_failed(node);
                }
                if let Err(why) = result {
                    self.line(Some(node), why);
                }
            }
            Event::Stop => {}
        }
        self.carry_out();
    }

    /// While another manager leads.
    fn turn_away(&mut self, event: Event) {
        let leader = self.store.leader().map(str::to_owned);
        match event {
            Event::Connected { to, .. } => {
                // Dropped afterwards, it ends when this is sent.
                let _ = to.try_send(Message::Refused(Refusal::NotLeading));
            }
            Event::Command(_, answer) | Event::Token(_, answer) => {
                let _ = answer.send(Err(CommandError::NotLeading(leader)));
            }
            Event::Status(answer) => {
                let _ = answer.send(Err(CommandError::NotLeading(leader).to_string()));
            }
            Event::Disconnected(_)
            | Event::Beat { .. }
            | Event::Received { .. }
            | Event::Hook { .. }
            | Event::Stop => {}
        }
    }

    /// Does what the state machine wants, in order, and what follows from it.
    fn carry_out(&mut self) {
        loop {
            let Some(leading) = &mut self.leading else { return };
            let outputs = leading.manager.outputs();
            if outputs.is_empty() {
                return;
            }
            for output in outputs {
                self.output(output);
            }
        }
    }

    fn output(&mut self, output: Output) {
        // What was wanted before it stepped down is nobody's wish any more.
        let Some(Leading { manager, .. }) = &mut self.leading else { return };
        match output {
            Output::Persist { number, state } => match self.store.save(&state) {
                Ok(()) => manager.persisted(self.clock.now_ns(), number),
                Err(SaveError::Lost) => self.step_down("another one has written"),
                Err(error) => {
                    tracing::error!(%error, "the store cannot be written");
                    manager.persist_failed(self.clock.now_ns(), number, &error.to_string());
                }
            },
            Output::Send { connection, message } => {
                // A unit that does not read is cut off; it comes back and gets the whole state.
                let full = self.units.get(&connection).is_some_and(|to| to.try_send(message).is_err());
                if full {
                    self.units.remove(&connection);
                    manager.disconnected(connection);
                }
            }
            Output::Close { connection } => drop(self.units.remove(&connection)),
            Output::Answer { request, result } => {
                match (self.requests.remove(&request), result) {
                    (Some(answer), result) => drop(answer.send(result)),
                    // Nobody's but the policy's.
                    (None, Err(error)) => {
                        self.line(None, format!("the policy's change was not accepted: {error}"));
                    }
                    (None, Ok(_)) => {}
                }
            }
            Output::Event(event) => self.line(event.node, event.text),
        }
    }

    fn line(&mut self, node: Option<u16>, text: String) {
        tracing::info!(node, "{text}");
        let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let at_unix_ms = u64::try_from(unix_ms).unwrap_or(u64::MAX);
        if self.lines.len() == LINES_MAX {
            self.lines.pop_front();
        }
        self.lines.push_back(EventLine { at_unix_ms, node, text });
    }
}

/// Sender of events, for tasks that must not block.
#[derive(Clone)]
pub struct Events(pub SyncSender<Event>);

impl Events {
    /// Hands an event over, waiting while too many wait; `false` when the manager ends.
    pub async fn send(&self, event: Event) -> bool {
        let sender = self.0.clone();
        let mut event = Some(event);
        loop {
            let Some(next) = event.take() else { return true };
            match sender.try_send(next) {
                Ok(()) => return true,
                Err(std::sync::mpsc::TrySendError::Disconnected(_)) => return false,
                Err(std::sync::mpsc::TrySendError::Full(back)) => {
                    event = Some(back);
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
        }
    }
}
