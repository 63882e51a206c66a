//! Counters of an orderer.

/// Buckets of the residence histogram: bucket 0 is below 1 µs, bucket n from 2^(n−1) µs on, the last one
/// from 262 ms on.
pub const RESIDENCE_BUCKETS: usize = 20;

/// Counters of an [`Orderer`](super::Orderer) since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OrderStats {
    /// Packets that left, in whatever way.
    pub delivered: u64,
    /// Packets held now.
    pub held_now: u64,
    /// The most held at once.
    pub held_max: u64,
    /// Packets that had to wait.
    pub holds: u64,
    /// Packets that came after they were given up, or whose stamp was seen before.
    pub late: u64,
    /// Of these: stamp seen before or older than the window.
    pub repeated: u64,
    /// Stamps given up by the loss rule while somebody waited for them.
    pub declared_lost: u64,
    /// Stamps given up by a deadline while somebody waited for them.
    pub deadline_expired: u64,
    /// Times that the limit of held packets ended a wait or let a packet through.
    pub overflowed: u64,
    /// How long packets were held, see [`RESIDENCE_BUCKETS`].
    pub residence: [u64; RESIDENCE_BUCKETS],
}

impl OrderStats {
    /// Counts a packet that was held for `ns` nanoseconds.
    pub(super) fn residence(&mut self, ns: u64) {
        let bits = (u64::BITS - (ns / 1_000).leading_zeros()) as usize;
        self.residence[bits.min(RESIDENCE_BUCKETS - 1)] += 1;
    }
}
