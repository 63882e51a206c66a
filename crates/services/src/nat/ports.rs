//! Port allocation tables (rows C2, C3): which of 65,536 ports are taken, laid out so that a free port of a wanted
//! core is found by a few word operations.
//!
//! Bits stand in the order of *places* ([`super::classes`]): 128 classes × 8 words. A request names the classes whose
//! replies come to this core, the allowed ports, and the blocks that the client may use. The table keeps how many
//! allowed ports each class has left, and which classes have none, in one 128-bit word: full classes cost nothing.
//! So a request reads at most 8 words if it may use all blocks, and 128 × 8 in the very worst case (a client whose few
//! leased blocks are full while others are not). Nothing is tried twice.
//!
//! A table with few ports keeps them as a list, so that memory follows use: at most 64 bytes for a port.

use std::collections::VecDeque;
use std::sync::Arc;

use super::classes::{CLASS_WORDS, CLASSES, ClassMap, ClassMask, spread};
use super::port_set::{Blocks, PortSet, WORDS};

/// A list becomes bits beyond this.
const FEW_MAX: usize = 128;

/// Bits become a list again below this.
const FEW_AGAIN: u32 = 48;

/// How long a port is not given again after a connection that it was used for, s: as long as the other end may be in
/// TIME-WAIT (RFC 9293 §3.6.1; Linux: 60 s).
pub(crate) const REST_S: u32 = 60;

/// Resting ports of one table that a search looks at when no others are left.
const RESTED_LOOKED_AT: usize = 4_096;

/// Request to a table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wish<'a> {
    /// Classes whose replies come to this core.
    pub(crate) classes: u128,
    /// The class to be tried first.
    pub(crate) first: Option<u8>,
    /// Blocks that may be used.
    pub(crate) blocks: Blocks,
    /// Ports that may be used.
    pub(crate) mask: &'a Arc<ClassMask>,
    /// Where to begin; draw anew for each flow (RFC 6056).
    pub(crate) random: u64,
}

/// Verdict of a caller on a free place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Verdict {
    /// This one.
    Take,
    /// Another one.
    Skip,
    /// No more.
    Stop,
}

/// The open and closed ports of one table.
#[derive(Debug, Default)]
pub(crate) struct PortTable {
    held: u32,
    /// Held and resting places.
    bits: Bits,
    /// Since when (s) which place rests, oldest first.
    resting: VecDeque<(u32, u16)>,
    /// Places that were taken for flows of another table; rare.
    foreign: Option<Box<PortSet>>,
}

#[derive(Debug)]
enum Bits {
    Few(Vec<u16>),
    Many(Box<Dense>),
}

impl Default for Bits {
    fn default() -> Self {
        Self::Few(Vec::new())
    }
}

#[derive(Debug)]
struct Dense {
    used: [u64; WORDS],
    /// Ports of `mask` that each class has left.
    left: [u16; CLASSES],
    /// Classes that have none left.
    full: u128,
    mask: Arc<ClassMask>,
}

impl Dense {
    fn new(used: [u64; WORDS], mask: &Arc<ClassMask>) -> Box<Self> {
        let mut dense = Self { used, left: [0; CLASSES], full: 0, mask: Arc::clone(mask) };
        dense.count();
        Box::new(dense)
    }

    fn count(&mut self) {
        self.full = 0;
        for (class, left) in self.left.iter_mut().enumerate() {
            let words = class * CLASS_WORDS..(class + 1) * CLASS_WORDS;
            let free = |word: usize| self.mask.word(word) & !self.used.get(word).copied().unwrap_or(0);
            *left = words.map(|word| free(word).count_ones() as u16).sum();
            self.full |= u128::from(*left == 0) << class;
        }
    }

    fn set(&mut self, place: u16, taken: bool) -> bool {
        let (at, bit) = (usize::from(place >> 6), 1u64 << (place & 63));
        let class = usize::from(place >> 9);
        let (Some(word), Some(left)) = (self.used.get_mut(at), self.left.get_mut(class)) else {
            return false;
        };
        if (*word & bit != 0) == taken {
            return false;
        }
        *word ^= bit;
        if self.mask.word(at) & bit != 0 {
            *left = if taken { left.saturating_sub(1) } else { *left + 1 };
            self.full = self.full & !(1 << class) | u128::from(*left == 0) << class;
        }
        true
    }
}

impl PortTable {
    /// Ports taken.
    pub(crate) fn held(&self) -> u32 {
        self.held
    }

