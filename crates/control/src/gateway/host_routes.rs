//! Routes of the datapath: which of several ways to a prefix is the best, and the kernel's tables and rules as the datapath
//! follows them.
//!
//! Without rules of the operator's (`ip rule`) there is one table, in which the configuration's routes and the kernel's
//! main table stand together. With rules the configuration's routes are asked first, then the rules in their order, as
//! the kernel does for what it forwards. A packet has no firewall mark and no socket here: rules that want one do not match.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use linux::netlink::{Family, IpsecAction, IpsecPolicy, PolicyAction, PolicyRule, RouteKind, Tunnel};
use packet::attachment::{Egress, Ingress, InterfaceId};
use services::spec::{
    HostTunnel, InterfaceSpec, MAIN_TABLE, RouteAction, RouteRuleAction, RouteRuleSpec, RouteSpec, SealedSpec,
};

use crate::config::Config;
use crate::host_facts::{HostFacts, LOCAL_TABLE};

/// Routes that the datapath is given at most; beyond, the shortest prefixes are kept.
pub const ROUTES_MAX: usize = 2_000_000;
/// Rules that the datapath is given at most; the kernel tries them one after another, too.
pub(crate) const RULES_MAX: usize = 1_024;
/// The table that is asked before all rules: the kernel has none of this number.
const FIRST_TABLE: u32 = 0;
/// Number of the table by which everything is the kernel's to pass on; the kernel has none of this number but by the wish of somebody
/// who has four billion.
const IPSEC_TABLE: u32 = u32::MAX;
/// The kernel's table that it asks last.
const DEFAULT_TABLE: u32 = 253;

/// Who wins when a prefix has several routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Rank {
    /// The gateway's own addresses.
    Own,
    /// `[[route]]`.
    Configured,
    /// Networks of the interfaces.
    Connected,
    /// Peers' allowed-ips.
    Peer,
    /// The kernel's routes.
    Kernel,
}

/// One route to a prefix.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    pub rank: Rank,
    pub metric: u32,
    pub table: u32,
    pub action: RouteAction,
    pub egress: Egress,
    pub via: Option<IpAddr>,
    pub weight: u16,
    pub mtu: u16,
    pub from: Option<IpNet>,
    /// Further ways, with their weights.
    pub more: Vec<(Egress, Option<IpAddr>, u16)>,
}

impl Candidate {
    /// One way, in the main table.
    pub const fn new(rank: Rank, egress: Egress, via: Option<IpAddr>) -> Self {
        let action = RouteAction::Forward;
        let (metric, table, weight, mtu) = (0, MAIN_TABLE, 1, u16::MAX);
        Self { rank, metric, table, action, egress, via, weight, mtu, from: None, more: Vec::new() }
    }

    fn ways(&self) -> impl Iterator<Item = (Egress, Option<IpAddr>, u16)> + '_ {
        std::iter::once((self.egress, self.via, self.weight)).chain(self.more.iter().copied())
    }

    /// The route as the datapath is told it.
    fn specs(&self, tenant: u16, prefix: IpNet, table: u32) -> impl Iterator<Item = RouteSpec> + '_ {
        let action = self.action;
        self.ways().enumerate().map(move |(place, (egress, via, weight))| RouteSpec {
            table,
            action,
            weight,
            joins: place > 0,
            mtu: self.mtu,
            from: self.from,
            ..RouteSpec::new(tenant, prefix, egress, via)
        })
    }
}

/// The best route of each prefix, and what it hides.
#[derive(Default)]
pub(super) struct RouteTable {
    best: BTreeMap<(u32, u16, Option<IpNet>, IpNet), Candidate>,
    hidden: Vec<RouteSpec>,
}

