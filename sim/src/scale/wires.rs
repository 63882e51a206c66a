//! Everything under way: messages, packets, snapshots on their way to cores, states on their way to the disk.

use std::collections::BTreeMap;
use std::sync::Arc;

use cluster::message::Message;
use cluster::unit::Snapshot;
use steering::units::Target;

use super::{MS, SECOND};

/// A packet between two units.
pub(super) struct Flight {
    pub slot: u32,
    pub generation: u16,
    pub core: usize,
    pub target: Target,
}

/// Something that happens.
pub(super) enum Happening {
    /// A message reaches the manager.
    ToManager { connection: u64, message: Box<Message> },
    /// A message reaches a unit.
    ToUnit { node: u16, connection: u64, message: Box<Message> },
    /// A core works by a snapshot from now on.
    TakeOver { node: u16, instance: u64, core: usize, snapshot: Arc<Snapshot> },
    /// The manager's state is on the disk; of its process after so many restarts.
    Written { number: u64, state: Vec<u8>, restarts: u64 },
    /// A unit connects again.
    Connect { node: u16 },
    /// A process starts.
    Start { node: u16 },
    /// A packet of a flow reaches some dispatcher.
    First { slot: u32, generation: u16 },
    /// A packet reaches a unit.
    Packet(Flight),
}

impl Happening {
    /// Whether a change waits for it: not for figures, packets, nor for a process that starts some time.
    fn is_awaited(&self) -> bool {
        match self {
            Self::ToManager { message, .. } => {
                !matches!(**message, Message::Heartbeat { .. } | Message::Report(_))
            }
            Self::Start { .. } | Self::First { .. } | Self::Packet(_) => false,
            _ => true,
        }
    }
}

/// Everything under way, by time and, at one time, in the order in which it was sent.
#[derive(Default)]
pub(super) struct Wires {
    queue: BTreeMap<(u64, u64), Happening>,
    sent: u64,
    messages: usize,
}

impl Wires {
    pub fn push(&mut self, at_ns: u64, happening: Happening) {
        self.messages += usize::from(happening.is_awaited());
        self.sent += 1;
        self.queue.insert((at_ns, self.sent), happening);
    }

    pub fn pop(&mut self, until_ns: u64) -> Option<(u64, Happening)> {
        let entry = self.queue.first_entry().filter(|entry| entry.key().0 <= until_ns)?;
        let ((at_ns, _), happening) = entry.remove_entry();
        self.messages -= usize::from(happening.is_awaited());
        Some((at_ns, happening))
    }

    /// Everything under way but processes that will start.
    pub fn take_rest(&mut self) -> Vec<Happening> {
        let (starts, rest): (BTreeMap<_, _>, BTreeMap<_, _>) = std::mem::take(&mut self.queue)
            .into_iter()
            .partition(|(_, happening)| matches!(happening, Happening::Start { .. }));
        (self.queue, self.messages) = (starts, 0);
        rest.into_values().collect()
    }

    pub fn next_ns(&self) -> u64 {
        self.queue.first_key_value().map_or(u64::MAX, |((at_ns, _), _)| *at_ns)
    }

    /// Whether anything that a change waits for is under way.
    pub fn has_messages(&self) -> bool {
        self.messages > 0
    }
}

/// A message's time on the way: 0.1 to 5 ms, one in fifty up to 300 ms, as TCP repeats it.
pub(super) fn delay(rng: &mut fastrand::Rng) -> u64 {
    if rng.u32(..50) == 0 { rng.u64(5 * MS..300 * MS) } else { rng.u64(MS / 10..5 * MS) }
}

/// Time until a core works by a snapshot: up to 2 ms, one in two hundred up to 300 ms.
pub(super) fn core_delay(rng: &mut fastrand::Rng) -> u64 {
    if rng.u32(..200) == 0 { rng.u64(MS..300 * MS) } else { rng.u64(0..2 * MS) }
}

/// A packet's time between two units: up to 1 ms, one in ten up to 80 ms, so that twelve hops end within the second that the
/// manager waits between two changes.
pub(super) fn hop_delay(rng: &mut fastrand::Rng) -> u64 {
    if rng.u32(..10) == 0 { rng.u64(MS..80 * MS) } else { rng.u64(MS / 100..MS) }
}

const _: () = assert!(12 * 80 * MS < SECOND);
