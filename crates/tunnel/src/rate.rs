//! The rate of one path: a shaper steered by delay and delivery, not a transport.
//!
//! The paths' packets wait in our own FQ-CoDel ([`crate::queue`]) and not in the modem: each path is
//! paced just at what it can carry. One [`RateController`] per path learns that from the peer's reports,
//! with nothing set by
//! hand. What flows through [`RateController::on_sample`]:
//!
//! 1. **Estimators** (`rate/measurements.rs`, made of `rate/filters.rs`): base delay, jitter, a window of reports. The delay of
//!    single packets is noisy (radio, bursts, a loaded host), so the queue is the *smallest* excess of the last
//!    three reports; what no report covers yet is predicted from the rates that were set.
//! 2. **Start-up**: doubles as long as the delay does not rise.
//! 3. **Steady**: an estimate of the capacity, taken from the delivery rate *only while a queue proves that
//!    the link is busy*, else raised in accelerating steps while our pacer is the limit;
//!    the rate is that capacity, corrected so that a small standing queue remains.
//! 4. **Refresh**: every few seconds the queue is drained for a moment to see the base delay again.
//!
//! Loss alone never slows: only loss that came with a higher rate and goes with a lower one does (policer,
//! very short buffer).
//! A delay that does not fall although less is sent is no queue of ours (new route, somebody else's
//! queue) and becomes the new base.

use crate::time::Time;

mod control;
mod filters;
mod losses;
mod measurements;
use control::{PACKET_BYTES, PROBE_PAUSE_MS, REFRESH_DEPTH_US, STEP};
use filters::{InFlight, Sum};
use losses::Losses;
use measurements::{Measurements, RoundTrip};

#[cfg(test)]
mod testcubic;
#[cfg(test)]
pub(crate) mod testlink;
#[cfg(test)]
mod tests;

/// News of one report about one path, over all its lanes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// When the report was received here.
    pub now: Time,
    /// Bytes that arrived since the report before.
    pub delivered_bytes: u64,
    /// Receiver's clock between the arrivals of the newest packets of this report and the one before, in
    /// microseconds.
    pub interval_us: u64,
    /// Arrival (receiver's clock) minus departure (ours) of the newest packet, in microseconds, arbitrary
    /// offset. Departure is when
    /// the packet was *due* ([`crate::schedule::TxFree::reserve`]) or, better, when it was really sent.
    pub owd_us: i64,
    /// From that packet's departure to `now`, without the time the report was held back; 0 = not known.
    pub rtt_us: u32,
    /// Packets of the interval that are missing.
    pub lost: u32,
    /// Packets of the interval that arrived.
    pub received: u32,
    /// Our pacer was the limit: since the sample before, a packet had to wait for this path.
    pub limited: bool,
}

/// State of the controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Doubling.
    Startup,
    /// Holding the small standing queue, or growing while there is none.
    Steady,
    /// Draining the queue for a moment to see the base delay.
    Refresh,
}

impl Phase {
    /// Name for status output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Startup => "startup",
            Self::Steady => "steady",
            Self::Refresh => "refresh",
        }
    }
}

/// A sudden cut, remembered in case it was a mistake.
#[derive(Clone, Copy, Debug)]
struct Cut {
    at: Time,
    capacity_before: f64,
    queue_us: f64,
}

/// Checks that a queue really drains when less is sent than the link takes.
#[derive(Clone, Copy, Debug, Default)]
struct Drain {
    /// Queue when it began, microseconds.
    from_us: f64,
    /// Smallest since.
    least_us: f64,
    /// Queue that should have drained since, microseconds.
    due_us: f64,
}

/// With a noisy delay a small queue cannot be told from none: sends a little more for a moment and looks
/// whether it arrives.
#[derive(Clone, Copy, Debug)]
struct Probe {
    from: Time,
    until: Time,
    /// How much more, 1.15–1.5.
    gain: f64,
    /// Arrivals before, bytes per second.
    carried: f64,
    /// Arrivals of the probe.
    sum: Sum,
}

