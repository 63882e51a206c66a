//! GSO batches: datagrams of one UDP flow that leave in the same batch become one super-packet, so that the kernel carries
//! them through its stack once. Nothing waits for that, and nothing changes on the wire: whoever sends them last
//! segments the super-packet at the same places again.

use std::net::IpAddr;

use packet::attachment::{Egress, InterfaceId};
use packet::checksum;
use packet::ip::{IPV4_DONT_FRAGMENT, IpHeader, PROTOCOL_UDP};
use packet::vnet::{DATA_VALID, GSO_NONE, GSO_UDP_L4, NEEDS_CSUM, VirtioNetHeader};
use services::flow::{Direction, FlowId};
use services::pipeline::{BATCH_MAX, ETHERNET_BYTES, Frame, Outcome};

/// Datagrams of a GSO batch at most (the kernel's own limit for UDP segmentation is 128).
const DATAGRAMS_MAX: usize = 64;
/// Bytes of a GSO batch at most: an IPv4 packet's length has 16 bits.
const BATCH_BYTES_MAX: usize = 60_000;
/// Bytes of a UDP header.
const UDP_BYTES: usize = 8;

/// Datagrams to be merged, as places among the frames.
#[derive(Clone, Copy)]
struct GsoBatch {
    flow: (FlowId, Direction),
    interface: InterfaceId,
    first: usize,
    last: usize,
    datagrams: usize,
    bytes: usize,
    /// Payload of each datagram but the last.
    payload: usize,
    /// A shorter datagram ends it.
    closed: bool,
    headers: usize,
    /// Of each datagram.
    same: IpFields,
    /// Identification of the first datagram, where it means something.
    id: Option<u16>,
}

/// Fields that the IP headers of datagrams have in common which stand as one: version, traffic class with ECN, flow label or "don't fragment",
/// and time to live. So the kernel's GRO has it.
type IpFields = [u8; 5];

/// A datagram that may be merged.
struct Datagram {
    /// Bytes of its headers and of its payload.
    headers: usize,
    payload: usize,
    same: IpFields,
    /// IPv4 identification, if the datagram may be cut on its way: whoever segments counts up from the first one's. Of others nobody
    /// looks at it (RFC 6864).
    id: Option<u16>,
}

/// Places of [`GsoBatches::heads`], a power of two.
const HEADS: usize = 1_024;

