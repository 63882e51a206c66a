//! The port tables of a core: by outside address, tenant of the outer interface, table number and slot.
//!
//! # Why no reply 5-tuple is given twice
//!
//! * Between cores: a core takes only ports whose replies fall into buckets of its own that no other core may still
//!   have flows in.
//! * Within a core: all flows with the same outside address, remote endpoint and protocol have the same *home* table,
//!   and a table gives a port once. The home is a keyed hash: of remote endpoint and protocol for pool addresses
//!   (row C2), of client and server address for kept ones (row C3; these share the tables of a common, nameless
//!   address, or each client would need tables of its own).
//! * When all that is exhausted, ports of other tables are taken (*foreign* ports). From then until the last of them
//!   is given back, every choice is checked against the flow table. So it is while the number of tables of an
//!   address is not the one that its ports were chosen with, and while a client's own port stands in no table because
//!   another remote's flow has its place.
//!
//! A port of a TCP connection rests when that has ended: the other end may remember it ([`super::ports::REST_S`]). Resting
//! ports are given out when there are no others, those that rest longest first.

use std::net::IpAddr;
use std::sync::Arc;

use hashbrown::HashMap;
use packet::flow::FlowKey;
use std::hash::BuildHasher;
use steering::port_solver::{NoSolution, Outgoing, PortSlot, ReplyPorts};
use steering::symmetric::{FlowHasher, core_bits};

use super::classes::{ClassMap, ClassMask, xor_all};
use super::mapping::mapping_core;
use super::policy::TABLES_MAX;
use super::port_set::{Blocks, PortSet, block_of};
use super::ports::{PlaceState, PortTable, Verdict, Wish};
use crate::hash::SecretState;
use crate::random::Random;

/// Other tables that are tried when the home table is exhausted.
const OVERFLOW_TABLES: u16 = 4;

/// Tables whose resting ports are looked at in one step.
const TABLES_SWEPT: usize = 8;

/// Flow table look-ups of one choice, when it needs them.
pub(crate) const CHECKS_MAX: u32 = 64;

/// Whose ports.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum PoolKey {
    /// An outside address of ours.
    Address(IpAddr),
    /// Clients' own addresses; true: IPv6.
    Kept(bool),
}

/// The tables of one address.
#[derive(Debug)]
struct Pool {
    key: PoolKey,
    tenant: u16,
    held: u64,
    /// Ports held by flows of another home table, or in none.
    foreign: u32,
    /// Ports held in no table.
    beside: u32,
    /// With how many tables the held ports were chosen.
    modulus: u16,
    /// With several numbers of tables.
    mixed: bool,
    /// By number × 2 + (1 for the high slot).
    tables: Vec<Option<Box<PortTable>>>,
}

/// A set of allowed ports, rearranged for each slot when first needed.
#[derive(Debug)]
struct MaskSet {
    ports: PortSet,
    slots: [Option<Arc<ClassMask>>; 4],
}

/// The buckets whose replies come to this core, as bits.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct OwnBuckets {
    /// All of them.
    pub(crate) all: u128,
    /// Those that no other core may have flows in.
    pub(crate) settled: u128,
}

/// A port that is wanted more than others.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Like {
    /// The port.
    pub(crate) port: u16,
    /// Place of the ports among which it must be.
    pub(crate) set: usize,
    /// Also where its place in the table is held for another remote: the flow table says whether it is free.
    pub(crate) beside_tables: bool,
}

/// Request for a port of a pool.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ask<'a> {
    pub(crate) key: PoolKey,
    pub(crate) flow: Outgoing,
    /// Place of the allowed ports.
    pub(crate) set: usize,
    /// The port that it gets if that is free.
    pub(crate) like: Option<Like>,
    /// Number of tables.
    pub(crate) tables: u16,
    pub(crate) blocks: Blocks,
    /// Ports of the set may be others' by now: each is asked about.
    pub(crate) avoids: bool,
    /// The bucket of the forward direction.
    pub(crate) bucket: u8,
    pub(crate) random: u64,
    pub(crate) hasher: &'a FlowHasher,
}

