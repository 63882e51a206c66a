//! Reads the engine's counters and bonds into [`TunnelStatus`].

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use engine::Engine;
use engine::config::Wan;
use engine::counters::Counters;
use tunnel::Encryption;
use tunnel::bond::Bond;
use tunnel::class::Class;
use tunnel::path::Path;
use tunnel::time::Time;

use crate::gateway::engine::core_state;
use crate::tls_paths;

use super::{
    ClassTrafficStatus, CoreStatus, PathStatus, PeerStatus, PeerSteering, PeerTraffic, TunnelStatus,
};

/// Busy times of the last reading, for shares of the time since.
#[derive(Default)]
pub(crate) struct BusyShares {
    at: Option<Instant>,
    busy_ns: Vec<u64>,
    busy_percent: Vec<f64>,
}

/// Reads the live state. `wans`: as the engine was told them, for their names.
pub(crate) fn read(engine: &Engine, node: &str, wans: &[Wan], shares: &mut BusyShares) -> TunnelStatus {
    let now = Time::from_ns(linux::clock::monotonic_ns());
    let now_ms = (now.ns() / 1_000_000) as u32;
    let started = engine.started();
    let elapsed_ns = shares.at.map_or(started.elapsed(), |at| at.elapsed()).as_nanos() as f64;
    let mut status = TunnelStatus {
        node: node.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        uptime_seconds: started.elapsed().as_secs_f64(),
        steering: engine.steering().to_owned(),
        core_states: engine.core_states().iter().map(|(state, _)| core_state(*state).to_owned()).collect(),
        ..TunnelStatus::default()
    };
    let counters = engine.counters();
    shares.busy_ns.resize(counters.len(), 0);
    shares.busy_percent.resize(counters.len(), 0.0);
    let mut stays = Vec::with_capacity(counters.len());
    for (core, counters) in counters.iter().enumerate() {
        let flows = counters.flows(now_ms);
        let busy_ns = counters.busy_ns.get();
        // Two scrapes in quick succession say nothing about a rate.
        if elapsed_ns >= 100e6 {
            shares.busy_percent[core] = (busy_ns - shares.busy_ns[core]) as f64 * 100.0 / elapsed_ns;
            shares.busy_ns[core] = busy_ns;
        }
        status.cores.push(core_status(
            core,
            engine.cpus()[core],
            counters,
            flows.len(),
            shares.busy_percent[core],
        ));
        stays.push(flows);
    }
    if elapsed_ns >= 100e6 {
        shares.at = Some(Instant::now());
    }
    status.flows_split_over_cores = engine::counters::split_flows(&stays);
    status.cross_core_packets = status.cores.iter().map(|core| core.ring_out_packets).sum();
    status.packets_read = counters
        .iter()
        .map(|core| core.tun_rx_packets.get() + core.udp_rx_datagrams.get() + core.interface_rx_packets.get())
        .sum();
    status.peers = engine.bonds().iter().map(|bond| peer_status(bond, wans, now)).collect();
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

/// Whether packets can be sent to the peer.
pub(crate) fn is_up(bond: &Bond) -> bool {
    bond.current.load().is_some() && bond.paths.load().iter().any(|path| path.usable())
}

fn peer_status(bond: &Bond, wans: &[Wan], now: Time) -> PeerStatus {
    let peer = bond.peer.load();
    let session = bond.current.load();
    let paths = bond.paths.load();
    let up = is_up(bond);
    let sent: u64 = paths.iter().map(|path| path.traffic.tx_bytes.load(Relaxed)).sum();
    let usable = paths.iter().filter(|path| path.usable());
    let fastest_us = usable.map(|path| path.delay_us()).min().unwrap_or(0);
    let refused = bond.refused.load_full().map(|refusal| refusal.to_string());
    let reason = match (up, session.is_some(), paths.is_empty()) {
        (true, ..) => "",
        (_, true, _) => "no path answers",
        (_, false, true) if bond.dialer => "no WAN is up",
        (_, false, true) => "waiting for the peer to dial",
        (_, false, false) => "no answer to the handshake",
    };
    PeerStatus {
        name: peer.name.clone(),
        public_key: crate::key::encode(&peer.public_key),
        state: if up { "up" } else { "connecting" }.to_owned(),
        reason: refused.unwrap_or_else(|| reason.to_owned()),
        role: if bond.dialer { "dialer" } else { "listener" }.to_owned(),
        session_age_seconds: session.as_ref().map_or(0.0, |s| now.since(s.established) as f64 / 1e9),
        handshakes: bond.totals.handshakes.load(Relaxed),
        remote_cores: session.as_ref().map_or(0, |s| s.peer_cores),
        encryption: session.as_ref().map_or_else(String::new, |s| match s.encryption {
            Encryption::On => s.aead.name().to_owned(),
            Encryption::Partial => format!("{} (payload only)", s.aead.name()),
            Encryption::Off => "off".to_owned(),
        }),
        steering: session.as_ref().map_or_else(PeerSteering::default, |session| PeerSteering {
            received: session.receives.to_string(),
            sent: session.sends.to_string(),
            processor_info: processor_info(bond).to_owned(),
            remote_core: bond.tunnel_core(session),
        }),
        held_packets: u64::try_from(bond.totals.held_packets.load(Relaxed)).unwrap_or(0),
        declared_lost: bond.totals.declared_lost.load(Relaxed),
        recovered: bond.totals.recovered.load(Relaxed),
        traffic: PeerTraffic {
            copies_used: bond.totals.copies_used.load(Relaxed),
            restored: bond.totals.restored.load(Relaxed),
            copies_suppressed: bond.totals.copies_suppressed.load(Relaxed),
            server_names_missed: bond.server_names_missed(),
            queue_bytes: u64::try_from(bond.totals.queue_bytes.load(Relaxed)).unwrap_or(0),
        },
        paths: paths.iter().map(|path| path_status(path, wans, sent, fastest_us)).collect(),
    }
}

/// Where the cores that a peer is sent to by come from.
fn processor_info(bond: &Bond) -> &'static str {
    match bond.cores.overridden() {
        None => "peer",
        Some(true) => "file",
        Some(false) => "peer: the file is about another number of cores",
    }
}

