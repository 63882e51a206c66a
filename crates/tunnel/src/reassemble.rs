//! Puts packets together again that did not fit one datagram (frame kind 3, row T13).
//!
//! One [`Reassembler`] belongs to a (bond, receiving core): the sending core and the stamp which all pieces of a
//! packet share are its key there. Pieces may come in any order and over any path, and are kept in the order in which they came:
//! a packet takes as much memory as has arrived of it, whatever it says about its length. Memory is limited by count and
//! bytes, and by what the peer may use in all ([`crate::memory`]); when it is used up the packet that has waited longest
//! goes, because a packet which lost a piece would else block the place for the whole timeout. Small buffers are kept for reuse.

#[cfg(test)]
mod tests;

use crate::frame::PieceHead;
use crate::memory::Share;
use crate::order::Order;
use crate::time::Time;
use packet::drop_reason::DropReason;

/// Packets in pieces at once, by default.
pub const PACKETS_MAX: usize = 256;
/// Bytes of packets in pieces at once, by default.
pub const BYTES_MAX: usize = 4 << 20;
/// How long the pieces of a packet may take, by default.
pub const TIMEOUT_MS: u64 = 1_000;
/// Separate runs of bytes a packet may be in: the largest packet in the smallest datagrams has twice as many pieces, and nobody
/// shuffles all of them.
const RUNS_MAX: usize = 64;
/// No slot.
const NONE: u16 = u16::MAX;
/// Chains of the hash by stamp; stamps are consecutive, so their low bits spread well.
const CHAINS: usize = 256;
/// Unused buffers kept, and the largest that is.
const SPARE_MAX: usize = 32;
const SPARE_BYTES_MAX: usize = 2_048;
/// Bytes of a packet's place and its runs.
const PLACE_BYTES: usize = 640;

/// A whole packet. The bytes stay valid until the next call.
#[derive(Debug, PartialEq, Eq)]
pub struct Whole<'a> {
    /// The packet; may be changed in place.
    pub bytes: &'a mut [u8],
    /// An Ethernet frame, not an IP packet.
    pub ethernet: bool,
    /// Its layer 4 checksum is partial.
    pub partial: bool,
    /// It continues the super-packet of the packet before it.
    pub group: bool,
    /// Its place in the order.
    pub order: Order,
    /// Its tenant.
    pub tenant: Option<u16>,
}

/// Counters of a [`Reassembler`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReassemblyStats {
    /// Packets put together.
    pub completed: u64,
    /// Packets whose pieces took too long ([`DropReason::ReassemblyTimeout`]).
    pub timed_out: u64,
    /// Packets that had to go to make room ([`DropReason::ReassemblyFull`]).
    pub evicted: u64,
    /// Packets given up because pieces contradicted each other.
    pub contradicted: u64,
}

/// Bytes `from..to` of a packet, at `at` in its buffer.
#[derive(Clone, Copy, Debug)]
struct Run {
    from: u16,
    to: u16,
    at: u16,
}

#[derive(Debug)]
struct Slot {
    core: u8,
    head: PieceHead,
    /// All bytes that have arrived, in the order in which they did.
    buffer: Vec<u8>,
    /// Where they belong, sorted, without overlaps.
    runs: Vec<Run>,
    since: Time,
    /// Neighbours in order of age.
    older: u16,
    younger: u16,
    /// Next of the hash chain or of the free list.
    next: u16,
}

/// Packets in pieces.
#[derive(Debug)]
pub struct Reassembler {
    slots: Vec<Slot>,
    chains: Vec<u16>,
    free: u16,
    oldest: u16,
    youngest: u16,
    count: usize,
    /// Bytes of the buffers of packets in pieces.
    bytes: usize,
    spare: Vec<Vec<u8>>,
    /// The packet given out last.
    whole: Vec<u8>,
    packets_max: usize,
    bytes_max: usize,
    timeout_ms: u64,
    share: Share,
    stats: ReassemblyStats,
}

impl Reassembler {
    /// A reassembler with the default limits, within a share of a bond's memory.
    pub fn within(share: Share) -> Self {
        Self::new(PACKETS_MAX, BYTES_MAX, TIMEOUT_MS, share)
    }

    /// A reassembler with limits: packets (at most 32,768), their bytes, and how long one may take.
    pub fn new(packets_max: usize, bytes_max: usize, timeout_ms: u64, share: Share) -> Self {
        Self {
            slots: Vec::new(),
            chains: Vec::new(),
            free: NONE,
            oldest: NONE,
            youngest: NONE,
            count: 0,
            bytes: 0,
            spare: Vec::new(),
            whole: Vec::new(),
            packets_max: packets_max.min(1 << 15),
            bytes_max,
            timeout_ms,
            share,
            stats: ReassemblyStats::default(),
        }
    }

