//! Traffic classes (rows T12, R13, R15): what a flow wants of the paths, and the rules that say so.
//!
//! [`Classes`] are the `[[class]]` sections as they concern one bond. The sender asks them once a flow
//! (`forwarder/flows.rs` remembers the answer); both ends of a bond have rules of their own, since each end chooses the
//! paths of what it sends. A rule matches a flow whichever way it goes, so that one text suits both ends.

use std::net::IpAddr;

use ipnet::IpNet;
use packet::flow::FlowKey;
use packet::ip::{PROTOCOL_TCP, PROTOCOL_UDP};
use packet::server_name::{NamePattern, ServerName};

/// Wish of a flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Class {
    /// Throughput, over all paths that help.
    #[default]
    Bulk = 0,
    /// Lowest delay: ahead of bulk, on one path at a time, never reordered.
    Interactive = 1,
    /// As interactive, and the same sealed bytes over a second path too (row R3).
    Critical = 2,
    /// One path, which is left only when it dies.
    Pinned = 3,
    /// Only the cheapest paths.
    Cheap = 4,
}

/// How many there are.
pub const CLASSES: usize = 5;

impl Class {
    /// All of them, by number.
    pub const ALL: [Self; CLASSES] =
        [Self::Bulk, Self::Interactive, Self::Critical, Self::Pinned, Self::Cheap];

    /// Name in configuration and status.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bulk => "bulk",
            Self::Interactive => "interactive",
            Self::Critical => "critical",
            Self::Pinned => "pinned",
            Self::Cheap => "cheap",
        }
    }

    /// Goes ahead of all others and leaves at once.
    #[must_use]
    pub const fn is_urgent(self) -> bool {
        matches!(self, Self::Interactive | Self::Critical)
    }

    /// May not use every path, so that it must not make others wait for its own.
    #[must_use]
    pub const fn is_choosy(self) -> bool {
        !matches!(self, Self::Bulk)
    }

    /// Class that a DSCP asks for (RFC 4594, 8622); `None`: nothing in particular.
    #[must_use]
    pub const fn of_mark(dscp: u8) -> Option<Self> {
        match dscp {
            // CS7, CS6: what keeps networks running.
            56 | 48 => Some(Self::Critical),
            // EF, VOICE-ADMIT, CS5, AF43–AF41, CS4.
            46 | 44 | 40 | 38 | 36 | 34 | 32 => Some(Self::Interactive),
            // LE, CS1: background.
            1 | 8 => Some(Self::Cheap),
            _ => None,
        }
    }
}

/// One `[[class]]`. An empty list matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClassRule {
    /// Name for status.
    pub name: String,
    /// Class of the flows that match.
    pub class: Class,
    /// The flow's own DSCP chooses the class ([`Class::of_mark`]); one without a mark goes on to the next rule (row R13).
    pub by_mark: bool,
    /// Addresses of one end.
    pub from: Vec<IpNet>,
    /// Addresses of the other end.
    pub to: Vec<IpNet>,
    /// IP protocols.
    pub protocols: Vec<u8>,
    /// Ranges of ports, the first and the last, of the end that `to` names.
    pub ports: Vec<(u16, u16)>,
    /// DSCP values, 0–63.
    pub dscp: Vec<u8>,
    /// Servers that the client asks for, by TLS or QUIC.
    pub server_names: Vec<NamePattern>,
    /// WANs for [`Class::Pinned`], by id; `None`: the flow's first path decides.
    pub wans: Option<Vec<u16>>,
}

impl ClassRule {
    /// The class that this rule gives the flow, if it matches.
    fn class_of(&self, flow: &FlowKey, dscp: u8, name: Option<&ServerName>) -> Option<Class> {
        let is_named = self.server_names.is_empty()
            || name.is_some_and(|name| self.server_names.iter().any(|pattern| pattern.matches(name)));
        let is_marked = self.dscp.is_empty() || self.dscp.contains(&dscp);
        if !is_named || !is_marked || !self.is_between(flow) {
            return None;
        }
        if self.by_mark { Class::of_mark(dscp) } else { Some(self.class) }
    }

    /// Whether addresses, ports and protocol of the flow match.
    fn is_between(&self, flow: &FlowKey) -> bool {
        let ends = (flow.src, (flow.dst, flow.dst_port));
        let back = (flow.dst, (flow.src, flow.src_port));
        (self.protocols.is_empty() || self.protocols.contains(&flow.protocol))
            && (self.joins(ends) || self.joins(back))
    }

    fn joins(&self, (from, (to, port)): (IpAddr, (IpAddr, u16))) -> bool {
        let within = |nets: &[IpNet], ip: IpAddr| nets.is_empty() || nets.iter().any(|net| net.contains(&ip));
        let of_ports = |(first, last): &(u16, u16)| (*first..=*last).contains(&port);
        within(&self.from, from)
            && within(&self.to, to)
            && (self.ports.is_empty() || self.ports.iter().any(of_ports))
    }
}

/// The rules that concern one bond, in order: the first that matches decides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Classes {
    rules: Vec<ClassRule>,
    marks: bool,
    names: bool,
}

/// No rule: the class is the default.
pub const NO_RULE: u8 = u8::MAX;

impl Classes {
    /// Most rules of one bond.
    pub const RULES_MAX: usize = NO_RULE as usize;

    /// These rules, of which those beyond [`Self::RULES_MAX`] are ignored.
    #[must_use]
    pub fn new(mut rules: Vec<ClassRule>) -> Self {
        rules.truncate(Self::RULES_MAX);
        let marks = rules.iter().any(|rule| rule.by_mark || !rule.dscp.is_empty());
        let names = rules.iter().any(|rule| !rule.server_names.is_empty());
        Self { rules, marks, names }
    }

