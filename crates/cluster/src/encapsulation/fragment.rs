//! One frame in several datagrams: fragmentation at the UDP layer (row D11), for networks between units that cannot carry
//! the largest frame. An option: without it a packet that is too long is answered with "too big".
//!
//! Each datagram has L1 (with its fragment bit) and a head that says which bytes it has of what follows L1 in the whole: the
//! first one so has L2 and the beginning of the frame, the others the rest. [`Split`] writes them, [`Reassembler`] puts them
//! together again.
//!
//! Memory of the reassembler is limited in frames and bytes, for all and for each sender, and in time. A sender that exceeds its
//! part loses its own oldest frame, all together the oldest of all. A fragment costs a look at every frame that waits, of
//! which there are at most [`FRAMES_MAX`].

#[cfg(test)]
mod tests;

use std::net::IpAddr;

use packet::{DropCounters, DropReason, array_at, put_u16, put_u32};

use super::{ETHERNET_BYTES, L1, L1_BYTES, L2_BYTES};

/// Length of the head between L1 and the fragment's bytes.
pub const FRAGMENT_HEAD_BYTES: usize = 8;

/// Most fragments of a frame.
pub const FRAGMENTS_MAX: usize = 16;

/// Least bytes of a fragment that is not the last of its frame: no sender needs smaller ones, and who sends them wants to fill
/// memory.
pub const FRAGMENT_BYTES_MIN: usize = 256;

/// Most bytes behind L1 of a frame in fragments: more than jumbo frames have, and 16 KiB with L1. Every buffer is used again
/// therefore, and nobody can have much memory made ready by a small datagram.
pub const TOTAL_BYTES_MAX: u16 = (16 << 10) - L1_BYTES as u16;

/// Least of them: L2 and an Ethernet header.
const TOTAL_BYTES_MIN: u16 = (L2_BYTES + ETHERNET_BYTES) as u16;

/// Most frames in fragments at once.
pub const FRAMES_MAX: usize = 256;

/// Unused buffers kept.
const SPARE_MAX: usize = 32;

/// Whether a datagram is a fragment, so that [`Reassembler::push`] reads it and not
/// [`super::Encapsulation::parse`]. Versions are looked at there.
#[inline]
#[must_use]
pub fn is_fragment(datagram: &[u8]) -> bool {
    datagram.first().is_some_and(|first| first & super::FRAGMENT_BIT != 0)
}

/// A whole datagram that is sent in fragments.
#[derive(Clone, Copy, Debug)]
pub struct Split<'a> {
    l1: L1,
    rest: &'a [u8],
    total: u16,
    id: u32,
    each: usize,
}

impl<'a> Split<'a> {
    /// Splits a UDP payload, L1 and L2 and frame, into payloads of at most `payload_bytes_max`. `id` is another one for every
    /// frame of this sender within the timeout. `None`: it is no such payload, is a fragment, is longer than [`TOTAL_BYTES_MAX`], or
    /// would be in more than [`FRAGMENTS_MAX`] fragments or in too small ones.
    #[must_use]
    pub fn new(datagram: &'a [u8], id: u32, payload_bytes_max: usize) -> Option<Self> {
        let l1 = L1::parse(datagram).ok().filter(|l1| !l1.fragment)?;
        let rest = datagram.get(L1_BYTES..)?;
        let total = u16::try_from(rest.len()).ok().filter(|total| *total <= TOTAL_BYTES_MAX)?;
        let each = payload_bytes_max.checked_sub(L1_BYTES + FRAGMENT_HEAD_BYTES)?;
        let is_possible = total >= TOTAL_BYTES_MIN && each >= FRAGMENT_BYTES_MIN;
        let split = Self { l1: L1 { fragment: true, ..l1 }, rest, total, id, each };
        (is_possible && split.fragments() <= FRAGMENTS_MAX).then_some(split)
    }

    /// How many datagrams it takes.
    #[must_use]
    pub const fn fragments(&self) -> usize {
        self.rest.len().div_ceil(self.each)
    }

