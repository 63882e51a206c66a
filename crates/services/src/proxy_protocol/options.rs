//! SACK blocks (RFC 2018 §3) in the options of a TCP header.

use crate::rewrite::bytes::{array_at, delta, put_u32, u32_at};

const OPTION_END: u8 = 0;
const OPTION_NOP: u8 = 1;
const OPTION_SACK: u8 = 5;

/// Replaces every edge of every SACK block; returns the delta of the checksum. `options`: start at an even offset of the
/// TCP header. What cannot be read ends them.
pub(super) fn shift_sack(options: &mut [u8], map: impl Fn(u32) -> u32) -> u64 {
    let (mut at, mut change) = (0, 0);
    while let Some(kind) = options.get(at).copied() {
        if kind == OPTION_NOP {
            at += 1;
            continue;
        }
        let Some([_, length]) = array_at(options, at) else { break };
        let end = at + usize::from(length);
        if kind == OPTION_END || length < 2 || end > options.len() {
            break;
        }
        if kind == OPTION_SACK && (length - 2) % 8 == 0 {
            for edge_at in (at + 2..end).step_by(4) {
                let old = u32_at(options, edge_at).unwrap_or(0);
                let new = map(old);
                put_u32(options, edge_at, new);
                // At an odd offset each byte stands in the other half of its word: the sum is the same with all
                // bytes swapped.
                let place = |edge: u32| if edge_at % 2 == 0 { edge } else { edge.rotate_left(8) };
                change += delta(place(old), place(new));
            }
        }
        at = end;
    }
    change
}
