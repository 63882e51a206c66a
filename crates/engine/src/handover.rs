//! Flows that one process hands to the next ([`services::handover`]).
//!
//! At the end ([`Engine::export`]) all workers stop first, so that no packet changes a flow that is already written, and none
//! begins one that is not; the guards stay, so that the kernel's stack sees nothing. At the start the flows wait
//! ([`Engine::expect`]) for the first policy and are taken over before an interface is opened: no packet finds half of them.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use services::Services;
use services::handover::{Entry, Refusal, Refusals, Strays, owner};
use steering::ownership::Ownership;
use steering::table::{BucketTable, CORE_BUCKETS};
use steering::toeplitz::KEY_BYTES;

use crate::gateway::{Command, hold, lock};
use crate::{Engine, Shared};

/// Entries that a worker writes in one step.
const STEP_ENTRIES: usize = 1_024;
/// Chunks of records that wait between workers and who writes them.
const CHUNKS_WAITING: usize = 16;
/// Entries that cores take over in one step.
const IMPORT_ENTRIES: usize = 8_192;
/// The same for flows of another machine: the manager waits for word meanwhile.
const INHERIT_ENTRIES: usize = 1_024;
/// Pause between two words to the manager.
const WAIT: Duration = Duration::from_millis(20);
/// A core that does not answer within this time takes nothing over.
const CORE_PATIENCE: Duration = Duration::from_secs(2);
/// Cores that have just taken flows over report them within this time; until then no bucket loses its history.
const REPORTS_NS: u64 = 1_000_000_000;
/// No time is known yet.
const NOT_YET: u64 = u64::MAX;

/// Which core has which flow: the node's hash key and bucket table. The key is secret.
#[derive(Clone)]
pub struct Placement {
    /// Cores there were.
    pub cores: u8,
    /// Key of the flow hash.
    pub key: [u8; KEY_BYTES],
    /// Buckets with their earlier owners.
    pub table: BucketTable,
}

impl fmt::Debug for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Placement").field("cores", &self.cores).finish_non_exhaustive()
    }
}

impl Placement {
    /// That of a node.
    fn of(ownership: &Ownership) -> Self {
        Self { cores: ownership.cores, key: *ownership.hasher.key(), table: ownership.table.clone() }
    }

    /// The table, if it is one of so many cores.
    fn table_for(&self, cores: usize) -> Option<BucketTable> {
        let known = |unit: &u16| usize::from(*unit) < cores;
        let fits = usize::from(self.cores) == cores
            && self.table.buckets() == CORE_BUCKETS
            && self.table.owners().iter().all(known)
            && (0..CORE_BUCKETS).all(|bucket| self.table.chain(bucket).iter().all(known));
        fits.then(|| self.table.clone())
    }
}

/// Flows of an earlier process.
pub struct Arrivals {
    /// Where they were.
    pub placement: Placement,
    /// How long ago they were written, ms.
    pub away_ms: u32,
    /// Flows are taken over until then.
    pub deadline: Instant,
    /// Their records, each whole ([`Entry::decode`]).
    pub records: Box<dyn Iterator<Item = Vec<u8>> + Send>,
}

/// Result of a hand-over.
#[derive(Clone, Debug, Default)]
pub struct TakenOver {
    /// Flows that go on.
    pub flows: u64,
    /// Flows and mappings that do not, by reason.
    pub refusals: Refusals,
}

/// State of a hand-over that workers and the control thread see.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// Until when no earlier owner of a bucket may be forgotten: its flows are not counted yet.
    chains_kept_until_ns: AtomicU64,
}

impl Progress {
    /// Flows are to come.
    pub fn wait(&self) {
        self.chains_kept_until_ns.store(NOT_YET, Relaxed);
    }

    /// Whether live flows are counted, so that earlier owners of buckets without any may be forgotten.
    pub fn are_flows_counted(&self, now_ns: u64) -> bool {
        now_ns >= self.chains_kept_until_ns.load(Relaxed)
    }
}

