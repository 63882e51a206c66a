//! TCP connection tracking in the 14 bytes that [`Record`] has for it (RFC 9293, RFC 5382, RFC 5961, RFC 7857).
//!
//! The gateway is in the middle: it sees what both ends send, and not what is lost behind it. Of each direction `d` it
//! keeps the highest sequence number sent (`tcp_end[d]`) and the largest window that the other end offered to it
//! (`tcp_window[d]`, which is about data in direction `d`). With both it holds that
//!
//! * data may start at most one window behind `tcp_end[d]`, otherwise it is [`Verdict::Invalid`];
//! * an acknowledgment of what was not sent is invalid;
//! * old data and old acknowledgments pass and change nothing: an acknowledgment may have been lost behind us, and
//!   its sender's peer must be answered or the connection stalls;
//! * a RST ends the flow only when it has exactly the next sequence number (RFC 5961 §3). Another one in the window
//!   passes: a live receiver answers it with a challenge ACK, and the sender's next RST is exact.
//!
//! A SYN into a live connection passes too, in either direction. Either the receiver lives and sends a challenge ACK, which fits, or it has
//! forgotten the connection and accepts the new one; the gateway believes that only after the SYN, the SYN-ACK and
//! an ACK of it that does not fit the old connection.

mod segment;

use packet::icmp::is_icmp;
use packet::ip::{PROTOCOL_TCP, PROTOCOL_UDP, PROTOCOL_UDP_LITE};

use crate::flow::{Direction, Record, flags};
use crate::spec::Timeouts;
pub use segment::{ACK, FIN, NO_SCALE, PSH, RST, SCALE_MAX, SYN, Segment, URG};

/// How far behind `tcp_end` an acknowledgment is at least taken for a current one, bytes: windows grow while
/// acknowledgments are under way.
const ACK_WINDOW_BYTES_MIN: u32 = 66_000;
/// So far from what is known a segment may be that comes by in one direction only, bytes: a hole that losses before us leave.
const ONE_WAY_BYTES_MAX: u32 = 4 << 20;
/// Data and acknowledgments so far behind were never sent: the largest window there is (RFC 7323 §2.3).
const OLD_BYTES_MAX: u32 = 1 << 30;
/// In [`Record::state`]: a SYN passed into the live connection.
const PASSED_SYN: u8 = 0x40;
/// In [`Record::state`]: a SYN-ACK passed after it.
const PASSED_SYN_ACK: u8 = 0x80;
/// The same of the reply direction's SYN, and of the answer to it.
const REPLY_SYN: u8 = 0x10;
const REPLY_SYN_ACK: u8 = 0x20;
const SYN_ACK: u8 = SYN | ACK;
const PASSED: u8 = PASSED_SYN | PASSED_SYN_ACK | REPLY_SYN | REPLY_SYN_ACK;

/// Where a connection is. [`Record::state`] has it in its low four bits: read it with [`State::of`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum State {
    /// No TCP connection.
    None = 0,
    /// The original direction sent a SYN.
    SynSent = 1,
    /// Both sent a SYN and no SYN-ACK yet: simultaneous open.
    SynSentBoth = 2,
    /// The reply direction sent a SYN-ACK.
    SynReceived = 3,
    /// The handshake is complete, or the flow was picked up in mid-stream.
    Established = 4,
    /// The original direction sent its FIN.
    FinOriginal = 5,
    /// The reply direction sent its FIN.
    FinReply = 6,
    /// Both sent their FIN; the last ACK is missing.
    FinBoth = 7,
    /// Closed in order: only retransmissions come.
    TimeWait = 8,
    /// Ended by a RST.
    Closed = 9,
}

impl State {
    /// The state in [`Record::state`]. A number that is none is [`State::None`].
    #[inline]
    #[must_use]
    pub const fn from_u8(number: u8) -> State {
        match number & 0x0f {
            1 => State::SynSent,
            2 => State::SynSentBoth,
            3 => State::SynReceived,
            4 => State::Established,
            5 => State::FinOriginal,
            6 => State::FinReply,
            7 => State::FinBoth,
            8 => State::TimeWait,
            9 => State::Closed,
            _ => State::None,
        }
    }

