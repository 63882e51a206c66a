//! The gateway's own host: managed through the datapath, its own connections, ordinary tools.

use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use testbed::program::Program;
use testbed::topology::Node;

use crate::gateway_clients::*;
use crate::gateway_scene::*;
use crate::machine::isolated;
use crate::scene::*;

/// Row R7: the gateway is managed in-band: ping, curl and ssh to its addresses from inside and outside, next to a NAT that uses
/// the same address; the packets go through the datapath, which knows them as flows to "gateway".
#[test]
fn r7_the_gateway_is_managed_through_the_datapath() {
    isolated(|| {
        let lans = Lans::new(2);
        let gateway = lans.start(&format!("{ALLOW}host = \"datapath\"\n[[nat]]\nout = \"lan2\"\n"));
        let _web = Mirror::start(lans.gateway(), "gateway", "0.0.0.0:80");
        let _web6 = Mirror::start(lans.gateway(), "gateway6", "[fd00:1:1::1]:80");
        let ssh = Ssh::start(lans.gateway(), 22);
        for (from, own) in
            [(lans.host(1), "10.1.1.1"), (lans.host(2), "10.1.2.1"), (lans.host(1), "10.1.2.1")]
        {
            ping(from, &format!("-c 3 {own}"));
            ping(from, &format!("-c 2 -s 4000 {own}"));
            let answer = curl(from, own).unwrap();
            assert_eq!(answer.name, "gateway");
            assert!(answer.source.ip() == host_ip(1) || answer.source.ip() == host_ip(2), "{answer:?}");
            assert_eq!(ask_udp(from, &format!("{own}:80")).name, "gateway");
            assert!(ssh.run(from, own, "seq 200000").ends_with("\n200000\n"));
        }
        ping(lans.host(1), "-c 3 fd00:1:1::1");
        assert_eq!(ask_tcp(lans.host(1), "[fd00:1:1::1]:80").name, "gateway6");
        let _session = ssh.session(lans.host(1), "10.1.1.1");
        let list = flows(&gateway, "tcp port 22 interface lan1").flows;
        assert!(!list.is_empty() && list.iter().all(|flow| flow.out == "gateway"), "{list:?}");
        // Nobody listens there: refused by the kernel, not silent.
        let error = Talk::open(lans.host(2), "10.1.2.1:81").err().unwrap();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{error}");
        no_reply_went_astray(&gateway);
    });
}

/// Row R7: rules decide who may manage the gateway; the host's own connections, name service and pings work whatever the
/// rules say, and so do the answers to them.
#[test]
fn r7_own_connections_and_rules_about_the_gateway() {
    isolated(|| {
        let lans = Lans::new(2);
        let gateway = lans.start(
            "[gateway]\ndefault-action = \"drop\"\nhost = \"datapath\"\n[[nat]]\nout = \"lan2\"\n\
             [[rule]]\naction = \"allow\"\nfrom = \"lan1\"\nto = \"gateway\"\nprotocol = \"tcp\"\nport = 80\n",
        );
        let _own = Mirror::start(lans.gateway(), "gateway", "0.0.0.0:80");
        let _server = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        let _dns = Dns::start(lans.host(2), host_ip(2));
        assert_eq!(curl(lans.host(1), "10.1.1.1").unwrap().name, "gateway");
        assert!(curl_for(lans.host(2), "10.1.2.1", 1).is_err(), "outside may not");
        // The host's own.
        let place = lans.gateway();
        for _ in 0..5 {
            assert_eq!(ask_tcp(place, "10.1.2.2:80").source.ip(), gateway_ip(2));
            assert_eq!(ask_udp(place, "10.1.2.2:80").source.ip(), gateway_ip(2));
        }
        Talk::open(place, "10.1.2.2:80").unwrap().echo(1_000_000).unwrap();
        resolve(place, "10.1.2.2");
        ping(place, "-c 3 10.1.2.2");
        ping(place, "-c 2 -s 4000 10.1.2.2");
        no_reply_went_astray(&gateway);
    });
}

