//! Order of packets that travelled over several paths.
//!
//! One [`Stamper`] at the sender and one [`Orderer`] at the receiver belong to a (bond, sending core,
//! receiving core). Every ordered packet carries a `stamp`, +1 per packet over all paths, and `back`, the distance to
//! the previous packet of its flow bucket. So the receiver knows each packet's *predecessor*
//! `stamp − back` without knowing flows, and only packets of one bucket ever wait for each other.
//!
//! # The rule
//! The orderer keeps the set of delivered stamps and a *floor*: every stamp below it is resolved, delivered or given
//! up. A packet leaves as soon as its predecessor was delivered or lies below the floor. What raises the floor:
//!
//! 1. **Loss.** Within a path packets keep their order, up to the path's learned reorder tolerance. Once
//!    *every* path of the set has come beyond a missing stamp by that tolerance, it is lost. Idle paths send markers so
//!    that this works for them too. With recovery on, the loss counts only after the recovery wait.
//! 2. **Deadline.** A held packet waits at most the delay difference of the paths + 4 × jitter (+ recovery wait),
//!    within the budget. When it ends, everything stamped up to its predecessor is overdue, whatever
//!    path it took.
//! 3. **Room.** More than 65,536 stamps or more packets than may be held: the oldest wait ends.
//!
//! Giving up always means "this stamp *and all before it*", never a single one. That is what keeps a flow in order when
//! several of its packets are missing at once: whoever waited for an older one leaves first. The only
//! packets ever delivered out of order are those which arrive after they were given up ([`Admit::Late`]).
//!
//! # Use
//! For every packet: [`Orderer::admit`]; on `Hold` pass it to [`Orderer::hold`], else write it out; then
//! [`Orderer::pop_ready`] until it returns none. The same after [`Orderer::marker`] and
//! [`Orderer::set_paths`], and at [`Orderer::next_deadline`].
//!
//! # Cost
//! In order: a handful of loads and stores, no allocation. Held: O(log n) for the timer, else O(1), plus
//! O(paths). Memory: 384 bytes of window after the first packet, growing with the spread of the paths
//! to 24 KiB at most; held packets up to the limit given.

mod held;
mod path;
mod stamper;
mod stats;
#[cfg(test)]
mod tests;
mod window;

pub use stamper::{FLOW_BUCKETS, SETTLE_US_DEFAULT, Stamper};
pub use stats::{OrderStats, RESIDENCE_BUCKETS};

use crate::time::Time;
use held::{Held, Place};
use path::{PathTrack, Trail};
use window::{Set, Window};

/// Stamps the receiver can look back; what is older counts as resolved.
pub const STAMP_WINDOW: u64 = 65_536;
/// The longest a packet is held unless [`Orderer::set_budget_us`] says otherwise: class `bulk`.
pub const BUDGET_US_DEFAULT: u32 = 150_000;
/// Added to every deadline: the scheduler books a path up to 4 ms ahead, so a packet may leave that much later
/// than a younger one on another path.
pub const DEADLINE_SLACK_US: u32 = 5_000;
/// Packets above the limit that may sit in the ready list when the caller takes them out in batches.
const HELD_SLACK: usize = 64;
/// So many stamps in a row that were seen already or are older than the window: the sender started again.
const REPEATED_MAX: u32 = 64;
/// Unwrapped stamps start here, so that early ones can lie before the first seen.
const BASE: u64 = 1 << 32;

/// A packet's place in the order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Order {
    /// Number of the packet among all of its (sending core, receiving core), over all paths; wraps.
    pub stamp: u32,
    /// Distance in stamps to the previous packet of its flow bucket; 0 = none within reach.
    pub back: u16,
    /// The bucket's packets which may still be under way all took the path of this one: without recovery it
    /// need not wait for a missing predecessor. The sender vouches for it, see [`Stamper::next`].
    pub same_path: bool,
}

