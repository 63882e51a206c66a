//! The sections about translation: `[[nat]]`, `[[forward]]`, `[[virtual-server]]`, `[[lease]]`.

use std::net::{IpAddr, SocketAddr};
use std::ops::Range;

use services::spec::{
    Affinity, BalanceMethod, DeliveryMode, Mapping, NatMode, PORTS_DEFAULT, PortChoice, ResetOnDown, TCP,
};
use toml::de::DeValue;

use super::super::problem::Problems;
use super::super::read::Table;
use super::super::section::{At, Section, kind};
use super::super::values as general;
use super::health;
use super::read::{Names, plain};
use super::{
    BACKENDS_MAX, BLOCK_PORTS, Backend, Forward, LIST_MAX, Lease, NAT_ADDRESSES_MAX, Nat, NatFrom, Subject,
    VirtualServer, values,
};

const MODES: [(&str, NatMode); 3] = [
    ("address-and-port", NatMode::AddressAndPort),
    ("port-only", NatMode::PortOnly),
    ("none", NatMode::None),
];

const MAPPINGS: [(&str, Mapping); 2] = [
    ("endpoint-dependent", Mapping::EndpointDependent),
    ("endpoint-independent", Mapping::EndpointIndependent),
];

const PORT_CHOICES: [(&str, PortChoice); 3] =
    [("random", PortChoice::Random), ("parity", PortChoice::Parity), ("preserve", PortChoice::Preserve)];

/// Of a NAT.
pub(in super::super) struct NatPlaces {
    pub(in super::super) section: Range<usize>,
    pub(in super::super) addresses: Option<Range<usize>>,
}

/// Of a virtual server.
pub(in super::super) struct ServerPlaces {
    pub(in super::super) name: Range<usize>,
    pub(in super::super) listen: Range<usize>,
}

pub(super) fn nat(table: Table<'_>, names: &Names, problems: &mut Problems<'_>) -> Option<(Nat, NatPlaces)> {
    let mut section = Section::new("nat", Some(table), problems);
    let out = section.required("out", "\"wan\"", |text| names.interface(text));
    let mode = section.choice("mode", &MODES).map_or(NatMode::AddressAndPort, |mode| mode.value);
    let addresses = addresses(&mut section, "addresses");
    let place = section.value("addresses").map(toml::Spanned::span);
    if mode != NatMode::AddressAndPort
        && let Some(at) = &place
    {
        let message = "only mode = \"address-and-port\" changes addresses; remove addresses or change mode";
        section.error(at, "addresses", message);
    }
    let from = section.list("from", "\"10.0.0.0/24\"", |text| match names.subject(text)? {
        Some(Subject::Prefix(net)) => Ok(NatFrom::Prefix(net)),
        Some(Subject::Group(name)) => Ok(NatFrom::Group(name)),
        Some(Subject::Peer(name)) => Ok(NatFrom::Peer(name)),
        _ => {
            let message = format!(
                "\"{text}\" is no prefix, group or peer; write for example \"10.0.0.0/24\" or \"peer:NAME\""
            );
            Err(message.into())
        }
    });
    let from = from.unwrap_or_default();
    section.at_most("from", &from, LIST_MAX);
    let tenants = plain(section.list("tenants", "\"red\"", |text| names.tenant(text)));
    let mapping =
        section.choice("mapping", &MAPPINGS).map_or(Mapping::EndpointDependent, |mapping| mapping.value);
    let port_range = nat_ports(&mut section);
    let port_choice =
        section.choice("port-choice", &PORT_CHOICES).map_or(PortChoice::Random, |choice| choice.value);
    let tables = tables(&mut section);
    let flows_per_client_max = section.number_or("flows-per-client-max", 1..=10_000_000, FLOWS_PER_CLIENT);
    let ports_per_client = section.number("ports-per-client", 0..=64_512);
    let ports_per_client = ports_per_client.map_or(0, |ports| {
        if ports.value % u64::from(BLOCK_PORTS) != 0 {
            let message = format!("{} is not a multiple of {BLOCK_PORTS}; ports come in blocks", ports.value);
            section.error(&ports.at, "ports-per-client", message);
        } else if ports.value > 0 && !has_whole_block(port_range) {
            let (first, last) = port_range;
            let message = format!(
                "ports = \"{first}-{last}\" has no whole block of {BLOCK_PORTS} ports (such as 1024-2047) for a client"
            );
            section.error(&ports.at, "ports-per-client", message);
        }
        u16::try_from(ports.value).unwrap_or(0)
    });
    let assemble_fragments = section.flag("assemble-fragments").is_some_and(|flag| flag.value);
    let at = section.at.clone();
    section.finish();
    let nat = Nat {
        out: out?.value,
        mode,
        addresses,
        from: from.into_iter().map(|from| from.value).collect(),
        tenants,
        mapping,
        ports: port_range,
        port_choice,
        tables,
        flows_per_client_max,
        ports_per_client,
        assemble_fragments,
    };
    Some((nat, NatPlaces { section: at, addresses: place }))
}

