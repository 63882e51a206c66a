//! Where a core's packets come from: its queues of the TUN and TAP devices, its UDP sockets, its share of the interfaces, rings of the other cores.

use std::io::{ErrorKind, IoSliceMut};
use std::net::SocketAddr;
use std::sync::Arc;

use datapath::{Handed, Ports, Pulled};
use linux::event::{Epoll, Interest};
use linux::packet_ring::PacketRing;
use linux::tun::TunQueue;
use linux::udp::{RecvMeta, UdpSocket};
use packet::attachment::{Ingress, InterfaceId};
use packet::buffer::PACKET_BYTES_MAX;
use packet::vnet::{VNET_HEADER_BYTES, VirtioNetHeader};
use packet::{DropReason, PacketBuf};
use services::pipeline::{BATCH_MAX, ETHERNET_BYTES, Frame};
use tunnel::node::Source;

use crate::cutter::Cutter;
use crate::gateway::shared::SharedSource;
use crate::output::LinuxOutput;
use crate::rings::RingReceivers;

/// Epoll tokens from here on are interfaces.
pub(crate) const INTERFACE_TOKENS: u64 = 1 << 32;
/// Epoll tokens from here on are what neighbors or the host say at shared interfaces.
pub(crate) const SHARED_TOKENS: u64 = 1 << 33;
/// A round pulls at most so many packets from TUN …
const TUN_READS: usize = 64;
/// … or so many bytes, so that what is pulled is still in the cache when it leaves.
const TUN_BYTES: usize = 192 << 10;
/// Receive calls per socket and round.
const UDP_CALLS: usize = 4;
/// Buffers of one receive call.
const UDP_BUFFERS: usize = 8;
/// Frames pulled from the side of one shared interface in a round.
const SHARED_READS: usize = 64;
/// Batches pulled from one interface in a round.
const BATCHES: usize = 8;

/// The ports of one core.
pub(crate) struct LinuxPorts {
    out: LinuxOutput,
    rings: RingReceivers,
    pub interfaces: InterfaceInputs,
    /// Sources of frames of neighbors or the host at shared interfaces of a cluster.
    pub shared: Vec<(InterfaceId, Arc<SharedSource>)>,
    host: PacketBuf,
    receive: Vec<Box<[u8]>>,
}

impl LinuxPorts {
    pub fn new(out: LinuxOutput, rings: RingReceivers) -> Self {
        Self {
            out,
            rings,
            interfaces: InterfaceInputs::default(),
            shared: Vec::new(),
            host: PacketBuf::with_capacity(PACKET_BYTES_MAX),
            receive: (0..UDP_BUFFERS).map(|_| vec![0; 65_536].into_boxed_slice()).collect(),
        }
    }

    /// Whether no other core has handed anything over.
    pub fn is_idle(&self) -> bool {
        self.rings.is_empty()
    }

    /// Reads one packet of the host, or one frame of the TAP device, into `host`; false when there is none, or none that can be used.
    fn read_queue(&mut self, queue: &TunQueue) -> Option<usize> {
        self.host.clear();
        let space = self.host.space_with_room(VNET_HEADER_BYTES);
        let length = match queue.read(space) {
            Ok(length) => length,
            Err(error) => {
                if error.kind() != ErrorKind::WouldBlock && error.kind() != ErrorKind::Interrupted {
                    tracing::debug!(%error, "TUN read");
                }
                return None;
            }
        };
        let Some(bytes) = length.checked_sub(VNET_HEADER_BYTES) else {
            self.out.drops.add(DropReason::TooShort);
            return Some(0);
        };
        match VirtioNetHeader::parse(space) {
            Ok(offload) => {
                self.host.offload = offload;
                self.host.set_len(bytes);
            }
            Err(reason) => self.out.drops.add(reason),
        }
        Some(length)
    }

