//! The process that carries paths over TCP, seen from the node: started with the first connection that is wanted, or with the
//! node if peers may connect; started again when it ends.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::config::Wan;
use linux::event::{Epoll, Interest};
use linux::launcher::{self, Launched, Program, Streams};
use linux::privileges::User;
use packet::attachment::BondId;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tls_path::protocol::{self, FromHelper, ToHelper};

use super::{Fallback, Line, LineState, Order, accepting_wan, relay_wan};
use crate::config::Config;
use crate::events::{EventSender, NodeEvent};

/// Time without a sign of life; it gives one each second.
const SILENCE: Duration = Duration::from_secs(10);
/// Pause before a new start.
const PAUSE: Duration = Duration::from_secs(2);

/// Who may connect, and where their datagrams go.
struct Listening {
    socket: TcpListener,
    deliver_to: u16,
    /// WANs are bound to their interfaces, so that datagrams from this machine need one of their own.
    needs_wan: bool,
}

/// All connections of this node, and the process.
pub(crate) struct TlsPaths {
    fallback: Fallback,
    listening: Option<Listening>,
    helper: Option<Helper>,
    /// Number of the last process.
    last_number: u32,
    next_start: Instant,
    user: User,
    mark: u32,
    events: EventSender,
}

struct Helper {
    /// One that was given up may say something still, of which nothing is this one's.
    number: u32,
    child: Launched,
    socket: Arc<OwnedFd>,
    heard: Instant,
}

impl TlsPaths {
    /// No connection yet. `mark`: firewall mark of the tunnel's own packets.
    ///
    /// # Errors
    /// When the port on which peers may connect cannot be had; the text says which.
    pub(crate) fn new(config: &Config, mark: u32, events: &EventSender) -> Result<Self, String> {
        let (listen, needs_wan) = (config.node.listen_tls.zip(config.node.listen), !config.wans.is_empty());
        let (user, events) = (config.services.settings.health_user, events.try_clone());
        let events = events.map_err(|error| error.to_string())?;
        let open = |(port, deliver_to): (u16, u16)| {
            let local = linux::udp::any_address(port);
            match linux::tcp::listen(local, mark) {
                Ok(socket) => Ok(Listening { socket, deliver_to, needs_wan }),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(format!(
                    "node.listen-tls: TCP port {port} is taken; ss -ltnp 'sport = :{port}' says by whom; choose another port"
                )),
                Err(error) => Err(format!("node.listen-tls: TCP port {port}: {error}")),
            }
        };
        let listening = listen.map(open).transpose()?;
        let next_start = Instant::now();
        let fallback = Fallback::default();
        Ok(Self { fallback, listening, helper: None, last_number: 0, next_start, user, mark, events })
    }

    /// Looks at all lines; whether the engine has to be told. `device`: the interface of a WAN, if it is bound to one.
    pub(crate) fn look(&mut self, lines: &[LineState], device: impl Fn(u16) -> Option<String>) -> bool {
        let now = Instant::now();
        let mut changed = false;
        if self.helper.as_ref().is_some_and(|helper| now.duration_since(helper.heard) > SILENCE) {
            self.ended("it said nothing for 10 s");
            changed = true;
        }
        if self.listening.is_some() {
            self.start(now);
        }
        for order in self.fallback.look(now, lines) {
            match order {
                Order::HangUp { id } => {
                    self.say(&ToHelper::HangUp { id }, None);
                    changed = true;
                }
                Order::Dial { id, line, remote } => {
                    tracing::info!(%remote, "UDP does not get through; trying TCP");
                    let device = device(line.1);
                    if let Err(error) = self.dial(now, id, remote, device.as_deref()) {
                        tracing::info!(%remote, %error, "no connection over TCP");
                        self.fallback.down(now, id);
                    }
                }
            }
        }
        changed
    }

    /// Takes what the process with this number says, or its end; whether the engine has to be told.
    pub(crate) fn heard(&mut self, number: u32, said: Option<&FromHelper>) -> bool {
        let now = Instant::now();
        let Some(helper) = self.helper.as_mut().filter(|helper| helper.number == number) else {
            return false;
        };
        helper.heard = now;
        let Some(message) = said else {
            self.ended("its socket is closed");
            return true;
        };
        match message {
            FromHelper::Alive { kept, .. } => {
                if !kept.is_empty() {
                    tracing::debug!(kept, "rights of the process for TLS paths");
                }
                false
            }
            FromHelper::Up { id, port } => {
                let line = self.fallback.up(*id, *port);
                if line.is_some() {
                    tracing::info!("a path goes over TCP and TLS now");
                }
                line.is_some()
            }
            FromHelper::Down { id, reason } => {
                let line = self.fallback.down(now, *id);
                if line.is_some() {
                    tracing::info!(reason, "no connection over TCP");
                }
                line.is_some()
            }
        }
    }

