//! Next hops as one core numbers them, with all that a packet needs to leave there.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use hashbrown::HashMap;
use packet::attachment::{Egress, Ingress, InterfaceId};

use super::dead_backends::ingress_of;
use super::{ETHERNET_BYTES, Outcome};
use crate::hash::SecretState;
use crate::policy::Policy;
use crate::spec::LinkSpec;

/// Hardware addresses that control has learned from the kernel: one snapshot for all cores.
#[derive(Clone, Debug, Default)]
pub struct Neighbors {
    /// Raised with every change.
    pub version: u64,
    /// By interface and address.
    pub known: BTreeMap<(InterfaceId, IpAddr), [u8; 6]>,
    /// Those that the kernel asked for in vain.
    pub failed: BTreeSet<(InterfaceId, IpAddr)>,
}

/// Not decided yet, or no longer.
pub const UNSET: u16 = 0;
/// The host's own stack.
pub const HOST: u16 = 1;
/// Comes around: in again, from outside ([`super::hairpin`]).
pub const HAIRPIN: u16 = 2;
const FIRST: u16 = 3;
/// Most next hops of a core.
const HOPS_MAX: usize = 60_000;

/// One next hop: a neighbor of an interface, or the peer of a bond.
#[derive(Clone, Copy, Debug)]
pub struct Hop {
    /// Outcome for a packet that takes it.
    pub outcome: Outcome,
    /// Ethernet header; valid if the outcome is to forward to an interface.
    pub ethernet: [u8; ETHERNET_BYTES],
    /// Largest IP packet of the interface, bytes. Bonds have no limit of their own here.
    pub mtu: u16,
    /// Nobody answers there.
    pub failed: bool,
    /// By what its answers come in, as [`Ingress::compact`] says it; [`NOWHERE`]: they do not come by here.
    pub back: u16,
}

/// No ingress has this number: see [`Hop::back`].
pub const NOWHERE: u16 = u16::MAX;

/// By what a packet leaves, the neighbor, and the largest packet that its route takes ([`u16::MAX`]: what the interface takes).
pub type Target = (Egress, IpAddr, u16);

/// Place where packets of a next hop go, and whether they are IPv4.
pub type HopKey = (Target, bool);

impl Hop {
    fn new(((egress, address, mtu), ipv4): HopKey, policy: &Policy, neighbors: &Neighbors) -> Self {
        let back = ingress_of(egress).map_or(NOWHERE, Ingress::compact);
        let Egress::Interface(id) = egress else {
            let (outcome, ethernet) = (Outcome::Forward(egress), [0; ETHERNET_BYTES]);
            return Self { outcome, ethernet, mtu: u16::MAX, failed: false, back };
        };
        let interface = policy.interface(id);
        let alone = is_point_to_point(policy, id);
        let mac = neighbors.known.get(&(id, address)).copied().filter(|_| !alone);
        let own = interface.map(|interface| interface.link.mac());
        let mut ethernet = [0; ETHERNET_BYTES];
        ethernet[..6].copy_from_slice(&mac.unwrap_or_default());
        ethernet[6..12].copy_from_slice(&own.unwrap_or_default());
        let kind: u16 = if ipv4 { 0x0800 } else { 0x86dd };
        ethernet[12..].copy_from_slice(&kind.to_be_bytes());
        let known = alone || (mac.is_some() && own.is_some());
        let outcome = if known { Outcome::Forward(egress) } else { Outcome::Resolve(id, address) };
        let failed = !known && neighbors.failed.contains(&(id, address));
        Self {
            outcome,
            ethernet,
            mtu: interface.map_or(1500, |interface| interface.mtu_of(ipv4)).min(mtu),
            failed,
            back,
        }
    }
}

/// Whether an interface has one other end, which needs no hardware address.
fn is_point_to_point(policy: &Policy, id: InterfaceId) -> bool {
    policy.interface(id).is_some_and(|interface| interface.link == LinkSpec::PointToPoint)
}

