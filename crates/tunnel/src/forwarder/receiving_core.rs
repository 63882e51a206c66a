//! The peer's core that a flow's packets are sent to (rows T3, T4), and how a flow changes it in order.
//!
//! The peer tells how it wants its cores addressed ([`crate::mode`]), its cores, its bucket table and the policy;
//! [`ReceivingCores::of_flow`] follows them. When what it
//! tells names another core for a flow, that core must not get the flow's packets before the old one has had the
//! earlier ones: they would leave the peer twice, late or out of order. So a flow that moves *waits*, in the queue,
//! until the old core has reported everything that was sent to it before, and then moves. That takes a round trip and
//! a report interval. It ends early when the old core gives no sign of life, and always after [`MOVE_NS_MAX`].
//!
//! Datagrams that a core which hangs has not reported stay where they are: they may have been delivered, and a copy
//! for another core would be a new datagram, which no replay window recognises. The inner protocols repeat what they
//! miss.

use std::num::NonZeroU8;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use packet::flow::FlowKey;
use steering::cores::CoreSet;
use steering::policy::{CoreChooser, Policy};

use super::assigned::{Assignments, seconds};
use crate::bond::{Bond, PeerCores};
use crate::header::NOT_TOLD;
use crate::hello::ProcessorInfo;
use crate::index::siphash_2_4;
use crate::keys::FlowDefinition;
use crate::mode::{Heading, Label, SteeringMode};
use crate::session::Session;
use crate::time::Time;

/// Flows wait at most this long for their old core.
pub(super) const MOVE_NS_MAX: u64 = 200_000_000;
/// After the last report: a datagram that was overtaken on its way may still come, and be asked for.
const OVERTAKEN_NS: u64 = 3_000_000;
/// Flows a core remembers for the policies that are not a pure function of the hash.
const CHOOSER_FLOWS: usize = 16_384;
/// A remembered flow is forgotten after this long without a packet, s.
const CHOOSER_IDLE_S: u32 = 60;

/// Where a flow's packets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Destination {
    /// To this core of the peer, or to none that is named, with this label.
    To(Heading),
    /// The flow moves and must wait.
    Waits,
    /// The peer has not told about its cores.
    Unknown,
}

/// One core's choice of receiving cores for one bond.
pub(super) struct ReceivingCores {
    /// Processor information in force.
    told: Option<Arc<PeerCores>>,
    /// How the session addresses the peer's cores.
    mode: SteeringMode,
    /// The core that all packets go to, in mode per-tunnel (row T6).
    tunnel_core: u8,
    /// The peer's restarts when it was told.
    restarts: u32,
    /// For the policies that are not a pure function of the hash.
    chooser: Option<Box<CoreChooser>>,
    random: fastrand::Rng,
    change: Option<Change>,
    /// Cores that the peer gave to flows, in mode receiver-assigned (row T5).
    pub assignments: Assignments,
}

/// Waiting of flows, as what the peer told last changes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FlowsWait {
    /// It is as it was.
    Unchanged,
    /// Flows wait from now on: all that was handed to the old cores must be confirmed first.
    Begins,
    /// Flows wait in vain: the session is gone, or the peer is another.
    Ends,
}

/// Newer processor information, while flows wait for it to come into force.
struct Change {
    next: Arc<PeerCores>,
    moves: Moves,
    old: Vec<OldCore>,
    ends: Time,
}

/// Which flows move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moves {
    /// Those whose bucket has another owner, or whose class has other cores.
    Buckets,
    /// Those that were given one of these cores, which may not be used any more.
    From(CoreSet),
    /// All: the rule by which cores are chosen is another.
    All,
}

/// A core that flows move away from.
#[derive(Clone, Copy, Debug)]
struct OldCore {
    core: u8,
    /// Everything that was sent to it is confirmed.
    confirmed: bool,
    /// Not left before.
    not_before: Time,
}

impl ReceivingCores {
    /// `seed` is the bond's: each core draws other cores from it.
    pub fn new(core: u8, seed: u64) -> Self {
        let random = fastrand::Rng::with_seed(seed.wrapping_add(u64::from(core)));
        Self {
            told: None,
            mode: SteeringMode::default(),
            tunnel_core: 0,
            restarts: 0,
            chooser: None,
            random,
            change: None,
            assignments: Assignments::default(),
        }
    }

