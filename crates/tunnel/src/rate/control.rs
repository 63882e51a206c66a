//! The control laws of [`RateController`]: start-up, steady state, loss, probes, refresh.

use super::filters::{Entry, Floor, Sum};
use super::losses::Finding;
use super::{Cut, Drain, Phase, Probe, RateController};
use crate::time::Time;

/// Delay that ends the start-up, at least.
const STARTUP_QUEUE_US: f64 = 5_000.0;
/// The rate changes by 1 % for each 1 ms that the queue is off its target.
const GAIN_PER_US: f64 = 1.0 / 100_000.0;
/// Bounds of that correction.
const CORRECTION: (f64, f64) = (-0.5, 0.05);
/// First and largest step of growth.
pub(super) const STEP: (f64, f64) = (0.03, 0.5);
/// A source fills the rate if it sends this share of it: the rate may grow to …
const FILLED: f64 = 0.9;
/// … so many times what arrives, …
const ROOM: f64 = 1.5;
/// … and if it does not fill it, beyond what the link was seen to carry, so many times.
const ROOM_UNFILLED: f64 = 1.1;
/// A base delay not seen for this long is refreshed.
const REFRESH_AFTER_NS: u64 = 5_000_000_000;
/// … by draining for this long.
const REFRESH_US: u64 = 90_000;
/// … and a little more than the queue that is known.
pub(super) const REFRESH_DEPTH_US: f64 = 1_000.0;
/// First and largest gain of a probe, …
const PROBE_GAIN: (f64, f64) = (1.2, 1.4);
/// … the first one without noise, which must not be felt, …
const PROBE_GAIN_CALM: f64 = 1.06;
/// … when the rate has not grown for this long, …
const STUCK_NS: u64 = 1_000_000_000;
/// … for how long, …
const PROBE_US: u64 = 110_000;
/// … the pause after one that failed (doubles up to eight times this) …
pub(super) const PROBE_PAUSE_MS: u64 = 1_000;
/// … and the jitter from which on probes are needed.
const PROBE_JITTER_US: f64 = 700.0;
/// With a source that sends less than the link takes, only a queue this long, for as long, shows that the link takes less.
const CHOKED_US: f64 = 40_000.0;
/// Size of a full packet.
pub(super) const PACKET_BYTES: f64 = 1_500.0;

impl RateController {
    fn span_us(&self) -> f64 {
        self.seen.span_us(self.rtt.smoothed_us)
    }

    pub(super) fn recent(&self) -> Sum {
        self.seen.recent(self.rtt.smoothed_us)
    }

    pub(super) fn target_us(&self) -> f64 {
        self.seen.target_us(self.capacity)
    }

    pub(super) fn set_rate(&mut self, now: Time, rate: f64) {
        self.rate = rate.clamp(self.limits.min, self.limits.max);
        let recent = self.seen.window.sum(40_000.0, |_| true);
        // What will really leave: the pacer's rate if it is the limit, else what the source offers.
        let leaving = if recent.limited > 0 || recent.count == 0 {
            self.rate
        } else {
            self.rate.min(recent.delivered())
        };
        self.flight.push(now, leaving, self.rtt.smoothed_us as u64);
    }

    fn predicted_us(&self, now: Time, queue_us: f64) -> f64 {
        self.flight.predict(now, self.seen.lag_us, queue_us, self.capacity, self.seen.buffer_us)
    }

