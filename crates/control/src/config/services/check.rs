//! Faults that only show when several of these sections are compared.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::Range;

use services::spec::RuleAction;

use super::super::Tun;
use super::super::problem::Problems;
use super::pools::{self, Unusable};
use super::read::Places;
use super::values::{listen_text, protocol_text};
use super::{Forward, ListenHost, Rule, Services};

/// Compares everything with everything else.
pub(in super::super) fn services(all: &Services, tun: &Tun, places: &Places, problems: &mut Problems<'_>) {
    interfaces(all, tun, places, problems);
    names(all, places, problems);
    routes(all, places, problems);
    rules(all, places, problems);
    listeners(all, places, problems);
    outside_addresses(all, places, problems);
    nats(all, places, problems);
    pool_addresses(all, places, problems);
    leases(all, places, problems);
    if all.is_empty() {
        without_interface(places, problems);
    }
}

fn unique<'a>(
    what: &str,
    key: &str,
    names: impl IntoIterator<Item = (&'a str, &'a Range<usize>)>,
    problems: &mut Problems<'_>,
) {
    let mut seen = BTreeSet::new();
    for (name, at) in names {
        if !seen.insert(name) {
            problems.error(at, key, format!("two {what} are named \"{name}\"; give each its own name"));
        }
    }
}

fn interfaces(all: &Services, tun: &Tun, places: &Places, problems: &mut Problems<'_>) {
    let named = all.interfaces.iter().zip(&places.interfaces);
    unique("interfaces", "interface.name", named.clone().map(|(i, p)| (i.name.as_str(), &p.name)), problems);
    let mut devices: BTreeMap<&str, &str> = BTreeMap::new();
    let mut addresses: BTreeMap<(Option<&str>, IpAddr), &str> = BTreeMap::new();
    for (interface, place) in named {
        let device = interface.device.as_str();
        if device == tun.name {
            let message = format!(
                "\"{device}\" is the tunnel's own interface; rules know it as \"tunnel\" and \"gateway\""
            );
            problems.error(&place.device, "interface.device", message);
        } else if device == "lo" {
            let message = "\"lo\" leads nowhere; name the device of a network";
            problems.error(&place.device, "interface.device", message);
        } else if let Some(other) = devices.insert(device, &interface.name) {
            let message =
                format!("\"{device}\" belongs to interface \"{other}\" already; name another device");
            problems.error(&place.device, "interface.device", message);
        }
        for given in &place.addresses {
            let key = (interface.tenant.as_deref(), given.value.addr());
            if let Some(other) = addresses.insert(key, &interface.name) {
                let message =
                    format!("{} belongs to interface \"{other}\" already; remove one", given.value.addr());
                problems.error(&given.at, "interface.address", message);
            }
            if let Some(moving) =
                place.virtual_addresses.iter().find(|moving| moving.value == given.value.addr())
            {
                let message = format!(
                    "{} is added by address = already; write it here only if another program adds it",
                    moving.value
                );
                problems.error(&moving.at, "interface.virtual-address", message);
            }
            if let Some(why) = pools::of_nobody(given.value, given.value.addr()) {
                let message = format!("{} {why}; write the address of one host", given.value.addr());
                problems.warning(&given.at, "interface.address", message);
            }
        }
    }
}

fn names(all: &Services, places: &Places, problems: &mut Problems<'_>) {
    let tenants = all.tenants.iter().map(String::as_str).zip(&places.tenants);
    unique("tenants", "tenant.name", tenants, problems);
    let groups = all.groups.iter().map(|group| group.name.as_str()).zip(&places.groups);
    unique("groups", "group.name", groups.clone(), problems);
    for (group, at) in groups {
        if all.interfaces.iter().any(|interface| interface.name == group) {
            let message =
                format!("an interface is named \"{group}\" too; rules could mean both, choose another name");
            problems.error(at, "group.name", message);
        }
    }
    let rules = all.rules.iter().map(|rule| rule.name.as_str()).zip(&places.rules);
    unique("rules", "rule.name", rules, problems);
    let servers = all.servers.iter().map(|server| server.name.as_str());
    let servers = servers.zip(places.servers.iter().map(|place| &place.name));
    unique("virtual servers", "virtual-server.name", servers, problems);
    let leases = all.leases.iter().map(|lease| lease.name.as_str()).zip(&places.leases);
    unique("leases", "lease.name", leases, problems);
}

