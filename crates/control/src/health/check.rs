//! One check under way: a socket or a process.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use linux::event::Interest;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, sockopt};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use super::http::{Answer, HttpCheck, Malformed};
use super::{HealthKind, HealthTarget};

/// Bytes read at once.
const READ_BYTES: usize = 4_096;

/// How far a check is.
#[derive(Debug)]
pub enum Step {
    /// Go on when the descriptor is ready.
    Wait(Interest),
    /// The target is well, or why not.
    Done(Result<(), Failure>),
    /// This machine could not check.
    NotChecked(io::Error),
}

/// Cause of a failed check; its text is shown to operators.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The connection, or the start of the command.
    #[error("{0}")]
    System(io::Error),
    /// A status that does not mean success.
    #[error("HTTP status {0}")]
    Status(u16),
    /// No HTTP, or more than is read.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// End of the connection before the end of the head.
    #[error("the connection ended before an answer")]
    Ended,
    /// Neither success nor failure after so many ms.
    #[error("no answer within {0} ms")]
    Timeout(u32),
    /// Exit status of a command, not 0.
    #[error("the command ended with {0}")]
    Command(ExitStatus),
}

/// A check under way.
#[derive(Debug)]
pub enum Check {
    /// TCP and HTTP.
    Exchange(Exchange),
    /// A command.
    Script(Script),
}

impl Check {
    /// Begins a check. `Err` when it is over already.
    pub fn begin(target: &HealthTarget) -> Result<(Check, Interest), Step> {
        match &target.spec.kind {
            HealthKind::Tcp => Exchange::begin(target.address, None),
            HealthKind::Http(http) => Exchange::begin(target.address, Some(http)),
            HealthKind::Command { program, arguments } => {
                let mut command = Command::new(program);
                command.args(arguments);
                Script::begin(command, target)
            }
        }
    }

    /// Goes on: the descriptor is ready.
    pub fn advance(&mut self) -> Step {
        match self {
            Check::Exchange(exchange) => exchange.advance(),
            Check::Script(script) => script.advance(),
        }
    }

    /// Outcome as far as it is known when the time is over: an answer that has no end is one.
    pub fn outcome(&mut self) -> Option<Result<(), Failure>> {
        match self {
            Check::Exchange(exchange) => exchange.outcome(),
            Check::Script(_) => None,
        }
    }

    /// Ends it before it is done. Returns a killed process that has to be waited for.
    pub fn cancel(self) -> Option<Child> {
        match self {
            Check::Exchange(_) => None,
            Check::Script(script) => Some(script.kill()),
        }
    }

    /// Whether it is a process.
    pub const fn is_script(&self) -> bool {
        matches!(self, Check::Script(_))
    }
}

impl AsFd for Check {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Check::Exchange(exchange) => exchange.socket.as_fd(),
            Check::Script(script) => script.ended.as_fd(),
        }
    }
}

/// A connection, and perhaps a request and its answer.
#[derive(Debug)]
pub struct Exchange {
    socket: OwnedFd,
    connected: bool,
    http: Option<HttpCheck>,
    request: Vec<u8>,
    sent: usize,
    answer: Answer,
}

