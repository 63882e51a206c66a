//! Threads that stand for cores, joined by a ring for each pair.

use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::anyhow;
use rtrb::{Consumer, Producer, RingBuffer};

/// Flows among the packets.
pub const FLOWS: usize = 1 << 16;
const RING: usize = 1_024;
/// Lead of one reader over another, in packets of all cores: as with a card's rings, none runs far ahead.
const WINDOW: usize = 4_096;

/// Content of a ring.
#[derive(Clone, Copy)]
pub struct Packet {
    /// Place in the order of arrival.
    pub place: usize,
    /// Number of its flow.
    pub flow: usize,
    /// Number within the flow, from 1.
    pub number: u32,
    /// Core that owns the flow.
    pub owner: u8,
}

/// Counts of one core.
#[derive(Clone, Copy, Default)]
pub struct Seen {
    /// Packets that it read.
    pub read: u64,
    /// Of those, packets of other owners.
    pub handed_over: u64,
    /// Packets of its own flows.
    pub processed: u64,
    /// Of those, packets after a later one of their flow.
    pub reordered: u64,
}

struct Core {
    number: u8,
    /// By core.
    to: Vec<Option<Producer<Packet>>>,
    from: Vec<Consumer<Packet>>,
    /// Highest number seen of each flow.
    flows: Vec<u32>,
    seen: Seen,
}

impl Core {
    fn process(&mut self, packet: Packet) {
        let highest = &mut self.flows[packet.flow];
        self.seen.reordered += u64::from(packet.number < *highest);
        *highest = packet.number.max(*highest);
        self.seen.processed += 1;
    }

    fn drain(&mut self) {
        for ring in 0..self.from.len() {
            while let Ok(packet) = self.from[ring].pop() {
                self.process(packet);
            }
        }
    }

    fn read(&mut self, packet: Packet) {
        self.seen.read += 1;
        if packet.owner == self.number {
            return self.process(packet);
        }
        self.seen.handed_over += 1;
        // A packet from a ring goes no further, so waiting for room while draining cannot lock up.
        while self.to[usize::from(packet.owner)].as_mut().is_some_and(|ring| ring.push(packet).is_err()) {
            self.drain();
            std::thread::yield_now();
        }
    }

    fn run(mut self, packets: &[Packet], progress: &[AtomicUsize]) -> Seen {
        let mine = &progress[usize::from(self.number)];
        for (count, &packet) in packets.iter().enumerate() {
            if count % 32 == 0 {
                mine.store(packet.place, Ordering::Release);
                while progress.iter().any(|other| other.load(Ordering::Acquire) + WINDOW < packet.place) {
                    self.drain();
                    std::thread::yield_now();
                }
                self.drain();
            }
            self.read(packet);
        }
        mine.store(usize::MAX - WINDOW, Ordering::Release);
        while !(0..self.from.len()).all(|ring| self.from[ring].is_abandoned() && self.from[ring].is_empty()) {
            self.to.clear();
            self.drain();
            std::thread::yield_now();
        }
        self.seen
    }
}

fn connect(cores: u8) -> Vec<Core> {
    let empty = |number| Core {
        number,
        to: (0..cores).map(|_| None).collect(),
        from: Vec::new(),
        flows: vec![0; FLOWS],
        seen: Seen::default(),
    };
    let mut all: Vec<Core> = (0..cores).map(empty).collect();
    for from in 0..usize::from(cores) {
        for to in (0..usize::from(cores)).filter(|&to| to != from) {
            let (producer, consumer) = RingBuffer::new(RING);
            all[from].to[to] = Some(producer);
            all[to].from.push(consumer);
        }
    }
    all
}

/// Runs all cores at once. Returns what each counted, and the time it took, s.
pub fn run(readers: &[Vec<Packet>], cores: u8) -> anyhow::Result<(Vec<Seen>, f64)> {
    let progress: Vec<AtomicUsize> = readers.iter().map(|_| AtomicUsize::new(0)).collect();
    let barrier = Barrier::new(usize::from(cores) + 1);
    std::thread::scope(|scope| {
        let run = |(core, list)| {
            let (progress, barrier) = (&progress, &barrier);
            scope.spawn(move || {
                barrier.wait();
                Core::run(core, list, progress)
            })
        };
        let threads: Vec<_> =
            connect(cores).into_iter().zip(readers.iter().map(Vec::as_slice)).map(run).collect();
        barrier.wait();
        let start = Instant::now();
        let seen: Result<Vec<Seen>, _> = threads.into_iter().map(|thread| thread.join()).collect();
        let seen = seen.map_err(|_| anyhow!("a core's thread panicked"))?;
        Ok((seen, start.elapsed().as_secs_f64()))
    })
}
