//! Traffic of a household through the router of `docs/nat.md`: telephones, multicast of the host, links that carry less than they say.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use testbed::topology::Node;

use crate::gateway_scene::*;
use crate::host_daemons::{Site, documented};
use crate::machine::isolated;
use crate::scene::*;

const FAR: &str = "198.51.100.7";

fn udp(place: &Node, local: &str) -> UdpSocket {
    let socket = udp_socket(place, local);
    socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    socket
}

/// Sends and receives a datagram of 172 bytes (RTP with 20 ms of sound) each 20 ms; how many came from `peer`, which is learnt from the
/// first if it is not known: a provider answers to where it hears a telephone from.
fn talk(socket: &UdpSocket, mut peer: Option<SocketAddr>, datagrams: u32) -> (u32, Option<SocketAddr>) {
    let (begin, mut buffer, mut heard) = (Instant::now(), [0; 2_048], 0);
    let end = begin + Duration::from_millis(u64::from(datagrams) * 20 + 2_000);
    let mut sent = 0;
    while Instant::now() < end && (sent < datagrams || heard < datagrams) {
        if sent < datagrams && begin.elapsed() >= Duration::from_millis(20) * sent {
            if let Some(peer) = peer {
                socket.send_to(&[7; 172], peer).unwrap();
            }
            sent += 1;
        }
        if let Ok((172, from)) = socket.recv_from(&mut buffer) {
            heard += u32::from(*peer.get_or_insert(from) == from);
        }
    }
    (heard, peer)
}

/// Row C2: a telephone registers from port 5060 and is called on that way half a minute later; RTP and RTCP run in both directions at
/// once, of two telephones with the same ports, and nothing is lost.
#[test]
fn c2_telephones_behind_the_nat_talk() {
    isolated(|| {
        let site = Site::new();
        shell(&site.client, "ip addr add 192.168.10.6/24 dev eth0");
        let (config, _) = documented();
        let gateway = site.start(&config);
        let registrar = udp(&site.provider, &format!("{FAR}:5060"));
        let phones = ["192.168.10.5", "192.168.10.6"];
        let mut contacts = Vec::new();
        let signalling = phones.map(|address| udp(&site.client, &format!("{address}:5060")));
        for phone in &signalling {
            phone.send_to(b"REGISTER sip:example.net SIP/2.0", format!("{FAR}:5060")).unwrap();
            let (mut buffer, mut from) = ([0; 256], None);
            wait_for("the registration", PATIENCE, || {
                from = registrar.recv_from(&mut buffer).ok().map(|(_, from)| from);
                from.is_some()
            });
            contacts.extend(from);
        }
        assert_ne!(contacts[0], contacts[1]);
        // The provider calls both, by the way that they opened.
        for (phone, contact) in signalling.iter().zip(&contacts) {
            registrar.send_to(b"INVITE", contact).unwrap();
            let mut buffer = [0; 64];
            wait_for("the call", PATIENCE, || {
                phone.recv(&mut buffer).is_ok_and(|bytes| &buffer[..bytes] == b"INVITE")
            });
        }
        // Sound (even ports) and its reports (odd ones), both ways.
        let streams: Vec<_> = [(0, 16_384), (0, 16_385), (1, 16_384), (1, 16_385)]
            .into_iter()
            .enumerate()
            .map(|(number, (phone, port))| {
                let near = udp(&site.client, &format!("{}:{port}", phones[phone]));
                let far = udp(&site.provider, &format!("{FAR}:{}", 20_000 + number));
                let to = far.local_addr().unwrap();
                let heard_there = Background::start(move |_| talk(&far, None, 100));
                let heard_here = Background::start(move |_| talk(&near, Some(to), 100));
                (heard_here, heard_there)
            })
            .collect();
        let mut sources = Vec::new();
        for (here, there) in streams {
            let ((heard_here, _), (heard_there, from)) = (here.finish(), there.finish());
            assert_eq!(heard_there, 100);
            assert!(heard_here >= 97, "{heard_here}: the first datagrams told whom to answer");
            sources.extend(from);
        }
        assert!(sources.iter().all(|source| source.ip().to_string() == "203.0.113.1"), "{sources:?}");
        no_reply_went_astray(&gateway);
    });
}

