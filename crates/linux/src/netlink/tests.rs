#![allow(clippy::unwrap_used, reason = "tests")]
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;

use super::*;
use crate::testing::isolated;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn index(netlink: &Netlink, name: &str) -> u32 {
    netlink.link(name).unwrap().unwrap().index
}

/// Two ends of a cable in this namespace, both up, `a` with 10.5.0.1/24 and fd05::1/64.
fn cable() -> (Netlink, u32, u32) {
    let netlink = Netlink::open().unwrap();
    netlink.add_veth("a", "b", None).unwrap();
    let (a, b) = (index(&netlink, "a"), index(&netlink, "b"));
    netlink.add_address(a, net("10.5.0.1/24")).unwrap();
    netlink.add_address(a, net("fd05::1/64")).unwrap();
    netlink.set_up(a, true).unwrap();
    netlink.set_up(b, true).unwrap();
    (netlink, a, b)
}

#[test]
fn links_are_made_changed_moved_and_deleted() {
    isolated(|| {
        let netlink = Netlink::open().unwrap();
        netlink.add_veth("veth-a", "veth-b", None).unwrap();
        assert_eq!(netlink.links().unwrap().len(), 3);
        let a = netlink.link("veth-a").unwrap().unwrap();
        assert_eq!((a.kind.as_deref(), a.up, a.carrier, a.mtu), (Some("veth"), false, false, 1500));
        assert!(a.mac.is_some() && !a.loopback && !a.point_to_point);
        assert_eq!(netlink.link_by_index(a.index).unwrap().unwrap(), a);
        assert_eq!(netlink.link("nobody").unwrap(), None);
        assert_eq!(netlink.link_by_index(9999).unwrap(), None);

        netlink.set_up(a.index, true).unwrap();
        assert!(netlink.link("veth-a").unwrap().unwrap().up);
        assert!(!netlink.link("veth-a").unwrap().unwrap().carrier, "the other end is off");
        netlink.set_up(index(&netlink, "veth-b"), true).unwrap();
        assert!(netlink.link("veth-a").unwrap().unwrap().carrier);
        netlink.set_mtu(a.index, 1400).unwrap();
        netlink.set_tx_queue_len(a.index, 77).unwrap();
        netlink.set_gso_max(a.index, 30_000).unwrap();
        netlink.set_mac(a.index, [2, 1, 2, 3, 4, 5]).unwrap();
        let changed = netlink.link("veth-a").unwrap().unwrap();
        assert_eq!((changed.mtu, changed.tx_queue_len, changed.gso_max_bytes), (1400, 77, 30_000));
        assert_eq!(changed.mac, Some([2, 1, 2, 3, 4, 5]));
        netlink.set_up(a.index, false).unwrap();
        netlink.set_name(a.index, "renamed").unwrap();
        assert_eq!(index(&netlink, "renamed"), a.index);

        let other = Namespace::create().unwrap();
        netlink.move_to_netns(a.index, other.as_fd()).unwrap();
        assert!(netlink.link("renamed").unwrap().is_none());
        let there = Netlink::open_in(&other).unwrap();
        there.delete_link(index(&there, "renamed")).unwrap();
        assert_eq!(netlink.links().unwrap().len(), 1, "the other end went along");

        let third = Namespace::create().unwrap();
        netlink.add_veth_between("x", Some(other.as_fd()), "y", Some(third.as_fd())).unwrap();
        assert!(there.link("x").unwrap().is_some());
        assert!(Netlink::open_in(&third).unwrap().link("y").unwrap().is_some());
    });
}

#[test]
fn errors_say_what_was_tried_and_keep_the_number() {
    isolated(|| {
        let (netlink, a, _) = cable();
        let error = netlink.add_veth("a", "c", None).unwrap_err();
        assert_eq!((error.raw_os_error(), error.what()), (Some(libc::EEXIST), "make the veth pair a and c"));
        assert_eq!(
            netlink.add_address(a, net("10.5.0.1/24")).unwrap_err().raw_os_error(),
            Some(libc::EEXIST)
        );
        let error = netlink.set_up(9999, true).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
        assert!(error.to_string().contains("interface 9999"), "{error}");
        assert!(netlink.set_mtu(a, 1 << 30).is_err());
        assert!(netlink.add_veth("a name", "d", None).is_err());
        assert!(netlink.set_name(a, "").is_err());
        assert!(netlink.del_address(a, net("10.6.0.1/24")).is_err());
        // The session is still in step after all of that.
        assert_eq!(index(&netlink, "a"), a);
    });
}

