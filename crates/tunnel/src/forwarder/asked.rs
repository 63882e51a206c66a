//! Flows whose core is asked for before their first datagram, which waits for the answer (row T5).
//!
//! Costs a flow's first packet a round trip, and spares it the wait for what it sent without a core. A question is
//! repeated, and given up after [`ANSWER_NS_MAX`]: then the flow begins without a core, as without this.

use super::{CoreWanted, Output};
use crate::time::Time;

/// Packets of a flow wait at most so long for its core.
const ANSWER_NS_MAX: u64 = 100_000_000;
/// A question is repeated this often: it, or its answer, may have been lost.
const REPEAT_NS: u64 = 25_000_000;
/// Flows that are asked for, or were in vain, at a time; others begin without a core.
const FLOWS_MAX: usize = 1_024;
/// A flow that was asked for in vain is asked for again when it was silent for so long.
const FORGET_NS: u64 = 60_000_000_000;
/// Bytes of one question: flow hash, class.
const QUESTION_BYTES: usize = 5;
/// Most questions of one frame.
const QUESTIONS_MAX: usize = 32;

/// A flow without a core.
#[derive(Clone, Copy, Debug)]
struct Flow {
    hash: u32,
    class: u8,
    /// Packets wait until then; of a flow that was asked for in vain: its last packet.
    until: Time,
    repeat: Time,
    in_vain: bool,
}

/// Flows of one core that a peer is asked about.
#[derive(Default)]
pub(super) struct Asked {
    /// Whether there is anybody to ask.
    on: bool,
    /// By hash.
    flows: Vec<Flow>,
}

impl Asked {
    /// Whether the peer is asked from now on.
    pub fn set_on(&mut self, on: bool) {
        self.on = on;
        if !on {
            self.flows.clear();
        }
    }

    /// Whether a flow waits for its answer.
    pub fn is_waiting(&self) -> bool {
        self.flows.iter().any(|flow| !flow.in_vain)
    }

    /// Whether the packets of a flow that has no core wait.
    pub fn waits(&mut self, now: Time, hash: u32, class: u8) -> bool {
        if !self.on {
            return false;
        }
        match self.flows.binary_search_by_key(&hash, |flow| flow.hash) {
            Ok(place) => {
                let flow = &mut self.flows[place];
                if flow.in_vain {
                    flow.until = now;
                }
                !flow.in_vain && now < flow.until
            }
            Err(_) if self.flows.len() >= FLOWS_MAX => false,
            Err(place) => {
                let until = now.plus_ns(ANSWER_NS_MAX);
                self.flows.insert(place, Flow { hash, class, until, repeat: now, in_vain: false });
                true
            }
        }
    }

    /// The flow has a core now. Whether none of its packets has left without one.
    pub fn answered(&mut self, hash: u32) -> bool {
        let place = self.flows.binary_search_by_key(&hash, |flow| flow.hash);
        place.is_ok_and(|place| !self.flows.remove(place).in_vain)
    }

    /// Body of a frame with the questions that are due, and have not to be asked again soon; empty: none is.
    pub fn questions(&mut self, now: Time) -> Vec<u8> {
        let due = self.flows.iter_mut().filter(|flow| !flow.in_vain && now >= flow.repeat);
        let mut body = Vec::new();
        for flow in due.take(QUESTIONS_MAX) {
            flow.repeat = now.plus_ns(REPEAT_NS);
            body.extend_from_slice(&flow.hash.to_be_bytes());
            body.push(flow.class);
        }
        body
    }

    /// Gives up what was not answered in time. True if packets waited for that.
    pub fn give_up(&mut self, now: Time) -> bool {
        let mut some = false;
        self.flows.retain_mut(|flow| {
            let over = !flow.in_vain && now >= flow.until;
            flow.in_vain |= over;
            some |= over;
            !flow.in_vain || now.since(flow.until) < FORGET_NS
        });
        some
    }

    /// When [`Self::questions`] or [`Self::give_up`] has something to do.
    pub fn next(&self) -> Time {
        let waiting = self.flows.iter().filter(|flow| !flow.in_vain);
        waiting.map(|flow| flow.repeat.min(flow.until)).min().unwrap_or(Time::MAX)
    }
}

/// Questions of a frame's body, the first of them: hash and class.
fn read(body: &[u8]) -> impl Iterator<Item = (u32, u8)> + '_ {
    let (questions, _) = body.as_chunks::<QUESTION_BYTES>();
    questions
        .iter()
        .take(QUESTIONS_MAX)
        .map(|[a, b, c, d, class]| (u32::from_be_bytes([*a, *b, *c, *d]), *class))
}

/// Passes the questions of a peer's core on to who chooses.
pub(super) fn pass_on(body: &[u8], peer_core: u8, bond: usize, out: &mut impl Output) {
    read(body).for_each(|(hash, class)| out.core_wanted(bond, CoreWanted { peer_core, hash, class }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flow_waits_for_its_answer_and_not_for_ever() {
        let at = Time::from_ms;
        let mut asked = Asked::default();
        assert!(!asked.waits(at(0), 7, 1), "nobody to ask");
        asked.set_on(true);
        assert!(asked.waits(at(0), 7, 1) && asked.waits(at(0), 9, 0));
        let body = asked.questions(at(0));
        assert_eq!(read(&body).collect::<Vec<_>>(), [(7, 1), (9, 0)]);
        assert!(asked.questions(at(24)).is_empty() && asked.next() == at(25));
        assert_eq!(asked.questions(at(25)).len(), 2 * QUESTION_BYTES);
        assert!(asked.answered(9) && !asked.answered(9));
        assert!(asked.waits(at(99), 7, 1) && !asked.give_up(at(99)));
        assert!(asked.give_up(at(100)) && !asked.give_up(at(100)));
        assert!(!asked.waits(at(50_000), 7, 1), "it goes without, while it is not silent");
        assert!(asked.questions(at(200)).is_empty() && asked.next() == Time::MAX);
        assert!(!asked.give_up(at(100_000)) && !asked.waits(at(100_000), 7, 1));
        assert!(!asked.give_up(at(160_000)) && asked.waits(at(160_000), 7, 1), "it was silent");
        assert!(!asked.answered(8), "of an unknown flow");
    }

    #[test]
    fn an_answer_after_packets_left_without_a_core_is_an_ordinary_one() {
        let mut asked = Asked::default();
        asked.set_on(true);
        assert!(asked.waits(Time::ZERO, 7, 0));
        assert!(asked.give_up(Time::from_ms(100)));
        assert!(!asked.answered(7));
    }

    #[test]
    fn only_so_many_are_asked_for() {
        let mut asked = Asked::default();
        asked.set_on(true);
        let waiting = (0..5_000).filter(|hash| asked.waits(Time::ZERO, *hash, 0)).count();
        assert_eq!(waiting, FLOWS_MAX);
        assert_eq!(asked.questions(Time::ZERO).len(), QUESTIONS_MAX * QUESTION_BYTES);
        assert_eq!(read(&[0; 1_000]).count(), QUESTIONS_MAX);
        assert_eq!(read(&[0; 9]).count(), 1, "what is left over is nothing");
    }
}
