//! From TOML tables to the types of [`super`].

use std::ops::Range;
use std::path::PathBuf;

use ipnet::IpNet;
use packet::attachment::BondId;
use steering::policy::Policy;
use toml::Spanned;
use toml::de::{DeTable, DeValue};
use tunnel::config::Spread;
use tunnel::mode::{ModeSet, Steering, SteeringMode};
use tunnel::{Encryption, FlowDefinition, PrivateKey};

use super::class_cores;
use super::classes::{CLASSES_MAX, class};
use super::problem::{Problem, Problems, suggestion};
use super::properties::properties;
use super::section::{At, Section, kind, shown, whole_number};
use super::services::read::Names;
use super::values::{self, Endpoint, ValueError};
use super::{
    Config, Cores, ENDPOINTS_MAX, Family, InterfaceMatch, LOCATIONS_MAX, Node, PEERS_MAX, Peer, PeerKind,
    PeerPaths, Routes, STATE_DIR, Surroundings, Tun, WANS_MAX, Wan, cross, services,
};
use crate::key::{self, KeyError};

/// Words for a right key: what `genkey` writes.
const KEY_RIGHT: &str = "44 characters of base64 as printed by \"anabranch genkey\" and \"anabranch pubkey\"";
/// Every section, as it stands in a file.
const SECTIONS: [(&str, &str); 17] = [
    ("node", "[node]"),
    ("tun", "[tun]"),
    ("tap", "[tap]"),
    ("wan", "[[wan]]"),
    ("peer", "[[peer]]"),
    ("class", "[[class]]"),
    ("gateway", "[gateway]"),
    ("interface", "[[interface]]"),
    ("tenant", "[[tenant]]"),
    ("route", "[[route]]"),
    ("group", "[[group]]"),
    ("rule", "[[rule]]"),
    ("nat", "[[nat]]"),
    ("forward", "[[forward]]"),
    ("virtual-server", "[[virtual-server]]"),
    ("lease", "[[lease]]"),
    ("cluster", "[cluster]"),
];

/// A peer with the places that later checks point at.
pub(super) struct PeerPlaces {
    pub(super) section: Range<usize>,
    pub(super) name: Range<usize>,
    pub(super) public_key: Range<usize>,
    pub(super) endpoints: Vec<At<Endpoint>>,
    pub(super) allowed_ips: Vec<At<IpNet>>,
    pub(super) wans: Vec<At<String>>,
    /// It carries frames and need not have prefixes.
    pub(super) ethernet: bool,
}

/// Places in the `[tun]` section that later checks point at.
pub(super) struct TunPlaces {
    pub(super) section: Range<usize>,
    pub(super) address_given: bool,
}

/// A WAN with its place.
pub(super) struct WanPlaces {
    pub(super) interface: Range<usize>,
    /// The first of its locations.
    pub(super) located: Option<Range<usize>>,
}

