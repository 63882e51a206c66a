//! Common parts of all clients: how they connect, how long they wait, and how they are ended.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::tally::{Meter, SharedWitness, Tally};
use crate::stop::Stop;
use crate::topology::Node;

/// A blocked call looks at the stop flag this often.
const LOOK: Duration = Duration::from_millis(200);
/// A connection is made within this time, or not.
const CONNECT_MAX: Duration = Duration::from_secs(4);
/// Nothing came or went for so long: the connection is broken.
const SILENCE_MAX: Duration = Duration::from_secs(6);
/// A request is tried again for so long.
pub(super) const RETRY_MAX: Duration = Duration::from_secs(6);

/// Who sends where.
#[derive(Clone)]
pub struct Plan {
    /// Where the client is.
    pub node: Node,
    /// Its address, or any.
    pub from: Option<IpAddr>,
    /// The server.
    pub to: SocketAddr,
    /// Seed of sizes, names and pauses.
    pub seed: u64,
    /// Longest pause between two requests; the mean is half of it.
    pub think: Duration,
    /// Ends the client; what is under way is brought to its end first.
    pub end: Stop,
    /// Ends it at once.
    pub stop: Stop,
    /// Counts for whoever watches.
    pub meter: Arc<Meter>,
    /// Knows which servers died.
    pub witness: SharedWitness,
}

impl Plan {
    /// Runs `work` on a thread in the node.
    pub(super) fn spawn(
        self,
        name: &str,
        work: impl FnOnce(&Plan, &mut Tally) + Send + 'static,
    ) -> anyhow::Result<JoinHandle<Tally>> {
        let run = move || {
            let mut tally = Tally::default();
            match self.node.namespace().enter() {
                Ok(()) => work(&self, &mut tally),
                Err(error) => tally.fault(|| format!("a client in {}: {error}", self.node.name())),
            }
            tally
        };
        Ok(std::thread::Builder::new().name(name.to_owned()).spawn(run)?)
    }

    /// Connects; with the time it may take.
    pub(super) fn connect(&self) -> io::Result<Connection> {
        let domain = socket2::Domain::for_address(self.to);
        let socket = socket2::Socket::new(domain, socket2::Type::STREAM, Some(socket2::Protocol::TCP))?;
        if let Some(from) = self.from {
            socket.bind(&SocketAddr::new(from, 0).into())?;
        }
        socket.set_tcp_nodelay(true)?;
        socket.set_nonblocking(true)?;
        match socket.connect(&self.to.into()) {
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::INPROGRESS.raw_os_error()) => {
                self.wait_until_connected(&socket)?;
            }
            result => result?,
        }
        socket.set_nonblocking(false)?;
        socket.set_read_timeout(Some(LOOK))?;
        socket.set_write_timeout(Some(LOOK))?;
        Ok(Connection { stream: socket.into(), stop: self.stop.clone() })
    }

    fn wait_until_connected(&self, socket: &socket2::Socket) -> io::Result<()> {
        let end = Instant::now() + CONNECT_MAX;
        loop {
            let mut wait = [rustix::event::PollFd::new(socket, rustix::event::PollFlags::OUT)];
            let look = rustix::event::Timespec { tv_sec: 0, tv_nsec: LOOK.subsec_nanos().into() };
            if rustix::event::poll(&mut wait, Some(&look))? > 0 {
                return socket.take_error()?.map_or(Ok(()), Err);
            }
            if self.stop.is_raised() {
                return Err(io::Error::new(ErrorKind::Interrupted, "stopped"));
            }
            if Instant::now() >= end {
                let text = format!("no answer within {} s", CONNECT_MAX.as_secs());
                return Err(io::Error::new(ErrorKind::TimedOut, text));
            }
        }
    }

    /// Whether no further request is to be begun.
    pub(super) fn is_over(&self) -> bool {
        self.end.is_raised() || self.stop.is_raised()
    }

    /// A try failed at the connection to this server, if it is known, that was begun then. Writes down whose fault it
    /// was; false if it was nobody's that may fail.
    pub(super) fn judge(
        &self,
        tally: &mut Tally,
        connected: bool,
        server: Option<u32>,
        begun_ns: u64,
        error: &io::Error,
    ) -> bool {
        let excused = match server {
            Some(server) => self.witness.has_died(server),
            None => self.witness.may_fail(begun_ns),
        };
        match (excused, connected) {
            (true, true) => tally.ended_connections += 1,
            (true, false) => tally.excused_refusals += 1,
            (false, true) => tally.broken_connections += 1,
            (false, false) => {}
        }
        if !excused {
            let what = if connected { "a connection broke" } else { "no connection" };
            let server = server.map_or_else(String::new, |server| format!(", server {server}"));
            tally.fault(|| format!("{what}: {} to {}{server}: {error}", self.node.name(), self.to));
        }
        excused
    }
}

/// A connection whose calls wait, but not longer than they should.
#[derive(Debug)]
pub(super) struct Connection {
    stream: TcpStream,
    stop: Stop,
}

impl Connection {
    /// Reads at least one byte; 0 is the end.
    pub(super) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.patiently(|| (&self.stream).read(buffer))
    }

    /// Reads so many bytes as there is room for.
    pub(super) fn read_exact(&self, buffer: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        while filled < buffer.len() {
            let read = self.read(buffer.get_mut(filled..).unwrap_or_default())?;
            if read == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            filled += read;
        }
        Ok(())
    }

    /// Writes all of it.
    pub(super) fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = self.patiently(|| (&self.stream).write(bytes))?;
            bytes = bytes.get(written..).unwrap_or_default();
        }
        Ok(())
    }

    /// Says that nothing more will be sent.
    pub(super) fn finish(&self) -> io::Result<()> {
        self.stream.shutdown(std::net::Shutdown::Write)
    }

    fn patiently<T>(&self, mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        let end = Instant::now() + SILENCE_MAX;
        loop {
            match call() {
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                    ) =>
                {
                    if self.stop.is_raised() {
                        return Err(io::Error::new(ErrorKind::Interrupted, "stopped"));
                    }
                    if Instant::now() >= end {
                        let text = format!("nothing moved for {} s", SILENCE_MAX.as_secs());
                        return Err(io::Error::new(ErrorKind::TimedOut, text));
                    }
                }
                result => return result,
            }
        }
    }
}
