//! Cables between WANs: a link each way, perhaps with a NAT in front of the first end.

use std::net::SocketAddr;

use tunnel::time::Time;

use crate::link::{Direction, Shape};
use crate::nat::Nat;

/// Bytes that IPv4 and UDP add: what counts against an MTU.
pub const IP_OVERHEAD_BYTES: usize = 28;

/// A UDP datagram under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// Source, as the next hop sees it.
    pub from: SocketAddr,
    /// Destination, as the next hop sees it.
    pub to: SocketAddr,
    /// UDP payload.
    pub bytes: Vec<u8>,
}

impl Datagram {
    /// The same with a flipped bit of its payload.
    fn flip(&mut self, bit: u64) {
        let bits = self.bytes.len() as u64 * 8;
        if let Some(bit) = bit.checked_rem(bits)
            && let Some(byte) = self.bytes.get_mut((bit / 8) as usize)
        {
            *byte ^= 1 << (bit % 8);
        }
    }
}

/// A cable: two ends, a link each way, perhaps a NAT at the first end.
pub struct Cable {
    /// (site, WAN) at both ends.
    pub ends: [(usize, u16); 2],
    /// From the first end to the second, and back.
    pub links: [Link; 2],
    /// In front of the first end.
    pub nat: Option<Nat>,
}

impl Cable {
    /// Cuts or heals both directions.
    pub fn cut(&mut self, on: bool) {
        for link in &mut self.links {
            link.cut(on);
        }
    }
}

/// One direction of a cable.
#[derive(Clone, Debug)]
pub struct Link {
    direction: Direction<Datagram>,
    /// When the world looks at it, by an event.
    pub(crate) wake: Time,
    /// When it was looked at last: changes take hold from there.
    looked: Time,
    /// UDP payload bytes that came out at the end.
    pub left_bytes: u64,
}

impl Link {
    /// An idle link.
    pub(crate) fn new(shape: &Shape, seed: u64) -> Self {
        Self {
            direction: Direction::new(shape.clone(), seed),
            wake: Time::MAX,
            looked: Time::ZERO,
            left_bytes: 0,
        }
    }

    /// Datagrams that entered.
    #[must_use]
    pub fn entered(&self) -> u64 {
        self.direction.counters().offered
    }

    /// Datagrams that came out at the end.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.direction.counters().delivered
    }

    /// Datagrams that it lost at random or cut off.
    #[must_use]
    pub fn lost(&self) -> u64 {
        let counters = self.direction.counters();
        counters.lost + counters.swallowed
    }

    /// A datagram enters; a link that does not take it has counted that.
    pub(crate) fn enter(&mut self, now: Time, datagram: Datagram) {
        self.looked = now;
        let ip_bytes = (datagram.bytes.len() + IP_OVERHEAD_BYTES) as u32;
        let _ = self.direction.offer(now.ns(), ip_bytes, datagram);
    }

    /// The next datagram that has come out, and whether it comes twice.
    pub(crate) fn leave(&mut self, now: Time) -> Option<(Datagram, bool)> {
        self.looked = now;
        let arrival = self.direction.pop(now.ns())?;
        let mut datagram = arrival.packet;
        self.left_bytes += datagram.bytes.len() as u64;
        if let Some(bit) = arrival.flip_bit {
            datagram.flip(bit);
        }
        Some((datagram, arrival.duplicate))
    }

    /// When something comes out at the earliest.
    pub(crate) fn next(&self) -> Time {
        self.direction.next_event_ns().map_or(Time::MAX, Time::from_ns)
    }

    fn change(&mut self, change: impl FnOnce(&mut Shape)) {
        let mut shape = self.direction.shape().clone();
        change(&mut shape);
        self.direction.set_shape(self.looked.ns(), shape);
    }

    /// Cuts the link silently (true) or heals it (false), with all that is under way.
    pub fn cut(&mut self, on: bool) {
        self.change(|shape| shape.black_hole = on);
    }

    /// Changes the rate, Mbit/s.
    pub fn set_rate(&mut self, mbps: f64) {
        self.change(|shape| shape.rate_bps = (mbps * 1e6) as u64);
    }

    /// Changes the longest IP packet that passes, bytes.
    pub fn set_mtu(&mut self, bytes: u32) {
        self.change(|shape| shape.mtu = bytes);
    }
}
