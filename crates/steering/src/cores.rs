//! A set of cores, as processor information tells it (row T3).

/// Up to 256 cores by number.
#[derive(Clone, Copy, PartialEq, Eq, Default, Hash, Debug)]
pub struct CoreSet([u64; 4]);

/// Permission of a core to own buckets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CoreState {
    /// Owns buckets.
    #[default]
    Active,
    /// Owns none: it is for flows of some class only ([`crate::ownership::ClassCores`]).
    Reserved,
    /// The operator took its buckets; its flows end on it.
    Draining,
    /// It hangs: its buckets are elsewhere, its flows are lost until it moves again.
    Stuck,
}

impl CoreSet {
    /// No core.
    pub const EMPTY: Self = Self([0; 4]);

    /// Cores 0 to `count` − 1.
    #[must_use]
    pub fn first(count: u16) -> Self {
        (0..=u8::MAX).take(usize::from(count)).collect()
    }

    /// From the wire's 32-byte mask: core `c` is bit `c % 8` (1 = least significant) of byte `c / 8`.
    #[must_use]
    pub fn from_bytes(mask: &[u8; 32]) -> Self {
        let mut words = [0; 4];
        for (index, &byte) in mask.iter().enumerate() {
            words[index / 8] |= u64::from(byte) << (8 * (index % 8));
        }
        Self(words)
    }

    /// The wire's 32-byte mask.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; 32] {
        let mut mask = [0; 32];
        for (index, byte) in mask.iter_mut().enumerate() {
            *byte = (self.0[index / 8] >> (8 * (index % 8))) as u8;
        }
        mask
    }

    /// Whether the core is in the set.
    #[inline]
    #[must_use]
    pub fn contains(&self, core: u8) -> bool {
        self.0[usize::from(core / 64)] >> (core % 64) & 1 == 1
    }

    /// Adds a core.
    pub fn insert(&mut self, core: u8) {
        self.0[usize::from(core / 64)] |= 1 << (core % 64);
    }

    /// Takes a core out.
    pub fn remove(&mut self, core: u8) {
        self.0[usize::from(core / 64)] &= !(1 << (core % 64));
    }

    /// How many cores.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::EMPTY
    }

    /// Cores in both.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        Self(std::array::from_fn(|word| self.0[word] & other.0[word]))
    }

    /// Cores in either.
    #[must_use]
    pub fn or(&self, other: &Self) -> Self {
        Self(std::array::from_fn(|word| self.0[word] | other.0[word]))
    }

    /// Cores of this set that are not in the other.
    #[must_use]
    pub fn without(&self, other: &Self) -> Self {
        Self(std::array::from_fn(|word| self.0[word] & !other.0[word]))
    }

    /// The cores in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u8> + '_ {
        (0..=u8::MAX).filter(|&core| self.contains(core))
    }
}

impl FromIterator<u8> for CoreSet {
    fn from_iter<I: IntoIterator<Item = u8>>(cores: I) -> Self {
        let mut set = Self::EMPTY;
        for core in cores {
            set.insert(core);
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn mask_bits_stand_where_the_wire_has_them() {
        let set: CoreSet = [0, 9, 255].into_iter().collect();
        let mut mask = [0; 32];
        (mask[0], mask[1], mask[31]) = (0x01, 0x02, 0x80);
        assert_eq!(set.to_bytes(), mask);
        assert_eq!(CoreSet::from_bytes(&mask), set);
        assert_eq!(CoreSet::first(3).iter().collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(CoreSet::first(0), CoreSet::EMPTY);
        assert_eq!(CoreSet::first(999).len(), 256);
    }

    proptest! {
        #[test]
        fn sets_behave_as_sets(a in proptest::collection::btree_set(any::<u8>(), 0..40),
                               b in proptest::collection::btree_set(any::<u8>(), 0..40)) {
            let (x, y): (CoreSet, CoreSet) = (a.iter().copied().collect(), b.iter().copied().collect());
            let list = |set: CoreSet| set.iter().collect::<Vec<_>>();
            prop_assert_eq!(list(x.and(&y)), a.intersection(&b).copied().collect::<Vec<_>>());
            prop_assert_eq!(list(x.or(&y)), a.union(&b).copied().collect::<Vec<_>>());
            prop_assert_eq!(list(x.without(&y)), a.difference(&b).copied().collect::<Vec<_>>());
            prop_assert_eq!((x.len(), x.is_empty()), (a.len(), a.is_empty()));
            prop_assert_eq!(CoreSet::from_bytes(&x.to_bytes()), x);
            let mut z = x;
            for &core in &b { z.remove(core); }
            prop_assert_eq!(z, x.without(&y));
        }
    }
}
