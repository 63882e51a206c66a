//! Address translation with real clients, in each mode.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};

use crate::gateway_clients::*;
use crate::gateway_raw::{Header, Raw, UDP, udp};
use crate::gateway_scene::*;
use crate::machine::isolated;
use crate::scene::*;

/// HTTP, ssh, DNS, FTP in both passive modes, iperf3 over TCP and UDP, ping and a traced route from the host of network 1 to
/// that of network 2, which sees `source`.
fn real_clients(lans: &Lans, gateway: &Gateway, source: IpAddr) {
    let (client, server) = (lans.host(1), lans.host(2));
    let _mirror = Mirror::start(server, "server", "0.0.0.0:80");
    assert_eq!(curl(client, "10.1.2.2").unwrap().source.ip(), source);
    assert_eq!(ask_udp(client, "10.1.2.2:80").source.ip(), source);
    for _ in 0..20 {
        assert_eq!(ask_tcp(client, "10.1.2.2:80").source.ip(), source);
    }
    let ssh = Ssh::start(server, 22);
    let seen = ssh.run(client, "10.1.2.2", "echo $SSH_CONNECTION; seq 100000");
    assert!(seen.starts_with(&format!("{source} ")) && seen.ends_with("\n100000\n"), "{}", &seen[..80]);
    let _dns = Dns::start(server, host_ip(2));
    resolve(client, "10.1.2.2");
    let ftp = Ftp::start(server, "10.1.2.2:21");
    ftp.fetch(client, "10.1.2.2", "");
    ftp.fetch(client, "10.1.2.2", "--disable-epsv");
    for arguments in ["", "--reverse", "--parallel 4", "--udp --bitrate 5M", "--udp --bitrate 5M --reverse"] {
        iperf3(client, server, "10.1.2.2", arguments);
    }
    ping(client, "-c 5 10.1.2.2");
    assert_eq!(
        trace(client, Ipv4Addr::new(10, 1, 2, 2)),
        [Ipv4Addr::new(10, 1, 1, 1), Ipv4Addr::new(10, 1, 2, 2)]
    );
    no_reply_went_astray(gateway);
}

/// Rows C2, C10: address and port of the client are replaced; the server has no route to the client, and every ordinary
/// client works. The view names the NAT and its flows.
#[test]
fn c2_real_clients_with_address_and_port() {
    isolated(|| {
        let lans = Lans::new(2);
        lans.no_default_route(2);
        let gateway = lans.start(&format!("{ALLOW}[[nat]]\nout = \"lan2\"\nmode = \"address-and-port\"\n"));
        real_clients(&lans, &gateway, gateway_ip(2));
        assert_eq!(handed_over(&gateway), 0);
        wait_for("the flows are counted", PATIENCE, || new_flows(&gateway) > 30);
        let status = services(&gateway);
        assert_eq!((status.nats.len(), status.nats[0].mode.as_str()), (1, "address-and-port"));
        assert!(status.nats[0].addresses.contains(&"10.1.2.1".to_owned()), "{:?}", status.nats);
    });
}

/// Row C2: several outside addresses; what leaves has one of them, and the kernel answers for all.
#[test]
fn c2_a_pool_of_addresses() {
    isolated(|| {
        let lans = Lans::new(2);
        lans.no_default_route(2);
        let gateway =
            lans.start(&format!("{ALLOW}[[nat]]\nout = \"lan2\"\naddresses = [\"10.1.2.16/30\"]\n"));
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        for number in 0..40 {
            let answer = if number % 2 == 0 {
                ask_tcp(lans.host(1), "10.1.2.2:80")
            } else {
                ask_udp(lans.host(1), "10.1.2.2:80")
            };
            let IpAddr::V4(source) = answer.source.ip() else { panic!("{answer:?}") };
            let last = source.octets()[3];
            assert!((16..20).contains(&last), "{source}");
            assert!(answer.source.port() >= 1_024);
        }
        no_reply_went_astray(&gateway);
        assert_eq!(handed_over(&gateway), 0);
    });
}

