//! Port forwards, from outside and from inside.

use std::io::{Read as _, Write as _};
use std::time::Duration;

use crate::gateway_clients::*;
use crate::gateway_scene::*;
use crate::machine::isolated;
use crate::scene::*;

const FORWARDS: &str = "[[nat]]\nout = \"lan2\"\n\
    [[forward]]\nlisten = \"tcp+udp lan2:8080\"\nto = \"10.1.1.2:80\"\n\
    [[forward]]\nlisten = \"tcp 10.1.2.1:2222\"\nto = \"10.1.1.2:22\"\n";

/// Rows C2, C4: hosts at both sides have an overlay (VXLAN without an outer checksum). Their devices would make segments and
/// checksums of what is inside; translated and sent on they arrive as packets that are right inside and outside.
#[test]
fn c2_c4_an_overlay_of_hosts_works_through_translation() {
    isolated(|| {
        let lans = Lans::new(2);
        let forward =
            "[[nat]]\nout = \"lan2\"\n[[forward]]\nlisten = \"udp lan2:4789\"\nto = \"10.1.1.2:4789\"\n";
        let gateway = lans.start(&format!("{ALLOW}{forward}"));
        for (number, local, remote) in [(1, "10.1.1.2", "10.1.2.2"), (2, "10.1.2.2", "10.1.2.1")] {
            let link = format!("vxlan id 42 dstport 4789 dev eth0 local {local} remote {remote} noudpcsum");
            shell(lans.host(number), &format!("ip link add overlay type {link}"));
            shell(lans.host(number), "ip link set overlay mtu 1450 up");
            shell(lans.host(number), &format!("ip addr add 192.168.7.{number}/24 dev overlay"));
        }
        let _mirror = Mirror::start(lans.host(2), "far", "0.0.0.0:80");
        let mut talk = Talk::open(lans.host(1), "192.168.7.2:80").unwrap();
        let began = std::time::Instant::now();
        talk.echo(4 << 20).unwrap();
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}: segments are lost", began.elapsed());
        assert_eq!(dropped(&gateway, "bad-offload"), 0);
    });
}

/// Rows C2, C4: a service of an inside host is reached at the gateway's outside address, over TCP and UDP, and sees the client's
/// real address. ssh, curl and bulk data; the view counts its flows.
#[test]
fn c2_c4_a_forward_shows_the_real_client() {
    isolated(|| {
        let lans = Lans::new(2);
        lans.no_default_route(2);
        let gateway = lans.start(&format!("{ALLOW}{FORWARDS}"));
        let (inside, outside) = (lans.host(1), lans.host(2));
        let _mirror = Mirror::start(inside, "inside", "0.0.0.0:80");
        for _ in 0..8 {
            let talk = Talk::open(outside, "10.1.2.1:8080").unwrap();
            assert_eq!((talk.answer.source, talk.answer.name.as_str()), (talk.local, "inside"));
            assert_eq!(ask_udp(outside, "10.1.2.1:8080").source.ip(), host_ip(2));
        }
        assert_eq!(curl(outside, "10.1.2.1:8080").unwrap().source.ip(), host_ip(2));
        Talk::open(outside, "10.1.2.1:8080").unwrap().echo(1_000_000).unwrap();
        let mut ssh = Ssh::start(inside, 22);
        ssh.port = 2222;
        assert!(ssh.run(outside, "10.1.2.1", "echo $SSH_CONNECTION").starts_with("10.1.2.2 "));
        // What does not match a forward is for the gateway itself, where nobody listens.
        assert_eq!(
            Talk::open(outside, "10.1.2.1:8081").err().map(|error| error.kind()),
            Some(std::io::ErrorKind::ConnectionRefused)
        );
        wait_for("the forward counts its flows", PATIENCE, || {
            services(&gateway).forwards.iter().any(|forward| forward.total_flows >= 8)
        });
        no_reply_went_astray(&gateway);
    });
}

/// Row C2: hairpin. Inside hosts reach the service at its outside address too: from another inside network, and from the
/// service's own one, where the gateway must put itself between them (RFC 4787 §6).
#[test]
fn c2_a_forward_is_reached_from_inside() {
    isolated(|| {
        let lans = Lans::new(3);
        let gateway = lans.start(&format!("{ALLOW}{FORWARDS}"));
        let _mirror = Mirror::start(lans.host(1), "inside", "10.1.1.2:80");
        for _ in 0..4 {
            assert_eq!(ask_tcp(lans.host(3), "10.1.2.1:8080").name, "inside");
            assert_eq!(ask_udp(lans.host(3), "10.1.2.1:8080").name, "inside");
        }
        shell(lans.host(1), "ip address add 10.1.1.3/24 dev eth0");
        let text = shell(
            lans.host(1),
            "curl --silent --show-error --max-time 20 --interface 10.1.1.3 http://10.1.2.1:8080/",
        );
        assert!(text.starts_with("inside ") && !text.contains("10.1.1.3"), "{text}");
        no_reply_went_astray(&gateway);
    });
}

