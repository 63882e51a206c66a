//! Who owns a flow on this node: one hash, one bucket table, one set of cores that work.
//!
//! Tunnel, interfaces, services and the kernel's steering programs use the same [`Ownership`], so that a flow has the
//! same core on every way through the node. It is immutable and replaced as a whole when buckets move or a core is
//! taken away; readers keep the one they took for a round.
//!
//! Peers are told hash key and table, so that they name the owner themselves; `docs/decisions/0008-one-ownership.md`
//! says what a peer can do with that.

use std::sync::Arc;

use packet::flow::FlowKey;

use crate::cores::CoreSet;
use crate::policy::{Pools, RemoteCores};
use crate::port_solver::ReplyPorts;
use crate::symmetric::{FlowHasher, core_bucket};
use crate::table::{BucketTable, CORE_BUCKETS, TableError, Unit};
use crate::toeplitz::KEY_BYTES;

/// Most cores of a node.
pub const CORES_MAX: u8 = 128;

/// Hash keys tried before the random source is called broken.
pub const KEYS_TRIED: usize = 64;

/// Hash bits that choose the core's bucket in the default table.
const BUCKET_BITS: u32 = CORE_BUCKETS.trailing_zeros();

/// Free bits of a port block, for which the key must be solvable: blocks of 1,024 ports.
const PORT_BLOCK_BITS: u32 = 10;

/// Why there is no first ownership.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OwnershipError {
    /// Not 1 to [`CORES_MAX`] cores.
    #[error("{0} cores: must be 1 to 128")]
    Cores(u8),
    /// The bucket table cannot be made.
    #[error("no bucket table: {0}")]
    Table(#[from] TableError),
    /// None of the keys offered can be solved for ports.
    #[error("none of the hash keys drawn can be solved for ports; the random source is broken")]
    Keys,
}

/// Cores for classes of flows, by the class's number (row T13).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClassCores {
    /// For this class only: they own no buckets.
    pub reserved: Vec<(u8, CoreSet)>,
    /// For this class while one of them works; others use them too.
    pub preferred: Vec<(u8, CoreSet)>,
}

impl ClassCores {
    /// Reserved cores of all classes.
    #[must_use]
    pub fn all_reserved(&self) -> CoreSet {
        self.reserved.iter().fold(CoreSet::EMPTY, |all, (_, cores)| all.or(cores))
    }

    /// All cores that are named.
    #[must_use]
    pub fn all(&self) -> CoreSet {
        self.preferred.iter().fold(self.all_reserved(), |all, (_, cores)| all.or(cores))
    }

    /// As far as these cores go.
    #[must_use]
    pub fn within(&self, cores: &CoreSet) -> Self {
        let within = |list: &[(u8, CoreSet)]| {
            let cut = list.iter().map(|(class, set)| (*class, set.and(cores)));
            cut.filter(|(_, set)| !set.is_empty()).collect()
        };
        Self { reserved: within(&self.reserved), preferred: within(&self.preferred) }
    }
}

/// Hash, its inverse, bucket table and working cores of one node.
#[derive(Debug)]
pub struct Ownership {
    /// The node's flow hash.
    pub hasher: Arc<FlowHasher>,
    /// Its inverse: source ports whose replies hash to a wanted bucket.
    pub solvers: Arc<ReplyPorts>,
    /// Bucket → core, with chains of earlier owners.
    pub table: BucketTable,
    /// Number of cores, working or not.
    pub cores: u8,
    /// Cores that work. One that does not is never asked.
    pub alive: CoreSet,
    /// Cores for classes, of those that take new flows.
    pub classes: ClassCores,
    pools: Pools,
}

