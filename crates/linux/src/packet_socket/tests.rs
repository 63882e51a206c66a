#![allow(clippy::unwrap_used, reason = "tests")]
use std::io::{ErrorKind, IoSliceMut};
use std::time::{Duration, Instant};

use super::*;
use crate::netlink::Netlink;
use crate::netns::set_sysctl;
use crate::testing::isolated;
use crate::udp::{UdpOptions, UdpSocket};

/// Two ends of a cable, silent.
fn cable() -> Netlink {
    set_sysctl("net.ipv6.conf.default.disable_ipv6", "1").unwrap();
    let netlink = Netlink::open().unwrap();
    netlink.add_veth("left", "right", None).unwrap();
    for name in ["left", "right"] {
        netlink.set_up(netlink.link(name).unwrap().unwrap().index, true).unwrap();
    }
    netlink
}

fn receive(socket: &PacketSocket, buffer: &mut [u8]) -> usize {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        match socket.receive(buffer) {
            Ok(bytes) => return bytes,
            Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < end => {
                std::thread::sleep(Duration::from_micros(100));
            }
            Err(error) => panic!("{error}"),
        }
    }
}

fn frame(number: u8) -> Vec<u8> {
    // To a stranger: only a promiscuous socket sees it.
    let mut frame = vec![2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 8, 0x88, 0xb5];
    frame.resize(60 + usize::from(number), number);
    frame
}

#[test]
fn frames_cross_the_cable_in_order_and_own_frames_are_not_seen() {
    isolated(|| {
        let netlink = cable();
        let left = PacketSocket::open("left", false, true).unwrap();
        let right = PacketSocket::open("right", false, true).unwrap();
        assert_eq!(left.interface(), netlink.link("left").unwrap().unwrap().index);
        left.set_buffers(1 << 20).unwrap();
        right.set_buffers(1 << 20).unwrap();
        for number in 0..100 {
            left.send(&frame(number)).unwrap();
        }
        let mut buffer = [0; 2000];
        for number in 0..50 {
            let bytes = receive(&right, &mut buffer);
            assert_eq!(&buffer[..bytes], frame(number));
        }
        let mut storage = vec![[0u8; 2000]; 40];
        let mut next = 50;
        while next < 100 {
            let mut buffers: Vec<_> = storage.iter_mut().map(|bytes| IoSliceMut::new(bytes)).collect();
            let mut lengths = [0; 40];
            let count = right.receive_many(&mut buffers, &mut lengths).unwrap();
            assert!(count <= 32);
            for index in 0..count {
                assert_eq!(&storage[index][..lengths[index]], frame(next));
                next += 1;
            }
        }
        assert_eq!(right.receive(&mut buffer).unwrap_err().kind(), ErrorKind::WouldBlock);
        assert_eq!(left.receive(&mut buffer).unwrap_err().kind(), ErrorKind::WouldBlock);
    });
}

#[test]
fn a_super_frame_passes_whole_with_the_virtio_header() {
    isolated(|| {
        let netlink = cable();
        let index = netlink.link("left").unwrap().unwrap().index;
        netlink.add_address(index, "10.2.0.1/24".parse().unwrap()).unwrap();
        netlink.add_neighbor(index, "10.2.0.2".parse().unwrap(), [2, 0, 0, 0, 0, 2]).unwrap();
        let right = PacketSocket::open("right", true, true).unwrap();
        let sender = UdpSocket::bind(&UdpOptions::new("10.2.0.1:0".parse().unwrap())).unwrap();
        sender.send("10.2.0.2:9".parse().unwrap(), None, Some(1000), &[7; 10_000]).unwrap();
        let mut buffer = vec![0; 70_000];
        let bytes = receive(&right, &mut buffer);
        assert_eq!(bytes, VNET_HEADER_BYTES + 14 + 28 + 10_000);
        // A UDP train of 1,000 bytes each.
        assert_eq!((buffer[1], u16::from_ne_bytes([buffer[4], buffer[5]])), (5, 1000));

        // And the other way: the super-frame goes out of `right` and arrives at a socket on `left`.
        let frame = &mut buffer[VNET_HEADER_BYTES..bytes];
        let mac = netlink.link("left").unwrap().unwrap().mac.unwrap();
        frame[..6].copy_from_slice(&mac);
        let (head, tail) = frame.split_at_mut(14 + 16);
        head[14 + 12..].swap_with_slice(&mut tail[..4]);
        let port = sender.local_addr().port().to_be_bytes();
        let to = [frame[36], frame[37]];
        frame[34..36].copy_from_slice(&to);
        frame[36..38].copy_from_slice(&port);
        right.send(&buffer[..bytes]).unwrap();
        let mut received = vec![0; 70_000];
        let mut metas = [crate::udp::RecvMeta::default()];
        let end = Instant::now() + Duration::from_secs(5);
        while sender.recv(&mut [IoSliceMut::new(&mut received)], &mut metas).is_err() {
            assert!(Instant::now() < end, "the train did not arrive");
            std::thread::sleep(Duration::from_micros(100));
        }
        assert_eq!((metas[0].bytes, metas[0].stride), (10_000, 1000));
    });
}

#[test]
fn an_interface_that_is_missing_or_goes_away_is_an_error() {
    isolated(|| {
        let netlink = cable();
        let error = PacketSocket::open("nowhere", false, false).unwrap_err();
        assert!(error.to_string().contains("nowhere"), "{error}");
        let right = PacketSocket::open("right", false, false).unwrap();
        netlink.delete_link(right.interface()).unwrap();
        assert_eq!(right.receive(&mut [0; 100]).unwrap_err().raw_os_error(), Some(libc::ENETDOWN));
        assert!(right.send(&frame(1)).is_err());
    });
}
