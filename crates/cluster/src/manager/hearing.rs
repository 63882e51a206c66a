//! Silence of units, in time in which the manager could have heard them.
//!
//! Words of units come through a gateway, a runtime and this process; each of them may get no CPU for a while, and then everybody is
//! silent at once. So silence is measured on a clock that runs only while anybody is heard: a stall of the observer is not in it.

use super::MS;

/// Longest time after somebody was heard in which the clock goes on: a few heartbeats of a single unit.
const GAP_NS: u64 = 100 * MS;

/// Clock of silence.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Hearing {
    /// Reading of the clock when somebody was heard last.
    counted_ns: u64,
    /// The time of then.
    heard_at_ns: u64,
    /// Since when nobody who owns flows is heard.
    deaf_since_ns: Option<u64>,
}

impl Hearing {
    /// Starts at 0.
    pub fn new(now_ns: u64) -> Self {
        Self { heard_at_ns: now_ns, ..Self::default() }
    }

    /// Reading of the clock.
    pub fn clock_ns(&self, now_ns: u64) -> u64 {
        self.counted_ns.saturating_add(self.unheard_ns(now_ns).min(GAP_NS))
    }

    /// Somebody is heard; what the clock shows.
    pub fn heard(&mut self, now_ns: u64) -> u64 {
        self.counted_ns = self.clock_ns(now_ns);
        // Of two words the later may be looked at first.
        self.heard_at_ns = self.heard_at_ns.max(now_ns);
        self.counted_ns
    }

    /// Time since anybody was heard.
    pub fn unheard_ns(&self, now_ns: u64) -> u64 {
        now_ns.saturating_sub(self.heard_at_ns)
    }

    /// Notes that nobody who owns flows is heard; `true` when it began.
    pub fn is_deaf(&mut self, now_ns: u64) -> bool {
        self.deaf_since_ns.replace(self.deaf_since_ns.unwrap_or(now_ns)).is_none()
    }

    /// Notes that somebody who owns flows is heard; how long nobody was.
    pub fn hears(&mut self, now_ns: u64) -> Option<u64> {
        Some(now_ns.saturating_sub(self.deaf_since_ns.take()?))
    }
}
