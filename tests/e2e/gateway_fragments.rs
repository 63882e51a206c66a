//! Datagrams larger than the path, in pieces, through the gateway.

use std::net::{Ipv4Addr, SocketAddrV4};

use crate::capture::Capture;
use crate::gateway_raw::*;
use crate::gateway_scene::*;
use crate::machine::{busy, isolated};
use crate::scene::*;

const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 1, 1, 2);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 1, 2, 2);

/// The pieces of a datagram of `bytes` bytes from `port` of the client to port 80 of the server, of at most 1,480 bytes of content.
fn pieces(port: u16, bytes: usize, id: u16) -> Vec<(Header, Vec<u8>)> {
    pieces_of(port, bytes, id, 1_480)
}

/// Likewise, of at most `each` bytes of content, a multiple of 8.
fn pieces_of(port: u16, bytes: usize, id: u16, each: usize) -> Vec<(Header, Vec<u8>)> {
    let payload: Vec<u8> = (0..bytes).map(|place| (place * 13 % 241) as u8).collect();
    let whole = udp(SocketAddrV4::new(CLIENT, port), SocketAddrV4::new(SERVER, 80), &payload);
    let count = whole.len().div_ceil(each);
    let piece = |(number, content): (usize, &[u8])| {
        let header = Header::new(CLIENT, SERVER, UDP);
        let offset = (number * each) as u16;
        (Header { id, offset, more: number + 1 < count, ..header }, content.to_vec())
    };
    whole.chunks(each).enumerate().map(piece).collect()
}

/// Row C5: large datagrams and pings both ways, in each mode and with each variant.
#[test]
fn c5_large_datagrams_in_every_mode_and_variant() {
    isolated(|| {
        let lans = Lans::new(2);
        let (client, server) = (lans.host(1), lans.host(2));
        let gateway = lans.start(ALLOW);
        let _mirror = Mirror::start(server, "server", "0.0.0.0:80");
        for mode in ["address-and-port", "port-only", "none"] {
            for variant in [
                "\"as-needed\"",
                "\"assemble\"",
                "\"bridge\"",
                "{ up-to-bytes = 4000 }",
                "{ up-to-fragments = 3 }",
            ] {
                let sections =
                    format!("{ALLOW}fragments = {variant}\n[[nat]]\nout = \"lan2\"\nmode = \"{mode}\"\n");
                let (code, said) = lans.reload(&gateway, &sections);
                assert_eq!(code, 0, "{said}");
                let udp = UdpClient::new(client, "0.0.0.0:0");
                for bytes in [8_000, 1_473, 30_000, 2_960, 65_000] {
                    // The answer has a line more, and the largest would not fit any more.
                    let bytes = bytes.min(65_400);
                    let answer = udp.ask("10.1.2.2:80", bytes);
                    let expected = if mode == "address-and-port" { gateway_ip(2) } else { host_ip(1) };
                    assert_eq!(answer.source.ip(), expected, "{mode} {variant}");
                }
                ping(client, "-c 2 -s 4000 10.1.2.2");
            }
        }
        ping(client, "-c 2 -s 4000 fd00:1:2::2");
        no_reply_went_astray(&gateway);
        for reason in ["fragment-overlap", "fragment-invalid", "fragments-full", "ip-malformed"] {
            assert_eq!(settled(|| dropped(&gateway, reason)), 0, "{reason}");
        }
    });
}

