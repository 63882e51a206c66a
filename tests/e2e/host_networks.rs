//! Networks as hosts are in them: behind a NAT64, a WAN that the LAN uses beside the tunnel, a LAN that is a bridge, a second router.

use std::io::Write;
use std::net::{Ipv4Addr, Ipv6Addr, TcpStream};
use std::process::Command;
use std::time::Duration;

use testbed::topology::{Node, Site};

use crate::gateway_scene::{ALLOW, Lans, Mirror, Talk, try_shell};
use crate::host_daemons::{self, documented};
use crate::machine::isolated;
use crate::names::NameServer;
use crate::scene::*;

fn shell(place: &Node, text: &str) {
    let mut command = Command::new("sh");
    command.args(["-c", text]);
    place.output(command).unwrap();
}

/// Row T1: a WAN with IPv6 alone and an endpoint that is an IPv4 address. The network's name server shows the prefix of its
/// NAT64 (RFC 7050). The hub itself has the translated address: that stands for the translator.
#[test]
fn t1_an_ipv4_endpoint_is_reached_through_nat64() {
    isolated(|| {
        let scene = Scene::new(&[link(100.0, 1.0).ipv6_only()]);
        let (a, b) = (scene.a(), scene.b());
        let conf = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        let server = control::peer_names::name_servers(&conf).first().copied();
        let server = server.unwrap_or(Ipv4Addr::LOCALHOST.into());
        if !server.is_loopback() {
            a.netlink().unwrap().add_address(1, server.into()).unwrap();
        }
        let names = NameServer::start(a, server);
        let translated = "2001:db8:64:0:c6:3364:200:0";
        shell(b, &format!("ip -6 addr add {translated}/128 dev lo"));
        let hub_wan = scene.testbed.addresses(Site::B, 0).ipv6.unwrap();
        shell(a, &format!("ip -6 route add 2001:db8:64::/64 via {hub_wan} dev wan0"));
        let (branch, hub) = scene.pair();
        let numeric = scene.endpoint(Site::B, 0);
        let text = branch.text(&scene.directory).replace(&numeric, "198.51.100.2:4600");
        let _hub = scene.start(b, &hub);
        let mut branch = Gateway::start(a, &scene.directory, "branch", &text);
        branch.wait("its WAN is up", PATIENCE, |report| report.wans[0].state == "up");
        // A name server without DNS64 tells no IPv6 address: nothing to dial.
        std::thread::sleep(Duration::from_secs(1));
        assert_eq!(paths_up(&branch.status().unwrap()), 0);
        names.tell("2001:db8:64:0:c0:0:aa00:0".parse::<Ipv6Addr>().unwrap());
        let report = branch.wait("joined", PATIENCE, |report| paths_up(report) == 1);
        let up = report.status.peers[0].paths.iter().find(|path| path.state == "up").unwrap();
        assert_eq!(up.remote, format!("[{}]:4600", translated.parse::<Ipv6Addr>().unwrap()));
        echo(a, b, HUB_IP);
    });
}

/// A router of a link that says what stands in a file: when it is asked, and when the file changes.
const ROUTER: &str = r#"
import os, select, socket, struct, sys
link = socket.if_nametoindex("wan0")
router = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
router.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
group = socket.inet_pton(socket.AF_INET6, "ff02::2") + struct.pack("@I", link)
router.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group)
told = None
while True:
    said = open(sys.argv[1]).read()
    asked = select.select([router], [], [], 0.05)[0] and router.recv(2000)[0] == 133
    if asked or told not in (None, said):
        router.sendto(bytes.fromhex("86000000400007080000000000000000" + said), ("ff02::1", 0, 0, link))
        print("asked" if asked else "told", flush=True)
    told = said
"#;

