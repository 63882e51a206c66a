//! The `bpf` system call: maps and programs.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use super::assembler::Instruction;
use crate::sys::{check, owned};

const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const MAP_DELETE_ELEM: libc::c_int = 3;
const PROG_LOAD: libc::c_int = 5;
const MAP_TYPE_HASH: u32 = 1;
const MAP_TYPE_ARRAY: u32 = 2;
/// `BPF_F_NO_PREALLOC`: memory as it is needed.
const AS_NEEDED: u32 = 1;
/// `BPF_F_MMAPABLE`.
const MAPPABLE: u32 = 1 << 10;
const LINK_CREATE: libc::c_int = 28;
const LINK_UPDATE: libc::c_int = 29;
const PROG_TYPE_SOCKET_FILTER: u32 = 1;
const PROG_TYPE_SCHED_CLS: u32 = 3;
/// Attach types (`BPF_TCX_INGRESS`, `BPF_TCX_EGRESS`, Linux 6.6).
const TCX_INGRESS: u32 = 46;
const TCX_EGRESS: u32 = 47;
/// Before all others (`BPF_F_BEFORE` without a relative).
const BEFORE: u32 = 1 << 3;
const LOG_BYTES: usize = 64 << 10;
/// Of a set: a key, and a value that nobody reads.
const KEY_BYTES: u32 = 16;
const VALUE_BYTES: u32 = 4;

#[repr(C)]
struct CreateMap {
    map_type: u32,
    key_bytes: u32,
    value_bytes: u32,
    entries_max: u32,
    flags: u32,
}