/// A native host (the default) is managed and asks as if there were no gateway: by the devices, under its own firewall alone, from
/// any port, with programs that are bound to a device.
#[test]
fn r7_a_native_host_works_as_before() {
    isolated(|| {
        let lans = Lans::new(2);
        let place = lans.gateway();
        shell(
            place,
            "nft 'table inet own { chain input { type filter hook input priority 0; policy drop; \
             iifname lo accept; ct state established,related accept; icmpv6 type 133-137 accept; \
             iifname lan1 tcp dport { 80, 81 } accept; iifname lan1 icmp type echo-request accept; }; }'",
        );
        let gateway = lans.start("[gateway]\ndefault-action = \"drop\"\n[[nat]]\nout = \"lan2\"\n[[rule]]\naction = \"drop\"\nto = \"gateway\"\nprotocol = \"tcp\"\nport = 81\n[[rule]]\naction = \"allow\"\nfrom = \"lan1\"\n");
        let _own = [80, 81, 82].map(|port| Mirror::start(place, "gateway", &format!("0.0.0.0:{port}")));
        let _server = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        let _dns = Dns::start(lans.host(2), host_ip(2));
        // The host's firewall knows the device; what it has closed stays closed, what it has open is open but for our rule.
        assert_eq!(curl(lans.host(1), "10.1.1.1").unwrap().name, "gateway");
        assert_eq!(curl(lans.host(1), "10.1.1.1").unwrap().source.ip(), host_ip(1));
        for closed in ["10.1.1.1:81", "10.1.1.1:82"] {
            assert!(curl_for(lans.host(1), closed, 1).is_err(), "{closed}");
        }
        assert!(curl_for(lans.host(2), "10.1.2.1", 1).is_err(), "only the inside device is open");
        ping(lans.host(1), "-c 2 -s 4000 10.1.1.1");
        // Large segments come in whole, in both directions.
        Talk::open(lans.host(1), "10.1.1.1:80").unwrap().echo(3_000_000).unwrap();
        // Its own questions, also from ports that the NAT uses, and from programs bound to the device.
        resolve(place, "10.1.2.2");
        for port in [123, 1_024, 5_060, 61_000] {
            assert_eq!(
                UdpClient::new(place, &format!("10.1.2.1:{port}")).ask("10.1.2.2:80", 100).name,
                "server"
            );
        }
        ping(place, "-c 2 -I lan2 10.1.2.2");
        shell(place, "curl -sS --max-time 3 --interface lan2 http://10.1.2.2/");
        shell(place, "curl -sS --max-time 3 --interface lan2 http://10.1.2.2/");
        // The settings that docs/nat.md asks for are written again, as at each start of systemd-sysctl: hosts still take it for a router.
        let is_router = || shell(place, "cat /proc/sys/net/ipv6/conf/lan1/forwarding").trim() == "1";
        assert!(is_router());
        shell(place, "sysctl -q -w net.ipv4.ip_forward=0 net.ipv6.conf.all.forwarding=0");
        wait_for("the device is a router's again", PATIENCE, is_router);
        // Beside it the NAT goes on.
        assert_eq!(ask_tcp(lans.host(1), "10.1.2.2:80").source.ip(), gateway_ip(2));
        assert!(dropped(&gateway, "rule-drop") >= 1, "by the rule about port 81");
        no_reply_went_astray(&gateway);
    });
}

