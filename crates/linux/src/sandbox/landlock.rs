//! Files by Landlock (`Documentation/userspace-api/landlock.rst`): what is handled is refused but where a rule allows it.

use std::fs::OpenOptions;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use crate::sys::owned;

// linux/landlock.h, `LANDLOCK_ACCESS_FS_…`.
const WRITE_FILE: u64 = 1 << 1;
const READ_FILE: u64 = 1 << 2;
const READ_DIRECTORY: u64 = 1 << 3;
const REMOVE_DIRECTORY: u64 = 1 << 4;
const REMOVE_FILE: u64 = 1 << 5;
const MAKE_DIRECTORY: u64 = 1 << 7;
const MAKE_FILE: u64 = 1 << 8;
const MAKE_SOCKET: u64 = 1 << 9;
const TRUNCATE: u64 = 1 << 14;
const DEVICE_IOCTL: u64 = 1 << 15;

/// Rights that the first version of the interface knows: all until `MAKE_SYM`.
const FIRST_RIGHTS: u64 = (1 << 13) - 1;
/// Rights that came with a version: linking to other directories, [`TRUNCATE`], [`DEVICE_IOCTL`].
const LATER_RIGHTS: [(i32, u64); 3] = [(2, 1 << 13), (3, TRUNCATE), (5, DEVICE_IOCTL)];
/// The version that knows `LANDLOCK_SCOPE_SIGNAL`: no signals to processes outside.
const SCOPES_SINCE: i32 = 6;
const SCOPE_SIGNAL: u64 = 1 << 1;

const READ: u64 = READ_FILE | READ_DIRECTORY;
const WRITE: u64 = WRITE_FILE | TRUNCATE;
const CHANGE: u64 = READ | WRITE | REMOVE_DIRECTORY | REMOVE_FILE | MAKE_DIRECTORY | MAKE_FILE | MAKE_SOCKET;

/// `LANDLOCK_CREATE_RULESET_VERSION`
const TELL_VERSION: u32 = 1;
/// `LANDLOCK_RULE_PATH_BENEATH`
const PATH_BENEATH: u32 = 1;

/// `struct landlock_ruleset_attr`
#[repr(C)]
struct RulesetAttributes {
    files: u64,
    network: u64,
    scoped: u64,
}

/// `struct landlock_path_beneath_attr`
#[repr(C, packed)]
struct PathBeneath {
    allowed: u64,
    parent: i32,
}

pub(super) fn restrict(writable: &[&Path]) -> io::Result<()> {
    let version = version()?;
    let later = LATER_RIGHTS.iter().filter(|(since, _)| version >= *since);
    let handled = later.fold(FIRST_RIGHTS, |rights, (_, more)| rights | more);
    let rules = make(handled, version)?;
    allow(&rules, handled, Path::new("/"), READ)?;
    let settings = ["/proc/sys/net"].map(|path| (Path::new(path), READ | WRITE));
    let devices = [("/dev/net/tun", WRITE | READ_FILE | DEVICE_IOCTL), ("/dev/null", WRITE | READ_FILE)];
    let devices = devices.map(|(path, rights)| (Path::new(path), rights));
    let own = writable.iter().map(|path| (*path, CHANGE));
    for (path, rights) in settings.into_iter().chain(devices).chain(own) {
        match allow(&rules, handled, path, rights) {
            // What is not there cannot be used: a system without TUN, a log directory that nobody has made.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
    }
    // SAFETY: takes a descriptor and flags.
    check(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, rules.as_raw_fd(), 0u32) }).map(drop)
}

fn version() -> io::Result<i32> {
    let nothing = std::ptr::null::<RulesetAttributes>();
    // SAFETY: with this flag there are no attributes.
    check(unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, nothing, 0usize, TELL_VERSION) })
}

fn make(files: u64, version: i32) -> io::Result<OwnedFd> {
    let scoped = if version >= SCOPES_SINCE { SCOPE_SIGNAL } else { 0 };
    let attributes = RulesetAttributes { files, network: 0, scoped };
    // Zeros at the end are what older kernels take a shorter structure for.
    let bytes = size_of::<RulesetAttributes>();
    // SAFETY: the attributes outlive the call, which reads so many bytes of them.
    owned(check(unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::from_ref(&attributes), bytes, 0u32)
    })?)
}

fn allow(rules: &OwnedFd, handled: u64, path: &Path, rights: u64) -> io::Result<()> {
    let parent = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path)?;
    let rule = PathBeneath { allowed: rights & handled, parent: parent.as_raw_fd() };
    // SAFETY: the rule and its descriptor outlive the call, which only reads.
    check(unsafe {
        libc::syscall(
            libc::SYS_landlock_add_rule,
            rules.as_raw_fd(),
            PATH_BENEATH,
            std::ptr::from_ref(&rule),
            0u32,
        )
    })
    .map(drop)
}

fn check(result: libc::c_long) -> io::Result<i32> {
    crate::sys::check(i32::try_from(result).unwrap_or(-1))
}
