//! Tells loss that comes and goes with the rate (a policer, a very short buffer) from loss that is always
//! there (radio, a bad
//! cable). The only way to know is to send less and look.

use super::filters::Entry;
use crate::time::Time;

/// Result of a finished measuring period.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Finding {
    /// Nothing new.
    Nothing,
    /// More loss than usual without a queue: send only what arrives, for a check.
    Excess,
    /// The check: less loss followed the lower rate. Stay there, no growth before the given time.
    Congestion { until: Time },
    /// The check: the loss stayed. Go back to the rate before.
    Random,
}

#[derive(Clone, Copy, Debug)]
struct Check {
    loss_before: f64,
}

/// Loss in measuring periods of 200 ms or more.
#[derive(Debug)]
pub(super) struct Losses {
    random: f64,
    received: f64,
    lost: f64,
    since: Time,
    /// Recent periods; the smallest is the loss that is always there.
    periods: [f64; Self::PERIODS],
    filled: usize,
    check: Option<Check>,
    quiet_until: Time,
    /// How long a confirmed limit is respected; doubles while it is met again.
    respite_ms: u64,
    confirmed_at: Time,
}

impl Losses {
    const PERIODS: usize = 8;

    pub(super) fn new() -> Self {
        Self {
            random: 0.0,
            received: 0.0,
            lost: 0.0,
            since: Time::ZERO,
            periods: [0.0; Self::PERIODS],
            filled: 0,
            check: None,
            quiet_until: Time::ZERO,
            respite_ms: 1_000,
            confirmed_at: Time::ZERO,
        }
    }

    /// Loss that does not depend on the rate, 0–1.
    pub(super) fn random(&self) -> f64 {
        self.random
    }

    /// A check is under way: the rate must not grow.
    pub(super) fn checking(&self) -> bool {
        self.check.is_some()
    }

    /// No check before `at`: the rate has just changed for another reason.
    pub(super) fn quiet(&mut self, at: Time) {
        self.quiet_until = self.quiet_until.max(at);
        self.restart(at);
    }

    /// Counts from `at` on, when the effect of a new rate is seen.
    fn restart(&mut self, at: Time) {
        (self.received, self.lost, self.since) = (0.0, 0.0, at);
    }

    /// Takes a report in. `may_check`: our pacer is the limit and there is no queue that would explain the
    /// loss.
    pub(super) fn add(&mut self, entry: &Entry, rtt_us: u64, may_check: bool) -> Finding {
        if entry.at < self.since {
            return Finding::Nothing;
        }
        self.received += entry.received;
        self.lost += entry.lost;
        let (lost, all) = (self.lost, self.received + self.lost);
        let loss = lost / all.max(1.0);
        let age_ms = entry.at.since(self.since) / 1_000_000;
        let heavy = age_ms >= 60 && lost >= 50.0 && loss > self.random + 0.08 && self.check.is_none();
        if !heavy && (age_ms < 200 || (all < 400.0 && age_ms < 2_000)) {
            return Finding::Nothing;
        }
        self.restart(entry.at);
        if let Some(check) = self.check.take() {
            return self.judge(entry.at, loss, check);
        }
        self.remember(loss);
        let excess = loss > self.random + 0.02 && lost >= 8.0;
        if !excess || !may_check || entry.at < self.quiet_until {
            return Finding::Nothing;
        }
        self.check = Some(Check { loss_before: loss });
        self.restart(entry.at.plus_us(rtt_us + 20_000));
        Finding::Excess
    }

    fn remember(&mut self, loss: f64) {
        self.periods.rotate_right(1);
        self.periods[0] = loss;
        self.filled = (self.filled + 1).min(Self::PERIODS);
        if self.filled == Self::PERIODS {
            self.random = self.periods.iter().copied().fold(1.0, f64::min);
        }
    }

    fn judge(&mut self, now: Time, loss: f64, check: Check) -> Finding {
        let before = check.loss_before - self.random;
        let after = loss - self.random;
        if after > 0.6 * before {
            self.random = loss;
            self.periods = [loss; Self::PERIODS];
            self.quiet_until = now.plus_ms(10_000);
            return Finding::Random;
        }
        let again = now.since(self.confirmed_at) < (self.respite_ms + 3_000) * 1_000_000;
        self.respite_ms = if again { (self.respite_ms * 2).min(8_000) } else { 1_000 };
        self.confirmed_at = now;
        Finding::Congestion { until: now.plus_ms(self.respite_ms) }
    }
}
