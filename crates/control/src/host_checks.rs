//! Obstacles on the host: what of its settings keeps packets of this configuration from passing, and the command that
//! mends it.
//!
//! [`Surroundings`] is what was read, [`obstacles`] judges it and is pure. Nothing is changed here. `check` and `up` say
//! what they find, a running node looks again ([`HostWatch`]) and shows it in its status. What cannot be read (no privilege,
//! no such kernel part) gives no warning.

mod port_holder;
mod unseen;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use linux::netlink::nftables::{BaseChain, Hook, base_chains};
use linux::netlink::{IpsecAction, IpsecPolicy, Link, Netlink, Route, RouteKind};
use services::spec::DeliveryMode;

use crate::config::services::Interface;
use crate::config::{Config, Endpoint, Routes};
use crate::gateway::{IPSEC_MAX, policy};
use crate::host_facts::{HostView, read_rp_filter};

pub(crate) use port_holder::PortHolder;

/// When this program was built, seconds since 1970; see `build.rs`.
const BUILT_AT: &str = env!("ANABRANCH_BUILT_AT");
/// A running node looks again after so long …
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// … and sooner after somebody has asked, but not more often than this …
const LOOK_AGAIN_ASKED: Duration = Duration::from_secs(2);
/// … nor for more than the tenth part of its time: a host may have many routes, rules and programs.
const PAUSE_BY_COST: u32 = 10;
/// Interfaces that one warning names at most.
const NAMED_MAX: usize = 4;

