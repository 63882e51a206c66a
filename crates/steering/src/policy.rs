//! A sender's choice among the receiver's cores (row T4).
//!
//! The receiver tells which of its cores may be used, which are reserved or preferred for which class of
//! datagrams, how loaded each is, and its bucket table (processor information, row T3). The sender assigns
//! each flow to one core and stays with it:
//!
//! * [`Policy::Hash`] (default): the owner in the receiver's table. Needs no memory, and the receiver finds
//!   the flow's state on the core that its own table names.
//! * [`Policy::RoundRobin`], [`Policy::Random`], [`Policy::LeastLoaded`]: chosen at the flow's first packet and
//!   kept in a register of bounded size.
//!
//! Which cores a class may use:
//!
//! * Cores reserved for a class carry that class only; the class uses just these, as far as they are usable.
//! * Cores preferred for a class are used by it while one of them is usable; others may use them too.
//! * If that leaves a class without cores (all are reserved for others), it gets any usable core: traffic
//!   late is better than traffic lost. Without any usable core there is no choice and the header says "not told".
//!
//! One chooser belongs to one sending core; nothing in it is shared.

use std::num::NonZeroU8;

use crate::cores::CoreSet;
use crate::registry::{Found, Registry};
use crate::table::BucketTable;

#[cfg(test)]
mod tests;

/// Most classes with rules of their own.
pub const CLASSES_MAX: usize = 16;
/// Stands in the register for every class without rules: a flow that goes from one to another of them keeps its core.
const NO_RULES: u8 = u8::MAX;

/// How a flow's core is chosen. The numbers are the wire's.
#[derive(Clone, Copy, PartialEq, Eq, Default, Hash, Debug)]
#[repr(u8)]
pub enum Policy {
    /// The owner in the receiver's bucket table.
    #[default]
    Hash = 0,
    /// Uniform: each new flow gets the next core.
    RoundRobin = 1,
    /// A random core.
    Random = 2,
    /// The core with the least load, as told by the receiver, and the fewest of our flows.
    LeastLoaded = 3,
}

impl Policy {
    /// All policies.
    pub const ALL: [Self; 4] = [Self::Hash, Self::RoundRobin, Self::Random, Self::LeastLoaded];

    /// The wire's number.
    #[must_use]
    pub fn to_u8(self) -> u8 {
        self as u8
    }

    /// From the wire's number.
    #[must_use]
    pub fn from_u8(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.to_u8() == number)
    }

    /// The name in configuration and reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Hash => "hash",
            Self::RoundRobin => "round-robin",
            Self::Random => "random",
            Self::LeastLoaded => "least-loaded",
        }
    }
}

/// The name is none of [`Policy::ALL`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("must be \"hash\", \"round-robin\", \"random\" or \"least-loaded\"")]
pub struct UnknownPolicy;

impl std::str::FromStr for Policy {
    type Err = UnknownPolicy;

    fn from_str(name: &str) -> Result<Self, UnknownPolicy> {
        Self::ALL.into_iter().find(|policy| policy.name() == name).ok_or(UnknownPolicy)
    }
}

impl std::fmt::Display for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Processor information of the receiver, as far as the choice needs it.
#[derive(Clone, Default, Debug)]
pub struct RemoteCores {
    /// Cores that datagrams may name.
    pub usable: CoreSet,
    /// Cores that carry only this class. Entries after [`CLASSES_MAX`] classes are ignored.
    pub reserved: Vec<(u8, CoreSet)>,
    /// Cores that this class uses while one is usable.
    pub preferred: Vec<(u8, CoreSet)>,
    /// Load by core, 0 (idle) to 255 (full); cores after the end count as idle.
    pub load: Vec<u8>,
}

/// Cores of every class, by the rules at the top of the module: ready for the choice.
#[derive(Clone, Debug, Default)]
pub struct Pools {
    /// Classes with rules of their own.
    own: Vec<Pool>,
    /// All other classes.
    common: Pool,
}

