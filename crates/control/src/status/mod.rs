//! Everything that is shown: the JSON of `status`, `flows` and `explain`, and the same as text for people.
//!
//! [`Report`] is the whole node, [`ServicesStatus`] its gateway. `read_tunnel` reads the engine for it, [`crate::gateway::engine`] the gateway's part;
//! `text` and `gateway_text` write tables of it.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

mod gateway;
mod gateway_text;
mod lan;
pub(crate) mod read_tunnel;
mod table;
mod text;
mod tunnel;

pub use gateway::{
    BackendStatus, CoreServices, Explanation, FlowList, FlowReport, ForwardStatus, GroupReport,
    HealthProcessStatus, InterfaceStatus, LeaseReport, NatStatus, NicHashStatus, NicPrediction, RuleStatus,
    ServerStatus, ServicesStatus, TakenOverStatus, UnmetOfNat,
};
pub use gateway_text::{draining, explanation, flows, groups, leases};
pub use lan::{LanFrames, LanPeer, LanStatus};
pub use text::text;
pub use tunnel::{
    ClassTrafficStatus, CoreStatus, PathStatus, PeerStatus, PeerSteering, PeerTraffic, TunnelStatus,
};

/// Everything about a running gateway; the JSON of `anabranch status --json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// The tunnel and the cores, keys at the top level.
    #[serde(flatten)]
    pub status: TunnelStatus,
    /// TUN interface.
    #[serde(default)]
    pub tun: String,
    /// UDP port that peers dial.
    #[serde(default)]
    pub listen: Option<u16>,
    /// WANs in the order of the configuration.
    #[serde(default)]
    pub wans: Vec<WanReport>,
    /// DNS names of peers.
    #[serde(default)]
    pub names: Vec<NameReport>,
    /// Obstacles on the host, each with the command that mends it.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// Table of `nft` that keeps the kernel from forwarding between the interfaces when the process has died.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forward_guard: Option<String>,
    /// Everything that is not the tunnel; not there without `[[interface]]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<ServicesStatus>,
    /// Part in a cluster; not there without `[cluster]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<ClusterStatus>,
    /// The switch between the TAP device and peers; not there without `[tap]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lan: Option<LanStatus>,
}

/// Way of a flow's packets through a cluster. Field names are JSON keys, and are kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceReport {
    /// Dispatcher that takes them in.
    pub dispatcher: u16,
    /// Data planes that they come to, in this order; the first seven, when there are more.
    pub way: Vec<u16>,
    /// How often they are handed on from one data plane to another.
    pub punts: usize,
    /// The data plane that answered; the last of the way, unless that is too long.
    pub unit: u16,
    /// Its core.
    pub core: u8,
    /// Bucket of the flow.
    pub bucket: u16,
    /// Era in force at that unit.
    pub era: u32,
    /// "has-flow", "would-begin", "handed-on-too-often" or "era-unknown".
    pub verdict: String,
}

impl TraceReport {
    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        let way: Vec<String> = self.way.iter().map(|unit| format!(" > unit {unit}")).collect();
        let verdict = match self.verdict.as_str() {
            "has-flow" => "has the flow".to_owned(),
            "would-begin" => "would begin it: nobody has it".to_owned(),
            other => format!("drops it: {other}"),
        };
        let Self { dispatcher, unit, core, bucket, era, punts, .. } = self;
        format!(
            "dispatcher {dispatcher}{}\nunit {unit} {verdict} (core {core}, bucket {bucket}, era {era}, handed on {punts} times)\n",
            way.concat()
        )
    }
}

/// Part of this machine in a cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterStatus {
    /// "dispatcher" or "dataplane".
    pub role: String,
    /// Node id.
    pub node: u16,
    /// The manager's address in the tunnel.
    pub manager: String,
    /// The manager answers; without it everything stays in force as it is.
    pub connected: bool,
    /// This machine takes part.
    pub member: bool,
    /// Newest era of the bucket table that is held here.
    pub newest_era: u32,
    /// Era by which packets are dispatched.
    pub era_in_force: u32,
    /// Node ids of all members.
    pub members: Vec<u16>,
    /// Data planes of them.
    #[serde(default)]
    pub data_planes: Vec<DataPlaneReport>,
    /// Shared interfaces of this machine.
    #[serde(default)]
    pub interfaces: Vec<SharedInterfaceReport>,
    /// This machine's share of all.
    #[serde(flatten)]
    pub share: ClusterShare,
    /// Flows that it has.
    pub flows: u64,
    /// Packets of the shared interfaces.
    #[serde(flatten)]
    pub packets: ClusterPackets,
    /// Copies of flows.
    #[serde(default)]
    pub copies: CopiesStatus,
}

/// Packets of a machine's shared interfaces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterPackets {
    /// Packets that came in.
    pub packets: u64,
    /// Of them, those that went on to another data plane, which has their flow.
    pub second_hops: u64,
    /// Packets of other units that waited for a table which was not here yet.
    #[serde(default)]
    pub waited_for_era: u64,
}

/// Share of a machine in what its cluster has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterShare {
    /// Buckets of the newest table that belong to this machine.
    pub buckets: usize,
    /// Blocks of 1,024 ports that it has for address translation.
    pub port_blocks: usize,
}

/// Copies of flows that data planes keep of each other's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopiesStatus {
    /// The data plane that has copies of this one's flows, all but those of the last two seconds.
    pub at: Option<u16>,
    /// Flows of other data planes of which copies are kept here.
    pub kept: usize,
    /// Live flows that were another data plane's.
    pub inherited: u32,
}

/// A data plane as another machine of its cluster sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataPlaneReport {
    /// Node id.
    pub node: u16,
    /// Its address inside the bonds.
    pub address: IpAddr,
    /// The bond to it is up, or it is this machine.
    pub reachable: bool,
}

/// A shared interface at one machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedInterfaceReport {
    /// Its name.
    pub name: String,
    /// This machine has it; `false`: it stands by.
    pub active: bool,
}

impl ClusterStatus {
    /// Whether this machine can do its part: whoever decides which dispatcher has an address asks this. It does not ask for
    /// the manager: without it everything goes on.
    ///
    /// # Errors
    /// The reason why not.
    pub fn health(&self) -> Result<(), String> {
        if !self.member {
            return Err("this machine does not take part in the cluster".into());
        }
        if self.data_planes.iter().any(|plane| plane.reachable) {
            return Ok(());
        }
        let nodes: Vec<String> = self.data_planes.iter().map(|plane| plane.node.to_string()).collect();
        Err(match nodes.is_empty() {
            true => "the cluster has no data plane".into(),
            false => format!("no data plane can be reached: the bonds to {} are down", nodes.join(", ")),
        })
    }
}

/// One WAN.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WanReport {
    /// WAN id.
    pub id: u16,
    /// Interface; empty = the host's own routes.
    pub interface: String,
    /// "up", or why it is not.
    pub state: String,
    /// Source addresses in use.
    pub addresses: Vec<String>,
    /// Preference, 0 first.
    pub tier: u8,
    /// MTU in bytes.
    pub mtu: u16,
    /// Bytes of this month's quota that were used; 0 without a quota.
    #[serde(default, skip_serializing_if = "is_none")]
    pub quota_used: u64,
}

fn is_none(bytes: &u64) -> bool {
    *bytes == 0
}

/// One DNS name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NameReport {
    /// Host name.
    pub host: String,
    /// Addresses of the name.
    pub addresses: Vec<String>,
    /// Why the last question failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}