    fn receive(
        &mut self,
        socket: &UdpSocket,
        source: Source,
        act: &mut impl FnMut(&Source, &mut [u8], usize, &mut LinuxOutput),
    ) -> std::io::Result<usize> {
        let mut metas: [RecvMeta; UDP_BUFFERS] = std::array::from_fn(|_| RecvMeta::default());
        let count = {
            let mut slices: [IoSliceMut<'_>; UDP_BUFFERS] = {
                let mut buffers = self.receive.iter_mut();
                std::array::from_fn(|_| {
                    IoSliceMut::new(buffers.next().map_or(&mut [], |buffer| &mut buffer[..]))
                })
            };
            socket.recv(&mut slices, &mut metas)?
        };
        self.look_at_clock();
        for (meta, buffer) in metas.iter().zip(&mut self.receive).take(count) {
            let stride = meta.stride.max(1);
            self.out.counters.udp_rx_datagrams.add(meta.bytes.div_ceil(stride) as u64);
            self.out.counters.udp_rx_bytes.add(meta.bytes as u64);
            let local = if source.socket.is_some() { None } else { meta.local_ip };
            let hops = meta.ttl.and_then(|ttl| linux::udp::TTL.checked_sub(ttl));
            let source = Source { remote: canonical(meta.from), local, hops, ..source };
            let bytes = meta.bytes.min(buffer.len());
            act(&source, buffer.get_mut(..bytes).unwrap_or_default(), stride, &mut self.out);
        }
        Ok(count)
    }
}

impl Ports for LinuxPorts {
    type Out = LinuxOutput;

    fn out(&mut self) -> &mut LinuxOutput {
        &mut self.out
    }

    fn look_at_clock(&mut self) {
        self.out.now_ns = linux::clock::monotonic_ns();
    }

    fn pull_host(&mut self, act: &mut impl FnMut(&mut PacketBuf, &mut LinuxOutput)) -> Pulled {
        let mut bytes = 0;
        let tun = Arc::clone(&self.out.tun);
        for _ in 0..TUN_READS {
            let Some(length) = self.read_queue(&tun) else { return Pulled::All };
            if self.host.is_empty() {
                continue;
            }
            bytes += length;
            self.out.counters.tun_rx_packets.add(segments(&self.host.offload, self.host.len()));
            self.out.counters.tun_rx_bytes.add(self.host.len() as u64);
            act(&mut self.host, &mut self.out);
            if bytes >= TUN_BYTES {
                break;
            }
        }
        Pulled::Budget
    }

    fn pull_tap(&mut self, act: &mut impl FnMut(&mut PacketBuf, &mut LinuxOutput)) -> Pulled {
        let Some(tap) = self.out.tap.clone() else { return Pulled::All };
        let mut bytes = 0;
        for _ in 0..TUN_READS {
            let Some(length) = self.read_queue(&tap) else { return Pulled::All };
            if self.host.is_empty() {
                continue;
            }
            bytes += length;
            self.out.counters.tap.rx_frames.add(segments(&self.host.offload, self.host.len()));
            self.out.counters.tap.rx_bytes.add(self.host.len() as u64);
            act(&mut self.host, &mut self.out);
            if bytes >= TUN_BYTES {
                break;
            }
        }
        Pulled::Budget
    }

    fn pull_socket(
        &mut self,
        token: u64,
        act: &mut impl FnMut(&Source, &mut [u8], usize, &mut LinuxOutput),
    ) -> Pulled {
        let Some((socket, source)) = self.out.sockets.by_token(token) else { return Pulled::All };
        for _ in 0..UDP_CALLS {
            match self.receive(&socket, source, act) {
                Ok(count) if count < UDP_BUFFERS => return Pulled::All,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Pulled::All,
                Err(_) => {
                    // An ICMP error about something sent earlier; reading it has cleared it.
                    let _ = socket.take_error();
                    return Pulled::All;
                }
            }
        }
        Pulled::Budget
    }

