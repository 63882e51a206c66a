//! Ports by lease (row R1): aligned blocks of 1,024 ports of an outside address that belong to one user.
//!
//! A *holder* is a tenant's source prefix: its flows use its blocks and no others, and nobody else uses them. Leases
//! are taken and returned while packets flow: by the configuration, by the control socket, and by the NAT itself when
//! it gives each client a block of its own. Who chooses ports reads an immutable snapshot; a change takes a mutex,
//! builds the next snapshot and swaps it in. A client's automatic blocks take the mutex once per core that it comes
//! to, not once per flow.
//!
//! Blocks that come back rest before another user gets them: remote hosts and logs must not take the new user for the
//! old one. Uniqueness does not depend on it, for the port tables know every port that is still held.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use ipnet::IpNet;

use crate::spec::LeaseSpec;

use super::limits::Automatic;
use super::log::{NatEvent, NatEventKind};
use super::port_set::{BLOCK_PORTS, Blocks};

/// How long returned blocks rest unless [`Leases::set_rest`] says otherwise, ns.
pub const REST_NS: u64 = 120_000_000_000;

/// Most leases that are not automatic.
pub const LEASES_MAX: usize = 65_536;

/// A lease, as the caller names it when it gives it back.
pub type LeaseId = u32;

/// Why a lease cannot be taken.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LeaseError {
    /// Not whole blocks.
    #[error("ports {0}+{1}: first port and number must be multiples of 1024, and end at 65536 or before")]
    NotAligned(u16, u32),
    /// Another lease has one of the blocks.
    #[error("a part of ports {1}+{2} of {0} belongs to another lease, or rests after one")]
    Taken(IpAddr, u16, u32),
    /// No address has as many free blocks side by side.
    #[error("no {0} free ports side by side")]
    NoneFree(u32),
    /// There are too many.
    #[error("{LEASES_MAX} leases already")]
    TooMany,
    /// The holder's prefix and the address are of different families.
    #[error("holder and address are of different families")]
    MixedFamilies,
}

/// Blocks of one address.
pub type AddressBlocks = (IpAddr, Blocks);

/// One lease in force.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lease {
    /// Its number.
    pub id: LeaseId,
    /// Ports that are leased, and to whom.
    pub spec: LeaseSpec,
    /// It is in the configuration file; the next configuration without it returns it.
    pub configured: bool,
}

impl Lease {
    fn blocks(&self) -> Blocks {
        blocks_of(self.spec.first_port, self.spec.ports).unwrap_or(0)
    }
}

/// Who holds what by leases that are not automatic.
#[derive(Debug, Default)]
struct Holders {
    by_prefix: BTreeMap<(u16, IpNet), Vec<AddressBlocks>>,
    /// The prefix lengths that a tenant's leases have, longest first.
    lengths: BTreeMap<u16, Vec<u8>>,
}

impl Holders {
    fn new<'a>(leases: impl Iterator<Item = &'a Lease>) -> Self {
        let mut holders = Self::default();
        for lease in leases {
            let prefix = lease.spec.from.trunc();
            let blocks = holders.by_prefix.entry((lease.spec.tenant, prefix)).or_default();
            blocks.push((lease.spec.address, lease.blocks()));
            let lengths = holders.lengths.entry(lease.spec.tenant).or_default();
            if let Err(place) = lengths.binary_search_by(|known| prefix.prefix_len().cmp(known)) {
                lengths.insert(place, prefix.prefix_len());
            }
        }
        holders
    }
}

/// Holders and closed blocks, as cores read them.
#[derive(Debug, Default)]
pub(crate) struct Snapshot {
    holders: Arc<Holders>,
    /// Blocks that belong to somebody or rest, by address.
    closed: BTreeMap<IpAddr, Blocks>,
}

impl Snapshot {
    /// The blocks of a client that a lease covers: by the longest prefix of its tenant.
    pub(crate) fn held_by(&self, tenant: u16, client: IpAddr) -> Option<&[AddressBlocks]> {
        let lengths = self.holders.lengths.get(&tenant)?;
        let prefixes = lengths.iter().filter_map(|&length| IpNet::new(client, length).ok());
        let mut held = prefixes.filter_map(|prefix| self.holders.by_prefix.get(&(tenant, prefix.trunc())));
        held.next().map(Vec::as_slice)
    }

