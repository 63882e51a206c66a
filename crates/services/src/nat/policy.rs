//! The operator's `[[nat]]` and `[[forward]]` compiled: which rule serves a new flow, whose address is what.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::hash::ConfigState;
use hashbrown::{HashMap, HashSet};
use ipnet::IpNet;
use packet::attachment::{BondId, Egress, Ingress, InterfaceId};
use packet::flow::FlowKey;

use crate::spec::{
    ForwardSpec, HostTunnel, InterfaceSpec, LeaseSpec, Mapping, NatMode, NatSpec, PORTS_DEFAULT, PortChoice,
};

use super::BindRequest;
use super::lease::{LeaseError, Leases};
use super::log::NatEvent;
use super::networks::Addresses;
use super::port_set::{Blocks, PortSet};

/// Most port tables of one address and core.
pub const TABLES_MAX: u16 = 256;

/// Who sends what a rule is asked about.
#[derive(Clone, Copy, Debug)]
pub struct NatClient {
    /// Its address.
    pub address: IpAddr,
    /// Its tenant.
    pub tenant: u16,
    /// By what its packets come in.
    pub ingress: Ingress,
}

impl NatClient {
    /// The sender of a packet of this key.
    #[must_use]
    pub const fn of(key: &FlowKey, tenant: u16, ingress: Ingress) -> Self {
        Self { address: key.src, tenant, ingress }
    }
}

/// One `[[nat]]`.
#[derive(Clone, Debug)]
pub(crate) struct Rule {
    /// `None`: the rule of a virtual server.
    pub(crate) out: Option<InterfaceId>,
    pub(crate) mode: NatMode,
    addresses: Addresses,
    from: Vec<IpNet>,
    from_peers: Vec<BondId>,
    tenants: Vec<u16>,
    /// Its addresses are the IPv4 ones of the interface, which may have none.
    of_interface: bool,
    /// It, or another rule of one of its addresses, is endpoint-independent.
    pub(crate) independent: bool,
    /// Place of its ports in [`NatPolicy::port_sets`]: of those from 1,024 on, if it has any.
    pub(crate) ports: usize,
    /// Place of those below 1,024 there, for clients that use such ports.
    pub(crate) low_ports: Option<usize>,
    /// Place of all that a client may keep, if it is its own.
    pub(crate) own_ports: usize,
    pub(crate) preference: Preference,
    /// A power of two, 1–256.
    pub(crate) tables: u16,
    pub(crate) flows_per_client_max: u32,
    /// Blocks for each client; 0: none.
    pub(crate) blocks_per_client: u32,
}

/// Ports that a rule's clients get rather than others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Preference {
    /// None.
    Any,
    /// Such as their own is: places of the even and the odd ones of its ports.
    Parity([usize; 2]),
    /// Their own.
    Own,
}

impl Rule {
    /// Whether clients keep their ports where they are free.
    pub(crate) fn preserves(&self) -> bool {
        self.preference == Preference::Own
    }

    /// Whether anything has to be remembered of its clients: a limit, blocks, or which address of several they use. Who comes to a
    /// virtual server is a stranger, whose address says which one it begins with.
    pub(crate) fn tracks_clients(&self, like: IpAddr) -> bool {
        self.flows_per_client_max > 0
            || self.blocks_per_client > 0
            || self.independent
            || self.out.is_some() && self.pool(like).len() > 1
    }

    /// The outside addresses of a family.
    pub(crate) fn pool(&self, like: IpAddr) -> &[IpAddr] {
        self.addresses.pool(like)
    }

    /// Of [`Self::pool`] those that the flow of a request may have, by the network of its next hop.
    pub(crate) fn pool_for(&self, request: &BindRequest) -> &[IpAddr] {
        self.addresses.towards(request.client.src, request.next)
    }

    /// [`Self::pool`] in its parts.
    pub(crate) fn pools(&self, like: IpAddr) -> impl Iterator<Item = &[IpAddr]> {
        self.addresses.parts(like)
    }

    /// That part of [`Self::pool`] which has an address.
    pub(crate) fn pool_with(&self, address: IpAddr) -> Option<&[IpAddr]> {
        self.pools(address).find(|pool| pool.contains(&address))
    }

