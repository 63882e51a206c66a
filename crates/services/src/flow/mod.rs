//! The flow table of one core, and what it keeps of a flow (rows C2–C4).
//!
//! One look-up answers for both directions: a flow has the key of the packets of its original direction and the key of
//! its replies *as they arrive*, and both lead to the same [`Record`]. Used by one thread. Nothing is allocated for a
//! packet; memory grows in steps of a chunk or a segment when flows are added.
//!
//! Bytes for a flow, with its part of the index:
//!
//! | flow | entry | counters | index | together |
//! |---|---|---|---|---|
//! | IPv4, translated | 64 | 32 | 20–23 | ≤ 120 |
//! | IPv4, as it is | 52 | – | 10–12 | ≤ 64 |
//! | IPv6, translated | 128 | 32 | 20–23 | ≤ 184 |
//! | IPv6, as it is | 80 | – | 10–12 | ≤ 92 |
//!
//! A flow that is not translated has one entry in the index for both directions when both have the same tenant, as the
//! hash is symmetric; else two.
//!
//! Batches: [`FlowTable::hash`] and [`FlowTable::prefetch`] for all packets, then [`FlowTable::prefetch_entry`] for
//! all, then [`FlowTable::find_hinted`] (or `find`) for each.

mod bucket;
mod entry;
mod hash;
mod index;
mod record;
mod slab;
mod walk;

#[cfg(test)]
mod tests;

pub use record::{Direction, Record, flags};
pub use walk::Swept;

use crate::random::Random;
use crate::rewrite::Ends;
use bucket::Reference;
use entry::{Address, Counts, Family, Flow, Plain, Translated, Tuple, Wanted};
use hash::Hasher;
use index::Index;
use packet::{DropReason, FlowKey};
use std::net::{IpAddr, Ipv4Addr};

/// The most flows of one table, whatever it is asked for: 2^29 - 2.
pub const FLOWS_MAX: u32 = SLOT_MASK - 1;

/// Reference = kind (2 bits), direction (1 bit), entry + 1 (29 bits).
const SLOT_MASK: u32 = (1 << 29) - 1;
const DIRECTION_BIT: u32 = 1 << 29;
const KIND_SHIFT: u32 = 30;

/// Kinds of flows; numbers as in references.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    TranslatedV4 = 0,
    PlainV4 = 1,
    TranslatedV6 = 2,
    PlainV6 = 3,
}

impl Kind {
    const ALL: [Kind; 4] = [Kind::TranslatedV4, Kind::PlainV4, Kind::TranslatedV6, Kind::PlainV6];

    #[inline]
    fn of(reference: Reference) -> Kind {
        match reference >> KIND_SHIFT {
            0 => Kind::TranslatedV4,
            1 => Kind::PlainV4,
            2 => Kind::TranslatedV6,
            _ => Kind::PlainV6,
        }
    }
}

/// Names a flow of one table until it is removed. Later the same name may be given to another flow: whoever keeps names
/// beyond a batch looks at the keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowId(Reference);

impl FlowId {
    #[inline]
    fn new(kind: Kind, slot: usize) -> FlowId {
        FlowId((kind as u32) << KIND_SHIFT | (slot as u32 + 1) & SLOT_MASK)
    }

    #[inline]
    fn slot(self) -> usize {
        (self.0 & SLOT_MASK).wrapping_sub(1) as usize
    }

    #[inline]
    fn reference(self, direction: Direction) -> Reference {
        match direction {
            Direction::Original => self.0,
            Direction::Reply => self.0 | DIRECTION_BIT,
        }
    }

    /// Kind, below 4, and place among those of its kind; places are given again, the lowest first.
    pub(crate) fn place(self) -> (usize, usize) {
        ((self.0 >> KIND_SHIFT) as usize, self.slot())
    }

    /// A number that differs from those of the other flows of its table, for tables of one's own.
    #[inline]
    #[must_use]
    pub fn number(self) -> u32 {
        self.0
    }

    #[inline]
    fn of(reference: Reference) -> (FlowId, Direction) {
        let direction = if reference & DIRECTION_BIT == 0 { Direction::Original } else { Direction::Reply };
        (FlowId(reference & !DIRECTION_BIT), direction)
    }
}

/// Where [`FlowTable::prefetch_entry`] expects a flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hint(Reference);

/// Data that a packet of a known flow needs: [`FlowTable::for_packet`].
#[derive(Debug)]
pub struct ForPacket<'a> {
    /// Its record.
    pub record: &'a mut Record,
    /// The packet's ends after translation; `None`: they stay as they are.
    pub leaves_as: Option<Ends>,
    counts: Option<(&'a mut Counts, Direction)>,
}

