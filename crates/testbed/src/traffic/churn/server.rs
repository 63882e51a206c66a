//! The server side: answers what clients begin, and checks what they send.

use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use linux::clock::monotonic_ns;
use linux::event::{Interest, Ready};
use rustix::io::Errno;
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, sockopt};

use super::cause::{Cause, UdpCause};
use super::meter::Meter;
use super::slots::{OTHER, Slots};
use super::timers::{Queued, Timers};
use super::udp::{DATAGRAM_BYTES_MAX, Datagram};
use super::waiter::Waiter;
use super::wire::{CHUNK_HEAD_BYTES, Chunk, Ends, HELLO_BYTES, Hello, Kind, Piece, Way};
use super::{STALL_NS, Side};
use crate::stop::Stop;
use crate::topology::Node;

const LISTENER: u64 = OTHER;
const DATAGRAMS: u64 = OTHER | 1;
/// Connections that wait to be accepted; the kernel may cut it.
const BACKLOG: i32 = 4_096;
/// Connections accepted, or datagrams answered, before others get their turn.
const BATCH_MAX: usize = 64;
/// Nothing is accepted for so long when there are no descriptors, ns.
const AGAIN_NS: u64 = 50_000_000;
/// Time for what is open to come to its end when the server is told to end, ns. Whoever falls silent is broken before.
const DRAIN_NS_MAX: u64 = 4_000_000_000;
/// Room for datagrams that wait, bytes: a late server must not look like a lossy network.
const RECEIVE_BYTES: usize = 8 << 20;
/// Room for what one call reads.
const BUFFER_BYTES: usize = 128 * 1024;
/// Associations that are remembered; datagrams of more are not answered.
const ASSOCIATIONS_MAX: usize = 1_000_000;

/// Starts a server on this address, TCP and UDP, in `node` or in the namespace of the calling thread. UDP answers come from the
/// right address only if it is not that of all interfaces.
pub fn start(node: Option<&Node>, listen: SocketAddr) -> anyhow::Result<Side> {
    let sockets = match node {
        Some(node) => node.run(|| open(listen))?,
        None => open(listen),
    };
    let (listener, datagrams) = sockets.with_context(|| format!("cannot listen on {listen}"))?;
    let meter = Arc::new(Meter::default());
    let copy = Arc::clone(&meter);
    Side::start("churn-server", meter, move |end, stop| {
        let waiter = Waiter::new().context("wait for connections")?;
        waiter.epoll.add(&listener, LISTENER, Interest::Read).context("wait for connections")?;
        waiter.epoll.add(&datagrams, DATAGRAMS, Interest::Read).context("wait for datagrams")?;
        let run = Run {
            listener,
            meter: copy,
            waiter,
            timers: Timers::default(),
            connections: Slots::default(),
            echo: Echo::new(datagrams),
            buffer: vec![0; BUFFER_BYTES],
            accept_ns: None,
        };
        run.run(&end, &stop)
    })
}

fn open(listen: SocketAddr) -> std::io::Result<(TcpListener, UdpSocket)> {
    let family = if listen.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let fd = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_reuseaddr(&fd, true)?;
    // Linux gives it to every connection that is accepted.
    sockopt::set_tcp_nodelay(&fd, true)?;
    rustix::net::bind(&fd, &listen)?;
    rustix::net::listen(&fd, BACKLOG)?;
    let listener = TcpListener::from(fd);
    // Port 0 stands for any: the same for both.
    let datagrams = UdpSocket::bind(listener.local_addr()?)?;
    datagrams.set_nonblocking(true)?;
    let _ = sockopt::set_socket_recv_buffer_size_force(&datagrams, RECEIVE_BYTES)
        .or_else(|_| sockopt::set_socket_recv_buffer_size(&datagrams, RECEIVE_BYTES));
    Ok((listener, datagrams))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The first line is awaited.
    Line,
    /// The head of a chunk.
    Head,
    /// A request, or the data of a chunk.
    Body,
    /// The answer is being sent.
    Answering,
    /// Everything is answered; the client's FIN proves that it has got it.
    Ending,
}

#[derive(Debug)]
struct Connection {
    fd: OwnedFd,
    /// For messages: after a reset the kernel has forgotten it.
    source: Option<SocketAddr>,
    hello: Option<Hello>,
    state: State,
    begun_ns: u64,
    epoch: usize,
    /// The first line or the head of a chunk, as far as it has come.
    line: [u8; HELLO_BYTES],
    filled: usize,
    /// The chunk that is awaited, and its pause once it is known: none for the last, and for a request.
    chunk: u32,
    pause_ms: Option<u16>,
    expect: Piece,
    out: Piece,
    /// When something moved.
    moved_ns: u64,
    /// The client owes something from then on.
    owed_ns: u64,
    queued: Queued,
}

