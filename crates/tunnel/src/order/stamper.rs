//! The sender's half: gives out stamps and back-distances.

use super::{Order, STAMP_WINDOW};
use crate::time::Time;

/// Flow buckets of a stamper; flows are put into them by their hash.
pub const FLOW_BUCKETS: usize = 1024;

/// Settling time for [`Stamper::tick`] that fits [`BUDGET_US_DEFAULT`](super::BUDGET_US_DEFAULT) and paths booked
/// ahead by up to 100 ms.
pub const SETTLE_US_DEFAULT: u32 = 250_000;

/// Memory of a flow bucket.
#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    /// `(last stamp + 1) << 8 | path`; 0 = nothing sent yet.
    last: u64,
    /// The bucket's packets on other paths than the present one all have stamps below this.
    foreign_below: u64,
}

/// Gives out [`Order`]s for one (sending core, receiving core), over all paths and across rekeys.
///
/// Call [`Stamper::next`] in the order in which packets are handed to each path: the receiver relies on
/// rising stamps within a path. The table of 16 KiB is allocated with the first packet.
#[derive(Clone, Debug, Default)]
pub struct Stamper {
    /// Stamp of the next packet, unwrapped; the wire carries its low half.
    next: u64,
    buckets: Vec<Bucket>,
    /// Packets with stamps below this were sent so long ago that they have arrived or are lost.
    settled_below: u64,
    /// The last tick that counted, and the next stamp at that time.
    snapshot: (Time, u64),
}

impl Stamper {
    /// A stamper that begins with stamp 0.
    pub const fn new() -> Self {
        Self::starting_at(0)
    }

    /// A stamper whose first stamp is `stamp`.
    pub const fn starting_at(stamp: u32) -> Self {
        Self {
            next: stamp as u64,
            buckets: Vec::new(),
            settled_below: stamp as u64,
            snapshot: (Time::ZERO, stamp as u64),
        }
    }

    /// The order of the next packet: it belongs to flow bucket `bucket` (taken modulo [`FLOW_BUCKETS`])
    /// and goes over `path`.
    ///
    /// `same_path` is set only once the bucket's packets on *other* paths are settled (see
    /// [`Stamper::tick`]), not merely when the one predecessor took the same path: the receiver lets a packet
    /// with it pass a missing predecessor, and inside a run of a striped flow that would overtake
    /// everything still under way on a slower path.
    #[inline]
    pub fn next(&mut self, bucket: usize, path: u8) -> Order {
        if self.buckets.is_empty() {
            self.buckets.resize(FLOW_BUCKETS, Bucket::default());
        }
        let stamp = self.next;
        self.next += 1;
        let bucket = &mut self.buckets[bucket % FLOW_BUCKETS];
        let mut order = Order { stamp: stamp as u32, back: 0, same_path: false };
        if bucket.last != 0 {
            let last = (bucket.last >> 8) - 1;
            if bucket.last as u8 != path {
                bucket.foreign_below = last + 1;
            }
            // 65,535 at most: what lies further back is outside the receiver's window and resolved there.
            order.back = u16::try_from(stamp - last).unwrap_or(0);
            order.same_path = order.back != 0
                && bucket.last as u8 == path
                && (bucket.foreign_below <= self.settled_below
                    || stamp - bucket.foreign_below >= STAMP_WINDOW);
        }
        bucket.last = (stamp + 1) << 8 | u64::from(path);
        order
    }

    /// Tells the time every few milliseconds. `settle_us` is how long after its stamp a packet has surely left
    /// the receiver's orderer or was given up there: what a path may be booked ahead + the slowest delay
    /// less the fastest + 4 × jitter + recovery + the orderer's slack. Too much does little harm, too little costs
    /// order at a loss: [`SETTLE_US_DEFAULT`] fits the default budget. Without ticks flows which changed
    /// their path do not get `same_path` for 65,536 stamps; nothing else is lost.
    pub fn tick(&mut self, now: Time, settle_us: u32) {
        if now.since(self.snapshot.0) >= u64::from(settle_us) * 1_000 {
            // Everything below the old snapshot is at least one settling time old.
            self.settled_below = self.snapshot.1;
            self.snapshot = (now, self.next);
        }
    }

    /// The highest stamp given out, for a marker on an idle path; none before the first packet.
    pub fn marker(&self) -> Option<u32> {
        // An untouched table means that nothing was sent.
        (!self.buckets.is_empty()).then(|| self.next.wrapping_sub(1) as u32)
    }
}
