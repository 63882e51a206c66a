//! A bounded register of flows and the core each was given, for policies that do not follow from the hash.
//!
//! Memory is fixed at creation. The register is set-associative: a flow may stand in the four slots of one
//! set. A slot is free again when its flow was silent for the idle time. When a set is full of live flows, a
//! newcomer is not registered but served by its hash core; and since the register cannot tell such a flow from
//! a new one later, whatever enters that set within an idle time from then on goes to its hash core too.
//! So a flow that keeps sending never changes its core for want of room.

use std::num::NonZeroU8;

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
    /// Mark of the connection that began last, 0 before any.
    connection: u8,
    state: State,
}

/// State of a slot.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
enum State {
    /// Nobody's.
    #[default]
    Free,
    /// Of a flow without a core: a connection begins.
    Open,
    /// Of a flow with a core.
    Used,
}

impl Slot {
    fn is_of(&self, hash: u32, class: u8) -> bool {
        self.state != State::Free && (self.hash, self.class) == (hash, class)
    }
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
                    return if slot.state == State::Used { Found::Core(slot.core) } else { Found::Room };
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
        let same = |slot: &Slot| slot.is_of(hash, class);
        let place = set
            .slots
            .iter()
            .position(same)
            .or_else(|| set.slots.iter().position(|slot| !live(slot, now_s, idle_s)));
        let Some(slot) = place.and_then(|place| set.slots.get_mut(place)) else { return false };
        if slot.state == State::Used {
            uncount(&mut self.by_core, slot.core);
        }
        let connection = if same(slot) { slot.connection } else { 0 };
        *slot = Slot { hash, seen_s: now_s, class, core, connection, state: State::Used };
        self.by_core[usize::from(core)] += 1;
        true
    }

    /// A connection with this mark begins on the ports of a flow: if it is another than the last one, the flow has no core any
    /// more. A set without room does not remember the mark, and its flow is served by its hash core as before.
    pub fn begin_connection(&mut self, hash: u32, class: u8, mark: NonZeroU8, now_s: u32) {
        let (idle_s, mark) = (self.idle_s, mark.get());
        let index = self.index(hash);
        let Some(set) = self.sets.get_mut(index) else { return };
        let known = set.slots.iter().position(|slot| slot.is_of(hash, class) && live(slot, now_s, idle_s));
        let place = known.or_else(|| set.slots.iter().position(|slot| !live(slot, now_s, idle_s)));
        let Some(slot) = place.and_then(|place| set.slots.get_mut(place)) else { return };
        if known.is_some() && slot.connection == mark {
            return;
        }
        if slot.state == State::Used {
            uncount(&mut self.by_core, slot.core);
        }
        *slot = Slot { hash, seen_s: now_s, class, core: 0, connection: mark, state: State::Open };
    }

    /// Frees the slots of idle flows in the next `sets` sets, so that counts follow the living.
    pub fn sweep(&mut self, now_s: u32, sets: usize) {
        for _ in 0..sets.min(self.sets.len()) {
            let Some(set) = self.sets.get_mut(self.sweep_at) else { return };
            for slot in &mut set.slots {
                if slot.state != State::Free && !live(slot, now_s, self.idle_s) {
                    if slot.state == State::Used {
                        uncount(&mut self.by_core, slot.core);
                    }
                    slot.state = State::Free;
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
    slot.state != State::Free && age(now_s, slot.seen_s) <= idle_s
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
    fn a_connection_on_old_ports_has_no_core_until_it_is_given_one() {
        let mut registry = Registry::new(4, 30);
        let mark = |number: u8| NonZeroU8::new(number).unwrap_or(NonZeroU8::MIN);
        registry.begin_connection(7, 0, mark(1), 0);
        assert_eq!((registry.find(7, 0, 0), registry.len()), (Found::Room, 0));
        assert!(registry.put(7, 0, 3, 0));
        registry.begin_connection(7, 0, mark(1), 1);
        assert_eq!(registry.find(7, 0, 1), Found::Core(3), "the packet was repeated");
        registry.begin_connection(7, 0, mark(2), 2);
        assert_eq!((registry.find(7, 0, 2), registry.len()), (Found::Room, 0));
        assert!(registry.put(7, 0, 5, 2));
        assert_eq!(
            (registry.find(7, 0, 3), registry.flows_on(3), registry.flows_on(5)),
            (Found::Core(5), 0, 1)
        );
        registry.begin_connection(8, 0, mark(1), 3);
        registry.sweep(40, 9);
        assert_eq!((registry.find(8, 0, 40), registry.len()), (Found::Room, 0));
        // Four that live take all the room: a fifth is served by its hash core, whatever begins.
        for hash in 0..4 {
            assert!(registry.put(hash, 0, 1, 50));
        }
        registry.begin_connection(9, 0, mark(1), 50);
        assert_eq!((registry.find(9, 0, 50), registry.len()), (Found::Crowded { room: false }, 4));
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
        fn counts_are_exact(steps in proptest::collection::vec((0u32..64, 0u8..2, 0u8..4, 0u32..4, 0u8..9), 1..300)) {
            let mut registry = Registry::new(16, 6);
            let mut now_s = 0u32;
            for (hash, class, core, wait_s, mark) in steps {
                now_s += wait_s;
                if let Some(mark) = NonZeroU8::new(mark) {
                    registry.begin_connection(hash, class, mark, now_s);
                }
                match registry.find(hash, class, now_s) {
                    Found::Core(_) => {}
                    Found::Room | Found::Crowded { room: true } => prop_assert!(registry.put(hash, class, core, now_s)),
                    Found::Crowded { room: false } => prop_assert!(!registry.put(hash, class, core, now_s)),
                }
                registry.sweep(now_s, 1);
                let slots = registry.sets.iter().flat_map(|set| &set.slots);
                prop_assert_eq!(slots.filter(|slot| slot.state == State::Used).count(), registry.len());
                prop_assert!(registry.len() <= registry.capacity());
            }
        }
    }
}
