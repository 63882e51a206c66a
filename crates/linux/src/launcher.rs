//! Programs that a node needs while it runs, and the process that starts them.
//!
//! A node in its [sandbox](crate::sandbox) executes nothing. Before it enters it starts a process of its own program
//! ([`start`]), which keeps the rights that the programs need, holds none of the node's memory, and starts what is on the list
//! [`Program`] and nothing else ([`serve`]). Elsewhere, as in commands and tests, [`spawn`] starts the program itself.
//!
//! ```text
//! request  = program:8 | user:32 | group:32, with four descriptors: standard input, output and error, and the watch
//! on the watch, to the node:     number of the process:32, or minus errno     then, when it has ended:     wait status:32
//! on the watch, from the node:   any message: end it
//! ```
//! Numbers are in the order of this machine. The launcher ends with the node; the programs notice by their own sockets.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, socketpair,
};
use rustix::process::{PidfdFlags, pidfd_open};

use crate::netns::prepare_command;
use crate::privileges::User;

/// This very program, even when its file was replaced.
const ITSELF: &str = "/proc/self/exe";
/// Programs that run at a time, at most.
const PROGRAMS_MAX: usize = 64;
/// Length of a request, bytes.
const REQUEST_BYTES: usize = 9;
/// Descriptors with a request.
const DESCRIPTORS: usize = 4;

/// The launcher of this process, once there is one.
static LAUNCHER: OnceLock<OwnedFd> = OnceLock::new();
/// Programs that this process has started and that run.
static RUNNING: AtomicUsize = AtomicUsize::new(0);

/// A program that may be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// `anabranch health`, which checks backends with the rights of this user.
    Health(User),
    /// `anabranch tls-path`, which carries TCP and TLS, likewise.
    TlsPath(User),
    /// `nft` with the rules on its standard input.
    NftRules,
    /// One of [`SAVE_PROGRAMS`]: the rules of the legacy table `filter`.
    SaveRules(u8),
    /// One of [`SAVE_PROGRAMS`]: which kind it is.
    SaveVersion(u8),
}

/// Programs that show legacy tables: of IPv4, then of IPv6.
pub const SAVE_PROGRAMS: [&str; 4] =
    ["iptables-legacy-save", "iptables-save", "ip6tables-legacy-save", "ip6tables-save"];

impl Program {
    fn to_bytes(self) -> [u8; REQUEST_BYTES] {
        let (kind, user) = match self {
            Program::Health(user) => (0, user),
            Program::TlsPath(user) => (1, user),
            Program::NftRules => (2, User { uid: 0, gid: 0 }),
            Program::SaveRules(which) => (3, User { uid: which.into(), gid: 0 }),
            Program::SaveVersion(which) => (4, User { uid: which.into(), gid: 0 }),
        };
        let mut bytes = [kind; REQUEST_BYTES];
        bytes[1..5].copy_from_slice(&user.uid.to_ne_bytes());
        bytes[5..].copy_from_slice(&user.gid.to_ne_bytes());
        bytes
    }

    fn from_bytes(bytes: [u8; REQUEST_BYTES]) -> Option<Program> {
        let [kind, uid @ .., _, _, _, _] = bytes;
        let [_, _, _, _, _, gid @ ..] = bytes;
        let user = User { uid: u32::from_ne_bytes(uid), gid: u32::from_ne_bytes(gid) };
        let which = || u8::try_from(user.uid).ok().filter(|which| usize::from(*which) < SAVE_PROGRAMS.len());
        Some(match kind {
            0 => Program::Health(user),
            1 => Program::TlsPath(user),
            2 => Program::NftRules,
            3 => Program::SaveRules(which()?),
            4 => Program::SaveVersion(which()?),
            _ => return None,
        })
    }

