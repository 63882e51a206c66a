//! One core's gateway: batches of frames in, frames with an outcome out.
//!
//! Order of calls: [`Services::follow`] when policy, ownership or neighbors changed; [`Services::batch`] for what was read,
//! [`Services::handed`] for what other cores handed over; [`Services::tick`] in every round. Nothing here waits or allocates
//! per packet of a known flow.
//!
//! A batch goes through in three passes, so that the memory it needs is on its way before it is looked at: read keys
//! and prefetch the index, probe the index and prefetch the flows, act. Acting is `fast` for nearly all packets, `established`
//! for what is unusual about a known flow, `new_flow` for a new one, `fragments` for fragments.

use std::net::SocketAddr;
use std::sync::Arc;

use packet::attachment::Egress;
use packet::flow::FlowKey;
use packet::ip::{IpHeader, PROTOCOL_ICMP, PROTOCOL_ICMPV6};
use packet::vnet::VirtioNetHeader;
use packet::{DropCounters, DropReason};

use crate::flow::{Direction, FlowId, FlowTable, Hint, Record, Removed, flags};
use crate::fragment::{FragmentLimits, FragmentTable, Rendezvous};
use crate::icmp::Limiter;
use crate::nat::{Nat, NatEvent};
use crate::policy::{Policy, Tenants};
use steering::ownership::Ownership;

mod answer;
mod bloom_filter;
mod counters;
mod established;
mod explain;
mod fast;
mod fragments;
mod frame;
mod hairpin;
mod new_flow;
mod next_hops;
mod proxy_sequence;
#[cfg(test)]
mod tests;

pub use counters::{Counters, NatRefusals};
pub use explain::{Entry, Explanation, explain};
pub use frame::{ETHERNET_BYTES, Frame, Handed, Origin, Outcome, Output, Piece};
pub use next_hops::Neighbors;

/// Frames of one batch at most.
pub const BATCH_MAX: usize = 256;

/// Nanoseconds of a tick of [`Record::seen`], as a shift.
const TICK_SHIFT: u32 = 27;

/// The flow table is swept once in so many nanoseconds …
const SWEEP_NS: u64 = 2_000_000_000;
/// … in portions of at most so many entries a round, so that no round is long.
const SWEEP_ENTRIES_MAX: usize = 4_096;

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

/// The gateway of one core.
pub struct Services {
    id: u8,
    /// Behind a counter of this core's own: taking a reference writes to memory that no other core reads.
    #[expect(clippy::redundant_allocation, reason = "the outer counter is the point")]
    policy: Arc<Arc<Policy>>,
    /// Changes of the policy and the next hops that this core has seen; never 0. Flows of another era are decided again.
    era: u16,
    /// A copy of the policy's, near this core.
    tenants: Tenants,
    ownership: Arc<Ownership>,
    neighbors: Arc<Neighbors>,
    flows: FlowTable,
    nat: Nat,
    rendezvous: Rendezvous,
    fragments: FragmentTable,
    hops: next_hops::Hops,
    limiter: Limiter,
    shifts: proxy_sequence::Shifts,
    random: u64,
    /// Live flows by bucket: both buckets of a flow count.
    live: Vec<u32>,
    /// Live flows that have not seen a reply.
    embryonic: u32,
    swept_ns: u64,
    sweep_debt: f64,
    /// Flows ended while a batch was acted upon: what was found before may be another flow by now.
    removals: u32,
    /// Flows begun while a batch was acted upon.
    begun: bloom_filter::BloomFilter,
    /// Tests compare the fast path with the slow one.
    #[cfg(test)]
    slow_path_only: bool,
    #[cfg(test)]
    went_fast: u64,
    scratch: Vec<u8>,
    /// While a packet that was assembled here goes on: its identification, by which it may be cut again.
    assembled_id: Option<u32>,
    /// How busy this core is, percent: what `fragments = load-below-percent` goes by. Whoever runs the core sets it.
    pub load_percent: u8,
    /// Counters.
    pub counters: Counters,
    /// Drops by reason.
    pub drops: DropCounters,
    /// Packets allowed by firewall rule, first packets of flows only.
    pub rule_hits: Vec<u64>,
    /// Live flows by NAT rule: the operator's, then those of virtual servers.
    pub nat_flows: Vec<u64>,
    /// New flows that the operator's NAT rules could not translate.
    pub nat_refusals: Vec<NatRefusals>,
    /// Live and begun flows by port forward.
    pub forward_flows: Vec<(u64, u64)>,
}

