//! Copies of this machine's flows go to their backup.

use std::io::{self, Write};
use std::net::TcpStream;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use engine::copies::CopyChunk;
use engine::gateway::ClusterHandle;

use super::{Backup, MAGIC, NOBODY, Shared, copies_address};

/// Pause between two tries, and between two looks at who the backup is.
const PAUSE: Duration = Duration::from_millis(200);
const CONNECT_PATIENCE: Duration = Duration::from_secs(1);
/// A backup that takes nothing for so long is gone, or so slow that its copies are worth nothing.
const WRITE_PATIENCE: Duration = Duration::from_secs(2);

/// Sends until all ends.
pub(super) fn run(shared: &Shared, engine: &ClusterHandle) {
    let mut complained = false;
    while !shared.is_stopped() {
        if let Some(backup) = shared.backup() {
            let ended = stream(shared, engine, backup);
            if shared.copied_to.swap(NOBODY, Relaxed) != NOBODY {
                complained = false;
            }
            match ended {
                Err(error)
                    if shared.backup() == Some(backup) && !std::mem::replace(&mut complained, true) =>
                {
                    tracing::warn!(backup = backup.node, %error, "no copies of flows reach their backup");
                }
                _ => {}
            }
        }
        std::thread::sleep(PAUSE);
    }
}

/// One connection, until it ends or another backup is named.
fn stream(shared: &Shared, engine: &ClusterHandle, backup: Backup) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&copies_address(backup.address), CONNECT_PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(WRITE_PATIENCE))?;
    stream.write_all(&MAGIC)?;
    stream.write_all(&shared.own.to_be_bytes())?;
    let (chunks, cores) = engine.copy_flows();
    let mut passes = Passes::default();
    while !shared.is_stopped() && shared.backup() == Some(backup) {
        if engine.alive() != cores {
            // One that hung as this began writes none of its flows, and would be missing for good.
            return Err(io::Error::other("other cores work than did; all is copied again"));
        }
        match next(&chunks)? {
            Some(chunk) if chunk.lost => return Err(io::Error::other("too many flows ended at once")),
            Some(chunk) => {
                stream.write_all(&chunk.records)?;
                passes.note(&chunk);
                if passes.cores() >= cores.iter().count() && shared.copied_to.load(Relaxed) == NOBODY {
                    tracing::info!(backup = backup.node, "another machine has copies of all flows");
                    shared.copied_to.store(backup.node.into(), Relaxed);
                }
            }
            None => {}
        }
    }
    Ok(())
}

fn next(chunks: &Receiver<CopyChunk>) -> io::Result<Option<CopyChunk>> {
    match chunks.recv_timeout(PAUSE) {
        Ok(chunk) => Ok(Some(chunk)),
        Err(RecvTimeoutError::Timeout) => Ok(None),
        Err(RecvTimeoutError::Disconnected) => Err(io::Error::other("the workers have ended")),
    }
}

/// Cores whose flows have all been written.
#[derive(Default)]
struct Passes(u128);

impl Passes {
    fn note(&mut self, chunk: &CopyChunk) {
        if chunk.pass_ended {
            self.0 |= 1_u128.checked_shl(chunk.core.into()).unwrap_or(0);
        }
    }

    fn cores(&self) -> usize {
        self.0.count_ones() as usize
    }
}
