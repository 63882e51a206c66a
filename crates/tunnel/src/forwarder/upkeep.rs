//! Upkeep of the sending side, some hundred times a second: paths that die, markers, keepalives.

use super::Output;
use super::build::log_capacity;
use super::class_path::publish;
use super::depart::ControlDatagram;
use super::transmit::{PathTx, Repeat, Transmit, wire_bytes};
use crate::aead::TAG_BYTES;
use crate::frame::{Frame, extension};
use crate::header::{HEADER_BYTES, NOT_TOLD};
use crate::lifecycle::encode;
use crate::order::SETTLE_US_DEFAULT;
use crate::path::PathState;
use crate::time::Time;

/// Without a report for this long (six of them), data outstanding, a path is suspect …
pub(super) const SUSPECT_SILENT_US: u64 = 60_000;
/// … and twice as long if anything was heard on it within this time.
const SUSPECT_HEARD_NS: u64 = 40_000_000;
/// A path that was busy may have died when nothing came over it for so long while something came over another: two reports and a half …
const DOUBT_NS: u64 = 25_000_000;
/// … until so much later, when it is known to have died or to be at rest.
const DOUBT_ENDS_NS: u64 = 300_000_000;
/// A path carried reports lately that was heard within this time.
const LATELY_NS: u64 = 1_000_000_000;
/// A core of the peer lives that was heard within this time.
const CORE_HEARD_NS: u64 = 45_000_000;
/// A confirmation that comes so much later than one was due is of a later datagram: two pauses between reports.
const CONFIRMED_LATER_US: u64 = 25_000;
/// Silent cores are asked for a sign of life this often.
const ASK_NS: u64 = 50_000_000;
/// Id of these pings: far from those of the paths' own.
const ASK_ID: u32 = 1 << 31;

impl Transmit {
    /// A path stopped being usable: what waits for it departs elsewhere, what it did not deliver is repeated.
    pub fn abandon(&mut self, now: Time, at: usize) {
        let id = self.paths[at].path.id;
        let Some(to) = self
            .paths
            .iter()
            .enumerate()
            .filter(|(_, tx)| tx.path.id != id && tx.path.carries())
            .min_by_key(|(_, tx)| tx.path.delay_us())
            .map(|(to, _)| to)
        else {
            return;
        };
        let front = HEADER_BYTES + self.clear_overhead();
        let mut frames = std::mem::take(&mut self.scratch);
        while let Some(heading) = self.paths[at].log.withdraw(&mut frames) {
            let bytes = wire_bytes(1, frames.len() + HEADER_BYTES + TAG_BYTES);
            let depart = self.paths[to].path.book(now, bytes);
            let tx = &mut self.paths[to];
            tx.log.ensure(log_capacity(&tx.path, 0, false), front);
            let size = frames.len() + front + TAG_BYTES;
            // A datagram built for a larger path cannot leave here; its flow's own recovery replaces it.
            if size <= tx.path.datagram_bytes() && tx.log.open(heading, depart, size) {
                tx.log.open_slice()[..frames.len()].copy_from_slice(&frames);
                tx.log.advance(frames.len());
                tx.log.close();
            }
        }
        self.scratch = frames;
        // What was for a core that flows leave is in the other log now.
        self.paths[to].mark();
        self.paths[to].mark_assigned();
        for express in [true, false] {
            let log = if express { &mut self.paths[at].express } else { &mut self.paths[at].log };
            for number in log.take_outstanding() {
                self.repeats.push_back(Repeat { path: id, express, number });
            }
        }
        // What was lost elsewhere and sent again over this one is lost twice.
        let over = self.repeated.iter().filter(|(over, _)| *over == id).map(|(_, repeat)| *repeat);
        self.repeats.extend(over);
        self.repeated.retain(|(over, _)| *over != id);
        self.wake = now;
    }

    /// Paths of this core on which data is outstanding while reports stopped, each with whether
    /// anything else still comes over it.
    pub fn find_suspects(&self, now: Time) -> Vec<(u8, bool)> {
        let mut suspects = Vec::new();
        let lately =
            self.paths.iter().filter(|tx| tx.path.rtt_us() > 0 && tx.path.heard_within(now, LATELY_NS));
        let least_rtt_us = lately.map(|tx| tx.path.rtt_us()).min().unwrap_or(u32::MAX);
        let progress = |tx: &PathTx| now.since(tx.progress_at) < SUSPECT_SILENT_US * 500;
        // A path that has just come back is judged by what it carries from now on, not by what died with it.
        for tx in self.paths.iter().filter(|tx| tx.in_use && tx.path.state() == PathState::Up) {
            let outstanding = self.lanes.outstanding(tx.path.id);
            // A core of the peer that hangs is no reason to leave a path that delivers to others.
            let blamed = outstanding.filter(|(core, _)| !self.is_silent(now, *core));
            let Some(oldest) = blamed.map(|(_, since)| since).min() else { continue };
            let rtt_us = tx.path.confirmation_us();
            let silent_us = now.since(tx.progress_at.max(oldest)) / 1_000;
            let age_us = now.since(oldest) / 1_000;
            let heard = now.since(tx.path.heard_at()) < SUSPECT_HEARD_NS;
            // Reports that come and speak of other paths only are as good as a complaint.
            let others = self.paths.iter().any(|other| other.path.id != tx.path.id && progress(other));
            let slower_us = u64::from(tx.path.rtt_us().saturating_sub(least_rtt_us));
            let (patience_us, margin_us) = match (heard, others) {
                (false, true) => (SUSPECT_SILENT_US * 3 / 4, SUSPECT_SILENT_US / 2),
                // Reports that came over a quicker path, which died, come over this one now.
                (false, false) => (SUSPECT_SILENT_US + slower_us, SUSPECT_SILENT_US),
                (true, _) => (2 * SUSPECT_SILENT_US, SUSPECT_SILENT_US),
            };
            if silent_us > patience_us && age_us > rtt_us + margin_us {
                suspects.push((tx.path.id, heard));
            }
        }
        suspects
    }

