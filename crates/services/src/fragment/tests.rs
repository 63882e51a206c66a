//! Tests of both halves, and the packets they use. Packets are built and cut here by the simplest code that can be
//! right, and by none of the module's own.

#![allow(clippy::unwrap_used, reason = "tests")]

mod flood;
mod model;
mod out;
mod rendezvous;
mod rules;
mod table;

use packet::ip::{PROTOCOL_FRAGMENT, PROTOCOL_UDP};
use packet::{DropReason, IpHeader};

use packet::attachment::InterfaceId;

use super::*;
use crate::hash::SecretState;

const SECOND: u64 = 1_000_000_000;
const TIMEOUT: u64 = 15 * SECOND;

/// Limits that nothing here reaches.
const ROOMY: FragmentLimits =
    FragmentLimits { bytes_max: 64 << 20, packets_per_source_max: 1_000, timeout_ns: TIMEOUT };

/// How a fragment is built.
#[derive(Clone, Debug)]
struct Recipe {
    six: bool,
    /// Last byte of the source address.
    from: u32,
    id: u32,
    protocol: u8,
    /// First byte of the class: DSCP and ECN.
    tos: u8,
    dont_fragment: bool,
    /// IPv4 options, a multiple of 4 bytes.
    options: Vec<u8>,
    /// IPv6 extension headers in front of the fragment header; the first one's kind.
    extensions: (u8, Vec<u8>),
}

const V4: Recipe = Recipe {
    six: false,
    from: 5,
    id: 0xbeef,
    protocol: PROTOCOL_UDP,
    tos: 0,
    dont_fragment: false,
    options: Vec::new(),
    extensions: (0, Vec::new()),
};
const V6: Recipe = Recipe {
    six: true,
    from: 5,
    id: 0xdead_beef,
    protocol: PROTOCOL_UDP,
    tos: 0,
    dont_fragment: false,
    options: Vec::new(),
    extensions: (0, Vec::new()),
};

impl Recipe {
    /// A fragment: `payload` from byte `offset` on.
    fn fragment(&self, offset: usize, more: bool, payload: &[u8]) -> Vec<u8> {
        if self.six {
            let word = (offset as u16) | u16::from(more);
            let mut header = vec![self.protocol, 0];
            header.extend(word.to_be_bytes());
            header.extend(self.id.to_be_bytes());
            header.extend(payload);
            self.behind(PROTOCOL_FRAGMENT, &header)
        } else {
            let word = (offset / 8) as u16 | if more { 0x2000 } else { 0 };
            self.v4(word, payload)
        }
    }

    /// The whole packet.
    fn whole(&self, payload: &[u8]) -> Vec<u8> {
        if self.six { self.behind(self.protocol, payload) } else { self.v4(0, payload) }
    }

    /// Fragments of `step` bytes of payload.
    fn cut(&self, payload: &[u8], step: usize) -> Vec<Vec<u8>> {
        let parts = payload.chunks(step).enumerate();
        parts.map(|(at, part)| self.fragment(at * step, (at + 1) * step < payload.len(), part)).collect()
    }

