//! Datagrams of one core on one path: built, waiting for their departure, sent, and kept for recovery.
//!
//! One ring of bytes holds them all, so that a run of equal datagrams lies contiguous and leaves with a
//! single GSO send, and a datagram that must be sent again is still there, sealed, byte for byte
//! (what is sent again are *the same sealed bytes*).
//!
//! ```text
//!  oldest                                     write
//!    | sent, unreported … | pending … | open  |   free …
//! ```

mod lanes;

use std::collections::VecDeque;

use lanes::Lanes;

use crate::aead::TAG_BYTES;
use crate::header::HEADER_BYTES;
use crate::mode::{Heading, Label};
use crate::time::Time;

/// Most datagrams of one GSO send, the kernel's `UDP_MAX_SEGMENTS`.
const RUN_DATAGRAMS: usize = 64;
/// Largest datagram of any path: a 9,000-byte interface.
const DATAGRAM_BYTES_MAX: usize = 9_000;
/// Most bytes of one GSO send: an IP datagram less headers.
const RUN_BYTES: usize = 65_000;

/// One datagram in the ring.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    start: usize,
    /// Length with header and tag.
    pub bytes: usize,
    /// Receiving core of its lane.
    pub peer_core: u8,
    /// Label in front of its packets.
    pub label: Label,
    /// When it may leave, and after that when it left.
    pub at: Time,
    /// Lane counter, valid once sent.
    pub counter: u64,
    /// Whether it left.
    pub sent: bool,
    /// Sent again, or about to be: never twice.
    pub repeated: bool,
    /// Reported as received or given up: not outstanding.
    pub settled: bool,
    /// It goes over a second path, too, as soon as it left.
    pub copy: bool,
}

/// A run of datagrams ready to leave: `count` entries from `first`, contiguous in the ring.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Number of the first entry.
    pub first: u64,
    /// Entries in the run.
    pub count: usize,
    /// Length of all but the last.
    pub segment: usize,
    /// Receiving core.
    pub peer_core: u8,
}

/// Ring of datagrams of one (core, path).
pub struct SendLog {
    ring: Box<[u8]>,
    entries: VecDeque<Entry>,
    /// Number of `entries[0]`; numbers grow by one a datagram and never wrap (64 bits).
    first: u64,
    /// Number of the first entry that has not left.
    pending: u64,
    write: usize,
    /// Bytes of finished datagrams that wait for departure.
    waiting_bytes: usize,
    /// Bytes before the frames of each datagram.
    front: usize,
    open: Option<Open>,
    lanes: Lanes,
    steps: u64,
    /// Some datagram here went over a second path, too: the next ones are looked at.
    copies: bool,
}

/// The datagram being filled.
struct Open {
    used: usize,
    room: usize,
}

impl Default for SendLog {
    fn default() -> Self {
        Self {
            ring: Box::default(),
            entries: VecDeque::new(),
            first: 0,
            pending: 0,
            write: 0,
            waiting_bytes: 0,
            front: HEADER_BYTES,
            open: None,
            lanes: Lanes::default(),
            steps: 0,
            copies: false,
        }
    }
}

impl SendLog {
    /// An empty log; [`Self::ensure`] gives it its ring when it is first used.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes the ring about `capacity` bytes large (at least four of the largest datagrams) and sets the bytes
    /// before the frames. A ring that has the right size within a factor of two stays, and one that holds waiting datagrams
    /// only grows.
    pub fn ensure(&mut self, capacity: usize, front: usize) {
        let capacity = capacity.max(4 * DATAGRAM_BYTES_MAX);
        let fits = self.ring.len() >= capacity / 2 && self.ring.len() <= capacity * 8;
        if !self.has_pending() && (!fits || front != self.front) {
            self.forget_sent();
            self.open = None;
            self.write = 0;
            self.front = front;
            if !fits {
                self.ring = vec![0; capacity].into_boxed_slice();
            }
        } else if self.ring.len() < capacity / 2 {
            self.grow(capacity);
        }
    }

