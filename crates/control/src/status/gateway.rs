//! State of the gateway: the JSON of `status`, `flows` and `explain`. Field names say what is counted, units come last.
//! Counters count since start, except where a name says otherwise.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

/// Live state of everything that is not the tunnel.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ServicesStatus {
    /// One entry a core.
    pub cores: Vec<CoreServices>,
    /// One entry an interface.
    pub interfaces: Vec<InterfaceStatus>,
    /// One entry a rule, in their order; the last one is the default action.
    pub rules: Vec<RuleStatus>,
    /// One entry a `[[nat]]`.
    pub nats: Vec<NatStatus>,
    /// One entry a port forward.
    pub forwards: Vec<ForwardStatus>,
    /// One entry a virtual server.
    pub virtual_servers: Vec<ServerStatus>,
    /// Port ranges that are held, with those taken while running.
    pub leases: Vec<LeaseReport>,
    /// Address groups.
    pub groups: Vec<GroupReport>,
    /// Drops of all cores by reason, only those above zero.
    pub drops: BTreeMap<String, u64>,
    /// Packets that came to another core than their owner and went over a ring.
    pub handed_off_packets: u64,
    /// Replies of translated flows (rows C2, C3) that arrived at another core than the request's; must stay 0.
    pub replies_on_wrong_core_packets: u64,
    /// Wishes of address translation that could not be met.
    #[serde(flatten)]
    pub unmet: UnmetOfNat,
    /// Raised by every change of the policy.
    pub policy_era: u32,
    /// The process that checks backends; `None`: nothing was to be checked yet.
    pub health_checks: Option<HealthProcessStatus>,
    /// Flows of the run before, if it handed some over.
    pub taken_over: Option<TakenOverStatus>,
}

/// Wishes of address translation that could not be met.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct UnmetOfNat {
    /// Flows from a port below 1,024 that got one above, since none was free.
    pub low_ports_lost_flows: u64,
    /// Lines that are missing in its log, for lack of room.
    pub lost_nat_events: u64,
}

/// The process that checks backends.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HealthProcessStatus {
    /// Whether it runs. Without it verdicts stay as they are.
    pub running: bool,
    /// Its process id; 0 when it does not run.
    pub process: u32,
    /// How often it ended, or did not start, and was started again.
    pub restarts: u64,
    /// Why it ended last.
    pub last_end: String,
    /// Rights that it could not give up, and why; empty as a rule.
    pub kept_rights: String,
}

/// Flows that the run before handed over at its end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TakenOverStatus {
    /// Flows that go on.
    pub flows: u64,
    /// Flows and mappings that do not, by reason.
    pub lost: BTreeMap<String, u64>,
}

/// One core.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CoreServices {
    /// Core id.
    pub core: usize,
    /// "active", "reserved", "draining" or "stopped".
    pub state: String,
    /// Buckets of the table that it owns.
    pub buckets: u32,
    /// Packets read from interfaces, super-packets once.
    pub rx_packets: u64,
    /// Bytes of them.
    pub rx_bytes: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Bytes of them.
    pub tx_bytes: u64,
    /// Flows it keeps now.
    pub live_flows: u64,
    /// Flows it has begun.
    pub new_flows: u64,
    /// Packets it handed to their owner.
    pub handed_off_packets: u64,
    /// Packets it was handed.
    pub taken_over_packets: u64,
    /// Share of the last second it did not sleep.
    pub busy_percent: f64,
    /// Its longest round since the start, µs: packets waited that long. By the clock, as the other times are: whoever
    /// else had the CPU counts.
    pub round_us_max: u64,
    /// Rounds of more than 1 ms.
    pub rounds_over_1ms: u64,
    /// Rounds of more than 5 ms.
    pub rounds_over_5ms: u64,
    /// How long the last reload held up its round, µs.
    pub reload_us_last: u64,
    /// The longest of them, µs.
    pub reload_us_max: u64,
    /// The most CPU time that one took, µs.
    pub reload_cpu_us_max: u64,
    /// Drops by reason, only those above zero.
    pub drops: BTreeMap<String, u64>,
}