/// Where a packet of a flow goes.
#[derive(Clone, Copy)]
pub enum Way {
    /// To a neighbor, or into a bond.
    Hop(Hop),
    /// To the host's own stack.
    Host,
    /// In again, from outside.
    Hairpin,
}

/// All next hops of one core.
#[derive(Debug)]
pub struct Hops {
    list: Vec<Hop>,
    /// Where each of them leads, by place.
    keys: Vec<HopKey>,
    places: HashMap<HopKey, u16, SecretState>,
    version: Option<u64>,
}

impl Hops {
    /// None yet. `hash`: secret, so that nobody can choose addresses that share a place.
    #[must_use]
    pub fn new(hash: SecretState) -> Self {
        let places = HashMap::with_hasher(hash);
        Self { list: Vec::new(), keys: Vec::new(), places, version: None }
    }

    /// Forgets all of them.
    pub fn clear(&mut self) {
        self.list.clear();
        self.keys.clear();
        self.places.clear();
        self.version = None;
    }

    /// The number of a next hop, a new one if need be. [`UNSET`] for a neighbor that nobody knows yet, or for which
    /// there is no room: [`Hops::unnumbered`] leads there. So whoever asks for addresses that are not there fills
    /// nothing.
    pub fn number(&mut self, key: HopKey, policy: &Policy, neighbors: &Neighbors) -> u16 {
        let ((egress, address, mtu), ipv4) = key;
        let key = match egress {
            Egress::Host | Egress::Kernel => return HOST,
            // So has such a link.
            Egress::Interface(id) if is_point_to_point(policy, id) => {
                ((egress, IpAddr::V4(Ipv4Addr::UNSPECIFIED), mtu), ipv4)
            }
            Egress::Interface(_) => key,
            // A bond has one peer, whatever the destination.
            Egress::Bond(_) | Egress::Core(_) | Egress::Unit(_) => {
                ((egress, IpAddr::V4(Ipv4Addr::UNSPECIFIED), u16::MAX), true)
            }
        };
        if let Some(place) = self.places.get(&key) {
            return *place;
        }
        let resolved = egress
            .interface()
            .is_none_or(|id| is_point_to_point(policy, id) || neighbors.known.contains_key(&(id, address)));
        if self.list.len() >= HOPS_MAX || !resolved {
            return UNSET;
        }
        let place = FIRST + self.list.len() as u16;
        self.list.push(Hop::new(key, policy, neighbors));
        self.keys.push(key);
        self.places.insert(key, place);
        place
    }

    /// A next hop that has no number.
    #[must_use]
    pub fn unnumbered(key: HopKey, policy: &Policy, neighbors: &Neighbors) -> Hop {
        Hop::new(key, policy, neighbors)
    }

    /// Whether there is no room, and most of what takes it is of no use any more.
    #[must_use]
    pub fn is_worn_out(&self) -> bool {
        let resolved = self.list.iter().filter(|hop| matches!(hop.outcome, Outcome::Forward(_)));
        self.list.len() >= HOPS_MAX && resolved.count() < HOPS_MAX / 2
    }

    /// A next hop by its number; `None` for the special numbers.
    #[inline]
    #[must_use]
    pub fn get(&self, number: u16) -> Option<&Hop> {
        self.list.get(usize::from(number.checked_sub(FIRST)?))
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    /// Takes over what was learned.
    pub fn follow(&mut self, policy: &Policy, neighbors: &Neighbors) {
        if self.version == Some(neighbors.version) {
            return;
        }
        self.version = Some(neighbors.version);
        for (hop, key) in self.list.iter_mut().zip(&self.keys) {
            *hop = Hop::new(*key, policy, neighbors);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::testing::assert_spreads;

    #[test]
    fn neighbors_that_a_stranger_chooses_do_not_meet() {
        let hops = Hops::new(SecretState::of_number(1));
        assert_spreads(hops.places.hasher(), |address| -> HopKey {
            ((Egress::Host, address, u16::MAX), false)
        });
    }
}
