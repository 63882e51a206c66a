//! Source translation, forwards, hairpin, fragments under translation (rows C2, C3, C4, C5).

use std::collections::BTreeSet;
use std::net::IpAddr;

use packet::DropReason;
use packet::attachment::Ingress;
use packet::flow::FlowKey;

use super::world::*;
use crate::spec::{ForwardSpec, Mapping, NatMode, NatSpec, TCP, UDP};

fn client(number: u64) -> FlowKey {
    let bits = mix(number);
    key(
        UDP,
        &format!("10.0.0.{}:{}", 2 + bits % 250, 1024 + (bits >> 8) % 60_000),
        &format!("198.51.{}.{}:{}", (bits >> 24) % 200, 1 + (bits >> 32) % 250, 1 + (bits >> 40) % 60_000),
    )
}

/// C2: of many random flows over 2 to 7 cores no packet in either direction changes cores.
#[test]
fn replies_of_translated_flows_come_to_the_core_of_the_request() {
    for cores in [1, 2, 3, 7] {
        let mut world = masquerade(cores);
        for number in 0..2_000 {
            let flow = client(number);
            let request = world.one(WAN_OF_CLIENT, &udp_of(&flow, b"question"));
            assert_eq!(request.by(), WAN);
            let outside = request.key();
            assert_eq!(outside.src, "203.0.113.1".parse::<IpAddr>().unwrap());
            assert_eq!((outside.dst, outside.dst_port), (flow.dst, flow.dst_port));
            let reply = world.one(WAN, &udp_of(&outside.reversed(), b"answer"));
            assert_eq!((reply.by(), reply.key()), (LAN, flow.reversed()));
        }
        assert_eq!(world.total(|counters| counters.handed_out), 0, "{cores} cores");
        assert_eq!(world.total(|counters| counters.replies_on_wrong_core), 0);
        let used = world.cores.iter().filter(|core| core.counters.flows_opened > 0).count();
        assert_eq!(used, usize::from(cores), "every core has its share");
    }
}

const WAN_OF_CLIENT: Ingress = LAN;

/// C3: the client's address stays, the port is chosen; two clients may even share everything else.
#[test]
fn port_only_keeps_the_address() {
    let mut spec = two_interfaces();
    spec.nats.push(nat(NatMode::PortOnly, &[]));
    let mut world = World::new(4, spec);
    let mut ports = BTreeSet::new();
    for number in 0..1_000 {
        let flow = client(number);
        let outside = world.one(LAN, &udp_of(&flow, b"x")).key();
        assert_eq!(outside.src, flow.src);
        ports.insert(outside.src_port);
        let reply = world.one(WAN, &udp_of(&outside.reversed(), b"y"));
        assert_eq!(reply.key(), flow.reversed());
    }
    assert!(ports.len() > 900, "ports are spread");
    assert_eq!(world.total(|counters| counters.handed_out), 0);
}

/// C4 without any translation: the hash is symmetric, so nothing is handed over either.
#[test]
fn untranslated_flows_stay_on_their_core() {
    let mut spec = two_interfaces();
    spec.nats.push(nat(NatMode::None, &[]));
    let mut world = World::new(5, spec);
    for number in 0..500 {
        let flow = client(number);
        assert_eq!(world.one(LAN, &udp_of(&flow, b"x")).key(), flow);
        assert_eq!(world.one(WAN, &udp_of(&flow.reversed(), b"y")).key(), flow.reversed());
    }
    assert_eq!(world.total(|counters| counters.handed_out), 0);
    assert_eq!(world.flows(), 500);
}

/// C4 where the arrival differs: the interface spreads packets by another hash (a card with asymmetric RSS). Whatever
/// core reads a packet, the owner works on it, and exactly the foreign ones are handed over.
#[test]
fn what_another_core_reads_is_handed_to_the_owner() {
    let mut spec = two_interfaces();
    spec.nats.push(nat(NatMode::None, &[]));
    let mut world = World::new(3, spec);
    let mut foreign = 0;
    for number in 0..300 {
        let flow = client(number);
        for (ingress, packet) in [(LAN, udp_of(&flow, b"x")), (WAN, udp_of(&flow.reversed(), b"y"))] {
            let reader = (mix(number ^ u64::from(ingress.compact())) % 3) as usize;
            foreign += u64::from(reader != world.reader(ingress, &packet));
            assert_eq!(world.packet_at(reader, ingress, &packet).len(), 1);
        }
    }
    assert_eq!(world.total(|counters| counters.handed_out), foreign);
    assert_eq!(world.flows(), 300, "no flow is there twice");
}

