//! One core's gateway: batches of frames in, frames with an outcome out.
//!
//! Order of calls: [`Services::follow`] when policy, ownership or neighbors changed; [`Services::batch`] for what was
//! read, [`Services::handed`] for what other cores handed over; [`Services::tick`] in every round. Nothing here waits or
//! allocates per packet of a known flow.
//!
//! A batch goes through in three passes, so that the memory it needs is on its way before it is looked at: read keys
//! and prefetch the index, probe the index and prefetch the flows, act. Acting is `fast` for nearly all packets,
//! `established` for what is unusual about a known flow, `new_flow` for a new one, `fragments` for fragments.
//!
//! Each part of the state has one duty: `routing` where packets leave, `flows` the table and what is counted over it,
//! [`Nat`] sources, `fragments` packets in pieces, `proxy_sequence` shifted numbers, `dead_backends` flows whose server is
//! gone, `copies` word of flows for another machine, `counters` counts by rule.

use std::sync::Arc;

use packet::attachment::Egress;
use packet::flow::FlowKey;
use packet::{DropCounters, DropReason};

use crate::flow::{Direction, FlowId, FlowTable, Hint, Removed, flags};
use crate::hash::SecretState;
use crate::held_ports::HeldPorts;
use crate::icmp::Limiter;
use crate::nat::{Nat, NatEvent};
use crate::policy::Policy;
use crate::random::Random;
use steering::ownership::Ownership;

mod answers;
mod bloom_filter;
mod context;
mod copies;
mod counters;
mod dead_backends;
mod established;
mod explain;
mod export;
mod fast;
mod flows;
mod fragments;
mod frame;
mod hairpin;
mod host_ports;
mod import;
mod new_flow;
mod next_hops;
mod proxy_sequence;
mod quotes;
mod redirect;
mod routing;
#[cfg(test)]
mod tests;
mod translation;
mod units;

pub use copies::{Copied, PASS_NS as COPIES_PASS_NS};
pub use counters::{Counters, NatRefusals, RuleCounters};
pub use explain::{Entry, Explanation, FlowCores, SourceNat, explain};
pub use frame::{ETHERNET_BYTES, Frame, Handed, Origin, Outcome, Output, Piece};
pub use host_ports::PortCounts;
pub use next_hops::Neighbors;

use context::PacketContext;
use dead_backends::DeadBackends;
use flows::{Expiry, Flows, SWEEP_NS, SWEEP_PAUSE_NS};
use fragments::Fragments;
use quotes::Quoted;
use routing::Routing;

/// Frames of one batch at most.
pub const BATCH_MAX: usize = 256;

/// [`Services::tick`] wants to be called again after so many nanoseconds at the latest while there are flows.
const TICK_NS: u64 = 100_000_000;

/// Under a flood, flows that nobody answers are kept so long …
const HURRY_S: u32 = 4;
/// … and when there is no room at all only so long …
const EMERGENCY_S: u32 = 1;
/// … among so many entries that are looked at for a new flow.
const EMERGENCY_ENTRIES: usize = 128;

/// Fields that are read of a frame before it is acted upon.
#[derive(Clone, Copy)]
struct Look {
    key: FlowKey,
    hash: u64,
    tenant: u16,
    hint: Hint,
    found: Option<(FlowId, Direction)>,
}

/// The state machine of all services for one core: firewall, NAT, virtual servers, fragments, routes.
pub struct Services {
    routing: Routing,
    flows: Flows,
    nat: Nat,
    fragments: Fragments,
    shifts: proxy_sequence::Shifts,
    dead_backends: DeadBackends,
    /// Word of the flows for a machine that keeps copies of them.
    copies: Option<Box<copies::Copies>>,
    /// Ports that programs of the host have opened since the policy was made.
    opened: Arc<HeldPorts>,
    /// Of ICMP errors and resets.
    limiter: Limiter,
    /// Of "packet too big": nobody who provokes other errors silences it, and nothing stands in for it.
    too_big_limiter: Limiter,
    random: Random,
    /// Counters.
    pub counters: Counters,
    /// Counters by rule of the present policy.
    pub rule_counters: RuleCounters,
    /// Drops by reason.
    pub drops: DropCounters,
    #[cfg(test)]
    fast_path: FastPath,
}

/// Tests compare the fast path with the slow one.
#[cfg(test)]
#[derive(Default)]
struct FastPath {
    off: bool,
    taken: u64,
}

