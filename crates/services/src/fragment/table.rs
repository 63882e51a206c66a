//! The owner's fragmentation table: what is to be done with the packets in pieces of its flows, and doing it.

use packet::ip::{
    ECN_CE, ECN_NOT_ECT, FRAGMENT_HEADER_BYTES, IPV6_HEADER_BYTES, PROTOCOL_FRAGMENT, extension_bytes,
    set_ecn,
};
use packet::{DropCounters, DropReason, FlowKey, IpHeader, checksum};

use super::pieces::{Extent, Fit, LENGTH_MAX, Pieces};
use super::store::{FragmentStats, Store};
use super::{Action, FragmentLimits, PacketId, put_u16};
use crate::hash::SecretState;

/// Message about a packet in pieces, from the core of the addresses to the owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    /// The packet: addresses and identification.
    pub id: PacketId,
    /// Its flow: addresses and ports.
    pub key: FlowKey,
    /// Action for its fragments.
    pub action: Action,
}

/// A packet that was put together. Its transport checksum is as its sender made it.
#[derive(Debug, PartialEq, Eq)]
pub struct Whole<'a> {
    /// The IP packet, with the header of the first fragment. IPv4: DF is not set, the header checksum is right. IPv6:
    /// without the fragment header. CE if a fragment was (RFC 3168 §5.3). May be changed in place.
    pub packet: &'a mut [u8],
    /// Its flow.
    pub key: FlowKey,
    /// Its identification, for [`super::fragment_out`].
    pub id: u32,
    /// The longest fragment as an IP packet, bytes: fragments of that size did pass, so do not send longer ones.
    pub longest: u16,
    /// How many fragments it came in.
    pub fragments: u16,
}

/// Outcome for a fragment.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome<'a> {
    /// It is held until the rest of its packet comes.
    Held,
    /// A copy of one that came before; drop it silently.
    Copy,
    /// It goes on by itself as a packet of this flow.
    Bridge(FlowKey),
    /// It was the last one missing.
    Whole(Whole<'a>),
}

/// The packets in pieces of the flows that this core owns.
#[derive(Debug)]
pub struct FragmentTable {
    store: Store<(FlowKey, Action)>,
    /// The packet given out last.
    whole: Vec<u8>,
}

impl FragmentTable {
    /// An empty table. `hash`: secret, so that nobody can choose what shares a place in its hash tables.
    #[must_use]
    pub fn new(limits: FragmentLimits, hash: SecretState) -> Self {
        Self { store: Store::new(limits, hash), whole: Vec::new() }
    }

    /// Remembers what to do with a packet. A packet is told once; if it is told again the identification was used
    /// anew, and what is there under it is dropped. An identification that is refused stays so.
    ///
    /// # Errors
    /// [`DropReason::FragmentsFull`]: no room for one more packet; its fragments will be dropped. Why the
    /// identification is refused.
    pub fn tell(&mut self, now_ns: u64, told: &Told) -> Result<(), DropReason> {
        self.store.expire(now_ns);
        if let Some(serial) = self.store.find(&told.id) {
            if let Some(reason) = self.store.entry(serial).and_then(|entry| entry.poison) {
                return Err(reason);
            }
            self.store.stats.timed_out += 1;
            self.store.give_up(serial, DropReason::FragmentTimeout);
        }
        self.store.open(now_ns, told.id, (told.key, told.action)).map(|_| ())
    }