    fn command(self) -> Command {
        let helper = |name: &str, user: User| {
            let mut command = Command::new(ITSELF);
            command.arg0("anabranch").args([name, "--user", &format!("{}:{}", user.uid, user.gid)]);
            // Ctrl-C at the terminal is for the node: it ends its helpers itself.
            command.env_clear().current_dir("/").process_group(0);
            command
        };
        let with = |name: &str, arguments: &[&str]| {
            let mut command = Command::new(name);
            command.args(arguments);
            command
        };
        let save = |which: u8| SAVE_PROGRAMS.get(usize::from(which)).copied().unwrap_or_default();
        match self {
            Program::Health(user) => helper("health", user),
            Program::TlsPath(user) => helper("tls-path", user),
            Program::NftRules => with("nft", &["-f", "-"]),
            Program::SaveRules(which) => with(save(which), &["-t", "filter"]),
            Program::SaveVersion(which) => with(save(which), &["--version"]),
        }
    }
}

/// Standard input, output and error of a program.
#[derive(Debug)]
pub struct Streams {
    /// Its input.
    pub input: OwnedFd,
    /// Where its output goes.
    pub output: OwnedFd,
    /// Where its errors go.
    pub errors: OwnedFd,
}

impl Streams {
    /// Those of a helper that talks over one socket: no output, errors where ours go.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn of_helper(socket: OwnedFd) -> io::Result<Streams> {
        let nothing = std::fs::OpenOptions::new().write(true).open("/dev/null")?;
        let errors = io::stderr().as_fd().try_clone_to_owned()?;
        Ok(Streams { input: socket, output: nothing.into(), errors })
    }
}

/// A program that was started. It goes on when this is dropped.
#[derive(Debug)]
pub struct Launched {
    id: u32,
    watch: OwnedFd,
    ended: Option<ExitStatus>,
}

impl Launched {
    /// The first message of the watch: its number, or why there is none.
    fn begun(watch: OwnedFd) -> io::Result<Launched> {
        let answer = loop {
            if let Some(answer) = receive_number(&watch, RecvFlags::empty())? {
                break answer;
            }
        };
        match u32::try_from(answer) {
            Ok(id) => Ok(Launched { id, watch, ended: None }),
            Err(_) => Err(io::Error::from_raw_os_error(answer.saturating_neg())),
        }
    }

    /// Number of the process.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// How it has ended, if it has.
    ///
    /// # Errors
    /// The launcher is gone.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.status(RecvFlags::DONTWAIT)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// As [`Self::try_wait`].
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        loop {
            if let Some(status) = self.status(RecvFlags::empty())? {
                return Ok(status);
            }
        }
    }

    /// Has it ended; [`Self::wait`] tells when it is.
    ///
    /// # Errors
    /// As [`Self::try_wait`].
    pub fn kill(&mut self) -> io::Result<()> {
        if self.ended.is_none() {
            rustix::net::send(&self.watch, &[0], SendFlags::NOSIGNAL)?;
        }
        Ok(())
    }

    fn status(&mut self, flags: RecvFlags) -> io::Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            self.ended = receive_number(&self.watch, flags)?.map(ExitStatus::from_raw);
        }
        Ok(self.ended)
    }
}

