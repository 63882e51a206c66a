//! What the control side tells the engine: one immutable [`Snapshot`] at a time.
//!
//! `Settings` are fixed for the life of the engine; a [`Snapshot`] may be replaced at any moment
//! (reload, a WAN that comes or goes, a name that resolves anew) without dropping a flow.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

/// Fixed at start.
#[derive(Clone)]
pub struct Settings {
    /// Node name, for status and logs.
    pub name: String,
    /// X25519 private key, 32 bytes.
    pub private_key: tunnel::PrivateKey,
    /// CPU number of each worker; the index in this list is the core id. 1–128 entries.
    pub cpus: Vec<usize>,
    /// UDP port that peers dial; `None` on a node that only dials.
    pub listen_port: Option<u16>,
    /// Name of the TUN interface.
    pub tun_name: String,
    /// MTU of the TUN interface in bytes (1280–9000), 1500 by default.
    pub tun_mtu: u16,
    /// Firewall mark set on every tunnel socket, so that policy routing can tell them apart; 0 = none.
    pub mark: u32,
    /// Last handshake timestamp persisted by an earlier run, ns; replay protection survives a 1970 clock.
    pub timestamp_floor_ns: u64,
    /// Wall clock at start, ns since 1970 (0 if unknown).
    pub wall_clock_ns: u64,
}

/// One WAN interface as it is right now. WAN ids stay the same for one interface name for the whole run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wan {
    /// Stable id of this WAN.
    pub id: u16,
    /// Interface name, for SO_BINDTODEVICE; empty = do not bind (no `[[wan]]` configured).
    pub interface: String,
    /// Whether the interface exists, is up and has carrier.
    pub up: bool,
    /// Usable source addresses (global or private, not link-local).
    pub addresses: Vec<IpAddr>,
    /// Interface MTU in bytes; the path MTU search starts from it.
    pub mtu: u16,
    /// Upper bound for what we send over this WAN, bits per second; `None` = find out.
    pub rate_max_bps: Option<u64>,
    /// 0 is preferred; a higher tier is used only when no lower one is usable.
    pub tier: u8,
}

/// One peer.
#[derive(Clone)]
pub struct Peer {
    /// Name, unique.
    pub name: String,
    /// X25519 public key, unique.
    pub public_key: [u8; 32],
    /// Optional preshared key.
    pub preshared_key: Option<tunnel::PrivateKey>,
    /// Resolved remote addresses to dial; empty = the peer dials us.
    pub endpoints: Vec<SocketAddr>,
    /// Inner prefixes that belong to this peer (as WireGuard's AllowedIPs).
    pub allowed_ips: Vec<IpNet>,
    /// WANs this bond may use (row T1); `None` = all.
    pub wans: Option<Vec<u16>>,
    /// Paths per WAN pair (row T1), 1–8, default 1.
    pub paths_per_pair: u8,
    /// UDP sockets per path at most, 1–64, default 4.
    pub sockets_per_path: u8,
    /// Encryption of inner packets (row T11).
    pub encryption: tunnel::Encryption,
    /// How a sending core chooses the receiving core (row T4).
    pub policy: steering::policy::Policy,
    /// What makes a flow (row T2).
    pub flow: tunnel::FlowDefinition,
}

/// Everything that may change while the engine runs.
#[derive(Clone, Default)]
pub struct Snapshot {
    /// WAN interfaces.
    pub wans: Vec<Wan>,
    /// Peers.
    pub peers: Vec<Peer>,
}
