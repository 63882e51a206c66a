//! Real traffic between two nodes, checked byte by byte, and measured where it arrives.
//!
//! [`tcp`] and [`udp`] start senders and receivers as threads whose sockets live in the nodes'
//! namespaces; [`probe`] measures the round-trip time meanwhile. Goodput counts payload bytes at the
//! receiver between the end of the warm-up and the moment the sender stops.
//!
//! Requests and answers are [`http`], [`dns`] and [`frames`] (long connections). Their servers are [`service`]s, which can die
//! and come back; their clients write into a [`tally`] what became of every request and every connection.
//!
//! [`churn`] keeps thousands of connections open and begins new ones, and counts those that break.

pub mod churn;
pub mod client;
pub mod dns;
pub mod frames;
pub mod gaps;
pub mod http;
pub mod pattern;
pub mod probe;
pub mod service;
pub mod tally;
pub mod tcp;
pub mod udp;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use linux::clock::monotonic_ns;

use crate::stop::Stop;

/// How long a transfer runs.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// How long the sender sends, warm-up included.
    pub send: Duration,
    /// Time at the beginning that is left out of the goodput.
    pub warm_up: Duration,
}

impl Span {
    /// `seconds` of sending, with a warm-up of 3 s, or of a third if that is shorter.
    #[must_use]
    pub fn seconds(seconds: f64) -> Self {
        let seconds = seconds.max(0.1);
        Self {
            send: Duration::from_secs_f64(seconds),
            warm_up: Duration::from_secs_f64((seconds / 3.0).min(3.0)),
        }
    }
}

/// Where a running transfer is, given to the observer some ten times a second.
#[derive(Clone, Copy, Debug)]
pub struct Tick {
    /// Since the sender began.
    pub elapsed: Duration,
    /// Payload bytes that have arrived so far.
    pub bytes: u64,
    /// Payload rate since the last tick, Mbit/s.
    pub mbps: f64,
}

/// Payload bytes in the measured window.
#[derive(Clone, Copy, Debug)]
struct Window {
    begin: (u64, u64),
    end: (u64, u64),
    /// When the sender began and when it was told to stop, ns.
    start_ns: u64,
}

impl Window {
    fn mbps(&self) -> f64 {
        let ns = self.end.0.saturating_sub(self.begin.0).max(1);
        self.end.1.saturating_sub(self.begin.1) as f64 * 8e3 / ns as f64
    }
}

/// Waits for the end of `span`, reports progress, and notes the counter at both ends of the window.
fn watch(
    span: Span,
    start_ns: u64,
    bytes: &Arc<AtomicU64>,
    stop: &Stop,
    observe: &mut dyn FnMut(Tick),
) -> Window {
    let now = || (monotonic_ns(), bytes.load(Ordering::Relaxed));
    let at = |since: Duration| start_ns + u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
    let (warm, end) = (at(span.warm_up), at(span.send));
    let mut begin = None;
    let mut last = now();
    while last.0 < end && !stop.is_raised() {
        let goal = if begin.is_none() { warm.max(last.0) } else { end };
        std::thread::sleep(Duration::from_nanos(goal.saturating_sub(last.0).min(100_000_000)));
        let this = now();
        let ns = this.0.saturating_sub(last.0).max(1);
        observe(Tick {
            elapsed: Duration::from_nanos(this.0.saturating_sub(start_ns)),
            bytes: this.1,
            mbps: this.1.saturating_sub(last.1) as f64 * 8e3 / ns as f64,
        });
        if begin.is_none() && this.0 >= warm {
            begin = Some(this);
        }
        last = this;
    }
    Window { begin: begin.unwrap_or(last), end: last, start_ns }
}
