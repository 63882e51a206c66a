//! Measurements of one path: the reports, gathered, filtered and kept for a while.

use super::Sample;
use super::control::PACKET_BYTES;
use super::filters::{BaseDelay, Entry, Floor, Jitter, Sum, Window};

/// Smallest standing queue that is aimed at, microseconds.
const TARGET_US: f64 = 3_000.0;
/// … and largest, on paths with much jitter.
const TARGET_US_MAX: f64 = 40_000.0;
/// Reports are gathered until they cover this much.
const GATHER_US: u64 = 15_000;
/// Jitter in microseconds below which a delay is believed sooner.
const CALM_US: f64 = 400.0;
/// Two weeks in microseconds.
const MAX_US: i64 = 1 << 40;

/// Smoothed round-trip time and its mean deviation (RFC 6298), microseconds; 0 before the first sample.
#[derive(Debug, Default)]
pub(super) struct RoundTrip {
    pub(super) smoothed_us: f64,
    pub(super) variation_us: f64,
}

impl RoundTrip {
    /// Takes a round-trip time in; 0 = not known.
    pub(super) fn add(&mut self, rtt_us: u32) {
        let rtt = f64::from(rtt_us);
        if rtt_us == 0 {
            return;
        }
        if self.smoothed_us == 0.0 {
            self.smoothed_us = rtt;
            self.variation_us = rtt / 2.0;
        } else {
            self.variation_us += ((self.smoothed_us - rtt).abs() - self.variation_us) / 4.0;
            self.smoothed_us += (rtt - self.smoothed_us) / 8.0;
        }
    }
}

/// Estimators that the reports feed.
#[derive(Debug)]
pub(super) struct Measurements {
    pending: Option<Sample>,
    pub(super) base: BaseDelay,
    pub(super) jitter: Jitter,
    pub(super) window: Window,
    last_owd_us: Option<i64>,
    level_us: f64,
    /// Bytes per second that arrived lately.
    pub(super) delivered: f64,
    /// Share of packets lost lately.
    pub(super) loss: f64,
    /// How much queue the link's buffer held when it overflowed last.
    pub(super) buffer_us: f64,
    /// From the newest reported packet's departure to its report: how far back the reports look.
    pub(super) lag_us: u64,
    pub(super) floor: Floor,
}

impl Measurements {
    pub(super) fn new() -> Self {
        Self {
            pending: None,
            base: BaseDelay::new(),
            jitter: Jitter::default(),
            window: Window::new(),
            last_owd_us: None,
            level_us: 0.0,
            delivered: 0.0,
            loss: 0.0,
            buffer_us: f64::INFINITY,
            lag_us: 0,
            floor: Floor::default(),
        }
    }

    /// Adds reports up until they say enough; `None` while they do not.
    pub(super) fn gather(&mut self, sample: &Sample) -> Option<Sample> {
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

    /// The standing queue aimed at: over the noise, and at least two packets on slow links.
    pub(super) fn target_us(&self, capacity: f64) -> f64 {
        let packets_us = 2.0 * PACKET_BYTES / capacity * 1e6;
        (2.0 * self.jitter.us()).clamp(TARGET_US, TARGET_US_MAX).max(packets_us)
    }

    /// How much time of reports is averaged: more on long paths, which react late anyway.
    pub(super) fn span_us(&self, rtt_us: f64) -> f64 {
        (rtt_us / 2.0).max(40.0 * self.jitter.us()).clamp(75_000.0, 250_000.0)
    }

    /// The reports of that time.
    pub(super) fn recent(&self, rtt_us: f64) -> Sum {
        self.window.sum(self.span_us(rtt_us), |_| true)
    }

    /// Feeds the delay filters and turns the sample into an entry of the window.
    pub(super) fn entry(&mut self, sample: &Sample, capacity: f64) -> Entry {
        self.jitter.add(sample.owd_us);
        self.base.add(sample.now, sample.owd_us, (self.target_us(capacity) / 3.0) as i64);
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
