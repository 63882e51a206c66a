//! The gateway of plain interfaces: what every worker does besides the tunnel, and the control core that watches them.
//!
//! ```text
//!   interface ── fanout by our hash ──▶ ring of core i ─┐               ┌─▶ sender of core i ── interface
//!   TUN, tunnel ────────────────────────────────────────┼─▶ services ───┼─▶ TUN (the host's own stack), tunnel
//!   rings of the other cores ───────────────────────────┘    core i     └─▶ rings of the other cores
//! ```
//!
//! * `gso_batch`: datagrams of one flow leave as one super-packet.
//! * `shared`: interfaces that several machines share.
//! * `open`: interfaces come and go; their sockets are opened for all cores at once.
//! * `hold`: the kernel's stack between two processes.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::copies::CopyChunk;
use crate::output::DeviceIngress;
use arc_swap::ArcSwap;
use datapath::Snapshots;
use linux::bpf::{OwnPorts, PortCounts, SteeringProgram};
use linux::packet_ring::PacketRing;
use linux::packet_sender::PacketSender;
use linux::raw_ip::RawIpSender;
use packet::DropCounters;
use packet::attachment::{Egress, InterfaceId};
use packet::flow::FlowKey;
use services::flow::{FlowCounters, Record};
use services::held_ports::HeldPorts;
use services::nat::NatEvent;
use services::pipeline::{Counters, NatRefusals, Neighbors};
use services::policy::Policy;
use services::spec::GatewaySpec;
use steering::ownership::Ownership;

use crate::core_watch::Permissions;
use crate::doorbell::Version;
use crate::handover::{ImportBatch, Progress};
use crate::lan::LanShared;

pub(crate) mod gso_batch;
pub(crate) mod hold;
mod load;
pub(crate) mod open;
pub(crate) mod shared;

pub use shared::{ClusterHandle, SharedDevice};

pub use steering::cores::{CoreSet, CoreState};
pub use steering::ownership::ClassCores;

/// Cores look for flows that people ask for so long …
const SEARCH: Duration = Duration::from_secs(1);
/// … and then have so long for the round in which they say what they found.
const ANSWER: Duration = Duration::from_millis(500);

/// NAT events kept until somebody takes them.
const EVENTS_MAX: usize = 200_000;

/// Settings of the gateway, as control wants them.
#[derive(Clone, Debug)]
pub struct GatewaySettings {
    /// Services and interfaces.
    pub spec: GatewaySpec,
    /// The kernel's device of each interface; `None` while it is missing or down.
    pub devices: Vec<Option<u32>>,
    /// Which core reads what (row C8).
    pub readers: Readers,
    /// Buckets move from busy cores to idle ones (row C9).
    pub rebalance: bool,
    /// Keep NAT events for [`crate::Engine::take_nat_events`].
    pub nat_events: bool,
}

/// Which core reads a packet. Its owner is the same with all of them; what another core reads takes a ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Readers {
    /// The owner, by our hash in the kernel.
    #[default]
    Flow,
    /// One core per interface.
    Interface,
    /// In turn.
    RoundRobin,
    /// At random.
    Random,
    /// The CPU that the packet came in on.
    Cpu,
}

/// Report of one worker about itself, some times a second.
#[derive(Clone, Debug, Default)]
pub struct CoreReport {
    /// Counters of its services.
    pub counters: Counters,
    /// Drops by reason.
    pub drops: DropCounters,
    /// Flows now.
    pub live_flows: u64,
    /// Flows that have not seen a reply.
    pub embryonic_flows: u64,
    /// Memory of the flow table, bytes.
    pub flow_memory_bytes: u64,
    /// First packets of flows by rule; the last is the default action.
    pub rule_hits: Vec<u64>,
    /// Live flows by NAT rule: the operator's, then one for each virtual server.
    pub nat_flows: Vec<u64>,
    /// New flows that the operator's NAT rules could not translate.
    pub nat_refusals: Vec<NatRefusals>,
    /// Live and begun flows by port forward.
    pub forward_flows: Vec<(u64, u64)>,
    /// Live flows by bucket.
    pub live_by_bucket: Vec<u32>,
    /// Era of the bucket table that it works by.
    pub table_era: u32,
    /// Ports of outside addresses held by flows.
    pub ports_held: u64,
    /// NAT events that this core could not keep until they were taken.
    pub lost_nat_events: u64,
    /// Live flows by bucket of the cluster's table; empty without a cluster.
    pub live_by_unit_bucket: LiveByUnitBucket,
    /// By interface: packets and bytes read, packets and bytes sent, packets lost in the kernel's ring.
    pub interfaces: Vec<InterfaceCounters>,
}