impl Services {
    /// Those of core `id`, with an empty flow table. `random`: a generator of this core's own.
    #[must_use]
    pub fn new(
        id: u8,
        mut random: Random,
        policy: &Arc<Policy>,
        ownership: &Arc<Ownership>,
        neighbors: Arc<Neighbors>,
    ) -> Self {
        let limits = policy.limits();
        let mut services = Self {
            routing: Routing::new(id, &mut random, policy, ownership, neighbors),
            flows: Flows::new(&mut random, limits.flows_max, ownership.table.buckets()),
            nat: Nat::new(id, ownership.cores, &mut random),
            fragments: Fragments::new(policy, &mut random),
            shifts: proxy_sequence::Shifts::new(SecretState::draw(&mut random)),
            dead_backends: DeadBackends::new(policy.balancer.deaths()),
            copies: None,
            opened: Arc::default(),
            limiter: Limiter::new(limits.errors_per_s_max),
            too_big_limiter: Limiter::new(limits.errors_per_s_max),
            random,
            counters: Counters::default(),
            rule_counters: RuleCounters::default(),
            drops: DropCounters::default(),
            #[cfg(test)]
            fast_path: FastPath::default(),
        };
        services.take_over(policy, ownership);
        services
    }

    fn take_over(&mut self, policy: &Arc<Policy>, ownership: &Arc<Ownership>) {
        self.nat.follow(&policy.nat, &ownership.table, &ownership.hasher, &ownership.solvers);
        self.nat.follow_held(&policy.spec.host.held_ports, &self.opened);
        self.rule_counters.follow(&self.routing.policy, policy);
        self.fragments.follow(policy);
        self.limiter.set_rate(policy.limits().errors_per_s_max);
        self.too_big_limiter.set_rate(policy.limits().errors_per_s_max);
        self.routing.take_over(policy, ownership);
    }

    /// Takes over what control has published since the last round. Flows stay; those of an older policy are decided
    /// again when their next packet comes.
    pub fn follow(&mut self, policy: &Arc<Policy>, ownership: &Arc<Ownership>, neighbors: &Arc<Neighbors>) {
        let new_policy = !Arc::ptr_eq(policy, &*self.routing.policy);
        if new_policy {
            self.routing.begin_era();
        }
        if new_policy || !Arc::ptr_eq(ownership, &self.routing.ownership) {
            self.take_over(policy, ownership);
        }
        if new_policy || self.routing.is_news(neighbors) {
            self.routing.follow_neighbors(neighbors);
        }
    }

    /// Takes over which ports programs of the host hold that the policy does not know yet. No flow is decided again.
    pub fn follow_opened(&mut self, opened: &Arc<HeldPorts>) {
        if !Arc::ptr_eq(opened, &self.opened) {
            self.opened = Arc::clone(opened);
            self.nat.follow_held(&self.routing.policy.spec.host.held_ports, opened);
        }
    }

