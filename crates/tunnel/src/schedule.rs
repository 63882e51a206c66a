//! Earliest-arrival scheduling over the paths of a bond.
//!
//! Every run of packets goes where it will *arrive* first:
//! `max(now, tx_free) + size / rate + relative one-way delay + k · jitter`. On equal links that is weighted
//! striping, on very unequal ones it is the link with the lowest delay, with nothing to set. To make packets
//! arrive in the order in which they were taken from the queue, a quick path may be *booked ahead*
//! by what the slowest path in use is slower ([`Choice::Send`] with `depart` in the future), and while
//! everything is booked up the packet stays in the queue ([`Choice::Wait`]), where FQ-CoDel can
//! still let another flow overtake it.
//!
//! [`choose`] looks at a snapshot; [`TxFree::reserve`] makes the booking. Several cores share one path: a
//! booking that another core made in between only moves the departure, it is never lost.
//! Cost: some ten nanoseconds a path, no allocation.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::time::Time;

pub use even_shares::EvenShares;

mod even_shares;
#[cfg(test)]
mod testbond;
#[cfg(test)]
mod tests;

/// One path at this moment, for the scheduler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathView {
    /// The path's number.
    pub id: u8,
    /// Bytes per second it may be sent ([`crate::rate::RateController::rate`]); 0 counts as unusable.
    pub rate: u64,
    /// When everything that is booked on it will have left ([`TxFree::get`]).
    pub tx_free: Time,
    /// One-way delay in microseconds against the other paths of the bond; any common offset.
    /// Best with the standing queue: [`crate::rate::RateController::delay_us`].
    pub delay_us: i64,
    /// Half of its round trip, added to that on a path that carried nothing yet, microseconds. Were it taken for quick, a flow's first
    /// packets would all wait for those that it carries, and the sender would end its slow start.
    pub unmeasured_us: i64,
    /// Jitter of that delay in microseconds.
    pub jitter_us: u32,
    /// Preference: of the usable paths only those of the lowest tier are used.
    pub tier: u8,
    /// Up, and validated for bulk data.
    pub usable: bool,
}

impl PathView {
    fn ready(&self) -> bool {
        self.usable && self.rate > 0
    }

    /// Nanoseconds `bytes` take at the path's rate.
    fn serialise_ns(&self, bytes: u32) -> i64 {
        serialise_ns(u64::from(bytes), self.rate).min(MAX_NS) as i64
    }

    /// When a packet that leaves at once arrives, against the other paths, in nanoseconds.
    pub(crate) fn arrival_ns(&self, bytes: u32) -> i64 {
        self.delay_ns() + self.serialise_ns(bytes)
    }

    /// Relative delay with the safety margin for jitter, in nanoseconds.
    fn delay_ns(&self) -> i64 {
        let delay = self.delay_us.saturating_add(self.unmeasured_us).clamp(-MAX_DELAY_US, MAX_DELAY_US);
        (delay + i64::from(self.jitter_us) * JITTER_FACTOR).min(2 * MAX_DELAY_US) * 1_000
    }
}

/// How a packet wants to be scheduled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Throughput: earliest arrival over all paths that help.
    Bulk,
    /// Latency: the path with the lowest delay, at once and past the bookings of bulk traffic.
    Sparse,
}

/// Limits of a class of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClassPolicy {
    /// Which of the two rules applies.
    pub class: Class,
    /// Largest difference of delays in microseconds over which one flow is spread.
    pub reorder_budget_us: u32,
    /// Paths of a higher tier are never used.
    pub tier_max: u8,
}

impl ClassPolicy {
    /// Throughput, delays up to 150 ms apart, any tier.
    pub const BULK: Self = Self { class: Class::Bulk, reorder_budget_us: 150_000, tier_max: u8::MAX };
    /// Lowest delay, any tier.
    pub const SPARSE: Self = Self { class: Class::Sparse, ..Self::BULK };

