//! The test's own packets: drawn, written, read back with every checksum, and hashed once more by the definition.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use packet::checksum;
use packet::flow::FlowKey;
use packet::ip::{PROTOCOL_ICMP, PROTOCOL_ICMPV6};
use services::pipeline::ETHERNET_BYTES;
use services::spec::{TCP, UDP};
use steering::symmetric::{FlowHasher, MIX_MULTIPLIER, MIX_SHIFT};
use steering::toeplitz::{RSS_KEY, rss_hash};

use crate::bench::gateway::mix;

/// Room for one frame.
pub const SLOT_BYTES: usize = 96;

/// Draws flow `number`: any client, any server, any ports; a fifth is IPv6, a sixteenth ICMP echo, the rest TCP and
/// UDP by halves.
pub fn random_flow(number: u64) -> FlowKey {
    let (bits, ports) = (mix(number), mix(number ^ 0x706f_7274 << 32));
    let v6 = bits.is_multiple_of(5);
    let protocol = match bits >> 8 & 15 {
        0 if v6 => PROTOCOL_ICMPV6,
        0 => PROTOCOL_ICMP,
        1..=7 => TCP,
        _ => UDP,
    };
    let client = bits >> 16 & 0xffff;
    let (src, dst): (IpAddr, IpAddr) = if v6 {
        (Ipv6Addr::from(0xfd << 120 | 1 << 16 | u128::from(client)).into(), server_v6(mix(bits)).into())
    } else {
        (Ipv4Addr::from(0x0a40_0000 | client as u32).into(), server_v4(mix(bits)).into())
    };
    let (src_port, dst_port) = (1 + (ports % 65_535) as u16, 1 + (ports >> 32) as u16 % 65_535);
    let key = FlowKey { src, dst, src_port, dst_port, protocol };
    match protocol {
        TCP | UDP => key,
        // The identifier stands with the lower address.
        _ if src < dst => FlowKey { dst_port: 0, ..key },
        _ => FlowKey { src_port: 0, dst_port: src_port, ..key },
    }
}

/// A server anywhere in the Internet: outside 10/8, where clients and backends are, and our own network.
fn server_v4(seed: u64) -> Ipv4Addr {
    let mut bits = seed;
    loop {
        let address = Ipv4Addr::from((bits >> 32) as u32);
        let [first, second, third, _] = address.octets();
        let ours = [first, second, third] == [203, 0, 113];
        let link_local = [first, second] == [169, 254];
        if (1..224).contains(&first) && first != 10 && first != 127 && !link_local && !ours {
            return address;
        }
        bits = mix(bits);
    }
}

fn server_v6(seed: u64) -> Ipv6Addr {
    let network = 0x2000 | u128::from(seed >> 51);
    // Bit 64 keeps it out of our own network, 2001:db8::/64.
    Ipv6Addr::from(network << 112 | 1 << 64 | u128::from(mix(seed)))
}

/// Anybody who asks a virtual server.
pub fn random_client(number: u64, listen: (IpAddr, u16), protocol: u8) -> FlowKey {
    let bits = mix(number ^ 0x636c_6965 << 32);
    let src = if listen.0.is_ipv4() { server_v4(bits).into() } else { server_v6(bits).into() };
    let src_port = 1 + (mix(bits) % 65_535) as u16;
    FlowKey { src, dst: listen.0, src_port, dst_port: listen.1, protocol }
}

/// Writes the first packet of a flow, or the first of its replies; its length. `number` is carried along.
pub fn write(slot: &mut [u8; SLOT_BYTES], key: &FlowKey, replies: bool, number: u32) -> usize {
    slot.fill(0);
    let ip_bytes = if key.src.is_ipv4() { 20 } else { 40 };
    let upper_bytes = if key.protocol == TCP { 20 } else { 12 };
    let length = ETHERNET_BYTES + ip_bytes + upper_bytes;
    let (ip, upper) = slot[ETHERNET_BYTES..length].split_at_mut(ip_bytes);
    match (key.src, key.dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            ip[..10].copy_from_slice(&[
                0x45,
                0,
                0,
                (ip_bytes + upper_bytes) as u8,
                0,
                1,
                0x40,
                0,
                64,
                key.protocol,
            ]);
            ip[12..16].copy_from_slice(&src.octets());
            ip[16..20].copy_from_slice(&dst.octets());
            let sum = checksum::finish(checksum::sum(ip, 0));
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            ip[..8].copy_from_slice(&[0x60, 0, 0, 0, 0, upper_bytes as u8, key.protocol, 64]);
            ip[8..24].copy_from_slice(&src.octets());
            ip[24..40].copy_from_slice(&dst.octets());
        }
        _ => {}
    }
    write_upper(upper, key, replies, number);
    length
}