    /// Blocks of an address that only their holders may use.
    pub(crate) fn closed(&self, address: IpAddr) -> Blocks {
        if self.closed.is_empty() { 0 } else { self.closed.get(&address).copied().unwrap_or(0) }
    }
}

/// A client's automatic blocks, and how many cores use them.
#[derive(Debug)]
struct Granted {
    blocks: AddressBlocks,
    cores: u32,
}

#[derive(Debug)]
struct Resting {
    until_ns: u64,
    blocks: AddressBlocks,
}

#[derive(Debug, Default)]
struct State {
    leases: BTreeMap<LeaseId, Lease>,
    /// By tenant, client, and zone.
    automatic: BTreeMap<(u16, IpAddr, IpAddr), Granted>,
    /// Blocks in use by one of the two, or resting.
    closed: BTreeMap<IpAddr, Blocks>,
    holders: Arc<Holders>,
    resting: VecDeque<Resting>,
    next_id: LeaseId,
    rest_ns: u64,
}

/// All leases of a gateway. Shared by the cores and control.
#[derive(Debug)]
pub struct Leases {
    snapshot: ArcSwap<Snapshot>,
    state: Mutex<State>,
    /// When the next resting block is free again; `u64::MAX`: none rests.
    next_rested_ns: AtomicU64,
}

impl Default for Leases {
    fn default() -> Self {
        Self {
            snapshot: ArcSwap::default(),
            state: Mutex::new(State { rest_ns: REST_NS, ..State::default() }),
            next_rested_ns: AtomicU64::new(u64::MAX),
        }
    }
}

/// Request of a client without blocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AutomaticWish<'a> {
    pub(crate) tenant: u16,
    pub(crate) client: IpAddr,
    /// The pool of the client's family.
    pub(crate) addresses: &'a [IpAddr],
    /// Place in it to begin with.
    pub(crate) start: usize,
    /// Blocks all of whose ports the rule allows.
    pub(crate) whole: Blocks,
    /// How many.
    pub(crate) count: u32,
    pub(crate) random: u64,
}

impl Leases {
    /// How long returned blocks rest, ns.
    pub fn set_rest(&self, rest_ns: u64) {
        self.lock().rest_ns = rest_ns;
    }

    /// Takes exactly these ports. The event is for the log.
    pub fn take(&self, now_ns: u64, spec: LeaseSpec) -> Result<(LeaseId, NatEvent), LeaseError> {
        let mut state = self.lock();
        state.rested(now_ns);
        let taken = state.take(spec, false, now_ns);
        self.publish(&state);
        taken
    }

    /// Takes `ports` ports side by side on one of `addresses`: the first free ones. `allowed`: blocks that may be
    /// leased; the policy's answer is [`super::NatPolicy::leasable`]. The address and first port of `spec` are filled
    /// in.
    pub fn take_any(
        &self,
        now_ns: u64,
        mut spec: LeaseSpec,
        addresses: &[IpAddr],
        allowed: impl Fn(IpAddr) -> Blocks,
    ) -> Result<(Lease, NatEvent), LeaseError> {
        let mut state = self.lock();
        state.rested(now_ns);
        let same_family = |address: &&IpAddr| address.is_ipv4() == spec.from.addr().is_ipv4();
        for &address in addresses.iter().filter(same_family) {
            let free = allowed(address) & !state.closed(address);
            for block in 0..64u16 {
                let Some(wanted) = blocks_of(block << 10, spec.ports) else { break };
                if wanted & !free == 0 {
                    (spec.address, spec.first_port) = (address, block << 10);
                    let (id, event) = state.take(spec.clone(), false, now_ns)?;
                    self.publish(&state);
                    return Ok((Lease { id, spec, configured: false }, event));
                }
            }
        }
        Err(LeaseError::NoneFree(spec.ports))
    }

    /// Returns a lease; its blocks rest. `None` if there is no such lease.
    pub fn give_back(&self, now_ns: u64, id: LeaseId) -> Option<NatEvent> {
        let mut state = self.lock();
        let event = state.give_back(now_ns, id);
        self.publish(&state);
        event
    }

    /// Every lease but the automatic ones, by number.
    #[must_use]
    pub fn list(&self) -> Vec<Lease> {
        self.lock().leases.values().cloned().collect()
    }

