//! Clients: live flows of each, its outside address, its blocks. Bounded.

use std::collections::VecDeque;
use std::net::IpAddr;

use crate::hash::SecretState;
use hashbrown::HashMap;

use super::port_set::{Blocks, block_of};

/// Most clients that one core remembers.
pub const CLIENTS_MAX: usize = 1 << 20;

/// How long a client without flows is remembered (its address and blocks stay its own), ns.
pub const CLIENT_IDLE_NS: u64 = 60_000_000_000;

/// Idle clients looked at in one step.
const STEP_MAX: usize = 8;

/// An inside address of a tenant.
pub(crate) type ClientKey = (u16, IpAddr);

/// Blocks granted to a client automatically.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Automatic {
    /// Which pool they are from: the first address of the rule and family.
    pub(crate) zone: IpAddr,
    /// The outside address.
    pub(crate) address: IpAddr,
    /// Its blocks.
    pub(crate) blocks: Blocks,
}

/// Client: what is remembered of it.
#[derive(Debug, Default)]
pub(crate) struct Client {
    /// Live flows on this core that it began.
    pub(crate) flows: u32,
    /// Live flows on this core that others began, from outside to its mappings.
    pub(crate) joined: u32,
    /// The outside addresses that it uses, newest first: one for each of two ways out.
    pub(crate) paired: [Option<IpAddr>; 2],
    /// Its blocks.
    pub(crate) automatic: Vec<Automatic>,
    /// Stands in the queue of idle clients.
    queued: bool,
    idle_since_ns: u64,
}

impl Client {
    /// Whether an outside port is of its blocks.
    pub(crate) fn holds(&self, address: IpAddr, port: u16) -> bool {
        self.automatic.iter().any(|held| held.address == address && held.blocks >> block_of(port) & 1 == 1)
    }

    /// Whether it has no flow.
    const fn is_idle(&self) -> bool {
        self.flows == 0 && self.joined == 0
    }

    /// Remembers the address that it uses.
    fn pair(&mut self, address: IpAddr) {
        let [newest, _] = self.paired;
        if !self.paired.contains(&Some(address)) {
            self.paired = [Some(address), newest];
        }
    }
}

/// The clients of one core.
#[derive(Debug)]
pub(crate) struct Clients {
    known: HashMap<ClientKey, Client, SecretState>,
    /// When each became idle; oldest first.
    idle: VecDeque<(u64, ClientKey)>,
    max: usize,
}

impl Clients {
    pub(crate) fn new(hash: SecretState, max: usize) -> Self {
        Self { known: HashMap::with_hasher(hash), idle: VecDeque::new(), max }
    }

    pub(crate) fn len(&self) -> usize {
        self.known.len()
    }

    /// A client that is remembered.
    pub(crate) fn known(&self, key: &ClientKey) -> Option<&Client> {
        self.known.get(key)
    }

    /// The same, to change.
    pub(crate) fn find(&mut self, key: &ClientKey) -> Option<&mut Client> {
        self.known.get_mut(key)
    }

    /// The client, new if need be; `None` when there is no room. A new one is idle until [`Clients::opened`].
    pub(crate) fn enter(&mut self, now_ns: u64, key: ClientKey) -> Option<&mut Client> {
        let room = self.known.len() < self.max;
        match self.known.entry(key) {
            hashbrown::hash_map::Entry::Occupied(entry) => Some(entry.into_mut()),
            hashbrown::hash_map::Entry::Vacant(entry) if room => {
                self.idle.push_back((now_ns, key));
                Some(entry.insert(Client { queued: true, idle_since_ns: now_ns, ..Client::default() }))
            }
            hashbrown::hash_map::Entry::Vacant(_) => None,
        }
    }

    /// A flow more, perhaps with an address of the pool.
    pub(crate) fn opened(&mut self, key: &ClientKey, paired: Option<IpAddr>) {
        if let Some(client) = self.known.get_mut(key) {
            client.flows += 1;
            if let Some(address) = paired {
                client.pair(address);
            }
        }
    }

    /// A flow less.
    pub(crate) fn closed(&mut self, now_ns: u64, key: &ClientKey) -> Option<&Client> {
        self.ended(now_ns, key, |client| client.flows = client.flows.saturating_sub(1))
    }

    /// A flow from outside more.
    pub(crate) fn joined(&mut self, key: &ClientKey) {
        if let Some(client) = self.known.get_mut(key) {
            client.joined += 1;
        }
    }

    /// A flow from outside less.
    pub(crate) fn left(&mut self, now_ns: u64, key: &ClientKey) {
        self.ended(now_ns, key, |client| client.joined = client.joined.saturating_sub(1));
    }

    fn ended(&mut self, now_ns: u64, key: &ClientKey, end: impl FnOnce(&mut Client)) -> Option<&Client> {
        let client = self.known.get_mut(key)?;
        end(client);
        if client.is_idle() {
            client.idle_since_ns = now_ns;
            if !client.queued {
                client.queued = true;
                self.idle.push_back((now_ns, *key));
            }
        }
        Some(client)
    }

    /// Forgets some of the clients that were idle long enough, and hands out what they had.
    pub(crate) fn expire(&mut self, now_ns: u64, mut gone: impl FnMut(ClientKey, Client)) {
        for _ in 0..STEP_MAX {
            let Some(&(since_ns, key)) = self.idle.front() else { return };
            if now_ns.saturating_sub(since_ns) < CLIENT_IDLE_NS {
                return;
            }
            self.idle.pop_front();
            let Some(client) = self.known.get_mut(&key) else { continue };
            client.queued = false;
            if !client.is_idle() {
                continue;
            }
            if now_ns.saturating_sub(client.idle_since_ns) < CLIENT_IDLE_NS {
                // It had flows in between.
                client.queued = true;
                self.idle.push_back((client.idle_since_ns, key));
                continue;
            }
            if let Some(client) = self.known.remove(&key) {
                gone(key, client);
            }
        }
    }
}

/// Live flows that one core lets a client have when all `cores` together should allow `max`: its even share and four
/// standard deviations, because flows are spread by hash. So no core needs to ask the others; a client gets `max`
/// with near certainty, and never more than `cores` times what this returns. 0 = no limit.
#[must_use]
pub fn share_of_core(max: u32, cores: u8) -> u32 {
    if max == 0 {
        return u32::MAX;
    }
    if cores <= 1 {
        return max;
    }
    let share = max.div_ceil(u32::from(cores));
    share.saturating_add(4 * share.isqrt().max(1)).min(max)
}

/// Live flows that one core lets strangers have to a client's mappings: half as many as the client may have itself, and none of
/// those. Anybody can begin such flows, from as many addresses as there are.
#[must_use]
pub fn share_of_strangers(max: u32, cores: u8) -> u32 {
    share_of_core(max, cores).div_ceil(2)
}

#[cfg(test)]
mod tests;