/// Row R7: a VPN server's device of the host is no `[[interface]]`. The kernel goes on passing packets on between it and ours, under its
/// own firewall, and nothing of that takes the default route. Our rules about addresses hold for what begins something.
#[test]
fn r7_the_kernel_goes_on_forwarding_to_its_other_devices() {
    isolated(|| {
        let lans = Lans::new(2);
        let place = lans.gateway();
        let far = Node::create("a client of the host's VPN").unwrap();
        let net = |text: &str| text.parse().unwrap();
        let (near, at_far) =
            (["10.8.0.1/24", "fd00:8::1/64"].map(net), ["10.8.0.2/24", "fd00:8::2/64"].map(net));
        place.connect("vpn0", &near, &far, "eth0", &at_far).unwrap();
        shell(&far, "ip route add default via 10.8.0.1; ip -6 route add default via fd00:8::1");
        shell(
            place,
            "sysctl -q -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
             nft 'table ip vpn { chain post { type nat hook postrouting priority srcnat; ip saddr 10.8.0.0/24 oifname lan2 masquerade; }; }'",
        );
        let gateway = lans.start(
            "[gateway]\ndefault-action = \"drop\"\n[[nat]]\nout = \"lan2\"\n[[rule]]\naction = \"drop\"\nfrom = \"lan1\"\n\
             to = \"10.8.0.2/32\"\nprotocol = \"tcp\"\nport = 81\n[[rule]]\naction = \"allow\"\nfrom = \"lan1\"\n",
        );
        let _inside = Mirror::start(lans.host(1), "inside", "[::]:80");
        let _outside = Mirror::start(lans.host(2), "outside", "0.0.0.0:80");
        let _far = [80, 81].map(|port| Mirror::start(&far, "far", &format!("[::]:{port}")));
        let leaving = capture(&lans, "lan2", "net 10.8.0.0/24");
        for (from, to, source) in [
            (&far, "10.1.1.2:80", "::ffff:10.8.0.2"),
            (lans.host(1), "10.8.0.2:80", "::ffff:10.1.1.2"),
            (&far, "10.1.2.2:80", "10.1.2.1"),
            (&far, "[fd00:1:1::2]:80", "fd00:8::2"),
            (lans.host(1), "[fd00:8::2]:80", "fd00:1:1::2"),
        ] {
            assert_eq!(ask_tcp(from, to).source.ip().to_string(), source, "to {to}");
            assert_eq!(ask_udp(from, to).source.ip().to_string(), source, "to {to}");
        }
        Talk::open(&far, "10.1.1.2:80").unwrap().echo(2_000_000).unwrap();
        ping(lans.host(1), "-c 2 -s 4000 10.8.0.2");
        // An ICMP error goes back to where the kernel passes it on.
        let udp = UdpClient::new(&far, "0.0.0.0:0");
        assert!(udp.is_refused("10.1.1.2:9"));
        assert!(curl_for(lans.host(1), "10.8.0.2:81", 1).is_err());
        assert!(dropped(&gateway, "rule-drop") >= 1);
        let told = explain(&gateway, "tcp 10.1.1.2:1000 > 10.8.0.2:80");
        assert_eq!(
            (told.verdict.as_str(), told.out.as_str()),
            ("to the kernel, which passes it on", "kernel")
        );
        assert!(!leaving.last_lines(50).contains("10.8.0."), "{}", leaving.last_lines(50));
        // Beside it the NAT goes on.
        assert_eq!(ask_tcp(lans.host(1), "10.1.2.2:80").source.ip(), gateway_ip(2));
    });
}

/// A client behind a device of the host, `vpnNUMBER`, that is no interface.
pub fn other_device(place: &Node, number: u8) -> Node {
    let net = |text: &str| text.parse().unwrap();
    let far = Node::create(format!("a client by another device {number}")).unwrap();
    let near = [format!("10.{number}.0.1/24"), format!("fd00:{number}::1/64")];
    let at_far = [format!("10.{number}.0.2/24"), format!("fd00:{number}::2/64")];
    let (near, at_far) = (near.map(|text| net(&text)), at_far.map(|text| net(&text)));
    place.connect(&format!("vpn{number}"), &near, &far, "eth0", &at_far).unwrap();
    shell(
        &far,
        &format!("ip route add default via 10.{number}.0.1; ip -6 route add default via fd00:{number}::1"),
    );
    far
}

