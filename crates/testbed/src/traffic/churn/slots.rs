//! Places for connections, named by tokens that are never used twice.

/// Bit that no token of [`Slots`] has; marks the tokens of other things in the same epoll.
pub(super) const OTHER: u64 = 1 << 63;
const GENERATION_MASK: u32 = u32::MAX >> 1;

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    value: Option<T>,
}

/// A table whose places are used again, under other tokens.
#[derive(Debug)]
pub(super) struct Slots<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    used: usize,
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self { slots: Vec::new(), free: Vec::new(), used: 0 }
    }
}

impl<T> Slots<T> {
    /// Reserves a place; [`put`](Self::put) fills it.
    pub(super) fn reserve(&mut self) -> u64 {
        self.used += 1;
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: 0, value: None });
            self.slots.len() as u32 - 1
        });
        let generation = self.slots.get(index as usize).map_or(0, |slot| slot.generation);
        u64::from(generation) << 32 | u64::from(index)
    }

    /// Takes the value out for a moment; `None` if it is gone. [`put`](Self::put) or [`free`](Self::free) follows.
    pub(super) fn take(&mut self, token: u64) -> Option<T> {
        self.slot(token)?.value.take()
    }

    /// Puts the value in its place.
    pub(super) fn put(&mut self, token: u64, value: T) {
        if let Some(slot) = self.slot(token) {
            slot.value = Some(value);
        }
    }

    /// The token's place is used by others from now on.
    pub(super) fn free(&mut self, token: u64) {
        if let Some(slot) = self.slot(token) {
            slot.generation = (slot.generation + 1) & GENERATION_MASK;
            slot.value = None;
            self.free.push(token as u32);
            self.used -= 1;
        }
    }

    /// Number of places in use.
    pub(super) fn len(&self) -> usize {
        self.used
    }

    /// Takes out what is left, in no order that means anything.
    pub(super) fn take_all(&mut self) -> impl Iterator<Item = T> {
        std::mem::take(self).slots.into_iter().filter_map(|slot| slot.value)
    }

    fn slot(&mut self, token: u64) -> Option<&mut Slot<T>> {
        let slot = self.slots.get_mut(token as u32 as usize)?;
        (u64::from(slot.generation) == token >> 32).then_some(slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_token_finds_nothing_in_a_place_that_is_used_again() {
        let mut slots = Slots::default();
        let old = slots.reserve();
        slots.put(old, "old");
        assert_eq!(slots.take(old), Some("old"));
        slots.free(old);
        slots.free(old);
        let new = slots.reserve();
        slots.put(new, "new");
        assert_eq!((new as u32, slots.len()), (old as u32, 1));
        assert_eq!(slots.take(old), None);
        assert_eq!(slots.take_all().collect::<Vec<_>>(), ["new"]);
        assert_eq!((old | new) & OTHER, 0);
    }
}
