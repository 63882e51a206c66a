//! Cores of one or more pairs of nodes, each on a thread, through turns of sending and receiving.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use packet::DropCounters;
use tunnel::mode::SteeringMode;
use tunnel::time::Time;

use super::memory_core::{Core, UDP_HEADERS_BYTES};
use super::pair::{Inboxes, Pair, source_of_receiver, source_of_sender};

/// Flows of all pairs together.
const FLOWS: usize = 16;
/// Packets of a turn, of all flows together.
const TURN_PACKETS: usize = 512;
/// Turns without data, in which the nodes join and measure their path.
const JOIN_TURNS: u64 = 1_500;
/// Time of a turn without data, µs.
const JOIN_US: u64 = 1_000;
/// Turns whose time does not count: the load grows, and the sender finds out what the path carries.
const WARM_TURNS: u64 = 600;
/// Turns without data at the end of these and of all: what is queued, or waits for its order, goes on.
const DRAIN_TURNS: u64 = 100;
/// Rate of the data, bits per second of the nodes' time.
const RATE_BPS: u64 = 1_000_000_000;

/// Load of a measurement.
pub struct Load {
    pub mode: SteeringMode,
    /// Bytes of each packet.
    pub bytes: usize,
    /// Packets whose time counts.
    pub packets: u64,
}

/// Result of a measurement.
pub struct Measured {
    pub send_kpps: f64,
    pub receive_kpps: f64,
    /// Packets that the receiving cores handed over, percent.
    pub handed_percent: f64,
}

/// Measurement of one thread: nanoseconds of each turn's sending and receiving, and what came of it.
#[derive(Default)]
struct Timed {
    send_ns: Vec<u64>,
    receive_ns: Vec<u64>,
    /// Bytes of payload and packets handed over at the receiving core when measuring began, and since.
    payload_before: u64,
    payload_bytes: u64,
    handed_before: u64,
    handed: u64,
}

/// State that the threads of one pair share, and all threads.
struct Shared<'a> {
    to_receiver: &'a Inboxes,
    to_sender: &'a Inboxes,
    /// Receiving cores of the pair that are through, by turn: one counter for even turns, one for odd ones.
    done: &'a [AtomicUsize; 2],
    cores: usize,
    turn: &'a SpinBarrier,
}

/// Runs `pairs` pairs of nodes with `cores` cores each.
///
/// # Errors
/// When the nodes do not join, or packets are lost.
pub fn run((pairs, cores): (usize, u8), load: &Load) -> anyhow::Result<Measured> {
    let start = Time::from_ms(1_000);
    let mut pairs: Vec<Pair> =
        (0..pairs).map(|_| Pair::new(start, cores, load.mode)).collect::<anyhow::Result<_>>()?;
    let threads = pairs.len() * usize::from(cores);
    let turns = load.packets.div_ceil(TURN_PACKETS as u64);
    let turn_us = (TURN_PACKETS * load.bytes * 8) as u64 * 1_000_000 / RATE_BPS;
    let clock = Clock { start, turn_us: turn_us.max(50), turns };
    let turn = SpinBarrier::new(threads);
    let flows = FLOWS / pairs.len();
    let done: Vec<[AtomicUsize; 2]> = pairs.iter().map(|_| Default::default()).collect();
    let cpus = linux::affinity::allowed_cpus().unwrap_or_default();
    let timed: Vec<Timed> = std::thread::scope(|scope| {
        let mut running = Vec::new();
        for (pair, done) in pairs.iter_mut().zip(&done) {
            let packets = pair.packets(flows, load.bytes);
            let Pair { sender, receiver } = pair;
            let (to_receiver, to_sender) = (&receiver.inboxes, &sender.inboxes);
            let cores = sender.cores.len();
            for ((from, to), packets) in sender.cores.iter_mut().zip(&mut receiver.cores).zip(packets) {
                let shared = Shared { to_receiver, to_sender, done, cores, turn: &turn };
                let cpu = cpus.get(running.len() % cpus.len().max(1)).copied();
                let clock = &clock;
                running.push(scope.spawn(move || {
                    if let Some(cpu) = cpu {
                        let _ = linux::affinity::pin_current_thread(cpu);
                    }
                    turns_of((from, to), &packets, clock, &shared)
                }));
            }
        }
        running
            .into_iter()
            .map(|thread| thread.join().map_err(|_| anyhow::anyhow!("a thread panicked")))
            .collect::<anyhow::Result<_>>()
    })?;
    result(&pairs, &timed, clock.turns * TURN_PACKETS as u64, load)
}

/// Time of the nodes, by turn.
struct Clock {
    start: Time,
    turn_us: u64,
    /// Turns that are measured.
    turns: u64,
}

impl Clock {
    fn joining(&self, turn: u64) -> Time {
        self.start.plus_us((turn + 1) * JOIN_US)
    }

    fn data(&self, turn: u64) -> Time {
        self.joining(JOIN_TURNS).plus_us((turn + 1) * self.turn_us)
    }
}