    fn all_addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.addresses.all()
    }

    fn serves(&self, client: &NatClient) -> bool {
        (self.tenants.is_empty() || self.tenants.contains(&client.tenant))
            && self.is_from(client)
            && (self.mode != NatMode::AddressAndPort
                || !self.pool(client.address).is_empty()
                // Refused, and not sent out with a private source.
                || self.of_interface && client.address.is_ipv4())
    }

    fn is_from(&self, client: &NatClient) -> bool {
        let by_peer = |id: &BondId| client.ingress == Ingress::Bond(*id);
        (self.from.is_empty() && self.from_peers.is_empty())
            || self.from.iter().any(|prefix| prefix.contains(&client.address))
            || self.from_peers.iter().any(by_peer)
    }
}

/// Last of the ports that only privileged programs of a host may use.
const LOW_MAX: u16 = 1023;
/// Ports below 1,024 that are given out unless the operator says otherwise: the others are known as those of services,
/// which networks filter.
const LOW_DEFAULT: (u16, u16) = (512, LOW_MAX);

/// The ports of a rule, parted at 1,024 (RFC 4787 REQ-3 a).
struct RulePorts {
    ports: PortSet,
    low: Option<PortSet>,
    own: PortSet,
}

impl RulePorts {
    /// `usable`: what may be used of a range.
    fn of(nat: &NatSpec, usable: impl Fn((u16, u16)) -> PortSet) -> Self {
        let (first, last) = nat.ports;
        let (low, own) = if nat.ports == PORTS_DEFAULT {
            (LOW_DEFAULT, (1, last))
        } else {
            ((first, last.min(LOW_MAX)), nat.ports)
        };
        let low = (low.0 <= low.1).then(|| usable(low)).filter(|set| !set.is_empty());
        let high = (last > LOW_MAX).then(|| usable((first.max(LOW_MAX + 1), last)));
        let high = high.filter(|set| !set.is_empty());
        Self { ports: high.or_else(|| low.clone()).unwrap_or_default(), low, own: usable(own) }
    }
}

/// Facts about an outside address.
#[derive(Clone, Copy, Debug, Default)]
struct Outside {
    /// The first rule that has it in its pool.
    rule: Option<u16>,
    /// The interface that it is on: that rule's, else the one that has the address or its network.
    out: Option<InterfaceId>,
    independent: bool,
    /// It is an address of the host as well, and not one that only flows have.
    shared: bool,
}

/// The NAT of one configuration. Never changed, shared by all cores; only the leases behind it live.
#[derive(Debug)]
pub struct NatPolicy {
    rules: Vec<Rule>,
    port_sets: Vec<PortSet>,
    outside: HashMap<IpAddr, Outside, ConfigState>,
    forwards: Vec<ForwardSpec>,
    /// Forwards of one port, by protocol and endpoint.
    by_listen: HashMap<(u8, SocketAddr), u16, ConfigState>,
    /// Forwards of several ports, by protocol and address.
    ranges: HashMap<(u8, IpAddr), Vec<u16>, ConfigState>,
    /// Forwards by protocol and inside address.
    by_target: HashMap<(u8, IpAddr), Vec<u16>, ConfigState>,
    lease_specs: Vec<LeaseSpec>,
    leases: Arc<Leases>,
    /// Those of the host.
    tunnels: HashSet<HostTunnel, ConfigState>,
}

impl Default for NatPolicy {
    /// No rule: nothing is translated.
    fn default() -> Self {
        Self::compile(&[], &[], &[], &[])
    }
}