    pub(super) fn startup(&mut self, entry: &Entry) {
        let now = entry.at;
        let limit_us = STARTUP_QUEUE_US.max(2.0 * self.seen.jitter.us()).max(self.target_us());
        let recent = self.recent();
        if recent.received + recent.lost >= 30.0 {
            self.startup.least_loss = self.startup.least_loss.min(recent.loss());
        }
        // Before enough has come to tell what is lost at any rate, only a loss beyond that of every link counts.
        let usual = (0.05 + 2.0 * self.startup.least_loss).min(0.5);
        let overflow = entry.lost > 0.0 && recent.lost >= 8.0 && recent.loss() > usual;
        // Of a source that sends much less than it may, a late report tells of a busy host.
        let filled = recent.sent() > if recent.limited > 0 { 0.25 } else { 0.5 } * self.capacity;
        let queue = entry.queue_us > limit_us && (filled || self.chokes(&recent, entry.level_us));
        if queue || overflow {
            // One late report can be a busy host, two are a queue. Meanwhile: back to where there was none.
            self.startup.strikes += 1;
            if self.startup.strikes >= 2 || entry.queue_us > 8.0 * limit_us {
                self.end_startup(entry, limit_us);
            } else {
                self.set_rate(now, 0.5 * self.capacity);
            }
            return;
        }
        if self.startup.strikes > 0 {
            self.startup.strikes = 0;
            self.growth.at = now;
            self.set_rate(now, self.capacity);
            return;
        }
        let waited_us = now.since(self.growth.at) as f64 / 1e3;
        if entry.limited && waited_us >= self.rtt.smoothed_us + entry.arrival_us / 2.0 {
            let seen = recent.arrived().max(entry.delivered().min(entry.sent()));
            let next = (self.rate * 2.0).min(seen * 2.5).max(self.rate);
            self.growth.at = now;
            self.capacity = next;
            self.set_rate(now, next);
        } else {
            self.capacity = self.rate;
            self.set_rate(now, self.rate);
        }
    }

    fn end_startup(&mut self, entry: &Entry, limit_us: f64) {
        // What arrived while next to nothing was sent is no capacity.
        let least = 0.1 * self.rate.min(entry.sent());
        let busy = self.seen.window.sum(60_000.0, |entry| entry.queue_us > limit_us && entry.sent() > least);
        let measured = if busy.count > 0 { busy.arrived() } else { self.recent().arrived() };
        self.capacity = measured.min(self.capacity);
        self.growth.proven = self.capacity;
        self.phase = Phase::Steady;
        self.seen.window.truncate(busy.count.max(1));
        if busy.count == 0 {
            self.brim(entry.at.plus_ms(1_000));
        }
        self.losses.quiet(entry.at.plus_us(self.seen.lag_us + 100_000));
        self.growth.at = entry.at;
        self.follow(entry.at, entry.queue_us);
    }

    pub(super) fn steady(&mut self, entry: &Entry) {
        let now = entry.at;
        let target_us = self.target_us();
        let queue_us = entry.level_us;
        if self.undo(entry, target_us) || self.sudden(entry, target_us) {
            self.prober.running = None;
            self.follow(now, entry.queue_us);
            return;
        }
        if self.probing(entry, queue_us, target_us) {
            return;
        }
        if queue_us > 0.5 * target_us {
            self.busy(entry, queue_us, target_us);
        } else {
            self.not_busy(entry, queue_us, target_us);
        }
        if self.drain_failed(entry, queue_us, target_us) {
            // Not our queue: the delay of the path is what it is now.
            let base = self.seen.base.us().saturating_add(self.drain.least_us as i64);
            self.seen.base.reset(now, base);
            self.drain = Drain::default();
            self.seen.window.clear();
            // What made us cut, if we did, was the same mistake.
            let before = self.cut.take().map_or(0.0, |cut| cut.capacity_before);
            self.capacity = self.capacity.max(self.seen.floor.get(now)).max(before);
            self.follow(now, 0.0);
            return;
        }
        self.watch_loss(entry, queue_us, target_us);
        self.refresh(now, entry.limited && queue_us < 2.0 * target_us);
        self.follow(now, queue_us);
    }

    /// A cut whose queue vanished faster than it can have drained was a stall of a host or a cell.
    fn undo(&mut self, entry: &Entry, target_us: f64) -> bool {
        let Some(cut) = &mut self.cut else { return false };
        cut.queue_us = cut.queue_us.max(entry.queue_us);
        let cut = *cut;
        let since_us = entry.at.since(cut.at) as f64 / 1e3;
        let drained_us = self.rtt.smoothed_us + 0.6 * cut.queue_us + 30_000.0;
        if since_us > drained_us.max(2e6) {
            self.cut = None;
        }
        if entry.queue_us > target_us || since_us > drained_us {
            return false;
        }
        self.cut = None;
        self.capacity = self.capacity.max(cut.capacity_before);
        self.growth.proven = self.capacity;
        self.seen.window.truncate(1);
        true
    }

