//! Going over all flows a few at a time: expiry, and lists for people.

use super::{FlowId, FlowTable, Kind, Record, Removed, with_slab};

/// Result of one call of [`FlowTable::sweep`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Flows looked at.
    pub examined: usize,
    /// Flows taken out.
    pub removed: usize,
    /// It came to the end; the next call begins anew.
    pub pass_ended: bool,
}

/// A place between flows: kind in the high half, entry in the low half.
#[derive(Clone, Copy)]
struct Place {
    kind: usize,
    at: usize,
}

impl Place {
    fn of(cursor: u64) -> Self {
        Self { kind: (cursor >> 32) as usize, at: cursor as u32 as usize }
    }

    fn cursor(self) -> u64 {
        (self.kind as u64) << 32 | self.at as u64
    }
}

impl FlowTable {
    /// The next 64 entries from `place` on, or what is left of them: kind, number of the first, which are taken. Moves
    /// `place` behind them. Nothing at the end.
    fn next_word(&self, place: &mut Place) -> Option<(Kind, usize, u64)> {
        loop {
            let kind = *Kind::ALL.get(place.kind)?;
            if place.at < with_slab!(self, kind, slab => slab.end()) {
                let base = place.at & !63;
                let taken =
                    with_slab!(self, kind, slab => slab.taken(base)) & (u64::MAX << (place.at - base));
                place.at = base + 64;
                return Some((kind, base, taken));
            }
            *place = Place { kind: place.kind + 1, at: 0 };
        }
    }

    /// Looks at some `entries` flows, from where the last call stopped (a stretch of 64 free places counts like one
    /// flow), and takes out those of which `expired` says so, giving them to `gone`. Chunks that became empty are given
    /// back.
    pub fn sweep(
        &mut self,
        entries: usize,
        mut expired: impl FnMut(&mut Record) -> bool,
        mut gone: impl FnMut(Removed),
    ) -> Swept {
        let mut swept = Swept::default();
        let mut place = Place::of(self.swept_to);
        let mut budget = entries;
        while budget > 0 {
            let Some((kind, base, mut taken)) = self.next_word(&mut place) else {
                swept.pass_ended = true;
                place = Place { kind: 0, at: 0 };
                break;
            };
            budget -= 1;
            while taken != 0 {
                let id = FlowId::new(kind, base + taken.trailing_zeros() as usize);
                taken &= taken - 1;
                swept.examined += 1;
                if expired(self.record_mut(id))
                    && let Some(removed) = self.remove(id)
                {
                    swept.removed += 1;
                    gone(removed);
                }
                if taken != 0 && budget == 0 {
                    place.at = base + taken.trailing_zeros() as usize;
                    break;
                }
                budget -= usize::from(taken != 0);
            }
            self.release(kind, base);
        }
        self.swept_to = place.cursor();
        swept
    }

    /// Gives back a chunk, if it is empty and behind its last word.
    fn release(&mut self, kind: Kind, base: usize) {
        match kind {
            Kind::TranslatedV4 => self.v4.translated.release(base),
            Kind::PlainV4 => self.v4.plain.release(base),
            Kind::TranslatedV6 => self.v6.translated.release(base),
            Kind::PlainV6 => self.v6.plain.release(base),
        }
    }

    /// Some `count` flows (or stretches of 64 free places) from `cursor` on, 0 to begin; and the cursor to go on with,
    /// or nothing at the end. Flows that come or go meanwhile may be seen or not; all others are seen once.
    pub fn scan(&self, cursor: u64, count: usize) -> (impl Iterator<Item = FlowId> + use<>, Option<u64>) {
        let mut found = Vec::with_capacity(count.min(4096) + 64);
        let mut place = Place::of(cursor);
        let mut budget = count.max(1);
        let next = loop {
            if budget == 0 {
                break Some(place.cursor());
            }
            let Some((kind, base, mut taken)) = self.next_word(&mut place) else { break None };
            budget = budget.saturating_sub(taken.count_ones().max(1) as usize);
            while taken != 0 {
                found.push(FlowId::new(kind, base + taken.trailing_zeros() as usize));
                taken &= taken - 1;
            }
        };
        (found.into_iter(), next)
    }
}
