//! Departure: seal what is due and hand it out, a GSO run at a time; control frames at once.

use std::sync::atomic::Ordering::Relaxed;

use super::Output;
use super::transmit::{Repeat, Transmit};
use super::tx_lane::TxLane;
use crate::aead::TAG_BYTES;
use crate::header::{HEADER_BYTES, Header, Kind, NOT_TOLD};
use crate::keys::Encryption;
use crate::mode::{SESSION_LABEL_BYTES, SteeringMode};
use crate::path::Route;
use crate::session::{REJECT_AFTER_PACKETS, REKEY_AFTER_PACKETS, Session};
use crate::time::Time;

/// A packet leaves this much before its booked departure: the worker's timer is no finer.
const DEPART_SLACK_NS: u64 = 500_000;
/// With partial encryption the front of a datagram stays readable for the networks between: frame head and inner
/// headers (row T11). It is authenticated all the same.
const PARTIAL_CLEAR_BYTES: usize = 64;

/// A datagram of control frames, not sealed yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct ControlDatagram<'a> {
    /// Path it takes.
    pub path: u8,
    /// Receiving core.
    pub peer_core: u8,
    /// Where to, if not where the path leads.
    pub route: Option<Route>,
    /// The frames.
    pub frames: &'a [u8],
    /// Size it is padded to; 0 = none.
    pub pad_to: usize,
}

impl<'a> ControlDatagram<'a> {
    /// Frames for a core of the peer, over a path.
    pub fn new(path: u8, peer_core: u8, frames: &'a [u8]) -> Self {
        Self { path, peer_core, route: None, frames, pad_to: 0 }
    }
}

impl Transmit {
    /// Seals and hands out everything that is due on every path.
    pub fn depart(&mut self, now: Time, out: &mut impl Output) -> Time {
        let mut next = self.wake;
        for at in 0..self.paths.len() {
            if self.paths[at].log.has_pending() || self.paths[at].express.has_pending() {
                self.flush_path(now, at, out);
            }
            self.repair_path(now, at, out);
            let tx = &self.paths[at];
            if let Some(departure) = tx.log.next_departure() {
                next = next.min(Time::from_ns(departure.ns().saturating_sub(DEPART_SLACK_NS / 2)));
            }
            next = tx.repair.next().map_or(next, |due| next.min(due));
        }
        let queued = self.waiting_bytes() as i64;
        if queued != self.queued_published {
            self.bond.totals.queue_bytes.fetch_add(queued - self.queued_published, Relaxed);
            self.queued_published = queued;
        }
        next
    }

    pub(super) fn flush_path(&mut self, now: Time, at: usize, out: &mut impl Output) {
        let Some(session) = self.session.clone() else { return };
        let Some(key) = session.seal_key(self.core) else { return };
        let cover = self.cover();
        let own_core = self.core;
        let header_key = session.header_seal_key(own_core).filter(|_| cover == Cover::Whole);
        let tx = &mut self.paths[at];
        let lanes = self.lanes.of_path(tx.path.id, session.peer_cores);
        let (mut datagrams, mut bytes) = (0, 0);
        for express in [true, false] {
            loop {
                let log = if express { &mut tx.express } else { &mut tx.log };
                let Some(run) = log.due(now.plus_ns(DEPART_SLACK_NS)) else { break };
                let Some(lane) = lanes.lane_mut(run.peer_core) else {
                    // The peer came back with fewer cores: nobody there can open these.
                    log.discard(&run);
                    continue;
                };
                for number in run.first..run.first + run.count as u64 {
                    let header = Header {
                        kind: cover.kind(),
                        receiving_core: run.peer_core,
                        sending_core: own_core,
                        path: tx.path.id,
                        receiver_index: session.remote_index,
                        counter: lane.take_counter(),
                    };
                    seal(key, &header, log.datagram_mut(number), cover);
                    log.mark_sent(number, now, header.counter);
                    if tx.repair.block > 0
                        && let Some(symbol) =
                            lane.cover(header.counter, log.datagram_mut(number), tx.repair.block)
                    {
                        tx.repair.finished.push((run.peer_core, symbol));
                    }
                    // Symbols are of what the peer has when it opened the header.
                    if let Some(key) = header_key {
                        key.seal(log.datagram_mut(number));
                    }
                }
                lanes.note_outstanding(run.peer_core, now);
                self.sealed += run.count as u64;
                let sent = log.run_bytes(&run).len();
                datagrams += run.count as u64;
                bytes += sent as u64;
                let target = tx.target(&self.bond, session.reader_of_packets(own_core, run.peer_core));
                let log = if express { &tx.express } else { &tx.log };
                out.transmit(&target, run.segment, log.run_bytes(&run));
                if log.has_copies() {
                    let id = tx.path.id;
                    let wanted = log.copies_of(&run).map(|number| Repeat { path: id, express, number });
                    self.classes.copies.extend(wanted);
                }
            }
        }
        if datagrams > 0 {
            if tx.repair.block > 0 {
                tx.repair.note_covered(now);
            }
            tx.path.note_sent(now);
            tx.path.traffic.tx_datagrams.fetch_add(datagrams, Relaxed);
            tx.path.traffic.tx_bytes.fetch_add(bytes, Relaxed);
            self.watch_limits(&session);
        }
        if !self.classes.copies.is_empty() {
            self.send_copies(now, out);
        }
    }

