//! Receiving side: keeps what arrives, and finds what is missing from the symbols.

use super::{BLOCKS, Block, COVERED_BYTES_MAX, PASSES_MAX, PASSES_PER_DATAGRAM, Symbol, field};
use crate::header::HEADER_BYTES;

/// Datagrams kept, by counter: three blocks with what lies between, and some that came early.
pub(super) const KEPT: usize = 128;
/// Most symbols that wait for what would make them useful.
pub(super) const EQUATIONS_MAX: usize = 8;
/// Most missing datagrams that symbols are solved for at once.
const MISSING_MAX: usize = 9;

/// A datagram that was lost and is back, or what a peer wants to pass for one: only its tag proves it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    /// Lane counter.
    pub counter: u64,
    /// The datagram, with room for its header in front.
    pub datagram: Vec<u8>,
}

/// A symbol from which everything that has arrived is taken out.
#[derive(Clone, Debug)]
struct Equation {
    /// Counters that are missing, each with its weight.
    missing: Vec<(u64, u8)>,
    bytes: Vec<u8>,
}

/// Decoder of one lane.
#[derive(Debug)]
pub struct Decoder {
    kept: Box<[Kept]>,
    /// Memory for the one that arrives.
    incoming: Vec<u8>,
    equations: Vec<Equation>,
    /// Passes that may be made, and those that were.
    passes: usize,
    made: usize,
    refused: u64,
}

/// A datagram that has arrived: as it stands in a symbol, without zeros behind.
#[derive(Clone, Debug, Default)]
struct Kept {
    /// Its counter + 1; 0 = none.
    next: u64,
    bytes: Vec<u8>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self {
            kept: vec![Kept::default(); KEPT].into_boxed_slice(),
            incoming: Vec::new(),
            equations: Vec::new(),
            passes: PASSES_MAX / 2,
            made: 0,
            refused: 0,
        }
    }
}

impl Decoder {
    /// Keeps a sealed datagram that has arrived and proved authentic, header included.
    pub fn keep(&mut self, counter: u64, datagram: &[u8]) {
        let Some(sealed) = datagram.get(HEADER_BYTES..).filter(|_| datagram.len() <= COVERED_BYTES_MAX)
        else {
            return;
        };
        self.passes = (self.passes + PASSES_PER_DATAGRAM).min(PASSES_MAX);
        let mut bytes = std::mem::take(&mut self.incoming);
        bytes.clear();
        bytes.extend((sealed.len() as u16).to_be_bytes());
        bytes.extend(sealed);
        self.take_out(counter, &bytes);
        let kept = &mut self.kept[counter as usize % KEPT];
        // A repeat that comes late is of no more use than that, and must not push a newer datagram out.
        if kept.next <= counter {
            kept.next = counter + 1;
            std::mem::swap(&mut kept.bytes, &mut bytes);
        }
        self.incoming = bytes;
    }

    /// Takes a datagram that was missing out of the symbols that wait for it.
    fn take_out(&mut self, counter: u64, bytes: &[u8]) {
        let (passes, made) = (&mut self.passes, &mut self.made);
        for equation in &mut self.equations {
            let Some(at) = equation.missing.iter().position(|(missing, _)| *missing == counter) else {
                continue;
            };
            let (_, weight) = equation.missing.swap_remove(at);
            if *passes == 0 {
                equation.missing.clear();
                continue;
            }
            *passes -= 1;
            *made += 1;
            equation.take_out(bytes, weight);
        }
        self.equations.retain(|equation| !equation.missing.is_empty());
    }

    /// Takes a symbol in. `arrived` tells whether a counter of the lane has arrived, or is so old that it does not matter.
    pub fn take(&mut self, symbol: Symbol, arrived: impl Fn(u64) -> bool) {
        let Symbol { blocks, bytes } = symbol;
        if !super::are_valid(&blocks) || bytes.len() > COVERED_BYTES_MAX {
            self.refused += 1;
            return;
        }
        let weights = weights(blocks);
        let is_kept = |counter: u64| self.kept[counter as usize % KEPT].next == counter + 1;
        let (here, missing): (Vec<_>, Vec<_>) = weights.partition(|(counter, _)| is_kept(*counter));
        if missing.is_empty()
            || missing.len() > MISSING_MAX
            || missing.iter().any(|(counter, _)| arrived(*counter))
        {
            // Nothing to find; too much; or what arrived before symbols came, or is forgotten, would have to be taken out.
            return;
        }
        if !self.pass(1 + here.len()) {
            self.refused += 1;
            return;
        }
        // What is missing for so long is not waited for.
        let oldest = blocks[0].first.saturating_sub(KEPT as u64);
        self.equations.retain(|equation| equation.missing.iter().all(|(counter, _)| *counter >= oldest));
        let mut equation = Equation { missing, bytes };
        for (counter, weight) in here {
            equation.take_out(&self.kept[counter as usize % KEPT].bytes, weight);
        }
        if self.equations.len() == EQUATIONS_MAX {
            self.equations.remove(0);
        }
        self.equations.push(equation);
    }

