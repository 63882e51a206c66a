//! Packets in pieces with their limits: what both halves keep.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv6Addr};

use crate::hash::SecretState;
use hashbrown::HashMap;
use packet::{DropCounters, DropReason};

use super::pieces::{Extent, Fit, Pieces};
use super::{FragmentLimits, PacketId};

/// A source has at most this part of the bytes: one of so many.
const SOURCE_SHARE: usize = 4;

/// Bytes that a source may have when there are so many sources that an equal share is less: the longest packet in the
/// most fragments, twice.
const SOURCE_BYTES_MIN: usize = 160 << 10;

/// Counters of packets (not fragments) of one half.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FragmentStats {
    /// All fragments came.
    pub completed: u64,
    /// Not all of them in time.
    pub timed_out: u64,
    /// Given up to make room.
    pub evicted: u64,
    /// Given up because fragments overlapped, contradicted each other, or were too many.
    pub poisoned: u64,
    /// Exact copies of fragments that were ignored (fragments, not packets).
    pub copies: u64,
}

/// Who sent it, as far as shares go: who has one IPv6 address has all of its /64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Source {
    tenant: u16,
    prefix: IpAddr,
}

impl Source {
    fn of(id: &PacketId) -> Source {
        let prefix = match id.src {
            IpAddr::V4(_) => id.src,
            IpAddr::V6(src) => IpAddr::V6(Ipv6Addr::from_bits(src.to_bits() >> 64 << 64)),
        };
        Source { tenant: id.tenant, prefix }
    }
}

/// Bytes and packets of a source.
#[derive(Debug, Default)]
struct Share {
    bytes: usize,
    /// Its packets, oldest first.
    serials: VecDeque<u64>,
}

/// One packet in pieces; `T` is what the half wants to know about it.
#[derive(Debug)]
pub(super) struct Entry<T> {
    pub id: PacketId,
    pub pieces: Pieces,
    /// It was given up for this reason; nothing more of it is taken.
    pub poison: Option<DropReason>,
    pub note: T,
    since_ns: u64,
    cost: usize,
}

/// Packets in pieces of one core.
#[derive(Debug)]
pub(super) struct Store<T> {
    /// By age: serials only grow.
    entries: BTreeMap<u64, Entry<T>>,
    serials: HashMap<PacketId, u64, SecretState>,
    sources: HashMap<Source, Share, SecretState>,
    /// Sources by what they have, the greediest last.
    ranking: BTreeSet<(usize, Source)>,
    next_serial: u64,
    bytes: usize,
    limits: FragmentLimits,
    pub stats: FragmentStats,
    /// Fragments that were taken and dropped later.
    pub late: DropCounters,
}

impl<T> Store<T> {
    /// Bytes that a packet costs besides its pieces: its entry and its places in the indexes, whose nodes and tables
    /// may be half empty.
    pub const ENTRY_BYTES: usize = 2
        * (size_of::<Entry<T>>()
            + size_of::<(PacketId, u64)>()
            + size_of::<(Source, Share)>()
            + size_of::<(usize, Source)>()
            + 2 * size_of::<u64>());

    pub fn new(limits: FragmentLimits, hash: SecretState) -> Self {
        Self {
            entries: BTreeMap::new(),
            serials: HashMap::with_hasher(hash.clone()),
            sources: HashMap::with_hasher(hash),
            ranking: BTreeSet::new(),
            next_serial: 0,
            bytes: 0,
            limits,
            stats: FragmentStats::default(),
            late: DropCounters::new(),
        }
    }

    pub fn set_limits(&mut self, limits: FragmentLimits) {
        self.limits = limits;
        while self.bytes > limits.bytes_max {
            let Some(oldest) = self.oldest_but(None) else { break };
            self.evict(oldest);
        }
    }

    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn find(&self, id: &PacketId) -> Option<u64> {
        self.serials.get(id).copied()
    }

    pub fn entry(&mut self, serial: u64) -> Option<&mut Entry<T>> {
        self.entries.get_mut(&serial)
    }

    /// When the oldest packet's time is over.
    fn deadline_ns(&self) -> Option<u64> {
        let (_, entry) = self.entries.first_key_value()?;
        Some(entry.since_ns.saturating_add(self.limits.timeout_ns))
    }

