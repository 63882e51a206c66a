//! Numbers, addresses and lists as bytes: what messages and stored state are made of. Big endian.
//!
//! The reader takes nothing on the sender's word: a list grows as its entries are read, so that bytes which claim much
//! and hold little cost little.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use steering::table::{BucketTable, DecodeError};

/// Why bytes are not what they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The bytes end too early.
    #[error("the bytes end before the {0}")]
    Truncated(&'static str),
    /// Bytes are left.
    #[error("{0} bytes after the end")]
    Trailing(usize),
    /// A field has a value that it cannot have.
    #[error("{0} is {1}, which it cannot be")]
    Value(&'static str, u64),
    /// A bucket table is none.
    #[error(transparent)]
    Table(#[from] DecodeError),
    /// A name is not one.
    #[error("{0} is not 1 to 15 letters, digits, dots, dashes or underscores")]
    Name(&'static str),
}

/// Longest name: that of a Linux interface.
pub const NAME_BYTES_MAX: usize = 15;

/// Bytes that are read from the front.
pub struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Reads `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    /// Whether all was read.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The end: nothing may be left.
    pub fn end(&self) -> Result<(), CodecError> {
        if self.bytes.is_empty() { Ok(()) } else { Err(CodecError::Trailing(self.bytes.len())) }
    }

    /// The next `count` bytes; `name` is the field's, for the error.
    pub fn take(&mut self, count: usize, name: &'static str) -> Result<&'a [u8], CodecError> {
        let (taken, rest) = self.bytes.split_at_checked(count).ok_or(CodecError::Truncated(name))?;
        self.bytes = rest;
        Ok(taken)
    }

    /// The next `N` bytes.
    pub fn array<const N: usize>(&mut self, name: &'static str) -> Result<[u8; N], CodecError> {
        let (taken, rest) = self.bytes.split_first_chunk().ok_or(CodecError::Truncated(name))?;
        self.bytes = rest;
        Ok(*taken)
    }

    /// One byte.
    pub fn u8(&mut self, name: &'static str) -> Result<u8, CodecError> {
        Ok(self.array::<1>(name)?[0])
    }

    /// Two bytes.
    pub fn u16(&mut self, name: &'static str) -> Result<u16, CodecError> {
        self.array(name).map(u16::from_be_bytes)
    }

    /// Four bytes.
    pub fn u32(&mut self, name: &'static str) -> Result<u32, CodecError> {
        self.array(name).map(u32::from_be_bytes)
    }

    /// Eight bytes.
    pub fn u64(&mut self, name: &'static str) -> Result<u64, CodecError> {
        self.array(name).map(u64::from_be_bytes)
    }

    /// A byte that is 0 or 1.
    pub fn flag(&mut self, name: &'static str) -> Result<bool, CodecError> {
        match self.u8(name)? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(CodecError::Value(name, other.into())),
        }
    }

    /// A number in as few bytes as it needs, 7 bits in each, the low ones first; the top bit says that more follow.
    pub fn varint(&mut self, name: &'static str) -> Result<u32, CodecError> {
        let mut value = 0u64;
        for place in 0..5 {
            let byte = self.u8(name)?;
            value |= u64::from(byte & 0x7f) << (7 * place);
            if byte & 0x80 == 0 {
                // One way to write each number: no zero byte at the end.
                let shortest = place == 0 || byte != 0;
                let number = u32::try_from(value).ok().filter(|_| shortest);
                return number.ok_or(CodecError::Value(name, value));
            }
        }
        Err(CodecError::Value(name, value))
    }

    /// An address: family, 4 or 6, and its bytes.
    pub fn address(&mut self, name: &'static str) -> Result<IpAddr, CodecError> {
        match self.u8(name)? {
            4 => self.array::<4>(name).map(|bytes| Ipv4Addr::from(bytes).into()),
            6 => self.array::<16>(name).map(|bytes| Ipv6Addr::from(bytes).into()),
            family => Err(CodecError::Value(name, family.into())),
        }
    }

    /// A node id.
    pub fn node(&mut self, name: &'static str) -> Result<u16, CodecError> {
        let node = self.u16(name)?;
        if node < steering::units::NODES_MAX { Ok(node) } else { Err(CodecError::Value(name, node.into())) }
    }

    /// A name: length and letters.
    pub fn name(&mut self, name: &'static str) -> Result<String, CodecError> {
        let bytes = usize::from(self.u8(name)?);
        let text = str::from_utf8(self.take(bytes, name)?).map_err(|_| CodecError::Name(name))?;
        if is_name(text) { Ok(text.to_owned()) } else { Err(CodecError::Name(name)) }
    }

    /// A bucket table with chains: length and bytes.
    pub fn table(&mut self) -> Result<BucketTable, CodecError> {
        let bytes = self.u32("length of a table")?;
        let bytes = self.take(usize::try_from(bytes).unwrap_or(usize::MAX), "table")?;
        Ok(BucketTable::decode(bytes)?)
    }

    /// As many entries as a 16-bit count says.
    pub fn list<T>(
        &mut self,
        name: &'static str,
        mut entry: impl FnMut(&mut Self) -> Result<T, CodecError>,
    ) -> Result<Vec<T>, CodecError> {
        let count = self.u16(name)?;
        // Grows with what is there, not with what is claimed.
        let mut entries = Vec::new();
        for _ in 0..count {
            entries.push(entry(self)?);
        }
        Ok(entries)
    }
}

/// Whether a text can be the name of an interface.
#[must_use]
pub fn is_name(text: &str) -> bool {
    let letters = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    (1..=NAME_BYTES_MAX).contains(&text.len()) && letters
}

/// Bytes that are written one behind the other.
pub struct Writer<'a> {
    out: &'a mut Vec<u8>,
}

impl<'a> Writer<'a> {
    /// Writes behind what `out` holds.
    pub fn new(out: &'a mut Vec<u8>) -> Self {
        Self { out }
    }

    /// Bytes as they are.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }

    /// One byte.
    pub fn u8(&mut self, value: u8) {
        self.out.push(value);
    }

    /// Two bytes.
    pub fn u16(&mut self, value: u16) {
        self.bytes(&value.to_be_bytes());
    }

    /// Four bytes.
    pub fn u32(&mut self, value: u32) {
        self.bytes(&value.to_be_bytes());
    }

    /// Eight bytes.
    pub fn u64(&mut self, value: u64) {
        self.bytes(&value.to_be_bytes());
    }

    /// A number in as few bytes as it needs.
    pub fn varint(&mut self, mut value: u32) {
        while value >= 0x80 {
            self.u8(value as u8 | 0x80);
            value >>= 7;
        }
        self.u8(value as u8);
    }

    /// An address.
    pub fn address(&mut self, address: IpAddr) {
        match address {
            IpAddr::V4(address) => {
                self.u8(4);
                self.bytes(&address.octets());
            }
            IpAddr::V6(address) => {
                self.u8(6);
                self.bytes(&address.octets());
            }
        }
    }

    /// A name; longer ones are cut, which [`is_name`] prevents.
    pub fn name(&mut self, name: &str) {
        let bytes = name.as_bytes();
        let bytes = bytes.get(..NAME_BYTES_MAX).unwrap_or(bytes);
        self.u8(bytes.len() as u8);
        self.bytes(bytes);
    }

    /// A bucket table with its chains.
    pub fn table(&mut self, table: &BucketTable) {
        let bytes = table.encode_with_chains();
        self.u32(bytes.len() as u32);
        self.bytes(&bytes);
    }

    /// A list with its 16-bit count; entries beyond that are left out, which limits prevent.
    pub fn list<T>(&mut self, entries: &[T], mut entry: impl FnMut(&mut Self, &T)) {
        let entries = entries.get(..usize::from(u16::MAX)).unwrap_or(entries);
        self.u16(entries.len() as u16);
        for each in entries {
            entry(self, each);
        }
    }
}
