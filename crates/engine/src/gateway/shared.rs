//! Shared interfaces of a cluster: what passes there besides the packets that are dispatched.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex};

use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, ArcSwapOption};
use cluster::snapshot::Snapshot;
use datapath::trace::Traced;
use packet::FlowKey;
use packet::attachment::InterfaceId;
use services::handover::InheritedFlows;
use steering::cores::CoreSet;

use super::load::{CoreTimes, LoadMeter};
use linux::packet_socket::PacketSocket;
use linux::tun::Tap;
use tunnel::index::IndexCipher;

use crate::copies::{CHUNKS_WAITING, CopyChunk};
use crate::counters::Counters;
use crate::handover::TakenOver;

/// A source of frames beside those of the rings.
#[derive(Debug)]
pub(crate) enum SharedSource {
    /// At a dispatcher: ARP and neighbor discovery of the interface.
    Neighbors(PacketSocket),
    /// At a data plane: what its host sends by the interface, which is a device of ours there.
    Host(Arc<Tap>),
}

impl SharedSource {
    /// Reads one frame; `WouldBlock` when there is none.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Neighbors(socket) => socket.receive(buffer),
            Self::Host(tap) => tap.read(buffer),
        }
    }
}

impl AsFd for SharedSource {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Neighbors(socket) => socket.as_fd(),
            Self::Host(tap) => tap.as_fd(),
        }
    }
}

/// Share of this machine in an interface of a cluster.
#[derive(Clone, Debug)]
pub enum SharedDevice {
    /// A dispatcher has the interface.
    Real {
        /// Datagrams to the tunnel's port are the data planes': the cluster is a hub.
        hub: bool,
        /// Whichever of several dispatchers is given its addresses has it: nothing there is for this host.
        takeover: bool,
    },
    /// A data plane has a device that stands for it.
    Tap(Arc<Tap>),
}

/// Part of a cluster, shared by control and all workers.
pub(crate) struct ClusterShared {
    /// The other machines.
    pub snapshot: ArcSwapOption<Snapshot>,
    /// Flows that were other machines', and the cores that have them.
    pub inherited: ArcSwap<InheritedFlows>,
    /// Number of the snapshot that each core works by.
    pub taken: Vec<AtomicU64>,
    /// Interfaces that other machines share, by device.
    pub devices: Mutex<BTreeMap<String, SharedDevice>>,
    load: LoadMeter,
    /// Answers to questions for the way, of all cores.
    traced: Mutex<Vec<Traced>>,
    /// Number of the next question.
    next_trace: AtomicU32,
}

/// Answers that wait for who asked, at most.
const TRACED_MAX: usize = 256;
/// A question that was not answered is asked again after so long, so often.
const TRACE_PATIENCE: Duration = Duration::from_millis(300);
const TRACE_TRIES: usize = 3;

impl ClusterShared {
    /// No other machine yet.
    pub fn new(cores: usize) -> Self {
        Self {
            snapshot: ArcSwapOption::empty(),
            inherited: ArcSwap::default(),
            taken: (0..cores).map(|_| AtomicU64::new(0)).collect(),
            devices: Mutex::default(),
            load: LoadMeter::default(),
            traced: Mutex::default(),
            next_trace: AtomicU32::new(0),
        }
    }

    /// Keeps answers for who asked.
    pub fn keep_traced(&self, mut answers: Vec<Traced>) {
        if answers.is_empty() {
            return;
        }
        let mut all = super::lock(&self.traced);
        all.append(&mut answers);
        let excess = all.len().saturating_sub(TRACED_MAX);
        all.drain(..excess);
    }
}

/// The cluster's side of a running engine.
#[derive(Clone)]
pub struct ClusterHandle(Arc<crate::Shared>);

/// Counts of all cores for the manager.
#[derive(Clone, Debug, Default)]
pub struct ClusterFigures {
    /// Number of the oldest snapshot that a core worked by when it counted.
    pub snapshot: u64,
    /// Live flows by bucket of the cluster's table.
    pub live: Vec<u32>,
    /// Live flows.
    pub flows: u64,
    /// Packets sent on to other units because their flow is not here.
    pub second_hops: u64,
    /// Packets that came in.
    pub packets: u64,
    /// Live flows that were another machine's.
    pub inherited: u32,
    /// Packets of other units that waited for a table which was not here yet.
    pub waited_for_era: u64,
    /// Load of the busiest core over the last few seconds, percent: it worked, or waited for a CPU.
    pub load_percent: u8,
}

impl ClusterHandle {
    pub(crate) fn new(shared: Arc<crate::Shared>) -> Self {
        Self(shared)
    }

    /// Puts a snapshot in force; [`ClusterHandle::taken`] tells when all cores work by it. `None`: this machine leaves.
    pub fn apply(&self, snapshot: Option<Arc<Snapshot>>) {
        // Before the cores: a peer that a dispatcher brings here gets an index that leads here again.
        let place = snapshot.as_ref().filter(|snapshot| snapshot.role.owns_flows());
        let place =
            place.map(|snapshot| (snapshot.units.node, IndexCipher::of_cluster(snapshot.units.hasher.key())));
        self.0.node.join_hub(place);
        self.0.gateway.cluster.snapshot.store(snapshot);
        self.0.gateway.changed();
        self.0.wake_all();
    }

    /// Number of the oldest snapshot that a core works by; cores that were taken away do not count.
    #[must_use]
    pub fn taken(&self) -> u64 {
        let ownership = self.0.gateway.ownership.load();
        let cores = (0u8..).zip(&self.0.gateway.cluster.taken);
        let working = cores.filter(|(core, _)| ownership.is_alive(*core));
        working.map(|(_, taken)| taken.load(Relaxed)).min().unwrap_or(0)
    }

