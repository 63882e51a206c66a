//! Endpoint-independent mappings (RFC 4787 §4.1): one outside endpoint for an inside endpoint, whoever the remote is,
//! and open to every remote (§5, endpoint-independent filtering).
//!
//! The hash cannot bring packets of unknown remotes to one core, so outside ports belong to cores statically:
//! [`mapping_core`] is known to every core, and who reads a packet to such a port hands it over. Ports are dealt in
//! *granules* of 8, so that each core has a share of each block of 1,024, also of a block leased to one client.
//!
//! A mapping lives as long as one of its flows, and [`MAPPING_IDLE_NS`] longer. As long it keeps its inside endpoint's
//! flows at its core: the bucket by which they are steered has it among its owners, and counts it
//! ([`super::Nat::mappings_by_bucket`]), when it has moved.

use std::collections::VecDeque;
use std::net::IpAddr;

use crate::hash::SecretState;
use hashbrown::HashMap;

use super::port_set::{Blocks, PortSet, WORDS};
use crate::held_ports::HeldPorts;

/// How long a mapping is kept after its last flow, ns.
pub const MAPPING_IDLE_NS: u64 = 60_000_000_000;

/// Most mappings of one core.
pub const MAPPINGS_MAX: usize = 1 << 20;

/// Words in which a port of the wanted parity is sought.
const PARITY_WORDS_MAX: usize = 64;

/// Idle mappings looked at in one step.
const STEP_MAX: usize = 32;

/// The core to which an endpoint-independent outside port belongs; `cores` of them, numbered from 0.
#[must_use]
pub fn mapping_core(address: IpAddr, port: u16, cores: u8) -> u8 {
    ((u32::from(port >> 3) + first_core(address)) % u32::from(cores.max(1))) as u8
}

/// Addresses begin to deal at different cores.
fn first_core(address: IpAddr) -> u32 {
    match address {
        IpAddr::V4(address) => u32::from(address) & 0xff,
        IpAddr::V6(address) => u32::from(*address.octets().last().unwrap_or(&0)),
    }
}

/// Which ports of a word of 64 belong to a core: by the number of the word's first granule, modulo the cores.
fn own_words(core: u8, cores: u8) -> Vec<u64> {
    let cores = usize::from(cores.max(1));
    let own = |first: usize| {
        let granules = (0..8).filter(|granule| (first + granule) % cores == usize::from(core));
        granules.fold(0u64, |ports, granule| ports | 0xff << (8 * granule))
    };
    (0..cores).map(own).collect()
}

/// The inside of a mapping: tenant, protocol, address, port (or query id), and the zone: a client may go out by
/// several pools.
pub(crate) type InsideKey = (u16, u8, IpAddr, u16, IpAddr);

/// The outside: tenant of the outer interface, protocol, address, port.
pub(crate) type OutsideKey = (u16, u8, IpAddr, u16);

/// One mapping.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct MappingEntry {
    pub(crate) inside: InsideKey,
    pub(crate) outside: OutsideKey,
    /// Live flows.
    pub(crate) flows: u32,
    /// Its client holds the block: the log needs no line of its own.
    pub(crate) quiet: bool,
    /// Bucket of the inside endpoint, once a flow was begun here that is steered by it.
    pub(crate) home: Option<u16>,
    idle_since_ns: u64,
    queued: bool,
}

/// The ports of an address and protocol.
#[derive(Debug, Default)]
struct Used {
    ports: PortSet,
    /// Words that were found without a free port of ours.
    full: [u64; WORDS / 64],
    /// For which set of allowed ports.
    full_of: u64,
}

/// Where a new mapping's port may be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MappingWish<'a> {
    pub(crate) allowed: &'a PortSet,
    /// Ports that the host has opened since, if it has the address as well.
    pub(crate) opened: Option<&'a HeldPorts>,
    /// A number of that set: another set, another number.
    pub(crate) allowed_id: u64,
    /// Blocks that may be used and have an allowed port.
    pub(crate) blocks: Blocks,
    /// Port of the inside: even stays even and odd odd while there are such ports (RFC 4787 REQ-4).
    pub(crate) like: Option<u16>,
    pub(crate) random: u64,
}

/// The mappings of one core.
#[derive(Debug)]
pub(crate) struct Mappings {
    entries: Vec<Option<MappingEntry>>,
    vacant: Vec<u32>,
    by_inside: HashMap<InsideKey, u32, SecretState>,
    by_outside: HashMap<OutsideKey, u32, SecretState>,
    /// By tenant, protocol and address.
    used: HashMap<(u16, u8, IpAddr), Used, SecretState>,
    idle: VecDeque<(u64, u32)>,
    own: Vec<u64>,
    /// Mappings by [`MappingEntry::home`].
    homes: Vec<u32>,
    max: usize,
}

