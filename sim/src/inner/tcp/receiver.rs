//! The receiving end: checks every byte, acknowledges every second segment, reports holes and duplicates by SACK.

use tunnel::time::Time;

use super::MSS;
use crate::inner::packet::{Socket, Syn, TcpHead, tcp};
use crate::inner::{Arrived, Emit, Place, pattern};

const DELAYED_ACK_MS: u64 = 40;

/// Statistics of the receiver.
#[derive(Clone, Debug, Default)]
pub struct TcpReceived {
    /// Bytes in order.
    pub bytes: u64,
    /// Segments that came out of order.
    pub disordered: u64,
    /// Segments that brought nothing new.
    pub repeated: u64,
    /// Segments with wrong content.
    pub corrupt: u64,
    /// Longest time without new bytes in order, ns, and when it ended.
    pub gap_ns_max: u64,
    /// When the last bytes in order came.
    pub last: Time,
    /// (time, bytes in order) whenever 64 KiB more had come.
    pub marks: Vec<(Time, u64)>,
}

impl TcpReceived {
    /// Bytes in order up to `time` (to within 64 KiB).
    pub fn bytes_at(&self, time: Time) -> u64 {
        let at = self.marks.partition_point(|mark| mark.0 <= time);
        at.checked_sub(1).map_or(0, |at| self.marks[at].1)
    }
}

pub(super) struct Receiver {
    /// Number of the application.
    id: usize,
    /// Where it is, its own end and the client's as it sees it, once the client has sent something.
    ends: Option<(Place, Socket, Socket)>,
    next: u64,
    /// Received beyond `next`, sorted, disjoint.
    ranges: Vec<(u64, u64)>,
    /// Starts of the ranges that changed last, newest first.
    recent: Vec<u64>,
    duplicate: Option<(u64, u64)>,
    unacknowledged: u32,
    ack_at: Time,
    stats: TcpReceived,
}

impl Receiver {
    pub fn new(id: usize) -> Self {
        Self {
            id,
            ends: None,
            next: 0,
            ranges: Vec::new(),
            recent: Vec::new(),
            duplicate: None,
            unacknowledged: 0,
            ack_at: Time::MAX,
            stats: TcpReceived::default(),
        }
    }

    pub fn stats(&self) -> &TcpReceived {
        &self.stats
    }

    pub fn reset_gap(&mut self) {
        self.stats.gap_ns_max = 0;
    }

    pub fn packet(&mut self, now: Time, arrived: &Arrived<'_>, out: &mut Vec<Emit>) {
        let packet = &arrived.packet;
        self.ends = Some((arrived.place, packet.to, packet.from));
        if packet.syn == Some(Syn::Request) {
            // Both sides' data begins at 0, so that each SYN has the number before.
            self.emit(&TcpHead { sequence: u32::MAX, syn: Some(Syn::Answer), ..TcpHead::default() }, out);
            return;
        }
        if packet.payload.is_empty() {
            return;
        }
        let ahead = packet.sequence.wrapping_sub(self.next as u32).cast_signed();
        let Some(start) = self.next.checked_add_signed(i64::from(ahead)) else {
            self.stats.corrupt += 1;
            return;
        };
        let end = start + packet.payload.len() as u64;
        if !pattern::matches(self.id as u64, start, packet.payload) {
            self.stats.corrupt += 1;
            return;
        }
        let known = end <= self.next || self.ranges.iter().any(|range| range.0 <= start && end <= range.1);
        if known {
            self.stats.repeated += 1;
            self.duplicate = Some((start, end));
            self.acknowledge(out);
        } else if start <= self.next {
            self.advance(now, end);
            self.unacknowledged += 1;
            if !self.ranges.is_empty() || self.unacknowledged >= 2 {
                self.acknowledge(out);
            } else {
                self.ack_at = now.plus_ms(DELAYED_ACK_MS);
            }
        } else {
            self.stats.disordered += 1;
            self.insert(start, end);
            self.acknowledge(out);
        }
    }

    fn advance(&mut self, now: Time, end: u64) {
        if self.stats.bytes > 0 {
            self.stats.gap_ns_max = self.stats.gap_ns_max.max(now.since(self.stats.last));
        }
        self.next = end;
        while let Some(first) = self.ranges.first().copied()
            && first.0 <= self.next
        {
            self.next = self.next.max(first.1);
            self.ranges.remove(0);
        }
        self.stats.bytes = self.next;
        self.stats.last = now;
        if self.stats.marks.last().is_none_or(|mark| self.next >= mark.1 + (64 << 10)) {
            self.stats.marks.push((now, self.next));
        }
    }

    fn insert(&mut self, mut start: u64, mut end: u64) {
        let first = self.ranges.partition_point(|range| range.1 < start);
        let last = self.ranges.partition_point(|range| range.0 <= end);
        for range in self.ranges.drain(first..last) {
            start = start.min(range.0);
            end = end.max(range.1);
        }
        self.ranges.insert(first, (start, end));
        self.recent.retain(|known| *known < start || *known > end);
        self.recent.insert(0, start);
        self.recent.truncate(8);
    }

    fn acknowledge(&mut self, out: &mut Vec<Emit>) {
        self.unacknowledged = 0;
        self.ack_at = Time::MAX;
        let duplicate = self.duplicate.take();
        let recent = self.recent.iter().filter_map(|start| {
            self.ranges.iter().find(|range| range.0 <= *start && *start < range.1).copied()
        });
        let sacks: Vec<(u32, u32)> =
            duplicate.into_iter().chain(recent).take(4).map(|(l, r)| (l as u32, r as u32)).collect();
        self.emit(&TcpHead { acknowledged: self.next as u32, sacks: &sacks, ..TcpHead::default() }, out);
    }

    fn emit(&self, head: &TcpHead<'_>, out: &mut Vec<Emit>) {
        let Some((from, own, client)) = self.ends else { return };
        let (offload, bytes) = tcp(own, client, head, MSS, 0, |_| {});
        out.push(Emit { from, offload, bytes });
    }

    pub fn poll(&mut self, now: Time, out: &mut Vec<Emit>) -> Time {
        if now >= self.ack_at {
            self.acknowledge(out);
        }
        self.ack_at
    }
}
