//! The emulator: a thread that carries Ethernet frames between pairs of interfaces through the
//! model in [`sim::link`], in real time.
//!
//! Frames are read from raw packet sockets in batches and written back at the moment the model says, within
//! ±100 µs. When turns follow each other fast the thread naps between them, so that its cost per second is bounded however
//! many packets there are: to wake up costs more than to carry a packet. It gives packets out up to 75 µs early, so that
//! the error is about as often early as late, and takes the middle of its nap for the moment when packets came in.
//! Moments come from the model and not from the naps: the rate does not suffer from a late turn.
//! A frame keeps the partial checksum it came with (virtio header), as over a network card that computes
//! checksums. A flipped bit therefore is not noticed by UDP or TCP checksums; it is there to test what is above them.

use std::io::{self, ErrorKind, IoSliceMut};
use std::sync::Mutex;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, anyhow};
use linux::clock::monotonic_ns;
use linux::event::{Epoll, EventFd, Interest};
use linux::packet_socket::{PacketSocket, VNET_HEADER_BYTES};
use sim::link::{Counters, Direction, Shape};

/// Frames per system call.
const BATCH: usize = 32;
/// Batches per socket and turn, so that one flood does not starve the others.
const BATCHES_MAX: usize = 8;
/// A packet may leave this much before its moment, ns.
const EARLY_NS: u64 = 75_000;
/// Turns with work do not follow each other faster than this.
const NAP_NS: u64 = 150_000;
/// Shortest sleep without work: a packet that is still on the line can be due within [`EARLY_NS`] and not be there yet.
const SHORTEST: Duration = Duration::from_micros(20);
/// Kernel buffer of each socket, bytes. Less is given to an ordinary user.
const SOCKET_BYTES: usize = 8 << 20;
/// Spare buffers kept for reuse.
const SPARE_MAX: usize = 8_192;
/// Ethernet header.
const ETHERNET_BYTES: usize = 14;

/// One or both directions of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From site A to site B.
    AToB,
    /// From site B to site A.
    BToA,
    /// Both.
    Both,
}

impl Way {
    fn has(self, direction: usize) -> bool {
        match self {
            Way::AToB => direction == 0,
            Way::BToA => direction == 1,
            Way::Both => true,
        }
    }
}

/// Counters of a link, A to B and B to A.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkCounters {
    /// From A to B.
    pub a_to_b: Counters,
    /// From B to A.
    pub b_to_a: Counters,
    /// Frames the kernel did not take when they arrived (the interface was down, no memory).
    pub refused: u64,
}

/// A frame in a buffer that is used again.
struct Frame {
    buffer: Vec<u8>,
    bytes: usize,
}

/// A link as the emulator is given it.
pub(crate) struct Wire {
    /// The emulator's interfaces that lead to A and to B.
    pub(crate) ends: [PacketSocket; 2],
    /// A to B, B to A.
    pub(crate) shapes: [Shape; 2],
    /// Interface MTU, bytes.
    pub(crate) mtu: u32,
    pub(crate) seed: u64,
}

type Change = Box<dyn FnMut(&mut Shape) + Send>;

enum Command {
    Change { link: usize, way: Way, change: Change, done: mpsc::Sender<()> },
    Clear { link: usize, done: mpsc::Sender<()> },
    Count { link: usize, reply: mpsc::Sender<LinkCounters> },
    End,
}

/// The handle of a running emulator. It ends when this is dropped.
#[derive(Debug)]
pub struct Emulator {
    commands: Mutex<mpsc::Sender<Command>>,
    wake: EventFd,
    thread: Option<JoinHandle<()>>,
    links: usize,
}

impl Emulator {
    pub(crate) fn start(wires: Vec<Wire>) -> anyhow::Result<Emulator> {
        let links = wires.len();
        let wake = EventFd::new().context("make an eventfd")?;
        let (sender, receiver) = mpsc::channel();
        let worker = Worker::new(wires, receiver, wake.try_clone()?)?;
        let thread = std::thread::Builder::new()
            .name("emulator".into())
            .spawn(move || {
                // The wire is not slowed down by what the machine does otherwise. Without the privilege: as good as it gets.
                linux::affinity::make_timers_exact();
                let _ = linux::affinity::schedule_current_thread(linux::affinity::Scheduling::Preempting);
                worker.run();
            })
            .context("start the emulator's thread")?;
        Ok(Emulator { commands: Mutex::new(sender), wake, thread: Some(thread), links })
    }

    /// Changes the properties of a link while it runs; returns when it has happened.
    pub fn change(
        &self,
        link: usize,
        way: Way,
        change: impl FnMut(&mut Shape) + Send + 'static,
    ) -> anyhow::Result<()> {
        let (done, answer) = mpsc::channel();
        self.send(link, Command::Change { link, way, change: Box::new(change), done })?;
        answer.recv().map_err(|_| gone())
    }

