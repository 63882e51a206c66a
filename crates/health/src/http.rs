//! HTTP/1.1 (RFC 9112) as far as a health check needs it: one request, the status of its answer, and where the answer ends:
//! a client that closes before that sends a reset into the middle of it. Heads and chunk sizes are parsed by `httparse`.

use std::fmt::Write as _;
use std::net::SocketAddr;

use httparse::{EMPTY_HEADER, Header, Response, Status};
use serde::{Deserialize, Serialize};

use super::tls::TlsCheck;

/// Heads, those of interim answers (1xx) included, have at most so many bytes.
const HEAD_BYTES_MAX: usize = 16 << 10;

/// Header lines of one head.
const HEADERS_MAX: usize = 64;

/// Content beyond this is not read: the connection is closed.
const CONTENT_BYTES_MAX: usize = 64 << 10;

/// Line with the size of a chunk, extensions included.
const CHUNK_LINE_BYTES_MAX: usize = 1 << 10;

/// Request and the statuses that mean success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpCheck {
    /// Path and query, beginning with `/`.
    pub path: String,
    /// The `Host` header; `None`: the name that TLS asks for, else the address and port that are checked.
    pub host: Option<String>,
    /// Statuses that mean success; empty: 200 to 399.
    pub statuses: Vec<u16>,
    /// Text that the answer's content has within its first `CONTENT_BYTES_MAX` bytes; `None`: whatever it has.
    pub body: Option<String>,
    /// Over TLS (HTTPS, RFC 9110 §4.2.2); `None`: in the clear.
    pub tls: Option<TlsCheck>,
}

impl HttpCheck {
    /// `GET path`, any status from 200 to 399.
    #[must_use]
    pub fn new(path: &str) -> Self {
        Self { path: path.to_owned(), host: None, statuses: Vec::new(), body: None, tls: None }
    }

    /// First mistake in it, for whoever reads the configuration.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        let plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
        if !self.path.starts_with('/') || !plain(&self.path) {
            return Some(
                "the path must begin with / and have no spaces; others are written as %20".to_owned(),
            );
        }
        if self.host.as_deref().is_some_and(|host| host.is_empty() || !plain(host)) {
            return Some("the host must be a name or address, perhaps with a port".to_owned());
        }
        if self.statuses.iter().any(|status| !(200..=599).contains(status)) {
            return Some("a status must be 200 to 599".to_owned());
        }
        self.tls.as_ref().and_then(TlsCheck::problem)
    }

    /// Bytes of the request. Characters that would end a header are left out.
    pub fn request(&self, address: SocketAddr) -> Vec<u8> {
        let plain = |text: &str| text.chars().filter(char::is_ascii_graphic).collect::<String>();
        let asked = self.tls.as_ref().and_then(|tls| tls.sni.as_ref());
        let host = match self.host.as_ref().or(asked) {
            Some(host) => plain(host),
            None if address.port() == if self.tls.is_some() { 443 } else { 80 } && address.is_ipv4() => {
                address.ip().to_string()
            }
            None => address.to_string(),
        };
        let mut text = format!("GET {} HTTP/1.1\r\nHost: {host}\r\n", plain(&self.path));
        // Writing to a string does not fail.
        let _ = write!(text, "User-Agent: anabranch-health\r\nAccept: */*\r\nConnection: close\r\n\r\n");
        text.into_bytes()
    }

    /// Whether this status means success.
    pub fn accepts(&self, status: u16) -> bool {
        if self.statuses.is_empty() { (200..400).contains(&status) } else { self.statuses.contains(&status) }
    }
}

/// An answer that breaks HTTP/1.1, or a limit of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Status line or a header line.
    #[error("the answer is not HTTP: {0}")]
    Head(httparse::Error),
    /// A status code outside 100–599.
    #[error("the answer is not HTTP: status {0}")]
    Code(u16),
    /// More than 16 KiB of headers.
    #[error("the answer's headers have more than {HEAD_BYTES_MAX} bytes")]
    HeadTooLong,
    /// `Content-Length` is no number, or there are several that differ (RFC 9112, 6.3).
    #[error("the answer's Content-Length is invalid")]
    Length,
    /// RFC 9112, 7.1.
    #[error("the answer's chunks are invalid")]
    Chunk,
}

/// End of a message (RFC 9112, 6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Framing {
    /// So many bytes are left.
    Length(u64),
    /// A chunk's size line comes next.
    ChunkSize,
    /// So many bytes of a chunk are left.
    Chunk(u64),
    /// The line end behind a chunk's data comes next.
    ChunkEnd,
    /// Trailer section after the last chunk.
    Trailers,
    /// Whatever comes until the connection ends.
    UntilClose,
    /// Nothing more belongs to the answer.
    End,
}

/// Reader of one answer, fed with the bytes of the connection. However they are cut, it makes a few steps per byte.
#[derive(Debug, Default)]
pub struct Answer {
    /// Bytes that were not understood yet, behind `used` ones that were.
    pending: Vec<u8>,
    used: usize,
    /// How many must wait before a head or line that was not whole is looked at again, unless its end came.
    look_at: usize,
    head_bytes: usize,
    content_bytes: usize,
    /// The content as far as it was read, where it is looked at.
    content: Option<Vec<u8>>,
    /// Final status and the end of its message, once the head is whole.
    head: Option<(u16, Framing)>,
    steps: u64,
}

