//! Trains: datagrams of one UDP flow that leave in the same batch become one super-packet, so that the kernel carries
//! them through its stack once. Nothing waits for that, and nothing changes on the wire: whoever sends them last cuts
//! the train at the same places again.

use std::net::IpAddr;

use packet::attachment::{Egress, InterfaceId};
use packet::checksum;
use packet::ip::{IpHeader, PROTOCOL_UDP};
use packet::vnet::{DATA_VALID, GSO_NONE, GSO_UDP_L4, NEEDS_CSUM, VirtioNetHeader};
use services::core::{BATCH_MAX, ETHERNET_BYTES, Frame, Outcome};
use services::flow::{Direction, FlowId};

/// Datagrams of a train at most (the kernel's own limit for UDP segmentation is 128).
const CARS_MAX: usize = 64;
/// Bytes of a train at most: an IPv4 packet's length has 16 bits.
const TRAIN_BYTES_MAX: usize = 60_000;
/// Bytes of a UDP header.
const UDP_BYTES: usize = 8;

/// One car after the other, as places in the batch.
#[derive(Clone, Copy)]
struct Train {
    flow: (FlowId, Direction),
    interface: InterfaceId,
    first: usize,
    last: usize,
    cars: usize,
    bytes: usize,
    /// Payload of each car but the last.
    payload: usize,
    /// A shorter car ends it.
    closed: bool,
    headers: usize,
}

/// Places of [`Trains::heads`], a power of two.
const HEADS: usize = 1_024;

/// Puts the frames of a batch together.
pub struct Trains {
    trains: Vec<Train>,
    /// By flow, roughly: the last train that was begun, counted from 1.
    heads: Box<[u16; HEADS]>,
    /// Of each frame: the next car of its train.
    next: [Option<usize>; BATCH_MAX],
    buffer: Vec<u8>,
    /// By first car.
    built: Vec<Built>,
}

/// A super-packet ready to leave.
pub struct Built {
    /// The frame in whose place it leaves.
    first: usize,
    /// Its frame within the buffer.
    pub bytes: std::ops::Range<usize>,
    /// Its offload header; offsets count from the IP header.
    pub offload: VirtioNetHeader,
}

impl Default for Trains {
    fn default() -> Self {
        Self {
            trains: Vec::with_capacity(BATCH_MAX),
            heads: Box::new([0; HEADS]),
            next: [None; BATCH_MAX],
            buffer: Vec::with_capacity(BATCH_MAX * 2_048),
            built: Vec::with_capacity(BATCH_MAX),
        }
    }
}