    /// Whether nothing would be forgotten with the table.
    pub(crate) fn is_idle(&self) -> bool {
        self.held == 0 && self.resting.is_empty()
    }

    /// State of one place.
    pub(crate) fn state(&self, place: u16) -> PlaceState {
        if !self.is_occupied(place) {
            PlaceState::Free
        } else if self.resting.iter().any(|(_, resting)| *resting == place) {
            PlaceState::Resting
        } else {
            PlaceState::Held
        }
    }

    fn is_occupied(&self, place: u16) -> bool {
        self.word(usize::from(place >> 6)) >> (place & 63) & 1 == 1
    }

    /// Ends the rest of what rested long enough.
    pub(crate) fn wake(&mut self, now_s: u32) {
        while let Some((since_s, place)) = self.resting.front().copied() {
            if now_s.saturating_sub(since_s) < REST_S {
                return;
            }
            self.resting.pop_front();
            self.clear(place);
        }
    }

    /// A resting place that fits the wish and that `accept` takes, of those that rest longest; it is free then.
    pub(crate) fn find_rested(
        &mut self,
        wish: &Wish<'_>,
        accept: &mut dyn FnMut(u16) -> Verdict,
    ) -> Option<u16> {
        let fits = |place: u16| {
            let (at, class) = (usize::from(place >> 6), place >> 9);
            let block = place >> 3 & 63;
            wish.classes >> class & 1 == 1
                && wish.blocks >> block & 1 == 1
                && wish.mask.word(at) >> (place & 63) & 1 == 1
        };
        let mut found = None;
        for (at, (_, place)) in self.resting.iter().take(RESTED_LOOKED_AT).enumerate() {
            if !fits(*place) {
                continue;
            }
            match accept(*place) {
                Verdict::Take => {
                    found = Some((at, *place));
                    break;
                }
                Verdict::Skip => {}
                Verdict::Stop => break,
            }
        }
        let (at, place) = found?;
        self.resting.remove(at);
        self.clear(place);
        Some(place)
    }

    /// A place is neither held nor resting any more; false if it was not.
    fn clear(&mut self, place: u16) -> bool {
        let was = match &mut self.bits {
            Bits::Few(places) => {
                places.iter().position(|taken| *taken == place).map(|at| places.swap_remove(at)).is_some()
            }
            Bits::Many(dense) => dense.set(place, false),
        };
        let occupied = self.held as usize + self.resting.len();
        if was && occupied < FEW_AGAIN as usize && matches!(self.bits, Bits::Many(_)) {
            self.bits = Bits::Few(self.places());
        }
        was
    }

    /// A free place that fits the wish and that `accept` takes. `words` counts the words read.
    pub(crate) fn find(
        &mut self,
        wish: &Wish<'_>,
        words: &mut u64,
        accept: &mut dyn FnMut(u16) -> Verdict,
    ) -> Option<u16> {
        let full = match &mut self.bits {
            Bits::Few(_) => 0,
            Bits::Many(dense) => {
                if !Arc::ptr_eq(&dense.mask, wish.mask) {
                    dense.mask = Arc::clone(wish.mask);
                    dense.count();
                }
                dense.full
            }
        };
        let mut left = wish.classes & !full;
        let start = (wish.random & 127) as u32;
        let mut next = wish.first.map(u32::from).filter(|class| left >> class & 1 == 1);
        while left != 0 {
            let class =
                next.take().unwrap_or_else(|| (left.rotate_right(start).trailing_zeros() + start) & 127);
            left &= !(1 << class);
            match self.find_in_class(class as usize, wish, words, accept) {
                Ok(None) => {}
                Ok(found) => return found,
                Err(Stopped) => return None,
            }
        }
        None
    }

    fn find_in_class(
        &self,
        class: usize,
        wish: &Wish<'_>,
        words: &mut u64,
        accept: &mut dyn FnMut(u16) -> Verdict,
    ) -> Result<Option<u16>, Stopped> {
        let block = any_block(wish.blocks & wish.mask.blocks(), wish.random);
        let turn = (block & 7) << 3 | (wish.random >> 7 & 7) as u32;
        for step in 0..CLASS_WORDS {
            let of_class = (block as usize / 8 + step) % CLASS_WORDS;
            let blocks = (wish.blocks >> (8 * of_class)) as u8;
            if blocks == 0 {
                continue;
            }
            let at = class * CLASS_WORDS + of_class;
            *words += 1;
            let mut free = wish.mask.word(at) & spread(blocks) & !self.word(at);
            while free != 0 {
                let bit = (free.rotate_right(turn).trailing_zeros() + turn) & 63;
                free &= !(1 << bit);
                let place = (at << 6) as u16 | bit as u16;
                match accept(place) {
                    Verdict::Take => return Ok(Some(place)),
                    Verdict::Skip => {}
                    Verdict::Stop => return Err(Stopped),
                }
            }
        }
        Ok(None)
    }

