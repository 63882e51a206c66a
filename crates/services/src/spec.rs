//! Specification of what the operator wants, as plain data: names resolved to numbers, nothing checked against packets
//! yet.
//!
//! Control fills it from the configuration; each module compiles its own part. Numbers are places in the lists
//! of [`GatewaySpec`] unless a field says otherwise.

mod host;

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use packet::attachment::{BondId, Egress, Ingress, InterfaceId};

pub use host::{HostMode, HostSpec, HostTunnel, InnerSpec, SealedSpec, kept_ports};

/// Most interfaces of one gateway.
pub const INTERFACES_MAX: usize = 256;

/// IP protocol number of TCP.
pub const TCP: u8 = 6;

/// IP protocol number of UDP.
pub const UDP: u8 = 17;

/// Everything a gateway does besides the tunnel.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GatewaySpec {
    /// `[[interface]]`, by [`InterfaceId`].
    pub interfaces: Vec<InterfaceSpec>,
    /// `[[peer]]`: who is behind the bonds.
    pub peers: Vec<PeerSpec>,
    /// Names of the tenants; place 0 is the shared one, which is always there.
    pub tenants: Vec<String>,
    /// Connected prefixes, the kernel's routes over these interfaces, peers' allowed-ips, `[[route]]`.
    pub routes: Vec<RouteSpec>,
    /// Rules that say which table a packet is looked up in, in order. Empty: [`MAIN_TABLE`] for all.
    pub route_rules: Vec<RouteRuleSpec>,
    /// `[[group]]`: named sets of addresses.
    pub groups: Vec<GroupSpec>,
    /// `[[rule]]` in order: the first that matches decides.
    pub rules: Vec<RuleSpec>,
    /// Action for a new flow that no rule matches.
    pub default_action: RuleAction,
    /// `[[nat]]`.
    pub nats: Vec<NatSpec>,
    /// `[[forward]]`: port forwards.
    pub forwards: Vec<ForwardSpec>,
    /// Port ranges that tenants or pods hold (row R1).
    pub leases: Vec<LeaseSpec>,
    /// `[[virtual-server]]`.
    pub servers: Vec<ServerSpec>,
    /// How long silent flows are kept.
    pub timeouts: Timeouts,
    /// Bounds.
    pub limits: Limits,
    /// The host itself.
    pub host: HostSpec,
}

/// Link of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkSpec {
    /// Ethernet: the device's own hardware address, and those of devices that the host has on top of it (macvlan, VRRP).
    Ethernet {
        /// Source of what leaves.
        mac: [u8; 6],
        /// Others that frames for this gateway may be sent to.
        more: Vec<[u8; 6]>,
    },
    /// No header, and one other end that takes everything (PPP, TUN, WireGuard).
    PointToPoint,
}

impl LinkSpec {
    /// An Ethernet link with this hardware address.
    #[must_use]
    pub const fn ethernet(mac: [u8; 6]) -> Self {
        Self::Ethernet { mac, more: Vec::new() }
    }

    /// The hardware address, zeros where there is none.
    #[must_use]
    pub const fn mac(&self) -> [u8; 6] {
        match self {
            Self::Ethernet { mac, .. } => *mac,
            Self::PointToPoint => [0; 6],
        }
    }
}

/// One plain interface.
#[derive(Clone, Debug, PartialEq)]
pub struct InterfaceSpec {
    /// Name in the configuration.
    pub name: String,
    /// Name of the kernel's device.
    pub device: String,
    /// The gateway's own addresses there, with prefix length.
    pub addresses: Vec<IpNet>,
    /// Tenant of what comes in here (row R11).
    pub tenant: u16,
    /// Largest IP packet, bytes.
    pub mtu: u16,
    /// Largest IPv6 packet where that is less: a router of the link may say so (RFC 4861 §4.6.4).
    pub ipv6_mtu: u16,
    /// Header in front of its packets.
    pub link: LinkSpec,
    /// Whether strangers are there.
    pub outside: bool,
    /// Action for a new flow that no rule matches, that comes in here and passes through: not to this gateway or a service of it.
    /// `None`: [`GatewaySpec::default_action`].
    pub through_action: Option<RuleAction>,
    /// Its TCP is followed loosely, since the other direction may take another way.
    pub loose_tcp: bool,
}