#[test]
fn a_tcp_connection_from_first_to_last_segment() {
    let mut world = masquerade(2);
    let (inside, server) = ("10.0.0.9:5000", "198.51.100.7:80");
    let outside = world.one(LAN, &tcp(inside, server, SYN, 100, 0, b"")).key();
    let back = outside.reversed();
    assert_eq!(world.one(WAN, &tcp_of(&back, SYN | ACK, 900, 101, b"")).key(), key(TCP, server, inside));
    world.one(LAN, &tcp(inside, server, ACK, 101, 901, b""));
    world.one(LAN, &tcp(inside, server, ACK, 101, 901, b"GET / HTTP/1.0\r\n\r\n"));
    world.one(WAN, &tcp_of(&back, ACK, 901, 119, b"HTTP/1.0 200 OK\r\n\r\n"));
    world.one(WAN, &tcp_of(&back, FIN | ACK, 920, 119, b""));
    world.one(LAN, &tcp(inside, server, FIN | ACK, 119, 921, b""));
    world.one(WAN, &tcp_of(&back, ACK, 921, 120, b""));
    assert_eq!(world.flows(), 1);
    world.wait(15);
    assert_eq!(world.flows(), 0, "a closed connection is forgotten soon");
    assert_eq!(world.total(|counters| counters.flows_closed), 1);
}

#[test]
fn pings_and_their_errors_find_their_way_back() {
    let mut world = masquerade(3);
    let request = world.one(LAN, &echo("10.0.0.9", "198.51.100.7", 8, 77));
    let outside = request.key();
    assert_eq!(outside.src, "203.0.113.1".parse::<IpAddr>().unwrap());
    let id = u16::from_be_bytes([request.packet[24], request.packet[25]]);
    let reply = world.one(WAN, &echo("198.51.100.7", "203.0.113.1", 0, id));
    assert_eq!(reply.key().dst, "10.0.0.9".parse::<IpAddr>().unwrap());
    assert_eq!(reply.packet[24..26], 77u16.to_be_bytes());
    let error = icmp_error("192.0.2.33", outside.src, 11, 0, &request.packet);
    let error = world.one(WAN, &error);
    assert_eq!(error.by(), LAN);
    let quoted = FlowKey::of(&echo("10.0.0.9", "198.51.100.7", 8, 77)).unwrap();
    assert_eq!(error.key(), quoted.reversed(), "the quoted packet is the client's own again");
    assert_eq!(error.packet[12..16], [192, 0, 2, 33], "the router's address stays");
}

#[test]
fn nothing_comes_in_unasked() {
    let mut world = masquerade(2);
    world.dropped(WAN, &tcp("198.51.100.7:80", "10.0.0.9:5000", SYN, 1, 0, b""), DropReason::NatNoMapping);
    // The gateway's own address: the host's stack decides.
    let left = world.one(WAN, &tcp("198.51.100.7:80", "203.0.113.1:22", SYN, 1, 0, b""));
    assert_eq!(left.by(), HOST);
}

#[test]
fn a_port_forward_keeps_the_clients_address() {
    let mut spec = two_interfaces();
    spec.nats.push(nat(NatMode::AddressAndPort, &["203.0.113.1"]));
    spec.forwards.push(ForwardSpec {
        protocol: TCP,
        listen: "203.0.113.1:8080".parse().unwrap(),
        to: "10.0.0.5:80".parse().unwrap(),
        tenant: 0,
        ports: 1,
        proxy_protocol: false,
    });
    let mut world = World::new(4, spec);
    let mut handed = 0;
    for number in 0..200u16 {
        let remote = format!("198.51.100.7:{}", 2000 + number);
        let inside = world.one(WAN, &tcp(&remote, "203.0.113.1:8080", SYN, 1, 0, b""));
        assert_eq!((inside.by(), inside.key()), (LAN, key(TCP, &remote, "10.0.0.5:80")));
        let request = key(TCP, &remote, "203.0.113.1:8080");
        let reply = key(TCP, "10.0.0.5:80", &remote);
        let owner = world.ownership.table.owner(world.ownership.bucket(&request, 0));
        handed += u64::from(owner != world.ownership.table.owner(world.ownership.bucket(&reply, 0)));
        let left = world.one(LAN, &tcp_of(&reply, SYN | ACK, 7, 2, b""));
        assert_eq!((left.by(), left.key()), (WAN, request.reversed()));
    }
    assert_eq!(world.total(|counters| counters.handed_out), handed, "exactly what the hash demands");
    // A client beside the server comes through the gateway in both directions.
    let left = world.one(LAN, &tcp("10.0.0.9:4000", "203.0.113.1:8080", SYN, 1, 0, b""));
    assert_eq!(left.key().src, "203.0.113.1".parse::<IpAddr>().unwrap(), "hairpin: RFC 4787 REQ-9");
    let left = world.one(LAN, &tcp_of(&left.key().reversed(), SYN | ACK, 7, 2, b""));
    assert_eq!(left.key(), key(TCP, "203.0.113.1:8080", "10.0.0.9:4000"));
    // The server's own connections are translated like anybody's.
    let left = world.one(LAN, &tcp("10.0.0.5:80", "198.51.100.99:443", SYN, 1, 0, b""));
    assert_eq!(left.key().src, "203.0.113.1".parse::<IpAddr>().unwrap());
}

