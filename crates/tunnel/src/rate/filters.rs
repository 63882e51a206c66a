//! The estimators under the controller: base delay, jitter, a window of recent reports, and the predictor of
//! the queue that is still on its way.

use crate::time::Time;

/// The delay of the empty path: the smallest median of five reports of the last ten seconds.
///
/// A median, because with noise the smallest single delay is one that hardly ever comes again and everything
/// else would look
/// like a queue. Ten seconds follow a route that became longer and the drift of two clocks (100 ppm are 1 ms
/// in that time).
#[derive(Debug)]
pub(super) struct BaseDelay {
    buckets: [(u64, i64); Self::BUCKETS],
    recent: [i64; Self::RECENT],
    filled: usize,
    /// When a delay near the base was seen last.
    seen: Time,
}

impl BaseDelay {
    const BUCKETS: usize = 10;
    const RECENT: usize = 5;
    const EMPTY: (u64, i64) = (u64::MAX, i64::MAX);

    pub(super) fn new() -> Self {
        Self { buckets: [Self::EMPTY; Self::BUCKETS], recent: [0; Self::RECENT], filled: 0, seen: Time::ZERO }
    }

    /// Takes a delay in; medians up to `near_us` above the base still confirm it.
    pub(super) fn add(&mut self, now: Time, owd_us: i64, near_us: i64) {
        self.recent.rotate_right(1);
        self.recent[0] = owd_us;
        self.filled = (self.filled + 1).min(Self::RECENT);
        let mut sorted = self.recent;
        let sorted = &mut sorted[..self.filled];
        sorted.sort_unstable();
        let median = sorted[(self.filled - 1) / 2];
        let second = now.ms() / 1_000;
        let slot = &mut self.buckets[(second % Self::BUCKETS as u64) as usize];
        *slot = (second, if slot.0 == second { slot.1.min(median) } else { median });
        for bucket in &mut self.buckets {
            if bucket.0 != u64::MAX && bucket.0 + (Self::BUCKETS as u64) <= second {
                *bucket = Self::EMPTY;
            }
        }
        if median <= self.us().saturating_add(near_us) {
            self.seen = now;
        }
    }

    /// The base in microseconds; `i64::MAX` before the first delay.
    pub(super) fn us(&self) -> i64 {
        self.buckets.iter().map(|bucket| bucket.1).min().unwrap_or(i64::MAX)
    }

    /// When the base was confirmed last.
    pub(super) fn seen(&self) -> Time {
        self.seen
    }

    /// Starts anew from `owd_us`: the route changed.
    pub(super) fn reset(&mut self, now: Time, owd_us: i64) {
        *self = Self::new();
        self.add(now, owd_us, 0);
    }
}

/// Noise of the delay: mean absolute second difference, which a queue that grows or drains steadily leaves
/// at zero.
#[derive(Debug, Default)]
pub(super) struct Jitter {
    last: [i64; 2],
    seen: u8,
    mean_us: f64,
}

impl Jitter {
    pub(super) fn add(&mut self, owd_us: i64) {
        if self.seen >= 2 {
            let bend = (self.last[0] - 2 * self.last[1] + owd_us).abs() as f64 / 2.0;
            // A stall of a host or a cell is an event, not the noise of the path: bound what one may do.
            let bend = bend.min(4.0 * self.mean_us + 2_000.0);
            let weight = if self.seen < 10 { 0.25 } else { 1.0 / 16.0 };
            self.mean_us += (bend - self.mean_us) * weight;
        }
        self.seen = self.seen.saturating_add(1).min(10);
        self.last = [self.last[1], owd_us];
    }

    /// The next delay is not the neighbour of the last one.
    pub(super) fn interrupt(&mut self) {
        self.seen = if self.seen >= 2 { 10.min(self.seen) } else { 0 };
        self.last = [self.last[1], self.last[1]];
    }

    pub(super) fn us(&self) -> f64 {
        self.mean_us
    }
}

