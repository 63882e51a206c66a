//! Where a packet comes in and where it goes: interface, host, bond; for what leaves a core also another core or unit.
//!
//! Tables and rules speak of these and never of numbers with a special meaning. [`Ingress::compact`] is for flow
//! records only, where every byte counts.

use std::fmt;

/// Number of a plain interface: its place in the configuration's list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InterfaceId(pub u16);

impl InterfaceId {
    /// The place as an index.
    #[inline]
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for InterfaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Number of a bond, and so of its peer: given once for a public key, the same for the life of the process. Below
/// [`BondId::MAX`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BondId(pub u16);

impl BondId {
    /// Most bonds of a node.
    pub const MAX: u16 = 0x7fff;

    /// The number as an index.
    #[inline]
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for BondId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How a packet came to a unit of a cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Arrival {
    /// From outside, or from a unit that only reads: nobody of the chain has seen it.
    #[default]
    Outside,
    /// From the unit before it in the chain, which does not have the flow.
    Punted,
    /// From the end of the chain: no earlier owner has the flow.
    Unclaimed,
}

/// Visit of a packet at a unit of a cluster, as the encapsulation told it (row D3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnitVisit {
    /// Who had it before.
    pub arrival: Arrival,
    /// Times that it may still be sent on to another unit.
    pub ttl: u8,
    /// Parity of the era of the table by which it was sent here.
    pub odd_era: bool,
    /// The dispatcher that took it in, a node id below 4,096.
    pub dispatcher: u16,
}

/// By what a packet came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Ingress {
    /// A plain interface.
    Interface(InterfaceId),
    /// The host's own stack: the TUN device.
    Host,
    /// A bond: the peer sent it through the tunnel.
    Bond(BondId),
}

/// Compact forms: interfaces from 0, the host, bonds from [`BONDS`].
const HOST: u16 = 0x7fff;
const BONDS: u16 = 0x8000;

impl Ingress {
    /// Two bytes for a flow record; [`Ingress::from_compact`] reads them.
    #[inline]
    #[must_use]
    pub const fn compact(self) -> u16 {
        match self {
            Self::Interface(id) => id.0,
            Self::Host => HOST,
            Self::Bond(id) => BONDS | id.0,
        }
    }

    /// The inverse of [`Ingress::compact`].
    #[inline]
    #[must_use]
    pub const fn from_compact(compact: u16) -> Self {
        match compact {
            HOST => Self::Host,
            BONDS.. => Self::Bond(BondId(compact & !BONDS)),
            interface => Self::Interface(InterfaceId(interface)),
        }
    }

    /// The interface, if it is one.
    #[inline]
    #[must_use]
    pub const fn interface(self) -> Option<InterfaceId> {
        match self {
            Self::Interface(id) => Some(id),
            Self::Host | Self::Bond(_) => None,
        }
    }
}

/// Which core of this node processes a packet that came by a bond, as far as its datagram told (rows T5–T9).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Placement {
    /// The one that got it: the peer named it, or it was chosen already.
    #[default]
    Here,
    /// This one: the peer named it in the sealed part.
    Core(u8),
    /// The one that this node chooses for the flow. `tell`: the peer's core that wants to know.
    ByFlow {
        /// The peer's core that sent it.
        tell: Option<u8>,
    },
    /// The one that this node chooses for the session-ID.
    BySession(u64),
}

/// Egress of a packet that was decided: what becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Egress {
    /// Leaves by a plain interface.
    Interface(InterfaceId),
    /// Goes to the host's own stack, for the host itself.
    Host,
    /// Goes to the host's own stack, which passes it on by a device that is no interface here.
    Kernel,
    /// Goes to a peer through the tunnel.
    Bond(BondId),
    /// Goes to another core of this machine, by a ring.
    Core(u8),
    /// Goes to another machine of the cluster.
    Unit(u16),
}

impl Egress {
    /// The interface, if it is one.
    #[inline]
    #[must_use]
    pub const fn interface(self) -> Option<InterfaceId> {
        match self {
            Self::Interface(id) => Some(id),
            Self::Host | Self::Kernel | Self::Bond(_) | Self::Core(_) | Self::Unit(_) => None,
        }
    }
}

impl From<Ingress> for Egress {
    fn from(ingress: Ingress) -> Self {
        match ingress {
            Ingress::Interface(id) => Self::Interface(id),
            Ingress::Host => Self::Host,
            Ingress::Bond(id) => Self::Bond(id),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compact_forms_are_unique_and_read_back() {
        let all = (0..256)
            .map(|id| Ingress::Interface(InterfaceId(id)))
            .chain([Ingress::Host])
            .chain([0, 1, 300, BondId::MAX].map(|id| Ingress::Bond(BondId(id))));
        let mut seen = std::collections::BTreeSet::new();
        for ingress in all {
            assert_eq!(Ingress::from_compact(ingress.compact()), ingress);
            assert!(seen.insert(ingress.compact()), "{ingress:?}");
        }
    }
}
