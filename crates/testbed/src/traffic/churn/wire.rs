//! Bytes on the wire: the line a connection begins with, and data that both ends compute from its seed.
//!
//! ```text
//! churn KIND ENDS ID SEED BYTES CHECKSUM\n       KIND S or L, ENDS c or s, the others in hexadecimal
//! ```
//! The line of a short connection is followed by BYTES of request, which the server answers with data derived from them. On a
//! long one BYTES says how many times as long its pauses are (0: once); chunks follow, and each is answered by a chunk: number (32 bits), length (16), pause until the next (16), data.

use std::io::{IoSlice, Write};
use std::os::fd::AsFd;

use fastrand::Rng;
use rustix::io::Errno;

use crate::traffic::pattern::{BODY_BYTES_MAX, body, checksum};

/// Length of the first line.
pub(super) const HELLO_BYTES: usize = 70;
/// Length of a chunk's head.
pub(super) const CHUNK_HEAD_BYTES: usize = 8;
/// Pause in the head of a connection's last chunk.
const LAST: u16 = u16::MAX;
/// Sizes of requests and answers of short connections, bytes; small ones are more frequent.
const SHORT_BYTES: (usize, usize) = (200, 64 * 1024);
/// Sizes of chunks of long connections, bytes.
const CHUNK_BYTES: (usize, usize) = (64, 8 * 1024);
/// Pauses between chunks, ms.
const PAUSE_MS: (u16, u16) = (100, 500);

/// Short or long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// One request, one answer.
    Short,
    /// Chunks until the client sends the last one.
    Long,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Short => "short",
            Kind::Long => "long",
        }
    }
}

/// The end whose FIN comes first. The other end's proves that it has got everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ends {
    ClientFirst,
    ServerFirst,
}

/// Direction of a chunk or a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    ToServer,
    ToClient,
}

/// The first line: all that the server has to know. It identifies a connection, however its addresses were changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hello {
    pub(super) kind: Kind,
    pub(super) ends: Ends,
    /// Differs for every connection of every client.
    pub(super) id: u64,
    /// All data of the connection comes from it.
    pub(super) seed: u64,
    /// Length of the request; of a long connection how many times as long its pauses are, 0: once.
    pub(super) bytes: u32,
}

impl Hello {
    /// The line.
    pub(super) fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut line = [b'\n'; HELLO_BYTES];
        let kind = if self.kind == Kind::Short { 'S' } else { 'L' };
        let ends = if self.ends == Ends::ClientFirst { 'c' } else { 's' };
        let (text, sum) = line.split_at_mut(HELLO_BYTES - 17);
        // Both have exactly the room they need.
        let _ =
            write!(&mut *text, "churn {kind} {ends} {:016x} {:016x} {:08x} ", self.id, self.seed, self.bytes);
        let _ = write!(&mut *sum, "{:016x}", checksum(self.seed, text));
        line
    }

    /// The line's meaning; `None` if any byte of it is not as [`encode`](Self::encode) writes it.
    pub(super) fn decode(line: &[u8; HELLO_BYTES]) -> Option<Hello> {
        let hex = |from: usize, digits: usize| {
            let text = std::str::from_utf8(line.get(from..from + digits)?).ok()?;
            u64::from_str_radix(text, 16).ok()
        };
        let kind = if line[6] == b'S' { Kind::Short } else { Kind::Long };
        let ends = if line[8] == b'c' { Ends::ClientFirst } else { Ends::ServerFirst };
        let (id, seed, bytes) = (hex(10, 16)?, hex(27, 16)?, hex(44, 8)?);
        let hello = Hello { kind, ends, id, seed, bytes: u32::try_from(bytes).ok()? };
        (hello.encode() == *line && bytes <= BODY_BYTES_MAX as u64).then_some(hello)
    }

    /// A pause of a long connection, ns.
    pub(super) fn pause_ns(&self, pause_ms: u16) -> u64 {
        u64::from(pause_ms) * u64::from(self.bytes.max(1)) * 1_000_000
    }

    /// The request of a short connection.
    pub(super) fn request(&self) -> &'static [u8] {
        body(self.seed, self.bytes as usize)
    }

    /// The answer to a request. It depends on every byte of the request.
    pub(super) fn answer(&self, request: &[u8]) -> &'static [u8] {
        let seed = checksum(self.seed, request);
        body(seed, size(&mut Rng::with_seed(seed), SHORT_BYTES))
    }
}