    /// Writes the UDP payload of a datagram, from 0, to the start of `room`; returns its length. 0, and nothing is written:
    /// `room` is shorter, or there is no such fragment.
    pub fn write(&self, index: usize, room: &mut [u8]) -> usize {
        let offset = index.saturating_mul(self.each);
        let Some(rest) = self.rest.get(offset..).filter(|rest| !rest.is_empty()) else { return 0 };
        let body = rest.get(..self.each).unwrap_or(rest);
        let bytes = L1_BYTES + FRAGMENT_HEAD_BYTES + body.len();
        let Some(room) = room.get_mut(..bytes) else { return 0 };
        self.l1.write(room);
        put_u32(room, L1_BYTES, self.id);
        put_u16(room, L1_BYTES + 4, offset as u16);
        put_u16(room, L1_BYTES + 6, self.total);
        super::put(room, L1_BYTES + FRAGMENT_HEAD_BYTES, body);
        bytes
    }
}

/// One fragment, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fragment<'a> {
    l1: L1,
    id: u32,
    from: u16,
    to: u16,
    total: u16,
    body: &'a [u8],
}

impl<'a> Fragment<'a> {
    fn parse(datagram: &'a [u8]) -> Result<Self, DropReason> {
        let l1 = L1::parse(datagram)?;
        let Some(head) = array_at::<FRAGMENT_HEAD_BYTES>(datagram, L1_BYTES) else {
            return Err(DropReason::BusTooShort);
        };
        let [i0, i1, i2, i3, o0, o1, t0, t1] = head;
        let (from, total) = (u16::from_be_bytes([o0, o1]), u16::from_be_bytes([t0, t1]));
        let body = datagram.get(L1_BYTES + FRAGMENT_HEAD_BYTES..).unwrap_or_default();
        let to = u16::try_from(usize::from(from) + body.len()).ok().filter(|to| *to <= total && *to > from);
        let to = to.ok_or(DropReason::BusMalformed)?;
        let is_small = to < total && body.len() < FRAGMENT_BYTES_MIN;
        let is_possible = (TOTAL_BYTES_MIN..=TOTAL_BYTES_MAX).contains(&total);
        if !l1.fragment || is_small || !is_possible {
            return Err(DropReason::BusMalformed);
        }
        Ok(Self { l1, id: u32::from_be_bytes([i0, i1, i2, i3]), from, to, total, body })
    }
}

/// Limits of a [`Reassembler`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReassemblyLimits {
    /// Frames that wait, at most [`FRAMES_MAX`].
    pub frames_max: usize,
    /// Their bytes.
    pub bytes_max: usize,
    /// Frames of one sender that wait.
    pub frames_per_sender_max: usize,
    /// Their bytes.
    pub bytes_per_sender_max: usize,
    /// How long the fragments of a frame may take, ns.
    pub timeout_ns: u64,
}

impl Default for ReassemblyLimits {
    fn default() -> Self {
        Self {
            frames_max: FRAMES_MAX,
            bytes_max: 4 << 20,
            frames_per_sender_max: FRAMES_MAX / 4,
            bytes_per_sender_max: 1 << 20,
            timeout_ns: 100_000_000,
        }
    }
}

/// Counters of a [`Reassembler`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReassemblyStats {
    /// Frames put together.
    pub completed: u64,
    /// Fragments that they were in.
    pub fragments: u64,
    /// Fragments that were there already.
    pub copies: u64,
}

/// A frame that waits for the rest of its fragments.
#[derive(Debug)]
struct Waiting {
    sender: IpAddr,
    id: u32,
    l1: L1,
    total: u16,
    since_ns: u64,
    /// L1 and what follows it; never made shorter, so its length is what it costs.
    buffer: Vec<u8>,
    /// Bytes that have come, `from..to`; no two overlap.
    parts: [(u16, u16); FRAGMENTS_MAX],
    count: usize,
    /// Sum of the parts.
    bytes: usize,
}

/// Frames in fragments.
#[derive(Debug)]
pub struct Reassembler {
    limits: ReassemblyLimits,
    waiting: Vec<Waiting>,
    /// Bytes of the buffers of frames that wait.
    bytes: usize,
    spare: Vec<Vec<u8>>,
    /// The datagram given out last.
    whole: Vec<u8>,
    /// Nothing is late before.
    deadline_ns: u64,
    stats: ReassemblyStats,
    late_drops: DropCounters,
}