    /// The state of a flow.
    #[inline]
    #[must_use]
    pub const fn of(record: &Record) -> State {
        State::from_u8(record.state)
    }

    /// The name in status reports: lower case, words joined by `-`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            State::None => "none",
            State::SynSent => "syn-sent",
            State::SynSentBoth => "syn-sent-both",
            State::SynReceived => "syn-received",
            State::Established => "established",
            State::FinOriginal => "fin-original",
            State::FinReply => "fin-reply",
            State::FinBoth => "fin-both",
            State::TimeWait => "time-wait",
            State::Closed => "closed",
        }
    }

    /// Over: nothing but retransmissions is expected, and a SYN begins anew.
    #[must_use]
    pub const fn is_over(self) -> bool {
        matches!(self, State::TimeWait | State::Closed)
    }
}

/// Verdict on a segment of a known flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Belongs to the connection: pass it on. It keeps the flow alive.
    Accept,
    /// Pass it on, but it proves nothing: old, or for the receiver to judge. It should not keep the flow alive.
    Pass,
    /// Contradicts the connection: drop it as [`packet::DropReason::TcpInvalid`].
    Invalid,
    /// A segment of a new connection between the same ports, the old one being over: remove the flow and decide anew, in the
    /// segment's direction.
    Reopen,
}

/// Puts the first segment of a flow into its record. `mid_stream_allowed`: a connection whose beginning was not seen may
/// be picked up. `false`: this segment cannot begin a flow (`packet::DropReason::NotNew`), and the record is as it was.
pub fn begin(record: &mut Record, segment: &Segment, mid_stream_allowed: bool) -> bool {
    let (original, reply) = (Direction::Original as usize, Direction::Reply as usize);
    if segment.flags & (SYN | ACK | RST) == SYN {
        record.state = State::SynSent as u8;
        record.tcp_end = [segment.end(), 0];
        record.scale = (NO_SCALE << 4) | segment.scale;
        // Until the SYN-ACK: bytes of data in the SYN (RFC 7413), of which the SYN-ACK may acknowledge any part.
        record.tcp_window[original] = segment.payload_bytes.min(u32::from(u16::MAX)) as u16;
        record.tcp_window[reply] = syn_window(segment.window, segment.scale);
        return true;
    }
    if !mid_stream_allowed || segment.flags & (SYN | ACK | RST) != ACK {
        return false;
    }
    resume(record, segment);
    true
}

/// Puts the first segment of a flow into its record, where the other direction may take another way: whatever it is, the
/// connection may be right. The record has [`flags::ONE_WAY`].
pub fn begin_loose(record: &mut Record, segment: &Segment) {
    if begin(record, segment, false) {
        return;
    }
    record.tcp_end = [segment.end(), segment.ack];
    record.tcp_window = [segment.window.max(1); 2];
    record.state = match () {
        () if segment.has(RST) => State::Closed,
        () if segment.has(FIN) => State::FinOriginal,
        // Anybody can send one segment: it counts as established when more is acknowledged.
        () => State::SynReceived,
    } as u8;
}

/// Picks a connection up in mid-stream, from a segment of the original direction.
fn resume(record: &mut Record, segment: &Segment) {
    record.state = if segment.has(FIN) { State::FinOriginal } else { State::Established } as u8;
    record.flags |= flags::MID_STREAM;
    record.tcp_end = [segment.end(), segment.ack];
    record.tcp_window = [segment.window.max(1); 2];
    record.scale = (SCALE_MAX << 4) | SCALE_MAX;
}

/// Of a connection only that it is there is known: its numbers are those of an earlier moment, and went on elsewhere since.
pub fn forget_sequence(record: &mut Record) {
    record.flags |= flags::RESYNC | flags::MID_STREAM;
    record.tcp_window = [u16::MAX; 2];
}

