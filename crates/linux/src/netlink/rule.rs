//! Policy routing rules: which table a packet is looked up in.

use ipnet::IpNet;
use netlink_packet_route::route::RouteProtocol;
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleHeader, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{Existing, Netlink, OUR_PROTOCOL, RouteKind};
use crate::Result;

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl From<Family> for AddressFamily {
    fn from(family: Family) -> AddressFamily {
        match family {
            Family::V4 => AddressFamily::Inet,
            Family::V6 => AddressFamily::Inet6,
        }
    }
}

/// A rule "packets that match all this are looked up in that table".
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RuleSpec {
    /// Rules of IPv4 and IPv6 are separate.
    pub family: Family,
    /// Rules are tried in ascending order; the kernel's own are 0, 32766 and 32767.
    pub priority: u32,
    /// Firewall mark and the mask of the bits that count.
    pub mark: Option<(u32, u32)>,
    /// Matches what the selectors do *not* match.
    pub invert: bool,
    /// Packets of sockets bound to this interface (SO_BINDTODEVICE).
    pub oif: Option<String>,
    /// Packets that came in here.
    pub iif: Option<String>,
    /// Source network.
    pub from: Option<IpNet>,
    /// Destination network.
    pub to: Option<IpNet>,
    /// Table to look in.
    pub table: u32,
    /// Ignores what the table says if the matching route's prefix is this short or shorter (0 = ignore
    /// default routes).
    pub suppress_prefix_length: Option<u32>,
    /// Who made it; [`OUR_PROTOCOL`] for those this program adds.
    pub protocol: u8,
}

impl RuleSpec {
    /// A rule of ours that matches every packet.
    pub fn new(family: Family, priority: u32, table: u32) -> RuleSpec {
        RuleSpec {
            family,
            priority,
            mark: None,
            invert: false,
            oif: None,
            iif: None,
            from: None,
            to: None,
            table,
            suppress_prefix_length: None,
            protocol: OUR_PROTOCOL,
        }
    }

    /// Whether this program (or an earlier instance of it) made the rule.
    pub fn is_ours(&self) -> bool {
        self.protocol == OUR_PROTOCOL
    }

    /// `None` for rules that do not look into a table.
    pub(super) fn from_message(message: &RuleMessage) -> Option<RuleSpec> {
        if message.header.action == RuleAction::ToTable { Self::of_any_action(message) } else { None }
    }

    fn of_any_action(message: &RuleMessage) -> Option<RuleSpec> {
        let family = match message.header.family {
            AddressFamily::Inet => Family::V4,
            AddressFamily::Inet6 => Family::V6,
            _ => return None,
        };
        let mut spec = RuleSpec::new(family, 0, u32::from(message.header.table));
        spec.invert = message.header.flags.contains(RuleFlags::Invert);
        spec.protocol = 0;
        let (mut mark, mut mask) = (None, u32::MAX);
        for attribute in &message.attributes {
            match attribute {
                RuleAttribute::Priority(priority) => spec.priority = *priority,
                RuleAttribute::Table(table) => spec.table = *table,
                RuleAttribute::FwMark(value) => mark = Some(*value),
                RuleAttribute::FwMask(value) => mask = *value,
                RuleAttribute::Oifname(name) => spec.oif = Some(name.clone()),
                RuleAttribute::Iifname(name) => spec.iif = Some(name.clone()),
                RuleAttribute::Source(ip) => spec.from = IpNet::new(*ip, message.header.src_len).ok(),
                RuleAttribute::Destination(ip) => spec.to = IpNet::new(*ip, message.header.dst_len).ok(),
                // The kernel says −1 for "do not suppress".
                RuleAttribute::SuppressPrefixLen(length) if *length != u32::MAX => {
                    spec.suppress_prefix_length = Some(*length);
                }
                RuleAttribute::Protocol(protocol) => spec.protocol = (*protocol).into(),
                _ => {}
            }
        }
        spec.mark = mark.map(|mark| (mark, mask));
        Some(spec)
    }

    fn to_message(&self) -> RuleMessage {
        let mut message = RuleMessage::default();
        message.header = RuleHeader {
            family: self.family.into(),
            src_len: self.from.map_or(0, |net| net.prefix_len()),
            dst_len: self.to.map_or(0, |net| net.prefix_len()),
            table: u8::try_from(self.table).unwrap_or(0),
            action: RuleAction::ToTable,
            flags: if self.invert { RuleFlags::Invert } else { RuleFlags::empty() },
            ..RuleHeader::default()
        };
        let attributes = &mut message.attributes;
        attributes.push(RuleAttribute::Priority(self.priority));
        attributes.push(RuleAttribute::Table(self.table));
        attributes.push(RuleAttribute::Protocol(RouteProtocol::from(self.protocol)));
        if let Some((mark, mask)) = self.mark {
            attributes.push(RuleAttribute::FwMark(mark));
            attributes.push(RuleAttribute::FwMask(mask));
        }
        attributes.extend(self.oif.clone().map(RuleAttribute::Oifname));
        attributes.extend(self.iif.clone().map(RuleAttribute::Iifname));
        attributes.extend(self.from.map(|net| RuleAttribute::Source(net.trunc().addr())));
        attributes.extend(self.to.map(|net| RuleAttribute::Destination(net.trunc().addr())));
        attributes.extend(self.suppress_prefix_length.map(RuleAttribute::SuppressPrefixLen));
        message
    }
}