/// Whether an interface may have an address that contains this one: those without configured addresses may.
fn reachable(all: &Services, address: IpAddr) -> bool {
    let of_family = |net: &&ipnet::IpNet| net.addr().is_ipv4() == address.is_ipv4();
    all.interfaces.iter().any(|interface| {
        let mut nets = interface.addresses.iter().filter(of_family).peekable();
        nets.peek().is_none() || nets.any(|net| net.contains(&address))
    })
}

fn routes(all: &Services, places: &Places, problems: &mut Problems<'_>) {
    let mut seen = BTreeSet::new();
    for (route, place) in all.routes.iter().zip(&places.routes) {
        if !seen.insert((route.to, &route.tenant, &route.interface)) {
            let message = format!("{} has a route already; remove one", route.to);
            problems.error(&place.section, "route.to", message);
        }
        if let (Some(via), Some(at), None) = (route.via, &place.via, &route.interface)
            && !reachable(all, via)
        {
            let message = format!(
                "{via} is in no interface's network, so that nobody knows where it is; add interface = \"lan\""
            );
            problems.error(at, "route.via", message);
        }
    }
}

fn takes_everything(rule: &Rule) -> bool {
    rule.from.is_empty()
        && rule.to.is_empty()
        && rule.protocols.is_empty()
        && rule.ports.is_empty()
        && rule.source_ports.is_empty()
        && rule.tenants.is_empty()
}

fn rules(all: &Services, places: &Places, problems: &mut Problems<'_>) {
    let all_allow = all.rules.iter().all(|rule| rule.action == RuleAction::Allow);
    if let Some(first) = places.rules.first()
        && all_allow
        && all.settings.default_action == Some(RuleAction::Allow)
    {
        let at = places.default_action.as_ref().unwrap_or(first);
        let message = "all rules allow, and what no rule matches is allowed as well, so that they refuse nothing; \
                       write default-action = \"drop\" under [gateway]";
        problems.warning(at, "gateway.default-action", message);
    }
    let wide = all.rules.iter().position(takes_everything);
    if let Some(wide) = wide
        && let (Some(rule), Some(at)) = (all.rules.get(wide), places.rules.get(wide + 1))
    {
        let message =
            format!("never reached: \"{}\" before it matches everything; change their order", rule.name);
        problems.warning(at, "rule", message);
    }
}

/// Ports that services listen on: first, last and whose, by protocol and address.
#[derive(Default)]
struct Taken(BTreeMap<(u8, ListenHost), Vec<Ports>>);

/// First and last port, and whose.
type Ports = (u16, u16, String);

impl Taken {
    /// Takes ports; the name of who has some of them already.
    fn insert(&mut self, place: (u8, ListenHost), (first, last): (u16, u16), name: String) -> Option<String> {
        let here = self.0.entry(place).or_default();
        let other = here.iter().find(|(from, to, _)| *from <= last && first <= *to);
        let other = other.map(|(.., name)| name.clone());
        here.push((first, last, name));
        other
    }
}

