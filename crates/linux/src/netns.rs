//! Network namespaces: making one, working inside one, starting programs inside one, and becoming root of
//! one's own user namespace as an ordinary user.
//!
//! A namespace belongs to a thread. [`Namespace::run`] therefore works on a thread of its own, so that the
//! caller never finds itself in another network. Sockets, TUN devices and netlink sessions stay in the
//! namespace where they were opened, wherever they are used afterwards.

use std::ffi::CStr;
use std::fmt;
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use crate::error::Context;
use crate::sys::check;
use crate::{Error, Result};

/// A network namespace, kept alive by this handle; it vanishes with the last handle, thread and socket in it.
#[derive(Debug)]
pub struct Namespace {
    fd: OwnedFd,
}

impl Namespace {
    /// A new anonymous namespace with nothing but a loopback interface, which is switched on.
    /// Needs CAP_SYS_ADMIN, in the user namespace at least ([`enter_user_namespace`]).
    pub fn create() -> Result<Namespace> {
        on_own_thread(|| {
            // SAFETY: `unshare` has no memory effects; only this short-lived thread changes its namespace.
            check(unsafe { libc::unshare(libc::CLONE_NEWNET) }).context(
                "create a network namespace (needs root, or a user namespace where the system allows them)",
            )?;
            let namespace = Namespace::current()?;
            crate::netlink::Netlink::open()?.set_up(1, true)?;
            Ok(namespace)
        })
    }

    /// The namespace of the calling thread.
    pub fn current() -> Result<Namespace> {
        Namespace::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// The namespace behind a file such as `/proc/1/ns/net` or `/run/netns/blue`.
    pub fn open(path: &Path) -> Result<Namespace> {
        let file = fs::File::open(path).context(format_args!("open the namespace {}", path.display()))?;
        Ok(Namespace { fd: file.into() })
    }

    /// A second handle.
    pub fn try_clone(&self) -> Result<Namespace> {
        Ok(Namespace { fd: self.fd.try_clone().context("duplicate a namespace handle")? })
    }

    /// Whether two handles name the same namespace.
    pub fn is_same(&self, other: &Namespace) -> Result<bool> {
        let a = rustix::fs::fstat(&self.fd).context("look at a namespace")?;
        let b = rustix::fs::fstat(&other.fd).context("look at a namespace")?;
        Ok((a.st_dev, a.st_ino) == (b.st_dev, b.st_ino))
    }

    /// Runs `work` inside, on a thread of its own, and waits for it. A panic inside goes on in the caller.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        on_own_thread(|| {
            self.enter()?;
            Ok(work())
        })
    }

    /// Moves the calling thread, for good, into this namespace. Threads it starts from now on are inside too.
    pub fn enter(&self) -> Result<()> {
        // SAFETY: `setns` has no memory effects.
        check(unsafe { libc::setns(self.fd.as_raw_fd(), libc::CLONE_NEWNET) })
            .map(drop)
            .context("enter a network namespace")
    }

    /// Lets `command` start inside this namespace, with no signal blocked.
    pub fn prepare_command(&self, command: &mut Command) -> Result<()> {
        let namespace = self.try_clone()?;
        prepare_command(command);
        // SAFETY: the closure only makes one system call and allocates nothing, as is required between fork
        // and exec.
        unsafe {
            command
                .pre_exec(move || check(libc::setns(namespace.fd.as_raw_fd(), libc::CLONE_NEWNET)).map(drop));
        }
        Ok(())
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn on_own_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("netns".into()).spawn_scoped(scope, work);
        match thread.context("start a thread")?.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Lets a child program start with no signal blocked: [`crate::event::Signals`] blocks some in us, and masks are
/// inherited.
pub fn prepare_command(command: &mut Command) {
    // SAFETY: only async-signal-safe calls between fork and exec, no allocation.
    unsafe {
        command.pre_exec(|| {
            let mut none = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
            libc::sigemptyset(none.as_mut_ptr());
            check(libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut())).map(drop)
        });
    }
}

/// Has the kernel kill the child when the *thread* that starts it ends, so that nothing is left behind even
/// when this process is killed. Start such a child from a thread that lives long enough, not from
/// [`Namespace::run`].
pub fn die_with_thread(command: &mut Command) {
    // SAFETY: one system call between fork and exec, no allocation.
    unsafe {
        command.pre_exec(|| check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL)).map(drop));
    }
}