impl<'a> ForPacket<'a> {
    fn plain(record: &'a mut Record) -> Self {
        Self { record, leaves_as: None, counts: None }
    }

    /// Counts the packet.
    #[inline]
    pub fn count(&mut self, bytes: u32) {
        if let Some((counts, direction)) = &mut self.counts {
            counts.add(*direction, 1, bytes);
        }
    }
}

/// Counts of a flow. Kept for translated flows only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowCounters {
    /// When it began: [`Record::seen`] of the record it was inserted with.
    pub created: u32,
    /// Packets, place by [`Direction`]; wraps after 2^48.
    pub packets: [u64; 2],
    /// Bytes, place by [`Direction`].
    pub bytes: [u64; 2],
}

impl From<Counts> for FlowCounters {
    fn from(counts: Counts) -> Self {
        Self { created: counts.created, packets: counts.packets(), bytes: counts.bytes }
    }
}

/// A flow that was taken out of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Removed {
    /// Its name until now.
    pub id: FlowId,
    /// Key of its original direction.
    pub original: FlowKey,
    /// Key of its replies, as they arrived.
    pub reply: FlowKey,
    /// Tenants of both directions, place by [`Direction`].
    pub tenants: [u16; 2],
    /// Its record, as it was last.
    pub record: Record,
    /// Counts, for a translated flow.
    pub counters: Option<FlowCounters>,
}

/// Flows by the keys of their two directions.
pub struct FlowTable {
    hasher: Hasher,
    index: Index,
    v4: Family<u32>,
    v6: Family<[u64; 2]>,
    len: u32,
    flows_max: u32,
    /// Where the next sweep begins.
    swept_to: u64,
    /// Record that names of no entry lead to: never written by the table, so that it stays a default record for
    /// readers.
    nothing: Record,
    /// Record that is written through names of no entry.
    nowhere: Record,
}

/// Calls `$call` with `$slab` bound to the slab of this kind.
macro_rules! with_slab {
    ($table:expr, $kind:expr, $slab:ident => $call:expr) => {
        match $kind {
            Kind::TranslatedV4 => {
                let $slab = &$table.v4.translated;
                $call
            }
            Kind::PlainV4 => {
                let $slab = &$table.v4.plain;
                $call
            }
            Kind::TranslatedV6 => {
                let $slab = &$table.v6.translated;
                $call
            }
            Kind::PlainV6 => {
                let $slab = &$table.v6.plain;
                $call
            }
        }
    };
}
use with_slab;

impl FlowTable {
    /// An empty table for at most so many flows (and never more than [`FLOWS_MAX`]). `random` gives the keys of its hash:
    /// who knows them can send packets that fall into one place.
    #[must_use]
    pub fn new(random: &mut Random, flows_max: u32) -> Self {
        let flows_max = flows_max.min(FLOWS_MAX);
        Self {
            hasher: Hasher::new(random),
            index: Index::new(flows_max as usize * 2),
            v4: Family::new(flows_max as usize),
            v6: Family::new(flows_max as usize),
            len: 0,
            flows_max,
            swept_to: 0,
            nothing: Record::default(),
            nowhere: Record::default(),
        }
    }

    /// The table's own hash of a key: seeded, and the same for the reversed key of the same tenant.
    #[inline]
    #[must_use]
    pub fn hash(&self, key: &FlowKey, tenant: u16) -> u64 {
        self.hasher.hash(key, tenant)
    }

    /// First step of a batch: asks for the line of the index.
    #[inline]
    pub fn prefetch(&self, hash: u64) {
        self.index.prefetch(hash);
    }

    /// Second step of a batch: asks for the flow. What it returns makes [`FlowTable::find_hinted`]
    /// cheaper than [`FlowTable::find`].
    #[inline]
    pub fn prefetch_entry(&self, hash: u64) -> Hint {
        let first = self.index.first(hash);
        let id = FlowId(first & !DIRECTION_BIT);
        match Kind::of(first) {
            Kind::TranslatedV4 => self.v4.translated.prefetch(id.slot()),
            Kind::PlainV4 => self.v4.plain.prefetch(id.slot()),
            Kind::TranslatedV6 => self.v6.translated.prefetch(id.slot()),
            Kind::PlainV6 => self.v6.plain.prefetch(id.slot()),
        }
        Hint(first)
    }