    /// Moves everything to a larger ring: under load something always waits, and what the rate needs may be many times what it
    /// needed at first.
    fn grow(&mut self, capacity: usize) {
        let mut ring = vec![0; capacity].into_boxed_slice();
        let mut at = 0;
        let last = self.entries.len().saturating_sub(1);
        for (number, entry) in self.entries.iter_mut().enumerate() {
            let open = self.open.as_ref().filter(|_| number == last);
            let bytes = open.map_or(entry.bytes, |open| open.used);
            ring[at..at + bytes].copy_from_slice(&self.ring[entry.start..entry.start + bytes]);
            entry.start = at;
            at += if open.is_some() { 0 } else { bytes };
        }
        self.write = at;
        self.ring = ring;
    }

    /// Whether `bytes` more will fit beside what waits for departure. To be asked before a path is booked.
    pub fn can_take(&self, bytes: usize) -> bool {
        // A datagram that would cross the end of the ring begins at its start: up to one is wasted there, one is open.
        self.waiting_bytes + bytes + 2 * DATAGRAM_BYTES_MAX <= self.ring.len()
    }

    /// Whether any datagram waits for departure.
    pub fn has_pending(&self) -> bool {
        self.pending < self.first + self.entries.len() as u64
    }

    /// Number the next datagram will have.
    pub fn next_number(&self) -> u64 {
        self.first + self.entries.len() as u64
    }

    /// Departure time of the first waiting datagram.
    pub fn next_departure(&self) -> Option<Time> {
        self.entry(self.pending).map(|entry| entry.at)
    }

    /// The entry with this number, if it is still kept.
    pub fn entry(&self, number: u64) -> Option<&Entry> {
        self.entries.get(usize::try_from(number.checked_sub(self.first)?).ok()?)
    }

    fn entry_mut(&mut self, number: u64) -> Option<&mut Entry> {
        self.entries.get_mut(usize::try_from(number.checked_sub(self.first)?).ok()?)
    }

    /// Room left in the open datagram for frames, if it has this heading.
    pub fn open_room(&self, heading: &Heading) -> usize {
        match (&self.open, self.entries.back()) {
            (Some(open), Some(entry))
                if entry.peer_core == heading.peer_core && entry.label == heading.label =>
            {
                open.room - open.used
            }
            _ => 0,
        }
    }

    /// As [`Self::open`], with the heading's label in front of the frames.
    #[must_use]
    pub fn open_labelled(&mut self, heading: &Heading, depart: Time, max_bytes: usize) -> bool {
        let opened = self.open_for(heading, depart, max_bytes);
        if opened && heading.label != Label::None {
            let written = heading.label.write(self.open_slice());
            self.advance(written);
        }
        opened
    }

    /// Starts a datagram of at most `max_bytes` with this heading. False when the ring is full of
    /// datagrams that have not left yet.
    #[must_use]
    pub fn open(&mut self, heading: impl Into<Heading>, depart: Time, max_bytes: usize) -> bool {
        self.open_for(&heading.into(), depart, max_bytes)
    }

    /// By reference, as the sender calls it for each datagram: see `Transmit::write`.
    fn open_for(&mut self, heading: &Heading, depart: Time, max_bytes: usize) -> bool {
        let peer_core = heading.peer_core;
        self.close();
        let Some(start) = self.make_room(max_bytes) else { return false };
        self.lanes.push(peer_core, self.next_number());
        self.entries.push_back(Entry {
            start,
            bytes: self.front + TAG_BYTES,
            peer_core,
            label: heading.label,
            at: depart,
            counter: 0,
            sent: false,
            repeated: false,
            settled: false,
            copy: false,
        });
        self.write = start;
        self.open = Some(Open { used: self.front, room: max_bytes - TAG_BYTES });
        true
    }

    /// Free bytes of the open datagram for the next frame.
    pub fn open_slice(&mut self) -> &mut [u8] {
        match (&self.open, self.entries.back()) {
            (Some(open), Some(entry)) => &mut self.ring[entry.start + open.used..entry.start + open.room],
            _ => &mut [],
        }
    }

    /// Says how many bytes of [`Self::open_slice`] were filled.
    pub fn advance(&mut self, bytes: usize) {
        if let Some(open) = &mut self.open {
            open.used = (open.used + bytes).min(open.room);
        }
    }