/// Key of the configuration that an obstacle concerns, and what to say about it.
pub(crate) type Obstacle = (&'static str, String);

/// Settings of the host that decide whether packets pass.
#[derive(Default)]
pub(crate) struct Surroundings {
    /// Chains of the firewall that keep packets from passing or lead them elsewhere.
    chains: Vec<BaseChain>,
    /// Whether the kernel forwards; IPv4, IPv6. `None`: not known.
    forwards: [Option<bool>; 2],
    /// Reverse-path filter of interfaces without a setting of their own.
    rp_filter: u8,
    /// Routes of all tables, without ours.
    routes: Vec<Route>,
    /// Indices of devices where `tc` acts on what comes in.
    ingress_disciplines: Vec<u32>,
    /// Other program on the port that peers dial.
    port: Option<PortHolder>,
    /// Wall clock, ns since 1970.
    clock_ns: u64,
}

impl Surroundings {
    /// Reads what the kernel tells now.
    pub(crate) fn read(config: &Config, netlink: &Netlink) -> Self {
        let mut chains = base_chains().unwrap_or_else(|error| {
            tracing::debug!(%error, "the firewall's chains cannot be read");
            Vec::new()
        });
        chains.extend(linux::iptables_legacy::dropping_chains());
        let mut routes = netlink.routes(None).unwrap_or_default();
        routes.retain(|route| !route.is_ours() && !route.dead && route.spec.kind == RouteKind::Unicast);
        Self {
            chains,
            forwards: kernel_forwards(),
            rp_filter: read_rp_filter("all").max(read_rp_filter("default")).unwrap_or(0),
            routes,
            ingress_disciplines: netlink.ingress_disciplines().unwrap_or_default(),
            port: config.node.listen.and_then(PortHolder::of_udp),
            clock_ns: linux::clock::realtime_ns(),
        }
    }

    /// Chains at a hook that drop what none of their rules accepts.
    fn dropping(&self, hook: Hook) -> impl Iterator<Item = &BaseChain> {
        self.chains.iter().filter(move |chain| chain.hook == hook && chain.refuses)
    }
}

/// Whether the kernel forwards IPv4 and IPv6; `None`: not known.
pub(crate) fn kernel_forwards() -> [Option<bool>; 2] {
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u32>().ok();
    let paths = ["/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"];
    paths.map(|path| number(path).map(|value| value != 0))
}

/// Warning about an orderly end: the kernel forwards between the interfaces then, by none of our rules.
pub(crate) fn opens_forwarding(config: &Config) -> Option<String> {
    let names: Vec<&str> =
        config.services.interfaces.iter().map(|interface| interface.device.as_str()).collect();
    let keys = ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"];
    let open = keys.into_iter().zip(kernel_forwards()).filter(|(_, forwards)| *forwards == Some(true));
    let commands: Vec<String> = open.map(|(key, _)| format!("{key}=0")).collect();
    (names.len() > 1 && !commands.is_empty()).then(|| {
        format!(
            "from now on the kernel forwards between {}, without our rules and untranslated; sysctl -w {} ends that",
            names.join(", "),
            commands.join(" ")
        )
    })
}

/// Obstacles for a configuration on a host.
pub(crate) fn obstacles(config: &Config, view: &HostView, around: &Surroundings) -> Vec<Obstacle> {
    let mut list = Vec::new();
    clock(around, &mut list);
    beside_interfaces(config, view, around, &mut list);
    same_networks(config, view, &mut list);
    ports(config, view, &mut list);
    translated_ways(config, view, around, &mut list);
    if config.peers.is_empty() {
        return list;
    }
    let lans = Lans::of(config, view);
    for ipv4 in [true, false] {
        if config.host_prefixes().any(|net| net.addr().is_ipv4() == ipv4) {
            forwarding(config, around, &lans, ipv4, &mut list);
        }
    }
    listening(config, around, &mut list);
    reverse_path(config, around, &mut list);
    default_routes(config, view, around, &mut list);
    list
}

/// A clock from before the build: certificates, logs and the handshake's timestamps go by it.
fn clock(around: &Surroundings, list: &mut Vec<Obstacle>) {
    let built_ns = BUILT_AT.parse::<u64>().unwrap_or(0).saturating_mul(1_000_000_000);
    if around.clock_ns < built_ns {
        list.push((
            "node",
            "the clock is before this program was built, peers that have seen a later time may refuse it: \
             timedatectl set-ntp true, or date -s 'YYYY-MM-DD hh:mm:ss'"
                .to_owned(),
        ));
    }
}

/// Interfaces whose packets the kernel, not this program, forwards into the tunnel: neither WANs nor `[[interface]]`.
struct Lans<'a> {
    list: Vec<(&'a Link, IpNet)>,
}

impl<'a> Lans<'a> {
    fn of(config: &Config, view: &'a HostView) -> Self {
        let defaults = view.default_interfaces();
        let wan = |link: &Link| match config.wans.as_slice() {
            // Without WANs and default route any interface may be the outside.
            [] => defaults.is_empty() || defaults.contains(&link.index),
            // Where the host's own default route leads is no inner network, whether it is a WAN of ours or not.
            wans => defaults.contains(&link.index) || wans.iter().any(|wan| wan.interface.covers(&link.name)),
        };
        let ours = |link: &Link| {
            link.name == config.tun.name
                || config.services.interfaces.iter().any(|interface| interface.device == link.name)
        };
        let inside = view.links.iter().filter(|link| link.up && !link.loopback && !wan(link) && !ours(link));
        let nets = |link: &'a Link| {
            let of_link = view.addresses.iter().filter(move |address| address.index == link.index);
            of_link.filter(|address| !address.link_local).map(move |address| (link, address.net))
        };
        // An address alone (/32, /128) has no neighbors.
        let list = inside.flat_map(nets).filter(|(_, net)| net.prefix_len() < net.max_prefix_len()).collect();
        Self { list }
    }

    /// Names of those of a family that `takes` says count, for a message.
    fn names(&self, ipv4: bool, takes: impl Fn(&Link) -> bool) -> BTreeSet<&str> {
        let of_family = self.list.iter().filter(|(link, net)| net.addr().is_ipv4() == ipv4 && takes(link));
        of_family.map(|(link, _)| link.name.as_str()).collect()
    }
}

/// A few names, in words.
fn in_words(names: &BTreeSet<&str>) -> String {
    let first: Vec<&str> = names.iter().copied().take(NAMED_MAX).collect();
    let more = names.len().saturating_sub(NAMED_MAX);
    if more == 0 { first.join(", ") } else { format!("{} and {more} more", first.join(", ")) }
}