/// Row C3: the client's address stays, only its port is chosen, so that the reply comes to the same core.
#[test]
fn c3_real_clients_with_port_only() {
    isolated(|| {
        let lans = Lans::new(2);
        let gateway = lans.start(&format!("{ALLOW}[[nat]]\nout = \"lan2\"\nmode = \"port-only\"\n"));
        real_clients(&lans, &gateway, host_ip(1));
        assert_eq!(handed_over(&gateway), 0);
        assert_eq!(services(&gateway).nats[0].mode, "port-only");
        // The ports are the gateway's choice.
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:81");
        let client = UdpClient::new(lans.host(1), "0.0.0.0:0");
        let talks: Vec<Talk> = (0..8).map(|_| Talk::open(lans.host(1), "10.1.2.2:81").unwrap()).collect();
        assert!(talks.iter().any(|talk| talk.local.port() != talk.answer.source.port()));
        assert_eq!(client.ask("10.1.2.2:81", 64), client.ask("10.1.2.2:81", 64));
    });
}

/// Row C4: nothing is replaced. Both directions belong to one core by the hash alone.
#[test]
fn c4_real_clients_with_nothing_replaced() {
    isolated(|| {
        let lans = Lans::new(2);
        let gateway = lans.start(&format!("{ALLOW}[[nat]]\nout = \"lan2\"\nmode = \"none\"\n"));
        real_clients(&lans, &gateway, host_ip(1));
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:81");
        for _ in 0..8 {
            let talk = Talk::open(lans.host(1), "10.1.2.2:81").unwrap();
            assert_eq!(talk.local, talk.answer.source);
        }
        assert_eq!(handed_over(&gateway), 0);
    });
}

/// Row C4 without any `[[nat]]`, over IPv6: a plain router with a firewall.
#[test]
fn c4_ipv6_is_forwarded() {
    isolated(|| {
        let lans = Lans::new(2);
        let gateway = lans.start(ALLOW);
        let (client, server) = (lans.host(1), lans.host(2));
        let _mirror = Mirror::start(server, "server", "[::]:80");
        let talk = Talk::open(client, "[fd00:1:2::2]:80").unwrap();
        assert_eq!(talk.local, talk.answer.source);
        ask_udp(client, "[fd00:1:2::2]:80");
        ping(client, "-c 3 fd00:1:2::2");
        ping(client, "-c 3 -s 4000 fd00:1:2::2");
        assert!(curl(client, "[fd00:1:2::2]").is_ok());
        tcp_finish(tcp_start(client, server, "fd00:1:2::2", 5203, 4, 1.0));
        no_reply_went_astray(&gateway);
    });
}

/// Row C2: with endpoint-independent mapping a client has one outside port for all destinations, and everybody reaches it
/// there.
#[test]
fn c2_endpoint_independent_mapping_keeps_the_port_and_lets_others_in() {
    isolated(|| {
        let lans = Lans::new(3);
        lans.no_default_route(2);
        let gateway = lans.start(&format!(
            "{ALLOW}[[nat]]\nout = \"lan2\"\nmapping = \"endpoint-independent\"\nfrom = [\"10.1.1.0/24\"]\n"
        ));
        let server = lans.host(2);
        shell(server, "ip address add 10.1.2.3/24 dev eth0");
        let _one = Mirror::start(server, "one", "10.1.2.2:80");
        let _two = Mirror::start(server, "two", "10.1.2.3:80");
        for _ in 0..6 {
            let client = UdpClient::new(lans.host(1), "0.0.0.0:0");
            let (one, two) = (client.ask("10.1.2.2:80", 64), client.ask("10.1.2.3:80", 64));
            assert_eq!(one.source, two.source, "one mapping for all destinations");
            // Somebody who was never asked reaches the client by it (RFC 4787 §5).
            let stranger = UdpClient::new(server, "10.1.2.2:0");
            stranger.send(one.source);
            assert!(client.receives_from(stranger.local()), "nothing came by the mapping");
        }
        no_reply_went_astray(&gateway);
    });
}

