//! Ways to give packets to cores, so that they can be compared (row C8).
//!
//! A [`Scheme`] names the core that *reads* a packet and begins with it. Who owns the packet's flow is the bucket
//! table's word under every scheme: where the reader is not the owner, the packet is handed over by ring. So
//! only [`Scheme::Flow`] is free of hand-offs; `anabranch bench distribution` counts the price of the others.
//!
//! | scheme | kind of parallelism | good for |
//! |---|---|---|
//! | `flow` | flows | the default: no hand-off, order kept, as even as the hash |
//! | `interface` | data | few interfaces of equal load |
//! | `service` | function | virtual servers that need a core of their own |
//! | `round-robin` | packets | comparison: perfectly even reading |
//! | `least-loaded` | packets | comparison: even although packets cost differently |
//! | `every-N-packets` | packets | as `least-loaded`, decided less often |
//! | `slice-N-us` | time | comparison: one core after the other |
//! | `transaction-N-us` | transactions | comparison: even, and in order within a question and its answer |
//! | `interface-flow-N` | hybrid | N groups of cores; an interface has a group, a flow a core of it |
//! | `service-flow-N` | hybrid | the same by virtual server |
//!
//! A *transaction* is a new connection, a query and its answer, or the next burst of a flow that was silent for N µs: it goes
//! to the least loaded core when it begins and stays there until it is silent again. That needs a memory of flows where
//! packets are distributed; here it is [`TRANSACTION_SLOTS`] places by hash, so that flows of one place go together and no
//! running one is ever split.

use std::fmt;
use std::str::FromStr;

use crate::table::BucketTable;

#[cfg(test)]
mod tests;

/// Service number of packets that are for no virtual server.
pub const NO_SERVICE: u16 = 0xffff;

/// Places of transactions that [`Scheme::Transaction`] tells apart.
pub const TRANSACTION_SLOTS: usize = 1 << 16;

/// Bytes that a packet costs in addition to its length, so that small ones weigh too.
const PACKET_COST: u64 = 256;

/// How packets are given to cores. In text as in the table at the top of the module.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Scheme {
    /// By the flow's hash: the owner reads.
    #[default]
    Flow,
    /// By the interface it came in.
    Interface,
    /// By the virtual server it is for; others by flow.
    Service,
    /// Each packet to the next core.
    RoundRobin,
    /// Each packet to the core with the least load.
    LeastLoaded,
    /// Each N packets (at least 1) to the core with the least load.
    EveryPackets(u32),
    /// All packets of a slice of so many µs (at least 1) to one core, the next slice's to the next.
    TimeSlice(u32),
    /// Flowlets: what begins after so many µs (at least 1) of silence in its flow goes to the core with the least load, and all of it
    /// stays there.
    Transaction(u32),
    /// The cores are in so many groups (at least 1). By interface to a group, by flow within it.
    InterfaceFlow(u8),
    /// The same by virtual server; packets for none by flow over all cores.
    ServiceFlow(u8),
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flow => f.write_str("flow"),
            Self::Interface => f.write_str("interface"),
            Self::Service => f.write_str("service"),
            Self::RoundRobin => f.write_str("round-robin"),
            Self::LeastLoaded => f.write_str("least-loaded"),
            Self::EveryPackets(packets) => write!(f, "every-{packets}-packets"),
            Self::TimeSlice(us) => write!(f, "slice-{us}-us"),
            Self::Transaction(us) => write!(f, "transaction-{us}-us"),
            Self::InterfaceFlow(groups) => write!(f, "interface-flow-{groups}"),
            Self::ServiceFlow(groups) => write!(f, "service-flow-{groups}"),
        }
    }
}

/// The text names no scheme.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "must be flow, interface, service, round-robin, least-loaded, every-N-packets, slice-N-us, transaction-N-us, \
     interface-flow-N or service-flow-N, with N from 1"
)]
pub struct UnknownScheme;

impl FromStr for Scheme {
    type Err = UnknownScheme;

    fn from_str(text: &str) -> Result<Self, UnknownScheme> {
        let number = |before: &str, after: &str| {
            let number = text.strip_prefix(before)?.strip_suffix(after)?;
            number.parse::<u32>().ok().filter(|&number| number > 0)
        };
        let groups = |before: &str| number(before, "").and_then(|groups| u8::try_from(groups).ok());
        let plain = [Self::Flow, Self::Interface, Self::Service, Self::RoundRobin, Self::LeastLoaded];
        let plain = plain.into_iter().find(|scheme| scheme.to_string() == text);
        plain
            .or_else(|| number("every-", "-packets").map(Self::EveryPackets))
            .or_else(|| number("slice-", "-us").map(Self::TimeSlice))
            .or_else(|| number("transaction-", "-us").map(Self::Transaction))
            .or_else(|| groups("interface-flow-").map(Self::InterfaceFlow))
            .or_else(|| groups("service-flow-").map(Self::ServiceFlow))
            .ok_or(UnknownScheme)
    }
}

/// Properties of a packet that a scheme may look at.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// The flow's hash ([`crate::symmetric::FlowHasher`]).
    pub hash: u32,
    /// The interface it came in.
    pub port: u16,
    /// Its virtual server, or [`NO_SERVICE`].
    pub service: u16,
    /// Its length.
    pub bytes: u32,
    /// Monotonic time.
    pub now_ns: u64,
}

