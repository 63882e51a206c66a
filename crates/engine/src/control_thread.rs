//! The control thread (rows C7, C9): keeps what all workers share in order. It learns neighbors from the kernel, finds cores
//! that hang, has load votes counted and buckets moved, ends the sessions of a machine that was copied, frees what workers have let go of.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tunnel::time::Time;

use crate::copy_watch::CopyWatch;
use crate::core_watch::CoreWatch;
use crate::neighbors::NeighborWatch;

/// Cores are looked at this often.
const ROUND: Duration = Duration::from_millis(25);
/// A neighbor that was just asked for answers within a millisecond, and packets wait for it in the kernel: with interfaces
/// open, neighbors are looked at this often.
const NEIGHBORS: Duration = Duration::from_millis(5);
/// Cores vote this often, in rounds.
const VOTE_ROUNDS: u64 = 4;
/// Virtual servers and leases are looked at this often, in rounds.
const SERVICE_ROUNDS: u64 = 40;

/// Control thread: what it works with.
pub(crate) struct ControlThread {
    engine: Arc<crate::Shared>,
    neighbors: NeighborWatch,
    cores: CoreWatch,
    copies: CopyWatch,
}

impl ControlThread {
    pub fn new(engine: Arc<crate::Shared>) -> Self {
        Self {
            neighbors: NeighborWatch::default(),
            cores: CoreWatch::new(engine.counters.len(), linux::clock::monotonic_ns()),
            copies: CopyWatch::new(),
            engine,
        }
    }

    /// Runs until the engine stops.
    pub fn run(mut self) {
        let engine = Arc::clone(&self.engine);
        let mut round = 0u64;
        while !engine.stop.load(Relaxed) {
            round += 1;
            engine.control_rounds.store(round, Relaxed);
            self.cores.look(&engine);
            if let Some(reason) = self.copies.look() {
                tracing::warn!(reason, "all sessions end, for new keys");
                engine.node.end_sessions(Time::from_ns(linux::clock::monotonic_ns()));
                engine.wake_all();
            }
            if round.is_multiple_of(VOTE_ROUNDS) {
                self.cores.balance(&engine);
            }
            let serving = engine.gateway.active.load(Relaxed);
            if serving {
                engine.gateway.free_retired();
                if round.is_multiple_of(SERVICE_ROUNDS) {
                    let now_ns = linux::clock::monotonic_ns();
                    let policy = engine.gateway.policy.load();
                    policy.balancer.tick(now_ns);
                    policy.nat.leases().tick(now_ns);
                }
            }
            let pause = if serving { NEIGHBORS } else { ROUND };
            for _ in 0..(ROUND.as_millis() / pause.as_millis()) {
                if serving {
                    self.neighbors.follow(&engine);
                }
                std::thread::sleep(pause);
            }
        }
    }
}
