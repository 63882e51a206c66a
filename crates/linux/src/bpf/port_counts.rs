//! How many flows have each port, in memory that this process and a program of the kernel share, and of which addresses.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU32;
use std::sync::{Mutex, PoisonError};

use super::kernel;
use crate::Result;
use crate::error::Context;

/// Ports there are.
const PORTS: usize = 1 << 16;
const BYTES: usize = PORTS * size_of::<AtomicU32>();
/// Addresses that are told to the kernel at most.
const ADDRESSES_MAX: u32 = 16_384;

/// A count for each port (or id of an ICMP query), all 0 at first: `as_ref()` has 65,536 of them. Any thread may change one at any
/// time; [`IngressGuard`](crate::ingress_guard::IngressGuard) has a program of the kernel look at them.
#[derive(Debug)]
pub struct PortCounts {
    map: OwnedFd,
    start: NonNull<AtomicU32>,
    addresses: OwnedFd,
    known: Mutex<BTreeSet<IpAddr>>,
}

// SAFETY: the mapping belongs to this value, and is reached by shared references to atomics only.
unsafe impl Send for PortCounts {}
// SAFETY: as above.
unsafe impl Sync for PortCounts {}

impl PortCounts {
    /// New ones. `PermissionDenied` without CAP_BPF.
    pub fn new() -> Result<Self> {
        const WHAT: &str = "share the ports in use with the kernel";
        let map = kernel::create_shared_value(BYTES).context(WHAT)?;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(crate::Error::new(WHAT, io::Error::last_os_error()));
        }
        let start = NonNull::new(start.cast())
            .ok_or_else(|| crate::Error::new(WHAT, io::Error::from(io::ErrorKind::InvalidData)))?;
        let addresses = kernel::create_set(ADDRESSES_MAX).context(WHAT)?;
        Ok(Self { map, start, addresses, known: Mutex::default() })
    }

    /// Says whose ports these are, of the host's addresses: what the host sends from another one is no matter.
    ///
    /// # Errors
    /// Of more than 16,384 addresses only some are known then.
    pub fn set_addresses(&self, addresses: &BTreeSet<IpAddr>) -> Result<()> {
        const WHAT: &str = "share the addresses of flows with the kernel";
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let gone: Vec<IpAddr> = known.difference(addresses).copied().collect();
        for address in gone {
            kernel::change_set(&self.addresses, &key_of(address), false).context(WHAT)?;
            known.remove(&address);
        }
        let new: Vec<IpAddr> = addresses.difference(&known).copied().collect();
        for address in new {
            kernel::change_set(&self.addresses, &key_of(address), true).context(WHAT)?;
            known.insert(address);
        }
        Ok(())
    }

    /// The set of the addresses, for a program: keys as [`key_of`] makes them.
    pub(super) fn addresses(&self) -> i32 {
        self.addresses.as_raw_fd()
    }

    /// The map, for a program.
    pub(super) fn map(&self) -> i32 {
        self.map.as_raw_fd()
    }
}

/// An address as the kernel's program has it: four words in the host's byte order, of IPv4 as in an IPv6 address that stands for one.
fn key_of(address: IpAddr) -> [u8; 16] {
    let octets = match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    };
    let mut key = [0; 16];
    for (to, from) in key.as_chunks_mut::<4>().0.iter_mut().zip(octets.as_chunks::<4>().0) {
        *to = u32::from_be_bytes(*from).to_ne_bytes();
    }
    key
}

impl AsRef<[AtomicU32]> for PortCounts {
    fn as_ref(&self) -> &[AtomicU32] {
        // SAFETY: the mapping is that long, aligned to a page, zeroed by the kernel, and lives as long as this value.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), PORTS) }
    }
}

impl Drop for PortCounts {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length, and no reference outlives this value.
        unsafe { libc::munmap(self.start.as_ptr().cast(), BYTES) };
    }
}
