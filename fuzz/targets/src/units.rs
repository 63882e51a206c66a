//! Datagrams between the units of a cluster, from whoever reaches their port.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use cluster::encapsulation::fragment::{
    FRAGMENT_BYTES_MIN, FRAGMENT_HEAD_BYTES, FRAGMENTS_MAX, FRAMES_MAX, Reassembler, ReassemblyLimits, Split,
    is_fragment,
};
use cluster::encapsulation::outer::{ENTROPY_PORT_MIN, OuterChecksum, entropy_port, parse_outer};
use cluster::encapsulation::{ENCAPSULATION_BYTES_MAX, ETHERNET_BYTES, Encapsulation, L1_BYTES, L2_BYTES};
use packet::DropReason;

use self::steps::{OTHER_CONTENTS, OTHER_TARGET, RAW, STEP_BYTES, TIGHT};

/// How long the fragments of a frame may take here, ns.
const TIMEOUT_NS: u64 = 100;

/// How the input of [`reassembly`] is read: one byte of flags ([`TIGHT`]), then steps.
pub mod steps {
    /// Bytes of a step: first byte, offset in units of 64, length in units of 32, total in units of 64, variant, time.
    pub const STEP_BYTES: usize = 6;
    /// Flag: little memory.
    pub const TIGHT: u8 = 1;
    /// First byte of a step: behind it comes a datagram of as many bytes as the second byte says.
    pub const RAW: u8 = 128;
    /// Variant of a step: bytes that are not those of its place.
    pub const OTHER_CONTENTS: u8 = 1;
    /// Variant of a step: L1 names another target.
    pub const OTHER_TARGET: u8 = 2;
}

/// A UDP payload, or an IP packet with one: what is accepted is written back with the same meaning, the frame is what stands
/// behind the headers, and headers are never longer than the room for them.
pub fn encapsulation(data: &[u8]) {
    payload(data);
    assert!(entropy_port(data) >= ENTROPY_PORT_MIN);
    let Ok(Some((outer, inner))) = parse_outer(data) else { return };
    assert!(outer.bytes() + inner.len() <= data.len());
    payload(inner);
    let mut packet = [vec![0; outer.bytes()], inner.to_vec()].concat();
    for checksum in [OuterChecksum::Usual, OuterChecksum::Zero, OuterChecksum::Partial] {
        assert_eq!(outer.write(&mut packet, checksum), outer.bytes());
        assert_eq!(parse_outer(&packet), Ok(Some((outer, inner))));
    }
}

fn payload(datagram: &[u8]) {
    let Ok((encapsulation, frame)) = Encapsulation::parse(datagram) else { return };
    assert!(frame.len() >= ETHERNET_BYTES && datagram.ends_with(frame) && !is_fragment(datagram));
    assert!(encapsulation.ttl > 0 && encapsulation.dispatcher < 4_096 && encapsulation.table < 16);
    let mut again = vec![0; encapsulation.bytes()];
    assert!(again.len() <= ENCAPSULATION_BYTES_MAX && again.len() + frame.len() <= datagram.len());
    assert_eq!(encapsulation.write(&mut again), again.len());
    again.extend(frame);
    assert_eq!(Encapsulation::parse(&again), Ok((encapsulation, frame)));
    let mut visited = encapsulation;
    visited.record(7);
    assert_eq!(visited.bytes(), encapsulation.bytes(), "a packet grows on its way");
    split(&again);
}

/// Splits it, and puts it together again.
fn split(datagram: &[u8]) {
    let Some(split) = Split::new(datagram, 5, L1_BYTES + FRAGMENT_HEAD_BYTES + FRAGMENT_BYTES_MIN) else {
        return;
    };
    let mut reassembler = Reassembler::new(ReassemblyLimits::default());
    let mut room = [0; 1_000];
    for index in 0..split.fragments() {
        let bytes = split.write(index, &mut room);
        let whole = reassembler.push(0, Ipv4Addr::LOCALHOST.into(), &room[..bytes]);
        let is_last = index + 1 == split.fragments();
        assert_eq!(whole, Ok(is_last.then_some(datagram)));
    }
}

/// One fragment. The first byte: identification (bits 0 and 1), sender (2 and 3), [`RAW`].
struct Step {
    id: u8,
    sender: u8,
    from: usize,
    total: usize,
    target: u8,
    body: Vec<u8>,
    wait_ns: u64,
}

impl Step {
    fn read(bytes: [u8; STEP_BYTES], is_tight: bool) -> Step {
        let [first, from, length, total, variant, wait] = bytes;
        let from = usize::from(from) * 64;
        // Where memory is the question all contents agree, so that any whole frame can be checked.
        let contents = if is_tight { 0 } else { variant & OTHER_CONTENTS };
        let place = |at| byte_at(from + at) ^ contents;
        Step {
            id: first & 3,
            sender: first >> 2 & 3,
            from,
            total: usize::from(total) * 64,
            target: variant & OTHER_TARGET,
            body: (0..usize::from(length) * 32).map(place).collect(),
            wait_ns: if wait > 240 { u64::from(wait - 240) * 8 } else { 0 },
        }
    }

    fn l1(&self, is_fragment: bool) -> [u8; L1_BYTES] {
        [if is_fragment { 0x60 } else { 0x40 }, 1, 0, self.target, 0, 0]
    }