impl Trains {
    /// Couples what can be coupled: the first car stays where it is in the batch and stands for its train
    /// ([`Trains::at`]), the others are done.
    pub fn couple(&mut self, frames: &mut [Frame<'_>]) {
        self.trains.clear();
        self.built.clear();
        self.buffer.clear();
        if frames.len() < 2 {
            return;
        }
        self.next = [None; BATCH_MAX];
        let mut couples = false;
        for (place, frame) in frames.iter().enumerate().take(BATCH_MAX) {
            couples |= self.sort_in(place, frame);
        }
        let trains = std::mem::take(&mut self.trains);
        for train in &trains {
            if couples && train.cars > 1 {
                self.build(train, frames);
            }
            if let Some(head) = self.heads.get_mut(head_of(train.flow)) {
                *head = 0;
            }
        }
        self.trains = trains;
    }

    /// The train that leaves in the place of this frame. Ask in order of the places.
    pub fn at(&self, place: usize) -> Option<(&VirtioNetHeader, &[u8])> {
        let built = self.built.iter().find(|built| built.first == place)?;
        Some((&built.offload, self.buffer.get(built.bytes.clone()).unwrap_or_default()))
    }

    /// Whether any train was built.
    pub fn is_empty(&self) -> bool {
        self.built.is_empty()
    }

    /// Whether the frame joined another.
    fn sort_in(&mut self, place: usize, frame: &Frame<'_>) -> bool {
        let (Outcome::Forward(Egress::Interface(interface)), Some(flow)) = (frame.outcome, frame.flow) else {
            return false;
        };
        let Some(head) = self.heads.get_mut(head_of(flow)) else { return false };
        let number = self.trains.len() as u16 + 1;
        let last = usize::from(*head).checked_sub(1).and_then(|last| self.trains.get_mut(last));
        let last = last.filter(|train| train.flow == flow && train.interface == interface);
        let Some((headers, payload)) = car(frame) else {
            // What cannot be coupled must not be overtaken by what comes later.
            if let Some(train) = last {
                train.closed = true;
            }
            return false;
        };
        if let Some(train) = last
            && train.takes(headers, payload)
        {
            if let Some(next) = self.next.get_mut(train.last) {
                *next = Some(place);
            }
            train.last = place;
            train.cars += 1;
            train.bytes += payload;
            train.closed = payload < train.payload;
            return true;
        }
        *head = number;
        self.trains.push(Train {
            flow,
            interface,
            first: place,
            last: place,
            cars: 1,
            bytes: payload,
            payload,
            closed: payload == 0,
            headers,
        });
        false
    }

    fn build(&mut self, train: &Train, frames: &mut [Frame<'_>]) {
        let start = self.buffer.len();
        let mut place = Some(train.first);
        while let Some(at) = place {
            let Some(frame) = frames.get_mut(at) else { break };
            let skip = if at == train.first { 0 } else { ETHERNET_BYTES + train.headers };
            let end = (ETHERNET_BYTES + packet_bytes(frame.packet())).min(frame.bytes.len());
            self.buffer.extend_from_slice(frame.bytes.get(skip..end).unwrap_or_default());
            if at != train.first {
                frame.outcome = Outcome::Consumed;
            }
            place = self.next.get(at).copied().flatten();
        }
        let range = start..self.buffer.len();
        let packet = self.buffer.get_mut(start + ETHERNET_BYTES..).unwrap_or_default();
        finish(packet, train.headers);
        let ip_bytes = (train.headers - UDP_BYTES) as u16;
        let offload = VirtioNetHeader {
            flags: NEEDS_CSUM,
            gso_type: GSO_UDP_L4,
            hdr_len: train.headers as u16,
            gso_size: train.payload as u16,
            csum_start: ip_bytes,
            csum_offset: 6,
        };
        self.built.push(Built { first: train.first, bytes: range, offload });
    }
}

/// Where the train of a flow is remembered.
fn head_of((flow, direction): (FlowId, Direction)) -> usize {
    let number = flow.number().wrapping_mul(0x9e37_79b1) ^ direction as u32;
    (number >> 22) as usize ^ (number as usize & 1)
}

impl Train {
    fn takes(&self, headers: usize, payload: usize) -> bool {
        !self.closed
            && self.headers == headers
            && payload <= self.payload
            && payload > 0
            && self.cars < CARS_MAX
            && self.bytes + payload <= TRAIN_BYTES_MAX
    }
}

/// Length of an IP packet by its own header; a frame may have padding behind it.
fn packet_bytes(packet: &[u8]) -> usize {
    match packet {
        [first, _, a, b, ..] if first >> 4 == 4 => usize::from(u16::from_be_bytes([*a, *b])),
        [first, _, _, _, a, b, ..] if first >> 4 == 6 => 40 + usize::from(u16::from_be_bytes([*a, *b])),
        _ => packet.len(),
    }
}

/// Bytes of the headers and of the payload of a datagram that may be coupled: whole, checked or to be checked, with
/// the header layout that the kernel writes again for each segment.
fn car(frame: &Frame<'_>) -> Option<(usize, usize)> {
    let offload = &frame.offload;
    if offload.gso_type != GSO_NONE || offload.flags & (NEEDS_CSUM | DATA_VALID) == 0 {
        return None;
    }
    let packet = frame.packet();
    let plain = match packet.first()? {
        // No options; fragments keep to themselves.
        0x45 => packet.get(9) == Some(&PROTOCOL_UDP) && packet.get(6)? & 0x3f == 0 && packet.get(7)? == &0,
        first if first >> 4 == 6 => packet.get(6) == Some(&PROTOCOL_UDP),
        _ => false,
    };
    if !plain {
        return None;
    }
    let headers = UDP_BYTES + if packet.first()? >> 4 == 4 { 20 } else { 40 };
    // A zero checksum says "none": the kernel would put one in.
    if packet.get(headers - 2..headers)? == [0, 0] {
        return None;
    }
    let payload = packet_bytes(packet).checked_sub(headers)?;
    (ETHERNET_BYTES + headers + payload <= frame.bytes.len()).then_some((headers, payload))
}

/// Lengths and checksums of the headers for the whole train.
fn finish(packet: &mut [u8], headers: usize) {
    let total = packet.len();
    let udp_bytes = (total + UDP_BYTES - headers) as u16;
    let ip_bytes = headers - UDP_BYTES;
    if ip_bytes == 20 {
        put(packet, 2, total as u16);
        put(packet, 10, 0);
        let sum = checksum::finish(checksum::sum(packet.get(..20).unwrap_or_default(), 0));
        put(packet, 10, sum);
    } else {
        put(packet, 4, (total - 40) as u16);
    }
    put(packet, ip_bytes + 4, udp_bytes);
    let (src, dst) = IpHeader::parse(packet)
        .map_or((IpAddr::from([0; 4]), IpAddr::from([0; 4])), |header| (header.src, header.dst));
    let partial = checksum::fold(checksum::pseudo_header(src, dst, PROTOCOL_UDP, usize::from(udp_bytes)));
    put(packet, ip_bytes + 6, partial);
}

fn put(packet: &mut [u8], at: usize, value: u16) {
    if let Some(field) = packet.get_mut(at..at + 2) {
        field.copy_from_slice(&value.to_be_bytes());
    }
}