/// Reads everything; `None` when a part that is always needed is missing. Errors are in `problems`.
pub(super) fn config(
    document: &Spanned<DeTable<'_>>,
    surroundings: &Surroundings<'_>,
    problems: &mut Problems<'_>,
) -> Option<Config> {
    let root = document.get_ref();
    unknown_sections(root, problems);
    let alone = root.get("peer").is_none();
    let node = node(one_table(root, "node", problems), alone, surroundings, problems);
    let (tun, tun_place) = tun(one_table(root, "tun", problems), problems);
    let tap = super::tap::tap(one_table(root, "tap", problems), problems);
    let mut wans = Vec::new();
    let mut wan_places = Vec::new();
    for table in tables(root, "wan", WANS_MAX, problems) {
        if let Some((entry, places)) = wan(table, problems) {
            wans.push(entry);
            wan_places.push(places);
        }
    }
    let mut peers = Vec::new();
    let mut peer_places = Vec::new();
    let names = Names::collect(root);
    for table in tables(root, "peer", PEERS_MAX, problems) {
        if let Some((entry, places)) = peer(table, &names, surroundings, problems) {
            peers.push(entry);
            peer_places.push(places);
        }
    }
    let (services, service_places) = services::read::services(root, &names, surroundings, problems);
    services::check::services(&services, &tun, &service_places, problems);
    let sections = tables(root, "class", CLASSES_MAX, problems);
    let classes = (1..)
        .zip(sections)
        .filter_map(|(number, table)| class((table, number), &names, &services.groups, &wans, problems))
        .collect();
    if alone && root.get("interface").is_none() {
        let message = "no peers and no interfaces: nothing to do; add a [[peer]] or an [[interface]]";
        problems.whole(super::Severity::Warning, "peer", message);
    }
    let has_tap = tap.is_some();
    let places = cross::Places { alone, has_tap, tun: tun_place, wans: wan_places, peers: peer_places };
    cross::check(node.as_ref(), &tun, &wans, &mut peers, &places, problems);
    cross::shared_devices(&wans, &peers, &services, &places, problems);
    let table = one_table(root, "cluster", problems);
    let listen = node.as_ref().and_then(|node| node.listen);
    let around = super::cluster::Around { tun: &tun, interfaces: &services.interfaces, listen, surroundings };
    let cluster = super::cluster::cluster(table, &around, problems);
    super::cluster::check_peers(cluster.as_ref(), &peers, &places, problems);
    let path = PathBuf::from(surroundings.file);
    let (tap, tap_place) = tap.unzip();
    let mut config =
        Config { path, node: node?, tun, tap, wans, peers, bonds: Vec::new(), classes, services, cluster };
    super::tap::check(&config, tap_place.as_ref(), &places.peers, problems);
    config.number_bonds(Vec::new());
    Some(config)
}

fn unknown_sections(root: &DeTable<'_>, problems: &mut Problems<'_>) {
    for (name, value) in root {
        let text = name.get_ref().as_ref();
        if SECTIONS.iter().any(|(known, _)| *known == text) {
            continue;
        }
        let is_section = match value.get_ref() {
            DeValue::Table(_) => true,
            DeValue::Array(items) => items.iter().any(|item| item.get_ref().is_table()),
            _ => false,
        };
        let mut message = String::from(if is_section { "unknown section" } else { "unknown key" });
        let meant = suggestion(text, SECTIONS.iter().map(|(name, _)| *name));
        let headings = || SECTIONS.map(|(_, heading)| heading).join(", ");
        match meant.and_then(|meant| SECTIONS.iter().find(|(name, _)| *name == meant)) {
            Some((_, heading)) => message.push_str(&format!("; did you mean {heading}?")),
            None if is_section => message.push_str(&format!("; there are {}", headings())),
            None => message.push_str(&format!("; every key stands under one of {}", headings())),
        }
        problems.error(&name.span(), &shown(text), message);
    }
}

/// A table and where it stands.
pub(super) type Table<'a> = (&'a DeTable<'a>, Range<usize>);

/// A section that stands once.
pub(super) fn one_table<'a>(
    root: &'a DeTable<'a>,
    name: &'static str,
    problems: &mut Problems<'_>,
) -> Option<Table<'a>> {
    let value = root.get(name)?;
    match value.get_ref() {
        DeValue::Table(table) => Some((table, value.span())),
        DeValue::Array(_) => {
            let message = format!("stands once, in single brackets; write [{name}]");
            problems.error(&value.span(), name, message);
            None
        }
        other => {
            let message = format!("{} found, a section is needed; write [{name}]", kind(other));
            problems.error(&value.span(), name, message);
            None
        }
    }
}

