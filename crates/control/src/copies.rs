//! Copies of flows go from this data plane to another one, and come from others: two kinds of threads beside the cluster's.
//!
//! Both ends talk TCP at their bus addresses, inside the bond between them, so that the peer's address says who it is. Who gets whose
//! copies the manager says ([`Copies::follow`]). The layout stands in `docs/wire-flow-records.md`. What is kept has a limit; a flow that does
//! not fit, and all that a connection lost, ends with the machine that has it, as without copies.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use engine::gateway::ClusterHandle;
use packet::FlowKey;
use services::handover::Entry;
use services::handover::wire::{Change, WireError};

use crate::sync::lock;

mod receive;
mod send;
#[cfg(test)]
mod tests;

/// TCP port of a data plane's bus address at which it takes copies.
pub(crate) const COPIES_PORT: u16 = 4_603;
/// Begins each connection; the last byte is the version. The sender's node id follows, two bytes.
const MAGIC: [u8; 8] = *b"anacopy\x01";
/// Flows and mappings that are kept at most, of all others together: some 300 MB.
const RECORDS_MAX: usize = 1 << 20;
/// No unit.
const NOBODY: u32 = u32::MAX;

/// A machine to which copies go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Backup {
    /// Node id.
    pub node: u16,
    /// Bus address.
    pub address: IpAddr,
}

/// Assignment of copies, as far as it is about this machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Assigned {
    /// Who gets copies of this machine's flows.
    pub backup: Option<Backup>,
    /// Whose copies come here, by bus address.
    pub sources: BTreeMap<IpAddr, u16>,
}

/// Records of one unit's flows.
#[derive(Default)]
struct Kept {
    /// Number of the connection that they come by.
    stream: u64,
    flows: HashMap<(FlowKey, String), Vec<u8>>,
}

/// State that all threads share.
struct Shared {
    stop: AtomicBool,
    own: u16,
    bus: IpAddr,
    assigned: Mutex<Assigned>,
    /// Node id of who has copies of all flows, or [`NOBODY`].
    copied_to: AtomicU32,
    kept: Mutex<BTreeMap<u16, Kept>>,
    streams: Mutex<u64>,
}

/// The running threads; they end when this is dropped.
pub(crate) struct Copies {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Copies {
    /// Starts them; nothing is sent or taken before the first [`Copies::follow`].
    pub fn start(own: u16, bus: IpAddr, engine: &ClusterHandle) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            own,
            bus,
            assigned: Mutex::default(),
            copied_to: AtomicU32::new(NOBODY),
            kept: Mutex::default(),
            streams: Mutex::default(),
        });
        let mut copies = Self { shared: Arc::clone(&shared), threads: Vec::new() };
        let (sending, engine) = (Arc::clone(&shared), engine.clone());
        let thread = std::thread::Builder::new().name("copies-out".to_owned());
        copies.threads.push(thread.spawn(move || send::run(&sending, &engine))?);
        let thread = std::thread::Builder::new().name("copies-in".to_owned());
        copies.threads.push(thread.spawn(move || receive::run(&shared))?);
        Ok(copies)
    }

    /// Goes by another assignment. Copies of units that send theirs elsewhere now are forgotten.
    pub fn follow(&self, assigned: Assigned) {
        let sources: Vec<u16> = assigned.sources.values().copied().collect();
        *lock(&self.shared.assigned) = assigned;
        lock(&self.shared.kept).retain(|node, _| sources.contains(node));
    }

    /// The unit that has copies of all flows here, but for the youngest.
    #[must_use]
    pub fn copied_to(&self) -> Option<u16> {
        let backup = lock(&self.shared.assigned).backup?;
        let copied_to = self.shared.copied_to.load(Relaxed);
        (copied_to == u32::from(backup.node)).then_some(backup.node)
    }

    /// Flows that are kept for other units.
    #[must_use]
    pub fn kept(&self) -> usize {
        self.shared.kept()
    }

    /// Takes the records of a unit's flows out; none if there are no copies.
    #[must_use]
    pub fn take(&self, unit: u16) -> Vec<Vec<u8>> {
        let Some(kept) = lock(&self.shared.kept).remove(&unit) else { return Vec::new() };
        #[expect(clippy::disallowed_methods, reason = "they are sorted")]
        let mut records: Vec<Vec<u8>> = kept.flows.into_values().collect();
        records.sort_unstable();
        records
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        self.shared.stop.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread for copies of flows panicked");
            }
        }
    }
}

impl Shared {
    fn is_stopped(&self) -> bool {
        self.stop.load(Relaxed)
    }

    fn backup(&self) -> Option<Backup> {
        lock(&self.assigned).backup
    }

    /// The unit whose copies may come from an address.
    fn source(&self, address: IpAddr) -> Option<u16> {
        lock(&self.assigned).sources.get(&address).copied()
    }

    fn kept(&self) -> usize {
        lock(&self.kept).values().map(|kept| kept.flows.len()).sum()
    }

    /// A connection of a unit begins: what came by the one before is forgotten, for it may have ended since. Its number.
    fn begin(&self, unit: u16) -> u64 {
        let mut streams = lock(&self.streams);
        *streams += 1;
        lock(&self.kept).insert(unit, Kept { stream: *streams, flows: HashMap::new() });
        *streams
    }

    /// Keeps a word about a flow. `false`: the connection is not the unit's newest.
    fn keep(&self, unit: u16, stream: u64, record: &[u8]) -> Result<bool, WireError> {
        let change = Change::decode(record)?;
        let mut all = lock(&self.kept);
        let room = all.values().map(|kept| kept.flows.len()).sum::<usize>() < RECORDS_MAX;
        let Some(kept) = all.get_mut(&unit).filter(|kept| kept.stream == stream) else { return Ok(false) };
        match change {
            Change::Ended(side) => drop(kept.flows.remove(&(side.key, side.tenant))),
            Change::Now(Entry::Flow(flow)) => {
                let key = (flow.original.key, flow.original.tenant);
                if room || kept.flows.contains_key(&key) {
                    kept.flows.insert(key, record.to_owned());
                }
            }
            // Its flows make it again.
            Change::Now(Entry::Mapping(_)) => {}
        }
        Ok(true)
    }
}

/// Where a machine takes copies.
fn copies_address(bus: IpAddr) -> SocketAddr {
    SocketAddr::new(bus, COPIES_PORT)
}
