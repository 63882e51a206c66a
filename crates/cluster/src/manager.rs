//! The manager's side: who takes part, who owns which bucket, and how an era comes into force (rows D4–D7, D10).
//!
//! No clock and no I/O. The caller hands in connections, messages, commands and the time, and carries out the [`Output`]s in
//! their order. What a restart must not lose is in [`State`]. It is written first: an [`Output::Persist`] comes alone, and what
//! follows from it comes after [`Manager::persisted`]. When it could not be written ([`Manager::persist_failed`]) nothing follows
//! from it: the change is refused, or tried again later.
//!
//! A change of the cluster, in order ([`Stage`]):
//!
//! 1. *Planned*: who takes part, the next table, its chains and leases; persisted.
//! 2. *Preparing*: every unit gets them and acknowledges. Who is no member any more is fenced with this step, so nobody
//!    takes its packets when another unit begins flows in its buckets.
//! 3. *Committing*, persisted: the data planes, then the dispatchers.
//! 4. *Draining*: packets of the era before end on the way. Then the next change may begin: never three eras at once.
//!
//! Afterwards reports tell live flows by bucket, and an earlier owner that has none leaves the bucket's chain. A unit that is silent, or does
//! not acknowledge in time, is lost: it is left out at once, its ports are quarantined, and it joins anew when it is back.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;

use steering::toeplitz::KEY_BYTES;

use crate::message::{Message, Phase, Role};

mod chains;
mod command;
mod enrol;
mod hearing;
mod heirs;
mod load;
mod peers;
mod plan;
mod progress;
mod retire;
mod state;
mod status;
#[cfg(test)]
mod tests;

pub use chains::Chains;
pub use command::{ACCEPTED_MAX, Command, CommandError, OUTSIDE_MAX, STEPS_MAX, Step, WEIGHT_MAX};
pub use enrol::{TOKENS_MAX, Token};
pub use plan::Waits;
pub use state::{Accepted, BLOCKS, Block, Change, Inheritance, Standing, State, UnitRecord};
pub use status::{Status, UnitStatus};

/// Times and sizes that an operator may set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Buckets of the first table, a power of two.
    pub buckets: usize,
    /// Time between two heartbeats of a unit.
    pub heartbeat_ms: u16,
    /// A unit that was silent so long is lost; time in which the manager hears nobody does not count.
    pub dead_after_ns: u64,
    /// So long after a start of the manager nobody is called silent: units need a moment to connect again.
    pub start_grace_ns: u64,
    /// A unit that did not acknowledge a step for so long is lost: it lives, but nobody can wait for it.
    pub acknowledge_within_ns: u64,
    /// Time from the last acknowledgement of an era to the plan of the next.
    pub drain_ns: u64,
    /// The same when a unit was lost: its buckets have no owner meanwhile.
    pub drain_lost_ns: u64,
    /// Nobody gets the ports of a lost unit for so long.
    pub quarantine_ns: u64,
    /// Blocks of ports of each outside address that a data plane gets.
    pub blocks_per_unit: usize,
    /// Networks from which units that nobody enrolled may connect; they are free until they are added.
    pub pool: Vec<(IpAddr, u8)>,
    /// Shares follow the load that units report.
    pub follow_load: bool,
    /// Time between two samples of the load; three of them have to speak for a change.
    pub load_sample_ns: u64,
    /// Least time between two changes for the load.
    pub load_pause_ns: u64,
    /// How long buckets remember earlier owners.
    pub chains: Chains,
    /// Data planes send copies of their flows to another one, which takes them over when they die.
    pub replicate: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            buckets: steering::table::NODE_BUCKETS,
            heartbeat_ms: crate::unit::HEARTBEAT_MS,
            dead_after_ns: 375 * MS,
            start_grace_ns: 5_000 * MS,
            acknowledge_within_ns: 10_000 * MS,
            drain_ns: 1_000 * MS,
            drain_lost_ns: 100 * MS,
            quarantine_ns: 240_000 * MS,
            blocks_per_unit: 4,
            pool: Vec::new(),
            follow_load: false,
            load_sample_ns: 10_000 * MS,
            load_pause_ns: 60_000 * MS,
            chains: Chains::default(),
            replicate: false,
        }
    }
}