    /// The process is gone, and all connections with it.
    fn ended(&mut self, why: &str) {
        let Some(mut helper) = self.helper.take() else { return };
        // It may be another user's; it ends by itself when its socket is closed, which the reading thread has too.
        let _ = rustix::net::shutdown(&helper.socket, rustix::net::Shutdown::Both);
        let _ = helper.child.kill();
        let _ = helper.child.try_wait();
        let now = Instant::now();
        tracing::warn!("the process for TLS paths ended: {why}");
        self.fallback.all_down(now);
        self.next_start = now + PAUSE;
    }

    /// WANs that there are besides those of the host: of the connections, and of peers' connections.
    pub(crate) fn wans(&self, wans: &[Wan]) -> Vec<Wan> {
        let of = |wan: &Wan| -> Vec<SocketAddr> {
            let relays = self.fallback.relays().filter(|((_, of), _)| *of == wan.id);
            relays.map(|(_, relay)| relay).collect()
        };
        let dialed = wans.iter().filter_map(|wan| {
            let relays = of(wan);
            (!relays.is_empty()).then(|| relay_wan(wan, relays))
        });
        let accepting = self.listening.as_ref().filter(|listening| listening.needs_wan);
        dialed.chain(accepting.map(|_| accepting_wan())).collect()
    }

    /// Endpoints of a peer besides those of the configuration.
    pub(crate) fn endpoints(&self, peer: BondId) -> impl Iterator<Item = SocketAddr> {
        self.fallback.relays().filter(move |((of, _), _): &(Line, _)| *of == peer).map(|(_, relay)| relay)
    }

    fn dial(&mut self, now: Instant, id: u32, remote: SocketAddr, device: Option<&str>) -> io::Result<()> {
        if !self.start(now) {
            return Err(io::Error::other("the process for TLS paths does not run"));
        }
        let socket = linux::tcp::connect(remote, device, self.mark)?;
        self.say(&ToHelper::Dial { id }, Some(socket.as_fd()));
        Ok(())
    }

    fn say(&self, message: &ToHelper, with: Option<BorrowedFd<'_>>) {
        let Some(helper) = &self.helper else { return };
        if let Err(error) = protocol::send(&helper.socket, message, with) {
            // It falls silent, and is started anew.
            tracing::debug!(%error, "the process for TLS paths does not listen");
        }
    }

    /// Starts the process if it does not run; whether it does.
    fn start(&mut self, now: Instant) -> bool {
        if self.helper.is_none() && now >= self.next_start {
            self.next_start = now + PAUSE;
            self.last_number = self.last_number.wrapping_add(1);
            match self.spawn(now, self.last_number) {
                Ok(helper) => self.helper = Some(helper),
                Err(error) => tracing::warn!(%error, "the process for TLS paths does not start"),
            }
            if let Some(Listening { socket, deliver_to, .. }) = &self.listening {
                self.say(&ToHelper::Listen { deliver_to: *deliver_to }, Some(socket.as_fd()));
            }
        }
        self.helper.is_some()
    }

    fn spawn(&self, now: Instant, number: u32) -> io::Result<Helper> {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        let child = launcher::spawn(Program::TlsPath(self.user), Streams::of_helper(theirs)?)?;
        let socket = Arc::new(ours);
        let (heard, events) = (Arc::clone(&socket), self.events.try_clone()?);
        std::thread::Builder::new()
            .name("tls-paths".to_owned())
            .spawn(move || hear(&heard, number, &events))?;
        Ok(Helper { number, child, socket, heard: now })
    }
}

impl Drop for TlsPaths {
    fn drop(&mut self) {
        if let Some(mut helper) = self.helper.take() {
            // The reading thread has the socket too: its end is the process's.
            let _ = rustix::net::shutdown(&helper.socket, rustix::net::Shutdown::Both);
            let _ = helper.child.kill();
            let _ = helper.child.wait();
        }
    }
}

/// Hands on what the process says, until it ends.
fn hear(socket: &OwnedFd, number: u32, events: &EventSender) {
    let Ok(epoll) = Epoll::new() else { return };
    if epoll.add(socket, 0, Interest::Read).is_err() {
        return;
    }
    let mut ready = Vec::new();
    loop {
        if epoll.wait(&mut ready, None).is_err() {
            return;
        }
        let said = match protocol::receive::<FromHelper>(socket) {
            Ok(Some((said, _))) => Some(said),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Ok(None) | Err(_) => None,
        };
        let ended = said.is_none();
        if !events.send(NodeEvent::TlsPath(number, said)) || ended {
            return;
        }
    }
}