    /// The usual policy of a class.
    pub const fn of(class: Class) -> Self {
        match class {
            Class::Bulk => Self::BULK,
            Class::Sparse => Self::SPARSE,
        }
    }
}

/// Decision on the next run of packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Send it over this path; its first byte should leave at `depart` (`now` at the earliest).
    Send {
        /// [`PathView::id`].
        path: u8,
        /// When the path is free for it.
        depart: Time,
    },
    /// Leave it in the queue and ask again then, or when a path's rate or state changes.
    Wait {
        /// When the first path may be booked again.
        until: Time,
    },
    /// No path may be used at all.
    None,
}

/// A path may always be booked this far ahead, so that a timer tick or a busy core leaves no gap.
pub const AHEAD_US: u64 = 4_000;
/// Sparse packets pass a path's bookings unless more than this is booked beyond the usual.
const SPARSE_AHEAD_US: u64 = 8_000;
/// Packets stay on the path of their predecessor for about this many bytes …
const RUN_BYTES: u32 = 8 * 1500;
/// … and this much time, if that costs them no more than as much delay.
const RUN_NS_MAX: i64 = 2_000_000;
/// Safety margin of a path's delay in units of its jitter.
const JITTER_FACTOR: i64 = 1;
/// A path slower than this share of all (1 / 50) …
const MINOR_SHARE: u64 = 50;
/// … must not have this much more delay than the quickest, or it costs more than it adds.
const MINOR_SPREAD_NS: i64 = 20_000_000;
/// Bounds of what the arithmetic takes; far beyond what any link does.
const MAX_DELAY_US: i64 = 100_000_000;
const MAX_NS: u64 = 1_000_000_000_000;

/// The path for the next `bytes` (a packet, or a run that is to stay together) and when it leaves.
/// `last` is the path of the previous run of the same flow or queue; runs of 2–8 packets form by preferring it.
pub fn choose(now: Time, paths: &[PathView], bytes: u32, class: &ClassPolicy, last: Option<u8>) -> Choice {
    let Some(set) = Candidates::of(paths, class) else { return Choice::None };
    if class.class == Class::Sparse
        && let Some(choice) = set.at_once(now, paths, bytes)
    {
        return choice;
    }
    let mut best: Option<Offer> = None; // earliest arrival of all
    let mut bookable: Option<Offer> = None; // … of those that may be booked now
    let mut same: Option<Offer> = None; // the predecessor's path, when it may be booked now
    let mut until = Time::MAX;
    for path in paths.iter().filter(|path| set.contains(path)) {
        let offer = Offer::of(now, path, bytes, set.quickest_ns);
        if best.is_none_or(|other| offer.cost_ns < other.cost_ns) {
            best = Some(offer);
        }
        let ahead_ns = set.ahead_ns(path);
        if path.tx_free <= now.plus_ns(ahead_ns) {
            if bookable.is_none_or(|other| offer.cost_ns < other.cost_ns) {
                bookable = Some(offer);
            }
            if last == Some(path.id) {
                same = Some(offer);
            }
        } else {
            until = until.min(Time::from_ns(path.tx_free.ns() - ahead_ns));
        }
    }
    match (best, bookable) {
        // Waiting for the best path is worth it only if it is a quarter quicker (ECF's hysteresis).
        (Some(best), Some(good)) if good.cost_ns <= best.cost_ns + best.cost_ns / 4 => match same {
            Some(same) if same.cost_ns <= good.cost_ns + same.run_ns => same.send(),
            _ => good.send(),
        },
        _ if until > now && until < Time::MAX => Choice::Wait { until },
        _ => Choice::None,
    }
}

