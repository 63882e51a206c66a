//! Units and their connections: who they are, what they say, and when they are lost.

use std::net::IpAddr;

use super::heirs::inherit;
use super::plan::end_blocks;
use super::state::{SHARE_NORMAL, Standing, UnitRecord};
use super::{Connection, Figures, MS, Manager, Output, Peer, Stage};
use crate::message::{Hello, Message, Phase, Prepare, Refusal, Report, Welcome, Whole};

/// First pause before a lost unit takes part again; it doubles with each loss, up to [`REJOIN_MAX_NS`].
const REJOIN_NS: u64 = 200 * MS;

/// Longest pause.
const REJOIN_MAX_NS: u64 = 60_000 * MS;

/// Nobody was heard for longer: bonds and connections may have to be made anew, one after the other.
const DEAF_LONG_NS: u64 = 1_000 * MS;

impl Manager {
    pub(super) fn message(&mut self, now_ns: u64, connection: u64, message: Message) {
        let Some(known) = self.connections.get(&connection).copied() else { return };
        let node = known.node;
        if let Message::Hello(hello) = message {
            match self.admit(&known, &hello) {
                Ok(()) => self.hello(now_ns, connection, &hello),
                Err(reason) => self.refuse(connection, hello.node, reason),
            }
            return;
        }
        let Some(node) = node else { return self.refuse(connection, 0, Refusal::Protocol) };
        // Who was silent may take part again now.
        self.due.plan |= self.is_silent(node, now_ns);
        let Some(peer) = self.peers.get_mut(&node) else { return };
        peer.heard_ns = self.timers.hearing.heard(now_ns);
        match message {
            Message::Heartbeat { load_percent } => peer.figures.load_percent = load_percent,
            Message::Acknowledge { era, phase } => self.acknowledged(now_ns, node, era, phase),
            Message::Report(report) => self.report(node, &report),
            Message::Drained { era } => {
                self.due.plan |= peer.drained != Some(era);
                peer.drained = Some(era);
            }
            Message::Hello(_) => {}
            Message::Welcome(_)
            | Message::Prepare(_)
            | Message::Commit { .. }
            | Message::Retire { .. }
            | Message::Term { .. }
            | Message::Identify { .. }
            | Message::Proof(_)
            | Message::Challenge { .. }
            | Message::Admitted
            | Message::Refused(_)
            | Message::Goodbye => self.refuse(connection, node, Refusal::Protocol),
        }
    }

    /// Whether a unit that says hello may.
    fn admit(&self, connection: &Connection, hello: &Hello) -> Result<(), Refusal> {
        let address = connection.address;
        if connection.node.is_some_and(|node| node != hello.node) {
            return Err(Refusal::Identity);
        }
        if self.state.keys.get(&hello.node).is_some_and(|key| connection.key != Some(*key)) {
            return Err(Refusal::Key);
        }
        match self.state.units.get(&hello.node) {
            Some(unit) if unit.address != address => return Err(Refusal::Identity),
            Some(unit) if unit.role != hello.role => return Err(Refusal::Role),
            Some(_) => {}
            None if self.state.units.values().any(|unit| unit.address == address) => {
                return Err(Refusal::Identity);
            }
            None if self.settings.pool.iter().any(|(net, prefix)| contains(*net, *prefix, address)) => {}
            None => return Err(Refusal::Unknown),
        }
        let newest = self.state.newest().map(steering::table::BucketTable::era);
        match (hello.held, newest) {
            (Some(held), Some(newest)) if (held.wrapping_sub(newest) as i32) > 0 => Err(Refusal::NewerEra),
            (Some(_), None) => Err(Refusal::NewerEra),
            _ => Ok(()),
        }
    }

