//! From the configuration and the host's state to [`GatewaySpec`]: names become numbers, defaults become values.
//!
//! A pure function of [`Config`], [`HostFacts`] and [`Overrides`] (what was changed by command), so that what the packet
//! engine is told can be tested without a kernel.
//!
//! * **Numbers are stable**: an interface's and a tenant's number is its place in the configuration, and
//!   [`crate::reload`] keeps places over a reload, because live flows carry these numbers.
//! * **Routes**, the best first where a prefix has several: the gateway's own addresses, `[[route]]`, connected networks,
//!   peers' allowed-ips in the tables of their tenants, the kernel's with its rules and tables (`host_routes`): over the
//!   gateway's devices, into the tunnel, and over others, where the kernel passes packets on. The others are told too: by them answers leave where a question came in.
//! * **Ports that the host itself uses** are reserved where a NAT shares an address with the host.
//! * **Replies to the host's own connections** come through the datapath, which has no flow for them because the
//!   requests left natively: it is told the ports that the host uses, so that a default action that drops spares them.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use linux::netlink::RouteKind;
use packet::attachment::{BondId, Egress, InterfaceId};
use packet::ip::is_link_local;
use services::spec::{
    Attachment, BackendSpec, ForwardSpec, GatewaySpec, GroupSpec, HostSpec, InterfaceSpec, LeaseSpec, Limits,
    LinkSpec, MAIN_TABLE, NatMode, NatSpec, PeerSpec, RouteAction, RuleAction, RuleSpec, ServerSpec,
    SideSpec, kept_ports,
};

use steering::units::LEASE_PORTS;

use super::addresses;
use super::host_routes::{self, Candidate, Rank, RouteTable};
use super::inner;
use super::overrides::Overrides;
use crate::config::services::pools;
use crate::config::services::{Distribution, Interface, Lease, ListenHost, NatFrom, Rule, Services, Subject};
use crate::config::{Config, Peer, Routes};
use crate::host_facts::{DeviceFacts, HostFacts, KernelRoute};

/// Bond that no peer has.
const NOBODY: BondId = BondId(BondId::MAX);
/// IPv4 address of the TUN interface when none is configured: RFC 7600's address of no host. The kernel's
/// reverse-path filter drops everything that comes in on an interface without an address.
const TUN_DUMMY: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 0, 8));

/// The addresses of the TUN interface: the configured ones, and one for IPv4 in any case where packets for the host come
/// out of it.
#[must_use]
pub fn tun_addresses(config: &Config) -> Vec<IpNet> {
    let mut list = config.tun.addresses.clone();
    if !config.services.is_empty() && !list.iter().any(|net| net.addr().is_ipv4()) {
        list.push(IpNet::from(TUN_DUMMY));
    }
    list
}

/// Gateway as the engine is to run it.
#[derive(Clone, Debug, PartialEq)]
pub struct Desired {
    /// Policy of the services.
    pub spec: GatewaySpec,
    /// The kernel's devices, by [`InterfaceId`] as in `spec.interfaces`.
    pub devices: Vec<DeviceState>,
    /// How packets are spread over cores (row C8).
    pub distribution: Distribution,
    /// Whether buckets move from busy cores to idle ones (row C9).
    pub core_rebalance: bool,
    /// Whether events of address translation are wanted ([`super::engine::EngineHandle::take_nat_events`]).
    pub nat_events: bool,
}

/// One kernel device as it is now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceState {
    /// Its name.
    pub name: String,
    /// Its index; `None` while it is missing. Another index under the same name is another device: sockets bound to the
    /// old one are dead.
    pub index: Option<u32>,
    /// Switched on and with carrier.
    pub up: bool,
}

/// Everything the engine is told.
#[must_use]
pub fn desired(config: &Config, facts: &HostFacts, overrides: &Overrides) -> Desired {
    let settings = &config.services.settings;
    let device = |interface: &Interface| {
        let found = facts.device(&interface.device);
        DeviceState {
            name: interface.device.clone(),
            index: found.map(|device| device.index),
            up: found.is_some_and(|device| device.up),
        }
    };
    Desired {
        spec: gateway_spec(config, facts, overrides),
        devices: config.services.interfaces.iter().map(device).collect(),
        distribution: settings.distribution,
        core_rebalance: settings.core_rebalance,
        nat_events: settings.log_file.is_some(),
    }
}

