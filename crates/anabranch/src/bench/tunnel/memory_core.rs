//! One core of a node: the product's datapath, with memory where the engine has sockets, devices and rings.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use datapath::{Datapath, Handed, Output, Snapshots};
use packet::attachment::InterfaceId;
use packet::vnet::VirtioNetHeader;
use packet::{DropReason, PacketBuf};
use rtrb::{Consumer, Producer, RingBuffer};
use services::pipeline::{ETHERNET_BYTES, Frame};
use services::random::Random;
use tunnel::forwarder::Target;
use tunnel::node::{Node, Source};
use tunnel::time::Time;

/// Items of a ring between two cores, as the engine has them.
const RING_ITEMS: usize = 1_024;
/// Bytes of the headers in front of a UDP payload: IPv4 and UDP.
pub const UDP_HEADERS_BYTES: usize = 28;

/// Datagrams that left together: target, bytes of each but the last, all of them.
pub struct Sent {
    pub target: Target,
    pub stride: usize,
    pub bytes: Vec<u8>,
}

/// Datagrams that came together.
pub struct Arrived {
    pub source: Source,
    pub stride: usize,
    pub bytes: Vec<u8>,
}

/// Output of a core.
#[derive(Default)]
pub struct Collected {
    pub sent: Vec<Sent>,
    /// Bytes of UDP payload that came for the host.
    pub payload_bytes: u64,
    /// Packets that went to another core.
    pub handed: u64,
    /// Packets that ended here.
    pub dropped: u64,
    rings: Vec<Option<Producer<Handed>>>,
}

impl Output for Collected {
    fn transmit(&mut self, target: &Target, segment: usize, datagrams: &[u8]) {
        self.sent.push(Sent { target: *target, stride: segment, bytes: datagrams.to_vec() });
    }

    fn host(&mut self, _: &VirtioNetHeader, bytes: &mut [u8]) {
        // A super-packet has the headers of its first packet, and the payload of all.
        self.payload_bytes += bytes.len().saturating_sub(ETHERNET_BYTES + UDP_HEADERS_BYTES) as u64;
    }

    fn tap(&mut self, _: &VirtioNetHeader, _: &[u8]) {}

    fn device_ingress(&mut self, _: InterfaceId, _: &VirtioNetHeader, _: &mut [u8]) {}

    fn shared_device(&mut self, _: InterfaceId, _: &[u8]) {}

    fn interface(&mut self, _: InterfaceId, _: &VirtioNetHeader, _: &mut [u8]) {}

    fn interfaces(&mut self, _: &mut [Frame<'_>]) {}

    fn resolve(&mut self, _: InterfaceId, _: IpAddr, _: &VirtioNetHeader, _: &mut [u8]) {}

    fn hand_over(&mut self, core: u8, handed: Handed) -> bool {
        self.handed += 1;
        let ring = self.rings.get_mut(usize::from(core)).and_then(Option::as_mut);
        ring.is_some_and(|ring| ring.push(handed).is_ok())
    }

    fn processed(&mut self, _: u32) {}

    fn dropped(&mut self, _: DropReason) {
        self.dropped += 1;
    }
}

/// A core: its datapath, its ends of the rings.
pub struct Core {
    pub datapath: Datapath,
    pub out: Collected,
    rings: Vec<Consumer<Handed>>,
    /// A packet of the host is written here.
    buffer: PacketBuf,
}

impl Core {
    /// All cores of a node, joined by rings.
    pub fn all(node: &Arc<Node>, cores: u8, snapshots: &Snapshots) -> Vec<Self> {
        let core = |id: u8| {
            let random = Random::of_number(u64::from(id) + 1);
            let datapath = Datapath::new(id, Arc::clone(node), random, snapshots.clone());
            let rings = (0..cores).map(|_| None).collect();
            let out = Collected { rings, ..Collected::default() };
            Self { datapath, out, rings: Vec::new(), buffer: PacketBuf::with_capacity(2_048) }
        };
        let mut all: Vec<Self> = (0..cores).map(core).collect();
        for from in 0..all.len() {
            for to in (0..all.len()).filter(|to| *to != from) {
                let (producer, consumer) = RingBuffer::new(RING_ITEMS);
                all[from].out.rings[to] = Some(producer);
                all[to].rings.push(consumer);
            }
        }
        all
    }

    /// Sends packets of the host, in one round.
    pub fn send<'a>(&mut self, now: Time, packets: impl Iterator<Item = &'a [u8]>) {
        let Self { datapath, out, buffer, .. } = self;
        datapath.begin(now);
        for packet in packets {
            buffer.copy_from(packet);
            buffer.offload = VirtioNetHeader::default();
            datapath.host(now, buffer, out);
        }
        datapath.finish(now, out);
    }

    /// Takes what arrived and what other cores hand over, in one round, until all cores that count themselves in `done` are
    /// through with theirs.
    pub fn receive(&mut self, now: Time, arrived: &mut [Arrived], done: &AtomicUsize, cores: usize) {
        self.datapath.begin(now);
        for Arrived { source, stride, bytes } in arrived {
            self.datapath.datagrams(now, source, bytes, *stride, &mut self.out);
            self.take_handed(now);
        }
        self.datapath.flush(now, &mut self.out);
        done.fetch_add(1, Ordering::AcqRel);
        while done.load(Ordering::Acquire) < cores {
            self.take_handed(now);
            std::hint::spin_loop();
        }
        self.take_handed(now);
        self.datapath.finish(now, &mut self.out);
    }

    fn take_handed(&mut self, now: Time) {
        let Self { datapath, out, rings, .. } = self;
        for ring in rings {
            while let Ok(handed) = ring.pop() {
                datapath.handed(now, handed, out);
            }
        }
    }
}