    /// Acts on what was read: afterwards each frame has its outcome. Frames beyond [`BATCH_MAX`] stay pending.
    pub fn batch(&mut self, now_ns: u64, frames: &mut [Frame<'_>], out: &mut impl Output) {
        let mut looks: [Option<Look>; BATCH_MAX] = [None; BATCH_MAX];
        for (frame, look) in frames.iter_mut().zip(&mut looks) {
            *look = self.look(frame);
        }
        let table = &self.flows.table;
        for look in looks.iter_mut().flatten() {
            look.hint = table.prefetch_entry(look.hash);
        }
        for look in looks.iter_mut().flatten() {
            look.found = table.find_hinted(look.hint, look.hash, &look.key, look.tenant);
            if let Some((id, _)) = look.found {
                table.prefetch_counters(id);
            }
        }
        self.flows.begun.clear();
        let removals = self.flows.removals;
        for (frame, look) in frames.iter_mut().zip(&mut looks) {
            let Some(look) = look else { continue };
            self.counters.rx_packets += 1;
            self.counters.rx_bytes += frame.packet().len() as u64;
            let same = self.flows.removals == removals;
            if same && self.established_fast(now_ns, frame, look) {
                continue;
            }
            // An earlier frame of the batch may have begun the flow, or ended one whose place is taken anew.
            if !same || (look.found.is_none() && self.flows.begun.may_have(look.hash)) {
                look.found = self.flows.table.find(look.hash, &look.key, look.tenant);
            }
            self.act(now_ns, frame, look, Origin::Wire, out);
        }
    }

    /// Acts on one packet or super-packet, as [`Services::batch`] does on many.
    pub fn packet(&mut self, now_ns: u64, frame: &mut Frame<'_>, out: &mut impl Output) {
        let Some(mut look) = self.look(frame) else { return };
        self.counters.rx_packets += 1;
        self.counters.rx_bytes += frame.packet().len() as u64;
        look.found = self.flows.table.find(look.hash, &look.key, look.tenant);
        if !self.established_fast(now_ns, frame, &look) {
            self.act(now_ns, frame, &look, Origin::Wire, out);
        }
    }

    /// Acts on what another core handed over. Afterwards the buffer is the caller's again.
    pub fn handed(&mut self, now_ns: u64, handed: &mut Handed, out: &mut impl Output) {
        self.counters.handed_in += 1;
        let (origin, piece) = (handed.origin, handed.piece);
        let packet = &mut handed.packet;
        let (ingress, offload, visit) = (packet.ingress, packet.offload, packet.visit);
        let bytes = packet.with_room(ETHERNET_BYTES);
        let mut frame = Frame::new(ingress, offload, bytes);
        frame.visit = visit;
        if let Some(piece) = piece {
            self.piece(now_ns, &mut frame, &piece, origin, out);
        } else if let Some(mut look) = self.look(&mut frame) {
            look.found = self.flows.table.find(look.hash, &look.key, look.tenant);
            self.act(now_ns, &mut frame, &look, origin, out);
        }
        self.settle(frame, out);
    }

    /// A packet that is not part of the batch goes where its outcome says.
    fn settle(&mut self, frame: Frame<'_>, out: &mut impl Output) {
        if let Outcome::Forward(Egress::Unit(unit)) = frame.outcome {
            return out.to_unit(unit, &frame);
        }
        let Frame { offload, bytes, outcome, flow, .. } = frame;
        match outcome {
            Outcome::Forward(Egress::Bond(_)) => {
                let key = flow.map(|(id, direction)| self.flows.table.leaves_as(id, direction));
                out.emit(outcome, key.as_ref(), &offload, bytes);
            }
            Outcome::Forward(_) | Outcome::DeviceIngress(_) | Outcome::Resolve(..) => {
                out.emit(outcome, None, &offload, bytes);
            }
            Outcome::Pending | Outcome::Consumed | Outcome::Dropped(_) => {}
        }
    }

    /// Reads the flow key and has the index fetched.
    #[inline]
    fn look(&mut self, frame: &mut Frame<'_>) -> Option<Look> {
        let tenant = self.routing.tenants.of(frame.ingress);
        match FlowKey::of(frame.packet()) {
            Ok(key) => {
                let hash = self.flows.table.hash(&key, tenant);
                self.flows.table.prefetch(hash);
                Some(Look { key, hash, tenant, hint: Hint::default(), found: None })
            }
            Err(reason) => {
                self.counters.rx_packets += 1;
                self.dropped(frame, reason);
                None
            }
        }
    }

    /// A known flow, a fragment, or a miss.
    #[inline]
    fn act(
        &mut self,
        now_ns: u64,
        frame: &mut Frame<'_>,
        look: &Look,
        origin: Origin,
        out: &mut impl Output,
    ) {
        let packet = match PacketContext::read(now_ns, frame, look.key, look.tenant, origin) {
            Ok(packet) => packet,
            Err(reason) => return self.dropped(frame, reason),
        };
        if packet.header.is_fragmented() {
            self.fragment(&packet, frame, out);
            return;
        }
        match Quoted::of(&packet, frame) {
            Some(quoted) => self.fragment_error(&packet, frame, &quoted, out),
            None => self.act_whole(&packet, frame, look.found, out),
        }
    }

    /// A packet whose key tells its flow.
    #[inline]
    fn act_whole(
        &mut self,
        packet: &PacketContext,
        frame: &mut Frame<'_>,
        found: Option<(FlowId, Direction)>,
        out: &mut impl Output,
    ) {
        match found {
            Some(flow) => {
                if let Err(reason) = self.established(packet, frame, flow, out) {
                    self.tell_of_route(packet, frame, reason, out);
                    self.dropped(frame, reason);
                }
            }
            None => self.new_flow(packet, frame, out),
        }
    }

    fn dropped(&mut self, frame: &mut Frame<'_>, reason: DropReason) {
        self.drops.add(reason);
        frame.outcome = Outcome::Dropped(reason);
    }

    /// Expiry; call it every round. Returns when it wants to be called again at the latest.
    pub fn tick(&mut self, now_ns: u64) -> u64 {
        self.fragments.tick(now_ns);
        let Some(entries) = self.flows.due(now_ns, self.routing.is_lost()) else {
            return now_ns + SWEEP_PAUSE_NS;
        };
        self.nat.tick(now_ns);
        if entries > 0 {
            self.sweep(now_ns, entries, HURRY_S);
        }
        let mappings = self.nat.mappings_by_bucket();
        if self.flows.table.is_empty() && mappings.iter().all(|count| *count == 0) {
            now_ns + SWEEP_NS
        } else if self.flows.is_behind() {
            now_ns
        } else {
            now_ns + TICK_NS
        }
    }

    /// Makes room for one more flow that nobody has answered yet: the flood's own flows go first, and none that was
    /// answered.
    fn make_room(&mut self, now_ns: u64) -> bool {
        let embryonic_max = self.routing.policy.limits().embryonic_max;
        if self.flows.embryonic.count() >= embryonic_max {
            self.sweep(now_ns, EMERGENCY_ENTRIES, EMERGENCY_S);
        }
        self.flows.embryonic.count() < embryonic_max
    }

    /// Looks at some entries; `patience_s`: how long a flow without an answer may be silent while there are too many.
    fn sweep(&mut self, now_ns: u64, entries: usize, patience_s: u32) {
        let Routing { policy, era, .. } = &self.routing;
        let crowded = self.flows.embryonic.count() > policy.limits().embryonic_max / 2;
        let expiry = Expiry {
            now_ns,
            era: *era,
            timeouts: policy.timeouts(),
            patience_s: (patience_s < HURRY_S || crowded).then_some(patience_s),
            lost: self.routing.is_lost(),
        };
        for removed in self.flows.sweep(entries, &expiry) {
            self.closed(now_ns, &removed);
        }
        if self.routing.is_lost() {
            self.nat.forget_clients();
        }
    }

    /// Ends a flow now.
    fn end(&mut self, now_ns: u64, id: FlowId) {
        if let Some(removed) = self.flows.remove(id) {
            self.closed(now_ns, &removed);
        }
    }

    /// Gives back what an ended flow held.
    fn closed(&mut self, now_ns: u64, removed: &Removed) {
        let (record, policy) = (&removed.record, &self.routing.policy);
        let original = (removed.original, removed.tenants[0]);
        let reply = (removed.reply, removed.tenants[1]);
        self.counters.flows_closed += 1;
        if let Some(copies) = &mut self.copies {
            copies.note_end(removed);
        }
        self.flows.inherited -= u32::from(record.flags & flags::INHERITED != 0);
        self.flows.ended(self.routing.live_buckets(&original, &reply), record);
        self.flows.ports.note(&original.0, &reply.0, record, false);
        self.flows.note_unit_bucket(self.routing.units.as_ref(), (&original, record), -1);
        self.rule_counters.count_flow(policy, record, &original.0, false);
        if record.flags & flags::PROXY_PROTOCOL != 0 {
            self.shifts.forget(&original.0, original.1);
        }
        if record.nat != 0 {
            // As the NAT saw it: behind a translated destination.
            let client = if record.flags & flags::SOURCE_NAT == 0 {
                original.0
            } else {
                reply.0.reversed().with_source(original.0.src, original.0.sender_port())
            };
            self.nat.release(now_ns, &reply.0, reply.1, record, &client, original.1);
        }
        if let Some(backend) = record.backend.checked_sub(1) {
            policy.balancer.closed(backend, established::is_over(record));
        }
    }

    /// Policy in force.
    #[must_use]
    pub fn policy(&self) -> &Policy {
        &self.routing.policy
    }

    /// Number of this core.
    #[must_use]
    pub fn id(&self) -> u8 {
        self.routing.core
    }

    /// Flows now.
    #[must_use]
    pub fn flows(&self) -> &FlowTable {
        &self.flows.table
    }

    /// Next hops that have a number.
    #[cfg(test)]
    fn next_hops(&self) -> usize {
        self.routing.hops.len()
    }

    /// How busy this core is, percent: what `fragments = load-below-percent` goes by.
    pub fn set_load_percent(&mut self, load_percent: u8) {
        self.fragments.load_percent = load_percent;
    }

    /// Live entries by bucket: a flow counts in both of its buckets, an endpoint-independent mapping in its client's.
    #[must_use]
    pub fn live(&self) -> Vec<u32> {
        let mut live = self.flows.live.clone();
        for (sum, mappings) in live.iter_mut().zip(self.nat.mappings_by_bucket()) {
            *sum = sum.wrapping_add(*mappings);
        }
        live
    }

    /// Live flows that have not seen a reply.
    #[must_use]
    pub fn embryonic(&self) -> u32 {
        self.flows.embryonic.count()
    }

    /// Live flows that were another machine's.
    #[must_use]
    pub fn inherited(&self) -> u32 {
        self.flows.inherited
    }

    /// Source NAT of this core.
    #[must_use]
    pub fn nat(&self) -> &Nat {
        &self.nat
    }

    /// Era of the bucket table that this core works by.
    #[must_use]
    pub fn table_era(&self) -> u32 {
        self.routing.ownership.table.era()
    }

    /// Fragments that were held and are dropped since, by reason.
    #[must_use]
    pub fn late_drops(&self) -> DropCounters {
        self.fragments.late_drops()
    }

    /// Ports held by flows of this core.
    #[must_use]
    pub fn ports_held(&self) -> u64 {
        self.nat.ports_held()
    }

    /// Whether anybody wants [`Services::nat_events`].
    pub fn set_nat_events_wanted(&mut self, wanted: bool) {
        self.nat.set_events_wanted(wanted);
    }

    /// NAT events since the last call, oldest first.
    pub fn nat_events(&mut self) -> impl Iterator<Item = NatEvent> + '_ {
        self.nat.events()
    }
}
