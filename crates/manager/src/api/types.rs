//! Bodies of requests and answers.

use std::net::IpAddr;

use cluster::hardware_address;
use cluster::manager::{Standing, Status, Step};
use cluster::message::{Role, SharedInterface};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Duty of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Duty {
    /// Has shared interfaces and keeps nothing per flow.
    Dispatcher,
    /// Owns flows.
    Dataplane,
    /// Both.
    Both,
}

impl From<Duty> for Role {
    fn from(duty: Duty) -> Self {
        match duty {
            Duty::Dispatcher => Self::Dispatcher,
            Duty::Dataplane => Self::DataPlane,
            Duty::Both => Self::Both,
        }
    }
}

impl From<Role> for Duty {
    fn from(role: Role) -> Self {
        match role {
            Role::Dispatcher => Self::Dispatcher,
            Role::DataPlane => Self::Dataplane,
            Role::Both => Self::Both,
        }
    }
}

/// A unit that shall take part.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewUnit {
    /// Node id, below 4,096.
    pub node: u16,
    /// Bus address; needed once.
    #[schema(value_type = Option<String>, example = "10.9.0.3")]
    pub address: Option<IpAddr>,
    /// Duty; needed once.
    pub role: Option<Duty>,
    /// Capacity relative to other data planes'; by default what the unit says.
    pub weight: Option<u32>,
}

/// A unit that shall enrol itself.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewToken {
    /// Node id of the unit, below 4,096.
    pub node: u16,
    /// Its duty.
    pub role: Duty,
    /// Capacity relative to other data planes'; by default what the unit says.
    pub weight: Option<u32>,
    /// How long the token is valid, seconds, 1 to 604,800; an hour by default.
    pub valid_seconds: Option<u32>,
}

/// A token, which is shown this once.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct IssuedToken {
    /// Its text, for `token-file` in the unit's `[cluster]`.
    pub token: String,
    /// Node id of the unit.
    pub node: u16,
    /// When it ends, seconds since 1970.
    pub ends_unix_s: u64,
}

/// Another capacity.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewWeight {
    /// Relative to other data planes'.
    pub weight: u32,
}

/// How a unit drains.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Drain {
    /// It is removed when nothing is left on it.
    #[serde(default)]
    pub remove: bool,
    /// Its flows go to another data plane: it does not wait for their end.
    #[serde(default)]
    pub migrate: bool,
}

/// One step of a change.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum ChangeStep {
    /// A unit takes part.
    Add(NewUnit),
    /// A unit gets no new flows.
    Drain {
        /// The node.
        node: u16,
        /// It is removed when nothing is left on it.
        #[serde(default)]
        remove: bool,
        /// Its flows go to another data plane: it does not wait for their end.
        #[serde(default)]
        migrate: bool,
    },
    /// A unit takes no part any more.
    Remove {
        /// The node.
        node: u16,
        /// Also if it still has flows: they end.
        #[serde(default)]
        force: bool,
    },
    /// A unit has another capacity.
    Weight {
        /// The node.
        node: u16,
        /// Relative to other data planes'.
        weight: u32,
    },
}

impl ChangeStep {
    /// The state machine's word for it.
    ///
    /// # Errors
    /// Of a unit that is told only half.
    pub fn step(&self) -> Result<Step, String> {
        Ok(match self {
            Self::Add(unit) => {
                let enrol = match (unit.address, unit.role) {
                    (Some(address), Some(role)) => Some((address, role.into())),
                    (None, None) => None,
                    _ => return Err("address and role of a unit belong together".to_owned()),
                };
                Step::Add { node: unit.node, enrol, weight: unit.weight }
            }
            Self::Drain { node, remove, migrate } => {
                Step::Drain { node: *node, remove: *remove, migrate: *migrate }
            }
            Self::Remove { node, force } => Step::Remove { node: *node, force: *force },
            Self::Weight { node, weight } => Step::Weight { node: *node, weight: *weight },
        })
    }
}

/// Steps that take effect together, with one era.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Change {
    /// At most one for a unit.
    pub steps: Vec<ChangeStep>,
}

/// A change that was stored and will be carried out.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
pub struct Accepted {
    /// Its number; it is done when it is not among the plan's accepted ones any more.
    pub accepted: u64,
}

/// Reason for a refusal.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// Text for people.
    pub error: String,
}

/// Shared interface.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Interface {
    /// Number in the encapsulation.
    pub id: u8,
    /// Name, the same at all units.
    pub name: String,
    /// Hardware address.
    #[schema(example = "02:00:5e:00:01:01")]
    pub mac: String,
    /// Addresses with their prefix lengths.
    #[schema(example = json!(["192.0.2.1/24"]))]
    pub addresses: Vec<String>,
    /// It leads to the Internet.
    #[serde(default)]
    pub outside: bool,
}

/// Configuration that all units share.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Configuration {
    /// Shared interfaces.
    pub interfaces: Vec<Interface>,
    /// Addresses that sources are translated to: their ports are leased to units.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub outside: Vec<IpAddr>,
}

