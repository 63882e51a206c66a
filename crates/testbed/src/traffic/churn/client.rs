//! The client side: begins connections and associations, and checks what comes back.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use fastrand::Rng;
use linux::clock::monotonic_ns;
use linux::event::{Interest, Ready};
use rustix::io::Errno;
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, sockopt};

use super::associations::Associations;
use super::cause::Cause;
use super::meter::Meter;
use super::slots::{OTHER, Slots};
use super::timers::{Queued, TICK_NS, Timers};
use super::waiter::Waiter;
use super::wire::{Chunk, Ends, Hello, Kind, Piece, Way, mix, request_bytes};
use super::{OPEN_NS_MAX, STALL_NS, Side};
use crate::stop::Stop;
use crate::topology::Node;

/// Time for what is open to come to its end, ns. Everything is decided by itself before: by an answer, by 3 s without one.
const DRAIN_NS_MAX: u64 = 15_000_000_000;
/// Long connections and associations that are begun at a time.
const BATCH_MAX: usize = 16;
/// Pause before those that broke are replaced, ns.
const AGAIN_NS: u64 = 50_000_000;
/// A client that was held up makes up for this much of its rate, ns.
const MAKE_UP_NS: u64 = 50_000_000;
/// First port of a client; each connection takes the next one, so that a port is used again as late as possible.
const PORT_MIN: u16 = 10_000;
/// Ports that are tried for one connection.
const PORT_TRIES: usize = 4_096;
/// Most times that pauses can be as long.
const PAUSES_MAX: u32 = 20;
/// Room for what one call reads.
const BUFFER_BYTES: usize = 128 * 1024;

/// Traffic to begin.
#[derive(Clone, Debug)]
pub struct Options {
    /// The server, or the virtual server.
    pub to: SocketAddr,
    /// Own addresses, used in turn; the system's choice if there is none. Each has 55,000 ports: short connections that the
    /// client closes, and the server's memory of those it closed, keep one for a minute.
    pub sources: Vec<IpAddr>,
    /// Short connections begun each second, 0–100,000.
    pub short_per_second: u32,
    /// Short connections that may be open at the same time; others are not begun and counted as skipped.
    pub short_open_max: usize,
    /// Long connections that are open at all times, 0–100,000.
    pub long: usize,
    /// Mean of their exponential life times; they stay for the whole run without one.
    pub long_life: Option<Duration>,
    /// Their pauses are so many times as long as 100 to 500 ms, 1–20.
    pub pauses: u32,
    /// UDP associations at all times, 0–100,000.
    pub udp: usize,
    /// Pause between two datagrams of an association, 1 ms–1 s.
    pub udp_interval: Duration,
    /// Mean of their life times, likewise.
    pub udp_life: Option<Duration>,
    /// Seed of sizes, pauses, life times and data.
    pub seed: u64,
}

impl Options {
    /// Nothing yet, to this server: set what shall be sent.
    #[must_use]
    pub fn new(to: SocketAddr, seed: u64) -> Self {
        Self {
            to,
            sources: Vec::new(),
            short_per_second: 0,
            short_open_max: 5_000,
            long: 0,
            long_life: None,
            pauses: 1,
            udp: 0,
            udp_interval: Duration::from_millis(200),
            udp_life: None,
            seed,
        }
    }

    fn check(&self) -> anyhow::Result<()> {
        const MANY: usize = 100_000;
        if self.short_per_second as usize > MANY || self.long > MANY || self.udp > MANY {
            bail!("at most {MANY} short connections a second, long connections and associations");
        }
        if !(1..=PAUSES_MAX).contains(&self.pauses) {
            bail!("pauses must be 1 to {PAUSES_MAX} times as long, not {}", self.pauses);
        }
        if !(Duration::from_millis(1)..=Duration::from_secs(1)).contains(&self.udp_interval) {
            bail!("the pause between datagrams must be 1 ms to 1 s, not {:?}", self.udp_interval);
        }
        if let Some(source) = self.sources.iter().find(|source| source.is_ipv4() != self.to.is_ipv4()) {
            bail!("{source} and {} are of different families", self.to);
        }
        Ok(())
    }
}