/// RFC 4787 REQ-9 where the forward's address is in no pool: the interface's own one, or another of its network. The source
/// becomes an address of the pool of that interface.
#[test]
fn a_client_beside_the_server_needs_no_pool_address() {
    for listen in ["203.0.113.1:8080", "203.0.113.9:8080"] {
        let mut spec = two_interfaces();
        spec.nats.push(nat(NatMode::AddressAndPort, &["203.0.113.32"]));
        spec.forwards.push(ForwardSpec {
            protocol: TCP,
            listen: listen.parse().unwrap(),
            to: "10.0.0.5:81".parse().unwrap(),
            tenant: 0,
            ports: 1,
            proxy_protocol: false,
        });
        let mut world = World::new(3, spec);
        for port in 4_000..4_100 {
            let client = format!("10.0.0.9:{port}");
            let left = world.one(LAN, &tcp(&client, listen, SYN, 1, 0, b""));
            assert_eq!((left.by(), left.key().dst_port), (LAN, 81));
            assert_eq!(left.key().src, "203.0.113.32".parse::<IpAddr>().unwrap());
            let left = world.one(LAN, &tcp_of(&left.key().reversed(), SYN | ACK, 7, 2, b""));
            assert_eq!((left.by(), left.key()), (LAN, key(TCP, listen, &client)));
            let left = world.one(LAN, &tcp(&client, listen, ACK, 2, 8, b""));
            assert_eq!(left.key().src, "203.0.113.32".parse::<IpAddr>().unwrap());
        }
    }
}

#[test]
fn endpoint_independent_mappings_serve_every_remote() {
    let mut spec = two_interfaces();
    let mut rule = nat(NatMode::AddressAndPort, &["203.0.113.7"]);
    rule.mapping = Mapping::EndpointIndependent;
    spec.nats.push(rule);
    let mut world = World::new(4, spec);
    let first = world.one(LAN, &udp("10.0.0.9:5000", "198.51.100.1:1", b"x")).key();
    for remote in 2..40 {
        let other = world.one(LAN, &udp("10.0.0.9:5000", &format!("198.51.100.{remote}:9"), b"x")).key();
        assert_eq!((other.src, other.src_port), (first.src, first.src_port), "RFC 4787 REQ-1");
    }
    for remote in 50..90 {
        let from = format!("192.0.2.{remote}:77");
        let left = world.one(WAN, &udp(&from, &format!("203.0.113.7:{}", first.src_port), b"hello"));
        assert_eq!(left.key(), key(UDP, &from, "10.0.0.9:5000"), "RFC 4787 REQ-8");
        let left = world.one(LAN, &udp("10.0.0.9:5000", &from, b"hello"));
        assert_eq!((left.key().src, left.key().src_port), (first.src, first.src_port));
    }
    world.wait(400);
    assert_eq!(world.flows(), 0);
}

#[test]
fn fragments_pass_a_nat_in_any_order() {
    for reverse in [false, true] {
        let mut world = masquerade(3);
        let packet = udp("10.0.0.9:5000", "198.51.100.7:53", &[7; 3000]);
        let mut pieces = in_pieces(&packet, 1000);
        if reverse {
            pieces.reverse();
        }
        let left: Vec<Left> = pieces.iter().flat_map(|piece| world.packet(LAN, piece)).collect();
        assert_eq!(left.len(), 4, "bridged: every piece by itself ({reverse})");
        assert!(left.iter().all(|left| left.packet[12..16] == [203, 0, 113, 1]));
        assert_eq!(world.flows(), 1);
    }
}