impl Reassembler {
    /// A reassembler in which nothing waits.
    #[must_use]
    pub fn new(limits: ReassemblyLimits) -> Self {
        Self {
            limits: ReassemblyLimits { frames_max: limits.frames_max.min(FRAMES_MAX), ..limits },
            waiting: Vec::new(),
            bytes: 0,
            spare: Vec::new(),
            whole: Vec::new(),
            deadline_ns: u64::MAX,
            stats: ReassemblyStats::default(),
            late_drops: DropCounters::new(),
        }
    }

    /// A fragment has come from a unit's address. Returns the whole UDP payload, for [`super::Encapsulation::parse`], when it is
    /// the last one missing. A fragment that was there already is no error.
    ///
    /// # Errors
    /// [`DropReason::BusTooShort`], [`DropReason::BusVersion`], [`DropReason::BusMalformed`]: no fragment, or one that says
    /// another length or another L1 than those before it. [`DropReason::PieceOverlap`]: it overlaps another one, or has other
    /// contents. [`DropReason::ReassemblyFull`]: the frame alone exceeds a limit, or is in too many fragments. Of a frame whose
    /// fragments contradict each other nothing is kept.
    pub fn push(
        &mut self,
        now_ns: u64,
        sender: IpAddr,
        datagram: &[u8],
    ) -> Result<Option<&[u8]>, DropReason> {
        self.tick(now_ns);
        let fragment = Fragment::parse(datagram)?;
        let known = self.waiting.iter().position(|frame| frame.sender == sender && frame.id == fragment.id);
        let place = match known {
            Some(place) => place,
            None => self.open(now_ns, sender, &fragment)?,
        };
        let Some(frame) = self.waiting.get_mut(place) else { return Err(DropReason::ReassemblyFull) };
        match frame.fill(&fragment) {
            Ok(true) => {}
            Ok(false) => {
                self.stats.copies += 1;
                return Ok(None);
            }
            Err(reason) => {
                self.give_up(place, reason);
                return Err(reason);
            }
        }
        if frame.bytes < usize::from(frame.total) {
            return Ok(None);
        }
        let bytes = L1_BYTES + usize::from(frame.total);
        self.stats.completed += 1;
        self.stats.fragments += frame.count as u64;
        let buffer = self.close(place);
        let old = std::mem::replace(&mut self.whole, buffer);
        self.keep(old);
        Ok(self.whole.get(..bytes))
    }

    /// Drops frames whose time is over.
    pub fn tick(&mut self, now_ns: u64) {
        if now_ns < self.deadline_ns {
            return;
        }
        let timeout_ns = self.limits.timeout_ns;
        let is_late = |frame: &Waiting| frame.since_ns.saturating_add(timeout_ns) <= now_ns;
        while let Some(place) = self.waiting.iter().position(is_late) {
            self.give_up(place, DropReason::ReassemblyTimeout);
        }
        let deadlines = self.waiting.iter().map(|frame| frame.since_ns.saturating_add(timeout_ns));
        self.deadline_ns = deadlines.min().unwrap_or(u64::MAX);
    }

    /// Time at which [`Reassembler::tick`] may have something to drop, ns.
    #[must_use]
    pub fn next_deadline_ns(&self) -> Option<u64> {
        (!self.waiting.is_empty()).then_some(self.deadline_ns)
    }

    /// Frames that wait.
    #[must_use]
    pub fn frames(&self) -> usize {
        self.waiting.len()
    }

    /// Bytes of their buffers.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Counters so far.
    #[must_use]
    pub const fn stats(&self) -> ReassemblyStats {
        self.stats
    }

    /// Fragments that were taken and dropped later, by reason.
    #[must_use]
    pub const fn late_drops(&self) -> &DropCounters {
        &self.late_drops
    }