impl InterfaceSpec {
    /// An interface of the shared tenant, named as its device, with an MTU of 1,500 bytes, on the inside, and with no default of its own.
    #[must_use]
    pub fn new(name: &str, addresses: Vec<IpNet>, link: LinkSpec) -> Self {
        Self {
            name: name.to_owned(),
            device: name.to_owned(),
            addresses,
            tenant: 0,
            mtu: 1_500,
            ipv6_mtu: u16::MAX,
            link,
            outside: false,
            through_action: None,
            loose_tcp: false,
        }
    }

    /// Largest packet of an IP version, bytes.
    #[inline]
    #[must_use]
    pub fn mtu_of(&self, ipv4: bool) -> u16 {
        if ipv4 { self.mtu } else { self.mtu.min(self.ipv6_mtu) }
    }

    /// Its addresses of a family that hosts beyond the link can answer to: not the link-local ones.
    pub fn usable_addresses(&self, ipv4: bool) -> impl Iterator<Item = IpAddr> + '_ {
        self.usable_networks(ipv4).map(|net| net.addr())
    }

    /// [`Self::usable_addresses`] with their networks.
    pub fn usable_networks(&self, ipv4: bool) -> impl Iterator<Item = IpNet> + '_ {
        let usable =
            move |net: &IpNet| net.addr().is_ipv4() == ipv4 && !packet::ip::is_link_local(net.addr());
        self.addresses.iter().copied().filter(usable)
    }
}

/// One peer of the tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerSpec {
    /// Its bond.
    pub id: BondId,
    /// Name in the configuration.
    pub name: String,
    /// Tenant of what comes in by the bond (row R11).
    pub tenant: u16,
    /// Inner networks behind it. The host's own packets to these prefixes take the bond; others need a route.
    pub allowed_ips: Vec<IpNet>,
}

/// The table that is used where there are no rules.
pub const MAIN_TABLE: u32 = 254;

/// Action of a route on a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RouteAction {
    /// Sends it on.
    #[default]
    Forward,
    /// Drops it; nobody is told.
    Blackhole,
    /// Refuses it: "host unreachable".
    Unreachable,
    /// Refuses it: "administratively prohibited".
    Prohibit,
    /// Leaves the table: the next rule decides.
    Throw,
}

/// One route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteSpec {
    /// Who may use it; tenant 0's routes are used by every tenant that has no better one of its own.
    pub tenant: u16,
    /// Destination.
    pub prefix: IpNet,
    /// Where packets leave: an interface, a bond or the host.
    pub egress: Egress,
    /// Next router, perhaps an IPv6 one for IPv4 (RFC 8950); `None`: the destination itself is the neighbour.
    pub via: Option<IpAddr>,
    /// Table that it is in.
    pub table: u32,
    /// Action. Where it is not to forward, `egress` and `via` mean nothing.
    pub action: RouteAction,
    /// Share of the flows that take this way, where a route has several.
    pub weight: u16,
    /// One more way of the route that is listed before it.
    pub joins: bool,
    /// Largest packet that may take it, bytes; [`u16::MAX`]: that of the interface.
    pub mtu: u16,
    /// Only packets with a source of this network take it (IPv6: `ip route add … from`); of equally long destinations the longest such
    /// network counts, and a longer destination before that.
    pub from: Option<IpNet>,
}

