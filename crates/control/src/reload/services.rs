//! Changes of a new configuration in everything that is not the tunnel.
//!
//! All of it is applied at once, without losing a flow. Live flows carry the numbers of interfaces and tenants, which
//! are their places in the configuration: so known ones keep their places and new ones go to the end, and an interface
//! that is gone from the file stays until the next start.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

use super::ReloadReport;
use crate::config::services::values::{listen_text, protocol_text};
use crate::config::services::{Forward, Interface, ListenHost, Nat, Route, Services};

/// Puts `new` into the order of `old`, and tells what changes.
pub(super) fn merge(old: &Services, new: &mut Services, report: &mut ReloadReport) {
    keep_interfaces(old, new, &mut report.needs_restart);
    keep_tenants(old, new);
    let applied = &mut report.applied;
    let name = |interface: &Interface| interface.name.clone();
    compare("interface", &old.interfaces, &new.interfaces, name, applied);
    compare("tenant", &old.tenants, &new.tenants, Clone::clone, applied);
    compare("route", &old.routes, &new.routes, |route: &Route| route.to.to_string(), applied);
    compare("group", &old.groups, &new.groups, |group| group.name.clone(), applied);
    compare("rule", &old.rules, &new.rules, |rule| rule.name.clone(), applied);
    compare("nat", &old.nats, &new.nats, |nat: &Nat| nat.out.clone(), applied);
    compare("forward", &old.forwards, &new.forwards, listen, applied);
    compare("virtual-server", &old.servers, &new.servers, |server| server.name.clone(), applied);
    compare("lease", &old.leases, &new.leases, |lease| lease.name.clone(), applied);
    if moved(&old.rules, &new.rules, |rule| &rule.name) {
        applied.push("rules: another order".to_owned());
    }
    let settings = [&old.settings, &new.settings].map(|settings| format!("{settings:?}"));
    if settings[0] != settings[1] {
        applied.push("gateway: changed".to_owned());
    }
}

fn keep_interfaces(old: &Services, new: &mut Services, needs_restart: &mut Vec<String>) {
    let mut given = std::mem::take(&mut new.interfaces);
    for earlier in &old.interfaces {
        match given.iter().position(|interface| interface.name == earlier.name) {
            Some(place) => new.interfaces.push(given.remove(place)),
            None => {
                needs_restart.push(format!("interface {}: removed", earlier.name));
                let mut kept = earlier.clone();
                // Its addresses may be wanted elsewhere, its device as well.
                kept.addresses.retain(|net| !given.iter().any(|other| other.addresses.contains(net)));
                new.interfaces.push(kept);
            }
        }
    }
    new.interfaces.append(&mut given);
}

/// A tenant that is gone keeps its number: nothing of it is left but flows that end.
fn keep_tenants(old: &Services, new: &mut Services) {
    let given = std::mem::replace(&mut new.tenants, old.tenants.clone());
    for tenant in given {
        if !new.tenants.contains(&tenant) {
            new.tenants.push(tenant);
        }
    }
}

fn listen(forward: &Forward) -> String {
    let protocols: Vec<String> = forward.protocols.iter().map(|protocol| protocol_text(*protocol)).collect();
    let more = if forward.ports > 1 { format!("-{}", forward.last_port()) } else { String::new() };
    let first = match (&forward.host, forward.protocols.as_slice()) {
        (ListenHost::Address(address), [protocol]) => listen_text(*protocol, (*address, forward.port).into()),
        (ListenHost::Address(address), _) => format!("{} {address}:{}", protocols.join("+"), forward.port),
        (ListenHost::Interface(name), _) => format!("{} {name}:{}", protocols.join("+"), forward.port),
    };
    first + &more
}

