//! State of the switch between the TAP device and peers: JSON key `lan`.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

/// The switch between the TAP device and peers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LanStatus {
    /// Name of the TAP device.
    pub tap: String,
    /// Its MTU, bytes.
    pub mtu: u16,
    /// Bridge that it is to be in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bridge: Option<String>,
    /// Its LAN is joined with that of another node, which works: this one stands by.
    pub standby: bool,
    /// Stations in the LAN.
    pub lan_stations: usize,
    /// One entry a peer with `ethernet = true`.
    pub peers: Vec<LanPeer>,
    /// Addresses whose owner is known.
    pub neighbors: usize,
    /// Decisions about frames.
    pub frames: LanFrames,
    /// Frames that the LAN sent, super-frames as their segments.
    pub rx_frames: u64,
    /// Bytes of them.
    pub rx_bytes: u64,
    /// Frames that the LAN got.
    pub tx_frames: u64,
    /// Bytes of them.
    pub tx_bytes: u64,
    /// Frames that were dropped, by reason without "ethernet-", only those above zero.
    pub drops: BTreeMap<String, u64>,
}

/// Decisions about frames.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LanFrames {
    /// To a known station.
    pub known: u64,
    /// Flooded.
    pub flooded: u64,
    /// Of one peer, passed on to others.
    pub relayed: u64,
    /// Questions about addresses that were answered here.
    pub answered: u64,
    /// Of a station that was not learnt for want of room.
    pub not_learned: u64,
}

/// A peer of the switch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LanPeer {
    /// Name.
    pub name: String,
    /// Stations behind it.
    pub stations: usize,
}

impl LanStatus {
    /// Lines for people.
    pub(super) fn write(&self, out: &mut String) {
        let bridge = self.bridge.as_ref().map_or_else(String::new, |bridge| format!(" in {bridge}"));
        let standby = if self.standby { ", STANDS BY: its LAN is joined with another node's" } else { "" };
        let _ = writeln!(out, "\nLAN {}{bridge}, MTU {}{standby}", self.tap, self.mtu);
        let peers = self.peers.iter().map(|peer| format!("{} at {}", peer.stations, peer.name));
        let stations = std::iter::once(format!("{} here", self.lan_stations)).chain(peers);
        let _ = writeln!(out, "  stations: {}", stations.collect::<Vec<_>>().join(", "));
        let _ = writeln!(
            out,
            "  frames: {} known, {} flooded, {} passed on between peers; {} questions answered",
            self.frames.known, self.frames.flooded, self.frames.relayed, self.frames.answered
        );
        if !self.drops.is_empty() {
            let drops = self.drops.iter().map(|(reason, count)| format!("{reason} {count}"));
            let _ = writeln!(out, "  drops: {}", drops.collect::<Vec<_>>().join(", "));
        }
    }
}
