//! Event loop of a node: `anabranch up` runs it until it is told to end.
//!
//! One thread does everything that is not per packet. It sleeps until something happens: a signal, a change of the
//! host's interfaces ([`linux::netlink::Monitor`]), an answer of the name service, a request on the control
//! socket, or a second has passed.

use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use linux::event::{Epoll, EventFd, Interest, Ready, Signal, Signals};
use linux::netlink::{Change, IpsecMonitor, Monitor, Route, RouteKind};
use linux::process::InstanceLock;
use sd_notify::NotifyState;

use crate::config::{Config, Cores, Problem, directory_of};
use crate::control_socket::Server;
use crate::events::{EventSender, NodeEvent};
use crate::host_checks::PortHolder;
use crate::host_facts::LOCAL_TABLE;
use crate::kernel_routes::KernelRoutes;
use crate::node::{Node, StartError, host_warnings};
use crate::protocol::{Request, Response};
use crate::route_plan::Numbers;

/// Options of `up` besides the configuration.
#[derive(Default)]
pub struct Options {
    /// Control socket in place of the configured one.
    pub socket: Option<PathBuf>,
    /// Called at SIGHUP: opens the log file anew after it was rotated.
    pub reopen_log: Option<Box<dyn Fn() + Send>>,
}

/// More changes may follow: interfaces come with several messages. Waits so long for silence…
const QUIET: Duration = Duration::from_millis(20);
/// … but not longer than this after the first.
const QUIET_MAX: Duration = Duration::from_millis(100);
/// Looked at without any message, in case one was lost.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_secs(1);
/// Events of other threads that wait at most.
const EVENTS_MAX: usize = 128;
/// Descriptors wanted: every path of every peer has some sockets.
const OPEN_FILES: u64 = 1 << 18;

const TOKEN_SIGNALS: u64 = 0;
const TOKEN_MONITOR: u64 = 1;
const TOKEN_EVENTS: u64 = 2;
const TOKEN_IPSEC: u64 = 3;

/// Runs a node until SIGINT, SIGTERM or a `stop` request. Call it before other threads exist.
pub fn run(config: Config, options: Options) -> Result<(), StartError> {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |error: io::Error| StartError::Start(format!("{what}: {error}"))
    };
    let signals = Signals::new(&[Signal::Interrupt, Signal::Terminate, Signal::HangUp])
        .map_err(failed("cannot receive signals"))?;
    let socket = options.socket.clone().unwrap_or_else(|| config.control_socket());
    let _lock = lock(&socket, &config.tun.name)?;
    let allowed = linux::affinity::allowed_cpus().map_err(|error| StartError::Start(error.to_string()))?;
    let cpus = cpus(&config.node.cores, &allowed).map_err(StartError::Start)?;
    check_port(&config)?;
    // Before another thread exists; who has the port is told by what is given up here.
    for failed in linux::privileges::keep_needed() {
        tracing::warn!(failed, "a right is kept that is not needed");
    }
    confine(&config, &socket).map_err(failed("cannot start the process that starts programs"))?;
    if let Err(error) = linux::process::raise_open_files(OPEN_FILES) {
        tracing::debug!(%error, "open files");
    }
    let start = |error: linux::Error| StartError::Start(error.to_string());
    let host = KernelRoutes::open(Numbers::of(&config.tun.name), &socket).map_err(start)?;
    let monitor = Monitor::open().map_err(start)?;
    let ipsec = IpsecMonitor::open().inspect_err(|error| tracing::debug!(%error, "IPsec")).ok().flatten();
    let (sender, receiver) = sync_channel(EVENTS_MAX);
    let wake = EventFd::new().map_err(failed("cannot make an event descriptor"))?;
    let events = EventSender { sender, wake };
    let server = serve(&socket, &events)?;
    for warning in host_warnings(&config) {
        tracing::warn!("{warning}");
    }
    let node_events = events.try_clone().map_err(failed("cannot copy a descriptor"))?;
    let devices: Vec<String> = config.services.devices().map(str::to_owned).collect();
    let mut left = Vec::new();
    if devices.is_empty() {
        // Nothing will replace it.
        left.extend(linux::own_tables::remove_left_by(&config.tun.name).unwrap_or_default());
    }
    let mut node = Node::start(config, cpus, host, &socket, node_events)?;
    node.refresh();
    // The own one has been replaced by now, so that forwarding was closed all the time.
    left.extend(linux::own_tables::remove_orphans(&devices).unwrap_or_default());
    for table in left {
        tracing::warn!(table, "removed what a process that died left behind");
    }
    notify(&[NotifyState::Ready]);
    tracing::info!(socket = %socket.display(), "up");
    let mut running = Loop {
        node,
        signals,
        monitor,
        ipsec,
        events,
        receiver,
        options,
        due: Some(Instant::now() + QUIET),
        first: None,
        urgent: false,
    };
    let result = running.run().map_err(failed("the node's thread cannot go on"));
    notify(&[NotifyState::Stopping]);
    tracing::info!("going down");
    let Loop { node, receiver, .. } = running;
    // Who asks now is told so; the socket itself goes last, because `anabranch stop` waits for that.
    drop(receiver);
    node.stop();
    drop(server);
    result
}

