//! The rate of one path: a shaper steered by delay and delivery, not a transport.
//!
//! The paths' packets wait in our own FQ-CoDel ([`crate::queue`]) and not in the modem: each path is
//! paced just at what it can carry. One [`RateController`] per path learns that from the peer's reports,
//! with nothing set by
//! hand. What flows through [`RateController::on_sample`]:
//!
//! 1. **Estimators** (`rate/filters.rs`): base delay, jitter, a window of reports. The delay of
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
use control::{GATHER_US, PACKET_BYTES, PROBE_PAUSE_MS, REFRESH_DEPTH_US, STEP};
use filters::{BaseDelay, Entry, Floor, InFlight, Jitter, Sum, Window};
use losses::Losses;

#[cfg(test)]
mod testcubic;
#[cfg(test)]
pub(crate) mod testlink;
#[cfg(test)]
mod tests;

/// What one report says about one path, over all its lanes.
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

/// What the controller is doing.
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

/// Jitter in microseconds below which a delay is believed sooner.
const CALM_US: f64 = 400.0;
/// Two weeks in microseconds.
const MAX_US: i64 = 1 << 40;

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
    /// What should have drained since, microseconds.
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
    /// What arrived before, bytes per second.
    carried: f64,
    /// What arrived of the probe.
    sum: Sum,
}

/// Finds the rate of one path; see the module documentation.
#[derive(Debug)]
pub struct RateController {
    start: f64,
    min: f64,
    max: f64,
    /// Bytes per second that are set now.
    rate: f64,
    /// What the path is believed to carry.
    capacity: f64,
    phase: Phase,
    pending: Option<Sample>,
    base: BaseDelay,
    jitter: Jitter,
    window: Window,
    flight: InFlight,
    last_owd_us: Option<i64>,
    level_us: f64,
    srtt_us: f64,
    rttvar_us: f64,
    delivered: f64,
    loss: f64,
    /// Start-up: consecutive reports with a queue.
    strikes: u32,
    grown_at: Time,
    step: f64,
    cut: Option<Cut>,
    /// End of the draining of the last refresh, and the base delay before it.
    refreshed: Option<(Time, i64)>,
    /// How far below an empty queue a refresh aims.
    depth_us: f64,
    drain: Drain,
    /// How much queue the link's buffer held when it overflowed last.
    buffer_us: f64,
    /// From the newest reported packet's departure to its report: how far back the reports look.
    lag_us: u64,
    floor: Floor,
    losses: Losses,
    /// Capacity before a check of the loss.
    unchecked: f64,
    /// Start-up: the smallest loss at any rate so far.
    least_loss: f64,
    /// Loss showed the limit: stay just below until then.
    brim_until: Time,
    probe: Option<Probe>,
    /// When the next probe may begin and how long to pause after one that failed.
    probe_at: Time,
    probe_pause_ms: u64,
}

impl RateController {
    /// A controller that starts at `start_bytes_per_s` and stays within `min` and `max` (the
    /// operator's `rate-max`; `None` = unlimited), all in bytes per second.
    pub fn new(start_bytes_per_s: u64, min: u64, max: Option<u64>) -> Self {
        let min = (min.max(1)) as f64;
        let max = max.map_or(f64::INFINITY, |max| max as f64).max(min);
        let start = (start_bytes_per_s as f64).clamp(min, max);
        Self {
            start,
            min,
            max,
            rate: start,
            capacity: start,
            phase: Phase::Startup,
            pending: None,
            base: BaseDelay::new(),
            jitter: Jitter::default(),
            window: Window::new(),
            flight: InFlight::new(),
            last_owd_us: None,
            level_us: 0.0,
            srtt_us: 0.0,
            rttvar_us: 0.0,
            delivered: 0.0,
            loss: 0.0,
            strikes: 0,
            grown_at: Time::ZERO,
            step: STEP.0,
            cut: None,
            refreshed: None,
            depth_us: REFRESH_DEPTH_US,
            drain: Drain::default(),
            buffer_us: f64::INFINITY,
            lag_us: 0,
            floor: Floor::default(),
            losses: Losses::new(),
            unchecked: 0.0,
            least_loss: 1.0,
            brim_until: Time::ZERO,
            probe: None,
            probe_at: Time::ZERO,
            probe_pause_ms: PROBE_PAUSE_MS,
        }
    }

    /// Bytes per second the path may be sent now.
    pub fn rate(&self) -> u64 {
        self.rate as u64
    }

    /// What the path is believed to carry, bytes per second.
    pub fn capacity(&self) -> u64 {
        self.capacity as u64
    }

    /// Relative one-way delay of the empty path in microseconds (offset of [`Sample::owd_us`]); 0 before the
    /// first sample.
    pub fn base_owd_us(&self) -> i64 {
        let base = self.base.us();
        if base == i64::MAX { 0 } else { base }
    }

    /// Standing queue on the path in microseconds, robustly measured.
    pub fn queue_delay_us(&self) -> u32 {
        self.window.queue_us(3, 80_000).min(f64::from(u32::MAX)) as u32
    }

    /// Relative one-way delay with the standing queue: what a scheduler should use.
    pub fn delay_us(&self) -> i64 {
        self.base_owd_us() + i64::from(self.queue_delay_us())
    }

    /// Noise of the one-way delay in microseconds (about one standard deviation).
    pub fn jitter_us(&self) -> u32 {
        self.jitter.us() as u32
    }

    /// Smoothed round-trip time in microseconds; 0 before the first sample.
    pub fn rtt_us(&self) -> u32 {
        self.srtt_us as u32
    }