/// Rows C2, C4, C6: a forward and a virtual server that show their clients' real addresses work beside endpoint-independent
/// mappings, whichever core the answers are mapped by.
#[test]
fn c2_c4_c6_services_work_beside_endpoint_independent_mappings() {
    isolated(|| {
        let lans = Lans::new(2);
        lans.no_default_route(2);
        let gateway = lans.start(&format!(
            "{ALLOW}[[nat]]\nout = \"lan2\"\nmapping = \"endpoint-independent\"\n\
             [[forward]]\nlisten = \"tcp+udp lan2:8080\"\nto = \"10.1.1.2:81\"\n\
             [[virtual-server]]\nname = \"kept\"\nlisten = \"tcp 10.1.2.11:82\"\nsource = \"none\"\n\
             backends = [\"10.1.1.2:82\"]\n"
        ));
        let (inside, outside) = (lans.host(1), lans.host(2));
        let _forwarded = Mirror::start(inside, "forwarded", "0.0.0.0:81");
        let _server = Mirror::start(inside, "server", "0.0.0.0:82");
        let _remote = Mirror::start(outside, "remote", "0.0.0.0:80");
        for _ in 0..16 {
            for (to, name) in [("10.1.2.1:8080", "forwarded"), ("10.1.2.11:82", "server")] {
                let mut talk = Talk::open(outside, to).unwrap();
                assert_eq!((talk.answer.source, talk.answer.name.as_str()), (talk.local, name));
                talk.echo(20_000).unwrap();
            }
            assert_eq!(ask_udp(outside, "10.1.2.1:8080").source.ip(), host_ip(2));
            assert_eq!(ask_tcp(inside, "10.1.2.2:80").source.ip(), gateway_ip(2));
        }
        wait_for("flows on every core are counted", PATIENCE, || {
            services(&gateway).cores.iter().all(|core| core.new_flows > 8)
        });
        no_reply_went_astray(&gateway);
    });
}

/// Row C2: with endpoint-independent mappings anybody may send to a client's port, so that none is one that a program of the host has: no
/// client gets that of a service, and a program that opens a client's port later is reached there, while the client's connections go on
/// and its datagrams leave from another port.
#[test]
fn c2_mappings_keep_off_the_ports_of_the_host() {
    isolated(|| {
        let lans = Lans::new(2);
        lans.no_default_route(2);
        let addresses = "addresses = [\"10.1.2.1\", \"fd00:1:2::1\"]\nports = \"20480-20543\"";
        let _gateway = lans.start(&format!(
            "{ALLOW}[[nat]]\nout = \"lan2\"\nmapping = \"endpoint-independent\"\n{addresses}\n"
        ));
        let (inside, outside) = (lans.host(1), lans.host(2));
        let _remotes = ["0.0.0.0:80", "[::]:81"].map(|at| Mirror::start(outside, "remote", at));
        let _services =
            ["10.1.2.1:20500", "[::]:20501"].map(|at| Mirror::start(lans.gateway(), "service", at));
        for (gateway, remote, any) in
            [("10.1.2.1", "10.1.2.2:80", "0.0.0.0:0"), ("[fd00:1:2::1]", "[fd00:1:2::2]:81", "[::]:0")]
        {
            let client = UdpClient::new(inside, any);
            let mut connection = Talk::open(inside, remote).unwrap();
            let ports = [client.ask(remote, 64).source.port(), connection.answer.source.port()];
            let _later = ports
                .map(|port| Mirror::start(lans.gateway(), "later", &any.replace(":0", &format!(":{port}"))));
            for port in ports {
                let to = format!("{gateway}:{port}");
                wait_for("the program has the port", PATIENCE, || {
                    UdpClient::new(outside, any).try_ask(&to, 64).is_some_and(|answer| answer.name == "later")
                        && Talk::open(outside, &to).is_ok_and(|talk| talk.answer.name == "later")
                });
            }
            connection.echo(20_000).unwrap();
            wait_for("the client has another port", PATIENCE, || {
                client.try_ask(remote, 64).is_some_and(|answer| !ports.contains(&answer.source.port()))
            });
            connection.echo(20_000).unwrap();

            let service = format!("{gateway}:{}", if any.starts_with('[') { 20_501 } else { 20_500 });
            let many: Vec<_> = (0..200).map(|_| UdpClient::new(inside, any)).collect();
            many.iter().for_each(|client| client.send(remote.parse().unwrap()));
            assert_eq!(ask_udp(outside, &service).name, "service");
            assert_eq!(ask_tcp(outside, &service).name, "service");
        }
    });
}

