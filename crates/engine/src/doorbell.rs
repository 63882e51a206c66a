//! Doorbell of a worker: wakes it when it sleeps, and costs no system call while it is awake.
//!
//! The worker's side, in this order: [`Doorbell::prepare_sleep`], look at everything once more, wait for the event if
//! nothing was there, [`Doorbell::woke`], look at everything. The other side: put something where the worker looks, then
//! [`Doorbell::ring`]. Either the worker's last look finds it or the ring finds the worker asleep; the fences of both sides
//! see to that. `loom` tests go through all interleavings.

use std::sync::atomic::Ordering::{AcqRel, Relaxed, SeqCst};

use linux::event::EventFd;

use crate::sync::{AtomicBool, fence};

/// A level-triggered event that one thread waits for: an [`EventFd`] in an epoll set.
pub trait Event {
    /// Makes the event readable until it is drained; from any thread.
    fn signal(&self);

    /// Makes the event unreadable again.
    fn drain(&self);
}

impl Event for EventFd {
    fn signal(&self) {
        // It can only fail when the counter is full, and then the event is readable already.
        let _ = EventFd::signal(self);
    }

    fn drain(&self) {
        // It can only fail when there is nothing to drain.
        let _ = EventFd::drain(self);
    }
}

/// Doorbell of one worker.
pub struct Doorbell<E = EventFd> {
    asleep: AtomicBool,
    event: E,
}

impl Doorbell {
    /// A doorbell that nobody has rung, of a worker that is awake.
    ///
    /// # Errors
    /// The process has no file descriptors left.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self::with_event(EventFd::new()?))
    }
}

impl<E: Event> Doorbell<E> {
    /// A doorbell that signals `event`.
    pub fn with_event(event: E) -> Self {
        Self { asleep: AtomicBool::new(false), event }
    }

    /// Wakes the worker if it sleeps or is about to. Call it after what the worker shall see has been put in place.
    pub fn ring(&self) {
        // Pairs with the fence in `prepare_sleep`.
        fence(SeqCst);
        if self.asleep.load(Relaxed) && self.asleep.swap(false, AcqRel) {
            self.event.signal();
        }
    }

    /// Wakes the worker, or keeps it from its next sleep, whatever it does now.
    pub fn ring_always(&self) {
        self.event.signal();
    }

    /// Announces the worker's sleep: from now on [`Self::ring`] signals. The worker looks at everything once more before it
    /// does sleep.
    pub fn prepare_sleep(&self) {
        // All changes of the flag are swaps, so that each side sees which one came before its own.
        self.asleep.swap(true, AcqRel);
        // Pairs with the fence in `ring`.
        fence(SeqCst);
    }

    /// Ends the worker's sleep; `signalled`: it was the event that ended it. The event is drained here, before the worker
    /// looks at anything: a signal that comes later belongs to something that this round may have missed.
    pub fn woke(&self, signalled: bool) {
        if self.asleep.load(Relaxed) {
            self.asleep.swap(false, AcqRel);
        }
        if signalled {
            self.event.drain();
        }
    }

    /// Whether the worker sleeps or is about to.
    pub fn is_asleep(&self) -> bool {
        self.asleep.load(Relaxed)
    }

    /// Event to wait for.
    pub fn event(&self) -> &E {
        &self.event
    }
}

/// Version of something that control replaces and workers follow: the new value is stored first, then the version is raised,
/// so that whoever sees the new version sees a value at least as new.
#[derive(Debug)]
pub struct Version(crate::sync::AtomicU64);

impl Default for Version {
    /// The first version, 1; a follower that has seen none starts from 0.
    fn default() -> Self {
        Self(crate::sync::AtomicU64::new(1))
    }
}

impl Version {
    /// Tells the followers, after the value was stored. It does not wake them.
    pub fn raise(&self) {
        self.0.fetch_add(1, std::sync::atomic::Ordering::Release);
    }