    fn datagram(&self) -> Vec<u8> {
        let (from, total) = (self.from as u16, self.total as u16);
        let head = [[0, 0], [0, self.id], from.to_be_bytes(), total.to_be_bytes()].concat();
        [&self.l1(true)[..], &head, &self.body].concat()
    }

    fn sender(&self) -> IpAddr {
        Ipv4Addr::new(10, 0, 0, self.sender).into()
    }

    /// Fragments that must not be taken, by themselves.
    fn is_invalid(&self) -> bool {
        let (bytes, end) = (self.body.len(), self.from + self.body.len());
        let is_small = end < self.total && bytes < FRAGMENT_BYTES_MIN;
        bytes == 0 || end > self.total || is_small || self.total < L2_BYTES + ETHERNET_BYTES
    }
}

fn byte_at(place: usize) -> u8 {
    (place as u8).wrapping_mul(29) ^ (place >> 8) as u8
}

/// The reference: every fragment of a frame that came, asked the simplest questions.
struct Model {
    since_ns: u64,
    target: u8,
    total: usize,
    parts: Vec<(usize, Vec<u8>)>,
}

impl Model {
    fn push(&mut self, step: &Step) -> Result<Option<Vec<u8>>, DropReason> {
        if (self.target, self.total) != (step.target, step.total) {
            return Err(DropReason::BusMalformed);
        }
        let new = (step.from, step.body.clone());
        if self.parts.contains(&new) {
            return Ok(None);
        }
        let end = step.from + step.body.len();
        if self.parts.iter().any(|(from, body)| *from < end && step.from < from + body.len()) {
            return Err(DropReason::PieceOverlap);
        }
        if self.parts.len() == FRAGMENTS_MAX {
            return Err(DropReason::ReassemblyFull);
        }
        self.parts.push(new);
        self.parts.sort();
        let whole: Vec<u8> = self.parts.iter().flat_map(|(_, body)| body.clone()).collect();
        Ok((whole.len() == self.total).then(|| [&step.l1(false)[..], &whole].concat()))
    }
}

/// Any sequence of fragments: nothing panics, frames and memory stay within their limits (and with them the cost of each
/// fragment, which is a look at every frame that waits), every fragment is accounted for, and what is put together equals what
/// the simplest reassembler says.
pub fn reassembly(data: &[u8]) {
    let Some((flags, mut rest)) = data.split_first() else { return };
    let is_tight = flags & TIGHT != 0;
    let limits = limits(is_tight);
    let mut reassembler = Reassembler::new(limits);
    let mut models: BTreeMap<(u8, u8), Model> = BTreeMap::new();
    let (mut now_ns, mut taken) = (0, 0);
    while let Some((bytes, more)) = rest.split_first_chunk::<STEP_BYTES>() {
        rest = more;
        if bytes[0] & RAW != 0 {
            let (datagram, more) = rest.split_at(usize::from(bytes[1]).min(rest.len()));
            rest = more;
            // A sender of its own: it does not meet the others.
            taken += u64::from(reassembler.push(now_ns, Ipv4Addr::LOCALHOST.into(), datagram).is_ok());
            continue;
        }
        let step = Step::read(*bytes, is_tight);
        now_ns += step.wait_ns;
        let result = reassembler.push(now_ns, step.sender(), &step.datagram());
        let result = result.map(|whole| whole.map(<[u8]>::to_vec));
        taken += u64::from(result.is_ok());
        if step.is_invalid() {
            assert_eq!(result, Err(DropReason::BusMalformed));
        } else if is_tight {
            check_tight(&step, result.unwrap_or_default());
        } else {
            assert_eq!(result, expected(&mut models, now_ns, &step));
        }
        assert!(reassembler.bytes() <= limits.bytes_max && reassembler.frames() <= limits.frames_max);
    }
    reassembler.tick(u64::MAX);
    assert_eq!((reassembler.bytes(), reassembler.frames(), reassembler.next_deadline_ns()), (0, 0, None));
    let stats = reassembler.stats();
    assert_eq!(taken, stats.fragments + stats.copies + reassembler.late_drops().total(), "it lost count");
}

fn limits(is_tight: bool) -> ReassemblyLimits {
    let limits = ReassemblyLimits { timeout_ns: TIMEOUT_NS, ..ReassemblyLimits::default() };
    assert_eq!(limits.frames_max, FRAMES_MAX);
    if !is_tight {
        return limits;
    }
    ReassemblyLimits {
        frames_max: 5,
        bytes_max: 40_000,
        frames_per_sender_max: 2,
        bytes_per_sender_max: 20_000,
        ..limits
    }
}

fn expected(
    models: &mut BTreeMap<(u8, u8), Model>,
    now_ns: u64,
    step: &Step,
) -> Result<Option<Vec<u8>>, DropReason> {
    let key = (step.sender, step.id);
    let old = models.remove(&key).filter(|model| model.since_ns + TIMEOUT_NS > now_ns);
    let Step { target, total, .. } = *step;
    let mut model = old.unwrap_or(Model { since_ns: now_ns, target, total, parts: Vec::new() });
    let result = model.push(step);
    if result == Ok(None) {
        models.insert(key, model);
    }
    result
}

/// Where frames may be pushed out by others, what does come out is right all the same.
fn check_tight(step: &Step, whole: Option<Vec<u8>>) {
    let Some(whole) = whole else { return };
    let bytes = (0..step.total).map(byte_at);
    assert!(whole.iter().copied().eq(step.l1(false).into_iter().chain(bytes)));
}
