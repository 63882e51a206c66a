//! Which routes and rules the host should have: a pure function of configuration and host state.
//!
//! * **Allowed-ips** go to the tunnel as with WireGuard's tools. A default route gets a table of its own and two
//!   rules: `main` is asked first, but its default routes are ignored; then everything without our firewall
//!   mark is looked up in the tunnel's table. The tunnel's own datagrams carry the mark, so they
//!   never enter the tunnel.
//! * **Every WAN** has a table with the routes that the main table has over this interface, so that two WANs
//!   with the same subnet and gateway do not mix. Sockets bound to the interface (`oif`) use it, and
//!   datagrams that answer from one of its addresses (`from`).
//!
//! [`HostPlan::difference`] compares with what the kernel has. Everything of an instance is recognised by the
//! routing protocol number, its block of rule priorities and its tables ([`Numbers`]), so that
//! a later start finds what a killed one left behind.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use linux::netlink::{Family, MAIN_TABLE, Route, RouteKind, RouteSpec, RuleSpec};

use crate::config::{self, Config, Routes};
use crate::gateway::inner;
use crate::host_facts::HostView;
use crate::wans::LiveWan;

/// Routes that are copied from the main table for one WAN at most.
const ROUTES_PER_WAN_MAX: usize = 256;

/// The numbers of one instance: derived from the name of its TUN interface, so that two instances differ and a
/// restart finds the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numbers {
    slot: u32,
}

/// Rules per instance in front of the main table.
const PRIORITIES: u32 = 6;
const PRIORITY_FIRST: u32 = 4096;
/// The rule behind the kernel's own tables, main (32766) and default (32767), has a priority from here on.
const PRIORITY_BEHIND: u32 = 32_768;
const SLOTS: u32 = 4096;
const TABLE_FIRST: u32 = 0x00a7_0000 << 8;

/// Purpose of a rule, in the order rules are tried.
#[derive(Clone, Copy)]
enum Place {
    /// Sockets bound to a WAN.
    BoundToWan = 0,
    /// The tunnel's datagrams that answer from a WAN's address.
    MarkedFromWan = 1,
    /// Others that answer from a WAN's address, to a near destination.
    FromWanNear = 2,
    /// Others that answer from a WAN's address.
    FromWan = 3,
    /// Destinations nearby do not enter the tunnel.
    Near = 4,
    /// The rest does.
    Tunnel = 5,
    /// Answers from a WAN's address where the main table has no route.
    Behind,
}

impl Numbers {
    /// Of the instance with this TUN interface. Names that differ in their final number only never collide.
    #[must_use]
    pub fn of(tun_name: &str) -> Self {
        let stem = tun_name.trim_end_matches(|c: char| c.is_ascii_digit());
        let number: u32 = tun_name[stem.len()..].parse().unwrap_or(0);
        let hash = stem
            .bytes()
            .fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
        Self { slot: hash.wrapping_add(number) % SLOTS }
    }

    /// Firewall mark of the tunnel's own datagrams.
    #[must_use]
    pub fn mark(self) -> u32 {
        self.tunnel_table()
    }

    /// Table with the tunnel's default routes.
    #[must_use]
    pub fn tunnel_table(self) -> u32 {
        TABLE_FIRST | (self.slot << 8)
    }

    /// Table of a WAN; ids are 1–64.
    #[must_use]
    pub fn wan_table(self, wan: u16) -> u32 {
        self.tunnel_table() | u32::from(wan & 0xff)
    }

    fn priority(self, place: Place) -> u32 {
        match place {
            Place::Behind => PRIORITY_BEHIND + self.slot,
            _ => PRIORITY_FIRST + self.slot * PRIORITIES + place as u32,
        }
    }

    fn owns_table(self, table: u32) -> bool {
        table & !0xff == self.tunnel_table()
    }