/// When the next `bytes` of a flow leave that stays on the path `own`; `paths` are all that its traffic shares it with, whose
/// bookings may reach as far ahead as the slowest of them is slower.
pub fn choose_on(now: Time, paths: &[PathView], own: &PathView, class: &ClassPolicy) -> Choice {
    let usual_ns = Candidates::of(paths, class).map_or(AHEAD_US * 1_000, |set| set.ahead_ns(own));
    let at_once = class.class == Class::Sparse;
    let ahead_ns = usual_ns + if at_once { SPARSE_AHEAD_US * 1_000 } else { 0 };
    if own.rate == 0 {
        Choice::None
    } else if own.tx_free > now.plus_ns(ahead_ns) {
        Choice::Wait { until: Time::from_ns(own.tx_free.ns() - ahead_ns) }
    } else {
        Choice::Send { path: own.id, depart: if at_once { now } else { own.tx_free.max(now) } }
    }
}

/// How long before its departure a packet may be booked on the path with this number at most, microseconds.
pub fn ahead_us(paths: &[PathView], id: u8) -> u64 {
    let own = paths.iter().find(|path| path.id == id);
    let set = Candidates::of(paths, &ClassPolicy::BULK);
    own.zip(set).map_or(AHEAD_US, |(own, set)| set.ahead_ns(own) / 1_000)
}

/// One path's answer to "when would it arrive?".
#[derive(Clone, Copy)]
struct Offer {
    path: u8,
    depart: Time,
    /// Arrival, as nanoseconds after the moment an empty packet sent now over the quickest path would arrive.
    cost_ns: i64,
    /// How much later than the best a run may arrive to stay on this path.
    run_ns: i64,
}

impl Offer {
    fn of(now: Time, path: &PathView, bytes: u32, quickest_ns: i64) -> Self {
        let depart = path.tx_free.max(now);
        let wait_ns = depart.since(now).min(MAX_NS) as i64;
        Self {
            path: path.id,
            depart,
            cost_ns: wait_ns + path.serialise_ns(bytes) + path.delay_ns() - quickest_ns,
            run_ns: path.serialise_ns(RUN_BYTES).min(RUN_NS_MAX),
        }
    }

    fn send(self) -> Choice {
        Choice::Send { path: self.path, depart: self.depart }
    }
}

/// Which paths take part: the lowest usable tier, without those that cost more than they add.
struct Candidates {
    tier: u8,
    /// Delays (with jitter) of the quickest and the slowest path taking part.
    quickest_ns: i64,
    slowest_ns: i64,
    /// Slower paths with at least this delay stay out.
    minor_rate: u64,
    minor_delay_ns: i64,
}

impl Candidates {
    fn of(paths: &[PathView], class: &ClassPolicy) -> Option<Self> {
        let usable = |path: &&PathView| path.ready() && path.tier <= class.tier_max;
        let tier = paths.iter().filter(usable).map(|path| path.tier).min()?;
        let in_tier = |path: &&PathView| path.ready() && path.tier == tier;
        let mut set = Self {
            tier,
            quickest_ns: i64::MAX,
            slowest_ns: i64::MIN,
            minor_rate: 0,
            minor_delay_ns: i64::MAX,
        };
        let mut sum = 0u64;
        for path in paths.iter().filter(in_tier) {
            let delay_ns = path.delay_ns();
            set.quickest_ns = set.quickest_ns.min(delay_ns);
            set.slowest_ns = set.slowest_ns.max(delay_ns);
            sum = sum.saturating_add(path.rate);
        }
        let budget_ns = i64::from(class.reorder_budget_us) * 1_000;
        if set.slowest_ns - set.quickest_ns > budget_ns.min(MINOR_SPREAD_NS) {
            set.leave_out(paths, budget_ns, sum / MINOR_SHARE);
        }
        Some(set)
    }

