//! Thread of the monitors: when which target is checked, and how its state follows.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use linux::event::{Epoll, Interest, Ready};

use super::check::{Check, Closing, Failure, Step};
use super::rise_fall::{News, RiseFall};
use super::tls::TlsConfigs;
use super::{
    HealthChange, HealthNews, HealthTarget, Known, KnownTarget, MonitorState, MonitorStatus, OnNews, lock,
};

/// Token of the wake-up; ids of targets are smaller.
const WAKE: u64 = u64::MAX;

/// First checks come within this time, or within their interval if that is less.
const SPREAD: Duration = Duration::from_secs(1);

/// Connections that are tried at once; further checks wait for their end.
const CHECKS_MAX: usize = 4_096;

/// Processes that run at once; further commands wait for their end.
const SCRIPTS_MAX: usize = 64;

/// A check that had to wait is tried again so soon.
const AGAIN: Duration = Duration::from_millis(20);

/// Connections of checks that are done stay half closed so long, until their servers have closed them too, ...
const CLOSING: Duration = Duration::from_secs(1);

/// ... and no more of them than this: then the oldest is closed.
const CLOSING_MAX: usize = 256;

/// Killed processes are looked after so often.
const REAP: Duration = Duration::from_millis(100);

/// One target.
struct Monitor {
    target: HealthTarget,
    state: RiseFall,
    check: Option<Check>,
    /// When the present check began, or the last one.
    began: Instant,
    /// When it is the monitor's turn: to begin a check or to give one up.
    next: Instant,
}

/// All of them.
pub struct Runner {
    shared: Arc<MonitorState>,
    on_news: OnNews,
    epoll: Epoll,
    monitors: BTreeMap<u16, Monitor>,
    /// By [`Monitor::next`].
    queue: BTreeSet<(Instant, u16)>,
    /// Checks under way, and how many of them are processes.
    open: usize,
    scripts: usize,
    /// Killed processes that have not ended yet.
    killed: Vec<Child>,
    /// Connections of checks that are done, and when they are closed; oldest first.
    closing: VecDeque<(Instant, Closing)>,
    tls: TlsConfigs,
    random: u64,
}

impl Runner {
    /// Does nothing yet.
    pub fn new(shared: Arc<MonitorState>, on_news: OnNews) -> io::Result<Runner> {
        let epoll = Epoll::new()?;
        epoll.add(&shared.wake, WAKE, Interest::Read)?;
        let mut seed = [0; 8];
        getrandom::fill(&mut seed).map_err(|error| io::Error::other(error.to_string()))?;
        Ok(Runner {
            shared,
            on_news,
            epoll,
            monitors: BTreeMap::new(),
            queue: BTreeSet::new(),
            open: 0,
            scripts: 0,
            killed: Vec::new(),
            closing: VecDeque::new(),
            tls: TlsConfigs::default(),
            random: u64::from_le_bytes(seed) | 1,
        })
    }

    /// Until the handle is dropped.
    pub fn run(mut self) {
        let mut ready = Vec::new();
        while !self.shared.stop.load(Ordering::Relaxed) {
            let targets = lock(&self.shared.targets).take();
            if let Some(targets) = targets {
                self.replace(targets);
            }
            if let Err(error) = self.epoll.wait(&mut ready, self.sleep()) {
                // Never seen; not in a tight loop if it should happen.
                tracing::warn!(%error, "health monitors");
                std::thread::sleep(REAP);
            }
            self.turn(&ready);
        }
        for (_, monitor) in std::mem::take(&mut self.monitors) {
            self.killed.extend(monitor.check.and_then(Check::cancel));
        }
        for mut child in self.killed {
            let _ = child.wait();
        }
    }

    /// Answers first, so that what came in time counts even when this thread is late.
    fn turn(&mut self, ready: &[Ready]) {
        for event in ready {
            if event.token == WAKE {
                // Nothing to learn from the number of signals.
                let _ = self.shared.wake.drain();
            } else if let Ok(id) = u16::try_from(event.token) {
                self.advance(id);
            }
        }
        let now = Instant::now();
        while let Some(&(at, id)) = self.queue.first()
            && at <= now
        {
            self.queue.pop_first();
            self.due(id, now);
        }
        self.killed.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
        while self.closing.front().is_some_and(|(at, _)| *at <= now) {
            self.closing.pop_front();
        }
    }