/// Whether this process may make and change network namespaces (CAP_SYS_ADMIN and CAP_NET_ADMIN).
pub fn is_privileged() -> bool {
    const NET_ADMIN: u32 = 12;
    const SYS_ADMIN: u32 = 21;
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
    [NET_ADMIN, SYS_ADMIN].iter().all(|bit| bits & (1 << bit) != 0)
}

/// Makes this process root of a user namespace of its own, with the present user and group mapped to 0, and
/// moves it into a new network namespace whose loopback is on. Call it in `main` before any other thread
/// exists: the kernel refuses it to a process with several threads.
pub fn enter_user_namespace() -> Result<()> {
    enter_raw().map_err(|error| Error::new(USER_NAMESPACE_REFUSED, error))?;
    crate::netlink::Netlink::open()?.set_up(1, true)
}

/// Advice where user namespaces are switched off.
pub(crate) const USER_NAMESPACE_REFUSED: &str = "enter a user namespace (root is needed on this system, \
     or kernel.unprivileged_userns_clone / kernel.apparmor_restrict_unprivileged_userns must allow it)";

/// Lets `command` start as root of a user namespace of its own, in a new network namespace (whose loopback is
/// off). This works for a process with several threads too.
pub fn prepare_command_in_user_namespace(command: &mut Command) {
    prepare_command(command);
    // SAFETY: only system calls and formatting into the stack between fork and exec; no allocation.
    unsafe {
        command.pre_exec(enter_raw);
    }
}

/// New user and network namespaces, with the present user and group as root. Allocates nothing.
fn enter_raw() -> io::Result<()> {
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    // SAFETY: `unshare` has no memory effects.
    check(unsafe { libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNET) })?;
    // Without this the kernel lets nobody map a group.
    write_raw(c"/proc/self/setgroups", format_args!("deny"))?;
    write_raw(c"/proc/self/uid_map", format_args!("0 {uid} 1"))?;
    write_raw(c"/proc/self/gid_map", format_args!("0 {gid} 1"))
}

/// Writes a short file of `/proc` in one system call and without allocating.
fn write_raw(path: &CStr, text: fmt::Arguments<'_>) -> io::Result<()> {
    let mut bytes = [0u8; 64];
    let mut rest = &mut bytes[..];
    rest.write_fmt(text)?;
    let unused = rest.len();
    let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, rustix::fs::Mode::empty())?;
    rustix::io::write(&file, &bytes[..bytes.len() - unused])?;
    Ok(())
}

/// Writes a kernel setting such as `net.ipv4.ip_forward` of the calling thread's network namespace. Interface
/// names with dots are written with `/` in their place, as `sysctl` does.
pub fn set_sysctl(name: &str, value: &str) -> Result<()> {
    let path = sysctl_path(name);
    fs::write(&path, value).context(format_args!("set {name} = {value}"))
}

/// Reads a kernel setting, without the line end.
pub fn sysctl(name: &str) -> Result<String> {
    let text = fs::read_to_string(sysctl_path(name)).context(format_args!("read {name}"))?;
    Ok(text.trim_end().to_owned())
}

/// The ports from which the kernel takes those of its own connections, first and last
/// (`net.ipv4.ip_local_port_range`), in the calling thread's network namespace.
pub fn local_port_range() -> Result<(u16, u16)> {
    const NAME: &str = "net.ipv4.ip_local_port_range";
    let text = sysctl(NAME)?;
    let mut words = text.split_whitespace().map(str::parse::<u16>);
    match (words.next(), words.next()) {
        (Some(Ok(first)), Some(Ok(last))) if first <= last => Ok((first, last)),
        _ => {
            let error = io::Error::new(io::ErrorKind::InvalidData, format!("not a range of ports: {text:?}"));
            Err(Error::new(format!("read {NAME}"), error))
        }
    }
}

fn sysctl_path(name: &str) -> String {
    let swap = |letter| match letter {
        '.' => '/',
        '/' => '.',
        other => other,
    };
    format!("/proc/sys/{}", name.chars().map(swap).collect::<String>())
}

#[cfg(test)]
mod tests;
