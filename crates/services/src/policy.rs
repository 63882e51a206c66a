//! The compiled form of a [`GatewaySpec`]: immutable, shared by all cores, replaced as a whole by a reload.

mod inner;
mod kept;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::hash::ConfigState;
use hashbrown::HashSet;
use ipnet::IpNet;
use packet::DropReason;
use packet::attachment::{BondId, Egress, Ingress, InterfaceId};
use packet::flow::FlowKey;
use packet::ip::is_link_local;

use crate::balance::Balancer;
use crate::nat::{NatClient, NatEvent, NatPolicy};
use crate::route::{Fib, Route, RouteQuery, SHARED_TENANT};
use crate::rules::{Question, RuleSet, Verdict, carry_hits, places_before};
use crate::spec::{
    ForwardSpec, GatewaySpec, HostMode, InterfaceSpec, Limits, LinkSpec, Mapping, NatMode, NatSpec,
    PORTS_DEFAULT, PeerSpec, PortChoice, RouteAction, RouteSpec, RuleAction, ServerSpec, TCP, Timeouts, UDP,
    kept_ports,
};
use inner::Inners;
use kept::KeptTargets;

/// Service that a new flow is addressed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service<'a> {
    /// A virtual server, by id.
    Server(u16),
    /// A port forward.
    Forward(&'a ForwardSpec),
}

/// Tenants of whom a packet's own core may not know the flow, asked at most.
const TENANTS_ASKED_MAX: usize = 4;

/// Tenants of what comes in, by interface and bond.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tenants {
    interfaces: Vec<u16>,
    bonds: Vec<u16>,
}

impl Tenants {
    fn of_spec(spec: &GatewaySpec) -> Self {
        let count = spec.peers.iter().map(|peer| peer.id.index() + 1).max().unwrap_or(0);
        let mut bonds = vec![SHARED_TENANT; count];
        for peer in &spec.peers {
            if let Some(tenant) = bonds.get_mut(peer.id.index()) {
                *tenant = peer.tenant;
            }
        }
        Self { interfaces: spec.interfaces.iter().map(|interface| interface.tenant).collect(), bonds }
    }

    /// The tenant of what comes in here; the shared one for the host.
    #[inline]
    #[must_use]
    pub fn of(&self, ingress: Ingress) -> u16 {
        let tenant = match ingress {
            Ingress::Interface(id) => self.interfaces.get(id.index()),
            Ingress::Bond(id) => self.bonds.get(id.index()),
            Ingress::Host => None,
        };
        tenant.copied().unwrap_or(SHARED_TENANT)
    }
}

/// Interfaces and bonds, as far as a packet's way depends on them.
struct Attachments {
    tenants: Tenants,
    /// Peers' allowed-ips, by their tenants.
    behind_peers: Fib,
}

impl Attachments {
    fn of_spec(spec: &GatewaySpec) -> Self {
        Self {
            tenants: Tenants::of_spec(spec),
            behind_peers: Fib::compile(&routes_to_peers(&spec.peers), &[]),
        }
    }
}

/// Facts of NAT and services on which the owner of a packet depends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnerFacts {
    /// No packet's owner depends on more than the hash of its tuple.
    pub by_hash_only: bool,
    /// Some NAT has endpoint-independent mappings.
    pub maps_endpoints: bool,
    /// Some NAT keeps clients' ports.
    pub preserves_ports: bool,
}

impl OwnerFacts {
    fn of(spec: &GatewaySpec, kept: &KeptTargets) -> Self {
        let maps_endpoints = spec.nats.iter().any(|nat| nat.mapping == Mapping::EndpointIndependent);
        let preserves_ports = spec.nats.iter().any(|nat| nat.port_choice == PortChoice::Preserve);
        let by_hash_only = kept.is_empty() && !maps_endpoints && !preserves_ports && spec.tenants.len() < 2;
        Self { by_hash_only, maps_endpoints, preserves_ports }
    }
}

