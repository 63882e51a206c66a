//! Firewall rules and dynamic address groups (rows R4, R5, R11).
//!
//! The first rule that matches a new flow's first packet decides; replies pass by the flow table. A [`RuleSet`] is
//! immutable: a change makes the next one ([`RuleSet::recompile`]), and flows of the older era are asked again.
//!
//! What matches:
//!
//! * A side's prefixes and groups are alternatives; a side that names neither takes any address. A side that names
//!   only groups without members takes none.
//! * A prefix of one family never matches a packet of the other.
//! * Protocol 1 (`icmp`) also matches ICMPv6 in IPv6 packets: who writes "icmp" means ping. Protocol 58 (`icmpv6`)
//!   matches ICMPv6 only. ICMP errors about a flow belong to that flow and never come here.
//! * Destinations are as the sender wrote them, before any translation; so is "to the gateway" ([`Attachment::Gateway`] in a
//!   rule's `to`): it matches whatever is addressed to the gateway, be it for its own stack or for a
//!   virtual server, a port forward or a mapping that leads on. The interface behind matches too, so "from the WAN to
//!   the LAN" covers what a port forward lets in. The first rule that matches in either way decides.
//! * A rule with ports matches only protocols that have ports (TCP, UDP, UDP-Lite, SCTP); the identifier of ICMP,
//!   which stands in the same place of a [`FlowKey`], is none.
//!
//! How it is found: each condition of a rule is a dimension. For what a packet has in one dimension, the set of rules
//! that it satisfies is ready; the sets are ANDed, the lowest bit is the answer. Source and destination are looked
//! up once each in one trie for all rules and groups.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use ipnet::IpNet;
use packet::attachment::{BondId, Egress, Ingress};
use packet::flow::FlowKey;
use packet::icmp::is_icmp;
use packet::ip::{PROTOCOL_ICMPV6, PROTOCOL_SCTP, PROTOCOL_TCP, PROTOCOL_UDP, PROTOCOL_UDP_LITE};

use crate::spec::{Attachment, GroupSpec, RuleAction, RuleSpec, SideSpec};

mod addresses;
mod bits;
mod dimension;
mod explain;
mod groups;
mod hits;
#[cfg(test)]
mod tests;

pub use groups::{Group, Groups};
pub(crate) use hits::{carry_hits, places_before};

use addresses::{Addresses, SetId, Sides};
use bits::{Dense, first_common};
use dimension::Dimension;

/// Most rules: their numbers are 16 bits, and 0xffff is left free for "no rule".
pub const RULES_MAX: usize = 0xffff;

/// Question about a new flow.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// The flow's key in the direction of its first packet, before any translation.
    pub key: &'a FlowKey,
    /// Tenant of what came in there.
    pub tenant: u16,
    /// By what it came in.
    pub ingress: Ingress,
    /// Where it leaves, after translation of its destination.
    pub egress: Egress,
    /// Whether its destination, before any translation, is the gateway: an own or outside address, or where a virtual
    /// server or forward listens. Rules to [`Attachment::Gateway`] match then, whatever `egress` is.
    pub to_gateway: bool,
}

/// Verdict on the flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Action for the flow.
    pub action: RuleAction,
    /// Place of the rule in the operator's list; `None`: no rule matched, the default action applies.
    pub rule: Option<u16>,
}

/// The compiled rules and groups.
#[derive(Clone)]
pub struct RuleSet {
    fixed: Arc<Fixed>,
    groups: Groups,
    addresses: Addresses,
}

/// Parts of the rule set that a change of groups leaves as they are.
struct Fixed {
    rules: Vec<RuleSpec>,
    default: RuleAction,
    sides: Sides,
    protocol: Dimension,
    dst_port: Dimension,
    src_port: Dimension,
    tenant: Dimension,
    ingress: Dimension,
    egress: Dimension,
}

impl fmt::Debug for RuleSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RuleSet")
            .field("rules", &self.fixed.rules.len())
            .field("groups", &self.groups.iter().len())
            .field("prefixes", &self.addresses.len())
            .field("classes", &self.addresses.classes())
            .finish_non_exhaustive()
    }
}