    /// Every automatic lease: tenant, client, address, blocks; in order.
    #[must_use]
    pub fn automatic(&self) -> Vec<(u16, IpAddr, IpAddr, Blocks)> {
        let state = self.lock();
        let each = state.automatic.iter();
        each.map(|((tenant, client, _), granted)| (*tenant, *client, granted.blocks.0, granted.blocks.1))
            .collect()
    }

    /// Blocks of an address that nobody can be given now: they belong to a lease or to a client, or rest after one.
    #[must_use]
    pub fn closed(&self, now_ns: u64, address: IpAddr) -> Blocks {
        let mut state = self.lock();
        state.rested(now_ns);
        state.closed(address)
    }

    /// Errors with which [`Self::configure`] would refuse a new configuration, in its order; changes nothing.
    #[must_use]
    pub fn refused(&self, now_ns: u64, specs: &[LeaseSpec]) -> Vec<LeaseError> {
        let mut state = self.lock();
        state.rested(now_ns);
        state.refused(specs)
    }

    /// The leases of a new configuration: those that are no more in it are returned, new ones taken. What was taken
    /// by other means stays. When one cannot be taken nothing changes. Errors and events in the order of the list.
    pub fn configure(&self, now_ns: u64, specs: &[LeaseSpec]) -> (Vec<NatEvent>, Vec<LeaseError>) {
        let mut state = self.lock();
        state.rested(now_ns);
        let mut errors = state.refused(specs);
        if !errors.is_empty() {
            return (Vec::new(), errors);
        }
        for spec in specs {
            if let Some(lease) = state.renamed(spec, specs).and_then(|id| state.leases.get_mut(&id)) {
                lease.spec.name.clone_from(&spec.name);
            }
        }
        let mut events = Vec::new();
        let gone = state.leases.values().filter(|lease| lease.configured && !specs.contains(&lease.spec));
        let gone: Vec<LeaseId> = gone.map(|lease| lease.id).collect();
        events.extend(gone.into_iter().filter_map(|id| state.give_back(now_ns, id)));
        for spec in specs {
            if state.leases.values().any(|lease| lease.configured && lease.spec == *spec) {
                continue;
            }
            match state.take(spec.clone(), true, now_ns) {
                Ok((_, event)) => events.push(event),
                Err(error) => errors.push(error),
            }
        }
        self.publish(&state);
        (events, errors)
    }

    /// Lets blocks that rested long enough be used again. Cheap when there are none.
    pub fn tick(&self, now_ns: u64) {
        if now_ns >= self.next_rested_ns.load(Ordering::Relaxed) {
            let mut state = self.lock();
            state.rested(now_ns);
            self.publish(&state);
        }
    }

    pub(crate) fn snapshot(&self) -> arc_swap::Guard<Arc<Snapshot>> {
        self.snapshot.load()
    }

    /// Blocks for a client on one more core; the events say what is new.
    pub(crate) fn join(&self, now_ns: u64, wish: &AutomaticWish<'_>) -> Option<(Automatic, Vec<NatEvent>)> {
        let zone = wish.addresses.first().copied()?;
        let mut state = self.lock();
        if let Some(granted) = state.automatic.get_mut(&(wish.tenant, wish.client, zone))
            && wish.addresses.contains(&granted.blocks.0)
        {
            granted.cores += 1;
            let (address, blocks) = granted.blocks;
            return Some((Automatic { zone, address, blocks }, Vec::new()));
        }
        state.rested(now_ns);
        let (before, after) = wish.addresses.split_at(wish.start.min(wish.addresses.len()));
        let granted = after.iter().chain(before).find_map(|&address| {
            let free = wish.whole & !state.closed(address);
            pick(free, wish.count, wish.random).map(|blocks| (address, blocks))
        });
        let (address, blocks) = granted?;
        *state.closed.entry(address).or_default() |= blocks;
        let new = Granted { blocks: (address, blocks), cores: 1 };
        let kind = NatEventKind::BlockGranted;
        let mut events = events_of(now_ns, kind, (wish.tenant, wish.client), (address, blocks));
        if let Some(earlier) = state.automatic.insert((wish.tenant, wish.client, zone), new) {
            // Of an address that is no longer in the pool.
            state.rest(now_ns, earlier.blocks);
            let kind = NatEventKind::BlockReturned;
            events.extend(events_of(now_ns, kind, (wish.tenant, wish.client), earlier.blocks));
        }
        self.publish(&state);
        Some((Automatic { zone, address, blocks }, events))
    }