/// Row C2: a program of the host opens the port that a client's flow has outside, and asks the same server: both get their answers at once,
/// UDP and TCP; the server sees two ports. The program may be bound to the device.
#[test]
fn c2_a_program_of_the_host_opens_a_port_of_a_flow() {
    isolated(|| {
        let site = Site::new();
        let (config, _) = documented();
        let _gateway = site.start(&config);
        let far = udp(&site.provider, &format!("{FAR}:5300"));
        let hears = |socket: &UdpSocket, what: &[u8]| {
            let (mut buffer, mut from) = ([0; 64], None);
            wait_for("a datagram", PATIENCE, || {
                let heard = socket.recv_from(&mut buffer).ok();
                from = heard.filter(|(bytes, _)| &buffer[..*bytes] == what).map(|(_, from)| from);
                from.is_some()
            });
            from.unwrap()
        };
        let client = udp(&site.client, "192.168.10.5:5000");
        client.send_to(b"client", (FAR, 5300)).unwrap();
        let outside = hears(&far, b"client");
        let own = udp(&site.gateway, &format!("0.0.0.0:{}", outside.port()));
        own.send_to(b"host", (FAR, 5300)).unwrap();
        let second = hears(&far, b"host");
        assert_eq!(second.ip(), outside.ip());
        assert_ne!(second.port(), outside.port());
        far.send_to(b"to the host", second).unwrap();
        assert_eq!(hears(&own, b"to the host"), far.local_addr().unwrap());
        far.send_to(b"to the client", outside).unwrap();
        hears(&client, b"to the client");

        let _server = Mirror::start(&site.provider, "server", &format!("{FAR}:80"));
        let mut talk = Talk::open(&site.client, &format!("{FAR}:80")).unwrap();
        talk.echo(1_000).unwrap();
        let text = shell(&site.provider, "ss -tnH state established sport = :80");
        let port =
            text.split_whitespace().last().and_then(|peer| peer.rsplit(':').next()).unwrap().to_owned();
        for device in ["", "--interface eth0"] {
            shell(
                &site.gateway,
                &format!("curl -sS --max-time 5 {device} --local-port {port} http://{FAR}/"),
            );
        }
        talk.echo(100_000).unwrap();
    });
}

/// Row R7: IGMP, MLD and multicast are the host's: a program that joins a group on the LAN is reported there and gets what is sent to it;
/// what it sends comes out; nothing of that is forwarded.
#[test]
fn r7_multicast_of_the_host_works() {
    isolated(|| {
        let site = Site::new();
        let (config, _) = documented();
        let _gateway = site.start(&config);
        let mut command = Command::new("tcpdump");
        command.args(["-n", "-l", "-i", "eth0", "igmp or icmp6 or net 239.0.0.0/8 or net ff00::/8"]);
        let log = |name: &str| site.directory.path().join(name);
        let inside = site.client.start(command, Some(&log("inside.txt"))).unwrap();
        let mut command = Command::new("tcpdump");
        command.args(["-n", "-l", "-i", "eth0", "net 239.0.0.0/8 or udp port 5000"]);
        let outside = site.provider.start(command, Some(&log("outside.txt"))).unwrap();
        for program in [&inside, &outside] {
            wait_for("tcpdump listens", PATIENCE, || program.last_lines(10).contains("listening on"));
        }
        let (group4, group6) = (Ipv4Addr::new(239, 1, 2, 3), "ff15::77".parse::<Ipv6Addr>().unwrap());
        let (lan, eth0) = (site.gateway.interface("eth1").unwrap(), site.client.interface("eth0").unwrap());
        let (ours4, ours6) = (udp(&site.gateway, "0.0.0.0:5000"), udp(&site.gateway, "[::]:5001"));
        ours4.join_multicast_v4(&group4, &"192.168.10.1".parse().unwrap()).unwrap();
        ours6.join_multicast_v6(&group6, lan).unwrap();
        wait_for("the groups are reported", PATIENCE, || {
            let text = inside.last_lines(100);
            text.contains("igmp v3 report") && text.contains("multicast listener report")
        });
        let sender = udp(&site.client, "192.168.10.5:0");
        sender.set_multicast_ttl_v4(8).unwrap();
        shell(&site.client, "ip route add 239.0.0.0/8 dev eth0");
        let sender6 = udp(&site.client, "[::]:0");
        let hears = |socket: &UdpSocket| socket.recv(&mut [0; 64]).is_ok();
        wait_for("a datagram to the group", PATIENCE, || {
            sender.send_to(b"x", (group4, 5_000)).unwrap();
            hears(&ours4)
        });
        let scoped = std::net::SocketAddrV6::new(group6, 5_001, 0, eth0);
        wait_for("a datagram to the IPv6 group", PATIENCE, || {
            sender6.send_to(b"x", scoped).unwrap();
            hears(&ours6)
        });
        // mDNS of the host, as avahi sends it.
        shell(&site.gateway, "ip route add 239.0.0.0/8 dev eth1");
        udp(&site.gateway, "192.168.10.1:0").send_to(b"hello", (group4, 5_002)).unwrap();
        wait_for("what the host sends", PATIENCE, || inside.last_lines(100).contains("> 239.1.2.3.5002"));
        assert!(!outside.last_lines(50).contains("239.1.2.3"), "{}", outside.last_lines(50));
    });
}

