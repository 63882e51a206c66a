//! How a side is told the core that shall process a packet (rows T4–T9), and what two sides agree on.
//!
//! Each side says in its hello how it wants *its own* cores to be addressed ([`Steering::receive`]) and in which ways it
//! is willing to address the other's ([`Steering::accept`]). Both directions are independent. A wish that the other side
//! does not accept is refused by both, each with the reason ([`Steering::refusal`]); no session comes to be.

use std::fmt;

use packet::drop_reason::DropReason;

use crate::frame::{Frame, extension};

/// How datagrams find the receiving core (rows T4–T9).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum SteeringMode {
    /// The sender names the core in the header (row T4).
    #[default]
    CoreId = 0,
    /// The receiver assigns cores to flows as they appear, and tells (row T5).
    ReceiverAssigned = 1,
    /// One core for the whole tunnel (row T6).
    PerTunnel = 2,
    /// The core is named in the sealed part (row T7).
    SealedCoreId = 3,
    /// The receiver decides alone, after decryption (row T8).
    ReceiverDecides = 4,
    /// A clear 64-bit session-ID per flow (row T9).
    SessionId = 5,
    /// The sender names the core in the header, where it is sealed with a key of its own (row T7).
    SealedHeader = 6,
}

impl SteeringMode {
    /// All modes, in the order of their numbers.
    pub const ALL: [Self; 7] = [
        Self::CoreId,
        Self::ReceiverAssigned,
        Self::PerTunnel,
        Self::SealedCoreId,
        Self::ReceiverDecides,
        Self::SessionId,
        Self::SealedHeader,
    ];

    /// Modes that this version can be addressed in and address in.
    pub const BUILT: [Self; 7] = Self::ALL;

    /// The number on the wire.
    #[must_use]
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// The mode with this number.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.number() == number)
    }

    /// Whether datagrams with inner packets may name no receiving core in their header.
    #[must_use]
    pub const fn may_name_none(self) -> bool {
        !matches!(self, Self::CoreId | Self::PerTunnel | Self::SealedHeader)
    }

    /// Whether the sender chooses a core for each flow.
    #[must_use]
    pub const fn sender_chooses(self) -> bool {
        matches!(self, Self::CoreId | Self::SealedCoreId | Self::SealedHeader)
    }

    /// Bytes of the label in front of a datagram's packets.
    #[must_use]
    pub(crate) const fn label_bytes(self) -> usize {
        match self {
            Self::SealedCoreId => Label::Core(0).encoded_len(),
            Self::SessionId => Label::Session(0).encoded_len(),
            _ => 0,
        }
    }

    /// The name in configuration and reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::CoreId => "core-id",
            Self::ReceiverAssigned => "receiver-assigned",
            Self::PerTunnel => "per-tunnel",
            Self::SealedCoreId => "sealed-core-id",
            Self::ReceiverDecides => "receiver-decides",
            Self::SessionId => "session-id",
            Self::SealedHeader => "sealed-header",
        }
    }
}

impl fmt::Display for SteeringMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Word about the core of its packets in a datagram whose header names none: an extension frame in front of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Label {
    /// Nothing.
    #[default]
    None,
    /// The core; sealed (row T7).
    Core(u8),
    /// Their session-ID; clear (row T9).
    Session(u64),
}

impl Label {
    /// Bytes of the frame.
    #[must_use]
    pub const fn encoded_len(&self) -> usize {
        match self {
            Self::None => 0,
            Self::Core(_) => 5,
            Self::Session(_) => SESSION_LABEL_BYTES,
        }
    }

    /// Writes the frame at the beginning of `out`, which has room for it; returns its length.
    pub fn write(&self, out: &mut [u8]) -> usize {
        let written = match self {
            Self::None => Some(0),
            Self::Core(core) => {
                Frame::Extension { kind: extension::SEALED_CORE, body: &[*core] }.write(out, 0)
            }
            Self::Session(id) => {
                Frame::Extension { kind: extension::SESSION_ID, body: &id.to_be_bytes() }.write(out, 0)
            }
        };
        written.unwrap_or(0)
    }
}

/// Bytes of the frame with a session-ID.
pub const SESSION_LABEL_BYTES: usize = 12;

/// Where a datagram goes: the receiving core that its header names ([`crate::header::NOT_TOLD`]: none), and its label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heading {
    /// Receiving core in the header.
    pub peer_core: u8,
    /// Label in front of the packets.
    pub label: Label,
}

impl From<u8> for Heading {
    fn from(peer_core: u8) -> Self {
        Self { peer_core, label: Label::None }
    }
}

/// A set of modes: bit n is the mode with number n. Bits of unknown modes are kept and mean nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModeSet(pub u8);

