//! A change on its way: planned, prepared, committed, finished.

use std::collections::BTreeMap;

use steering::table::BucketTable;

use super::command::{Command, Step, check};
use super::enrol::Queued;
use super::plan::{self, Present, Waits};
use super::state::{Accepted, Change, Standing, State, UnitRecord};
use super::{Chains, Manager, Output, Stage, Then};
use crate::message::{Message, Phase, Role};

/// An era that can begin.
struct Next {
    state: State,
    /// `None`: nothing that an era fixes changes.
    table: Option<BucketTable>,
    text: String,
}

impl Manager {
    /// Takes every step that can be taken. While a state is being written nothing that depends on it happens.
    pub(super) fn advance(&mut self, now_ns: u64) {
        while self.saving.is_none() {
            self.answer_free();
            if let Some(wish) = self.queued.pop_front() {
                match wish {
                    Queued::Command(request, command) => self.accept(request, command),
                    Queued::Token(request, token, now_s) => self.accept_token(request, token, now_s),
                    Queued::Enrol(enrolment) => self.accept_enrolment(enrolment),
                }
                continue;
            }
            let moved = match self.stage {
                Stage::Idle => {
                    self.retire(now_ns);
                    self.begin(now_ns)
                }
                Stage::Preparing => self.all_prepared(now_ns),
                Stage::CommittingDataPlanes | Stage::CommittingDispatchers => self.all_committed(now_ns),
                Stage::Draining { until_ns } => self.finish(now_ns, until_ns),
            };
            if !moved {
                break;
            }
        }
    }

    fn accept(&mut self, request: u64, command: Command) {
        let drained = |node| self.is_drained(node);
        if let Err(error) = check(&self.state, &command, &drained) {
            self.outputs.push(Output::Answer { request, result: Err(error) });
            return;
        }
        let before = self.state.clone();
        if let Command::Change(steps) = &command {
            for step in steps {
                if let Step::Remove { node, force: true } = step {
                    self.cancel(*node);
                }
                let Step::Add { node, enrol: Some((address, role)), weight } = step else { continue };
                self.state.units.entry(*node).or_insert(UnitRecord {
                    address: *address,
                    role: *role,
                    weight: weight.unwrap_or(0),
                    share_permille: super::state::SHARE_NORMAL,
                    standing: Standing::Free,
                    joined: 0,
                    instance: 0,
                    forget: false,
                    migrate: false,
                });
            }
        }
        let number = self.state.number();
        self.state.accepted.push(Accepted { number, command });
        self.save(Then::Accept { request, number }, before);
    }

    /// A unit that is to be removed does not wait to be added, and a change that was to add it beside other steps is not carried out in
    /// part: it is taken back.
    fn cancel(&mut self, node: u16) {
        let adds = |step: &Step| matches!(step, Step::Add { node: added, .. } if *added == node);
        let before = std::mem::take(&mut self.state.accepted);
        for accepted in before {
            let number = accepted.number;
            match &accepted.command {
                Command::Change(steps) if steps.iter().any(adds) => {
                    self.event(Some(node), format!("change {number} is taken back: it would add this unit"));
                }
                _ => self.state.accepted.push(accepted),
            }
        }
    }

    /// Plans the next era if there is a reason, and begins to write it down.
    fn begin(&mut self, now_ns: u64) -> bool {
        if !self.due.plan || now_ns < self.timers.retry_at_ns {
            return false;
        }
        self.due.plan = false;
        self.timers.retry_at_ns = 0;
        let present = self.present(now_ns);
        let live = self.live_by_owner();
        let waits_before = self.waits.take();
        let next = match self.next_without_lost(&live) {
            Some(next) => Some(next),
            None => self.next_by_commands(now_ns, &present, &live),
        };
        let Some(next) = next else {
            if self.waits != waits_before
                && let Some(waits) = &self.waits
            {
                let text = format!("the next change waits: {waits}");
                self.event(None, text);
            }
            self.rejoin_later(now_ns);
            return false;
        };
        self.start(next);
        false
    }

    fn start(&mut self, next: Next) {
        let Next { state, table, text } = next;
        let before = std::mem::replace(&mut self.state, state);
        let Some(table) = table else {
            // Only that the command is done has to be remembered.
            self.due.plan = true;
            self.save(Then::Nothing, before);
            return;
        };
        let moved = before.table.as_ref().map_or(table.buckets(), |old| old.moves(&table).count());
        let era = table.era();
        self.event(None, format!("era {era} is planned: {text}; {moved} buckets move"));
        self.state.change = Some(Change { table, committing: false });
        self.save(Then::Prepare, before);
    }

    /// Begins the era in which a unit owns less, or more, for this reason.
    pub(super) fn start_for_load(&mut self, why: String, state: State, table: BucketTable) {
        self.start(Next { state, table: Some(table), text: why });
    }