/// Gives packets to cores by one scheme.
#[derive(Clone, Debug)]
pub struct Distributor {
    scheme: Scheme,
    cores: Vec<u8>,
    table: BucketTable,
    /// By place in `cores`: as told, 0–255.
    told: Vec<u8>,
    /// By place in `cores`: cost of what was given since the loads were told.
    given: Vec<u64>,
    given_total: u64,
    /// Place of the core in turn.
    turn: usize,
    /// Packets that still go to the core in turn.
    left: u32,
    /// When the slice of the core in turn ends.
    until_ns: Option<u64>,
    /// By hash: place of the transaction's core, and when its last packet came. Empty with every other scheme.
    transactions: Vec<Option<(usize, u64)>>,
}

impl Distributor {
    /// Gives to `cores` (at least one; none is the same as core 0 only). `table` names the owners; its cores
    /// need not be the same.
    #[must_use]
    pub fn new(scheme: Scheme, cores: &[u8], table: BucketTable) -> Self {
        let cores = if cores.is_empty() { vec![0] } else { cores.to_vec() };
        let slots = if matches!(scheme, Scheme::Transaction(_)) { TRANSACTION_SLOTS } else { 0 };
        Self {
            transactions: vec![None; slots],
            scheme,
            told: vec![0; cores.len()],
            given: vec![0; cores.len()],
            cores,
            table,
            given_total: 0,
            turn: 0,
            left: 0,
            until_ns: None,
        }
    }

    /// The scheme in force.
    #[must_use]
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// A new table is in force.
    pub fn set_table(&mut self, table: BucketTable) {
        self.table = table;
    }

    /// The loads, 0–255, in the order of the cores; missing ones count as 0. What was given before is in them.
    pub fn tell_loads(&mut self, loads: &[u8]) {
        for (place, told) in self.told.iter_mut().enumerate() {
            *told = loads.get(place).copied().unwrap_or(0);
        }
        self.given.fill(0);
        self.given_total = 0;
    }

    /// The owner of a packet's flow; cores beyond 255 do not exist.
    #[inline]
    #[must_use]
    pub fn owner(&self, hash: u32) -> u8 {
        self.table.owner_of_hash(hash) as u8
    }

    /// The core that reads a packet.
    #[inline]
    pub fn reader(&mut self, facts: &Facts) -> u8 {
        let place = match self.scheme {
            Scheme::Flow => return self.owner(facts.hash),
            Scheme::Service | Scheme::ServiceFlow(_) if facts.service == NO_SERVICE => {
                return self.owner(facts.hash);
            }
            Scheme::Interface => usize::from(facts.port) % self.cores.len(),
            Scheme::Service => usize::from(facts.service) % self.cores.len(),
            Scheme::RoundRobin => self.next(),
            Scheme::LeastLoaded => self.least_loaded(),
            Scheme::EveryPackets(packets) => self.every(packets),
            Scheme::TimeSlice(us) => self.slice(us, facts.now_ns),
            Scheme::Transaction(us) => self.transaction(us, facts),
            Scheme::InterfaceFlow(groups) => self.grouped(facts.port, groups, facts.hash),
            Scheme::ServiceFlow(groups) => self.grouped(facts.service, groups, facts.hash),
        };
        if let Some(given) = self.given.get_mut(place) {
            let cost = u64::from(facts.bytes) + PACKET_COST;
            *given += cost;
            self.given_total += cost;
        }
        self.cores.get(place).copied().unwrap_or(0)
    }

    fn next(&mut self) -> usize {
        let place = self.turn;
        self.turn = (place + 1) % self.cores.len();
        place
    }

    /// The told loads are of some time ago; what was given since weighs by its share, so that not all packets
    /// until the next report go to the core that was idle in the last one.
    fn least_loaded(&self) -> usize {
        let total = u128::from(self.given_total.max(1));
        let score = |place: usize| {
            let told = self.told.get(place).copied().unwrap_or(0);
            let given = self.given.get(place).copied().unwrap_or(0);
            u128::from(told) * total + u128::from(given) * 255
        };
        (0..self.cores.len()).min_by_key(|&place| (score(place), place)).unwrap_or(0)
    }

    fn every(&mut self, packets: u32) -> usize {
        if self.left == 0 {
            self.turn = self.least_loaded();
            self.left = packets.max(1);
        }
        self.left -= 1;
        self.turn
    }

    fn slice(&mut self, us: u32, now_ns: u64) -> usize {
        let until_ns = *self.until_ns.get_or_insert(now_ns + u64::from(us.max(1)) * 1_000);
        if now_ns >= until_ns {
            self.turn = (self.turn + 1) % self.cores.len();
            self.until_ns = Some(now_ns + u64::from(us.max(1)) * 1_000);
        }
        self.turn
    }

    fn transaction(&mut self, us: u32, facts: &Facts) -> usize {
        let slot = ((u64::from(facts.hash) * TRANSACTION_SLOTS as u64) >> 32) as usize;
        let pause_ns = u64::from(us.max(1)) * 1_000;
        let running = self.transactions.get(slot).copied().flatten();
        let place = match running {
            Some((place, seen_ns)) if facts.now_ns.saturating_sub(seen_ns) < pause_ns => place,
            _ => self.least_loaded(),
        };
        if let Some(transaction) = self.transactions.get_mut(slot) {
            *transaction = Some((place, facts.now_ns));
        }
        place
    }

    /// The place of a flow in the group of cores that `number` belongs to. Groups differ by at most one core.
    fn grouped(&self, number: u16, groups: u8, hash: u32) -> usize {
        let cores = self.cores.len();
        let groups = usize::from(groups).clamp(1, cores);
        let group = usize::from(number) % groups;
        let (first, end) = (group * cores / groups, (group + 1) * cores / groups);
        first + ((u64::from(hash) * (end - first) as u64) >> 32) as usize
    }
}