    fn owns_priority(self, priority: u32) -> bool {
        let first = PRIORITY_FIRST + self.slot * PRIORITIES;
        (first..first + PRIORITIES).contains(&priority) || priority == self.priority(Place::Behind)
    }
}

/// Routes and rules, as wanted or as found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostPlan {
    /// Routes.
    pub routes: Vec<RouteSpec>,
    /// Rules.
    pub rules: Vec<RuleSpec>,
}

/// RouteChanges that lead to a plan; removals come first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteChanges {
    /// To be removed.
    pub remove: HostPlan,
    /// To be added.
    pub add: HostPlan,
}

/// RouteInputs of a plan.
#[derive(Clone, Copy)]
pub struct RouteInputs<'a> {
    /// Numbers of this instance.
    pub numbers: Numbers,
    /// Configuration.
    pub config: &'a Config,
    /// The host.
    pub view: &'a HostView,
    /// WANs as they are.
    pub wans: &'a [LiveWan],
    /// Index of the TUN interface.
    pub tun_index: u32,
    /// Hosts that must be reached outside the tunnel although a default route leads into it: name servers,
    /// as long as a peer's name waits for them.
    pub outside: &'a [IpAddr],
}

impl HostPlan {
    /// Plan for a configuration on this host.
    #[must_use]
    pub fn new(inputs: &RouteInputs<'_>) -> Self {
        let mut plan = Self::default();
        for live in inputs.wans {
            plan.add_wan(inputs, live);
        }
        plan.add_allowed_ips(inputs);
        // Where the kernel leads what its other devices send to services.
        plan.routes.extend(inner::addresses(&inputs.config.services).map(|address| RouteSpec {
            interface: Some(inputs.tun_index),
            ..RouteSpec::new(IpNet::from(address))
        }));
        plan
    }

    /// Entries of an instance that are there, from dumps of the kernel.
    #[must_use]
    pub fn found(numbers: Numbers, tun_index: Option<u32>, routes: &[Route], rules: &[RuleSpec]) -> Self {
        let ours = |route: &&Route| {
            let of_tun = tun_index.is_some() && route.spec.interface == tun_index;
            route.is_ours() && (numbers.owns_table(route.spec.table) || of_tun)
        };
        Self {
            routes: routes.iter().filter(ours).map(|route| route.spec.clone()).collect(),
            rules: rules
                .iter()
                .filter(|rule| rule.is_ours() && numbers.owns_priority(rule.priority))
                .cloned()
                .collect(),
        }
    }

    /// RouteChanges that make `self` of `found`.
    #[must_use]
    pub fn difference(&self, found: &Self) -> RouteChanges {
        let without = |list: &Self, other: &Self| Self {
            routes: list
                .routes
                .iter()
                .filter(|a| !other.routes.iter().any(|b| same(a, b)))
                .cloned()
                .collect(),
            rules: list.rules.iter().filter(|rule| !other.rules.contains(rule)).cloned().collect(),
        };
        RouteChanges { remove: without(found, self), add: without(self, found) }
    }

    fn add_wan(&mut self, inputs: &RouteInputs<'_>, live: &LiveWan) {
        let (Some(index), Some(section)) = (live.index, live.section) else { return };
        let Some(section) = inputs.config.wans.get(section) else { return };
        let table = inputs.numbers.wan_table(live.wan.id);
        let mut routes = wan_routes(inputs.view, section, live, index, table);
        if routes.len() > ROUTES_PER_WAN_MAX {
            // The shortest prefixes carry the most; a WAN with a full Internet table needs nothing else.
            routes.sort_by_key(|route| route.dst.prefix_len());
            routes.truncate(ROUTES_PER_WAN_MAX);
        }
        self.routes.extend(routes);
        for family in [Family::V4, Family::V6] {
            if uses(section.family, family) {
                let mut rule = rule(inputs.numbers, Place::BoundToWan, family, table);
                rule.oif = Some(live.wan.interface.clone());
                self.rules.push(rule);
            }
        }
        for address in &live.wan.addresses {
            self.add_from_rules(inputs, *address, table);
        }
    }

