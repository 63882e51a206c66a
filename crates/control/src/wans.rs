//! WANs as they are right now: `[[wan]]` sections against the interfaces of the host.
//!
//! Pure: [`HostView`] is what netlink told, [`WanRegistry::observe`] turns it into the WANs the engine
//! is given. The registry remembers one thing only: which id belongs to which interface name, because a
//! path keeps its WAN id while the interface under it goes and comes back.

use engine::config::Wan;
use linux::netlink::Link;
use tunnel::config::WanProperties;

use crate::config;
use crate::host_facts::{HostView, WAN_ADDRESSES_MAX};

/// Interfaces that get an id at most; an interface that is gone gives its id to the next.
const KNOWN_MAX: usize = config::WANS_MAX;
/// A WAN as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LiveWan {
    /// WAN as the engine is given it.
    pub wan: Wan,
    /// Interface index; `None` while the interface is missing, or for the unbound WAN.
    pub index: Option<u32>,
    /// Its `[[wan]]` section; `None` for the unbound WAN.
    pub section: Option<usize>,
    /// The interface has one peer and no neighbors (PPP, raw-IP modems).
    pub point_to_point: bool,
    /// The interface was made anew under its old name: sockets bound to the old one are dead.
    pub replaced: bool,
    /// Why it is not up; "up" when it is.
    pub state: &'static str,
}

/// Gives each interface name an id and keeps it.
#[derive(Clone, Debug, Default)]
pub struct WanRegistry {
    known: Vec<Known>,
}

#[derive(Clone, Debug)]
struct Known {
    id: u16,
    interface: String,
    index: Option<u32>,
}

impl WanRegistry {
    /// The WANs of the configuration as they are now, in the order of the file. Without `[[wan]]` that is one
    /// WAN with id 0 and no interface, which follows the host's own routes.
    pub fn observe(&mut self, sections: &[config::Wan], tun_name: &str, view: &HostView) -> Vec<LiveWan> {
        if sections.is_empty() {
            self.known.clear();
            return vec![unbound(tun_name, view)];
        }
        let mut list = Vec::new();
        let mut taken: Vec<String> = Vec::new();
        for (number, section) in sections.iter().enumerate() {
            for name in self.names(sections, number, tun_name, view) {
                if taken.contains(&name) {
                    continue;
                }
                let Some(live) = self.live(&name, number, section, view) else {
                    tracing::warn!(interface = name, "not used: there are {KNOWN_MAX} WANs already");
                    continue;
                };
                taken.push(name);
                list.push(live);
            }
        }
        self.known.retain(|known| taken.contains(&known.interface));
        list
    }

    /// Interface names a section stands for: what is there, and what was there before.
    fn names(&self, sections: &[config::Wan], number: usize, tun_name: &str, view: &HostView) -> Vec<String> {
        let pattern = match &sections[number].interface {
            config::InterfaceMatch::Name(name) => return vec![name.clone()],
            pattern @ config::InterfaceMatch::Pattern(_) => pattern,
        };
        // An interface that a section names is that section's, wherever it stands.
        let named = |name: &str| {
            sections
                .iter()
                .any(|other| matches!(&other.interface, config::InterfaceMatch::Name(n) if n == name))
        };
        let present = view
            .links
            .iter()
            .filter(|link| !link.loopback && link.name != tun_name)
            .map(|link| link.name.as_str());
        let remembered = self.known.iter().map(|known| known.interface.as_str());
        let mut names: Vec<String> =
            present.chain(remembered).filter(|n| pattern.covers(n) && !named(n)).map(str::to_owned).collect();
        names.sort();
        names.dedup();
        names
    }

