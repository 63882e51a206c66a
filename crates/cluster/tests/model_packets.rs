//! Every way in which packets of one flow can meet the steps of a change: lost, late, in any order, twice.
//!
//! The units' cores run the product's decisions, [`Units::dispatch`] and [`Units::ask`], over tables that the product's planner
//! made. A core takes steps as the manager allows them, which `model_manager.rs` shows of the product's manager: it holds a table before anyone
//! works by it, data planes work by it before dispatchers, and the next change begins when nobody works by the era before and no packet of it is
//! on its way. Between these rules every order is tried.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;

use packet::attachment::UnitVisit;
use packet::flow::FlowKey;
use stateright::{Checker, Model, Property};
use steering::assign::plan;
use steering::era::Eras;
use steering::owner_chain::{Arrival, Digest, TTL_START};
use steering::symmetric::FlowHasher;
use steering::table::{BucketTable, Unit};
use steering::units::{Answer, EraSeen, Leases, Units};

/// Data planes first, then dispatchers.
const NODES: [u16; 5] = [1, 2, 3, 11, 12];
const PLANES: usize = 3;
const BUCKETS: usize = 4;

/// Packets that are on their way at once.
const IN_FLIGHT_MAX: usize = 3;

/// A packet between two units.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Packet {
    from: usize,
    to: usize,
    arrival: u8,
    ttl: u8,
    odd_era: bool,
}

/// Events that cannot be undone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Seen {
    too_often: bool,
    era_unknown: bool,
    /// The flow was kept by an earlier owner.
    kept_by_chain: bool,
    /// The flow was begun by each of the planes.
    begun: [bool; PLANES],
    /// A packet was sent on more often than two chains are long.
    far: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    /// Steps that the core of each unit has taken: 2k: era k in force; 2k + 1: era k + 1 held as well.
    step: [u8; NODES.len()],
    seen_era: [EraSeen; NODES.len()],
    has_flow: [bool; PLANES],
    /// The earlier owner of era 1's chain was retired, by the manager and at each unit.
    retired: bool,
    retired_at: [bool; NODES.len()],
    packets: BTreeSet<Packet>,
    seen: Seen,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Action {
    /// A dispatcher reads a packet of the flow.
    Read(usize),
    /// A packet arrives, and may arrive again.
    Arrive(Packet),
    Lose(Packet),
    Step(usize),
    /// The manager has a report that unit `chain[0]` of era 1 has no flow.
    Retire,
    TakeRetire(usize),
    /// The flow ends where it is.
    End,
}

struct Scenario {
    /// Tables by era; era 2 as planned with the chain of era 1 whole, and with its first entry retired.
    units: Vec<[[Units; 2]; 2]>,
    steps: u8,
    /// Place of the unit that the manager gave up: alive, and cut off from the manager.
    lost: Option<usize>,
    /// Place of the unit that may be retired in era 1.
    earlier: Option<usize>,
    key: FlowKey,
    /// The owners of the flow's bucket.
    begun: Vec<u16>,
}

fn shares(weights: &[(u16, u32)]) -> Vec<Unit> {
    weights.iter().map(|(id, weight)| Unit { id: *id, weight: *weight }).collect()
}

fn place(node: u16) -> usize {
    NODES.iter().position(|other| *other == node).unwrap()
}

impl Scenario {
    /// `eras`: the units of each with their weights. The flow is in a bucket that `owners` have in turn.
    fn new(eras: &[&[(u16, u32)]], owners: &[u16], lost: Option<u16>) -> Self {
        let first = BucketTable::new(BUCKETS, &shares(eras[0])).unwrap();
        let mut tables = vec![first];
        for units in &eras[1..] {
            tables.push(plan(tables.last().unwrap(), &shares(units), &[]).unwrap());
        }
        let fits =
            |bucket: &usize| tables.iter().zip(owners).all(|(table, owner)| table.owner(*bucket) == *owner);
        let bucket = (0..BUCKETS).find(fits).expect("a bucket with these owners");
        let earlier = tables[1].chain(bucket).first().copied();
        let mut pruned = tables[1].clone();
        if let Some(earlier) = earlier {
            pruned.retire(bucket, earlier);
        }
        let third = |table: &BucketTable| eras.get(2).map(|units| plan(table, &shares(units), &[]).unwrap());
        let variants = [(tables[1].clone(), third(&tables[1])), (pruned.clone(), third(&pruned))];
        let hasher = FlowHasher::new([0x3c; 40]);
        let key = |port| FlowKey {
            src: "203.0.113.7".parse().unwrap(),
            dst: "192.0.2.1".parse().unwrap(),
            src_port: port,
            dst_port: 443,
            protocol: 6,
        };
        let steps = 2 * (eras.len() as u8 - 1);
        let mut units = Vec::new();
        for (at, node) in NODES.into_iter().enumerate() {
            for step in 0..=steps {
                let of = |retired: usize, planned: usize| {
                    // A unit keeps its own entry.
                    let own = earlier == Some(node);
                    let second = if own { &variants[0].0 } else { &variants[retired].0 };
                    let mut eras = Eras::new(tables[0].clone());
                    if step >= 1 {
                        eras.install(if step >= 2 { second.clone() } else { variants[0].0.clone() });
                    }
                    if step >= 3 {
                        eras.install(variants[planned].1.clone().unwrap());
                    }
                    let in_force = u32::from(step / 2);
                    Units {
                        node: NODES[at],
                        hasher: hasher.clone(),
                        eras,
                        in_force,
                        leases: Leases::default(),
                    }
                };
                units.push([[of(0, 0), of(0, 1)], [of(1, 0), of(1, 1)]]);
            }
        }
        let key = (1..u16::MAX).map(key).find(|key| units[0][0][0].bucket(key) == bucket).unwrap();
        Self { units, steps, lost: lost.map(place), earlier: earlier.map(place), key, begun: owners.to_vec() }
    }

