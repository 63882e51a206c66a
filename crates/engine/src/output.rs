//! Where a core's packets leave: TUN queue, UDP sockets, interfaces, rings to the other cores.

use std::io::IoSlice;
use std::net::IpAddr;
use std::sync::Arc;

use datapath::{Handed, Output};
use linux::event::Epoll;
use linux::packet_sender::{PacketSender, SendFrame};
use linux::raw_ip::RawIpSender;
use linux::tun::{Tap, TunQueue};
use packet::attachment::{Egress, InterfaceId};
use packet::segment::{Segmenter, complete_checksum, complete_offloaded};
use packet::vnet::{GSO_NONE, VNET_HEADER_BYTES, VirtioNetHeader};
use packet::{DropCounters, DropReason};
use services::pipeline::{ETHERNET_BYTES, Frame, Outcome};
use tunnel::forwarder::Target;

use crate::counters::Counters;
use crate::gateway::InterfaceCounters;
use crate::gateway::gso_batch::GsoBatches;
use crate::ports::segments;
use crate::rings::RingSenders;
use crate::sockets::{Link, Sockets};

/// EtherTypes (RFC 894, RFC 2464), big-endian.
const ETHER_TYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHER_TYPE_IPV6: [u8; 2] = [0x86, 0xdd];

/// The way back into a device, for frames of the host; without eBPF there is none.
pub(crate) struct DeviceIngress {
    pub sender: PacketSender,
    /// Hardware address of the device.
    pub mac: [u8; 6],
}

impl DeviceIngress {
    /// Writes the Ethernet header as the frame had it: the host's own filters may look at its source, and it may be for a device
    /// on top of this one (macvlan). A packet that was put together here, or comes from another core without one, gets one without
    /// source.
    fn write_header(&self, bytes: &mut [u8]) {
        let Some((header, packet)) = bytes.split_first_chunk_mut::<ETHERNET_BYTES>() else { return };
        let ether_type =
            if packet.first().is_some_and(|byte| byte >> 4 == 6) { ETHER_TYPE_IPV6 } else { ETHER_TYPE_IPV4 };
        let [kind @ .., high, low] = header;
        let addressed = kind.iter().take(6).any(|byte| *byte != 0) && kind[0] & 1 == 0;
        if !addressed || [*high, *low] != ether_type {
            kind[..6].copy_from_slice(&self.mac);
            kind[6..].fill(0);
            [*high, *low] = ether_type;
        }
    }
}

/// The sending half of one interface.
pub(crate) struct InterfaceOutput {
    pub sender: PacketSender,
    pub raw: RawIpSender,
    pub back: Option<DeviceIngress>,
    /// The device that stands for an interface of other machines.
    pub tap: Option<Arc<Tap>>,
    pub counters: InterfaceCounters,
}

impl InterfaceOutput {
    /// One that has sent nothing yet.
    pub fn new(
        sender: PacketSender,
        raw: RawIpSender,
        back: Option<DeviceIngress>,
        tap: Option<Arc<Tap>>,
    ) -> Self {
        Self { sender, raw, back, tap, counters: InterfaceCounters::default() }
    }
}

/// Everything a core sends by.
pub(crate) struct LinuxOutput {
    pub tun: Arc<TunQueue>,
    pub tap: Option<Arc<TunQueue>>,
    pub epoll: Arc<Epoll>,
    pub sockets: Sockets,
    pub interfaces: InterfaceOutputs,
    pub rings: RingSenders,
    pub counters: Arc<Counters>,
    /// Packets lost at TUN, sockets and rings.
    pub drops: DropCounters,
    pub now_ns: u64,
}

impl Output for LinuxOutput {
    fn transmit(&mut self, target: &Target, segment: usize, datagrams: &[u8]) {
        let Self { sockets, epoll, now_ns, counters, drops, .. } = self;
        sockets.transmit(&mut Link { epoll, now_ns: *now_ns, counters, drops }, target, segment, datagrams);
    }