/// Policy for the services: configuration, host facts and overrides in their numbers.
#[must_use]
pub fn gateway_spec(config: &Config, facts: &HostFacts, overrides: &Overrides) -> GatewaySpec {
    let builder = Builder { config, services: &config.services, facts, overrides };
    let interfaces = builder.interfaces();
    let leases = builder.leases();
    let forwards = builder.forwards(&interfaces);
    let servers = builder.servers();
    let others = !other_devices(config, facts).is_empty();
    let inners = if others { inner::endpoints(&servers, &forwards) } else { Vec::new() };
    let route_rules = host_routes::rules(config, facts, &interfaces);
    let (routes, ipsec) = (builder.routes(&interfaces), host_routes::ipsec_routes(facts));
    GatewaySpec {
        peers: builder.peers(),
        tenants: std::iter::once(String::new()).chain(config.services.tenants.iter().cloned()).collect(),
        routes: routes.into_routes(!route_rules.is_empty()).into_iter().chain(ipsec).collect(),
        route_rules,
        groups: builder.groups(),
        rules: builder.rules(),
        default_action: config.services.settings.default_action.unwrap_or(RuleAction::Allow),
        nats: builder.nats(&interfaces, &forwards, &servers),
        forwards,
        leases,
        servers,
        timeouts: config.services.settings.timeouts,
        limits: Limits { fragments: config.services.settings.fragments, ..config.services.settings.limits },
        host: HostSpec {
            mode: config.services.settings.host,
            ports: facts.ephemeral_ports,
            held_ports: Arc::clone(&facts.held_ports),
            inners,
            tunnel_addresses: config.tun.addresses.clone(),
            tunnels: host_routes::tunnels(facts),
            sealed: host_routes::sealed(facts),
            client_addresses: inner::addresses(&config.services).collect(),
            peer_sources: peer_sources(config, &interfaces),
            others_ports: builder.others_ports(&interfaces),
        },
        interfaces,
    }
}

struct Builder<'a> {
    config: &'a Config,
    services: &'a Services,
    facts: &'a HostFacts,
    overrides: &'a Overrides,
}

