//! TUN interface and TAP device on the host, and the switch behind the latter (row T14).

use std::collections::BTreeMap;
use std::io;

use engine::Engine;
use engine::lan::Settings;
use linux::netlink::{Link, Netlink};
use linux::tun::Tun;
use packet::attachment::BondId;

use crate::config::Config;
use crate::config::tap::Tap;
use crate::device_settings;
use crate::host_facts::HostView;
use crate::kernel_routes::KernelRoutes;
use crate::status::{LanPeer, LanStatus, read_tunnel};

/// Packets that the device's transmit queue holds, as that of the TUN interface.
const TX_QUEUE_PACKETS: u32 = 5_000;

/// Makes the TUN interface.
pub(crate) fn open_tun(name: &str, queues: usize) -> Result<Tun, String> {
    Tun::create(name, queues).map_err(|error| device_error(&error))
}

/// Reason why a TUN or TAP device could not be made, and what helps.
fn device_error(error: &linux::Error) -> String {
    let hint = match error.kind() {
        io::ErrorKind::PermissionDenied => "; run as root, or with the capability CAP_NET_ADMIN",
        io::ErrorKind::NotFound => "; the kernel has no TUN device: load the module tun",
        _ => "",
    };
    format!("{error}{hint}")
}

/// Makes the device, switched on.
pub(crate) fn open(config: &Config, netlink: &Netlink, queues: usize) -> Result<Option<Tun>, String> {
    let Some(tap) = &config.tap else { return Ok(None) };
    let device = Tun::create_ethernet(&tap.name, queues).map_err(|error| device_error(&error))?;
    if tap.bridge.is_some() {
        // Before it is switched on.
        set_silent(&tap.name, true);
    }
    let index = device.index();
    let set_up = netlink
        .set_mtu(index, u32::from(tap.mtu))
        .and_then(|()| netlink.set_tx_queue_len(index, TX_QUEUE_PACKETS))
        .and_then(|()| netlink.set_up(index, true));
    set_up.map_err(|error| format!("cannot set up {}: {error}", tap.name))?;
    Ok(Some(device))
}

/// The device and its bridge, as they were brought into line last.
#[derive(Default)]
pub(crate) struct LanDevice {
    /// Index of the device while it is in its bridge.
    port: Option<u32>,
    /// Index of the bridge that it was put into.
    bridge: Option<u32>,
    /// How often stations had to be forgotten, as the switch counted when the bridge was told last.
    forgotten: u64,
}

impl LanDevice {
    /// Brings bridge and switch into line with configuration and host.
    pub(crate) fn follow(
        &mut self,
        config: &Config,
        engine: &Engine,
        view: &HostView,
        host: &mut KernelRoutes,
    ) {
        let Some(tap) = &config.tap else { return };
        self.port = None;
        let device = view.links.iter().find(|link| link.name == tap.name);
        if let Some((device, name)) = device.zip(tap.bridge.as_ref()) {
            match view.links.iter().find(|link| link.name == *name) {
                None => host.warn(format!("[tap] bridge {name} is not there; {} waits for it", tap.name)),
                Some(bridge) => {
                    let there = device.controller == Some(bridge.index);
                    let result = if there { Ok(()) } else { enter(host.netlink(), device, bridge.index) };
                    match result {
                        Ok(()) => (self.port, self.bridge) = (Some(device.index), Some(bridge.index)),
                        Err(error) => {
                            host.warn(format!("{} does not get into bridge {name}: {error}", tap.name));
                        }
                    }
                }
            }
        } else if let Some((device, bridge)) = device.zip(self.bridge.take()) {
            // A reload took the bridge away. What somebody else has put the device into is theirs.
            if device.controller == Some(bridge)
                && let Err(error) = leave(host.netlink(), device)
            {
                host.warn(format!("{} does not get out of its bridge: {error}", tap.name));
            }
        }
        put(config, tap, engine);
    }

