//! Who has which address, as ARP and neighbor discovery told: questions about stations behind peers are answered here and
//! need not cross the bond.
//!
//! An answer must never be wrong. So only what the owner itself said lately is given; an address that two stations claim is
//! not answered for as long as a claim counts, and probes for duplicates, announcements and questions to one station always
//! pass on. Each side has a share of the table, so that one that makes up addresses takes nobody else's place.
//!
//! One core has the table: all frames that resolve neighbors are given to one ([`EthernetFlow::SHARED`]).
//!
//! [`EthernetFlow::SHARED`]: packet::ethernet::EthernetFlow::SHARED

use std::collections::BTreeMap;
use std::net::IpAddr;

use packet::ethernet::{Mac, Vlan};
use services::hash::SecretState;

use super::aged::AgedTable;
use super::stations::{StationLimits, leave};
use super::{Port, SECOND_NS};

/// A claim of the owner counts for so long.
const FRESH_NS: u64 = 60 * SECOND_NS;

/// Addresses that a side may claim for each station that it may have: in IPv6 one has several.
const ADDRESSES_PER_STATION: usize = 4;

/// Who said that it has an address.
#[derive(Clone, Copy, Debug)]
struct Claim {
    mac: Mac,
    port: Port,
    said_ns: u64,
    /// Another station claimed it too, at that time.
    contested_ns: Option<u64>,
    /// Whether it is a router, once it said so.
    router: Option<bool>,
}

/// Claims of addresses.
#[derive(Debug)]
pub(super) struct Neighbors {
    claims: AgedTable<(Vlan, IpAddr), Claim>,
    by_port: BTreeMap<Port, usize>,
    limits: StationLimits,
}

impl Neighbors {
    pub fn new(limits: StationLimits, state: SecretState) -> Self {
        Self { claims: AgedTable::new(limits.max, state), by_port: BTreeMap::new(), limits }
    }

    /// Other limits from now on.
    pub fn set_limits(&mut self, limits: StationLimits) {
        self.limits = limits;
        self.claims.set_max(limits.max);
    }

    /// Addresses that are known.
    pub fn len(&self) -> usize {
        self.claims.len()
    }

    /// A station of this side says that it has an address.
    pub fn tell(
        &mut self,
        now_ns: u64,
        (vlan, address): (Vlan, IpAddr),
        (port, mac): (Port, Mac),
        router: Option<bool>,
    ) {
        let room = (self.limits.room_of(port) * ADDRESSES_PER_STATION).min(self.limits.max / 2);
        let has_room = self.by_port.get(&port).copied().unwrap_or(0) < room;
        let Some(claim) = self.claims.get_mut(&(vlan, address)) else {
            let claim = Claim { mac, port, said_ns: now_ns, contested_ns: None, router };
            if has_room && self.claims.insert((vlan, address), claim) {
                *self.by_port.entry(port).or_default() += 1;
            }
            return;
        };
        let other = claim.mac != mac;
        if other && is_fresh(now_ns, claim.said_ns) {
            claim.contested_ns = Some(now_ns);
        }
        if claim.port != port {
            if !has_room {
                return;
            }
            leave(&mut self.by_port, claim.port);
            *self.by_port.entry(port).or_default() += 1;
        }
        let router = if other { router } else { router.or(claim.router) };
        *claim = Claim { mac, port, said_ns: now_ns, router, ..*claim };
    }

    /// The one station that has an address, and whether it is a router.
    pub fn owner(&self, now_ns: u64, vlan: Vlan, address: IpAddr) -> Option<(Mac, Option<bool>)> {
        let claim = self.claims.get(&(vlan, address)).filter(|claim| is_fresh(now_ns, claim.said_ns))?;
        let contested = claim.contested_ns.is_some_and(|at| is_fresh(now_ns, at));
        (!contested).then_some((claim.mac, claim.router))
    }

    /// Looks at some entries, and forgets those that do not count any more.
    pub fn sweep(&mut self, now_ns: u64, count: usize) {
        let Self { claims, by_port, .. } = self;
        claims.sweep(count, |_, claim| {
            let stays = is_fresh(now_ns, claim.said_ns);
            if !stays {
                leave(by_port, claim.port);
            }
            stays
        });
    }

    /// Whether the counts of the sides are right, and none has more than its share.
    #[cfg(test)]
    pub fn is_sound(&self) -> bool {
        let mut counted = BTreeMap::new();
        self.claims.iter().for_each(|(_, claim)| *counted.entry(claim.port).or_default() += 1);
        counted == self.by_port && self.claims.len() <= self.limits.max
    }
}

fn is_fresh(now_ns: u64, then_ns: u64) -> bool {
    now_ns.saturating_sub(then_ns) < FRESH_NS
}
