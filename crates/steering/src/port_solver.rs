//! The hash inverted: source ports whose replies come to a wanted core, in O(1).
//!
//! A translated flow leaves with a source port of our choosing, and its reply is steered by the hash of
//! (remote, own) like any packet. Toeplitz is linear, so the 16 bits of the port enter the hash as
//! `hash(port) = hash(0) ^ M·port` over GF(2), where column `b` of `M` is the key window of port bit `b`.
//! Gaussian elimination, once for a key, gives
//!
//! * for each of the `bits` hash bits that choose the bucket, a *unit solution*: port bits that flip just it;
//! * a basis of the *nullspace*: port bits that flip none of them.
//!
//! Then a port of the wanted bucket is the start port XOR the unit solutions of the differing bits, and every
//! further one is a single XOR away: all `2^(free bits − bits)` ports of a block, each once, without search.
//! Only the low `free bits` of the port change, so solutions stay in an aligned block of `2^(free bits)` ports,
//! which is how ports are leased.
//!
//! [`PortSolver`] is one field of one layout: any key, any hash bits, also a network card's.
//! [`ReplyPorts`] holds the four that [`crate::symmetric`] needs (IPv4 and IPv6, low and high endpoint) and
//! picks the right one. Not every key has the rank: [`ReplyPorts::draw`] draws again.
//!
//! Flows that it cannot solve go over the ring to the flow's core: equal addresses (the port itself decides
//! which endpoint is the low one) and mappings that must serve any remote.

use std::net::IpAddr;

use packet::flow::FlowKey;

use crate::symmetric::FlowHasher;
use crate::table::BucketTable;
use crate::toeplitz::key_window;

#[cfg(test)]
mod tests;

/// Bits of a port.
const PORT_BITS: u32 = 16;

/// IP protocol number of ICMP.
const ICMP: u8 = 1;

/// IP protocol number of ICMPv6.
const ICMP_V6: u8 = 58;

/// Solutions for one port field of the hash input.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PortSolver {
    shift: u32,
    /// Place `i`: the port bits that flip bit `shift + i` of the hash and no other of the chosen bits.
    units: Vec<u16>,
    /// Port bits that flip none of the chosen hash bits.
    nullspace: Vec<u16>,
}

impl PortSolver {
    /// Solves for the port that starts at bit `port_at` of the hash input (its most significant bit), for the
    /// hash bits `shift..shift + bits`, when only the port's low `free_bits` may change.
    ///
    /// `None` if the key lacks the rank, or the numbers do not fit (at most 16 bits each, `shift + bits ≤ 32`).
    #[must_use]
    pub fn new(key: &[u8], port_at: usize, shift: u32, bits: u32, free_bits: u32) -> Option<Self> {
        if bits > free_bits || free_bits > PORT_BITS || shift > 32 - bits {
            return None;
        }
        // Row i: what flips hash bit `shift + i`. Bits 0–15: which port bits do. Bits 16–31: which of the
        // original rows it is the sum of.
        let mut rows: Vec<u32> = (0..bits).map(|row| 1 << (PORT_BITS + row)).collect();
        for port_bit in 0..free_bits {
            let column = key_window(key, port_at + (PORT_BITS - 1 - port_bit) as usize) >> shift;
            for (row, sum) in rows.iter_mut().enumerate() {
                *sum |= (column >> row & 1) << port_bit;
            }
        }
        let pivots = eliminate(&mut rows, free_bits)?;

        let gather = |bit: u32| {
            let set = rows.iter().zip(&pivots).filter(|(row, _)| *row >> bit & 1 == 1);
            set.fold(0u16, |port, (_, pivot)| port | 1 << pivot)
        };
        let units = (0..bits).map(|unit| gather(PORT_BITS + unit)).collect();
        let free = (0..free_bits).filter(|bit| !pivots.contains(bit));
        let nullspace = free.map(|bit| 1 << bit | gather(bit)).collect();
        Some(Self { shift, units, nullspace })
    }

    /// Place `i`: the port bits that flip bit `i` of the chosen hash bits, alone.
    #[must_use]
    pub fn units(&self) -> &[u16] {
        &self.units
    }

    /// A basis of the port changes that leave the chosen hash bits alone.
    #[must_use]
    pub fn nullspace(&self) -> &[u16] {
        &self.nullspace
    }

    /// The first solution: `start` with bits flipped so that the chosen bits of its hash, now `hash`, become
    /// `wanted` (a bucket number).
    #[inline]
    #[must_use]
    pub fn port(&self, start: u16, hash: u32, wanted: u32) -> u16 {
        let difference = (hash >> self.shift) ^ wanted;
        let set = self.units.iter().enumerate().filter(|(bit, _)| difference >> bit & 1 == 1);
        set.fold(start, |port, (_, unit)| port ^ unit)
    }