impl Default for RuleSet {
    /// No rules: everything passes.
    fn default() -> Self {
        let nothing = Dimension::compile(&[]);
        let fixed = Fixed {
            rules: Vec::new(),
            default: RuleAction::Allow,
            sides: Sides::default(),
            protocol: nothing.clone(),
            dst_port: nothing.clone(),
            src_port: nothing.clone(),
            tenant: nothing.clone(),
            ingress: nothing.clone(),
            egress: nothing,
        };
        Self { fixed: Arc::new(fixed), groups: Groups::default(), addresses: Addresses::default() }
    }
}

impl RuleSet {
    /// Compiles the operator's rules and groups.
    ///
    /// # Errors
    /// A sentence for the operator when there are too many rules, a rule names a group that is not there, a port range
    /// is the wrong way round, or two groups have one name.
    pub fn compile(rules: &[RuleSpec], groups: &[GroupSpec], default: RuleAction) -> Result<Self, String> {
        if rules.len() > RULES_MAX {
            return Err(format!("{} rules: at most {RULES_MAX} are possible", rules.len()));
        }
        for (number, rule) in rules.iter().enumerate() {
            check(number, rule, groups.len())?;
        }
        let groups = Groups::new(groups)?;
        let mut members: Vec<(IpNet, SetId)> = Vec::new();
        for (set, group) in (0..).zip(groups.iter()) {
            members.extend(group.members().map(|member| (member, set)));
        }
        let sides = compile_sides(rules, groups.iter().len(), &mut members);
        let addresses = Addresses::compile(members, &sides);
        let exact = |value: &u16| (*value, *value);
        let dimension = |ranges: &dyn Fn(&RuleSpec) -> Vec<(u16, u16)>| {
            Dimension::compile(&rules.iter().map(ranges).collect::<Vec<_>>())
        };
        let fixed = Fixed {
            default,
            sides,
            protocol: dimension(&|rule| {
                rule.protocols
                    .iter()
                    .flat_map(|&number| protocol_values(number))
                    .map(|value| (value, value))
                    .collect()
            }),
            dst_port: dimension(&|rule| rule.dst_ports.clone()),
            src_port: dimension(&|rule| rule.src_ports.clone()),
            tenant: dimension(&|rule| rule.tenants.iter().map(exact).collect()),
            ingress: dimension(&|rule| rule.from.attachments.iter().map(attachment_values).collect()),
            egress: dimension(&|rule| rule.to.attachments.iter().map(attachment_values).collect()),
            rules: rules.to_vec(),
        };
        Ok(Self { fixed: Arc::new(fixed), groups, addresses })
    }

    /// The first rule that matches, or the default action.
    #[must_use]
    pub fn verdict(&self, question: &Question<'_>) -> Verdict {
        if self.is_empty() {
            return Verdict { action: self.fixed.default, rule: None };
        }
        let mut rule = self.first_match(question);
        if question.to_gateway && question.egress != Egress::Host && self.fixed.egress.matters() {
            let by_address = self.first_match(&Question { egress: Egress::Host, ..*question });
            rule = [rule, by_address].into_iter().flatten().min();
        }
        let action = rule.and_then(|number| self.fixed.rules.get(usize::from(number)));
        Verdict { action: action.map_or(self.fixed.default, |rule| rule.action), rule }
    }

    /// The first rule that matches with the question's own `egress`.
    fn first_match(&self, question: &Question<'_>) -> Option<u16> {
        let fixed = &*self.fixed;
        let asked = Asked::of(question);
        let [source, destination] = self.addresses.pairs(question.key.src, question.key.dst, &fixed.sides);
        let mut pairs = [source, destination, source, source, source, source, source, source];
        let mut used = 2;
        let numbers = [
            (&fixed.dst_port, asked.dst_port),
            (&fixed.protocol, Some(asked.protocol)),
            (&fixed.tenant, Some(question.tenant)),
            (&fixed.src_port, asked.src_port),
            (&fixed.ingress, Some(question.ingress.compact())),
            (&fixed.egress, asked.egress),
        ];
        for (dimension, value) in numbers {
            if let Some(slot) = pairs.get_mut(used).filter(|_| dimension.matters()) {
                *slot = dimension.at(value);
                used += 1;
            }
        }
        let pairs = pairs.get(..used).unwrap_or(&[]);
        first_common(pairs, fixed.rules.len(), |number| {
            fixed.rules.get(usize::from(number)).is_some_and(|rule| asked.misfit(rule).is_none())
        })
    }

