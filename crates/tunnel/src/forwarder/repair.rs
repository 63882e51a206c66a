//! Repair symbols of lanes on paths that lose at random: sent behind each block of datagrams, solved on arrival. See [`crate::fec`].

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::Output;
use super::budget::Budget;
use super::depart::{ControlDatagram, Cover};
use super::lane::RxLane;
use super::receive::{Context, Receive};
use super::rx_session::{RxSession, lane_id_of};
use super::transmit::{Transmit, wire_bytes};
use crate::aead::TAG_BYTES;
use crate::fec::{BLOCK_MAX, COVERED_BYTES_MAX, DECODER_BYTES, Decoder, Symbol, SymbolPart, block_size};
use crate::frame::Frame;
use crate::frame::extension::REPAIR;
use crate::header::{HEADER_BYTES, Header, Kind};
use crate::lifecycle::encode;
use crate::session::Session;
use crate::time::Time;

/// Packets are put in order on a single path that loses more than this share.
const LOSES_AT: f64 = 0.000_5;
/// Symbols begin on a path that loses more than this share …
const BEGINS_AT: f64 = 0.003;
/// … and end below this, …
const ENDS_AT: f64 = 0.001;
/// … but not before they ran so long.
const LASTS_NS: u64 = 3_000_000_000;
/// A block that gets no more datagrams for so long is ended, …
const QUIET_NS: u64 = 4_000_000;
/// … if its symbol costs at most one part in so many of the path's rate.
const QUIET_SHARE: u64 = 20;
/// Bytes of a datagram with a part of a symbol besides the part.
const PART_OVERHEAD: usize = HEADER_BYTES + 4 + SymbolPart::HEAD_BYTES + TAG_BYTES;
/// Without a symbol for so long a lane's datagrams are not kept any more.
const FORGET_NS: u64 = 2_000_000_000;
/// A missing datagram is not asked for before this, or before the next symbol should have come.
const PATIENCE_NS: u64 = 10_000_000;
/// Most datagrams that one that arrives can bring back.
const RESTORED_MAX: usize = 8;

/// Repair on one path, sending side.
#[derive(Debug, Default)]
pub(super) struct PathRepair {
    /// The path loses enough for order to be kept though it is the only one.
    pub loses: bool,
    /// Datagrams for which a symbol is sent; 0 = none are.
    pub block: usize,
    /// Symbols go on until then, at least.
    until: Time,
    /// When blocks that wait are ended; `None` = none waits.
    quiet_at: Option<Time>,
    /// No block is ended early before that.
    next_quiet: Time,
    /// Symbols to send: receiving core, symbol.
    pub finished: Vec<(u8, Symbol)>,
}

impl PathRepair {
    /// Follows what the path loses. `able`: the peer takes symbols, and datagrams are sealed as a whole. Returns whether symbols end.
    pub fn follow(&mut self, now: Time, loss: f64, able: bool) -> bool {
        self.loses = loss > LOSES_AT;
        let was = self.block > 0;
        if able && loss > BEGINS_AT {
            self.until = now.plus_ns(LASTS_NS);
        }
        let goes_on = able && was && (loss > ENDS_AT || now < self.until);
        self.block = if able && (loss > BEGINS_AT || goes_on) { block_size(loss) } else { 0 };
        if self.block == 0 {
            self.quiet_at = None;
        }
        was && self.block == 0
    }

    /// Datagrams left that blocks were made of.
    pub fn note_covered(&mut self, now: Time) {
        self.quiet_at = Some(now.plus_ns(QUIET_NS));
    }

    /// When there is something to do though nothing is sent.
    pub const fn next(&self) -> Option<Time> {
        self.quiet_at
    }
}

impl Transmit {
    /// Begins and ends repair on every path by what it loses.
    pub fn follow_loss(&mut self, now: Time) {
        let able = self.repairs();
        for tx in &mut self.paths {
            let loss = tx.path.delivery().0;
            if tx.repair.follow(now, loss, able) {
                self.lanes.end_repair(tx.path.id);
            }
        }
    }

    fn repairs(&self) -> bool {
        self.session
            .as_ref()
            .is_some_and(|session| session.takes_repair && Cover::of(session) == Cover::Whole)
    }

