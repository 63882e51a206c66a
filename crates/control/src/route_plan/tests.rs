#![allow(clippy::unwrap_used, reason = "tests")]

use std::net::SocketAddr;
use std::path::Path;

use linux::netlink::Netlink;
use linux::testing::isolated;
use linux::udp::{UdpOptions, UdpSocket};

use super::*;
use crate::config::tests::config;
use crate::kernel_routes::KernelRoutes;
use crate::wans::WanRegistry;
use crate::wans::tests::{address, link, route};

const PEER: &str =
    "[[peer]]\nname = \"hub\"\npublic-key = \"$HUB\"\nendpoints = [\"198.51.100.1:4600\"]\nallowed-ips = ";

/// Two WANs with one subnet and one gateway, as two routers of the same make have it.
fn twins() -> HostView {
    HostView {
        links: vec![link(2, "wan0"), link(3, "wan1"), link(9, "ana0")],
        addresses: vec![address(2, "192.168.8.100/24"), address(3, "192.168.8.101/24")],
        routes: vec![
            route(2, "192.168.8.0/24", None, 0),
            route(3, "192.168.8.0/24", None, 0),
            route(3, "0.0.0.0/0", Some("192.168.8.1"), 200),
            route(2, "0.0.0.0/0", Some("192.168.8.1"), 100),
        ],
        ..HostView::default()
    }
}

fn two_wans(peer: &str) -> Config {
    let wans =
        "[tun]\naddress = [\"10.77.0.1/24\"]\n[[wan]]\ninterface = \"wan0\"\n[[wan]]\ninterface = \"wan1\"\n";
    config("listen = 4600", &format!("{wans}{PEER}{peer}\n"))
}

fn plan(config: &Config, view: &HostView, outside: &[IpAddr]) -> HostPlan {
    let wans = WanRegistry::default().observe(&config.wans, &config.tun.name, view);
    let numbers = Numbers::of(&config.tun.name);
    HostPlan::new(&RouteInputs { numbers, config, view, wans: &wans, tun_index: 9, outside })
}

/// A plan as text, one entry a line, numbers of the instance as words.
fn text(plan: &HostPlan) -> Vec<String> {
    let numbers = Numbers::of("ana0");
    let table = |table: u32| match table {
        MAIN_TABLE => "main".to_owned(),
        table if table == numbers.tunnel_table() => "tunnel".to_owned(),
        table if numbers.owns_table(table) => format!("wan{}", table & 0xff),
        table => table.to_string(),
    };
    let mut lines = Vec::new();
    for spec in &plan.routes {
        let kind = if spec.kind == RouteKind::Unicast { String::new() } else { format!("{:?} ", spec.kind) };
        let via = spec.gateway.map_or_else(String::new, |gateway| format!(" via {gateway}"));
        let dev = spec.interface.map_or_else(String::new, |index| format!(" dev {index}"));
        let onlink = if spec.onlink { " onlink" } else { "" };
        lines.push(format!("{kind}{}{via}{dev} table {}{onlink}", spec.dst, table(spec.table)));
    }
    for rule in &plan.rules {
        let mut words = vec![if rule.priority == numbers.priority(Place::Behind) {
            "behind:".to_owned()
        } else {
            format!("{}:", rule.priority - numbers.priority(Place::BoundToWan))
        }];
        words.push(format!("{:?}", rule.family));
        words.extend(rule.oif.iter().map(|oif| format!("oif {oif}")));
        words.extend(rule.from.iter().map(|from| format!("from {from}")));
        if rule.mark.is_some() {
            words.push(if rule.invert { "not marked".to_owned() } else { "marked".to_owned() });
        }
        words.push(table(rule.table));
        words.extend(rule.suppress_prefix_length.iter().map(|length| format!("suppress {length}")));
        lines.push(words.join(" "));
    }
    lines
}

#[track_caller]
fn golden(plan: &HostPlan, expected: &[&str]) {
    let text = text(plan);
    assert_eq!(text, expected, "\n{}", text.join("\n"));
}

