//! Where a port stands in a table: by its class, the seven hash bits that it alone decides.
//!
//! The hash is linear, so `bucket(reply with port p) = bucket(reply with port 0) ^ class(p)`. A table that keeps the
//! ports of a class side by side finds a port of a wanted bucket with a few word operations. A port's *place* is the
//! 16-bit number
//!
//! ```text
//! class:7 | block:6 | element:3       block = port / 1,024; each block has 8 ports of each class
//! ```
//!
//! and places are a permutation of the ports, for each of the four slots of the hash input.

use steering::port_solver::{PortSlot, ReplyPorts};
use steering::symmetric::{FlowHasher, core_bits};

use super::port_set::{Blocks, PortSet, WORDS, block_of};

/// Classes of ports: as many as core buckets.
pub(crate) const CLASSES: usize = 128;

/// Words of one class: 64 blocks × 8 ports.
pub(crate) const CLASS_WORDS: usize = 8;

/// Ports of one block.
const BLOCK: usize = 1024;

/// The permutation between ports and places of one slot.
#[derive(Debug)]
pub(crate) struct ClassMap {
    /// By the port's place in its block: (class within block 0) << 3 | element.
    place_of_low: Vec<u16>,
    /// The other way.
    low_of_place: Vec<u16>,
    /// Bits that the block adds to the class.
    block_class: Vec<u8>,
}

impl ClassMap {
    /// The permutation of one slot; `None` unless the solvers are for 7 bits and blocks of 1,024 ports.
    pub(crate) fn new(hasher: &FlowHasher, solvers: &ReplyPorts, slot: PortSlot) -> Option<Self> {
        let solver = solvers.solver(slot);
        if solver.units().len() != 7 || solver.nullspace().len() != 3 {
            return None;
        }
        let pick = |vectors: &[u16], bits: usize| {
            let set = vectors.iter().enumerate().filter(|(bit, _)| bits >> bit & 1 == 1);
            set.fold(0u16, |port, (_, vector)| port ^ vector)
        };
        let mut place_of_low = vec![0; BLOCK];
        let mut low_of_place = vec![0; BLOCK];
        for (place, low) in low_of_place.iter_mut().enumerate() {
            *low = pick(solver.units(), place >> 3) ^ pick(solver.nullspace(), place & 7);
            *place_of_low.get_mut(usize::from(*low))? = place as u16;
        }
        let upper = hasher.tables().get(slot.byte())?;
        let block_class = upper.iter().step_by(4).map(|&hash| core_bits(hash)).collect();
        Some(Self { place_of_low, low_of_place, block_class })
    }

    /// The place of a port.
    #[inline]
    pub(crate) fn place(&self, port: u16) -> u16 {
        let block = port >> 10;
        let in_block = self.place_of_low.get(usize::from(port & 1023)).copied().unwrap_or(0);
        let class = (in_block >> 3) ^ self.class_of_block(block);
        class << 9 | block << 3 | (in_block & 7)
    }

    /// The port at a place.
    #[inline]
    pub(crate) fn port(&self, place: u16) -> u16 {
        let block = place >> 3 & 63;
        let class = (place >> 9) ^ self.class_of_block(block);
        let low = self.low_of_place.get(usize::from(class << 3 | (place & 7))).copied().unwrap_or(0);
        block << 10 | low
    }

    fn class_of_block(&self, block: u16) -> u16 {
        self.block_class.get(usize::from(block)).copied().map_or(0, u16::from)
    }
}

impl PartialEq for ClassMap {
    fn eq(&self, other: &Self) -> bool {
        self.low_of_place == other.low_of_place && self.block_class == other.block_class
    }
}

/// A set of ports in the order of places.
#[derive(Debug, Default)]
pub(crate) struct ClassMask {
    words: Vec<u64>,
    blocks: Blocks,
}

impl ClassMask {
    /// The set, rearranged.
    pub(crate) fn new(map: &ClassMap, ports: &PortSet) -> Self {
        let (mut words, mut blocks) = (vec![0u64; WORDS], 0);
        for port in ports.iter() {
            blocks |= 1 << block_of(port);
            let place = map.place(port);
            if let Some(word) = words.get_mut(usize::from(place >> 6)) {
                *word |= 1 << (place & 63);
            }
        }
        Self { words, blocks }
    }

    /// Blocks of which some port is in the set.
    #[inline]
    pub(crate) fn blocks(&self) -> Blocks {
        self.blocks
    }

    /// The ports of word `word` (class × 8 + eight blocks).
    #[inline]
    pub(crate) fn word(&self, word: usize) -> u64 {
        self.words.get(word).copied().unwrap_or(0)
    }
}

/// The set `{bit ^ by : bit in bits}`.
#[inline]
pub(crate) fn xor_all(mut bits: u128, by: u8) -> u128 {
    const STEPS: [u128; 7] = [
        0x5555_5555_5555_5555_5555_5555_5555_5555,
        0x3333_3333_3333_3333_3333_3333_3333_3333,
        0x0f0f_0f0f_0f0f_0f0f_0f0f_0f0f_0f0f_0f0f,
        0x00ff_00ff_00ff_00ff_00ff_00ff_00ff_00ff,
        0x0000_ffff_0000_ffff_0000_ffff_0000_ffff,
        0x0000_0000_ffff_ffff_0000_0000_ffff_ffff,
        0x0000_0000_0000_0000_ffff_ffff_ffff_ffff,
    ];
    for (bit, mask) in STEPS.iter().enumerate() {
        if by >> bit & 1 == 1 {
            let distance = 1 << bit;
            bits = (bits >> distance & mask) | (bits & mask) << distance;
        }
    }
    bits
}

/// One bit for each block becomes eight for its ports: `blocks` are the eight blocks of a word.
#[inline]
pub(crate) fn spread(blocks: u8) -> u64 {
    // Bit i to the lowest bit of byte i, then each byte from 0x01 to 0xff.
    let low = (u64::from(blocks & 0x7f).wrapping_mul(0x0002_0408_1020_4081)) & 0x0101_0101_0101_0101;
    let high = u64::from(blocks >> 7) << 56;
    (low | high).wrapping_mul(0xff)
}

#[cfg(test)]
mod tests;
