//! Requests that a running node may make of the kernel, and no others: system calls by a filter (seccomp), files by Landlock.
//!
//! Both hold for the thread that calls [`enter`] and for all that it starts, for good. What is refused fails with `EPERM` (calls)
//! or `EACCES` (files), and the kernel's audit log tells of it. Why so, and not otherwise:
//! `docs/decisions/0014-refused-not-killed.md`.

mod landlock;
mod seccomp;

use std::path::Path;

/// Enters the sandbox: files can be read anywhere; written, made and removed only beneath these directories and in
/// `/proc/sys/net`; nothing can be executed. Call it before another thread exists, and after [`crate::launcher::start`]. Returns
/// what could not be done, in words: kernels before 5.13 know no Landlock.
pub fn enter(writable: &[&Path]) -> Vec<String> {
    let mut failed = Vec::new();
    // Without it only root may do either.
    if let Err(error) = rustix::thread::set_no_new_privs(true) {
        failed.push(format!("new rights by programs: {error}"));
    }
    if let Err(error) = landlock::restrict(writable) {
        failed.push(format!("files (Landlock): {error}"));
    }
    if let Err(error) = seccomp::restrict() {
        failed.push(format!("system calls (seccomp): {error}"));
    }
    failed
}

#[cfg(test)]
pub(crate) use seccomp::testing;

#[cfg(test)]
#[path = "sandbox/tests.rs"]
mod tests;
