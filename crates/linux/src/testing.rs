//! For tests, here and in the crates above: a network of one's own.

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