    /// The era that leaves out who was lost. It does not wait for anything else.
    fn next_without_lost(&mut self, live: &[u32]) -> Option<Next> {
        if !self.state.fence {
            return None;
        }
        let mut state = self.state.clone();
        state.fence = false;
        self.plan_copies(&mut state);
        if state.table.is_none() {
            self.state.fence = false;
            return None;
        }
        match plan::table_without_dead(&state, live) {
            Ok(table) => {
                let table = self.settings.chains.shape(table, &plan::shares(&state));
                Some(Next { state, table: Some(table), text: "units were lost".into() })
            }
            Err(waits) => {
                self.waits = Some(waits);
                None
            }
        }
    }

    /// The era that carries out what was accepted, as much of it at once as can be.
    fn next_by_commands(
        &mut self,
        now_ns: u64,
        present: &BTreeMap<u16, Present>,
        live: &[u32],
    ) -> Option<Next> {
        let mut ready = self.own_commands(now_ns, present);
        let mut waiting: Vec<u16> = Vec::new();
        for accepted in &self.state.accepted {
            let nodes: Vec<u16> = match &accepted.command {
                Command::Change(steps) => steps.iter().map(Step::node).collect(),
                Command::Configure { .. } => Vec::new(),
            };
            let overtakes = nodes.iter().any(|node| waiting.contains(node));
            match plan::ready(&self.state, &accepted.command, present) {
                Ok(()) if !overtakes => ready.push(accepted.clone()),
                Ok(()) => waiting.extend(nodes),
                Err(waits) => {
                    self.waits.get_or_insert(waits);
                    waiting.extend(nodes);
                }
            }
        }
        if ready.is_empty() && self.reason_of_copies().is_none() {
            return None;
        }
        match self.try_plan(&ready, present, live) {
            Ok(next) => return Some(next),
            Err(waits) => self.waits = Some(waits),
        }
        // Not all at once: the first that can be done alone.
        let alone = ready.len() > 1;
        ready
            .iter()
            .filter(|_| alone)
            .find_map(|one| self.try_plan(std::slice::from_ref(one), present, live).ok())
    }

    fn try_plan(
        &self,
        commands: &[Accepted],
        present: &BTreeMap<u16, Present>,
        live: &[u32],
    ) -> Result<Next, Waits> {
        let mut state = self.state.clone();
        for accepted in commands {
            plan::apply(&mut state, &accepted.command, present);
            state.accepted.retain(|other| other.number != accepted.number);
        }
        self.plan_copies(&mut state);
        plan::lease(&mut state, self.settings.blocks_per_unit)?;
        let same = state.parts() == self.state.parts() && plan::shares(&state) == plan::shares(&self.state);
        let nobody = state.table.is_none() && state.participants().next().is_none();
        let table = if (same || nobody) && !state.fence {
            None
        } else {
            let table = plan::table(&state, self.settings.buckets, live)?;
            Some(self.settings.chains.shape(table, &plan::shares(&state)))
        };
        state.fence = false;
        let text: Vec<String> = commands.iter().map(reason).chain(self.reason_of_copies()).collect();
        Ok(Next { state, table, text: text.join(", ") })
    }

    /// Changes that nobody has to ask for: units that are back, and those that are drained and leave then. Number 0.
    fn own_commands(&self, now_ns: u64, present: &BTreeMap<u16, Present>) -> Vec<Accepted> {
        let mut own = Vec::new();
        for (node, unit) in &self.state.units {
            let node = *node;
            let step = match unit.standing {
                Standing::Lost => {
                    let peer = self.peers.get(&node);
                    let back =
                        peer.is_some_and(|peer| now_ns >= peer.rejoin_at_ns) && present.contains_key(&node);
                    back.then_some(Step::Add { node, enrol: None, weight: None })
                }
                Standing::Draining { remove: true } => {
                    let drained = present.get(&node).is_some_and(|present| present.drained);
                    drained.then_some(Step::Remove { node, force: false })
                }
                Standing::Free | Standing::Active | Standing::Draining { remove: false } => None,
            };
            own.extend(step.map(|step| Accepted { number: 0, command: Command::Change(vec![step]) }));
        }
        own
    }

    /// The plan is written: units get it.
    pub(super) fn prepare(&mut self, now_ns: u64) {
        self.stage = Stage::Preparing;
        let left: Vec<(u16, u64)> = self
            .connected_peers()
            .filter(|(node, peer)| peer.synced.is_some() && !self.takes_part(*node))
            .filter_map(|(node, peer)| Some((node, peer.connection?)))
            .collect();
        for (node, connection) in left {
            if let Some(peer) = self.peers.get_mut(&node) {
                peer.synced = None;
                peer.acknowledged = None;
                peer.figures = super::Figures::default();
            }
            self.send(connection, Message::Goodbye);
        }
        let members: Vec<u16> = self.state.participants().collect();
        for node in members {
            self.ask(now_ns, node);
        }
    }

    /// That it comes into force is written: data planes get it first.
    pub(super) fn commit(&mut self, now_ns: u64) {
        self.stage = Stage::CommittingDataPlanes;
        self.tell_commit(now_ns);
    }