/// Everything a core needs to decide a flow.
pub struct Policy {
    /// Version: a flow decided under another one is decided again.
    pub era: u32,
    /// The spec it was made from.
    pub spec: GatewaySpec,
    /// Firewall.
    pub rules: RuleSet,
    /// Routes.
    pub fib: Fib,
    attachments: Attachments,
    /// Source NAT, forwards, leases.
    pub nat: Arc<NatPolicy>,
    /// Virtual servers.
    pub balancer: Arc<Balancer>,
    /// Facts of NAT and services on which the owner of a packet depends.
    pub owners: OwnerFacts,
    /// Own addresses.
    own: HashSet<IpAddr, ConfigState>,
    /// Inside endpoint → listen addresses whose flows keep the client's tuple (row C4).
    kept: KeptTargets,
    /// Endpoints that lead to services for the host's other devices.
    inners: Inners,
    /// How many NAT rules there are: the operator's, then those that serve virtual servers.
    pub nat_rules: usize,
    /// NAT rules that serve virtual servers, by server, by what its backends are reached, and whether for clients beside them alone.
    server_nats: BTreeMap<(u16, Egress, bool), u16>,
    /// Interfaces with a source NAT that hides what is inside.
    hiding: Vec<InterfaceId>,
    /// Era of the policy before, and where the rules stand in it.
    before: Option<(u32, Vec<Option<usize>>)>,
}

impl Policy {
    /// As [`Policy::compile_keyed`], with the secret of the policy before; the first one's is 0.
    ///
    /// # Errors
    /// As there.
    pub fn compile(
        spec: GatewaySpec,
        before: Option<&Policy>,
        now_ns: u64,
    ) -> Result<(Self, Vec<NatEvent>), String> {
        Self::compile_keyed(spec, before, now_ns, 0)
    }

    /// Compiles a spec. `before` lends its live state: health and counters of backends, leases. The events are for the
    /// log of translations.
    ///
    /// `secret` keeps clients from choosing their backend; only the first policy's counts.
    ///
    /// # Errors
    /// Text for the operator, when rules cannot be compiled or leases not be given.
    pub fn compile_keyed(
        spec: GatewaySpec,
        before: Option<&Policy>,
        now_ns: u64,
        secret: u64,
    ) -> Result<(Self, Vec<NatEvent>), String> {
        let rules = match before {
            Some(before) => before.rules.recompile(&spec.rules, &spec.groups, spec.default_action)?,
            None => RuleSet::compile(&spec.rules, &spec.groups, spec.default_action)?,
        };
        let fib = Fib::compile(&spec.routes, &spec.route_rules);
        let mut nats = spec.nats.clone();
        // Nobody gets a port on which a virtual server listens.
        for nat in &mut nats {
            let here = spec.servers.iter().filter(|server| nat.addresses.contains(&server.listen.ip()));
            nat.reserved.extend(here.map(|server| (server.listen.port(), server.listen.port())));
        }
        let own = own_addresses(&spec);
        let server_nats = add_server_nats(&spec, &fib, &own, &mut nats);
        let nat_rules = nats.len();
        let nat = NatPolicy::compile(&nats, &spec.forwards, &spec.leases, &spec.interfaces)
            .with_tunnels(&spec.host.tunnels);
        let (nat, events, errors) = match before {
            Some(before) => nat.keeping(&before.nat, now_ns),
            None => {
                let (events, errors) = nat.begin(now_ns);
                (nat, events, errors)
            }
        };
        if let Some(error) = errors.first() {
            return Err(format!("a port lease cannot be given: {error}"));
        }
        let balancer = match before {
            Some(before) => Balancer::compile(&spec.servers, Some(&before.balancer)),
            None => Balancer::compile_keyed(&spec.servers, None, secret),
        };
        let kept = KeptTargets::of(&spec, before.map(|before| &before.kept));
        let translating = spec.nats.iter().filter(|nat| nat.mode == NatMode::AddressAndPort);
        let hiding = translating.filter_map(|nat| nat.out).collect();
        let policy = Self {
            era: before.map_or(1, |policy| policy.era.wrapping_add(1)),
            rules,
            fib,
            nat: Arc::new(nat),
            balancer: Arc::new(balancer),
            owners: OwnerFacts::of(&spec, &kept),
            attachments: Attachments::of_spec(&spec),
            own,
            kept,
            inners: Inners::of(&spec.host.inners),
            server_nats,
            nat_rules,
            hiding,
            before: before.map(|before| (before.era, places_before(&before.spec.rules, &spec.rules))),
            spec,
        };
        Ok((policy, events))
    }

