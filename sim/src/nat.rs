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
    /// (inner source, destination) → public port and last use.
    out: BTreeMap<(SocketAddr, SocketAddr), (u16, Time)>,
    next_port: u16,
    /// A mapping that nothing used from inside for this long is forgotten, seconds; 0 = never.
    pub forget_after_s: u64,
}

impl Nat {
    /// A NAT with this public address.
    pub fn new(public: IpAddr) -> Self {
        Self { public, out: BTreeMap::new(), next_port: 40_000, forget_after_s: 30 }
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

    /// A datagram from inside to `to`: the source the network sees.
    pub fn outward(&mut self, now: Time, from: SocketAddr, to: SocketAddr) -> SocketAddr {
        let expired = self.expired(now);
        let entry = self.out.entry((from, to)).or_insert((0, now));
        if entry.0 == 0 || expired(entry.1) {
            self.next_port = self.next_port.wrapping_add(1).max(20_000);
            entry.0 = self.next_port;
        }
        entry.1 = now;
        SocketAddr::new(self.public, entry.0)
    }

    /// A datagram from the network for a public port: who gets it inside, if anyone asked.
    pub fn inward(&self, now: Time, from: SocketAddr, to: SocketAddr) -> Option<SocketAddr> {
        let expired = self.expired(now);
        if to.ip() != self.public {
            return None;
        }
        self.out
            .iter()
            .find(|((_, remote), (port, used))| *remote == from && *port == to.port() && !expired(*used))
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
