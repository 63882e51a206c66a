//! Why a rule decides, in words.

use std::fmt::Write;
use std::net::IpAddr;

use packet::attachment::Egress;

use super::{Asked, Group, Question, RuleSet, name_of, takes_any};
use crate::spec::{RuleAction, SideSpec};

/// Rules before the deciding one whose misfit is told.
const MISSED_MAX: usize = 5;

impl RuleSet {
    /// Which rule decides and why, which groups the addresses are in, and what kept the last rules before it from
    /// matching. Lines of text; interfaces are numbers, since a rule set does not know their names.
    #[must_use]
    pub fn explain(&self, question: &Question<'_>) -> String {
        let verdict = self.verdict(question);
        let mut text = String::new();
        let key = question.key;
        let (incoming, outgoing) = (name_of_egress(question.ingress.into()), name_of_egress(question.egress));
        // Writing to a String does not fail.
        let addressed = if question.to_gateway && question.egress != Egress::Host {
            ", addressed to the gateway"
        } else {
            ""
        };
        let _ = writeln!(
            text,
            "{key}, tenant {}, in by {incoming}, out by {outgoing}{addressed}",
            question.tenant
        );
        let rule = verdict.rule.and_then(|number| Some((number, self.rules().get(usize::from(number))?)));
        let before = match rule {
            Some((number, rule)) => {
                let _ = writeln!(text, "{}: {}", action_name(verdict.action), name_of(number.into(), rule));
                let _ = writeln!(text, "  source {}", self.why(key.src, &rule.from));
                let _ = writeln!(text, "  destination {}", self.why(key.dst, &rule.to));
                usize::from(number)
            }
            None => {
                let _ =
                    writeln!(text, "{}: no rule matches, the default action", action_name(verdict.action));
                self.rules().len()
            }
        };
        let _ = writeln!(text, "groups of {}: {}", key.src, self.groups_of(key.src));
        let _ = writeln!(text, "groups of {}: {}", key.dst, self.groups_of(key.dst));
        self.missed(question, before, &mut text);
        text
    }

    /// The last rules before number `end`, none of which matches, and the first condition of each that is not met.
    fn missed(&self, question: &Question<'_>, end: usize, text: &mut String) {
        let asked = Asked::of(question);
        for (number, rule) in self.rules().iter().enumerate().take(end).skip(end.saturating_sub(MISSED_MAX)) {
            let condition = if self.place_in(question.key.src, &rule.from).is_none() {
                "source"
            } else if self.place_in(question.key.dst, &rule.to).is_none() {
                "destination"
            } else {
                asked.misfit(rule).unwrap_or("nothing")
            };
            let _ = writeln!(text, "not {}: {condition} differs", name_of(number, rule));
        }
        if end > MISSED_MAX {
            let _ = writeln!(text, "nor the {} rules before", end - MISSED_MAX);
        }
    }

    fn why(&self, address: IpAddr, side: &SideSpec) -> String {
        let place = self.place_in(address, side).unwrap_or_default();
        format!("{address} is in {place}")
    }

    /// Where in a side an address is found.
    fn place_in(&self, address: IpAddr, side: &SideSpec) -> Option<String> {
        if takes_any(side) {
            return Some("any".to_owned());
        }
        let prefixes = side.prefixes.iter().filter(|prefix| prefix.contains(&address));
        if let Some(prefix) = prefixes.max_by_key(|prefix| prefix.prefix_len()) {
            return Some(prefix.to_string());
        }
        side.groups.iter().find_map(|&place| {
            let prefix = self.addresses.prefix_of(address, place.into())?;
            let group = self.groups.by_place(place.into())?;
            Some(format!("group {} ({prefix})", group.name()))
        })
    }

    fn groups_of(&self, address: IpAddr) -> String {
        // Groups are the sets with the lowest numbers.
        let sets = self.addresses.sets_of(address).iter();
        let groups = sets.filter_map(|&set| self.groups.by_place(set as usize));
        let names: Vec<&str> = groups.map(Group::name).collect();
        if names.is_empty() { "none".to_owned() } else { names.join(", ") }
    }
}

fn action_name(action: RuleAction) -> &'static str {
    match action {
        RuleAction::Allow => "allowed",
        RuleAction::Drop => "dropped",
        RuleAction::Reject => "rejected",
    }
}

fn name_of_egress(egress: Egress) -> String {
    match egress {
        Egress::Interface(id) => format!("interface {id}"),
        Egress::Host => "the gateway itself".to_owned(),
        Egress::Kernel => "another device of the host".to_owned(),
        Egress::Bond(id) => format!("bond {id}"),
        Egress::Core(id) => format!("core {id}"),
        Egress::Unit(id) => format!("unit {id}"),
    }
}