    fn tell_commit(&mut self, now_ns: u64) {
        let members: Vec<u16> = self.missing().into_iter().filter(|node| self.commits(*node)).collect();
        for node in members {
            self.ask(now_ns, node);
        }
    }

    /// Members that have not acknowledged what this stage waits for.
    pub(super) fn missing(&self) -> Vec<u16> {
        let Some(era) = self.state.newest().map(BucketTable::era) else { return Vec::new() };
        let phase = match self.stage {
            Stage::Idle | Stage::Draining { .. } => return Vec::new(),
            Stage::Preparing => Phase::Prepared,
            Stage::CommittingDataPlanes | Stage::CommittingDispatchers => Phase::Committed,
        };
        let planes_only = self.stage == Stage::CommittingDataPlanes;
        let counts = |node: &u16| !planes_only || self.role(*node).is_some_and(|role| !role.dispatches());
        let lacks = |node: &u16| {
            let said = self.peers.get(node).and_then(|peer| peer.acknowledged);
            !said.is_some_and(|(acknowledged, said)| acknowledged == era && said >= phase)
        };
        self.state.participants().filter(counts).filter(lacks).collect()
    }

    fn all_prepared(&mut self, now_ns: u64) -> bool {
        if !self.missing().is_empty() || now_ns < self.timers.retry_at_ns {
            return false;
        }
        let before = self.state.clone();
        let era = self.state.newest().map(BucketTable::era);
        for (node, unit) in &mut self.state.units {
            let said = self.peers.get(node).and_then(|peer| peer.acknowledged);
            if unit.standing.takes_part() && said.map(|(era, _)| era) == era {
                // It has forgotten; flows that it gets from now on are its own.
                unit.forget = false;
            }
        }
        if let Some(change) = &mut self.state.change {
            change.committing = true;
        }
        self.timers.retry_at_ns = 0;
        self.save(Then::Commit, before);
        false
    }

    fn all_committed(&mut self, now_ns: u64) -> bool {
        if !self.missing().is_empty() {
            return false;
        }
        if self.stage == Stage::CommittingDataPlanes {
            self.stage = Stage::CommittingDispatchers;
            self.tell_commit(now_ns);
        } else {
            // Packets of the era before end on the way meanwhile.
            self.stage = Stage::Draining { until_ns: now_ns.saturating_add(self.settings.drain_ns) };
        }
        true
    }

    /// The drain time is over; buckets of lost units do not wait so long for an owner.
    fn finish(&mut self, now_ns: u64, until_ns: u64) -> bool {
        let sooner = self.settings.drain_ns.saturating_sub(self.settings.drain_lost_ns);
        let until_ns = if self.state.fence { until_ns.saturating_sub(sooner) } else { until_ns };
        if now_ns < until_ns {
            return false;
        }
        let before = self.state.clone();
        if let Some(change) = self.state.change.take() {
            self.event(None, format!("era {} is in force", change.table.era()));
            if matches!(self.settings.chains, Chains::Clock { .. }) {
                self.entered.note(&change.table, now_ns);
            }
            self.state.table = Some(change.table);
        }
        self.peers.values_mut().for_each(|peer| peer.anew = false);
        self.stage = Stage::Idle;
        self.due.plan = true;
        self.due.retire = true;
        self.save(Then::Nothing, before);
        false
    }

    /// Units that may take part: connected, and heard.
    fn present(&self, now_ns: u64) -> BTreeMap<u16, Present> {
        let here = |(node, peer): (u16, &super::Peer)| {
            let present =
                Present { instance: peer.instance, weight: peer.weight, drained: self.is_drained(node) };
            (node, present)
        };
        self.connected_peers().filter(|(node, _)| !self.is_silent(*node, now_ns)).map(here).collect()
    }

    /// Whether nothing is left on a unit that drains: no flow, no bucket, no place in a chain.
    pub(super) fn is_drained(&self, node: u16) -> bool {
        let Some(unit) = self.state.units.get(&node) else { return false };
        if !matches!(unit.standing, Standing::Draining { .. }) || self.stage != Stage::Idle {
            return false;
        }
        if unit.role == Role::Dispatcher {
            return true;
        }
        let Some(table) = &self.state.table else { return true };
        let told = self.peers.get(&node).and_then(|peer| peer.drained) == Some(table.era());
        // Whose flows are another's need not wait for the end of what is left of them here.
        let handed = unit.migrate && !self.state.blocks.iter().any(|block| block.node == Some(node));
        (told || handed) && !super::heirs::is_named(table, node)
    }
}

/// Reason of an era, for the log.
fn reason(accepted: &Accepted) -> String {
    match (&accepted.command, accepted.number) {
        (Command::Change(steps), 0) => match &steps[..] {
            [Step::Remove { node, .. }] => format!("unit {node} is drained and leaves"),
            [step, ..] => format!("unit {} is back", step.node()),
            [] => String::new(),
        },
        (_, number) => format!("command {number}"),
    }
}