impl Connection {
    fn since_ns(&self) -> u64 {
        self.moved_ns.max(self.owed_ns)
    }

    fn deadline_ns(&self) -> u64 {
        self.since_ns() + STALL_NS
    }

    fn is_long(&self) -> bool {
        self.hello.is_some_and(|hello| hello.kind == Kind::Long)
    }

    fn describe(&self) -> String {
        let ms = monotonic_ns().saturating_sub(self.begun_ns) / 1_000_000;
        let from = self.source.map_or_else(|| "?".to_owned(), |source| source.to_string());
        let id = self.hello.map_or_else(|| "unknown".to_owned(), |hello| format!("{:016x}", hello.id));
        let kind = self.hello.map_or("a", |hello| hello.kind.name());
        format!("{kind} connection {id} from {from}, {ms} ms old, {:?}, chunk {}", self.state, self.chunk)
    }
}

/// Outcome of a step that was no fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    GoOn,
    Complete,
    /// It ended before its first byte.
    WithoutData,
}

struct Run {
    listener: TcpListener,
    meter: Arc<Meter>,
    waiter: Waiter,
    timers: Timers,
    connections: Slots<Connection>,
    echo: Echo,
    buffer: Vec<u8>,
    /// The listener is not looked at until then.
    accept_ns: Option<u64>,
}

impl Run {
    fn run(mut self, end: &Stop, stop: &Stop) -> anyhow::Result<()> {
        let mut ready = Vec::new();
        let mut drained_ns = None;
        while !stop.is_raised() {
            let next_ns = self.timers.next_ns().unwrap_or(u64::MAX);
            let complete =
                self.waiter.wait(&mut ready, next_ns, &self.meter).context("wait for connections")?;
            for event in &ready {
                match event.token {
                    LISTENER => self.accept(),
                    DATAGRAMS => self.echo.answer(&self.meter),
                    _ => self.ready(*event),
                }
            }
            let now = monotonic_ns();
            if !complete {
                continue;
            }
            self.expire(now);
            if self.accept_ns.is_some_and(|again| again <= now) {
                self.accept_ns = None;
                self.waiter.epoll.modify(&self.listener, LISTENER, Interest::Read)?;
            }
            if end.is_raised() {
                let drained_ns = *drained_ns.get_or_insert(now + DRAIN_NS_MAX);
                if self.connections.len() == 0 || now > drained_ns {
                    break;
                }
            }
        }
        for connection in self.connections.take_all() {
            self.meter.tcp.undecided.add(1);
            let _ = sockopt::set_socket_linger(&connection.fd, Some(Duration::ZERO));
            self.meter.closed(connection.is_long(), connection.epoch, false);
        }
        Ok(())
    }

    fn accept(&mut self) {
        for _ in 0..BATCH_MAX {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let (fd, source) = match rustix::net::acceptfrom_with(&self.listener, flags) {
                Ok(accepted) => accepted,
                Err(Errno::AGAIN) => return,
                // Gone before it was taken: its client counts it.
                Err(Errno::CONNABORTED | Errno::INTR | Errno::PROTO) => continue,
                Err(error) => {
                    self.accept_ns = Some(monotonic_ns() + AGAIN_NS);
                    let _ = self.waiter.epoll.modify(&self.listener, LISTENER, Interest::None);
                    return self.meter.local_error(|| format!("accept a connection: {error}"));
                }
            };
            let now = monotonic_ns();
            self.meter.tcp.begun.add(1);
            let mut connection = Connection {
                fd,
                source: source.and_then(|source| source.try_into().ok()),
                hello: None,
                state: State::Line,
                begun_ns: now,
                epoch: self.meter.opened(false),
                line: [0; HELLO_BYTES],
                filled: 0,
                chunk: 0,
                pause_ms: None,
                expect: Piece::default(),
                out: Piece::default(),
                moved_ns: now,
                owed_ns: now,
                queued: Queued::default(),
            };
            let token = self.connections.reserve();
            let step = match self.waiter.epoll.add(&connection.fd, token, Interest::Read) {
                // The first line is mostly there already.
                Ok(()) => self.read(&mut connection, token),
                Err(_) => Err(Cause::Other),
            };
            self.settle(token, connection, step);
        }
    }

    fn ready(&mut self, event: Ready) {
        let Some(mut connection) = self.connections.take(event.token) else { return };
        let step = self.advance(&mut connection, event);
        self.settle(event.token, connection, step);
    }

