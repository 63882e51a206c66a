//! Assemble or bridge: what is done with the fragments of a packet (row C5).

use crate::spec::{TCP, UDP};

/// Action of the flow's owner for a packet in pieces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Action {
    /// Every fragment goes on by itself, in the order of arrival.
    #[default]
    Bridge,
    /// Fragments are collected and go on as one packet.
    Assemble,
}

/// Facts that the core knows about a packet's flow when its header is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Protocol of the upper layer.
    pub protocol: u8,
    /// A connection entry exists for it.
    pub connection_exists: bool,
    /// A NAT entry exists for it and its assemble flag is set ([`crate::flow::flags::ASSEMBLE`]).
    pub nat_assemble_flag: bool,
    /// It goes to a configured service (virtual server): the service's protocol.
    pub configured_service: Option<u8>,
    /// It is traffic of a reverse NAT: from inside, its source is or will be translated.
    pub reverse_nat: bool,
}

/// The rules of row C5.
///
/// TCP is assembled if a connection entry exists, if a NAT entry has its assemble flag, for a configured service that
/// is not UDP, and for any reverse NAT. UDP is assembled if a NAT entry has the flag and for a configured service that
/// is not UDP. Everything else is bridged.
#[must_use]
pub fn action(facts: &Facts) -> Action {
    let service = facts.configured_service.is_some_and(|protocol| protocol != UDP);
    let assemble = match facts.protocol {
        TCP => facts.connection_exists || facts.nat_assemble_flag || service || facts.reverse_nat,
        UDP => facts.nat_assemble_flag || service,
        _ => false,
    };
    if assemble { Action::Assemble } else { Action::Bridge }
}

/// Facts about the size of a packet that are known when its header is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Measure {
    /// Length of the whole IP packet: known from the last fragment, or from the length in a UDP header.
    pub bytes: Option<u32>,
    /// How many fragments it has if all are as long as the first.
    pub fragments: Option<u16>,
}

/// By what assemble or bridge is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Variant {
    /// By the rules of [`action`].
    #[default]
    Rules,
    /// Every packet is assembled.
    Assemble,
    /// Every fragment is bridged.
    Bridge,
    /// Packets of up to so many bytes are assembled; the rules decide where the length is not known yet.
    UpToBytes(u32),
    /// Packets of up to so many fragments are assembled; the rules decide where the number is not known yet.
    UpToFragments(u16),
    /// Packets are assembled while the owner's load is below so many percent.
    LoadBelow(u8),
}

impl Variant {
    /// Action for a packet. `load_percent`: how busy the flow's owner is, 0–100.
    #[must_use]
    pub fn action(self, facts: &Facts, measure: &Measure, load_percent: u8) -> Action {
        let assemble = match self {
            Variant::Rules => None,
            Variant::Assemble => Some(true),
            Variant::Bridge => Some(false),
            Variant::UpToBytes(most) => measure.bytes.map(|bytes| bytes <= most),
            Variant::UpToFragments(most) => measure.fragments.map(|fragments| fragments <= most),
            Variant::LoadBelow(limit) => Some(load_percent < limit),
        };
        match assemble {
            None => action(facts),
            Some(true) => Action::Assemble,
            Some(false) => Action::Bridge,
        }
    }
}
