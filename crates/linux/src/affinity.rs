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

/// Niceness of a packet worker: before ordinary programs, behind real-time ones.
const WORKER_NICENESS: i32 = -10;

/// Lets the calling thread run as soon as a packet or timer calls it: higher priority than ordinary programs, and
/// timers that end when they should instead of up to 50 µs later. The first needs CAP_SYS_NICE; without it the
/// thread stays as it is and the error says so.
pub fn prefer_current_thread() -> Result<()> {
    // SAFETY: PR_SET_TIMERSLACK takes one number and no pointer.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1_000_u64, 0, 0, 0) };
    // On Linux process 0 of this call is the calling thread alone.
    rustix::process::setpriority_process(None, WORKER_NICENESS).context("raise the priority of a worker")
}

/// Takes back the priority of [`prefer_current_thread`]: the calling thread shares its CPU with ordinary programs in
/// equal parts. Its timers stay exact.
pub fn share_current_thread() -> Result<()> {
    rustix::process::setpriority_process(None, 0).context("lower the priority of a worker")
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
}

/// Looks at a thread of this process by its kernel id. `None`: there is no such thread, or no `/proc`.
pub fn thread_view(id: u32) -> Option<ThreadView> {
    let read = |file: &str| std::fs::read_to_string(format!("/proc/self/task/{id}/{file}")).ok();
    // The name is in parentheses and may have any character: the state is behind the last one (proc_pid_stat(5)).
    let stat = read("stat")?;
    let state = stat.rsplit_once(')')?.1.trim_start().chars().next()?;
    let ran_ns = read("schedstat")?.split_ascii_whitespace().next()?.parse().ok()?;
    Some(ThreadView { runnable: state == 'R', ran_ns })
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
    fn a_preferred_thread_shares_again() {
        // A thread of its own: that of the test stays as it is.
        std::thread::spawn(|| {
            let before = niceness();
            // Without the right to it nothing changes.
            let preferred = prefer_current_thread().is_ok();
            assert_eq!(niceness(), if preferred { WORKER_NICENESS } else { before });
            if preferred {
                share_current_thread().unwrap();
                assert_eq!(niceness(), 0);
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
