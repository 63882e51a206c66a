//! Memory of packets held for order, within what their peer may use.

use crate::memory::Share;

/// Memory of a held packet besides its bytes.
const HELD_BYTES: usize = 128;
/// Buffers of held packets kept for the next ones, and the largest that is.
const POOL_MAX: usize = 256;
const POOL_BYTES_MAX: usize = 2_048;

/// Memory of the packets that wait for their turn.
pub(super) struct HeldMemory {
    share: Share,
    /// Buffers for the next ones.
    pool: Vec<Vec<u8>>,
}

impl HeldMemory {
    /// None is held.
    pub const fn new(share: Share) -> Self {
        Self { share, pool: Vec::new() }
    }

    /// None is held any more.
    pub fn clear(&mut self) {
        self.share.clear();
    }

    /// A copy of a packet, if there is memory for it.
    pub fn keep(&mut self, packet: &[u8]) -> Option<Vec<u8>> {
        if !self.share.take(HELD_BYTES + packet.len()) {
            return None;
        }
        let mut bytes = self.pool.pop().unwrap_or_default();
        bytes.clear();
        bytes.extend_from_slice(packet);
        Some(bytes)
    }

    /// A packet has left; its buffer serves for the next.
    pub fn recycle(&mut self, bytes: Vec<u8>) {
        self.share.give_back(HELD_BYTES + bytes.len());
        if self.pool.len() < POOL_MAX && bytes.capacity() <= POOL_BYTES_MAX {
            self.pool.push(bytes);
        }
    }
}
