//! How many flows have each port, in memory that this process and a program of the kernel share.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU32;

use super::kernel;
use crate::Result;
use crate::error::Context;

/// Ports there are.
const PORTS: usize = 1 << 16;
const BYTES: usize = PORTS * size_of::<AtomicU32>();

/// A count for each port (or id of an ICMP query), all 0 at first: `as_ref()` has 65,536 of them. Any thread may change one at any
/// time; [`IngressGuard`](crate::ingress_guard::IngressGuard) has a program of the kernel look at them.
#[derive(Debug)]
pub struct PortCounts {
    map: OwnedFd,
    start: NonNull<AtomicU32>,
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
        Ok(Self { map, start })
    }

    /// The map, for a program.
    pub(super) fn map(&self) -> i32 {
        self.map.as_raw_fd()
    }
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
