//! Forward error correction of one lane: what is lost comes back without a question to the sender.
//!
//! Datagrams of a lane that loses some at random are gathered into blocks. Behind each block the sender sends a repair symbol:
//! the sum of the block's sealed datagrams and *weighted* sums of those of the two blocks before, in the field of 256 elements.
//! So every datagram is in three symbols, with weights of which no two datagrams of a block have the same ratio:
//!
//! * one loss of a block is back with the block's own symbol,
//! * two of one block are back with the next symbol, three with the one after that,
//! * and so are losses over several blocks, as soon as there are as many symbols as losses; a symbol may be lost itself.
//!
//! The sum is made of sealed bytes, so what comes back is the very datagram of the lane: its tag proves it, its replay window
//! drops it if the original or a repeat came too. [`Encoder`] belongs to the sending core's lane, [`Decoder`] to the
//! receiving core's; frames and layout stand in `docs/wire-frames.md`, "Repair".
//!
//! # Cost
//! Sending: three passes over each datagram, memory of six datagrams a lane. Receiving: a copy of each datagram, and passes
//! over three blocks when something is missing; both only on lanes for which symbols come. A peer gets [`PASSES_PER_DATAGRAM`] passes for each datagram
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
/// Fewest: a fifth of the bytes is the most that is spent on repair, and a little for the second head of a symbol in two parts.
pub const BLOCK_MIN: usize = 5;
/// Blocks that a symbol is made of: its own and those before.
pub const BLOCKS: usize = 3;
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

    /// Whether it is one that an encoder makes: starts at its first datagram, and is not too long.
    #[must_use]
    pub const fn is_valid(&self) -> bool {
        self.is_empty() || (self.mask & 1 == 1 && self.len() <= BLOCK_MAX && self.first < 1 << 62)
    }
}

/// How many datagrams a symbol is sent for on a path that loses this share, 0–1: as many as lose a quarter of one.
#[must_use]
pub fn block_size(loss: f64) -> usize {
    ((0.25 / loss.max(1e-6)) as usize).clamp(BLOCK_MIN, BLOCK_MAX)
}

/// Part of a symbol as an extension frame's body holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SymbolPart<'a> {
    /// See [`Symbol::blocks`].
    pub blocks: [Block; BLOCKS],
    /// Where the part begins in the symbol.
    pub offset: u16,
    /// Bytes of the whole symbol.
    pub total: u16,
    /// The part.
    pub bytes: &'a [u8],
}

impl<'a> SymbolPart<'a> {
    /// Bytes in front of the part.
    pub const HEAD_BYTES: usize = BLOCKS * 16 + 4;

    /// The body; all numbers in network byte order.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(Self::HEAD_BYTES + self.bytes.len());
        for block in self.blocks {
            body.extend(block.first.to_be_bytes());
            body.extend(block.mask.to_be_bytes());
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
        let mut blocks = [Block::default(); BLOCKS];
        for (at, block) in blocks.iter_mut().enumerate() {
            *block = Block { first: number(at * 16)?, mask: number(at * 16 + 8)? };
        }
        let (offset, total) = (packet::u16_at(head, BLOCKS * 16)?, packet::u16_at(head, BLOCKS * 16 + 2)?);
        let inside = usize::from(offset) + bytes.len() <= usize::from(total) && !bytes.is_empty();
        let valid = are_valid(&blocks) && usize::from(total) <= COVERED_BYTES_MAX;
        (inside && valid).then_some(Self { blocks, offset, total, bytes })
    }
}

/// Whether these are blocks of a symbol.
fn are_valid(blocks: &[Block; BLOCKS]) -> bool {
    !blocks[0].is_empty() && blocks.iter().all(Block::is_valid)
}