    /// All solutions, each once, from the one that `random` picks. Draw `random` anew for each flow, or ports
    /// become predictable (RFC 6056).
    #[must_use]
    pub fn ports(&self, start: u16, hash: u32, wanted: u32, random: u32) -> Ports<'_> {
        let set = self.nullspace.iter().enumerate().filter(|(bit, _)| random >> bit & 1 == 1);
        let first = set.fold(self.port(start, hash, wanted), |port, (_, change)| port ^ change);
        Ports { nullspace: &self.nullspace, next: first, given: 0 }
    }
}

/// Gauss-Jordan over GF(2), pivots from port bit 0 upwards; each row's pivot, or `None` if a row has none.
fn eliminate(rows: &mut [u32], free_bits: u32) -> Option<Vec<u32>> {
    let mut pivots = Vec::with_capacity(rows.len());
    for bit in 0..free_bits {
        let done = pivots.len();
        let Some(found) = rows.iter().skip(done).position(|row| row >> bit & 1 == 1) else { continue };
        rows.swap(done, done + found);
        let pivot_row = rows[done];
        for (place, row) in rows.iter_mut().enumerate() {
            if place != done && *row >> bit & 1 == 1 {
                *row ^= pivot_row;
            }
        }
        pivots.push(bit);
    }
    (pivots.len() == rows.len()).then_some(pivots)
}

/// The ports of a bucket, one XOR each: a Gray-code walk through the nullspace.
#[derive(Clone, Debug)]
pub struct Ports<'a> {
    nullspace: &'a [u16],
    next: u16,
    given: u32,
}

impl Iterator for Ports<'_> {
    type Item = u16;

    #[inline]
    fn next(&mut self) -> Option<u16> {
        if self.given >> self.nullspace.len() != 0 {
            return None;
        }
        let port = self.next;
        self.given += 1;
        if let Some(change) = self.nullspace.get(self.given.trailing_zeros() as usize) {
            self.next ^= change;
        }
        Some(port)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = (1usize << self.nullspace.len()).saturating_sub(self.given as usize);
        (left, Some(left))
    }
}

impl ExactSizeIterator for Ports<'_> {}

/// Why the solver has no port for a flow; the ring has to carry its replies.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NoSolution {
    /// The port decides which endpoint is the low one, so the hash is not linear in it.
    #[error("both ends have the same address")]
    EqualAddresses,
    /// One address is IPv4, the other IPv6.
    #[error("addresses of different families")]
    MixedFamilies,
}

/// A flow to be given a source port, as it leaves after translation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Outgoing {
    /// The source address that it leaves with.
    pub own: IpAddr,
    /// The destination.
    pub remote: IpAddr,
    /// The destination port. No meaning for ICMP.
    pub remote_port: u16,
    /// IP protocol. For ICMP (1) and ICMPv6 (58) the port to be found is the echo id.
    pub protocol: u8,
    /// The tenant.
    pub tenant: u16,
}

impl Outgoing {
    /// The flow with source port (or echo id) `port`.
    #[must_use]
    pub fn with_port(&self, port: u16) -> FlowKey {
        let (src_port, dst_port) = match self.is_echo() {
            // Between equal addresses an echo request has its id in the source slot.
            true if self.own <= self.remote => (port, 0),
            true => (0, port),
            false => (port, self.remote_port),
        };
        FlowKey { src: self.own, dst: self.remote, src_port, dst_port, protocol: self.protocol }
    }

    /// Where the port that is sought stands in the hash input.
    pub fn slot(&self) -> Result<PortSlot, NoSolution> {
        if self.own == self.remote {
            return Err(NoSolution::EqualAddresses);
        }
        // The echo id stands in the low slot whoever asked.
        let low = self.is_echo() || self.own < self.remote;
        match (self.own, self.remote) {
            (IpAddr::V4(_), IpAddr::V4(_)) if low => Ok(PortSlot::LowV4),
            (IpAddr::V4(_), IpAddr::V4(_)) => Ok(PortSlot::HighV4),
            (IpAddr::V6(_), IpAddr::V6(_)) if low => Ok(PortSlot::LowV6),
            (IpAddr::V6(_), IpAddr::V6(_)) => Ok(PortSlot::HighV6),
            _ => Err(NoSolution::MixedFamilies),
        }
    }

    fn is_echo(&self) -> bool {
        matches!(self.protocol, ICMP | ICMP_V6)
    }
}

