//! A unit's side of the protocol with the manager: what its cores work by, and what it tells.
//!
//! No clock and no I/O: the caller has a TCP connection to the manager, hands in the messages that come ([`Unit::receive`])
//! and the time ([`Unit::tick`]), and carries out the [`Action`]s. In the order of a change:
//!
//! 1. The manager prepares era e + 1: the unit publishes a [`Snapshot`] that holds both tables, with e in force.
//! 2. When all its cores work by the snapshot the caller says so ([`Unit::took_over`]); the unit acknowledges.
//! 3. The manager commits: the same with e + 1 in force.
//! 4. Reports tell the live flows by bucket ([`Unit::report`]); entries of chains that have none are retired.
//!
//! Without a manager the last snapshot stays in force, however long. What comes out of order, twice or for another era is
//! answered if an answer helps and counted otherwise ([`Unit::ignored`]).

use std::sync::Arc;

use steering::era::{Eras, Install};
use steering::symmetric::FlowHasher;
use steering::table::BucketTable;
use steering::units::{LEASE_PORTS, Lease, Leases, Units};

use crate::message::{
    Hello, LiveRun, Member, Message, Pair, Parts, Phase, Prepare, Refusal, Report, Retired, Role,
    SharedInterface, Whole,
};

#[cfg(test)]
mod tests;

/// Time between two heartbeats until the manager says otherwise.
///
/// A crash has to be noticed within 400 ms, and a unit whose CPU was taken away for 300 ms must survive: that stall and one
/// interval before it have to fit, with room for the way.
pub const HEARTBEAT_MS: u16 = 30;

/// Most snapshots that wait for the cores; older ones are forgotten, the newest is what counts.
const PENDING_MAX: usize = 64;

/// Identity of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its node id, below 4,096.
    pub node: u16,
    /// Its task.
    pub role: Role,
    /// Its capacity relative to the others'; the manager may be told another one.
    pub weight: u32,
    /// A number drawn at random when the process started.
    pub instance: u64,
}

/// All that the cores work by. A value: the next one replaces it whole.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Grows with each snapshot; what [`Unit::took_over`] is told.
    pub number: u64,
    /// Tables, leases and the hash.
    pub units: Arc<Units>,
    /// Who takes part. Nothing is sent to anybody else, and nothing is taken from anybody else.
    pub members: Arc<[Member]>,
    /// The shared interfaces.
    pub interfaces: Arc<[SharedInterface]>,
    /// Blocks of ports that this unit may draw from: its own, once every dispatcher knows them.
    pub blocks: Arc<[Lease]>,
    /// Who sends copies of its flows to whom.
    pub copies: Arc<[Pair]>,
}

/// Task for the caller, in the order in which it stands.
#[derive(Clone, Debug)]
pub enum Action {
    /// All cores work by this from now on. [`Unit::took_over`] when they do.
    Publish(Snapshot),
    /// The flows of these units of which this one has copies are its own from now on. Before the next snapshot.
    Inherit(Vec<u16>),
    /// All flows are forgotten: the unit was not a member for a while, and they are others' by now. Before the next snapshot.
    ForgetFlows,
    /// The unit does not take part any more: no packet goes to another unit, none is taken from one.
    Leave,
    /// To the manager.
    Send(Message),
    /// The manager wants to see that the unit has its key: [`Message::Proof`] is sent, with a signature of
    /// [`crate::message::signed_bytes`].
    Prove {
        /// The challenge.
        nonce: [u8; 32],
    },
    /// The manager does not talk to this unit; the connection ends. Worth a line in the log.
    Refused(Refusal),
}

/// Figures that the caller counted.
#[derive(Clone, Copy, Debug)]
pub struct Figures<'a> {
    /// Live flows by bucket of the newest table. A flow is live in the bucket of its key and, if it is translated, in that of
    /// the reply's. Counting began after the last [`Unit::took_over`], or the figures are not used.
    pub live: &'a [u32],
    /// Whatever would break if the unit ended now: flows, bonds.
    pub in_use: u64,
    /// Load of the busiest core in percent.
    pub load_percent: u8,
    /// Packets sent on because their flow is not here, since the start.
    pub second_hops: u64,
    /// Packets that came, since the start.
    pub packets: u64,
    /// The unit that has copies of all flows here, but for those of the last two seconds.
    pub copied_to: Option<u16>,
    /// Live flows that were another unit's.
    pub inherited: u32,
}