    /// Silences a link or brings it back: whatever would arrive vanishes, and nobody is told.
    pub fn black_hole(&self, link: usize, on: bool) -> anyhow::Result<()> {
        self.change(link, Way::Both, move |shape| shape.black_hole = on)
    }

    /// Forgets whatever is under way on a link.
    pub fn clear(&self, link: usize) -> anyhow::Result<()> {
        let (done, answer) = mpsc::channel();
        self.send(link, Command::Clear { link, done })?;
        answer.recv().map_err(|_| gone())
    }

    /// Counters of a link.
    pub fn counters(&self, link: usize) -> anyhow::Result<LinkCounters> {
        let (reply, answer) = mpsc::channel();
        self.send(link, Command::Count { link, reply })?;
        answer.recv().map_err(|_| gone())
    }

    fn send(&self, link: usize, command: Command) -> anyhow::Result<()> {
        if link >= self.links {
            return Err(anyhow!("there is no link {link}: the test bed has {}", self.links));
        }
        let commands = self.commands.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        commands.send(command).map_err(|_| gone())?;
        self.wake.signal().context("wake the emulator")
    }
}

fn gone() -> anyhow::Error {
    anyhow!("the link emulator has ended")
}

impl Drop for Emulator {
    fn drop(&mut self) {
        if let Ok(commands) = self.commands.lock() {
            let _ = commands.send(Command::End);
        }
        let _ = self.wake.signal();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Link {
    ends: [PacketSocket; 2],
    directions: [Direction<Frame>; 2],
    refused: u64,
}

struct Worker {
    links: Vec<Link>,
    commands: mpsc::Receiver<Command>,
    wake: EventFd,
    epoll: Epoll,
    /// Buffers the next batch is read into.
    buffers: [Vec<u8>; BATCH],
    spare: Vec<Vec<u8>>,
    buffer_bytes: usize,
}

const WAKE: u64 = u64::MAX;

impl Worker {
    fn new(wires: Vec<Wire>, commands: mpsc::Receiver<Command>, wake: EventFd) -> anyhow::Result<Worker> {
        let epoll = Epoll::new().context("make an epoll")?;
        epoll.add(&wake, WAKE, Interest::Read)?;
        let mtu_max = wires.iter().map(|w| w.mtu).max().unwrap_or(1_500);
        // Room for two VLAN tags, which no test uses and nothing should break on.
        let buffer_bytes = VNET_HEADER_BYTES + ETHERNET_BYTES + 8 + mtu_max as usize;
        let mut links = Vec::with_capacity(wires.len());
        for (number, wire) in wires.into_iter().enumerate() {
            for (end, socket) in wire.ends.iter().enumerate() {
                socket.set_buffers(SOCKET_BYTES).context("set the buffers of a packet socket")?;
                epoll.add(socket, (number * 2 + end) as u64, Interest::Read)?;
            }
            let [a, b] = wire.shapes;
            let seed = wire.seed.wrapping_add(number as u64 * 2);
            let directions = [Direction::new(a, seed), Direction::new(b, seed.wrapping_add(1))];
            links.push(Link { ends: wire.ends, directions, refused: 0 });
        }
        let buffers = std::array::from_fn(|_| vec![0; buffer_bytes]);
        Ok(Worker { links, commands, wake, epoll, buffers, spare: Vec::new(), buffer_bytes })
    }

    fn run(mut self) {
        // Without these the thread works too, less punctually: an ordinary user may not raise a priority.
        let _ = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(10_000));
        let _ = rustix::process::setpriority_process(None, -10);
        let mut ready = Vec::new();
        // When the last turn was, and since when packets may have come in unseen.
        let (mut last_ns, mut unseen_ns) = (0, None);
        loop {
            // What was due has been given out below, so the next thing is at least a moment away.
            let wait = |at: u64| Duration::from_nanos(at.saturating_sub(monotonic_ns())).max(SHORTEST);
            let timeout = self.next_event_ns().map(wait);
            let timeout = if unseen_ns.is_some() { Some(Duration::ZERO) } else { timeout };
            if let Err(error) = self.epoll.wait(&mut ready, timeout) {
                tracing::error!(%error, "the link emulator ends");
                return;
            }
            let now = monotonic_ns();
            let came_ns = unseen_ns.map_or(now, |since| since + (now - since) / 2);
            let mut worked = false;
            for entry in &ready {
                if entry.token == WAKE {
                    let _ = self.wake.drain();
                    if self.obey() {
                        return;
                    }
                } else {
                    let (link, end) = ((entry.token / 2) as usize, (entry.token % 2) as usize);
                    worked |= self.read(link, end, came_ns);
                }
            }
            worked |= self.deliver();
            unseen_ns = None;
            if worked && now.saturating_sub(last_ns) < 2 * NAP_NS {
                unseen_ns = Some(monotonic_ns());
                std::thread::sleep(Duration::from_nanos(NAP_NS));
            }
            last_ns = now;
        }
    }

    fn next_event_ns(&self) -> Option<u64> {
        let all = self.links.iter().flat_map(|link| &link.directions);
        all.filter_map(Direction::next_event_ns).min().map(|at| at.saturating_sub(EARLY_NS))
    }

    /// Carries out what the handle asks for; true when it is the end.
    fn obey(&mut self) -> bool {
        loop {
            match self.commands.try_recv() {
                Ok(Command::Change { link, way, mut change, done }) => {
                    for (number, direction) in self.links[link].directions.iter_mut().enumerate() {
                        if way.has(number) {
                            let mut shape = direction.shape().clone();
                            change(&mut shape);
                            direction.set_shape(monotonic_ns(), shape);
                        }
                    }
                    let _ = done.send(());
                }
                Ok(Command::Clear { link, done }) => {
                    self.links[link].directions.iter_mut().for_each(Direction::clear);
                    let _ = done.send(());
                }
                Ok(Command::Count { link, reply }) => {
                    let link = &self.links[link];
                    let [a_to_b, b_to_a] = [0, 1].map(|d: usize| link.directions[d].counters());
                    let _ = reply.send(LinkCounters { a_to_b, b_to_a, refused: link.refused });
                }
                Ok(Command::End) | Err(mpsc::TryRecvError::Disconnected) => return true,
                Err(mpsc::TryRecvError::Empty) => return false,
            }
        }
    }

    /// Takes what has come in on one interface; true if there was something.
    fn read(&mut self, link: usize, end: usize, came_ns: u64) -> bool {
        let mut any = false;
        for _ in 0..BATCHES_MAX {
            let mut lengths = [0; BATCH];
            let mut slices = self.buffers.each_mut().map(|buffer| IoSliceMut::new(buffer));
            let count = match self.links[link].ends[end].receive_many(&mut slices, &mut lengths) {
                Ok(count) => count,
                Err(error) => {
                    if !is_normal(&error) {
                        tracing::debug!(%error, link, end, "receive");
                    }
                    return any;
                }
            };
            for (number, bytes) in lengths.into_iter().enumerate().take(count) {
                any = true;
                let fresh = self.spare.pop().unwrap_or_else(|| vec![0; self.buffer_bytes]);
                let frame = Frame { buffer: std::mem::replace(&mut self.buffers[number], fresh), bytes };
                self.offer(link, end, came_ns, frame);
            }
            if count < BATCH {
                break;
            }
        }
        any
    }

    fn offer(&mut self, link: usize, end: usize, now_ns: u64, frame: Frame) {
        let ip_bytes = frame.bytes.saturating_sub(VNET_HEADER_BYTES + ETHERNET_BYTES);
        let ip_bytes = u32::try_from(ip_bytes).unwrap_or(u32::MAX);
        if let Err((frame, _)) = self.links[link].directions[end].offer(now_ns, ip_bytes, frame) {
            self.reuse(frame);
        }
    }

    fn reuse(&mut self, frame: Frame) {
        if self.spare.len() < SPARE_MAX {
            self.spare.push(frame.buffer);
        }
    }

    /// Gives out what has arrived; true if there was something.
    fn deliver(&mut self) -> bool {
        let mut any = false;
        for link in 0..self.links.len() {
            for way in 0..2 {
                loop {
                    let now = monotonic_ns();
                    let arrival = self.links[link].directions[way].pop_until(now, now + EARLY_NS);
                    let Some(arrival) = arrival else { break };
                    any = true;
                    let mut frame = arrival.packet;
                    if let Some(bit) = arrival.flip_bit {
                        flip(&mut frame, bit);
                    }
                    let to = &mut self.links[link];
                    for _ in 0..=u8::from(arrival.duplicate) {
                        to.refused += u64::from(to.ends[1 - way].send(&frame.buffer[..frame.bytes]).is_err());
                    }
                    self.reuse(frame);
                }
            }
        }
        any
    }
}

/// Flips one bit behind the Ethernet header.
fn flip(frame: &mut Frame, bit: u64) {
    let first = VNET_HEADER_BYTES + ETHERNET_BYTES;
    if let Some(part) = frame.buffer.get_mut(first..frame.bytes).filter(|part| !part.is_empty()) {
        let bit = bit % (part.len() as u64 * 8);
        part[(bit / 8) as usize] ^= 1 << (bit % 8);
    }
}

fn is_normal(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::NetworkDown | ErrorKind::Interrupted)
}
