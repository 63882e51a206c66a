//! Ports in memory: for captures and tests. What is put in is pulled by the next round; what leaves is kept.

use std::collections::VecDeque;
use std::net::IpAddr;

use packet::attachment::{Egress, Ingress, InterfaceId};
use packet::vnet::VirtioNetHeader;
use packet::{DropCounters, DropReason, PacketBuf};
use services::pipeline::{BATCH_MAX, Frame, Outcome};
use tunnel::forwarder::Target;
use tunnel::node::Source;

use crate::handed::Handed;
use crate::ports::{Output, Ports, Pulled};
use crate::worker::Ready;

/// Something that left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sent {
    /// Datagrams of the tunnel: target, size of each but the last, bytes.
    Datagrams(Target, usize, Vec<u8>),
    /// A packet for the host.
    Host(VirtioNetHeader, Vec<u8>),
    /// A frame for the TAP device's LAN.
    Tap(VirtioNetHeader, Vec<u8>),
    /// A frame by an interface, Ethernet header first.
    Interface(InterfaceId, VirtioNetHeader, Vec<u8>),
    /// A frame for the host's stack by a shared interface.
    SharedDevice(InterfaceId, Vec<u8>),
    /// A packet for a next hop whose hardware address is not known.
    Resolve(InterfaceId, IpAddr, VirtioNetHeader, Vec<u8>),
}

/// Output of a core.
#[derive(Default)]
pub struct MemoryOutput {
    /// In order.
    pub sent: Vec<Sent>,
    /// Packets for other cores, by core.
    pub handed: Vec<(u8, Handed)>,
    /// Flows whose packets came by a bond, as [`Output::processed`] tells them.
    pub processed: Vec<u32>,
    /// Packets that ended here.
    pub drops: DropCounters,
}

impl Output for MemoryOutput {
    fn transmit(&mut self, target: &Target, segment: usize, datagrams: &[u8]) {
        self.sent.push(Sent::Datagrams(*target, segment, datagrams.to_vec()));
    }

    fn host(&mut self, offload: &VirtioNetHeader, bytes: &mut [u8]) {
        let packet = bytes.get(services::pipeline::ETHERNET_BYTES..).unwrap_or_default();
        self.sent.push(Sent::Host(*offload, packet.to_vec()));
    }

    fn tap(&mut self, offload: &VirtioNetHeader, frame: &[u8]) {
        self.sent.push(Sent::Tap(*offload, frame.to_vec()));
    }

    fn device_ingress(&mut self, _: InterfaceId, offload: &VirtioNetHeader, bytes: &mut [u8]) {
        self.host(offload, bytes);
    }

    fn shared_device(&mut self, interface: InterfaceId, frame: &[u8]) {
        self.sent.push(Sent::SharedDevice(interface, frame.to_vec()));
    }

    fn interface(&mut self, interface: InterfaceId, offload: &VirtioNetHeader, bytes: &mut [u8]) {
        self.sent.push(Sent::Interface(interface, *offload, bytes.to_vec()));
    }

    fn interfaces(&mut self, frames: &mut [Frame<'_>]) {
        for frame in frames {
            if let Outcome::Forward(Egress::Interface(id)) = frame.outcome {
                let offload = frame.offload;
                self.interface(id, &offload, frame.bytes);
            }
        }
    }

    fn resolve(
        &mut self,
        interface: InterfaceId,
        next_hop: IpAddr,
        offload: &VirtioNetHeader,
        packet: &mut [u8],
    ) {
        self.sent.push(Sent::Resolve(interface, next_hop, *offload, packet.to_vec()));
    }

    fn hand_over(&mut self, core: u8, handed: Handed) -> bool {
        self.handed.push((core, handed));
        true
    }

    fn processed(&mut self, flow: u32) {
        self.processed.push(flow);
    }

    fn dropped(&mut self, reason: DropReason) {
        self.drops.add(reason);
    }
}

/// A frame that waits: interface, offload header, bytes.
type Waiting = (InterfaceId, VirtioNetHeader, Vec<u8>);

/// Input that waits for a core, and its output.
#[derive(Default)]
pub struct MemoryPorts {
    host: VecDeque<PacketBuf>,
    tap: VecDeque<PacketBuf>,
    datagrams: VecDeque<(Source, usize, Vec<u8>)>,
    frames: VecDeque<Waiting>,
    shared: VecDeque<(InterfaceId, Vec<u8>)>,
    handed: VecDeque<Handed>,
    /// Output of the core.
    pub out: MemoryOutput,
}

impl MemoryPorts {
    /// Nothing waits.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A packet of the host.
    pub fn put_host(&mut self, offload: VirtioNetHeader, packet: &[u8]) {
        let mut buffer = PacketBuf::with_capacity(packet.len());
        buffer.offload = offload;
        buffer.copy_from(packet);
        self.host.push_back(buffer);
    }