    /// Third step of a batch, for who counts: asks for the counters of a flow that was found. [`FlowTable::account`]
    /// comes a few packets later.
    #[inline]
    pub fn prefetch_counters(&self, id: FlowId) {
        match Kind::of(id.0) {
            Kind::TranslatedV4 => self.v4.translated.prefetch_cold(id.slot()),
            Kind::TranslatedV6 => self.v6.translated.prefetch_cold(id.slot()),
            Kind::PlainV4 | Kind::PlainV6 => {}
        }
    }

    /// The same answer as [`FlowTable::find`], looking only where the hint says if it can. The hint is that of the same
    /// hash, and no flow was added since: else a flow may be overlooked, but never is a wrong one found.
    #[inline]
    #[must_use]
    pub fn find_hinted(
        &self,
        hint: Hint,
        hash: u64,
        key: &FlowKey,
        tenant: u16,
    ) -> Option<(FlowId, Direction)> {
        if hint.0 == 0 {
            return None;
        }
        self.find_first(hint.0, key, tenant).or_else(|| self.find(hash, key, tenant))
    }

    /// The flow of this reference, if it is the packet's.
    #[inline]
    fn find_first(&self, reference: Reference, key: &FlowKey, tenant: u16) -> Option<(FlowId, Direction)> {
        let (id, stored) = FlowId::of(reference);
        let direction = match (Kind::of(reference), key.src) {
            (Kind::TranslatedV4, IpAddr::V4(_)) => {
                self.v4.translated.get(id.slot())?.direction(&Wanted::of(key, tenant)?, stored)
            }
            (Kind::PlainV4, IpAddr::V4(_)) => {
                self.v4.plain.get(id.slot())?.direction(&Wanted::of(key, tenant)?, stored)
            }
            (Kind::TranslatedV6, IpAddr::V6(_)) => {
                self.v6.translated.get(id.slot())?.direction(&Wanted::of(key, tenant)?, stored)
            }
            (Kind::PlainV6, IpAddr::V6(_)) => {
                self.v6.plain.get(id.slot())?.direction(&Wanted::of(key, tenant)?, stored)
            }
            _ => None,
        }?;
        Some((id, direction))
    }

    /// The flow of a packet and which way the packet goes. `hash` is [`FlowTable::hash`] of the same key and tenant.
    #[inline]
    #[must_use]
    pub fn find(&self, hash: u64, key: &FlowKey, tenant: u16) -> Option<(FlowId, Direction)> {
        self.index.find(hash, |reference| self.find_first(reference, key, tenant))
    }

    /// Adds a flow. `original` is key and tenant of the packet that begins it; `reply` is key and tenant of a reply *as
    /// it arrives*, before it is translated back. `record.protocol` is set from the key and must stay as it is.
    ///
    /// # Errors
    /// [`DropReason::FlowTableFull`]: as many flows as allowed. [`DropReason::NotNew`]: one of the keys is a flow's
    /// already, or a translated flow's two keys are the same. [`DropReason::NatUnsupported`]: the keys differ in
    /// IP version or protocol. The table is unchanged then.
    pub fn insert(
        &mut self,
        original: (&FlowKey, u16),
        reply: (&FlowKey, u16),
        record: Record,
    ) -> Result<FlowId, DropReason> {
        let hashes = [self.hash(original.0, original.1), self.hash(reply.0, reply.1)];
        hashes.iter().for_each(|hash| self.prefetch(*hash));
        if self.find(hashes[0], original.0, original.1).is_some() {
            return Err(DropReason::NotNew);
        }
        self.insert_unknown(hashes, original, reply, record)
    }

