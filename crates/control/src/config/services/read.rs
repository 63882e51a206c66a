//! From TOML tables to the types of [`super`]: interfaces, tenants, routes, groups, rules, `[gateway]`.
//! `balance` has the sections about translation.

use std::net::IpAddr;
use std::ops::Range;
use std::path::Path;

use ipnet::IpNet;
use linux::privileges::User;
use services::fragment::Variant;
use services::spec::{HostMode, Limits, RuleAction, TCP, Timeouts, UDP};
use toml::de::{DeTable, DeValue};

use super::super::Surroundings;
use super::super::problem::{Problems, suggestion};
use super::super::read::{Table, absolute_or_in, one_table, tables};
use super::super::section::{At, Section, shown};
use super::super::values::{self as general, ValueError};
use super::{
    Distribution, FORWARDS_MAX, GATEWAY, GROUP_MEMBERS_MAX, GROUPS_MAX, Group, INTERFACES_MAX, Interface,
    LEASES_MAX, LIST_MAX, NATS_MAX, PEER, ROUTES_MAX, RULES_MAX, Route, Rule, SERVERS_MAX, Services,
    Settings, Subject, TENANTS_MAX, TUNNEL, balance, values,
};

/// Names that other sections may use, also of sections that have faults themselves: one fault is said once.
#[derive(Default)]
pub(in super::super) struct Names {
    pub(super) interfaces: Vec<String>,
    pub(super) tenants: Vec<String>,
    pub(super) groups: Vec<String>,
    pub(super) peers: Vec<String>,
}

impl Names {
    pub(in super::super) fn collect(root: &DeTable<'_>) -> Self {
        let of = |section: &str, key: &str| -> Vec<String> {
            let Some(DeValue::Array(items)) = root.get(section).map(|value| value.get_ref()) else {
                return Vec::new();
            };
            let name = |item: &DeValue<'_>| match item {
                DeValue::Table(table) => {
                    table.get(key).and_then(|name| name.get_ref().as_str().map(str::to_owned))
                }
                _ => None,
            };
            items.iter().filter_map(|item| name(item.get_ref())).collect()
        };
        Self {
            interfaces: of("interface", "name"),
            tenants: of("tenant", "name"),
            groups: of("group", "name"),
            peers: of("peer", "name"),
        }
    }

    pub(super) fn interface(&self, text: &str) -> Result<String, ValueError> {
        known(text, &self.interfaces, "interface", "an [[interface]]")
    }

    pub(in super::super) fn peer(&self, text: &str) -> Result<String, ValueError> {
        known(text, &self.peers, "peer", "a [[peer]]")
    }

    pub(in super::super) fn tenant(&self, text: &str) -> Result<String, ValueError> {
        known(text, &self.tenants, "tenant", "a [[tenant]]")
    }

    /// An entry of `from` or `to` of a rule.
    pub(super) fn subject(&self, text: &str) -> Result<Option<Subject>, ValueError> {
        match text {
            GATEWAY => return Ok(Some(Subject::Gateway)),
            TUNNEL => return Ok(Some(Subject::Tunnel)),
            "any" => return Ok(None),
            _ => {}
        }
        if let Some(name) = text.strip_prefix(PEER) {
            return self.peer(name).map(|name| Some(Subject::Peer(name)));
        }
        if let Ok(net) = general::prefix(text) {
            return Ok(Some(Subject::Prefix(net.trunc())));
        }
        let is = |list: &[String]| list.iter().any(|name| name == text);
        if is(&self.groups) {
            return Ok(Some(Subject::Group(text.to_owned())));
        }
        if is(&self.interfaces) {
            return Ok(Some(Subject::Interface(text.to_owned())));
        }
        let names = || self.groups.iter().chain(&self.interfaces).map(String::as_str).chain(super::RESERVED);
        let mut message =
            format!("\"{}\" is no prefix, and no [[group]] or [[interface]] has that name", shown(text));
        match suggestion(text, names()) {
            Some(meant) => message.push_str(&format!("; did you mean \"{meant}\"?")),
            None => message.push_str(
                "; write a prefix such as \"10.0.0.0/24\", a name, \"gateway\", \"tunnel\" or \"peer:NAME\"",
            ),
        }
        Err(message.into())
    }
}

