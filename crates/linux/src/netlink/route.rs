//! Routes.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteNextHop,
    RouteNextHopFlags, RouteProtocol, RouteScope, RouteType, RouteVia,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::address::family;
use super::{Existing, Family, Netlink, OUR_PROTOCOL};
use crate::Result;

/// The routing table everybody uses.
pub const MAIN_TABLE: u32 = 254;

/// Action of a route on a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum RouteKind {
    /// Sends it on.
    #[default]
    Unicast,
    /// Refuses it with an ICMP error; keeps traffic of a WAN table from leaking to other tables.
    Unreachable,
    /// Drops it silently.
    Blackhole,
    /// Refuses it as forbidden by the administrator, with an ICMP error.
    Prohibit,
    /// Leaves this table and goes on with the next rule.
    Throw,
    /// Delivers it to this host (the kernel makes these in the table `local`).
    Local,
    /// Anything else (broadcast, multicast, anycast…); can be listed, not added.
    Other,
}

/// A route.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RouteSpec {
    /// Destination network.
    pub dst: IpNet,
    /// Next router; `None` = the destination is on the link.
    pub gateway: Option<IpAddr>,
    /// Interface index; needed for everything but unreachable, black hole and throw.
    pub interface: Option<u32>,
    /// Routing table, [`MAIN_TABLE`] by default.
    pub table: u32,
    /// The lowest wins among routes to the same network; 0 = the kernel's default (0 for IPv4, 1,024 for IPv6).
    pub metric: u32,
    /// Source address to prefer.
    pub source: Option<IpAddr>,
    /// The gateway is on the link though no network of the interface contains it.
    pub onlink: bool,
    /// Action on the packet.
    pub kind: RouteKind,
}

impl RouteSpec {
    /// A unicast route in the main table, so far without a way.
    pub fn new(dst: IpNet) -> RouteSpec {
        RouteSpec {
            dst,
            gateway: None,
            interface: None,
            table: MAIN_TABLE,
            metric: 0,
            source: None,
            onlink: false,
            kind: RouteKind::Unicast,
        }
    }
}

/// A route of the kernel. A multi-path route is listed once per way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The route as it would be added.
    pub spec: RouteSpec,
    /// Who made it: 2 the kernel, 3 boot, 4 static, 9 router advertisements, 16 DHCP, [`OUR_PROTOCOL`] this
    /// program.
    pub protocol: u8,
    /// It cannot be used now because the interface has no carrier or the gateway is gone.
    pub dead: bool,
    /// Place among the ways of one multi-path route; 0: the first or only one. The others follow it.
    pub place: u16,
    /// Share of the flows of a multi-path route that take this way, relative to the others; from 1.
    pub weight: u16,
    /// Largest packet that may take it, bytes (`mtu`, `mtu lock`), where it says so.
    pub mtu: Option<u32>,
    /// Only packets with a source of this network take it (IPv6: `from`).
    pub from: Option<IpNet>,
}

impl Route {
    /// Whether this program (or an earlier instance of it) made the route.
    pub fn is_ours(&self) -> bool {
        self.protocol == OUR_PROTOCOL
    }
}

fn default_net(family: AddressFamily) -> Option<IpNet> {
    match family {
        AddressFamily::Inet => Some(Ipv4Net::default().into()),
        AddressFamily::Inet6 => Some(Ipv6Net::default().into()),
        _ => None,
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

/// Reads a route message: one entry, or one per way of a multi-path route.
pub(super) fn from_message(message: &RouteMessage) -> Vec<Route> {
    // Entries of the IPv6 route cache are not routes.
    if message.header.flags.contains(RouteFlags::Cloned) {
        return Vec::new();
    }
    let Some(mut dst) = default_net(message.header.address_family) else { return Vec::new() };
    let kind = match message.header.kind {
        RouteType::Unicast => RouteKind::Unicast,
        RouteType::Unreachable => RouteKind::Unreachable,
        RouteType::BlackHole => RouteKind::Blackhole,
        RouteType::Prohibit => RouteKind::Prohibit,
        RouteType::Throw => RouteKind::Throw,
        RouteType::Local => RouteKind::Local,
        _ => RouteKind::Other,
    };
    let mut spec = RouteSpec { table: u32::from(message.header.table), kind, ..RouteSpec::new(dst) };
    spec.onlink = message.header.flags.contains(RouteFlags::Onlink);
    let mut hops: &[RouteNextHop] = &[];
    let (mut mtu, mut from) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => {
                if let Some(net) =
                    ip(address).and_then(|ip| IpNet::new(ip, message.header.destination_prefix_length).ok())
                {
                    dst = net;
                }
            }
            RouteAttribute::Table(table) => spec.table = *table,
            RouteAttribute::Priority(metric) => spec.metric = *metric,
            RouteAttribute::PrefSource(address) => spec.source = ip(address),
            RouteAttribute::MultiPath(list) => hops = list,
            RouteAttribute::Metrics(list) => {
                mtu = list.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu).filter(|mtu| *mtu > 0),
                    _ => None,
                });
            }
            RouteAttribute::Source(address) => {
                from = ip(address).and_then(|ip| IpNet::new(ip, message.header.source_prefix_length).ok());
            }
            other => read_way(other, &mut spec),
        }
    }
    spec.dst = dst;
    let protocol = message.header.protocol.into();
    let dead = message.header.flags.intersects(RouteFlags::Dead | RouteFlags::Linkdown);
    let mut routes = Vec::new();
    for (place, hop) in (0..).zip(hops) {
        let mut spec = spec.clone();
        spec.interface = Some(hop.interface_index);
        spec.onlink = hop.flags.contains(RouteNextHopFlags::Onlink);
        hop.attributes.iter().for_each(|attribute| read_way(attribute, &mut spec));
        let dead = hop.flags.intersects(RouteNextHopFlags::Dead | RouteNextHopFlags::Linkdown);
        routes.push(Route { spec, protocol, dead, place, weight: u16::from(hop.hops) + 1, mtu, from });
    }
    if hops.is_empty() {
        routes.push(Route { spec, protocol, dead, place: 0, weight: 1, mtu, from });
    }
    routes
}