    /// The capacity fell at once: much less arrives than was sent and the delay jumps.
    fn sudden(&mut self, entry: &Entry, target_us: f64) -> bool {
        // Of a source that sends much less than the link takes, what arrives says nothing about the link, and a single delay may
        // be anything: `busy` looks longer.
        let enough = (entry.limited || entry.received >= 8.0) && entry.sent() > 0.5 * self.capacity;
        let jump_us = (4.0 * target_us).max(15_000.0);
        let rising = entry.send_us < 0.8 * entry.arrival_us;
        if !enough || !rising || entry.queue_us < jump_us || entry.delivered() > 0.75 * self.capacity {
            return false;
        }
        let capacity_before = self.capacity;
        self.capacity = entry.delivered();
        self.growth.proven = self.capacity;
        if self.cut.is_none() {
            self.cut = Some(Cut { at: entry.at, capacity_before, queue_us: entry.queue_us });
        }
        self.growth.step = STEP.0;
        self.growth.at = entry.at;
        self.seen.window.truncate(1);
        self.seen.floor = Floor::default();
        true
    }

    /// A queue stands: what arrives is what the link carries.
    fn busy(&mut self, entry: &Entry, queue_us: f64, target_us: f64) {
        let sum = self.seen.window.sum(self.span_us(), |entry| entry.queue_us > 0.3 * target_us);
        if sum.count < 2 {
            return;
        }
        self.growth.step = STEP.0;
        if queue_us > target_us {
            self.growth.at = self.growth.at.max(entry.at);
        }
        // What is lost at random was carried, too.
        let carried = sum.delivered() / (1.0 - sum.loss().min(self.losses.random()).min(0.5));
        let tolerance = self.slope_tolerance(&sum);
        let slope = sum.slope();
        // A source that sends nearly the rate may fill the link's queue just as well: bring that queue to
        // our side.
        // The pacer may limit single bursts of a source that sends next to nothing.
        let limited = sum.sent() > if sum.limited > 0 { 0.5 } else { 0.8 } * self.capacity;
        // Sending less than the link takes, what arrives says nothing about it.
        let filled = sum.sent() > if sum.limited > 0 { FILLED } else { 0.8 } * self.capacity;
        if (limited && slope.abs() > tolerance) || self.chokes(&sum, queue_us) {
            self.capacity += (carried - self.capacity) * 0.7;
        } else if limited && (carried > self.capacity || (queue_us > target_us && filled)) {
            self.capacity += (carried - self.capacity) / 8.0;
        }
        if queue_us < STARTUP_QUEUE_US.max(target_us) && slope < tolerance {
            // Everything arrives and the queue may be noise: never fall below what was carried just now.
            self.capacity = self.capacity.max(0.97 * self.seen.floor.get(entry.at));
        }
        self.growth.proven = self.capacity;
    }

    /// How fast a queue may seem to rise by noise alone.
    fn slope_tolerance(&self, sum: &Sum) -> f64 {
        (2.0 * self.seen.jitter.us() / sum.arrival_us).max(0.02)
    }

    /// However little is sent, the queue rises, beyond what any busy host does to a delay: the link takes even less.
    fn chokes(&self, sum: &Sum, queue_us: f64) -> bool {
        sum.slope() > self.slope_tolerance(sum)
            && queue_us > CHOKED_US.max(8.0 * self.seen.jitter.us())
            && sum.arrival_us > CHOKED_US
            && sum.delivered() < 0.9 * sum.sent()
    }