impl RouteTable {
    /// Adds a route of a tenant's.
    pub fn add(&mut self, tenant: u16, prefix: IpNet, mut worse: Candidate) {
        let best = match self.best.entry((worse.table, tenant, worse.from, prefix)) {
            Entry::Vacant(place) => {
                place.insert(worse);
                return;
            }
            Entry::Occupied(place) => place.into_mut(),
        };
        if (worse.rank, worse.metric) < (best.rank, best.metric) {
            std::mem::swap(best, &mut worse);
        }
        if worse.action != RouteAction::Forward {
            return;
        }
        let leads =
            |way: &(Egress, _, _)| way.0 != best.egress && !matches!(way.0, Egress::Host | Egress::Kernel);
        for (egress, via, _) in worse.ways().filter(leads) {
            let (table, mtu, from) = (worse.table, worse.mtu, worse.from);
            self.hidden.push(RouteSpec { table, mtu, from, ..RouteSpec::new(tenant, prefix, egress, via) });
        }
    }

    /// All of them. `with_rules`: what the configuration says is in the first table, too.
    pub fn into_routes(mut self, with_rules: bool) -> Vec<RouteSpec> {
        if self.best.len() > ROUTES_MAX {
            let mut list: Vec<_> = self.best.into_iter().collect();
            list.sort_by_key(|((_, _, _, prefix), route)| (route.rank, prefix.prefix_len()));
            list.truncate(ROUTES_MAX);
            self.best = list.into_iter().collect();
        }
        // Of equal prefixes the last counts.
        let mut routes = self.hidden;
        routes.truncate(ROUTES_MAX - self.best.len());
        for ((table, tenant, _, prefix), route) in &self.best {
            routes.extend(route.specs(*tenant, *prefix, *table));
            let is_first = match route.rank {
                Rank::Own | Rank::Configured => true,
                Rank::Peer => prefix.prefix_len() > 0,
                Rank::Connected | Rank::Kernel => false,
            };
            if with_rules && is_first {
                routes.extend(route.specs(*tenant, *prefix, FIRST_TABLE));
            }
        }
        routes
    }
}

/// The routes of what is under IPsec.
pub(super) fn ipsec_routes(facts: &HostFacts) -> Vec<RouteSpec> {
    let any = |ipv4: bool| facts.ipsec.iter().any(|policy| policy.from.addr().is_ipv4() == ipv4);
    let all = [IpNet::from(Ipv4Net::default()), IpNet::from(Ipv6Net::default())];
    let route = |prefix| RouteSpec { table: IPSEC_TABLE, ..RouteSpec::new(0, prefix, Egress::Kernel, None) };
    all.into_iter().filter(|all| any(all.addr().is_ipv4())).map(route).collect()
}

/// Packets that leave which the kernel seals or drops, by its policies.
pub(super) fn sealed(facts: &HostFacts) -> Vec<SealedSpec> {
    let outward = facts.ipsec.iter().filter(|policy| policy.outward).take(2 * RULES_MAX);
    let spec = |policy: &IpsecPolicy| SealedSpec {
        from: policy.from,
        to: policy.to,
        protocol: policy.protocol,
        src_ports: policy.src_ports,
        dst_ports: policy.dst_ports,
        seals: policy.action != IpsecAction::Pass,
    };
    outward.map(spec).collect()
}

/// Tunnels of the host by protocols without ports.
pub(super) fn tunnels(facts: &HostFacts) -> Vec<HostTunnel> {
    let spec = |tunnel: &Tunnel| HostTunnel {
        protocol: tunnel.protocol,
        local: tunnel.local,
        remote: tunnel.remote,
    };
    facts.tunnels.iter().map(spec).collect()
}

/// Action of a route of this kind.
pub(super) const fn action(kind: RouteKind) -> RouteAction {
    match kind {
        RouteKind::Unicast | RouteKind::Local | RouteKind::Other => RouteAction::Forward,
        RouteKind::Unreachable => RouteAction::Unreachable,
        RouteKind::Blackhole => RouteAction::Blackhole,
        RouteKind::Prohibit => RouteAction::Prohibit,
        RouteKind::Throw => RouteAction::Throw,
    }
}

