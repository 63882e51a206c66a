//! Configuration of the node: itself once, WANs and peers again whenever they change.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use arc_swap::ArcSwap;
use ipnet::IpNet;
use packet::attachment::BondId;
use steering::ownership::Ownership;
use steering::policy::Policy;

use crate::class::Classes;
use crate::core_overrides::CoreOverrides;
use crate::hello::{Capabilities, Hello};
use crate::keys::{Encryption, FlowDefinition, PrivateKey};
use crate::mode::{Refusal, Steering};

/// Fixed for the life of a [`crate::node::Node`]. Everything random is passed in, so a run can be replayed.
pub struct NodeConfig {
    /// X25519 private key.
    pub private_key: PrivateKey,
    /// Node number within a cluster, below 4,096; 0 when alone.
    pub node_id: u16,
    /// X25519 private key of the hub that this node is a unit of: peers of the hub know it by this one.
    pub hub_key: Option<PrivateKey>,
    /// Who owns a flow on this node; peers are told hash key and table. Whoever changes it swaps the pointer.
    pub ownership: Arc<ArcSwap<Ownership>>,
    /// Key of the receiver-index permutation.
    pub index_key: [u8; 16],
    /// Random for each start: lets peers notice a restart.
    pub boot_id: u64,
    /// Seed for challenge tokens and cookie secrets.
    pub seed: [u8; 32],
    /// Wall clock at `Time::ZERO`, ns since 1970; 0 when unknown.
    pub wall_clock_ns: u64,
    /// Highest handshake timestamp an earlier run may have used, ns.
    pub timestamp_floor_ns: u64,
    /// A session is renewed after this long, ms; [`crate::session::REKEY_AFTER_MS`] at most.
    pub rekey_after_ms: u64,
}

impl NodeConfig {
    /// A node alone whose keys and secrets anybody can work out, for what talks to no stranger: tests, measurements. It has so many
    /// cores.
    ///
    /// # Panics
    /// Without cores, or with more than 128.
    #[must_use]
    pub fn of_number(number: u8, cores: u8) -> Self {
        let mut state = u64::from(number) + 1;
        let keys = std::iter::repeat_with(|| {
            std::array::from_fn(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 56) as u8
            })
        });
        #[expect(clippy::expect_used, reason = "said above")]
        let ownership = Ownership::new(cores, keys).expect("1 to 128 cores");
        Self {
            private_key: PrivateKey::new([number; 32]),
            node_id: 0,
            hub_key: None,
            ownership: Arc::new(ArcSwap::from_pointee(ownership)),
            index_key: [number; 16],
            boot_id: u64::from(number),
            seed: [number; 32],
            wall_clock_ns: 1_800_000_000_000_000_000,
            timestamp_floor_ns: 0,
            rekey_after_ms: crate::session::REKEY_AFTER_MS,
        }
    }
}

/// One WAN interface as it is right now. WAN ids stay the same for one interface name for the whole run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wan {
    /// Stable id of this WAN.
    pub id: u16,
    /// Interface name; empty = do not bind to a device (no `[[wan]]` configured).
    pub interface: String,
    /// Whether the interface exists, is up and has carrier.
    pub up: bool,
    /// Usable source addresses (global or private, not link-local).
    pub addresses: Vec<IpAddr>,
    /// Interface MTU in bytes; the path MTU search starts from it.
    pub mtu: u16,
    /// Upper bound for what we send over this WAN, bits per second; `None` = find out.
    pub rate_max_bps: Option<u64>,
    /// Upper bound for what peers send us over this WAN, bits per second; they are told. `None` = find out.
    pub receive_rate_max_bps: Option<u64>,
    /// 0 is preferred; a higher tier is used only when no lower one is usable. Peers are told.
    pub tier: u8,
    /// Addresses of this machine that carry this WAN's datagrams over TCP, each to a peer: nothing else is dialled over it, and
    /// they are not over others. `None`: an ordinary WAN.
    pub relays: Option<Vec<SocketAddr>>,
    /// Its worth besides that.
    pub properties: WanProperties,
}

impl Wan {
    /// A WAN that is up, with an MTU of 1,500 bytes, bound to no device, without limits.
    #[must_use]
    pub fn new(id: u16, addresses: Vec<IpAddr>) -> Self {
        Self {
            id,
            interface: String::new(),
            up: true,
            addresses,
            mtu: 1_500,
            rate_max_bps: None,
            receive_rate_max_bps: None,
            tier: 0,
            relays: None,
            properties: WanProperties::default(),
        }
    }
}

/// Worth of a WAN, besides its tier (row T12).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WanProperties {
    /// Cost in any unit, for comparison: class `cheap` keeps to the lowest. Peers are told.
    pub cost: u16,
    /// Bytes over it are counted and paid for: class `cheap` leaves it alone while there is another. Peers are told.
    pub metered: bool,
    /// Directions in which it carries data. Peers are told.
    pub direction: Direction,
    /// A path with a longer round trip, µs, without the queue of our own making, is used only while there is no other.
    pub latency_max_us: Option<u32>,
    /// The same for a path that loses more of 10,000 datagrams.
    pub loss_max: Option<u16>,
    /// The same for a path on which the peer's datagrams pass more routers.
    pub hops_max: Option<u8>,
}

