//! Facts about the host: devices, addresses, routes, sysctls, its own range of ports.
//!
//! Nothing of the configuration is known here, and nothing is decided. [`HostView`] is a dump of the kernel's tables,
//! [`HostFacts`] the part of it that the gateway's policy depends on.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use linux::link_layer::LinkLayer;
use linux::netlink::{
    Address, IpsecPolicy, Link, MAIN_TABLE, Netlink, PolicyRule, Route, RouteKind, Tunnel, ipsec_policies,
    ipsec_tunnels,
};
use services::held_ports::HeldPorts;
use services::spec::LinkSpec;
use steering::units::Lease;

use crate::device_settings;

/// Addresses of one WAN that are used at most.
pub const WAN_ADDRESSES_MAX: usize = 8;

/// The kernel's ports for outgoing connections, unless the host says otherwise.
pub const EPHEMERAL: (u16, u16) = (32_768, 60_999);
/// The kernel's table of its own addresses.
pub(crate) const LOCAL_TABLE: u32 = 255;
/// Links, addresses and routes as netlink tells them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostView {
    /// Interfaces.
    pub links: Vec<Link>,
    /// Addresses of all interfaces.
    pub addresses: Vec<Address>,
    /// Routes of the main table which work now, those into the tunnel included.
    pub routes: Vec<Route>,
    /// Routes besides these that decide where packets go: those of the main table that refuse, what the host takes for its own (of the
    /// local table), and all of other tables but those that this program made for its tunnel.
    pub other_routes: Vec<Route>,
    /// Rules that say which table counts, without ours.
    pub rules: Vec<PolicyRule>,
    /// Policies of IPsec about what the kernel passes on, the first ones first.
    pub ipsec: Vec<IpsecPolicy>,
    /// Tunnels of the host by protocols without ports.
    pub tunnels: BTreeSet<Tunnel>,
}

impl HostView {
    /// Reads the present state.
    pub fn read(netlink: &Netlink) -> linux::Result<Self> {
        let links = netlink.links()?;
        let addresses = netlink.all_addresses()?;
        let mut routes = netlink.routes(None)?;
        routes.retain(|route| {
            let is_local = route.spec.kind == RouteKind::Local;
            !route.dead
                && route.spec.kind != RouteKind::Other
                && is_local == (route.spec.table == LOCAL_TABLE)
        });
        let (routes, mut other_routes): (Vec<Route>, Vec<Route>) = routes
            .into_iter()
            .partition(|route| route.spec.table == MAIN_TABLE && route.spec.kind == RouteKind::Unicast);
        other_routes.retain(|route| matches!(route.spec.table, MAIN_TABLE | LOCAL_TABLE) || !route.is_ours());
        let mut rules = netlink.policy_rules()?;
        rules.retain(|rule| !rule.spec.is_ours());
        let ipsec = ipsec_policies()?;
        let mut tunnels = ipsec_tunnels()?;
        tunnels.extend(netlink.tunnels()?);
        Ok(Self { links, addresses, routes, other_routes, rules, ipsec, tunnels })
    }

    /// The interface of this name.
    #[must_use]
    pub fn link(&self, name: &str) -> Option<&Link> {
        self.links.iter().find(|link| link.name == name)
    }

    /// Addresses of an interface that can be the source of tunnel datagrams: global or private, of a family that
    /// `covers` says is in use. Deprecated ones only where a family has no other.
    #[must_use]
    pub fn usable_addresses(&self, index: u32, covers: impl Fn(IpAddr) -> bool) -> Vec<IpAddr> {
        let usable = |address: &&Address| {
            let ip = address.net.addr();
            address.index == index
                && !address.link_local
                && !address.tentative
                && !ip.is_loopback()
                && covers(ip)
        };
        let mut list: Vec<IpAddr> = Vec::new();
        for deprecated in [false, true] {
            let of_kind = self.addresses.iter().filter(usable).filter(|a| a.deprecated == deprecated);
            for ip in of_kind.map(|address| address.net.addr()) {
                let have_family = list.iter().any(|other| other.is_ipv4() == ip.is_ipv4());
                let superseded = deprecated && have_family;
                if !superseded && !list.contains(&ip) {
                    list.push(ip);
                }
            }
        }
        list.truncate(WAN_ADDRESSES_MAX);
        list
    }

