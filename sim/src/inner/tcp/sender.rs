//! The sending end: a scoreboard of segments, RACK loss detection (RFC 8985), recovery, timeouts.

use std::collections::VecDeque;

use tunnel::time::Time;

use super::cubic::Cubic;
use super::{MSS, TcpSpec};
use crate::inner::packet::{Parsed, Syn, TcpHead, tcp};
use crate::inner::{Emit, Ends, pattern};

const RTO_MS_MIN: u64 = 200;
const RTO_MS_MAX: u64 = 60_000;
/// An answer to a SYN is waited for this long (RFC 6298 §2).
const SYN_MS: u64 = 1_000;
/// The receiver's window, segments: 6 MB, Linux's largest default.
const WINDOW_MAX: f64 = 4_100.0;
/// Most segments of a super-packet: 64 KB.
const SUPER_SEGMENTS: usize = 44;

/// Statistics of the sender.
#[derive(Clone, Copy, Debug, Default)]
pub struct TcpSent {
    /// Segments sent again.
    pub retransmitted: u64,
    /// Times the window was reduced.
    pub recoveries: u64,
    /// Reductions taken back because every repeat was a duplicate.
    pub undone: u64,
    /// Timeouts.
    pub timeouts: u64,
    /// Smoothed round-trip time, µs.
    pub rtt_us: u64,
    /// Congestion window, segments.
    pub window: f64,
}

#[derive(Clone, Copy)]
struct Segment {
    start: u64,
    bytes: u32,
    sent: Time,
    sacked: bool,
    lost: bool,
    repeated: bool,
}

impl Segment {
    /// Counts as under way.
    fn flies(&self) -> bool {
        !self.sacked && !self.lost
    }
}

/// State of the connection's set-up.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Opening {
    /// The SYN is due then, again or for the first time.
    Asks(Time),
    /// Answered; the answer is to be acknowledged.
    Answered,
    Open,
}

pub(super) struct Sender {
    ends: Ends,
    limit: u64,
    hystart: bool,
    opening: Opening,
    acked: u64,
    next: u64,
    segments: VecDeque<Segment>,
    flying: usize,
    sacked: usize,
    sacked_to: u64,
    cubic: Cubic,
    /// End of the data that was out when recovery began.
    recovery: Option<u64>,
    repeats_open: u64,
    rtt_us: u64,
    rttvar_us: u64,
    least_rtt_us: u64,
    round_end: u64,
    rack_sent: Time,
    reordering: bool,
    rack_steps: u64,
    rack_at: Time,
    timer: Time,
    backoff: u32,
    probed: bool,
    stats: TcpSent,
}

impl Sender {
    pub fn new(ends: Ends, spec: &TcpSpec) -> Self {
        Self {
            ends,
            limit: spec.bytes,
            hystart: spec.hystart,
            opening: Opening::Asks(spec.start),
            acked: 0,
            next: 0,
            segments: VecDeque::new(),
            flying: 0,
            sacked: 0,
            sacked_to: 0,
            cubic: Cubic::new(),
            recovery: None,
            repeats_open: 0,
            rtt_us: 0,
            rttvar_us: 0,
            least_rtt_us: u64::MAX,
            round_end: 0,
            rack_sent: Time::ZERO,
            reordering: false,
            rack_steps: 1,
            rack_at: Time::MAX,
            timer: Time::MAX,
            backoff: 0,
            probed: false,
            stats: TcpSent::default(),
        }
    }

    pub fn stats(&self) -> TcpSent {
        TcpSent { rtt_us: self.rtt_us, window: self.cubic.window, ..self.stats }
    }

    pub fn acknowledged(&self) -> u64 {
        self.acked
    }

    /// No new data from here on.
    pub fn close(&mut self) {
        self.limit = self.limit.min(self.next);
    }

    pub fn acknowledge(&mut self, now: Time, packet: &Parsed<'_>) {
        if packet.syn == Some(Syn::Answer) {
            self.opening = Opening::Answered;
            return;
        }
        let back = (self.next as u32).wrapping_sub(packet.acknowledged);
        let Some(acked) = self.next.checked_sub(u64::from(back)) else { return };
        if acked < self.acked && packet.sacks.is_empty() {
            return;
        }
        let absolute =
            |sequence: u32| self.next.wrapping_sub(u64::from((self.next as u32).wrapping_sub(sequence)));
        let blocks: Vec<(u64, u64)> =
            packet.sacks.iter().map(|(l, r)| (absolute(*l), absolute(*r))).filter(|(l, r)| l < r).collect();
        let mut delivered = 0;
        let mut newest = Time::ZERO;
        let mut rtt_us = None;
        while let Some(segment) = self.segments.front().copied()
            && segment.start + u64::from(segment.bytes) <= acked
        {
            self.segments.pop_front();
            self.flying -= usize::from(segment.flies());
            self.sacked -= usize::from(segment.sacked);
            if !segment.sacked {
                delivered += 1;
                if !segment.repeated && segment.start + u64::from(segment.bytes) < self.sacked_to {
                    self.reordering = true;
                }
                self.note_delivered(now, &segment, &mut newest, &mut rtt_us);
            }
        }
        for (at, block) in blocks.iter().enumerate() {
            if at == 0
                && (block.1 <= acked || blocks.get(1).is_some_and(|b| b.0 <= block.0 && block.1 <= b.1))
            {
                self.duplicate();
                continue;
            }
            delivered += self.take_sack(now, *block, &mut newest, &mut rtt_us);
        }
        let advanced = acked > self.acked;
        self.acked = self.acked.max(acked);
        self.rack_sent = self.rack_sent.max(newest);
        if let Some(rtt_us) = rtt_us {
            self.note_rtt(rtt_us);
        }
        self.detect(now);
        if self.recovery.is_some_and(|end| self.acked >= end) {
            self.recovery = None;
        }
        if self.recovery.is_none() && delivered > 0 {
            self.cubic.acknowledged(now, delivered as f64, self.rtt_us);
            self.cubic.window = self.cubic.window.min(WINDOW_MAX);
        }
        if advanced || delivered > 0 {
            self.backoff = 0;
            self.probed = false;
            self.arm(now);
        }
    }