/// Row C2: the host's range of ports is all of them, as guides to tuning say: its own connections and those of clients have ports beside
/// each other.
#[test]
fn c2_a_wide_range_of_the_host_leaves_ports() {
    isolated(|| {
        let lans = Lans::new(2);
        lans.no_default_route(2);
        shell(lans.gateway(), "sysctl -q -w net.ipv4.ip_local_port_range='1024 65535'");
        let gateway = lans.start(&format!("{ALLOW}[[nat]]\nout = \"lan2\"\n"));
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        let clients: Vec<_> = (0..2_000).map(|_| UdpClient::new(lans.host(1), "0.0.0.0:0")).collect();
        for some in clients.chunks(100) {
            some.iter().for_each(|client| client.send("10.1.2.2:80".parse().unwrap()));
            assert_eq!(some[99].ask("10.1.2.2:80", 64).source.ip(), gateway_ip(2));
            assert_eq!(ask_udp(lans.gateway(), "10.1.2.2:80").source.ip(), gateway_ip(2));
            assert_eq!(ask_tcp(lans.gateway(), "10.1.2.2:80").source.ip(), gateway_ip(2));
            assert_eq!(ask_tcp(lans.host(1), "10.1.2.2:80").source.ip(), gateway_ip(2));
        }
        wait_for("flows are counted", PATIENCE, || new_flows(&gateway) >= 2_000);
        assert_eq!(dropped(&gateway, "nat-ports-exhausted"), 0);
        no_reply_went_astray(&gateway);
    });
}

/// Row C2: a client has only so many flows on each core, others are not harmed; the reason is counted.
#[test]
fn c2_a_client_has_only_so_many_flows() {
    isolated(|| {
        let lans = Lans::new(4);
        let gateway = lans.start(&format!(
            "{ALLOW}[[nat]]\nout = \"lan2\"\nflows-per-client-max = 20\n[[nat]]\nout = \"lan4\"\nports = \"4096-5119\"\n"
        ));
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        let clients: Vec<UdpClient> = (0..20 * services(&gateway).cores.len() + 40)
            .map(|_| UdpClient::new(lans.host(1), "0.0.0.0:0"))
            .collect();
        for client in &clients {
            client.send("10.1.2.2:80".parse().unwrap());
        }
        wait_for("the limit is felt", PATIENCE, || dropped(&gateway, "flows-per-client") > 0);
        wait_for("the limit is counted", PATIENCE, || services(&gateway).nats[0].refused_flows > 0);
        let count = flows(&gateway, "udp 10.1.1.2").flows.len();
        assert!(count <= 20 * services(&gateway).cores.len(), "{count} flows");
        assert_eq!(ask_tcp(lans.host(3), "10.1.2.2:80").source.ip(), gateway_ip(2));
        // Each rule counts its own.
        let nats = services(&gateway).nats;
        assert_eq!((nats[0].exhausted_flows, nats[1].refused_flows, nats[1].exhausted_flows), (0, 0, 0));
    });
}