/// A section that may stand many times.
pub(super) fn tables<'a>(
    root: &'a DeTable<'a>,
    name: &'static str,
    count_max: usize,
    problems: &mut Problems<'_>,
) -> Vec<Table<'a>> {
    let Some(value) = root.get(name) else { return Vec::new() };
    let DeValue::Array(items) = value.get_ref() else {
        let message = format!("stands in double brackets, once for each; write [[{name}]]");
        problems.error(&value.span(), name, message);
        return Vec::new();
    };
    let mut list = Vec::new();
    for item in items.iter() {
        let DeValue::Table(table) = item.get_ref() else {
            let message = format!("{} found, a section is needed; write [[{name}]]", kind(item.get_ref()));
            problems.error(&item.span(), name, message);
            continue;
        };
        if list.len() == count_max {
            problems.error(&item.span(), name, format!("more than {count_max} of them; remove some"));
            break;
        }
        list.push((table, item.span()));
    }
    list
}

/// `alone`: there are no peers, so that nobody needs to know this node by a key.
fn node(
    table: Option<Table<'_>>,
    alone: bool,
    surroundings: &Surroundings<'_>,
    problems: &mut Problems<'_>,
) -> Option<Node> {
    if table.is_none() && !alone {
        let message = "section [node] is missing; write [node] with private-key-file = \"node.key\"";
        problems.whole(super::Severity::Error, "node", message);
        return None;
    }
    let mut section = Section::new("node", table, problems);
    let name = section.parsed("name", "\"branch\"", values::name).map(|name| name.value);
    let (private_key, key_was_made) = private_key(&mut section, alone, surroundings);
    let listen = section.number("listen", 1..=65535).and_then(|port| u16::try_from(port.value).ok());
    let tls = section.number("listen-tls", 1..=65535);
    if let (Some(tls), None) = (&tls, listen) {
        let message = "nothing comes in by TCP without listen; write listen = 4600 beside it";
        section.error(&tls.at, "listen-tls", message);
    }
    let listen_tls = tls.and_then(|port| u16::try_from(port.value).ok());
    let cores = cores(&mut section);
    let class_cores = class_cores::read(&mut section, &cores);
    let rekey = section.number("rekey-after-seconds", 5..=120).and_then(|s| u8::try_from(s.value).ok());
    let path = |text: &str| absolute_or_in(surroundings, text);
    let location_file = section.parsed("location-file", "\"/run/anabranch/location\"", path);
    let state_dir = section.parsed("state-dir", "\"/var/lib/anabranch\"", path);
    let log_file = section.parsed("log-file", "\"/var/log/anabranch.log\"", path);
    let control_socket = section.parsed("control-socket", "\"/run/anabranch/ana0.sock\"", path);
    section.finish();
    Some(Node {
        name: name.unwrap_or_else(|| surroundings.host.to_owned()),
        private_key: private_key?,
        key_was_made,
        listen,
        listen_tls,
        cores,
        class_cores,
        rekey_after_seconds: rekey.unwrap_or(120),
        location_file: location_file.map(|path| path.value),
        state_dir: state_dir.map_or_else(|| PathBuf::from(STATE_DIR), |path| path.value),
        log_file: log_file.map(|path| path.value),
        control_socket: control_socket.map(|path| path.value),
    })
}

/// Files are relative to the configuration's directory, so that it does not matter where the program is started.
pub(super) fn absolute_or_in(surroundings: &Surroundings<'_>, text: &str) -> Result<PathBuf, ValueError> {
    if text.is_empty() || text.contains('\0') {
        return Err("an empty name is not a file; write a path".into());
    }
    Ok(surroundings.directory.join(text))
}

/// The node's key, and whether it was made because nobody needs to know it.
fn private_key(
    section: &mut Section<'_, '_, '_>,
    alone: bool,
    surroundings: &Surroundings<'_>,
) -> (Option<PrivateKey>, bool) {
    let key = secret(section, "private-key", "private-key-file", surroundings);
    if let Secret::Absent = key {
        if alone && let Ok(key) = key::generate() {
            return (Some(key), true);
        }
        let message = "missing; write private-key-file = \"node.key\" and make the file with \
                       \"anabranch genkey > node.key\"";
        section.missing("private-key-file", message);
    }
    (key.into_option(), false)
}

pub(super) enum Secret {
    Absent,
    Wrong,
    Key(PrivateKey),
}

