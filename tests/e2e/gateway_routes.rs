//! Routes of the kernel: those that refuse, rules and tables, ways that go back, and what changes under live flows.

use std::time::{Duration, Instant};

use crate::gateway_scene::*;
use crate::machine::{alone, isolated};
use crate::scene::*;

/// The same server stands in networks 2 and 3, and says in which one it was reached.
const SERVER: &str = "198.51.100.7";

/// Three networks: clients in 1, and [`SERVER`] in 2 and 3, to which the gateway has a route by 2.
fn two_ways() -> (Lans, [Mirror; 2]) {
    let lans = Lans::new(3);
    let mirrors = [2, 3].map(|number| {
        shell(lans.host(number), &format!("ip address add {SERVER}/32 dev lo"));
        Mirror::start(lans.host(number), &format!("in{number}"), &format!("{SERVER}:80"))
    });
    shell(lans.gateway(), "ip route add 198.51.100.0/24 via 10.1.2.2");
    (lans, mirrors)
}

/// Where the server is reached, from a port that no flow has yet.
fn reached(lans: &Lans) -> Option<String> {
    UdpClient::new(lans.host(1), "0.0.0.0:0").try_ask(&format!("{SERVER}:80"), 16).map(|answer| answer.name)
}

/// A change of the kernel's routes counts for new flows within 0.2 s.
#[track_caller]
fn soon_reached(lans: &Lans, command: &str, wanted: &str) {
    shell(lans.gateway(), command);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(reached(lans).as_deref(), Some(wanted), "after {command}");
}

/// Rules, tables, next hop objects, IPv6 routers of IPv4: packets go where the kernel's would.
#[test]
fn r4_rules_tables_and_next_hops_of_the_kernel_count() {
    let _alone = alone();
    isolated(|| {
        let (lans, _mirrors) = two_ways();
        let _gateway = lans.start(ALLOW);
        assert_eq!(reached(&lans).as_deref(), Some("in2"));
        shell(lans.gateway(), "ip route add 198.51.100.0/24 via 10.1.3.2 table 100");
        soon_reached(&lans, "ip rule add from 10.1.1.0/24 lookup 100 priority 1000", "in3");
        soon_reached(&lans, "ip rule del priority 1000", "in2");
        soon_reached(&lans, "ip rule add iif lan1 lookup 100 priority 1000", "in3");
        soon_reached(&lans, "ip rule add to 198.51.100.0/24 lookup main priority 900", "in2");
        shell(lans.gateway(), "ip rule del priority 900; ip rule del priority 1000");
        soon_reached(&lans, "ip route replace 198.51.100.0/24 via 10.1.3.2", "in3");
        soon_reached(&lans, "ip route add 198.51.100.7 via 10.1.2.2 metric 5", "in2");
        soon_reached(&lans, "ip route add 198.51.100.7 via 10.1.3.2 metric 4", "in3");
        shell(lans.gateway(), "ip route flush 198.51.100.7");
        shell(lans.gateway(), "ping -6 -c 1 -W 2 fd00:1:2::2");
        soon_reached(&lans, "ip route replace 198.51.100.0/24 via inet6 fd00:1:2::2 dev lan2", "in2");
        shell(
            lans.gateway(),
            "ip nexthop add id 1 via 10.1.2.2 dev lan2; ip nexthop add id 2 via 10.1.3.2 dev lan3",
        );
        shell(lans.gateway(), "ip nexthop add id 3 group 1/2; ip route replace 198.51.100.0/24 nhid 3");
        std::thread::sleep(Duration::from_millis(200));
        let names: std::collections::BTreeSet<_> = (0..24).filter_map(|_| reached(&lans)).collect();
        assert_eq!(names.into_iter().collect::<Vec<_>>(), ["in2", "in3"], "flows are spread");
        soon_reached(&lans, "ip nexthop replace id 3 group 2", "in3");
    });
}

