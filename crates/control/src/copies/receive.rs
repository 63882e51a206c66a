//! Copies of other machines' flows come in.

use std::io::{self, ErrorKind, Read};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use services::handover::Entry;
use services::handover::wire::HEAD_BYTES;

use super::{MAGIC, Shared, copies_address};

/// Pause between two looks for a connection.
const PAUSE: Duration = Duration::from_millis(50);
/// Pause before the address is tried again: the TUN device may not have it yet.
const AGAIN: Duration = Duration::from_secs(1);
/// Connections at the same time; others are refused.
const STREAMS_MAX: usize = 64;
/// Waiting for bytes, in which time the assignment may have changed.
const READ_WAIT: Duration = Duration::from_millis(500);

/// Takes connections until all ends.
pub(super) fn run(shared: &Arc<Shared>) {
    let mut streams: Vec<JoinHandle<()>> = Vec::new();
    while !shared.is_stopped() {
        match TcpListener::bind(copies_address(shared.bus)) {
            Ok(listener) => {
                if let Err(error) = accept(shared, &listener, &mut streams) {
                    tracing::warn!(%error, "copies of flows cannot be taken");
                }
            }
            Err(error) => tracing::debug!(%error, "copies of flows cannot be taken yet"),
        }
        let mut waited = Duration::ZERO;
        while waited < AGAIN && !shared.is_stopped() {
            std::thread::sleep(PAUSE);
            waited += PAUSE;
        }
    }
    for stream in streams {
        let _ = stream.join();
    }
}

fn accept(shared: &Arc<Shared>, listener: &TcpListener, streams: &mut Vec<JoinHandle<()>>) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    while !shared.is_stopped() {
        match listener.accept() {
            Ok((stream, from)) => {
                streams.retain(|stream| !stream.is_finished());
                if shared.source(from.ip()).is_none() || streams.len() >= STREAMS_MAX {
                    continue;
                }
                let shared = Arc::clone(shared);
                let thread = std::thread::Builder::new().name("copies-of".to_owned());
                streams.push(thread.spawn(move || {
                    if let Err(error) = take(&shared, stream, from.ip()) {
                        tracing::debug!(%error, from = %from.ip(), "copies of flows end");
                    }
                })?);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(PAUSE),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// One connection, until it ends or its sender is not to send any more.
fn take(shared: &Shared, mut stream: TcpStream, from: IpAddr) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(READ_WAIT))?;
    let mut reader = Reader { shared, from, waiting: Vec::new() };
    let Some(head) = reader.bytes(&mut stream, MAGIC.len() + 2)? else { return Ok(()) };
    let (magic, node) = head.split_at_checked(MAGIC.len()).unwrap_or_default();
    let node = node.first_chunk().map(|node| u16::from_be_bytes(*node));
    let Some(unit) = node.filter(|node| magic == MAGIC && shared.source(from) == Some(*node)) else {
        return Err(ErrorKind::InvalidData.into());
    };
    let number = shared.begin(unit);
    loop {
        let Some(mut record) = reader.bytes(&mut stream, HEAD_BYTES)? else { return Ok(()) };
        let length = Entry::length(&record).map_err(io::Error::other)?;
        let Some(body) = reader.bytes(&mut stream, length - HEAD_BYTES)? else { return Ok(()) };
        record.extend(body);
        if !shared.keep(unit, number, &record).map_err(io::Error::other)? {
            return Ok(());
        }
    }
}

/// Bytes of one connection.
struct Reader<'a> {
    shared: &'a Shared,
    from: IpAddr,
    waiting: Vec<u8>,
}

impl Reader<'_> {
    /// The next `count` bytes; `None`: the sender is not to send any more.
    fn bytes(&mut self, stream: &mut TcpStream, count: usize) -> io::Result<Option<Vec<u8>>> {
        let mut buffer = [0; 16 << 10];
        while self.waiting.len() < count {
            match stream.read(&mut buffer) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(bytes) => self.waiting.extend_from_slice(buffer.get(..bytes).unwrap_or_default()),
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                    ) =>
                {
                    if self.shared.is_stopped() || self.shared.source(self.from).is_none() {
                        return Ok(None);
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Some(self.waiting.drain(..count).collect()))
    }
}