    /// [`FlowTable::insert`] for who has just looked for `original` and not found it, with the hashes of both keys.
    ///
    /// # Errors
    /// As there.
    pub fn insert_unknown(
        &mut self,
        hashes: [u64; 2],
        original: (&FlowKey, u16),
        reply: (&FlowKey, u16),
        mut record: Record,
    ) -> Result<FlowId, DropReason> {
        debug_assert!(self.find(hashes[0], original.0, original.1).is_none(), "the flow is there already");
        let is_plain = original.0.reversed() == *reply.0;
        let is_v4 = original.0.src.is_ipv4();
        if [original.0.dst, reply.0.src, reply.0.dst].iter().any(|address| address.is_ipv4() != is_v4)
            || original.0.protocol != reply.0.protocol
        {
            return Err(DropReason::NatUnsupported);
        }
        if self.find(hashes[1], reply.0, reply.1).is_some()
            || !is_plain && (original.0, original.1) == (reply.0, reply.1)
        {
            return Err(DropReason::NotNew);
        }
        if self.len >= self.flows_max {
            return Err(DropReason::FlowTableFull);
        }
        record.protocol = original.0.protocol;
        let tenants = [original.1, reply.1];
        let keys = [original.0, reply.0];
        let id = if is_v4 {
            add(&mut self.v4, [Kind::TranslatedV4, Kind::PlainV4], keys, is_plain, tenants, record)
        } else {
            add(&mut self.v6, [Kind::TranslatedV6, Kind::PlainV6], keys, is_plain, tenants, record)
        }?;
        self.len += 1;
        let one_entry = is_plain && original.1 == reply.1;
        if self.index.insert(hashes[0], id.reference(Direction::Original))
            && (one_entry || self.index.insert(hashes[1], id.reference(Direction::Reply)))
        {
            return Ok(id);
        }
        self.remove(id);
        Err(DropReason::FlowTableFull)
    }

    /// A flow's record. Of a removed flow: that of whoever has its place now, or a default one.
    #[inline]
    #[must_use]
    pub fn record(&self, id: FlowId) -> &Record {
        with_slab!(self, Kind::of(id.0), slab => slab.get(id.slot()).map(Flow::record))
            .unwrap_or(&self.nothing)
    }

    /// The same, to change. [`Record::protocol`] is part of the keys and must stay. What is written to a removed flow
    /// is lost, or changes whoever has its place now.
    #[inline]
    pub fn record_mut(&mut self, id: FlowId) -> &mut Record {
        let slot = id.slot();
        match Kind::of(id.0) {
            Kind::TranslatedV4 => self.v4.translated.get_mut(slot).map(Flow::record_mut),
            Kind::PlainV4 => self.v4.plain.get_mut(slot).map(Flow::record_mut),
            Kind::TranslatedV6 => self.v6.translated.get_mut(slot).map(Flow::record_mut),
            Kind::PlainV6 => self.v6.plain.get_mut(slot).map(Flow::record_mut),
        }
        .unwrap_or(&mut self.nowhere)
    }

    /// Keys and tenants: of the original direction, and of replies as they arrive. Of a removed flow: of whoever has its
    /// place now, or zeros.
    #[inline]
    #[must_use]
    pub fn keys(&self, id: FlowId) -> ((FlowKey, u16), (FlowKey, u16)) {
        let [original, reply] = self.both_keys(id);
        (original, reply)
    }

    #[inline]
    fn both_keys(&self, id: FlowId) -> [(FlowKey, u16); 2] {
        with_slab!(self, Kind::of(id.0), slab => slab.get(id.slot()).map(Flow::keys))
            .unwrap_or([(NO_KEY, 0); 2])
    }

    /// The key of a packet that goes this way, after translation: the key of the other direction, reversed.
    #[inline]
    #[must_use]
    pub fn leaves_as(&self, id: FlowId, direction: Direction) -> FlowKey {
        let [original, reply] = self.both_keys(id);
        match direction {
            Direction::Original => reply.0.reversed(),
            Direction::Reply => original.0.reversed(),
        }
    }

    /// Whether packets of the flow change on their way.
    #[inline]
    #[must_use]
    pub fn is_translated(&self, id: FlowId) -> bool {
        matches!(Kind::of(id.0), Kind::TranslatedV4 | Kind::TranslatedV6)
    }