/// Port that was found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Chosen {
    pub(crate) port: u16,
    pub(crate) table: u8,
    /// The hash did not decide: the reply may come to another core.
    pub(crate) anywhere: bool,
    /// It stands in no table ([`Like::beside_tables`]).
    pub(crate) own_port: bool,
}

/// Which tables are tried.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Reach {
    /// The flow's own.
    Home,
    /// A few others.
    Others,
    /// The flow's own again: ports that rest.
    Rested,
}

impl Reach {
    /// In the order in which they are tried. In other tables nothing is known of what rests for this remote.
    pub(crate) const ALL: [Reach; 3] = [Reach::Home, Reach::Rested, Reach::Others];
}

/// The port tables of one core.
#[derive(Debug)]
pub(crate) struct Pools {
    core: u8,
    cores: u8,
    numbers: SecretState,
    maps: Option<[ClassMap; 4]>,
    masks: Vec<MaskSet>,
    /// The allowed ports of a set that are this core's by [`mapping_core`], for the address asked last.
    own_mask: Option<(IpAddr, usize, PortSlot, Arc<ClassMask>)>,
    own: OwnBuckets,
    by_key: HashMap<(PoolKey, u16), usize, SecretState>,
    pools: Vec<Pool>,
    /// The time, s.
    now_s: u32,
    /// Pool and table whose resting ports are looked at next.
    sweep: (usize, usize),
    /// Words of tables read.
    pub(crate) words_read: u64,
    /// Flow table look-ups.
    pub(crate) checks: u64,
    /// Ports given back that were not held.
    pub(crate) not_held: u64,
}

impl Pools {
    pub(crate) fn new(core: u8, cores: u8, random: &mut Random) -> Self {
        Self {
            core,
            cores,
            numbers: SecretState::draw(random),
            maps: None,
            masks: Vec::new(),
            own_mask: None,
            own: OwnBuckets::default(),
            by_key: HashMap::with_hasher(SecretState::draw(random)),
            pools: Vec::new(),
            now_s: 0,
            sweep: (0, 0),
            words_read: 0,
            checks: 0,
            not_held: 0,
        }
    }

    /// Follows a new policy, owner table or hash. Held ports stay held.
    pub(crate) fn follow(
        &mut self,
        sets: &[PortSet],
        own: OwnBuckets,
        hasher: &FlowHasher,
        solvers: &ReplyPorts,
    ) {
        self.own = own;
        self.own_mask = None;
        let [a, b, c, d] = PortSlot::ALL.map(|slot| ClassMap::new(hasher, solvers, slot));
        let maps = match (a, b, c, d) {
            (Some(a), Some(b), Some(c), Some(d)) => Some([a, b, c, d]),
            _ => None,
        };
        let same = self.maps == maps;
        let mut earlier = std::mem::take(&mut self.masks);
        for ports in sets {
            let known = earlier.iter().position(|mask| same && mask.ports == *ports);
            let new = || MaskSet { ports: ports.clone(), slots: Default::default() };
            self.masks.push(known.map_or_else(new, |place| earlier.swap_remove(place)));
        }
        if !same {
            let old = std::mem::replace(&mut self.maps, maps);
            if let (Some(old), Some(new)) = (&old, &self.maps) {
                rearrange(&mut self.pools, old, new);
            }
        }
        self.pools.retain(|pool| pool.held > 0 || pool.tables.iter().any(Option::is_some));
        self.by_key.clear();
        for (place, pool) in self.pools.iter().enumerate() {
            self.by_key.insert((pool.key, pool.tenant), place);
        }
    }

    /// Whether the reply of a flow comes to this core.
    pub(crate) fn comes_here(&self, hash: u32) -> bool {
        self.own.all >> core_bits(hash) & 1 == 1
    }