/// Row T1: routers advertise the prefix of the NAT64 (RFC 8781), no name server shows it, and the kernel ignores advertisements as
/// with systemd-networkd. Options of a wrong length say nothing; a lifetime of zero ends it.
#[test]
fn t1_routers_tell_the_prefix_of_a_nat64() {
    isolated(|| {
        let scene = Scene::new(&[link(100.0, 1.0).ipv6_only()]);
        let (a, b) = (scene.a(), scene.b());
        let translated: Ipv6Addr = "2001:db8:64::198.51.100.2".parse().unwrap();
        shell(b, &format!("ip -6 addr add {translated}/128 dev lo"));
        let hub_wan = scene.testbed.addresses(Site::B, 0).ipv6.unwrap();
        shell(a, &format!("ip -6 route add 2001:db8:64::/96 via {hub_wan} dev wan0"));
        // Type 38, length, scaled lifetime (1,800 s) and code 0 (/96), the first 96 bits.
        let option = |length: &str, lifetime: &str| format!("26{length}{lifetime}20010db8006400000000000000");
        let whole = |length: &str, lifetime: &str| option(length, lifetime)[..32].to_owned();
        let advertised = scene.directory.write("advertised", whole("01", "0708")).unwrap();
        let script = scene.directory.write("router.py", ROUTER).unwrap();
        let mut router = Command::new("python3");
        router.arg(script).arg(&advertised);
        let log = scene.directory.path().join("router.log");
        let router = b.start(router, Some(&log)).unwrap();
        let (branch, hub) = scene.pair();
        let numeric = scene.endpoint(Site::B, 0);
        let text = branch.text(&scene.directory).replace(&numeric, "198.51.100.2:4600");
        let _hub = scene.start(b, &hub);
        let mut branch = Gateway::start(a, &scene.directory, "branch", &text);
        branch.wait("its WAN is up", PATIENCE, |report| report.wans[0].state == "up");
        wait_for("the router is asked", PATIENCE, || router.last_lines(9).contains("asked"));
        std::thread::sleep(Duration::from_millis(600));
        assert_eq!(paths_up(&branch.status().unwrap()), 0, "the option was too short");

        std::fs::write(&advertised, whole("02", "0708")).unwrap();
        let report = branch.wait("joined", PATIENCE, |report| paths_up(report) == 1);
        let up = report.status.peers[0].paths.iter().find(|path| path.state == "up").unwrap();
        assert_eq!(up.remote, format!("[{translated}]:4600"));
        echo(a, b, HUB_IP);
        assert!(branch.log().contains("2001:db8:64::/96"), "{}", branch.log());

        std::fs::write(&advertised, whole("02", "0000")).unwrap();
        branch.wait("the translator is not used any more", PATIENCE, |report| paths_up(report) == 0);
    });
}

/// Rows T1, N1: the LAN goes out of the tunnel's own WAN by NAT, beside the tunnel that the branch dials over it. Both carry data
/// at the same time.
#[test]
fn t1_the_lan_breaks_out_over_the_wan_of_the_tunnel() {
    isolated(|| {
        let mut scene = Scene::new(&[link(60.0, 2.0)]);
        let host = scene.testbed.add_host(Site::A).unwrap();
        let (a, b) = (scene.a(), scene.b());
        let (branch, hub) = scene.pair();
        let branch = branch.section(
            "[[interface]]\nname = \"lan\"\ndevice = \"lan1\"\n[[interface]]\nname = \"outside\"\ndevice = \"wan0\"\n\
             [[nat]]\nout = \"outside\"\n",
        );
        let (mut branch, _hub) = scene.join(&branch, &hub, 1);
        let remote = scene.testbed.addresses(Site::B, 0).ipv4.unwrap();
        let branch_wan = scene.testbed.addresses(Site::A, 0).ipv4.unwrap();
        let tunnel = tcp_start(a, b, HUB_IP, 5203, 2, 4.0);
        // Not the test bed's own TCP, which knows its clients by their address.
        let server = tcp_listener(b, (remote, 8080));
        let sink = std::thread::spawn(move || {
            let (mut stream, from) = server.accept().unwrap();
            (std::io::copy(&mut stream, &mut std::io::sink()).unwrap(), from.ip())
        });
        let timeout = Duration::from_secs(5);
        let mut client =
            host.node.run(|| TcpStream::connect_timeout(&(remote, 8080).into(), timeout)).unwrap().unwrap();
        client.set_write_timeout(Some(timeout)).unwrap();
        client.write_all(&vec![7; 2_000_000]).unwrap();
        drop(client);
        assert_eq!(sink.join().unwrap(), (2_000_000, branch_wan.into()));
        assert!(tcp_finish(tunnel) > 5.0);
        branch.wait("the path is up", PATIENCE, |report| paths_up(report) == 1);
    });
}