    /// A frame of the TAP device's LAN; offsets count from its beginning.
    pub fn put_tap(&mut self, offload: VirtioNetHeader, frame: &[u8]) {
        let mut buffer = PacketBuf::with_capacity(frame.len());
        buffer.offload = offload;
        buffer.copy_from(frame);
        self.tap.push_back(buffer);
    }

    /// Datagrams of `stride` bytes each from one source.
    pub fn put_datagrams(&mut self, source: Source, stride: usize, bytes: Vec<u8>) {
        self.datagrams.push_back((source, stride, bytes));
    }

    /// A frame of an interface, Ethernet header first; offsets count from the IP header.
    pub fn put_frame(&mut self, interface: InterfaceId, offload: VirtioNetHeader, bytes: Vec<u8>) {
        self.frames.push_back((interface, offload, bytes));
    }

    /// Something from another core.
    pub fn put_handed(&mut self, handed: Handed) {
        self.handed.push_back(handed);
    }

    /// Sources that something waits at, but for interfaces and other cores: each round looks for those.
    pub fn ready(&self) -> impl Iterator<Item = Ready> + use<> {
        let host = (!self.host.is_empty()).then_some(Ready::Host);
        // All sockets have one queue here.
        let socket = (!self.datagrams.is_empty()).then_some(Ready::Socket(0));
        let tap = (!self.tap.is_empty()).then_some(Ready::Tap);
        [host, tap, socket].into_iter().flatten()
    }

    /// Takes what has left since the last call; drops are counted on.
    pub fn take_output(&mut self) -> MemoryOutput {
        let drops = self.out.drops.clone();
        std::mem::replace(&mut self.out, MemoryOutput { drops, ..MemoryOutput::default() })
    }

    /// Whether anything waits to be pulled.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.host.is_empty()
            && self.tap.is_empty()
            && self.datagrams.is_empty()
            && self.frames.is_empty()
            && self.handed.is_empty()
    }
}

impl Ports for MemoryPorts {
    type Out = MemoryOutput;

    fn out(&mut self) -> &mut MemoryOutput {
        &mut self.out
    }

    fn pull_host(&mut self, act: &mut impl FnMut(&mut PacketBuf, &mut MemoryOutput)) -> Pulled {
        while let Some(mut packet) = self.host.pop_front() {
            act(&mut packet, &mut self.out);
        }
        Pulled::All
    }

    fn pull_tap(&mut self, act: &mut impl FnMut(&mut PacketBuf, &mut MemoryOutput)) -> Pulled {
        while let Some(mut frame) = self.tap.pop_front() {
            act(&mut frame, &mut self.out);
        }
        Pulled::All
    }

    fn pull_socket(
        &mut self,
        _socket: u64,
        act: &mut impl FnMut(&Source, &mut [u8], usize, &mut MemoryOutput),
    ) -> Pulled {
        while let Some((source, stride, mut bytes)) = self.datagrams.pop_front() {
            act(&source, &mut bytes, stride, &mut self.out);
        }
        Pulled::All
    }

    fn pull_interface(
        &mut self,
        interface: InterfaceId,
        act: &mut impl FnMut(&mut [Frame<'_>], &mut MemoryOutput),
    ) -> Pulled {
        let (mut taken, left): (VecDeque<Waiting>, VecDeque<Waiting>) =
            std::mem::take(&mut self.frames).into_iter().partition(|(id, ..)| *id == interface);
        self.frames = left;
        for batch in taken.make_contiguous().chunks_mut(BATCH_MAX) {
            let frame = |(id, offload, bytes): &'_ mut Waiting| (*id, *offload, std::mem::take(bytes));
            let mut owned: Vec<Waiting> = batch.iter_mut().map(frame).collect();
            let mut frames: Vec<Frame<'_>> = owned
                .iter_mut()
                .map(|(id, offload, bytes)| Frame::new(Ingress::Interface(*id), *offload, bytes))
                .collect();
            act(&mut frames, &mut self.out);
        }
        Pulled::All
    }

    fn pull_interfaces(&mut self, act: &mut impl FnMut(&mut [Frame<'_>], &mut MemoryOutput)) -> Pulled {
        while let Some((id, ..)) = self.frames.front() {
            let id = *id;
            self.pull_interface(id, act);
        }
        Pulled::All
    }

    fn pull_shared(
        &mut self,
        interface: InterfaceId,
        act: &mut impl FnMut(&[u8], &mut MemoryOutput),
    ) -> Pulled {
        while let Some(place) = self.shared.iter().position(|(id, _)| *id == interface) {
            if let Some((_, frame)) = self.shared.remove(place) {
                act(&frame, &mut self.out);
            }
        }
        Pulled::All
    }

    fn pop(&mut self) -> Option<Handed> {
        self.handed.pop_front()
    }
}
