//! Packets for this crate's tests, built and checksummed by the simplest code that can be right, and by
//! none of the crate's own.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::net::IpAddr;

/// The Internet checksum's sum, two bytes at a time, carries added as they come.
pub fn naive_sum(bytes: &[u8]) -> u16 {
    let mut sum = 0u64;
    for (index, byte) in bytes.iter().enumerate() {
        sum += u64::from(*byte) << if index % 2 == 0 { 8 } else { 0 };
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Bytes of the pseudo-header in front of an upper layer.
pub fn pseudo_bytes(src: IpAddr, dst: IpAddr, protocol: u8, upper_bytes: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            bytes.extend(src.octets());
            bytes.extend(dst.octets());
            bytes.extend([0, protocol]);
            bytes.extend((upper_bytes as u16).to_be_bytes());
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            bytes.extend(src.octets());
            bytes.extend(dst.octets());
            bytes.extend((upper_bytes as u32).to_be_bytes());
            bytes.extend([0, 0, 0, protocol]);
        }
        _ => panic!("mixed versions"),
    }
    bytes
}

/// Content of the checksum field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sum {
    Full,
    Partial,
}

/// A recipe for a TCP or UDP packet.
#[derive(Clone, Debug)]
pub struct Recipe {
    pub src: IpAddr,
    pub dst: IpAddr,
    pub ports: (u16, u16),
    pub tos: u8,
    pub ttl: u8,
    pub id: u16,
    pub dont_fragment: bool,
    pub flow_label: u32,
    /// `None`: UDP.
    pub tcp: Option<Tcp>,
    pub payload: Vec<u8>,
    pub sum: Sum,
}

#[derive(Clone, Debug)]
pub struct Tcp {
    pub sequence: u32,
    pub acknowledgement: u32,
    pub flags: u8,
    pub window: u16,
    /// A multiple of 4 bytes.
    pub options: Vec<u8>,
}

pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const PSH: u8 = 8;
pub const ACK: u8 = 16;
pub const URG: u8 = 32;
pub const ECE: u8 = 64;
pub const CWR: u8 = 128;

pub const V4: (&str, &str) = ("10.0.0.5", "1.2.3.4");
pub const V6: (&str, &str) = ("2001:db8::5", "2001:db8:1::4");

impl Recipe {
    pub fn tcp(addresses: (&str, &str), payload: Vec<u8>) -> Recipe {
        let tcp = Tcp {
            sequence: 0xffff_f000,
            acknowledgement: 77,
            flags: ACK,
            window: 501,
            options: vec![1, 1, 8, 10, 0, 0, 0, 9, 0, 0, 0, 8],
        };
        Recipe { tcp: Some(tcp), ..Recipe::udp(addresses, payload) }
    }

    pub fn udp((src, dst): (&str, &str), payload: Vec<u8>) -> Recipe {
        Recipe {
            src: src.parse().unwrap(),
            dst: dst.parse().unwrap(),
            ports: (1234, 443),
            tos: 0,
            ttl: 64,
            id: 0xfffe,
            dont_fragment: true,
            flow_label: 0x12345,
            tcp: None,
            payload,
            sum: Sum::Partial,
        }
    }

    pub fn flags(mut self, flags: u8) -> Recipe {
        self.tcp.as_mut().unwrap().flags = flags;
        self
    }

    pub fn options(mut self, options: &[u8]) -> Recipe {
        self.tcp.as_mut().unwrap().options = options.to_vec();
        self
    }

    pub fn full(mut self) -> Recipe {
        self.sum = Sum::Full;
        self
    }

    pub fn protocol(&self) -> u8 {
        if self.tcp.is_some() { 6 } else { 17 }
    }

    pub fn ip_bytes(&self) -> usize {
        if self.src.is_ipv4() { 20 } else { 40 }
    }

    pub fn header_bytes(&self) -> usize {
        self.ip_bytes() + self.tcp.as_ref().map_or(8, |tcp| 20 + tcp.options.len())
    }

    fn upper(&self) -> Vec<u8> {
        let mut upper = Vec::new();
        upper.extend(self.ports.0.to_be_bytes());
        upper.extend(self.ports.1.to_be_bytes());
        let checksum_at = match &self.tcp {
            Some(tcp) => {
                upper.extend(tcp.sequence.to_be_bytes());
                upper.extend(tcp.acknowledgement.to_be_bytes());
                upper.push((((20 + tcp.options.len()) / 4) << 4) as u8);
                upper.push(tcp.flags);
                upper.extend(tcp.window.to_be_bytes());
                upper.extend([0; 4]);
                upper.extend(&tcp.options);
                16
            }
            None => {
                upper.extend(((8 + self.payload.len()) as u16).to_be_bytes());
                upper.extend([0; 2]);
                6
            }
        };
        upper.extend(&self.payload);
        let mut summed = pseudo_bytes(self.src, self.dst, self.protocol(), upper.len());
        let checksum = match self.sum {
            Sum::Partial => naive_sum(&summed),
            Sum::Full => {
                summed.extend(&upper);
                match !naive_sum(&summed) {
                    0 if self.tcp.is_none() => 0xffff,
                    checksum => checksum,
                }
            }
        };
        upper[checksum_at..checksum_at + 2].copy_from_slice(&checksum.to_be_bytes());
        upper
    }

    pub fn build(&self) -> Vec<u8> {
        ip_packet(self, self.protocol(), &self.upper())
    }

    /// With extension headers (given whole, the first one of kind `first`) in front of the upper layer.
    pub fn build_behind(&self, first: u8, extensions: &[u8]) -> Vec<u8> {
        let mut upper = extensions.to_vec();
        upper.extend(self.upper());
        ip_packet(self, first, &upper)
    }
}

