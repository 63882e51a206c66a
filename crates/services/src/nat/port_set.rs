//! A set of ports, and blocks of 1,024 of them.

/// Words of 64 ports.
pub(crate) const WORDS: usize = 1024;

/// Ports of one block: the unit in which ports are leased.
pub const BLOCK_PORTS: u32 = 1024;

/// A set of blocks of one address: bit `i` is ports `1024 × i` to `1024 × i + 1023`.
pub type Blocks = u64;

/// Every block.
pub const ALL_BLOCKS: Blocks = u64::MAX;

/// A set of ports of one address: 8 KB.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PortSet {
    words: Vec<u64>,
}

impl Default for PortSet {
    fn default() -> Self {
        Self { words: vec![0; WORDS] }
    }
}

impl PortSet {
    /// The ports `first..=last` without those in `reserved` (inclusive ranges), and never port 0.
    #[must_use]
    pub fn new((first, last): (u16, u16), reserved: &[(u16, u16)]) -> Self {
        let mut set = Self::default();
        for port in first..=last {
            set.insert(port);
        }
        for &(first, last) in reserved {
            for port in first..=last {
                set.remove(port);
            }
        }
        set.remove(0);
        set
    }

    /// Adds a port.
    pub fn insert(&mut self, port: u16) {
        if let Some(word) = self.words.get_mut(usize::from(port >> 6)) {
            *word |= 1 << (port & 63);
        }
    }

    /// Takes a port out; false if it was not in.
    pub fn remove(&mut self, port: u16) -> bool {
        let Some(word) = self.words.get_mut(usize::from(port >> 6)) else { return false };
        let before = *word;
        *word &= !(1 << (port & 63));
        *word != before
    }

    /// Whether a port is in.
    #[must_use]
    pub fn contains(&self, port: u16) -> bool {
        self.word(usize::from(port >> 6)) >> (port & 63) & 1 == 1
    }

    /// The even ones, or the odd ones.
    #[must_use]
    pub fn of_parity(&self, odd: bool) -> Self {
        let half = if odd { 0xaaaa_aaaa_aaaa_aaaa } else { 0x5555_5555_5555_5555 };
        Self { words: self.words.iter().map(|word| word & half).collect() }
    }

    /// How many ports are in, 0–65,536.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.words.iter().map(|word| word.count_ones()).sum()
    }

    /// Whether none is in.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// The blocks all of whose ports are in.
    #[must_use]
    pub fn whole_blocks(&self) -> Blocks {
        let blocks = self.words.chunks(WORDS / 64).enumerate();
        let whole = blocks.filter(|(_, words)| words.iter().all(|word| *word == u64::MAX));
        whole.fold(0, |all, (block, _)| all | 1 << block)
    }

    /// The blocks some of whose ports are in.
    #[must_use]
    pub fn some_blocks(&self) -> Blocks {
        let blocks = self.words.chunks(WORDS / 64).enumerate();
        let some = blocks.filter(|(_, words)| words.iter().any(|word| *word != 0));
        some.fold(0, |all, (block, _)| all | 1 << block)
    }

    /// Ports `64 × word` to `64 × word + 63`.
    #[inline]
    #[must_use]
    pub(crate) fn word(&self, word: usize) -> u64 {
        self.words.get(word).copied().unwrap_or(0)
    }

    /// The ports in, rising.
    pub fn iter(&self) -> impl Iterator<Item = u16> + '_ {
        (0..=u16::MAX).filter(|port| self.contains(*port))
    }
}

/// The block of a port.
#[inline]
#[must_use]
pub const fn block_of(port: u16) -> u32 {
    (port >> 10) as u32
}

#[cfg(test)]
mod tests;