/// Follows a segment of a known flow. `direction`: its own. Sets [`flags::REPLIED`] when the reply direction proves to
/// be alive.
#[inline]
pub fn follow(record: &mut Record, direction: Direction, segment: &Segment) -> Verdict {
    if follow_data(record, direction, segment) {
        return Verdict::Accept;
    }
    follow_slowly(record, direction, segment)
}

/// Follows a segment that is nothing but data and an acknowledgment, in the window of an established connection.
/// `false`: it is not such a one, or has to be looked at more closely; nothing has changed.
#[inline]
pub fn follow_data(record: &mut Record, direction: Direction, segment: &Segment) -> bool {
    const KIND: u16 = flags::REPLIED | flags::MID_STREAM | flags::ONE_WAY;
    let fits = record.state == State::Established as u8
        && segment.flags & !PSH == ACK
        && record.flags & KIND == flags::REPLIED
        && in_window(record, direction, segment) == Verdict::Accept;
    if fits {
        advance(record, direction, segment);
    }
    fits
}

fn follow_slowly(record: &mut Record, direction: Direction, segment: &Segment) -> Verdict {
    if record.flags & flags::RESYNC != 0 {
        if segment.flags & (SYN | ACK | RST) != ACK {
            // Nothing is known that would speak against it: its receiver judges.
            return Verdict::Pass;
        }
        record.flags &= !flags::RESYNC;
        record.tcp_end[direction as usize] = segment.end();
        record.tcp_end[direction.flipped() as usize] = segment.ack;
    }
    let state = State::of(record);
    let verdict = match state {
        State::None => Verdict::Invalid,
        _ if record.flags & flags::ONE_WAY != 0 => one_way(record, state, direction, segment),
        _ if segment.has(RST) => reset(record, state, direction, segment),
        State::SynSent | State::SynSentBoth => opening(record, state, direction, segment),
        _ if segment.has(SYN) => late_syn(record, state, direction, segment),
        _ => data(record, state, direction, segment),
    };
    if verdict == Verdict::Accept && direction == Direction::Reply {
        record.flags |= flags::REPLIED;
    }
    verdict
}

/// `a` is not behind `b`, in sequence numbers (RFC 9293 §3.4).
#[inline]
const fn not_after(a: u32, b: u32) -> bool {
    b.wrapping_sub(a) as i32 >= 0
}

/// The later of two sequence numbers.
#[inline]
const fn later(a: u32, b: u32) -> u32 {
    if not_after(a, b) { b } else { a }
}

/// Bytes that the receiver of `direction`'s data ever offered at once, at least 1: a zero window is probed.
#[inline]
fn window(record: &Record, direction: Direction) -> u32 {
    let (original, reply) = (record.scale & 0x0f, record.scale >> 4);
    // Scaling needs the offers of both (RFC 7323 §2.2). The receiver's own scale counts.
    let shift = match direction {
        _ if original == NO_SCALE || reply == NO_SCALE => 0,
        Direction::Original => reply,
        Direction::Reply => original,
    };
    (u32::from(record.tcp_window[direction as usize]) << shift).max(1)
}

/// The window of a SYN is never scaled (RFC 7323 §2.2), later ones are: as a later one would be, rounded up.
fn syn_window(window: u16, scale: u8) -> u16 {
    let scale = if scale == NO_SCALE { 0 } else { scale };
    u32::from(window).div_ceil(1 << scale).max(1) as u16
}

