//! One check under way: a socket or a process.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};

use linux::event::Interest;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType, sockopt};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use super::datagram::{self, Question};
use super::http::{Answer, HttpCheck, Malformed};
use super::tls::{Received, Session, TlsConfigs};
use super::{HealthKind, HealthTarget};

/// Bytes read at once.
const READ_BYTES: usize = 4_096;

/// Most reads of what came after the end of a check.
const READS_MAX: usize = 64;

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
    /// An answer, of HTTP or a datagram, without the text that it must have.
    #[error("the answer does not contain {0:?}")]
    Body(String),
    /// The handshake, or what came encrypted.
    #[error("TLS: {0}")]
    Tls(String),
    /// An error code of a name server (RFC 1035 §4.1.1).
    #[error("DNS error code {0}")]
    Dns(u8),
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

impl Failure {
    /// Whether the target, or somebody for it, said anything: a refusal is an answer, silence and a dead neighbor are none.
    /// A command's exit status tells nothing about it.
    pub fn is_answer(&self) -> bool {
        match self {
            Failure::System(error) => !matches!(
                error.kind(),
                io::ErrorKind::TimedOut | io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable
            ),
            Failure::Timeout(_) => false,
            _ => true,
        }
    }
}

/// A check under way.
#[derive(Debug)]
pub enum Check {
    /// TCP, TLS and HTTP.
    Exchange(Box<Exchange>),
    /// A datagram and its answer.
    Datagram(Datagram),
    /// A command.
    Script(Script),
}

impl Check {
    /// Begins a check. `Err` when it is over already.
    pub fn begin(target: &HealthTarget, configs: &mut TlsConfigs) -> Result<(Check, Interest), Step> {
        match &target.spec.kind {
            HealthKind::Tcp | HealthKind::Tls(_) => Exchange::begin(target, None, configs),
            HealthKind::Http(http) => Exchange::begin(target, Some(http), configs),
            HealthKind::Udp(udp) => Datagram::begin(target, Question::Udp(udp.clone())),
            HealthKind::Dns(dns) => {
                Datagram::begin(target, Question::Dns(dns.clone(), datagram::random_id()))
            }
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
            Check::Datagram(datagram) => datagram.advance(),
            Check::Script(script) => script.advance(),
        }
    }

    /// Outcome as far as it is known when the time is over: an answer that has no end is one.
    pub fn outcome(&mut self) -> Option<Result<(), Failure>> {
        match self {
            Check::Exchange(exchange) => exchange.outcome(),
            Check::Datagram(_) | Check::Script(_) => None,
        }
    }

    /// Ends it before it is done. Returns a killed process that has to be waited for.
    pub fn cancel(self) -> Option<Child> {
        match self {
            Check::Exchange(_) | Check::Datagram(_) => None,
            Check::Script(script) => Some(script.kill()),
        }
    }