/// Row C5: the variants as the receiver's wire shows them. A datagram comes in pieces that nobody else would cut: forwarded as they
/// came they stay so, and what was put together leaves whole.
#[test]
fn c5_pieces_are_bridged_or_put_together_as_configured() {
    isolated(|| {
        let lans = Lans::new(2);
        let gateway = lans.start(ALLOW);
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        let raw = Raw::new(&lans, 1);
        let nat = "[[nat]]\nout = \"lan2\"";
        let cases = [
            ("\"bridge\"", nat, false),
            ("\"assemble\"", nat, true),
            ("{ up-to-bytes = 1300 }", nat, false),
            ("{ up-to-bytes = 1500 }", nat, true),
            ("{ up-to-fragments = 2 }", nat, false),
            ("{ up-to-fragments = 3 }", nat, true),
            // A core that forwards this little is below it always.
            ("{ load-below-percent = 100 }", nat, true),
            ("\"as-needed\"", nat, false),
            ("\"as-needed\"", "[[nat]]\nout = \"lan2\"\nassemble-fragments = true", true),
        ];
        for (number, (variant, nat, together)) in cases.into_iter().enumerate() {
            let (code, said) = lans.reload(&gateway, &format!("{ALLOW}fragments = {variant}\n{nat}\n"));
            assert_eq!(code, 0, "{said}");
            // A flow keeps what its rule said when it began.
            let client = UdpClient::new(lans.host(1), "10.1.1.2:0");
            let capture = Capture::start(lans.host(2), "eth0", 1_000);
            // 20 + 8 + 1,400 bytes.
            for (header, content) in pieces_of(client.local().port(), 1_400, number as u16 + 1, 600) {
                raw.send(&header.packet(&content));
            }
            wait_for(&format!("an answer through {variant}"), PATIENCE, || {
                client.receives_from(SocketAddrV4::new(SERVER, 80).into())
            });
            let frames = capture.finish();
            let content = |frame: &Vec<u8>| usize::from(u16::from_be_bytes([frame[16], frame[17]])) - 20;
            let seen: Vec<usize> =
                frames.iter().filter(|frame| frame[30..34] == SERVER.octets()).map(content).collect();
            assert_eq!(seen, if together { vec![1_408] } else { vec![600, 600, 208] }, "{variant} {nat}");
        }
    });
}

/// Row C5: a virtual server and a forward get large datagrams too; a source address of its own for each direction.
#[test]
fn c5_large_datagrams_through_servers_and_forwards() {
    isolated(|| {
        let lans = Lans::new(3);
        let gateway = lans.start(&format!(
            "{ALLOW}[[virtual-server]]\nlisten = \"udp 10.1.1.10:80\"\nsource = \"none\"\n\
             backends = [\"10.1.2.2:80\", \"10.1.3.2:80\"]\n\
             [[forward]]\nlisten = \"udp 10.1.1.1:81\"\nto = \"10.1.3.2:80\"\n"
        ));
        let _two = Mirror::start(lans.host(2), "two", "0.0.0.0:80");
        let _three = Mirror::start(lans.host(3), "three", "0.0.0.0:80");
        for _ in 0..12 {
            let client = UdpClient::new(lans.host(1), "0.0.0.0:0");
            let answer = client.ask("10.1.1.10:80", 8_000);
            assert_eq!(answer.source.ip(), host_ip(1));
            assert_eq!(answer, client.ask("10.1.1.10:80", 64), "pieces and whole packets are one flow");
            let other = UdpClient::new(lans.host(1), "0.0.0.0:0");
            assert_eq!(other.ask("10.1.1.1:81", 8_000).name, "three");
        }
        no_reply_went_astray(&gateway);
    });
}

/// Row C5: pieces in any order, the first one last; a piece twice. The datagram arrives once it is complete.
#[test]
fn c5_pieces_out_of_order() {
    isolated(|| {
        let lans = Lans::new(2);
        let gateway = lans.start(&format!("{ALLOW}[[nat]]\nout = \"lan2\"\n"));
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        let client = UdpClient::new(lans.host(1), "10.1.1.2:0");
        let raw = Raw::new(&lans, 1);
        let port = client.local().port();
        let server = SocketAddrV4::new(SERVER, 80).into();
        let orders: [&[usize]; 6] =
            [&[0, 1, 2, 3], &[3, 2, 1, 0], &[1, 2, 3, 0], &[0, 3, 1, 2], &[2, 0, 3, 1], &[0, 1, 1, 2, 3, 3]];
        for (number, order) in orders.iter().enumerate() {
            let mut id = 100 * (number as u16 + 1);
            wait_for(&format!("pieces in the order {order:?}"), PATIENCE, || {
                id += 1;
                let pieces = pieces(port, 5_000, id);
                for place in *order {
                    let (header, content) = &pieces[*place];
                    raw.send(&header.packet(content));
                }
                client.receives_from(server)
            });
        }
        no_reply_went_astray(&gateway);
    });
}

