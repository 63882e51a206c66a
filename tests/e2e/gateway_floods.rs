//! Floods of everything: what is established lives, memory stays bounded, the program answers.

use std::net::{Ipv4Addr, SocketAddrV4};

use crate::gateway_clients::*;
use crate::gateway_raw::*;
use crate::gateway_scene::*;
use crate::machine::{alone, isolated};
use crate::scene::*;

const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 1, 1, 2);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 1, 2, 2);

/// The packet of this number in a flood.
type Packets = fn(u64) -> Vec<u8>;

/// Different 16-bit numbers in no order, from a counter.
fn scatter(number: u64) -> u16 {
    (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48) as u16
}

fn spoofed(number: u64) -> Ipv4Addr {
    let low = (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u32;
    Ipv4Addr::from(0x0a40_0000 | low & 0x003f_ffff)
}

fn syn(number: u64) -> Vec<u8> {
    let source = SocketAddrV4::new(spoofed(number), scatter(number) | 1_024);
    let to = SocketAddrV4::new(SERVER, 80);
    Header::new(*source.ip(), SERVER, TCP).packet(&tcp(source, to, number as u32, 2))
}

fn datagram(number: u64) -> Vec<u8> {
    let source = SocketAddrV4::new(CLIENT, scatter(number) | 1_024);
    let to = SocketAddrV4::new(SERVER, scatter(number >> 3) | 1);
    Header::new(CLIENT, SERVER, UDP).packet(&udp(source, to, b"flood"))
}

fn echo_request(number: u64) -> Vec<u8> {
    let to = Ipv4Addr::new(10, 1, 2, number as u8);
    Header::new(CLIENT, to, ICMP).packet(&icmp(8, 0, u32::from(scatter(number)) << 16, b"flood"))
}

/// Errors about flows that do not exist, or with nonsense quoted.
fn icmp_error(number: u64) -> Vec<u8> {
    let quoted = if number.is_multiple_of(3) { vec![number as u8; 40] } else { datagram(number) };
    let kind = if number.is_multiple_of(2) { 3 } else { 11 };
    Header::new(CLIENT, SERVER, ICMP).packet(&icmp(kind, (number % 16) as u8, 0, &quoted))
}

/// Any bytes as an IP packet, of any length.
fn garbage(number: u64) -> Vec<u8> {
    let mut bytes = vec![0; (number % 100) as usize];
    fastrand::Rng::with_seed(number).fill(&mut bytes);
    if number.is_multiple_of(2) && !bytes.is_empty() {
        bytes[0] = 0x45;
    }
    bytes
}

/// Rows C1, C2, C5: floods of SYNs with false sources, of new UDP flows, of pings, ICMP errors and garbage, one after the other:
/// an ssh session, a TCP connection and a UDP flow that were there before stay alive, each flood is bounded, and after it
/// everybody comes in again.
#[test]
fn c1_c2_c5_floods_leave_established_flows_alive() {
    let _alone = alone();
    isolated(|| {
        let lans = Lans::new(3);
        // A /10 of false sources behind network 1, so that they have a route back.
        shell(lans.gateway(), "ip route add 10.64.0.0/10 via 10.1.1.2");
        let gateway = lans
            .start(&format!("{ALLOW}flows-max = 40_000\nembryonic-max = 10_000\n[[nat]]\nout = \"lan2\"\n"));
        let _mirror = Mirror::start(lans.host(2), "server", "0.0.0.0:80");
        let ssh = Ssh::start(lans.host(2), 22);
        let mut session = ssh.session(lans.host(3), "10.1.2.2");
        let mut talk = Talk::open(lans.host(3), "10.1.2.2:80").unwrap();
        let udp = UdpClient::new(lans.host(3), "0.0.0.0:0");
        let seen = udp.ask("10.1.2.2:80", 64);
        let floods: [(&str, Packets); 5] = [
            ("SYN", syn),
            ("UDP", datagram),
            ("ping", echo_request),
            ("ICMP errors", icmp_error),
            ("garbage", garbage),
        ];
        for (name, make) in floods {
            let flood = Flood::start(Raw::new(&lans, 1), make);
            wait_for(name, PATIENCE, || flood.sent.load(std::sync::atomic::Ordering::Relaxed) > 60_000);
            for _ in 0..5 {
                session.echo(name);
                talk.echo(20_000).unwrap();
            }
            assert_eq!(udp.ask("10.1.2.2:80", 64), seen, "{name}");
            drop(flood);
            wait_for(&format!("a new connection after {name}"), 60.0, || {
                curl_for(lans.host(3), "10.1.2.2", 5).is_ok()
            });
            let live = services(&gateway).cores.iter().map(|core| core.live_flows).sum::<u64>();
            assert!(live <= 80_000, "{name}: {live} flows");
        }
        assert!(resident_kb(&gateway) < 400_000, "{} kB", resident_kb(&gateway));
        no_reply_went_astray(&gateway);
    });
}

/// Row C6: a SYN flood at a virtual server; connections that live go on, and new ones come in after it.
#[test]
fn c6_a_flood_at_a_virtual_server() {
    let _alone = alone();
    isolated(|| {
        let lans = Lans::new(3);
        let gateway = lans.start(&format!(
            "{ALLOW}embryonic-max = 5_000\n[[virtual-server]]\nlisten = \"tcp 10.1.1.10:80\"\nsource = \"none\"\n\
             method = \"least-connections\"\nbackends = [\"10.1.2.2:80\", \"10.1.3.2:80\"]\n"
        ));
        let _two = Mirror::start(lans.host(2), "two", "0.0.0.0:80");
        let _three = Mirror::start(lans.host(3), "three", "0.0.0.0:80");
        let mut talks: Vec<Talk> =
            (0..6).map(|_| Talk::open(lans.host(1), "10.1.1.10:80").unwrap()).collect();
        shell(lans.gateway(), "ip route add 10.64.0.0/10 via 10.1.1.2");
        let flood = Flood::start(Raw::new(&lans, 1), |number| {
            let source = SocketAddrV4::new(spoofed(number), scatter(number) | 1_024);
            let to = SocketAddrV4::new(Ipv4Addr::new(10, 1, 1, 10), 80);
            Header::new(*source.ip(), *to.ip(), TCP).packet(&tcp(source, to, number as u32, 2))
        });
        wait_for("the flood", PATIENCE, || flood.sent.load(std::sync::atomic::Ordering::Relaxed) > 50_000);
        for talk in &mut talks {
            talk.echo(50_000).unwrap();
        }
        drop(flood);
        wait_for("a new connection", 60.0, || curl_for(lans.host(1), "10.1.1.10", 5).is_ok());
        no_reply_went_astray(&gateway);
    });
}
