//! Fragments that went on, by what stands in their headers: an ICMP error that quotes a later one tells no ports.

use std::hash::BuildHasher;
use std::net::IpAddr;

use crate::hash::SecretState;
use packet::{FlowKey, IpHeader};

/// Packets that are remembered; a newer one takes the place of an older one of the same hash.
const PACKETS_MAX: usize = 4_096;
/// How long, ns: an error comes within a few round trips.
const KEPT_NS: u64 = 30_000_000_000;

/// Identity of a packet in pieces, as its fragments were sent on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SentId {
    src: IpAddr,
    dst: IpAddr,
    id: u32,
    protocol: u8,
}

impl SentId {
    /// The packet that a fragment of this header is part of; `None`: it is no fragment.
    #[must_use]
    pub fn of(header: &IpHeader) -> Option<Self> {
        let id = header.fragment.filter(|fragment| !fragment.is_whole())?.id;
        Some(Self { src: header.src, dst: header.dst, id, protocol: header.protocol })
    }
}

/// One packet: what it left as, its key as it came in, its tenant there, and when.
#[derive(Clone, Copy, Debug)]
struct Sent {
    id: SentId,
    key: FlowKey,
    tenant: u16,
    at_ns: u64,
}

/// The last packets of one core that went on in fragments.
#[derive(Debug)]
pub struct SentFragments {
    places: Vec<Option<Sent>>,
    hasher: SecretState,
}

impl SentFragments {
    /// None yet; memory is taken with the first. `hasher`: secret, so that nobody can choose whose place is taken.
    #[must_use]
    pub fn new(hasher: SecretState) -> Self {
        Self { places: Vec::new(), hasher }
    }

    fn place(&self, id: &SentId) -> usize {
        self.hasher.hash_one(id) as usize % PACKETS_MAX
    }

    /// A fragment went on; `key` and `tenant`: of its packet's flow, as it came in.
    pub fn note(&mut self, now_ns: u64, id: SentId, key: FlowKey, tenant: u16) {
        if self.places.is_empty() {
            self.places.resize(PACKETS_MAX, None);
        }
        let place = self.place(&id);
        if let Some(kept) = self.places.get_mut(place) {
            *kept = Some(Sent { id, key, tenant, at_ns: now_ns });
        }
    }

    /// Key and tenant of the packet that a fragment was part of.
    #[must_use]
    pub fn find(&self, now_ns: u64, id: &SentId) -> Option<(FlowKey, u16)> {
        let sent = self.places.get(self.place(id))?.filter(|sent| sent.id == *id)?;
        (now_ns.saturating_sub(sent.at_ns) <= KEPT_NS).then_some((sent.key, sent.tenant))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::testing::assert_spreads;

    #[test]
    fn packets_that_a_stranger_chooses_do_not_take_one_place() {
        let sent = SentFragments::new(SecretState::of_number(1));
        let dst = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);
        assert_spreads(&sent.hasher, |src| SentId { src, dst, id: 1, protocol: 17 });
    }
}