/// Flows of an earlier process that wait for a policy, and what became of them.
#[derive(Default)]
pub(crate) struct Handover {
    arrivals: Option<Arrivals>,
    result: Option<TakenOver>,
}

/// Entries for one core.
pub(crate) struct ImportBatch {
    entries: Vec<Entry>,
    /// How long ago they were written; `None`: by another machine.
    away_ms: Option<u32>,
    answer: SyncSender<(TakenOver, Strays)>,
}

impl ImportBatch {
    /// Takes them over.
    pub fn import(&self, services: &mut Services, now_ns: u64) {
        let (mut taken, mut strays) = (TakenOver::default(), Vec::new());
        for entry in &self.entries {
            let done = match (entry, self.away_ms) {
                (Entry::Flow(flow), None) => services.inherit(now_ns, flow),
                (_, away_ms) => services.import(now_ns, away_ms.unwrap_or(0), entry).map(|()| Vec::new()),
            };
            match done {
                Ok(elsewhere) => {
                    taken.flows += u64::from(matches!(entry, Entry::Flow(_)));
                    strays.extend(elsewhere.into_iter().map(|(key, tenant)| (key, tenant, services.id())));
                }
                Err(reason) => taken.refusals.add(reason),
            }
        }
        // Who asked may have given up.
        let _ = self.answer.try_send((taken, strays));
    }
}

/// Writes all that a core knows, until nobody reads any more.
pub(crate) fn export(services: &mut Services, now_ns: u64, chunks: &SyncSender<Vec<u8>>) {
    let mut cursor = Some(0);
    while let Some(at) = cursor {
        let mut chunk = Vec::new();
        cursor = services.export(now_ns, at, STEP_ENTRIES, &mut |entry| {
            // An entry whose names are too long for a record does not exist: the configuration refuses them.
            let _ = entry.encode(&mut chunk);
        });
        if !chunk.is_empty() && chunks.send(chunk).is_err() {
            return;
        }
    }
}

/// The first ownership of a node: that of the process before, as far as it fits.
pub(crate) fn first_ownership(
    cores: u8,
    earlier: Option<&Placement>,
    keys: impl Iterator<Item = [u8; KEY_BYTES]>,
) -> Result<Ownership, steering::ownership::OwnershipError> {
    let earlier_key = earlier.map(|placement| placement.key);
    let ownership = Ownership::new(cores, earlier_key.into_iter().chain(keys))?;
    // The key may have been refused: then the table means nothing.
    let table = earlier
        .filter(|placement| placement.key == *ownership.hasher.key())
        .and_then(|placement| placement.table_for(cores.into()));
    Ok(match table {
        Some(table) => ownership.with_table(table, ownership.alive),
        None => ownership,
    })
}

impl Engine {
    /// Where flows are now.
    #[must_use]
    pub fn placement(&self) -> Placement {
        Placement::of(&self.shared.gateway.ownership.load())
    }

    /// Announces the flows of the process before. They are taken over with the first policy, before interfaces are opened.
    pub fn expect(&self, arrivals: Arrivals) {
        self.shared.gateway.progress.wait();
        lock(&self.handover).arrivals = Some(arrivals);
    }

    /// Result of the hand-over, once there was one.
    #[must_use]
    pub fn taken_over(&self) -> Option<TakenOver> {
        lock(&self.handover).result.clone()
    }

    /// Stops the workers and gives their flows' records to `take`, many at once, until it says `false` or the time is over.
    /// Whether all were given. The kernel's stack sees no packets until the engine is dropped.
    pub fn export(&mut self, patience: Duration, take: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        let (chunks, waiting) = sync_channel(CHUNKS_WAITING);
        let gateway = &self.shared.gateway;
        for core in 0..gateway.reports.len() {
            if gateway.ownership.load().is_alive(core as u8) {
                gateway.send(core, Command::Export(chunks.clone()));
            }
        }
        drop(chunks);
        self.shared.stop.store(true, Relaxed);
        self.shared.wake_all();
        let whole = receive(&waiting, patience, take);
        // Whoever still writes is told that nobody reads.
        drop(waiting);
        self.join();
        whole
    }

