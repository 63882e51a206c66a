//! Machines of a cluster on a network whose packets are smaller than those of their shared interfaces (row D11).

use std::net::UdpSocket;
use std::process::Command;
use std::time::Duration;

use testbed::cluster::{self as bed, FIRST_DISPATCHER};

use crate::cluster_scene::{Cluster, Plan, nothing};
use crate::machine::busy;
use crate::scene::{tcp_finish, tcp_listener, tcp_start, udp_socket, wait_for};

/// MTU of the network between the machines.
const BUS_MTU: u32 = 1_400;
/// Bytes in front of an inner packet: IP and UDP, the bond's header, tag and frame; IP and UDP, L1, L2, offload header,
/// Ethernet.
const AROUND: u32 = 28 + 16 + 16 + 8 + 28 + 6 + 8 + 12 + 14;
/// A bond may stop short of its path's MTU by so much.
const SHORT_MAX: u32 = 16;

/// A firewall: the traffic's server knows its client by the address.
const SERVICES: &str = "[[rule]]\nname = \"no strangers\"\naction = \"drop\"\nfrom = \"wan\"\n";

/// A dispatcher with both interfaces and two data planes; `more`: keys of its `[cluster]`.
fn start(more: &str) -> Cluster {
    let plan = Plan { dispatchers: 1, data_planes: 2, services: SERVICES, manager: "" };
    let edit = |id, text: String| match id {
        FIRST_DISPATCHER => text.replacen("[cluster]\n", &format!("[cluster]\n{more}"), 1),
        _ => text,
    };
    let (cluster, ()) = Cluster::start(&plan, &[11, 12], edit, nothing);
    cluster.join(&[11, 12]);
    cluster
}

