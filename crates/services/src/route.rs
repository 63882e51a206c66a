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
//! Policy routing (`ip rule`) stands above that: rules in order name tables, each of which is asked in this way, until one
//! answers. Without rules there is the main table only. A route may refuse, or have several ways: of these a flow takes
//! one by the hash of its addresses and ports, so that its packets stay together (RFC 2992).
//!
//! Asked once for each new flow.

use std::collections::BTreeMap;
use std::hash::BuildHasher as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::hash::ConfigState;
use ipnet::IpNet;
use packet::DropReason;
use packet::attachment::{Egress, Ingress};
use packet::flow::FlowKey;
use prefix_trie::joint::JointPrefixMap;

use crate::spec::{MAIN_TABLE, RouteAction, RouteRuleAction, RouteRuleSpec, RouteSpec};

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
    /// Largest packet that it takes, bytes; [`u16::MAX`]: that of the interface.
    pub mtu: u16,
}

impl Route {
    const fn of(spec: &RouteSpec) -> Self {
        Self { egress: spec.egress, via: spec.via, mtu: spec.mtu }
    }
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

/// Question where a packet leaves.
#[derive(Clone, Copy, Debug)]
pub struct RouteQuery {
    /// Whose packet it is.
    pub tenant: u16,
    /// By what it came in; `None`: nobody's packet in particular.
    pub ingress: Option<Ingress>,
    /// Its source as it came in, its destination as it leaves.
    pub key: FlowKey,
    /// The way that is taken if it is one of several: its flow took it before.
    pub before: Option<Egress>,
}

impl RouteQuery {
    /// For a packet of nobody in particular.
    #[must_use]
    pub const fn to(tenant: u16, dst: IpAddr) -> Self {
        let src = match dst {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        let key = FlowKey { src, dst, src_port: 0, dst_port: 0, protocol: 0 };
        Self { tenant, ingress: None, key, before: None }
    }
}

/// Routes of one prefix, in the order of [`RouteSpec`]s.
#[derive(Clone, Debug)]
enum Entry {
    Way(Route),
    /// Several, each with the sum of the weights up to it.
    Ways(Vec<(Route, u32)>),
    Refuse(DropReason),
    Throw,
}

impl Entry {
    fn of(spec: &RouteSpec) -> Self {
        match spec.action {
            RouteAction::Forward => Self::Way(Route::of(spec)),
            RouteAction::Throw => Self::Throw,
            action => Self::Refuse(refusal(action)),
        }
    }

    /// Adds one more way.
    fn join(&mut self, spec: &RouteSpec, weight_before: u16) {
        let mut ways = match std::mem::replace(self, Self::Throw) {
            Self::Way(route) => vec![(route, u32::from(weight_before.max(1)))],
            Self::Ways(ways) => ways,
            Self::Refuse(_) | Self::Throw => Vec::new(),
        };
        let sum = ways.last().map_or(0, |(_, sum)| *sum);
        let route = Route::of(spec);
        ways.push((route, sum.saturating_add(u32::from(spec.weight.max(1)))));
        *self = Self::Ways(ways);
    }

    fn ways(&self) -> impl Iterator<Item = Route> + '_ {
        let (one, several) = match self {
            Self::Way(route) => (Some(*route), None),
            Self::Ways(ways) => (None, Some(ways)),
            Self::Refuse(_) | Self::Throw => (None, None),
        };
        one.into_iter().chain(several.into_iter().flatten().map(|(route, _)| *route))
    }

    /// The way of a packet.
    fn choose(&self, query: &RouteQuery) -> Result<Route, DropReason> {
        match self {
            Self::Way(route) => Ok(*route),
            Self::Ways(ways) => {
                let before = query.before.and_then(|egress| self.ways().find(|route| route.egress == egress));
                let sum = ways.last().map_or(0, |(_, sum)| *sum);
                let hash = ConfigState::with_seed(0).hash_one(query.key);
                let at = (u64::from(sum) * (hash >> 32)) >> 32;
                let by_hash = || ways.iter().find(|(_, sum)| u64::from(*sum) > at).map(|(route, _)| *route);
                before.or_else(by_hash).ok_or(DropReason::NoRoute)
            }
            Self::Refuse(reason) => Err(*reason),
            Self::Throw => Err(DropReason::NoRoute),
        }
    }
}

/// Why a route or rule that refuses drops a packet.
const fn refusal(action: RouteAction) -> DropReason {
    match action {
        RouteAction::Blackhole => DropReason::RouteBlackhole,
        RouteAction::Unreachable => DropReason::RouteUnreachable,
        RouteAction::Prohibit => DropReason::RouteProhibited,
        RouteAction::Forward | RouteAction::Throw => DropReason::NoRoute,
    }
}

type Table = JointPrefixMap<IpNet, Entry>;

/// An entry that matches, in whose table, and its prefix.
type Found<'a> = (u16, IpNet, &'a Entry);