fn known(text: &str, names: &[String], what: &str, section: &str) -> Result<String, ValueError> {
    if names.iter().any(|name| name == text) {
        return Ok(text.to_owned());
    }
    let mut message = format!("no {what} is named \"{}\"", shown(text));
    match suggestion(text, names.iter().map(String::as_str)) {
        Some(meant) => message.push_str(&format!("; did you mean \"{meant}\"?")),
        None => message.push_str(&format!("; add {section} section with name = \"{}\"", shown(text))),
    }
    Err(message.into())
}

/// Where things stand in the file, for what is checked at the end.
#[derive(Default)]
pub(in super::super) struct Places {
    pub(in super::super) interfaces: Vec<InterfacePlaces>,
    pub(in super::super) tenants: Vec<Range<usize>>,
    pub(in super::super) groups: Vec<Range<usize>>,
    pub(in super::super) rules: Vec<Range<usize>>,
    pub(in super::super) routes: Vec<RoutePlaces>,
    pub(in super::super) nats: Vec<balance::NatPlaces>,
    pub(in super::super) forwards: Vec<Range<usize>>,
    pub(in super::super) servers: Vec<balance::ServerPlaces>,
    pub(in super::super) leases: Vec<Range<usize>>,
    pub(in super::super) settings: Range<usize>,
    pub(in super::super) default_action: Option<Range<usize>>,
}

/// Of an interface.
pub(in super::super) struct InterfacePlaces {
    pub(in super::super) name: Range<usize>,
    pub(in super::super) device: Range<usize>,
    pub(in super::super) addresses: Vec<At<IpNet>>,
    pub(in super::super) virtual_addresses: Vec<At<IpAddr>>,
}

/// Of a route.
pub(in super::super) struct RoutePlaces {
    pub(in super::super) section: Range<usize>,
    pub(in super::super) via: Option<Range<usize>>,
}

/// Reads all of these sections.
pub(in super::super) fn services(
    root: &DeTable<'_>,
    names: &Names,
    surroundings: &Surroundings<'_>,
    problems: &mut Problems<'_>,
) -> (Services, Places) {
    let (mut all, mut places) = (Services::default(), Places::default());
    for table in tables(root, "interface", INTERFACES_MAX, problems) {
        push(interface(table, names, problems), &mut all.interfaces, &mut places.interfaces);
    }
    for table in tables(root, "tenant", TENANTS_MAX, problems) {
        push(tenant(table, problems), &mut all.tenants, &mut places.tenants);
    }
    for table in tables(root, "group", GROUPS_MAX, problems) {
        push(group(table, surroundings, problems), &mut all.groups, &mut places.groups);
    }
    for table in tables(root, "route", ROUTES_MAX, problems) {
        push(route(table, names, problems), &mut all.routes, &mut places.routes);
    }
    for (number, table) in tables(root, "rule", RULES_MAX, problems).into_iter().enumerate() {
        push(rule(table, number + 1, names, problems), &mut all.rules, &mut places.rules);
    }
    for table in tables(root, "nat", NATS_MAX, problems) {
        push(balance::nat(table, names, problems), &mut all.nats, &mut places.nats);
    }
    for table in tables(root, "forward", FORWARDS_MAX, problems) {
        push(balance::forward(table, names, problems), &mut all.forwards, &mut places.forwards);
    }
    for table in tables(root, "virtual-server", SERVERS_MAX, problems) {
        push(balance::server(table, problems), &mut all.servers, &mut places.servers);
    }
    for table in tables(root, "lease", LEASES_MAX, problems) {
        push(balance::lease(table, names, problems), &mut all.leases, &mut places.leases);
    }
    let settings = one_table(root, "gateway", problems);
    places.settings = settings.as_ref().map_or(0..0, |(_, at)| at.clone());
    (all.settings, places.default_action) = gateway(settings, surroundings, problems);
    (all, places)
}