/// Row R7: the host's own programs, and what comes by its other devices (a VPN server's, a bridge of containers), reach a port forward
/// by the gateway's outside address, as strangers do; what the host's firewall has closed stays closed. Devices that come later count,
/// and nothing is left at the end.
#[test]
fn r7_the_host_and_its_other_devices_reach_forwards() {
    isolated(|| {
        let lans = Lans::new(2);
        let place = lans.gateway();
        let far = other_device(place, 8);
        shell(
            place,
            "sysctl -q -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
             nft 'table inet own { chain forward { type filter hook forward priority 0; policy drop; \
             ct state established,related accept; ip daddr 10.1.1.2 tcp dport 81 drop; iifname \"vpn*\" accept; }; }'",
        );
        let mut gateway = lans.start(
            "[[nat]]\nout = \"lan2\"\n[[forward]]\nlisten = \"tcp+udp lan2:8080\"\nto = \"10.1.1.2:80\"\n\
             [[forward]]\nlisten = \"tcp [fd00:1:2::1]:8080\"\nto = \"[fd00:1:1::2]:80\"\n\
             [[forward]]\nlisten = \"udp 10.1.2.1:5000-5003\"\nto = \"10.1.1.2:6000-6003\"\n\
             [[forward]]\nlisten = \"tcp lan2:8081\"\nto = \"10.1.1.2:81\"\n",
        );
        let inside = lans.host(1);
        let _inside = [80, 81].map(|port| Mirror::start(inside, "inside", &format!("[::]:{port}")));
        let _moved = Mirror::start(inside, "moved", "0.0.0.0:6002");
        let reaches = |from: &Node, source: &str, source6: &str| {
            assert_eq!(ask_tcp(from, "10.1.2.1:8080").source.ip().to_string(), format!("::ffff:{source}"));
            assert_eq!(ask_udp(from, "10.1.2.1:8080").name, "inside");
            assert_eq!(ask_tcp(from, "[fd00:1:2::1]:8080").source.ip().to_string(), source6);
            assert_eq!(ask_udp(from, "10.1.2.1:5002").name, "moved");
            Talk::open(from, "10.1.2.1:8080").unwrap().echo(2_000_000).unwrap();
        };
        reaches(lans.host(2), "10.1.2.2", "fd00:1:2::2");
        reaches(&far, "10.8.0.2", "fd00:8::2");
        reaches(place, "10.1.2.1", "fd00:1:2::1");
        assert_eq!(ask_tcp(lans.host(2), "10.1.2.1:8081").name, "inside");
        assert!(curl_for(&far, "10.1.2.1:8081", 1).is_err(), "the host's firewall has it closed");
        // A port without a forward is the host's.
        let _own = Mirror::start(place, "own", "0.0.0.0:8082");
        assert_eq!(
            (ask_tcp(&far, "10.1.2.1:8082").name, ask_tcp(place, "10.1.2.1:8082").name),
            ("own".into(), "own".into())
        );
        let late = other_device(place, 9);
        wait_for("a device that came later", PATIENCE, || curl_for(&late, "10.1.2.1:8080", 1).is_ok());
        reaches(&late, "10.9.0.2", "fd00:9::2");
        // The firewall is started anew, with a file that begins as most do.
        shell(place, "nft flush ruleset");
        wait_for("the way is there again", PATIENCE, || {
            [place, &late].into_iter().all(|from| curl_for(from, "10.1.2.1:8080", 1).is_ok())
        });
        let tables = shell(place, "nft list tables");
        assert!(tables.contains("inet anabranch_closed-"), "{tables}");

        gateway.program.signal(Signal::TERM).unwrap();
        assert!(
            gateway.program.wait(Duration::from_secs(20)).unwrap().is_some_and(|status| status.success())
        );
        let tables = shell(place, "nft list tables");
        assert!(!tables.contains("anabranch_forwards"), "{tables}");
    });
}