    /// Drops packets whose time is over.
    pub fn expire(&mut self, now_ns: u64) {
        while self.deadline_ns().is_some_and(|deadline| deadline <= now_ns) {
            let Some((&serial, _)) = self.entries.first_key_value() else { return };
            if let Some(entry) = self.remove(serial)
                && entry.poison.is_none()
            {
                self.stats.timed_out += 1;
                self.late.add_n(DropReason::FragmentTimeout, u64::from(entry.pieces.held()));
            }
        }
    }

    /// A place for a packet that is not there.
    pub fn open(&mut self, now_ns: u64, id: PacketId, note: T) -> Result<u64, DropReason> {
        let source = Source::of(&id);
        let most = usize::from(self.limits.packets_per_source_max);
        if most == 0 {
            return Err(DropReason::FragmentsFull);
        }
        while let Some(share) = self.sources.get(&source)
            && share.serials.len() >= most
            && let Some(&oldest) = share.serials.front()
        {
            self.evict(oldest);
        }
        if !self.make_room(&source, Self::ENTRY_BYTES, None) {
            return Err(DropReason::FragmentsFull);
        }
        let pieces = Pieces::default();
        let entry = Entry { id, pieces, poison: None, note, since_ns: now_ns, cost: Self::ENTRY_BYTES };
        Ok(self.insert(entry))
    }

    /// Takes a fragment into its packet, of which `held` is kept. A copy of one that came before changes nothing.
    ///
    /// # Errors
    /// Why the fragment is dropped. Without it the packet is never whole, so all of it is given up.
    pub fn admit(
        &mut self,
        now_ns: u64,
        serial: u64,
        extent: &Extent,
        held: &[u8],
    ) -> Result<Fit, DropReason> {
        let entry = self.entries.get_mut(&serial).ok_or(DropReason::FragmentTimeout)?;
        if let Some(reason) = entry.poison {
            return Err(reason);
        }
        let fits = entry.pieces.fit(extent);
        let (source, cost) = (Source::of(&entry.id), entry.pieces.cost_of_push(held.len()));
        let refused = match fits {
            Ok(Fit::Copy) => {
                self.stats.copies += 1;
                return Ok(Fit::Copy);
            }
            Ok(Fit::New) if self.make_room(&source, cost, Some(serial)) => None,
            Ok(Fit::New) => Some(DropReason::FragmentsFull),
            Err(reason) => Some(reason),
        };
        if let Some(reason) = refused {
            self.poison(now_ns, serial, reason);
            return Err(reason);
        }
        let entry = self.entries.get_mut(&serial).ok_or(DropReason::FragmentsFull)?;
        entry.pieces.push(extent, held);
        self.settle(serial);
        Ok(Fit::New)
    }

    /// Takes note of what a packet costs after its pieces changed.
    pub fn settle(&mut self, serial: u64) {
        let Some(entry) = self.entries.get_mut(&serial) else { return };
        let cost = Self::ENTRY_BYTES + entry.pieces.cost();
        let old = std::mem::replace(&mut entry.cost, cost);
        let source = Source::of(&entry.id);
        self.charge(source, old, cost);
    }

    /// Gives a packet up, and refuses the rest of it for the whole timeout from now on.
    pub fn poison(&mut self, now_ns: u64, serial: u64, reason: DropReason) {
        let Some(mut entry) = self.remove(serial) else { return };
        self.stats.poisoned += 1;
        self.late.add_n(reason, u64::from(entry.pieces.held()));
        entry.pieces.clear();
        entry.poison = Some(reason);
        entry.since_ns = now_ns;
        entry.cost = Self::ENTRY_BYTES + entry.pieces.cost();
        self.insert(entry);
    }

    /// Gives a packet up and forgets it.
    pub fn give_up(&mut self, serial: u64, reason: DropReason) {
        if let Some(entry) = self.remove(serial) {
            self.late.add_n(reason, u64::from(entry.pieces.held()));
        }
    }

    /// Takes a packet out.
    pub fn remove(&mut self, serial: u64) -> Option<Entry<T>> {
        let entry = self.entries.remove(&serial)?;
        self.serials.remove(&entry.id);
        let source = Source::of(&entry.id);
        self.charge(source, entry.cost, 0);
        if let Some(share) = self.sources.get_mut(&source) {
            if let Ok(at) = share.serials.binary_search(&serial) {
                share.serials.remove(at);
            }
            if share.serials.is_empty() {
                self.ranking.remove(&(share.bytes, source));
                self.sources.remove(&source);
            }
        }
        Some(entry)
    }

