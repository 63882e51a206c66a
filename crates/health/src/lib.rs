//! Health checks of virtual servers' backends (row C6), and the process that makes them.
//!
//! The forwarding process makes no checks itself: TLS, HTTP and other people's commands belong to a process with fewer
//! rights, whose end loses no packet. [`helper`] is that process (`anabranch health`); its parent sends it what to check and
//! gets verdicts back, one JSON line each, over a socket pair ([`protocol`]).
//!
//! [`Monitors`] is one thread with non-blocking sockets. Each target is checked again and again: `fall` failures in a
//! row mean down, `rise` successes in a row mean up again, and every change goes to the sink. Checks leave from the
//! host's own stack, like everything that the gateway itself sends.
//!
//! * **At the start** a target counts as up, so that a start refuses nobody; its very first check decides at once, in
//!   either direction and without `fall` or `rise`, and is always reported. Checks are spread: first ones within
//!   a second, later ones by a tenth of their interval. A target with a verdict from before ([`Known`]) keeps it.
//! * **What counts.** A refused connection, silence until `timeout_ms`, a wrong answer, a command that does not end with
//!   0. What fails on this machine for lack of descriptors, memory or ports says nothing about the target and is not
//!   counted.
//! * **A target that is no longer monitored** was down: it is reported up, since nobody would find out that it is.
//!
//! `rise_fall` counts, `http` and `datagram` make requests and read answers; all are pure. `tls` wraps a connection,
//! `check` is one check under way, `run` the thread.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use linux::event::EventFd;
use serde::{Deserialize, Serialize};

mod check;
pub mod datagram;
pub mod helper;
pub mod http;
pub mod protocol;
mod rise_fall;
mod run;
mod tls;

#[cfg(test)]
mod tests;

pub use datagram::{DnsCheck, UdpCheck};
pub use http::HttpCheck;
pub use tls::{TlsCheck, authorities};

/// Longest time between two checks, and longest time for one, ms.
pub const TIME_MS_MAX: u32 = 600_000;

/// Shortest time between two checks, ms.
pub const INTERVAL_MS_MIN: u32 = 50;

/// How a backend is checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HealthKind {
    /// A TCP connection is accepted. It is ended in order.
    Tcp,
    /// A TLS handshake (RFC 8446, 5246) succeeds. The connection is ended in order.
    Tls(TlsCheck),
    /// An HTTP/1.1 `GET` is answered with the right status, and perhaps the right content.
    Http(HttpCheck),
    /// A datagram is answered.
    Udp(UdpCheck),
    /// A name server answers the question for a name's address without an error.
    Dns(DnsCheck),
    /// A command ends with exit status 0. Its environment is `PATH`, `ANABRANCH_ADDRESS`, `ANABRANCH_PORT` and
    /// `ANABRANCH_SERVER`; it has no input and its output is thrown away. At the timeout it is killed with all
    /// processes of its group.
    Command {
        /// The program; no shell is involved.
        program: PathBuf,
        /// Its arguments.
        arguments: Vec<String>,
    },
}

impl HealthKind {
    /// How its connection is encrypted, if it is.
    #[must_use]
    pub const fn tls(&self) -> Option<&TlsCheck> {
        match self {
            HealthKind::Tls(tls) => Some(tls),
            HealthKind::Http(http) => http.tls.as_ref(),
            HealthKind::Tcp | HealthKind::Udp(_) | HealthKind::Dns(_) | HealthKind::Command { .. } => None,
        }
    }

    /// As an operator names it.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            HealthKind::Tcp => "tcp",
            HealthKind::Tls(_) => "tls",
            HealthKind::Http(HttpCheck { tls: Some(_), .. }) => "https",
            HealthKind::Http(_) => "http",
            HealthKind::Udp(_) => "udp",
            HealthKind::Dns(_) => "dns",
            HealthKind::Command { .. } => "command",
        }
    }
}

/// How and how often.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthSpec {
    /// How.
    pub kind: HealthKind,
    /// From the begin of one check to the begin of the next, ms; a check that takes longer delays the next.
    pub interval_ms: u32,
    /// A check that has not succeeded by then has failed, ms.
    pub timeout_ms: u32,
    /// So many failures in a row mean down; at least 1.
    pub fall: u8,
    /// So many successes in a row mean up; at least 1.
    pub rise: u8,
    /// The port that is checked; `None`: the backend's own.
    pub port: Option<u16>,
    /// Address that checks come from; `None`: as the host's routes say.
    pub source: Option<IpAddr>,
    /// TCP connections begin with a PROXY protocol v2 header that says `LOCAL`: the gateway speaks for itself.
    pub proxy_protocol: bool,
}

impl HealthSpec {
    /// This kind with the default times: every 2 s, for up to 1 s, down after 3 failures, up after 2 successes.
    #[must_use]
    pub const fn new(kind: HealthKind) -> Self {
        Self {
            kind,
            interval_ms: 2_000,
            timeout_ms: 1_000,
            fall: 3,
            rise: 2,
            port: None,
            source: None,
            proxy_protocol: false,
        }
    }

