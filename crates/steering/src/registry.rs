//! A bounded register of flows and the core each was given, for policies that do not follow from the hash.
//!
//! Memory is fixed at creation. The register is set-associative: a flow may stand in the four slots of one
//! set. A slot is free again when its flow was silent for the idle time. When a set is full of live flows, a
//! newcomer is not registered but served by its hash core; and since the register cannot tell such a flow from
//! a new one later, whatever enters that set within an idle time from then on goes to its hash core too.
//! So a flow that keeps sending never changes its core for want of room.

/// Slots of a set.
const WAYS: usize = 4;

/// A registered flow.
#[derive(Clone, Copy, Default, Debug)]
struct Slot {
    hash: u32,
    /// The caller's clock, in seconds, at the flow's last packet.
    seen_s: u32,
    class: u8,
    core: u8,
    used: bool,
}

/// The slots that a flow may stand in.
#[derive(Clone, Copy, Default, Debug)]
struct Set {
    slots: [Slot; WAYS],
    /// When a live flow last found no room here.
    overflow_s: Option<u32>,
}

/// State of a flow in the register.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    /// It has this core.
    Core(u8),
    /// Not registered; there is room.
    Room,
    /// Not registered, and it must be served by its hash core: `room` says whether it can be registered.
    Crowded {
        /// A slot is free.
        room: bool,
    },
}

/// Flows and their cores.
#[derive(Clone, Debug)]
pub struct Registry {
    sets: Vec<Set>,
    idle_s: u32,
    /// Registered flows by core; includes idle ones until their slot is taken or swept.
    by_core: Box<[u32; 256]>,
    /// The next set that [`Registry::sweep`] looks at.
    sweep_at: usize,
}

impl Registry {
    /// Room for at least `flows` (rounded up to a power of two, at least 4); a flow is forgotten after `idle_s`
    /// seconds of silence.
    #[must_use]
    pub fn new(flows: usize, idle_s: u32) -> Self {
        let sets = flows.div_ceil(WAYS).max(1).checked_next_power_of_two().unwrap_or(1);
        Self { sets: vec![Set::default(); sets], idle_s, by_core: Box::new([0; 256]), sweep_at: 0 }
    }

    /// Flows registered now, idle ones included until they are swept.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_core.iter().map(|&flows| flows as usize).sum()
    }

    /// Whether no flow is registered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Most flows it holds.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.sets.len() * WAYS
    }

    /// Registered flows of a core.
    #[must_use]
    pub fn flows_on(&self, core: u8) -> u32 {
        self.by_core[usize::from(core)]
    }

    /// Looks a flow up and, if it is there, notes that it is alive.
    pub fn find(&mut self, hash: u32, class: u8, now_s: u32) -> Found {
        let idle_s = self.idle_s;
        let index = self.index(hash);
        let Some(set) = self.sets.get_mut(index) else { return Found::Crowded { room: false } };
        let mut room = false;
        for slot in &mut set.slots {
            if live(slot, now_s, idle_s) {
                if slot.hash == hash && slot.class == class {
                    slot.seen_s = now_s;
                    return Found::Core(slot.core);
                }
            } else {
                room = true;
            }
        }
        if !room {
            set.overflow_s = Some(now_s);
        }
        match set.overflow_s {
            Some(at_s) if age(now_s, at_s) <= idle_s => Found::Crowded { room },
            _ => Found::Room,
        }
    }

    /// Registers a flow, or changes its core; false without room.
    pub fn put(&mut self, hash: u32, class: u8, core: u8, now_s: u32) -> bool {
        let idle_s = self.idle_s;
        let index = self.index(hash);
        let Some(set) = self.sets.get_mut(index) else { return false };
        let same = |slot: &Slot| slot.used && slot.hash == hash && slot.class == class;
        let place = set
            .slots
            .iter()
            .position(same)
            .or_else(|| set.slots.iter().position(|slot| !live(slot, now_s, idle_s)));
        let Some(slot) = place.and_then(|place| set.slots.get_mut(place)) else { return false };
        if slot.used {
            uncount(&mut self.by_core, slot.core);
        }
        *slot = Slot { hash, seen_s: now_s, class, core, used: true };
        self.by_core[usize::from(core)] += 1;
        true
    }

    /// Frees the slots of idle flows in the next `sets` sets, so that counts follow the living.
    pub fn sweep(&mut self, now_s: u32, sets: usize) {
        for _ in 0..sets.min(self.sets.len()) {
            let Some(set) = self.sets.get_mut(self.sweep_at) else { return };
            for slot in &mut set.slots {
                if slot.used && !live(slot, now_s, self.idle_s) {
                    slot.used = false;
                    uncount(&mut self.by_core, slot.core);
                }
            }
            // Forgetting it here keeps a mark from coming back to life when the 32-bit clock wraps.
            if set.overflow_s.is_some_and(|at_s| age(now_s, at_s) > self.idle_s) {
                set.overflow_s = None;
            }
            self.sweep_at = (self.sweep_at + 1) & (self.sets.len() - 1);
        }
    }

    /// All of the hash decides the set, not only the bits that chose core or node.
    fn index(&self, hash: u32) -> usize {
        let mixed = hash.wrapping_mul(crate::symmetric::MIX_MULTIPLIER);
        (mixed ^ (mixed >> 16)) as usize & (self.sets.len() - 1)
    }
}

