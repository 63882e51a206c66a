//! The core of the addresses: fragments wait here until their packet's ports are known.

use packet::attachment::Ingress;
use packet::ip::{FRAGMENT_HEADER_BYTES, IPV6_HEADER_BYTES, PROTOCOL_UDP};
use packet::{DropCounters, DropReason, FlowKey, IpHeader};

use super::pieces::{Extent, Fit, flow_of_first};
use super::store::{FragmentStats, Store};
use super::{FragmentLimits, Measure, PacketId, u16_at};
use crate::hash::SecretState;

/// A fragment whose flow is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Released<'a> {
    /// Its packet. `None`: it is no fragment at all, treat it as any packet.
    pub id: Option<PacketId>,
    /// The flow of its packet, ports included.
    pub key: FlowKey,
    /// The fragment as it came, an IP packet without padding.
    pub packet: &'a [u8],
    /// Nothing of its packet went out before: tell the owner first ([`super::FragmentTable::tell`]).
    pub first: bool,
    /// All of its packet has gone out with this one.
    pub last: bool,
    /// Facts about the size of its packet, as known now.
    pub measure: Measure,
}

/// Facts about a packet's flow.
#[derive(Clone, Copy, Debug)]
struct Header {
    key: FlowKey,
    measure: Measure,
}

/// Packets in pieces whose fragments come to this core.
#[derive(Debug)]
pub struct Rendezvous {
    store: Store<Option<Header>>,
}

impl Rendezvous {
    /// An empty one. `hash`: secret, so that nobody can choose what shares a place in its hash tables.
    #[must_use]
    pub fn new(limits: FragmentLimits, hash: SecretState) -> Self {
        Self { store: Store::new(limits, hash) }
    }

    /// Takes a fragment. What can go on goes to `out`: held fragments in the order in which they came, then this one.
    ///
    /// `header` is what [`IpHeader::parse`] says about `packet`. A packet that is no fragment goes on at once; so
    /// does an IPv6 packet that is whole despite a fragment header (RFC 6946).
    ///
    /// # Errors
    /// Why this fragment is dropped: [`DropReason::FragmentInvalid`], [`DropReason::FragmentOverlap`] (with all of
    /// its packet that is held and all that follows), [`DropReason::FragmentsFull`]. Fragments that were taken before
    /// and are dropped now are counted in [`Rendezvous::late_drops`]. A copy of a fragment is no error.
    pub fn push(
        &mut self,
        now_ns: u64,
        packet: &[u8],
        header: &IpHeader,
        tenant: u16,
        ingress: Ingress,
        out: &mut impl FnMut(Released<'_>),
    ) -> Result<(), DropReason> {
        self.store.expire(now_ns);
        let packet = packet.get(..header.total_bytes).ok_or(DropReason::IpMalformed)?;
        let Some(id) = PacketId::of(header, tenant, ingress) else {
            let key = FlowKey::of_parsed(header, packet);
            let measure = Measure { bytes: Some(packet.len() as u32), fragments: Some(1) };
            out(Released { id: None, key, packet, first: true, last: true, measure });
            return Ok(());
        };
        let extent = Extent::of(header, packet)?;
        let first = if extent.from == 0 { Some(flow_of_first(header, packet)?) } else { None };
        let serial = match self.store.find(&id) {
            Some(serial) => serial,
            None => self.store.open(now_ns, id, None)?,
        };
        // Held until the header comes, if it has not.
        let waits = first.is_none() && self.store.entry(serial).is_some_and(|entry| entry.note.is_none());
        let held = if waits { packet } else { &[] };
        if self.store.admit(now_ns, serial, &extent, held)? == Fit::New {
            self.release(serial, &extent, header, packet, first, out);
        }
        Ok(())
    }

    /// Gives out what may go, this fragment last.
    fn release(
        &mut self,
        serial: u64,
        extent: &Extent,
        header: &IpHeader,
        packet: &[u8],
        first: Option<(FlowKey, &[u8])>,
        out: &mut impl FnMut(Released<'_>),
    ) {
        let Some(entry) = self.store.entry(serial) else { return };
        let id = Some(entry.id);
        let mut opening = false;
        if let Some((key, upper)) = first {
            let measure = measure(header, extent, entry.pieces.end(), key.protocol, upper);
            entry.note = Some(Header { key, measure });
            opening = true;
        }
        let Some(Header { key, measure }) = entry.note else { return };
        entry.pieces.release(|packet| {
            out(Released { id, key, packet, first: opening, last: false, measure });
            opening = false;
        });
        let last = entry.pieces.is_whole();
        out(Released { id, key, packet, first: opening, last, measure });
        if last {
            self.store.stats.completed += 1;
            self.store.remove(serial);
        } else {
            self.store.settle(serial);
        }
    }

    /// Drops packets whose time is over. [`Rendezvous::push`] does so too.
    pub fn tick(&mut self, now_ns: u64) {
        self.store.expire(now_ns);
    }

    /// Changes the limits; the oldest packets go if there are too many for them.
    pub fn set_limits(&mut self, limits: FragmentLimits) {
        self.store.set_limits(limits);
    }

    /// Memory of packets in pieces, bookkeeping included, bytes. Never more than the limit.
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

    /// Fragments that were taken and dropped later: their packet timed out, was contradicted, or had to make room.
    #[must_use]
    pub const fn late_drops(&self) -> &DropCounters {
        &self.store.late
    }

    #[cfg(test)]
    pub(super) fn audit(&self) {
        self.store.audit();
    }
}

/// The size of a packet, by its last fragment if that came first, or by the length in a UDP header.
fn measure(header: &IpHeader, extent: &Extent, end: Option<u16>, protocol: u8, upper: &[u8]) -> Measure {
    let udp = || {
        let length = u16_at(upper, 4).filter(|length| *length >= 8)?;
        // Extension headers behind the fragment header belong to the payload.
        let extensions = usize::from(extent.bytes()).saturating_sub(upper.len());
        Some(usize::from(length) + extensions)
    };
    let payload = match end {
        Some(end) => Some(usize::from(end)),
        None if protocol == PROTOCOL_UDP => udp(),
        None => None,
    };
    let Some(payload) = payload else { return Measure::default() };
    let before = match header.version {
        6 => header.header_bytes.saturating_sub(FRAGMENT_HEADER_BYTES).max(IPV6_HEADER_BYTES),
        _ => header.header_bytes,
    };
    let fragments = payload.div_ceil(usize::from(extent.bytes()).max(1));
    Measure { bytes: Some((before + payload) as u32), fragments: Some(fragments as u16) }
}
