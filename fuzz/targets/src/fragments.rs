//! Packets in pieces, from anybody: both halves of the gateway's fragment handling, joined as one core joins them.

use std::collections::BTreeMap;

use packet::attachment::{Ingress, InterfaceId};
use packet::{DropReason, IpHeader};
use services::fragment::{
    Action, FRAGMENTS_PER_PACKET_MAX, FragmentLimits, FragmentTable, Outcome, Released, Rendezvous, Told,
    fragment_out,
};
use services::hash::SecretState;

use self::steps::{BRIDGE, MORE, RAW, SIX, STEP_BYTES, TIGHT};

/// How long the fragments of a packet may take here, ns.
const TIMEOUT_NS: u64 = 100;

/// How the input is read: one byte of flags ([`TIGHT`], [`BRIDGE`]), then steps.
pub mod steps {
    /// Bytes of a step: first byte, offset in units of 8, whether it is far out, length, contents, time.
    pub const STEP_BYTES: usize = 6;
    /// Flag: little memory.
    pub const TIGHT: u8 = 1;
    /// Flag: fragments are bridged.
    pub const BRIDGE: u8 = 2;
    /// First byte of a step: more fragments follow.
    pub const MORE: u8 = 16;
    /// First byte of a step: IPv6.
    pub const SIX: u8 = 32;
    /// First byte of a step: behind it comes a packet of as many bytes as the second byte says.
    pub const RAW: u8 = 128;
}

/// One fragment. The first byte: identification (bits 0 and 1), source (2 and 3), [`MORE`], [`SIX`], [`RAW`].
struct Step {
    id: u8,
    source: u8,
    more: bool,
    six: bool,
    offset: usize,
    payload: Vec<u8>,
    wait_ns: u64,
}

impl Step {
    fn read(bytes: [u8; STEP_BYTES], tight: bool) -> Step {
        let [first, units, far, length, contents, wait] = bytes;
        // The far end is within reach, but mostly fragments meet near the beginning.
        let offset = (usize::from(units) + if far > 250 { 7_936 } else { 0 }) * 8;
        // Where memory is the question all contents agree, so that any whole packet can be checked.
        let contents = if tight { 0 } else { contents & 1 };
        let payload = (0..usize::from(length)).map(|at| byte_at(offset + at) ^ contents).collect();
        Step {
            id: first & 3,
            source: (first >> 2) & 3,
            more: first & MORE != 0,
            six: first & SIX != 0,
            offset,
            payload,
            wait_ns: if wait > 240 { u64::from(wait - 240) * 8 } else { 0 },
        }
    }

    fn packet(&self) -> Vec<u8> {
        self.build(Some((self.offset, self.more)), &self.payload)
    }

    /// A fragment, or the whole packet.
    fn build(&self, place: Option<(usize, bool)>, payload: &[u8]) -> Vec<u8> {
        let mut packet = Vec::new();
        if self.six {
            let (next, fragment) = match place {
                Some((offset, more)) => {
                    let [high, low] = (offset as u16 | u16::from(more)).to_be_bytes();
                    (44, vec![17, 0, high, low, 0, 1, 0, self.id])
                }
                None => (17, Vec::new()),
            };
            packet.extend([0x60, 0, 0, 0]);
            packet.extend(((fragment.len() + payload.len()) as u16).to_be_bytes());
            packet.extend([next, 64, 0x20, 1, 0x0d, 0xb8, self.source]);
            packet.resize(40, 1);
            packet.extend(fragment);
        } else {
            let word = place.map_or(0, |(offset, more)| (offset / 8) as u16 | if more { 0x2000 } else { 0 });
            packet.extend([0x45, 0]);
            packet.extend(((20 + payload.len()) as u16).to_be_bytes());
            packet.extend([1, self.id]);
            packet.extend(word.to_be_bytes());
            packet.extend([64, 17, 0, 0, 10, 0, 0, self.source, 192, 0, 2, 1]);
            let sum = packet.chunks(2).fold(0, |sum, two| sum + u32::from(two[0]) * 256 + u32::from(two[1]));
            let sum = (sum & 0xffff) + (sum >> 16);
            packet[10..12].copy_from_slice(&(!(((sum & 0xffff) + (sum >> 16)) as u16)).to_be_bytes());
        }
        packet.extend(payload);
        packet
    }

    /// Fragments that must not be taken, by themselves.
    fn is_invalid(&self) -> bool {
        let bytes = self.payload.len();
        let most = if self.six { 65_535 } else { 65_515 };
        bytes == 0
            || (self.more && !bytes.is_multiple_of(8))
            || self.offset + bytes > most
            || (self.offset == 0 && bytes < 8)
    }

    fn is_whole(&self) -> bool {
        self.offset == 0 && !self.more
    }
}

fn byte_at(place: usize) -> u8 {
    (place as u8).wrapping_mul(29) ^ (place >> 8) as u8
}