/// One of the four places of a port in the input of the symmetric hash.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum PortSlot {
    /// IPv4, the low endpoint's port.
    LowV4 = 0,
    /// IPv4, the high endpoint's.
    HighV4 = 1,
    /// IPv6, low.
    LowV6 = 2,
    /// IPv6, high.
    HighV6 = 3,
}

impl PortSlot {
    /// All four, in the order of their numbers.
    pub const ALL: [Self; 4] = [Self::LowV4, Self::HighV4, Self::LowV6, Self::HighV6];

    /// The first of the port's two bytes in the hash input.
    #[must_use]
    pub const fn byte(self) -> usize {
        match self {
            Self::LowV4 => 8,
            Self::HighV4 => 10,
            Self::LowV6 => 32,
            Self::HighV6 => 34,
        }
    }
}

/// The solvers of one key of the symmetric hash, for one size of core table and one size of port block.
#[derive(Clone, Debug)]
pub struct ReplyPorts {
    low_v4: PortSolver,
    high_v4: PortSolver,
    low_v6: PortSolver,
    high_v6: PortSolver,
    block_bits: u32,
}

impl ReplyPorts {
    /// Solvers for a core table of `2^core_bits` buckets and aligned blocks of `2^block_bits` ports; `None` if
    /// the hasher's key lacks rank in one of the four fields.
    #[must_use]
    pub fn new(hasher: &FlowHasher, core_bits: u32, block_bits: u32) -> Option<Self> {
        let solver =
            |slot: PortSlot| PortSolver::new(hasher.key(), slot.byte() * 8, 16, core_bits, block_bits);
        Some(Self {
            low_v4: solver(PortSlot::LowV4)?,
            high_v4: solver(PortSlot::HighV4)?,
            low_v6: solver(PortSlot::LowV6)?,
            high_v6: solver(PortSlot::HighV6)?,
            block_bits,
        })
    }

    /// The solver of one place of the port.
    #[must_use]
    pub fn solver(&self, slot: PortSlot) -> &PortSolver {
        match slot {
            PortSlot::LowV4 => &self.low_v4,
            PortSlot::HighV4 => &self.high_v4,
            PortSlot::LowV6 => &self.low_v6,
            PortSlot::HighV6 => &self.high_v6,
        }
    }

    /// Takes the first of the drawn keys that has the rank. For 7 core bits more than half of all random keys
    /// do with blocks of 1,024 ports, nearly all with 65,536; so `None` within 64 draws means broken randomness
    /// (or impossible sizes).
    pub fn draw(
        core_bits: u32,
        block_bits: u32,
        keys: impl IntoIterator<Item = [u8; crate::toeplitz::KEY_BYTES]>,
    ) -> Option<(FlowHasher, Self)> {
        keys.into_iter().find_map(|key| {
            let hasher = FlowHasher::new(key);
            let ports = Self::new(&hasher, core_bits, block_bits)?;
            Some((hasher, ports))
        })
    }

    /// The ports of the block around `block` (any port of it) with which the replies to `flow` fall into
    /// `bucket` of the core table, each once, from one that `random` picks. Draw the bucket among the core's
    /// ([`OwnedBuckets::pick`]).
    ///
    /// `hasher` must be the one that the solvers were made from. Port 0 comes up like any other in the block
    /// that has it: who leases that block skips it.
    pub fn ports(
        &self,
        hasher: &FlowHasher,
        flow: &Outgoing,
        block: u16,
        bucket: u16,
        random: u32,
    ) -> Result<Ports<'_>, NoSolution> {
        let solver = self.solver(flow.slot()?);
        // Fixed bits come from the block, free bits from the solution.
        let start = (u32::from(block) >> self.block_bits << self.block_bits) as u16;
        let hash = hasher.hash(&flow.with_port(start), flow.tenant);
        Ok(solver.ports(start, hash, u32::from(bucket), random))
    }
}

/// The buckets of one unit, so that a random one is found at once.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OwnedBuckets(Vec<u16>);

impl OwnedBuckets {
    /// The buckets that `unit` owns in `table`.
    #[must_use]
    pub fn new(table: &BucketTable, unit: u16) -> Self {
        let owned = table.owners().iter().enumerate().filter(|(_, owner)| **owner == unit);
        Self(owned.map(|(bucket, _)| bucket as u16).collect())
    }

    /// One of the buckets, evenly chosen by a random word; `None` if the unit owns none.
    #[inline]
    #[must_use]
    pub fn pick(&self, random: u32) -> Option<u16> {
        let place = (u64::from(random) * self.0.len() as u64) >> 32;
        self.0.get(place as usize).copied()
    }
}