#[test]
fn two_wans_with_one_subnet_and_one_gateway() {
    golden(
        &plan(&two_wans("[\"10.77.0.2/32\", \"10.8.0.0/16\"]"), &twins(), &[]),
        &[
            "192.168.8.0/24 dev 2 table wan1",
            "0.0.0.0/0 via 192.168.8.1 dev 2 table wan1 onlink",
            "192.168.8.0/24 dev 3 table wan2",
            "0.0.0.0/0 via 192.168.8.1 dev 3 table wan2 onlink",
            "10.77.0.2/32 dev 9 table main",
            "10.8.0.0/16 dev 9 table main",
            "0: V4 oif wan0 wan1",
            "0: V6 oif wan0 wan1",
            "1: V4 from 192.168.8.100/32 marked wan1",
            "behind: V4 from 192.168.8.100/32 wan1",
            "0: V4 oif wan1 wan2",
            "0: V6 oif wan1 wan2",
            "1: V4 from 192.168.8.101/32 marked wan2",
            "behind: V4 from 192.168.8.101/32 wan2",
        ],
    );
}

#[test]
fn a_default_route_never_takes_the_tunnels_own_datagrams() {
    let config = config(
        "listen = 1",
        &format!("[tun]\naddress = [\"10.77.0.1/24\"]\n{PEER}[\"0.0.0.0/0\", \"::/0\"]\n"),
    );
    golden(
        &plan(&config, &twins(), &["192.0.2.53".parse().unwrap(), "2001:db8::53".parse().unwrap()]),
        &[
            "0.0.0.0/0 dev 9 table tunnel",
            "::/0 dev 9 table tunnel",
            "Throw 192.0.2.53/32 table tunnel",
            "Throw 2001:db8::53/128 table tunnel",
            "4: V4 main suppress 0",
            "5: V4 not marked tunnel",
            "4: V6 main suppress 0",
            "5: V6 not marked tunnel",
        ],
    );
}

#[test]
fn with_a_default_route_visitors_of_a_wan_address_get_their_answer_there() {
    let mut view = twins();
    view.addresses.truncate(1);
    let rules = text(&HostPlan { routes: vec![], ..plan(&two_wans("[\"0.0.0.0/0\"]"), &view, &[]) });
    assert_eq!(
        rules[2..5],
        [
            "1: V4 from 192.168.8.100/32 marked wan1",
            "2: V4 from 192.168.8.100/32 main suppress 0",
            "3: V4 from 192.168.8.100/32 wan1",
        ]
    );
}

#[test]
fn tables_and_off() {
    let with = |tun: &str| {
        let text =
            format!("[tun]\naddress = [\"10.77.0.1/24\"]\n{tun}\n{PEER}[\"0.0.0.0/0\", \"10.77.0.0/24\"]\n");
        config("listen = 1", &text)
    };
    golden(
        &plan(&with("table = 77"), &twins(), &[]),
        &["0.0.0.0/0 dev 9 table 77", "10.77.0.0/24 dev 9 table 77"],
    );
    golden(&plan(&with("route = \"off\""), &twins(), &[]), &[]);
    // The kernel makes the route of the interface's own network itself.
    golden(
        &plan(&with(""), &twins(), &[]),
        &["0.0.0.0/0 dev 9 table tunnel", "4: V4 main suppress 0", "5: V4 not marked tunnel"],
    );
}

#[test]
fn gateways_of_the_configuration_modems_and_families() {
    let wans = "[tun]\naddress = [\"10.77.0.1/24\"]\n[[wan]]\ninterface = \"wan0\"\ngateway = \"192.168.8.254\"\n\
                address-family = \"ipv4\"\n[[wan]]\ninterface = \"ppp0\"\n[[wan]]\ninterface = \"gone\"\n";
    let config = config("listen = 1", &format!("{wans}{PEER}[]\n"));
    let mut view = twins();
    view.links[1] = link(3, "ppp0");
    view.addresses[1] = address(3, "100.64.0.5/32");
    view.routes = vec![
        route(2, "192.168.8.0/24", None, 0),
        route(2, "0.0.0.0/0", Some("192.168.8.1"), 100),
        route(2, "::/0", Some("fe80::1"), 100),
    ];
    golden(
        &plan(&config, &view, &[]),
        &[
            "192.168.8.0/24 dev 2 table wan1",
            "0.0.0.0/0 via 192.168.8.254 dev 2 table wan1 onlink",
            "0.0.0.0/0 dev 3 table wan2",
            "0: V4 oif wan0 wan1",
            "1: V4 from 192.168.8.100/32 marked wan1",
            "behind: V4 from 192.168.8.100/32 wan1",
            "0: V4 oif ppp0 wan2",
            "0: V6 oif ppp0 wan2",
            "1: V4 from 100.64.0.5/32 marked wan2",
            "behind: V4 from 100.64.0.5/32 wan2",
        ],
    );
}