/// The LAN of a home router: a bridge, here with the name of `docs/nat.md`'s device, the client at one port and another host at a
/// second one. The kernel shows the firewall what it bridges, as Docker wants it to. The second host.
fn bridged(site: &host_daemons::Site) -> Node {
    let second = Node::create("a second host").unwrap();
    site.gateway.connect("p2", &[], &second, "eth0", &[]).unwrap();
    shell(
        &site.gateway,
        "ip link set eth1 down; ip link set eth1 name p1; ip link add eth1 type bridge forward_delay 0; \
         ip link set p1 master eth1 up; ip link set p2 master eth1 up; ip link set eth1 up; \
         for family in ip ip6; do echo 1 >/proc/sys/net/bridge/bridge-nf-call-${family}tables; done",
    );
    second
}

/// Row R7: hosts at the ports of a bridge talk to each other by it and go out by the gateway.
#[test]
fn r7_the_lan_is_a_bridge() {
    isolated(|| {
        let site = host_daemons::Site::new();
        let second = bridged(&site);
        shell(&second, "ip addr add 192.168.10.6/24 dev eth0; ip route add default via 192.168.10.1");
        let (config, command) = documented();
        shell(&site.gateway, command.lines().next().unwrap());
        let _gateway = site.start(&config);
        let _inside = Mirror::start(&site.client, "inside", "192.168.10.5:7000");
        let _outside = Mirror::start(&site.provider, "outside", "198.51.100.7:7000");
        for to in ["192.168.10.5:7000", "198.51.100.7:7000"] {
            Talk::open(&second, to).unwrap().echo(100_000).unwrap();
        }
        Talk::open(&site.client, "198.51.100.7:7000").unwrap().echo(100_000).unwrap();
        shell(&second, "ping -c 2 -i 0.2 -W 5 192.168.10.5; ping -c 2 -i 0.2 -W 5 192.168.10.1");
    });
}

/// Row R4: a network behind a second router of the LAN pings a client, past the gateway; the answers come by the gateway, which is the
/// client's only router and has not seen the question.
#[test]
fn r4_answers_pass_to_a_second_router() {
    isolated(|| {
        let site = host_daemons::Site::new();
        let router = bridged(&site);
        shell(&router, "ip addr add 192.168.10.254/24 dev eth0; ip addr add 10.1.0.5/32 dev lo");
        shell(
            &site.client,
            "echo 0 >/proc/sys/net/ipv4/conf/all/accept_redirects; echo 0 >/proc/sys/net/ipv4/conf/eth0/accept_redirects",
        );
        let (config, command) = documented();
        shell(&site.gateway, command.lines().next().unwrap());
        let _gateway = site.start(&config);
        shell(&site.gateway, "ip route add 10.1.0.0/24 via 192.168.10.254");
        // The gateway hears of the route a moment later than this one.
        wait_for("an answer by the new route", PATIENCE, || {
            try_shell(&router, "ping -c 1 -W 1 -I 10.1.0.5 192.168.10.5").is_ok()
        });
        shell(&router, "ping -c 3 -i 0.2 -W 5 -I 10.1.0.5 192.168.10.5 | grep ' 0% packet loss'");
        shell(&site.client, "ping -c 3 -i 0.2 -W 5 10.1.0.5 | grep ' 0% packet loss'");
        let _far = Mirror::start(&router, "far", "10.1.0.5:7000");
        Talk::open(&site.client, "10.1.0.5:7000").unwrap().echo(100_000).unwrap();
    });
}

/// Row C4: a DHCP client behind the gateway renews its lease with a server beyond it (RFC 2131 §4.4.5), and a relay asks for others
/// (RFC 1542 §4.1): that is traffic as any other.
#[test]
fn c4_dhcp_passes_through() {
    isolated(|| {
        let lans = Lans::new(2);
        let _server = Mirror::start(lans.host(2), "server", "10.1.2.2:67");
        let _gateway = lans.start(ALLOW);
        for port in [68, 67] {
            let socket = udp_socket(lans.host(1), ("10.1.1.2", port));
            socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            let mut buffer = [0; 64];
            wait_for("the server's answer", PATIENCE, || {
                socket.send_to(b"renew", "10.1.2.2:67").unwrap();
                socket.recv(&mut buffer).is_ok_and(|bytes| buffer[..bytes].ends_with(b"renew"))
            });
        }
    });
}