    fn live(&mut self, name: &str, number: usize, section: &config::Wan, view: &HostView) -> Option<LiveWan> {
        let link = view.link(name);
        let index = link.map(|link| link.index);
        let known = self.known(name, view)?;
        let replaced = known.index.is_some() && index.is_some() && known.index != index;
        known.index = index.or(known.index);
        let id = known.id;
        let addresses =
            index.map_or_else(Vec::new, |index| view.usable_addresses(index, |ip| section.family.covers(ip)));
        let state = match link {
            None => "missing",
            Some(link) if !link.up => "switched off",
            Some(link) if !link.carrier => "no carrier",
            Some(_) if addresses.is_empty() => "no address",
            Some(_) => "up",
        };
        let wan = Wan {
            id,
            interface: name.to_owned(),
            up: state == "up",
            addresses,
            mtu: link.map_or(1500, mtu),
            rate_max_bps: section.rate_max_bps,
            receive_rate_max_bps: section.receive_rate_max_bps,
            tier: section.tier,
            relays: None,
            properties: section.properties,
        };
        let point_to_point = link.is_some_and(|link| link.point_to_point);
        Some(LiveWan { wan, index, section: Some(number), point_to_point, replaced, state })
    }

    /// The entry of a name, made if need be; `None` when all ids are taken by interfaces that exist.
    fn known(&mut self, name: &str, view: &HostView) -> Option<&mut Known> {
        if let Some(at) = self.known.iter().position(|known| known.interface == name) {
            return self.known.get_mut(at);
        }
        if self.known.len() >= KNOWN_MAX {
            let gone = self.known.iter().position(|known| view.link(&known.interface).is_none())?;
            self.known.remove(gone);
        }
        let free = (1..).find(|id| self.known.iter().all(|known| known.id != *id))?;
        self.known.push(Known { id: free, interface: name.to_owned(), index: None });
        self.known.last_mut()
    }
}

fn mtu(link: &Link) -> u16 {
    u16::try_from(link.mtu).unwrap_or(u16::MAX)
}

/// The WAN of a configuration without `[[wan]]`: the kernel chooses interface and address. It is up when any
/// interface could carry a datagram, preferably one with a default route.
fn unbound(tun_name: &str, view: &HostView) -> LiveWan {
    let defaults = view.default_interfaces();
    let mut links: Vec<&Link> = view
        .links
        .iter()
        .filter(|link| !link.loopback && link.name != tun_name && link.up && link.carrier)
        .collect();
    let rank = |link: &&Link| {
        (defaults.iter().position(|index| *index == link.index).unwrap_or(usize::MAX), link.index)
    };
    links.sort_by_key(rank);
    let mut addresses = Vec::new();
    for link in &links {
        addresses.extend(view.usable_addresses(link.index, |_| true));
    }
    addresses.truncate(WAN_ADDRESSES_MAX);
    let state = if addresses.is_empty() { "no address" } else { "up" };
    let wan = Wan {
        id: 0,
        interface: String::new(),
        up: state == "up",
        addresses,
        mtu: links.first().map_or(1500, |link| mtu(link)),
        rate_max_bps: None,
        receive_rate_max_bps: None,
        tier: 0,
        relays: None,
        properties: WanProperties::default(),
    };
    LiveWan { wan, index: None, section: None, point_to_point: false, replaced: false, state }
}