impl Builder<'_> {
    fn tenant(&self, name: Option<&String>) -> u16 {
        tenant_number(self.services, name)
    }

    fn peers(&self) -> Vec<PeerSpec> {
        let peer = |peer: &Peer| PeerSpec {
            id: peer.id,
            name: peer.name.clone(),
            tenant: self.tenant(peer.tenant.as_ref()),
            allowed_ips: peer.allowed_ips.clone(),
        };
        self.config.peers.iter().map(peer).collect()
    }

    fn bond(&self, name: &str) -> Option<BondId> {
        self.config.peers.iter().find(|peer| peer.name == name).map(|peer| peer.id)
    }

    fn tenants(&self, names: &[String]) -> Vec<u16> {
        names.iter().map(|name| self.tenant(Some(name))).collect()
    }

    fn interface(&self, name: &str) -> Option<InterfaceId> {
        let place = self.services.interfaces.iter().position(|interface| interface.name == name)?;
        u16::try_from(place).ok().map(InterfaceId)
    }

    fn group(&self, name: &str) -> Option<u16> {
        let place = self.services.groups.iter().position(|group| group.name == name)?;
        u16::try_from(place).ok()
    }

    fn interfaces(&self) -> Vec<InterfaceSpec> {
        let extra = addresses::extra(self.services, self.facts);
        let interface = |interface: &Interface| {
            let device = self.facts.device(&interface.device);
            let mut list = interface.addresses.clone();
            let tops = device.map(|device| self.on_top(device)).unwrap_or_default();
            for net in device.iter().chain(&tops).flat_map(|device| &device.addresses) {
                let is_extra = net.prefix_len() == net.max_prefix_len()
                    && (extra.contains(&net.addr()) || self.facts.lingering.contains(&net.addr()));
                if !is_extra && !list.iter().any(|known| known.addr() == net.addr()) {
                    list.push(*net);
                }
            }
            let outside = self.leads_outside(interface, device);
            let unset = self.services.settings.default_action.is_none();
            let mtu = device.map_or(1500, |device| u16::try_from(device.mtu).unwrap_or(u16::MAX));
            InterfaceSpec {
                name: interface.name.clone(),
                device: interface.device.clone(),
                addresses: list,
                tenant: self.tenant(interface.tenant.as_ref()),
                mtu: interface.mtu.map_or(mtu, |wanted| wanted.min(mtu)),
                ipv6_mtu: device.map_or(u16::MAX, |device| device.ipv6_mtu),
                // One that is taken over gets the shared address: it is not opened anew for that.
                link: match (interface.mac.filter(|_| interface.takeover), link_of(device, &tops)) {
                    (Some(mac), LinkSpec::Ethernet { more, .. }) => LinkSpec::Ethernet { mac, more },
                    (_, link) => link,
                },
                outside,
                loose_tcp: interface.loose_tcp,
                through_action: (outside && unset).then_some(RuleAction::Drop),
            }
        };
        self.services.interfaces.iter().map(interface).collect()
    }

    /// Devices of the host on top of one, with hardware addresses of their own, that are no interfaces of ours.
    fn on_top(&self, device: &DeviceFacts) -> Vec<&DeviceFacts> {
        let ours =
            |top: &DeviceFacts| self.services.interfaces.iter().any(|interface| interface.device == top.name);
        let tops = self.facts.devices.iter().filter(|top| top.lies_on == Some(device.index) && top.up);
        tops.filter(|top| !ours(top)).collect()
    }

    /// Whether strangers are behind an interface, as far as the configuration and the host tell: a NAT, a default route or a WAN
    /// leads out by it.
    fn leads_outside(&self, interface: &Interface, device: Option<&DeviceFacts>) -> bool {
        let by_route = || {
            device.is_some_and(|device| {
                let mut defaults = self.facts.routes.iter().filter(|route| route.prefix.prefix_len() == 0);
                defaults.any(|route| route.device == device.index)
            })
        };
        leads_out(self.config, interface) || interface.outside.is_none() && by_route()
    }

    fn routes(&self, interfaces: &[InterfaceSpec]) -> RouteTable {
        let mut table = RouteTable::default();
        for (id, interface) in (0..).map(InterfaceId).zip(interfaces) {
            for net in &interface.addresses {
                let own = Candidate::new(Rank::Own, Egress::Host, None);
                table.add(interface.tenant, IpNet::from(net.addr()), own);
                // A VRF's table is not the main one.
                let device = self.facts.device(&interface.device);
                if net.prefix_len() < net.max_prefix_len() && device.is_none_or(|device| device.vrf.is_none())
                {
                    let connected = Candidate::new(Rank::Connected, Egress::Interface(id), None);
                    table.add(interface.tenant, net.trunc(), connected);
                }
            }
        }
        for (address, tenant) in self.listening() {
            table.add(tenant, IpNet::from(address), Candidate::new(Rank::Own, Egress::Host, None));
        }
        for address in inner::addresses(self.services) {
            table.add(0, IpNet::from(address), Candidate::new(Rank::Own, Egress::Host, None));
        }
        for address in &self.config.tun.addresses {
            table.add(0, IpNet::from(address.addr()), Candidate::new(Rank::Own, Egress::Host, None));
        }
        for route in &self.services.routes {
            let id = match (&route.interface, route.via) {
                (Some(name), _) => self.interface(name),
                (None, Some(via)) => interface_towards(interfaces, via),
                (None, None) => None,
            };
            let Some(id) = id else { continue };
            let of_interface = interfaces.get(id.index()).map_or(0, |interface| interface.tenant);
            let tenant = route.tenant.as_ref().map_or(of_interface, |name| self.tenant(Some(name)));
            let configured = Candidate::new(Rank::Configured, Egress::Interface(id), route.via);
            table.add(tenant, route.to, configured);
        }
        if self.config.tun.routes == Routes::Auto {
            for peer in &self.config.peers {
                let (tenant, egress) = (self.tenant(peer.tenant.as_ref()), Egress::Bond(peer.id));
                for net in &peer.allowed_ips {
                    table.add(tenant, *net, Candidate::new(Rank::Peer, egress, None));
                }
            }
        }
        self.kernel_routes(&mut table, interfaces);
        table
    }

    /// The kernel's routes over these interfaces and into the tunnel, those over other devices, by which it passes packets on
    /// itself, and those that refuse.
    fn kernel_routes(&self, table: &mut RouteTable, interfaces: &[InterfaceSpec]) {
        // The route whose further ways follow.
        let mut several: Option<(u16, IpNet, Candidate)> = None;
        for route in &self.facts.routes {
            let follows = several.as_ref().is_some_and(|(_, prefix, first)| {
                (*prefix, first.from) == (route.prefix, route.from)
                    && (first.table, first.metric) == (route.table, route.metric)
            });
            // The first way may be one that does not work, or not ours.
            if !(follows && route.place > 0)
                && let Some((tenant, prefix, candidate)) = several.take()
            {
                table.add(tenant, prefix, candidate);
            }
            let candidate = Candidate {
                table: route.table,
                metric: route.metric,
                action: host_routes::action(route.kind),
                weight: route.weight,
                mtu: route.mtu.and_then(|mtu| u16::try_from(mtu).ok()).unwrap_or(u16::MAX),
                from: route.from,
                ..Candidate::new(Rank::Kernel, Egress::Host, route.via)
            };
            if candidate.action != RouteAction::Forward {
                table.add(0, route.prefix, candidate);
                continue;
            }
            if route.kind == RouteKind::Local {
                if let Some((prefix, own)) = self.own_elsewhere(route, interfaces) {
                    table.add(0, prefix, own);
                }
                continue;
            }
            if Some(route.device) == self.facts.tun_index {
                for (net, id) in self.through_tunnel(route.prefix) {
                    table.add(0, net, Candidate { egress: Egress::Bond(id), ..candidate.clone() });
                }
                continue;
            }
            let egress = self.egress_of(route, interfaces);
            let Some(egress) = egress.filter(|egress| !self.is_rogue(route, *egress)) else {
                continue;
            };
            let candidate = Candidate { egress, ..candidate };
            match &mut several {
                Some((_, _, first)) => first.more.push((egress, route.via, route.weight)),
                None => {
                    let interface = egress.interface().and_then(|id| interfaces.get(id.index()));
                    let tenant = interface.map_or(0, |interface| interface.tenant);
                    several = Some((tenant, route.prefix, candidate));
                }
            }
        }
        if let Some((tenant, prefix, candidate)) = several {
            table.add(tenant, prefix, candidate);
        }
    }

    /// Route to the host for its own addresses beside those of these interfaces: addresses of its other devices, networks that `ip
    /// route add local` gives it.
    fn own_elsewhere(&self, route: &KernelRoute, interfaces: &[InterfaceSpec]) -> Option<(IpNet, Candidate)> {
        let device = self.facts.devices.iter().find(|device| device.index == route.device)?;
        let known = || interfaces.iter().any(|interface| interface.device == device.name);
        let address = route.prefix.addr();
        let of_one_link = address.is_loopback() || is_of_link(address);
        let elsewhere = Some(device.index) != self.facts.tun_index && !known() && !of_one_link;
        elsewhere.then(|| (route.prefix, Candidate::new(Rank::Own, Egress::Host, None)))
    }

    /// By what packets leave that take a route of the kernel's. `None`: the route does not count.
    fn egress_of(&self, route: &KernelRoute, interfaces: &[InterfaceSpec]) -> Option<Egress> {
        let devices = &self.facts.devices;
        let device = devices.iter().find(|device| device.index == route.device)?;
        let below = devices.iter().find(|below| Some(below.index) == device.lies_on);
        let below = below.filter(|below| self.on_top(below).iter().any(|top| top.index == device.index));
        let device = below.unwrap_or(device);
        if let Some(place) = interfaces.iter().position(|interface| interface.device == device.name) {
            return u16::try_from(place).ok().map(|place| Egress::Interface(InterfaceId(place)));
        }
        // Where the configuration has the way out, the default route of a network for management is none.
        let other_way_out =
            route.table == MAIN_TABLE && route.prefix.prefix_len() == 0 && has_way_out(self.config);
        let carries_tunnel = self.config.wans.iter().any(|wan| wan.interface.covers(&device.name));
        let counts = !device.loopback && !is_of_link(route.prefix.addr());
        (counts && !other_way_out && !carries_tunnel).then_some(Egress::Kernel)
    }

    /// Whether a default route is what a host of a network inside claims by a router advertisement or DHCP: the way out is
    /// where the configuration has one (RFC 4861 §6.2.7).
    fn is_rogue(&self, route: &KernelRoute, egress: Egress) -> bool {
        const RA: u8 = 9;
        const DHCP: u8 = 16;
        let inside = egress.interface().is_some_and(|id| {
            self.services
                .interfaces
                .get(id.index())
                .is_some_and(|interface| is_inside(self.config, interface))
        });
        route.prefix.prefix_len() == 0 && matches!(route.protocol, RA | DHCP) && inside
    }

    /// Ways of a prefix that the host routes into the tunnel: the peer that has all of it, and those that have
    /// parts. What nobody has ends in the tunnel and does not take another route.
    fn through_tunnel(&self, prefix: IpNet) -> Vec<(IpNet, BondId)> {
        let shared = self.config.peers.iter().filter(|peer| peer.tenant.is_none());
        let all = shared.flat_map(|peer| peer.allowed_ips.iter().map(move |net| (*net, peer.id)));
        let around = all.clone().filter(|(net, _)| net.contains(&prefix));
        let whole = around.max_by_key(|(net, _)| net.prefix_len()).map_or(NOBODY, |(_, id)| id);
        let parts = all.filter(|(net, _)| prefix.contains(net) && *net != prefix);
        std::iter::once((prefix, whole)).chain(parts).collect()
    }

    /// Addresses that only services listen on, and pools: what no service takes is for the host to refuse; without a route
    /// of their own such packets would go round in circles.
    fn listening(&self) -> Vec<(IpAddr, u16)> {
        let mut list: Vec<(IpAddr, u16)> = Vec::new();
        let lingering = self.facts.lingering.iter().copied();
        for address in addresses::extra(self.services, self.facts).into_iter().chain(lingering) {
            let home = addresses::home(self.services, address);
            let interface = home.and_then(|place| self.services.interfaces.get(place));
            list.push((address, self.tenant(interface.and_then(|interface| interface.tenant.as_ref()))));
        }
        list
    }

    fn groups(&self) -> Vec<GroupSpec> {
        let group = |group| self.overrides.members(group);
        self.services.groups.iter().map(|g| GroupSpec { name: g.name.clone(), members: group(g) }).collect()
    }

    fn side(&self, subjects: &[Subject]) -> SideSpec {
        let mut side = SideSpec::default();
        for subject in subjects {
            match subject {
                Subject::Prefix(net) => side.prefixes.push(*net),
                Subject::Group(name) => side.groups.extend(self.group(name)),
                Subject::Interface(name) => {
                    side.attachments.extend(self.interface(name).map(Attachment::Interface));
                }
                Subject::Gateway => side.attachments.push(Attachment::Gateway),
                Subject::Tunnel => side.attachments.push(Attachment::AnyBond),
                Subject::Peer(name) => side.attachments.extend(self.bond(name).map(Attachment::Bond)),
            }
        }
        side
    }

    fn rules(&self) -> Vec<RuleSpec> {
        let rule = |rule: &Rule| RuleSpec {
            name: rule.name.clone(),
            action: rule.action,
            from: self.side(&rule.from),
            to: self.side(&rule.to),
            protocols: rule.protocols.clone(),
            dst_ports: rule.ports.clone(),
            src_ports: rule.source_ports.clone(),
            tenants: self.tenants(&rule.tenants),
        };
        self.services.rules.iter().map(rule).collect()
    }

    fn forwards(&self, interfaces: &[InterfaceSpec]) -> Vec<ForwardSpec> {
        let mut list: Vec<ForwardSpec> = Vec::new();
        for forward in &self.services.forwards {
            let listen: Vec<IpAddr> = match &forward.host {
                ListenHost::Address(address) => vec![*address],
                ListenHost::Interface(name) => interfaces
                    .iter()
                    .filter(|interface| interface.name == *name)
                    .flat_map(|interface| interface.usable_addresses(forward.to.is_ipv4()))
                    .collect(),
            };
            for address in listen {
                list.extend(forward.protocols.iter().map(|protocol| ForwardSpec {
                    protocol: *protocol,
                    listen: SocketAddr::new(address, forward.port),
                    to: forward.to,
                    ports: forward.ports,
                    tenant: self.tenant(forward.tenant.as_ref()),
                    proxy_protocol: forward.proxy_protocol,
                }));
            }
        }
        list
    }

    fn servers(&self) -> Vec<ServerSpec> {
        let unusable = pools::unusable(self.services, Some(self.facts));
        let server = |server: &crate::config::services::VirtualServer| ServerSpec {
            name: server.name.clone(),
            protocol: server.protocol,
            listen: server.listen,
            backends: server
                .backends
                .iter()
                .map(|backend| BackendSpec {
                    address: backend.address,
                    weight: self.overrides.weight(&server.name, backend),
                    connections_max: backend.connections_max,
                    drain_s: backend.drain_s,
                })
                .collect(),
            method: server.method,
            delivery: server.delivery,
            source: server.source,
            source_addresses: server
                .source_addresses
                .iter()
                .filter(|address| !unusable.contains_key(address))
                .copied()
                .collect(),
            connections_max: server.connections_max,
            slow_start_s: server.slow_start_s,
            reset_on_down: server.reset_on_down,
            affinity: server.affinity,
            proxy_protocol: server.proxy_protocol,
        };
        self.services.servers.iter().map(server).collect()
    }

    fn nats(
        &self,
        interfaces: &[InterfaceSpec],
        forwards: &[ForwardSpec],
        servers: &[ServerSpec],
    ) -> Vec<NatSpec> {
        let unusable = pools::unusable(self.services, Some(self.facts));
        let mut list = Vec::with_capacity(self.services.nats.len());
        for nat in &self.services.nats {
            let Some(id) = self.interface(&nat.out) else { continue };
            let mut addresses = nat.addresses.clone();
            addresses.retain(|address| !unusable.contains_key(address));
            let ipv4 = nat.addresses.is_empty() || nat.addresses.iter().any(IpAddr::is_ipv4);
            let of_interface =
                ipv4 && !addresses.iter().any(IpAddr::is_ipv4) && nat.mode == NatMode::AddressAndPort;
            if of_interface {
                let out = interfaces.get(id.index());
                addresses.extend(out.into_iter().flat_map(|out| out.usable_addresses(true)));
            }
            let (mut from, mut from_peers) = (Vec::new(), Vec::new());
            for prefix in &nat.from {
                match prefix {
                    NatFrom::Prefix(net) => from.push(*net),
                    NatFrom::Group(name) => {
                        let group = self.services.groups.iter().find(|group| group.name == *name);
                        from.extend(group.map(|group| self.overrides.members(group)).into_iter().flatten());
                    }
                    NatFrom::Peer(name) => from_peers.extend(self.bond(name)),
                }
            }
            // An empty group means nobody, an empty list of prefixes means everybody.
            if from.is_empty() && from_peers.is_empty() && !nat.from.is_empty() {
                continue;
            }
            let mut spec = NatSpec {
                out: Some(id),
                mode: nat.mode,
                reserved: Vec::new(),
                addresses,
                of_interface,
                from,
                from_peers,
                tenants: self.tenants(&nat.tenants),
                mapping: nat.mapping,
                ports: nat.ports,
                port_choice: nat.port_choice,
                tables: nat.tables,
                flows_per_client_max: nat.flows_per_client_max,
                ports_per_client: nat.ports_per_client,
                assemble_fragments: nat.assemble_fragments,
            };
            spec.reserved = self.not_for_nat(
                interfaces,
                (id, spec.ports),
                &spec.addresses,
                &listens(&spec, forwards, servers),
            );
            list.push(spec);
        }
        list
    }

    /// Ports that a NAT by `out` with these addresses must leave alone: where several machines share the interface, all that are
    /// not leased to this one at each of them.
    fn not_for_nat(
        &self,
        interfaces: &[InterfaceSpec],
        (out, ports): (InterfaceId, (u16, u16)),
        addresses: &[IpAddr],
        listens: &[(SocketAddr, u16)],
    ) -> Vec<(u16, u16)> {
        let is_shared =
            self.services.interfaces.get(out.index()).is_some_and(|interface| interface.shared.is_some());
        let is_shared = is_shared && self.config.cluster.is_some();
        let kept = (!is_shared).then(|| kept_ports(self.facts.ephemeral_ports, ports));
        let mut reserved = self.reserved(interfaces, addresses, listens, kept);
        if !is_shared {
            return reserved;
        }
        let of_interface = interfaces.get(out.index());
        let mut all: Vec<IpAddr> = addresses.to_vec();
        if all.is_empty() {
            all.extend(of_interface.into_iter().flat_map(|out| out.usable_addresses(true)));
        }
        if all.is_empty() {
            reserved.push((0, u16::MAX));
        }
        reserved.extend(all.iter().flat_map(|address| self.not_leased(address)));
        reserved
    }

    /// Ports of an address that this machine has not by lease.
    fn not_leased(&self, address: &IpAddr) -> Vec<(u16, u16)> {
        let leased = |block: u8| {
            let blocks = self.facts.port_blocks.iter().flatten();
            blocks.into_iter().any(|lease| lease.block == block && lease.address == *address)
        };
        let range = |block: u8| {
            let first = u16::from(block) * LEASE_PORTS;
            (first, first + (LEASE_PORTS - 1))
        };
        (0..64u8).filter(|block| !leased(*block)).map(range).collect()
    }

    /// Addresses of shared interfaces, with the ports that other machines have.
    fn others_ports(&self, interfaces: &[InterfaceSpec]) -> BTreeMap<IpAddr, Vec<(u16, u16)>> {
        let in_cluster = self.config.cluster.is_some();
        let pairs = self.services.interfaces.iter().zip(interfaces);
        let shared = pairs.filter(|(interface, _)| in_cluster && interface.shared.is_some());
        let addresses = shared.flat_map(|(_, spec)| spec.addresses.iter().map(|net| net.addr()));
        addresses.map(|address| (address, self.not_leased(&address))).collect()
    }

    /// Ports that a NAT with these addresses must leave alone: the host's own and those that services listen on.
    fn reserved(
        &self,
        interfaces: &[InterfaceSpec],
        addresses: &[IpAddr],
        listens: &[(SocketAddr, u16)],
        kept: Option<(u16, u16)>,
    ) -> Vec<(u16, u16)> {
        let of_host = |address: &IpAddr| {
            interfaces.iter().flat_map(|interface| &interface.addresses).any(|net| net.addr() == *address)
        };
        let mut list: Vec<(u16, u16)> = listens
            .iter()
            .filter(|(listen, _)| addresses.contains(&listen.ip()))
            .map(|(listen, last)| (listen.port(), *last))
            .collect();
        if addresses.iter().any(of_host) {
            // By leases the manager says whose ports are whose; a range that the host takes would be a part of somebody's.
            list.extend(kept);
            list.extend(self.config.node.listen.map(|port| (port, port)));
            list.extend(self.facts.held_ports.of(addresses).map(|port| (port, port)));
        }
        merged(list)
    }

    fn leases(&self) -> Vec<LeaseSpec> {
        let lease = |lease: &Lease| LeaseSpec {
            name: lease.name.clone(),
            tenant: self.tenant(lease.tenant.as_ref()),
            from: lease.from,
            address: lease.address,
            first_port: lease.first_port,
            ports: lease.ports,
        };
        self.services.leases.iter().chain(self.overrides.leases()).map(lease).collect()
    }
}

