//! Reload: changes of a new configuration that apply to the running node, and those that wait for a restart.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::config::classes::TrafficClass;
use crate::config::tap::Tap;
use crate::config::{Config, Peer, Wan, directory_of};

mod services;

pub(crate) use services::NO_DEVICE;

/// Result of a reload.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReloadReport {
    /// Changes that are in force now; empty when the file says what runs already.
    pub applied: Vec<String>,
    /// Changes that need a restart; the old values stay in force.
    pub needs_restart: Vec<String>,
    /// Warnings about the new file.
    pub warnings: Vec<String>,
}

/// Compares, and returns what is to run from now on: the new configuration, with the old values where a change
/// needs a restart.
#[must_use]
pub fn merge(old: &Config, new: &Config) -> (Config, ReloadReport) {
    let mut report = ReloadReport::default();
    let mut merged = new.clone();
    keep_fixed(old, &mut merged, &mut report.needs_restart);
    merged.number_bonds(old.bonds.clone());
    let applied = &mut report.applied;
    note(applied, "tun.address", &list(&old.tun.addresses), &list(&new.tun.addresses));
    let location = |config: &Config| format!("{:?}", config.node.location_file);
    note(applied, "node.location-file", &location(old), &location(new));
    note(applied, "tun.route", &format!("{:?}", old.tun.routes), &format!("{:?}", new.tun.routes));
    let cores = |config: &Config| format!("{:?}", config.node.class_cores);
    note(applied, "node.reserved-cores", &cores(old), &cores(new));
    compare_taps(old.tap.as_ref(), new.tap.as_ref(), applied);
    compare_wans(&old.wans, &new.wans, applied);
    compare_peers(&old.peers, &merged.peers, applied);
    compare_classes(&old.classes, &new.classes, applied);
    keep_log_directory(old, &mut merged, &mut report.needs_restart);
    services::merge(&old.services, &mut merged.services, &mut report);
    (merged, report)
}

fn keep_fixed(old: &Config, merged: &mut Config, restart: &mut Vec<String>) {
    if old.node.private_key != merged.node.private_key {
        if old.node.key_was_made && !merged.node.key_was_made {
            restart.push("node.private-key: the first one; peers wait for it".to_owned());
            merged.peers.clear();
        } else if !merged.node.key_was_made {
            restart.push("node.private-key: another key".to_owned());
        }
        merged.node.private_key = old.node.private_key.clone();
        merged.node.key_was_made = old.node.key_was_made;
    }
    fixed(restart, "node.name", &old.node.name, &mut merged.node.name);
    fixed(restart, "node.listen", &old.node.listen, &mut merged.node.listen);
    fixed(restart, "node.listen-tls", &old.node.listen_tls, &mut merged.node.listen_tls);
    fixed(restart, "node.cores", &old.node.cores, &mut merged.node.cores);
    let rekey = &mut merged.node.rekey_after_seconds;
    fixed(restart, "node.rekey-after-seconds", &old.node.rekey_after_seconds, rekey);
    fixed(restart, "node.state-dir", &old.node.state_dir, &mut merged.node.state_dir);
    fixed(restart, "node.log-file", &old.node.log_file, &mut merged.node.log_file);
    fixed(restart, "node.control-socket", &old.node.control_socket, &mut merged.node.control_socket);
    fixed(restart, "tun.name", &old.tun.name, &mut merged.tun.name);
    fixed(restart, "tun.mtu", &old.tun.mtu, &mut merged.tun.mtu);
    match (&old.tap, &mut merged.tap) {
        (Some(old), Some(new)) => {
            fixed(restart, "tap.name", &old.name, &mut new.name);
            fixed(restart, "tap.mtu", &old.mtu, &mut new.mtu);
        }
        (old, new) => fixed(restart, "tap", old, new),
    }
    fixed(restart, "cluster", &old.cluster, &mut merged.cluster);
}