    /// Less than the capacity is sent and yet the delay stays: it is not our queue.
    fn drain_failed(&mut self, entry: &Entry, queue_us: f64, target_us: f64) -> bool {
        let due_us = self.drain.due_us + entry.arrival_us * (1.0 - entry.sent() / self.capacity);
        if queue_us < 1.5 * target_us || due_us <= 0.0 {
            self.drain = Drain { from_us: queue_us, least_us: queue_us, due_us: 0.0 };
            return false;
        }
        self.drain.due_us = due_us;
        self.drain.least_us = self.drain.least_us.min(queue_us);
        let enough_us = (0.5 * self.drain.from_us).max(15_000.0).max(6.0 * self.seen.jitter.us());
        if due_us < enough_us {
            return false;
        }
        let failed = self.drain.from_us - queue_us < 0.3 * due_us;
        if !failed {
            self.drain = Drain { from_us: queue_us, least_us: queue_us, due_us: 0.0 };
        }
        failed
    }

    /// No queue: the link carries at least what arrives, perhaps more.
    fn not_busy(&mut self, entry: &Entry, queue_us: f64, target_us: f64) {
        let recent = self.recent();
        let checking = self.losses.checking();
        if recent.count >= 3 && !checking {
            // Arrivals bunched by a delay that fell were sent no faster.
            let carried = recent.delivered().min(recent.sent());
            self.capacity = self.capacity.max(carried.min(1.05 * self.capacity));
        }
        if self.phase == Phase::Refresh || checking || recent.limited == 0 {
            return;
        }
        let now = entry.at;
        let waited_us = now.since(self.growth.at) as f64 / 1e3;
        let room = self.room(recent);
        let settled_us = self.rtt.smoothed_us + 1.5 * entry.arrival_us.min(50_000.0);
        if queue_us < 0.4 * target_us && waited_us >= settled_us && self.capacity < room {
            let next = (self.capacity * (1.0 + self.growth.step)).min(room);
            self.growth.step = (self.growth.step * 2.0).min(STEP.1);
            let proven = self.growth.proven;
            if self.capacity < proven && next > proven {
                // From here on each step may be too much.
                self.growth.step = STEP.0;
            }
            self.capacity = if self.capacity < proven { next.min(proven) } else { next };
            self.growth.at = now;
        }
    }

    /// How far the rate may grow while no queue is seen.
    fn room(&self, recent: Sum) -> f64 {
        let carried = recent.delivered();
        // What is lost at random was sent, too.
        if recent.sent() / (1.0 - recent.loss().min(0.5)) > FILLED * self.rate {
            return ROOM * carried;
        }
        // The pacer limits single bursts of a source that sends less. It may have what the link was seen to carry; more would show
        // only when the source wants it, by a queue as long as the surplus times a round trip.
        (ROOM_UNFILLED * carried).max(self.growth.proven.min(ROOM * carried))
    }

    /// Loss without delay: a policer or a very short buffer loses only what is too much.
    fn watch_loss(&mut self, entry: &Entry, queue_us: f64, target_us: f64) {
        let may_check = entry.limited && queue_us < 1.5 * target_us;
        match self.losses.add(entry, self.seen.lag_us, may_check) {
            Finding::Nothing => {}
            Finding::Excess => {
                self.unchecked = self.capacity;
                let carried = self.recent().delivered() / (1.0 - self.losses.random().min(0.5));
                self.capacity = self.capacity.min(0.98 * carried);
            }
            Finding::Congestion { until } => self.brim(until),
            Finding::Random => self.capacity = self.capacity.max(self.unchecked),
        }
    }

    /// No growth until then, and no correction upwards: the next packet too many is lost.
    fn brim(&mut self, until: Time) {
        self.growth.step = STEP.0;
        self.growth.at = until;
        self.growth.not_before = until;
    }

