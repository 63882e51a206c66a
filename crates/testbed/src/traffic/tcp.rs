//! TCP streams from one node to another; both ends hash what passes.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use linux::clock::monotonic_ns;

use super::gaps::Gaps;
use super::pattern::{Digest, Digester, Pattern};
use super::{Span, Tick, Window, watch};
use crate::stop::Stop;
use crate::topology::Node;

/// A blocked call looks at the stop flag this often.
const LOOK: Duration = Duration::from_millis(200);
/// How long a connection may take.
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// How long what was sent may take to arrive after the sender has stopped.
const DRAIN_MAX: Duration = Duration::from_secs(20);

/// Traffic to send.
#[derive(Clone, Debug)]
pub struct Options {
    /// Number of streams at the same time, 1–256.
    pub streams: usize,
    /// For how long.
    pub span: Span,
    /// Congestion control; the system's own if the kernel lacks it. `cubic` is what most machines use.
    pub congestion: &'static str,
    /// Seed of the data.
    pub seed: u64,
}

impl Options {
    /// `streams` streams with CUBIC.
    #[must_use]
    pub fn new(streams: usize, span: Span) -> Self {
        Self { streams, span, congestion: "cubic", seed: 1 }
    }
}

/// Result of a run.
#[derive(Clone, Debug)]
pub struct Report {
    /// Payload at the receivers after the warm-up, Mbit/s.
    pub goodput_mbps: f64,
    /// Bytes whose hash was equal at both ends.
    pub bytes_verified: u64,
    /// Every stream arrived complete with the same hash.
    pub intact: bool,
    /// Faults, one line a stream.
    pub faults: Vec<String>,
    /// Pauses at the receiver; of several streams, those of each.
    pub gaps: Gaps,
    /// When the senders began, ns of the monotonic clock.
    pub start_ns: u64,
    /// When the senders stopped, ns.
    pub end_ns: u64,
}

/// Streams on their way.
#[derive(Debug)]
pub struct Transfer {
    options: Options,
    start_ns: u64,
    bytes: Arc<AtomicU64>,
    stop: Stop,
    senders: Vec<JoinHandle<anyhow::Result<Digest>>>,
    receivers: Vec<JoinHandle<anyhow::Result<(Digest, Gaps)>>>,
}

/// Connects `client` to `to`, an address of `server`, and starts to send.
pub fn start(
    client: &Node,
    server: &Node,
    to: SocketAddr,
    options: Options,
    stop: &Stop,
) -> anyhow::Result<Transfer> {
    if !(1..=256).contains(&options.streams) {
        bail!("the number of TCP streams must be 1 to 256, not {}", options.streams);
    }
    let listener = server
        .run(|| TcpListener::bind(to))?
        .with_context(|| format!("cannot listen on {to} in {}", server.name()))?;
    listener.set_nonblocking(true)?;
    let pairs = connect_all(client, &listener, to, &options, stop)?;

    let bytes = Arc::new(AtomicU64::new(0));
    let start_ns = monotonic_ns();
    let deadline = Instant::now() + options.span.send;
    let (mut senders, mut receivers) = (Vec::new(), Vec::new());
    for (number, (near, far)) in pairs.into_iter().enumerate() {
        let (end, seed) = (stop.clone(), options.seed.wrapping_add(number as u64));
        senders.push(
            std::thread::Builder::new()
                .name(format!("tcp-send-{number}"))
                .spawn(move || send(&near, seed, deadline, &end))?,
        );
        let (end, bytes) = (stop.clone(), Arc::clone(&bytes));
        receivers.push(
            std::thread::Builder::new()
                .name(format!("tcp-receive-{number}"))
                .spawn(move || receive(&far, &bytes, deadline + DRAIN_MAX, &end))?,
        );
    }
    Ok(Transfer { options, start_ns, bytes, stop: stop.clone(), senders, receivers })
}

/// Connects one stream after the other, so that both ends of each are known.
fn connect_all(
    client: &Node,
    listener: &TcpListener,
    to: SocketAddr,
    options: &Options,
    stop: &Stop,
) -> anyhow::Result<Vec<(TcpStream, TcpStream)>> {
    let mut pairs = Vec::with_capacity(options.streams);
    for _ in 0..options.streams {
        let near = client.run(|| connect(to, options.congestion, stop))??;
        let far = accept(listener, near.local_addr()?, stop)?;
        for socket in [&near, &far] {
            socket.set_write_timeout(Some(LOOK))?;
            socket.set_read_timeout(Some(LOOK))?;
        }
        pairs.push((near, far));
    }
    Ok(pairs)
}

