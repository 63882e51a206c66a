//! Compares the schemes of `steering::distribution` in memory (row C8).
//!
//! `cargo run --release -p steering --example distribution [cores] [packets]`
//!
//! Threads stand for cores. Each reads the packets that the scheme gives it, hands those of other owners over by ring,
//! and counts those of its own flows, in order of arrival; as with a card's rings, no reader runs far ahead of the
//! others. Rates are for comparison within one run only.

#![allow(clippy::print_stdout, reason = "its report")]

use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use rtrb::{Consumer, Producer, RingBuffer};
use steering::distribution::{Distributor, Facts, NO_SERVICE, Scheme};
use steering::table::{BucketTable, Unit};

const FLOWS: usize = 1 << 16;
const RING: usize = 1_024;
/// The same packets so many times; the rates are the best and the median.
const RUNS: usize = 7;
/// How far, in packets of all cores, one reader may be ahead of another.
const WINDOW: usize = 4_096;

/// What a ring carries.
#[derive(Clone, Copy)]
struct Packet {
    /// Place in the order of arrival.
    place: usize,
    flow: usize,
    /// Number within the flow, from 1.
    number: u32,
    owner: u8,
}

/// What one core saw.
#[derive(Clone, Copy, Default)]
struct Seen {
    read: u64,
    handed_over: u64,
    processed: u64,
    reordered: u64,
}

/// 64-bit mixing (splitmix64): a hash of the flow's number, and random numbers.
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Gives the packets to readers. Flows are skewed, four interfaces share the traffic 4:2:1:1, half of it is for three
/// services.
fn distribute(scheme: Scheme, cores: u8, packets: usize) -> Vec<Vec<Packet>> {
    let units: Vec<Unit> = (0..cores).map(|id| Unit { id: id.into(), weight: 1 }).collect();
    let table = BucketTable::new(128, &units).expect("at least one core");
    let list: Vec<u8> = (0..cores).collect();
    let mut distributor = Distributor::new(scheme, &list, table);
    let mut numbers = vec![0u32; FLOWS];
    let mut readers = vec![Vec::new(); usize::from(cores)];
    for place in 0..packets {
        let random = mix(place as u64);
        // Log-uniform: the first flows have most of the packets.
        let bits = random % 17;
        let flow = (random >> 20) as usize & ((1 << bits) - 1);
        let of_flow = mix(!(flow as u64));
        let facts = Facts {
            hash: of_flow as u32,
            port: [0, 0, 0, 0, 1, 1, 2, 3][(of_flow >> 32) as usize % 8],
            service: if of_flow >> 40 & 1 == 0 { (of_flow >> 41) as u16 % 3 } else { NO_SERVICE },
            bytes: if random >> 60 == 0 { 1_500 } else { 64 },
            // A packet each 100 ns.
            now_ns: place as u64 * 100,
        };
        numbers[flow] += 1;
        let owner = distributor.owner(facts.hash);
        let reader = usize::from(distributor.reader(&facts));
        readers[reader].push(Packet { place, flow, number: numbers[flow], owner });
    }
    readers
}

/// One core.
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
        // What comes by ring goes no further, so waiting for room while draining cannot lock up.
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

/// Cores, joined by a ring for each pair.
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

/// All cores at once: what each saw, and how long it took, s.
fn run(readers: &[Vec<Packet>], cores: u8) -> (Vec<Seen>, f64) {
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
        let seen: Vec<Seen> = threads.into_iter().map(|thread| thread.join().expect("no panic")).collect();
        (seen, start.elapsed().as_secs_f64())
    })
}

fn compare(scheme: Scheme, cores: u8, packets: usize) {
    let readers = distribute(scheme, cores, packets);
    let mut runs: Vec<(Vec<Seen>, f64)> = (0..RUNS).map(|_| run(&readers, cores)).collect();
    runs.sort_by(|one, other| one.1.total_cmp(&other.1));
    let rate = |place: usize| runs.get(place).map_or(0.0, |run| packets as f64 / run.1 / 1e6);
    let (best, median) = (rate(0), rate(RUNS / 2));
    let seen = &runs[RUNS / 2].0;
    let total = |of: fn(&Seen) -> u64| seen.iter().map(of).sum::<u64>();
    assert_eq!(total(|seen| seen.processed), packets as u64, "every packet once");
    let imbalance = |of: fn(&Seen) -> u64| {
        let most = seen.iter().map(of).max().unwrap_or(0);
        most as f64 * f64::from(cores) / total(of).max(1) as f64
    };
    let percent = |count: u64| count as f64 * 100.0 / packets as f64;
    println!(
        "{:<18} {best:>6.1} {median:>7.1} {:>12.1} {:>14.2} {:>14.2} {:>12.3}",
        scheme.to_string(),
        percent(total(|seen| seen.handed_over)),
        imbalance(|seen| seen.read),
        imbalance(|seen| seen.read + seen.processed),
        percent(total(|seen| seen.reordered)),
    );
}

fn main() {
    let mut numbers = std::env::args().skip(1).map(|text| text.parse::<usize>().expect("a number"));
    let available = std::thread::available_parallelism().map_or(2, usize::from);
    let cores = numbers.next().unwrap_or(available).clamp(1, 64) as u8;
    let packets = numbers.next().unwrap_or(4_000_000);
    println!("{cores} cores (machine: {available}), {packets} packets, {FLOWS} flows");
    println!(
        "{:<18} {:>6} {:>7} {:>12} {:>14} {:>14} {:>12}",
        "scheme", "Mpps", "median", "hand-offs %", "reading max/∅", "work max/∅", "reordered %"
    );
    for scheme in [
        Scheme::Flow,
        Scheme::Interface,
        Scheme::Service,
        Scheme::RoundRobin,
        Scheme::LeastLoaded,
        Scheme::EveryPackets(100),
        Scheme::TimeSlice(5_000),
        Scheme::Transaction(100),
        Scheme::InterfaceFlow(2),
        Scheme::ServiceFlow(2),
    ] {
        compare(scheme, cores, packets);
    }
}