/// Programs are started by another process from now on; this one enters its sandbox.
fn confine(config: &Config, socket: &Path) -> io::Result<()> {
    linux::launcher::start()?;
    let state = &config.node.state_dir;
    // Nobody can make it later. Who needs it says so if it is not there.
    let _ = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(state);
    let mut writable = config.writable_directories();
    writable.push(directory_of(socket));
    for failed in linux::sandbox::enter(&writable) {
        tracing::warn!(failed, "the sandbox is not complete");
    }
    Ok(())
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "service manager");
    }
}

/// TUN device of the instance that had this control socket last; `None`: nobody knows.
#[must_use]
pub fn last_tun(socket: &Path) -> Option<String> {
    InstanceLock::note(&lock_file(socket)).filter(|tun| !tun.is_empty())
}

fn lock_file(socket: &Path) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(".lock");
    path.into()
}

/// One instance per control socket.
fn lock(socket: &Path, tun: &str) -> Result<InstanceLock, StartError> {
    let hint = "choose another place with --socket or node.control-socket";
    if let Some(directory) = socket.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        std::fs::DirBuilder::new().recursive(true).mode(0o755).create(directory).map_err(|error| {
            StartError::Start(format!("cannot make the directory {} ({error}); {hint}", directory.display()))
        })?;
    }
    InstanceLock::acquire(&lock_file(socket), tun).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => StartError::Start(format!("{error}; stop it first (anabranch stop)")),
        _ => StartError::Start(format!("{error}; {hint}")),
    })
}

/// A second instance on the same port would take a part of the datagrams.
fn check_port(config: &Config) -> Result<(), StartError> {
    let Some(port) = config.node.listen else { return Ok(()) };
    let local = linux::udp::any_address(port);
    match linux::udp::probe_port_free(local, None) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let (holder, stop) = PortHolder::of_udp(port).map_or_else(
                || ("another program or another anabranch".to_owned(), "stop that one".to_owned()),
                |holder| (holder.to_string(), holder.stop()),
            );
            Err(StartError::Start(format!(
                "node.listen: UDP port {port} is taken by {holder}; {stop} or choose another port"
            )))
        }
        // Anything else shows when the engine opens its sockets.
        _ => Ok(()),
    }
}

fn serve(socket: &Path, events: &EventSender) -> Result<Server, StartError> {
    /// The node may be busy with a port that another program holds for some moments.
    const PATIENCE: Duration = Duration::from_secs(25);
    let failed =
        |error: io::Error| StartError::Start(format!("control socket {}: {error}", socket.display()));
    let events = events.try_clone().map_err(failed)?;
    let handler = move |request| {
        let (reply, answer) = sync_channel(1);
        if !events.send(NodeEvent::Request(request, reply)) {
            return Response::error("the gateway is going down");
        }
        answer.recv_timeout(PATIENCE).unwrap_or_else(|_| Response::error("the gateway is busy or going down"))
    };
    Server::start(socket, Arc::new(handler)).map_err(failed)
}

/// CPU of each worker.
pub(crate) fn cpus(cores: &Cores, allowed: &[usize]) -> Result<Vec<usize>, String> {
    const CORES_MAX: usize = 128;
    match cores {
        Cores::All => Ok(allowed.iter().copied().take(CORES_MAX).collect()),
        Cores::Count(count) => {
            if *count > allowed.len() {
                tracing::warn!(
                    wanted = count,
                    available = allowed.len(),
                    "more cores than CPUs: some workers share one"
                );
            }
            Ok(allowed.iter().copied().cycle().take(*count).collect())
        }
        Cores::List(list) => match list.iter().find(|cpu| !allowed.contains(cpu)) {
            Some(cpu) => {
                Err(format!("node.cores: CPU {cpu} is not available; this process may use {allowed:?}"))
            }
            None => Ok(list.clone()),
        },
    }
}

struct Loop {
    node: Node,
    signals: Signals,
    monitor: Monitor,
    /// Where the kernel has IPsec.
    ipsec: Option<IpsecMonitor>,
    events: EventSender,
    receiver: Receiver<NodeEvent>,
    options: Options,
    /// When to look at the host again.
    due: Option<Instant>,
    /// The first message since the last look.
    first: Option<Instant>,
    /// Something was lost since the last look.
    urgent: bool,
}

