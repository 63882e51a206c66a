#![allow(clippy::unwrap_used, reason = "tests")]

//! Conversations, written down segment by segment. `>` is the original direction, `<` the reply.

mod parse;

use super::*;
use Verdict::{Accept, Invalid, Pass, Reopen};
use proptest::prelude::*;

/// One flow and what happens to it.
struct Talk {
    record: Record,
}

/// `flags seq:bytes ack window [scale]`, flags as tcpdump writes them: `S`, `.` for ACK, `F`, `R`, `P`.
fn segment(text: &str) -> Segment {
    let mut words = text.split_whitespace();
    let flags = words.next().unwrap().chars().fold(0, |flags, letter| {
        flags
            | match letter {
                'S' => SYN,
                'F' => FIN,
                'R' => RST,
                'P' => PSH,
                '.' => ACK,
                _ => panic!("{letter}"),
            }
    });
    let (seq, payload_bytes) = words.next().unwrap().split_once(':').unwrap();
    let mut number = || words.next().map_or(0, |word| word.parse::<u32>().unwrap());
    let (ack, window) = (number(), number());
    let scale = words.next().map_or(NO_SCALE, |word| word.parse().unwrap());
    Segment {
        seq: seq.parse().unwrap(),
        ack,
        payload_bytes: payload_bytes.parse().unwrap(),
        window: window as u16,
        flags,
        scale,
        sack_permitted: false,
    }
}

impl Talk {
    fn new(first: &str) -> Talk {
        let mut record = Record { protocol: 6, ..Record::default() };
        assert!(begin(&mut record, &segment(first), false), "{first}");
        Talk { record }
    }

    /// Client 100, server 500, no scales, windows of 10,000.
    fn established() -> Talk {
        let mut talk = Talk::new("S 100:0 0 10000");
        talk.says("< S. 500:0 101 10000", Accept).says("> . 101:0 501 10000", Accept);
        talk.is(State::Established)
    }

    fn verdict(&mut self, line: &str) -> Verdict {
        let (direction, rest) = line.split_at(1);
        let direction = if direction == ">" { Direction::Original } else { Direction::Reply };
        follow(&mut self.record, direction, &segment(rest))
    }

    fn says(&mut self, line: &str, expected: Verdict) -> &mut Talk {
        let verdict = self.verdict(line);
        assert_eq!(verdict, expected, "{line}: {:?}", self.record);
        self
    }

    /// As it is expected, and nothing in the record changed.
    fn says_in_vain(&mut self, line: &str, expected: Verdict) -> &mut Talk {
        let before = self.record;
        self.says(line, expected);
        assert_eq!(self.record, before, "{line}");
        self
    }

    fn is(self, state: State) -> Talk {
        assert_eq!(State::of(&self.record), state, "{:?}", self.record);
        self
    }

    fn at(&mut self, state: State) -> &mut Talk {
        assert_eq!(State::of(&self.record), state, "{:?}", self.record);
        self
    }

    fn timeout(&self) -> u32 {
        timeout_s(&self.record, &Timeouts::default())
    }
}

#[test]
fn a_connection_from_beginning_to_end() {
    let mut talk = Talk::new("S 100:0 0 10000");
    assert_eq!(talk.timeout(), 240);
    talk.at(State::SynSent).says("< S. 500:0 101 10000", Accept).at(State::SynReceived);
    assert_eq!((talk.timeout(), talk.record.flags), (240, flags::REPLIED));
    talk.says("> . 101:0 501 10000", Accept).at(State::Established);
    assert_eq!(talk.timeout(), 7_440);
    talk.says("> P. 101:300 501 10000", Accept).says("< . 501:0 401 10000", Accept);
    talk.says("< P. 501:1400 401 10000", Accept).says("> . 401:0 1901 10000", Accept);
    talk.says("> F. 401:0 1901 10000", Accept).at(State::FinOriginal);
    assert_eq!(talk.timeout(), 240);
    talk.says("< F. 1901:0 402 10000", Accept).at(State::FinBoth);
    assert_eq!(talk.timeout(), 240);
    talk.says("> . 402:0 1902 10000", Accept).at(State::TimeWait);
    assert_eq!(talk.timeout(), 10);
    // The last ACK was lost.
    talk.says("< F. 1901:0 402 10000", Accept).says("> . 402:0 1902 10000", Accept).at(State::TimeWait);
}

