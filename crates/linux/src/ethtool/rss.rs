//! How a network card divides received flows among its queues (`ethtool -x`): with its key and table our own
//! Toeplitz code predicts the queue.

use std::io;

use super::Tool;
use crate::Result;
use crate::error::Context;

const ETHTOOL_GRSSH: u32 = 0x46;
/// Words of `struct ethtool_rxfh` before its array: cmd, rss_context, indir_size, key_size, then four bytes
/// (hfunc, input_xfrm, two reserved), reserved.
const HEAD_WORDS: usize = 6;
/// More than any card has; a longer answer is refused.
const TABLE_ENTRIES_MAX: u32 = 1 << 16;
const KEY_BYTES_MAX: u32 = 1 << 10;

/// The hash function of a card (the bits `ETH_RSS_HASH_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RssFunction {
    /// Toeplitz: predictable.
    Toeplitz,
    /// All input bytes XORed.
    Xor,
    /// CRC-32.
    Crc32,
    /// The card does not tell, or another one (its bit).
    Other(u8),
}

/// Receive-side scaling as a card reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rss {
    /// Hash function.
    pub function: RssFunction,
    /// Source and destination are made symmetric before hashing: 1 by XOR, 2 by OR and XOR, 0 not
    /// (`RXH_XFRM_*`).
    pub symmetric: u8,
    /// Key, 40 or 52 bytes as a rule; empty if the card does not tell.
    pub key: Vec<u8>,
    /// Queue of each value of the hash's low bits; its length is a power of two as a rule.
    pub table: Vec<u32>,
}

/// Hash function, key and indirection table of a card. `None` where there is none or the driver does not tell.
/// Some drivers tell the key only with CAP_NET_ADMIN.
pub fn rss(interface: &str) -> Result<Option<Rss>> {
    let what = || format!("read the receive hash of {interface}");
    let tool = Tool::open(interface)?;
    let mut words = vec![0; HEAD_WORDS];
    if let Some(first) = words.first_mut() {
        *first = ETHTOOL_GRSSH;
    }
    // Sizes of 0 ask for the sizes.
    match tool.call(&mut words) {
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(None),
        result => result.context(what())?,
    }
    let (entries, key_bytes) = sizes(&words).context(what())?;
    if entries == 0 && key_bytes == 0 {
        return Ok(None);
    }
    words.resize(HEAD_WORDS + entries + key_bytes.div_ceil(4), 0);
    tool.call(&mut words).context(what())?;
    parse(&words).context(what()).map(Some)
}

/// Entries of the table and bytes of the key.
fn sizes(words: &[u32]) -> io::Result<(usize, usize)> {
    match *words {
        [_, _, entries, key_bytes, ..] if entries <= TABLE_ENTRIES_MAX && key_bytes <= KEY_BYTES_MAX => {
            Ok((entries as usize, key_bytes as usize))
        }
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "sizes beyond all reason")),
    }
}

fn parse(words: &[u32]) -> io::Result<Rss> {
    let short = || io::Error::new(io::ErrorKind::InvalidData, "the answer is too short");
    let (entries, key_bytes) = sizes(words)?;
    let [function, symmetric, ..] = words.get(4).ok_or_else(short)?.to_ne_bytes();
    let table = words.get(HEAD_WORDS..HEAD_WORDS + entries).ok_or_else(short)?.to_vec();
    let rest = words.get(HEAD_WORDS + entries..).ok_or_else(short)?;
    let mut key: Vec<u8> = rest.iter().flat_map(|word| word.to_ne_bytes()).collect();
    if key.len() < key_bytes {
        return Err(short());
    }
    key.truncate(key_bytes);
    let function = match function {
        1 => RssFunction::Toeplitz,
        2 => RssFunction::Xor,
        4 => RssFunction::Crc32,
        other => RssFunction::Other(other),
    };
    Ok(Rss { function, symmetric, key, table })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::netlink::Netlink;
    use crate::testing::isolated;

    fn answer(entries: u32, key: &[u8], function: [u8; 4], table: &[u32]) -> Vec<u32> {
        let mut words = vec![ETHTOOL_GRSSH, 0, entries, key.len() as u32, u32::from_ne_bytes(function), 0];
        words.extend(table);
        for chunk in key.chunks(4) {
            let mut word = [0; 4];
            word[..chunk.len()].copy_from_slice(chunk);
            words.push(u32::from_ne_bytes(word));
        }
        words
    }

    #[test]
    fn answers_of_cards_are_understood() {
        let key: Vec<u8> = (0..40).collect();
        let table: Vec<u32> = (0..128).map(|entry| entry % 8).collect();
        let rss = parse(&answer(128, &key, [1, 1, 0, 0], &table)).unwrap();
        assert_eq!(rss, Rss { function: RssFunction::Toeplitz, symmetric: 1, key, table });
        // A key that does not fill its last word, and no table.
        let key: Vec<u8> = (0..53).collect();
        let rss = parse(&answer(0, &key, [2, 0, 0, 0], &[])).unwrap();
        assert_eq!((rss.function, rss.key, rss.table.len()), (RssFunction::Xor, key, 0));
        let function = |byte| parse(&answer(0, &[], [byte, 0, 0, 0], &[])).unwrap().function;
        assert_eq!((function(4), function(0)), (RssFunction::Crc32, RssFunction::Other(0)));
    }

    #[test]
    fn answers_that_are_cut_or_absurd_are_errors() {
        let whole = answer(4, &[7; 40], [1, 0, 0, 0], &[0, 1, 2, 3]);
        for length in 0..whole.len() {
            assert_eq!(parse(&whole[..length]).unwrap_err().kind(), io::ErrorKind::InvalidData, "{length}");
        }
        assert!(parse(&answer(u32::MAX, &[], [1, 0, 0, 0], &[])).is_err());
    }

    #[test]
    fn a_device_without_a_hash_has_none() {
        isolated(|| {
            Netlink::open().unwrap().add_veth("rss0", "rss1", None).unwrap();
            assert_eq!(rss("rss0").unwrap(), None);
            assert!(rss("missing0").is_err());
        });
    }
}