/// So many bytes over TCP from a server at [`FAR`] that knows nothing of the path; how long they took.
fn download(site: &Site, server: &Node, port: u16, bytes: usize) -> std::io::Result<Duration> {
    let listener = server.run(|| TcpListener::bind((FAR, port))).unwrap()?;
    let sent = Background::start(move |_| -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        stream.set_write_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(&vec![7; bytes])
    });
    let begin = Instant::now();
    let to = (FAR.parse::<std::net::IpAddr>().unwrap(), port).into();
    let mut stream = site.client.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(5))).unwrap()?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    let mut received = Vec::new();
    stream.read_to_end(&mut received)?;
    sent.finish()?;
    assert!(received.len() == bytes && received.iter().all(|byte| *byte == 7), "{} bytes", received.len());
    Ok(begin.elapsed())
}

/// Row C2: a link of 1,492 bytes (PPPoE) whose concentrator drops larger packets without a word to the server; the same with a policer that
/// drops what is above 8 Mbit/s. Full segments fit, so that nothing stalls.
#[test]
fn c2_downloads_over_a_pppoe_link_without_icmp() {
    isolated(|| {
        let site = Site::new();
        let (config, _) = documented();
        let server = Node::create("the server").unwrap();
        site.provider.connect("eth1", &[], &server, "eth0", &[]).unwrap();
        shell(
            &site.provider,
            &format!(
                "sysctl -q -w net.ipv4.ip_forward=1; ip addr del {FAR}/32 dev lo; ip addr add 198.51.100.1/24 dev eth1; ip link set eth0 mtu 1492
                 nft 'table inet silent {{ chain out {{ type filter hook output priority 0; meta l4proto icmp drop; }}; }}'"
            ),
        );
        shell(&server, &format!("ip addr add {FAR}/24 dev eth0; ip route add default via 198.51.100.1"));
        shell(&site.gateway, "ip link set eth0 mtu 1492");
        let gateway = site.start(&config);
        let quick = download(&site, &server, 80, 2_000_000).unwrap();
        assert!(quick < Duration::from_secs(5), "{quick:?}");
        shell(
            &site.provider,
            "nft 'table inet police { chain f { type filter hook forward priority 0; tcp sport 81 limit rate over 1000 kbytes/second \
             burst 30 kbytes drop; }; }'",
        );
        let policed = download(&site, &server, 81, 4_000_000).unwrap();
        assert!(policed > Duration::from_millis(1_500) && policed < Duration::from_secs(12), "{policed:?}");
        no_reply_went_astray(&gateway);
    });
}

/// Row C2: the uplink's device has an address in the modem's network as well. Each network sees its own address, whoever asks and
/// whatever port, with endpoint-independent mappings too, also when addresses change while the program runs.
#[test]
fn c2_each_network_of_the_uplink_sees_an_address_of_its_own() {
    isolated(|| {
        let lans = Lans::new(2);
        let (place, client, beyond) = (lans.gateway(), lans.host(1), lans.host(2));
        lans.no_default_route(2);
        shell(beyond, "ip addr add 192.168.100.1/24 dev eth0; ip addr add 198.51.100.7/32 dev lo");
        shell(place, "ip addr add 192.168.100.2/24 dev lan2; ip route add default via 10.1.2.2");
        for number in 3..9 {
            shell(client, &format!("ip addr add 10.1.1.{number}/24 dev eth0"));
        }
        let sections = |mapping: &str| format!("{ALLOW}[[nat]]\nout = \"lan2\"\nmapping = \"{mapping}\"\n");
        let gateway = lans.start(&sections("endpoint-dependent"));
        // Bound to one address each: over UDP an answer would come from another.
        let _far = Mirror::start(beyond, "far", "198.51.100.7:80");
        let _modem = Mirror::start(beyond, "modem", "192.168.100.1:80");
        let see = |near: &str| {
            for number in 2..9 {
                let from = format!("10.1.1.{number}:0");
                for (to, source) in [("198.51.100.7:80", "10.1.2.1"), ("192.168.100.1:80", near)] {
                    let seen = UdpClient::new(client, &from).ask(to, 64).source;
                    assert_eq!(seen.ip().to_string(), source, "{from} asks {to}");
                }
            }
            assert_eq!(ask_tcp(client, "192.168.100.1:80").source.ip().to_string(), near);
        };
        see("192.168.100.2");
        let (code, said) = lans.reload(&gateway, &sections("endpoint-independent"));
        assert_eq!(code, 0, "{said}");
        see("192.168.100.2");
        shell(place, "ip addr del 192.168.100.2/24 dev lan2; ip addr add 192.168.100.3/24 dev lan2");
        std::thread::sleep(Duration::from_millis(500));
        see("192.168.100.3");
    });
}

