//! `[[class]]`: which flows are of which traffic class (rows T12, R13).

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use ipnet::IpNet;
use packet::attachment::BondId;
use packet::flow::FlowKey;
use packet::ip::{PROTOCOL_TCP, PROTOCOL_UDP};
use packet::server_name::{NamePattern, ServerName};
use toml::de::DeValue;
use tunnel::class::{Class, ClassRule, Classes};

use super::problem::Problems;
use super::read::Table;
use super::section::{At, Section, kind, shown, whole_number};
use super::services::read::{Names, protocols_with_ports};
use super::services::{Group, LIST_MAX, values as words};
use super::values::{self, ValueError};
use super::{Config, Peer, Wan};
use crate::protocol::FlowClass;
use crate::wans::{self, LiveWan};

/// Most `[[class]]` sections.
pub const CLASSES_MAX: usize = Classes::RULES_MAX;

/// One `[[class]]`: the first that matches decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrafficClass {
    /// Class, and the flows that get it. WANs are named by `wans`, members of groups by `groups`.
    pub rule: ClassRule,
    /// Groups whose members are ends of the flow too: `from` and `to`.
    pub groups: [Vec<String>; 2],
    /// Tenants; empty = any.
    pub tenants: Vec<String>,
    /// Peers; empty = any.
    pub peers: Vec<String>,
    /// WANs of class `pinned`, by interface name or pattern; empty: the flow's first path decides.
    pub wans: Vec<String>,
}

/// Members of the group of a name, as they are now.
pub type Members<'a> = dyn Fn(&str) -> Vec<IpNet> + 'a;

/// Classes of all peers' flows, by bond.
#[must_use]
pub fn of_peers(config: &Config, lives: &[LiveWan], members: &Members<'_>) -> BTreeMap<BondId, Arc<Classes>> {
    let of_peer = |peer: &Peer| (peer.id, Arc::new(for_peer(&config.classes, peer, lives, members)));
    config.peers.iter().map(of_peer).collect()
}

/// The classes that concern what is sent to a peer.
#[must_use]
pub fn for_peer(classes: &[TrafficClass], peer: &Peer, lives: &[LiveWan], members: &Members<'_>) -> Classes {
    let concerns = |class: &&TrafficClass| {
        let tenant =
            class.tenants.is_empty() || peer.tenant.as_ref().is_some_and(|t| class.tenants.contains(t));
        tenant && (class.peers.is_empty() || class.peers.contains(&peer.name))
    };
    let rule = |class: &TrafficClass| {
        let named = (!class.wans.is_empty()).then_some(class.wans.as_slice());
        let mut rule = ClassRule { wans: wans::ids_for_peer(named, lives), ..class.rule.clone() };
        for (nets, groups) in [&mut rule.from, &mut rule.to].into_iter().zip(&class.groups) {
            nets.extend(groups.iter().flat_map(|group| members(group)));
            if nets.is_empty() && !groups.is_empty() {
                // Nobody is in the group: the section matches nothing, where one without addresses matches all.
                return None;
            }
        }
        Some(rule)
    };
    Classes::new(classes.iter().filter(concerns).filter_map(rule).collect())
}

/// Class of a flow that is sent to the peer that has its destination, but for cores, and that peer; `None`: none has. `server`: the one that its client asks for.
#[must_use]
pub fn of_flow(
    config: &Config,
    flow: &FlowKey,
    dscp: u8,
    server: Option<&ServerName>,
    members: &Members<'_>,
) -> Option<(FlowClass, BondId, Class)> {
    let length = |peer: &&Peer| {
        let nets = peer.allowed_ips.iter().filter(|net| net.contains(&flow.dst));
        nets.map(|net| net.prefix_len() + 1).max().unwrap_or(0)
    };
    let peer = config.peers.iter().filter(|peer| length(peer) > 0).max_by_key(length)?;
    let classes = for_peer(&config.classes, peer, &[], members);
    let (class, number) = classes.decide(flow, dscp, server);
    let by = classes.rule(number).map(|rule| rule.name.clone());
    let found =
        FlowClass { peer: peer.name.clone(), class: class.name().to_owned(), by, ..FlowClass::default() };
    Some((found, peer.id, class))
}