    /// First mistake in it, for whoever reads the configuration.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        if !(INTERVAL_MS_MIN..=TIME_MS_MAX).contains(&self.interval_ms) {
            return Some(format!("the interval must be {INTERVAL_MS_MIN} to {TIME_MS_MAX} ms"));
        }
        if !(1..=TIME_MS_MAX).contains(&self.timeout_ms) {
            return Some(format!("the timeout must be 1 to {TIME_MS_MAX} ms"));
        }
        if self.fall == 0 || self.rise == 0 {
            return Some("fall and rise must be 1 or more".to_owned());
        }
        match &self.kind {
            HealthKind::Tcp | HealthKind::Udp(_) => None,
            HealthKind::Tls(tls) => tls.problem(),
            HealthKind::Http(http) => http.problem(),
            HealthKind::Dns(dns) => dns.problem(),
            HealthKind::Command { program, .. } if !program.is_absolute() => {
                Some("the command must be an absolute path".to_owned())
            }
            HealthKind::Command { .. } => None,
        }
    }
}

/// Backend that is checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthTarget {
    /// Its number among the targets, unique: the backend's id.
    pub id: u16,
    /// Name of the virtual server, for logs and commands.
    pub server: String,
    /// Address and port of the backend.
    pub address: SocketAddr,
    /// How.
    pub spec: HealthSpec,
}

impl HealthTarget {
    /// Address and port that are checked.
    #[must_use]
    pub fn checked_address(&self) -> SocketAddr {
        SocketAddr::new(self.address.ip(), self.spec.port.unwrap_or(self.address.port()))
    }
}

/// Verdict of an earlier process about a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    /// As [`HealthChange::up`].
    pub up: bool,
    /// As [`HealthChange::silent`].
    pub silent: bool,
}

/// A target, and the verdict of an earlier process about it.
pub type KnownTarget = (HealthTarget, Option<Known>);

/// News of the monitors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HealthNews {
    /// A verdict.
    Change(HealthChange),
    /// Another cause for a target's being down.
    Reason {
        /// [`HealthTarget::id`].
        id: u16,
        /// For people.
        reason: String,
    },
    /// This machine could not check; that says nothing about the target.
    NotChecked {
        /// [`HealthTarget::id`].
        id: u16,
        /// For people.
        error: String,
    },
}

/// News about a target, for the sink.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthChange {
    /// [`HealthTarget::id`].
    pub id: u16,
    /// Whether new connections may go there.
    pub up: bool,
    /// It is down, and as many checks in a row as mean that had no answer at all.
    pub silent: bool,
    /// Why, for people.
    pub reason: String,
}

/// State of a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MonitorStatus {
    /// [`HealthTarget::id`].
    pub id: u16,
    /// [`HealthTarget::server`].
    pub server: String,
    /// [`HealthTarget::address`].
    pub address: SocketAddr,
    /// `tcp`, `tls`, `http`, `https`, `udp`, `dns` or `command`.
    pub kind: &'static str,
    /// Whether it is up; true before the first check.
    pub up: bool,
    /// Whether there was a first check.
    pub checked: bool,
    /// Checks that counted.
    pub checks: u64,
    /// Checks that failed.
    pub failures: u64,
    /// How long the last check took, µs.
    pub took_us: u64,
    /// Why the last check failed; empty if it did not.
    pub error: String,
}

/// The sink: called by the monitors' thread, in the order of the news. It must not block.
pub type OnNews = Box<dyn Fn(HealthNews) + Send>;

/// The thread that checks. Dropping it ends the thread, and commands that still run are killed.
pub struct Monitors {
    shared: Arc<MonitorState>,
    thread: Option<JoinHandle<()>>,
}

/// State that the thread and the handle share.
struct MonitorState {
    stop: AtomicBool,
    wake: EventFd,
    /// New targets, until the thread takes them.
    targets: Mutex<Option<Vec<KnownTarget>>>,
    statuses: Mutex<BTreeMap<u16, MonitorStatus>>,
}

impl Monitors {
    /// Begins to check, with the verdicts that are known already.
    ///
    /// # Errors
    /// When the kernel gives no thread or descriptor.
    pub fn start(targets: Vec<KnownTarget>, on_news: OnNews) -> io::Result<Monitors> {
        let shared = Arc::new(MonitorState {
            stop: AtomicBool::new(false),
            wake: EventFd::new()?,
            targets: Mutex::new(Some(targets)),
            statuses: Mutex::default(),
        });
        let runner = run::Runner::new(Arc::clone(&shared), on_news)?;
        let thread = std::thread::Builder::new().name("health".to_owned()).spawn(move || runner.run())?;
        Ok(Monitors { shared, thread: Some(thread) })
    }

    /// Replaces the targets. One whose id and address stay keeps its state and counts; of several with one id the
    /// last is taken. What is known counts for new ones only.
    pub fn update(&self, targets: Vec<KnownTarget>) {
        *lock(&self.shared.targets) = Some(targets);
        self.shared.wake();
    }

    /// State of each target, by id. A target appears with [`Monitors::start`] or [`Monitors::update`], a moment later.
    #[must_use]
    pub fn statuses(&self) -> Vec<MonitorStatus> {
        lock(&self.shared.statuses).values().cloned().collect()
    }
}

impl Drop for Monitors {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.wake();
        if let Some(thread) = self.thread.take() {
            // An error is a panic of the sink, which has been reported.
            let _ = thread.join();
        }
    }
}

impl MonitorState {
    fn wake(&self) {
        if let Err(error) = self.wake.signal() {
            tracing::warn!(%error, "health monitors not woken");
        }
    }
}

/// State behind a mutex that a panic of the sink poisoned is still whole: every change is one assignment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