    /// Whether so many large datagrams were lost on a path that its size must be looked at now.
    pub fn doubts_size(&self) -> bool {
        self.paths.iter().any(|tx| tx.in_use && tx.path.many_large_lost())
    }

    /// Whether a core of the peer gives no sign of life: datagrams for it are overdue on a path over which later ones
    /// for other cores were confirmed, and nothing comes from it at all.
    pub fn is_silent(&self, now: Time, core: u8) -> bool {
        let reader = self.session.as_ref().map_or(core, |session| session.reader(self.core, core));
        if now.since(self.bond.core_heard_at(reader)) < CORE_HEARD_NS {
            return false;
        }
        self.paths.iter().any(|tx| {
            let Some(since) = self.lanes.outstanding_since(tx.path.id, core) else { return false };
            let due = since.plus_us(tx.path.confirmation_us());
            now >= due.plus_us(SUSPECT_SILENT_US / 2)
                && tx.path.confirmed_at() >= due.plus_us(CONFIRMED_LATER_US)
        })
    }

    /// Asks cores of the peer that are silent for a sign of life: one that answers shows that a path does not deliver
    /// what is large, or does not deliver to this core.
    pub fn ask_silent_cores(&mut self, now: Time, out: &mut impl Output) {
        let Some(session) = self.session.clone() else { return };
        if now < self.asked_at.plus_ns(ASK_NS) || !self.busy() {
            return;
        }
        let lanes = (0..session.peer_cores).chain([NOT_TOLD]);
        for core in lanes.filter(|core| self.is_silent(now, *core)).collect::<Vec<_>>() {
            self.asked_at = now;
            let frames = encode(&Frame::Ping { id: ASK_ID });
            for at in 0..self.paths.len() {
                let id = self.paths[at].path.id;
                if self.paths[at].path.usable() && self.lanes.outstanding_since(id, core).is_some() {
                    // A NAT may have forgotten this core's socket only.
                    self.paths[at].use_newest_tuple(session.reader(self.core, core));
                    self.send_control(now, &ControlDatagram::new(id, core, &frames), out);
                }
            }
            if let Some(id) = self.fastest_path() {
                self.send_control(now, &ControlDatagram::new(id, core, &frames), out);
            }
        }
    }

    /// Moves everything away from paths that stopped being usable since the last call, and publishes what classes had on each.
    pub fn leave_dead_paths(&mut self, now: Time) {
        for at in 0..self.paths.len() {
            publish(&mut self.paths[at]);
            let usable = self.paths[at].path.usable();
            if !usable && self.paths[at].in_use {
                self.abandon(now, at);
            }
            if usable && !self.paths[at].in_use {
                // What was under way when it died will never be reported: it must not kill the path again.
                let tx = &mut self.paths[at];
                tx.progress_at = now;
                tx.log.settle_all();
                tx.express.settle_all();
                self.lanes.settle_path(tx.path.id);
                // And the peer must learn every socket anew: a NAT between may have forgotten them.
                tx.announced = None;
            }
            self.paths[at].in_use = usable;
        }
    }

    /// Asks for the cores of flows that begin (row T5).
    pub fn ask_for_cores(&mut self, now: Time, out: &mut impl Output) {
        let asked = &mut self.receiving.assignments.asked;
        let body = asked.questions(now);
        self.wake = self.wake.min(asked.next());
        if body.is_empty() {
            return;
        }
        let Some(path) = self.fastest_path() else { return };
        let frames = encode(&Frame::Extension { kind: extension::CORE_WANTED, body: &body });
        let core = self.control_core(path);
        self.send_control(now, &ControlDatagram::new(path, core, &frames), out);
    }

    /// The usable path with the lowest delay.
    pub fn fastest_path(&self) -> Option<u8> {
        let usable = self.paths.iter().filter(|tx| tx.path.carries());
        usable.min_by_key(|tx| (tx.path.delay_us(), tx.path.id)).map(|tx| tx.path.id)
    }