/// The kernel's forwarding between inner networks and the tunnel: switched on, and not refused by the firewall.
fn forwarding(config: &Config, around: &Surroundings, lans: &Lans<'_>, ipv4: bool, list: &mut Vec<Obstacle>) {
    let tun = &config.tun.name;
    let all = lans.names(ipv4, |_| true);
    if all.is_empty() {
        return;
    }
    if around.forwards[usize::from(!ipv4)] == Some(false) {
        let (version, key) = forwarding_key(ipv4);
        list.push((
            "tun",
            format!(
                "the kernel does not forward {version} ({key} = 0): nothing passes between {} and {tun}; sysctl -w {key}=1, and \
                 the same line in /etc/sysctl.d/ to keep it; or make an [[interface]] of it",
                in_words(&all)
            ),
        ));
    }
    let mut said = BTreeSet::new();
    for chain in around.dropping(Hook::Forward).filter(|chain| chain.covers(ipv4)) {
        // Who wrote a rule with the name of the tunnel or of the inner interface has thought of it.
        let mentioned = |name: &str| chain.mentions(format!("{name}\0").as_bytes());
        let names = lans.names(ipv4, |link| !mentioned(&link.name));
        if names.is_empty()
            || mentioned(tun)
            || !said.insert((chain.legacy, chain.table.clone(), chain.name.clone()))
        {
            continue;
        }
        let docker = if chain.has_chain("DOCKER-USER") { " (Docker sets this)" } else { "" };
        list.push((
            "tun",
            format!(
                "the firewall drops what the kernel forwards ({}{docker}) and no rule names {tun}: nothing passes between {} \
                 and {tun}; {}",
                place(chain),
                in_words(&names),
                accept_forwarded(chain, tun, ipv4)
            ),
        ));
    }
}

/// Where a chain stands, in words.
fn place(chain: &BaseChain) -> String {
    let legacy = if chain.legacy { ", iptables-legacy" } else { "" };
    format!("chain {} of table {} {}{legacy}", chain.name, chain.family, chain.table)
}

/// The program that changes a chain of iptables. What `iptables` stands for where both kinds are there is not known here.
const fn iptables(chain: &BaseChain, ipv4: bool) -> &'static str {
    match (ipv4, chain.legacy) {
        (true, false) => "iptables",
        (false, false) => "ip6tables",
        (true, true) => "iptables-legacy",
        (false, true) => "ip6tables-legacy",
    }
}

/// The host's own stack beside `[[interface]]`: it passes packets on between them and its other devices, if it forwards; and its
/// firewall does not see what passes from one to another.
fn beside_interfaces(config: &Config, view: &HostView, around: &Surroundings, list: &mut Vec<Obstacle>) {
    let ours = &config.services.interfaces;
    if ours.is_empty() {
        return;
    }
    let interfaces: BTreeSet<&str> = ours.iter().map(|interface| interface.device.as_str()).collect();
    let is_ours = |link: &Link| {
        link.name == config.tun.name
            || interfaces.contains(link.name.as_str())
            || config.wans.iter().any(|wan| wan.interface.covers(&link.name))
    };
    for ipv4 in [true, false] {
        let has_network = |link: &Link| {
            view.addresses.iter().any(|address| {
                address.index == link.index && !address.link_local && address.net.addr().is_ipv4() == ipv4
            })
        };
        let leads = |link: &&Link| link.up && !link.loopback && leads_further(link) && !is_ours(link);
        let others: BTreeSet<&str> = view
            .links
            .iter()
            .filter(leads)
            .filter(|link| has_network(link))
            .map(|l| l.name.as_str())
            .collect();
        if !others.is_empty() && around.forwards[usize::from(!ipv4)] == Some(false) {
            let (version, key) = forwarding_key(ipv4);
            list.push((
                "interface",
                format!(
                    "the kernel does not forward {version} ({key} = 0): nothing passes between {} and {}; sysctl -w {key}=1, and \
                     the same line in /etc/sysctl.d/ to keep it; or make an [[interface]] of it",
                    in_words(&interfaces),
                    in_words(&others)
                ),
            ));
        }
        unled(config, &others, ipv4, list);
        unseal(view, around, ipv4, list);
        many_policies(view, ipv4, list);
    }
    unseen::by_the_firewall(config, &interfaces, view, around, list);
    unseen::by_tc(&interfaces, view, around, list);
}

