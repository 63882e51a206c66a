//! Where and how a worker's thread runs: its CPU, and its turn among the other threads of that CPU.
//!
//! * A node with peers has little to do for long times and must send on time: its workers run as soon as they are woken. Where they
//!   have much to do, that would put them in front of the very program or kernel thread that sends the packets, for each packet
//!   anew; so a worker that uses a good part of its CPU lets the others end their turns, and finds a batch (decision 0006).
//! * A node without peers takes turns in equal parts.
//! * Workers of plain interfaces run on any of the workers' CPUs. Those of bonds stay on their own, which small packets are better for,
//!   but for one that has much to do and has to wait: it moves to a CPU that is idle, and back when it is calm. Where cores are reserved
//!   for classes (row T13) all stay: nobody else is to be on those CPUs.

use linux::affinity::{Scheduling, allow_current_thread, pin_current_thread, schedule_current_thread};
use linux::cpu_load;

/// The CPU time of a thread is looked at over this long.
const WINDOW_NS: u64 = 100_000_000;
/// Shares of a CPU, in percent, from which on a thread is busy, and up to which it is idle.
const BUSY_PERCENT: u64 = 15;
const IDLE_PERCENT: u64 = 7;

/// Whether a thread has to wait for its CPU is looked at over this long.
const CONTENTION_NS: u64 = 200_000_000;
/// It does if others had the CPU for this share of the time in which it could have run, percent …
const WAITS_PERCENT: u64 = 20;
/// … and moves to a CPU that was idle for at least this share.
const FREE_PERCENT: u64 = 50;

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

/// Tells which CPU a thread should move to that waits for its own.
#[derive(Debug, Default)]
struct Contention {
    /// Beginning of the window, and the time the thread had waited until then, ns.
    since: (u64, u64),
    /// Idle time of the CPUs at the beginning of the window, ns; empty: it began while nobody waited.
    idle_ns: Vec<u64>,
}

impl Contention {
    /// The place among the CPUs of one that is idle, when the thread waited for two windows. `waited_ns`: the time it has waited for
    /// a CPU so far. `idle_ns`: asks for the idle time of all CPUs, which costs more and is needed seldom.
    fn look(
        &mut self,
        now_ns: u64,
        waited_ns: u64,
        idle_ns: impl FnOnce() -> Option<Vec<u64>>,
    ) -> Option<usize> {
        let elapsed_ns = now_ns.saturating_sub(self.since.0);
        if elapsed_ns < CONTENTION_NS {
            return None;
        }
        let waited_ns_now = waited_ns.saturating_sub(self.since.1);
        self.since = (now_ns, waited_ns);
        let before = std::mem::take(&mut self.idle_ns);
        if waited_ns_now.saturating_mul(100) < elapsed_ns.saturating_mul(WAITS_PERCENT) {
            return None;
        }
        self.idle_ns = idle_ns()?;
        let idle = before.iter().zip(&self.idle_ns).map(|(before, now)| now.saturating_sub(*before));
        let (at, idle_ns) = idle.enumerate().max_by_key(|(_, idle_ns)| *idle_ns)?;
        (idle_ns.saturating_mul(100) >= elapsed_ns.saturating_mul(FREE_PERCENT)).then_some(at)
    }
}

/// Facts about a node that decide how its workers run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Duties {
    /// It reads plain interfaces.
    pub interfaces: bool,
    /// It has bonds.
    pub peers: bool,
    /// It reserves cores for classes of flows.
    pub reserves_cores: bool,
}

/// CPUs that a worker may run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Home {
    /// This one.
    Cpu(usize),
    /// Any of all workers'.
    Anywhere,
}

/// CPUs and scheduling of a worker's thread as they are now.
#[derive(Debug)]
pub(crate) struct Placement {
    core: u8,
    busyness: Busyness,
    contention: Contention,
    /// `None`: its own CPU, on which it starts.
    home: Option<Home>,
    scheduling: Option<Scheduling>,
}

impl Placement {
    /// Of the worker of core `core`, which runs on its own CPU.
    pub fn new(core: u8) -> Self {
        Self {
            core,
            busyness: Busyness::default(),
            contention: Contention::default(),
            home: None,
            scheduling: None,
        }
    }

    /// Places the calling thread by what its node does, how busy it is and how long it waits.
    pub fn choose(&mut self, cpus: &[usize], duties: Duties) {
        let now_ns = linux::clock::monotonic_ns();
        let busy = self.busyness.look(now_ns, linux::clock::thread_cpu_ns());
        let home = if duties.reserves_cores {
            None
        } else if duties.interfaces {
            Some(Home::Anywhere)
        } else if busy {
            self.idle_cpu(now_ns, cpus).map(Home::Cpu).or(self.home)
        } else {
            None
        };
        if home != self.home {
            self.home = home;
            self.move_to(home, cpus);
        }
        let scheduling = match (duties.peers || !duties.interfaces, busy) {
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

    /// A CPU to move to, if the calling thread has to wait for the one it is on. Of two that wait for each other one should move:
    /// each does every second time, by the clock's low digits.
    fn idle_cpu(&mut self, now_ns: u64, cpus: &[usize]) -> Option<usize> {
        let waited_ns = cpu_load::waited_ns()?;
        let at = self.contention.look(now_ns, waited_ns, || cpu_load::idle_ns(cpus))?;
        cpus.get(at).copied().filter(|_| (now_ns / 1_000).is_multiple_of(2))
    }

    fn move_to(&self, home: Option<Home>, cpus: &[usize]) {
        let moved = match home {
            Some(Home::Anywhere) => allow_current_thread(cpus),
            Some(Home::Cpu(cpu)) => pin_current_thread(cpu),
            None => cpus.get(usize::from(self.core)).map_or(Ok(()), |own| pin_current_thread(*own)),
        };
        match moved {
            Ok(()) => tracing::debug!(core = self.core, ?home, "moved"),
            Err(error) => tracing::debug!(core = self.core, ?home, %error, "CPU stays"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_moves_to_a_cpu_that_was_idle_all_the_while() {
        const MS: u64 = 1_000_000;
        // Waited of each 200 ms, and idle of it by CPU, ms: where to.
        let looks = [
            (10, [0, 200], None),
            // The idle time before this window is not known.
            (100, [0, 200], None),
            (100, [10, 150], Some(1)),
            (100, [10, 90], None),
            (100, [120, 110], Some(0)),
            (30, [0, 200], None),
            (100, [0, 200], None),
        ];
        let mut contention = Contention { since: (1_000 * MS, 0), idle_ns: Vec::new() };
        let (mut now_ns, mut waited_ns, mut idle_ns) = (1_000 * MS, 0, vec![0, 0]);
        for (number, (waited_ms, idle_ms, expected)) in looks.into_iter().enumerate() {
            // Within a window nothing is decided.
            assert_eq!(contention.look(now_ns + 100 * MS, waited_ns + 90 * MS, || unreachable!()), None);
            (now_ns, waited_ns) = (now_ns + 200 * MS, waited_ns + waited_ms * MS);
            idle_ns = idle_ns.iter().zip(idle_ms).map(|(sum, more)| sum + more * MS).collect();
            let found = contention.look(now_ns, waited_ns, || Some(idle_ns.clone()));
            assert_eq!(found, expected, "look {number}");
        }
        // Without the kernel's counts nobody moves.
        assert_eq!(contention.look(now_ns + 200 * MS, waited_ns + 200 * MS, || None), None);
    }

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
