#![allow(clippy::unwrap_used, reason = "tests")]

use std::process::Command;

use linux::netlink::Netlink;
use linux::testing::isolated;

use super::*;
use crate::config::tests::config;
use crate::wans::tests::{link, route};

fn view(routes: &[&str]) -> HostView {
    HostView {
        links: vec![link(2, "eth0")],
        addresses: Vec::new(),
        routes: routes.iter().map(|net| route(2, net, None, 0)).collect(),
        ..HostView::default()
    }
}

#[test]
fn a_default_route_that_only_forwarded_packets_have_is_told() {
    let of = |rest: &str, routes: &[&str]| {
        let text = format!(
            "[[interface]]\nname = \"wan\"\ndevice = \"eth0\"\naddress = \"203.0.113.1/24\"\n[[route]]\nto = \
             \"0.0.0.0/0\"\nvia = \"203.0.113.254\"\n{rest}"
        );
        missing_defaults(&config("listen = 4600", &text), &view(routes))
    };
    let told = of("", &["10.0.0.0/8", "::/0"]);
    assert_eq!(told.len(), 1);
    assert!(told[0].1.contains("ip route add default via 203.0.113.254"), "{told:?}");
    assert_eq!(of("", &["0.0.0.0/0"]), []);
    let peer = "[[peer]]\nname = \"hub\"\npublic-key = \"$HUB\"\nallowed-ips = [\"0.0.0.0/0\"]\n";
    assert_eq!(of(peer, &[]), []);
}

/// Packets out of the TUN interface seem to come from the wrong side, and a strict filter for all would drop it; so
/// does any filter on an interface without an address.
#[test]
fn the_hosts_packets_pass_a_strict_reverse_path_filter() {
    isolated(|| {
        let netlink = Netlink::open().unwrap();
        // A veth in place of the TUN.
        netlink.add_veth("ana0", "far", None).unwrap();
        let tun = netlink.link("ana0").unwrap().unwrap().index;
        std::fs::write("/proc/sys/net/ipv4/conf/all/rp_filter", "1").unwrap();
        let config = config("listen = 4600", "[[interface]]\nname = \"wan\"\ndevice = \"eth0\"\n");
        let socket = std::env::temp_dir().join(format!("anabranch-node-{}.sock", std::process::id()));
        let mut host = KernelRoutes::open(Numbers::of("ana0"), &socket).unwrap();
        host.set_up_tun(tun, &config.tun, &policy::tun_addresses(&config)).unwrap();
        host.loosen_reverse_path(&["ana0".to_owned()].into());
        let read = || std::fs::read_to_string("/proc/sys/net/ipv4/conf/ana0/rp_filter").unwrap();
        assert_eq!(read().trim(), "2");
        let output = Command::new("ip").args(["-4", "address", "show", "ana0"]).output().unwrap();
        assert!(String::from_utf8_lossy(&output.stdout).contains("192.0.0.8/32"));
        // The kernel's own judgement: would it take a packet from far away there?
        netlink.set_up(netlink.link("far").unwrap().unwrap().index, true).unwrap();
        netlink.add_veth("eth0", "beyond", None).unwrap();
        for name in ["eth0", "beyond"] {
            netlink.set_up(netlink.link(name).unwrap().unwrap().index, true).unwrap();
        }
        let eth0 = netlink.link("eth0").unwrap().unwrap().index;
        netlink.add_address(eth0, "203.0.113.1/24".parse().unwrap()).unwrap();
        let asked = || {
            let question = ["route", "get", "203.0.113.1", "from", "203.0.113.9", "iif", "ana0"];
            Command::new("ip").args(question).output().unwrap().status.success()
        };
        assert!(asked());
        std::fs::write("/proc/sys/net/ipv4/conf/ana0/rp_filter", "1").unwrap();
        assert!(!asked());
        std::fs::write("/proc/sys/net/ipv4/conf/ana0/rp_filter", "2").unwrap();
        host.set_addresses(&[]).unwrap();
        assert!(!asked(), "without an address");
        host.clear();
        assert_eq!(read().trim(), "0", "as it was");
    });
}