/// Whether the numbers of a segment with ACK fit; nothing changes.
#[inline]
fn in_window(record: &Record, direction: Direction, segment: &Segment) -> Verdict {
    let (own, other) = (direction as usize, direction.flipped() as usize);
    let sent = record.tcp_end[own];
    let acked = record.tcp_end[other];
    let window_bytes = window(record, direction);
    let ahead = segment.seq.wrapping_sub(sent) as i32;
    if ahead > 0 && ahead as u32 > window_bytes {
        return Verdict::Invalid;
    }
    let unseen = segment.ack.wrapping_sub(acked) as i32;
    if unseen > 0 {
        return Verdict::Invalid;
    }
    let behind = (sent.wrapping_sub(segment.end()) as i32).max(0) as u32;
    let old = unseen.unsigned_abs();
    let ack_window = window(record, direction.flipped()).max(ACK_WINDOW_BYTES_MIN);
    if behind <= window_bytes && old <= ack_window {
        return Verdict::Accept;
    }
    if behind <= OLD_BYTES_MAX && old <= OLD_BYTES_MAX { Verdict::Pass } else { Verdict::Invalid }
}

/// Takes over what an accepted segment with ACK says.
#[inline]
fn advance(record: &mut Record, direction: Direction, segment: &Segment) {
    let (own, other) = (direction as usize, direction.flipped() as usize);
    record.tcp_end[own] = later(record.tcp_end[own], segment.end());
    record.tcp_window[other] = record.tcp_window[other].max(segment.window);
}

/// A segment without RST while only SYNs were seen.
fn opening(record: &mut Record, state: State, direction: Direction, segment: &Segment) -> Verdict {
    let (original, reply) = (Direction::Original as usize, Direction::Reply as usize);
    match (direction, segment.flags & (SYN | ACK)) {
        (Direction::Original, SYN) => {
            // Sent again, or the client began anew with another number. The reply's SYN, if any, stays.
            let (end, window, scale) = (record.tcp_end[reply], record.tcp_window[original], record.scale);
            begin(record, segment, false);
            if state == State::SynSentBoth {
                record.state = State::SynSentBoth as u8;
                record.tcp_end[reply] = end;
                record.tcp_window[original] = window;
                record.scale = (scale & 0xf0) | segment.scale;
            }
            Verdict::Accept
        }
        (Direction::Reply, SYN) => {
            record.state = State::SynSentBoth as u8;
            answered(record, segment);
            Verdict::Accept
        }
        (Direction::Reply, SYN_ACK) => {
            let data_bytes = if state == State::SynSent { record.tcp_window[original] } else { 0 };
            // An answer to an earlier attempt: the client would reset it (RFC 9293 §3.10.7.3).
            if record.tcp_end[original].wrapping_sub(segment.ack) > u32::from(data_bytes) {
                return Verdict::Invalid;
            }
            record.state = State::SynReceived as u8;
            answered(record, segment);
            Verdict::Accept
        }
        (Direction::Original, SYN_ACK) if state == State::SynSentBoth => {
            if segment.ack != record.tcp_end[reply] {
                return Verdict::Invalid;
            }
            // The other end has no other to send if our SYN never came there: a NAT before it had no flow yet.
            record.state = State::SynReceived as u8 | PASSED_SYN;
            Verdict::Accept
        }
        // A challenge ACK of an earlier connection: the client answers it with a RST and goes on.
        (Direction::Reply, ACK) if !segment.has(FIN) => Verdict::Pass,
        _ => Verdict::Invalid,
    }
}

/// Takes over the reply direction's SYN.
fn answered(record: &mut Record, segment: &Segment) {
    let (own, other) = (Direction::Reply as usize, Direction::Original as usize);
    let offered = record.scale & 0x0f;
    record.tcp_end[own] = segment.end();
    record.scale = offered | (segment.scale << 4);
    // Scaling is used when both offer it: otherwise the original direction's SYN meant what it said.
    if offered != NO_SCALE && segment.scale == NO_SCALE {
        let window = u32::from(record.tcp_window[own]) << offered;
        record.tcp_window[own] = window.min(u32::from(u16::MAX)) as u16;
        record.scale = (NO_SCALE << 4) | NO_SCALE;
    }
    let scale = if offered == NO_SCALE { NO_SCALE } else { segment.scale };
    record.tcp_window[other] = syn_window(segment.window, scale);
}