    /// The path that shall carry again what was just sent over `id`, while that may have died: it fell silent, and the other did not. Were
    /// reports and NACKs to go over it alone, the peer would believe that its other paths have died, too, and repeat nothing over them.
    pub fn second_of(&self, now: Time, id: u8) -> Option<u8> {
        let first = &self.paths.iter().find(|tx| tx.path.id == id)?.path;
        let heard_at = first.heard_at();
        if !(DOUBT_NS..DOUBT_ENDS_NS).contains(&now.since(heard_at)) {
            return None;
        }
        let others = self.paths.iter().map(|tx| &tx.path).filter(|path| path.id != id && path.carries());
        let heard = others.filter(|path| {
            path.heard_at() >= heard_at.plus_ns(DOUBT_NS / 2) && path.heard_within(now, DOUBT_NS)
        });
        heard.min_by_key(|path| (path.delay_us(), path.id)).map(|path| path.id)
    }

    /// Whether packets carry stamps now.
    pub fn ordering(&self, now: Time) -> bool {
        self.paths.iter().any(|tx| now.since(tx.ordered_at) < 200_000_000)
    }

    /// Cores of the peer this core sends ordered packets to.
    pub fn receiving_cores(&self) -> impl Iterator<Item = u8> + '_ {
        let known = self.stampers.iter().enumerate().filter(|(_, stamper)| stamper.is_some());
        known.map(|(core, _)| core as u8)
    }

    /// Whether anything is under way that slow timers must watch.
    pub fn busy(&self) -> bool {
        !self.repeats.is_empty()
            || self.paths.iter().any(|tx| {
                tx.in_use != tx.path.usable() || self.lanes.outstanding(tx.path.id).next().is_some()
            })
    }

    /// Whether a path waits for its first keepalives.
    pub fn unannounced(&self) -> bool {
        self.session.is_some()
            && self.bond.dialer
            && self.paths.iter().any(|tx| {
                tx.path.usable() && tx.announced.is_none_or(|(version, _)| version != tx.path.route_version())
            })
    }

    /// A dialer keeps every socket of every path known to the peer and its NAT mapping open.
    pub fn keep_alive(&mut self, now: Time, every_ns: u64, out: &mut impl Output) {
        let Some(peer_cores) = self.session.as_ref().map(|session| session.peer_cores) else { return };
        if !self.bond.dialer {
            return;
        }
        for at in 0..self.paths.len() {
            let tx = &mut self.paths[at];
            let version = tx.path.route_version();
            let due =
                tx.announced.is_none_or(|(known, when)| known != version || now.since(when) >= every_ns);
            if !tx.path.usable() || !due {
                continue;
            }
            tx.announced = Some((version, now));
            let id = tx.path.id;
            for core in 0..peer_cores {
                self.send_control(now, &ControlDatagram::new(id, core, &[crate::frame::kind::PADDING]), out);
            }
        }
    }

    /// Tells the stampers the time; after a settling time a flow that stays on one path needs no order any more.
    pub fn tick_stampers(&mut self, now: Time) {
        let delays = self
            .paths
            .iter()
            .filter(|tx| tx.path.carries())
            .map(|tx| (tx.path.delay_us(), tx.path.jitter_us(), tx.path.rtt_us()));
        let (mut least, mut most, mut extra) = (i64::MAX, i64::MIN, 0);
        for (delay_us, jitter_us, rtt_us) in delays {
            (least, most) = (least.min(delay_us), most.max(delay_us));
            extra = extra.max(4 * jitter_us + rtt_us * 2);
        }
        let spread_us = u32::try_from(most.saturating_sub(least).max(0)).unwrap_or(u32::MAX);
        for stamper in self.stampers.iter_mut().flatten() {
            stamper.tick(now, spread_us.saturating_add(extra).saturating_add(20_000).max(SETTLE_US_DEFAULT));
        }
    }

    /// One marker on every path that lags behind the newest stamp, so that the receiver need not wait for it.
    pub fn markers(&mut self, now: Time, out: &mut impl Output) {
        let newest = self.paths.iter().map(|tx| tx.ordered_at).max().unwrap_or(Time::ZERO);
        if newest == Time::ZERO || now.since(newest) > 20_000_000 {
            return;
        }
        for at in 0..self.paths.len() {
            let tx = &self.paths[at];
            let lag_ns = newest.since(tx.ordered_at);
            if !tx.path.carries() || tx.ordered_at == Time::ZERO || lag_ns < 4_000_000 || tx.log.has_pending()
            {
                continue;
            }
            let id = tx.path.id;
            self.paths[at].ordered_at = newest;
            for core in 0..self.stampers.len() {
                if let Some(last) = self.stampers[core].as_ref().and_then(|stamper| stamper.marker()) {
                    let frames = encode(&Frame::Marker { stamp: last });
                    self.send_control(now, &ControlDatagram::new(id, core as u8, &frames), out);
                }
            }
        }
    }
}