impl NatPolicy {
    /// Compiles. Numbers of rules and forwards are places in the lists given.
    ///
    /// * A rule without addresses takes the IPv4 ones of its interface that others can reach, and none of IPv6. Of several
    ///   networks each flow takes those of the next hop's.
    /// * Ports on which forwards listen are never given to flows, but to those of a forward's own host. A forward of all of a
    ///   rule's ports takes what is of no flow, and no port. Nothing else is known of forwards to this host itself.
    /// * An address is endpoint-independent as a whole: a rule that shares an address with such a rule becomes one.
    ///   Rules that keep the client's address cannot be.
    /// * The leases take force with [`Self::begin`] or [`Self::keeping`].
    #[must_use]
    pub fn compile(
        nats: &[NatSpec],
        forwards: &[ForwardSpec],
        leases: &[LeaseSpec],
        interfaces: &[InterfaceSpec],
    ) -> Self {
        let mut policy = Self {
            rules: Vec::with_capacity(nats.len()),
            port_sets: Vec::new(),
            outside: HashMap::default(),
            forwards: forwards.to_vec(),
            by_listen: HashMap::default(),
            ranges: HashMap::default(),
            by_target: HashMap::default(),
            lease_specs: leases.to_vec(),
            leases: Arc::default(),
            tunnels: HashSet::default(),
        };
        for nat in nats {
            policy.add_rule(nat, interfaces);
        }
        policy.share_independence();
        for (place, rule) in policy.rules.iter().enumerate() {
            for address in rule.all_addresses() {
                let known = policy.outside.entry(address).or_default();
                if known.rule.is_none() {
                    (known.rule, known.out) = (Some(place as u16), rule.out);
                }
                known.independent |= rule.independent;
                known.shared = has_address(interfaces, address);
            }
        }
        for (place, forward) in forwards.iter().enumerate() {
            let place = place as u16;
            let known = policy.outside.entry(forward.listen.ip()).or_default();
            if known.rule.is_none() {
                known.out = known.out.or_else(|| interface_of(interfaces, forward.listen.ip()));
            }
            if forward.leads_here(interfaces) {
                continue;
            }
            let target = (forward.protocol, forward.to.ip());
            policy.by_target.entry(target).or_default().push(place);
            if forward.ports <= 1 {
                // Of two on the same endpoint the first counts.
                policy.by_listen.entry((forward.protocol, forward.listen)).or_insert(place);
            } else {
                policy.ranges.entry((forward.protocol, forward.listen.ip())).or_default().push(place);
            }
        }
        policy
    }

    /// Puts the configuration's leases in force in a new gateway. What could not be is told; events are for the log.
    pub fn begin(&self, now_ns: u64) -> (Vec<NatEvent>, Vec<LeaseError>) {
        self.leases.configure(now_ns, &self.lease_specs)
    }

    /// With tunnels of the host, whose addresses nobody else gets towards the same remote.
    #[must_use]
    pub fn with_tunnels(mut self, tunnels: &[HostTunnel]) -> Self {
        self.tunnels = tunnels.iter().copied().collect();
        self
    }

    /// Takes over the living leases of the policy before, which this one replaces.
    pub fn keeping(mut self, earlier: &Self, now_ns: u64) -> (Self, Vec<NatEvent>, Vec<LeaseError>) {
        self.leases = Arc::clone(&earlier.leases);
        let (events, errors) = self.begin(now_ns);
        (self, events, errors)
    }

    fn add_rule(&mut self, nat: &NatSpec, interfaces: &[InterfaceSpec]) {
        let translates = nat.mode == NatMode::AddressAndPort;
        let of_interface = translates && (nat.addresses.is_empty() || nat.of_interface);
        let named = Addresses::named(if translates { &nat.addresses } else { &[] });
        let addresses = match nat.out.and_then(|out| interfaces.get(out.index())) {
            Some(interface) if of_interface => {
                named.of_interface(&interface.usable_networks(true).collect::<Vec<_>>())
            }
            _ => named,
        };
        let all: Vec<IpAddr> = addresses.all().collect();
        let sets = RulePorts::of(nat, |port_range| self.without_forwards(port_range, nat, &all));
        let preference = match nat.port_choice {
            PortChoice::Random => Preference::Any,
            PortChoice::Parity => {
                let halves = [false, true].map(|odd| sets.ports.of_parity(odd));
                Preference::Parity(halves.map(|half| self.place_of(half)))
            }
            PortChoice::Preserve => Preference::Own,
        };
        let [ports, own_ports] = [sets.ports, sets.own].map(|set| self.place_of(set));
        let low_ports = sets.low.map(|set| self.place_of(set));
        self.rules.push(Rule {
            out: nat.out,
            mode: nat.mode,
            addresses,
            from: nat.from.clone(),
            from_peers: nat.from_peers.clone(),
            tenants: nat.tenants.clone(),
            of_interface,
            independent: nat.mapping == Mapping::EndpointIndependent && nat.mode == NatMode::AddressAndPort,
            ports,
            low_ports,
            own_ports,
            preference,
            tables: nat.tables.clamp(1, TABLES_MAX).next_power_of_two(),
            flows_per_client_max: nat.flows_per_client_max,
            blocks_per_client: u32::from(nat.ports_per_client).div_ceil(super::port_set::BLOCK_PORTS),
        });
    }

