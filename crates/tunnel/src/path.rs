//! One path of a bond: a local address × a remote address (row T1).
//!
//! A [`Path`] is shared by all cores. What a core needs per run of packets (rate, booking, delay,
//! state) is atomic; what changes per report lies behind a mutex that is taken some hundred times a
//! second, never per packet.

use std::net::{IpAddr, SocketAddr};
use std::sync::Mutex;
use std::sync::atomic::{
    AtomicBool, AtomicI64, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering::Relaxed,
};

use arc_swap::ArcSwap;

mod lanes;
use lanes::{Carried, Lanes};

use crate::class::CLASSES;
use crate::rate::{RateController, Sample};
use crate::schedule::{PathView, TxFree};
use crate::time::Time;

/// Bytes that IPv4, UDP and an Ethernet frame add to a datagram on the wire (20 + 8 + 38).
/// Used for pacing only; IPv6 adds 20 more.
pub const WIRE_OVERHEAD_BYTES: u32 = 66;

/// UDP payload that nearly every path carries: IPv6's minimum MTU less IPv6 and UDP headers.
pub const BASE_DATAGRAM_BYTES: u16 = 1232;

/// Smallest UDP payload with which a path is used: what every IPv4 host takes (576 bytes, RFC 791 §3.1) less IPv4 and UDP headers.
pub const LEAST_DATAGRAM_BYTES: u16 = 548;

/// So many lost datagrams that a smaller path could be the reason for ask for a look at once.
const MANY_LARGE_LOST: u32 = 8;

/// Start rate of a path nobody has measured yet, bytes per second (20 Mbit/s).
const START_RATE: u64 = 2_500_000;
/// The controller never goes below this, bytes per second (16 kbit/s).
const MIN_RATE: u64 = 2_000;

/// More than all costs of both ends: the price of a path over a metered WAN.
pub const METERED_PRICE: u32 = 1 << 20;

/// A standing queue not seen again for this long is gone.
const QUEUE_STALE_NS: u64 = 200_000_000;
/// A busy core may come this late without losing its slot.
const BOOK_CREDIT_US: u64 = 1_000;

/// Life of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PathState {
    /// Not proven yet: a challenge is out. Carries nothing but control frames.
    Probing = 0,
    /// Carries everything.
    Up = 1,
    /// Data is outstanding and reports stopped: new data goes elsewhere, probing goes on.
    Suspect = 2,
    /// Silent for a second, or its interface is gone.
    Down = 3,
}

impl PathState {
    /// The state with this number; unknown numbers are `Down`.
    pub const fn from_u8(value: u8) -> Self {
        match value {
            0 => Self::Probing,
            1 => Self::Up,
            2 => Self::Suspect,
            _ => Self::Down,
        }
    }

    /// Name as `status` prints it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Probing => "probing",
            Self::Up => "up",
            Self::Suspect => "suspect",
            Self::Down => "down",
        }
    }
}

/// Where a path's datagrams go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// WAN id of the local side.
    pub wan: u16,
    /// Local source address; `None` lets the kernel choose.
    pub local: Option<IpAddr>,
    /// Remote address.
    pub remote: SocketAddr,
}

/// Reports since the controller last looked.
struct Feedback {
    controller: RateController,
    lanes: Lanes,
    arrival_us: u32,
    arrival_known: bool,
    sampled_at: Time,
    loss_ratio: f64,
    delivered: u64,
}

/// Of [`Path::hops`], where they are not known.
const HOPS_UNKNOWN: u8 = u8::MAX;

/// One path, shared by all cores of the node.
pub struct Path {
    /// Path id, the header's path byte. Not reused within a key epoch.
    pub id: u8,
    route: ArcSwap<Route>,
    /// Raised by one whenever the remote address changes; cores forget learned ports of the old address.
    route_version: AtomicU32,
    state: AtomicU8,
    reason: Mutex<&'static str>,
    /// Chosen to carry packets; see [`crate::lifecycle`] for which of the paths over one WAN are.
    chosen: AtomicBool,
    /// Of the lowest tier that works.
    preferred: AtomicBool,
    tier: AtomicU8,
    /// We may send data over it.
    may_send: AtomicBool,
    price: AtomicU32,
    rate: AtomicU64,
    tx_free: TxFree,
    delay_us: AtomicI64,
    assumed_us: AtomicI64,
    jitter_us: AtomicU32,
    queue_us: AtomicU32,
    rtt_us: AtomicU32,
    rttvar_us: AtomicU32,
    limited: AtomicBool,
    large_lost: AtomicU32,
    datagram_bytes: AtomicU16,
    /// When the controller last had a sample, ns.
    sampled_at: AtomicU64,
    heard_at: AtomicU64,
    /// Routers that datagrams pass on their way here; [`HOPS_UNKNOWN`]: nobody tells.
    hops: AtomicU8,
    sent_at: AtomicU64,
    confirmed_at: AtomicU64,
    control_turn: AtomicU32,
    feedback: Mutex<Feedback>,
    /// Datagrams and bytes sent and received, all cores.
    pub traffic: Traffic,
}

