//! For tests, here and in the crates above: a network of one's own, and the kernel's [`messages`] without a kernel.

pub mod messages;

use std::io;
use std::marker::PhantomData;
use std::process::Command;

use crate::netns;
use crate::sys::check;

/// Set in a test process that is already inside a user namespace made by [`isolated`].
pub(crate) const INSIDE: &str = "ANABRANCH_TEST_INSIDE_NAMESPACE";

/// Runs a test in a new network namespace, where it may do what it likes: as root directly, as an ordinary
/// user by running this very test again in a user namespace. Where the system allows neither, the test fails
/// and says so.
///
/// # Panics When the test fails or no namespace can be had.
pub fn isolated(test: impl FnOnce() + Send) {
    if std::env::var_os(INSIDE).is_some() {
        // The process was started in a fresh namespace; only its loopback is missing.
        if let Err(error) = crate::netlink::Netlink::open().and_then(|netlink| netlink.set_up(1, true)) {
            panic!("cannot use the namespace made for this test: {error}");
        }
        return test();
    }
    if netns::is_privileged() {
        let result = netns::Namespace::create().and_then(|namespace| namespace.run(test));
        if let Err(error) = result {
            panic!("this test needs a network namespace: {error}");
        }
        return;
    }
    if let Err(error) = again_in_user_namespace() {
        panic!("this test needs root or a user namespace: {}: {error}", netns::USER_NAMESPACE_REFUSED);
    }
}

/// The test harness names each test's thread after the test.
fn again_in_user_namespace() -> io::Result<()> {
    let thread = std::thread::current();
    let name = thread.name().unwrap_or_default();
    let mut command = Command::new(std::env::current_exe()?);
    command.args([name, "--exact", "--nocapture", "--test-threads=1"]).env(INSIDE, "1");
    netns::prepare_command_in_user_namespace(&mut command);
    let output = command.output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} failed in a user namespace:\n{text}\n{errors}");
    assert!(text.contains("1 passed"), "{name} did not run in the user namespace:\n{text}\n{errors}");
    Ok(())
}

/// One thread of another process that stands still until this is dropped, wherever it was: what `SIGSTOP` cannot do, which
/// stops all threads. Only the thread that halted it can let it go on.
#[derive(Debug)]
pub struct Halted {
    thread: libc::pid_t,
    _only_here: PhantomData<*const ()>,
}

impl Halted {
    /// Halts the thread of this name (`/proc/PROCESS/task/*/comm`) and waits until it stands.
    ///
    /// # Errors
    /// There is no such thread, or it may not be traced by us.
    pub fn thread(process: u32, name: &str) -> io::Result<Self> {
        let thread = thread_of(process, name)?;
        trace(libc::PTRACE_SEIZE, thread)?;
        let halted = Self { thread, _only_here: PhantomData };
        trace(libc::PTRACE_INTERRUPT, thread)?;
        let mut status = 0;
        // SAFETY: the status lives for the call.
        check(unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL) })?;
        if libc::WIFSTOPPED(status) { Ok(halted) } else { Err(io::Error::other("the thread has ended")) }
    }
}

#[cfg(target_arch = "x86_64")]
impl Halted {
    /// Makes this thread, which waits in a system call, make another one, and tells what that returns: `-errno` when it fails. A
    /// text in place of an argument is put on its stack and becomes its address.
    ///
    /// # Errors
    /// The thread waits in no system call; it cannot be traced.
    pub fn system_call(&self, call: libc::c_long, arguments: [Argument<'_>; 3]) -> io::Result<i64> {
        const SYSTEM_CALL: i64 = 0x050f;
        let before = self.registers()?;
        let at = before.rip - 2;
        // SAFETY: reads a word of the halted thread; what is returned is that word.
        let word = unsafe { libc::ptrace(libc::PTRACE_PEEKTEXT, self.thread, at, 0) };
        if word & 0xffff != SYSTEM_CALL {
            return Err(io::Error::other("the thread waits in no system call"));
        }
        let mut registers = before;
        // Below what a function may use without moving the pointer.
        let mut place = (before.rsp - 4_096) & !7;
        let mut values = [0; 3];
        for (value, argument) in values.iter_mut().zip(arguments) {
            *value = match argument {
                Argument::Number(number) => number as u64,
                Argument::Text(text) => self.put(&mut place, text)?,
            };
        }
        [registers.rdi, registers.rsi, registers.rdx] = values;
        // No call is under way any more that the kernel would begin again.
        (registers.rip, registers.rax, registers.orig_rax) = (at, call as u64, u64::MAX);
        self.set_registers(&registers)?;
        trace(libc::PTRACE_SINGLESTEP, self.thread)?;
        let mut status = 0;
        // SAFETY: the status lives for the call.
        check(unsafe { libc::waitpid(self.thread, &raw mut status, libc::__WALL) })?;
        if !libc::WIFSTOPPED(status) {
            return Err(io::Error::other("the thread has ended"));
        }
        let result = self.registers()?.rax as i64;
        self.set_registers(&before)?;
        Ok(result)
    }

    /// Writes a text with its zero to the thread's memory; its address.
    fn put(&self, place: &mut u64, text: &str) -> io::Result<u64> {
        let start = *place;
        let mut bytes = text.as_bytes().to_vec();
        bytes.resize((bytes.len() / 8 + 1) * 8, 0);
        for word in bytes.as_chunks::<8>().0 {
            // SAFETY: writes a word of the halted thread's stack, not of ours.
            let result = unsafe {
                libc::ptrace(libc::PTRACE_POKEDATA, self.thread, *place, u64::from_ne_bytes(*word))
            };
            check(result as libc::c_int)?;
            *place += 8;
        }
        Ok(start)
    }

    fn registers(&self) -> io::Result<libc::user_regs_struct> {
        let mut registers = std::mem::MaybeUninit::<libc::user_regs_struct>::zeroed();
        let nothing = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: the kernel writes one such structure there; all its fields are numbers, for which zero is good too.
        unsafe {
            let result = libc::ptrace(libc::PTRACE_GETREGS, self.thread, nothing, registers.as_mut_ptr());
            check(result as libc::c_int)?;
            Ok(registers.assume_init())
        }
    }

    fn set_registers(&self, registers: &libc::user_regs_struct) -> io::Result<()> {
        let nothing = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: the kernel reads one such structure there.
        let result = unsafe {
            libc::ptrace(libc::PTRACE_SETREGS, self.thread, nothing, std::ptr::from_ref(registers))
        };
        check(result as libc::c_int).map(drop)
    }
}

/// An argument of a system call that another thread is to make.
#[derive(Clone, Copy, Debug)]
pub enum Argument<'a> {
    /// As it is.
    Number(i64),
    /// The address of this text.
    Text(&'a str),
}

impl Drop for Halted {
    fn drop(&mut self) {
        // A thread that is gone needs nothing.
        let _ = trace(libc::PTRACE_DETACH, self.thread);
    }
}

fn thread_of(process: u32, name: &str) -> io::Result<libc::pid_t> {
    for task in std::fs::read_dir(format!("/proc/{process}/task"))? {
        let task = task?;
        // One that ends meanwhile is not it.
        let its_name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        if its_name.trim_end() == name {
            return task.file_name().to_string_lossy().parse().map_err(io::Error::other);
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, format!("process {process} has no thread {name}")))
}

fn trace(request: libc::c_uint, thread: libc::pid_t) -> io::Result<()> {
    let nothing = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: these requests use neither address nor data.
    let result = unsafe { libc::ptrace(request as _, thread, nothing, nothing) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