/// Another seed for each number.
pub(super) fn mix(seed: u64, number: u64) -> u64 {
    checksum(seed, &number.to_be_bytes())
}

/// Length of a request.
pub(super) fn request_bytes(random: &mut Rng) -> u32 {
    size(random, SHORT_BYTES) as u32
}

/// As many between 64 and 128 bytes as between 4 and 8 KiB.
fn size(random: &mut Rng, (min, max): (usize, usize)) -> usize {
    let bytes = min as f64 * (max as f64 / min as f64).powf(random.f64());
    (bytes as usize).clamp(min, max)
}

/// A chunk of a long connection, computed by the end that sends it and by the end that checks it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chunk {
    /// Time until the next, ms; `None` if it is the last.
    pub(super) pause_ms: Option<u16>,
    number: u32,
    body: &'static [u8],
}

impl Chunk {
    pub(super) fn new(seed: u64, number: u32, way: Way, last: bool) -> Chunk {
        let seed = mix(seed, u64::from(number) << 1 | u64::from(way == Way::ToClient));
        let mut random = Rng::with_seed(seed);
        let body = body(seed, size(&mut random, CHUNK_BYTES));
        let pause_ms = random.u16(PAUSE_MS.0..=PAUSE_MS.1);
        Chunk { pause_ms: (!last).then_some(pause_ms), number, body }
    }

    pub(super) fn head(&self) -> [u8; CHUNK_HEAD_BYTES] {
        let mut head = [0; CHUNK_HEAD_BYTES];
        head[..4].copy_from_slice(&self.number.to_be_bytes());
        head[4..6].copy_from_slice(&(self.body.len() as u16).to_be_bytes());
        head[6..].copy_from_slice(&self.pause_ms.unwrap_or(LAST).to_be_bytes());
        head
    }

    /// The chunk that has this head: the next one, which may or may not be the last. `None` if it is neither.
    pub(super) fn with_head(seed: u64, number: u32, way: Way, head: [u8; CHUNK_HEAD_BYTES]) -> Option<Chunk> {
        [false, true].into_iter().map(|last| Chunk::new(seed, number, way, last)).find(|c| c.head() == head)
    }

    pub(super) fn body(&self) -> &'static [u8] {
        self.body
    }
}

/// Bytes to be sent, or expected: a head and a body.
#[derive(Debug, Default)]
pub(super) struct Piece {
    head: Head,
    body: &'static [u8],
    done: usize,
}

/// Room for the first line and a chunk's head.
#[derive(Debug)]
struct Head {
    bytes: [u8; HELLO_BYTES + CHUNK_HEAD_BYTES],
    len: usize,
}

impl Default for Head {
    fn default() -> Self {
        Self { bytes: [0; HELLO_BYTES + CHUNK_HEAD_BYTES], len: 0 }
    }
}

impl Piece {
    /// The first line, if any, the head of a chunk, if any, and the body.
    pub(super) fn new(hello: Option<&Hello>, chunk: Option<&Chunk>, body: &'static [u8]) -> Piece {
        let mut head = Head::default();
        let line = hello.map(Hello::encode);
        let chunk = chunk.map(Chunk::head);
        let parts = [line.as_ref().map(|l| &l[..]), chunk.as_ref().map(|c| &c[..])];
        for part in parts.into_iter().flatten() {
            head.bytes[head.len..head.len + part.len()].copy_from_slice(part);
            head.len += part.len();
        }
        Piece { head, body, done: 0 }
    }

    /// A chunk with its head.
    pub(super) fn chunk(chunk: &Chunk) -> Piece {
        Piece::new(None, Some(chunk), chunk.body())
    }

    /// A body alone.
    pub(super) fn body(body: &'static [u8]) -> Piece {
        Piece::new(None, None, body)
    }

    pub(super) fn is_done(&self) -> bool {
        self.done == self.head.len + self.body.len()
    }

    fn rest(&self) -> (&[u8], &'static [u8]) {
        let head = self.head.bytes.get(self.done.min(self.head.len)..self.head.len).unwrap_or_default();
        let body = self.body.get(self.done.saturating_sub(self.head.len)..).unwrap_or_default();
        (head, body)
    }