/// Reads one section. `groups` and `wan_list`: what it may name.
pub(super) fn class(
    (table, number): (Table<'_>, usize),
    names: &Names,
    groups: &[Group],
    wan_list: &[Wan],
    problems: &mut Problems<'_>,
) -> Option<TrafficClass> {
    let mut section = Section::new("class", Some(table), problems);
    let name = section.parsed("name", "\"calls\"", values::name);
    let choices = Class::ALL.map(|class| (class.name(), class));
    let given = section.value("class").is_some();
    let chosen = section.choice("class", &choices);
    let by_mark = section.flag("by-mark");
    let marks = by_mark.as_ref().is_some_and(|flag| flag.value);
    match (&by_mark, given) {
        (Some(flag), true) if flag.value => {
            section.error(&flag.at, "by-mark", "the mark or class decides; keep one of them");
        }
        (_, false) if !marks => {
            section.missing("class", "missing; write class = \"interactive\", or by-mark = true");
        }
        _ => {}
    }
    let from = section.list("from", "\"10.0.0.0/24\"", |text| nets(text, groups)).unwrap_or_default();
    let to = section.list("to", "\"10.0.0.0/24\"", |text| nets(text, groups)).unwrap_or_default();
    let mut protocols: Vec<u8> = section
        .items("protocol", words::protocol)
        .unwrap_or_default()
        .into_iter()
        .map(|at| at.value)
        .collect();
    let ports = section.items("port", words::ports).unwrap_or_default();
    section.at_most("port", &ports, LIST_MAX);
    if let Some(first) = ports.first() {
        protocols = protocols_with_ports(&mut section, ("port", &first.at), protocols);
    }
    let dscp = section.items("dscp", dscp).unwrap_or_default();
    let servers = section.list("server-name", "\"*.example.org\"", server_name).unwrap_or_default();
    section.at_most("server-name", &servers, LIST_MAX);
    if let Some(first) = servers.first() {
        protocols = protocols_with_names(&mut section, &first.at, protocols);
    }
    let tenants = section.list("tenant", "\"red\"", |text| names.tenant(text)).unwrap_or_default();
    let peers = section.list("peer", "\"hub\"", |text| names.peer(text)).unwrap_or_default();
    let wans = section.list("wan", "\"lte\"", values::interface_pattern).unwrap_or_default();
    check_wans(&mut section, &wans, wan_list, chosen.as_ref().map(|class| class.value));
    section.finish();
    let (from, from_groups) = apart(from);
    let (to, to_groups) = apart(to);
    Some(TrafficClass {
        rule: ClassRule {
            name: name.map_or_else(|| format!("class {number}"), |name| name.value),
            class: chosen.map_or(Class::Bulk, |class| class.value),
            by_mark: marks,
            from,
            to,
            protocols,
            ports: ports.into_iter().map(|at| at.value).collect(),
            dscp: dscp.into_iter().map(|at| at.value).collect(),
            server_names: servers.into_iter().map(|at| at.value).collect(),
            wans: None,
        },
        groups: [from_groups, to_groups],
        tenants: tenants.into_iter().map(|at| at.value).collect(),
        peers: peers.into_iter().map(|at| at.value).collect(),
        wans: wans.into_iter().map(|at| at.value).collect(),
    })
}

/// Protocols of flows in which clients name their servers.
fn protocols_with_names(section: &mut Section<'_, '_, '_>, at: &Range<usize>, protocols: Vec<u8>) -> Vec<u8> {
    let with_names = [PROTOCOL_TCP, PROTOCOL_UDP];
    if let Some(without) = protocols.iter().find(|protocol| !with_names.contains(protocol)) {
        let message = format!(
            "{} has no server names, only tcp (TLS) and udp (QUIC) have; remove it from protocol",
            words::protocol_text(*without)
        );
        section.error(at, "server-name", message);
    }
    if protocols.is_empty() { with_names.to_vec() } else { protocols }
}

/// Name of a server, or of all below one.
fn server_name(text: &str) -> Result<NamePattern, ValueError> {
    NamePattern::new(text).ok_or_else(|| {
        format!(
            "\"{}\" is no name of a host; write for example \"example.org\", or \"*.example.org\" for all below it \
             (letters beyond a–z as xn--…)",
            shown(text)
        )
        .into()
    })
}

/// WANs are for class `pinned` and must exist.
fn check_wans(section: &mut Section<'_, '_, '_>, wans: &[At<String>], list: &[Wan], class: Option<Class>) {
    for wan in wans {
        let known =
            |section: &Wan| section.interface.text() == wan.value || section.interface.covers(&wan.value);
        if !list.iter().any(known) {
            let message = format!("\"{}\" is not in any [[wan]] section; add one", wan.value);
            section.error(&wan.at, "wan", message);
        } else if class != Some(Class::Pinned) {
            let message = "only class = \"pinned\" keeps to WANs; remove it or change the class";
            section.error(&wan.at, "wan", message);
        }
    }
}

/// Ends of flows, as a section names them.
enum Ends {
    Net(IpNet),
    Group(String),
}

/// Prefixes and names of groups.
fn apart(list: Vec<At<Ends>>) -> (Vec<IpNet>, Vec<String>) {
    let (mut nets, mut groups) = (Vec::new(), Vec::new());
    for ends in list {
        match ends.value {
            Ends::Net(net) => nets.push(net),
            Ends::Group(group) => groups.push(group),
        }
    }
    (nets, groups)
}

/// A prefix, or a group.
fn nets(text: &str, groups: &[Group]) -> Result<Ends, ValueError> {
    if groups.iter().any(|group| group.name == text) {
        return Ok(Ends::Group(text.to_owned()));
    }
    values::prefix(text).map(|net| Ends::Net(net.trunc())).map_err(|_| {
        format!(
            "\"{}\" is no prefix, and no [[group]] has that name; write for example \"10.0.0.0/24\"",
            shown(text)
        )
        .into()
    })
}

/// Names of code points (RFC 2474, 2597, 3246, 5865, 8622).
const DSCP_NAMES: [(&str, u8); 24] = [
    ("default", 0),
    ("le", 1),
    ("cs1", 8),
    ("af11", 10),
    ("af12", 12),
    ("af13", 14),
    ("cs2", 16),
    ("af21", 18),
    ("af22", 20),
    ("af23", 22),
    ("cs3", 24),
    ("af31", 26),
    ("af32", 28),
    ("af33", 30),
    ("cs4", 32),
    ("af41", 34),
    ("af42", 36),
    ("af43", 38),
    ("cs5", 40),
    ("voice-admit", 44),
    ("ef", 46),
    ("cs6", 48),
    ("cs7", 56),
    ("cs0", 0),
];

/// A code point by name or number.
fn dscp(value: &DeValue<'_>) -> Result<u8, ValueError> {
    const RIGHT: &str = "write for example \"ef\", \"af41\" or a number from 0 to 63";
    if let Some(number) = whole_number(value) {
        let small = u8::try_from(number).ok().filter(|dscp| *dscp < 64);
        return small.ok_or_else(|| format!("{number} is not a code point; {RIGHT}").into());
    }
    let DeValue::String(text) = value else { return Err(format!("{} found; {RIGHT}", kind(value)).into()) };
    let named = DSCP_NAMES.iter().find(|(name, _)| name.eq_ignore_ascii_case(text));
    named
        .map(|(_, dscp)| *dscp)
        .ok_or_else(|| format!("\"{}\" is not a code point; {RIGHT}", shown(text)).into())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::config::tests::{config, said_of};

    const BASE: &str = "[[wan]]\ninterface = \"wan0\"\n[[wan]]\nmatch = \"wwan*\"\n[[tenant]]\nname = \"red\"\n[[group]]\n\
                        name = \"phones\"\nmembers = [\"10.1.0.0/24\", \"10.2.0.0/24\"]\n[[peer]]\nname = \"hub\"\n\
                        public-key = \"$HUB\"\nallowed-ips = [\"10.77.0.2/32\"]\n";

    fn classes(text: &str) -> Vec<TrafficClass> {
        config("listen = 4600", &format!("{BASE}{text}")).classes
    }

    #[test]
    fn a_class_is_read_with_all_that_it_looks_at() {
        let all = "[[class]]\nname = \"calls\"\nclass = \"pinned\"\nfrom = [\"phones\"]\nto = \"10.9.0.0/16\"\n\
                   port = [5060, \"16384-16393\"]\ndscp = [\"EF\", 34]\npeer = \"hub\"\nwan = \"wwan*\"\n[[class]]\nby-mark = true\n\
                   tenant = \"red\"\n[[class]]\nclass = \"cheap\"\nserver-name = [\"*.Zoom.us\", \"example.org\"]\n";
        let classes = classes(all);
        let nets = |list: &[&str]| list.iter().map(|net| net.parse().unwrap()).collect::<Vec<IpNet>>();
        let rule = ClassRule {
            name: "calls".to_owned(),
            class: Class::Pinned,
            to: nets(&["10.9.0.0/16"]),
            protocols: vec![6, 17],
            ports: vec![(5060, 5060), (16384, 16393)],
            dscp: vec![46, 34],
            ..ClassRule::default()
        };
        assert_eq!(classes[0].rule, rule);
        assert_eq!(classes[0].groups, [vec!["phones".to_owned()], Vec::new()]);
        assert_eq!(
            (classes[0].peers.as_slice(), classes[0].wans.as_slice()),
            (&["hub".to_owned()][..], &["wwan*".to_owned()][..])
        );
        assert!(
            classes[1].rule.by_mark && classes[1].rule.name == "class 2" && classes[1].tenants == ["red"]
        );
        let names = ["*.zoom.us", "example.org"].map(|text| NamePattern::new(text).unwrap());
        assert_eq!(classes[2].rule.server_names, names);
        assert_eq!(classes[2].rule.protocols, [6, 17]);
    }

    #[test]
    fn mistakes_are_named() {
        let said = |text: &str| said_of(&format!("{BASE}[[class]]\n{text}"));
        for (text, what) in [
            ("port = 80\n", "class.class: missing"),
            ("class = \"fast\"\n", "\"fast\" is not one of \"bulk\", \"interactive\""),
            ("class = \"bulk\"\nby-mark = true\n", "keep one of them"),
            ("class = \"bulk\"\nfrom = [\"printers\"]\n", "no [[group]] has that name"),
            ("class = \"bulk\"\ndscp = 64\n", "64 is not a code point"),
            ("class = \"bulk\"\npeer = \"nobody\"\n", "nobody"),
            ("class = \"pinned\"\nwan = \"lte\"\n", "not in any [[wan]]"),
            ("class = \"bulk\"\nwan = \"wan0\"\n", "only class = \"pinned\""),
            ("class = \"bulk\"\nserver-name = \"10.0.0.1\"\n", "\"10.0.0.1\" is no name of a host"),
            ("class = \"bulk\"\nserver-name = \"*\"\n", "is no name of a host"),
            ("class = \"bulk\"\nserver-name = \"a.org\"\nprotocol = \"esp\"\n", "has no server names"),
            ("class = \"bulk\"\nport = 80\nprotocol = \"icmp\"\n", "icmp has no ports"),
        ] {
            let problems = said(text);
            assert!(problems.iter().any(|problem| problem.contains(what)), "{text}: {problems:?}");
        }
    }

    #[test]
    fn a_peer_gets_the_classes_that_concern_it() {
        let config = config(
            "listen = 4600",
            &format!(
                "{BASE}[[class]]\nclass = \"cheap\"\npeer = \"hub\"\n[[class]]\nclass = \"bulk\"\ntenant = \"red\"\n"
            ),
        );
        let flow = "tcp 10.1.0.1:1 > 10.77.0.2:2".parse().unwrap();
        let hub = for_peer(&config.classes, &config.peers[0], &[], &|_| Vec::new());
        assert_eq!(hub.decide(&flow, 0, None), (Class::Cheap, 0));
        assert_eq!(hub.rule(1), None, "of another tenant");
    }

    #[test]
    fn members_of_groups_count_as_they_are_now() {
        let config = config(
            "listen = 4600",
            &format!(
                "{BASE}[[class]]\nclass = \"critical\"\nfrom = [\"phones\", \"10.3.0.1\"]\n[[class]]\nclass = \"cheap\"\nto = \"phones\"\n"
            ),
        );
        let class = |flow: &str, members: &[&str]| {
            let members: Vec<IpNet> = members.iter().map(|net| net.parse().unwrap()).collect();
            let of_group = |_: &str| members.clone();
            let classes = for_peer(&config.classes, &config.peers[0], &[], &of_group);
            classes.decide(&flow.parse().unwrap(), 0, None).0
        };
        let (from, to) = ("tcp 10.7.0.1:1 > 10.77.0.2:2", "tcp 10.8.0.1:1 > 10.7.0.1:2");
        assert_eq!(class(from, &["10.7.0.0/24"]), Class::Critical);
        assert_eq!(class(to, &["10.7.0.0/24"]), Class::Critical, "from and to are the two ends");
        assert_eq!(class("tcp 10.3.0.1:1 > 10.77.0.2:2", &[]), Class::Critical);
        assert_eq!(class(from, &[]), Class::Bulk, "an empty group is nobody, not everybody");
    }
}