/// Rows C6, R7: a container of the host, and a VPN client whose source the host's firewall translates, reach virtual servers and forwards with a
/// PROXY header by their addresses, under the host's firewall, whatever the datapath does with their source.
#[test]
fn r7_other_devices_reach_virtual_servers() {
    isolated(|| {
        let lans = Lans::new(2);
        let place = lans.gateway();
        let others = [8, 9].map(|number| other_device(place, number));
        shell(
            place,
            "sysctl -q -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
             nft 'table inet own { chain forward { type filter hook forward priority 0; policy drop; \
             ct state established,related accept; meta l4proto tcp ct original proto-dst 90 drop; iifname \"vpn*\" accept; }; \
             chain masq { type nat hook postrouting priority srcnat; iifname \"vpn9\" oifname != \"vpn9\" masquerade; }; }'",
        );
        let mut servers = "[[nat]]\nout = \"lan2\"\n".to_owned();
        let kinds = [(80, "none"), (81, "port-only"), (82, "address-and-port"), (90, "none")];
        for (port, source) in kinds {
            for (at, to) in [("10.1.2.11", "10.1.1.2"), ("[fd00:1:2::11]", "[fd00:1:1::2]")] {
                for protocol in ["tcp", "udp"] {
                    servers += &format!(
                        "[[virtual-server]]\nname = \"{protocol} {at} {port}\"\n\
                         listen = \"{protocol} {at}:{port}\"\nsource = \"{source}\"\nbackends = [\"{to}:80\"]\n"
                    );
                }
            }
        }
        let _gateway = lans.start(&format!("{ALLOW}{servers}"));
        let _backend = Mirror::start(lans.host(1), "backend", "[::]:80");
        for round in 0..8 {
            for (number, from) in (8..).zip(&others) {
                for (port, source) in &kinds[..3] {
                    for at in ["10.1.2.11", "[fd00:1:2::11]"] {
                        let to = format!("{at}:{port}");
                        let mut talk = Talk::open(from, &to).unwrap();
                        talk.echo(20_000).unwrap();
                        let seen = talk.answer.source.ip().to_string();
                        let own = seen.ends_with(&format!("10.{number}.0.2"))
                            || seen == format!("fd00:{number}::2");
                        assert_eq!(
                            own,
                            number == 8 && *source != "address-and-port",
                            "{round} {source}: {seen}"
                        );
                        assert_eq!(ask_udp(from, &to).name, "backend");
                    }
                }
            }
        }
        assert!(curl_for(&others[0], "10.1.2.11:90", 1).is_err(), "the host's firewall has it closed");
        assert_eq!(ask_tcp(lans.host(2), "10.1.2.11:90").name, "backend");
    });
}

/// Rows C6, R7: programs of the host reach virtual servers by TCP and UDP, whatever becomes of their source; each connection has another
/// port, so that answers come to every core.
#[test]
fn r7_the_host_reaches_virtual_servers() {
    isolated(|| {
        let lans = Lans::new(2);
        let mut servers = "[[nat]]\nout = \"lan2\"\n".to_owned();
        let sources = ["none", "port-only", "address-and-port"];
        for (port, source) in (80..).zip(sources) {
            for (at, to) in [("10.1.2.11", "10.1.1.2"), ("[fd00:1:2::11]", "[fd00:1:1::2]")] {
                for protocol in ["tcp", "udp"] {
                    servers += &format!(
                        "[[virtual-server]]\nname = \"{protocol} {at} {source}\"\n\
                         listen = \"{protocol} {at}:{port}\"\nsource = \"{source}\"\nbackends = [\"{to}:80\"]\n"
                    );
                }
            }
        }
        let gateway = lans.start(&format!("{ALLOW}{servers}"));
        let _backend = Mirror::start(lans.host(1), "backend", "[::]:80");
        let place = lans.gateway();
        for round in 0..16 {
            for (port, source) in (80..).zip(sources) {
                for at in ["10.1.2.11", "[fd00:1:2::11]"] {
                    let to = format!("{at}:{port}");
                    let mut talk = Talk::open(place, &to).unwrap();
                    talk.echo(20_000).unwrap();
                    let seen = talk.answer.source.ip().to_string();
                    let own = seen.contains(at.trim_matches(['[', ']']));
                    assert_eq!(own, source != "address-and-port", "{round} {source}: {seen}");
                    assert_eq!(ask_udp(place, &to).name, "backend");
                }
            }
        }
        wait_for("flows on every core are counted", PATIENCE, || {
            services(&gateway).cores.iter().all(|core| core.new_flows > 8)
        });
    });
}

/// Row R7: addresses of the host's on other devices, as `lo`, and networks that it takes for its own (`ip route add local`) are the
/// host's, from the moment that they are there.
#[test]
fn r7_addresses_on_other_devices_are_the_hosts() {
    isolated(|| {
        let lans = Lans::new(2);
        let place = lans.gateway();
        let gateway = lans.start(
            "[gateway]\ndefault-action = \"drop\"\n[[nat]]\nout = \"lan2\"\n[[rule]]\naction = \"drop\"\nto = \"gateway\"\n\
             protocol = \"tcp\"\nport = 81\n[[rule]]\naction = \"allow\"\nfrom = \"lan1\"\n",
        );
        let _own = [80, 81].map(|port| Mirror::start(place, "gateway", &format!("[::]:{port}")));
        shell(
            place,
            "ip addr add 192.0.2.1/32 dev lo; ip -6 addr add 2001:db8:1::1/128 dev lo; ip route add local 192.0.2.64/28 dev lo",
        );
        shell(lans.host(2), "ip route add 192.0.2.0/24 via 10.1.2.1");
        std::thread::sleep(Duration::from_millis(200));
        for (from, to) in
            [(1, "192.0.2.1"), (2, "192.0.2.1"), (1, "[2001:db8:1::1]"), (1, "192.0.2.70"), (2, "192.0.2.71")]
        {
            assert_eq!(curl(lans.host(from), to).unwrap().name, "gateway", "{to}");
        }
        assert!(curl_for(lans.host(1), "192.0.2.1:81", 1).is_err(), "by the rule about the gateway");
        assert!(dropped(&gateway, "rule-drop") >= 1);
        shell(place, "ip addr del 192.0.2.1/32 dev lo");
        wait_for("it is gone", PATIENCE, || curl_for(lans.host(2), "192.0.2.1", 1).is_err());
    });
}