    fn host(&mut self, offload: &VirtioNetHeader, bytes: &mut [u8]) {
        // The virtio header takes the place of the Ethernet header's end.
        const START: usize = ETHERNET_BYTES - VNET_HEADER_BYTES;
        let Some(bytes) = bytes.get_mut(START..) else { return };
        let packet_bytes = bytes.len().saturating_sub(VNET_HEADER_BYTES);
        self.counters.tun_tx_packets.add(segments(offload, packet_bytes));
        self.counters.tun_tx_bytes.add(packet_bytes as u64);
        if !offload.write(bytes) || self.tun.write(bytes).is_err() {
            self.drops.add(DropReason::TunWrite);
        }
    }

    fn tap(&mut self, offload: &VirtioNetHeader, frame: &[u8]) {
        self.counters.tap.tx_frames.add(1);
        self.counters.tap.tx_bytes.add(frame.len() as u64);
        let header = offload.to_bytes();
        let pieces = [IoSlice::new(&header), IoSlice::new(frame)];
        let written = self.tap.as_ref().map(|tap| tap.write_vectored(&pieces));
        if !matches!(written, Some(Ok(_))) {
            self.drops.add(DropReason::TunWrite);
        }
    }

    fn device_ingress(&mut self, interface: InterfaceId, offload: &VirtioNetHeader, bytes: &mut [u8]) {
        if !self.interfaces.device_ingress(interface, offload, bytes) {
            self.host(offload, bytes);
        }
    }

    fn shared_device(&mut self, interface: InterfaceId, frame: &[u8]) {
        let output = self.interfaces.list.get(interface.index()).and_then(Option::as_ref);
        let tap = output.and_then(|output| output.tap.as_ref());
        if tap.is_none_or(|tap| tap.write(frame).is_err()) {
            self.drops.add(DropReason::TunWrite);
        }
    }

    fn interface(&mut self, interface: InterfaceId, offload: &VirtioNetHeader, bytes: &mut [u8]) {
        let vnet = offload.with_front(ETHERNET_BYTES as u16).to_bytes();
        self.interfaces.send(interface, &[SendFrame { vnet, parts: [bytes, &[], &[]] }]);
    }

    fn interfaces(&mut self, frames: &mut [Frame<'_>]) {
        self.interfaces.send_batch(frames);
    }

    fn resolve(
        &mut self,
        interface: InterfaceId,
        next_hop: IpAddr,
        offload: &VirtioNetHeader,
        packet: &mut [u8],
    ) {
        self.interfaces.resolve(interface, next_hop, offload, packet);
    }

    fn hand_over(&mut self, core: u8, handed: Handed) -> bool {
        self.counters.ring_out.add(1);
        self.rings.push(usize::from(core), handed)
    }

    fn processed(&mut self, flow: u32) {
        self.counters.note_flow(flow, (self.now_ns / 1_000_000) as u32);
    }

    fn dropped(&mut self, reason: DropReason) {
        self.drops.add(reason);
    }
}

/// The sending halves of all interfaces.
#[derive(Default)]
pub(crate) struct InterfaceOutputs {
    /// By [`InterfaceId`].
    pub list: Vec<Option<InterfaceOutput>>,
    batches: GsoBatches,
    scratch: Vec<u8>,
    /// Packets lost at interfaces.
    pub drops: DropCounters,
}

impl InterfaceOutputs {
    /// Opens an interface, or gives it new sockets; its counters go on.
    pub fn open(&mut self, id: InterfaceId, mut output: InterfaceOutput) {
        if self.list.len() <= id.index() {
            self.list.resize_with(id.index() + 1, || None);
        }
        if let Some(place) = self.list.get_mut(id.index()) {
            output.counters = place.as_ref().map(|output| output.counters).unwrap_or_default();
            *place = Some(output);
        }
    }

    /// Closes an interface.
    pub fn close(&mut self, id: InterfaceId) {
        if let Some(place) = self.list.get_mut(id.index()) {
            *place = None;
        }
    }

