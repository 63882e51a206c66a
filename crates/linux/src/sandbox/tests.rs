#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::io::{self, ErrorKind, Write as _};
use std::net::UdpSocket;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::Command;

use libc::c_long;

use super::enter;

/// A directory of this test's own, removed in the end.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("anabranch-sandbox-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Runs this in a thread of its own that has entered the sandbox: it holds for a thread and what it starts.
fn inside<T: Send + 'static>(own: &Directory, work: impl FnOnce(PathBuf) -> T + Send + 'static) -> T {
    let path = own.0.clone();
    let thread = std::thread::spawn(move || {
        assert_eq!(enter(&[&path]), Vec::<String>::new());
        work(path)
    });
    thread.join().unwrap()
}

/// The error of a call without arguments that mean anything.
fn error_of(call: c_long, arguments: [c_long; 3]) -> Option<i32> {
    let [a, b, c] = arguments;
    // SAFETY: the calls of these tests are refused; were one not, null pointers and wrong numbers would be.
    let result = unsafe { libc::syscall(call, a, b, c, 0, 0, 0) };
    (result == -1).then(|| io::Error::last_os_error().raw_os_error().unwrap_or(0))
}

#[test]
fn what_a_node_never_does_is_refused() {
    let own = Directory::new("calls");
    let refused = inside(&own, |_| {
        let calls = [
            ("execve", libc::SYS_execve, [0, 0, 0]),
            ("execveat", libc::SYS_execveat, [-1, 0, 0]),
            ("ptrace", libc::SYS_ptrace, [-1, -1, 0]),
            ("process_vm_readv", libc::SYS_process_vm_readv, [-1, 0, 0]),
            ("mount", libc::SYS_mount, [0, 0, 0]),
            ("umount2", libc::SYS_umount2, [0, 0, 0]),
            ("pivot_root", libc::SYS_pivot_root, [0, 0, 0]),
            ("chroot", libc::SYS_chroot, [0, 0, 0]),
            ("unshare", libc::SYS_unshare, [-1, 0, 0]),
            ("setns", libc::SYS_setns, [-1, 0, 0]),
            ("kexec_load", libc::SYS_kexec_load, [0, 0, 0]),
            ("init_module", libc::SYS_init_module, [0, 0, 0]),
            ("reboot", libc::SYS_reboot, [0, 0, 0]),
            ("settimeofday", libc::SYS_settimeofday, [0, 0, 0]),
            ("setuid", libc::SYS_setuid, [-1, 0, 0]),
            ("kill", libc::SYS_kill, [-1, 99, 0]),
            ("io_uring_setup", libc::SYS_io_uring_setup, [0, 0, 0]),
            ("userfaultfd", libc::SYS_userfaultfd, [-1, 0, 0]),
            ("keyctl", libc::SYS_keyctl, [-1, 0, 0]),
            ("open_by_handle_at", libc::SYS_open_by_handle_at, [-1, 0, 0]),
            ("memfd_create", libc::SYS_memfd_create, [0, -1, 0]),
            (
                "socket of another family",
                libc::SYS_socket,
                [libc::AF_ALG.into(), libc::SOCK_SEQPACKET.into(), 0],
            ),
            ("clone into a user namespace", libc::SYS_clone, [libc::CLONE_NEWUSER.into(), 0, 0]),
            ("memory to run", libc::SYS_mprotect, [0, 0, libc::PROT_EXEC.into()]),
            ("prctl", libc::SYS_prctl, [libc::PR_SET_DUMPABLE.into(), 1, 0]),
            ("ioctl that types", libc::SYS_ioctl, [-1, libc::TIOCSTI as c_long, 0]),
        ];
        calls.map(|(name, call, arguments)| (name, error_of(call, arguments)))
    });
    for (name, error) in refused {
        assert_eq!(error, Some(libc::EPERM), "{name}");
    }
}

#[test]
fn memory_is_written_or_run() {
    let own = Directory::new("memory");
    let results = inside(&own, |_| {
        let map = |protection: i32| {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            // SAFETY: new pages, of which nobody knows.
            let place = unsafe { libc::mmap(std::ptr::null_mut(), 4_096, protection, flags, -1, 0) };
            place != libc::MAP_FAILED
        };
        [libc::PROT_READ | libc::PROT_WRITE, libc::PROT_READ | libc::PROT_EXEC, 7].map(map)
    });
    assert_eq!(results, [true, true, false]);
}

#[test]
fn files_elsewhere_are_not_written() {
    let (own, other) = (Directory::new("own"), Directory::new("other"));
    fs::write(other.0.join("there"), "text").unwrap();
    let elsewhere = other.0.clone();
    let errors = inside(&own, move |_| {
        let there = elsewhere.join("there");
        [
            ("appended to", fs::OpenOptions::new().append(true).open(&there).err()),
            ("made", fs::write(elsewhere.join("new"), "").err()),
            ("removed", fs::remove_file(&there).err()),
            ("renamed", fs::rename(&there, elsewhere.join("new")).err()),
            ("a directory made", fs::create_dir(elsewhere.join("new")).err()),
            ("a socket made", UnixListener::bind(elsewhere.join("new")).err()),
            ("passwords", fs::OpenOptions::new().append(true).open("/etc/shadow").err()),
            (
                "a setting of the kernel",
                fs::OpenOptions::new().write(true).open("/proc/sys/kernel/hostname").err(),
            ),
        ]
    });
    for (what, error) in errors {
        assert_eq!(error.map(|error| error.kind()), Some(ErrorKind::PermissionDenied), "{what}");
    }
    assert_eq!(fs::read_to_string(other.0.join("there")).unwrap(), "text");
}

#[test]
fn nothing_is_executed() {
    let own = Directory::new("programs");
    let error = inside(&own, |_| Command::new("/bin/true").status().err().map(|error| error.kind()));
    assert_eq!(error, Some(ErrorKind::PermissionDenied));
}

/// The node's own work, once each; the end-to-end tests do the rest.
#[test]
fn a_node_does_what_it_needs() {
    let own = Directory::new("work");
    inside(&own, |directory| {
        let file = directory.join("state");
        fs::write(&file, "1").unwrap();
        fs::write(file.with_extension("new"), "2").unwrap();
        fs::rename(file.with_extension("new"), &file).unwrap();
        fs::OpenOptions::new().append(true).open(&file).unwrap().write_all(b"3").unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "23");
        fs::create_dir(directory.join("in")).unwrap();
        fs::remove_file(&file).unwrap();
        let _listener = UnixListener::bind(directory.join("socket")).unwrap();
        UdpSocket::bind("127.0.0.1:0").unwrap();
        crate::netlink::Netlink::open().unwrap().links().unwrap();
        assert!(!fs::read_to_string("/etc/passwd").unwrap().is_empty());
        // A thread of its own is in the sandbox as well.
        let inner = std::thread::Builder::new().name("inner".to_owned());
        let error = inner.spawn(|| error_of(libc::SYS_ptrace, [-1, -1, 0])).unwrap().join().unwrap();
        assert_eq!(error, Some(libc::EPERM));
    });
}
