//! A table whose entries are looked at again and again, a few at a time, and leave when they are old.

use std::collections::HashMap;
use std::hash::Hash;

use services::hash::SecretState;

/// Entries with keys that strangers choose; at most as many as it was made for.
#[derive(Debug)]
pub(super) struct AgedTable<K, V> {
    slots: Vec<Option<(K, V)>>,
    free: Vec<u32>,
    places: HashMap<K, u32, SecretState>,
    /// Slot that is looked at next.
    hand: usize,
    max: usize,
}

impl<K: Copy + Eq + Hash, V> AgedTable<K, V> {
    /// An empty table for `max` entries.
    pub fn new(max: usize, state: SecretState) -> Self {
        Self { slots: Vec::new(), free: Vec::new(), places: HashMap::with_hasher(state), hand: 0, max }
    }

    /// Entries there are.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// From now on it takes so many; what is there stays until it is old.
    pub fn set_max(&mut self, max: usize) {
        self.max = max;
    }

    /// An entry.
    pub fn get(&self, key: &K) -> Option<&V> {
        let place = self.places.get(key)?;
        self.slots.get(*place as usize)?.as_ref().map(|(_, value)| value)
    }

    /// An entry, to change it.
    pub fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        let place = self.places.get(key)?;
        self.slots.get_mut(*place as usize)?.as_mut().map(|(_, value)| value)
    }

    /// Adds an entry that is not there; `false` when there is no room.
    pub fn insert(&mut self, key: K, value: V) -> bool {
        if self.places.len() >= self.max {
            return false;
        }
        let place = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() as u32 - 1
        });
        if let Some(slot) = self.slots.get_mut(place as usize) {
            *slot = Some((key, value));
        }
        self.places.insert(key, place);
        true
    }

    /// Looks at the next `count` slots, and removes the entries that are not to stay.
    pub fn sweep(&mut self, count: usize, mut stays: impl FnMut(&K, &V) -> bool) {
        for _ in 0..count.min(self.slots.len()) {
            self.hand = (self.hand + 1) % self.slots.len();
            let Some(slot) = self.slots.get_mut(self.hand) else { return };
            if let Some((key, value)) = slot
                && !stays(key, value)
            {
                self.places.remove(key);
                *slot = None;
                self.free.push(self.hand as u32);
            }
        }
    }

    /// As [`Self::sweep`], all of them.
    pub fn retain(&mut self, stays: impl FnMut(&K, &V) -> bool) {
        self.sweep(self.slots.len(), stays);
    }

    /// Entries, in no order.
    #[cfg(test)]
    pub fn iter(&self) -> impl Iterator<Item = &(K, V)> {
        self.slots.iter().flatten()
    }
}