    /// Takes a port.
    pub(crate) fn choose(
        &mut self,
        ask: &Ask<'_>,
        reach: Reach,
        in_use: &dyn Fn(&FlowKey) -> bool,
    ) -> Option<Chosen> {
        if ask.blocks == 0 {
            return None;
        }
        let place = self.pool(ask.key, ask.flow.tenant);
        let modulus = ask.tables.clamp(1, TABLES_MAX);
        let home = self.home(ask.key, &ask.flow, modulus);
        self.pools.get_mut(place)?.note_modulus(modulus);
        let mut checks = CHECKS_MAX;
        match reach {
            Reach::Home => self
                .wanted(place, home, ask, in_use)
                .or_else(|| self.in_table(place, (home, reach), ask, &mut checks, in_use)),
            Reach::Rested => self.in_table(place, (home, reach), ask, &mut checks, in_use),
            Reach::Others => (1..=OVERFLOW_TABLES.min(modulus - 1)).find_map(|step| {
                // An odd stride comes by different tables, and not by the home of every neighbour first.
                let stride = (ask.random >> 48) as u16 | 1;
                let number = home.wrapping_add(step.wrapping_mul(stride)) & (modulus - 1);
                if number == home {
                    return None;
                }
                self.in_table(place, (number, reach), ask, &mut checks, in_use)
            }),
        }
    }

    /// Takes exactly this port, for a flow that had it before, whatever core its replies come to. Where another remote's
    /// flow has its place in the table, it stands in none ([`Chosen::own_port`]): tables are drawn anew by each process.
    /// `None`: another flow has the same reply.
    pub(crate) fn take_again(
        &mut self,
        ask: &Ask<'_>,
        port: u16,
        in_use: &dyn Fn(&FlowKey) -> bool,
    ) -> Option<Chosen> {
        if in_use(&ask.flow.with_port(port).reversed()) {
            return None;
        }
        let place = self.pool(ask.key, ask.flow.tenant);
        let modulus = ask.tables.clamp(1, TABLES_MAX);
        let number = self.home(ask.key, &ask.flow, modulus);
        let (slot, linear) = (slot_of(&ask.flow)?, ask.flow.slot().is_ok());
        let mask = self.mask(ask, slot, linear)?;
        let wanted = self.maps.as_ref()?.get(slot as usize)?.place(port);
        let pool = self.pools.get_mut(place)?;
        pool.note_modulus(modulus);
        let table = pool.table(table_index(number, slot))?;
        let own_port = table.state(wanted) != PlaceState::Free;
        if own_port {
            pool.beside += 1;
            pool.foreign += 1;
        } else {
            table.take(wanted, &mask, false);
        }
        pool.held += 1;
        Some(Chosen { port, table: number as u8, anywhere: !linear, own_port })
    }

    /// Takes exactly this port, which is in no table, for one more remote. False: another flow has the same reply.
    pub(crate) fn take_beside(
        &mut self,
        ask: &Ask<'_>,
        port: u16,
        in_use: &dyn Fn(&FlowKey) -> bool,
    ) -> bool {
        if in_use(&ask.flow.with_port(port).reversed()) {
            return false;
        }
        let place = self.pool(ask.key, ask.flow.tenant);
        let Some(pool) = self.pools.get_mut(place) else { return false };
        pool.beside += 1;
        pool.foreign += 1;
        pool.held += 1;
        true
    }

    /// The flow's own table.
    fn home(&self, key: PoolKey, flow: &Outgoing, modulus: u16) -> u16 {
        let hash = match key {
            PoolKey::Address(_) => self.numbers.hash_one((flow.remote, flow.remote_port, flow.protocol)),
            PoolKey::Kept(_) => self.numbers.hash_one((flow.own, flow.remote)),
        };
        (hash >> 32) as u16 & (modulus - 1)
    }