/// Ids of the WANs a peer may use, from the names and patterns in its configuration.
#[must_use]
pub fn ids_for_peer(wanted: Option<&[String]>, lives: &[LiveWan]) -> Option<Vec<u16>> {
    let wanted = wanted?;
    let covered =
        |live: &&LiveWan| wanted.iter().any(|pattern| config::values::matches(pattern, &live.wan.interface));
    Some(lives.iter().filter(covered).map(|live| live.wan.id).collect())
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::net::IpAddr;

    use linux::netlink::{Address, Route, RouteSpec};

    use super::*;
    use crate::config::{Family, InterfaceMatch};

    pub(crate) fn link(index: u32, name: &str) -> Link {
        Link {
            index,
            name: name.to_owned(),
            kind: None,
            up: true,
            carrier: true,
            mtu: 1500,
            mac: None,
            layer: (name != "lo").then_some(linux::link_layer::LinkLayer::Ethernet),
            lower: None,
            loopback: name == "lo",
            point_to_point: name.starts_with("ppp"),
            tx_queue_len: 1000,
            gso_max_bytes: 65536,
            controller: None,
            vrf_table: None,
        }
    }

    pub(crate) fn address(index: u32, net: &str) -> Address {
        let net: ipnet::IpNet = net.parse().unwrap();
        let link_local = packet::ip::is_link_local(net.addr());
        Address { index, net, link_local, tentative: false, deprecated: false }
    }

    pub(crate) fn route(index: u32, dst: &str, gateway: Option<&str>, metric: u32) -> Route {
        let spec = RouteSpec {
            gateway: gateway.map(|gateway| gateway.parse().unwrap()),
            interface: Some(index),
            metric,
            ..RouteSpec::new(dst.parse().unwrap())
        };
        Route { spec, protocol: 2, dead: false, place: 0, weight: 1, mtu: None, from: None }
    }

    pub(crate) fn section(interface: InterfaceMatch) -> config::Wan {
        config::Wan {
            interface,
            tier: 0,
            rate_max_bps: None,
            receive_rate_max_bps: None,
            family: Family::Any,
            gateways: Vec::new(),
            properties: WanProperties::default(),
            quota: None,
            schedule: Default::default(),
            locations: Vec::new(),
        }
    }

    pub(crate) fn named(name: &str) -> config::Wan {
        section(InterfaceMatch::Name(name.to_owned()))
    }

    fn matching(pattern: &str) -> config::Wan {
        section(InterfaceMatch::Pattern(pattern.to_owned()))
    }

    fn view() -> HostView {
        HostView {
            links: vec![link(1, "lo"), link(2, "wan0"), link(3, "wwan0"), link(9, "ana0")],
            addresses: vec![
                address(1, "127.0.0.1/8"),
                address(2, "192.168.8.100/24"),
                address(2, "fe80::1/64"),
                address(3, "2001:db8::5/64"),
                address(9, "10.77.0.1/24"),
            ],
            ..HostView::default()
        }
    }

    fn states(lives: &[LiveWan]) -> Vec<(&str, u16, &str)> {
        lives.iter().map(|live| (live.wan.interface.as_str(), live.wan.id, live.state)).collect()
    }

    #[test]
    fn interfaces_come_go_and_keep_their_id() {
        let sections = [named("wan0"), matching("wwan*"), named("wan1")];
        let (mut registry, mut view) = (WanRegistry::default(), view());
        let lives = registry.observe(&sections, "ana0", &view);
        assert_eq!(states(&lives), [("wan0", 1, "up"), ("wwan0", 2, "up"), ("wan1", 3, "missing")]);
        assert_eq!(lives[0].wan.addresses, ["192.168.8.100".parse::<IpAddr>().unwrap()]);

        view.links.retain(|link| link.name != "wwan0");
        view.links.push(link(5, "wwan1"));
        let lives = registry.observe(&sections, "ana0", &view);
        let expected =
            [("wan0", 1, "up"), ("wwan0", 2, "missing"), ("wwan1", 4, "no address"), ("wan1", 3, "missing")];
        assert_eq!(states(&lives), expected);

        view.links.push(link(3, "wwan0"));
        let lives = registry.observe(&sections, "ana0", &view);
        assert_eq!(states(&lives)[1], ("wwan0", 2, "up"));
        assert!(!lives[1].replaced);
    }

    #[test]
    fn an_interface_made_anew_is_noticed_even_when_it_was_never_seen_missing() {
        let sections = [named("wan0")];
        let (mut registry, mut view) = (WanRegistry::default(), view());
        assert!(!registry.observe(&sections, "ana0", &view)[0].replaced);
        view.links[1].index = 77;
        view.addresses[1].index = 77;
        assert!(registry.observe(&sections, "ana0", &view)[0].replaced);
        assert!(!registry.observe(&sections, "ana0", &view)[0].replaced);
    }

    #[test]
    fn states_have_reasons() {
        let sections = [named("wan0")];
        let (mut registry, mut view) = (WanRegistry::default(), view());
        view.addresses[1].tentative = true;
        assert_eq!(registry.observe(&sections, "ana0", &view)[0].state, "no address");
        view.links[1].carrier = false;
        assert_eq!(registry.observe(&sections, "ana0", &view)[0].state, "no carrier");
        view.links[1].up = false;
        assert_eq!(registry.observe(&sections, "ana0", &view)[0].state, "switched off");
    }

    #[test]
    fn families_and_deprecated_addresses() {
        let mut view = view();
        view.addresses.push(address(2, "2001:db8:1::1/64"));
        view.addresses.push(Address { deprecated: true, ..address(2, "2001:db8:2::1/64") });
        let list = |view: &HostView, family: Family| -> Vec<String> {
            view.usable_addresses(2, |ip| family.covers(ip)).iter().map(ToString::to_string).collect()
        };
        assert_eq!(list(&view, Family::Any), ["192.168.8.100", "2001:db8:1::1"]);
        assert_eq!(list(&view, Family::Ipv4), ["192.168.8.100"]);
        view.addresses.retain(|address| address.deprecated || address.net.addr().is_ipv4());
        assert_eq!(list(&view, Family::Ipv6), ["2001:db8:2::1"]);
    }

    #[test]
    fn a_pattern_leaves_named_interfaces_loopback_and_the_tunnel_alone() {
        let sections = [matching("*"), named("wan0")];
        let lives = WanRegistry::default().observe(&sections, "ana0", &view());
        let names: Vec<&str> = lives.iter().map(|live| live.wan.interface.as_str()).collect();
        assert_eq!(names, ["wwan0", "wan0"]);
    }

    #[test]
    fn ids_are_bounded() {
        let sections = [matching("m*")];
        let mut registry = WanRegistry::default();
        for round in 0..5u32 {
            let links = (0..40).map(|n| link(round * 100 + n + 1, &format!("m{}", round * 40 + n))).collect();
            let lives = registry.observe(&sections, "ana0", &HostView { links, ..HostView::default() });
            assert!(lives.iter().all(|live| usize::from(live.wan.id) <= KNOWN_MAX));
            assert_eq!(lives.iter().filter(|live| live.state == "no address").count(), 40);
        }
    }

    #[test]
    fn without_sections_the_default_route_is_followed() {
        let mut view = view();
        view.routes =
            vec![route(3, "::/0", Some("fe80::1"), 100), route(2, "0.0.0.0/0", Some("192.168.8.1"), 50)];
        let lives = WanRegistry::default().observe(&[], "ana0", &view);
        assert_eq!(states(&lives), [("", 0, "up")]);
        let addresses: Vec<String> = lives[0].wan.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["192.168.8.100", "2001:db8::5"]);
        view.links.retain(|link| link.name == "lo" || link.name == "ana0");
        assert_eq!(states(&WanRegistry::default().observe(&[], "ana0", &view)), [("", 0, "no address")]);
    }

    #[test]
    fn a_peer_names_its_wans() {
        let lives = WanRegistry::default().observe(&[named("wan0"), matching("wwan*")], "ana0", &view());
        let ids = |wanted: &[&str]| {
            let wanted: Vec<String> = wanted.iter().map(|text| (*text).to_owned()).collect();
            ids_for_peer(Some(&wanted), &lives)
        };
        assert_eq!(ids_for_peer(None, &lives), None);
        assert_eq!(ids(&["wan0"]), Some(vec![1]));
        assert_eq!(ids(&["w*"]), Some(vec![1, 2]));
        assert_eq!(ids(&["wwan0", "wwan7"]), Some(vec![2]));
        assert_eq!(ids(&[]), Some(vec![]));
    }
}