    /// The hit counts of these rules, when those under the policy `before` were `hits`.
    #[must_use]
    pub fn carry_hits(&self, before: &Policy, hits: &[u64]) -> Vec<u64> {
        match &self.before {
            Some((era, places)) if *era == before.era => carry_hits(places, hits),
            // A policy between the two was never followed.
            _ => carry_hits(&places_before(&before.spec.rules, &self.spec.rules), hits),
        }
    }

    /// Limits.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.spec.limits
    }

    /// Timeouts.
    #[must_use]
    pub fn timeouts(&self) -> &Timeouts {
        &self.spec.timeouts
    }

    /// An interface.
    #[must_use]
    pub fn interface(&self, id: InterfaceId) -> Option<&InterfaceSpec> {
        self.spec.interfaces.get(id.index())
    }

    /// Tenant of what comes in somewhere (row R11).
    #[inline]
    #[must_use]
    pub fn tenant_of(&self, ingress: Ingress) -> u16 {
        self.attachments.tenants.of(ingress)
    }

    /// Tenants of interfaces and bonds.
    #[must_use]
    pub fn tenants(&self) -> &Tenants {
        &self.attachments.tenants
    }

    /// Tenant of what comes back from where packets leave.
    #[inline]
    #[must_use]
    pub fn tenant_behind(&self, egress: Egress) -> u16 {
        match egress {
            Egress::Interface(id) => self.attachments.tenants.of(Ingress::Interface(id)),
            Egress::Bond(id) => self.attachments.tenants.of(Ingress::Bond(id)),
            Egress::Host | Egress::Kernel | Egress::Core(_) | Egress::Unit(_) => SHARED_TENANT,
        }
    }

    /// The peer of a bond.
    #[must_use]
    pub fn peer(&self, id: BondId) -> Option<&PeerSpec> {
        self.spec.peers.iter().find(|peer| peer.id == id)
    }

    /// The route of a packet. What the host's own routes brought here without one of ours is for the peer whose
    /// allowed-ips have its destination.
    ///
    /// # Errors
    /// As what the packet is to be dropped.
    pub fn route(&self, query: &RouteQuery) -> Result<Route, DropReason> {
        match self.fib.find(query) {
            Err(DropReason::NoRoute) if query.ingress == Some(Ingress::Host) => {
                let behind = self.attachments.behind_peers.lookup(query.tenant, query.key.dst);
                behind.ok_or(DropReason::NoRoute)
            }
            found => found.map(|found| found.route),
        }
    }

    /// Whether TCP between two interfaces is followed loosely: its other direction may take another way.
    #[must_use]
    pub fn is_loose(&self, ingress: Ingress, egress: Egress) -> bool {
        let said = |id: Option<InterfaceId>| {
            id.is_some_and(|id| self.interface(id).is_some_and(|interface| interface.loose_tcp))
        };
        let back = ingress.interface().is_some() && egress == Egress::from(ingress);
        back || said(ingress.interface()) || said(egress.interface())
    }

    /// Tenants whose own addresses `dst` may be one of, the first few: what comes in as the shared tenant's packet may
    /// answer one of them.
    pub fn tenants_with(&self, dst: IpAddr) -> impl Iterator<Item = u16> + '_ {
        let own = self.fib.tenants().filter(|tenant| *tenant != SHARED_TENANT);
        own.filter(move |tenant| self.fib.has_own(*tenant, dst)).take(TENANTS_ASKED_MAX)
    }

    /// Verdict of the firewall on a new flow. The host's own packets into a bond pass unless a rule says otherwise, as
    /// those that it sends by its interfaces.
    #[must_use]
    pub fn verdict(&self, question: &Question<'_>) -> Verdict {
        let key = self.as_asked(question.key);
        let question = &Question { key: &key, ..*question };
        let verdict = self.rules.verdict(question);
        let own = question.ingress == Ingress::Host && self.is_asked_by_host(question);
        if (own || self.is_kernels(question)) && verdict.rule.is_none() {
            return Verdict { action: RuleAction::Allow, rule: None };
        }
        match self.through_action(question) {
            Some(action) if verdict.rule.is_none() => Verdict { action, rule: None },
            _ => verdict,
        }
    }

    /// Whether a packet of the host comes by here only because we have its way: to a peer, to a virtual server or forward of ours, or
    /// from an address that NAT shares, where its port is a flow's.
    fn is_asked_by_host(&self, question: &Question<'_>) -> bool {
        matches!(question.egress, Egress::Bond(_))
            || self.nat.is_outside(question.key.src)
            || self.server_or_forward(question.key).is_some()
    }

    /// Whether a packet is one of those about which the host's own firewall decides: for it, or passed on by it. Not what is for a
    /// virtual server, wherever the backend is that it got.
    #[must_use]
    pub fn is_kernels(&self, question: &Question<'_>) -> bool {
        self.spec.host.mode == HostMode::Native
            && question.ingress.interface().is_some()
            && matches!(question.egress, Egress::Host | Egress::Kernel)
            && !matches!(self.server_or_forward(question.key), Some(Service::Server(_)))
    }

    /// The default of its own that an interface has for what passes through: not to this gateway or a service of it, not back to
    /// where it came from.
    fn through_action(&self, question: &Question<'_>) -> Option<RuleAction> {
        let interface = self.spec.interfaces.get(question.ingress.interface()?.index())?;
        let through = question.egress != Egress::Host
            && question.egress != Egress::from(question.ingress)
            && !self.is_addressed(question.key);
        interface.through_action.filter(|_| through)
    }

    /// Tenant of the interface towards an address.
    #[must_use]
    pub fn tenant_towards(&self, address: IpAddr, tenant: u16) -> u16 {
        self.fib.lookup(tenant, address).map_or(0, |route| self.tenant_behind(route.egress))
    }

    /// Whether an address is one of the gateway's own.
    #[must_use]
    pub fn is_own(&self, address: IpAddr) -> bool {
        self.own.contains(&address)
    }

    /// Addresses of the gateway itself of which flows may get ports.
    pub fn shared_addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.own.iter().copied().filter(|address| self.nat.is_outside(*address))
    }

    /// Whether a program of the host has had this port for a while, of an address that it shares with flows.
    #[must_use]
    pub fn is_held(&self, protocol: u8, address: IpAddr, port: u16) -> bool {
        self.nat.is_shared(address) && self.spec.host.held_ports.has(protocol, address, port)
    }

    /// Whether a source that comes in at an interface is a neighbour at another one and not at this: nobody there
    /// has it, but whoever wants to pass for it (RFC 2827, RFC 3704).
    #[must_use]
    pub fn is_elsewhere(&self, at: InterfaceId, source: IpAddr) -> bool {
        let has = |interface: &InterfaceSpec| interface.addresses.iter().any(|net| net.contains(&source));
        let neighbor_at = |route: &Route| {
            let other = route.egress.interface().filter(|interface| *interface != at);
            // A point-to-point link needs no router's address: only what is in its own network is a neighbour there.
            let near = |interface: &InterfaceSpec| interface.link != LinkSpec::PointToPoint || has(interface);
            route.via.is_none() && other.and_then(|id| self.interface(id)).is_some_and(near)
        };
        !is_link_local(source)
            && self.fib.lookup(self.tenant_of(Ingress::Interface(at)), source).filter(neighbor_at).is_some()
            && !self.interface(at).is_some_and(has)
    }

    /// Whether an address is the broadcast address of one of an interface's networks. Networks of one or two addresses
    /// have none (RFC 3021).
    #[must_use]
    pub fn is_broadcast(&self, at: InterfaceId, address: IpAddr) -> bool {
        let IpAddr::V4(address) = address else { return false };
        self.interface(at).is_some_and(|interface| {
            interface.addresses.iter().any(|net| match net {
                IpNet::V4(net) => net.prefix_len() <= 30 && net.broadcast() == address,
                IpNet::V6(_) => false,
            })
        })
    }

    /// Whether a packet is addressed to the gateway, as its sender wrote it: an own or outside address, or where a virtual
    /// server or forward listens.
    #[must_use]
    pub fn is_addressed(&self, key: &FlowKey) -> bool {
        self.is_own(key.dst) || self.nat.is_outside(key.dst) || self.server_or_forward(key).is_some()
    }

    /// An own address of where something came in, for answers to a receiver there: of several the one most like the receiver, or like
    /// the router on the way to it (RFC 6724 §5, rule 8); without any there one of another interface of the tenant (RFC 4443 §2.2 d).
    /// One of a link alone is for receivers on that, and for others only where that is all there is: routers do not pass it on.
    #[must_use]
    pub fn address_of(&self, ingress: Ingress, receiver: IpAddr) -> Option<IpAddr> {
        let there = match ingress {
            Ingress::Interface(id) => self.interface(id).map(|interface| &interface.addresses),
            Ingress::Bond(_) => Some(&self.spec.host.tunnel_addresses),
            Ingress::Host => None,
        };
        let there = there.map(Vec::as_slice).unwrap_or_default();
        let tenant = self.tenant_of(ingress);
        let is_of_family = |address: IpAddr| address.is_ipv4() == receiver.is_ipv4();
        let route = self.fib.lookup(tenant, receiver).filter(|route| route.egress == Egress::from(ingress));
        // A link-local one says nothing of networks.
        let router =
            route.and_then(|route| route.via).filter(|via| is_of_family(*via) && !is_link_local(*via));
        let near = router.unwrap_or(receiver);
        let best = |nets: &[IpNet]| {
            let is_usable = |net: &&IpNet| {
                is_of_family(net.addr()) && (!is_link_local(net.addr()) || is_link_local(receiver))
            };
            let nearer = |best, next| if alike(next, near) > alike(best, near) { next } else { best };
            nets.iter().filter(is_usable).reduce(nearer).map(IpNet::addr)
        };
        let of_tenant = || self.spec.interfaces.iter().filter(|interface| interface.tenant == tenant);
        best(there)
            .or_else(|| of_tenant().find_map(|interface| best(&interface.addresses)))
            .or_else(|| there.iter().map(IpNet::addr).find(|address| is_of_family(*address)))
            .or_else(|| self.spec.interfaces.iter().find_map(|interface| best(&interface.addresses)))
    }

    /// The service a new flow is addressed to.
    #[must_use]
    pub fn server_or_forward(&self, key: &FlowKey) -> Option<Service<'_>> {
        if !matches!(key.protocol, TCP | UDP) {
            return None;
        }
        let dst = SocketAddr::new(key.dst, key.dst_port);
        let dst = self.inners.listen(key.protocol, dst).unwrap_or(dst);
        self.balancer
            .find(key.protocol, dst)
            .map(Service::Server)
            .or_else(|| self.nat.forward(key.protocol, dst).map(Service::Forward))
    }

    /// A key as its sender wrote it, before the kernel translated it to an endpoint that leads to a service.
    #[must_use]
    pub fn as_asked(&self, key: &FlowKey) -> FlowKey {
        let listen = self.inners.listen(key.protocol, SocketAddr::new(key.dst, key.dst_port));
        listen.map_or(*key, |listen| key.with_destination(listen.ip(), listen.port()))
    }

    /// Whether an address is known to the kernel alone, as the way to services.
    #[must_use]
    pub fn is_inner(&self, address: IpAddr) -> bool {
        self.inners.has(address)
    }

    /// Whether the operator wants fragments of a NAT rule's flows assembled.
    #[must_use]
    pub fn assembles(&self, rule: u16) -> bool {
        self.spec.nats.get(usize::from(rule)).is_some_and(|nat| nat.assemble_fragments)
    }

    /// The NAT rule that serves a virtual server's source translation towards an interface, a peer or the host, for a client that came
    /// in there.
    #[must_use]
    pub fn nat_of_server(&self, server: u16, egress: Egress, ingress: Ingress) -> Option<u16> {
        let beside = (egress == Egress::from(ingress)).then(|| self.server_nats.get(&(server, egress, true)));
        beside.flatten().or_else(|| self.server_nats.get(&(server, egress, false))).copied()
    }

    /// The virtual server whose source translation a NAT rule is; `None`: it is one of the operator's.
    #[must_use]
    pub fn server_of_nat(&self, rule: u16) -> Option<u16> {
        self.server_nats.iter().find(|(_, known)| **known == rule).map(|((server, ..), _)| *server)
    }

    /// A NAT rule that serves a virtual server's source translation in this mode, and has this outside address where it gives
    /// one.
    #[must_use]
    pub fn nat_of_server_named(&self, server: u16, mode: NatMode, outside: IpAddr) -> Option<u16> {
        let of_server = self.server_nats.iter().filter(|((known, ..), _)| *known == server);
        let mut rules = of_server.map(|(_, rule)| *rule);
        rules.find(|rule| {
            self.nat.mode(*rule) == Some(mode)
                && (mode != NatMode::AddressAndPort || self.nat.addresses(*rule).contains(&outside))
        })
    }

    /// Listen addresses of services that reach this endpoint with the client's tuple kept.
    pub fn kept_source_listens(
        &self,
        protocol: u8,
        endpoint: SocketAddr,
    ) -> impl Iterator<Item = SocketAddr> + '_ {
        self.kept.listens(protocol, endpoint)
    }

    /// Whether packets of this client that leave by `egress` get an endpoint-independent mapping.
    #[must_use]
    pub fn maps_endpoints_of(&self, egress: Egress, client: &NatClient) -> bool {
        self.endpoint_rule(egress, client).is_some()
    }

    /// The NAT rule by which they get it.
    #[must_use]
    pub fn endpoint_rule(&self, egress: Egress, client: &NatClient) -> Option<u16> {
        self.nat.rule_for(egress, client).filter(|rule| self.nat.is_independent(*rule))
    }

    /// A client that comes in at an interface and talks to an outside endpoint that may be another client's mapping: the
    /// interface by which its own mapping leads, if it has an endpoint-independent one there.
    #[must_use]
    pub fn hairpin_out(&self, key: &FlowKey, tenant: u16, ingress: Ingress) -> Option<InterfaceId> {
        let at = ingress.interface().filter(|_| self.owners.maps_endpoints)?;
        self.nat.mapping_core_of(key, 1)?;
        let rule = self.nat.rule_for_hairpin(key.dst, &NatClient::of(key, tenant, ingress))?;
        let nat = self.spec.nats.get(usize::from(rule))?;
        nat.out.filter(|out| self.nat.is_independent(rule) && *out != at)
    }

    /// Whether an interface has a NAT behind which hosts hide: nothing new comes in there unasked.
    #[must_use]
    pub fn hides_inside(&self, interface: Option<InterfaceId>) -> bool {
        interface.is_some_and(|interface| self.hiding.contains(&interface))
    }

    /// Whether any interface has such a NAT.
    #[inline]
    #[must_use]
    pub fn hides(&self) -> bool {
        !self.hiding.is_empty()
    }
}