#[test]
fn only_a_syn_begins_a_flow_unless_mid_stream_is_allowed() {
    for first in ["S. 100:0 7 1", ". 100:0 7 1", "F. 100:0 7 1", "R 100:0 0 0", "R. 100:0 7 0"] {
        let mut record = Record::default();
        assert!(!begin(&mut record, &segment(first), false), "{first}");
        assert_eq!(record, Record::default());
        let picked_up = matches!(first, ". 100:0 7 1" | "F. 100:0 7 1");
        assert_eq!(begin(&mut record, &segment(first), true), picked_up, "{first}");
    }
}

#[test]
fn half_closed_connections_go_on() {
    let mut talk = Talk::established();
    talk.says("> F. 101:0 501 10000", Accept).says("< . 501:0 102 10000", Accept);
    for at in (501..100_501).step_by(10_000) {
        talk.says(&format!("< . {at}:10000 102 10000"), Accept);
        talk.says(&format!("> . 102:0 {} 10000", at + 10_000), Accept).at(State::FinOriginal);
    }
    talk.says("> F. 101:0 501 10000", Pass).at(State::FinOriginal);
    talk.says("< F. 100501:0 102 10000", Accept).at(State::FinBoth);
    let mut talk = Talk::established();
    talk.says("< F. 501:0 101 10000", Accept).at(State::FinReply);
    talk.says("> . 101:500 502 10000", Accept).at(State::FinReply);
    talk.says("> F. 601:0 502 10000", Accept).at(State::FinBoth);
    talk.says("< . 502:0 602 10000", Accept).at(State::TimeWait);
}

/// With the other end's FIN the end of its data may be lost behind us. Who sends that again has nothing acknowledged yet.
#[test]
fn a_half_closed_connection_is_not_over_before_its_tail_has_arrived() {
    let mut talk = Talk::established();
    talk.says("> F. 101:0 501 10000", Accept).says("< . 501:1000 102 10000", Accept);
    talk.says("< F. 1501:0 102 10000", Accept).at(State::FinBoth);
    talk.says("< . 501:1000 102 10000", Accept).at(State::FinBoth);
    talk.says("< . 1501:0 102 10000", Accept).at(State::FinBoth);
    assert_eq!(talk.timeout(), 240);
    talk.says("> . 102:0 1501 10000", Accept).at(State::FinBoth);
    talk.says("< F. 1501:0 102 10000", Accept).at(State::FinBoth);
    talk.says("> . 102:0 1502 10000", Accept).at(State::TimeWait);
}

#[test]
fn both_ends_open_at_once() {
    let mut talk = Talk::new("S 100:0 0 10000");
    talk.says("< S 500:0 0 10000", Accept).at(State::SynSentBoth);
    talk.says("> S 100:0 0 10000", Accept).at(State::SynSentBoth);
    talk.says("> S. 100:0 501 10000", Accept).at(State::SynReceived);
    talk.says("< S. 500:0 101 10000", Pass).at(State::SynReceived);
    talk.says("> . 101:10 501 10000", Accept).at(State::Established);
    let mut talk = Talk::new("S 100:0 0 10000");
    talk.says("< S 500:0 0 10000", Accept).says("< S. 500:0 101 10000", Accept).at(State::SynReceived);
    talk.says("> S. 100:0 501 10000", Accept).at(State::Established);
    talk.says("< . 501:10 101 10000", Accept);
}

/// Each behind a NAT: the first SYN of the inside dies before the other NAT, which has no flow yet, so that the other end gets
/// nothing but the SYN-ACK, and answers that with an ACK.
#[test]
fn both_ends_open_and_one_syn_never_arrives() {
    let mut talk = Talk::new("S 100:0 0 10000");
    talk.says("< S 500:0 0 10000", Accept).says("> S. 100:0 501 10000", Accept).at(State::SynReceived);
    talk.says("< S 500:0 0 10000", Pass).says("> S. 100:0 501 10000", Accept).at(State::SynReceived);
    talk.says("< . 501:0 101 10000", Accept).says("< P. 501:10 101 10000", Accept);
    talk.says("> P. 101:10 511 10000", Accept).at(State::Established);
    talk.says("< F. 511:0 111 10000", Accept).says("> F. 111:0 512 10000", Accept).at(State::FinBoth);
}