/// Row C2: hairpin where the forward's address, the interface's own, is none of those that its clients get.
#[test]
fn c2_a_forward_outside_the_pool_is_reached_from_inside() {
    isolated(|| {
        let lans = Lans::new(3);
        let pool = FORWARDS.replacen("[[forward]]", "addresses = [\"10.1.2.16\"]\n[[forward]]", 1);
        let gateway = lans.start(&format!("{ALLOW}{pool}"));
        let _mirror = Mirror::start(lans.host(1), "inside", "10.1.1.2:80");
        shell(lans.host(1), "ip address add 10.1.1.3/24 dev eth0");
        for _ in 0..8 {
            let text = shell(
                lans.host(1),
                "curl --silent --show-error --max-time 20 --interface 10.1.1.3 http://10.1.2.1:8080/",
            );
            assert!(text.starts_with("inside 10.1.2.16:"), "{text}");
            assert_eq!(ask_tcp(lans.host(3), "10.1.2.1:8080").name, "inside");
        }
        no_reply_went_astray(&gateway);
    });
}

/// Row C2: two inside hosts that know each other by their outside addresses only talk by them (RFC 4787 §6).
#[test]
fn c2_two_clients_meet_at_their_outside_addresses() {
    isolated(|| {
        let lans = Lans::new(3);
        lans.no_default_route(2);
        let gateway =
            lans.start(&format!("{ALLOW}[[nat]]\nout = \"lan2\"\nmapping = \"endpoint-independent\"\n"));
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        let (one, two) =
            (UdpClient::new(lans.host(1), "0.0.0.0:0"), UdpClient::new(lans.host(3), "0.0.0.0:0"));
        let (at_one, at_two) = (one.ask("10.1.2.2:80", 64).source, two.ask("10.1.2.2:80", 64).source);
        wait_for("two hears one, from its outside address", PATIENCE, || {
            one.send(at_two);
            two.receives_from(at_one)
        });
        wait_for("one hears two", PATIENCE, || {
            two.send(at_one);
            one.receives_from(at_two)
        });
        no_reply_went_astray(&gateway);
    });
}

/// Row C2: with `proxy-protocol` the service is told the client's address in the first bytes, whatever it sees itself.
#[test]
fn c2_a_forward_tells_the_client_by_proxy_protocol() {
    isolated(|| {
        let lans = Lans::new(2);
        let _gateway = lans.start(&format!(
            "{ALLOW}[[forward]]\nlisten = \"tcp 10.1.2.1:8080\"\nto = \"10.1.1.2:80\"\nproxy-protocol = true\n"
        ));
        let listener = tcp_listener(lans.host(1), "10.1.1.2:80");
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            let mut all = Vec::new();
            let mut buffer = [0; 4_096];
            while !all.ends_with(b"last words\n") {
                let bytes = stream.read(&mut buffer).unwrap();
                assert!(bytes > 0, "{all:?}");
                all.extend_from_slice(&buffer[..bytes]);
            }
            stream.write_all(b"thanks").unwrap();
            all
        });
        let connect = || std::net::TcpStream::connect("10.1.2.1:8080");
        let mut client = lans.host(2).run(connect).unwrap().unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let payload: Vec<u8> =
            (0..100_000u32).map(|n| (n % 199) as u8 + 32).chain(*b"last words\n").collect();
        client.write_all(&payload).unwrap();
        let mut thanks = [0; 6];
        client.read_exact(&mut thanks).unwrap();
        let all = server.join().unwrap();
        let header = all.strip_suffix(payload.as_slice()).expect("the payload is unchanged");
        let port = client.local_addr().unwrap().port();
        // Version 1 in words, or version 2 in bytes.
        let words = format!("PROXY TCP4 10.1.2.2 10.1.2.1 {port} 8080\r\n").into_bytes();
        let mut bytes = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x0a\x01\x02\x02\x0a\x01\x02\x01".to_vec();
        bytes.extend([port.to_be_bytes(), 8080u16.to_be_bytes()].concat());
        assert!(header == words || header.starts_with(&bytes), "{header:?}");
    });
}

/// Row C2: one forward of a range of ports, to the same ports and to others.
#[test]
fn c2_a_forward_of_a_range() {
    isolated(|| {
        let lans = Lans::new(2);
        lans.no_default_route(2);
        let gateway = lans.start(&format!(
            "{ALLOW}[[nat]]\nout = \"lan2\"\n[[forward]]\nlisten = \"udp lan2:16384-16393\"\nto = \"10.1.1.2\"\n\
             [[forward]]\nlisten = \"tcp+udp 10.1.2.1:5000-5999\"\nto = \"10.1.1.2:6000-6999\"\n"
        ));
        let (inside, outside) = (lans.host(1), lans.host(2));
        for (inner, outer) in [(16_384, 16_384), (16_393, 16_393), (6_000, 5_000), (6_999, 5_999)] {
            let name = format!("inside-{inner}");
            let _mirror = Mirror::start(inside, &name, &format!("0.0.0.0:{inner}"));
            for _ in 0..4 {
                let answer = ask_udp(outside, &format!("10.1.2.1:{outer}"));
                assert_eq!((answer.name.as_str(), answer.source.ip()), (name.as_str(), host_ip(2)));
            }
            if inner < 10_000 {
                assert_eq!(ask_tcp(outside, &format!("10.1.2.1:{outer}")).name, name);
            }
        }
        let status = services(&gateway);
        let shown: Vec<_> =
            status.forwards.iter().map(|forward| (forward.listen.as_str(), forward.to.as_str())).collect();
        assert_eq!(shown[0], ("udp 10.1.2.1:16384-16393", "10.1.1.2:16384-16393"));
        assert_eq!(shown[1], ("tcp 10.1.2.1:5000-5999", "10.1.1.2:6000-6999"));
        no_reply_went_astray(&gateway);
    });
}