impl RouteSpec {
    /// A route with one way, in the main table.
    #[must_use]
    pub const fn new(tenant: u16, prefix: IpNet, egress: Egress, via: Option<IpAddr>) -> Self {
        let action = RouteAction::Forward;
        let (table, mtu) = (MAIN_TABLE, u16::MAX);
        Self { tenant, prefix, egress, via, table, action, weight: 1, joins: false, mtu, from: None }
    }
}

/// Rule of policy routing: which table a packet is looked up in. What is `None` matches every packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteRuleSpec {
    /// Packets of IPv4 or of IPv6.
    pub ipv4: bool,
    /// Source prefix.
    pub from: Option<IpNet>,
    /// Destination prefix.
    pub to: Option<IpNet>,
    /// By what packets come in; an empty list matches nothing.
    pub ingresses: Option<Vec<Ingress>>,
    /// IP protocol.
    pub protocol: Option<u8>,
    /// Source ports, inclusive.
    pub src_ports: Option<(u16, u16)>,
    /// Destination ports, inclusive.
    pub dst_ports: Option<(u16, u16)>,
    /// Matches what all this does not match.
    pub invert: bool,
    /// Action.
    pub action: RouteRuleAction,
}

/// Action of a rule of policy routing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteRuleAction {
    /// Looks into a table; where no route is found the next rule decides. Routes with prefixes that are not longer
    /// than `longer_than` do not count.
    Table {
        /// Its number.
        table: u32,
        /// Longest prefix that does not count.
        longer_than: Option<u8>,
    },
    /// Goes on with the rule at this place, which is behind it.
    Goto(usize),
    /// Decides as a route would.
    Refuse(RouteAction),
}

/// A named set of addresses, changeable while running (row R5).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GroupSpec {
    /// Name.
    pub name: String,
    /// Members.
    pub members: Vec<IpNet>,
}

/// Action of a rule on a new flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RuleAction {
    /// Let it pass; its replies pass by the flow table.
    #[default]
    Allow,
    /// Drop, counted.
    Drop,
    /// Drop and tell the sender: TCP RST or ICMP "administratively prohibited".
    Reject,
}

/// By what a packet comes in or leaves, as rules name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Attachment {
    /// A plain interface.
    Interface(InterfaceId),
    /// The gateway itself. As the `to` of a rule: whatever is addressed to it before translation, so also what a
    /// virtual server, forward or mapping passes on.
    Gateway,
    /// The peer of this bond.
    Bond(BondId),
    /// Any peer.
    AnyBond,
}

impl From<Ingress> for Attachment {
    fn from(ingress: Ingress) -> Self {
        match ingress {
            Ingress::Interface(id) => Self::Interface(id),
            Ingress::Host => Self::Gateway,
            Ingress::Bond(id) => Self::Bond(id),
        }
    }
}

/// One side of a rule; empty lists mean "any".
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SideSpec {
    /// Prefixes.
    pub prefixes: Vec<IpNet>,
    /// Places in [`GatewaySpec::groups`].
    pub groups: Vec<u16>,
    /// By what the packet comes in (`from`) or leaves (`to`).
    pub attachments: Vec<Attachment>,
}

/// One firewall rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuleSpec {
    /// Name for `explain` and counters; "rule 3" if none was given.
    pub name: String,
    /// Action.
    pub action: RuleAction,
    /// Source.
    pub from: SideSpec,
    /// Destination, before any translation.
    pub to: SideSpec,
    /// IP protocols; empty = any.
    pub protocols: Vec<u8>,
    /// Destination ports, inclusive ranges; empty = any.
    pub dst_ports: Vec<(u16, u16)>,
    /// Source ports, inclusive ranges; empty = any.
    pub src_ports: Vec<(u16, u16)>,
    /// Tenants; empty = any.
    pub tenants: Vec<u16>,
}

/// How a NAT changes the source of what leaves (rows C2, C3, C4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum NatMode {
    /// C2: one of the NAT's addresses and a port whose replies come back to this core.
    AddressAndPort,
    /// C3: the client's address is kept, the port is chosen so that replies come back to this core.
    PortOnly,
    /// C4: address and port are kept; replies that reach another core are handed to the owner.
    None,
}