#[test]
fn tcp_fragments_are_assembled_before_translation() {
    let mut world = masquerade(3);
    let (inside, server) = ("10.0.0.9:5000", "198.51.100.7:80");
    let outside = world.one(LAN, &tcp(inside, server, SYN, 100, 0, b"")).key();
    world.one(WAN, &tcp_of(&outside.reversed(), SYN | ACK, 900, 101, b""));
    world.one(LAN, &tcp(inside, server, ACK, 101, 901, b""));
    let packet = tcp(inside, server, ACK, 101, 901, &[9; 1200]);
    let mut left = Vec::new();
    for piece in in_pieces(&packet, 400).iter().rev() {
        left.extend(world.packet(LAN, piece));
    }
    assert_eq!(left.len(), 1, "one whole packet (row C5: a connection entry exists)");
    assert_eq!(left[0].key(), outside);
    assert_eq!(left[0].packet.len(), packet.len());
}

/// Row R8: what the host sends into the datapath is translated like anybody's, whichever core reads it.
#[test]
fn what_the_host_sends_comes_back_to_its_core() {
    for number in 0..200u16 {
        let mut world = masquerade(2);
        let flow = key(UDP, &format!("10.66.0.1:{}", 32_000 + number), "198.51.100.7:80");
        for core in [0, 1] {
            let mut left = world.packet_at(core, HOST, &udp_of(&flow, b"x"));
            assert_eq!(left.len(), 1);
            let outside = left.remove(0).key();
            assert_eq!(outside.src, "203.0.113.1".parse::<IpAddr>().unwrap());
            let before = world.total(|counters| counters.handed_out);
            let reply = world.packet(WAN, &udp_of(&outside.reversed(), b"y"));
            assert_eq!(world.total(|counters| counters.handed_out), before, "read by the flow's core");
            assert_eq!(reply.len(), 1);
            assert_ne!(reply[0].key(), outside.reversed(), "translated back");
        }
    }
}

#[test]
fn a_forward_of_a_range_keeps_each_port_in_its_place() {
    let mut spec = two_interfaces();
    spec.nats.push(nat(NatMode::AddressAndPort, &["203.0.113.1"]));
    for (protocol, listen, to, ports) in [
        (UDP, "203.0.113.1:16384", "10.0.0.5:16384", 10),
        (UDP, "203.0.113.1:20000", "10.0.0.6:30000", 1_000),
        (UDP, "203.0.113.1:20005", "10.0.0.7:5", 1),
    ] {
        let (listen, to) = (listen.parse().unwrap(), to.parse().unwrap());
        spec.forwards.push(ForwardSpec { protocol, listen, to, ports, tenant: 0, proxy_protocol: false });
    }
    let mut world = World::new(4, spec);
    for (port, target) in [
        (16_384, "10.0.0.5:16384"),
        (16_393, "10.0.0.5:16393"),
        (20_000, "10.0.0.6:30000"),
        (20_005, "10.0.0.6:30005"),
        (20_999, "10.0.0.6:30999"),
    ] {
        for remote in 2_000..2_020 {
            let (remote, listen) = (format!("198.51.100.7:{remote}"), format!("203.0.113.1:{port}"));
            let inside = world.one(WAN, &udp(&remote, &listen, b"q"));
            assert_eq!((inside.by(), inside.key()), (LAN, key(UDP, &remote, target)));
            let left = world.one(LAN, &udp(target, &remote, b"a"));
            assert_eq!((left.by(), left.key()), (WAN, key(UDP, &listen, &remote)));
        }
    }
    for port in [16_383, 16_394, 21_000] {
        let left = world.packet(WAN, &udp("198.51.100.7:9", &format!("203.0.113.1:{port}"), b"q"));
        assert!(left.iter().all(|left| left.by() == HOST), "{port}: {left:?}");
    }
    assert_eq!(world.total(|counters| counters.flows_opened), 5 * 20, "what answers is no flow of its own");
    // None of these is given out.
    for number in 0..3_000 {
        let client = format!("10.0.{}.9:{}", number / 200, 2_000 + number);
        if let [left] = &world.packet(LAN, &udp(&client, "198.51.100.7:53", b"q"))[..] {
            let port = left.key().src_port;
            assert!(!(16_384..16_394).contains(&port) && !(20_000..21_000).contains(&port), "{port}");
        }
    }
}

