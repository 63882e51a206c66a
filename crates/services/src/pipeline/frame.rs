//! Input and output of a core.

use std::net::IpAddr;

use packet::attachment::{Egress, Ingress, InterfaceId, UnitVisit};
use packet::flow::FlowKey;
use packet::vnet::VirtioNetHeader;
use packet::{DropReason, PacketBuf, PacketPool};

use crate::flow::{Direction, FlowId};
use crate::fragment::Measure;

/// Bytes of an Ethernet header without VLAN tag.
pub const ETHERNET_BYTES: usize = 14;

/// One received packet and what becomes of it. The bytes are changed in place.
#[derive(Debug)]
pub struct Frame<'a> {
    /// By what it came in.
    pub ingress: Ingress,
    /// Offload header: a super-packet, a partial checksum. Offsets count from the IP header.
    pub offload: VirtioNetHeader,
    /// [`ETHERNET_BYTES`] of Ethernet header (room for one, if it had none), then the IP packet.
    pub bytes: &'a mut [u8],
    /// Outcome: how to proceed with it now.
    pub outcome: Outcome,
    /// The flow it belongs to, if it goes on; frames of one flow and direction may leave in one train.
    pub flow: Option<(FlowId, Direction)>,
    /// Visit at this unit of a cluster, of what another unit sent; of what leaves for a unit, the one there.
    pub visit: Option<UnitVisit>,
    /// Source and destination port of a fragment that leaves for a unit: it does not tell them itself.
    pub ports: Option<(u16, u16)>,
}

impl<'a> Frame<'a> {
    /// A frame that nothing has happened to yet.
    #[must_use]
    pub fn new(ingress: Ingress, offload: VirtioNetHeader, bytes: &'a mut [u8]) -> Self {
        Self { ingress, offload, bytes, outcome: Outcome::Pending, flow: None, visit: None, ports: None }
    }

    /// The IP packet.
    #[must_use]
    pub fn packet(&self) -> &[u8] {
        self.bytes.get(ETHERNET_BYTES..).unwrap_or_default()
    }

    /// The IP packet, to change.
    #[inline]
    pub fn packet_mut(&mut self) -> &mut [u8] {
        self.bytes.get_mut(ETHERNET_BYTES..).unwrap_or_default()
    }
}

/// Outcome of a frame: where it goes, or why not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Not looked at yet.
    Pending,
    /// Leaves there. For an interface its Ethernet header is written; the host and bonds get the packet without one.
    Forward(Egress),
    /// For the host, which gets it by the device of this interface, as if it had not been read.
    DeviceIngress(InterfaceId),
    /// The hardware address of this next hop is not known: the kernel shall resolve it and send.
    Resolve(InterfaceId, IpAddr),
    /// Nothing more to do: held, handed over, answered.
    Consumed,
    /// Dropped, counted.
    Dropped(DropReason),
}

/// How a packet reached the core that looks at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// This core read it itself.
    Wire,
    /// Another core handed it over; `visit`: place of this core in the packet's owner chain
    /// ([`crate::steer::Owners`]).
    Handed {
        /// From 0.
        visit: u8,
    },
    /// The core of its destination says that somebody is mapped there and that this core, which has the sender's mapping,
    /// shall begin the flow.
    MappingConfirmed,
    /// It was translated to somebody's outside endpoint and comes in again, as if from outside.
    Hairpin,
}

/// Something for another core.
#[derive(Debug)]
pub struct Handed {
    /// The packet, with its offload header and by what it came in.
    pub packet: PacketBuf,
    /// Why this core gets it.
    pub origin: Origin,
    /// A fragment whose ports are known by now.
    pub piece: Option<Piece>,
}

/// Facts about a fragment besides its own bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The tuple of the packet that it is part of.
    pub key: FlowKey,
    /// Facts about the packet's size.
    pub measure: Measure,
}

/// Output of a core besides the frames of its batch.
pub trait Output {
    /// Sends a packet made here, or held here, as [`Outcome`] says. `key`: its flow as it leaves, where it goes into a bond
    /// and is known; a later fragment does not tell it. `bytes`: room for an Ethernet header (or the header itself), then
    /// the packet.
    fn emit(&mut self, outcome: Outcome, key: Option<&FlowKey>, offload: &VirtioNetHeader, bytes: &mut [u8]);

    /// Sends a frame to another unit of the cluster; its [`Frame::visit`] is the one there.
    fn to_unit(&mut self, unit: u16, frame: &Frame<'_>);

    /// Hands something to another core; `false` when its ring is full.
    fn hand_over(&mut self, core: u8, handed: Handed) -> bool;

    /// Buffers of this core, for packets that are handed over.
    fn buffers(&mut self) -> &mut PacketPool;
}
