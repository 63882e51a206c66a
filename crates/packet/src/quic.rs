//! QUIC's packets: their clear part, what all versions have in common (RFC 8999), and which kind of packet it is in version 1
//! (RFC 9000 §17) and 2 (RFC 9369); and what a client's first ones say ([`initial`]).
//!
//! Connection ids tell packets of a connection from others when its addresses change. A long header says how long they
//! are; a short header has the destination's only, and whoever did not see the connection begin has to know its length.

use crate::{array_at, u32_at};

pub mod initial;

#[cfg(test)]
pub(crate) mod tests;

/// Longest connection id of versions 1 and 2, bytes (RFC 9000 §17.2).
pub const CONNECTION_ID_BYTES_MAX: usize = 20;

/// First bit of a packet with a long header (RFC 8999 §5.1).
pub const LONG: u8 = 0x80;

pub(crate) const VERSION_1: u32 = 1;
pub(crate) const VERSION_2: u32 = 0x6b33_43cf;

/// First packet of a datagram; several may stand in one (RFC 9000 §12.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packet<'a> {
    /// With both connection ids.
    Long(LongHeader<'a>),
    /// Bytes behind the first one: the destination's connection id, of a length that it does not tell, and the rest.
    Short(&'a [u8]),
}

/// A long header (RFC 8999 §5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LongHeader<'a> {
    /// Version of QUIC; 0 in a version negotiation.
    pub version: u32,
    /// Kind of packet.
    pub kind: Kind,
    /// Connection id that the receiver chose; the client's very first one is the client's own choice.
    pub destination: &'a [u8],
    /// Connection id that the sender wants to be written to with.
    pub source: &'a [u8],
    /// Bytes behind the ids.
    pub rest: &'a [u8],
}

/// Kind of a packet with a long header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Versions that a server speaks (RFC 8999 §6): its ids are those of the client's packet, the other way round.
    VersionNegotiation,
    /// The first of a connection.
    Initial,
    /// Early data.
    ZeroRtt,
    /// The rest of the handshake.
    Handshake,
    /// A server asks the client to begin again with a token.
    Retry,
    /// Of a version that is not known here.
    Unknown,
}

impl<'a> Packet<'a> {
    /// The first packet of a datagram; `datagram` is UDP's payload. `None`: it is too short, or has ids that its version does
    /// not allow. A short header has no more to tell it from other protocols than its first bit.
    #[inline]
    #[must_use]
    pub fn parse(datagram: &'a [u8]) -> Option<Self> {
        let (first, rest) = datagram.split_first()?;
        if first & LONG == 0 {
            return Some(Packet::Short(rest));
        }
        let version = u32_at(datagram, 1)?;
        let kind = match (version, first >> 4 & 3) {
            (0, _) => Kind::VersionNegotiation,
            (VERSION_1, 0) | (VERSION_2, 1) => Kind::Initial,
            (VERSION_1, 1) | (VERSION_2, 2) => Kind::ZeroRtt,
            (VERSION_1, 2) | (VERSION_2, 3) => Kind::Handshake,
            (VERSION_1 | VERSION_2, _) => Kind::Retry,
            _ => Kind::Unknown,
        };
        let (destination, rest) = id(datagram.get(5..)?)?;
        let (source, rest) = id(rest)?;
        let is_known = matches!(version, VERSION_1 | VERSION_2);
        if is_known && destination.len().max(source.len()) > CONNECTION_ID_BYTES_MAX {
            return None;
        }
        Some(Packet::Long(LongHeader { version, kind, destination, source, rest }))
    }
}

/// An id behind its length.
#[inline]
fn id(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let [length] = array_at(bytes, 0)?;
    bytes.get(1..)?.split_at_checked(usize::from(length))
}
