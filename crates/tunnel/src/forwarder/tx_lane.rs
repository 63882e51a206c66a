//! Sending side of lanes: the next counter, and what the peer has confirmed.

use super::feedback::Reported;
use crate::fec::{Encoder, Symbol};
use crate::header::NOT_TOLD;
use crate::time::Time;

/// One lane as its sending core sees it.
#[derive(Clone, Debug, Default)]
pub(super) struct TxLane {
    /// Counter of the next datagram.
    next: u64,
    /// Cumulative numbers of the last report.
    pub reported: Reported,
    /// When the oldest datagram with inner packets left that no report has confirmed; `None` = nothing is outstanding.
    outstanding_since: Option<Time>,
    /// Blocks for repair symbols, while the path loses.
    encoder: Option<Box<Encoder>>,
}

impl TxLane {
    /// Whether a datagram with this counter left.
    pub fn has_sent(&self, counter: u64) -> bool {
        counter < self.next
    }

    /// The counter for the next datagram.
    pub fn take_counter(&mut self) -> u64 {
        let counter = self.next;
        self.next += 1;
        counter
    }

    /// Takes a sealed datagram into the lane's block of `size`; the symbol of a block that this ends.
    pub fn cover(&mut self, counter: u64, datagram: &[u8], size: usize) -> Option<Symbol> {
        let encoder = self.encoder.get_or_insert_default();
        let ended = if encoder.reaches(counter) { None } else { encoder.finish() };
        encoder.add(counter, datagram);
        if encoder.waiting() < size { ended } else { encoder.finish() }
    }
}

/// The lanes of a path to each of the peer's cores.
#[derive(Debug)]
pub(super) struct PathLanes {
    /// By the peer's core; the last is the lane that names none.
    lanes: Box<[TxLane]>,
    /// Those that name a core and have something outstanding, a bit each: idle ones cost nothing. A peer has 128 cores at most.
    outstanding: u128,
}

impl PathLanes {
    fn new(cores: u8) -> Self {
        Self { lanes: vec![TxLane::default(); usize::from(cores) + 1].into_boxed_slice(), outstanding: 0 }
    }

    /// The lane to a core of the peer, if it has that core, or the one that names none.
    pub fn lane_mut(&mut self, core: u8) -> Option<&mut TxLane> {
        self.lanes.get_mut(place(core, self.lanes.len())?)
    }

    fn lane(&self, core: u8) -> Option<&TxLane> {
        self.lanes.get(place(core, self.lanes.len())?)
    }

    /// A datagram with inner packets left for a core.
    pub fn note_outstanding(&mut self, core: u8, now: Time) {
        let since = self.lane(core).and_then(|lane| lane.outstanding_since);
        self.set_outstanding(core, Some(since.unwrap_or(now)));
    }

    fn set_outstanding(&mut self, core: u8, since: Option<Time>) {
        let Some(lane) = self.lane_mut(core) else { return };
        lane.outstanding_since = since;
        let bit = 1u128.checked_shl(core.into()).unwrap_or(0);
        self.outstanding = if since.is_some() { self.outstanding | bit } else { self.outstanding & !bit };
    }
}

const _: () = assert!(crate::hello::CORES_MAX as u32 <= u128::BITS);

/// All lanes that one core sends on within one session. They outlive their path's entry in the list of paths: a path
/// that comes back under its id goes on counting where it was, or nonces would repeat.
#[derive(Debug, Default)]
pub(super) struct TxLanes {
    /// By path id.
    paths: Vec<Option<PathLanes>>,
}

impl TxLanes {
    /// The lanes of a path to each of the peer's `cores` cores.
    pub fn of_path(&mut self, path: u8, cores: u8) -> &mut PathLanes {
        let path = usize::from(path);
        if self.paths.len() <= path {
            self.paths.resize_with(path + 1, || None);
        }
        self.paths[path].get_or_insert_with(|| PathLanes::new(cores))
    }

    /// The lane, if anything was ever sent on its path.
    pub fn get_mut(&mut self, path: u8, core: u8) -> Option<&mut TxLane> {
        self.paths.get_mut(usize::from(path))?.as_mut()?.lane_mut(core)
    }

    /// The lane, if anything was ever sent on its path.
    pub fn get(&self, path: u8, core: u8) -> Option<&TxLane> {
        self.paths.get(usize::from(path))?.as_ref()?.lane(core)
    }

    /// When the oldest unconfirmed datagram of a lane left.
    pub fn outstanding_since(&self, path: u8, core: u8) -> Option<Time> {
        self.get(path, core)?.outstanding_since
    }

    /// The peer's cores with unconfirmed datagrams on a path, each with when the oldest left.
    pub fn outstanding(&self, path: u8) -> impl Iterator<Item = (u8, Time)> + '_ {
        let lanes = self.paths.get(usize::from(path)).and_then(Option::as_ref);
        let mut left = lanes.map_or(0, |lanes| lanes.outstanding);
        std::iter::from_fn(move || {
            let core = left.trailing_zeros() as u8;
            left &= left.checked_sub(1)?;
            let since = lanes?.lanes.get(usize::from(core))?.outstanding_since?;
            Some((core, since))
        })
        .chain(lanes.and_then(|lanes| Some((NOT_TOLD, lanes.lane(NOT_TOLD)?.outstanding_since?))))
    }

    /// Notes when the oldest unconfirmed datagram of a lane left.
    pub fn set_outstanding(&mut self, path: u8, core: u8, since: Option<Time>) {
        if let Some(Some(lanes)) = self.paths.get_mut(usize::from(path)) {
            lanes.set_outstanding(core, since);
        }
    }

    /// Nothing that left over this path will be confirmed any more.
    pub fn settle_path(&mut self, path: u8) {
        if let Some(Some(lanes)) = self.paths.get_mut(usize::from(path)) {
            lanes.lanes.iter_mut().for_each(|lane| lane.outstanding_since = None);
            lanes.outstanding = 0;
        }
    }

    /// Ends the blocks of a path's lanes that wait: receiving core and symbol.
    pub fn finish_blocks(&mut self, path: u8) -> Vec<(u8, Symbol)> {
        let lanes = self.paths.get_mut(usize::from(path)).and_then(Option::as_mut);
        let Some(lanes) = lanes else { return Vec::new() };
        let last = lanes.lanes.len() - 1;
        let core = |place: usize| if place == last { NOT_TOLD } else { place as u8 };
        let waiting = lanes.lanes.iter_mut().enumerate();
        waiting.filter_map(|(place, lane)| Some((core(place), lane.encoder.as_mut()?.finish()?))).collect()
    }

    /// No more symbols for a path.
    pub fn end_repair(&mut self, path: u8) {
        if let Some(Some(lanes)) = self.paths.get_mut(usize::from(path)) {
            lanes.lanes.iter_mut().for_each(|lane| lane.encoder = None);
        }
    }

    /// A new session: all counters begin anew.
    pub fn clear(&mut self) {
        self.paths.clear();
    }
}

/// Where the lane for a core stands among the `lanes` of a path.
fn place(core: u8, lanes: usize) -> Option<usize> {
    let last = lanes.checked_sub(1)?;
    if core == NOT_TOLD { Some(last) } else { Some(usize::from(core)).filter(|core| *core < last) }
}