#[test]
fn a_full_internet_table_is_not_copied() {
    let mut view = twins();
    for number in 0..5000u32 {
        let net = Ipv4Net::new(((11 << 24) | (number << 8)).into(), 24).unwrap();
        view.routes.push(route(2, &net.to_string(), Some("192.168.8.1"), 0));
    }
    let plan = plan(&two_wans("[]"), &view, &[]);
    let of_wan0 = plan.routes.iter().filter(|route| route.interface == Some(2)).count();
    assert_eq!(of_wan0, ROUTES_PER_WAN_MAX);
    assert!(plan.routes.iter().any(|route| route.dst.prefix_len() == 0 && route.interface == Some(2)));
}

#[test]
fn numbers_of_instances_do_not_meet() {
    let mut slots: Vec<u32> = (0..200).map(|number| Numbers::of(&format!("ana{number}")).slot).collect();
    slots.sort_unstable();
    slots.dedup();
    assert_eq!(slots.len(), 200);
    for name in ["", "7", "ana", "ana4294967296", "wg0", "tunnel-to-hub"] {
        let numbers = Numbers::of(name);
        assert_ne!(numbers.mark(), 0);
        assert!(numbers.owns_table(numbers.wan_table(64)) && numbers.owns_table(numbers.tunnel_table()));
        assert!(numbers.priority(Place::Tunnel) < 32_766 && numbers.priority(Place::Behind) > 32_767);
        assert!(numbers.owns_priority(numbers.priority(Place::Behind)));
        assert!(numbers.owns_priority(numbers.priority(Place::BoundToWan)));
        assert!(numbers.owns_priority(numbers.priority(Place::Tunnel)));
    }
    let (one, other) = (Numbers::of("ana0"), Numbers::of("ana1"));
    assert!(!one.owns_table(other.tunnel_table()) && !one.owns_priority(other.priority(Place::BoundToWan)));
}

#[test]
fn differences_see_through_the_kernels_habits() {
    let wanted = HostPlan {
        routes: vec![
            RouteSpec { interface: Some(2), ..RouteSpec::new("fd00::/64".parse().unwrap()) },
            RouteSpec { kind: RouteKind::Throw, ..RouteSpec::new("2001:db8::53/128".parse().unwrap()) },
        ],
        rules: vec![],
    };
    let mut found = wanted.clone();
    found.routes[0].metric = 1024;
    found.routes[1].metric = 1024;
    found.routes[1].interface = Some(1);
    assert_eq!(wanted.difference(&found), RouteChanges::default());
    found.routes[0].interface = Some(3);
    let changes = wanted.difference(&found);
    assert_eq!((changes.add.routes.len(), changes.remove.routes.len()), (1, 1));
}

/// A namespace with two veth WANs of the same subnet, each with a default route over the same gateway.
fn twin_interfaces(netlink: &Netlink) -> [u32; 2] {
    [(0u8, 100), (1, 200)].map(|(number, metric)| {
        let (name, far) = (format!("wan{number}"), format!("far{number}"));
        netlink.add_veth(&name, &far, None).unwrap();
        let index = netlink.link(&name).unwrap().unwrap().index;
        netlink.set_up(netlink.link(&far).unwrap().unwrap().index, true).unwrap();
        netlink.add_address(index, format!("192.168.8.{}/24", 100 + number).parse().unwrap()).unwrap();
        netlink.add_address(index, format!("2001:db8:{number}::2/64").parse().unwrap()).unwrap();
        netlink.set_up(index, true).unwrap();
        let default = RouteSpec {
            gateway: Some("192.168.8.1".parse().unwrap()),
            interface: Some(index),
            metric,
            ..RouteSpec::new("0.0.0.0/0".parse().unwrap())
        };
        netlink.add_route(&default).unwrap();
        index
    })
}