    fn sleep(&self) -> Option<Duration> {
        let due = self.queue.first().map(|(at, _)| *at);
        let next = due.into_iter().chain(self.closing.front().map(|(at, _)| *at)).min();
        let next = next.map(|at| at.saturating_duration_since(Instant::now()));
        if self.killed.is_empty() { next } else { Some(next.map_or(REAP, |next| next.min(REAP))) }
    }

    /// It is this monitor's turn.
    fn due(&mut self, id: u16, now: Instant) {
        let Some(monitor) = self.monitors.get_mut(&id) else { return };
        if let Some(check) = &mut monitor.check {
            if let Some(outcome) = check.outcome() {
                self.drop_check(id);
                self.record(id, outcome);
                return;
            }
            self.drop_check(id);
            let timeout_ms = self.monitors.get(&id).map_or(0, |monitor| monitor.target.spec.timeout_ms);
            self.record(id, Err(Failure::Timeout(timeout_ms)));
            return;
        }
        let is_command = matches!(monitor.target.spec.kind, super::HealthKind::Command { .. });
        if self.open >= CHECKS_MAX || (is_command && self.scripts + self.killed.len() >= SCRIPTS_MAX) {
            self.schedule(id, now + AGAIN);
            return;
        }
        monitor.began = now;
        match Check::begin(&monitor.target, &mut self.tls) {
            Ok((check, interest)) => {
                if let Err(error) = self.epoll.add(&check, u64::from(id), interest) {
                    self.killed.extend(check.cancel());
                    self.not_checked(id, &error);
                    return;
                }
                self.open += 1;
                self.scripts += usize::from(check.is_script());
                let deadline = now + ms(monitor.target.spec.timeout_ms);
                monitor.check = Some(check);
                self.schedule(id, deadline);
            }
            Err(Step::Done(outcome)) => self.record(id, outcome),
            Err(Step::NotChecked(error)) => self.not_checked(id, &error),
            Err(Step::Wait(_)) => self.schedule_next(id),
        }
    }

    /// A descriptor is ready.
    fn advance(&mut self, id: u16) {
        let Some(monitor) = self.monitors.get_mut(&id) else { return };
        let Some(check) = &mut monitor.check else { return };
        match check.advance() {
            Step::Wait(interest) => {
                if let Err(error) = self.epoll.modify(&*check, u64::from(id), interest) {
                    self.drop_check(id);
                    self.not_checked(id, &error);
                }
            }
            Step::Done(outcome) => {
                // Nothing to end: a command that is done has been waited for, and its number may be another's now.
                if let Some(closing) = self.take_check(id).and_then(Check::into_closing) {
                    self.close_later(closing);
                }
                self.record(id, outcome);
            }
            Step::NotChecked(error) => {
                self.drop_check(id);
                self.not_checked(id, &error);
            }
        }
    }

    /// The check under way, no longer counted. Its descriptor leaves the epoll set when it is closed.
    fn take_check(&mut self, id: u16) -> Option<Check> {
        let check = self.monitors.get_mut(&id)?.check.take()?;
        self.open -= 1;
        self.scripts -= usize::from(check.is_script());
        Some(check)
    }

    /// The socket leaves the epoll set: what still comes is nobody's business.
    fn close_later(&mut self, closing: Closing) {
        if self.epoll.remove(&closing).is_err() {
            return;
        }
        if self.closing.len() >= CLOSING_MAX {
            self.closing.pop_front();
        }
        self.closing.push_back((Instant::now() + CLOSING, closing));
    }

    /// Ends the check under way.
    fn drop_check(&mut self, id: u16) {
        if let Some(mut child) = self.take_check(id).and_then(Check::cancel)
            && matches!(child.try_wait(), Ok(None))
        {
            self.killed.push(child);
        }
    }

    /// This machine could not check: that says nothing about the target.
    fn not_checked(&mut self, id: u16, error: &io::Error) {
        (self.on_news)(HealthNews::NotChecked { id, error: error.to_string() });
        self.schedule_next(id);
    }