#[test]
fn addresses_come_and_go_and_can_be_used_at_once() {
    isolated(|| {
        let (netlink, a, b) = cable();
        let mut nets: Vec<_> =
            netlink.addresses(a).unwrap().into_iter().filter(|one| !one.link_local).collect();
        nets.sort_by_key(|one| one.net);
        assert_eq!(
            nets.iter().map(|one| one.net).collect::<Vec<_>>(),
            [net("10.5.0.1/24"), net("fd05::1/64")]
        );
        assert!(nets.iter().all(|one| !one.tentative && !one.deprecated && one.index == a));
        std::net::UdpSocket::bind("[fd05::1]:0").unwrap();
        assert!(netlink.addresses(b).unwrap().iter().all(|one| one.link_local));
        assert!(netlink.all_addresses().unwrap().iter().any(|one| one.net == net("127.0.0.1/8")));
        for address in ["10.5.0.1/24", "fd05::1/64"] {
            netlink.del_address(a, net(address)).unwrap();
        }
        assert!(netlink.addresses(a).unwrap().iter().all(|one| one.link_local));

        netlink.add_neighbor(a, ip("10.5.0.9"), [2, 0, 0, 0, 0, 9]).unwrap();
        netlink.add_neighbor(a, ip("fd05::9"), [2, 0, 0, 0, 0, 9]).unwrap();
        netlink.add_neighbor(a, ip("fd05::9"), [2, 0, 0, 0, 0, 8]).unwrap();
        let neighbors = netlink.neighbors(a).unwrap();
        assert!(neighbors.contains(&(ip("10.5.0.9"), [2, 0, 0, 0, 0, 9])));
        assert!(neighbors.contains(&(ip("fd05::9"), [2, 0, 0, 0, 0, 8])));
    });
}

#[test]
fn addresses_may_stay_for_a_while_only() {
    isolated(|| {
        let (netlink, a, _) = cable();
        let nets = [net("10.5.0.1/24"), net("fd05::1/64")];
        let there = |wanted: &IpNet| netlink.addresses(a).unwrap().iter().any(|one| one.net == *wanted);
        for wanted in nets {
            netlink.set_address_lifetime(a, wanted, Some(1)).unwrap();
            assert!(there(&wanted));
        }
        netlink.set_address_lifetime(a, nets[1], None).unwrap();
        let end = Instant::now() + Duration::from_secs(10);
        while there(&nets[0]) {
            assert!(Instant::now() < end, "the kernel keeps it");
            std::thread::sleep(Duration::from_millis(50));
        }
        std::thread::sleep(Duration::from_secs(1));
        assert!(there(&nets[1]), "it stays for good again");
    });
}

fn find(netlink: &Netlink, spec: &RouteSpec) -> Option<Route> {
    let routes = netlink.routes(None).unwrap();
    routes.into_iter().find(|route| route.spec.dst == spec.dst && route.spec.table == spec.table)
}