/// One client cannot take all ports of an address, but a busy office behind one address is one client too.
const FLOWS_PER_CLIENT: u32 = 65_536;

fn nat_ports(section: &mut Section<'_, '_, '_>) -> (u16, u16) {
    let ports = section.parsed("ports", "\"1024-65535\"", values::port_range);
    let Some(ports) = ports else { return PORTS_DEFAULT };
    if ports.value.0 == 0 {
        let message = "port 0 is no port; write for example \"1024-65535\"";
        section.error(&ports.at, "ports", message);
    }
    ports.value
}

/// Whether a range has a whole block of ports, as leases need them.
fn has_whole_block((first, last): (u16, u16)) -> bool {
    let block = BLOCK_PORTS as u16;
    let whole_first = first.div_ceil(block).checked_mul(block);
    first > 0 && whole_first.is_some_and(|first| first.checked_add(block - 1).is_some_and(|end| end <= last))
}

fn tables(section: &mut Section<'_, '_, '_>) -> u16 {
    let Some(tables) = section.number("tables", 1..=65_535) else { return 64 };
    if !matches!(tables.value, 64 | 256) {
        section.error(&tables.at, "tables", format!("{} found, 64 or 256 is needed", tables.value));
    }
    if tables.value == 256 { 256 } else { 64 }
}

fn addresses(section: &mut Section<'_, '_, '_>, key: &'static str) -> Vec<IpAddr> {
    let pools = section.list(key, "\"203.0.113.1\"", values::pool).unwrap_or_default();
    let mut list: Vec<IpAddr> = Vec::new();
    for pool in pools {
        for address in pool.value {
            if list.contains(&address) {
                section.error(&pool.at, key, format!("{address} stands twice; remove one"));
                break;
            }
            if list.len() == NAT_ADDRESSES_MAX {
                section.error(&pool.at, key, format!("more than {NAT_ADDRESSES_MAX} addresses; remove some"));
                break;
            }
            list.push(address);
        }
    }
    list
}

pub(super) fn forward(
    table: Table<'_>,
    names: &Names,
    problems: &mut Problems<'_>,
) -> Option<(Forward, Range<usize>)> {
    let mut section = Section::new("forward", Some(table), problems);
    let listen = section.required("listen", "\"tcp 203.0.113.1:8080\"", |text| {
        let (protocols, host, ports) = values::forward_listen(text)?;
        if let super::ListenHost::Interface(name) = &host {
            names.interface(name)?;
        }
        Ok((protocols, host, ports))
    });
    let to = section.required("to", "\"10.0.0.5:80\"", values::target);
    let tenant = section.parsed("tenant", "\"red\"", |text| names.tenant(text));
    let proxy_protocol = section.flag("proxy-protocol");
    section.finish();
    let (listen, to) = (listen?, to?);
    let (protocols, host, (port, last)) = listen.value;
    let (first_to, last_to) = to.value.1.unwrap_or((port, last));
    if last_to - first_to != last - port {
        let message = format!(
            "{} ports cannot lead to {}; name as many, or the address alone for the same ones",
            u32::from(last - port) + 1,
            u32::from(last_to - first_to) + 1
        );
        problems.error(&to.at, "forward.to", message);
    }
    if let super::ListenHost::Address(address) = host
        && address.is_ipv4() != to.value.0.is_ipv4()
    {
        let message = format!("{} is not of the address family of {address}; change one of them", to.value.0);
        problems.error(&to.at, "forward.to", message);
    }
    if let Some(proxy) = proxy_protocol.as_ref().filter(|proxy| proxy.value)
        && protocols != [TCP]
    {
        let message = "the PROXY protocol needs TCP; remove it, or write listen = \"tcp …\"";
        problems.error(&proxy.at, "forward.proxy-protocol", message);
    }
    let forward = Forward {
        protocols,
        host,
        port,
        ports: (last - port).saturating_add(1),
        to: SocketAddr::new(to.value.0, first_to),
        tenant: tenant.map(|tenant| tenant.value),
        proxy_protocol: proxy_protocol.is_some_and(|proxy| proxy.value),
    };
    Some((forward, listen.at))
}

const METHODS: [(&str, BalanceMethod); 4] = [
    ("maglev", BalanceMethod::Maglev),
    ("least-connections", BalanceMethod::LeastConnections),
    ("round-robin", BalanceMethod::RoundRobin),
    ("source-address", BalanceMethod::SourceAddress),
];