impl Services {
    /// A core with an empty flow table. `seed`: 8 random bytes of its own.
    #[must_use]
    pub fn new(
        id: u8,
        seed: u64,
        policy: Arc<Policy>,
        ownership: Arc<Ownership>,
        neighbors: Arc<Neighbors>,
    ) -> Self {
        let limits = *policy.limits();
        let pieces = FragmentLimits::of(&limits, policy.timeouts());
        let mut core = Self {
            id,
            flows: FlowTable::new(seed, limits.flows_max),
            nat: Nat::new(id, ownership.cores, seed.rotate_left(17)),
            rendezvous: Rendezvous::new(pieces, seed.rotate_left(31)),
            fragments: FragmentTable::new(pieces, seed.rotate_left(47)),
            hops: next_hops::Hops::default(),
            limiter: Limiter::new(limits.errors_per_s_max),
            shifts: proxy_sequence::Shifts::new(seed.rotate_left(7)),
            random: seed | 1,
            live: vec![0; ownership.table.buckets()],
            embryonic: 0,
            swept_ns: 0,
            sweep_debt: 0.0,
            removals: 0,
            begun: bloom_filter::BloomFilter::default(),
            #[cfg(test)]
            slow_path_only: false,
            #[cfg(test)]
            went_fast: 0,
            scratch: Vec::new(),
            assembled_id: None,
            load_percent: 0,
            counters: Counters::default(),
            drops: DropCounters::default(),
            rule_hits: Vec::new(),
            era: 1,
            tenants: Tenants::default(),
            nat_flows: Vec::new(),
            nat_refusals: vec![NatRefusals::default(); policy.spec.nats.len()],
            forward_flows: Vec::new(),
            policy: Arc::new(Arc::clone(&policy)),
            ownership: Arc::clone(&ownership),
            neighbors,
        };
        core.take_over(policy, ownership);
        core
    }

    fn take_over(&mut self, policy: Arc<Policy>, ownership: Arc<Ownership>) {
        self.nat.follow(&policy.nat, &ownership.table, &ownership.hasher, &ownership.solvers);
        self.rule_hits = policy.carry_hits(&self.policy, &self.rule_hits);
        self.nat_refusals =
            counters::carry_refusals(&self.policy.spec.nats, &self.nat_refusals, &policy.spec.nats);
        self.tenants.clone_from(policy.tenants());
        self.nat_flows.resize(policy.nat_rules, 0);
        self.forward_flows.resize(policy.spec.forwards.len(), (0, 0));
        self.policy = Arc::new(policy);
        self.ownership = ownership;
    }

    /// Every flow is decided again when its next packet comes. Numbers of next hops mean nothing any more.
    fn begin_era(&mut self) {
        self.hops = next_hops::Hops::default();
        self.era = self.era.checked_add(1).unwrap_or(1);
    }

    /// Takes over what control has published since the last round. Flows stay; those of an older policy are decided
    /// again when their next packet comes.
    pub fn follow(&mut self, policy: &Arc<Policy>, ownership: &Arc<Ownership>, neighbors: &Arc<Neighbors>) {
        let new_policy = !Arc::ptr_eq(policy, &*self.policy);
        if new_policy {
            self.begin_era();
        }
        if new_policy || !Arc::ptr_eq(ownership, &self.ownership) {
            self.take_over(Arc::clone(policy), Arc::clone(ownership));
        }
        if new_policy || !Arc::ptr_eq(neighbors, &self.neighbors) {
            self.neighbors = Arc::clone(neighbors);
            self.hops.follow(&self.policy, &self.neighbors);
            if self.hops.is_worn_out() {
                self.begin_era();
            }
        }
    }