    /// Counts the outcome of a check, and reports what follows from it.
    fn record(&mut self, id: u16, outcome: Result<(), Failure>) {
        let Some(monitor) = self.monitors.get_mut(&id) else { return };
        let spec = &monitor.target.spec;
        let answered = outcome.as_ref().map_or_else(Failure::is_answer, |()| true);
        let news = monitor.state.take(outcome.is_ok(), answered, spec.fall, spec.rise);
        let reason = outcome.err().map(|failure| failure.to_string());
        let mut reason_is_new = false;
        if let Some(status) = lock(&self.shared.statuses).get_mut(&id) {
            let error = reason.clone().unwrap_or_default();
            reason_is_new = reason.is_some() && status.error != error;
            status.up = monitor.state.is_up();
            status.checked = monitor.state.is_checked();
            status.checks += 1;
            status.failures += u64::from(reason.is_some());
            status.took_us = u64::try_from(monitor.began.elapsed().as_micros()).unwrap_or(u64::MAX);
            status.error = error;
        }
        if let Some(News { up, silent }) = news {
            let reason = reason.unwrap_or_else(|| format!("{} check succeeded", spec.kind.name()));
            (self.on_news)(HealthNews::Change(HealthChange { id, up, silent, reason }));
        } else if let Some(reason) = reason.filter(|_| reason_is_new && !monitor.state.is_up()) {
            (self.on_news)(HealthNews::Reason { id, reason });
        }
        self.schedule_next(id);
    }

    /// The next check: an interval after the begin of the last, give or take a twentieth, so that checks that once
    /// coincide do not stay together.
    fn schedule_next(&mut self, id: u16) {
        let Some(monitor) = self.monitors.get(&id) else { return };
        let interval = ms(monitor.target.spec.interval_ms.max(super::INTERVAL_MS_MIN));
        let earliest = monitor.began + interval - interval / 20;
        let at = earliest + self.random(interval / 10);
        self.schedule(id, at.max(Instant::now()));
    }

    fn schedule(&mut self, id: u16, at: Instant) {
        let Some(monitor) = self.monitors.get_mut(&id) else { return };
        self.queue.remove(&(monitor.next, id));
        monitor.next = at;
        self.queue.insert((at, id));
    }

    /// New targets.
    fn replace(&mut self, targets: Vec<KnownTarget>) {
        self.tls.clear();
        let mut wanted: BTreeMap<u16, KnownTarget> =
            targets.into_iter().map(|target| (target.0.id, target)).collect();
        let ids: Vec<u16> = self.monitors.keys().copied().collect();
        for id in ids {
            let stays = self
                .monitors
                .get(&id)
                .zip(wanted.get(&id))
                .is_some_and(|(monitor, (target, _))| monitor.target.address == target.address);
            if !stays {
                self.forget(id);
            } else if let Some((target, _)) = wanted.remove(&id) {
                self.change(id, target);
            }
        }
        let now = Instant::now();
        for (id, (target, known)) in wanted {
            let at = now + self.random(SPREAD.min(ms(target.spec.interval_ms)));
            lock(&self.shared.statuses).insert(id, fresh(&target, known));
            let state = known.map_or(RiseFall::new(), |known| RiseFall::resumed(known.up, known.silent));
            let monitor = Monitor { target, state, check: None, began: now, next: at };
            self.monitors.insert(id, monitor);
            self.queue.insert((at, id));
        }
    }

    /// The same target, perhaps checked in another way from now on.
    fn change(&mut self, id: u16, target: HealthTarget) {
        let Some(monitor) = self.monitors.get_mut(&id) else { return };
        if monitor.target == target {
            return;
        }
        if let Some(status) = lock(&self.shared.statuses).get_mut(&id) {
            status.server.clone_from(&target.server);
            status.kind = target.spec.kind.name();
        }
        monitor.target = target;
        // A check of the old kind says nothing about the new one.
        self.drop_check(id);
        self.schedule(id, Instant::now());
    }

    fn forget(&mut self, id: u16) {
        self.drop_check(id);
        lock(&self.shared.statuses).remove(&id);
        let Some(monitor) = self.monitors.remove(&id) else { return };
        self.queue.remove(&(monitor.next, id));
        if !monitor.state.is_up() {
            (self.on_news)(HealthNews::Change(HealthChange {
                id,
                up: true,
                silent: false,
                reason: "no longer monitored".to_owned(),
            }));
        }
    }

    /// A time below `limit`.
    fn random(&mut self, limit: Duration) -> Duration {
        // xorshift64: only to spread checks.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let limit_ns = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX).max(1);
        Duration::from_nanos(self.random % limit_ns)
    }
}

fn fresh(target: &HealthTarget, known: Option<Known>) -> MonitorStatus {
    MonitorStatus {
        id: target.id,
        server: target.server.clone(),
        address: target.address,
        kind: target.spec.kind.name(),
        up: known.is_none_or(|known| known.up),
        checked: known.is_some(),
        checks: 0,
        failures: 0,
        took_us: 0,
        error: String::new(),
    }
}

const fn ms(ms: u32) -> Duration {
    Duration::from_millis(ms as u64)
}
