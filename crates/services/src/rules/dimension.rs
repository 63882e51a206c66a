//! One condition of rules that is a number of 16 bits: a port, a protocol, an interface, a tenant.
//!
//! The values are cut where any rule's range begins or ends; each piece has the set of rules that it satisfies, those
//! that do not ask included. With
//! very many pieces neighbours are joined: the set then holds too many rules, which is why a candidate is checked
//! exactly at the end, and memory stays bounded.

use super::bits::{Bits, Dense, Pair};

/// Most pieces of one condition: 4,096 × 10,000 bits are 5 MB at the worst.
const PIECES_MAX: usize = 4_096;

/// One condition of all rules.
#[derive(Clone, Debug, Default)]
pub(super) struct Dimension {
    /// Rules that do not ask for it.
    any: Bits,
    /// Where each piece begins, ascending; the first at 0.
    starts: Vec<u16>,
    /// Rules that each piece satisfies, with those of `any`.
    pieces: Vec<Bits>,
}

impl Dimension {
    /// Of `rules[n]`: the inclusive ranges it takes; none = any value.
    pub(super) fn compile(rules: &[Vec<(u16, u16)>]) -> Self {
        let mut any = Dense::new(rules.len());
        // (value, begins, rule); an end stands at the value after the range.
        let mut edges: Vec<(u32, bool, u16)> = Vec::new();
        for (number, ranges) in (0u16..).zip(rules) {
            if ranges.is_empty() {
                any.insert(number);
            }
            for (first, last) in joined(ranges) {
                edges.push((first, true, number));
                edges.push((last + 1, false, number));
            }
        }
        // Ends before beginnings: at one value, a rule's next range must stay.
        edges.sort_unstable();
        let mut cuts: Vec<u32> = edges.iter().map(|&(value, ..)| value).collect();
        cuts.push(0);
        cuts.sort_unstable();
        cuts.dedup();
        cuts.retain(|&cut| cut <= u32::from(u16::MAX));
        let stride = cuts.len().div_ceil(PIECES_MAX).max(1);

        let mut dimension = Self { any: any.compress(), ..Self::default() };
        let mut active = any;
        let mut edges = edges.as_slice();
        for (place, &start) in cuts.iter().enumerate().step_by(stride) {
            let end = cuts.get(place + stride).copied().unwrap_or(u32::from(u16::MAX) + 1);
            // What ends exactly here is out of the piece; what ends or begins further within it is in.
            let here = edges.partition_point(|&(value, ..)| value <= start);
            let within = edges.partition_point(|&(value, ..)| value < end);
            let (before, rest) = edges.split_at(here);
            let (later, rest) = rest.split_at(within - here);
            apply(&mut active, before);
            let mut piece = active.clone();
            later.iter().filter(|edge| edge.1).for_each(|edge| piece.insert(edge.2));
            apply(&mut active, later);
            edges = rest;
            dimension.starts.push(start as u16);
            dimension.pieces.push(piece.compress());
        }
        dimension
    }

    /// The rules that a packet with this value satisfies. `None`: it has none, only rules that do not ask are left.
    #[inline]
    pub(super) fn at(&self, value: Option<u16>) -> Pair<'_> {
        let satisfied = value.and_then(|value| {
            let piece = self.starts.partition_point(|&start| start <= value);
            self.pieces.get(piece.wrapping_sub(1))
        });
        Pair { any: satisfied.unwrap_or(&self.any), met: None }
    }

    /// Whether any rule asks for it.
    pub(super) fn matters(&self) -> bool {
        self.starts.len() > 1
    }
}

/// Edges in order.
fn apply(active: &mut Dense, edges: &[(u32, bool, u16)]) {
    for &(_, begins, rule) in edges {
        if begins {
            active.insert(rule);
        } else {
            active.remove(rule);
        }
    }
}

/// The ranges in order, overlapping and touching ones made one.
fn joined(ranges: &[(u16, u16)]) -> Vec<(u32, u32)> {
    let mut sorted: Vec<(u32, u32)> =
        ranges.iter().map(|&(first, last)| (u32::from(first), u32::from(last))).collect();
    sorted.sort_unstable();
    let mut joined: Vec<(u32, u32)> = Vec::with_capacity(sorted.len());
    for (first, last) in sorted {
        match joined.last_mut() {
            Some(previous) if first <= previous.1 + 1 => previous.1 = previous.1.max(last),
            _ => joined.push((first, last)),
        }
    }
    joined
}