    /// Once a second: stations of peers that are down are forgotten, by the bridge those that moved with a loop.
    pub(crate) fn tick(&mut self, config: &Config, engine: &Engine, netlink: &Netlink) {
        let Some(tap) = &config.tap else { return };
        put(config, tap, engine);
        let reports = engine.lan_reports();
        let forgotten: u64 = reports.map(|report| report.counters.forgotten).sum();
        if forgotten == self.forgotten {
            return;
        }
        self.forgotten = forgotten;
        tracing::info!(tap = tap.name, "another way to stations of the LAN: what was learnt is forgotten");
        if let Some(port) = self.port
            && let Err(error) = netlink.forget_stations(port)
        {
            tracing::warn!(%error, "the bridge keeps what it learnt until that is old");
        }
    }
}

/// Puts the device into a bridge. A port of one has no addresses of its own, and says nothing.
fn enter(netlink: &Netlink, device: &Link, bridge: u32) -> linux::Result<()> {
    set_silent(&device.name, true);
    netlink.set_controller(device.index, bridge)
}

/// Takes the device out of its bridge.
fn leave(netlink: &Netlink, device: &Link) -> linux::Result<()> {
    netlink.set_controller(device.index, 0)?;
    set_silent(&device.name, false);
    Ok(())
}

/// Switches IPv6 off on the device, or on again.
fn set_silent(device: &str, silent: bool) {
    let setting = device_settings::name("ipv6", device, "disable_ipv6");
    // A host without IPv6 has no such setting.
    let _ = linux::netns::set_sysctl(&setting, if silent { "1" } else { "0" });
}

/// Puts the switch in force.
fn put(config: &Config, tap: &Tap, engine: &Engine) {
    let peers: Vec<BondId> =
        config.peers.iter().filter(|peer| peer.kind.ethernet).map(|peer| peer.id).collect();
    let up: Vec<BondId> = engine
        .bonds()
        .iter()
        .filter(|bond| read_tunnel::is_up(bond))
        .map(|bond| bond.peer.load().id)
        .collect();
    let settings = Settings {
        mtu: tap.mtu,
        relay: tap.relay,
        stations_max: tap.stations_max,
        stations_per_peer: tap.stations_per_peer_max,
        age_s: tap.station_age_seconds,
        flood_per_s: tap.flood_per_second_max,
        answers: tap.answer_neighbors,
        down: peers.iter().filter(|peer| !up.contains(peer)).copied().collect(),
        peers,
        number: 0,
        cores: 0,
    };
    if let Err(error) = engine.put_lan(settings) {
        tracing::error!(%error, "no random numbers for the switch");
    }
}

/// Live state of the switch.
pub(crate) fn status(config: &Config, engine: &Engine) -> Option<LanStatus> {
    let tap = config.tap.as_ref()?;
    let mut status =
        LanStatus { tap: tap.name.clone(), mtu: tap.mtu, bridge: tap.bridge.clone(), ..LanStatus::default() };
    let mut stations: BTreeMap<_, usize> = BTreeMap::new();
    for report in engine.lan_reports() {
        // Each core knows all stations, or nearly.
        status.lan_stations = status.lan_stations.max(report.lan_stations);
        for (bond, count) in report.peer_stations {
            let most = stations.entry(bond).or_default();
            *most = count.max(*most);
        }
        status.neighbors = status.neighbors.max(report.neighbors);
        status.standby |= report.standby;
        status.frames.known += report.counters.known;
        status.frames.flooded += report.counters.flooded;
        status.frames.relayed += report.counters.relayed;
        status.frames.answered += report.counters.answered;
        status.frames.not_learned += report.counters.not_learned;
    }
    let peers = config.peers.iter().filter(|peer| peer.kind.ethernet);
    status.peers = peers
        .map(|peer| LanPeer {
            name: peer.name.clone(),
            stations: stations.get(&peer.id).copied().unwrap_or(0),
        })
        .collect();
    for counters in engine.counters() {
        status.rx_frames += counters.tap.rx_frames.get();
        status.rx_bytes += counters.tap.rx_bytes.get();
        status.tx_frames += counters.tap.tx_frames.get();
        status.tx_bytes += counters.tap.tx_bytes.get();
        for (reason, count) in counters.drops().filter(|(_, count)| *count > 0) {
            if let Some(name) = reason.name().strip_prefix("ethernet-") {
                *status.drops.entry(name.to_owned()).or_default() += count;
            }
        }
    }
    Some(status)
}
