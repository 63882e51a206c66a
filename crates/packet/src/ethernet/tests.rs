#![allow(clippy::unwrap_used, reason = "tests")]
use super::*;

const HOST: Mac = Mac([2, 0, 0, 0, 0, 1]);
const OTHER: Mac = Mac([2, 0, 0, 0, 0, 2]);

fn frame(dst: Mac, src: Mac, tags: &[u16], ether_type: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = [dst.0, src.0].concat();
    for (place, id) in tags.iter().enumerate() {
        let kind = if place + 1 == tags.len() { ETHER_TYPE_VLAN } else { ETHER_TYPES_OUTER[0] };
        frame.extend(kind.to_be_bytes());
        frame.extend(id.to_be_bytes());
    }
    frame.extend(ether_type.to_be_bytes());
    frame.extend(payload);
    frame
}

fn arp(operation: u16, sender: Mac, from: [u8; 4], to: [u8; 4]) -> Vec<u8> {
    let mut arp = vec![0, 1, 8, 0, 6, 4];
    arp.extend(operation.to_be_bytes());
    arp.extend(sender.0);
    arp.extend(from);
    arp.extend([0; 6]);
    arp.extend(to);
    arp
}

fn udp4(from: [u8; 4], to: [u8; 4], ports: [u16; 2]) -> Vec<u8> {
    let mut packet = vec![0x45, 2, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0];
    packet.extend(from);
    packet.extend(to);
    packet.extend(ports.iter().flat_map(|port| port.to_be_bytes()));
    packet.extend([0, 8, 0, 0]);
    packet
}

fn discovery(
    from: Ipv6Addr,
    to: Ipv6Addr,
    kind: u8,
    flags: u8,
    target: Ipv6Addr,
    option: Option<(u8, Mac)>,
) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, flags, 0, 0, 0];
    message.extend(target.octets());
    if let Some((kind, mac)) = option {
        message.extend([kind, 1]);
        message.extend(mac.0);
    }
    let pseudo = checksum::pseudo_header_v6(&from, &to, PROTOCOL_ICMPV6, message.len() as u32);
    let sum = checksum::finish(checksum::sum(&message, pseudo));
    put_u16(&mut message, 2, sum);
    let mut packet = vec![0x60, 0, 0, 0, 0, message.len() as u8, PROTOCOL_ICMPV6, 255];
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend(message);
    packet
}

#[test]
fn headers_have_up_to_two_tags() {
    for (tags, vlan, payload_at) in
        [(&[][..], 0, 14), (&[0x6005][..], 5, 18), (&[0x2000][..], 0, 18), (&[7, 9][..], 7 << 12 | 9, 22)]
    {
        let frame = frame(OTHER, HOST, tags, ETHER_TYPE_ARP, &[1]);
        let header = EthernetHeader::parse(&frame).unwrap();
        assert_eq!((header.dst, header.src, header.vlan.0), (OTHER, HOST, vlan));
        assert_eq!((header.ether_type, header.payload_at), (ETHER_TYPE_ARP, payload_at));
        for cut in 0..payload_at {
            assert_eq!(EthernetHeader::parse(&frame[..cut]), Err(DropReason::EthernetMalformed), "{cut}");
        }
    }
}

#[test]
fn addresses_are_of_a_station_a_group_or_a_link() {
    assert!(HOST.is_station() && !HOST.is_group());
    assert!(!Mac([0; 6]).is_station() && Mac::BROADCAST.is_group() && !Mac::BROADCAST.is_link_local());
    assert!(
        Mac([1, 0x80, 0xc2, 0, 0, 0x0e]).is_link_local() && !Mac([1, 0x80, 0xc2, 0, 0, 0x10]).is_link_local()
    );
    assert_eq!(OTHER.to_string(), "02:00:00:00:00:02");
}

#[test]
fn a_packet_has_its_own_flow_in_every_vlan_and_both_directions() {
    let there = udp4([10, 0, 0, 1], [10, 0, 0, 2], [1000, 2000]);
    let back = udp4([10, 0, 0, 2], [10, 0, 0, 1], [2000, 1000]);
    let of = |frame: &[u8]| EthernetFlow::of(&EthernetHeader::parse(frame).unwrap(), frame);
    let plain = of(&frame(OTHER, HOST, &[], ETHER_TYPE_IPV4, &there));
    assert_eq!(plain.key, FlowKey::of(&there).unwrap());
    assert!(plain.ecn_capable);
    assert_eq!(of(&frame(OTHER, HOST, &[5], ETHER_TYPE_IPV4, &there)), plain);
    assert_eq!(of(&frame(HOST, OTHER, &[5], ETHER_TYPE_IPV4, &back)).key.reversed(), plain.key);
    // What many hear, and what resolves neighbors, goes by one key.
    assert_eq!(of(&frame(Mac::BROADCAST, HOST, &[5], ETHER_TYPE_IPV4, &there)).key, EthernetFlow::SHARED);
    let question = arp(1, HOST, [10, 0, 0, 1], [10, 0, 0, 2]);
    assert_eq!(of(&frame(OTHER, HOST, &[], ETHER_TYPE_ARP, &question)).key, EthernetFlow::SHARED);
    let (a, b) = ("fe80::1".parse().unwrap(), "fe80::2".parse().unwrap());
    let advertisement = discovery(a, b, 136, 0x40, a, Some((2, HOST)));
    assert_eq!(of(&frame(OTHER, HOST, &[], ETHER_TYPE_IPV6, &advertisement)).key, EthernetFlow::SHARED);
    // Everything else goes by its stations and VLAN.
    let pppoe = of(&frame(OTHER, HOST, &[], 0x8864, &[1; 50])).key;
    assert_eq!(of(&frame(HOST, OTHER, &[], 0x8864, &[1; 50])).key, pppoe.reversed());
    assert_ne!(of(&frame(OTHER, HOST, &[5], 0x8864, &[1; 50])).key, pppoe);
    assert_ne!(pppoe, EthernetFlow::SHARED);
    // A packet that cannot be read is a frame all the same.
    assert_eq!(of(&frame(OTHER, HOST, &[], ETHER_TYPE_IPV4, &there[..10])).key, pppoe);
}

