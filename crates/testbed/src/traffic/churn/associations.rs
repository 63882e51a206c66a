//! UDP associations of the client side.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use fastrand::Rng;
use linux::clock::monotonic_ns;
use linux::event::{Epoll, Interest};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use super::STALL_NS;
use super::cause::UdpCause;
use super::client::{Options, life_end_ns};
use super::meter::Meter;
use super::slots::{OTHER, Slots};
use super::timers::{Queued, Timers};
use super::udp::{DATAGRAM_BYTES_MAX, Datagram};
use super::wire::Way;

/// Pause before those that could not be opened or were lost are replaced, ns.
const AGAIN_NS: u64 = 50_000_000;

#[derive(Debug)]
struct Association {
    fd: OwnedFd,
    /// The last datagram sent; its number counts from 1.
    sent: Datagram,
    /// Highest number answered.
    answered: u64,
    /// Since when an answer is owed.
    owed_ns: Option<u64>,
    /// The next datagram is sent then.
    due_ns: u64,
    life_end_ns: u64,
    queued: Queued,
}

impl Association {
    fn deadline_ns(&self) -> u64 {
        self.owed_ns.map_or(self.due_ns, |owed| self.due_ns.min(owed + STALL_NS))
    }
}

/// All associations of a client.
#[derive(Debug)]
pub(super) struct Associations {
    slots: Slots<Association>,
    to: SocketAddr,
    sources: Vec<IpAddr>,
    wanted: usize,
    interval_ns: u64,
    life: Option<Duration>,
    again_ns: u64,
    turn: usize,
    buffer: Vec<u8>,
    room: Vec<u8>,
}

impl Associations {
    pub(super) fn new(options: &Options) -> Associations {
        Associations {
            slots: Slots::default(),
            to: options.to,
            sources: options.sources.clone(),
            wanted: options.udp,
            interval_ns: options.udp_interval.as_nanos() as u64,
            life: options.udp_life,
            again_ns: 0,
            turn: 0,
            buffer: vec![0; DATAGRAM_BYTES_MAX + 1],
            room: Vec::with_capacity(DATAGRAM_BYTES_MAX),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn wants_more(&self, now: u64) -> bool {
        self.len() < self.wanted && now >= self.again_ns
    }

    /// Opens one; its first datagram goes out within the interval, so that they do not all send at once.
    pub(super) fn open(
        &mut self,
        id: u64,
        now: u64,
        random: &mut Rng,
        meter: &Meter,
        (epoll, timers): (&Epoll, &mut Timers),
    ) {
        let sent = Datagram { id, seed: random.u64(..), number: 0 };
        let due_ns = now + random.u64(..=self.interval_ns);
        let life_end_ns = life_end_ns(now, self.life, random);
        let token = self.slots.reserve();
        let opened = self.socket().and_then(|fd| {
            let added = epoll.add(&fd, OTHER | token, Interest::Read);
            added.map_or(Err(Errno::NOMEM), |()| Ok(fd))
        });
        let fd = match opened {
            Ok(fd) => fd,
            Err(error) => {
                self.slots.free(token);
                self.again_ns = now + AGAIN_NS;
                return meter.local_error(|| format!("a UDP socket to {}: {error}", self.to));
            }
        };
        let queued = Queued::default();
        let mut association =
            Association { fd, sent, answered: 0, owed_ns: None, due_ns, life_end_ns, queued };
        timers.arm(OTHER | token, due_ns, &mut association.queued);
        self.slots.put(token, association);
    }

    fn socket(&mut self) -> Result<OwnedFd, Errno> {
        let family = if self.to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let fd = rustix::net::socket_with(family, SocketType::DGRAM, flags, None)?;
        if !self.sources.is_empty() {
            self.turn = (self.turn + 1) % self.sources.len();
            rustix::net::bind(&fd, &SocketAddr::new(self.sources[self.turn], 0))?;
        }
        rustix::net::connect(&fd, &self.to)?;
        Ok(fd)
    }

    /// Answers have arrived.
    pub(super) fn ready(&mut self, token: u64, meter: &Meter, timers: &mut Timers, ending: bool) {
        let token = token & !OTHER;
        let Some(mut association) = self.slots.take(token) else { return };
        loop {
            match rustix::net::recv(&association.fd, &mut self.buffer[..], RecvFlags::empty()) {
                Ok((bytes, _)) => {
                    let bytes = self.buffer.get(..bytes).unwrap_or_default();
                    match Datagram::decode(bytes, Way::ToClient, &mut self.room) {
                        Some(answer) => take(&mut association, answer, meter),
                        None => meter.udp.corrupt.add(1),
                    }
                }
                Err(Errno::INTR) => {}
                // Nothing more; or somebody says that nobody listens: if that is so no answer will come.
                Err(_) => break,
            }
        }
        let over = ending || monotonic_ns() >= association.life_end_ns;
        if over && association.owed_ns.is_none() {
            return self.slots.free(token);
        }
        timers.arm(OTHER | token, association.deadline_ns(), &mut association.queued);
        self.slots.put(token, association);
    }

    /// The moment `at_ns` of an association has come: it sends, is lost, or is over.
    pub(super) fn due(
        &mut self,
        token: u64,
        (at_ns, now): (u64, u64),
        meter: &Meter,
        timers: &mut Timers,
        ending: bool,
    ) {
        let token = token & !OTHER;
        let Some(mut association) = self.slots.take(token) else { return };
        if Timers::is_current(&mut association.queued, at_ns) {
            if association.owed_ns.is_some_and(|owed| owed + STALL_NS <= now) {
                self.again_ns = now + AGAIN_NS;
                self.slots.free(token);
                let sent = association.sent;
                return meter.lost(UdpCause::NoAnswer, sent.id, || {
                    format!(
                        "no_answer: association {:016x}, {} sent, {} was the last answered",
                        sent.id, sent.number, association.answered
                    )
                });
            }
            let over = ending || now >= association.life_end_ns;
            if over && association.owed_ns.is_none() {
                return self.slots.free(token);
            }
            if association.due_ns <= now {
                self.send(&mut association, now, meter);
            }
            timers.arm(OTHER | token, association.deadline_ns(), &mut association.queued);
        }
        self.slots.put(token, association);
    }

    fn send(&mut self, association: &mut Association, now: u64, meter: &Meter) {
        // One that ended before it sent anything was none.
        meter.udp.associations.add(u64::from(association.sent.number == 0));
        association.sent.number += 1;
        association.due_ns = (association.due_ns + self.interval_ns).max(now);
        association.owed_ns.get_or_insert(now);
        association.sent.encode(Way::ToServer, &mut self.room);
        // One that the system does not take is lost like any other.
        let _ = rustix::net::send(&association.fd, &self.room, SendFlags::empty());
        meter.udp.sent.add(1);
    }
}

fn take(association: &mut Association, answer: Datagram, meter: &Meter) {
    let sent = association.sent;
    if (answer.id, answer.seed) != (sent.id, sent.seed) || answer.number > sent.number {
        return meter.udp.corrupt.add(1);
    }
    meter.udp.answered.add(1);
    if answer.number > association.answered {
        association.answered = answer.number;
        association.owed_ns = (answer.number < sent.number).then(monotonic_ns);
    }
}