    /// The blocks that a client had before, on one more core; `None`: it has others by now, or somebody else has them.
    pub(crate) fn join_again(
        &self,
        now_ns: u64,
        wish: &AutomaticWish<'_>,
        (address, blocks): AddressBlocks,
    ) -> Option<(Automatic, Vec<NatEvent>)> {
        let zone = wish.addresses.first().copied()?;
        let mut state = self.lock();
        if let Some(granted) = state.automatic.get_mut(&(wish.tenant, wish.client, zone)) {
            if granted.blocks != (address, blocks) {
                return None;
            }
            granted.cores += 1;
            return Some((Automatic { zone, address, blocks }, Vec::new()));
        }
        state.rested(now_ns);
        let usable = wish.whole & !state.closed(address);
        if blocks == 0 || blocks & !usable != 0 || blocks.count_ones() > wish.count {
            return None;
        }
        *state.closed.entry(address).or_default() |= blocks;
        let new = Granted { blocks: (address, blocks), cores: 1 };
        state.automatic.insert((wish.tenant, wish.client, zone), new);
        let kind = NatEventKind::BlockGranted;
        let events = events_of(now_ns, kind, (wish.tenant, wish.client), (address, blocks));
        self.publish(&state);
        Some((Automatic { zone, address, blocks }, events))
    }

    /// A core has no flow of the client any more; after the last one the blocks rest.
    pub(crate) fn leave(
        &self,
        now_ns: u64,
        (tenant, client): (u16, IpAddr),
        held: &Automatic,
    ) -> Vec<NatEvent> {
        let mut state = self.lock();
        let key = (tenant, client, held.zone);
        let Some(granted) = state.automatic.get_mut(&key) else { return Vec::new() };
        if granted.blocks != (held.address, held.blocks) {
            return Vec::new();
        }
        granted.cores = granted.cores.saturating_sub(1);
        if granted.cores > 0 {
            return Vec::new();
        }
        state.automatic.remove(&key);
        state.rest(now_ns, (held.address, held.blocks));
        self.publish(&state);
        events_of(now_ns, NatEventKind::BlockReturned, (tenant, client), (held.address, held.blocks))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A core that panicked while it held the lock leaves whole steps behind.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, state: &State) {
        let snapshot = Snapshot { holders: Arc::clone(&state.holders), closed: state.closed.clone() };
        self.snapshot.store(Arc::new(snapshot));
        let next = state.resting.front().map_or(u64::MAX, |resting| resting.until_ns);
        self.next_rested_ns.store(next, Ordering::Relaxed);
    }
}

impl State {
    /// New leases of a list that cannot be taken, the blocks of those that end included: they rest.
    fn refused(&self, specs: &[LeaseSpec]) -> Vec<LeaseError> {
        let mut wanted: BTreeMap<IpAddr, Blocks> = BTreeMap::new();
        let mut errors = Vec::new();
        for spec in specs {
            let known = self.leases.values().any(|lease| lease.configured && lease.spec == *spec);
            if known || self.renamed(spec, specs).is_some() {
                continue;
            }
            let Some(blocks) = blocks_of(spec.first_port, spec.ports) else {
                errors.push(LeaseError::NotAligned(spec.first_port, spec.ports));
                continue;
            };
            let before = wanted.entry(spec.address).or_default();
            if spec.address.is_ipv4() != spec.from.addr().is_ipv4() {
                errors.push(LeaseError::MixedFamilies);
            } else if (self.closed(spec.address) | *before) & blocks != 0 {
                errors.push(LeaseError::Taken(spec.address, spec.first_port, spec.ports));
            } else {
                *before |= blocks;
            }
        }
        errors
    }

    /// A configured lease that is this one under a name which the new list has no more.
    fn renamed(&self, spec: &LeaseSpec, specs: &[LeaseSpec]) -> Option<LeaseId> {
        let same = |lease: &&Lease| {
            lease.configured && LeaseSpec { name: spec.name.clone(), ..lease.spec.clone() } == *spec
        };
        let lease = self.leases.values().find(same)?;
        (!specs.contains(&lease.spec)).then_some(lease.id)
    }