    /// Makes a place for a frame, at the expense of the oldest ones if need be.
    fn open(&mut self, now_ns: u64, sender: IpAddr, fragment: &Fragment<'_>) -> Result<usize, DropReason> {
        let limits = self.limits;
        let needed = L1_BYTES + usize::from(fragment.total);
        let mut buffer = self.spare.pop().unwrap_or_default();
        if buffer.len() < needed {
            buffer.resize(needed, 0);
        }
        let bytes = buffer.len();
        let is_possible = limits.frames_max > 0 && limits.frames_per_sender_max > 0;
        if !is_possible || bytes > limits.bytes_max || bytes > limits.bytes_per_sender_max {
            return Err(DropReason::ReassemblyFull);
        }
        self.make_room(Some(sender), limits.frames_per_sender_max, limits.bytes_per_sender_max - bytes);
        self.make_room(None, limits.frames_max, limits.bytes_max - bytes);
        self.bytes += bytes;
        self.deadline_ns = self.deadline_ns.min(now_ns.saturating_add(limits.timeout_ns));
        let Fragment { l1, id, total, .. } = *fragment;
        L1 { fragment: false, ..l1 }.write(&mut buffer);
        self.waiting.push(Waiting {
            sender,
            id,
            l1,
            total,
            since_ns: now_ns,
            buffer,
            parts: [(0, 0); FRAGMENTS_MAX],
            count: 0,
            bytes: 0,
        });
        Ok(self.waiting.len() - 1)
    }

    /// Drops the oldest frames, of one sender or of all, until there are fewer than `frames_max` with at most `bytes_max`.
    fn make_room(&mut self, sender: Option<IpAddr>, frames_max: usize, bytes_max: usize) {
        let is_meant = |frame: &Waiting| sender.is_none_or(|sender| frame.sender == sender);
        let (mut frames, mut bytes) = (0, 0);
        for frame in self.waiting.iter().filter(|frame| is_meant(frame)) {
            frames += 1;
            bytes += frame.buffer.len();
        }
        while frames >= frames_max || bytes > bytes_max {
            let meant = self.waiting.iter().enumerate().filter(|(_, frame)| is_meant(frame));
            let Some((place, frame)) = meant.min_by_key(|(_, frame)| frame.since_ns) else { return };
            frames -= 1;
            bytes -= frame.buffer.len();
            self.give_up(place, DropReason::ReassemblyFull);
        }
    }

    /// Drops a frame, and counts the fragments that it had.
    fn give_up(&mut self, place: usize, reason: DropReason) {
        let fragments = self.waiting.get(place).map_or(0, |frame| frame.count as u64);
        self.late_drops.add_n(reason, fragments);
        let buffer = self.close(place);
        self.keep(buffer);
    }

    /// Takes a frame out and returns its buffer.
    fn close(&mut self, place: usize) -> Vec<u8> {
        if place >= self.waiting.len() {
            return Vec::new();
        }
        let buffer = self.waiting.swap_remove(place).buffer;
        self.bytes -= buffer.len();
        buffer
    }

    /// Keeps a buffer for reuse.
    fn keep(&mut self, buffer: Vec<u8>) {
        if self.spare.len() < SPARE_MAX && !buffer.is_empty() {
            self.spare.push(buffer);
        }
    }
}

impl Waiting {
    /// Puts a fragment in its place; `false`: it is there already.
    fn fill(&mut self, fragment: &Fragment<'_>) -> Result<bool, DropReason> {
        if fragment.l1 != self.l1 || fragment.total != self.total {
            return Err(DropReason::BusMalformed);
        }
        let (from, to) = (fragment.from, fragment.to);
        let room = self.buffer.get_mut(L1_BYTES + usize::from(from)..L1_BYTES + usize::from(to));
        let room = room.ok_or(DropReason::BusMalformed)?;
        let parts = self.parts.get(..self.count).unwrap_or_default();
        if let Some(part) = parts.iter().find(|part| part.0 < to && from < part.1) {
            let is_copy = *part == (from, to) && *room == *fragment.body;
            return if is_copy { Ok(false) } else { Err(DropReason::PieceOverlap) };
        }
        let Some(part) = self.parts.get_mut(self.count) else { return Err(DropReason::ReassemblyFull) };
        *part = (from, to);
        self.count += 1;
        self.bytes += fragment.body.len();
        room.copy_from_slice(fragment.body);
        Ok(true)
    }
}