fn push<T, P>(read: Option<(T, P)>, list: &mut Vec<T>, places: &mut Vec<P>) {
    if let Some((entry, place)) = read {
        list.push(entry);
        places.push(place);
    }
}

/// The values without their places.
pub(super) fn plain<T>(list: Option<Vec<At<T>>>) -> Vec<T> {
    list.into_iter().flatten().map(|entry| entry.value).collect()
}

fn interface(
    table: Table<'_>,
    names: &Names,
    problems: &mut Problems<'_>,
) -> Option<(Interface, InterfacePlaces)> {
    let mut section = Section::new("interface", Some(table), problems);
    let name = section.required("name", "\"lan\"", values::word);
    let device = section.parsed("device", "\"eth0\"", general::interface_name);
    let addresses =
        section.list("address", "\"10.0.0.1/24\"", general::interface_address).unwrap_or_default();
    section.at_most("address", &addresses, LIST_MAX);
    let virtual_addresses =
        section.list("virtual-address", "\"10.0.0.100\"", values::host_address).unwrap_or_default();
    section.at_most("virtual-address", &virtual_addresses, LIST_MAX);
    let tenant = section.parsed("tenant", "\"red\"", |text| names.tenant(text));
    let mtu = section.number("mtu", 576..=65_535).and_then(|mtu| u16::try_from(mtu.value).ok());
    let outside = section.flag("outside").map(|outside| outside.value);
    let loose_tcp = section.choice("tcp", &[("strict", false), ("loose", true)]).is_some_and(|tcp| tcp.value);
    let shared = section.number("shared", 0..=254).and_then(|ifid| u8::try_from(ifid.value).ok());
    let dispatchers = section.numbers("dispatchers", 0..=4_095);
    let takeover = section.flag("takeover").is_some_and(|takeover| takeover.value);
    let mac = section.parsed("mac", "\"02:00:5e:00:01:01\"", values::mac);
    let device_given = section.value("device").is_some();
    let name = match (name, section.at.clone()) {
        (Some(name), _) => name,
        (None, _) => {
            section.finish();
            return None;
        }
    };
    let device = match device {
        Some(device) => Some(device),
        None if device_given => None,
        None => match general::interface_name(&name.value) {
            Ok(device) => Some(At::new(device, name.at.clone())),
            Err(message) => {
                let hint = "; name the kernel's device with device = \"eth0\"";
                section.error(&name.at, "name", format!("{message}{hint}"));
                None
            }
        },
    };
    section.finish();
    let device = device?;
    let interface = Interface {
        name: name.value,
        device: device.value,
        addresses: addresses.iter().map(|address| address.value).collect(),
        virtual_addresses: virtual_addresses.iter().map(|address| address.value).collect(),
        tenant: tenant.map(|tenant| tenant.value),
        mtu,
        outside,
        loose_tcp,
        shared,
        dispatchers: dispatchers.iter().filter_map(|node| u16::try_from(node.value).ok()).collect(),
        mac: mac.map(|mac| mac.value),
        takeover,
    };
    let places = InterfacePlaces { name: name.at, device: device.at, addresses, virtual_addresses };
    Some((interface, places))
}

fn tenant(table: Table<'_>, problems: &mut Problems<'_>) -> Option<(String, Range<usize>)> {
    let mut section = Section::new("tenant", Some(table), problems);
    let name = section.required("name", "\"red\"", values::word);
    section.finish();
    name.map(|name| (name.value, name.at))
}