impl Secret {
    pub(super) fn into_option(self) -> Option<PrivateKey> {
        match self {
            Self::Key(key) => Some(key),
            Self::Absent | Self::Wrong => None,
        }
    }
}

/// A secret key, inline or in a file.
pub(super) fn secret(
    section: &mut Section<'_, '_, '_>,
    inline: &'static str,
    in_file: &'static str,
    surroundings: &Surroundings<'_>,
) -> Secret {
    let wanted = section.value(inline).is_some() || section.value(in_file).is_some();
    let text = section.text(inline, "a base64 key in quotes");
    let file = section.text(in_file, "\"node.key\"");
    let (key, text, at) = match (text, file) {
        (Some(text), Some(_)) => {
            let message = format!("{inline} and {in_file} are both given; keep one of them");
            section.error(&text.at, inline, message);
            return Secret::Wrong;
        }
        (None, None) if wanted => return Secret::Wrong,
        (None, None) => return Secret::Absent,
        (Some(text), None) => {
            if surroundings.exposed {
                let message =
                    format!("other users can read this file; chmod 600 it, or keep the key in a {in_file}");
                section.warning(&text.at, inline, message);
            }
            (inline, zeroize::Zeroizing::new(text.value), text.at)
        }
        (None, Some(file)) => {
            let path = surroundings.directory.join(&file.value);
            match (surroundings.read_key)(&path) {
                Ok(contents) => {
                    if contents.exposed {
                        let message = format!("other users can read {}; chmod 600 it", path.display());
                        section.warning(&file.at, in_file, message);
                    }
                    (in_file, contents.text, file.at)
                }
                Err(error) => {
                    let path = path.display();
                    let message = format!(
                        "cannot read {path} ({error}); make it with \"anabranch genkey > {path}\" or correct the name"
                    );
                    section.error(&file.at, in_file, message);
                    return Secret::Wrong;
                }
            }
        }
    };
    match key::decode_secret(&text) {
        Ok(key) => Secret::Key(key),
        Err(error) => {
            section.error(&at, key, format!("not a key: {error}; a key is {KEY_RIGHT}"));
            Secret::Wrong
        }
    }
}

fn cores(section: &mut Section<'_, '_, '_>) -> Cores {
    const RIGHT: &str = "write \"all\", a number such as 4, or a list of CPUs such as [0, 1, 2, 3]";
    let Some(value) = section.value("cores") else { return Cores::All };
    let at = value.span();
    match value.get_ref() {
        DeValue::String(text) if text == "all" => return Cores::All,
        DeValue::Integer(_) => {
            if let Some(count @ 1..=128) = whole_number(value.get_ref()) {
                return Cores::Count(count as usize);
            }
        }
        DeValue::Array(items) if (1..=128).contains(&items.len()) => {
            let mut list = Vec::with_capacity(items.len());
            for item in items.iter() {
                match whole_number(item.get_ref()) {
                    Some(cpu @ 0..=1023) if list.contains(&(cpu as usize)) => {
                        section.error(&item.span(), "cores", format!("CPU {cpu} stands twice; remove one"));
                    }
                    Some(cpu @ 0..=1023) => list.push(cpu as usize),
                    _ => {
                        section.error(&item.span(), "cores", format!("not a CPU from 0 to 1023; {RIGHT}"));
                    }
                }
            }
            return Cores::List(list);
        }
        _ => {}
    }
    section.error(&at, "cores", format!("not understood (1 to 128 cores are possible); {RIGHT}"));
    Cores::All
}