#[test]
fn both_ends_close_at_once() {
    let mut talk = Talk::established();
    talk.says("> F. 101:0 501 10000", Accept).says("< F. 501:0 101 10000", Accept).at(State::FinBoth);
    talk.says("> . 102:0 502 10000", Accept).says("< . 502:0 102 10000", Accept).at(State::TimeWait);
}

#[test]
fn lost_acknowledgments_do_not_stall() {
    // 66 KB were acknowledged, but the sender did not hear of it and sends the first bytes again.
    let mut talk = Talk::established();
    for at in (101..66_101).step_by(1_000) {
        talk.says(&format!("> P. {at}:1000 501 10000"), Accept);
        talk.says(&format!("< . 501:0 {} 10000", at + 1_000), Accept);
    }
    talk.says_in_vain("> P. 101:1000 501 10000", Pass).says("< . 501:0 66101 10000", Accept);
    // An acknowledgment that was on its way for long.
    talk.says_in_vain("< . 501:0 100 10000", Pass);
}

#[test]
fn blind_resets_do_not_kill_and_exact_ones_do() {
    let mut talk = Talk::established();
    for at in [501, 1_501, 2_501] {
        talk.says(&format!("< . {at}:1000 101 10000"), Accept);
        talk.says(&format!("> . 101:0 {} 10000", at + 1_000), Accept);
    }
    for line in
        ["< R 42:0", "< R 3500:0", "< R. 3500:0 101", "< R 3502:0", "< R 13000:0", "> R 102:0", "> R 100:0"]
    {
        talk.says_in_vain(line, Pass);
    }
    for line in ["< R 1000000:0", "< R 4000000000:0", "> R 1000000:0", "> R. 3000000000:0 3501"] {
        talk.says_in_vain(line, Invalid);
    }
    talk.says("< R. 3501:0 101", Accept).at(State::Closed);
    assert_eq!(talk.timeout(), 10);
    // What was under way passes, and its answer too.
    talk.says_in_vain("> P. 101:100 3501 10000", Pass).says_in_vain("< R 3501:0", Pass);
    let mut talk = Talk::established();
    talk.says("> P. 101:100 501 10000", Accept).says("> R 201:0", Accept).at(State::Closed);
}

#[test]
fn inexact_resets_pass_while_a_connection_closes() {
    let mut talk = Talk::established();
    talk.says("< . 501:3000 101 10000", Accept).says("> P. 101:1000 3501 10000", Accept);
    talk.says("< F. 3501:0 1101 10000", Accept).says("> . 1101:0 3502 10000", Accept).at(State::FinReply);
    talk.says("> R. 1101:0 3502", Accept).at(State::Closed);
    talk.says_in_vain("< R 2501:0", Pass);
    let mut talk = Talk::established();
    talk.says("> F. 101:0 501 10000", Accept).says("< F. 501:0 102 10000", Accept);
    talk.says("< R 400:0", Accept).at(State::Closed);
    let mut talk = Talk::established();
    talk.says("> F. 101:0 501 10000", Accept).says_in_vain("< R 2000000000:0", Pass).at(State::FinOriginal);
}

#[test]
fn a_refused_connection_closes_only_by_its_own_number() {
    let mut talk = Talk::new("S 100:0 0 10000");
    talk.says_in_vain("< R. 0:0 100", Invalid)
        .says_in_vain("< R 0:0", Invalid)
        .says_in_vain("< R. 0:0 90101", Invalid);
    talk.says("< R. 0:0 101", Accept).at(State::Closed).says("> S 100:0 0 10000", Reopen);
}

#[test]
fn an_old_connection_answers_a_new_syn_with_a_challenge() {
    let mut talk = Talk::new("S 100:0 0 65535 8");
    talk.says_in_vain("< . 145824453:0 643160523 240", Pass)
        .says_in_vain("> R 643160523:0", Pass)
        .at(State::SynSent);
    assert_eq!(talk.record.flags & flags::REPLIED, 0);
    talk.says("> S 100:0 0 65535 8", Accept)
        .says("< S. 500:0 101 250 0", Accept)
        .says("> . 101:0 501 256", Accept);
    talk.at(State::Established);
}

