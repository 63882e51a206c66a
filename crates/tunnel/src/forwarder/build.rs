//! From a segment to a datagram: frames into the path's send log.

use packet::segment::Segmenter;

use super::transmit::{Flow, Transmit};
use super::upkeep::SUSPECT_SILENT_US;
use crate::aead::TAG_BYTES;
use crate::class::Class;
use crate::frame::{PacketHead, PieceHead};
use crate::header::HEADER_BYTES;
use crate::mode::Heading;
use crate::order::{FLOW_BUCKETS, Order, Stamper};
use crate::path::Path;
use crate::send_log::SendLog;
use crate::time::Time;

/// Packets at most this long are written so that others may follow in the same datagram.
const AGGREGATE_BYTES: usize = 640;
/// Largest head of such a packet: with length and order.
const AGGREGATE_HEAD_BYTES: usize = 10;
/// A remainder smaller than this is not worth a piece.
const PIECE_MIN_BYTES: usize = 160;

impl Transmit {
    /// Bytes on the wire that a packet of `length` adds to the open datagram of path `at`; `None`: it begins another.
    pub(super) fn joining_bytes(&self, now: Time, at: usize, length: usize, flow: &Flow) -> Option<u64> {
        let tx = self.paths.get(at).filter(|_| length <= AGGREGATE_BYTES)?;
        let log = if flow.treatment.express && now < self.ordered_until { &tx.express } else { &tx.log };
        let bytes = length + AGGREGATE_HEAD_BYTES;
        (log.open_room(&flow.heading) >= bytes).then_some(bytes as u64)
    }

    /// Writes one segment into the log of path `at`. False when the log has no room.
    pub(super) fn append(
        &mut self,
        now: Time,
        at: usize,
        depart: Time,
        segmenter: &Segmenter<'_>,
        index: usize,
        flow: &Flow,
    ) -> bool {
        let critical = flow.treatment.class == Class::Critical;
        let first = if critical { self.paths[at].express.open_number() } else { 0 };
        let written = self.write(now, at, depart, segmenter, index, flow);
        if critical {
            // Whatever shares a datagram with it goes twice as well.
            self.paths[at].express.copy_from(first);
        }
        written
    }

    fn write(
        &mut self,
        now: Time,
        at: usize,
        depart: Time,
        segmenter: &Segmenter<'_>,
        index: usize,
        flow: &Flow,
    ) -> bool {
        let multi = now < self.ordered_until;
        // By reference: a copy that was just made would be read before its bytes have left the processor's store buffer, behind those of
        // the datagram before.
        let (hash, heading, treatment) = (flow.hash, &flow.heading, &flow.treatment);
        let (peer_core, label) = (heading.peer_core, heading.label.encoded_len());
        let payload = segmenter.segment_payload();
        let length =
            segmenter.header_bytes() + payload.min(segmenter.payload_bytes().saturating_sub(index * payload));
        let front = HEADER_BYTES + self.clear_overhead();
        let tx = &mut self.paths[at];
        let datagram_bytes = tx.path.datagram_bytes();
        let ordered = multi && !treatment.express;
        let (log, depart) =
            if treatment.express && multi { (&mut tx.express, now) } else { (&mut tx.log, depart) };
        let mut head = PacketHead {
            ethernet: segmenter.is_frame(),
            order: ordered.then(Order::default),
            partial: segmenter.checksum_partial(),
            group: segmenter.is_super() && index > 0,
            ..PacketHead::default()
        };
        let small = length <= AGGREGATE_BYTES;
        if small {
            head.bytes = Some(length as u16);
        }
        let fits_alone = front + label + head.encoded_len() + length + TAG_BYTES <= datagram_bytes;
        if fits_alone {
            let need = head.encoded_len() + length;
            if (!small || log.open_room(heading) < need)
                && !log.open_labelled(heading, depart, datagram_bytes)
            {
                return false;
            }
            if ordered {
                head.order = Some(stamp(&mut self.stampers, peer_core, hash, tx.path.id));
                tx.ordered_at = now;
            }
            let out = log.open_slice();
            let Some(used) = head.write(out, 0) else { return false };
            let written = segmenter.write_segment(index, &mut out[used..]);
            log.advance(used + written);
            if !small {
                log.close();
            }
            return true;
        }
        self.scratch.resize(length, 0);
        let written = segmenter.write_segment(index, &mut self.scratch);
        let order = stamp(&mut self.stampers, peer_core, hash, tx.path.id);
        let piece = PieceHead {
            order,
            ethernet: head.ethernet,
            partial: head.partial,
            total: written as u16,
            ..PieceHead::default()
        };
        append_pieces(log, piece, &self.scratch[..written], heading, depart, datagram_bytes)
    }
}

/// Ring size, at least half of which is there: what waits for a departure up to `ahead_us` from now, and what the path carries in a
/// round trip and a report, so that whatever a report speaks of is kept: without it the path has neither delay nor recovery. And what it is
/// given until it is found to have fallen silent: that is sent again over others.
pub(super) fn log_capacity(path: &Path, ahead_us: u64, express: bool) -> usize {
    if express {
        return 128 << 10;
    }
    let kept_us = 2 * (u64::from(path.rtt_us()) + 30_000 + SUSPECT_SILENT_US + ahead_us);
    let bytes = path.rate().saturating_mul(kept_us) / 1_000_000;
    let limit = if path.rtt_us() < 2_000 && ahead_us < 10_000 { 1 << 20 } else { 8 << 20 };
    usize::try_from(bytes).unwrap_or(usize::MAX).clamp(256 << 10, limit)
}

/// The stamper for a receiving core, made when it is first needed.
pub(super) fn stamper(stampers: &mut Vec<Option<Box<Stamper>>>, peer_core: u8) -> &mut Stamper {
    let core = usize::from(peer_core);
    if stampers.len() <= core {
        stampers.resize_with(core + 1, || None);
    }
    stampers[core].get_or_insert_default()
}

/// Next stamp of the flow's lane pair.
fn stamp(stampers: &mut Vec<Option<Box<Stamper>>>, peer_core: u8, hash: u32, path: u8) -> Order {
    stamper(stampers, peer_core).next(hash as usize % FLOW_BUCKETS, path)
}

/// Cuts a packet into pieces: the first fills what is left of the open datagram, the others follow.
fn append_pieces(
    log: &mut SendLog,
    mut head: PieceHead,
    packet: &[u8],
    heading: &Heading,
    depart: Time,
    datagram_bytes: usize,
) -> bool {
    head.bytes = Some(0);
    let head_bytes = head.encoded_len();
    let mut offset = 0;
    while offset < packet.len() {
        let room = log.open_room(heading);
        if room < head_bytes + PIECE_MIN_BYTES.min(packet.len() - offset)
            && !log.open_labelled(heading, depart, datagram_bytes)
        {
            return false;
        }
        let take = (log.open_room(heading) - head_bytes).min(packet.len() - offset);
        head.offset = offset as u16;
        head.bytes = Some(take as u16);
        let out = log.open_slice();
        let Some(used) = head.write(out, 0) else { return false };
        out[used..used + take].copy_from_slice(&packet[offset..offset + take]);
        log.advance(used + take);
        offset += take;
    }
    true
}
