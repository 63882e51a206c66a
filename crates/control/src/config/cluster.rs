//! `[cluster]`: this machine shares its interfaces with others.

use std::net::{IpAddr, SocketAddr};
use std::ops::Range;

use ipnet::IpNet;

use cluster::message::Role;
use steering::units::NODES_MAX;

use tunnel::PrivateKey;

use super::problem::Problems;
use super::read::{Table, secret};
use super::section::Section;
use super::services::Interface;
use super::values::ValueError;
use super::{Peer, Surroundings, Tun};

/// Port at which the manager listens for units unless told otherwise.
pub const MANAGER_PORT: u16 = 4_601;

/// Part of this machine in a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cluster {
    /// Its duty.
    pub role: Role,
    /// Its number, below 4,096.
    pub node: u16,
    /// Capacity relative to other data planes'.
    pub weight: u32,
    /// Its address inside the bonds to the other machines.
    pub bus: IpAddr,
    /// Token by which the manager comes to know this machine's key.
    pub token: Option<PrivateKey>,
    /// The managers' addresses there; one of them leads.
    pub managers: Vec<SocketAddr>,
    /// UDP port at the shared addresses at which the cluster is one hub for bonds of others; `None`: it is none.
    pub hub_port: Option<u16>,
    /// The hub's private key, at a data plane.
    pub hub_key: Option<PrivateKey>,
    /// A dispatcher answers packets that do not fit a datagram to their data plane with "too big" (`path-mtu = "discover"`); else they
    /// go in several.
    pub answers_too_big: bool,
}

/// Other parts of the configuration that the section is compared with.
pub(super) struct Around<'a> {
    pub tun: &'a Tun,
    pub interfaces: &'a [Interface],
    pub listen: Option<u16>,
    pub surroundings: &'a Surroundings<'a>,
}

/// Reads it; `None` without the section, or when something that is needed is missing.
pub(super) fn cluster(
    table: Option<Table<'_>>,
    around: &Around<'_>,
    problems: &mut Problems<'_>,
) -> Option<Cluster> {
    let Around { tun, interfaces, .. } = *around;
    let addresses = &tun.addresses;
    let given = table.is_some();
    let mut section = Section::new("cluster", table, problems);
    let role = section.choice("role", &[("dispatcher", Role::Dispatcher), ("dataplane", Role::DataPlane)]);
    let node = section.number("node-id", 0..=u64::from(NODES_MAX) - 1);
    let weight = section.number("weight", 1..=1_000_000).and_then(|weight| u32::try_from(weight.value).ok());
    let bus = section.parsed("bus", "\"10.9.0.3\"", address);
    let managers = section.list("manager", "\"10.9.0.1:4601\"", manager);
    let token = secret(&mut section, "token", "token-file", around.surroundings).into_option();
    let at = section.at.clone();
    if given {
        required(&mut section, "role", role.is_some(), "write role = \"dispatcher\" or \"dataplane\"");
        required(&mut section, "node-id", node.is_some(), "give each machine its own number, from 0 to 4095");
        required(
            &mut section,
            "manager",
            managers.as_ref().is_some_and(|managers| !managers.is_empty()),
            "name the manager's address inside the tunnel",
        );
    }
    let none = section
        .value("manager")
        .and_then(|value| value.get_ref().as_array())
        .is_some_and(|list| list.is_empty());
    if none {
        section.missing("manager", "name the manager's address inside the tunnel");
    }
    let own = |bus: IpAddr| addresses.iter().any(|net| net.addr() == bus);
    if let Some(bus) = bus.as_ref().filter(|bus| !own(bus.value)) {
        let message = format!("{} is no address of [tun]; name one of those", bus.value);
        section.error(&bus.at, "bus", message);
    }
    let bus = bus.map(|bus| bus.value).or_else(|| addresses.first().map(IpNet::addr));
    if given && bus.is_none() {
        section.missing("bus", "this machine has no address inside the tunnel; set tun.address");
    }
    let path_mtu = section.choice("path-mtu", &[("discover", true), ("fragment", false)]);
    let (hub_port, hub_key) = hub(&mut section, role.as_ref().map(|role| role.value), around);
    section.finish();
    check_interfaces(given.then(|| role.as_ref().map(|role| role.value)), interfaces, &at, problems);
    Some(Cluster {
        role: role?.value,
        node: u16::try_from(node?.value).ok()?,
        weight: weight.unwrap_or(1),
        bus: bus?,
        token,
        managers: managers?.into_iter().map(|manager| manager.value).collect(),
        hub_port,
        hub_key,
        answers_too_big: path_mtu.is_none_or(|path_mtu| path_mtu.value),
    })
}

