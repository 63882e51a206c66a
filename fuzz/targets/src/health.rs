//! Answers of backends that are checked, from whoever sits at their addresses.

use health::datagram::{DnsCheck, Question, UdpCheck};
use health::http::{Answer, Malformed};

/// Steps at most, also when each byte comes alone: it is looked at for the end of a head with three others, copied, and parsed a few times.
const STEPS_PER_BYTE: u64 = 10;

/// An answer by HTTP, DNS or UDP: `pieces:8 | answer`. What an HTTP answer means does not depend on how it was cut on its way, nor do the
/// steps to read it grow faster than it does.
pub fn health_answer(data: &[u8]) {
    let Some((&pieces, answer)) = data.split_first() else { return };
    let (whole, _) = read(answer, answer.len().max(1));
    let (cut, steps) = read(answer, usize::from(pieces).max(1));
    match (&whole, &cut) {
        // What is wrong with a head or line that does not end may be seen later.
        (Err(_), Ok((_, complete, _))) => assert!(!complete, "read in pieces of {pieces} bytes it is whole"),
        _ => assert_eq!(whole, cut, "read in pieces of {pieces} bytes it is another answer"),
    }
    assert!(steps <= STEPS_PER_BYTE * (answer.len() as u64 + 16), "{steps} steps for {} bytes", answer.len());
    let id = u16::from_be_bytes([pieces, pieces ^ 0x5a]);
    let question = |id| Question::Dns(DnsCheck { name: "www.example.net".into() }, id);
    if question(id).outcome(answer).is_some() {
        assert!(question(id ^ 1).outcome(answer).is_none(), "an answer to two questions");
    }
    let check = UdpCheck { send: "ping".into(), body: Some("pong".into()) };
    assert!(Question::Udp(check).outcome(answer).is_some());
}

/// Status, whether the answer is whole, whether a text is in it.
type Outcome = Result<(Option<u16>, bool, bool), Malformed>;

/// Outcome of an answer that comes in pieces of so many bytes, and the steps that were made.
fn read(answer: &[u8], bytes: usize) -> (Outcome, u64) {
    let mut reader = Answer::with_content();
    for piece in answer.chunks(bytes) {
        if let Err(error) = reader.receive(piece) {
            return (Err(error), reader.steps());
        }
    }
    (Ok((reader.status(), reader.is_complete(), reader.contains("ok"))), reader.steps())
}