/// Addresses of the gateway itself: those of its interfaces, and those that are routed to the host.
fn own_addresses(spec: &GatewaySpec) -> HashSet<IpAddr, ConfigState> {
    let of_interfaces = spec.interfaces.iter().flat_map(|interface| &interface.addresses);
    let mut own: HashSet<IpAddr, ConfigState> = of_interfaces.map(IpNet::addr).collect();
    let to_host = |route: &&RouteSpec| {
        let one = route.prefix.prefix_len() == route.prefix.max_prefix_len();
        one && route.egress == Egress::Host && route.action == RouteAction::Forward
    };
    own.extend(spec.routes.iter().filter(to_host).map(|route| route.prefix.addr()));
    own
}

/// How like another address one is: whether that is in its network, then the bits that they have in common from the first on, no more
/// than its network has, so that of two in one network neither is nearer. None with one of the other version.
fn alike(net: &IpNet, other: IpAddr) -> (bool, u32) {
    let common = match (net.addr(), other) {
        (IpAddr::V4(one), IpAddr::V4(other)) => (one.to_bits() ^ other.to_bits()).leading_zeros(),
        (IpAddr::V6(one), IpAddr::V6(other)) => (one.to_bits() ^ other.to_bits()).leading_zeros(),
        _ => 0,
    };
    (net.contains(&other), common.min(net.prefix_len().into()))
}