/// The client's port stays, whatever the core that its packets are read by, and both directions find the flow.
#[test]
fn clients_keep_their_ports() {
    for cores in [1, 2, 5] {
        let mut spec = two_interfaces();
        let preserving = crate::spec::PortChoice::Preserve;
        spec.nats.push(NatSpec { port_choice: preserving, ..nat(NatMode::AddressAndPort, &["203.0.113.1"]) });
        let mut world = World::new(cores, spec);
        for number in 0..200u16 {
            let (client, remote) =
                (format!("10.0.0.9:{}", 300 + number * 50), format!("198.51.100.7:{}", 53 + number % 3));
            for _ in 0..3 {
                let left = world.one(LAN, &udp(&client, &remote, b"q"));
                assert_eq!(left.key().src_port, 300 + number * 50, "{cores} cores");
                let left = world.one(WAN, &udp_of(&left.key().reversed(), b"a"));
                assert_eq!((left.by(), left.key()), (LAN, key(UDP, &remote, &client)));
            }
        }
        assert_eq!(world.flows(), 200);
        assert_eq!(world.total(|counters| counters.replies_on_wrong_core), 0);
        // The same port of another client for the same remote: any other one, and its replies find it.
        let left = world.one(LAN, &udp("10.0.0.8:300", "198.51.100.7:53", b"q"));
        assert_ne!(left.key().src_port, 300);
        let left = world.one(WAN, &udp_of(&left.key().reversed(), b"a"));
        assert_eq!(left.key().dst, "10.0.0.8".parse::<IpAddr>().unwrap());
        world.wait(700);
        assert_eq!(world.flows(), 0);
        assert!(world.cores.iter().all(|core| core.nat.status().ports_held == 0));
        assert!(world.cores.iter().all(|core| core.nat.status().not_held == 0));
    }
}

/// RFC 4787 REQ-3 a, on several cores: below 1,024 there are ports for each of them.
#[test]
fn low_ports_stay_low_on_every_core() {
    let mut world = masquerade(4);
    for port in 1..200 {
        let left = world.one(LAN, &tcp(&format!("10.0.0.9:{port}"), "198.51.100.7:2049", SYN, 1, 0, b""));
        assert!(left.key().src_port < 1024, "{port} became {}", left.key().src_port);
    }
    assert_eq!(world.total(|counters| counters.low_ports_lost), 0);
    for port in 200..1000 {
        world.one(LAN, &tcp(&format!("10.0.0.9:{port}"), "198.51.100.7:2049", SYN, 1, 0, b""));
    }
    assert!(world.total(|counters| counters.low_ports_lost) > 100, "any port is better than none");
}

/// A connection that is forgotten while a client inside still has it is reset, towards the client alone.
#[test]
fn a_forgotten_connection_is_reset_inside() {
    let mut world = masquerade(2);
    let data = tcp("10.0.0.9:5000", "198.51.100.7:22", ACK, 1_000, 77, b"still there?");
    let left = world.dropped(LAN, &data, DropReason::NotNew);
    assert_eq!(
        (left.len(), left[0].by(), left[0].key()),
        (1, LAN, key(TCP, "198.51.100.7:22", "10.0.0.9:5000"))
    );
    assert_eq!((left[0].packet[33], &left[0].packet[24..28]), (RST, &77u32.to_be_bytes()[..]));
    let late = tcp("198.51.100.7:22", "203.0.113.1:6000", ACK, 77, 1_000, b"x");
    let left = world.packet(WAN, &late);
    assert!(left.iter().all(|left| left.by() == HOST), "{left:?}");
    assert_eq!(
        world.dropped(LAN, &tcp("10.0.0.9:5000", "198.51.100.7:22", RST, 1_000, 77, b""), DropReason::NotNew),
        []
    );
}