impl Answer {
    /// One whose content is kept for [`Answer::contains`].
    #[must_use]
    pub fn with_content() -> Self {
        Self { content: Some(Vec::new()), ..Self::default() }
    }

    /// Whether this text is in the content that was read so far.
    #[must_use]
    pub fn contains(&self, text: &str) -> bool {
        let content = self.content.as_deref().unwrap_or_default();
        text.is_empty() || content.windows(text.len()).any(|window| window == text.as_bytes())
    }

    /// Takes bytes that came.
    ///
    /// # Errors
    /// When they are not the next of an HTTP answer. Nothing after that is of interest.
    pub fn receive(&mut self, bytes: &[u8]) -> Result<(), Malformed> {
        // The last bytes of before may begin the end of a head.
        let new = self.pending.len().saturating_sub(3);
        self.pending.extend_from_slice(bytes);
        let waiting = self.waiting().len();
        let may_end = waiting >= self.look_at || self.is_complete() || {
            let came = self.pending.get(new.max(self.used)..).unwrap_or_default();
            self.steps += came.len() as u64;
            match self.head {
                Some((_, Framing::ChunkSize)) => came.contains(&b'\n'),
                _ => has_empty_line(came),
            }
        };
        if may_end {
            self.look_at = 0;
            self.read()?;
        }
        if self.used > 0 {
            self.steps += self.pending.len() as u64;
            self.pending.drain(..std::mem::take(&mut self.used));
        }
        Ok(())
    }

    /// Reads what waits, as far as it goes.
    fn read(&mut self) -> Result<(), Malformed> {
        while self.head.is_none() {
            if !self.read_head()? {
                return Ok(());
            }
        }
        while self.read_content()? {}
        Ok(())
    }

    /// Status of the answer, once its head was read: 101 or 200 to 599.
    #[must_use]
    pub fn status(&self) -> Option<u16> {
        self.head.map(|(status, _)| status)
    }

    /// Whether all of the answer was read, or as much of it as is read of any.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.content_bytes >= CONTENT_BYTES_MAX || matches!(self.head, Some((_, Framing::End)))
    }

    /// Bytes that were looked at or moved so far, however often.
    #[must_use]
    pub const fn steps(&self) -> u64 {
        self.steps
    }

    fn waiting(&self) -> &[u8] {
        self.pending.get(self.used..).unwrap_or_default()
    }

    /// A head or line of at most so many bytes is not whole: it is looked at again when its end may have come, twice as much is there, or
    /// too much.
    fn wait(&mut self, bytes_max: usize) -> bool {
        self.look_at = (2 * self.waiting().len()).min(bytes_max + 1);
        false
    }

    /// One head; whether there was a whole one.
    fn read_head(&mut self) -> Result<bool, Malformed> {
        // Line ends in front of a head are not the end of one.
        let empty = self.waiting().iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
        (self.used, self.head_bytes) = (self.used + empty, self.head_bytes + empty);
        let mut headers = [EMPTY_HEADER; HEADERS_MAX];
        let mut response = Response::new(&mut headers);
        let waiting = self.pending.get(self.used..).unwrap_or_default();
        let parsed = response.parse(waiting).map_err(Malformed::Head)?;
        let Status::Complete(bytes) = parsed else {
            self.steps += waiting.len() as u64;
            let too_long = self.head_bytes + waiting.len() > HEAD_BYTES_MAX;
            return if too_long {
                Err(Malformed::HeadTooLong)
            } else {
                Ok(self.wait(HEAD_BYTES_MAX - self.head_bytes))
            };
        };
        self.steps += bytes as u64;
        self.head_bytes += bytes;
        if self.head_bytes > HEAD_BYTES_MAX {
            return Err(Malformed::HeadTooLong);
        }
        let code = response.code.unwrap_or_default();
        match code {
            // An interim answer has no content. 101 is final for us: another protocol follows.
            100 | 102..=199 => {}
            101 => self.head = Some((code, Framing::End)),
            200..=599 => self.head = Some((code, framing(code, response.headers)?)),
            _ => return Err(Malformed::Code(code)),
        }
        self.used += bytes;
        Ok(true)
    }

    /// One step through the content; whether another may follow at once.
    fn read_content(&mut self) -> Result<bool, Malformed> {
        let Some((_, framing)) = self.head else { return Ok(false) };
        // An answer that sends more than it is read of must not fill the memory, nor be looked at for what comes behind its end.
        if self.content_bytes >= CONTENT_BYTES_MAX || framing == Framing::End {
            self.used = self.pending.len();
            return Ok(false);
        }
        let waiting = self.pending.get(self.used..).unwrap_or_default();
        let Some((used, next)) = step(framing, waiting)? else {
            self.steps += waiting.len().min(HEAD_BYTES_MAX) as u64;
            let is_line = framing == Framing::ChunkSize;
            return Ok(self.wait(if is_line { CHUNK_LINE_BYTES_MAX } else { HEAD_BYTES_MAX }));
        };
        self.steps += 1;
        let moved = used > 0 || framing != next;
        let is_content = matches!(framing, Framing::Length(1..) | Framing::Chunk(1..) | Framing::UntilClose);
        if let Some(content) = self.content.as_mut().filter(|_| is_content) {
            let room = CONTENT_BYTES_MAX.saturating_sub(content.len());
            content.extend(waiting.get(..used.min(room)).unwrap_or_default());
        }
        if let Some((_, framing)) = &mut self.head {
            *framing = next;
        }
        self.content_bytes += used;
        self.used += used;
        Ok(moved)
    }
}

