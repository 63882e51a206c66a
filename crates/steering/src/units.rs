//! Units of a cluster: which machine a packet goes to, and what a machine does with a packet of a flow that it does not
//! have (rows D4, D5).
//!
//! Two keys: the *cluster's* key chooses the unit, over 65,536 buckets; it is the manager's and no tunnel peer gets it. The
//! node's own key ([`crate::ownership`]) chooses the core inside the unit. Ports belong to a unit by *lease*, so that
//! answers to a translated source come to the unit that has the flow whatever its bucket is ([`Leases`]).
//!
//! A unit holds the tables of one or two eras ([`Eras`]). Whoever dispatches uses the table in force
//! ([`Units::in_force`]); a packet names its era by its parity. A core that has once seen the newer era, by the
//! manager's word or on a packet, never again begins a flow by the older table ([`EraSeen`]): so a flow whose packets
//! come by both tables is begun once. A packet that was under way along the chain of the older table starts anew by the newer.
//! All of it is pure; `crates/cluster/tests/model_packets.rs` tries every order of events.

use std::net::IpAddr;

use packet::attachment::UnitVisit;
use packet::flow::FlowKey;
use packet::icmp::is_icmp;

use crate::era::Eras;
use crate::owner_chain::{Arrival, Decision, Digest, Sighting, TTL_START, decide};
use crate::symmetric::{FlowHasher, node_bucket};
use crate::table::BucketTable;

#[cfg(test)]
mod tests;

/// Ports of a lease's block; blocks are aligned.
pub const LEASE_PORTS: u16 = 1_024;

/// Blocks of one address.
const BLOCKS: usize = (1 << 16) / LEASE_PORTS as usize;

/// No unit has the block.
const NOBODY: u16 = u16::MAX;

/// Node ids are below this (12 bits in the encapsulation and in the tunnel's receiver index); larger numbers are nobody's.
pub const NODES_MAX: u16 = 4_096;

/// One block of ports of an address, and the unit that translates sources to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Lease {
    /// The outside address.
    pub address: IpAddr,
    /// The block: ports `block × 1,024` to `block × 1,024 + 1,023`; 0 to 63.
    pub block: u8,
    /// The unit.
    pub node: u16,
}

/// Leases of all outside addresses: (address, port) → unit in O(log addresses).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leases {
    /// By address.
    addresses: Vec<(IpAddr, [u16; BLOCKS])>,
}

impl Leases {
    /// The table of `leases`. A block that is leased twice belongs to the last.
    #[must_use]
    pub fn new(leases: &[Lease]) -> Self {
        let mut table = Self::default();
        for lease in leases {
            let place = match table.place(lease.address) {
                Ok(place) => place,
                Err(place) => {
                    table.addresses.insert(place, (lease.address, [NOBODY; BLOCKS]));
                    place
                }
            };
            let blocks = table.addresses.get_mut(place).map(|(_, blocks)| blocks);
            if let Some(node) = blocks.and_then(|blocks| blocks.get_mut(usize::from(lease.block))) {
                *node = lease.node;
            }
        }
        table
    }

    /// The unit that has a port.
    #[inline]
    #[must_use]
    pub fn unit(&self, address: IpAddr, port: u16) -> Option<u16> {
        let (_, blocks) = self.addresses.get(self.place(address).ok()?)?;
        blocks.get(usize::from(port / LEASE_PORTS)).copied().filter(|node| *node != NOBODY)
    }

    /// All leases, by address and block.
    pub fn iter(&self) -> impl Iterator<Item = Lease> + '_ {
        self.addresses.iter().flat_map(|(address, blocks)| {
            let leased = blocks.iter().zip(0u8..).filter(|(node, _)| **node != NOBODY);
            leased.map(|(node, block)| Lease { address: *address, block, node: *node })
        })
    }

    /// Blocks of one unit at one address, ascending.
    pub fn blocks_of(&self, node: u16, address: IpAddr) -> impl Iterator<Item = u8> + '_ {
        self.iter()
            .filter(move |lease| lease.node == node && lease.address == address)
            .map(|lease| lease.block)
    }

    fn place(&self, address: IpAddr) -> Result<usize, usize> {
        self.addresses.binary_search_by(|(known, _)| known.cmp(&address))
    }
}

/// Newest era that one core of a unit has seen in force.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct EraSeen(Option<u32>);

/// Target of a packet from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The unit.
    pub unit: u16,
    /// The way, as it is told.
    pub visit: UnitVisit,
}

/// Answer of a unit for a packet of a flow that it does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// No unit has the flow: this one begins it, if policy lets it.
    Begin,
    /// Another unit is asked.
    Send(Target),
    /// It was sent on too often.
    TooOften,
    /// Its table is not held here yet, and this unit may not begin its flow before.
    EraUnknown,
}