fn tun(table: Option<Table<'_>>, problems: &mut Problems<'_>) -> (Tun, TunPlaces) {
    let mut section = Section::new("tun", table, problems);
    let name = section.parsed("name", "\"ana0\"", values::interface_name);
    let addresses = section.list("address", "\"10.77.0.1/24\"", values::interface_address);
    let mtu = section.number("mtu", 1280..=9000).and_then(|mtu| u16::try_from(mtu.value).ok());
    let auto = section.choice("route", &[("auto", true), ("off", false)]);
    // Numbers above belong to the tables this program makes for WANs; 253–255 are the kernel's own.
    let table = section.number("table", 1..=0x7fff_ffff);
    let routes = match (auto.map(|auto| auto.value), &table) {
        (Some(false), Some(table)) => {
            section.error(
                &table.at,
                "table",
                "route = \"off\" leaves nothing for a table; remove one of them",
            );
            Routes::Off
        }
        (Some(false), None) => Routes::Off,
        (_, None) => Routes::Auto,
        (_, Some(table)) => Routes::Table(u32::try_from(table.value).unwrap_or(254)),
    };
    let places = TunPlaces { section: section.at.clone(), address_given: section.value("address").is_some() };
    let addresses = unique_addresses(&mut section, addresses.unwrap_or_default());
    section.finish();
    let name = name.map_or_else(|| "ana0".to_owned(), |name| name.value);
    (Tun { name, addresses, mtu: mtu.unwrap_or(1500), routes }, places)
}

fn unique_addresses(section: &mut Section<'_, '_, '_>, given: Vec<At<IpNet>>) -> Vec<IpNet> {
    let mut list: Vec<IpNet> = Vec::with_capacity(given.len());
    for net in given {
        if list.iter().any(|other| other.addr() == net.value.addr()) {
            section.error(&net.at, "address", format!("{} stands twice; remove one", net.value.addr()));
            continue;
        }
        let hosts = net.value.max_prefix_len() - net.value.prefix_len();
        if hosts > 1 && net.value.addr() == net.value.network() {
            let message = format!("{} is the network itself; use an address within it", net.value);
            section.warning(&net.at, "address", message);
        }
        list.push(net.value);
    }
    list
}

/// A `[[wan]]` that stands alone, without its heading.
pub(crate) fn one_wan(text: &str) -> Result<Wan, Vec<Problem>> {
    let mut problems = Problems::new("", text);
    let document = problems.document();
    let wan = document.and_then(|document| wan((document.get_ref(), document.span()), &mut problems));
    let problems = problems.into_sorted();
    wan.map(|(wan, _)| wan).filter(|_| problems.is_empty()).ok_or(problems)
}

fn wan(table: Table<'_>, problems: &mut Problems<'_>) -> Option<(Wan, WanPlaces)> {
    let mut section = Section::new("wan", Some(table), problems);
    let wanted = section.value("interface").is_some() || section.value("match").is_some();
    let name = section.parsed("interface", "\"wan0\"", values::interface_name);
    let pattern = section.parsed("match", "\"wwan*\"", values::interface_pattern);
    let interface = match (name, pattern) {
        (Some(name), None) => Some(At::new(InterfaceMatch::Name(name.value), name.at)),
        (None, Some(pattern)) => Some(At::new(InterfaceMatch::Pattern(pattern.value), pattern.at)),
        (Some(_), Some(pattern)) => {
            section.error(&pattern.at, "match", "interface and match are both given; keep one of them");
            None
        }
        (None, None) => {
            if !wanted {
                section.missing("interface", "missing; write interface = \"wan0\" or match = \"wwan*\"");
            }
            None
        }
    };
    let tier = section.number("tier", 0..=255).and_then(|tier| u8::try_from(tier.value).ok());
    let rate_max = section.parsed("rate-max", "\"100 Mbit/s\"", values::rate);
    let receive_rate_max = section.parsed("receive-rate-max", "\"100 Mbit/s\"", values::rate);
    let families = [("any", Family::Any), ("ipv4", Family::Ipv4), ("ipv6", Family::Ipv6)];
    let family = section.choice("address-family", &families).map_or(Family::Any, |family| family.value);
    let gateways = section.list("gateway", "\"192.0.2.1\"", values::gateway).unwrap_or_default();
    for (number, gateway) in gateways.iter().enumerate() {
        let version = |at: &At<std::net::IpAddr>| at.value.is_ipv4();
        if gateways[..number].iter().any(|other| version(other) == version(gateway)) {
            section.error(&gateway.at, "gateway", "two gateways of one address family; keep one of them");
        }
        if !family.covers(gateway.value) {
            let message = "not of the address family in use; change one of address-family and gateway";
            section.error(&gateway.at, "gateway", message);
        }
    }
    let (properties, quota, schedule) = properties(&mut section);
    let locations = section.list("locations", "\"depot\"", values::name).unwrap_or_default();
    section.at_most("locations", &locations, LOCATIONS_MAX);
    let located = locations.first().map(|location| location.at.clone());
    section.finish();
    let interface = interface?;
    let wan = Wan {
        interface: interface.value,
        tier: tier.unwrap_or(0),
        rate_max_bps: rate_max.map(|rate| rate.value),
        receive_rate_max_bps: receive_rate_max.map(|rate| rate.value),
        family,
        gateways: gateways.into_iter().map(|gateway| gateway.value).collect(),
        properties,
        quota,
        schedule,
        locations: locations.into_iter().map(|location| location.value).collect(),
    };
    Some((wan, WanPlaces { interface: interface.at, located }))
}