impl Loop {
    fn run(&mut self) -> io::Result<()> {
        let epoll = Epoll::new()?;
        epoll.add(&self.signals, TOKEN_SIGNALS, Interest::Read)?;
        epoll.add(&self.monitor, TOKEN_MONITOR, Interest::Read)?;
        if let Some(ipsec) = &self.ipsec {
            epoll.add(ipsec, TOKEN_IPSEC, Interest::Read)?;
        }
        epoll.add(&self.events.wake, TOKEN_EVENTS, Interest::Read)?;
        let watchdog = sd_notify::watchdog_enabled().map(|period| period / 2);
        let mut pulse = Pulse::new(Instant::now());
        let mut next_tick = Instant::now() + TICK;
        let mut ready: Vec<Ready> = Vec::new();
        loop {
            let next_look_up = self.node.look_up();
            let sockets = self.node.look_at_sockets_at();
            let deadline =
                [self.due, next_look_up, sockets].into_iter().flatten().fold(next_tick, Instant::min);
            let mut timeout = deadline.saturating_duration_since(Instant::now());
            if let Some(period) = watchdog {
                // Else the service manager ends the process and starts another.
                if pulse.is_well(self.node.heartbeat(), Instant::now()) {
                    notify(&[NotifyState::Watchdog]);
                }
                timeout = timeout.min(period);
            }
            epoll.wait(&mut ready, Some(timeout))?;
            for ready in std::mem::take(&mut ready) {
                let end = match ready.token {
                    TOKEN_SIGNALS => self.on_signals()?,
                    TOKEN_MONITOR => self.on_changes()?,
                    TOKEN_IPSEC => self.on_ipsec()?,
                    _ => self.on_events()?,
                };
                if end {
                    return Ok(());
                }
            }
            let now = Instant::now();
            if now >= next_tick {
                next_tick = now + TICK;
                if self.node.tick() {
                    self.due = Some(now);
                }
            }
            if self.node.look_at_sockets() {
                self.due = Some(now);
            }
            if self.due.is_some_and(|due| now >= due) {
                self.look();
            }
        }
    }

    /// Looks at the host now.
    fn look(&mut self) {
        self.node.refresh();
        self.first = None;
        self.urgent = false;
        self.due = Some(Instant::now() + LOOK_AGAIN);
    }

    /// Plans the next look; `urgent` when something was lost, which must not wait.
    fn changed(&mut self, urgent: bool) {
        let now = Instant::now();
        let first = *self.first.get_or_insert(now);
        self.urgent |= urgent;
        // On a router with a million routes a look takes its time; do not do nothing else.
        let pause = (self.node.last_read() * 10).min(Duration::from_secs(5));
        let settled = (now + QUIET.max(pause)).min(first + QUIET_MAX.max(pause));
        self.due = Some(if self.urgent { first } else { settled });
    }

    fn on_signals(&mut self) -> io::Result<bool> {
        while let Some(signal) = self.signals.next()? {
            if signal != Signal::HangUp {
                return Ok(true);
            }
            if let Some(reopen) = &self.options.reopen_log {
                reopen();
            }
            self.node.reopen_logs();
            let _ = self.reload();
        }
        Ok(false)
    }

    fn on_changes(&mut self) -> io::Result<bool> {
        let tun = self.node.tun_index();
        for change in self.monitor.read()? {
            match change {
                Change::Link(link) if link.index == tun => {}
                Change::Link(link) => self.changed(!link.up || !link.carrier),
                Change::LinkGone(_) | Change::AddressGone(_) | Change::Resync => self.changed(true),
                Change::Address(address) if address.index == tun => {}
                Change::Route(route) | Change::RouteGone(route)
                    if route.is_ours() || is_part_of_address(&route, tun) => {}
                Change::Rule(rule) if rule.is_ours() => {}
                Change::Address(_)
                | Change::Route(_)
                | Change::RouteGone(_)
                | Change::Rule(_)
                | Change::RuleGone(_)
                | Change::OtherRule
                | Change::NextHop => self.changed(false),
            }
        }
        Ok(false)
    }

    fn on_ipsec(&mut self) -> io::Result<bool> {
        if let Some(monitor) = &mut self.ipsec
            && monitor.read()?
        {
            // What was to be sealed leaves in the clear until then.
            self.changed(true);
        }
        Ok(false)
    }