    /// A connection whose check is done, half closed: the other end gets a FIN, and what it still sends is taken, not
    /// answered by a reset. Close it a moment later.
    pub fn into_closing(self) -> Option<Closing> {
        match self {
            Check::Exchange(exchange) if exchange.connected => Closing::begin(exchange.socket),
            Check::Exchange(_) | Check::Datagram(_) | Check::Script(_) => None,
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
            Check::Datagram(datagram) => datagram.socket.as_fd(),
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
    /// Bytes sent in the clear, before anything is encrypted.
    plain: Vec<u8>,
    sent: usize,
    tls: Option<Box<Session>>,
    /// Bytes sent encrypted, once the handshake is complete.
    request: Option<Vec<u8>>,
    answer: Answer,
}

impl Exchange {
    fn begin(
        target: &HealthTarget,
        http: Option<&HttpCheck>,
        configs: &mut TlsConfigs,
    ) -> Result<(Check, Interest), Step> {
        let address = target.checked_address();
        let tls = match target.spec.kind.tls() {
            None => None,
            Some(tls) => {
                let config = configs.of(tls, http.is_some()).map_err(Step::NotChecked)?;
                Some(Box::new(Session::new(tls, address, config).map_err(Step::NotChecked)?))
            }
        };
        let socket = socket(target, SocketType::STREAM)?;
        let mut plain =
            if target.spec.proxy_protocol { services::proxy_protocol::LOCAL.to_vec() } else { Vec::new() };
        let mut request = http.map(|http| http.request(address));
        if tls.is_none() {
            plain.extend(request.take().unwrap_or_default());
        }
        let wants_content = http.is_some_and(|http| http.body.is_some());
        let exchange = Exchange {
            socket,
            connected: false,
            http: http.cloned(),
            plain,
            sent: 0,
            tls,
            request,
            answer: if wants_content { Answer::with_content() } else { Answer::default() },
        };
        match rustix::net::connect(&exchange.socket, &address) {
            Ok(()) | Err(Errno::INPROGRESS) => Ok((Check::Exchange(Box::new(exchange)), Interest::Write)),
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
        while let Some(rest) = self.plain.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match rustix::net::send(&self.socket, rest, SendFlags::NOSIGNAL) {
                Ok(bytes) => self.sent += bytes,
                Err(Errno::AGAIN) => return Step::Wait(Interest::Write),
                Err(Errno::INTR) => {}
                Err(errno) => return failed(errno),
            }
        }
        if let Some(mut tls) = self.tls.take() {
            let step = self.advance_encrypted(&mut tls);
            if matches!(step, Step::Done(_)) {
                tls.end(&mut Line(&self.socket));
            }
            self.tls = Some(tls);
            return step;
        }
        if self.http.is_none() {
            return Step::Done(Ok(()));
        }
        let mut buffer = [0; READ_BYTES];
        loop {
            match rustix::net::recv(&self.socket, &mut buffer, RecvFlags::empty()) {
                Ok((0, _)) => return Step::Done(self.outcome().unwrap_or(Err(Failure::Ended))),
                Ok((bytes, _)) => {
                    let bytes = buffer.get(..bytes).unwrap_or_default();
                    if let Some(outcome) = decided(&mut self.answer, self.http.as_ref(), bytes) {
                        return Step::Done(outcome);
                    }
                }
                Err(Errno::AGAIN) => return Step::Wait(Interest::Read),
                Err(Errno::INTR) => {}
                Err(errno) => return self.outcome().map_or_else(|| failed(errno), Step::Done),
            }
        }
    }

    /// Handshake, request and answer; how much is read in all is limited by [`Session::receive`].
    fn advance_encrypted(&mut self, tls: &mut Session) -> Step {
        loop {
            match tls.flush(&mut Line(&self.socket)) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Step::Wait(Interest::Write);
                }
                Err(error) => return Step::Done(self.outcome().unwrap_or(Err(Failure::System(error)))),
            }
            if tls.is_ready() {
                if self.http.is_none() {
                    return Step::Done(Ok(()));
                }
                if let Some(request) = self.request.take() {
                    match tls.put(&request) {
                        Ok(()) => continue,
                        Err(error) => return Step::NotChecked(error),
                    }
                }
            }
            let mut done = None;
            let Self { socket, answer, http, .. } = self;
            let received = tls.receive(&mut Line(socket), &mut |bytes| {
                if done.is_none() {
                    done = decided(answer, http.as_ref(), bytes);
                }
            });
            if let Some(outcome) = done {
                return Step::Done(outcome);
            }
            match received {
                Ok(Received::Some) => {}
                Ok(Received::End) => return Step::Done(self.outcome().unwrap_or(Err(Failure::Ended))),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Step::Wait(Interest::Read),
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::InvalidData => return Step::Done(Err(Failure::Tls(error.to_string()))),
                    _ => return Step::Done(self.outcome().unwrap_or(Err(Failure::System(error)))),
                },
            }
        }
    }

    fn outcome(&self) -> Option<Result<(), Failure>> {
        outcome(&self.answer, self.http.as_ref())
    }
}

/// Takes bytes of the answer; the outcome when they decide.
fn decided(answer: &mut Answer, http: Option<&HttpCheck>, bytes: &[u8]) -> Option<Result<(), Failure>> {
    if let Err(malformed) = answer.receive(bytes) {
        return Some(Err(malformed.into()));
    }
    // Known before, but read to its end: who closes earlier resets the server's connection.
    if answer.is_complete() { outcome(answer, http) } else { None }
}

