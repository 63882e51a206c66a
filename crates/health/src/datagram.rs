//! Checks of services that speak UDP: one datagram, and what its answer has to be. DNS (RFC 1035) is one of them.

use serde::{Deserialize, Serialize};

use super::check::Failure;

/// Type A, class IN (RFC 1035 §3.2).
const QUESTION_END: [u8; 4] = [0, 1, 0, 1];
/// Longest name and longest label of it (RFC 1035 §2.3.4).
const NAME_BYTES_MAX: usize = 253;
const LABEL_BYTES_MAX: usize = 63;

/// A datagram that is answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UdpCheck {
    /// Its payload.
    pub send: String,
    /// Text that the answer has; `None`: whatever it has.
    pub body: Option<String>,
}

/// A name server that knows this name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsCheck {
    /// The name, with or without its final dot; `.` is the root.
    pub name: String,
}

impl DnsCheck {
    /// First mistake in it, for whoever reads the configuration.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        let name = self.name.strip_suffix('.').unwrap_or(&self.name);
        let label = |label: &str| {
            (1..=LABEL_BYTES_MAX).contains(&label.len()) && label.bytes().all(|byte| byte.is_ascii_graphic())
        };
        let sound = self.name == "."
            || (name.len() <= NAME_BYTES_MAX && !name.is_empty() && name.split('.').all(label));
        (!sound).then(|| "the name must be one of DNS, as www.example.net".to_owned())
    }
}

/// A check under way, as it goes over the wire.
#[derive(Clone, Debug)]
pub enum Question {
    /// Plain.
    Udp(UdpCheck),
    /// For a name, with the number that the answer must have.
    Dns(DnsCheck, u16),
}

impl Question {
    /// The payload to send.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        match self {
            Question::Udp(udp) => udp.send.as_bytes().to_vec(),
            Question::Dns(dns, id) => {
                // Recursion desired, one question.
                let mut bytes = [id.to_be_bytes(), [1, 0], [0, 1], [0, 0], [0, 0], [0, 0]].concat();
                for label in dns.name.split('.').filter(|label| !label.is_empty()) {
                    bytes.push(label.len().min(LABEL_BYTES_MAX) as u8);
                    bytes.extend(label.bytes().take(LABEL_BYTES_MAX));
                }
                bytes.push(0);
                bytes.extend(QUESTION_END);
                bytes
            }
        }
    }

    /// Outcome of the check by a datagram that came; `None`: it is no answer to this.
    #[must_use]
    pub fn outcome(&self, answer: &[u8]) -> Option<Result<(), Failure>> {
        match self {
            Question::Udp(UdpCheck { body: Some(body), .. }) => {
                let found =
                    body.is_empty() || answer.windows(body.len()).any(|window| window == body.as_bytes());
                Some(if found { Ok(()) } else { Err(Failure::Body(body.clone())) })
            }
            Question::Udp(_) => Some(Ok(())),
            Question::Dns(_, id) => {
                let header = answer.first_chunk::<12>()?;
                let is_ours = header[..2] == id.to_be_bytes() && header[2] & 0x80 != 0;
                let code = header[3] & 0x0f;
                is_ours.then_some(if code == 0 { Ok(()) } else { Err(Failure::Dns(code)) })
            }
        }
    }
}

/// A number for a question, that nobody can guess (RFC 5452 §4.3).
pub fn random_id() -> u16 {
    let mut bytes = [0; 2];
    // Without randomness the number is 0: the socket's port and address still tell answers from others.
    let _ = getrandom::fill(&mut bytes);
    u16::from_be_bytes(bytes)
}