/// The hub's port and key.
fn hub(
    section: &mut Section<'_, '_, '_>,
    role: Option<Role>,
    around: &Around<'_>,
) -> (Option<u16>, Option<PrivateKey>) {
    let hub = section.flag("hub");
    let key = secret(section, "hub-key", "hub-key-file", around.surroundings).into_option();
    let Some(hub) = hub.filter(|hub| hub.value) else {
        if key.is_some() {
            section.missing("hub", "there is a hub's key; add hub = true, or remove the key");
        }
        return (None, None);
    };
    if around.listen.is_none() {
        let message =
            "peers dial the hub at the port of [node]; write listen = 4600 there, the same on all machines";
        section.error(&hub.at, "hub", message);
    }
    if role == Some(Role::DataPlane) && key.is_none() {
        section.missing(
            "hub-key-file",
            "a data plane needs the hub's key; name the file, the same on all of them",
        );
    }
    (around.listen, key)
}

/// Peers of the hub.
pub(super) fn check_peers(
    cluster: Option<&Cluster>,
    peers: &[Peer],
    places: &super::cross::Places,
    problems: &mut Problems<'_>,
) {
    let is_hub = cluster.is_some_and(|cluster| cluster.hub_key.is_some());
    for (peer, place) in peers.iter().zip(&places.peers).filter(|(peer, _)| peer.kind.hub) {
        if !is_hub {
            let message = format!(
                "\"{}\" cannot dial the hub here; add hub = true and hub-key-file to [cluster]",
                peer.name
            );
            problems.error(&place.section, "peer.hub", message);
        }
        if !peer.endpoints.is_empty() {
            let message = format!("\"{}\" dials the hub; remove its endpoints", peer.name);
            problems.error(&place.section, "peer.endpoints", message);
        }
    }
}

fn required(section: &mut Section<'_, '_, '_>, key: &'static str, given: bool, message: &str) {
    if !given && section.value(key).is_none() {
        section.missing(key, message);
    }
}

/// Shared interfaces belong to a cluster; a data plane makes the device that stands for one, which needs the hardware address
/// that all of them show.
fn check_interfaces(
    role: Option<Option<Role>>,
    interfaces: &[Interface],
    at: &Range<usize>,
    problems: &mut Problems<'_>,
) {
    let mut numbers: Vec<u8> = Vec::new();
    for interface in interfaces {
        let name = &interface.name;
        if interface.takeover && (role != Some(Some(Role::Dispatcher)) || interface.shared.is_none()) {
            let message =
                format!("\"{name}\" is no shared interface of a dispatcher, so that nobody else can have it");
            problems.error(at, "interface.takeover", message);
        }
        let Some(ifid) = interface.shared else { continue };
        if interface.takeover && interface.addresses.is_empty() {
            let message =
                format!("\"{name}\" needs the shared addresses: whoever has them has the interface");
            problems.error(at, "interface.takeover", message);
        }
        if role.is_none() {
            problems.error(
                at,
                "interface.shared",
                format!("\"{name}\" is shared with nobody; add [cluster]"),
            );
        }
        if numbers.contains(&ifid) {
            problems.error(at, "interface.shared", format!("number {ifid} stands twice; each has its own"));
        }
        numbers.push(ifid);
        if role == Some(Some(Role::DataPlane)) && interface.mac.is_none() {
            let message =
                format!("\"{name}\" needs the hardware address of the dispatcher's device as mac = \"…\"");
            problems.error(at, "interface.mac", message);
        }
    }
}

fn address(text: &str) -> Result<IpAddr, ValueError> {
    text.parse().map_err(|_| format!("\"{text}\" is no address; write for example \"10.9.0.3\"").into())
}

/// An address, with the port unless it is the usual one.
fn manager(text: &str) -> Result<SocketAddr, ValueError> {
    let with_port = text.parse::<SocketAddr>().ok();
    let alone = || text.parse::<IpAddr>().ok().map(|address| SocketAddr::new(address, MANAGER_PORT));
    with_port.or_else(alone).ok_or_else(|| {
        format!("\"{text}\" is no address of the manager; write for example \"10.9.0.1:4601\"").into()
    })
}