    fn hello(&mut self, now_ns: u64, connection: u64, hello: &Hello) {
        let node = hello.node;
        let Some(known) = self.connections.get_mut(&connection) else { return };
        let address = known.address;
        known.node = Some(node);
        self.state.units.entry(node).or_insert(UnitRecord {
            address,
            role: hello.role,
            weight: 0,
            share_permille: SHARE_NORMAL,
            standing: Standing::Free,
            joined: 0,
            instance: hello.instance,
            forget: false,
            migrate: false,
        });
        let peer = self.peers.entry(node).or_default();
        let clock_ns = self.timers.hearing.heard(now_ns);
        let before = peer.connection.replace(connection).filter(|before| *before != connection);
        peer.heard_ns = clock_ns;
        peer.instance = hello.instance;
        peer.weight = hello.weight;
        peer.synced = None;
        peer.committed = None;
        peer.acknowledged = None;
        peer.drained = None;
        peer.unanswered = false;
        // Counts of the connection before may lack what happened in between.
        peer.figures = Figures { load_percent: peer.figures.load_percent, ..Figures::default() };
        if let Some(before) = before {
            self.outputs.push(Output::Close { connection: before });
            self.connections.remove(&before);
        }
        self.watch_instances(now_ns);
        self.due.plan = true;
        if self.takes_part(node) {
            self.ask(now_ns, node);
        } else if let Some(peer) = self.peers.get_mut(&node) {
            peer.unanswered = true;
        }
    }

    /// Tells those who take no part that it is so. A loss counts when the era without the unit is written: a manager that starts anew
    /// before that knows the unit as a member, and has to find it as one.
    pub(super) fn answer_free(&mut self) {
        if self.state.fence {
            return;
        }
        let waits = |(node, peer): (&u16, &Peer)| peer.unanswered.then_some((*node, peer.connection));
        let waiting: Vec<_> = self.peers.iter().filter_map(waits).collect();
        for (node, connection) in waiting {
            if let Some(peer) = self.peers.get_mut(&node) {
                peer.unanswered = false;
            }
            if let Some(connection) = connection.filter(|_| !self.takes_part(node)) {
                let welcome = Welcome { node, heartbeat_ms: self.settings.heartbeat_ms, whole: None };
                self.send(connection, Message::Welcome(Box::new(welcome)));
            }
        }
    }

    pub(super) fn refuse(&mut self, connection: u64, node: u16, reason: Refusal) {
        self.event(Some(node), format!("refused: {}", reason.text()));
        self.send(connection, Message::Refused(reason));
        self.outputs.push(Output::Close { connection });
        self.forget_connection(connection);
    }

    pub(super) fn forget_connection(&mut self, connection: u64) {
        let Some(Connection { node: Some(node), .. }) = self.connections.remove(&connection) else { return };
        if let Some(peer) = self.peers.get_mut(&node).filter(|peer| peer.connection == Some(connection)) {
            peer.connection = None;
            peer.synced = None;
            peer.acknowledged = None;
        }
    }

    pub(super) fn takes_part(&self, node: u16) -> bool {
        self.state.units.get(&node).is_some_and(|unit| unit.standing.takes_part())
    }

    fn acknowledged(&mut self, now_ns: u64, node: u16, era: u32, phase: Phase) {
        let newest = self.state.newest().map(steering::table::BucketTable::era);
        let Some(peer) = self.peers.get_mut(&node) else { return };
        if newest != Some(era) || peer.synced != Some(era) {
            return;
        }
        let known = peer.acknowledged.filter(|(known, _)| *known == era).map(|(_, phase)| phase);
        peer.acknowledged = Some((era, known.map_or(phase, |known| known.max(phase))));
        peer.failures = 0;
        if phase == Phase::Prepared && self.commits(node) {
            self.ask(now_ns, node);
        }
    }