impl Interface {
    /// The protocol's words for it.
    ///
    /// # Errors
    /// Of a hardware address that is none.
    pub fn shared(&self) -> Result<SharedInterface, String> {
        let mac = hardware_address::parse(&self.mac).map_err(|error| {
            format!(
                "interface {}: \"{}\" is {error}; one interface has an address such as 02:00:5e:00:01:01",
                self.name, self.mac
            )
        })?;
        let mut addresses = Vec::with_capacity(self.addresses.len());
        for text in &self.addresses {
            let net: IpNet = text.parse().map_err(|_| {
                format!(
                    "interface {}: \"{text}\" is no address with its prefix length such as 192.0.2.1/24",
                    self.name
                )
            })?;
            addresses.push((net.addr(), net.prefix_len()));
        }
        Ok(SharedInterface { id: self.id, outside: self.outside, mac, name: self.name.clone(), addresses })
    }

    /// The other way.
    #[must_use]
    pub fn of(shared: &SharedInterface) -> Self {
        let nets = shared.addresses.iter().map(|(address, length)| format!("{address}/{length}"));
        Self {
            id: shared.id,
            name: shared.name.clone(),
            mac: shared.mac.map(|byte| format!("{byte:02x}")).join(":"),
            addresses: nets.collect(),
            outside: shared.outside,
        }
    }
}

/// State of a unit.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct UnitReport {
    /// Node id.
    pub node: u16,
    /// Bus address.
    #[schema(value_type = String)]
    pub address: IpAddr,
    /// Duty.
    pub role: Duty,
    /// "free", "active", "draining", "removing" or "lost".
    pub standing: String,
    /// It has a connection.
    pub connected: bool,
    /// Capacity.
    pub weight: u32,
    /// Buckets that it owns.
    pub buckets: usize,
    /// Buckets in whose chain it stands.
    pub chained_buckets: usize,
    /// Live flows, counted by bucket.
    pub live_flows: u64,
    /// Load, percent.
    pub load_percent: u8,
    /// Packets that it sent on to another unit.
    pub second_hops: u64,
    /// Packets that came.
    pub packets: u64,
    /// Blocks of 1,024 ports that it has.
    pub port_blocks: usize,
    /// Nothing is left on it.
    pub drained: bool,
}

/// Change under way and those that wait.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Plan {
    /// "idle", "preparing", "committing-data-planes", "committing-dispatchers" or "draining".
    pub stage: String,
    /// Era in force.
    pub era: Option<u32>,
    /// Era that comes.
    pub next_era: Option<u32>,
    /// Units that have not acknowledged.
    pub missing: Vec<u16>,
    /// Why accepted changes wait.
    pub waits: Option<String>,
    /// Numbers of the accepted changes that are not done.
    pub accepted: Vec<u64>,
}

/// State of the cluster.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ClusterReport {
    /// The change under way.
    pub plan: Plan,
    /// Buckets by the length of their chain, from 0 to 4.
    pub chains: Vec<usize>,
    /// Live flows by the length of their bucket's chain, from 0 to 4.
    pub flows_by_chain: Vec<u64>,
    /// Live flows by their unit's place: 0 the owner of the bucket, 1 to 4 its place in the chain.
    pub flows_by_place: Vec<u64>,
    /// Blocks of ports of lost units that nobody may use yet.
    pub quarantined_blocks: usize,
    /// Units, by node id.
    pub units: Vec<UnitReport>,
}

impl ClusterReport {
    /// As the state machine tells it.
    #[must_use]
    pub fn of(status: &Status) -> Self {
        let unit = |unit: &cluster::manager::UnitStatus| UnitReport {
            node: unit.node,
            address: unit.address,
            role: unit.role.into(),
            standing: match unit.standing {
                Standing::Free => "free",
                Standing::Active => "active",
                Standing::Draining { remove: false } => "draining",
                Standing::Draining { remove: true } => "removing",
                Standing::Lost => "lost",
            }
            .to_owned(),
            connected: unit.connected,
            weight: unit.weight,
            buckets: unit.buckets,
            chained_buckets: unit.chained,
            live_flows: unit.live,
            load_percent: unit.load_percent,
            second_hops: unit.second_hops,
            packets: unit.packets,
            port_blocks: unit.blocks,
            drained: unit.drained,
        };
        Self {
            plan: Plan {
                stage: status.stage.to_owned(),
                era: status.in_force,
                next_era: status.next,
                missing: status.missing.clone(),
                waits: status.waits.clone(),
                accepted: status.accepted.clone(),
            },
            chains: status.chains.to_vec(),
            flows_by_chain: status.flows_by_chain.to_vec(),
            flows_by_place: status.flows_by_place.to_vec(),
            quarantined_blocks: status.quarantined,
            units: status.units.iter().map(unit).collect(),
        }
    }
}

/// Line of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EventLine {
    /// When, ms since 1970.
    pub at_unix_ms: u64,
    /// The unit that it is about.
    pub node: Option<u16>,
    /// The line.
    pub text: String,
}