/// One report's worth of news.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Entry {
    pub(super) at: Time,
    pub(super) bytes: f64,
    pub(super) received: f64,
    pub(super) lost: f64,
    /// Between the arrivals of the newest packets of this report and the one before.
    pub(super) arrival_us: f64,
    /// Between the departures of the same two packets: arrival interval minus the change of delay.
    pub(super) send_us: f64,
    /// The departure interval plus the change of the *robust* queue: an arrival interval without the noise
    /// of the two packets
    /// that happen to delimit it.
    pub(super) steady_us: f64,
    /// Delay above the base.
    pub(super) queue_us: f64,
    /// The smallest of the last few of those.
    pub(super) level_us: f64,
    pub(super) limited: bool,
}

impl Entry {
    /// The same delay, and no time nor bytes: a pause of the source must not be averaged into any rate.
    pub(super) fn delay_only(self) -> Self {
        Self { at: self.at, queue_us: self.queue_us, level_us: self.level_us, ..Self::default() }
    }

    /// Bytes per second that arrived.
    pub(super) fn delivered(&self) -> f64 {
        self.bytes / self.arrival_us * 1e6
    }

    /// Bytes per second at which those bytes had left.
    pub(super) fn sent(&self) -> f64 {
        self.bytes / self.send_us.max(self.arrival_us / 16.0) * 1e6
    }
}

/// Sums over some consecutive entries.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sum {
    pub(super) count: usize,
    pub(super) bytes: f64,
    pub(super) received: f64,
    pub(super) lost: f64,
    pub(super) arrival_us: f64,
    pub(super) send_us: f64,
    pub(super) steady_us: f64,
    pub(super) limited: usize,
}

impl Sum {
    pub(super) fn add(&mut self, entry: &Entry) {
        self.count += 1;
        self.bytes += entry.bytes;
        self.received += entry.received;
        self.lost += entry.lost;
        self.arrival_us += entry.arrival_us;
        self.send_us += entry.send_us;
        self.steady_us += entry.steady_us;
        self.limited += usize::from(entry.limited);
    }

    /// Noise must not make an interval (nearly) vanish.
    fn rate(&self, us: f64) -> f64 {
        if self.arrival_us > 0.0 { self.bytes / us.max(0.2 * self.arrival_us) * 1e6 } else { 0.0 }
    }

    /// Bytes per second that arrived, robust; 0 without entries.
    pub(super) fn delivered(&self) -> f64 {
        self.rate(self.steady_us)
    }

    /// Bytes per second that arrived, by the arrivals of the two delimiting packets: noisier, but up to date.
    pub(super) fn arrived(&self) -> f64 {
        self.rate(self.arrival_us)
    }

    /// Bytes per second at which those bytes had left.
    pub(super) fn sent(&self) -> f64 {
        self.rate(self.send_us)
    }

    /// Share of packets lost, 0–1.
    pub(super) fn loss(&self) -> f64 {
        let all = self.received + self.lost;
        if all > 0.0 { self.lost / all } else { 0.0 }
    }

    /// How fast the queue rose: microseconds per microsecond of arrival time, robust.
    pub(super) fn slope(&self) -> f64 {
        if self.arrival_us > 0.0 { (self.steady_us - self.send_us) / self.arrival_us } else { 0.0 }
    }
}

/// The latest reports, newest last.
#[derive(Debug)]
pub(super) struct Window {
    ring: [Entry; Self::SIZE],
    next: usize,
    len: usize,
}

impl Window {
    const SIZE: usize = 64;

    pub(super) fn new() -> Self {
        Self { ring: [Entry::default(); Self::SIZE], next: 0, len: 0 }
    }

    pub(super) fn push(&mut self, entry: Entry) {
        self.ring[self.next] = entry;
        self.next = (self.next + 1) % Self::SIZE;
        self.len = (self.len + 1).min(Self::SIZE);
    }

    pub(super) fn clear(&mut self) {
        self.len = 0;
    }

    /// Forgets all but the newest `keep` entries.
    pub(super) fn truncate(&mut self, keep: usize) {
        self.len = self.len.min(keep);
    }

    /// Newest first.
    pub(super) fn newest(&self) -> impl Iterator<Item = &Entry> {
        (1..=self.len).map(|back| &self.ring[(self.next + Self::SIZE - back) % Self::SIZE])
    }