/// Seconds since `at_s`. A clock that went back, or a packet read slightly earlier, counts as no time.
fn age(now_s: u32, at_s: u32) -> u32 {
    let age = now_s.wrapping_sub(at_s);
    if age > u32::MAX / 2 { 0 } else { age }
}

fn live(slot: &Slot, now_s: u32, idle_s: u32) -> bool {
    slot.used && age(now_s, slot.seen_s) <= idle_s
}

fn uncount(by_core: &mut [u32; 256], core: u8) {
    let count = &mut by_core[usize::from(core)];
    *count = count.saturating_sub(1);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn remembers_until_idle() {
        let mut registry = Registry::new(64, 30);
        assert_eq!(registry.find(7, 0, 100), Found::Room);
        assert!(registry.put(7, 0, 3, 100));
        assert_eq!(registry.find(7, 0, 130), Found::Core(3));
        assert_eq!(registry.find(7, 1, 130), Found::Room, "another class is another flow");
        assert_eq!(registry.find(7, 0, 160), Found::Core(3), "each packet keeps it alive");
        assert_eq!(registry.find(7, 0, 191), Found::Room);
    }

    #[test]
    fn a_flow_without_room_stays_on_its_hash_core() {
        let mut registry = Registry::new(4, 30);
        for hash in 0..4 {
            assert_eq!(registry.find(hash, 0, 0), Found::Room);
            assert!(registry.put(hash, 0, 1, 0));
        }
        assert_eq!(registry.find(99, 0, 10), Found::Crowded { room: false });
        assert!(!registry.put(99, 0, 1, 10));
        // The four are idle; 99 must not be mistaken for a new flow.
        assert_eq!(registry.find(99, 0, 35), Found::Crowded { room: true });
        assert!(registry.put(99, 0, 2, 35));
        assert_eq!(registry.find(99, 0, 60), Found::Core(2));
        // An idle time after the last overflow, newcomers choose freely again.
        assert_eq!(registry.find(100, 0, 41), Found::Room);
    }

    #[test]
    fn counts_follow_changes_and_the_sweep() {
        let mut registry = Registry::new(16, 5);
        assert!(registry.put(1, 0, 3, 0));
        assert!(registry.put(1, 0, 4, 1));
        assert_eq!((registry.flows_on(3), registry.flows_on(4), registry.len()), (0, 1, 1));
        registry.sweep(6, 1000);
        assert_eq!(registry.len(), 1);
        registry.sweep(7, 1000);
        assert_eq!(registry.len(), 0);
    }

    #[test]
    fn the_clock_may_wrap_and_go_back() {
        let mut registry = Registry::new(4, 30);
        assert!(registry.put(1, 0, 3, u32::MAX - 5));
        assert_eq!(registry.find(1, 0, 20), Found::Core(3));
        assert_eq!(registry.find(1, 0, 15), Found::Core(3));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// After all operations in all orders, memory stays fixed and the counts are those of the slots.
        #[test]
        fn counts_are_exact(steps in proptest::collection::vec((0u32..64, 0u8..2, 0u8..4, 0u32..4), 1..300)) {
            let mut registry = Registry::new(16, 6);
            let mut now_s = 0u32;
            for (hash, class, core, wait_s) in steps {
                now_s += wait_s;
                match registry.find(hash, class, now_s) {
                    Found::Core(_) => {}
                    Found::Room | Found::Crowded { room: true } => prop_assert!(registry.put(hash, class, core, now_s)),
                    Found::Crowded { room: false } => prop_assert!(!registry.put(hash, class, core, now_s)),
                }
                registry.sweep(now_s, 1);
                let slots = registry.sets.iter().flat_map(|set| &set.slots);
                prop_assert_eq!(slots.filter(|slot| slot.used).count(), registry.len());
                prop_assert!(registry.len() <= registry.capacity());
            }
        }
    }
}