/// Traffic that IPsec seals is the kernel's to pass on.
fn unseal(view: &HostView, around: &Surroundings, ipv4: bool, list: &mut Vec<Obstacle>) {
    let seals = |policy: &IpsecPolicy| {
        policy.outward && policy.action == IpsecAction::Protect && policy.from.addr().is_ipv4() == ipv4
    };
    if view.ipsec.iter().any(seals) && around.forwards[usize::from(!ipv4)] == Some(false) {
        let (version, key) = forwarding_key(ipv4);
        list.push((
            "interface",
            format!(
                "the kernel does not forward {version} ({key} = 0): nothing passes that policies of IPsec (ip xfrm policy) say is sealed; \
                 sysctl -w {key}=1, and the same line in /etc/sysctl.d/ to keep it"
            ),
        ));
    }
}

/// More policies of IPsec than are followed.
fn many_policies(view: &HostView, ipv4: bool, list: &mut Vec<Obstacle>) {
    for outward in [true, false] {
        let of_kind =
            |policy: &&IpsecPolicy| policy.outward == outward && policy.from.addr().is_ipv4() == ipv4;
        let count = view.ipsec.iter().filter(of_kind).count();
        if count > IPSEC_MAX {
            let version = if ipv4 { "IPv4" } else { "IPv6" };
            let what = if outward { "leaves" } else { "has come in" };
            list.push((
                "interface",
                format!(
                    "{count} policies of IPsec (ip xfrm policy) are about what {what} by {version}, of which only the first {IPSEC_MAX} are \
                     followed: what the others seal is sent in the clear; make them fewer and wider"
                ),
            ));
        }
    }
}

/// Networks that an interface inside shares with another one, as with a provider's router that has the LAN's: only one of the two
/// is reached. Several ways out may be alike.
fn same_networks(config: &Config, view: &HostView, list: &mut Vec<Obstacle>) {
    let interfaces = &config.services.interfaces;
    let networks = |interface: &Interface| {
        let index = view.link(&interface.device).map(|link| link.index);
        let there = view.addresses.iter().filter(|address| Some(address.index) == index);
        let there = there.filter(|address| !address.link_local).map(|address| address.net);
        let all = interface.addresses.iter().copied().chain(there);
        all.filter(|net| net.prefix_len() < net.max_prefix_len())
            .map(|net| net.trunc())
            .collect::<BTreeSet<_>>()
    };
    let networks: Vec<BTreeSet<IpNet>> = interfaces.iter().map(networks).collect();
    for (place, (first, of_first)) in interfaces.iter().zip(&networks).enumerate() {
        for (second, of_second) in interfaces.iter().zip(&networks).skip(place + 1) {
            let inside = policy::is_inside(config, first) || policy::is_inside(config, second);
            let shared = of_first.intersection(of_second).next();
            if let Some(net) = shared.filter(|_| inside && first.tenant == second.tenant) {
                list.push((
                    "interface",
                    format!(
                        "{} and {} have the same network {net}: hosts there are looked for behind one of them only; give the inner one \
                         another network",
                        first.name, second.name
                    ),
                ));
            }
        }
    }
}

/// Devices that a bridge, a bond or a team took: the host's addresses there and its answers are those of the device above.
fn ports(config: &Config, view: &HostView, list: &mut Vec<Obstacle>) {
    for interface in &config.services.interfaces {
        let above = view.link(&interface.device).and_then(|link| link.controller);
        let above = above.and_then(|index| view.links.iter().find(|link| link.index == index));
        if let Some(above) = above.filter(|above| above.vrf_table.is_none()) {
            list.push((
                "interface.device",
                format!(
                    "\"{}\" is a port of \"{}\", which has the network; write device = \"{1}\"",
                    interface.device, above.name
                ),
            ));
        }
    }
}

/// Services that the kernel does not lead to: what comes by the host's other devices does not reach them by their address.
fn unled(config: &Config, others: &BTreeSet<&str>, ipv4: bool, list: &mut Vec<Obstacle>) {
    if others.is_empty() {
        return;
    }
    let services = &config.services;
    let has_direct = services
        .servers
        .iter()
        .any(|server| server.listen.is_ipv4() == ipv4 && server.delivery == DeliveryMode::DirectReturn);
    let has_range = services.forwards.iter().any(|forward| {
        forward.to.is_ipv4() == ipv4
            && forward.proxy_protocol
            && (forward.ports > 1 || forward.tenant.is_some())
    });
    let found = [
        (has_direct, "virtual-server", "a [[virtual-server]] with direct return", "a backend"),
        (
            has_range,
            "forward",
            "a [[forward]] of several ports or of a tenant with proxy-protocol",
            "the inside host",
        ),
    ];
    for (_, key, what, instead) in found.into_iter().filter(|(is_there, ..)| *is_there) {
        list.push((
            key,
            format!(
                "what comes by {} does not reach {what} by its address: let it ask {instead} there, or make an [[interface]] of it",
                in_words(others)
            ),
        ));
    }
}