impl Ownership {
    /// The first ownership of a node: [`CORE_BUCKETS`] buckets, equal cores, under the first of `keys` for which
    /// replies can be steered (about every key of a sound random source).
    ///
    /// # Errors
    /// [`OwnershipError`].
    pub fn new(cores: u8, keys: impl IntoIterator<Item = [u8; KEY_BYTES]>) -> Result<Self, OwnershipError> {
        if cores == 0 || cores > CORES_MAX {
            return Err(OwnershipError::Cores(cores));
        }
        let units: Vec<_> = (0..u16::from(cores)).map(|id| Unit { id, weight: 1 }).collect();
        let table = BucketTable::new(CORE_BUCKETS, &units)?;
        let keys = keys.into_iter().take(KEYS_TRIED);
        let (hasher, solvers) =
            ReplyPorts::draw(BUCKET_BITS, PORT_BLOCK_BITS, keys).ok_or(OwnershipError::Keys)?;
        let alive = CoreSet::first(u16::from(cores));
        let (hasher, solvers) = (Arc::new(hasher), Arc::new(solvers));
        Ok(Self {
            hasher,
            solvers,
            table,
            cores,
            alive,
            classes: ClassCores::default(),
            pools: Pools::default(),
        })
    }

    /// The same hash and cores for classes with another table and other working cores.
    #[must_use]
    pub fn with_table(&self, table: BucketTable, alive: CoreSet) -> Self {
        let next = Self {
            hasher: Arc::clone(&self.hasher),
            solvers: Arc::clone(&self.solvers),
            table,
            cores: self.cores,
            alive,
            classes: ClassCores::default(),
            pools: Pools::default(),
        };
        next.with_classes(&self.classes)
    }

    /// The same with other cores for classes, as far as they work.
    #[must_use]
    pub fn with_classes(mut self, classes: &ClassCores) -> Self {
        self.classes = classes.within(&self.alive);
        self.pools = Pools::new(&self.told());
        self
    }

    /// Its cores as peers are told of them, without load.
    #[must_use]
    pub fn told(&self) -> RemoteCores {
        RemoteCores {
            usable: self.usable(),
            reserved: self.classes.reserved.clone(),
            preferred: self.classes.preferred.clone(),
            load: Vec::new(),
        }
    }

    /// Whether classes have cores of their own.
    #[inline]
    #[must_use]
    pub fn has_class_cores(&self) -> bool {
        self.pools.has_rules()
    }

    /// The core that owns a flow of the tunnel with this hash and class.
    #[inline]
    #[must_use]
    pub fn owner_of_class(&self, hash: u32, class: u8) -> u8 {
        if !self.has_class_cores() {
            return self.owner_of_hash(hash);
        }
        self.pools.by_hash(&self.table, hash, class).unwrap_or_else(|| self.owner_of_hash(hash))
    }

    /// Whether a core works.
    #[inline]
    #[must_use]
    pub fn is_alive(&self, core: u8) -> bool {
        self.alive.contains(core)
    }

    /// Hash of a tuple.
    #[inline]
    #[must_use]
    pub fn hash(&self, key: &FlowKey, tenant: u16) -> u32 {
        self.hasher.hash(key, tenant)
    }

    /// Bucket of a hash.
    #[inline]
    #[must_use]
    pub fn bucket_of_hash(&self, hash: u32) -> usize {
        core_bucket(hash, self.table.buckets())
    }

    /// Bucket of a tuple.
    #[inline]
    #[must_use]
    pub fn bucket(&self, key: &FlowKey, tenant: u16) -> usize {
        self.bucket_of_hash(self.hash(key, tenant))
    }

    /// The core that owns a bucket now.
    #[inline]
    #[must_use]
    pub fn owner_of_bucket(&self, bucket: usize) -> u8 {
        // The table was made from cores below 128.
        self.table.owner(bucket) as u8
    }

    /// The core that owns a hash now.
    #[inline]
    #[must_use]
    pub fn owner_of_hash(&self, hash: u32) -> u8 {
        self.owner_of_bucket(self.bucket_of_hash(hash))
    }

