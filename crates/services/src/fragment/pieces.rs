//! Fragments that are there of one packet, and whether one more fits in.

use std::hash::BuildHasher;

use crate::hash::ConfigState;
use packet::ip::{
    FRAGMENT_HEADER_BYTES, IPV6_HEADER_BYTES, PROTOCOL_ICMP, PROTOCOL_ICMPV6, PROTOCOL_SCTP, PROTOCOL_TCP,
    PROTOCOL_UDP, PROTOCOL_UDP_LITE,
};
use packet::{DropReason, FlowKey, IpHeader};

/// Fragments of one packet at most, copies counted: enough for 64 KB over a link of 576 bytes. A packet with more is
/// given up.
pub const FRAGMENTS_PER_PACKET_MAX: u16 = 128;

/// Longest packet after assembly: IPv4 counts its header, IPv6 what follows its fixed header.
pub(super) const LENGTH_MAX: usize = 65_535;

/// Range of its packet's payload that a fragment covers, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub from: u16,
    pub to: u16,
    /// Nothing comes behind it.
    pub last: bool,
    /// Of the payload: tells a copy from a contradiction. Who makes two contents with the same digest has the second
    /// ignored as a copy, which gains nothing.
    pub digest: u32,
}

impl Extent {
    /// Checks a fragment by itself (RFC 8200 §4.5, RFC 1858).
    ///
    /// # Errors
    /// [`DropReason::FragmentInvalid`]: nothing in it, a length that is no multiple of 8 although more follows, or an
    /// end beyond the longest packet.
    pub fn of(header: &IpHeader, packet: &[u8]) -> Result<Extent, DropReason> {
        let fragment = header.fragment.ok_or(DropReason::FragmentInvalid)?;
        let payload = header.payload(packet);
        // What counts into the length field besides the payload.
        let before = match header.version {
            4 => header.header_bytes,
            _ => header.header_bytes.saturating_sub(IPV6_HEADER_BYTES + FRAGMENT_HEADER_BYTES),
        };
        let to = usize::from(fragment.offset) + payload.len();
        let fits = before + to <= LENGTH_MAX;
        if payload.is_empty() || !fits || (fragment.more && !payload.len().is_multiple_of(8)) {
            return Err(DropReason::FragmentInvalid);
        }
        let digest = ConfigState::with_seed(0).hash_one(payload) as u32;
        let to = u16::try_from(to).map_err(|_| DropReason::FragmentInvalid)?;
        Ok(Extent { from: fragment.offset, to, last: !fragment.more, digest })
    }

    pub const fn bytes(&self) -> u16 {
        self.to - self.from
    }
}

/// The flow of a packet by its first fragment, and its upper layer there.
///
/// # Errors
/// [`DropReason::FragmentInvalid`] when the fragment does not hold the transport header (RFC 1858, RFC 7112).
pub fn flow_of_first<'a>(header: &IpHeader, packet: &'a [u8]) -> Result<(FlowKey, &'a [u8]), DropReason> {
    let whole = header.of_first_fragment(packet).ok_or(DropReason::FragmentInvalid)?;
    let upper = whole.payload(packet);
    let needed = match whole.protocol {
        PROTOCOL_TCP => upper.get(12).map_or(20, |word| usize::from(word >> 4) * 4).max(20),
        PROTOCOL_SCTP => 12,
        PROTOCOL_UDP | PROTOCOL_UDP_LITE | PROTOCOL_ICMP | PROTOCOL_ICMPV6 => 8,
        _ => 0,
    };
    if upper.len() < needed {
        return Err(DropReason::FragmentInvalid);
    }
    Ok((FlowKey::of_parsed(&whole, packet), upper))
}

/// A fragment that was taken.
#[derive(Debug)]
pub(super) struct Piece {
    pub from: u16,
    pub to: u16,
    digest: u32,
    /// Bytes that are held of it; empty when it went on already.
    pub bytes: Box<[u8]>,
}

/// How a fragment fits in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fit {
    New,
    Copy,
}

