//! JSON that comes over local sockets: requests to a running node, and what it and its helper for health checks tell each other.

use control::protocol::{FlowFilter, Request};
use health::protocol::{FromHelper, Lines, ToHelper, line};

/// A request that is understood says the same when it is written and read again; lines come in any pieces.
pub fn control_request(data: &[u8]) {
    let Some((&pieces, text)) = data.split_first() else { return };
    if let Ok(text) = std::str::from_utf8(text) {
        if let Ok(request) = serde_json::from_str::<Request>(text) {
            let again = serde_json::to_string(&request).expect("requests can be written");
            assert_eq!(serde_json::from_str::<Request>(&again).expect("what was written"), request);
        }
        if let Ok(filter) = text.parse::<FlowFilter>() {
            let again = serde_json::to_string(&filter).expect("filters can be written");
            assert_eq!(serde_json::from_str::<FlowFilter>(&again).expect("what was written"), filter);
        }
    }
    assert_eq!(lines::<ToHelper>(text, text.len().max(1)), lines(text, usize::from(pieces).max(1)));
    assert_eq!(lines::<FromHelper>(text, text.len().max(1)), lines(text, usize::from(pieces).max(1)));
}

/// The messages of these bytes, cut in pieces; each says the same when it is written and read again.
fn lines<T>(text: &[u8], bytes: usize) -> Vec<T>
where
    T: serde::de::DeserializeOwned + serde::Serialize + PartialEq + std::fmt::Debug,
{
    let (mut reader, mut messages) = (Lines::default(), Vec::new());
    for piece in text.chunks(bytes) {
        if reader.receive(piece, |message: T| messages.push(message)).is_err() {
            break;
        }
    }
    for message in &messages {
        let mut again = Vec::new();
        let written = line(message).expect("messages can be written");
        Lines::default().receive(&written, |message: T| again.push(message)).expect("what was written");
        assert_eq!(again.first(), Some(message));
    }
    messages
}