    fn advance(&mut self, connection: &mut Connection, event: Ready) -> Result<Step, Cause> {
        if connection.state == State::Answering && (event.writable || event.failed) {
            self.flush(connection, event.token, true)?;
        }
        if event.readable || event.failed {
            return self.read(connection, event.token);
        }
        Ok(Step::GoOn)
    }

    fn read(&mut self, connection: &mut Connection, token: u64) -> Result<Step, Cause> {
        let empty = connection.state == State::Line && connection.filled == 0;
        let bytes = match rustix::io::read(&connection.fd, &mut self.buffer[..]) {
            Ok(0) if connection.state == State::Ending => return Ok(Step::Complete),
            Ok(0) | Err(Errno::CONNRESET) if empty => return Ok(Step::WithoutData),
            Ok(0) => return Err(Cause::UnexpectedEnd),
            Ok(bytes) => bytes,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(Step::GoOn),
            Err(error) => return Err(Cause::of(error)),
        };
        let now = monotonic_ns();
        if connection.is_long() {
            self.meter.gap(now.saturating_sub(connection.since_ns()));
        }
        connection.moved_ns = now;
        let buffer = std::mem::take(&mut self.buffer);
        let taken = self.take(connection, token, buffer.get(..bytes).unwrap_or_default());
        self.buffer = buffer;
        taken?;
        self.meter.tcp.bytes.add(bytes as u64);
        Ok(Step::GoOn)
    }

    /// Compares what has arrived, and answers what is complete.
    fn take(&mut self, connection: &mut Connection, token: u64, mut bytes: &[u8]) -> Result<(), Cause> {
        while !bytes.is_empty() {
            match connection.state {
                State::Line => {
                    let Some(line) = fill(connection, HELLO_BYTES, &mut bytes) else { return Ok(()) };
                    let hello = Hello::decode(line).ok_or(Cause::WrongByte)?;
                    connection.hello = Some(hello);
                    connection.filled = 0;
                    if hello.kind == Kind::Short {
                        connection.expect = Piece::body(hello.request());
                        connection.state = State::Body;
                    } else {
                        self.meter.tcp.open_long.add(1);
                        connection.state = State::Head;
                    }
                }
                State::Head => {
                    let hello = connection.hello.ok_or(Cause::Other)?;
                    let number = connection.chunk;
                    let Some(line) = fill(connection, CHUNK_HEAD_BYTES, &mut bytes) else { return Ok(()) };
                    let mut head = [0; CHUNK_HEAD_BYTES];
                    head.copy_from_slice(&line[..CHUNK_HEAD_BYTES]);
                    let chunk = Chunk::with_head(hello.seed, number, Way::ToServer, head);
                    let chunk = chunk.ok_or(Cause::WrongByte)?;
                    connection.filled = 0;
                    connection.pause_ms = chunk.pause_ms;
                    connection.expect = Piece::body(chunk.body());
                    connection.state = State::Body;
                }
                State::Body => {
                    let taken = connection.expect.check(bytes).ok_or(Cause::WrongByte)?;
                    bytes = bytes.get(taken..).unwrap_or_default();
                    if connection.expect.is_done() {
                        self.answer(connection, token)?;
                    }
                }
                // Nobody sends before the answer has come, nor after the last.
                State::Answering | State::Ending => return Err(Cause::WrongByte),
            }
        }
        Ok(())
    }

    fn answer(&mut self, connection: &mut Connection, token: u64) -> Result<(), Cause> {
        let hello = connection.hello.ok_or(Cause::Other)?;
        connection.out = match hello.kind {
            // Every byte was compared: it is the request that the seed gives.
            Kind::Short => Piece::body(hello.answer(hello.request())),
            Kind::Long => {
                let is_last = connection.pause_ms.is_none();
                Piece::chunk(&Chunk::new(hello.seed, connection.chunk, Way::ToClient, is_last))
            }
        };
        connection.state = State::Answering;
        self.flush(connection, token, false)
    }

    /// Sends as much of the answer as there is room for. `writing`: epoll tells of room.
    fn flush(&mut self, connection: &mut Connection, token: u64, writing: bool) -> Result<(), Cause> {
        if connection.out.write_to(&connection.fd).map_err(Cause::of)? > 0 {
            connection.moved_ns = monotonic_ns();
        }
        let done = connection.out.is_done();
        if writing == done {
            let interest = if done { Interest::Read } else { Interest::Both };
            self.waiter.epoll.modify(&connection.fd, token, interest).map_err(|_| Cause::Other)?;
        }
        if !done {
            return Ok(());
        }
        connection.chunk += 1;
        if let (Some(pause_ms), Some(hello)) = (connection.pause_ms.take(), connection.hello) {
            connection.owed_ns = connection.moved_ns + hello.pause_ns(pause_ms);
            connection.state = State::Head;
            return Ok(());
        }
        connection.state = State::Ending;
        if connection.hello.is_some_and(|hello| hello.ends == Ends::ServerFirst) {
            rustix::net::shutdown(connection.fd.as_fd(), Shutdown::Write).map_err(Cause::of)?;
        }
        Ok(())
    }

