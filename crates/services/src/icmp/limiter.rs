//! A token bucket for answers.

/// How many answers may follow each other at once, as a part of those of one second.
const BURST_PART: u64 = 10;
const SECOND_NS: u64 = 1_000_000_000;

/// Lets so many answers through per second, and a tenth of that at once (at least one). Kept as the time at which the
/// bucket would be full again: nothing runs while nothing is asked.
#[derive(Clone, Copy, Debug)]
pub struct Limiter {
    /// Time that one answer costs, ns; 0 = none is ever allowed.
    cost_ns: u64,
    /// How far `full_at_ns` may lie ahead.
    ahead_ns_max: u64,
    full_at_ns: u64,
}

impl Limiter {
    /// A full bucket. `per_s`: answers per second; 0 allows none.
    #[must_use]
    pub const fn new(per_s: u32) -> Self {
        if per_s == 0 {
            return Limiter { cost_ns: 0, ahead_ns_max: 0, full_at_ns: 0 };
        }
        let per_s = per_s as u64;
        let cost_ns = SECOND_NS.div_ceil(per_s);
        let burst = if per_s < BURST_PART { 1 } else { per_s / BURST_PART };
        Limiter { cost_ns, ahead_ns_max: (burst - 1) * cost_ns, full_at_ns: 0 }
    }

    /// Another rate from now on; what was taken stays taken.
    pub const fn set_rate(&mut self, per_s: u32) {
        *self = Limiter { full_at_ns: self.full_at_ns, ..Limiter::new(per_s) };
    }

    /// Takes one answer from the bucket; `false` when it is empty. `now_ns`: monotonic.
    #[inline]
    pub fn allow(&mut self, now_ns: u64) -> bool {
        let full_at_ns = self.full_at_ns.max(now_ns);
        if self.cost_ns == 0 || full_at_ns - now_ns > self.ahead_ns_max {
            return false;
        }
        self.full_at_ns = full_at_ns.saturating_add(self.cost_ns);
        true
    }
}