    fn report(&mut self, node: u16, report: &Report) {
        let Some(buckets) = self.state.newest().map(steering::table::BucketTable::buckets) else { return };
        if !self.takes_part(node) {
            return;
        }
        self.note_copies(node, report);
        let owns_flows = self.role(node).is_some_and(crate::message::Role::owns_flows);
        let Some(peer) = self.peers.get_mut(&node) else { return };
        let figures = &mut peer.figures;
        figures.load_percent = report.load_percent;
        figures.second_hops = report.second_hops;
        figures.packets = report.packets;
        if !owns_flows || (figures.live.is_empty() && !report.whole) {
            return;
        }
        if report.whole {
            figures.live.clear();
            figures.live.resize(buckets, 0);
        }
        figures.in_force = Some(report.in_force);
        for run in &report.live {
            let (first, end) = (run.first as usize, (run.first + run.buckets) as usize);
            let end = end.min(figures.live.len());
            if let Some(live) = figures.live.get_mut(first..end) {
                live.fill(run.flows);
            }
        }
        self.due.retire = true;
    }

    /// Sends a member what it lacks: the state, the next era, or that it is in force.
    pub(super) fn ask(&mut self, now_ns: u64, node: u16) {
        let Some(newest) = self.state.newest().map(steering::table::BucketTable::era) else { return };
        let commits = self.commits(node);
        let Some(peer) = self.peers.get_mut(&node) else { return };
        let Some(connection) = peer.connection else { return };
        let before = self.state.table.as_ref().map(steering::table::BucketTable::era);
        let message = match peer.synced {
            Some(synced) if synced == newest => {
                let told = peer.committed == Some(newest);
                (commits && !told).then_some(Message::Commit { era: newest })
            }
            Some(synced) if Some(synced) == before => self.state.change.as_ref().map(|change| {
                Message::Prepare(Box::new(Prepare { table: change.table.clone(), parts: self.state.parts() }))
            }),
            _ => self.whole(node, commits).map(|whole| {
                let heartbeat_ms = self.settings.heartbeat_ms;
                Message::Welcome(Box::new(Welcome { node, heartbeat_ms, whole: Some(whole) }))
            }),
        };
        let Some(message) = message else { return };
        if let Some(peer) = self.peers.get_mut(&node) {
            peer.synced = Some(newest);
            peer.committed = commits.then_some(newest);
            peer.asked_ns = self.timers.hearing.clock_ns(now_ns);
        }
        self.send(connection, message);
    }

    fn whole(&self, node: u16, commits: bool) -> Option<Whole> {
        let newest = self.state.newest()?.clone();
        let older = self.state.change.as_ref().and(self.state.table.clone());
        // A process that was started anew does not remember that its cores have seen the next era: it begins with it.
        let anew = self.peers.get(&node).is_some_and(|peer| peer.anew);
        let committing = self.state.change.as_ref().is_some_and(|change| change.committing);
        let newest_first = commits || (anew && committing);
        let in_force = match &older {
            Some(older) if !newest_first => older.era(),
            _ => newest.era(),
        };
        let fresh = self.state.units.get(&node).is_some_and(|unit| unit.forget);
        Some(Whole { fresh, key: self.state.key, in_force, older, newest, parts: self.state.parts() })
    }

    /// Whether the next era is in force at `node`, at this stage.
    pub(super) fn commits(&self, node: u16) -> bool {
        match self.stage {
            Stage::Idle | Stage::Preparing => false,
            Stage::CommittingDataPlanes => self.role(node).is_some_and(|role| !role.dispatches()),
            Stage::CommittingDispatchers | Stage::Draining { .. } => true,
        }
    }

    /// Looks for units that are silent, were started anew, or do not acknowledge.
    pub(super) fn watch(&mut self, now_ns: u64) {
        self.watch_instances(now_ns);
        let silent: Vec<u16> =
            self.state.participants().filter(|node| self.is_silent(*node, now_ns)).collect();
        if self.waits_for_owners(now_ns, &silent) {
            return;
        }
        let slow: Vec<u16> = self.slow(now_ns);
        let mut left_alone = false;
        for (nodes, why) in [(silent, "silent"), (slow, "did not acknowledge the era in time")] {
            for node in nodes {
                if self.may_lose(node, now_ns) {
                    self.lose(now_ns, node, why);
                } else {
                    left_alone = true;
                }
            }
        }
        if left_alone && !self.due.all_silent_told {
            self.event(None, "no data plane would be left: the last table stays in force".into());
        }
        self.due.all_silent_told = left_alone;
    }

