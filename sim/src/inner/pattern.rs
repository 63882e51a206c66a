//! Contents whose every byte is known from where it stands, so that a sink can check them without a copy.

/// Eight bytes of stream `stream` at word `word`.
fn word(stream: u64, word: u64) -> [u8; 8] {
    let mixed = (word ^ stream.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ (mixed >> 29)).to_le_bytes()
}

/// Calls `each` for runs of bytes of the stream from `offset` on, `length` bytes in all.
fn runs(stream: u64, offset: u64, length: usize, mut each: impl FnMut(usize, &[u8]) -> bool) -> bool {
    let mut done = 0;
    while done < length {
        let at = offset + done as u64;
        let inside = (at % 8) as usize;
        let take = (8 - inside).min(length - done);
        if !each(done, &word(stream, at / 8)[inside..inside + take]) {
            return false;
        }
        done += take;
    }
    true
}

/// Fills `out` with the stream from `offset` on.
pub fn fill(stream: u64, offset: u64, out: &mut [u8]) {
    runs(stream, offset, out.len(), |at, bytes| {
        out[at..at + bytes.len()].copy_from_slice(bytes);
        true
    });
}

/// Whether `bytes` are the stream from `offset` on.
pub fn matches(stream: u64, offset: u64, bytes: &[u8]) -> bool {
    runs(stream, offset, bytes.len(), |at, expected| bytes[at..at + expected.len()] == *expected)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_part_matches_and_any_flip_shows() {
        let mut all = [0; 100];
        fill(3, 1_000, &mut all);
        assert!(matches(3, 1_013, &all[13..77]));
        assert!(!matches(4, 1_013, &all[13..77]));
        all[50] ^= 1;
        assert!(!matches(3, 1_013, &all[13..77]));
    }
}