/// The host's devices with networks of their own that are none of ours: containers, virtual machines, a VPN. What comes by them is the
/// kernel's.
pub(super) fn other_devices(config: &Config, facts: &HostFacts) -> Vec<String> {
    let interfaces = &config.services.interfaces;
    let is_ours = |device: &DeviceFacts| {
        Some(device.index) == facts.tun_index
            || interfaces.iter().any(|interface| interface.device == device.name)
            || config.wans.iter().any(|wan| wan.interface.covers(&device.name))
    };
    let on_ours = |device: &DeviceFacts| {
        let below = facts.devices.iter().find(|below| Some(below.index) == device.lies_on);
        below.is_some_and(is_ours)
    };
    let leads = |device: &&DeviceFacts| {
        !device.loopback && device.addresses.iter().any(|net| !is_of_link(net.addr()))
    };
    let others = facts.devices.iter().filter(leads).filter(|device| !is_ours(device) && !on_ours(device));
    others.map(|device| device.name.clone()).collect()
}

/// Sources that backends behind peers see: the addresses of the tunnel device, of a version without one that of an interface. None in a cluster:
/// where several machines have an address nobody can say to which of them answers come.
fn peer_sources(config: &Config, interfaces: &[InterfaceSpec]) -> Vec<IpAddr> {
    if config.cluster.is_some() {
        return Vec::new();
    }
    let mut list: Vec<IpAddr> = config.tun.addresses.iter().map(IpNet::addr).collect();
    for ipv4 in [true, false] {
        if !list.iter().any(|address| address.is_ipv4() == ipv4) {
            list.extend(interfaces.iter().flat_map(|interface| interface.usable_addresses(ipv4)).next());
        }
    }
    list
}