    fn pool(&mut self, key: PoolKey, tenant: u16) -> usize {
        *self.by_key.entry((key, tenant)).or_insert_with(|| {
            self.pools.push(Pool {
                key,
                tenant,
                held: 0,
                foreign: 0,
                beside: 0,
                modulus: 0,
                mixed: false,
                tables: Vec::new(),
            });
            self.pools.len() - 1
        })
    }

    fn in_table(
        &mut self,
        place: usize,
        (number, reach): (u16, Reach),
        ask: &Ask<'_>,
        checks: &mut u32,
        in_use: &dyn Fn(&FlowKey) -> bool,
    ) -> Option<Chosen> {
        let slot = slot_of(&ask.flow)?;
        let linear = ask.flow.slot().is_ok();
        let mask = self.mask(ask, slot, linear)?;
        let map = self.maps.as_ref()?.get(slot as usize)?;
        let pool = self.pools.get_mut(place)?;
        let (classes, first, unsettled) = classes(self.own, ask, linear);
        let foreign = reach == Reach::Others;
        let check = foreign || unsettled || ask.avoids || pool.mixed || pool.foreign > 0;
        let index = table_index(number, slot);
        let table = pool.table(index)?;
        table.wake(self.now_s);
        let wish = Wish { classes, first, blocks: ask.blocks, mask: &mask, random: ask.random };
        let looked_up = &mut self.checks;
        let mut accept = |place| {
            if !check {
                return Verdict::Take;
            }
            if *checks == 0 {
                return Verdict::Stop;
            }
            *checks -= 1;
            *looked_up += 1;
            let reply = ask.flow.with_port(map.port(place)).reversed();
            if in_use(&reply) { Verdict::Skip } else { Verdict::Take }
        };
        let found = match reach {
            Reach::Home | Reach::Others => table.find(&wish, &mut self.words_read, &mut accept),
            Reach::Rested => table.find_rested(&wish, &mut accept),
        };
        match found {
            Some(found) => {
                table.take(found, &mask, foreign);
                pool.held += 1;
                pool.foreign += u32::from(foreign);
                let (port, table) = (map.port(found), number as u8);
                Some(Chosen { port, table, anywhere: !linear, own_port: false })
            }
            None => {
                if table.is_idle()
                    && let Some(slot) = pool.tables.get_mut(index)
                {
                    *slot = None;
                }
                None
            }
        }
    }

    /// The port that is wanted more than others, if it may be used, leads here and is free.
    fn wanted(
        &mut self,
        place: usize,
        number: u16,
        ask: &Ask<'_>,
        in_use: &dyn Fn(&FlowKey) -> bool,
    ) -> Option<Chosen> {
        let like = ask.like?;
        let (slot, linear) = (slot_of(&ask.flow)?, ask.flow.slot().is_ok());
        let usable = self.masks.get(like.set)?.ports.contains(like.port)
            && ask.blocks >> block_of(like.port) & 1 == 1
            && (linear || mapping_core(ask.flow.own, like.port, self.cores) == self.core);
        let wanted = self.maps.as_ref()?.get(slot as usize)?.place(like.port);
        let (classes, _, unsettled) = classes(self.own, ask, linear);
        if !usable || classes >> (wanted >> 9) & 1 == 0 {
            return None;
        }
        let mask = self.mask(ask, slot, linear)?;
        let now_s = self.now_s;
        let pool = self.pools.get_mut(place)?;
        let check = unsettled || pool.mixed || pool.foreign > 0;
        let table = pool.table(table_index(number, slot))?;
        table.wake(now_s);
        let state = table.state(wanted);
        let beside = state == PlaceState::Held && like.beside_tables;
        let mut is_used = || {
            self.checks += 1;
            in_use(&ask.flow.with_port(like.port).reversed())
        };
        if !(beside || state == PlaceState::Free) || ((check || beside) && is_used()) {
            return None;
        }
        if beside {
            pool.beside += 1;
            pool.foreign += 1;
        } else {
            table.take(wanted, &mask, false);
        }
        pool.held += 1;
        Some(Chosen { port: like.port, table: number as u8, anywhere: !linear, own_port: beside })
    }