/// Decision on a packet that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admit {
    /// In order: write it out. It counts as delivered.
    Deliver,
    /// Its predecessor is missing: pass it to [`Orderer::hold`].
    Hold,
    /// It was given up before it came, or its stamp was seen before: write it out all the same.
    Late,
}

/// A path's timing as the receiver knows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PathTiming {
    /// The path's id.
    pub path: u8,
    /// One-way delay, microseconds, relative to an origin common to all paths; only differences matter.
    pub delay_us: i64,
    /// Jitter of the delay, microseconds.
    pub jitter_us: u32,
}

/// Puts the packets of one (bond, sending core, receiving core) back in order.
#[derive(Debug)]
pub struct Orderer<P> {
    window: Window,
    /// False until the first stamp, and after [`Orderer::restart`]: the next stamp begins a new count.
    started: bool,
    /// Every stamp below is resolved.
    floor: u64,
    /// The lowest stamp somebody waits for; `u64::MAX` = none. Never below the floor.
    first_waited: u64,
    paths: Vec<PathTrack>,
    /// Index of the path that was asked for last.
    path_hint: usize,
    /// How long a packet waits that came over a path outside the set.
    wait_us_other: u64,
    recovery_wait_us: Option<u32>,
    /// How far all paths have passed, over time: when each stamp's recovery began.
    recovery: Trail,
    budget_us: u32,
    held: Held<P>,
    held_limit: usize,
    repeated_run: u32,
    stats: OrderStats,
}

impl<P> Orderer<P> {
    /// An orderer that holds at most `max_held` packets.
    pub fn new(max_held: usize) -> Self {
        Self {
            window: Window::new(BASE - 1),
            started: false,
            floor: 0,
            first_waited: u64::MAX,
            paths: Vec::new(),
            path_hint: 0,
            wait_us_other: 0,
            recovery_wait_us: None,
            recovery: Trail::new(0),
            budget_us: BUDGET_US_DEFAULT,
            held: Held::new(),
            // Slots are numbered with 32 bits.
            held_limit: max_held.min(1 << 24),
            repeated_run: 0,
            stats: OrderStats::default(),
        }
    }

    /// The paths over which packets may come now, their timing, and how long recovery takes (none = lost
    /// packets are not sent again).
    ///
    /// A path that leaves the set is no longer waited for; one that joins is taken not to carry any stamp
    /// below the highest seen. With an empty set nothing is ever held. Every path of the set must send
    /// packets or markers, else each loss costs the whole deadline.
    pub fn set_paths(&mut self, timings: &[PathTiming], recovery_wait_us: Option<u32>) {
        let joins_at = if self.started { self.window.top() + 1 } else { 0 };
        self.paths.retain(|track| timings.iter().any(|timing| timing.path == track.path));
        for timing in timings {
            if !self.paths.iter().any(|track| track.path == timing.path) {
                self.paths.push(PathTrack::new(timing, joins_at));
            }
        }
        self.recovery_wait_us = recovery_wait_us;
        self.path_hint = 0;
        let arrives = |timing: &PathTiming| {
            timing.delay_us.saturating_add(i64::from(timing.jitter_us).saturating_mul(4))
        };
        let latest = timings.iter().map(arrives).max().unwrap_or(0);
        let extra = u64::from(DEADLINE_SLACK_US) + u64::from(recovery_wait_us.unwrap_or(0));
        let wait =
            |delay_us: i64| latest.saturating_sub(delay_us).max(0).unsigned_abs().saturating_add(extra);
        for track in &mut self.paths {
            if let Some(timing) = timings.iter().find(|timing| timing.path == track.path) {
                track.wait_us = wait(timing.delay_us);
            }
        }
        let earliest = timings.iter().map(|timing| timing.delay_us).min().unwrap_or(0);
        self.wait_us_other = wait(earliest);
    }

    /// The longest a packet is held, microseconds: the reorder budget of the class.
    pub const fn set_budget_us(&mut self, budget_us: u32) {
        self.budget_us = budget_us;
    }