fn listeners(all: &Services, places: &Places, problems: &mut Problems<'_>) {
    let mut taken = Taken::default();
    for (server, place) in all.servers.iter().zip(&places.servers) {
        let (address, port) = (server.listen.ip(), server.listen.port());
        let place_taken = (server.protocol, ListenHost::Address(address));
        let name = format!("virtual server \"{}\"", server.name);
        if let Some(other) = taken.insert(place_taken, (port, port), name) {
            let text = listen_text(server.protocol, server.listen);
            problems.error(
                &place.listen,
                "virtual-server.listen",
                format!("{text} belongs to {other} already"),
            );
        }
    }
    for (forward, at) in all.forwards.iter().zip(&places.forwards) {
        for protocol in &forward.protocols {
            let text = match &forward.host {
                ListenHost::Address(address) => listen_text(*protocol, (*address, forward.port).into()),
                ListenHost::Interface(name) => {
                    format!("{} {name}:{}", protocol_text(*protocol), forward.port)
                }
            };
            let text = if forward.ports > 1 { format!("{text}-{}", forward.last_port()) } else { text };
            let mut clash = None;
            for host in hosts(all, forward) {
                let ports = (forward.port, forward.last_port());
                let name = format!("the forward to {}", forward.to);
                let other = taken.insert((*protocol, host.clone()), ports, name);
                clash = clash.or(other.map(|other| (host, other)));
            }
            if let Some((host, other)) = clash {
                let also = match host {
                    ListenHost::Address(address) if host != forward.host => {
                        format!(" is {} too, which", listen_text(*protocol, (address, forward.port).into()))
                    }
                    _ => String::new(),
                };
                problems.error(at, "forward.listen", format!("{text}{also} belongs to {other} already"));
            }
        }
        deaf(all, forward, at, problems);
    }
}

/// Where a forward listens, an interface's configured addresses included: what DHCP adds only shows at run time.
fn hosts(all: &Services, forward: &Forward) -> Vec<ListenHost> {
    let mut list = vec![forward.host.clone()];
    if let ListenHost::Interface(name) = &forward.host {
        let interface = all.interfaces.iter().filter(|interface| interface.name == *name);
        let addresses = interface.flat_map(|interface| &interface.addresses).map(ipnet::IpNet::addr);
        let of_family = addresses.filter(|address| address.is_ipv4() == forward.to.is_ipv4());
        list.extend(of_family.map(ListenHost::Address));
    }
    list
}

/// A forward to a host of one address family on an interface that was given addresses of the other one only.
fn deaf(all: &Services, forward: &Forward, at: &Range<usize>, problems: &mut Problems<'_>) {
    let ListenHost::Interface(name) = &forward.host else { return };
    let Some(interface) = all.interfaces.iter().find(|interface| interface.name == *name) else { return };
    let ipv4 = forward.to.is_ipv4();
    if interface.addresses.is_empty() || interface.addresses.iter().any(|net| net.addr().is_ipv4() == ipv4) {
        return;
    }
    let family = if ipv4 { "IPv4" } else { "IPv6" };
    let message = format!(
        "\"{name}\" has no {family} address here, so that nothing listens for {}; give it one, or choose a host of the \
         other family",
        forward.to
    );
    problems.warning(at, "forward.listen", message);
}

/// Addresses that neighbors must be able to ask for.
fn outside_addresses(all: &Services, places: &Places, problems: &mut Problems<'_>) {
    let mut far = |address: IpAddr, at: &Range<usize>, key: &str| {
        if !all.is_empty() && !reachable(all, address) {
            let message = format!(
                "{address} is in no interface's network: nobody asks for it unless a router sends it here"
            );
            problems.warning(at, key, message);
        }
    };
    for (server, place) in all.servers.iter().zip(&places.servers) {
        far(server.listen.ip(), &place.listen, "virtual-server.listen");
    }
    for (forward, at) in all.forwards.iter().zip(&places.forwards) {
        if let ListenHost::Address(address) = forward.host {
            far(address, at, "forward.listen");
        }
    }
    for (nat, place) in all.nats.iter().zip(&places.nats) {
        if let (Some(at), Some(address)) =
            (&place.addresses, nat.addresses.iter().find(|a| !reachable(all, **a)))
        {
            far(*address, at, "nat.addresses");
        }
    }
}

