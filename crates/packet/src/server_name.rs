//! The server that a client asks for: TLS's server_name (RFC 6066 §3) in the ClientHello, over TCP or in QUIC's Initials.
//!
//! [`look`] takes packet after packet of a flow until the name is known or nothing will come of it. A ClientHello with
//! post-quantum keys takes two segments or datagrams, whose parts may come in any order; what is collected of one has a limit
//! ([`HELLO_BYTES_MAX`], [`PIECES_MAX`]). The name is what the client says: it is not proven, and with Encrypted Client Hello it is
//! the name that everybody may see.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use crate::ip::{IpHeader, PROTOCOL_TCP, PROTOCOL_UDP};
use crate::quic::initial::{self, Initial, InitialKeys};
use crate::segment::{TCP_HEADER_BYTES, TCP_SYN};
use crate::tls::{self, Answer};
use crate::{array_at, u32_at};

#[cfg(test)]
mod tests;

/// Most that is collected of one ClientHello, bytes.
pub const HELLO_BYTES_MAX: usize = 4_096;
/// Segments or datagrams that one may be spread over, repeats included.
pub const PIECES_MAX: u8 = 8;
/// Longest name, bytes (RFC 1035 §2.3.4, as text).
pub const NAME_BYTES_MAX: usize = 253;
/// Longest label of a name, bytes.
const LABEL_BYTES_MAX: usize = 63;
/// UDP's header.
const UDP_HEADER_BYTES: usize = 8;
/// Initials of one datagram that are looked at (RFC 9000 §12.2).
const INITIALS_MAX: usize = 4;

/// Name of a host, in small letters, without a dot at its end.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServerName(Arc<str>);

impl ServerName {
    /// A name as a client writes it. `None`: it is none, as an address.
    #[must_use]
    pub fn new(name: &[u8]) -> Option<Self> {
        let name = name.strip_suffix(b".").unwrap_or(name);
        let text = std::str::from_utf8(name).ok().filter(|text| is_host_name(text))?;
        Some(Self(text.to_ascii_lowercase().into()))
    }
}

impl Deref for ServerName {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ServerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self)
    }
}

/// Letters, digits, hyphens and underscores in labels. Not all digits at the end: that would be an address.
fn is_host_name(text: &str) -> bool {
    let is_label = |label: &str| {
        (1..=LABEL_BYTES_MAX).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
    };
    let last = text.rsplit('.').next().unwrap_or_default();
    text.len() <= NAME_BYTES_MAX
        && text.split('.').all(is_label)
        && !last.bytes().all(|byte| byte.is_ascii_digit())
}

/// Names that are meant by one text: a name, or `*.` and a name for all that end with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamePattern {
    /// All names below this one, and not itself.
    below: bool,
    name: ServerName,
}

impl NamePattern {
    /// `None`: neither a name nor `*.` and a name.
    #[must_use]
    pub fn new(text: &str) -> Option<Self> {
        let (below, name) = match text.strip_prefix("*.") {
            Some(name) => (true, name),
            None => (false, text),
        };
        Some(Self { below, name: ServerName::new(name.as_bytes())? })
    }

    /// Whether the name is one of these.
    #[must_use]
    pub fn matches(&self, name: &ServerName) -> bool {
        if !self.below {
            return *name == self.name;
        }
        name.strip_suffix(&*self.name).is_some_and(|front| front.ends_with('.'))
    }
}

/// Content of a packet, as far as a ClientHello may stand in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Payload<'a> {
    /// Of a TCP segment or super-segment.
    Tcp {
        /// Sequence number of its first byte.
        sequence: u32,
        /// It opens a connection, or answers that.
        is_syn: bool,
        /// The bytes; empty in a bare acknowledgment.
        bytes: &'a [u8],
    },
    /// Of one or several datagrams, `stride` bytes each and the last possibly shorter.
    Udp {
        /// Bytes of each but the last.
        stride: usize,
        /// The datagrams, one behind the other.
        bytes: &'a [u8],
    },
}

impl<'a> Payload<'a> {
    /// Payload of a packet or super-packet. `segment_bytes`: payload of each segment of a super-packet, 0 in others. `None`: neither TCP
    /// nor UDP, or a fragment.
    #[inline]
    #[must_use]
    pub fn of_packet(header: &IpHeader, packet: &'a [u8], segment_bytes: u16) -> Option<Self> {
        if header.is_fragmented() {
            return None;
        }
        let upper = header.payload(packet);
        match header.protocol {
            PROTOCOL_TCP => {
                let [offset, flags] = array_at(upper, 12)?;
                let header_bytes = usize::from(offset >> 4) * 4;
                let bytes = upper.get(header_bytes.max(TCP_HEADER_BYTES)..)?;
                let is_syn = flags & TCP_SYN != 0;
                let sequence = u32_at(upper, 4)?.wrapping_add(u32::from(is_syn));
                Some(Self::Tcp { sequence, is_syn, bytes })
            }
            PROTOCOL_UDP => {
                let bytes = upper.get(UDP_HEADER_BYTES..)?;
                let stride = if segment_bytes == 0 { bytes.len() } else { usize::from(segment_bytes) };
                Some(Self::Udp { stride, bytes })
            }
            _ => None,
        }
    }

