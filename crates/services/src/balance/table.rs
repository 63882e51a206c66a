//! A server's choice, compiled for the present health and weights, and how it is used.

use std::cmp::Ordering;
use std::net::IpAddr;
use std::sync::atomic::Ordering::Relaxed;

use super::compile::{Server, ServerBackend};
use super::{Pick, REHASHES_MAX, TURNS_MAX, maglev, turns};
use crate::spec::{BalanceMethod, DeliveryMode, NatMode, TCP};
use packet::drop_reason::DropReason;

/// Up to so many backends are all compared by least connections; of more, [`SAMPLES`] random ones.
const SCANNED_MAX: usize = 64;

/// Backends that are compared when there are many. Two give nearly all that a full comparison does (Mitzenmacher, "The
/// power of two choices"); four make up for those that are full.
const SAMPLES: u32 = 4;

/// Tables of up to so many places are built as soon as health or weights change (about a millisecond), larger ones
/// with the next tick. Until then [`Server::takes`] keeps connections from backends that are down.
const AT_ONCE_PLACES_MAX: usize = 16_381;

/// Tables that are built off the packet path. Numbers of backends are places in [`Server::backends`].
#[derive(Debug, Default)]
pub struct Table {
    /// The weights it was built from, in tenths, of all backends.
    pub tenths: Vec<u32>,
    /// Backends that take new connections.
    members: Vec<u16>,
    /// Backends by hash, for the hashing methods.
    hashed: Vec<u16>,
    /// Backends in turn, for round robin.
    turns: Vec<u16>,
}

impl Table {
    /// Builds it for these weights.
    pub fn build(method: BalanceMethod, backends: &[ServerBackend], tenths: Vec<u32>) -> Self {
        let members =
            tenths.iter().zip(0u16..).filter(|(tenths, _)| **tenths > 0).map(|(_, id)| id).collect();
        let mut table = Self { tenths, members, ..Self::default() };
        match method {
            BalanceMethod::Maglev | BalanceMethod::SourceAddress => {
                table.hashed = hashed(backends, &table.tenths);
            }
            BalanceMethod::RoundRobin => table.turns = turns::turns(&table.tenths),
            BalanceMethod::LeastConnections => {}
        }
        table
    }

    fn at_hash(&self, hash: u64) -> Option<u16> {
        // Multiplication instead of division: the hash's high half, scaled to the size.
        let place = ((hash >> 32) * self.hashed.len() as u64) >> 32;
        self.hashed.get(place as usize).copied()
    }
}

fn hashed(backends: &[ServerBackend], tenths: &[u32]) -> Vec<u16> {
    let weights: Vec<u32> = backends.iter().map(ServerBackend::configured_tenths).collect();
    let places = maglev::places_for(&weights);
    let shares: Vec<maglev::Share> = backends
        .iter()
        .zip(weights)
        .zip(tenths)
        .map(|((backend, configured), &effective)| maglev::Share {
            permutation: maglev::Permutation::of(backend.state.address, places),
            configured,
            effective,
        })
        .collect();
    maglev::build(places, &shares)
}

impl Server {
    /// Whether the server has as many connections as it may have.
    pub fn is_full(&self) -> bool {
        self.state.count.is_full(self.connections_max)
    }

    /// By hash; when that backend takes no more, by further hashes of the same client.
    pub fn by_hash(&self, table: &Table, hash: u64) -> Option<u16> {
        let mut hash = hash;
        for _ in 0..=REHASHES_MAX {
            let place = table.at_hash(hash)?;
            if self.takes(place) {
                return Some(place);
            }
            hash = maglev::mix(hash.wrapping_add(0x9e37_79b9_7f4a_7c15));
        }
        None
    }

    /// Whoever is next.
    pub fn in_turn(&self, table: &Table) -> Option<u16> {
        for _ in 0..=TURNS_MAX {
            let turn = self.state.turn.fetch_add(1, Relaxed) as usize;
            let place = *table.turns.get(turn % table.turns.len().max(1))?;
            if self.takes(place) {
                return Some(place);
            }
        }
        None
    }

    /// The backend with the fewest live connections relative to its weight at `now_ns`.
    pub fn least(&self, table: &Table, now_ns: u64, random: u32) -> Option<u16> {
        let members = &table.members;
        let count = members.len();
        let draw = |number: u32| maglev::mix(u64::from(random) << 32 | u64::from(number));
        let mut best: Option<(Load, u16)> = None;
        let mut equals = 1;
        let mut consider = |place: u16| {
            let Some(load) = self.load(place, now_ns) else { return };
            let order = best.as_ref().map_or(Ordering::Less, |(least, _)| load.order(least));
            equals = match order {
                Ordering::Less => 1,
                Ordering::Equal => equals + 1,
                Ordering::Greater => equals,
            };
            // The n-th of equals takes over with a chance of 1 in n: each has the same chance in the end.
            if order == Ordering::Less
                || (order == Ordering::Equal && draw(u32::from(place)).is_multiple_of(equals))
            {
                best = Some((load, place));
            }
        };
        if count <= SCANNED_MAX {
            members.iter().copied().for_each(consider);
        } else {
            for sample in 0..SAMPLES {
                let place = ((draw(sample) >> 32) * count as u64) >> 32;
                if let Some(&place) = members.get(place as usize) {
                    consider(place);
                }
            }
        }
        best.map(|(_, place)| place)
    }