    /// Indices of interfaces with a default route of a family, the preferred first.
    #[must_use]
    pub fn default_interfaces(&self) -> Vec<u32> {
        let mut routes: Vec<&Route> =
            self.routes.iter().filter(|route| route.spec.dst.prefix_len() == 0).collect();
        routes.sort_by_key(|route| route.spec.metric);
        let mut list = Vec::new();
        for index in routes.into_iter().filter_map(|route| route.spec.interface) {
            if !list.contains(&index) {
                list.push(index);
            }
        }
        list
    }
}

/// Devices, routes and ports of the host, as the gateway's policy is made from them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFacts {
    /// Network devices.
    pub devices: Vec<DeviceFacts>,
    /// Routes that work.
    pub routes: Vec<KernelRoute>,
    /// Rules that say which table counts, in order.
    pub rules: Vec<PolicyRule>,
    /// Policies of IPsec about what the kernel passes on, the first ones first.
    pub ipsec: Vec<IpsecPolicy>,
    /// Tunnels of the host by protocols without ports.
    pub tunnels: BTreeSet<Tunnel>,
    /// Index of the TUN device.
    pub tun_index: Option<u32>,
    /// Ports of the host's own outgoing connections, inclusive.
    pub ephemeral_ports: (u16, u16),
    /// Other ports that its programs hold.
    pub held_ports: Arc<HeldPorts>,
    /// Addresses on its devices that no service has any more, while flows still use them.
    pub lingering: BTreeSet<IpAddr>,
    /// Blocks of ports that this machine of a cluster may translate sources to; `None`: it is alone and may use all.
    pub port_blocks: Option<BTreeSet<Lease>>,
    /// This dispatcher was told to take over the interfaces that others may have.
    pub takes_over: bool,
}

/// Network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFacts {
    /// Index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Header of its packets; `None`: loopback, and what else cannot carry packets of others.
    pub link: Option<LinkSpec>,
    /// Index of the device below, of a macvlan that is the host's own: VRRP daemons make one for each virtual router (RFC 5798
    /// §7.3).
    pub lies_on: Option<u32>,
    /// Largest IP packet, bytes.
    pub mtu: u32,
    /// Largest IPv6 packet where that is less ([`HostFacts::read_ipv6_mtus`]).
    pub ipv6_mtu: u16,
    /// Switched on, with carrier.
    pub up: bool,
    /// Leads back to the host.
    pub loopback: bool,
    /// Its addresses.
    pub addresses: Vec<IpNet>,
    /// The VRF that it belongs to: name of its device and routing table.
    pub vrf: Option<(String, u32)>,
}

impl DeviceFacts {
    /// Its hardware address; zeros without one.
    #[must_use]
    pub fn mac(&self) -> [u8; 6] {
        self.link.as_ref().map_or([0; 6], LinkSpec::mac)
    }
}

/// Route of the kernel; one of several ways is listed behind the first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelRoute {
    /// Table.
    pub table: u32,
    /// Action.
    pub kind: RouteKind,
    /// Who made it: 9 router advertisements, 16 DHCP.
    pub protocol: u8,
    /// Place among the ways of one route; 0: the first or only one.
    pub place: u16,
    /// Share of the flows that take this way.
    pub weight: u16,
    /// Destination.
    pub prefix: IpNet,
    /// Next router.
    pub via: Option<IpAddr>,
    /// Index of the device; 0 where the route refuses.
    pub device: u32,
    /// The lowest is preferred.
    pub metric: u32,
    /// Largest packet, bytes; `None`: that of the device.
    pub mtu: Option<u32>,
    /// Only for sources of this network.
    pub from: Option<IpNet>,
}