/// Counters of one path.
#[derive(Default)]
pub struct Traffic {
    /// Datagrams sent.
    pub tx_datagrams: AtomicU64,
    /// UDP payload bytes sent.
    pub tx_bytes: AtomicU64,
    /// Authenticated datagrams received.
    pub rx_datagrams: AtomicU64,
    /// UDP payload bytes of them.
    pub rx_bytes: AtomicU64,
    /// Datagrams sent again for another path.
    pub retransmitted: AtomicU64,
    /// Copies of other paths' datagrams, of class `critical`.
    pub copies: AtomicU64,
    /// By [`crate::class::Class`], what was sent first over this path.
    pub classes: [ClassTraffic; CLASSES],
}

/// Counters of one class on one path.
#[derive(Default)]
pub struct ClassTraffic {
    /// Inner packets.
    pub packets: AtomicU64,
    /// Bytes on the wire for them.
    pub bytes: AtomicU64,
}

/// News of one report entry about a path.
#[derive(Clone, Copy, Debug)]
pub struct Feedbacked {
    /// Lane, by its sending and its receiving core.
    pub lane: (u8, u8),
    /// Bytes newly delivered.
    pub bytes: u64,
    /// Datagrams newly received.
    pub received: u32,
    /// Datagrams newly counted as lost.
    pub lost: u32,
    /// Receiver clock when the newest datagram arrived, µs, wraps.
    pub arrival_us: u32,
    /// Receiver clock when the report was made, µs, wraps.
    pub told_us: u32,
    /// Times of the newest datagram; `None`: it is not known any more when it left.
    pub times: Option<Times>,
}

/// Times of a datagram that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// Relative one-way delay, µs.
    pub owd_us: i64,
    /// Round-trip time without the report's holding time, µs.
    pub rtt_us: u32,
}

impl Path {
    /// A new path in state `Probing`.
    pub fn new(id: u8, route: Route, tier: u8, rate_max: Option<u64>, now: Time) -> Self {
        let controller = RateController::new(START_RATE, MIN_RATE, rate_max);
        let rate = controller.rate();
        Self {
            id,
            route: ArcSwap::from_pointee(route),
            route_version: AtomicU32::new(0),
            state: AtomicU8::new(PathState::Probing as u8),
            reason: Mutex::new("new"),
            chosen: AtomicBool::new(false),
            preferred: AtomicBool::new(true),
            tier: AtomicU8::new(tier),
            may_send: AtomicBool::new(true),
            price: AtomicU32::new(0),
            rate: AtomicU64::new(rate),
            tx_free: TxFree::new(),
            delay_us: AtomicI64::new(0),
            assumed_us: AtomicI64::new(0),
            jitter_us: AtomicU32::new(0),
            queue_us: AtomicU32::new(0),
            rtt_us: AtomicU32::new(0),
            rttvar_us: AtomicU32::new(0),
            limited: AtomicBool::new(false),
            large_lost: AtomicU32::new(0),
            datagram_bytes: AtomicU16::new(LEAST_DATAGRAM_BYTES),
            sampled_at: AtomicU64::new(0),
            heard_at: AtomicU64::new(now.ns()),
            hops: AtomicU8::new(HOPS_UNKNOWN),
            sent_at: AtomicU64::new(0),
            confirmed_at: AtomicU64::new(0),
            control_turn: AtomicU32::new(0),
            feedback: Mutex::new(Feedback {
                controller,
                lanes: Lanes::default(),
                arrival_us: 0,
                arrival_known: false,
                sampled_at: now,
                loss_ratio: 0.0,
                delivered: 0,
            }),
            traffic: Traffic::default(),
        }
    }

    /// Where datagrams go now.
    pub fn route(&self) -> Route {
        **self.route.load()
    }

    /// Version of the route; changes with the remote address.
    pub fn route_version(&self) -> u32 {
        self.route_version.load(Relaxed)
    }