/// Whether a device is there to lead to others: a bridge of containers or virtual machines, a tunnel.
fn leads_further(link: &Link) -> bool {
    link.point_to_point
        || matches!(
            link.kind.as_deref(),
            Some("bridge" | "wireguard" | "tun" | "gre" | "sit" | "ipip" | "xfrm")
        )
}

/// A version of IP, and the setting by which the kernel forwards it.
const fn forwarding_key(ipv4: bool) -> (&'static str, &'static str) {
    if ipv4 { ("IPv4", "net.ipv4.ip_forward") } else { ("IPv6", "net.ipv6.conf.all.forwarding") }
}

/// Command that lets a chain pass what goes into the tunnel and comes out of it.
fn accept_forwarded(chain: &BaseChain, tun: &str, ipv4: bool) -> String {
    if (chain.table.as_str(), chain.name.as_str()) == ("filter", "FORWARD") && chain.family != "inet" {
        let program = iptables(chain, ipv4);
        let user = if chain.has_chain("DOCKER-USER") { "DOCKER-USER" } else { "FORWARD" };
        return format!("{program} -I {user} -i {tun} -j ACCEPT; {program} -I {user} -o {tun} -j ACCEPT");
    }
    let rule = |side: &str| {
        format!("nft insert rule {} {} {} {side} {tun} accept", chain.family, chain.table, chain.name)
    };
    format!("{}; {}", rule("iifname"), rule("oifname"))
}

/// The port that peers dial: nobody else has it, and the firewall lets it in.
fn listening(config: &Config, around: &Surroundings, list: &mut Vec<Obstacle>) {
    let Some(port) = config.node.listen else { return };
    if let Some(holder) = around.port.as_ref().filter(|holder| !holder.is_gateway()) {
        list.push((
            "node.listen",
            format!("UDP port {port} is taken by {holder}; {}, or choose another port", holder.stop()),
        ));
    }
    for chain in around.dropping(Hook::Input) {
        // In the order of the network or, with an iptables match, in that of the machine.
        let named = chain.mentions(&port.to_be_bytes()) || chain.mentions(&port.to_ne_bytes());
        if !named {
            let command = if (chain.table.as_str(), chain.name.as_str()) == ("filter", "INPUT") {
                let program = iptables(chain, chain.family != "ip6");
                format!("{program} -I INPUT -p udp --dport {port} -j ACCEPT")
            } else {
                let (family, table, name) = (chain.family, &chain.table, &chain.name);
                format!("nft insert rule {family} {table} {name} udp dport {port} accept")
            };
            list.push((
                "node.listen",
                format!(
                    "the firewall drops what comes in ({}) and no rule names UDP port {port}: peers that dial may get no \
                     answer; {command}",
                    place(chain)
                ),
            ));
        }
    }
}

/// With routes of the operator's own, a strict filter refuses what comes out of the tunnel.
fn reverse_path(config: &Config, around: &Surroundings, list: &mut Vec<Obstacle>) {
    let tun = &config.tun.name;
    if config.tun.routes != Routes::Auto && around.rp_filter == 1 {
        list.push((
            "tun.route",
            format!(
                "the kernel drops packets out of {tun} whose way back is not {tun} (rp_filter = 1), and the routes are not made \
                 by this program; sysctl -w net.ipv4.conf.{tun}.rp_filter=2 once it is up"
            ),
        ));
    }
}