    #[inline]
    fn word(&self, at: usize) -> u64 {
        match &self.bits {
            Bits::Few(places) => {
                let here = places.iter().filter(|place| usize::from(**place >> 6) == at);
                here.fold(0, |word, place| word | 1 << (place & 63))
            }
            Bits::Many(dense) => dense.used.get(at).copied().unwrap_or(0),
        }
    }

    /// Takes a free place. `foreign`: for a flow whose own table is another one.
    pub(crate) fn take(&mut self, place: u16, mask: &Arc<ClassMask>, foreign: bool) {
        let new = match &mut self.bits {
            Bits::Few(places) if places.contains(&place) => false,
            Bits::Few(places) => {
                places.push(place);
                true
            }
            Bits::Many(dense) => dense.set(place, true),
        };
        if !new {
            return;
        }
        self.held += 1;
        if foreign {
            self.foreign.get_or_insert_default().insert(place);
        }
        if let Bits::Few(places) = &self.bits
            && places.len() > FEW_MAX
        {
            let mut used = [0; WORDS];
            for place in places {
                if let Some(word) = used.get_mut(usize::from(place >> 6)) {
                    *word |= 1 << (place & 63);
                }
            }
            self.bits = Bits::Many(Dense::new(used, mask));
        }
    }

    /// Gives a place back: whether it was taken, and for a flow of another table. `rest_from_s`: it is not given again soon.
    pub(crate) fn give(&mut self, place: u16, rest_from_s: Option<u32>) -> Option<Given> {
        // Whether it rests is not looked up: that would cost more than all the rest.
        if !self.is_occupied(place) {
            return None;
        }
        self.held = self.held.checked_sub(1)?;
        match rest_from_s {
            Some(now_s) => self.resting.push_back((now_s, place)),
            None => {
                self.clear(place);
            }
        }
        let foreign = self.foreign.as_mut().is_some_and(|places| places.remove(place));
        Some(Given { foreign })
    }

    /// The same ports under another permutation: the hash has a new key.
    pub(crate) fn rearrange(&mut self, old: &ClassMap, new: &ClassMap) {
        // The next search counts what is left.
        let mask = Arc::new(ClassMask::default());
        let mut earlier = std::mem::take(self);
        // Where they stood is of no use any more.
        for (_, place) in std::mem::take(&mut earlier.resting) {
            earlier.clear(place);
        }
        for place in earlier.places() {
            let foreign = earlier.foreign.as_ref().is_some_and(|places| places.contains(place));
            self.take(new.place(old.port(place)), &mask, foreign);
        }
    }

    fn places(&self) -> Vec<u16> {
        match &self.bits {
            Bits::Few(places) => places.clone(),
            Bits::Many(dense) => {
                let words = dense.used.iter().copied().enumerate().filter(|(_, word)| *word != 0);
                let places = words.flat_map(|(at, word)| {
                    let taken = (0..64u16).filter(move |bit| word >> bit & 1 == 1);
                    taken.map(move |bit| (at << 6) as u16 | bit)
                });
                places.collect()
            }
        }
    }
}

/// State of a place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum PlaceState {
    /// Nobody has it.
    Free,
    /// A connection that it was used for ended a short time ago.
    Resting,
    /// A flow has it.
    Held,
}

/// A place that was given back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Given {
    /// It was taken for a flow of another table.
    pub(crate) foreign: bool,
}

/// The caller wants no more candidates.
struct Stopped;

/// One of the blocks that may be used, each as likely as the others: one behind a gap would stand out.
#[inline]
fn any_block(blocks: Blocks, random: u64) -> u32 {
    // Most address pools have nearly all.
    for bits in [random >> 10, random >> 22] {
        let block = (bits & 63) as u32;
        if blocks >> block & 1 == 1 {
            return block;
        }
    }
    let mut left = blocks;
    for _ in 0..(random >> 34) % u64::from(blocks.count_ones().max(1)) {
        left &= left - 1;
    }
    left.trailing_zeros() & 63
}

#[cfg(test)]
mod tests;
