//! CUBIC (RFC 9438) with delay-based leaving of slow start (HyStart), in segments.

use tunnel::time::Time;

const C: f64 = 0.4;
const BETA: f64 = 0.7;
/// Window at the start (RFC 6928).
const FIRST: f64 = 10.0;

/// Congestion window.
#[derive(Clone, Debug)]
pub(super) struct Cubic {
    /// Window now, segments.
    pub window: f64,
    threshold: f64,
    most: f64,
    epoch: Option<Time>,
    k_s: f64,
    origin: f64,
    friendly: f64,
    before: Option<(f64, f64)>,
    round_rtt_us: u64,
}

/// A cube root that is the same on every machine: Newton's method over plain operations.
fn cube_root(x: f64) -> f64 {
    if x <= 0.0 {
        return 0.0;
    }
    let mut root = if x > 1.0 { x / 3.0 + 1.0 } else { 1.0 };
    for _ in 0..60 {
        root = (2.0 * root + x / (root * root)) / 3.0;
    }
    root
}

impl Cubic {
    pub fn new() -> Self {
        Self {
            window: FIRST,
            threshold: f64::MAX,
            most: 0.0,
            epoch: None,
            k_s: 0.0,
            origin: 0.0,
            friendly: 0.0,
            before: None,
            round_rtt_us: u64::MAX,
        }
    }

    pub fn in_slow_start(&self) -> bool {
        self.window < self.threshold
    }

    /// `segments` were newly acknowledged while the window was the limit.
    pub fn acknowledged(&mut self, now: Time, segments: f64, rtt_us: u64) {
        if self.in_slow_start() {
            self.window += segments;
            return;
        }
        if self.epoch.is_none() {
            self.epoch = Some(now);
            self.friendly = self.window;
            self.k_s = if self.window < self.most { cube_root((self.most - self.window) / C) } else { 0.0 };
            self.origin = self.most.max(self.window);
        }
        let Some(epoch) = self.epoch else { return };
        let t = now.plus_us(rtt_us).since(epoch) as f64 / 1e9 - self.k_s;
        let target = (self.origin + C * t * t * t).clamp(self.window, self.window * 1.5);
        self.friendly += 3.0 * (1.0 - BETA) / (1.0 + BETA) * segments / self.friendly.max(1.0);
        self.window += (target - self.window) / self.window * segments;
        self.window = self.window.max(self.friendly);
    }

    /// HyStart: the delay of this round tells that the queue fills.
    pub fn delay(&mut self, rtt_us: u64, least_us: u64, new_round: bool) {
        if new_round {
            let limit_us = least_us + (least_us / 8).clamp(4_000, 16_000);
            if self.in_slow_start()
                && self.window >= 16.0
                && self.round_rtt_us != u64::MAX
                && self.round_rtt_us > limit_us
            {
                self.threshold = self.window;
            }
            self.round_rtt_us = u64::MAX;
        }
        self.round_rtt_us = self.round_rtt_us.min(rtt_us);
    }

    /// A loss: once per recovery.
    pub fn lost(&mut self) {
        self.before = Some((self.window, self.threshold));
        self.most = if self.window < self.most { self.window * (1.0 + BETA) / 2.0 } else { self.window };
        self.window = (self.window * BETA).max(2.0);
        self.threshold = self.window;
        self.epoch = None;
    }

    /// The losses of this recovery were none (every repeat was a duplicate).
    pub fn undo(&mut self) {
        if let Some((window, threshold)) = self.before.take() {
            self.window = self.window.max(window);
            self.threshold = threshold;
            self.epoch = None;
        }
    }

    /// A timeout.
    pub fn timeout(&mut self) {
        self.lost();
        self.window = 1.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_back_to_where_it_was() {
        let mut cubic = Cubic::new();
        cubic.acknowledged(Time::ZERO, 90.0, 50_000);
        assert!((cubic.window - 100.0).abs() < 1e-9);
        cubic.lost();
        assert!((cubic.window - 70.0).abs() < 1e-9);
        let mut now = Time::ZERO;
        for _ in 0..200 {
            now = now.plus_ms(50);
            let segments = cubic.window;
            cubic.acknowledged(now, segments, 50_000);
        }
        assert!(cubic.window > 100.0, "{}", cubic.window);
        assert!((cube_root(27.0) - 3.0).abs() < 1e-9 && (cube_root(0.001) - 0.1).abs() < 1e-9);
    }

    #[test]
    fn an_undo_restores_the_window() {
        let mut cubic = Cubic::new();
        cubic.acknowledged(Time::ZERO, 40.0, 10_000);
        cubic.lost();
        cubic.undo();
        assert!((cubic.window - 50.0).abs() < 1e-9 && cubic.in_slow_start());
    }
}