/// Row C2: whoever has seen some of a gateway's ports, one after the other, can neither say the next one nor where it is not:
/// ports, their low bits and the steps between them are spread as random numbers are, on each core.
#[test]
fn ports_are_spread_as_random_numbers() {
    const BINS: usize = 64;
    for cores in [1, 2, 5] {
        let mut world = masquerade(cores);
        let mut counts = [[0_u32; BINS]; 3];
        let (mut before, mut flows) = (0_u16, 0);
        for number in 0..16_384_u32 {
            let remote = std::net::Ipv4Addr::from_bits(0xc633_6400 + number);
            let left = world.one(LAN, &udp("10.0.0.9:5000", &format!("{remote}:53"), b"x"));
            let port = left.key().src_port;
            // By the upper bits as far as the range is whole, by the lower ones, by the step from the one before.
            if port >= 1_024 {
                counts[0][usize::from(port >> 10)] += 1;
                counts[1][usize::from(port & 63)] += 1;
                counts[2][usize::from(port.wrapping_sub(before) >> 10)] += 1;
                flows += 1;
            }
            before = port;
        }
        for (what, counts) in counts.iter().enumerate() {
            // The lowest of the 64 upper bins is outside the range.
            let bins = if what == 0 { BINS - 1 } else { BINS };
            let expected = f64::from(flows) / bins as f64;
            let squares = counts[BINS - bins..].iter().map(|count| (f64::from(*count) - expected).powi(2));
            let chi = squares.sum::<f64>() / expected;
            // 63 degrees of freedom: above 130 in one of 10^6 cases.
            assert!(chi < 130.0, "{cores} cores, {what}: {chi:.0}, {counts:?}");
        }
    }
}

fn forward(listen: &str, to: &str, ports: u16) -> ForwardSpec {
    let (listen, to) = (listen.parse().unwrap(), to.parse().unwrap());
    ForwardSpec { protocol: UDP, listen, to, tenant: 0, ports, proxy_protocol: false }
}

/// Packets that a forward's host sends from its port leave from the port that leads to it: whoever is told of it by that reaches it. Replies, and
/// others who begin at the same port, go to it by one flow each; all cores agree on whose that is.
#[test]
fn a_forwards_host_has_the_forwards_port() {
    for (cores, mapping) in
        [(1, Mapping::EndpointDependent), (7, Mapping::EndpointDependent), (7, Mapping::EndpointIndependent)]
    {
        let mut spec = two_interfaces();
        spec.nats.push(NatSpec { mapping, ..nat(NatMode::AddressAndPort, &["203.0.113.1"]) });
        spec.forwards.push(forward("203.0.113.1:27015", "10.0.0.5:27000", 10));
        let mut world = World::new(cores, spec);
        for number in 0..200u32 {
            let remote = format!("198.51.100.{}:{}", 1 + number % 250, 1_000 + number * 7);
            let inside = format!("10.0.0.5:{}", 27_000 + number % 10);
            let outside = format!("203.0.113.1:{}", 27_015 + number % 10);
            let ask = world.one(LAN, &udp(&inside, &remote, b"register"));
            assert_eq!((ask.by(), ask.key()), (WAN, key(UDP, &outside, &remote)), "{cores}");
            let reply = world.one(WAN, &udp(&remote, &outside, b"welcome"));
            assert_eq!((reply.by(), reply.key()), (LAN, key(UDP, &remote, &inside)));
            assert_eq!(world.one(LAN, &udp(&inside, &remote, b"again")).key(), ask.key());
            // Somebody else, who was told.
            let player = format!("192.0.2.{}:{}", 1 + number % 250, 2_000 + number);
            assert_eq!(world.one(WAN, &udp(&player, &outside, b"join")).key(), key(UDP, &player, &inside));
            assert_eq!(world.one(LAN, &udp(&inside, &player, b"ok")).key(), key(UDP, &outside, &player));
        }
        assert_eq!(world.flows(), 400, "{cores} {mapping:?}");
        // Another port of the host, and the same one of another host, have ports as ever.
        for inside in ["10.0.0.5:27010", "10.0.0.6:27000"] {
            let other = world.one(LAN, &udp(inside, "198.51.100.7:53", b"x")).key();
            assert!(!(27_015..27_025).contains(&other.src_port), "{other:?}");
        }
        world.wait(1_000);
        assert_eq!(world.flows(), 0);
    }
}