/// How far the talk with the manager is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    /// No connection.
    Down,
    /// The key is being proved.
    Proving,
    /// A Hello is on its way.
    Greeting,
    /// The manager has answered.
    Up,
}

/// State as a member.
#[derive(Clone, Debug)]
struct Membership {
    snapshot: Snapshot,
    /// This unit's leases of the newest era.
    own: Vec<Lease>,
    /// All leases of the newest era.
    leases: Leases,
}

/// A published snapshot that the cores have not confirmed yet, or the one that they have.
#[derive(Clone, Copy, Debug)]
struct Published {
    number: u64,
    newest: u32,
    in_force: u32,
}

/// A unit as its control process knows it.
#[derive(Clone, Debug)]
pub struct Unit {
    identity: Identity,
    /// Public key that it proves before it says hello.
    key: Option<[u8; 32]>,
    link: Link,
    membership: Option<Membership>,
    /// Number of the last snapshot.
    number: u64,
    /// Snapshots that the cores have not confirmed, oldest first.
    pending: Vec<Published>,
    /// The newest that all cores work by.
    taken: Option<Published>,
    /// Counts of the last report of this connection, by bucket; `None`: the next report tells all.
    told: Option<Vec<u32>>,
    heartbeat_ms: u16,
    heartbeat_due_ns: u64,
    load_percent: u8,
    ignored: u64,
    /// Newest term of a manager that was heard.
    term: u64,
}

impl Unit {
    /// A unit without connection and without state.
    #[must_use]
    pub fn new(identity: Identity) -> Self {
        Self {
            identity,
            key: None,
            link: Link::Down,
            membership: None,
            number: 0,
            pending: Vec::new(),
            taken: None,
            told: None,
            heartbeat_ms: HEARTBEAT_MS,
            heartbeat_due_ns: 0,
            load_percent: 0,
            ignored: 0,
            term: 0,
        }
    }

    /// The same unit, which proves on each connection that it has this key.
    #[must_use]
    pub fn with_key(self, key: Option<[u8; 32]>) -> Self {
        Self { key, ..self }
    }

    /// The connection to the manager stands.
    pub fn connected(&mut self) -> Vec<Action> {
        self.told = None;
        let Some(key) = self.key else { return self.greet() };
        self.link = Link::Proving;
        vec![Action::Send(Message::Identify { key })]
    }

    /// The connection is gone; what is in force stays in force.
    pub fn disconnected(&mut self) {
        self.link = Link::Down;
    }

    /// The snapshot that was published last, if the unit takes part.
    #[must_use]
    pub fn snapshot(&self) -> Option<&Snapshot> {
        self.membership.as_ref().map(|membership| &membership.snapshot)
    }