    /// Takes a fragment of a packet that was told. `header` is what [`IpHeader::parse`] says about `packet`.
    ///
    /// # Errors
    /// Why this fragment is dropped: [`DropReason::FragmentTimeout`] when its packet was not told or is forgotten,
    /// [`DropReason::FragmentInvalid`], [`DropReason::FragmentOverlap`] (with all of its packet that is held and all
    /// that follows), [`DropReason::FragmentsFull`]. Fragments that were held and are dropped now are counted in
    /// [`FragmentTable::late_drops`].
    pub fn push(
        &mut self,
        now_ns: u64,
        id: &PacketId,
        packet: &[u8],
        header: &IpHeader,
    ) -> Result<Outcome<'_>, DropReason> {
        self.store.expire(now_ns);
        let packet = packet.get(..header.total_bytes).ok_or(DropReason::IpMalformed)?;
        if !header.is_fragmented() {
            return Err(DropReason::FragmentInvalid);
        }
        let extent = Extent::of(header, packet)?;
        let serial = self.store.find(id).ok_or(DropReason::FragmentTimeout)?;
        let (key, action) = self.store.entry(serial).ok_or(DropReason::FragmentTimeout)?.note;
        let held = match action {
            Action::Bridge => &[][..],
            // The first one's header is the whole packet's.
            Action::Assemble if extent.from == 0 => packet,
            Action::Assemble => header.payload(packet),
        };
        if self.store.admit(now_ns, serial, &extent, held)? == Fit::Copy {
            return Ok(Outcome::Copy);
        }
        let entry = self.store.entry(serial).ok_or(DropReason::FragmentsFull)?;
        entry.pieces.ecn_seen |= 1 << (header.ecn & 3);
        entry.pieces.longest = entry.pieces.longest.max(packet.len().min(LENGTH_MAX) as u16);
        let whole = entry.pieces.is_whole();
        match (action, whole) {
            (Action::Assemble, false) => Ok(Outcome::Held),
            (Action::Assemble, true) => self.assemble(now_ns, serial, header.version, id.id, key),
            (Action::Bridge, false) => Ok(Outcome::Bridge(key)),
            (Action::Bridge, true) => {
                self.store.stats.completed += 1;
                self.store.remove(serial);
                Ok(Outcome::Bridge(key))
            }
        }
    }

    fn assemble(
        &mut self,
        now_ns: u64,
        serial: u64,
        version: u8,
        id: u32,
        key: FlowKey,
    ) -> Result<Outcome<'_>, DropReason> {
        let entry = self.store.entry(serial).ok_or(DropReason::FragmentTimeout)?;
        let (longest, fragments) = (entry.pieces.longest, entry.pieces.count());
        if build(&mut self.whole, &entry.pieces, version).is_none() {
            // The fragment at hand is this call's error, not a late one.
            entry.pieces.discount_one();
            self.store.poison(now_ns, serial, DropReason::FragmentInvalid);
            return Err(DropReason::FragmentInvalid);
        }
        self.store.stats.completed += 1;
        self.store.remove(serial);
        Ok(Outcome::Whole(Whole { packet: &mut self.whole, key, id, longest, fragments }))
    }

    /// Flow of a packet and what is done with it, as remembered.
    #[must_use]
    pub fn told(&mut self, id: &PacketId) -> Option<(FlowKey, Action)> {
        let serial = self.store.find(id)?;
        self.store.entry(serial).map(|entry| entry.note)
    }

    /// Drops packets whose time is over. Every other call does so too.
    pub fn tick(&mut self, now_ns: u64) {
        self.store.expire(now_ns);
    }

    /// Changes the limits; the oldest packets go if there are too many for them.
    pub fn set_limits(&mut self, limits: FragmentLimits) {
        self.store.set_limits(limits);
    }

    /// Memory of packets in pieces, bookkeeping included, bytes. Never more than the limit. One buffer for the packet
    /// given out last, at most 65,575 bytes, comes on top.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.store.bytes()
    }

    /// Packets in pieces, refused ones included.
    #[must_use]
    pub fn packets(&self) -> usize {
        self.store.len()
    }

    /// Statistics so far, in packets.
    #[must_use]
    pub const fn stats(&self) -> FragmentStats {
        self.store.stats
    }

    /// Fragments that were held and dropped later: their packet timed out, was contradicted, or had to make room.
    #[must_use]
    pub const fn late_drops(&self) -> &DropCounters {
        &self.store.late
    }

    #[cfg(test)]
    pub(super) fn audit(&self) {
        self.store.audit();
    }
}

/// Writes the whole packet; `None` when there is none that could be: too long with the first fragment's header, or
/// CE beside fragments that do not know ECN (RFC 3168 §5.3).
fn build(out: &mut Vec<u8>, pieces: &Pieces, version: u8) -> Option<()> {
    let first = pieces.iter().find(|piece| piece.from == 0)?;
    let end = usize::from(pieces.end()?);
    let header = first.bytes.len().checked_sub(usize::from(first.to))?;
    let header = if version == 6 { header.checked_sub(FRAGMENT_HEADER_BYTES)? } else { header };
    let counted = if version == 6 { header.checked_sub(IPV6_HEADER_BYTES)? } else { header };
    if counted + end > LENGTH_MAX {
        return None;
    }
    out.clear();
    out.extend_from_slice(first.bytes.get(..header)?);
    out.resize(header + end, 0);
    for piece in pieces.iter() {
        let payload =
            piece.bytes.get(piece.bytes.len().checked_sub(usize::from(piece.to - piece.from))?..)?;
        out.get_mut(header + usize::from(piece.from)..header + usize::from(piece.to))?
            .copy_from_slice(payload);
    }
    if version == 6 {
        put_u16(out, 4, (counted + end) as u16);
        let next = *first.bytes.get(header)?;
        let at = next_header_at(out, header)?;
        *out.get_mut(at)? = next;
    } else {
        put_u16(out, 2, (header + end) as u16);
        put_u16(out, 6, 0);
        put_u16(out, 10, 0);
        let sum = checksum::finish(checksum::sum(out.get(..header)?, 0));
        put_u16(out, 10, sum);
    }
    if pieces.ecn_seen & (1 << ECN_CE) != 0 {
        if pieces.ecn_seen & (1 << ECN_NOT_ECT) != 0 {
            return None;
        }
        set_ecn(out, ECN_CE);
    }
    Some(())
}

/// Where an IPv6 packet names the fragment header that stood at `end`.
fn next_header_at(packet: &[u8], end: usize) -> Option<usize> {
    let (mut field, mut at) = (6, IPV6_HEADER_BYTES);
    while at < end {
        let protocol = *packet.get(field)?;
        field = at;
        at += extension_bytes(protocol, *packet.get(at + 1)?);
    }
    (at == end && packet.get(field) == Some(&PROTOCOL_FRAGMENT)).then_some(field)
}