    fn on_events(&mut self) -> io::Result<bool> {
        self.events.wake.drain()?;
        // Not `while let … recv`: whoever floods must not starve the rest.
        for _ in 0..EVENTS_MAX {
            let Ok(event) = self.receiver.try_recv() else { return Ok(false) };
            match event {
                NodeEvent::Answer(host, answer) => self.node.answered(&host, answer),
                NodeEvent::TlsPath(number, said) => self.node.tls_path(number, said.as_ref()),
                NodeEvent::Health(change) => self.node.health(&change),
                NodeEvent::PortBlocks { blocks, done } => {
                    self.node.port_blocks(blocks);
                    // Whoever asked may have given up.
                    let _ = done.try_send(());
                }
                NodeEvent::Request(request, reply) => {
                    let response = match &request {
                        Request::Status => Response {
                            ok: true,
                            status: Some(Box::new(self.node.report())),
                            ..Response::default()
                        },
                        Request::Reload => match self.reload() {
                            Ok(report) => Response { ok: true, reload: Some(report), ..Response::default() },
                            Err(problems) => Response::error(problems.join("\n")),
                        },
                        Request::Stop => {
                            Response { warning: self.node.opens_forwarding(), ..Response::done() }
                        }
                        Request::Takeover { take } => self.node.take_over(*take),
                        Request::Path { wan, wish } => self.node.change_wan(wan, wish),
                        other => self.node.answer(other),
                    };
                    let _ = reply.try_send(response);
                    if request == Request::Stop {
                        return Ok(true);
                    }
                }
            }
        }
        self.events.wake.signal()?;
        Ok(false)
    }

    fn reload(&mut self) -> Result<crate::reload::ReloadReport, Vec<String>> {
        match NotifyState::monotonic_usec_now() {
            Ok(now) => notify(&[NotifyState::Reloading, now]),
            Err(_) => notify(&[NotifyState::Reloading]),
        }
        let result = self.node.reload();
        notify(&[NotifyState::Ready]);
        match result {
            Ok(report) => {
                for change in &report.applied {
                    tracing::info!("reload: {change}");
                }
                for change in &report.needs_restart {
                    tracing::warn!("reload: needs a restart: {change}");
                }
                for warning in &report.warnings {
                    tracing::warn!("{warning}");
                }
                Ok(report)
            }
            Err(problems) => {
                let problems: Vec<String> = problems.iter().map(Problem::to_string).collect();
                for problem in &problems {
                    tracing::error!("reload refused: {problem}");
                }
                Err(problems)
            }
        }
    }
}

/// Whether all threads of the engine move.
struct Pulse {
    rounds: u64,
    moved: Instant,
}

impl Pulse {
    /// The control thread's rounds take 25 ms; a machine that is busy or asleep for a moment is no reason to end.
    const STILL_MAX: Duration = Duration::from_secs(5);

    fn new(now: Instant) -> Self {
        Self { rounds: 0, moved: now }
    }

    /// `rounds` of the control thread until now, and cores that hang.
    fn is_well(&mut self, (rounds, hung): (u64, Vec<u8>), now: Instant) -> bool {
        if rounds != self.rounds {
            *self = Self { rounds, moved: now };
        }
        hung.is_empty() && now.duration_since(self.moved) < Self::STILL_MAX
    }
}

/// Whether a route comes and goes with an address, of which the kernel tells as well.
fn is_part_of_address(route: &Route, tun: u32) -> bool {
    let spec = &route.spec;
    spec.table == LOCAL_TABLE && (spec.kind != RouteKind::Local || spec.interface == Some(tun))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn the_watchdog_is_fed_while_all_threads_move() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut pulse = Pulse::new(start);
        assert!(pulse.is_well((1, vec![]), at(1)));
        assert!(pulse.is_well((1, vec![]), at(5)));
        assert!(!pulse.is_well((1, vec![]), at(6)), "the control thread hangs");
        assert!(pulse.is_well((2, vec![]), at(7)));
        assert!(!pulse.is_well((3, vec![1]), at(8)), "a worker hangs");
        assert!(pulse.is_well((4, vec![]), at(9)));
    }

    #[test]
    fn cpus_of_the_workers() {
        assert_eq!(cpus(&Cores::All, &[0, 2, 3]).unwrap(), [0, 2, 3]);
        assert_eq!(cpus(&Cores::All, &(0..200).collect::<Vec<_>>()).unwrap().len(), 128);
        assert_eq!(cpus(&Cores::Count(2), &[0, 2, 3]).unwrap(), [0, 2]);
        assert_eq!(cpus(&Cores::Count(3), &[0, 2]).unwrap(), [0, 2, 0]);
        assert_eq!(cpus(&Cores::List(vec![3, 0]), &[0, 2, 3]).unwrap(), [3, 0]);
        assert!(cpus(&Cores::List(vec![1]), &[0, 2, 3]).unwrap_err().contains("CPU 1 is not available"));
    }
}
