//! Faults that only show when several values are compared.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;

use ::services::spec::HostMode;
use ipnet::IpNet;

use super::problem::{Problems, suggestion};
use super::read::{PeerPlaces, TunPlaces, WanPlaces};
use super::services::Services;
use super::values::Endpoint;
use super::{InterfaceMatch, Node, Peer, Tun, Wan};

/// Where things stand in the file.
pub(super) struct Places {
    /// There are no peers.
    pub(super) alone: bool,
    /// There is a `[tap]`: the tunnel may be for frames only.
    pub(super) has_tap: bool,
    pub(super) tun: TunPlaces,
    pub(super) wans: Vec<WanPlaces>,
    pub(super) peers: Vec<PeerPlaces>,
}

/// Compares everything with everything else, and fills each peer's `allowed_ips`.
pub(super) fn check(
    node: Option<&Node>,
    tun: &Tun,
    wans: &[Wan],
    peers: &mut [Peer],
    places: &Places,
    problems: &mut Problems<'_>,
) {
    check_wans(tun, wans, places, problems);
    check_locations(node, places, problems);
    check_identities(node, peers, places, problems);
    check_allowed_ips(tun, peers, places, problems);
    for (peer, place) in peers.iter().zip(&places.peers) {
        check_peer_wans(wans, place, problems);
        check_endpoints(node, wans, peer, place, problems);
    }
    if !places.tun.address_given && !places.alone && !places.has_tap {
        let message =
            "no address: this node itself cannot use the tunnel; for example address = [\"10.77.0.1/24\"]";
        problems.warning(&places.tun.section, "tun.address", message);
    }
}

/// WANs that are not everywhere need somebody who says where this node is.
fn check_locations(node: Option<&Node>, places: &Places, problems: &mut Problems<'_>) {
    let Some(at) = places.wans.iter().find_map(|wan| wan.located.as_ref()) else { return };
    if node.is_some_and(|node| node.location_file.is_none()) {
        let message = "nothing says where this node is; add location-file to [node]";
        problems.error(at, "wan.locations", message);
    }
}

fn check_wans(tun: &Tun, wans: &[Wan], places: &Places, problems: &mut Problems<'_>) {
    let mut seen = BTreeSet::new();
    for (wan, place) in wans.iter().zip(&places.wans) {
        let text = wan.interface.text();
        if !seen.insert(text) {
            let message = format!("\"{text}\" stands in two [[wan]] sections; remove one");
            problems.error(&place.interface, "wan.interface", message);
        }
        if let InterfaceMatch::Name(name) = &wan.interface {
            if *name == tun.name {
                let message = format!(
                    "\"{name}\" is the tunnel's own interface; name the one that leads to the Internet"
                );
                problems.error(&place.interface, "wan.interface", message);
            } else if name == "lo" {
                let message = "\"lo\" leads nowhere; name the interface that leads to the Internet";
                problems.error(&place.interface, "wan.interface", message);
            }
        }
    }
}

/// The datapath takes what comes in at an `[[interface]]`; the tunnel's own datagrams pass it by their port, which only a
/// listener has. With `host = "native"` answers to a dialler come in by the device again, as all that is the host's; with
/// "datapath" they would come by the TUN device, and sockets bound to the `[[wan]]` device would never hear them.
pub(super) fn shared_devices(
    wans: &[Wan],
    peers: &[Peer],
    services: &Services,
    places: &Places,
    problems: &mut Problems<'_>,
) {
    if services.settings.host == HostMode::Native {
        return;
    }
    let Some(dialled) = peers.iter().find(|peer| !peer.endpoints.is_empty()) else { return };
    for (wan, place) in wans.iter().zip(&places.wans) {
        let shared = services.interfaces.iter().find(|interface| wan.interface.covers(&interface.device));
        if let Some(interface) = shared {
            let message = format!(
                "\"{}\" is the device of interface \"{}\" too, which takes the answers of peer \"{}\" from the tunnel; \
                 dial from another device, or let the peer dial: listen = 4600 here and no endpoints",
                interface.device, interface.name, dialled.name
            );
            problems.error(&place.interface, "wan.interface", message);
        }
    }
}

fn check_identities(node: Option<&Node>, peers: &[Peer], places: &Places, problems: &mut Problems<'_>) {
    let own = node.map(|node| node.private_key.public());
    let mut names: BTreeMap<&str, ()> = BTreeMap::new();
    let mut keys: BTreeMap<[u8; 32], &str> = BTreeMap::new();
    for (peer, place) in peers.iter().zip(&places.peers) {
        if names.insert(&peer.name, ()).is_some() {
            let message = format!("two peers are named \"{}\"; give each its own name", peer.name);
            problems.error(&place.name, "peer.name", message);
        }
        if own == Some(peer.public_key) {
            let message = "this is the key of this node itself; put the peer's public key here";
            problems.error(&place.public_key, "peer.public-key", message);
        }
        if let Some(other) = keys.insert(peer.public_key, &peer.name) {
            let message = format!("peer \"{other}\" has the same key; every peer needs a key of its own");
            problems.error(&place.public_key, "peer.public-key", message);
        }
    }
}

