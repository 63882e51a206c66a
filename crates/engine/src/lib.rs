//! One run-to-completion worker per core.
//!
//! ```text
//!   TUN queue i ──┐                              ┌── UDP sockets of core i
//!                 ├─▶ worker i: pull, act, push ◀─┤
//!   rings ────────┘    tick, publish, sleep       └── doorbell
//! ```
//!
//! * [`config`]: what control tells the engine; it reads back [`counters`] and the tunnel's bonds.
//! * `worker`: the loop around [`datapath::Worker`]'s round: wait, run it, publish, sleep. Nothing per packet is shared with
//!   another worker.
//! * `ports`, `output`: the round's ports: TUN queue, [`sockets`], interfaces and rings; `cutter` for
//!   super-packets inside other packets.
//! * [`lan`]: the switch between a TAP device and bonds is put in force.
//! * [`handover`]: flows go from one process to the next, or come from another machine; [`copies`]: and to another one.
//! * `search`: flows that people ask for.
//! * [`gateway`]: state of the services that workers and control share; interfaces come and go.
//! * `control_thread` with `core_watch` and `neighbors`: cores that hang, drain or are busy; hardware addresses.
//! * [`rings`]: for packets that came to the wrong core, and only those; they are counted.
//! * [`doorbell`]: how a worker goes to sleep without missing anything.
//! * [`counters`]: written by one worker, read at scrape.
//!
//! Control reaches workers through three doors: an immutable configuration behind one atomic pointer, the counters,
//! and a list of actions with a doorbell.

pub mod config;
mod control_thread;
pub mod copies;
mod copy_watch;
mod core_watch;
pub mod counters;
mod cutter;
pub mod doorbell;
pub mod gateway;
pub mod handover;
pub mod lan;
mod neighbors;
mod output;
mod ports;
pub mod rings;
mod scheduling;
mod search;
pub mod sockets;
mod sync;
mod worker;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use linux::tun::{Tun, TunQueue};
use linux::udp::{UdpOptions, UdpSocket};
use steering::ownership::Ownership;
use tunnel::bond::Bonds;
use tunnel::config::NodeConfig;
use tunnel::lifecycle::Action;
use tunnel::node::Node;
use tunnel::time::Time;

use config::{Settings, Snapshot, Wan};
use counters::Counters;
use doorbell::Doorbell;

