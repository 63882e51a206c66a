//! Round robin by weight: who is next, written down in advance.

use steering::assign::quotas;
use steering::table::Unit;

/// Longest list, unless there are so many backends that each could not have [`TURNS_EACH_MIN`].
const TURNS_MAX: u64 = 4_096;

/// With weights too fine for the list, the average backend still has so many turns.
const TURNS_EACH_MIN: u64 = 4;

/// A list of turns in which each backend's are spread evenly ("smooth"): weights 5, 1, 1 give A A C A A B A, never
/// five in a row. Entries are places in `weights`; a weight of 0 has no turn. Shares are exact when the weights, divided
/// by their common divisor, add up to at most 4,096, else rounded, with at least one turn each.
#[must_use]
pub fn turns(weights: &[u32]) -> Vec<u16> {
    let divisor = weights.iter().fold(0, |a, &b| common_divisor(a, b)).max(1);
    let total: u64 = weights.iter().map(|&weight| u64::from(weight / divisor)).sum();
    let longest = TURNS_MAX.max(TURNS_EACH_MIN * weights.len() as u64);
    let numbers: Vec<u32> = if total <= longest {
        weights.iter().map(|weight| weight / divisor).collect()
    } else {
        rounded(weights, longest as usize)
    };
    // Turn k of n comes at (k + phase) / n of the list, in fractions of 2^32. Multiples of the golden ratio spread the
    // phases: with one phase for all, the turns of all light backends would come together.
    let mut list: Vec<(u64, u16)> = Vec::new();
    for (&number, id) in numbers.iter().zip(0u16..) {
        let phase = u64::from(u32::from(id).wrapping_mul(0x9e37_79b9));
        let at = |turn: u32| ((u64::from(turn) << 32) + phase) / u64::from(number.max(1));
        list.extend((0..number).map(|turn| (at(turn), id)));
    }
    list.sort_unstable();
    list.into_iter().map(|(_, id)| id).collect()
}

fn rounded(weights: &[u32], turns: usize) -> Vec<u32> {
    let units: Vec<Unit> = weights.iter().zip(0u16..).map(|(&weight, id)| Unit { id, weight }).collect();
    let Ok(list) = quotas(turns, &units, |_| 0) else { return vec![0; weights.len()] };
    list.iter().zip(weights).map(|(&(_, quota), &weight)| (quota as u32).max(u32::from(weight > 0))).collect()
}

const fn common_divisor(mut a: u32, mut b: u32) -> u32 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}
