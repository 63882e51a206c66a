//! Cores that the peer gave to flows (row T5): which flow has which, and how it goes there in order.
//!
//! A flow's first datagrams name no core. The peer chooses one and tells; from then on the flow *waits*, until the peer has
//! reported everything that left before, and goes on to the core that it was given. Flows that are given cores while others
//! wait go next. A flow that was silent for [`IDLE_S`] seconds begins anew. Or the peer is asked first ([`super::asked`]).
//!
//! Losses cost time, never order: an assignment that is lost is told again when more datagrams come that name no
//! core; one that comes when there is no room is not taken.

use std::num::NonZeroU8;

use steering::cores::CoreSet;
use steering::registry::{Found, Registry};

use super::asked::Asked;
use super::receiving_core::MOVE_NS_MAX;
use crate::header::NOT_TOLD;
use crate::time::Time;

/// Flows that a core remembers the cores of.
const FLOWS: usize = 16_384;
/// A flow is forgotten after this long without a packet, s.
const IDLE_S: u32 = 60;
/// Most flows that wait, or are next, at a time.
const WAITING_MAX: usize = 1_024;
/// After the last report: what was overtaken on its way may still come.
const OVERTAKEN_NS: u64 = 3_000_000;

/// The cores that a peer gave to the flows of one of our cores.
#[derive(Default)]
pub(super) struct Assignments {
    flows: Option<Box<Registry>>,
    /// Flows and their cores, not waiting yet.
    next: Vec<(u32, u8)>,
    /// Flows that wait, by hash, and their cores.
    moving: Vec<(u32, u8)>,
    /// The cores that these leave; [`NOT_TOLD`] among them.
    from: CoreSet,
    /// Everything is confirmed, since …
    confirmed: Option<Time>,
    ends: Time,
    /// Flows that the peer is asked about.
    pub asked: Asked,
}

impl Assignments {
    /// The core of a flow of a class; `None`: it has none, or may not go there. `Err`: it waits.
    pub fn core_of(
        &mut self,
        now: Time,
        (hash, class): (u32, u8),
        usable: &CoreSet,
    ) -> Result<Option<u8>, ()> {
        if self.moving.binary_search_by_key(&hash, |(flow, _)| *flow).is_ok() {
            return Err(());
        }
        let found = self.flows.as_mut().map_or(Found::Room, |flows| {
            flows.sweep(seconds(now), 1);
            flows.find(hash, 0, seconds(now))
        });
        match found {
            Found::Core(core) => Ok(Some(core).filter(|core| usable.contains(*core))),
            Found::Room if self.asked.waits(now, hash, class) => Err(()),
            Found::Room | Found::Crowded { .. } => Ok(None),
        }
    }

    /// A connection begins on the ports of a flow: it has no core yet (row T2).
    pub fn begin_connection(&mut self, now: Time, hash: u32, mark: NonZeroU8) {
        if let Some(flows) = &mut self.flows {
            flows.begin_connection(hash, 0, mark, seconds(now));
        }
    }

    /// The peer gave a flow a core. True if the flow goes there at once: nothing of it left before.
    pub fn note(&mut self, now: Time, hash: u32, core: u8) -> bool {
        if self.asked.answered(hash) {
            self.put(now, hash, core);
            return true;
        }
        let known = self.flows.as_mut().map(|flows| flows.find(hash, 0, seconds(now)));
        let same = matches!(known, Some(Found::Core(known)) if known == core);
        let waits = self.next.iter().chain(&self.moving).any(|(flow, _)| *flow == hash);
        if !same && !waits && self.next.len() < WAITING_MAX {
            self.next.push((hash, core));
        }
        false
    }

    /// Remembers the core of a flow, where there is room.
    fn put(&mut self, now: Time, hash: u32, core: u8) {
        let flows = self.flows.get_or_insert_with(|| Box::new(Registry::new(FLOWS, IDLE_S)));
        // `find` first: a set without room tells so, and its flows stay without a core.
        let room = !matches!(flows.find(hash, 0, seconds(now)), Found::Crowded { .. });
        if room {
            flows.put(hash, 0, core, seconds(now));
        }
    }

    /// Lets the flows that are next wait, unless others do. True if some do now: what left before must be marked.
    pub fn begin(&mut self, now: Time, usable: &CoreSet) -> bool {
        if !self.moving.is_empty() || self.next.is_empty() {
            return false;
        }
        self.moving = std::mem::take(&mut self.next);
        self.moving.retain(|(_, core)| usable.contains(*core));
        self.moving.sort_unstable();
        let old = self.moving.iter().map(|(flow, _)| {
            match self.flows.as_mut().map(|flows| flows.find(*flow, 0, seconds(now))) {
                Some(Found::Core(core)) => core,
                _ => NOT_TOLD,
            }
        });
        self.from = old.chain([NOT_TOLD]).collect();
        self.confirmed = None;
        self.ends = now.plus_ns(MOVE_NS_MAX);
        !self.moving.is_empty()
    }

    /// The cores, or none that is named, from which everything must be confirmed; `None` while no flow waits.
    pub fn waiting(&self) -> Option<CoreSet> {
        (!self.moving.is_empty()).then_some(self.from)
    }

