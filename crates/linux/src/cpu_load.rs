//! CPU load as the kernel counts it: how long a thread waited for a CPU, and how long CPUs were idle.

use std::fs;

/// Nanoseconds of a clock tick of `/proc/stat`: `USER_HZ` is 100 on all architectures that Rust's standard library knows for Linux.
const TICK_NS: u64 = 10_000_000;

/// Time in which the calling thread could have run and another had the CPU, since the thread began, ns. `None`: the kernel does not
/// count it (`CONFIG_SCHED_INFO`), or there is no `/proc`.
#[must_use]
pub fn waited_ns() -> Option<u64> {
    waited_of(&fs::read_to_string("/proc/thread-self/schedstat").ok()?)
}

/// Second of the three numbers of a `schedstat`: time on a run queue, ns.
fn waited_of(schedstat: &str) -> Option<u64> {
    schedstat.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// Time for which each of these CPUs was idle since the system started, ns, in ticks of 10 ms. `None`: one of them is not counted, or
/// there is no `/proc`.
#[must_use]
pub fn idle_ns(cpus: &[usize]) -> Option<Vec<u64>> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    cpus.iter().map(|cpu| idle_of(&stat, *cpu)).collect()
}

/// Idle and waiting for devices, of one CPU, ns (`proc_stat(5)`: fields 4 and 5).
fn idle_of(stat: &str, cpu: usize) -> Option<u64> {
    let name = format!("cpu{cpu} ");
    let times = stat.lines().find_map(|line| line.strip_prefix(&name))?;
    let mut times = times.split_ascii_whitespace().skip(3).map(|ticks| ticks.parse::<u64>().ok());
    let (idle, waiting) = (times.next()??, times.next().flatten().unwrap_or(0));
    Some(idle.saturating_add(waiting).saturating_mul(TICK_NS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_writes_is_read() {
        assert_eq!(waited_of("1201845 88123 17\n"), Some(88_123));
        assert_eq!(waited_of(""), None);
        let stat = "cpu  9 9 9 9 9 9 9 0 0 0\ncpu1 1 2 3 50 7 0 0 0 0 0\ncpu10 1 2 3 4\nintr 5 6\n";
        assert_eq!(idle_of(stat, 1), Some(57 * TICK_NS));
        assert_eq!(idle_of(stat, 10), Some(4 * TICK_NS));
        assert_eq!(idle_of(stat, 0), None);
        assert_eq!(idle_of("cpu0 1 2\n", 0), None);
    }

    #[test]
    fn a_thread_that_shares_a_cpu_waits_and_the_cpu_is_not_idle() {
        let cpu = crate::affinity::allowed_cpus().unwrap_or_default().first().copied().unwrap_or(0);
        let spin = move || -> crate::Result<Option<u64>> {
            crate::affinity::pin_current_thread(cpu)?;
            let (started, waited) = (std::time::Instant::now(), waited_ns());
            while started.elapsed() < std::time::Duration::from_millis(200) {
                std::hint::spin_loop();
            }
            Ok(waited_ns().zip(waited).map(|(after, before)| after - before))
        };
        let idle_before = idle_ns(&[cpu]);
        let threads = [std::thread::spawn(spin), std::thread::spawn(spin)];
        for thread in threads {
            let waited = thread.join().ok().and_then(Result::ok).flatten();
            assert!(waited.is_some_and(|waited_ns| waited_ns > 40_000_000), "{waited:?}");
        }
        let idle = idle_ns(&[cpu]).zip(idle_before).map(|(after, before)| after[0] - before[0]);
        assert!(idle.is_some_and(|idle_ns| idle_ns <= 100_000_000), "{idle:?}");
    }
}