/// One interface.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct InterfaceStatus {
    /// Name in the configuration.
    pub name: String,
    /// Kernel device.
    pub device: String,
    /// "up": packets are read there; "starting", "down", "no such device", or "failed".
    pub state: String,
    /// Why it failed, and what would help.
    pub reason: String,
    /// The gateway's addresses there.
    pub addresses: Vec<String>,
    /// Tenant; empty = the shared one.
    pub tenant: String,
    /// Packets read.
    pub rx_packets: u64,
    /// Bytes of them.
    pub rx_bytes: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Bytes of them.
    pub tx_bytes: u64,
    /// Packets the kernel lost because a core did not read them in time.
    pub lost_packets: u64,
    /// Receive hash of its network card.
    pub nic_hash: NicHashStatus,
}

/// Receive hash (RSS) of an interface's network card (row C1).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NicHashStatus {
    /// "toeplitz", "xor", "crc32" or "unknown"; empty: there is none.
    pub function: String,
    /// Why the queue of a flow cannot be predicted; empty when it can.
    pub reason: String,
    /// Length of the key, bytes.
    pub key_bytes: usize,
    /// Entries of the indirection table.
    pub table_entries: usize,
    /// Queues that the table names.
    pub queues: usize,
}

/// Queue of a network card that its receive hash gives a packet to (row C1).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NicPrediction {
    /// Kernel device where the packet comes in.
    pub device: String,
    /// Why nothing can be predicted; empty when it can.
    pub reason: String,
    /// Hash of the addresses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hash: Option<u32>,
    /// Queue, if the card hashes addresses only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue: Option<u32>,
    /// Hash of addresses and ports, for TCP and UDP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hash_with_ports: Option<u32>,
    /// Queue, if the card hashes the protocol's ports too: most do for TCP, some for UDP (`ethtool -n DEVICE rx-flow-hash`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue_with_ports: Option<u32>,
}

/// One rule.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RuleStatus {
    /// Its name; "default" for the last.
    pub name: String,
    /// "allow", "drop" or "reject".
    pub action: String,
    /// Flows it has decided.
    pub matched_flows: u64,
}

/// One NAT.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NatStatus {
    /// Interface where packets leave.
    pub out: String,
    /// "address-and-port", "port-only" or "none".
    pub mode: String,
    /// Outside addresses.
    pub addresses: Vec<String>,
    /// Flows now.
    pub live_flows: u64,
    /// Ports in use now, summed over addresses and tables: one for each flow. `None`: not counted by `[[nat]]`, because
    /// clients have mappings or blocks of their own, which flows share.
    pub used_ports: Option<u64>,
    /// Ports there are, likewise; with endpoint-dependent mapping one port serves many destinations.
    pub total_ports: u64,
    /// Flows that found no port.
    pub exhausted_flows: u64,
    /// Flows refused because their client had its share.
    pub refused_flows: u64,
}

/// One port forward.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ForwardStatus {
    /// "tcp 203.0.113.1:8080".
    pub listen: String,
    /// "10.0.0.5:80".
    pub to: String,
    /// Flows now.
    pub live_flows: u64,
    /// Flows since start.
    pub total_flows: u64,
}

/// One virtual server.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ServerStatus {
    /// Name.
    pub name: String,
    /// "tcp 203.0.113.10:80".
    pub listen: String,
    /// "maglev", "least-connections", "round-robin" or "source-address".
    pub method: String,
    /// "nat" or "direct-return".
    pub delivery: String,
    /// Connections now.
    pub live_connections: u64,
    /// Connections since start.
    pub total_connections: u64,
    /// Connections refused: no backend, or the limit reached.
    pub refused_connections: u64,
    /// Its backends.
    pub backends: Vec<BackendStatus>,
}

/// One backend.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BackendStatus {
    /// Address and port.
    pub address: String,
    /// "up", "down", "draining" or "slow-start".
    pub state: String,
    /// Why it is down; empty when it is not.
    pub reason: String,
    /// Weight in force.
    pub weight: u16,
    /// Connections now.
    pub live_connections: u64,
    /// Connections that are over and still remembered for what comes late; they count nowhere.
    pub over_connections: u64,
    /// Connections since start.
    pub total_connections: u64,
    /// How long it is in this state, whole seconds, to a second.
    pub state_age_seconds: u64,
    /// It drains, and its connections may still last so long; without it as long as they like.
    pub drain_seconds_left: Option<u32>,
}

/// A port range of one outside address that belongs to one user (row R1).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseReport {
    /// Who holds it.
    pub name: String,
    /// Tenant; empty = the shared one.
    pub tenant: String,
    /// Whose packets must use it.
    pub from: ipnet::IpNet,
    /// The outside address.
    pub address: IpAddr,
    /// First port.
    pub first_port: u16,
    /// Last port.
    pub last_port: u16,
    /// Whether the configuration has it; those are not returned by command.
    pub configured: bool,
}