    /// Ports of a rule with these addresses, but for reserved ones and those that forwards listen on.
    fn without_forwards(&self, ports: (u16, u16), nat: &NatSpec, addresses: &[IpAddr]) -> PortSet {
        let mut set = PortSet::new(ports, &nat.reserved);
        let here = |forward: &&ForwardSpec| {
            (addresses.is_empty() || addresses.contains(&forward.listen.ip())) && !forward.takes_the_rest(nat)
        };
        for forward in self.forwards.iter().filter(here) {
            for port in forward.listen.port()..=forward.last_port() {
                set.remove(port);
            }
        }
        set
    }

    /// The place of a set of ports; equal ones have the same.
    fn place_of(&mut self, ports: PortSet) -> usize {
        self.port_sets.iter().position(|known| *known == ports).unwrap_or_else(|| {
            self.port_sets.push(ports);
            self.port_sets.len() - 1
        })
    }

    /// Until nothing changes: who shares an address with an independent rule is independent.
    fn share_independence(&mut self) {
        loop {
            let independent: Vec<IpAddr> =
                self.rules.iter().filter(|rule| rule.independent).flat_map(Rule::all_addresses).collect();
            let shares =
                |rule: &Rule| !rule.independent && rule.all_addresses().any(|a| independent.contains(&a));
            let found: Vec<bool> = self.rules.iter().map(shares).collect();
            if !found.contains(&true) {
                return;
            }
            for (rule, shares) in self.rules.iter_mut().zip(found) {
                rule.independent |= shares;
            }
        }
    }

    /// The rule for a new flow that leaves by `egress`: the first of this interface that serves the client. A rule of
    /// mode "none" is an answer too. Only what leaves by an interface has one.
    #[must_use]
    pub fn rule_for(&self, egress: Egress, client: &NatClient) -> Option<u16> {
        self.first_rule(Some(egress.interface()?), client)
    }

    fn first_rule(&self, out: Option<InterfaceId>, client: &NatClient) -> Option<u16> {
        let found = self.rules.iter().position(|rule| rule.out == out && rule.serves(client));
        found.map(|place| place as u16)
    }

    /// The first rule that leads out by this interface in this mode, that has the outside address where it gives one, and that
    /// serves the client, if one is asked about: the rule of a flow that was begun under another configuration.
    #[must_use]
    pub fn rule_named(
        &self,
        out: InterfaceId,
        mode: NatMode,
        outside: IpAddr,
        client: Option<&NatClient>,
    ) -> Option<u16> {
        let found = self.rules.iter().position(|rule| {
            rule.out == Some(out)
                && rule.mode == mode
                && (mode != NatMode::AddressAndPort || rule.pool(outside).contains(&outside))
                && client.is_none_or(|client| rule.serves(client))
        });
        found.map(|place| place as u16)
    }

    /// The rule for a hairpin: an inside client that talks to an outside address (which led back inside) is
    /// translated as if it had left there (RFC 4787 REQ-9).
    #[must_use]
    pub fn rule_for_hairpin(&self, outside: IpAddr, client: &NatClient) -> Option<u16> {
        let known = self.outside.get(&outside)?;
        // An address that only virtual servers give has no interface.
        if known.out.is_none() && known.rule.is_none() {
            return None;
        }
        self.first_rule(known.out, client)
    }

    /// Whether a rule's mappings are endpoint-independent: it says so, or another one that shares an address with it.
    #[must_use]
    pub fn is_independent(&self, rule: u16) -> bool {
        self.rule(rule).is_some_and(|rule| rule.independent)
    }

    /// The first rule that has this address in its pool.
    #[must_use]
    pub fn rule_of_outside(&self, outside: IpAddr) -> Option<u16> {
        self.outside.get(&outside)?.rule
    }

    /// Whether an address is one of a pool or of a forward.
    #[must_use]
    pub fn is_outside(&self, address: IpAddr) -> bool {
        self.outside.contains_key(&address)
    }