    /// Whether the manager has answered on the connection that stands.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.link == Link::Up
    }

    /// Messages that had no place: out of order, repeated, of another era, or a unit's own.
    #[must_use]
    pub fn ignored(&self) -> u64 {
        self.ignored
    }

    /// A message of the manager.
    pub fn receive(&mut self, now_ns: u64, message: Message) -> Vec<Action> {
        if self.link == Link::Down {
            return self.ignore();
        }
        match message {
            Message::Welcome(welcome) => {
                if welcome.node != self.identity.node {
                    return self.ignore();
                }
                self.link = Link::Up;
                self.heartbeat_ms = welcome.heartbeat_ms;
                self.heartbeat_due_ns = now_ns;
                match welcome.whole {
                    Some(whole) => self.adopt(whole),
                    None => self.leave(),
                }
            }
            Message::Term { term } if term < self.term => {
                // It was cut off, or stopped for a while: what it wants is out of date.
                self.link = Link::Down;
                vec![Action::Refused(Refusal::NotLeading)]
            }
            Message::Term { term } => {
                self.term = term;
                Vec::new()
            }
            Message::Refused(reason) => {
                self.link = Link::Down;
                vec![Action::Refused(reason)]
            }
            Message::Challenge { nonce } if self.link == Link::Proving => vec![Action::Prove { nonce }],
            Message::Admitted if self.link == Link::Proving => self.greet(),
            // While a Hello is on its way, what comes was said to the state before: the Welcome has it all.
            _ if self.link != Link::Up => self.ignore(),
            Message::Prepare(prepare) => self.prepare(*prepare),
            Message::Commit { era } => self.commit(era),
            Message::Retire { era, entries } => self.retire(era, &entries),
            Message::Goodbye => self.leave(),
            Message::Hello(_)
            | Message::Identify { .. }
            | Message::Proof(_)
            | Message::Challenge { .. }
            | Message::Admitted
            | Message::Heartbeat { .. }
            | Message::Acknowledge { .. }
            | Message::Report(_)
            | Message::Drained { .. } => self.ignore(),
        }
    }

    /// All cores work by snapshot `number`, or by a later one: the manager is told.
    pub fn took_over(&mut self, number: u64) -> Vec<Action> {
        let done = self.pending.partition_point(|published| published.number <= number);
        let Some(taken) = self.pending.drain(..done).next_back() else { return Vec::new() };
        self.taken = Some(taken);
        self.acknowledge()
    }

    /// Sends what is due at `now_ns`.
    pub fn tick(&mut self, now_ns: u64) -> Vec<Action> {
        if self.link != Link::Up || now_ns < self.heartbeat_due_ns {
            return Vec::new();
        }
        self.heartbeat_due_ns = now_ns.saturating_add(u64::from(self.heartbeat_ms) * 1_000_000);
        vec![Action::Send(Message::Heartbeat { load_percent: self.load_percent })]
    }

    /// When [`Unit::tick`] has something to do next.
    #[must_use]
    pub fn deadline_ns(&self) -> Option<u64> {
        (self.link == Link::Up).then_some(self.heartbeat_due_ns)
    }

    /// Tells the manager figures: about once a second, and soon after an era came into force.
    pub fn report(&mut self, figures: &Figures<'_>) -> Vec<Action> {
        self.load_percent = figures.load_percent.min(100);
        let Some(membership) = &self.membership else { return Vec::new() };
        let table = membership.snapshot.units.eras.newest();
        let (Link::Up, Some(taken)) = (self.link, self.taken) else { return Vec::new() };
        if figures.live.len() != table.buckets() {
            return Vec::new();
        }
        let told = self.told.as_deref().filter(|told| told.len() == figures.live.len());
        let report = Report {
            in_force: taken.in_force,
            load_percent: self.load_percent,
            second_hops: figures.second_hops,
            packets: figures.packets,
            copied_to: figures.copied_to,
            inherited: figures.inherited,
            whole: told.is_none(),
            live: live_runs(told, figures.live),
        };
        let mut actions = vec![Action::Send(Message::Report(report))];
        let settled = taken.in_force == taken.newest && taken.newest == table.era();
        let empty = figures.in_use == 0 && figures.live.iter().all(|flows| *flows == 0);
        let owns_flows = self.identity.role.owns_flows();
        if owns_flows && settled && empty && table.count(self.identity.node) == 0 {
            actions.push(Action::Send(Message::Drained { era: taken.in_force }));
        }
        self.told = Some(figures.live.to_vec());
        actions
    }

    fn ignore(&mut self) -> Vec<Action> {
        self.ignored += 1;
        Vec::new()
    }

    /// Asks for the whole state.
    fn greet(&mut self) -> Vec<Action> {
        self.link = Link::Greeting;
        let Identity { node, role, weight, instance } = self.identity;
        let held = self.snapshot().map(|snapshot| snapshot.units.eras.newest().era());
        vec![Action::Send(Message::Hello(Hello { node, role, weight, instance, held }))]
    }

    /// The unit takes no part, now.
    fn leave(&mut self) -> Vec<Action> {
        self.pending.clear();
        self.taken = None;
        self.told = None;
        if self.membership.take().is_some() { vec![Action::Leave] } else { Vec::new() }
    }

    /// Takes the whole state; keeps of its own what is as new.
    fn adopt(&mut self, whole: Whole) -> Vec<Action> {
        let held = self.membership.take().filter(|_| !whole.fresh);
        let node = self.identity.node;
        let newest_era = whole.newest.era();
        let hasher = match &held {
            Some(held) if held.snapshot.units.hasher.key() == &whole.key => {
                held.snapshot.units.hasher.clone()
            }
            _ => FlowHasher::new(whole.key),
        };
        let before = held.as_ref().map(|held| &*held.snapshot.units);
        let same_era = before.filter(|units| units.eras.newest().era() == newest_era);
        // A commit that the unit has taken is not taken back.
        let in_force = same_era
            .filter(|units| units.in_force == newest_era)
            .map_or(whole.in_force, |units| units.in_force);
        let newest = match same_era {
            Some(units) => pruned(units.eras.newest(), whole.newest, node),
            None => whole.newest,
        };
        let mut eras = Eras::new(whole.older.unwrap_or_else(|| newest.clone()));
        eras.install(newest);
        let own = own_leases(&whole.parts, node);
        let blocks = if in_force == newest_era {
            own.clone()
        } else {
            let usable = held.as_ref().map_or(&[][..], |held| &held.snapshot.blocks);
            own.iter().filter(|lease| usable.contains(lease)).copied().collect()
        };
        // What an era that was missed left to this unit; of one that is held it was taken.
        let inherited =
            if same_era.is_none() && !whole.fresh { inherited(&whole.parts, node) } else { Vec::new() };
        let leases = whole.parts.all_leases();
        let units = Units { node, hasher, eras, in_force, leases: leases.clone() };
        let snapshot = Snapshot {
            number: 0,
            units: Arc::new(units),
            members: whole.parts.members.into(),
            interfaces: whole.parts.interfaces.into(),
            blocks: blocks.into(),
            copies: whole.parts.copies.into(),
        };
        self.membership = Some(Membership { snapshot, own, leases });
        self.told = None;
        let mut actions = Vec::new();
        if whole.fresh {
            self.pending.clear();
            self.taken = None;
            actions.push(Action::ForgetFlows);
        }
        if !inherited.is_empty() {
            actions.push(Action::Inherit(inherited));
        }
        actions.extend(self.publish());
        actions
    }

    fn prepare(&mut self, prepare: Prepare) -> Vec<Action> {
        let node = self.identity.node;
        let Some(membership) = &mut self.membership else { return self.greet() };
        let era = prepare.table.era();
        let held = &membership.snapshot.units;
        if held.eras.newest().era() == era {
            // Repeated: whoever asks again has not heard the answer.
            self.ignored += 1;
            return self.acknowledge();
        }
        if held.in_force != held.eras.newest().era() {
            // The era before is not in force here: a commit was missed.
            return self.greet();
        }
        let units = Arc::make_mut(&mut membership.snapshot.units);
        match units.eras.install(prepare.table) {
            Install::Installed => {}
            Install::Known => return self.ignore(),
            Install::Gap => return self.greet(),
        }
        membership.leases = prepare.parts.all_leases();
        units.leases = until_commit(&units.leases, &membership.leases);
        let inherited = inherited(&prepare.parts, node);
        membership.own = own_leases(&prepare.parts, node);
        let usable: Vec<Lease> = membership
            .snapshot
            .blocks
            .iter()
            .filter(|lease| membership.own.contains(lease))
            .copied()
            .collect();
        membership.snapshot.blocks = usable.into();
        membership.snapshot.copies = prepare.parts.copies.into();
        membership.snapshot.members = prepare.parts.members.into();
        membership.snapshot.interfaces = prepare.parts.interfaces.into();
        let mut actions = Vec::new();
        if !inherited.is_empty() {
            actions.push(Action::Inherit(inherited));
        }
        actions.extend(self.publish());
        actions
    }

    fn commit(&mut self, era: u32) -> Vec<Action> {
        let Some(membership) = &mut self.membership else { return self.ignore() };
        if membership.snapshot.units.eras.newest().era() != era {
            return self.ignore();
        }
        if membership.snapshot.units.in_force == era {
            self.ignored += 1;
            // Before the cores have taken it over the answer would be that of the step before, which asks for the commit again.
            let taken = self.taken.is_some_and(|taken| taken.in_force == era);
            return if taken { self.acknowledge() } else { Vec::new() };
        }
        let units = Arc::make_mut(&mut membership.snapshot.units);
        units.in_force = era;
        units.leases.clone_from(&membership.leases);
        membership.snapshot.blocks = membership.own.clone().into();
        self.publish()
    }

    fn retire(&mut self, era: u32, entries: &[Retired]) -> Vec<Action> {
        let node = self.identity.node;
        let Some(membership) = &mut self.membership else { return self.ignore() };
        if membership.snapshot.units.eras.newest().era() != era {
            return self.ignore();
        }
        let units = Arc::make_mut(&mut membership.snapshot.units);
        let end = u32::try_from(units.eras.newest().buckets()).unwrap_or(u32::MAX);
        // Its own entries stay: a packet that is still punted here has to find the end of the chain, not a stranger.
        for entry in entries.iter().filter(|entry| entry.unit != node) {
            for bucket in entry.first..entry.first.saturating_add(entry.buckets).min(end) {
                units.eras.newest_mut().retire(bucket as usize, entry.unit);
            }
        }
        self.publish()
    }

    /// Gives the snapshot a number and hands it out.
    fn publish(&mut self) -> Vec<Action> {
        let Some(membership) = &mut self.membership else { return Vec::new() };
        self.number += 1;
        membership.snapshot.number = self.number;
        let units = &membership.snapshot.units;
        if self.pending.len() == PENDING_MAX {
            self.pending.remove(0);
        }
        let (newest, in_force) = (units.eras.newest().era(), units.in_force);
        self.pending.push(Published { number: self.number, newest, in_force });
        vec![Action::Publish(membership.snapshot.clone())]
    }

    /// Says what all cores work by, if that is the newest era that the unit holds.
    fn acknowledge(&self) -> Vec<Action> {
        let (Link::Up, Some(taken), Some(snapshot)) = (self.link, self.taken, self.snapshot()) else {
            return Vec::new();
        };
        if taken.newest != snapshot.units.eras.newest().era() {
            return Vec::new();
        }
        let phase = if taken.in_force == taken.newest { Phase::Committed } else { Phase::Prepared };
        vec![Action::Send(Message::Acknowledge { era: taken.newest, phase })]
    }
}

