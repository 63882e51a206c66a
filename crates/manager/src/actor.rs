//! The thread that owns the state machine: everything that happens comes to it as an [`Event`], in order.
//!
//! A plain thread, because writing the store blocks. Events carry the time at which they came, so that a slow disk makes
//! no unit look silent: what waits is looked at before time passes.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use cluster::manager::{Command, CommandError, Manager, Output, State, Status};
use cluster::message::Message;
use tokio::sync::{mpsc, oneshot};

use crate::api::types::EventLine;
use crate::store::Store;

/// Time between two ticks.
const TICK: Duration = Duration::from_millis(20);
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
    /// Somebody wants to know the state.
    Status(oneshot::Sender<Box<View>>),
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
    manager: Manager,
    store: Box<dyn Store>,
    clock: Clock,
    units: HashMap<u64, mpsc::Sender<Message>>,
    /// The newest connection of each address.
    connections: HashMap<IpAddr, u64>,
    requests: HashMap<u64, oneshot::Sender<Result<u64, CommandError>>>,
    next_request: u64,
    lines: VecDeque<EventLine>,
}

impl Actor {
    /// One that has heard nothing yet.
    #[must_use]
    pub fn new(manager: Manager, store: Box<dyn Store>, clock: Clock) -> Self {
        Self {
            manager,
            store,
            clock,
            units: HashMap::new(),
            connections: HashMap::new(),
            requests: HashMap::new(),
            next_request: 0,
            lines: VecDeque::new(),
        }
    }

    /// Works until it is told to stop.
    pub fn run(mut self, events: &Receiver<Event>) {
        let mut due = Instant::now();
        loop {
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
                self.manager.tick(self.clock.now_ns());
                self.carry_out();
            }
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Connected { connection, address, to } => {
                self.units.insert(connection, to);
                self.connections.insert(address, connection);
                self.manager.connected(connection, address);
            }
            Event::Disconnected(connection) => {
                self.units.remove(&connection);
                self.connections.retain(|_, known| *known != connection);
                self.manager.disconnected(connection);
            }
            Event::Beat { address, at_ns, message } => {
                if let Some(connection) = self.connections.get(&address) {
                    self.manager.receive(at_ns, *connection, message);
                }
            }
            Event::Received { connection, at_ns, message } => {
                self.manager.receive(at_ns, connection, message);
            }
            Event::Command(command, answer) => {
                let request = self.next_request;
                self.next_request += 1;
                self.requests.insert(request, answer);
                self.manager.command(self.clock.now_ns(), request, command);
            }
            Event::Status(answer) => {
                let (status, state) = (self.manager.status(), self.manager.state().clone());
                let events = self.lines.iter().cloned().collect();
                // Nobody waits any more: nothing is lost.
                let _ = answer.send(Box::new(View { status, state, events }));
            }
            Event::Stop => {}
        }
        self.carry_out();
    }

    /// Does what the state machine wants, in order, and what follows from it.
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
            Output::Persist { number, state } => match self.store.save(&state) {
                Ok(()) => self.manager.persisted(self.clock.now_ns(), number),
                Err(error) => {
                    tracing::error!(%error, "the store cannot be written");
                    self.manager.persist_failed(self.clock.now_ns(), number, &format!("{error:#}"));
                }
            },
            Output::Send { connection, message } => {
                // A unit that does not read is cut off; it comes back and gets the whole state.
                let full = self.units.get(&connection).is_some_and(|to| to.try_send(message).is_err());
                if full {
                    self.units.remove(&connection);
                    self.manager.disconnected(connection);
                }
            }
            Output::Close { connection } => drop(self.units.remove(&connection)),
            Output::Answer { request, result } => {
                if let Some(answer) = self.requests.remove(&request) {
                    let _ = answer.send(result);
                }
            }
            Output::Event(event) => {
                tracing::info!(node = event.node, "{}", event.text);
                let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
                let at_unix_ms = u64::try_from(unix_ms).unwrap_or(u64::MAX);
                if self.lines.len() == LINES_MAX {
                    self.lines.pop_front();
                }
                self.lines.push_back(EventLine { at_unix_ms, node: event.node, text: event.text });
            }
        }
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
