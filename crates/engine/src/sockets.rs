//! A worker's UDP sockets: its member of every listening group, and for each path it dials its own ephemeral
//! sockets, one per receiving core up to the cap.

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use linux::event::{Epoll, Interest};
use linux::udp::{UdpOptions, UdpSocket};
use packet::drop_reason::{DropCounters, DropReason};
use tunnel::forwarder::Target;
use tunnel::node::Source;

use crate::counters::Counters;

/// Tokens from here on are sockets; below are the worker's other descriptors.
pub const SOCKET_TOKENS: u64 = 16;

/// One socket of this worker.
struct Entry {
    socket: Arc<UdpSocket>,
    wan: u16,
    /// For a dialer's socket: bond, path.
    path: Option<(usize, u8)>,
    version: u32,
}

/// Names one dialer's socket of this worker: bond, path, number within the path.
type DialKey = (usize, u8, u8);

/// The interfaces WAN ids stand for, as control published them last.
#[derive(Clone, Default)]
pub struct WanDevices(pub HashMap<u16, String>);

/// The worker's things that sending needs besides the sockets.
pub struct Link<'a> {
    /// Where new sockets are watched.
    pub epoll: &'a Epoll,
    /// Now, ns of the monotonic clock.
    pub now_ns: u64,
    /// Datagrams sent.
    pub counters: &'a Counters,
    /// Datagrams not sent, by reason.
    pub drops: &'a mut DropCounters,
}

/// All sockets of a worker.
pub struct Sockets {
    entries: Vec<Option<Entry>>,
    dialed: HashMap<DialKey, usize>,
    listening: Vec<usize>,
    wans: WanDevices,
    mark: u32,
    cores: u8,
    /// Sockets per path, by bond slot.
    per_path: HashMap<usize, u8>,
    /// A socket could not be opened: not again before this (ns), so that a missing interface costs little.
    retry_at_ns: u64,
    last_error: Option<ErrorKind>,
    too_big: Vec<(usize, u8, usize)>,
    /// A listening socket could not be watched.
    unwatched: bool,
}

impl Sockets {
    /// No sockets yet.
    pub fn new(mark: u32, cores: u8) -> Self {
        Self {
            entries: Vec::new(),
            dialed: HashMap::new(),
            listening: Vec::new(),
            wans: WanDevices::default(),
            mark,
            cores,
            per_path: HashMap::new(),
            retry_at_ns: 0,
            last_error: None,
            too_big: Vec::new(),
            unwatched: false,
        }
    }

    /// Takes over what control published: this worker's listening sockets, device names, socket caps.
    ///
    /// # Errors
    /// A socket cannot be watched; everything else is taken over all the same.
    pub fn configure(
        &mut self,
        epoll: &Epoll,
        listeners: Vec<(u16, Arc<UdpSocket>)>,
        wans: WanDevices,
        per_path: HashMap<usize, u8>,
    ) -> io::Result<()> {
        for index in std::mem::take(&mut self.listening) {
            let kept = self.entries[index]
                .as_ref()
                .is_some_and(|e| listeners.iter().any(|(_, s)| Arc::ptr_eq(s, &e.socket)));
            if kept {
                self.listening.push(index);
            } else {
                self.close(epoll, index);
            }
        }
        let mut result = Ok(());
        for (wan, socket) in listeners {
            let known = self.listening.iter().any(|index| {
                self.entries[*index].as_ref().is_some_and(|entry| Arc::ptr_eq(&entry.socket, &socket))
            });
            if !known {
                match self.insert(epoll, Entry { socket, wan, path: None, version: 0 }) {
                    Ok(index) => self.listening.push(index),
                    Err(error) => result = Err(error),
                }
            }
        }
        self.wans = wans;
        self.per_path = per_path;
        self.retry_at_ns = 0;
        self.unwatched = result.is_err();
        result
    }

    /// Whether the last [`Self::configure`] did not take over everything; not again until the next one.
    pub fn take_unwatched(&mut self) -> bool {
        std::mem::take(&mut self.unwatched)
    }

    /// Closes dialer sockets whose path is gone.
    pub fn retain_paths(&mut self, epoll: &Epoll, exists: impl Fn(usize, u8) -> bool) {
        let mut gone = Vec::new();
        self.dialed.retain(|(bond, path, _), index| {
            let keep = exists(*bond, *path);
            if !keep {
                gone.push(*index);
            }
            keep
        });
        for index in gone {
            self.close(epoll, index);
        }
    }

    fn insert(&mut self, epoll: &Epoll, entry: Entry) -> io::Result<usize> {
        let index = self.entries.iter().position(Option::is_none).unwrap_or(self.entries.len());
        epoll.add(&*entry.socket, SOCKET_TOKENS + index as u64, Interest::Read)?;
        if index == self.entries.len() {
            self.entries.push(Some(entry));
        } else {
            self.entries[index] = Some(entry);
        }
        Ok(index)
    }

    fn close(&mut self, epoll: &Epoll, index: usize) {
        if let Some(entry) = self.entries[index].take() {
            // Closing removes it from epoll as well, unless another worker still holds the group.
            let _ = epoll.remove(&*entry.socket);
        }
    }