    /// Sends the frames of a batch that were decided for interfaces, in their order; the list goes out when the interface
    /// changes.
    fn send_batch(&mut self, frames: &mut [Frame<'_>]) {
        let mut batches = std::mem::take(&mut self.batches);
        batches.merge(frames);
        let mut list: Vec<SendFrame<'_>> = Vec::with_capacity(frames.len());
        let mut to = None;
        for (place, frame) in frames.iter().enumerate() {
            let Outcome::Forward(Egress::Interface(id)) = frame.outcome else { continue };
            if let Some(before) = to.filter(|before| *before != id) {
                self.send(before, &list);
                list.clear();
            }
            to = Some(id);
            let merged = if batches.is_empty() { None } else { batches.at(place) };
            let (offload, bytes) = merged.unwrap_or((&frame.offload, &*frame.bytes));
            list.push(SendFrame {
                vnet: offload.with_front(ETHERNET_BYTES as u16).to_bytes(),
                parts: [bytes, &[], &[]],
            });
        }
        if let Some(id) = to {
            self.send(id, &list);
        }
        drop(list);
        self.batches = batches;
    }

    fn send(&mut self, id: InterfaceId, list: &[SendFrame<'_>]) {
        let Some(Some(output)) = self.list.get_mut(id.index()) else {
            self.drops.add_n(DropReason::NoRoute, list.len() as u64);
            return;
        };
        let sent = output.sender.send_many(list);
        output.counters.tx_packets += sent.sent as u64;
        output.counters.tx_bytes +=
            list.iter().flat_map(|frame| frame.parts).map(|part| part.len() as u64).sum::<u64>();
        self.drops.add_n(DropReason::QueueFull, sent.full as u64);
        self.drops.add_n(DropReason::SendError, sent.refused as u64);
        if let Some(error) = sent.error {
            tracing::debug!(interface = id.0, %error, "interface write");
        }
    }

    /// Gives a frame back to the device it came by; `false`: there is no way, or not for one of this size.
    fn device_ingress(&mut self, id: InterfaceId, offload: &VirtioNetHeader, bytes: &mut [u8]) -> bool {
        let Some(Some(InterfaceOutput { back: Some(back), .. })) = self.list.get(id.index()) else {
            return false;
        };
        back.write_header(bytes);
        let sent = back.sender.send_many(&[SendFrame {
            vnet: offload.with_front(ETHERNET_BYTES as u16).to_bytes(),
            parts: [bytes, &[], &[]],
        }]);
        // The other end may have a larger MTU.
        if sent.error.as_ref().and_then(std::io::Error::raw_os_error) == Some(libc::EMSGSIZE) {
            return false;
        }
        self.drops.add_n(DropReason::QueueFull, sent.full as u64);
        self.drops.add_n(DropReason::SendError, sent.refused as u64);
        if let Some(error) = sent.error {
            tracing::debug!(interface = id.0, %error, "back into the device");
        }
        true
    }

    /// The kernel shall find the neighbor: it takes whole packets of ordinary size only.
    fn resolve(&mut self, id: InterfaceId, next_hop: IpAddr, offload: &VirtioNetHeader, packet: &mut [u8]) {
        let Some(Some(output)) = self.list.get(id.index()) else {
            self.drops.add(DropReason::NoRoute);
            return;
        };
        if offload.gso_type == GSO_NONE {
            if complete_offloaded(offload, packet).is_err() {
                self.drops.add(DropReason::BadOffload);
            } else if output.raw.send(packet, next_hop).is_err() {
                self.drops.add(DropReason::NoNeighbor);
            }
            return;
        }
        let Ok(segmenter) = Segmenter::new(offload, packet) else {
            self.drops.add(DropReason::BadOffload);
            return;
        };
        for index in 0..segmenter.segments() {
            self.scratch.resize(segmenter.segment_bytes(index), 0);
            segmenter.write_segment(index, &mut self.scratch);
            let whole = !segmenter.checksum_partial() || complete_checksum(&mut self.scratch).is_ok();
            if !whole || output.raw.send(&self.scratch, next_hop).is_err() {
                self.drops.add(DropReason::NoNeighbor);
            }
        }
    }
}