    /// Narrows the set to the window of delays, one budget wide, that has most capacity (a slow link with
    /// low delay does not
    /// shut out a fast satellite), then leaves out what is slow in both senses.
    #[cold]
    fn leave_out(&mut self, paths: &[PathView], budget_ns: i64, minor_rate: u64) {
        let mut most = 0;
        let mut window = (self.quickest_ns, self.slowest_ns);
        for first in paths.iter().filter(|path| self.in_tier(path)) {
            let from = first.delay_ns();
            let to = from.saturating_add(budget_ns);
            let inside = |path: &&PathView| self.in_tier(path) && (from..=to).contains(&path.delay_ns());
            let rate = paths.iter().filter(inside).fold(0u64, |sum, path| sum.saturating_add(path.rate));
            if rate > most || (rate == most && from < window.0) {
                most = rate;
                window = (from, to);
            }
        }
        (self.quickest_ns, self.slowest_ns) = window;
        self.minor_rate = minor_rate;
        self.minor_delay_ns = self.quickest_ns.saturating_add(MINOR_SPREAD_NS);
        let slowest = paths.iter().filter(|path| self.contains(path)).map(PathView::delay_ns).max();
        self.slowest_ns = slowest.unwrap_or(self.quickest_ns);
    }

    fn in_tier(&self, path: &PathView) -> bool {
        path.ready() && path.tier == self.tier
    }

    fn contains(&self, path: &PathView) -> bool {
        let delay_ns = path.delay_ns();
        self.in_tier(path)
            && (self.quickest_ns..=self.slowest_ns).contains(&delay_ns)
            && (path.rate >= self.minor_rate || delay_ns < self.minor_delay_ns)
    }

    /// How far ahead a path may be booked: until its packets arrive as late as the slowest path's.
    fn ahead_ns(&self, path: &PathView) -> u64 {
        (self.slowest_ns - path.delay_ns()).max(0) as u64 + AHEAD_US * 1_000
    }

    /// The path on which a packet that passes all bookings arrives first.
    fn at_once(&self, now: Time, paths: &[PathView], bytes: u32) -> Option<Choice> {
        let free = |path: &&PathView| {
            let ahead_ns = self.ahead_ns(path) + SPARSE_AHEAD_US * 1_000;
            self.in_tier(path) && path.tx_free <= now.plus_ns(ahead_ns)
        };
        let best = paths.iter().filter(free).min_by_key(|path| path.arrival_ns(bytes))?;
        Some(Choice::Send { path: best.id, depart: now })
    }
}

/// Nanoseconds that `bytes` take at `rate` bytes per second; `u64::MAX` when the rate is 0.
pub fn serialise_ns(bytes: u64, rate: u64) -> u64 {
    match bytes.checked_mul(1_000_000_000) {
        Some(product) => product.checked_div(rate).unwrap_or(u64::MAX),
        None => u64::MAX,
    }
}

/// When a path is free: one atomic word per path and cap, shared by all cores, reserved per run of datagrams.
#[derive(Debug, Default)]
pub struct TxFree(AtomicU64);

impl TxFree {
    /// Free since the start.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// The moment everything booked so far will have left.
    pub fn get(&self) -> Time {
        Time::from_ns(self.0.load(Ordering::Relaxed))
    }

    /// Books `bytes` at `rate` bytes per second and returns when they may leave, `now` at the earliest. Time
    /// the path was idle
    /// is lost, except for `credit_us`: how late a busy core may come without losing the slot (0–2,000).
    pub fn reserve(&self, now: Time, bytes: u64, rate: u64, credit_us: u64) -> Time {
        // An hour is as good as never, and cannot overflow.
        let takes_ns = serialise_ns(bytes, rate).min(3_600_000_000_000);
        let floor_ns = now.ns().saturating_sub(credit_us.saturating_mul(1_000));
        let next = |free: u64| free.max(floor_ns).saturating_add(takes_ns);
        // Relaxed: the word orders nothing but itself.
        let mut free = self.0.load(Ordering::Relaxed);
        while let Err(seen) =
            self.0.compare_exchange_weak(free, next(free), Ordering::Relaxed, Ordering::Relaxed)
        {
            free = seen;
        }
        Time::from_ns(free).max(now)
    }

    /// Forgets all bookings beyond `now`, after the path came back or its rate rose a lot.
    pub fn clear(&self, now: Time) {
        self.0.fetch_min(now.ns(), Ordering::Relaxed);
    }
}