impl Pools {
    /// Those of these cores.
    #[must_use]
    pub fn new(cores: &RemoteCores) -> Self {
        let mut classes: Vec<u8> = Vec::new();
        for &(class, _) in cores.reserved.iter().chain(&cores.preferred) {
            if !classes.contains(&class) && classes.len() < CLASSES_MAX {
                classes.push(class);
            }
        }
        let own = classes.iter().map(|&class| Pool::new(class, cores_for(Some(class), cores))).collect();
        Self { own, common: Pool::new(NO_RULES, cores_for(None, cores)) }
    }

    /// Whether some class has cores of its own.
    #[must_use]
    pub fn has_rules(&self) -> bool {
        !self.own.is_empty()
    }

    /// Cores of a class.
    #[must_use]
    pub fn of_class(&self, class: u8) -> &CoreSet {
        &self.of(class).set
    }

    /// The core for a flow with this hash: the table's owner if the class may use it, else another one that depends on the flow
    /// only. `None`: no core may be used.
    #[inline]
    #[must_use]
    pub fn by_hash(&self, table: &BucketTable, hash: u32, class: u8) -> Option<u8> {
        let pool = self.of(class);
        match u8::try_from(table.owner_of_hash(hash)) {
            Ok(core) if pool.set.contains(core) => Some(core),
            _ => pool.at(hash.wrapping_mul(crate::symmetric::MIX_MULTIPLIER)),
        }
    }

    #[inline]
    fn of(&self, class: u8) -> &Pool {
        self.own.iter().find(|pool| pool.class == class).unwrap_or(&self.common)
    }

    fn of_mut(&mut self, class: u8) -> &mut Pool {
        self.own.iter_mut().find(|pool| pool.class == class).unwrap_or(&mut self.common)
    }
}

/// The cores of a class, ready for the choice.
#[derive(Clone, Debug, Default)]
struct Pool {
    class: u8,
    set: CoreSet,
    list: Vec<u8>,
    /// The next place of [`Policy::RoundRobin`].
    turn: usize,
}

impl Pool {
    fn new(class: u8, set: CoreSet) -> Self {
        Self { class, set, list: set.iter().collect(), turn: 0 }
    }

    /// The core at a place that a 32-bit number chooses evenly.
    fn at(&self, number: u32) -> Option<u8> {
        let place = (u64::from(number) * self.list.len() as u64) >> 32;
        self.list.get(place as usize).copied()
    }

    fn next_turn(&mut self) -> Option<u8> {
        if self.turn >= self.list.len() {
            self.turn = 0;
        }
        let core = self.list.get(self.turn).copied();
        self.turn += 1;
        core
    }
}

/// One sending core's choice of the receiving core, flow by flow.
#[derive(Clone, Debug)]
pub struct CoreChooser {
    policy: Policy,
    pools: Pools,
    load: Box<[u8; 256]>,
    registry: Registry,
}

impl CoreChooser {
    /// A chooser with a register of at least `flows` flows, each forgotten after `idle_s` seconds of silence.
    #[must_use]
    pub fn new(policy: Policy, cores: &RemoteCores, flows: usize, idle_s: u32) -> Self {
        let mut chooser = Self {
            policy,
            pools: Pools::default(),
            load: Box::new([0; 256]),
            registry: Registry::new(flows, idle_s),
        };
        chooser.update(cores);
        chooser
    }

    /// Takes new processor information. Flows whose core may still be used stay where they are.
    pub fn update(&mut self, cores: &RemoteCores) {
        self.pools = Pools::new(cores);
        self.load.fill(0);
        for (slot, &load) in self.load.iter_mut().zip(&cores.load) {
            *slot = load;
        }
    }

    /// The policy in force.
    #[must_use]
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// Changes the policy; registered flows stay where they are until they fall silent.
    pub fn set_policy(&mut self, policy: Policy) {
        self.policy = policy;
    }