/// All tenants' routes.
#[derive(Clone, Debug, Default)]
pub struct Fib {
    /// By number and tenant.
    tables: BTreeMap<(u32, u16), Table>,
    /// Routes of some sources only, by number, tenant and network of the sources.
    of_sources: BTreeMap<(u32, u16), BTreeMap<IpNet, Table>>,
    /// Routes that a better one of their prefix hides, by tenant and way.
    hidden: BTreeMap<(u16, Egress), JointPrefixMap<IpNet, Route>>,
    /// Rules of policy routing; none: the main table.
    rules: Vec<RouteRuleSpec>,
}

impl Fib {
    /// Makes the tables. Host bits of a prefix do not count.
    #[must_use]
    pub fn compile(routes: &[RouteSpec], rules: &[RouteRuleSpec]) -> Self {
        let mut fib = Self { rules: rules.to_vec(), ..Self::default() };
        let mut last: Option<&RouteSpec> = None;
        for spec in routes {
            let prefix = spec.prefix.trunc();
            let table = match spec.from {
                Some(from) => {
                    let of_sources = fib.of_sources.entry((spec.table, spec.tenant)).or_default();
                    of_sources.entry(from.trunc()).or_default()
                }
                None => fib.tables.entry((spec.table, spec.tenant)).or_default(),
            };
            let of_last = last.filter(|last| {
                spec.joins
                    && (last.table, last.tenant, last.from) == (spec.table, spec.tenant, spec.from)
                    && last.prefix.trunc() == prefix
            });
            last = Some(spec);
            if let Some(before) = of_last
                && let Some(entry) = table.get_mut(&prefix)
            {
                entry.join(spec, before.weight);
                continue;
            }
            let before = table.insert(prefix, Entry::of(spec));
            for route in before.iter().flat_map(Entry::ways).filter(|route| route.egress != spec.egress) {
                fib.hidden.entry((spec.tenant, route.egress)).or_default().insert(prefix, route);
            }
        }
        fib
    }

    /// The route of a tenant's packet to `dst`, by the order at the top of the module.
    #[must_use]
    pub fn lookup(&self, tenant: u16, dst: IpAddr) -> Option<Route> {
        self.find(&RouteQuery::to(tenant, dst)).ok().map(|found| found.route)
    }

    /// The route of a packet, with the prefix and the table it was found in.
    ///
    /// # Errors
    /// As what the packet is to be dropped.
    pub fn find(&self, query: &RouteQuery) -> Result<Match, DropReason> {
        let (tenant, prefix, entry) = self.decide(query)?;
        entry.choose(query).map(|route| Match { tenant, prefix, route })
    }