/// Whether the answer is right, as far as it was read, once its status is known.
fn outcome(answer: &Answer, http: Option<&HttpCheck>) -> Option<Result<(), Failure>> {
    let (http, status) = (http?, answer.status()?);
    Some(match &http.body {
        _ if !http.accepts(status) => Err(Failure::Status(status)),
        Some(body) if !answer.contains(body) => Err(Failure::Body(body.clone())),
        _ => Ok(()),
    })
}

/// A socket as `rustls` reads and writes it.
struct Line<'a>(&'a OwnedFd);

impl io::Read for Line<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::net::recv(self.0, buffer, RecvFlags::empty())?.0)
    }
}

impl io::Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::net::send(self.0, bytes, SendFlags::NOSIGNAL)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A connection on its way to its end.
#[derive(Debug)]
pub struct Closing(OwnedFd);

impl Closing {
    fn begin(socket: OwnedFd) -> Option<Self> {
        // Fails when the other end has reset it: then nothing is left to close.
        rustix::net::shutdown(&socket, Shutdown::Write).ok().map(|()| Self(socket))
    }
}

impl AsFd for Closing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Drop for Closing {
    fn drop(&mut self) {
        // Who closes with something unread sends a reset (RFC 2525 §2.17); of a server that talks without end it gets one.
        let mut buffer = [0; READ_BYTES];
        for _ in 0..READS_MAX {
            match rustix::net::recv(&self.0, &mut buffer, RecvFlags::empty()) {
                Ok((1.., _)) | Err(Errno::INTR) => {}
                Ok(_) | Err(_) => return,
            }
        }
    }
}

/// A datagram and its answer.
#[derive(Debug)]
pub struct Datagram {
    socket: OwnedFd,
    question: Question,
}

impl Datagram {
    fn begin(target: &HealthTarget, question: Question) -> Result<(Check, Interest), Step> {
        let socket = socket(target, SocketType::DGRAM)?;
        rustix::net::connect(&socket, &target.checked_address()).map_err(failed)?;
        rustix::net::send(&socket, &question.bytes(), SendFlags::NOSIGNAL).map_err(failed)?;
        Ok((Check::Datagram(Datagram { socket, question }), Interest::Read))
    }

    fn advance(&mut self) -> Step {
        let mut buffer = [0; READ_BYTES];
        loop {
            match rustix::net::recv(&self.socket, &mut buffer, RecvFlags::empty()) {
                Ok((bytes, _)) => {
                    if let Some(outcome) = self.question.outcome(buffer.get(..bytes).unwrap_or_default()) {
                        return Step::Done(outcome);
                    }
                }
                Err(Errno::AGAIN) => return Step::Wait(Interest::Read),
                Err(Errno::INTR) => {}
                Err(errno) => return failed(errno),
            }
        }
    }
}

/// A socket for a check, with the source that it has to have.
fn socket(target: &HealthTarget, kind: SocketType) -> Result<OwnedFd, Step> {
    let family = if target.address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(family, kind, flags, None)
        .map_err(|errno| Step::NotChecked(errno.into()))?;
    if let Some(source) = target.spec.source {
        // An address that this machine does not have (any more) says nothing about the target.
        rustix::net::bind(&socket, &SocketAddr::new(source, 0))
            .map_err(|errno| Step::NotChecked(errno.into()))?;
    }
    Ok(socket)
}

/// Whose fault an error is.
fn failed(errno: Errno) -> Step {
    match errno {
        // The last: no local port is free.
        Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS | Errno::AGAIN | Errno::ADDRNOTAVAIL => {
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
            .env("ANABRANCH_PORT", target.checked_address().port().to_string())
            .env("ANABRANCH_SERVER", &target.server)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0);
        linux::netns::prepare_command(&mut command);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A lack of our own says nothing about the target: descriptors, memory, a free port, an address.
    #[test]
    fn a_lack_of_our_own_is_no_failure_of_the_target() {
        for errno in [Errno::MFILE, Errno::NOBUFS, Errno::AGAIN, Errno::ADDRNOTAVAIL] {
            assert!(matches!(failed(errno), Step::NotChecked(_)), "{errno}");
        }
        for errno in [Errno::CONNREFUSED, Errno::HOSTUNREACH, Errno::TIMEDOUT] {
            assert!(matches!(failed(errno), Step::Done(Err(Failure::System(_)))), "{errno}");
        }
    }
}