    /// Processor information in force.
    pub fn told(&self) -> Option<&PeerCores> {
        self.told.as_deref()
    }

    /// Definition of a flow for the peer (row T2).
    pub fn flow_definition(&self) -> FlowDefinition {
        self.told.as_ref().map_or_else(Default::default, |told| told.info.flow)
    }

    /// Takes over what the peer told last.
    pub fn follow(&mut self, now: Time, bond: &Bond, session: Option<&Session>) -> FlowsWait {
        let before = self.makes_wait();
        if self.take_over_latest(now, bond, session) {
            FlowsWait::Begins
        } else if before && !self.makes_wait() {
            FlowsWait::Ends
        } else {
            FlowsWait::Unchanged
        }
    }

    /// Whether flows may wait: for old cores, or for an answer of the peer.
    fn makes_wait(&self) -> bool {
        self.change.is_some() || self.assignments.waiting().is_some() || self.assignments.asked.is_waiting()
    }

    /// True when flows begin to wait.
    fn take_over_latest(&mut self, now: Time, bond: &Bond, session: Option<&Session>) -> bool {
        let latest = bond.cores.load();
        let Some(latest) = &*latest else {
            self.told = None;
            self.change = None;
            return false;
        };
        let asks =
            session.is_some_and(|session| session.says_cores) && bond.peer.load().steering.ask_core_first;
        self.assignments.asked.set_on(asks);
        let restarts = bond.restarts.load(Relaxed);
        let mode = session.map_or_else(SteeringMode::default, |session| session.sends);
        if restarts != self.restarts || session.is_none() || mode != self.mode || self.told.is_none() {
            // Nothing that is under way will be delivered by the peer as it is now. Or the rule is another: what went
            // before, in another session, is not reported in this one.
            if restarts != self.restarts || mode != self.mode {
                self.assignments.clear();
            }
            self.restarts = restarts;
            self.mode = mode;
            self.take_over(bond, Arc::clone(latest));
            return false;
        }
        if self.change.is_some() {
            return false;
        }
        let Some(told) = self.told.as_ref().filter(|told| !Arc::ptr_eq(told, latest)) else { return false };
        let leaves = match self.mode {
            SteeringMode::PerTunnel => {
                let from: CoreSet = [self.tunnel_core].into_iter().collect();
                (bond.tunnel_core_of(&latest.info) != self.tunnel_core).then_some((Moves::From(from), from))
            }
            // Flows of a core that may not be used any more go without one, until they are given another.
            SteeringMode::ReceiverAssigned => {
                let from = told.info.usable.without(&latest.info.usable);
                (!from.is_empty()).then_some((Moves::From(from), from))
            }
            // The header names none: nothing changes its lane.
            SteeringMode::SealedCoreId | SteeringMode::ReceiverDecides | SteeringMode::SessionId => None,
            _ => moves(&told.info, &latest.info),
        };
        let Some((moves, from)) = leaves else {
            self.take_over(bond, Arc::clone(latest));
            return false;
        };
        let old = from.iter().map(|core| OldCore { core, confirmed: false, not_before: now }).collect();
        self.change = Some(Change { next: Arc::clone(latest), moves, old, ends: now.plus_ns(MOVE_NS_MAX) });
        true
    }

    /// Whether flows wait for their old cores.
    pub fn is_changing(&self) -> bool {
        self.change.is_some()
    }

    /// The cores of the peer that flows may move to.
    pub fn next_cores(&self) -> CoreSet {
        self.change.as_ref().map_or(CoreSet::EMPTY, |change| change.next.info.usable)
    }