    /// Keeps the kernel's stack from what the engine's flows use, for so many seconds at most and without any process: until the
    /// next one guards the interfaces again.
    ///
    /// # Errors
    /// `nft` is not there, or the kernel knows no tables of its.
    pub fn hold(&self, seconds: u16) -> Result<(), linux::Error> {
        hold::hold(&self.shared.gateway, self.settings.listen_port, seconds)
    }

    /// Takes over what waits, under the policy in force.
    pub(crate) fn take_over(&self) {
        let Some(arrivals) = lock(&self.handover).arrivals.take() else { return };
        let result = import(&self.shared, arrivals);
        lock(&self.handover).result = Some(result);
        let gateway = &self.shared.gateway;
        let counted_ns = linux::clock::monotonic_ns() + REPORTS_NS;
        gateway.progress.chains_kept_until_ns.store(counted_ns, Relaxed);
        // Cores that were drained or hung are not any more: they get a share of what begins from now on.
        let ownership = gateway.ownership.load_full();
        if ownership.usable() != ownership.alive {
            gateway.replan(&self.shared);
        }
    }
}

/// Gives chunks on until the last worker has ended. Whether all were given.
fn receive(waiting: &Receiver<Vec<u8>>, patience: Duration, take: &mut dyn FnMut(&[u8]) -> bool) -> bool {
    let deadline = Instant::now() + patience;
    loop {
        match waiting.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(chunk) if take(&chunk) => {}
            Ok(_) | Err(RecvTimeoutError::Timeout) => return false,
            Err(RecvTimeoutError::Disconnected) => return true,
        }
    }
}

fn import(shared: &Arc<Shared>, arrivals: Arrivals) -> TakenOver {
    let mut step =
        Step { shared, away_ms: Some(arrivals.away_ms), all: TakenOver::default(), strays: Vec::new() };
    let mut records = arrivals.records;
    loop {
        let some: Vec<Vec<u8>> = records.by_ref().take(IMPORT_ENTRIES).collect();
        if some.is_empty() {
            return step.all;
        }
        if Instant::now() >= arrivals.deadline {
            let left = some.len() + records.count();
            step.all.refusals.add_many(Refusal::Expired, left as u64);
            return step.all;
        }
        step.import(&some, &mut || {});
    }
}

/// Takes over flows of another machine; `meanwhile` is called every few milliseconds. Packets that come in at other cores than that of
/// their flow find it afterwards.
pub(crate) fn inherit(shared: &Arc<Shared>, records: &[Vec<u8>], meanwhile: &mut dyn FnMut()) -> TakenOver {
    let mut step = Step { shared, away_ms: None, all: TakenOver::default(), strays: Vec::new() };
    for some in records.chunks(INHERIT_ENTRIES) {
        step.import(some, meanwhile);
    }
    let Step { all, strays, .. } = step;
    if !strays.is_empty() {
        let known = shared.gateway.cluster.inherited.load_full();
        shared.gateway.cluster.inherited.store(Arc::new(known.with(strays)));
        shared.gateway.changed();
        shared.wake_all();
    }
    all
}

/// Records that are taken over, some at a time.
struct Step<'a> {
    shared: &'a Arc<Shared>,
    /// As of [`ImportBatch`].
    away_ms: Option<u32>,
    all: TakenOver,
    strays: Strays,
}