/// The sandbox leaves the directories of the start writable.
fn keep_log_directory(old: &Config, merged: &mut Config, restart: &mut Vec<String>) {
    let mut writable = old.writable_directories();
    let socket = old.control_socket();
    writable.push(directory_of(&socket));
    let settings = &mut merged.services.settings;
    let stays = |path: &Path| writable.iter().any(|directory| path.starts_with(directory));
    if settings.log_file.as_deref().is_some_and(|path| !stays(path)) {
        fixed(restart, "gateway.log-file", &old.services.settings.log_file, &mut settings.log_file);
    }
}

fn fixed<T: PartialEq + Clone + Debug>(restart: &mut Vec<String>, key: &str, old: &T, new: &mut T) {
    if old != new {
        restart.push(format!("{key}: {old:?} → {new:?}"));
        new.clone_from(old);
    }
}

fn note(list: &mut Vec<String>, key: &str, old: &str, new: &str) {
    if old != new {
        list.push(format!("{key}: {old} → {new}"));
    }
}

fn list<T: ToString>(items: &[T]) -> String {
    let items: Vec<String> = items.iter().map(ToString::to_string).collect();
    if items.is_empty() { "none".to_owned() } else { items.join(", ") }
}

fn compare_taps(old: Option<&Tap>, new: Option<&Tap>, applied: &mut Vec<String>) {
    let (Some(old), Some(new)) = (old, new) else { return };
    let bridge = |tap: &Tap| tap.bridge.clone().unwrap_or_else(|| "none".to_owned());
    let mut say = |key: &str, old: &str, new: &str| note(applied, &format!("tap.{key}"), old, new);
    say("bridge", &bridge(old), &bridge(new));
    say("relay", &old.relay.to_string(), &new.relay.to_string());
    say("stations-max", &old.stations_max.to_string(), &new.stations_max.to_string());
    let per_peer = |tap: &Tap| tap.stations_per_peer_max.to_string();
    say("stations-per-peer-max", &per_peer(old), &per_peer(new));
    let age = |tap: &Tap| tap.station_age_seconds.to_string();
    say("station-age-seconds", &age(old), &age(new));
    let flood = |tap: &Tap| tap.flood_per_second_max.to_string();
    say("flood-per-second-max", &flood(old), &flood(new));
    say("answer-neighbors", &old.answer_neighbors.to_string(), &new.answer_neighbors.to_string());
}

fn compare_wans(old: &[Wan], new: &[Wan], applied: &mut Vec<String>) {
    let before: BTreeMap<&str, &Wan> = old.iter().map(|wan| (wan.interface.text(), wan)).collect();
    let after: BTreeMap<&str, &Wan> = new.iter().map(|wan| (wan.interface.text(), wan)).collect();
    for (name, wan) in &after {
        match before.get(name) {
            None => applied.push(format!("wan {name}: added")),
            Some(earlier) if earlier != wan => applied.push(format!("wan {name}: changed")),
            Some(_) => {}
        }
    }
    applied.extend(before.keys().filter(|n| !after.contains_key(*n)).map(|n| format!("wan {n}: removed")));
}

/// Classes have an order: one that moves changes what others get.
fn compare_classes(old: &[TrafficClass], new: &[TrafficClass], applied: &mut Vec<String>) {
    let named =
        |classes: &[TrafficClass]| classes.iter().map(|class| class.rule.name.clone()).collect::<Vec<_>>();
    let (before, after) = (named(old), named(new));
    if before != after {
        applied.push(format!("classes: {} → {}", list(&before), list(&after)));
    }
    for (earlier, later) in old.iter().zip(new).filter(|(old, new)| old.rule.name == new.rule.name) {
        if earlier != later {
            applied.push(format!("class {}: changed", later.rule.name));
        }
    }
}

/// Peers are the same peer when the key is the same.
fn compare_peers(old: &[Peer], new: &[Peer], applied: &mut Vec<String>) {
    let before: BTreeMap<&[u8; 32], &Peer> = old.iter().map(|peer| (&peer.public_key, peer)).collect();
    let after: BTreeMap<&[u8; 32], &Peer> = new.iter().map(|peer| (&peer.public_key, peer)).collect();
    for peer in new {
        match before.get(&peer.public_key) {
            None => applied.push(format!("peer {}: added", peer.name)),
            Some(earlier) => compare_peer(earlier, peer, applied),
        }
    }
    for peer in old.iter().filter(|peer| !after.contains_key(&peer.public_key)) {
        applied.push(format!("peer {}: removed", peer.name));
    }
}

