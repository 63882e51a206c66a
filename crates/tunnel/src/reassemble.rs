//! Puts packets together again that did not fit one datagram (frame kind 3, row T13).
//!
//! One [`Reassembler`] belongs to a (bond, sending core, receiving core): the stamp which all pieces of a
//! packet share is its key there. Pieces may come in any order and over any path. Memory is limited by count and
//! bytes; when it is used up the packet that has waited longest goes, because a packet which lost a
//! piece would else block the place for the whole timeout. Buffers are kept for reuse.

#[cfg(test)]
mod tests;

use crate::frame::PieceHead;
use crate::order::Order;
use crate::time::Time;
use packet::drop_reason::DropReason;

/// Packets in pieces at once, by default.
pub const PACKETS_MAX: usize = 256;
/// Bytes of packets in pieces at once, by default.
pub const BYTES_MAX: usize = 4 << 20;
/// How long the pieces of a packet may take, by default.
pub const TIMEOUT_MS: u64 = 1_000;
/// Separate runs of bytes a packet may be in; more is not what a sender of ours does.
const RUNS_MAX: usize = 16;
/// No slot.
const NONE: u16 = u16::MAX;
/// Chains of the hash by stamp; stamps are consecutive, so their low bits spread well.
const CHAINS: usize = 256;
/// Unused buffers kept.
const SPARE_MAX: usize = 32;

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

#[derive(Debug)]
struct Slot {
    head: PieceHead,
    buffer: Vec<u8>,
    /// Runs of bytes that have arrived, `from..to`, sorted, neither touching nor overlapping.
    runs: Vec<(u16, u16)>,
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
    stats: ReassemblyStats,
}

impl Default for Reassembler {
    fn default() -> Self {
        Self::new(PACKETS_MAX, BYTES_MAX, TIMEOUT_MS)
    }
}

