//! Sending side: gathers sealed datagrams into blocks and makes their symbols.

use super::{Block, COVERED_BYTES_MAX, field};
use crate::header::HEADER_BYTES;

/// Repair symbol of a block.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Symbol {
    /// The block whose datagrams it holds with weight 1.
    pub newer: Block,
    /// The block before, whose datagrams it holds with weights that are powers of 2, 1 for the last; empty for the first symbol.
    pub older: Block,
    /// The sum, each datagram as its length behind the header (16 bits) and its bytes from there on, with zeros behind.
    pub bytes: Vec<u8>,
}

/// Encoder of one lane.
#[derive(Clone, Debug, Default)]
pub struct Encoder {
    block: Block,
    sum: Vec<u8>,
    weighted: Vec<u8>,
    older: Block,
    older_weighted: Vec<u8>,
}

impl Encoder {
    /// Datagrams since the last symbol.
    #[must_use]
    pub const fn waiting(&self) -> usize {
        self.block.len()
    }

    /// Whether a datagram with this counter can still be in the same block as those that wait.
    #[must_use]
    pub const fn reaches(&self, counter: u64) -> bool {
        self.block.is_empty() || counter.wrapping_sub(self.block.first) < 64
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
        if self.block.is_empty() {
            self.block.first = counter;
        }
        self.block.mask |= 1 << (counter - self.block.first);
        let length = (sealed.len() as u16).to_be_bytes();
        let bytes = 2 + sealed.len();
        if self.sum.len() < bytes {
            self.sum.resize(bytes, 0);
            self.weighted.resize(bytes, 0);
        }
        field::double_all(&mut self.weighted);
        for sum in [&mut self.sum, &mut self.weighted] {
            field::add(sum, &length);
            field::add(&mut sum[2..], sealed);
        }
    }

    /// Ends the block: its symbol. `None` when nothing waits.
    pub fn finish(&mut self) -> Option<Symbol> {
        if self.block.is_empty() {
            return None;
        }
        let mut bytes = std::mem::take(&mut self.sum);
        if bytes.len() < self.older_weighted.len() {
            bytes.resize(self.older_weighted.len(), 0);
        }
        field::add(&mut bytes, &self.older_weighted);
        let symbol = Symbol { newer: self.block, older: self.older, bytes };
        self.older = std::mem::take(&mut self.block);
        self.older_weighted = std::mem::take(&mut self.weighted);
        Some(symbol)
    }
}