/// Leases of `node` among those of an era.
fn own_leases(parts: &Parts, node: u16) -> Vec<Lease> {
    parts.leases.iter().filter(|lease| lease.node == node).copied().collect()
}

/// Leases between prepare and commit: those of the next era, but that ports which go from one unit to another stay where they are
/// until that one has taken over the flows that use them.
fn until_commit(held: &Leases, next: &Leases) -> Leases {
    let lease = |lease: Lease| {
        let holder = held.unit(lease.address, u16::from(lease.block) * LEASE_PORTS);
        Lease { node: holder.unwrap_or(lease.node), ..lease }
    };
    Leases::new(&next.iter().map(lease).collect::<Vec<_>>())
}

/// Units whose flows `node` has from this era on.
fn inherited(parts: &Parts, node: u16) -> Vec<u16> {
    parts.heirs.iter().filter(|pair| pair.heir == node).map(|pair| pair.unit).collect()
}

/// The table that is held without what `told`, the same era's, does not have in its chains any more, but for `node` itself.
fn pruned(held: &BucketTable, told: BucketTable, node: u16) -> BucketTable {
    if held.owners() != told.owners() {
        return told;
    }
    let mut table = held.clone();
    for bucket in 0..held.buckets() {
        for unit in held.chain(bucket) {
            if *unit != node && !told.chain(bucket).contains(unit) {
                table.retire(bucket, *unit);
            }
        }
    }
    table
}

/// Runs of the counts that differ from what was `told`, or of all that are not zero.
fn live_runs(told: Option<&[u32]>, live: &[u32]) -> Vec<LiveRun> {
    let mut runs: Vec<LiveRun> = Vec::new();
    for (bucket, flows) in (0u32..).zip(live) {
        let before = told.and_then(|told| told.get(bucket as usize)).copied().unwrap_or(0);
        if *flows == before {
            continue;
        }
        match runs.last_mut() {
            Some(run) if run.flows == *flows && run.first + run.buckets == bucket => run.buckets += 1,
            _ => runs.push(LiveRun { first: bucket, buckets: 1, flows: *flows }),
        }
    }
    runs
}