/// tcpdump on a device of the gateway, once it listens.
fn capture(lans: &Lans, device: &str, filter: &str) -> Program {
    let mut command = Command::new("tcpdump");
    command.args(["-n", "-l", "-i", device, filter]);
    let log = lans.scene.directory.path().join(format!("{device}.txt"));
    let program = lans.gateway().start(command, Some(&log)).unwrap();
    wait_for("tcpdump listens", PATIENCE, || program.last_lines(10).contains("listening on"));
    program
}

/// Row R8: what the datapath receives and sends is seen by ordinary tools on the devices, before and after translation.
#[test]
fn r8_tcpdump_sees_the_packets() {
    isolated(|| {
        let lans = Lans::new(2);
        let _gateway = lans.start(&format!("{ALLOW}[[nat]]\nout = \"lan2\"\n"));
        let (inside, outside) =
            (capture(&lans, "lan1", "udp port 80"), capture(&lans, "lan2", "udp port 80"));
        let _server = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        let client = UdpClient::new(lans.host(1), "0.0.0.0:0");
        let (local, seen) = (client.local().port(), client.ask("10.1.2.2:80", 64).source.port());
        for (program, address) in
            [(inside, format!("10.1.1.2.{local}")), (outside, format!("10.1.2.1.{seen}"))]
        {
            wait_for("both directions are seen", PATIENCE, || {
                let text = program.last_lines(50);
                text.contains(&format!("IP {address} > 10.1.2.2.80"))
                    && text.contains(&format!("> {address}:"))
            });
        }
    });
}

/// Row R8: a packet that the kernel, or any program with its own stack, sends into the TUN device is routed by the datapath and
/// leaves by an interface, translated; the answer comes back to it.
#[test]
fn r8_what_goes_into_the_tun_device_leaves_by_an_interface() {
    isolated(|| {
        let lans = Lans::new(2);
        lans.no_default_route(2);
        let gateway = lans.start(&format!(
            "{ALLOW}[tun]\nname = \"ana0\"\naddress = [\"10.66.0.1/24\"]\n\
             [[route]]\nto = \"192.0.2.0/24\"\nvia = \"10.1.2.2\"\n[[nat]]\nout = \"lan2\"\n"
        ));
        shell(lans.host(2), "ip addr add 192.0.2.1/32 dev eth0");
        // Bound to the address it is asked at: its UDP answers come from there.
        let _server = Mirror::start(lans.host(2), "server", "192.0.2.1:80");
        shell(lans.gateway(), "ip route add 192.0.2.0/24 dev ana0 table 4242 src 10.66.0.1");
        shell(lans.gateway(), "ip rule add to 192.0.2.0/24 lookup 4242");
        for _ in 0..5 {
            assert_eq!(ask_tcp(lans.gateway(), "192.0.2.1:80").source.ip(), gateway_ip(2));
            assert_eq!(ask_udp(lans.gateway(), "192.0.2.1:80").source.ip(), gateway_ip(2));
        }
        Talk::open(lans.gateway(), "192.0.2.1:80").unwrap().echo(500_000).unwrap();
        // A client reaches the same network by the route of the configuration.
        assert_eq!(ask_tcp(lans.host(1), "192.0.2.1:80").source.ip(), gateway_ip(2));
        no_reply_went_astray(&gateway);
    });
}
