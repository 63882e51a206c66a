//! Packets for tests, built and checksummed by the simplest code that can be right.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::net::IpAddr;

use packet::FlowKey;

/// The Internet checksum's sum, two bytes at a time.
pub fn naive_sum(bytes: &[u8]) -> u32 {
    let mut sum = 0u32;
    for (index, byte) in bytes.iter().enumerate() {
        sum += u32::from(*byte) << if index % 2 == 0 { 8 } else { 0 };
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum
}

/// Pseudo-header of either version.
pub fn pseudo(src: IpAddr, dst: IpAddr, protocol: u8, upper_bytes: usize) -> Vec<u8> {
    let mut bytes = octets(src);
    bytes.extend(octets(dst));
    bytes.extend((upper_bytes as u32).to_be_bytes());
    bytes.extend([0, 0, 0, protocol]);
    bytes
}

/// An address's bytes.
pub fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// CRC32c, bit by bit.
pub fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
        }
    }
    !crc
}

/// How the checksum of the upper layer is filled in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sum {
    Full,
    Partial,
    Absent,
}

/// Fills in the upper layer's checksum.
pub fn summed(src: IpAddr, dst: IpAddr, protocol: u8, mut upper: Vec<u8>, how: Sum) -> Vec<u8> {
    let at = match protocol {
        6 => 16,
        17 | 136 | 33 => 6,
        1 | 58 => 2,
        132 => 8,
        _ => return upper,
    };
    if protocol == 132 {
        upper[8..12].fill(0);
        let crc = crc32c(&upper);
        upper[8..12].copy_from_slice(&crc.to_le_bytes());
        return upper;
    }
    upper[at..at + 2].fill(0);
    let mut covered = if protocol == 1 { vec![] } else { pseudo(src, dst, protocol, upper.len()) };
    if how == Sum::Full {
        covered.extend(&upper);
    }
    let sum = naive_sum(&covered) as u16;
    let sum = match how {
        Sum::Full if protocol == 17 && sum == 0xffff => 0xffff,
        Sum::Full => !sum,
        Sum::Partial => sum,
        Sum::Absent => 0,
    };
    upper[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    upper
}

/// An IP packet around the upper layer as it is. `options`: IPv4 options or IPv6 extension headers, with the first of
/// their protocol numbers.
pub fn ip(key: &FlowKey, options: (u8, &[u8]), upper: &[u8]) -> Vec<u8> {
    let mut bytes;
    if key.src.is_ipv4() {
        let header_bytes = 20 + options.1.len();
        let total = (header_bytes + upper.len()) as u16;
        bytes = vec![0x40 | (header_bytes / 4) as u8, 0, 0, 0, 0, 9, 0x40, 0, 64, key.protocol, 0, 0];
        bytes[2..4].copy_from_slice(&total.to_be_bytes());
        bytes.extend(octets(key.src));
        bytes.extend(octets(key.dst));
        bytes.extend(options.1);
        let sum = !(naive_sum(&bytes) as u16);
        bytes[10..12].copy_from_slice(&sum.to_be_bytes());
    } else {
        let next = if options.1.is_empty() { key.protocol } else { options.0 };
        bytes = vec![0x60, 0, 0, 0, 0, 0, next, 64];
        bytes[4..6].copy_from_slice(&((options.1.len() + upper.len()) as u16).to_be_bytes());
        bytes.extend(octets(key.src));
        bytes.extend(octets(key.dst));
        bytes.extend(options.1);
    }
    bytes.extend(upper);
    bytes
}

/// A whole packet of a flow. ICMP: an echo request with the key's identifier.
pub fn packet(key: &FlowKey, options: (u8, &[u8]), payload: &[u8], how: Sum) -> Vec<u8> {
    ip(key, options, &upper(key, payload, how))
}

/// The upper layer of [`packet`].
pub fn upper(key: &FlowKey, payload: &[u8], how: Sum) -> Vec<u8> {
    let mut upper = match key.protocol {
        6 => vec![0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x18, 1, 0, 0, 0, 0, 0],
        17 | 136 => vec![0; 8],
        132 | 33 => vec![0; 12],
        1 => vec![8, 0, 0, 0, 0, 0, 0, 1],
        58 => vec![128, 0, 0, 0, 0, 0, 0, 1],
        _ => vec![],
    };
    if matches!(key.protocol, 6 | 17 | 136 | 132) {
        upper[..2].copy_from_slice(&key.src_port.to_be_bytes());
        upper[2..4].copy_from_slice(&key.dst_port.to_be_bytes());
    }
    if matches!(key.protocol, 1 | 58) {
        upper[4..6].copy_from_slice(&(key.src_port | key.dst_port).to_be_bytes());
    }
    upper.extend(payload);
    if key.protocol == 17 {
        let bytes = upper.len() as u16;
        upper[4..6].copy_from_slice(&bytes.to_be_bytes());
    }
    summed(key.src, key.dst, key.protocol, upper, how)
}

/// A flow key from its text.
pub fn key(text: &str) -> FlowKey {
    text.parse().unwrap()
}