/// Merges the frames that leave together.
pub(crate) struct GsoBatches {
    batches: Vec<GsoBatch>,
    /// By flow, roughly: the last GSO batch that was begun, counted from 1.
    heads: Box<[u16; HEADS]>,
    /// Of each frame: the next one of its GSO batch.
    next: [Option<usize>; BATCH_MAX],
    buffer: Vec<u8>,
    /// By first frame.
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

impl Default for GsoBatches {
    fn default() -> Self {
        Self {
            batches: Vec::with_capacity(BATCH_MAX),
            heads: Box::new([0; HEADS]),
            next: [None; BATCH_MAX],
            buffer: Vec::with_capacity(BATCH_MAX * 2_048),
            built: Vec::with_capacity(BATCH_MAX),
        }
    }
}

impl GsoBatches {
    /// Merges what can be merged: the first frame stays where it is and stands for its GSO batch ([`GsoBatches::at`]), the
    /// others are consumed.
    pub fn merge(&mut self, frames: &mut [Frame<'_>]) {
        self.batches.clear();
        self.built.clear();
        self.buffer.clear();
        if frames.len() < 2 {
            return;
        }
        self.next = [None; BATCH_MAX];
        let mut any = false;
        for (place, frame) in frames.iter().enumerate().take(BATCH_MAX) {
            any |= self.sort_in(place, frame);
        }
        let batches = std::mem::take(&mut self.batches);
        for batch in &batches {
            if any && batch.datagrams > 1 {
                self.build(batch, frames);
            }
            if let Some(head) = self.heads.get_mut(head_of(batch.flow)) {
                *head = 0;
            }
        }
        self.batches = batches;
    }

    /// The GSO batch that leaves in the place of this frame. Ask in order of the places.
    pub fn at(&self, place: usize) -> Option<(&VirtioNetHeader, &[u8])> {
        let built = self.built.iter().find(|built| built.first == place)?;
        Some((&built.offload, self.buffer.get(built.bytes.clone()).unwrap_or_default()))
    }

    /// Whether nothing was merged.
    pub fn is_empty(&self) -> bool {
        self.built.is_empty()
    }

    /// Whether the frame joined another.
    fn sort_in(&mut self, place: usize, frame: &Frame<'_>) -> bool {
        let (Outcome::Forward(Egress::Interface(interface)), Some(flow)) = (frame.outcome, frame.flow) else {
            return false;
        };
        let Some(head) = self.heads.get_mut(head_of(flow)) else { return false };
        let number = self.batches.len() as u16 + 1;
        let last = usize::from(*head).checked_sub(1).and_then(|last| self.batches.get_mut(last));
        let last = last.filter(|batch| batch.flow == flow && batch.interface == interface);
        let Some(datagram) = datagram(frame) else {
            // What cannot be merged must not be overtaken by what comes later.
            if let Some(batch) = last {
                batch.closed = true;
            }
            return false;
        };
        let payload = datagram.payload;
        if let Some(batch) = last
            && batch.takes(&datagram)
        {
            if let Some(next) = self.next.get_mut(batch.last) {
                *next = Some(place);
            }
            batch.last = place;
            batch.datagrams += 1;
            batch.bytes += payload;
            batch.closed = payload < batch.payload;
            return true;
        }
        *head = number;
        self.batches.push(GsoBatch {
            flow,
            interface,
            first: place,
            last: place,
            datagrams: 1,
            bytes: payload,
            payload,
            closed: payload == 0,
            headers: datagram.headers,
            same: datagram.same,
            id: datagram.id,
        });
        false
    }

    fn build(&mut self, batch: &GsoBatch, frames: &mut [Frame<'_>]) {
        let start = self.buffer.len();
        let mut place = Some(batch.first);
        while let Some(at) = place {
            let Some(frame) = frames.get_mut(at) else { break };
            let skip = if at == batch.first { 0 } else { ETHERNET_BYTES + batch.headers };
            let end = (ETHERNET_BYTES + packet_bytes(frame.packet())).min(frame.bytes.len());
            self.buffer.extend_from_slice(frame.bytes.get(skip..end).unwrap_or_default());
            if at != batch.first {
                frame.outcome = Outcome::Consumed;
            }
            place = self.next.get(at).copied().flatten();
        }
        let range = start..self.buffer.len();
        let packet = self.buffer.get_mut(start + ETHERNET_BYTES..).unwrap_or_default();
        finish(packet, batch.headers);
        let ip_bytes = (batch.headers - UDP_BYTES) as u16;
        let offload = VirtioNetHeader {
            flags: NEEDS_CSUM,
            gso_type: GSO_UDP_L4,
            hdr_len: batch.headers as u16,
            gso_size: batch.payload as u16,
            csum_start: ip_bytes,
            csum_offset: 6,
        };
        self.built.push(Built { first: batch.first, bytes: range, offload });
    }
}

/// Where the GSO batch of a flow is remembered.
fn head_of((flow, direction): (FlowId, Direction)) -> usize {
    let number = flow.number().wrapping_mul(0x9e37_79b1) ^ direction as u32;
    (number >> 22) as usize ^ (number as usize & 1)
}

impl GsoBatch {
    fn takes(&self, datagram: &Datagram) -> bool {
        let Datagram { headers, payload, same, id } = *datagram;
        let next_id = self.id.map(|first| first.wrapping_add(self.datagrams as u16));
        !self.closed
            && (self.headers, self.same, next_id) == (headers, same, id)
            && payload <= self.payload
            && payload > 0
            && self.datagrams < DATAGRAMS_MAX
            && self.bytes + payload <= BATCH_BYTES_MAX
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

/// A datagram that may be merged: whole, checked or to be checked, with the header layout that the kernel writes again for
/// each segment.
fn datagram(frame: &Frame<'_>) -> Option<Datagram> {
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
    let (same, id) = match packet {
        [0x45, class, _, _, a, b, flags, offset, ttl, ..] => {
            let word = u16::from_be_bytes([*flags, *offset]);
            let id = (word & IPV4_DONT_FRAGMENT == 0).then(|| u16::from_be_bytes([*a, *b]));
            ([0x45, *class, *flags, 0, *ttl], id)
        }
        [a, b, c, d, _, _, _, hops, ..] => ([*a, *b, *c, *d, *hops], None),
        _ => return None,
    };
    let whole = ETHERNET_BYTES + headers + payload <= frame.bytes.len();
    whole.then_some(Datagram { headers, payload, same, id })
}

/// Lengths and checksums of the headers for the whole GSO batch.
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::net::SocketAddr;

    use packet::attachment::Ingress;
    use packet::flow::FlowKey;
    use services::flow::{FlowTable, Record};
    use services::random::Random;

    use super::*;

    /// A flow, and a frame for each of its packets.
    fn flow(src: &str, dst: &str) -> (FlowId, FlowKey) {
        let [src, dst] = [src, dst].map(|text| text.parse::<SocketAddr>().unwrap());
        let key = FlowKey {
            src: src.ip(),
            dst: dst.ip(),
            src_port: src.port(),
            dst_port: dst.port(),
            protocol: PROTOCOL_UDP,
        };
        let mut table = FlowTable::new(&mut Random::of_number(7), 16);
        (table.insert((&key, 0), (&key.reversed(), 0), Record::default()).unwrap(), key)
    }

    /// A datagram of 100 bytes whose IP header is changed by `change`.
    fn datagram_of(key: &FlowKey, change: impl Fn(&mut [u8])) -> Vec<u8> {
        let mut packet = match (key.src, key.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let header = [0x45, 0, 0, 128, 0, 1, 0x40, 0, 63, PROTOCOL_UDP, 0, 0];
                [&header[..], &src.octets(), &dst.octets()].concat()
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let header = [0x60, 0, 0, 0, 0, 108, PROTOCOL_UDP, 63];
                [&header[..], &src.octets(), &dst.octets()].concat()
            }
            _ => unreachable!(),
        };
        change(&mut packet);
        packet.extend(key.src_port.to_be_bytes());
        packet.extend(key.dst_port.to_be_bytes());
        packet.extend([0, 108, 1, 2]);
        packet.extend([7; 100]);
        [&[0; ETHERNET_BYTES][..], &packet].concat()
    }

    /// How many super-packets or single datagrams leave.
    fn leaving(id: FlowId, packets: &mut [Vec<u8>]) -> usize {
        let checked = VirtioNetHeader { flags: DATA_VALID, ..VirtioNetHeader::default() };
        let mut frames: Vec<Frame<'_>> = packets
            .iter_mut()
            .map(|bytes| {
                let mut frame = Frame::new(Ingress::Host, checked, bytes);
                frame.outcome = Outcome::Forward(Egress::Interface(InterfaceId(1)));
                frame.flow = Some((id, Direction::Original));
                frame
            })
            .collect();
        GsoBatches::default().merge(&mut frames);
        frames.iter().filter(|frame| frame.outcome != Outcome::Consumed).count()
    }

    /// Of two datagrams that differ in a byte of the IP header each keeps its own.
    #[test]
    fn datagrams_with_other_ip_headers_leave_for_themselves() {
        let (id, v4) = flow("10.0.0.9:5000", "198.51.100.7:53");
        let (_, v6) = flow("[fd00::9]:5000", "[2001:db8:7::7]:53");
        let both = |key: &FlowKey, at: usize, value: u8| {
            let plain = || datagram_of(key, |_| ());
            let other = datagram_of(key, |header| header[at] = value);
            leaving(id, &mut [plain(), plain(), other, plain()])
        };
        // Congestion experienced, DSCP, "don't fragment", TTL.
        for (at, value) in [(1, 3), (1, 0xb8), (6, 0), (8, 62)] {
            assert_eq!(both(&v4, at, value), 3, "IPv4, byte {at}");
        }
        for (at, value) in [(1, 0x30), (0, 0x6b), (1, 5), (3, 9), (7, 62)] {
            assert_eq!(both(&v6, at, value), 3, "IPv6, byte {at}");
        }
        // An identification that nobody looks at.
        assert_eq!((both(&v4, 5, 77), both(&v4, 1, 0), both(&v6, 1, 0)), (1, 1, 1));
    }

    /// Whoever segments counts identifications up: others, of what may be cut on its way, are not merged.
    #[test]
    fn identifications_stay_where_they_mean_something() {
        let (id, key) = flow("10.0.0.9:5000", "198.51.100.7:53");
        let with_ids = |ids: &[u8]| {
            let one = |number: &u8| datagram_of(&key, |header| (header[5], header[6]) = (*number, 0));
            leaving(id, &mut ids.iter().map(one).collect::<Vec<_>>())
        };
        assert_eq!(with_ids(&[5, 6, 7, 8]), 1);
        assert_eq!(with_ids(&[5, 6, 8, 9]), 2);
        assert_eq!(with_ids(&[5, 5]), 2);
    }
}