/// A SYN or SYN-ACK after the handshake's own ones.
fn late_syn(record: &mut Record, state: State, direction: Direction, segment: &Segment) -> Verdict {
    match (direction, segment.has(ACK)) {
        (Direction::Original, false) if state.is_over() => Verdict::Reopen,
        (Direction::Original, false) => {
            let again = state == State::SynReceived && segment.end() == record.tcp_end[direction as usize];
            if !again {
                record.state = (record.state & !PASSED) | PASSED_SYN;
            }
            Verdict::Pass
        }
        // The second SYN-ACK of a simultaneous open, or the first one again.
        (Direction::Original, true) if state == State::SynReceived => {
            if segment.ack != record.tcp_end[Direction::Reply as usize] {
                return Verdict::Invalid;
            }
            if record.state & PASSED_SYN == 0 {
                record.state = State::Established as u8;
            }
            Verdict::Accept
        }
        // Its SYN again, in place of the answer to ours.
        (Direction::Reply, false)
            if state == State::SynReceived
                && record.state & PASSED_SYN != 0
                && segment.end() == record.tcp_end[direction as usize] =>
        {
            Verdict::Pass
        }
        (Direction::Reply, true) => {
            if record.state & PASSED_SYN != 0 && in_window(record, direction, segment) != Verdict::Accept {
                record.state |= PASSED_SYN_ACK;
            }
            Verdict::Pass
        }
        // The other end has begun anew and asks itself.
        (Direction::Reply, false) if state.is_over() => Verdict::Reopen,
        (Direction::Reply, false) if state != State::SynReceived => {
            record.state = (record.state & !PASSED) | REPLY_SYN;
            Verdict::Pass
        }
        (Direction::Original, true)
            if record.state & REPLY_SYN != 0 && in_window(record, direction, segment) != Verdict::Accept =>
        {
            record.state |= REPLY_SYN_ACK;
            Verdict::Pass
        }
        (Direction::Original, true) | (Direction::Reply, false) => Verdict::Invalid,
    }
}

/// A segment with ACK and neither SYN nor RST, after the SYNs.
fn data(record: &mut Record, state: State, direction: Direction, segment: &Segment) -> Verdict {
    if state == State::Closed {
        return Verdict::Pass;
    }
    let other = direction.flipped() as usize;
    if record.flags & flags::MID_STREAM != 0 {
        pick_up(record, direction, segment);
    }
    match in_window(record, direction, segment) {
        Verdict::Accept => {}
        _ if direction == Direction::Original && record.state & PASSED_SYN_ACK != 0 => {
            // Both ends speak of a new connection, whose scales were not kept.
            record.flags &= !flags::REPLIED;
            resume(record, segment);
            return Verdict::Accept;
        }
        // So they do here, and whether the one may ask the other has to be decided.
        _ if direction == Direction::Reply && record.state & REPLY_SYN_ACK != 0 => return Verdict::Reopen,
        verdict => return verdict,
    }
    // It fits the connection as it was: whatever SYN passed meanwhile found both ends alive.
    record.state &= !PASSED;
    advance(record, direction, segment);
    // Only who has nothing left to send again acknowledges the other's FIN as the last thing it says.
    let acks_all = segment.ack == record.tcp_end[other]
        && segment.seq == record.tcp_end[direction as usize]
        && segment.payload_bytes == 0;
    let next = match (state, direction, segment.has(FIN)) {
        (State::SynReceived | State::Established, Direction::Original, true) => State::FinOriginal,
        (State::SynReceived | State::Established, Direction::Reply, true) => State::FinReply,
        (State::SynReceived, Direction::Original, false) => State::Established,
        (State::FinOriginal, Direction::Reply, true) | (State::FinReply, Direction::Original, true) => {
            State::FinBoth
        }
        (State::FinBoth, _, false) if acks_all => State::TimeWait,
        _ => state,
    };
    record.state = next as u8;
    Verdict::Accept
}

