//! Forward error correction of one lane: what is lost comes back without a question to the sender.
//!
//! Datagrams of a lane that loses some at random are gathered into blocks. Behind each block the sender sends a repair symbol:
//! the sum of the block's sealed datagrams and the *weighted* sum of those of the block before, in the field of 256 elements.
//! So every datagram is in two symbols, once with weight 1 and once with a power of 2 that differs from those of its
//! neighbors:
//!
//! * one loss of a block is back with the block's own symbol,
//! * two of one block are back with the next symbol, as are three with the one after that if they spread over two blocks,
//! * a symbol that is lost itself costs nothing but that.
//!
//! The sum is made of sealed bytes, so what comes back is the very datagram of the lane: its tag proves it, its replay window
//! drops it if the original or a repeat came too. [`Encoder`] belongs to the sending core's lane, [`Decoder`] to the
//! receiving core's; frames and layout stand in `docs/wire-frames.md`, "Repair".
//!
//! # Cost
//! Sending: two passes over each datagram, memory of three datagrams a lane. Receiving: a copy of each datagram, and passes
//! over two blocks when something is missing; both only on lanes for which symbols come. A peer gets [`PASSES_PER_DATAGRAM`] passes for each datagram
//! that arrives, [`PASSES_MAX`] at once.

mod decoder;
mod encoder;
mod field;
#[cfg(test)]
pub(crate) mod tests;

pub use decoder::{Decoder, Restored};
pub use encoder::{Encoder, Symbol};

/// Longest datagram that is covered, bytes with header: jumbo frames are rare on links that lose, and would cost memory.
pub const COVERED_BYTES_MAX: usize = 2_048;
/// Most datagrams of a block.
pub const BLOCK_MAX: usize = 32;
/// Fewest: one part in nine is the most that is spent on repair.
pub const BLOCK_MIN: usize = 8;
/// Bytes of memory that a [`Decoder`] takes at most.
pub const DECODER_BYTES: usize =
    decoder::KEPT * COVERED_BYTES_MAX + decoder::EQUATIONS_MAX * COVERED_BYTES_MAX;
/// Passes over a datagram's length that a peer may cause for each datagram that arrives, on average …
pub const PASSES_PER_DATAGRAM: usize = 4;
/// … and at once.
pub const PASSES_MAX: usize = 512;

/// Datagrams of a lane that a symbol is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Block {
    /// Lane counter of the first.
    pub first: u64,
    /// Bit n: the datagram with counter `first` + n belongs to it. Control datagrams between them do not.
    pub mask: u64,
}

impl Block {
    /// Datagrams of it.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.mask.count_ones() as usize
    }

    /// Whether it has none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.mask == 0
    }

    /// Counters of its datagrams, rising.
    pub fn counters(&self) -> impl Iterator<Item = u64> + '_ {
        (0..64).filter(|bit| self.mask >> bit & 1 == 1).map(|bit| self.first.saturating_add(bit))
    }

    /// Whether it is one that an encoder makes: starts at its first datagram, and is not too long.
    #[must_use]
    pub const fn is_valid(&self) -> bool {
        self.is_empty() || (self.mask & 1 == 1 && self.len() <= BLOCK_MAX && self.first < 1 << 62)
    }
}

/// How many datagrams a symbol is sent for on a path that loses this share, 0–1: a fifth of a loss per block, so that few blocks have two.
#[must_use]
pub fn block_size(loss: f64) -> usize {
    ((0.2 / loss.max(1e-6)) as usize).clamp(BLOCK_MIN, BLOCK_MAX)
}

/// Part of a symbol as an extension frame's body holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SymbolPart<'a> {
    /// See [`Symbol::newer`].
    pub newer: Block,
    /// See [`Symbol::older`].
    pub older: Block,
    /// Where the part begins in the symbol.
    pub offset: u16,
    /// Bytes of the whole symbol.
    pub total: u16,
    /// The part.
    pub bytes: &'a [u8],
}

impl<'a> SymbolPart<'a> {
    /// Bytes in front of the part.
    pub const HEAD_BYTES: usize = 36;

    /// The body; all numbers in network byte order.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(Self::HEAD_BYTES + self.bytes.len());
        for number in [self.newer.first, self.newer.mask, self.older.first, self.older.mask] {
            body.extend(number.to_be_bytes());
        }
        body.extend(self.offset.to_be_bytes());
        body.extend(self.total.to_be_bytes());
        body.extend(self.bytes);
        body
    }

    /// Reads a body. `None`: too short, a block that no encoder makes, or a part outside its symbol.
    #[must_use]
    pub fn parse(body: &'a [u8]) -> Option<Self> {
        let (head, bytes) = body.split_first_chunk::<{ SymbolPart::HEAD_BYTES }>()?;
        let number = |at: usize| packet::array_at::<8>(head, at).map(u64::from_be_bytes);
        let newer = Block { first: number(0)?, mask: number(8)? };
        let older = Block { first: number(16)?, mask: number(24)? };
        let (offset, total) = (packet::u16_at(head, 32)?, packet::u16_at(head, 34)?);
        let inside = usize::from(offset) + bytes.len() <= usize::from(total) && !bytes.is_empty();
        let valid = newer.is_valid()
            && older.is_valid()
            && !newer.is_empty()
            && usize::from(total) <= COVERED_BYTES_MAX;
        (inside && valid).then_some(Self { newer, older, offset, total, bytes })
    }
}