const DELIVERIES: [(&str, DeliveryMode); 2] =
    [("nat", DeliveryMode::Nat), ("direct-return", DeliveryMode::DirectReturn)];

const AFFINITIES: [(&str, Affinity); 3] = [
    ("none", Affinity::None),
    ("source-address", Affinity::SourceAddress),
    ("quic-connection-id", Affinity::QuicConnectionId),
];

const RESETS: [(&str, ResetOnDown); 3] =
    [("silent", ResetOnDown::Silent), ("always", ResetOnDown::Always), ("never", ResetOnDown::Never)];

pub(super) fn server(table: Table<'_>, problems: &mut Problems<'_>) -> Option<(VirtualServer, ServerPlaces)> {
    let mut section = Section::new("virtual-server", Some(table), problems);
    let name = section.parsed("name", "\"web\"", general::name);
    let listen = section.required("listen", "\"tcp 203.0.113.10:80\"", values::listen);
    let backends = backends(&mut section);
    let method = section.choice("method", &METHODS).map_or(BalanceMethod::Maglev, |method| method.value);
    let delivery =
        section.choice("delivery", &DELIVERIES).map_or(DeliveryMode::Nat, |delivery| delivery.value);
    let source = section.choice("source", &MODES);
    let source_addresses = addresses(&mut section, "source-addresses");
    let connections_max = section.number_or("connections-max", 0..=100_000_000, 0);
    let slow_start_s = section.number_or("slow-start-seconds", 0..=3_600, 0);
    let proxy_protocol = section.flag("proxy-protocol");
    let affinity = section.choice("affinity", &AFFINITIES);
    let reset_on_down = section.choice("reset-on-down", &RESETS);
    let proxied = proxy_protocol.as_ref().is_some_and(|proxy| proxy.value);
    let health = listen.as_ref().and_then(|listen| health::health(&mut section, listen.value, proxied));
    let direct = delivery == DeliveryMode::DirectReturn;
    let source_mode = match &source {
        Some(source) => source.value,
        None if direct => NatMode::None,
        None => NatMode::AddressAndPort,
    };
    if let Some(source) = source.filter(|source| direct && source.value != NatMode::None) {
        let message =
            "with delivery = \"direct-return\" backends answer the client themselves; remove source";
        section.error(&source.at, "source", message);
    }
    if let Some(at) = section.value("source-addresses").map(toml::Spanned::span)
        && source_mode != NatMode::AddressAndPort
    {
        let message = "only source = \"address-and-port\" changes addresses; remove one of them";
        section.error(&at, "source-addresses", message);
    }
    if let Some(listen) = &listen {
        check_backends(&mut section, listen.value, direct, &backends);
        let tcp = listen.value.0 == TCP;
        if let Some(proxy) = proxy_protocol.as_ref().filter(|proxy| proxy.value && (!tcp || direct)) {
            let message = "the PROXY protocol needs TCP and delivery = \"nat\"; remove it";
            section.error(&proxy.at, "proxy-protocol", message);
        }
        check_affinity(&mut section, affinity.as_ref(), !tcp && !direct);
    }
    section.finish();
    let listen = listen?;
    let (protocol, address) = listen.value;
    let text = values::listen_text(protocol, address);
    let name = name.unwrap_or_else(|| At::new(text, listen.at.clone()));
    let server = VirtualServer {
        name: name.value,
        protocol,
        listen: address,
        backends: backends.into_iter().map(|backend| backend.value).collect(),
        method,
        delivery,
        source: source_mode,
        source_addresses,
        connections_max,
        slow_start_s,
        proxy_protocol: proxied,
        affinity: affinity.map_or(Affinity::None, |affinity| affinity.value),
        reset_on_down: reset_on_down.map_or(ResetOnDown::Silent, |reset| reset.value),
        health,
    };
    Some((server, ServerPlaces { name: name.at, listen: listen.at }))
}

/// `answers`: the server is one of UDP whose backends answer through the gateway.
fn check_affinity(section: &mut Section<'_, '_, '_>, affinity: Option<&At<Affinity>>, answers: bool) {
    if let Some(affinity) = affinity.filter(|it| it.value == Affinity::QuicConnectionId && !answers) {
        let message = "QUIC needs UDP, and ids are learnt from answers, with delivery = \"nat\"; remove it";
        section.error(&affinity.at, "affinity", message);
    }
}