    /// Whether the version is another than `seen`, which is then updated. The caller loads the value afterwards.
    pub fn changed(&self, seen: &mut u64) -> bool {
        let now = self.0.load(std::sync::atomic::Ordering::Acquire);
        std::mem::replace(seen, now) != now
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    use linux::event::{Epoll, Interest};

    use super::*;

    fn is_signalled(bell: &Doorbell) -> bool {
        let epoll = Epoll::new().unwrap();
        epoll.add(bell.event(), 0, Interest::Read).unwrap();
        let mut ready = Vec::new();
        epoll.wait(&mut ready, Some(Duration::ZERO)).unwrap();
        !ready.is_empty()
    }

    #[test]
    fn a_ring_signals_a_sleeper_once_and_an_awake_worker_never() {
        let bell = Doorbell::new().unwrap();
        bell.ring();
        assert!(!is_signalled(&bell), "it is awake");
        bell.prepare_sleep();
        assert!(bell.is_asleep());
        bell.ring();
        assert!(is_signalled(&bell) && !bell.is_asleep());
        bell.woke(true);
        bell.ring();
        assert!(!is_signalled(&bell), "drained, and nobody sleeps");
        bell.ring_always();
        assert!(is_signalled(&bell));
    }

    #[test]
    fn a_version_is_seen_once_by_each_follower() {
        let version = Version::default();
        let (mut first, mut second) = (0, 0);
        assert!(version.changed(&mut first) && !version.changed(&mut first));
        version.raise();
        version.raise();
        assert!(version.changed(&mut first) && !version.changed(&mut first));
        assert!(version.changed(&mut second) && !version.changed(&mut second));
    }

    #[test]
    fn every_one_of_many_quick_rings_is_answered() {
        let bell = Arc::new(Doorbell::new().unwrap());
        let todo = Arc::new(AtomicUsize::new(0));
        let ringer = {
            let (bell, todo) = (Arc::clone(&bell), Arc::clone(&todo));
            std::thread::spawn(move || {
                for _ in 0..20_000 {
                    todo.fetch_add(1, AcqRel);
                    bell.ring();
                    // The next one only when this one was seen: a lost ring stops everything.
                    while todo.load(Relaxed) > 0 {
                        std::thread::yield_now();
                    }
                }
            })
        };
        let epoll = Epoll::new().unwrap();
        epoll.add(bell.event(), 0, Interest::Read).unwrap();
        let (mut ready, mut done) = (Vec::new(), 0);
        while done < 20_000 {
            bell.prepare_sleep();
            let wait = if todo.load(Relaxed) == 0 { Duration::from_secs(20) } else { Duration::ZERO };
            epoll.wait(&mut ready, Some(wait)).unwrap();
            bell.woke(!ready.is_empty());
            let found = todo.swap(0, AcqRel);
            assert!(found > 0 || !ready.is_empty() || wait.is_zero(), "a ring was lost");
            done += found;
        }
        ringer.join().unwrap();
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use loom::sync::atomic::{AtomicUsize, Ordering::Acquire, Ordering::Release};
    use loom::sync::{Arc, Condvar, Mutex};
    use loom::thread;

    use super::*;

    /// An eventfd in an epoll set, for one waiter: a lost wake-up is a deadlock, which loom reports.
    #[derive(Default)]
    struct Signal {
        readable: Mutex<bool>,
        changed: Condvar,
    }

    impl Event for Signal {
        fn signal(&self) {
            *self.readable.lock().unwrap() = true;
            self.changed.notify_one();
        }

        fn drain(&self) {
            *self.readable.lock().unwrap() = false;
        }
    }

    impl Signal {
        fn wait(&self) {
            let mut readable = self.readable.lock().unwrap();
            while !*readable {
                readable = self.changed.wait(readable).unwrap();
            }
        }

        /// Epoll with no time to wait.
        fn poll(&self) -> bool {
            *self.readable.lock().unwrap()
        }
    }

    /// The bounds of [`loom::model`]: all interleavings of three threads with at most three preemptions.
    fn explore(model: impl Fn() + Send + Sync + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(model);
    }

    /// Two producers with a ring each. A ring's end is published as rtrb does: stored with release, read with acquire.
    #[test]
    fn loom_no_wake_up_is_lost() {
        explore(|| {
            let bell = Arc::new(Doorbell::with_event(Signal::default()));
            let tails = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
            for producer in 0..2 {
                let (bell, tails) = (Arc::clone(&bell), Arc::clone(&tails));
                thread::spawn(move || {
                    tails[producer].store(1, Release);
                    bell.ring();
                });
            }
            let mut heads = [0, 0];
            let mut signalled = false;
            loop {
                bell.woke(signalled);
                for (head, tail) in heads.iter_mut().zip(&*tails) {
                    *head = tail.load(Acquire);
                }
                if heads == [1, 1] {
                    return;
                }
                bell.prepare_sleep();
                let idle = heads.iter().zip(&*tails).all(|(head, tail)| *head == tail.load(Acquire));
                if idle {
                    bell.event().wait();
                }
                signalled = idle || bell.event().poll();
            }
        });
    }

    /// One producer of two items: the second may find the doorbell as the first left it.
    #[test]
    fn loom_a_second_ring_is_not_lost_behind_the_first() {
        explore(|| {
            let bell = Arc::new(Doorbell::with_event(Signal::default()));
            let tail = Arc::new(AtomicUsize::new(0));
            {
                let (bell, tail) = (Arc::clone(&bell), Arc::clone(&tail));
                thread::spawn(move || {
                    for end in 1..=2 {
                        tail.store(end, Release);
                        bell.ring();
                    }
                });
            }
            let mut signalled = false;
            loop {
                bell.woke(signalled);
                let head = tail.load(Acquire);
                if head == 2 {
                    return;
                }
                bell.prepare_sleep();
                let idle = tail.load(Acquire) == head;
                if idle {
                    bell.event().wait();
                }
                signalled = idle || bell.event().poll();
            }
        });
    }

    /// A snapshot that control replaces twice, and a command in the worker's mailbox: store, raise, ring; post, ring. The
    /// worker asks its mailbox only when it was signalled.
    #[test]
    fn loom_snapshots_and_commands_reach_a_worker_that_falls_asleep() {
        explore(|| {
            let bell = Arc::new(Doorbell::with_event(Signal::default()));
            let snapshot = Arc::new(AtomicUsize::new(0));
            let version = Arc::new(Version::default());
            let mailbox = Arc::new(Mutex::new(0));
            {
                let (bell, snapshot, version) =
                    (Arc::clone(&bell), Arc::clone(&snapshot), Arc::clone(&version));
                let mailbox = Arc::clone(&mailbox);
                thread::spawn(move || {
                    snapshot.store(1, Release);
                    version.raise();
                    bell.ring_always();
                    *mailbox.lock().unwrap() = 1;
                    bell.ring_always();
                    snapshot.store(2, Release);
                    version.raise();
                    bell.ring_always();
                });
            }
            let (mut seen, mut followed, mut commands) = (1, 0, 0);
            let mut signalled = false;
            loop {
                bell.woke(signalled);
                if version.changed(&mut seen) {
                    let value = snapshot.load(Acquire);
                    assert!(value >= (seen - 1) as usize, "version {seen} came before its value");
                    followed = value;
                }
                if signalled {
                    commands += std::mem::take(&mut *mailbox.lock().unwrap());
                }
                if followed == 2 && commands == 1 {
                    return;
                }
                bell.prepare_sleep();
                bell.event().wait();
                signalled = true;
            }
        });
    }
}