    /// Entries from the newest back until they cover `us` of arrival time, while `keep` holds.
    pub(super) fn sum(&self, us: f64, keep: impl Fn(&Entry) -> bool) -> Sum {
        let mut sum = Sum::default();
        for entry in self.newest().take_while(|entry| keep(entry)) {
            sum.add(entry);
            if sum.arrival_us >= us {
                break;
            }
        }
        sum
    }

    /// Smallest queue of the newest `count` entries that are no older than `us` before the newest.
    pub(super) fn queue_us(&self, count: usize, us: u64) -> f64 {
        let newest = self.newest().next().map_or(Time::ZERO, |entry| entry.at);
        let recent = |entry: &&Entry| newest.since(entry.at) <= us * 1_000;
        let least = self.newest().take(count).take_while(recent).map(|entry| entry.queue_us).reduce(f64::min);
        least.unwrap_or(0.0)
    }
}

/// Remembers at which rate was sent, to tell what the packets that no report covers yet do to the queue
/// (a Smith predictor): without it a loop over 800 ms would either crawl or swing.
#[derive(Debug)]
pub(super) struct InFlight {
    ring: [(Time, f64); Self::SIZE],
    next: usize,
    len: usize,
}

impl InFlight {
    const SIZE: usize = 64;

    pub(super) fn new() -> Self {
        Self { ring: [(Time::ZERO, 0.0); Self::SIZE], next: 0, len: 0 }
    }

    /// From `now` on bytes leave at `rate`.
    pub(super) fn push(&mut self, now: Time, rate: f64, rtt_us: u64) {
        // Entries are spaced so that the ring reaches over a whole round trip.
        let newest = (self.next + Self::SIZE - 1) % Self::SIZE;
        let before = (self.next + Self::SIZE - 2) % Self::SIZE;
        if self.len >= 2 && now.since(self.ring[before].0) < rtt_us * 1_000 / 40 {
            self.ring[newest].1 = rate;
            return;
        }
        self.ring[self.next] = (now, rate);
        self.next = (self.next + 1) % Self::SIZE;
        self.len = (self.len + 1).min(Self::SIZE);
    }

    /// The queue in microseconds that a packet sent now will meet, when one sent `lag_us` ago met
    /// `queue_us`, the link takes `capacity` and its buffer holds `buffer_us`.
    pub(super) fn predict(
        &self,
        now: Time,
        lag_us: u64,
        queue_us: f64,
        capacity: f64,
        buffer_us: f64,
    ) -> f64 {
        let start = Time::from_ns(now.ns().saturating_sub(lag_us * 1_000));
        let mut queue_us = queue_us;
        for age in (1..=self.len).rev() {
            let (from, rate) = self.ring[(self.next + Self::SIZE - age) % Self::SIZE];
            let until =
                if age == 1 { now } else { self.ring[(self.next + Self::SIZE - age + 1) % Self::SIZE].0 };
            let part_us = until.since(from.max(start)) as f64 / 1e3;
            if until > start {
                queue_us = (queue_us + part_us * (rate / capacity - 1.0)).min(buffer_us).max(0.0);
            }
        }
        queue_us
    }
}

/// The best quarter second of about the last: what arrived while everything sent arrived.
#[derive(Debug, Default)]
pub(super) struct Floor {
    rates: [(Time, f64); Self::SLOTS],
    sum: Sum,
}

impl Floor {
    const SLOTS: usize = 4;

    pub(super) fn add(&mut self, entry: &Entry) {
        self.sum.add(entry);
        if self.sum.arrival_us >= 250_000.0 {
            let sum = std::mem::take(&mut self.sum);
            self.rates.rotate_right(1);
            let whole = sum.loss() < 0.005 && sum.slope() < 0.03;
            self.rates[0] = (entry.at, if whole { sum.delivered().min(sum.sent()) } else { 0.0 });
        }
    }

    pub(super) fn get(&self, now: Time) -> f64 {
        let recent = self.rates.iter().filter(|(at, _)| now.since(*at) < 1_250_000_000);
        recent.map(|(_, rate)| *rate).fold(0.0, f64::max)
    }
}