/// The reference: every fragment of a packet that came, asked the simplest questions.
#[derive(Default)]
struct Model {
    since_ns: u64,
    arrived: u16,
    /// Offset, payload, more; in the order of arrival.
    fragments: Vec<(usize, Vec<u8>, bool)>,
    refused: Option<DropReason>,
}

/// Packet that must come out.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    result: Result<Vec<Vec<u8>>, DropReason>,
    done: bool,
}

impl Model {
    fn push(&mut self, now_ns: u64, step: &Step, bridge: bool) -> Answer {
        let answer = |result, done| Answer { result, done };
        if let Some(reason) = self.refused {
            return answer(Err(reason), false);
        }
        self.arrived += 1;
        let new = (step.offset, step.payload.clone(), step.more);
        let reason = if self.arrived > FRAGMENTS_PER_PACKET_MAX {
            Some(DropReason::FragmentsFull)
        } else if self.fragments.contains(&new) {
            return answer(Ok(Vec::new()), false);
        } else {
            self.contradicts(step).then_some(DropReason::FragmentOverlap)
        };
        if let Some(reason) = reason {
            (self.refused, self.since_ns) = (Some(reason), now_ns);
            return answer(Err(reason), false);
        }
        self.fragments.push(new);
        let whole = self.whole();
        let done = whole.is_some();
        let known = self.fragments.iter().any(|(offset, ..)| *offset == 0);
        let out = match whole {
            _ if bridge && known => {
                let all =
                    self.fragments.iter().map(|(at, payload, more)| step.build(Some((*at, *more)), payload));
                // When the header comes, all; later only the new one.
                let skip = if step.offset == 0 { 0 } else { self.fragments.len() - 1 };
                all.skip(skip).collect()
            }
            Some(payload) if !bridge => vec![step.build(None, &payload)],
            _ => Vec::new(),
        };
        answer(Ok(out), done)
    }

    fn contradicts(&self, step: &Step) -> bool {
        let end = step.offset + step.payload.len();
        self.fragments.iter().any(|(offset, payload, more)| {
            let other = offset + payload.len();
            let overlaps = *offset < end && step.offset < other;
            overlaps || (!more && (!step.more || end > other)) || (!step.more && other > end)
        })
    }

    fn whole(&self) -> Option<Vec<u8>> {
        let mut sorted: Vec<_> = self.fragments.iter().collect();
        sorted.sort();
        let mut whole = Vec::new();
        for (offset, payload, _) in &sorted {
            if *offset != whole.len() {
                return None;
            }
            whole.extend(payload);
        }
        sorted.last().filter(|(.., more)| !more).map(|_| whole)
    }
}

/// Both halves, and how many fragments went where.
struct Halves {
    rendezvous: Rendezvous,
    table: FragmentTable,
    bytes_max: usize,
    action: Action,
    tight: bool,
    taken: u64,
    released: u64,
    kept: u64,
    passed: u64,
}

impl Halves {
    fn new(flags: u8) -> Halves {
        let tight = flags & TIGHT != 0;
        let bytes_max = if tight { 12_000 } else { 256 << 20 };
        let packets_per_source_max = if tight { 2 } else { 1_000 };
        let limits = FragmentLimits { bytes_max, packets_per_source_max, timeout_ns: TIMEOUT_NS };
        Halves {
            rendezvous: Rendezvous::new(limits, SecretState::of_number(1)),
            table: FragmentTable::new(limits, SecretState::of_number(2)),
            bytes_max,
            action: if flags & BRIDGE != 0 { Action::Bridge } else { Action::Assemble },
            tight,
            taken: 0,
            released: 0,
            kept: 0,
            passed: 0,
        }
    }

