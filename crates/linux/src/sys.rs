//! The few raw helpers which the other modules share.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Turns the `-1` of a libc call into the error of `errno`.
pub(crate) fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// As [`check`] for calls that return a byte count.
pub(crate) fn check_size(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Takes ownership of a descriptor that a system call has just returned.
pub(crate) fn owned(result: libc::c_int) -> io::Result<OwnedFd> {
    let fd: RawFd = check(result)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `setsockopt` with a plain value.
pub(crate) fn set_option<T: Copy>(
    socket: impl AsFd,
    level: libc::c_int,
    name: libc::c_int,
    value: &T,
) -> io::Result<()> {
    let fd: BorrowedFd<'_> = socket.as_fd();
    // SAFETY: the pointer and the length describe `value`, which outlives the call; the kernel only reads it.
    check(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    })
    .map(drop)
}

/// `getsockopt` of a number.
pub(crate) fn option(socket: impl AsFd, level: libc::c_int, name: libc::c_int) -> io::Result<libc::c_uint> {
    let (mut value, mut bytes): (libc::c_uint, _) = (0, size_of::<libc::c_uint>() as libc::socklen_t);
    // SAFETY: both pointers lead to locals, and the length is that of the number.
    let done = unsafe {
        libc::getsockopt(socket.as_fd().as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut bytes)
    };
    check(done).map(|_| value)
}

/// A zero-terminated interface name for an `ifreq`; at most 15 bytes, no `/`, no white space, no NUL.
pub(crate) fn interface_name(name: &str) -> io::Result<[libc::c_char; libc::IFNAMSIZ]> {
    let bytes = name.as_bytes();
    let bad = |byte: &u8| *byte == b'/' || *byte == 0 || byte.is_ascii_whitespace();
    if bytes.is_empty() || bytes.len() >= libc::IFNAMSIZ || bytes.iter().any(bad) {
        let text = format!("{name:?} is not an interface name (1 to 15 bytes, no '/', no white space)");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let mut out = [0; libc::IFNAMSIZ];
    for (to, from) in out.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    Ok(out)
}

/// The index of an interface of the current network namespace.
pub(crate) fn interface_index(name: &str) -> io::Result<u32> {
    let name = interface_name(name)?;
    // SAFETY: `name` is zero-terminated and outlives the call.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        index => Ok(index),
    }
}

/// Name of an interface of the calling thread's namespace; `None`: there is none of this index.
pub(crate) fn interface_of_index(index: u32) -> Option<String> {
    let mut name = [0; libc::IF_NAMESIZE];
    // SAFETY: `name` has the room that the call writes at most.
    let known = unsafe { !libc::if_indextoname(index, name.as_mut_ptr()).is_null() };
    let bytes = name.iter().take_while(|byte| **byte != 0).map(|byte| byte.cast_unsigned());
    known.then(|| String::from_utf8_lossy(&bytes.collect::<Vec<u8>>()).into_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn interface_names_are_checked() {
        for bad in ["", "a/b", "with space", "sixteen-bytes-xx", "nul\0"] {
            assert_eq!(interface_name(bad).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{bad:?}");
        }
        let name = interface_name("fifteen-bytes-x").unwrap();
        assert_eq!(name[14], b'x' as libc::c_char);
        assert_eq!(name[15], 0);
    }

    #[test]
    fn loopback_has_an_index() {
        assert_eq!(interface_index("lo").unwrap(), 1);
        assert!(interface_index("no-such-if").is_err());
    }
}