    fn insert(&mut self, entry: Entry<T>) -> u64 {
        let serial = self.next_serial;
        self.next_serial += 1;
        let source = Source::of(&entry.id);
        self.sources.entry(source).or_default().serials.push_back(serial);
        self.charge(source, 0, entry.cost);
        self.serials.insert(entry.id, serial);
        self.entries.insert(serial, entry);
        serial
    }

    /// Charges a source with `new` bytes instead of `old`, in one of its packets.
    fn charge(&mut self, source: Source, old: usize, new: usize) {
        if old == new {
            return;
        }
        if let Some(share) = self.sources.get_mut(&source) {
            self.ranking.remove(&(share.bytes, source));
            share.bytes = share.bytes - old + new;
            self.ranking.insert((share.bytes, source));
        }
        self.bytes = self.bytes - old + new;
    }

    /// Makes room for `bytes` of a source; the packet `keep` stays. A source that would have more than it may gives
    /// its own oldest packet. When all is full, the source with most gives its oldest if it has more than an equal
    /// share, and if nobody has, the oldest of all goes.
    fn make_room(&mut self, source: &Source, bytes: usize, keep: Option<u64>) -> bool {
        let most = self.limits.bytes_max / SOURCE_SHARE;
        loop {
            let own = self.sources.get(source).map_or(0, |share| share.bytes) + bytes;
            let victim = if own > most {
                self.oldest_of(source, keep)
            } else if self.bytes + bytes > self.limits.bytes_max {
                let equal = (self.limits.bytes_max / self.sources.len().max(1)).max(SOURCE_BYTES_MIN);
                match self.ranking.last() {
                    Some((greatest, other)) if *greatest > equal => self.oldest_of(other, keep),
                    _ => self.oldest_but(keep),
                }
            } else {
                return true;
            };
            let Some(victim) = victim else { return false };
            self.evict(victim);
        }
    }

    fn oldest_of(&self, source: &Source, keep: Option<u64>) -> Option<u64> {
        let share = self.sources.get(source)?;
        share.serials.iter().copied().find(|serial| Some(*serial) != keep)
    }

    fn oldest_but(&self, keep: Option<u64>) -> Option<u64> {
        self.entries.keys().copied().find(|serial| Some(*serial) != keep)
    }

    fn evict(&mut self, serial: u64) {
        self.stats.evicted += 1;
        self.give_up(serial, DropReason::FragmentsFull);
    }

    /// Sums everything up anew and compares: for tests.
    #[cfg(test)]
    pub fn audit(&self) {
        let costs = self.entries.values().map(|entry| {
            assert_eq!(entry.cost, Self::ENTRY_BYTES + entry.pieces.cost());
            let held: usize = entry.pieces.iter().map(|piece| piece.bytes.len()).sum();
            assert!(entry.pieces.cost() >= held);
            entry.cost
        });
        assert_eq!(costs.sum::<usize>(), self.bytes);
        assert!(self.bytes <= self.limits.bytes_max);
        let mut shares: BTreeMap<Source, (usize, Vec<u64>)> = BTreeMap::new();
        for (serial, entry) in &self.entries {
            let share = shares.entry(Source::of(&entry.id)).or_default();
            share.0 += entry.cost;
            share.1.push(*serial);
            assert_eq!(self.find(&entry.id), Some(*serial));
        }
        assert_eq!(self.serials.len(), self.entries.len());
        assert_eq!((self.sources.len(), self.ranking.len()), (shares.len(), shares.len()));
        for (source, (bytes, serials)) in shares {
            let share = self.sources.get(&source);
            assert_eq!(share.map(|share| share.bytes), Some(bytes));
            assert!(share.is_some_and(|share| share.serials.iter().eq(&serials)));
            assert!(self.ranking.contains(&(bytes, source)));
            assert!(serials.len() <= usize::from(self.limits.packets_per_source_max));
            assert!(bytes <= self.limits.bytes_max / SOURCE_SHARE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::testing::assert_spreads;

    #[test]
    fn packets_that_a_stranger_chooses_do_not_meet() {
        let limits = FragmentLimits { bytes_max: 1 << 20, packets_per_source_max: 16, timeout_ns: 1 };
        let store = Store::<()>::new(limits, SecretState::of_number(1));
        let (dst, ingress) = (IpAddr::from([203, 0, 113, 1]), packet::Ingress::Host);
        let id = |src| PacketId { src, dst, id: 1, tenant: 0, ingress, protocol: 17 };
        assert_spreads(store.serials.hasher(), id);
        assert_spreads(store.sources.hasher(), |prefix| Source { tenant: 0, prefix });
    }
}
