//! The clocks of a worker.

/// Nanoseconds of the monotonic clock: never jumps, starts anywhere. All protocol timers use it.
pub fn monotonic_ns() -> u64 {
    nanoseconds(rustix::time::clock_gettime(rustix::time::ClockId::Monotonic))
}

/// Nanoseconds since the machine was started, the time for which it slept included. Never jumps.
pub fn boottime_ns() -> u64 {
    nanoseconds(rustix::time::clock_gettime(rustix::time::ClockId::Boottime))
}

/// Nanoseconds since 1970 of the wall clock; may jump, and may be close to 0 on a router without a battery.
/// 0 when the clock stands before 1970.
pub fn realtime_ns() -> u64 {
    nanoseconds(rustix::time::clock_gettime(rustix::time::ClockId::Realtime))
}

/// Nanoseconds of CPU time that the calling thread has used. A system call, unlike the other two.
pub fn thread_cpu_ns() -> u64 {
    nanoseconds(rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime))
}

fn nanoseconds(time: rustix::time::Timespec) -> u64 {
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_run() {
        let first = monotonic_ns();
        std::thread::sleep(std::time::Duration::from_millis(2));
        let passed = monotonic_ns() - first;
        assert!((2_000_000..2_000_000_000).contains(&passed), "{passed}");
        // 2020-01-01; the machine that builds this has a clock.
        assert!(realtime_ns() > 1_577_836_800_000_000_000);
        let used = thread_cpu_ns();
        assert!((1..=monotonic_ns()).contains(&used), "{used}");
    }
}