    /// A packet has arrived over `path`.
    ///
    /// `path` is the path of the lane it was sealed for. For a packet that did not come over it (sent again or
    /// duplicated over another path, or put together from pieces of several paths) pass 255, "not told":
    /// such an arrival says nothing about how far a path has come.
    #[inline]
    pub fn admit(&mut self, now: Time, path: u8, order: Order) -> Admit {
        let stamp = self.unwrap_stamp(order.stamp);
        if !self.started || stamp > self.window.top() {
            self.move_to(now, stamp);
        } else if stamp < self.window.oldest()
            || self.window.has(Set::Delivered, stamp)
            || self.window.has(Set::Held, stamp)
        {
            return self.repeated(now, order.stamp);
        }
        self.repeated_run = 0;
        self.note(now, path, stamp);
        let late = stamp < self.floor;
        let resolved = order.back == 0 || self.is_delivered(stamp - u64::from(order.back));
        if !late && !resolved && !self.may_pass(now, stamp - u64::from(order.back), order.same_path) {
            return Admit::Hold;
        }
        self.delivered(stamp);
        if late {
            self.stats.late += 1;
            return Admit::Late;
        }
        Admit::Deliver
    }

    /// Keeps a packet for which [`Orderer::admit`] has just said `Hold`.
    ///
    /// When the limit is reached the longest wait ends, so that the next [`Orderer::pop_ready`] makes room
    /// in order. `Err` gives the packet back, for the caller to write out at once: only when more than 64
    /// released packets were not taken, or the limit is 0. It counts as delivered and as overflow.
    pub fn hold(&mut self, now: Time, path: u8, order: Order, packet: P) -> Result<(), P> {
        let stamp = self.unwrap_stamp(order.stamp);
        let predecessor = stamp - u64::from(order.back);
        if self.held_limit == 0 || self.held.len() >= self.held_limit + HELD_SLACK {
            self.stats.overflowed += 1;
            self.delivered(stamp);
            return Err(packet);
        }
        self.window.put(Set::Held, stamp, true);
        let place = Place { stamp, same_path: order.same_path };
        if order.back == 0 || predecessor < self.floor || self.is_delivered(predecessor) {
            self.held.push_ready(place, now, packet);
        } else {
            let wait_us = self.track(path).map_or(self.wait_us_other, |index| self.paths[index].wait_us);
            let deadline = now.plus_us(wait_us.min(self.budget_us.into()));
            self.held.wait(place, predecessor, now, deadline, packet);
            self.window.put(Set::Waited, predecessor, true);
            self.first_waited = self.first_waited.min(predecessor);
        }
        self.stats.holds += 1;
        self.stats.held_max = self.stats.held_max.max(self.held.len() as u64);
        Ok(())
    }

    /// A packet for which [`Orderer::admit`] has just said `Hold` is written out at once: there is no memory to keep it.
    /// It counts as delivered and as overflow.
    pub fn pass(&mut self, order: Order) {
        let stamp = self.unwrap_stamp(order.stamp);
        self.stats.overflowed += 1;
        self.delivered(stamp);
    }

    /// A marker has arrived over `path`: all packets up to and including `stamp` that took the path were
    /// sent before it. To be told for each piece of a packet, too, with the stamp before the piece's.
    pub fn marker(&mut self, now: Time, path: u8, stamp: u32) {
        if !self.started && stamp == self.window.top() as u32 {
            // "Nothing before the first": a piece of stamp 0 says so. It would be taken for 2^32 − 1.
            return;
        }
        let stamp = self.unwrap_stamp(stamp);
        if !self.started || stamp > self.window.top() {
            self.move_to(now, stamp);
        }
        if let Some(index) = self.track(path) {
            self.paths[index].advance(now, stamp + 1);
        }
    }

    /// The next held packet that may leave; none when all others must wait. Write it out before the next call.
    #[inline]
    pub fn pop_ready(&mut self, now: Time) -> Option<P> {
        if self.held.len() == 0 {
            return None;
        }
        if self.held.ready() == 0 {
            self.settle(now);
        }
        let released = self.held.pop_ready()?;
        self.delivered(released.stamp);
        self.stats.residence(now.since(released.since));
        Some(released.packet)
    }