/// Live flows by bucket of the cluster's table.
#[derive(Clone, Debug, Default)]
pub struct LiveByUnitBucket {
    /// Number of the snapshot of the cluster that the core worked by when it counted.
    pub snapshot: u64,
    /// Counts.
    pub live: Vec<u32>,
    /// Live flows that were another machine's.
    pub inherited: u32,
}

/// Counters of one core at one interface.
#[derive(Clone, Copy, Debug, Default)]
pub struct InterfaceCounters {
    /// Packets read, super-packets once.
    pub rx_packets: u64,
    /// Bytes of them.
    pub rx_bytes: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Bytes of them.
    pub tx_bytes: u64,
    /// Packets the kernel had no room for in the ring.
    pub lost_packets: u64,
    /// Whether this core reads there.
    pub reads: bool,
}

/// A flow for people to look at.
#[derive(Clone, Debug)]
pub struct FlowEntry {
    /// Core.
    pub core: u8,
    /// Key and tenant of the original direction.
    pub original: (FlowKey, u16),
    /// Key and tenant of replies as they arrive.
    pub reply: (FlowKey, u16),
    /// State.
    pub record: Record,
    /// Counts, for translated flows.
    pub counters: Option<FlowCounters>,
    /// How long ago its last packet came, ns.
    pub idle_ns: u64,
    /// When it will be forgotten, ns from now.
    pub expires_ns: u64,
    /// Where packets of each direction leave as the routes are now, and the neighbor; place by
    /// [`services::flow::Direction`].
    pub ways: [Option<(Egress, IpAddr)>; 2],
}

/// Flows that were asked for.
#[derive(Clone, Debug, Default)]
pub struct FlowAnswer {
    /// Those that match, or as many as were wanted.
    pub flows: Vec<FlowEntry>,
    /// All flows were looked at, unless so many matched; not so when the time was over first, or a core did not answer.
    pub complete: bool,
}

/// A question to a worker about its flows.
pub(crate) struct FlowQuery {
    pub matches: Arc<dyn Fn(&FlowEntry) -> bool + Send + Sync>,
    pub limit: usize,
    /// End of the search, ns: the answer has all that was found until then.
    pub until_ns: u64,
    pub answer: SyncSender<FlowAnswer>,
}

/// One interface as one core has it.
pub(crate) struct Interface {
    pub id: InterfaceId,
    /// `None` where another core reads the interface.
    pub ring: Option<PacketRing>,
    pub sender: PacketSender,
    pub raw: RawIpSender,
    /// The way back into the device.
    pub back: Option<DeviceIngress>,
    /// At the first core, what else passes at an interface that other machines share.
    pub shared: Option<shared::SharedSource>,
    /// The device of ours that stands for it.
    pub tap: Option<Arc<linux::tun::Tap>>,
}

/// An order in a worker's mailbox.
pub(crate) enum Command {
    /// A new interface, or a new socket for one.
    Open(Box<Interface>),
    /// An interface is gone.
    Close(InterfaceId),
    /// Somebody wants to see flows.
    Flows(FlowQuery),
    /// All flows are other machines' by now.
    ForgetFlows,
    /// Somebody wants to know the way of a flow's packets that come in by an interface; the number of the question.
    Trace(FlowKey, InterfaceId, u32),
    /// Flows of the process before, or of another machine.
    Import(Box<ImportBatch>),
    /// Where copies of all flows go from now on, all of them anew.
    Copy(SyncSender<CopyChunk>),
    /// At the end: where the records of all flows go.
    Export(SyncSender<Vec<u8>>),
}