/// Ports that services take from a NAT: the first endpoint, and the last port.
fn listens(nat: &NatSpec, forwards: &[ForwardSpec], servers: &[ServerSpec]) -> Vec<(SocketAddr, u16)> {
    let of_forwards = forwards.iter().filter(|forward| !forward.takes_the_rest(nat));
    let of_forwards = of_forwards.map(|forward| (forward.listen, forward.last_port()));
    let of_servers = servers.iter().map(|server| (server.listen, server.listen.port()));
    of_forwards.chain(of_servers).collect()
}

/// Link of an interface, whose device may be missing, with the devices on top of it.
fn link_of(device: Option<&DeviceFacts>, tops: &[&DeviceFacts]) -> LinkSpec {
    match device.and_then(|device| device.link.clone()) {
        Some(LinkSpec::Ethernet { mac, .. }) => {
            let more = tops.iter().filter_map(|top| top.link.as_ref()).map(LinkSpec::mac).collect();
            LinkSpec::Ethernet { mac, more }
        }
        Some(LinkSpec::PointToPoint) => LinkSpec::PointToPoint,
        None => LinkSpec::ethernet([0; 6]),
    }
}

/// Whether the configuration says that an interface leads out: itself, by a NAT or by a WAN.
fn leads_out(config: &Config, interface: &Interface) -> bool {
    interface.outside.unwrap_or_else(|| {
        config.services.nats.iter().any(|nat| nat.out == interface.name)
            || config.wans.iter().any(|wan| wan.interface.covers(&interface.device))
    })
}