fn compare_peer(old: &Peer, new: &Peer, applied: &mut Vec<String>) {
    let peer = format!("peer {}", new.name);
    let mut say = |key: &str, old: &str, new: &str| note(applied, &format!("{peer}: {key}"), old, new);
    say("name", &old.name, &new.name);
    say("endpoints", &list(&old.endpoints), &list(&new.endpoints));
    say("allowed-ips", &list(&old.allowed_ips), &list(&new.allowed_ips));
    let tenant = |peer: &Peer| peer.tenant.clone().unwrap_or_else(|| "none".to_owned());
    say("tenant", &tenant(old), &tenant(new));
    let wans = |peer: &Peer| peer.wans.as_deref().map_or_else(|| "all".to_owned(), list);
    say("wans", &wans(old), &wans(new));
    let (before, after) = (&old.paths.udp, &new.paths.udp);
    say("paths-per-wan-pair", &before.per_wan_pair.to_string(), &after.per_wan_pair.to_string());
    say("sockets-per-path", &before.sockets.to_string(), &after.sockets.to_string());
    say("spread", before.spread.name(), after.spread.name());
    let port = |port: Option<u16>| port.map_or_else(|| "0".to_owned(), |port| port.to_string());
    say("tls-port", &port(old.paths.tls_port), &port(new.paths.tls_port));
    say("encryption", &format!("{:?}", old.encryption), &format!("{:?}", new.encryption));
    say("policy", old.policy.name(), new.policy.name());
    say("flow", &format!("{:?}", old.flow), &format!("{:?}", new.flow));
    let core = |core: Option<u8>| core.map_or_else(|| "any".to_owned(), |core| core.to_string());
    say("ethernet", &old.kind.ethernet.to_string(), &new.kind.ethernet.to_string());
    say("steering", old.steering.receive.name(), new.steering.receive.name());
    say("accept-steering", &old.steering.accept.to_string(), &new.steering.accept.to_string());
    say("tunnel-core", &core(old.steering.tunnel_core), &core(new.steering.tunnel_core));
    say("peer-tunnel-core", &core(old.steering.peer_tunnel_core), &core(new.steering.peer_tunnel_core));
    say("ask-core-first", &old.steering.ask_core_first.to_string(), &new.steering.ask_core_first.to_string());
    let file = |peer: &Peer| {
        let file = peer.processor.as_ref();
        file.map_or_else(|| "none".to_owned(), |file| format!("{} ({:?})", file.path.display(), file.cores))
    };
    say("processor-info-file", &file(old), &file(new));
    if old.preshared_key != new.preshared_key {
        applied.push(format!("{peer}: preshared-key: another key"));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::path::Path;

    use super::*;
    use crate::config::tests::config;

    const BASE: &str = "[tun]\naddress = [\"10.77.0.1/24\"]\n[[wan]]\ninterface = \"wan0\"\n[[peer]]\nname = \"hub\"\n\
                        public-key = \"$HUB\"\nallowed-ips = [\"10.77.0.2/32\"]\nendpoints = [\"198.18.0.2:4600\"]\n";

    #[test]
    fn nothing_changed() {
        let old = config("listen = 4600", BASE);
        let (merged, report) = merge(&old, &old);
        assert_eq!(merged, old);
        assert_eq!(report, ReloadReport::default());
    }

    #[test]
    fn what_is_applied_at_once() {
        let old = config("listen = 4600", BASE);
        let text = BASE
            .replace("10.77.0.1/24\"", "10.77.0.1/24\", \"fd77::1/64\"")
            .replace("wan0", "wan1")
            .replace("10.77.0.2/32\"", "10.77.0.2/32\", \"10.9.0.0/16\"")
            .replace("198.18.0.2:4600", "hub.example.net:4600");
        let text = format!(
            "{text}policy = \"random\"\n[[peer]]\nname = \"b\"\npublic-key = \"$OTHER\"\nallowed-ips = \"10.8.0.1\"\n"
        );
        let new = config("listen = 4600", &text);
        let (merged, report) = merge(&old, &new);
        assert_eq!(merged, new);
        assert_eq!(report.needs_restart, Vec::<String>::new());
        assert_eq!(
            report.applied,
            [
                "tun.address: 10.77.0.1/24 → 10.77.0.1/24, fd77::1/64",
                "wan wan1: added",
                "wan wan0: removed",
                "peer hub: endpoints: 198.18.0.2:4600 → hub.example.net:4600",
                "peer hub: allowed-ips: 10.77.0.2/32 → 10.77.0.2/32, 10.9.0.0/16",
                "peer hub: policy: hash → random",
                "peer b: added",
            ]
        );
        assert_eq!(merge(&new, &old).1.applied.last().unwrap(), "peer b: removed");
    }

    #[test]
    fn a_bond_keeps_its_number_and_a_peer_that_comes_back_has_its_own() {
        let peer = |name: &str, key: &str| {
            format!("[[peer]]\nname = \"{name}\"\npublic-key = \"{key}\"\nallowed-ips = \"10.8.0.1\"\n")
        };
        let ids = |config: &Config| -> Vec<_> {
            config.peers.iter().map(|peer| (peer.name.clone(), peer.id.0)).collect()
        };
        let named = |list: &[(&str, u16)]| -> Vec<_> {
            list.iter().map(|(name, id)| ((*name).to_owned(), *id)).collect()
        };
        let first = config("listen = 4600", &peer("hub", "$HUB"));
        let second = merge(&first, &config("listen = 4600", &peer("b", "$OTHER"))).0;
        assert_eq!(ids(&second), named(&[("b", 1)]));
        let tenant = "[[tenant]]\nname = \"red\"\n";
        let both = format!("{}{}tenant = \"red\"\n{tenant}", peer("b", "$OTHER"), peer("hub", "$HUB"));
        let (third, report) = merge(&second, &config("listen = 4600", &both));
        assert_eq!(ids(&third), named(&[("b", 1), ("hub", 0)]));
        assert_eq!(report.applied, ["peer hub: added", "tenant red: added"]);
    }

    #[test]
    fn what_waits_for_a_restart_keeps_its_old_value() {
        let old = config("listen = 4600", BASE);
        let text = BASE.replace("[tun]\n", "[tun]\nname = \"ana7\"\nmtu = 1400\n");
        let new = config("listen = 4601\ncores = 2\nlog-file = \"x.log\"\nname = \"z\"", &text);
        let (merged, report) = merge(&old, &new);
        assert_eq!(merged, old);
        assert_eq!(report.applied, Vec::<String>::new());
        assert_eq!(
            report.needs_restart,
            [
                "node.name: \"router\" → \"z\"",
                "node.listen: Some(4600) → Some(4601)",
                "node.cores: All → Count(2)",
                "node.log-file: None → Some(\"/etc/ana/x.log\")",
                "tun.name: \"ana0\" → \"ana7\"",
                "tun.mtu: 1500 → 1400",
            ]
        );
        assert_eq!(merged.path, Path::new("site.toml"));
    }

    #[test]
    fn the_nat_log_moves_within_what_is_writable() {
        let with = |file: &str| config("listen = 4600", &format!("{BASE}[gateway]\nlog-file = \"{file}\"\n"));
        let old = with("/srv/log/nat.json");
        for stays in
            ["/srv/log/other.json", "/var/log/nat.json", "/var/lib/anabranch/nat.json", "/run/anabranch/x"]
        {
            let (merged, report) = merge(&old, &with(stays));
            assert_eq!(merged.services.settings.log_file.as_deref(), Some(Path::new(stays)));
            assert_eq!(report.needs_restart, Vec::<String>::new());
        }
        let (merged, report) = merge(&old, &with("/srv/nat.json"));
        assert_eq!(merged.services.settings.log_file, old.services.settings.log_file);
        assert_eq!(
            report.needs_restart,
            ["gateway.log-file: Some(\"/srv/log/nat.json\") → Some(\"/srv/nat.json\")"]
        );
    }
}