    fn units(&self, state: &State, at: usize) -> &Units {
        let place = at * (usize::from(self.steps) + 1) + usize::from(state.step[at]);
        &self.units[place][usize::from(state.retired_at[at])][usize::from(state.retired)]
    }

    /// Whether `other` is a member by what `at` holds.
    fn is_member(&self, state: &State, at: usize, other: usize) -> bool {
        self.lost != Some(other) || state.step[at] == 0
    }

    fn members(&self) -> impl Iterator<Item = usize> + '_ {
        (0..NODES.len()).filter(|at| self.lost != Some(*at))
    }

    /// Whether the manager lets the core of `at` take its next step.
    fn may_step(&self, state: &State, at: usize) -> bool {
        let step = state.step[at];
        if step == self.steps || self.lost == Some(at) {
            return false;
        }
        let all = |least: u8| self.members().all(|other| state.step[other] >= least);
        if step.is_multiple_of(2) {
            // The next era is planned when all work by this one, and packets of the one before have ended.
            let before = |packet: &Packet| packet.odd_era != (step / 2 % 2 == 1);
            let drained = step == 0 || !state.packets.iter().any(before);
            let told = !state.retired || state.retired_at[at] || self.earlier == Some(at);
            // The first that steps is the plan; the others follow it whatever is on its way.
            let planned = self.members().any(|other| state.step[other] > step);
            all(step) && (drained || planned) && told
        } else if at < PLANES {
            all(step)
        } else {
            all(step) && self.members().filter(|other| *other < PLANES).all(|other| state.step[other] > step)
        }
    }

    fn send(&self, state: &mut State, from: usize, to: u16, visit: &UnitVisit) {
        let to = place(to);
        if !self.is_member(state, from, to) {
            return;
        }
        let arrival = match visit.arrival {
            Arrival::Outside => 0,
            Arrival::Punted => 1,
            Arrival::Unclaimed => 2,
        };
        // From a dispatcher of an older era to the owner, along one earlier owner and back, by the next era to its owner, along
        // two and back: seven times.
        state.seen.far |= visit.ttl < TTL_START - 7;
        state.packets.insert(Packet { from, to, arrival, ttl: visit.ttl, odd_era: visit.odd_era });
    }

    fn arrive(&self, state: &mut State, packet: Packet) {
        let at = packet.to;
        if !self.is_member(state, at, packet.from) {
            return;
        }
        let units = self.units(state, at);
        if state.has_flow[at] {
            let owner = units.table_in_force().owner(units.bucket(&self.key));
            state.seen.kept_by_chain |= owner != NODES[at];
            return;
        }
        let arrival = [Arrival::Outside, Arrival::Punted, Arrival::Unclaimed][usize::from(packet.arrival)];
        let visit =
            UnitVisit { arrival, ttl: packet.ttl, odd_era: packet.odd_era, dispatcher: NODES[PLANES] };
        let mut seen = state.seen_era[at];
        let answer = units.ask(&self.key, &visit, Digest::Unknown, &mut seen);
        state.seen_era[at] = seen;
        match answer {
            Answer::Begin => {
                state.has_flow[at] = true;
                state.seen.begun[at] = true;
            }
            Answer::Send(target) => self.send(state, at, target.unit, &target.visit),
            Answer::TooOften => state.seen.too_often = true,
            Answer::EraUnknown => state.seen.era_unknown = true,
        }
    }
}