/// The fragments of one packet in the order of arrival; no two overlap.
#[derive(Debug, Default)]
pub(super) struct Pieces {
    list: Vec<Piece>,
    /// Length of the payload, once the last fragment is there.
    end: Option<u16>,
    /// Largest `to`.
    highest: u16,
    /// Bytes of payload that have come.
    covered: u32,
    /// Sum of the lengths of `bytes`.
    held_bytes: usize,
    /// How many pieces are held.
    held: u16,
    /// Fragments that came, copies too.
    arrived: u16,
    /// ECN fields seen, one bit each.
    pub ecn_seen: u8,
    /// Longest fragment as an IP packet, bytes.
    pub longest: u16,
}

impl Pieces {
    /// Whether a fragment fits to those that are there. Counts it as arrived.
    ///
    /// # Errors
    /// [`DropReason::FragmentOverlap`]: it overlaps or contradicts another; [`DropReason::FragmentsFull`]: the packet
    /// has too many. Either way the packet cannot be used any more.
    pub fn fit(&mut self, extent: &Extent) -> Result<Fit, DropReason> {
        self.arrived = self.arrived.saturating_add(1);
        if self.arrived > FRAGMENTS_PER_PACKET_MAX {
            return Err(DropReason::FragmentsFull);
        }
        let other = self.list.iter().find(|piece| extent.from < piece.to && piece.from < extent.to);
        if let Some(piece) = other {
            let same = (piece.from, piece.to, piece.digest) == (extent.from, extent.to, extent.digest)
                && extent.last == (self.end == Some(extent.to));
            return if same { Ok(Fit::Copy) } else { Err(DropReason::FragmentOverlap) };
        }
        let contradicts = match self.end {
            Some(end) => extent.last || extent.to > end,
            None => extent.last && extent.to < self.highest,
        };
        if contradicts { Err(DropReason::FragmentOverlap) } else { Ok(Fit::New) }
    }

    /// Memory that [`Pieces::push`] of so many bytes will take.
    pub fn cost_of_push(&self, bytes: usize) -> usize {
        bytes + (self.capacity_for_one_more() - self.list.capacity()) * size_of::<Piece>()
    }

    /// Memory that all pieces take.
    pub fn cost(&self) -> usize {
        self.held_bytes + self.list.capacity() * size_of::<Piece>()
    }

    /// Takes a fragment that [`Pieces::fit`]s; `bytes` of it are held.
    pub fn push(&mut self, extent: &Extent, bytes: &[u8]) {
        self.list.reserve_exact(self.capacity_for_one_more() - self.list.len());
        self.covered += u32::from(extent.bytes());
        self.highest = self.highest.max(extent.to);
        if extent.last {
            self.end = Some(extent.to);
        }
        self.held_bytes += bytes.len();
        self.held += u16::from(!bytes.is_empty());
        let Extent { from, to, digest, .. } = *extent;
        self.list.push(Piece { from, to, digest, bytes: bytes.into() });
    }

    /// Gives out what is held, in the order of arrival; then nothing is held.
    pub fn release(&mut self, mut each: impl FnMut(&[u8])) {
        for piece in &mut self.list {
            let bytes = std::mem::take(&mut piece.bytes);
            if !bytes.is_empty() {
                each(&bytes);
            }
        }
        (self.held, self.held_bytes) = (0, 0);
    }

    /// Forgets everything but that fragments came.
    pub fn clear(&mut self) {
        *self = Pieces { arrived: self.arrived, ..Pieces::default() };
    }

    /// One of those that are held does not count as such any more: its end is told in another way.
    pub fn discount_one(&mut self) {
        self.held = self.held.saturating_sub(1);
    }

    /// In the order of arrival.
    pub fn iter(&self) -> impl Iterator<Item = &Piece> {
        self.list.iter()
    }

    /// How many are held.
    pub const fn held(&self) -> u16 {
        self.held
    }

    /// How many came that are no copies.
    pub fn count(&self) -> u16 {
        self.list.len() as u16
    }

    /// Length of the payload, if the last fragment is there.
    pub const fn end(&self) -> Option<u16> {
        self.end
    }

    /// All of the packet has come.
    pub fn is_whole(&self) -> bool {
        self.end.is_some_and(|end| u32::from(end) == self.covered)
    }

    fn capacity_for_one_more(&self) -> usize {
        if self.list.len() < self.list.capacity() {
            self.list.capacity()
        } else {
            (self.list.capacity() * 2).max(2)
        }
    }
}