impl HostFacts {
    /// From netlink's view.
    #[must_use]
    pub fn new(view: &HostView, tun_index: Option<u32>, ephemeral_ports: (u16, u16)) -> Self {
        let device = |link: &Link| DeviceFacts {
            index: link.index,
            name: link.name.clone(),
            link: link.layer.map(|layer| match layer {
                LinkLayer::Ethernet => LinkSpec::ethernet(link.mac.unwrap_or_default()),
                LinkLayer::None => LinkSpec::PointToPoint,
            }),
            // One in a bridge is for others.
            lies_on: link
                .lower
                .filter(|_| link.kind.as_deref() == Some("macvlan") && link.controller.is_none()),
            mtu: link.mtu,
            ipv6_mtu: u16::MAX,
            up: link.up && link.carrier,
            loopback: link.loopback,
            addresses: view
                .addresses
                .iter()
                .filter(|address| address.index == link.index)
                .map(|address| address.net)
                .collect(),
            vrf: link.controller.and_then(|index| {
                let vrf = view.links.iter().find(|link| link.index == index)?;
                Some((vrf.name.clone(), vrf.vrf_table?))
            }),
        };
        let route = |route: &Route| {
            let spec = &route.spec;
            let device = spec.interface.or((spec.kind != RouteKind::Unicast).then_some(0))?;
            Some(KernelRoute {
                table: spec.table,
                kind: spec.kind,
                protocol: route.protocol,
                place: route.place,
                weight: route.weight,
                prefix: spec.dst,
                via: spec.gateway,
                device,
                metric: spec.metric,
                mtu: route.mtu,
                from: route.from,
            })
        };
        Self {
            devices: view.links.iter().map(device).collect(),
            routes: view.routes.iter().chain(&view.other_routes).filter_map(route).collect(),
            rules: view.rules.clone(),
            ipsec: view.ipsec.clone(),
            tunnels: view.tunnels.clone(),
            tun_index,
            ephemeral_ports,
            held_ports: Arc::default(),
            port_blocks: None,
            lingering: BTreeSet::new(),
            takes_over: false,
        }
    }

    /// Reads the MTUs for IPv6 of devices of this process's own network: by hand or from a router's advertisement they may be
    /// less than those of the devices. The kernel does not tell when they change. Returns whether one has.
    pub fn read_ipv6_mtus<'a>(&mut self, names: impl IntoIterator<Item = &'a str>) -> bool {
        let mut changed = false;
        for name in names {
            let Some(device) = self.devices.iter_mut().find(|device| device.name == name) else { continue };
            let now = read_ipv6_mtu(name);
            changed |= now != device.ipv6_mtu;
            device.ipv6_mtu = now;
        }
        changed
    }

    /// The device of this name.
    #[must_use]
    pub fn device(&self, name: &str) -> Option<&DeviceFacts> {
        self.devices.iter().find(|device| device.name == name)
    }
}

/// The kernel's range of ports for outgoing connections, from `/proc`; its default where that cannot be read.
#[must_use]
pub fn read_ephemeral_ports() -> (u16, u16) {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut numbers = text.split_whitespace().map(str::parse::<u16>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(first)), Some(Ok(last))) if first <= last => (first, last),
        _ => EPHEMERAL,
    }
}

/// The largest IPv6 packet of a device, bytes; [`u16::MAX`] where IPv6 is off.
fn read_ipv6_mtu(device: &str) -> u16 {
    let mtu = linux::netns::sysctl(&device_settings::name("ipv6", device, "mtu"))
        .ok()
        .and_then(|text| text.parse::<u32>().ok());
    mtu.map_or(u16::MAX, |mtu| u16::try_from(mtu).unwrap_or(u16::MAX))
}

/// Reverse-path filter of an interface, or of `all`: 0 off, 1 strict, 2 loose. `None` where there is no such interface.
#[must_use]
pub fn read_rp_filter(interface: &str) -> Option<u8> {
    linux::netns::sysctl(&device_settings::name("ipv4", interface, "rp_filter")).ok()?.parse().ok()
}