/// The units of a cluster as one of them knows them: a snapshot, shared by its cores.
#[derive(Clone)]
pub struct Units {
    /// This unit's node id.
    pub node: u16,
    /// The hash under the cluster's key.
    pub hasher: FlowHasher,
    /// The tables held.
    pub eras: Eras,
    /// Era by which packets from outside are dispatched now: one of [`Units::eras`].
    pub in_force: u32,
    /// Who translates to which ports.
    pub leases: Leases,
}

impl Units {
    /// The bucket of a flow: the same for both directions, and whatever the tenant.
    #[inline]
    #[must_use]
    pub fn bucket(&self, key: &FlowKey) -> usize {
        node_bucket(self.hasher.hash(key, 0), self.eras.newest().buckets())
    }

    /// The unit of a packet from outside, by lease or by bucket. `dispatcher`: who asks.
    #[inline]
    #[must_use]
    pub fn dispatch(&self, key: &FlowKey) -> Target {
        let table = self.table_in_force();
        let leased = self.lease_holder(key);
        let unit = leased.unwrap_or_else(|| table.owner(self.bucket(key)));
        let odd_era = table.era() & 1 == 1;
        let visit = UnitVisit { arrival: Arrival::Outside, ttl: TTL_START, odd_era, dispatcher: self.node };
        Target { unit, visit }
    }

    /// The unit that has the port that a packet is addressed to; an ICMP query's identifier counts as one.
    #[inline]
    #[must_use]
    pub fn lease_holder(&self, key: &FlowKey) -> Option<u16> {
        let port = if is_icmp(key.protocol) { key.sender_port() } else { key.dst_port };
        self.leases.unit(key.dst, port)
    }

    /// The table by which packets from outside are dispatched now.
    #[must_use]
    pub fn table_in_force(&self) -> &BucketTable {
        self.eras.of_parity(self.in_force & 1 == 1).unwrap_or_else(|| self.eras.newest())
    }

    /// Decides about a packet of a flow that this unit does not have. `seen`: of the core that asks. A packet to a port that
    /// this unit has by lease is nobody else's.
    #[must_use]
    pub fn ask(&self, key: &FlowKey, visit: &UnitVisit, digest: Digest, seen: &mut EraSeen) -> Answer {
        if let Some(unit) = self.lease_holder(key) {
            let Some(ttl) = visit.ttl.checked_sub(1) else { return Answer::TooOften };
            let visit = UnitVisit { arrival: Arrival::Outside, ttl, ..*visit };
            return if unit == self.node { Answer::Begin } else { Answer::Send(Target { unit, visit }) };
        }
        let named = self.eras.of_parity(visit.odd_era);
        let table = seen.table(self, named);
        // Who was asked by another era's table says nothing about this one's chain: the unit that is the owner by that table
        // may not have been asked, and may still begin the flow. The packet starts anew.
        let same_era = named.is_some_and(|named| named.era() == table.era());
        let sighting = Sighting {
            bucket: self.bucket(key),
            arrival: if same_era { visit.arrival } else { Arrival::Outside },
            has_flow: false,
            digest,
            ttl: visit.ttl,
        };
        match decide(self.node, table, &sighting) {
            Decision::Keep | Decision::Begin if named.is_none() => Answer::EraUnknown,
            Decision::Keep | Decision::Begin => Answer::Begin,
            Decision::Send { to, arrival, ttl } => {
                let odd_era = table.era() & 1 == 1;
                Answer::Send(Target { unit: to, visit: UnitVisit { arrival, ttl, odd_era, ..*visit } })
            }
            Decision::Drop => Answer::TooOften,
        }
    }
}

impl EraSeen {
    /// Notes what is in force.
    pub fn note(&mut self, units: &Units) {
        let newest = units.eras.newest().era();
        if units.in_force == newest || self.0.is_none() {
            self.0 = Some(units.in_force);
        }
    }

    /// Notes what is in force; the table to decide by: `named` by the packet, unless a newer one was seen.
    fn table<'a>(&mut self, units: &'a Units, named: Option<&'a BucketTable>) -> &'a BucketTable {
        let newest = units.eras.newest();
        let is_newest = |era: u32| era == newest.era();
        if is_newest(units.in_force) || named.is_some_and(|table| is_newest(table.era())) {
            self.0 = Some(newest.era());
        }
        let past = self.0.is_some_and(is_newest);
        if past { newest } else { named.unwrap_or_else(|| units.table_in_force()) }
    }
}

impl std::fmt::Debug for Units {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { node, eras, in_force, leases, hasher: _ } = self;
        f.debug_struct("Units")
            .field("node", node)
            .field("newest", &eras.newest().era())
            .field("in_force", in_force)
            .field("leases", &leases.iter().count())
            .finish_non_exhaustive()
    }
}
