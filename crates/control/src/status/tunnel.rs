//! State of the tunnel and of the node's cores: JSON keys at the top level of `status`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The node and its tunnel.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct TunnelStatus {
    /// Node name.
    pub node: String,
    /// Program version.
    pub version: String,
    /// Seconds since the engine started.
    pub uptime_seconds: f64,
    /// One entry a core.
    pub cores: Vec<CoreStatus>,
    /// State of each: "active", "reserved" for some classes, "draining" or "stopped".
    #[serde(default)]
    pub core_states: Vec<String>,
    /// One entry a peer.
    pub peers: Vec<PeerStatus>,
    /// Packets and datagrams that were read by a core that does not own them and went over a ring.
    pub cross_core_packets: u64,
    /// Packets and datagrams read in all, for the ratio.
    pub packets_read: u64,
    /// Inner flows that more than one core processed after decryption; must stay 0.
    pub flows_split_over_cores: u64,
    /// How packets are steered: "bpf" or "ring".
    pub steering: String,
}

/// CPU core.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct CoreStatus {
    /// Core id (dense index).
    pub core: usize,
    /// CPU it is pinned to.
    pub cpu: usize,
    /// Packets (super-packets count as their segments) read from TUN.
    pub tun_rx_packets: u64,
    /// Bytes read from TUN.
    pub tun_rx_bytes: u64,
    /// Packets written to TUN (segments).
    pub tun_tx_packets: u64,
    /// Bytes written to TUN.
    pub tun_tx_bytes: u64,
    /// Datagrams received.
    pub udp_rx_datagrams: u64,
    /// Bytes received in datagrams.
    pub udp_rx_bytes: u64,
    /// Datagrams sent.
    pub udp_tx_datagrams: u64,
    /// Bytes sent in datagrams.
    pub udp_tx_bytes: u64,
    /// Packets that came to this core over a ring.
    pub ring_in_packets: u64,
    /// Packets this core handed to another over a ring.
    pub ring_out_packets: u64,
    /// Inner flows seen in the last 10–20 s.
    pub flows: u64,
    /// Share of the last second this worker did not sleep.
    pub busy_percent: f64,
    /// Drops by reason, only those above zero.
    pub drops: BTreeMap<String, u64>,
}

/// Peer.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Name.
    pub name: String,
    /// Public key, base64.
    pub public_key: String,
    /// "up" or "connecting".
    pub state: String,
    /// Why it is not up, empty when it is.
    pub reason: String,
    /// "dialer" or "listener".
    pub role: String,
    /// Age of the current session, seconds.
    pub session_age_seconds: f64,
    /// Completed handshakes since start.
    pub handshakes: u64,
    /// Number of cores of the peer, 0 before the first handshake.
    pub remote_cores: u8,
    /// "aes-256-gcm" or "chacha20-poly1305", with "partial" or "off" where configured.
    pub encryption: String,
    /// How cores are addressed.
    #[serde(default)]
    pub steering: PeerSteering,
    /// Inner packets held for order right now.
    pub held_packets: u64,
    /// Packets declared lost by the receiver's order logic.
    pub declared_lost: u64,
    /// Datagrams recovered by retransmission over another path.
    pub recovered: u64,
    /// Copies and what waits.
    #[serde(flatten)]
    pub traffic: PeerTraffic,
    /// One entry a path.
    pub paths: Vec<PathStatus>,
}

/// Copies of a peer's packets, and what waits for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerTraffic {
    /// Copies of class `critical` that came before their originals, or instead of them.
    #[serde(default)]
    pub copies_used: u64,
    /// Datagrams that were lost and came back from repair symbols.
    #[serde(default)]
    pub restored: u64,
    /// Datagrams that were not forwarded again because they had come as copy or original already (row R3).
    #[serde(default)]
    pub copies_suppressed: u64,
    /// Flows whose server's name was not looked for, though a class asks for it: too many at a time.
    #[serde(default)]
    pub server_names_missed: u64,
    /// Bytes waiting to be sent.
    pub queue_bytes: u64,
}

/// How two sides address each other's cores; empty without a session.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerSteering {
    /// How the peer addresses our cores: "core-id", "per-tunnel", ….
    pub received: String,
    /// How we address the peer's cores.
    pub sent: String,
    /// Who says which of its cores are addressed: "peer", "file" where that says something, or "peer: the file is about another
    /// number of cores".
    #[serde(default)]
    pub processor_info: String,
    /// The peer's core that all packets go to, in mode per-tunnel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote_core: Option<u8>,
}

/// Path to a peer.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct PathStatus {
    /// Path id.
    pub id: u8,
    /// Local WAN interface.
    pub wan: String,
    /// Local address, empty when the kernel chooses.
    pub local: String,
    /// Remote address.
    pub remote: String,
    /// "probing", "up", "standby" (up, but another path covers its WAN and address), "suspect" or "down".
    pub state: String,
    /// Why the state last changed.
    pub reason: String,
    /// Rate the controller allows, Mbit/s.
    pub rate_mbps: f64,
    /// Rate delivered in the last second, Mbit/s.
    pub delivered_mbps: f64,
    /// One-way delay above the fastest path's, ms.
    pub delay_ms: f64,
    /// Smoothed round-trip time, ms.
    pub rtt_ms: f64,
    /// Standing queue estimate, ms.
    pub queue_delay_ms: f64,
    /// Delay variation, ms.
    pub jitter_ms: f64,
    /// Loss in the last reports, percent.
    pub loss_percent: f64,
    /// Largest UDP payload known to pass, bytes.
    pub mtu: u16,
    /// Datagrams sent.
    pub tx_datagrams: u64,
    /// Bytes sent in datagrams.
    pub tx_bytes: u64,
    /// Datagrams received.
    pub rx_datagrams: u64,
    /// Bytes received in datagrams.
    pub rx_bytes: u64,
    /// Share of all bytes sent to this peer, percent.
    pub tx_share_percent: f64,
    /// Preference, the higher of both ends'; 254: beyond the limits of its WAN, 255: also its quota is used up.
    #[serde(default)]
    pub tier: u8,
    /// Routers that the peer's datagrams pass on their way here; not there where nobody tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hops: Option<u8>,
    /// Datagrams sent as copies of those of other paths (class `critical`).
    #[serde(default)]
    pub tx_copies: u64,
    /// Inner packets and bytes sent, by class; only classes that had any.
    #[serde(default)]
    pub classes: BTreeMap<String, ClassTrafficStatus>,
}

/// Traffic of one class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClassTrafficStatus {
    /// Inner packets.
    pub tx_packets: u64,
    /// Bytes on the wire.
    pub tx_bytes: u64,
}