    /// Way of a flow's packets that come in by an interface which this dispatcher has. Blocks, a second at most. `None`: no
    /// answer came.
    #[must_use]
    pub fn trace(&self, key: &FlowKey, interface: InterfaceId) -> Option<Traced> {
        let cluster = &self.0.gateway.cluster;
        let core = (0..=u8::MAX).find(|core| self.0.gateway.ownership.load().is_alive(*core))?;
        for _ in 0..TRACE_TRIES {
            let id = cluster.next_trace.fetch_add(1, Relaxed);
            self.0.gateway.send(core.into(), super::Command::Trace(*key, interface, id));
            self.0.wake_all();
            let began = Instant::now();
            while began.elapsed() < TRACE_PATIENCE {
                std::thread::sleep(Duration::from_millis(5));
                let mut answers = super::lock(&cluster.traced);
                if let Some(place) = answers.iter().position(|answer| answer.trace.id == id) {
                    return Some(answers.remove(place));
                }
            }
        }
        None
    }

    /// All flows end without a word: others have them by now.
    pub fn forget_flows(&self) {
        for core in 0..self.0.gateway.reports.len() {
            self.0.gateway.send(core, super::Command::ForgetFlows);
        }
        self.0.wake_all();
    }

    /// Copies of all flows from now on, as chunks of records that the cores write which work now; a core that has not room for a chunk
    /// waits. Whoever had them before gets no more. Ends when the receiver is dropped.
    #[must_use]
    pub fn copy_flows(&self) -> (Receiver<CopyChunk>, CoreSet) {
        let (chunks, receiver) = sync_channel(CHUNKS_WAITING);
        let alive = self.alive();
        for core in alive.iter() {
            self.0.gateway.send(core.into(), super::Command::Copy(chunks.clone()));
        }
        self.0.wake_all();
        (receiver, alive)
    }

    /// Cores that work.
    #[must_use]
    pub fn alive(&self) -> CoreSet {
        self.0.gateway.ownership.load().alive
    }

    /// Takes over the flows of another machine, of which these are the records. Blocks; `meanwhile` is called every few milliseconds.
    pub fn inherit(&self, records: &[Vec<u8>], meanwhile: &mut dyn FnMut()) -> TakenOver {
        crate::handover::inherit(&self.0, records, meanwhile)
    }

    /// The last flow that was another machine's has ended.
    pub fn forget_inherited(&self) {
        if !self.0.gateway.cluster.inherited.load().is_empty() {
            self.0.gateway.cluster.inherited.store(Arc::default());
            self.0.gateway.changed();
        }
    }

    /// Counts as the cores told them last, up to 50 ms ago.
    #[must_use]
    pub fn figures(&self) -> ClusterFigures {
        let mut figures = ClusterFigures { snapshot: u64::MAX, ..ClusterFigures::default() };
        let ownership = self.0.gateway.ownership.load();
        for (core, report) in (0u8..).zip(&self.0.gateway.reports) {
            let report = super::lock(report);
            figures.second_hops += report.counters.units.sent;
            figures.waited_for_era += report.counters.units.waited_for_era;
            figures.packets += report.counters.rx_packets;
            if !ownership.is_alive(core) {
                // Its flows are lost, and what it counted last never ends.
                continue;
            }
            let counted = &report.live_by_unit_bucket;
            figures.snapshot = figures.snapshot.min(counted.snapshot);
            if figures.live.len() < counted.live.len() {
                figures.live.resize(counted.live.len(), 0);
            }
            for (sum, live) in figures.live.iter_mut().zip(&counted.live) {
                *sum = sum.saturating_add(*live);
            }
            figures.flows += report.live_flows;
            figures.inherited += counted.inherited;
        }
        self.count_bonds(&mut figures);
        figures.load_percent =
            self.0.gateway.cluster.load.percent(linux::clock::monotonic_ns(), &self.core_times());
        figures
    }

    /// Times of all workers, those that hang included.
    fn core_times(&self) -> Vec<CoreTimes> {
        let of = |(counters, thread): (&Arc<Counters>, &AtomicU32)| {
            let runnable_ns = linux::affinity::thread_view(thread.load(Relaxed))
                .map_or(0, |view| view.ran_ns.saturating_add(view.waited_ns));
            CoreTimes { busy_ns: counters.busy_ns.get(), runnable_ns }
        };
        self.0.counters.iter().zip(&self.0.threads).map(of).collect()
    }

    /// A session with a peer of the hub counts as a flow: until it ends packets for the peer have to find their way here.
    fn count_bonds(&self, figures: &mut ClusterFigures) {
        let Some(snapshot) = self.0.gateway.cluster.snapshot.load_full() else { return };
        for bond in self.0.node.hub_bonds().iter().filter(|bond| bond.in_session) {
            if let Some(live) = figures.live.get_mut(snapshot.units.bucket(&bond.flow_key())) {
                *live = live.saturating_add(1);
            }
            figures.flows += 1;
        }
    }

    /// Bonds of the hub's peers that belong to other units by the table in force move there.
    pub fn move_bonds(&self) {
        let Some(snapshot) = self.0.gateway.cluster.snapshot.load_full() else { return };
        let units = &snapshot.units;
        let table = units.table_in_force();
        self.0
            .node
            .move_hub_bonds(|key| table.owner(units.bucket(&tunnel::node::flow_key_of(key))) == units.node);
    }
}
