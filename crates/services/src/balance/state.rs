//! State that survives a reload: counts, health, drain state and slow start of servers and backends.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};

use super::clients::Clients;
use super::connection_ids::ConnectionIds;

/// Weights are counted in tenths, so that a slow start has ten steps even for a weight of 1.
pub const TENTHS: u32 = 10;

/// [`BackendState::started_ns`]: at full weight.
const FULL: u64 = 0;
/// [`BackendState::started_ns`]: begins its slow start with the next tick.
const WAITING: u64 = u64::MAX;

/// [`BackendState::drains_since_ns`]: it takes connections.
const NOT_DRAINING: u64 = 0;

/// [`BackendState::override_`]: none.
const NO_OVERRIDE: u32 = u32::MAX;

/// Live and total connections.
#[derive(Debug, Default)]
pub struct Count {
    live: AtomicU32,
    /// Live ones, and those that are over and still have a flow for what comes late.
    held: AtomicU32,
    total: AtomicU64,
}

impl Count {
    /// Takes a place if fewer than `limit` are taken; 0 = no limit. Exact when several cores ask at once.
    pub fn open(&self, limit: u32) -> bool {
        let limit = if limit == 0 { u32::MAX } else { limit };
        let took = self.live.fetch_update(Relaxed, Relaxed, |live| (live < limit).then(|| live + 1)).is_ok();
        if took {
            self.held.fetch_add(1, Relaxed);
            self.total.fetch_add(1, Relaxed);
        }
        took
    }

    /// A connection is over, its flow is not gone: gives its place back.
    pub fn end(&self) {
        decrement(&self.live);
    }

    /// One that was over goes on after all, whatever the limit.
    pub fn resume(&self) {
        self.live.fetch_add(1, Relaxed);
    }

    /// The flow is gone; gives its place back unless the connection was over ([`Count::end`]).
    pub fn close(&self, was_over: bool) {
        if !was_over {
            decrement(&self.live);
        }
        decrement(&self.held);
    }

    /// Undoes [`Count::open`].
    pub fn take_back(&self) {
        self.close(false);
        self.total.fetch_sub(1, Relaxed);
    }

    /// Flows there are, also of connections that are over.
    pub fn held(&self) -> u32 {
        self.held.load(Relaxed)
    }

    /// Places taken now.
    pub fn live(&self) -> u32 {
        self.live.load(Relaxed)
    }

    /// Places ever taken.
    pub fn total(&self) -> u64 {
        self.total.load(Relaxed)
    }

    /// Whether no place is free; 0 = no limit.
    pub fn is_full(&self, limit: u32) -> bool {
        limit != 0 && self.live() >= limit
    }
}

/// Never below zero: a count that wrapped would block a backend for ever.
fn decrement(count: &AtomicU32) {
    // `Err` means that it was zero.
    let _ = count.fetch_update(Relaxed, Relaxed, |count| count.checked_sub(1));
}

/// A server's part. In cache lines of its own, since all cores write it.
#[derive(Debug)]
#[repr(align(128))]
pub struct ServerState {
    /// Name.
    pub name: String,
    /// Connections.
    pub count: Count,
    /// Turns given, for round robin.
    pub turn: AtomicU32,
    /// Connections that found no backend or no room.
    pub refused: AtomicU64,
    /// Backends of clients, for affinity.
    pub clients: Clients,
    /// Backends of QUIC connections, likewise.
    pub connection_ids: ConnectionIds,
}

impl ServerState {
    /// Nothing happened yet.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            count: Count::default(),
            turn: AtomicU32::new(0),
            refused: AtomicU64::new(0),
            clients: Clients::default(),
            connection_ids: ConnectionIds::default(),
        }
    }
}

/// A backend's part. In cache lines of its own, since all cores write it.
#[derive(Debug)]
#[repr(align(128))]
pub struct BackendState {
    /// Its number.
    pub id: u16,
    /// Address and port.
    pub address: SocketAddr,
    /// Its server.
    pub server: Arc<ServerState>,
    /// Connections.
    pub count: Count,
    up: AtomicBool,
    /// It is down and does not answer at all.
    silent: AtomicBool,
    draining: AtomicBool,
    /// When it began to drain, or [`NOT_DRAINING`].
    drains_since_ns: AtomicU64,
    /// It drains, and its time is over.
    drained_out: AtomicBool,
    /// When it came up (then it starts slowly), or [`FULL`] or [`WAITING`].
    started_ns: AtomicU64,
    /// A weight set while running in the low half, the configured one that it replaces in the high half.
    override_: AtomicU32,
    failures: AtomicU64,
}

impl BackendState {
    /// Up, at full weight or (`slowly`) about to begin a slow start.
    pub fn new(id: u16, address: SocketAddr, server: Arc<ServerState>, slowly: bool) -> Self {
        Self {
            id,
            address,
            server,
            count: Count::default(),
            up: AtomicBool::new(true),
            silent: AtomicBool::new(false),
            draining: AtomicBool::new(false),
            drains_since_ns: AtomicU64::new(NOT_DRAINING),
            drained_out: AtomicBool::new(false),
            started_ns: AtomicU64::new(if slowly { WAITING } else { FULL }),
            override_: AtomicU32::new(NO_OVERRIDE),
            failures: AtomicU64::new(0),
        }
    }