/// The rates a controller keeps within, bytes per second.
#[derive(Debug)]
struct Limits {
    /// Where it starts while nothing is known.
    first: f64,
    /// Where it starts after a pause, at least: a link that was slow is not flooded.
    start: f64,
    min: f64,
    max: f64,
}

/// Start-up: whether the doubling has met the limit.
#[derive(Debug)]
struct Startup {
    /// Consecutive reports with a queue.
    strikes: u32,
    /// The smallest loss at any rate so far.
    least_loss: f64,
}

/// Growth while nothing shows the limit, in accelerating steps.
#[derive(Debug)]
struct Growth {
    /// When the rate last grew, or the moment from which on it may.
    at: Time,
    step: f64,
    /// Rate that the link was last seen to carry with a queue, bytes per second.
    proven: f64,
    /// Loss showed the limit: stay just below until then.
    not_before: Time,
}

/// Draining now and then, to see the base delay again.
#[derive(Debug)]
struct Refresh {
    /// End of the draining of the last refresh, and the base delay before it.
    last: Option<(Time, i64)>,
    /// How far below an empty queue a refresh aims.
    depth_us: f64,
}

/// Probes, one at a time.
#[derive(Debug)]
struct Prober {
    running: Option<Probe>,
    /// When the next one may begin.
    next_at: Time,
    /// How long to pause after one that failed.
    pause_ms: u64,
}

/// Finds the rate of one path; see the module documentation.
#[derive(Debug)]
pub struct RateController {
    limits: Limits,
    /// Bytes per second that are set now.
    rate: f64,
    /// Estimated capacity of the path.
    capacity: f64,
    phase: Phase,
    rtt: RoundTrip,
    seen: Measurements,
    flight: InFlight,
    startup: Startup,
    growth: Growth,
    cut: Option<Cut>,
    refresh: Refresh,
    drain: Drain,
    losses: Losses,
    /// Capacity before a check of the loss.
    unchecked: f64,
    prober: Prober,
}

impl RateController {
    /// A controller that starts at `start_bytes_per_s` and stays within `min` and `max` (the
    /// operator's `rate-max`; `None` = unlimited), all in bytes per second.
    pub fn new(start_bytes_per_s: u64, min: u64, max: Option<u64>) -> Self {
        let min = (min.max(1)) as f64;
        let max = max.map_or(f64::INFINITY, |max| max as f64).max(min);
        let start = (start_bytes_per_s as f64).clamp(min, max);
        Self {
            limits: Limits { first: start, start, min, max },
            rate: start,
            capacity: start,
            phase: Phase::Startup,
            rtt: RoundTrip::default(),
            seen: Measurements::new(),
            flight: InFlight::new(),
            startup: Startup { strikes: 0, least_loss: 1.0 },
            growth: Growth { at: Time::ZERO, step: STEP.0, proven: 0.0, not_before: Time::ZERO },
            cut: None,
            refresh: Refresh { last: None, depth_us: REFRESH_DEPTH_US },
            drain: Drain::default(),
            losses: Losses::new(),
            unchecked: 0.0,
            prober: Prober { running: None, next_at: Time::ZERO, pause_ms: PROBE_PAUSE_MS },
        }
    }

    /// Bytes per second the path may be sent now.
    pub fn rate(&self) -> u64 {
        self.rate as u64
    }

    /// Estimated capacity of the path, bytes per second.
    pub fn capacity(&self) -> u64 {
        self.capacity as u64
    }

    /// Relative one-way delay of the empty path in microseconds (offset of [`Sample::owd_us`]); 0 before the
    /// first sample.
    pub fn base_owd_us(&self) -> i64 {
        let base = self.seen.base.us();
        if base == i64::MAX { 0 } else { base }
    }