    /// Whether anybody who owns flows is connected and not silent.
    fn hears_an_owner(&self, now_ns: u64) -> bool {
        let heard = self.timers.hearing.unheard_ns(now_ns) < self.settings.dead_after_ns;
        heard
            && self.state.units.iter().any(|(node, unit)| {
                let owner = unit.standing == Standing::Active && unit.role.owns_flows();
                let connected = self.peers.get(node).is_some_and(|peer| peer.connection.is_some());
                owner && connected && !self.is_silent(*node, now_ns)
            })
    }

    /// Whether nobody who owns flows is heard: it may be the manager that is cut off, or was stopped, and nobody is lost. Who
    /// comes back first says nothing about the others: all begin anew, and after a long time they have as long as after a start of the manager.
    fn waits_for_owners(&mut self, now_ns: u64, silent: &[u16]) -> bool {
        let hearing = &mut self.timers.hearing;
        let clock_ns = hearing.clock_ns(now_ns);
        let unheard = hearing.unheard_ns(now_ns) >= self.settings.dead_after_ns;
        if self.hears_an_owner(now_ns) {
            let Some(deaf_ns) = self.timers.hearing.hears(now_ns) else { return false };
            let grace_ns = self.settings.start_grace_ns.saturating_sub(self.settings.dead_after_ns);
            let grace_ns = if deaf_ns < DEAF_LONG_NS { 0 } else { grace_ns };
            for peer in self.peers.values_mut() {
                peer.heard_ns = peer.heard_ns.max(clock_ns.saturating_add(grace_ns));
            }
            return true;
        }
        let deaf = !silent.is_empty() || (unheard && self.state.participants().next().is_some());
        if !deaf {
            self.timers.hearing.hears(now_ns);
        } else if self.timers.hearing.is_deaf(now_ns) {
            self.event(None, "no data plane would be left: the last table stays in force".into());
        }
        deaf
    }

    pub(super) fn is_silent(&self, node: u16, now_ns: u64) -> bool {
        let heard = self.peers.get(&node).map_or(0, |peer| peer.heard_ns);
        self.timers.hearing.clock_ns(now_ns).saturating_sub(heard) >= self.settings.dead_after_ns
    }

    /// Members that have a connection and have not acknowledged within the bound.
    fn slow(&self, now_ns: u64) -> Vec<u16> {
        let (bound, clock_ns) = (self.settings.acknowledge_within_ns, self.timers.hearing.clock_ns(now_ns));
        let late = |node: &u16| {
            self.peers.get(node).is_some_and(|peer| {
                peer.connection.is_some() && clock_ns.saturating_sub(peer.asked_ns) >= bound
            })
        };
        self.missing().into_iter().filter(late).collect()
    }

    /// Somebody else who owns flows is alive. If nobody is, it may be the manager that is cut off: all stays as it is.
    fn may_lose(&self, node: u16, now_ns: u64) -> bool {
        self.state.units.iter().any(|(other, unit)| {
            let owner = unit.standing == Standing::Active && unit.role.owns_flows();
            let there = self.peers.get(other).is_some_and(|peer| {
                peer.connection.is_some() && peer.instance == unit.instance && !self.is_silent(*other, now_ns)
            });
            *other != node && owner && there
        })
    }

    /// A process that is not the one that joined has none of its flows.
    fn watch_instances(&mut self, now_ns: u64) {
        let other = |(node, unit): (&u16, &UnitRecord)| {
            let peer = self.peers.get(node)?;
            let anew =
                unit.standing.takes_part() && peer.connection.is_some() && peer.instance != unit.instance;
            anew.then_some(*node)
        };
        let restarted: Vec<u16> = self.state.units.iter().filter_map(other).collect();
        for node in restarted {
            if self.may_lose(node, now_ns) {
                self.lose_flows(now_ns, node, "was started anew");
            } else if let (Some(unit), Some(peer)) =
                (self.state.units.get_mut(&node), self.peers.get_mut(&node))
            {
                // Nobody else can take over: it goes on, without its flows.
                unit.instance = peer.instance;
                peer.anew = true;
                self.event(Some(node), "was started anew and goes on: nobody else owns flows".into());
            }
        }
    }

