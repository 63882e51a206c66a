//! Frames by which a machine says that an address is at its hardware address from now on: ARP announcements (RFC 5227
//! section 3) and unsolicited neighbor advertisements (RFC 4861 section 7.2.6).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::checksum;

/// Bytes of an ARP frame of IPv4 over Ethernet.
const ARP_BYTES: usize = 42;
/// Bytes of an advertisement with its one option, from the ICMPv6 header on.
const ADVERTISEMENT_BYTES: usize = 32;
/// IPv6 next header of ICMPv6.
const ICMPV6: u8 = 58;
/// Every node on the link.
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// Ethernet frames that announce `address` at `mac`, in the order in which they are sent: of IPv4 an ARP request and a reply,
/// because some hosts learn from one and some from the other; of IPv6 one advertisement with the override flag.
#[must_use]
pub fn frames(mac: [u8; 6], address: IpAddr) -> Vec<Vec<u8>> {
    match address {
        IpAddr::V4(address) => vec![arp(mac, address, 1), arp(mac, address, 2)],
        IpAddr::V6(address) => vec![advertisement(mac, address)],
    }
}

/// ARP whose sender and target are the same (RFC 826): `operation` 1 is a request, 2 a reply.
fn arp(mac: [u8; 6], address: Ipv4Addr, operation: u16) -> Vec<u8> {
    let mut frame = Vec::with_capacity(ARP_BYTES);
    frame.extend([0xff; 6]);
    frame.extend(mac);
    frame.extend([0x08, 0x06, 0, 1, 0x08, 0, 6, 4]);
    frame.extend(operation.to_be_bytes());
    frame.extend(mac);
    frame.extend(address.octets());
    frame.extend(if operation == 1 { [0; 6] } else { mac });
    frame.extend(address.octets());
    frame
}

/// Flags router and override, not solicited; the option with the hardware address; to all nodes of the link.
fn advertisement(mac: [u8; 6], address: Ipv6Addr) -> Vec<u8> {
    let mut message = Vec::with_capacity(ADVERTISEMENT_BYTES);
    message.extend([136, 0, 0, 0, 0b1010_0000, 0, 0, 0]);
    message.extend(address.octets());
    message.extend([2, 1]);
    message.extend(mac);
    let pseudo = checksum::pseudo_header_v6(&address, &ALL_NODES, ICMPV6, ADVERTISEMENT_BYTES as u32);
    let sum = checksum::finish(checksum::sum(&message, pseudo));
    crate::put_u16(&mut message, 2, sum);
    let mut frame = Vec::with_capacity(54 + ADVERTISEMENT_BYTES);
    frame.extend([0x33, 0x33, 0, 0, 0, 1]);
    frame.extend(mac);
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
    frame.extend((ADVERTISEMENT_BYTES as u16).to_be_bytes());
    frame.extend([ICMPV6, 255]);
    frame.extend(address.octets());
    frame.extend(ALL_NODES.octets());
    frame.extend(message);
    frame
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 1, 1];

    #[test]
    fn ipv4_is_announced_as_request_and_as_reply() {
        let frames = frames(MAC, "10.1.0.1".parse().unwrap());
        let head = "ffffffffffff 020000000101 0806 0001 0800 06 04";
        let wanted = [
            format!("{head} 0001 020000000101 0a010001 000000000000 0a010001"),
            format!("{head} 0002 020000000101 0a010001 020000000101 0a010001"),
        ];
        let hex = |frame: &Vec<u8>| frame.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        assert_eq!(frames.iter().map(hex).collect::<Vec<_>>(), wanted.map(|text| text.replace(' ', "")));
    }

    #[test]
    fn ipv6_is_advertised_with_override_and_a_valid_checksum() {
        let frames = frames(MAC, "fd01::1".parse().unwrap());
        let packet = &frames[0][14..];
        assert_eq!((frames.len(), packet.len(), packet[7]), (1, 72, 255));
        assert!(checksum::verify_packet(packet));
        let message = &packet[40..];
        assert_eq!((message[0], message[4]), (136, 0b1010_0000), "router, override, not solicited");
        assert_eq!(message[24..], [2, 1, 2, 0, 0, 0, 1, 1]);
    }
}