    fn add_from_rules(&mut self, inputs: &RouteInputs<'_>, address: IpAddr, table: u32) {
        let family = family_of(address);
        let from = |place, table| RuleSpec {
            from: Some(IpNet::from(address)),
            ..rule(inputs.numbers, place, family, table)
        };
        let mut marked = from(Place::MarkedFromWan, table);
        marked.mark = Some((inputs.numbers.mark(), u32::MAX));
        self.rules.push(marked);
        // Who connected to this host's WAN address gets its answer over that WAN, not through the tunnel.
        if default_families(inputs.config).contains(&family) {
            let mut near = from(Place::FromWanNear, MAIN_TABLE);
            near.suppress_prefix_length = Some(0);
            self.rules.push(near);
            self.rules.push(from(Place::FromWan, table));
        } else {
            // The reverse-path filter asks without the mark. Without a default route it would let nothing in, even where it is loose.
            self.rules.push(from(Place::Behind, table));
        }
    }

    fn add_allowed_ips(&mut self, inputs: &RouteInputs<'_>) {
        let RouteInputs { config, numbers, .. } = inputs;
        let (auto, table) = match config.tun.routes {
            Routes::Off => return,
            Routes::Table(table) => (false, table),
            Routes::Auto => (true, MAIN_TABLE),
        };
        // Peers of several tenants may have the same prefix: the host has one route to all of them.
        let mut seen = BTreeSet::new();
        for net in config.host_prefixes().filter(|net| seen.insert(**net)) {
            let own_table = auto && net.prefix_len() == 0;
            // The kernel makes this route itself when the interface gets its address.
            if !own_table && table == MAIN_TABLE && config.tun.addresses.iter().any(|own| own.trunc() == *net)
            {
                continue;
            }
            self.routes.push(RouteSpec {
                interface: Some(inputs.tun_index),
                table: if own_table { numbers.tunnel_table() } else { table },
                ..RouteSpec::new(*net)
            });
        }
        for family in default_families(config) {
            self.add_default_rules(inputs, family);
        }
    }

    fn add_default_rules(&mut self, inputs: &RouteInputs<'_>, family: Family) {
        let table = inputs.numbers.tunnel_table();
        for host in inputs.outside.iter().filter(|host| family_of(**host) == family) {
            self.routes.push(RouteSpec {
                table,
                kind: RouteKind::Throw,
                ..RouteSpec::new(IpNet::from(*host))
            });
        }
        let mut near = rule(inputs.numbers, Place::Near, family, MAIN_TABLE);
        near.suppress_prefix_length = Some(0);
        let mut tunnel = rule(inputs.numbers, Place::Tunnel, family, table);
        tunnel.mark = Some((inputs.numbers.mark(), u32::MAX));
        tunnel.invert = true;
        self.rules.extend([near, tunnel]);
    }
}