/// One route of each kind, over the interface `a`.
fn specimens(a: u32) -> Vec<RouteSpec> {
    let via = |dst: &str, gateway: &str| RouteSpec {
        gateway: Some(ip(gateway)),
        interface: Some(a),
        metric: 50,
        ..RouteSpec::new(net(dst))
    };
    vec![
        via("192.0.2.0/24", "10.5.0.2"),
        via("2001:db8::/32", "fd05::2"),
        // A table of its own with a big number, as each WAN has.
        RouteSpec { table: 46_001, ..via("0.0.0.0/0", "10.5.0.2") },
        RouteSpec { table: 46_001, ..via("::/0", "fd05::2") },
        // A gateway outside the interface's network.
        RouteSpec { onlink: true, table: 77, ..via("198.51.100.0/24", "203.0.113.1") },
        RouteSpec { onlink: true, table: 77, ..via("2001:db8:1::/48", "fd77::1") },
        RouteSpec {
            interface: Some(a),
            metric: 9,
            source: Some(ip("10.5.0.1")),
            ..RouteSpec::new(net("10.8.0.0/16"))
        },
        RouteSpec {
            interface: Some(a),
            metric: 9,
            source: Some(ip("fd05::1")),
            ..RouteSpec::new(net("fd08::/64"))
        },
        RouteSpec {
            kind: RouteKind::Unreachable,
            metric: 999,
            table: 46_001,
            ..RouteSpec::new(net("10.99.0.0/16"))
        },
        RouteSpec { kind: RouteKind::Blackhole, metric: 999, ..RouteSpec::new(net("10.98.0.0/16")) },
        RouteSpec { kind: RouteKind::Throw, metric: 999, ..RouteSpec::new(net("10.97.0.0/16")) },
    ]
}

#[test]
fn routes_of_every_kind_round_trip() {
    isolated(|| {
        let (netlink, a, _) = cable();
        let specs = specimens(a);
        for spec in &specs {
            netlink.add_route(spec).unwrap();
            let mut route = find(&netlink, spec).unwrap_or_else(|| panic!("{spec:?} is not there"));
            assert!(route.is_ours() && !route.dead);
            // IPv6 does not tell whether a gateway was declared to be on the link.
            route.spec.onlink = spec.onlink;
            assert_eq!(route.spec, *spec);
            assert_eq!(netlink.add_route(spec).unwrap_err().raw_os_error(), Some(libc::EEXIST));
        }
        // IPv6 refuses with a route over the loopback.
        let refuse =
            RouteSpec { kind: RouteKind::Unreachable, metric: 999, ..RouteSpec::new(net("fd99::/16")) };
        netlink.add_route(&refuse).unwrap();
        assert_eq!(find(&netlink, &refuse).unwrap().spec.kind, RouteKind::Unreachable);
        netlink.del_route(&refuse).unwrap();

        let replaced = RouteSpec { gateway: Some(ip("10.5.0.77")), ..specs[0].clone() };
        netlink.replace_route(&replaced).unwrap();
        assert_eq!(find(&netlink, &replaced).unwrap().spec.gateway, Some(ip("10.5.0.77")));
        netlink.replace_route(&specs[0]).unwrap();
        for spec in &specs {
            netlink.del_route(spec).unwrap();
            assert!(find(&netlink, spec).is_none());
            assert_eq!(netlink.del_route(spec).unwrap_err().raw_os_error(), Some(libc::ESRCH));
        }
        // The kernel's own: the connected network, and the address in the table `local`.
        let connected = find(&netlink, &RouteSpec::new(net("10.5.0.0/24"))).unwrap();
        assert_eq!((connected.protocol, connected.spec.source), (2, Some(ip("10.5.0.1"))));
        let local = RouteSpec { table: 255, ..RouteSpec::new(net("10.5.0.1/32")) };
        assert_eq!(find(&netlink, &local).unwrap().spec.kind, RouteKind::Local);
        assert!(
            netlink.routes(Some(Family::V6)).unwrap().iter().all(|route| route.spec.dst.addr().is_ipv6())
        );
    });
}

