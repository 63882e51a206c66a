//! Chains of the host's nftables that do not see packets from one `[[interface]]` to another, though they were written for them.
//!
//! And what `tc` does to what comes in. Such packets never come to the kernel's stack: neither its ingress, prerouting nor forward chains meet them. What is for the host
//! itself passes all of them as ever, and what leaves a device passes its egress chains.

use std::collections::BTreeSet;
use std::net::IpAddr;

use linux::netlink::RuleSpec;
use linux::netlink::nftables::{Act, BaseChain, Effect, Hook};

use super::{Obstacle, Surroundings, in_words, place};
use crate::config::Config;
use crate::host_facts::HostView;

/// Tables of our own begin so; see `linux::own_tables`, `linux::ingress_guard`.
const OWN_TABLES: [&str; 2] = ["anabranch_", "anabranch-"];

/// Tells of chains that keep packets from passing, or lead them elsewhere, only as far as the kernel gets them.
pub(super) fn by_the_firewall(
    config: &Config,
    interfaces: &BTreeSet<&str>,
    view: &HostView,
    around: &Surroundings,
    list: &mut Vec<Obstacle>,
) {
    let between = in_words(interfaces);
    let foreign = |chain: &&BaseChain| !OWN_TABLES.iter().any(|own| chain.table.starts_with(own));
    for chain in around.chains.iter().filter(foreign) {
        let at_ours =
            chain.devices.is_empty() || chain.devices.iter().any(|name| interfaces.contains(name.as_str()));
        let acts = || chain.acts.iter().filter(|act| concerns(act, interfaces));
        let refuses = chain.refuses || acts().any(|act| act.effect == Effect::Refuse);
        match chain.hook {
            Hook::Ingress | Hook::Prerouting | Hook::Forward if refuses && at_ours => {
                let what = match chain.hook {
                    Hook::Ingress => "what comes in, at ingress",
                    Hook::Forward => "what the kernel forwards",
                    Hook::Prerouting | Hook::Input => "what comes in, at prerouting",
                };
                list.push((
                    "rule",
                    format!(
                        "the host's firewall drops {what} ({}); it does not see what passes between {between}, about which \
                         [[rule]] and default-action decide",
                        place(chain)
                    ),
                ));
            }
            _ => {}
        }
        if acts().any(|act| act.effect == Effect::Redirect) {
            list.push((
                "interface",
                format!(
                    "the host's firewall leads what passes through to a program here ({}): only what is addressed to the host \
                     gets there; let clients ask an address of the host",
                    place(chain)
                ),
            ));
        }
        if chooses_by_mark(view) && acts().any(|act| act.effect == Effect::Mark) {
            list.push((
                "interface",
                format!(
                    "the host's firewall marks what passes through ({}) and `ip rule` has a fwmark: what passes between {between} has \
                     no mark and takes the routes without; choose by from, to, iif, ipproto, sport or dport of `ip rule`",
                    place(chain)
                ),
            ));
        }
        let behind = |act: &Act| match act.effect {
            Effect::Translate(to) => is_behind(to, config, interfaces, view).then_some(to),
            Effect::Refuse | Effect::Redirect | Effect::Mark => None,
        };
        if let Some(to) = acts().find_map(behind) {
            list.push((
                "forward",
                format!(
                    "the host's firewall leads connections to {to} ({}): behind an [[interface]] that is not reached so; make a \
                     [[forward]] of it",
                    place(chain)
                ),
            ));
        }
    }
}

/// Whether the kernel chooses routes by a mark of the firewall.
fn chooses_by_mark(view: &HostView) -> bool {
    let by_mark = |rule: &RuleSpec| !rule.invert && rule.mark.is_some_and(|(mark, mask)| mark & mask != 0);
    view.rules.iter().any(|rule| by_mark(&rule.spec))
}

/// Tells of devices where `tc` holds up or redirects what comes in.
pub(super) fn by_tc(
    interfaces: &BTreeSet<&str>,
    view: &HostView,
    around: &Surroundings,
    list: &mut Vec<Obstacle>,
) {
    let has_one = |index: u32| around.ingress_disciplines.contains(&index);
    let links = view.links.iter().filter(|link| has_one(link.index));
    let shaped: BTreeSet<&str> =
        links.map(|link| link.name.as_str()).filter(|name| interfaces.contains(name)).collect();
    if !shaped.is_empty() {
        list.push((
            "interface",
            format!(
                "tc has filters for what comes in by {} (qdisc ingress), as for shaping a download with ifb: they meet what is for \
                 the host alone; shape what passes through where it leaves, at the root of the other interface",
                in_words(&shaped)
            ),
        ));
    }
}

/// Whether an act is about packets of these interfaces, as far as it names any device.
fn concerns(act: &Act, interfaces: &BTreeSet<&str>) -> bool {
    let is_ours = |name: &String| match name.strip_suffix('*') {
        Some(begin) => interfaces.iter().any(|interface| interface.starts_with(begin)),
        None => interfaces.contains(name.as_str()),
    };
    act.devices.iter().all(is_ours)
}

/// Whether a host is in the network of one of these interfaces, which may not have its addresses yet.
fn is_behind(host: IpAddr, config: &Config, interfaces: &BTreeSet<&str>, view: &HostView) -> bool {
    let ours = |index: u32| {
        view.links.iter().any(|link| link.index == index && interfaces.contains(link.name.as_str()))
    };
    let there = view.addresses.iter().filter(|address| ours(address.index)).map(|address| &address.net);
    let wanted = config.services.interfaces.iter().flat_map(|interface| &interface.addresses);
    there.chain(wanted).any(|net| net.contains(&host) && net.addr() != host)
}