fn group(
    table: Table<'_>,
    surroundings: &Surroundings<'_>,
    problems: &mut Problems<'_>,
) -> Option<(Group, Range<usize>)> {
    let mut section = Section::new("group", Some(table), problems);
    let name = section.required("name", "\"servers\"", values::word);
    let members = section.list("members", "\"10.0.0.0/24\"", general::prefix).unwrap_or_default();
    section.at_most("members", &members, GROUP_MEMBERS_MAX);
    let mut list: Vec<IpNet> = members.into_iter().map(|member| member.value.trunc()).collect();
    let file = section.parsed("file", "\"servers.txt\"", |text| absolute_or_in(surroundings, text));
    if let Some(file) = &file {
        match read_group(surroundings, &file.value, GROUP_MEMBERS_MAX.saturating_sub(list.len())) {
            Ok(more) => list.extend(more),
            Err(mistake) => section.error(&file.at, "file", mistake.to_string()),
        }
    }
    section.finish();
    list.sort_unstable();
    list.dedup();
    let name = name?;
    Some((Group { name: name.value, members: list, file: file.map(|file| file.value) }, name.at))
}

fn read_group(
    surroundings: &Surroundings<'_>,
    path: &Path,
    members_max: usize,
) -> Result<Vec<IpNet>, ValueError> {
    let shown = path.display();
    let text = (surroundings.read_text)(path)
        .map_err(|error| format!("cannot read {shown} ({error}); make the file, with one prefix a line"))?;
    values::group_file(&text, members_max)
        .map_err(|(line, mistake)| format!("{shown}:{line}: {mistake}").into())
}

fn route(table: Table<'_>, names: &Names, problems: &mut Problems<'_>) -> Option<(Route, RoutePlaces)> {
    let mut section = Section::new("route", Some(table), problems);
    let to = section.required("to", "\"10.1.0.0/16\"", general::prefix);
    let via = section.parsed("via", "\"10.0.0.254\"", general::gateway);
    let interface = section.parsed("interface", "\"lan\"", |text| names.interface(text));
    let tenant = section.parsed("tenant", "\"red\"", |text| names.tenant(text));
    if section.value("via").is_none() && section.value("interface").is_none() {
        section.missing("via", "missing; write via = \"10.0.0.254\", or interface = \"lan\" for neighbors");
    }
    if let (Some(to), Some(via)) = (&to, &via)
        && to.value.addr().is_ipv4() != via.value.is_ipv4()
    {
        let message =
            format!("{} is not of the address family of {}; change one of them", via.value, to.value);
        section.error(&via.at, "via", message);
    }
    let at = section.at.clone();
    section.finish();
    let route = Route {
        to: to?.value.trunc(),
        via: via.as_ref().map(|via| via.value),
        interface: interface.map(|interface| interface.value),
        tenant: tenant.map(|tenant| tenant.value),
    };
    Some((route, RoutePlaces { section: at, via: via.map(|via| via.at) }))
}

const ACTIONS: [(&str, RuleAction); 3] =
    [("allow", RuleAction::Allow), ("drop", RuleAction::Drop), ("reject", RuleAction::Reject)];

fn rule(
    table: Table<'_>,
    number: usize,
    names: &Names,
    problems: &mut Problems<'_>,
) -> Option<(Rule, Range<usize>)> {
    let mut section = Section::new("rule", Some(table), problems);
    let name = section.parsed("name", "\"web\"", general::name);
    if section.value("action").is_none() {
        section.missing("action", "missing; write action = \"allow\", \"drop\" or \"reject\"");
    }
    let action = section.choice("action", &ACTIONS);
    let mut sides = [Vec::new(), Vec::new()];
    for (side, key) in sides.iter_mut().zip(["from", "to"]) {
        let list = section.list(key, "\"10.0.0.0/24\"", |text| names.subject(text)).unwrap_or_default();
        section.at_most(key, &list, LIST_MAX);
        // "any" among others makes the whole side any.
        if list.iter().all(|subject| subject.value.is_some()) {
            *side = list.into_iter().filter_map(|subject| subject.value).collect();
        }
    }
    let mut protocols = plain(section.items("protocol", values::protocol));
    let ports = section.items("port", values::ports).unwrap_or_default();
    let source_ports = section.items("source-port", values::ports).unwrap_or_default();
    section.at_most("port", &ports, LIST_MAX);
    section.at_most("source-port", &source_ports, LIST_MAX);
    let first = ports.first().map(|at| (at, "port")).or(source_ports.first().map(|at| (at, "source-port")));
    if let Some((at, key)) = first {
        protocols = protocols_with_ports(&mut section, (key, &at.at), protocols);
    }
    let tenants = plain(section.list("tenant", "\"red\"", |text| names.tenant(text)));
    let at = section.at.clone();
    section.finish();
    let [from, to] = sides;
    let rule = Rule {
        name: name.map_or_else(|| format!("rule {number}"), |name| name.value),
        action: action?.value,
        from,
        to,
        protocols,
        ports: ports.into_iter().map(|range| range.value).collect(),
        source_ports: source_ports.into_iter().map(|range| range.value).collect(),
        tenants,
    };
    Some((rule, at))
}

