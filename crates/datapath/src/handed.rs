//! Packets that go from one core to another: a core read them and another owns them. Each is counted.

use packet::attachment::BondId;
use packet::{FlowKey, PacketBuf};
use tunnel::forwarder::CoreWanted;
use tunnel::node::Source;

use crate::ethernet::News;

/// A packet on its way to another core.
#[derive(Debug)]
pub enum Handed {
    /// A packet of the host for a bond, where no services are in force: for the core that owns its flow. A fragment without
    /// a key is for the core of its addresses, one with its flow's key for the core of the flow.
    Host(PacketBuf, Option<FlowKey>),
    /// One datagram of the tunnel: for the receiving core that it names.
    Datagram(Source, PacketBuf),
    /// A packet that came by a bond: for this core to decide.
    Bond(PacketBuf),
    /// A packet that came by a bond which named no core: for the core that chooses one for its flow.
    Place(PacketBuf, PlaceStep),
    /// A question of a peer for the core of a flow: for the core that chooses one.
    CoreWanted(BondId, CoreWanted),
    /// An Ethernet frame for the core of its flow: of the TAP device, or of a bond and then behind its hops.
    Frame(PacketBuf),
    /// News of the switch.
    LanNews(News),
    /// A packet that services have looked at: for the next core of its owner chain.
    Service(services::pipeline::Handed),
}

/// Task of a flow's meeting place with a packet ([`Handed::Place`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlaceStep {
    /// It is a fragment, this the hash of its addresses: wait for the one that has the ports.
    Meet(u32),
    /// Choose the core of the flow, or session-ID, with this hash, and of this class.
    Choose(u32, u8),
}