/// An IP header with the recipe's addresses in front of any upper layer.
pub fn ip_packet(recipe: &Recipe, protocol: u8, upper: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    match (recipe.src, recipe.dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            packet.extend([0x45, recipe.tos]);
            packet.extend(((20 + upper.len()) as u16).to_be_bytes());
            packet.extend(recipe.id.to_be_bytes());
            packet.extend([if recipe.dont_fragment { 0x40 } else { 0 }, 0, recipe.ttl, protocol, 0, 0]);
            packet.extend(src.octets());
            packet.extend(dst.octets());
            fix_ipv4(&mut packet);
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            packet.extend((6 << 28 | u32::from(recipe.tos) << 20 | recipe.flow_label).to_be_bytes());
            packet.extend((upper.len() as u16).to_be_bytes());
            packet.extend([protocol, recipe.ttl]);
            packet.extend(src.octets());
            packet.extend(dst.octets());
        }
        _ => panic!("mixed versions"),
    }
    packet.extend(upper);
    packet
}

/// Computes the IPv4 header checksum anew.
pub fn fix_ipv4(packet: &mut [u8]) {
    let bytes = usize::from(packet[0] & 15) * 4;
    packet[10..12].fill(0);
    let checksum = !naive_sum(&packet[..bytes]);
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
}

/// Payload whose bytes tell their place.
pub fn payload(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|index| (index % 251) as u8).collect()
}

/// The virtio header the kernel gives a super-packet built from this recipe.
pub fn super_header(recipe: &Recipe, gso_size: u16) -> crate::vnet::VirtioNetHeader {
    let gso_type = match &recipe.tcp {
        Some(tcp) => (if recipe.src.is_ipv4() { 1 } else { 4 }) | if tcp.flags & CWR != 0 { 0x80 } else { 0 },
        None => 5,
    };
    crate::vnet::VirtioNetHeader {
        flags: 1,
        gso_type,
        hdr_len: recipe.header_bytes() as u16,
        gso_size,
        csum_start: recipe.ip_bytes() as u16,
        csum_offset: if recipe.tcp.is_some() { 16 } else { 6 },
    }
}

/// The segments a super-packet built from this recipe stands for, as a sender without offload would have
/// sent them.
pub fn reference_segments(recipe: &Recipe, gso_size: usize) -> Vec<Vec<u8>> {
    let count = recipe.payload.len().div_ceil(gso_size);
    let parts = recipe.payload.chunks(gso_size).enumerate();
    parts
        .map(|(index, part)| {
            let mut segment = recipe.clone();
            segment.payload = part.to_vec();
            segment.id = recipe.id.wrapping_add(index as u16);
            if let Some(tcp) = &mut segment.tcp {
                tcp.sequence = tcp.sequence.wrapping_add((index * gso_size) as u32);
                if index > 0 {
                    tcp.flags &= !CWR;
                }
                if index + 1 < count {
                    tcp.flags &= !(FIN | PSH);
                }
            }
            segment.build()
        })
        .collect()
}

/// Recipes whose every field varies, with flags that a super-packet may have.
pub fn any_recipe(payload_bytes_max: usize) -> impl proptest::strategy::Strategy<Value = Recipe> {
    use proptest::prelude::*;
    let network =
        (any::<bool>(), any::<bool>(), any::<u8>(), any::<u8>(), any::<u16>(), any::<bool>(), 0..1u32 << 20);
    let flags = prop::sample::subsequence(vec![FIN, PSH, ECE, CWR], 0..=4);
    let tcp = (any::<(u32, u32, u16)>(), flags, 0usize..=10, any::<u8>());
    let payload = (1..=payload_bytes_max, any::<u64>());
    (network, tcp, any::<(u16, u16)>(), payload).prop_map(
        |(
            (six, is_tcp, tos, ttl, id, dont_fragment, flow_label),
            (numbers, flags, words, option),
            ports,
            payload,
        )| {
            let tcp = Tcp {
                sequence: numbers.0,
                acknowledgement: numbers.1,
                flags: ACK | flags.iter().sum::<u8>(),
                window: numbers.2,
                options: vec![option; words * 4],
            };
            let bytes = (0..payload.0)
                .map(|index| (payload.1.rotate_left(index as u32) as u8) ^ index as u8)
                .collect();
            let base = Recipe::udp(if six { V6 } else { V4 }, bytes);
            Recipe { tos, ttl, id, dont_fragment, flow_label, ports, tcp: is_tcp.then_some(tcp), ..base }
        },
    )
}

/// A ClientHello with `padding_bytes` in front of the name, and something behind it.
pub fn client_hello(name: Option<&str>, padding_bytes: usize) -> Vec<u8> {
    let sized = |bytes: &[u8]| [&(bytes.len() as u16).to_be_bytes(), bytes].concat();
    let extension = |kind: u16, body: &[u8]| [&kind.to_be_bytes()[..], &sized(body)].concat();
    let mut extensions = extension(21, &vec![0; padding_bytes]);
    if let Some(name) = name {
        extensions.extend(extension(0, &sized(&[&[0], &sized(name.as_bytes())[..]].concat())));
    }
    extensions.extend(extension(43, &[2, 3, 4]));
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    // Session id, one cipher suite, no compression.
    body.extend([4, 1, 2, 3, 4, 0, 2, 0x13, 0x01, 1, 0]);
    body.extend(sized(&extensions));
    let mut message = (body.len() as u32).to_be_bytes().to_vec();
    message[0] = 1;
    message.extend(body);
    message
}

/// A handshake message in TLS records of so many bytes each.
pub fn records(message: &[u8], bytes: usize) -> Vec<u8> {
    let record = |part: &[u8]| [&[22, 3, 1][..], &(part.len() as u16).to_be_bytes(), part].concat();
    message.chunks(bytes).flat_map(record).collect()
}
