//! Changes of a new configuration in everything that is not the tunnel.
//!
//! All of it is applied at once, without losing a flow. Live flows carry the numbers of interfaces and tenants, which
//! are their places in the configuration: so known ones keep their places and new ones go to the end, and an interface
//! that is gone from the file stays until the next start. One with another name on the same device is the same one.
//!
//! A device has one interface, as in a file that is read alone. Whoever may not have its device before the next start has none
//! ([`NO_DEVICE`]), so that rules which name it mean nothing else meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

use super::{ReloadReport, fixed};
use crate::config::services::values::{listen_text, protocol_text};
use crate::config::services::{Forward, Interface, ListenHost, Nat, Route, Services};

/// Device of an interface that waits for the next start: neither the kernel nor a configuration takes a name with a colon.
pub(crate) const NO_DEVICE: &str = ":none";

/// Puts `new` into the order of `old`, and tells what changes.
pub(super) fn merge(old: &Services, new: &mut Services, report: &mut ReloadReport) {
    let before = keep_interfaces(old, new, report);
    keep_tenants(old, new);
    let applied = &mut report.applied;
    let name = |interface: &Interface| interface.name.clone();
    compare("interface", &before, &new.interfaces, name, applied);
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

/// Puts interfaces in their places. Returns those to compare with: the old ones under their new names, and those that wait.
fn keep_interfaces(old: &Services, new: &mut Services, report: &mut ReloadReport) -> Vec<Interface> {
    let mut given = std::mem::take(&mut new.interfaces);
    let mut before = old.interfaces.clone();
    let mut gone = Vec::new();
    let is_known = |name: &str| old.interfaces.iter().any(|interface| interface.name == name);
    for (number, earlier) in before.iter_mut().enumerate() {
        let by_name = given.iter().position(|interface| interface.name == earlier.name);
        let renamed = |other: &Interface| other.device == earlier.device && !is_known(&other.name);
        match by_name.or_else(|| given.iter().position(renamed)) {
            Some(place) => {
                let mut interface = given.remove(place);
                keep_shared(earlier, &mut interface, &mut report.needs_restart);
                if interface.name != earlier.name {
                    report.applied.push(format!("interface {}: renamed to {}", earlier.name, interface.name));
                    earlier.name.clone_from(&interface.name);
                }
                new.interfaces.push(interface);
            }
            None => {
                report.needs_restart.push(format!("interface {}: removed", earlier.name));
                gone.push(number);
                new.interfaces.push(earlier.clone());
            }
        }
    }
    for mut interface in given {
        if interface.shared.take().is_some() {
            report.needs_restart.push(format!("interface {}: added, and shared", interface.name));
            (interface.dispatchers, interface.mac, interface.takeover) = (Vec::new(), None, false);
            interface.device = NO_DEVICE.to_owned();
            before.push(without_device(&interface));
        }
        new.interfaces.push(interface);
    }
    part_devices(&mut new.interfaces, &gone, &mut report.needs_restart);
    // That they wait was said.
    for place in gone {
        if let Some((before, now)) = before.get_mut(place).zip(new.interfaces.get(place)) {
            before.clone_from(now);
        }
    }
    before
}

/// The cores, the devices and the cluster's link are told of shared interfaces when they start.
fn keep_shared(earlier: &Interface, now: &mut Interface, needs_restart: &mut Vec<String>) {
    let is_shared = earlier.shared.is_some() || now.shared.is_some();
    let keep = |key: &str| format!("interface {}: {key}", earlier.name);
    fixed(needs_restart, &keep("shared"), &earlier.shared, &mut now.shared);
    fixed(needs_restart, &keep("dispatchers"), &earlier.dispatchers, &mut now.dispatchers);
    fixed(needs_restart, &keep("mac"), &earlier.mac, &mut now.mac);
    fixed(needs_restart, &keep("takeover"), &earlier.takeover, &mut now.takeover);
    if is_shared {
        fixed(needs_restart, &keep("device"), &earlier.device, &mut now.device);
    }
}

/// Gives each device to one interface: to a shared one that has it, else to one that is in the file, and takes addresses that
/// are wanted elsewhere from those that are gone from it.
fn part_devices(interfaces: &mut [Interface], gone: &[usize], needs_restart: &mut Vec<String>) {
    let all = interfaces.to_vec();
    let claim =
        |place: usize| (all.get(place).is_some_and(|one| one.shared.is_some()), !gone.contains(&place));
    for (place, interface) in interfaces.iter_mut().enumerate() {
        let others = || all.iter().enumerate().filter(move |(other, _)| *other != place);
        if gone.contains(&place) {
            let stay = || others().filter(|(other, _)| !gone.contains(other));
            interface.addresses.retain(|net| !stay().any(|(_, other)| other.addresses.contains(net)));
        }
        let better =
            |(other, one): (usize, &Interface)| one.device == interface.device && claim(other) > claim(place);
        let waits = interface.device != NO_DEVICE && others().any(better);
        if waits && !gone.contains(&place) {
            needs_restart.push(format!("interface {}: device {}", interface.name, interface.device));
        }
        if waits || interface.device == NO_DEVICE {
            *interface = without_device(interface);
        }
    }
}

fn without_device(interface: &Interface) -> Interface {
    let device = NO_DEVICE.to_owned();
    Interface { device, addresses: Vec::new(), virtual_addresses: Vec::new(), ..interface.clone() }
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
    use super::NO_DEVICE;
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

    #[test]
    fn an_interface_with_another_name_on_its_device_keeps_its_number() {
        let old = config("", BASE);
        let renamed = BASE.replace("name = \"wan\"", "name = \"inet\"\ndevice = \"wan\"");
        let new = config("", &renamed.replace("out = \"wan\"", "out = \"inet\""));
        let (merged, report) = merge(&old, &new);
        assert_eq!(named(&merged), [("lan", "lan"), ("inet", "wan")]);
        assert_eq!(report.needs_restart, Vec::<String>::new());
        assert_eq!(report.applied, ["interface wan: renamed to inet", "nat inet: added", "nat wan: removed"]);
        assert_eq!(named(&merge(&merged, &old).0), [("lan", "lan"), ("wan", "wan")]);
    }

    /// The one that is gone keeps its number, and has no device until the next start.
    #[test]
    fn a_device_has_one_interface_whatever_becomes_of_the_other() {
        let two = |one: &str, two: &str| {
            config("", &format!("[[interface]]\nname = \"a\"\n{one}[[interface]]\nname = \"b\"\n{two}"))
        };
        let old = two("", "");
        let new = config("", "[[interface]]\nname = \"a\"\ndevice = \"b\"\n");
        let (merged, report) = merge(&old, &new);
        assert_eq!(named(&merged), [("a", "b"), ("b", NO_DEVICE)]);
        assert_eq!(report.needs_restart, ["interface b: removed"]);
        // Nothing new the next time; it comes back with its device.
        let (again, report) = merge(&merged, &new);
        assert_eq!((again, report.applied), (merged.clone(), Vec::<String>::new()));
        assert_eq!(named(&merge(&merged, &old).0), [("a", "a"), ("b", "b")]);
        // One takes the other's device and name.
        let new = config("", "[[interface]]\nname = \"b\"\ndevice = \"a\"\n[[interface]]\nname = \"c\"\n");
        assert_eq!(named(&merge(&old, &new).0), [("a", NO_DEVICE), ("b", "a"), ("c", "c")]);
        let swapped = two("device = \"b\"\n", "device = \"a\"\n");
        assert_eq!(named(&merge(&old, &swapped).0), [("a", "b"), ("b", "a")]);
    }

    fn named(config: &crate::config::Config) -> Vec<(&str, &str)> {
        config.services.interfaces.iter().map(|i| (i.name.as_str(), i.device.as_str())).collect()
    }

    /// A cluster's cores, devices and link are told of shared interfaces when they start.
    #[test]
    fn what_is_shared_stays_until_the_next_start() {
        let load = |interfaces: &str| {
            let cluster = "[tun]\naddress = \"10.9.0.3/24\"\n[cluster]\nrole = \"dispatcher\"\nnode-id = 3\n\
                           manager = \"10.9.0.1\"\n";
            config("", &format!("{cluster}{interfaces}"))
        };
        let lan = "[[interface]]\nname = \"lan\"\nshared = 1\n";
        let plain = "[[interface]]\nname = \"dmz\"\n";
        let old = load(&format!("{lan}{plain}"));
        let new = load(&format!(
            "{}device = \"eth7\"\nmtu = 1400\n{plain}shared = 2\n[[interface]]\nname = \"new\"\nshared = 3\n\
             address = \"10.50.0.1/24\"\n",
            lan.replace('1', "4")
        ));
        let (merged, report) = merge(&old, &new);
        assert_eq!(named(&merged), [("lan", "lan"), ("dmz", "dmz"), ("new", NO_DEVICE)]);
        let interfaces = &merged.services.interfaces;
        let shared: Vec<_> = interfaces.iter().map(|interface| interface.shared).collect();
        assert_eq!(shared, [Some(1), None, None]);
        assert_eq!((interfaces[0].mtu, interfaces[2].addresses.len()), (Some(1400), 0));
        assert_eq!(
            report.needs_restart,
            [
                "interface lan: shared: Some(1) → Some(4)",
                "interface lan: device: \"lan\" → \"eth7\"",
                "interface dmz: shared: None → Some(2)",
                "interface new: added, and shared",
            ]
        );
        assert_eq!(report.applied, ["interface lan: changed"]);
        let (again, report) = merge(&merged, &new);
        assert_eq!((again, report.applied), (merged, Vec::<String>::new()));
    }
}