#[test]
fn an_answer_to_an_earlier_attempt_is_refused() {
    let mut talk = Talk::new("S 100:0 0 65535 8");
    talk.says_in_vain("< S. 145824453:0 643160523 240", Invalid);
    talk.says("> S 100:0 0 65535 8", Accept).says("< S. 145758918:0 101 250", Accept);
    talk.says("> P. 101:1 145758919 256", Accept).at(State::Established);
}

#[test]
fn a_client_that_begins_anew_with_another_number_is_followed() {
    let mut talk = Talk::new("S 100:0 0 10000");
    talk.says("> S 777000:0 0 10000", Accept).says_in_vain("< S. 500:0 101 10000", Invalid);
    talk.says("< S. 500:0 777001 10000", Accept)
        .says("> . 777001:0 501 10000", Accept)
        .at(State::Established);
}

#[test]
fn a_syn_on_a_live_connection_gets_its_challenge() {
    let mut talk = Talk::established();
    talk.says("> P. 101:100 501 10000", Accept).says("< . 501:0 201 10000", Accept);
    talk.says("> S 2000000:0 0 10000", Pass).at(State::Established);
    assert_eq!(talk.timeout(), 7_440);
    talk.says("< . 501:0 201 10000", Accept).says("> R. 201:0 501", Accept).at(State::Closed);
    talk.says("> S 2000000:0 0 10000", Reopen);
    // The client did not send that SYN: its next segment shows that all is as before.
    let mut talk = Talk::established();
    talk.says("> S 2000000:0 0 10000", Pass).says("< . 501:0 101 10000", Accept);
    talk.says("> P. 101:100 501 10000", Accept).says("< S. 70000:0 80000 1", Pass);
    talk.says_in_vain("> . 900000:0 70001 10000", Invalid).says("< . 501:9 201 10000", Accept);
}

#[test]
fn both_ends_may_have_forgotten_the_connection() {
    for isn in [3_000_000_000u32, 1_000_000_000] {
        let mut talk = Talk::established();
        talk.says(&format!("> S {isn}:0 0 10000"), Pass)
            .says(&format!("< S. {}:0 {} 9000", !isn, isn + 1), Pass);
        talk.says(&format!("> . {}:0 {} 9000", isn + 1, !isn + 1), Accept).at(State::Established);
        talk.says(&format!("< P. {}:700 {} 9000", !isn + 1, isn + 1), Accept);
        talk.says(&format!("> . {}:0 {} 9000", isn + 1, !isn + 701), Accept);
    }
    // The server forgot it and refuses the new one.
    let mut talk = Talk::established();
    talk.says("> S 3000000000:0 0 10000", Pass).says_in_vain("< R. 0:0 3000000001", Pass);
}

#[test]
fn forged_answers_to_a_forged_syn_do_not_replace_a_live_connection() {
    let mut talk = Talk::established();
    talk.says("> S 3000000000:0 0 10000", Pass).says("< S. 7000000:0 3000000001 1", Pass);
    // The real client answers the forged SYN-ACK with what fits.
    talk.says("> . 101:0 501 10000", Accept).says("> P. 101:100 501 10000", Accept);
    talk.says("> . 3000000001:0 7000001 1", Invalid).says("< . 501:5 201 10000", Accept);
}

#[test]
fn ports_are_used_again_after_the_end() {
    let mut talk = Talk::established();
    talk.says("> F. 101:0 501 10000", Accept).says("< F. 501:0 102 10000", Accept);
    talk.says("> . 102:0 502 10000", Accept).at(State::TimeWait);
    talk.says_in_vain("< S 9000:0 0 10000", Reopen).says_in_vain("> S 9000:0 0 10000", Reopen);
    let mut talk = Talk::established();
    talk.says("> R 101:0", Accept).says_in_vain("> S 9000:0 0 10000", Reopen);
}

#[test]
fn data_beyond_the_window_is_refused() {
    let mut talk = Talk::established();
    talk.says("> . 10101:100 501 10000", Accept).says_in_vain("> . 20202:1 501 10000", Invalid);
    talk.says_in_vain("> . 3000000000:1 501 10000", Invalid).says_in_vain("< . 10502:1 101 10000", Invalid);
    talk.says_in_vain("> . 101:1 502 10000", Invalid).says_in_vain("< . 501:1 10202 10000", Invalid);
}