    /// Whether a flow's DSCP matters, so that one that changes it is looked at again.
    #[must_use]
    pub const fn look_at_marks(&self) -> bool {
        self.marks
    }

    /// Whether some rule asks for the server's name.
    #[must_use]
    pub const fn look_at_names(&self) -> bool {
        self.names
    }

    /// Whether the name of its server may matter for this flow.
    #[must_use]
    pub fn asks_for_name(&self, flow: &FlowKey) -> bool {
        self.names
            && matches!(flow.protocol, PROTOCOL_TCP | PROTOCOL_UDP)
            && self.rules.iter().any(|rule| !rule.server_names.is_empty() && rule.is_between(flow))
    }

    /// Class of a flow, and the number of the rule that gave it, or [`NO_RULE`]. `name`: the server that its client asks for, once
    /// that is known.
    #[must_use]
    pub fn decide(&self, flow: &FlowKey, dscp: u8, name: Option<&ServerName>) -> (Class, u8) {
        let mut matching = self.rules.iter().zip(0u8..);
        let found = matching.find_map(|(rule, number)| Some((rule.class_of(flow, dscp, name)?, number)));
        found.unwrap_or((Class::Bulk, NO_RULE))
    }

    /// The rule of this number.
    #[must_use]
    pub fn rule(&self, number: u8) -> Option<&ClassRule> {
        self.rules.get(usize::from(number))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn flow(text: &str) -> FlowKey {
        text.parse().unwrap()
    }

    fn nets(list: &[&str]) -> Vec<IpNet> {
        list.iter().map(|net| net.parse().unwrap()).collect()
    }

    #[test]
    fn the_first_rule_that_matches_decides_in_both_directions() {
        let classes = Classes::new(vec![
            ClassRule {
                class: Class::Critical,
                to: nets(&["10.2.0.0/16"]),
                protocols: vec![6],
                ports: vec![(443, 443), (5_000, 5_010)],
                ..ClassRule::default()
            },
            ClassRule { class: Class::Cheap, from: nets(&["10.1.0.0/24"]), ..ClassRule::default() },
        ]);
        let decided = |text: &str| classes.decide(&flow(text), 0, None);
        assert_eq!(decided("tcp 10.1.0.9:1000 > 10.2.0.1:443"), (Class::Critical, 0));
        assert_eq!(decided("tcp 10.2.0.1:5010 > 10.1.0.9:1000"), (Class::Critical, 0));
        // The port is of the end that `to` names.
        assert_eq!(decided("tcp 10.1.0.9:443 > 10.2.0.1:1000"), (Class::Cheap, 1));
        assert_eq!(decided("udp 10.1.0.9:1 > 10.2.0.1:443"), (Class::Cheap, 1));
        assert_eq!(decided("udp 10.3.0.9:1 > 10.2.0.1:443"), (Class::Bulk, NO_RULE));
    }

    #[test]
    fn marks_count_only_where_a_rule_lets_them() {
        let allowed = ClassRule { by_mark: true, from: nets(&["10.1.0.0/24"]), ..ClassRule::default() };
        let rest = ClassRule { class: Class::Pinned, dscp: vec![10], ..ClassRule::default() };
        let classes = Classes::new(vec![allowed, rest]);
        assert!(classes.look_at_marks());
        let decided = |text: &str, dscp| classes.decide(&flow(text), dscp, None).0;
        assert_eq!(decided("udp 10.1.0.9:1 > 10.2.0.1:2", 46), Class::Interactive);
        assert_eq!(decided("udp 10.2.0.1:2 > 10.1.0.9:1", 48), Class::Critical);
        assert_eq!(decided("udp 10.1.0.9:1 > 10.2.0.1:2", 8), Class::Cheap);
        assert_eq!(decided("udp 10.1.0.9:1 > 10.2.0.1:2", 0), Class::Bulk);
        assert_eq!(decided("udp 10.1.0.9:1 > 10.2.0.1:2", 10), Class::Pinned);
        assert_eq!(decided("udp 10.9.0.9:1 > 10.2.0.1:2", 46), Class::Bulk);
        assert!(!Classes::new(vec![ClassRule::default()]).look_at_marks());
    }

    #[test]
    fn a_servers_name_counts_once_it_is_known() {
        let patterns = ["*.zoom.us", "example.org"].map(|text| NamePattern::new(text).unwrap());
        let named = ClassRule {
            class: Class::Interactive,
            from: nets(&["10.1.0.0/24"]),
            server_names: patterns.to_vec(),
            ..ClassRule::default()
        };
        let rest = ClassRule { class: Class::Cheap, ..ClassRule::default() };
        let classes = Classes::new(vec![named, rest]);
        assert!(classes.look_at_names());
        let decided = |text: &str, name: &str| {
            classes.decide(&flow(text), 0, ServerName::new(name.as_bytes()).as_ref())
        };
        let (there, back) = ("tcp 10.1.0.9:1 > 10.2.0.1:443", "udp 10.2.0.1:443 > 10.1.0.9:1");
        for text in [there, back] {
            assert!(classes.asks_for_name(&flow(text)));
            assert_eq!(decided(text, ""), (Class::Cheap, 1), "not known yet");
            assert_eq!(decided(text, "us02web.zoom.us"), (Class::Interactive, 0));
            assert_eq!(decided(text, "Example.org"), (Class::Interactive, 0));
            assert_eq!(decided(text, "zoom.us"), (Class::Cheap, 1));
        }
        for text in ["tcp 10.3.0.9:1 > 10.2.0.1:443", "icmp 10.1.0.9 > 10.2.0.1 id 7"] {
            assert!(!classes.asks_for_name(&flow(text)), "{text}");
        }
    }
}