impl Command {
    /// The interface that comes or goes.
    fn interface(&self) -> Option<InterfaceId> {
        match self {
            Command::Open(interface) => Some(interface.id),
            Command::Close(id) => Some(*id),
            Command::Flows(_)
            | Command::ForgetFlows
            | Command::Trace(..)
            | Command::Import(_)
            | Command::Copy(_)
            | Command::Export(_) => None,
        }
    }
}

/// Shared by control, the control core and all workers.
pub(crate) struct Shared {
    /// CPU of each worker.
    pub cpus: Vec<usize>,
    pub policy: ArcSwap<Policy>,
    pub ownership: Arc<ArcSwap<Ownership>>,
    pub neighbors: ArcSwap<Neighbors>,
    /// Ports that programs of the host have opened since the policy was made.
    pub opened_ports: ArcSwap<HeldPorts>,
    /// Other machines that share the work.
    pub cluster: shared::ClusterShared,
    /// The switch between the TAP device and bonds.
    pub lan: LanShared,
    /// Raised by each change of the six above, so that workers need only look at one number.
    pub version: Version,
    /// Whether there is anything to do: at least one interface was configured once.
    pub active: AtomicBool,
    pub reports: Vec<Mutex<CoreReport>>,
    /// Rounds of each worker: a heartbeat.
    pub rounds: Vec<AtomicU64>,
    mailboxes: Vec<Mutex<Vec<Command>>>,
    events: Mutex<Vec<NatEvent>>,
    keep_events: AtomicBool,
    pub lost_events: AtomicU64,
    pub cores: Mutex<Permissions>,
    /// Held from looking at the ownership to putting another in force; before any other lock.
    pub table_changes: Mutex<()>,
    retired: Mutex<Retired>,
    /// Flows of the process before.
    pub progress: Progress,
    pub opened: Mutex<open::Opened>,
    /// Puts what the host sends into the owner's TUN queue; without the privilege for it rings do that work.
    pub tun_program: Mutex<Option<SteeringProgram>>,
    /// How many flows have each port, for the programs at the interfaces; `None` without the privilege for them.
    pub port_counts: Option<Arc<PortCounts>>,
}

impl Shared {
    /// Nothing configured yet. `cpus`: that of each core's worker.
    pub fn new(cpus: Vec<usize>, ownership: Arc<ArcSwap<Ownership>>) -> Result<Self, String> {
        let cores = cpus.len();
        let (policy, _) = Policy::compile_keyed(
            GatewaySpec::default(),
            None,
            linux::clock::monotonic_ns(),
            getrandom::u64().map_err(|error| error.to_string())?,
        )?;
        Ok(Self {
            cpus,
            policy: ArcSwap::from_pointee(policy),
            ownership,
            tun_program: Mutex::default(),
            port_counts: PortCounts::new().map(Arc::new).inspect_err(no_port_counts).ok(),
            neighbors: ArcSwap::from_pointee(Neighbors::default()),
            opened_ports: ArcSwap::default(),
            cluster: shared::ClusterShared::new(cores),
            lan: LanShared::new(cores),
            version: Version::default(),
            active: AtomicBool::new(false),
            reports: (0..cores).map(|_| Mutex::default()).collect(),
            rounds: (0..cores).map(|_| AtomicU64::new(0)).collect(),
            mailboxes: (0..cores).map(|_| Mutex::default()).collect(),
            events: Mutex::default(),
            keep_events: AtomicBool::new(false),
            lost_events: AtomicU64::new(0),
            cores: Mutex::new(Permissions::new(cores)),
            table_changes: Mutex::default(),
            retired: Mutex::default(),
            progress: Progress::default(),
            opened: Mutex::default(),
        })
    }

