//! Copies of class `critical` and repeats, as they arrive: the same sealed bytes over another path than their lane's (row R3).
//!
//! The lane's replay window lets one of them pass. Its statistics are those of its own path: an original counts there though a
//! copy came before it, and a copy counts for the path that carried it.

use std::sync::atomic::Ordering::Relaxed;

use packet::drop_reason::DropReason;

use super::Output;
use super::arrival::came_over_another;
use super::lane::{Place, RxLane};
use super::receive::{Context, Receive};
use super::rx_session::lane_id_of;
use crate::header::Header;
use crate::time::Time;

impl Receive {
    /// Takes a datagram's counter in. Returns also whether a copy of it came before. `foreign`: it came over another path than
    /// its lane's; `restored`: it did not come at all.
    pub(super) fn commit<O: Output>(
        &mut self,
        cx: &Context<'_, O>,
        (at, lane_id): (usize, usize),
        header: &Header,
        bytes: usize,
        (foreign, restored): (bool, bool),
    ) -> Result<(Place, bool), DropReason> {
        let session = &mut self.sessions[at];
        if foreign {
            let lane = session.lane_with_copies(lane_id).ok_or(DropReason::PeerMemory)?;
            let commit = if restored { RxLane::commit_restored } else { RxLane::commit_copy };
            return Ok((commit(lane, header.counter)?, false));
        }
        let lane = session.lane(lane_id).ok_or(DropReason::PeerMemory)?;
        lane.commit(cx.now, header.counter, bytes, || {
            let paths = cx.tx.paths.iter().filter(|tx| tx.path.usable()).map(|tx| tx.path.rtt_us());
            paths.filter(|rtt_us| *rtt_us > 0).min().unwrap_or(0)
        })
    }

    /// Counts what came in place of an original, and for the path that carried it.
    pub(super) fn note_repeat<O: Output>(
        &mut self,
        cx: &Context<'_, O>,
        at: usize,
        peer_cores: u8,
        header: &Header,
        (place, bytes): (Place, usize),
    ) {
        if place == Place::Recovered {
            cx.tx.note_recovered(1);
        } else {
            self.bond.totals.copies_used.fetch_add(1, Relaxed);
        }
        self.note_carried(cx, at, peer_cores, header, bytes);
    }

    /// Counts an original whose copy came before. Copies are made of datagrams with packets only.
    pub(super) fn note_original(&mut self, now: Time, (at, lane_id): (usize, usize), header: &Header) {
        self.bond.totals.copies_suppressed.fetch_add(1, Relaxed);
        if let Some(Some(lane)) = self.sessions[at].lanes.get_mut(lane_id) {
            lane.note_data(now, header.counter);
        }
    }

    /// Whether a datagram came over its lane's own path: nearly all do, from where the last ones came.
    pub(super) fn came_by_itself<O: Output>(
        &mut self,
        cx: &Context<'_, O>,
        path_at: Option<usize>,
        header: &Header,
    ) -> bool {
        let source = (*cx.source, header.path);
        if self.own_source == Some(source) {
            return true;
        }
        let own = !came_over_another(cx, path_at, header);
        if own {
            self.own_source = Some(source);
        }
        own
    }

    /// Whether what has come before came again over another path than its own: the copy of class `critical` that was slower.
    #[cold]
    pub(super) fn is_copy<O: Output>(&self, cx: &Context<'_, O>, header: &Header) -> bool {
        let path_at = cx.tx.paths.iter().position(|tx| tx.path.id == header.path);
        let copy = came_over_another(cx, path_at, header);
        self.bond.totals.copies_suppressed.fetch_add(u64::from(copy), Relaxed);
        copy
    }

    /// A repeat used up capacity of the path that carried it, though it belongs to another: the report says so, or the
    /// sender would take that path for slower than it is.
    fn note_carried<O: Output>(
        &mut self,
        cx: &Context<'_, O>,
        at: usize,
        peer_cores: u8,
        header: &Header,
        bytes: usize,
    ) {
        let carrier = match cx.source.socket {
            Some((_, path)) => Some(path),
            None => {
                let same = |tx: &&super::transmit::PathTx| {
                    let route = tx.path.route();
                    route.wan == cx.source.wan
                        && route.remote.ip() == cx.source.remote.ip()
                        && tx.path.carries()
                };
                cx.tx.paths.iter().find(same).map(|tx| tx.path.id)
            }
        };
        let Some(carrier) = carrier else { return };
        let lane_id = lane_id_of(peer_cores, carrier, header);
        if let Some(Some(lane)) = self.sessions[at].lanes.get_mut(lane_id) {
            lane.packets += 1;
            lane.bytes += bytes as u64;
        }
    }
}