/// Action of a [`PolicyRule`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PolicyAction {
    /// Looks into a table; a packet that finds no route there goes on with the next rule.
    Table(u32),
    /// Looks into the table of the VRF that the packet came in by.
    Vrf,
    /// Goes on with the first rule of this priority or a higher number.
    Goto(u32),
    /// Goes on with the next rule.
    Nop,
    /// Decides the packet as a route of this kind does.
    Refuse(RouteKind),
}

/// A rule of any kind, as far as it can match packets that are passed on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PolicyRule {
    /// Its selectors and table, as for rules that look into a table.
    pub spec: RuleSpec,
    /// Action.
    pub action: PolicyAction,
    /// IP protocol; `None`: any.
    pub protocol: Option<u8>,
    /// Source ports, inclusive.
    pub src_ports: Option<(u16, u16)>,
    /// Destination ports, inclusive.
    pub dst_ports: Option<(u16, u16)>,
    /// It asks for what is not known of a packet that is passed on: a type of service, a tunnel, a user.
    pub special: bool,
}

impl PolicyRule {
    pub(super) fn from_message(message: &RuleMessage) -> Option<PolicyRule> {
        let spec = RuleSpec::of_any_action(message)?;
        let (mut action, mut special) = (None, message.header.tos != 0);
        let (mut protocol, mut src_ports, mut dst_ports) = (None, None, None);
        for attribute in &message.attributes {
            match attribute {
                RuleAttribute::L3MDev(true) => action = Some(PolicyAction::Vrf),
                RuleAttribute::Goto(priority) => action = Some(PolicyAction::Goto(*priority)),
                RuleAttribute::IpProtocol(number) => protocol = u8::try_from(i32::from(*number)).ok(),
                RuleAttribute::SourcePortRange(range) => src_ports = Some((range.start, range.end)),
                RuleAttribute::DestinationPortRange(range) => dst_ports = Some((range.start, range.end)),
                // What is passed on counts as the superuser's.
                RuleAttribute::UidRange(range) => special |= range.start > 0,
                RuleAttribute::TunId(id) => special |= *id != 0,
                _ => {}
            }
        }
        let action = match message.header.action {
            RuleAction::ToTable => action.unwrap_or(PolicyAction::Table(spec.table)),
            RuleAction::Goto => action?,
            RuleAction::Nop => PolicyAction::Nop,
            RuleAction::Blackhole => PolicyAction::Refuse(RouteKind::Blackhole),
            RuleAction::Unreachable => PolicyAction::Refuse(RouteKind::Unreachable),
            RuleAction::Prohibit => PolicyAction::Refuse(RouteKind::Prohibit),
            _ => return None,
        };
        Some(PolicyRule { spec, action, protocol, src_ports, dst_ports, special })
    }
}

impl Netlink {
    /// All rules of both families, whatever they do, in the order they are tried.
    pub fn policy_rules(&self) -> Result<Vec<PolicyRule>> {
        let mut all = Vec::new();
        for family in [Family::V4, Family::V6] {
            let mut request = RuleMessage::default();
            request.header.family = family.into();
            let request = RouteNetlinkMessage::GetRule(request);
            all.extend(self.dump(&request, "list the rules", |message| match message {
                RouteNetlinkMessage::NewRule(message) => PolicyRule::from_message(&message),
                _ => None,
            })?);
        }
        Ok(all)
    }

    /// All rules that look into a table, of one family or of both, in the order they are tried.
    pub fn rules(&self, only: Option<Family>) -> Result<Vec<RuleSpec>> {
        let mut all = Vec::new();
        for family in [Family::V4, Family::V6] {
            if only.is_some_and(|only| only != family) {
                continue;
            }
            let mut request = RuleMessage::default();
            request.header.family = family.into();
            let request = RouteNetlinkMessage::GetRule(request);
            all.extend(self.dump(&request, "list the rules", |message| match message {
                RouteNetlinkMessage::NewRule(message) => RuleSpec::from_message(&message),
                _ => None,
            })?);
        }
        Ok(all)
    }

    /// Adds a rule. `AlreadyExists` if the very same rule is there.
    pub fn add_rule(&self, spec: &RuleSpec) -> Result<()> {
        self.change(RouteNetlinkMessage::NewRule(spec.to_message()), Existing::Refuse, || {
            format!("add the rule {} for table {}", spec.priority, spec.table)
        })
    }

    /// Deletes a rule.
    pub fn del_rule(&self, spec: &RuleSpec) -> Result<()> {
        self.change(RouteNetlinkMessage::DelRule(spec.to_message()), Existing::Needed, || {
            format!("delete the rule {} for table {}", spec.priority, spec.table)
        })
    }
}