    /// Whether monitors call it up.
    pub fn is_up(&self) -> bool {
        self.up.load(Relaxed)
    }

    /// Whether monitors call it down and get no answer at all from it.
    pub fn is_silent(&self) -> bool {
        self.silent.load(Relaxed)
    }

    /// Returns whether it fell silent now.
    pub fn set_silent(&self, silent: bool) -> bool {
        !self.silent.swap(silent, Relaxed) && silent
    }

    /// How often it went down.
    pub fn failures(&self) -> u64 {
        self.failures.load(Relaxed)
    }

    /// Whether it takes no new connections by the operator's wish; `configured` is the configured weight.
    pub fn is_draining(&self, configured: u16) -> bool {
        self.draining.load(Relaxed) || self.weight(configured) == 0
    }

    /// Whether it drains and its connections have had their time.
    pub fn is_drained_out(&self) -> bool {
        self.drained_out.load(Relaxed)
    }

    /// How long its connections may still last, ns; `None`: as long as they like, or it does not drain.
    pub fn drain_left_ns(&self, configured: u16, drain_s: u32, now_ns: u64) -> Option<u64> {
        if drain_s == 0 || !self.is_draining(configured) {
            return None;
        }
        let since = self.drains_since_ns.load(Relaxed);
        let passed_ns = if since == NOT_DRAINING { 0 } else { now_ns.saturating_sub(since) };
        Some((u64::from(drain_s) * 1_000_000_000).saturating_sub(passed_ns))
    }

    /// Notes when draining begins and ends; returns whether its connections' time is over now.
    pub fn follow_drain(&self, configured: u16, drain_s: u32, now_ns: u64) -> bool {
        if !self.is_draining(configured) {
            self.drains_since_ns.store(NOT_DRAINING, Relaxed);
            self.drained_out.store(false, Relaxed);
            return false;
        }
        if self.drains_since_ns.load(Relaxed) == NOT_DRAINING {
            self.drains_since_ns.store(now_ns.max(1), Relaxed);
        }
        let is_over = self.drain_left_ns(configured, drain_s, now_ns) == Some(0);
        !self.drained_out.swap(is_over, Relaxed) && is_over
    }

    /// The weight set while running, as long as it replaces this configured one; else the configured one.
    pub fn weight(&self, configured: u16) -> u16 {
        match self.override_.load(Relaxed) {
            NO_OVERRIDE => configured,
            pair if pair >> 16 == u32::from(configured) => (pair & 0xffff) as u16,
            _ => configured,
        }
    }

    /// The weight that counts now, in tenths: 0 when it takes no new connections.
    pub fn tenths(&self, configured: u16, slow_start_s: u16, now_ns: u64) -> u32 {
        if !self.is_up() || self.draining.load(Relaxed) {
            return 0;
        }
        u32::from(self.weight(configured)) * self.step(slow_start_s, now_ns)
    }

    /// Tenths of the weight that the slow start has reached, 1–10.
    fn step(&self, slow_start_s: u16, now_ns: u64) -> u32 {
        let started = self.started_ns.load(Relaxed);
        let whole = u64::from(slow_start_s) * 1_000_000_000;
        if started == FULL || whole == 0 {
            return TENTHS;
        }
        // A backend that waits for the next tick has not begun: the difference is 0.
        let passed = now_ns.saturating_sub(started).min(whole);
        1 + (u64::from(TENTHS - 1) * passed / whole) as u32
    }

    /// Begins the slow start of a backend that waits for the time, and ends one that is complete.
    pub fn start_waiting(&self, slow_start_s: u16, now_ns: u64) {
        let started = self.started_ns.load(Relaxed);
        let next = match started {
            FULL => return,
            WAITING => now_ns.clamp(1, WAITING - 1),
            _ if self.step(slow_start_s, now_ns) == TENTHS => FULL,
            _ => return,
        };
        // Fails when the health changed in between, which knows better.
        let _ = self.started_ns.compare_exchange(started, next, Relaxed, Relaxed);
    }

    /// Returns whether it was otherwise before.
    pub fn set_up(&self, up: bool, now_ns: u64) -> bool {
        if up && !self.is_up() {
            self.started_ns.store(now_ns.clamp(1, WAITING - 1), Relaxed);
        }
        let changed = self.up.swap(up, Relaxed) != up;
        if changed && !up {
            self.failures.fetch_add(1, Relaxed);
        }
        changed
    }

    /// Returns whether it was otherwise before.
    pub fn set_draining(&self, draining: bool) -> bool {
        let changed = self.draining.swap(draining, Relaxed) != draining;
        if changed && !draining {
            self.started_ns.store(WAITING, Relaxed);
        }
        changed
    }

    /// Returns whether it was otherwise before.
    pub fn set_weight(&self, configured: u16, weight: u16) -> bool {
        let before = self.weight(configured);
        let pair =
            if weight == configured { NO_OVERRIDE } else { u32::from(configured) << 16 | u32::from(weight) };
        self.override_.store(pair, Relaxed);
        if before == 0 && weight != 0 {
            self.started_ns.store(WAITING, Relaxed);
        }
        before != weight
    }
}