/// Which source address the kernel would take to `to`, for a socket with this device and mark.
fn source(to: &str, device: Option<&str>, mark: u32) -> Option<IpAddr> {
    let to: SocketAddr = to.parse().unwrap();
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let options =
        UdpOptions { device: device.map(str::to_owned), mark, ..UdpOptions::new(any.parse().unwrap()) };
    let socket = UdpSocket::bind(&options).unwrap();
    rustix::net::connect(&socket, &to).ok()?;
    Some(SocketAddr::try_from(rustix::net::getsockname(&socket).unwrap()).unwrap().ip())
}

fn ours(netlink: &Netlink) -> usize {
    // The default routes of the WANs were made with the same protocol number, by this test.
    let of_wan = |route: &Route| route.spec.table == MAIN_TABLE && route.spec.dst.prefix_len() == 0;
    let routes = netlink.routes(None).unwrap();
    let routes = routes.iter().filter(|route| route.is_ours() && !of_wan(route)).count();
    routes + netlink.rules(None).unwrap().iter().filter(|rule| rule.is_ours()).count()
}

/// With everything in place: who goes through the tunnel, and who does not.
fn packets_go_where_they_should(mark: u32) {
    let tunnel: IpAddr = "10.77.0.1".parse().unwrap();
    let (first, second): (IpAddr, IpAddr) =
        ("192.168.8.100".parse().unwrap(), "192.168.8.101".parse().unwrap());
    let hub = "198.51.100.1:4600";
    assert_eq!(source(hub, None, 0), Some(tunnel), "everybody goes through the tunnel");
    assert_eq!(source(hub, None, mark), Some(first), "the tunnel itself does not");
    assert_eq!(source(hub, Some("wan0"), mark), Some(first));
    assert_eq!(source(hub, Some("wan1"), mark), Some(second));
    assert_eq!(source("192.168.8.7:1", Some("wan1"), mark), Some(second), "also within the subnet");
    assert_eq!(source("192.0.2.53:53", None, 0), Some(first), "name servers stay reachable");
    assert_eq!(source("10.8.1.1:1", None, 0), Some(tunnel));
    assert_eq!(source("[2001:db8:1::9]:1", Some("wan1"), 0), Some("2001:db8:1::2".parse().unwrap()));
}

