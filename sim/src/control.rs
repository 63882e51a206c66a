//! Control thread of a site with services: compiles and publishes policies, has buckets moved, learns neighbors, ends
//! owner chains. As the engine's control thread does it; cores follow in their next round.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use datapath::Snapshots;
use packet::attachment::{Ingress, InterfaceId};
use services::pipeline::Neighbors;
use services::policy::Policy;
use services::spec::GatewaySpec;
use steering::assign::PlanError;
use steering::cores::{CoreSet, CoreState};
use steering::ownership::Ownership;
use steering::table::BucketTable;
use steering::vote::{replan, retire_owners};
use tunnel::time::Time;

/// The control thread looks for neighbors this often.
pub(crate) const ROUND_NS: u64 = 5_000_000;
/// Owner chains are looked at this often, in rounds.
const CHAIN_ROUNDS: u64 = 20;
/// Virtual servers and leases are looked at this often, in rounds.
const SERVICE_ROUNDS: u64 = 200;
/// Cores report this often.
pub(crate) const REPORT_NS: u64 = 50_000_000;

/// Report of a core: era of its bucket table, live flows by bucket.
#[derive(Clone, Debug, Default)]
pub(crate) struct Report {
    pub at: Time,
    pub table_era: u32,
    pub live: Vec<u32>,
}

/// Control of a site: what it has published, and what it works with.
pub struct Control {
    /// Services and interfaces as wanted; change it and call [`crate::world::World::reload_services`].
    pub spec: GatewaySpec,
    /// Version of what is published: cores look at this number only.
    pub(crate) version: u64,
    policy: Arc<Policy>,
    neighbors: Arc<Neighbors>,
    ownership: Arc<ArcSwap<Ownership>>,
    serving: bool,
    drained: CoreSet,
    /// Neighbors that the kernel has found and nobody was told of yet.
    learned: BTreeMap<(InterfaceId, IpAddr), [u8; 6]>,
    rounds: u64,
}

impl Control {
    /// Control of a site without services. `secret` keeps clients from choosing their backend.
    pub(crate) fn new(ownership: Arc<ArcSwap<Ownership>>, secret: u64) -> Self {
        let (policy, _) = Policy::compile_keyed(GatewaySpec::default(), None, 0, secret)
            .expect("a specification without anything in it");
        Self {
            spec: GatewaySpec::default(),
            version: 0,
            policy: Arc::new(policy),
            neighbors: Arc::default(),
            ownership,
            serving: false,
            drained: CoreSet::default(),
            learned: BTreeMap::new(),
            rounds: 0,
        }
    }

    /// The same in a process that starts anew: the kernel still knows the neighbors.
    pub(crate) fn restarted(&self, ownership: Arc<ArcSwap<Ownership>>, secret: u64) -> Self {
        let neighbors = Arc::clone(&self.neighbors);
        Self { spec: self.spec.clone(), neighbors, ..Self::new(ownership, secret) }
    }

    /// Whether services decide about packets.
    #[must_use]
    pub fn is_serving(&self) -> bool {
        self.serving
    }

    /// Version of the policy in force.
    #[must_use]
    pub fn policy_era(&self) -> u32 {
        self.policy.era
    }

    /// Whether the operator has taken a core's buckets.
    #[must_use]
    pub fn is_drained(&self, core: u8) -> bool {
        self.drained.contains(core)
    }

    /// Tenant of what comes in here.
    pub(crate) fn tenant_of(&self, ingress: Ingress) -> u16 {
        self.policy.tenant_of(ingress)
    }

    /// Snapshots that cores take over between rounds.
    pub(crate) fn snapshots(&self) -> Snapshots {
        Snapshots {
            policy: Arc::clone(&self.policy),
            ownership: self.ownership.load_full(),
            neighbors: Arc::clone(&self.neighbors),
            cluster: None,
            inherited: Arc::default(),
            opened_ports: Arc::default(),
            lan: None,
            serving: self.serving,
        }
    }

    /// Puts [`Control::spec`] in force.
    pub(crate) fn apply(&mut self, now: Time) -> Result<(), String> {
        let (policy, _) = Policy::compile(self.spec.clone(), Some(&self.policy), now.ns())?;
        self.policy = Arc::new(policy);
        self.serving = true;
        self.version += 1;
        Ok(())
    }

    /// The kernel found a neighbor.
    pub(crate) fn learn(&mut self, interface: InterfaceId, address: IpAddr, mac: [u8; 6]) {
        if self.neighbors.known.get(&(interface, address)) != Some(&mac) {
            self.learned.insert((interface, address), mac);
        }
    }

    /// Puts a bucket table in force.
    pub(crate) fn put_table(&mut self, table: BucketTable) {
        let before = self.ownership.load_full();
        self.ownership.store(Arc::new(before.with_table(table, before.alive)));
        self.version += 1;
    }

    /// Takes a core's buckets away, or gives it some again; its flows go on on it until they end.
    pub(crate) fn set_core(&mut self, core: u8, enabled: bool, reports: &[&Report]) -> Result<(), PlanError> {
        let mut drained = self.drained;
        if enabled {
            drained.remove(core);
        } else {
            drained.insert(core);
        }
        let ownership = self.ownership.load_full();
        let mut live = vec![0u32; ownership.table.buckets()];
        for report in reports {
            for (sum, own) in live.iter_mut().zip(&report.live) {
                *sum = sum.saturating_add(*own);
            }
        }
        let state = |core| if drained.contains(core) { CoreState::Draining } else { CoreState::Active };
        let states: Vec<CoreState> = (0..ownership.cores).map(state).collect();
        let table = replan(&ownership.table, &states, &live)?;
        self.drained = drained;
        self.put_table(table);
        Ok(())
    }

    /// One round of the control thread. Whether anything was published.
    pub(crate) fn round(&mut self, now: Time, reports: &[&Report]) -> bool {
        self.rounds += 1;
        let before = self.version;
        if !self.learned.is_empty() {
            let mut known = self.neighbors.known.clone();
            known.append(&mut self.learned);
            self.neighbors =
                Arc::new(Neighbors { version: self.neighbors.version + 1, known, ..Neighbors::default() });
            self.version += 1;
        }
        if self.rounds.is_multiple_of(CHAIN_ROUNDS) {
            self.retire_chains(reports);
        }
        if self.rounds.is_multiple_of(SERVICE_ROUNDS) {
            self.policy.balancer.tick(now.ns());
            self.policy.nat.leases().tick(now.ns());
        }
        self.version != before
    }

    /// An earlier owner leaves a chain when it works by this table and has no flow in the bucket.
    fn retire_chains(&mut self, reports: &[&Report]) {
        let live = |core: u16, bucket: usize| {
            let report = reports.get(usize::from(core))?;
            Some((report.table_era, report.live.get(bucket).copied().unwrap_or(0)))
        };
        if let Some(table) = retire_owners(&self.ownership.load_full().table, live) {
            self.put_table(table);
        }
    }
}