    /// Finishes the open datagram; its room behind the tag is free again.
    pub fn close(&mut self) {
        let Some(open) = self.open.take() else { return };
        if open.used == self.front {
            if let Some(entry) = self.entries.pop_back() {
                self.lanes.remove(entry.peer_core, self.next_number());
            }
            return;
        }
        if let Some(entry) = self.entries.back_mut() {
            entry.bytes = open.used + TAG_BYTES;
            self.waiting_bytes += entry.bytes;
            self.write = entry.start + entry.bytes;
        }
    }

    /// The next run of datagrams whose departure has come, oldest first.
    pub fn due(&mut self, now: Time) -> Option<Run> {
        if self.open.is_some() && self.pending + 1 == self.next_number() {
            self.close();
        }
        let first = *self.entry(self.pending)?;
        if first.at > now {
            return None;
        }
        let mut run = Run { first: self.pending, count: 1, segment: first.bytes, peer_core: first.peer_core };
        let (mut end, mut total) = (first.start + first.bytes, first.bytes);
        while run.count < RUN_DATAGRAMS {
            let number = run.first + run.count as u64;
            if self.open.is_some() && number + 1 == self.next_number() {
                break;
            }
            let Some(entry) = self.entry(number) else { break };
            let joins = entry.start == end
                && entry.peer_core == run.peer_core
                && entry.bytes <= run.segment
                && entry.at <= now
                && total + entry.bytes <= RUN_BYTES;
            if !joins {
                break;
            }
            let shorter = entry.bytes < run.segment;
            end += entry.bytes;
            total += entry.bytes;
            run.count += 1;
            if shorter {
                break;
            }
        }
        self.pending += run.count as u64;
        self.waiting_bytes -= total;
        Some(run)
    }

    /// Bytes of entry `number`, for sealing or reading.
    pub fn datagram_mut(&mut self, number: u64) -> &mut [u8] {
        match self.entry(number) {
            Some(&Entry { start, bytes, .. }) => &mut self.ring[start..start + bytes],
            None => &mut [],
        }
    }

    /// Marks an entry as sent now. Entries leave in the order of their numbers, with growing counters in each lane.
    pub fn mark_sent(&mut self, number: u64, now: Time, counter: u64) {
        if let Some(entry) = self.entry_mut(number) {
            entry.at = now;
            entry.counter = counter;
            entry.sent = true;
        }
    }

    /// Gives up a run that [`Self::due`] returned and nobody sealed.
    pub fn discard(&mut self, run: &Run) {
        for number in run.first..run.first + run.count as u64 {
            self.give_up(number);
        }
    }

    /// An entry will not leave from here.
    fn give_up(&mut self, number: u64) {
        let Some(entry) = self.entry_mut(number) else { return };
        entry.settled = true;
        entry.repeated = true;
        let core = entry.peer_core;
        self.lanes.remove(core, number);
    }

    /// Marks what was written since the datagram with this number was opened: it goes over a second path, too.
    pub fn copy_from(&mut self, number: u64) {
        let from = usize::try_from(number.saturating_sub(self.first)).unwrap_or(usize::MAX);
        for entry in self.entries.iter_mut().skip(from).filter(|entry| !entry.copy && !entry.sent) {
            entry.copy = true;
            self.copies = true;
        }
    }

    /// Number of the datagram that is being filled, or else of the next.
    pub fn open_number(&self) -> u64 {
        self.next_number() - u64::from(self.open.is_some())
    }

    /// Whether any datagram ever was to go over a second path.
    pub const fn has_copies(&self) -> bool {
        self.copies
    }

