//! The part of HTTP/1.1 (RFC 9112) that a health check needs: one request, the status of its answer, and where the answer
//! ends: who closes before, sends a reset into the middle of it.

use std::fmt::Write as _;
use std::net::SocketAddr;

/// An answer whose status is not known after so many bytes is none: interim answers (1xx) may precede it.
const ANSWER_BYTES_MAX: usize = 16 << 10;

/// So much of an answer is read at most; what is longer is cut off.
const CONTENT_BYTES_MAX: usize = 64 << 10;

/// What to ask for and what is right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpCheck {
    /// Path and query, beginning with `/`.
    pub path: String,
    /// The `Host` header; `None`: the address and port that are checked.
    pub host: Option<String>,
    /// Statuses that mean success; empty: 200 to 399.
    pub statuses: Vec<u16>,
}

impl HttpCheck {
    /// `GET path`, any status from 200 to 399.
    #[must_use]
    pub fn new(path: &str) -> Self {
        Self { path: path.to_owned(), host: None, statuses: Vec::new() }
    }

    /// What is wrong with it.
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
        None
    }

    /// The request. Characters that would end a header are left out.
    pub fn request(&self, address: SocketAddr) -> Vec<u8> {
        let plain = |text: &str| text.chars().filter(char::is_ascii_graphic).collect::<String>();
        let host = match &self.host {
            Some(host) => plain(host),
            None if address.port() == 80 && address.is_ipv4() => address.ip().to_string(),
            None => address.to_string(),
        };
        let mut text = format!("GET {} HTTP/1.1\r\nHost: {host}\r\n", plain(&self.path));
        // Writing to a string does not fail.
        let _ = write!(text, "User-Agent: anabranch-health\r\nAccept: */*\r\nConnection: close\r\n\r\n");
        text.into_bytes()
    }

    /// Judges what has come so far: `None` = more is needed.
    pub fn judge(&self, answer: &[u8]) -> Option<Result<(), String>> {
        match status(answer) {
            Status::Is(status, _) if self.accepts(status) => Some(Ok(())),
            Status::Is(status, _) => Some(Err(format!("HTTP status {status}"))),
            Status::Open if answer.len() < ANSWER_BYTES_MAX => None,
            Status::Open | Status::Malformed => Some(Err("the answer is not HTTP".to_owned())),
        }
    }

    /// Whether nothing more of an answer is to be read. Only asked when [`HttpCheck::judge`] has judged it.
    pub fn is_whole(answer: &[u8]) -> bool {
        if answer.len() >= CONTENT_BYTES_MAX {
            return true;
        }
        let Status::Is(status, at) = status(answer) else { return true };
        let answer = answer.get(at..).unwrap_or_default();
        let Some(head) = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n") else { return false };
        let content = answer.get(head + 4..).unwrap_or_default();
        if matches!(status, 204 | 304) {
            return true;
        }
        let lines = answer.get(..head).unwrap_or_default().split(|&byte| byte == b'\n');
        let mut length = lines.filter_map(|line| {
            let colon = line.iter().position(|&byte| byte == b':')?;
            let (name, value) = line.split_at(colon);
            let wanted = name.eq_ignore_ascii_case(b"content-length");
            let text = std::str::from_utf8(value.get(1..)?).ok()?;
            if wanted { text.trim().parse::<usize>().ok() } else { None }
        });
        // Without a length the end of the connection is the end, which was asked for.
        length.next_back().is_some_and(|length| content.len() >= length)
    }

    fn accepts(&self, status: u16) -> bool {
        if self.statuses.is_empty() { (200..400).contains(&status) } else { self.statuses.contains(&status) }
    }
}

enum Status {
    /// And where its answer begins.
    Is(u16, usize),
    /// More bytes may tell.
    Open,
    Malformed,
}

/// The first status that is not an interim one.
fn status(answer: &[u8]) -> Status {
    let mut rest = answer;
    loop {
        let Some(end) = rest.iter().position(|&byte| byte == b'\n') else {
            // What is there must be able to become a status line.
            let begins = rest.iter().zip(b"HTTP/1.").all(|(a, b)| a == b);
            return if begins { Status::Open } else { Status::Malformed };
        };
        let (line, after) = rest.split_at(end);
        let Some(status) = status_of(line) else { return Status::Malformed };
        if status >= 200 {
            return Status::Is(status, answer.len() - rest.len());
        }
        // An interim answer has no content: the next begins behind the empty line.
        match after.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
            Some(at) => rest = after.get(at + 4..).unwrap_or_default(),
            None if after.starts_with(b"\n\r\n") => rest = after.get(3..).unwrap_or_default(),
            None => return Status::Open,
        }
    }
}

/// `HTTP/1.1 200 OK`; the reason may be missing.
fn status_of(line: &[u8]) -> Option<u16> {
    let text = std::str::from_utf8(line.get(..12)?).ok()?;
    let (version, code) = (text.get(..9)?, text.get(9..12)?);
    let ends = line.get(12).is_none_or(|&byte| byte == b' ' || byte == b'\r');
    if !matches!(version, "HTTP/1.1 " | "HTTP/1.0 ")
        || !ends
        || !code.bytes().all(|byte| byte.is_ascii_digit())
    {
        return None;
    }
    code.parse().ok().filter(|status| (100..600).contains(status))
}