#[test]
fn zero_windows_are_probed_and_opened() {
    let mut talk = Talk::new("S 100:0 0 0");
    talk.says("< S. 500:0 101 0", Accept).says("> . 101:0 501 0", Accept);
    talk.says("> . 101:1 501 0", Accept).says("< . 501:0 101 0", Accept).says("< . 501:1 101 0", Accept);
    talk.says_in_vain("> . 200:1 501 0", Invalid).says("< . 502:0 102 5000", Accept);
    talk.says("> . 102:1400 502 5000", Accept).says("> . 2902:1400 502 5000", Accept);
}

#[test]
fn keepalives_are_accepted() {
    let mut talk = Talk::established();
    talk.says("> P. 101:100 501 10000", Accept).says("< . 501:0 201 10000", Accept);
    for _ in 0..3 {
        talk.says("> . 200:0 501 10000", Accept).says("< . 501:0 201 10000", Accept);
        talk.says("< . 500:1 201 10000", Accept).says("> . 201:0 501 10000", Accept);
    }
}

#[test]
fn windows_scale_when_both_offer_it_in_their_syns() {
    let scaled = |client: &str, server: &str| {
        let mut talk = Talk::new(&format!("S 100:0 0 64000 {client}"));
        talk.says(&format!("< S. 500:0 101 64000 {server}"), Accept).says("> . 101:0 501 1000", Accept);
        talk.says("< . 501:0 101 1000", Accept);
        talk.is(State::Established)
    };
    // Data of the client may be 1,000 << 7 ahead, data of the server 1,000 << 2; before that the SYN's 64,000.
    scaled("2", "7").says_in_vain("> . 128102:1 501 1000", Invalid).says("> . 128101:1 501 1000", Accept);
    scaled("2", "7").says_in_vain("< . 64502:1 101 1000", Invalid).says("< . 64501:1 101 1000", Accept);
    for (client, server) in [("2", ""), ("", "7"), ("", "")] {
        scaled(client, server)
            .says_in_vain("> . 64102:1 501 1000", Invalid)
            .says("> . 64101:1 501 1000", Accept);
        scaled(client, server)
            .says_in_vain("< . 64502:1 101 1000", Invalid)
            .says("< . 64501:1 101 1000", Accept);
    }
    // A scale outside of a SYN means nothing.
    scaled("", "").says("< . 501:0 101 1000 14", Accept).says_in_vain("> . 64102:1 501 1000", Invalid);
}

#[test]
fn sequence_numbers_wrap_around() {
    let mut talk = Talk::new("S 4294967295:0 0 10000");
    talk.says("< S. 4294967290:0 0 10000", Accept).says("> . 0:0 4294967291 10000", Accept);
    let (mut client, mut server) = (0u32, 4_294_967_291u32);
    for _ in 0..70_000 {
        talk.says(&format!("> P. {client}:65000 {server} 65535"), Accept);
        client = client.wrapping_add(65_000);
        talk.says(&format!("< P. {server}:65000 {client} 65535"), Accept);
        server = server.wrapping_add(65_000);
    }
    talk.at(State::Established).says(&format!("> R {client}:0"), Accept).at(State::Closed);
}

#[test]
fn mid_stream_connections_are_picked_up() {
    let mut record = Record { protocol: 6, ..Record::default() };
    assert!(begin(&mut record, &segment("P. 101:100 501 1000"), true));
    let mut talk = Talk { record };
    assert_eq!((talk.timeout(), talk.record.flags), (240, flags::MID_STREAM));
    // Data was under way in both directions, and the scales are unknown.
    talk.says("< P. 40501:1400 51 1000", Accept).says("> . 201:0 61501 1000", Accept);
    talk.says("< P. 61501:1400 201 1000", Accept).says("> P. 500000:1 61501 1000", Accept);
    assert_eq!(talk.timeout(), 7_440);
    talk.says_in_vain("> P. 2000000000:1 61501 1000", Invalid).says("< R 900:0", Pass);
    talk.says("> F. 500001:0 62901 1000", Accept).at(State::FinOriginal);
    talk.says("< F. 62901:0 500002 1000", Accept).says("> . 500002:0 62902 1000", Accept).at(State::TimeWait);
}