/// Starts the client, in `node` or in the namespace of the calling thread.
pub fn start(node: Option<&Node>, options: Options) -> anyhow::Result<Side> {
    options.check()?;
    let meter = Arc::new(Meter::default());
    let (node, copy) = (node.cloned(), Arc::clone(&meter));
    Side::start("churn-client", meter, move |end, stop| {
        if let Some(node) = node {
            node.namespace().enter().with_context(|| format!("in {}", node.name()))?;
        }
        Run::new(options, copy)?.run(&end, &stop)
    })
}

/// A moment of a random life time's end.
pub(super) fn life_end_ns(now_ns: u64, mean: Option<Duration>, random: &mut Rng) -> u64 {
    let Some(mean) = mean else { return u64::MAX };
    let life = -(1.0 - random.f64()).ln() * mean.as_secs_f64();
    now_ns.saturating_add((life * 1e9) as u64)
}

/// Own addresses and their next ports.
#[derive(Debug)]
struct Ports {
    sources: VecDeque<(IpAddr, u16)>,
}

impl Ports {
    fn new(options: &Options, random: &mut Rng) -> Ports {
        let any = match options.to {
            SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        let sources = if options.sources.is_empty() { &[any][..] } else { &options.sources };
        Ports { sources: sources.iter().map(|&source| (source, random.u16(PORT_MIN..))).collect() }
    }

    fn bind(&mut self, fd: &OwnedFd) -> Result<(), Errno> {
        self.sources.rotate_left(1);
        let Some((source, port)) = self.sources.front_mut() else { return Err(Errno::ADDRNOTAVAIL) };
        for _ in 0..PORT_TRIES {
            *port = port.checked_add(1).unwrap_or(PORT_MIN);
            match rustix::net::bind(fd, &SocketAddr::new(*source, *port)) {
                // Taken: by a long connection, or by one that the client closed less than a minute ago.
                Err(Errno::ADDRINUSE) => {}
                result => return result,
            }
        }
        Err(Errno::ADDRINUSE)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The SYN is on its way.
    Opening,
    /// A request or chunk is being sent, or its answer awaited.
    Exchanging,
    /// A long connection waits for the moment of its next chunk.
    Resting,
    /// The last answer is there; the server's FIN is awaited.
    Ending,
}

#[derive(Debug)]
struct Connection {
    fd: OwnedFd,
    hello: Hello,
    state: State,
    begun_ns: u64,
    /// Number of marks before it opened; unset while it opens.
    epoch: usize,
    /// Chunks that were begun, and whether the last of them is the last of all.
    chunks: u32,
    is_last: bool,
    /// The next chunk is sent then.
    due_ns: u64,
    life_end_ns: u64,
    out: Piece,
    expect: Piece,
    /// When something moved, or began to be owed.
    moved_ns: u64,
    queued: Queued,
    /// Epoll tells of room to write as well.
    writing: bool,
}

impl Connection {
    fn deadline_ns(&self) -> u64 {
        match self.state {
            State::Opening => self.begun_ns + OPEN_NS_MAX,
            State::Resting => self.due_ns,
            State::Exchanging | State::Ending => self.moved_ns + STALL_NS,
        }
    }

    fn is_long(&self) -> bool {
        self.hello.kind == Kind::Long
    }

    /// Prepares the next chunk, and its answer.
    fn next_chunk(&mut self, now_ns: u64, is_last: bool) -> (Chunk, Chunk) {
        let chunk = |way| Chunk::new(self.hello.seed, self.chunks, way, is_last);
        let (there, back) = (chunk(Way::ToServer), chunk(Way::ToClient));
        self.chunks += 1;
        self.is_last = is_last;
        self.due_ns = now_ns + self.hello.pause_ns(there.pause_ms.unwrap_or(0));
        (there, back)
    }

    fn describe(&self) -> String {
        let ms = monotonic_ns().saturating_sub(self.begun_ns) / 1_000_000;
        let from = rustix::net::getsockname(&self.fd).ok().and_then(|a| SocketAddr::try_from(a).ok());
        let from = from.map_or_else(|| "?".to_owned(), |from| from.to_string());
        let (kind, state) = (self.hello.kind.name(), self.state);
        format!(
            "{kind} connection {:016x} from {from}, {ms} ms old, {state:?}, chunk {}",
            self.hello.id, self.chunks
        )
    }
}

struct Run {
    options: Options,
    meter: Arc<Meter>,
    waiter: Waiter,
    timers: Timers,
    connections: Slots<Connection>,
    associations: Associations,
    ports: Ports,
    random: Rng,
    /// Upper half of all identities, and the next lower half.
    ids: (u64, u32),
    buffer: Vec<u8>,
    pace: Pace,
    ending: bool,
}

/// How much of what was begun.
struct Pace {
    start_ns: u64,
    short_begun: u64,
    short_open: usize,
    long_open: usize,
    /// Long connections are not replaced before.
    again_ns: u64,
}

impl Run {
    fn new(options: Options, meter: Arc<Meter>) -> anyhow::Result<Run> {
        let mut random = Rng::with_seed(options.seed);
        let now = monotonic_ns();
        // A server that runs on must not take a later client with the same seed for this one.
        let ids = (mix(options.seed, now) << 32, 0);
        Ok(Run {
            ports: Ports::new(&options, &mut random),
            associations: Associations::new(&options),
            meter,
            waiter: Waiter::new().context("wait for connections")?,
            timers: Timers::default(),
            connections: Slots::default(),
            random,
            ids,
            buffer: vec![0; BUFFER_BYTES],
            pace: Pace { start_ns: now, short_begun: 0, short_open: 0, long_open: 0, again_ns: 0 },
            ending: false,
            options,
        })
    }

    fn run(mut self, end: &Stop, stop: &Stop) -> anyhow::Result<()> {
        let mut ready = Vec::new();
        let mut drained_ns = u64::MAX;
        while !stop.is_raised() {
            let complete =
                self.waiter.wait(&mut ready, self.next_ns(), &self.meter).context("wait for connections")?;
            for event in &ready {
                self.ready(*event);
            }
            let now = monotonic_ns();
            if !complete {
                continue;
            }
            self.expire(now);
            if end.is_raised() && !self.ending {
                self.ending = true;
                drained_ns = now + DRAIN_NS_MAX;
            }
            if !self.ending {
                self.begin(now);
            } else if (self.connections.len() == 0 && self.associations.is_empty()) || now > drained_ns {
                break;
            }
        }
        for connection in self.connections.take_all() {
            self.meter.tcp.undecided.add(1);
            let _ = sockopt::set_socket_linger(&connection.fd, Some(Duration::ZERO));
            if connection.state != State::Opening {
                self.meter.closed(connection.is_long(), connection.epoch, false);
            }
        }
        self.meter.tcp.undecided.add(self.associations.len() as u64);
        Ok(())
    }

    fn next_ns(&self) -> u64 {
        let busy = self.options.short_per_second > 0
            || self.pace.long_open < self.options.long
            || self.associations.len() < self.options.udp;
        let begin = if busy && !self.ending { monotonic_ns() + TICK_NS } else { u64::MAX };
        self.timers.next_ns().unwrap_or(u64::MAX).min(begin)
    }

    /// Begins what is due.
    fn begin(&mut self, now: u64) {
        let rate = u64::from(self.options.short_per_second);
        let due = (u128::from(now - self.pace.start_ns) * u128::from(rate) / 1_000_000_000) as u64;
        let make_up = (rate * MAKE_UP_NS / 1_000_000_000).max(1);
        self.pace.short_begun = self.pace.short_begun.max(due.saturating_sub(make_up));
        while self.pace.short_begun < due {
            self.pace.short_begun += 1;
            if self.pace.short_open >= self.options.short_open_max {
                self.meter.tcp.skipped.add(1);
            } else {
                self.open(Kind::Short, now);
            }
        }
        for _ in 0..BATCH_MAX {
            if self.pace.long_open < self.options.long && now >= self.pace.again_ns {
                self.open(Kind::Long, now);
            }
            if self.associations.wants_more(now) {
                let id = self.next_id();
                let epoll = &self.waiter.epoll;
                self.associations.open(id, now, &mut self.random, &self.meter, (epoll, &mut self.timers));
            }
        }
    }

    fn next_id(&mut self) -> u64 {
        self.ids.1 = self.ids.1.wrapping_add(1);
        self.ids.0 | u64::from(self.ids.1)
    }

    fn open(&mut self, kind: Kind, now: u64) {
        let ends = if self.random.u8(..4) == 0 { Ends::ClientFirst } else { Ends::ServerFirst };
        let seed = self.random.u64(..);
        let bytes = if kind == Kind::Short { request_bytes(&mut self.random) } else { self.options.pauses };
        let hello = Hello { kind, ends, id: self.next_id(), seed, bytes };
        let life_end_ns = life_end_ns(now, self.options.long_life, &mut self.random);
        let fd = match self.socket() {
            Ok(fd) => fd,
            Err(error) => {
                self.pause(kind, now);
                return self.meter.local_error(|| format!("a socket to {}: {error}", self.options.to));
            }
        };
        let mut connection = Connection {
            fd,
            hello,
            state: State::Opening,
            begun_ns: now,
            epoch: 0,
            chunks: 0,
            is_last: false,
            due_ns: 0,
            life_end_ns,
            out: Piece::default(),
            expect: Piece::default(),
            moved_ns: now,
            queued: Queued::default(),
            writing: true,
        };
        if kind == Kind::Short {
            let request = hello.request();
            connection.out = Piece::new(Some(&hello), None, request);
            connection.expect = Piece::body(hello.answer(request));
        } else {
            let (there, back) = connection.next_chunk(now, false);
            connection.out = Piece::new(Some(&hello), Some(&there), there.body());
            connection.expect = Piece::chunk(&back);
        }
        self.connect(connection);
    }

    /// One has failed: others of its kind follow later, unless they have a rate.
    fn pause(&mut self, kind: Kind, now: u64) {
        if kind == Kind::Long {
            self.pace.again_ns = now + AGAIN_NS;
        }
    }

    fn socket(&mut self) -> Result<OwnedFd, Errno> {
        let family = if self.options.to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let fd = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
        sockopt::set_tcp_nodelay(&fd, true)?;
        self.ports.bind(&fd)?;
        Ok(fd)
    }

    fn connect(&mut self, connection: Connection) {
        match connection.hello.kind {
            Kind::Short => self.pace.short_open += 1,
            Kind::Long => self.pace.long_open += 1,
        }
        self.meter.tcp.begun.add(1);
        let token = self.connections.reserve();
        let step = match rustix::net::connect(&connection.fd, &self.options.to) {
            Ok(()) | Err(Errno::INPROGRESS) => Ok(false),
            Err(error) => Err(Cause::of(error)),
        };
        let added = self.waiter.epoll.add(&connection.fd, token, Interest::Write);
        self.settle(token, connection, step.and_then(|step| added.map_or(Err(Cause::Other), |()| Ok(step))));
    }

    fn ready(&mut self, event: Ready) {
        if event.token & OTHER != 0 {
            return self.associations.ready(event.token, &self.meter, &mut self.timers, self.ending);
        }
        let Some(mut connection) = self.connections.take(event.token) else { return };
        let step = self.advance(&mut connection, event);
        self.settle(event.token, connection, step);
    }

    /// Goes on with a connection; true if it is complete.
    fn advance(&mut self, connection: &mut Connection, event: Ready) -> Result<bool, Cause> {
        let now = monotonic_ns();
        if connection.writing && (event.writable || event.failed) {
            let written = connection.out.write_to(&connection.fd).map_err(Cause::of)?;
            if written > 0 {
                connection.moved_ns = now;
            }
            if connection.state == State::Opening && written > 0 {
                connection.epoch = self.meter.opened(connection.is_long());
                connection.state = State::Exchanging;
            }
            self.want_room(connection, event.token)?;
        }
        if connection.state != State::Opening && (event.readable || event.failed) {
            return self.read(connection, now);
        }
        Ok(false)
    }

    /// Asks epoll for what the connection waits for now.
    fn want_room(&self, connection: &mut Connection, token: u64) -> Result<(), Cause> {
        let writing = !connection.out.is_done();
        if writing == connection.writing && connection.state != State::Exchanging {
            return Ok(());
        }
        let interest = if writing { Interest::Both } else { Interest::Read };
        connection.writing = writing;
        self.waiter.epoll.modify(&connection.fd, token, interest).map_err(|_| Cause::Other)
    }

    fn read(&mut self, connection: &mut Connection, now: u64) -> Result<bool, Cause> {
        loop {
            match rustix::io::read(&connection.fd, &mut self.buffer[..]) {
                Ok(0) if connection.state == State::Ending => return Ok(true),
                Ok(0) => return Err(Cause::UnexpectedEnd),
                Ok(bytes) => {
                    take(connection, self.buffer.get(..bytes).unwrap_or_default(), now, &self.meter)?;
                    // The server's FIN may be there already; anything else will be told.
                    if bytes < BUFFER_BYTES && connection.state != State::Ending {
                        return Ok(false);
                    }
                }
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(error) => return Err(Cause::of(error)),
            }
        }
    }

    /// Looks at what is due.
    fn expire(&mut self, now: u64) {
        while let Some((at_ns, token)) = self.timers.pop(now) {
            if token & OTHER != 0 {
                self.associations.due(token, (at_ns, now), &self.meter, &mut self.timers, self.ending);
                continue;
            }
            let Some(mut connection) = self.connections.take(token) else { continue };
            if !Timers::is_current(&mut connection.queued, at_ns) {
                self.connections.put(token, connection);
                continue;
            }
            let step = match connection.state {
                _ if connection.deadline_ns() > now => Ok(false),
                State::Opening => Err(Cause::NotOpened),
                State::Exchanging | State::Ending => {
                    if connection.is_long() {
                        self.meter.gap(now - connection.moved_ns);
                    }
                    Err(Cause::Stall)
                }
                State::Resting => self.send_chunk(&mut connection, token, now),
            };
            self.settle(token, connection, step);
        }
    }

    fn send_chunk(&mut self, connection: &mut Connection, token: u64, now: u64) -> Result<bool, Cause> {
        let is_last = self.ending || now >= connection.life_end_ns;
        let (there, back) = connection.next_chunk(now, is_last);
        connection.out = Piece::chunk(&there);
        connection.expect = Piece::chunk(&back);
        connection.state = State::Exchanging;
        connection.moved_ns = now;
        connection.out.write_to(&connection.fd).map_err(Cause::of)?;
        if !connection.out.is_done() {
            self.want_room(connection, token)?;
        }
        Ok(false)
    }

    /// Puts a connection back, or ends it.
    fn settle(&mut self, token: u64, mut connection: Connection, step: Result<bool, Cause>) {
        if step == Ok(false) {
            self.timers.arm(token, connection.deadline_ns(), &mut connection.queued);
            return self.connections.put(token, connection);
        }
        self.connections.free(token);
        match connection.hello.kind {
            Kind::Short => self.pace.short_open -= 1,
            Kind::Long => self.pace.long_open -= 1,
        }
        if connection.state != State::Opening {
            self.meter.closed(connection.is_long(), connection.epoch, step.is_err());
        }
        match step {
            Ok(_) => self.meter.tcp.completed.add(1),
            Err(cause) => {
                self.meter.broke(cause, Some(connection.hello.id), || connection.describe());
                self.pause(connection.hello.kind, monotonic_ns());
                // A RST tells the server as well, if it can still be reached.
                let _ = sockopt::set_socket_linger(&connection.fd, Some(Duration::ZERO));
            }
        }
    }
}

/// Compares what has arrived.
fn take(connection: &mut Connection, bytes: &[u8], now: u64, meter: &Meter) -> Result<(), Cause> {
    if connection.state != State::Exchanging {
        return Err(Cause::WrongByte);
    }
    if connection.is_long() {
        meter.gap(now.saturating_sub(connection.moved_ns));
    }
    connection.moved_ns = now;
    if connection.expect.check(bytes) != Some(bytes.len()) {
        return Err(Cause::WrongByte);
    }
    meter.tcp.bytes.add(bytes.len() as u64);
    if connection.expect.is_done() {
        if connection.is_long() && !connection.is_last {
            connection.state = State::Resting;
            return Ok(());
        }
        connection.state = State::Ending;
        if connection.hello.ends == Ends::ClientFirst {
            rustix::net::shutdown(connection.fd.as_fd(), Shutdown::Write).map_err(Cause::of)?;
        }
    }
    Ok(())
}