    /// The cores that flows wait for.
    pub fn old_cores(&self) -> impl Iterator<Item = u8> + '_ {
        self.change.iter().flat_map(|change| change.old.iter().map(|old| old.core))
    }

    /// Lets flows move whose old core has `confirmed` everything, is `silent`, or took too long. True if any did.
    pub fn advance(&mut self, now: Time, bond: &Bond, confirmed: &[u8], silent: &[u8]) -> bool {
        let Some(change) = &mut self.change else { return false };
        let before = change.old.len();
        let over = now >= change.ends;
        change.old.retain_mut(|old| {
            if !old.confirmed && confirmed.contains(&old.core) {
                old.confirmed = true;
                old.not_before = old.not_before.max(now.plus_ns(OVERTAKEN_NS));
            }
            let done = old.confirmed && now >= old.not_before;
            !(over || done || silent.contains(&old.core))
        });
        let (moved, left) = (change.old.len() < before, change.old.len());
        if left == 0
            && let Some(change) = self.change.take()
        {
            self.take_over(bond, change.next);
            return true;
        }
        moved
    }

    /// When [`Self::advance`] has something to do, if no report comes before.
    pub fn next(&self) -> Time {
        let Some(change) = &self.change else { return Time::MAX };
        let confirmed = change.old.iter().filter(|old| old.confirmed).map(|old| old.not_before);
        confirmed.min().unwrap_or(Time::MAX).min(change.ends)
    }

    /// A datagram for `core` is sent again and will be there at `at`.
    pub fn note_repeat(&mut self, core: u8, at: Time) {
        if let Some(change) = &mut self.change
            && let Some(old) = change.old.iter_mut().find(|old| old.core == core)
        {
            old.not_before = old.not_before.max(at);
        }
    }

    /// Hash of a flow under the peer's key.
    pub fn hash(&self, flow: &FlowKey) -> Option<u32> {
        self.told.as_ref().map(|told| told.hash(flow))
    }

    /// Session-ID of a flow (row T9): a hash under a secret that differs between bonds and process starts.
    pub fn session_id(&self, bond: &Bond, flow: &FlowKey) -> u64 {
        if self.mode == SteeringMode::SessionId { session_id(bond.seed, flow) } else { 0 }
    }

    /// A connection of TCP begins: on the ports of an older one it is a flow of its own wherever cores of flows are remembered
    /// (row T2), unless all that goes between two ends is one flow.
    pub fn begin_connection(&mut self, now: Time, flow: &FlowKey, class: u8, mark: NonZeroU8) {
        let Some(hash) = self.hash(flow) else { return };
        if !self.flow_definition().has_connections() {
            return;
        }
        if self.mode == SteeringMode::ReceiverAssigned {
            self.assignments.begin_connection(now, hash, mark);
        }
        if let Some(chooser) = &mut self.chooser {
            chooser.begin_connection(hash, class, mark, seconds(now));
        }
    }

    /// Where the next packet of a flow goes, by its hash, its class and its session-ID.
    pub fn of_flow(&mut self, now: Time, hash: u32, class: u8, session_id: u64) -> Destination {
        let label = match self.mode {
            SteeringMode::CoreId | SteeringMode::PerTunnel | SteeringMode::SealedHeader => {
                return self.named(now, hash, class);
            }
            SteeringMode::ReceiverAssigned => return self.assigned(now, (hash, class)),
            SteeringMode::SealedCoreId => match self.named(now, hash, class) {
                Destination::To(heading) => Label::Core(heading.peer_core),
                other => return other,
            },
            _ if self.told.is_none() => return Destination::Unknown,
            SteeringMode::ReceiverDecides => Label::None,
            SteeringMode::SessionId => Label::Session(session_id),
        };
        Destination::To(Heading { peer_core: NOT_TOLD, label })
    }

    /// The core that the peer gave the flow; without one the header names none (row T5).
    fn assigned(&mut self, now: Time, flow: (u32, u8)) -> Destination {
        let Some(told) = &self.told else { return Destination::Unknown };
        let leaving = match &self.change {
            Some(Change { moves: Moves::From(leaving), .. }) => *leaving,
            Some(_) => return Destination::Waits,
            None => CoreSet::EMPTY,
        };
        match self.assignments.core_of(now, flow, &told.info.usable) {
            Err(()) => Destination::Waits,
            Ok(Some(core)) if leaving.contains(core) => Destination::Waits,
            Ok(core) => Destination::To(core.unwrap_or(NOT_TOLD).into()),
        }
    }

    /// Lets flows that the peer gave cores wait. True if some do now.
    pub fn begin_assigned(&mut self, now: Time) -> bool {
        let Some(told) = &self.told else { return false };
        self.assignments.begin(now, &told.info.usable)
    }

    /// Lets them go there. True if they do.
    pub fn end_assigned(&mut self, now: Time, confirmed: bool) -> bool {
        self.assignments.end(now, confirmed)
    }

    /// The core for the next packet of the flow with this hash and class, as the header names it.
    fn named(&mut self, now: Time, hash: u32, class: u8) -> Destination {
        let Some(told) = &self.told else { return Destination::Unknown };
        let by_table = match self.mode {
            SteeringMode::PerTunnel => self.tunnel_core,
            _ => told.core_of_hash(hash, class),
        };
        let Some(change) = &self.change else {
            return Destination::To(self.chosen(now, hash, class).unwrap_or(by_table).into());
        };
        match change.moves {
            Moves::All => Destination::Waits,
            Moves::Buckets => {
                let next = change.next.core_of_hash(hash, class);
                if next != by_table && change.old.iter().any(|old| old.core == by_table) {
                    Destination::Waits
                } else {
                    Destination::To(next.into())
                }
            }
            Moves::From(leaving) => {
                let core = self.chosen(now, hash, class).unwrap_or(by_table);
                if leaving.contains(core) { Destination::Waits } else { Destination::To(core.into()) }
            }
        }
    }

    /// The core by the policies that remember flows.
    fn chosen(&mut self, now: Time, hash: u32, class: u8) -> Option<u8> {
        let (chooser, told) = (self.chooser.as_mut()?, self.told.as_ref()?);
        chooser.choose(&told.info.table, hash, class, self.random.u32(..), seconds(now))
    }

    fn take_over(&mut self, bond: &Bond, told: Arc<PeerCores>) {
        self.change = None;
        self.tunnel_core = bond.tunnel_core_of(&told.info);
        if self.told.as_ref().is_some_and(|known| Arc::ptr_eq(known, &told)) {
            return;
        }
        let chooses = self.mode.sender_chooses();
        let (policy, remote) = (told.info.policy, told.info.remote_cores());
        self.told = Some(told);
        match &mut self.chooser {
            _ if policy == Policy::Hash || !chooses => self.chooser = None,
            Some(chooser) if chooser.policy() == policy => chooser.update(&remote),
            chooser => {
                *chooser = Some(Box::new(CoreChooser::new(policy, &remote, CHOOSER_FLOWS, CHOOSER_IDLE_S)));
            }
        }
    }
}