    /// Cores that take new flows: those that own at least one bucket, and reserved ones.
    #[must_use]
    pub fn usable(&self) -> CoreSet {
        let owners = (0..self.cores).filter(|core| self.table.count(u16::from(*core)) > 0);
        self.classes.all_reserved().or(&owners.collect())
    }
}

/// The cores to ask about a packet, in order, each once. The last is the *creator*: the only one that may begin a flow
/// for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OwnerChain {
    cores: [u8; OwnerChain::LEN_MAX],
    len: u8,
    /// The only core that may begin a flow for the packet.
    pub creator: u8,
}

impl OwnerChain {
    /// Cores asked for one packet at most.
    pub const LEN_MAX: usize = 16;

    /// Just one core, which is the creator too.
    #[inline]
    #[must_use]
    pub const fn one(core: u8) -> Self {
        let mut cores = [0; Self::LEN_MAX];
        cores[0] = core;
        Self { cores, len: 1, creator: core }
    }

    /// The cores in order.
    #[inline]
    #[must_use]
    pub fn cores(&self) -> &[u8] {
        self.cores.get(..usize::from(self.len)).unwrap_or_default()
    }

    /// Appends a core that works; one that is listed already becomes the last instead.
    pub fn visit(&mut self, ownership: &Ownership, core: u8) {
        if let Some(at) = self.cores().iter().position(|known| *known == core) {
            if let Some(rest) = self.cores.get_mut(at..usize::from(self.len)) {
                rest.rotate_left(1);
            }
            return;
        }
        if ownership.is_alive(core)
            && let Some(place) = self.cores.get_mut(usize::from(self.len))
        {
            *place = core;
            self.len += 1;
        }
    }

    /// Appends a bucket's owner and its earlier owners, newest first, those that are not listed yet.
    pub fn visit_bucket(&mut self, ownership: &Ownership, bucket: usize) {
        let chain = ownership.table.chain(bucket).iter().map(|unit| *unit as u8);
        for core in std::iter::once(ownership.owner_of_bucket(bucket)).chain(chain) {
            // One place stays free for the creator.
            if usize::from(self.len) < Self::LEN_MAX - 1 && !self.cores().contains(&core) {
                self.visit(ownership, core);
            }
        }
    }

