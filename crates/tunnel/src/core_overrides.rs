//! Cores of a peer as an operator knows them, in place of what the peer tells (row T3).
//!
//! The peer's word stays the frame: how many cores it has, which of them may be used at this moment, its hash key and
//! its bucket table are its own. Within that an operator says which cores are addressed, which are for which class, and
//! how they are chosen. Where the two do not fit together, the peer's word holds.

use std::sync::Arc;

use arc_swap::{ArcSwapOption, Guard};
use steering::cores::CoreSet;
use steering::policy::Policy;

use crate::bond::PeerCores;
use crate::hello::ProcessorInfo;

/// Processor information from elsewhere than the peer. What is `None` is as the peer tells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CoreOverrides {
    /// Cores that the peer has, 1–[`crate::hello::CORES_MAX`]; if it tells another number nothing of this holds.
    pub cores: Option<u8>,
    /// Cores that are addressed, of those that the peer lets us use; if that leaves none, as the peer tells.
    pub usable: Option<CoreSet>,
    /// (class, cores that carry only this class).
    pub reserved: Option<Vec<(u8, CoreSet)>>,
    /// (class, cores it uses while one is usable).
    pub preferred: Option<Vec<(u8, CoreSet)>>,
    /// How cores are chosen.
    pub policy: Option<Policy>,
}

impl CoreOverrides {
    /// Information in force for a peer that tells `told`; `None` if it has another number of cores.
    #[must_use]
    pub fn apply(&self, told: &ProcessorInfo) -> Option<ProcessorInfo> {
        if self.cores.is_some_and(|cores| cores != told.cores) {
            return None;
        }
        let mut info = told.clone();
        let usable = self.usable.map(|usable| usable.and(&told.usable)).filter(|usable| !usable.is_empty());
        info.usable = usable.unwrap_or(told.usable);
        info.reserved.clone_from(self.reserved.as_ref().unwrap_or(&told.reserved));
        info.preferred.clone_from(self.preferred.as_ref().unwrap_or(&told.preferred));
        info.policy = self.policy.unwrap_or(told.policy);
        Some(info)
    }
}

/// The peer's cores as they are addressed: what it told last, and what an operator says instead.
#[derive(Default)]
pub struct BondCores {
    known: ArcSwapOption<PeerCores>,
    overrides: ArcSwapOption<CoreOverrides>,
}

impl BondCores {
    /// The cores; `None` before the first handshake.
    pub fn load(&self) -> Guard<Option<Arc<PeerCores>>> {
        self.known.load()
    }

    /// As [`Self::load`], to keep.
    pub fn load_full(&self) -> Option<Arc<PeerCores>> {
        self.known.load_full()
    }

    /// The peer tells.
    pub(crate) fn tell(&self, told: ProcessorInfo) {
        let overrides = self.overrides.load();
        self.known.store(Some(Arc::new(PeerCores::new(told, overrides.as_deref()))));
    }

    /// The operator says something else than before; what the peer told is kept for when nothing is said any more.
    pub(crate) fn override_with(&self, overrides: Option<&Arc<CoreOverrides>>) {
        if self.overrides.load().as_deref() == overrides.map(|new| &**new) {
            return;
        }
        self.overrides.store(overrides.map(Arc::clone));
        if let Some(known) = self.known.load_full() {
            self.tell(known.told().clone());
        }
    }

    /// Whether an operator's word holds; `None` if there is none, `Some(false)` if the peer has another number of cores.
    pub fn overridden(&self) -> Option<bool> {
        let overrides = self.overrides.load_full()?;
        let known = self.known.load_full()?;
        Some(overrides.cores.is_none_or(|cores| cores == known.info.cores))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use steering::table::BucketTable;

    use super::*;
    use crate::keys::FlowDefinition;

    fn set(cores: &[u8]) -> CoreSet {
        cores.iter().copied().collect()
    }

    fn told() -> ProcessorInfo {
        ProcessorInfo {
            cores: 4,
            usable: set(&[0, 1, 2]),
            load: Vec::new(),
            reserved: vec![(2, set(&[2]))],
            preferred: Vec::new(),
            policy: Policy::Hash,
            flow: FlowDefinition::FiveTuple,
            tenant: 0,
            tunnel_core: None,
            flow_hash_key: [7; 40],
            table: BucketTable::from_owners(3, (0..128).map(|at| at % 3).collect()).unwrap(),
        }
    }

    #[test]
    fn what_is_not_said_is_as_the_peer_tells() {
        assert_eq!(CoreOverrides::default().apply(&told()), Some(told()));
        let policy = CoreOverrides { policy: Some(Policy::Random), ..CoreOverrides::default() };
        assert_eq!(policy.apply(&told()), Some(ProcessorInfo { policy: Policy::Random, ..told() }));
        let classes = CoreOverrides { reserved: Some(Vec::new()), ..CoreOverrides::default() };
        assert_eq!(classes.apply(&told()).unwrap().reserved, []);
    }

    #[test]
    fn the_peer_says_which_cores_work() {
        let usable = |cores: &[u8]| {
            let overrides = CoreOverrides { usable: Some(set(cores)), ..CoreOverrides::default() };
            overrides.apply(&told()).unwrap().usable
        };
        assert_eq!(usable(&[1, 3]), set(&[1]), "core 3 may not be used now");
        assert_eq!(usable(&[3]), set(&[0, 1, 2]), "nothing would be left");
        let other = CoreOverrides { cores: Some(8), usable: Some(set(&[1])), ..CoreOverrides::default() };
        assert_eq!(other.apply(&told()), None, "it is about another machine");
    }

    #[test]
    fn either_side_may_change_its_word() {
        let cores = BondCores::default();
        let usable = |cores: &BondCores| cores.load_full().map(|known| known.info.usable);
        let only = |core: u8| {
            Arc::new(CoreOverrides { cores: Some(4), usable: Some(set(&[core])), ..CoreOverrides::default() })
        };
        cores.override_with(Some(&only(1)));
        assert_eq!((usable(&cores), cores.overridden()), (None, None));
        cores.tell(told());
        assert_eq!((usable(&cores), cores.overridden()), (Some(set(&[1])), Some(true)));
        cores.override_with(Some(&only(2)));
        assert_eq!(usable(&cores), Some(set(&[2])));
        let before = cores.load_full().unwrap();
        cores.override_with(Some(&only(2)));
        assert!(Arc::ptr_eq(&before, &cores.load_full().unwrap()), "nothing new");
        assert_eq!(*before.told(), told());
        cores.tell(ProcessorInfo { usable: set(&[0]), ..told() });
        assert_eq!(usable(&cores), Some(set(&[0])), "the core that is wanted was taken away");
        cores.override_with(None);
        cores.tell(told());
        assert_eq!((usable(&cores), cores.overridden()), (Some(told().usable), None));
    }
}
