//! A capture through the cores of a node: the production round over recorded packets, the same every time.

use packet::attachment::{Ingress, InterfaceId};
use packet::vnet::VirtioNetHeader;
use services::pipeline::{BATCH_MAX, ETHERNET_BYTES};
use tunnel::time::Time;

use crate::memory::{MemoryPorts, Sent};
use crate::worker::{Ready, Worker};

/// One packet of a capture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Captured {
    /// When, ns since the first packet.
    pub at_ns: u64,
    /// By what it came, or left.
    pub attachment: Ingress,
    /// The Ethernet frame; of the host's packets the header is empty.
    pub bytes: Vec<u8>,
}

/// Result of a replay.
#[derive(Clone, Debug, Default)]
pub struct Replayed {
    /// Packets that left, in order, with what they left by.
    pub packets: Vec<Captured>,
    /// Packets that went on.
    pub sent: u64,
    /// Packets to the host's own stack.
    pub to_host: u64,
}

/// Runs packets through the cores, in order of time. Packets with one time stamp and interface come as a batch. Each is
/// read by the core that `reader` names, as the kernel would do it.
pub fn replay(
    cores: &mut [Worker<MemoryPorts>],
    reader: impl Fn(&Captured) -> usize,
    packets: Vec<Captured>,
) -> Replayed {
    let mut replayed = Replayed::default();
    let mut rest = packets.into_iter().peekable();
    while let Some(first) = rest.next() {
        let (at_ns, attachment, core) = (first.at_ns, first.attachment, reader(&first));
        let mut batch = vec![first];
        let same = |packet: &Captured| {
            packet.at_ns == at_ns && packet.attachment == attachment && reader(packet) == core
        };
        while batch.len() < BATCH_MAX
            && let Some(next) = rest.next_if(same)
        {
            batch.push(next);
        }
        if let Some(worker) = cores.get_mut(core) {
            batch.into_iter().for_each(|packet| put(worker, packet));
        }
        settle(cores, at_ns, &mut replayed);
    }
    replayed
}

fn put(worker: &mut Worker<MemoryPorts>, packet: Captured) {
    match packet.attachment {
        Ingress::Interface(id) => worker.ports.put_frame(id, VirtioNetHeader::default(), packet.bytes),
        Ingress::Host | Ingress::Bond(_) => {
            let packet = packet.bytes.get(ETHERNET_BYTES..).unwrap_or_default();
            worker.ports.put_host(VirtioNetHeader::default(), packet);
        }
    }
}

/// Rounds on all cores until nobody has anything for another one.
fn settle(cores: &mut [Worker<MemoryPorts>], at_ns: u64, replayed: &mut Replayed) {
    loop {
        let mut handed = Vec::new();
        for worker in &mut *cores {
            worker.round(Time::from_ns(at_ns), &[Ready::Host]);
            handed.append(&mut worker.ports.out.handed);
            for sent in worker.ports.out.sent.drain(..) {
                note(sent, at_ns, replayed);
            }
        }
        if handed.is_empty() {
            return;
        }
        for (core, handed) in handed {
            if let Some(worker) = cores.get_mut(usize::from(core)) {
                worker.ports.put_handed(handed);
            }
        }
    }
}

fn note(sent: Sent, at_ns: u64, replayed: &mut Replayed) {
    let headerless = |packet: Vec<u8>| [vec![0; ETHERNET_BYTES], packet].concat();
    let (attachment, bytes) = match sent {
        Sent::Interface(id, _, bytes) => (Ingress::Interface(id), bytes),
        Sent::Resolve(id, _, _, packet) => (Ingress::Interface(id), headerless(packet)),
        Sent::Host(_, packet) => (Ingress::Host, headerless(packet)),
        // No peer answers in a capture, so there is no session to send by, and no other unit.
        Sent::Datagrams(..) | Sent::SharedDevice(..) | Sent::Tap(..) => return,
    };
    match attachment {
        Ingress::Host => replayed.to_host += 1,
        Ingress::Interface(InterfaceId(_)) | Ingress::Bond(_) => replayed.sent += 1,
    }
    replayed.packets.push(Captured { at_ns, attachment, bytes });
}