    /// Standing queue on the path in microseconds, robustly measured.
    pub fn queue_delay_us(&self) -> u32 {
        self.seen.window.queue_us(3, 80_000).min(f64::from(u32::MAX)) as u32
    }

    /// Relative one-way delay with the standing queue: what a scheduler should use.
    pub fn delay_us(&self) -> i64 {
        self.base_owd_us() + i64::from(self.queue_delay_us())
    }

    /// Noise of the one-way delay in microseconds (about one standard deviation).
    pub fn jitter_us(&self) -> u32 {
        self.seen.jitter.us() as u32
    }

    /// Smoothed round-trip time in microseconds; 0 before the first sample.
    pub fn rtt_us(&self) -> u32 {
        self.rtt.smoothed_us as u32
    }

    /// Mean deviation of the round-trip time in microseconds (RFC 6298).
    pub fn rttvar_us(&self) -> u32 {
        self.rtt.variation_us as u32
    }

    /// Bytes per second that arrived lately.
    pub fn delivered_rate(&self) -> u64 {
        self.seen.delivered as u64
    }

    /// Share of packets lost lately, 0–1.
    pub fn loss_ratio(&self) -> f64 {
        self.seen.loss
    }

    /// State of the controller.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Changes the operator's limit.
    pub fn set_max(&mut self, max: Option<u64>) {
        self.limits.max = max.map_or(f64::INFINITY, |max| max as f64).max(self.limits.min);
        self.limits.first = self.limits.first.min(self.limits.max);
        self.limits.start = self.limits.start.min(self.limits.max);
        self.capacity = self.capacity.min(self.limits.max);
        self.rate = self.rate.min(self.limits.max);
    }

    /// The path was idle for long or came back after an outage: what was known of it may be wrong. Starts
    /// again with half its rate, but at least with what a slow link was found to take, or the start rate, and a fresh base delay.
    pub fn restart(&mut self, now: Time) {
        if self.phase != Phase::Startup {
            self.limits.start =
                (self.rate / 2.0).clamp(self.limits.min, self.limits.first.max(self.limits.min));
        }
        let rate = (self.rate / 2.0).max(self.limits.start);
        let mut fresh = Self::new(1, 1, None);
        std::mem::swap(&mut fresh.limits, &mut self.limits);
        std::mem::swap(&mut fresh.rtt, &mut self.rtt);
        *self = fresh;
        self.capacity = rate;
        self.set_rate(now, rate);
    }

    /// Takes one report in and sets the rate.
    pub fn on_sample(&mut self, sample: &Sample) {
        let Some(sample) = self.seen.gather(sample) else { return };
        self.rtt.add(sample.rtt_us);
        self.seen.lag_us = u64::from(sample.rtt_us);
        let entry = self.seen.entry(&sample, self.capacity);
        // A link that loses most of what it gets has no gaps of the source's, however seldom something arrives.
        let source_gap = entry.send_us > 250_000.0f64.max(6.0 * PACKET_BYTES / self.rate * 1e6);
        if source_gap && entry.lost < entry.received {
            // Mostly silence: says something about the delay, nothing about the rate.
            self.seen.window.clear();
            self.seen.jitter.interrupt();
            self.seen.window.push(entry.delay_only());
            return;
        }
        self.seen.window.push(entry);
        if entry.queue_us > self.seen.buffer_us {
            self.seen.buffer_us = f64::INFINITY;
        } else if entry.queue_us > 20_000.0 && entry.lost > 0.2 * entry.received {
            self.seen.buffer_us = 1.1 * entry.queue_us;
        }
        let recent = self.recent();
        self.seen.delivered = recent.delivered();
        self.seen.loss += (entry.lost / (entry.lost + entry.received).max(1.0) - self.seen.loss) / 16.0;
        self.seen.floor.add(&entry);
        match self.phase {
            Phase::Startup => self.startup(&entry),
            Phase::Steady | Phase::Refresh => self.steady(&entry),
        }
    }
}