#[test]
fn one_way_flows_are_followed_loosely() {
    let mut talk = Talk::new("S 100:0 0 10000");
    talk.record.flags |= flags::ONE_WAY;
    talk.says("> S 100:0 0 10000", Accept).says("> . 101:0 987654321 10000", Accept).at(State::SynReceived);
    talk.says("> P. 101:500 987654321 10000", Accept).at(State::SynReceived);
    assert_eq!(talk.timeout(), 240, "a SYN and an ACK prove nothing");
    talk.says("> . 601:0 987654421 10000", Accept).at(State::Established);
    assert_eq!(talk.timeout(), 7_440);
    talk.says("> P. 101:5000000 2 10000", Accept).says("> . 3:0 2999999999 10000", Accept);
    talk.says_in_vain("> S 9:0 0 1", Pass).says_in_vain("> R 102:0", Pass).at(State::Established);
    talk.says("> F. 5000101:0 1 1", Accept).at(State::FinOriginal).says("> . 5000102:0 2 1", Accept);
    talk.at(State::FinOriginal).says("> S 9:0 0 1", Reopen).says("> R 5000102:0", Accept).at(State::Closed);
    talk.says("> S 9:0 0 1", Reopen);
}

/// Who does not see the connection does not know its numbers, and must not open its flow to another one.
#[test]
fn blind_fins_do_not_end_what_is_seen_in_one_direction() {
    let mut talk = Talk::new("S 100:0 0 10000");
    talk.record.flags |= flags::ONE_WAY;
    talk.says("> . 101:0 500 10000", Accept).says("> . 101:50 600 10000", Accept).at(State::Established);
    for wild in [3_000_000_000u32, 1_000_000_000, 10_000_000, 4_280_000_000] {
        talk.says_in_vain(&format!("> F. {wild}:0 1 1"), Pass).says_in_vain("> S 9:0 0 1", Pass);
        // Nor do they come nearer step by step.
        talk.says(&format!("> . {wild}:0 1 1"), Accept).says(&format!("> F. {wild}:0 1 1"), Pass);
        talk.at(State::Established).says("> S 9:0 0 1", Pass);
    }
    // What was lost before us makes a gap.
    talk.says("> . 3000101:100 600 1", Accept).says("> F. 3000201:0 600 1", Accept).at(State::FinOriginal);
    talk.says("> S 9:0 0 1", Reopen);
}

/// The answers of one whose own segments take another way after the first: of their numbers nothing was known.
#[test]
fn the_other_direction_alone_is_followed_too() {
    let mut record = Record { protocol: 6, flags: flags::ONE_WAY, ..Record::default() };
    begin_loose(&mut record, &segment("S 100:0 0 10000"));
    let mut talk = Talk { record };
    talk.says("< S. 3000000000:0 101 10000", Pass).says("< . 3000000001:9 101 1", Accept);
    talk.says("< F. 3000000010:0 101 1", Accept).at(State::FinReply);
}

#[test]
fn data_in_the_syn_is_answered_in_whole_or_in_part() {
    for (ack, verdict) in [(101, Accept), (601, Accept), (400, Accept), (602, Invalid), (100, Invalid)] {
        let mut talk = Talk::new("S 100:500 0 10000");
        talk.says(&format!("< S. 500:0 {ack} 10000"), verdict);
        if verdict == Accept {
            talk.says(&format!("> . {ack}:{} 501 10000", 601 - ack), Accept).at(State::Established);
        }
    }
}

#[test]
fn impossible_segments_of_a_handshake_are_refused() {
    let mut talk = Talk::new("S 100:0 0 10000");
    talk.says_in_vain("> . 101:0 501 10000", Invalid).says_in_vain("> S. 100:0 501 10000", Invalid);
    talk.says_in_vain("< F. 500:0 101 10000", Invalid).says_in_vain("> F. 101:0 501 10000", Invalid);
    talk.says("< S. 500:0 101 10000", Accept).says_in_vain("< S 500:0 0 10000", Invalid);
    talk.says_in_vain("< S. 500:0 101 10000", Pass).says_in_vain("> S 100:0 0 10000", Pass);
    talk.says_in_vain("> . 101:0 502 10000", Invalid)
        .says("> . 101:0 501 10000", Accept)
        .at(State::Established);
    let mut talk = Talk { record: Record::default() };
    talk.says_in_vain("> . 1:0 1 1", Invalid);
}