    /// When [`Orderer::pop_ready`] should be called though nothing arrives. It may turn out too early, never too late.
    pub fn next_deadline(&self) -> Option<Time> {
        if self.held.ready() > 0 {
            return Some(Time::ZERO);
        }
        if self.held.waiting() == 0 {
            return None;
        }
        let deadline = self.held.next_deadline();
        match (deadline, self.loss_due(self.first_waited)) {
            (Some(deadline), Some(loss)) => Some(deadline.min(loss)),
            (deadline, loss) => deadline.or(loss),
        }
    }

    /// The sender begins to count anew: whatever is held may leave, and the next stamp is taken as it comes.
    pub fn restart(&mut self) {
        self.raise(self.window.top() + 1);
        self.started = false;
    }

    /// Counters so far.
    pub fn stats(&self) -> OrderStats {
        OrderStats { held_now: self.held.len() as u64, ..self.stats }
    }

    /// The reorder tolerance learned for a path of the set: packets (17 = too deep to count) and microseconds.
    pub fn tolerance(&self, path: u8) -> Option<(u8, u32)> {
        self.paths.iter().find(|track| track.path == path).map(PathTrack::tolerance)
    }

    // ---- stamps ----

    /// The 64-bit stamp nearest to the highest seen; the next one from there on when a count begins.
    #[inline]
    fn unwrap_stamp(&self, stamp: u32) -> u64 {
        let top = self.window.top();
        let ahead = stamp.wrapping_sub(top as u32);
        if self.started {
            // Stamps start at 2^32 and only rise, so half a round back stays positive.
            top.wrapping_add_signed(i64::from(ahead as i32))
        } else {
            top + 1 + u64::from(ahead.wrapping_sub(1))
        }
    }

    /// The window's end moves to `stamp`, above the present one.
    #[inline]
    fn move_to(&mut self, now: Time, stamp: u64) {
        if self.started && self.window.same_word(stamp) {
            self.window.move_to(stamp);
        } else {
            self.enter_word(now, stamp);
        }
    }

    /// Once per 64 stamps: make sure that no unresolved stamp falls out of the window.
    #[cold]
    fn enter_word(&mut self, now: Time, stamp: u64) {
        if !self.started {
            self.started = true;
            // The first to arrive need not be the first sent: leave room for those before it, down to stamp 0
            // of this count.
            let before = u64::from(stamp as u32).min(STAMP_WINDOW - 64);
            self.raise(stamp - before);
        }
        if self.floor < self.window.oldest_at(stamp) {
            self.raise(self.window.next_undelivered(self.floor));
            self.raise_lost(now);
            self.window.grow(self.floor, stamp);
        }
        self.raise(self.window.oldest_at(stamp));
        self.window.move_to(stamp);
    }

    /// A stamp that was seen, or is older than the window. The replay windows let no copy through, so a run of them
    /// means that the sender counts anew.
    #[cold]
    fn repeated(&mut self, now: Time, stamp: u32) -> Admit {
        self.stats.repeated += 1;
        self.stats.late += 1;
        self.stats.delivered += 1;
        self.repeated_run += 1;
        if self.repeated_run >= REPEATED_MAX {
            self.repeated_run = 0;
            self.restart();
            let stamp = self.unwrap_stamp(stamp);
            self.move_to(now, stamp);
            self.window.put(Set::Delivered, stamp, true);
        }
        Admit::Late
    }

    // ---- paths ----

    #[inline]
    fn track(&mut self, path: u8) -> Option<usize> {
        if self.paths.get(self.path_hint).is_some_and(|track| track.path == path) {
            return Some(self.path_hint);
        }
        let index = self.paths.iter().position(|track| track.path == path)?;
        self.path_hint = index;
        Some(index)
    }

    /// A packet came over the path: it has come as far as that, or it reorders.
    #[inline]
    fn note(&mut self, now: Time, path: u8, stamp: u64) {
        if let Some(index) = self.track(path) {
            self.paths[index].packet(now, stamp);
        }
    }

