//! An inner TCP sender: CUBIC over our FQ-CoDel, as a source for the test link.
#![allow(clippy::unwrap_used, reason = "tests")]

use super::testlink::{MTU, Offer, Source};
use crate::queue::{CodelVerdict, FqCodel, Item};
use crate::time::Time;

#[derive(Debug)]
struct Segment {
    tag: u64,
    at: u64,
    bytes: usize,
}

impl Item for Segment {
    fn bytes(&self) -> usize {
        self.bytes
    }
    fn enqueued_at(&self) -> Time {
        Time::from_ns(self.at)
    }
    fn ecn_capable(&self) -> bool {
        false
    }
}

/// One long download. Retransmissions are not modelled: a loss costs window, not data.
#[derive(Debug)]
pub(crate) struct Cubic {
    queue: FqCodel<Segment>,
    pub(crate) window: f64,
    threshold: f64,
    most: f64,
    epoch: Option<u64>,
    flight: u64,
    next: u64,
    expected: u64,
    recover: u64,
    rtt_ns: u64,
    /// Sum and number of the waiting times in our queue, and drops.
    pub(crate) waited_ms: f64,
    pub(crate) sent: u64,
    pub(crate) losses: u64,
}

impl Cubic {
    /// `rtt_ns`: of the empty path, for the growth function.
    pub(crate) fn new(rtt_ns: u64, target_us: u64, interval_us: u64) -> Self {
        let mut queue = FqCodel::new(8 << 20, 8_192, 2 * MTU as usize);
        queue.set_codel(target_us, interval_us);
        Self {
            queue,
            window: 10.0,
            threshold: f64::INFINITY,
            most: 0.0,
            epoch: None,
            flight: 0,
            next: 0,
            expected: 0,
            recover: 0,
            rtt_ns,
            waited_ms: 0.0,
            sent: 0,
            losses: 0,
        }
    }

    fn grow(&mut self, now: u64) {
        if self.window < self.threshold {
            self.window += 1.0;
            return;
        }
        let epoch = *self.epoch.get_or_insert(now);
        let since = (now - epoch + self.rtt_ns) as f64 / 1e9;
        let flat = (self.most * 0.3 / 0.4).cbrt();
        let cubic = 0.4 * (since - flat).powi(3) + self.most;
        // RFC 9438 §4.3: not slower than Reno.
        let reno = 0.7 * self.most + 0.53 * since / (self.rtt_ns as f64 / 1e9);
        let target = cubic.max(reno).min(1.5 * self.window);
        self.window += ((target - self.window) / self.window).max(0.0);
    }
}

impl Source for Cubic {
    fn offer(&mut self, now: u64) -> Offer {
        while (self.flight as f64) < self.window {
            let item = Segment { tag: self.next, at: now, bytes: MTU as usize };
            self.next += 1;
            self.flight += 1;
            self.queue.enqueue(Time::from_ns(now), 1, item, &mut |_| ());
        }
        if self.queue.is_empty() { Offer::At(u64::MAX) } else { Offer::Packets(self.queue.items() as u32) }
    }

    fn take(&mut self, now: u64) -> Option<u64> {
        let time = Time::from_ns(now);
        let head = self.queue.head(time)?;
        let (tag, at, verdict) = (head.item.tag, head.item.at, head.codel);
        self.queue.consume(time, MTU as usize, true);
        self.waited_ms += (now - at) as f64 / 1e6;
        self.sent += 1;
        (verdict == CodelVerdict::Pass).then_some(tag)
    }

    fn acked(&mut self, now: u64, tag: u64) {
        let lost = tag - self.expected;
        self.expected = tag + 1;
        self.flight -= lost + 1;
        if lost > 0 && tag >= self.recover {
            self.losses += 1;
            self.most = if self.window < self.most { 0.85 * self.window } else { self.window };
            self.window = (0.7 * self.window).max(2.0);
            self.threshold = self.window;
            self.epoch = None;
            self.recover = self.next;
        } else if lost == 0 && tag >= self.recover {
            self.grow(now);
        }
    }

    fn wants_acks(&self) -> bool {
        true
    }
}
