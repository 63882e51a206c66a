//! News of the hypervisor that this machine goes on from a snapshot: the kernel's `vmgenid` driver announces them to device listeners.

use std::os::fd::OwnedFd;

use super::{open_protocol, receive};
use crate::Result;
use crate::error::Context;

/// Group of the kernel's own announcements; 2 is udev's.
const KERNEL_GROUP: u32 = 1;
/// Longest announcement (`UEVENT_BUFFER_SIZE`), and what stands before it.
const BUFFER_BYTES: usize = 4_096;
/// Announcements looked at in one call at most.
const MESSAGES_MAX: usize = 64;

/// Listens for a new generation of this virtual machine.
#[derive(Debug)]
pub struct VmGenerationMonitor {
    fd: OwnedFd,
    buffer: Box<[u8]>,
}

impl VmGenerationMonitor {
    /// Opens a monitor; needs no privilege.
    ///
    /// # Errors
    /// Those of `socket` and `bind`.
    pub fn open() -> Result<Self> {
        let fd = open_protocol(libc::NETLINK_KOBJECT_UEVENT, KERNEL_GROUP)
            .context("open a monitor for a new generation of this virtual machine")?;
        Ok(Self { fd, buffer: vec![0; BUFFER_BYTES].into_boxed_slice() })
    }

    /// Whether one was announced since the last call. Never blocks.
    pub fn is_new(&mut self) -> bool {
        let mut new = false;
        for _ in 0..MESSAGES_MAX {
            match receive(&self.fd, &mut self.buffer, libc::MSG_DONTWAIT) {
                Ok(length) => new |= announces(self.buffer.get(..length).unwrap_or_default()),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {}
                Err(_) => break,
            }
        }
        new
    }
}

/// Whether a message announces a new generation: "change@DEVICE", then variables, each with a zero behind.
fn announces(message: &[u8]) -> bool {
    let mut words = message.split(|byte| *byte == 0);
    words.next().is_some_and(|action| action.starts_with(b"change@"))
        && words.any(|word| word == b"NEW_VMGENID=1")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn a_new_generation_is_told_from_other_news() {
        let message = b"change@/devices/LNXSYSTM:00/QEMUVGID:00\0ACTION=change\0SUBSYSTEM=acpi\0NEW_VMGENID=1\0SEQNUM=4711\0";
        assert!(announces(message));
        assert!(!announces(b"change@/devices/virtual/net/lo\0ACTION=change\0SUBSYSTEM=net\0SEQNUM=12\0"));
        assert!(!announces(b"add@/devices/x\0NEW_VMGENID=1\0"));
        assert!(!announces(b"change@/devices/x\0SYNTH_ARG_NEW_VMGENID=1\0NEW_VMGENID=10\0"));
        assert!(!announces(b""));
    }

    #[test]
    fn it_listens_to_the_kernel_without_privileges() {
        let mut monitor = VmGenerationMonitor::open().unwrap();
        assert!(!monitor.is_new());
    }
}