    /// Whether flows get ports of this address, which is the host's as well.
    #[must_use]
    pub fn is_shared(&self, address: IpAddr) -> bool {
        self.outside.get(&address).is_some_and(|known| known.shared)
    }

    /// Whether the host has a tunnel by this protocol between an address that it shares with flows and a remote one: what comes
    /// from there is its own.
    #[must_use]
    pub fn is_hosts_tunnel(&self, protocol: u8, local: IpAddr, remote: IpAddr) -> bool {
        let has = |local, remote| self.tunnels.contains(&HostTunnel { protocol, local, remote });
        !self.tunnels.is_empty()
            && self.is_shared(local)
            && (has(Some(local), Some(remote)) || has(None, Some(remote)) || has(Some(local), None))
    }

    /// Whether a flow may have this outside endpoint.
    #[must_use]
    pub fn gives(&self, address: IpAddr, port: u16) -> bool {
        let has = |place: usize| self.port_set(place).is_some_and(|set| set.contains(port));
        self.is_pool(address)
            && self.rules.iter().filter(|rule| rule.pool(address).contains(&address)).any(|rule| {
                has(rule.ports) || rule.low_ports.is_some_and(has) || rule.preserves() && has(rule.own_ports)
            })
    }

    /// Whether flows get ports of this address.
    pub(crate) fn is_pool(&self, address: IpAddr) -> bool {
        self.outside.get(&address).is_some_and(|known| known.rule.is_some())
    }

    /// The forward that listens on an endpoint; of two the first.
    #[must_use]
    pub fn forward(&self, protocol: u8, dst: SocketAddr) -> Option<&ForwardSpec> {
        self.forward_place(protocol, dst).and_then(|place| self.forwards.get(usize::from(place)))
    }

    /// Its number.
    #[must_use]
    pub fn forward_place(&self, protocol: u8, dst: SocketAddr) -> Option<u16> {
        let alone = self.by_listen.get(&(protocol, dst)).copied();
        let listens = |place: &u16| {
            self.forwards.get(usize::from(*place)).is_some_and(|forward| forward.target(dst.port()).is_some())
        };
        let ranges = self.ranges.get(&(protocol, dst.ip()));
        let in_range = ranges.and_then(|ranges| ranges.iter().copied().find(listens));
        match (alone, in_range) {
            (Some(alone), Some(in_range)) => Some(alone.min(in_range)),
            (alone, in_range) => alone.or(in_range),
        }
    }

    /// The endpoint, of this rule's addresses towards a next hop, at which a forward listens that leads to a client's own endpoint:
    /// from there goes what it sends itself, so that who is told of it by that reaches it (SIP, games).
    pub(crate) fn forwarded_from(
        &self,
        rule: &Rule,
        client: &FlowKey,
        tenant: u16,
        next: Option<IpAddr>,
    ) -> Option<SocketAddr> {
        if rule.mode != NatMode::AddressAndPort {
            return None;
        }
        let inside = SocketAddr::new(client.src, client.src_port);
        let places = self.by_target.get(&(client.protocol, client.src))?;
        let forwards = places.iter().filter_map(|place| self.forwards.get(usize::from(*place)));
        let of_client = forwards.filter(|forward| forward.tenant == tenant && !forward.proxy_protocol);
        let mut listens = of_client.filter_map(|forward| forward.listens_for(inside.port()));
        listens.find(|listen| {
            let first = || self.forward(client.protocol, *listen);
            rule.addresses.towards(client.src, next).contains(&listen.ip())
                && first().is_some_and(|forward| forward.target(listen.port()) == Some(inside))
        })
    }

    /// All forwards, by number.
    #[must_use]
    pub fn forwards(&self) -> &[ForwardSpec] {
        &self.forwards
    }

    /// Whether packets to this outside endpoint belong to the core that [`super::mapping::mapping_core`] names:
    /// the address is an endpoint-independent one, and no forward listens there.
    #[must_use]
    pub fn endpoint_independent(&self, address: IpAddr, port: u16, protocol: u8) -> bool {
        super::is_translated(protocol)
            && self.outside.get(&address).is_some_and(|known| known.independent)
            && self.forward_place(protocol, SocketAddr::new(address, port)).is_none()
    }