    /// The way of the host's packets from ports that flows have, of the addresses of the policy in force; `tun`: name of the TUN
    /// device.
    fn own_ports(&self, tun: &str) -> Option<OwnPorts> {
        if let Some(counts) = &self.port_counts
            && let Err(error) = counts.set_addresses(&self.policy.load().shared_addresses().collect())
        {
            tracing::warn!(%error, "a program of the host may meet a flow at its port until it is seen");
        }
        OwnPorts::new(self.port_counts.clone()?, tun).inspect_err(no_port_counts).ok()
    }

    /// Everything that workers take over together.
    pub fn snapshots(&self) -> Snapshots {
        Snapshots {
            policy: self.policy.load_full(),
            ownership: self.ownership.load_full(),
            neighbors: self.neighbors.load_full(),
            opened_ports: self.opened_ports.load_full(),
            cluster: self.cluster.snapshot.load_full(),
            inherited: self.cluster.inherited.load_full(),
            lan: self.lan.published.load_full(),
            serving: self.active.load(Relaxed),
        }
    }

    /// Puts a policy in force.
    fn put_policy(&self, policy: Policy) {
        let old = self.policy.swap(Arc::new(policy));
        lock(&self.retired).policies.push(old);
        self.changed();
    }

    /// Tells the workers of other neighbors.
    pub fn put_neighbors(&self, neighbors: Neighbors) {
        let old = self.neighbors.swap(Arc::new(neighbors));
        lock(&self.retired).neighbors.push(old);
        self.changed();
    }

    /// Frees what no worker holds any more.
    pub fn free_retired(&self) {
        let mut retired = lock(&self.retired);
        let policies: Vec<_> =
            retired.policies.extract_if(.., |policy| Arc::strong_count(policy) == 1).collect();
        let neighbors: Vec<_> =
            retired.neighbors.extract_if(.., |neighbors| Arc::strong_count(neighbors) == 1).collect();
        drop(retired);
        // Only now: a large policy takes its time.
        drop((policies, neighbors));
    }

    pub fn changed(&self) {
        self.version.raise();
    }

    pub fn send(&self, core: usize, command: Command) {
        if let Some(mailbox) = self.mailboxes.get(core) {
            let mut commands = lock(mailbox);
            // The newest word on an interface counts: a core that hangs collects no sockets.
            if let Some(id) = command.interface() {
                commands.retain(|older| older.interface() != Some(id));
            }
            commands.push(command);
        }
    }

    pub fn take_commands(&self, core: usize) -> Vec<Command> {
        self.mailboxes.get(core).map(|mailbox| std::mem::take(&mut *lock(mailbox))).unwrap_or_default()
    }

    /// Takes over what a core's `events` gives, or nothing: it is asked only then. A core that would have to wait keeps its
    /// own until the next time.
    pub fn keep_events<I: Iterator<Item = NatEvent>>(&self, events: impl FnOnce() -> I) {
        if !self.events_wanted() {
            events().for_each(drop);
        } else if let Ok(mut kept) = self.events.try_lock() {
            self.keep(&mut kept, events());
        }
    }

    fn keep(&self, kept: &mut Vec<NatEvent>, mut events: impl Iterator<Item = NatEvent>) {
        let room = EVENTS_MAX.saturating_sub(kept.len());
        kept.extend(events.by_ref().take(room));
        self.lost_events.fetch_add(events.count() as u64, Relaxed);
    }

    /// NAT events lost since the start: on the cores, and because nobody took them in time.
    pub fn lost_events(&self) -> u64 {
        let on_cores: u64 = self.reports.iter().map(|report| lock(report).lost_nat_events).sum();
        self.lost_events.load(Relaxed) + on_cores
    }

    pub fn events_wanted(&self) -> bool {
        self.keep_events.load(Relaxed)
    }

    pub fn take_events(&self) -> Vec<NatEvent> {
        std::mem::take(&mut *lock(&self.events))
    }
}

/// Policies and neighbors that were in force and may still be held by workers. Whoever lets go last has to free them,
/// and while a worker frees a large policy, its packets wait: so the control core does.
#[derive(Default)]
struct Retired {
    policies: Vec<Arc<Policy>>,
    neighbors: Vec<Arc<Neighbors>>,
}

