//! The process `anabranch tls-path`: started by the node with one end of a packet socket pair as its standard input. It ends
//! when the other end is closed.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv6Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use linux::event::{Epoll, Interest};
use linux::privileges::{self, User};
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection};

use crate::connection::Connection;
use crate::protocol::{self, ALIVE_MS, FromHelper, ToHelper};
use crate::tls;

/// Connections of peers at most: each has two descriptors and up to 1 MiB on its way.
const ACCEPTED_MAX: usize = 1_024;

/// Connections of one source at most, an IPv4 address or the /64 of an IPv6 address: several peers may stand behind one.
const OF_ONE_ADDRESS_MAX: usize = 64;

/// Connections at most of whom the node does not know yet: strangers can open them. The oldest makes room for one more.
const UNPROVEN_MAX: usize = 256;

/// Connections that are taken from the listening socket in one turn.
const ACCEPTS_A_TURN: usize = 16;

/// Descriptors that it wants.
const DESCRIPTORS: u64 = 4_096;

/// So much sooner than other processes the kernel may end it when memory is short (`proc_pid_oom_score_adj`).
const OOM_SCORE: &str = "300";

const TOKEN_NODE: u64 = 0;
const TOKEN_LISTENER: u64 = 1;
/// Connections have two tokens each from here on.
const TOKEN_FIRST: u64 = 2;

/// Carries datagrams until the node ends. `user`: whose rights it takes.
///
/// # Errors
/// When standard input is no socket, or what comes over it is not the node's.
pub fn run(user: &User) -> io::Result<()> {
    let input = io::stdin();
    let node = input.as_fd().try_clone_to_owned()?;
    if !linux::process::is_socket(&node) {
        let text = "standard input is no socket: the node starts this process itself, see anabranch up";
        return Err(io::Error::new(ErrorKind::InvalidInput, text));
    }
    // What the kernel does not allow here, it does not need either.
    let _ = linux::process::raise_open_files(DESCRIPTORS);
    let _ = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE);
    let kept = privileges::give_up(user).join("; ");
    serve(node, kept)
}

/// Carries datagrams for whoever has the other end of this packet socket, until that is closed. `kept`: rights that this process
/// still has, for people.
///
/// # Errors
/// When the system has no descriptors left, or what comes is not the node's.
pub fn serve(node: OwnedFd, kept: String) -> io::Result<()> {
    Helper::new(node, kept)?.run()
}

/// A connection, and what it is to the node.
struct Entry {
    connection: Connection,
    /// Number by which the node knows it; `None`: a peer made it.
    dialed: Option<u32>,
    remote: Option<IpAddr>,
    told_up: bool,
}

struct Helper {
    node: OwnedFd,
    kept: String,
    epoll: Epoll,
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    listener: Option<(TcpListener, u16)>,
    entries: BTreeMap<u64, Entry>,
    next: u64,
    /// Plain bytes of one turn; a room for all connections.
    scratch: Vec<u8>,
}

