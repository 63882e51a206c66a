//! What goes into a core and what comes out.

use std::net::IpAddr;

use packet::DropReason;
use packet::flow::FlowKey;
use packet::vnet::VirtioNetHeader;

use crate::flow::{Direction, FlowId};
use crate::fragment::Measure;
use crate::spec::PortId;

/// Bytes of an Ethernet header without VLAN tag.
pub const ETHERNET_BYTES: usize = 14;

/// One received packet and what becomes of it. The bytes are changed in place.
#[derive(Debug)]
pub struct Frame<'a> {
    /// Where it came in.
    pub port: PortId,
    /// Offload header: a super-packet, a partial checksum. Offsets count from the IP header.
    pub offload: VirtioNetHeader,
    /// [`ETHERNET_BYTES`] of Ethernet header (room for one, if it had none), then the IP packet.
    pub bytes: &'a mut [u8],
    /// What to do with it now.
    pub outcome: Outcome,
    /// The flow it belongs to, if it goes on; frames of one flow and direction may leave in one train.
    pub flow: Option<(FlowId, Direction)>,
}

impl<'a> Frame<'a> {
    /// A frame that nothing has happened to yet.
    #[must_use]
    pub fn new(port: PortId, offload: VirtioNetHeader, bytes: &'a mut [u8]) -> Self {
        Self { port, offload, bytes, outcome: Outcome::Pending, flow: None }
    }

    /// The IP packet.
    #[must_use]
    pub fn packet(&self) -> &[u8] {
        self.bytes.get(ETHERNET_BYTES..).unwrap_or_default()
    }
}

/// What becomes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Not looked at yet.
    Pending,
    /// Leaves through this interface; its Ethernet header is written.
    Send(PortId),
    /// Goes to the host's own stack, without Ethernet header.
    Host,
    /// Goes into a bond, without Ethernet header.
    Tunnel,
    /// The hardware address of this next hop is not known: the kernel shall resolve it and send.
    Resolve(PortId, IpAddr),
    /// Nothing more to do: held, handed over, answered.
    Done,
    /// Dropped, counted.
    Dropped(DropReason),
}

/// Something for another core.
#[derive(Debug)]
pub struct Handed {
    /// Where it came in.
    pub port: PortId,
    /// Offload header.
    pub offload: VirtioNetHeader,
    /// Room for an Ethernet header, then the IP packet.
    pub bytes: Vec<u8>,
    /// Place in the packet's owner chain ([`crate::steer::Owners`]).
    pub step: u8,
    /// A fragment whose ports are known by now.
    pub piece: Option<Piece>,
}

/// What is known of a fragment besides its own bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The tuple of the packet that it is part of.
    pub key: FlowKey,
    /// What is known about the packet's size.
    pub measure: Measure,
}

/// What a core wants done besides the frames of its batch.
pub trait Output {
    /// Sends a packet made here, or held here, as [`Outcome`] says. `bytes`: room for an Ethernet header (or the header
    /// itself), then the packet.
    fn emit(&mut self, outcome: Outcome, offload: &VirtioNetHeader, bytes: &mut [u8]);

    /// Hands something to another core; `false` when its ring is full.
    fn hand_over(&mut self, core: u8, handed: Handed) -> bool;
}
