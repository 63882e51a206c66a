//! TCP connection tracking.

use services::flow::{Direction, Record, flags};
use services::spec::Timeouts;
use services::tcp::{ACK, FIN, RST, Segment, State, Verdict, begin, follow, timeout_s};

/// Bytes of one step.
pub const STEP_BYTES: usize = 12;
/// In a step's first byte: the reply direction.
pub const REPLY: u8 = 1;
/// In a step's first byte: the sequence number counts from what the direction sent last.
pub const NEAR_SEQ: u8 = 2;
/// In a step's first byte: the acknowledgment counts from what the other direction sent last.
pub const NEAR_ACK: u8 = 4;
/// In the first byte of all: flows may be picked up in mid-stream.
pub const MID_STREAM: u8 = 1;
/// In the first byte of all: only one direction comes by.
pub const ONE_WAY: u8 = 2;

/// A conversation keeps to the rules: refused segments leave no trace, only FIN and RST end a connection, and only what is
/// over is opened again. `data`: one byte, then steps of flags, numbers and lengths.
pub fn tcp_track(data: &[u8]) {
    let _ = Segment::of(data);
    let Some((first, rest)) = data.split_first() else { return };
    let mut record = Record { protocol: 6, ..Record::default() };
    if first & ONE_WAY != 0 {
        record.flags |= flags::ONE_WAY;
    }
    let mut begun = false;
    let (steps, _) = rest.as_chunks::<STEP_BYTES>();
    for step in steps {
        let direction = if step[0] & REPLY == 0 { Direction::Original } else { Direction::Reply };
        let Some(segment) = segment(step, &record, direction) else { continue };
        if begun {
            begun = one(&mut record, direction, &segment);
            continue;
        }
        let before = record;
        begun = begin(&mut record, &segment, first & MID_STREAM != 0);
        assert!(begun || record == before, "a segment that begins nothing left something");
        assert!(!begun || !State::of(&record).is_over() && !segment.has(RST));
    }
    assert!(timeout_s(&record, &Timeouts::default()) > 0);
}

fn segment(step: &[u8; STEP_BYTES], record: &Record, direction: Direction) -> Option<Segment> {
    let [bits, tcp_flags, s0, s1, a0, a1, w0, w1, p0, p1, option, scale] = *step;
    let offset = |near: u8, base: u32, high: u8, low: u8| match bits & near {
        0 => u32::from_be_bytes([high, low, low, high]),
        _ => base.wrapping_add_signed(i32::from(i16::from_be_bytes([high, low]))),
    };
    let seq = offset(NEAR_SEQ, record.tcp_end[direction as usize], s0, s1);
    let ack = offset(NEAR_ACK, record.tcp_end[direction.flipped() as usize], a0, a1);
    let mut tcp = vec![0, 1, 0, 2];
    tcp.extend(seq.to_be_bytes());
    tcp.extend(ack.to_be_bytes());
    tcp.extend([6 << 4, tcp_flags, w0, w1, 0, 0, 0, 0, option, 3, scale, 0]);
    Segment::parse(&tcp, u32::from(u16::from_be_bytes([p0, p1])))
}

/// `false`: the flow is removed.
fn one(record: &mut Record, direction: Direction, segment: &Segment) -> bool {
    let (before, state) = (*record, State::of(record));
    let verdict = follow(record, direction, segment);
    let after = State::of(record);
    assert!(timeout_s(record, &Timeouts::default()) > 0);
    let loose = before.flags & (flags::MID_STREAM | flags::ONE_WAY) != 0;
    match verdict {
        Verdict::Reopen => {
            assert!(
                segment.flags & ACK == 0 && (state.is_over() || loose),
                "a live connection was opened again"
            );
            *record = Record { protocol: 6, flags: before.flags & flags::ONE_WAY, ..Record::default() };
            return false;
        }
        Verdict::Accept => {}
        Verdict::Pass | Verdict::Invalid => {
            let same = |record: &Record| Record { state: record.state & 0x0f, ..*record };
            assert!(loose || same(&before) == same(record), "a segment that was not accepted left something");
        }
    }
    if after != state {
        assert!(after != State::Closed || segment.has(RST), "closed without a RST");
        assert!(
            after < State::FinOriginal || segment.has(RST | FIN) || after == State::TimeWait,
            "ended by {segment:?}"
        );
    }
    if state == State::Established && after == State::Closed {
        assert_eq!(segment.seq, before.tcp_end[direction as usize], "a RST that is not exact killed");
    }
    if record.flags & !before.flags & flags::REPLIED != 0 {
        assert!(direction == Direction::Reply && verdict == Verdict::Accept);
    }
    true
}