#[repr(C)]
struct Element {
    map: u32,
    _padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct LoadProgram {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_bytes: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

#[repr(C)]
struct CreateLink {
    program: u32,
    interface: u32,
    attach_type: u32,
    flags: u32,
    relative: u32,
    _padding: u32,
    expected_revision: u64,
}

#[repr(C)]
struct UpdateLink {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}

/// # Safety `T` is the layout that this command reads, and the pointers in it are valid for what the command
/// does with them.
unsafe fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<libc::c_int> {
    // SAFETY: the attributes live for the call; the caller vouches for what they point to.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>() as u32)
    };
    check(libc::c_int::try_from(result).unwrap_or(-1))
}

/// An array map with one value of `bytes` bytes, all zero; a program reads it by its address.
pub(super) fn create_value(bytes: usize) -> io::Result<OwnedFd> {
    create_array(bytes, 0)
}

/// As [`create_value`]; this process can map it into its memory.
pub(super) fn create_shared_value(bytes: usize) -> io::Result<OwnedFd> {
    create_array(bytes, MAPPABLE)
}

fn create_array(bytes: usize, flags: u32) -> io::Result<OwnedFd> {
    let value_bytes = u32::try_from(bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut attributes =
        CreateMap { map_type: MAP_TYPE_ARRAY, key_bytes: 4, value_bytes, entries_max: 1, flags };
    // SAFETY: the layout of MAP_CREATE; no pointers.
    owned(unsafe { bpf(MAP_CREATE, &mut attributes) }?)
}

/// A set of up to `entries_max` keys of 16 bytes, empty; a program looks for one.
pub(super) fn create_set(entries_max: u32) -> io::Result<OwnedFd> {
    let (key_bytes, value_bytes) = (KEY_BYTES, VALUE_BYTES);
    let mut attributes =
        CreateMap { map_type: MAP_TYPE_HASH, key_bytes, value_bytes, entries_max, flags: AS_NEEDED };
    // SAFETY: the layout of MAP_CREATE; no pointers.
    owned(unsafe { bpf(MAP_CREATE, &mut attributes) }?)
}

/// Puts a key into a set of [`create_set`], or takes it out.
pub(super) fn change_set(set: impl AsFd, key: &[u8; KEY_BYTES as usize], is_in: bool) -> io::Result<()> {
    let value = [0u8; VALUE_BYTES as usize];
    let mut attributes = Element {
        map: set.as_fd().as_raw_fd().cast_unsigned(),
        _padding: 0,
        key: key.as_ptr() as u64,
        value: if is_in { value.as_ptr() as u64 } else { 0 },
        flags: 0,
    };
    let command = if is_in { MAP_UPDATE_ELEM } else { MAP_DELETE_ELEM };
    // SAFETY: the layout of both commands; key and value are as long as those of every such set, and live for the call.
    unsafe { bpf(command, &mut attributes) }.map(drop)
}

/// Writes the whole value of a map made by [`create_value`] with `bytes.len()` bytes.
///
/// # Safety
/// `bytes` is at least as long as the map's value.
pub(super) unsafe fn write_value(map: impl AsFd, bytes: &[u8]) -> io::Result<()> {
    let key = 0u32;
    let mut attributes = Element {
        map: map.as_fd().as_raw_fd().cast_unsigned(),
        _padding: 0,
        key: (&raw const key) as u64,
        value: bytes.as_ptr() as u64,
        flags: 0,
    };
    // SAFETY: the layout of MAP_UPDATE_ELEM; the kernel reads 4 bytes of key and the value, whose length the
    // caller vouches for.
    unsafe { bpf(MAP_UPDATE_ELEM, &mut attributes) }.map(drop)
}

/// Loads a socket filter program. The verifier's objections, if any, go to the log at level debug.
pub(super) fn load_socket_filter(code: &[Instruction]) -> io::Result<OwnedFd> {
    load(PROG_TYPE_SOCKET_FILTER, code)
}

/// Loads a program for the ingress of an interface, as [`load_socket_filter`].
pub(super) fn load_classifier(code: &[Instruction]) -> io::Result<OwnedFd> {
    load(PROG_TYPE_SCHED_CLS, code)
}

/// Puts a program from [`load_classifier`] before all others at the ingress of an interface of the calling
/// thread's namespace. It is gone when the returned descriptor is closed, however that happens.
pub(crate) fn attach_ingress(interface: u32, program: impl AsFd) -> io::Result<OwnedFd> {
    attach(TCX_INGRESS, interface, program)
}

/// As [`attach_ingress`], where frames leave.
pub(crate) fn attach_egress(interface: u32, program: impl AsFd) -> io::Result<OwnedFd> {
    attach(TCX_EGRESS, interface, program)
}

fn attach(attach_type: u32, interface: u32, program: impl AsFd) -> io::Result<OwnedFd> {
    let mut attributes = CreateLink {
        program: program.as_fd().as_raw_fd().cast_unsigned(),
        interface,
        attach_type,
        flags: BEFORE,
        relative: 0,
        _padding: 0,
        expected_revision: 0,
    };
    // SAFETY: the layout of LINK_CREATE for tcx; no pointers.
    owned(unsafe { bpf(LINK_CREATE, &mut attributes) }?)
}

/// Replaces the program of a link, without a moment between.
pub(crate) fn replace_program(link: impl AsFd, program: impl AsFd) -> io::Result<()> {
    let mut attributes = UpdateLink {
        link: link.as_fd().as_raw_fd().cast_unsigned(),
        program: program.as_fd().as_raw_fd().cast_unsigned(),
        flags: 0,
        old_program: 0,
    };
    // SAFETY: the layout of LINK_UPDATE; no pointers.
    unsafe { bpf(LINK_UPDATE, &mut attributes) }.map(drop)
}

fn load(program_type: u32, code: &[Instruction]) -> io::Result<OwnedFd> {
    match try_load(program_type, code, &mut []) {
        // Everything but "not allowed" and "no memory" is worth an explanation.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EACCES | libc::E2BIG)) => {
            let mut log = vec![0; LOG_BYTES];
            let result = try_load(program_type, code, &mut log);
            let end = log.iter().position(|byte| *byte == 0).unwrap_or(log.len());
            let text = String::from_utf8_lossy(&log[..end]);
            tracing::debug!(%error, %text, "the kernel refused a BPF program");
            result
        }
        result => result,
    }
}

fn try_load(program_type: u32, code: &[Instruction], log: &mut [u8]) -> io::Result<OwnedFd> {
    let mut attributes = LoadProgram {
        program_type,
        instruction_count: u32::try_from(code.len()).unwrap_or(u32::MAX),
        instructions: code.as_ptr() as u64,
        license: c"Apache-2.0 OR MIT".as_ptr() as u64,
        log_level: u32::from(!log.is_empty()),
        log_bytes: u32::try_from(log.len()).unwrap_or(0),
        log: if log.is_empty() { 0 } else { log.as_mut_ptr() as u64 },
        kernel_version: 0,
        flags: 0,
    };
    // SAFETY: the layout of PROG_LOAD; instructions, license and log are live and announced with their true
    // lengths.
    owned(unsafe { bpf(PROG_LOAD, &mut attributes) }?)
}

#[cfg(test)]
pub(super) mod testing {
    use super::*;

    const PROG_TEST_RUN: libc::c_int = 10;

    #[repr(C)]
    struct TestRun {
        program: u32,
        result: u32,
        data_bytes: u32,
        data_out_bytes: u32,
        data: u64,
        data_out: u64,
        repeat: u32,
        duration_ns: u32,
        context_bytes: u32,
        context_out_bytes: u32,
        context: u64,
        context_out: u64,
    }

    /// Runs a socket filter on a packet of at least 14 bytes, of which it does not see the first 14; returns
    /// its result and the nanoseconds of one run.
    pub(in crate::bpf) fn run(program: impl AsFd, frame: &[u8], repeat: u32) -> io::Result<(u32, u32)> {
        let mut attributes = TestRun {
            program: program.as_fd().as_raw_fd().cast_unsigned(),
            result: 0,
            data_bytes: u32::try_from(frame.len()).unwrap_or(0),
            data_out_bytes: 0,
            data: frame.as_ptr() as u64,
            data_out: 0,
            repeat,
            duration_ns: 0,
            context_bytes: 0,
            context_out_bytes: 0,
            context: 0,
            context_out: 0,
        };
        // SAFETY: the layout of PROG_TEST_RUN; the kernel reads the frame and writes only into the attributes.
        unsafe { bpf(PROG_TEST_RUN, &mut attributes) }?;
        Ok((attributes.result, attributes.duration_ns))
    }
}
