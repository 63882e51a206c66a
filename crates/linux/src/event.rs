//! Events that a thread sleeps on: [`Epoll`], and the descriptors that wake it: [`EventFd`] (another thread),
//! [`Timer`] (a moment of the monotonic clock) and [`Signals`] (SIGINT, SIGTERM, SIGHUP).

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

use crate::sys::{check, owned};

/// Readiness that an [`Epoll`] waits for on one descriptor. Level-triggered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Bytes to read.
    Read,
    /// Room to write.
    Write,
    /// Either.
    Both,
    /// Nothing but errors and hang-ups, which epoll always reports.
    None,
}

impl Interest {
    fn bits(self) -> u32 {
        (match self {
            Interest::Read => libc::EPOLLIN,
            Interest::Write => libc::EPOLLOUT,
            Interest::Both => libc::EPOLLIN | libc::EPOLLOUT,
            Interest::None => 0,
        }) as u32
    }
}

/// One descriptor that is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready {
    /// The number given to [`Epoll::add`].
    pub token: u64,
    /// A read will not block.
    pub readable: bool,
    /// A write will not block.
    pub writable: bool,
    /// An error or a hang-up is pending; a read or write tells which.
    pub failed: bool,
}

/// A set of descriptors to sleep on.
#[derive(Debug)]
pub struct Epoll {
    fd: OwnedFd,
}

/// At most so many ready descriptors are reported by one [`Epoll::wait`]; the others by the next.
pub const READY_MAX: usize = 64;

impl Epoll {
    /// An empty set.
    pub fn new() -> io::Result<Epoll> {
        // SAFETY: no pointers are passed.
        let fd = owned(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        Ok(Epoll { fd })
    }

    /// Adds a descriptor; `token` comes back in [`Ready`]. It leaves the set by [`Epoll::remove`] or when it
    /// is closed.
    pub fn add(&self, fd: impl AsFd, token: u64, interest: Interest) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_ADD, fd.as_fd(), token, interest)
    }

    /// Changes what is waited for.
    pub fn modify(&self, fd: impl AsFd, token: u64, interest: Interest) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_MOD, fd.as_fd(), token, interest)
    }

    /// Takes a descriptor out.
    pub fn remove(&self, fd: impl AsFd) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_DEL, fd.as_fd(), 0, Interest::None)
    }

    fn control(
        &self,
        operation: libc::c_int,
        fd: BorrowedFd<'_>,
        token: u64,
        interest: Interest,
    ) -> io::Result<()> {
        let mut event = libc::epoll_event { events: interest.bits(), u64: token };
        // SAFETY: `event` is valid for the call and both descriptors are open.
        check(unsafe { libc::epoll_ctl(self.fd.as_raw_fd(), operation, fd.as_raw_fd(), &mut event) })
            .map(drop)
    }

    /// Sleeps until something is ready or the time is over (`None` = for ever, zero = just look) and puts
    /// what is ready into `ready`, which is emptied first. A signal ends the sleep early with nothing ready.
    pub fn wait(&self, ready: &mut Vec<Ready>, timeout: Option<Duration>) -> io::Result<()> {
        ready.clear();
        let mut events = [MaybeUninit::<libc::epoll_event>::uninit(); READY_MAX];
        let count = match self.wait_raw(&mut events, timeout) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            Err(error) => return Err(error),
        };
        for event in events.iter().take(count) {
            // SAFETY: the kernel has filled the first `count` entries.
            let event = unsafe { event.assume_init() };
            let bits = event.events as libc::c_int;
            ready.push(Ready {
                token: event.u64,
                readable: bits & (libc::EPOLLIN | libc::EPOLLRDHUP) != 0,
                writable: bits & libc::EPOLLOUT != 0,
                failed: bits & (libc::EPOLLERR | libc::EPOLLHUP) != 0,
            });
        }
        Ok(())
    }

    fn wait_raw(
        &self,
        events: &mut [MaybeUninit<libc::epoll_event>; READY_MAX],
        timeout: Option<Duration>,
    ) -> io::Result<usize> {
        // `epoll_pwait2` (Linux 5.11) takes nanoseconds: pacing needs better than the milliseconds of
        // `epoll_wait`.
        let timespec = timeout.map(|timeout| libc::timespec {
            tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        });
        let timespec_pointer = timespec.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: `events` has room for READY_MAX entries; the time is null or lives on this stack; no signal
        // mask.
        let result = unsafe {
            libc::syscall(
                libc::SYS_epoll_pwait2,
                self.fd.as_raw_fd(),
                events.as_mut_ptr(),
                READY_MAX as libc::c_int,
                timespec_pointer,
                std::ptr::null::<libc::sigset_t>(),
                0usize,
            )
        };
        if let Ok(count) = usize::try_from(result) {
            return Ok(count);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ENOSYS) {
            return Err(error);
        }
        let ms = timeout.map_or(-1, |timeout| {
            libc::c_int::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(libc::c_int::MAX)
        });
        // SAFETY: `events` has room for READY_MAX entries.
        let count = check(unsafe {
            libc::epoll_wait(self.fd.as_raw_fd(), events.as_mut_ptr().cast(), READY_MAX as libc::c_int, ms)
        })?;
        Ok(usize::try_from(count).unwrap_or(0))
    }
}