fn routes_to_peers(peers: &[PeerSpec]) -> Vec<RouteSpec> {
    let routes = peers.iter().flat_map(|peer| {
        let egress = Egress::Bond(peer.id);
        peer.allowed_ips.iter().map(move |prefix| RouteSpec::new(peer.tenant, *prefix, egress, None))
    });
    routes.collect()
}

/// Adds the NAT rules that serve virtual servers; their numbers.
fn add_server_nats(
    spec: &GatewaySpec,
    fib: &Fib,
    own: &HashSet<IpAddr, ConfigState>,
    nats: &mut Vec<NatSpec>,
) -> BTreeMap<(u16, Egress, bool), u16> {
    let mut numbers = BTreeMap::new();
    for (number, server) in (0..).zip(&spec.servers) {
        for out in ways_to_backends(fib, own, server) {
            let here = matches!(out, Egress::Host | Egress::Kernel);
            let keeps_address = server.source == NatMode::PortOnly && !here;
            // A client beside a backend would get the answer past us.
            let beside = (keeps_address && out.interface().is_some()).then_some((true, false));
            for (beside, keeps_address) in std::iter::once((false, keeps_address)).chain(beside) {
                if let Some(nat) = server_nat(spec, out, server, keeps_address) {
                    numbers.insert((number, out, beside), nats.len() as u16);
                    nats.push(nat);
                }
            }
        }
    }
    numbers
}