/// The protocols of a section that has ports under `key`: TCP and UDP where none are given.
pub(in super::super) fn protocols_with_ports(
    section: &mut Section<'_, '_, '_>,
    (key, at): (&'static str, &Range<usize>),
    protocols: Vec<u8>,
) -> Vec<u8> {
    let without = protocols.iter().find(|protocol| !WITH_PORTS.contains(protocol));
    if let Some(without) = without {
        let message = format!(
            "{} has no ports; remove it from protocol, or write a rule of its own for it",
            values::protocol_text(*without)
        );
        section.error(at, key, message);
    } else if protocols.is_empty() && section.value("protocol").is_none() {
        return vec![TCP, UDP];
    }
    protocols
}

/// TCP, UDP, DCCP, SCTP, UDP-Lite.
const WITH_PORTS: [u8; 5] = [TCP, UDP, 33, 132, 136];

const DISTRIBUTIONS: [(&str, Distribution); 5] = [
    ("flow", Distribution::Flow),
    ("interface", Distribution::Interface),
    ("round-robin", Distribution::RoundRobin),
    ("random", Distribution::Random),
    ("cpu", Distribution::Cpu),
];

const HOST_MODES: [(&str, HostMode); 2] = [("native", HostMode::Native), ("datapath", HostMode::Datapath)];

const FRAGMENTS: [(&str, Variant); 3] =
    [("as-needed", Variant::Rules), ("assemble", Variant::Assemble), ("bridge", Variant::Bridge)];

/// A word, or a table with one bound.
fn fragments(section: &mut Section<'_, '_, '_>) -> Variant {
    const KEY: &str = "fragments";
    let Some(DeValue::Table(_)) = section.value(KEY).map(toml::Spanned::get_ref) else {
        return section.choice(KEY, &FRAGMENTS).map_or(Variant::Rules, |variant| variant.value);
    };
    let Some(table) = section.table(KEY, "{ up-to-bytes = 4000 }") else { return Variant::Rules };
    let mut inner = Section::new("gateway.fragments", Some(table), section.problems);
    let bytes = inner.number("up-to-bytes", 1..=65_535).and_then(|n| u32::try_from(n.value).ok());
    let count = inner.number("up-to-fragments", 1..=8_192).and_then(|n| u16::try_from(n.value).ok());
    let load = inner.number("load-below-percent", 1..=100).and_then(|n| u8::try_from(n.value).ok());
    let keys = ["up-to-bytes", "up-to-fragments", "load-below-percent"];
    if keys.iter().filter(|key| inner.value(key).is_some()).count() != 1 {
        let at = inner.at.clone();
        let message = "one bound is needed; write for example fragments = { up-to-bytes = 4000 }";
        inner.problems.error(&at, "gateway.fragments", message);
    }
    inner.finish();
    match (bytes, count, load) {
        (Some(bytes), ..) => Variant::UpToBytes(bytes),
        (_, Some(count), _) => Variant::UpToFragments(count),
        (.., Some(load)) => Variant::LoadBelow(load),
        _ => Variant::Rules,
    }
}

fn gateway(
    table: Option<Table<'_>>,
    surroundings: &Surroundings<'_>,
    problems: &mut Problems<'_>,
) -> (Settings, Option<Range<usize>>) {
    let mut section = Section::new("gateway", table, problems);
    let default_action = section.choice("default-action", &ACTIONS);
    let mut settings = Settings {
        default_action: default_action.as_ref().map(|action| action.value),
        limits: limits(&mut section),
        ..Settings::default()
    };
    settings.fragments = fragments(&mut section);
    if let Some(host) = section.choice("host", &HOST_MODES) {
        settings.host = host.value;
    }
    if let Some(distribution) = section.choice("distribution", &DISTRIBUTIONS) {
        settings.distribution = distribution.value;
    }
    if let Some(rebalance) = section.flag("core-rebalance") {
        settings.core_rebalance = rebalance.value;
    }
    let user = |name: &str| User::find(name).map_err(|error| error.to_string().into());
    let named = section.parsed("health-user", "\"nobody\"", user).map(|at| at.value);
    settings.health_user = named.or_else(|| User::find("nobody").ok()).unwrap_or(settings.health_user);
    settings.keep_flows_s = section.number_or("keep-flows-seconds", 0..=60, settings.keep_flows_s);
    let log_file = |text: &str| absolute_or_in(surroundings, text);
    settings.log_file =
        section.parsed("log-file", "\"/var/log/anabranch-nat.json\"", log_file).map(|at| at.value);
    if let Some(table) = section.table("timeouts", "{ udp-seconds = 180 }") {
        settings.timeouts = timeouts(table, section.problems);
    }
    section.finish();
    (settings, default_action.map(|action| action.at))
}

fn limits(section: &mut Section<'_, '_, '_>) -> Limits {
    let default = Limits::default();
    let flows_max = section.number_or("flows-max", 1_024..=100_000_000, default.flows_max);
    let embryonic = default.embryonic_max.min(flows_max / 4);
    Limits {
        flows_max,
        embryonic_max: section.number_or("embryonic-max", 256..=u64::from(flows_max), embryonic),
        fragment_bytes_max: section.number_or(
            "fragment-bytes-max",
            65_536..=1 << 32,
            default.fragment_bytes_max,
        ),
        fragments_per_source_max: section.number_or(
            "fragments-per-source-max",
            1..=65_535,
            default.fragments_per_source_max,
        ),
        errors_per_s_max: section.number_or("errors-per-second-max", 0..=1_000_000, default.errors_per_s_max),
        fragments: default.fragments,
    }
}

/// RFC 5382 and 4787 say what is the least; less is possible, and said.
fn timeouts(table: Table<'_>, problems: &mut Problems<'_>) -> Timeouts {
    const DAYS_30: u64 = 30 * 86_400;
    let default = Timeouts::default();
    let mut section = Section::new("gateway.timeouts", Some(table), problems);
    let mut seconds = |key, default, least: u32, why: &str| {
        let Some(given) = section.number(key, 1..=DAYS_30) else { return default };
        let value = u32::try_from(given.value).unwrap_or(default);
        if value < least {
            section.warning(
                &given.at,
                key,
                format!("{why} asks for {least} s or more; shorter ones break quiet connections"),
            );
        }
        value
    };
    let timeouts = Timeouts {
        tcp_established_s: seconds("tcp-established-seconds", default.tcp_established_s, 7_440, "RFC 5382"),
        tcp_transitory_s: seconds("tcp-transitory-seconds", default.tcp_transitory_s, 240, "RFC 5382"),
        tcp_closed_s: seconds("tcp-closed-seconds", default.tcp_closed_s, 0, ""),
        udp_s: seconds("udp-seconds", default.udp_s, 120, "RFC 4787"),
        udp_unreplied_s: seconds("udp-unreplied-seconds", default.udp_unreplied_s, 0, ""),
        icmp_s: seconds("icmp-seconds", default.icmp_s, 60, "RFC 5508"),
        other_s: seconds("other-seconds", default.other_s, 0, ""),
        fragments_s: seconds("fragments-seconds", default.fragments_s, 0, ""),
    };
    section.finish();
    timeouts
}
