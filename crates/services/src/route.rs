//! Where a packet leaves: longest prefix match by tenant (rows R4, R11).
//!
//! Every tenant has a table of its own; tenant 0's table is shared by all. The answer for a tenant is:
//!
//! 1. its own longest match, unless that is a default route (`/0`);
//! 2. else tenant 0's longest match, unless that is a default route;
//! 3. else its own default route;
//! 4. else tenant 0's default route.
//!
//! So a tenant's addresses may overlap with anybody's, and "everything else over there" of a tenant does not
//! cut it off from shared networks, which are more specific. A prefix that is listed twice for a tenant has the
//! route that was listed last: the operator's own routes come after learned ones.
//!
//! Asked once for each new flow.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use packet::attachment::Egress;
use prefix_trie::joint::JointPrefixMap;

use crate::spec::RouteSpec;

#[cfg(test)]
mod tests;

/// The tenant whose routes everybody may use.
pub const SHARED_TENANT: u16 = 0;

/// Where a packet leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// An interface, a bond or the host.
    pub egress: Egress,
    /// Next router; `None`: the destination itself is the neighbour.
    pub via: Option<IpAddr>,
}

/// A route and why it was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Match {
    /// In whose table it was found.
    pub tenant: u16,
    /// The prefix that matched.
    pub prefix: IpNet,
    /// The route.
    pub route: Route,
}

type Table = JointPrefixMap<IpNet, Route>;

/// All tenants' routes.
#[derive(Clone, Debug, Default)]
pub struct Fib {
    tables: BTreeMap<u16, Table>,
    /// Routes that a better one of their prefix hides, by tenant and way.
    hidden: BTreeMap<(u16, Egress), Table>,
}

impl Fib {
    /// Makes the tables. Host bits of a prefix do not count.
    #[must_use]
    pub fn compile(routes: &[RouteSpec]) -> Self {
        let mut fib = Self::default();
        for spec in routes {
            let (prefix, route) = (spec.prefix.trunc(), Route { egress: spec.egress, via: spec.via });
            let before = fib.tables.entry(spec.tenant).or_default().insert(prefix, route);
            if let Some(before) = before.filter(|before| before.egress != route.egress) {
                fib.hidden.entry((spec.tenant, before.egress)).or_default().insert(prefix, before);
            }
        }
        fib
    }

    /// The route of a tenant's packet to `dst`, by the order at the top of the module.
    #[must_use]
    pub fn lookup(&self, tenant: u16, dst: IpAddr) -> Option<Route> {
        self.find(tenant, dst).map(|found| found.route)
    }

    /// As [`Self::lookup`], with the prefix and the table it was found in.
    #[must_use]
    pub fn find(&self, tenant: u16, dst: IpAddr) -> Option<Match> {
        let own = self.longest(tenant, dst);
        if tenant == SHARED_TENANT || own.is_some_and(|found| found.prefix.prefix_len() > 0) {
            return own;
        }
        let shared = self.longest(SHARED_TENANT, dst);
        shared.filter(|found| found.prefix.prefix_len() > 0).or(own).or(shared)
    }

    /// The route to `dst` that leads by `egress`, though another one may be better: the longest prefix, an own one before a
    /// shared one.
    #[must_use]
    pub fn lookup_by(&self, tenant: u16, dst: IpAddr, egress: Egress) -> Option<Route> {
        let net = IpNet::from(dst);
        let longest = |tenant: u16| {
            let hidden = self.hidden.get(&(tenant, egress)).and_then(|table| table.get_lpm(&net));
            let used = self.tables.get(&tenant).into_iter().flat_map(|table| table.cover(&net));
            let used = used.filter(|(_, route)| route.egress == egress).chain(hidden);
            used.max_by_key(|(prefix, _)| prefix.prefix_len()).map(|(_, route)| *route)
        };
        longest(tenant).or_else(|| longest(SHARED_TENANT))
    }

    /// Number of routes of all tenants.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tables.values().map(JointPrefixMap::len).sum()
    }

    /// Whether there is no route.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tenants that have a table, in order.
    pub fn tenants(&self) -> impl Iterator<Item = u16> + '_ {
        self.tables.keys().copied()
    }

    /// Whether a tenant's own table has the destination, other than by its default route.
    #[must_use]
    pub fn has_own(&self, tenant: u16, dst: IpAddr) -> bool {
        self.longest(tenant, dst).is_some_and(|found| found.prefix.prefix_len() > 0)
    }

    fn longest(&self, tenant: u16, dst: IpAddr) -> Option<Match> {
        let (prefix, &route) = self.tables.get(&tenant)?.get_lpm(&IpNet::from(dst))?;
        Some(Match { tenant, prefix, route })
    }
}