/// Who may use a mapping, RFC 4787 §4.1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mapping {
    /// One mapping per (client endpoint, remote endpoint): most flows per address.
    #[default]
    EndpointDependent,
    /// One mapping per client endpoint for every remote, inbound open to anybody (games, calls, peer to peer).
    EndpointIndependent,
}

/// Ports of a NAT unless the operator says otherwise.
pub const PORTS_DEFAULT: (u16, u16) = (1024, 65_535);

/// How a flow's outside port is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PortChoice {
    /// At random (RFC 6056), by the core that the client's packets come to.
    #[default]
    Random,
    /// At random among those that are even or odd as the client's, while there are any (RFC 4787 REQ-4): old RTP applications
    /// take the next port for RTCP.
    Parity,
    /// The client's own port while it is free, by the core that the replies come to then.
    Preserve,
}

/// `[[nat]]`.
#[derive(Clone, Debug, PartialEq)]
pub struct NatSpec {
    /// Packets that leave by this interface are translated. `None`: those of one virtual server, which asks for the rule
    /// itself.
    pub out: Option<InterfaceId>,
    /// How.
    pub mode: NatMode,
    /// Outside addresses ([`NatMode::AddressAndPort`]). Empty: the IPv4 addresses of the interface, whichever it has; while
    /// it has none, IPv4 flows are refused. IPv6 is then not translated.
    pub addresses: Vec<IpAddr>,
    /// The IPv4 ones are those that the interface has, and nobody's choice: where they are in several networks, a flow takes one of
    /// its next hop's.
    pub of_interface: bool,
    /// Only packets from these prefixes, or from `from_peers`; both empty = all.
    pub from: Vec<IpNet>,
    /// Only packets that came in by these bonds, or from `from`.
    pub from_peers: Vec<BondId>,
    /// Only these tenants; empty = all.
    pub tenants: Vec<u16>,
    /// Mapping behaviour.
    pub mapping: Mapping,
    /// Ports that may be used, inclusive. With [`PORTS_DEFAULT`] those below 1,024 are there for clients that use such
    /// ports themselves (RFC 4787 REQ-3 a).
    pub ports: (u16, u16),
    /// Which of them a flow gets.
    pub port_choice: PortChoice,
    /// Ports within it that may not: what the host's own sockets use when it shares the address.
    pub reserved: Vec<(u16, u16)>,
    /// Port tables per address and core (row C3): 64 or 256.
    pub tables: u16,
    /// Live flows of one client address at most.
    pub flows_per_client_max: u32,
    /// Ports that one client address may use, in whole blocks of 1,024, leased when its first flow comes; 0 = no
    /// blocks. With blocks the log needs one line per block instead of one per flow (RFC 6888 §4).
    pub ports_per_client: u16,
    /// Fragments of its flows are assembled before they are translated: the "assemble flag" of NAT entries (row C5).
    /// TCP is in any case; this is for UDP.
    pub assemble_fragments: bool,
}

/// `[[forward]]`: an outside port that leads to an inside host; the client's address stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForwardSpec {
    /// TCP or UDP.
    pub protocol: u8,
    /// Outside address and port.
    pub listen: SocketAddr,
    /// Inside address and port.
    pub to: SocketAddr,
    /// How many ports, at least 1: from that of `listen` on, each to its place from that of `to` on.
    pub ports: u16,
    /// Tenant of the inside host.
    pub tenant: u16,
    /// Begin the connection with a PROXY protocol v2 header (TCP only).
    pub proxy_protocol: bool,
}

impl ForwardSpec {
    /// The last port that it listens on.
    #[must_use]
    pub const fn last_port(&self) -> u16 {
        self.listen.port().saturating_add(self.ports.saturating_sub(1))
    }

