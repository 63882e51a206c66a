//! The helper process that checks backends ([`health`]), seen from the gateway: started with the first check, told what to
//! check, started again when it ends.
//!
//! * Its end changes nothing for traffic: the last verdicts stay, and its successor begins with them.
//! * One that says nothing for [`SILENCE`] is given up like one that has ended. It may belong to another user, so that it cannot
//!   be killed; it ends by itself when its socket is closed.
//! * The pause before a new start doubles from [`PAUSE_MIN`] to [`PAUSE_MAX`], and is short again after a while without an end.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use health::protocol::{self, FromHelper, Lines, ToHelper};
use health::{HealthChange, HealthNews, HealthTarget, Known};
use linux::event::{Epoll, EventFd, Interest};
use linux::launcher::{self, Launched, Program, Streams};
use linux::privileges::User;
use rustix::io::Errno;
use rustix::net::RecvFlags;

use crate::status::HealthProcessStatus;
use crate::sync::lock;

/// Pause before the first new start.
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// One that ran so long was well: the next pause is short.
const WELL: Duration = Duration::from_secs(60);
/// Time without a sign of life; it gives one each second.
const SILENCE: Duration = Duration::from_secs(10);
/// Longest time that it may take to read what it is told.
const WRITE: Duration = Duration::from_secs(5);
/// So long the exit status of one that ended is waited for.
const EXIT: Duration = Duration::from_millis(200);
/// So often processes that do not end are looked after.
const REAP: Duration = Duration::from_millis(500);

const TOKEN_WAKE: u64 = 0;
const TOKEN_HELPER: u64 = 1;

/// Verdicts, in the order in which they come; called by the helper's thread.
pub(crate) type OnChange = Box<dyn Fn(HealthChange) + Send>;

/// The helper. Dropping it ends the process.
pub(crate) struct HealthHelper {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// State shared by the thread and its handle.
struct Shared {
    stop: AtomicBool,
    wake: EventFd,
    wanted: Mutex<Option<(Vec<HealthTarget>, User)>>,
    view: Mutex<View>,
}

/// State as others see it.
#[derive(Default)]
struct View {
    status: HealthProcessStatus,
    /// Why targets are down.
    reasons: BTreeMap<u16, String>,
}

impl HealthHelper {
    /// Begins to check these targets, with the rights of this user.
    ///
    /// # Errors
    /// When the kernel gives no thread or descriptor. A process that does not start is tried again.
    pub(crate) fn start(targets: Vec<HealthTarget>, user: User, on_change: OnChange) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            wake: EventFd::new()?,
            wanted: Mutex::new(Some((targets, user))),
            view: Mutex::default(),
        });
        let watcher = Watcher::new(Arc::clone(&shared), user, on_change)?;
        let thread = std::thread::Builder::new().name("health".to_owned()).spawn(move || watcher.run())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Replaces the targets. One that stays keeps its verdict.
    pub(crate) fn update(&self, targets: Vec<HealthTarget>, user: User) {
        *lock(&self.shared.wanted) = Some((targets, user));
        self.shared.wake();
    }

    /// State of the process, and why targets are down, by [`HealthTarget::id`].
    pub(crate) fn view(&self) -> (HealthProcessStatus, BTreeMap<u16, String>) {
        let view = lock(&self.shared.view);
        (view.status.clone(), view.reasons.clone())
    }
}

impl Drop for HealthHelper {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.wake();
        if let Some(thread) = self.thread.take() {
            // An error is a panic of the sink, which has been reported.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn wake(&self) {
        if let Err(error) = self.wake.signal() {
            tracing::warn!(%error, "health checks not woken");
        }
    }
}

/// A process that runs.
struct Helper {
    child: Launched,
    socket: UnixStream,
    lines: Lines,
    started: Instant,
    heard: Instant,
}

/// The thread's state.
struct Watcher {
    shared: Arc<Shared>,
    on_change: OnChange,
    epoll: Epoll,
    user: User,
    targets: BTreeMap<u16, HealthTarget>,
    /// Last verdicts.
    known: BTreeMap<u16, Known>,
    /// Reasons that were given last for targets that could not be checked.
    not_checked: BTreeMap<u16, String>,
    helper: Option<Helper>,
    /// When the next one may start, and the pause after its end.
    next_start: Instant,
    pause: Duration,
    /// Processes that were given up and have not ended.
    ending: Vec<Launched>,
}