/// Row C5: pieces that overlap, are too small or reach too far are dropped and counted, and nothing of them arrives (RFC 5722,
/// RFC 1858); good ones still pass.
#[test]
fn c5_contradicting_pieces_are_dropped() {
    isolated(|| {
        let lans = Lans::new(2);
        let gateway = lans.start(&format!("{ALLOW}fragments = \"assemble\"\n[[nat]]\nout = \"lan2\"\n"));
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        let client = UdpClient::new(lans.host(1), "10.1.1.2:0");
        let raw = Raw::new(&lans, 1);
        let port = client.local().port();
        // Overlap: the second piece begins 8 bytes too early, with other bytes.
        let good = pieces(port, 4_000, 7);
        raw.send(&good[0].0.packet(&good[0].1));
        let early = Header { offset: 1_472, ..good[1].0 };
        raw.send(&early.packet(&vec![0xaa; 1_480]));
        raw.send(&good[2].0.packet(&good[2].1));
        wait_for("the overlap is counted", PATIENCE, || dropped(&gateway, "fragment-overlap") > 0);
        // Beyond 65,535 bytes (the ping of death).
        let far = Header { id: 8, offset: 65_528, more: false, ..good[0].0 };
        raw.send(&far.packet(&[0; 800]));
        // A piece in the middle whose length is no multiple of 8.
        let odd = Header { id: 9, offset: 1_480, more: true, ..good[0].0 };
        raw.send(&odd.packet(&[0; 801]));
        wait_for("the others are counted", PATIENCE, || dropped(&gateway, "fragment-invalid") >= 2);
        assert_eq!(client.ask("10.1.2.2:80", 8_000).source.ip(), gateway_ip(2));
    });
}

/// Row C5: a piece whose others do not come, and a flow of a protocol without ports, are kept as long as configured: by default it
/// were 15 s and ten minutes.
#[test]
fn c5_what_nothing_follows_is_given_up_in_time() {
    isolated(|| {
        let lans = Lans::new(2);
        let gateway = lans.start(&format!(
            "{ALLOW}timeouts = {{ other-seconds = 3, fragments-seconds = 2 }}\n[[nat]]\nout = \"lan2\"\n"
        ));
        let raw = Raw::new(&lans, 1);
        // Generic routing encapsulation without options, of nothing.
        raw.send(&Header::new(CLIENT, SERVER, 47).packet(&[0, 0, 8, 0]));
        wait_for("a flow", PATIENCE, || flows(&gateway, "47").flows.len() == 1);
        let (header, content) = &pieces(4_000, 4_000, 1)[1];
        raw.send(&header.packet(content));
        wait_for("the flow ends", 10.0, || flows(&gateway, "47").flows.is_empty());
        wait_for("the piece is given up", 10.0, || dropped(&gateway, "fragment-timeout") == 1);
    });
}