    /// A piece from the peer's core `core` has arrived. Returns the packet when it is the last one missing.
    ///
    /// # Errors
    /// [`DropReason::PieceOverlap`]: pieces cover the same bytes with different contents;
    /// [`DropReason::FrameMalformed`]: pieces disagree about the packet, or lie outside it;
    /// [`DropReason::ReassemblyFull`]: the packet alone exceeds a limit, or is in too many fragments. What was
    /// gathered of the packet is dropped. A piece that was seen before is no error.
    pub fn push(
        &mut self,
        now: Time,
        core: u8,
        head: &PieceHead,
        body: &[u8],
    ) -> Result<Option<Whole<'_>>, DropReason> {
        self.expire(now);
        let from = head.offset;
        let to = usize::from(from) + body.len();
        let to = u16::try_from(to).ok().filter(|&to| to <= head.total && to > from);
        let to = to.ok_or(DropReason::FrameMalformed)?;
        let index = match self.find(core, head.order.stamp) {
            Some(index) => index,
            None => self.open(now, core, head)?,
        };
        let slot = &self.slots[usize::from(index)];
        let filled = match slot.check(head, from, to, body) {
            Ok(true) => return Ok(None),
            Ok(false) if !self.make_room(index, body.len()) => Err(DropReason::ReassemblyFull),
            Ok(false) => self.slots[usize::from(index)].fill(from, to, body),
            Err(reason) => Err(reason),
        };
        if let Err(reason) = filled {
            self.close_and_keep(index);
            self.stats.contradicted += 1;
            return Err(reason);
        }
        let slot = &self.slots[usize::from(index)];
        if slot.buffer.len() < usize::from(slot.head.total) {
            return Ok(None);
        }
        let head = slot.head;
        self.put_together(index);
        self.stats.completed += 1;
        Ok(Some(Whole {
            bytes: &mut self.whole[..usize::from(head.total)],
            ethernet: head.ethernet,
            partial: head.partial,
            group: head.group,
            order: head.order,
            tenant: head.tenant,
        }))
    }

    /// Takes a packet out whose bytes are all there, and puts them in order.
    fn put_together(&mut self, index: u16) {
        let slot = &self.slots[usize::from(index)];
        if let [_] = slot.runs[..] {
            let buffer = self.close(index);
            let old = core::mem::replace(&mut self.whole, buffer);
            self.keep(old);
            return;
        }
        self.whole.clear();
        for run in &slot.runs {
            let at = usize::from(run.at);
            self.whole.extend_from_slice(&slot.buffer[at..at + usize::from(run.to - run.from)]);
        }
        self.close_and_keep(index);
    }

    /// Makes room for `bytes` more of a packet, at the expense of others, the oldest first. False when there is none.
    fn make_room(&mut self, index: u16, bytes: usize) -> bool {
        loop {
            let buffer = &self.slots[usize::from(index)].buffer;
            let more = (buffer.len() + bytes).saturating_sub(buffer.capacity());
            if self.bytes + more <= self.bytes_max && (more == 0 || self.share.take(more)) {
                self.bytes += more;
                self.slots[usize::from(index)].buffer.reserve_exact(bytes);
                return true;
            }
            let oldest =
                if self.oldest == index { self.slots[usize::from(index)].younger } else { self.oldest };
            if oldest == NONE {
                return false;
            }
            self.close_and_keep(oldest);
            self.stats.evicted += 1;
        }
    }

    /// Drops packets whose time is over; returns how many.
    pub fn expire(&mut self, now: Time) -> usize {
        let mut expired = 0;
        while let Some(slot) = self.slots.get(usize::from(self.oldest)) {
            if slot.since.plus_ms(self.timeout_ms) > now {
                break;
            }
            self.close_and_keep(self.oldest);
            self.stats.timed_out += 1;
            expired += 1;
        }
        expired
    }

    /// Drops everything.
    pub fn clear(&mut self) {
        while self.oldest != NONE {
            self.close_and_keep(self.oldest);
        }
    }

    /// When [`Reassembler::expire`] will have something to drop.
    pub fn next_deadline(&self) -> Option<Time> {
        let slot = self.slots.get(usize::from(self.oldest))?;
        Some(slot.since.plus_ms(self.timeout_ms))
    }

    /// Packets in pieces now.
    pub const fn len(&self) -> usize {
        self.count
    }

    /// Whether none is in pieces.
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Counters so far.
    pub const fn stats(&self) -> ReassemblyStats {
        self.stats
    }

    fn chain(core: u8, stamp: u32) -> usize {
        (stamp as usize).wrapping_add(usize::from(core) * 37) % CHAINS
    }

    fn find(&self, core: u8, stamp: u32) -> Option<u16> {
        let mut index = *self.chains.get(Self::chain(core, stamp))?;
        while let Some(slot) = self.slots.get(usize::from(index)) {
            if slot.head.order.stamp == stamp && slot.core == core {
                return Some(index);
            }
            index = slot.next;
        }
        None
    }

    /// Makes a place for a new packet, at the expense of the oldest ones if need be.
    fn open(&mut self, now: Time, core: u8, head: &PieceHead) -> Result<u16, DropReason> {
        if self.packets_max == 0 || usize::from(head.total) > self.bytes_max {
            return Err(DropReason::ReassemblyFull);
        }
        let buffer = self.spare.pop().unwrap_or_default();
        // A buffer that was used before counts as large as it is. It was within the limit then, so the
        // loop ends with an empty reassembler at the latest.
        let capacity = buffer.capacity();
        while self.count >= self.packets_max
            || self.bytes + capacity > self.bytes_max
            || !self.share.take(PLACE_BYTES + capacity)
        {
            if self.count == 0 {
                return Err(DropReason::ReassemblyFull);
            }
            self.close_and_keep(self.oldest);
            self.stats.evicted += 1;
        }
        self.bytes += capacity;
        if self.chains.is_empty() {
            self.chains.resize(CHAINS, NONE);
        }
        let index = self.free;
        let index = if let Some(slot) = self.slots.get_mut(usize::from(index)) {
            self.free = slot.next;
            slot.core = core;
            slot.head = *head;
            slot.buffer = buffer;
            slot.runs.clear();
            slot.since = now;
            index
        } else {
            let runs = Vec::new();
            self.slots.push(Slot {
                core,
                head: *head,
                buffer,
                runs,
                since: now,
                older: NONE,
                younger: NONE,
                next: NONE,
            });
            (self.slots.len() - 1) as u16
        };
        let chain = Self::chain(core, head.order.stamp);
        let youngest = self.youngest;
        let slot = &mut self.slots[usize::from(index)];
        slot.next = self.chains[chain];
        slot.older = youngest;
        slot.younger = NONE;
        self.chains[chain] = index;
        match self.slots.get_mut(usize::from(youngest)) {
            Some(slot) => slot.younger = index,
            None => self.oldest = index,
        }
        self.youngest = index;
        self.count += 1;
        Ok(index)
    }

    /// Takes a packet out and returns its buffer.
    fn close(&mut self, index: u16) -> Vec<u8> {
        let Some(slot) = self.slots.get_mut(usize::from(index)) else { return Vec::new() };
        let (older, younger, next) = (slot.older, slot.younger, slot.next);
        let chain = Self::chain(slot.core, slot.head.order.stamp);
        let buffer = core::mem::take(&mut slot.buffer);
        self.bytes -= buffer.capacity();
        self.share.give_back(PLACE_BYTES + buffer.capacity());
        self.count -= 1;
        slot.next = self.free;
        self.free = index;
        match self.slots.get_mut(usize::from(older)) {
            Some(slot) => slot.younger = younger,
            None => self.oldest = younger,
        }
        match self.slots.get_mut(usize::from(younger)) {
            Some(slot) => slot.older = older,
            None => self.youngest = older,
        }
        if self.chains[chain] == index {
            self.chains[chain] = next;
            return buffer;
        }
        let mut previous = self.chains[chain];
        while let Some(slot) = self.slots.get_mut(usize::from(previous)) {
            if slot.next == index {
                slot.next = next;
                break;
            }
            previous = slot.next;
        }
        buffer
    }

    /// Takes a packet out and keeps its buffer for reuse.
    fn close_and_keep(&mut self, index: u16) {
        let buffer = self.close(index);
        self.keep(buffer);
    }

    /// Keeps a buffer for reuse, if it is small: large ones are rare, and few of them are much.
    fn keep(&mut self, mut buffer: Vec<u8>) {
        if self.spare.len() < SPARE_MAX && (1..=SPARE_BYTES_MAX).contains(&buffer.capacity()) {
            buffer.clear();
            self.spare.push(buffer);
        }
    }
}

