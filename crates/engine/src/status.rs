//! Live state as the operator sees it; the JSON of `anabranch status --json`.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use tunnel::Encryption;
use tunnel::bond::Bond;
use tunnel::path::Path;
use tunnel::time::Time;

use crate::Shared;
use crate::config::{Settings, Snapshot};
use crate::counters::Counters;

/// The whole node.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Status {
    /// Node name.
    pub node: String,
    /// Program version.
    pub version: String,
    /// Seconds since the engine started.
    pub uptime_seconds: f64,
    /// One entry a core.
    pub cores: Vec<CoreStatus>,
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

/// One worker core.
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

/// One peer.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Name.
    pub name: String,
    /// Public key, base64.
    pub public_key: String,
    /// "up", "connecting" or "down".
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
    /// Inner packets held for order right now.
    pub held_packets: u64,
    /// Packets declared lost by the receiver's order logic.
    pub declared_lost: u64,
    /// Datagrams recovered by retransmission over another path.
    pub recovered: u64,
    /// Packets waiting to be sent.
    pub queue_bytes: u64,
    /// One entry a path.
    pub paths: Vec<PathStatus>,
}

/// One path.
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
}

/// What the last scrape saw, for rates per second.
#[derive(Default)]
pub struct Rates {
    at: Option<Instant>,
    busy_ns: Vec<u64>,
    busy_percent: Vec<f64>,
}

/// Gathers the live state.
pub(crate) fn collect(
    shared: &Shared,
    settings: &Settings,
    snapshot: &Snapshot,
    started: Instant,
    steering: &str,
    rates: &mut Rates,
) -> Status {
    let now = Time::from_ns(linux::clock::monotonic_ns());
    let now_s = (now.ns() / 1_000_000_000) as u32;
    let elapsed_ns = rates.at.map_or(started.elapsed(), |at| at.elapsed()).as_nanos() as f64;
    let mut status = Status {
        node: settings.name.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        uptime_seconds: started.elapsed().as_secs_f64(),
        steering: steering.to_owned(),
        ..Status::default()
    };
    rates.busy_ns.resize(shared.counters.len(), 0);
    rates.busy_percent.resize(shared.counters.len(), 0.0);
    let mut seen = BTreeMap::<u32, u32>::new();
    for (core, counters) in shared.counters.iter().enumerate() {
        let flows = counters.flows(now_s);
        for flow in &flows {
            *seen.entry(*flow).or_default() += 1;
        }
        let busy_ns = counters.busy_ns.get();
        // Two scrapes in quick succession say nothing about a rate.
        if elapsed_ns >= 100e6 {
            rates.busy_percent[core] = (busy_ns - rates.busy_ns[core]) as f64 * 100.0 / elapsed_ns;
            rates.busy_ns[core] = busy_ns;
        }
        status.cores.push(core_status(
            core,
            settings.cpus[core],
            counters,
            flows.len(),
            rates.busy_percent[core],
        ));
    }
    if elapsed_ns >= 100e6 {
        rates.at = Some(Instant::now());
    }
    status.flows_split_over_cores = seen.values().filter(|cores| **cores > 1).count() as u64;
    status.cross_core_packets = status.cores.iter().map(|core| core.ring_out_packets).sum();
    status.packets_read = status.cores.iter().map(|core| core.tun_rx_packets + core.udp_rx_datagrams).sum();
    let bonds = shared.node.bonds.load();
    status.peers = bonds.iter().map(|bond| peer_status(bond, snapshot, now)).collect();
    status
}

fn core_status(core: usize, cpu: usize, counters: &Counters, flows: usize, busy_percent: f64) -> CoreStatus {
    let drops = counters.drops().filter(|(_, count)| *count > 0);
    CoreStatus {
        core,
        cpu,
        tun_rx_packets: counters.tun_rx_packets.get(),
        tun_rx_bytes: counters.tun_rx_bytes.get(),
        tun_tx_packets: counters.tun_tx_packets.get(),
        tun_tx_bytes: counters.tun_tx_bytes.get(),
        udp_rx_datagrams: counters.udp_rx_datagrams.get(),
        udp_rx_bytes: counters.udp_rx_bytes.get(),
        udp_tx_datagrams: counters.udp_tx_datagrams.get(),
        udp_tx_bytes: counters.udp_tx_bytes.get(),
        ring_in_packets: counters.ring_in.get(),
        ring_out_packets: counters.ring_out.get(),
        flows: flows as u64,
        busy_percent: (busy_percent * 10.0).round() / 10.0,
        drops: drops.map(|(reason, count)| (reason.name().to_owned(), count)).collect(),
    }
}