impl Watcher {
    fn new(shared: Arc<Shared>, user: User, on_change: OnChange) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        epoll.add(&shared.wake, TOKEN_WAKE, Interest::Read)?;
        Ok(Self {
            shared,
            on_change,
            epoll,
            user,
            targets: BTreeMap::new(),
            known: BTreeMap::new(),
            not_checked: BTreeMap::new(),
            helper: None,
            next_start: Instant::now(),
            pause: PAUSE_MIN,
            ending: Vec::new(),
        })
    }

    fn run(mut self) {
        let mut ready = Vec::new();
        while !self.shared.stop.load(Ordering::Relaxed) {
            let wanted = lock(&self.shared.wanted).take();
            if let Some((targets, user)) = wanted {
                self.replace(targets, user);
            }
            let now = Instant::now();
            if self.helper.is_none() && !self.targets.is_empty() && now >= self.next_start {
                self.begin();
            }
            if let Err(error) = self.epoll.wait(&mut ready, self.sleep()) {
                tracing::warn!(%error, "health checks");
                std::thread::sleep(REAP);
            }
            for event in &ready {
                if event.token == TOKEN_WAKE {
                    // Nothing to learn from the number of signals.
                    let _ = self.shared.wake.drain();
                } else {
                    self.receive();
                }
            }
            if self.helper.as_ref().is_some_and(|helper| helper.heard.elapsed() > SILENCE) {
                self.give_up(&format!("it said nothing for {} s", SILENCE.as_secs()));
            }
            self.ending.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
        }
        self.end();
    }

    fn sleep(&self) -> Option<Duration> {
        let now = Instant::now();
        let next = match &self.helper {
            Some(helper) => Some(helper.heard + SILENCE),
            None if self.targets.is_empty() => None,
            None => Some(self.next_start),
        };
        // Timers of the kernel count whole milliseconds.
        let next = next.map(|at| at.saturating_duration_since(now) + Duration::from_millis(1));
        if self.ending.is_empty() { next } else { Some(next.map_or(REAP, |next| next.min(REAP))) }
    }

    /// New targets: a verdict about one that is gone holds no longer.
    fn replace(&mut self, targets: Vec<HealthTarget>, user: User) {
        self.targets = targets.into_iter().map(|target| (target.id, target)).collect();
        let gone: Vec<u16> = self.known.keys().filter(|id| !self.targets.contains_key(id)).copied().collect();
        for id in gone {
            lock(&self.shared.view).reasons.remove(&id);
            if self.known.remove(&id).is_some_and(|known| !known.up) {
                let reason = "no longer monitored".to_owned();
                (self.on_change)(HealthChange { id, up: true, silent: false, reason });
            }
        }
        self.not_checked.retain(|id, _| self.targets.contains_key(id));
        if self.targets.is_empty() || user != self.user {
            self.user = user;
            self.end();
        }
        self.tell();
    }

    /// Starts the process. Whether that fails or not, the next start is some time away.
    fn begin(&mut self) {
        self.next_start = Instant::now() + self.pause;
        match self.spawn() {
            Ok(helper) => {
                tracing::debug!(process = helper.child.id(), "health checks begin");
                {
                    let mut view = lock(&self.shared.view);
                    view.status.running = true;
                    view.status.process = helper.child.id();
                }
                self.helper = Some(helper);
                self.tell();
            }
            Err(error) => self.failed(&format!("the process does not start: {error}")),
        }
    }

    fn spawn(&self) -> io::Result<Helper> {
        let (socket, theirs) = UnixStream::pair()?;
        socket.set_write_timeout(Some(WRITE))?;
        let child = launcher::spawn(Program::Health(self.user), Streams::of_helper(theirs.into())?)?;
        let now = Instant::now();
        let helper = Helper { child, socket, lines: Lines::default(), started: now, heard: now };
        self.epoll.add(&helper.socket, TOKEN_HELPER, Interest::Read)?;
        Ok(helper)
    }

    /// Tells the process all targets.
    fn tell(&mut self) {
        let Some(helper) = &mut self.helper else { return };
        let mut bytes = Vec::new();
        for (id, target) in &self.targets {
            let message = ToHelper::Target(Box::new(target.clone()), self.known.get(id).copied());
            bytes.extend(protocol::line(&message).unwrap_or_default());
        }
        bytes.extend(protocol::line(&ToHelper::Apply).unwrap_or_default());
        if let Err(error) = helper.socket.write_all(&bytes) {
            self.give_up(&format!("it takes no more targets: {error}"));
        }
    }

    /// Messages of the process.
    fn receive(&mut self) {
        let Some(helper) = &mut self.helper else { return };
        let mut buffer = vec![0; 64 << 10];
        let mut said = Vec::new();
        let result = loop {
            match rustix::net::recv(&helper.socket, &mut buffer, RecvFlags::DONTWAIT) {
                Ok((0, _)) => break Err(None),
                Ok((bytes, _)) => {
                    helper.heard = Instant::now();
                    let bytes = buffer.get(..bytes).unwrap_or_default();
                    if let Err(error) = helper.lines.receive(bytes, |message| said.push(message)) {
                        break Err(Some(error));
                    }
                }
                Err(Errno::AGAIN) => break Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => break Err(None),
                Err(errno) => break Err(Some(errno.into())),
            }
        };
        for message in said {
            match message {
                FromHelper::News(news) => self.news(news),
                FromHelper::Alive { kept } => lock(&self.shared.view).status.kept_rights = kept,
            }
        }
        match result {
            Ok(()) => {}
            Err(None) => self.give_up("it ended"),
            Err(Some(error)) => self.give_up(&format!("it says what nobody understands: {error}")),
        }
    }

    fn news(&mut self, news: HealthNews) {
        let id = match &news {
            HealthNews::Change(change) => change.id,
            HealthNews::Reason { id, .. } | HealthNews::NotChecked { id, .. } => *id,
        };
        // It may not have heard yet that a target is gone.
        let Some(target) = self.targets.get(&id) else { return };
        let (server, address, kind) = (target.server.as_str(), target.address, target.spec.kind.name());
        match news {
            HealthNews::Change(change) => {
                let reason = change.reason.as_str();
                let known = Known { up: change.up, silent: change.silent };
                let before = self.known.insert(id, known);
                self.not_checked.remove(&id);
                if change.up {
                    lock(&self.shared.view).reasons.remove(&id);
                    tracing::info!(server, %address, kind, "backend is up");
                } else {
                    lock(&self.shared.view).reasons.insert(id, reason.to_owned());
                    // It falls silent: new to the flows, not to who reads the log.
                    if before.is_none_or(|before| before.up) {
                        tracing::warn!(server, %address, kind, reason, "backend is down");
                    }
                }
                (self.on_change)(change);
            }
            HealthNews::Reason { reason, .. } => {
                if self.known.get(&id).is_some_and(|known| !known.up) {
                    lock(&self.shared.view).reasons.insert(id, reason);
                }
            }
            HealthNews::NotChecked { error, .. } => {
                if self.not_checked.get(&id) != Some(&error) {
                    tracing::warn!(server, %address, error, "health not checked");
                    self.not_checked.insert(id, error);
                }
            }
        }
    }

    /// The process has ended, or is of no use.
    fn give_up(&mut self, why: &str) {
        let Some(helper) = self.helper.take() else { return };
        if helper.started.elapsed() > WELL {
            self.pause = PAUSE_MIN;
        }
        let status = self.close(helper);
        let text = status.map_or_else(|| why.to_owned(), |status| format!("{why} ({status})"));
        self.failed(&text);
    }

    fn failed(&mut self, why: &str) {
        let seconds = self.pause.as_secs_f64();
        tracing::warn!("health checks stopped: {why}; verdicts stay as they are, new start in {seconds} s");
        self.next_start = Instant::now() + self.pause;
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        let mut view = lock(&self.shared.view);
        view.status.running = false;
        view.status.process = 0;
        view.status.restarts += 1;
        why.clone_into(&mut view.status.last_end);
    }

    /// Nothing is to be checked, or by somebody else: no fault.
    fn end(&mut self) {
        if let Some(helper) = self.helper.take() {
            self.close(helper);
            lock(&self.shared.view).status.running = false;
        }
        self.next_start = Instant::now();
    }

    /// Closes the socket, upon which it ends, and says how it did.
    fn close(&mut self, helper: Helper) -> Option<std::process::ExitStatus> {
        let Helper { mut child, socket, .. } = helper;
        drop(socket);
        let end = Instant::now() + EXIT;
        while Instant::now() < end {
            match child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) => std::thread::sleep(Duration::from_millis(2)),
                Err(_) => return None,
            }
        }
        // Not allowed where it is another user's.
        let _ = child.kill();
        self.ending.push(child);
        None
    }
}
