//! `[tap]`: an Ethernet device beside the TUN interface, switched to peers with `ethernet = true` (row T14).

use std::ops::Range;

use super::problem::Problems;
use super::read::{PeerPlaces, Table};
use super::section::Section;
use super::{Config, InterfaceMatch, Peer, values};

/// `[tap]`: a LAN that is bridged with those of peers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tap {
    /// Interface name.
    pub name: String,
    /// MTU in bytes, 1280–9000: the largest payload of a frame behind its header and tags.
    pub mtu: u16,
    /// Bridge that the device is put into; it exists or comes later.
    pub bridge: Option<String>,
    /// Peers may reach each other through this node.
    pub relay: bool,
    /// Stations at most; the LAN has half of them.
    pub stations_max: usize,
    /// Stations behind one peer at most.
    pub stations_per_peer_max: usize,
    /// A station that is silent is forgotten after so many seconds.
    pub station_age_seconds: u32,
    /// Frames a second that each side may flood.
    pub flood_per_second_max: u32,
    /// Questions about the addresses of stations behind peers are answered here.
    pub answer_neighbors: bool,
}

/// Reads the section, if there is one.
pub(super) fn tap(table: Option<Table<'_>>, problems: &mut Problems<'_>) -> Option<(Tap, Range<usize>)> {
    table.as_ref()?;
    let mut section = Section::new("tap", table, problems);
    let name = section.parsed("name", "\"anatap0\"", values::interface_name);
    let mtu = section.number("mtu", 1280..=9000).and_then(|mtu| u16::try_from(mtu.value).ok());
    let bridge = section.parsed("bridge", "\"br0\"", values::interface_name);
    let relay = section.flag("relay").is_some_and(|relay| relay.value);
    let stations_max = section.number_or("stations-max", 16..=262_144, 8_192);
    let stations_per_peer_max = section.number_or("stations-per-peer-max", 1..=262_144, 1_024);
    let station_age_seconds = section.number_or("station-age-seconds", 10..=86_400, 300);
    let flood_per_second_max = section.number_or("flood-per-second-max", 1..=1_000_000, 2_000);
    let answer_neighbors = section.flag("answer-neighbors").is_none_or(|answer| answer.value);
    let at = section.at.clone();
    if let Some((name, bridge)) = name.as_ref().zip(bridge.as_ref())
        && name.value == bridge.value
    {
        section.error(&bridge.at, "bridge", "the device cannot be in itself; name a bridge");
    }
    section.finish();
    let tap = Tap {
        name: name.map_or_else(|| "anatap0".to_owned(), |name| name.value),
        mtu: mtu.unwrap_or(1500),
        bridge: bridge.map(|bridge| bridge.value),
        relay,
        stations_max,
        stations_per_peer_max,
        station_age_seconds,
        flood_per_second_max,
        answer_neighbors,
    };
    Some((tap, at))
}

/// Compares it with the rest of the configuration.
pub(super) fn check(
    config: &Config,
    at: Option<&Range<usize>>,
    peers: &[PeerPlaces],
    problems: &mut Problems<'_>,
) {
    let wants = |peer: &&Peer| peer.kind.ethernet;
    let Some((tap, at)) = config.tap.as_ref().zip(at) else {
        for (_, place) in config.peers.iter().zip(peers).filter(|(peer, _)| peer.kind.ethernet) {
            let message = "there is no [tap], from which Ethernet frames would come; add it or remove this";
            problems.error(&place.section, "peer.ethernet", message);
        }
        return;
    };
    if tap.name == config.tun.name {
        problems.error(at, "tap.name", format!("\"{}\" is the TUN interface; give each a name", tap.name));
    }
    let is_wan =
        |name: &str| config.wans.iter().any(|wan| wan.interface == InterfaceMatch::Name(name.to_owned()));
    for name in [Some(&tap.name), tap.bridge.as_ref()].into_iter().flatten().filter(|name| is_wan(name)) {
        let message = format!("\"{name}\" is a [[wan]]: the tunnel would carry its own datagrams");
        problems.error(at, "tap.name", message);
    }
    if config.services.interfaces.iter().any(|interface| interface.device == tap.name) {
        let message = format!("\"{}\" is the device of an [[interface]]; use the bridge for that", tap.name);
        problems.error(at, "tap.name", message);
    }
    if config.cluster.is_some() {
        problems.error(at, "tap", "units of a cluster do not bridge; remove [tap] or [cluster]");
    }
    if !config.peers.iter().any(|peer| wants(&peer)) {
        problems.warning(at, "tap", "no peer has ethernet = true: frames have nowhere to go");
    }
    for (peer, place) in config.peers.iter().zip(peers).filter(|(peer, _)| peer.kind.ethernet) {
        if peer.tenant.is_some() {
            let message = "frames of a tenant's peer would meet those of everybody in one LAN; remove tenant";
            problems.error(&place.section, "peer.ethernet", message);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use crate::config::tests::{golden, load};

    const NODE: &str = "[node]\nprivate-key-file = \"node.key\"\nlisten = 4600\n";
    const PEER: &str = "[[peer]]\nname = \"hub\"\npublic-key = \"$HUB\"\nendpoints = [\"198.18.0.2:4600\"]\n";

    #[test]
    fn a_tap_needs_a_peer_and_a_peer_with_frames_needs_a_tap() {
        let whole = format!("{NODE}[tap]\nbridge = \"br0\"\n{PEER}ethernet = true\n");
        // No addresses and no prefixes: the tunnel is for frames.
        golden(&whole, &[]);
        let config = load(&whole).config.unwrap();
        let tap = config.tap.unwrap();
        assert_eq!((tap.name.as_str(), tap.mtu, tap.bridge.as_deref()), ("anatap0", 1500, Some("br0")));
        assert_eq!(
            (tap.stations_max, tap.stations_per_peer_max, tap.station_age_seconds),
            (8_192, 1_024, 300)
        );
        assert_eq!((tap.relay, tap.answer_neighbors, tap.flood_per_second_max), (false, true, 2_000));
        assert!(config.peers[0].kind.ethernet);
        golden(
            &format!("{NODE}[tun]\naddress = \"10.77.0.1/24\"\n{PEER}ethernet = true\n"),
            &[
                "site.toml:6:1: error: peer.ethernet: there is no [tap], from which Ethernet frames would come; add it or remove this",
            ],
        );
        golden(
            &format!("{NODE}[tap]\n{PEER}allowed-ips = \"10.77.0.2/32\"\n"),
            &["site.toml:4:1: warning: tap: no peer has ethernet = true: frames have nowhere to go"],
        );
    }

    #[test]
    fn a_tap_is_no_other_device() {
        let with = |tap: &str, more: &str| format!("{NODE}[tap]\n{tap}\n{more}{PEER}ethernet = true\n");
        golden(
            &with("name = \"br0\"\nbridge = \"br0\"", ""),
            &["site.toml:6:10: error: tap.bridge: the device cannot be in itself; name a bridge"],
        );
        golden(
            &with("name = \"ana0\"", ""),
            &["site.toml:4:1: error: tap.name: \"ana0\" is the TUN interface; give each a name"],
        );
        golden(
            &with("bridge = \"eth1\"", "[[wan]]\ninterface = \"eth1\"\n"),
            &[
                "site.toml:4:1: error: tap.name: \"eth1\" is a [[wan]]: the tunnel would carry its own datagrams",
            ],
        );
    }
}
