//! The sections of everything that is not the tunnel: `[[interface]]`, `[[route]]`, `[[nat]]`, `[[forward]]`,
//! `[[virtual-server]]`, `[[group]]`, `[[rule]]`, `[[tenant]]`, `[[lease]]` and `[gateway]`.
//!
//! Names are checked here (a rule that names an unknown group is an error at its place in the file), but stay
//! names: [`crate::gateway::policy`] turns them into numbers, together with what the host says about its devices.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use ::health::HealthSpec;
use ipnet::IpNet;
use linux::privileges::User;
use services::fragment::Variant;
use services::spec::{
    Affinity, BalanceMethod, DeliveryMode, HostMode, Limits, Mapping, NatMode, PortChoice, ResetOnDown,
    RuleAction, Timeouts,
};

mod balance;
pub(super) mod check;
mod health;
pub mod pools;
pub(super) mod read;
#[cfg(test)]
mod tests;
pub mod values;

/// Most `[[interface]]` sections.
pub const INTERFACES_MAX: usize = services::spec::INTERFACES_MAX;
/// Most `[[tenant]]` sections.
pub const TENANTS_MAX: usize = 4096;
/// Most `[[route]]` sections.
pub const ROUTES_MAX: usize = 65_536;
/// Most `[[group]]` sections.
pub const GROUPS_MAX: usize = 1024;
/// Most prefixes of one group, its file included.
pub const GROUP_MEMBERS_MAX: usize = 1 << 20;
/// Most `[[rule]]` sections.
pub const RULES_MAX: usize = 16_384;
/// Most `[[nat]]` sections.
pub const NATS_MAX: usize = 256;
/// Most outside addresses of one NAT.
pub const NAT_ADDRESSES_MAX: usize = 1024;
/// Most `[[forward]]` sections.
pub const FORWARDS_MAX: usize = 4096;
/// Most `[[virtual-server]]` sections.
pub const SERVERS_MAX: usize = 1024;
/// Most backends of one virtual server.
pub const BACKENDS_MAX: usize = 1024;
/// Most `[[lease]]` sections, and most leases in all.
pub const LEASES_MAX: usize = 16_384;
/// Most entries of a list inside a section (prefixes of a rule, ports, addresses of an interface).
pub const LIST_MAX: usize = 4096;

/// Ports come in blocks of this size: a lease is whole blocks of one address.
pub const BLOCK_PORTS: u32 = 1024;

/// Words that stand for something else than an interface or a group.
pub(super) const RESERVED: [&str; 3] = [GATEWAY, TUNNEL, "any"];
/// The host itself, in rules.
pub(super) const GATEWAY: &str = "gateway";
/// Word of rules for everything that comes from or goes to a peer.
pub(super) const TUNNEL: &str = "tunnel";
/// In front of a peer's name.
pub(super) const PEER: &str = "peer:";

/// All of these sections.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Services {
    /// `[[interface]]` in file order.
    pub interfaces: Vec<Interface>,
    /// `[[tenant]]` names in file order.
    pub tenants: Vec<String>,
    /// `[[route]]`.
    pub routes: Vec<Route>,
    /// `[[group]]`.
    pub groups: Vec<Group>,
    /// `[[rule]]`: the first that matches decides.
    pub rules: Vec<Rule>,
    /// `[[nat]]`: the first that matches decides.
    pub nats: Vec<Nat>,
    /// `[[forward]]`.
    pub forwards: Vec<Forward>,
    /// `[[virtual-server]]`.
    pub servers: Vec<VirtualServer>,
    /// `[[lease]]`.
    pub leases: Vec<Lease>,
    /// `[gateway]`.
    pub settings: Settings,
}

impl Services {
    /// Whether there is anything for the packet engine to do besides the tunnel.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.interfaces.is_empty()
    }

    /// Names of the interfaces' devices.
    pub fn devices(&self) -> impl Iterator<Item = &str> {
        self.interfaces.iter().map(|interface| interface.device.as_str())
    }

    /// Whether flows get ports of addresses that the host may share.
    #[must_use]
    pub fn gives_ports(&self) -> bool {
        !self.nats.is_empty() || !self.servers.is_empty()
    }
}