/// Starts a program, by the launcher if there is one.
///
/// # Errors
/// `NotFound` when it is not installed; what the system says; the launcher is gone.
pub fn spawn(program: Program, streams: Streams) -> io::Result<Launched> {
    let (watch, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    match LAUNCHER.get() {
        Some(launcher) => {
            request(launcher, program, &streams, &theirs)?;
            // The copies that it has are the only ones: their end is the program's.
            drop((streams, theirs));
        }
        None => begin(program.command(), streams, theirs),
    }
    Launched::begun(watch)
}

/// Starts any program from this process itself.
#[cfg(test)]
pub(crate) fn spawn_here(command: Command, streams: Streams) -> io::Result<Launched> {
    let (watch, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    begin(command, streams, theirs);
    Launched::begun(watch)
}

fn request(
    launcher: &OwnedFd,
    program: Program,
    streams: &Streams,
    watch: &OwnedFd,
) -> rustix::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors: [BorrowedFd<'_>; DESCRIPTORS] =
        [streams.input.as_fd(), streams.output.as_fd(), streams.errors.as_fd(), watch.as_fd()];
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(Errno::NOMEM);
    }
    let bytes = program.to_bytes();
    rustix::net::sendmsg(launcher, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL).map(drop)
}

/// A number of the watch; `None`: not yet.
fn receive_number(watch: &OwnedFd, flags: RecvFlags) -> io::Result<Option<i32>> {
    let mut bytes = [0; 4];
    match rustix::net::recv(watch, &mut bytes, flags) {
        Ok((_, 4)) => Ok(Some(i32::from_ne_bytes(bytes))),
        Ok(_) => Err(io::Error::other("the process that starts programs has ended")),
        Err(Errno::AGAIN | Errno::INTR) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Starts the launcher of this process, for good. Call it after rights are given up and before the sandbox; twice is once.
///
/// # Errors
/// When the program cannot be started.
pub fn start() -> io::Result<()> {
    if LAUNCHER.get().is_some() {
        return Ok(());
    }
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    let mut command = Command::new(ITSELF);
    command.arg0("anabranch").arg("launch").stdin(theirs).stdout(Stdio::null()).process_group(0);
    prepare_command(&mut command);
    // Nobody waits for it: it ends with this process.
    command.spawn()?;
    // Of two that come here at once one keeps its own.
    let _ = LAUNCHER.set(ours);
    Ok(())
}

/// The launcher: starts what the node at the other end of standard input asks for, until that is gone.
///
/// # Errors
/// Standard input is no socket.
pub fn serve() -> io::Result<()> {
    let node = io::stdin().as_fd().try_clone_to_owned()?;
    if !crate::process::is_socket(&node) {
        let text = "standard input is no socket: the node starts this process itself, see anabranch up";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    while let Some((bytes, descriptors)) = receive_request(&node)? {
        // What nobody understands gets no answer but the end of its watch.
        let (Some(program), Ok([input, output, errors, watch])) =
            (Program::from_bytes(bytes), <[OwnedFd; DESCRIPTORS]>::try_from(descriptors))
        else {
            continue;
        };
        begin(program.command(), Streams { input, output, errors }, watch);
    }
    Ok(())
}

fn receive_request(node: &OwnedFd) -> io::Result<Option<([u8; REQUEST_BYTES], Vec<OwnedFd>)>> {
    let mut bytes = [0; REQUEST_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut buffers = [IoSliceMut::new(&mut bytes)];
        match rustix::net::recvmsg(node, &mut buffers, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            Err(Errno::CONNRESET) => return Ok(None),
            other => break other?,
        }
    };
    if received.bytes == 0 {
        return Ok(None);
    }
    let mut descriptors = Vec::with_capacity(DESCRIPTORS);
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(list) = message {
            descriptors.extend(list);
        }
    }
    Ok(Some((bytes, descriptors)))
}

/// Starts a program and a thread that waits for its end; both are told on the watch. Who is gone is not told.
fn begin(mut command: Command, streams: Streams, watch: OwnedFd) {
    let tell = |watch: &OwnedFd, number: i32| {
        let _ = rustix::net::send(watch, &number.to_ne_bytes(), SendFlags::NOSIGNAL);
    };
    let failed = |error: &io::Error| -error.raw_os_error().unwrap_or(libc::EIO);
    if RUNNING.fetch_add(1, Relaxed) >= PROGRAMS_MAX {
        RUNNING.fetch_sub(1, Relaxed);
        return tell(&watch, -libc::EAGAIN);
    }
    command.stdin(streams.input).stdout(streams.output).stderr(streams.errors);
    prepare_command(&mut command);
    let spawned = command.spawn();
    // With its copies of the streams: whoever reads waits for the end of all of them.
    drop(command);
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => {
            RUNNING.fetch_sub(1, Relaxed);
            return tell(&watch, failed(&error));
        }
    };
    tell(&watch, child.id() as i32);
    let wait = move || {
        if is_to_end(&child, &watch) {
            // Not allowed where it is another user's.
            let _ = child.kill();
        }
        let status = child.wait();
        RUNNING.fetch_sub(1, Relaxed);
        tell(&watch, status.map_or(libc::W_EXITCODE(1, 0), ExitStatus::into_raw));
    };
    if let Err(error) = std::thread::Builder::new().name("program".to_owned()).spawn(wait) {
        // It runs; that it ends will not be known.
        RUNNING.fetch_sub(1, Relaxed);
        tracing::warn!(%error, "a program is not waited for");
    }
}

/// Waits until the program has ended or is to end; whether it is to.
fn is_to_end(child: &std::process::Child, watch: &OwnedFd) -> bool {
    let number = rustix::process::Pid::from_child(child);
    let Ok(process) = pidfd_open(number, PidfdFlags::empty()) else { return false };
    loop {
        let mut list = [PollFd::new(&process, PollFlags::IN), PollFd::new(watch, PollFlags::IN)];
        match poll(&mut list, None) {
            Err(Errno::INTR) => continue,
            Err(_) => return false,
            Ok(_) => {}
        }
        let [ended, asked] = list.map(|one| !one.revents().is_empty());
        if ended {
            return false;
        }
        if asked {
            // Nobody watches any more: it is not ended for that.
            return matches!(rustix::net::recv(watch, &mut [0], RecvFlags::DONTWAIT), Ok((_, 1)));
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::io::Read as _;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn requests_are_what_was_asked_for() {
        let user = User { uid: 65_534, gid: 7 };
        for program in [
            Program::Health(user),
            Program::TlsPath(user),
            Program::NftRules,
            Program::SaveRules(3),
            Program::SaveVersion(0),
        ] {
            assert_eq!(Program::from_bytes(program.to_bytes()), Some(program));
        }
        assert_eq!(Program::from_bytes(Program::SaveRules(4).to_bytes()), None);
        assert_eq!(Program::from_bytes([6; REQUEST_BYTES]), None);
    }

    fn streams() -> (Streams, io::PipeReader) {
        let (reader, writer) = io::pipe().unwrap();
        let (input, _) = io::pipe().unwrap();
        let errors = writer.try_clone().unwrap();
        (Streams { input: input.into(), output: writer.into(), errors: errors.into() }, reader)
    }

    fn shell(text: &str, streams: Streams) -> Launched {
        let mut command = Command::new("sh");
        command.args(["-c", text]);
        spawn_here(command, streams).unwrap()
    }

    #[test]
    fn a_program_ends_and_says_so() {
        let (streams, mut reader) = streams();
        let mut launched = shell("echo out; echo error >&2; exit 7", streams);
        assert!(launched.id() > 1);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "out\nerror\n");
        let status = launched.wait().unwrap();
        assert_eq!(status.code(), Some(7));
        assert_eq!(launched.try_wait().unwrap(), Some(status), "it stays known");
        launched.kill().unwrap();
    }

    #[test]
    fn a_program_is_ended() {
        let mut launched = shell("exec sleep 600", streams().0);
        assert_eq!(launched.try_wait().unwrap(), None);
        launched.kill().unwrap();
        assert_eq!(launched.wait().unwrap().signal(), Some(libc::SIGKILL));
    }

    #[test]
    fn who_only_looks_away_ends_nothing() {
        let (streams, mut reader) = streams();
        drop(shell("sleep 0.1; echo alive", streams));
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "alive\n");
    }

    #[test]
    fn what_is_not_installed_is_not_found() {
        let command = Command::new("no-such-program-anywhere");
        assert_eq!(spawn_here(command, streams().0).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    /// Through a launcher in a thread: what it starts is watched across the socket.
    #[test]
    fn a_launcher_starts_what_it_is_asked_for() {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let (watch, watched) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let (streams, mut reader) = streams();
        request(&ours, Program::NftRules, &streams, &watched).unwrap();
        drop((streams, watched));
        let (bytes, descriptors) = receive_request(&theirs).unwrap().unwrap();
        let [input, output, errors, watched] = <[OwnedFd; 4]>::try_from(descriptors).unwrap();
        let program = Program::from_bytes(bytes).unwrap();
        begin(program.command(), Streams { input, output, errors }, watched);
        assert!(receive_number(&watch, RecvFlags::empty()).unwrap().unwrap() > 1);
        let begun = Instant::now();
        reader.read_to_string(&mut String::new()).unwrap();
        assert!(begun.elapsed() < Duration::from_secs(20));
        let status = receive_number(&watch, RecvFlags::empty()).unwrap();
        assert!(status.is_some());
        drop(ours);
        assert!(receive_request(&theirs).unwrap().is_none(), "the node has ended");
    }
}