#[test]
fn rules_round_trip_and_steer_by_mark_and_device() {
    isolated(|| {
        let (netlink, a, _) = cable();
        let before = netlink.rules(None).unwrap();
        assert!(before.iter().all(|rule| !rule.is_ours()));
        let rules = [
            RuleSpec { mark: Some((0x4600, 0xffff)), invert: true, ..RuleSpec::new(Family::V4, 100, 46_000) },
            RuleSpec { mark: Some((0x4600, u32::MAX)), ..RuleSpec::new(Family::V6, 101, 46_000) },
            RuleSpec { oif: Some("a".into()), ..RuleSpec::new(Family::V4, 102, 46_001) },
            RuleSpec { iif: Some("b".into()), ..RuleSpec::new(Family::V6, 103, 46_001) },
            RuleSpec {
                from: Some(net("10.5.0.0/24")),
                to: Some(net("10.9.0.0/16")),
                ..RuleSpec::new(Family::V4, 104, 7)
            },
            RuleSpec { from: Some(net("fd05::/64")), ..RuleSpec::new(Family::V6, 105, 300) },
            RuleSpec { suppress_prefix_length: Some(0), ..RuleSpec::new(Family::V4, 106, MAIN_TABLE) },
            RuleSpec { suppress_prefix_length: Some(0), ..RuleSpec::new(Family::V6, 107, MAIN_TABLE) },
        ];
        for rule in &rules {
            netlink.add_rule(rule).unwrap();
            assert!(netlink.rules(Some(rule.family)).unwrap().contains(rule), "{rule:?}");
            assert_eq!(netlink.add_rule(rule).unwrap_err().raw_os_error(), Some(libc::EEXIST));
        }
        assert_eq!(netlink.rules(None).unwrap().iter().filter(|rule| rule.is_ours()).count(), rules.len());

        // A socket bound to `a` looks into table 46001, where there is a way; others find none.
        let way = RouteSpec {
            gateway: Some(ip("10.5.0.2")),
            interface: Some(a),
            table: 46_001,
            ..RouteSpec::new(net("0.0.0.0/0"))
        };
        netlink.add_route(&way).unwrap();
        netlink.del_rule(&rules[0]).unwrap();
        let to = "192.0.2.1:9".parse().unwrap();
        let mut options = crate::udp::UdpOptions::new("0.0.0.0:0".parse().unwrap());
        let free = crate::udp::UdpSocket::bind(&options).unwrap();
        assert_eq!(free.send(to, None, None, b"x").unwrap_err().raw_os_error(), Some(libc::ENETUNREACH));
        options.device = Some("a".into());
        crate::udp::UdpSocket::bind(&options).unwrap().send(to, None, None, b"x").unwrap();

        for rule in &rules[1..] {
            netlink.del_rule(rule).unwrap();
        }
        assert_eq!(netlink.rules(None).unwrap(), before);
        assert!(netlink.del_rule(&rules[0]).is_err());
    });
}

/// A monitor whose changes are looked through one by one.
struct Watch {
    monitor: Monitor,
    pending: std::collections::VecDeque<Change>,
}

impl Watch {
    fn new(monitor: Monitor) -> Watch {
        Watch { monitor, pending: std::collections::VecDeque::new() }
    }

    /// Goes on to the next change that fits.
    fn next(&mut self, what: &str, fits: impl Fn(&Change) -> bool) -> Change {
        let epoll = crate::event::Epoll::new().unwrap();
        epoll.add(&self.monitor, 0, crate::event::Interest::Read).unwrap();
        let end = Instant::now() + Duration::from_secs(5);
        let mut ready = Vec::new();
        loop {
            while let Some(change) = self.pending.pop_front() {
                if fits(&change) {
                    return change;
                }
            }
            assert!(Instant::now() < end, "no {what}");
            epoll.wait(&mut ready, Some(Duration::from_millis(100))).unwrap();
            self.pending.extend(self.monitor.read().unwrap());
        }
    }
}

