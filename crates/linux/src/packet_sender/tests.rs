#![allow(clippy::unwrap_used, reason = "tests")]
use std::time::{Duration, Instant};

use super::*;
use crate::netlink::Netlink;
use crate::netns::set_sysctl;
use crate::packet_socket::PacketSocket;
use crate::testing::isolated;

fn cable() -> Netlink {
    set_sysctl("net.ipv6.conf.default.disable_ipv6", "1").unwrap();
    let netlink = Netlink::open().unwrap();
    netlink.add_veth("left", "right", None).unwrap();
    // The end that sends last: one that is up before its carrier swallows frames for a while.
    for name in ["right", "left"] {
        netlink.set_up(netlink.link(name).unwrap().unwrap().index, true).unwrap();
    }
    netlink
}

fn receive(socket: &PacketSocket, buffer: &mut [u8]) -> usize {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        match socket.receive(buffer) {
            Ok(bytes) => return bytes,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        std::thread::sleep(Duration::from_micros(100));
    }
}

const HEADER: [u8; 14] = [2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 8, 0x88, 0xb5];

#[test]
fn a_batch_goes_out_in_order_from_its_parts_and_past_a_bad_frame() {
    isolated(|| {
        cable();
        for bypass in [false, true] {
            let right = PacketSocket::open("right", false, true).unwrap();
            right.set_buffers(4 << 20).unwrap();
            let sender = PacketSender::open("left", bypass).unwrap();
            let long = vec![9; 3000];
            let payloads: Vec<[u8; 60]> = (0..150u8).map(|number| [number; 60]).collect();
            let frames: Vec<SendFrame<'_>> = payloads
                .iter()
                .map(|payload| {
                    let (one, two) = payload.split_at(20);
                    let one = if payload[0] == 77 { &long[..] } else { one };
                    SendFrame { vnet: [0; 10], parts: [&HEADER, one, two] }
                })
                .collect();
            let sent = sender.send_many(&frames);
            assert_eq!((sent.sent, sent.full, sent.refused), (149, 0, 1));
            assert_eq!(sent.error.unwrap().raw_os_error(), Some(libc::EMSGSIZE));
            let mut buffer = [0; 2000];
            for payload in payloads.iter().filter(|payload| payload[0] != 77) {
                assert_eq!(receive(&right, &mut buffer), 74);
                assert_eq!((&buffer[..14], &buffer[14..74]), (&HEADER[..], &payload[..]));
            }
            assert_eq!(sender.send_many(&[]).sent, 0);
        }
    });
}

#[test]
fn a_partial_checksum_is_finished_for_a_device_that_cannot() {
    isolated(|| {
        cable();
        let off = crate::ethtool::Offloads { transmit_checksum: Some(false), ..Default::default() };
        crate::ethtool::set_offloads("left", &off).unwrap();
        let right = PacketSocket::open("right", false, true).unwrap();
        let sender = PacketSender::open("left", false).unwrap();
        let mut frame = HEADER.to_vec();
        frame[12..14].copy_from_slice(&[8, 0]);
        frame.extend([0x45, 0, 0, 32, 0, 0, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        // The sum of the pseudo header: addresses, protocol, length.
        let pseudo: u16 = 0x0a00 + 1 + 0x0a00 + 2 + 17 + 12;
        frame.extend([0, 1, 0, 2, 0, 12]);
        frame.extend(pseudo.to_be_bytes());
        frame.extend([1, 2, 3, 4]);
        let vnet = ::packet::vnet::VirtioNetHeader {
            flags: ::packet::vnet::NEEDS_CSUM,
            csum_start: 34,
            csum_offset: 6,
            ..Default::default()
        };
        let sent = sender.send_many(&[SendFrame { vnet: vnet.to_bytes(), parts: [&frame, &[], &[]] }]);
        assert_eq!((sent.sent, sent.refused), (1, 0), "{sent:?}");
        let mut buffer = [0; 2000];
        let bytes = receive(&right, &mut buffer);
        // Over pseudo header and datagram the sum is all ones.
        let mut sum = u32::from(pseudo);
        for pair in buffer[34..bytes].chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair[1]]));
        }
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
    });
}

#[test]
fn a_device_that_is_down_or_gone_is_an_error() {
    isolated(|| {
        let netlink = cable();
        assert!(PacketSender::open("nowhere", false).is_err());
        let sender = PacketSender::open("left", false).unwrap();
        let frame = [SendFrame { vnet: [0; 10], parts: [&HEADER, &[0; 50], &[]] }];
        netlink.set_up(sender.interface(), false).unwrap();
        let sent = sender.send_many(&frame);
        assert_eq!((sent.refused, sent.error.unwrap().raw_os_error()), (1, Some(libc::ENETDOWN)));
        netlink.delete_link(sender.interface()).unwrap();
        assert_eq!(sender.send_many(&frame).refused, 1);
    });
}

/// A device that writes a header of its own (PPP) gets packets that are ready, and as many as a super-packet has.
#[test]
fn whole_packets_leave_by_a_device_that_writes_its_header() {
    isolated(|| {
        set_sysctl("net.ipv6.conf.default.disable_ipv6", "1").unwrap();
        let mut tun = crate::tun::Tun::create("tun7", 1).unwrap();
        let queue = tun.take_queues().remove(0);
        Netlink::open().unwrap().set_up(tun.index(), true).unwrap();
        let sender = PacketSender::open_as("tun7", Form::WholePackets, false).unwrap();
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0, 0x45, 0, 0, 0, 0, 7, 0x40, 0, 64, 17, 0, 0, 10, 4, 0, 1, 10, 4, 0, 2]);
        let payload: Vec<u8> = (0..2_500).map(|number| number as u8).collect();
        frame.extend([0, 7, 0, 9]);
        frame.extend((8 + payload.len() as u16).to_be_bytes());
        frame.extend([0, 0]);
        frame.extend(&payload);
        let bytes = (frame.len() - 14) as u16;
        frame[16..18].copy_from_slice(&bytes.to_be_bytes());
        let vnet = VirtioNetHeader {
            flags: packet::vnet::NEEDS_CSUM,
            gso_type: packet::vnet::GSO_UDP_L4,
            hdr_len: 42,
            gso_size: 1_000,
            csum_start: 34,
            csum_offset: 6,
        };
        let send = |vnet: VirtioNetHeader, frame: &[u8]| {
            sender.send_many(&[SendFrame { vnet: vnet.to_bytes(), parts: [frame, &[], &[]] }])
        };
        let sent = send(vnet, &frame);
        assert_eq!((sent.sent, sent.full, sent.refused), (1, 0, 0), "{:?}", sent.error);
        let mut got = Vec::new();
        let mut buffer = [0; 2_000];
        for expected in [1_000, 1_000, 500] {
            let read = queue.read(&mut buffer).unwrap();
            let whole = VirtioNetHeader::parse(&buffer).unwrap();
            assert_eq!((whole.gso_type, whole.flags & packet::vnet::NEEDS_CSUM), (GSO_NONE, 0));
            assert_eq!(read, 10 + 28 + expected);
            got.extend_from_slice(&buffer[38..read]);
        }
        assert_eq!(got, payload);
        let plain = send(VirtioNetHeader::default(), &frame[..14 + 60]);
        assert_eq!(plain.sent, 1, "{:?}", plain.error);
        assert_eq!(queue.read(&mut buffer).unwrap(), 10 + 60);
        assert_eq!(send(VirtioNetHeader::default(), &frame).refused, 1, "longer than the MTU");
    });
}