fn resolve(frame: &[u8]) -> Option<Resolution> {
    Resolution::of(&EthernetHeader::parse(frame).unwrap(), frame)
}

#[test]
fn arp_tells_its_sender_and_asks_unless_it_probes_or_announces() {
    let (one, two) = ([10, 0, 0, 1], [10, 0, 0, 2]);
    let of = |dst, arp: Vec<u8>| resolve(&frame(dst, HOST, &[], ETHER_TYPE_ARP, &arp));
    let told = Some((IpAddr::from(one), HOST, None));
    let question = of(Mac::BROADCAST, arp(1, HOST, one, two)).unwrap();
    assert_eq!((question.tells, question.asks), (told, Some(IpAddr::from(two))));
    let answer = of(OTHER, arp(2, HOST, one, two)).unwrap();
    assert_eq!((answer.tells, answer.asks), (told, None));
    let announcement = of(Mac::BROADCAST, arp(1, HOST, one, one)).unwrap();
    assert_eq!((announcement.tells, announcement.asks), (told, None));
    let probe = of(Mac::BROADCAST, arp(1, HOST, [0; 4], two)).unwrap();
    assert_eq!((probe.tells, probe.asks), (None, None));
    // Whether a neighbor is still there is asked of itself.
    assert_eq!(of(OTHER, arp(1, HOST, one, two)).unwrap().asks, None);
    // Someone else's sender, another protocol, a cut message.
    assert_eq!(of(Mac::BROADCAST, arp(1, OTHER, one, two)), None);
    assert_eq!(of(Mac::BROADCAST, arp(3, HOST, one, two)), None);
    assert_eq!(of(Mac::BROADCAST, arp(1, HOST, one, two)[..27].to_vec()), None);
}

#[test]
fn an_answer_of_arp_is_what_the_owner_would_say() {
    let (one, two) = ([10, 0, 0, 1], [10, 0, 0, 2]);
    let asked = frame(Mac::BROADCAST, HOST, &[9], ETHER_TYPE_ARP, &arp(1, HOST, one, two));
    let header = EthernetHeader::parse(&asked).unwrap();
    let answer = resolve(&asked).unwrap().answer(&header, &asked, OTHER, None).unwrap();
    assert_eq!(answer.len(), FRAME_BYTES_MIN);
    let back = EthernetHeader::parse(&answer).unwrap();
    assert_eq!((back.dst, back.src, back.vlan.0, back.ether_type), (HOST, OTHER, 9, ETHER_TYPE_ARP));
    let says = resolve(&answer).unwrap();
    assert_eq!((says.tells, says.asks), (Some((IpAddr::from(two), OTHER, None)), None));
    assert_eq!((&answer[36..42], &answer[42..46]), (&HOST.0[..], &one[..]));
}

#[test]
fn discovery_tells_and_asks_and_is_answered_with_the_routers_flag() {
    let (a, b): (Ipv6Addr, Ipv6Addr) = ("fe80::1".parse().unwrap(), "fe80::2".parse().unwrap());
    let group: Ipv6Addr = "ff02::1:ff00:2".parse().unwrap();
    let to = Mac([0x33, 0x33, 0xff, 0, 0, 2]);
    let of = |packet: &[u8]| resolve(&frame(to, HOST, &[], ETHER_TYPE_IPV6, packet));
    let packet = discovery(a, group, 135, 0, b, Some((1, HOST)));
    let question = of(&packet).unwrap();
    assert_eq!((question.tells, question.asks), (Some((a.into(), HOST, None)), Some(b.into())));
    // A probe for duplicates has no source, and asks nothing that may be answered.
    let probe = of(&discovery(Ipv6Addr::UNSPECIFIED, group, 135, 0, b, None)).unwrap();
    assert_eq!((probe.tells, probe.asks), (None, None));
    // A wrong checksum, a hop limit that a router has lowered.
    let mut wrong = packet.clone();
    wrong[42] ^= 1;
    assert_eq!(of(&wrong), None);
    let mut routed = packet.clone();
    routed[7] = 254;
    assert_eq!(of(&routed), None);
    let asked = frame(to, HOST, &[], ETHER_TYPE_IPV6, &packet);
    let header = EthernetHeader::parse(&asked).unwrap();
    assert_eq!(question.answer(&header, &asked, OTHER, None), None, "nobody knows whether it is a router");
    for router in [true, false] {
        let answer = question.answer(&header, &asked, OTHER, Some(router)).unwrap();
        let says = resolve(&answer).unwrap();
        assert_eq!(says.tells, Some((b.into(), OTHER, Some(router))));
        let ip = IpHeader::parse(&answer[14..]).unwrap();
        assert_eq!((ip.src, ip.dst, ip.ttl), (b.into(), a.into(), 255));
    }
}