fn peer(
    table: Table<'_>,
    names: &Names,
    surroundings: &Surroundings<'_>,
    problems: &mut Problems<'_>,
) -> Option<(Peer, PeerPlaces)> {
    let mut section = Section::new("peer", Some(table), problems);
    let name = section.required("name", "\"hub\"", values::name);
    let public_key = section.required("public-key", "\"(44 characters of base64)\"", |text| {
        key::decode_public(text).map_err(|error| match error {
            KeyError::Weak => {
                "this public key gives no secrecy; use the one that \"anabranch pubkey\" prints \
                               on the peer"
                    .into()
            }
            error => format!("not a key: {error}; a key is {KEY_RIGHT}").into(),
        })
    });
    let preshared_key =
        secret(&mut section, "preshared-key", "preshared-key-file", surroundings).into_option();
    let kind = peer_kind(&mut section);
    let endpoints = section.list("endpoints", "\"198.18.0.2:4600\"", values::endpoint).unwrap_or_default();
    if let Some(extra) = endpoints.get(ENDPOINTS_MAX) {
        let message = format!("more than {ENDPOINTS_MAX} endpoints; remove some");
        section.error(&extra.at, "endpoints", message);
    }
    let allowed_ips = section.list("allowed-ips", "\"10.77.0.2/32\"", values::prefix).unwrap_or_default();
    let tenant = section.parsed("tenant", "\"red\"", |text| names.tenant(text));
    let wans = section.list("wans", "\"wan0\"", values::interface_pattern);
    let paths = peer_paths(&mut section);
    let encryption = encryption(&mut section);
    let policies: Vec<(&'static str, Policy)> =
        Policy::ALL.iter().map(|policy| (policy.name(), *policy)).collect();
    let policy = section.choice("policy", &policies).map_or_else(Policy::default, |policy| policy.value);
    let flow = section.choice("flow", &FLOWS).map_or_else(FlowDefinition::default, |flow| flow.value);
    let steering = steering(&mut section);
    let processor = super::processor_file::read(&mut section, surroundings);
    let at = section.at.clone();
    section.finish();
    let (name, public_key) = (name?, public_key?);
    let places = PeerPlaces {
        section: at,
        name: name.at,
        public_key: public_key.at,
        endpoints,
        allowed_ips,
        wans: wans.clone().unwrap_or_default(),
        ethernet: kind.ethernet,
    };
    let peer = Peer {
        // Numbered when all are known.
        id: BondId(0),
        name: name.value,
        public_key: public_key.value,
        preshared_key,
        kind,
        endpoints: places.endpoints.iter().map(|endpoint| endpoint.value.clone()).collect(),
        allowed_ips: Vec::new(),
        tenant: tenant.map(|tenant| tenant.value),
        wans: wans.map(|wans| wans.into_iter().map(|wan| wan.value).collect()),
        paths,
        encryption,
        policy,
        flow,
        steering,
        processor,
    };
    Some((peer, places))
}

fn peer_kind(section: &mut Section<'_, '_, '_>) -> PeerKind {
    let mut flag = |key| section.flag(key).is_some_and(|flag| flag.value);
    PeerKind { hub: flag("hub"), ethernet: flag("ethernet") }
}

/// Where a peer is tried over TCP.
const TLS_PORT: u16 = 443;

fn peer_paths(section: &mut Section<'_, '_, '_>) -> PeerPaths {
    let small = |number: At<u64>| u8::try_from(number.value).ok();
    let spreads = Spread::ALL.map(|spread| (spread.name(), spread));
    let tls_port = section.number("tls-port", 0..=65535).and_then(|port| u16::try_from(port.value).ok());
    PeerPaths {
        udp: tunnel::config::PeerPaths {
            per_wan_pair: section.number("paths-per-wan-pair", 1..=8).and_then(small).unwrap_or(1),
            sockets: section.number("sockets-per-path", 1..=64).and_then(small).unwrap_or(4),
            spread: section.choice("spread", &spreads).map_or_else(Spread::default, |spread| spread.value),
        },
        tls_port: Some(tls_port.unwrap_or(TLS_PORT)).filter(|port| *port != 0),
    }
}

const FLOWS: [(&str, FlowDefinition); 4] = [
    ("5-tuple", FlowDefinition::FiveTuple),
    ("4-tuple", FlowDefinition::FourTuple),
    ("2-tuple", FlowDefinition::TwoTuple),
    ("5-tuple-dscp", FlowDefinition::FiveTupleDscp),
];

/// How cores are addressed, in both directions.
fn steering(section: &mut Section<'_, '_, '_>) -> Steering {
    let modes = SteeringMode::BUILT.map(|mode| (mode.name(), mode));
    let receive = section.choice("steering", &modes).map_or_else(SteeringMode::default, |mode| mode.value);
    let accept = section.list("accept-steering", "\"core-id\"", |name| {
        modes.iter().find(|(known, _)| *known == name).map(|(_, mode)| *mode).ok_or_else(|| {
            let names = modes.map(|(name, _)| format!("\"{name}\"")).join(" or ");
            format!("must be {names}").into()
        })
    });
    let core = |number: At<u64>| u8::try_from(number.value).ok();
    Steering {
        receive,
        accept: accept
            .map_or_else(ModeSet::built, |modes| modes.into_iter().map(|mode| mode.value).collect()),
        tunnel_core: section.number("tunnel-core", 0..=127).and_then(core),
        peer_tunnel_core: section.number("peer-tunnel-core", 0..=253).and_then(core),
        ask_core_first: section.flag("ask-core-first").is_some_and(|flag| flag.value),
    }
}

/// Cleartext needs a second word, so that nobody switches encryption off by a slip.
fn encryption(section: &mut Section<'_, '_, '_>) -> Encryption {
    let modes = [("on", Encryption::On), ("partial", Encryption::Partial), ("off", Encryption::Off)];
    let chosen = section.choice("encryption", &modes);
    let allowed = section.flag("allow-cleartext");
    let Some(chosen) = chosen else { return Encryption::On };
    if chosen.value == Encryption::On {
        return Encryption::On;
    }
    if allowed.is_some_and(|allowed| allowed.value) {
        let message = match chosen.value {
            Encryption::Off => {
                "inner packets of this peer travel UNENCRYPTED; anybody on the way can read them"
            }
            _ => {
                "inner packets of this peer are encrypted ONLY IN PART; anybody on the way can read the rest"
            }
        };
        section.warning(&chosen.at, "encryption", message);
        return chosen.value;
    }
    let message = "lets others read inner packets; if that is really meant, add allow-cleartext = true, \
                   otherwise write encryption = \"on\"";
    section.error(&chosen.at, "encryption", message);
    Encryption::On
}