/// `[[interface]]`: a plain interface whose packets the gateway handles.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Name in this file.
    pub name: String,
    /// Name of the kernel's device.
    pub device: String,
    /// Addresses that the gateway gives it, besides those it has.
    pub addresses: Vec<IpNet>,
    /// Addresses that another program (VRRP) moves between machines: used while they are here, never added.
    pub virtual_addresses: Vec<IpAddr>,
    /// Tenant of what comes in here; `None` = the shared one.
    pub tenant: Option<String>,
    /// Largest IP packet, bytes; the device's by default.
    pub mtu: Option<u16>,
    /// Whether strangers are there. `None`: where a NAT, a default route or a WAN leads out.
    pub outside: Option<bool>,
    /// Its TCP is followed loosely: the other direction may take another way.
    pub loose_tcp: bool,
    /// Number of the interface in the cluster whose machines share it; `None`: it is this machine's alone.
    pub shared: Option<u8>,
    /// Node ids of the dispatchers that have a shared interface; empty: all have.
    pub dispatchers: Vec<u16>,
    /// Hardware address of a shared interface: of the device that stands for it at a data plane, and of that of the dispatcher
    /// that has taken it over.
    pub mac: Option<[u8; 6]>,
    /// One of several dispatchers has it, whichever is given its addresses: by keepalived, or by `anabranch cluster takeover`.
    pub takeover: bool,
}

/// `[[route]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Destination, without host bits.
    pub to: IpNet,
    /// Next router; `None`: the destinations are neighbors.
    pub via: Option<IpAddr>,
    /// Interface it leaves by; `None`: the one whose network `via` is in.
    pub interface: Option<String>,
    /// Who may use it; `None`: the tenant of the interface.
    pub tenant: Option<String>,
}

/// `[[group]]`: a named set of prefixes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Name.
    pub name: String,
    /// Prefixes of `members` and of the file, without host bits.
    pub members: Vec<IpNet>,
    /// The file, read again at every reload.
    pub file: Option<PathBuf>,
}

/// One thing that a rule's `from` or `to` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// Addresses.
    Prefix(IpNet),
    /// A group.
    Group(String),
    /// An interface: where the packet comes in (`from`) or leaves (`to`).
    Interface(String),
    /// The host itself.
    Gateway,
    /// The bonds to all peers.
    Tunnel,
    /// The bond to one peer.
    Peer(String),
}

/// `[[rule]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Name; "rule 3" unless given.
    pub name: String,
    /// Action for flows that match.
    pub action: RuleAction,
    /// Source; empty = any.
    pub from: Vec<Subject>,
    /// Destination before translation; empty = any.
    pub to: Vec<Subject>,
    /// IP protocols; empty = any. TCP and UDP when only a port was given.
    pub protocols: Vec<u8>,
    /// Destination ports, inclusive ranges; empty = any.
    pub ports: Vec<(u16, u16)>,
    /// Source ports, inclusive ranges; empty = any.
    pub source_ports: Vec<(u16, u16)>,
    /// Tenants; empty = any.
    pub tenants: Vec<String>,
}

/// Whose packets a NAT takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NatFrom {
    /// A prefix.
    Prefix(IpNet),
    /// A group.
    Group(String),
    /// Whatever a peer sends.
    Peer(String),
}

/// `[[nat]]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Nat {
    /// Interface where packets leave.
    pub out: String,
    /// How (rows C2, C3, C4).
    pub mode: NatMode,
    /// Outside addresses; empty = the interface's own.
    pub addresses: Vec<IpAddr>,
    /// Only these clients; empty = all.
    pub from: Vec<NatFrom>,
    /// Only these tenants; empty = all.
    pub tenants: Vec<String>,
    /// Who may use a mapping.
    pub mapping: Mapping,
    /// Ports, inclusive.
    pub ports: (u16, u16),
    /// Which of them a flow gets.
    pub port_choice: PortChoice,
    /// Port tables per address and core (row C3).
    pub tables: u16,
    /// Live flows of one client at most.
    pub flows_per_client_max: u32,
    /// Ports of one client, in whole blocks; 0 = no blocks.
    pub ports_per_client: u16,
    /// Fragments are assembled before translation (row C5).
    pub assemble_fragments: bool,
}

/// Where a forward listens.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ListenHost {
    /// One address.
    Address(IpAddr),
    /// Every IPv4 address (or IPv6, if the target is IPv6) that an interface has at the time.
    Interface(String),
}

