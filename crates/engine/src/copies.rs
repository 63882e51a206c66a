//! Copies of flows for another machine: each worker writes what is new, a little at a time, while somebody takes it.
//!
//! [`crate::gateway::ClusterHandle::copy_flows`] begins it. Chunks wait in a channel of [`CHUNKS_WAITING`] places; a worker that finds it
//! full keeps its chunk and writes no more until that is gone, so that a slow taker costs no memory and no packet.

use std::sync::mpsc::{SyncSender, TrySendError};

use services::Services;

/// Chunks that wait between workers and whoever takes them.
pub const CHUNKS_WAITING: usize = 64;
/// A worker writes this often at most …
const STEP_NS: u64 = 5_000_000;
/// … and so many records at a time, or a few more: some 50,000 each second.
const STEP_RECORDS: usize = 256;

/// Records of one core.
#[derive(Debug)]
pub struct CopyChunk {
    /// The core.
    pub core: u8,
    /// Records, one behind the other ([`services::handover::wire::Change`]).
    pub records: Vec<u8>,
    /// How many.
    pub count: usize,
    /// All of the core's flows were looked at since the last chunk of which this was true.
    pub pass_ended: bool,
    /// Ends of flows were lost: copies have to be begun anew.
    pub lost: bool,
}

/// A worker's side.
pub(crate) struct Copier {
    to: SyncSender<CopyChunk>,
    held: Option<CopyChunk>,
    due_ns: u64,
}

impl Copier {
    /// Begins anew.
    pub fn new(services: &mut Services, to: SyncSender<CopyChunk>) -> Self {
        services.begin_copies(true);
        Self { to, held: None, due_ns: 0 }
    }

    /// Writes what is due. `false`: nobody takes it any more.
    pub fn step(&mut self, core: u8, services: &mut Services, now_ns: u64) -> bool {
        if now_ns < self.due_ns {
            return true;
        }
        self.due_ns = now_ns + STEP_NS;
        let chunk = match self.held.take() {
            Some(held) => held,
            None => {
                let mut records = Vec::new();
                let done = services.copies(now_ns, STEP_RECORDS, &mut records);
                if records.is_empty() && !done.pass_ended && !done.lost {
                    return true;
                }
                CopyChunk { core, records, count: done.records, pass_ended: done.pass_ended, lost: done.lost }
            }
        };
        match self.to.try_send(chunk) {
            Ok(()) => true,
            Err(TrySendError::Full(chunk)) => {
                self.held = Some(chunk);
                true
            }
            Err(TrySendError::Disconnected(_)) => {
                services.begin_copies(false);
                false
            }
        }
    }
}
