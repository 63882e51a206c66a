//! A NAT between a dialer's WAN and the network: one public address, a port per (socket, destination).
//!
//! The strictest common kind (symmetric mapping, address- and port-dependent filter), because what works
//! behind it works behind all others.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use tunnel::time::Time;

/// Translates in both directions.
#[derive(Clone, Debug)]
pub struct Nat {
    public: IpAddr,
    /// (inner source, destination) → public address and port, and last use.
    out: BTreeMap<(SocketAddr, SocketAddr), (SocketAddr, Time)>,
    next_port: u16,
    /// A mapping that nothing used from inside for this long is forgotten, seconds; 0 = never.
    pub forget_after_s: u64,
    /// A mapping has one of so many addresses, in turn from the public one on, as behind some carriers' NATs.
    pub addresses: u8,
}

impl Nat {
    /// A NAT with this public address.
    pub fn new(public: IpAddr) -> Self {
        Self { public, out: BTreeMap::new(), next_port: 40_000, forget_after_s: 30, addresses: 1 }
    }

    /// The public address now.
    pub fn public(&self) -> IpAddr {
        self.public
    }

    /// Forgets all mappings: new ones get other ports, and another address if one is given.
    pub fn rebind(&mut self, public: Option<IpAddr>) {
        self.out.clear();
        self.next_port = self.next_port.wrapping_add(1_000).max(20_000);
        self.public = public.unwrap_or(self.public);
    }

    /// Whether a datagram of the network for this address comes here.
    pub fn owns(&self, address: IpAddr) -> bool {
        address == self.public || self.out.values().any(|(public, _)| public.ip() == address)
    }

    /// A datagram from inside to `to`: the source the network sees.
    pub fn outward(&mut self, now: Time, from: SocketAddr, to: SocketAddr) -> SocketAddr {
        let expired = self.expired(now);
        let known = self.out.get(&(from, to)).filter(|(_, used)| !expired(*used)).map(|(public, _)| *public);
        let public = known.unwrap_or_else(|| {
            self.next_port = self.next_port.wrapping_add(1).max(20_000);
            SocketAddr::new(self.address(self.next_port), self.next_port)
        });
        self.out.insert((from, to), (public, now));
        public
    }

    /// The address of a mapping with this port.
    fn address(&self, port: u16) -> IpAddr {
        match self.public {
            IpAddr::V4(public) => {
                let [a, b, c, d] = public.octets();
                IpAddr::from([a, b, c, d.wrapping_add((port % u16::from(self.addresses.max(1))) as u8)])
            }
            IpAddr::V6(_) => self.public,
        }
    }

    /// A datagram from the network for a public address and port: who gets it inside, if anyone asked.
    pub fn inward(&self, now: Time, from: SocketAddr, to: SocketAddr) -> Option<SocketAddr> {
        let expired = self.expired(now);
        self.out
            .iter()
            .find(|((_, remote), (public, used))| *remote == from && *public == to && !expired(*used))
            .map(|((inside, _), _)| *inside)
    }

    fn expired(&self, now: Time) -> impl Fn(Time) -> bool + use<> {
        let limit_ns = self.forget_after_s * 1_000_000_000;
        move |used| limit_ns > 0 && now.since(used) > limit_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_filters_forgets_and_rebinds() {
        let [inside, near, far] = [1, 2, 3].map(|n| SocketAddr::from(([10, 0, 0, n], 7)));
        let mut nat = Nat::new(IpAddr::from([192, 0, 2, 1]));
        let seen = nat.outward(Time::ZERO, inside, near);
        assert_eq!(seen.ip(), nat.public());
        assert_eq!(nat.outward(Time::ZERO, inside, near), seen);
        assert_ne!(nat.outward(Time::ZERO, inside, far), seen);
        assert_eq!(nat.inward(Time::ZERO, near, seen), Some(inside));
        assert_eq!(nat.inward(Time::ZERO, far, seen), None);
        assert_eq!(nat.inward(Time::from_ms(31_000), near, seen), None);
        nat.rebind(Some(IpAddr::from([192, 0, 2, 9])));
        assert_eq!(nat.inward(Time::ZERO, near, seen), None);
        assert_ne!(nat.outward(Time::ZERO, inside, near), seen);
    }
}