/// One outside address for one host alone: all of its ports lead to it, all of its flows leave by it, with their ports; pings too.
#[test]
fn an_address_may_be_one_hosts_alone() {
    let mut spec = two_interfaces();
    let mut own = nat(NatMode::AddressAndPort, &["203.0.113.5"]);
    own.from = vec!["10.0.0.5/32".parse().unwrap()];
    spec.nats.extend([own, nat(NatMode::AddressAndPort, &["203.0.113.1"])]);
    spec.forwards.push(forward("203.0.113.5:1", "10.0.0.5:1", 65_535));
    let mut world = World::new(4, spec);
    for port in (1..65_000).step_by(997) {
        let left = world.one(LAN, &udp(&format!("10.0.0.5:{port}"), "198.51.100.7:53", b"x"));
        assert_eq!(left.key(), key(UDP, &format!("203.0.113.5:{port}"), "198.51.100.7:53"));
        let back = world.one(WAN, &udp_of(&left.key().reversed(), b"y"));
        assert_eq!((back.by(), back.key().dst_port), (LAN, port));
    }
    let ping = world.one(LAN, &echo("10.0.0.5", "198.51.100.7", 8, 77)).key();
    assert_eq!(ping.src, "203.0.113.5".parse::<IpAddr>().unwrap());
    assert_eq!(
        world.one(LAN, &udp("10.0.0.6:5", "198.51.100.7:53", b"x")).key().src.to_string(),
        "203.0.113.1"
    );
}

/// A WAN with the network of its modem, which comes first, and the Internet's.
pub fn beside_a_modem(rule: NatSpec) -> crate::spec::GatewaySpec {
    let mut spec = two_interfaces();
    spec.interfaces[1].addresses =
        ["192.168.100.2/24", "203.0.113.1/24"].map(|address| address.parse().unwrap()).to_vec();
    let modem = "192.168.100.0/24".parse().unwrap();
    spec.routes.push(crate::spec::RouteSpec::new(0, modem, WAN.into(), None));
    spec.nats.push(rule);
    spec
}

/// A forward listens at all addresses of an interface: its client leaves from that of the network that the next hop is in.
#[test]
fn a_forward_at_two_networks_gives_the_one_of_the_next_hop() {
    for cores in [1, 2, 5] {
        let mut spec = beside_a_modem(nat(NatMode::AddressAndPort, &[]));
        spec.forwards = ["192.168.100.2:5060", "203.0.113.1:5060"]
            .map(|listen| ForwardSpec {
                protocol: UDP,
                listen: listen.parse().unwrap(),
                to: "10.0.0.5:5060".parse().unwrap(),
                tenant: 0,
                ports: 1,
                proxy_protocol: false,
            })
            .to_vec();
        let mut world = World::new(cores, spec);
        for last in 1..40 {
            let ask = key(UDP, "10.0.0.5:5060", &format!("198.51.100.{last}:5060"));
            let left = world.one(LAN, &udp_of(&ask, b"x")).key();
            assert_eq!((left.src.to_string(), left.src_port), ("203.0.113.1".to_owned(), 5060));
            assert_eq!(world.one(WAN, &udp_of(&left.reversed(), b"y")).key(), ask.reversed());
        }
        let left = world.one(LAN, &udp("10.0.0.5:5060", "192.168.100.1:5060", b"x")).key();
        assert_eq!((left.src.to_string(), left.src_port), ("192.168.100.2".to_owned(), 5060));
    }
}

/// The core that has to know whether a client's port is free is that of the address by which the flow leaves.
#[test]
fn ports_are_preserved_at_each_of_two_networks() {
    for cores in [1, 2, 5] {
        let mut rule = nat(NatMode::AddressAndPort, &[]);
        (rule.port_choice, rule.tables) = (crate::spec::PortChoice::Preserve, 1);
        let mut world = World::new(cores, beside_a_modem(rule));
        for last in 2..60 {
            for (remote, outside) in
                [("198.51.100.7:53", "203.0.113.1"), ("192.168.100.1:53", "192.168.100.2")]
            {
                let ask = key(UDP, &format!("10.0.0.{last}:{}", 5_000 + last), remote);
                let left = world.one(LAN, &udp_of(&ask, b"x")).key();
                assert_eq!((left.src.to_string(), left.src_port), (outside.to_owned(), ask.src_port));
            }
        }
    }
}

