//! Sending side: gathers sealed datagrams into blocks and makes their symbols.

use super::{BLOCKS, Block, COVERED_BYTES_MAX, field};
use crate::header::HEADER_BYTES;

/// Counters from the first datagram of the oldest block of a symbol to that of the newest one, at most: with the newest block itself what a receiver keeps.
const REACH: u64 = 90;

/// Repair symbol of a block.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Symbol {
    /// The block, and those before it, the newest first. In block n (from 0) a datagram has the weight 2 to the power of n times the number of
    /// the block's datagrams behind it. Empty ones follow where there were no more.
    pub blocks: [Block; BLOCKS],
    /// The sum, each datagram as its length behind the header (16 bits) and its bytes from there on, with zeros behind.
    pub bytes: Vec<u8>,
}

/// Encoder of one lane.
#[derive(Clone, Debug, Default)]
pub struct Encoder {
    /// The block that is gathered and those before it.
    blocks: [Block; BLOCKS],
    /// Sums of each, with the weights of block 0, 1 and 2 of a symbol. Those that are not used any more are empty.
    sums: [[Vec<u8>; BLOCKS]; BLOCKS],
}

impl Encoder {
    /// Datagrams since the last symbol.
    #[must_use]
    pub const fn waiting(&self) -> usize {
        self.blocks[0].len()
    }

    /// Whether a datagram with this counter can still be in the same block as those that wait.
    #[must_use]
    pub const fn reaches(&self, counter: u64) -> bool {
        self.blocks[0].is_empty() || counter.wrapping_sub(self.blocks[0].first) < 64
    }

    /// Takes in a sealed datagram, header included; counters rise. One that is too long is not covered, nor one out of the block's
    /// reach ([`Self::reaches`]).
    pub fn add(&mut self, counter: u64, datagram: &[u8]) {
        let Some(sealed) = datagram.get(HEADER_BYTES..).filter(|_| datagram.len() <= COVERED_BYTES_MAX)
        else {
            return;
        };
        if !self.reaches(counter) {
            return;
        }
        let block = &mut self.blocks[0];
        if block.is_empty() {
            block.first = counter;
        }
        block.mask |= 1 << (counter - block.first);
        let length = (sealed.len() as u16).to_be_bytes();
        for (weight, sum) in self.sums[0].iter_mut().enumerate() {
            if sum.len() < 2 + sealed.len() {
                sum.resize(2 + sealed.len(), 0);
            }
            (0..weight).for_each(|_| field::double_all(sum));
            field::add(sum, &length);
            field::add(&mut sum[2..], sealed);
        }
    }

    /// Ends the block: its symbol. `None` when nothing waits.
    pub fn finish(&mut self) -> Option<Symbol> {
        if self.blocks[0].is_empty() {
            return None;
        }
        // Of datagrams that left so long ago the receiver keeps none.
        for age in 1..BLOCKS {
            if self.blocks[0].first.saturating_sub(self.blocks[age].first) > REACH {
                self.blocks[age] = Block::default();
                self.sums[age] = Default::default();
            }
        }
        let mut bytes = std::mem::take(&mut self.sums[0][0]);
        for age in 1..BLOCKS {
            let sum = std::mem::take(&mut self.sums[age][age]);
            if bytes.len() < sum.len() {
                bytes.resize(sum.len(), 0);
            }
            field::add(&mut bytes, &sum);
        }
        let symbol = Symbol { blocks: self.blocks, bytes };
        self.blocks.rotate_right(1);
        self.blocks[0] = Block::default();
        self.sums.rotate_right(1);
        self.sums[0] = Default::default();
        Some(symbol)
    }
}