    /// Those of a run that shall.
    pub fn copies_of(&self, run: &Run) -> impl Iterator<Item = u64> + '_ {
        let numbers = run.first..run.first + run.count as u64;
        numbers.filter(|number| self.entry(*number).is_some_and(|entry| entry.copy))
    }

    /// A datagram left over a second path: it need not be sent again.
    pub fn note_copied(&mut self, number: u64) {
        if let Some(entry) = self.entry_mut(number) {
            entry.repeated = true;
        }
    }

    /// Bytes of a whole run.
    pub fn run_bytes(&self, run: &Run) -> &[u8] {
        let last = run.first + run.count as u64 - 1;
        match (self.entry(run.first), self.entry(last)) {
            (Some(first), Some(last)) => &self.ring[first.start..last.start + last.bytes],
            _ => &[],
        }
    }

    /// Entries that look-ups by counter have looked at so far: what a peer's feedback cost.
    pub const fn steps(&self) -> u64 {
        self.steps
    }

    /// Where in its lane the first entry stands that left with this counter or a higher one.
    fn position(&mut self, peer_core: u8, counter: u64) -> Option<usize> {
        let lane = self.lanes.get(peer_core)?;
        let mut steps = 0;
        let at = lane.numbers.partition_point(|&number| {
            steps += 1;
            number < self.pending && self.entry(number).is_some_and(|entry| entry.counter < counter)
        });
        self.steps += steps;
        Some(at)
    }

    /// Number and entry in this place of a lane, if it left.
    fn sent_in(&self, peer_core: u8, at: usize) -> Option<(u64, &Entry)> {
        let number = *self.lanes.get(peer_core)?.numbers.get(at)?;
        let entry = self.entry(number).filter(|_| number < self.pending)?;
        Some((number, entry))
    }

    /// Takes the datagrams of a lane with counters `first..end` for sending again, those that are kept and were not
    /// taken before, each with its number and length. Each entry that is looked at costs one of `budget`.
    pub fn take_repeats(
        &mut self,
        peer_core: u8,
        (first, end): (u64, u64),
        budget: &mut usize,
        mut take: impl FnMut(u64, usize) -> bool,
    ) {
        let Some(mut at) = self.position(peer_core, first) else { return };
        while *budget > 0
            && let Some((number, entry)) = self.sent_in(peer_core, at)
            && entry.counter < end
        {
            *budget -= 1;
            at += 1;
            let (new, bytes) = (!entry.repeated, entry.bytes);
            self.steps += 1;
            if new {
                if !take(number, bytes) {
                    return;
                }
                if let Some(entry) = self.entry_mut(number) {
                    entry.repeated = true;
                }
            }
        }
    }

    /// When the datagram with this lane counter left.
    pub fn sent_at(&mut self, peer_core: u8, counter: u64) -> Option<Time> {
        let at = self.position(peer_core, counter)?;
        self.sent_in(peer_core, at).filter(|(_, entry)| entry.counter == counter).map(|(_, entry)| entry.at)
    }

    /// Settles everything of a lane up to and including `counter` (it was reported). Each entry is settled once.
    pub fn settle(&mut self, peer_core: u8, counter: u64) {
        let Some(lane) = self.lanes.get_mut(peer_core) else { return };
        while let Some(number) = lane.numbers.get(lane.settled).filter(|number| **number < self.pending) {
            let at = usize::try_from(number - self.first).unwrap_or(usize::MAX);
            let Some(entry) = self.entries.get_mut(at).filter(|entry| entry.counter <= counter) else {
                break;
            };
            entry.settled = true;
            lane.settled += 1;
            self.steps += 1;
        }
    }

    /// Settles everything that left.
    pub fn settle_all(&mut self) {
        for entry in &mut self.entries {
            entry.settled |= entry.sent;
        }
        self.lanes.settle_all(self.pending);
    }

    /// The session that everything was sealed under ended: no report or NACK speaks of it any more.
    pub fn end_session(&mut self) {
        self.settle_all();
        self.lanes.forget_sent(self.pending);
    }

    /// When the oldest datagram for `peer_core` that left and is not settled did so.
    pub fn oldest_outstanding(&self, peer_core: u8) -> Option<Time> {
        self.sent_in(peer_core, self.lanes.get(peer_core)?.settled).map(|(_, entry)| entry.at)
    }

    /// Whether a datagram for `peer_core` with a number below `below` waits or is outstanding.
    pub fn holds_for(&self, peer_core: u8, below: u64) -> bool {
        let lane = self.lanes.get(peer_core);
        lane.and_then(|lane| lane.numbers.get(lane.settled)).is_some_and(|number| *number < below)
    }

    /// Takes all sent, unsettled datagrams for sending again that were not taken before: their numbers, oldest first.
    pub fn take_outstanding(&mut self) -> Vec<u64> {
        let sent = usize::try_from(self.pending - self.first).unwrap_or(0);
        let mut numbers = Vec::new();
        for (entry, number) in self.entries.iter_mut().take(sent).zip(self.first..) {
            if !entry.settled && !entry.repeated {
                entry.repeated = true;
                numbers.push(number);
            }
        }
        numbers
    }

    /// Takes the first waiting datagram out, still unsealed: its frames, label included, and its heading. For a
    /// path that died before it could leave.
    pub fn withdraw(&mut self, frames: &mut Vec<u8>) -> Option<Heading> {
        self.close();
        let entry = *self.entry(self.pending)?;
        frames.clear();
        frames.extend_from_slice(&self.ring[entry.start + self.front..entry.start + entry.bytes - TAG_BYTES]);
        self.give_up(self.pending);
        self.pending += 1;
        self.waiting_bytes -= entry.bytes;
        Some(Heading { peer_core: entry.peer_core, label: entry.label })
    }

    /// Forgets everything that has left: its keys are gone.
    pub fn forget_sent(&mut self) {
        while self.first < self.pending && self.entries.pop_front().is_some() {
            self.first += 1;
        }
        self.lanes.forget_sent(self.pending);
    }

    /// Finds `bytes` contiguous free bytes, forgetting the oldest datagrams that left.
    fn make_room(&mut self, bytes: usize) -> Option<usize> {
        loop {
            let Some(oldest) = self.entries.front() else { return (bytes <= self.ring.len()).then_some(0) };
            let oldest_start = oldest.start;
            if self.write > oldest_start {
                if self.ring.len() - self.write >= bytes {
                    return Some(self.write);
                }
                if oldest_start >= bytes {
                    return Some(0);
                }
            } else if self.write < oldest_start && oldest_start - self.write >= bytes {
                return Some(self.write);
            }
            if !oldest.sent && !oldest.settled {
                return None;
            }
            self.lanes.remove(oldest.peer_core, self.first);
            self.entries.pop_front();
            self.first += 1;
            self.pending = self.pending.max(self.first);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn log_of(bytes: usize) -> SendLog {
        let mut log = SendLog::new();
        log.ensure(bytes, HEADER_BYTES);
        log
    }

    fn put(log: &mut SendLog, core: u8, depart: Time, payload: usize) -> bool {
        if !log.open(core, depart, 1472) {
            return false;
        }
        log.open_slice()[..payload].fill(core);
        log.advance(payload);
        log.close();
        true
    }

    /// Numbers and lengths of what can be sent again of a lane.
    fn repeats(log: &mut SendLog, core: u8, first: u64, end: u64) -> Vec<(u64, usize)> {
        let mut taken = Vec::new();
        log.take_repeats(core, (first, end), &mut usize::MAX.clone(), |number, bytes| {
            taken.push((number, bytes));
            true
        });
        taken
    }

    #[test]
    fn a_ring_grows_while_datagrams_wait() {
        let mut log = log_of(64 << 10);
        // Around the end of the ring once, so that the oldest ones stand behind the newest.
        for n in 0..60u8 {
            assert!(put(&mut log, n, Time::ZERO, 1_000), "{n}");
            while log.due(Time::ZERO).is_some() {}
            log.mark_sent(u64::from(n), Time::from_ms(1), u64::from(n));
        }
        for _ in 60..64 {
            assert!(put(&mut log, 7, Time::from_ms(9), 1_000));
        }
        assert!(log.open(7, Time::from_ms(9), 1_472));
        log.open_slice()[..100].fill(64);
        log.advance(100);
        assert!(!log.can_take(400_000));
        log.ensure(1 << 20, HEADER_BYTES);
        assert!(log.can_take(400_000));
        log.open_slice()[..100].fill(65);
        log.advance(100);
        log.close();
        let kept = (0..65u64).filter(|n| log.entry(*n).is_some()).collect::<Vec<_>>();
        assert!(kept.len() > 30 && kept.last() == Some(&64));
        for n in kept {
            let payload = &log.datagram_mut(n)[HEADER_BYTES..];
            let expected = match n {
                64 => [[64; 100], [65; 100]].concat(),
                60.. => vec![7; 1_000],
                _ => vec![n as u8; 1_000],
            };
            assert_eq!(&payload[..expected.len()], expected, "{n}");
        }
        // What waits leaves in one run, as before.
        assert_eq!(log.due(Time::from_ms(9)).map(|run| (run.first, run.count)), Some((60, 5)));
        for n in 65..600u64 {
            assert!(put(&mut log, 7, Time::ZERO, 1_000), "{n}");
        }
    }

    #[test]
    fn equal_datagrams_leave_in_one_run_and_a_shorter_one_ends_it() {
        let mut log = log_of(1 << 20);
        for payload in [1000, 1000, 1000, 400, 1000] {
            assert!(put(&mut log, 1, Time::ZERO, payload));
        }
        let run = log.due(Time::ZERO).unwrap();
        assert_eq!((run.count, run.segment), (4, 1032));
        assert_eq!(log.run_bytes(&run).len(), 3 * 1032 + 432);
        assert_eq!(log.due(Time::ZERO).unwrap().count, 1);
        assert!(log.due(Time::ZERO).is_none());
    }

    #[test]
    fn departure_and_core_split_runs() {
        let mut log = log_of(1 << 20);
        assert!(put(&mut log, 0, Time::ZERO, 100));
        assert!(put(&mut log, 1, Time::ZERO, 100));
        assert!(put(&mut log, 1, Time::from_ms(5), 100));
        assert_eq!(log.due(Time::ZERO).unwrap().peer_core, 0);
        assert_eq!(log.due(Time::ZERO).unwrap().count, 1);
        assert!(log.due(Time::from_ms(4)).is_none());
        assert_eq!(log.next_departure(), Some(Time::from_ms(5)));
        assert!(log.due(Time::from_ms(5)).is_some());
    }

    #[test]
    fn the_ring_reuses_what_left_and_refuses_when_all_waits() {
        let mut log = log_of(131_072);
        let mut accepted = 0;
        while put(&mut log, 0, Time::MAX, 1400) {
            accepted += 1;
            assert!(accepted < 1000);
        }
        assert!(accepted > 80);
        let mut log = log_of(131_072);
        for counter in 0..10_000 {
            assert!(put(&mut log, 0, Time::ZERO, 1400));
            let run = log.due(Time::ZERO).unwrap();
            log.mark_sent(run.first, Time::from_us(counter), counter);
        }
        assert_eq!(log.sent_at(0, 9_999), Some(Time::from_us(9_999)));
        assert!(log.sent_at(0, 1).is_none());
        let taken = repeats(&mut log, 0, 9_990, 9_991);
        assert_eq!(taken, [(9_990, 1432)]);
        assert_eq!(log.datagram_mut(9_990).len(), 1432);
        assert!(repeats(&mut log, 0, 9_990, 9_991).is_empty());
        assert_eq!(repeats(&mut log, 0, 9_989, u64::MAX).len(), 10, "each but the one that was taken");
    }

    #[test]
    fn room_is_known_before_it_is_needed() {
        let mut log = log_of(131_072);
        let mut accepted = 0;
        while log.can_take(1432) {
            assert!(put(&mut log, 0, Time::ZERO, 1400));
            accepted += 1;
        }
        assert!(accepted > 60, "{accepted}");
        while log.due(Time::ZERO).is_some() {}
        assert!(log.can_take(100_000));
    }

    #[test]
    fn discarded_runs_do_not_block_the_ring() {
        let mut log = log_of(131_072);
        for _ in 0..500 {
            assert!(put(&mut log, 9, Time::ZERO, 1400));
            let run = log.due(Time::ZERO).unwrap();
            log.discard(&run);
        }
        assert!(log.take_outstanding().is_empty());
    }

    #[test]
    fn settled_entries_are_not_outstanding() {
        let mut log = log_of(1 << 20);
        for counter in 0..5 {
            assert!(put(&mut log, 0, Time::ZERO, 100));
            let run = log.due(Time::ZERO).unwrap();
            log.mark_sent(run.first, Time::from_ms(counter), counter);
        }
        log.settle(0, 2);
        assert_eq!(log.oldest_outstanding(0), Some(Time::from_ms(3)));
        assert!(!log.holds_for(0, 3) && log.holds_for(0, 4));
        assert_eq!(log.take_outstanding(), [3, 4]);
        assert!(log.take_outstanding().is_empty(), "each is taken once");
    }

    #[test]
    fn a_core_that_reports_nothing_does_not_hide_behind_one_that_does() {
        let mut log = log_of(1 << 20);
        for counter in 0..6 {
            assert!(put(&mut log, (counter % 2) as u8, Time::ZERO, 100));
            let run = log.due(Time::ZERO).unwrap();
            log.mark_sent(run.first, Time::from_ms(counter), counter / 2);
        }
        log.settle(1, 2);
        assert_eq!(log.oldest_outstanding(0), Some(Time::ZERO));
        assert_eq!(log.oldest_outstanding(1), None);
        assert!(log.holds_for(0, 1) && !log.holds_for(1, 6));
        assert!(put(&mut log, 1, Time::from_ms(9), 100));
        assert!(log.holds_for(1, 7), "what has not left yet counts as well");
    }

    /// A log of `count` small datagrams that left, core 0 and core 1 by turns.
    fn full_log(count: u64) -> SendLog {
        let mut log = log_of(8 << 20);
        for number in 0..count {
            assert!(put(&mut log, (number % 2) as u8, Time::ZERO, 10));
            let run = log.due(Time::ZERO).unwrap();
            log.mark_sent(run.first, Time::from_us(number), number / 2);
        }
        log
    }

    #[test]
    fn what_a_peer_names_is_found_without_a_walk() {
        let mut log = full_log(100_000);
        // The oldest, the newest, one in between, and one that never left.
        for (counter, at) in [(0, Some(1)), (49_999, Some(99_999)), (20_000, Some(40_001)), (1 << 60, None)] {
            let before = log.steps();
            assert_eq!(log.sent_at(1, counter), at.map(Time::from_us));
            assert!(repeats(&mut log, 1, counter, counter + 1).len() == usize::from(at.is_some()));
            assert!(log.steps() - before < 40, "{} steps", log.steps() - before);
        }
        let before = log.steps();
        let mut budget = 64;
        log.take_repeats(1, (0, u64::MAX), &mut budget, |_, _| true);
        assert!(budget == 0 && log.steps() - before < 64 + 20);
        let before = log.steps();
        for _ in 0..3 {
            log.settle(1, u64::MAX);
        }
        assert_eq!(log.steps() - before, 50_000, "each is settled once");
        assert_eq!((log.oldest_outstanding(0), log.oldest_outstanding(1)), (Some(Time::ZERO), None));
    }

    #[test]
    fn counters_of_an_ended_session_are_not_found_and_what_waits_stays() {
        let mut log = full_log(10);
        assert!(put(&mut log, 1, Time::ZERO, 10));
        log.end_session();
        assert!(log.sent_at(1, 3).is_none() && repeats(&mut log, 0, 0, 10).is_empty());
        assert!(log.take_outstanding().is_empty() && log.holds_for(1, 11) && !log.holds_for(0, 11));
        let run = log.due(Time::ZERO).unwrap();
        log.mark_sent(run.first, Time::from_ms(1), 0);
        assert_eq!(log.sent_at(1, 0), Some(Time::from_ms(1)));
    }

    #[test]
    fn withdrawn_datagrams_give_their_frames_back() {
        let mut log = log_of(1 << 20);
        assert!(put(&mut log, 3, Time::from_ms(9), 5));
        let mut frames = Vec::new();
        assert_eq!(log.withdraw(&mut frames), Some(3.into()));
        assert_eq!(frames, [3; 5]);
        assert!(!log.has_pending());
    }
}