    /// Every missing stamp below this is lost: all paths have passed it.
    fn passed(&self, now: Time) -> u64 {
        let behind = self.window.top() + 1;
        self.paths.iter().map(|track| track.passed(now)).min().unwrap_or(behind).min(behind)
    }

    /// Raises the floor as far as the loss rule allows.
    fn raise_lost(&mut self, now: Time) {
        let passed = self.passed(now);
        let lost = match self.recovery_wait_us {
            None => passed,
            Some(wait_us) => {
                if passed > self.recovery.latest() {
                    self.recovery.record(now, passed, wait_us);
                }
                self.recovery.at(now, wait_us)
            }
        };
        self.stats.declared_lost += self.raise(lost);
    }

    /// When the loss rule will have something to say about `stamp`, if nothing more arrives.
    fn loss_due(&self, stamp: u64) -> Option<Time> {
        if let Some(wait_us) = self.recovery_wait_us
            && let Some(due) = self.recovery.due(stamp, wait_us)
        {
            return Some(due);
        }
        // All must have passed; the last one decides. With recovery on, its wait begins then.
        self.paths.iter().try_fold(Time::ZERO, |latest, track| Some(latest.max(track.due(stamp)?)))
    }

    // ---- the floor ----

    #[inline]
    fn is_delivered(&self, stamp: u64) -> bool {
        stamp < self.window.oldest() || self.window.has(Set::Delivered, stamp)
    }

    /// Whether a packet may pass its predecessor, which was not delivered.
    fn may_pass(&mut self, now: Time, predecessor: u64, same_path: bool) -> bool {
        if self.window.has(Set::Held, predecessor) {
            return false;
        }
        // The sender vouches for what it sent, not for what is held here: right after a flow has settled on a path a loss
        // from before may still hold some of it back. Packets with `same_path` are held in that case only.
        if same_path && self.recovery_wait_us.is_none() && self.held.same_path() == 0 {
            return true;
        }
        if predecessor >= self.floor {
            self.raise_lost(now);
        }
        // Released packets of the same flow may be waiting to be taken; they go first.
        predecessor < self.floor && self.held.ready() == 0
    }

    /// Gives up everything below `to` and releases who waits for it, the oldest first. Returns how many
    /// stamps were given up that somebody waited for and that had not arrived.
    fn raise(&mut self, to: u64) -> u64 {
        if to <= self.floor {
            return 0;
        }
        let mut missing = 0;
        while self.first_waited < to {
            let stamp = self.first_waited;
            missing += u64::from(!self.window.has(Set::Held, stamp));
            self.window.put(Set::Waited, stamp, false);
            self.held.make_ready(stamp);
            self.first_waited = self.window.next_waited(stamp + 1).unwrap_or(u64::MAX);
        }
        self.floor = to;
        missing
    }

    /// The packet with this stamp leaves; who waits for it comes next.
    #[inline]
    fn delivered(&mut self, stamp: u64) {
        self.stats.delivered += 1;
        self.window.put(Set::Delivered, stamp, true);
        if self.held.len() > 0 {
            self.delivered_to_waiters(stamp);
        }
    }

    fn delivered_to_waiters(&mut self, stamp: u64) {
        if !self.window.has(Set::Waited, stamp) {
            return;
        }
        self.window.put(Set::Waited, stamp, false);
        self.held.make_ready(stamp);
        if stamp == self.first_waited {
            self.first_waited = self.window.next_waited(stamp + 1).unwrap_or(u64::MAX);
        }
    }

    /// Applies what time alone decides.
    fn settle(&mut self, now: Time) {
        self.raise_lost(now);
        while let Some(stamp) = self.held.pop_expired(now) {
            self.stats.deadline_expired += self.raise(stamp + 1);
        }
        while self.held.waiting() > self.held_limit {
            self.stats.overflowed += 1;
            self.raise(self.first_waited.saturating_add(1));
        }
    }
}
