//! A question for the way of a flow's packets: [`Handoff::Trace`](super::Handoff::Trace).
//!
//! It goes along the chain as the flow's packets do, with the route recorded, and is processed nowhere. TABLE says how far
//! it is ([`TraceStage`]). The unit that would process it sends it back to the dispatcher; its inner frame has a packet of the flow, and where
//! other frames have hardware addresses, the answer ([`Trace`]).

use packet::attachment::{Arrival, UnitVisit};
use packet::{array_at, put_u16, put_u32};

use super::Encapsulation;

/// How far a question is: TABLE of its headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TraceStage {
    /// 0, 1, 2: as a packet that was dispatched, punted, or that nobody in the chain claims.
    Asked(Arrival),
    /// 3: back to the dispatcher, answered.
    Answered,
}

impl TraceStage {
    /// The number on the wire.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Asked(Arrival::Outside) => 0,
            Self::Asked(Arrival::Punted) => 1,
            Self::Asked(Arrival::Unclaimed) => 2,
            Self::Answered => 3,
        }
    }

    /// The stage of a question; `None`: there is none of that number.
    #[must_use]
    pub const fn of(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Asked(Arrival::Outside)),
            1 => Some(Self::Asked(Arrival::Punted)),
            2 => Some(Self::Asked(Arrival::Unclaimed)),
            3 => Some(Self::Answered),
            _ => None,
        }
    }
}

impl Encapsulation {
    /// The visit that a packet of the flow would make in the place of this question.
    #[must_use]
    pub const fn visit_as(&self, arrival: Arrival) -> UnitVisit {
        UnitVisit { arrival, ttl: self.ttl, odd_era: self.odd_era, dispatcher: self.dispatcher }
    }
}

/// Answer: what a unit would do with a packet of the flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verdict {
    /// 0: not asked yet.
    #[default]
    Unknown,
    /// 1: it has the flow.
    HasFlow,
    /// 2: nobody has it, and it would begin it, if its services permit.
    Begins,
    /// 3: the packet was handed on too often, and is dropped.
    TooOften,
    /// 4: it does not have the table of the packet's era.
    EraUnknown,
}

impl Verdict {
    const ALL: [Self; 5] = [Self::Unknown, Self::HasFlow, Self::Begins, Self::TooOften, Self::EraUnknown];

    /// For programs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::HasFlow => "has-flow",
            Self::Begins => "would-begin",
            Self::TooOften => "handed-on-too-often",
            Self::EraUnknown => "era-unknown",
        }
    }
}

/// Number of a question and its answer: the first 12 bytes of the inner frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// The dispatcher's number for the question.
    pub id: u32,
    /// The answer.
    pub verdict: Verdict,
    /// Core of the unit that answers.
    pub core: u8,
    /// Bucket of the flow.
    pub bucket: u16,
    /// Era in force at the unit that answers.
    pub era: u32,
}

impl Trace {
    /// Writes it to the start of a frame; nothing, if that is shorter.
    pub fn write(&self, frame: &mut [u8]) {
        if frame.len() < super::ETHERNET_BYTES {
            return;
        }
        put_u32(frame, 0, self.id);
        put_u16(frame, 4, u16::from(self.verdict as u8) << 8 | u16::from(self.core));
        put_u16(frame, 6, self.bucket);
        put_u32(frame, 8, self.era);
    }

    /// Reads it from the start of a frame; `None`: that is shorter, or there is no such verdict.
    #[must_use]
    pub fn parse(frame: &[u8]) -> Option<Self> {
        let [i0, i1, i2, i3, verdict, core, b0, b1, e0, e1, e2, e3] = array_at::<12>(frame, 0)?;
        Some(Self {
            id: u32::from_be_bytes([i0, i1, i2, i3]),
            verdict: *Verdict::ALL.get(usize::from(verdict))?,
            core,
            bucket: u16::from_be_bytes([b0, b1]),
            era: u32::from_be_bytes([e0, e1, e2, e3]),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_and_stages_are_read_as_they_were_written() {
        let trace =
            Trace { id: 0x0102_0304, verdict: Verdict::HasFlow, core: 5, bucket: 0x0607, era: 0x0809_0a0b };
        let mut frame = [0; 14];
        trace.write(&mut frame);
        assert_eq!(frame, [1, 2, 3, 4, 1, 5, 6, 7, 8, 9, 10, 11, 0, 0]);
        assert_eq!(Trace::parse(&frame), Some(trace));
        frame[4] = 5;
        assert_eq!((Trace::parse(&frame), Trace::parse(&[0; 11])), (None, None));
        trace.write(&mut [0; 13]);
        for number in 0..4 {
            assert_eq!(TraceStage::of(number).map(TraceStage::number), Some(number));
        }
        assert_eq!(TraceStage::of(4), None);
        assert!((0u8..).zip(Verdict::ALL).all(|(number, verdict)| verdict as u8 == number));
    }
}