/// Rows C2, C3: each of a core's port tables gives out every port once. Of 32 ports 64 tables make 2,048 flows, 256 make more.
#[test]
fn c2_c3_there_are_as_many_port_tables_as_configured() {
    isolated(|| {
        let lans = Lans::new(2);
        let gateway =
            lans.start(&format!("{ALLOW}[[nat]]\nout = \"lan2\"\nports = \"4096-4127\"\ntables = 256\n"));
        let raw = Raw::new(&lans, 1);
        let (client, server) = (Ipv4Addr::new(10, 1, 1, 2), Ipv4Addr::new(10, 1, 2, 2));
        let from = SocketAddrV4::new(client, 4_000);
        wait_for("more flows than 64 tables hold", PATIENCE, || {
            for port in 10_000..14_000 {
                let datagram = udp(from, SocketAddrV4::new(server, port), b"x");
                raw.send(&Header::new(client, server, UDP).packet(&datagram));
            }
            services(&gateway).nats[0].live_flows > 2_500
        });
    });
}

/// Row C2: the log answers who had an outside port (RFC 6888 §4).
#[test]
fn c2_the_log_tells_who_had_a_port() {
    isolated(|| {
        let lans = Lans::new(2);
        let log = lans.scene.directory.path().join("nat.json");
        let gateway =
            lans.start(&format!("{ALLOW}log-file = \"{}\"\n[[nat]]\nout = \"lan2\"\n", log.display()));
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        let client = UdpClient::new(lans.host(1), "0.0.0.0:0");
        let seen = client.ask("10.1.2.2:80", 64).source;
        wait_for("a line about the port", PATIENCE, || {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            text.lines().any(|line| {
                let json: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
                json.is_object() && line.contains(&seen.port().to_string()) && line.contains("10.1.1.2")
            })
        });
        no_reply_went_astray(&gateway);
    });
}

/// Row C2: where clients have their ports in blocks, all flows of one are in its own, and the log has a line for the block and none
/// for a port.
#[test]
fn c2_a_clients_ports_come_in_blocks() {
    isolated(|| {
        let lans = Lans::new(3);
        let log = lans.scene.directory.path().join("nat.json");
        let gateway = lans.start(&format!(
            "{ALLOW}log-file = \"{}\"\n[[nat]]\nout = \"lan2\"\nports-per-client = 1024\n",
            log.display()
        ));
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        let blocks = [1, 3].map(|number| -> BTreeSet<u16> {
            (0..20).map(|_| ask_udp(lans.host(number), "10.1.2.2:80").source.port() / 1_024).collect()
        });
        assert!(blocks.iter().all(|blocks| blocks.len() == 1) && blocks[0] != blocks[1], "{blocks:?}");
        no_reply_went_astray(&gateway);
        let lines = || std::fs::read_to_string(&log).unwrap_or_default();
        wait_for("a line for each client", PATIENCE, || lines().matches("\"ports\":1024").count() == 2);
        let of_clients = lines().lines().filter(|line| line.contains("\"inside\"")).count();
        assert_eq!(of_clients, 2, "{}", lines());
    });
}

/// Row C2: an ICMP error from behind the translation reaches the client with its own packet quoted: a closed port over
/// UDP is told at once, and a smaller MTU on the way is found by TCP.
#[test]
fn c2_icmp_errors_come_through() {
    isolated(|| {
        let lans = Lans::new(2);
        lans.no_default_route(2);
        let _gateway = lans.start(&format!("{ALLOW}[[nat]]\nout = \"lan2\"\n"));
        let client = UdpClient::new(lans.host(1), "0.0.0.0:0");
        wait_for("the closed port is told", PATIENCE, || client.is_refused("10.1.2.2:9"));
        // A closed TCP port is refused, not timed out.
        let error = Talk::open(lans.host(1), "10.1.2.2:9").err().unwrap();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{error}");
    });
}

