//! Rings between workers, for what came to the wrong core only.
//!
//! Every pair of workers has one bounded ring each way; a full ring is a counted drop, never a wait.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use linux::event::EventFd;
use packet::vnet::VirtioNetHeader;
use rtrb::{Consumer, Producer, RingBuffer};
use tunnel::node::Source;

/// Items one ring holds.
const RING_ITEMS: usize = 1_024;

/// Something for another core.
pub enum Handed {
    /// An inner packet read from TUN.
    Packet(VirtioNetHeader, Vec<u8>),
    /// One datagram.
    Datagram(Source, Vec<u8>),
    /// A packet of a plain interface, for the core of its flow.
    Service(Box<services::core::Handed>),
}

/// Wakes a worker that sleeps; does nothing to one that is awake.
pub struct Doorbell {
    asleep: AtomicBool,
    event: EventFd,
}

impl Doorbell {
    /// A doorbell nobody has rung.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { asleep: AtomicBool::new(false), event: EventFd::new()? })
    }

    /// Makes sure the worker looks at its rings.
    pub fn ring(&self) {
        if self.asleep.swap(false, SeqCst) {
            // It can only fail when the counter is full, and then the worker is woken already.
            let _ = self.event.signal();
        }
    }

    /// The worker is about to sleep: from now on rings are signalled. It looks once more before it does sleep.
    pub fn lie_down(&self) {
        self.asleep.store(true, SeqCst);
    }

    /// The worker is awake.
    pub fn get_up(&self) {
        self.asleep.store(false, SeqCst);
    }

    /// Whether the worker sleeps, or is about to.
    pub fn is_asleep(&self) -> bool {
        self.asleep.load(SeqCst)
    }

    /// What to wait on.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}

/// A worker's ends of all rings.
pub struct Rings {
    incoming: Vec<Consumer<Handed>>,
    outgoing: Vec<Option<Producer<Handed>>>,
    doorbells: Arc<Vec<Doorbell>>,
}

/// All rings of `cores` workers, one [`Rings`] each.
pub fn mesh(doorbells: &Arc<Vec<Doorbell>>) -> Vec<Rings> {
    let cores = doorbells.len();
    let mut rings: Vec<Rings> = (0..cores)
        .map(|_| Rings {
            incoming: Vec::new(),
            outgoing: (0..cores).map(|_| None).collect(),
            doorbells: Arc::clone(doorbells),
        })
        .collect();
    for from in 0..cores {
        for to in (0..cores).filter(|to| *to != from) {
            let (producer, consumer) = RingBuffer::new(RING_ITEMS);
            rings[from].outgoing[to] = Some(producer);
            rings[to].incoming.push(consumer);
        }
    }
    rings
}

impl Rings {
    /// Hands an item to another core; false when its ring is full.
    pub fn push(&mut self, to: usize, item: Handed) -> bool {
        let Some(Some(producer)) = self.outgoing.get_mut(to) else { return false };
        let pushed = producer.push(item).is_ok();
        if let Some(doorbell) = self.doorbells.get(to) {
            doorbell.ring();
        }
        pushed
    }

    /// Next item from any other core.
    pub fn pop(&mut self) -> Option<Handed> {
        self.incoming.iter_mut().find_map(|ring| ring.pop().ok())
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.incoming.iter().all(|ring| ring.is_empty())
    }
}
