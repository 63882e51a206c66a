//! System calls by a filter (`Documentation/userspace-api/seccomp_filter.rst`): what is not on the list fails with `EPERM`.
//!
//! The list is by what the program does, found by the end-to-end tests with a filter that only logs. The kernel keeps the answers
//! for calls without conditions in a bitmap, so that the length of the list costs nothing.

use std::io;

use libc::{BPF_ABS, BPF_ALU, BPF_AND, BPF_JEQ, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_RET, BPF_W, c_long};

use crate::sys::check;

/// `AUDIT_ARCH_…` of linux/audit.h: calls of other machines (32 bits) are refused.
#[cfg(target_arch = "x86_64")]
const MACHINE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const MACHINE: u32 = 0xc000_00b7;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// Memory and threads.
const MEMORY: &[c_long] = &[
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_futex,
    libc::SYS_get_robust_list,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_rseq,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_restart_syscall,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getcpu,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_setscheduler,
    libc::SYS_setpriority,
    // A panic ends the process.
    libc::SYS_tgkill,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
];

/// Time, and what workers and the control thread sleep on.
const WAITING: &[c_long] = &[
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_ppoll,
    libc::SYS_eventfd2,
    libc::SYS_signalfd4,
    libc::SYS_pipe2,
];

/// Descriptors: sockets, devices and files alike.
const DESCRIPTORS: &[c_long] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_fcntl,
    libc::SYS_lseek,
];

/// Files, within what Landlock leaves: configuration, keys, state, logs, the lock, `/proc` and `/sys`.
const FILES: &[c_long] = &[
    libc::SYS_openat,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_getcwd,
    libc::SYS_mkdirat,
    libc::SYS_unlinkat,
    libc::SYS_renameat2,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_umask,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_ftruncate,
    libc::SYS_flock,
];

/// The network: links, netlink, packet rings, the control socket, helpers, the name service.
const NETWORK: &[c_long] = &[
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_listen,
    libc::SYS_accept4,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    // Programs and maps that steer, and guard interfaces.
    libc::SYS_bpf,
];

/// Facts about process and machine, and random numbers.
const FACTS: &[c_long] = &[
    libc::SYS_getrandom,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_capget,
    libc::SYS_prlimit64,
    libc::SYS_getrusage,
    libc::SYS_sysinfo,
    libc::SYS_uname,
];

/// Older forms that newer machines do not have and that libraries still use here.
#[cfg(target_arch = "x86_64")]
const OLDER: &[c_long] = &[
    libc::SYS_access,
    libc::SYS_chmod,
    libc::SYS_dup2,
    libc::SYS_epoll_wait,
    libc::SYS_getdents,
    libc::SYS_getrlimit,
    libc::SYS_lstat,
    libc::SYS_mkdir,
    libc::SYS_open,
    libc::SYS_poll,
    libc::SYS_readlink,
    libc::SYS_rename,
    libc::SYS_rmdir,
    libc::SYS_stat,
    libc::SYS_unlink,
];
#[cfg(target_arch = "aarch64")]
const OLDER: &[c_long] = &[libc::SYS_renameat];

/// Families of sockets.
const FAMILIES: &[i32] = &[libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK, libc::AF_PACKET];

/// Namespaces that a thread must not begin.
const NAMESPACES: i32 = libc::CLONE_NEWUSER
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP;

/// linux/prctl.h
const PR_GET_AUXV: i32 = 0x4155_5856;

/// Calls that depend on an argument, by its place.
const CONDITIONS: &[(c_long, u32, Condition)] = &[
    (libc::SYS_socket, 0, Condition::OneOf(FAMILIES)),
    (libc::SYS_socketpair, 0, Condition::OneOf(&[libc::AF_UNIX])),
    (libc::SYS_clone, 0, Condition::NoneOf(NAMESPACES)),
    // Memory is either written or run, as systemd's MemoryDenyWriteExecute: libraries of the name service are mapped.
    (libc::SYS_mmap, 2, Condition::NotAll(libc::PROT_WRITE | libc::PROT_EXEC)),
    (libc::SYS_mprotect, 2, Condition::NoneOf(libc::PROT_EXEC)),
    // Names and timers of threads; names of memory; the kernel's word about this process.
    (
        libc::SYS_prctl,
        0,
        Condition::OneOf(&[
            libc::PR_SET_NAME,
            libc::PR_GET_NAME,
            libc::PR_SET_TIMERSLACK,
            libc::PR_SET_VMA,
            PR_GET_AUXV,
        ]),
    ),
    // Devices of the network, sizes of what waits; not: typing at the terminal in place of the user.
    (libc::SYS_ioctl, 1, Condition::NotOneOf(&[libc::TIOCSTI as i32, libc::TIOCLINUX as i32])),
];