/// Nanoseconds of a millisecond.
pub(crate) const MS: u64 = 1_000_000;

/// Pause after the store failed.
const RETRY_NS: u64 = 1_000 * MS;

/// Task for the caller, in the order in which it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// The state is written to the store, then [`Manager::persisted`] or [`Manager::persist_failed`] is called.
    Persist {
        /// Grows with each.
        number: u64,
        /// The bytes, [`State::encode`].
        state: Vec<u8>,
    },
    /// To a unit.
    Send {
        /// Its connection.
        connection: u64,
        /// The message.
        message: Message,
    },
    /// The connection ends, after what was sent.
    Close {
        /// Which.
        connection: u64,
    },
    /// To whoever gave a command: its number, or why not.
    Answer {
        /// The request's number, as the caller gave it.
        request: u64,
        /// The number of the command that was accepted.
        result: Result<u64, CommandError>,
    },
    /// Something that an operator may want to know.
    Event(Event),
}

/// Line of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// The unit that it is about.
    pub node: Option<u16>,
    /// The line.
    pub text: String,
}

/// How far the change under way is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// There is none.
    Idle,
    /// Units get the next era.
    Preparing,
    /// It comes into force at those who own flows.
    CommittingDataPlanes,
    /// It comes into force at those who dispatch.
    CommittingDispatchers,
    /// It is in force everywhere; packets of the era before end.
    Draining {
        /// Until then.
        until_ns: u64,
    },
}

impl Stage {
    /// The stage for people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Preparing => "preparing",
            Self::CommittingDataPlanes => "committing-data-planes",
            Self::CommittingDispatchers => "committing-dispatchers",
            Self::Draining { .. } => "draining",
        }
    }
}

/// A unit's process and connection.
#[derive(Clone, Debug, Default)]
struct Peer {
    connection: Option<u64>,
    /// When it was heard last, on the clock of [`hearing::Hearing`].
    heard_ns: u64,
    instance: u64,
    /// The capacity that it told.
    weight: u32,
    /// Newest era that it was sent on this connection.
    synced: Option<u32>,
    /// Era that it was told to be in force, on this connection.
    committed: Option<u32>,
    /// Last step that it acknowledged on this connection.
    acknowledged: Option<(u32, Phase)>,
    /// It said hello, takes no part, and has not been told so.
    unanswered: bool,
    /// Its process was started anew during a change and goes on in place of the one before, whose cores may have seen the next era.
    anew: bool,
    /// When it was sent something to acknowledge, on the same clock.
    asked_ns: u64,
    figures: Figures,
    /// Copies of its flows, as it told last; a process that is started anew does not change that.
    copied: heirs::Copied,
    /// Era in which it told that nothing is left on it.
    drained: Option<u32>,
    rejoin_at_ns: u64,
    failures: u32,
}

/// Connection of a unit.
#[derive(Clone, Copy, Debug)]
struct Connection {
    /// Its bus address.
    address: IpAddr,
    /// The node that said hello there.
    node: Option<u16>,
    /// The public key that was proved there.
    key: Option<[u8; 32]>,
}

/// Figures that a unit told.
#[derive(Clone, Debug, Default)]
struct Figures {
    /// Era of the last report of this connection.
    in_force: Option<u32>,
    load_percent: u8,
    second_hops: u64,
    packets: u64,
    /// Flows by bucket; empty before the first report.
    live: Vec<u32>,
}

/// Consequence of a state that is being written.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Then {
    Accept { request: u64, number: u64 },
    Admit { connection: u64 },
    Prepare,
    Commit,
    Nothing,
}

/// A state that is being written.
#[derive(Clone, Debug)]
struct Saving {
    number: u64,
    then: Then,
    /// The state if it cannot be written.
    before: Box<State>,
}