/// `[[forward]]`: a port forward.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forward {
    /// IP protocols, TCP, UDP or both.
    pub protocols: Vec<u8>,
    /// Outside address.
    pub host: ListenHost,
    /// Outside port, of several the first.
    pub port: u16,
    /// How many ports, at least 1.
    pub ports: u16,
    /// Inside address and port, of several the first.
    pub to: SocketAddr,
    /// Tenant of the inside host; `None` = the shared one.
    pub tenant: Option<String>,
    /// Begin with a PROXY protocol header.
    pub proxy_protocol: bool,
}

impl Forward {
    /// The last outside port.
    #[must_use]
    pub const fn last_port(&self) -> u16 {
        self.port.saturating_add(self.ports.saturating_sub(1))
    }
}

/// `[[virtual-server]]` (row C6).
#[derive(Clone, Debug, PartialEq)]
pub struct VirtualServer {
    /// Name, unique; the text of `listen` by default.
    pub name: String,
    /// TCP or UDP.
    pub protocol: u8,
    /// Address and port that clients use.
    pub listen: SocketAddr,
    /// Backends.
    pub backends: Vec<Backend>,
    /// How one is chosen.
    pub method: BalanceMethod,
    /// How packets get there.
    pub delivery: DeliveryMode,
    /// Translation of the client's source. `address-and-port` by default, so that replies come back through the gateway
    /// whatever routes the backends have; `none` with direct return.
    pub source: NatMode,
    /// Addresses for it; empty = the interface's own.
    pub source_addresses: Vec<IpAddr>,
    /// Live connections at most; 0 = no limit.
    pub connections_max: u32,
    /// Until a backend that comes up has its full share, s.
    pub slow_start_s: u16,
    /// Begin with a PROXY protocol header.
    pub proxy_protocol: bool,
    /// Which clients stay with their backend.
    pub affinity: Affinity,
    /// Live TCP connections when a backend goes down.
    pub reset_on_down: ResetOnDown,
    /// How backends are checked; `None`: they are thought to be up.
    pub health: Option<HealthSpec>,
}

/// One backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Address and port.
    pub address: SocketAddr,
    /// Share relative to the others, 0–1,000; 0 = no new connections.
    pub weight: u16,
    /// Live connections at most; 0 = no limit.
    pub connections_max: u32,
    /// Once it drains, connections may last so long, s; 0 = as long as they like.
    pub drain_s: u32,
}

/// `[[lease]]`: a port range of one outside address for one user (row R1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Who holds it, unique.
    pub name: String,
    /// Tenant; `None` = the shared one.
    pub tenant: Option<String>,
    /// Whose packets must use it.
    pub from: IpNet,
    /// Outside address.
    pub address: IpAddr,
    /// First port, a multiple of [`BLOCK_PORTS`].
    pub first_port: u16,
    /// How many, a multiple of [`BLOCK_PORTS`].
    pub ports: u32,
}

/// How packets are spread over cores (row C8).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Distribution {
    /// By the flow's hash: the owner reads it.
    #[default]
    Flow,
    /// Each interface has a core that reads it and hands over.
    Interface,
    /// Reading cores in turn.
    RoundRobin,
    /// A random reading core.
    Random,
    /// The core the network card interrupted.
    Cpu,
}

/// `[gateway]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// For a new flow that no rule matches. `None`: what comes in by an outside interface and passes through is dropped, everything
    /// else is allowed.
    pub default_action: Option<RuleAction>,
    /// How the host gets what comes in by an interface for itself.
    pub host: HostMode,
    /// Bounds.
    pub limits: Limits,
    /// How long silent flows are kept.
    pub timeouts: Timeouts,
    /// By what fragments are put together or passed on one by one (row C5).
    pub fragments: Variant,
    /// Distribution over cores.
    pub distribution: Distribution,
    /// Whether buckets move from busy cores to idle ones (row C9).
    pub core_rebalance: bool,
    /// JSON lines: who had which outside address and port, and when.
    pub log_file: Option<PathBuf>,
    /// Whose rights health checks have.
    pub health_user: User,
    /// How long flows wait for the next run after a clean end, s; 0: they end with this one.
    pub keep_flows_s: u16,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            default_action: None,
            host: HostMode::default(),
            limits: Limits::default(),
            timeouts: Timeouts::default(),
            fragments: Variant::default(),
            distribution: Distribution::default(),
            core_rebalance: true,
            log_file: None,
            health_user: User { uid: 65_534, gid: 65_534 },
            keep_flows_s: 10,
        }
    }
}