#[test]
fn every_protocol_has_its_timeout() {
    let timeouts = Timeouts::default();
    for (protocol, bits, expected) in [
        (17, 0, 30),
        (17, flags::REPLIED, 180),
        (136, flags::REPLIED, 180),
        (1, 0, 60),
        (58, flags::REPLIED, 60),
        (47, 0, 600),
        (6, 0, 240),
    ] {
        let record = Record { protocol, flags: bits, ..Record::default() };
        assert_eq!(timeout_s(&record, &timeouts), expected, "{protocol} {bits}");
    }
}

#[test]
fn states_are_numbers_and_names() {
    for number in 0..=u8::MAX {
        let state = State::from_u8(number);
        assert!(!state.name().is_empty());
        if number < 10 {
            assert_eq!(state as u8, number);
        }
    }
}

fn any_segment() -> impl Strategy<Value = (bool, Segment)> {
    let near = prop_oneof![0u32..3_000, any::<u32>()];
    let flags = prop::sample::select(vec![SYN, SYN | ACK, ACK, ACK | PSH, FIN | ACK, RST, RST | ACK]);
    (any::<bool>(), flags, near.clone(), near, 0u32..2_000, any::<u16>(), 0u8..16).prop_map(
        |(original, flags, seq, ack, payload_bytes, window, scale)| {
            let scale = scale.min(NO_SCALE);
            (original, Segment { seq, ack, payload_bytes, window, flags, scale, sack_permitted: false })
        },
    )
}

proptest! {
    /// Refused and passed segments leave no trace but that a SYN passed, and an end comes only by FIN or RST.
    #[test]
    fn any_conversation_keeps_to_the_rules(
        mid_stream: bool,
        first in any_segment(),
        rest in prop::collection::vec(any_segment(), 0..40),
    ) {
        let mut record = Record { protocol: 6, ..Record::default() };
        if !begin(&mut record, &first.1, mid_stream) {
            return Ok(());
        }
        let mut ends = first.1.has(FIN);
        for (original, segment) in rest {
            let before = record;
            let direction = if original { Direction::Original } else { Direction::Reply };
            let verdict = follow(&mut record, direction, &segment);
            if verdict != Accept && record.flags & flags::MID_STREAM == 0 {
                prop_assert_eq!(Record { state: before.state & 0x0f, ..before },
                    Record { state: record.state & 0x0f, ..record });
            }
            if verdict == Reopen {
                // Or the other end's SYN and its answer have passed.
                prop_assert!(State::of(&before).is_over() || before.state & 0x20 != 0);
            }
            ends |= verdict == Accept && segment.has(FIN | RST);
            prop_assert!(ends || State::of(&record) <= State::Established);
        }
    }
}

/// The other end lost the connection and begins one itself, as peers with fixed ports do.
#[test]
fn the_other_end_may_begin_anew() {
    let mut talk = Talk::established();
    talk.says("> P. 101:100 501 10000", Accept).says("< . 501:0 201 10000", Accept);
    talk.says("< S 2000000:0 0 10000", Pass).at(State::Established);
    assert_eq!(talk.timeout(), 7_440);
    talk.says("> . 201:0 501 10000", Accept).says("< R. 501:0 201", Accept).at(State::Closed);
    talk.says_in_vain("< S 2000000:0 0 10000", Reopen);
    // Nobody sent it: all is as before.
    let mut talk = Talk::established();
    talk.says("< S 2000000:0 0 10000", Pass).says("> . 101:0 501 10000", Accept);
    talk.says("> S. 70000:0 80000 1", Invalid).says_in_vain("< . 900000:0 70001 10000", Invalid);
    talk.says("> P. 101:9 501 10000", Accept).at(State::Established);
    // Both have forgotten it.
    let mut talk = Talk::established();
    talk.says("< S 3000000000:0 0 10000", Pass).says("> S. 70:0 3000000001 9000", Pass);
    talk.says("< . 3000000001:0 71 9000", Reopen);
    // The first one has, and refuses the new one.
    let mut talk = Talk::established();
    talk.says("< S 3000000000:0 0 10000", Pass).says_in_vain("> R. 0:0 3000000001", Pass);
}