    /// The load of a backend that takes connections.
    fn load(&self, place: u16, now_ns: u64) -> Option<Load> {
        let backend = self.backends.get(usize::from(place)).filter(|_| self.takes(place))?;
        let tenths = backend.state.tenths(backend.weight, self.slow_start_s, now_ns);
        (tenths > 0).then(|| Load { live: backend.state.count.live(), tenths })
    }

    /// Any backend that takes connections, searched from a random one on.
    pub fn any(&self, table: &Table, random: u32) -> Option<u16> {
        let start = ((u64::from(random) * table.members.len() as u64) >> 32) as usize;
        let (before, after) = table.members.split_at_checked(start)?;
        after.iter().chain(before).copied().find(|&place| self.takes(place))
    }

    /// Why nobody takes the connection.
    pub fn refusal(&self, table: &Table) -> DropReason {
        let available =
            |&place: &u16| self.backends.get(usize::from(place)).is_some_and(|it| it.is_available());
        if table.members.iter().any(available) { DropReason::ServerFull } else { DropReason::NoBackend }
    }

    /// Decision for a flow to this backend.
    pub fn pick_at(&self, place: u16) -> Option<Pick> {
        let backend = self.backends.get(usize::from(place))?;
        let through = self.delivery == DeliveryMode::Nat;
        Some(Pick {
            backend: backend.state.id,
            address: backend.state.address,
            delivery: self.delivery,
            source: if through { self.source } else { NatMode::None },
            proxy_protocol: self.proxy_protocol && through && self.protocol == TCP,
        })
    }

    /// Builds the table anew if the weights are not those it was built from.
    pub fn refresh(&self, now_ns: u64) {
        // Two builders at once could publish the older one last. Nobody panics while holding it.
        let _one = self.building.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let tenths = self.tenths(now_ns);
        if self.table.load().tenths != tenths {
            self.table.store(Table::build(self.method, &self.backends, tenths).into());
        }
    }

    /// Health or weights changed: builds the table anew unless that takes long and can wait for the next tick. A
    /// thousand backends that go down together must not mean a thousand large tables.
    pub fn refresh_if_cheap(&self, now_ns: u64) {
        let table = self.table.load();
        if table.hashed.len() <= AT_ONCE_PLACES_MAX || table.members.is_empty() {
            self.refresh(now_ns);
        }
    }

    /// Present weights of all backends, in tenths.
    pub fn tenths(&self, now_ns: u64) -> Vec<u32> {
        let tenths = |it: &ServerBackend| it.state.tenths(it.weight, self.slow_start_s, now_ns);
        self.backends.iter().map(tenths).collect()
    }

    /// Begins slow starts that waited for the time, ends complete ones.
    pub fn start_waiting(&self, now_ns: u64) {
        for backend in &self.backends {
            backend.state.start_waiting(self.slow_start_s, now_ns);
        }
    }

    /// Notes which backends drain; whether the connections of one have had their time now.
    pub fn follow_drains(&self, now_ns: u64) -> bool {
        let follow = |it: &ServerBackend| it.state.follow_drain(it.weight, it.drain_s, now_ns);
        self.backends.iter().map(follow).fold(false, |any, over| any | over)
    }

    /// The place of a backend that takes connections, by its id.
    pub fn place_of(&self, id: u16) -> Option<u16> {
        let place = self.backends.iter().position(|backend| backend.state.id == id)?;
        u16::try_from(place).ok().filter(|place| self.takes(*place))
    }

    /// The table may be a moment older than the health: both are asked.
    fn takes(&self, place: u16) -> bool {
        self.backends
            .get(usize::from(place))
            .is_some_and(|it| it.is_available() && !it.state.count.is_full(it.connections_max))
    }
}

/// Live connections relative to a weight.
struct Load {
    live: u32,
    tenths: u32,
}

impl Load {
    /// Counts the connection that is being placed, so that of idle backends the heaviest comes first.
    fn order(&self, other: &Load) -> Ordering {
        let mine = (u64::from(self.live) + 1) * u64::from(other.tenths);
        let others = (u64::from(other.live) + 1) * u64::from(self.tenths);
        mine.cmp(&others)
    }
}

/// The hash of a client; `port` 0 when only its address counts.
pub fn hash_client(key: u64, address: IpAddr, port: u16) -> u64 {
    maglev::hash_endpoint(key ^ CLIENT_KEY, address, port)
}

const CLIENT_KEY: u64 = 0x636c_6965_6e74_0003;