    /// A flow for a packet that goes this way: its record, what the packet leaves as if it is translated, and its
    /// counters. One look-up instead of three. `None`: the place was given back.
    #[inline]
    pub fn for_packet(&mut self, id: FlowId, direction: Direction) -> Option<ForPacket<'_>> {
        let slot = id.slot();
        match Kind::of(id.0) {
            Kind::TranslatedV4 => {
                self.v4.translated.both_mut(slot).map(|(flow, counts)| flow.for_packet(counts, direction))
            }
            Kind::TranslatedV6 => {
                self.v6.translated.both_mut(slot).map(|(flow, counts)| flow.for_packet(counts, direction))
            }
            Kind::PlainV4 => self.v4.plain.get_mut(slot).map(|flow| ForPacket::plain(flow.record_mut())),
            Kind::PlainV6 => self.v6.plain.get_mut(slot).map(|flow| ForPacket::plain(flow.record_mut())),
        }
    }

    /// Counts packets and their bytes. Nothing for flows that are not translated: they have no counters.
    #[inline]
    pub fn account(&mut self, id: FlowId, direction: Direction, packets: u32, bytes: u32) {
        let counts = match Kind::of(id.0) {
            Kind::TranslatedV4 => self.v4.translated.cold_mut(id.slot()),
            Kind::TranslatedV6 => self.v6.translated.cold_mut(id.slot()),
            Kind::PlainV4 | Kind::PlainV6 => None,
        };
        if let Some(counts) = counts {
            counts.add(direction, packets, bytes);
        }
    }

    /// Counts, for a translated flow.
    #[must_use]
    pub fn counters(&self, id: FlowId) -> Option<FlowCounters> {
        let counts = match Kind::of(id.0) {
            Kind::TranslatedV4 => self.v4.translated.cold(id.slot()),
            Kind::TranslatedV6 => self.v6.translated.cold(id.slot()),
            Kind::PlainV4 | Kind::PlainV6 => None,
        };
        counts.copied().map(FlowCounters::from)
    }

    /// Goes on counting from there; nothing for a flow that is not translated.
    pub fn set_counters(&mut self, id: FlowId, counters: &FlowCounters) {
        let counts = match Kind::of(id.0) {
            Kind::TranslatedV4 => self.v4.translated.cold_mut(id.slot()),
            Kind::TranslatedV6 => self.v6.translated.cold_mut(id.slot()),
            Kind::PlainV4 | Kind::PlainV6 => None,
        };
        if let Some(counts) = counts {
            *counts = Counts::from(counters);
        }
    }

    /// Takes a flow out; nothing when it is not there any more.
    pub fn remove(&mut self, id: FlowId) -> Option<Removed> {
        let kind = Kind::of(id.0);
        if !with_slab!(self, kind, slab => slab.contains(id.slot())) {
            return None;
        }
        let keys = self.both_keys(id);
        let hashes = keys.map(|(key, tenant)| self.hash(&key, tenant));
        hashes.iter().for_each(|hash| self.prefetch(*hash));
        let counters = self.counters(id);
        let record = *self.record(id);
        for (direction, hash) in [Direction::Original, Direction::Reply].into_iter().zip(hashes) {
            // Where one entry stands for both directions there is none for the reply.
            self.index.remove(hash, id.reference(direction));
        }
        match kind {
            Kind::TranslatedV4 => self.v4.translated.remove(id.slot()).is_some(),
            Kind::PlainV4 => self.v4.plain.remove(id.slot()).is_some(),
            Kind::TranslatedV6 => self.v6.translated.remove(id.slot()).is_some(),
            Kind::PlainV6 => self.v6.plain.remove(id.slot()).is_some(),
        };
        self.len -= 1;
        let [(original, original_tenant), (reply, reply_tenant)] = keys;
        Some(Removed { id, original, reply, tenants: [original_tenant, reply_tenant], record, counters })
    }

    /// Flows in the table.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Flows it takes at most.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.flows_max as usize
    }

    /// How many `entries` a full pass of [`FlowTable::sweep`] needs about.
    #[must_use]
    pub fn pass_entries(&self) -> usize {
        let places: usize = Kind::ALL.iter().map(|kind| with_slab!(self, *kind, slab => slab.end())).sum();
        self.len() + places / 64
    }

    /// Bytes allocated. Some are never touched before flows come: the last chunk of each kind, lists of chunks.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        let slabs: usize =
            Kind::ALL.iter().map(|kind| with_slab!(self, *kind, slab => slab.memory_bytes())).sum();
        slabs + self.index.memory_bytes()
    }
}

/// Of no flow.
const NO_KEY: FlowKey = FlowKey {
    src: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    dst: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    src_port: 0,
    dst_port: 0,
    protocol: 0,
};

/// Puts a flow into the slab of its kind.
fn add<A: Address>(
    family: &mut Family<A>,
    [translated, plain]: [Kind; 2],
    [original, reply]: [&FlowKey; 2],
    is_plain: bool,
    tenants: [u16; 2],
    record: Record,
) -> Result<FlowId, DropReason> {
    let (Some(tuple), Some(reply)) = (Tuple::of(original), Tuple::of(reply)) else {
        return Err(DropReason::NatUnsupported);
    };
    let (kind, slot) = if is_plain {
        (plain, family.plain.insert(Plain { tuple, tenants, record }, ()))
    } else {
        let flow = Translated { tuples: [tuple, reply], tenants, record };
        (translated, family.translated.insert(flow, Counts::begin(record.seen)))
    };
    slot.map(|slot| FlowId::new(kind, slot)).ok_or(DropReason::FlowTableFull)
}