fn write_upper(upper: &mut [u8], key: &FlowKey, replies: bool, number: u32) {
    upper[..2].copy_from_slice(&key.src_port.to_be_bytes());
    upper[2..4].copy_from_slice(&key.dst_port.to_be_bytes());
    let sum_at = match key.protocol {
        TCP => {
            upper[4..8].copy_from_slice(&number.to_be_bytes());
            if replies {
                upper[8..12].copy_from_slice(&number.wrapping_add(1).to_be_bytes());
            }
            upper[12..16].copy_from_slice(&[0x50, if replies { 0x12 } else { 0x02 }, 0xff, 0xff]);
            16
        }
        UDP => {
            upper[5] = 12;
            upper[8..12].copy_from_slice(&number.to_be_bytes());
            6
        }
        _ => {
            let kind = match (key.protocol, replies) {
                (PROTOCOL_ICMP, false) => 8,
                (PROTOCOL_ICMP, true) => 0,
                (_, replies) => 128 + u8::from(replies),
            };
            upper[..4].copy_from_slice(&[kind, 0, 0, 0]);
            upper[4..6].copy_from_slice(&(key.src_port | key.dst_port).to_be_bytes());
            upper[8..12].copy_from_slice(&number.to_be_bytes());
            2
        }
    };
    let pseudo = if key.protocol == PROTOCOL_ICMP {
        0
    } else {
        checksum::pseudo_header(key.src, key.dst, key.protocol, upper.len())
    };
    let sum = match checksum::finish(checksum::sum(upper, pseudo)) {
        0 if key.protocol == UDP => 0xffff,
        sum => sum,
    };
    upper[sum_at..sum_at + 2].copy_from_slice(&sum.to_be_bytes());
}

/// Tuple and number of a frame that came out, if all its checksums are right.
pub fn read(frame: &[u8]) -> Option<(FlowKey, u32)> {
    let ip = frame.get(ETHERNET_BYTES..)?;
    let key = FlowKey::of(ip).ok()?;
    let v4 = key.src.is_ipv4();
    let upper = ip.get(if v4 { 20 } else { 40 }..)?;
    let whole = match key.protocol {
        // No pseudo header under this one.
        PROTOCOL_ICMP => checksum::finish(checksum::sum(upper, 0)) == 0,
        protocol => checksum::verify_upper(key.src, key.dst, protocol, upper),
    };
    if !whole || (v4 && !checksum::verify_ipv4_header(ip.get(..20)?)) {
        return None;
    }
    let number_at = if key.protocol == TCP { 4 } else { 8 };
    let number = upper.get(number_at..number_at + 4)?.try_into().ok()?;
    Some((key, u32::from_be_bytes(number)))
}

/// The hash by its definition (`steering::symmetric`), bit by bit, without the tables that the gateway uses.
pub fn hash_by_definition(hasher: &FlowHasher, key: &FlowKey) -> u32 {
    let (mut low, mut high) = ((key.src, key.src_port), (key.dst, key.dst_port));
    if low > high {
        std::mem::swap(&mut low, &mut high);
    }
    let (input, length) = input(low.0, high.0, low.1, high.1);
    let x = (u32::from(key.protocol) << 16).wrapping_mul(MIX_MULTIPLIER);
    rss_hash(hasher.key(), &input[..length]) ^ x ^ (x >> MIX_SHIFT)
}

/// Hash of a network card with Microsoft's key: not symmetric.
pub fn card_hash(key: &FlowKey) -> u32 {
    let (input, length) = input(key.src, key.dst, key.src_port, key.dst_port);
    rss_hash(&RSS_KEY, &input[..length])
}

/// Two addresses, then two ports, as the hash reads them.
fn input(first: IpAddr, second: IpAddr, first_port: u16, second_port: u16) -> ([u8; 36], usize) {
    let mut input = [0; 36];
    let bytes = match (first, second) {
        (IpAddr::V4(first), IpAddr::V4(second)) => {
            input[..4].copy_from_slice(&first.octets());
            input[4..8].copy_from_slice(&second.octets());
            8
        }
        (first, second) => {
            let wide = |address: IpAddr| match address {
                IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
                IpAddr::V6(address) => address.octets(),
            };
            input[..16].copy_from_slice(&wide(first));
            input[16..32].copy_from_slice(&wide(second));
            32
        }
    };
    input[bytes..bytes + 2].copy_from_slice(&first_port.to_be_bytes());
    input[bytes + 2..bytes + 4].copy_from_slice(&second_port.to_be_bytes());
    (input, bytes + 4)
}