/// Entries are the same when the name is, and they are the same one of several with that name.
fn compare<T: PartialEq + Debug>(
    what: &str,
    old: &[T],
    new: &[T],
    name: impl Fn(&T) -> String,
    applied: &mut Vec<String>,
) {
    let numbered = |list: &[T]| {
        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
        let key = |entry: &T| {
            let name = name(entry);
            let number = seen.entry(name.clone()).or_default();
            *number += 1;
            (name, *number)
        };
        list.iter().map(key).collect::<Vec<_>>()
    };
    let (old_keys, new_keys) = (numbered(old), numbered(new));
    let before: BTreeMap<_, _> = old_keys.iter().zip(old).collect();
    for (key, entry) in new_keys.iter().zip(new) {
        match before.get(key) {
            None => applied.push(format!("{what} {}: added", key.0)),
            Some(earlier) if *earlier != entry => applied.push(format!("{what} {}: changed", key.0)),
            Some(_) => {}
        }
    }
    let after: BTreeSet<_> = new_keys.iter().collect();
    let gone = old_keys.iter().filter(|key| !after.contains(key));
    applied.extend(gone.map(|key| format!("{what} {}: removed", key.0)));
}

/// Whether what both have stands in another order.
fn moved<'a, T>(old: &'a [T], new: &'a [T], name: impl Fn(&'a T) -> &'a String) -> bool {
    let names = |list: &'a [T]| list.iter().map(&name).collect::<Vec<_>>();
    let (old, new) = (names(old), names(new));
    let common = |list: &[&'a String], other: &[&'a String]| {
        let other: BTreeSet<_> = other.iter().collect();
        list.iter().filter(|name| other.contains(name)).copied().collect::<Vec<_>>()
    };
    common(&old, &new) != common(&new, &old)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use crate::config::tests::config;
    use crate::reload::merge;

    const BASE: &str = "[[interface]]\nname = \"lan\"\naddress = \"10.0.0.1/24\"\n[[interface]]\nname = \"wan\"\n[[nat]]\n\
                        out = \"wan\"\n[[rule]]\nname = \"a\"\naction = \"drop\"\nport = 1\n[[rule]]\nname = \"b\"\n\
                        action = \"drop\"\nport = 2\n";

    #[test]
    fn numbers_stay_and_changes_are_told() {
        let old = config("", BASE);
        assert_eq!(merge(&old, &old).1.applied, Vec::<String>::new());
        let new = config(
            "",
            "[[interface]]\nname = \"dmz\"\n[[interface]]\nname = \"wan\"\nmtu = 1400\n[[tenant]]\nname = \"red\"\n\
             [[nat]]\nout = \"wan\"\n[[nat]]\nout = \"dmz\"\n[[rule]]\nname = \"b\"\naction = \"drop\"\nport = 2\n\
             [[rule]]\nname = \"a\"\naction = \"reject\"\nport = 1\n[gateway]\ncore-rebalance = false\n",
        );
        let (merged, report) = merge(&old, &new);
        let names: Vec<&str> = merged.services.interfaces.iter().map(|i| i.name.as_str()).collect();
        assert_eq!(names, ["lan", "wan", "dmz"]);
        assert_eq!(report.needs_restart, ["interface lan: removed"]);
        assert_eq!(
            report.applied,
            [
                "interface wan: changed",
                "interface dmz: added",
                "tenant red: added",
                "rule a: changed",
                "nat dmz: added",
                "rules: another order",
                "gateway: changed",
            ]
        );
        let back = merge(&merged, &old).0;
        assert_eq!(back.services.tenants, ["red"]);
    }

    #[test]
    fn a_key_made_for_the_run_is_no_change_and_peers_wait_for_a_real_one() {
        let load = |text: &str| crate::config::tests::load(text).config.unwrap();
        let (old, same) = (load(BASE), load(BASE));
        let (merged, report) = merge(&old, &same);
        assert_eq!((report.applied.len(), report.needs_restart.len()), (0, 0));
        assert_eq!(merged, old);
        let new = load(&format!(
            "[node]\nname = \"router\"\nprivate-key-file = \"node.key\"\n{BASE}[[peer]]\nname = \"hub\"\n\
             public-key = \"$HUB\"\nendpoints = \"192.0.2.9:4600\"\nallowed-ips = \"10.8.0.1\"\n"
        ));
        let (merged, report) = merge(&old, &new);
        assert!(merged.peers.is_empty() && merged.node.key_was_made);
        assert_eq!(report.needs_restart, ["node.private-key: the first one; peers wait for it"]);
    }
}
