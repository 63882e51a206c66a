//! Which queue of a TUN device a packet goes to: an eBPF program that computes our flow hash.
//!
//! The program is written out for one hash key. It reads an IP packet (also a super-packet) exactly as
//! [`packet::flow::FlowKey::of`] does: IPv4 options and up to eight IPv6 extension headers are skipped,
//! fragments and protocols without ports go by addresses, ICMP queries by their identifier, ICMP errors by
//! the packet they quote. It hashes the key exactly as [`steering::symmetric::FlowHasher::hash`] does, with
//! the same per-byte tables, which lie in a map, and returns the owner of the core's bucket from a second
//! map, which [`SteeringProgram::update_table`] replaces while packets flow. What is no IP packet goes to
//! queue 0, whose worker counts and drops it.

mod generate;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use steering::symmetric::FlowHasher;

use super::kernel;
use crate::error::Context;
use crate::{Error, Result};

/// Buckets of the largest core table that the program takes.
pub const TABLE_BUCKETS_MAX: usize = 1 << 16;

/// Buckets the map has at least, so that a table may grow later.
const BUCKETS_MIN: usize = 1 << 10;

/// A loaded program for [`crate::tun::Tun::attach_steering`].
#[derive(Debug)]
pub struct SteeringProgram {
    program: OwnedFd,
    owners: OwnedFd,
    buckets: usize,
}

impl SteeringProgram {
    /// Loads the program for this hash, for packets of one tenant (0 if there are none), and the owners of the
    /// core's buckets (a power of two, at most [`TABLE_BUCKETS_MAX`]; each owner is a queue number).
    /// `PermissionDenied` without CAP_BPF.
    pub fn load(hasher: &FlowHasher, tenant: u16, owners: &[u16]) -> Result<SteeringProgram> {
        const WHAT: &str = "load the program that steers TUN packets to their cores";
        let buckets = owners.len().clamp(BUCKETS_MIN, TABLE_BUCKETS_MAX);
        let table = table_bytes(hasher, tenant);
        let tables = kernel::create_value(table.len()).context(WHAT)?;
        // SAFETY: the map was made with this length.
        unsafe { kernel::write_value(&tables, &table) }.context(WHAT)?;
        let owners_map = kernel::create_value(buckets * 2).context(WHAT)?;
        let code = generate::program(tables.as_raw_fd(), owners_map.as_raw_fd(), buckets)
            .ok_or_else(|| Error::new(WHAT, io::ErrorKind::InvalidData.into()))?;
        let program = kernel::load_socket_filter(&code).context(WHAT)?;
        let steering = SteeringProgram { program, owners: owners_map, buckets };
        steering.update_table(owners)?;
        Ok(steering)
    }

    /// Replaces the owners; in force for the next packet. The number of buckets may change, but not above the
    /// larger of 1,024 and what the program was loaded with. The kernel copies the table while packets are
    /// steered by it: for some nanoseconds a part of the buckets is old and a part is new.
    pub fn update_table(&self, owners: &[u16]) -> Result<()> {
        if !owners.len().is_power_of_two() || owners.len() > self.buckets {
            let text = format!("{} buckets: not a power of two up to {}", owners.len(), self.buckets);
            let error = io::Error::new(io::ErrorKind::InvalidInput, text);
            return Err(Error::new("update the table that steers TUN packets", error));
        }
        let bytes = owner_bytes(owners, self.buckets);
        // SAFETY: the map was made for this number of buckets.
        unsafe { kernel::write_value(&self.owners, &bytes) }
            .context("update the table that steers TUN packets")
    }
}

/// The tables as the map holds them: per byte of the hash input, then what each protocol mixes in.
fn table_bytes(hasher: &FlowHasher, tenant: u16) -> Vec<u8> {
    let mix: Vec<u32> = (0..=u8::MAX).map(|protocol| steering::symmetric::mix(protocol, tenant)).collect();
    let words = hasher.tables().iter().flatten().chain(&mix);
    words.flat_map(|word| word.to_ne_bytes()).collect()
}

/// The owners as the map holds them. A table of fewer buckets looks at fewer bits of the hash: repeating it
/// is the same table.
fn owner_bytes(owners: &[u16], buckets: usize) -> Vec<u8> {
    owners.iter().cycle().take(buckets).flat_map(|owner| owner.to_ne_bytes()).collect()
}

impl AsFd for SteeringProgram {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.program.as_fd()
    }
}

#[cfg(test)]
mod tests;