impl AsFd for Epoll {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A counter that another thread raises to wake us.
#[derive(Debug)]
pub struct EventFd {
    fd: OwnedFd,
}

impl EventFd {
    /// A counter at zero.
    pub fn new() -> io::Result<EventFd> {
        Ok(EventFd { fd: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)? })
    }

    /// Makes it readable. Never blocks: a full counter (2^64 − 2 signals) is as awake as it can be.
    pub fn signal(&self) -> io::Result<()> {
        match rustix::io::write(&self.fd, &1u64.to_ne_bytes()) {
            Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Number of signals since the last call; 0 if none.
    pub fn drain(&self) -> io::Result<u64> {
        read_counter(&self.fd)
    }

    /// A second handle of the same counter.
    pub fn try_clone(&self) -> io::Result<EventFd> {
        Ok(EventFd { fd: self.fd.try_clone()? })
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A timer of the monotonic clock that becomes readable when it fires.
#[derive(Debug)]
pub struct Timer {
    fd: OwnedFd,
}

impl Timer {
    /// A timer that is not armed.
    pub fn new() -> io::Result<Timer> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Timer { fd: rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)? })
    }

    /// Fires once at this moment of [`crate::clock::monotonic_ns`]; at once if it has passed.
    pub fn arm_at(&self, at_ns: u64) -> io::Result<()> {
        // The kernel takes zero for "disarm".
        self.set(TimerfdTimerFlags::ABSTIME, at_ns.max(1), 0)
    }

    /// Fires every `period`, the first time after one period. A period of zero counts as 1 ns.
    pub fn arm_every(&self, period: Duration) -> io::Result<()> {
        let period_ns = u64::try_from(period.as_nanos()).unwrap_or(u64::MAX).max(1);
        self.set(TimerfdTimerFlags::empty(), period_ns, period_ns)
    }

    /// Does not fire any more.
    pub fn disarm(&self) -> io::Result<()> {
        self.set(TimerfdTimerFlags::empty(), 0, 0)
    }

    /// How often it has fired since the last call.
    pub fn drain(&self) -> io::Result<u64> {
        read_counter(&self.fd)
    }

    fn set(&self, flags: TimerfdTimerFlags, value_ns: u64, interval_ns: u64) -> io::Result<()> {
        let value = Itimerspec { it_value: timespec(value_ns), it_interval: timespec(interval_ns) };
        rustix::time::timerfd_settime(&self.fd, flags, &value)?;
        Ok(())
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn timespec(ns: u64) -> Timespec {
    Timespec { tv_sec: (ns / 1_000_000_000).cast_signed(), tv_nsec: (ns % 1_000_000_000).cast_signed() }
}

fn read_counter(fd: &OwnedFd) -> io::Result<u64> {
    let mut bytes = [0; 8];
    match rustix::io::read(fd, &mut bytes) {
        Ok(_) => Ok(u64::from_ne_bytes(bytes)),
        Err(rustix::io::Errno::AGAIN) => Ok(0),
        Err(error) => Err(error.into()),
    }
}

/// A signal that a daemon handles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// Ctrl-C.
    Interrupt,
    /// A polite request to end.
    Terminate,
    /// Reload the configuration.
    HangUp,
    /// A child process has ended.
    Child,
}

impl Signal {
    const ALL: [Signal; 4] = [Signal::Interrupt, Signal::Terminate, Signal::HangUp, Signal::Child];

    fn number(self) -> libc::c_int {
        match self {
            Signal::Interrupt => libc::SIGINT,
            Signal::Terminate => libc::SIGTERM,
            Signal::HangUp => libc::SIGHUP,
            Signal::Child => libc::SIGCHLD,
        }
    }
}

/// Signals as a readable descriptor.
#[derive(Debug)]
pub struct Signals {
    fd: OwnedFd,
}

impl Signals {
    /// Blocks these signals in the calling thread, and in all threads it starts from now on, and receives
    /// them here instead. Call it in `main` before any other thread exists.
    /// Child processes inherit the mask; [`crate::netns::prepare_command`] clears it for them.
    pub fn new(signals: &[Signal]) -> io::Result<Signals> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: `sigemptyset` initialises the set before anything reads it; signal numbers are valid.
        let set = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in signals {
                libc::sigaddset(set.as_mut_ptr(), signal.number());
            }
            set.assume_init()
        };
        // SAFETY: `set` is initialised; the old mask is not asked for.
        let error = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) };
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        // SAFETY: `set` is initialised.
        let fd = owned(unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) })?;
        Ok(Signals { fd })
    }

    /// The next pending signal, if any.
    pub fn next(&self) -> io::Result<Option<Signal>> {
        let mut bytes = [0; size_of::<libc::signalfd_siginfo>()];
        match rustix::io::read(&self.fd, &mut bytes) {
            Ok(_) => {
                // The number is the first field of `signalfd_siginfo`.
                let number = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]).cast_signed();
                Ok(Signal::ALL.into_iter().find(|signal| signal.number() == number))
            }
            Err(rustix::io::Errno::AGAIN) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::clock::monotonic_ns;

    #[test]
    fn an_eventfd_wakes_epoll_and_is_drained() {
        let (epoll, event) = (Epoll::new().unwrap(), EventFd::new().unwrap());
        epoll.add(&event, 77, Interest::Read).unwrap();
        let mut ready = Vec::new();
        epoll.wait(&mut ready, Some(Duration::ZERO)).unwrap();
        assert!(ready.is_empty());
        let other = event.try_clone().unwrap();
        std::thread::spawn(move || {
            other.signal().unwrap();
            other.signal().unwrap();
        })
        .join()
        .unwrap();
        epoll.wait(&mut ready, None).unwrap();
        assert_eq!(ready, [Ready { token: 77, readable: true, writable: false, failed: false }]);
        assert_eq!(event.drain().unwrap(), 2);
        assert_eq!(event.drain().unwrap(), 0);
        epoll.modify(&event, 78, Interest::Both).unwrap();
        epoll.wait(&mut ready, Some(Duration::ZERO)).unwrap();
        assert_eq!(ready, [Ready { token: 78, readable: false, writable: true, failed: false }]);
        epoll.remove(&event).unwrap();
        epoll.wait(&mut ready, Some(Duration::ZERO)).unwrap();
        assert!(ready.is_empty());
    }

    #[test]
    fn a_wait_of_300_microseconds_does_not_take_milliseconds() {
        let epoll = Epoll::new().unwrap();
        let mut ready = Vec::new();
        let best = (0..20)
            .map(|_| {
                let start = monotonic_ns();
                epoll.wait(&mut ready, Some(Duration::from_micros(300))).unwrap();
                monotonic_ns() - start
            })
            .min()
            .unwrap();
        assert!((300_000..900_000).contains(&best), "{best} ns");
    }

    #[test]
    fn a_timer_fires_at_its_moment_and_not_after_disarm() {
        let (epoll, timer) = (Epoll::new().unwrap(), Timer::new().unwrap());
        epoll.add(&timer, 1, Interest::Read).unwrap();
        let at = monotonic_ns() + 3_000_000;
        timer.arm_at(at).unwrap();
        let mut ready = Vec::new();
        while ready.is_empty() {
            epoll.wait(&mut ready, None).unwrap();
        }
        assert!(monotonic_ns() >= at);
        assert_eq!(timer.drain().unwrap(), 1);
        timer.arm_at(0).unwrap();
        epoll.wait(&mut ready, None).unwrap();
        assert_eq!((ready.len(), timer.drain().unwrap()), (1, 1));
        timer.arm_every(Duration::from_millis(1)).unwrap();
        std::thread::sleep(Duration::from_millis(10));
        assert!(timer.drain().unwrap() >= 5);
        timer.disarm().unwrap();
        timer.drain().unwrap();
        epoll.wait(&mut ready, Some(Duration::from_millis(5))).unwrap();
        assert!(ready.is_empty());
    }

    #[test]
    fn signals_arrive_through_the_descriptor() {
        std::thread::spawn(|| {
            let signals = Signals::new(&[Signal::HangUp, Signal::Terminate]).unwrap();
            assert_eq!(signals.next().unwrap(), None);
            // SAFETY: sends a signal to this thread only, where it is blocked.
            assert_eq!(unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGHUP) }, 0);
            assert_eq!(signals.next().unwrap(), Some(Signal::HangUp));
            assert_eq!(signals.next().unwrap(), None);
        })
        .join()
        .unwrap();
    }
}
