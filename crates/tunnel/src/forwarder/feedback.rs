//! Feedback: reports settle datagrams and feed the rate controllers, NACKs ask for repeats.

use std::sync::atomic::Ordering::Relaxed;

use super::budget::Budget;
use super::transmit::{Repeat, Transmit};
use crate::frame::{Nack, Report, ReportEntry};
use crate::header::NOT_TOLD;
use crate::path::{Feedbacked, LEAST_DATAGRAM_BYTES, Times};
use crate::time::Time;

/// Cumulative numbers of the last report of one lane.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Reported {
    highest: u64,
    packets: u64,
    bytes: u64,
    lost: u32,
    /// When it was made, by the receiver's clock, µs.
    told_us: u32,
    any: bool,
}

impl Reported {
    /// Takes a newer report over; the difference, without the times.
    fn advance(&mut self, lane: (u8, u8), entry: &ReportEntry) -> Feedbacked {
        let received = entry.packets.saturating_sub(self.packets).min(REPORTED_MAX);
        let feedback = Feedbacked {
            lane,
            bytes: entry.bytes.saturating_sub(self.bytes).min(received * DATAGRAM_BYTES_MAX),
            received: received as u32,
            lost: entry.lost.wrapping_sub(self.lost).min(REPORTED_MAX as u32),
            arrival_us: entry.arrival_us,
            told_us: entry.arrival_us.wrapping_add(entry.hold_us),
            times: None,
        };
        *self = Self {
            highest: entry.highest.max(self.highest),
            packets: entry.packets,
            bytes: entry.bytes,
            lost: entry.lost,
            told_us: feedback.told_us,
            any: true,
        };
        feedback
    }
}

/// A repeat waits for room on a path at most about this long.
const REPEAT_SLACK_US: u64 = 20_000;
/// Most datagrams that may wait to be sent again.
const REPEATS_WAITING_MAX: usize = 8_192;
/// Most bytes a datagram can have: more than that times its datagrams no report can mean.
const DATAGRAM_BYTES_MAX: u64 = 65_535;
/// Most datagrams that one report may newly confirm, or call lost.
const REPORTED_MAX: u64 = 1 << 20;

impl Transmit {
    /// The peer's core `peer_core` reported, in session `session`.
    pub fn on_report(
        &mut self,
        now: Time,
        session: u32,
        peer_core: u8,
        report: &Report<'_>,
        budget: &mut Budget,
    ) {
        if self.session.as_ref().is_none_or(|current| current.number != session) {
            return;
        }
        let peer_core = if report.not_told { NOT_TOLD } else { peer_core };
        let mut offset_us = None;
        for entry in report.entries() {
            if !budget.take_entry() {
                break;
            }
            let Some(tx) = self.paths.iter_mut().find(|tx| tx.path.id == entry.path) else { continue };
            let Some(lane) = self.lanes.get_mut(entry.path, peer_core) else { continue };
            if !lane.has_sent(entry.highest) {
                budget.refuse();
                continue;
            }
            let last = &mut lane.reported;
            if last.any && entry.highest <= last.highest && entry.packets <= last.packets {
                let same = (entry.highest, entry.packets) == (last.highest, last.packets);
                // The same report over a second path says nothing new.
                if same && entry.arrival_us.wrapping_add(entry.hold_us) != last.told_us {
                    tx.path.lane_rests(now, (self.core, peer_core));
                }
                continue;
            }
            let [log, express] = [&mut tx.log, &mut tx.express];
            let sent_at =
                log.sent_at(peer_core, entry.highest).or_else(|| express.sent_at(peer_core, entry.highest));
            let feedback = last.advance((self.core, peer_core), &entry);
            tx.log.settle(peer_core, entry.highest);
            tx.express.settle(peer_core, entry.highest);
            let outstanding = [&tx.log, &tx.express].map(|log| log.oldest_outstanding(peer_core));
            self.lanes.set_outstanding(entry.path, peer_core, outstanding.into_iter().flatten().min());
            tx.progress_at = now;
            tx.path.note_confirmed(now);
            let times = sent_at.map(|sent_at| {
                let rtt_us = now.since(sent_at).saturating_sub(u64::from(entry.hold_us) * 1_000) / 1_000;
                let owd_us = self.bond.relative_delay_us(sent_at.us(), entry.arrival_us);
                Times { owd_us, rtt_us: u32::try_from(rtt_us).unwrap_or(u32::MAX) }
            });
            tx.path.feedback(now, &Feedbacked { times, ..feedback });
            if let Some(times) = times {
                offset_us = Some(times.owd_us - i64::from(tx.path.rtt_us() / 2));
            }
        }
        // Paths that carried nothing yet must not look quicker, or slower, than they are.
        if let Some(offset_us) = offset_us {
            for tx in &self.paths {
                tx.path.assume_delay(offset_us);
            }
        }
    }

    /// The peer misses datagrams of one of our lanes.
    pub fn on_nack(&mut self, now: Time, session: u32, peer_core: u8, nack: &Nack<'_>, budget: &mut Budget) {
        if nack.sending_core != self.core
            || self.session.as_ref().is_none_or(|current| current.number != session)
        {
            return;
        }
        let peer_core = if nack.not_told { NOT_TOLD } else { peer_core };
        let Some(tx) = self.paths.iter_mut().find(|tx| tx.path.id == nack.path) else { return };
        let Some(lane) = self.lanes.get(nack.path, peer_core) else { return };
        let rtt_us = u64::from(tx.path.rtt_us());
        self.receiving.note_repeat(peer_core, now.plus_us(rtt_us + rtt_us / 2 + REPEAT_SLACK_US));
        for range in nack.ranges() {
            if !budget.take_range() {
                return;
            }
            let end = range.first + u64::from(range.count);
            if !lane.has_sent(end - 1) {
                budget.refuse();
                continue;
            }
            for express in [false, true] {
                let log = if express { &mut tx.express } else { &mut tx.log };
                let (path, repeats, left) = (&tx.path, &mut self.repeats, &mut budget.repeats);
                log.take_repeats(peer_core, (range.first, end), &mut budget.looked_up, |number, bytes| {
                    if *left == 0 || repeats.len() >= REPEATS_WAITING_MAX {
                        return false;
                    }
                    *left -= 1;
                    if bytes > usize::from(LEAST_DATAGRAM_BYTES) {
                        path.note_large_lost();
                    }
                    repeats.push_back(Repeat { path: nack.path, express, number });
                    true
                });
            }
        }
    }

    /// Adds what the order logic of the receiver needs: relative delay and jitter of every usable path.
    pub fn timing(&self) -> Vec<(u8, i64, u32)> {
        self.paths
            .iter()
            .filter(|tx| tx.path.carries())
            .map(|tx| (tx.path.id, tx.path.delay_us(), tx.path.jitter_us()))
            .collect()
    }

    /// Counts a datagram that came back from the dead.
    pub fn note_recovered(&self, count: u64) {
        self.bond.totals.recovered.fetch_add(count, Relaxed);
    }
}
