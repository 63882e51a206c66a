//! TLS as far as it is in the clear: the server name in a ClientHello (RFC 8446 §4.1.2, RFC 6066 §3).
//!
//! Both functions take the bytes from the first on, as many as have come, and answer as soon as they can.

use std::borrow::Cow;

use crate::server_name::{HELLO_BYTES_MAX, ServerName};

#[cfg(test)]
mod tests;

/// Record of handshake messages.
const HANDSHAKE: u8 = 22;
/// Bytes in front of a record's fragment.
const RECORD_HEADER_BYTES: usize = 5;
/// Longest fragment of a record in the clear (RFC 8446 §5.1).
const FRAGMENT_BYTES_MAX: usize = 1 << 14;
/// Handshake message.
const CLIENT_HELLO: u8 = 1;
/// Bytes in front of a handshake message.
const MESSAGE_HEADER_BYTES: usize = 4;
/// Extension, and kind of a name in it.
const SERVER_NAME: u16 = 0;
const HOST_NAME: u8 = 0;
/// Version and random number in a ClientHello.
const VERSION_AND_RANDOM_BYTES: usize = 34;

/// Answer of a handshake's beginning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The client asks for this server.
    Name(ServerName),
    /// It is no ClientHello, it is malformed, or it names no server.
    Nothing,
    /// More of it may tell.
    Incomplete,
}

/// Whether a stream may begin with a ClientHello: a record of the handshake, and that message in it.
#[inline]
#[must_use]
pub fn begins_hello(stream: &[u8]) -> bool {
    match stream {
        [HANDSHAKE, 3, _, _, _, message, ..] => *message == CLIENT_HELLO,
        _ => false,
    }
}

/// The server name in a stream of records; the message may be spread over several.
#[must_use]
pub fn of_records(stream: &[u8]) -> Answer {
    let Some((first, behind)) = record(stream) else {
        return if may_be_record(stream) { Answer::Incomplete } else { Answer::Nothing };
    };
    let mut message = Cow::Borrowed(first);
    let mut rest = behind;
    while message.len() < HELLO_BYTES_MAX
        && let Some((fragment, behind)) = record(rest)
    {
        message.to_mut().extend_from_slice(fragment);
        rest = behind;
    }
    match of_handshake(&message) {
        Answer::Incomplete if !may_be_record(rest) => Answer::Nothing,
        answer => answer,
    }
}

fn may_be_record(bytes: &[u8]) -> bool {
    bytes.iter().zip([HANDSHAKE, 3]).all(|(byte, right)| *byte == right)
}

/// As much of the first record's fragment as is there, and what stands behind. `None`: its header is not there, or not that of a
/// handshake record that has anything in it.
fn record(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (header, rest) = bytes.split_at_checked(RECORD_HEADER_BYTES)?;
    let &[HANDSHAKE, 3, _, high, low] = header else { return None };
    let length = usize::from(u16::from_be_bytes([high, low]));
    let is_right = (1..=FRAGMENT_BYTES_MAX).contains(&length);
    is_right.then(|| rest.split_at(length.min(rest.len())))
}

/// The server name in a handshake message.
#[must_use]
pub fn of_handshake(bytes: &[u8]) -> Answer {
    match name(bytes) {
        Ok(name) => name.map_or(Answer::Nothing, Answer::Name),
        Err(Cut::ByTheMessage) => Answer::Nothing,
        Err(Cut::NotYetThere) => Answer::Incomplete,
    }
}

/// Why something cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cut {
    /// It would lie behind the end of what it is part of.
    ByTheMessage,
    /// It has not come yet.
    NotYetThere,
}

fn name(bytes: &[u8]) -> Result<Option<ServerName>, Cut> {
    let Some((header, body)) = bytes.split_at_checked(MESSAGE_HEADER_BYTES) else {
        let may_be = bytes.first().is_none_or(|message| *message == CLIENT_HELLO);
        return Err(if may_be { Cut::NotYetThere } else { Cut::ByTheMessage });
    };
    if header.first() != Some(&CLIENT_HELLO) {
        return Ok(None);
    }
    let length = header.iter().skip(1).fold(0, |length, byte| length << 8 | usize::from(*byte));
    let mut hello = Part { bytes: body, length };
    hello.skip(VERSION_AND_RANDOM_BYTES)?;
    // Session id, cipher suites, compression methods.
    for length_bytes in [1, 2, 1] {
        hello.part(length_bytes)?;
    }
    if hello.length == 0 {
        return Ok(None);
    }
    let mut extensions = hello.part(2)?;
    while extensions.length > 0 {
        let kind = extensions.number(2)?;
        let mut extension = extensions.part(2)?;
        if kind == usize::from(SERVER_NAME) {
            return host_name(extension.part(2)?);
        }
    }
    Ok(None)
}

fn host_name(mut names: Part<'_>) -> Result<Option<ServerName>, Cut> {
    while names.length > 0 {
        let kind = names.number(1)?;
        let name = names.part(2)?;
        if kind == usize::from(HOST_NAME) {
            return name.all().map(ServerName::new);
        }
    }
    Ok(None)
}

/// Part of the message: `length` bytes, of which so many are there.
#[derive(Clone, Copy)]
struct Part<'a> {
    bytes: &'a [u8],
    length: usize,
}

impl<'a> Part<'a> {
    /// Takes the first bytes as a part of their own.
    fn take(&mut self, length: usize) -> Result<Part<'a>, Cut> {
        self.length = self.length.checked_sub(length).ok_or(Cut::ByTheMessage)?;
        let (bytes, rest) = self.bytes.split_at(length.min(self.bytes.len()));
        self.bytes = rest;
        Ok(Part { bytes, length })
    }

    fn skip(&mut self, length: usize) -> Result<(), Cut> {
        self.take(length).map(drop)
    }

    /// All bytes, if they are there.
    fn all(self) -> Result<&'a [u8], Cut> {
        self.bytes.get(..self.length).ok_or(Cut::NotYetThere)
    }

    /// A number of so many bytes.
    fn number(&mut self, bytes: usize) -> Result<usize, Cut> {
        let bytes = self.take(bytes)?.all()?;
        Ok(bytes.iter().fold(0, |number, byte| number << 8 | usize::from(*byte)))
    }

    /// A part behind its length, which has so many bytes.
    fn part(&mut self, length_bytes: usize) -> Result<Part<'a>, Cut> {
        let length = self.number(length_bytes)?;
        self.take(length)
    }
}