/// Row C10: the gateway makes as many ICMP errors of its own as it is allowed to, here none; live.
#[test]
fn c10_icmp_errors_have_a_limit() {
    isolated(|| {
        let lans = Lans::new(2);
        let gateway = lans.start(&format!("{ALLOW}errors-per-second-max = 0\n"));
        let traced = || {
            let said = shell(lans.host(1), "ping -n -c 3 -i 0.2 -W 1 -t 1 10.1.2.2 || true");
            said.matches("From 10.1.1.1 icmp_seq=").count()
        };
        assert_eq!(traced(), 0);
        wait_for("they are counted", PATIENCE, || dropped(&gateway, "ttl-expired") >= 3);
        assert_eq!(lans.reload(&gateway, ALLOW).0, 0);
        assert_eq!(traced(), 3);
    });
}

/// Row C2: which outside port a client gets. One below 1,024 for one below (RFC 4787 REQ-3 a); its own where the operator says
/// so; none that a program of the gateway's host holds.
#[test]
fn c2_ports_below_1024_and_the_clients_own() {
    isolated(|| {
        let lans = Lans::new(2);
        lans.no_default_route(2);
        let _held = udp_socket(lans.gateway(), "0.0.0.0:700");
        let gateway = lans.start(&format!("{ALLOW}[[nat]]\nout = \"lan2\"\n"));
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        let seen = |port: u16| {
            let client = UdpClient::new(lans.host(1), &format!("0.0.0.0:{port}"));
            client.ask("10.1.2.2:80", 64).source.port()
        };
        for port in [500, 600, 700, 901] {
            let outside = seen(port);
            assert!(outside < 1024 && outside != 700, "{port} became {outside}");
        }
        assert!(seen(5_060) >= 1024);
        let preserving = format!("{ALLOW}[[nat]]\nout = \"lan2\"\nport-choice = \"preserve\"\n");
        assert_eq!(lans.reload(&gateway, &preserving).0, 0);
        for port in 20_000..20_040 {
            assert_eq!(seen(port), port);
        }
        assert_ne!(seen(700), 700, "the host's");
        no_reply_went_astray(&gateway);
    });
}

/// Row C2: the port of an ended connection is not given for the same server again while others are free. It would meet the
/// server's TIME-WAIT.
#[test]
fn c2_ports_rest_after_a_connection() {
    isolated(|| {
        let lans = Lans::new(2);
        lans.no_default_route(2);
        let gateway = lans.start(&format!(
            "{ALLOW}timeouts = {{ tcp-closed-seconds = 1 }}\n[[nat]]\nout = \"lan2\"\nports = \"2048-4095\"\n"
        ));
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        let mut seen = BTreeSet::new();
        for round in 0..2 {
            for number in 0..200 {
                let port = ask_tcp(lans.host(1), "10.1.2.2:80").source.port();
                assert!(seen.insert(port), "port {port} again after {number} connections of round {round}");
            }
            wait_for("their flows are over", PATIENCE, || flows(&gateway, "tcp").flows.is_empty());
        }
    });
}

/// Row C2: a connection that was idle for longer than the gateway remembers it is reset when its client goes on, and does not
/// hang.
#[test]
fn c2_a_forgotten_connection_is_reset() {
    isolated(|| {
        let lans = Lans::new(2);
        lans.no_default_route(2);
        let gateway = lans.start(&format!(
            "{ALLOW}timeouts = {{ tcp-established-seconds = 2 }}\n[[nat]]\nout = \"lan2\"\n"
        ));
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        let mut talk = Talk::open(lans.host(1), "10.1.2.2:80").unwrap();
        talk.echo(1_000).unwrap();
        wait_for("the flow is forgotten", PATIENCE, || flows(&gateway, "tcp").flows.is_empty());
        let error = talk.echo(1_000).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
    });
}