/// Times of the manager itself.
#[derive(Clone, Copy, Debug, Default)]
struct Timers {
    hearing: hearing::Hearing,
    /// Nothing is planned before.
    retry_at_ns: u64,
    load_due_ns: u64,
    load_moved_ns: u64,
    retire_due_ns: u64,
}

/// Work that waits for the next look.
#[derive(Clone, Copy, Debug, Default)]
struct Due {
    /// Something happened by which the next era may become possible.
    plan: bool,
    /// Reports came.
    retire: bool,
    /// Somebody would be lost without whom no data plane is left; that was told.
    all_silent_told: bool,
}

/// The manager of a cluster.
#[derive(Clone, Debug)]
pub struct Manager {
    settings: Settings,
    state: State,
    stage: Stage,
    peers: BTreeMap<u16, Peer>,
    connections: BTreeMap<u64, Connection>,
    saving: Option<Saving>,
    saves: u64,
    /// Requests that came while a state is being written.
    queued: VecDeque<enrol::Queued>,
    /// Why the next era waits.
    waits: Option<Waits>,
    /// When earlier owners came into chains.
    entered: chains::Entered,
    /// When blocks of lost units are free again.
    quarantine: BTreeMap<(IpAddr, u8), u64>,
    timers: Timers,
    due: Due,
    /// Change of a share that the last samples spoke for, and how many of them.
    wished: Option<(load::Wish, u32)>,
    outputs: Vec<Output>,
}

impl Manager {
    /// The manager of a new cluster, whose key is `key`: 40 bytes from the system's random source.
    #[must_use]
    pub fn new(settings: Settings, key: [u8; KEY_BYTES], now_ns: u64) -> Self {
        Self::resume(settings, State::new(key), now_ns)
    }

    /// The manager of a cluster whose state was stored: it goes on where it stands.
    #[must_use]
    pub fn resume(settings: Settings, state: State, now_ns: u64) -> Self {
        let stage = match &state.change {
            None => Stage::Idle,
            Some(change) if change.committing => Stage::CommittingDataPlanes,
            Some(_) => Stage::Preparing,
        };
        // Until the grace is over everyone counts as heard; the clock of silence begins with 0.
        let heard_ns = settings.start_grace_ns.saturating_sub(settings.dead_after_ns);
        let peer = |node| (node, Peer { heard_ns, asked_ns: heard_ns, ..Peer::default() });
        let peers = state.units.keys().copied().map(peer).collect();
        let timers = Timers { hearing: hearing::Hearing::new(now_ns), ..Timers::default() };
        let due = Due { plan: true, ..Due::default() };
        Self {
            settings,
            state,
            stage,
            peers,
            connections: BTreeMap::new(),
            saving: None,
            saves: 0,
            queued: VecDeque::new(),
            waits: None,
            entered: chains::Entered::default(),
            quarantine: BTreeMap::new(),
            timers,
            due,
            wished: None,
            outputs: Vec::new(),
        }
    }

    /// The state as it is now, what is being written included.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    /// How far the change under way is.
    #[must_use]
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Why accepted commands are not carried out.
    #[must_use]
    pub fn waits(&self) -> Option<&Waits> {
        self.waits.as_ref()
    }