impl Exchange {
    fn begin(address: SocketAddr, http: Option<&HttpCheck>) -> Result<(Check, Interest), Step> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)
            .map_err(|errno| Step::NotChecked(errno.into()))?;
        if http.is_none() {
            // Close with a reset: no port of ours waits for the last packets of thousands of checks (TIME-WAIT).
            sockopt::set_socket_linger(&socket, Some(Duration::ZERO))
                .map_err(|errno| Step::NotChecked(errno.into()))?;
        }
        let mut exchange = Exchange {
            socket,
            connected: false,
            http: http.cloned(),
            request: http.map(|http| http.request(address)).unwrap_or_default(),
            sent: 0,
            answer: Answer::default(),
        };
        match rustix::net::connect(&exchange.socket, &address) {
            Ok(()) => {
                exchange.connected = true;
                match exchange.advance() {
                    Step::Wait(interest) => Ok((Check::Exchange(exchange), interest)),
                    over => Err(over),
                }
            }
            Err(Errno::INPROGRESS) => Ok((Check::Exchange(exchange), Interest::Write)),
            Err(errno) => Err(failed(errno)),
        }
    }

    fn advance(&mut self) -> Step {
        if !self.connected {
            match sockopt::socket_error(&self.socket) {
                Ok(Ok(())) => self.connected = true,
                Ok(Err(errno)) | Err(errno) => return failed(errno),
            }
        }
        if self.http.is_none() {
            return Step::Done(Ok(()));
        }
        while let Some(rest) = self.request.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match rustix::net::send(&self.socket, rest, SendFlags::NOSIGNAL) {
                Ok(bytes) => self.sent += bytes,
                Err(Errno::AGAIN) => return Step::Wait(Interest::Write),
                Err(Errno::INTR) => {}
                Err(errno) => return failed(errno),
            }
        }
        let mut buffer = [0; READ_BYTES];
        loop {
            match rustix::net::recv(&self.socket, &mut buffer, RecvFlags::empty()) {
                Ok((0, _)) => return Step::Done(self.outcome().unwrap_or(Err(Failure::Ended))),
                Ok((bytes, _)) => {
                    if let Err(malformed) = self.answer.receive(buffer.get(..bytes).unwrap_or_default()) {
                        return Step::Done(Err(malformed.into()));
                    }
                    // Known before, but read to its end: who closes earlier resets the server's connection.
                    if self.answer.is_complete()
                        && let Some(outcome) = self.outcome()
                    {
                        return Step::Done(outcome);
                    }
                }
                Err(Errno::AGAIN) => return Step::Wait(Interest::Read),
                Err(Errno::INTR) => {}
                Err(errno) => return self.outcome().map_or_else(|| failed(errno), Step::Done),
            }
        }
    }

    /// Whether the answer's status is right, once it is known.
    fn outcome(&self) -> Option<Result<(), Failure>> {
        let (http, status) = (self.http.as_ref()?, self.answer.status()?);
        Some(if http.accepts(status) { Ok(()) } else { Err(Failure::Status(status)) })
    }
}

/// Whose fault an error is.
fn failed(errno: Errno) -> Step {
    match errno {
        Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS | Errno::AGAIN => {
            Step::NotChecked(errno.into())
        }
        _ => Step::Done(Err(Failure::System(errno.into()))),
    }
}

/// A process.
#[derive(Debug)]
pub struct Script {
    child: Child,
    /// Readable when it has ended.
    ended: OwnedFd,
}

impl Script {
    fn begin(mut command: Command, target: &HealthTarget) -> Result<(Check, Interest), Step> {
        command
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("ANABRANCH_ADDRESS", target.address.ip().to_string())
            .env("ANABRANCH_PORT", target.address.port().to_string())
            .env("ANABRANCH_SERVER", &target.server)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0);
        let mut child =
            command.spawn().map_err(|error| match error.raw_os_error().map(Errno::from_raw_os_error) {
                Some(errno) => failed(errno),
                None => Step::Done(Err(Failure::System(error))),
            })?;
        let ended = Pid::from_raw(child.id().cast_signed())
            .ok_or(Errno::SRCH)
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()));
        match ended {
            Ok(ended) => Ok((Check::Script(Script { child, ended }), Interest::Read)),
            Err(errno) => {
                kill_group(&mut child);
                // It is dead or dying: this takes no time worth naming.
                let _ = child.wait();
                Err(Step::NotChecked(errno.into()))
            }
        }
    }

    fn advance(&mut self) -> Step {
        match self.child.try_wait() {
            Ok(Some(status)) if status.success() => Step::Done(Ok(())),
            Ok(Some(status)) => Step::Done(Err(Failure::Command(status))),
            Ok(None) => Step::Wait(Interest::Read),
            Err(error) => Step::NotChecked(error),
        }
    }

    fn kill(mut self) -> Child {
        kill_group(&mut self.child);
        self.child
    }
}

/// Kills a process and what it has started. It has not been waited for, so its number is still its own.
fn kill_group(child: &mut Child) {
    if let Some(group) = Pid::from_raw(child.id().cast_signed()) {
        // Fails only when all of the group are gone.
        let _ = kill_process_group(group, Signal::KILL);
    }
}