fn peer_status(bond: &Bond, snapshot: &Snapshot, now: Time) -> PeerStatus {
    let peer = bond.peer.load();
    let session = bond.current.load();
    let paths = bond.paths.load();
    let up = session.is_some() && paths.iter().any(|path| path.usable());
    let sent: u64 = paths.iter().map(|path| path.traffic.tx_bytes.load(Relaxed)).sum();
    let usable = paths.iter().filter(|path| path.usable());
    let fastest_us = usable.map(|path| path.delay_us()).min().unwrap_or(0);
    let reason = match (up, session.is_some(), paths.is_empty()) {
        (true, ..) => "",
        (_, true, _) => "no path answers",
        (_, false, true) if bond.dialer => "no WAN is up",
        (_, false, true) => "waiting for the peer to dial",
        (_, false, false) => "no answer to the handshake",
    };
    PeerStatus {
        name: peer.name.clone(),
        public_key: base64(&peer.public_key),
        state: if up { "up" } else { "connecting" }.to_owned(),
        reason: reason.to_owned(),
        role: if bond.dialer { "dialer" } else { "listener" }.to_owned(),
        session_age_seconds: session.as_ref().map_or(0.0, |s| now.since(s.established) as f64 / 1e9),
        handshakes: bond.totals.handshakes.load(Relaxed),
        remote_cores: session.as_ref().map_or(0, |s| s.peer_cores),
        encryption: session.as_ref().map_or_else(String::new, |s| match s.encryption {
            Encryption::On => s.aead.name().to_owned(),
            Encryption::Partial => format!("{} (payload only)", s.aead.name()),
            Encryption::Off => "off".to_owned(),
        }),
        held_packets: u64::try_from(bond.totals.held_packets.load(Relaxed)).unwrap_or(0),
        declared_lost: bond.totals.declared_lost.load(Relaxed),
        recovered: bond.totals.recovered.load(Relaxed),
        queue_bytes: u64::try_from(bond.totals.queue_bytes.load(Relaxed)).unwrap_or(0),
        paths: paths.iter().map(|path| path_status(path, snapshot, sent, fastest_us)).collect(),
    }
}

fn path_status(path: &Path, snapshot: &Snapshot, sent: u64, fastest_us: i64) -> PathStatus {
    let route = path.route();
    let wan = snapshot.wans.iter().find(|wan| wan.id == route.wan);
    let (loss, delivered) = path.delivery();
    let ms = |us: f64| (us / 10.0).round() / 100.0;
    let mbps = |bytes: u64| (bytes as f64 * 8.0 / 1e4).round() / 100.0;
    let tx_bytes = path.traffic.tx_bytes.load(Relaxed);
    PathStatus {
        id: path.id,
        wan: wan.map_or_else(String::new, |wan| wan.interface.clone()),
        local: route.local.map_or_else(String::new, |local| local.to_string()),
        remote: route.remote.to_string(),
        state: if path.usable() && !path.carries() { "standby" } else { path.state().name() }.to_owned(),
        reason: path.reason().to_owned(),
        rate_mbps: mbps(path.rate()),
        delivered_mbps: mbps(delivered),
        delay_ms: ms((path.delay_us() - fastest_us) as f64),
        rtt_ms: ms(f64::from(path.rtt_us())),
        queue_delay_ms: ms(f64::from(path.queue_us())),
        jitter_ms: ms(f64::from(path.jitter_us())),
        loss_percent: (loss * 1e4).round() / 100.0,
        mtu: u16::try_from(path.datagram_bytes()).unwrap_or(u16::MAX),
        tx_datagrams: path.traffic.tx_datagrams.load(Relaxed),
        tx_bytes,
        rx_datagrams: path.traffic.rx_datagrams.load(Relaxed),
        rx_bytes: path.traffic.rx_bytes.load(Relaxed),
        tx_share_percent: if sent == 0 {
            0.0
        } else {
            (tx_bytes as f64 * 1_000.0 / sent as f64).round() / 10.0
        },
    }
}

/// A public key as WireGuard's tools print it.
fn base64(key: &[u8; 32]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(key)
}