/// One address group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupReport {
    /// Name.
    pub name: String,
    /// How many prefixes it has.
    pub members: usize,
    /// Prefixes added by command.
    pub added: Vec<ipnet::IpNet>,
    /// Prefixes of the configuration removed by command.
    pub removed: Vec<ipnet::IpNet>,
}

/// Flows of all cores.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FlowList {
    /// Flows that match.
    pub flows: Vec<FlowReport>,
    /// Flows there are in all.
    pub live_flows: u64,
    /// Whether more match than are listed.
    pub more: bool,
    /// Whether there was no time to look at all flows.
    #[serde(default)]
    pub cut: bool,
}

/// One flow, as its first packet saw it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FlowReport {
    /// Core that owns it.
    pub core: usize,
    /// Bucket of its original direction.
    pub bucket: u32,
    /// IP protocol number.
    pub protocol: u8,
    /// Source of the first packet; for ICMP the port is the query's identifier. 0 where there are no ports.
    pub source: SocketAddr,
    /// Destination of the first packet; port 0 for ICMP.
    pub destination: SocketAddr,
    /// Source as the other side sees it.
    pub translated_source: SocketAddr,
    /// Destination after translation.
    pub translated_destination: SocketAddr,
    /// Tenant of the original direction; empty = the shared one.
    #[serde(default)]
    pub tenant: String,
    /// Interface where it came in; empty = not known any more.
    #[serde(default)]
    pub interface: String,
    /// Interface where it leaves.
    #[serde(default)]
    pub out: String,
    /// TCP state as in `conntrack`, or "replied" and "unreplied".
    pub state: String,
    /// Rule that allowed it.
    #[serde(default)]
    pub rule: String,
    /// NAT mode, or empty.
    #[serde(default)]
    pub nat: String,
    /// Virtual server, or empty.
    #[serde(default)]
    pub virtual_server: String,
    /// Seconds since its last packet.
    pub idle_seconds: f64,
    /// Seconds until it is forgotten if nothing comes.
    pub expires_in_seconds: f64,
}

/// Where a packet would go, and why: `anabranch explain`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Explanation {
    /// The packet: "tcp 10.0.0.5:1234 > 1.2.3.4:443".
    pub packet: String,
    /// Interface it is thought to come in at.
    pub interface: String,
    /// Tenant of that interface; empty = the shared one.
    pub tenant: String,
    /// Hash of the key.
    pub hash: u32,
    /// Bucket of the hash.
    pub bucket: u32,
    /// Core that owns the bucket.
    pub core: usize,
    /// Queue of the network card where it comes in; not there for packets of the host and the tunnel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nic: Option<NicPrediction>,
    /// The flow there is already, if there is one: it decides, not the rules.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flow: Option<FlowReport>,
    /// "forward", "to the gateway", "into the tunnel", "drop" or "reject".
    pub verdict: String,
    /// Why it is dropped; empty when it is not.
    pub drop_reason: String,
    /// Rule that decides; "default" for the default action.
    pub rule: String,
    /// Action of the rule: "allow", "drop" or "reject".
    pub rule_action: String,
    /// Port forward that takes it: "tcp 203.0.113.1:8080".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forward: Option<String>,
    /// Virtual server that takes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub virtual_server: Option<String>,
    /// Backend it would get now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<SocketAddr>,
    /// Why this backend: "maglev", "least-connections …".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend_reason: Option<String>,
    /// Place of the `[[nat]]` that takes it, from 1, or 0.
    pub nat: usize,
    /// Its mode; "none" without a NAT.
    pub nat_mode: String,
    /// Source it would leave with; port 0 = chosen when the flow begins.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub translated_source: Option<SocketAddr>,
    /// Destination it would leave with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub translated_destination: Option<SocketAddr>,
    /// The route: "0.0.0.0/0 via 192.0.2.1".
    pub route: String,
    /// Where it leaves: an interface, "gateway" or "tunnel".
    pub out: String,
    /// Next hop's address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_hop: Option<IpAddr>,
    /// Next hop's hardware address, once known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_hop_mac: Option<String>,
    /// Core that the reply will arrive at; equal to `core` in modes C2 and C3. Not there when none comes by here, or when
    /// it depends on the port that is chosen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reply_core: Option<usize>,
    /// Anything else worth knowing, one sentence each.
    pub notes: Vec<String>,
}