/// A condition for the lower 32 bits of an argument.
#[derive(Clone, Copy)]
enum Condition {
    OneOf(&'static [i32]),
    NotOneOf(&'static [i32]),
    /// None of the bits is set.
    NoneOf(i32),
    /// Not all of the bits are set.
    NotAll(i32),
}

/// Imposes the filter on this thread.
pub(super) fn restrict() -> io::Result<()> {
    impose(&filter())
}

fn impose(filter: &[libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).map_err(io::Error::other)?,
        filter: filter.as_ptr().cast_mut(),
    };
    let with = |flags: c_long| {
        let mode = libc::SECCOMP_SET_MODE_FILTER;
        // SAFETY: the program and its instructions outlive the call, which only reads them.
        check(unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, std::ptr::from_ref(&program)) } as i32)
    };
    // Kernels before 4.14 cannot log.
    with(libc::SECCOMP_FILTER_FLAG_LOG as c_long).or_else(|_| with(0)).map(drop)
}

fn filter() -> Vec<libc::sock_filter> {
    let mut code = vec![
        load(ARCHITECTURE),
        jump(BPF_JEQ, MACHINE, 1, 0),
        answer(libc::EPERM),
        load(NUMBER),
        // Its flags cannot be looked at. The C library begins its threads by the older call then.
        jump(BPF_JEQ, libc::SYS_clone3 as u32, 0, 1),
        answer(libc::ENOSYS),
    ];
    for (call, argument, condition) in CONDITIONS {
        let test = condition.test();
        // Past load, test and both answers.
        code.extend([jump(BPF_JEQ, *call as u32, 0, test.len() as u8 + 1), load(ARGUMENTS + 8 * argument)]);
        code.extend(test);
    }
    for call in [MEMORY, WAITING, DESCRIPTORS, FILES, NETWORK, FACTS, OLDER].into_iter().flatten() {
        code.extend([jump(BPF_JEQ, *call as u32, 0, 1), allow()]);
    }
    code.push(answer(libc::EPERM));
    code
}

impl Condition {
    /// Instructions that end the program, with the argument in the accumulator.
    fn test(self) -> Vec<libc::sock_filter> {
        let each = |list: &[i32], found: libc::sock_filter, otherwise: libc::sock_filter| {
            let mut code = Vec::new();
            for value in list {
                code.extend([jump(BPF_JEQ, *value as u32, 0, 1), found]);
            }
            code.push(otherwise);
            code
        };
        let refuse = answer(libc::EPERM);
        match self {
            Condition::OneOf(list) => each(list, allow(), refuse),
            Condition::NotOneOf(list) => each(list, refuse, allow()),
            Condition::NoneOf(bits) => vec![jump(BPF_JSET, bits as u32, 0, 1), refuse, allow()],
            Condition::NotAll(bits) => {
                vec![
                    instruction(BPF_ALU | BPF_AND | BPF_K, bits as u32, 0, 0),
                    jump(BPF_JEQ, bits as u32, 0, 1),
                    refuse,
                    allow(),
                ]
            }
        }
    }
}

fn instruction(code: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt, jf, k }
}

fn load(offset: u32) -> libc::sock_filter {
    instruction(BPF_LD | BPF_W | BPF_ABS, offset, 0, 0)
}

fn jump(kind: u32, k: u32, yes: u8, no: u8) -> libc::sock_filter {
    instruction(BPF_JMP | kind | BPF_K, k, yes, no)
}

fn allow() -> libc::sock_filter {
    instruction(BPF_RET | BPF_K, libc::SECCOMP_RET_ALLOW, 0, 0)
}

fn answer(error: i32) -> libc::sock_filter {
    instruction(BPF_RET | BPF_K, libc::SECCOMP_RET_ERRNO | error as u32, 0, 0)
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// Makes the kernel one without IPv6 for this thread.
    pub(crate) fn refuse_ipv6() -> io::Result<()> {
        impose(&[
            load(NUMBER),
            jump(BPF_JEQ, libc::SYS_socket as u32, 0, 3),
            load(ARGUMENTS),
            jump(BPF_JEQ, libc::AF_INET6 as u32, 0, 1),
            answer(libc::EAFNOSUPPORT),
            allow(),
        ])
    }
}