/// After a pick-up in mid-stream: data that went by before is acknowledged now, and of the other direction's sequence
/// numbers nothing better is known than its first segment.
fn pick_up(record: &mut Record, direction: Direction, segment: &Segment) {
    let (own, other) = (direction as usize, direction.flipped() as usize);
    let near =
        |a: u32, b: u32| (a.wrapping_sub(b) as i32).unsigned_abs() <= (u32::from(u16::MAX) << SCALE_MAX);
    let first_reply = direction == Direction::Reply && record.flags & flags::REPLIED == 0;
    if first_reply && near(segment.end(), record.tcp_end[own]) {
        record.tcp_end[own] = later(record.tcp_end[own], segment.end());
    }
    if near(segment.ack, record.tcp_end[other]) {
        record.tcp_end[other] = later(record.tcp_end[other], segment.ack);
    }
}

/// A RST, with or without ACK.
fn reset(record: &mut Record, state: State, direction: Direction, segment: &Segment) -> Verdict {
    let (own, other) = (direction as usize, direction.flipped() as usize);
    let ahead = segment.seq.wrapping_sub(record.tcp_end[own]) as i32;
    let exact = ahead == 0;
    let near = ahead.unsigned_abs() <= window(record, direction).max(ACK_WINDOW_BYTES_MIN);
    let closes = match (state, direction) {
        (State::SynSent, Direction::Reply) => {
            // Refused. The sequence number is not known yet, so the acknowledgment vouches (RFC 9293 §3.10.7.3).
            let data_bytes = u32::from(record.tcp_window[other]);
            if !segment.has(ACK) || record.tcp_end[other].wrapping_sub(segment.ack) > data_bytes {
                return Verdict::Invalid;
            }
            true
        }
        (State::SynSentBoth, Direction::Reply) => {
            exact || segment.has(ACK) && segment.ack == record.tcp_end[other]
        }
        // To a challenge ACK of an earlier connection, perhaps: its number says nothing about this one.
        (State::SynSent | State::SynSentBoth, Direction::Original) => exact,
        (State::FinBoth | State::TimeWait, _) => near,
        (State::Closed, _) => return Verdict::Pass,
        _ => exact,
    };
    if closes {
        record.state = State::Closed as u8;
        return Verdict::Accept;
    }
    // The answer of an end that forgot the connection, to a SYN that passed into it.
    let syn = if direction == Direction::Reply { PASSED_SYN } else { REPLY_SYN };
    let answers_syn = segment.has(ACK) && record.state & syn != 0;
    let closing = matches!(state, State::FinOriginal | State::FinReply | State::FinBoth | State::TimeWait);
    let beginning = matches!(state, State::SynSent | State::SynSentBoth);
    if near || answers_syn || closing || beginning { Verdict::Pass } else { Verdict::Invalid }
}