/// RFC 1812 §5.2.7.1, RFC 4443 §3.1: who sends where no route leads is told so at once; a black hole is silent.
#[test]
fn r4_routes_that_refuse_are_the_kernels() {
    isolated(|| {
        let (lans, _mirrors) = two_ways();
        for kind in
            ["blackhole 198.51.100.16/28", "unreachable 198.51.100.32/28", "prohibit 198.51.100.48/28"]
        {
            shell(lans.gateway(), &format!("ip route add {kind}"));
        }
        shell(lans.gateway(), "ip -6 route add prohibit 2001:db8:8::/48");
        let gateway = lans.start(&format!("{ALLOW}[[nat]]\nout = \"lan2\"\n"));
        let said = |address: &str| {
            let begin = Instant::now();
            let text = try_shell(lans.host(1), &format!("ping -c 1 -W 2 {address} 2>&1 || true")).unwrap();
            (text, begin.elapsed())
        };
        for (address, wanted) in [
            ("198.51.100.33", "Destination Host Unreachable"),
            ("198.51.100.49", "Packet filtered"),
            ("203.0.113.1", "Destination Net Unreachable"),
            ("2001:db8:8::1", "Administratively prohibited"),
            ("2001:db8:9::1", "No route"),
        ] {
            let (text, elapsed) = said(address);
            assert!(text.contains(wanted) && elapsed < Duration::from_millis(1_500), "{elapsed:?} {text}");
        }
        let (text, _) = said("198.51.100.17");
        assert!(text.contains("100% packet loss") && !text.contains("From"), "{text}");
        assert!(dropped(&gateway, "route-blackhole") > 0 && dropped(&gateway, "no-route") > 0);
        // Nobody has that address: once the kernel knows it, clients behind the NAT are told at once.
        wait_for("the dead neighbor is told", PATIENCE, || said("10.1.2.77").0.contains("Host Unreachable"));
    });
}

/// RFC 1812 §5.2.7.2: what leaves where it came from passes, and its sender is told the shorter way.
#[test]
fn r4_a_second_router_of_the_same_network_is_told() {
    isolated(|| {
        let lans = Lans::new(1);
        let host = lans.host(1);
        shell(lans.gateway(), "ip route add 10.9.0.0/24 via 10.1.1.9");
        let _gateway = lans.start(ALLOW);
        let text = try_shell(host, "ping -c 2 -i 0.3 -W 1 10.9.0.5 2>&1 || true").unwrap();
        assert!(text.contains("Redirect Host") && text.contains("10.1.1.9"), "{text}");
    });
}

/// Routes with an MTU of their own, and IPv6 routes for some sources only, are the kernel's.
#[test]
fn r4_routes_with_an_mtu_and_for_sources() {
    isolated(|| {
        let lans = Lans::new(3);
        let (host, place) = (lans.host(1), lans.gateway());
        shell(lans.host(2), &format!("ip address add {SERVER}/32 dev lo"));
        for number in [2, 3] {
            shell(lans.host(number), "ip -6 address add 2001:db8:7::7/128 dev lo nodad");
        }
        let _mirrors = [2, 3]
            .map(|number| Mirror::start(lans.host(number), &format!("in{number}"), "[2001:db8:7::7]:80"));
        shell(place, "ip route add 198.51.100.0/24 via 10.1.2.2 mtu 1300");
        shell(host, "ip -6 address add fd00:1:1:7::2/64 dev eth0 nodad");
        shell(place, "ip -6 address add fd00:1:1:7::1/64 dev lan1 nodad");
        for (from, router, device) in
            [("fd00:1:1::/64", "fd00:1:2::2", "lan2"), ("fd00:1:1:7::/64", "fd00:1:3::2", "lan3")]
        {
            shell(place, &format!("ip -6 route add 2001:db8:7::/48 from {from} via {router} dev {device}"));
        }
        let _gateway = lans.start(ALLOW);
        let error = try_shell(host, &format!("ping -n -c 2 -W 2 -M do -s 1400 {SERVER}")).unwrap_err();
        assert!(error.contains("mtu = 1300") || error.contains("mtu=1300"), "{error}");
        for (from, name) in [("fd00:1:1::2", "in2"), ("fd00:1:1:7::2", "in3")] {
            let client = UdpClient::new(host, &format!("[{from}]:0"));
            let answer = client.try_ask("[2001:db8:7::7]:80", 16);
            assert_eq!(answer.map(|answer| answer.name).as_deref(), Some(name), "from {from}");
        }
    });
}