    /// Runs a probe, or begins one. True: the rate is set.
    fn probing(&mut self, entry: &Entry, queue_us: f64, target_us: f64) -> bool {
        let now = entry.at;
        let Some(mut probe) = self.prober.running.take() else {
            let unclear = (0.4 * target_us..2.0 * target_us).contains(&queue_us);
            let jitter_us = self.seen.jitter.us();
            let noisy = jitter_us > PROBE_JITTER_US.max(target_us / 4.0);
            // A base delay that was once measured too low looks like a queue for as long as it is remembered.
            let recent = self.recent();
            let whole = recent.loss() < self.losses.random() + 0.005;
            let stuck = whole && now.since(self.growth.at) > STUCK_NS;
            let may = self.phase == Phase::Steady && now >= self.prober.next_at && !self.losses.checking();
            if unclear && (noisy || stuck) && may && recent.limited > 1 {
                // The noisier, the more it takes to see something.
                let first = if noisy { PROBE_GAIN.0 } else { PROBE_GAIN_CALM };
                let gain = (first + jitter_us / 40_000.0).min(PROBE_GAIN.1);
                self.begin_probe(now, gain, recent.delivered());
                return true;
            }
            return false;
        };
        let half_ns = (entry.arrival_us * 500.0) as u64;
        let sent_ns = now.ns().saturating_sub(self.seen.lag_us * 1_000);
        if sent_ns <= probe.until.plus_ns(half_ns).ns() {
            if sent_ns > probe.from.plus_ns(half_ns).ns() {
                probe.sum.add(entry);
            }
            self.prober.running = Some(probe);
            if now < probe.until {
                self.set_rate(now, self.capacity * probe.gain);
            } else {
                self.follow(now, queue_us);
            }
            return true;
        }
        let more = |rate: f64| rate / probe.carried - 1.0 > 0.6 * (probe.gain - 1.0);
        if more(probe.sum.delivered()) && more(probe.sum.sent()) {
            self.capacity = (self.capacity * probe.gain).min(probe.sum.delivered()).max(self.capacity);
            self.prober.pause_ms = PROBE_PAUSE_MS;
            let gain = (2.0 * probe.gain - 1.0).min(PROBE_GAIN.1);
            self.begin_probe(now, gain, probe.sum.delivered());
            return true;
        }
        self.prober.next_at = now.plus_ms(self.prober.pause_ms);
        self.prober.pause_ms = (self.prober.pause_ms * 2).min(8 * PROBE_PAUSE_MS);
        false
    }

    fn begin_probe(&mut self, now: Time, gain: f64, carried: f64) {
        self.prober.running =
            Some(Probe { from: now, until: now.plus_us(PROBE_US), gain, carried, sum: Sum::default() });
        self.drain = Drain::default();
        self.set_rate(now, self.capacity * gain);
    }

    /// Now and then drains the queue to see the base delay.
    fn refresh(&mut self, now: Time, may_start: bool) {
        if let Some((until, base_us)) = self.refresh.last
            && self.phase == Phase::Refresh
        {
            let effect_at = until.plus_us(self.seen.lag_us + 60_000);
            if now < effect_at {
                return;
            }
            self.phase = Phase::Steady;
            let found_us = base_us.saturating_sub(self.seen.base.us());
            if (found_us as f64) < 500.0 + 0.5 * self.seen.jitter.us() {
                self.refresh.depth_us = REFRESH_DEPTH_US;
                return;
            }
            // There was more to drain than known: dig on.
            self.refresh.depth_us = (2.0 * self.refresh.depth_us).min(32_000.0);
        } else {
            let last = self.seen.base.seen().max(self.refresh.last.map_or(Time::ZERO, |(until, _)| until));
            if !may_start || now.since(last) < REFRESH_AFTER_NS {
                return;
            }
        }
        self.phase = Phase::Refresh;
        self.refresh.last = Some((now.plus_us(REFRESH_US), self.seen.base.us()));
    }

    /// The rate for the capacity and the queue that the next packets will meet.
    fn follow(&mut self, now: Time, queue_us: f64) {
        self.capacity = self.capacity.clamp(self.limits.min, self.limits.max);
        let ahead_us = self.predicted_us(now, queue_us);
        let draining =
            self.phase == Phase::Refresh && self.refresh.last.is_some_and(|(until, _)| now < until);
        let correction = if draining {
            (-self.refresh.depth_us - ahead_us) * 3.0 * GAIN_PER_US
        } else {
            (self.target_us() - ahead_us) * GAIN_PER_US
        };
        let correction = if now < self.growth.not_before { correction.min(-0.01) } else { correction };
        self.set_rate(now, self.capacity * (1.0 + correction.clamp(CORRECTION.0, CORRECTION.1)));
    }
}