    /// The allowed ports in the order of places; if the hash does not decide, those of this core's granules.
    fn mask(&mut self, ask: &Ask<'_>, slot: PortSlot, linear: bool) -> Option<Arc<ClassMask>> {
        let map = self.maps.as_ref()?.get(slot as usize)?;
        let set = self.masks.get_mut(ask.set)?;
        if linear {
            let kept = set.slots.get_mut(slot as usize)?;
            return Some(Arc::clone(kept.get_or_insert_with(|| Arc::new(ClassMask::new(map, &set.ports)))));
        }
        if let Some((address, of_set, of_slot, mask)) = &self.own_mask
            && (*address, *of_set, *of_slot) == (ask.flow.own, ask.set, slot)
        {
            return Some(Arc::clone(mask));
        }
        let mut ports = PortSet::default();
        let own = |port: &u16| mapping_core(ask.flow.own, *port, self.cores) == self.core;
        set.ports.iter().filter(own).for_each(|port| ports.insert(port));
        let mask = Arc::new(ClassMask::new(map, &ports));
        self.own_mask = Some((ask.flow.own, ask.set, slot, Arc::clone(&mask)));
        Some(mask)
    }

    /// The time goes on; ends the rest of ports of a few tables.
    pub(crate) fn tick(&mut self, now_ns: u64) {
        self.now_s = (now_ns / 1_000_000_000) as u32;
        let (place, first) = self.sweep;
        let Some(pool) = self.pools.get_mut(place) else {
            self.sweep = (0, 0);
            return;
        };
        for kept in pool.tables.iter_mut().skip(first).take(TABLES_SWEPT) {
            let Some(table) = kept else { continue };
            table.wake(self.now_s);
            if table.is_idle() {
                *kept = None;
            }
        }
        let next = first + TABLES_SWEPT;
        self.sweep = if next < pool.tables.len() { (place, next) } else { (place + 1, 0) };
    }

    /// Gives a port back that stood in no table.
    pub(crate) fn give_own(&mut self, flow: &Outgoing) {
        let keys = [PoolKey::Address(flow.own), PoolKey::Kept(flow.own.is_ipv6())];
        for key in keys {
            let place = self.by_key.get(&(key, flow.tenant));
            if let Some(pool) = place.and_then(|place| self.pools.get_mut(*place))
                && let Some(beside) = pool.beside.checked_sub(1)
            {
                pool.beside = beside;
                pool.foreign = pool.foreign.saturating_sub(1);
                pool.held = pool.held.saturating_sub(1);
                return;
            }
        }
        self.not_held += 1;
    }

    /// Gives a port back: the flow as it left, without its port, then port and table. `rests`: the other end may remember
    /// the connection.
    pub(crate) fn give(&mut self, flow: &Outgoing, port: u16, number: u8, rests: bool) -> bool {
        let given = self.give_to(PoolKey::Address(flow.own), flow, (port, number), rests).is_some()
            || self.give_to(PoolKey::Kept(flow.own.is_ipv6()), flow, (port, number), rests).is_some();
        self.not_held += u64::from(!given);
        given
    }

    fn give_to(
        &mut self,
        key: PoolKey,
        flow: &Outgoing,
        (port, number): (u16, u8),
        rests: bool,
    ) -> Option<()> {
        let rest_from_s = rests.then_some(self.now_s);
        let slot = slot_of(flow)?;
        let place = *self.by_key.get(&(key, flow.tenant))?;
        let pool = self.pools.get_mut(place)?;
        let kept = pool.tables.get_mut(table_index(u16::from(number), slot))?;
        let table = kept.as_mut()?;
        let given = table.give(self.maps.as_ref()?.get(slot as usize)?.place(port), rest_from_s)?;
        pool.held -= 1;
        pool.foreign -= u32::from(given.foreign);
        if table.is_idle() {
            *kept = None;
        }
        Some(())
    }