fn nats(all: &Services, places: &Places, problems: &mut Problems<'_>) {
    let mut whole: BTreeSet<&str> = BTreeSet::new();
    for (nat, place) in all.nats.iter().zip(&places.nats) {
        if whole.contains(nat.out.as_str()) {
            let message =
                format!("never reached: another [[nat]] before it takes all that leaves by \"{}\"", nat.out);
            problems.warning(&place.section, "nat.out", message);
        }
        if nat.from.is_empty() && nat.tenants.is_empty() {
            whole.insert(&nat.out);
        }
    }
}

/// Network, broadcast and next routers' addresses in pools.
fn pool_addresses(all: &Services, places: &Places, problems: &mut Problems<'_>) {
    let unusable = pools::unusable(all, None);
    let mut check = |list: &[IpAddr], at: &Range<usize>, key: &str| {
        let found = || list.iter().filter_map(|address| Some((address, unusable.get(address)?)));
        let nothing_left = !list.is_empty() && found().count() == list.len();
        for (address, why) in found() {
            match why {
                Unusable::NextRouter(_) => {
                    let message =
                        format!("{address} {why}, so that nothing would get out; write a pool without it");
                    problems.error(at, key, message);
                }
                _ if nothing_left => {
                    problems.error(at, key, format!("{address} {why}; write the address of a host"));
                }
                _ => problems.warning(at, key, format!("{address} {why}; it is left out")),
            }
        }
    };
    for (nat, place) in all.nats.iter().zip(&places.nats) {
        if let Some(at) = &place.addresses {
            check(&nat.addresses, at, "nat.addresses");
        }
    }
    for (server, place) in all.servers.iter().zip(&places.servers) {
        check(&server.source_addresses, &place.listen, "virtual-server.source-addresses");
    }
}

fn leases(all: &Services, places: &Places, problems: &mut Problems<'_>) {
    let last = |lease: &super::Lease| u32::from(lease.first_port) + lease.ports - 1;
    for (number, (lease, at)) in all.leases.iter().zip(&places.leases).enumerate() {
        let clash = all.leases.iter().take(number).find(|other| {
            other.address == lease.address
                && u32::from(other.first_port) <= last(lease)
                && u32::from(lease.first_port) <= last(other)
        });
        if let Some(other) = clash {
            let message = format!("its ports belong to lease \"{}\" already; choose others", other.name);
            problems.error(at, "lease.first-port", message);
        }
        let translated = all.nats.iter().any(|nat| {
            nat.mode == services::spec::NatMode::AddressAndPort
                && (nat.addresses.contains(&lease.address)
                    || nat.addresses.is_empty() && may_have(all, &nat.out, lease.address))
        });
        if !translated {
            let message = format!(
                "no [[nat]] uses {}, so that the lease has no effect; add it to the addresses of one",
                lease.address
            );
            problems.warning(at, "lease.address", message);
        }
    }
}

/// Whether an interface's own addresses may be this one: with DHCP only the host knows.
fn may_have(all: &Services, name: &str, address: IpAddr) -> bool {
    let mut interfaces = all.interfaces.iter().filter(|interface| interface.name == name);
    interfaces.any(|interface| {
        let mut ipv4 = interface.addresses.iter().map(ipnet::IpNet::addr).filter(IpAddr::is_ipv4).peekable();
        address.is_ipv4() && (ipv4.peek().is_none() || ipv4.any(|own| own == address))
    })
}

/// Everything here is about packets of interfaces.
fn without_interface(places: &Places, problems: &mut Problems<'_>) {
    let firsts = [
        ("rule", places.rules.first()),
        ("route", places.routes.first().map(|place| &place.section)),
        ("forward", places.forwards.first()),
        ("virtual-server", places.servers.first().map(|place| &place.listen)),
    ];
    for (section, at) in firsts {
        if let Some(at) = at {
            let message = "there is no [[interface]], so that no packet comes here; write [[interface]] with \
                           name = \"lan\"";
            problems.warning(at, section, message);
        }
    }
}