#[test]
fn the_monitor_sees_carrier_loss_addresses_routes_rules_and_deletion() {
    isolated(|| {
        let mut watch = Watch::new(Monitor::open().unwrap());
        assert_eq!(watch.monitor.read().unwrap(), []);
        let (netlink, a, b) = cable();
        let is_a = |link: &Link| link.index == a;
        watch.next(
            "carrier",
            |change| matches!(change, Change::Link(link) if is_a(link) && link.up && link.carrier),
        );
        // The cable is pulled at the other end.
        netlink.set_up(b, false).unwrap();
        let change = watch.next(
            "carrier loss",
            |change| matches!(change, Change::Link(link) if is_a(link) && !link.carrier),
        );
        assert!(matches!(change, Change::Link(link) if link.up && link.name == "a"));
        netlink.set_up(b, true).unwrap();
        watch.next(
            "carrier again",
            |change| matches!(change, Change::Link(link) if is_a(link) && link.carrier),
        );

        // DHCP gives another address.
        netlink.del_address(a, net("10.5.0.1/24")).unwrap();
        netlink.add_address(a, net("10.5.0.7/24")).unwrap();
        watch.next("old address gone", |change| {
            matches!(change, Change::AddressGone(one) if one.index == a && one.net == net("10.5.0.1/24"))
        });
        watch.next("new address", |change| {
            matches!(change, Change::Address(one) if one.index == a && one.net == net("10.5.0.7/24"))
        });
        netlink.add_address(a, net("fd05::7/64")).unwrap();
        watch.next(
            "new IPv6 address",
            |change| matches!(change, Change::Address(one) if one.net == net("fd05::7/64") && !one.tentative),
        );

        let route = RouteSpec {
            gateway: Some(ip("10.5.0.2")),
            interface: Some(a),
            table: 500,
            ..RouteSpec::new(net("0.0.0.0/0"))
        };
        netlink.add_route(&route).unwrap();
        watch.next("route", |change| matches!(change, Change::Route(one) if one.spec == route));
        netlink.del_route(&route).unwrap();
        watch.next("route gone", |change| matches!(change, Change::RouteGone(one) if one.spec == route));
        for family in [Family::V4, Family::V6] {
            let rule = RuleSpec::new(family, 55, 500);
            netlink.add_rule(&rule).unwrap();
            watch.next("rule", |change| *change == Change::Rule(rule.clone()));
            netlink.del_rule(&rule).unwrap();
            watch.next("rule gone", |change| *change == Change::RuleGone(rule.clone()));
        }
        netlink.delete_link(a).unwrap();
        watch.next("link gone", |change| matches!(change, Change::LinkGone(link) if is_a(link)));
    });
}

#[test]
fn too_many_changes_at_once_ask_for_a_new_look() {
    isolated(|| {
        let (netlink, a, _) = cable();
        let mut monitor = Monitor::open().unwrap();
        monitor.set_buffer(4096).unwrap();
        for number in 0..200 {
            netlink.add_address(a, net(&format!("10.6.{number}.1/24"))).unwrap();
        }
        let mut changes = monitor.read().unwrap();
        while !changes.contains(&Change::Resync) {
            let more = monitor.read().unwrap();
            assert!(!more.is_empty(), "changes were lost silently");
            changes = more;
        }
        assert_eq!(changes[0], Change::Resync);
        // It goes on afterwards.
        monitor.read().unwrap();
        netlink.add_address(a, net("10.7.0.1/24")).unwrap();
        Watch::new(monitor).next(
            "address after the gap",
            |change| matches!(change, Change::Address(one) if one.net == net("10.7.0.1/24")),
        );
    });
}

#[test]
fn a_monitor_watches_another_namespace_and_many_routes_are_listed() {
    isolated(|| {
        let other = Namespace::create().unwrap();
        let mut watch = Watch::new(Monitor::open_in(&other).unwrap());
        let there = Netlink::open_in(&other).unwrap();
        there.add_veth("c", "d", None).unwrap();
        watch.next("link", |change| matches!(change, Change::Link(link) if link.name == "c"));
        let c = index(&there, "c");
        there.set_up(c, true).unwrap();
        // More than one datagram of the kernel.
        for number in 0..1000u32 {
            let dst = format!("10.{}.{}.0/24", number / 250 + 100, number % 250);
            let spec = RouteSpec { interface: Some(c), table: 1000, ..RouteSpec::new(net(&dst)) };
            there.add_route(&spec).unwrap();
        }
        let routes = there.routes(Some(Family::V4)).unwrap();
        assert_eq!(routes.iter().filter(|route| route.spec.table == 1000).count(), 1000);
        assert!(routes.iter().filter(|route| route.is_ours()).all(|route| route.dead));
    });
}

