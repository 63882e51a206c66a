//! Prefixes of translators that routers advertise (PREF64, RFC 8781), and when they are asked for them.
//!
//! [`Advertised`] is pure: it is given messages and times. An advertised prefix counts before one that the name service
//! shows (RFC 8781 §5.1), for as long as its router says.

use std::io;
use std::net::Ipv6Addr;
use std::time::{Duration, Instant};

use linux::router_discovery::{ADVERTISEMENT_BYTES_MAX, RouterDiscovery};

use super::{LAYOUTS, Nat64Prefix, PREFIXES_MAX};

/// Prefixes that are remembered at most, of all WANs.
const KNOWN_MAX: usize = 16;
/// Routers are asked so often for their first advertisement, and so far apart (RFC 4861 §10).
const SOLICITATIONS_MAX: u8 = 3;
const SOLICITATION_GAP: Duration = Duration::from_secs(4);
/// How soon an answer is looked for while routers are asked (they take up to 0.5 s); later once a second.
const LOOK: Duration = Duration::from_millis(100);
/// Advertisements that are read at one look, at most.
const READ_MAX: usize = 64;

/// Header of a router advertisement, bytes (RFC 4861 §4.2).
const HEADER_BYTES: usize = 16;
const ADVERTISEMENT: u8 = 134;
/// Type of the option, and its length: units of eight bytes (RFC 8781 §4).
const OPTION_TYPE: u8 = 38;
const OPTION_UNITS: usize = 2;
/// Prefix lengths by their code.
const LENGTHS: [u8; 6] = [96, 64, 56, 48, 40, 32];

/// A prefix as an option tells it, and for how long; zero: it is no longer to be used.
type Told = (Nat64Prefix, Duration);

/// The options of an advertisement. Those with a wrong length or an unknown code are ignored, as are messages that are no
/// valid advertisement (RFC 4861 §6.1.2).
fn read(message: &[u8]) -> Vec<Told> {
    let Some((header, mut rest)) = message.split_at_checked(HEADER_BYTES) else { return Vec::new() };
    if header[..2] != [ADVERTISEMENT, 0] {
        return Vec::new();
    }
    let mut list = Vec::new();
    while let [kind, units, ..] = *rest {
        // An option without length makes the whole message invalid.
        let Some((option, behind)) = rest.split_at_checked(usize::from(units) * 8) else { return Vec::new() };
        if units == 0 {
            return Vec::new();
        }
        if kind == OPTION_TYPE && usize::from(units) == OPTION_UNITS {
            list.extend(read_option(option));
        }
        rest = behind;
    }
    // Less than a header of an option is left over.
    if rest.is_empty() { list } else { Vec::new() }
}

fn read_option(option: &[u8]) -> Option<Told> {
    let (head, bytes) = option.split_at_checked(4)?;
    let scaled = u16::from_be_bytes([head[2], head[3]]);
    let length = *LENGTHS.get(usize::from(scaled & 7))?;
    let (_, places) = LAYOUTS.iter().find(|(known, _)| *known == length)?;
    let mut prefix = [0; 16];
    let counts = usize::from(length / 8);
    prefix.get_mut(..counts)?.copy_from_slice(bytes.get(..counts)?);
    // The 13 bits count units of 8 seconds, and stand above the three of the code: as they are, they are seconds.
    let lifetime = Duration::from_secs(u64::from(scaled & !7));
    Some((Nat64Prefix { prefix, places: *places }, lifetime))
}

struct Known {
    interface: u32,
    router: Ipv6Addr,
    prefix: Nat64Prefix,
    until: Instant,
}

/// Prefixes as routers advertised them.
#[derive(Default)]
struct Advertised {
    list: Vec<Known>,
}

