//! Any sequence of fragments, against a reassembler that keeps every byte and every fragment and asks the simplest
//! questions.

use super::*;
use proptest::prelude::*;

/// Both halves, as a gateway of one core joins them.
pub struct Pair {
    rendezvous: Rendezvous,
    table: FragmentTable,
    action: Action,
}

impl Pair {
    pub fn new(limits: FragmentLimits, action: Action) -> Pair {
        Pair {
            rendezvous: Rendezvous::new(limits, SecretState::of_number(5)),
            table: FragmentTable::new(limits, SecretState::of_number(6)),
            action,
        }
    }

    /// Whole packets, or bridged fragments, that come out.
    pub fn push(&mut self, now: u64, packet: &[u8]) -> Result<Vec<Vec<u8>>, DropReason> {
        let mut packets = Vec::new();
        for out in meet(&mut self.rendezvous, now, packet)? {
            let id = out.id.unwrap();
            if out.first {
                self.table.tell(now, &Told { id, key: out.key, action: self.action }).unwrap();
            }
            match take(&mut self.table, now, &out.packet).unwrap() {
                Did::Held | Did::Copy => {}
                Did::Bridge => packets.push(out.packet),
                Did::Whole(whole) => packets.push(whole),
            }
        }
        Ok(packets)
    }
}

#[derive(Clone, Debug)]
struct Step {
    /// Which packet.
    id: u32,
    offset: usize,
    bytes: usize,
    more: bool,
    /// Other contents for other numbers.
    contents: u8,
    wait_ns: u64,
}

impl Step {
    fn payload(&self) -> Vec<u8> {
        (0..self.bytes).map(|at| ((self.offset + at) as u8).wrapping_mul(7) ^ self.contents).collect()
    }
}

/// A packet of the reference.
#[derive(Default)]
struct Simple {
    since: u64,
    /// Offset, payload, more: in the order of arrival.
    fragments: Vec<(usize, Vec<u8>, bool)>,
    refused: bool,
}

enum Answer {
    Nothing,
    Refused,
    Whole(Vec<u8>),
}

impl Simple {
    fn push(&mut self, now: u64, offset: usize, payload: Vec<u8>, more: bool) -> Answer {
        if self.refused {
            return Answer::Refused;
        }
        let new = (offset, payload, more);
        if self.fragments.contains(&new) {
            return Answer::Nothing;
        }
        self.fragments.push(new);
        let mut bytes = vec![None; 1_000];
        let mut ends = Vec::new();
        let mut twice = false;
        for (offset, payload, more) in &self.fragments {
            for (at, byte) in payload.iter().enumerate() {
                twice |= bytes[offset + at].replace(*byte).is_some();
            }
            if !more {
                ends.push(offset + payload.len());
            }
        }
        let length = bytes.iter().rposition(Option::is_some).map_or(0, |at| at + 1);
        if twice || ends.len() > 1 || ends.iter().any(|end| *end < length) {
            (self.refused, self.since) = (true, now);
            return Answer::Refused;
        }
        let whole: Option<Vec<u8>> = bytes[..length].iter().copied().collect();
        match whole {
            Some(whole) if !ends.is_empty() => Answer::Whole(whole),
            _ => Answer::Nothing,
        }
    }
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = (0u32..3, 0usize..5, 1usize..4, 0u8..12, 0u8..20, 0u8..40);
    let step = step.prop_map(|(id, offset, units, more, contents, wait)| {
        let more = more > 3;
        Step {
            id,
            offset: offset * 16,
            bytes: if more { [8, 16, 16][units - 1] } else { units * 5 },
            more: more || offset == 0,
            contents: u8::from(contents == 0),
            wait_ns: if wait == 0 { 6 * SECOND } else { 1 },
        }
    });
    let step = step.prop_map(|step| if step.offset == 0 { Step { bytes: 16, ..step } } else { step });
    prop::collection::vec(step, 1..120)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Any order, copies, overlaps, contradictions, losses, timeouts: what comes out equals the reference's.
    #[test]
    fn equals_the_reference(six: bool, steps in steps()) {
        let mut pair = Pair::new(ROOMY, Action::Assemble);
        let mut simple: Vec<Option<Simple>> = (0..3).map(|_| None).collect();
        let mut now = 0;
        for step in steps {
            now += step.wait_ns;
            let recipe = Recipe { id: step.id, ..if six { V6 } else { V4 } };
            let place = &mut simple[step.id as usize];
            if place.as_ref().is_some_and(|packet| now >= packet.since + TIMEOUT) {
                *place = None;
            }
            let packet = place.get_or_insert_with(|| Simple { since: now, ..Simple::default() });
            let wanted = match packet.push(now, step.offset, step.payload(), step.more) {
                Answer::Nothing => Ok(vec![]),
                Answer::Refused => Err(DropReason::FragmentOverlap),
                Answer::Whole(payload) => {
                    *place = None;
                    Ok(vec![recipe.whole(&payload)])
                }
            };
            let fragment = recipe.fragment(step.offset, step.more, &step.payload());
            prop_assert_eq!(pair.push(now, &fragment), wanted, "{:?}", step);
        }
    }

    /// Little room, many sources: limits hold, and every fragment is somewhere.
    #[test]
    fn limits_hold_and_nothing_vanishes(
        steps in prop::collection::vec((0u32..12, 0u32..4, 0usize..40, 1usize..90, any::<bool>()), 1..400),
    ) {
        let limits = FragmentLimits { bytes_max: 60_000, packets_per_source_max: 3, timeout_ns: 50 };
        let mut rendezvous = Rendezvous::new(limits, SecretState::of_number(5));
        let (mut taken, mut out) = (0, 0);
        for (now, (from, id, offset, units, more)) in steps.into_iter().enumerate() {
            let fragment = Recipe { from, id, ..V4 }.fragment(offset * 8, more || offset == 0, &vec![0; units * 8]);
            if let Ok(outs) = meet(&mut rendezvous, now as u64, &fragment) {
                taken += 1;
                out += outs.len() as u64;
            }
        }
        rendezvous.tick(1_000);
        prop_assert_eq!((rendezvous.bytes(), rendezvous.packets()), (0, 0));
        prop_assert_eq!(taken, out + rendezvous.late_drops().total() + rendezvous.stats().copies);
    }
}