/// The kernel's rules for the datapath; none where they only name the main table.
pub(super) fn rules(config: &Config, facts: &HostFacts, interfaces: &[InterfaceSpec]) -> Vec<RouteRuleSpec> {
    let has_default = facts.routes.iter().any(|route| route.table == DEFAULT_TABLE);
    let usual = |rule: &PolicyRule| match rule.action {
        PolicyAction::Table(LOCAL_TABLE | MAIN_TABLE) => is_for_all(rule),
        PolicyAction::Table(DEFAULT_TABLE) => is_for_all(rule) && !has_default,
        _ => false,
    };
    if facts.ipsec.is_empty() && facts.rules.iter().all(usual) {
        return Vec::new();
    }
    let names = Names { config, facts, interfaces };
    let mut list = Vec::new();
    for family in [Family::V4, Family::V6] {
        names.add(family, &mut list);
    }
    list
}

/// Whether a rule is about every packet.
fn is_for_all(rule: &PolicyRule) -> bool {
    let spec = &rule.spec;
    let selects = spec.mark.is_some() || spec.oif.is_some() || spec.iif.is_some();
    let narrow = spec.from.is_some() || spec.to.is_some() || spec.suppress_prefix_length.is_some();
    let ports = rule.protocol.is_some() || rule.src_ports.is_some() || rule.dst_ports.is_some();
    !(selects || narrow || ports || rule.special || spec.invert)
}

/// Names of devices as numbers.
struct Names<'a> {
    config: &'a Config,
    facts: &'a HostFacts,
    interfaces: &'a [InterfaceSpec],
}