fn connect(to: SocketAddr, congestion: &str, stop: &Stop) -> anyhow::Result<TcpStream> {
    let domain = socket2::Domain::for_address(to);
    let socket = socket2::Socket::new(domain, socket2::Type::STREAM, Some(socket2::Protocol::TCP))?;
    // Without this congestion control in the kernel its default is as good.
    let _ = socket.set_tcp_congestion(congestion.as_bytes());
    if stop.is_raised() {
        bail!("stopped");
    }
    socket
        .connect_timeout(&to.into(), CONNECT_MAX)
        .with_context(|| format!("cannot connect to {to} through the tunnel within {CONNECT_MAX:?}"))?;
    Ok(socket.into())
}

fn accept(listener: &TcpListener, from: SocketAddr, stop: &Stop) -> anyhow::Result<TcpStream> {
    let end = Instant::now() + CONNECT_MAX;
    while Instant::now() < end && !stop.is_raised() {
        match listener.accept() {
            // A stranger's connection is not ours to measure.
            Ok((socket, peer)) if peer.port() == from.port() => {
                socket.set_nonblocking(false)?;
                return Ok(socket);
            }
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(error) => return Err(error).context("accept"),
        }
    }
    bail!("the connection from {from} did not arrive within {CONNECT_MAX:?}");
}

fn send(socket: &TcpStream, seed: u64, deadline: Instant, stop: &Stop) -> anyhow::Result<Digest> {
    let mut pattern = Pattern::new(seed);
    let mut digester = Digester::default();
    while Instant::now() < deadline && !stop.is_raised() {
        let mut rest = pattern.next_block();
        while !rest.is_empty() {
            match (&*socket).write(rest) {
                Ok(0) => bail!("the connection takes no more data"),
                Ok(written) => {
                    digester.update(&rest[..written]);
                    rest = &rest[written..];
                }
                Err(error) if is_timeout(&error) => {
                    // The rest of the block is left out when time is up: a stream may end anywhere.
                    if stop.is_raised() || Instant::now() >= deadline {
                        break;
                    }
                }
                Err(error) => return Err(error).context("send"),
            }
        }
    }
    socket.shutdown(Shutdown::Write).context("close the sending side")?;
    Ok(digester.finish())
}

fn receive(
    socket: &TcpStream,
    bytes: &AtomicU64,
    deadline: Instant,
    stop: &Stop,
) -> anyhow::Result<(Digest, Gaps)> {
    let mut digester = Digester::default();
    let mut gaps = Gaps::default();
    let mut buffer = vec![0; 256 * 1024];
    gaps.arrived(monotonic_ns());
    loop {
        match (&*socket).read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => {
                gaps.arrived(monotonic_ns());
                bytes.fetch_add(read as u64, Ordering::Relaxed);
                digester.update(&buffer[..read]);
            }
            Err(error) if is_timeout(&error) => {
                if stop.is_raised() {
                    break;
                }
                if Instant::now() >= deadline {
                    bail!("the stream did not end: {} bytes arrived", digester.finish().bytes);
                }
            }
            Err(error) => return Err(error).context("receive"),
        }
    }
    Ok((digester.finish(), gaps))
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

impl Transfer {
    /// When the senders began, ns of the monotonic clock.
    #[must_use]
    pub fn start_ns(&self) -> u64 {
        self.start_ns
    }

    /// Waits until everything has arrived. `observe` is called some ten times a second while data is sent.
    pub fn finish(self, mut observe: impl FnMut(Tick)) -> anyhow::Result<Report> {
        let window: Window = watch(self.options.span, self.start_ns, &self.bytes, &self.stop, &mut observe);
        let sent: Vec<_> = self.senders.into_iter().map(join).collect();
        let received: Vec<_> = self.receivers.into_iter().map(join).collect();
        let mut report = Report {
            goodput_mbps: window.mbps(),
            bytes_verified: 0,
            intact: true,
            faults: Vec::new(),
            gaps: Gaps::default(),
            start_ns: window.start_ns,
            end_ns: window.end.0,
        };
        for (number, (sent, received)) in sent.into_iter().zip(received).enumerate() {
            match compare(sent, received, &mut report.gaps) {
                Ok(bytes) => report.bytes_verified += bytes,
                Err(error) => {
                    report.intact = false;
                    report.faults.push(format!("TCP stream {number}: {error:#}"));
                }
            }
        }
        Ok(report)
    }
}

fn compare(
    sent: anyhow::Result<Digest>,
    received: anyhow::Result<(Digest, Gaps)>,
    gaps: &mut Gaps,
) -> anyhow::Result<u64> {
    let (received, own) = received?;
    gaps.merge(&own);
    let sent = sent?;
    if sent.bytes != received.bytes {
        bail!("{} bytes were sent, {} arrived", sent.bytes, received.bytes);
    }
    if sent.sha256 != received.sha256 {
        bail!("the {} bytes that arrived have another hash than those sent", sent.bytes);
    }
    if sent.bytes == 0 {
        bail!("nothing was sent");
    }
    Ok(sent.bytes)
}

fn join<T>(handle: JoinHandle<anyhow::Result<T>>) -> anyhow::Result<T> {
    handle.join().unwrap_or_else(|_| bail!("the thread failed"))
}
