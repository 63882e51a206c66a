//! Messages between the gateway and its helper for health checks: JSON, one line each, over a stream socket.
//!
//! ```text
//! gateway ─▶ helper   Target* Apply      all targets, each time something changed
//! helper  ─▶ gateway  News*  Alive*      verdicts as they come; a sign of life every second
//! ```

use std::io;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{HealthNews, HealthTarget, Known};

/// Longest line, bytes: a command with as many arguments as the configuration allows.
pub const LINE_BYTES_MAX: usize = 32 << 20;

/// Time between two signs of life of the helper, ms.
pub const ALIVE_MS: u64 = 1_000;

/// For the helper.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToHelper {
    /// One of the new targets, with the verdict that the gateway has of it.
    Target(Box<HealthTarget>, Option<Known>),
    /// Those since the last `Apply` are all there are.
    Apply,
}

/// From the helper.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromHelper {
    /// News about a target.
    News(HealthNews),
    /// It is well; what it could not give up of its rights, empty as a rule.
    Alive {
        /// For people.
        kept: String,
    },
}

/// A message as it goes over the socket.
///
/// # Errors
/// Never for the messages of this module.
pub fn line(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec(message)?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// Puts lines together from the pieces that a socket gives.
#[derive(Debug, Default)]
pub struct Lines {
    pending: Vec<u8>,
}

impl Lines {
    /// Takes bytes that came, and hands on the messages that they complete.
    ///
    /// # Errors
    /// When a line is no message, or longer than [`LINE_BYTES_MAX`]: the other end is not what it should be.
    pub fn receive<T: DeserializeOwned>(&mut self, bytes: &[u8], mut take: impl FnMut(T)) -> io::Result<()> {
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let (head, tail) = rest.split_at(end);
            self.pending.extend_from_slice(head);
            rest = tail.get(1..).unwrap_or_default();
            let message = serde_json::from_slice(&self.pending);
            self.pending.clear();
            take(message?);
        }
        if self.pending.len() + rest.len() > LINE_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a line without end"));
        }
        self.pending.extend_from_slice(rest);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::{HealthKind, HealthSpec, HttpCheck, TlsCheck};

    #[test]
    fn messages_arrive_in_whatever_pieces_they_come() {
        let tls = TlsCheck { sni: Some("a.example".to_owned()), authorities: Some("/etc/ca.pem".into()) };
        let http = HttpCheck { tls: Some(tls), body: Some("two\nlines".to_owned()), ..HttpCheck::new("/") };
        let target = HealthTarget {
            id: 7,
            server: "web".to_owned(),
            address: "[2001:db8::1]:443".parse().unwrap(),
            spec: HealthSpec::new(HealthKind::Http(http)),
        };
        let known = Some(Known { up: false, silent: true });
        let sent = [ToHelper::Target(Box::new(target), known), ToHelper::Apply];
        let bytes: Vec<u8> = sent.iter().flat_map(|message| line(message).unwrap()).collect();
        for piece in [1, 7, bytes.len()] {
            let (mut lines, mut got) = (Lines::default(), Vec::new());
            for bytes in bytes.chunks(piece) {
                lines.receive(bytes, |message: ToHelper| got.push(message)).unwrap();
            }
            assert_eq!(got, sent);
        }
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let mut lines = Lines::default();
        assert!(lines.receive(b"{\"Nonsense\":1}\n", |_: ToHelper| {}).is_err());
        let endless = vec![b' '; LINE_BYTES_MAX + 1];
        assert!(Lines::default().receive(&endless, |_: ToHelper| {}).is_err());
    }
}