    /// Ports held, by address (`None`: clients' own), tenant, table number and slot (true: high); in order.
    pub(crate) fn fill(&self) -> Vec<(Option<IpAddr>, u16, u8, bool, u32)> {
        let mut fill = Vec::new();
        for pool in &self.pools {
            let address = match pool.key {
                PoolKey::Address(address) => Some(address),
                PoolKey::Kept(_) => None,
            };
            for (index, table) in pool.tables.iter().enumerate() {
                if let Some(table) = table.as_ref().filter(|table| table.held() > 0) {
                    fill.push((address, pool.tenant, (index / 2) as u8, index % 2 == 1, table.held()));
                }
            }
        }
        fill.sort_unstable();
        fill
    }

    /// Ports held.
    pub(crate) fn held(&self) -> u64 {
        self.pools.iter().map(|pool| pool.held).sum()
    }
}

impl Pool {
    /// A port is to be chosen with so many tables.
    fn note_modulus(&mut self, modulus: u16) {
        if self.held == 0 {
            (self.modulus, self.mixed) = (modulus, false);
        } else if self.modulus != modulus {
            self.mixed = true;
        }
    }

    /// A table, empty if it was not there.
    fn table(&mut self, index: usize) -> Option<&mut PortTable> {
        if self.tables.len() <= index {
            self.tables.resize_with(index + 1, || None);
        }
        Some(self.tables.get_mut(index)?.get_or_insert_default())
    }
}

/// Place of a table of a slot.
fn table_index(number: u16, slot: PortSlot) -> usize {
    usize::from(number) * 2 + (slot as usize & 1)
}

/// Which classes serve, which one first, and whether other cores may have flows there.
fn classes(own: OwnBuckets, ask: &Ask<'_>, linear: bool) -> (u128, Option<u8>, bool) {
    if !linear {
        return (u128::MAX, None, false);
    }
    let unsettled = own.settled == 0;
    let usable = if unsettled { own.all } else { own.settled };
    let base = core_bits(ask.hasher.hash(&ask.flow.with_port(0), ask.flow.tenant));
    (xor_all(usable, base), Some(base ^ ask.bucket), unsettled)
}

/// The slot by which tables are told apart: as the hash has it, the low one if it cannot decide.
fn slot_of(flow: &Outgoing) -> Option<PortSlot> {
    match flow.slot() {
        Ok(slot) => Some(slot),
        Err(NoSolution::EqualAddresses) if flow.own.is_ipv4() => Some(PortSlot::LowV4),
        Err(NoSolution::EqualAddresses) => Some(PortSlot::LowV6),
        Err(NoSolution::MixedFamilies) => None,
    }
}

/// The key of the hash is another: every held port has another place.
fn rearrange(pools: &mut [Pool], old: &[ClassMap; 4], new: &[ClassMap; 4]) {
    for pool in pools {
        let v6 = match pool.key {
            PoolKey::Address(address) => address.is_ipv6(),
            PoolKey::Kept(v6) => v6,
        };
        for (index, table) in pool.tables.iter_mut().enumerate() {
            let slot = index % 2 + 2 * usize::from(v6);
            if let (Some(table), Some(old), Some(new)) = (table, old.get(slot), new.get(slot)) {
                table.rearrange(old, new);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::testing::assert_spreads;

    #[test]
    fn remotes_that_a_stranger_chooses_do_not_meet() {
        let pools = Pools::new(0, 1, &mut Random::of_number(1));
        assert_spreads(&pools.numbers, |remote| (remote, 443_u16, 6_u8));
        assert_spreads(pools.by_key.hasher(), |address| (PoolKey::Address(address), 0_u16));
    }
}