    /// Whether it has all ports of a NAT: then it gets what is of no flow, and takes no port from the NAT. Endpoint-independent mappings
    /// have what is of no flow themselves.
    #[must_use]
    pub fn takes_the_rest(&self, nat: &NatSpec) -> bool {
        let (first, last) = nat.ports;
        nat.mapping == Mapping::EndpointDependent && self.listen.port() <= first && self.last_port() >= last
    }

    /// Whether it leads to this host itself: then it is the kernel's, whose answers leave by themselves.
    #[must_use]
    pub fn leads_here(&self, interfaces: &[InterfaceSpec]) -> bool {
        let mut own = interfaces.iter().flat_map(|interface| &interface.addresses);
        self.tenant == 0 && !self.proxy_protocol && own.any(|net| net.addr() == self.to.ip())
    }

    /// The endpoint at which it listens for a port of the inside host; `None`: of another port.
    #[must_use]
    pub fn listens_for(&self, inside: u16) -> Option<SocketAddr> {
        let step = inside.checked_sub(self.to.port()).filter(|step| *step < self.ports.max(1))?;
        Some(SocketAddr::new(self.listen.ip(), self.listen.port().checked_add(step)?))
    }

    /// The inside endpoint of a port that it listens on; `None`: of another port.
    #[must_use]
    pub fn target(&self, port: u16) -> Option<SocketAddr> {
        let step = port.checked_sub(self.listen.port()).filter(|step| *step < self.ports.max(1))?;
        Some(SocketAddr::new(self.to.ip(), self.to.port().checked_add(step)?))
    }
}

/// A port range of one outside address that belongs to one user (row R1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseSpec {
    /// Who holds it.
    pub name: String,
    /// Whose flows must use it: tenant …
    pub tenant: u16,
    /// … and source prefix.
    pub from: IpNet,
    /// The outside address.
    pub address: IpAddr,
    /// First port, a multiple of 1,024.
    pub first_port: u16,
    /// Number of ports, a multiple of 1,024.
    pub ports: u32,
}

/// How a virtual server chooses among its backends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum BalanceMethod {
    /// Maglev hashing of the client's endpoint, weighted.
    #[default]
    Maglev,
    /// Fewest live connections relative to the weight.
    LeastConnections,
    /// In turn, by weight.
    RoundRobin,
    /// By hash of the client's address: one client stays with one backend.
    SourceAddress,
}

/// How packets reach a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeliveryMode {
    /// Destination address and port are rewritten; replies come back through the gateway.
    #[default]
    Nat,
    /// Only the frame's destination is changed; the backend holds the address itself and answers directly.
    DirectReturn,
}

/// Clients that stay with their backend, whatever the method.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Affinity {
    /// None do: each flow is placed by itself.
    #[default]
    None,
    /// All flows of one address go to one backend, as long as it takes new ones.
    SourceAddress,
    /// A QUIC connection stays with its backend when its client's address or port changes, as long as the backend is up.
    QuicConnectionId,
}

/// Live TCP connections to a backend that goes down: whether both ends get a RST.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResetOnDown {
    /// When it does not answer any more. One that refuses checks or answers them wrongly is alive, may be about to end in
    /// order, and ends its connections itself.
    #[default]
    Silent,
    /// Whatever its checks found.
    Always,
    /// They are left to their own timers.
    Never,
}

/// `[[virtual-server]]` (row C6).
#[derive(Clone, Debug, PartialEq)]
pub struct ServerSpec {
    /// Name, unique.
    pub name: String,
    /// TCP or UDP.
    pub protocol: u8,
    /// Address and port that clients use.
    pub listen: SocketAddr,
    /// Backends.
    pub backends: Vec<BackendSpec>,
    /// Method.
    pub method: BalanceMethod,
    /// Delivery.
    pub delivery: DeliveryMode,
    /// Treatment of the client's source (rows C2–C4).
    pub source: NatMode,
    /// Addresses for [`NatMode::AddressAndPort`]; the interface's own towards the backend when empty.
    pub source_addresses: Vec<IpAddr>,
    /// Live connections at most; 0 = no limit.
    pub connections_max: u32,
    /// A backend that comes up gets its full share only after this long, s.
    pub slow_start_s: u16,
    /// Begin the connection with a PROXY protocol v2 header (TCP only).
    pub proxy_protocol: bool,
    /// Live TCP connections when a backend goes down.
    pub reset_on_down: ResetOnDown,
    /// Which clients stay with their backend.
    pub affinity: Affinity,
}