/// Only one direction comes by (direct return, the host's own connections): what it says is all there is to know.
///
/// Anybody can forge a SYN and an ACK. The connection counts as established, with the timeout of one, when its
/// client acknowledges more than it did at first: the other end sent something that arrived. Before that it is
/// [`State::SynReceived`], unanswered and short-lived. A forger needs one packet more for it, which is all that one
/// direction can prove; under pressure unanswered flows go first. Nor is a FIN believed whose number is far from what was
/// sent: it would let the next SYN take the connection's place.
fn one_way(record: &mut Record, state: State, direction: Direction, segment: &Segment) -> Verdict {
    let own = direction as usize;
    if segment.has(SYN) {
        if segment.has(ACK) {
            return Verdict::Pass;
        }
        if state.is_over() || state == State::FinOriginal {
            return Verdict::Reopen;
        }
        if state == State::SynSent && direction == Direction::Original {
            begin(record, segment, false);
            return Verdict::Accept;
        }
        return Verdict::Pass;
    }
    let ahead = segment.seq.wrapping_sub(record.tcp_end[own]) as i32;
    if segment.has(RST) {
        if ahead == 0 {
            record.state = State::Closed as u8;
            return Verdict::Accept;
        }
        return Verdict::Pass;
    }
    if state.is_over() {
        return Verdict::Pass;
    }
    if state == State::SynSent && direction == Direction::Reply {
        // The client's own segments take another way. Of this direction's numbers nothing was known yet.
        record.tcp_end[own] = segment.end();
    } else if ahead.unsigned_abs() > ONE_WAY_BYTES_MAX.saturating_add(segment.payload_bytes) {
        // Of one that was longer away it says no more than that it goes on.
        return if segment.has(FIN) { Verdict::Pass } else { Verdict::Accept };
    }
    record.tcp_end[own] = later(record.tcp_end[own], segment.end());
    let other = direction.flipped() as usize;
    let acked_more = segment.ack.wrapping_sub(record.tcp_end[other]) as i32 > 0;
    if state != State::SynSent && segment.has(ACK) {
        // What the unseen end has sent at least.
        record.tcp_end[other] = later(record.tcp_end[other], segment.ack);
    }
    record.state = match (state, direction) {
        (_, Direction::Original) if segment.has(FIN) => State::FinOriginal,
        (State::FinOriginal, _) => State::FinOriginal,
        (_, Direction::Reply) if segment.has(FIN) => State::FinReply,
        (State::FinReply, _) => State::FinReply,
        (State::SynSent, Direction::Original) => {
            record.tcp_end[other] = segment.ack;
            State::SynReceived
        }
        (State::SynReceived, Direction::Original) if !acked_more => State::SynReceived,
        _ => State::Established,
    } as u8;
    Verdict::Accept
}

/// Whether an ICMP error may quote a segment with this sequence number of a direction: one that was sent, and of which nobody
/// may know yet that it arrived (RFC 5927 §4.1). Who cannot see the connection does not know such a number.
#[must_use]
pub fn may_be_under_way(record: &Record, direction: Direction, seq: u32) -> bool {
    let behind = record.tcp_end[direction as usize].wrapping_sub(seq);
    if record.flags & (flags::ONE_WAY | flags::MID_STREAM) != 0 {
        // Of a direction that does not come by only acknowledgments are known.
        return (behind as i32).unsigned_abs() <= u32::from(u16::MAX) << SCALE_MAX;
    }
    behind <= window(record, direction).max(ACK_WINDOW_BYTES_MIN)
}

/// Whether a flow of which one direction comes by is as good as answered: TCP when its client acknowledged more than at
/// first, everything else with its second packet.
#[inline]
#[must_use]
pub(crate) const fn is_answered_unseen(record: &Record) -> bool {
    record.flags & flags::ONE_WAY != 0
        && !(record.protocol == PROTOCOL_TCP
            && matches!(State::of(record), State::SynSent | State::SynSentBoth | State::SynReceived))
}

/// How long a flow of any protocol may be silent, s (RFC 5382 REQ-5, RFC 4787 REQ-5, RFC 5508 REQ-2).
#[must_use]
pub fn timeout_s(record: &Record, timeouts: &Timeouts) -> u32 {
    let replied = record.flags & flags::REPLIED != 0;
    match record.protocol {
        PROTOCOL_TCP => match State::of(record) {
            // Picked up in mid-stream: anybody could have sent that one segment.
            State::Established if replied || record.flags & flags::ONE_WAY != 0 => timeouts.tcp_established_s,
            State::TimeWait | State::Closed => timeouts.tcp_closed_s,
            _ => timeouts.tcp_transitory_s,
        },
        PROTOCOL_UDP | PROTOCOL_UDP_LITE if replied => timeouts.udp_s,
        PROTOCOL_UDP | PROTOCOL_UDP_LITE => timeouts.udp_unreplied_s,
        protocol if is_icmp(protocol) => timeouts.icmp_s,
        _ => timeouts.other_s,
    }
}

#[cfg(test)]
mod tests;
