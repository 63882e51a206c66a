//! The flows of one core: their table, the counts over it, and the sweep that ends what is silent.

use packet::{DropReason, FlowKey};

use super::bloom_filter::BloomFilter;
use super::host_ports::PortCounts;
use crate::flow::{Direction, FlowId, FlowTable, Record, Removed};
use crate::random::Random;
use crate::spec::{TCP, Timeouts};
use crate::tcp::{self, State};

/// Nanoseconds of a tick of [`Record::seen`], as a shift.
pub(super) const TICK_SHIFT: u32 = 27;

/// The flow table is swept once in so many nanoseconds …
pub(super) const SWEEP_NS: u64 = 2_000_000_000;
/// … in portions of at most so many entries a round, so that no round is long.
const SWEEP_ENTRIES_MAX: usize = 4_096;
/// Portions follow each other after so many nanoseconds at the earliest.
pub(super) const SWEEP_PAUSE_NS: u64 = 1_000_000;

/// A flow's key and tenant in one direction.
pub(super) type TenantKey = (FlowKey, u16);

/// The flow table, with all that is counted over it.
pub(super) struct Flows {
    /// The table.
    pub table: FlowTable,
    /// Live flows that have not seen a reply.
    pub embryonic: Embryonic,
    /// Flows begun while a batch was acted upon.
    pub begun: BloomFilter,
    /// Flows ended while a batch was acted upon: what was found before may be another flow by now.
    pub removals: u32,
    /// Live flows by bucket: every bucket of a flow counts.
    pub live: Vec<u32>,
    /// Live flows by bucket of the cluster's table; empty where there is no cluster.
    pub live_by_unit_bucket: Vec<u32>,
    /// Flows by outside port.
    pub ports: PortCounts,
    /// Live flows with [`crate::flow::flags::INHERITED`].
    pub inherited: u32,
    pace: SweepPace,
}

/// Reasons to end a flow.
pub(super) struct Expiry<'a> {
    /// The time, ns.
    pub now_ns: u64,
    /// The era of the present policy.
    pub era: u16,
    /// How long flows may be silent.
    pub timeouts: &'a Timeouts,
    /// How long one without an answer may be, s; `None`: there are not too many of them.
    pub patience_s: Option<u32>,
    /// All of them end: the core hung, and the others have begun its flows anew or given their ports to new ones.
    pub lost: bool,
}

impl Flows {
    /// None yet, of at most `flows_max`, in so many buckets.
    pub fn new(random: &mut Random, flows_max: u32, buckets: usize) -> Self {
        Self {
            table: FlowTable::new(random, flows_max),
            embryonic: Embryonic(0),
            begun: BloomFilter::default(),
            removals: 0,
            live: vec![0; buckets],
            live_by_unit_bucket: Vec::new(),
            ports: PortCounts::default(),
            inherited: 0,
            pace: SweepPace::default(),
        }
    }

    /// The flow of a packet and which way the packet goes.
    #[inline]
    pub fn find(&self, key: &FlowKey, tenant: u16) -> Option<(FlowId, Direction)> {
        self.table.find(self.table.hash(key, tenant), key, tenant)
    }

    /// Hashes of a new flow's keys. The index has just been asked for the original one; the reply's line is fetched now.
    pub fn hashes(&self, original: &TenantKey, reply: &TenantKey) -> [u64; 2] {
        let hashes = [original, reply].map(|(key, tenant)| self.table.hash(key, *tenant));
        self.table.prefetch(hashes[1]);
        hashes
    }

    /// Adds a flow with these [`Flows::hashes`], that counts in these buckets; it was just looked for, and not found.
    ///
    /// # Errors
    /// As [`FlowTable::insert`].
    pub fn insert(
        &mut self,
        hashes: [u64; 2],
        buckets: [Option<usize>; 3],
        original: &TenantKey,
        reply: &TenantKey,
        record: Record,
    ) -> Result<FlowId, DropReason> {
        let (original, reply) = ((&original.0, original.1), (&reply.0, reply.1));
        let id = self.table.insert_unknown(hashes, original, reply, record)?;
        hashes.into_iter().for_each(|hash| self.begun.add(hash));
        self.ports.note(original.0, reply.0, &record, true);
        self.count(buckets, u32::wrapping_add);
        self.embryonic.0 += 1;
        Ok(id)
    }

    /// Takes a flow out.
    pub fn remove(&mut self, id: FlowId) -> Option<Removed> {
        let removed = self.table.remove(id)?;
        self.removals = self.removals.wrapping_add(1);
        Some(removed)
    }