/// All turns of one sending and one receiving core.
fn turns_of(
    (from, to): (&mut Core, &mut Core),
    flows: &[Vec<u8>],
    clock: &Clock,
    shared: &Shared<'_>,
) -> Timed {
    for turn in 0..JOIN_TURNS {
        one_turn((from, to), &[], 0, (clock.joining(turn), turn), shared);
    }
    let full = TURN_PACKETS / FLOWS;
    let mut timed = Timed::default();
    for turn in 0..WARM_TURNS + clock.turns + DRAIN_TURNS {
        let measured = (WARM_TURNS..WARM_TURNS + clock.turns).contains(&turn);
        let each = match turn {
            // More and more, and nothing at the end: the sender finds out what the path carries, and its queue empties.
            _ if turn < WARM_TURNS - DRAIN_TURNS => {
                full * turn as usize / (WARM_TURNS - DRAIN_TURNS) as usize
            }
            _ if measured => full,
            _ => 0,
        };
        if turn == WARM_TURNS {
            timed.payload_before = to.out.payload_bytes;
            timed.handed_before = to.out.handed;
        }
        let [send, receive] = one_turn((from, to), flows, each, (clock.data(turn), turn), shared);
        if measured {
            timed.send_ns.push(send);
            timed.receive_ns.push(receive);
        }
    }
    timed.payload_bytes = to.out.payload_bytes - timed.payload_before;
    timed.handed = to.out.handed - timed.handed_before;
    timed
}

/// One turn: `each` packets of each flow are sent, all that was sent is received, the answers are taken. Nanoseconds of
/// sending and of receiving.
fn one_turn(
    (from, to): (&mut Core, &mut Core),
    flows: &[Vec<u8>],
    each: usize,
    (now, turn): (Time, u64),
    shared: &Shared<'_>,
) -> [u64; 2] {
    let (core, done) = (usize::from(from.datapath.id()), &shared.done[turn as usize % 2]);
    shared.turn.wait();
    shared.done[(turn as usize + 1) % 2].store(0, Ordering::Release);
    let began = Instant::now();
    from.send(now, (0..each).flat_map(|_| flows).map(Vec::as_slice));
    let sent_ns = began.elapsed().as_nanos() as u64;
    shared.to_receiver.route(from.out.sent.drain(..), source_of_sender);
    shared.turn.wait();
    let mut arrived = shared.to_receiver.take(core);
    shared.turn.wait();
    let began = Instant::now();
    to.receive(now, &mut arrived, done, shared.cores);
    let received_ns = began.elapsed().as_nanos() as u64;
    shared.to_sender.route(to.out.sent.drain(..), source_of_receiver);
    shared.turn.wait();
    let alone = AtomicUsize::new(0);
    from.receive(now, &mut shared.to_sender.take(core), &alone, 1);
    [sent_ns, received_ns]
}

fn result(pairs: &[Pair], timed: &[Timed], offered: u64, load: &Load) -> anyhow::Result<Measured> {
    let payload = load.bytes.saturating_sub(UDP_HEADERS_BYTES).max(1) as u64;
    let received = timed.iter().map(|timed| timed.payload_bytes).sum::<u64>() / payload;
    if received != offered {
        let cores = pairs.iter().flat_map(|pair| pair.sender.cores.iter().chain(&pair.receiver.cores));
        let mut drops = DropCounters::default();
        cores.for_each(|core| drops.merge(&core.datapath.tunnel_drops()));
        let drops = drops.iter().filter(|(_, count)| *count > 0);
        let drops: Vec<String> = drops.map(|(reason, count)| format!("{reason} {count}")).collect();
        anyhow::bail!("{received} of {offered} packets arrived; dropped in all: {}", drops.join(", "));
    }
    let handed: u64 = timed.iter().map(|timed| timed.handed).sum();
    let kpps = |of: fn(&Timed) -> &Vec<u64>| {
        let turns = timed.iter().map(|timed| of(timed).len()).min().unwrap_or(0);
        // A turn is over when the slowest core is.
        let turn_ns = |turn| timed.iter().filter_map(|timed| of(timed).get(turn)).max().copied().unwrap_or(0);
        (turns * TURN_PACKETS) as f64 * 1e6 / (0..turns).map(turn_ns).sum::<u64>().max(1) as f64
    };
    Ok(Measured {
        send_kpps: kpps(|timed| &timed.send_ns),
        receive_kpps: kpps(|timed| &timed.receive_ns),
        handed_percent: 100.0 * handed as f64 / received.max(1) as f64,
    })
}

/// Barrier of threads that have a CPU each: who waits does not sleep, so that all go on at once.
struct SpinBarrier {
    threads: usize,
    arrived: AtomicUsize,
    sense: AtomicBool,
    /// Where the threads may not have a CPU each.
    sleeping: Option<Barrier>,
}

impl SpinBarrier {
    fn new(threads: usize) -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let sleeping = (threads > cpus).then(|| Barrier::new(threads));
        Self { threads, arrived: AtomicUsize::new(0), sense: AtomicBool::new(false), sleeping }
    }

    fn wait(&self) {
        if let Some(barrier) = &self.sleeping {
            barrier.wait();
            return;
        }
        let sense = self.sense.load(Ordering::Acquire);
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.threads {
            self.arrived.store(0, Ordering::Release);
            self.sense.store(!sense, Ordering::Release);
            return;
        }
        let mut spins = 0u32;
        while self.sense.load(Ordering::Acquire) == sense {
            spins += 1;
            if spins > 10_000 {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
    }
}