    /// Whether there is any.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let (Self::Tcp { bytes, .. } | Self::Udp { bytes, .. }) = self;
        bytes.is_empty()
    }

    /// Whether a ClientHello may begin here: a cheap look at the first bytes.
    #[inline]
    #[must_use]
    pub fn may_begin(&self) -> bool {
        match self {
            Self::Tcp { bytes, .. } => tls::begins_hello(bytes),
            Self::Udp { bytes, .. } => initial::may_be(bytes),
        }
    }
}

/// Parts of a ClientHello that have come so far: about 5 KB.
#[derive(Debug)]
pub struct Search {
    bytes: Box<[u8; HELLO_BYTES_MAX]>,
    /// One bit for each byte that has come.
    came: [u64; HELLO_BYTES_MAX / 64],
    carrier: Carrier,
    pieces_left: u8,
}

#[derive(Debug)]
enum Carrier {
    /// Sequence number of the first byte.
    Tcp { start: u32 },
    /// Keys of the client's Initials.
    Quic(Box<InitialKeys>),
}

impl Search {
    fn new(carrier: Carrier) -> Box<Self> {
        Box::new(Self {
            bytes: Box::new([0; HELLO_BYTES_MAX]),
            came: [0; HELLO_BYTES_MAX / 64],
            carrier,
            pieces_left: PIECES_MAX,
        })
    }

    /// Bytes at their place; what lies beyond the limit is left out.
    fn put(&mut self, at: usize, bytes: &[u8]) {
        let room = self.bytes.get_mut(at..).unwrap_or_default();
        for ((place, byte), at) in room.iter_mut().zip(bytes).zip(at..) {
            *place = *byte;
            if let Some(word) = self.came.get_mut(at / 64) {
                *word |= 1 << (at % 64);
            }
        }
    }

    /// All bytes from the first on that have come without a gap.
    fn whole(&self) -> &[u8] {
        let mut length = 0;
        for word in &self.came {
            length += word.trailing_ones() as usize;
            if *word != u64::MAX {
                break;
            }
        }
        self.bytes.get(..length).unwrap_or_default()
    }

    /// A piece that may or may not belong here.
    fn add(&mut self, payload: Payload<'_>) -> Answer {
        self.pieces_left = self.pieces_left.saturating_sub(1);
        let answer = match (payload, &mut self.carrier) {
            (Payload::Tcp { sequence, bytes, .. }, Carrier::Tcp { start }) => {
                // What begins before the first byte, or far behind it, is not of it.
                let at = sequence.wrapping_sub(*start) as usize;
                self.put(at, bytes);
                tls::of_records(self.whole())
            }
            (Payload::Udp { stride, bytes }, Carrier::Quic(_)) => self.add_datagrams(stride, bytes),
            _ => Answer::Nothing,
        };
        let is_full = self.whole().len() == HELLO_BYTES_MAX;
        match answer {
            Answer::Incomplete if is_full || self.pieces_left == 0 => Answer::Nothing,
            answer => answer,
        }
    }

    fn add_datagrams(&mut self, stride: usize, bytes: &[u8]) -> Answer {
        for datagram in bytes.chunks(stride.max(1)).take(usize::from(PIECES_MAX)) {
            let mut rest = datagram;
            for _ in 0..INITIALS_MAX {
                let Some((packet, behind)) = Initial::first(rest) else { break };
                self.add_initial(&packet);
                rest = behind;
            }
        }
        tls::of_handshake(self.whole())
    }

    fn add_initial(&mut self, packet: &Initial<'_>) {
        let Carrier::Quic(keys) = &mut self.carrier else { return };
        let opened = keys.open(packet).or_else(|| {
            // After a Retry the client begins again, with the keys of another id (RFC 9001 §5.2).
            let anew = InitialKeys::of_client(packet)?;
            let opened = anew.open(packet)?;
            **keys = anew;
            Some(opened)
        });
        for (at, bytes) in initial::crypto_frames(opened.as_deref().unwrap_or_default()) {
            self.put(at, bytes);
        }
    }
}

/// Looks at a flow's next payload. `search`: what of its ClientHello has come; none before that begins, and none again when
/// it is over.
pub fn look(search: &mut Option<Box<Search>>, payload: Payload<'_>) -> Option<ServerName> {
    if payload.is_empty() {
        return None;
    }
    let answer = match search {
        Some(search) => search.add(payload),
        None if payload.may_begin() => begin(search, payload),
        None => return None,
    };
    match answer {
        Answer::Incomplete => None,
        Answer::Nothing => {
            *search = None;
            None
        }
        Answer::Name(name) => {
            *search = None;
            Some(name)
        }
    }
}

fn begin(search: &mut Option<Box<Search>>, payload: Payload<'_>) -> Answer {
    let carrier = match payload {
        Payload::Tcp { sequence, bytes, .. } => {
            // Nearly always all of it is there, and nothing has to be kept.
            match tls::of_records(bytes) {
                Answer::Incomplete => Carrier::Tcp { start: sequence },
                answer => return answer,
            }
        }
        Payload::Udp { stride, bytes } => {
            let first = bytes.get(..stride.min(bytes.len())).and_then(Initial::first);
            let keys = first.and_then(|(packet, _)| InitialKeys::of_client(&packet));
            match keys {
                Some(keys) => Carrier::Quic(Box::new(keys)),
                None => return Answer::Nothing,
            }
        }
    };
    let mut begun = Search::new(carrier);
    let answer = begun.add(payload);
    // A server's Initial looks the same and cannot be opened: nothing of a ClientHello has come.
    if begun.came.iter().all(|word| *word == 0) {
        return Answer::Nothing;
    }
    *search = Some(begun);
    answer
}