    /// Looks at some entries, and takes those out whose time is over.
    pub fn sweep(&mut self, entries: usize, expiry: &Expiry<'_>) -> Vec<Removed> {
        let now = tick_of(expiry.now_ns);
        let expired = |record: &mut Record| {
            // Before the count comes round and an old number looks like a present one.
            if expiry.era.wrapping_sub(record.era) > u16::MAX / 2 {
                record.era = 0;
            }
            let mut timeout_s = tcp::timeout_s(record, expiry.timeouts);
            if let Some(patience_s) = expiry.patience_s
                && is_embryonic(record)
            {
                timeout_s = timeout_s.min(patience_s);
            }
            let silent_ticks = now.wrapping_sub(record.seen);
            expiry.lost || u64::from(silent_ticks) << TICK_SHIFT >= u64::from(timeout_s) * 1_000_000_000
        };
        let mut gone = Vec::new();
        self.table.sweep(entries, expired, |removed| gone.push(removed));
        self.removals = self.removals.wrapping_add(gone.len() as u32);
        gone
    }

    /// A flow that counted in these buckets has ended.
    pub fn ended(&mut self, buckets: [Option<usize>; 3], record: &Record) {
        self.count(buckets, u32::wrapping_sub);
        self.embryonic.changed(is_embryonic(record), false);
    }

    /// How many entries are to be looked at now; `None`: the last time was only just now. `lost`: all of the table, as
    /// fast as rounds allow.
    pub fn due(&mut self, now_ns: u64, lost: bool) -> Option<usize> {
        let entries = self.table.pass_entries();
        self.pace.due(now_ns, entries, lost)
    }

    /// Whether more entries wait to be looked at than a round may.
    pub fn is_behind(&self) -> bool {
        self.pace.debt >= 1.0
    }

    fn count(&mut self, buckets: [Option<usize>; 3], change: impl Fn(u32, u32) -> u32) {
        for bucket in buckets.into_iter().flatten() {
            if let Some(live) = self.live.get_mut(bucket) {
                *live = change(*live, 1);
            }
        }
    }
}

/// Pace of the sweep: all of the table in [`SWEEP_NS`].
#[derive(Default)]
struct SweepPace {
    /// When entries were counted last.
    counted_ns: u64,
    /// Entries that should have been looked at by now.
    debt: f64,
}

impl SweepPace {
    fn due(&mut self, now_ns: u64, pass_entries: usize, lost: bool) -> Option<usize> {
        let elapsed_ns = now_ns.saturating_sub(self.counted_ns);
        if elapsed_ns < SWEEP_PAUSE_NS && self.debt < 1.0 {
            return None;
        }
        self.counted_ns = now_ns;
        let slots = pass_entries as f64 + 64.0;
        let share = if lost { 1.0 } else { elapsed_ns.min(SWEEP_NS) as f64 / SWEEP_NS as f64 };
        self.debt = (self.debt + slots * share).min(slots);
        let entries = (self.debt as usize).min(SWEEP_ENTRIES_MAX);
        self.debt -= entries as f64;
        Some(entries)
    }
}

/// The count of flows of which nobody has proved yet that they are wanted ([`is_embryonic`]).
#[derive(Clone, Copy)]
pub(super) struct Embryonic(u32);

impl Embryonic {
    /// So many.
    pub const fn count(self) -> u32 {
        self.0
    }

    /// A flow was one and is one now, or not. A connection that its ends begin anew is one again.
    #[inline]
    pub const fn changed(&mut self, was: bool, is: bool) {
        self.0 = match (was, is) {
            (true, false) => self.0.saturating_sub(1),
            (false, true) => self.0.saturating_add(1),
            _ => self.0,
        };
    }
}

/// Whether nobody has proved yet that the flow is wanted: no reply, or a TCP handshake that is not complete. Such flows
/// have their own limit and go first when there is no room.
#[inline]
pub(super) fn is_embryonic(record: &Record) -> bool {
    let opening = || matches!(State::of(record), State::SynSent | State::SynSentBoth | State::SynReceived);
    record.flags & crate::flow::flags::REPLIED == 0 || (record.protocol == TCP && opening())
}

/// Time in ticks of [`Record::seen`].
#[inline]
pub(super) const fn tick_of(now_ns: u64) -> u32 {
    (now_ns >> TICK_SHIFT) as u32
}
