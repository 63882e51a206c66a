//! Requests and answers of the control socket: one JSON line there and one back.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::reload::ReloadReport;
use crate::status::{BackendStatus, Explanation, FlowList, GroupReport, LeaseReport, Report, TraceReport};

pub(crate) mod flow_filter;

pub use flow_filter::FlowFilter;

/// A request: one line of JSON, for example `{"command":"status"}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Live state.
    Status,
    /// Read the configuration again and apply what changed.
    Reload,
    /// End in an orderly way.
    Stop,
    /// Flows that match.
    Flows {
        /// Which ones.
        #[serde(default)]
        filter: FlowFilter,
        /// How many at most.
        limit: usize,
    },
    /// Where a packet would go, and why.
    Explain {
        /// `tcp 10.0.0.5:1234 > 1.2.3.4:443`.
        packet: String,
        /// Interface it comes in at; the one its source is routed to by default.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        interface: Option<String>,
    },
    /// Way of a flow's packets through the cluster, asked by a packet from this dispatcher.
    Trace {
        /// As of `explain`.
        packet: String,
        /// Likewise.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        interface: Option<String>,
    },
    /// Class of a flow by the configuration (row T12).
    Class {
        /// `tcp 10.0.0.5:1234 > 1.2.3.4:443`.
        packet: String,
        /// Its mark, 0–63.
        #[serde(default)]
        dscp: u8,
        /// Server that its client asks for by TLS or QUIC.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        server_name: Option<String>,
    },
    /// Take a range of ports (row R1).
    LeaseTake(LeaseWish),
    /// Give it back.
    LeaseReturn {
        /// Who holds it.
        name: String,
    },
    /// All leases.
    LeaseList,
    /// Add prefixes to a group (row R5), or remove them.
    GroupChange {
        /// The group.
        name: String,
        /// Prefixes.
        prefixes: Vec<IpNet>,
        /// Add; else remove.
        add: bool,
    },
    /// All groups, or one.
    GroupList {
        /// Only this one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<String>,
    },
    /// Drain a backend, enable it, or change its weight.
    Backend {
        /// The virtual server.
        server: String,
        /// Address, with the port where several have the same.
        backend: String,
        /// Change.
        wish: BackendWish,
    },
    /// Take a WAN out, put it back, or change its worth (row T12).
    Path {
        /// Interface or pattern of its `[[wan]]`.
        wan: String,
        /// Change.
        wish: WanWish,
    },
    /// Take over the interfaces that another dispatcher of the cluster may have (rows R9, R10), or let go of them.
    Takeover {
        /// Take them over.
        take: bool,
    },
    /// Take a core out of work, or put it back (row C7).
    Core {
        /// Core id.
        core: usize,
        /// Put it back.
        enabled: bool,
    },
}

/// The answer: one line of JSON.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Response {
    /// Whether the request was carried out.
    pub ok: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// It was carried out, but there is something to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
    /// Answer to `status`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<Box<Report>>,
    /// Answer to `reload`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reload: Option<ReloadReport>,
    /// Answer to `flows`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flows: Option<FlowList>,
    /// Answer to `explain`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub explanation: Option<Box<Explanation>>,
    /// Answer to `trace`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace: Option<TraceReport>,
    /// Answer to `class`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<FlowClass>,
    /// Answer to `lease-take` (one entry) and `lease-list`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leases: Option<Vec<LeaseReport>>,
    /// Answer to `group-list`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub groups: Option<Vec<GroupReport>>,
    /// Answer to `group-change`: how many prefixes changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed: Option<usize>,
    /// Answer to `backend`: its state with the change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend: Option<BackendStatus>,
}

impl Response {
    /// A refusal.
    #[must_use]
    pub fn error(text: impl Into<String>) -> Self {
        Self { error: Some(text.into()), ..Self::default() }
    }

    /// Done, nothing to tell.
    #[must_use]
    pub fn done() -> Self {
        Self { ok: true, ..Self::default() }
    }
}

/// Class of a flow, and why.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowClass {
    /// Peer to which it is sent.
    pub peer: String,
    /// "bulk", "interactive", "critical", "pinned" or "cheap".
    pub class: String,
    /// Core of the peer that processes it, as far as this side chooses that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer_core: Option<u8>,
    /// Core of this node that sends it, where it has no gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub core: Option<u8>,
    /// The `[[class]]` that decides; none: bulk, or interactive if it has the shape of real-time media.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
}

/// Change of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackendWish {
    /// No new connections.
    Drain,
    /// Take part again, with the weight there was.
    Enable,
    /// Another weight, 0–1,000.
    Weight(u16),
}

/// Change of a WAN.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WanWish {
    /// Not used any more.
    Off,
    /// Used again.
    On,
    /// Other values of keys of its `[[wan]]`: key and value.
    Set(Vec<(String, String)>),
    /// As the file says.
    Reset,
}

/// Range that is asked for with `lease take`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseWish {
    /// Who holds it, unique.
    pub name: String,
    /// Whose packets must use it.
    pub from: IpNet,
    /// Tenant; `None` = the shared one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// Outside address; `None` = the first with room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// How many ports; whole blocks of 1,024 are given.
    pub ports: u32,
}
