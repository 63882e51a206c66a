//! Rings between workers, for what came to the wrong core only.
//!
//! Every pair of workers has one bounded ring each way; a full ring is a counted drop, never a wait.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use datapath::Handed;
use linux::event::EventFd;
use rtrb::{Consumer, Producer, RingBuffer};

/// Items one ring holds.
const RING_ITEMS: usize = 1_024;

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
    pub fn prepare_sleep(&self) {
        self.asleep.store(true, SeqCst);
    }

    /// The worker is awake.
    pub fn woke(&self) {
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
    senders: RingSenders,
    receivers: RingReceivers,
}

/// A worker's sending ends, by receiving core.
pub struct RingSenders {
    rings: Vec<Option<Producer<Handed>>>,
    doorbells: Arc<Vec<Doorbell>>,
}

/// A worker's receiving ends.
pub struct RingReceivers {
    rings: Vec<Consumer<Handed>>,
}

/// All rings of `cores` workers, one [`Rings`] each.
pub fn mesh(doorbells: &Arc<Vec<Doorbell>>) -> Vec<Rings> {
    let cores = doorbells.len();
    let mut all: Vec<Rings> = (0..cores)
        .map(|_| Rings {
            senders: RingSenders {
                rings: (0..cores).map(|_| None).collect(),
                doorbells: Arc::clone(doorbells),
            },
            receivers: RingReceivers { rings: Vec::new() },
        })
        .collect();
    for from in 0..cores {
        for to in (0..cores).filter(|to| *to != from) {
            let (producer, consumer) = RingBuffer::new(RING_ITEMS);
            all[from].senders.rings[to] = Some(producer);
            all[to].receivers.rings.push(consumer);
        }
    }
    all
}

impl Rings {
    /// Both directions apart.
    pub fn split(self) -> (RingSenders, RingReceivers) {
        (self.senders, self.receivers)
    }
}

impl RingSenders {
    /// Hands an item to another core; false when its ring is full.
    pub fn push(&mut self, to: usize, item: Handed) -> bool {
        let Some(Some(producer)) = self.rings.get_mut(to) else { return false };
        let pushed = producer.push(item).is_ok();
        if let Some(doorbell) = self.doorbells.get(to) {
            doorbell.ring();
        }
        pushed
    }
}

impl RingReceivers {
    /// Next item from any other core.
    pub fn pop(&mut self) -> Option<Handed> {
        self.rings.iter_mut().find_map(|ring| ring.pop().ok())
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.rings.iter().all(|ring| ring.is_empty())
    }
}
