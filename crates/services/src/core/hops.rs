//! Next hops as one core numbers them, with the Ethernet header that leads there.

use std::collections::BTreeMap;
use std::net::IpAddr;

use foldhash::fast::FixedState;
use hashbrown::HashMap;

use crate::policy::{Policy, is_interface};
use crate::spec::{HOST_PORT, PortId, TUNNEL_PORT};

/// Hardware addresses that control has learned from the kernel: one snapshot for all cores.
#[derive(Clone, Debug, Default)]
pub struct Neighbors {
    /// Raised with every change.
    pub version: u64,
    /// By interface and address.
    pub known: BTreeMap<(PortId, IpAddr), [u8; 6]>,
}

/// Not decided yet, or no longer.
pub const UNSET: u16 = 0;
/// The host's own stack.
pub const HOST: u16 = 1;
/// Into a bond.
pub const TUNNEL: u16 = 2;
/// Comes around: in again, from outside ([`super::hairpin`]).
pub const LOOP: u16 = 3;
const FIRST: u16 = 4;
/// Most next hops of a core.
const HOPS_MAX: usize = 60_000;

/// One next hop.
#[derive(Clone, Copy, Debug)]
pub struct Hop {
    /// The interface.
    pub port: PortId,
    /// The neighbour.
    pub address: IpAddr,
    /// Ethernet header; valid if `known`.
    pub ethernet: [u8; 14],
    /// Largest IP packet of the interface, bytes.
    pub mtu: u16,
    /// The neighbour's hardware address is known.
    pub known: bool,
}

/// All next hops of one core.
#[derive(Debug, Default)]
pub struct Hops {
    list: Vec<Hop>,
    places: HashMap<(PortId, IpAddr), u16, FixedState>,
    version: Option<u64>,
}

impl Hops {
    /// The number of a next hop, a new one if need be. [`UNSET`] for a neighbour that nobody knows yet, or for which
    /// there is no room: [`Hops::unnumbered`] leads there. So whoever asks for addresses that are not there fills
    /// nothing.
    pub fn number(&mut self, port: PortId, address: IpAddr, policy: &Policy, neighbors: &Neighbors) -> u16 {
        match port {
            HOST_PORT => return HOST,
            TUNNEL_PORT => return TUNNEL,
            _ => {}
        }
        if let Some(place) = self.places.get(&(port, address)) {
            return *place;
        }
        if self.list.len() >= HOPS_MAX || !neighbors.known.contains_key(&(port, address)) {
            return UNSET;
        }
        let place = FIRST + self.list.len() as u16;
        self.list.push(hop(port, address, policy, neighbors));
        self.places.insert((port, address), place);
        place
    }

    /// A next hop that has no number.
    #[must_use]
    pub fn unnumbered(port: PortId, address: IpAddr, policy: &Policy, neighbors: &Neighbors) -> Hop {
        hop(port, address, policy, neighbors)
    }

    /// Whether there is no room, and most of what takes it is of no use any more.
    #[must_use]
    pub fn is_worn_out(&self) -> bool {
        self.list.len() >= HOPS_MAX && self.list.iter().filter(|hop| hop.known).count() < HOPS_MAX / 2
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
        for known in &mut self.list {
            *known = hop(known.port, known.address, policy, neighbors);
        }
    }
}

fn hop(port: PortId, address: IpAddr, policy: &Policy, neighbors: &Neighbors) -> Hop {
    let mac = neighbors.known.get(&(port, address)).copied();
    let interface = policy.interface(port).filter(|_| is_interface(port));
    let own = interface.map(|interface| interface.mac);
    let mut ethernet = [0; 14];
    ethernet[..6].copy_from_slice(&mac.unwrap_or_default());
    ethernet[6..12].copy_from_slice(&own.unwrap_or_default());
    let kind: u16 = if address.is_ipv4() { 0x0800 } else { 0x86dd };
    ethernet[12..].copy_from_slice(&kind.to_be_bytes());
    let mtu = interface.map_or(1500, |interface| interface.mtu);
    Hop { port, address, ethernet, mtu, known: mac.is_some() && own.is_some() }
}