/// Routes of a WAN's own table: the main table's over its interface, and its default route.
fn wan_routes(
    view: &HostView,
    section: &config::Wan,
    live: &LiveWan,
    index: u32,
    table: u32,
) -> Vec<RouteSpec> {
    let configured = |net: &IpNet| {
        net.prefix_len() == 0 && section.gateways.iter().any(|g| g.is_ipv4() == net.addr().is_ipv4())
    };
    let mut candidates: Vec<&RouteSpec> = view
        .routes
        .iter()
        .map(|route| &route.spec)
        .filter(|spec| spec.interface == Some(index) && !configured(&spec.dst))
        .filter(|spec| uses(section.family, family_of(spec.dst.addr())))
        .collect();
    candidates.sort_by_key(|spec| spec.metric);
    let mut routes: Vec<RouteSpec> = Vec::new();
    for spec in candidates {
        if !routes.iter().any(|other| other.dst == spec.dst) {
            let onlink = spec.onlink || spec.gateway.is_some_and(needs_onlink);
            routes.push(RouteSpec { table, metric: 0, onlink, ..spec.clone() });
        }
    }
    // A DHCP client may keep a link's default route in a table of its own (systemd-networkd's `RouteTable=`).
    let mut elsewhere: Vec<&RouteSpec> = view
        .other_routes
        .iter()
        .map(|route| &route.spec)
        .filter(|spec| spec.kind == RouteKind::Unicast && spec.table != MAIN_TABLE)
        .filter(|spec| spec.interface == Some(index) && spec.dst.prefix_len() == 0 && !configured(&spec.dst))
        .filter(|spec| uses(section.family, family_of(spec.dst.addr())))
        .collect();
    elsewhere.sort_by_key(|spec| spec.metric);
    for spec in elsewhere {
        if !routes.iter().any(|other| other.dst == spec.dst) {
            let onlink = spec.onlink || spec.gateway.is_some_and(needs_onlink);
            routes.push(RouteSpec { table, metric: 0, onlink, ..spec.clone() });
        }
    }
    for gateway in &section.gateways {
        routes.push(RouteSpec {
            gateway: Some(*gateway),
            interface: Some(index),
            table,
            onlink: needs_onlink(*gateway),
            ..RouteSpec::new(default_net(family_of(*gateway)))
        });
    }
    if live.point_to_point {
        for family in [Family::V4, Family::V6] {
            let net = default_net(family);
            let has_address = live.wan.addresses.iter().any(|address| family_of(*address) == family);
            if has_address && !routes.iter().any(|route| route.dst == net) {
                routes.push(RouteSpec { interface: Some(index), table, ..RouteSpec::new(net) });
            }
        }
    }
    routes
}

/// The kernel looks for the network of a gateway in all tables; with two WANs of one subnet it would find the other
/// WAN's. IPv6 gateways with link-local addresses need no such search.
fn needs_onlink(gateway: IpAddr) -> bool {
    match gateway {
        IpAddr::V4(_) => true,
        IpAddr::V6(ip) => !ip.is_unicast_link_local(),
    }
}

fn rule(numbers: Numbers, place: Place, family: Family, table: u32) -> RuleSpec {
    RuleSpec::new(family, numbers.priority(place), table)
}

fn family_of(address: IpAddr) -> Family {
    if address.is_ipv4() { Family::V4 } else { Family::V6 }
}

fn uses(wanted: config::Family, family: Family) -> bool {
    !matches!((wanted, family), (config::Family::Ipv4, Family::V6) | (config::Family::Ipv6, Family::V4))
}

fn default_net(family: Family) -> IpNet {
    match family {
        Family::V4 => Ipv4Net::default().into(),
        Family::V6 => Ipv6Net::default().into(),
    }
}

/// Families for which the tunnel takes the default route with rules of ours.
fn default_families(config: &Config) -> Vec<Family> {
    if config.tun.routes != Routes::Auto {
        return Vec::new();
    }
    let has = |family: Family| config.host_prefixes().any(|net| *net == default_net(family));
    [Family::V4, Family::V6].into_iter().filter(|family| has(*family)).collect()
}

/// Whether a wanted route and one of the kernel are the same, seen through the kernel's habits: IPv6 has a default
/// metric, and routes that refuse hang on the loopback interface.
fn same(a: &RouteSpec, b: &RouteSpec) -> bool {
    let metric = |spec: &RouteSpec| {
        if spec.metric == 0 && spec.dst.addr().is_ipv6() { 1024 } else { spec.metric }
    };
    let interface = |spec: &RouteSpec| spec.interface.filter(|_| spec.kind == RouteKind::Unicast);
    a.dst == b.dst
        && a.table == b.table
        && a.kind == b.kind
        && a.gateway == b.gateway
        && metric(a) == metric(b)
        && interface(a) == interface(b)
        && (a.source.is_none() || a.source == b.source)
}

#[cfg(test)]
mod tests;