/// Row R7: a site tunnel of the host's IPsec has no device: policies of the kernel say what goes into it, and they come while the
/// program runs. What it is for never leaves in the clear or translated; the kernel gets it, and everything else goes on. (This
/// kernel has no ESP, so that it finds no state for a packet that is to be sealed, and counts it.)
#[test]
fn r7_what_is_under_the_hosts_ipsec_never_leaves_in_the_clear() {
    isolated(|| {
        let lans = Lans::new(2);
        let (place, client, beyond) = (lans.gateway(), lans.host(1), lans.host(2));
        lans.no_default_route(2);
        shell(beyond, "for a in 10.9.0.5 10.9.7.5 198.51.100.7; do ip addr add $a/32 dev lo; done");
        shell(place, "sysctl -q -w net.ipv4.ip_forward=1; ip route add default via 10.1.2.2");
        let gateway = lans.start(&format!("{ALLOW}[[nat]]\nout = \"lan2\"\n"));
        ping(client, "-c 2 10.9.0.5");
        let _mirror = Mirror::start(beyond, "beyond", "10.9.0.5:80");
        let live = UdpClient::new(client, "0.0.0.0:0");
        assert_eq!(live.ask("10.9.0.5:80", 64).source.ip(), gateway_ip(2));
        let unsealed = || {
            let text =
                place.run(|| std::fs::read_to_string("/proc/thread-self/net/xfrm_stat")).unwrap().unwrap();
            let line = text.lines().find(|line| line.starts_with("XfrmOutNoStates")).unwrap();
            line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
        };
        assert_eq!(unsealed(), 0);
        shell(
            place,
            "ip xfrm policy add src 10.1.1.0/24 dst 10.9.0.0/16 dir out priority 9 \
             tmpl src 10.1.2.1 dst 10.1.2.2 proto esp mode tunnel
             ip xfrm policy add src 10.1.1.0/24 dst 10.9.7.0/24 dir out priority 3",
        );
        wait_for("the policy counts", 2.0, || try_shell(client, "ping -c 1 -W 1 10.9.0.5").is_err());
        wait_for("the kernel has it", PATIENCE, || {
            let _ = try_shell(client, "ping -c 1 -W 1 10.9.0.5");
            unsealed() > 0
        });
        assert!(try_shell(client, "ping -c 2 -i 0.2 -W 1 10.9.0.5").is_err(), "it left in the clear");
        // A flow that was there goes on under the policy.
        let before = unsealed();
        wait_for("the flow is the kernel's", PATIENCE, || {
            live.send("10.9.0.5:80".parse().unwrap());
            unsealed() > before
        });
        // What the policies leave out, and what they do not name.
        ping(client, "-c 2 10.9.7.5");
        ping(client, "-c 2 198.51.100.7");
        ping(client, "-c 1 10.1.1.1");
        let told = explain(&gateway, "udp 10.1.1.2:1000 > 10.9.0.5:80");
        assert_eq!(told.verdict, "to the kernel, which passes it on");
        shell(place, "ip xfrm policy flush");
        wait_for("the policies are gone", PATIENCE, || try_shell(client, "ping -c 1 -W 1 10.9.0.5").is_ok());
    });
}

/// Row R7: a forward leads to a service of the gateway host itself, at another port: for strangers, for the LAN, for the host; the
/// service sees who asks, and other forwards go on as ever.
#[test]
fn r7_a_forward_leads_to_the_host_itself() {
    isolated(|| {
        let lans = Lans::new(2);
        lans.no_default_route(2);
        let (inside, stranger) = (lans.host(1), lans.host(2));
        let _gateway = lans.start(&format!(
            "[[interface]]\nname = \"lan1\"\ndevice = \"lan1\"\naddress = \"10.1.1.1/24\"\n{ALLOW}[[nat]]\nout = \"lan2\"\n\
             [[forward]]\nlisten = \"tcp+udp lan2:2222\"\nto = \"10.1.1.1:80\"\n\
             [[forward]]\nlisten = \"tcp lan2:2223\"\nto = \"10.1.1.2:80\"\n"
        ));
        let _host = Mirror::start(lans.gateway(), "host", "0.0.0.0:80");
        let _inside = Mirror::start(inside, "inside", "0.0.0.0:80");
        for (from, source) in [(stranger, "10.1.2.2"), (inside, "10.1.1.2")] {
            let seen = ask_tcp(from, "10.1.2.1:2222");
            assert_eq!(seen.source.ip().to_string(), source);
            assert_eq!(ask_udp(from, "10.1.2.1:2222").source.ip().to_string(), source);
        }
        Talk::open(stranger, "10.1.2.1:2222").unwrap().echo(300_000).unwrap();
        ask_tcp(lans.gateway(), "10.1.2.1:2222");
        assert_eq!(ask_tcp(stranger, "10.1.2.1:2223").name, "inside");
    });
}