    /// The core to which a packet from outside belongs if [`Self::endpoint_independent`] says so of its destination:
    /// by port, or by query id for ICMP.
    #[must_use]
    pub fn mapping_core_of(&self, key: &FlowKey, cores: u8) -> Option<u8> {
        let port = key.reversed().sender_port();
        let independent = self.endpoint_independent(key.dst, port, key.protocol);
        independent.then(|| super::mapping_core(key.dst, port, cores))
    }

    /// The blocks of an outside address that may be leased: every port of them may be used by a rule.
    #[must_use]
    pub fn leasable(&self, address: IpAddr) -> Blocks {
        let of_address = self.rules.iter().filter(|rule| rule.all_addresses().any(|known| known == address));
        of_address.fold(0, |all, rule| all | self.ports(rule).map_or(0, PortSet::whole_blocks))
    }

    /// Those of the outside addresses of a rule that flows of a client by this next hop may have.
    #[must_use]
    pub fn addresses_towards(&self, rule: u16, client: IpAddr, next: Option<IpAddr>) -> Vec<IpAddr> {
        self.rule(rule).map(|rule| rule.addresses.towards(client, next).to_vec()).unwrap_or_default()
    }

    /// Whether an outside address is used towards a next hop: by a rule that has it, one of its network. By any other it may be.
    #[must_use]
    pub fn may_meet(&self, rule: u16, outside: IpAddr, next: IpAddr) -> bool {
        self.rule(rule).is_none_or(|rule| {
            !rule.pool(outside).contains(&outside)
                || rule.addresses.towards(outside, Some(next)).contains(&outside)
        })
    }

    /// The outside addresses of a rule, IPv4 first. Empty when the rule keeps the client's.
    #[must_use]
    pub fn addresses(&self, rule: u16) -> Vec<IpAddr> {
        self.rule(rule).map(|rule| rule.all_addresses().collect()).unwrap_or_default()
    }

    /// How a rule translates.
    #[must_use]
    pub fn mode(&self, rule: u16) -> Option<NatMode> {
        self.rule(rule).map(|rule| rule.mode)
    }

    /// The source that a client keeps its port with towards a next hop, by a rule for which it does so; `place`: that of its
    /// address in a pool of so many.
    #[must_use]
    pub fn preserved_source(
        &self,
        rule: u16,
        client: IpAddr,
        next: Option<IpAddr>,
        place: impl Fn(usize) -> usize,
    ) -> Option<IpAddr> {
        let rule = self.rule(rule).filter(|rule| rule.preserves() && !rule.independent)?;
        match rule.mode {
            NatMode::None => None,
            NatMode::PortOnly => Some(client),
            NatMode::AddressAndPort => {
                let pool = rule.addresses.towards(client, next);
                pool.get(place(pool.len())).copied()
            }
        }
    }

    /// The living leases.
    #[must_use]
    pub fn leases(&self) -> &Arc<Leases> {
        &self.leases
    }

    pub(crate) fn rule(&self, rule: u16) -> Option<&Rule> {
        self.rules.get(usize::from(rule))
    }

    pub(crate) fn ports(&self, rule: &Rule) -> Option<&PortSet> {
        self.port_set(rule.ports)
    }

    pub(crate) fn port_set(&self, place: usize) -> Option<&PortSet> {
        self.port_sets.get(place)
    }

    pub(crate) fn port_sets(&self) -> &[PortSet] {
        &self.port_sets
    }
}

fn has_address(interfaces: &[InterfaceSpec], address: IpAddr) -> bool {
    interfaces.iter().flat_map(|interface| &interface.addresses).any(|net| net.addr() == address)
}

/// The interface that has an address, or the first whose network it is in.
fn interface_of(interfaces: &[InterfaceSpec], address: IpAddr) -> Option<InterfaceId> {
    let with = |fits: &dyn Fn(&IpNet) -> bool| {
        interfaces
            .iter()
            .position(|interface| interface.addresses.iter().any(fits))
            .map(|place| InterfaceId(place as u16))
    };
    with(&|net| net.addr() == address).or_else(|| with(&|net| net.contains(&address)))
}

#[cfg(test)]
mod tests;
