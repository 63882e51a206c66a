//! The process as a whole: one instance at a time, and resource limits.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::error::Context;
use crate::{Error, Result};

/// Held while an instance runs; the kernel lets it go when the process ends, however it ends.
#[derive(Debug)]
pub struct InstanceLock {
    path: PathBuf,
    _file: File,
}

impl InstanceLock {
    /// Takes the lock of this file, which is made (mode 0600) if it is missing and holds our process id and a note for whoever
    /// comes after our death ([`Self::note`]).
    /// Fails with [`io::ErrorKind::AddrInUse`] and the other's process id if another instance runs. The file
    /// is left behind on purpose: to remove it would let two later instances lock two different files of one
    /// name.
    pub fn acquire(path: &Path, note: &str) -> Result<InstanceLock> {
        let what = format!("lock {}", path.display());
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let mut file = options.open(path).context(&what)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::AGAIN) => {
                let mut text = String::new();
                let read = file.take(NOTE_BYTES_MAX).read_to_string(&mut text);
                let id = text.lines().next().unwrap_or_default().parse::<u32>();
                let process = match (read, id) {
                    (Ok(_), Ok(id)) => format!(" (process {id})"),
                    _ => String::new(),
                };
                let error =
                    io::Error::new(io::ErrorKind::AddrInUse, format!("another instance is running{process}"));
                return Err(Error::new(what, error));
            }
            Err(error) => return Err(error).context(what),
        }
        let write = |file: &mut File| {
            file.set_len(0)?;
            file.seek(SeekFrom::Start(0))?;
            writeln!(file, "{}\n{note}", std::process::id())
        };
        // A full disk only costs the other instance the process id in its error message, and whoever comes later the note.
        if let Err(error) = write(&mut file) {
            tracing::debug!(%error, "process id not written to the lock file");
        }
        Ok(InstanceLock { path: path.to_owned(), _file: file })
    }

    /// Note of the instance that had, or has, the lock of this file.
    pub fn note(path: &Path) -> Option<String> {
        let mut text = String::new();
        File::open(path).ok()?.take(NOTE_BYTES_MAX).read_to_string(&mut text).ok()?;
        text.lines().nth(1).map(str::to_owned)
    }

    /// The locked file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Of a lock's file not more is read.
const NOTE_BYTES_MAX: u64 = 256;

/// Whether this descriptor is a socket.
pub fn is_socket(descriptor: impl AsFd) -> bool {
    rustix::net::sockopt::socket_type(descriptor).is_ok()
}

/// Raises the limit of open files as far as this process may, up to `wanted`; returns the limit now in force.
pub fn raise_open_files(wanted: u64) -> Result<u64> {
    raise(Resource::Nofile, wanted, "raise the limit of open files")
}

/// Raises the limit of locked memory (BPF maps of kernels before 5.11 count against it); returns the limit
/// now in force.
pub fn raise_locked_memory(wanted_bytes: u64) -> Result<u64> {
    raise(Resource::Memlock, wanted_bytes, "raise the limit of locked memory")
}

fn raise(resource: Resource, wanted: u64, what: &str) -> Result<u64> {
    let old = getrlimit(resource);
    let current = old.current.unwrap_or(u64::MAX);
    if current >= wanted {
        return Ok(current);
    }
    // Only a privileged process passes the hard limit; the others stop there.
    if setrlimit(
        resource,
        Rlimit { current: Some(wanted), maximum: old.maximum.map(|hard| hard.max(wanted)) },
    )
    .is_ok()
    {
        return Ok(wanted);
    }
    let reachable = wanted.min(old.maximum.unwrap_or(u64::MAX));
    setrlimit(resource, Rlimit { current: Some(reachable), maximum: old.maximum }).context(what)?;
    Ok(reachable)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn a_second_instance_gets_a_clear_error_and_the_lock_is_free_after_the_first() {
        let name = format!("anabranch-lock-test-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        assert_eq!(InstanceLock::note(&path), None);
        let first = InstanceLock::acquire(&path, "ana0").unwrap();
        assert_eq!(first.path(), path);
        let error = InstanceLock::acquire(&path, "ana1").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        let expected = format!("another instance is running (process {})", std::process::id());
        assert!(error.to_string().contains(&expected), "{error}");
        drop(first);
        assert_eq!(InstanceLock::note(&path).as_deref(), Some("ana0"));
        drop(InstanceLock::acquire(&path, "").unwrap());
        assert_eq!(InstanceLock::note(&path).as_deref(), Some(""));
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_lock_in_a_missing_directory_names_the_file() {
        let error = InstanceLock::acquire(Path::new("/nonexistent/a.lock"), "").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(error.to_string().contains("/nonexistent/a.lock"));
    }

    #[test]
    fn a_socket_is_told_from_a_file() {
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(is_socket(&socket));
        assert!(!is_socket(File::open("/dev/null").unwrap()));
    }

    #[test]
    fn limits_never_go_down() {
        let files = raise_open_files(1).unwrap();
        assert!(files > 1);
        assert!(raise_open_files(files).unwrap() >= files);
        assert!(raise_locked_memory(1).unwrap() >= 1);
    }
}