/// Two hosts that talk by fixed equal ports, and the one that was asked restarts and asks: the old connection ends by the answers to
/// that, and the new one, the other way round, is decided by the rules.
#[test]
fn the_other_end_of_a_connection_may_begin_the_next_one() {
    let mut world = World::new(2, two_interfaces());
    let (ask, back) = {
        let ask = key(TCP, "10.0.0.9:5060", "198.51.100.7:5060");
        (ask, ask.reversed())
    };
    let establish =
        |world: &mut World, ask: &FlowKey, back: &FlowKey, from: Ingress, to: Ingress, isn: u32| {
            assert_eq!(world.one(from, &tcp_of(ask, SYN, isn, 0, b"")).by(), to);
            assert_eq!(world.one(to, &tcp_of(back, SYN | ACK, !isn, isn + 1, b"")).by(), from);
            assert_eq!(world.one(from, &tcp_of(ask, ACK, isn + 1, !isn + 1, b"")).by(), to);
            assert_eq!(world.one(to, &tcp_of(back, ACK, !isn + 1, isn + 1, b"hello")).by(), from);
        };
    establish(&mut world, &ask, &back, LAN, WAN, 1_000);
    let (sent, got) = (1_001, !1_000u32 + 6);
    assert_eq!(world.one(WAN, &tcp_of(&back, SYN, 77_000_000, 0, b"")).by(), LAN);
    assert_eq!(world.one(LAN, &tcp_of(&ask, ACK, sent, got, b"")).by(), WAN, "the challenge");
    assert_eq!(world.one(WAN, &tcp_of(&back, RST, got, 0, b"")).by(), LAN);
    establish(&mut world, &back, &ask, WAN, LAN, 77_000_000);
    assert_eq!(world.flows(), 1);
    // Behind a translation nobody can begin one.
    let mut world = masquerade(1);
    let left = world.one(LAN, &tcp_of(&ask, SYN, 1_000, 0, b"")).key().reversed();
    world.one(WAN, &tcp_of(&left, RST | ACK, 0, 1_001, b""));
    world.dropped(WAN, &tcp_of(&left, SYN, 77_000_000, 0, b""), DropReason::TcpInvalid);
    assert_eq!(world.flows(), 1);
}

/// C3: of a packet inside a packet (VXLAN) the sender left the checksum to its device; the outer one, which is none, stays none, and
/// what leaves says where the inner one is. Of a first packet, a later one, and one that is cut.
#[test]
fn a_partial_checksum_inside_a_packet_is_not_the_packet_s_own() {
    use packet::checksum;
    use packet::vnet::{NEEDS_CSUM, VirtioNetHeader};

    let mut world = masquerade(1);
    let outer = key(UDP, "10.0.0.5:40000", "198.51.100.7:4789");
    let inner = tcp("192.168.7.1:1000", "192.168.7.2:80", ACK, 7, 9, &[5; 1_460]);
    let shim = [8, 0, 0, 0, 0, 0, 42, 0, 2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
    let start = 20 + 8 + shim.len() + 20;
    let datagram = |bytes: usize| {
        let mut packet = udp_of(&outer, &[&shim[..], &inner[..bytes]].concat());
        packet[26..28].fill(0);
        // It may be cut.
        packet[6] = 0;
        packet[10..12].fill(0);
        let sum = checksum::finish(checksum::sum(&packet[..20], 0));
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        // Only the pseudo-header is in it.
        packet[start + 16..start + 18].fill(0);
        let sum = checksum::pseudo_header(
            "192.168.7.1".parse().unwrap(),
            "192.168.7.2".parse().unwrap(),
            TCP,
            bytes - 20,
        );
        let sum = checksum::finish(sum) ^ u16::MAX;
        packet[start + 16..start + 18].copy_from_slice(&sum.to_be_bytes());
        packet
    };
    let offload = VirtioNetHeader {
        flags: NEEDS_CSUM,
        csum_start: start as u16,
        csum_offset: 16,
        ..VirtioNetHeader::default()
    };
    let inner_at = start - 20;
    for round in 0..3 {
        let packet = datagram(1_000);
        let (sent, left) = world.offloaded(LAN, &packet, offload).remove(0);
        assert_eq!((left.by(), sent), (WAN, offload), "{round}");
        assert_eq!(left.packet[26..28], [0, 0], "a checksum out of nothing, {round}");
        assert_eq!(left.packet[28..], packet[28..]);
        if round == 0 {
            world.one(WAN, &udp_of(&left.key().reversed(), b"answer"));
        }
    }
    // Longer than the link takes: the pieces can leave nothing to a device.
    let pieces = world.offloaded(LAN, &datagram(inner.len()), offload);
    let whole: Vec<u8> = pieces.iter().flat_map(|(_, left)| left.packet[20..].to_vec()).collect();
    assert_eq!((pieces.len(), &whole[6..8]), (2, &[0, 0][..]));
    assert!(whole[inner_at - 20..] == inner, "what is inside is whole");
}
