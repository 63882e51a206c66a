#![allow(clippy::unwrap_used, reason = "tests")]
use std::time::{Duration, Instant};

use super::*;
use crate::netlink::{NeighborChange, NeighborMonitor, Netlink};
use std::os::fd::AsFd;

use crate::netns::{Namespace, set_sysctl};
use crate::packet_socket::PacketSocket;
use crate::testing::isolated;

/// Our end `near` with 10.3.0.1/24 and fd03::1/64, the other end `far` in another namespace with .2 and ::2.
fn link() -> (Netlink, Namespace, PacketSocket) {
    let other = Namespace::create().unwrap();
    // Without it neighbors are asked for only when the link-local address has been proved: in two seconds.
    let hurry = || set_sysctl("net.ipv6.conf.default.dad_transmits", "0").unwrap();
    hurry();
    other.run(hurry).unwrap();
    let netlink = Netlink::open().unwrap();
    netlink.add_veth("near", "far", Some(other.as_fd())).unwrap();
    let there = Netlink::open_in(&other).unwrap();
    for (netlink, name, last) in [(&there, "far", 2), (&netlink, "near", 1)] {
        let index = netlink.link(name).unwrap().unwrap().index;
        netlink.add_address(index, format!("10.3.0.{last}/24").parse().unwrap()).unwrap();
        netlink.add_address(index, format!("fd03::{last}/64").parse().unwrap()).unwrap();
        netlink.set_up(index, true).unwrap();
    }
    let far = other.run(|| PacketSocket::open("far", false, true)).unwrap().unwrap();
    (netlink, other, far)
}

/// The next frame whose IP packet looks like this.
fn next(socket: &PacketSocket, fits: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    let end = Instant::now() + Duration::from_secs(5);
    let mut buffer = [0; 2000];
    loop {
        match socket.receive(&mut buffer) {
            Ok(bytes) if fits(&buffer[14..bytes]) => return buffer[14..bytes].to_vec(),
            Ok(_) => {}
            Err(error) => {
                assert!(Instant::now() < end, "{error}");
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    }
}

/// UDP from a foreign address to a foreign address; a correct header checksum.
fn v4(id: u16, flags: u8, payload_bytes: usize) -> Vec<u8> {
    let total = (28 + payload_bytes) as u16;
    let mut packet = vec![0x45, 0x2e];
    packet.extend(total.to_be_bytes());
    packet.extend(id.to_be_bytes());
    packet.extend([flags, 0, 17, 17, 0, 0, 198, 51, 100, 7, 203, 0, 113, 9]);
    let sum: u32 = packet.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let sum = !(((sum & 0xffff) + (sum >> 16)) as u16);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    // A datagram checksum that is not right: nobody may touch it.
    packet.extend([0x12, 0x34, 0x56, 0x78]);
    packet.extend(((8 + payload_bytes) as u16).to_be_bytes());
    packet.extend([0xab, 0xcd]);
    packet.extend(vec![0x5a; payload_bytes]);
    packet
}

fn v6(destination: &str) -> Vec<u8> {
    let mut packet = vec![0x6e, 0x12, 0x34, 0x56, 0, 12, 17, 9];
    packet.extend("2001:db8:1::7".parse::<Ipv6Addr>().unwrap().octets());
    packet.extend(destination.parse::<Ipv6Addr>().unwrap().octets());
    packet.extend([0x12, 0x34, 0x56, 0x78, 0, 12, 0xab, 0xcd, 1, 2, 3, 4]);
    packet
}

#[test]
fn the_kernel_finds_the_neighbor_and_leaves_foreign_packets_as_they_are() {
    isolated(|| {
        let (_netlink, _other, far) = link();
        let mut monitor = NeighborMonitor::open().unwrap();
        let sender = RawIpSender::open("near").unwrap();
        for packet in [v4(0x1234, 0, 100), v4(0x4321, 0x40, 1472), v4(0, 0x40, 1)] {
            // No route leads there; the neighbor is named.
            sender.send(&packet, "10.3.0.2".parse().unwrap()).unwrap();
            assert_eq!(next(&far, |bytes| bytes.get(16..20) == Some(&[203, 0, 113, 9])), packet);
        }
        let packet = v6("2001:db8:2::9");
        sender.send(&packet, "fd03::2".parse().unwrap()).unwrap();
        assert_eq!(next(&far, |bytes| bytes[0] == 0x6e), packet);
        let end = Instant::now() + Duration::from_secs(5);
        let mut found: Vec<IpAddr> = Vec::new();
        while found.len() < 2 {
            assert!(Instant::now() < end, "{found:?}");
            for change in monitor.read().unwrap() {
                if let NeighborChange::Changed(one) = change
                    && one.state.is_usable()
                    && one.mac.is_some()
                    && !found.contains(&one.ip)
                    && !matches!(one.ip, IpAddr::V6(ip) if ip.is_multicast() || ip.is_unicast_link_local())
                {
                    found.push(one.ip);
                }
            }
        }
        found.sort();
        assert_eq!(found, ["10.3.0.2".parse::<IpAddr>().unwrap(), "fd03::2".parse().unwrap()]);
    });
}

#[test]
fn an_identification_of_zero_becomes_another_only_where_it_is_needed() {
    isolated(|| {
        let (_netlink, _other, far) = link();
        let sender = RawIpSender::open("near").unwrap();
        let packet = v4(0, 0, 20);
        sender.send(&packet, "10.3.0.2".parse().unwrap()).unwrap();
        let mut seen = next(&far, |bytes| bytes.get(16..20) == Some(&[203, 0, 113, 9]));
        seen[4..6].fill(0);
        seen[10..12].copy_from_slice(&packet[10..12]);
        assert_eq!(seen, packet);
    });
}

#[test]
fn what_cannot_be_sent_is_an_error() {
    isolated(|| {
        let (netlink, _other, _far) = link();
        let error = RawIpSender::open("nowhere").unwrap_err();
        assert!(error.to_string().contains("nowhere"), "{error}");
        let sender = RawIpSender::open("near").unwrap();
        let kind = |packet: &[u8], to: &str| sender.send(packet, to.parse().unwrap()).unwrap_err();
        assert_eq!(kind(&v4(1, 0, 1473), "10.3.0.2").raw_os_error(), Some(libc::EMSGSIZE));
        // IPv4 by an IPv6 router: the kernel looks for the neighbor, the packet is lost (RFC 5549).
        assert_eq!(kind(&v4(1, 0, 1), "fd03::2").kind(), io::ErrorKind::HostUnreachable);
        for (packet, to) in [(v6("fd03::2"), "10.3.0.2"), (vec![], "10.3.0.2")] {
            assert_eq!(kind(&packet, to).kind(), io::ErrorKind::InvalidInput);
        }
        netlink.delete_link(netlink.link("near").unwrap().unwrap().index).unwrap();
        assert!(sender.send(&v4(1, 0, 1), "10.3.0.2".parse().unwrap()).is_err());
    });
}