    /// The peer misses a datagram larger than every path carries.
    pub fn note_large_lost(&self) {
        self.large_lost.fetch_add(1, Relaxed);
    }

    /// Whether many such datagrams were lost since [`Self::take_large_lost`].
    pub fn many_large_lost(&self) -> bool {
        self.large_lost.load(Relaxed) >= MANY_LARGE_LOST
    }

    /// Whether such a datagram was lost since the last call.
    pub fn take_large_lost(&self) -> bool {
        self.large_lost.load(Relaxed) != 0 && self.large_lost.swap(0, Relaxed) != 0
    }

    /// Follows a peer that roamed (after its challenge), or a WAN that changed address.
    pub fn set_route(&self, route: Route) {
        self.route.store(std::sync::Arc::new(route));
        self.route_version.fetch_add(1, Relaxed);
    }

    /// State now.
    pub fn state(&self) -> PathState {
        PathState::from_u8(self.state.load(Relaxed))
    }

    /// Why it has that state.
    pub fn reason(&self) -> &'static str {
        self.reason.lock().map_or("", |reason| *reason)
    }

    /// Changes the state; returns the old one when it differed.
    pub fn set_state(&self, state: PathState, reason: &'static str) -> Option<PathState> {
        let old = PathState::from_u8(self.state.swap(state as u8, Relaxed));
        if old == state {
            return None;
        }
        if let Ok(mut text) = self.reason.lock() {
            *text = reason;
        }
        Some(old)
    }

    /// Whether it is up.
    pub fn usable(&self) -> bool {
        self.state() == PathState::Up
    }

    /// Whether new data may use it: up, of the lowest tier that works, and one of the bond's useful permutations (row
    /// T1).
    pub fn carries(&self) -> bool {
        self.usable() && self.chosen.load(Relaxed) && self.preferred.load(Relaxed)
    }

    /// Whether it is up, while another path covers its WAN and address.
    pub fn stands_by(&self) -> bool {
        self.usable() && !self.chosen.load(Relaxed)
    }

    /// Chooses it, or puts it on standby.
    pub fn choose(&self, chosen: bool) {
        self.chosen.store(chosen, Relaxed);
    }

    /// Says whether it is of the lowest tier that works: paths of higher ones carry keepalives only.
    pub fn prefer(&self, preferred: bool) {
        self.preferred.store(preferred, Relaxed);
    }

    /// Whether we may send data over it, by the directions of both ends' WANs.
    pub fn may_send(&self) -> bool {
        self.may_send.load(Relaxed)
    }

    /// Price, for comparison: both ends' costs, and more than all of them if one of them is metered.
    pub fn price(&self) -> u32 {
        self.price.load(Relaxed)
    }

    /// Preference tier, the higher of both ends' wishes.
    pub fn tier(&self) -> u8 {
        self.tier.load(Relaxed)
    }

    /// Largest UDP payload proven to pass, bytes.
    pub fn datagram_bytes(&self) -> usize {
        usize::from(self.datagram_bytes.load(Relaxed))
    }

    /// Sets the largest UDP payload.
    pub fn set_datagram_bytes(&self, bytes: u16) {
        self.datagram_bytes.store(bytes, Relaxed);
    }

    /// Sets the preference tier and the rate cap.
    pub fn set_limits(&self, tier: u8, rate_max: Option<u64>) {
        let before = self.tier.swap(tier, Relaxed);
        if before != tier {
            tracing::info!(path = self.id, from = before, to = tier, "tier");
        }
        if let Ok(mut feedback) = self.feedback.lock() {
            feedback.controller.set_max(rate_max);
            self.rate.store(feedback.controller.rate(), Relaxed);
        }
    }

    /// Says what it costs.
    pub fn set_price(&self, price: u32) {
        self.price.store(price, Relaxed);
    }

    /// Says whether we may send data over it.
    pub fn set_may_send(&self, may_send: bool) {
        self.may_send.store(may_send, Relaxed);
    }

    /// View of the path for the scheduler.
    pub fn view(&self, now: Time) -> PathView {
        // A queue seen that long ago has drained; to believe in it would keep the path from being used again.
        let stale = now.since(Time::from_ns(self.sampled_at.load(Relaxed))) > QUEUE_STALE_NS;
        let queue_us = if stale { i64::from(self.queue_us.load(Relaxed)) } else { 0 };
        PathView {
            id: self.id,
            rate: self.rate.load(Relaxed),
            tx_free: self.tx_free.get(),
            delay_us: self.delay_us.load(Relaxed) - queue_us,
            unmeasured_us: self.unmeasured_us(),
            jitter_us: self.jitter_us.load(Relaxed),
            tier: self.tier.load(Relaxed),
            usable: self.carries(),
        }
    }

    /// Books `bytes` on the wire; returns when the first of them may leave. Several cores book at once:
    /// one compare-and-swap a run of packets.
    pub fn book(&self, now: Time, bytes: u64) -> Time {
        self.tx_free.reserve(now, bytes, self.rate.load(Relaxed), BOOK_CREDIT_US)
    }

    /// Gives back a booking whose bytes were never sent.
    pub fn clear_booking(&self, now: Time) {
        self.tx_free.clear(now);
    }

    /// Notes that packets had to wait for this path: its rate was the limit.
    pub fn note_limited(&self) {
        if !self.limited.load(Relaxed) {
            self.limited.store(true, Relaxed);
        }
    }

    /// Notes an authenticated datagram, and how many routers it passed.
    pub fn note_heard(&self, now: Time, hops: Option<u8>) {
        self.heard_at.store(now.ns(), Relaxed);
        let hops = hops.unwrap_or(HOPS_UNKNOWN);
        if self.hops.load(Relaxed) != hops {
            self.hops.store(hops, Relaxed);
        }
    }

    /// Routers that the peer's datagrams pass on their way here; `None`: not known, as over TLS.
    #[must_use]
    pub fn hops(&self) -> Option<u8> {
        Some(self.hops.load(Relaxed)).filter(|hops| *hops != HOPS_UNKNOWN)
    }

    /// When the last authenticated datagram came.
    pub fn heard_at(&self) -> Time {
        Time::from_ns(self.heard_at.load(Relaxed))
    }

    /// Whether the last one came within `ns`.
    pub fn heard_within(&self, now: Time, ns: u64) -> bool {
        now.since(self.heard_at()) < ns
    }

    /// Notes a datagram sent.
    pub fn note_sent(&self, now: Time) {
        self.sent_at.store(now.ns(), Relaxed);
    }

    /// When the last datagram left.
    pub fn sent_at(&self) -> Time {
        Time::from_ns(self.sent_at.load(Relaxed))
    }

    /// Counts control frames that any core of the peer may take, all cores' together.
    pub fn next_turn(&self) -> u32 {
        self.control_turn.fetch_add(1, Relaxed)
    }

    /// Notes a report that confirms datagrams sent over this path, whichever core sent them.
    pub fn note_confirmed(&self, now: Time) {
        self.confirmed_at.store(now.ns(), Relaxed);
    }

    /// When the last such report came.
    pub fn confirmed_at(&self) -> Time {
        Time::from_ns(self.confirmed_at.load(Relaxed))
    }

    /// How long after its departure a datagram is confirmed at the latest by the measured round trips, µs, not
    /// counting the pause between two reports.
    pub fn confirmation_us(&self) -> u64 {
        u64::from(self.rtt_us()) + 4 * u64::from(self.rttvar_us()) + u64::from(self.queue_us())
    }

    /// Smoothed round-trip time, µs; 0 = not measured.
    pub fn rtt_us(&self) -> u32 {
        self.rtt_us.load(Relaxed)
    }

    /// Round-trip time variation, µs.
    pub fn rttvar_us(&self) -> u32 {
        self.rttvar_us.load(Relaxed)
    }

    /// Relative one-way delay with the standing queue, µs; 0 as long as no data has shown it.
    pub fn delay_us(&self) -> i64 {
        self.delay_us.load(Relaxed)
    }

    /// Time that [`Self::assume_delay`] adds to a delay that was never measured, µs.
    fn unmeasured_us(&self) -> i64 {
        if self.sampled_at.load(Relaxed) == 0 { self.assumed_us.load(Relaxed) } else { 0 }
    }

    /// Delay variation, µs.
    pub fn jitter_us(&self) -> u32 {
        self.jitter_us.load(Relaxed)
    }

    /// Standing queue estimate, µs.
    pub fn queue_us(&self) -> u32 {
        self.queue_us.load(Relaxed)
    }

    /// Rate allowed, bytes per second on the wire.
    pub fn rate(&self) -> u64 {
        self.rate.load(Relaxed)
    }

    /// Loss ratio of the last second or so, 0–1, and bytes per second delivered.
    pub fn delivery(&self) -> (f64, u64) {
        self.feedback.lock().map_or((0.0, 0), |f| (f.loss_ratio, f.delivered))
    }

    /// Round-trip time from a ping, for paths without data.
    pub fn note_ping_rtt(&self, rtt_us: u32) {
        let old = self.rtt_us.load(Relaxed);
        let smoothed = if old == 0 { rtt_us } else { old - old / 8 + rtt_us / 8 };
        self.rtt_us.store(smoothed, Relaxed);
        if old == 0 {
            self.rttvar_us.store(rtt_us / 2, Relaxed);
        }
        self.assume_delay(0);
    }

    /// Takes half of the round trip for the one-way delay of what is not bulk, as long as no data has shown it. `offset_us`: what the peer's clock
    /// adds to a delay; 0 as long as no path of the bond has shown it.
    pub fn assume_delay(&self, offset_us: i64) {
        let rtt_us = self.rtt_us();
        if rtt_us > 0 {
            self.assumed_us.store(offset_us + i64::from(rtt_us / 2), Relaxed);
        }
    }

    /// Takes one report entry; runs the controller when all lanes have told.
    pub fn feedback(&self, now: Time, entry: &Feedbacked) {
        let Ok(mut f) = self.feedback.lock() else { return };
        let overhead = u64::from(entry.received) * u64::from(WIRE_OVERHEAD_BYTES);
        if let Some(carried) = f.lanes.add(now, entry, entry.bytes.saturating_add(overhead).min(1 << 40)) {
            self.sample(&mut f, &carried);
        }
    }

    /// A lane told again what it had told: nothing came since.
    pub fn lane_rests(&self, now: Time, lane: (u8, u8)) {
        let Ok(mut f) = self.feedback.lock() else { return };
        if let Some(carried) = f.lanes.rest(now, lane) {
            self.sample(&mut f, &carried);
        }
    }

    fn sample(&self, f: &mut Feedback, carried: &Carried) {
        let now = carried.at;
        let elapsed_us = now.since(f.sampled_at) / 1_000;
        let receiver_us = u64::from(carried.arrival_us.wrapping_sub(f.arrival_us));
        // The receiver's clock gives the exact interval; ours only stands in after a long pause.
        let interval_us = if f.arrival_known && receiver_us > 0 && receiver_us < 1_000_000 {
            receiver_us
        } else {
            elapsed_us
        };
        let sample = Sample {
            now,
            delivered_bytes: carried.bytes,
            interval_us,
            // Delay and arrival are of one and the same datagram, the newest: the controller sets them against each other.
            owd_us: carried.times.owd_us,
            rtt_us: carried.times.rtt_us,
            lost: carried.lost,
            received: carried.received,
            limited: self.limited.swap(false, Relaxed),
        };
        f.controller.on_sample(&sample);
        tracing::trace!(path = self.id, ?sample, rate = f.controller.rate(), "sample");
        f.arrival_us = carried.arrival_us;
        f.arrival_known = true;
        f.sampled_at = now;
        let total = f64::from(carried.lost) + f64::from(carried.received);
        if total > 0.0 {
            f.loss_ratio += (f64::from(carried.lost) / total - f.loss_ratio) * 0.02;
        }
        let rate_now = carried.bytes.saturating_mul(1_000_000) / interval_us.max(1);
        f.delivered = (f.delivered * 7 + rate_now) / 8;
        self.sampled_at.store(now.ns(), Relaxed);
        self.rate.store(f.controller.rate(), Relaxed);
        self.delay_us.store(f.controller.delay_us(), Relaxed);
        self.jitter_us.store(f.controller.jitter_us(), Relaxed);
        self.queue_us.store(f.controller.queue_delay_us(), Relaxed);
        self.rtt_us.store(f.controller.rtt_us(), Relaxed);
        self.rttvar_us.store(f.controller.rttvar_us(), Relaxed);
    }

    /// The path carries data again after silence: slow-start share, fresh bookings.
    pub fn restart(&self, now: Time) {
        self.clear_booking(now);
        // The queue that was seen last is long gone; believing in it would keep the path from being used again.
        let queue_us = self.queue_us.swap(0, Relaxed);
        self.delay_us.fetch_sub(i64::from(queue_us), Relaxed);
        if let Ok(mut feedback) = self.feedback.lock() {
            feedback.controller.restart(now);
            feedback.lanes.clear();
            feedback.arrival_known = false;
            feedback.sampled_at = now;
            self.rate.store(feedback.controller.rate(), Relaxed);
        }
    }
}