impl Names<'_> {
    /// Adds a family's rules.
    fn add(&self, family: Family, list: &mut Vec<RouteRuleSpec>) {
        let of_family = self.facts.rules.iter().filter(|rule| rule.spec.family == family);
        let mut rules: Vec<&PolicyRule> = of_family.take(RULES_MAX).collect();
        rules.sort_by_key(|rule| rule.spec.priority);
        let table = |table| RouteRuleAction::Table { table, longer_than: None };
        list.push(for_all(family, table(FIRST_TABLE)));
        for outward in [true, false] {
            self.add_ipsec(family, outward, list);
        }
        // Rules that name a priority, and where those of each priority begin.
        let (mut jumps, mut begins) = (Vec::new(), Vec::new());
        for rule in &rules {
            begins.push((rule.spec.priority, list.len()));
            if let PolicyAction::Goto(priority) = rule.action {
                jumps.push((list.len(), priority));
            }
            list.extend(self.specs(rule));
        }
        let end = list.len();
        for (place, priority) in jumps {
            let target = begins.iter().find(|(known, _)| *known >= priority).map_or(end, |(_, place)| *place);
            if let Some(RouteRuleSpec { action: RouteRuleAction::Goto(next), .. }) = list.get_mut(place) {
                *next = target;
            }
        }
        // Where a DHCP client keeps a link's default route in a table for the link's address alone, what is translated to
        // that address may take it when there is no other.
        for rule in rules {
            if let PolicyAction::Table(number) = rule.action
                && number != LOCAL_TABLE
                && rule.spec.from.is_some_and(|net| self.is_own(net))
                && !rule.spec.invert
            {
                list.push(for_all(family, table(number)));
            }
        }
    }

    /// Adds the kernel's policies of IPsec about what leaves, or about what has come in: what is to be under it is the kernel's to
    /// pass on, the more so what must not come in without it.
    fn add_ipsec(&self, family: Family, outward: bool, list: &mut Vec<RouteRuleSpec>) {
        let ipv4 = family == Family::V4;
        let of_kind =
            |policy: &&IpsecPolicy| policy.outward == outward && policy.from.addr().is_ipv4() == ipv4;
        let policies: Vec<&IpsecPolicy> = self.facts.ipsec.iter().filter(of_kind).take(RULES_MAX).collect();
        let end = list.len() + policies.len();
        list.extend(policies.into_iter().map(|policy| RouteRuleSpec {
            from: Some(policy.from),
            to: Some(policy.to),
            protocol: policy.protocol,
            src_ports: policy.src_ports,
            dst_ports: policy.dst_ports,
            ..for_all(
                family,
                match policy.action {
                    IpsecAction::Protect => RouteRuleAction::Table { table: IPSEC_TABLE, longer_than: None },
                    IpsecAction::Pass => RouteRuleAction::Goto(end),
                    IpsecAction::Block => RouteRuleAction::Refuse(RouteAction::Blackhole),
                },
            )
        }));
    }

    /// Whether a prefix is one address of the host's.
    fn is_own(&self, net: IpNet) -> bool {
        let own = || self.facts.devices.iter().flat_map(|device| &device.addresses);
        net.prefix_len() == net.max_prefix_len() && own().any(|own| own.addr() == net.addr())
    }

    /// A rule of the kernel's as the datapath has it: none where it cannot match.
    fn specs(&self, rule: &PolicyRule) -> Vec<RouteRuleSpec> {
        let spec = &rule.spec;
        let longer_than = spec.suppress_prefix_length.and_then(|most| u8::try_from(most).ok());
        // What is passed on has no mark and no socket.
        let marked = spec.mark.is_some_and(|(mark, mask)| mark & mask != 0);
        let never = rule.special || marked || spec.oif.is_some();
        if never && !spec.invert {
            return Vec::new();
        }
        let of_rule = |action, ingresses: Option<Vec<Ingress>>| {
            if never {
                return for_all(spec.family, action);
            }
            RouteRuleSpec {
                from: spec.from,
                to: spec.to,
                ingresses: ingresses.or_else(|| spec.iif.as_deref().map(|name| self.ingresses(name))),
                protocol: rule.protocol,
                src_ports: rule.src_ports,
                dst_ports: rule.dst_ports,
                invert: spec.invert,
                ..for_all(spec.family, action)
            }
        };
        match rule.action {
            PolicyAction::Table(LOCAL_TABLE) | PolicyAction::Nop => Vec::new(),
            PolicyAction::Table(table) => vec![of_rule(RouteRuleAction::Table { table, longer_than }, None)],
            PolicyAction::Goto(_) => vec![of_rule(RouteRuleAction::Goto(0), None)],
            PolicyAction::Refuse(kind) => vec![of_rule(RouteRuleAction::Refuse(action(kind)), None)],
            PolicyAction::Vrf => {
                let mut vrfs: Vec<&(String, u32)> =
                    self.facts.devices.iter().filter_map(|device| device.vrf.as_ref()).collect();
                vrfs.sort();
                vrfs.dedup();
                let of_vrf = |(name, table): &(String, u32)| {
                    let action = RouteRuleAction::Table { table: *table, longer_than };
                    of_rule(action, Some(self.ingresses(name)))
                };
                vrfs.into_iter().map(of_vrf).collect()
            }
        }
    }

    /// By what packets come in that the kernel knows by the name of this device, or of the VRF that it belongs to.
    fn ingresses(&self, name: &str) -> Vec<Ingress> {
        if name == "lo" {
            return vec![Ingress::Host];
        }
        if name == self.config.tun.name {
            return self.config.peers.iter().map(|peer| Ingress::Bond(peer.id)).collect();
        }
        let interfaces = (0..).map(InterfaceId).zip(self.interfaces);
        let in_vrf = |device: &str| {
            self.facts.device(device).and_then(|device| device.vrf.as_ref()).is_some_and(|vrf| vrf.0 == name)
        };
        let named = interfaces.filter(|(_, interface)| interface.device == name || in_vrf(&interface.device));
        named.map(|(id, _)| Ingress::Interface(id)).collect()
    }
}

/// A rule about every packet of a family.
const fn for_all(family: Family, action: RouteRuleAction) -> RouteRuleSpec {
    RouteRuleSpec {
        ipv4: matches!(family, Family::V4),
        from: None,
        to: None,
        ingresses: None,
        protocol: None,
        src_ports: None,
        dst_ports: None,
        invert: false,
        action,
    }
}

#[cfg(test)]
mod tests;