    /// Writes as much as there is room for; the number of bytes.
    pub(super) fn write_to(&mut self, fd: impl AsFd) -> Result<usize, Errno> {
        let before = self.done;
        while !self.is_done() {
            let (head, body) = self.rest();
            match rustix::io::writev(&fd, &[IoSlice::new(head), IoSlice::new(body)]) {
                Ok(written) => self.done += written,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(self.done - before)
    }

    /// Compares what has arrived; the number of bytes that belong to this piece, or `None` if one is wrong.
    pub(super) fn check(&mut self, bytes: &[u8]) -> Option<usize> {
        let (head, body) = self.rest();
        let in_head = head.len().min(bytes.len());
        let (first, second) = bytes.split_at(in_head);
        let in_body = body.len().min(second.len());
        if head.get(..in_head) != Some(first) || body.get(..in_body) != second.get(..in_body) {
            return None;
        }
        self.done += in_head + in_body;
        Some(in_head + in_body)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn hello() -> Hello {
        let seed = 0x0123_4567_89ab_cdef;
        Hello { kind: Kind::Short, ends: Ends::ServerFirst, id: 7, seed, bytes: 5_000 }
    }

    #[test]
    fn a_line_with_any_other_byte_is_refused() {
        for kind in [Kind::Short, Kind::Long] {
            for ends in [Ends::ClientFirst, Ends::ServerFirst] {
                let hello = Hello { kind, ends, ..hello() };
                let mut line = hello.encode();
                assert_eq!(line[HELLO_BYTES - 1], b'\n');
                assert_eq!(Hello::decode(&line), Some(hello));
                for at in 0..HELLO_BYTES {
                    for bit in 0..8 {
                        line[at] ^= 1 << bit;
                        assert_eq!(Hello::decode(&line), None, "byte {at}, bit {bit}");
                        line[at] ^= 1 << bit;
                    }
                }
            }
        }
        let long = Hello { bytes: BODY_BYTES_MAX as u32 + 1, ..hello() };
        assert_eq!(Hello::decode(&long.encode()), None);
    }

    #[test]
    fn an_answer_depends_on_the_request() {
        let hello = hello();
        let mut request = hello.request().to_vec();
        let answer = hello.answer(&request);
        assert_eq!(answer, hello.answer(hello.request()));
        *request.last_mut().unwrap() ^= 1;
        assert_ne!(answer, hello.answer(&request));
    }

    #[test]
    fn a_piece_takes_exactly_its_own_bytes() {
        let chunk = Chunk::new(3, 4, Way::ToServer, false);
        let bytes = [&chunk.head()[..], chunk.body()].concat();
        for cut in 0..bytes.len() {
            let mut piece = Piece::chunk(&chunk);
            assert_eq!(piece.check(&bytes[..cut]), Some(cut));
            assert!(!piece.is_done());
            let more = [&bytes[cut..], &b"next"[..]].concat();
            assert_eq!(piece.check(&more), Some(bytes.len() - cut));
            assert!(piece.is_done());
        }
        for at in 0..bytes.len() {
            let mut wrong = bytes.clone();
            wrong[at] ^= 0x10;
            assert_eq!(Piece::chunk(&chunk).check(&wrong), None, "byte {at}");
        }
    }

    #[test]
    fn chunks_tell_which_they_are() {
        let head = Chunk::new(3, 4, Way::ToServer, true).head();
        assert_eq!(Chunk::with_head(3, 4, Way::ToServer, head).unwrap().pause_ms, None);
        assert!(Chunk::with_head(3, 5, Way::ToServer, head).is_none());
        let other = Chunk::new(3, 4, Way::ToClient, true);
        assert_ne!(other.body(), Chunk::new(3, 4, Way::ToServer, true).body());
        for number in 0..1_000 {
            let chunk = Chunk::new(9, number, Way::ToServer, false);
            assert!((64..=8_192).contains(&chunk.body().len()));
            assert!((100..=500).contains(&chunk.pause_ms.unwrap()));
            assert!((200..=65_536).contains(&request_bytes(&mut Rng::with_seed(u64::from(number)))));
        }
    }
}