fn check_backends(
    section: &mut Section<'_, '_, '_>,
    listen: (u8, SocketAddr),
    direct: bool,
    backends: &[At<Backend>],
) {
    let mut seen = std::collections::BTreeSet::new();
    for backend in backends {
        let address = backend.value.address;
        if !seen.insert(address) {
            section.error(
                &backend.at,
                "backends",
                format!("{address} stands twice; give one of them more weight"),
            );
        }
        if address.is_ipv4() != listen.1.is_ipv4() {
            let message =
                format!("{address} is not of the address family of {}; change one of them", listen.1);
            section.error(&backend.at, "backends", message);
        }
        if address == listen.1 {
            section.error(&backend.at, "backends", format!("{address} is the virtual server itself"));
        }
        if direct && address.port() != listen.1.port() {
            let message = format!(
                "direct return changes no port; write {}",
                SocketAddr::new(address.ip(), listen.1.port())
            );
            section.error(&backend.at, "backends", message);
        }
    }
}

/// Longest time that a backend drains; a day is more than any maintenance waits.
const DRAIN_SECONDS: std::ops::RangeInclusive<u64> = 0..=86_400;

/// A list of addresses, of tables, or of both.
fn backends(section: &mut Section<'_, '_, '_>) -> Vec<At<Backend>> {
    const KEY: &str = "backends";
    const RIGHT: &str = "write for example backends = [\"10.0.0.1:80\", \"10.0.0.2:80\"]";
    let Some(value) = section.value(KEY) else {
        section.missing(KEY, format!("missing; {RIGHT}"));
        return Vec::new();
    };
    let DeValue::Array(items) = value.get_ref() else {
        let found = kind(value.get_ref());
        section.error(&value.span(), KEY, format!("{found} found, a list is needed; {RIGHT}"));
        return Vec::new();
    };
    if items.is_empty() {
        section.error(&value.span(), KEY, format!("none: nobody could be served; {RIGHT}"));
    }
    let drain_s = section.number_or("drain-seconds", DRAIN_SECONDS, 0);
    let mut list = Vec::with_capacity(items.len());
    for item in items.iter() {
        let at = item.span();
        match item.get_ref() {
            DeValue::String(text) => match values::backend(text) {
                Ok(address) => {
                    list.push(At::new(Backend { address, weight: 1, connections_max: 0, drain_s }, at));
                }
                Err(mistake) => section.error(&at, KEY, mistake.to_string()),
            },
            DeValue::Table(table) => {
                let mut inner =
                    Section::new("virtual-server.backends", Some((table, at.clone())), section.problems);
                let address = inner.required("address", "\"10.0.0.1:80\"", values::backend);
                let weight = inner.number_or("weight", 0..=1_000, 1);
                let connections_max = inner.number_or("connections-max", 0..=100_000_000, 0);
                let drain_s = inner.number_or("drain-seconds", DRAIN_SECONDS, drain_s);
                inner.finish();
                if let Some(address) = address.map(|address| address.value) {
                    list.push(At::new(Backend { address, weight, connections_max, drain_s }, at));
                }
            }
            other => section.error(&at, KEY, format!("{} found, an address is needed; {RIGHT}", kind(other))),
        }
    }
    section.at_most(KEY, &list, BACKENDS_MAX);
    list
}

pub(super) fn lease(
    table: Table<'_>,
    names: &Names,
    problems: &mut Problems<'_>,
) -> Option<(Lease, Range<usize>)> {
    let mut section = Section::new("lease", Some(table), problems);
    let name = section.required("name", "\"pod-1\"", values::word);
    let tenant = section.parsed("tenant", "\"red\"", |text| names.tenant(text));
    let from = section.required("from", "\"10.0.1.0/24\"", general::prefix);
    let address = section.required("address", "\"203.0.113.1\"", values::host_address);
    let block = u64::from(BLOCK_PORTS);
    let mut blocks = |key: &'static str, range, right: u64| {
        if section.value(key).is_none() {
            section.missing(key, format!("missing; write {key} = {right}"));
        }
        let number = section.number(key, range)?;
        if number.value % block != 0 {
            let message = format!("{} is not a multiple of {block}; ports come in blocks", number.value);
            section.error(&number.at, key, message);
            return None;
        }
        Some(number)
    };
    let first = blocks("first-port", 1_024..=64_512, 2_048);
    let ports = blocks("ports", 1_024..=64_512, 1_024);
    if let (Some(first), Some(ports)) = (&first, &ports)
        && first.value + ports.value > 65_536
    {
        let message = format!("only {} ports are left from {} on", 65_536 - first.value, first.value);
        section.error(&ports.at, "ports", message);
    }
    let tenant = tenant.map(|tenant| tenant.value);
    section.finish();
    let (name, from, address) = (name?, from?, address?);
    let lease = Lease {
        name: name.value,
        tenant,
        from: from.value.trunc(),
        address: address.value,
        first_port: u16::try_from(first?.value).ok()?,
        ports: u32::try_from(ports?.value).ok()?,
    };
    Some((lease, name.at))
}