    /// Ends blocks that nothing was added to for a while, and sends the symbols that are ready.
    pub(super) fn repair_path(&mut self, now: Time, at: usize, out: &mut impl Output) {
        let tx = &mut self.paths[at];
        if tx.repair.quiet_at.is_some_and(|quiet_at| now >= quiet_at) {
            tx.repair.quiet_at = None;
            if now >= tx.repair.next_quiet {
                let symbols = self.lanes.finish_blocks(tx.path.id);
                let bytes: usize = symbols.iter().map(|(_, symbol)| symbol.bytes.len() + PART_OVERHEAD).sum();
                let pause_ns = bytes as u64 * QUIET_SHARE * 1_000_000_000 / tx.path.rate().max(1);
                tx.repair.next_quiet = now.plus_ns(pause_ns);
                tx.repair.finished.extend(symbols);
            }
        }
        if !tx.repair.finished.is_empty() {
            self.send_symbols(now, at, out);
        }
    }

    fn send_symbols(&mut self, now: Time, at: usize, out: &mut impl Output) {
        let id = self.paths[at].path.id;
        let room = self.paths[at].path.datagram_bytes().saturating_sub(PART_OVERHEAD).max(1);
        for (core, symbol) in std::mem::take(&mut self.paths[at].repair.finished) {
            let total = symbol.bytes.len();
            // Parts of one size: a symbol of full datagrams is a little longer than one of them.
            let length = total.div_ceil(total.div_ceil(room)).max(1);
            for (part, bytes) in symbol.bytes.chunks(length).enumerate() {
                let part = SymbolPart {
                    blocks: symbol.blocks,
                    offset: (part * length) as u16,
                    total: total as u16,
                    bytes,
                };
                let frames = encode(&Frame::Extension { kind: REPAIR, body: &part.encode() });
                self.paths[at].path.book(now, wire_bytes(1, frames.len() + HEADER_BYTES + TAG_BYTES));
                self.send_control(now, &ControlDatagram::new(id, core, &frames), out);
            }
        }
    }
}

/// Repair of one lane, receiving side; made by the first symbol.
#[derive(Debug, Default)]
pub(super) struct LaneRepair {
    pub decoder: Decoder,
    /// The symbol whose parts arrive now.
    partial: Option<Symbol>,
    symbol_at: Time,
    /// Counters from one symbol's block to the next one's.
    span: u64,
    last: u64,
}

impl LaneRepair {
    /// Puts a part to the others of its symbol; the symbol when it is whole.
    fn put(&mut self, part: &SymbolPart<'_>) -> Option<Symbol> {
        let same =
            |symbol: &Symbol| symbol.blocks == part.blocks && symbol.bytes.len() == usize::from(part.offset);
        let mut symbol = match self.partial.take().filter(same) {
            Some(symbol) => symbol,
            None if part.offset == 0 => Symbol { blocks: part.blocks, bytes: Vec::new() },
            None => return None,
        };
        symbol.bytes.extend(part.bytes);
        if symbol.bytes.len() >= usize::from(part.total) {
            return Some(symbol);
        }
        self.partial = Some(symbol);
        None
    }

    /// A symbol came.
    fn note(&mut self, now: Time, newer: u64) {
        self.symbol_at = now;
        if newer > self.last {
            self.span = (newer - self.last).min(2 * BLOCK_MAX as u64);
            self.last = newer;
        }
    }

    /// Whether symbols stopped coming.
    fn is_over(&self, now: Time) -> bool {
        now.since(self.symbol_at) > FORGET_NS
    }

    /// Datagrams and nanoseconds after which a missing datagram will not come from a symbol.
    pub const fn patience(&self) -> (u64, u64) {
        (self.span, PATIENCE_NS)
    }
}

impl RxLane {
    /// The lane's decoder, if symbols come for it.
    fn decoder(&mut self) -> Option<&mut Decoder> {
        self.repair.as_deref_mut().map(|repair| &mut repair.decoder)
    }
}