    /// Names the creator and makes it the last to be asked.
    pub fn end_with(&mut self, ownership: &Ownership, creator: u8) {
        self.creator = creator;
        self.visit(ownership, creator);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::assign::plan;
    use crate::table::Unit;

    fn keys() -> impl Iterator<Item = [u8; KEY_BYTES]> {
        (1u8..).map(|seed| {
            let mut state = u64::from(seed);
            std::array::from_fn(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 56) as u8
            })
        })
    }

    fn flow(port: u16) -> FlowKey {
        FlowKey {
            src: "10.0.0.5".parse().unwrap(),
            dst: "192.0.2.4".parse().unwrap(),
            src_port: port,
            dst_port: 443,
            protocol: 6,
        }
    }

    #[test]
    fn both_directions_have_one_owner_and_every_core_some() {
        let ownership = Ownership::new(4, keys()).unwrap();
        let mut seen = CoreSet::EMPTY;
        for port in 1..500 {
            let (there, back) = (flow(port), flow(port).reversed());
            let owner = ownership.owner_of_hash(ownership.hash(&there, 0));
            assert_eq!(owner, ownership.owner_of_hash(ownership.hash(&back, 0)));
            seen.insert(owner);
        }
        assert_eq!(seen, CoreSet::first(4));
        assert_eq!(ownership.usable(), CoreSet::first(4));
    }

    #[test]
    fn a_core_without_buckets_is_not_usable_but_alive() {
        let ownership = Ownership::new(2, keys()).unwrap();
        let table = BucketTable::from_owners(1, vec![1; CORE_BUCKETS]).unwrap();
        let drained = ownership.with_table(table, ownership.alive);
        assert_eq!(drained.usable().iter().collect::<Vec<_>>(), [1]);
        assert!(drained.is_alive(0));
    }

    #[test]
    fn a_reserved_core_is_its_classs_alone_and_nobodys_when_it_is_taken_away() {
        let ownership = Ownership::new(3, keys()).unwrap();
        let table = BucketTable::from_owners(1, (0..CORE_BUCKETS).map(|at| at as u16 % 2).collect()).unwrap();
        let one = |core: u8| [core].into_iter().collect::<CoreSet>();
        let classes = ClassCores { reserved: vec![(2, one(2))], preferred: vec![(1, one(0))] };
        let reserved = ownership.with_table(table, ownership.alive).with_classes(&classes);
        assert_eq!(reserved.usable(), CoreSet::first(3));
        for port in 1..500 {
            let hash = reserved.hash(&flow(port), 0);
            assert_eq!(reserved.owner_of_class(hash, 2), 2);
            assert_eq!(reserved.owner_of_class(hash, 1), 0);
            assert_eq!(reserved.owner_of_class(hash, 0), reserved.owner_of_hash(hash));
            assert!(reserved.owner_of_hash(hash) < 2);
        }
        // Without it the class shares the others.
        let without = reserved.with_table(reserved.table.clone(), CoreSet::first(2));
        assert_eq!(without.usable(), CoreSet::first(2));
        let hash = without.hash(&flow(7), 0);
        assert_eq!(without.owner_of_class(hash, 2), without.owner_of_hash(hash));
    }

    #[test]
    fn impossible_numbers_of_cores_and_keys_without_rank_are_refused() {
        assert_eq!(Ownership::new(0, keys()).unwrap_err(), OwnershipError::Cores(0));
        assert_eq!(Ownership::new(129, keys()).unwrap_err(), OwnershipError::Cores(129));
        assert_eq!(Ownership::new(2, [[0; KEY_BYTES]; 3]).unwrap_err(), OwnershipError::Keys);
    }

    #[test]
    fn a_tuple_is_in_the_bucket_of_its_hash() {
        let ownership = Ownership::new(4, keys()).unwrap();
        for port in 1..100 {
            let bucket = ownership.bucket_of_hash(ownership.hash(&flow(port), 3));
            assert_eq!(ownership.bucket(&flow(port), 3), bucket);
        }
    }

    /// Earlier owners in their order; who is listed keeps the place, and the last place is the creator's.
    #[test]
    fn a_bucket_adds_those_who_are_not_listed() {
        let ownership = Ownership::new(6, keys()).unwrap();
        let mut table = BucketTable::from_owners(1, vec![0; CORE_BUCKETS]).unwrap();
        for owner in 1..4 {
            let units: Vec<Unit> = (0..6).map(|id| Unit { id, weight: u32::from(id == owner) }).collect();
            table = plan(&table, &units, &[]).unwrap();
        }
        assert_eq!(table.chain(7), [2, 1, 0]);
        let ownership = ownership.with_table(table, ownership.alive);
        let mut chain = OwnerChain::default();
        chain.visit(&ownership, 1);
        chain.visit_bucket(&ownership, 7);
        assert_eq!(chain.cores(), [1, 3, 2, 0]);
    }

    #[test]
    fn the_creator_is_asked_last_and_dead_cores_never() {
        let ownership = Ownership::new(4, keys()).unwrap();
        let bucket = 0;
        let owner = ownership.owner_of_bucket(bucket);
        let mut chain = OwnerChain::default();
        chain.visit_bucket(&ownership, bucket);
        chain.visit(&ownership, 3);
        chain.end_with(&ownership, owner);
        assert_eq!((chain.cores(), chain.creator), (&[3, owner][..], owner));
        let mut alive = ownership.alive;
        alive.remove(3);
        let without = ownership.with_table(ownership.table.clone(), alive);
        let mut chain = OwnerChain::default();
        chain.visit(&without, 3);
        chain.end_with(&without, owner);
        assert_eq!(chain.cores(), [owner]);
    }
}