    /// Whether there is no rule: the default action decides.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.fixed.rules.is_empty()
    }

    /// The rules, in the operator's order.
    #[must_use]
    pub fn rules(&self) -> &[RuleSpec] {
        &self.fixed.rules
    }

    /// The groups as they are now.
    #[must_use]
    pub fn groups(&self) -> &Groups {
        &self.groups
    }

    /// Action for a flow that no rule matches.
    #[must_use]
    pub fn default_action(&self) -> RuleAction {
        self.fixed.default
    }

    /// The rule set of the next configuration. Where that has the same rules and groups, and only members of groups are
    /// others, nothing is compiled but the prefixes that these touch (row R5).
    ///
    /// # Errors
    /// As [`RuleSet::compile`].
    pub fn recompile(
        &self,
        rules: &[RuleSpec],
        groups: &[GroupSpec],
        default: RuleAction,
    ) -> Result<Self, String> {
        let names = groups.iter().map(|group| group.name.as_str());
        if rules != self.rules() || default != self.fixed.default || !names.eq(self.groups.names()) {
            return Self::compile(rules, groups, default);
        }
        let mut next = self.clone();
        for (place, group) in groups.iter().enumerate() {
            let (added, removed) = next.groups.replace(place, &group.members);
            next.addresses.change(place as SetId, &added, &removed, &self.fixed.sides);
        }
        Ok(next)
    }
}

/// A question's numbers, as the dimensions know them.
struct Asked<'a> {
    question: &'a Question<'a>,
    /// [`protocol_value`].
    protocol: u16,
    /// [`egress_value`].
    egress: Option<u16>,
    /// `None` for protocols without ports.
    dst_port: Option<u16>,
    /// `None` for protocols without ports.
    src_port: Option<u16>,
}

impl<'a> Asked<'a> {
    fn of(question: &'a Question<'a>) -> Self {
        let key = question.key;
        let ports = has_ports(key.protocol);
        Self {
            question,
            protocol: protocol_value(key.protocol, key.src.is_ipv6()),
            egress: egress_value(question.egress),
            dst_port: ports.then_some(key.dst_port),
            src_port: ports.then_some(key.src_port),
        }
    }

    /// The first condition of a rule, apart from addresses, that is not met.
    fn misfit(&self, rule: &RuleSpec) -> Option<&'static str> {
        let question = self.question;
        let in_ranges = |ranges: &[(u16, u16)], port: Option<u16>| {
            let within = |port| ranges.iter().any(|&(first, last)| (first..=last).contains(&port));
            ranges.is_empty() || port.is_some_and(within)
        };
        let protocols = &rule.protocols;
        let conditions = [
            (rule.tenants.is_empty() || rule.tenants.contains(&question.tenant), "tenant"),
            (attached(&rule.from, Some(question.ingress.compact())), "incoming interface"),
            (
                attached(&rule.to, self.egress)
                    || question.to_gateway && rule.to.attachments.contains(&Attachment::Gateway),
                "outgoing interface",
            ),
            (
                protocols.is_empty()
                    || protocols.iter().any(|&number| protocol_values(number).contains(&self.protocol)),
                "protocol",
            ),
            (in_ranges(&rule.dst_ports, self.dst_port), "destination port"),
            (in_ranges(&rule.src_ports, self.src_port), "source port"),
        ];
        conditions.into_iter().find(|(met, _)| !met).map(|(_, name)| name)
    }
}

/// Whether a side takes a packet of this attachment, as [`Ingress::compact`] counts them.
fn attached(side: &SideSpec, value: Option<u16>) -> bool {
    let takes = |value: u16| {
        let mut ranges = side.attachments.iter().map(attachment_values);
        ranges.any(|(first, last)| (first..=last).contains(&value))
    };
    side.attachments.is_empty() || value.is_some_and(takes)
}

/// The values of [`Ingress::compact`] that an attachment stands for, inclusive.
fn attachment_values(attachment: &Attachment) -> (u16, u16) {
    let bond = |number: u16| Ingress::Bond(BondId(number)).compact();
    let exact = |ingress: Ingress| (ingress.compact(), ingress.compact());
    match *attachment {
        Attachment::Interface(id) => exact(Ingress::Interface(id)),
        Attachment::Gateway => exact(Ingress::Host),
        Attachment::Bond(id) => exact(Ingress::Bond(id)),
        Attachment::AnyBond => (bond(0), bond(BondId::MAX)),
    }
}