impl Step<'_> {
    fn import(&mut self, records: &[Vec<u8>], meanwhile: &mut dyn FnMut()) {
        let gateway = &self.shared.gateway;
        let (policy, ownership) = (gateway.policy.load_full(), gateway.ownership.load_full());
        let mut by_core: BTreeMap<u8, Vec<Entry>> = BTreeMap::new();
        for record in records {
            let entry = Entry::decode(record).map_err(|_| Refusal::Malformed);
            let placed = entry.and_then(|mut entry| {
                if self.away_ms.is_none() {
                    // Another machine's core.
                    entry.forget_core();
                }
                Ok((owner(&policy, &ownership, &entry)?, entry))
            });
            match placed {
                Ok((core, entry)) => by_core.entry(core).or_default().push(entry),
                Err(reason) => self.all.refusals.add(reason),
            }
        }
        let answers: Vec<_> = by_core
            .into_iter()
            .map(|(core, entries)| {
                let (answer, answered) = sync_channel(1);
                let count = entries.len() as u64;
                let batch = ImportBatch { entries, away_ms: self.away_ms, answer };
                gateway.send(core.into(), Command::Import(Box::new(batch)));
                (count, answered)
            })
            .collect();
        self.shared.wake_all();
        for (count, answered) in answers {
            self.wait(count, &answered, meanwhile);
        }
    }

    /// The answer of one core, about so many entries.
    fn wait(&mut self, count: u64, answered: &Receiver<(TakenOver, Strays)>, meanwhile: &mut dyn FnMut()) {
        let deadline = Instant::now() + CORE_PATIENCE;
        loop {
            match answered.recv_timeout(WAIT) {
                Ok((taken, strays)) => {
                    self.all.flows += taken.flows;
                    self.all.refusals.merge(&taken.refusals);
                    self.strays.extend(strays);
                    return;
                }
                Err(RecvTimeoutError::Timeout) if Instant::now() < deadline => meanwhile(),
                Err(_) => return self.all.refusals.add_many(Refusal::Core, count),
            }
        }
    }
}

/// State of an engine's hand-over, before there is one.
pub(crate) fn nothing() -> Mutex<Handover> {
    Mutex::default()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::gateway::keys;

    #[test]
    fn a_node_begins_with_the_key_and_table_of_the_one_before() {
        let before = Ownership::new(3, keys()).unwrap();
        let mut owners = before.table.owners().to_vec();
        owners[0] = 2;
        let before = before.with_table(BucketTable::from_owners(7, owners).unwrap(), before.alive);
        let placement = Placement::of(&before);
        let same = first_ownership(3, Some(&placement), keys()).unwrap();
        assert_eq!((same.hasher.key(), &same.table), (before.hasher.key(), &before.table));
        // Other cores: the key alone.
        let fewer = first_ownership(2, Some(&placement), keys()).unwrap();
        assert_eq!(fewer.hasher.key(), before.hasher.key());
        assert!(fewer.table.owners().iter().all(|owner| *owner < 2));
        // A key that cannot be solved, owners that are no cores.
        let bad = Placement { key: [0; KEY_BYTES], ..placement.clone() };
        let other = first_ownership(3, Some(&bad), keys()).unwrap();
        assert!(other.hasher.key() != &bad.key && other.table != before.table);
        let strange = BucketTable::from_owners(7, vec![9; CORE_BUCKETS]).unwrap();
        let bad = Placement { table: strange, ..placement };
        assert_eq!(first_ownership(3, Some(&bad), keys()).unwrap().table.owner(0), 0);
        assert!(!format!("{bad:?}").contains(&format!("{:?}", bad.key[0])) || bad.key[0] == 3);
    }

    #[test]
    fn who_does_not_take_any_more_ends_it() {
        let (chunks, waiting) = sync_channel(4);
        chunks.send(vec![1]).unwrap();
        chunks.send(vec![2]).unwrap();
        assert!(!receive(&waiting, Duration::from_secs(5), &mut |chunk| chunk == [1]));
        assert!(!receive(&waiting, Duration::ZERO, &mut |_| true), "a worker hangs");
        drop(chunks);
        assert!(receive(&waiting, Duration::from_secs(5), &mut |_| true));
    }
}