    fn lose(&mut self, now_ns: u64, node: u16, why: &str) {
        self.lose_flows(now_ns, node, why);
        if let Some(connection) = self.peers.get(&node).and_then(|peer| peer.connection) {
            self.outputs.push(Output::Close { connection });
            self.forget_connection(connection);
        }
    }

    /// A unit takes no part from now on: the next era leaves it out.
    fn lose_flows(&mut self, now_ns: u64, node: u16, why: &str) {
        let heir = self.heir_of(now_ns, node);
        self.forget_heir(node);
        let Some(unit) = self.state.units.get_mut(&node) else { return };
        unit.standing = match unit.standing {
            Standing::Active | Standing::Lost => Standing::Lost,
            Standing::Draining { .. } | Standing::Free => Standing::Free,
        };
        unit.forget = true;
        match heir {
            Some(pair) => inherit(&mut self.state, pair, false),
            None => end_blocks(&mut self.state, node, false),
        }
        self.state.fence = true;
        self.due.plan = true;
        if let Some(peer) = self.peers.get_mut(&node) {
            peer.synced = None;
            peer.acknowledged = None;
            peer.drained = None;
            peer.figures = Figures::default();
            let pause = REJOIN_NS.saturating_mul(1 << peer.failures.min(10)).min(REJOIN_MAX_NS);
            peer.rejoin_at_ns = now_ns.saturating_add(pause);
            peer.failures += 1;
        }
        let flows = heir.map_or_else(String::new, |pair| format!("; unit {} has its flows", pair.heir));
        self.event(Some(node), format!("lost: {why}{flows}"));
    }

    /// Nothing could be planned: units that are back wait a little before it is tried again.
    pub(super) fn rejoin_later(&mut self, now_ns: u64) {
        let lost = self.state.units.iter().filter(|(_, unit)| unit.standing == Standing::Lost);
        for (node, _) in lost {
            if let Some(peer) = self.peers.get_mut(node) {
                peer.rejoin_at_ns = peer.rejoin_at_ns.max(now_ns.saturating_add(REJOIN_NS));
            }
        }
    }

    /// A connected unit's data for the planner.
    pub(super) fn connected_peers(&self) -> impl Iterator<Item = (u16, &Peer)> {
        self.peers.iter().filter(|(_, peer)| peer.connection.is_some()).map(|(node, peer)| (*node, peer))
    }

    /// Whether something is due that only time brings.
    pub(super) fn has_timed_work(&self, now_ns: u64) -> bool {
        let lost = self.state.units.iter().filter(|(_, unit)| unit.standing == Standing::Lost);
        let heard = lost.filter(|(node, _)| !self.is_silent(**node, now_ns));
        let mut back = heard.filter_map(|(node, _)| self.peers.get(node));
        let again = self.timers.retry_at_ns != 0 && now_ns >= self.timers.retry_at_ns;
        again || back.any(|peer| peer.connection.is_some() && now_ns >= peer.rejoin_at_ns)
    }
}

/// Whether a network contains an address.
fn contains(net: IpAddr, prefix: u8, address: IpAddr) -> bool {
    match (net, address) {
        (IpAddr::V4(net), IpAddr::V4(address)) => {
            let differs = u32::from(net) ^ u32::from(address);
            differs.checked_shr(32u32.saturating_sub(prefix.into())).unwrap_or(0) == 0
        }
        (IpAddr::V6(net), IpAddr::V6(address)) => {
            let differs = u128::from(net) ^ u128::from(address);
            differs.checked_shr(128u32.saturating_sub(prefix.into())).unwrap_or(0) == 0
        }
        _ => false,
    }
}