    /// The receiving core for a packet of the flow with this hash (under the receiver's key) and class.
    ///
    /// `table` is the receiver's. `random` is any random word (used by [`Policy::Random`] for new flows only);
    /// `now_s` is a clock in seconds that may wrap. `None`: the receiver has no usable core.
    pub fn choose(
        &mut self,
        table: &BucketTable,
        hash: u32,
        class: u8,
        random: u32,
        now_s: u32,
    ) -> Option<u8> {
        // With the hash policy the register holds only what the receiver has assigned or an earlier policy left.
        if self.policy == Policy::Hash && self.registry.is_empty() {
            return self.pools.by_hash(table, hash, class);
        }
        self.registry.sweep(now_s, 1);
        let class = self.pools.of(class).class;
        let found = self.registry.find(hash, class, now_s);
        if let Found::Core(core) = found
            && self.pools.of(class).set.contains(core)
        {
            return Some(core);
        }
        let crowded = matches!(found, Found::Crowded { .. });
        let core = match self.policy {
            Policy::Hash => return self.pools.by_hash(table, hash, class),
            _ if crowded => self.pools.by_hash(table, hash, class),
            Policy::RoundRobin => self.pools.of_mut(class).next_turn(),
            Policy::Random => self.pools.of(class).at(random),
            Policy::LeastLoaded => self.least_loaded(class),
        }?;
        self.registry.put(hash, class, core, now_s);
        Some(core)
    }

    /// A connection of TCP with this mark begins on the ports of a flow: another one than the last is a flow of its own (row T2),
    /// whose core is chosen with [`Self::choose`]. Nothing with [`Policy::Hash`].
    pub fn begin_connection(&mut self, hash: u32, class: u8, mark: NonZeroU8, now_s: u32) {
        if self.policy != Policy::Hash {
            self.registry.begin_connection(hash, self.pools.of(class).class, mark, now_s);
        }
    }

    /// The receiver assigns a flow to one of its cores. False if it has no such usable core for the class, or
    /// the register has no room.
    pub fn assign(&mut self, hash: u32, class: u8, core: u8, now_s: u32) -> bool {
        let pool = self.pools.of(class);
        pool.set.contains(core) && self.registry.put(hash, pool.class, core, now_s)
    }

    /// Flows in the register; those that have fallen silent count until they are swept.
    #[must_use]
    pub fn flows(&self) -> usize {
        self.registry.len()
    }

    /// The register's room, in flows.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.registry.capacity()
    }

    /// Frees some slots of silent flows: call it now and then, also when no packet comes.
    pub fn sweep(&mut self, now_s: u32) {
        self.registry.sweep(now_s, 64);
    }

    fn least_loaded(&self, class: u8) -> Option<u8> {
        // The told load is of some time ago; our own flows since then weigh by their share, so that a crowd of
        // new flows does not all run to the core that was idle in the last report.
        let total = self.registry.len() as u64 + 1;
        let score = |core: u8| {
            let share = u64::from(self.registry.flows_on(core)) * 255 * 256 / total;
            u64::from(self.load[usize::from(core)]) * 256 + share
        };
        self.pools.of(class).list.iter().copied().min_by_key(|&core| (score(core), core))
    }
}

/// The cores of a class by the rules at the top of the module; `None` = a class without rules.
fn cores_for(class: Option<u8>, cores: &RemoteCores) -> CoreSet {
    let union = |list: &[(u8, CoreSet)], wanted: &dyn Fn(u8) -> bool| {
        let sets = list.iter().filter(|(class, _)| wanted(*class));
        sets.fold(CoreSet::EMPTY, |all, (_, set)| all.or(set)).and(&cores.usable)
    };
    let ours = |other: u8| Some(other) == class;
    let reserved = union(&cores.reserved, &ours);
    let for_others = union(&cores.reserved, &|other| !ours(other));
    let open = if reserved.is_empty() { cores.usable.without(&for_others) } else { reserved };
    let preferred = union(&cores.preferred, &ours).and(&open);
    [preferred, open, cores.usable].into_iter().find(|set| !set.is_empty()).unwrap_or(CoreSet::EMPTY)
}