    /// The socket behind an epoll token, and where its datagrams come from (remote and local are to be filled in).
    pub fn by_token(&self, token: u64) -> Option<(Arc<UdpSocket>, Source)> {
        let index = usize::try_from(token.checked_sub(SOCKET_TOKENS)?).ok()?;
        let entry = self.entries.get(index)?.as_ref()?;
        let source = Source {
            wan: entry.wan,
            local: None,
            remote: SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0),
            socket: entry.path,
            hops: None,
        };
        Some((Arc::clone(&entry.socket), source))
    }

    /// Sends a run of datagrams.
    pub fn transmit(&mut self, link: &mut Link<'_>, target: &Target, segment: usize, bytes: &[u8]) {
        let Link { epoll, now_ns, counters, drops } = link;
        let datagrams = bytes.len().div_ceil(segment.max(1)) as u64;
        let Some(index) = self.socket_for(epoll, *now_ns, target) else {
            drops.add_n(DropReason::SendError, datagrams);
            return;
        };
        let Some(entry) = &self.entries[index] else { return };
        let mut result = entry.socket.send(target.route.remote, target.route.local, Some(segment), bytes);
        if result.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused) {
            // An ICMP error of an earlier datagram is reported here once; this one was not sent yet.
            result = entry.socket.send(target.route.remote, target.route.local, Some(segment), bytes);
        }
        match result {
            Ok(lost) => {
                let lost_bytes = lost.saturating_mul(segment).min(bytes.len());
                drops.add_n(DropReason::SendError, lost as u64);
                counters.udp_tx_datagrams.add(datagrams.saturating_sub(lost as u64));
                counters.udp_tx_bytes.add((bytes.len() - lost_bytes) as u64);
                self.last_error = None;
            }
            Err(error) => {
                drops.add_n(DropReason::SendError, datagrams);
                self.react(epoll, target, index, segment, &error);
                if self.last_error != Some(error.kind()) {
                    self.last_error = Some(error.kind());
                    tracing::debug!(remote = %target.route.remote, %error, "send");
                }
            }
        }
    }

    /// Errors that say something about the path or the socket.
    fn react(&mut self, epoll: &Epoll, target: &Target, index: usize, segment: usize, error: &io::Error) {
        match error.raw_os_error() {
            // The interface's MTU shrank: back to the size that always passes; the search begins anew.
            Some(libc::EMSGSIZE) => self.too_big.extend(target.bond.map(|bond| (bond, target.path, segment))),
            // The interface went and came back under the same name.
            Some(libc::ENODEV | libc::ENXIO | libc::EADDRNOTAVAIL) if target.dialer => {
                self.dialed.retain(|_, known| *known != index);
                self.close(epoll, index);
            }
            _ => {}
        }
    }

    /// Bond, path and size of datagrams that were too big for their interface, since the last call.
    pub fn take_too_big(&mut self) -> Vec<(usize, u8, usize)> {
        std::mem::take(&mut self.too_big)
    }

    fn socket_for(&mut self, epoll: &Epoll, now_ns: u64, target: &Target) -> Option<usize> {
        let bond = match target.bond {
            Some(bond) if target.dialer => bond,
            _ => return self.listening_on(target.route.wan),
        };
        let cap = self.per_path.get(&bond).copied().unwrap_or(4);
        let own = (cap / self.cores.max(1)).max(1);
        let key = (bond, target.path, target.peer_core % own);
        if let Some(index) = self.dialed.get(&key).copied() {
            if self.entries[index].as_ref().is_some_and(|entry| entry.version == target.version) {
                return Some(index);
            }
            // The route changed: the interface may be another one, or have another address.
            self.dialed.remove(&key);
            self.close(epoll, index);
        }
        if now_ns < self.retry_at_ns {
            return None;
        }
        match self.dial(epoll, target, bond) {
            Ok(index) => {
                self.dialed.insert(key, index);
                Some(index)
            }
            Err(error) => {
                self.retry_at_ns = now_ns + 50_000_000;
                tracing::debug!(wan = target.route.wan, %error, "cannot open a socket");
                None
            }
        }
    }

    fn dial(&mut self, epoll: &Epoll, target: &Target, bond: usize) -> io::Result<usize> {
        let any = if target.route.remote.is_ipv4() {
            IpAddr::V4(Ipv4Addr::UNSPECIFIED)
        } else {
            IpAddr::V6(Ipv6Addr::UNSPECIFIED)
        };
        let device = self.wans.0.get(&target.route.wan).filter(|name| !name.is_empty()).cloned();
        let options = UdpOptions { device, mark: self.mark, ..UdpOptions::new(SocketAddr::new(any, 0)) };
        let socket = Arc::new(UdpSocket::bind(&options)?);
        let path = Some((bond, target.path));
        self.insert(epoll, Entry { socket, wan: target.route.wan, path, version: target.version })
    }

    fn listening_on(&self, wan: u16) -> Option<usize> {
        let on = |index: &&usize| self.entries[**index].as_ref().is_some_and(|entry| entry.wan == wan);
        self.listening.iter().find(on).copied()
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
