//! Configuration of the engine, from the control side: one immutable [`Snapshot`] at a time.
//!
//! `Settings` are fixed for the life of the engine; a [`Snapshot`] may be replaced at any moment
//! (reload, a WAN that comes or goes, a name that resolves anew) without dropping a flow.

/// Fixed at start.
#[derive(Clone)]
pub struct Settings {
    /// Node name, for status and logs.
    pub name: String,
    /// X25519 private key, 32 bytes.
    pub private_key: tunnel::PrivateKey,
    /// Private key of the hub that this node is a unit of ([`tunnel::config::NodeConfig::hub_key`]).
    pub hub_key: Option<tunnel::PrivateKey>,
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
    /// Where an earlier process had the flows that this one takes over.
    pub placement: Option<crate::handover::Placement>,
    /// A session is renewed after this long, ms.
    pub rekey_after_ms: u64,
}

pub use tunnel::config::{Peer, Snapshot, Wan};