    /// Acts on what was read: afterwards each frame has its outcome. Frames beyond [`BATCH_MAX`] stay pending.
    pub fn batch(&mut self, now_ns: u64, frames: &mut [Frame<'_>], out: &mut impl Output) {
        let mut looks: [Option<Look>; BATCH_MAX] = [None; BATCH_MAX];
        for (frame, look) in frames.iter_mut().zip(&mut looks) {
            *look = self.look(frame);
        }
        for look in looks.iter_mut().flatten() {
            look.hint = self.flows.prefetch_entry(look.hash);
        }
        for look in looks.iter_mut().flatten() {
            look.found = self.flows.find_hinted(look.hint, look.hash, &look.key, look.tenant);
            if let Some((id, _)) = look.found {
                self.flows.prefetch_counters(id);
            }
        }
        self.begun.clear();
        let removals = self.removals;
        for (frame, look) in frames.iter_mut().zip(&mut looks) {
            let Some(look) = look else { continue };
            self.counters.rx_packets += 1;
            self.counters.rx_bytes += frame.packet().len() as u64;
            if self.removals == removals && self.established_fast(now_ns, frame, look) {
                continue;
            }
            // An earlier frame of the batch may have begun the flow, or ended one whose place is taken anew.
            if self.removals != removals || (look.found.is_none() && self.begun.may_have(look.hash)) {
                look.found = self.flows.find(look.hash, &look.key, look.tenant);
            }
            self.act(now_ns, frame, look, Origin::Wire, out);
        }
    }

    /// Acts on one packet or super-packet, as [`Services::batch`] does on many.
    pub fn packet(&mut self, now_ns: u64, frame: &mut Frame<'_>, out: &mut impl Output) {
        let Some(mut look) = self.look(frame) else { return };
        self.counters.rx_packets += 1;
        self.counters.rx_bytes += frame.packet().len() as u64;
        look.found = self.flows.find(look.hash, &look.key, look.tenant);
        if !self.established_fast(now_ns, frame, &look) {
            self.act(now_ns, frame, &look, Origin::Wire, out);
        }
    }

    /// Acts on what another core handed over. Afterwards the buffer is the caller's again.
    pub fn handed(&mut self, now_ns: u64, handed: &mut Handed, out: &mut impl Output) {
        self.counters.handed_in += 1;
        let (origin, piece) = (handed.origin, handed.piece);
        let packet = &mut handed.packet;
        let (ingress, offload) = (packet.ingress, packet.offload);
        let mut frame = Frame::new(ingress, offload, packet.with_room(ETHERNET_BYTES));
        if let Some(piece) = piece {
            self.piece(now_ns, &mut frame, &piece, origin, out);
        } else if let Some(mut look) = self.look(&mut frame) {
            look.found = self.flows.find(look.hash, &look.key, look.tenant);
            self.act(now_ns, &mut frame, &look, origin, out);
        }
        self.settle(frame, out);
    }

    /// A packet that is not part of the batch goes where its outcome says.
    fn settle(&mut self, frame: Frame<'_>, out: &mut impl Output) {
        let Frame { offload, bytes, outcome, flow, .. } = frame;
        match outcome {
            Outcome::Forward(Egress::Bond(_)) => {
                let key = flow.map(|(id, direction)| self.flows.leaves_as(id, direction));
                out.emit(outcome, key.as_ref(), &offload, bytes);
            }
            Outcome::Forward(_) | Outcome::Resolve(..) => out.emit(outcome, None, &offload, bytes),
            Outcome::Pending | Outcome::Consumed | Outcome::Dropped(_) => {}
        }
    }

    /// Reads the flow key and has the index fetched.
    #[inline]
    fn look(&mut self, frame: &mut Frame<'_>) -> Option<Look> {
        let tenant = self.tenants.of(frame.ingress);
        match FlowKey::of(frame.packet()) {
            Ok(key) => {
                let hash = self.flows.hash(&key, tenant);
                self.flows.prefetch(hash);
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
        if is_piece(frame.packet()) {
            self.fragment(now_ns, frame, look.tenant, origin, out);
            return;
        }
        match look.found {
            Some((id, direction)) => {
                if let Err(reason) = self.established(now_ns, frame, id, direction, origin, out) {
                    self.dropped(frame, reason);
                }
            }
            None => self.new_flow(now_ns, frame, &look.key, look.tenant, origin, out),
        }
    }

    fn dropped(&mut self, frame: &mut Frame<'_>, reason: DropReason) {
        self.drops.add(reason);
        frame.outcome = Outcome::Dropped(reason);
    }

    /// Expiry; call it every round. Returns when it wants to be called again at the latest.
    pub fn tick(&mut self, now_ns: u64) -> u64 {
        self.rendezvous_tick(now_ns);
        let elapsed_ns = now_ns.saturating_sub(self.swept_ns);
        if elapsed_ns < 1_000_000 && self.sweep_debt < 1.0 {
            return now_ns + 1_000_000;
        }
        self.swept_ns = now_ns;
        self.nat.tick(now_ns);
        let slots = self.flows.pass_entries() as f64 + 64.0;
        let lost = !self.ownership.is_alive(self.id);
        let share = if lost { 1.0 } else { elapsed_ns.min(SWEEP_NS) as f64 / SWEEP_NS as f64 };
        self.sweep_debt = (self.sweep_debt + slots * share).min(slots);
        let entries = (self.sweep_debt as usize).min(SWEEP_ENTRIES_MAX);
        if entries > 0 {
            self.sweep_debt -= entries as f64;
            self.sweep(now_ns, entries, HURRY_S);
        }
        let idle = self.flows.is_empty() && self.nat.mappings_by_bucket().iter().all(|count| *count == 0);
        now_ns
            + if idle {
                SWEEP_NS
            } else if self.sweep_debt >= 1.0 {
                0
            } else {
                100_000_000
            }
    }

    /// Makes room for one more flow that nobody has answered yet: the flood's own flows go first, and none that was
    /// answered.
    fn make_room(&mut self, now_ns: u64) -> bool {
        let full = self.embryonic >= self.policy.limits().embryonic_max;
        if full {
            self.sweep(now_ns, EMERGENCY_ENTRIES, EMERGENCY_S);
        }
        self.embryonic < self.policy.limits().embryonic_max
    }

    /// Looks at some entries; `patience_s`: how long a flow without an answer may be silent while there are too many.
    fn sweep(&mut self, now_ns: u64, entries: usize, patience_s: u32) {
        let policy = Arc::clone(&self.policy);
        let now = tick_of(now_ns);
        // A core that hung: the others have begun its flows anew, or given their ports to new ones.
        let lost = !self.ownership.is_alive(self.id);
        let hurry = patience_s < HURRY_S || self.embryonic > policy.limits().embryonic_max / 2;
        let era = self.era;
        let expired = |record: &mut Record| {
            // Before the count comes round and an old number looks like a present one.
            if era.wrapping_sub(record.era) > u16::MAX / 2 {
                record.era = 0;
            }
            let mut timeout_s = crate::tcp::timeout_s(record, policy.timeouts());
            if hurry && established::is_embryonic(record) {
                timeout_s = timeout_s.min(patience_s);
            }
            let silent_ticks = now.wrapping_sub(record.seen);
            lost || u64::from(silent_ticks) << TICK_SHIFT >= u64::from(timeout_s) * 1_000_000_000
        };
        let mut gone = Vec::new();
        self.flows.sweep(entries, expired, |removed| gone.push(removed));
        self.removals = self.removals.wrapping_add(gone.len() as u32);
        for removed in gone {
            self.closed(now_ns, &removed);
        }
        if lost {
            self.nat.forget_clients();
        }
    }

    /// Ends a flow now.
    fn end(&mut self, now_ns: u64, id: FlowId) {
        if let Some(removed) = self.flows.remove(id) {
            self.removals = self.removals.wrapping_add(1);
            self.closed(now_ns, &removed);
        }
    }

    /// Gives back what an ended flow held.
    fn closed(&mut self, now_ns: u64, removed: &Removed) {
        let record = &removed.record;
        let original = (removed.original, removed.tenants[0]);
        let reply = (removed.reply, removed.tenants[1]);
        self.counters.flows_closed += 1;
        self.count_live(self.live_buckets(&original, &reply), u32::wrapping_sub);
        if established::is_embryonic(record) {
            self.embryonic = self.embryonic.saturating_sub(1);
        }
        self.count_services(record, &original.0, false);
        if record.flags & flags::PROXY_PROTOCOL != 0 {
            self.shifts.forget(&original.0, original.1);
        }
        if record.nat != 0 {
            // As the NAT saw it: behind a translated destination.
            let client = if record.flags & flags::SOURCE_NAT == 0 {
                original.0
            } else {
                let leaving = reply.0.reversed();
                let id = original.0.src_port | original.0.dst_port;
                let port = if leaving.protocol == PROTOCOL_ICMP || leaving.protocol == PROTOCOL_ICMPV6 {
                    id
                } else {
                    original.0.src_port
                };
                new_flow::with_source(&leaving, original.0.src, port)
            };
            self.nat.release(now_ns, &reply.0, reply.1, record, &client, original.1);
        }
        if let Some(backend) = record.backend.checked_sub(1) {
            self.policy.balancer.closed(backend, established::is_over(record));
        }
    }

    fn count_refusal(&mut self, rule: u16, reason: DropReason) {
        if let Some(refusals) = self.nat_refusals.get_mut(usize::from(rule)) {
            refusals.count(reason);
        }
    }

    /// Live flows of NAT rules and port forwards, by their present numbers.
    fn count_services(&mut self, record: &Record, original: &FlowKey, begins: bool) {
        let change = |flows: u64| if begins { flows + 1 } else { flows.saturating_sub(1) };
        let rule = record.nat.checked_sub(1);
        if let Some(flows) = rule.and_then(|rule| self.nat_flows.get_mut(usize::from(rule))) {
            *flows = change(*flows);
        }
        if record.flags & flags::DEST_NAT != 0 && record.backend == 0 {
            let listen = SocketAddr::new(original.dst, original.dst_port);
            let mut forwards = self.policy.spec.forwards.iter();
            let place = forwards
                .position(|forward| forward.protocol == original.protocol && forward.listen == listen);
            if let Some((live, total)) = place.and_then(|place| self.forward_flows.get_mut(place)) {
                *live = change(*live);
                *total += u64::from(begins);
            }
        }
    }

    /// The buckets in which a flow counts, each once: of both directions, and of its remote if that is what leads to it.
    fn live_buckets(&self, original: &(FlowKey, u16), reply: &(FlowKey, u16)) -> [Option<usize>; 3] {
        let first = self.ownership.bucket(&original.0, original.1);
        let second = self.ownership.bucket(&reply.0, reply.1);
        let by_remote = !crate::nat::is_translated(reply.0.protocol) && original.0.src != reply.0.dst;
        let third = by_remote
            .then(|| crate::steer::remote_bucket(&self.ownership, reply.0.src, reply.0.protocol, reply.1));
        [
            Some(first),
            (second != first).then_some(second),
            third.filter(|third| *third != first && *third != second),
        ]
    }

    fn count_live(&mut self, buckets: [Option<usize>; 3], change: impl Fn(u32, u32) -> u32) {
        for bucket in buckets.into_iter().flatten() {
            if let Some(live) = self.live.get_mut(bucket) {
                *live = change(*live, 1);
            }
        }
    }

    /// The next random word (xorshift64*: for choices that must differ, not for secrets; its seed is secret).
    fn random(&mut self) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Number of this core.
    #[must_use]
    pub fn id(&self) -> u8 {
        self.id
    }

    /// Flows now.
    #[must_use]
    pub fn flows(&self) -> &FlowTable {
        &self.flows
    }

    /// Next hops that have a number.
    #[cfg(test)]
    fn next_hops(&self) -> usize {
        self.hops.len()
    }

    /// Live entries by bucket: a flow counts in both of its buckets, an endpoint-independent mapping in its client's.
    #[must_use]
    pub fn live(&self) -> Vec<u32> {
        let mut live = self.live.clone();
        for (sum, mappings) in live.iter_mut().zip(self.nat.mappings_by_bucket()) {
            *sum = sum.wrapping_add(*mappings);
        }
        live
    }

    /// Live flows that have not seen a reply.
    #[must_use]
    pub fn embryonic(&self) -> u32 {
        self.embryonic
    }

    /// Source NAT of this core.
    #[must_use]
    pub fn nat(&self) -> &Nat {
        &self.nat
    }

    /// Era of the bucket table that this core works by.
    #[must_use]
    pub fn table_era(&self) -> u32 {
        self.ownership.table.era()
    }

    /// Fragments that were held and are dropped since, by reason.
    #[must_use]
    pub fn late_drops(&self) -> DropCounters {
        let mut drops = self.rendezvous.late_drops().clone();
        drops.merge(self.fragments.late_drops());
        drops
    }

    /// Ports held by flows of this core, by NAT rule of the policy, and ports that the rule has in all.
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

/// Time in ticks of [`Record::seen`].
#[inline]
const fn tick_of(now_ns: u64) -> u32 {
    (now_ns >> TICK_SHIFT) as u32
}

/// Whether a packet may be a fragment: exact for IPv4; for IPv6 whatever has a fragment header somewhere.
#[inline]
fn is_piece(packet: &[u8]) -> bool {
    match packet.first_chunk::<20>() {
        Some(fixed) if fixed[0] >> 4 == 4 => (fixed[6] & 0x3f) | fixed[7] != 0,
        Some(fixed) if matches!(fixed[6], 0 | 43 | 44 | 51 | 60 | 135 | 139 | 140) => {
            IpHeader::parse(packet).is_ok_and(|header| header.is_fragmented())
        }
        _ => false,
    }
}

/// Whether only the pseudo header is in the transport checksum.
#[inline]
fn is_partial(offload: &VirtioNetHeader) -> bool {
    offload.flags & packet::vnet::NEEDS_CSUM != 0
}

/// Key and tenant of a reply as it arrives, from the leaving key.
fn reply_of(leaving: &FlowKey, tenant: u16) -> (FlowKey, u16) {
    (leaving.reversed(), tenant)
}