impl Mappings {
    pub(crate) fn new(core: u8, cores: u8, hash: SecretState, max: usize) -> Self {
        Self {
            entries: Vec::new(),
            vacant: Vec::new(),
            by_inside: HashMap::with_hasher(hash.clone()),
            by_outside: HashMap::with_hasher(hash.clone()),
            used: HashMap::with_hasher(hash),
            idle: VecDeque::new(),
            own: own_words(core, cores),
            homes: Vec::new(),
            max,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.by_outside.len()
    }

    /// Mappings from a place on, at most so many places; and the next place, if there are more.
    pub(crate) fn scan(
        &self,
        from: usize,
        count: usize,
    ) -> (impl Iterator<Item = &MappingEntry>, Option<usize>) {
        let next = from.saturating_add(count);
        let found = self.entries.iter().skip(from).take(count).flatten();
        (found, (next < self.entries.len()).then_some(next))
    }

    /// The mapping of an inside endpoint.
    pub(crate) fn of_inside(&self, key: &InsideKey) -> Option<&MappingEntry> {
        self.entry(self.by_inside.get(key))
    }

    /// The mapping of an outside endpoint.
    pub(crate) fn of_outside(&self, key: &OutsideKey) -> Option<&MappingEntry> {
        self.entry(self.by_outside.get(key))
    }

    fn entry(&self, number: Option<&u32>) -> Option<&MappingEntry> {
        self.entries.get(*number? as usize)?.as_ref()
    }

    /// Whether flows of this inside endpoint are begun here, where its mapping is.
    pub(crate) fn is_home(&self, key: &InsideKey, pool: &[IpAddr]) -> bool {
        self.of_inside(key).is_some_and(|entry| entry.home.is_some() && pool.contains(&entry.outside.2))
    }

    /// Flows of the inside endpoint are steered by its bucket `home`: to this mapping, until it ends.
    pub(crate) fn settle(&mut self, key: &OutsideKey, home: u16) {
        let number = self.by_outside.get(key).map_or(usize::MAX, |number| *number as usize);
        let Some(Some(entry)) = self.entries.get_mut(number) else { return };
        if entry.home.is_some() {
            return;
        }
        entry.home = Some(home);
        if self.homes.len() <= usize::from(home) {
            self.homes.resize(usize::from(home) + 1, 0);
        }
        if let Some(count) = self.homes.get_mut(usize::from(home)) {
            *count += 1;
        }
    }

    /// Mappings by the bucket that leads to them; further buckets have none.
    pub(crate) fn homes(&self) -> &[u32] {
        &self.homes
    }

    /// Others have begun the flows of all inside endpoints anew.
    pub(crate) fn forget_homes(&mut self) {
        if self.homes.iter().all(|count| *count == 0) {
            return;
        }
        self.homes.fill(0);
        self.entries.iter_mut().flatten().for_each(|entry| entry.home = None);
    }

    /// A flow more.
    pub(crate) fn join(&mut self, key: &OutsideKey) -> Option<MappingEntry> {
        let number = *self.by_outside.get(key)?;
        let entry = self.entries.get_mut(number as usize)?.as_mut()?;
        entry.flows += 1;
        Some(*entry)
    }

    /// A flow less: whether there was such a mapping.
    pub(crate) fn leave(&mut self, now_ns: u64, key: &OutsideKey) -> Option<MappingEntry> {
        let number = *self.by_outside.get(key)?;
        let entry = self.entries.get_mut(number as usize)?.as_mut()?;
        entry.flows = entry.flows.saturating_sub(1);
        if entry.flows == 0 {
            entry.idle_since_ns = now_ns;
            if !entry.queued {
                entry.queued = true;
                self.idle.push_back((now_ns, number));
            }
        }
        Some(*entry)
    }

    /// A free port of this core; `words` counts the words read.
    pub(crate) fn free_port(
        &mut self,
        (tenant, protocol, address): (u16, u8, IpAddr),
        wish: &MappingWish<'_>,
        words: &mut u64,
    ) -> Option<u16> {
        if self.len() >= self.max {
            return None;
        }
        let held = |word: usize| wish.opened.map_or(0, |opened| opened.word(protocol, address, word));
        let used = self.used.entry((tenant, protocol, address)).or_default();
        if used.full_of != wish.allowed_id {
            used.full_of = wish.allowed_id;
            used.full = [0; WORDS / 64];
        }
        let own = |word: usize| {
            let first = (8 * word + first_core(address) as usize) % self.own.len().max(1);
            self.own.get(first).copied().unwrap_or(0)
        };
        if let Some(like) = wish.like {
            let parity = if like & 1 == 0 { 0x5555_5555_5555_5555 } else { 0xaaaa_aaaa_aaaa_aaaa };
            let found = used.find((own, held), wish, parity, words);
            if found.is_some() {
                return found;
            }
        }
        used.find((own, held), wish, u64::MAX, words)
    }

    /// Whether nobody has this outside port.
    pub(crate) fn is_free(&self, tenant: u16, protocol: u8, address: IpAddr, port: u16) -> bool {
        let used = self.used.get(&(tenant, protocol, address));
        self.len() < self.max && !used.is_some_and(|used| used.ports.contains(port))
    }

    /// Makes a mapping, with one flow.
    pub(crate) fn insert(&mut self, inside: InsideKey, outside: OutsideKey, quiet: bool) -> MappingEntry {
        let entry =
            MappingEntry { inside, outside, flows: 1, quiet, home: None, idle_since_ns: 0, queued: false };
        let number = self.vacant.pop().unwrap_or_else(|| {
            self.entries.push(None);
            (self.entries.len() - 1) as u32
        });
        if let Some(slot) = self.entries.get_mut(number as usize) {
            *slot = Some(entry);
        }
        let (tenant, protocol, address, port) = outside;
        self.used.entry((tenant, protocol, address)).or_default().ports.insert(port);
        self.by_inside.insert(inside, number);
        self.by_outside.insert(outside, number);
        entry
    }

    /// Ends some of the mappings that were idle long enough.
    pub(crate) fn expire(&mut self, now_ns: u64, mut gone: impl FnMut(&MappingEntry)) {
        for _ in 0..STEP_MAX {
            let Some(&(since_ns, number)) = self.idle.front() else { return };
            if now_ns.saturating_sub(since_ns) < MAPPING_IDLE_NS {
                return;
            }
            self.idle.pop_front();
            let Some(slot) = self.entries.get_mut(number as usize) else { continue };
            let Some(entry) = slot.as_mut() else { continue };
            entry.queued = false;
            if entry.flows > 0 {
                continue;
            }
            if now_ns.saturating_sub(entry.idle_since_ns) < MAPPING_IDLE_NS {
                entry.queued = true;
                self.idle.push_back((entry.idle_since_ns, number));
                continue;
            }
            let entry = *entry;
            *slot = None;
            let home = entry.home.and_then(|home| self.homes.get_mut(usize::from(home)));
            if let Some(count) = home {
                *count -= 1;
            }
            self.vacant.push(number);
            if self.by_inside.get(&entry.inside) == Some(&number) {
                self.by_inside.remove(&entry.inside);
            }
            self.by_outside.remove(&entry.outside);
            let (tenant, protocol, address, port) = entry.outside;
            if let Some(used) = self.used.get_mut(&(tenant, protocol, address)) {
                used.give(port);
            }
            gone(&entry);
        }
    }
}

impl Used {
    fn find(
        &mut self,
        (own, held): (impl Fn(usize) -> u64, impl Fn(usize) -> u64),
        wish: &MappingWish<'_>,
        parity: u64,
        words: &mut u64,
    ) -> Option<u16> {
        let any = parity == u64::MAX;
        // The right parity is a wish: it is not sought everywhere.
        let mut left = if any { WORDS } else { PARITY_WORDS_MAX };
        let block_turn = (wish.random & 63) as u32;
        let first_block = wish.blocks.rotate_right(block_turn).trailing_zeros() + block_turn;
        let first_word = wish.random >> 6;
        let turn = (wish.random >> 10 & 63) as u32;
        let blocks = (first_block..first_block + 64).map(|block| u64::from(block & 63));
        for block in blocks.filter(|block| wish.blocks >> block & 1 == 1) {
            for at in (first_word..first_word + 16).map(|word| (block << 4 | (word & 15)) as usize) {
                let open = wish.allowed.word(at) & own(at);
                if open == 0 || self.is_full(at) {
                    continue;
                }
                if left == 0 {
                    return None;
                }
                left -= 1;
                *words += 1;
                let free = open & !self.ports.word(at);
                let given = free & parity & if free == 0 { 0 } else { !held(at) };
                if given != 0 {
                    let bit = (given.rotate_right(turn).trailing_zeros() + turn) & 63;
                    return Some((at << 6) as u16 | bit as u16);
                }
                if any
                    && free == 0
                    && let Some(hint) = self.full.get_mut(at / 64)
                {
                    *hint |= 1 << (at % 64);
                }
            }
        }
        None
    }

    fn is_full(&self, at: usize) -> bool {
        self.full.get(at / 64).is_some_and(|hint| hint >> (at % 64) & 1 == 1)
    }

    fn give(&mut self, port: u16) {
        self.ports.remove(port);
        let at = usize::from(port >> 6);
        if let Some(hint) = self.full.get_mut(at / 64) {
            *hint &= !(1 << (at % 64));
        }
    }
}

#[cfg(test)]
mod tests;