/// Directions in which a WAN carries data, seen from where it is; the small datagrams that keep it alive go both ways.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Direction {
    /// Both.
    #[default]
    Both,
    /// Peers send nothing over it.
    Send,
    /// This node sends nothing over it.
    Receive,
}

/// Paths to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerPaths {
    /// Paths per WAN pair (row T1), 1–8.
    pub per_wan_pair: u8,
    /// UDP sockets per path at most, 1–64.
    pub sockets: u8,
    /// How bulk is spread over them.
    pub spread: Spread,
}

impl Default for PeerPaths {
    fn default() -> Self {
        Self { per_wan_pair: 1, sockets: 4, spread: Spread::default() }
    }
}

/// How bulk is spread over the paths to a peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Spread {
    /// Each run of packets goes where it arrives first: as much as each path can carry.
    #[default]
    Earliest,
    /// Each path gets as many bytes as the others (row R16): for parallel paths between two hosts.
    Uniform,
}

impl Spread {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Earliest, Self::Uniform];

    /// Name in the configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Earliest => "earliest",
            Self::Uniform => "uniform",
        }
    }
}

/// One peer.
#[derive(Clone)]
pub struct Peer {
    /// Number of its bond: unique, and the same for a public key for the life of the node.
    pub id: BondId,
    /// Tenant of what comes from it: peers of several tenants may have the same inner addresses.
    pub tenant: u16,
    /// Name, unique.
    pub name: String,
    /// X25519 public key, unique.
    pub public_key: [u8; 32],
    /// Optional preshared key.
    pub preshared_key: Option<PrivateKey>,
    /// It is a peer of the hub that this node is a unit of, and dials that ([`NodeConfig::hub_key`]).
    pub hub: bool,
    /// Resolved remote addresses to dial; empty = the peer dials us.
    pub endpoints: Vec<SocketAddr>,
    /// Inner prefixes that belong to this peer (as WireGuard's AllowedIPs).
    pub allowed_ips: Vec<IpNet>,
    /// WANs this bond may use (row T1); `None` = all.
    pub wans: Option<Vec<u16>>,
    /// Its paths.
    pub paths: PeerPaths,
    /// Encryption of inner packets (row T11).
    pub encryption: Encryption,
    /// How a sending core chooses the receiving core (row T4).
    pub policy: Policy,
    /// Definition of a flow (row T2).
    pub flow: FlowDefinition,
    /// How cores are addressed (rows T4–T9).
    pub steering: Steering,
    /// Ethernet frames are exchanged with it (row T14); both sides must want that.
    pub ethernet: bool,
}

impl Peer {
    /// A peer that dials us over any WAN, has no inner prefixes yet, and everything else as by default.
    #[must_use]
    pub fn new(id: BondId, name: impl Into<String>, public_key: [u8; 32]) -> Self {
        Self {
            id,
            tenant: 0,
            name: name.into(),
            public_key,
            preshared_key: None,
            hub: false,
            endpoints: Vec::new(),
            allowed_ips: Vec::new(),
            wans: None,
            paths: PeerPaths::default(),
            encryption: Encryption::default(),
            policy: Policy::default(),
            flow: FlowDefinition::default(),
            steering: Steering::default(),
            ethernet: false,
        }
    }

    /// Optional parts of the protocol that it is told of.
    pub(crate) fn capabilities(&self) -> Capabilities {
        if self.ethernet { Capabilities::OURS.with(Capabilities::ETHERNET) } else { Capabilities::OURS }
    }

    /// Why there is no session with a peer that says this; `None` when there is one.
    pub(crate) fn refusal(&self, hello: &Hello) -> Option<Refusal> {
        let theirs = hello.capabilities.contains(Capabilities::ETHERNET);
        match (self.ethernet, theirs) {
            (true, false) => Some(Refusal::NoEthernetThere),
            (false, true) => Some(Refusal::NoEthernetHere),
            _ => self.steering.refusal(hello.steering, hello.accepted),
        }
    }

    /// Whether the bond may use a WAN (row T1): a dialer makes paths over these only, a listener takes no others.
    pub fn may_use(&self, wan: u16) -> bool {
        self.wans.as_ref().is_none_or(|wans| wans.contains(&wan))
    }
}

/// Everything that may change while the node runs.
#[derive(Clone, Default)]
pub struct Snapshot {
    /// WAN interfaces.
    pub wans: Vec<Wan>,
    /// Peers.
    pub peers: Vec<Peer>,
    /// Classes of the flows that are sent to them (row T12), by bond.
    pub classes: BTreeMap<BondId, Arc<Classes>>,
    /// Cores of peers as an operator knows them, in place of what they tell (row T3), by bond.
    pub core_overrides: BTreeMap<BondId, Arc<CoreOverrides>>,
}
