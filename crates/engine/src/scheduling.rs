//! Where and how a worker's thread runs: its CPU, and its turn among the other threads of that CPU.
//!
//! * A node with peers has little to do for long times and must send on time: its workers run as soon as they are woken. Where they
//!   have much to do, that would put them in front of the very program or kernel thread that sends the packets, for each packet
//!   anew; so a worker that uses a good part of its CPU lets the others end their turns, and finds a batch (decision 0006).
//! * A node without peers takes turns in equal parts.

use linux::affinity::{Scheduling, allow_current_thread, schedule_current_thread};

/// The CPU time of a thread is looked at over this long.
const WINDOW_NS: u64 = 100_000_000;
/// Shares of a CPU, in percent, from which on a thread is busy, and up to which it is idle.
const BUSY_PERCENT: u64 = 15;
const IDLE_PERCENT: u64 = 7;

/// Tells by its CPU time whether a thread has much to do.
#[derive(Debug, Default)]
struct Busyness {
    /// Beginning of the window, and the CPU time then, ns.
    since: (u64, u64),
    busy: bool,
}

impl Busyness {
    /// Whether it has much to do, by the clock and its CPU time, ns.
    fn look(&mut self, now_ns: u64, cpu_ns: u64) -> bool {
        let elapsed_ns = now_ns.saturating_sub(self.since.0);
        if elapsed_ns >= WINDOW_NS {
            let percent = cpu_ns.saturating_sub(self.since.1).saturating_mul(100) / elapsed_ns;
            self.busy = percent >= if self.busy { IDLE_PERCENT + 1 } else { BUSY_PERCENT };
            self.since = (now_ns, cpu_ns);
        }
        self.busy
    }
}

/// CPUs and scheduling of a worker's thread as they are now.
#[derive(Debug)]
pub(crate) struct Placement {
    core: u8,
    busyness: Busyness,
    /// Whether any CPU of the workers will do; it starts on its own.
    anywhere: bool,
    scheduling: Option<Scheduling>,
}

impl Placement {
    /// Of the worker of core `core`, which runs on its own CPU.
    pub fn new(core: u8) -> Self {
        Self { core, busyness: Busyness::default(), anywhere: false, scheduling: None }
    }

    /// Places the calling thread: with interfaces anywhere on the workers' CPUs, otherwise on its own.
    pub fn choose(&mut self, cpus: &[usize], interfaces: bool, peers: bool) {
        let busy = self.busyness.look(linux::clock::monotonic_ns(), linux::clock::thread_cpu_ns());
        if interfaces != self.anywhere {
            self.anywhere = interfaces;
            let own = cpus.get(usize::from(self.core)).map_or(&[][..], std::slice::from_ref);
            if let Err(error) = allow_current_thread(if interfaces { cpus } else { own }) {
                tracing::debug!(core = self.core, %error, "CPU stays");
            }
        }
        let scheduling = match (peers || !interfaces, busy) {
            (true, false) => Scheduling::Preempting,
            (true, true) => Scheduling::Batched,
            (false, _) => Scheduling::Equal,
        };
        if self.scheduling != Some(scheduling) {
            self.scheduling = Some(scheduling);
            if let Err(error) = schedule_current_thread(scheduling) {
                tracing::debug!(core = self.core, ?scheduling, %error, "priority stays");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_busy_from_one_share_on_until_another() {
        let mut busyness = Busyness { since: (1_000, 0), busy: false };
        let (mut now, mut cpu) = (1_000, 0);
        let mut after = |percent: u64| {
            (now, cpu) = (now + WINDOW_NS, cpu + WINDOW_NS / 100 * percent);
            busyness.look(now, cpu)
        };
        assert_eq!([5, 14, 15, 8, 7, 14, 90].map(&mut after), [false, false, true, true, false, false, true]);
        // Within a window nothing changes.
        assert!(!Busyness { since: (1_000, 0), busy: false }.look(2_000, 1_000));
    }
}