    /// Lets the waiting flows go where they were told, if everything is `confirmed` or it took too long. True if they go.
    pub fn end(&mut self, now: Time, confirmed: bool) -> bool {
        if confirmed && self.confirmed.is_none() {
            self.confirmed = Some(now);
        }
        let settled = self.confirmed.is_some_and(|since| now.since(since) >= OVERTAKEN_NS);
        if !settled && now < self.ends {
            return false;
        }
        for (hash, core) in std::mem::take(&mut self.moving) {
            self.put(now, hash, core);
        }
        true
    }

    /// When [`Self::end`] has something to do, if no report comes before.
    pub fn next(&self) -> Time {
        if self.moving.is_empty() {
            return Time::MAX;
        }
        self.confirmed.map_or(self.ends, |since| since.plus_ns(OVERTAKEN_NS).min(self.ends))
    }

    /// Another session, or a peer that started anew: it knows of nothing.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

/// The registers' clock.
pub(super) fn seconds(now: Time) -> u32 {
    u32::try_from(now.ms() / 1_000).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flow_waits_until_all_before_is_confirmed_and_goes_then() {
        let usable = CoreSet::first(4);
        let mut assigned = Assignments::default();
        let at = Time::from_ms;
        assert_eq!(assigned.core_of(Time::from_ms(0), (7, 0), &usable), Ok(None));
        assigned.note(at(0), 7, 3);
        assigned.note(at(0), 7, 2);
        assert_eq!(
            assigned.core_of(Time::from_ms(0), (7, 0), &usable),
            Ok(None),
            "not before what left is marked"
        );
        assert!(assigned.begin(at(1), &usable));
        assert_eq!(assigned.core_of(Time::from_ms(0), (7, 0), &usable), Err(()));
        assert!(assigned.waiting().is_some_and(|from| from.contains(NOT_TOLD)));
        assigned.note(at(2), 8, 1);
        assert!(!assigned.end(at(2), false) && !assigned.begin(at(2), &usable));
        assert!(!assigned.end(at(10), true), "what was overtaken may still come");
        assert!(assigned.end(at(13), true));
        assert_eq!(assigned.core_of(Time::from_ms(0), (7, 0), &usable), Ok(Some(3)));
        assert!(assigned.begin(at(14), &usable));
        assert!(!assigned.end(at(200), false) && assigned.end(at(214), false), "not for ever");
        assert_eq!(assigned.core_of(Time::from_ms(0), (8, 0), &usable), Ok(Some(1)));
        let without = usable.without(&[3].into_iter().collect());
        assert_eq!(
            assigned.core_of(Time::from_ms(0), (7, 0), &without),
            Ok(None),
            "a core that was taken away"
        );
        assert_eq!(assigned.core_of(Time::from_ms(61000), (8, 0), &usable), Ok(None), "silent for a minute");
    }

    #[test]
    fn a_flow_that_was_asked_for_goes_to_its_core_at_once() {
        let usable = CoreSet::first(4);
        let mut assigned = Assignments::default();
        assigned.asked.set_on(true);
        assert_eq!(assigned.core_of(Time::ZERO, (7, 0), &usable), Err(()));
        assert!(assigned.note(Time::from_ms(1), 7, 3));
        assert_eq!(assigned.core_of(Time::from_ms(1), (7, 0), &usable), Ok(Some(3)));
        assert!(!assigned.begin(Time::from_ms(1), &usable), "nothing has to be confirmed");
        // Its core is taken away: what it sent there must be confirmed before it goes elsewhere, so that it is not asked for.
        let without = usable.without(&[3].into_iter().collect());
        assert_eq!(assigned.core_of(Time::from_ms(2), (7, 0), &without), Ok(None));
        assert!(!assigned.note(Time::from_ms(3), 7, 2) && assigned.begin(Time::from_ms(3), &without));
    }

    #[test]
    fn a_new_connection_on_old_ports_has_no_core_yet() {
        let usable = CoreSet::first(4);
        let mut assigned = Assignments::default();
        let [first, second] = [NonZeroU8::MIN, NonZeroU8::MAX];
        assigned.begin_connection(Time::ZERO, 7, first);
        for (core, mark) in [(3, first), (2, second)] {
            assigned.note(Time::ZERO, 7, core);
            assert!(assigned.begin(Time::ZERO, &usable) && assigned.end(Time::from_ms(300), false));
            assert_eq!(assigned.core_of(Time::from_ms(0), (7, 0), &usable), Ok(Some(core)));
            assigned.begin_connection(Time::ZERO, 7, mark);
            assert_eq!(assigned.core_of(Time::from_ms(0), (7, 0), &usable), Ok(None));
        }
        assigned.note(Time::ZERO, 7, 1);
        assert!(assigned.begin(Time::ZERO, &usable) && assigned.end(Time::from_ms(300), false));
        assigned.begin_connection(Time::ZERO, 7, second);
        assert_eq!(
            assigned.core_of(Time::from_ms(0), (7, 0), &usable),
            Ok(Some(1)),
            "the packet was repeated"
        );
    }

    #[test]
    fn cores_that_may_not_be_used_and_crowds_are_not_taken() {
        let mut assigned = Assignments::default();
        for flow in 0..5_000 {
            assert!(!assigned.note(Time::ZERO, flow, 9));
        }
        assert_eq!(assigned.next.len(), WAITING_MAX);
        assert!(!assigned.begin(Time::ZERO, &CoreSet::first(2)));
        assert!(assigned.waiting().is_none());
    }
}