/// Every WAN that is there needs a way to the peers' endpoints.
fn default_routes(config: &Config, view: &HostView, around: &Surroundings, list: &mut Vec<Obstacle>) {
    let endpoints: Vec<Option<IpAddr>> = config
        .peers
        .iter()
        .flat_map(|peer| &peer.endpoints)
        .map(|endpoint| match endpoint {
            Endpoint::Address(address) => Some(address.ip().to_canonical()),
            Endpoint::Name { .. } => None,
        })
        .collect();
    if endpoints.is_empty() {
        return;
    }
    let leads = |route: &Route, endpoint: &Option<IpAddr>| match endpoint {
        Some(address) => route.spec.dst.contains(address),
        None => route.spec.dst.prefix_len() == 0,
    };
    // One endpoint that is reached is enough: others may be of another family or WAN.
    let reaches = |over: Option<u32>| {
        let mut routes = around.routes.iter().filter(|route| over.is_none() || route.spec.interface == over);
        routes.any(|route| endpoints.iter().any(|endpoint| leads(route, endpoint)))
    };
    if config.wans.is_empty() {
        if !reaches(None) {
            let message = "no route in any table leads to an endpoint, there is no default route: \
                           ip route add default via GATEWAY";
            list.push(("peer.endpoints", message.to_owned()));
        }
        return;
    }
    for wan in config.wans.iter().filter(|wan| wan.gateways.is_empty()) {
        let links = view.links.iter().filter(|link| wan.interface.covers(&link.name) && !link.loopback);
        for link in links.filter(|link| link.up && link.carrier && !link.point_to_point) {
            let addressed = !view.usable_addresses(link.index, |ip| wan.family.covers(ip)).is_empty();
            if addressed && !reaches(Some(link.index)) {
                list.push((
                    "wan.gateway",
                    format!(
                        "{0} has an address, but no route in any table leads over it to an endpoint, there is no default route; \
                         ip route add default via GATEWAY dev {0} metric 100, or gateway = [\"GATEWAY\"] in its [[wan]]",
                        link.name
                    ),
                ));
            }
        }
    }
}

/// An interface by which a `[[nat]]` leads out has an address, and no route of any table leads further than its own network.
fn translated_ways(config: &Config, view: &HostView, around: &Surroundings, list: &mut Vec<Obstacle>) {
    let services = &config.services;
    let outs: BTreeSet<&str> = services.nats.iter().map(|nat| nat.out.as_str()).collect();
    for interface in services.interfaces.iter().filter(|interface| outs.contains(interface.name.as_str())) {
        let Some(link) = view.links.iter().find(|link| link.name == interface.device) else { continue };
        let addressed =
            view.addresses.iter().any(|address| address.index == link.index && !address.link_local);
        let further = |route: &&Route| route.spec.gateway.is_some() || route.spec.dst.prefix_len() == 0;
        let leads =
            around.routes.iter().filter(further).any(|route| route.spec.interface == Some(link.index));
        if link.up && link.carrier && addressed && !leads && services.routes.is_empty() {
            list.push((
                "nat.out",
                format!(
                    "no route in any table leads further over {0}, by which a [[nat]] leads out, there is no default route; \
                     ip route add default via GATEWAY dev {0}",
                    link.name
                ),
            ));
        }
    }
}

/// Obstacles of a running node: looked at again from time to time, said once.
#[derive(Default)]
pub(crate) struct HostWatch {
    looked_at: Option<Instant>,
    /// How long the last look took.
    took: Duration,
    asked: bool,
    found: Vec<String>,
}

impl HostWatch {
    /// Whether it is time to look; sooner if somebody has asked since.
    pub(crate) fn is_due(&self, now: Instant) -> bool {
        let pause = if self.asked { LOOK_AGAIN_ASKED } else { LOOK_AGAIN };
        let pause = pause.max(self.took * PAUSE_BY_COST);
        self.looked_at.is_none_or(|at| now.saturating_duration_since(at) >= pause)
    }

    /// Somebody wants to know: what was found last is told, and the next look is soon.
    pub(crate) fn ask(&mut self) -> &[String] {
        self.asked = true;
        &self.found
    }

    /// Takes over what was found, within so long; logs what is new. The first look is not logged: starting and reloading say it
    /// themselves.
    pub(crate) fn found(&mut self, now: Instant, took: Duration, found: Vec<String>) {
        if self.looked_at.is_some() {
            for text in found.iter().filter(|text| !self.found.contains(text)) {
                tracing::warn!("{text}");
            }
            for text in self.found.iter().filter(|text| !found.contains(text)) {
                tracing::info!("no longer: {text}");
            }
        }
        (self.looked_at, self.took, self.asked) = (Some(now), took, false);
        self.found = found;
    }
}

#[cfg(test)]
mod tests;