    fn pull_interface(
        &mut self,
        interface: InterfaceId,
        act: &mut impl FnMut(&mut [Frame<'_>], &mut LinuxOutput),
    ) -> Pulled {
        let place = self.interfaces.list.iter().position(|input| input.id == interface);
        place.map_or(Pulled::All, |place| self.interfaces.pull(place, &mut self.out, act))
    }

    fn pull_interfaces(&mut self, act: &mut impl FnMut(&mut [Frame<'_>], &mut LinuxOutput)) -> Pulled {
        let mut pulled = Pulled::All;
        if !self.interfaces.watched {
            for place in 0..self.interfaces.list.len() {
                if self.interfaces.pull(place, &mut self.out, act) == Pulled::Budget {
                    pulled = Pulled::Budget;
                }
            }
        }
        pulled
    }

    fn pull_shared(
        &mut self,
        interface: InterfaceId,
        act: &mut impl FnMut(&[u8], &mut LinuxOutput),
    ) -> Pulled {
        let source =
            self.shared.iter().find(|(id, _)| *id == interface).map(|(_, source)| Arc::clone(source));
        let Some(source) = source else { return Pulled::All };
        for _ in 0..SHARED_READS {
            let space = self.host.space();
            match source.read(space) {
                Ok(bytes) => act(space.get(..bytes).unwrap_or_default(), &mut self.out),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Pulled::All,
                Err(error) => {
                    tracing::debug!(interface = interface.0, %error, "shared interface");
                    return Pulled::All;
                }
            }
        }
        Pulled::Budget
    }

    fn pop(&mut self) -> Option<Handed> {
        let handed = self.rings.pop()?;
        self.out.counters.ring_in.add(1);
        Some(handed)
    }
}

/// The receiving half of one interface.
pub(crate) struct InterfaceInput {
    pub id: InterfaceId,
    pub ring: PacketRing,
    pub packets: u64,
    pub bytes: u64,
    /// Lost by rings before this one.
    pub lost_before: u64,
    /// For super-packets inside other packets.
    pub cutter: Cutter,
}

/// The receiving halves of all interfaces, and how busy they are.
pub(crate) struct InterfaceInputs {
    pub list: Vec<InterfaceInput>,
    /// Whether epoll tells of frames. If not, each round looks into all rings.
    pub watched: bool,
    traffic: Traffic,
}

impl Default for InterfaceInputs {
    fn default() -> Self {
        Self { list: Vec::new(), watched: true, traffic: Traffic::default() }
    }
}

impl InterfaceInputs {
    fn pull(
        &mut self,
        place: usize,
        out: &mut LinuxOutput,
        act: &mut impl FnMut(&mut [Frame<'_>], &mut LinuxOutput),
    ) -> Pulled {
        for _ in 0..BATCHES {
            let Some(input) = self.list.get_mut(place) else { return Pulled::All };
            let bytes_before = input.bytes;
            let count = input.pull(&mut |frames| act(frames, out));
            out.drops.add_n(DropReason::BadOffload, std::mem::take(&mut input.cutter.refused));
            if count == 0 {
                return Pulled::All;
            }
            let bytes = input.bytes - bytes_before;
            out.counters.interface_rx_packets.add(count as u64);
            self.traffic.note(out.now_ns, count as u64, bytes);
            if count < BATCH_MAX {
                return Pulled::All;
            }
        }
        Pulled::Budget
    }

    /// Takes the error that epoll tells of at an interface: until somebody does, the worker would not sleep again.
    pub fn take_error(&self, id: InterfaceId) {
        let input = self.list.iter().find(|input| input.id == id);
        if let Some(error) = input.and_then(|input| input.ring.take_error()) {
            tracing::debug!(interface = id.0, %error, "an interface had an error");
        }
    }

    /// Has epoll tell of frames, or not. While it does, the kernel calls it for each frame, in the time of whoever sends
    /// that frame: for a worker that is awake anyway. Frames that came in between are told of as soon as it does again.
    /// Where it cannot, rounds go on to look.
    pub fn watch(&mut self, epoll: &Epoll, wanted: bool) {
        if self.watched == wanted {
            return;
        }
        self.watched = wanted;
        for input in &self.list {
            let token = INTERFACE_TOKENS + u64::from(input.id.0);
            if !wanted {
                let _ = epoll.remove(&input.ring);
            } else if let Err(error) = epoll.add(&input.ring, token, Interest::Read)
                && error.kind() != ErrorKind::AlreadyExists
            {
                tracing::debug!(interface = input.id.0, %error, "cannot wait for an interface");
                self.watched = false;
            }
        }
    }

    /// Whether small frames come so quickly that it is worth looking for the next before going to sleep.
    pub fn is_hot(&self, now_ns: u64) -> bool {
        self.traffic.is_hot(now_ns)
    }
}

impl InterfaceInput {
    /// Packets that the kernel had no room for.
    pub fn lost(&mut self) -> u64 {
        self.lost_before + self.ring.drops().unwrap_or(0) + self.ring.cut()
    }

    fn pull(&mut self, act: &mut dyn FnMut(&mut [Frame<'_>])) -> usize {
        let count = self.ring.receive(BATCH_MAX);
        if count == 0 {
            return 0;
        }
        let ingress = Ingress::Interface(self.id);
        let (mut packets, mut bytes) = (0, 0);
        {
            let mut frames: Vec<Frame<'_>> = Vec::with_capacity(count);
            for received in self.ring.frames() {
                packets += 1;
                bytes += received.frame.len().saturating_sub(ETHERNET_BYTES) as u64;
                let offload = received.vnet.without_front(ETHERNET_BYTES as u16);
                if self.cutter.cuts(&offload, received.frame) {
                    // Before what came behind it, and after what came before.
                    act(&mut frames);
                    frames.clear();
                    self.cutter.cut(ingress, &offload, received.frame, act);
                } else {
                    frames.push(Frame::new(ingress, offload, received.frame));
                }
            }
            act(&mut frames);
        }
        self.ring.release();
        self.packets += packets;
        self.bytes += bytes;
        count
    }
}

/// A worker looks for more frames so long before it sleeps …
const HOT_NS: u64 = 50_000;
/// … if batches have been coming with less than so much between them …
const HOT_GAP_NS: u64 = 100_000;
/// … of frames that are small: super-packets of a TCP stream are worth being woken for, and whoever sends and receives
/// them has better use for the CPU.
const HOT_FRAME_BYTES: u64 = 2_000;

/// How often batches came lately, and how large their frames were: moving averages.
struct Traffic {
    pulled_ns: u64,
    gap_ns: u64,
    frame_bytes: u64,
}

impl Default for Traffic {
    fn default() -> Self {
        Self { pulled_ns: 0, gap_ns: HOT_NS, frame_bytes: 0 }
    }
}

impl Traffic {
    fn note(&mut self, now_ns: u64, frames: u64, bytes: u64) {
        let gap_ns = now_ns.saturating_sub(self.pulled_ns).min(20 * HOT_NS);
        self.gap_ns = (self.gap_ns * 15 + gap_ns) / 16;
        self.frame_bytes = (self.frame_bytes * 15 + bytes / frames.max(1)) / 16;
        self.pulled_ns = now_ns;
    }

    fn is_hot(&self, now_ns: u64) -> bool {
        self.gap_ns < HOT_GAP_NS
            && self.frame_bytes < HOT_FRAME_BYTES
            && now_ns.saturating_sub(self.pulled_ns) < HOT_NS
    }
}

/// Packets that a super-packet of `bytes` stands for.
pub(crate) fn segments(offload: &VirtioNetHeader, bytes: usize) -> u64 {
    let payload = bytes.saturating_sub(usize::from(offload.hdr_len));
    match usize::from(offload.gso_size) {
        0 => 1,
        size => payload.div_ceil(size).max(1) as u64,
    }
}

/// An IPv4 address seen through a dual-stack socket is that IPv4 address.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_frames_in_quick_succession_keep_a_worker_looking() {
        let mut traffic = Traffic::default();
        let mut now_ns = 1_000_000;
        for _ in 0..100 {
            now_ns += 20_000;
            traffic.note(now_ns, 10, 10 * 64);
        }
        assert!(traffic.is_hot(now_ns + 10_000));
        assert!(!traffic.is_hot(now_ns + HOT_NS), "nothing came for a while");
        for _ in 0..100 {
            now_ns += 20_000;
            traffic.note(now_ns, 1, 60_000);
        }
        assert!(!traffic.is_hot(now_ns + 10_000), "super-packets are worth being woken for");
    }
}