/// Where a packet leaves, by the same numbers. `None`: by nothing that a rule can name.
fn egress_value(egress: Egress) -> Option<u16> {
    let same = match egress {
        Egress::Interface(id) => Ingress::Interface(id),
        Egress::Host => Ingress::Host,
        Egress::Bond(id) => Ingress::Bond(id),
        Egress::Kernel | Egress::Core(_) | Egress::Unit(_) => return None,
    };
    Some(same.compact())
}

/// Protocols whose first four bytes are ports.
fn has_ports(protocol: u8) -> bool {
    matches!(protocol, PROTOCOL_TCP | PROTOCOL_UDP | PROTOCOL_SCTP | PROTOCOL_UDP_LITE)
}

/// ICMPv6 within IPv6 has a value of its own, so that `icmp` can mean it too.
const ICMPV6_IN_IPV6: u16 = 0x100 | PROTOCOL_ICMPV6 as u16;

/// A packet's protocol as a value of its dimension.
fn protocol_value(protocol: u8, ipv6: bool) -> u16 {
    if ipv6 && protocol == PROTOCOL_ICMPV6 { ICMPV6_IN_IPV6 } else { u16::from(protocol) }
}

/// The values that a rule's protocol matches; two of them may be the same.
fn protocol_values(protocol: u8) -> [u16; 2] {
    [u16::from(protocol), if is_icmp(protocol) { ICMPV6_IN_IPV6 } else { u16::from(protocol) }]
}

/// Refuses what cannot be meant.
fn check(number: usize, rule: &RuleSpec, groups: usize) -> Result<(), String> {
    let name = name_of(number, rule);
    if let Some(&(first, last)) =
        rule.dst_ports.iter().chain(&rule.src_ports).find(|(first, last)| first > last)
    {
        return Err(format!("{name}: ports {first}-{last}: the first must not be above the last"));
    }
    match rule.from.groups.iter().chain(&rule.to.groups).find(|&&group| usize::from(group) >= groups) {
        Some(group) => Err(format!("{name}: group number {group} of {groups}: there is no such group")),
        None => Ok(()),
    }
}

/// Name of a rule.
fn name_of(number: usize, rule: &RuleSpec) -> String {
    if rule.name.is_empty() { format!("rule {number}") } else { format!("rule {number} \"{}\"", rule.name) }
}

/// Whether a side takes every address.
fn takes_any(side: &SideSpec) -> bool {
    side.prefixes.is_empty() && side.groups.is_empty()
}

/// Gives every list of prefixes a set, equal lists the same, and notes for each set which rules name it.
fn compile_sides(rules: &[RuleSpec], groups: usize, members: &mut Vec<(IpNet, SetId)>) -> Sides {
    let mut sources = vec![Vec::new(); groups];
    let mut destinations = vec![Vec::new(); groups];
    let mut lists: BTreeMap<Vec<IpNet>, usize> = BTreeMap::new();
    let mut any_source = Dense::new(rules.len());
    let mut any_destination = Dense::new(rules.len());
    for (number, rule) in (0u16..).zip(rules) {
        for (side, source) in [(&rule.from, true), (&rule.to, false)] {
            if takes_any(side) {
                if source { any_source.insert(number) } else { any_destination.insert(number) }
            }
            let mut sets: Vec<usize> = side.groups.iter().map(|&group| usize::from(group)).collect();
            if !side.prefixes.is_empty() {
                let mut list: Vec<IpNet> = side.prefixes.iter().map(IpNet::trunc).collect();
                list.sort_unstable();
                list.dedup();
                let new = groups + lists.len();
                let set = *lists.entry(list).or_insert_with_key(|list| {
                    members.extend(list.iter().map(|&prefix| (prefix, new as SetId)));
                    new
                });
                sets.push(set);
            }
            let named = if source { &mut sources } else { &mut destinations };
            for set in sets {
                if named.len() <= set {
                    named.resize(set + 1, Vec::new());
                }
                if let Some(rules) = named.get_mut(set) {
                    rules.push(number);
                }
            }
        }
    }
    Sides {
        sources,
        destinations,
        any_source: any_source.compress(),
        any_destination: any_destination.compress(),
        rules: rules.len(),
    }
}