impl Model for Scenario {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            step: [0; NODES.len()],
            seen_era: [EraSeen::default(); NODES.len()],
            has_flow: [false; PLANES],
            retired: false,
            retired_at: [false; NODES.len()],
            packets: BTreeSet::new(),
            seen: Seen::default(),
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.packets.len() < IN_FLIGHT_MAX {
            actions.extend((PLANES..NODES.len()).map(Action::Read));
        }
        actions.extend(state.packets.iter().map(|packet| Action::Arrive(*packet)));
        actions.extend(state.packets.iter().map(|packet| Action::Lose(*packet)));
        actions.extend((0..NODES.len()).filter(|at| self.may_step(state, *at)).map(Action::Step));
        let idle = self.members().all(|at| state.step[at] == 2);
        let empty = self.earlier.is_some_and(|at| !state.has_flow[at]);
        if idle && empty && !state.retired {
            actions.push(Action::Retire);
        }
        if state.retired {
            let waits =
                |at: &usize| !state.retired_at[*at] && state.step[*at] == 2 && self.earlier != Some(*at);
            actions.extend((0..NODES.len()).filter(waits).map(Action::TakeRetire));
        }
        if state.has_flow.contains(&true) {
            actions.push(Action::End);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Read(at) => {
                let target = self.units(&state, at).dispatch(&self.key);
                self.send(&mut state, at, target.unit, &target.visit);
            }
            Action::Arrive(packet) => self.arrive(&mut state, packet),
            Action::Lose(packet) => drop(state.packets.remove(&packet)),
            Action::Step(at) => state.step[at] += 1,
            Action::Retire => state.retired = true,
            Action::TakeRetire(at) => state.retired_at[at] = true,
            Action::End => state.has_flow = [false; PLANES],
        }
        (state != *last).then_some(state)
    }

    fn within_boundary(&self, state: &State) -> bool {
        state.packets.len() <= IN_FLIGHT_MAX
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("a flow has one owner", |model: &Self, state: &State| {
                let owners = (0..PLANES).filter(|at| state.has_flow[*at] && model.lost != Some(*at)).count();
                let cut_off = model.lost.is_some_and(|at| state.has_flow[at]);
                // Who was given up may still have it, when nobody sends to it or takes from it any more.
                let fenced = model.members().all(|at| state.step[at] > 0);
                owners == 0 || (owners == 1 && (!cut_off || fenced))
            }),
            Property::always("no packet is sent on too often", |_, state: &State| !state.seen.too_often),
            Property::always("the way is short", |_, state: &State| !state.seen.far),
            Property::always("a packet's table is held", |_, state: &State| !state.seen.era_unknown),
            Property::sometimes("the change ends and the flow lives on", |model: &Self, state: &State| {
                let ended = model.members().all(|at| state.step[at] == model.steps);
                ended && model.members().any(|at| at < PLANES && state.has_flow[at])
            }),
            Property::sometimes("every owner begins it when it may", |model: &Self, state: &State| {
                (0..PLANES).all(|at| state.seen.begun[at] == model.begun.contains(&NODES[at]))
            }),
            Property::always("nobody else begins it", |model: &Self, state: &State| {
                (0..PLANES).all(|at| !state.seen.begun[at] || model.begun.contains(&NODES[at]))
            }),
            Property::sometimes("an earlier owner keeps it", |model: &Self, state: &State| {
                model.earlier.is_none() || state.seen.kept_by_chain
            }),
        ]
    }
}

fn check(eras: &[&[(u16, u32)]], owners: &[u16], lost: Option<u16>) {
    let checker = Scenario::new(eras, owners, lost).checker().threads(2).spawn_bfs().join();
    checker.assert_properties();
}

#[test]
fn a_unit_joins() {
    check(&[&[(1, 1), (2, 1)], &[(1, 1), (2, 1), (3, 2)]], &[1, 3], None);
}

#[test]
fn a_bucket_moves_twice() {
    let eras: [&[(u16, u32)]; 3] =
        [&[(1, 1), (2, 0), (3, 0)], &[(1, 0), (2, 1), (3, 0)], &[(1, 0), (2, 0), (3, 1)]];
    check(&eras, &[1, 2, 3], None);
}

#[test]
fn a_bucket_moves_there_and_back() {
    let eras: [&[(u16, u32)]; 3] = [&[(1, 1), (2, 0)], &[(1, 0), (2, 1)], &[(1, 1), (2, 0)]];
    check(&eras, &[1, 2, 1], None);
}

#[test]
fn a_unit_is_given_up_and_lives() {
    check(&[&[(1, 2), (2, 1), (3, 1)], &[(2, 1), (3, 1)]], &[1, 2], Some(1));
}

#[test]
fn a_bucket_moves_after_a_unit_was_given_up() {
    let eras: [&[(u16, u32)]; 3] = [&[(1, 2), (2, 1), (3, 1)], &[(2, 1), (3, 1)], &[(2, 0), (3, 1)]];
    check(&eras, &[1, 2, 3], Some(1));
}
