//! Which CPUs this process may use, and pinning a worker to one of them.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::Result;
use crate::error::Context;

/// Numbers of the CPUs this thread may run on, ascending (honours `taskset` and cpusets of containers).
pub fn allowed_cpus() -> Result<Vec<usize>> {
    let set = sched_getaffinity(None).context("read the CPU affinity")?;
    Ok((0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect())
}

/// Binds the calling thread to one CPU. Fails if the CPU is not allowed or is off line.
pub fn pin_current_thread(cpu: usize) -> Result<()> {
    allow_current_thread(&[cpu])
}

/// Lets the calling thread run on any of these CPUs. Fails if none of them is allowed and on line.
pub fn allow_current_thread(cpus: &[usize]) -> Result<()> {
    let mut set = CpuSet::new();
    for cpu in cpus {
        if *cpu >= CpuSet::MAX_CPU {
            let error = std::io::Error::new(std::io::ErrorKind::InvalidInput, "CPU number too large");
            return Err(crate::Error::new(format!("pin the thread to CPU {cpu}"), error));
        }
        set.set(*cpu);
    }
    sched_setaffinity(None, &set).context(format_args!("pin the thread to CPUs {cpus:?}"))
}

/// Niceness of a packet worker that has more say than ordinary programs.
const WORKER_NICENESS: i32 = -10;

/// How the calling thread shares its CPU with other threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheduling {
    /// Runs as soon as it is woken, before ordinary programs (`SCHED_OTHER`, niceness −10).
    Preempting,
    /// The same share, but whoever runs when it is woken ends its turn first (`SCHED_BATCH`, niceness −10).
    Batched,
    /// Shares in equal parts with ordinary programs (`SCHED_OTHER`, niceness 0).
    Equal,
}

/// Chooses how the calling thread is scheduled. More than an ordinary program's share needs CAP_SYS_NICE; without it the thread
/// stays at its niceness and the error says so.
pub fn schedule_current_thread(scheduling: Scheduling) -> Result<()> {
    let (policy, niceness) = match scheduling {
        Scheduling::Preempting => (libc::SCHED_OTHER, WORKER_NICENESS),
        Scheduling::Batched => (libc::SCHED_BATCH, WORKER_NICENESS),
        Scheduling::Equal => (libc::SCHED_OTHER, 0),
    };
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the pointer is to a valid sched_param for the time of the call; thread 0 is the calling one.
    if unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) } != 0 {
        return Err(std::io::Error::last_os_error()).context("choose the scheduling policy of a worker");
    }
    // On Linux process 0 of this call is the calling thread alone.
    rustix::process::setpriority_process(None, niceness).context("choose the priority of a worker")
}

/// Lets the calling thread's timers end when they should in place of up to 50 µs later.
pub fn make_timers_exact() {
    // SAFETY: PR_SET_TIMERSLACK takes one number and no pointer.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1_000_u64, 0, 0, 0) };
}

/// The CPU this thread runs on right now.
pub fn current_cpu() -> usize {
    rustix::thread::sched_getcpu()
}

/// The kernel's id of the calling thread.
pub fn thread_id() -> u32 {
    rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs()
}

/// A thread of this process as the scheduler sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThreadView {
    /// It runs, or could if it got a CPU; false while it sleeps, waits for a device or is halted.
    pub runnable: bool,
    /// CPU time that it has had, ns.
    pub ran_ns: u64,
    /// Time in which it could have run and another thread had the CPU, or the limit of its control group was reached, ns.
    pub waited_ns: u64,
}

/// Looks at a thread of this process by its kernel id. `None`: there is no such thread, or no `/proc`.
pub fn thread_view(id: u32) -> Option<ThreadView> {
    let read = |file: &str| std::fs::read_to_string(format!("/proc/self/task/{id}/{file}")).ok();
    // The name is in parentheses and may have any character: the state is behind the last one (proc_pid_stat(5)).
    let stat = read("stat")?;
    let state = stat.rsplit_once(')')?.1.trim_start().chars().next()?;
    let times = read("schedstat")?;
    let mut times = times.split_ascii_whitespace().map(|time| time.parse().ok());
    let (ran_ns, waited_ns) = (times.next()??, times.next()??);
    Some(ThreadView { runnable: state == 'R', ran_ns, waited_ns })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// Niceness of the calling thread.
    fn niceness() -> i32 {
        rustix::process::getpriority_process(None).unwrap()
    }

    #[test]
    fn a_thread_that_works_is_seen_to_run_and_one_that_sleeps_is_not() {
        use std::sync::mpsc::channel;
        let ((send_id, id), (stop, stopped)) = (channel(), channel::<()>());
        let worker = std::thread::spawn(move || {
            send_id.send(thread_id()).unwrap();
            while stopped.try_recv().is_err() {
                std::hint::spin_loop();
            }
            send_id.send(0).unwrap();
            let _ = stopped.recv();
        });
        let thread = id.recv().unwrap();
        let before = thread_view(thread).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(50));
        let after = thread_view(thread).unwrap();
        assert!(before.runnable && after.runnable && after.ran_ns > before.ran_ns, "{before:?} {after:?}");
        stop.send(()).unwrap();
        id.recv().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(!thread_view(thread).unwrap().runnable);
        stop.send(()).unwrap();
        worker.join().unwrap();
        assert_eq!(thread_view(0), None);
    }

    #[test]
    fn a_thread_is_scheduled_as_chosen() {
        // A thread of its own: that of the test stays as it is.
        std::thread::spawn(|| {
            // SAFETY: takes a number and no pointer.
            let policy = || unsafe { libc::sched_getscheduler(0) };
            let before = niceness();
            for (scheduling, wanted) in [
                (Scheduling::Batched, (libc::SCHED_BATCH, WORKER_NICENESS)),
                (Scheduling::Preempting, (libc::SCHED_OTHER, WORKER_NICENESS)),
                (Scheduling::Equal, (libc::SCHED_OTHER, 0)),
            ] {
                // Without the right to it the niceness stays.
                let allowed = schedule_current_thread(scheduling).is_ok();
                assert_eq!(policy(), wanted.0);
                assert_eq!(niceness(), if allowed { wanted.1 } else { before });
            }
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_thread_is_pinned_to_each_allowed_cpu() {
        // A thread of its own: the affinity of the test's thread stays as it is.
        std::thread::spawn(|| {
            let all = allowed_cpus().unwrap();
            for cpu in all.clone() {
                pin_current_thread(cpu).unwrap();
                assert_eq!(current_cpu(), cpu);
                assert_eq!(allowed_cpus().unwrap(), [cpu]);
                allow_current_thread(&all).unwrap();
                assert_eq!(allowed_cpus().unwrap(), all);
            }
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_cpu_that_does_not_exist_is_an_error() {
        assert!(pin_current_thread(1023).is_err());
        assert!(pin_current_thread(1 << 40).is_err());
    }
}