/// By what a server's backends are reached, each once: interfaces, the host itself, its other devices, peers.
fn ways_to_backends(fib: &Fib, own: &HashSet<IpAddr, ConfigState>, server: &ServerSpec) -> Vec<Egress> {
    let mut ways: Vec<Egress> = Vec::new();
    for backend in &server.backends {
        let address = backend.address.ip();
        let route = || fib.lookup(0, address).map(|route| route.egress);
        let way = if own.contains(&address) { Some(Egress::Host) } else { route() };
        ways.extend(way.filter(|way| !ways.contains(way)));
    }
    ways
}

/// The addresses that backends by one way see instead of clients' ones.
fn server_sources(spec: &GatewaySpec, out: Egress, server: &ServerSpec) -> Vec<IpAddr> {
    let ipv4 = server.listen.is_ipv4();
    let of_version = |known: &[IpAddr]| -> Vec<IpAddr> {
        known.iter().filter(|address| address.is_ipv4() == ipv4).copied().collect()
    };
    let own = |id: InterfaceId| spec.interfaces.get(id.index())?.usable_addresses(ipv4).next();
    match out {
        Egress::Host | Egress::Kernel => of_version(&spec.host.client_addresses),
        Egress::Interface(_) | Egress::Bond(_) if !server.source_addresses.is_empty() => {
            server.source_addresses.clone()
        }
        Egress::Interface(id) => own(id).into_iter().collect(),
        Egress::Bond(_) => of_version(&spec.host.peer_sources),
        Egress::Core(_) | Egress::Unit(_) => Vec::new(),
    }
}