    /// A datagram that the symbols tell, if there is one. It counts as missing until [`Self::keep`] gets it.
    pub fn solve(&mut self) -> Option<Restored> {
        self.eliminate();
        while let Some(at) = self.equations.iter().position(|equation| equation.missing.len() == 1) {
            let restored = self.equations.swap_remove(at).restored();
            if !self.pass(1) {
                return None;
            }
            if restored.is_some() {
                return restored;
            }
            // No encoder made this one.
            self.refused += 1;
        }
        None
    }

    /// Whether symbols wait.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        !self.equations.is_empty()
    }

    /// Symbols that were not looked at, since the last call: malformed, or beyond what a peer may cause.
    pub fn take_refused(&mut self) -> u64 {
        std::mem::take(&mut self.refused)
    }

    /// Passes made so far.
    #[must_use]
    pub const fn made(&self) -> usize {
        self.made
    }

    /// Whether so many more passes may be made; they count as made.
    const fn pass(&mut self, passes: usize) -> bool {
        if self.passes < passes {
            return false;
        }
        self.passes -= passes;
        self.made += passes;
        true
    }

    /// Where no symbol has one missing datagram alone: takes them out of one another until one has.
    fn eliminate(&mut self) {
        if self.equations.len() < 2 || self.equations.iter().any(|equation| equation.missing.len() <= 1) {
            return;
        }
        for pivot in 0..self.equations.len() {
            let Some(&(counter, weight)) = self.equations[pivot].missing.first() else { continue };
            let has = |equation: &Equation| equation.missing.iter().any(|(missing, _)| *missing == counter);
            if self.equations.iter().filter(|equation| has(equation)).count() < 2 {
                continue;
            }
            let by = self.equations[pivot].clone();
            for at in 0..self.equations.len() {
                let Some(&(_, other)) =
                    self.equations[at].missing.iter().find(|(missing, _)| *missing == counter)
                else {
                    continue;
                };
                if at == pivot || !self.pass(1) {
                    continue;
                }
                self.equations[at].add_multiple(&by, field::multiply(other, field::inverse(weight)));
            }
        }
        self.equations.retain(|equation| !equation.missing.is_empty());
    }
}

/// Counters of a symbol's datagrams with their weights.
fn weights(blocks: [Block; BLOCKS]) -> impl Iterator<Item = (u64, u8)> {
    blocks.into_iter().enumerate().flat_map(|(age, block)| {
        let last = block.len().saturating_sub(1);
        (0..64)
            .filter(move |bit| block.mask >> bit & 1 == 1)
            .enumerate()
            .map(move |(at, bit)| (block.first.saturating_add(bit), field::power(age * (last - at))))
    })
}

impl Equation {
    /// The datagram that alone is missing; `None` where its length cannot be.
    fn restored(mut self) -> Option<Restored> {
        let (counter, weight) = *self.missing.first()?;
        field::multiply_all(&mut self.bytes, field::inverse(weight));
        let length = usize::from(u16::from_be_bytes([*self.bytes.first()?, *self.bytes.get(1)?]));
        let sealed = self.bytes.get(2..2 + length)?;
        let mut datagram = vec![0; HEADER_BYTES];
        datagram.extend(sealed);
        Some(Restored { counter, datagram })
    }

    fn take_out(&mut self, bytes: &[u8], weight: u8) {
        if self.bytes.len() < bytes.len() {
            self.bytes.resize(bytes.len(), 0);
        }
        field::add_multiple(&mut self.bytes, bytes, weight);
    }

    fn add_multiple(&mut self, by: &Self, factor: u8) {
        self.take_out(&by.bytes, factor);
        for (counter, weight) in &by.missing {
            let more = field::multiply(*weight, factor);
            match self.missing.iter().position(|(missing, _)| missing == counter) {
                Some(at) => {
                    self.missing[at].1 ^= more;
                    if self.missing[at].1 == 0 {
                        self.missing.swap_remove(at);
                    }
                }
                None => self.missing.push((*counter, more)),
            }
        }
    }
}