    /// Mean deviation of the round-trip time in microseconds (RFC 6298).
    pub fn rttvar_us(&self) -> u32 {
        self.rttvar_us as u32
    }

    /// Bytes per second that arrived lately.
    pub fn delivered_rate(&self) -> u64 {
        self.delivered as u64
    }

    /// Share of packets lost lately, 0–1.
    pub fn loss_ratio(&self) -> f64 {
        self.loss
    }

    /// What the controller is doing.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Changes the operator's limit.
    pub fn set_max(&mut self, max: Option<u64>) {
        self.max = max.map_or(f64::INFINITY, |max| max as f64).max(self.min);
        self.start = self.start.min(self.max);
        self.capacity = self.capacity.min(self.max);
        self.rate = self.rate.min(self.max);
    }

    /// The path was idle for long or came back after an outage: what was known of it may be wrong. Starts
    /// again with half its rate
    /// (at least the start rate) and a fresh base delay.
    pub fn restart(&mut self, now: Time) {
        let rate = (self.rate / 2.0).max(self.start);
        let (start, min, max) = (self.start, self.min, self.max);
        let (srtt_us, rttvar_us) = (self.srtt_us, self.rttvar_us);
        *self = Self::new(1, 1, None);
        (self.start, self.min, self.max) = (start, min, max);
        (self.srtt_us, self.rttvar_us) = (srtt_us, rttvar_us);
        self.capacity = rate;
        self.set_rate(now, rate);
    }

    /// Takes one report in and sets the rate.
    pub fn on_sample(&mut self, sample: &Sample) {
        let Some(sample) = self.gather(sample) else { return };
        self.smooth_rtt(sample.rtt_us);
        self.lag_us = u64::from(sample.rtt_us);
        let entry = self.entry(&sample);
        let source_gap = entry.send_us > 250_000.0f64.max(6.0 * PACKET_BYTES / self.rate * 1e6);
        if source_gap {
            // Mostly silence: says something about the delay, nothing about the rate.
            self.window.clear();
            self.jitter.interrupt();
            self.window.push(Entry { limited: false, ..entry });
            return;
        }
        self.window.push(entry);
        if entry.queue_us > self.buffer_us {
            self.buffer_us = f64::INFINITY;
        } else if entry.queue_us > 20_000.0 && entry.lost > 0.2 * entry.received {
            self.buffer_us = 1.1 * entry.queue_us;
        }
        let recent = self.recent();
        self.delivered = recent.delivered();
        self.loss += (entry.lost / (entry.lost + entry.received).max(1.0) - self.loss) / 16.0;
        self.floor.add(&entry);
        match self.phase {
            Phase::Startup => self.startup(&entry),
            Phase::Steady | Phase::Refresh => self.steady(&entry),
        }
    }

    /// Adds reports up until they say enough; `None` while they do not.
    fn gather(&mut self, sample: &Sample) -> Option<Sample> {
        let sum = match self.pending.take() {
            None => *sample,
            Some(before) => Sample {
                delivered_bytes: before.delivered_bytes.saturating_add(sample.delivered_bytes),
                interval_us: before.interval_us.saturating_add(sample.interval_us),
                lost: before.lost.saturating_add(sample.lost),
                received: before.received.saturating_add(sample.received),
                limited: before.limited || sample.limited,
                // A report without news has no delay of its own.
                owd_us: if sample.interval_us == 0 { before.owd_us } else { sample.owd_us },
                ..*sample
            },
        };
        // Bounds that no real report reaches keep the arithmetic from overflowing.
        let sum = Sample {
            owd_us: sum.owd_us.clamp(-MAX_US, MAX_US),
            interval_us: sum.interval_us.min(MAX_US as u64),
            ..sum
        };
        let enough = sum.interval_us >= GATHER_US && (sum.received >= 3 || sum.interval_us >= 100_000);
        if enough && sum.delivered_bytes > 0 {
            return Some(sum);
        }
        self.pending = Some(sum);
        None
    }

    fn smooth_rtt(&mut self, rtt_us: u32) {
        let rtt = f64::from(rtt_us);
        if rtt_us == 0 {
            return;
        }
        if self.srtt_us == 0.0 {
            self.srtt_us = rtt;
            self.rttvar_us = rtt / 2.0;
        } else {
            self.rttvar_us += ((self.srtt_us - rtt).abs() - self.rttvar_us) / 4.0;
            self.srtt_us += (rtt - self.srtt_us) / 8.0;
        }
    }

    /// Feeds the delay filters and turns the sample into an entry of the window.
    fn entry(&mut self, sample: &Sample) -> Entry {
        self.jitter.add(sample.owd_us);
        self.base.add(sample.now, sample.owd_us, (self.target_us() / 3.0) as i64);
        let change_us = self.last_owd_us.map_or(0, |last| sample.owd_us.saturating_sub(last));
        self.last_owd_us = Some(sample.owd_us);
        let arrival_us = sample.interval_us as f64;
        let send_us = arrival_us - change_us as f64;
        let queue_us = sample.owd_us.saturating_sub(self.base.us()).max(0) as f64;
        // One report alone can always be an accident; where there is noise, two can.
        let others = if self.jitter.us() < CALM_US { 1 } else { 2 };
        let level_us =
            queue_us.min(self.window.queue_us(others, sample.interval_us.saturating_mul(2).max(60_000)));
        let level_change_us = level_us - self.level_us;
        self.level_us = level_us;
        Entry {
            at: sample.now,
            bytes: sample.delivered_bytes as f64,
            received: f64::from(sample.received),
            lost: f64::from(sample.lost),
            arrival_us,
            send_us,
            steady_us: send_us + level_change_us,
            queue_us,
            level_us,
            limited: sample.limited,
        }
    }
}