/// One ping of the client with Don't Fragment, whose IP packet has so many bytes; what the program said.
fn ping(cluster: &Cluster, bytes: u32) -> String {
    let mut command = Command::new("ping");
    let payload = (bytes - 28).to_string();
    command.args(["-n", "-c", "1", "-W", "2", "-M", "do", "-s", &payload, &bed::SERVERS[1].to_string()]);
    command.env("LC_ALL", "C");
    cluster.bed.client.prepare(&mut command).unwrap();
    let output = command.output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// Whether a datagram with so many bytes of payload comes back, tried a few times. Linux forbids to cut what it believes to
/// fit, and cuts the rest itself.
fn echoes(cluster: &Cluster, bytes: usize) -> bool {
    let address = (bed::SERVERS[0], 7_300);
    let far = udp_socket(&cluster.bed.server, address);
    let near = cluster.bed.client.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
    near.connect(address).unwrap();
    for socket in [&far, &near] {
        socket.set_read_timeout(Some(Duration::from_millis(700))).unwrap();
    }
    let sent: Vec<u8> = (0..bytes).map(|at| (at * 7 + bytes) as u8).collect();
    let mut buffer = vec![0; 65_536];
    (0..6).any(|_| {
        // The kernel may tell of the "too big" before.
        if near.send(&sent).is_err() {
            return false;
        }
        let Ok((length, source)) = far.recv_from(&mut buffer) else { return false };
        assert!(buffer[..length] == sent, "{bytes} bytes arrived damaged");
        (0..6).any(|_| {
            far.send_to(&sent, source).is_ok()
                && near.recv(&mut buffer).is_ok_and(|length| buffer[..length] == sent)
        })
    })
}

/// Drops of the dispatcher by this name.
fn drops(cluster: &Cluster, name: &str) -> u64 {
    fn sum(value: &serde_json::Value, name: &str) -> u64 {
        if let Some(array) = value.as_array() {
            return array.iter().map(|value| sum(value, name)).sum();
        }
        let Some(object) = value.as_object() else { return 0 };
        let own = object.get(name).and_then(serde_json::Value::as_u64).unwrap_or(0);
        own + object.values().map(|value| sum(value, name)).sum::<u64>()
    }
    sum(&cluster.status_of(FIRST_DISPATCHER), name)
}

/// The default: what does not fit one datagram between the machines is answered with "too big", from the shared address and with
/// the MTU that fits; hosts follow, also when the MTU falls under a connection.
#[test]
fn d11_too_big_is_answered_and_hosts_follow() {
    let _busy = busy();
    let cluster = start("");
    let (client, server) = (&cluster.bed.client, &cluster.bed.server);
    let address = bed::SERVERS[0].to_string();
    // It begins while full datagrams still fit.
    let down = tcp_start(client, server, &address, 5_201, 1, 12.0);
    cluster.bed.set_bus_mtu(BUS_MTU).unwrap();

    let right = BUS_MTU - AROUND;
    let mut told = 0;
    wait_for("the right MTU is told", 30.0, || {
        flush(&cluster);
        let said = ping(&cluster, 1_500);
        let mtu = said.split("mtu = ").nth(1).or(said.split("mtu=").nth(1));
        let digits = mtu.map(|rest| rest.chars().take_while(char::is_ascii_digit).collect::<String>());
        told = digits.and_then(|digits| digits.parse().ok()).unwrap_or(0);
        (right - SHORT_MAX..=right).contains(&told)
    });
    let shared = bed::LAN.to_string();
    flush(&cluster);
    let said = ping(&cluster, 1_500);
    assert!(said.contains(&format!("From {shared}")) && said.contains(&told.to_string()), "{said}");
    // The host has learnt it, and does not even send any more.
    let said = ping(&cluster, told + 1);
    assert!(said.contains("0 received"), "{said}");
    let said = ping(&cluster, told);
    assert!(said.contains("1 received"), "{said}");
    // Without that: it fits, and one byte more does not.
    flush(&cluster);
    assert!(ping(&cluster, told).contains("1 received"));
    let said = ping(&cluster, told + 1);
    assert!(said.contains("0 received") && said.contains(&format!("From {shared}")), "{said}");

    // The connection from before goes on, and another one both ways: the server has learnt the way back.
    tcp_finish(down);
    let up = tcp_start(client, server, &address, 5_203, 1, 2.0);
    tcp_finish(up);
    assert!(crate::scene::try_echo(client, server, &address).is_ok());
    // What may be cut is never answered.
    for bytes in [100, 1_472, 4_000, 20_000] {
        assert!(echoes(&cluster, bytes), "{bytes}");
    }
    assert!(drops(&cluster, "too-big") > 0);
}

/// The option: nobody is told to send less; what does not fit goes in several datagrams.
#[test]
fn d11_the_bond_takes_pieces_where_path_mtu_is_fragment() {
    let _busy = busy();
    let cluster = start("path-mtu = \"fragment\"\n");
    cluster.bed.set_bus_mtu(BUS_MTU).unwrap();
    let (client, server) = (&cluster.bed.client, &cluster.bed.server);
    wait_for("the bonds have found what fits", 30.0, || ping(&cluster, 1_500).contains("1 received"));
    let address = bed::SERVERS[0].to_string();
    tcp_finish(tcp_start(client, server, &address, 5_201, 1, 2.0));
    for bytes in [100, 1_472, 4_000, 20_000] {
        assert!(echoes(&cluster, bytes), "{bytes}");
    }
    assert_eq!(drops(&cluster, "too-big"), 0);
    let segments = mss(&cluster);
    assert!(segments.contains(&1_448), "full segments: {segments:?}");
}

/// Lets the client forget what it learnt about the way.
fn flush(cluster: &Cluster) {
    let mut command = Command::new("ip");
    command.args(["route", "flush", "cache"]);
    command.env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()));
    cluster.bed.client.output(command).unwrap();
}

/// Segment sizes of a connection to the server while it is open.
fn mss(cluster: &Cluster) -> Vec<u32> {
    let address = (bed::SERVERS[0], 7_301);
    let listener = tcp_listener(&cluster.bed.server, address);
    let stream = cluster.bed.client.run(|| std::net::TcpStream::connect(address)).unwrap().unwrap();
    let accepted = listener.accept().unwrap();
    let mut command = Command::new("ss");
    command.args(["-tin", "dst", &address.0.to_string()]);
    let said = cluster.bed.client.output(command).unwrap();
    drop((stream, accepted));
    let values = said.split_ascii_whitespace().filter_map(|word| word.strip_prefix("mss:"));
    values.filter_map(|value| value.parse().ok()).collect()
}