    fn watch_limits(&mut self, session: &Session) {
        if self.sealed >= REKEY_AFTER_PACKETS {
            session.spend();
        }
        if self.sealed >= REJECT_AFTER_PACKETS {
            self.session = None;
        }
    }

    /// Seals frames in a datagram of their own and sends it at once: control frames, reports.
    pub fn send_control(&mut self, now: Time, datagram: &ControlDatagram<'_>, out: &mut impl Output) {
        let &ControlDatagram { path: id, peer_core, route, frames, pad_to } = datagram;
        let Some(session) = self.session.clone() else { return };
        let (Some(key), Some(at)) =
            (session.seal_key(self.core), self.paths.iter().position(|tx| tx.path.id == id))
        else {
            return;
        };
        let peer_core = match peer_core {
            // What belongs to that lane means nothing to another core.
            NOT_TOLD if !session.sends.may_name_none() => return,
            core if core < session.peer_cores || core == NOT_TOLD => core,
            _ => 0,
        };
        let lanes = self.lanes.of_path(id, session.peer_cores);
        let Some(counter) = lanes.lane_mut(peer_core).map(TxLane::take_counter) else { return };
        self.sealed += 1;
        let length = (HEADER_BYTES + frames.len() + TAG_BYTES).max(pad_to);
        self.scratch.clear();
        self.scratch.resize(length, 0);
        self.scratch[HEADER_BYTES..HEADER_BYTES + frames.len()].copy_from_slice(frames);
        let header = Header {
            kind: Kind::Data,
            receiving_core: peer_core,
            sending_core: self.core,
            path: id,
            receiver_index: session.remote_index,
            counter,
        };
        header.write(&mut self.scratch);
        key.seal(&header, &mut self.scratch);
        let tx = &mut self.paths[at];
        let mut target = tx.target(&self.bond, session.reader(self.core, peer_core));
        if let Some(route) = route {
            target.route = route;
        }
        tx.path.note_sent(now);
        tx.path.traffic.tx_datagrams.fetch_add(1, Relaxed);
        tx.path.traffic.tx_bytes.fetch_add(length as u64, Relaxed);
        out.transmit(&target, length, &self.scratch);
    }
}

/// How much of a datagram of inner packets is sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cover {
    /// All of it.
    Whole,
    /// All but so many bytes at its front, which are authenticated.
    Behind(usize),
    /// Nothing.
    Nothing,
}

impl Cover {
    /// By what both sides agreed on: a session-ID stays readable.
    pub fn of(session: &Session) -> Self {
        let label = match session.sends {
            SteeringMode::SessionId => SESSION_LABEL_BYTES,
            _ => 0,
        };
        match session.encryption {
            Encryption::On if label == 0 => Self::Whole,
            Encryption::On => Self::Behind(label),
            // Nothing stays readable, the layout is as was agreed on.
            Encryption::Partial if session.is_raised() => Self::Behind(label),
            Encryption::Off if session.is_raised() => Self::Whole,
            Encryption::Partial => Self::Behind(PARTIAL_CLEAR_BYTES + label),
            Encryption::Off => Self::Nothing,
        }
    }

    /// Bytes that it adds to a datagram.
    pub const fn overhead(self) -> usize {
        match self {
            Self::Behind(_) => crate::aead::CLEAR_LENGTH_BYTES,
            Self::Whole | Self::Nothing => 0,
        }
    }

    /// Kind of a datagram.
    const fn kind(self) -> Kind {
        match self {
            Self::Whole => Kind::Data,
            Self::Behind(_) => Kind::Partial,
            Self::Nothing => Kind::Clear,
        }
    }
}

/// Seals one datagram in place, header included.
fn seal(key: &crate::aead::LaneKey, header: &Header, datagram: &mut [u8], cover: Cover) {
    header.write(datagram);
    match cover {
        Cover::Whole => key.seal(header, datagram),
        Cover::Behind(clear) => {
            let plaintext = datagram.len() - HEADER_BYTES - TAG_BYTES - crate::aead::CLEAR_LENGTH_BYTES;
            key.seal_partial(header, plaintext.min(clear) as u16, datagram);
        }
        Cover::Nothing => {
            // The tag's room stays, zeroed: datagram sizes do not depend on the mode.
            let at = datagram.len() - TAG_BYTES;
            datagram[at..].fill(0);
        }
    }
}