    /// The entry that the rules lead to.
    fn decide(&self, query: &RouteQuery) -> Result<Found<'_>, DropReason> {
        if self.rules.is_empty() {
            return self.in_table(MAIN_TABLE, query.tenant, &query.key).ok_or(DropReason::NoRoute);
        }
        let mut place = 0;
        while let Some(rule) = self.rules.get(place) {
            place += 1;
            if !is_for(rule, query) {
                continue;
            }
            match rule.action {
                RouteRuleAction::Table { table, longer_than } => {
                    let found = self.in_table(table, query.tenant, &query.key);
                    let long = |found: &Found<'_>| longer_than.is_none_or(|most| found.1.prefix_len() > most);
                    if let Some(found) = found.filter(long) {
                        return Ok(found);
                    }
                }
                RouteRuleAction::Goto(next) => place = place.max(next),
                RouteRuleAction::Refuse(action) => return Err(refusal(action)),
            }
        }
        Err(DropReason::NoRoute)
    }

    /// The entry of a table, by the order at the top of the module.
    fn in_table(&self, table: u32, tenant: u16, key: &FlowKey) -> Option<Found<'_>> {
        let not_default = |found: &Found<'_>| found.1.prefix_len() > 0;
        let own = self.longest(table, tenant, key);
        let found = if tenant == SHARED_TENANT || own.as_ref().is_some_and(not_default) {
            own
        } else {
            let shared = self.longest(table, SHARED_TENANT, key);
            shared.filter(not_default).or(own).or(shared)
        };
        found.filter(|(_, _, entry)| !matches!(entry, Entry::Throw))
    }

    /// The route to `dst` that leads by `egress`, though another one may be better: the longest prefix of any table, an own
    /// one before a shared one.
    #[must_use]
    pub fn lookup_by(&self, tenant: u16, dst: IpAddr, egress: Egress) -> Option<Route> {
        self.longest_by(tenant, dst, egress).map(|(_, route)| route)
    }

    /// Whether `egress` is one of the ways to an address, used or not: a route leads there that is as near as the one of the
    /// main table (RFC 3704 §2.3, "feasible path"). A default route is none to what has a route of its own.
    #[must_use]
    pub fn leads_by(&self, tenant: u16, dst: IpAddr, egress: Egress) -> bool {
        let best = self
            .in_table(MAIN_TABLE, tenant, &RouteQuery::to(tenant, dst).key)
            .map_or(0, |(_, prefix, _)| prefix.prefix_len());
        self.longest_by(tenant, dst, egress).is_some_and(|(prefix, _)| prefix.prefix_len() >= best)
    }

    fn longest_by(&self, tenant: u16, dst: IpAddr, egress: Egress) -> Option<(IpNet, Route)> {
        let net = IpNet::from(dst);
        let longest = |tenant: u16| {
            let hidden = self.hidden.get(&(tenant, egress)).and_then(|table| table.get_lpm(&net));
            let tables = self.tables.iter().filter(|((_, of), _)| *of == tenant).map(|(_, table)| table);
            let of_sources = self.of_sources.iter().filter(|((_, of), _)| *of == tenant);
            let tables = tables.chain(of_sources.flat_map(|(_, tables)| tables.values()));
            let used = tables.flat_map(|table| table.cover(&net)).flat_map(|(prefix, entry)| {
                entry.ways().filter(|route| route.egress == egress).map(move |route| (prefix, route))
            });
            let used = used.chain(hidden.map(|(prefix, route)| (prefix, *route)));
            used.max_by_key(|(prefix, _)| prefix.prefix_len())
        };
        longest(tenant).or_else(|| longest(SHARED_TENANT))
    }

    /// Number of routes of all tenants.
    #[must_use]
    pub fn len(&self) -> usize {
        let of_sources = self.of_sources.values().flat_map(BTreeMap::values);
        self.tables.values().chain(of_sources).map(JointPrefixMap::len).sum()
    }

    /// Whether there is no route.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tenants that have a main table, in order.
    pub fn tenants(&self) -> impl Iterator<Item = u16> + '_ {
        self.tables.keys().filter(|(table, _)| *table == MAIN_TABLE).map(|(_, tenant)| *tenant)
    }

    /// Whether a tenant's own table has the destination, other than by its default route.
    #[must_use]
    pub fn has_own(&self, tenant: u16, dst: IpAddr) -> bool {
        self.longest(MAIN_TABLE, tenant, &RouteQuery::to(tenant, dst).key)
            .is_some_and(|(_, prefix, _)| prefix.prefix_len() > 0)
    }

    fn longest(&self, table: u32, tenant: u16, key: &FlowKey) -> Option<Found<'_>> {
        let net = IpNet::from(key.dst);
        let of_all = self.tables.get(&(table, tenant)).and_then(|table| table.get_lpm(&net));
        // Mostly there is none.
        let of_sources = self.of_sources.get(&(table, tenant)).into_iter().flatten();
        let of_sources = of_sources
            .filter(|(from, _)| from.contains(&key.src))
            .filter_map(|(from, table)| table.get_lpm(&net).map(|found| (found, from.prefix_len())));
        let best = of_sources.max_by_key(|((prefix, _), from)| (prefix.prefix_len(), *from));
        let (prefix, entry) = match (of_all, best) {
            (Some(of_all), Some((found, _))) if of_all.0.prefix_len() > found.0.prefix_len() => of_all,
            (_, Some((found, _))) => found,
            (of_all, None) => of_all?,
        };
        Some((tenant, prefix, entry))
    }
}

/// Whether a rule is about a packet.
fn is_for(rule: &RouteRuleSpec, query: &RouteQuery) -> bool {
    let key = &query.key;
    let within = |ports: Option<(u16, u16)>, port: u16| {
        ports.is_none_or(|(first, last)| first <= port && port <= last)
    };
    let came = rule.ingresses.as_ref();
    let fits = rule.from.is_none_or(|net| net.contains(&key.src))
        && rule.to.is_none_or(|net| net.contains(&key.dst))
        && came.is_none_or(|list| query.ingress.is_some_and(|ingress| list.contains(&ingress)))
        && rule.protocol.is_none_or(|protocol| protocol == key.protocol)
        && within(rule.src_ports, key.src_port)
        && within(rule.dst_ports, key.dst_port);
    rule.ipv4 == key.dst.is_ipv4() && fits != rule.invert
}