/// Why the engine could not start or change.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A system call failed.
    #[error(transparent)]
    Linux(#[from] linux::Error),
    /// A descriptor or thread could not be made.
    #[error("cannot start a worker: {0}")]
    Io(#[from] std::io::Error),
    /// No first bucket table or hash key.
    #[error(transparent)]
    Ownership(#[from] steering::ownership::OwnershipError),
    /// The TUN device has not one queue per core.
    #[error("the TUN device has {queues} queues for {cores} cores; open it with one queue per core")]
    Queues {
        /// Queues it has.
        queues: usize,
        /// Cores there are.
        cores: usize,
    },
}

/// Listening sockets of one WAN, in core order.
pub(crate) struct ListenGroup {
    pub wan: u16,
    pub sockets: Vec<Arc<UdpSocket>>,
}

/// Configuration that workers read at the start of a round.
pub(crate) struct WorkerConfig {
    pub version: u64,
    pub listeners: Vec<ListenGroup>,
    pub devices: HashMap<u16, String>,
    pub per_path: HashMap<usize, u8>,
}

/// Shared by control and all workers.
pub struct Shared {
    pub(crate) node: Arc<Node>,
    pub(crate) doorbells: Arc<Vec<Doorbell>>,
    pub(crate) counters: Vec<Arc<Counters>>,
    pub(crate) config: ArcSwap<WorkerConfig>,
    pub(crate) stop: AtomicBool,
    /// Rounds of the control thread: its heartbeat.
    pub(crate) control_rounds: AtomicU64,
    /// Kernel's thread id of each worker; 0 before it runs.
    pub(crate) threads: Vec<AtomicU32>,
    pub(crate) mark: u32,
    pub(crate) gateway: Arc<gateway::Shared>,
    actions: Mutex<Vec<Action>>,
}

impl Shared {
    pub(crate) fn take_actions(&self) -> Vec<Action> {
        self.actions.lock().map(|mut actions| std::mem::take(&mut *actions)).unwrap_or_default()
    }

    pub(crate) fn wake_all(&self) {
        for doorbell in self.doorbells.iter() {
            // Not `ring`: a worker that is just falling asleep must see it too.
            doorbell.ring_always();
        }
    }
}

/// A running engine.
pub struct Engine {
    shared: Arc<Shared>,
    settings: Settings,
    threads: Vec<JoinHandle<()>>,
    tun: Tun,
    /// Kept: with it the device would go.
    _tap: Option<Tun>,
    snapshot: Mutex<Snapshot>,
    started: Instant,
    steering: &'static str,
    handover: Mutex<handover::Handover>,
}

impl Engine {
    /// Starts one worker per CPU of `settings` on a TUN device that has as many queues, and a TAP device if there is one.
    ///
    /// # Errors
    /// [`EngineError`]; a UDP port that somebody else has is one of them.
    pub fn start(
        settings: Settings,
        snapshot: Snapshot,
        mut tun: Tun,
        mut tap: Option<Tun>,
    ) -> Result<Self, EngineError> {
        let cores = settings.cpus.len();
        let queues = tun.take_queues();
        let mut taps: Vec<Option<TunQueue>> = match &mut tap {
            Some(tap) => tap.take_queues().into_iter().map(Some).collect(),
            None => (0..cores).map(|_| None).collect(),
        };
        if queues.len() != cores || taps.len() != cores || cores == 0 || cores > 128 {
            return Err(EngineError::Queues { queues: queues.len(), cores });
        }
        let (count, earlier) = (u8::try_from(cores).unwrap_or(128), settings.placement.as_ref());
        let first = handover::first_ownership(count, earlier, gateway::keys())?;
        let ownership = Arc::new(ArcSwap::from_pointee(first));
        let node = Arc::new(Node::new(node_config(&settings, Arc::clone(&ownership))?));
        let doorbells = Arc::new((0..cores).map(|_| Doorbell::new()).collect::<std::io::Result<Vec<_>>>()?);
        let (program, steering) = steer(&tun, &ownership.load());
        let shared = Arc::new(Shared {
            node,
            doorbells: Arc::clone(&doorbells),
            counters: (0..cores).map(|_| Arc::default()).collect(),
            config: ArcSwap::from_pointee(WorkerConfig {
                version: 0,
                listeners: Vec::new(),
                devices: HashMap::new(),
                per_path: HashMap::new(),
            }),
            stop: AtomicBool::new(false),
            control_rounds: AtomicU64::new(0),
            threads: (0..cores).map(|_| AtomicU32::new(0)).collect(),
            mark: settings.mark,
            gateway: Arc::new(
                gateway::Shared::new(settings.cpus.clone(), ownership).map_err(std::io::Error::other)?,
            ),
            actions: Mutex::new(Vec::new()),
        });
        if settings.placement.is_some() {
            shared.gateway.progress.wait();
        }
        *gateway::lock(&shared.gateway.tun_program) = program;
        let merge_udp = tun.offload() == linux::tun::Offload::TcpAndUdp;
        let mut engine = Self {
            shared: Arc::clone(&shared),
            settings,
            threads: Vec::new(),
            tun,
            _tap: tap,
            snapshot: Mutex::new(Snapshot::default()),
            started: Instant::now(),
            steering,
            handover: handover::nothing(),
        };
        engine.apply(snapshot)?;
        let queues = queues.into_iter().zip(taps.drain(..));
        for ((id, (queue, tap)), rings) in (0u8..).zip(queues).zip(rings::mesh(&doorbells)) {
            let start = worker::Start { queue, tap, rings, merge_udp };
            let thread = engine.spawn_worker(id, start)?;
            engine.threads.push(thread);
        }
        engine.threads.push(engine.spawn_control()?);
        Ok(engine)
    }

    /// Starts the control thread. Without it nobody would find a core that hangs, or a neighbor.
    fn spawn_control(&self) -> Result<JoinHandle<()>, EngineError> {
        let shared = Arc::clone(&self.shared);
        let control = control_thread::ControlThread::new(Arc::clone(&shared));
        let thread = std::thread::Builder::new().name("control".to_owned()).spawn(move || {
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || control.run()));
            if ended.is_err() {
                tracing::error!("the control thread ended; stopping at once");
                std::process::abort();
            }
        })?;
        Ok(thread)
    }

    /// Heartbeat of the control thread, which stands still when that hangs, and the cores that it knows to hang.
    #[must_use]
    pub fn heartbeat(&self) -> (u64, Vec<u8>) {
        let states = gateway::lock(&self.shared.gateway.cores).states();
        let hung = (0u8..).zip(states).filter(|(_, state)| *state == gateway::CoreState::Stuck);
        (self.shared.control_rounds.load(Relaxed), hung.map(|(core, _)| core).collect())
    }

    /// Starts the thread of one core, on its CPU.
    fn spawn_worker(&self, id: u8, start: worker::Start) -> Result<JoinHandle<()>, EngineError> {
        let shared = Arc::clone(&self.shared);
        let worker = worker::Worker::new(id, Arc::clone(&shared), start)?;
        let cpu = self.settings.cpus[usize::from(id)];
        let thread = std::thread::Builder::new().name(format!("worker-{id}")).spawn(move || {
            if let Err(error) = linux::affinity::pin_current_thread(cpu) {
                tracing::warn!(core = id, cpu, %error, "not pinned");
            }
            linux::affinity::make_timers_exact();
            shared.threads[usize::from(id)].store(linux::affinity::thread_id(), Relaxed);
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || worker.run()));
            if ended.is_err() || !shared.stop.load(Relaxed) {
                // Its flows would stay dark while everything else looks well: better none than that. The service
                // manager starts us again, and the start cleans up.
                tracing::error!(core = id, "a worker ended; stopping at once");
                std::process::abort();
            }
        })?;
        Ok(thread)
    }

    /// Takes over a new configuration without disturbing what stays as it was.
    ///
    /// # Errors
    /// When a listening port cannot be had; everything else is applied all the same.
    pub fn apply(&self, snapshot: Snapshot) -> Result<(), EngineError> {
        let now = Time::from_ns(linux::clock::monotonic_ns());
        let mut actions = Vec::new();
        let mut last = self.snapshot.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.shared.node.apply(now, &snapshot, &mut actions);
        let (listeners, result) = self.listeners(&last.wans, &snapshot.wans);
        let config = self.shared.config.load();
        let bonds = self.shared.node.bonds.load();
        let per_path = bonds.iter().map(|bond| (bond.slot, bond.peer.load().paths.sockets.max(1))).collect();
        self.shared.config.store(Arc::new(WorkerConfig {
            version: config.version + 1,
            listeners,
            devices: snapshot.wans.iter().map(|wan| (wan.id, wan.interface.clone())).collect(),
            per_path,
        }));
        if let Ok(mut waiting) = self.shared.actions.lock() {
            waiting.extend(actions);
        }
        *last = snapshot;
        self.shared.wake_all();
        result
    }

    /// Listening groups for the WANs that are up: kept where they were, opened where they come.
    fn listeners(&self, old: &[Wan], wans: &[Wan]) -> (Vec<ListenGroup>, Result<(), EngineError>) {
        let Some(port) = self.settings.listen_port else { return (Vec::new(), Ok(())) };
        let config = self.shared.config.load();
        let (mut groups, mut result) = (Vec::new(), Ok(()));
        // Of what carries datagrams over TCP only the end that peers connect to, by its interface.
        let is_dialed = |wan: &Wan| wan.relays.is_some() && wan.interface.is_empty();
        for wan in wans.iter().filter(|wan| (wan.up || wan.interface.is_empty()) && !is_dialed(wan)) {
            let was_up =
                old.iter().any(|before| before.id == wan.id && (before.up || before.interface.is_empty()));
            let kept = config.listeners.iter().find(|group| was_up && group.wan == wan.id);
            if let Some(group) = kept {
                groups.push(ListenGroup { wan: wan.id, sockets: group.sockets.clone() });
                continue;
            }
            match self.open_group(wan, port) {
                Ok(sockets) => groups.push(ListenGroup { wan: wan.id, sockets }),
                Err(error) => result = Err(error.into()),
            }
        }
        (groups, result)
    }

    fn open_group(&self, wan: &Wan, port: u16) -> Result<Vec<Arc<UdpSocket>>, linux::Error> {
        let device = (!wan.interface.is_empty()).then(|| wan.interface.clone());
        let local = linux::udp::any_address(port);
        let options = UdpOptions { device, mark: self.settings.mark, ..UdpOptions::new(local) };
        let deadline = Instant::now() + Duration::from_secs(1);
        loop {
            match UdpSocket::bind_group(&options, self.settings.cpus.len()) {
                Ok(sockets) => return Ok(sockets.into_iter().map(Arc::new).collect()),
                // Workers may still hold the group of an interface that went and came back.
                Err(error)
                    if error.kind() == std::io::ErrorKind::AddrInUse
                        && !self.threads.is_empty()
                        && Instant::now() < deadline =>
                {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Counters of each core, in core order.
    pub fn counters(&self) -> &[Arc<Counters>] {
        &self.shared.counters
    }

    /// CPU of each core's worker.
    pub fn cpus(&self) -> &[usize] {
        &self.settings.cpus
    }

    /// Bonds to peers, with their sessions and paths as they are now.
    pub fn bonds(&self) -> Arc<Bonds> {
        self.shared.node.bonds.load_full()
    }

    /// When the workers were started.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// How packets find their core: "bpf" or "ring".
    pub fn steering(&self) -> &'static str {
        self.steering
    }

    /// Highest handshake timestamp used; a later run must start above it.
    pub fn timestamp_floor_ns(&self) -> u64 {
        self.shared.node.timestamp_floor_ns()
    }

    /// UDP port that peers dial.
    pub fn listen_port(&self) -> Option<u16> {
        let config = self.shared.config.load();
        config
            .listeners
            .first()
            .and_then(|group| group.sockets.first())
            .map(|socket| socket.local_addr().port())
    }

    /// The TUN device.
    pub fn tun(&self) -> &Tun {
        &self.tun
    }

    /// Tells the peers, stops the workers and waits for them.
    pub fn stop(mut self) {
        self.shut_down();
    }

    fn shut_down(&mut self) {
        self.close_gateway();
        self.shared.stop.store(true, Relaxed);
        self.shared.wake_all();
        self.join();
    }

    fn join(&mut self) {
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a worker panicked");
            }
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shut_down();
    }
}

/// Random keys and the rest of what the tunnel wants to know.
fn node_config(settings: &Settings, ownership: Arc<ArcSwap<Ownership>>) -> Result<NodeConfig, EngineError> {
    let mut random = [0u8; 16 + 8 + 32];
    getrandom::fill(&mut random).map_err(|error| std::io::Error::other(error.to_string()))?;
    let mut rest = &random[..];
    let (index_key, boot_id, seed) = (take(&mut rest), take(&mut rest), take(&mut rest));
    let monotonic_ns = linux::clock::monotonic_ns();
    Ok(NodeConfig {
        private_key: settings.private_key.clone(),
        node_id: 0,
        hub_key: settings.hub_key.clone(),
        ownership,
        index_key,
        boot_id: u64::from_be_bytes(boot_id),
        seed,
        // The node's clock is the monotonic one, which does not start at zero.
        wall_clock_ns: settings.wall_clock_ns.saturating_sub(monotonic_ns),
        timestamp_floor_ns: settings.timestamp_floor_ns,
        rekey_after_ms: settings.rekey_after_ms,
    })
}

/// The next `N` bytes of `rest`.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let (first, others) = rest.split_first_chunk().unwrap_or((&[0; N], &[]));
    *rest = others;
    *first
}

/// Makes TUN put every packet into the queue of its owner; without the privilege for it, rings do that work.
fn steer(tun: &Tun, ownership: &Ownership) -> (Option<linux::bpf::SteeringProgram>, &'static str) {
    if ownership.cores == 1 {
        return (None, "single core");
    }
    let attached = linux::bpf::SteeringProgram::load(&ownership.hasher, 0, ownership.table.owners())
        .and_then(|program| tun.attach_steering(&program).map(|()| program));
    match attached {
        Ok(program) => (Some(program), "bpf"),
        Err(error) => {
            tracing::info!(%error, "no BPF steering of the TUN queues; packets of the wrong core take a ring");
            (None, "ring")
        }
    }
}