/// Keys to draw from: the hash's key never leaves the process.
pub(crate) fn keys() -> impl Iterator<Item = [u8; steering::toeplitz::KEY_BYTES]> {
    (0..steering::ownership::KEYS_TRIED).map_while(|_| {
        let mut key = [0; steering::toeplitz::KEY_BYTES];
        getrandom::fill(&mut key).is_ok().then_some(key)
    })
}

/// Without them programs of the host and flows may meet at a port.
fn no_port_counts(error: &linux::Error) {
    tracing::info!(%error, "a program of the host may meet a flow at its port until it is seen");
}

/// A lock whose holder cannot have left half a change behind.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl crate::Engine {
    /// Puts a new gateway configuration in force. No flow is lost: each is decided again under the new rules when its
    /// next packet comes.
    ///
    /// # Errors
    /// Text for the operator: rules cannot be compiled, and everything stays as it was. When an interface cannot be opened
    /// the rest is in force ([`Self::interface_errors`]).
    pub fn apply_gateway(&self, settings: &GatewaySettings) -> Result<(), String> {
        let gateway = &self.shared.gateway;
        let before = gateway.policy.load_full();
        let (policy, events) =
            Policy::compile(settings.spec.clone(), Some(&before), linux::clock::monotonic_ns())?;
        gateway.keep_events.store(settings.nat_events, Relaxed);
        if settings.nat_events {
            gateway.keep(&mut lock(&gateway.events), events.into_iter());
        }
        lock(&gateway.cores).rebalance = settings.rebalance;
        gateway.active.store(true, Relaxed);
        gateway.put_policy(policy);
        self.take_over();
        self.open_interfaces(settings);
        Ok(())
    }

    /// Opens the interfaces of the settings in force that are not open.
    pub fn open_interfaces(&self, settings: &GatewaySettings) {
        let own = &self.settings;
        open::follow(&self.shared.gateway, settings, own.listen_port, &own.tun_name);
        self.shared.wake_all();
    }

    /// Says which devices are shared with other machines. Before the first [`Self::apply_gateway`].
    pub fn share_devices(&self, devices: BTreeMap<String, SharedDevice>) {
        *lock(&self.shared.gateway.cluster.devices) = devices;
    }

    /// The cluster's side of the engine, for a thread of its own.
    #[must_use]
    pub fn cluster_handle(&self) -> ClusterHandle {
        ClusterHandle::new(Arc::clone(&self.shared))
    }

    /// Table of `nft` that keeps the kernel from forwarding between the interfaces when this process has died.
    #[must_use]
    pub fn forward_guard(&self) -> Option<String> {
        lock(&self.shared.gateway.opened).forward_guard()
    }

    /// Makes that table again if somebody has removed it, and those that guard interfaces; returns whether that was so.
    ///
    /// # Errors
    /// Without the program `nft`.
    pub fn keep_tables(&self) -> Result<bool, linux::Error> {
        lock(&self.shared.gateway.opened).keep_tables()
    }

    /// Interfaces that could not be opened, and why.
    #[must_use]
    pub fn interface_errors(&self) -> BTreeMap<InterfaceId, String> {
        lock(&self.shared.gateway.opened).errors.clone()
    }

    /// Report that each core made last.
    #[must_use]
    pub fn core_reports(&self) -> Vec<CoreReport> {
        self.shared.gateway.reports.iter().map(|report| lock(report).clone()).collect()
    }

    /// State of each core: what it may do, and how many buckets it owns.
    #[must_use]
    pub fn core_states(&self) -> Vec<(CoreState, usize)> {
        let ownership = self.shared.gateway.ownership.load();
        let states = lock(&self.shared.gateway.cores).states();
        (0u16..).zip(states).map(|(core, state)| (state, ownership.table.count(core))).collect()
    }

    /// Takes a core's buckets away (`false`), or gives it some again. Its flows go on on it until they end.
    ///
    /// # Errors
    /// There is no such core, or it would be the last.
    pub fn set_core(&self, core: usize, enabled: bool) -> Result<(), String> {
        let gateway = &self.shared.gateway;
        {
            let mut shared = lock(&gateway.cores);
            let others = shared.states().into_iter().enumerate();
            let active =
                others.filter(|(place, state)| *place != core && *state == CoreState::Active).count();
            if core >= shared.cores {
                return Err(format!("no core {core}; there are 0 to {}", shared.cores - 1));
            }
            if !enabled && active == 0 {
                return Err(format!("core {core} is the last one that takes new flows"));
            }
            if enabled {
                shared.drained.remove(core as u8);
            } else {
                shared.drained.insert(core as u8);
            }
        }
        gateway.replan(&self.shared);
        Ok(())
    }

    /// Reserves cores for classes of flows, and says which they prefer (row T13). Flows go there from now on; those that live
    /// on a core which is reserved move with their buckets.
    ///
    /// # Errors
    /// There is no such core, or none would be left for all classes; then nothing changes.
    pub fn set_class_cores(&self, classes: &ClassCores) -> Result<(), String> {
        let gateway = &self.shared.gateway;
        {
            let mut shared = lock(&gateway.cores);
            if shared.classes == *classes {
                return Ok(());
            }
            let all = CoreSet::first(shared.cores as u16);
            let (reserved, named) = (classes.all_reserved(), classes.all());
            if let Some(core) = named.without(&all).iter().next() {
                return Err(format!("no core {core}; there are 0 to {}", shared.cores - 1));
            }
            if all.without(&reserved).is_empty() {
                return Err("every core is reserved; leave one for all other classes".to_owned());
            }
            shared.classes = classes.clone();
        }
        gateway.replan(&self.shared);
        Ok(())
    }

    /// The policy in force.
    #[must_use]
    pub fn policy(&self) -> Arc<Policy> {
        self.shared.gateway.policy.load_full()
    }

    /// The bucket table and hash in force.
    #[must_use]
    pub fn ownership(&self) -> Arc<Ownership> {
        self.shared.gateway.ownership.load_full()
    }

    /// Tells workers which ports programs of the host have opened since the policy was made: no flow gets them, and who sends to one
    /// reaches the program.
    pub fn set_opened_ports(&self, opened: Arc<HeldPorts>) {
        self.shared.gateway.opened_ports.store(opened);
        self.shared.gateway.changed();
    }

    /// The neighbors known.
    #[must_use]
    pub fn neighbors(&self) -> Arc<Neighbors> {
        self.shared.gateway.neighbors.load_full()
    }

    /// NAT events since the last call, and how many were lost for lack of room since the start.
    #[must_use]
    pub fn take_nat_events(&self) -> (Vec<NatEvent>, u64) {
        (self.shared.gateway.take_events(), self.lost_nat_events())
    }

    /// NAT events lost since the start: on the cores, and because nobody took them in time.
    #[must_use]
    pub fn lost_nat_events(&self) -> u64 {
        self.shared.gateway.lost_events()
    }

    /// Flows that match, of all cores that work, at most `limit` of each; what they find within a second, beside their packets.
    #[must_use]
    pub fn flows(&self, matches: &Arc<dyn Fn(&FlowEntry) -> bool + Send + Sync>, limit: usize) -> FlowAnswer {
        let cores = self.shared.gateway.reports.len();
        let (answer, answers) = std::sync::mpsc::sync_channel(cores.max(1));
        let ownership = self.shared.gateway.ownership.load();
        let asked: Vec<usize> = (0..cores).filter(|core| ownership.is_alive(*core as u8)).collect();
        let until_ns = linux::clock::monotonic_ns().saturating_add(SEARCH.as_nanos() as u64);
        for &core in &asked {
            let query = FlowQuery { matches: Arc::clone(matches), limit, until_ns, answer: answer.clone() };
            self.shared.gateway.send(core, Command::Flows(query));
        }
        drop(answer);
        self.shared.wake_all();
        let deadline = std::time::Instant::now() + SEARCH + ANSWER;
        let mut all = FlowAnswer { flows: Vec::new(), complete: true };
        for _ in asked {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            let Ok(answer) = answers.recv_timeout(left) else {
                all.complete = false;
                break;
            };
            all.flows.extend(answer.flows);
            all.complete &= answer.complete;
        }
        all
    }

    /// Closes all interfaces: the kernel's stack has them again.
    pub(crate) fn close_gateway(&self) {
        lock(&self.shared.gateway.opened).clear();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use services::nat::NatEventKind;

    use super::*;

    fn shared(cores: u8) -> Shared {
        let ownership = Ownership::new(cores, keys()).unwrap();
        let cpus = (0..usize::from(cores)).collect();
        Shared::new(cpus, Arc::new(ArcSwap::from_pointee(ownership))).unwrap()
    }

    #[test]
    fn nat_events_without_room_are_counted_wherever_they_are_lost() {
        let shared = shared(2);
        let endpoint = "192.0.2.1:80".parse().unwrap();
        let event = NatEvent {
            at_ns: 1,
            kind: NatEventKind::Opened,
            tenant: 0,
            protocol: 6,
            inside: endpoint,
            outside: endpoint,
            ports: 1,
            remote: None,
        };
        let some = |count: usize| move || std::iter::repeat_n(event, count);
        shared.keep_events(some(9));
        assert_eq!((shared.take_events().len(), shared.lost_events()), (0, 0), "nobody wants them");
        shared.keep_events.store(true, Relaxed);
        shared.keep_events(some(EVENTS_MAX - 1));
        shared.keep_events(some(4));
        assert_eq!(shared.lost_events(), 3);
        lock(&shared.reports[1]).lost_nat_events = 5;
        assert_eq!((shared.take_events().len(), shared.lost_events()), (EVENTS_MAX, 8));
        let waits = lock(&shared.events);
        shared.keep_events(|| -> std::iter::Empty<NatEvent> {
            panic!("asked although there is no way to keep")
        });
        drop(waits);
        shared.keep_events(some(2));
        assert_eq!((shared.take_events().len(), shared.lost_events()), (2, 8));
    }

    #[test]
    fn the_newest_word_on_an_interface_counts() {
        let shared = shared(1);
        for id in [3, 4, 3, 3] {
            shared.send(0, Command::Close(InterfaceId(id)));
        }
        let ids: Vec<_> = shared.take_commands(0).iter().map(Command::interface).collect();
        assert_eq!(ids, [Some(InterfaceId(4)), Some(InterfaceId(3))]);
    }

    fn next(shared: &Shared) -> Policy {
        let before = shared.policy.load_full();
        Policy::compile(GatewaySpec::default(), Some(&before), 0).unwrap().0
    }

    #[test]
    fn what_workers_held_is_freed_by_the_control_core_and_by_nobody_else() {
        let shared = shared(2);
        let (held, neighbors) = (shared.policy.load_full(), shared.neighbors.load_full());
        let (policy_of_worker, neighbors_of_worker) = (Arc::clone(&held), Arc::clone(&neighbors));
        let (old, old_neighbors) = (Arc::downgrade(&held), Arc::downgrade(&neighbors));
        drop((held, neighbors));
        shared.put_policy(next(&shared));
        shared.put_neighbors(Neighbors::default());
        shared.free_retired();
        assert!(old.upgrade().is_some() && old_neighbors.upgrade().is_some(), "a worker still has them");
        drop((policy_of_worker, neighbors_of_worker));
        assert!(old.upgrade().is_some() && old_neighbors.upgrade().is_some(), "the worker was the last");
        shared.free_retired();
        assert!(old.upgrade().is_none() && old_neighbors.upgrade().is_none());
        // One that no worker ever took goes at once.
        let skipped = Arc::downgrade(&shared.policy.load_full());
        shared.put_policy(next(&shared));
        shared.free_retired();
        assert!(skipped.upgrade().is_none() && lock(&shared.retired).policies.is_empty());
    }
}
