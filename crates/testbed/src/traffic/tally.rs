//! Tally of requests and connections: which succeeded, which failed, and by whose fault.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::probe::Percentiles;

/// Faults kept as text; more are only counted.
const FAULTS_MAX: usize = 20;

/// Counts of one or several clients.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Requests that were answered, every byte as it should be. A frame that comes back counts as one.
    pub requests: u64,
    /// Requests that were not, however often they were tried.
    pub failed_requests: u64,
    /// Tries beyond the first.
    pub retries: u64,
    /// Connections that were made.
    pub connections: u64,
    /// Connections that broke although their server lived. None should.
    pub broken_connections: u64,
    /// Connections that ended because their server died.
    pub ended_connections: u64,
    /// Connections that were not made because their server had died, and it was too early to know.
    pub excused_refusals: u64,
    /// Answers with wrong bytes in them.
    pub corrupt: u64,
    /// Payload bytes that arrived and were compared.
    pub bytes_verified: u64,
    /// Time of each request, microseconds; tries that failed are part of it.
    pub latency_us: Vec<u32>,
    /// Answers of each server, by the number it gives itself ([`crate::traffic::service::Service`]).
    pub answers: BTreeMap<u32, u64>,
    /// First faults, one line each.
    pub faults: Vec<String>,
}

impl Tally {
    /// Something happened that should not.
    pub fn fault(&mut self, text: impl FnOnce() -> String) {
        if self.faults.len() < FAULTS_MAX {
            self.faults.push(text());
        }
    }

    /// A request is answered.
    pub(super) fn answered(&mut self, begun_ns: u64, now_ns: u64, bytes: u64, meter: &Meter) {
        self.requests += 1;
        self.bytes_verified += bytes;
        let us = now_ns.saturating_sub(begun_ns) / 1_000;
        self.latency_us.push(u32::try_from(us).unwrap_or(u32::MAX));
        meter.requests.fetch_add(1, Ordering::Relaxed);
        meter.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Adds what another client saw.
    pub fn merge(&mut self, other: Tally) {
        self.requests += other.requests;
        self.failed_requests += other.failed_requests;
        self.retries += other.retries;
        self.connections += other.connections;
        self.broken_connections += other.broken_connections;
        self.ended_connections += other.ended_connections;
        self.excused_refusals += other.excused_refusals;
        self.corrupt += other.corrupt;
        self.bytes_verified += other.bytes_verified;
        self.latency_us.extend(other.latency_us);
        for (server, count) in other.answers {
            *self.answers.entry(server).or_default() += count;
        }
        for fault in other.faults {
            self.fault(|| fault);
        }
    }

    /// Order statistics of the requests' times.
    #[must_use]
    pub fn latency(&self) -> Percentiles {
        Percentiles::of(&mut self.latency_us.clone())
    }

    /// Whether nothing happened that should not.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.failed_requests == 0
            && self.broken_connections == 0
            && self.corrupt == 0
            && self.faults.is_empty()
    }
}

/// Counts while clients run, for whoever watches.
#[derive(Debug, Default)]
pub struct Meter {
    requests: AtomicU64,
    bytes: AtomicU64,
}

impl Meter {
    /// Requests answered so far.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Payload bytes that have arrived so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

/// Knows which servers died when, and what may fail because of that.
pub trait Witness: Send + Sync {
    /// Whether the server with this number has died.
    fn has_died(&self, server: u32) -> bool;

    /// Whether a connection that was begun at this moment (ns of the monotonic clock) could meet a dead server: one had died
    /// and whoever chooses servers could not know yet.
    fn may_fail(&self, begun_ns: u64) -> bool;
}

/// All servers live.
#[derive(Clone, Copy, Debug)]
pub struct AllLive;

impl Witness for AllLive {
    fn has_died(&self, _server: u32) -> bool {
        false
    }

    fn may_fail(&self, _begun_ns: u64) -> bool {
        false
    }
}

/// A witness that clients share.
pub type SharedWitness = Arc<dyn Witness>;
