//! Receiving side of the lanes of one session.

use std::sync::Arc;

use super::due::LaneEnd;
use super::lane::RxLane;
use crate::header::{Header, NOT_TOLD};
use crate::memory::Share;
use crate::session::Session;

/// Replay window of a lane, counters.
const WINDOW_BITS: usize = 8_192;
/// Memory of a lane: itself, its replay window, its gaps …
const LANE_BYTES: usize = 3_072;
/// … a second window, where copies come …
const COPIES_BYTES: usize = WINDOW_BITS / 8 + 64;
/// … and its place in the list of a session.
const LANE_PLACE_BYTES: usize = size_of::<Option<Box<RxLane>>>();

/// Lanes of one session.
pub(super) struct RxSession {
    pub session: Arc<Session>,
    /// By (path × peer cores + sending core) × 2, and 1 more where the header names a receiving core.
    pub lanes: Vec<Option<Box<RxLane>>>,
    /// Lanes with something to tell or missing: the others cost nothing.
    pub listed: Vec<u32>,
    /// Lanes for which repair symbols come.
    pub repairing: Vec<u32>,
    pub memory: Share,
}

impl RxSession {
    /// A lane, made by its first authenticated datagram. `None` when the peer's memory is used up.
    pub fn lane(&mut self, id: usize) -> Option<&mut RxLane> {
        let places = (id + 1).saturating_sub(self.lanes.len());
        let new = places > 0 || self.lanes[id].is_none();
        if new {
            if !self.memory.take(LANE_BYTES + places * LANE_PLACE_BYTES) {
                return None;
            }
            self.lanes.reserve_exact(places);
            self.lanes.resize_with(self.lanes.len() + places, || None);
        }
        Some(self.lanes[id].get_or_insert_with(|| Box::new(RxLane::new(WINDOW_BITS))))
    }

    /// As [`Self::lane`], for one of which copies come.
    pub fn lane_with_copies(&mut self, id: usize) -> Option<&mut RxLane> {
        if !self.lane(id)?.tells_copies() && !self.memory.take(COPIES_BYTES) {
            return None;
        }
        let lane = self.lane(id)?;
        lane.tell_copies();
        Some(lane)
    }
}

/// Place of a datagram's lane among those of its session.
pub(super) fn lane_id_of(peer_cores: u8, path: u8, header: &Header) -> usize {
    let lane = usize::from(path) * usize::from(peer_cores) + usize::from(header.sending_core);
    2 * lane + usize::from(header.receiving_core != NOT_TOLD)
}

/// Path, sending core and whether a receiving core is named, of a lane by its place among those of a session.
pub(super) fn lane_of(id: usize, cores: usize) -> (u8, LaneEnd) {
    ((id / 2 / cores) as u8, ((id / 2 % cores) as u8, id % 2 == 1))
}
