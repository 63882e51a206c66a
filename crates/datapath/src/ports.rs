//! Where a round takes packets from and gives them to.

use std::net::IpAddr;

use packet::attachment::{Egress, InterfaceId};
use packet::vnet::VirtioNetHeader;
use packet::{DropReason, PacketBuf};
use services::pipeline::{ETHERNET_BYTES, Frame, Outcome};
use tunnel::forwarder::Target;
use tunnel::node::Source;
use tunnel::time::Time;

use crate::handed::Handed;

/// Whether a source has more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pulled {
    /// It is empty for now.
    All,
    /// The budget of a round is used up; more may wait.
    Budget,
}

/// Where packets leave.
pub trait Output {
    /// Time when the datagrams that are shown were received, or when [`Ports::look_at_clock`] was called: never before
    /// `round`, the beginning of the round. Where time stands still during a round, just that.
    fn clock(&self, round: Time) -> Time {
        round
    }

    /// Sends datagrams of `segment` bytes each, the last possibly shorter, to one target.
    fn transmit(&mut self, target: &Target, segment: usize, datagrams: &[u8]);

    /// Gives a packet to the host's own stack. `bytes`: [`services::pipeline::ETHERNET_BYTES`] of room, then the packet.
    fn host(&mut self, offload: &VirtioNetHeader, bytes: &mut [u8]);

    /// Has the TAP device's LAN get a frame; offsets count from its beginning.
    fn tap(&mut self, offload: &VirtioNetHeader, frame: &[u8]);

    /// Gives a packet to the host's own stack by the device of an interface, as if it had just come in there. `bytes`: as for
    /// [`Output::host`]; its Ethernet header where the frame still has one.
    fn device_ingress(&mut self, interface: InterfaceId, offload: &VirtioNetHeader, bytes: &mut [u8]);

    /// Has the host's stack receive a frame by a shared interface that other machines have.
    fn shared_device(&mut self, interface: InterfaceId, frame: &[u8]);

    /// Sends one frame by an interface. `bytes`: its Ethernet header, then the packet.
    fn interface(&mut self, interface: InterfaceId, offload: &VirtioNetHeader, bytes: &mut [u8]);

    /// Sends those frames of a batch that were decided for an interface, in their order. Frames of one flow may leave as one
    /// GSO batch.
    fn interfaces(&mut self, frames: &mut [Frame<'_>]);

    /// Has the kernel find the hardware address of a next hop and send the packet there.
    fn resolve(
        &mut self,
        interface: InterfaceId,
        next_hop: IpAddr,
        offload: &VirtioNetHeader,
        packet: &mut [u8],
    );

    /// Hands something to another core; `false` when its ring is full.
    fn hand_over(&mut self, core: u8, handed: Handed) -> bool;

    /// Notes that this core processed a packet of a flow that came by a bond, for the operator's count of flows that are
    /// split over cores. `flow`: hash of the flow; fragments have one of their own.
    fn processed(&mut self, flow: u32);

    /// Counts a packet that ended at a port or in the round.
    fn dropped(&mut self, reason: DropReason);
}

/// Everything a round takes packets from, and the [`Output`] beside it. A pull shows what it took to a closure, in the
/// memory where it lies, together with the output.
pub trait Ports {
    /// Where packets leave.
    type Out: Output;

    /// The output alone.
    fn out(&mut self) -> &mut Self::Out;

    /// Has [`Output::clock`] tell the time of this call.
    fn look_at_clock(&mut self) {}

    /// Packets of the host. The closure may keep a buffer by leaving another of the same capacity.
    fn pull_host(&mut self, act: &mut impl FnMut(&mut PacketBuf, &mut Self::Out)) -> Pulled;

    /// Frames that the TAP device's LAN sends. The closure may keep a buffer by leaving another of the same capacity.
    fn pull_tap(&mut self, act: &mut impl FnMut(&mut PacketBuf, &mut Self::Out)) -> Pulled;

    /// Datagrams of one socket: source, bytes, size of each datagram but the last.
    fn pull_socket(
        &mut self,
        socket: u64,
        act: &mut impl FnMut(&Source, &mut [u8], usize, &mut Self::Out),
    ) -> Pulled;

    /// Frames of one interface, in batches of at most [`services::pipeline::BATCH_MAX`].
    fn pull_interface(
        &mut self,
        interface: InterfaceId,
        act: &mut impl FnMut(&mut [Frame<'_>], &mut Self::Out),
    ) -> Pulled;

    /// Frames of all interfaces whose arrival nobody is told of ([`crate::Ready`]).
    fn pull_interfaces(&mut self, act: &mut impl FnMut(&mut [Frame<'_>], &mut Self::Out)) -> Pulled;

    /// Frames of a shared interface besides those that are dispatched: what neighbors say to each other, at a dispatcher;
    /// what the host sends, at a data plane.
    fn pull_shared(&mut self, interface: InterfaceId, act: &mut impl FnMut(&[u8], &mut Self::Out)) -> Pulled;

    /// The next packet from another core.
    fn pop(&mut self) -> Option<Handed>;
}

/// Sends a packet that was decided, unless it is for a bond: that is the [`crate::Datapath`]'s business. `bytes`: room for
/// an Ethernet header or the header itself, then the packet.
#[inline]
pub(crate) fn leave(out: &mut impl Output, outcome: Outcome, offload: &VirtioNetHeader, bytes: &mut [u8]) {
    match outcome {
        Outcome::Forward(Egress::Interface(interface)) => out.interface(interface, offload, bytes),
        Outcome::Forward(Egress::Host | Egress::Kernel) => out.host(offload, bytes),
        Outcome::DeviceIngress(interface) => out.device_ingress(interface, offload, bytes),
        Outcome::Resolve(interface, next_hop) => {
            out.resolve(interface, next_hop, offload, bytes.get_mut(ETHERNET_BYTES..).unwrap_or_default());
        }
        // A core is reached by `hand_over`; units are not there yet, so no policy names one.
        Outcome::Forward(Egress::Bond(_) | Egress::Core(_) | Egress::Unit(_)) => {
            out.dropped(DropReason::NoRoute);
        }
        Outcome::Pending | Outcome::Consumed | Outcome::Dropped(_) => {}
    }
}