/// Whether a head may end here: a line end right behind another.
fn has_empty_line(bytes: &[u8]) -> bool {
    bytes.windows(2).any(|two| two == b"\n\n") || bytes.windows(3).any(|three| three == b"\n\r\n")
}

/// How many of the bytes that wait are the next part of a message, and what follows it; `None`: that part is not whole.
fn step(framing: Framing, waiting: &[u8]) -> Result<Option<(usize, Framing)>, Malformed> {
    let available = waiting.len();
    Ok(Some(match framing {
        Framing::Length(0) => (0, Framing::End),
        Framing::Length(left) => {
            let (used, left) = take(left, available);
            (used, Framing::Length(left))
        }
        Framing::Chunk(0) => (0, Framing::ChunkEnd),
        Framing::Chunk(left) => {
            let (used, left) = take(left, available);
            (used, Framing::Chunk(left))
        }
        Framing::ChunkEnd => match waiting.get(..2) {
            Some(b"\r\n") => (2, Framing::ChunkSize),
            Some(_) => return Err(Malformed::Chunk),
            None => return Ok(None),
        },
        // The parser takes no digit at all for a zero.
        Framing::ChunkSize if waiting.first().is_some_and(|byte| !byte.is_ascii_hexdigit()) => {
            return Err(Malformed::Chunk);
        }
        Framing::ChunkSize => match httparse::parse_chunk_size(waiting) {
            // As long as a line may be that came in pieces.
            Ok(Status::Complete((used, _))) if used > CHUNK_LINE_BYTES_MAX => return Err(Malformed::Chunk),
            Ok(Status::Complete((used, 0))) => (used, Framing::Trailers),
            Ok(Status::Complete((used, size))) => (used, Framing::Chunk(size)),
            Ok(Status::Partial) if available <= CHUNK_LINE_BYTES_MAX => return Ok(None),
            Ok(Status::Partial) | Err(_) => return Err(Malformed::Chunk),
        },
        Framing::Trailers => {
            let mut headers = [EMPTY_HEADER; HEADERS_MAX];
            match httparse::parse_headers(waiting, &mut headers) {
                Ok(Status::Complete((used, _))) if used > HEAD_BYTES_MAX => {
                    return Err(Malformed::HeadTooLong);
                }
                Ok(Status::Complete((used, _))) => (used, Framing::End),
                Ok(Status::Partial) if available <= HEAD_BYTES_MAX => return Ok(None),
                Ok(Status::Partial) => return Err(Malformed::HeadTooLong),
                Err(error) => return Err(Malformed::Head(error)),
            }
        }
        Framing::UntilClose => (available, Framing::UntilClose),
        Framing::End => return Ok(None),
    }))
}

/// How many of `available` bytes belong to what has `left`, and what is left then.
fn take(left: u64, available: usize) -> (usize, u64) {
    let used = usize::try_from(left).map_or(available, |left| left.min(available));
    (used, left - used as u64)
}

/// RFC 9112, 6.3: the answer to a `GET`.
fn framing(status: u16, headers: &[Header<'_>]) -> Result<Framing, Malformed> {
    let values = |name: &'static str| {
        let named = headers.iter().filter(move |header| header.name.eq_ignore_ascii_case(name));
        named.map(|header| header.value.trim_ascii())
    };
    if matches!(status, 204 | 304) {
        return Ok(Framing::End);
    }
    if let Some(last) = values("transfer-encoding").next_back() {
        let coding = last.rsplit(|&byte| byte == b',').next().unwrap_or_default().trim_ascii();
        let chunked = coding.eq_ignore_ascii_case(b"chunked");
        return Ok(if chunked { Framing::ChunkSize } else { Framing::UntilClose });
    }
    let mut length = None;
    for value in values("content-length").flat_map(|value| value.split(|&byte| byte == b',')) {
        let digits = value.trim_ascii();
        // The number type's own parser would take a sign.
        let number = std::str::from_utf8(digits).ok().filter(|text| text.bytes().all(|b| b.is_ascii_digit()));
        let number: u64 = number.and_then(|text| text.parse().ok()).ok_or(Malformed::Length)?;
        if length.is_some_and(|known| known != number) {
            return Err(Malformed::Length);
        }
        length = Some(number);
    }
    Ok(length.map_or(Framing::UntilClose, Framing::Length))
}