impl Receive {
    /// Keeps the sealed bytes of a datagram that is about to be opened in place, where symbols may need them. Returns whether they do.
    pub(super) fn set_aside(
        &mut self,
        session: &Arc<Session>,
        lane_id: usize,
        kind: Kind,
        datagram: &[u8],
    ) -> bool {
        let known = self.sessions.iter().find(|known| Arc::ptr_eq(&known.session, session));
        let lane = known.and_then(|known| known.lanes.get(lane_id)).and_then(Option::as_deref);
        let repairs = lane.is_some_and(|lane| lane.repair.is_some());
        let wanted = repairs && kind == Kind::Data && datagram.len() <= COVERED_BYTES_MAX;
        if wanted {
            self.scratch.sealed.clear();
            self.scratch.sealed.extend_from_slice(datagram);
        }
        wanted
    }

    /// The datagram set aside proved authentic.
    pub(super) fn keep_sealed(&mut self, (at, lane_id): (usize, usize), counter: u64) {
        let Some(Some(lane)) = self.sessions[at].lanes.get_mut(lane_id) else { return };
        if let Some(decoder) = lane.decoder() {
            decoder.keep(counter, &self.scratch.sealed);
            self.scratch.waits_for_repair |= decoder.is_waiting();
        }
    }

    /// Gives the memory of lanes back for which symbols stopped coming, and of those of earlier sessions.
    pub(super) fn end_repair(&mut self, now: Time, current: u32) {
        for known in &mut self.sessions {
            let RxSession { lanes, repairing, memory, .. } = known;
            let is_current = known.session.number == current;
            repairing.retain(|&id| {
                let Some(Some(lane)) = lanes.get_mut(id as usize) else { return false };
                let goes_on = is_current && lane.repair.as_ref().is_some_and(|repair| !repair.is_over(now));
                if !goes_on && lane.repair.take().is_some() {
                    memory.give_back(DECODER_BYTES);
                }
                goes_on
            });
        }
    }

    /// A part of a symbol for the lane it came in.
    pub(super) fn on_repair<O: Output>(
        &mut self,
        cx: &Context<'_, O>,
        session: &Session,
        header: &Header,
        body: &[u8],
        budget: &mut Budget,
    ) {
        let Some(part) = SymbolPart::parse(body) else { return budget.refuse() };
        let known = self.sessions.iter_mut().find(|known| std::ptr::eq(&raw const *known.session, session));
        let Some(known) = known else { return };
        let lane_id = lane_id_of(session.peer_cores, header.path, header);
        // What comes back is told from what was only late.
        let Some(lane) = known.lane_with_copies(lane_id) else { return budget.refuse() };
        if lane.repair.is_none() {
            if !known.memory.take_optional(DECODER_BYTES) {
                return;
            }
            known.repairing.push(lane_id as u32);
        }
        let Some(Some(lane)) = known.lanes.get_mut(lane_id) else { return };
        let mut repair = lane.repair.take().unwrap_or_default();
        repair.note(cx.now, part.blocks[0].first);
        if let Some(symbol) = repair.put(&part) {
            repair.decoder.take(symbol, |counter| lane.check(counter).is_err());
        }
        (0..repair.decoder.take_refused()).for_each(|_| budget.refuse());
        self.scratch.waits_for_repair |= repair.decoder.is_waiting();
        lane.repair = Some(repair);
    }

    /// Forwards what symbols bring back, after a datagram of their lane.
    pub(super) fn restore<O: Output>(
        &mut self,
        cx: &mut Context<'_, O>,
        session: &Arc<Session>,
        header: &Header,
    ) {
        let lane_id = lane_id_of(session.peer_cores, header.path, header);
        for _ in 0..RESTORED_MAX {
            let known = self.sessions.iter_mut().find(|known| Arc::ptr_eq(&known.session, session));
            let lane = known.and_then(|known| known.lanes.get_mut(lane_id)?.as_deref_mut());
            let Some(decoder) = lane.and_then(RxLane::decoder).filter(|decoder| decoder.is_waiting()) else {
                return;
            };
            let Some(mut restored) = decoder.solve() else { return };
            let header = Header { kind: Kind::Data, counter: restored.counter, ..*header };
            header.write(&mut restored.datagram);
            // One that does not prove authentic is no datagram: nothing of the peer's is lost by that.
            if self.receive(cx, session, &header, &mut restored.datagram, true).is_ok() {
                self.bond.totals.restored.fetch_add(1, Relaxed);
            }
        }
    }
}
