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

/// A time of the wall clock where this machine stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalTime {
    /// Year.
    pub year: i32,
    /// Month, 1–12.
    pub month: u8,
    /// Day of the month, 1–31.
    pub day: u8,
    /// Day of the week, from 0, Monday.
    pub weekday: u8,
    /// Minute of the day, 0–1439.
    pub minute: u16,
}

/// The local time so many seconds after 1970, by `TZ` or `/etc/localtime`.
pub fn local_time(seconds: u64) -> LocalTime {
    // SAFETY: all zeros is a value of this struct of numbers and one pointer that nobody follows.
    let mut parts: libc::tm = unsafe { std::mem::zeroed() };
    let seconds = libc::time_t::try_from(seconds).unwrap_or(0);
    // SAFETY: both point to values that live through the call, which keeps neither.
    unsafe { libc::localtime_r(&raw const seconds, &raw mut parts) };
    let small = |value: i32| u8::try_from(value).unwrap_or(0);
    LocalTime {
        year: parts.tm_year + 1900,
        month: small(parts.tm_mon + 1),
        day: small(parts.tm_mday),
        weekday: small((parts.tm_wday + 6) % 7),
        minute: u16::try_from(parts.tm_hour * 60 + parts.tm_min).unwrap_or(0),
    }
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
    fn local_time_is_within_a_day_of_utc() {
        // 2026-03-04 12:00 UTC, a Wednesday.
        let noon = local_time(1_772_625_600);
        assert_eq!((noon.year, noon.month), (2026, 3));
        assert!(
            (3..=5).contains(&noon.day) && noon.weekday == noon.day - 2 && noon.minute < 1_440,
            "{noon:?}"
        );
    }

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