    fn v4(&self, word: u16, payload: &[u8]) -> Vec<u8> {
        let words = 5 + self.options.len() / 4;
        let mut packet = vec![0x40 | words as u8, self.tos];
        packet.extend(((words * 4 + payload.len()) as u16).to_be_bytes());
        packet.extend((self.id as u16).to_be_bytes());
        packet.extend((word | if self.dont_fragment { 0x4000 } else { 0 }).to_be_bytes());
        packet.extend([64, self.protocol, 0, 0, 10]);
        packet.extend(&self.from.to_be_bytes()[1..]);
        packet.extend([192, 0, 2, 1]);
        packet.extend(&self.options);
        let mut sum =
            packet.chunks(2).fold(0u32, |sum, two| sum + u32::from(two[0]) * 256 + u32::from(two[1]));
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        packet[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
        packet.extend(payload);
        packet
    }

    fn behind(&self, next: u8, payload: &[u8]) -> Vec<u8> {
        let (first, mut extensions) = self.extensions.clone();
        if let Some(named) = extensions.first_mut() {
            // One extension header at most.
            *named = next;
        }
        let first = if extensions.is_empty() { next } else { first };
        let mut packet = ((6 << 28) | (u32::from(self.tos) << 20) | 0x1234).to_be_bytes().to_vec();
        packet.extend(((extensions.len() + payload.len()) as u16).to_be_bytes());
        packet.extend([first, 64, 0x20, 1, 0x0d, 0xb8]);
        // A /64 for each source.
        packet.extend(self.from.to_be_bytes());
        packet.extend([0, 0, 0, 0, 0, 0, 0, 1]);
        packet.extend([0x20, 1, 0x0d, 0xb8, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9]);
        packet.extend(extensions);
        packet.extend(payload);
        packet
    }
}

fn by(interface: u16) -> Ingress {
    Ingress::Interface(InterfaceId(interface))
}

/// A UDP datagram from port 1000 to port 2000 whose bytes tell their place.
fn udp(bytes: usize) -> Vec<u8> {
    let mut upper = vec![0x03, 0xe8, 0x07, 0xd0];
    upper.extend((bytes as u16).to_be_bytes());
    upper.extend([0xab, 0xcd]);
    upper.extend((8..bytes).map(|at| (at % 251) as u8));
    upper
}

fn header(packet: &[u8]) -> IpHeader {
    IpHeader::parse(packet).unwrap()
}

/// Output of a rendezvous, owned.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Out {
    id: Option<PacketId>,
    key: packet::FlowKey,
    packet: Vec<u8>,
    first: bool,
    last: bool,
    measure: Measure,
}

/// One fragment into a rendezvous, on interface 3 of tenant 0.
fn meet(rendezvous: &mut Rendezvous, now: u64, packet: &[u8]) -> Result<Vec<Out>, DropReason> {
    let mut outs = Vec::new();
    let mut out = |Released { id, key, packet, first, last, measure }: Released<'_>| {
        outs.push(Out { id, key, packet: packet.to_vec(), first, last, measure });
    };
    let result = rendezvous.push(now, packet, &header(packet), 0, by(3), &mut out);
    rendezvous.audit();
    result.map(|()| outs)
}

/// The packet's identification on interface 3 of tenant 0.
fn id_of(packet: &[u8]) -> PacketId {
    PacketId::of(&header(packet), 0, by(3)).unwrap()
}

/// Outcome of a table for a fragment, owned.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Did {
    Held,
    Copy,
    Bridge,
    Whole(Vec<u8>),
}

/// One fragment into a table.
fn take(table: &mut FragmentTable, now: u64, packet: &[u8]) -> Result<Did, DropReason> {
    let did = match table.push(now, &id_of(packet), packet, &header(packet)) {
        Ok(Outcome::Held) => Ok(Did::Held),
        Ok(Outcome::Copy) => Ok(Did::Copy),
        Ok(Outcome::Bridge(_)) => Ok(Did::Bridge),
        Ok(Outcome::Whole(whole)) => Ok(Did::Whole(whole.packet.to_vec())),
        Err(reason) => Err(reason),
    };
    table.audit();
    did
}

/// A table that was told what to do with the packet of this fragment.
fn told(action: Action, fragment: &[u8]) -> FragmentTable {
    let mut table = FragmentTable::new(ROOMY, SecretState::of_number(1));
    table.tell(0, &tell(action, fragment)).unwrap();
    table
}

fn tell(action: Action, fragment: &[u8]) -> Told {
    let header = header(fragment);
    let key = packet::FlowKey {
        src: header.src,
        dst: header.dst,
        src_port: 1000,
        dst_port: 2000,
        protocol: header.protocol,
    };
    Told { id: id_of(fragment), key, action }
}