    fn closed(&self, address: IpAddr) -> Blocks {
        self.closed.get(&address).copied().unwrap_or(0)
    }

    fn take(
        &mut self,
        spec: LeaseSpec,
        configured: bool,
        now_ns: u64,
    ) -> Result<(LeaseId, NatEvent), LeaseError> {
        let blocks = blocks_of(spec.first_port, spec.ports)
            .ok_or(LeaseError::NotAligned(spec.first_port, spec.ports))?;
        if spec.address.is_ipv4() != spec.from.addr().is_ipv4() {
            return Err(LeaseError::MixedFamilies);
        }
        if self.closed(spec.address) & blocks != 0 {
            return Err(LeaseError::Taken(spec.address, spec.first_port, spec.ports));
        }
        if self.leases.len() >= LEASES_MAX {
            return Err(LeaseError::TooMany);
        }
        while self.leases.contains_key(&self.next_id) {
            self.next_id = self.next_id.wrapping_add(1);
        }
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        let event = event_of(now_ns, NatEventKind::BlockGranted, &spec);
        *self.closed.entry(spec.address).or_default() |= blocks;
        self.leases.insert(id, Lease { id, spec, configured });
        self.holders = Arc::new(Holders::new(self.leases.values()));
        Ok((id, event))
    }

    fn give_back(&mut self, now_ns: u64, id: LeaseId) -> Option<NatEvent> {
        let lease = self.leases.remove(&id)?;
        self.rest(now_ns, (lease.spec.address, lease.blocks()));
        self.holders = Arc::new(Holders::new(self.leases.values()));
        Some(event_of(now_ns, NatEventKind::BlockReturned, &lease.spec))
    }

    fn rest(&mut self, now_ns: u64, blocks: AddressBlocks) {
        let until_ns = now_ns.saturating_add(self.rest_ns);
        self.resting.push_back(Resting { until_ns, blocks });
    }

    /// Opens what rested long enough. In order of return: a changed time of rest counts for later returns.
    fn rested(&mut self, now_ns: u64) {
        while let Some(resting) = self.resting.front()
            && resting.until_ns <= now_ns
        {
            let (address, blocks) = resting.blocks;
            if let Some(closed) = self.closed.get_mut(&address) {
                *closed &= !blocks;
                if *closed == 0 {
                    self.closed.remove(&address);
                }
            }
            self.resting.pop_front();
        }
    }
}

/// The blocks of a range of ports; `None` unless it is whole blocks.
#[must_use]
pub fn blocks_of(first_port: u16, ports: u32) -> Option<Blocks> {
    let first = u32::from(first_port);
    if ports == 0 || !first.is_multiple_of(BLOCK_PORTS) || !ports.is_multiple_of(BLOCK_PORTS) {
        return None;
    }
    let (first, count) = (first / BLOCK_PORTS, ports / BLOCK_PORTS);
    if first + count > 64 {
        return None;
    }
    Some((u64::MAX >> (64 - count)) << first)
}

/// `count` of the free blocks, from a random one on; `None` if there are fewer.
fn pick(free: Blocks, count: u32, random: u64) -> Option<Blocks> {
    if count == 0 || free.count_ones() < count {
        return None;
    }
    let turn = (random & 63) as u32;
    let mut left = free.rotate_right(turn);
    let mut picked = 0;
    for _ in 0..count {
        picked |= left & left.wrapping_neg();
        left &= left.wrapping_sub(1);
    }
    Some(picked.rotate_left(turn))
}

fn event_of(now_ns: u64, kind: NatEventKind, spec: &LeaseSpec) -> NatEvent {
    let holder = (spec.tenant, spec.from.network());
    NatEvent::of_blocks(now_ns, kind, holder, (spec.address, spec.first_port), spec.ports / BLOCK_PORTS)
}

/// One event for each block.
fn events_of(now_ns: u64, kind: NatEventKind, holder: (u16, IpAddr), blocks: AddressBlocks) -> Vec<NatEvent> {
    let each = (0..64u16).filter(|block| blocks.1 >> block & 1 == 1);
    each.map(|block| NatEvent::of_blocks(now_ns, kind, holder, (blocks.0, block << 10), 1)).collect()
}

#[cfg(test)]
mod tests;