    /// Takes a packet; what comes out at the far end of the owner.
    fn push(&mut self, now_ns: u64, packet: &[u8], tenant: u16) -> Result<Vec<Vec<u8>>, DropReason> {
        let header = IpHeader::parse(packet)?;
        let mut fragments = Vec::new();
        let mut out = |released: Released<'_>| {
            fragments.push((released.id, released.key, released.packet.to_vec(), released.first));
        };
        let result = self.rendezvous.push(
            now_ns,
            packet,
            &header,
            tenant,
            Ingress::Interface(InterfaceId(1)),
            &mut out,
        );
        assert!(self.rendezvous.bytes() <= self.bytes_max, "the rendezvous holds too much");
        result?;
        self.taken += 1;
        self.released += fragments.len() as u64;
        let mut packets = Vec::new();
        for (id, key, fragment, first) in fragments {
            match id {
                Some(id) => {
                    let told = Told { id, key, action: self.action };
                    let _ = first.then(|| self.table.tell(now_ns, &told));
                    packets.extend(self.own(now_ns, &told, fragment)?);
                }
                None => packets.push(fragment),
            }
            assert!(self.table.bytes() <= self.bytes_max, "the owner holds too much");
        }
        Ok(packets)
    }

    fn own(&mut self, now_ns: u64, told: &Told, fragment: Vec<u8>) -> Result<Option<Vec<u8>>, DropReason> {
        let header = IpHeader::parse(&fragment).expect("it was read before");
        let outcome = match self.table.push(now_ns, &told.id, &fragment, &header) {
            Ok(outcome) => outcome,
            // Another source's packet took its place.
            Err(_) if self.tight => return Ok(None),
            Err(reason) => return Err(reason),
        };
        self.kept += 1;
        match outcome {
            Outcome::Held | Outcome::Copy => Ok(None),
            Outcome::Bridge(key) => {
                assert_eq!(key, told.key);
                self.passed += 1;
                Ok(Some(fragment))
            }
            Outcome::Whole(whole) => {
                assert_eq!(whole.key, told.key);
                self.passed += u64::from(whole.fragments);
                cut_again(whole.packet, whole.id, usize::from(whole.longest));
                Ok(Some(whole.packet.to_vec()))
            }
        }
    }

    /// Everything that was taken is somewhere when nothing is held any more.
    fn settle(mut self) {
        self.rendezvous.tick(u64::MAX);
        self.table.tick(u64::MAX);
        assert_eq!((self.rendezvous.bytes(), self.rendezvous.packets()), (0, 0));
        assert_eq!((self.table.bytes(), self.table.packets()), (0, 0));
        let late = self.rendezvous.late_drops().total() + self.rendezvous.stats().copies;
        assert_eq!(self.taken, self.released + late, "the rendezvous lost count");
        let late = self.table.late_drops().total() + self.table.stats().copies;
        assert_eq!(self.kept, self.passed + late, "the owner lost count");
    }
}

/// A packet that was put together is cut to the size it came in, and loses nothing.
fn cut_again(packet: &[u8], id: u32, mtu: usize) {
    let header = IpHeader::parse(packet).expect("what was put together is a packet");
    assert_eq!(header.total_bytes, packet.len());
    let mut payload = Vec::new();
    let mut check = |fragment: &[u8]| {
        let header = IpHeader::parse(fragment).expect("a fragment is a packet");
        assert!(fragment.len() <= mtu && header.total_bytes == fragment.len());
        let place = header.fragment.map_or(0, |fragment| usize::from(fragment.offset));
        assert_eq!(place, payload.len());
        payload.extend_from_slice(header.payload(fragment));
    };
    if fragment_out(packet, mtu, Some(id), &mut Vec::new(), &mut check).is_ok() {
        assert!(packet.ends_with(&payload) && payload.len() >= header.payload_bytes());
    }
}

/// Any sequence of fragments: nothing panics, memory stays within its limit, every fragment is accounted for, and what
/// is put together (or bridged) equals what the simplest reassembler says.
pub fn fragments(data: &[u8]) {
    let Some((flags, mut rest)) = data.split_first() else { return };
    let mut halves = Halves::new(*flags);
    let mut models: BTreeMap<(bool, u8, u8), Model> = BTreeMap::new();
    let mut now_ns = 0;
    while let Some((bytes, more)) = rest.split_first_chunk::<STEP_BYTES>() {
        rest = more;
        if bytes[0] & RAW != 0 {
            let (packet, more) = rest.split_at(usize::from(bytes[1]).min(rest.len()));
            rest = more;
            // A tenant of its own: it does not meet the others.
            let _ = halves.push(now_ns, packet, 1);
            continue;
        }
        let step = Step::read(*bytes, halves.tight);
        now_ns += step.wait_ns;
        let result = halves.push(now_ns, &step.packet(), 0);
        if step.is_whole() {
            assert_eq!(result, Ok(vec![step.packet()]), "it is no fragment");
        } else if step.is_invalid() {
            assert_eq!(result, Err(DropReason::FragmentInvalid));
        } else if halves.tight {
            check_tight(&step, halves.action, result.unwrap_or_default());
        } else {
            let key = (step.six, step.source, step.id);
            let old = models.remove(&key).filter(|model| model.since_ns + TIMEOUT_NS > now_ns);
            let mut model = old.unwrap_or(Model { since_ns: now_ns, ..Model::default() });
            let answer = model.push(now_ns, &step, halves.action == Action::Bridge);
            assert_eq!(result, answer.result);
            if !answer.done {
                models.insert(key, model);
            }
        }
    }
    halves.settle();
}

/// Where packets may be pushed out by others, what does come out is right all the same.
fn check_tight(step: &Step, action: Action, packets: Vec<Vec<u8>>) {
    for packet in packets {
        let header = IpHeader::parse(&packet).expect("what comes out is a packet");
        assert_eq!(header.is_fragmented(), action == Action::Bridge);
        let offset = header.fragment.map_or(0, |fragment| usize::from(fragment.offset));
        let payload = header.payload(&packet);
        assert!(payload.iter().enumerate().all(|(at, byte)| *byte == byte_at(offset + at)));
        if action == Action::Assemble {
            assert_eq!(packet, step.build(None, payload));
        }
    }
}