    /// Takes what is to be done.
    pub fn outputs(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.outputs)
    }

    /// Somebody connected from `address`, which the bond has authenticated.
    pub fn connected(&mut self, connection: u64, address: IpAddr) {
        self.connections.insert(connection, Connection { address, node: None, key: None });
    }

    /// A connection is gone. Its unit counts as silent from its last message on.
    pub fn disconnected(&mut self, connection: u64) {
        self.forget_connection(connection);
    }

    /// A message came.
    pub fn receive(&mut self, now_ns: u64, connection: u64, message: Message) {
        self.message(now_ns, connection, message);
        self.advance(now_ns);
    }

    /// A heartbeat came by itself from an address: that of the unit there, if it has said hello in a connection that is still there. Who
    /// else connects from that address has nothing to do with it.
    pub fn beat(&mut self, now_ns: u64, address: IpAddr, message: Message) {
        let unit = self.state.units.iter().find(|(_, unit)| unit.address == address);
        let peer = unit.and_then(|(node, _)| self.peers.get(node));
        if let Some(connection) = peer.and_then(|peer| peer.connection)
            && matches!(message, Message::Heartbeat { .. })
        {
            self.receive(now_ns, connection, message);
        }
    }

    /// Somebody wants something; the answer is an [`Output::Answer`] with the same number.
    pub fn command(&mut self, now_ns: u64, request: u64, command: Command) {
        self.queue(now_ns, enrol::Queued::Command(request, command));
    }

    fn queue(&mut self, now_ns: u64, wish: enrol::Queued) {
        if self.queued.len() >= ACCEPTED_MAX {
            match wish {
                enrol::Queued::Command(request, _) | enrol::Queued::Token(request, ..) => {
                    self.outputs.push(Output::Answer { request, result: Err(CommandError::Busy) });
                }
                // The unit connects again.
                enrol::Queued::Enrol(enrolment) => self.close(enrolment.connection()),
            }
            return;
        }
        self.queued.push_back(wish);
        self.advance(now_ns);
    }

    fn close(&mut self, connection: u64) {
        self.outputs.push(Output::Close { connection });
        self.forget_connection(connection);
    }

    /// Time passes. Every 20 ms or so.
    pub fn tick(&mut self, now_ns: u64) {
        self.watch(now_ns);
        self.watch_quarantine(now_ns);
        if self.settings.follow_load {
            self.follow_load(now_ns);
        }
        self.due.plan |= self.has_timed_work(now_ns);
        self.advance(now_ns);
    }

    /// State `number` is written.
    pub fn persisted(&mut self, now_ns: u64, number: u64) {
        if self.saving.as_ref().is_none_or(|saving| saving.number != number) {
            return;
        }
        let Some(saving) = self.saving.take() else { return };
        match saving.then {
            Then::Accept { request, number } => {
                self.outputs.push(Output::Answer { request, result: Ok(number) });
                self.due.plan = true;
            }
            Then::Admit { connection } => self.enrolled(connection),
            Then::Prepare => self.prepare(now_ns),
            Then::Commit => self.commit(now_ns),
            Then::Nothing => {}
        }
        self.advance(now_ns);
    }

    /// State `number` could not be written: what would follow from it does not happen.
    pub fn persist_failed(&mut self, now_ns: u64, number: u64, why: &str) {
        if self.saving.as_ref().is_none_or(|saving| saving.number != number) {
            return;
        }
        let Some(saving) = self.saving.take() else { return };
        self.timers.retry_at_ns = now_ns.saturating_add(RETRY_NS);
        match saving.then {
            Then::Accept { request, .. } => {
                self.state = *saving.before;
                let result = Err(CommandError::Store(why.to_owned()));
                self.outputs.push(Output::Answer { request, result });
            }
            Then::Admit { connection } => {
                self.state = *saving.before;
                self.event(None, format!("the store cannot be written, a unit is not enrolled: {why}"));
                self.close(connection);
            }
            Then::Prepare | Then::Commit => {
                self.state = *saving.before;
                self.event(None, format!("the store cannot be written, the change waits: {why}"));
            }
            // An older state leads to the same one.
            Then::Nothing => self.event(None, format!("the store cannot be written: {why}")),
        }
        self.due.plan = true;
        self.advance(now_ns);
    }

    fn event(&mut self, node: Option<u16>, text: String) {
        self.outputs.push(Output::Event(Event { node, text }));
    }

    fn send(&mut self, connection: u64, message: Message) {
        self.outputs.push(Output::Send { connection, message });
    }

    fn save(&mut self, then: Then, before: State) {
        self.saves += 1;
        let (number, state) = (self.saves, self.state.encode());
        self.saving = Some(Saving { number, then, before: Box::new(before) });
        self.outputs.push(Output::Persist { number, state });
    }

    fn role(&self, node: u16) -> Option<Role> {
        self.state.units.get(&node).map(|unit| unit.role)
    }
}