impl Helper {
    fn new(node: OwnedFd, kept: String) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        epoll.add(&node, TOKEN_NODE, Interest::Read)?;
        Ok(Self {
            node,
            kept,
            epoll,
            client: tls::client()?,
            server: tls::server()?,
            listener: None,
            entries: BTreeMap::new(),
            next: TOKEN_FIRST,
            scratch: Vec::new(),
        })
    }

    fn run(mut self) -> io::Result<()> {
        let mut ready = Vec::new();
        let mut alive_at = Instant::now();
        loop {
            let now = Instant::now();
            if now >= alive_at {
                alive_at = now + Duration::from_millis(ALIVE_MS);
                self.end_overdue(now);
                let accepted = self.accepted().count() as u32;
                self.tell(&FromHelper::Alive { kept: self.kept.clone(), accepted });
            }
            self.epoll.wait(&mut ready, Some(alive_at.saturating_duration_since(now)))?;
            for event in &ready {
                match event.token {
                    TOKEN_NODE => {
                        if !self.on_node()? {
                            return Ok(());
                        }
                    }
                    TOKEN_LISTENER => self.accept(),
                    token => self.turn(token & !1),
                }
            }
        }
    }

    /// Follows the node; `false`: it is gone.
    fn on_node(&mut self) -> io::Result<bool> {
        loop {
            let (message, with) = match protocol::receive(&self.node) {
                Ok(Some(came)) => came,
                Ok(None) => return Ok(false),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                Err(error) => return Err(error),
            };
            match (message, with) {
                (ToHelper::Listen { deliver_to }, Some(socket)) => {
                    let listener = TcpListener::from(socket);
                    listener.set_nonblocking(true)?;
                    self.epoll.add(&listener, TOKEN_LISTENER, Interest::Read)?;
                    self.listener = Some((listener, deliver_to));
                }
                (ToHelper::Dial { id }, Some(socket)) => {
                    if let Err(error) = self.dial(id, TcpStream::from(socket)) {
                        self.tell(&FromHelper::Down { id, reason: error.to_string() });
                    }
                }
                (ToHelper::HangUp { id }, _) => {
                    let token = self.entries.iter().find(|(_, entry)| entry.dialed == Some(id));
                    if let Some(token) = token.map(|(token, _)| *token) {
                        self.entries.remove(&token);
                    }
                }
                (ToHelper::Listen { .. } | ToHelper::Dial { .. }, None) => {
                    return Err(io::Error::new(ErrorKind::InvalidData, "a message without its socket"));
                }
            }
        }
    }

    fn dial(&mut self, id: u32, tcp: TcpStream) -> io::Result<()> {
        let tls = ClientConnection::new(Arc::clone(&self.client), tls::server_name());
        let connection = Connection::dialed(tcp, tls.map_err(io::Error::other)?.into())?;
        self.enter(Entry { connection, dialed: Some(id), remote: None, told_up: false })
    }

    fn accepted(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values().filter(|entry| entry.dialed.is_none())
    }

    /// Takes connections of peers; one too many is closed at once.
    fn accept(&mut self) {
        for _ in 0..ACCEPTS_A_TURN {
            let Some((listener, deliver_to)) = &self.listener else { return };
            // Nothing to do about one that is gone already, nor about a lack of descriptors: the next turn tries again.
            let Ok((tcp, from)) = listener.accept() else { return };
            let deliver_to = *deliver_to;
            let from = source_of(from.ip());
            let of_this = self.accepted().filter(|entry| entry.remote == Some(from)).count();
            if of_this >= OF_ONE_ADDRESS_MAX || self.accepted().count() >= ACCEPTED_MAX {
                continue;
            }
            let is_unproven = |entry: &Entry| entry.dialed.is_none() && !entry.connection.is_proven();
            let unproven =
                self.entries.iter().filter(|(_, entry)| is_unproven(entry)).map(|(token, _)| *token);
            let (first, count) = (unproven.clone().next(), unproven.count());
            if let Some(first) = first.filter(|_| count >= UNPROVEN_MAX) {
                self.entries.remove(&first);
            }
            let entry = ServerConnection::new(Arc::clone(&self.server))
                .map_err(io::Error::other)
                .and_then(|tls| Connection::accepted(tcp, tls.into(), deliver_to))
                .map(|connection| Entry { connection, dialed: None, remote: Some(from), told_up: false });
            // One that cannot be had is closed; its peer tries again.
            let _ = entry.and_then(|entry| self.enter(entry));
        }
    }

    fn enter(&mut self, entry: Entry) -> io::Result<()> {
        let token = self.next;
        self.next += 2;
        let (tcp, udp) = entry.connection.interests();
        self.epoll.add(&entry.connection.tcp, token, tcp)?;
        self.epoll.add(&entry.connection.udp, token | 1, udp)?;
        self.entries.insert(token, entry);
        self.turn(token);
        Ok(())
    }

    fn turn(&mut self, token: u64) {
        let Some(entry) = self.entries.get_mut(&token) else { return };
        let connection = &mut entry.connection;
        // An error of the loopback port, as when nobody listens there now, is no error of the connection; it must not wake for ever.
        let _ = connection.udp.take_error();
        if let Err(error) = connection.turn(&mut self.scratch) {
            let reason = match error.kind() {
                ErrorKind::UnexpectedEof => "the peer closed the connection".to_owned(),
                _ => error.to_string(),
            };
            self.end(token, reason);
            return;
        }
        let (tcp, udp) = connection.interests();
        let watched = self.epoll.modify(&connection.tcp, token, tcp);
        let watched = watched.and_then(|()| self.epoll.modify(&connection.udp, token | 1, udp));
        let port = connection.udp.local_addr().map(|address| address.port());
        if let Err(error) = watched {
            self.end(token, error.to_string());
            return;
        }
        if let (Some(id), false, true, Ok(port)) =
            (entry.dialed, entry.told_up, entry.connection.is_up(), port)
        {
            entry.told_up = true;
            self.tell(&FromHelper::Up { id, port });
        }
    }

    fn end_overdue(&mut self, now: Instant) {
        let overdue = |entry: &Entry| entry.connection.overdue(now);
        let over: Vec<_> =
            self.entries.iter().filter_map(|(token, entry)| Some((*token, overdue(entry)?))).collect();
        for (token, reason) in over {
            self.end(token, reason.to_owned());
        }
    }

    fn end(&mut self, token: u64, reason: String) {
        if let Some(Entry { dialed: Some(id), .. }) = self.entries.remove(&token) {
            self.tell(&FromHelper::Down { id, reason });
        }
    }

    /// A message that the node does not read is lost: it looks for signs of life, and asks anew.
    fn tell(&self, message: &FromHelper) {
        let _ = protocol::send(&self.node, message, None);
    }
}

/// Whom a connection is of, as far as shares go: who has one IPv6 address has all of its /64.
fn source_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
        address @ IpAddr::V4(_) => address,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn who_has_one_address_of_ipv6_has_its_network() {
        let source = |text: &str| source_of(text.parse().unwrap()).to_string();
        assert_eq!(source("2001:db8:1:2:3:4:5:6"), source("2001:db8:1:2::9"));
        assert_ne!(source("2001:db8:1:2::9"), source("2001:db8:1:3::9"));
        assert_eq!(
            (source("192.0.2.7"), source("::ffff:192.0.2.7")),
            ("192.0.2.7".into(), "192.0.2.7".into())
        );
        assert_ne!(source("192.0.2.7"), source("192.0.2.8"));
    }
}
