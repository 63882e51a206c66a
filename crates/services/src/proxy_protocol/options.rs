//! SACK blocks (RFC 2018 §3) and the MSS (RFC 9293 §3.7.1) in the options of a TCP header.

use crate::rewrite::bytes::{array_at, delta, delta16, put_u16, put_u32, u16_at, u32_at};

const OPTION_END: u8 = 0;
const OPTION_NOP: u8 = 1;
const OPTION_MSS: u8 = 2;
const OPTION_SACK: u8 = 5;
/// No MSS is made smaller than this: less is a mistake or an attack already.
const MSS_MIN: u16 = 88;

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

/// Lowers the MSS by `bytes`; returns the delta of the checksum. `options`: as for [`shift_sack`].
pub(super) fn lower_mss(options: &mut [u8], bytes: u16) -> u64 {
    let mut at = 0;
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
        if kind == OPTION_MSS && length == 4 {
            let old = u16_at(options, at + 2).unwrap_or(0);
            let new = old.saturating_sub(bytes).max(MSS_MIN.min(old));
            put_u16(options, at + 2, new);
            // At an odd offset the bytes stand in the other halves of two words.
            let place = |mss: u16| if at % 2 == 0 { mss } else { mss.swap_bytes() };
            return delta16(place(old), place(new));
        }
        at = end;
    }
    0
}