    fn note_delivered(&self, now: Time, segment: &Segment, newest: &mut Time, rtt_us: &mut Option<u64>) {
        let took_us = now.since(segment.sent) / 1_000;
        if segment.repeated {
            // Perhaps the original came: too quick to be the repeat.
            if took_us < self.least_rtt_us {
                return;
            }
        } else {
            *rtt_us = Some(rtt_us.map_or(took_us, |other| other.min(took_us)));
        }
        *newest = (*newest).max(segment.sent);
    }

    fn take_sack(
        &mut self,
        now: Time,
        block: (u64, u64),
        newest: &mut Time,
        rtt_us: &mut Option<u64>,
    ) -> usize {
        let mut at = self.segments.partition_point(|segment| segment.start < block.0);
        let mut delivered = 0;
        while let Some(segment) = self.segments.get(at).copied()
            && segment.start + u64::from(segment.bytes) <= block.1
        {
            if !segment.sacked {
                delivered += 1;
                self.flying -= usize::from(segment.flies());
                self.sacked += 1;
                if !segment.repeated && segment.start < self.sacked_to {
                    self.reordering = true;
                }
                // It was late, not lost: nothing of it is to be repeated.
                (self.segments[at].sacked, self.segments[at].lost) = (true, false);
                self.note_delivered(now, &segment, newest, rtt_us);
            }
            at += 1;
        }
        self.sacked_to = self.sacked_to.max(block.1);
        delivered
    }

    /// The receiver had a segment already: a repeat was needless.
    fn duplicate(&mut self) {
        self.rack_steps = (self.rack_steps + 1).min(16);
        self.reordering = true;
        if self.repeats_open > 0 {
            self.repeats_open -= 1;
            if self.repeats_open == 0 {
                self.cubic.undo();
                self.recovery = None;
                self.stats.undone += 1;
            }
        }
    }

    fn note_rtt(&mut self, rtt_us: u64) {
        self.least_rtt_us = self.least_rtt_us.min(rtt_us);
        if self.rtt_us == 0 {
            (self.rtt_us, self.rttvar_us) = (rtt_us, rtt_us / 2);
        } else {
            self.rttvar_us = (3 * self.rttvar_us + self.rtt_us.abs_diff(rtt_us)) / 4;
            self.rtt_us = (7 * self.rtt_us + rtt_us) / 8;
        }
        let new_round = self.acked >= self.round_end;
        if new_round {
            self.round_end = self.next;
        }
        if self.hystart {
            self.cubic.delay(rtt_us, self.least_rtt_us, new_round);
        }
    }

    /// RACK: a segment is lost when one sent later arrived, by more than the reordering window.
    fn detect(&mut self, now: Time) {
        self.rack_at = Time::MAX;
        if self.sacked == 0 && self.recovery.is_none() {
            return;
        }
        let at_once = !self.reordering && (self.recovery.is_some() || self.sacked >= 3);
        let window_us = if at_once {
            0
        } else {
            (self.least_rtt_us.min(1_000_000) / 4 * self.rack_steps).min(self.rtt_us)
        };
        let mut found = false;
        for segment in self.segments.iter_mut() {
            if segment.start >= self.sacked_to && !segment.repeated {
                break;
            }
            let later = segment.sent > self.rack_sent
                || segment.sent == self.rack_sent && segment.start >= self.sacked_to;
            if !segment.flies() || later {
                continue;
            }
            // The oldest a delivered one can be and still prove the loss.
            let due = segment.sent.plus_us(self.rtt_us.max(self.least_rtt_us.min(1_000_000)) + window_us);
            if self.rack_sent.since(segment.sent) / 1_000 >= window_us || now >= due {
                segment.lost = true;
                self.flying -= 1;
                found = true;
            } else {
                self.rack_at = self.rack_at.min(due);
            }
        }
        if found && self.recovery.is_none() {
            self.recovery = Some(self.next);
            self.repeats_open = 0;
            self.cubic.lost();
            self.stats.recoveries += 1;
        }
    }