/// RFC 6691, RFC 2923: full segments fit both links.
#[test]
fn c2_the_mss_is_that_of_the_smaller_link() {
    isolated(|| {
        let lans = Lans::new(2);
        let _mirror = Mirror::start(lans.host(2), "server", "[::]:80");
        shell(lans.gateway(), "ip link set lan2 mtu 1400");
        let _gateway = lans.start(&format!("{ALLOW}[[nat]]\nout = \"lan2\"\n"));
        for (to, wanted) in [("10.1.2.2:80", "mss:1348"), ("[fd00:1:2::2]:80", "mss:1328")] {
            let mut talk = Talk::open(lans.host(1), to).unwrap();
            // Of both ends, without 12 bytes of time stamps. Nothing was too big yet, so the SYNs have told it.
            for number in [1, 2] {
                let text =
                    shell(lans.host(number), "ss -tinH state established '( sport = :80 or dport = :80 )'");
                assert!(text.contains(wanted), "host {number}: {text}");
            }
            talk.echo(100_000).unwrap();
        }
        // By a router's advertisement or by hand IPv6 has a lesser one of its own.
        shell(lans.gateway(), "sysctl -qw net.ipv6.conf.lan2.mtu=1300");
        let told = || {
            shell(lans.host(1), "ip -6 route flush cache");
            shell(lans.host(1), "ping -6 -c1 -W1 -M do -s 1320 fd00:1:2::2 2>&1 || true").contains("mtu=1300")
        };
        wait_for("too big for IPv6 is told", PATIENCE, told);
        shell(lans.host(1), "ip -6 route flush cache");
        for (to, wanted) in [("10.1.2.2:80", "mss:1348"), ("[fd00:1:2::2]:80", "mss:1228")] {
            let talk = Talk::open(lans.host(1), to).unwrap();
            let text = shell(lans.host(2), "ss -tinH state established sport = :80");
            assert!(text.contains(wanted), "{text}");
            drop(talk);
        }
    });
}

/// The way out gets another address, soon after the start: connections that cannot go on are ended now, UDP goes on with the
/// new one.
#[test]
fn c2_flows_of_an_address_that_is_gone_end_now() {
    isolated(|| {
        let lans = Lans::new(2);
        lans.no_default_route(2);
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        let _gateway = lans.start(&format!("{ALLOW}[[nat]]\nout = \"lan2\"\n"));
        let mut talk = Talk::open(lans.host(1), "10.1.2.2:80").unwrap();
        let udp = UdpClient::new(lans.host(1), "0.0.0.0:0");
        assert_eq!(udp.ask("10.1.2.2:80", 16).source.ip(), gateway_ip(2));
        shell(lans.gateway(), "ip address del 10.1.2.1/24 dev lan2; ip address add 10.1.2.77/24 dev lan2");
        std::thread::sleep(Duration::from_millis(200));
        let source = udp.try_ask("10.1.2.2:80", 16).map(|answer| answer.source.ip().to_string());
        assert_eq!(source.as_deref(), Some("10.1.2.77"));
        let begin = Instant::now();
        let error = talk.echo(100).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
        assert_eq!(ask_tcp(lans.host(1), "10.1.2.2:80").source.ip().to_string(), "10.1.2.77");
    });
}

/// RFC 4861 §6.2.7: a host inside that claims to be a router becomes nobody's way out.
#[test]
fn r4_a_router_advertisement_from_inside_is_not_believed() {
    isolated(|| {
        let (lans, _mirrors) = two_ways();
        shell(lans.gateway(), "ip route add default via 10.1.2.2 metric 100");
        let accepts = || {
            shell(
                lans.gateway(),
                "cat /proc/sys/net/ipv6/conf/lan1/accept_ra /proc/sys/net/ipv6/conf/lan2/accept_ra",
            )
        };
        let before = accepts();
        let gateway = lans.start(&format!("{ALLOW}[[nat]]\nout = \"lan2\"\n"));
        wait_for("lan1 believes nobody", PATIENCE, || accepts().starts_with('0'));
        assert_eq!(accepts().lines().nth(1), before.lines().nth(1));
        // What a program of the host's has believed all the same.
        shell(
            lans.gateway(),
            "ip route del 198.51.100.0/24; ip route add default via 10.1.1.2 metric 1 proto dhcp",
        );
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(reached(&lans).as_deref(), Some("in2"));
        assert_eq!(gateway.command(&["stop"]).0, 0);
        wait_for("it is as before", PATIENCE, || accepts() == before);
    });
}