/// Classes that had traffic on a path.
fn classes_of(path: &Path) -> BTreeMap<String, ClassTrafficStatus> {
    let traffic = Class::ALL.iter().zip(&path.traffic.classes).map(|(class, traffic)| {
        let (tx_packets, tx_bytes) = (traffic.packets.load(Relaxed), traffic.bytes.load(Relaxed));
        (class.name().to_owned(), ClassTrafficStatus { tx_packets, tx_bytes })
    });
    traffic.filter(|(_, traffic)| traffic.tx_packets > 0).collect()
}

fn path_status(path: &Path, wans: &[Wan], sent: u64, fastest_us: i64) -> PathStatus {
    let route = path.route();
    let wan = wans.iter().find(|wan| wan.id == route.wan);
    let (loss, delivered) = path.delivery();
    let ms = |us: f64| (us / 10.0).round() / 100.0;
    let mbps = |bytes: u64| (bytes as f64 * 8.0 / 1e4).round() / 100.0;
    let tx_bytes = path.traffic.tx_bytes.load(Relaxed);
    PathStatus {
        id: path.id,
        wan: wan.map_or_else(String::new, |wan| tls_paths::name(wan, wans)),
        local: route.local.map_or_else(String::new, |local| local.to_string()),
        remote: route.remote.to_string(),
        state: if path.stands_by() { "standby" } else { path.state().name() }.to_owned(),
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
        tier: path.tier(),
        hops: path.hops(),
        tx_copies: path.traffic.copies.load(Relaxed),
        classes: classes_of(path),
    }
}
