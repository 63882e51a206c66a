//! Who has which address, as ARP and neighbor discovery told: questions about stations behind peers are answered here and
//! need not cross the bond.
//!
//! An answer must never be wrong. So only what the owner itself said lately is given; an address that two stations claim is
//! not answered for as long as a claim counts, and probes for duplicates, announcements and questions to one station always
//! pass on. One core has the table: all frames that resolve neighbors are given to one ([`EthernetFlow::SHARED`]).
//!
//! [`EthernetFlow::SHARED`]: packet::ethernet::EthernetFlow::SHARED

use std::net::IpAddr;

use packet::ethernet::{Mac, Vlan};
use services::hash::SecretState;

use super::SECOND_NS;
use super::aged::AgedTable;

/// A claim of the owner counts for so long.
const FRESH_NS: u64 = 60 * SECOND_NS;

/// Who said that it has an address.
#[derive(Clone, Copy, Debug)]
struct Claim {
    mac: Mac,
    said_ns: u64,
    /// Another station claimed it too, at that time.
    contested_ns: Option<u64>,
    /// Whether it is a router, once it said so.
    router: Option<bool>,
}

/// Claims of addresses.
#[derive(Debug)]
pub(super) struct Neighbors(AgedTable<(Vlan, IpAddr), Claim>);

impl Neighbors {
    pub fn new(max: usize, state: SecretState) -> Self {
        Self(AgedTable::new(max, state))
    }

    /// Another limit from now on.
    pub fn set_max(&mut self, max: usize) {
        self.0.set_max(max);
    }

    /// Addresses that are known.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// A station says that it has an address.
    pub fn tell(&mut self, now_ns: u64, vlan: Vlan, address: IpAddr, mac: Mac, router: Option<bool>) {
        let Some(claim) = self.0.get_mut(&(vlan, address)) else {
            self.0.insert((vlan, address), Claim { mac, said_ns: now_ns, contested_ns: None, router });
            return;
        };
        let other = claim.mac != mac;
        if other && is_fresh(now_ns, claim.said_ns) {
            claim.contested_ns = Some(now_ns);
        }
        let router = if other { router } else { router.or(claim.router) };
        *claim = Claim { mac, said_ns: now_ns, router, ..*claim };
    }

    /// The one station that has an address, and whether it is a router.
    pub fn owner(&self, now_ns: u64, vlan: Vlan, address: IpAddr) -> Option<(Mac, Option<bool>)> {
        let claim = self.0.get(&(vlan, address)).filter(|claim| is_fresh(now_ns, claim.said_ns))?;
        let contested = claim.contested_ns.is_some_and(|at| is_fresh(now_ns, at));
        (!contested).then_some((claim.mac, claim.router))
    }

    /// Looks at some entries, and forgets those that do not count any more.
    pub fn sweep(&mut self, now_ns: u64, count: usize) {
        self.0.sweep(count, |_, claim| is_fresh(now_ns, claim.said_ns));
    }
}

fn is_fresh(now_ns: u64, then_ns: u64) -> bool {
    now_ns.saturating_sub(then_ns) < FRESH_NS
}
