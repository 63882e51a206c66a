//! Limits of how often a peer makes a node do something besides carrying its packets.

use std::sync::{Mutex, PoisonError};

use crate::mac::Bucket;
use crate::time::Time;

/// A peer gets so many answers to pings, challenges and probes a second, and so many at once.
const ANSWERS_PER_SECOND: u32 = 2_000;
const ANSWERS_BURST: u32 = 256;
/// Its cores may change so often, and so often at once: each time all flows are looked at again.
const CHANGES_PER_SECOND: u32 = 50;
const CHANGES_BURST: u32 = 20;

/// Answers that a peer may still get, and changes of its cores.
#[derive(Default)]
pub(crate) struct Allowances {
    answers: Mutex<Bucket>,
    changes: Mutex<Bucket>,
}

impl Allowances {
    /// Whether the peer gets one more answer now.
    pub fn may_answer(&self, now: Time) -> bool {
        take(&self.answers, now, ANSWERS_PER_SECOND, ANSWERS_BURST)
    }

    /// Whether the peer's cores may change once more now.
    pub fn may_change_cores(&self, now: Time) -> bool {
        take(&self.changes, now, CHANGES_PER_SECOND, CHANGES_BURST)
    }
}

fn take(bucket: &Mutex<Bucket>, now: Time, per_second: u32, burst: u32) -> bool {
    bucket.lock().unwrap_or_else(PoisonError::into_inner).take(now, per_second, burst)
}
