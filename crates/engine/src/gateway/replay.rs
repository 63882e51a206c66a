//! A capture as the source and sink of [`super::pump`]: the production loop over recorded packets, the same every time.

use std::io;

use packet::attachment::{Egress, Ingress};
use packet::vnet::VirtioNetHeader;
use services::core::{BATCH_MAX, Core, ETHERNET_BYTES, Frame, Handed, Outcome, Output};

use super::{Sinks, Source, pump};

/// One packet of a capture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Captured {
    /// When, ns since the first packet.
    pub at_ns: u64,
    /// By what it came, or left.
    pub attachment: Ingress,
    /// The Ethernet frame.
    pub bytes: Vec<u8>,
}

/// Packets of the same time and interface, shown as one batch.
struct Batch<'a> {
    packets: &'a mut [Captured],
    shown: bool,
}

impl Source for Batch<'_> {
    fn pull(&mut self, act: &mut dyn FnMut(&mut [Frame<'_>])) -> io::Result<usize> {
        if std::mem::replace(&mut self.shown, true) {
            return Ok(0);
        }
        let count = self.packets.len();
        let mut frames: Vec<Frame<'_>> = self
            .packets
            .iter_mut()
            .map(|packet| Frame::new(packet.attachment, VirtioNetHeader::default(), &mut packet.bytes))
            .collect();
        act(&mut frames);
        Ok(count)
    }
}

/// Writes down what would leave.
#[derive(Default)]
struct Recorder {
    at_ns: u64,
    sent: Vec<(Outcome, Captured)>,
    handed: Vec<(u8, Handed)>,
}

impl Output for Recorder {
    fn emit(&mut self, outcome: Outcome, _: &VirtioNetHeader, bytes: &mut [u8]) {
        let attachment = match outcome {
            Outcome::Forward(Egress::Interface(id)) | Outcome::Resolve(id, _) => Ingress::Interface(id),
            Outcome::Forward(Egress::Host) => Ingress::Host,
            Outcome::Forward(Egress::Bond(id)) => Ingress::Bond(id),
            Outcome::Forward(Egress::Core(_) | Egress::Unit(_))
            | Outcome::Pending
            | Outcome::Consumed
            | Outcome::Dropped(_) => return,
        };
        self.sent.push((outcome, Captured { at_ns: self.at_ns, attachment, bytes: bytes.to_vec() }));
    }

    fn hand_over(&mut self, core: u8, handed: Handed) -> bool {
        self.handed.push((core, handed));
        true
    }
}

impl Sinks for Recorder {
    fn push(&mut self, frames: &mut [Frame<'_>]) {
        for frame in frames {
            let (outcome, offload) = (frame.outcome, frame.offload);
            self.emit(outcome, &offload, frame.bytes);
        }
    }
}

/// What a replay did.
#[derive(Clone, Debug, Default)]
pub struct Replayed {
    /// What left, in order, with what it left by.
    pub packets: Vec<Captured>,
    /// Packets that went on.
    pub sent: u64,
    /// Packets to the host's own stack.
    pub to_host: u64,
}

/// Runs packets through the cores, in order of time. Packets with one time stamp and interface come as a batch. Each is
/// read by the core that the hash names, as the kernel would do it.
///
/// # Errors
/// None of the system's: there is no I/O here.
pub fn run(
    cores: &mut [Core],
    reader: impl Fn(&Captured) -> usize,
    mut packets: Vec<Captured>,
) -> io::Result<Replayed> {
    let mut recorder = Recorder::default();
    let mut start = 0;
    while start < packets.len() {
        let first = &packets[start];
        let (at_ns, attachment, core) = (first.at_ns, first.attachment, reader(first));
        let same = |packet: &&Captured| {
            packet.at_ns == at_ns && packet.attachment == attachment && reader(packet) == core
        };
        let count = packets[start..].iter().take(BATCH_MAX).take_while(same).count().max(1);
        recorder.at_ns = at_ns;
        let mut batch = Batch { packets: &mut packets[start..start + count], shown: false };
        if let Some(core) = cores.get_mut(core) {
            pump(core, at_ns, &mut batch, &mut recorder)?;
        }
        while !recorder.handed.is_empty() {
            for (core, handed) in std::mem::take(&mut recorder.handed) {
                if let Some(core) = cores.get_mut(usize::from(core)) {
                    core.handed(at_ns, handed, &mut recorder);
                }
            }
        }
        for core in &mut *cores {
            core.tick(at_ns);
        }
        start += count;
    }
    let mut replayed = Replayed::default();
    for (outcome, packet) in recorder.sent {
        match outcome {
            Outcome::Forward(Egress::Host) => replayed.to_host += 1,
            _ => replayed.sent += 1,
        }
        replayed.packets.push(packet);
    }
    debug_assert!(replayed.packets.iter().all(|packet| packet.bytes.len() >= ETHERNET_BYTES));
    Ok(replayed)
}