/// The source NAT of a virtual server towards one interface, a peer or the host. It is there for servers that keep the client's source too: a
/// client beside its backend needs it, and the host would answer any other source past us. `None`: nothing answers to an address of ours
/// by this way.
fn server_nat(spec: &GatewaySpec, out: Egress, server: &ServerSpec, keeps_address: bool) -> Option<NatSpec> {
    let addresses = server_sources(spec, out, server);
    if addresses.is_empty() && out.interface().is_none() {
        return None;
    }
    let mut reserved = spec
        .nats
        .iter()
        .find(|nat| nat.addresses.iter().any(|address| addresses.contains(address)))
        .map_or_else(Vec::new, |nat| nat.reserved.clone());
    let of_host = |address: &IpAddr| {
        let mut own = spec.interfaces.iter().flat_map(|interface| &interface.addresses).map(IpNet::addr);
        spec.host.peer_sources.contains(address) || own.any(|own| own == *address)
    };
    let others: Vec<_> = addresses.iter().filter_map(|address| spec.host.others_ports.get(address)).collect();
    reserved.extend(others.iter().copied().flatten());
    if !keeps_address && addresses.iter().any(of_host) {
        // The host connects from this address too, and its answers must not look like the clients'. Where other machines have it
        // leases say whose ports are whose, and a range that the host takes would be a part of somebody's.
        reserved.extend(others.is_empty().then_some(kept_ports(spec.host.ports, PORTS_DEFAULT)));
        reserved.extend(spec.host.held_ports.of(&addresses).map(|port| (port, port)));
    }
    Some(NatSpec {
        out: None,
        mode: if keeps_address { NatMode::PortOnly } else { NatMode::AddressAndPort },
        addresses,
        from: Vec::new(),
        from_peers: Vec::new(),
        tenants: Vec::new(),
        of_interface: false,
        mapping: Mapping::EndpointDependent,
        ports: PORTS_DEFAULT,
        port_choice: PortChoice::Random,
        reserved,
        tables: 256,
        flows_per_client_max: 0,
        ports_per_client: 0,
        assemble_fragments: false,
    })
}