/// A 64-bit hash of a flow under a key: equal for two flows only by chance.
fn session_id(seed: u64, flow: &FlowKey) -> u64 {
    let words = |address: std::net::IpAddr| {
        let bits = match address {
            std::net::IpAddr::V4(address) => u128::from(address.to_bits()),
            std::net::IpAddr::V6(address) => address.to_bits(),
        };
        [bits as u64, (bits >> 64) as u64]
    };
    let ports = u64::from(flow.src_port) << 32 | u64::from(flow.dst_port) << 16 | u64::from(flow.protocol);
    let [a, b] = words(flow.src);
    let [c, d] = words(flow.dst);
    let key = [seed, seed.rotate_left(32) ^ 0x7365_7373_696f_6e73];
    [a, b, c, d].into_iter().fold(siphash_2_4(key, ports), |hash, word| siphash_2_4(key, hash ^ word))
}

/// Which flows move, and from which cores, when the peer tells `new` after `old`; `None` when none does.
fn moves(old: &ProcessorInfo, new: &ProcessorInfo) -> Option<(Moves, CoreSet)> {
    let all = CoreSet::first(u16::from(old.cores));
    if old.policy != new.policy || old.flow != new.flow || old.flow_hash_key != new.flow_hash_key {
        return Some((Moves::All, all));
    }
    // Where the table names cores that may not be used, others have their flows.
    let by_table = |info: &ProcessorInfo| {
        info.table
            .owners()
            .iter()
            .all(|owner| u8::try_from(*owner).is_ok_and(|core| info.usable.contains(core)))
    };
    let rules = old.reserved == new.reserved
        && old.preferred == new.preferred
        && (old.usable == new.usable || old.policy != Policy::Hash || by_table(old) && by_table(new));
    let (moves, from) = if old.policy == Policy::Hash {
        if old.table.buckets() != new.table.buckets() {
            return Some((Moves::All, all));
        }
        let from = old.table.moves(&new.table).filter_map(|(_, from, _)| u8::try_from(from).ok());
        // Cores for classes: a flow of one may be on any core.
        (Moves::Buckets, if rules { from.collect() } else { old.usable })
    } else {
        let gone = if rules { all.without(&new.usable) } else { all };
        // Nobody is on a core that could not be used before either.
        let from = gone.and(&old.usable);
        (Moves::From(from), from)
    };
    (!from.is_empty()).then_some((moves, from))
}