/// The same in a real kernel: every route and rule is accepted, read back as the same, does its work, and goes again.
#[test]
fn the_kernel_agrees() {
    isolated(|| {
        let netlink = Netlink::open().unwrap();
        let [wan0, wan1] = twin_interfaces(&netlink);
        // A veth in place of the TUN: routes do not care.
        netlink.add_veth("ana0", "far", None).unwrap();
        let tun = netlink.link("ana0").unwrap().unwrap().index;
        netlink.set_up(netlink.link("far").unwrap().unwrap().index, true).unwrap();
        let config = two_wans("[\"0.0.0.0/0\", \"::/0\", \"10.8.0.0/16\"]");
        let numbers = Numbers::of("ana0");
        let socket = std::env::temp_dir().join(format!("anabranch-plan-{}.sock", std::process::id()));
        let mut host = KernelRoutes::open(numbers, &socket).unwrap();
        host.set_up_tun(tun, &config.tun, &config.tun.addresses).unwrap();
        let apply = |host: &mut KernelRoutes| {
            let view = HostView::read(&netlink).unwrap();
            let wans = WanRegistry::default().observe(&config.wans, "ana0", &view);
            assert!(wans.iter().all(|live| live.wan.up), "{wans:?}");
            let outside = &["192.0.2.53".parse().unwrap(), "2001:db8:5::53".parse().unwrap()];
            let plan = HostPlan::new(&RouteInputs {
                numbers,
                config: &config,
                view: &view,
                wans: &wans,
                tun_index: tun,
                outside,
            });
            (plan.routes.len() + plan.rules.len(), host.apply(&plan))
        };
        let (wanted, changed) = apply(&mut host);
        assert_eq!(changed, wanted);
        assert_eq!(ours(&netlink), wanted);
        // Looking again changes nothing but for what the kernel itself has made meanwhile: link-local networks.
        let (wanted_now, changed) = apply(&mut host);
        assert_eq!(changed, wanted_now - wanted);

        packets_go_where_they_should(numbers.mark());

        reverse_path_is_loosened(&mut host);

        // The kernel drops an interface's routes with the interface; the next look repairs it.
        netlink.set_up(wan1, false).unwrap();
        netlink.set_up(wan1, true).unwrap();
        let default = RouteSpec {
            gateway: Some("192.168.8.1".parse().unwrap()),
            interface: Some(wan1),
            metric: 200,
            ..RouteSpec::new("0.0.0.0/0".parse().unwrap())
        };
        netlink.add_route(&default).unwrap();
        netlink.add_address(wan1, "2001:db8:1::2/64".parse().unwrap()).unwrap();
        assert!(apply(&mut host).1 > 0);
        packets_go_where_they_should(numbers.mark());
        assert_eq!(netlink.link_by_index(wan0).unwrap().unwrap().name, "wan0");

        host.clear();
        assert_eq!(std::fs::read_to_string(REVERSE_PATH_FILTER).unwrap().trim(), "1");
        apply(&mut host);

        // A reload makes one of them lead outside.
        host.ignore_router_advertisements(&["wan0".to_owned(), "wan1".to_owned()].into());
        assert_eq!(believed(), ["0", "0"]);
        host.ignore_router_advertisements(&["wan1".to_owned()].into());
        assert_eq!(believed(), ["1", "0"]);
        host.ignore_router_advertisements(&["wan0".to_owned(), "wan1".to_owned()].into());

        // Killed here.
        std::mem::forget(host);
        leftovers_are_cleaned_up(&netlink, numbers, tun, &socket);
    });
}

/// Of the second WAN.
const REVERSE_PATH_FILTER: &str = "/proc/sys/net/ipv4/conf/wan1/rp_filter";

/// Strict reverse-path filters would drop what comes in over the second WAN.
fn reverse_path_is_loosened(host: &mut KernelRoutes) {
    let wans = ["wan1".to_owned(), "nosuchwan".to_owned()].into();
    // Again: `systemd-sysctl` writes its files anew, or the device goes and comes back.
    for _ in 0..2 {
        std::fs::write(REVERSE_PATH_FILTER, "1").unwrap();
        host.loosen_reverse_path(&wans);
        assert_eq!(std::fs::read_to_string(REVERSE_PATH_FILTER).unwrap().trim(), "2");
    }
}

/// Whether router advertisements are believed.
fn believed() -> [String; 2] {
    ["wan0", "wan1"].map(|name| linux::netns::sysctl(&format!("net.ipv6.conf.{name}.accept_ra")).unwrap())
}

/// A later instance with the same name cleans up, one with another name leaves it alone.
fn leftovers_are_cleaned_up(netlink: &Netlink, numbers: Numbers, tun: u32, socket: &Path) {
    drop(KernelRoutes::open(Numbers::of("ana1"), &socket.with_file_name("anabranch-another.sock")).unwrap());
    assert!(ours(netlink) > 10);
    assert_eq!(believed(), ["0", "0"]);
    let mut next = KernelRoutes::open(numbers, socket).unwrap();
    next.ignore_router_advertisements(&["wan1".to_owned()].into());
    assert_eq!(believed(), ["1", "0"], "what is wanted no more is as it was, after a death too");
    drop(next);
    assert_eq!(believed(), ["1", "1"]);
    assert_eq!(source("198.51.100.1:4600", None, 0), Some("192.168.8.100".parse().unwrap()));
    // What remains hangs on the TUN interface and goes with it.
    netlink.delete_link(tun).unwrap();
    assert_eq!(ours(netlink), 0);
}