fn check_allowed_ips(tun: &Tun, peers: &mut [Peer], places: &Places, problems: &mut Problems<'_>) {
    const KEY: &str = "peer.allowed-ips";
    let mut owners: BTreeMap<(Option<String>, IpNet), usize> = BTreeMap::new();
    let mut lists: Vec<Vec<IpNet>> = vec![Vec::new(); peers.len()];
    for (number, place) in places.peers.iter().enumerate() {
        for given in &place.allowed_ips {
            let net = given.value.trunc();
            if net != given.value {
                let message = format!("{} has host bits; {net} is taken", given.value);
                problems.warning(&given.at, KEY, message);
            }
            let tenant = peers.get(number).and_then(|peer| peer.tenant.clone());
            match owners.insert((tenant.clone(), net), number) {
                Some(other) if other == number => {
                    problems.warning(&given.at, KEY, format!("{net} stands twice; remove one"));
                    continue;
                }
                Some(other) => {
                    let other = peers.get(other).map_or("", |peer| peer.name.as_str());
                    let owner = tenant.map_or_else(
                        || "a prefix has one owner, or owners of different tenants".to_owned(),
                        |tenant| format!("a prefix has one owner in tenant \"{tenant}\""),
                    );
                    let message = format!("{net} belongs to peer \"{other}\" already; {owner}");
                    problems.error(&given.at, KEY, message);
                }
                None => {}
            }
            if tun.addresses.iter().any(|own| IpNet::from(own.addr()) == net) {
                problems.warning(&given.at, KEY, format!("{net} is this node's own address"));
            }
            if let Some(list) = lists.get_mut(number) {
                list.push(net);
            }
        }
        if place.allowed_ips.is_empty() && !place.ethernet {
            let message = "none: no packet goes to or comes from this peer; for example [\"10.77.0.2/32\"]";
            problems.warning(&place.section, KEY, message);
        }
    }
    for (peer, list) in peers.iter_mut().zip(lists) {
        peer.allowed_ips = list;
    }
}

fn check_peer_wans(wans: &[Wan], place: &PeerPlaces, problems: &mut Problems<'_>) {
    const KEY: &str = "peer.wans";
    for wanted in &place.wans {
        let known = wans
            .iter()
            .any(|wan| wan.interface.text() == wanted.value || wan.interface.covers(&wanted.value));
        if known {
            continue;
        }
        let texts = wans.iter().map(|wan| wan.interface.text());
        let mut message = format!("\"{}\" is not in any [[wan]] section", wanted.value);
        match suggestion(&wanted.value, texts) {
            Some(meant) => message.push_str(&format!("; did you mean \"{meant}\"?")),
            None => message.push_str(&format!("; add [[wan]] with interface = \"{}\"", wanted.value)),
        }
        problems.error(&wanted.at, KEY, message);
    }
}

fn check_endpoints(
    node: Option<&Node>,
    wans: &[Wan],
    peer: &Peer,
    place: &PeerPlaces,
    problems: &mut Problems<'_>,
) {
    const KEY: &str = "peer.endpoints";
    if place.endpoints.is_empty() && node.is_some_and(|node| node.listen.is_none()) {
        let message = "missing, and [node] has no listen, so that neither side can dial the other; \
                       write endpoints = [\"198.18.0.2:4600\"] here or listen = 4600 there";
        problems.error(&place.section, KEY, message);
    }
    let mut seen = BTreeSet::new();
    for endpoint in &place.endpoints {
        if !seen.insert(&endpoint.value) {
            problems.warning(&endpoint.at, KEY, format!("{} stands twice; remove one", endpoint.value));
        }
        let Endpoint::Address(address) = endpoint.value else { continue };
        check_loop(wans, peer, address, endpoint.at.clone(), problems);
        let family_used = wans.is_empty() || wans.iter().any(|wan| wan.family.covers(address.ip()));
        if !family_used {
            let message = format!("no [[wan]] uses the address family of {address}");
            problems.warning(&endpoint.at, KEY, message);
        }
    }
}

/// Without `[[wan]]` the tunnel's own datagrams take the main table: a prefix that contains the endpoint
/// would send them into the tunnel. (Default routes are safe: they have a table of their own.)
fn check_loop(wans: &[Wan], peer: &Peer, address: SocketAddr, at: Range<usize>, problems: &mut Problems<'_>) {
    let ip: IpAddr = address.ip();
    let inside = peer.allowed_ips.iter().find(|net| net.prefix_len() > 0 && net.contains(&ip));
    if let Some(net) = inside
        && wans.is_empty()
    {
        let message = format!(
            "{ip} lies within {net} of allowed-ips, so the tunnel would be routed into itself; \
             name the interface in a [[wan]] section, or take a default route or smaller prefixes"
        );
        problems.warning(&at, "peer.endpoints", message);
    }
}
