//! Memory that a peer makes a node keep: packets in pieces, packets held for order, lanes.
//!
//! All of it is counted by what arrived, per bond and per node ([`BondMemory`]). A core takes its part in grains, so that
//! the shared counters are touched once in a while and not per packet ([`Share`]). Who is over its limit is refused more; one
//! peer cannot use up what the others need, because a bond always gets [`BOND_BYTES_SURE`].

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// A bond may keep so many bytes …
const BOND_BYTES: usize = 8 << 20;
/// … and so many more for each core of this node: lanes are per pair of cores.
const BOND_BYTES_PER_CORE: usize = 2 << 20;
/// All bonds of a node together may keep so many.
pub const NODE_BYTES: usize = 512 << 20;
/// A bond gets so many in any case.
pub const BOND_BYTES_SURE: usize = 256 << 10;
/// A core takes and returns so many at once.
const GRAIN_BYTES: usize = 32 << 10;

/// Counter of all that the peers of a node make it keep, bytes.
#[derive(Debug, Default)]
pub struct NodeMemory(AtomicUsize);

impl NodeMemory {
    /// Bytes kept now, rounded up to grains.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.0.load(Relaxed)
    }
}

/// Counter of all that one peer makes a node keep.
#[derive(Debug)]
pub struct BondMemory {
    node: Arc<NodeMemory>,
    bytes: AtomicUsize,
    bytes_max: usize,
}

impl BondMemory {
    /// Nothing is kept yet. `cores`: of this node.
    #[must_use]
    pub fn new(node: Arc<NodeMemory>, cores: u8) -> Self {
        let bytes_max = BOND_BYTES + usize::from(cores) * BOND_BYTES_PER_CORE;
        Self { node, bytes: AtomicUsize::new(0), bytes_max }
    }

    /// Bytes kept now, rounded up to grains.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes.load(Relaxed)
    }

    /// Most bytes that may be kept.
    #[must_use]
    pub const fn bytes_max(&self) -> usize {
        self.bytes_max
    }

    fn take(&self, bytes: usize) -> bool {
        let of_bond = self.bytes.fetch_add(bytes, Relaxed) + bytes;
        let of_node = self.node.0.fetch_add(bytes, Relaxed) + bytes;
        let may = of_bond <= BOND_BYTES_SURE || (of_bond <= self.bytes_max && of_node <= NODE_BYTES);
        if !may {
            self.give_back(bytes);
        }
        may
    }

    fn give_back(&self, bytes: usize) {
        self.bytes.fetch_sub(bytes, Relaxed);
        self.node.0.fetch_sub(bytes, Relaxed);
    }
}

/// Part of a bond's memory that one core uses. What is left of it is given back when it is dropped.
#[derive(Debug)]
pub struct Share {
    memory: Arc<BondMemory>,
    granted: usize,
    used: usize,
}

impl Share {
    /// An empty share.
    #[must_use]
    pub const fn new(memory: Arc<BondMemory>) -> Self {
        Self { memory, granted: 0, used: 0 }
    }

    /// Counts `bytes` more, if they may be kept.
    #[must_use]
    pub fn take(&mut self, bytes: usize) -> bool {
        let used = self.used.saturating_add(bytes);
        if used > self.granted {
            let more = (used - self.granted).next_multiple_of(GRAIN_BYTES);
            if !self.memory.take(more) {
                return false;
            }
            self.granted += more;
        }
        self.used = used;
        true
    }

    /// As [`Self::take`], for what is of use but not necessary: never more than half of what the bond may keep.
    #[must_use]
    pub fn take_optional(&mut self, bytes: usize) -> bool {
        self.memory.bytes().saturating_add(bytes) <= self.memory.bytes_max() / 2 && self.take(bytes)
    }

    /// `bytes` of what was taken are not kept any more.
    pub fn give_back(&mut self, bytes: usize) {
        self.used = self.used.saturating_sub(bytes);
        // One grain stays, for what comes next.
        let keep = self.used.next_multiple_of(GRAIN_BYTES) + GRAIN_BYTES;
        if self.granted > keep || self.used == 0 {
            let keep = if self.used == 0 { 0 } else { keep };
            self.memory.give_back(self.granted - keep);
            self.granted = keep;
        }
    }

    /// Nothing is kept any more.
    pub fn clear(&mut self) {
        self.give_back(self.used);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.memory.give_back(self.granted);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bond_has_a_limit_and_gives_back_what_it_took() {
        let node = Arc::new(NodeMemory::default());
        let memory = Arc::new(BondMemory::new(Arc::clone(&node), 4));
        assert_eq!(memory.bytes_max(), 16 << 20);
        let mut shares: Vec<_> = (0..8).map(|_| Share::new(Arc::clone(&memory))).collect();
        let mut taken = 0;
        for at in (0..8).cycle() {
            if !shares[at].take(1_000) {
                break;
            }
            taken += 1_000;
        }
        assert!(taken > (15 << 20) && memory.bytes() <= memory.bytes_max(), "{taken}");
        for _ in 0..taken / 8_000 {
            shares[0].give_back(1_000);
        }
        assert!(memory.bytes() < (14 << 20) + 2 * GRAIN_BYTES, "{}", memory.bytes());
        shares[1].clear();
        drop(shares);
        assert_eq!((memory.bytes(), node.bytes()), (0, 0));
    }

    #[test]
    fn a_thousand_greedy_bonds_leave_others_their_part() {
        let node = Arc::new(NodeMemory::default());
        let bond = || Share::new(Arc::new(BondMemory::new(Arc::clone(&node), 4)));
        let mut greedy: Vec<_> = (0..1_000).map(|_| bond()).collect();
        for share in &mut greedy {
            while share.take(1_500) {}
        }
        assert!(node.bytes() <= 1 << 30, "{}", node.bytes());
        let mut honest = bond();
        assert!(honest.take(BOND_BYTES_SURE) && !honest.take(1));
    }
}
