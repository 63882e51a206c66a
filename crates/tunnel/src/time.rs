//! Time as the state machines see it: nanoseconds since a start the caller chooses.
//!
//! The crate never reads a clock; every entry point takes `now`. Plain 64-bit nanoseconds keep the
//! per-packet arithmetic to one add or compare and last 584 years.

/// A moment in nanoseconds since the caller's own start. Monotonic, never wall-clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(u64);

impl Time {
    /// The start.
    pub const ZERO: Self = Self(0);
    /// Later than everything: "no deadline".
    pub const MAX: Self = Self(u64::MAX);

    /// The moment `ns` nanoseconds after the start.
    pub const fn from_ns(ns: u64) -> Self {
        Self(ns)
    }

    /// The moment `us` microseconds after the start.
    pub const fn from_us(us: u64) -> Self {
        Self(us.saturating_mul(1_000))
    }

    /// The moment `ms` milliseconds after the start.
    pub const fn from_ms(ms: u64) -> Self {
        Self(ms.saturating_mul(1_000_000))
    }

    /// Nanoseconds since the start.
    pub const fn ns(self) -> u64 {
        self.0
    }

    /// Whole microseconds since the start.
    pub const fn us(self) -> u64 {
        self.0 / 1_000
    }

    /// Whole milliseconds since the start.
    pub const fn ms(self) -> u64 {
        self.0 / 1_000_000
    }

    /// This moment plus `ns` nanoseconds, saturating at [`Time::MAX`].
    #[must_use]
    pub const fn plus_ns(self, ns: u64) -> Self {
        Self(self.0.saturating_add(ns))
    }

    /// This moment plus `us` microseconds, saturating.
    #[must_use]
    pub const fn plus_us(self, us: u64) -> Self {
        self.plus_ns(us.saturating_mul(1_000))
    }

    /// This moment plus `ms` milliseconds, saturating.
    #[must_use]
    pub const fn plus_ms(self, ms: u64) -> Self {
        self.plus_ns(ms.saturating_mul(1_000_000))
    }

    /// Nanoseconds from `earlier` to this moment; 0 when `earlier` is later.
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}