#[test]
fn neighbors_are_looked_for_found_missed_and_forgotten() {
    isolated(|| {
        let other = Namespace::create().unwrap();
        // Without it neighbors are asked for only when the link-local address has been proved: in two seconds.
        let hurry = || crate::netns::set_sysctl("net.ipv6.conf.default.dad_transmits", "0").unwrap();
        hurry();
        other.run(hurry).unwrap();
        let netlink = Netlink::open().unwrap();
        netlink.add_veth("n", "m", Some(other.as_fd())).unwrap();
        let there = Netlink::open_in(&other).unwrap();
        for (netlink, name, last) in [(&there, "m", 2), (&netlink, "n", 1)] {
            let index = index(netlink, name);
            netlink.add_address(index, net(&format!("10.5.0.{last}/24"))).unwrap();
            netlink.add_address(index, net(&format!("fd05::{last}/64"))).unwrap();
            netlink.set_up(index, true).unwrap();
        }
        let mac = there.link("m").unwrap().unwrap().mac;
        let n = index(&netlink, "n");
        crate::netns::set_sysctl("net.ipv4.neigh.n.retrans_time_ms", "20").unwrap();
        let mut monitor = NeighborMonitor::open().unwrap();
        let mut next = |address: IpAddr, fits: &dyn Fn(&NeighborChange) -> bool| {
            let end = Instant::now() + Duration::from_secs(5);
            loop {
                for change in monitor.read().unwrap() {
                    let (NeighborChange::Changed(one) | NeighborChange::Gone(one)) = change else {
                        continue;
                    };
                    if one.ip == address && one.index == n && fits(&change) {
                        return one;
                    }
                }
                assert!(Instant::now() < end, "nothing about {address}");
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        for address in ["10.5.0.2", "fd05::2"].map(ip) {
            netlink.probe_neighbor(n, address).unwrap();
            let found = next(
                address,
                &|change| matches!(change, NeighborChange::Changed(one) if one.state == NeighborState::Reachable),
            );
            assert_eq!((found.mac, found.state.is_usable()), (mac, true));
            assert!(netlink.all_neighbors().unwrap().iter().any(|one| one.ip == address && one.mac == mac));
            // Once more, when it is known.
            netlink.probe_neighbor(n, address).unwrap();
        }
        netlink.probe_neighbor(n, ip("10.5.0.77")).unwrap();
        let failed = next(
            ip("10.5.0.77"),
            &|change| matches!(change, NeighborChange::Changed(one) if one.state == NeighborState::Failed),
        );
        assert_eq!((failed.mac, failed.state.is_usable()), (None, false));
        netlink.add_neighbor(n, ip("10.5.0.9"), [2, 0, 0, 0, 0, 9]).unwrap();
        assert_eq!(next(ip("10.5.0.9"), &|_| true).state, NeighborState::Fixed);
        netlink.del_neighbor(n, ip("10.5.0.9")).unwrap();
        next(ip("10.5.0.9"), &|change| matches!(change, NeighborChange::Gone(_)));
        assert!(netlink.probe_neighbor(9999, ip("10.5.0.2")).is_err());
    });
}

/// Routes that refuse, that have several ways, and IPv4 by an IPv6 router come back as they were made; rules of all kinds too.
#[test]
fn routes_and_rules_of_all_kinds_are_read() {
    isolated(|| {
        let run = |command: &str| {
            let status = std::process::Command::new("sh").args(["-ec", command]).status().unwrap();
            assert!(status.success(), "{command}");
        };
        run(
            "ip link add name v0 type veth peer name v1; ip link set v0 up; ip link set v1 up; ip addr add 10.0.0.1/24 dev v0",
        );
        run("ip route add blackhole 192.0.2.0/28 && ip route add unreachable 192.0.2.16/28 metric 7");
        run("ip route add prohibit 192.0.2.32/28 && ip route add throw 192.0.2.48/28 table 7");
        run("ip route add 198.51.100.0/24 via inet6 fe80::9 dev v0");
        run("ip route add 203.0.113.0/24 nexthop via 10.0.0.8 weight 3 nexthop via 10.0.0.9 weight 1");
        run("ip nexthop add id 1 via 10.0.0.6 dev v0 && ip nexthop add id 2 via 10.0.0.7 dev v0");
        run("ip nexthop add id 3 group 1,5/2,2 && ip route add 203.0.114.0/24 nhid 3");
        run(
            "ip route add 203.0.115.0/24 via 10.0.0.8 mtu 1300 && ip route add 203.0.116.0/24 via 10.0.0.8 mtu lock 1200",
        );
        run("ip -6 route add 2001:db8:7::/48 from 2001:db8:1::/48 dev v0");
        run("ip rule add prio 100 iif v0 ipproto udp dport 53-54 lookup 7 && ip rule add prio 101 prohibit");
        run(
            "ip rule add prio 102 goto 104 && ip rule add prio 103 tos 0x10 lookup 7 && ip rule add prio 104 nop",
        );
        let netlink = Netlink::open().unwrap();
        let routes = netlink.routes(Some(Family::V4)).unwrap();
        let of = |prefix: &str| {
            let list = routes.iter().filter(|route| route.spec.dst.to_string() == prefix);
            let text = |route: &Route| {
                let via = route.spec.gateway.map_or_else(String::new, |via| format!(" via {via}"));
                format!("{:?}{via} place {} weight {}", route.spec.kind, route.place, route.weight)
            };
            list.map(text).collect::<Vec<_>>().join(", ")
        };
        assert_eq!(of("192.0.2.0/28"), "Blackhole place 0 weight 1");
        assert_eq!(of("192.0.2.16/28"), "Unreachable place 0 weight 1");
        assert_eq!(of("192.0.2.32/28"), "Prohibit place 0 weight 1");
        assert_eq!(of("192.0.2.48/28"), "Throw place 0 weight 1");
        assert_eq!(of("198.51.100.0/24"), "Unicast via fe80::9 place 0 weight 1");
        assert_eq!(
            of("203.0.113.0/24"),
            "Unicast via 10.0.0.8 place 0 weight 3, Unicast via 10.0.0.9 place 1 weight 1"
        );
        assert_eq!(
            of("203.0.114.0/24"),
            "Unicast via 10.0.0.6 place 0 weight 5, Unicast via 10.0.0.7 place 1 weight 2"
        );
        let mtu =
            |prefix: &str| routes.iter().find(|route| route.spec.dst.to_string() == prefix).unwrap().mtu;
        let mtus = ["203.0.115.0/24", "203.0.116.0/24", "203.0.113.0/24"].map(mtu);
        assert_eq!(mtus, [Some(1300), Some(1200), None]);
        let routes = netlink.routes(Some(Family::V6)).unwrap();
        let from = routes.iter().find(|route| route.spec.dst.to_string() == "2001:db8:7::/48").unwrap().from;
        assert_eq!(from, Some("2001:db8:1::/48".parse().unwrap()));
        let rules = netlink.policy_rules().unwrap();
        let rule = |priority: u32| rules.iter().find(|rule| rule.spec.priority == priority).unwrap();
        let first = rule(100);
        assert_eq!((first.action, first.spec.iif.as_deref()), (PolicyAction::Table(7), Some("v0")));
        assert_eq!((first.protocol, first.dst_ports, first.src_ports), (Some(17), Some((53, 54)), None));
        assert_eq!(rule(101).action, PolicyAction::Refuse(RouteKind::Prohibit));
        assert_eq!(rule(102).action, PolicyAction::Goto(104));
        assert!(rule(103).special && !rule(100).special);
        assert_eq!(rule(104).action, PolicyAction::Nop);
        assert_eq!(rule(32_766).action, PolicyAction::Table(MAIN_TABLE));
    });
}

/// An attribute of a message: type, then bytes, padded.
fn attribute(kind: u16, bytes: &[u8]) -> Vec<u8> {
    let mut out = u16::try_from(bytes.len() + 4).unwrap().to_ne_bytes().to_vec();
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(bytes);
    out.resize(out.len().next_multiple_of(4), 0);
    out
}

/// A message as the kernel sends it: type, fixed part, attributes.
fn message(kind: u16, head: &[u8], attributes: &[Vec<u8>]) -> RouteNetlinkMessage {
    let body = [head, &attributes.concat()].concat();
    let mut bytes = u32::try_from(body.len() + 16).unwrap().to_ne_bytes().to_vec();
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(&[0; 10]);
    bytes.extend_from_slice(&body);
    match NetlinkMessage::<RouteNetlinkMessage>::deserialize(&bytes).unwrap().payload {
        NetlinkPayload::InnerMessage(message) => message,
        other => panic!("{other:?}"),
    }
}

/// VRFs as kernels with `CONFIG_NET_VRF` tell of them (linux/if_link.h, linux/fib_rules.h): the device with its table, a member, the rule
/// `from all lookup [l3mdev-table]`. Kernels without it have no such devices, so that only messages can be shown.
#[test]
fn messages_about_vrfs_are_read() {
    let link = |index: i32, attributes: &[Vec<u8>]| {
        // ifinfomsg: Ethernet, up and running with a carrier.
        let head =
            [&[0, 0, 1, 0][..], &index.to_ne_bytes(), &0x1_1043_u32.to_ne_bytes(), &0_u32.to_ne_bytes()]
                .concat();
        let read = message(16, &head, attributes);
        let RouteNetlinkMessage::NewLink(read) = read else { panic!("{read:?}") };
        Link::from_message(&read)
    };
    let table = attribute(1, &10_u32.to_ne_bytes());
    let info = [attribute(1, b"vrf\0"), attribute(2, &table)].concat();
    let vrf =
        link(5, &[attribute(3, b"red\0"), attribute(4, &65_575_u32.to_ne_bytes()), attribute(18, &info)]);
    assert_eq!((vrf.name.as_str(), vrf.kind.as_deref(), vrf.vrf_table), ("red", Some("vrf"), Some(10)));
    assert!(vrf.up && vrf.carrier && vrf.controller.is_none());
    let slave = [attribute(1, b"veth\0"), attribute(4, b"vrf\0"), attribute(5, &table)].concat();
    let member =
        link(6, &[attribute(3, b"eth1\0"), attribute(10, &5_u32.to_ne_bytes()), attribute(18, &slave)]);
    assert_eq!((member.controller, member.vrf_table, member.kind.as_deref()), (Some(5), None, Some("veth")));

    // fib_rule_hdr: family, lengths, tos, table 0, action 1 (look into a table).
    let rule = |family: u8| {
        let attributes = [
            attribute(15, &0_u32.to_ne_bytes()),
            attribute(14, &u32::MAX.to_ne_bytes()),
            attribute(21, &[2]),
            attribute(6, &1_000_u32.to_ne_bytes()),
            attribute(19, &[1]),
        ];
        let read = message(32, &[family, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0], &attributes);
        let RouteNetlinkMessage::NewRule(read) = read else { panic!("{read:?}") };
        PolicyRule::from_message(&read).unwrap()
    };
    for (number, family) in [(2, Family::V4), (10, Family::V6)] {
        let read = rule(number);
        assert_eq!((read.action, read.spec.priority, read.spec.family), (PolicyAction::Vrf, 1_000, family));
        assert!(!read.special && read.spec.suppress_prefix_length.is_none());
    }
}

/// A port of a bridge, and what the bridge has learnt there.
#[test]
fn a_bridge_forgets_the_stations_of_a_port() {
    isolated(|| {
        let run = |text: &str| {
            let output = std::process::Command::new("sh").args(["-c", text]).output().unwrap();
            assert!(output.status.success(), "{text}: {}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        };
        run("ip link add br0 type bridge && ip link set br0 up");
        let (netlink, a, _) = cable();
        netlink.set_controller(a, index(&netlink, "br0")).unwrap();
        netlink.set_up(a, true).unwrap();
        run("bridge fdb add 02:00:00:00:00:77 dev a master dynamic");
        let known = || run("bridge fdb show br br0").contains("02:00:00:00:00:77");
        assert!(known());
        netlink.forget_stations(a).unwrap();
        assert!(!known());
        netlink.set_controller(a, 0).unwrap();
        assert_eq!(netlink.link("a").unwrap().unwrap().controller, None);
    });
}