    fn arm(&mut self, now: Time) {
        if self.segments.is_empty() {
            self.timer = Time::MAX;
            return;
        }
        let rto_us = (self.rtt_us + (4 * self.rttvar_us).max(RTO_MS_MIN * 1_000)).max(RTO_MS_MIN * 1_000);
        let rto_us = if self.rtt_us == 0 { 1_000_000 } else { rto_us };
        let probe = !self.probed && self.backoff == 0 && self.recovery.is_none() && self.rtt_us > 0;
        let wait_us =
            if probe { (2 * self.rtt_us + 2_000).min(rto_us) } else { rto_us << self.backoff.min(8) };
        self.timer = now.plus_us(wait_us.min(RTO_MS_MAX * 1_000));
    }

    fn expire(&mut self, now: Time, out: &mut Vec<Emit>) {
        let probe = !self.probed && self.backoff == 0 && self.recovery.is_none() && self.rtt_us > 0;
        if probe {
            // Tail-loss probe: the last segment again, so that SACK tells what is missing.
            self.probed = true;
            if let Some(at) = (0..self.segments.len()).rev().find(|at| !self.segments[*at].sacked) {
                self.repeat(now, at, out);
            }
        } else {
            self.backoff += 1;
            self.stats.timeouts += 1;
            for segment in self.segments.iter_mut().filter(|segment| !segment.sacked) {
                segment.lost = true;
            }
            self.flying = 0;
            self.cubic.timeout();
            self.recovery = Some(self.next);
            self.repeats_open = 0;
        }
        self.arm(now);
    }

    fn repeat(&mut self, now: Time, at: usize, out: &mut Vec<Emit>) {
        let segment = &mut self.segments[at];
        let was_flying = segment.flies();
        segment.lost = false;
        segment.repeated = true;
        segment.sent = now;
        let (start, bytes) = (segment.start, segment.bytes as usize);
        if !was_flying {
            self.flying += 1;
        }
        self.repeats_open += 1;
        self.stats.retransmitted += 1;
        self.emit(start, bytes, out);
    }

    fn emit(&self, start: u64, bytes: usize, out: &mut Vec<Emit>) {
        let Ends { id, client, source, target } = self.ends;
        let head = TcpHead { sequence: start as u32, ..TcpHead::default() };
        let (offload, bytes) = tcp(source, target, &head, MSS, bytes, |payload| {
            pattern::fill(id as u64, start, payload);
        });
        out.push(Emit { from: client, offload, bytes });
    }

    /// Both sides' data begins at 0, so that each SYN has the number before.
    fn ask(&self, out: &mut Vec<Emit>) {
        let head = TcpHead { sequence: u32::MAX, syn: Some(Syn::Request), ..TcpHead::default() };
        let (offload, bytes) = tcp(self.ends.source, self.ends.target, &head, MSS, 0, |_| {});
        out.push(Emit { from: self.ends.client, offload, bytes });
    }

    pub fn poll(&mut self, now: Time, out: &mut Vec<Emit>) -> Time {
        match self.opening {
            Opening::Open => {}
            Opening::Answered => {
                self.opening = Opening::Open;
                self.emit(0, 0, out);
            }
            Opening::Asks(due) if now < due => return due,
            Opening::Asks(_) => {
                self.ask(out);
                let due = now.plus_ms(SYN_MS);
                self.opening = Opening::Asks(due);
                return due;
            }
        }
        if now >= self.rack_at {
            self.detect(now);
        }
        if now >= self.timer {
            self.expire(now, out);
        }
        self.send(now, out);
        self.timer.min(self.rack_at)
    }

    fn send(&mut self, now: Time, out: &mut Vec<Emit>) {
        let window = self.cubic.window as usize;
        let before = out.len();
        if self.recovery.is_some() {
            let mut at = 0;
            while at < self.segments.len() && (self.flying < window.max(1) || out.len() == before) {
                if self.segments[at].lost {
                    self.repeat(now, at, out);
                }
                at += 1;
            }
        }
        while self.flying < window && self.next < self.limit && self.segments.len() < 2 * WINDOW_MAX as usize
        {
            let segments = (window - self.flying).min(SUPER_SEGMENTS).min((window / 3).max(2));
            let bytes = (segments * MSS).min(usize::try_from(self.limit - self.next).unwrap_or(usize::MAX));
            self.emit(self.next, bytes, out);
            let mut left = bytes;
            while left > 0 {
                let take = left.min(MSS);
                self.segments.push_back(Segment {
                    start: self.next,
                    bytes: take as u32,
                    sent: now,
                    sacked: false,
                    lost: false,
                    repeated: false,
                });
                self.next += take as u64;
                self.flying += 1;
                left -= take;
            }
        }
        if out.len() > before && self.timer == Time::MAX {
            self.arm(now);
        }
    }
}