impl Advertised {
    /// Takes a message of a router. Returns whether the prefixes changed.
    fn take(&mut self, interface: u32, router: Ipv6Addr, message: &[u8], now: Instant) -> bool {
        if !router.is_unicast_link_local() {
            return false;
        }
        let before = self.prefixes();
        for (prefix, lifetime) in read(message) {
            let place = self.list.iter().position(|known| {
                (known.interface, known.router, known.prefix) == (interface, router, prefix)
            });
            let until = now + lifetime;
            match place {
                Some(place) if lifetime.is_zero() => drop(self.list.remove(place)),
                Some(place) => self.list[place].until = until,
                None if lifetime.is_zero() || self.list.len() >= KNOWN_MAX => {}
                None => self.list.push(Known { interface, router, prefix, until }),
            }
        }
        self.prefixes() != before
    }

    /// Forgets what is over its time, or came by an interface that is not one of these. Returns whether the prefixes changed.
    fn keep(&mut self, interfaces: &[u32], now: Instant) -> bool {
        let before = self.prefixes();
        self.list.retain(|known| now < known.until && interfaces.contains(&known.interface));
        self.prefixes() != before
    }

    fn prefixes(&self) -> Vec<Nat64Prefix> {
        let mut list = Vec::new();
        for known in &self.list {
            if !list.contains(&known.prefix) && list.len() < PREFIXES_MAX {
                list.push(known.prefix);
            }
        }
        list
    }
}

/// Listens to the routers of the WANs that have IPv6 alone, and asks them.
#[derive(Default)]
pub(crate) struct Routers {
    socket: Option<RouterDiscovery>,
    /// No socket can be had; said once.
    refused: bool,
    advertised: Advertised,
    /// Interfaces whose routers are asked: how often they were, and when the next time is.
    asked: Vec<(u32, u8, Instant)>,
}

impl Routers {
    /// Listens on these interfaces, on none if there are none. Returns whether the prefixes changed.
    pub(crate) fn look(&mut self, interfaces: &[u32], now: Instant) -> bool {
        if interfaces.is_empty() {
            self.socket = None;
            self.asked.clear();
            return self.advertised.keep(&[], now);
        }
        let mut changed = self.advertised.keep(interfaces, now);
        if self.socket.is_none() && !self.refused {
            self.socket = RouterDiscovery::open()
                .inspect_err(|error| tracing::debug!(%error, "no prefix of a NAT64 from routers"))
                .ok();
            self.refused = self.socket.is_none();
        }
        let Some(socket) = &self.socket else { return changed };
        self.asked.retain(|(interface, ..)| interfaces.contains(interface));
        for interface in interfaces {
            if !self.asked.iter().any(|(known, ..)| known == interface) {
                self.asked.push((*interface, 0, now));
            }
        }
        let mut buffer = [0; ADVERTISEMENT_BYTES_MAX];
        for _ in 0..READ_MAX {
            match socket.receive(&mut buffer) {
                Ok(Some(told)) if interfaces.contains(&told.interface) => {
                    let message = buffer.get(..told.bytes).unwrap_or_default();
                    changed |= self.advertised.take(told.interface, told.router, message, now);
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        for (interface, count, next) in &mut self.asked {
            let known = self.advertised.list.iter().any(|known| known.interface == *interface);
            if !known && *count < SOLICITATIONS_MAX && now >= *next {
                // It may have no link-local address yet; the next time it has.
                if let Err(error) = socket.solicit(*interface) {
                    tracing::debug!(%error, interface = *interface, "cannot ask for routers");
                }
                *count += 1;
                *next = now + SOLICITATION_GAP;
            }
        }
        changed
    }

    /// When to look again, other than once a second.
    pub(crate) fn next(&self, now: Instant) -> Option<Instant> {
        let asking = self.socket.is_some()
            && self.advertised.list.is_empty()
            && self.asked.iter().any(|(_, count, next)| *count < SOLICITATIONS_MAX || now < *next);
        asking.then_some(now + LOOK)
    }

    /// Prefixes that are advertised now.
    pub(crate) fn prefixes(&self) -> Vec<Nat64Prefix> {
        self.advertised.prefixes()
    }
}

#[cfg(test)]
mod tests;