impl ModeSet {
    /// Core-id alone: of a side that does not say.
    pub const CORE_ID: Self = Self(1);

    /// The modes that this version has.
    #[must_use]
    pub fn built() -> Self {
        SteeringMode::BUILT.into_iter().collect()
    }

    /// Whether a mode is in the set.
    #[must_use]
    pub const fn contains(self, mode: SteeringMode) -> bool {
        self.0 & (1 << mode.number()) != 0
    }
}

impl fmt::Display for ModeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = SteeringMode::ALL.into_iter().filter(|mode| self.contains(*mode));
        f.write_str(&names.map(SteeringMode::name).collect::<Vec<_>>().join(", "))
    }
}

impl FromIterator<SteeringMode> for ModeSet {
    fn from_iter<I: IntoIterator<Item = SteeringMode>>(modes: I) -> Self {
        Self(modes.into_iter().fold(0, |set, mode| set | 1 << mode.number()))
    }
}

/// How a peer shall address our cores, and how we are willing to address its.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Steering {
    /// Mode that we want to receive.
    pub receive: SteeringMode,
    /// Modes that we are willing to send in.
    pub accept: ModeSet,
    /// Row T6: our core for the whole tunnel; `None`, or one that may not be used: one of the usable cores, by the
    /// number of the bond.
    pub tunnel_core: Option<u8>,
    /// Row T6: the peer's core for the whole tunnel, whatever the peer tells; one that it does not have, or that may not
    /// be used, is not named.
    pub peer_tunnel_core: Option<u8>,
    /// Row T5: where the peer assigns cores, it is asked for a flow's core before the flow's first datagram.
    pub ask_core_first: bool,
}

impl Default for Steering {
    fn default() -> Self {
        Self {
            receive: SteeringMode::default(),
            accept: ModeSet::built(),
            tunnel_core: None,
            peer_tunnel_core: None,
            ask_core_first: false,
        }
    }
}

impl Steering {
    /// Why there is no session with a peer that wants `theirs` and accepts `accepted`; `None` when both directions work.
    #[must_use]
    pub fn refusal(&self, theirs: SteeringMode, accepted: ModeSet) -> Option<Refusal> {
        if !self.accept.contains(theirs) {
            Some(Refusal::NotAcceptedHere(theirs))
        } else if !accepted.contains(self.receive) {
            Some(Refusal::NotAcceptedThere(self.receive))
        } else {
            None
        }
    }
}

/// Why two sides have no session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The peer wants what we do not accept.
    #[error("it wants steering {0}, which accept-steering does not allow here")]
    NotAcceptedHere(SteeringMode),
    /// We want what the peer does not accept.
    #[error("it does not accept steering {0}, which is wanted here")]
    NotAcceptedThere(SteeringMode),
    /// The peer carries Ethernet frames, and we do not.
    #[error("it carries Ethernet frames, which needs [tap] and ethernet = true for this peer here")]
    NoEthernetHere,
    /// We carry Ethernet frames, and the peer does not.
    #[error("it carries no Ethernet frames with this node: they need [tap] and ethernet = true there too")]
    NoEthernetThere,
}

impl Refusal {
    /// Drop reason of the handshake.
    #[must_use]
    pub const fn reason(self) -> DropReason {
        match self {
            Self::NotAcceptedHere(_) | Self::NotAcceptedThere(_) => DropReason::HandshakeSteering,
            Self::NoEthernetHere | Self::NoEthernetThere => DropReason::HandshakeEthernet,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn numbers_and_names_are_unique() {
        for mode in SteeringMode::ALL {
            assert_eq!(SteeringMode::from_number(mode.number()), Some(mode));
            assert_eq!(SteeringMode::ALL.iter().filter(|other| other.name() == mode.name()).count(), 1);
        }
        assert_eq!(SteeringMode::from_number(7), None);
    }

    #[test]
    fn a_side_refuses_what_it_does_not_accept_and_learns_what_the_other_does_not() {
        let steering = |receive, accept: &[SteeringMode]| Steering {
            receive,
            accept: accept.iter().copied().collect(),
            ..Steering::default()
        };
        let plain = steering(SteeringMode::CoreId, &[SteeringMode::CoreId]);
        let asks = steering(SteeringMode::PerTunnel, &SteeringMode::ALL);
        assert_eq!(plain.refusal(plain.receive, plain.accept), None);
        assert_eq!(asks.refusal(asks.receive, asks.accept), None);
        assert_eq!(
            plain.refusal(asks.receive, asks.accept),
            Some(Refusal::NotAcceptedHere(SteeringMode::PerTunnel))
        );
        assert_eq!(
            asks.refusal(plain.receive, plain.accept),
            Some(Refusal::NotAcceptedThere(SteeringMode::PerTunnel))
        );
    }
}