fn read_way(attribute: &RouteAttribute, spec: &mut RouteSpec) {
    match attribute {
        RouteAttribute::Gateway(address) => spec.gateway = ip(address),
        // An IPv4 route by an IPv6 neighbor (RFC 8950).
        RouteAttribute::Via(RouteVia::Inet(via)) => spec.gateway = Some((*via).into()),
        RouteAttribute::Via(RouteVia::Inet6(via)) => spec.gateway = Some((*via).into()),
        RouteAttribute::Oif(index) => spec.interface = Some(*index),
        _ => {}
    }
}

fn message(spec: &RouteSpec) -> RouteMessage {
    let mut message = RouteMessage::default();
    let net = spec.dst.trunc();
    message.header = RouteHeader {
        address_family: family(net.addr()),
        destination_prefix_length: net.prefix_len(),
        table: u8::try_from(spec.table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC),
        protocol: RouteProtocol::from(OUR_PROTOCOL),
        scope: match (spec.kind, spec.gateway) {
            (RouteKind::Local, _) => RouteScope::Host,
            (RouteKind::Unicast, None) if net.addr().is_ipv4() => RouteScope::Link,
            _ => RouteScope::Universe,
        },
        kind: match spec.kind {
            RouteKind::Unicast | RouteKind::Other => RouteType::Unicast,
            RouteKind::Unreachable => RouteType::Unreachable,
            RouteKind::Blackhole => RouteType::BlackHole,
            RouteKind::Prohibit => RouteType::Prohibit,
            RouteKind::Throw => RouteType::Throw,
            RouteKind::Local => RouteType::Local,
        },
        flags: if spec.onlink { RouteFlags::Onlink } else { RouteFlags::empty() },
        ..RouteHeader::default()
    };
    let attributes = &mut message.attributes;
    if net.prefix_len() > 0 {
        attributes.push(RouteAttribute::Destination(net.addr().into()));
    }
    attributes.extend(spec.gateway.map(|gateway| match gateway {
        IpAddr::V6(via) if net.addr().is_ipv4() => RouteAttribute::Via(RouteVia::Inet6(via)),
        _ => RouteAttribute::Gateway(gateway.into()),
    }));
    attributes.extend(spec.interface.map(RouteAttribute::Oif));
    attributes.extend(spec.source.map(|source| RouteAttribute::PrefSource(source.into())));
    if spec.metric > 0 {
        attributes.push(RouteAttribute::Priority(spec.metric));
    }
    attributes.push(RouteAttribute::Table(spec.table));
    message
}

impl Netlink {
    /// All routes of one family, or of both, in all tables.
    pub fn routes(&self, only: Option<Family>) -> Result<Vec<Route>> {
        let mut all = Vec::new();
        for family in [Family::V4, Family::V6] {
            if only.is_some_and(|only| only != family) {
                continue;
            }
            let mut request = RouteMessage::default();
            request.header.address_family = family.into();
            let request = RouteNetlinkMessage::GetRoute(request);
            let lists = self.dump(&request, "list the routes", |message| match message {
                RouteNetlinkMessage::NewRoute(message) => Some(from_message(&message)),
                _ => None,
            })?;
            all.extend(lists.into_iter().flatten());
        }
        Ok(all)
    }

    /// Adds a route. `AlreadyExists` if there is one to this network with this metric in this table.
    pub fn add_route(&self, spec: &RouteSpec) -> Result<()> {
        self.change(RouteNetlinkMessage::NewRoute(message(spec)), Existing::Refuse, || {
            format!("add the route to {} in table {}", spec.dst, spec.table)
        })
    }

    /// Adds a route, or puts it in the place of the one to this network with this metric in this table.
    pub fn replace_route(&self, spec: &RouteSpec) -> Result<()> {
        self.change(RouteNetlinkMessage::NewRoute(message(spec)), Existing::Replace, || {
            format!("set the route to {} in table {}", spec.dst, spec.table)
        })
    }

    /// Deletes a route that this program made. `NotFound`-like errors come as `ESRCH`.
    pub fn del_route(&self, spec: &RouteSpec) -> Result<()> {
        self.change(RouteNetlinkMessage::DelRoute(message(spec)), Existing::Needed, || {
            format!("delete the route to {} in table {}", spec.dst, spec.table)
        })
    }
}