/// Whether an address means something on one link only, or is a group's of IPv6: each device has routes to both.
fn is_of_link(address: IpAddr) -> bool {
    is_link_local(address) || (address.is_ipv6() && address.is_multicast())
}

/// Whether the configuration says where the way out is.
fn has_way_out(config: &Config) -> bool {
    let interfaces = &config.services.interfaces;
    !config.wans.is_empty() || interfaces.iter().any(|interface| leads_out(config, interface))
}

/// Whether an interface leads inside: others are said to lead out, and this one is not.
pub(crate) fn is_inside(config: &Config, interface: &Interface) -> bool {
    has_way_out(config) && !leads_out(config, interface)
}

/// A tenant's number: its place in the configuration, after the shared one.
pub(crate) fn tenant_number(services: &Services, name: Option<&String>) -> u16 {
    let place = name.and_then(|name| services.tenants.iter().position(|tenant| tenant == name));
    place.and_then(|place| u16::try_from(place + 1).ok()).unwrap_or(0)
}

/// The interface with the longest network that contains an address.
fn interface_towards(interfaces: &[InterfaceSpec], address: IpAddr) -> Option<InterfaceId> {
    let lengths = interfaces.iter().enumerate().filter_map(|(place, interface)| {
        let nets = interface.addresses.iter().filter(|net| net.contains(&address));
        nets.map(|net| net.prefix_len()).max().map(|length| (length, std::cmp::Reverse(place)))
    });
    lengths.max().and_then(|(_, place)| u16::try_from(place.0).ok()).map(InterfaceId)
}

/// Ranges in order, those that touch joined.
fn merged(mut ranges: Vec<(u16, u16)>) -> Vec<(u16, u16)> {
    ranges.sort_unstable();
    let mut list: Vec<(u16, u16)> = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        match list.last_mut() {
            Some(before) if first <= before.1.saturating_add(1) => before.1 = before.1.max(last),
            _ => list.push((first, last)),
        }
    }
    list
}

#[cfg(test)]
pub(crate) mod tests;