impl Reassembler {
    /// A reassembler with limits: packets (at most 32,768), their bytes, and how long one may take.
    pub fn new(packets_max: usize, bytes_max: usize, timeout_ms: u64) -> Self {
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
            stats: ReassemblyStats::default(),
        }
    }

    /// A piece has arrived. Returns the packet when it is the last one missing.
    ///
    /// # Errors
    /// [`DropReason::PieceOverlap`]: pieces cover the same bytes with different contents;
    /// [`DropReason::FrameMalformed`]: pieces disagree about the packet, or lie outside it;
    /// [`DropReason::ReassemblyFull`]: the packet alone exceeds the limit, or is in too many fragments. What was
    /// gathered of the packet is dropped. A piece that was seen before is no error.
    pub fn push(
        &mut self,
        now: Time,
        head: &PieceHead,
        body: &[u8],
    ) -> Result<Option<Whole<'_>>, DropReason> {
        self.expire(now);
        let from = head.offset;
        let to = usize::from(from) + body.len();
        let to = u16::try_from(to).ok().filter(|&to| to <= head.total && to > from);
        let to = to.ok_or(DropReason::FrameMalformed)?;
        let index = match self.find(head.order.stamp) {
            Some(index) => index,
            None => self.open(now, head)?,
        };
        if let Err(reason) = self.slots[usize::from(index)].fill(head, from, to, body) {
            let buffer = self.close(index);
            self.keep(buffer);
            self.stats.contradicted += 1;
            return Err(reason);
        }
        let slot = &self.slots[usize::from(index)];
        if slot.runs.first() != Some(&(0, slot.head.total)) {
            return Ok(None);
        }
        let head = slot.head;
        let buffer = self.close(index);
        self.stats.completed += 1;
        let old = core::mem::replace(&mut self.whole, buffer);
        self.keep(old);
        Ok(Some(Whole {
            bytes: &mut self.whole[..usize::from(head.total)],
            ethernet: head.ethernet,
            partial: head.partial,
            group: head.group,
            order: head.order,
            tenant: head.tenant,
        }))
    }

    /// Drops packets whose time is over; returns how many.
    pub fn expire(&mut self, now: Time) -> usize {
        let mut expired = 0;
        while let Some(slot) = self.slots.get(usize::from(self.oldest)) {
            if slot.since.plus_ms(self.timeout_ms) > now {
                break;
            }
            let buffer = self.close(self.oldest);
            self.keep(buffer);
            self.stats.timed_out += 1;
            expired += 1;
        }
        expired
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

    fn chain(stamp: u32) -> usize {
        stamp as usize % CHAINS
    }

    fn find(&self, stamp: u32) -> Option<u16> {
        let mut index = *self.chains.get(Self::chain(stamp))?;
        while let Some(slot) = self.slots.get(usize::from(index)) {
            if slot.head.order.stamp == stamp {
                return Some(index);
            }
            index = slot.next;
        }
        None
    }

    /// Makes a place for a new packet, at the expense of the oldest ones if need be.
    fn open(&mut self, now: Time, head: &PieceHead) -> Result<u16, DropReason> {
        let total = usize::from(head.total);
        if self.packets_max == 0 || total > self.bytes_max {
            return Err(DropReason::ReassemblyFull);
        }
        let mut buffer = self.spare.pop().unwrap_or_default();
        if buffer.len() < total {
            buffer.resize(total, 0);
        }
        // A buffer that was larger before counts as large as it is. It was within the limit then, so the
        // loop ends with an empty reassembler at the latest.
        while self.count > 0 && (self.count >= self.packets_max || self.bytes + buffer.len() > self.bytes_max)
        {
            let buffer = self.close(self.oldest);
            self.keep(buffer);
            self.stats.evicted += 1;
        }
        self.bytes += buffer.len();
        if self.chains.is_empty() {
            self.chains.resize(CHAINS, NONE);
        }
        let index = self.free;
        let index = if let Some(slot) = self.slots.get_mut(usize::from(index)) {
            self.free = slot.next;
            slot.head = *head;
            slot.buffer = buffer;
            slot.runs.clear();
            slot.since = now;
            index
        } else {
            let runs = Vec::new();
            self.slots.push(Slot {
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
        let chain = Self::chain(head.order.stamp);
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
        let chain = Self::chain(slot.head.order.stamp);
        let buffer = core::mem::take(&mut slot.buffer);
        self.bytes -= buffer.len();
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

    /// Keeps a buffer for reuse.
    fn keep(&mut self, buffer: Vec<u8>) {
        if self.spare.len() < SPARE_MAX && !buffer.is_empty() {
            self.spare.push(buffer);
        }
    }
}

impl Slot {
    /// Puts a piece in its place.
    fn fill(&mut self, head: &PieceHead, from: u16, to: u16, body: &[u8]) -> Result<(), DropReason> {
        // All but the place of the piece must be the same in every piece.
        if (PieceHead { offset: self.head.offset, bytes: self.head.bytes, ..*head }) != self.head {
            return Err(DropReason::FrameMalformed);
        }
        let room = &mut self.buffer[usize::from(from)..usize::from(to)];
        // The first run that ends behind the piece's beginning.
        let at = self.runs.partition_point(|run| run.1 <= from);
        match self.runs.get(at) {
            Some(run) if run.0 < to => {
                // The bytes, or some of them, are there already: fine if it is the same again.
                let again = run.0 <= from && to <= run.1 && room == body;
                return if again { Ok(()) } else { Err(DropReason::PieceOverlap) };
            }
            _ => {}
        }
        room.copy_from_slice(body);
        let touches_left = at > 0 && self.runs[at - 1].1 == from;
        let touches_right = self.runs.get(at).is_some_and(|run| run.0 == to);
        match (touches_left, touches_right) {
            (true, true) => {
                self.runs[at - 1].1 = self.runs[at].1;
                self.runs.remove(at);
            }
            (true, false) => self.runs[at - 1].1 = to,
            (false, true) => self.runs[at].0 = from,
            (false, false) if self.runs.len() < RUNS_MAX => self.runs.insert(at, (from, to)),
            (false, false) => return Err(DropReason::ReassemblyFull),
        }
        Ok(())
    }
}