/// Row C5: a flood of first pieces that are never completed stays within its bounds, is counted, and whole packets and other
/// people's pieces pass.
#[test]
fn c5_a_flood_of_pieces_stays_bounded() {
    let _busy = busy();
    isolated(|| {
        let lans = Lans::new(3);
        let gateway = lans.start(&format!(
            "{ALLOW}fragment-bytes-max = 1_000_000\nfragments-per-source-max = 16\n[[nat]]\nout = \"lan2\"\n"
        ));
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        let mut talk = Talk::open(lans.host(1), "10.1.2.2:80").unwrap();
        let before = resident_kb(&gateway);
        let flood = Flood::start(Raw::new(&lans, 1), |number| {
            let header = Header::new(CLIENT, SERVER, UDP);
            Header { id: number as u16, offset: 1_480, more: true, ..header }.packet(&[7; 1_480])
        });
        wait_for("the bound is reached", PATIENCE, || dropped(&gateway, "fragments-full") > 1_000);
        talk.echo(100_000).unwrap();
        let other = UdpClient::new(lans.host(3), "0.0.0.0:0");
        assert_eq!(other.ask("10.1.2.2:80", 8_000).source.ip(), gateway_ip(2));
        drop(flood);
        talk.echo(100_000).unwrap();
        let after = resident_kb(&gateway);
        assert!(after < before + 30_000, "memory grew from {before} to {after} kB");
        assert_eq!(ask_udp(lans.host(1), "10.1.2.2:80").source.ip(), gateway_ip(2));
    });
}

/// Row C10: fragments are answered as whole packets are. Of a datagram in fragments the client hears that its time to live ended
/// here, that it is too big (IPv6), and what routers behind the NAT say about a fragment that they got.
#[test]
fn c10_icmp_errors_about_fragments() {
    isolated(|| {
        let lans = Lans::new(2);
        let (client, router) = (lans.host(1), lans.host(2));
        // The far end of network 2 is a router, by which nothing is reached in fact.
        shell(
            router,
            "sysctl -qw net.ipv4.ip_forward=1 && ip route add 198.51.100.0/24 via 10.1.2.9 dev eth0",
        );
        shell(lans.gateway(), "ip link set lan2 mtu 1400");
        shell(router, "ip link set eth0 mtu 1400");
        let gateway = lans.start(&format!(
            "{ALLOW}[[nat]]\nout = \"lan2\"\n[[route]]\nto = \"198.51.100.0/24\"\nvia = \"10.1.2.2\"\n"
        ));
        let heard = |arguments: &str, what: &str| {
            let said = shell(client, &format!("ping -c 4 -i 0.2 -W 1 {arguments} || true"));
            assert!(said.contains(what), "ping {arguments}: {said}");
        };
        heard("-s 3000 -t 1 10.1.2.2", "From 10.1.1.1 icmp_seq=1 Time to live exceeded");
        heard("-s 3000 -t 2 198.51.100.7", "From 10.1.2.2 icmp_seq=1 Time to live exceeded");
        heard("-s 3000 -t 1 fd00:1:2::2", "Time exceeded: Hop limit");
        // The first ones are too big; then the client has learned.
        heard("-s 3000 fd00:1:2::2", "bytes from fd00:1:2::2");
        let learned = shell(client, "ip -6 route get fd00:1:2::2");
        assert!(learned.contains("mtu 1400"), "{learned}");
        no_reply_went_astray(&gateway);
    });
}

/// Row C10: no packet is passed on to the broadcast address of a network behind the gateway (RFC 2644), nor answered.
#[test]
fn c10_no_directed_broadcast() {
    isolated(|| {
        let lans = Lans::new(2);
        let gateway = lans.start(ALLOW);
        let raw = Raw::new(&lans, 1);
        let listener = UdpClient::new(lans.host(2), "0.0.0.0:9");
        let client = SocketAddrV4::new(CLIENT, 4_000);
        for last in [255, 2] {
            let to = SocketAddrV4::new(Ipv4Addr::new(10, 1, 2, last), 9);
            raw.send(&Header::new(CLIENT, *to.ip(), UDP).packet(&udp(client, to, b"x")));
        }
        assert!(listener.receives_from(client.into()), "the plain one");
        assert!(!listener.receives_from(client.into()), "only that");
        assert_eq!(settled(|| dropped(&gateway, "directed-broadcast")), 1);
    });
}