    fn expire(&mut self, now: u64) {
        while let Some((at_ns, token)) = self.timers.pop(now) {
            let Some(mut connection) = self.connections.take(token) else { continue };
            let current = Timers::is_current(&mut connection.queued, at_ns);
            let late = current && connection.deadline_ns() <= now;
            if late && connection.is_long() {
                self.meter.gap(now - connection.since_ns());
            }
            self.settle(token, connection, if late { Err(Cause::Stall) } else { Ok(Step::GoOn) });
        }
    }

    /// Puts a connection back, or ends it.
    fn settle(&mut self, token: u64, mut connection: Connection, step: Result<Step, Cause>) {
        if step == Ok(Step::GoOn) {
            self.timers.arm(token, connection.deadline_ns(), &mut connection.queued);
            return self.connections.put(token, connection);
        }
        self.connections.free(token);
        self.meter.closed(connection.is_long(), connection.epoch, step.is_err());
        match step {
            Ok(Step::WithoutData) => self.meter.tcp.without_data.add(1),
            Ok(_) => self.meter.tcp.completed.add(1),
            Err(cause) => {
                let id = connection.hello.map(|hello| hello.id);
                self.meter.broke(cause, id, || connection.describe());
                let _ = sockopt::set_socket_linger(&connection.fd, Some(Duration::ZERO));
            }
        }
    }
}

/// Takes what is still missing of the line or head; all of it once it is complete.
fn fill<'a>(
    connection: &'a mut Connection,
    wanted: usize,
    bytes: &mut &[u8],
) -> Option<&'a [u8; HELLO_BYTES]> {
    let count = bytes.len().min(wanted - connection.filled);
    let (these, rest) = bytes.split_at(count);
    connection.line[connection.filled..connection.filled + count].copy_from_slice(these);
    connection.filled += count;
    *bytes = rest;
    (connection.filled == wanted).then_some(&connection.line)
}

/// An association as the server knows it.
#[derive(Debug)]
struct Association {
    source: SocketAddr,
    is_lost: bool,
}

/// Answers datagrams.
struct Echo {
    socket: UdpSocket,
    known: std::collections::HashMap<u64, Association>,
    buffer: Vec<u8>,
    room: Vec<u8>,
}

impl Echo {
    fn new(socket: UdpSocket) -> Echo {
        let room = Vec::with_capacity(DATAGRAM_BYTES_MAX);
        Echo {
            socket,
            known: std::collections::HashMap::new(),
            buffer: vec![0; DATAGRAM_BYTES_MAX + 1],
            room,
        }
    }

    fn answer(&mut self, meter: &Meter) {
        for _ in 0..BATCH_MAX {
            // An error is news of an answer that did not arrive: its client will miss it.
            let Ok((bytes, source)) = self.socket.recv_from(&mut self.buffer) else { return };
            let bytes = self.buffer.get(..bytes).unwrap_or_default();
            let Some(datagram) = Datagram::decode(bytes, Way::ToServer, &mut self.room) else {
                meter.udp.corrupt.add(1);
                continue;
            };
            meter.udp.answered.add(1);
            if !self.note(datagram.id, source, meter) {
                continue;
            }
            datagram.encode(Way::ToClient, &mut self.room);
            let _ = self.socket.send_to(&self.room, source);
            meter.udp.sent.add(1);
        }
    }

    /// Notes the source of an association; false if there are too many.
    fn note(&mut self, id: u64, source: SocketAddr, meter: &Meter) -> bool {
        let Some(association) = self.known.get_mut(&id) else {
            if self.known.len() >= ASSOCIATIONS_MAX {
                meter.local_error(|| format!("more than {ASSOCIATIONS_MAX} UDP associations"));
                return false;
            }
            meter.udp.associations.add(1);
            self.known.insert(id, Association { source, is_lost: false });
            return true;
        };
        if association.source != source && !association.is_lost {
            association.is_lost = true;
            let old = association.source;
            meter.lost(UdpCause::SourceChanged, id, || {
                format!("source_changed: association {id:016x} came from {old}, comes from {source}")
            });
        }
        true
    }
}