/// One backend of a virtual server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendSpec {
    /// Address and port.
    pub address: SocketAddr,
    /// Share relative to the others, 1–1,000; 0 = drain: live connections stay, no new ones.
    pub weight: u16,
    /// Live connections at most; 0 = no limit.
    pub connections_max: u32,
    /// Once it drains, connections may last so long, s; 0 = as long as they like.
    pub drain_s: u32,
}

/// How long a silent flow is kept, s. The defaults are the RFCs' (4787, 5382, 5508) or above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// Established TCP (RFC 5382 REQ-5: not less than 2 h 4 min).
    pub tcp_established_s: u32,
    /// TCP while it opens or closes (RFC 5382: not less than 4 min).
    pub tcp_transitory_s: u32,
    /// TCP after both FINs or a RST.
    pub tcp_closed_s: u32,
    /// UDP that has seen packets both ways (RFC 4787 REQ-5: not less than 2 min).
    pub udp_s: u32,
    /// UDP without a reply.
    pub udp_unreplied_s: u32,
    /// ICMP queries (RFC 5508 REQ-2: not less than 60 s).
    pub icmp_s: u32,
    /// Everything else.
    pub other_s: u32,
    /// Fragments of a packet that is not complete.
    pub fragments_s: u32,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            tcp_established_s: 7_440,
            tcp_transitory_s: 240,
            tcp_closed_s: 10,
            udp_s: 180,
            udp_unreplied_s: 30,
            icmp_s: 60,
            other_s: 600,
            fragments_s: 15,
        }
    }
}

/// Bounds, per core where they say so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Flows of one core.
    pub flows_max: u32,
    /// Of these, flows that have not seen a reply: floods cannot push out what is established.
    pub embryonic_max: u32,
    /// Bytes of held fragments of one core.
    pub fragment_bytes_max: usize,
    /// Packets in pieces of one source at most, so that one cannot take all the room.
    pub fragments_per_source_max: u16,
    /// By what fragments are assembled or bridged (row C5).
    pub fragments: crate::fragment::Variant,
    /// ICMP errors and RSTs that one core makes per second.
    pub errors_per_s_max: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            flows_max: 4_000_000,
            embryonic_max: 1_000_000,
            fragment_bytes_max: 8 << 20,
            fragments_per_source_max: 64,
            fragments: crate::fragment::Variant::default(),
            errors_per_s_max: 1_000,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wide_range_of_the_kernel_leaves_ports_to_the_nat() {
        let all = (1_024, 65_535);
        for (of_host, of_nat, kept) in [
            ((32_768, 60_999), all, (32_768, 60_999)),
            ((32_768, 60_999), (5_000, 5_999), (32_768, 60_999)),
            ((1_024, 65_535), all, (1_024, 33_279)),
            ((1, 65_535), (1, 65_535), (1, 33_279)),
            ((10_000, 65_535), all, (10_000, 37_767)),
            ((32_768, 60_999), (40_000, 40_999), (32_768, 40_499)),
            ((32_768, 60_999), (40_000, 40_000), (32_768, 40_000)),
            ((32_768, 60_999), (512, 1_023), (32_768, 60_999)),
            ((0, 0), all, (0, 0)),
        ] {
            assert_eq!(kept_ports(of_host, of_nat), kept, "{of_host:?} {of_nat:?}");
        }
    }
}