impl Slot {
    /// Whether a piece is there already; it must fit to what is.
    fn check(&self, head: &PieceHead, from: u16, to: u16, body: &[u8]) -> Result<bool, DropReason> {
        // All but the place of the piece must be the same in every piece.
        if (PieceHead { offset: self.head.offset, bytes: self.head.bytes, ..*head }) != self.head {
            return Err(DropReason::FrameMalformed);
        }
        match self.runs.get(self.position(from)) {
            Some(run) if run.from < to => {
                // The bytes, or some of them, are there already: fine if it is the same again.
                let again = run.from <= from && to <= run.to && {
                    let at = usize::from(run.at + (from - run.from));
                    self.buffer[at..at + body.len()] == *body
                };
                if again { Ok(true) } else { Err(DropReason::PieceOverlap) }
            }
            _ => Ok(false),
        }
    }

    /// The first run that ends behind a place.
    fn position(&self, from: u16) -> usize {
        self.runs.partition_point(|run| run.to <= from)
    }

    /// Adds a piece that [`Self::check`] found new.
    fn fill(&mut self, from: u16, to: u16, body: &[u8]) -> Result<(), DropReason> {
        let (position, at) = (self.position(from), self.buffer.len());
        let full = self.runs.len() >= RUNS_MAX;
        match self.runs.get_mut(position.wrapping_sub(1)) {
            // It came behind the one that it continues, as nearly all do.
            Some(run) if run.to == from && usize::from(run.at + (run.to - run.from)) == at => run.to = to,
            _ if !full => self.runs.insert(position, Run { from, to, at: at as u16 }),
            _ => return Err(DropReason::ReassemblyFull),
        }
        self.buffer.extend_from_slice(body);
        Ok(())
    }
}
