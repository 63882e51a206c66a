//! The wire form of a table; its layout stands on the page of [`super`].

use super::{BUCKETS_MAX, BucketTable, Chain};

const FORMAT: u8 = 1;
const WIDE: u8 = 0x01;
const RUNS: u8 = 0x02;
const CHAINS: u8 = 0x04;
const KNOWN_FLAGS: u8 = WIDE | RUNS | CHAINS;

/// Longest run that one length byte tells.
const RUN_MAX: usize = 256;

/// Why bytes are not a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DecodeError {
    /// The bytes end before the table does.
    #[error("bucket table is truncated")]
    Truncated,
    /// Bytes are left after the table's end.
    #[error("bytes after the end of the bucket table")]
    Trailing,
    /// Unknown format number.
    #[error("bucket table of unknown format {0}")]
    Format(u8),
    /// Unknown flag.
    #[error("bucket table with unknown flags {0:#04x}")]
    Flags(u8),
    /// More buckets than the reader allows.
    #[error("bucket table of 2^{0} buckets")]
    TooLarge(u8),
    /// Runs tell more buckets than the table has.
    #[error("bucket table with a run beyond its end")]
    Run,
    /// A chain is too long, repeats a unit or holds the bucket's owner.
    #[error("bucket table with an impossible chain")]
    Chain,
}

impl BucketTable {
    /// The wire form without the chains: what a peer needs to send to the right core.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        self.encode_as(false)
    }

    /// The wire form with the chains: what units of a cluster need.
    #[must_use]
    pub fn encode_with_chains(&self) -> Vec<u8> {
        self.encode_as(!self.chains.is_empty())
    }

    /// Reads a table; the bytes must end where it does.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        Self::decode_at_most(bytes, BUCKETS_MAX)
    }

    /// Reads a table of at most `buckets_max` buckets: bounds the memory that the sender of few bytes can claim.
    pub fn decode_at_most(bytes: &[u8], buckets_max: usize) -> Result<Self, DecodeError> {
        let mut reader = Reader { bytes };
        let format = reader.byte()?;
        if format != FORMAT {
            return Err(DecodeError::Format(format));
        }
        let flags = reader.byte()?;
        if flags & !KNOWN_FLAGS != 0 {
            return Err(DecodeError::Flags(flags));
        }
        let era = u32::from_be_bytes([reader.byte()?, reader.byte()?, reader.byte()?, reader.byte()?]);
        let log2 = reader.byte()?;
        let buckets = 1usize.checked_shl(u32::from(log2)).unwrap_or(usize::MAX);
        if buckets > buckets_max.min(BUCKETS_MAX) {
            return Err(DecodeError::TooLarge(log2));
        }
        let wide = flags & WIDE != 0;
        let owners = reader.owners(buckets, wide, flags & RUNS != 0)?;
        let chains = if flags & CHAINS == 0 { Vec::new() } else { reader.chains(&owners, wide)? };
        if !reader.bytes.is_empty() {
            return Err(DecodeError::Trailing);
        }
        Ok(Self::from_parts(era, owners, chains))
    }

    fn encode_as(&self, chains: bool) -> Vec<u8> {
        let wide = self.owners.iter().any(|&unit| unit > 255)
            || (chains && self.chains.iter().any(|chain| chain.units().iter().any(|&unit| unit > 255)));
        let unit_bytes = if wide { 2 } else { 1 };
        let runs = runs(&self.owners).count();
        let coded = runs * (1 + unit_bytes) < self.owners.len() * unit_bytes;

        let mut out = vec![FORMAT, 0];
        out.extend(self.era.to_be_bytes());
        out.push(self.owners.len().trailing_zeros() as u8);
        let mut flags = if wide { WIDE } else { 0 };
        if coded {
            flags |= RUNS;
            for (run, unit) in runs_of(&self.owners) {
                out.push((run - 1) as u8);
                put_unit(&mut out, unit, wide);
            }
        } else {
            for &unit in &self.owners {
                put_unit(&mut out, unit, wide);
            }
        }
        if chains {
            flags |= CHAINS;
            for (run, chain) in runs_of(&self.chains) {
                out.push((run - 1) as u8);
                out.push(chain.len);
                for &unit in chain.units() {
                    put_unit(&mut out, unit, wide);
                }
            }
        }
        out[1] = flags;
        out
    }
}

fn put_unit(out: &mut Vec<u8>, unit: u16, wide: bool) {
    if wide {
        out.extend(unit.to_be_bytes());
    } else {
        out.push(unit as u8);
    }
}

/// Equal neighbors, in slices of at most [`RUN_MAX`].
fn runs<T: PartialEq>(items: &[T]) -> impl Iterator<Item = &[T]> {
    items.chunk_by(|a, b| a == b).flat_map(|run| run.chunks(RUN_MAX))
}

/// Length and value of the runs.
fn runs_of<T: PartialEq + Copy>(items: &[T]) -> impl Iterator<Item = (usize, T)> {
    runs(items).filter_map(|run| run.first().map(|&item| (run.len(), item)))
}

struct Reader<'a> {
    bytes: &'a [u8],
}

impl Reader<'_> {
    fn byte(&mut self) -> Result<u8, DecodeError> {
        let (&byte, rest) = self.bytes.split_first().ok_or(DecodeError::Truncated)?;
        self.bytes = rest;
        Ok(byte)
    }

    fn unit(&mut self, wide: bool) -> Result<u16, DecodeError> {
        let first = self.byte()?;
        if wide { Ok(u16::from_be_bytes([first, self.byte()?])) } else { Ok(u16::from(first)) }
    }

    /// A run's length, which must fit the `room` left in the table.
    fn run(&mut self, room: usize) -> Result<usize, DecodeError> {
        let run = usize::from(self.byte()?) + 1;
        if run > room { Err(DecodeError::Run) } else { Ok(run) }
    }

    fn owners(&mut self, buckets: usize, wide: bool, coded: bool) -> Result<Vec<u16>, DecodeError> {
        // Grows as bytes prove it, at most 256 entries ahead of them: no allocation on the sender's word.
        let mut owners = Vec::new();
        while owners.len() < buckets {
            let run = if coded { self.run(buckets - owners.len())? } else { 1 };
            let unit = self.unit(wide)?;
            owners.resize(owners.len() + run, unit);
        }
        Ok(owners)
    }

    fn chains(&mut self, owners: &[u16], wide: bool) -> Result<Vec<Chain>, DecodeError> {
        let mut chains = Vec::new();
        while chains.len() < owners.len() {
            let run = self.run(owners.len() - chains.len())?;
            let mut chain = Chain::default();
            for _ in 0..self.byte()? {
                if !chain.push_oldest(self.unit(wide)?) {
                    return Err(DecodeError::Chain);
                }
            }
            let end = chains.len() + run;
            let covered = owners.get(chains.len()..end).unwrap_or(&[]);
            if covered.iter().any(|owner| chain.units().contains(owner)) {
                return Err(DecodeError::Chain);
            }
            chains.resize(end, chain);
        }
        Ok(chains)
    }
}
